"""The fixtures that say `//#abi:`, built twice: as the fixture says, and once more with -rdynamic, for a tool that looks at exported names only."""
import os, shutil, subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIXTURES = f"{ROOT}/tests/fixtures"
DEFAULTS = {
    "c": ["gcc", "-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"],
    "cpp": ["g++", "-std=c++17", "-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"],
    "rs": ["rustc", "-g", "-O", "-Csymbol-mangling-version=v0", "-Ccodegen-units=1", "-Clink-arg=-Wl,--emit-relocs"],
}
SIDES = ("old", "new")


class Pair:
    """One fixture: its units and flags for both sides (tests/fixtures/README.md)."""

    def __init__(self, name):
        self.name, self.language = name.rsplit(".", 1)
        self.truth, self.refusals, self.cc, self.only, self.dwp = None, [], None, None, None
        self.flags, first = ([], []), f"fixture.{self.language}"
        self.units = ([[first, ""]], [[first, ""]])
        into = (True, True)
        with open(f"{FIXTURES}/{name}") as f:
            for line in f:
                if not line.startswith("//#"):
                    for units, taken in zip(self.units, into):
                        if taken:
                            units[-1][1] += line
                    continue
                key, _, value = (x.strip() for x in line[3:].partition(":"))
                if key in ("both", "old", "new"):
                    into = (key != "new", key != "old")
                elif key == "unit":
                    into = (True, True)
                    for units in self.units:
                        units.append([value, ""])
                elif key in ("flags", "flags-old", "flags-new"):
                    for side, flags in zip(SIDES, self.flags):
                        if key in ("flags", f"flags-{side}"):
                            flags.extend(value.split())
                elif key == "only-flags":
                    self.only = value.split()
                elif key == "abi":
                    self.truth = value
                elif key == "expect-refusal":
                    self.refusals.append(value)
                elif key == "cc":
                    self.cc = value
                elif key == "dwp":
                    self.dwp = value

    def command(self, side, out, extra):
        program, *defaults = DEFAULTS[self.language]
        program, flags = self.cc or program, self.flags[side]
        if self.language == "rs":
            sources = ["--edition", "2021", "--crate-name", "fixture", "fixture.rs"]
        else:
            sources = ["-pthread", "-I."] + [n for n, _ in self.units[side] if not n.endswith(".h")] + ["main.c"]
        return [program, *(defaults if self.only is None else self.only), *sources, *flags, *extra, "-o", out]

    def build(self, folder, extra=()):
        """Both sides, from one path. Returns the two programs; does nothing if the same is there already."""
        dir = f"{folder}/{self.name}"
        out = [f"{dir}/{side}" for side in SIDES]
        commands = [self.command(i, out[i], extra) for i in (0, 1)]
        stamp = repr((commands, self.units, self.dwp))
        try:
            with open(f"{dir}/stamp") as f:
                if f.read() == stamp:
                    return out
        except FileNotFoundError:
            pass
        work = f"{dir}/src"
        for i, command in enumerate(commands):
            shutil.rmtree(work, ignore_errors=True)
            os.makedirs(work)
            for name in ("common.h", "main.c", "common.rs"):
                shutil.copy(f"{FIXTURES}/common/{name}", work)
            for name, text in self.units[i]:
                os.makedirs(os.path.dirname(f"{work}/{name}"), exist_ok=True)
                with open(f"{work}/{name}", "w") as f:
                    f.write(text)
            ran = subprocess.run(command, cwd=work, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(f"{self.name}: {SIDES[i]} is not built\n{' '.join(command)}\n{ran.stderr}")
            if self.dwp:
                subprocess.run([self.dwp, "-e", out[i], "-o", f"{out[i]}.dwp"], check=True)
                for name in os.listdir(dir):
                    if name.endswith(".dwo"):
                        os.remove(f"{dir}/{name}")
        with open(f"{dir}/stamp", "w") as f:
            f.write(stamp)
        return out


def all_pairs(languages=("c", "cpp", "rs")):
    """Every fixture that says what became of its contract."""
    names = sorted(n for n in os.listdir(FIXTURES) if n.rsplit(".", 1)[-1] in languages)
    return [p for p in map(Pair, names) if p.truth or p.refusals and p.refusals[0].startswith("no-types")]
