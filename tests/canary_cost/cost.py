#!/usr/bin/env python3
"""What a call costs with no patch, through an entry jump, and through a canary stub: cost.py PATCH-BUILDER LIVEPATCH FOLDER"""
import os
import subprocess
import sys

builder, livepatch, out = sys.argv[1:4]
here = os.path.dirname(os.path.abspath(__file__))
os.makedirs(out, exist_ok=True)
for v in (1, 2):
    flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", f"-DV={v}"]
    subprocess.run(["gcc", *flags, os.path.join(here, "hot.c"), "-o", f"{out}/v{v}"], check=True)
fix = f"{out}/fix.so"
subprocess.run([builder, f"{out}/v1", f"{out}/v2", "-o", fix], check=True, stdout=subprocess.DEVNULL)
program = subprocess.Popen([f"{out}/v1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def cost():
    program.stdin.write("\n")
    program.stdin.flush()
    return float(program.stdout.readline())


def run(*args):
    subprocess.run([livepatch, *args], check=True, stdout=subprocess.DEVNULL)


pid = str(program.pid)
rows = []
try:
    rows.append(("no patch", cost()))
    run("apply", pid, fix)
    rows.append(("entry jump", cost()))
    run("revert", pid)
    run("apply", pid, fix, "--canary", "0%", "--key", "fee:arg1")
    for share in ["0%", "5%", "50%", "100%"]:
        run("canary", pid, "fix", share)
        rows.append((f"canary, {share}", cost()))
    run("revert", pid)
    rows.append(("no patch again", cost()))
finally:
    program.kill()
base = min(rows[0][1], rows[-1][1])
print(f"{'call':16} {'ns':>7} {'more':>7}")
for name, ns in rows:
    print(f"{name:16} {ns:7.2f} {ns - base:+7.2f}")
# In calls of the same run: a stub is some twenty instructions.
jump = rows[1][1] / base
print(f"{'ok  ' if jump <= 1.25 else 'MISS'}  an entry jump costs {jump:.2f} times a call, goal 1.25")
worst = max(ns for name, ns in rows if name.startswith("canary"))
print(f"the dearest canary costs {worst - base:.2f} ns a call; the goal is 1 ns")
sys.exit(0 if jump <= 1.25 else 1)
