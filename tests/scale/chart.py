#!/usr/bin/env python3
"""Draws docs/img/builder-scale.svg and builder-phases.svg from what ./ci/bench-builder measured.

    chart.py target/bench/bench.json docs/img
"""
import json
import os
import sys

FONT = 'font-family="sans-serif" font-size="13"'
COLOURS = ["#8da0cb", "#66c2a5", "#fc8d62", "#e78ac3", "#a6d854", "#ffd92f", "#e5c494", "#b3b3b3", "#80b1d3", "#bebada", "#444444"]


def svg(width, height, parts, title):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def text(x, y, s, anchor="start", colour="#222"):
    return f'<text x="{x:.0f}" y="{y:.0f}" {FONT} text-anchor="{anchor}" fill="{colour}">{s}</text>'


def scale(rows):
    left, top, width, height = 60, 40, 560, 260
    most = max(r["functions"] for r in rows) * 1.05
    highest = max(r["cpu_s"] for r in rows) * 1.15
    x = lambda v: left + v / most * width
    y = lambda v: top + height - v / highest * height
    parts = [text(left, 22, "patch-builder: processor time by number of functions (two builds, debug information)")]
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if highest / s <= 8)
    for i in range(int(highest / step) + 1):
        v = i * step
        parts += [f'<line x1="{left}" y1="{y(v):.1f}" x2="{left + width}" y2="{y(v):.1f}" stroke="#ddd"/>', text(left - 6, y(v) + 4, f"{v:g} s", "end")]
    for key, label, colour in [("cpu_s", "patch-builder", "#d95f02"), ("hash_cpu_s", "sha256sum of both files", "#777")]:
        points = " ".join(f"{x(r['functions']):.1f},{y(r[key]):.1f}" for r in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(r["functions"]):.1f}" cy="{y(r[key]):.1f}" r="3" fill="{colour}"/>' for r in rows]
        last = rows[-1]
        parts.append(text(x(last["functions"]) + 10, y(last[key]) + 4, f"{label}: {last[key]:.2f} s", colour=colour))
    parts += [text(x(r["functions"]), top + height + 20, f"{r['functions'] / 1000:.0f}k", "middle") for r in rows]
    return svg(860, 330, parts, "time by number of functions")


def phases(rows):
    left, top, width = 130, 50, 560
    names = list(dict.fromkeys(name for r in rows for name in r["phases"]))
    parts = [text(left, 22, "What the time goes to, in percent of the wall time")]
    for i, r in enumerate(rows):
        total, at, y = sum(r["phases"].values()), left, top + i * 30
        parts.append(text(left - 8, y + 15, r["name"], "end"))
        for name, ms in r["phases"].items():
            w = ms / total * width
            parts.append(f'<rect x="{at:.1f}" y="{y}" width="{w:.1f}" height="22" fill="{COLOURS[names.index(name) % len(COLOURS)]}"/>')
            if w > 34:
                parts.append(text(at + w / 2, y + 15, f"{ms / total * 100:.0f}", "middle"))
            at += w
        parts.append(text(at + 8, y + 15, f"{r['cpu_s']:.2f} s of processor time"))
    for j, name in enumerate(names):
        x, y = left + j % 5 * 120, top + len(rows) * 30 + 16 + j // 5 * 22
        parts += [f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[j % len(COLOURS)]}"/>', text(x + 20, y + 12, name)]
    return svg(900, top + len(rows) * 30 + 70, parts, "share of each phase")


def main():
    with open(sys.argv[1], encoding="ascii") as f:
        rows = json.load(f)
    folder = sys.argv[2]
    for name, picture in [("builder-scale", scale([r for r in rows if r["name"].startswith("scale-")])), ("builder-phases", phases(rows))]:
        with open(os.path.join(folder, name + ".svg"), "w", encoding="ascii") as f:
            f.write(picture)


main()
