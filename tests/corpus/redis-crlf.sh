#!/bin/bash
# Redis 7.0.15, CVE-2025-67733: CR/LF in error replies goes to the client as is (protocol injection).
NAME=redis-crlf; BIN=redis-server; PORT=${PORT:-17103}
PATCH=CVE-2025-67733.patch
EXPECT="functionListCommand RM_ReplyWithSimpleString addReplyStatusFormat luaReplyToRedisReply luaCallFunction +addReplyErrorSdsExSafe +addReplyStatusSafe"
KIND="in-function + 2 new functions + prototypes in a header"; NOTE="touches 4 files; + marks a new function"
REDIS_AUTH=""; REDIS_ARGS=""
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # FUNCTION LIST "X\r\n+INJECTED" : old echoes the CRLF
resp <<'P'
from resp import *
s.sendall(enc("FUNCTION","LIST","X\r\n+INJECTED")+enc("PING"))
l=f.readline(); l2=f.readline()
s.sendall(enc("EVAL","error(redis.error_reply(\"X\\r\\n+INJ2\"))","0")+enc("ECHO","zz"))
l3=f.readline(); l4=f.readline()
print("probe:",l,l2,l3,l4)
a=l2.startswith(b"+INJECTED"); b=(l2==b"+PONG\r\n") and b"X  +INJECTED" in l
sys.exit(1 if a else 0 if b else 2)
P
}
dispatch "$@"
