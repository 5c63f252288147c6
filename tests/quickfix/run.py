#!/usr/bin/env python3
"""The gateway against QuickFIX: logon, orders, cancels, resends, reconnects, restarts; before, during and after a patch.

QuickFIX validates every message against its own FIX 4.4 dictionary and keeps its own sequence numbers on disk, so a
mistake of the gateway's shows as a Reject, a ResendRequest or a Logout that nobody asked for.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback

from gateway import Gateway, Patcher
from trader import Trader

WRONG_FEE, RIGHT_FEE = "125.00", "75.00"


class Checks:
    def __init__(self):
        self.rows = []

    def __call__(self, name, holds, detail=""):
        self.rows.append((name, bool(holds), str(detail)))
        print(f"{'ok  ' if holds else 'FAIL'} {name} {detail}", flush=True)
        return bool(holds)

    def table(self):
        width = max(len(name) for name, _, _ in self.rows)
        print(f"\n{'check':<{width}}  result  detail")
        for name, holds, detail in self.rows:
            print(f"{name:<{width}}  {'ok' if holds else 'FAIL':<6}  {detail}")
        failed = sum(not holds for _, holds, _ in self.rows)
        print(f"{len(self.rows)} checks, {failed} failed")
        return failed == 0


def trading(check, trader):
    check("logon", trader.wait_logon(1))
    check("numbers start at 1", trader.numbers() == (2, 2), trader.numbers())
    fill = trader.trade()
    check("an order is filled", fill and fill[39] == "2" and fill[14] == "100", fill and fill[37])
    check("its report carries a commission", fill and fill[13] == "3" and fill[12] == WRONG_FEE, fill and fill[12])
    mark = trader.mark()
    resting = trader.order(symbol="REST", price="10", immediate=False)
    check("an order rests", trader.wait_for(mark, t35="8", t150="0", t11=resting))
    cancel = trader.cancel(resting, symbol="REST")
    check("and is cancelled", trader.wait_for(mark, t35="8", t150="4", t11=cancel, t41=resting))
    trader.cancel(resting, symbol="REST")
    check("and only once", trader.wait_for(mark, t35="9"))
    mark = trader.mark()
    trader.order(qty=2_000_000)
    rejected = trader.wait_for(mark, t35="8", t150="8")
    check("a risk limit rejects", rejected and "exceeds" in rejected[58], rejected and rejected[58])
    mark = trader.mark()
    heartbeat = trader.wait_for(mark, seconds=6, t35="0")
    check("heartbeats come", heartbeat)


def patching(check, trader, gateway, patcher):
    """The fee before, during and after; orders go on all the time."""
    before = trader.numbers()
    logons, logouts = trader.logons, trader.logouts
    stop = threading.Event()
    names, fees = [], []

    def trade_on():
        while not stop.is_set():
            mark = trader.mark()
            names.append(trader.order())
            fill = trader.wait_for(mark, t35="8", t150="F", t11=names[-1])
            fees.append(fill and fill[12])

    runner = threading.Thread(target=trade_on)
    runner.start()
    try:
        for round_number in (1, 2, 3):
            if gateway.process.poll() is not None:
                break
            done, said = patcher.apply(gateway.pid)
            check(f"apply {round_number}", done, said)
            fill = trader.trade()
            check(f"the fee is right when applied {round_number}", fill and fill[12] == RIGHT_FEE, fill and fill[12])
            done, said = patcher.revert(gateway.pid)
            check(f"revert {round_number}", done, said)
            fill = trader.trade()
            check(f"the old fee again when reverted {round_number}", fill and fill[12] == WRONG_FEE, fill and fill[12])
    finally:
        stop.set()
        runner.join()
    check("every order in between was filled", fees and None not in fees, f"{len(fees)} orders")
    check("with the old or the new fee", set(fees) <= {WRONG_FEE, RIGHT_FEE}, sorted(set(map(str, fees))))
    check("one session all the time", (trader.logons, trader.logouts) == (logons, logouts))
    after = trader.numbers()
    check("numbers moved on without a gap", after > before and trader.resend_requests_sent() == 0, f"{before} to {after}")


def resending(check, trader):
    original = trader.trade()
    originals = {m[17]: m for m in trader.after(0, t35="8", t150="F")}
    expected = trader.numbers()[1]
    # As if the last messages had never arrived: the next one shows the gap.
    trader.session.setNextTargetMsgSeqNum(expected - 2)
    mark = trader.mark()
    fill = trader.trade()
    check("after a ResendRequest by QuickFIX", fill and trader.resend_requests_sent() > 0)
    again = trader.after(mark, t43="Y", t35="8")
    same = all(m[12] == originals[m[17]][12] and m[34] == originals[m[17]][34] for m in again if m[17] in originals)
    check("reports come again, the same and marked", len(again) == 2 and same and original[17] in {m[17] for m in again}, len(again))
    sender, _ = trader.numbers()
    # As if three of our messages had got lost: the gateway asks, QuickFIX fills.
    trader.session.setNextSenderMsgSeqNum(sender + 3)
    mark = trader.mark()
    name = trader.order()
    asked = trader.wait_for(mark, t35="2")
    check("the gateway asks for a gap", asked and asked[7] == str(sender), asked and f"from {asked[7]}")
    check("and trades on when it is filled", trader.wait_for(mark, t35="8", t150="F", t11=name))


def reconnecting(check, trader):
    before, resends = trader.numbers(), trader.resend_requests_sent()
    count = trader.logons
    trader.session.logout()
    check("logout", trader.wait(lambda: trader.logouts > 0 and not trader.session.isLoggedOn()))
    trader.session.logon()
    check("reconnect", trader.wait_logon(count + 1))
    after = trader.numbers()
    # A Logout and a Logon each way, and heartbeats as time goes by. QuickFIX may number a Logon that it has no connection
    # for and send the next: the gateway asks for the missing one and is told to skip it.
    moved = all(before[way] + 2 <= after[way] <= before[way] + 6 for way in (0, 1))
    check("numbers go on where they were", moved, f"{before} to {after}")
    check("trading goes on", trader.trade())
    check("and QuickFIX missed nothing", trader.resend_requests_sent() == resends)


def restarting(check, trader, gateway, how, name):
    fill = trader.trade()
    mark = trader.mark()
    resting = trader.order(symbol="KEEP", price="7", immediate=False)
    check(f"{name}: an order rests before it", trader.wait_for(mark, t35="8", t150="0", t11=resting))
    before, logons = trader.numbers(), trader.logons
    code = gateway.end(how)
    check(f"{name}: the gateway ends", code == (0 if how == signal.SIGTERM else -how), f"exit {code}")
    trader.wait(lambda: not trader.session.isLoggedOn())
    # One report from before the end is asked for after it.
    trader.session.setNextTargetMsgSeqNum(before[1] - 2)
    mark, resends = trader.mark(), trader.resend_requests_sent()
    gateway.start()
    check(f"{name}: QuickFIX comes back", trader.wait_logon(logons + 1, 20))
    again = trader.wait(lambda: [m for m in trader.after(mark, t43="Y", t35="8") if m[17] == fill[17]])
    check(f"{name}: reports from before can be asked for", again and again[0][12] == fill[12], again and again[0][34])
    check(f"{name}: numbers go on", trader.numbers()[0] > before[0] and trader.resend_requests_sent() == resends + 1, trader.numbers())
    mark = trader.mark()
    cancel = trader.cancel(resting, symbol="KEEP")
    check(f"{name}: the order is still there", trader.wait_for(mark, t35="8", t150="4", t11=cancel))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", required=True, help="binary of the gateway")
    parser.add_argument("--dictionary", required=True, help="FIX44.xml of QuickFIX")
    parser.add_argument("--livepatch", help="binary of livepatch; without it nothing is patched")
    parser.add_argument("--patch", help="the patch that mends the fee")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and stores")
    args = parser.parse_args()

    folder = tempfile.mkdtemp(prefix="quickfix-")
    check = Checks()
    gateway = Gateway(args.gateway, folder)
    gateway.start()
    trader = Trader(os.path.join(folder, "trader"), gateway.port, "QUICKFIX", args.dictionary)
    trader.start()
    try:
        trading(check, trader)
        if args.livepatch:
            patching(check, trader, gateway, Patcher(args.livepatch, args.patch))
        if not check("the gateway lives", gateway.process.poll() is None, gateway.process.poll() or ""):
            raise RuntimeError("the gateway died")
        resending(check, trader)
        reconnecting(check, trader)
        restarting(check, trader, gateway, signal.SIGTERM, "restart")
        restarting(check, trader, gateway, signal.SIGKILL, "crash")
        check("QuickFIX found nothing to reject", trader.sent_types.count("3") == 0 and trader.sent_types.count("j") == 0)
        check("the gateway rejected nothing of QuickFIX's", not trader.reject_texts(), trader.reject_texts() or "")
    except Exception as error:  # a scenario that can't go on is one more failed check; the table still comes
        traceback.print_exc()
        check("all scenarios ran to their end", False, repr(error))
    finally:
        trader.stop()
        gateway.end()
    passed = check.table()
    if passed and not args.keep:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
