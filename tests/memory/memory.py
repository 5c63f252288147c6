"""Cycles of apply and revert inside a program whose threads allocate all the time, under several allocators: what its memory does meanwhile.

    memory.py PROGRAM LIBRARY CYCLES RESULT.json ALLOCATOR=PRELOAD... -- FIX.so...

A preload of nothing is the C library's own allocator. Each program runs alone; after a tenth of the cycles its memory is taken as the base.
"""
import json, os, subprocess, sys, time

SLACK_KB = 2048  # what resident memory may have grown by at the end, beyond 2 % of the base


class Program:
    def __init__(self, program, library, preload):
        env = dict(os.environ)
        if preload:
            env["LD_PRELOAD"] = preload
        self.process = subprocess.Popen([program, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        assert self.process.stdout.readline().strip() == "ready"

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        if not said:
            raise SystemExit(f"the program is gone: {self.process.wait()}")
        return said.strip()

    def look(self):
        """Resident and anonymous memory in kB, mappings, the arena, and what the library and the allocator say."""
        pid = self.process.pid
        rollup = dict(l.split(":", 1) for l in open(f"/proc/{pid}/smaps_rollup").read().splitlines()[1:])
        kb = {k: int(v.split()[0]) for k, v in rollup.items()}
        maps = open(f"/proc/{pid}/maps").read().splitlines()
        # Heaps and stacks come and go with an allocator's mood; what patches bring is code of no file.
        code = [l for l in maps if "x" in l.split()[1] and len(l.split()) < 6]
        version, live, calls, given, held = map(int, self.tell("ask ?").split())
        return {"rss_kb": kb["Rss"], "anonymous_kb": kb["Anonymous"], "maps": len(maps), "code_maps": len(code), "version": version,
                "live_kb": live // 1024, "calls": calls, "given_kb": given // 1024 if given >= 0 else None,
                "held_kb": held // 1024 if held >= 0 else None, "arena": json.loads(self.tell("arena"))}

    def cycles(self, count, patches):
        done = json.loads(self.tell(f"flip {2 * count} {' '.join(patches)}"))
        if done["failures"] or done["flips"] != 2 * count:
            raise SystemExit(f"not all was done: {done}")
        return done


def run(name, preload, program, library, cycles, patches):
    p = Program(program, library, preload)
    try:
        start = p.look()
        # Every patch is mapped once, and the heaps are as full as they get.
        p.cycles(max(cycles // 10, len(patches)), patches)
        base, began, seen, done, trapping = p.look(), time.monotonic(), [], 0, []
        while done < cycles:
            some = min(max(cycles // 20, 1), cycles - done)
            trapping.append(p.cycles(some, patches)["trapping_us"]["median"])
            done += some
            seen.append(p.look())
            print(f"{name}: {done} of {cycles} cycles, resident {seen[-1]['rss_kb']} kB (base {base['rss_kb']})", file=sys.stderr, flush=True)
        took = time.monotonic() - began
    finally:
        p.process.kill()
        p.process.wait()
    end, rss = seen[-1], [s["rss_kb"] for s in seen]
    wrong = []
    limit = base["rss_kb"] + max(SLACK_KB, base["rss_kb"] // 50)
    if end["rss_kb"] > limit:
        wrong.append(f"{name}: resident memory grew from {base['rss_kb']} to {end['rss_kb']} kB; the limit is {limit} kB")
    if end["code_maps"] != base["code_maps"]:
        wrong.append(f"{name}: mappings of code grew from {base['code_maps']} to {end['code_maps']}")
    for figure in ("used", "fallbacks"):
        if end["arena"][figure] > base["arena"][figure]:
            wrong.append(f"{name}: the arena's {figure} grew from {base['arena'][figure]} to {end['arena'][figure]}")
    if end["arena"]["peak"] > base["arena"]["peak"] * 1.1:
        wrong.append(f"{name}: the arena's peak grew from {base['arena']['peak']} to {end['arena']['peak']}")
    if end["version"] != 1:
        wrong.append(f"{name}: version {end['version']} runs at the end")
    return {"allocator": name, "start": start, "base": base, "end": end, "rss_kb": [min(rss), max(rss)], "cycles": cycles, "seconds": took,
            "trapping_us": sorted(trapping)[len(trapping) // 2], "wrong": wrong}


def main():
    program, library, cycles, result = sys.argv[1:5]
    rest = sys.argv[5:]
    allocators, patches = rest[:rest.index("--")], rest[rest.index("--") + 1:]
    done = [run(*a.split("=", 1), program, library, int(cycles), patches) for a in allocators]
    json.dump(done, open(result, "w"), indent=1)
    print(f"{cycles} cycles of apply and revert, {len(patches)} patches in turn, one of them with hooks; memory in MiB")
    print(f"{'':10} {'resident':>19} {'over live':>9} {'by its figures':>14} {'code':>9} {'arena: used':>19} {'peak':>6} {'else':>5} {'a cycle':>8}")
    print(f"{'':10} {'base -> end (most)':>19} {'bytes':>9} {'held / given':>14} {'mappings':>9} {'base -> end, kB':>19} {'kB':>6} {'':>5} {'':>8}")
    for d in done:
        base, end = d["base"], d["end"]
        mib = lambda kb: f"{kb / 1024:.1f}"
        over = end["anonymous_kb"] - end["arena"]["reserved"] // 1024
        ratio = f"{end['held_kb'] / end['given_kb']:.2f}" if end["given_kb"] else "-"
        arena = f"{base['arena']['used'] / 1024:.1f} -> {end['arena']['used'] / 1024:.1f}"
        print(f"{d['allocator']:10} {mib(base['rss_kb']) + ' -> ' + mib(end['rss_kb']) + ' (' + mib(d['rss_kb'][1]) + ')':>19} "
              f"{over / end['live_kb']:>9.2f} {ratio:>14} {base['code_maps']:>4}->{end['code_maps']:<3} {arena:>19} "
              f"{end['arena']['peak'] // 1024:>6} {end['arena']['fallbacks']:>5} {1e3 * d['seconds'] / d['cycles']:>5.1f} ms")
    wrong = [w for d in done for w in d["wrong"]]
    for w in wrong:
        print("WRONG:", w)
    sys.exit(1 if wrong else 0)


main()
