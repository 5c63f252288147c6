#!/usr/bin/env python3
"""Times patch-builder on pairs of builds, against reading both files, and judges the goals of ./ci/bench-builder.

    bench.py BUILDER OUT.json RUNS NAME OLD NEW [NAME OLD NEW]...

All figures of a row are the best of RUNS, and the runs of all rows take turns, so that a noisy minute hits every row.
Linearity is judged by processor time (user and system): another program that wants the processors does not count.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

GOALS = {"redis": (1.0, None), "rust": (10.0, 4096), "scale-200000": (10.0, 4096)}
LINEAR = 1.5


def timed(command, **more):
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, **more)
    return time.monotonic() - start, done


def children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def floor(old, new):
    """Reading both files once, hashing them, and the processor's share of hashing: in seconds."""
    read, _ = timed(["sh", "-c", 'cat "$@" >/dev/null', "sh", old, new])
    before = children()
    hashed, _ = timed(["sha256sum", old, new])
    return read, hashed, children() - before


def once(builder, name, old, new, patch):
    wall, done = timed([builder, old, new, "-o", patch, "--json"])
    try:
        said = json.loads(done.stdout)
        cost = said["cost"]
    except (ValueError, KeyError):
        sys.exit(f"{name}: {builder} exits {done.returncode}: {done.stderr.decode()[-300:]}")
    return wall, done.returncode, said, cost


def row(name, old, new):
    mb = (os.path.getsize(old) + os.path.getsize(new)) / 1e6
    return {"name": name, "old": old, "new": new, "mb": mb, "wall_s": 1e9, "cpu_s": 1e9, "read_s": 1e9, "hash_s": 1e9,
            "hash_cpu_s": 1e9, "peak_mib": 0}


def measure(builder, runs, rows):
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(runs):
            for r in rows:
                if sys.stderr.isatty():
                    print(f"\r  run {turn + 1} of {runs}: {r['name']:<20}", end="", file=sys.stderr, flush=True)
                read, hashed, hash_cpu = floor(r["old"], r["new"])
                r["hash_cpu_s"] = min(r["hash_cpu_s"], hash_cpu)
                wall, code, said, cost = once(builder, r["name"], r["old"], r["new"], os.path.join(scratch, "fix.so"))
                r["read_s"], r["hash_s"] = min(r["read_s"], read), min(r["hash_s"], hashed)
                r["cpu_s"] = min(r["cpu_s"], (cost["user_ms"] + cost["system_ms"]) / 1e3)
                r["peak_mib"] = max(r["peak_mib"], cost["peak_kib"] / 1024)
                r["functions"], r["exit"] = cost["functions"][0], code
                r["changed"] = len(said["functions"])
                if wall < r["wall_s"]:
                    r["wall_s"], r["phases"] = wall, {p["name"]: p["wall_ms"] for p in cost["phases"]}
    if sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)


def table(rows):
    head = ["input", "functions", "MB", "wall s", "cpu s", "peak MiB", "read s", "hash s", "wall/hash", "cpu/hash", "MB/s", "us/function", "patch"]
    lines = [head]
    for r in rows:
        answer = f"{r['changed']} functions" if r["exit"] == 0 else f"exit {r['exit']}"
        lines.append([r["name"], f"{r['functions']:,}", f"{r['mb']:.1f}", f"{r['wall_s']:.3f}", f"{r['cpu_s']:.3f}", f"{r['peak_mib']:.0f}",
                      f"{r['read_s']:.3f}", f"{r['hash_s']:.3f}", f"{r['wall_s'] / r['hash_s']:.2f}", f"{r['cpu_s'] / r['hash_cpu_s']:.2f}", f"{r['mb'] / r['wall_s']:.0f}",
                      f"{r['cpu_s'] / r['functions'] * 1e6:.1f}", answer])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))))


def judge(rows):
    by_name = {r["name"]: r for r in rows}
    verdicts = []
    for name, (seconds, mib) in GOALS.items():
        if name in by_name:
            r = by_name[name]
            verdicts.append((r["wall_s"] < seconds, f"{name}: {r['wall_s']:.2f} s, goal {seconds:g} s"))
            if mib:
                verdicts.append((r["peak_mib"] < mib, f"{name}: {r['peak_mib']:.0f} MiB, goal {mib} MiB"))
    scale = [r for r in rows if r["name"].startswith("scale-")]
    if len(scale) > 1:
        cost = [r["cpu_s"] / r["functions"] for r in (scale[0], scale[-1])]
        verdicts.append((cost[1] / cost[0] < LINEAR,
                         f"{scale[-1]['name']} takes {cost[1] / cost[0]:.2f} times as much for each function as {scale[0]['name']}, goal {LINEAR}"))
    for r in scale:
        verdicts.append((r["exit"] == 0 and r["changed"] == 1, f"{r['name']}: one function changed, {r['changed']} found (exit {r['exit']})"))
    for r in rows:
        if r["name"] in ("redis", "rust"):
            verdicts.append((r["exit"] == 0 and r["changed"] > 0, f"{r['name']}: a patch of {r['changed']} functions (exit {r['exit']})"))
    for good, text in verdicts:
        print(f"{'ok  ' if good else 'MISS'}  {text}")
    return all(good for good, _ in verdicts)


def main():
    builder, out, runs, *rest = sys.argv[1:]
    rows = [row(*rest[i:i + 3]) for i in range(0, len(rest), 3)]
    measure(builder, int(runs), rows)
    table(rows)
    print()
    busy, processors = os.getloadavg()[0], os.cpu_count() or 1
    if busy > processors:
        print(f"note  the load is {busy:.1f} on {processors} processors: only processor times and ratios say something")
    for r in rows:
        r["old"], r["new"] = os.path.basename(r["old"]), os.path.basename(r["new"])
    with open(out, "w", encoding="ascii") as f:
        json.dump(rows, f, indent=1)
    sys.exit(0 if judge(rows) else 1)


main()
