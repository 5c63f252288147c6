"""The gateway under several allocators: one line for each, of what fix-load said of its runs.

    gateway.py FOLDER RATE ALLOCATOR...
"""
import json, statistics, sys

ROUNDS = (1, 2)


def main():
    folder, rate, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    read = lambda kind, name: [json.load(open(f"{folder}/gateway-{kind}-{r}-{name}.json")) for r in ROUNDS]
    wrong = []
    print()
    print(f"the gateway, two rounds in opposite order; latency at {rate} messages a second, in us")
    print(f"{'':10} {'orders/s at full speed':>24} {'p50':>13} {'p99':>15} {'p99.9':>17} {'resident, MiB':>15}")
    best = {}
    for name in names:
        full, paced, rss = read("full", name), read("rate", name), read("rss", name)
        for report in full + paced:
            if not report["passed"]:
                wrong.append(f"{name}: lost {report['lost']}, repeated {report['repeated']}, disconnects {report['disconnects']}")
        both = lambda values, form="{:.0f}": " ".join(form.format(v) for v in values)
        speed = [r["acknowledged_per_s"] for r in full]
        best[name] = statistics.mean(speed)
        latency = lambda key: both([r["latency"][key] for r in paced])
        print(f"{name:10} {both(speed):>24} {latency('p50_us'):>13} {latency('p99_us'):>15} {latency('p99_9_us'):>17} "
              f"{both([kb / 1024 for kb in rss]):>15}")
    top = max(best, key=best.get)
    print(f"most orders a second: {top}, {best[top] / best['glibc']:.2f} times glibc's")
    for w in wrong:
        print("WRONG:", w)
    sys.exit(1 if wrong else 0)


main()
