#!/bin/bash
# A large Rust program of crates.io, twice: the second time with one line changed in its own crate.
#   rust.sh DIR       DIR/rust.old and DIR/rust.new
set -euo pipefail
CRATE=mdbook VERSION=0.4.52 FILE=src/cmd/clean.rs
FROM='"Unable to remove the build directory"' TO='"The build directory can not be removed"'
dir=$1
[ -x "$dir/rust.old" ] && [ -x "$dir/rust.new" ] && exit 0
mkdir -p "$dir/fetch/src"
# Cargo fetches the published crate as a dependency of an empty package; its own source is then built as a program.
printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n[dependencies]\n%s = "=%s"\n' "$CRATE" "$VERSION" >"$dir/fetch/Cargo.toml"
: >"$dir/fetch/src/lib.rs"
manifest=$(cd "$dir/fetch" && cargo metadata --format-version 1 |
  python3 -c 'import json,sys; print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == sys.argv[1]))' "$CRATE")
[ -d "$dir/src" ] || { cp -r "$(dirname "$manifest")" "$dir/src"; printf '\n[workspace]\n' >>"$dir/src/Cargo.toml"; }
grep -qF "$FROM" "$dir/src/$FILE" || { echo "$CRATE $VERSION: $FILE has no $FROM" >&2; exit 1; }
build() {
  ( cd "$dir/src"
    export CARGO_TARGET_DIR=../target CARGO_INCREMENTAL=0 CARGO_PROFILE_RELEASE_DEBUG=2 CARGO_PROFILE_RELEASE_STRIP=none
    # Little is inlined at this level: more functions for less of the compiler's time.
    export CARGO_PROFILE_RELEASE_OPT_LEVEL=1
    export RUSTFLAGS="-Csymbol-mangling-version=v0 -Clink-arg=-Wl,--emit-relocs -Clink-arg=-Wl,--build-id"
    nice cargo build --release --locked --jobs "${JOBS:-2}" --bin "$CRATE" )
  cp "$dir/target/release/$CRATE" "$dir/rust.$1"
}
build old
sed -i "s/$FROM/$TO/" "$dir/src/$FILE"
build new
sed -i "s/$TO/$FROM/" "$dir/src/$FILE"
