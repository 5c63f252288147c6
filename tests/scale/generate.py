#!/usr/bin/env python3
"""Writes and builds large C programs for ./ci/bench-builder: two builds of each, which differ in one function.

    generate.py DIR FUNCTIONS...      DIR/scale-N.old and DIR/scale-N.new for every N, ascending

Unit i calls functions of units before it only, so that the first units alone are a program, too: every size is linked
from the same objects. From 50,000 functions on, units are copies of earlier ones under other names (objcopy), which saves
four fifths of the compiler's time. Functions are of the kinds that real programs are made of: arithmetic, dense switches, texts,
lists of structs, tables of function pointers, static locals, assertions with their line.
"""
import concurrent.futures
import os
import random
import subprocess
import sys

PER_UNIT = 250
DISTINCT = 200
CHANGED = 240
COPIES = ["", "b_", "c_", "d_", "e_", "f_", "g_", "h_"]
FLAGS = ["-O1", "-g", "-fno-var-tracking", "-fno-inline", "-fPIE", "-pipe", "-w", "-c"]
WORDS = ("order session price account margin route venue symbol limit quote cancel reject gateway socket buffer timer "
         "journal replay ledger offset packet header checksum window retry cursor bucket index shard lease").split()

HEADER = """#include <stddef.h>
#include <stdint.h>
struct node { struct node *next; long key; int flags; unsigned short kind; char tag[6]; };
struct account { long id; long balance; struct node *orders; int (*check)(struct account *, long); const char *name; };
int log_line(const char *file, int line, const char *text, long value);
extern long clock_now;
"""

MAIN = """#include "scale.h"
#include <stdio.h>
int main(int argc, char **argv) { extern long f0_0(long, long); return (int)f0_0(argc, 1) & 1; }
""" + "".join(f"""long {c}clock_now;
int {c}log_line(const char *file, int line, const char *text, long value) {{
    return printf("%s:%d: %s %ld\\n", file, line, text, value);
}}
""" for c in COPIES)


def unit(index, changed):
    r = random.Random(index * 7919 + 1)
    word = lambda: r.choice(WORDS)
    out = ['#include "scale.h"']
    out.append(f"struct ctx{index} {{ long total; int depth; struct account *owner; unsigned mask[{r.randint(2, 9)}]; }};")
    out.append(f"static long count_{word()} = {r.randint(1, 99)};\nstatic int seen[{r.randint(16, 64)}];")
    counter = out[-1].split()[2]
    out.append(f"static const int weights[] = {{{', '.join(str(r.randint(1, 9999)) for _ in range(24))}}};")
    out.append(f"long state{index};")
    names = [f"f{index}_{i}" for i in range(PER_UNIT)]
    static = {n for i, n in enumerate(names) if i % 3 == 1}
    for n in names:
        out.append(f"{'static __attribute__((used)) ' if n in static else ''}long {n}(long a, long b);")
    table = ", ".join(r.choice(names) for _ in range(12))
    out.append(f"static long (*const handlers[])(long, long) = {{{table}}};")
    outside = set()

    def callee(i):
        # Calls lead to later functions of the unit, or to units before it: no recursion without end.
        if index and r.random() < 0.2:
            n = f"f{r.randint(0, index - 1)}_{r.randrange(0, PER_UNIT, 3)}"
            outside.add(n)
            return n
        return names[r.randint(i + 1, PER_UNIT - 1)] if i + 1 < PER_UNIT else "labs_"

    body = []
    for i, n in enumerate(names):
        k = [r.randint(2, 100000) for _ in range(8)]
        if changed and i == CHANGED:
            k[0] += 1
        call = lambda a: f"{callee(i)}({a}, {r.randint(0, 999)})" if i + 1 < PER_UNIT else f"({a})"
        kind = r.randrange(8)
        head = f"{'static __attribute__((used)) ' if n in static else ''}long {n}(long a, long b) {{"
        if kind == 0:
            lines = [f"long s = {k[0]};", f"for (long i = 0; i < (a & 15); i++) s = s * {k[1]} + (b ^ i);",
                     f"if (s > {k[2]}) s -= {call('s')};", "return s;"]
        elif kind == 1:
            cases = [f"case {c}: {counter} += {r.randint(1, 9)}; return a * {r.randint(3, 99)} + {call('b')};" for c in range(8)]
            lines = ["switch (a) {", *cases, f"default: return b + {k[0]};", "}"]
        elif kind == 2:
            lines = [f"if (b < {k[0]})", f"    log_line(__FILE__, __LINE__, \"{word()} {word()} of {word()} {k[1]}\", a);",
                     f"return {call('a')} + {k[2]};"]
        elif kind == 3:
            lines = ["long sum = 0;", "for (struct node *p = (struct node *)a; p; p = p->next)",
                     f"    if (p->flags & {k[0] & 255}) sum += p->key * {k[1]}; else p->kind ^= {k[2] & 4095};", "return sum + b;"]
        elif kind == 4:
            lines = [f"unsigned i = (unsigned)(a + {k[0]}) % 12;", f"state{index} ^= handlers[i] != 0;",
                     f"return a > 1 ? handlers[i](a >> 1, b) : weights[(b + {k[1]}) & 15];"]
        elif kind == 5:
            lines = [f"static long hits;", f"static int last[{r.randint(2, 8)}];", f"hits += a * {k[0]};", "last[b & 1]++;",
                     f"return hits + {call('b')};"]
        elif kind == 6:
            lines = ["struct account *p = (struct account *)a;", f"if (!p->name) p->name = \"{word()}-{word()}\";",
                     f"p->balance += b * {k[0]};", f"if (p->check && p->check(p, {k[1]}) < 0) return {call('b')};",
                     f"return p->balance - {k[2]};"]
        else:
            lines = [f"struct ctx{index} c = {{ a, {k[0] & 63}, 0, {{ {k[1]} }} }};", f"seen[b & 15] += c.depth;",
                     f"c.total += {call('c.total')} ^ {k[2]};", f"c.total += {call('b')};", f"return c.total + clock_now + c.mask[a & 1];"]
        body.append(head + "\n    " + "\n    ".join(lines) + "\n}")
    for n in sorted(outside):
        out.append(f"extern long {n}(long, long);")
    return "\n".join(out + body) + "\n"


def write(path, text):
    with open(path, "w", encoding="ascii") as f:
        f.write(text)


def compile_unit(job):
    directory, name, text = job
    source, target = f"{name}.c", os.path.join(directory, name + ".o")
    if not os.path.exists(target):
        # The name of the source is in the object: both versions of a unit have the same one.
        where = os.path.join(directory, "src")
        write(os.path.join(where, source), text)
        subprocess.run(["gcc", *FLAGS, "-o", target + ".tmp", source], cwd=where, check=True)
        os.rename(target + ".tmp", target)
    return target


def copy_unit(directory, index):
    """The object of a unit: compiled, or a copy of a compiled one."""
    copy, name = divmod(index, DISTINCT)
    source, target = (os.path.join(directory, f"{COPIES[c]}u{name}.o") for c in (0, copy))
    if not os.path.exists(target):
        subprocess.run(["objcopy", f"--prefix-symbols={COPIES[copy]}", source, target + ".tmp"], check=True)
        os.rename(target + ".tmp", target)
    return target


def main():
    directory, sizes = os.path.abspath(sys.argv[1]), sorted(int(n) for n in sys.argv[2:])
    for where in (directory, os.path.join(directory, "changed")):
        os.makedirs(os.path.join(where, "src"), exist_ok=True)
        write(os.path.join(where, "src", "scale.h"), HEADER)
    units = -(-sizes[-1] // PER_UNIT)
    jobs = [(os.path.join(directory, "changed"), "u0", unit(0, True)), (directory, "main", MAIN)]
    jobs += [(directory, f"u{i}", unit(i, False)) for i in range(min(units, DISTINCT))]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("JOBS", os.cpu_count() or 2))) as pool:
        compiled = []
        for target in pool.map(compile_unit, jobs):
            compiled.append(target)
            if sys.stderr.isatty():
                print(f"\r  compiled: {len(compiled)} of {len(jobs)} units", end="", file=sys.stderr, flush=True)
        objects = list(pool.map(lambda i: copy_unit(directory, i), range(units)))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    changed, entry = compiled[:2]
    for size in sizes:
        chosen = objects[:-(-size // PER_UNIT)]
        for build, first in (("old", chosen[0]), ("new", changed)):
            target = os.path.join(directory, f"scale-{size}.{build}")
            if os.path.exists(target):
                continue
            response = os.path.join(directory, "objects")
            write(response, "\n".join([entry, first, *chosen[1:]]))
            link = ["gcc", "-pie", "-Wl,--emit-relocs", "-Wl,--build-id", "-o", target + ".tmp", "@" + response]
            subprocess.run(link, check=True)
            os.rename(target + ".tmp", target)


main()
