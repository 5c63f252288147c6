# Shared by the redis cases: Debian's source, old first, then the fix and an incremental make.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
LOAD_KIND=redis
start() { mkdir -p "$RUN_DIR"; launch "$1" --port $PORT --bind 127.0.0.1 --save '' --appendonly no --dir "$RUN_DIR" --enable-debug-command yes $REDIS_ARGS; }
do_build() {
  set -e; need_pkgs gcc make pkg-config libc6-dev
  local S=$CASE_DIR/src
  get_src redis '5:7.0.15-1~deb12u10' "$S"
  series_until "$S" "$PATCH"
  # same tree, old first, then the fix and an incremental make
  mk() { nice make -C "$S/src" -j$JOBS MALLOC=libc USE_SYSTEMD=no BUILD_TLS=no OPTIMIZATION=-O2 CFLAGS="$CF" LDFLAGS="$LF" redis-server; }
  mk; cp "$S/src/redis-server" "$OLD"
  apply_one "$S" "debian/patches/$PATCH"
  if grep -q 'deps/lua' "$S/debian/patches/$PATCH"; then nice make -C "$S/deps" MALLOC=libc USE_SYSTEMD=no BUILD_TLS=no OPTIMIZATION=-O2 CFLAGS="$CF" LDFLAGS="$LF" lua; fi   # same flags, else deps are cleaned
  mk; cp "$S/src/redis-server" "$NEW"
}
