#!/bin/bash
# mini-redis 0.4.0 -> 0.4.1 (published crate): SET k v ex N with a lower-case option is refused.
NAME=mini-redis-set; BIN=mini-redis-server; PORT=${PORT:-17150}
CRATE=mini-redis; VOLD=0.4.0; VNEW=0.4.1
EXPECT="mini_redis::cmd::set::Set::parse_frames +<str>::to_uppercase +core::unicode::unicode_data::conversions::to_upper"
ALLOW="tokio::task::spawn::spawn +tokio::runtime::thread_pool::Spawner::spawn +tokio::runtime::basic_scheduler::Spawner::spawn" # 16 codegen units: they move, and are inlined elsewhere
KIND="Rust, in-function, sync code (often inlined into Command::from_frame / the connection future)"; NOTE="tokio multi-thread; the published bump also has blocking_client and a buffer in Connection::write_decimal 12->20 bytes, held over an await (future layout grows)"
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
NEWBUMP=$CASE_DIR/new_bump/$BIN     # the later version exactly as published (version bump: other symbol hashes)
need_rust() { command -v cargo >/dev/null || { echo "cargo is needed (rustup, or apt-get install cargo)"; return 1; }; }
get_crate() { # get_crate NAME VERSION DEST : published source through cargo's own client
  local t d; t=$(mktemp -d); mkdir "$t/src"; : > "$t/src/lib.rs"
  printf '[package]\nname="x"\nversion="0.0.0"\nedition="2021"\n[dependencies]\nd={package="%s",version="=%s"}\n' "$1" "$2" > "$t/Cargo.toml"
  (cd "$t" && cargo fetch -q 2>/dev/null) || true
  d=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$1-$2" | head -1); rm -rf "$t"; [ -d "$d" ] || return 1
  rm -rf "$3"; mkdir -p "$(dirname "$3")"; cp -r "$d" "$3"; touch "$3"/src/*.rs; }
rust_mk() { # rust_mk SRCDIR OUT : always the same target folder; DWARF line tables + relocations kept
  grep -q '^\[workspace' "$1/Cargo.toml" || printf '\n[workspace]\n' >> "$1/Cargo.toml"   # it is no member of a workspace around it
  ( cd "$1" && CARGO_PROFILE_RELEASE_DEBUG=2 CARGO_PROFILE_RELEASE_STRIP=none CARGO_TARGET_DIR="$CASE_DIR/target" \
    RUSTFLAGS="-Clink-arg=-Wl,--emit-relocs" nice cargo build --release -j$JOBS $CARGO_ARGS --bin "$BIN" ) && mkdir -p "$(dirname "$2")" && cp "$CASE_DIR/target/release/$BIN" "$2"; }
do_build() { # old; then the source hunk only (same version); then the published later version (bump)
  set -e; need_rust; need_pkgs gcc libc6-dev
  local A=$CASE_DIR/v_old B=$CASE_DIR/v_new S=$CASE_DIR/src
  get_crate $CRATE $VOLD "$A"; get_crate $CRATE $VNEW "$B"
  rm -rf "$S"; cp -r "$A" "$S"; prep_old "$S" "$B"; rust_mk "$S" "$OLD" || exit 1
  take_hunk "$S" "$B"; rust_mk "$S" "$NEW" || exit 1
  if [ -z "$NO_BUMP" ]; then cp "$S/Cargo.lock" "$CASE_DIR/lock.old"; rm -rf "$S"; cp -r "$B" "$S"; touch "$S"/src/*.rs; sed "/^name = \"$CRATE\"/{n;s/$VOLD/$VNEW/}" "$CASE_DIR/lock.old" > "$S/Cargo.lock"; rust_mk "$S" "$NEWBUMP" || echo "no bump build"; fi
}
prep_old() { :; }
start_new_bump() { stop >/dev/null 2>&1; start "$NEWBUMP"; }
take_hunk() { cp "$2/src/cmd/set.rs" "$1/src/cmd/set.rs"; touch "$1/src/cmd/set.rs"; }
start() { launch "$1" --port $PORT; }
probe() { # SET k v ex 60 : old drops the connection with an error, fixed answers OK; a plain SET must work on both
resp <<'P'
from resp import *
if cmd("SET","corpusprobe","v")!=b"+OK": print("probe: plain SET fails"); sys.exit(2)
s.sendall(enc("SET","corpusprobe","v","ex","60"))
try: r=f.readline()
except OSError: r=b""
print("probe: reply",r[:90]); sys.exit(0 if r==b"+OK\r\n" else 1 if r==b"" or r[:1]==b"-" else 2)
P
}
dispatch "$@"
