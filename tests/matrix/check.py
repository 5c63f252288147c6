#!/usr/bin/env python3
"""Builds the zoos by every toolchain, linker and set of flags, diffs each pair, and applies what comes of it.

For each combination three builds: old, one (a number in `price` changed) and all (every function of the list changed). Right is:
one gives exactly `price`, all gives exactly the list, and the running old program answers like the build `all` with the patch, and like
itself without. Where docs/limits.md says that a build may be refused, `all` may be, for that rule and no other; it is counted apart.
"""
import argparse, collections, concurrent.futures, hashlib, json, os, re, shutil, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
COMMON = os.path.join(HERE, "../fixtures/common")

C = """price jumps values texts step local_a local_b walk locals library floats callbacks body weak perhaps cold gotos jumped arguments
structure depth tail lines special other_local""".split()
CPP = """price Square::area Square::name Circle::area thrower typed rethrows guarded metered lambda streams casts scaled<long>
scaled<double> instances maker nothrow other_local""".split()
RUST = """price jumps texts counted kept locals Square::area Square::name Circle::area largest<u64> largest<f64> floats panics fails
closures maps parses""".split()
# What an unoptimised build, or one with other inlining, changes besides: small functions that hold a changed number themselves.
INLINED = {
    "c": {"inlined", "scaled"},
    "cpp": {"Circle::Circle", "make_unique", "{lambda", "operator()", "map", "function", "start"},
    "rs": {"{closure#", "fails", "call_once", "do_call", "catch_unwind", "call_mut", "try", "fold", "collect", "from_iter"},
}

Combination = collections.namedtuple("Combination", "name language cc flags old_flags may_refuse apply library loose needs")


def combination(language, cc, *flags, old=(), may_refuse=None, apply=0, library=False, loose=False, needs=()):
    words = [cc, *flags] + (["old:"] + list(old) if old else []) + (["library"] if library else [])
    short = " ".join(words).replace("-Clink-arg=", "").replace("-fuse-ld=", "").replace("-Wl,", "")
    return Combination(f"{language} {short}", language, cc, list(flags), list(old), may_refuse, apply, library, loose, list(needs))


def combinations():
    linkers = [[], ["-fuse-ld=lld"], ["-fuse-ld=mold"]]
    sets = [
        ["-O0"], ["-O1"], ["-O2"], ["-O3"], ["-Os"],
        ["-O2", "-fno-pie", "-no-pie"], ["-O2", "-fno-plt"], ["-O2", "-fno-plt", "-Wl,-z,now"], ["-O2", "-Wl,-z,lazy"],
        ["-O2", "-fcf-protection=full"], ["-O2", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"],
        ["-O2", "-fpatchable-function-entry=16,14"], ["-O2", "-fstack-protector-all"], ["-O2", "-mtls-dialect=gnu2"],
        ["-O2", "-ftls-model=initial-exec"], ["-O2", "-fPIC", "-ftls-model=global-dynamic"], ["-O2", "-Wl,-O2"],
        ["-O2", "-fvisibility=hidden"], ["-O2", "-flto"], ["-O2", "-pg", "-mfentry"], ["-O2", "-march=haswell"],
        ["-O2", "-fno-omit-frame-pointer"], ["-O2", "-gdwarf-4"], ["-O2", "-Wl,-z,relro,-z,now", "-D_FORTIFY_SOURCE=2"],
        ["-O2", "-fcommon"], ["-O2", "-Wl,-z,pack-relative-relocs"], ["-O2", "{map}"], ["-Og"], ["-O2", "-Wl,--no-relax"],
    ]
    for language, gcc, clang in [("c", "gcc", "clang"), ("cpp", "g++", "clang++")]:
        for cc in [gcc, clang]:
            for linker in linkers:
                for flags in sets:
                    joined = " ".join(flags)
                    if cc == clang and "gnu2" in joined:
                        continue  # clang 14 has no TLS descriptors for x86-64
                    if cc == clang and "-flto" in flags:
                        if linker == ["-fuse-ld=lld"]:
                            for lto in ["-flto", "-flto=thin"]:
                                yield combination(language, cc, *linker, "-O2", lto)
                        continue  # only lld reads its bitcode here
                    if cc == gcc and "-flto" in flags and linker == ["-fuse-ld=lld"]:
                        continue  # lld does not read GCC's intermediate code
                    if "pack-relative" in joined and linker == ["-fuse-ld=lld"]:
                        flags = ["-O2", "-Wl,--pack-dyn-relocs=relr"]
                    may = "ambiguous" if "-no-pie" in flags else None
                    yield combination(language, cc, *linker, *flags, may_refuse=may)
        for linker in linkers[1:]:
            yield combination(language, gcc, *linker, "-O2", "-ffunction-sections", "-Wl,--icf=all")
        yield combination(language, clang, "-fuse-ld=lld", "-O2", "-ffunction-sections", "-faddrsig", "-Wl,--icf=safe")
        for cc in [gcc, clang]:
            for linker in linkers:
                for flags in [["-O2"], ["-O2", "-fvisibility=hidden"], ["-O2", "-Wl,-Bsymbolic"], ["-O2", "-ftls-model=initial-exec"]]:
                    yield combination(language, cc, *linker, *flags, library=True)
            if cc == gcc:
                yield combination(language, cc, "-O2", "-mtls-dialect=gnu2", library=True)
    yield combination("c", "musl-gcc", "-O2", "-DNO_IFUNC", needs=["musl-gcc"])
    link = lambda *flags: ["-Clink-arg=" + f for f in flags]
    one = ["-Csymbol-mangling-version=v0", "-Ccodegen-units=1"]
    for linker in [[], link("-fuse-ld=bfd") + ["-Clinker-features=-lld"], link("-fuse-ld=mold") + ["-Clinker-features=-lld"]]:
        for flags in [["-O"], ["-Copt-level=3"], ["-Copt-level=s"], ["-Copt-level=1"]]:
            yield combination("rs", "rustc", *linker, *one, *flags, loose=True)  # without a map: what lies behind a change counts, too
            yield combination("rs", "rustc", *linker, *one, *flags, "-Clink-arg={map}")
        yield combination("rs", "rustc", *linker, *one, "-O", "-Clto=fat", loose=True)
        yield combination("rs", "rustc", *linker, *one, "-O", "-Cpanic=abort", loose=True)
        yield combination("rs", "rustc", *linker, *one, "-O", "-Crelocation-model=static", loose=True, may_refuse="ambiguous")
        yield combination("rs", "rustc", *linker, "-O", loose=True)
        yield combination("rs", "rustc", *linker, "-O", "-Csymbol-mangling-version=v0", loose=True)
        yield combination("rs", "rustc", *linker, "-O", "-Clto=thin", "-Csymbol-mangling-version=v0", loose=True)
        yield combination("rs", "rustc", *linker, "-Copt-level=0", loose=True)


def run(command, cwd=None, timeout=120):
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", "took too long")


def last_name(text):
    """The name of a function without parameters, return type, template's return type, crate hash, suffixes."""
    text = re.sub(r" \[clone.*|\.(cold|part|constprop|isra|lto_priv|llvm)\b.*", "", text)
    text = re.sub(r"\[[0-9a-f]{16}\]|\[abi:\w+\]|^<|\.\d+$", "", text)
    text = re.sub(r"::h[0-9a-f]{16}$", "", text)
    if text.endswith(" const"):
        text = text[:-6]
    if text.endswith(")"):
        depth = 0
        for i in range(len(text) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(text[i], 0)
            if depth == 0:
                text = text[:i]
                break
    return text


def is_named(demangled, want):
    name = last_name(demangled)
    if "Square::" in want or "Circle::" in want:  # <zoo::Square as zoo::Shape>::area
        kind, method = want.split("::")
        return kind in name and name.endswith("::" + method)
    if want.startswith("largest<"):
        return "largest" in name and (want[8:-1] in name or "::<" not in name)
    return name.split(" ")[-1] == want or name.endswith("::" + want)


class Build:
    def __init__(self, c, out):
        self.c, self.dir = c, os.path.join(out, re.sub(r"[^\w.=-]+", "_", c.name)[:120])

    def image(self, which):
        return os.path.join(self.dir, which + (".so" if self.c.library else ""))

    def sources(self):
        if self.c.language == "c":
            return ["zoo.c", "zoo2.c", "zoo.h"]
        if self.c.language == "cpp":
            return ["zoo.cpp", "zoo2.cpp", "zoo.hpp", "zoo.h", "zoo2.c"]
        return ["zoo.rs"]

    def command(self, which):
        c, image = self.c, self.image(which)
        flags = [f.replace("{map}", f"-Wl,-Map={image}.map") for f in c.flags + (c.old_flags if which == "old" else [])]
        if c.language == "rs":
            cfg = [] if which == "old" else ["--cfg", which]
            return [c.cc, "-g", "--edition", "2021", "--crate-name", "zoo", "zoo.rs", "-Clink-arg=-Wl,--emit-relocs", "-Aunexpected_cfgs", *cfg, *flags, "-o", image]
        define = {"old": [], "one": ["-DONE=1"], "all": ["-DALL=1"]}[which]
        units = [s for s in self.sources() if s.endswith("." + c.language)]
        units += [] if c.library else ["main.c"]
        standard = ["-std=c++17"] if c.language == "cpp" else []
        shared = ["-shared", "-fPIC"] if c.library else []
        quiet = ["-w"] if "clang" in c.cc else []
        return [c.cc, "-g", *standard, *quiet, "-pthread", "-I.", "-Wl,--emit-relocs", "-Wl,--build-id", *define, *units, *shared, *flags, "-o", image]

    def build(self):
        """None, or why it can't be built."""
        texts = "".join(open(os.path.join(d, f)).read() for d in [HERE, COMMON] for f in sorted(os.listdir(d)) if f.startswith(("zoo", "main", "common")))
        stamp = hashlib.sha256((texts + repr(self.c) + version(self.c.cc)).encode()).hexdigest()
        stamped = os.path.join(self.dir, "stamp")
        if os.path.exists(stamped) and open(stamped).read() == stamp:
            return None
        shutil.rmtree(self.dir, ignore_errors=True)
        src = os.path.join(self.dir, "src")
        os.makedirs(src)
        for d, names in [(HERE, self.sources()), (COMMON, ["main.c", "common.h", "common.rs"])]:
            for name in names:
                shutil.copy(os.path.join(d, name), src)
        for which in ["old", "one", "all"]:
            ran = run(self.command(which), cwd=src)
            if ran.returncode != 0:
                return (ran.stderr + ran.stdout).strip()[-600:]
            if self.c.library:
                host = ["gcc", "-O2", "-pthread", "-rdynamic", "-DLINKED", "main.c", self.image(which), "-o", os.path.join(self.dir, which)]
                ran = run(host, cwd=src)
                if ran.returncode != 0:
                    return ran.stderr.strip()[-600:]
        open(stamped, "w").write(stamp)
        return None


versions = {}


def version(tool):
    if tool not in versions:
        versions[tool] = run([tool, "--version"]).stdout.split("\n")[0]
    return versions[tool]


class DoesNotStart(Exception):
    """What the toolchain made does not run on this machine, patched or not."""


class Program:
    def __init__(self, path):
        self.p = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ask(self):
        try:
            self.p.stdin.write("17\n")
            self.p.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the program ended before it was asked: {self.p.wait(5)}") from None
        line = self.p.stdout.readline().rstrip("\n")
        if not line:
            raise RuntimeError(f"the program ended: {self.p.wait(5)}")
        return line

    def end(self):
        self.p.kill()
        self.p.wait()


def differ(builder, old, new, fix):
    if os.path.exists(fix):
        os.remove(fix)
    ran = run([builder, old, new, "-o", fix, "--json"])
    try:
        return ran.returncode, json.loads(ran.stdout), ran.stderr
    except json.JSONDecodeError:
        return ran.returncode, {}, ran.stderr


def wrong_functions(c, report, want, inlined):
    got = [(f["status"], [f["demangled"], *f["aliases"]]) for f in report.get("functions", [])]
    left, extra = list(want), []
    for status, names in got:
        name = names[0]
        hits = [w for w in left if any(is_named(n, w) for n in names)]
        left = [w for w in left if w not in hits]
        if hits or any(is_named(n, w) for w in want for n in names) or any(s in name for s in inlined):
            continue  # or a piece or a clone of an expected one, or what was inlined into it elsewhere
        extra.append(name if status == "changed" else f"{name} (new)")
    if c.loose:
        # Other codegen units, other inlining: correct, however noisy. What was inlined elsewhere may be missing under its name.
        extra = [] if len(extra) <= 40 else extra
        left = []
    text = []
    if left:
        text.append("missing: " + " ".join(left))
    if extra:
        text.append("not expected: " + ", ".join(extra[:6]) + (f" and {len(extra) - 6} more" if len(extra) > 6 else ""))
    return "; ".join(text)


def live(b, livepatch, fix):
    """Old, patched, reverted, patched: each step answers as it must."""
    answers = {}
    for which in ["old", "all"]:
        p = Program(os.path.join(b.dir, which))
        try:
            answers[which] = [p.ask() for _ in range(4)]
        except RuntimeError as e:
            raise DoesNotStart(f"unpatched {which}: {e}") from None
        finally:
            p.end()
    if answers["old"][0] == answers["all"][0]:
        return "both builds answer alike"
    # What accumulates differs by what each version adds: compared are the answers of patched and unpatched code by what stays.
    p = Program(os.path.join(b.dir, "old"))
    try:
        first = p.ask()
        if first != answers["old"][0]:
            return f"not deterministic: {first} / {answers['old'][0]}"
        ran = run([livepatch, "apply", str(p.p.pid), fix, "--json"])
        if ran.returncode != b.c.apply:
            return f"apply: exit {ran.returncode}: {ran.stderr.strip()[-300:]}"
        if b.c.apply:
            return ""
        patched = p.ask()
        ran = run([livepatch, "revert", str(p.p.pid), "--json"])
        if ran.returncode:
            return f"revert: exit {ran.returncode}: {ran.stderr.strip()[-300:]}"
        reverted = p.ask()
    except RuntimeError as e:
        return str(e)
    finally:
        p.end()
    wrong = []
    for i, (was, now, back, o2, n1, n2, o3) in enumerate(zip(first.split(), patched.split(), reverted.split(), answers["old"][1].split(), answers["all"][0].split(), answers["all"][1].split(), answers["old"][2].split())):
        if i == 0:
            continue
        stateful = o2 != was or n2 != n1
        if not stateful and now != n1:
            wrong.append(f"answer {i}: patched {now}, the new build {n1}")
        if not stateful and back != was:
            wrong.append(f"answer {i}: reverted {back}, the old build {was}")
        if stateful and now == was:
            wrong.append(f"answer {i} stands still at {now}")
    return "; ".join(wrong[:4])


def check(c, args):
    b = Build(c, args.out)
    why = b.build()
    if why:
        return "BUILD", why
    wants = {"one": ["price"], "all": {"c": C, "cpp": CPP, "rs": RUST}[c.language]}
    problems, figures = [], []
    for which in ["one", "all"]:
        code, report, stderr = differ(args.builder, b.image("old"), b.image(which), os.path.join(b.dir, which + "-fix.so"))
        rules = {r["rule"] for r in report.get("refusals", [])}
        if which == "all" and code == 3 and rules == {c.may_refuse}:
            return ("refused", f"[{c.may_refuse}]") if not problems else ("wrong", " | ".join(problems))
        if code != 0:
            said = [f"[{r['rule']}] {r['message']}" for r in report.get("refusals", [])] or [stderr.strip()[-300:]]
            problems.append(f"{which}: exit {code}: " + "; ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else ""))
            continue
        wrong = wrong_functions(c, report, wants[which], INLINED[c.language] if which == "all" else [])
        if wrong:
            problems.append(f"{which}: {wrong}")
        figures.append(str(len(report["functions"])))
    if not problems:
        try:
            wrong = live(b, args.livepatch, os.path.join(b.dir, "all-fix.so"))
        except DoesNotStart as e:
            return "START", str(e)
        if wrong:
            problems.append("live: " + wrong)
    return ("wrong", " | ".join(problems)) if problems else ("right", "+".join(figures))


def lacking(c):
    wants = [c.cc, *c.needs] + ["mold"] * any("mold" in f for f in c.flags) + ["ld.lld"] * any(f == "-fuse-ld=lld" for f in c.flags)
    return next((t for t in wants if not shutil.which(t)), None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("builder")
    parser.add_argument("livepatch")
    parser.add_argument("out")
    parser.add_argument("words", nargs="*", help="only combinations whose names hold all of these words")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [c for c in combinations() if all(w in f" {c.name} " for w in args.words)]
    if args.list:
        print("\n".join(c.name for c in chosen))
        return 0
    totals = collections.Counter()
    began = time.time()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [(c, None if lacking(c) else pool.submit(check, c, args)) for c in chosen]
        for i, (c, job) in enumerate(jobs, 1):
            word, detail = ("SKIPPED", f"{lacking(c)} is not installed") if job is None else job.result()
            totals[word] += 1
            print(f"{i:3}/{len(jobs)} {word:7} {c.name}: {detail}", flush=True)
    broken = totals["BUILD"] + totals["START"]
    print(f"\n{len(chosen)} combinations: {totals['right']} right, {totals['refused']} refused as limits.md says, {totals['wrong']} wrong; "
          f"the toolchain's own: {totals['BUILD']} not built, {totals['START']} do not start unpatched, {totals['SKIPPED']} not installed; {time.time() - began:.0f} s")
    # Toolchains have faults of their own; more of them than this would hide ours.
    return 0 if totals["right"] and not totals["wrong"] and broken <= max(8, len(chosen) // 10) else 1


if __name__ == "__main__":
    sys.exit(main())
