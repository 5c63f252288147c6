#!/usr/bin/env python3
"""judge.py REPORT.json EXIT EXPECTED REFUSE ALLOW: is patch-builder's answer on a case the right one? One line, exit 0 or 1.

EXPECTED: names of changed functions, `+name` for new ones. A `.cold` or `.part.N` piece of one of them may come along.
ALLOW: more of these, which may come along.
REFUSE: a pattern; then the only right answer is a refusal for data or for the layout of a type, of a symbol that matches.
"""
import json, re, sys

path, code, expected, refuse, allow = sys.argv[1:6]
try:
    with open(path) as f:
        report = json.load(f)
except ValueError:
    sys.exit(print(f"no report, exit {code}") or 1)
refusals = report["refusals"]
if refuse:
    hits = [r["symbol"] for r in refusals if r["rule"] in ("initial-value", "data-size", "layout") and re.search(refuse, r["symbol"])]
    print("refused: " + ", ".join(hits) if hits else f"not refused for {refuse}, exit {code}")
    sys.exit(0 if hits and code == "3" else 1)
if code != "0":
    print(f"exit {code}: " + "; ".join(f"{r['rule']} {r['symbol']}" for r in refusals))
    sys.exit(1)


def name(function):
    path = re.sub(r"\[[0-9a-f]{16}\]|::h[0-9a-f]{16}$|<impl [^>]*>::", "", function["demangled"])
    return re.sub(r"\.(constprop|isra|lto_priv|llvm)\.\w+", "", path.split(" [clone")[0])


def whole(function):
    return re.split(r"\.(?:cold|part)\b", function)[0]


got = {("+" if f["status"] == "new" else "") + name(f) for f in report["functions"]}
want = set(expected.split())
known = {w.lstrip("+") for w in want}
extra = {g for g in got - want - set(allow.split()) if not (whole(g.lstrip("+")) != g.lstrip("+") and whole(g.lstrip("+")) in known)}
missing = want - got
if extra or missing:
    print(f"{len(got)} functions: missing {sorted(missing)}, not expected {sorted(extra)}")
    sys.exit(1)
print(f"{len(got)} functions, as expected")
