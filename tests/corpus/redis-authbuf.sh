#!/bin/bash
# Redis 7.0.15, CVE-2025-21605: an unauthenticated client that does not read its replies grows the output buffer.
NAME=redis-authbuf; BIN=redis-server; PORT=${PORT:-17104}
PATCH=0001-Limiting-output-buffer-for-unauthenticated-client-CV.patch
EXPECT="checkClientOutputBufferLimits"
KIND="in-function"; NOTE="static function authRequired is called from a new place; likely inlined callers change too"
REDIS_AUTH="foobar"; REDIS_ARGS="--requirepass foobar"
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # send ~8 MB of SET without AUTH and without reading: fixed server closes the connection
resp <<'P'
from resp import *
import time
s.settimeout(10); one=enc("SET","x","5")*3000; closed=False
try:
    for i in range(100): s.sendall(one)
except socket.timeout: print("probe: send blocked"); sys.exit(2)
except OSError as e: closed=True
time.sleep(.5)
if s.getsockopt(socket.IPPROTO_TCP,socket.TCP_INFO,8)[0]!=1: closed=True   # 1 = ESTABLISHED
print("probe: closed by server:",closed); sys.exit(0 if closed else 1)
P
}
dispatch "$@"
