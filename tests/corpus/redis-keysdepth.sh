#!/bin/bash
# Redis 7.0.15, CVE-2024-31227/31228/31449 in one patch: glob recursion unlimited; ACL '%~'; lua bit.tohex
NAME=redis-keysdepth; BIN=redis-server; PORT=${PORT:-17105}
PATCH=0001-Apply-security-fixes-for-CVEs-1113.patch
EXPECT="stringmatchlen_impl stringmatchlen stringmatch stringmatchlen_fuzz_test ACLSetSelector bit_tohex"
KIND="in-function + changed signature of a static recursive function"; NOTE="3 CVEs in one patch, one of them in bundled Lua (deps/lua); stringmatch and stringmatchlen_fuzz_test inline what changed"
REDIS_AUTH=""; REDIS_ARGS=""
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # KEYS of 1500 x '*?' against a key of 2000 'a': old matches, fixed stops at depth 1000
resp <<'P'
from resp import *
k="a"*2000; cmd("SET",k,"1"); r=cmd("KEYS","*?"*1500); cmd("DEL",k)
print("probe: matches",len(r)); sys.exit(1 if len(r)==1 else 0 if r==[] else 2)
P
}
dispatch "$@"
