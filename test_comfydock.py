#!/usr/bin/env python3
"""Tests of comfydock: `python3 test_comfydock.py [--units] [--long] [NAME...]`.

In the order of the module's rooms; then the house itself; then the journeys, which start real processes through a real
`python3 comfydock.py`. Nothing but loopback is used, and nothing is left running.
"""

import ast
import contextlib
import gc
import http.client
import io
import json
import ntpath
import os
import posixpath
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import uuid
import warnings
from pathlib import Path

import comfydock as dock

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "comfydock.py")
WINDOWS = os.name == "nt"
LINUX = sys.platform.startswith("linux")

# ======================================================================================================================
# Props
# ======================================================================================================================


def eventually(question, seconds=20.0, pause=0.02):
    """The first true answer to `question()`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come true within {seconds} s: {question}")
        time.sleep(pause)


def free_port():
    """A port that nobody has, below the range from which the system gives ports to clients."""
    while True:
        port = random.randrange(20000, 30000)
        if not dock.is_port_bound(port):
            return port


def temporary_folder(test):
    """A folder of its own for a test, with its links resolved."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="comfydock test "))
    test.addCleanup(shutil.rmtree, folder, ignore_errors=True)
    return folder


def alive(pid):
    """Whether a PID is a process that is not dead."""
    row = dock.process_table().row(pid)
    return row is not None and row.state != "zombie"


def http_status(port, path="/system_stats"):
    """The status of one GET on loopback, None when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def post(port, path, body):
    """POST JSON on loopback; returns (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Person:
    """Somebody with an empty home who types commands; `test` cleans up whatever is left running at the end."""

    def __init__(self, test, **variables):
        self.home = temporary_folder(test)
        self.workspace = os.path.join(self.home, ".comfydock")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("COMFYDOCK_", "PYTHON"))}
        forced = {
            key: os.environ[key] for key in ("COMFYDOCK_PROCESS_TABLE", "COVERAGE_PROCESS_START") if key in os.environ
        }
        self.variables = {**kept, **forced, "HOME": self.home, "USERPROFILE": self.home, "PYTHONUTF8": "1", **variables}
        self.variables.pop("CONDA_PREFIX", None)
        self.children = []
        test.addCleanup(self.clean_up)

    def command(self, *words):
        return [sys.executable, MODULE, *words]

    def types(self, *words, cwd=None, seconds=60, stdin=subprocess.DEVNULL, **variables):
        """Run one command to its end; returns the CompletedProcess with text."""
        return subprocess.run(
            self.command(*words),
            cwd=cwd or self.home,
            env={**self.variables, **variables},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=seconds,
            encoding="utf-8",
            errors="replace",
        )

    def starts(self, *words, cwd=None, **variables):
        """Start a command and go on; returns its Popen, whose output goes to a file `.said`."""
        said = tempfile.NamedTemporaryFile(dir=self.home, prefix="said-", delete=False)
        with said:
            child = subprocess.Popen(
                self.command(*words),
                cwd=cwd or self.home,
                env={**self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        child.said = said.name
        self.children.append(child)
        return child

    def status(self, *words):
        """The data of `status --json`."""
        return json.loads(self.types(*words, "status", "--json").stdout)["data"]

    def state(self, name="demo"):
        """The state file as it stands, None when there is none."""
        try:
            with open(self.state_file(name), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def state_file(self, name="demo"):
        return os.path.join(self.workspace, "environments", name, ".cec", ".comfyui.state")

    def log(self, name="demo"):
        """The whole log."""
        with open(
            os.path.join(self.workspace, "logs", name, "comfyui.log"), encoding="utf-8", errors="replace"
        ) as file:
            return file.read()

    def checkout(self, name="ComfyUI", parent="code"):
        """A folder that looks like a ComfyUI checkout with a venv, made of the demo."""
        folder = os.path.join(self.home, parent, name)
        os.makedirs(os.path.join(folder, "custom_nodes"))
        for file, text in (("main.py", dock.demo_source()), ("nodes.py", ""), ("folder_paths.py", "")):
            Path(folder, file).write_text(text, encoding="utf-8")
        python = dock.venv_python(os.path.join(folder, ".venv"))
        os.makedirs(os.path.dirname(python))
        if not WINDOWS:
            os.symlink(sys.executable, python)
            Path(folder, ".venv", "pyvenv.cfg").write_text(
                f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n", encoding="utf-8"
            )
        return folder

    def environment(self, name):
        """An adopted environment of that name, with a checkout of its own."""
        made = self.types("create", name, "--from", self.checkout(parent=name), "--python", sys.executable)
        assert made.returncode == 0, made.stderr
        return name

    def processes(self):
        """Every process that has this home in its command line: ours alone."""
        rows = dock.process_table().rows(containing=self.home)
        return [row for row in rows if row.pid != os.getpid() and row.state != "zombie"]

    def clean_up(self):
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for _ in range(100):
            rows = self.processes()
            if not rows:
                return
            for row in rows:
                with contextlib.suppress(OSError):
                    dock.signal_process(row.pid, "kill")
                    dock.signal_process(row.pid, "continue")
                dock.wait_for_exit(row, 5)


def read_until(child, text, seconds=20):
    """Wait until the file a command writes to shows `text`; returns all it shows."""

    def shown():
        with open(child.said, encoding="utf-8", errors="replace") as file:
            content = file.read()
        return content if text in content else None

    return eventually(shown, seconds)


@contextlib.contextmanager
def listening(port=0, answer=None):
    """A TCP server on loopback that accepts; `answer(connection)` serves each connection in a thread."""
    server = socket.create_server(("127.0.0.1", port))
    stopping = threading.Event()

    def serve():
        server.settimeout(0.05)
        while not stopping.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                continue
            with connection:
                if answer:
                    with contextlib.suppress(OSError):
                        answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        stopping.set()
        thread.join()
        server.close()


def has(program):
    return shutil.which(program) is not None


# ======================================================================================================================
# 1. Words
# ======================================================================================================================

PLANS_STATE = {
    "pid": 12345,
    "host": "0.0.0.0",
    "port": 8188,
    "args": ["--listen"],
    "started_at": "2026-01-02T03:04:05",
    "log_path": "/tmp/comfyui.log",
    "health": {"last_check": None, "status": None},
}


class ArgumentsAreReadAsComfyUIReadsThem(unittest.TestCase):
    def test_host_port_and_tls_of_many_spellings(self):
        wildcard = "0.0.0.0,::"
        cases = [
            ([], ("127.0.0.1", 8188, False)),
            (["--port", "9"], ("127.0.0.1", 9, False)),
            (["--port=9"], ("127.0.0.1", 9, False)),
            (["--por", "9"], ("127.0.0.1", 9, False)),
            (["--po=9"], ("127.0.0.1", 9, False)),
            (["--port", "1", "--port", "2"], ("127.0.0.1", 2, False)),
            (["--port", "08188"], ("127.0.0.1", 8188, False)),
            (["--port", "+9"], ("127.0.0.1", 9, False)),
            (["--listen"], (wildcard, 8188, False)),
            (["--lis", "1.2.3.4"], ("1.2.3.4", 8188, False)),
            (["--listen", "127.0.0.1", "--listen"], (wildcard, 8188, False)),
            (["--listen", "--port", "9"], (wildcard, 9, False)),
            (["--listen="], ("", 8188, False)),
            (["--listen", "a,b"], ("a,b", 8188, False)),
            (["--tls-keyfile", "k", "--tls-certfile", "c"], ("127.0.0.1", 8188, True)),
            (["--tls-k=k", "--tls-c=c"], ("127.0.0.1", 8188, True)),
            (["--tls-keyfile", "k"], ("127.0.0.1", 8188, False)),
            (["--preview-method", "auto", "--cpu", "--portable"], ("127.0.0.1", 8188, False)),
        ]
        for args, wanted in cases:
            with self.subTest(args=args):
                config = dock.parse_comfyui_args(args)
                self.assertEqual((config.host, config.port, config.tls), wanted)

    def test_a_port_that_cannot_be_bound_is_refused(self):
        for args in (
            ["--port", "0"],
            ["--port", "70000"],
            ["--port", "abc"],
            ["--port", "-1"],
            ["--port=-1"],
            ["--port"],
        ):
            with self.subTest(args=args), self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.parse_comfyui_args(args)
            self.assertEqual(caught.exception.code, "usage")

    def test_with_port_replaces_every_port(self):
        self.assertEqual(dock.with_port(["--port", "1", "--cpu", "--po=2"], 3), ["--cpu", "--port", "3"])

    def test_local_urls(self):
        cases = [
            ("0.0.0.0,::", False, "http://127.0.0.1:8188"),
            ("::", False, "http://[::1]:8188"),
            ("", False, "http://127.0.0.1:8188"),
            ("192.168.1.5,127.0.0.1", False, "http://192.168.1.5:8188"),
            ("fe80::1", True, "https://[fe80::1]:8188"),
            ("localhost", True, "https://localhost:8188"),
        ]
        for host, tls, url in cases:
            with self.subTest(host=host):
                self.assertEqual(dock.local_url(dock.ComfyUIConfig(host, 8188, tls)), url)

    def test_what_is_loopback(self):
        for host in ("127.0.0.1", "localhost", "::1", "127.0.0.1,::1", "127.1.2.3"):
            self.assertTrue(dock.is_loopback(host), host)
        for host in ("0.0.0.0,::", "", "::", "192.168.1.5", "127.0.0.1,192.168.1.5"):
            self.assertFalse(dock.is_loopback(host), host)


class TheRecordIsTrustedOnlyWhenItIsOne(unittest.TestCase):
    def test_a_file_with_the_keys_of_the_plan_alone_loads(self):
        state = dock.ProcessState.from_dict(PLANS_STATE)
        self.assertEqual((state.pid, state.port, state.identity), (12345, 8188, {}))

    def test_to_dict_begins_with_the_keys_of_the_plan_and_keeps_unknown_ones(self):
        state = dock.ProcessState.from_dict({**PLANS_STATE, "later": 1, "run_id": "x"})
        data = state.to_dict()
        self.assertEqual(data["later"], 1)
        self.assertEqual(data["health"], {"last_check": None, "status": None})
        self.assertEqual(dock.ProcessState.from_dict(json.loads(json.dumps(data))), state)

    def test_damaged_records_are_refused(self):
        damages = [
            {"pid": -1}, {"pid": 0}, {"pid": 1}, {"pid": True}, {"pid": "7"}, {"pid": 7.0}, {"pid": None}, {"pid": 2**40},
            {"port": 0}, {"port": "8188"}, {"port": 70000}, {"args": "x"}, {"args": [1]}, {"host": None}, {"health": []},
            {"started_at": 5}, {"log_path": None}, {"identity": []}, {"env": {"A": 1}}, {"log_offset": -1},
            {"starter": {"identity": []}}, {"command": None}, {"monitor": 1}, {"run_id": 5},
        ]  # fmt: skip
        for damage in damages:
            with self.subTest(damage=damage), self.assertRaises((ValueError, TypeError)):
                dock.ProcessState.from_dict({**PLANS_STATE, **damage})
        for data in ([], None, "x", 5, {}):
            with self.subTest(data=data), self.assertRaises((ValueError, TypeError)):
                dock.ProcessState.from_dict(data)

    def test_an_intent_has_no_pid(self):
        self.assertIsNone(dock.ProcessState.from_dict({**PLANS_STATE, "pid": None, "phase": "starting"}).pid)

    def test_uptime_counts_from_aware_and_naive_times_and_is_never_negative(self):
        state = dock.ProcessState.from_dict(PLANS_STATE)
        for started, least in (
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 60)) + "+00:00", 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 60)) + "Z", 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 60)), 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 3600)) + "+00:00", 0),
        ):
            state.started_at = started
            self.assertTrue(least <= state.get_uptime().total_seconds() < 65, started)

    def test_utc_now_is_read_back_as_now(self):
        self.assertAlmostEqual(dock.epoch_of(dock.utc_now()), time.time(), delta=1)


class WordsForPeople(unittest.TestCase):
    def test_durations(self):
        cases = [(0, "0s"), (59.9, "59s"), (60, "1m"), (3600, "1h 0m"), (3900, "1h 5m"), (90000, "1d 1h"), (-5, "0s")]
        self.assertEqual([dock.duration_words(seconds) for seconds, _ in cases], [words for _, words in cases])

    def test_names_of_new_environments(self):
        for name in ("a", "prod", "my-env_2.0", "A" * 63, "9lives"):
            self.assertTrue(dock.is_new_name(name), name)
        for name in (
            "-a",
            ".a",
            "a/b",
            "..",
            "a b",
            "ü",
            "A" * 64,
            "logs",
            "Workspace",
            "CON",
            "nul.txt",
            "lpt1",
            "a.",
            "a\n",
        ):
            self.assertFalse(dock.is_new_name(name), name)

    def test_made_valid_always_gives_a_valid_name(self):
        for name in ("ComfyUI", "my folder", "..", "", "logs", "été", "x" * 200, "-_-", "a."):
            self.assertTrue(dock.is_new_name(dock.made_valid(name)), name)

    def test_the_line_that_says_why(self):
        cases = [
            (
                "a\nTraceback\n  File\nModuleNotFoundError: No module named 'PIL'\n\nbye\n",
                "ModuleNotFoundError: No module named 'PIL'",
            ),
            ("usage: x\nmain.py: error: unrecognized arguments: --x\n", "main.py: error: unrecognized arguments: --x"),
            ("torch.cuda.OutOfMemoryError: CUDA\nlast\n", "torch.cuda.OutOfMemoryError: CUDA"),
            ("0%\r50%\rdone\n", "done"),
            ("", None),
            (dock.session_header("id", "e"), None),
        ]
        for text, line in cases:
            with self.subTest(text=text):
                self.assertEqual(dock.last_error_line(text), line)


# ======================================================================================================================
# 2. Places
# ======================================================================================================================


class FindingTheWorkspace(unittest.TestCase):
    def setUp(self):
        self.home = temporary_folder(self)
        self.enterContext_(unittest.mock.patch.dict(os.environ, {"HOME": self.home, "USERPROFILE": self.home}))
        os.environ.pop("COMFYDOCK_HOME", None)

    def enterContext_(self, context):  # unittest has it from 3.11 on
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def test_the_default_is_in_the_home_folder(self):
        self.assertEqual(dock.default_workspace(), os.path.join(self.home, ".comfydock"))

    def test_the_variable_wins(self):
        os.environ["COMFYDOCK_HOME"] = os.path.join(self.home, "elsewhere")
        self.assertEqual(dock.default_workspace(), os.path.join(self.home, "elsewhere"))

    def test_an_older_workspace_is_taken_where_there_is_no_new_one(self):
        older = os.path.join(self.home, "comfydock")
        os.makedirs(os.path.join(older, ".metadata"))
        self.assertEqual(dock.default_workspace(), older)
        os.makedirs(os.path.join(self.home, ".comfydock", "environments"))
        self.assertEqual(dock.default_workspace(), os.path.join(self.home, ".comfydock"))

    def test_the_environment_above_a_folder(self):
        inside = os.path.join(self.home, "ws", "environments", "dev", "ComfyUI", "custom_nodes")
        os.makedirs(inside)
        self.assertIsNone(dock.environment_above(inside))
        os.makedirs(os.path.join(self.home, "ws", "environments", "dev", ".cec"))
        self.assertEqual(dock.environment_above(inside), (os.path.join(self.home, "ws"), "dev"))


# ======================================================================================================================
# Props: captured texts of Linux, macOS and Windows, side by side
# ======================================================================================================================

STAT = (
    b"4242 (a) b (c) (py thon) S 1 4242 4200 34816 4250 4194304 2170 0 0 0 12 3 0 0 20 0 1 0 476795 "
    b"12345 678 18446744073709551615 1 1 0 0 0 0 0 16781312 2 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
)

PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1FFC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 35151 1 0000000000000000 100
   1: 0100007F:1FFC 0100007F:A1B2 01 00000000:00000000 00:00000000 00000000     0        0 35999 1 0000000000000000 20
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0000000000000000 100
"""

PROC_NET_TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000000000000:1FFC 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 \
00000000  1000        0 35160 1 0000000000000000 100 0 0 10 0
"""

LINUX_PS = """\
      1       0     0 Ss   Mon Nov 23 06:18:00 2026 /sbin/init splash
      2       0     0 S    Mon Nov 23 06:18:00 2026 [kthreadd]
   4242       1  1000 Ssl  Mon Nov  2 06:40:11 2026 /opt/my env/bin/python3.11 -s /srv/Comfy UI/main.py --listen
   4243    4242  1000 Z    Mon Nov 23 06:40:12 2026 [python3] <defunct>
   4244    4242 65534 Tl   Mon Nov 23 06:40:12 2026 python3 main.py
"""

MACOS_PS = """\
    1     0     0 Ss   Wed Jul 29 15:37:10 2026     /sbin/launchd
  501     1   501 S    Wed Jul 29 15:38:01 2026     /Library/Frameworks/Python.framework/Versions/3.12/Resources/\
Python.app/Contents/MacOS/Python /Users/me/Comfy UI/main.py --port 8188
  502   501   501 Z    Wed Jul 29 15:38:02 2026     <defunct>
  503     1     0 S    Wed Jul 29 15:38:03 2026     (python3.12)
  504     1    -2 T    Wed Jul  1 05:08:03 2026     /usr/bin/python3 main.py
"""

TASKLIST = """\
"System Idle Process","0","Services","0","8 K"
"python.exe","288","Console","1","25,940 K"
"my, tool.exe","4012","Console","1","1.125.940 K"
"""
TASKLIST_NOTHING = "INFO: No tasks are running which match the specified criteria.\n"

NETSTAT_ENGLISH = """\

Active Connections

  Proto  Local Address          Foreign Address        State           PID
  TCP    0.0.0.0:135            0.0.0.0:0              LISTENING       888
  TCP    127.0.0.1:8188         0.0.0.0:0              LISTENING       4321
  TCP    127.0.0.1:8188         127.0.0.1:50112        ESTABLISHED     4321
  TCP    127.0.0.1:50112        127.0.0.1:8188         ESTABLISHED     777
  TCP    127.0.0.1:18188        0.0.0.0:0              LISTENING       999
  TCP    [::]:8188              [::]:0                 LISTENING       4322
  UDP    0.0.0.0:8188           *:*                                    555
"""
NETSTAT_GERMAN = """\
  Proto  Lokale Adresse         Remoteadresse          Status           PID
  TCP    127.0.0.1:8188         0.0.0.0:0              ABHÖREN         4321
  TCP    [::1]:8188             [::]:0                 ABHÖREN         4322
  TCP    127.0.0.1:8188         127.0.0.1:50112        HERGESTELLT     1
"""

LSOF_PIDS = "p501\nf7\np733\nf3\nf4\n"
LSOF_CWD = "p501\nfcwd\nn/Users/me/Comfy UI\n"

PS_MARKERS = """\
  501 /usr/bin/python3 /srv/main.py --listen HOME=/Users/me COMFYDOCK_RUN_ID=ab-12 LANG=C
  502 COMFYDOCK_RUN_ID=cd-34
  503 /usr/bin/vim NOT_COMFYDOCK_RUN_ID=x
garbage
"""

WINDOWS_COMMANDS = (
    ("", []),
    ("python main.py", ["python", "main.py"]),
    (
        r'"C:\Program Files\Python\python.exe"  -s   "D:\Comfy UI\main.py"',
        [r"C:\Program Files\Python\python.exe", "-s", r"D:\Comfy UI\main.py"],
    ),
    (r'C:\py\python.exe a\\b "c\\" d', ["C:\\py\\python.exe", "a\\\\b", "c\\", "d"]),
    (r'x a\"b "c \"d\" e" \\\"f', ["x", 'a"b', 'c "d" e', '\\"f']),
    ('x "" "a""b" c"d e"f', ["x", "", 'a"b', "cd ef"]),
    ('x "unclosed word', ["x", "unclosed word"]),
    ("x\ta\t b ", ["x", "a", "b"]),
    (r'"C:\ends with slash\" arg', ["C:\\ends with slash\\", "arg"]),
)

# ======================================================================================================================
# Props: processes that do as told
# ======================================================================================================================

READY_AND_WAIT = """\
import sys, time
print("ready", flush=True)
try:
    while True:
        time.sleep(0.02)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(7)
"""


def read(path):
    """Return a file's text, "" where it is not there yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


class Stage(unittest.TestCase):
    """A folder, and real processes that are gone afterwards."""

    def setUp(self):
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="stage é "))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.script = os.path.join(self.folder, "main.py")
        self.log = os.path.join(self.folder, "log.txt")

    def write(self, code, name="main.py"):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(code)
        return path

    def end(self, process):
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()

    def end_pid(self, pid):
        with contextlib.suppress(OSError):
            dock.signal_process(pid, "kill")
        eventually(lambda: dock.reap(pid) is not None or not dock.is_process_alive(pid))

    def start(self, code=READY_AND_WAIT, arguments=(), env=None, command=None):
        """Start main.py with `code` in the background and return it when it has said that it is ready."""
        self.write(code)
        before = read(self.log).count("ready")
        with dock.open_append(self.log) as log:
            environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}
            command = command or [sys.executable, self.script, *arguments]
            process = dock.create_background_process(command, self.folder, log, environment)
        self.addCleanup(self.end, process)
        self.assertTrue(eventually(lambda: read(self.log).count("ready") > before), read(self.log))
        return process

    def said(self, word):
        """Return the numbers that the started processes wrote behind `word`, when there are any."""
        lines = eventually(lambda: [one.split() for one in read(self.log).splitlines() if one.startswith(word + " ")])
        self.assertTrue(lines, f"nothing was said of {word}: {read(self.log)}")
        return [int(line[1]) for line in lines]


# ======================================================================================================================
# 3. The machine
# ======================================================================================================================


class RunningACommand(Stage):
    def python(self, code, **options):
        return dock.run_command([sys.executable, "-c", code], **options)

    def test_both_outputs_and_the_code_come_back_as_text(self):
        code = "import sys; sys.stdout.buffer.write(b'a\\xffb\\n'); print('no', file=sys.stderr); sys.exit(3)"
        done = self.python(code)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (3, "a\ufffdb\n", "no\n"))

    def test_progress_is_told_line_by_line_while_it_runs_and_kept(self):
        code = "import os,sys\nprint('one', flush=True)\nwhile not os.path.exists(sys.argv[1]): pass\nprint('two')"
        told, flag = [], os.path.join(self.folder, "flag")

        def tell(line):
            told.append((line, threading.current_thread() is threading.main_thread()))
            with open(flag, "w"):
                pass

        done = dock.run_command([sys.executable, "-c", code, flag], timeout=30, tell=tell)
        self.assertEqual(told, [("one", True), ("two", True)])
        self.assertEqual(done.stdout, "one\ntwo\n")

    def test_stdin_is_empty_and_the_folder_and_environment_are_the_given_ones(self):
        done = self.python(
            "import os,sys; print(repr(sys.stdin.read()), os.environ['X'], os.path.exists('here'))",
            cwd=self.folder,
            env={**os.environ, "X": "y"},
        )
        self.assertEqual(done.stdout, "'' y False\n")

    def test_a_missing_program_or_folder_is_named(self):
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            dock.run_command(["no-such-program-here"])
        self.assertEqual(str(caught.exception), "no-such-program-here was not found")
        self.assertEqual(caught.exception.code, "missing")
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            self.python("", cwd=os.path.join(self.folder, "nowhere"))
        self.assertEqual(caught.exception.code, "missing")
        self.assertIn("nowhere", str(caught.exception))

    def test_when_the_time_is_up_its_children_are_ended_too(self):
        self.write(
            f"import subprocess,sys,time\n"
            f"p=subprocess.Popen([sys.executable,'-c','import time;time.sleep(600)'])\n"
            f"open({self.log!r},'w').write(f'child {{p.pid}}\\n')\ntime.sleep(600)"
        )
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            dock.run_command([sys.executable, self.script], timeout=2)
        self.assertEqual(caught.exception.code, "timeout")
        child = self.said("child")[0]
        self.assertTrue(eventually(lambda: not dock.is_process_alive(child)))

    def test_a_daemon_that_holds_the_pipe_open_does_not_hold_us(self):
        code = (
            "import subprocess,sys; p=subprocess.Popen([sys.executable,'-c','import time;time.sleep(600)']);"
            "print('child', p.pid)"
        )
        begun = time.monotonic()
        done = self.python(code, timeout=60)
        self.addCleanup(self.end_pid, int(done.stdout.split()[1]))
        self.assertLess(time.monotonic() - begun, 15)
        self.assertEqual(done.returncode, 0)


class StartingInTheBackground(Stage):
    def test_stdin_is_empty_and_output_is_appended(self):
        with open(self.log, "w") as log:
            log.write("before\n")
        process = self.start(
            "import sys; print(repr(sys.stdin.read()), 'ready', flush=True)\nprint('err', file=sys.stderr)"
        )
        process.wait()
        self.assertEqual(read(self.log), "before\n'' ready\nerr\n")

    @unittest.skipIf(WINDOWS, "POSIX sessions")
    def test_it_leads_a_session_of_its_own(self):
        process = self.start()
        self.assertEqual(os.getsid(process.pid), process.pid)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd") and not WINDOWS, "needs /proc/self/fd")
    def test_no_descriptor_is_inherited_even_an_inheritable_one(self):
        reader, writer = os.pipe()
        for fd in (reader, writer):
            self.addCleanup(os.close, fd)
            os.set_inheritable(fd, True)
        self.start(
            "import os; fds = '/proc/self/fd/'\n"
            "print([int(fd) for fd in os.listdir(fds) if os.path.exists(fds + fd)], 'ready', flush=True)"
        ).wait()
        self.assertEqual(read(self.log), "[0, 1, 2] ready\n")

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_it_hears_the_interrupt_even_where_we_ignore_and_block_it(self):
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
        try:
            self.start(
                "import signal as s; print(s.getsignal(s.SIGINT) is s.default_int_handler,"
                "s.getsignal(s.SIGTERM) is s.SIG_DFL, s.pthread_sigmask(s.SIG_BLOCK, []), 'ready', flush=True)"
            )
            ours = [signal.getsignal(number) for number in before], signal.pthread_sigmask(signal.SIG_BLOCK, [])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)
        self.assertEqual(read(self.log), "True True set() ready\n")
        self.assertEqual(ours[0], [signal.SIG_IGN, signal.SIG_IGN])
        self.assertEqual(ours[1], {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_off_the_main_thread_we_know_when_the_interrupt_will_not_be_heard(self):
        answers = []
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            thread = threading.Thread(target=lambda: answers.append(dock.passes_interrupt_on()))
            thread.start()
            thread.join()
            answers.append(dock.passes_interrupt_on())
        finally:
            signal.signal(signal.SIGINT, before)
        self.assertEqual(answers, [False, True])

    def test_a_missing_program_is_named(self):
        with open(self.log, "wb") as log, self.assertRaises(dock.CDEnvironmentError) as caught:
            dock.create_background_process([os.path.join(self.folder, "nopython")], self.folder, log)
        self.assertEqual(caught.exception.code, "missing")
        self.assertIn("nopython", str(caught.exception))

    def test_a_released_process_is_let_go_without_a_warning(self):
        self.write(READY_AND_WAIT)
        with dock.open_append(self.log) as log, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            process = dock.create_background_process([sys.executable, self.script], self.folder, log)
            pid = process.pid
            dock.release(process)
            self.assertIsNone(process.poll())
            del process
            gc.collect()
        self.addCleanup(self.end_pid, pid)
        self.assertEqual([str(one.message) for one in seen], [])
        self.assertTrue(dock.is_process_alive(pid))

    @unittest.skipUnless(WINDOWS, "Windows consoles")
    def test_it_has_a_console_that_can_be_interrupted_and_no_new_group(self):
        process = self.start()
        self.assertTrue(dock.console_interrupt(process.pid))
        self.assertEqual(process.wait(20), 7)
        self.assertIn("interrupted", read(self.log))


class HandlesAndLocks(Stage):
    def test_two_appenders_and_a_truncation_lose_and_overwrite_nothing(self):
        with dock.open_append(self.log) as one, dock.open_append(self.log) as other:
            one.write(b"1\n")
            other.write(b"2\n")
            one.write(b"3\n")
            self.assertEqual(read(self.log), "1\n2\n3\n")
            os.truncate(self.log, 0)
            other.write(b"4\n")
            self.assertEqual(read(self.log), "4\n")

    def test_the_handle_is_not_inherited_and_the_file_is_private(self):
        with dock.open_append(self.log) as log:
            self.assertFalse(os.get_inheritable(log.fileno()))
            if not WINDOWS:
                self.assertEqual(os.stat(self.log).st_mode & 0o777, 0o600)

    def test_a_link_is_refused(self):
        try:
            os.symlink(self.write("", "target"), self.log)
        except (OSError, NotImplementedError):
            self.skipTest("no symbolic links here")
        if not os.path.islink(self.log):
            self.skipTest("no symbolic links here")
        with self.assertRaises(OSError):
            dock.open_append(self.log)

    def test_a_lock_excludes_others_leaves_the_text_readable_and_falls_with_its_holder(self):
        lock = self.write("held by 1\n", "lock")
        holder = self.start(
            f"import os,sys,time; sys.path.insert(0, {HERE!r}); import comfydock\n"
            f"fd = os.open({lock!r}, os.O_RDWR)\nprint(comfydock.lock_handle(fd), 'ready', flush=True)\n"
            f"time.sleep(600)"
        )
        self.assertEqual(read(self.log), "True ready\n")
        fd = os.open(lock, os.O_RDWR)
        self.addCleanup(os.close, fd)
        self.assertFalse(dock.lock_handle(fd))
        self.assertEqual(read(lock), "held by 1\n")
        holder.kill()
        holder.wait()
        self.assertTrue(eventually(lambda: dock.lock_handle(fd)))

    def test_a_venv_keeps_its_python_in_its_own_place(self):
        expected = os.path.join("v", "Scripts", "python.exe") if WINDOWS else os.path.join("v", "bin", "python")
        self.assertEqual(dock.venv_python("v"), expected)


class Signalling(Stage):
    def test_the_interrupt_is_a_keyboard_interrupt(self):
        process = self.start()
        dock.signal_process(process.pid, "interrupt")
        self.assertEqual(process.wait(20), 7)

    def test_a_paused_process_stands_still_until_it_is_continued(self):
        process = self.start(
            "import time\nprint('ready', flush=True)\nwhile True: print('tick', flush=True); time.sleep(0.01)"
        )
        dock.signal_process(process.pid, "pause")
        if not WINDOWS:
            self.assertTrue(eventually(lambda: dock.process_table().row(process.pid).state == "stopped"))
        size = os.path.getsize(self.log)
        with self.assertRaises(AssertionError):
            eventually(lambda: os.path.getsize(self.log) != size, 0.3)
        dock.signal_process(process.pid, "continue")
        self.assertTrue(eventually(lambda: os.path.getsize(self.log) != size))

    def test_terminate_and_kill_end_it_and_reap_tells_the_code_once_it_has(self):
        for how, code in (("terminate", 1 if WINDOWS else -15), ("kill", 1 if WINDOWS else -9)):
            with self.subTest(how=how):
                process = self.start()
                self.assertIsNone(dock.reap(process.pid))
                dock.signal_process(process.pid, how)
                self.assertEqual(eventually(lambda process=process: dock.reap(process.pid)), code)

    def test_what_is_no_pid_of_ours_is_never_signalled(self):
        for pid in (True, False, 0, 1, -1, -4242, 2**31, 2**40, "7", None, 7.0):
            with self.subTest(pid=pid), self.assertRaises(ProcessLookupError):
                dock.signal_process(pid, "kill")

    def test_a_dead_process_raises_process_lookup_error(self):
        process = self.start()
        self.end(process)
        pid = 99996 if WINDOWS else process.pid  # Windows keeps an ended process while somebody holds it open
        for how in ("interrupt", "terminate", "pause", "continue"):
            with self.subTest(how=how), self.assertRaises(ProcessLookupError):
                dock.signal_process(pid, how)

    def test_reap_knows_nothing_of_strangers(self):
        for pid in (os.getpid(), 0, -1, True):
            with self.subTest(pid=pid):
                self.assertIsNone(dock.reap(pid))

    def test_waiting_on_a_handle_tells_life_from_death(self):
        process = self.start()
        if dock.wait_handle(process.pid, 0) is None:
            self.skipTest("no pidfd here")
        self.assertIs(dock.wait_handle(process.pid, 0.01), False)
        process.kill()
        self.assertIs(dock.wait_handle(process.pid, 20), True)

    @unittest.skipUnless(WINDOWS, "Windows tells the facts of a process")
    def test_a_process_tells_its_command_folder_environment_and_birth(self):
        begun = time.time()
        process = self.start(arguments=("--x y", 'a"b\\'), env={"COMFYDOCK_RUN_ID": "r-1", "LONG": "z" * 20000})
        facts = dock.process_facts(process.pid)
        self.assertEqual(
            dock.split_windows_command(facts.command_line), [sys.executable, self.script, "--x y", 'a"b\\']
        )
        self.assertTrue(dock.same_path(facts.cwd, self.folder), facts.cwd)
        self.assertEqual((facts.environment["COMFYDOCK_RUN_ID"], len(facts.environment["LONG"])), ("r-1", 20000))
        self.assertEqual((facts.ppid, facts.alive), (os.getpid(), True))
        self.assertLess(abs(facts.created - begun), 5)
        process.kill()
        process.wait()
        facts = dock.process_facts(process.pid)
        self.assertTrue(facts is None or not facts.alive)

    def test_the_machine_has_a_name_that_stays(self):
        self.assertTrue(dock.machine_id())
        code = (
            f"import sys; sys.path.insert(0, {HERE!r}); import comfydock as m;"
            f"print(m.machine_id(), m.boot_id(), m.pid_namespace())"
        )
        said = dock.run_command([sys.executable, "-c", code]).stdout.strip()
        self.assertEqual(said, f"{dock.machine_id()} {dock.boot_id()} {dock.pid_namespace()}")


# ======================================================================================================================
# 4. The process table
# ======================================================================================================================


class ReadingCapturedTexts(unittest.TestCase):
    def test_a_name_with_spaces_and_parentheses_does_not_shift_the_fields_of_stat(self):
        row = dock.parse_stat(STAT, boot=1000.0, ticks=100)
        self.assertEqual((row.pid, row.ppid, row.session, row.state), (4242, 1, 4200, "running"))
        self.assertEqual((row.start_ticks, row.created, row.command), (476795, 5767.95, ["a) b (c) (py thon"]))
        for letter, state in (b"ZXx", "zombie"), (b"T", "stopped"), (b"DRt", "running"):
            for one in letter.decode():
                with self.subTest(letter=one):
                    changed = STAT.replace(b") S ", f") {one} ".encode())
                    self.assertEqual(dock.parse_stat(changed, 0, 100).state, state)
        for broken in (b"", b"12 (x", b"12 (x) S 1"):
            self.assertIsNone(dock.parse_stat(broken, 0, 100))

    def test_listeners_are_found_in_both_tcp_files(self):
        self.assertEqual(dock.parse_proc_net(PROC_NET_TCP, 8188), {35151})
        self.assertEqual(dock.parse_proc_net(PROC_NET_TCP, 22), {111})
        self.assertEqual(dock.parse_proc_net(PROC_NET_TCP6, 8188), {35160})
        self.assertEqual(dock.parse_proc_net("", 8188), set())

    @unittest.mock.patch.object(dock, "PATH_RULES", posixpath)
    def test_ps_of_linux_is_read(self):
        init, thread, comfy, dead, stopped = dock.parse_ps(LINUX_PS)
        self.assertEqual((comfy.pid, comfy.ppid, comfy.uid, comfy.state), (4242, 1, 1000, "running"))
        self.assertEqual(comfy.text, "/opt/my env/bin/python3.11 -s /srv/Comfy UI/main.py --listen")
        self.assertEqual(comfy.name, "python3.11")
        self.assertEqual(comfy.created, 1793601611.0)
        self.assertEqual((init.name, thread.name), ("init", "[kthreadd]"))
        self.assertEqual((dead.state, stopped.state), ("zombie", "stopped"))
        self.assertTrue(comfy.runs("/srv/Comfy UI/main.py", lambda pid: None))

    @unittest.mock.patch.object(dock, "PATH_RULES", posixpath)
    def test_ps_of_macos_is_read_with_its_padded_dates(self):
        _, comfy, dead, closed, stopped = dock.parse_ps(MACOS_PS)
        self.assertEqual((comfy.pid, comfy.name, comfy.created), (501, "Python", 1785339481.0))
        self.assertTrue(comfy.runs("/Users/me/Comfy UI/main.py", lambda pid: None))
        self.assertFalse(comfy.runs("/Users/me/main.py", lambda pid: None))
        self.assertEqual((dead.state, dead.command), ("zombie", ["<defunct>"]))
        self.assertEqual((closed.command, closed.name), (["python3.12"], "python3.12"))
        self.assertEqual((stopped.uid, stopped.state, stopped.created), (-2, "stopped", 1782882483.0))

    def test_a_date_in_another_language_is_no_date_and_no_error(self):
        for text in ("Mi. 29 Juli 15:37:10 2026", "Tue 15 Sep 23:54:57 2026", "", "Wed Jul 29 25:00:00 2026"):
            with self.subTest(text=text):
                self.assertIsNone(dock.parse_ps_date(text))

    def test_tasklist_is_read_with_commas_and_any_thousands_sign_and_without_rows(self):
        self.assertEqual(
            dock.parse_tasklist(TASKLIST), [(0, "System Idle Process"), (288, "python.exe"), (4012, "my, tool.exe")]
        )
        for nothing in (TASKLIST_NOTHING, "", "\r\n"):
            self.assertEqual(dock.parse_tasklist(nothing), [])
        self.assertEqual(dock.parse_tasklist(TASKLIST.replace("\n", "\r\n"))[1], (288, "python.exe"))

    def test_netstat_is_read_in_any_language(self):
        self.assertEqual(dock.parse_netstat(NETSTAT_ENGLISH, 8188), [4321, 4322])
        self.assertEqual(dock.parse_netstat(NETSTAT_GERMAN, 8188), [4321, 4322])
        self.assertEqual(dock.parse_netstat(NETSTAT_ENGLISH, 188), [])

    def test_lsof_is_read(self):
        self.assertEqual(dock.parse_lsof(LSOF_PIDS, "p"), ["501", "733"])
        self.assertEqual(dock.parse_lsof(LSOF_CWD, "n"), ["/Users/me/Comfy UI"])

    def test_markers_are_found_behind_commands(self):
        self.assertEqual(dock.parse_markers(PS_MARKERS), {501: "ab-12", 502: "cd-34"})

    def test_windows_command_lines_are_split_as_the_c_runtime_does(self):
        for line, words in WINDOWS_COMMANDS:
            with self.subTest(line=line):
                self.assertEqual(dock.split_windows_command(line), words)

    def test_what_python_quotes_for_windows_is_split_into_the_same_words(self):
        for words in (
            ["x", ""],
            ["x y", "a b", 'q"', "\\", "\\\\", '\\"', "end\\", "a\\\\b c\\"],
            ["p", "\t", 'a"b c"d'],
        ):
            with self.subTest(words=words):
                self.assertEqual(dock.split_windows_command(subprocess.list2cmdline(words)), words)


class WhoRunsTheScript(Stage):
    def runs(self, command, joined=False, cwd="/x", script="/x/main.py"):
        row = dock.ProcessRow(99, command=command.split(" ") if joined else command, joined=joined)
        return row.runs(script, lambda pid: cwd)

    CASES = (
        (["python", "/x/main.py"], True),
        (["/usr/bin/python3.11", "-s", "-u", "/x/main.py", "--listen"], True),
        (["python3", "-X", "utf8", "-W", "ignore", "/x/main.py"], True),
        (["python3", "-suXutf8", "-bX", "dev", "/x/main.py"], True),
        (["python3", "--check-hash-based-pycs", "always", "/x/main.py"], True),
        (["Python", "main.py"], True),
        (["python3.13t", "./main.py"], True),
        (["pypy3.10", "../x/main.py"], True),
        (["pythonw.exe", "/x/./main.py"], True),
        (["vim", "main.py"], False),
        (["vim", "/usr/bin/python", "/x/main.py"], False),
        (["tail", "-f", "/x/main.py"], False),
        (["python", "other.py", "/x/main.py"], False),
        (["python", "/x/other/main.py"], False),
        (["python", "-c", "pass", "/x/main.py"], False),
        (["python", "-m", "pdb", "/x/main.py"], False),
        (["python", "-um", "pdb", "/x/main.py"], False),
        (["python", "-", "/x/main.py"], False),
        (["python-config", "/x/main.py"], False),
        (["pythonista", "/x/main.py"], False),
        (["python"], False),
        (["python", "-X"], False),
    )

    @unittest.mock.patch.object(dock, "PATH_RULES", posixpath)
    def test_only_a_python_whose_script_it_is_counts(self):
        for command, expected in self.CASES:
            for joined in (False, True):
                with self.subTest(command=command, joined=joined):
                    self.assertEqual(self.runs(" ".join(command) if joined else command, joined), expected)
        self.assertFalse(self.runs([]))

    @unittest.mock.patch.object(dock, "PATH_RULES", posixpath)
    def test_paths_with_spaces_are_found_in_joined_text(self):
        script = "/my models/Comfy  UI/main.py"
        self.assertTrue(self.runs(f"/my env/bin/python3 -s {script} --port 1", True, script=script))
        self.assertTrue(self.runs(f"/usr/bin/python3 {script}", True, script=script))
        self.assertTrue(self.runs("python3 sub dir/main.py", True, cwd="/a b", script="/a b/sub dir/main.py"))
        self.assertFalse(self.runs(f"/usr/bin/vim /my env/bin/python3 {script}", True, script=script))
        self.assertFalse(self.runs(f"/usr/bin/python3 tool.py {script}", True, script=script))

    def test_a_relative_script_needs_the_right_folder(self):
        above = os.path.dirname(self.folder)
        self.assertTrue(self.runs(["python", "main.py"], cwd=self.folder, script=self.script))
        self.assertFalse(self.runs(["python", "main.py"], cwd=above, script=self.script))
        self.assertFalse(self.runs(["python", "main.py"], cwd=None, script=self.script))

    def test_windows_paths_ignore_case_and_slashes(self):
        with unittest.mock.patch.object(dock, "PATH_RULES", ntpath):
            script = r"C:\Comfy UI\main.py"
            for command, cwd in (
                ([r"c:\py\Python.EXE", "-s", "c:/comfy ui/MAIN.py"], None),
                (["python.exe", r".\main.py"], "C:\\Comfy UI"),
                (["python.exe", r"Comfy UI\main.py"], "C:\\"),
            ):
                with self.subTest(command=command):
                    self.assertTrue(self.runs(command, cwd=cwd, script=script))
            self.assertFalse(self.runs([r"C:\Windows\notepad.exe", script], script=script))
            self.assertFalse(self.runs(["python.exe", r"D:\Comfy UI\main.py"], script=script))

    @unittest.skipIf(WINDOWS, "symbolic links")
    def test_a_script_behind_a_link_is_the_same_script(self):
        link = self.folder + " link"
        os.symlink(self.folder, link)
        self.addCleanup(os.unlink, link)
        self.assertTrue(self.runs(["python", os.path.join(link, "main.py")], script=self.script))

    def test_is_script_of_takes_a_name_in_a_folder_too(self):
        row = dock.process_table().row(self.start().pid)
        self.assertTrue(dock.is_script_of(row, self.script))
        self.assertTrue(dock.is_script_of(row, "main.py", self.folder))
        self.assertFalse(dock.is_script_of(row, os.path.join(self.folder, "other.py")))


class EverySource:
    """The same questions to one source, forced, about real processes; the classes below name the sources."""

    source = ""

    def setUp(self):
        super().setUp()
        if not dock.is_usable(self.source):
            self.skipTest(f"{self.source} is not here")
        patch = unittest.mock.patch.dict(os.environ, COMFYDOCK_PROCESS_TABLE=self.source)
        patch.start()
        self.addCleanup(patch.stop)
        self.table = dock.process_table()
        self.assertIsInstance(self.table, dock.TABLES[self.source])

    def test_a_process_is_shown_as_it_is(self):
        begun = time.time()
        process = self.start(arguments=("--port", "9"))
        row = self.table.row(process.pid)
        self.assertEqual((row.pid, row.ppid, row.state), (process.pid, os.getpid(), "running"))
        self.assertTrue(dock.is_python(row.name), row.name)
        self.assertLess(abs(row.created - begun), 3)
        self.assertTrue(row.text.endswith("main.py --port 9"), row.text)
        self.assertEqual(row.start_ticks, dock.proc_start_ticks(process.pid))
        if not WINDOWS:
            self.assertEqual((row.session, row.uid), (process.pid, os.getuid()))
        if not row.joined:
            self.assertEqual(row.command, [sys.executable, self.script, "--port", "9"])
        self.assertTrue(dock.is_process_alive(process.pid))

    def test_the_listing_finds_it_by_a_word_of_its_command_line(self):
        process = self.start()
        self.assertIn(process.pid, [row.pid for row in self.table.rows()])
        self.assertIn(os.getpid(), [row.pid for row in self.table.rows()])
        found = [row.pid for row in self.table.rows(containing="main.py") if row.runs(self.script, self.table.cwd)]
        self.assertEqual(found, [process.pid])
        self.assertEqual([row.pid for row in dock.comfyui_processes(self.folder)], [process.pid])
        self.assertEqual(self.table.rows(containing="no such words anywhere"), [])

    def test_the_marker_is_read(self):
        process = self.start(env={"COMFYDOCK_RUN_ID": "run-7"})
        self.assertEqual(self.table.markers().get(process.pid), "run-7")
        self.assertEqual(dock.process_table().markers().get(process.pid), "run-7")

    def test_the_folder_is_read_and_resolves_a_relative_script(self):
        if self.source == "ps" and not dock.on_path("lsof"):
            self.skipTest("lsof is not here")
        process = self.start(command=[sys.executable, "-u", "main.py"])
        self.assertTrue(dock.same_path(self.table.cwd(process.pid), self.folder))
        self.assertEqual([row.pid for row in dock.comfyui_processes(self.folder)], [process.pid])

    def test_who_listens_on_a_port_is_found(self):
        if self.source == "ps" and not dock.on_path("lsof"):
            self.skipTest("lsof is not here")
        if self.source == "tasklist" and not dock.printed(["netstat", "-ano"]).count("TCP"):
            self.skipTest("netstat shows nothing here (Wine)")
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with self.subTest(address=address), socket.socket(family, socket.SOCK_STREAM) as server:
                try:
                    server.bind((address, 0))
                except OSError:
                    continue
                server.listen()
                port = server.getsockname()[1]
                self.assertEqual(self.table.listeners(port), [os.getpid()])
                self.assertEqual([row.pid for row in dock.port_holders(port)], [os.getpid()])

    @unittest.skipIf(WINDOWS, "POSIX zombies")
    def test_a_zombie_is_shown_as_one_and_counts_as_dead(self):
        process = self.start()
        row = self.table.row(process.pid)
        identity = dock.identity_of(row)
        os.kill(process.pid, signal.SIGKILL)
        self.assertTrue(eventually(lambda: self.table.row(process.pid).state == "zombie"))
        self.assertFalse(dock.is_process_alive(process.pid))
        self.assertIsNone(dock.find_process(process.pid, identity, self.script))
        self.assertTrue(dock.wait_for_exit(row, 5))
        self.assertEqual(dock.comfyui_processes(self.folder), [])

    def test_what_is_not_there_is_none(self):
        process = self.start()
        process.kill()
        process.wait()
        self.assertTrue(eventually(lambda: self.table.row(process.pid) is None))
        self.assertIsNone(self.table.cwd(process.pid))
        self.assertFalse(dock.is_process_alive(process.pid))
        self.assertIsNone(self.table.row(2**31 - 2))

    def test_the_same_process_is_found_again_and_waited_for(self):
        process = self.start()
        row = self.table.row(process.pid)
        self.assertEqual(dock.find_process(process.pid, dock.identity_of(row), self.script).pid, process.pid)
        self.assertFalse(dock.wait_for_exit(row, 0.05))
        process.kill()
        self.assertTrue(dock.wait_for_exit(row, 20))


class ProcAsSource(EverySource, Stage):
    source = "proc"


class PsutilAsSource(EverySource, Stage):
    source = "psutil"


class PsAsSource(EverySource, Stage):
    source = "ps"


class TasklistAsSource(EverySource, Stage):
    source = "tasklist"


class ChoosingTheSource(unittest.TestCase):
    def test_an_unknown_or_unusable_one_is_refused_with_the_names(self):
        for name in ("nonsense", "proc" if WINDOWS else "tasklist"):
            if dock.is_usable(name):
                continue
            with self.subTest(name=name), unittest.mock.patch.dict(os.environ, COMFYDOCK_PROCESS_TABLE=name):
                with self.assertRaises(dock.CDEnvironmentError) as caught:
                    dock.process_table()
                self.assertIn("proc, psutil, tasklist, ps", caught.exception.hint)

    def test_where_nothing_works_one_line_says_what_to_install(self):
        with unittest.mock.patch.object(dock, "is_usable", lambda name: False), unittest.mock.patch.dict(os.environ):
            os.environ.pop("COMFYDOCK_PROCESS_TABLE", None)
            with self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.process_table()
        self.assertIn("pip install psutil", caught.exception.hint)

    def test_the_windows_source_works_on_its_captured_texts(self):
        done = subprocess.CompletedProcess([], 0, TASKLIST, "")
        facts = {
            288: dock.ProcessFacts(
                288, True, 4, 1000.0, r'"C:\p\python.exe" main.py', "D:\\x", {"COMFYDOCK_RUN_ID": "r"}
            ),
            4012: dock.ProcessFacts(4012, False),
        }
        with (
            unittest.mock.patch.object(dock, "run_command", lambda *_, **__: done),
            unittest.mock.patch.object(dock, "process_facts", facts.get),
        ):
            table = dock.TasklistTable()
            rows = table.rows()
            self.assertEqual(
                [(row.pid, row.name if "\\" not in row.text else "py") for row in rows],
                [(0, "System Idle Process"), (288, "py")],
            )
            self.assertEqual((table.markers(), table.cwd(288)), ({288: "r"}, "D:\\x"))
            self.assertEqual(table.row(288).command, [r"C:\p\python.exe", "main.py"])
            self.assertIsNone(table.row(4012))
            self.assertEqual(table.row(0).command, ["System Idle Process"])

    def test_a_tool_that_is_missing_prints_nothing(self):
        self.assertEqual(dock.printed(["no-such-program-here"]), "")


class TheSameProcess(Stage):
    def setUp(self):
        super().setUp()
        self.pid = self.start().pid
        self.row = dock.process_table().row(self.pid)
        self.identity = dock.identity_of(self.row)

    def find(self, script=None, **changes):
        return dock.find_process(self.pid, {**self.identity, **changes}, script or self.script)

    def test_another_start_under_the_same_pid_is_not_it(self):
        self.assertIsNotNone(self.find())
        self.assertIsNone(self.find(start_ticks=(self.row.start_ticks or 0) + 1, created=self.row.created - 60))

    @unittest.skipUnless(dock.is_usable("proc"), "needs /proc")
    def test_ticks_decide_whatever_the_clock_and_the_command_line_say(self):
        self.assertIsNotNone(self.find(created=0.0))
        self.assertIsNotNone(self.find(script="/another/main.py"))
        self.assertIsNone(self.find(start_ticks=self.row.start_ticks - 1))

    def test_without_ticks_creation_time_and_script_decide(self):
        self.assertIsNotNone(self.find(start_ticks=None))
        self.assertIsNotNone(self.find(start_ticks=None, created=self.row.created + 1.5))
        self.assertIsNone(self.find(start_ticks=None, created=self.row.created + 3))
        self.assertIsNone(self.find(start_ticks=None, script=os.path.join(self.folder, "other.py")))

    def test_without_identity_the_script_decides(self):
        for identity in ({}, None, [], {"start_ticks": "x", "created": True}):
            with self.subTest(identity=identity):
                self.assertIsNotNone(dock.find_process(self.pid, identity, self.script))
                self.assertIsNone(dock.find_process(self.pid, identity, os.path.join(self.folder, "other.py")))
        self.assertIsNone(dock.find_process(os.getpid(), {}, self.script))

    def test_another_machine_namespace_or_boot_is_not_here(self):
        self.assertEqual(dock.place_of(self.identity), "here")
        self.assertEqual(dock.place_of({**self.identity, "machine": "other"}), "foreign")
        self.assertIsNone(self.find(machine="other"))
        if dock.boot_id():
            self.assertEqual(dock.place_of({**self.identity, "boot_id": "other"}), "rebooted")
            self.assertEqual(dock.place_of({**self.identity, "boot_id": "other", "machine": "other"}), "foreign")
        if dock.pid_namespace():
            self.assertEqual(dock.place_of({**self.identity, "pid_ns": "1"}), "foreign")

    def test_what_is_no_pid_matches_nothing(self):
        for pid in (True, False, 0, 1, -1, -self.pid, str(self.pid), float(self.pid), None, 2**31, 2**70):
            with self.subTest(pid=pid):
                self.assertIsNone(dock.find_process(pid, {}, self.script))
                self.assertFalse(dock.is_process_alive(pid))

    def test_waiting_can_be_broken_off(self):
        calls = []

        def meanwhile():
            calls.append(time.monotonic())
            return len(calls) == 4

        self.assertFalse(dock.wait_for_exit(self.row, 60, meanwhile))
        self.assertEqual(len(calls), 4)
        self.assertLess(calls[-1] - calls[0], 5)

    def test_waiting_works_where_there_is_no_handle(self):
        with unittest.mock.patch.object(dock, "wait_handle", lambda pid, seconds: None):
            self.assertFalse(dock.wait_for_exit(self.row, 0.05))
            dock.signal_process(self.pid, "kill")
            self.assertTrue(dock.wait_for_exit(self.row, 20))

    def test_a_row_of_an_earlier_process_has_ended_already(self):
        other = dock.ProcessRow(
            self.pid, created=self.row.created - 60, start_ticks=self.row.start_ticks and self.row.start_ticks - 6000
        )
        self.assertTrue(dock.wait_for_exit(other, 0))


FAMILY = """\
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print("child", subprocess.Popen(sleep).pid, flush=True)
print("grandchild", int(subprocess.check_output([sys.executable, "-c", "import subprocess, sys;"
      "print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)", *sleep])),
      flush=True)
print("marked", int(subprocess.check_output([sys.executable, "-c", "import subprocess, sys;"
      "print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,"
      "start_new_session=True).pid)", *sleep])), flush=True)
print("ready", flush=True)
time.sleep(600)
"""

WORKERS = """\
import os, time
if os.fork() == 0 and os.fork() == 0:
    print("ready", flush=True)
time.sleep(600)
"""


class TheFamily(Stage):
    def test_children_orphans_of_the_session_and_marked_deserters_belong_to_it(self):
        run_id = str(uuid.uuid4())
        process = self.start(FAMILY, env={"COMFYDOCK_RUN_ID": run_id})
        child, orphan, deserter = (self.said(word)[0] for word in ("child", "grandchild", "marked"))
        for pid in (child, orphan, deserter):
            self.addCleanup(self.end_pid, pid)
        row = dock.process_table().row(process.pid)
        if not WINDOWS:
            self.assertNotEqual(dock.process_table().row(orphan).ppid, process.pid)
            self.assertEqual(dock.process_table().row(deserter).session, deserter)
        family = [one.pid for one in dock.family_of(row, run_id)]
        self.assertEqual(set(family), {process.pid, child, orphan, deserter})
        self.assertEqual(family[0], process.pid)
        self.assertNotIn(deserter, [one.pid for one in dock.family_of(row, None)])
        process.kill()
        process.wait()
        left = {one.pid for one in dock.family_of(row, run_id)}
        self.assertEqual(left, {child, orphan, deserter})

    def test_neither_we_nor_those_above_us_are_family(self):
        code = (
            f"import os, sys; sys.path.insert(0, {HERE!r}); import comfydock as m\n"
            f"t = m.process_table(); top = t.row({os.getpid()}); found = m.family_of(top, 'run-me')\n"
            f"print([r.pid for r in found if r.pid in ({os.getpid()}, os.getpid())], len(found) >= 0)"
        )
        done = dock.run_command([sys.executable, "-c", code], env={**os.environ, "COMFYDOCK_RUN_ID": "run-me"})
        self.assertEqual(done.stdout, "[] True\n", done.stderr)

    def test_a_process_older_than_its_parent_is_not_its_child(self):
        parent = dock.ProcessRow(50, 1, created=100.0, start_ticks=1000)
        for child, expected in (
            (dock.ProcessRow(51, 50, created=100.0, start_ticks=1001), True),
            (dock.ProcessRow(51, 50, created=100.0, start_ticks=999), False),
            (dock.ProcessRow(51, 50, created=90.0), False),
            (dock.ProcessRow(51, 50), True),
            (dock.ProcessRow(51, 49, start_ticks=2000), False),
            (dock.ProcessRow(50, 50, start_ticks=1000), False),
        ):
            with self.subTest(child=child):
                self.assertEqual(child.can_be_child_of(parent), expected)

    def test_a_pid_that_was_given_away_has_no_family_of_the_old_process(self):
        process = self.start(FAMILY)
        for word in ("child", "grandchild", "marked"):
            self.addCleanup(self.end_pid, self.said(word)[0])
        row = dock.process_table().row(process.pid)
        old = dock.ProcessRow(
            row.pid,
            row.ppid,
            row.session,
            row.uid,
            "running",
            row.created - 60,
            row.start_ticks and row.start_ticks - 6000,
        )
        self.assertEqual(dock.family_of(old, None), [])

    @unittest.skipIf(WINDOWS, "fork")
    def test_forked_workers_with_the_same_command_line_are_not_shown_as_more_comfyuis(self):
        process = self.start(WORKERS)
        row = dock.process_table().row(process.pid)
        family = dock.family_of(row, None)
        for one in family[1:]:
            self.addCleanup(self.end_pid, one.pid)
        self.assertEqual(len(family), 3)
        self.assertEqual(len(dock.process_table().rows(containing=self.script)), 3)
        self.assertEqual([one.pid for one in dock.comfyui_processes(self.folder)], [process.pid])


@unittest.skipIf(WINDOWS or not hasattr(os, "geteuid") or os.geteuid() != 0, "needs root to be someone else")
class SomeoneElse(Stage):
    def as_nobody(self, work):
        """Run `work` in a fork that is nobody, and return the text it returns."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                answer = work()
            except Exception as error:  # noqa: BLE001
                answer = repr(error)
            os.write(writer, answer.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            answer = stream.read()
        os.waitpid(pid, 0)
        return answer

    def test_another_users_process_is_seen_and_not_signalled_and_nothing_raises(self):
        run_id = str(uuid.uuid4())
        process = self.start(env={"COMFYDOCK_RUN_ID": run_id})
        row = dock.process_table().row(process.pid)
        identity = dock.identity_of(row)

        def look():
            table = dock.process_table()
            seen = dock.find_process(process.pid, identity, self.script)
            facts = [
                seen.pid == process.pid,
                table.cwd(process.pid),
                table.markers().get(process.pid),
                table.listeners(1),
                [one.pid for one in dock.family_of(seen, run_id)] == [process.pid],
            ]
            try:
                dock.signal_process(process.pid, "kill")
            except PermissionError:
                facts.append("refused")
            return str(facts)

        self.assertEqual(self.as_nobody(look), "[True, None, None, [], True, 'refused']")


REUSE = """\
import os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import comfydock as m
start = lambda: subprocess.Popen([sys.executable, sys.argv[2]], stdout=subprocess.DEVNULL)
first = start()
identity = m.identity_of(m.process_table().row(first.pid))
same = m.find_process(first.pid, identity, sys.argv[2]) is not None
first.kill(); first.wait()
while time.clock_gettime(time.CLOCK_BOOTTIME) * m.clock_ticks() < identity["start_ticks"] + 2: pass
with open("/proc/sys/kernel/ns_last_pid", "w") as file: file.write(str(first.pid - 1))
second = start()
print(same, first.pid == second.pid, m.find_process(second.pid, identity, sys.argv[2]))
second.kill(); second.wait()
"""


class AReusedPid(Stage):
    def test_the_next_process_with_the_same_pid_and_command_line_is_not_the_recorded_one(self):
        unshare = shutil.which("unshare")
        if WINDOWS or unshare is None or os.geteuid() != 0:
            self.skipTest("needs root and unshare to have a PID used again")
        self.write(READY_AND_WAIT)
        code = self.write(REUSE, "reuse.py")
        namespace = [unshare, "-p", "-f", "--mount-proc"]
        done = dock.run_command([*namespace, sys.executable, code, HERE, self.script], timeout=60)
        if done.returncode and not done.stdout:
            self.skipTest(f"no new PID namespace here: {done.stderr.strip().splitlines()[-1:]}")
        self.assertEqual(done.stdout, "True True None\n", done.stderr)


# ======================================================================================================================
# 5. The network
# ======================================================================================================================


def saying(text):
    return lambda connection: (connection.recv(4096), connection.sendall(text))


def dripping(connection):
    for sign in b"HTTP/1.0 200 OK\r\n\r\n" * 100:
        connection.sendall(bytes([sign]))
        time.sleep(0.1)


def endless(connection):
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def stats(argv=None):
    body = json.dumps({"system": {"argv": argv} if argv else {}, "devices": []}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class ProbesKnowWhatAnswers(unittest.TestCase):
    def probe(self, answer, timeout=0.5):
        with listening(answer=answer) as port:
            began = time.monotonic()
            found = dock.probe(dock.ComfyUIConfig("127.0.0.1", port), timeout)
            return found, time.monotonic() - began

    def test_answers_of_many_kinds(self):
        cases = [
            (stats(), dock.HEALTHY),
            (stats(["main.py"]), dock.HEALTHY),
            (b"HTTP/1.0 401 No\r\n\r\n", dock.HEALTHY),
            (b"HTTP/1.0 403 No\r\n\r\n", dock.HEALTHY),
            (b"HTTP/1.0 404 No\r\n\r\n", dock.STRANGER),
            (b"HTTP/1.0 302 Go\r\nLocation: http://example.org/\r\n\r\n", dock.STRANGER),
            (b"HTTP/1.0 200 OK\r\n\r\n{}", dock.STRANGER),
            (b"HTTP/1.0 200 OK\r\n\r\n[]", dock.STRANGER),
            (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100000, dock.STRANGER),
            (b"SSH-2.0-OpenSSH\r\n", dock.STRANGER),
            (b"", dock.STRANGER),
        ]
        for text, kind in cases:
            with self.subTest(text=text[:40]):
                self.assertEqual(self.probe(saying(text))[0].kind, kind)

    def test_the_command_line_of_the_server_is_handed_on(self):
        self.assertEqual(self.probe(saying(stats(["/x/main.py", "--cpu"])))[0].argv, ["/x/main.py", "--cpu"])

    def test_a_dripping_server_costs_no_more_than_the_timeout(self):
        found, took = self.probe(dripping)
        self.assertEqual(found.kind, dock.SILENT)
        self.assertLess(took, 1.5)

    def test_an_endless_body_is_given_up(self):
        self.assertIn(self.probe(endless, 5)[0].kind, (dock.STRANGER, dock.SILENT))

    def test_nobody_there_is_refused(self):
        self.assertEqual(dock.probe(dock.ComfyUIConfig("127.0.0.1", free_port()), 2).kind, dock.REFUSED)

    def test_proxies_of_the_environment_are_not_used(self):
        with (
            listening(answer=saying(stats())) as port,
            unittest.mock.patch.dict(
                os.environ, {"http_proxy": "http://127.0.0.1:1", "all_proxy": "http://127.0.0.1:1"}
            ),
        ):
            self.assertTrue(dock.check_http_health("0.0.0.0", port))

    def test_hung_servers_are_asked_all_at_once(self):
        with contextlib.ExitStack() as stack:
            servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(10)]
            for server in servers:
                stack.callback(server.close)
            configs = [dock.ComfyUIConfig("127.0.0.1", server.getsockname()[1]) for server in servers]
            began = time.monotonic()
            answers = dock.probe_all(configs, 0.5)
            self.assertLess(time.monotonic() - began, 2.5)
        self.assertEqual({answer.kind for answer in answers}, {dock.SILENT})


class PortsAreAskedAsComfyUIBindsThem(unittest.TestCase):
    def test_a_listening_port_is_bound_on_loopback_and_for_every_address(self):
        with listening() as port:
            self.assertTrue(dock.is_port_bound(port))
            self.assertTrue(dock.is_port_bound(port, host="0.0.0.0,::"))
            self.assertTrue(dock.is_port_bound(port, expected_pid=os.getpid()))
            self.assertFalse(dock.is_port_bound(port, expected_pid=2**22 - 2))
        self.assertFalse(dock.is_port_bound(port))

    def test_time_wait_after_a_stop_does_not_count(self):
        with listening(answer=lambda connection: connection.close()) as port:
            client = socket.create_connection(("127.0.0.1", port))
            eventually(lambda: client.recv(1) == b"")
        client.close()
        self.assertFalse(dock.is_port_bound(port))

    def test_the_next_free_port_leaves_out_what_others_have_claimed(self):
        with listening() as port:
            found = dock.next_free_port(port, "127.0.0.1", {port + 1: "another"})
            self.assertGreater(found, port + 1)


# ======================================================================================================================
# 6. Files
# ======================================================================================================================


class WritingIsAllOrNothing(unittest.TestCase):
    def setUp(self):
        self.folder = temporary_folder(self)
        self.path = os.path.join(self.folder, "state")

    def test_the_file_is_whole_private_and_alone(self):
        dock.write_atomic(self.path, b"one")
        dock.write_atomic(self.path, b"two")
        self.assertEqual(Path(self.path).read_bytes(), b"two")
        self.assertEqual(os.listdir(self.folder), ["state"])
        if not WINDOWS:
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_a_failure_keeps_the_old_file_and_leaves_nothing(self):
        dock.write_atomic(self.path, b"old")
        with unittest.mock.patch.object(dock, "replace_file", side_effect=OSError("no")), self.assertRaises(OSError):
            dock.write_atomic(self.path, b"new")
        self.assertEqual(Path(self.path).read_bytes(), b"old")
        self.assertEqual(os.listdir(self.folder), ["state"])

    def test_leftovers_of_killed_writers_are_swept(self):
        Path(self.folder, "state.123-abcd.tmp").write_text("x", encoding="utf-8")
        Path(self.folder, "other.tmp").write_text("x", encoding="utf-8")
        dock.sweep_leftovers(self.path)
        self.assertEqual(os.listdir(self.folder), ["other.tmp"])

    @unittest.skipIf(WINDOWS, "links need rights on Windows")
    def test_links_are_not_followed(self):
        target = os.path.join(self.folder, "precious")
        Path(target).write_text("keep", encoding="utf-8")
        os.symlink(target, self.path)
        with self.assertRaises(OSError):
            dock.read_small(self.path)
        with self.assertRaises(OSError):
            dock.open_append(self.path)
        dock.write_atomic(self.path, b"new")
        self.assertEqual(Path(target).read_text(encoding="utf-8"), "keep")
        self.assertFalse(os.path.islink(self.path))


class LocksExclude(unittest.TestCase):
    def setUp(self):
        self.path = os.path.join(temporary_folder(self), "lock")

    def test_the_second_one_waits_and_then_names_the_holder(self):
        with dock.locked(self.path, 1, "run"):
            with self.assertRaises(dock.CDEnvironmentError) as caught, dock.locked(self.path, 0.1, "stop"):
                pass
        self.assertIn(f"'comfydock run', PID {os.getpid()}", caught.exception.message)
        with dock.locked(self.path, 0.1, "stop"):
            pass

    def test_a_replaced_lock_file_is_opened_again(self):
        first = dock._lock_by(self.path, time.monotonic() + 1)
        os.rename(self.path, self.path + ".gone") if not WINDOWS else None
        try:
            if not WINDOWS:
                with dock.locked(self.path, 1, "run"):
                    self.assertTrue(os.path.exists(self.path))
        finally:
            os.close(first)

    def test_the_lock_ends_with_its_holder(self):
        code = (
            "import sys, comfydock, time\n"
            f"with comfydock.locked({self.path!r}, 1, 'run'):\n"
            "    print('held', flush=True)\n    time.sleep(60)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE)
        self.assertEqual(child.stdout.readline().strip(), b"held")
        child.kill()
        child.wait()
        child.stdout.close()
        with dock.locked(self.path, 5, "stop"):
            pass


class LogsAreReadFromTheirEnd(unittest.TestCase):
    def setUp(self):
        self.path = os.path.join(temporary_folder(self), "comfyui.log")

    def tail(self, data, count, floor=0):
        Path(self.path).write_bytes(data)
        with open(self.path, "rb") as file:
            return data[dock.last_lines_offset(file, count, floor, len(data)) :]

    def test_last_lines_at_every_block_border(self):
        for size in (1, 7, dock.BLOCK - 1, dock.BLOCK, dock.BLOCK + 1, 3 * dock.BLOCK):
            lines = [b"%d\n" % number + b"x" * (size % 97) for number in range(1)] + [
                b"y" * size + b"\n",
                b"\n",
                b"last\n",
            ]
            data = b"".join(lines)
            for count in (0, 1, 2, 3, 4, 9):
                with self.subTest(size=size, count=count):
                    wanted = b"".join(data.splitlines(True)[-count:]) if count else b""
                    self.assertEqual(self.tail(data, count), wanted)

    def test_only_newlines_end_a_line_and_the_last_may_have_none(self):
        self.assertEqual(self.tail(b"a\r1%\r2%\nb\x0bc\x85", 1), b"b\x0bc\x85")
        self.assertEqual(self.tail(b"a\nb", 2), b"a\nb")
        self.assertEqual(self.tail(b"", 5), b"")

    def test_the_floor_holds(self):
        self.assertEqual(self.tail(b"old\nnew1\nnew2\n", 9, floor=4), b"new1\nnew2\n")

    def test_the_last_session_is_found_across_block_borders(self):
        mark = dock.session_header("run", "env").encode()
        for before in (0, 10, dock.BLOCK - 5, dock.BLOCK, 5 * dock.BLOCK):
            data = mark + b"z" * before + b"\n" + mark + b"after\n" * 50000
            Path(self.path).write_bytes(data)
            with open(self.path, "rb") as file:
                self.assertEqual(dock.find_session(file, len(data)), len(mark) + before + 1)
        Path(self.path).write_bytes(b"no header here\n")
        with open(self.path, "rb") as file:
            self.assertEqual(dock.find_session(file, 15), 0)

    def test_a_session_begins_on_a_line_of_its_own(self):
        Path(self.path).write_bytes(b"cut off")
        log, offset, inode = dock.begin_session(self.path, "=== header\n")
        log.close()
        self.assertEqual(Path(self.path).read_bytes()[offset:], b"=== header\n")
        self.assertEqual(offset, 8)
        self.assertEqual(inode, os.stat(self.path).st_ino)

    def test_rotation_moves_only_what_is_over_the_limit(self):
        Path(self.path).write_bytes(b"x" * 100)
        dock.rotate_at_start(self.path, limit=100)
        self.assertFalse(os.path.exists(self.path + ".old"))
        dock.rotate_at_start(self.path, limit=99)
        self.assertEqual(os.path.getsize(self.path + ".old"), 100)
        self.assertFalse(os.path.exists(self.path))

    def test_a_start_never_fails_for_rotation(self):
        Path(self.path).write_bytes(b"x" * 100)
        with unittest.mock.patch.object(dock, "_move_log", side_effect=OSError("no")):
            dock.rotate_at_start(self.path, limit=1)
        self.assertEqual(os.path.getsize(self.path), 100)

    def test_following_survives_growth_rename_and_truncation(self):
        Path(self.path).write_bytes(b"one\n")
        follower = dock.LogFollower(self.path, 0)
        self.addCleanup(follower.close)
        self.assertEqual(follower.read(), b"one\n")
        self.assertEqual(follower.read(), b"")
        with open(self.path, "ab") as file:
            file.write(b"two\n")
        if not WINDOWS:  # an open file cannot be renamed there
            os.rename(self.path, self.path + ".old")
            Path(self.path).write_bytes(b"three\n")
            self.assertEqual(follower.read() + follower.read(), b"two\nthree\n")
        else:
            self.assertEqual(follower.read(), b"two\n")
        os.truncate(self.path, 0)
        self.assertEqual(follower.read(), b"")
        with open(self.path, "ab") as file:
            file.write(b"4\n")
        self.assertEqual(follower.read(), b"4\n")

    def test_a_log_that_is_not_there_yet_is_waited_for(self):
        follower = dock.LogFollower(self.path, 0)
        self.addCleanup(follower.close)
        self.assertEqual(follower.read(), b"")
        Path(self.path).write_bytes(b"now\n")
        self.assertEqual(follower.read(), b"now\n")


# ======================================================================================================================
# 7. The state file
# ======================================================================================================================


class TheStateFile(unittest.TestCase):
    def setUp(self):
        self.path = os.path.join(temporary_folder(self), ".comfyui.state")

    def test_it_is_read_as_it_was_written(self):
        state = dock.ProcessState.from_dict({**PLANS_STATE, "env": {"KEY": "välue"}, "unknown": [1]})
        dock.write_state(self.path, state)
        self.assertEqual(dock.read_state(self.path), state)

    def test_nothing_there_and_nonsense_read_as_none(self):
        self.assertIsNone(dock.read_state(self.path))
        self.assertFalse(dock.is_damaged(self.path))
        for content in (b"", b"\xff\xfe\x00", b"[]", b"{}", b"null", b"1e999", b"[" * 100000, b"x" * 2000000):
            Path(self.path).write_bytes(content)
            self.assertIsNone(dock.read_state(self.path), content[:20])
            self.assertTrue(dock.is_damaged(self.path))

    def test_ten_thousand_mutated_records_raise_nothing(self):
        chance = random.Random(7)
        text = json.dumps(dock.ProcessState.from_dict(PLANS_STATE).to_dict()).encode()
        for number in range(10000 if "--long" in sys.argv else 1000):
            mutated = bytearray(text)
            for _ in range(chance.randrange(1, 6)):
                mutated[chance.randrange(len(mutated))] = chance.choice(b'{}[]",:0-1nt\xff\x00')
            Path(self.path).write_bytes(bytes(mutated))
            found = dock.read_state(self.path)
            self.assertTrue(found is None or dock.is_pid(found.pid) or found.phase == "starting", number)

    @unittest.skipIf(WINDOWS, "links need rights on Windows")
    def test_a_planted_link_raises(self):
        os.symlink("/etc/hostname", self.path)
        with self.assertRaises(OSError):
            dock.read_state(self.path)


# ======================================================================================================================
# 13. The console
# ======================================================================================================================


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Cp437(io.StringIO):
    encoding = "cp437"


class TheConsoleSpeaksPlainly(unittest.TestCase):
    def test_signs_become_ascii_where_the_stream_can_do_no_better(self):
        out = Cp437()
        dock.Console(out, None, None).say("✓ ComfyUI • über 日本")
        self.assertEqual(out.getvalue(), "[ok] ComfyUI * über \\u65e5\\u672c\n")

    def test_colours_are_for_terminals_and_no_color_is_obeyed(self):
        with unittest.mock.patch.dict(os.environ, {"TERM": "xterm", "NO_COLOR": ""}):
            out = Terminal()
            dock.Console(out, None, None).say("✓ done")
            self.assertEqual("\x1b" in out.getvalue(), not WINDOWS)
            os.environ["NO_COLOR"] = "1"
            out = Terminal()
            dock.Console(out, None, None).say("✓ done")
            self.assertNotIn("\x1b", out.getvalue())
        out = io.StringIO()
        dock.Console(out, None, None).say("✓ done")
        self.assertEqual(out.getvalue(), "✓ done\n")

    def test_commands_are_shown_as_they_must_be_typed_here(self):
        out = io.StringIO()
        console = dock.Console(out, None, None, call="python3 comfydock.py")
        console.chosen = " -e dev"
        console.say("'comfydock logs', comfydock use x, comfydock -e a run, Another comfydock command")
        self.assertEqual(
            out.getvalue(),
            "'python3 comfydock.py -e dev logs', python3 comfydock.py use x, python3 comfydock.py -e a run,"
            " Another comfydock command\n",
        )

    def test_without_a_terminal_there_is_no_answer(self):
        self.assertIsNone(dock.Console(io.StringIO(), None, io.StringIO("y\n")).ask("Sure?", True))
        self.assertIsNone(dock.Console(Terminal(), None, None).ask("Sure?", True))

    def test_a_terminal_is_asked(self):
        for typed, default, answer in (
            ("\n", True, True),
            ("\n", False, False),
            ("Y\n", False, True),
            ("no\n", True, False),
        ):
            self.assertIs(dock.Console(Terminal(), None, Terminal(typed)).ask("Sure?", default), answer)
        self.assertIsNone(dock.Console(Terminal(), None, Terminal("")).ask("Sure?", True))

    def test_missing_streams_are_no_fault(self):
        console = dock.Console(None, None, None)
        console.say("x")
        console.warn("x")
        console.raw(b"x")
        console.flush()

    def test_how_it_was_called(self):
        with unittest.mock.patch.object(sys, "orig_argv", ["python3", "comfydock.py", "run"], create=True):
            self.assertEqual(dock.how_called(["comfydock.py"]), "python3 comfydock.py")
        self.assertEqual(dock.how_called(["/usr/bin/comfydock"]), "comfydock")
        with unittest.mock.patch.object(sys, "orig_argv", ["python", "-m", "comfydock"], create=True):
            self.assertEqual(dock.how_called(["/x/comfydock.py"]), "python -m comfydock")


# ======================================================================================================================
# 15. The command line
# ======================================================================================================================


class WordsAreSharedOutBetweenUsAndComfyUI(unittest.TestCase):
    def parse(self, *words):
        return dock.parse(list(words), "comfydock")

    def test_comfyui_gets_its_own_words_untouched(self):
        cases = [
            (["run", "--listen", "--port", "9"], ["--listen", "--port", "9"]),
            (["run", "--", "--json", "-e", "x"], ["--json", "-e", "x"]),
            (["run", "--cpu", "--", "--", "x"], ["--cpu", "--", "x"]),
            (["run", "--listen", "-e", "dev", "--cpu"], ["--listen", "--cpu"]),
            (["run", "--wait", "--listen"], ["--listen"]),
            (["run", "--wait", "5", "--listen"], ["--listen"]),
            (["run", "--wait=5", "1.2.3.4"], ["1.2.3.4"]),
            (["run", "--fore", "--verbose", "DEBUG", "-fe"], ["--fore", "--verbose", "DEBUG", "-fe"]),
            (["run", "--output-directory", "stop", "--set-env", "A=b=c"], ["--output-directory", "stop"]),
            (["run", "--cpu", "--help"], ["--cpu", "--help"]),
            (["--json", "-e", "dev", "run", "-f=1"], ["-f=1"]),
        ]
        for words, theirs in cases:
            with self.subTest(words=words):
                self.assertEqual(self.parse(*words)[1].comfyui_args, theirs)

    def test_our_options_may_stand_before_and_after_the_command(self):
        for words in (
            ["-e", "dev", "status"],
            ["status", "-e", "dev"],
            ["--env=dev", "status"],
            ["status", "--env", "dev"],
        ):
            self.assertEqual(self.parse(*words)[1].env, "dev", words)

    def test_values_are_read(self):
        _, args = self.parse("run", "--wait", "--set-env", "A=1", "--set-env", "B=x=y", "--demo")
        self.assertEqual((args.wait, args.set_env, args.demo), (180.0, {"A": "1", "B": "x=y"}, True))
        self.assertEqual(self.parse("run", "--wait", "2.5")[1].wait, 2.5)
        self.assertEqual(self.parse("stop", "--timeout", "3")[1].timeout, 3.0)
        self.assertEqual(self.parse("logs", "-n", "7", "-f")[1].tail, 7)

    def test_nonsense_is_a_usage_error_with_a_hint(self):
        cases = [
            ["frobnicate"], ["stauts"], ["stop", "--timeout", "x"], ["stop", "--timeout", "-1"], ["stop", "--timeout"],
            ["logs", "-n", "-5"], ["logs", "-n5"], ["logs", "--json"], ["run", "--foreground", "--json"], ["status", "x"],
            ["status", "--fol"], ["use"], ["use", "a", "b"], ["create", "x"], ["run", "--set-env", "A"], ["help", "nothing"],
            ["stop", "--kil"], ["-e"], ["run", "-e"], ["logs", "-fn", "5"],
        ]  # fmt: skip
        for words in cases:
            with self.subTest(words=words), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.parse(*words)
            self.assertEqual(caught.exception.code, "usage")
            self.assertTrue(caught.exception.hint)

    def test_a_mistyped_command_is_suggested(self):
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            self.parse("stauts")
        self.assertIn("comfydock status", caught.exception.hint)

    def test_every_command_has_help_that_fits_a_screen(self):
        for command in dock.COMMANDS:
            text = dock.build_parser(command, "comfydock").format_help()
            self.assertLess(len(text.splitlines()), 40, command.name)
            self.assertIn("examples:", text)
        self.assertLess(len(dock.overview("comfydock").splitlines()), 40)


class TheFrontDoorNeverShowsATraceback(unittest.TestCase):
    def test_a_fault_of_ours_is_one_clear_sentence(self):
        err = io.StringIO()
        with unittest.mock.patch.object(dock, "answer", side_effect=KeyError("x")), contextlib.redirect_stderr(err):
            self.assertEqual(dock.main(["status"]), 1)
        self.assertIn("This is a fault of comfydock: KeyError: 'x'", err.getvalue())
        self.assertNotIn("Traceback", err.getvalue())

    def test_ctrl_c_is_130(self):
        with unittest.mock.patch.object(dock, "answer", side_effect=KeyboardInterrupt):
            with contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(dock.main(["status"]), 130)


# ======================================================================================================================
# The house itself
# ======================================================================================================================


class TheHouse(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.source = Path(MODULE).read_text(encoding="utf-8")
        cls.tree = ast.parse(cls.source)
        cls.rooms = [
            (number, int(match[1]))
            for number, line in enumerate(cls.source.splitlines(), 1)
            if (match := re.match(r"# (\d+)\. \S", line))
        ]

    def room(self, line):
        return max((room for first, room in self.rooms if first <= line), default=0)

    def test_the_rooms_are_in_order_and_the_map_names_them_all(self):
        self.assertEqual([room for _, room in self.rooms], list(range(1, len(self.rooms) + 1)))
        for title in re.findall(r"^# (\d+\. .+)$", self.source, re.M):
            self.assertIn(title, dock.__doc__)

    def test_only_the_standard_library_is_imported_and_psutil_if_it_is_there(self):
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        known = getattr(sys, "stdlib_module_names", None)
        if known:
            self.assertLessEqual(names - {"pip"}, set(known))

    def test_reading_goes_downward(self):
        definitions = [node for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        defined = {node.name: node.lineno for node in definitions}
        for node in self.tree.body:
            names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
            local = {inner.id for inner in names if not isinstance(inner.ctx, ast.Load)}
            local |= {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
            local |= {
                inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef) and inner is not node
            }
            for name in {inner.id for inner in names} & defined.keys() - local:
                here, there = self.room(node.lineno), self.room(defined[name])
                self.assertLessEqual(there, here, f"{name} of room {there} used in line {node.lineno}")

    def test_each_door_holds(self):
        doors = {
            "print": {13}, "input": {13}, "psutil_module": {4}, "argparse": {15}, "signal": {3}, "fcntl": {3}, "msvcrt": {3},
            "ctypes": {3}, "socket": {5}, "ssl": {5},
        }  # fmt: skip
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                words = [module.split(".")[0] for module in modules]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                words = [node.func.id]
            else:
                continue
            for word in words:
                if word in doors and self.room(node.lineno) not in (0, 10):
                    self.assertIn(self.room(node.lineno), doors[word], f"{word} in line {node.lineno}")

    def test_everything_public_is_there_and_documented(self):
        for name in dock.__all__:
            self.assertTrue(hasattr(dock, name), name)
            self.assertTrue(getattr(dock, name).__doc__, name)

    def test_importing_is_silent_and_needs_no_entry_in_sys_modules(self):
        code = (
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('anything', {MODULE!r})\n"
            "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
            "assert module.ProcessState and module.Environment\n"
        )
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))


# ======================================================================================================================
# Journeys: real processes through a real `python3 comfydock.py`
# ======================================================================================================================


class Journey(unittest.TestCase):
    def setUp(self):
        self.person = Person(self)

    def run_demo(self, *words, **variables):
        """Start the demo and wait until it answers; returns the data of `run --json`."""
        done = self.person.types(
            "run", "--demo", "--wait", "30", "--json", "--port", str(free_port()), *words, **variables
        )
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        return json.loads(done.stdout)["data"]

    def start_demo(self, *words, **variables):
        """Start the demo and do not wait; returns the data of `run --json`."""
        done = self.person.types("run", "--demo", "--json", "--port", str(free_port()), *words, **variables)
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        return json.loads(done.stdout)["data"]

    def assertClear(self, done, code, *fragments):
        """One clear sentence on the error stream, no traceback, and the exit code."""
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn("comfydock: ", done.stderr)
        for fragment in fragments:
            self.assertIn(fragment, done.stderr)


class FirstContact(Journey):
    def test_a_newcomer_in_an_empty_home_gets_all_the_way(self):
        person = self.person
        done = person.types("run", "--demo")
        self.assertEqual(done.returncode, 0, done.stderr)
        url = re.search(r"http://127\.0\.0\.1:(\d+)", done.stdout)
        port = int(url[1])
        eventually(lambda: http_status(port) == 200)
        pid = int(re.search(r"PID (\d+)", done.stdout)[1])
        self.assertIn("Health: ✓ Healthy", person.types("status").stdout)
        self.assertIn(f"running on http://127.0.0.1:{port}, PID {pid}", person.types("list").stdout)
        self.assertIn("To see the GUI go to", person.types("logs", "-n", "5").stdout)
        self.assertEqual(person.types("restart").returncode, 0)
        again = person.status()["pid"]
        self.assertNotEqual(again, pid)
        self.assertFalse(alive(pid))
        eventually(lambda: http_status(port) == 200)
        done = person.types("stop")
        self.assertEqual((done.returncode, "✓ ComfyUI stopped" in done.stdout), (0, True), done.stderr)
        self.assertFalse(alive(again))
        self.assertFalse(dock.is_port_bound(port))
        self.assertIsNone(person.state())
        self.assertIn("Stopped server" if not WINDOWS else "GUI", person.types("logs").stdout)
        self.assertEqual(person.types("status").returncode, 3)
        self.assertEqual(person.types("stop").returncode, 0)

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_the_terminal_can_be_closed(self):
        import pty

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.person.home)
            command = self.person.command("run", "--demo", "--port", str(free_port()))
            os.execve(command[0], command, self.person.variables)
        said = b""
        with contextlib.suppress(OSError):
            while b"Tip:" not in said:
                said += os.read(terminal, 4096)
        os.close(terminal)
        os.waitpid(pid, 0)
        data = self.person.status()
        eventually(lambda: http_status(data["port"]) == 200)
        self.assertTrue(alive(data["pid"]))

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_the_daemon_is_detached_from_everything(self):
        ignoring = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.exit(subprocess.call(sys.argv[1:]))"
        command = self.person.command("run", "--demo", "--port", str(free_port()))
        subprocess.run([sys.executable, "-c", ignoring, *command], env=self.person.variables, cwd=self.person.home, check=True,
                       stdout=subprocess.DEVNULL, timeout=30)  # fmt: skip
        pid = self.person.state()["pid"]
        self.assertEqual(os.getsid(pid), pid)
        log = os.path.join(self.person.workspace, "logs", "demo", "comfyui.log")
        links = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        self.assertEqual((links["0"], links["1"], links["2"]), ("/dev/null", log, log))
        others = [target for number, target in links.items() if int(number) > 2]
        self.assertEqual(
            [target for target in others if not target.startswith(("socket:", "anon_inode:", "pipe:"))], []
        )
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        ignored = int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16)
        blocked = int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16)
        self.assertFalse(ignored & (1 << (signal.SIGINT - 1)) or ignored & (1 << (signal.SIGTERM - 1)) or blocked)
        eventually(lambda: http_status(self.person.state()["port"]) == 200)
        self.assertEqual([row.pid for row in self.person.processes()], [pid])

    def test_without_a_terminal_nothing_waits_for_input(self):
        read, write = os.pipe()
        self.addCleanup(os.close, write)
        self.addCleanup(os.close, read)
        for words in (
            ["run", "--demo", "--port", str(free_port())],
            ["status"],
            ["list"],
            ["restart"],
            ["logs"],
            ["stop"],
            [],
        ):
            with self.subTest(words=words):
                self.assertIn(self.person.types(*words, stdin=read, seconds=30).returncode, (0, 3))


class Running(Journey):
    def test_of_sixteen_at_once_exactly_one_starts(self):
        port = str(free_port())
        self.person.types("list")
        children = [self.person.starts("run", "--demo", "--port", port) for _ in range(16)]
        codes = [child.wait(60) for child in children]
        said = [Path(child.said).read_text(encoding="utf-8") for child in children]
        self.assertEqual(sorted(codes), [0] + [1] * 15, said)
        pid = self.person.state()["pid"]
        for code, text in zip(codes, said):
            self.assertNotIn("Traceback", text)
            if code:
                self.assertIn(f"already running (PID {pid}", text)
        self.assertEqual([row.pid for row in self.person.processes()], [pid])

    def test_arguments_that_comfyui_refuses_are_told_at_once_and_change_nothing(self):
        done = self.person.types("run", "--demo", "--port", str(free_port()), "--bogus")
        self.assertClear(done, 1, "code 2", "main.py: error: unrecognized arguments: --bogus")
        self.assertIsNone(self.person.state())
        self.assertEqual(self.person.processes(), [])

    def test_wait_returns_when_it_answers(self):
        done = self.person.types(
            "run", "--demo", "--port", str(free_port()), "--wait", COMFYDOCK_DEMO_START_SECONDS="1"
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("✓ ComfyUI is ready", done.stdout)
        self.assertEqual(self.person.state()["health"]["status"], "healthy")

    def test_wait_shows_the_last_lines_when_it_dies_first(self):
        done = self.person.types(
            "run",
            "--demo",
            "--port",
            str(free_port()),
            "--wait",
            COMFYDOCK_DEMO_START_SECONDS="1",
            COMFYDOCK_DEMO_EXIT="bind:3",
        )
        self.assertClear(done, 1, "ComfyUI ended before it answered", "Starting server")

    def test_wait_gives_up_in_time_and_leaves_it_running(self):
        done = self.person.types(
            "run", "--demo", "--port", str(free_port()), "--wait", "0.5", COMFYDOCK_DEMO_START_SECONDS="60"
        )
        self.assertClear(done, 1, "did not answer within 0.5 s")
        data = self.person.status()
        self.assertEqual((data["state"], data["health"]), ("starting", "starting"))

    def test_variables_are_kept_for_restarts_and_shown_to_nobody(self):
        data = self.run_demo("--set-env", "COMFYDOCK_DEMO_LONG_ANSWER=1234")
        self.assertEqual(self.person.types("restart").returncode, 0)
        state = self.person.state()
        self.assertEqual(state["env"], {"COMFYDOCK_DEMO_LONG_ANSWER": "1234"})
        eventually(lambda: http_status(data["port"]) == 200)
        connection = http.client.HTTPConnection("127.0.0.1", data["port"], timeout=5)
        self.addCleanup(connection.close)
        connection.request("GET", "/system_stats")
        self.assertGreater(len(connection.getresponse().read()), 1234)
        self.assertNotIn(
            "1234", self.person.types("status", "--json").stdout + self.person.types("list", "--json").stdout
        )
        if not WINDOWS:
            self.assertEqual(stat.S_IMODE(os.stat(self.person.state_file()).st_mode), 0o600)

    def test_variables_that_lead_comfyui_astray_are_dropped_and_said_once(self):
        done = self.person.types(
            "run", "--demo", "--port", str(free_port()), __COMFY_CLI_SESSION__="/tmp/x", PYTHONHOME=""
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr.count("__COMFY_CLI_SESSION__"), 1)
        if LINUX:
            environ = Path(f"/proc/{self.person.state()['pid']}/environ").read_bytes()
            self.assertNotIn(b"__COMFY_CLI_SESSION__", environ)
            self.assertIn(b"PYTHONIOENCODING=utf-8", environ)

    def test_listening_to_everyone_is_warned_of_once(self):
        done = self.person.types("run", "--demo", "--port", str(free_port()), "--listen", "0.0.0.0")
        self.assertEqual(done.stderr.count("no password"), 1)
        self.assertIn("http://127.0.0.1:", done.stdout)

    def test_a_port_in_use_is_refused_with_who_holds_it_and_a_free_one(self):
        with listening() as port:
            done = self.person.types("run", "--demo", "--port", str(port))
            self.assertClear(done, 1, f"Port {port} is already in use", "Possible solutions:", "Use a different port: ")
            if LINUX:
                self.assertIn(f"PID {os.getpid()}", done.stderr)
            self.assertIsNone(self.person.state())
            free = int(re.search(r"run --port (\d+)", done.stderr)[1])
            self.assertFalse(dock.is_port_bound(free))
            done = self.person.types("run", "--demo", "--auto-port", "--port", str(port), "--json")
            self.assertGreater(json.loads(done.stdout)["data"]["port"], port)

    def test_two_environments_cannot_both_start_on_a_port_that_is_not_bound_yet(self):
        person = self.person
        person.environment("a")
        person.environment("b")
        port = str(free_port())
        done = person.types("run", "-e", "a", "--port", port, COMFYDOCK_DEMO_START_SECONDS="60")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(dock.is_port_bound(int(port)))
        self.assertClear(
            person.types("run", "-e", "b", "--port", port), 1, f"Port {port} is already in use by environment 'a'"
        )
        self.assertEqual(person.types("run", "-e", "b", "--auto-port", "--port", port).returncode, 0)

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_a_log_over_ten_megabytes_becomes_old_at_start(self):
        log = os.path.join(self.person.workspace, "logs", "demo", "comfyui.log")
        os.makedirs(os.path.dirname(log))
        Path(log).write_bytes(b"earlier\n" * (2 * 1024 * 1024))
        self.start_demo()
        self.assertEqual(os.path.getsize(log + ".old"), 16 * 1024 * 1024)
        self.assertTrue(self.person.log().startswith("=== comfydock session "))
        self.assertTrue(self.person.types("logs", "--all").stdout.startswith("earlier\n"))


class Foreground(Journey):
    def foreground(self, *words, **variables):
        child = self.person.starts("run", "--demo", "--foreground", "--port", str(free_port()), *words, **variables)
        read_until(child, "To see the GUI go to" if "COMFYDOCK_DEMO_START_SECONDS" not in variables else "Streaming")
        return child

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_ctrl_c_stops_comfyui_and_ends_well(self):
        child = self.foreground()
        child.send_signal(signal.SIGINT)
        self.assertEqual(child.wait(30), 0)
        self.assertIn("Stopped server", Path(child.said).read_text(encoding="utf-8"))
        self.assertEqual(self.person.processes(), [])
        self.assertIsNone(self.person.state())

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_a_second_ctrl_c_kills(self):
        child = self.foreground(COMFYDOCK_DEMO_IGNORE="INT,TERM")
        child.send_signal(signal.SIGINT)
        read_until(child, "Stopping ComfyUI")
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        self.assertEqual(child.wait(30), 130)
        self.assertLess(time.monotonic() - began, 6)
        self.assertEqual(self.person.processes(), [])

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_sigterm_and_sighup_stop_it_too(self):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            child = self.foreground()
            child.send_signal(number)
            self.assertEqual(child.wait(30), code)
            self.assertEqual(self.person.processes(), [])

    def test_comfyuis_own_end_is_handed_on(self):
        cases = [("later:3:0.6", 3), ("later:0:0.6", 0)] + ([] if WINDOWS else [("later:segv:0.6", 139)])
        for fault, code in cases:
            with self.subTest(fault=fault):
                child = self.foreground(COMFYDOCK_DEMO_EXIT=fault)
                self.assertEqual(child.wait(30), code)
                self.assertIn("ComfyUI process exited", Path(child.said).read_text(encoding="utf-8"))
                data = self.person.status()
                self.assertEqual(data["state"], "stopped" if code == 0 else "crashed")

    def test_a_stop_from_elsewhere_ends_it_and_is_said(self):
        child = self.foreground()
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.assertEqual(child.wait(30), 0)
        self.assertIn("stopped from elsewhere", Path(child.said).read_text(encoding="utf-8"))

    def test_a_restart_from_elsewhere_is_followed(self):
        child = self.foreground()
        self.assertEqual(self.person.types("restart").returncode, 0)
        eventually(lambda: Path(child.said).read_text(encoding="utf-8").count("To see the GUI") == 2)
        self.assertIsNone(child.poll())
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.assertEqual(child.wait(30), 0)

    @unittest.skipUnless(LINUX and has("unshare") and not os.geteuid(), "needs root and unshare for a PID namespace")
    def test_as_pid_1_it_stays_reaps_and_hands_on_sigterm(self):
        command = self.person.command("run", "--demo", "--port", str(free_port()))
        said = os.path.join(self.person.home, "said")
        with open(said, "wb") as file:
            child = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
                env={**self.person.variables, "COMFYDOCK_DEMO_CHILD": "session"}, cwd=self.person.home, stdout=file, stderr=file,
            )  # fmt: skip
        child.said = said
        self.person.children.append(child)
        text = read_until(child, "To see the GUI go to")
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", text)[1])
        self.assertEqual(http_status(port), 200)
        rows = dock.process_table().rows(containing=MODULE)
        inner = next(row for row in rows if row.command[-1] == str(port) and row.command[1] == MODULE)
        dock.signal_process(inner.pid, "terminate")
        self.assertEqual(child.wait(30), 143)
        self.assertIn("ComfyUI stopped", Path(said).read_text(encoding="utf-8"))


class TellingTheTruth(Journey):
    @unittest.skipIf(WINDOWS, "needs signals")
    def test_after_a_crash_status_tells_of_it_and_restart_starts_with_the_same_arguments(self):
        data = self.run_demo("--cpu")
        os.kill(data["pid"], signal.SIGKILL)
        eventually(lambda: not alive(data["pid"]))
        done = self.person.types("status")
        self.assertEqual(done.returncode, 3)
        for fragment in ("ended by itself", "Last known alive", "Last error", data["log"]):
            self.assertIn(fragment, done.stdout)
        self.assertIn("(crashed)", self.person.types("list").stdout)
        self.assertIn("To see the GUI", self.person.types("logs").stdout)
        self.assertEqual(self.person.types("restart").returncode, 0)
        self.assertEqual(self.person.state()["args"], ["--port", str(data["port"]), "--cpu"])

    def test_the_last_error_line_is_found(self):
        data = self.start_demo(COMFYDOCK_DEMO_EXIT="import:1", COMFYDOCK_DEMO_START_SECONDS="0") if False else None
        done = self.person.types("run", "--demo", "--port", str(free_port()), COMFYDOCK_DEMO_EXIT="import:1")
        self.assertClear(done, 1, "ModuleNotFoundError")
        self.assertIsNone(data)

    def test_alive_but_not_answering_yet_is_told_apart_from_not_responding(self):
        self.start_demo(COMFYDOCK_DEMO_START_SECONDS="60")
        done = self.person.types("status")
        self.assertIn("Starting (alive, not answering yet)", done.stdout)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.start_demo(COMFYDOCK_DEMO_HANG="1")
        eventually(lambda: self.person.status()["state"] == "unresponsive")
        self.assertIn("Not responding", self.person.types("status").stdout)

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_a_stopped_process_is_alive_but_not_responding_and_can_be_ended(self):
        data = self.run_demo()
        os.kill(data["pid"], signal.SIGSTOP)
        self.assertEqual(self.person.status()["state"], "unresponsive")
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.assertFalse(alive(data["pid"]))

    def test_another_program_on_the_port_is_not_taken_for_comfyui(self):
        data = self.start_demo(COMFYDOCK_DEMO_START_SECONDS="60")
        with listening(data["port"], saying(b"HTTP/1.0 404 No\r\n\r\n")):
            self.assertIn(f"Another program answers on port {data['port']}", self.person.types("status").stdout)

    def test_another_comfyui_on_the_port_is_not_taken_for_ours(self):
        data = self.start_demo(COMFYDOCK_DEMO_START_SECONDS="60")
        other = os.path.join(self.person.home, "other", "main.py")
        with listening(data["port"], saying(stats([other]))):
            self.assertNotEqual(self.person.status()["health"], "healthy")

    def test_list_shows_marks_for_all(self):
        for name in ("a", "b"):
            self.person.environment(name)
        self.person.types("use", "b")
        self.run_demo()
        lines = self.person.types("list").stdout.splitlines()
        self.assertEqual(lines[0], "Environments:")
        self.assertRegex(lines[1], r"^    a  +\(stopped\)$")
        self.assertRegex(lines[2], r"^  ✓ b  +\(active\) \(stopped\)$")
        self.assertRegex(lines[3], r"^    demo \(.*demo\) +\(✓ running on http://127\.0\.0\.1:\d+, PID \d+\)$")

    def test_json_is_one_object_with_the_promised_keys(self):
        data = self.run_demo()
        for words in (["status"], ["list"], ["restart"], ["stop"]):
            done = self.person.types(*words, "--json")
            whole = json.loads(done.stdout)
            self.assertEqual(
                (whole["schema"], whole["command"], whole["ok"], whole["error"], done.stderr),
                (1, words[0], True, None, ""),
            )
            self.assertEqual(list(whole), ["schema", "command", "ok", "environment", "data", "error"])
        done = self.person.types("-e", "nobody", "status", "--json")
        whole = json.loads(done.stdout)
        self.assertEqual((done.returncode, whole["ok"], whole["data"]), (1, False, None))
        self.assertEqual(set(whole["error"]), {"message", "hint", "code"})
        self.assertTrue(data["pid"])

    def test_reading_commands_change_nothing(self):
        data = self.start_demo()
        before = Path(self.person.state_file()).read_bytes()
        for words in (["status"], ["list"], ["logs"], ["status", "--json"]):
            self.person.types(*words)
        self.assertEqual(Path(self.person.state_file()).read_bytes(), before)
        self.assertTrue(alive(data["pid"]))


class StoppingAndNothingElse(Journey):
    def write_state(self, **changes):
        self.person.environment("a")
        state = {**PLANS_STATE, "log_path": os.path.join(self.person.home, "x.log"), **changes}
        Path(self.person.state_file("a")).write_text(json.dumps(state), encoding="utf-8")

    def bystander(self, *words, **variables):
        code = "import sys, time; print('up', flush=True); time.sleep(120)"
        child = subprocess.Popen([sys.executable, "-c", code, self.person.home, *words], stdout=subprocess.PIPE,
                                 env={**os.environ, **variables})  # fmt: skip
        self.person.children.append(child)
        child.stdout.readline()
        child.stdout.close()
        return child

    def test_a_pid_that_is_another_python_now_is_never_signalled(self):
        child = self.bystander()
        row = dock.process_table().row(child.pid)
        for identity in ({}, {**dock.identity_of(row), "start_ticks": (row.start_ticks or 0) - 1, "created": 1.0}):
            with self.subTest(identity=identity):
                shutil.rmtree(self.person.workspace, ignore_errors=True)
                shutil.rmtree(os.path.join(self.person.home, "a"), ignore_errors=True)
                self.write_state(pid=child.pid, identity=identity)
                self.assertEqual(self.person.types("-e", "a", "status").returncode, 3)
                done = self.person.types("-e", "a", "stop")
                self.assertEqual((done.returncode, "not running" in done.stdout), (0, True), done.stderr)
                self.assertIsNone(child.poll())

    def test_damaged_state_files_are_one_clear_line_and_stay(self):
        self.person.environment("a")
        path = Path(self.person.state_file("a"))
        for content in (
            b"",
            os.urandom(100),
            b"[1]",
            *(json.dumps({**PLANS_STATE, "pid": pid}).encode() for pid in (-1, 0, 1)),
        ):
            with self.subTest(content=content[:20]):
                path.write_bytes(content)
                for command in ("status", "stop", "restart"):
                    self.assertClear(
                        self.person.types("-e", "a", command), 1, "state file of environment 'a' is damaged"
                    )
                    self.assertEqual(path.read_bytes(), content)

    def test_run_keeps_a_damaged_state_file_beside_it(self):
        self.person.environment("a")
        path = Path(self.person.state_file("a"))
        path.write_bytes(b"nonsense")
        self.assertEqual(self.person.types("-e", "a", "run", "--port", str(free_port())).returncode, 0)
        self.assertEqual(Path(str(path) + ".damaged").read_bytes(), b"nonsense")

    @unittest.skipUnless(LINUX and has("setpriv") and not os.geteuid(), "needs root and setpriv for a second user")
    def test_a_process_of_another_user_is_named_and_not_signalled(self):
        data = self.run_demo()
        for folder, _, files in os.walk(self.person.home):
            os.chmod(folder, 0o777)
            for name in files:
                os.chmod(os.path.join(folder, name), 0o666)
        plain = shutil.which("python3", path="/usr/bin:/bin") or self.skipTest("no python3 that others may run")
        copy = os.path.join(self.person.home, "comfydock.py")
        shutil.copy(MODULE, copy)
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", plain, copy, "-e", "demo", "stop"],
                              env=self.person.variables, cwd=self.person.home, capture_output=True, text=True, timeout=60)  # fmt: skip
        self.assertClear(done, 1, f"PID {data['pid']}", "belongs to another user")
        self.assertTrue(alive(data["pid"]))

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_what_ignores_every_polite_signal_is_killed_in_time_and_its_children_too(self):
        for child in ("yes", "session"):
            with self.subTest(child=child):
                self.run_demo(COMFYDOCK_DEMO_IGNORE="INT,TERM", COMFYDOCK_DEMO_CHILD=child)
                pid = int(re.search(r"child: (\d+)", self.person.types("logs").stdout)[1])
                self.assertTrue(alive(pid))
                began = time.monotonic()
                done = self.person.types("stop", "--timeout", "2")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertLess(time.monotonic() - began, 6)
                eventually(lambda pid=pid: not alive(pid), 3)
                self.assertEqual(self.person.processes(), [])

    @unittest.skipIf(WINDOWS, "needs signals")
    def test_a_clean_stop_is_sigint_and_leaves_the_last_words(self):
        self.run_demo()
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.assertIn("Stopped server", self.person.log())

    def test_kill_does_not_ask_politely(self):
        self.run_demo()
        self.assertEqual(self.person.types("stop", "--kill").returncode, 0)
        self.assertNotIn("Stopped server", self.person.log())
        self.assertEqual(self.person.processes(), [])

    def test_a_run_of_another_machine_is_foreign_until_it_is_taken_over(self):
        self.write_state(identity={"machine": "another", "start_ticks": 1, "boot_id": "b", "pid_ns": "1"})
        before = Path(self.person.state_file("a")).read_bytes()
        done = self.person.types("-e", "a", "status")
        self.assertEqual((done.returncode, "another machine" in done.stdout), (0, True))
        for command in ("run", "stop", "restart"):
            self.assertClear(
                self.person.types("-e", "a", command), 1, "another machine or in another container", "--take-over"
            )
        self.assertEqual(Path(self.person.state_file("a")).read_bytes(), before)
        done = self.person.types("-e", "a", "run", "--take-over", "--port", str(free_port()))
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_state_from_before_a_reboot_is_not_running(self):
        here = dock.identity_of(dock.process_table().row(os.getpid()))
        if here["boot_id"] is None:
            self.skipTest("this system names no boots")
        self.write_state(pid=os.getpid(), identity={**here, "boot_id": "before"})
        self.assertIn("the machine was restarted", self.person.types("-e", "a", "status").stdout)
        self.assertEqual(self.person.types("-e", "a", "stop").returncode, 0)
        self.assertIsNone(self.person.state("a"))


class NobodyGetsLost(Journey):
    def start_by_hand(self, name, **variables):
        """What a starter leaves that was killed between the spawn and the record: a process, and nobody who knows it."""
        checkout = os.path.join(self.person.home, name, "ComfyUI")
        command = [sys.executable, os.path.join(checkout, "main.py"), "--port", str(free_port())]
        child = subprocess.Popen(command, cwd=checkout, env={**self.person.variables, **variables}, start_new_session=not WINDOWS,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.person.children.append(child)
        eventually(lambda: dock.comfyui_processes(checkout))
        return child

    def intent(self, name, run_id):
        state = {
            **PLANS_STATE,
            "pid": None,
            "phase": "starting",
            "run_id": run_id,
            "starter": {"pid": 2**22 - 3, "identity": {}},
        }
        Path(self.person.state_file(name)).write_text(json.dumps(state), encoding="utf-8")

    def test_what_an_interrupted_start_left_is_adopted_and_can_be_stopped(self):
        self.person.environment("a")
        child = self.start_by_hand("a", COMFYDOCK_RUN_ID="the-run")
        self.intent("a", "the-run")
        self.assertEqual(self.person.status("-e", "a")["pid"], child.pid)
        self.assertClear(self.person.types("-e", "a", "run"), 1, f"already running (PID {child.pid}")
        self.assertEqual(self.person.state("a")["pid"], child.pid)
        self.assertEqual(self.person.types("-e", "a", "stop").returncode, 0)
        self.assertIsNotNone(child.wait(10))

    def test_an_interrupted_start_that_left_nothing_is_told_and_started_over(self):
        self.person.environment("a")
        self.intent("a", "the-run")
        self.assertIn("a start was interrupted", self.person.types("-e", "a", "status").stdout)
        self.assertEqual(self.person.types("-e", "a", "run", "--port", str(free_port())).returncode, 0)

    def test_a_comfyui_started_by_hand_is_named_and_left_alone(self):
        self.person.environment("a")
        child = self.start_by_hand("a")
        self.assertEqual(self.person.status("-e", "a")["note"], "untracked")
        for command in ("run", "stop"):
            self.assertClear(self.person.types("-e", "a", command), 1, f"PID {child.pid} runs this ComfyUI")
        self.assertIsNone(child.poll())

    def test_repair_takes_an_orphan_back_or_ends_it(self):
        self.person.environment("a")
        child = self.start_by_hand("a")
        done = self.person.types("-e", "a", "repair", "--orphan")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"PID {child.pid}", done.stdout)
        self.assertIsNone(self.person.state("a"))
        self.assertEqual(self.person.types("-e", "a", "repair", "--orphan", "--adopt").returncode, 0)
        self.assertEqual(self.person.state("a")["pid"], child.pid)
        self.assertIn("No orphaned processes found", self.person.types("-e", "a", "repair", "--orphan").stdout)
        os.remove(self.person.state_file("a"))
        done = self.person.types("-e", "a", "repair", "--orphan", "--end", "--json")
        self.assertEqual(json.loads(done.stdout)["data"]["orphans"][0]["action"], "ended")
        self.assertIsNotNone(child.wait(10))

    def test_repair_cleans_a_stale_state_file_and_keeps_a_damaged_one(self):
        self.person.environment("a")
        self.intent("a", "the-run")
        self.assertIn("Cleaned a stale", self.person.types("-e", "a", "repair", "--orphan").stdout)
        self.assertIsNone(self.person.state("a"))
        Path(self.person.state_file("a")).write_bytes(b"nonsense")
        self.assertIn("Cleaned a stale", self.person.types("-e", "a", "repair", "--orphan").stdout)
        self.assertEqual(Path(self.person.state_file("a") + ".damaged").read_bytes(), b"nonsense")

    @unittest.skipUnless(LINUX, "re-exec under the same PID")
    def test_a_restart_by_comfyui_manager_keeps_it_tracked(self):
        data = self.run_demo()
        with contextlib.suppress(OSError, http.client.HTTPException):
            post(data["port"], "/manager/reboot", {})
        eventually(lambda: self.person.log().count("To see the GUI") == 2)
        again = self.person.status()
        self.assertEqual((again["pid"], again["state"], again["note"]), (data["pid"], "running", None))
        self.assertEqual(self.person.types("stop").returncode, 0)


class Logs(Journey):
    @staticmethod
    def noise():
        return b"bad \xff\xfe bytes\n" + b"x" * 200000 + b"\n\r 0%\r 50%\r100%\nlast line\n"

    def test_invalid_bytes_long_lines_and_progress_bars_pass_through(self):
        self.run_demo()
        log = os.path.join(self.person.workspace, "logs", "demo", "comfyui.log")
        with open(log, "ab") as file:
            file.write(self.noise())
        command = self.person.command("logs")
        whole = subprocess.run(
            command, env=self.person.variables, cwd=self.person.home, capture_output=True, timeout=30
        )
        self.assertTrue(whole.stdout.replace(b"\r\n", b"\n").endswith(self.noise()) or WINDOWS)
        self.assertEqual((whole.returncode, whole.stderr), (0, b""))
        self.assertEqual(self.person.types("logs", "-n", "1").stdout, "last line\n")

    def test_follow_shows_the_noise_of_a_living_server_and_goes_on_through_a_restart(self):
        self.run_demo(COMFYDOCK_DEMO_NOISE="1")
        child = self.person.starts("logs", "-f", "-n", "3")
        read_until(child, "To see the GUI")
        self.assertEqual(self.person.types("restart").returncode, 0)
        eventually(lambda: Path(child.said).read_text(encoding="utf-8", errors="replace").count("To see the GUI") == 2)
        self.assertEqual(self.person.types("stop").returncode, 0)
        self.assertEqual(child.wait(20), 0)
        self.assertIn("ComfyUI process exited", Path(child.said).read_text(encoding="utf-8", errors="replace"))

    def test_logs_shows_this_run_and_all_shows_the_earlier_too(self):
        self.run_demo()
        self.person.types("restart")
        self.assertEqual(self.person.types("logs").stdout.count("=== comfydock session"), 1)
        self.assertEqual(self.person.types("logs", "--all").stdout.count("=== comfydock session"), 2)
        self.person.types("stop")
        self.assertEqual(self.person.types("logs").stdout.count("=== comfydock session"), 1)
        path = self.person.types("logs", "--path").stdout.strip()
        self.assertTrue(os.path.isfile(path), path)

    def test_a_reader_that_leaves_early_is_no_fault(self):
        self.run_demo()
        log = os.path.join(self.person.workspace, "logs", "demo", "comfyui.log")
        with open(log, "ab") as file:
            file.write(b"line\n" * 100000)
        child = subprocess.Popen(self.person.command("logs"), env=self.person.variables, cwd=self.person.home,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        child.stdout.readline()
        child.stdout.close()
        self.assertEqual((child.wait(20), child.stderr.read()), (0, b""))
        child.stderr.close()

    def test_no_log_is_one_clear_line(self):
        self.person.environment("a")
        self.assertClear(self.person.types("-e", "a", "logs"), 1, "No log file found.")


class WhichEnvironment(Journey):
    def test_a_checkout_is_adopted_where_it_stands(self):
        person = self.person
        checkout = person.checkout()
        inside = os.path.join(checkout, "custom_nodes")
        before = sorted(os.listdir(checkout))
        self.assertClear(person.types("status", cwd=inside), 1, "No environment has adopted")
        if WINDOWS:
            done = person.types("create", "code", "--from", checkout, "--python", sys.executable)
            self.assertEqual(done.returncode, 0, done.stderr)
        done = person.types("run", "--port", str(free_port()), cwd=inside)
        self.assertEqual(done.returncode, 0, done.stderr)
        if not WINDOWS:
            self.assertIn("Adopted", done.stdout)
        self.assertEqual(sorted(os.listdir(checkout)), before)
        state = person.state("code")
        self.assertEqual(state["command"][1], os.path.join(checkout, "main.py"))
        self.assertIn("Environment: code", person.types("status", cwd=checkout).stdout)
        self.assertEqual(person.types("stop", cwd=checkout).returncode, 0)

    @unittest.skipIf(WINDOWS, "venvs are made by links here")
    def test_the_python_of_a_checkout_is_found_and_gets_its_environment(self):
        person = self.person
        checkout = person.checkout()
        person.types("run", "--port", str(free_port()), cwd=checkout)
        state = person.state("code")
        self.assertEqual(state["command"][0], os.path.join(checkout, ".venv", "bin", "python"))
        if LINUX:
            environ = Path(f"/proc/{state['pid']}/environ").read_bytes().split(b"\0")
            self.assertIn(f"VIRTUAL_ENV={checkout}/.venv".encode(), environ)

    def test_by_name_by_folder_the_active_one_the_only_one(self):
        person = self.person
        self.assertClear(person.types("status"), 1, "There is no environment", "run --demo")
        person.environment("a")
        self.assertIn("Environment: a", person.types("status").stdout)
        person.environment("b")
        self.assertClear(person.types("status"), 1, "Which environment?", "a, b")
        self.assertEqual(person.types("use", "b").returncode, 0)
        self.assertIn("Environment: b", person.types("status").stdout)
        self.assertIn("Environment: a", person.types("-e", "a", "status").stdout)
        self.assertIn("Environment: a", person.types("status", "--env=a").stdout)
        inside = os.path.join(person.workspace, "environments", "a", ".cec")
        self.assertIn("Environment: a", person.types("status", cwd=inside).stdout)
        self.assertIn("Environment: a", person.types("status", cwd=os.path.join(person.home, "a", "ComfyUI")).stdout)
        self.assertClear(person.types("-e", "bb", "status"), 1, "There is no environment 'bb'", "did you mean 'b'")

    def test_another_workspace_can_be_named(self):
        other = os.path.join(self.person.home, "elsewhere")
        done = self.person.types("--workspace", other, "run", "--demo", "--port", str(free_port()))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(os.path.exists(self.person.workspace))
        self.assertEqual(self.person.types("stop", COMFYDOCK_HOME=other).returncode, 0)

    def test_bad_input_is_one_clear_line_and_changes_nothing(self):
        person = self.person
        checkout = person.checkout()
        empty = os.path.join(person.home, "empty")
        os.makedirs(empty)
        person.environment("a")
        cases = [
            (["-e", "nobody", "run"], 1), (["-e", "a/b", "run"], 2), (["-e", "..", "status"], 2), (["-e", "", "status"], 2),
            (["-e", "a", "run", "--port", "0"], 2), (["-e", "a", "run", "--port", "70000"], 2),
            (["-e", "a", "run", "--port", "abc"], 2), (["create", "x", "--from", empty], 1),
            (["create", "../x", "--from", checkout], 2), (["create", "logs", "--from", checkout], 2),
            (["create", "a", "--from", checkout, "--python", sys.executable], 1),
            (["create", "y", "--from", checkout, "--python", "/nowhere/python"], 1), (["use", "nobody"], 1), (["frob"], 2),
            (["--workspace", os.path.join(checkout, "main.py"), "list"], 1),
        ]  # fmt: skip
        before = self.everything()
        for words, code in cases:
            with self.subTest(words=words):
                self.assertClear(person.types(*words), code)
                self.assertEqual(self.everything(), before)
        self.assertEqual(person.processes(), [])

    def everything(self):
        """Every file below the home, but for the locks."""
        files = {}
        for folder, _, names in os.walk(self.person.home):
            for name in names:
                path = os.path.join(folder, name)
                if not name.endswith(".lock") and not os.path.islink(path):
                    files[path] = Path(path).read_bytes()
        return files

    def test_a_python_that_is_gone_is_named(self):
        self.person.environment("a")
        manifest = dock.Workspace(self.person.workspace).get_environment("a")
        gone = os.path.join(self.person.home, "gone")
        with (
            unittest.mock.patch.object(dock.Environment, "python", gone),
            self.assertRaises(dock.CDEnvironmentError) as caught,
        ):
            manifest.run()
        self.assertIn(gone, caught.exception.message)

    @unittest.skipUnless(not WINDOWS and os.geteuid(), "root may write everywhere")
    def test_a_log_folder_that_cannot_be_written_is_named(self):
        self.person.environment("a")
        logs = os.path.join(self.person.workspace, "logs")
        os.makedirs(logs)
        os.chmod(logs, 0o500)
        self.addCleanup(os.chmod, logs, 0o700)
        self.assertClear(self.person.types("-e", "a", "run", "--port", str(free_port())), 1, logs)
        self.assertIsNone(self.person.state("a"))

    def test_a_log_folder_that_is_a_file_is_named_and_nothing_starts(self):
        self.person.environment("a")
        Path(self.person.workspace, "logs").write_text("", encoding="utf-8")
        self.assertClear(self.person.types("-e", "a", "run", "--port", str(free_port())), 1, "logs")
        self.assertIsNone(self.person.state("a"))
        self.assertEqual(self.person.processes(), [])


class AsALibrary(Journey):
    CODE = """
import comfydock, threading, sys, json
workspace = comfydock.Workspace(sys.argv[1])
environment = workspace.get_environment("demo")
facts = {}
def work():
    done = environment.run(["--port", sys.argv[2]])
    facts["run"] = [done.returncode, done.stdout]
    facts["running"] = environment.is_running()
    facts["restart"] = environment.restart()
    facts["state"] = environment._read_state().port
    facts["stop"] = environment.stop(timeout=10)
    facts["again"] = environment.stop()
    facts["paths"] = [str(environment.cec_path), str(environment.comfyui_path), str(environment._state_file)]
    facts["logs"] = str(workspace.paths.logs)
    facts["names"] = [one.name for one in workspace.list_environments()]
    facts["active"] = workspace.get_active_environment()
thread = threading.Thread(target=work)
thread.start()
thread.join()
sys.__stderr__.write(json.dumps(facts))
"""

    def test_it_runs_off_the_main_thread_and_never_prints(self):
        self.start_demo()
        self.person.types("stop")
        port = free_port()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-X", "dev", "-c", self.CODE, self.person.workspace, str(port)],
            cwd=HERE, env=self.person.variables, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        facts = json.loads(done.stderr)
        self.assertEqual(facts["run"], [0, f"Started on 127.0.0.1:{port}"])
        self.assertEqual((facts["running"], facts["restart"], facts["stop"], facts["again"]), (True, True, True, False))
        self.assertEqual((facts["state"], facts["names"], facts["active"]), (port, ["demo"], None))
        self.assertEqual(facts["logs"], os.path.join(self.person.workspace, "logs"))

    def test_errors_are_raised_with_a_hint(self):
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            dock.Workspace(self.person.workspace).get_environment("nobody")
        self.assertTrue(caught.exception.hint)


class Result(unittest.TextTestResult):
    """Counts what passed, which unittest does not."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def flattened(suite):
    """Every test of a suite of suites."""
    for case in suite:
        if isinstance(case, unittest.TestSuite):
            yield from flattened(case)
        else:
            yield case


def main():
    """Run the tests that the words of the call ask for; the last line counts them."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"__main__.{word}" for word in words] or ["__main__"])
    if "--units" in sys.argv:
        suite = unittest.TestSuite(case for case in flattened(suite) if not isinstance(case, Journey))
    runner = unittest.TextTestRunner(resultclass=Result, verbosity=2 if "--verbose" in sys.argv else 1)
    result = runner.run(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
