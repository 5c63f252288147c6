#!/bin/bash
# Redis 7.0.15, CVE-2025-46818: Lua basic types' metatables; adds a field to struct redisServer, a config entry and entries in static tables.
NAME=redis-static; BIN=redis-server; PORT=${PORT:-17106}
REFUSE='static_configs|redisServer'
PATCH=CVE-2025-46818.patch
EXPECT="luaEngineInitEngine scriptingInit luaSetTableProtectionRecursively luaNewIndexAllowList luaRegisterGlobalProtectionFunction +luaSetTableProtectionForBasicTypes; data: static_configs, lua_builtins_allow_list, struct redisServer"
KIND="STATIC DATA + STRUCT FIELD (run at start-up only)"; NOTE="a sound tool must refuse or warn: the new table entries and the start-up work cannot take effect in a running server"
REDIS_AUTH=""; REDIS_ARGS=""
. "$(dirname "${BASH_SOURCE[0]}")/lib/redis.sh"
probe() { # the new directive exists only in the fixed server
resp <<'P'
from resp import *
r=cmd("CONFIG","GET","lua-enable-deprecated-api"); print("probe:",r); sys.exit(1 if r==[] else 0 if len(r)==2 else 2)
P
}
dispatch "$@"
