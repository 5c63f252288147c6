#!/bin/bash
# Redis 7.0.15, CVE-2025-32023: sparse HyperLogLog run lengths may wrap a 32-bit counter.
NAME=redis-hll; BIN=redis-server; PORT=${PORT:-17102}
PATCH=0006-CVE-2025-32023.patch
EXPECT="hllSparseToDense hllSparseRegHisto hllMerge"
KIND="in-function"; NOTE="3 functions in one file; hllSparseRegHisto may be inlined in hllCount (then hllCount changes too)"
REDIS_AUTH=""; REDIS_ARGS=""
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # a sparse HLL made of 262145 XZERO opcodes (and no VAL, so nothing is written): the sum wraps to 16384.
resp <<'P'
from resp import *
v=b"HYLL"+bytes([1])+bytes(3)+bytes(7)+b"\x80"+bytes([0x7f,0xff])*262145
cmd("SET","corpusprobe",v); r=cmd("PFCOUNT","corpusprobe"); cmd("DEL","corpusprobe")
print("probe: reply",r[:90]); sys.exit(1 if r[:1]==b":" else 0 if b"INVALIDOBJ" in r else 2)
P
}
dispatch "$@"
