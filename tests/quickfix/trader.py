"""A counterparty made of QuickFIX: its engine speaks, checks and stores; this only looks on and asks."""

import os
import threading
import time

import quickfix as fix

SETTINGS = """\
[DEFAULT]
ConnectionType=initiator
ReconnectInterval=1
StartTime=00:00:00
EndTime=00:00:00
FileStorePath={folder}/store
FileLogPath={folder}/log
UseDataDictionary=Y
DataDictionary={dictionary}
ValidateUserDefinedFields=Y
HeartBtInt={heartbeat}
LogonTimeout=5
LogoutTimeout=2
SocketNodelay=Y
[SESSION]
BeginString=FIX.4.4
SenderCompID={sender}
TargetCompID=GATEWAY
SocketConnectHost=127.0.0.1
SocketConnectPort={port}
"""


def field(message, tag):
    """A field's text, or None."""
    where = message.getHeader() if tag in (34, 35, 43, 52, 122) else message
    return where.getField(tag) if where.isSetField(tag) else None


class Trader(fix.Application):
    """Notes every message in both directions, with its number, in the order in which QuickFIX hands them over."""

    def __init__(self, folder, port, sender, dictionary, heartbeat=2):
        super().__init__()
        os.makedirs(folder, exist_ok=True)
        config = os.path.join(folder, "quickfix.cfg")
        with open(config, "w") as out:
            out.write(SETTINGS.format(**{**locals(), "self": None}))
        self.lock = threading.Condition()
        self.received = []  # (tags as a dict, application level?)
        self.sent_types = []
        self.logons = 0
        self.logouts = 0
        self.orders = 0
        settings = fix.SessionSettings(config)
        # QuickFIX keeps references to these, Python does not know.
        self.keep = (settings, fix.FileStoreFactory(settings), fix.FileLogFactory(settings))
        self.initiator = fix.SocketInitiator(self, self.keep[1], settings, self.keep[2])
        self.session_id = fix.SessionID("FIX.4.4", sender, "GATEWAY")

    # What QuickFIX calls.
    def onCreate(self, session_id):
        pass

    def onLogon(self, session_id):
        with self.lock:
            self.logons += 1
            self.lock.notify_all()

    def onLogout(self, session_id):
        with self.lock:
            self.logouts += 1
            self.lock.notify_all()

    def toAdmin(self, message, session_id):
        self._note_sent(message)

    def toApp(self, message, session_id):
        self._note_sent(message)

    def fromAdmin(self, message, session_id):
        self._note_received(message, False)

    def fromApp(self, message, session_id):
        self._note_received(message, True)

    def _note_sent(self, message):
        with self.lock:
            self.sent_types.append(field(message, 35))

    def _note_received(self, message, application):
        tags = {t: field(message, t) for t in (34, 35, 43, 11, 41, 37, 17, 150, 39, 14, 151, 12, 13, 31, 32, 58, 371, 373, 7, 16)}
        with self.lock:
            self.received.append((tags, application))
            self.lock.notify_all()

    # What the scenarios call.
    def start(self):
        self.initiator.start()

    def stop(self):
        self.initiator.stop()

    @property
    def session(self):
        return fix.Session.lookupSession(self.session_id)

    def numbers(self):
        """(next to send, next expected)"""
        return self.session.getExpectedSenderNum(), self.session.getExpectedTargetNum()

    def wait(self, condition, seconds=10):
        """Waits until condition() is true; returns its last value."""
        end = time.monotonic() + seconds
        with self.lock:
            while not (value := condition()):
                left = end - time.monotonic()
                if left <= 0:
                    return value
                self.lock.wait(min(left, 0.1))
            return value

    def wait_logon(self, count, seconds=10):
        return self.wait(lambda: self.logons >= count and self.session.isLoggedOn(), seconds)

    def mark(self):
        """A place in the received messages, to look at what comes after it."""
        with self.lock:
            return len(self.received)

    def after(self, mark, **tags):
        """Messages after a mark whose fields have these values (t35='8', ...)."""
        wanted = {int(k[1:]): v for k, v in tags.items()}
        with self.lock:
            return [m for m, _ in self.received[mark:] if all(m[t] == v for t, v in wanted.items())]

    def wait_for(self, mark, seconds=10, **tags):
        found = self.wait(lambda: self.after(mark, **tags), seconds)
        return found[0] if found else None

    def _send(self, kind, fields):
        message = fix.Message()
        message.getHeader().setField(fix.MsgType(kind))
        for tag, value in fields:
            message.setField(fix.StringField(tag, str(value)))
        message.setField(fix.TransactTime())
        fix.Session.sendToTarget(message, self.session_id)

    def order(self, symbol="ACME", side="1", qty=100, price="5000", immediate=True):
        """Sends an order, returns its name."""
        self.orders += 1
        name = f"{os.getpid()}-{self.orders}"
        self._send("D", [(11, name), (21, 1), (55, symbol), (54, side), (38, qty), (40, 2), (44, price), (59, 3 if immediate else 0)])
        return name

    def cancel(self, original, symbol="ACME", side="1"):
        self.orders += 1
        name = f"{os.getpid()}-{self.orders}"
        self._send("F", [(11, name), (41, original), (55, symbol), (54, side), (38, 100)])
        return name

    def trade(self, **order):
        """Sends an order that is filled at once; returns the report of its fill."""
        mark = self.mark()
        name = self.order(**order)
        return self.wait_for(mark, t35="8", t150="F", t11=name, t151="0")

    def resend_requests_sent(self):
        with self.lock:
            return self.sent_types.count("2")

    def reject_texts(self):
        with self.lock:
            return [m[58] for m, _ in self.received if m[35] in ("3", "j")]
