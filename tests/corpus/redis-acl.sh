#!/bin/bash
# Redis 7.0.15, CVE-2024-51741: ACL selector '%' without permission letters or '~' is taken.
NAME=redis-acl; BIN=redis-server; PORT=${PORT:-17101}
PATCH=0002-Fix-Read-Write-key-pattern-selector-CVE-2024-51741-1.patch
EXPECT="ACLSetSelector"
KIND="in-function"; NOTE="Debian redis 5:7.0.15-1~deb12u10; single-threaded event loop + bio threads"
REDIS_AUTH=""; REDIS_ARGS=""
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # 'ACL SETUSER u %' : old says +OK, fixed says syntax error
resp <<'P'
from resp import *
r=cmd("ACL","SETUSER","corpusprobe","%")
cmd("ACL","DELUSER","corpusprobe")
print("probe: reply",r[:90]); sys.exit(1 if r==b"+OK" else 0 if b"yntax error" in r else 2)
P
}
dispatch "$@"
