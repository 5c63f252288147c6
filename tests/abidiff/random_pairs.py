#!/usr/bin/env python3
"""random_pairs.py PATCH-BUILDER WORK N [SEED]: N random pairs of C programs, one mutation each, put to the contract guard. Exit 0 only if it is right
on all.

The generator makes a graph of structs, unions and enums, says which objects the program holds from its start, and works out by itself whether the mutation
changes the layout of one of those. It knows nothing of the guard. A wrong answer is kept under WORK/wrong/SEED-N.
"""
import copy, json, os, random, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

SCALARS = {"char": 1, "short": 2, "int": 4, "unsigned": 4, "float": 4, "long": 8, "double": 8, "unsigned long": 8}
MUTANTS = 8  # of each base program


class Field:
    def __init__(self, name, kind, type, count=0, bits=0):
        self.name, self.kind, self.type, self.count, self.bits = name, kind, type, count, bits

    def text(self):
        star = "*" if self.kind == "pointer" else ""
        base = f"long (*{self.name})(long)" if self.kind == "function" else f"{self.type} {star}{self.name}"
        return base + (f"[{self.count}]" if self.count else "") + (f" : {self.bits}" if self.bits else "")


class Program:
    """A type graph. `types`: name -> ("struct" or "union", fields); `enums`: name -> [(enumerator, value)]."""

    def __init__(self, rng):
        self.rng, self.types, self.enums, self.serial, self.constant = rng, {}, {}, 0, 3
        for i in range(rng.randint(1, 3)):
            self.enums[f"enum e{i}"] = [(f"E{i}_{j}", j * rng.choice((1, 1, 2))) for j in range(rng.randint(2, 5))]
        names = [f"s{i}" for i in range(rng.randint(4, 9))]
        for i, name in enumerate(names):
            what = "union" if rng.random() < 0.15 else "struct"
            self.types[f"{what} {name}"] = (what, [])
            done = [t for t in self.types if t != f"{what} {name}"]
            for _ in range(rng.randint(2, 6)):
                self.types[f"{what} {name}"][1].append(self.field(done, what))
        all_types = list(self.types)
        # Objects of the first kind are in the heap from the start, those of the second only in frames of functions that change with them.
        self.held = rng.sample(all_types, max(1, len(all_types) // 2))
        self.erased = [t for t in self.held if rng.random() < 0.3]
        self.callbacks = {f"on_{i}": ["long"] for i in range(2)}
        self.direct = {f"call_{i}": ["long"] for i in range(2)}

    def field(self, done, what="struct"):
        rng = self.rng
        self.serial += 1
        name, dice = f"f{self.serial}", rng.random()
        if dice < 0.15 and done:
            return Field(name, "value", rng.choice(done))
        if dice < 0.35 and done:
            return Field(name, "pointer", rng.choice(done))
        if dice < 0.45:
            return Field(name, "enum", rng.choice(list(self.enums)))
        if dice < 0.55:
            return Field(name, "scalar", rng.choice(list(SCALARS)), count=rng.randint(2, 5))
        if dice < 0.65 and what == "struct":
            return Field(name, "scalar", "unsigned", bits=rng.randint(1, 9))
        if dice < 0.7:
            return Field(name, "function", "")
        return Field(name, "scalar", rng.choice(list(SCALARS)))

    def reached(self):
        """Types and enums of which objects live in the heap."""
        out, todo = set(), list(self.held)
        while todo:
            t = todo.pop()
            if t in out:
                continue
            out.add(t)
            todo += [f.type for f in self.types[t][1] if f.kind in ("value", "pointer")] if t in self.types else []
            if t in self.types:
                out |= {f.type for f in self.types[t][1] if f.kind == "enum"}
        return out

    def on_stack(self):
        """Types that only frames hold: nothing reaches them, and they hold no struct (whose pointers would be fields)."""
        alive, pointed = self.reached(), {f.type for _, fs in self.types.values() for f in fs if f.kind in ("pointer", "value")}
        return [t for t in self.types if t not in alive and t not in pointed]

    def text(self):
        out = ['#include "common.h"']
        for name, values in self.enums.items():
            out.append(name + " { " + ", ".join(f"{n} = {v}" for n, v in values) + " };")
        for name, (_, fields) in self.types.items():
            out.append(name + " { " + " ".join(f.text() + ";" for f in fields) + " };")
        out.append("static long same(long x) { return x; }")
        alive = [t for t in self.types if t in self.reached()]
        for t in alive:
            out += self.maker(t) + self.summer(t)
        for i, t in enumerate(self.held):
            out.append(f"static {'void' if t in self.erased else t} *held{i};")
        for name, params in {**self.callbacks, **self.direct}.items():
            args = ", ".join(f"{p} p{i}" for i, p in enumerate(params))
            use = " + ".join(f"(long)p{i} * {i + 2}" for i in range(len(params)))
            out.append(f"KEEP {'static ' if name in self.direct else ''}long {name}({args}) {{ return {use}; }}")
        out += [f"static void *stored_{n};" for n in self.callbacks]
        stack = self.on_stack()
        for t in stack:
            out += self.summer(t, static="static ")
            fill = " ".join(self.fill(f, "o.") for f in self.types[t][1])
            out.append(f"KEEP static long frame_{tag(t)}(void) {{ {t} o; memset(&o, 0, sizeof o); {fill} return sum_{tag(t)}(&o); }}")
        out.append("void start(void) {")
        out += [f"    held{i} = make_{tag(t)}(0);" for i, t in enumerate(self.held)]
        out += [f"    stored_{n} = (void *){n};" for n in self.callbacks]
        out.append("}")
        out.append(f"KEEP long constant(void) {{ return {self.constant}; }}")
        out.append("void answer(const char *line) {\n    (void)line;\n    long n = constant();")
        for i, t in enumerate(self.held):
            local = f"{t} *o{i} = held{i}; n += sum_{tag(t)}(o{i});"
            out.append("    " + local)
        for n, params in self.callbacks.items():
            out.append(f"    n += ((long (*)({', '.join(params)}))stored_{n})({', '.join('number()' for _ in params)});")
        for n, params in self.direct.items():
            out.append(f"    n += {n}({', '.join('number()' for _ in params)});")
        out += [f"    n += frame_{tag(t)}();" for t in stack]
        out.append('    say("%ld", n);\n}')
        return "\n".join(out) + "\n"

    def fill(self, f, at):
        to = f"{at}{f.name}" + ("[1]" if f.count else "")
        weight = int(f.name[1:]) + 1
        if f.kind == "function":
            return f"{to} = same;"
        if f.kind == "enum":
            return f"{to} = {self.enums[f.type][-1][0]};"
        if f.kind == "scalar" and f.type == "char*":
            return f'{to} = "text";'
        return f"{to} = number() * {weight};" if f.kind == "scalar" else ""

    def maker(self, t):
        what, fields = self.types[t]
        out = [f"KEEP static {t} *make_{tag(t)}(int deep) {{ {t} *o = calloc(2, sizeof *o);"]
        for f in fields if what == "struct" else fields[:1]:
            if f.kind == "pointer":
                out.append(f"    if (deep < 3) o->{f.name} = make_{tag(f.type)}(deep + 1);")
            elif f.kind == "value":
                out.append(f"    {f.type} *v{f.name} = make_{tag(f.type)}(deep + 1); o->{f.name} = *v{f.name};")
            else:
                out.append("    " + self.fill(f, "o->"))
        return out + ["    return o; }"]

    def summer(self, t, static=""):
        what, fields = self.types[t]
        out = [f"KEEP static long sum_{tag(t)}({t} *o) {{ long n = 0;"]
        for f in fields if what == "struct" or static else fields[:1]:
            at, weight = f"o->{f.name}" + ("[1]" if f.count else ""), int(f.name[1:]) + 1
            if f.kind == "pointer":
                out.append(f"    n += {at} != NULL;" if static else f"    if ({at}) n += sum_{tag(f.type)}({at});")
            elif f.kind == "value":
                out.append(f"    n += ((char *)&{at})[0];" if static else f"    n += sum_{tag(f.type)}(&{at});")
            elif f.kind == "function":
                out.append(f"    n += {at} != NULL;" if static else f"    if ({at}) n += {at}({weight});")
            elif f.kind == "enum":
                out.append(f"    n += {at} == {self.enums[f.type][-1][0]} ? {weight} : 0;")
            else:
                out.append(f"    n += (long){at} * {weight};")
        return out + ["    return n + sizeof *o; }"]

    def layout(self, t):
        """What a type's objects look like: size, alignment, and every field with its place. Names do not count, but which field is where does."""
        what, fields = self.types[t]
        at, bit, size, align, out = 0, 0, 0, 1, []
        for f in fields:
            s, a = self.size(f)
            if f.bits:
                unit = bit // 32 if bit else None
                start = bit if bit else at * 8
                if start // 32 != (start + f.bits - 1) // 32:
                    start = (start + 31) // 32 * 32
                out.append((f.name, "bits", start, f.bits))
                bit, at = start + f.bits, (start + f.bits + 7) // 8
                size, align = max(size, at), max(align, 4)
                continue
            bit = 0
            place = 0 if what == "union" else (at + a - 1) // a * a
            out.append((f.name, f.kind, f.type, f.count, place))
            at = place + s
            size, align = max(size, at), max(align, a)
        return (size + align - 1) // align * align, align, out

    def size(self, f):
        if f.kind in ("pointer", "function"):
            s = a = 8
        elif f.kind == "value":
            s, a, _ = self.layout(f.type)
        elif f.kind == "enum":
            s = a = 4
        else:
            s = a = SCALARS.get(f.type, 8)
        return s * max(f.count, 1), a


def tag(t):
    return t.split()[1]


def mutate(base, rng):
    """A mutant, what was done, and whether it breaks what lives."""
    p = copy.deepcopy(base)
    p.rng, p.constant = rng, base.constant + 1
    alive, stack = base.reached(), base.on_stack()
    targets = [t for t in base.types if t in alive] + stack
    kind = rng.choice(["add", "append", "remove", "swap", "retype", "retype", "array", "bits", "rename", "enum", "enum+", "signature", "signature", "body"])
    if kind == "body":
        return p, "only a constant", False
    if kind == "signature":
        held = rng.random() < 0.5
        name = rng.choice(list(p.callbacks if held else p.direct))
        params = (p.callbacks if held else p.direct)[name]
        if rng.random() < 0.5:
            params.append("long")
        else:
            params[0] = "double"
        return p, f"{name}({', '.join(params)})", held
    if kind.startswith("enum"):
        e = rng.choice(list(p.enums))
        if kind == "enum+":
            p.enums[e].insert(0, (f"{p.enums[e][0][0]}_more", p.enums[e][-1][1] + 1))
            return p, f"{e}: one enumerator more, no value changed", False
        i = rng.randrange(len(p.enums[e]))
        p.enums[e][i] = (p.enums[e][i][0], p.enums[e][i][1] + 100)
        return p, f"{e}: {p.enums[e][i][0]} has another value", e in alive
    t = rng.choice(targets)
    what, fields = p.types[t]
    i = rng.randrange(len(fields))
    f = fields[i]
    if kind in ("add", "append"):
        p.serial += 1
        at = i if kind == "add" else len(fields)
        fields.insert(at, Field(f"f{p.serial}", "scalar", rng.choice(list(SCALARS))))
    elif kind == "remove" and len(fields) > 1:
        fields.pop(i)
    elif kind == "swap" and len(fields) > 1 and what == "struct":
        j = (i + 1) % len(fields)
        fields[i], fields[j] = fields[j], fields[i]
    elif kind == "retype" and f.kind == "scalar" and not f.bits:
        f.type = {"int": "float", "unsigned": "float", "float": "int", "long": "double", "double": "long", "unsigned long": "char*"}.get(f.type, "long")
    elif kind == "array" and f.count:
        f.count += 1
    elif kind == "bits" and f.bits:
        f.bits += 1
    elif kind == "rename":
        f.name = f"{f.name[0]}{f.name[1:]}"
        old = f.name
        text = f"{t}: {old} is renamed"
        p.renamed = (old, f"{old}_new")
        return p, text, False
    else:
        return mutate(base, rng)
    changed = base.layout(t) != p.layout(t)
    return p, f"{t}: {kind} at {f.name}", changed and t in alive


def text_of(p):
    text = p.text()
    if getattr(p, "renamed", None):
        import re
        text = re.sub(rf"\b{p.renamed[0]}\b", p.renamed[1], text)
    return text


def compile(folder, name, text, common):
    os.makedirs(f"{folder}/src", exist_ok=True)
    with open(f"{folder}/src/program.c", "w") as f:
        f.write(text)
    command = ["gcc", "-w", "-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "-pthread", f"-I{common}", "program.c", f"{common}/main.o", "-o", f"../{name}"]
    subprocess.run(command, cwd=f"{folder}/src", check=True)
    os.rename(f"{folder}/src/program.c", f"{folder}/{name}.c")
    return f"{folder}/{name}"


def one_base(args):
    tool, work, seed, number, mutants, common = args
    rng = random.Random(f"{seed}-{number}")
    base = Program(rng)
    folder = f"{work}/random/{seed}-{number}"
    old = compile(folder, "old", base.text(), common)
    results = []
    for m in range(mutants):
        mutant, what, truth = mutate(base, rng)
        new = compile(folder, f"new{m}", text_of(mutant), common)
        ran = subprocess.run([tool, "diff", old, new, "--json"], capture_output=True, text=True)
        try:
            said = [f"{r['rule']} {r['symbol']}" for r in json.loads(ran.stdout).get("refusals", [])]
        except ValueError:
            said = []
        right = ran.returncode == (3 if truth else 0)
        verdict = "right" if right else "error" if ran.returncode not in (0, 3) else "MISSED" if truth else "FALSE"
        if not right:
            keep = f"{work}/wrong/{seed}-{number}-{m}"
            os.makedirs(keep, exist_ok=True)
            for name in ("old", "old.c", f"new{m}", f"new{m}.c"):
                shutil.copy(f"{folder}/{name}", f"{keep}/{name.replace(f'new{m}', 'new')}")
        results.append((f"{seed}-{number}-{m}", what, truth, verdict, said, ran.returncode))
    shutil.rmtree(folder)
    return results


def main():
    tool, work, n, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "1"
    fixtures = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + "/fixtures/common"
    common = f"{work}/common"
    os.makedirs(common, exist_ok=True)
    shutil.rmtree(f"{work}/wrong", ignore_errors=True)
    for name in ("common.h", "main.c"):
        shutil.copy(f"{fixtures}/{name}", common)
    subprocess.run(["gcc", "-g", "-O2", "-I.", "-c", "main.c", "-o", "main.o"], cwd=common, check=True)
    jobs = [(tool, work, seed, i, min(MUTANTS, n - i * MUTANTS), common) for i in range((n + MUTANTS - 1) // MUTANTS)]
    count, asked = dict.fromkeys(("right", "MISSED", "FALSE", "error"), 0), 0
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(one_base, jobs):
            for name, what, truth, verdict, said, code in results:
                count[verdict] += 1
                asked += truth
                if verdict != "right":
                    print(f"{verdict} {name}: {what}; exit {code} {said}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{sum(count.values())} of {n} pairs", end="", file=sys.stderr, flush=True)
    total = sum(count.values())
    print(f"{total} random pairs of seed {seed}: {asked} break the contract, {total - asked} are compatible; "
          f"missed {count['MISSED']}, falsely reported {count['FALSE']}, errors {count['error']}")
    sys.exit(count["right"] != total)


if __name__ == "__main__":
    main()
