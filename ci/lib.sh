# Shared by the checks of this folder: sourced, never run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
BIN=${LIVEPATCH_BIN_DIR:-$TARGET/release}

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# need COMMAND PACKAGE ...: installs what is missing when it can, else says it in one line.
need() {
  local miss=() what
  while [ $# -gt 0 ]; do command -v "$1" >/dev/null || miss+=("$2"); shift 2; done
  [ ${#miss[@]} -eq 0 ] && return 0
  what="missing: ${miss[*]} (apt-get install ${miss[*]})"
  { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || die "$what"
  say "installing ${miss[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends "${miss[@]}" >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${miss[@]}" >/dev/null; } || die "$what"
}

# want COMMAND PACKAGE: installs it when it can, else says what stays unchecked.
want() { (need "$@") || say "NOT CHECKED: what needs $1 ($2 can't be had)"; }

need_rust() { command -v cargo >/dev/null || die "missing: a Rust toolchain (https://rustup.rs)"; need gcc gcc ld binutils; }

# The tools, unless LIVEPATCH_BIN_DIR says where they are.
build_tools() {
  need_rust
  if [ -z "${LIVEPATCH_BIN_DIR:-}" ]; then
    say "building the tools"
    cargo build --release --workspace --quiet
  fi
  for t in patch-builder livepatch; do [ -x "$BIN/$t" ] || die "missing: $BIN/$t"; done
}
