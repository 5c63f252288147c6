# The sample gateway in its versions, running: sourced by demo, breaker, panic and cycles after lib.sh. Set WORK before.
SESSIONS=${SESSIONS:-500} RATE=${RATE:-5000} WORKERS=${WORKERS:-2}
GATEWAY_PID= LOAD_PID=
[ -n "${GATEWAY_ARGS+set}" ] || GATEWAY_ARGS=()

# gateway_versions NAME...: built into target/gateway/NAME/sample-gateway, with progress of cargo.
gateway_versions() {
  need patch patch
  for v in "$@"; do
    say "building the gateway: $v"
    sample-gateway/build-version "$v" "$TARGET/gateway/$v" >"$WORK/build-$v.log" 2>&1 || { tail -n 20 "$WORK/build-$v.log" >&2; die "the gateway's version $v does not build"; }
  done
}

# gateway_start VERSION: sets GATEWAY_PID and PORT.
gateway_start() {
  rm -rf "$WORK/data" && mkdir -p "$WORK/data"
  # The file is looked into before the gateway may have been started.
  : >"$WORK/gateway.out"
  # GATEWAY_PRELOAD: another allocator.
  LD_PRELOAD=${GATEWAY_PRELOAD:-} "$TARGET/gateway/$1/sample-gateway" --port 0 --data "$WORK/data" --workers "$WORKERS" "${GATEWAY_ARGS[@]}" >"$WORK/gateway.out" 2>"$WORK/gateway.err" &
  GATEWAY_PID=$!
  local i
  for i in $(seq 100); do
    PORT=$(sed -n 's/^listening .*:\([0-9]*\)$/\1/p' "$WORK/gateway.out")
    [ -n "$PORT" ] && { say "the gateway ($1) runs: pid $GATEWAY_PID, port $PORT"; return 0; }
    kill -0 "$GATEWAY_PID" 2>/dev/null || break
    sleep 0.1
  done
  die "the gateway does not start: $(tail -n 1 "$WORK/gateway.err")"
}

# gateway_stop: in order, as SIGTERM asks for.
gateway_stop() {
  local code=0
  kill "$GATEWAY_PID"
  wait "$GATEWAY_PID" || code=$?
  GATEWAY_PID=
  return $code
}

# load_start SECONDS NAME: in the background; its report goes to $WORK/NAME.json.
load_start() {
  say "load: $SESSIONS sessions, $RATE messages a second, $1 s"
  "$BIN/fix-load" --port "$PORT" --sessions "$SESSIONS" --rate "$RATE" --duration "$1" --json >"$WORK/$2.json" 2>"$WORK/$2.err" &
  LOAD_PID=$!
}
load_running() { kill -0 "$LOAD_PID" 2>/dev/null; }
load_wait() { local code=0; wait "$LOAD_PID" || code=$?; LOAD_PID=; return $code; }

# fee: the commission that the running gateway charges for 100 at 5000.
fee() { "$BIN/fix-load" probe --port "$PORT" --symbol ACME --qty 100 --price 5000; }
rss_kb() { awk '/^VmRSS:/ {print $2}' "/proc/$GATEWAY_PID/status"; }
gateway_alive() { kill -0 "$GATEWAY_PID" 2>/dev/null; }
json() { python3 -c 'import functools,json,sys; d=json.load(open(sys.argv[1])); print(functools.reduce(lambda d,k: d[k], sys.argv[2].split("."), d))' "$@"; }
functions_in() { python3 -c 'import json,sys; print(len(json.load(open(sys.argv[1]))["functions"]))' "$1"; }

# A socket's path is short.
SOCKETS=$(mktemp -d)
cleanup() {
  rm -rf "$SOCKETS"
  [ -z "$LOAD_PID" ] || kill "$LOAD_PID" 2>/dev/null || true
  [ -z "$GATEWAY_PID" ] || kill "$GATEWAY_PID" 2>/dev/null || true
}
trap cleanup EXIT
