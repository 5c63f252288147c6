#!/usr/bin/env python3
"""check.py PATCH-BUILDER WORK [NAME OLD NEW TRUTH RULES]...: the contract guard and abidiff on the same pairs, in one table. Exit 0 only if the guard
misses nothing and reports nothing falsely.

The pairs are the C and C++ fixtures with `//#abi:`, and those given: two programs, `break` or `compatible`, and the rules that the guard may refuse it by
(`-`: none). See docs/abidiff.md.
"""
import concurrent.futures, json, subprocess, sys
from pairs import all_pairs

# What the guard may refuse by, where the fixture does not say. Other refusals (an import, no relocations) are no verdict on the contract.
ABIDIFF = ["abidiff", "--no-default-suppression", "--no-added-syms"]
tool, work, *given = sys.argv[1:]


def guard(old, new, wanted):
    """(verdict, what was said): `break` if refused, for the expected reasons where it must be."""
    ran = subprocess.run([tool, "diff", old, new, "--json"], capture_output=True, text=True)
    try:
        report = json.loads(ran.stdout)
    except ValueError:
        return "error", f"exit {ran.returncode}"
    said = [(r["rule"], r["symbol"]) for r in report.get("refusals", [])]
    if ran.returncode not in (0, 3) or (ran.returncode == 3) != bool(said):
        return "error", f"exit {ran.returncode}"
    met = [(rule, symbol) for rule, symbol in wanted if any(rule == r and symbol in s for r, s in said)]
    if said and wanted and not met:
        return "error", "refused as " + ", ".join(r for r, _ in said)
    return ("break" if said else "compatible"), ", ".join(dict.fromkeys(r for r, _ in said)) or "-"


def abidiff(old, new):
    """(verdict, exit code): `break` if it reports any change (bit 4), which includes the incompatible ones (bit 8)."""
    code = subprocess.run([*ABIDIFF, old, new], capture_output=True, text=True).returncode
    return ("error" if code & 3 or code < 0 else "break" if code & 4 else "compatible"), f"{code}"


def fixture(pair):
    plain = pair.build(f"{work}/guard")
    seen = pair.build(f"{work}/abidiff", ["-rdynamic"])
    wanted = [tuple((r + " ").split(" ", 1)) for r in pair.refusals]
    wanted = [(rule, symbol.strip()) for rule, symbol in wanted]
    return f"{pair.name}.{pair.language}", pair.truth, guard(*plain, wanted), abidiff(*seen)


def program(name, old, new, truth, rules):
    wanted = [] if rules == "-" else [(rule, "") for rule in rules.split(",")]
    return name, truth, guard(old, new, wanted), abidiff(old, new)


def judge(truth, verdict):
    return "error" if verdict == "error" else {("break", "break"): "caught", ("break", "compatible"): "MISSED",
            ("compatible", "break"): "FALSE", ("compatible", "compatible"): "passed"}[truth, verdict]


pairs = all_pairs(("c", "cpp"))
pairs = [p for p in pairs if p.truth]
rows, done = [], 0
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    jobs = [pool.submit(fixture, p) for p in pairs]
    jobs += [pool.submit(program, *given[i:i + 5]) for i in range(0, len(given), 5)]
    for job in jobs:
        rows.append(job.result())
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(jobs)} pairs", end="", file=sys.stderr, flush=True)
if sys.stderr.isatty():
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)

counts = {name: dict.fromkeys(("caught", "MISSED", "FALSE", "passed", "error"), 0) for name in ("guard", "abidiff")}
print(f"| {'pair':<46} | {'in truth':<10} | {'guard':<30} | {'abidiff (exit)':<14} |")
print(f"| {'-' * 46} | {'-' * 10} | {'-' * 30} | {'-' * 14} |")
for name, truth, by_guard, by_abidiff in rows:
    cells = []
    for who, (verdict, said) in (("guard", by_guard), ("abidiff", by_abidiff)):
        what = judge(truth, verdict)
        counts[who][what] += 1
        cells.append(what if said == "-" else f"{what} ({said})")
    print(f"| {name:<46} | {truth:<10} | {cells[0]:<30} | {cells[1]:<14} |")
breaks = sum(truth == "break" for _, truth, _, _ in rows)
print(f"\n{len(rows)} pairs: {breaks} break the contract, {len(rows) - breaks} are compatible")
for who, c in counts.items():
    print(f"{who:<8} caught {c['caught']}, missed {c['MISSED']}, falsely reported {c['FALSE']}, errors {c['error']}")
g = counts["guard"]
sys.exit(1 if g["MISSED"] or g["FALSE"] or g["error"] or not rows else 0)
