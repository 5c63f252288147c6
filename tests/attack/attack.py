#!/usr/bin/env python3
"""attack.py INSIDE LIVEPATCH PATCH_BUILDER WORK: the attacks of ./ci/attack, a line each and the count. Exit 0 only if all were refused."""
import array, fcntl, json, os, shutil, socket, struct, subprocess, sys, tempfile, time

inside, livepatch, patch_builder, work = sys.argv[1:]
NOBODY = 65534
IS_ROOT = os.geteuid() == 0
WRITE, SHRINK, GROW, SEAL = 8, 2, 4, 1
F_ADD_SEALS = 1033
OPTIONS = {"timeout": {"secs": 2, "nanos": 0}, "hold": {"secs": 0, "nanos": 100000000}, "allow_contexts": False, "allow_unwind": False,
           "consistency": "stack", "signed": None, "canary": None, "confirm_within": None, "allow_replay": False}
folder = tempfile.mkdtemp(prefix="livepatch-attack-")
os.chmod(folder, 0o755)
results = []


class Agent:
    """A program with an agent; with keys it takes signed patches only."""

    def __init__(self, name, keys=None):
        self.socket = f"{folder}/livepatch-{name}.sock"
        self.p = start(self.socket, keys)
        if self.p.stdout.readline() != "ready\n":
            raise RuntimeError("the agent did not start")

    def ask(self, question):
        self.p.stdin.write(f"ask {question}\n")
        self.p.stdin.flush()
        return self.p.stdout.readline().strip()

    def state(self):
        """Descriptors, threads and resident KiB, when nothing goes on."""
        time.sleep(0.3)
        pid = self.p.pid
        fds = min((len(os.listdir(f"/proc/{pid}/fd")), time.sleep(0.003))[0] for _ in range(20))
        with open(f"/proc/{pid}/statm") as f:
            resident = int(f.read().split()[1]) * 4
        return fds, len(os.listdir(f"/proc/{pid}/task")), resident

    def command(self, *words):
        return subprocess.run([livepatch, words[0], str(self.p.pid), *words[1:]], capture_output=True, text=True, timeout=60)

    def version(self):
        return self.ask("figures").split()[1]


def start(path, keys=None):
    args = [inside, f"{work}/1/work.so", path] + ([keys] if keys else [])
    return subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if not keys else None, text=True)


def frame(body, magic=b"LPAG", version=1, length=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return magic + struct.pack("<HHI", version, 0, len(body) if length is None else length) + body


def sealed(data, seals=WRITE | SHRINK | GROW | SEAL):
    fd = os.memfd_create("patch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def receive(s, seconds=6):
    s.settimeout(seconds)
    data = b""
    try:
        while chunk := s.recv(1 << 16):
            data += chunk
    except (TimeoutError, ConnectionError):
        pass
    return json.loads(data[12:]) if len(data) > 12 else None


def send(s, data, fds=()):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        s.sendmsg([data], rights)
    except (BrokenPipeError, ConnectionResetError):
        pass


def connect(agent):
    s = socket.socket(socket.AF_UNIX)
    s.connect(agent.socket)
    return s


def request(agent, data, fds=()):
    s = connect(agent)
    send(s, data, fds)
    answer = receive(s)
    s.close()
    for fd in fds:
        os.close(fd)
    return answer


def apply(signature=None, **options):
    return frame({"apply": {"options": {**OPTIONS, **options}, "signature": signature}})


def read(name):
    with open(f"{work}/{name}", "rb") as f:
        return f.read()


def was_refused(answer):
    """Closed without a word, or a failure that is said."""
    return answer is None or "failed" in answer


def said(answer):
    return "closed" if answer is None else answer.get("failed", {}).get("message", json.dumps(answer))


def attack(name, refused, how=""):
    results.append(refused)
    print(f"{'refused' if refused else 'NOT REFUSED':12} {name}: {' '.join(str(how).split())[:150]}", flush=True)


def tries(name, agent, data, fds=()):
    answer = request(agent, data, fds)
    attack(name, was_refused(answer), said(answer))


def as_nobody(run):
    """Runs it as another user, in a process of its own; what it returns as text."""
    r, w = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            out = run()
        except OSError as e:
            out = f"closed: {e.strerror}"
        os.write(w, str(out).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as f:
        text = f.read()
    os.waitpid(child, 0)
    return text


def other_users(agent):
    if not IS_ROOT:
        print("not tried     other users, for want of root")
        return

    def connects():
        answer = request(agent, frame("status"))
        return "refused: " + said(answer) if was_refused(answer) else "answered"

    text = as_nobody(connects)
    attack("another user on the socket", text.startswith(("refused", "closed")), text)
    os.chmod(agent.socket, 0o666)
    text = as_nobody(connects)
    attack("another user on a socket that was opened to all", text.startswith("refused"), text)
    # A connection that another user made, used by root: the peer is who connected.
    ours, theirs = socket.socketpair()

    def passes():
        s = connect(agent)
        socket.send_fds(theirs, [b"x"], [s.fileno()])
        return "passed"

    as_nobody(passes)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=fds[0]) as s:
        send(s, frame("status"))
        answer = receive(s)
    attack("another user's connection, passed to root", was_refused(answer), said(answer))
    text = as_nobody(lambda: subprocess.run([livepatch, "revert", str(agent.p.pid)], capture_output=True, text=True, cwd="/").returncode)
    attack("another user's command", text not in ("0", ""), f"exit {text}")
    os.chmod(agent.socket, 0o600)


def paths(agent):
    def starts(name, path, before=lambda: None, after=lambda: None):
        before()
        p = start(path)
        try:
            out, err = p.communicate("quit\n", timeout=20)
        except subprocess.TimeoutExpired:
            p.kill()
            out, err = p.communicate()
        attack(name, p.returncode != 0 and "ready" not in out, err.strip().splitlines()[-1] if err.strip() else out)
        after()

    at = f"{folder}/livepatch-path.sock"
    starts("a socket in use", agent.socket)
    starts("a relative path", "livepatch-relative.sock")
    starts("a symbolic link in the socket's place", at, lambda: os.symlink(f"{folder}/elsewhere", at), lambda: os.unlink(at))
    starts("a link to another agent's socket", at, lambda: os.symlink(agent.socket, at), lambda: os.unlink(at))
    starts("a fifo in its place", at, lambda: os.mkfifo(at), lambda: os.unlink(at))
    starts("a file in its place", at, lambda: open(at, "w").close(), lambda: os.unlink(at))
    starts("a folder in its place", at, lambda: os.mkdir(at), lambda: os.rmdir(at))
    os.mkdir(f"{folder}/open")
    os.chmod(f"{folder}/open", 0o777)
    starts("a folder that others write to", f"{folder}/open/livepatch.sock")
    os.symlink(f"{folder}/open", f"{folder}/link")
    starts("a link to such a folder", f"{folder}/link/livepatch.sock")
    os.mkdir(f"{folder}/open/inner", 0o755)
    starts("a folder in such a folder", f"{folder}/open/inner/livepatch.sock")
    if IS_ROOT:
        os.mkdir(f"{folder}/theirs", 0o755)
        os.chown(f"{folder}/theirs", NOBODY, NOBODY)
        starts("another user's folder", f"{folder}/theirs/livepatch.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(at)
        os.chown(at, NOBODY, NOBODY)
        starts("another user's socket in its place", at, after=lambda: os.unlink(at))
    starts("a path that is too long", f"{folder}/{'x' * 120}.sock")
    # Replaced while it runs: a command must not take the stranger for the agent.
    aside = f"{agent.socket}.aside"
    os.rename(agent.socket, aside)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(agent.socket)
        stranger.listen(4)
        stranger.settimeout(0.2)
        ran = agent.command("status", "--json")
        got = None
        try:
            other, _ = stranger.accept()
            got = other.recv(1 << 16)
            other.close()
        except TimeoutError:
            pass
    attack("a stranger's socket in the agent's place", not got, f"exit {ran.returncode}, it was sent {len(got or b'')} bytes")
    os.unlink(agent.socket)
    os.rename(aside, agent.socket)


def frames(agent):
    tries("bytes that are no frame", agent, os.urandom(4096))
    tries("another magic", agent, frame("info", magic=b"LPAX"))
    tries("another version", agent, frame("info", version=99))
    tries("a frame of 4 GiB", agent, frame(b"x", length=0xffffffff))
    tries("a frame of 2 MiB", agent, frame(b" " * (2 << 20)))
    tries("a body that is not JSON", agent, frame(b"\xff\xfe{"))
    tries("JSON 100,000 levels deep", agent, frame(b"[" * 100000))
    tries("a request that is none", agent, frame({"shutdown": None}))
    tries("a field that is none", agent, frame({"confirm": {"name": "x", "force": True}}))
    tries("an empty name", agent, frame({"confirm": {"name": ""}}))
    tries("a share of 200 %", agent, frame({"canary": {"name": "x", "share": 20000}}))
    tries("a time without end", agent, apply(None, timeout={"secs": 2**63, "nanos": 0}), [sealed(read("fix.so"))])
    tries("bytes after the frame", agent, frame("info") + b"more")
    tries("a descriptor with a request that takes none", agent, frame("status"), [os.open("/dev/null", os.O_RDONLY)])
    tries("200 descriptors", agent, apply(None), [os.open("/dev/null", os.O_RDONLY) for _ in range(200)])
    for part in (1, 11, 12, 40):
        s = connect(agent)
        send(s, frame({"confirm": {"name": "x" * 100}})[:part])
        s.shutdown(socket.SHUT_WR)
        answer = receive(s)
        s.close()
        attack(f"a frame of which {part} bytes come", was_refused(answer), said(answer))
    s = connect(agent)
    began = time.monotonic()
    send(s, frame("info")[:6])
    answer = receive(s, 10)
    s.close()
    attack("half a frame, and silence", was_refused(answer) and time.monotonic() - began < 9, f"closed after {time.monotonic() - began:.1f} s")
    # As many at once as there can be.
    idle, at_once = [], 0
    for _ in range(1000):
        s = socket.socket(socket.AF_UNIX)
        s.setblocking(False)
        try:
            s.connect(agent.socket)
            idle.append(s)
        except BlockingIOError:
            s.close()
            time.sleep(0.001)
    began = time.monotonic()
    answer = request(agent, frame("info"))
    took = time.monotonic() - began
    attack(f"{len(idle)} connections that say nothing", answer is not None and "info" in answer, f"another one was answered after {took * 1000:.0f} ms")
    for s in idle:
        s.close()
    # A reader who does not read.
    many = [connect(agent) for _ in range(20)]
    for s in many:
        send(s, frame("status"))
    answer = request(agent, frame("info"))
    attack("20 clients that do not read", answer is not None and "info" in answer, "another one was answered")
    for s in many:
        s.close()


def patches(agent, keyed):
    fix, foreign = read("fix.so"), read("foreign.so")
    signature = read("fix.so.minisig").decode()
    tries("an apply without a patch", agent, apply(None))
    tries("two patches at once", agent, apply(None), [sealed(fix), sealed(fix)])
    tries("a patch in a file", agent, apply(None), [os.open(f"{work}/fix.so", os.O_RDONLY)])
    tries("a patch in memory that is not sealed", agent, apply(None), [sealed(fix, 0)])
    tries("a patch in memory that may still be written", agent, apply(None), [sealed(fix, SHRINK | GROW | SEAL)])
    tries("a patch in memory that may still shrink", agent, apply(None), [sealed(fix, WRITE | GROW | SEAL)])
    r, w = os.pipe()
    tries("a patch in a pipe", agent, apply(None), [r])
    os.close(w)
    fd = sealed(fix)
    try:
        os.pwrite(fd, b"altered", 0)
        altered = True
    except PermissionError:
        altered = False
    os.close(fd)
    attack("sealed memory that is written after the check", not altered, "the kernel refuses")
    fd = os.memfd_create("patch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    fcntl.fcntl(fd, F_ADD_SEALS, WRITE | SHRINK | GROW | SEAL)
    tries("a patch of 1 TiB", agent, apply(None), [fd])
    tries("an empty patch", agent, apply(None), [sealed(b"")])
    tries("a patch for another build", agent, apply(None), [sealed(foreign)])
    for share in (0.02, 0.5, 0.999):
        tries(f"{share:.1%} of a patch", agent, apply(None), [sealed(fix[:int(len(fix) * share)])])
    wrong = 0
    step = max(len(fix) // 150, 1)
    for at in range(0, len(fix), step):
        changed = bytearray(fix)
        changed[at] ^= 1 << (at % 8)
        wrong += not was_refused(request(agent, apply(None), [sealed(bytes(changed))]))
    attack(f"a bit turned, in each of {len(range(0, len(fix), step))} places", wrong == 0, f"{wrong} taken")

    tries("with keys: no signature", keyed, apply(None), [sealed(fix)])
    tries("with keys: a word of the sender that it is signed", keyed, apply(None, signed={"key": "x", "comment": "", "revision": 9}), [sealed(fix)])
    tries("with keys: a signature that is none", keyed, apply("trust me"), [sealed(fix)])
    tries("with keys: another patch's signature", keyed, apply(read("older.so.minisig").decode()), [sealed(fix)])
    tries("with keys: an altered patch", keyed, apply(signature), [sealed(fix[:-1] + bytes([fix[-1] ^ 1]))])
    tries("with keys: a patch that was cut off", keyed, apply(signature), [sealed(fix[:-100])])
    lines = signature.splitlines()
    lines[2] = lines[2].replace("7", "8") if "7" in lines[2] else lines[2] + " 8"
    tries("with keys: an altered comment", keyed, apply("\n".join(lines) + "\n"), [sealed(fix)])
    shutil.copy(f"{work}/fix.so", f"{work}/theirs.so")
    subprocess.run([patch_builder, "sign", f"{work}/theirs.so", "--key", f"{work}/stranger.key", "--no-password", "--revision", "9"],
                   check=True, capture_output=True)
    tries("with keys: a stranger's signature", keyed, apply(read("theirs.so.minisig").decode()), [sealed(fix)])
    answer = request(keyed, apply(signature), [sealed(fix)])
    good = answer is not None and "reports" in answer
    again = keyed.command("revert")
    if not good or again.returncode:
        attack("with keys: what is signed must be taken", False, said(answer) + again.stderr)
    tries("with keys: an older patch again", keyed, apply(read("older.so.minisig").decode()), [sealed(read("older.so"))])


def dead_agents():
    agent = Agent("dead")
    pid = agent.p.pid
    agent.p.kill()
    agent.p.wait()
    ran = subprocess.run([livepatch, "apply", str(pid), f"{work}/fix.so"], capture_output=True, text=True)
    attack("a command to an agent that has died", ran.returncode == 6, ran.stderr)
    try:
        s = connect(agent)
        s.close()
        attack("its socket", False, "somebody listens")
    except ConnectionRefusedError as e:
        attack("its socket", True, e.strerror)
    agent = Agent("dead")
    attack("a dead agent's socket in the place of the next one's", True, "it was replaced")
    agent.p.kill()


def healthy(name, agent, before):
    sign = []
    for wanted, words in (("2", ["apply", f"{work}/fix.so", *sign]), ("1", ["revert"])):
        ran = agent.command(*words, "--json")
        if ran.returncode or '"by":"agent"' not in ran.stdout.replace(" ", "") or agent.version() != wanted:
            return f"{name}: {words[0]} exit {ran.returncode}, version {agent.version()} {ran.stderr} {ran.stdout}"
    after = agent.state()
    print(f"{name}: descriptors {before[0]} then {after[0]}, threads {before[1]} then {after[1]}, resident {before[2]} then {after[2]} KiB")
    if after[0] != before[0] or after[1] != before[1] or after[2] > before[2] + 4096:
        return f"{name} is not as before: {before} {after}"
    return None


agents = {"agent": Agent("plain"), "agent with keys": Agent("keyed", f"{work}/desk.pub")}
troubles = []
try:
    before = {}
    for name, agent in agents.items():
        trouble = [agent.command(*w) for w in (["apply", f"{work}/fix.so"], ["revert"])]
        if any(ran.returncode for ran in trouble):
            raise RuntimeError(f"{name} does not work at all: {trouble}")
        before[name] = agent.state()
    plain, keyed = agents.values()
    other_users(plain)
    paths(plain)
    frames(plain)
    patches(plain, keyed)
    dead_agents()
    print()
    troubles = [t for t in (healthy(n, a, before[n]) for n, a in agents.items()) if t]
finally:
    for agent in agents.values():
        agent.p.kill()
    shutil.rmtree(folder)
for trouble in troubles:
    print(trouble)
print(f"{results.count(True)} of {len(results)} attacks refused, {'the agents are as before' if not troubles else 'AN AGENT IS NOT AS BEFORE'}")
sys.exit(0 if all(results) and not troubles else 1)
