#!/usr/bin/env python3
"""flips.py HOST LIBRARY PATCH FLIPS: runs the flips of ./ci/flips and prints one table. Exit 0 only if nothing was wrong."""
import json, os, subprocess, sys, time

host, library, patch, flips = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
CASES = [
    ("1 hot", {"FLIP_HOT": 1}, 1.0),
    ("2 hot", {"FLIP_HOT": 2}, 1.0),
    ("4 hot", {"FLIP_HOT": 4}, 1.0),
    ("8 hot", {"FLIP_HOT": 8}, 1.0),
    ("born, forked, asleep", {"FLIP_HOT": 1, "FLIP_BORN": 1, "FLIP_FORK": 1, "FLIP_SLEEPERS": 4}, 0.25),
]


class Host:
    def __init__(self, wanted):
        env = dict(os.environ, **{k: str(v) for k, v in wanted.items()})
        self.p = subprocess.Popen([host, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.line()

    def line(self):
        line = self.p.stdout.readline()
        if not line:
            raise RuntimeError(f"the process has ended: {self.p.wait()}")
        return line

    def ask(self, question):
        self.p.stdin.write(question + "\n")
        self.p.stdin.flush()
        return json.loads(self.line())

    def threads(self):
        """Of each thread the stops by a tracer or by job control, which would show as a state; and its involuntary switches."""
        total = 0
        for tid in os.listdir(f"/proc/{self.p.pid}/task"):
            try:
                with open(f"/proc/{self.p.pid}/task/{tid}/status") as f:
                    text = f.read()
            except OSError:
                continue
            if "State:\tt" in text or "State:\tT" in text:
                raise RuntimeError(f"thread {tid} is stopped")
            total += int(text.split("nonvoluntary_ctxt_switches:")[1].split()[0])
        return total

    def quit(self):
        self.p.stdin.close()
        self.p.wait()


def quantile(histogram, share):
    """Upper bound of the power of two that holds it, in ns."""
    total, seen = sum(histogram), 0
    for i, n in enumerate(histogram):
        seen += n
        if seen >= total * share:
            return 2 ** (i + 1)
    return 0


def slowest(histogram, count):
    """The slowest `count` calls of a histogram: those that trapped, for a trap costs more than any other call."""
    out = [0] * len(histogram)
    for i in reversed(range(len(histogram))):
        out[i] = min(histogram[i], count)
        count -= out[i]
    return out


def ns(n):
    return f"{n} ns" if n < 10_000 else f"{n / 1000:.0f} µs" if n < 10_000_000 else f"{n / 1e6:.0f} ms"


rows = [("threads", "flips", "calls", "trapped", "wrong", "failed", "EINTR", "traps stand ms med/p99/max", "trapped call p50/p99", "call p50/p99/p99.9/max", "without flips", "switches/s", "without")]
bad = False
for name, wanted, share in CASES:
    count = max(int(flips * share), 2)
    try:
        h = Host(wanted)
        h.ask("ask reset")
        before, t0 = h.threads(), time.monotonic()
        time.sleep(2)
        plain = h.ask("ask reset")
        rate0 = (h.threads() - before) / (time.monotonic() - t0)
        before, t0 = h.threads(), time.monotonic()
        figures = h.ask(f"flip {count} {patch}")
        rate = (h.threads() - before) / (time.monotonic() - t0)
        after = h.ask("ask all")
        h.quit()
    except (RuntimeError, BrokenPipeError, ValueError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        rows.append((name, "-", "-", "-", "-", "CRASH", "-", "-", "-", "-", "-", "-", "-"))
        bad = True
        continue
    failed = sum(figures["failures"].values())
    if failed:
        print(f"{name}: {figures['failures']}", file=sys.stderr)
    t = figures["trapping_us"]
    q = lambda h: "/".join(ns(quantile(h["histogram"], s)) for s in (0.5, 0.99, 0.999)) + "/" + ns(h["longest_ns"])
    few = slowest(after["histogram"], figures["trapped"])
    trapped = "/".join(ns(quantile(few, s)) for s in (0.5, 0.99))
    interrupted = figures["interrupted"] + after["spurious"]
    rows.append((name, str(figures["flips"]), f"{after['calls'] - plain['calls']:,}", f"{figures['trapped']:,}", str(after["wrong"]), str(failed), str(interrupted),
                 f"{t['median'] / 1e3:.2f}/{t['p99'] / 1e3:.1f}/{t['max'] / 1e3:.0f}", trapped, q(after), q(plain), f"{rate:.0f}", f"{rate0:.0f}"))
    # A switch that was taken back in time is no fault; one in a hundred would be.
    bad |= after["wrong"] > 0 or failed * 100 > count or interrupted > 0
    if wanted.get("FLIP_BORN"):
        print(f"{name}: {after['births']:,} threads born, {after['forks']:,} children forked, {after['sleeps']:,} sleeps", file=sys.stderr)
widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
for r in rows:
    print("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip())
print("\nQuantiles of calls are upper bounds of powers of two. No thread was seen stopped; switches are involuntary ones of all threads.")
print("failed" if bad else "passed")
sys.exit(1 if bad else 0)
