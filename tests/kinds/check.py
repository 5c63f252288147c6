#!/usr/bin/env python3
"""check.py recommended|default BIN BUILDS VARIANTS KIND...: what patch-builder says of each kind. Exit 0 only if all is right.

recommended: exactly VARIANTS/KIND.expect, a list of lines: `changed NAME`, `new NAME` (demangled, without crate hashes), `refused RULE SYMBOL`, or
`nothing`; `#` is a comment.

default: what is refused with the recommended flags is refused by the same rule, and nothing else is, unless VARIANTS/KIND.live says `refusable
RULE`. Otherwise no more than 40 functions are replaced, and as VARIANTS/KIND.live says: `must REGEX`, a function that has to be
among them.

Both: if KIND.live has an `ask`, the patch goes into a running gateway: `ask JSON` lines are sent ($N: a number never used before), `log` means that standard error is looked at in place of the last
answer, `old` and `new` say what must be found there before and after.
"""
import json, os, re, socket, subprocess, sys, tempfile, time

mode, bin, builds, variants, *kinds = sys.argv[1:]
LIMIT = 40


def lines_of(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        lines = [line.strip() for line in f]
    return [line for line in lines if line and not line.startswith("#")]


def plain(name):
    return re.sub(r"\[[0-9a-f]{16}\]|::h[0-9a-f]{16}\b", "", name)


def answer(kind, patch):
    command = [f"{bin}/patch-builder", f"{builds}/base/gw", f"{builds}/{kind}/gw", "--json", "-o", patch, "--name", kind]
    ran = subprocess.run(command, capture_output=True, text=True)
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


def exact(want, got, code):
    """With the recommended flags: what is wrong, as lines."""
    exit_wanted = 1 if want == ["nothing"] else 3 if want[0].startswith("refused") else 0
    wrong = [] if code == exit_wanted else [f"exit {code}, expected {exit_wanted}"]
    wrong += [f"missing       {line}" for line in sorted(set(want) - set(got))]
    return wrong + [f"not expected  {line}" for line in sorted(set(got) - set(want))]


def enough(want, got, code, script):
    """With the default profile: what is wrong, as lines."""
    rules = {line.split()[1] for line in want if line.startswith("refused")}
    refused = {line.split()[1] for line in got if line.startswith("refused")}
    refusable = {line.split()[1] for line in script if line.startswith("refusable ")}
    if rules or refused:
        return [] if rules <= refused <= rules | refusable and code == 3 else [f"refused by {sorted(refused)}, expected {sorted(rules)}: {got[:3]}"]
    if want == ["nothing"] and code == 1:
        return []
    wrong = [] if code == 0 else [f"exit {code}: {got}"]
    replaced = sum(line.startswith("changed ") for line in got)
    if replaced > LIMIT:
        wrong.append(f"{replaced} functions, more than {LIMIT}")
    must = [line.split(" ", 1)[1] for line in script if line.startswith("must ")]
    return wrong + [f"missing: {m}" for m in must if not any(re.search(m, line) for line in got)]


class Gateway:
    def __init__(self, path):
        self.log = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen([path], stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.port = int(self.child.stdout.readline().rsplit(":", 1)[1])
        self.connection = socket.create_connection(("127.0.0.1", self.port), 5)
        self.stream = self.connection.makefile("rw")
        self.n = 1000

    def says(self, script):
        """The last answer, or what was logged meanwhile."""
        self.n += 1
        self.log.seek(0, 2)
        at, last = self.log.tell(), ""
        for line in script:
            if line.startswith("ask "):
                self.stream.write(line[4:].replace("$N", str(self.n)) + "\n")
                self.stream.flush()
                last = self.stream.readline()
        if "log" in script:
            time.sleep(0.4)
            self.log.seek(at)
            last = self.log.read()
        return last

    def is_at(self, script, side):
        said = self.says(script)
        want = next(line.split(" ", 1)[1] for line in script if line.startswith(side + " ")).replace("$N", str(self.n))
        return None if re.search(want, said) else f"{side}: {want!r} is not in {said!r}"


def live(kind, patch, script):
    if not any(line.startswith("ask ") for line in script):
        return "not seen from outside", []
    gateway = Gateway(f"{builds}/base/gw")
    how = []
    try:
        for step, side in [(None, "old"), ("apply", "new"), ("revert", "old"), ("apply", "new")]:
            if step:
                command = [f"{bin}/livepatch", step, str(gateway.child.pid)] + ([patch] if step == "apply" else [])
                ran = subprocess.run(command + how, capture_output=True, text=True)
                # Drift reaches functions that are never left: the patch says that old and new code agree.
                if ran.returncode == 4 and mode == "default" and not how:
                    how = ["--consistency", "entry"]
                    ran = subprocess.run(command + how, capture_output=True, text=True)
                if ran.returncode:
                    return "FAILED", [f"{step}: exit {ran.returncode}: {ran.stderr.strip()[:300]}"]
            wrong = gateway.is_at(script, side)
            if wrong:
                return "FAILED", [f"after {step or 'the start'}, {wrong}"]
        return "by entry: old, new, old, new" if how else "old, new, old, new", []
    finally:
        gateway.child.kill()
        gateway.child.wait()


rows, wrong = [], 0
for kind in kinds:
    patch = os.path.abspath(f"{builds}/{kind}/fix.so")
    want, script, seen = sorted(lines_of(f"{variants}/{kind}.expect")), lines_of(f"{variants}/{kind}.live"), "-"
    got, code, report = answer(kind, patch)
    bad = exact(want, got, code) if mode == "recommended" else enough(want, got, code, script)
    if not bad and code == 0:
        seen, bad = live(kind, patch, script)
    rows.append((kind, short(want), short(got), len(report.get("noise", [])), seen, "NO" if bad else "yes"))
    if bad:
        wrong += 1
        print(f"{kind}:")
        for line in bad:
            reason = next((f["reason"] for f in report.get("functions", []) if line.endswith(" " + plain(f["demangled"]))), "")
            print(f"  {line}  {reason}")

expected = "expected (changed + new)" if mode == "recommended" else "with recommended flags"
heads = ("kind", expected, "got", "noise", "live", "ok")
widths = [max(len(str(r[i])) for r in [heads, *rows]) for i in range(6)]
for r in [heads, *rows]:
    print("  ".join(str(x).ljust(w) for x, w in zip(r, widths)).rstrip())
print(f"\n{mode}: {len(rows) - wrong} of {len(rows)} kinds {'exact' if mode == 'recommended' else 'right'}")
sys.exit(1 if wrong else 0)
