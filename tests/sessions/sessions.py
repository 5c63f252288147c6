#!/usr/bin/env python3
"""sessions.py HOST LIVEPATCH LIBRARY PATCH: a canary by session, from inside. Exit 0 only if shares, stickiness and agreement hold."""
import json, math, os, subprocess, sys, tempfile

host, tool, library, patch = sys.argv[1:5]
SESSIONS = 100_000
bad = []


class Host:
    def __init__(self, socket):
        self.p = subprocess.Popen([host, library, socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.p.stdout.readline()

    def ask(self, question):
        self.p.stdin.write(f"ask {question}\n")
        self.p.stdin.flush()
        line = self.p.stdout.readline()
        if not line:
            sys.exit(f"the process has ended: {self.p.wait()}")
        return json.loads(line)

    def livepatch(self, *args):
        r = subprocess.run([tool, args[0], str(self.p.pid), *args[1:]], capture_output=True, text=True)
        if r.returncode:
            bad.append(f"livepatch {' '.join(args)}: exit {r.returncode}: {r.stderr.strip()}")
        return r.stdout


def check(what, holds, figure):
    print(f"{'ok  ' if holds else 'FAIL'}  {what}: {figure}")
    if not holds:
        bad.append(what)


with tempfile.TemporaryDirectory() as tmp:
    h = Host(f"{tmp}/livepatch.sock")
    plain = h.ask("cost")["ns"]
    h.livepatch("apply", patch, "--canary", "0%", "--key", "session")
    zero = h.ask("cost")["ns"]
    check("0 %", h.ask("round")["new"] == 0, "no session")
    h.ask("s1")
    for share in (0.01, 1, 10, 25, 50, 75):
        h.livepatch("canary", "fix", f"{share}%")
        new, expected = h.ask("round")["new"], SESSIONS * share / 100
        # Four standard deviations of as many independent sessions.
        check(f"{share} %", abs(new - expected) <= 4 * math.sqrt(expected * (1 - share / 100)) + 1, f"{new} of {SESSIONS} sessions")
    h.livepatch("canary", "fix", "100%")
    whole = h.ask("cost")["ns"]
    got = h.ask("round")
    check("100 %", got["new"] == SESSIONS, f"{got['new']} of {SESSIONS} sessions")
    check("sessions that a growing share took back", got["moved"] == 0, got["moved"])
    h.ask("s0")
    for i in range(300):
        h.livepatch("canary", "fix", f"{i * 37 % 101}%")
    got = h.ask("x")
    check("messages that met both versions while the share changed 300 times", got["mixed"] == 0, f"{got['mixed']} of {got['messages']:,}")
    check("values lost in stubs", got["lost"] == 0, got["lost"])
    arms = json.loads(h.livepatch("status", "--json"))[0]["patches"][0]["arms"]
    check("both arms are counted", all(a["messages"] > 0 and a["p99_ns"] > 0 for a in arms), ", ".join(f"{n} {a['messages']:,} messages, p99 {a['p99_ns']} ns" for n, a in zip(("old", "new"), arms)))
    h.livepatch("revert")
    check("after the revert", h.ask("round")["new"] == 0, "no session")
    for _ in range(50):
        h.livepatch("apply", patch, "--canary", "50%", "--key", "session")
        h.livepatch("revert")
    got = h.ask("x")
    check("50 more applies and reverts under load", got["mixed"] == 0 and not bad, f"{got['mixed']} mixed")
    print(f"a call: {plain:.2f} ns plain, {zero:.2f} ns at 0 %, {whole:.2f} ns at 100 %: a stub costs {zero - plain:.2f} and {whole - plain:.2f} ns (goal 1)")
    # Judged on figures of one run, and with room for a machine that does other things.
    if min(zero, whole) - plain > 1.5:
        bad.append("the stub's cost")
    h.p.stdin.close()
    if h.p.wait() != 0:
        bad.append("the process's end")
for b in bad:
    print(f"failed: {b}", file=sys.stderr)
sys.exit(1 if bad else 0)
