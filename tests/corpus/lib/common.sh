# Shared by the cases: sourced after a case has set NAME, BIN, PORT, EXPECT, KIND and NOTE, and before its own functions.
# Usage: bash CASE.sh build | info | start_old | start_new | stop | pids | load [secs] | probe | verify
#   or:  CORPUS_SOURCE=1 . CASE.sh     then call the functions.
# probe exit status: 0 = server shows the FIXED behaviour, 1 = OLD behaviour, 2 = could not tell.
CORPUS_LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CORPUS_CACHE=${CORPUS_CACHE:-$CORPUS_LIB/../../../target/corpus}
mkdir -p "$CORPUS_CACHE" && CORPUS_CACHE=$(cd "$CORPUS_CACHE" && pwd)
CASE_DIR=$CORPUS_CACHE/$NAME
RUN_DIR=$CASE_DIR/run
OLD=$CASE_DIR/old/$BIN
NEW=$CASE_DIR/new/$BIN
JOBS=${JOBS:-2}
# What is built asks git for its version: not that of the repository around it, which may move between two builds.
export GIT_CEILING_DIRECTORIES=$CORPUS_CACHE
CF=${CORPUS_CFLAGS:--g -O2}
LF=${CORPUS_LDFLAGS:--Wl,--emit-relocs}
PY=$(command -v /usr/bin/python3 || command -v python3)

need_pkgs() { # install what is missing
  local miss="" p; for p in "$@"; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || miss="$miss $p"; done
  [ -z "$miss" ] && return 0
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $miss >/dev/null 2>&1 && return 0
  apt-get update >/dev/null 2>&1; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $miss >/dev/null
}
src_apt() { # src_apt WORDS... : apt with the machine's own archives, sources included, and lists of its own; the system's stay as they are
  local d=$CORPUS_CACHE/_apt
  if [ ! -e "$d/ready" ]; then
    mkdir -p "$d/lists/partial" "$d/parts"
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | sed -n 's/^deb /deb-src /p' > "$d/sources.list"
    for f in /etc/apt/sources.list.d/*.sources; do
      [ ! -e "$f" ] || sed 's/^Types:.*/Types: deb-src/' "$f" > "$d/parts/$(basename "$f")"
    done
    nice apt-get -o Dir::Etc::sourcelist="$d/sources.list" -o Dir::Etc::sourceparts="$d/parts" -o Dir::State::lists="$d/lists" -qq update >/dev/null 2>&1 && touch "$d/ready"
  fi
  local tool=$1; shift
  nice "$tool" -o Dir::Etc::sourcelist="$d/sources.list" -o Dir::Etc::sourceparts="$d/parts" -o Dir::State::lists="$d/lists" "$@"
}
get_src() { # get_src PKG VERSION DESTDIR : unpatched Debian source; the pinned version first, else any that can be had
  local pkg=$1 ver=$2 dest=$3 dl=$CORPUS_CACHE/_dl v dsc
  mkdir -p "$dl"; need_pkgs dpkg-dev patch xz-utils
  ( cd "$dl" || exit 1
    for v in "$ver" $(src_apt apt-cache showsrc "$pkg" 2>/dev/null | sed -n 's/^Version: //p' | sort -u); do
      dsc="${pkg}_${v#*:}.dsc"
      [ -e "$dsc.ok" ] && { echo "$dsc" > ".$pkg.$NAME"; exit 0; }
      if src_apt apt-get source -q -q --download-only "$pkg=$v" >/dev/null 2>&1; then touch "$dsc.ok"; echo "$dsc" > ".$pkg.$NAME"; exit 0; fi
    done; exit 1 ) || { echo "the Debian source archive has no $pkg $ver, or can't be reached: \`apt-get source $pkg\` needs a network" >&2; return 1; }
  rm -rf "$dest"; mkdir -p "$(dirname "$dest")"
  dpkg-source --no-check --skip-patches -x "$dl/$(cat "$dl/.$pkg.$NAME")" "$dest" >/dev/null 2>&1
}
series_until() { # series_until SRCDIR PATCH : apply the Debian series up to, not with, PATCH (all if PATCH is END)
  local p; ( cd "$1" || exit 1
  while read -r p _; do case $p in ''|\#*) continue;; esac
    [ "$p" = "$2" ] && exit 0
    patch -s -f -p1 < "debian/patches/$p" >/dev/null || { echo "patch $p failed" >&2; exit 1; }
  done < debian/patches/series; [ "$2" = END ] )
}
apply_one() { ( cd "$1" && patch -s -f -p1 < "$2" >/dev/null ); }
wait_port() { "$PY" - "$1" <<'P'
import socket,sys,time
for _ in range(200):
    try: socket.create_connection(("127.0.0.1",int(sys.argv[1])),1).close(); sys.exit(0)
    except OSError: time.sleep(.05)
sys.exit(1)
P
}
launch() { # launch CMD... : in the background, own session, pid kept
  mkdir -p "$RUN_DIR"
  setsid "$@" >"$RUN_DIR/out.log" 2>&1 </dev/null & echo $! > "$RUN_DIR/pid"
  wait_port "$PORT" || { echo "server did not open port $PORT"; tail -5 "$RUN_DIR/out.log"; return 1; }
  echo "pid $(cat "$RUN_DIR/pid") exe $1"
}
stop() { [ -f "$RUN_DIR/pid" ] || return 0; local p; p=$(cat "$RUN_DIR/pid"); kill "$p" 2>/dev/null
  for _ in $(seq 50); do kill -0 "$p" 2>/dev/null || break; sleep .1; done; kill -9 "$p" 2>/dev/null; rm -f "$RUN_DIR/pid"; extra_stop; }
killaux() { local p; [ -f "$1" ] || return 0; for p in $(cat "$1"); do kill "$p" 2>/dev/null; for _ in $(seq 50); do kill -0 "$p" 2>/dev/null || break; sleep .1; done; kill -9 "$p" 2>/dev/null; done; rm -f "$1"; }
extra_stop() { :; }
pids() { cat "$RUN_DIR/pid"; }   # the process(es) to patch
start_old() { stop >/dev/null 2>&1; start "$OLD"; }
start_new() { stop >/dev/null 2>&1; start "$NEW"; }
build() { [ -x "$OLD" ] && [ -x "$NEW" ] && { info; return 0; }
  local t0=$SECONDS; mkdir -p "$CASE_DIR/old" "$CASE_DIR/new"
  ( do_build; times > "$CASE_DIR/cpu" ) >"$CASE_DIR/build.log" 2>&1; [ -x "$OLD" ] && [ -x "$NEW" ] || { echo "BUILD FAILED, see $CASE_DIR/build.log"; tail -15 "$CASE_DIR/build.log"; return 1; }
  echo "wall $((SECONDS-t0)), cpu user+sys $(tail -1 "$CASE_DIR/cpu")" > "$CASE_DIR/build_secs"; info; }
info() { echo "case=$NAME"; echo "old=$OLD"; echo "new=$NEW"; echo "build_secs=$(cat "$CASE_DIR/build_secs" 2>/dev/null)"
  echo "expected=$EXPECT"; echo "refuse=${REFUSE:-}"; echo "allow=${ALLOW:-}"; echo "kind=$KIND"; echo "note=$NOTE"; }
verify() { local r; build || return 1
  start_old || return 1; probe; r=$?; [ $r = 1 ] || { echo "FAIL: old server probes $r, want 1"; stop; return 1; }
  load 3 || { echo "FAIL: load on old"; stop; return 1; }
  probe; r=$?; [ $r = 1 ] || { echo "FAIL: old server after load probes $r, want 1"; stop; return 1; }; stop
  start_new || return 1; probe; r=$?; [ $r = 0 ] || { echo "FAIL: new server probes $r, want 0"; stop; return 1; }
  load 3 || { echo "FAIL: load on new"; stop; return 1; }; stop; echo "VERIFIED $NAME"; }
load() { "$PY" "$CORPUS_LIB/load.py" "$PORT" "${1:-5}" "${2:-20}" "${LOAD_KIND:-plain}" "${REDIS_AUTH:-}"; } # load [secs] [conns]
resp() { PYTHONPATH=$CORPUS_LIB PYTHONDONTWRITEBYTECODE=1 "$PY" - "$PORT"; } # Python on stdin, with a connection open
dispatch() { [ -z "${CORPUS_SOURCE:-}" ] || return 0; local cmd=${1:-info}; [ $# -gt 0 ] && shift; "$cmd" "$@"; exit $?; }
