#!/usr/bin/env python3
"""check.py PATCH-BUILDER BUILDS VARIANTS KIND...: what patch-builder says of each kind, against VARIANTS/KIND.expect. Exit 0 only if all are exact.

An expectation is a list of lines: `changed NAME`, `new NAME` (demangled, without crate hashes), `refused RULE SYMBOL`, or `nothing`; `#` is a comment.
"""
import json, re, subprocess, sys

tool, builds, variants, *kinds = sys.argv[1:]


def expected(kind):
    with open(f"{variants}/{kind}.expect") as f:
        lines = [line.strip() for line in f]
    return sorted(line for line in lines if line and not line.startswith("#"))


def plain(name):
    return re.sub(r"\[[0-9a-f]{16}\]", "", name)


def answer(kind):
    ran = subprocess.run([tool, "diff", f"{builds}/base/gw", f"{builds}/{kind}/gw", "--json"], capture_output=True, text=True)
    try:
        report = json.loads(ran.stdout)
    except ValueError:
        return [f"exit {ran.returncode}, no JSON: {ran.stderr.strip()[:300]}"], ran.returncode, {}
    if report.get("refusals"):
        got = [f"refused {r['rule']} {plain(r['symbol'])}" for r in report["refusals"]]
    else:
        got = [f"{f['status']} {plain(f['demangled'])}" for f in report.get("functions", [])]
    if not got:
        got = ["nothing"] if ran.returncode == 1 and "differs" in report.get("error", "nothing differs") else [f"error {report.get('error')}"]
    return sorted(got), ran.returncode, report


def short(lines):
    count = {}
    for line in lines:
        word = line.split()[0]
        count[word] = count.get(word, 0) + 1
    if set(count) <= {"changed", "new"}:
        return f"{count.get('changed', 0)} + {count.get('new', 0)}"
    return lines[0] if len(lines) == 1 else ", ".join(f"{n} {w}" for w, n in count.items())


rows, wrong = [], 0
for kind in kinds:
    want, (got, code, report) = expected(kind), answer(kind)
    exit_wanted = 1 if want == ["nothing"] else 3 if want[0].startswith("refused") else 0
    ok = got == want and code == exit_wanted
    rows.append((kind, short(want), short(got), len(report.get("noise", [])), "yes" if ok else "NO"))
    if not ok:
        wrong += 1
        print(f"{kind}: exit {code}, expected {exit_wanted}")
        for line in sorted(set(want) - set(got)):
            print(f"  missing       {line}")
        for line in sorted(set(got) - set(want)):
            reason = next((f["reason"] for f in report.get("functions", []) if line.endswith(" " + plain(f["demangled"]))), "")
            print(f"  not expected  {line}  {reason}")

heads = ("kind", "expected (changed + new)", "got", "noise", "ok")
widths = [max(len(str(r[i])) for r in [heads, *rows]) for i in range(5)]
for r in [heads, *rows]:
    print("  ".join(str(x).ljust(w) for x, w in zip(r, widths)).rstrip())
print(f"\n{len(rows) - wrong} of {len(rows)} kinds exact")
sys.exit(1 if wrong else 0)
