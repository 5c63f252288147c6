"""The gateway as a process, and the command lines that patch it."""

import os
import signal
import subprocess
import time


class Gateway:
    """One data folder, one port; may be started many times."""

    def __init__(self, binary, folder):
        self.binary = binary
        self.data = os.path.join(folder, "gateway-data")
        self.log = open(os.path.join(folder, "gateway.log"), "ab")
        self.port = 0
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [self.binary, "--port", str(self.port), "--data", self.data],
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        line = self.process.stdout.readline().decode()
        if not line.startswith("listening "):
            raise RuntimeError(f"the gateway did not start: {line!r}; see {self.log.name}")
        self.port = int(line.rsplit(":", 1)[1])

    @property
    def pid(self):
        return self.process.pid

    def end(self, how=signal.SIGTERM):
        """Ends it, returns its exit code."""
        self.process.send_signal(how)
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "killed after 10 s"
        finally:
            self.process.stdout.close()


class Patcher:
    """`livepatch apply` and `livepatch revert`, as a user types them."""

    def __init__(self, livepatch, patch):
        self.livepatch = livepatch
        self.patch = patch

    def apply(self, pid):
        return self._run("apply", str(pid), self.patch)

    def revert(self, pid):
        return self._run("revert", str(pid))

    def _run(self, *arguments):
        start = time.monotonic()
        done = subprocess.run([self.livepatch, *arguments], capture_output=True, text=True, timeout=60)
        took_ms = (time.monotonic() - start) * 1000
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = f"exit {done.returncode}, {took_ms:.0f} ms"
        if done.returncode != 0 and lines:
            said += ": " + lines[-1]
        return done.returncode == 0, said
