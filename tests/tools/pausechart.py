#!/usr/bin/env python3
"""Draws docs/img/pause.svg from what ./ci/pause measured: the pause of running threads and the delay of sleeping ones against the
number of threads, beside the kernel's own stop-all of the same run and what was measured of the peers.

    pausechart.py target/pause/apply.json docs/img/pause.svg
"""
import json
import math
import sys

FONT = 'font-family="sans-serif" font-size="13"'
# libpulp with its stack check, SysCare: milliseconds at 8 and 64 threads, on machines of this kind.
PEERS = [("SysCare", "#b3b3b3", [(8, 13), (64, 181)]), ("libpulp", "#8da0cb", [(8, 8.3), (64, 58)])]

with open(sys.argv[1]) as f:
    figures = json.load(f)
floors, own = figures[0::2], figures[1::2]
at = [m["threads"] for m in own]
series = [
    ("stop-all, running", "#66c2a5", "4 3", [(m["threads"], m["pause"]["median"]) for m in floors]),
    ("livepatch, running", "#1b7837", "", [(m["threads"], m["pause"]["median"]) for m in own]),
    ("stop-all, sleeping", "#fc8d62", "4 3", [(m["threads"], m["delay"]["median"]) for m in floors]),
    ("livepatch, sleeping", "#b2182b", "", [(m["threads"], m["delay"]["median"]) for m in own]),
]
series += [(name, colour, "1 3", points) for name, colour, points in PEERS]
left, top, width, height = 70, 46, 430, 300
low, high = 0.02, 300
x = lambda n: left + (math.log(n) - math.log(6)) / (math.log(2600) - math.log(6)) * width
y = lambda ms: top + (math.log(high) - math.log(min(max(ms, low), high))) / (math.log(high) - math.log(low)) * height
text = lambda a, b, s, anchor="start", colour="#222": f'<text x="{a:.0f}" y="{b:.0f}" {FONT} text-anchor="{anchor}" fill="{colour}">{s}</text>'
parts = [text(left, 24, "How long a thread is kept from its work by an apply (ms, both axes logarithmic)")]
for ms in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300):
    parts += [f'<line x1="{left}" x2="{left + width}" y1="{y(ms):.1f}" y2="{y(ms):.1f}" stroke="#eee"/>', text(left - 8, y(ms) + 4, f"{ms:g}", "end")]
for n in at:
    parts.append(text(x(n), top + height + 20, f"{n:,}", "middle"))
parts.append(text(left + width / 2, top + height + 42, "threads", "middle"))
taken = []
for name, colour, dash, points in series:
    path = " ".join(f"{x(n):.1f},{y(ms):.1f}" for n, ms in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
    parts += [f'<circle cx="{x(n):.1f}" cy="{y(ms):.1f}" r="3" fill="{colour}"/>' for n, ms in points]
    n, ms = points[-1]
    label = y(ms) + 4
    while any(abs(label - t) < 15 for t in taken):
        label += 15
    taken.append(label)
    parts.append(text(left + width + 10, label, name, colour=colour))
with open(sys.argv[2], "w") as f:
    f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 410" role="img" aria-label="pause and delay by number of threads">\n<rect width="680" height="410" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")
