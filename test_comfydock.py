#!/usr/bin/env python3
"""Tests of comfydock: `python3 test_comfydock.py [--units] [--long] [NAME...]`.

In the order of the module's sections; then the house itself; then the journeys, which start real processes through the real
command. Nothing but loopback is used, and nothing is left running.
"""

import ast
import atexit
import builtins
import contextlib
import dis
import errno
import functools
import gc
import glob
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import ntpath
import os
import plistlib
import posixpath
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.request
import uuid
import warnings
import xml.etree.ElementTree
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os.path import join
from pathlib import Path
from unittest.mock import Mock, patch

import comfydock as dock

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = join(HERE, "comfydock.py")
WINDOWS = os.name == "nt"
LINUX = sys.platform.startswith("linux")
WINE = WINDOWS and hasattr(__import__("ctypes").WinDLL("ntdll"), "wine_get_version")

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
    row = dock.process_table().process(pid)
    return row is not None and row.state != "zombie"


def pause(pid):
    """Have a process stand still; Windows does not show that it does, but says so only then."""
    dock.signal_process(pid, "pause")
    eventually(lambda: WINDOWS or dock.process_table().process(pid).state == "stopped")


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


STUB = "import sys\nfrom comfydock import main\nsys.exit(main())\n"  # what installers put into bin/comfydock


def misbehave():  # noqa: C901  # a whole program
    """Faults of a ComfyUI on demand, put before the program of the demo (`double_source`).

    They come from variables COMFYDOCK_DEMO_<NAME>: START_SECONDS N, STOP_SECONDS N; EXIT WHEN:CODE[:N] ends with CODE, or
    crashes if it is "segv", at "import", "bind" (after the GUI line) or "later" (N seconds after it); HANG answers nothing;
    REFUSE what argparse refuses; IGNORE INT,TERM; CHILD yes|session leaves a child behind, in a session of its own; SAY TEXT;
    NOISE logs what is no UTF-8, bars and a line of 200,000 characters; SPAM N[:BYTES] logs N numbered lines a second.
    """
    import argparse
    import http.server
    import itertools
    import logging
    import os
    import signal
    import subprocess
    import sys
    import threading
    import time

    prefix = "COMFYDOCK_DEMO_"
    faults = {name[len(prefix) :]: value for name, value in os.environ.items() if name.startswith(prefix)}
    moment, code, seconds = (faults.get("EXIT", "") + "::").split(":")[:3]
    info, parse = logging.info, argparse.ArgumentParser.parse_known_args

    def leave():
        if code == "segv":  # Windows: TerminateProcess with the code of an access violation
            os.kill(os.getpid(), 0xC0000005 if os.name == "nt" else signal.SIGSEGV)
        os._exit(int(code))

    def strict(self):
        args, unknown = parse(self)
        return (args, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")

    def hang(self):
        while self.connection.recv(65536):
            pass

    def spam():
        rate, _, size = faults["SPAM"].partition(":")
        began = time.monotonic()
        for number in itertools.count(1):
            while number > (time.monotonic() - began) * float(rate):
                time.sleep(0.01)
            os.write(2, f"spam {number} ".ljust(int(size or 0), ".").encode() + b"\n")

    def say(text):
        if text.startswith("Total VRAM"):
            time.sleep(float(faults.get("START_SECONDS", 0)))
        info(text)
        if text == "\nStopped server":
            time.sleep(float(faults.get("STOP_SECONDS", 0)))
        if text.startswith("To see the GUI") and moment == "bind":
            leave()
        if text.startswith("To see the GUI") and moment == "later":
            threading.Timer(float(seconds), leave).start()
        if text.startswith("To see the GUI") and "SPAM" in faults:
            threading.Thread(target=spam, daemon=True).start()

    if "REFUSE" in faults:
        argparse.ArgumentParser.parse_known_args = strict
    if "HANG" in faults:
        http.server.BaseHTTPRequestHandler.handle = hang
    logging.info = say
    for name in filter(None, faults.get("IGNORE", "").split(",")):
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    if moment == "import":
        sys.stderr.write("Traceback (most recent call last):\nModuleNotFoundError: No module named 'PIL'\n")
        leave()
    if "SAY" in faults:
        os.write(2, f"said: {faults['SAY']}\n".encode())
    if "CHILD" in faults:
        command, apart = [sys.executable, "-c", "import time; time.sleep(600)"], faults["CHILD"] == "session"
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=apart)
        os.write(2, f"child: {child.pid}\n".encode())
    if "NOISE" in faults:
        bars = "".join(f"\r{20 * n:3}%|{chr(0x2588) * n:5}| {n}/5 [00:0{n}<00:0{5 - n},  1.00it/s]" for n in range(6))
        os.write(2, b"bad \xff\xfe bytes\n" + bars.encode() + b"\n" + b"x" * 200000 + b"\n")


@functools.cache
def double_source():
    """The text of a `main.py` that is the demo with its faults."""
    return f"{inspect.getsource(misbehave)}\n\nmisbehave()\n{dock.demo_source()}"


@functools.cache
def installed(*more):
    """The command `comfydock` of the module beside this file; it starts from compiled code, thrice as fast.

    Its demo is the double; `more` are lines that are executed first.
    """
    folder = tempfile.mkdtemp(prefix="comfydock bin ")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, double = join(folder, "comfydock"), join(folder, "double.py")
    Path(double).write_bytes(double_source().encode())
    lines = [f"sys.path.insert(0, {HERE!r})", "import comfydock"]
    lines += [f"comfydock.demo_source = lambda: open({double!r}, encoding='utf-8').read()", *more]
    Path(path).write_text(STUB.replace("\n", "\n".join(["", *lines, ""]), 1), encoding="utf-8")
    return path


class Person:
    """Somebody with an empty home who types commands; `test` cleans up whatever is left running at the end.

    `program` is what is typed: the command `comfydock`, or MODULE for the file itself.
    """

    def __init__(self, test, **variables):
        self.program = installed()
        self.home = temporary_folder(test)
        self.workspace = join(self.home, ".comfydock")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("COMFYDOCK_", "PYTHON"))}
        forced = {
            key: os.environ[key] for key in ("COMFYDOCK_PROCESS_TABLE", "COVERAGE_PROCESS_START") if key in os.environ
        }
        self.variables = {**kept, **forced, "HOME": self.home, "USERPROFILE": self.home, "PYTHONUTF8": "1", **variables}
        self.variables.pop("CONDA_PREFIX", None)
        self.variables["PATH"] = os.path.dirname(self.program) + os.pathsep + self.variables.get("PATH", os.defpath)
        self.children = []
        self.prefix = []  # what runs the command: strace, nsenter, a shell
        test.addCleanup(self.clean_up)

    def command(self, *words):
        return [*self.prefix, sys.executable, self.program, *words]

    def types(self, *words, cwd=None, seconds=60, stdin=subprocess.DEVNULL, **variables):
        """Run one command to its end; returns the CompletedProcess with text."""
        return subprocess.run(self.command(*words), cwd=cwd or self.home, env={**self.variables, **variables},
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds, encoding="utf-8",
            errors="replace")  # fmt: skip

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
                creationflags=subprocess.CREATE_NO_WINDOW if WINDOWS else 0,  # a console of its own, for Ctrl-C
            )
        child.said = said.name
        self.children.append(child)
        return child

    def at_a_terminal(self, *words, answers=()):
        """Run one command at a pseudo-terminal that answers its questions; returns (exit code, all it shows)."""
        import pty

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            os.execve(sys.executable, self.command(*words), self.variables)
        said, answers = b"", list(answers)
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while piece := os.read(terminal, 4096):
                said += piece
                if said.rstrip().endswith((b"[Y/n]", b"[y/N]")) and answers:
                    os.write(terminal, answers.pop(0))
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode("utf-8", "replace")

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
        return join(self.workspace, "environments", name, ".cec", ".comfyui.state")

    def log(self, name="demo"):
        with open(join(self.workspace, "logs", name, "comfyui.log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def checkout(self, name="ComfyUI", parent="code"):
        """A folder that looks like a ComfyUI checkout with a venv, made of the demo."""
        folder = join(self.home, parent, name)
        os.makedirs(join(folder, "custom_nodes"))
        for file, text in (("main.py", double_source()), ("nodes.py", ""), ("folder_paths.py", "")):
            Path(folder, file).write_text(text, encoding="utf-8")
        python = dock.venv_python(join(folder, ".venv"))
        os.makedirs(os.path.dirname(python))
        if not WINDOWS:
            os.symlink(sys.executable, python)
            Path(folder, ".venv", "pyvenv.cfg").write_text(
                f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n", encoding="utf-8"
            )
        return folder

    def environment(self, name, checkout=None):
        """An adopted environment of that name, with a checkout of its own if none is given; it has no history."""
        with patch.object(dock, "git_path", return_value=None):  # a history takes most of the time
            return dock.Workspace(self.workspace).adopt(checkout or self.checkout(parent=name), name, sys.executable)

    def processes(self):
        """Every process that has this home in its command line: ours alone."""
        rows = dock.process_table().processes(containing=self.home)
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


def error_of(function, *words, **named):
    """The CDEnvironmentError that a call raises."""
    try:
        said = function(*words, **named)
    except dock.CDEnvironmentError as error:
        return error
    raise AssertionError(f"no error, but {said!r}")


def has(program):
    return shutil.which(program) is not None


def has_module(name):
    """Whether a module can be imported."""
    return importlib.util.find_spec(name) is not None


def can_link():
    """Whether links can be made: not under Wine, and on Windows only with a right that few have."""
    with tempfile.TemporaryDirectory() as folder:
        link = join(folder, "link")
        with contextlib.suppress(OSError):
            os.symlink(folder, link)
        return os.path.islink(link) and os.path.isdir(link)


needs_git = unittest.skipUnless(has("git"), "needs git")
needs_links = unittest.skipUnless(can_link(), "needs links, which Wine does not make")


# ======================================================================================================================
# Props: a workshop with wheels, repositories and a registry
# ======================================================================================================================


def untold_keys(line, command):
    """The keys in the "data" of a command's JSON that the lines of `help json` about this command do not name."""
    text = re.search(rf"\n  {command}\b.*?(?=\n  \w|\nExit)", dock.TOPICS["json"], re.DOTALL)[0]
    data = json.loads(line)["data"]
    keys = {*data, *(key for value in data.values() if isinstance(value, list) for one in value for key in one)}
    return {key for key in keys if not re.search(rf"[ {{]{key}\b", text)}


class Workshop:
    """What all tests share: a folder, wheels, a stand-in for ComfyUI, a registry, and one environment with a venv."""

    root = wheels = comfyui = python = ""
    registry = None
    paths = None


def write(path, text):
    """Write a file with its folders."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text if "\r" in text else textwrap.dedent(text))  # to Python 3.14 a blank line's \r is indentation


def read_bytes(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def tree(folder):
    """All files below a folder with their bytes, but for git's and Python's own."""
    found = {}
    for here, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in (".git", "__pycache__")]
        found.update({Path(here, name).relative_to(folder).as_posix(): read_bytes(join(here, name)) for name in files})
    return found


def make_wheel(name, version, requires=(), files=None):
    """A tiny wheel, written by hand."""
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    members = {**(files or {f"{plain}.py": f"version = {version!r}\n"}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {item}\n" for item in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}  # fmt: skip
    record = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(join(Workshop.wheels, f"{plain}-{version}-py3-none-any.whl"), "w") as file:
        for member, text in {**members, f"{info}/RECORD": record}.items():
            file.writestr(member, text)


def git(folder, *words):
    """Run git as some user."""
    done = subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=folder, check=True,
        stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    return done.stdout.strip()


def make_repository(name, files, *tags):
    """A repository with one commit; returns its path."""
    folder = join(Workshop.root, "repositories", name)
    os.makedirs(folder)
    git(folder, "init", "--quiet", "-b", "main")
    commit(folder, files, *tags)
    return folder


def commit(folder, files, *tags):
    """Another commit."""
    for path, text in files.items():
        write(join(folder, path), text)
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "x")
    for tag in tags:
        git(folder, "tag", tag)
    return git(folder, "rev-parse", "HEAD")


def zipped(files):
    """A zip archive as bytes; names may be ZipInfo."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return buffer.getvalue()


class Registry(ThreadingHTTPServer):
    """A stand-in for api.comfy.org: `answers` by path, each (status, headers, body) or a list of such, one a call."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.calls = {}, []
        super().__init__(("127.0.0.1", 0), RegistryHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def say(self, path, body, status=200, **headers):
        self.answers[path] = (status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())

    def publish(self, identity, version, files, status="NodeVersionStatusActive", latest=True, **more):
        path = f"/files/{identity}/{version}/node.zip"
        self.say(path, files if isinstance(files, bytes) else zipped(files))
        release = {"version": version, "downloadUrl": self.url + path, "dependencies": [], "deprecated": False,
            "status": status, **more}  # fmt: skip
        self.say(f"/nodes/{identity}/versions/{version}", release)
        if latest:
            self.say(f"/nodes/{identity}", {"id": identity, "name": f"The {identity}", "status": "NodeStatusActive",
                "repository": f"https://github.com/x/{identity}", "latest_version": release})  # fmt: skip


class RegistryHandler(BaseHTTPRequestHandler):
    """Gives the answers of the Registry."""

    def do_GET(self):
        self.server.calls.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path, (404, {}, b'{"message": "not found"}'))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        status, headers, body = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: headers.get("cut")])

    def log_message(self, *words):
        pass


FILE_EFFECTS = [
    (dock, name)
    for name in ("write_atomic", "replace_file", "move", "remove_file", "remove_tree", "make_folder", "unpack_from", "link_folder", "clone")
]  # fmt: skip


def killed_at(point, work, effects=FILE_EFFECTS, number=None):
    """Do `work` in a fork that gets a signal (SIGKILL) before its `point`th effect.

    Returns None when that killed it, the words of the exception that it became, or else the names of its effects.
    """

    def deadly(name, real):
        def call(*arguments, **named):
            done.append(name)
            if len(done) == point:
                kill(os.getpid(), number or signal.SIGKILL)
            return real(*arguments, **named)

        return call

    done, kill = [], os.kill
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12 on, about forks beside threads
        pid = os.fork()
    if pid == 0:
        try:
            for owner, name in effects:
                setattr(owner, name, deadly(name, getattr(owner, name)))
            work()
            os.write(writer, json.dumps(done).encode())
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    is_killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    said = None if is_killed else json.loads(said)
    if isinstance(said, str) and number is None:
        raise AssertionError(said)
    return said


def raise_workshop():
    """Build what node tests share, once: about five seconds."""
    if Workshop.root:
        return
    Workshop.root = os.path.realpath(tempfile.mkdtemp(prefix="nodes-test-"))
    Workshop.wheels = join(Workshop.root, "wheels")
    os.makedirs(Workshop.wheels)
    dock.run_command, dock.make_venv = run_command, make_venv
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "GIT_"))]:
        del os.environ[name]
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=Workshop.wheels, PIP_CONFIG_FILE=os.devnull, HOME=Workshop.root,
        GIT_CONFIG_NOSYSTEM="1", PIP_NO_CACHE_DIR="1")  # fmt: skip
    for name, version in (("torch", "2.0.0+cpu"), ("torchvision", "0.15.0+cpu"), ("torchaudio", "2.0.0+cpu"),
        ("numpy", "1.26.0"), ("numpy", "2.0.0"), ("tiny", "1.0"), ("tiny", "2.0"), ("brand", "1.0"),
        ("comfyui_manager", "4.2")):  # fmt: skip
        make_wheel(name, version)
    make_wheel("wants-new-torch", "1.0", ["torch>=3"])
    Workshop.registry = Registry()
    os.environ["COMFYDOCK_REGISTRY_URL"] = Workshop.registry.url
    if not has("git"):  # as under Wine: tests that need repositories are skipped
        return
    code = {"main.py": "print('ComfyUI')\n", "requirements.txt": "torch\ntorchvision\ntorchaudio\nnumpy<2\n",
        "comfyui_version.py": '__version__ = "0.9.0"\n', "custom_nodes/websocket_image_save.py": ""}  # fmt: skip
    Workshop.comfyui = make_repository("ComfyUI", code, "v0.9.0", "v0.10.0-rc1", "v1.0")
    commit(Workshop.comfyui, {"comfyui_version.py": '__version__ = "0.10.0"\n'}, "v0.10.0")
    commit(Workshop.comfyui, {"later.py": ""})


FORKED_PIP = """
import json, os, sys
from pip._internal.cli.main import main
for words in ("install --dry-run --ignore-installed tiny", "uninstall --yes no-such-package", "check"):  # which imports and looks up the rest
    main(["-qqq", *words.split()])
for line in sys.stdin:
    words, folder, variables, said = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in enumerate([os.devnull, *said]):
            os.dup2(os.open(path, os.O_RDWR), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def pip_of(python):
    """A process of an interpreter that has imported pip and forks for each call, as its imports take most of the time."""
    links = f"{Workshop.wheels}-at-first"  # pip from 24 on reads a folder once: not the one that is still to grow
    shutil.copytree(Workshop.wheels, links, dirs_exist_ok=True)
    variables = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([python, "-c", FORKED_PIP], env=variables, **pipes)
    atexit.register(lambda: (process.stdin.close(), process.stdout.close(), process.wait()))
    return process


def run_command(cmd, cwd=None, env=None, *options, real=dock.run_command, **named):
    """`comfydock.run_command`, but that pip is the one of `pip_of`."""
    is_fresh = sys.version_info >= (3, 11)  # before, pip goes by the packages that were there when it was imported
    if cmd[1:3] != ["-m", "pip"] or WINDOWS or not is_fresh or not cmd[0].startswith(Workshop.root):
        return real(cmd, cwd, env, *options, **named)
    process = pip_of(cmd[0])
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = (cmd[3:], cwd, env or dict(os.environ), (out.name, err.name))
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return subprocess.CompletedProcess(cmd, int(process.stdout.readline()), out.read(), err.read())


def tearDownModule():
    """Take the workshop down."""
    if not Workshop.root:
        return
    Workshop.registry.shutdown()
    Workshop.registry.server_close()
    shutil.rmtree(Workshop.root)


def packages_in(venv):
    """The folder of a venv's packages."""
    return glob.glob(join(glob.escape(venv), "[Ll]ib", "**", "site-packages"), recursive=True)[0]


def make_venv(folder, python, real=dock.make_venv):
    """A copy of a venv that comfydock made; pip stands not in it but beside it: a thousand files less to copy."""
    if python != sys.executable or has("uv"):
        return real(folder, python)
    shared = os.environ.get(CLAIMS, Workshop.root)
    venv, pip = join(shared, "a venv"), join(shared, "its pip")
    with dock.locked(join(shared, "venv.lock"), 120, "tests"):
        if not os.path.exists(pip):
            real(venv, python)
            packages = packages_in(venv)
            os.rename(packages, pip)
            write(join(packages, "pip.pth"), pip)
    return shutil.copytree(venv, folder, symlinks=True)


def shared_environment():
    """The environment that all share, made by the first who asks: its venv is costly."""
    if Workshop.paths is None:
        paths = dock.EnvironmentPaths(join(Workshop.root, "environments", "main"))
        dock.create_environment(
            paths, lambda line: None, source=Workshop.comfyui, python=sys.executable, torch_backend="cpu"
        )
        make_wheel("torch", "3.0.0")
        Workshop.paths, Workshop.python = paths, dock.venv_python(paths.venv)
    return Workshop.paths


class InWorkshop(unittest.TestCase):
    """A test that needs wheels, repositories or the registry."""

    @classmethod
    def setUpClass(cls):
        raise_workshop()


@needs_git
class NodeCase(InWorkshop):
    """A test with an environment of its own that uses the shared venv."""

    counter = 0

    def setUp(self):
        """Make the environment: code and manifest, no venv."""
        shared_environment()
        NodeCase.counter += 1
        self.paths = dock.EnvironmentPaths(join(Workshop.root, "environments", f"e{NodeCase.counter}"))
        os.makedirs(self.paths.cec)
        shutil.copyfile(Workshop.paths.manifest, self.paths.manifest)
        shutil.copytree(Workshop.paths.comfyui, self.paths.comfyui)
        self.said = []
        self.manager = dock.NodeManager(self.paths, Workshop.python, self.said.append)
        self.nodes = join(self.paths.comfyui, "custom_nodes")

    def failing(self, words, function, *arguments, error=dock.CDEnvironmentError, **named):
        """The error with these words that a call raises."""
        with self.assertRaises(error) as caught:
            function(*arguments, **named)
        self.assertIn(words, caught.exception.message)
        self.assertNotIn("\n", caught.exception.message)
        return caught.exception

    def freeze(self):
        """What the shared venv holds; by its folders, as pip takes half a second."""
        names = os.listdir(packages_in(Workshop.paths.venv))
        return sorted(name[:-10].replace("-", "==") for name in names if name.endswith(".dist-info"))

    def snapshot(self):
        """All that a failed change must leave alone."""
        return read_bytes(self.paths.manifest), tree(self.nodes), os.listdir(self.nodes), self.freeze()


# ======================================================================================================================
# 1. Words
# ======================================================================================================================

PLANS_STATE = {"pid": 12345, "host": "0.0.0.0", "port": 8188, "args": ["--listen"], "started_at": "2026-01-02T03:04:05",
    "log_path": "/tmp/comfyui.log", "health": {"last_check": None, "status": None}}  # fmt: skip


class ArgumentsAreReadAsComfyUIReadsThem(unittest.TestCase):
    def test_host_port_and_tls_of_many_spellings(self):
        wildcard = "0.0.0.0,::"
        cases = [([], ("127.0.0.1", 8188, False)), (["--port", "9"], ("127.0.0.1", 9, False)),
            (["--port=9"], ("127.0.0.1", 9, False)), (["--por", "9"], ("127.0.0.1", 9, False)),
            (["--po=9"], ("127.0.0.1", 9, False)), (["--port", "1", "--port", "2"], ("127.0.0.1", 2, False)),
            (["--port", "08188"], ("127.0.0.1", 8188, False)), (["--port", "+9"], ("127.0.0.1", 9, False)),
            (["--listen"], (wildcard, 8188, False)), (["--lis", "1.2.3.4"], ("1.2.3.4", 8188, False)),
            (["--listen", "127.0.0.1", "--listen"], (wildcard, 8188, False)),
            (["--listen", "--port", "9"], (wildcard, 9, False)), (["--listen="], ("", 8188, False)),
            (["--listen", "a,b"], ("a,b", 8188, False)),
            (["--tls-keyfile", "k", "--tls-certfile", "c"], ("127.0.0.1", 8188, True)),
            (["--tls-k=k", "--tls-c=c"], ("127.0.0.1", 8188, True)),
            (["--tls-keyfile", "k"], ("127.0.0.1", 8188, False)),
            (["--preview-method", "auto", "--cpu", "--portable"], ("127.0.0.1", 8188, False))]  # fmt: skip
        for args, wanted in cases:
            with self.subTest(args=args):
                config = dock.parse_comfyui_args(args)
                self.assertEqual((config.host, config.port, config.tls), wanted)

    def test_a_port_that_cannot_be_bound_is_refused(self):
        for args in (["--port", "0"], ["--port", "70000"], ["--port", "abc"], ["--port", "-1"], ["--port=-1"],
            ["--port"]):  # fmt: skip
            with self.subTest(args=args), self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.parse_comfyui_args(args)
            self.assertEqual(caught.exception.code, "usage")

    def test_with_port_replaces_every_port(self):
        self.assertEqual(dock.with_port(["--port", "1", "--cpu", "--po=2"], 3), ["--cpu", "--port", "3"])

    def test_local_urls(self):
        cases = [("0.0.0.0,::", False, "http://127.0.0.1:8188"), ("::", False, "http://[::1]:8188"),
            ("", False, "http://127.0.0.1:8188"), ("192.168.1.5,127.0.0.1", False, "http://192.168.1.5:8188"),
            ("fe80::1", True, "https://[fe80::1]:8188"), ("localhost", True, "https://localhost:8188")]  # fmt: skip
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
            {"starter": {"identity": []}}, {"command": None}, {"monitor": 1}, {"run_id": 5}, {"last_exit": {"code": "3"}},
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
        for started, least in ((time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 60)) + "+00:00", 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 60)) + "Z", 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 60)), 59),
            (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 3600)) + "+00:00", 0)):  # fmt: skip
            state.started_at = started
            self.assertTrue(least <= state.get_uptime().total_seconds() < 65, started)


class RecordsArePlain(unittest.TestCase):
    def test_they_are_compared_and_shown_by_their_fields(self):
        self.assertEqual(dock.NodeInfo("pack", version="2"), dock.NodeInfo(version="2", name="pack"))
        self.assertNotEqual(dock.NodeInfo("pack", version="2"), dock.NodeInfo("pack"))
        self.assertNotEqual(dock.ComfyUIConfig(), ("127.0.0.1", 8188, False))
        self.assertEqual(repr(dock.ComfyUIConfig(port=1)), "ComfyUIConfig(host='127.0.0.1', port=1, tls=False)")

    def test_a_default_that_can_change_is_made_for_each(self):
        dock.NodeInfo("one").dependency_sources.append("x")
        self.assertEqual(dock.NodeInfo("two").dependency_sources, [])


class WordsForPeople(unittest.TestCase):
    def test_why_comfyui_ended_is_read_from_its_log_without_colours_and_levels(self):
        fatal = (
            "\x1b[32m[INFO]\x1b[0m all is well\nFatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n"
            '  File "/x/custom_nodes/Innocent/a.py", line 1 in f\n\nCurrent thread 0x2 (most recent call first):\n'
            '  File "/x/custom_nodes/Guilty/b.py", line 2 in g\n'
        )
        group = (
            "  + Exception Group Traceback (most recent call last):\n  |   File x\n  | ExceptionGroup: two (2 sub-exceptions)\n"
            "  +-+---------------- 1 ----------------\n    | ValueError: 1\n    +------------------------------------\n"
        )
        failed = "\x1b[31m[ERROR]\x1b[0m Traceback (most recent call last):\n  File x\nImportError: a node\n"
        cases = [(fatal, -11, "Fatal Python error: Segmentation fault (custom node Guilty)"),
            ("Windows fatal exception: access violation\n", None, "Windows fatal exception: access violation"),
            ("terminate called after throwing an instance of 'x'\n  what():  no CUDA\n", -6,
            "terminate called after throwing an instance of 'x': no CUDA"),
            (group, 1, "ExceptionGroup: two (2 sub-exceptions)"), (failed + "[INFO] up\n", 3, "ImportError: a node"),
            (failed + "[INFO] up\nNo models folder.\n", 1, "No models folder."),
            ("Traceback (most recent call last):\n  File x\nSystemExit: 7\n", 7, "SystemExit: 7")]  # fmt: skip
        for text, code, expected in cases:
            with self.subTest(expected=expected):
                self.assertEqual(dock.last_error_line(text, code), expected)

    def test_the_line_that_says_why_whatever_the_error_is_called(self):
        begin = "Traceback (most recent call last):\n  File x\n    call()\n"
        unknown = "socket.gaierror: [Errno -2] Name or service not known"
        missing, refused = "ModuleNotFoundError: No module named 'PIL'", "main.py: error: unrecognized arguments: --x"
        cases = [
            (f"{begin}{unknown}\n", unknown), (begin + "zipfile.BadZipFile\nbye\n", "zipfile.BadZipFile"), ("OSError: first\n" + begin, "OSError: first"),
            (f"a\nTraceback\n  File\n{missing}\n\nbye\n", missing), (f"usage: x\n{refused}\n", refused), ("all is well\n", None), ("0%\r50%\rdone\n", None),
            ("torch.cuda.OutOfMemoryError: CUDA\nlast\n", "torch.cuda.OutOfMemoryError: CUDA"), ("", None), (dock.SESSION_MARK + "id 2026 environment e ===\n", None),
        ]  # fmt: skip
        for text, expected in cases:
            self.assertEqual(dock.last_error_line(text), expected, text)

    def test_durations(self):
        cases = [(0, "0s"), (59.9, "59s"), (60, "1m"), (3600, "1h 0m"), (3900, "1h 5m"), (90000, "1d 1h"), (-5, "0s")]
        self.assertEqual([dock.format_duration(seconds) for seconds, _ in cases], [words for _, words in cases])

    def test_names_of_new_environments(self):
        for name in ("a", "prod", "my-env_2.0", "A" * 63, "9lives"):
            self.assertTrue(dock.is_new_name(name), name)
        for name in ("-a", ".a", "a/b", "..", "a b", "ü", "A" * 64, "logs", "Workspace", "CON", "nul.txt", "lpt1", "a.",
            "a\n"):  # fmt: skip
            self.assertFalse(dock.is_new_name(name), name)

    def test_made_valid_always_gives_a_valid_name(self):
        for name in ("ComfyUI", "my folder", "..", "", "logs", "été", "x" * 200, "-_-", "a.", "models.old", "com1.x"):
            self.assertTrue(dock.is_new_name(dock.sanitize_name(name)), name)


# ======================================================================================================================
# 2. Places
# ======================================================================================================================


class FindingTheWorkspace(unittest.TestCase):
    def test_the_folder_of_the_comfydock_that_used_docker_is_left_alone(self):
        home = temporary_folder(self)
        write(join(home, ".comfydock", "environments.json"), "[]")
        names = {"HOME": home, "USERPROFILE": home, "COMFYDOCK_HOME": ""}
        with patch.dict(os.environ, names):
            self.assertEqual(dock.default_workspace(), join(home, "comfydock"))
            os.makedirs(join(home, ".comfydock", "environments"))
            self.assertEqual(dock.default_workspace(), join(home, ".comfydock"))

    def setUp(self):
        self.home = temporary_folder(self)
        self.enterContext_(patch.dict(os.environ, {"HOME": self.home, "USERPROFILE": self.home}))
        os.environ.pop("COMFYDOCK_HOME", None)

    def enterContext_(self, context):  # unittest has it from 3.11 on
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def test_the_variable_wins_then_an_older_workspace_where_there_is_no_new_one(self):
        new, older = (join(self.home, name) for name in (".comfydock", "comfydock"))
        self.assertEqual(dock.default_workspace(), new)
        os.makedirs(join(older, ".metadata"))
        self.assertEqual(dock.default_workspace(), older)
        os.makedirs(join(new, "environments"))
        self.assertEqual(dock.default_workspace(), new)
        os.environ["COMFYDOCK_HOME"] = join(self.home, "elsewhere")
        self.assertEqual(dock.default_workspace(), join(self.home, "elsewhere"))
        os.environ["HOME"] = os.environ["USERPROFILE"] = os.environ["COMFYDOCK_HOME"] = ""
        self.assertEqual(error_of(dock.default_workspace).hint, "set COMFYDOCK_HOME")

    def test_the_environment_above_a_folder(self):
        inside = join(self.home, "ws", "environments", "dev", "ComfyUI", "custom_nodes")
        os.makedirs(inside)
        self.assertIsNone(dock.environment_above(inside))
        os.makedirs(join(self.home, "ws", "environments", "dev", ".cec"))
        self.assertEqual(dock.environment_above(inside), (join(self.home, "ws"), "dev"))


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


def recorded(process, script, **changes):
    """Return what is found of a process that was recorded, with some fields of its identity changed or (...) missing."""
    identity = {**dock.identity_of(process), **changes}
    identity = {key: value for key, value in identity.items() if value is not ...}
    state = dock.ProcessState.from_dict({**PLANS_STATE, "pid": process.pid, "identity": identity})
    return dock.subject_of(state, sys.executable, script)


class Stage(unittest.TestCase):
    """A folder, and real processes that are gone afterwards."""

    def setUp(self):
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="stage é "))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.script = join(self.folder, "main.py")
        self.log = join(self.folder, "log.txt")

    def write(self, code, name="main.py"):
        path = join(self.folder, name)
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
        told, flag = [], join(self.folder, "flag")

        def tell(line):
            told.append((line, threading.current_thread() is threading.main_thread()))
            with open(flag, "w"):
                pass

        done = dock.run_command([sys.executable, "-c", code, flag], timeout=30, tell=tell)
        self.assertEqual(told, [("one", True), ("two", True)])
        self.assertEqual(done.stdout, "one\ntwo\n")

    def test_stdin_is_empty_and_the_folder_and_environment_are_the_given_ones(self):
        done = self.python("import os,sys; print(repr(sys.stdin.read()), os.environ['X'], os.path.exists('here'))",
            cwd=self.folder, env={**os.environ, "X": "y"})  # fmt: skip
        self.assertEqual(done.stdout, "'' y False\n")

    def test_a_missing_program_or_folder_is_named(self):
        error = error_of(dock.run_command, ["no-such-program-here"])
        self.assertEqual(str(error), "no-such-program-here was not found")
        self.assertEqual(error.code, "missing")
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            self.python("", cwd=join(self.folder, "nowhere"))
        self.assertEqual(caught.exception.code, "missing")
        self.assertIn("nowhere", str(caught.exception))

    def test_a_file_that_is_no_program_is_not_called_missing(self):
        error = error_of(dock.run_command, [self.write("text")])
        self.assertEqual(error.code, "failed")
        self.assertIn("main.py cannot be started: ", str(error))

    def test_who_breaks_off_while_it_runs_leaves_nothing_behind(self):
        told = []

        def tell(line):
            told.append(int(line))
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            dock.run_command(
                [sys.executable, "-c", "import os,time; print(os.getpid(), flush=True); time.sleep(600)"], tell=tell
            )
        self.assertFalse(alive(told[0]))

    def test_when_the_time_is_up_its_children_are_ended_too(self):
        self.write(
            f"import subprocess,sys,time\n"
            f"p=subprocess.Popen([sys.executable,'-c','import time;time.sleep(600)'])\n"
            f"open({self.log!r},'w').write(f'child {{p.pid}}\\n')\ntime.sleep(600)"
        )
        error = error_of(dock.run_command, [sys.executable, self.script], timeout=2)
        self.assertEqual(error.code, "timeout")
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

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_it_hears_the_interrupt_even_where_we_ignore_and_block_it(self):
        ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
        try:
            self.start(
                "import signal as s; print(s.getsignal(s.SIGINT) is s.default_int_handler,"
                "{*map(s.getsignal, (s.SIGTERM, s.SIGCHLD))} == {s.SIG_DFL}, s.pthread_sigmask(s.SIG_BLOCK, []), 'ready', flush=True)"
            )
            ours = [signal.getsignal(number) for number in before], signal.pthread_sigmask(signal.SIG_BLOCK, [])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)
        self.assertEqual(read(self.log), "True True set() ready\n")
        self.assertEqual(ours[0], [signal.SIG_IGN] * 3)
        self.assertEqual(ours[1], {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_off_the_main_thread_it_starts_all_the_same(self):
        self.write("print('ready')")
        codes = []

        def start():
            with dock.open_append(self.log) as log:
                codes.append(dock.create_background_process([sys.executable, self.script], self.folder, log).wait())

        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
            ours = signal.getsignal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)
        self.assertEqual((codes, read(self.log), ours), ([0], "ready\n", signal.SIG_IGN))

    def test_a_released_process_is_let_go_without_a_warning(self):
        self.write(READY_AND_WAIT)
        gc.collect()  # what other tests left
        with dock.open_append(self.log) as log, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            process = dock.create_background_process([sys.executable, self.script], self.folder, log)
            pid = process.pid
            self.assertIsNone(process.poll())
            del process
            gc.collect()
        self.addCleanup(self.end_pid, pid)
        self.assertEqual([str(one.message) for one in seen], [])
        self.assertTrue(dock.is_process_alive(pid))

    @unittest.skipUnless(WINDOWS, "Windows consoles")
    def test_it_has_a_console_without_a_window(self):
        self.start(
            "import ctypes; kernel = ctypes.WinDLL('kernel32'); page = kernel.GetConsoleCP()\n"
            "print(page > 0, kernel.GetConsoleWindow(), 'ready', flush=True)"
        ).wait()
        self.assertEqual(read(self.log), "True 0 ready\n")

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

    def test_the_file_starts_itself_in_whatever_way_it_is_kept(self):
        program = self.write("", "comfydock.py")
        cases = ((program, ["-c", dock.IMPORTED.format("comfydock"), self.folder]),
            (self.write("", "my-dock.py"), [join(self.folder, "my-dock.py")]),
            (join(self.write("", "dock.pyz"), "comfydock.py"), [join(self.folder, "dock.pyz")]))  # fmt: skip
        for file, words in cases:
            with self.subTest(file=file), patch.object(dock, "__file__", file):
                self.assertEqual(dock.own_command(), [sys.executable, *words])


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
            self.assertTrue(eventually(lambda: dock.process_table().process(process.pid).state == "stopped"))
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

    @unittest.skipIf(WINDOWS, "POSIX zombies")
    def test_the_first_process_of_a_container_reaps_strangers_and_leaves_its_own(self):
        code = (
            f"import os, subprocess, sys; sys.path.insert(0, {HERE!r}); import comfydock as m\n"
            "stranger = subprocess.Popen([sys.executable, '-c', ''])\n"
            "os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)\n"
            "own = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)'])\n"
            "os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)\n"
            "m.reap_strangers(own.pid)\n"
            "print(m.process_table().process(stranger.pid), m.reap(own.pid))\n"
            "m.reap_strangers(own.pid)"
        )
        done = dock.run_command([sys.executable, "-c", code])
        self.assertEqual((done.stdout, done.stderr), ("None 3\n", ""))

    def test_exit_codes_are_put_into_words(self):
        cases = ((0, "code 0"), (3, "code 3"), (-2, "signal 2 (SIGINT)"), (-99, "signal 99"))
        self.assertEqual([dock.format_exit(code) for code, _ in cases], [words for _, words in cases])

    def test_a_dead_process_raises_process_lookup_error(self):
        process = self.start()
        self.end(process)
        pid = 99996 if WINDOWS else process.pid  # Windows keeps an ended process while somebody holds it open
        for how in ("interrupt", "terminate", "pause", "continue"):
            with self.subTest(how=how), self.assertRaises(ProcessLookupError):
                dock.signal_process(pid, how)

    @unittest.skipUnless(WINDOWS, "Windows tells the facts of a process")
    def test_a_process_tells_its_command_folder_environment_and_birth(self):
        begun = time.time()
        process = self.start(arguments=("--x y", 'a"b\\'), env={"COMFYDOCK_RUN_ID": "r-1", "LONG": "z" * 20000})
        facts = dock.process_facts(process.pid)
        self.assertEqual(facts.command, [sys.executable, self.script, "--x y", 'a"b\\'])
        self.assertTrue(dock.same_path(facts.cwd, self.folder), facts.cwd)
        self.assertEqual((facts.environment["COMFYDOCK_RUN_ID"], len(facts.environment["LONG"])), ("r-1", 20000))
        self.assertEqual((facts.ppid, facts.alive), (os.getpid(), True))
        self.assertLess(abs(facts.created - begun), 5)
        process.kill()
        process.wait()
        facts = dock.process_facts(process.pid)
        self.assertTrue(facts is None or not facts.alive)

    @unittest.skipUnless(dock.this_machine()["machine"], "needs a machine with an id")
    def test_the_machine_has_a_name_that_stays(self):
        self.assertTrue(dock.this_machine()["machine"])
        code = f"import sys; sys.path.insert(0, {HERE!r}); import comfydock as m;print(m.this_machine())"
        said = dock.run_command([sys.executable, "-c", code]).stdout.strip()
        self.assertEqual(said, str(dock.this_machine()))

    @unittest.skipIf(WINDOWS, "names of macOS and Linux")
    def test_a_mac_is_named_by_two_functions_of_its_library(self):
        class Library:
            def gethostuuid(self, buffer, wait):
                buffer.raw = bytes(range(16)) + buffer.raw[16:]
                return 0

            def sysctlbyname(self, name, buffer, size, new, new_size):
                buffer.value = b"boot of " + name
                return 0

        with patch("ctypes.CDLL", lambda name: Library()):
            self.assertEqual(dock.mac_text("gethostuuid"), "00010203-0405-0607-0809-0a0b0c0d0e0f")
            self.assertEqual(dock.mac_text("sysctlbyname", b"kern.x"), "boot of kern.x")
        if sys.platform != "darwin":
            self.assertIsNone(dock.mac_text("gethostuuid"))
        with patch.object(dock, "read_proc", lambda path: b""):
            with patch.object(sys, "platform", "darwin"):
                mac = dock.this_machine.__wrapped__()
                self.assertEqual((mac["machine"], mac["host"]), (dock.mac_text("gethostuuid") or "", ""))
                self.assertEqual(mac["boot_id"], dock.mac_text("sysctlbyname", b"kern.bootsessionuuid"))


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

    @patch.object(dock, "PATH_RULES", posixpath)
    def test_ps_of_linux_is_read(self):
        init, thread, comfy, dead, stopped = dock.parse_ps(LINUX_PS)
        self.assertEqual((comfy.pid, comfy.ppid, comfy.uid, comfy.state), (4242, 1, 1000, "running"))
        self.assertEqual(comfy.text, "/opt/my env/bin/python3.11 -s /srv/Comfy UI/main.py --listen")
        self.assertEqual(comfy.name, "python3.11")
        self.assertEqual(comfy.created, 1793601611.0)
        self.assertEqual((init.name, thread.name), ("init", "[kthreadd]"))
        self.assertEqual((dead.state, stopped.state), ("zombie", "stopped"))
        self.assertTrue(dock.runs_script(comfy, "/srv/Comfy UI/main.py"))

    @patch.object(dock, "PATH_RULES", posixpath)
    def test_ps_of_macos_is_read_with_its_padded_dates(self):
        _, comfy, dead, closed, stopped = dock.parse_ps(MACOS_PS)
        self.assertEqual((comfy.pid, comfy.name, comfy.created), (501, "Python", 1785339481.0))
        self.assertTrue(dock.runs_script(comfy, "/Users/me/Comfy UI/main.py"))
        self.assertFalse(dock.runs_script(comfy, "/Users/me/main.py"))
        self.assertEqual((dead.state, dead.command), ("zombie", ["<defunct>"]))
        self.assertEqual((closed.command, closed.name), (["python3.12"], "python3.12"))
        self.assertEqual((stopped.uid, stopped.state, stopped.created), (-2, "stopped", 1782882483.0))

    def test_a_date_in_another_language_is_no_date_and_no_error(self):
        for text in ("Mi. 29 Juli 15:37:10 2026", "Tue 15 Sep 23:54:57 2026", ""):
            with self.subTest(text=text):
                other = LINUX_PS.splitlines()[0].replace("Mon Nov 23 06:18:00 2026", text.ljust(24)[:24])
                self.assertEqual([row.created for row in dock.parse_ps(other)], [None])

    def test_lines_that_ps_has_not_written_are_passed_over(self):
        self.assertEqual(
            dock.parse_ps("  PID  PPID   UID STAT                 STARTED COMMAND\n\nerror: no such option\n"), []
        )

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

    def test_windows_tables_of_listeners_are_read(self):
        ipv4 = struct.pack("<I6I", 1, 2, 0x0100007F, 0xFC1F, 0, 0, 4321)  # port 8188 in the network's order
        ipv6 = struct.pack("<I14I", 1, *[0] * 5, 0xFC1F, *[0] * 6, 2, 4322)
        for table, (_, width, at), found in zip((ipv4, ipv6), dock.TCP_TABLES, (4321, 4322)):
            self.assertEqual(dock.parse_tcp_listeners(table + bytes(8), width, at), [(8188, found)])
            self.assertEqual(dock.parse_tcp_listeners(b"", width, at), [])

    def test_lsof_is_read(self):
        self.assertEqual(dock.parse_lsof(LSOF_PIDS, "p"), ["501", "733"])
        self.assertEqual(dock.parse_lsof(LSOF_CWD, "n"), ["/Users/me/Comfy UI"])

    def test_markers_are_found_behind_commands(self):
        self.assertEqual(dock.parse_markers(PS_MARKERS), {501: "ab-12", 502: "cd-34"})


class WhoRunsTheScript(Stage):
    def runs(self, command, joined=False, cwd="/x", script="/x/main.py"):
        row = dock.Process(99, command=command.split(" ") if joined else command, joined=joined)
        table = Mock(cwd=lambda pid: cwd)
        with patch.object(dock, "process_table", lambda: table):
            return dock.runs_script(row, script)

    CASES = ((["python", "/x/main.py"], True), (["/usr/bin/python3.11", "-s", "-u", "/x/main.py", "--listen"], True),
        (["python3", "-X", "utf8", "-W", "ignore", "/x/main.py"], True),
        (["python3", "-suXutf8", "-bX", "dev", "/x/main.py"], True),
        (["python3", "--check-hash-based-pycs", "always", "/x/main.py"], True), (["Python", "main.py"], True),
        (["python3.13t", "./main.py"], True), (["pypy3.10", "../x/main.py"], True),
        (["pythonw.exe", "/x/./main.py"], True), (["vim", "main.py"], False),
        (["vim", "/usr/bin/python", "/x/main.py"], False), (["tail", "-f", "/x/main.py"], False),
        (["python", "other.py", "/x/main.py"], False), (["python", "/x/other/main.py"], False),
        (["python", "-c", "pass", "/x/main.py"], False), (["python", "-m", "pdb", "/x/main.py"], False),
        (["python", "-um", "pdb", "/x/main.py"], False), (["python", "-", "/x/main.py"], False),
        (["python-config", "/x/main.py"], False), (["pythonista", "/x/main.py"], False), (["python"], False),
        (["python", "-X"], False))  # fmt: skip

    @patch.object(dock, "PATH_RULES", posixpath)
    def test_only_a_python_whose_script_it_is_counts(self):
        for command, expected in self.CASES:
            for joined in (False, True):
                with self.subTest(command=command, joined=joined):
                    self.assertEqual(self.runs(" ".join(command) if joined else command, joined), expected)
        self.assertFalse(self.runs([]))

    @patch.object(dock, "PATH_RULES", posixpath)
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

    def test_a_path_that_cannot_be_resolved_is_nobody_elses(self):
        with patch.object(dock.PATH_RULES, "realpath", side_effect=OSError("More data available")):
            self.assertTrue(dock.same_path(self.script, self.script))
            self.assertFalse(dock.same_path(self.script, self.folder))

    def test_windows_paths_ignore_case_and_slashes(self):
        with patch.object(dock, "PATH_RULES", ntpath):
            script = r"C:\Comfy UI\main.py"
            for command, cwd in (([r"c:\py\Python.EXE", "-s", "c:/comfy ui/MAIN.py"], None),
                (["python.exe", r".\main.py"], "C:\\Comfy UI"), (["python.exe", r"Comfy UI\main.py"], "C:\\")):  # fmt: skip
                with self.subTest(command=command):
                    self.assertTrue(self.runs(command, cwd=cwd, script=script))
            self.assertFalse(self.runs([r"C:\Windows\notepad.exe", script], script=script))
            self.assertFalse(self.runs(["python.exe", r"D:\Comfy UI\main.py"], script=script))

    @unittest.skipIf(WINDOWS, "symbolic links")
    def test_a_script_behind_a_link_is_the_same_script(self):
        link = self.folder + " link"
        os.symlink(self.folder, link)
        self.addCleanup(os.unlink, link)
        self.assertTrue(self.runs(["python", join(link, "main.py")], script=self.script))


class EverySource:
    """The same questions to one source, forced, about real processes; the classes below name the sources."""

    source = ""

    def setUp(self):
        super().setUp()
        if not dock.is_usable(self.source):
            self.skipTest(f"{self.source} is not here")
        patched = patch.dict(os.environ, COMFYDOCK_PROCESS_TABLE=self.source)
        patched.start()
        self.addCleanup(patched.stop)
        self.table = dock.process_table()
        self.assertIsInstance(self.table, dock.TABLES[self.source])

    def test_a_process_is_shown_as_it_is(self):
        begun = time.time()
        process = self.start(arguments=("--port", "9"))
        row = self.table.process(process.pid)
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
        self.assertIn(process.pid, [row.pid for row in self.table.processes()])
        self.assertIn(os.getpid(), [row.pid for row in self.table.processes()])
        found = [row.pid for row in self.table.processes(containing="main.py") if dock.runs_script(row, self.script)]
        self.assertEqual(found, [process.pid])
        self.assertEqual([row.pid for row in dock.comfyui_processes(self.folder)], [process.pid])
        self.assertEqual(self.table.processes(containing="no such words anywhere"), [])

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
        if WINE and isinstance(self, TasklistAsSource):
            self.skipTest("Wine's netstat shows no PIDs")
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
        row = self.table.process(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        self.assertTrue(eventually(lambda: self.table.process(process.pid).state == "zombie"))
        self.assertFalse(dock.is_process_alive(process.pid))
        self.assertIsNone(recorded(row, self.script))
        self.assertTrue(dock.wait_for_exit(row, 5))
        self.assertEqual(dock.comfyui_processes(self.folder), [])

    def test_what_is_not_there_is_none(self):
        process = self.start()
        process.kill()
        process.wait()
        self.assertTrue(eventually(lambda: self.table.process(process.pid) is None))
        self.assertIsNone(self.table.cwd(process.pid))
        self.assertFalse(dock.is_process_alive(process.pid))
        self.assertIsNone(self.table.process(2**31 - 2))


class ProcAsSource(EverySource, Stage):
    source = "proc"

    def test_when_no_more_files_can_be_opened_none_stays_open(self):
        import resource

        def next_descriptor():
            descriptor = os.open(os.devnull, os.O_RDONLY)
            os.close(descriptor)
            return descriptor

        free, limits = next_descriptor(), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))  # for the folder in /proc, not what is in it
        try:
            with self.assertRaises(OSError) as caught:
                self.table.process(os.getpid())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual((caught.exception.errno, next_descriptor()), (errno.EMFILE, free))


class PsutilAsSource(EverySource, Stage):
    source = "psutil"


class PsAsSource(EverySource, Stage):
    source = "ps"


class WindowsAsSource(EverySource, Stage):
    source = "windows"


class TasklistAsSource(EverySource, Stage):
    """Windows without snapshots and tables."""

    source = "windows"

    def setUp(self):
        super().setUp()
        for name in ("listed_processes", "tcp_listeners"):
            patched = patch.object(dock, name, return_value=[])
            patched.start()
            self.addCleanup(patched.stop)


class ChoosingTheSource(unittest.TestCase):
    def test_an_unknown_or_unusable_one_is_refused_with_the_names(self):
        for name in ("nonsense", "proc" if WINDOWS else "windows"):
            if dock.is_usable(name):
                continue
            with self.subTest(name=name), patch.dict(os.environ, COMFYDOCK_PROCESS_TABLE=name):
                error = error_of(dock.process_table)
                self.assertIn("proc, windows, psutil, ps", error.hint)

    def test_where_nothing_works_one_line_says_what_to_install(self):
        with patch.object(dock, "is_usable", lambda name: False), patch.dict(os.environ):
            os.environ.pop("COMFYDOCK_PROCESS_TABLE", None)
            error = error_of(dock.process_table)
        self.assertIn("pip install psutil", error.hint)

    def test_the_windows_source_works_on_its_captured_texts(self):
        done = subprocess.CompletedProcess([], 0, TASKLIST, "")
        facts = {
            288: dock.ProcessFacts(
                288, True, 4, 1000.0, [r"C:\p\python.exe", "main.py"], "D:\\x", {"COMFYDOCK_RUN_ID": "r"}
            ),
            4012: dock.ProcessFacts(4012, False),
        }
        with (patch.object(dock, "run_command", lambda *_, **__: done),
            patch.multiple(dock, process_facts=facts.get, listed_processes=list)):  # fmt: skip
            table = dock.WindowsTable()
            rows = table.processes()
            self.assertEqual([(row.pid, row.name if "\\" not in row.text else "py") for row in rows],
                [(0, "System Idle Process"), (288, "py")])  # fmt: skip
            self.assertEqual((table.markers(), table.cwd(288)), ({288: "r"}, "D:\\x"))
            self.assertEqual(table.process(288).command, [r"C:\p\python.exe", "main.py"])
            self.assertIsNone(table.process(4012))
            self.assertEqual(table.process(0).command, ["System Idle Process"])

    def test_a_process_whose_command_line_psutil_cannot_read_is_still_there(self):
        class Ending:
            cmdline = status = ppid = uids = create_time = name = pid = None

            def __init__(self, pid):
                self.number = pid

            def as_dict(self, names):
                if "cmdline" in names or self.number == 9:
                    raise OSError("Only part of a ReadProcessMemory request was completed")
                return {"pid": self.number, "ppid": 1, "status": "running", "create_time": 1.0, "name": "python.exe"}

            def environ(self):
                raise OSError("Access denied")

        module = Mock(Process=Ending, Error=LookupError)
        module.pids.return_value = [7, 9]
        with patch.object(dock, "psutil_module", return_value=module):
            self.assertEqual([(row.pid, row.name) for row in dock.PsutilTable().processes()], [(7, "python.exe")])
            self.assertEqual(dock.PsutilTable().markers(), {})

    def test_a_psutil_that_fails_is_not_usable(self):
        for trouble in (ImportError("none"), RuntimeError("no /proc here")):
            with patch.object(dock, "psutil_module", side_effect=trouble):
                self.assertFalse(dock.is_usable.__wrapped__("psutil"))

    def test_where_psutil_may_not_ask_for_all_connections_lsof_is_asked(self):
        class Psutil:
            class Error(Exception):
                pass

            def net_connections(self, kind):
                raise self.Error

        with (patch.object(dock, "psutil_module", Psutil),
            patch.object(dock, "printed", lambda words: LSOF_PIDS if "-iTCP:8188" in words else "")):  # fmt: skip
            self.assertEqual(dock.PsutilTable().listeners(8188), [501, 733])

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_a_process_that_ends_while_it_is_looked_at_is_none(self):
        with patch.object(os, "read", side_effect=ProcessLookupError):
            self.assertIsNone(dock.ProcTable().process(os.getpid()))


class TheSameProcess(Stage):
    def setUp(self):
        super().setUp()
        self.pid = self.start().pid
        self.process = dock.process_table().process(self.pid)
        self.identity = dock.identity_of(self.process)

    def find(self, script=None, **changes):
        return recorded(self.process, script or self.script, **changes)

    def test_every_field_that_this_system_can_tell_must_be_there_and_match(self):
        self.assertEqual(self.find().pid, self.pid)
        compared = {"start_ticks", "boot_id", "pid_ns"} if dock.is_usable("proc") else {"created"}
        compared |= set() if dock.this_machine()["boot_id"] else {"machine", "host"}
        for field, value in self.identity.items():
            for other in (..., None, "", True, [],
                (value or 0) + 3 if isinstance(value, (int, float, type(None))) else "x"):  # fmt: skip
                with self.subTest(field=field, other=other):
                    self.assertEqual(self.find(**{field: other}) is None, field in compared)

    def test_it_must_run_the_script_of_the_environment(self):
        self.assertIsNone(self.find(join(self.folder, "other.py")))

    def test_without_ticks_two_seconds_tell_one_start_from_another(self):
        with patch.object(dock, "proc_start_ticks", lambda pid: None):
            for seconds, same in ((0, True), (1.9, True), (-1.9, True), (2.1, False), (-2.1, False)):
                one = dock.Process(9, created=100.0)
                with self.subTest(seconds=seconds):
                    self.assertEqual(
                        dock.is_identity_of(one, dock.identity_of(dock.Process(9, created=100 + seconds))), same
                    )

    def test_a_record_with_the_keys_of_the_plan_alone_names_a_candidate(self):
        self.assertIsNotNone(self.find(**dict.fromkeys(self.identity, ...)))
        self.assertIsNone(self.find(join(self.folder, "other.py"), **dict.fromkeys(self.identity, ...)))

    @unittest.skipUnless(dock.this_machine()["machine"], "needs a machine with an id")
    def test_another_machine_namespace_or_boot_is_not_here(self):
        boot = dock.this_machine()["boot_id"]
        others = dict.fromkeys(("machine", "host"), "other")
        cases = [({}, "here"), ({"machine": "other"}, "here" if boot else "foreign"), ({"boot_id": None}, "here")]
        if boot:
            cases += [({"host": "other"}, "here"), ({"boot_id": "x"}, "rebooted"),
                ({"boot_id": "x", **others}, "foreign")]  # fmt: skip
            cases += [({"boot_id": "x", name: "other"}, "foreign") for name in others] + [
                ({"boot_id": "x", "machine": ""}, "foreign")
            ]
        if dock.this_machine()["pid_ns"]:
            cases.append(({"pid_ns": "1"}, "beside"))
        for changes, place in cases:
            with self.subTest(changes=changes):
                self.assertEqual(dock.locate({**self.identity, **changes}), place)
        self.assertEqual((dock.locate({}), dock.locate(None)), ("here", "here"))

    def test_ticks_are_those_of_the_first_time_namespace(self):
        if not LINUX or os.geteuid() or not shutil.which("unshare"):
            self.skipTest("needs root and unshare to have another time")
        code = (
            f"import sys; sys.path.insert(0, {HERE!r}); import comfydock as m\n"
            "row = m.process_table().process(int(sys.argv[1])); print(row.start_ticks, round(row.age()) < 60)"
        )
        words = [sys.executable, "-c", code, str(self.pid)]
        done = dock.run_command(["unshare", "-T", "--boottime", "86400", "-f", *words])
        if done.returncode:
            self.skipTest(f"no time namespaces here: {done.stderr}")
        self.assertEqual(done.stdout, f"{self.process.start_ticks} True\n")

    def test_waiting_can_be_broken_off(self):
        calls = []

        def meanwhile():
            calls.append(time.monotonic())
            return len(calls) == 4

        self.assertFalse(dock.wait_for_exit(self.process, 60, meanwhile))
        self.assertEqual(len(calls), 4)
        self.assertLess(calls[-1] - calls[0], 5)

    def test_waiting_works_where_there_is_no_handle(self):
        with patch.object(os, "pidfd_open", side_effect=OSError, create=True):
            self.assertFalse(dock.wait_for_exit(self.process, 0.05))
            dock.signal_process(self.pid, "kill")
            self.assertTrue(dock.wait_for_exit(self.process, 20))

    @unittest.skipIf(WINDOWS, "POSIX stops")
    def test_a_process_stands_still_once_it_is_paused_or_gone(self):
        self.assertFalse(dock.is_stopped(self.process))
        dock.signal_process(self.pid, "pause")
        self.assertTrue(eventually(lambda: dock.is_stopped(self.process)))
        dock.signal_process(self.pid, "kill")
        eventually(lambda: dock.reap(self.pid) is not None)
        self.assertTrue(dock.is_stopped(self.process))

    def test_a_row_of_an_earlier_process_has_ended_already(self):
        other = dock.Process(self.pid, created=self.process.created - 60,
            start_ticks=self.process.start_ticks and self.process.start_ticks - 6000)  # fmt: skip
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
        row = dock.process_table().process(process.pid)
        if not WINDOWS:
            self.assertNotEqual(dock.process_table().process(orphan).ppid, process.pid)
            self.assertEqual(dock.process_table().process(deserter).session, deserter)
        family = [one.pid for one in dock.process_tree(row, run_id)]
        self.assertEqual(set(family), {process.pid, child, orphan, deserter})
        self.assertEqual(family[0], process.pid)
        self.assertNotIn(deserter, [one.pid for one in dock.process_tree(row, None)])
        process.kill()
        process.wait()
        left = {one.pid for one in dock.process_tree(row, run_id)}
        self.assertEqual(left, {child, orphan, deserter})

    def test_neither_we_nor_those_above_us_are_family(self):
        code = (
            f"import os, sys; sys.path.insert(0, {HERE!r}); import comfydock as m\n"
            f"t = m.process_table(); top = t.process({os.getpid()}); found = m.process_tree(top, 'run-me')\n"
            f"print([r.pid for r in found if r.pid in ({os.getpid()}, os.getpid())], len(found) >= 0)"
        )
        done = dock.run_command([sys.executable, "-c", code], env={**os.environ, "COMFYDOCK_RUN_ID": "run-me"})
        self.assertEqual(done.stdout, "[] True\n", done.stderr)

    def test_a_process_older_than_its_parent_is_not_its_child(self):
        parent = dock.Process(50, 1, created=100.0, start_ticks=1000)
        for child, expected in ((dock.Process(51, 50, created=100.0, start_ticks=1001), {50}),
            (dock.Process(51, 50, created=100.0, start_ticks=999), set()), (dock.Process(51, 50, created=90.0), set()),
            (dock.Process(51, 50), {50}), (dock.Process(51, 49, start_ticks=2000), set()),
            (dock.Process(51, 51, start_ticks=1000), set())):  # fmt: skip
            with self.subTest(child=child):
                self.assertEqual(dock.ancestors_of(51, {50: parent, 51: child}), expected)

    def test_a_pid_that_was_given_away_has_no_family_of_the_old_process(self):
        process = self.start(FAMILY)
        for word in ("child", "grandchild", "marked"):
            self.addCleanup(self.end_pid, self.said(word)[0])
        row = dock.process_table().process(process.pid)
        old = dock.Process(row.pid, row.ppid, row.session, row.uid, "running", row.created - 60,
            row.start_ticks and row.start_ticks - 6000)  # fmt: skip
        self.assertEqual(dock.process_tree(old, None), [])

    @unittest.skipIf(WINDOWS, "fork")
    def test_forked_workers_with_the_same_command_line_are_not_shown_as_more_comfyuis(self):
        process = self.start(WORKERS)
        row = dock.process_table().process(process.pid)
        family = dock.process_tree(row, None)
        for one in family[1:]:
            self.addCleanup(self.end_pid, one.pid)
        self.assertEqual(len(family), 3)
        self.assertEqual(len(dock.process_table().processes(containing=self.script)), 3)
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

    def test_a_record_speaks_for_its_owner_alone(self):
        path = join(self.folder, "state")
        row = dock.process_table().process(self.start().pid)
        state = dock.ProcessState.from_dict({**PLANS_STATE, "pid": row.pid, "identity": dock.identity_of(row)})
        for uid, owner, ours in ((None, 0, True), (0, 0, True), (65534, 0, False), (0, 65534, False),
            (65534, 65534, False)):  # fmt: skip
            with self.subTest(uid=uid, owner=owner):
                state.uid, state.owner = uid, owner
                dock.write_state(path, state)
                read_again = dock.read_state(path)
                self.assertEqual((os.stat(path).st_uid, read_again.owner), (owner, owner))
                self.assertEqual(dock.subject_of(read_again, sys.executable, self.script) is not None, ours)

    def test_where_a_new_file_is_not_its_makers_ownership_says_nothing(self):
        path = self.write("", "state")
        os.chown(path, 65534, -1)
        self.assertEqual(dock.speaker_of(path, 65534), 65534)
        stat = os.fstat

        def vfat(handle):
            return os.stat_result([*stat(handle)[:4], 65534, *stat(handle)[5:10]])

        with patch.object(os, "fstat", vfat):
            self.assertEqual(dock.speaker_of(path, 65534), 0)
        self.assertEqual(os.listdir(self.folder), ["state"])

    def test_a_marker_makes_no_process_of_another_user_family(self):
        process = self.start(env={"COMFYDOCK_RUN_ID": "r-1"})
        os.chmod(self.folder, 0o755)
        code = "import os, sys; os.setgid(65534); os.setuid(65534); os.execv('/bin/sleep', ['sleep', '600'])"
        other = subprocess.Popen([sys.executable, "-c", code], env={"COMFYDOCK_RUN_ID": "r-1"}, start_new_session=True)
        self.addCleanup(self.end, other)
        row = eventually(lambda: (row := dock.process_table().process(other.pid)) and row.uid == 65534 and row)
        family = dock.process_tree(dock.process_table().process(process.pid), "r-1")
        self.assertEqual(([one.pid for one in family], dock.process_table().marker(row.pid)), ([process.pid], "r-1"))

    def test_another_users_process_is_seen_and_not_signalled_and_nothing_raises(self):
        run_id = str(uuid.uuid4())
        process = self.start(env={"COMFYDOCK_RUN_ID": run_id})
        row = dock.process_table().process(process.pid)

        def look():
            table = dock.process_table()
            seen = recorded(row, self.script)
            facts = [seen.pid == process.pid, table.cwd(process.pid), table.marker(process.pid), table.listeners(1),
                [one.pid for one in dock.process_tree(seen, run_id)] == [process.pid]]  # fmt: skip
            try:
                dock.signal_process(process.pid, "kill")
            except PermissionError:
                facts.append("refused")
            return str(facts)

        self.assertEqual(self.as_nobody(look), "[True, None, '', [], True, 'refused']")


class OnlyTheRecordedProcessIsSignalled(Stage):
    def setUp(self):
        super().setUp()
        self.environment = dock.Workspace(join(self.folder, "workspace")).demo()
        self.sent = []
        for module, name in ((os, "kill"), (signal, "pidfd_send_signal")):
            send = getattr(module, name, None)
            if send is not None:
                patched = patch.object(module, name, self.counted(send))
                patched.start()
                self.addCleanup(patched.stop)

    def counted(self, send):
        def count(place, number):
            self.sent.append(number)
            return send(place, number)

        return count

    @unittest.skipIf(WINDOWS, "counts the signals of POSIX")
    def test_a_forged_record_signals_nobody(self):
        chance, root = random.Random(12), self.environment.paths.root
        main = dock.main_script(str(self.environment.comfyui_path))
        sleep = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]
        victims = [dock.process_table().process(self.start(command=command, env=env).pid)
            for command, env in ((sleep, {}), ([*sleep, main, "--monitor", root], {}),
            ([*sleep, self.environment.python, main], {}),
            ([sys.executable, self.script, main], {"COMFYDOCK_RUN_ID": "another"}),
            ([sys.executable, self.script, "--monitor", root], {}))]  # fmt: skip
        lies = (..., None, 1, "x", True, {})
        for number in range(1000 if "--long" in sys.argv else 100):
            victim = chance.choice(victims)
            identity = {**dock.identity_of(victim)}
            for key in chance.sample(sorted(identity), chance.randrange(3)):
                identity[key] = chance.choice(lies)
            noted = {"pid": victim.pid, "identity": {key: lie for key, lie in identity.items() if lie is not ...}}
            record = {
                **PLANS_STATE, "pid": chance.choice([victim.pid, None]), "phase": chance.choice(["starting", "running", "rotating"]),
                "wanted": chance.choice(["running", "stopped"]), "run_id": chance.choice(["a", None]), "command": victim.command,
                "identity": chance.choice([noted["identity"], {}]), "starter": chance.choice([noted, {}]), "monitor": chance.choice([noted, None]),
                "uid": chance.choice([os.getuid(), None]),
            }  # fmt: skip
            with self.subTest(number=number, record=record):
                Path(self.environment.paths.state).write_text(json.dumps(record), encoding="utf-8")
                with contextlib.suppress(dock.CDEnvironmentError):
                    self.environment.finish_rotation()
                    chance.choice(
                        [self.environment.stop, self.environment.require_idle, self.environment.clean_stale]
                    )()
                self.assertEqual(self.sent, [])

    def test_a_true_record_signals_its_process(self):
        for _ in range(100 if "--long" in sys.argv else 5):
            self.environment.run(["--port", str(free_port())])
            pid = self.environment.observe().process.pid
            self.assertTrue(self.environment.stop())
            self.assertIsNone(self.environment.observe().process)
            self.assertFalse(alive(pid))

    @unittest.skipUnless(LINUX, "Linux has descriptors of processes")
    def test_the_signal_goes_through_the_descriptor_that_was_looked_at(self):
        row = dock.process_table().process(self.start().pid)
        with patch.object(os, "kill", side_effect=AssertionError), patch.object(os, "pidfd_open", create=True):
            del os.pidfd_open  # as in some builds of Python
            dock.signal_same(row, "continue")
        for error in (errno.ENOSYS, errno.EPERM, errno.EBADF):
            with patch.object(signal, "pidfd_send_signal", side_effect=OSError(error, "")):
                dock.signal_same(row, "continue")
        with patch.object(signal, "pidfd_send_signal", create=True):
            del signal.pidfd_send_signal
            dock.signal_same(row, "continue")
        self.assertEqual(self.sent, [signal.SIGCONT] * 5)
        row.start_ticks += 1
        with self.assertRaises(ProcessLookupError):
            dock.signal_same(row, "kill")


REUSE = """\
import os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import comfydock as m
start = lambda: subprocess.Popen([sys.executable, sys.argv[2]], stdout=subprocess.DEVNULL)
first = start()
identity = m.identity_of(m.process_table().process(first.pid))
find = lambda pid: m.recorded_process({"pid": pid, "identity": identity})
same = find(first.pid) is not None
first.kill(); first.wait()
while time.clock_gettime(time.CLOCK_BOOTTIME) * m.kernel_clock()[1] < identity["start_ticks"] + 2: pass
with open("/proc/sys/kernel/ns_last_pid", "w") as file: file.write(str(first.pid - 1))
second = start()
print(same, first.pid == second.pid, find(second.pid))
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
    @unittest.skipUnless(socket.has_dualstack_ipv6(), "no IPv6 here")
    def test_an_address_of_ipv6_stands_in_brackets(self):
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
            asking = dock.begin(lambda: dock.http_get(dock.ComfyUIConfig("::", port), "/", time.monotonic() + 5))
            connection, _ = server.accept()
            with connection:
                request = connection.recv(65536)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nthere")
        self.assertIn(b"\r\nHost: [::1]:%d\r\n" % port, request)
        self.assertEqual(asking(time.monotonic() + 5), (200, b"there"))

    def test_a_name_server_that_is_silent_costs_no_more_than_the_timeout(self):
        silent, began = threading.Event(), time.monotonic()
        self.addCleanup(silent.set)
        resolve = lambda place, port, family, kind, protocol, flags: (  # noqa: E731
            socket_getaddrinfo(place, port, family, kind, protocol, flags)
            if flags & socket.AI_NUMERICHOST
            else silent.wait(20)
        )
        socket_getaddrinfo = socket.getaddrinfo
        with patch.object(socket, "getaddrinfo", resolve):
            self.assertEqual(dock.look_at(dock.ComfyUIConfig("box.example", 8188), 0.3).kind, dock.TIMEOUT)
            self.assertFalse(dock.is_port_bound(8188, host="box.example"))
        self.assertLess(time.monotonic() - began, 5)

    def probe(self, answer, timeout=0.5):
        with listening(answer=answer) as port:
            began = time.monotonic()
            found = dock.look_at(dock.ComfyUIConfig("127.0.0.1", port), timeout)
            return found, time.monotonic() - began

    def test_answers_of_many_kinds(self):
        cases = [(stats(), dock.HEALTHY), (stats(["main.py"]), dock.HEALTHY),
            (b"HTTP/1.0 401 No\r\n\r\n", dock.HEALTHY), (b"HTTP/1.0 403 No\r\n\r\n", dock.HEALTHY),
            (b"HTTP/1.0 404 No\r\n\r\n", dock.OTHER_SERVICE),
            (b"HTTP/1.0 302 Go\r\nLocation: http://example.org/\r\n\r\n", dock.OTHER_SERVICE),
            (b"HTTP/1.0 200 OK\r\n\r\n{}", dock.OTHER_SERVICE), (b"HTTP/1.0 200 OK\r\n\r\n[]", dock.OTHER_SERVICE),
            (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100000, dock.OTHER_SERVICE),
            (b"SSH-2.0-OpenSSH\r\n", dock.OTHER_SERVICE), (b"", dock.OTHER_SERVICE)]  # fmt: skip
        for text, kind in cases:
            with self.subTest(text=text[:40]):
                self.assertEqual(self.probe(saying(text))[0].kind, kind)

    def test_the_command_line_of_the_server_is_handed_on(self):
        self.assertEqual(self.probe(saying(stats(["/x/main.py", "--cpu"])))[0].argv, ["/x/main.py", "--cpu"])

    def test_nobody_there_is_refused(self):
        self.assertEqual(dock.look_at(dock.ComfyUIConfig("127.0.0.1", free_port()), 2).kind, dock.REFUSED)

    def test_hung_servers_are_asked_all_at_once(self):
        with contextlib.ExitStack() as stack:
            servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(10)]
            for server in servers:
                stack.callback(server.close)
            configs = [dock.ComfyUIConfig("127.0.0.1", server.getsockname()[1]) for server in servers]
            began = time.monotonic()
            answers = dock.probe_all(configs, 0.5)
            self.assertLess(time.monotonic() - began, 2.5)
        self.assertEqual({answer.kind for answer in answers}, {dock.TIMEOUT})


class TheQueueIsCounted(unittest.TestCase):
    def test_what_is_no_number_of_prompts_is_no_answer(self):
        for number in ("Infinity", "NaN", '"x"', "[]"):
            body = b'{"exec_info": {"queue_remaining": %s}}' % number.encode()
            with listening(answer=saying(b"HTTP/1.0 200 OK\r\n\r\n" + body)) as port, self.subTest(number=number):
                self.assertIsNone(dock.queue_counts(dock.ComfyUIConfig("127.0.0.1", port), 2))

    def counts(self, *answers):
        """What is counted at a server that says each of `answers` once, then nothing."""
        left = list(answers)

        def answer(connection):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + left.pop(0) if left else b"")

        with listening(answer=answer) as port:
            return dock.queue_counts(dock.ComfyUIConfig("127.0.0.1", port), 5)

    def test_running_and_waiting_prompts_are_told_apart(self):
        self.assertEqual(self.counts(b'{"queue_running": [1], "queue_pending": [2, 3]}'), (1, 2))

    def test_where_the_queue_cannot_be_read_its_length_is_asked(self):
        for remaining, counts in ((0, (0, 0)), (1, (1, 0)), (5, (1, 4))):
            with self.subTest(remaining=remaining):
                self.assertEqual(self.counts(b"{}", b'{"exec_info": {"queue_remaining": %d}}' % remaining), counts)
        with patch.object(dock, "QUEUE_LIMIT", 100):
            self.assertEqual(self.counts(b" " * 200, b'{"exec_info": {"queue_remaining": 2}}'), (1, 1))

    def test_a_server_that_tells_neither_has_no_counts(self):
        self.assertIsNone(self.counts(b"{}", b"{}"))
        self.assertIsNone(self.counts(b"[]"))


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

    def test_a_host_that_can_be_no_name_is_nobodys(self):
        for host in ("\u00f6..b", "a" * 70 + "\u00f6"):
            self.assertFalse(dock.is_port_bound(free_port(), host=host))
            self.assertFalse(dock.check_http_health(host, 8188, 0.5))

    def test_an_address_that_is_not_ours_or_unknown_is_no_port_in_use(self):
        port = free_port()
        self.assertFalse(dock.is_port_bound(port, host="192.0.2.1"))
        with patch.object(socket, "getaddrinfo", side_effect=socket.gaierror("no such host")):
            self.assertFalse(dock.is_port_bound(port, host="no-such-host"))

    def test_a_port_of_one_internet_protocol_is_free_in_the_other(self):
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
            except OSError:
                self.skipTest("no IPv6 here")
            port = server.getsockname()[1]
            self.assertTrue(dock.is_port_bound(port, host="::1"))
            self.assertFalse(dock.is_port_bound(port, host="127.0.0.1"))
        with socket.create_server(("0.0.0.0", 0)) as server:
            self.assertFalse(dock.is_port_bound(server.getsockname()[1], host="::"))

    def test_where_all_ports_are_taken_it_is_said(self):
        with self.assertRaisesRegex(dock.CDEnvironmentError, "No free port from 65535 on"):
            dock.next_free_port(65535, "127.0.0.1", {65535: "another"})

    def test_the_next_free_port_leaves_out_what_others_have_claimed(self):
        with listening() as port:
            found = dock.next_free_port(port, "127.0.0.1", {port + 1: "another"})
            self.assertGreater(found, port + 1)


class DownloadTest(InWorkshop):
    """Downloads from a server on loopback."""

    def setUp(self):
        self.registry = Workshop.registry
        patched = patch.object(dock, "RETRY_DELAYS", (0.01, 0.01, 0.01))
        patched.start()
        self.addCleanup(patched.stop)

    def get(self, path, limit=10_000_000):
        return b"".join(dock.download(self.registry.url + path, limit))

    def test_only_https_and_loopback_are_opened(self):
        for url in ("http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "https://",
            "http://127.evil.com/", "https://user:secret@example.org/", "https://[bad/", "javascript:x", "https://a b/",
            "https://a/\n"):  # fmt: skip
            with self.subTest(url), self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.check_url(url)
            self.assertEqual(caught.exception.code, "url")
            self.assertNotIn("secret", caught.exception.message)
        for url in ("https://example.org/x", "http://127.0.0.1:1/x", "http://localhost/x", "http://[::1]:9/x"):
            dock.check_url(url)

    def test_busy_answers_are_tried_again(self):
        self.registry.answers["/busy"] = [(429, {"Retry_After": 0}, b""), (503, {}, b""), (200, {}, b"done")]
        self.assertEqual(self.get("/busy"), b"done")

    def test_retry_after_is_waited_for(self):
        self.registry.answers["/later"] = [(429, {"Retry_After": 7}, b""), (200, {}, b"done")]
        with patch.object(dock.time, "sleep") as sleep:
            self.assertEqual(self.get("/later"), b"done")
        sleep.assert_called_once_with(7.0)

    def test_a_day_of_retry_after_is_not(self):
        self.registry.answers["/day"] = (429, {"Retry_After": 86400}, b"")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "86400 seconds"):
            self.get("/day")

    def test_tries_are_bounded_and_a_missing_page_is_asked_for_once(self):
        self.registry.answers["/down"] = (500, {}, b"")
        for path, code, tries in (("/down", "http-500", 4), ("/nothing-here", "http-404", 1)):
            before = len(self.registry.calls)
            error = error_of(self.get, path)
            self.assertEqual((error.code, len(self.registry.calls) - before), (code, tries))
        self.assertIn("not found", error.body)

    def test_a_broken_transfer_begins_anew_and_nothing_is_handed_on_twice(self):
        body = random.Random(1).randbytes(900_000) if sys.version_info >= (3, 9) else b""
        self.registry.answers["/broken"] = [(200, {"cut": 300_000}, body), (200, {}, body)]
        self.assertEqual(hashlib.sha256(self.get("/broken")).digest(), hashlib.sha256(body).digest())

    def test_too_much_is_refused(self):
        self.registry.say("/big", b"x" * 5000)
        error = error_of(self.get, "/big", limit=4999)
        self.assertEqual(error.code, "too-big")

    def test_redirects_stay_on_https(self):
        self.registry.say("/away", b"", 302, Location="http://example.org/")
        self.registry.say("/here", b"", 302, Location="/ua")
        self.registry.say("/ua", b"x")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "not https"):
            self.get("/away")
        self.assertEqual(self.get("/here"), b"x")

    def test_a_redirect_from_https_does_not_end_on_this_machine_without_it(self):
        opener = dock.url_opener("https://example.org/")
        redirects = next(one for one in opener.handlers if hasattr(one, "redirect_request"))
        request = urllib.request.Request("https://example.org/")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "redirects to an address that is not https"):
            redirects.redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1/")

    def test_a_file_that_changed_between_two_tries_is_not_pieced_together(self):
        body = b"x" * 300_000
        self.registry.answers["/other"] = [(200, {"cut": 100_000}, body), (200, {}, body + b"more")]
        with self.assertRaisesRegex(dock.CDEnvironmentError, "changed while it was downloaded"):
            self.get("/other")

    def test_progress_is_told_with_the_size_where_it_is_known(self):
        told = []

        def slowly(connection, head):
            connection.recv(65536)
            connection.sendall(head)
            for _ in range(2):
                connection.sendall(b"x" * dock.MEGABYTE)
                time.sleep(0.6)

        for head, size in ((b"", ""), (b"Content-Length: %d\r\n" % (2 * dock.MEGABYTE), " of 2.0")):
            with listening(answer=lambda talk, head=head: slowly(talk, b"HTTP/1.0 200 OK\r\n%s\r\n" % head)) as port:
                clock, told = time.monotonic, []
                with patch.object(dock.time, "monotonic", lambda clock=clock: clock() * 4):
                    for _ in dock.download(f"http://127.0.0.1:{port}/", 10 * dock.MEGABYTE, tell=told.append):
                        pass
            self.assertRegex(told[-1], rf"^downloaded [12]\.\d{size} MB$")

    def test_a_certificate_that_does_not_hold_is_called_one_and_not_tried_again(self):
        trouble = ssl.SSLCertVerificationError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "the TLS certificate of example.org cannot be") as caught:
            dock.pause_after("https://example.org/x", trouble, 1.0)
        self.assertIn("SSL_CERT_FILE", caught.exception.hint)

    def test_a_network_that_is_down_is_one_clear_line(self):
        error = error_of(dock.fetch_json, "http://127.0.0.1:1/")
        self.assertIn("cannot reach 127.0.0.1: Connection refused", error.message)
        self.assertIn("check the network", error.hint)

    def test_a_server_that_drips_anything_meets_the_deadline(self):
        heads = (b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
            b"HTTP/1.1 200 OK\r\n\r\n")  # fmt: skip

        def drip(connection, head):
            connection.sendall(head)
            for _ in range(30):
                connection.sendall(b"x")
                time.sleep(0.05)

        for head in heads:
            with self.subTest(head), listening(answer=lambda connection, head=head: drip(connection, head)) as port:
                began = time.monotonic()
                with self.assertRaisesRegex(dock.CDEnvironmentError, "took too long"):
                    list(dock.download(f"http://127.0.0.1:{port}/x", 1000, seconds=0.5))
                self.assertLess(time.monotonic() - began, 2)

    def test_no_json_is_said(self):
        self.registry.say("/html", b"<html>")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "not JSON"):
            dock.fetch_json(self.registry.url + "/html")


# ======================================================================================================================
# 6. Files
# ======================================================================================================================


class AFolderMadeTwice(unittest.TestCase):
    def setUp(self):
        self.root = temporary_folder(self)
        self.source, self.target = join(self.root, "a"), join(self.root, "b")
        write(join(self.source, "in", "small"), "small")
        write(join(self.source, "large"), "large" * 10)

    def test_files_are_shared_but_for_small_ones_and_links_stay_links(self):
        if can_link():
            os.symlink("large", join(self.source, "link"))
        dock.link_tree(self.source, self.target, 9)
        self.assertEqual(tree(self.target), tree(self.source))
        self.assertTrue(os.path.samefile(join(self.source, "large"), join(self.target, "large")))
        self.assertFalse(os.path.samefile(join(self.source, "in", "small"), join(self.target, "in", "small")))
        self.assertEqual(os.path.islink(join(self.target, "link")), can_link())

    def test_a_disk_without_hard_links_holds_copies_if_there_is_room(self):
        with patch.object(os, "link", side_effect=PermissionError(errno.EPERM, "not permitted")):
            dock.link_tree(self.source, self.target)
            self.assertEqual(tree(self.target), tree(self.source))
            full = types.SimpleNamespace(free=54)
            with patch.object(shutil, "disk_usage", return_value=full):
                error = error_of(dock.link_tree, self.source, self.target)
        self.assertEqual(error.code, "disk-full")


class WritingIsAllOrNothing(unittest.TestCase):
    @unittest.skipUnless(LINUX, "needs /proc/self/fd")
    def test_what_is_no_file_costs_no_handle(self):
        folder = temporary_folder(self)
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            self.assertRaises(OSError, dock.read_file, folder)
        self.assertEqual(len(os.listdir("/proc/self/fd")), len(before))

    def setUp(self):
        self.folder = temporary_folder(self)
        self.path = join(self.folder, "state")

    def test_the_file_is_whole_private_and_alone(self):
        dock.write_atomic(self.path, b"one")
        dock.write_atomic(self.path, b"two")
        self.assertEqual(Path(self.path).read_bytes(), b"two")
        self.assertEqual(os.listdir(self.folder), ["state"])
        if not WINDOWS:
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_a_failure_keeps_the_old_file_and_leaves_nothing(self):
        dock.write_atomic(self.path, b"old")
        with patch.object(dock, "replace_file", side_effect=OSError("no")), self.assertRaises(OSError):
            dock.write_atomic(self.path, b"new")
        self.assertEqual(Path(self.path).read_bytes(), b"old")
        self.assertEqual(os.listdir(self.folder), ["state"])

    def test_an_error_names_the_file_and_not_its_draft(self):
        path = join(self.folder, "nowhere", "state")
        with self.assertRaises(FileNotFoundError) as caught:
            dock.write_atomic(path, b"x")
        self.assertEqual(caught.exception.filename, path)
        with self.assertRaises(OSError) as caught:
            dock.read_file(self.folder)
        self.assertEqual(caught.exception.filename, self.folder)

    @unittest.skipIf(WINDOWS, "folders are not opened there")
    def test_a_folder_that_cannot_be_synced_is_no_failure(self):
        fsync = os.fsync
        no_folders = lambda fd: fsync(fd if stat.S_ISREG(os.fstat(fd).st_mode) else 2**30)  # noqa: E731
        with patch.object(os, "fsync", no_folders):
            dock.write_atomic(self.path, b"x")
        self.assertEqual(Path(self.path).read_bytes(), b"x")

    def test_a_target_that_a_reader_has_open_on_windows_is_waited_for(self):
        refusals = [PermissionError(errno.EACCES, "in use")] * 2
        replace = os.replace

        def replace_once_let(source, target):
            if refusals:
                raise refusals.pop()
            replace(source, target)

        Path(self.path).write_bytes(b"new")
        with patch.object(os, "replace", replace_once_let):
            if not WINDOWS:
                with self.assertRaises(PermissionError):
                    dock.replace_file(self.path, self.path + "2")
            with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", True):
                dock.replace_file(self.path, self.path + "2")
        self.assertEqual(os.listdir(self.folder), ["state2"])

    def test_of_a_folder_that_several_write_into_only_old_drafts_are_swept(self):
        for name in ("a.12-0123abcd.tmp", "b.12-0123abcd.tmp", "c.tmp", "d.x-0123abcd.tmp"):
            Path(self.folder, name).write_bytes(b"x")
            os.utime(join(self.folder, name), (0, 0))
        os.utime(join(self.folder, "b.12-0123abcd.tmp"))
        os.mkdir(join(self.folder, "e.12-0123abcd.tmp"))  # of whatever kind: it is no draft of ours
        os.utime(join(self.folder, "e.12-0123abcd.tmp"), (0, 0))
        dock.sweep_leftovers(self.folder)
        left = ["b.12-0123abcd.tmp", "c.tmp", "d.x-0123abcd.tmp", "e.12-0123abcd.tmp"]
        self.assertEqual(sorted(os.listdir(self.folder)), left)

    def test_leftovers_of_killed_writers_are_swept(self):
        Path(self.folder, "state.123-0123abcd.tmp").write_text("x", encoding="utf-8")
        Path(self.folder, "other.tmp").write_text("x", encoding="utf-8")
        dock.sweep_leftovers(self.path)
        self.assertEqual(os.listdir(self.folder), ["other.tmp"])

    @unittest.skipIf(WINDOWS, "links need rights on Windows")
    def test_links_are_not_followed(self):
        target = join(self.folder, "precious")
        Path(target).write_text("keep", encoding="utf-8")
        os.symlink(target, self.path)
        with self.assertRaises(OSError):
            dock.read_file(self.path)
        with self.assertRaises(OSError):
            dock.open_append(self.path)
        dock.write_atomic(self.path, b"new")
        self.assertEqual(Path(target).read_text(encoding="utf-8"), "keep")
        self.assertFalse(os.path.islink(self.path))


@unittest.skipUnless(WINDOWS, "only Windows keeps others from files that are open")
class FilesInUse(unittest.TestCase):
    def setUp(self):
        self.path = join(temporary_folder(self), "file")

    def test_a_replace_waits_for_the_readers(self):
        Path(self.path).write_bytes(b"old")
        reader = open(self.path, "rb")
        with self.assertRaises(PermissionError):
            dock.replace_file(__file__, self.path, 0.05)
        closing = threading.Timer(0.2, reader.close)
        closing.start()
        dock.write_atomic(self.path, b"new")
        closing.join()
        self.assertEqual(Path(self.path).read_bytes(), b"new")
        self.assertEqual(os.listdir(os.path.dirname(self.path)), ["file"])

    def test_a_log_that_somebody_reads_is_copied_and_emptied(self):
        Path(self.path).write_bytes(b"earlier\n" * 1000)
        with open(self.path, "rb"):
            dock.rotate_at_start(self.path, limit=100)
            self.assertEqual((os.path.getsize(self.path), os.path.getsize(self.path + ".old")), (0, 8000))

    def test_a_log_that_a_daemon_has_open_is_moved(self):
        with dock.open_append(self.path) as log:
            log.write(b"earlier\n" * 1000)
            dock.rotate_at_start(self.path, limit=100)
            self.assertEqual((os.path.exists(self.path), os.path.getsize(self.path + ".old")), (False, 8000))


class LocksExclude(unittest.TestCase):
    def test_whether_somebody_holds_a_lock_is_seen_without_taking_it(self):
        path = join(temporary_folder(self), "lock")
        self.assertFalse(dock.is_held(path))
        self.assertFalse(os.path.exists(path))
        with dock.locked(path, 1, "test"):
            self.assertTrue(dock.is_held(path))
        self.assertFalse(dock.is_held(path))
        with dock.locked(path, 0, "test"):
            pass

    def setUp(self):
        self.path = join(temporary_folder(self), "lock")

    def test_the_second_one_waits_and_then_names_the_holder(self):
        with dock.locked(self.path, 1, "run"):
            with self.assertRaises(dock.CDEnvironmentError) as caught, dock.locked(self.path, 0.1, "stop"):
                pass
        self.assertIn(f"'comfydock run', PID {os.getpid()}", caught.exception.message)
        with dock.locked(self.path, 0.1, "stop"):
            pass

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_a_file_system_without_locks_is_told_and_nothing_stays_open(self):
        environment, told = dock.Workspace(temporary_folder(self)).demo(), []
        environment.tell = told.append
        before = os.listdir("/proc/self/fd")
        with patch.object(dock, "lock_handle", side_effect=OSError(errno.ENOLCK, "No locks available")):
            with self.assertRaisesRegex(dock.CDEnvironmentError, f"{self.path} cannot be locked: .* has no locks"):
                with dock.locked(self.path, 1, "run"):
                    pass
            environment.stop()
            self.assertIn("has no locks", told[0])
        self.assertEqual(len(os.listdir("/proc/self/fd")), len(before))

    def holder(self, *lines, path=None):
        """Start a program that holds the lock while it does as the lines say, and return it when it prints a number."""
        head = f"import os, subprocess, sys; sys.path.insert(0, {HERE!r}); import comfydock as m\n"
        code = head + f"with m.locked({self.path!r}, 1, 'node add', handed_on=True):\n    " + "\n    ".join(lines)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.addCleanup(lambda: (child.kill(), child.wait(), child.stdout.close()))
        return child, int(child.stdout.readline())

    SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    RUN = f"m.run_command([sys.executable, '-c', {SLEEP!r}], tell=lambda line: print(line, flush=True))"

    @unittest.skipIf(WINDOWS, "there they end with us by a job")
    def test_a_command_that_outlives_us_holds_the_lock_and_only_it_is_ended(self):
        holder, command = self.holder("m.ending_with_us = lambda: None", self.RUN)
        text = Path(self.path).read_text(encoding="utf-8")
        with self.assertRaisesRegex(dock.CDEnvironmentError, f"'comfydock node add', PID {holder.pid}"):
            with dock.locked(self.path, 0, "next"):
                pass
        holder.kill()
        holder.wait()
        for lie in ("x", "1 x\n{}", text.replace(sys.executable, "/other/python"),
            text.replace('"start_ticks": ', '"start_ticks": 1')):  # fmt: skip
            Path(self.path).write_text(lie, encoding="utf-8")
            with self.assertRaisesRegex(
                dock.CDEnvironmentError, f"Another program .*PID {command}" if LINUX else "is busy"
            ):
                with dock.locked(self.path, 0, "next"):
                    pass
        self.assertTrue(alive(command))
        Path(self.path).write_text(text, encoding="utf-8")
        with dock.locked(self.path, 0, "next"):
            self.assertFalse(dock.is_process_alive(command))

    @unittest.skipUnless(LINUX or WINDOWS, "where the system can see to it")
    def test_a_command_ends_with_us_even_when_we_are_killed(self):
        holder, command = self.holder(self.RUN)
        holder.kill()
        self.assertTrue(eventually(lambda: not dock.is_process_alive(command)))

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_a_termination_ends_the_command_and_undoes_what_was_begun(self):
        for number in (signal.SIGTERM, signal.SIGHUP):
            undo = ["m.prepare_signals()", "try:", f"    {self.RUN}", "except KeyboardInterrupt as error:",
                    "    print('undone', error.exit_code, flush=True)"]  # fmt: skip
            holder, command = self.holder(*undo)
            holder.send_signal(number)
            self.assertEqual(holder.stdout.read(), f"undone {128 + number}\n")
            self.assertFalse(alive(command))

    @unittest.skipIf(WINDOWS, "POSIX descriptors")
    def test_what_a_finished_command_left_behind_holds_nothing(self):
        with dock.locked(self.path, 1, "node add", handed_on=True):
            pid = int(dock.run_command(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]).stdout)
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        with dock.locked(self.path, 0, "next"):
            self.assertTrue(alive(pid))

    @unittest.skipIf(WINDOWS, "POSIX stops")
    def test_a_holder_that_stands_still_is_told_and_a_kill_goes_past_it(self):
        self.folder = temporary_folder(self)
        self.path = dock.Workspace(self.folder).demo().paths.lock
        holder, _ = self.holder("print(1, flush=True)", "import time", "time.sleep(600)")
        environment = dock.Workspace(self.folder).get_environment("demo")
        self.assertRaisesRegex(dock.CDEnvironmentError, "is busy here", environment.stop, 0, kill=True)
        holder.send_signal(signal.SIGSTOP)
        eventually(lambda: dock.process_table().process(holder.pid).state == "stopped")
        with (self.assertRaisesRegex(dock.CDEnvironmentError, "and stands still") as caught,
            dock.locked(self.path, 0, "stop")):  # fmt: skip
            pass
        self.assertIn(f"kill -CONT {holder.pid}", caught.exception.hint)
        self.assertFalse(environment.stop(kill=True))
        self.assertTrue(alive(holder.pid))

    @unittest.skipIf(WINDOWS, "a file that is open is not deleted there")
    def test_who_waits_for_a_lock_file_that_is_deleted_or_replaced_opens_the_next_one(self):
        with dock.locked(self.path, 1, "run"):
            os.rename(self.path, self.path + ".gone")
            with dock.locked(self.path, 1, "run"):
                self.assertTrue(os.path.exists(self.path))
        deleted = lambda fd: os.path.exists(self.path) and not os.unlink(self.path)  # noqa: E731
        with patch.object(dock, "lock_handle", deleted):
            self.assertIsNone(dock.take_lock(self.path))

    def test_a_lock_that_cannot_be_signed_is_held_all_the_same(self):
        with patch.object(os, "ftruncate", side_effect=OSError(errno.ENOSPC, "full")):
            with dock.locked(self.path, 1, "run"):
                with self.assertRaises(dock.CDEnvironmentError) as caught, dock.locked(self.path, 0, "stop"):
                    pass
        self.assertIn("is busy here", caught.exception.message)


class LogsAreReadFromTheirEnd(unittest.TestCase):
    def setUp(self):
        self.path = join(temporary_folder(self), "comfyui.log")

    def tail(self, data, count, floor=0):
        Path(self.path).write_bytes(data)
        with open(self.path, "rb") as file:
            return data[dock.last_lines_offset(file, count, floor, len(data))[0] :]

    def test_last_lines_at_every_block_border(self):
        for size in (1, 7, dock.BLOCK - 1, dock.BLOCK, dock.BLOCK + 1, 3 * dock.BLOCK):
            lines = [b"%d\n" % number + b"x" * (size % 97) for number in range(1)] + [b"y" * size + b"\n", b"\n",
                b"last\n"]  # fmt: skip
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
        mark = f"{dock.SESSION_MARK}run 2026 environment env ===\n".encode()
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
        log, offset, inode = dock.begin_session(self.path, "id", "env")
        log.close()
        self.assertRegex(
            Path(self.path).read_bytes()[offset:], rb"^=== comfydock session id .* environment env, .* ===\n$"
        )
        self.assertEqual(offset, 8)
        self.assertEqual(inode, os.stat(self.path).st_ino)

    def test_rotation_moves_only_what_is_over_the_limit(self):
        Path(self.path).write_bytes(b"x" * 100)
        dock.rotate_at_start(self.path, limit=100)
        self.assertFalse(os.path.exists(self.path + ".old"))
        dock.rotate_at_start(self.path, limit=99)
        self.assertEqual(os.path.getsize(self.path + ".old"), 100)
        self.assertFalse(os.path.exists(self.path))

    def test_a_log_in_use_that_cannot_be_moved_is_copied_and_emptied_on_windows(self):
        Path(self.path).write_bytes(b"x" * 100)
        with patch.object(os, "replace", side_effect=PermissionError("in use")):
            with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", False):
                self.assertRaises(PermissionError, dock.move_log, self.path, 1)
            with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", True):
                dock.move_log(self.path, 1)
        self.assertEqual((read_bytes(self.path), read_bytes(self.path + ".old")), (b"", b"x" * 100))

    @unittest.skipUnless(LINUX, "needs /dev/full")
    def test_a_full_disk_names_the_log(self):
        Path(self.path).touch()
        full = lambda path: open("/dev/full", "ab", buffering=0)  # noqa: E731
        with patch.object(dock, "open_append", full), self.assertRaises(OSError) as caught:
            dock.begin_session(self.path, "id", "env")
        self.assertEqual((caught.exception.errno, caught.exception.filename), (errno.ENOSPC, self.path))

    def test_a_start_never_fails_for_rotation(self):
        Path(self.path).write_bytes(b"x" * 100)
        with patch.object(dock, "move_log", side_effect=OSError("no")):
            dock.rotate_at_start(self.path, limit=1)
        self.assertEqual(os.path.getsize(self.path), 100)

    def drained(self, follower):
        """All that a follower has to show now; a change of logs costs it a look or two."""
        return b"".join(follower.read() for _ in range(4))

    def test_two_rotations_between_two_looks_lose_nothing(self):
        Path(self.path).write_bytes(b"=== first\na\n")
        follower = dock.LogFollower(self.path, 0)
        self.assertEqual(self.drained(follower), b"=== first\na\n")
        with open(self.path, "ab") as file:
            file.write(b"b\n")
        for text in (b"=== second\n", b"=== third\n"):
            dock.move_log(self.path, 3)
            Path(self.path).write_bytes(text)
        self.assertEqual(self.drained(follower) + self.drained(follower), b"b\n=== second\n=== third\n")

    def test_a_start_keeps_as_many_old_logs_as_there_are(self):
        for end, text in (("", b"now"), (".old", b"before"), (".old.2", b"long ago")):
            Path(self.path + end).write_bytes(text)
        dock.rotate_at_start(self.path, limit=1)
        self.assertEqual([read_bytes(path) for path in dock.old_logs(self.path)], [b"before", b"now"])

    def test_any_number_of_old_logs_may_be_kept(self):
        for end in ("", ".old", ".old.3"):
            Path(self.path + end).write_bytes(end.encode())
        dock.move_log(self.path, 10**11)
        self.assertEqual([(path[len(self.path) :], read_bytes(path)) for path in dock.old_logs(self.path)],
                         [(".old.4", b".old.3"), (".old.2", b".old"), (".old", b"")])  # fmt: skip

    @needs_links
    def test_a_link_in_place_of_a_log_is_not_read(self):
        secret = self.path + ".secret"
        Path(secret).write_text("secret", encoding="utf-8")
        os.symlink(secret, self.path)
        for read in (lambda: dock.open_regular(self.path), dock.LogFollower(self.path, 0).read):
            self.assertRaises(OSError, read)

    def test_only_what_a_rotation_names_is_an_old_log(self):
        for end in ("", ".old", ".old.1", ".old.02", ".old.3", ".old.x", ".older", ".old.\u0662"):
            Path(self.path + end).write_bytes(b"x")
        self.assertEqual(dock.old_logs(self.path), [self.path + ".old.3", self.path + ".old"])

    def test_the_last_lines_of_several_logs_are_counted_over_their_borders(self):
        Path(self.path + ".old").write_bytes(b"1\n2\n3\n")
        Path(self.path).write_bytes(b"4\n5")
        environment = types.SimpleNamespace(log_path=self.path)
        for count, shown in ((1, b"5"), (2, b"4\n5"), (3, b"3\n4\n5"), (4, b"2\n3\n4\n5"), (9, b"1\n2\n3\n4\n5"),
            (0, b"")):  # fmt: skip
            parts = [read_bytes(path)[start:end] for path, start, end in dock.log_spans(environment, True, count)]
            self.assertEqual(b"".join(parts), shown, count)

    def test_following_survives_growth_rename_and_truncation(self):
        Path(self.path).write_bytes(b"one\n")
        follower = dock.LogFollower(self.path, 0)
        self.assertEqual(self.drained(follower), b"one\n")
        with open(self.path, "ab") as file:
            file.write(b"two\n")
        os.rename(self.path, self.path + ".old")
        Path(self.path).write_bytes(b"three\n")
        self.assertEqual(self.drained(follower), b"two\nthree\n")
        os.truncate(self.path, 0)
        self.assertEqual(self.drained(follower), b"")
        with open(self.path, "ab") as file:
            file.write(b"4\n")
        self.assertEqual(self.drained(follower), b"4\n")

    def test_a_copy_that_was_truncated_and_outgrew_the_former_is_not_mistaken_for_it(self):
        Path(self.path).write_bytes(b"=== first\na\n")
        follower = dock.LogFollower(self.path, 0)
        self.assertEqual(self.drained(follower), b"=== first\na\n")
        Path(self.path + ".old").write_bytes(b"=== first\na\nb\n")
        Path(self.path).write_bytes(b"=== second\n" + b"c\n" * 100)
        self.assertEqual(self.drained(follower), b"b\n=== second\n" + b"c\n" * 100)

    def test_a_log_that_is_just_being_rotated_on_windows_is_looked_at_again(self):
        follower = dock.LogFollower(self.path, 0)
        Path(self.path).write_bytes(b"one\n")
        with patch.object(dock, "open_regular", side_effect=PermissionError("in use")):
            with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", True):
                self.assertEqual(follower.read(), b"")
            with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", False):
                self.assertRaises(PermissionError, follower.read)
        self.assertEqual(self.drained(follower), b"one\n")

    def test_a_former_log_that_is_gone_is_not_waited_for(self):
        Path(self.path).write_bytes(b"=== first\n")
        follower = dock.LogFollower(self.path, 0)
        self.assertEqual(self.drained(follower), b"=== first\n")
        Path(self.path).write_bytes(b"=== second\n")
        self.assertEqual(self.drained(follower), b"=== second\n")

    def test_a_log_that_is_not_there_yet_is_waited_for(self):
        follower = dock.LogFollower(self.path, 0)
        self.assertEqual(follower.read(), b"")
        Path(self.path).write_bytes(b"now\n")
        self.assertEqual(self.drained(follower), b"now\n")


class UnpackTest(InWorkshop):
    """Archives, good and hostile."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(dir=Workshop.root)
        self.target = join(self.folder, "out")

    def archive(self, data):
        path = join(self.folder, "archive")
        with open(path, "wb") as file:
            file.write(data)
        return path

    def refused(self, archive, limit=1_000_000):
        error = error_of(dock.unpack, archive, self.target, limit)
        self.assertEqual(error.code, "archive")
        self.assertFalse(os.path.lexists(self.target), "something was written")
        self.assertEqual(os.listdir(self.folder), ["archive"])

    def test_a_zip_is_unpacked_with_its_odd_names(self):
        info = zipfile.ZipInfo("bin/run.sh")
        info.external_attr = 0o755 << 16
        self.assertEqual(dock.unpack(self.archive(zipped({"a.py": "1", info: "2", "e/": ""})), self.target, 10),
            ["a.py", "bin/run.sh"])  # fmt: skip
        self.assertTrue(WINDOWS or os.stat(join(self.target, "bin/run.sh")).st_mode & stat.S_IXUSR)
        self.assertTrue(os.path.isdir(join(self.target, "e")))
        dock.remove_tree(self.target)
        odd = {"w\\": "", "w\\a.py": "1", "\u5168\u3000\u89d2.json": "2"}
        self.assertEqual(dock.unpack(self.archive(zipped(odd)), self.target, 10), ["w/a.py", "\u5168\u3000\u89d2.json"])

    def test_hostile_names_are_refused(self):
        for name in ("../x", "a/../../x", "/etc/x", "C:/x", "C:x", "..\\x", "\\x", "\\\\host\\x", ".. /x", "a/... /x",
            "a:b", "a\nb", "x/\x1b[31m"):  # fmt: skip
            with self.subTest(name):
                self.refused(self.archive(zipped({"ok.py": "1", name: "x"})))

    def test_links_and_devices_are_refused(self):
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        self.refused(self.archive(zipped({"ok": "1", link: "/etc/passwd"})))
        device = zipfile.ZipInfo("device")
        device.external_attr = (stat.S_IFBLK | 0o666) << 16
        self.refused(self.archive(zipped({"ok": "1", device: ""})))

    def test_absurd_sizes_and_counts_are_refused(self):
        self.refused(self.archive(zipped({"big": "x" * 1001})), limit=1000)
        self.refused(self.archive(zipped({"a": "x" * 600, "b": "x" * 600})), limit=1000)
        with patch.object(dock, "MOST_MEMBERS", 3):
            self.refused(self.archive(zipped({str(number): "" for number in range(4)})))
        with patch.object(dock, "DIRECTORY_LIMIT", 1000):
            self.refused(self.archive(zipped({str(number): "" for number in range(100)})))

    @unittest.skipUnless(LINUX, "measures by resource")
    def test_a_million_members_are_refused_before_they_cost_memory(self):
        entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
        ask = "import comfydock, resource, sys\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        ask += "before = peak()\ntry: comfydock.unpack(sys.argv[1], sys.argv[2], 1 << 33)\n"
        ask += "except comfydock.CDEnvironmentError as error: print(error.code, peak() - before)"
        for count in (1_000_000, 250_000):
            for declared in (count, 1):
                directory = b"".join(entry + b"%07d" % number for number in range(count))
                sizes = struct.pack("<QQQQ", declared, declared, len(directory), 0)
                end = b"PK\6\6" + struct.pack("<QHHII", 44, 45, 45, 0, 0) + sizes
                end += b"PK\6\7" + struct.pack("<IQI", 0, len(directory), 1)
                end += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
                words = [sys.executable, "-c", ask, self.archive(directory + end), self.target]
                with self.subTest(count=count, declared=declared):
                    code, peak = subprocess.run(words, cwd=HERE, stdout=subprocess.PIPE).stdout.split()
                    self.assertEqual(code, b"archive")
                    self.assertLess(int(peak), 64 << 10)

    def test_a_file_that_is_also_a_folder_is_refused(self):
        self.refused(self.archive(zipped({"a": "1", "a/b": "2"})))
        self.refused(self.archive(zipped({"a/": "", "a": "1"})))

    def test_damage_is_said(self):
        for data in (b"hello", b"PK\x03\x04garbage", b"\x1f\x8bgarbage", b""):
            with self.subTest(data[:4]):
                self.refused(self.archive(data))
        whole = zipped({"a.py": "print(1)"})
        with self.assertRaisesRegex(dock.CDEnvironmentError, "cannot be unpacked"):
            dock.unpack(self.archive(whole.replace(b"print(1)", b"print(2)")), self.target, 1000)

    def test_only_a_folder_that_is_around_all_is_left_out(self):
        cases = (({"./": "", "a-1/": "", "a-1/x": "1", "a-1/b/y": "2"}, {"x": b"1", "b/y": b"2"}),
            ({"a/x": "1", "b/y": "2"}, {"a/x": b"1", "b/y": b"2"}), ({"x": "1"}, {"x": b"1"}))  # fmt: skip
        for number, (files, unpacked) in enumerate(cases):
            target = self.target + str(number)
            with self.subTest(files=files):
                dock.unpack(self.archive(zipped(files)), target, 100, strip=True)
                self.assertEqual(tree(target), unpacked)


class RemovalTest(InWorkshop):
    """Deleting and moving aside."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(dir=Workshop.root)
        self.precious = join(self.folder, "models", "x.safetensors")
        write(self.precious, "years")

    def test_links_are_cut_not_followed(self):
        doomed = join(self.folder, "doomed")
        os.makedirs(join(doomed, "in"))
        os.symlink(os.path.dirname(self.precious), join(doomed, "in", "models"))
        top = join(self.folder, "top")
        os.symlink(os.path.dirname(self.precious), top)
        dock.remove_tree(doomed)
        dock.remove_tree(top)
        dock.remove_tree(top)
        self.assertEqual(os.listdir(self.folder), ["models"])
        self.assertEqual(read_bytes(self.precious), b"years")

    @unittest.skipIf(WINDOWS, "folders have no modes there")
    def test_a_folder_inside_is_made_writable_but_never_the_one_around_all(self):
        inner = join(self.folder, "inner")
        file = join(inner, "file")
        write(file, "x")
        for folder in (inner, self.folder):
            os.chmod(folder, 0o500)
        dock.unlock_and_retry(inner, os.unlink, file, PermissionError("no"))
        self.assertFalse(os.path.exists(file))
        self.assertTrue(os.stat(inner).st_mode & stat.S_IWUSR)
        self.assertFalse(os.stat(self.folder).st_mode & stat.S_IWUSR)
        os.chmod(self.folder, 0o700)

    def test_what_cannot_be_renamed_is_copied_whole_and_then_deleted(self):
        source, target = join(self.folder, "source"), join(self.folder, "target")
        write(join(source, "inner", "file"), "x")
        real = os.rename

        def rename(old, new):
            if old == source:
                raise OSError(errno.EXDEV, "another disk")
            real(old, new)

        with patch.object(os, "rename", rename):
            dock.move(source, target)
            self.assertEqual((tree(target), os.path.lexists(source)), ({"inner/file": b"x"}, False))
            shelf = join(self.folder, "shelf")
            write(join(source, "file"), "y")
            self.assertEqual(tree(dock.move_aside(source, shelf, "source")), {"file": b"y"})
        self.assertEqual(sorted(os.listdir(self.folder)), ["models", "shelf", "target"])

    def test_a_move_to_another_disk_may_break_off_anywhere(self):
        """At each step on the disk; then the one folder or the other is whole, and undo brings back what was."""
        for step in range(1, 40):
            root = tempfile.mkdtemp(dir=self.folder)
            node = join(root, "node")
            change = dock.NodeChange(node, node, contextlib.ExitStack())
            for name in ("a", "b"):
                write(join(node, name), "x")
            os.makedirs(change.folder)
            with self.subTest(step=step), contextlib.ExitStack() as stack:
                died = self.dies_at(stack, step, node)
                with contextlib.suppress(KeyboardInterrupt):
                    change.move(node, change.old)
                stack.close()
                change.undo.close()
                self.assertEqual((tree(node), os.path.lexists(change.old)), ({"a": b"x", "b": b"x"}, False))
            if not died:
                break
        self.assertTrue(5 < step < 39, step)

    def dies_at(self, stack, step, source):
        """Renames of `source` fail as to another disk; at the `step`th deed nothing is done any more. Who died is told."""
        deeds, died = [], []

        def mortal(name):
            real = getattr(os, name)

            def deed(path, *more, **named):
                if name == "rename" and path == source:
                    raise OSError(errno.EXDEV, "another disk")
                deeds.append(name)
                if len(deeds) >= step:
                    died.append(name)
                    raise KeyboardInterrupt
                return real(path, *more, **named)

            stack.enter_context(patch.object(os, name, deed))

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            mortal(name)
        return died

    @unittest.skipIf(WINDOWS, "needs mkfifo")
    def test_what_cannot_be_copied_is_named_in_one_sentence(self):
        source = join(self.folder, "source")
        write(join(source, "file"), "x")
        for target, words in ((join(source, "in"), "into itself"), (join(self.folder, "t"), "pipe cannot be")):
            if words != "into itself":
                os.mkfifo(join(source, "pipe"))
            error = error_of(dock.copy_any, source, target)
            self.assertIn(words, error.message)
            self.assertNotIn("[", error.message)

    @needs_links
    def test_files_are_carried_over_beside_what_is_new_and_never_through_its_links(self):
        old, new, outside = (join(self.folder, name) for name in ("old", "new", "outside"))
        for name in ("mine.txt", "theirs.txt", "data/mine.txt", "deep/er/mine.txt"):
            write(join(old, name), "mine")
        write(join(new, "new.txt"), "new")
        os.mkdir(outside)
        self.assertEqual(dock.carry_over(old, new, {"theirs.txt"}), [])
        self.assertEqual(sorted(tree(new)), ["data/mine.txt", "deep/er/mine.txt", "mine.txt", "new.txt"])
        for place in ("data", "deep"):
            shutil.rmtree(join(new, place))
        os.symlink(outside, join(new, "data"))
        write(join(new, "deep", "er"), "a file")
        self.assertEqual(
            sorted(dock.carry_over(old, new, {"theirs.txt"})), ["data/mine.txt", "deep/er/mine.txt", "mine.txt"]
        )
        self.assertEqual(os.listdir(outside), [])

    def test_a_file_that_may_not_be_deleted_is_made_deletable_first(self):
        file = join(self.folder, "object")
        write(file, "x")
        refusal = PermissionError("read-only")
        with self.assertRaises(PermissionError):  # a listing is tried again by who asked for the removal
            dock.unlock_and_retry(self.folder, os.scandir, self.folder, refusal)
        with self.assertRaises(OSError):
            dock.unlock_and_retry(self.folder, os.unlink, file, OSError(errno.EIO, "broken"))
        os.chmod(file, 0)
        dock.unlock_and_retry(self.folder, os.unlink, file, refusal)
        self.assertFalse(os.path.exists(file))
        dock.unlock_and_retry(self.folder, os.unlink, file, FileNotFoundError())

    @needs_links
    def test_to_delete_a_link_nothing_is_changed_behind_it(self):
        link = join(self.folder, "link")
        os.symlink(self.precious, link)
        os.chmod(self.precious, 0o444)
        with self.assertRaises(PermissionError):
            dock.unlock_and_retry(self.folder, os.unlink, link, PermissionError("no"))
        self.assertEqual(stat.S_IMODE(os.stat(self.precious).st_mode), 0o444)

    def test_a_file_in_use_is_tried_again_and_then_named(self):
        tries = []

        def rename():
            tries.append(1)
            if len(tries) != 2:
                raise OSError(errno.EBUSY, "in use")

        dock.retry_while_busy(rename, self.precious)
        self.assertEqual(len(tries), 2)
        error = error_of(dock.retry_while_busy, rename, self.precious)
        self.assertIn(f"{self.precious} cannot be changed: in use", error.message)
        self.assertEqual(error.code, "in-use")
        self.assertGreater(len(tries), 4)

    def test_nothing_is_moved_or_linked_over_what_is_there(self):
        other = join(self.folder, "other")
        write(other, "x")
        for function, source in ((dock.move, self.precious), (dock.link_folder, os.path.dirname(self.precious))):
            with self.subTest(function=function.__name__), self.assertRaises(dock.CDEnvironmentError):
                function(source, other)
        self.assertEqual((read_bytes(other), read_bytes(self.precious)), (b"x", b"years"))

    def test_what_is_carried_over_is_copied_where_there_are_no_hard_links(self):
        new = join(self.folder, "new")
        os.mkdir(new)
        with patch.object(os, "link", side_effect=OSError(errno.EPERM, "no links here")):
            dock.carry_over(os.path.dirname(self.precious), new, set())
        self.assertEqual(tree(new), {"x.safetensors": b"years"})

    @needs_links
    def test_the_digest_of_a_link_is_of_where_it_points(self):
        link = join(self.folder, "link")
        os.symlink("nowhere", link)
        self.assertEqual(dock.file_digest(link), hashlib.sha256(b"nowhere").hexdigest())
        self.assertEqual(dock.file_digest(self.precious), hashlib.sha256(b"years").hexdigest())

    def test_a_junction_is_known_by_its_tag(self):
        status = Mock(st_mode=stat.S_IFDIR, st_reparse_tag=0xA0000003)
        with patch.object(dock.os, "lstat", return_value=status):
            self.assertTrue(dock.is_link("x"))

    def test_a_mounted_volume_or_a_bind_mount_stops_it_before_anything_is_gone(self):
        if not LINUX or os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
            self.skipTest("needs mount namespaces")
        work = "import comfydock as dock, sys; {}"
        works = ("dock.remove_tree(sys.argv[1])", "dock.move_aside(sys.argv[1], sys.argv[1] + '.aside', 'x')")
        for number, (mount, act) in enumerate(
            itertools.product(("-t tmpfs tmpfs", f"--bind {self.folder}/models"), works)
        ):
            doomed = join(self.folder, f"doomed {number}")
            write(join(doomed, "a", "file"), "x")
            os.makedirs(join(doomed, "the volume"))
            volume, python = shlex.quote(f"{doomed}/the volume"), shlex.quote(work.format(act))
            script = f"mount {mount} {volume} && touch {volume}/model && {sys.executable} -c {python} '{doomed}'; "
            done = subprocess.run(["unshare", "-m", "sh", "-c", script + f"ls {volume} '{doomed}/a'"], cwd=HERE,
                capture_output=True, text=True)  # fmt: skip
            with self.subTest(mount=mount, act=act):
                self.assertIn(f"{doomed}/the volume is mounted there", done.stderr)
                self.assertIn("model", done.stdout)
                self.assertIn("file", done.stdout)

    def test_moved_aside_twice_keeps_both(self):
        first = join(self.folder, "node")
        shelf = join(self.folder, "shelf")
        with patch.object(dock.time, "strftime", return_value="T"):
            for _ in range(2):
                write(join(first, "a"), "x")
                dock.move_aside(first, shelf, "node")
        self.assertEqual(sorted(tree(shelf)), ["T-2/node/a", "T/node/a"])


# ======================================================================================================================
# 7. The state file
# ======================================================================================================================


class TheStateFile(unittest.TestCase):
    def setUp(self):
        self.path = join(temporary_folder(self), ".comfyui.state")

    def test_it_is_read_as_it_was_written(self):
        state = dock.ProcessState.from_dict({**PLANS_STATE, "env": {"KEY": "välue"}, "unknown": [1]})
        dock.write_state(self.path, state)
        self.assertEqual(dock.read_state(self.path).to_dict(), state.to_dict())

    def test_nothing_there_and_nonsense_read_as_none(self):
        self.assertIsNone(dock.read_state(self.path))
        for content in (b"", b"\xff\xfe\x00", b"[]", b"{}", b"null", b"1e999", b"[" * 100000, b"x" * 2000000):
            Path(self.path).write_bytes(content)
            self.assertIsNone(dock.read_state(self.path), content[:20])

    @unittest.skipIf(WINDOWS, "links need rights on Windows")
    def test_a_planted_link_is_not_followed(self):
        state = dock.ProcessState.from_dict(PLANS_STATE)
        dock.write_state(self.path + ".real", state)
        os.symlink(self.path + ".real", self.path)
        self.assertIsNone(dock.read_state(self.path))


# ======================================================================================================================
# 8. Manifest, git and nodes
# ======================================================================================================================


OLD_MANIFEST = '''\
# my environment, do not lose this comment
[project]
name = "comfydock-env-my-env"
version = "0.1.0"
requires-python = ">=3.9"
dependencies = [
    "aiohttp>=3.11.8",  # web
    "numpy",
]

[dependency-groups]
comfyui-kjnodes-f4971021 = ["tiny"]
other = [
    "brand", # kept
]

[tool.comfydock]
comfyui_version = "v0.3.64"     # pinned
comfyui_version_type = "release"
comfyui_commit_sha = "a125cd84"
python_version = "3.12"
torch_backend = "auto"
note = """
[tool.comfydock.nodes.fake]
"""

[tool.comfydock.nodes.comfyui-kjnodes]
name = "ComfyUI-KJNodes"
registry_id = "comfyui-kjnodes"
repository = "https://github.com/kijai/ComfyUI-KJNodes"
version = "1.1.5"
download_url = "https://cdn.comfy.org/x"
source = "registry"
pinned = true

# the user's own
[tool.comfydock.nodes."my dev node"]
name = "my dev node"
version = "dev"
source = "development"

[tool.comfydock.workflows.portrait]
path = "workflows/portrait.json"
nodes = ["comfyui-kjnodes"]
models = [ { filename = "x.safetensors", category = "checkpoints" } ]

[tool.comfydock.models.abc]
filename = "x.safetensors"
added = 2025-10-30T12:00:00Z

[[tool.uv.index]]
name = "pytorch-cu128"
url = "https://download.pytorch.org/whl/cu128"
explicit = true

[tool.uv]
constraint-dependencies = ["torch==2.9.0+cu128"]
'''


class ManifestTest(InWorkshop):
    """Reading, and writing as text."""

    def setUp(self):
        self.paths = dock.EnvironmentPaths(tempfile.mkdtemp(dir=Workshop.root))
        self.put(OLD_MANIFEST)

    def put(self, text):
        write(self.paths.manifest, text)

    def text(self):
        return read_bytes(self.paths.manifest).decode()

    def added(self, key="new-node", **fields):
        return key, dock.NodeInfo(key, version="1.0.0", source="registry", **fields), ["tiny>=1"]

    def test_it_is_read(self):
        manifest = dock.read_manifest(self.paths)
        self.assertEqual(
            (manifest.comfyui_version, manifest.torch_backend, manifest.comfyui_path, manifest.python_path),
            ("v0.3.64", "auto", None, None),
        )
        self.assertEqual(manifest.nodes["comfyui-kjnodes"], dock.NodeInfo("ComfyUI-KJNodes", "comfyui-kjnodes",
            "https://github.com/kijai/ComfyUI-KJNodes", "1.1.5", "https://cdn.comfy.org/x", "registry"))  # fmt: skip
        self.assertEqual(list(manifest.nodes), ["comfyui-kjnodes", "my dev node"])

    def test_the_cache_is_used_for_the_very_same_bytes_only(self):
        dock.read_manifest(self.paths)
        with patch.object(dock, "parse_toml", side_effect=AssertionError("parsed")):
            self.assertEqual(len(dock.read_manifest(self.paths).nodes), 2)
        self.put(OLD_MANIFEST.replace('"v0.3.64"', '"v0.3.65"'))
        self.assertEqual(dock.read_manifest(self.paths).comfyui_version, "v0.3.65")

    def test_a_damaged_cache_is_read_past(self):
        for text in ("", "{", "[]", '{"sha256": 1}'):
            write(self.paths.cache, text)
            self.assertEqual(len(dock.read_manifest(self.paths).nodes), 2)

    def test_a_python_without_toml_reads_with_the_pip_of_the_environment(self):
        vendored = join(self.paths.venv, "lib", "python3.9", "site-packages", "pip", "_vendor", "tomli.py")
        write(vendored, "def loads(text):\n    return {'tool': {'comfydock': {'demo': True}}}\n")
        write(dock.venv_python(self.paths.venv), "")
        with patch.dict(sys.modules, {"tomllib": None, "pip._vendor.tomli": None}):
            self.assertRaisesRegex(dock.CDEnvironmentError, "nothing here can read", dock.read_manifest, self.paths)
            self.assertTrue(dock.read_manifest(self.paths, dock.venv_python(self.paths.venv)).demo)

    def test_a_broken_one_is_one_line_with_its_number_and_stays(self):
        for text, line in (("[a]\nb = 1\nc = \n", 3), ("a = 1\na = 2\n", 2), ('a = "\n', 1), ("a = [1,\n2\n", 3)):
            self.put(text)
            error = error_of(dock.change_node, self.paths, *self.added())
            self.assertIn(f"line {line}: ", error.message)
            self.assertNotIn("\n", error.message)
            self.assertEqual(self.text(), text)
        with open(self.paths.manifest, "wb") as file:
            file.write(b"a = 1\nb = '\xff'\n")
        self.assertRaisesRegex(dock.CDEnvironmentError, "line 2: not UTF-8", dock.read_manifest, self.paths)

    def test_adding_and_removing_a_node_gives_the_same_bytes_back(self):
        variants = {"old": OLD_MANIFEST, "crlf": OLD_MANIFEST.replace("\n", "\r\n"), "mark": "\ufeff" + OLD_MANIFEST,
            "bare": '[project]\nname = "x"\n', "empty": "", "tool": "[tool.ruff]\nline-length = 1\n",
            "indented": '[tool]\n  [tool.comfydock]\n  a = 1\n\n  [tool.comfydock.nodes.a]\n  name = "a"\n'}  # fmt: skip
        for name, text in variants.items():
            with self.subTest(name):
                self.put(text)
                dock.change_node(self.paths, *self.added())
                self.assertIn("new-node", dock.read_manifest(self.paths).nodes)
                self.assertEqual(
                    [line for line in text.splitlines(True) if line not in self.text().splitlines(True)], []
                )
                dock.change_node(self.paths, "new-node", None, [])
                self.assertEqual(self.text(), text)

    def test_a_change_touches_the_nodes_lines_alone(self):
        manifest = dock.read_manifest(self.paths)
        info = manifest.nodes["comfyui-kjnodes"]
        info.version = "1.2.0"
        dock.change_node(self.paths, "comfyui-kjnodes", info, ["tiny", "brand"])
        group = manifest.group_name(info)
        self.assertEqual(self.text(),
            OLD_MANIFEST.replace('"1.1.5"', '"1.2.0"').replace(f'{group} = ["tiny"]', f'{group} = ["tiny", "brand"]'))  # fmt: skip

    def test_group_names_are_those_of_1_0(self):
        info = dock.NodeInfo("ComfyUI-KJNodes", "comfyui-kjnodes", "https://github.com/kijai/ComfyUI-KJNodes")
        digest = hashlib.sha256(b"https://github.com/kijai/ComfyUI-KJNodes").hexdigest()[:8]
        self.assertEqual(dock.Manifest({}, {}).group_name(info), f"comfyui-kjnodes-{digest}")

    def test_inline_tables_and_odd_keys_can_be_changed(self):
        self.put('[tool.comfydock.nodes]\n"a.b" = { name = "a.b", source = "git" }\nc = { name = "c" }\n')
        dock.change_node(self.paths, "a.b", dock.NodeInfo("a.b", version="2", source="git"), [])
        self.assertEqual(dock.read_manifest(self.paths).nodes["a.b"].version, "2")
        self.assertIn('c = { name = "c" }', self.text())

    def test_hostile_values_stay_values(self):
        value = 'a"]\n[tool.comfydock]\ncomfyui_path = "/evil"\n#\\\x00\x7f\u2028'
        dock.change_node(self.paths, *self.added('x"]\n[y', repository=value))
        manifest = dock.read_manifest(self.paths)
        self.assertIsNone(manifest.comfyui_path)
        self.assertEqual(manifest.nodes['x"]\n[y'].repository, value)

    def test_what_cannot_be_changed_as_text_is_not_saved(self):
        text = 'tool = { comfydock = { nodes = { a = { name = "a" } } } }\n'
        self.put(text)
        self.assertRaises(dock.CDEnvironmentError, dock.change_node, self.paths, *self.added())
        self.assertEqual(self.text(), text)

    @needs_links
    def test_it_is_written_to_its_real_path_with_its_mode(self):
        real = join(self.paths.root, "dotfiles.toml")
        os.rename(self.paths.manifest, real)
        os.symlink(real, self.paths.manifest)
        os.chmod(real, 0o640)
        dock.change_node(self.paths, *self.added())
        self.assertTrue(os.path.islink(self.paths.manifest))
        self.assertIn(b"new-node", read_bytes(real))
        self.assertEqual(stat.S_IMODE(os.stat(real).st_mode), 0o640)

    def test_settings_are_replaced_in_place(self):
        dock.change_settings(self.paths, {"comfyui_path": "/x y", "torch_backend": None, "python_version": "3.13"})
        manifest = dock.read_manifest(self.paths)
        self.assertEqual((manifest.comfyui_path, manifest.torch_backend), ("/x y", None))
        self.assertIn("# pinned", self.text())


class OddManifests(unittest.TestCase):
    """Valid TOML that one seldom sees."""

    def setUp(self):
        self.paths = dock.EnvironmentPaths(join(temporary_folder(self), "e"))

    def changed(self, text, info):
        write(self.paths.manifest, text)
        dock.change_node(self.paths, info.name, info, [])
        return Path(self.paths.manifest).read_text(encoding="utf-8")

    def test_a_date_of_the_users_stays_one(self):
        text = (
            '[tool.comfydock.nodes.pack]\nname = "pack"\nsource = "git"\nversion = "1"\nadded = 2024-05-01T10:00:00Z\n'
        )
        if dock.toml_module(None) is None:
            self.skipTest("no TOML reader here")
        said = self.changed(text, dock.NodeInfo("pack", version="2", source="git"))
        self.assertIn('version = "2"', said)
        self.assertRegex(said, r"(?m)^added = 2024-05-01T10:00:00(Z|\+00:00)$")

    def test_a_number_where_a_table_is_meant_is_refused_in_one_sentence(self):
        for text in ("[tool]\ncomfydock = 3\n", "tool = 3\n"):
            with self.subTest(text=text), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.changed(text, dock.NodeInfo("pack", source="git"))
            self.assertEqual(caught.exception.code, "manifest")
            self.assertEqual(Path(self.paths.manifest).read_text(encoding="utf-8"), text)


@needs_git
class GitTest(InWorkshop):
    """GitManager and what git may be given."""

    def setUp(self):
        self.cec = join(tempfile.mkdtemp(dir=Workshop.root), ".cec")
        write(join(self.cec, "pyproject.toml"), "")

    def test_a_new_repository_ignores_what_runs(self):
        self.assertTrue(dock.GitManager(self.cec).initialize_environment_repo("first"))
        ignored = read_bytes(join(self.cec, ".gitignore")).decode()
        self.assertTrue(
            ignored.startswith("# ComfyUI process state (runtime only, not configuration)\n.comfyui.state\n")
        )
        for name in dock.EnvironmentPaths.IGNORED:
            write(
                join(self.cec, name.rstrip("/").replace("*", "x"), "a" if name.endswith("/") else ""), ""
            ) if name.endswith("/") else write(join(self.cec, name.replace("*", "x")), "")
        self.assertEqual(git(self.cec, "status", "--porcelain"), "")
        self.assertEqual(git(self.cec, "log", "--format=%s"), "first")

    def test_a_repository_that_is_not_ours_stays_clean(self):
        git(self.cec, "init", "--quiet")
        write(join(self.cec, ".gitignore"), ".complete\n")
        git(self.cec, "add", "-A")
        git(self.cec, "commit", "-m", "theirs")
        for _ in range(2):
            self.assertFalse(dock.GitManager(self.cec).initialize_environment_repo("ours"))
        write(join(self.cec, ".comfyui.state"), "{}")
        self.assertEqual(git(self.cec, "status", "--porcelain"), "")
        self.assertEqual(git(self.cec, "log", "--format=%s"), "theirs")
        self.assertEqual(read_bytes(join(self.cec, ".git", "info", "exclude")).split().count(b".comfyui.state"), 1)

    def test_a_git_that_does_not_work_leaves_no_half_of_a_repository(self):
        with patch.object(dock.GitManager, "commit", side_effect=dock.CDEnvironmentError("broken .gitconfig")):
            said = []
            dock.complete_environment(dock.EnvironmentPaths(os.path.dirname(self.cec)), said.append, {}, [], [])
        self.assertIn("broken .gitconfig", said[0])
        self.assertFalse(os.path.exists(join(self.cec, ".git")))
        dock.complete_environment(dock.EnvironmentPaths(os.path.dirname(self.cec)), said.append, {}, [], [])
        self.assertEqual((len(said), git(self.cec, "log", "--format=%s")), (1, "Initial environment setup"))

    def test_a_branch_may_look_like_a_commit(self):
        repository = make_repository("dated", {"a": "1"})
        commits = [commit(repository, {"a": "2"})]
        git(repository, "checkout", "--quiet", "-b", "20250101")
        commits.append(commit(repository, {"a": "3"}))
        for reference, content in (("20250101", b"3"), (commits[0], b"2"), (commits[0][:10], b"2"), (None, b"3")):
            folder = join(self.cec, f"of-{reference}")
            with self.subTest(reference=reference):
                dock.clone(repository, reference, folder)
                self.assertEqual(read_bytes(join(folder, "a")), content)

    def test_without_git_there_is_still_the_ignore_file(self):
        with patch.object(dock, "git_path", return_value=None):
            self.assertFalse(dock.GitManager(self.cec).initialize_environment_repo("x"))
        self.assertTrue(os.path.exists(join(self.cec, ".gitignore")))

    def test_hostile_addresses_are_refused(self):
        for url in ("ext::sh -c 'touch /tmp/pwned'", "--upload-pack=touch /tmp/pwned", "-u", "http://example.org/x",
            "git://example.org/x", "ftp://x/y", "https://me:secret@example.org/x", "ssh://-oProxyCommand=x/y", "fd::3",
            "https://a/b\n", "ssh://host/-x"):  # fmt: skip
            with self.subTest(url), self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.check_repository(url)
            self.assertEqual(caught.exception.code, "url")
        for url in ("https://github.com/a/b", "ssh://git@host:22/a/b", "git@github.com:a/b.git", "/a/b", "C:\\a\\b",
            "http://127.0.0.1:1/a"):  # fmt: skip
            dock.check_repository(url)
        for reference in ("--help", "a..b", "a b", "", "-x", "a:b", "x" * 300):
            self.assertRaises(dock.CDEnvironmentError, dock.check_reference, reference)

    def test_references_are_told_from_users(self):
        for identifier, parts in {"https://h/u/r@v1": ("https://h/u/r", "v1"), "git@h:u/r": ("git@h:u/r", None),
            "git@h:u/r@a/b": ("git@h:u/r", "a/b"), "ssh://git@h/u/r@x": ("ssh://git@h/u/r", "x"),
            "https://h/u/r": ("https://h/u/r", None), "./x@v2": ("./x", "v2"),
            "file:///a/b@c": ("file:///a/b", "c")}.items():  # fmt: skip
            self.assertEqual(dock.split_reference(identifier), parts)

    def test_git_never_asks_and_a_submodule_cannot_name_a_local_path(self):
        done = subprocess.CompletedProcess([], 0, "", "")
        for url, ways in (("https://x/y", "https:ssh"), ("/x", "https:ssh:file")):
            with patch.object(dock, "run_command", return_value=done) as run:
                dock.git(["ls-remote"], url=url)
            environ = run.call_args.args[2]
            self.assertEqual((environ["GIT_ALLOW_PROTOCOL"], environ["GIT_TERMINAL_PROMPT"]), (ways, "0"))

    def test_the_newest_release_is_the_highest_version_of_the_tags(self):
        self.assertEqual(dock.newest_release(Workshop.comfyui), "v0.10.0")


@needs_git
class CreateTest(InWorkshop):
    """The creating engine."""

    def test_a_checkout_of_something_else_is_named_with_the_way_out(self):
        folder = make_repository("dev/ComfyUI", {"main.py": ""})
        error = error_of(dock.code_facts, folder, reference="v9")
        said = f"{folder} is another version, and something else is asked for now"
        self.assertEqual((error.message, error.hint[1]), (said, ("delete", "dev")))

    def paths(self):
        return dock.EnvironmentPaths(join(tempfile.mkdtemp(dir=Workshop.root), "env"))

    def make(self, paths, **options):
        """Create an environment; returns its manifest and what was said."""
        said = []
        dock.create_environment(paths, said.append, **{"no_install": True, **options})
        return dock.read_manifest(paths), said

    def test_a_whole_environment_with_its_venv(self):
        paths = shared_environment()
        manifest = dock.read_manifest(paths)
        self.assertEqual((manifest.comfyui_version, manifest.torch_backend), ("v0.10.0", "cpu"))
        self.assertEqual(manifest.settings["comfyui_version_type"], "release")
        self.assertEqual(manifest.settings["comfyui_commit_sha"], git(paths.comfyui, "rev-parse", "HEAD"))
        self.assertTrue(os.path.exists(paths.complete))
        frozen = dock.Packages(Workshop.python).freeze()
        for line in ("torch==2.0.0+cpu", "numpy==1.26.0"):
            self.assertIn(line, frozen)
        self.assertTrue([line for line in frozen if line.startswith("pip==")], "ComfyUI-Manager needs pip")
        self.assertIn(b'url = "https://download.pytorch.org/whl/cpu"', read_bytes(paths.manifest))
        self.assertEqual(git(paths.cec, "log", "--format=%s"), "Initial environment setup")
        self.assertEqual(git(paths.cec, "status", "--porcelain"), "")

    def test_sources(self):
        archive = join(Workshop.root, "ComfyUI.zip")
        git(Workshop.comfyui, "archive", "--prefix=ComfyUI-0.9.0/", "-o", archive, "v0.9.0")
        Workshop.registry.say("/ComfyUI.zip", read_bytes(archive))
        copied = join(Workshop.root, "copied")
        if not os.path.exists(copied):
            shutil.copytree(Workshop.comfyui, copied, ignore=shutil.ignore_patterns(".git"))
        for source, reference, version in ((archive, None, "v0.9.0"),
            (Workshop.registry.url + "/ComfyUI.zip", None, "v0.9.0"), (copied, None, "v0.10.0"),
            (Workshop.comfyui, "v0.9.0", "v0.9.0"), (Workshop.comfyui, "main", "main"),
            ("file://" + Workshop.comfyui, None, "v0.10.0"),
            (Workshop.comfyui, git(Workshop.comfyui, "rev-parse", "v0.9.0"), None)):  # fmt: skip
            with self.subTest(source=source, reference=reference):
                paths = self.paths()
                manifest, _ = self.make(paths, source=source, comfyui=reference)
                self.assertEqual(manifest.comfyui_version, version or reference)
                self.assertTrue(os.path.isfile(join(paths.comfyui, "main.py")))
                self.assertTrue(os.path.exists(paths.complete))

    def test_without_git_the_release_archive_is_taken(self):
        archive = join(Workshop.root, "release.zip")
        git(Workshop.comfyui, "archive", "--prefix=ComfyUI-0.10.0/", "-o", archive, "v0.10.0")
        asked = []

        def fake(url, *arguments, **named):
            asked.append(url)
            yield b'{"tag_name": "v0.10.0"}' if "api.github.com" in url else read_bytes(archive)

        paths = self.paths()
        with patch.object(dock, "git_path", return_value=None), patch.object(dock, "download", fake):
            manifest, _ = self.make(paths)
        self.assertEqual(asked, ["https://api.github.com/repos/Comfy-Org/ComfyUI/releases/latest",
            "https://github.com/Comfy-Org/ComfyUI/archive/v0.10.0.zip"])  # fmt: skip
        self.assertEqual(manifest.comfyui_version, "v0.10.0")
        self.assertEqual(sorted(os.listdir(paths.root)), [".cec", "ComfyUI"])

    def test_a_failed_one_goes_on_where_it_stopped(self):
        paths = self.paths()
        with patch.object(dock, "first_manifest", side_effect=dock.CDEnvironmentError("disk full")):
            self.assertRaises(dock.CDEnvironmentError, self.make, paths, source=Workshop.comfyui)
        self.assertFalse(os.path.exists(paths.complete))
        with patch.object(dock, "clone", side_effect=AssertionError("cloned again")):
            manifest, said = self.make(paths, source=Workshop.comfyui)
        self.assertTrue(os.path.exists(paths.complete))
        self.assertEqual(manifest.comfyui_version, "v0.10.0")
        self.assertNotIn("ComfyUI ...", said)

    def test_other_options_make_nothing_anew(self):
        paths = self.paths()
        with patch.object(dock, "first_manifest", side_effect=dock.CDEnvironmentError("disk full")):
            self.assertRaises(dock.CDEnvironmentError, self.make, paths, source=Workshop.comfyui)
        error = error_of(self.make, paths, source=Workshop.comfyui, comfyui="v0.9.0")
        self.assertEqual(error.code, "exists")
        self.assertIn("v0.10.0", error.message)
        with self.assertRaises(dock.CDEnvironmentError):
            self.make(paths, source="https://github.com/another/fork")
        self.assertEqual(self.make(paths, source=Workshop.comfyui)[0].comfyui_version, "v0.10.0")

    @unittest.skipIf(WINDOWS, "forks")
    def test_killed_at_any_step_it_is_never_complete_and_resumes(self):
        for step in range(1, 40):
            paths = self.paths()
            if killed_at(step, functools.partial(self.make, paths, source=Workshop.comfyui)) is not None:
                self.assertGreater(step, 6)
                break
            if not os.path.exists(paths.complete):
                self.make(paths, source=Workshop.comfyui)
            self.assertTrue(os.path.exists(paths.complete))
            self.assertEqual(dock.read_manifest(paths).comfyui_version, "v0.10.0")
            self.assertEqual(git(paths.comfyui, "status", "--porcelain"), "")
            self.assertFalse(os.path.exists(paths.partial))

    def test_what_is_there_already_is_not_touched(self):
        paths = self.paths()
        write(join(paths.root, "thesis.txt"), "x")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "not an unfinished environment"):
            self.make(paths, source=Workshop.comfyui)
        self.assertEqual(os.listdir(paths.root), ["thesis.txt"])
        with self.assertRaisesRegex(dock.CDEnvironmentError, "already holds"):
            self.make(shared_environment(), source=Workshop.comfyui)

    def test_a_full_disk_is_said_first(self):
        usage = Mock(free=10 * dock.MEGABYTE)
        paths = self.paths()
        with (patch("shutil.disk_usage", return_value=usage),
            self.assertRaisesRegex(dock.CDEnvironmentError, "10 MB free")):  # fmt: skip
            self.make(paths, source=Workshop.comfyui)
        self.assertFalse(os.path.exists(paths.root))

    def test_wrong_sources_and_pythons_are_one_sentence(self):
        empty = tempfile.mkdtemp(dir=Workshop.root)
        for options, words in (({"source": empty}, "is not ComfyUI (no main.py)"),
            ({"source": empty + "/x.zip"}, "is not there"),
            ({"source": Workshop.comfyui, "comfyui": "v9.9.9"}, "has no version v9.9.9"),
            ({"source": Workshop.comfyui, "comfyui": "0123456789abcdef"}, "git "),
            ({"source": "ext::sh -c x"}, "not a repository address"),
            ({"source": Workshop.comfyui, "comfyui": "--help"}, "not a branch"),
            ({"source": Workshop.comfyui, "no_install": False, "python": "9.9", "torch_backend": "cpu"},
            "no Python '9.9'")):  # fmt: skip
            with self.subTest(words), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.make(self.paths(), **options)
            self.assertIn(words, caught.exception.message)

    def test_a_version_that_does_not_exist_names_the_nearest(self):
        error = error_of(self.make, self.paths(), source=Workshop.comfyui, comfyui="0.9.1")
        self.assertRegex(error.hint, r"^Nearest are: v0\.10\.0, .*v0\.9\.0")
        names = ["v0.3.9", "v0.3.64", "v0.10.0", "latest", "master", "main"]
        for wanted, nearest in (("mastr", ["master"]), ("v0.3.63", ["v0.10.0", "v0.3.64", "v0.3.9"]),
            ("zz", ["v0.10.0"])):  # fmt: skip
            found = dock.nearest_names(wanted, names)
            self.assertEqual(found[: len(nearest)], nearest, wanted)

    def test_a_network_that_is_not_there_is_called_so_and_the_same_command_goes_on(self):
        paths, nobody = self.paths(), f"http://127.0.0.1:{free_port()}"
        variables = {"PIP_INDEX_URL": nobody + "/simple", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": ""}
        self.assertRaisesRegex(
            dock.CDEnvironmentError, "^Could not reach 127.0.0.1", self.make, paths, source=nobody + "/x.git"
        )
        self.assertFalse(os.path.exists(paths.root))
        with patch.dict(os.environ, variables), patch.object(dock, "TORCH_INDEX", nobody + "/whl/"):
            options = {"no_install": False, "python": sys.executable, "torch_backend": "cpu",
                "source": Workshop.comfyui}  # fmt: skip
            with patch.object(dock, "check_space"), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.make(paths, **options)
        self.assertRegex(caught.exception.message, r"^Could not reach 127\.0\.0\.1:\d+\.$")
        self.assertEqual(caught.exception.hint, "Run the same command again to go on.")
        self.assertEqual(read(paths.python_version).strip(), f"{sys.version_info[0]}.{sys.version_info[1]}")

    def test_torch_indexes(self):
        self.assertEqual(dock.torch_index("cu128"), "https://download.pytorch.org/whl/cu128")
        for word in ("../x", "", "a b", "--x", "cpu@evil"):
            self.assertRaises(dock.CDEnvironmentError, dock.torch_index, word)


class DeleteTest(InWorkshop):
    """Deleting and adopting."""

    def checkout(self):
        folder = join(tempfile.mkdtemp(dir=Workshop.root), "ComfyUI")
        shutil.copytree(Workshop.comfyui, folder)
        write(join(folder, "custom_nodes", "mine", "__init__.py"), "")
        return folder

    @needs_git
    @needs_links
    @needs_git
    @needs_links
    def test_deleting_cuts_links_and_keeps_what_is_the_users(self):
        root = tempfile.mkdtemp(dir=Workshop.root)
        write(join(root, "models", "x"), "years")
        paths, shelf = dock.EnvironmentPaths(join(root, "env")), join(root, "kept")
        for purged in (False, True, False):
            dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
            os.symlink(join(root, "models"), join(paths.comfyui, "models"))
            write(join(paths.comfyui, "output", "art.png"), "art")
            write(join(paths.comfyui, "input", "empty"), "")
            self.assertEqual(dock.own_files(paths.comfyui), {"output": (1, 3, True)})
            self.assertFalse(dock.own_files(paths.comfyui, 0)["output"][2])  # what is not counted is kept, too
            kept = dock.delete_environment(paths, contextlib.nullcontext(), None if purged else shelf)
            self.assertEqual(os.listdir(root).count("env"), 0)
            if purged:
                self.assertIsNone(kept)
            else:
                self.assertEqual(
                    tree(root), {"models/x": b"years", os.path.relpath(kept, root) + "/output/art.png": b"art"}
                )
                shutil.rmtree(shelf)

    @needs_git
    def test_what_came_with_comfyui_is_not_kept(self):
        paths = dock.EnvironmentPaths(join(tempfile.mkdtemp(dir=Workshop.root), "env"))
        dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
        write(join(paths.comfyui, "models", "configs", "v1.yaml"), "theirs")
        git(paths.comfyui, "add", "--all")
        git(paths.comfyui, "commit", "--quiet", "-m", "x")
        self.assertEqual(dock.own_files(paths.comfyui), {})
        self.assertIsNone(dock.delete_environment(paths, contextlib.nullcontext(), paths.root + "-kept"))
        self.assertEqual(os.listdir(os.path.dirname(paths.root)), [])

    @needs_git
    def test_where_what_is_the_users_cannot_be_moved_nothing_is_deleted(self):
        paths = dock.EnvironmentPaths(join(tempfile.mkdtemp(dir=Workshop.root), "env"))
        dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
        for name in ("models", "output"):
            write(join(paths.comfyui, name, "x"), "x")
        before, shelf = tree(paths.comfyui), paths.root + "-kept"
        write(join(shelf, "env-now", "output"), "in the way")
        with patch("time.strftime", return_value="now"), self.assertRaises(dock.CDEnvironmentError) as caught:
            dock.delete_environment(paths, contextlib.nullcontext(), shelf)
        self.assertEqual((caught.exception.code, tree(paths.comfyui)), ("disk", before))
        self.assertTrue(os.path.exists(paths.complete))

    @needs_git
    @unittest.skipIf(WINDOWS, "there a process is not killed between two lines")
    def test_killed_at_any_step_it_leaves_nothing_half_and_loses_no_art(self):
        for step in range(1, 40):
            root = tempfile.mkdtemp(dir=Workshop.root)
            paths, shelf = dock.EnvironmentPaths(join(root, "env")), join(root, "kept")
            dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
            write(join(paths.comfyui, "output", "art.png"), "art")
            delete = functools.partial(dock.delete_environment, paths, contextlib.nullcontext(), shelf)
            killed = killed_at(step, delete) is None
            self.assertIn(b"art", tree(root).values(), step)
            if os.path.exists(paths.root):
                self.assertFalse(
                    killed and os.path.exists(paths.complete) and not os.path.exists(join(paths.comfyui, "output"))
                )
                if not os.path.exists(paths.complete):
                    dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
                dock.delete_environment(paths, contextlib.nullcontext(), shelf)
            else:
                dock.create_environment(paths, lambda line: None, source=Workshop.comfyui, no_install=True)
                dock.delete_environment(paths, contextlib.nullcontext(), shelf)
            self.assertEqual([name for name in os.listdir(root) if name != "kept"], [], step)
            if not killed:
                self.assertGreater(step, 4)
                break

    @needs_git
    def test_an_adopted_checkout_is_recorded_left_alone_and_survives(self):
        checkout = self.checkout()
        before = tree(checkout)
        paths = dock.EnvironmentPaths(join(tempfile.mkdtemp(dir=Workshop.root), "env"))
        dock.create_from_checkout(paths, checkout, sys.executable, lambda line: None)
        manifest = dock.read_manifest(paths)
        self.assertEqual(
            (manifest.comfyui_path, manifest.python_path, manifest.found_nodes), (checkout, sys.executable, ["mine"])
        )
        manager = dock.NodeManager(paths, sys.executable, lambda line: None)
        report = manager.compare()
        self.assertTrue(report.is_synced)
        self.assertEqual((report.found_nodes, report.extra_nodes), (["mine"], []))
        manager.sync()
        self.assertEqual(git(checkout, "status", "--porcelain"), "?? custom_nodes/mine/")
        self.assertEqual(manager.track("mine").source, "development")
        self.assertEqual(manager.compare().found_nodes, [])
        dock.delete_environment(paths, contextlib.nullcontext())
        self.assertFalse(os.path.exists(paths.root))
        self.assertEqual(tree(checkout), before)

    @needs_git
    def test_of_two_that_adopt_under_one_name_the_second_is_refused(self):
        paths = dock.EnvironmentPaths(join(tempfile.mkdtemp(dir=Workshop.root), "env"))
        caught = []

        def adopt():
            try:
                dock.create_from_checkout(paths, self.checkout(), sys.executable, lambda line: None)
            except dock.CDEnvironmentError as error:
                caught.append(error.code)

        os.makedirs(paths.cec)
        with dock.locked(paths.content_lock, 1, "create env"):
            second = threading.Thread(target=adopt)
            second.start()
            time.sleep(0.3)  # it waits for the lock, or the test is a weaker one
            write(paths.complete, "")
        second.join()
        self.assertEqual(caught, ["exists"])

    @needs_git
    def test_a_checkout_inside_the_environment_is_not_deleted(self):
        paths = dock.EnvironmentPaths(tempfile.mkdtemp(dir=Workshop.root))
        shutil.copytree(Workshop.comfyui, join(paths.root, "code"))
        write(paths.manifest, f'[tool.comfydock]\ncomfyui_path = "{paths.root}/code"\n')
        self.assertRaisesRegex(dock.CDEnvironmentError, "was adopted", dock.delete_environment, paths, None)

    @needs_links
    def test_an_environment_that_is_a_link_is_unlinked(self):
        root = tempfile.mkdtemp(dir=Workshop.root)
        write(join(root, "elsewhere", ".cec", "x"), "x")
        os.symlink(join(root, "elsewhere"), join(root, "env"))
        dock.delete_environment(dock.EnvironmentPaths(join(root, "env")), contextlib.nullcontext())
        self.assertEqual(tree(root), {"elsewhere/.cec/x": b"x"})


@needs_git
class AddTest(NodeCase):
    """Adding nodes, from three sources, with what can go wrong."""

    def test_a_registry_node(self):
        Workshop.registry.publish(
            "plain-node", "1.2.0", {"__init__.py": "", "requirements.txt": "tiny<2\n# x\n--no-binary :none:\n"}
        )
        result = self.manager.add_node("Plain-Node")
        self.assertEqual(
            (result.node_info.name, result.node_info.version, result.restart_recommended), ("plain-node", "1.2.0", True)
        )
        self.assertIn("tiny==1.0", self.freeze())
        manifest = dock.read_manifest(self.paths)
        self.assertEqual(manifest.requirements(result.node_info), ["tiny<2"])
        self.assertEqual(manifest.tables["plain-node"]["registry_id"], "plain-node")
        self.assertTrue(self.manager.compare().is_synced)
        self.assertEqual(sorted(os.listdir(self.nodes)), ["plain-node", "websocket_image_save.py"])
        self.failing("already here", self.manager.add_node, "plain-node", error=dock.CDNodeConflictError)

    def test_a_git_node_at_a_tag_with_a_submodule(self):
        inner = make_repository("inner", {"a.txt": "inner"})
        outer = make_repository("Outer-Node", {"__init__.py": ""})
        git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", inner, "sub")
        version = commit(outer, {}, "v1")
        commit(outer, {"later.py": ""})
        info = self.manager.add_node(f"{outer}@v1").node_info
        self.assertEqual((info.name, info.version, info.source), ("Outer-Node", version, "git"))
        self.assertIn("sub/a.txt", tree(join(self.nodes, "Outer-Node")))
        self.assertTrue(self.manager.compare().is_synced)

    def test_ctrl_c_once_the_manifest_is_written_leaves_the_node_whole(self):
        work = join(Workshop.root, f"late{self.counter}", "late-node")
        write(join(work, "__init__.py"), "")
        real = dock.change_node

        def then_interrupted(*words):
            real(*words)
            raise KeyboardInterrupt

        with patch.object(dock, "change_node", then_interrupted), self.assertRaises(KeyboardInterrupt):
            self.manager.add_node(work, is_development=True)
        self.assertIn("late-node", self.manager.manifest.nodes)
        self.assertTrue(self.manager.compare().is_synced)

    def test_a_manifest_that_breaks_meanwhile_takes_the_node_back(self):
        work = join(Workshop.root, f"broken{self.counter}", "broken-node")
        write(join(work, "__init__.py"), "")
        before = read_bytes(self.paths.manifest)

        def breaks(*words):
            write(self.paths.manifest, "[tool\n")
            raise KeyboardInterrupt

        with patch.object(dock, "change_node", breaks), self.assertRaises(KeyboardInterrupt):
            self.manager.add_node(work, is_development=True)
        self.assertNotIn("broken-node", os.listdir(self.nodes))
        Path(self.paths.manifest).write_bytes(before)
        self.assertTrue(self.manager.compare().is_synced)

    def test_what_the_registry_says_against_a_node(self):
        Workshop.registry.publish("flagged", "1.0.0", {"a": ""}, status="NodeVersionStatusFlagged", latest=False)
        Workshop.registry.say("/nodes/flagged", {"id": "flagged", "status": "NodeStatusActive"})
        Workshop.registry.publish("banned-version", "1.0.0", {"a": ""}, status="NodeVersionStatusBanned")
        Workshop.registry.publish("old", "1.0.0", {"a": ""}, deprecated=True)
        Workshop.registry.say("/nodes/banned", {"message": "banned"}, 403)
        Workshop.registry.say("/nodes/gone", {"id": "gone", "status": "NodeStatusDeleted"})
        Workshop.registry.say("/nodes/liar", {"id": "../../evil", "latest_version": {"version": "1.0.0"}})
        Workshop.registry.publish("no-url", "1.0.0", {"a": ""}, downloadUrl="")
        Workshop.registry.publish("plain-http", "1.0.0", {"a": ""}, downloadUrl="http://example.org/node.zip")
        for identity, words in (("banned", "is banned"), ("banned-version", "is banned"), ("gone", "is deleted"),
            ("nobody", "has no nobody"), ("flagged", "offers no flagged"), ("liar", "answered"),
            ("no-url", "has no no-url"), ("plain-http", "is not https"), ("old@9.9.9", "has no old@9.9.9")):  # fmt: skip
            with self.subTest(identity):
                self.failing(words, self.manager.add_node, identity)
        self.manager.add_node("flagged@1.0.0")
        self.manager.add_node("old")
        self.assertIn("was flagged", " ".join(self.said))
        self.assertIn("is deprecated", " ".join(self.said))
        self.assertEqual(sorted(self.manager.manifest.nodes), ["flagged", "old"])

    def test_names_cannot_leave_custom_nodes(self):
        before = self.snapshot()
        for identifier in ("../evil", "/etc", "-x", "a/b", "x@../1", "ext::sh -c x", "https://x.org/..", "", "nul@1",
            "x\n", "git@h:..", "http://127.0.0.1:1/a/%2e%2e/.git"):  # fmt: skip
            with self.subTest(identifier), self.assertRaises(dock.CDEnvironmentError):
                self.manager.add_node(identifier)
        for name in ("..", ".", "a/b", "a\\b", "C:", "con", "COM1.x", "a.disabled", ".git", "a ", "a.", "\x00",
            "x" * 200, "-r"):  # fmt: skip
            self.assertRaises(dock.CDEnvironmentError, dock.check_node_name, name)
        dock.check_node_name("ComfyUI Essentials \U0001f680")
        self.assertEqual(self.snapshot(), before)
        with open(self.paths.manifest, "a", encoding="utf-8") as file:
            file.write('\n[tool.comfydock.nodes.evil]\nname = "../../.."\nsource = "git"\nrepository = "/x"\n')
        self.failing("cannot be the name", self.manager.remove_node, "evil")

    def test_letter_case_does_not_make_two_of_one(self):
        Workshop.registry.publish("case-node", "1.0.0", {"__init__.py": ""})
        write(join(self.nodes, "Case-Node", "own.py"), "mine")
        error = self.failing("does not know", self.manager.add_node, "case-node", error=dock.CDNodeConflictError)
        self.assertIn(("repair",), error.hint)
        self.manager.add_node("case-node", force=True)
        self.assertEqual(self.manager.folders(), ["case-node"])
        self.assertIn(b"mine", tree(self.paths.removed).values())

    def test_requirements_that_cannot_be_met_leave_everything_as_it_was(self):
        Workshop.registry.publish(
            "impossible", "1.0.0", {"__init__.py": "", "requirements.txt": "brand\nno-such-package\n"}
        )
        before = self.snapshot()
        self.failing("no-such-package", self.manager.add_node, "impossible")
        self.assertEqual(self.snapshot(), before)
        self.failing("no-such-package", self.manager.add_node, "impossible", no_test=True)
        self.assertEqual(self.snapshot(), before)

    def test_the_torch_pin_holds(self):
        before = self.snapshot()
        for number, requirement in enumerate(("wants-new-torch", "torch==3.0.0", "numpy>=2")):
            Workshop.registry.publish(f"greedy{number}", "1.0.0", {"__init__.py": "", "requirements.txt": requirement})
            self.failing("packages cannot be installed", self.manager.add_node, f"greedy{number}")
        Workshop.registry.publish("modest", "1.0.0", {"__init__.py": "", "requirements.txt": "torch\nnumpy\n"})
        self.manager.add_node("modest")
        self.assertEqual(self.freeze(), before[-1])

    def test_an_install_script_runs_where_the_node_is(self):
        script = "import os, sys; open('ran', 'w').write(os.getcwd() + ' ' + sys.prefix)"
        Workshop.registry.publish("scripted", "1.0.0", {"__init__.py": "", "install.py": script})
        self.manager.add_node("scripted")
        self.assertEqual(read_bytes(join(self.nodes, "scripted", "ran")).decode(),
            f"{self.nodes}/scripted {Workshop.paths.venv}")  # fmt: skip

    def test_a_failing_install_script_leaves_everything_as_it_was(self):
        make_wheel("unbuilt", "1.0")
        script = "import sys; sys.exit('ValueError: no GPU')"
        Workshop.registry.publish(
            "failing", "1.0.0", {"__init__.py": "", "install.py": script, "requirements.txt": "unbuilt"}
        )
        before = self.snapshot()
        self.failing("no GPU", self.manager.add_node, "failing")
        self.assertEqual(self.snapshot(), before)
        self.assertIn("unbuilt removed", " ".join(self.said))

    def test_an_install_script_that_replaces_torch_is_taken_back(self):
        script = (
            "import os, subprocess, sys; os.environ.pop('PIP_CONSTRAINT');"
            "subprocess.check_call([sys.executable, '-m', 'pip', 'install', '-q', 'torch==3.0.0'])"
        )
        Workshop.registry.publish("torch-eater", "1.0.0", {"__init__.py": "", "install.py": script})
        before = self.snapshot()
        self.failing("replaced torch==2.0.0+cpu", self.manager.add_node, "torch-eater")
        self.assertEqual(self.snapshot(), before)

    def test_an_old_pip_that_cannot_try_installs_all_or_nothing(self):
        text = "brand\nno-such-package"
        Workshop.registry.publish("for-old-pip", "1.0.0", {"__init__.py": "", "requirements.txt": text})
        before, real = self.snapshot(), dock.Packages.run

        def old_pip(installer, words, *more):
            if "--dry-run" in words:
                return subprocess.CompletedProcess(words, 2, "", "no such option: --dry-run")
            return real(installer, words, *more)

        with patch.object(dock.Packages, "run", old_pip):
            self.failing("no-such-package", self.manager.add_node, "for-old-pip")
        self.assertEqual(self.snapshot(), before)

    def test_a_hostile_archive_leaves_everything_as_it_was(self):
        before = self.snapshot()
        for number, data in enumerate((zipped({"../../evil.py": "x"}), b"<html>not found</html>")):
            Workshop.registry.publish(f"hostile{number}", "1.0.0", data)
            self.failing("", self.manager.add_node, f"hostile{number}")
        self.assertEqual(self.snapshot(), before)

    def test_nodes_on_a_disk_that_is_away_are_not_missing(self):
        away = OSError(errno.ENOTCONN, "Transport endpoint is not connected", self.nodes)
        with patch.object(os, "scandir", side_effect=away), self.assertRaises(OSError):
            self.manager.compare()

    def test_a_hostile_registry_is_one_clear_line_and_leaves_everything_as_it_was(self):
        before, url = self.snapshot(), Workshop.registry.url
        answers = [b"[" * 200000, b'{"id": %s}' % (b"1" * 10000), b'{"id": NaN}', b"[]", b"7", b'"x"', b"\xff"]
        odd = ("x", ["1"], 7, None, {"version": ["1"]}, {"version": "1.0\ud800"}, {"version": "1\n\x1b[31m"},
            {"version": ""}, {"version": {}})  # fmt: skip
        odd += tuple({"version": "1.0.0", "downloadUrl": address} for address in (7, ["x"], "https://a..b/x",
            "https://" + "a" * 70 + ".example/x", "http://127.0.0.1:99999/", "http://127.0.0.1:abc/", "https://[::1/x",
            url + "/\u00fc", url + "/a b", url + "/%00", "file:///etc/passwd", "https://u:p@x/y", "x" * 100000))  # fmt: skip
        answers += [{"id": "evil", "repository": "https://x/\udcff",
            "latest_version": {"version": "1.0.0", "downloadUrl": url + "/none"}}]  # fmt: skip
        answers += [{"id": "evil", "latest_version": latest} for latest in odd]
        answers += [
            {"id": name, "latest_version": {"version": "1"}} for name in (7, ["evil"], "EVIL\n", "evil\u202e", "ev/il")
        ]
        for number, answer in enumerate(answers):
            Workshop.registry.say("/nodes/evil", answer)
            with self.subTest(number=number, answer=str(answer)[:100]):
                self.failing("", self.manager.add_node, "evil")
        Workshop.registry.publish("evil", "9" * 5000, {"__init__.py": ""})
        self.assertEqual(self.snapshot(), before)
        self.manager.add_node("evil")
        Workshop.registry.publish("evil", "8" * 6000, {"__init__.py": ""})
        self.manager.update_node("evil")

    def test_odd_encodings_of_requirements_are_read(self):
        for number, encoding in enumerate(("utf-16", "cp1252", "utf-8-sig")):
            text = "tiny\n# für\n".encode(encoding)
            Workshop.registry.publish(f"odd{number}", "1.0.0", {"__init__.py": "", "requirements.txt": text})
            info = self.manager.add_node(f"odd{number}", no_test=True).node_info
            self.assertEqual(dock.read_manifest(self.paths).requirements(info), ["tiny"])

    def test_pyproject_dependencies_count_where_there_is_no_requirements_file(self):
        project = '[project]\nname = "projected"\nversion = "1.0.0"\ndependencies = ["tiny"]\n'
        Workshop.registry.publish("projected", "1.0.0", {"__init__.py": "", "pyproject.toml": project})
        info = self.manager.add_node("projected").node_info
        self.assertEqual(dock.read_manifest(self.paths).requirements(info), ["tiny"])

    def test_without_a_python_the_node_comes_and_its_packages_are_named(self):
        Workshop.registry.publish("bare", "1.0.0", {"__init__.py": "", "requirements.txt": "tiny"})
        dock.NodeManager(self.paths, None, self.said.append).add_node("bare")
        self.assertIn("no Python yet", " ".join(self.said))


@needs_git
class ChangeTest(NodeCase):
    """Updating, removing, repairing."""

    def test_a_registry_node_is_updated_by_number_and_keeps_the_users_files(self):
        Workshop.registry.publish("upd", "1.9.0", {"__init__.py": "1", "gone.py": "", "requirements.txt": "tiny==1.0"})
        self.manager.add_node("upd")
        write(join(self.nodes, "upd", "config", "mine.json"), "{}")
        self.assertFalse(self.manager.update_node("upd").changed)
        Workshop.registry.publish("upd", "1.10.0", {"__init__.py": "2", "requirements.txt": "tiny==2.0\nbrand"})
        asked = []
        self.assertFalse(self.manager.update_node("upd", lambda *words: bool(asked.append(words))).changed)
        self.assertEqual(asked, [("upd", "1.9.0", "1.10.0")])
        result = self.manager.update_node("upd")
        self.assertEqual(
            (result.old_version, result.new_version, result.requirements_added, result.requirements_removed),
            ("1.9.0", "1.10.0", ["tiny==2.0", "brand"], ["tiny==1.0"]),
        )
        self.assertIn("updated to 1.10.0", result.restart_reason)
        self.assertEqual(sorted(tree(join(self.nodes, "upd"))),
            [".tracking", "__init__.py", "config/mine.json", "requirements.txt"])  # fmt: skip
        self.assertFalse(os.path.exists(self.paths.removed))

    def test_local_changes_are_not_overwritten_without_force(self):
        Workshop.registry.publish("edited", "1.0.0", {"__init__.py": "1"})
        repository = make_repository("Edited-Git", {"__init__.py": "1"})
        self.manager.add_node("edited")
        self.manager.add_node(repository)
        Workshop.registry.publish("edited", "2.0.0", {"__init__.py": "2"})
        commit(repository, {"__init__.py": "2"})
        for name in ("edited", "Edited-Git"):
            write(join(self.nodes, name, "__init__.py"), "mine")
            error = self.failing(
                "local changes (__init__.py)", self.manager.update_node, name, error=dock.CDNodeConflictError
            )
            self.assertIn("--force", error.hint)
            self.assertEqual(read_bytes(join(self.nodes, name, "__init__.py")), b"mine")
            self.assertTrue(self.manager.update_node(name, force=True).changed)
            self.assertEqual(read_bytes(join(self.nodes, name, "__init__.py")), b"2")
        self.assertEqual(list(tree(self.paths.removed).values()).count(b"mine"), 2)

    def test_a_git_node_stays_on_the_branch_that_was_asked_for(self):
        repository = make_repository("Branched", {"__init__.py": "main"})
        git(repository, "checkout", "--quiet", "-b", "dev")
        commit(repository, {"__init__.py": "dev"})
        git(repository, "checkout", "--quiet", "main")
        self.manager.add_node(f"{repository}@dev")
        self.assertEqual(self.manager.manifest.nodes["Branched"].branch, "dev")
        self.assertFalse(self.manager.update_node("Branched").changed)
        for _ in range(2):  # the second from a clone at a commit
            git(repository, "checkout", "--quiet", "dev")
            newest = commit(repository, {"__init__.py": "dev again"})
            git(repository, "checkout", "--quiet", "main")
            self.assertEqual(self.manager.update_node("Branched").new_version, newest)
        self.assertEqual(read_bytes(join(self.nodes, "Branched", "__init__.py")), b"dev again")
        git(repository, "branch", "-D", "dev")
        self.failing("has no branch dev any more", self.manager.update_node, "Branched")
        self.manager.add_node(repository, force=True)
        self.assertIsNone(self.manager.manifest.nodes["Branched"].branch)

    def test_what_somebody_disabled_is_not_brought_back_or_updated_but_missed_once_it_is_gone(self):
        repository = make_repository("Asleep", {"__init__.py": ""})
        self.manager.add_node(repository)
        folder = join(self.nodes, "Asleep")
        for place in (join(self.nodes, ".disabled", "asleep@1_0_0"), f"{folder}.disabled"):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(folder, place)
            self.assertEqual((self.manager.compare().missing_nodes, self.manager.sync().installed), ([], []), place)
            self.assertFalse(os.path.exists(folder))
            os.rename(place, folder)
        os.rename(folder, place)
        commit(repository, {"__init__.py": "2"})
        result = self.manager.update_node("Asleep")
        self.assertEqual((result.changed, "is disabled" in result.message), (False, True))
        self.assertFalse(os.path.exists(folder))
        self.manager.sync()
        self.assertTrue(self.manager.is_synced())
        shutil.rmtree(place)
        self.assertFalse(self.manager.is_synced())

    def test_a_clone_that_is_tracked_keeps_its_branch_unless_it_is_the_usual_one(self):
        repository = make_repository("Cloned", {"__init__.py": ""})
        git(repository, "branch", "dev")
        for branch, kept in (("main", None), ("dev", "dev")):
            folder = join(self.nodes, f"of-{branch}")
            git(self.nodes, "clone", "--quiet", "--branch", branch, repository, folder)
            self.assertEqual(self.manager.track(f"of-{branch}").branch, kept)

    def test_a_change_at_work_is_not_one_that_was_broken_off(self):
        Workshop.registry.publish("at-work", "1.0.0", {"__init__.py": ""})
        self.manager.add_node("at-work")
        staged = join(self.nodes, dock.STAGING, "at-work")
        os.makedirs(staged)
        os.rename(join(self.nodes, "at-work"), join(staged, "old"))
        self.assertEqual(self.manager.compare().interrupted, 1)
        with dock.locked(self.paths.content_lock, 1, "node add"):
            self.assertEqual(self.manager.compare().interrupted, 0)
        self.manager.sync()
        self.assertTrue(self.manager.compare().is_synced)

    def test_what_a_checkout_brings_along_in_the_staging_folder_is_not_obeyed(self):
        write(join(self.nodes, "mine", "__init__.py"), "mine")
        for name in ("mine", "stranger"):
            write(join(self.nodes, dock.STAGING, name, "old", "__init__.py"), "evil")
            write(join(self.nodes, dock.STAGING, name, "new", "__init__.py"), "evil")
        self.failing("no node", self.manager.remove_node, "nobody")
        self.assertEqual(sorted(os.listdir(self.nodes)), ["mine", "websocket_image_save.py"])
        self.assertEqual(tree(join(self.nodes, "mine")), {"__init__.py": b"mine"})
        self.assertEqual(list(tree(self.paths.removed).values()), [b"evil"] * 2)

    @needs_links
    def test_a_development_node_comes_and_goes(self):
        mine = join(self.nodes, "mine")
        write(join(mine, "__init__.py"), "")
        linked = join(Workshop.root, f"linked-{NodeCase.counter}")
        write(join(linked, "__init__.py"), "")
        for folder in (mine, "mine", linked, linked):
            name = os.path.basename(folder)
            with self.subTest(folder=folder):
                self.manager.add_node(folder, is_development=True)
                self.assertTrue(os.path.isfile(join(self.nodes, name, "__init__.py")))
                self.assertEqual(self.manager.compare().extra_nodes, [])
                self.assertEqual(self.manager.remove_node(name).filesystem_action, "disabled")
        left = [name for name in sorted(os.listdir(self.nodes)) if not name.endswith(".py")]
        self.assertEqual(left, [f"{os.path.basename(linked)}.disabled", "mine.disabled"])

    def test_a_file_of_the_users_whose_name_the_new_version_takes_is_kept(self):
        Workshop.registry.publish("taker", "1.0.0", {"__init__.py": "1"})
        self.manager.add_node("taker")
        write(join(self.nodes, "taker", "config.json"), "mine")
        Workshop.registry.publish("taker", "2.0.0", {"__init__.py": "2", "config.json": "theirs"})
        error = self.failing("(config.json)", self.manager.update_node, "taker", error=dock.CDNodeConflictError)
        self.assertIn("--force", error.hint)
        self.assertTrue(self.manager.update_node("taker", force=True).changed)
        self.assertEqual(read_bytes(join(self.nodes, "taker", "config.json")), b"theirs")
        self.assertIn(b"mine", tree(self.paths.removed).values())

    def test_what_an_archive_brings_along_of_the_managers_is_no_change_of_the_users(self):
        Workshop.registry.publish("tracked", "1.0.0", {"__init__.py": "1", ".tracking": "x"})
        self.manager.add_node("tracked")
        folder = join(self.nodes, "tracked")
        self.assertEqual(read_bytes(join(folder, ".tracking")), b"__init__.py")
        Workshop.registry.publish("tracked", "1.1.0", {"__init__.py": "2"})
        self.assertTrue(self.manager.update_node("tracked").changed)
        os.remove(join(folder, "__init__.py"))
        os.mkdir(join(folder, "__init__.py"))
        self.assertEqual(self.manager.remove_node("tracked").filesystem_action, "moved")

    def test_local_commits_count_as_changes(self):
        repository = make_repository("Committed", {"__init__.py": "1"})
        self.manager.add_node(repository)
        commit(repository, {"__init__.py": "2"})
        commit(join(self.nodes, "Committed"), {"mine.py": ""})
        self.failing("local changes (commit", self.manager.update_node, "Committed", error=dock.CDNodeConflictError)
        self.assertEqual(self.manager.remove_node("Committed").filesystem_action, "moved")
        self.assertTrue([name for name in tree(self.paths.removed) if name.endswith("mine.py")])

    def test_a_git_node_follows_its_default_branch(self):
        repository = make_repository("Followed", {"__init__.py": "1", ".gitignore": "cache/\n"})
        self.manager.add_node(repository)
        write(join(self.nodes, "Followed", "cache", "model.bin"), "big")
        self.assertFalse(self.manager.update_node("followed").changed)
        newest = commit(repository, {"__init__.py": "2"})
        self.assertEqual(self.manager.update_node(repository).new_version, newest)
        self.assertEqual(read_bytes(join(self.nodes, "Followed", "cache", "model.bin")), b"big")
        self.assertEqual(git(join(self.nodes, "Followed"), "status", "--porcelain"), "")

    def test_a_development_node_has_its_requirements_read_again(self):
        write(join(self.nodes, "dev", "__init__.py"), "")
        self.manager.add_node("dev", is_development=True)
        self.assertFalse(self.manager.update_node("dev").changed)
        write(join(self.nodes, "dev", "requirements.txt"), "brand\n")
        self.assertEqual(self.manager.update_node("dev").requirements_added, ["brand"])
        self.assertIn("brand==1.0", self.freeze())

    def test_a_failed_update_puts_the_old_one_back(self):
        Workshop.registry.publish("failing-update", "1.0.0", {"__init__.py": "1", "requirements.txt": "tiny==1.0"})
        self.manager.add_node("failing-update")
        Workshop.registry.publish(
            "failing-update", "2.0.0", {"install.py": "raise SystemExit(3)", "requirements.txt": "tiny==2.0"}
        )
        before = self.snapshot()
        self.failing("install.py failed", self.manager.update_node, "failing-update")
        self.assertEqual(self.snapshot(), before)

    def test_a_version_that_is_asked_for_replaces_the_other(self):
        for version in ("1.0.0", "2.0.0"):
            Workshop.registry.publish("versions", version, {"__init__.py": version})
        self.manager.add_node("versions")
        self.manager.add_node("versions@1.0.0")
        self.assertEqual(read_bytes(join(self.nodes, "versions", "__init__.py")), b"1.0.0")
        self.assertEqual(self.manager.manifest.nodes["versions"].version, "1.0.0")

    def test_removing_takes_folder_and_entry_and_gives_the_manifest_back(self):
        before = read_bytes(self.paths.manifest)
        Workshop.registry.publish("leaving", "1.0.0", {"__init__.py": "", "requirements.txt": "tiny"})
        self.manager.add_node("leaving")
        result = self.manager.remove_node("LEAVING")
        self.assertEqual(
            (result.name, result.filesystem_action, result.restart_recommended), ("leaving", "deleted", True)
        )
        self.assertEqual(read_bytes(self.paths.manifest), before)
        self.assertEqual(os.listdir(self.nodes), ["websocket_image_save.py"])
        self.failing("no node 'leaving'", self.manager.remove_node, "leaving")
        self.failing("no node 'git@host:o/p'", self.manager.update_node, "git@host:o/p")

    def test_what_is_missing_is_told_in_the_order_of_the_manifest(self):
        names = [f"gone{number}" for number in range(6)]
        for name in names:
            os.makedirs(join(self.nodes, name))
            self.manager.track(name)
            os.rmdir(join(self.nodes, name))
        self.assertEqual(self.manager.compare().missing_nodes, names)

    def test_comparing_and_bringing_in_line(self):
        Workshop.registry.publish("lost", "1.0.0", {"__init__.py": "", "requirements.txt": "tiny<2"})
        Workshop.registry.publish(
            "drifted", "1.0.0", {"pyproject.toml": '[project]\nname = "drifted"\nversion = "1.0.0"\n'}
        )
        repository = make_repository("Moved-On", {"__init__.py": "1"})
        for identifier in ("lost", "drifted", repository):
            self.manager.add_node(identifier)
        pinned = commit(repository, {"__init__.py": "2"})
        shutil.rmtree(join(self.nodes, "lost"))
        write(join(self.nodes, "drifted", "pyproject.toml"), '[project]\nname = "drifted"\nversion = "2.0.0"\n')
        git(join(self.nodes, "Moved-On"), "pull", "--quiet")
        write(join(self.nodes, "stray", "__init__.py"), "")
        os.makedirs(join(self.nodes, "x.disabled"))
        os.makedirs(join(self.nodes, ".hidden"))
        report = self.manager.compare()
        self.assertEqual((report.missing_nodes, report.extra_nodes), (["lost"], ["stray"]))
        self.assertEqual({item["name"]: item["actual"] for item in report.version_mismatches},
            {"drifted": "2.0.0", "Moved-On": pinned})  # fmt: skip
        done = self.manager.sync()
        self.assertEqual((done.installed, done.corrected, done.problems), (["lost"], [], []))
        recorded = self.manager.manifest.nodes["Moved-On"]
        done = self.manager.sync(correct_versions=True)  # what others changed in its place is taken in, not undone
        self.assertEqual((done.corrected, done.problems),
            (["drifted: 2.0.0, as it is there now", f"Moved-On: {pinned}, as it is there now"], []))  # fmt: skip
        self.assertEqual(self.manager.manifest.nodes["drifted"].version, "2.0.0")
        dock.change_node(self.paths, "Moved-On", recorded, [])  # but where the manifest changes, the node follows
        self.assertEqual(self.manager.sync(correct_versions=True).corrected, ["Moved-On"])
        self.assertEqual(read_bytes(join(self.nodes, "Moved-On", "__init__.py")), b"1")
        self.assertEqual(self.manager.track("stray").source, "development")

    def test_nothing_changed_costs_nothing(self):
        self.assertFalse(self.manager.is_synced())
        self.manager.sync()
        with patch.object(dock, "run_command", side_effect=AssertionError("a program was run")):
            self.assertTrue(self.manager.is_synced())
        for path in (join(self.paths.comfyui, "requirements.txt"), self.paths.manifest):
            with open(path, "a", encoding="utf-8") as file:
                file.write("# changed\n")
            self.assertFalse(self.manager.is_synced())
            self.manager.sync()
        os.makedirs(join(self.nodes, "new"))
        self.assertFalse(self.manager.is_synced())

    def test_tracking_knows_what_a_folder_is(self):
        repository = make_repository("Tracked", {"__init__.py": ""})
        git(self.nodes, "clone", "--quiet", repository)
        git(join(self.nodes, "Tracked"), "remote", "set-url", "origin", "https://me:secret@example.org/x")
        write(join(self.nodes, "regi", ".tracking"), "a")
        write(join(self.nodes, "regi", "pyproject.toml"), '[project]\nname = "regi-node"\nversion = "3.1.0"\n')
        git_info, registry_info = self.manager.track("Tracked"), self.manager.track("regi")
        self.assertEqual((git_info.source, git_info.repository), ("git", "https://example.org/x"))
        self.assertEqual(
            (registry_info.source, registry_info.registry_id, registry_info.version), ("registry", "regi-node", "3.1.0")
        )
        self.assertTrue(self.manager.compare().is_synced)
        self.failing("there is no folder", self.manager.track, "../x")


@needs_git
class OneWorld(NodeCase):
    """What ComfyUI, all nodes and the manifest need is one world of packages, with real pip and wheels."""

    def publish(self, name, requirements, version="1.0.0", **files):
        Workshop.registry.publish(name, version, {"__init__.py": "", "requirements.txt": requirements, **files})
        return name

    def said_now(self):
        said = " ".join(self.said)
        self.said.clear()
        return said

    def pip(self, *words):
        done = dock.run_command([Workshop.python, "-m", "pip", "-q", *words], self.paths.root)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_conflict_is_told_as_who_wants_what_with_the_ways_on(self):
        make_wheel("numpy", "1.25.0")
        before = self.snapshot()
        error = self.failing(
            "wants-numpy needs numpy<1.26", self.manager.add_node, self.publish("wants-numpy", "numpy<1.26")
        )
        self.assertIn("numpy is held at 1.26.0 for PyTorch", error.message)
        self.assertIn(("node", "add", "wants-numpy", "--release", "numpy"), error.hint)
        self.assertIn(("node", "add", "wants-numpy", "--no-deps"), error.hint)
        self.assertEqual(self.snapshot(), before)
        for name in ("wants-numpy", self.publish("wants-it-too", "numpy<1.26\n")):
            self.manager.add_node(name, release=("numpy",))
        self.assertIn("numpy==1.25.0", self.freeze())
        self.assertIn("changed packages: numpy 1.26.0 -> 1.25.0", self.said_now())
        self.manager.sync()
        self.manager.remove_node("wants-numpy")
        self.assertIn("numpy==1.25.0", self.freeze())
        self.manager.remove_node("wants-it-too")
        self.assertIn("given back: numpy==1.26.0", self.said_now())
        self.assertEqual(self.freeze(), before[-1])

    def test_no_node_breaks_another_and_one_can_come_without_its_packages(self):
        self.manager.add_node(self.publish("wants-old", "tiny<2"))
        before = self.snapshot()
        error = self.failing("wants-old needs tiny<2", self.manager.add_node, self.publish("wants-new", "tiny>=2"))
        self.assertIn("wants-new needs tiny>=2", error.message)
        self.assertEqual(self.snapshot(), before)
        self.manager.add_node("wants-new", no_deps=True)
        self.manager.sync()
        self.assertEqual(self.freeze(), before[-1])
        self.assertTrue(dock.read_manifest(self.paths).nodes["wants-new"].no_deps)

    def test_a_world_that_does_not_fit_already_is_said_once_and_keeps_no_node_out(self):
        for name, line in (("mine-old", "tiny<2"), ("mine-new", "tiny>=2")):
            write(join(self.nodes, name, "requirements.txt"), line)
            self.manager.track(name)
        self.manager.sync()
        self.assertIn("not all that is needed fits together: ", self.said_now())
        self.assertTrue(self.manager.is_synced())
        self.pip("uninstall", "-y", "brand") if "brand==1.0" in self.freeze() else None
        self.manager.add_node(self.publish("third", "brand"))
        self.assertEqual(self.said_now().count("does not fit together already: "), 1)
        self.assertIn("brand==1.0", self.freeze())

    def test_a_line_that_cannot_be_is_left_out_when_asked_and_stays_out(self):
        lines = "tiny<2\npip install tiny\nno-such-package==1 # x\n"
        error = self.failing("pip install tiny", self.manager.add_node, self.publish("bad-lines", lines))
        self.assertIn(("node", "add", "bad-lines", "--skip-bad-lines"), error.hint)
        self.manager.add_node("bad-lines", skip_bad_lines=True)
        self.assertIn("left out, as it cannot be installed: pip install tiny", self.said_now())
        self.assertEqual(self.manager.sync().problems, [])
        info = self.manager.manifest.nodes["bad-lines"]
        self.assertEqual((sorted(info.skipped_lines), dock.read_manifest(self.paths).requirements(info)),
                         (["no-such-package==1", "pip install tiny"], ["tiny<2"]))  # fmt: skip

    def test_what_fits_no_more_with_a_package_of_the_users_fails_the_addition(self):
        make_wheel("users-own", "1.0", ["tiny<2"])
        self.pip("install", "users-own", "tiny<2")
        self.addCleanup(self.pip, "uninstall", "-y", "users-own")
        before = self.snapshot()
        self.failing(
            "do not fit together any more: users-own 1.0", self.manager.add_node, self.publish("breaks-it", "tiny>=2")
        )
        self.assertEqual(self.snapshot(), before)

    def test_packages_that_share_files_are_told_of_and_whole_after_an_undo(self):
        wheels = {"opencv-python": "True", "opencv-python-headless": "False"}
        for name, text in wheels.items():
            make_wheel(name, "4.9", files={"cv2/__init__.py": f"gui = {text}\n"})
        self.pip("install", "opencv-python")
        self.addCleanup(self.pip, "uninstall", "-y", *wheels)
        script = {"install.py": "raise SystemExit('no compiler')"}
        self.failing("no compiler", self.manager.add_node, self.publish("headless", "opencv-python-headless", **script))
        done = subprocess.run(
            [Workshop.python, "-c", "import cv2; print(cv2.gui)"], capture_output=True, text=True, check=True
        )
        self.assertEqual(done.stdout, "True\n")
        self.manager.add_node(self.publish("headless", "opencv-python-headless", "1.0.1"))
        self.assertRegex(self.said_now(), "opencv-python-headless and opencv-python share files")
        self.manager.remove_node("headless")
        self.assertIn("packages that headless brought stay installed: opencv-python-headless", self.said_now())

    def test_two_new_packages_that_share_a_file_are_told_once(self):
        twins = ("twin-a", "twin-b")
        for name in twins:
            make_wheel(name, "1.0", files={"twins/__init__.py": ""})
        self.addCleanup(self.pip, "uninstall", "-y", *twins)
        self.manager.add_node(self.publish("twins", "\n".join(twins)))
        self.assertEqual(self.said_now().count("share files"), 1)

    def test_an_undo_brings_back_what_came_from_a_file(self):
        elsewhere = join(Workshop.root, f"elsewhere{self.counter}")
        make_wheel("own", "1.0")
        os.mkdir(elsewhere)
        shutil.move(join(Workshop.wheels, "own-1.0-py3-none-any.whl"), elsewhere)
        make_wheel("own", "2.0")
        self.pip("install", join(elsewhere, "own-1.0-py3-none-any.whl"))
        self.addCleanup(self.pip, "uninstall", "-y", "own")
        files = {"install.py": "raise SystemExit('no')"}
        self.failing("install.py failed", self.manager.add_node, self.publish("wants-own", "own>=2", **files))
        self.assertIn("own==1.0", self.freeze())

    def test_the_manifests_own_packages_and_bounds_count(self):
        with open(self.paths.manifest, encoding="utf-8") as file:
            text = file.read()
        bounded = text.replace("constraint-dependencies = [", 'constraint-dependencies = ["tiny<2", ')
        bounded = bounded.replace("dependencies = [", 'dependencies = ["brand==1.0", ', 1)
        self.assertNotEqual(bounded, text)
        write(self.paths.manifest, bounded)
        self.failing("the manifest needs tiny<2", self.manager.add_node, self.publish("over", "tiny>=2"))
        self.manager.sync()
        self.assertIn("brand==1.0", self.freeze())

    def test_settings_of_pip_that_redirect_or_silence_it_change_nothing(self):
        conf, target = join(Workshop.root, f"pip{self.counter}.conf"), join(Workshop.root, "target")
        write(conf, f"[global]\ntarget = {target}\nquiet = 2\nfind-links = {Workshop.wheels}\n")
        variables = {"PIP_CONFIG_FILE": conf, "PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_ROOT": target,
            "PIP_USER": "1"}  # fmt: skip
        self.pip("uninstall", "-y", "brand")
        with patch.dict(os.environ, variables):
            del os.environ["PIP_FIND_LINKS"]
            dock.pip_settings.cache_clear()
            self.manager.add_node(self.publish("settled", "brand"))
            self.failing("held at 2.0.0+cpu", self.manager.add_node, self.publish("unsettling", "torch>=3"))
        dock.pip_settings.cache_clear()
        self.assertIn("brand==1.0", self.freeze())
        self.assertFalse(os.path.exists(target))

    def test_a_path_means_the_nodes_folder_and_an_index_is_one_more(self):
        lines = [".", "-e ./sub", "-r more.txt", "--index-url https://a/simple", "tiny==1.0 --hash=sha256:aa",
            "--no-index"]  # fmt: skip
        self.assertEqual([dock.pip_entry(line, "/n") for line in dock.requirement_entries("\n".join(lines))],
                         ["/n/.", "-e /n/./sub", "-r /n/more.txt", "--extra-index-url https://a/simple", "tiny==1.0", ""])  # fmt: skip
        text = "tiny==1.0 \\\n  --hash=sha256:aa\ngit+https://ghp_SECRET1@github.com/o/r\npack @ https://u:p@h/x.whl\n"
        self.assertEqual(
            dock.requirement_lines(dock.requirement_entries(text)), ["tiny==1.0", "pack @ https://h/x.whl"]
        )


@needs_git
class TheRegistryAndTheManager(NodeCase):
    """Versions as they are meant, the registry's own words, and life beside ComfyUI-Manager."""

    def publish(self, name, *versions, **more):
        for version in versions:
            project = f'[project]\nname = "{name}"\nversion = "{more.get("says", version)}"\n'
            Workshop.registry.publish(name, version, {"__init__.py": version, "pyproject.toml": project})
        return name

    def test_a_version_is_asked_for_in_several_ways_and_stays_until_another_is(self):
        self.publish("many", "1.0.0", "1.0.5", "2.0.0")
        for words, version, pin in (("many==1.0.5", "1.0.5", "1.0.5"), ("many@1.0.0", "1.0.0", "1.0.0"),
            ("many@latest", "2.0.0", None)):  # fmt: skip
            info = self.manager.add_node(words, force=True).node_info
            self.assertEqual((info.version, info.pin), (version, pin))
        self.manager.update_node("many@1.0.5")
        result = self.manager.update_node("many")
        self.assertEqual((result.changed, "stays at 1.0.5" in result.message), (False, True))
        self.assertEqual(self.manager.update_node("many==latest").new_version, "2.0.0")
        self.assertFalse(self.manager.update_node("many").changed)

    def test_a_version_in_two_parts_is_the_one_in_three(self):
        name = self.publish("two-parts", "3.41.0", says="3.41")
        release = json.loads(Workshop.registry.answers[f"/nodes/{name}/versions/3.41.0"][2])
        Workshop.registry.say(f"/nodes/{name}/versions", [release])
        self.assertEqual(self.manager.add_node(f"{name}@3.41").node_info.version, "3.41.0")
        self.assertTrue(self.manager.compare().is_synced)

    def test_nightly_and_a_branch_are_the_repository_that_the_registry_names(self):
        repository = make_repository("of-registry", {"__init__.py": "1"})
        git(repository, "branch", "dev")
        Workshop.registry.say("/nodes/gitted", {"id": "gitted", "repository": repository})
        for words, branch in (("gitted@nightly", None), ("gitted@dev", "dev")):
            info = self.manager.add_node(words, force=True).node_info
            self.assertEqual((info.source, info.branch, info.pin), ("git", branch, None))
            self.assertEqual(read_bytes(join(self.nodes, "gitted", ".git", ".cnr-id")), b"gitted")

    def test_a_pinned_clone_stays_and_a_page_of_a_browser_is_its_repository(self):
        repository = make_repository("pinned", {"__init__.py": "1"}, "v1")
        commit(repository, {"__init__.py": "2"})
        self.manager.add_node(f"{repository}@v1")
        self.assertFalse(self.manager.update_node("pinned").changed)
        self.assertTrue(self.manager.update_node("pinned@latest").changed)
        self.assertIsNone(self.manager.manifest.nodes["pinned"].pin)
        for page, parts in {"https://github.com/o/r/tree/main": ("https://github.com/o/r", "main"),
            "https://github.com/o/r.git?tab=readme#x": ("https://github.com/o/r", None),
            "https://gitlab.com/o/r/-/tree/a/b": ("https://gitlab.com/o/r", "a/b"),
            "https://github.com/o/r/releases/tag/v1": ("https://github.com/o/r", "v1")}.items():  # fmt: skip
            self.assertEqual(dock.split_reference(page), parts)
        empty = join(Workshop.root, "repositories", "empty")
        git(Workshop.root, "init", "--quiet", empty)
        self.failing("is an empty repository", self.manager.add_node, empty)

    def test_what_the_registry_did_not_say_is_not_said(self):
        say = Workshop.registry.say
        say("/nodes/blocked", b"<html>blocked by a proxy</html>", 403)
        say("/nodes/auth", {"message": "missing auth token"}, 400)
        self.failing("403 Forbidden; what answered may be a proxy", self.manager.add_node, "blocked")
        self.failing("400 Bad Request: missing auth token", self.manager.add_node, "auth")

    def test_an_address_that_is_out_of_date_is_asked_for_again(self):
        name = self.publish("moved-archive", "1.0.0")
        info = self.manager.add_node(name).node_info
        shutil.rmtree(join(self.nodes, name))
        old = info.download_url[len(Workshop.registry.url) :]
        Workshop.registry.answers["/files/elsewhere.zip"] = Workshop.registry.answers.pop(old)
        Workshop.registry.say(
            f"/nodes/{name}/install?version=1.0.0", {"downloadUrl": f"{Workshop.registry.url}/files/elsewhere.zip"}
        )
        report = self.manager.sync()
        self.assertEqual((report.installed, report.problems), ([name], []))

    def test_nodes_are_disabled_and_enabled_as_the_manager_does_it(self):
        name = self.publish("switched", "1.0.5")
        self.manager.add_node(name)
        self.assertEqual(self.manager.switch_node("SWITCHED", False), "switched is disabled")
        self.assertEqual(os.listdir(join(self.nodes, ".disabled")), ["switched@1_0_5"])
        self.assertTrue(self.manager.compare().is_synced)
        self.assertEqual(self.manager.switch_node(name, False), "switched is disabled already")
        self.assertEqual(self.manager.switch_node(name, True), "switched is enabled")
        self.assertTrue(os.path.exists(join(self.nodes, name, "__init__.py")))
        write(join(self.nodes, "switched.disabled", "own.py"), "")  # of a development node that had this name before
        self.manager.switch_node(name, False)
        self.manager.switch_node(name, True)
        self.assertTrue(os.path.exists(join(self.nodes, name, "__init__.py")))
        self.assertTrue(os.path.exists(join(self.nodes, "switched.disabled", "own.py")))

    def test_pairs_that_stand_apart_are_changed_alone(self):
        text = "[a]\nfoo.x = 1\nbar.x = 2  # mine\nfoo.y = 3\n\n[b.foo]\nx = 1\n\n[c]\nx = 1\n\n[b.foo.z]\nx = 1\n"
        text = dock.edited(dock.edited(text, ("a", "foo"), None), ("b", "foo"), None)
        self.assertEqual(text, "[a]\nbar.x = 2  # mine\n\n[c]\nx = 1\n")
        self.assertEqual(dock.edited('[a]\n"dogs\'" = 1\n"dogs" = 2\n', ("a", "dogs'"), None), '[a]\n"dogs" = 2\n')

    def test_what_the_manager_installed_is_known_with_id_and_version(self):
        repository = make_repository("by-manager", {"__init__.py": ""})
        git(self.nodes, "clone", "--quiet", "-o", "upstream", repository)
        write(join(self.nodes, "by-manager", ".git", ".cnr-id"), "Their-Id")
        write(join(self.nodes, "older@1_2_3", ".tracking"), "__init__.py")
        clone, older = self.manager.track("by-manager"), self.manager.track("older@1_2_3")
        self.assertEqual((clone.source, clone.registry_id, clone.repository), ("git", "Their-Id", repository))
        self.assertEqual((older.source, older.registry_id, older.version), ("registry", "older", "1.2.3"))

    def test_an_update_by_the_manager_is_taken_in_and_its_files_are_known(self):
        name = self.publish("shared", "1.0.0")
        self.manager.add_node(name)
        folder = join(self.nodes, name)
        write(join(folder, "mine.txt"), "mine")
        write(join(folder, "pyproject.toml"), f'[project]\nname = "{name}"\nversion = "1.1"\n')  # as it unpacks over it
        write(join(folder, "new.py"), "")
        write(join(folder, ".tracking"), "__init__.py\npyproject.toml\nnew.py\n../../evil\n/etc/passwd")
        self.assertEqual(self.manager.sync(correct_versions=True).problems, [])
        self.assertEqual(self.manager.manifest.nodes[name].version, "1.1")
        self.publish(name, "1.2.0")
        self.assertTrue(self.manager.update_node(name).changed)
        self.assertEqual(sorted(tree(folder)), [".tracking", "__init__.py", "mine.txt", "pyproject.toml"])
        self.assertIn(b"mine", tree(self.paths.removed).values())  # nobody knew what had been changed there

    def test_a_workflow_names_what_it_needs(self):
        self.publish("pack-a", "1.0.0"), self.publish("pack-b", "2.0.0")
        Workshop.registry.say("/comfy-nodes/By%20Class/node", {"id": "pack-b"})
        write(join(self.paths.comfyui, "nodes.py"), 'NODE_CLASS_MAPPINGS = {"KSampler": 1}\n')
        inner = {"id": "1-2-3", "nodes": [{"type": "By Class"}, {"type": "Lost"}]}
        nodes = [{"type": "KSampler"}, {"type": "Note"}, {"type": "1-2-3"},
                 {"type": "A", "properties": {"cnr_id": "Pack-A", "ver": "1.0.0"}},
                 {"type": "G", "properties": {"aux_id": "o/r", "ver": "0123456789abcdef"}},
                 {"type": "C", "properties": {"cnr_id": "comfy-core"}}]  # fmt: skip
        workflow = {"nodes": nodes, "definitions": {"subgraphs": [inner]}}
        needed = (["pack-a@1.0.0", "https://github.com/o/r@0123456789abcdef", "pack-b"], ["Lost"])
        path = join(self.paths.root, "art.json")
        write(path, json.dumps(workflow))
        self.assertEqual(self.manager.packs_of(path), needed)

        def chunk(kind, data):
            return len(data).to_bytes(4, "big") + kind + data + b"crc!"

        for kind, head, data in ((b"tEXt", b"", json.dumps(workflow).encode()),
                                 (b"iTXt", b"\1\0\0\0", zlib.compress(json.dumps(workflow).encode()))):  # fmt: skip
            image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"x" * 13) + chunk(kind, b"workflow\0" + head + data)
            Path(path).write_bytes(image)
            self.assertEqual(self.manager.packs_of(path), needed)
        write(path, json.dumps({"1": {"class_type": "By Class", "inputs": {}}}))
        self.assertEqual(self.manager.packs_of(path), (["pack-b"], []))
        self.manager.add_node("pack-b")
        self.assertEqual(self.manager.packs_of(path), ([], []))
        write(path, "no workflow")
        self.failing("holds no workflow", self.manager.packs_of, path)

    def test_a_manifest_of_comfygit_is_used_as_it_is(self):
        text = Path(self.paths.manifest).read_text(encoding="utf-8").replace("tool.comfydock", "tool.comfygit")
        write(self.paths.manifest, text)
        self.manager.add_node(self.publish("in-comfygit", "1.0.0"))
        self.assertIn("[tool.comfygit.nodes.in-comfygit]", Path(self.paths.manifest).read_text(encoding="utf-8"))
        self.assertNotIn("tool.comfydock", Path(self.paths.manifest).read_text(encoding="utf-8"))
        self.assertIn("the manifest is one of comfygit", " ".join(self.said))

    def test_git_obeys_the_user_and_no_repository(self):
        home = temporary_folder(self)
        repository = make_repository("sshed", {"__init__.py": ""})
        for name, text in (("ssh", f"exec git-upload-pack {repository}"), ("hooks/post-checkout", "exit 1")):
            write(join(home, name), f"#!/bin/sh\n{text}\n")
            os.chmod(join(home, name), 0o755)
        write(join(home, ".gitconfig"), f"[core]\n\thooksPath = {home}/hooks\n\tsshCommand = '{home}/ssh'\n")
        with patch.dict(os.environ, HOME=home, GIT_DIR="/nowhere"):
            self.assertEqual(self.manager.add_node("git@127.0.0.1:o/sshed.git").node_info.name, "sshed")
            self.failing(
                "already here", self.manager.add_node, "git@127.0.0.1:o/sshed.git", error=dock.CDNodeConflictError
            )

    def test_no_token_is_shown_or_kept(self):
        for text, shown in {"https://me:ghp_SECRET1@h/o/r": "https://h/o/r",
            "git+https://ghp_SECRET1@github.com/o/r": "git+https://github.com/o/r", "ssh://git@h/o": "ssh://git@h/o",
            "ssh://u:pass@h/o": "ssh://u@h/o", "https://h/o?private_token=abc&x=1": "https://h/o?private_token=***&x=1",
            "remote: hf_ABCDEF12 is no good": "remote: *** is no good",
            "/data/hf_models and sk-image": "/data/hf_models and sk-image",
            '["?token=a\\"b"]': '["?token=***\\"b"]'}.items():  # fmt: skip
            self.assertEqual(dock.redact(text), shown)
        repository = make_repository("tokened", {"__init__.py": ""})
        git(self.nodes, "clone", "--quiet", repository)
        git(join(self.nodes, "tokened"), "remote", "set-url", "origin", "https://h/o/r?private_token=glpat-SECRET")
        self.assertEqual(self.manager.track("tokened").repository, "https://h/o/r")

    def test_what_cannot_be_tidied_fails_nothing(self):
        self.manager.add_node(self.publish("untidy", "1.0.0"))
        real = dock.remove_tree

        def refuses(path):
            if os.path.basename(path) == "old":
                raise dock.CDEnvironmentError(f"{path} cannot be changed: not ours", code="in-use")
            real(path)

        with patch.object(dock, "remove_tree", refuses):
            self.assertEqual(self.manager.remove_node("untidy").filesystem_action, "deleted")
        self.assertIn("the former untidy is kept", " ".join(self.said))
        self.manager.add_node("untidy")
        self.assertTrue(self.manager.compare().is_synced)

    def test_each_change_is_a_commit_where_the_history_is_ours(self):
        dock.GitManager(self.paths.cec).initialize_environment_repo("first")
        self.manager.add_node(self.publish("committed", "1.0.0"))
        self.manager.remove_node("committed")
        self.assertEqual(
            git(self.paths.cec, "log", "--format=%s").split("\n"), ["remove committed", "add committed", "first"]
        )


@needs_git
@unittest.skipIf(WINDOWS, "forks")
class KilledTest(NodeCase):
    """SIGKILL at every step, and at random moments with pip at work."""

    def check(self):
        manifest = dock.read_manifest(self.paths)
        self.manager.sync()
        for name in self.manager.compare().extra_nodes:  # whole, only not written down: as repair does it
            self.manager.track(name)
        report = self.manager.compare()
        self.assertEqual((report.missing_nodes, report.extra_nodes, report.interrupted), ([], [], 0))
        self.assertEqual([name for name in os.listdir(self.nodes) if name.startswith(".")], [])
        return manifest

    def each_step(self, call, reset):
        self.manager.python = None
        outcomes = set()
        for step in range(1, 80):
            killed = killed_at(step, call) is None
            self.check()
            outcomes.add(tuple(sorted((key, info.version) for key, info in self.manager.manifest.nodes.items())))
            if not killed:
                self.assertGreater(step, 4)
                return outcomes
            reset()
        return self.fail("it never ended by itself")

    def remove(self, key):
        if key in self.manager.manifest.nodes:
            self.manager.remove_node(key)

    def test_add(self):
        project = '[project]\nname = "kill-add"\nversion = "1.0.0"\n'
        Workshop.registry.publish("kill-add", "1.0.0", {"__init__.py": "1", "a/b.py": "", "pyproject.toml": project})
        outcomes = self.each_step(lambda: self.manager.add_node("kill-add"), lambda: self.remove("kill-add"))
        self.assertEqual(outcomes, {(), (("kill-add", "1.0.0"),)})

    def test_update(self):
        def reset():
            self.remove("kill-up")
            for version in ("1.0.0", "2.0.0"):
                Workshop.registry.publish("kill-up", version, {"__init__.py": version})
                if "kill-up" not in self.manager.manifest.nodes:
                    self.manager.add_node("kill-up")

        reset()
        outcomes = self.each_step(lambda: self.manager.update_node("kill-up"), reset)
        self.assertEqual(outcomes, {(("kill-up", "1.0.0"),), (("kill-up", "2.0.0"),)})

    def test_remove_and_disable(self):
        Workshop.registry.publish("kill-rm", "1.0.0", {"__init__.py": ""})
        work = join(Workshop.root, "kill-work", "kill-dev")
        write(join(work, "__init__.py"), "")
        for key, development in (("kill-rm", False), ("kill-dev", True)):

            def reset(key=key, development=development):
                self.remove(key)
                self.manager.add_node(work if development else key, is_development=development)

            reset()
            self.assertEqual(len(self.each_step(functools.partial(self.manager.remove_node, key), reset)), 2)
        self.assertTrue(os.path.exists(join(work, "__init__.py")))

    def test_add_with_packages_at_random_moments(self):
        script = "import time; time.sleep(0.2)"
        Workshop.registry.publish(
            "kill-pip", "1.0.0", {"__init__.py": "", "requirements.txt": "brand", "install.py": script}
        )
        dock.Packages(Workshop.python).uninstall(["brand"])
        body = f"dock.NodeManager(dock.EnvironmentPaths({self.paths.root!r}), {Workshop.python!r}, print).add_node('kill-pip')"
        dice = random.Random(7)
        for _ in range(2):
            process = subprocess.Popen([sys.executable, "-c", f"import comfydock as dock; {body}"], cwd=HERE,
                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0.3, 3.0))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # pip, too: it is in the session that this test made
            process.wait()
            manifest = self.check()
            if "kill-pip" not in self.manager.manifest.nodes:
                self.assertNotIn("brand==1.0", self.freeze())
            self.assertEqual(set(manifest.nodes) - {"kill-pip"}, set())
            self.remove("kill-pip")
            dock.Packages(Workshop.python).uninstall(["brand"])


class OddMachines(unittest.TestCase):
    """What differs from machine to machine, and damage."""

    def setUp(self):
        self.folder = temporary_folder(self)

    def test_versions_are_compared_as_versions(self):
        rising = ["0.9", "1.0.dev1", "1.0a1", "1.0.0-beta.1", "1.0rc1", "1.0", "1.0.post1", "1.2", "1.10.0", "2024.1",
            "1!0.1"]  # fmt: skip
        self.assertEqual(sorted(reversed(rising), key=dock.version_key), rising)
        for same in (("9.1", "9.1.0"), ("1.0.0-beta.1", "1.0.0b1"), ("v1", "1.0+cpu"), ("nightly", "latest")):
            self.assertEqual(*map(dock.version_key, same), same)
        self.assertGreater(dock.version_key("build-7"), dock.version_key("build-" + "1"))
        for hostile in ("9" * 5000, "1" + "r-1" * 500 + "!", "1" + "rc" * 500 + "!"):
            dock.version_key(hostile)

    def test_packages_are_listed_with_where_they_are_from(self):
        paths = {"a-1.0": {}, "b-2.0": {"url": "file:///w/b.whl"}, "c-3.0": {"url": "file:///home/me/my%20code", "dir_info": {"editable": True}},
                 "d-4.0": {"url": "https://h/o/d", "vcs_info": {"vcs": "git", "commit_id": "abc"}}}  # fmt: skip
        for name, direct in paths.items():
            folder = join(self.folder, f"{name}.dist-info")
            write(join(folder, "METADATA"), "Name: {}\nVersion: {}\n".format(*name.split("-")))
            write(join(folder, "RECORD"), f"{name[0]}.py,,\n{name}.dist-info/RECORD,,\n{name[0]}/__init__.py,,0\n")
            write(join(folder, "direct_url.json"), json.dumps(direct))
        done = subprocess.CompletedProcess([], 0, self.folder, "")
        with patch.object(dock, "run_command", return_value=done):
            found = dock.installed_packages(sys.executable)
        self.assertEqual({name: one.line for name, one in found.items()}, {"a": ["a==1.0"],
            "b": ["b @ file:///w/b.whl"], "c": ["-e", urllib.request.url2pathname("/home/me/my%20code")],
            "d": ["d @ git+https://h/o/d@abc"]})  # fmt: skip
        self.assertEqual(found["a"].files, {"a.py"})

    def test_a_list_of_no_packages_is_an_error_and_no_reason_to_remove_what_is_there(self):
        for code, words in ((0, "not even pip"), (1, "does not tell its packages")):
            done = subprocess.CompletedProcess([], code, self.folder, "broken")
            with patch.object(dock, "run_command", return_value=done):
                self.assertRaisesRegex(dock.CDEnvironmentError, words, dock.installed_packages, sys.executable)

    def test_the_index_of_pytorch_is_told_by_a_backend_alone(self):
        for line, index in (("torch==2.9.0+cu128", "https://download.pytorch.org/whl/cu128"),
            ("torch==2.9.0+rocm6.4", "https://download.pytorch.org/whl/rocm6.4"),
            ("torch==2.9.0+cpu", "https://download.pytorch.org/whl/cpu"), ("torch==2.5.0a0+872d972e41.nv24.8", None),
            ("torch==2.9.0", None), ("torch @ file:///home/me+You/x.whl", None)):  # fmt: skip
            with self.subTest(line=line):
                self.assertEqual(dock.held_index([line]), index)

    def test_one_package_that_cannot_be_put_back_keeps_no_other(self):
        packages = object.__new__(dock.Packages)
        packages.before, packages.uv = {"new": dock.Package("new", "1", ["new==1"], set())}, None
        packages.uninstall, packages.must, said = Mock(), Mock(), []
        packages.uninstall.side_effect = dock.CDEnvironmentError("no")
        before = {"gone": ("gone", "1", ["gone==1"]), "mine": ("mine", "1", ["-e", "/my code"])}
        packages.put_back(said.append, before)
        installed = [call.args[0][3:] for call in packages.must.call_args_list]
        self.assertEqual(installed, [["gone==1"], ["-e", "/my code"]])
        self.assertEqual(said, ["warning: packages could not all be put back (new removed): no",
                                "packages put back: gone==1, -e /my code"])  # fmt: skip

    def test_an_undo_asks_the_index_of_the_pytorch_that_was_there(self):
        now = {"torch": dock.Package("torch", "3.0.0", ["torch==3.0.0"], set())}
        before = {"torch": ["torch", "2.9.0+cpu", ["torch==2.9.0+cpu"]]}
        with patch.object(dock, "installed_packages", return_value=now):
            packages = dock.Packages("python")
            with patch.object(packages, "must") as must:
                packages.put_back([].append, before)
        words = must.call_args[0][0]
        self.assertEqual(words[3:6], ["torch==2.9.0+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu"])

    def test_where_nothing_can_install_an_environment_is_taken_as_it_is(self):
        paths, said = dock.EnvironmentPaths(join(self.folder, "e")), []
        write(paths.manifest, '[tool.comfydock]\ntorch_backend = "cpu"\n')
        write(join(paths.comfyui, "requirements.txt"), "aiohttp\n")
        os.makedirs(join(paths.comfyui, "custom_nodes"))
        manager = dock.NodeManager(paths, sys.executable, said.append)
        with patch.object(
            dock, "Packages", side_effect=dock.CDEnvironmentError("no pip, no uv", "install uv", code="no-pip")
        ):
            self.assertEqual(manager.sync().problems, [])
        self.assertIn("warning: no pip, no uv, so its packages were not looked at: install uv", said)
        self.assertFalse(manager.is_synced())  # pip may be there next time
        with patch.object(dock, "Packages", side_effect=dock.CDEnvironmentError("broken", code="packages")):
            self.assertRaises(dock.CDEnvironmentError, manager.sync)

    @unittest.skipIf(WINDOWS, "names are no bytes there")
    def test_a_folder_whose_name_is_no_text_is_no_node_and_a_checkout_of_such_a_name_is_refused(self):
        checkout = join(self.folder, "ComfyUI")
        nodes = join(checkout, "custom_nodes")
        for name in (b"good", b"caf\xe9"):
            os.makedirs(join(os.fsencode(nodes), name))
        write(join(checkout, "main.py"), "")
        workspace = dock.Workspace(join(self.folder, "w"))
        environment = workspace.adopt(checkout, "a", sys.executable)
        self.assertEqual(environment.manifest.found_nodes, ["good"])
        odd = join(os.fsencode(self.folder), b"caf\xe9")
        os.rename(os.fsencode(checkout), odd)
        error = error_of(workspace.adopt, os.fsdecode(odd), "b", sys.executable)
        self.assertEqual(error.code, "path")

    @unittest.skipIf(WINDOWS, "a script as a program")
    def test_the_backend_of_pytorch_follows_the_graphics_card_and_its_driver(self):
        program = join(self.folder, "nvidia-smi")
        with patch.dict(os.environ, PATH=self.folder):
            self.assertEqual(dock.detect_torch_backend(), "cpu")
            for says, backend in (("echo 580.65.06", "cu130"), ("echo 570.1", "cu128"), ("echo 535.1", "cu126"),
                ("echo 'no devices were found'", "cpu"), ("echo 580; exit 9", "cpu"), ("exec /nowhere/at/all", "cpu")):  # fmt: skip
                write(program, f"#!/bin/sh\n{says}\n")
                os.chmod(program, 0o755)
                with self.subTest(says=says):
                    self.assertEqual(dock.detect_torch_backend(), backend)
            os.rename(program, join(self.folder, "rocminfo"))
            self.assertEqual(dock.detect_torch_backend(), "rocm6.4")

    def test_without_git_only_github_is_read(self):
        self.assertEqual(dock.github_name("https://github.com/Comfy-Org/ComfyUI.git"), "Comfy-Org/ComfyUI")
        for url in ("https://example.org/a/b", "https://github.com/only-owner", "git@github.com:a/b"):
            with self.subTest(url=url), self.assertRaises(dock.CDEnvironmentError) as caught:
                dock.github_name(url)
            self.assertEqual(caught.exception.code, "missing")

    def test_a_manifest_is_read_where_nothing_can_be_written_beside_it(self):
        with patch.object(dock, "write_atomic", side_effect=OSError(errno.EROFS, "read-only")):
            manifest = dock.manifest_of("[tool.comfydock]\ndemo = true\n", "x", join(self.folder, "cache"), None)
        self.assertTrue(manifest.demo)


class UvTest(InWorkshop):
    """The same with uv, where TEST_UV names a folder that holds it: a venv by uv, then one without pip as 1.0.x has it."""

    def test_create_add_fail_and_remove(self):
        folder = os.environ.get("TEST_UV", "")
        if not shutil.which("uv", path=folder):
            self.skipTest("TEST_UV names no folder with uv")
        if not os.path.exists(join(Workshop.wheels, "torch-3.0.0-py3-none-any.whl")):
            make_wheel("torch", "3.0.0")
        for wheel in glob.glob(join(os.path.dirname(os.__file__), "ensurepip", "_bundled", "*.whl")):
            shutil.copy(wheel, Workshop.wheels)
        paths, said = dock.EnvironmentPaths(join(Workshop.root, "uv-env")), []
        make_wheel("uv-only", "1.0")
        variables = {"PATH": folder + os.pathsep + os.environ["PATH"], "UV_FIND_LINKS": Workshop.wheels,
            "UV_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_CACHE_DIR": join(Workshop.root, "uv-cache"), "UV_NO_CONFIG": "1"}  # fmt: skip
        for number, script in enumerate(("", "raise SystemExit('no GPU')")):
            Workshop.registry.publish(f"uv-node{number}", "1.0.0",
                {"__init__.py": "", "requirements.txt": "uv-only\n", **({"install.py": script} if script else {})})  # fmt: skip
        Workshop.registry.publish("uv-greedy", "1.0.0", {"requirements.txt": "wants-new-torch"})
        with patch.dict(os.environ, variables):
            wheel = join(Workshop.wheels, "torch-3.0.0-py3-none-any.whl")
            os.rename(wheel, wheel + ".later")
            dock.create_environment(
                paths, said.append, source=Workshop.comfyui, python=sys.executable, torch_backend="cpu"
            )
            os.rename(wheel + ".later", wheel)
            python = dock.venv_python(paths.venv)
            installer = dock.Packages(python)
            self.assertTrue(installer.uv)
            self.assertIn("pip", [dock.package_name(line) for line in installer.freeze()])
            installer.uninstall(["pip"])
            before = installer.freeze()
            self.assertIn("torch==2.0.0+cpu", before)
            manager = dock.NodeManager(paths, python, said.append)
            for name, words in (("uv-greedy", "packages cannot be installed"), ("uv-node1", "no GPU")):
                error = error_of(manager.add_node, name)
                self.assertIn(words, error.message)
                self.assertEqual(installer.freeze(), before)
            manager.add_node("uv-node0")
            self.assertIn("uv-only==1.0", installer.freeze())
            manager.sync()
            self.assertTrue(manager.is_synced())


COMFYUI_MAIN = """
import comfy.options
comfy.options.enable_args_parsing()
from comfy.cli_args import args
import folder_paths, json, os, shutil, sqlite3, sys, tiny
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from comfyui_version import __version__

if tiny.version != WANTED_TINY:
    raise ImportError(f"ComfyUI {__version__} needs tiny {WANTED_TINY}, but {tiny.version} is installed")
for path in [path for paths in args.extra_model_paths_config or [] for path in paths]:
    with open(path, encoding="utf-8") as file:
        for group in json.load(file).values():
            is_default = group.pop("is_default", False)
            for name, places in group.items():
                for place in places.split("\\n"):
                    folder_paths.add_model_folder_path(name, os.path.normpath(place), is_default)
user = args.user_directory or os.path.join(folder_paths.base_path, "user")
temp = os.path.join(args.temp_directory or folder_paths.base_path, "temp")
shutil.rmtree(temp, ignore_errors=True)
os.makedirs(temp)
database = (args.database_url or "sqlite:///" + os.path.join(user, "comfyui.db"))[len("sqlite:///"):]
os.makedirs(os.path.dirname(database), exist_ok=True)
is_there = os.path.exists(database)
connection = sqlite3.connect(database)
connection.execute("create table if not exists alembic_version (version_num)")
found = connection.execute("select version_num from alembic_version").fetchone()
if found and found[0] > SCHEMA:
    shutil.copyfile(database, database + ".bkp")
    print("Failed to initialize database.", file=sys.stderr)
else:
    connection.execute("delete from alembic_version")
    connection.execute("insert into alembic_version values (?)", (SCHEMA,))
    connection.commit()
connection.close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/system_stats": {"system": {"argv": sys.argv, "comfyui_version": __version__}, "devices": []},
            "/queue": {"queue_running": [], "queue_pending": []},
            "/prompt": {"exec_info": {"queue_remaining": 0}},
        }
        name = self.path.rpartition("/")[2]
        if name in folder_paths.folder_names_and_paths:
            answers[self.path] = [folder_paths.get_filename_list(name), folder_paths.get_folder_paths(name)]
        body = json.dumps(answers.get(self.path)).encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


server = ThreadingHTTPServer((args.listen.split(",")[0], args.port), Handler)
print(f"To see the GUI go to: http://{args.listen}:{args.port}", file=sys.stderr, flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("Stopped server")
"""

COMFYUI_ARGS = """
import argparse, os, comfy.options

def is_valid_directory(path):
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is not a directory.")
    return path

parser = argparse.ArgumentParser()
parser.add_argument("--listen", type=str, default="127.0.0.1", nargs="?", const="0.0.0.0,::")
parser.add_argument("--port", type=int, default=8188)
parser.add_argument("--base-directory", type=str, default=None)
parser.add_argument("--tls-keyfile", type=str)
parser.add_argument("--tls-certfile", type=str)
parser.add_argument("--extra-model-paths-config", type=str, default=None, nargs="+", action="append")
parser.add_argument("--temp-directory", type=str, default=None)
parser.add_argument("--user-directory", type=is_valid_directory, default=None)
parser.add_argument("--database-url", type=str, default=None)
parser.add_argument("--auto-launch", action="store_true")
parser.add_argument("--disable-auto-launch", action="store_true")
parser.add_argument("--cpu", action="store_true")
MORE
args = parser.parse_args() if comfy.options.args_parsing else parser.parse_args([])
"""

# As ComfyUI's own folder_paths behaves: names with several folders, legacy names, is_default to the front, a listing
# that goes into sub-folders and is sorted.
COMFYUI_FOLDERS = """
import os
from comfy.cli_args import args

extensions = {".ckpt", ".pt", ".safetensors", ".sft"}
base_path = os.path.abspath(args.base_directory) if args.base_directory else os.path.dirname(os.path.realpath(__file__))
models_dir = MODELS
folder_names_and_paths = {
    "checkpoints": ([os.path.join(models_dir, "checkpoints")], extensions),
    "configs": ([os.path.join(models_dir, "configs")], {".yaml"}),
    "loras": ([os.path.join(models_dir, "loras")], extensions),
    "text_encoders": ([os.path.join(models_dir, "text_encoders"), os.path.join(models_dir, "clip")], extensions),
    "diffusion_models": ([os.path.join(models_dir, "unet"), os.path.join(models_dir, "diffusion_models")], extensions),
    "diffusers": ([os.path.join(models_dir, "diffusers")], ["folder"]),
    "custom_nodes": ([os.path.join(base_path, "custom_nodes")], set()),
}
input_directory = os.path.join(base_path, "input")
if not os.path.exists(input_directory):
    os.makedirs(input_directory)

def map_legacy(name):
    return {"unet": "diffusion_models", "clip": "text_encoders"}.get(name, name)

def add_model_folder_path(name, path, is_default=False):
    name = map_legacy(name)
    paths = folder_names_and_paths.setdefault(name, ([], set()))[0]
    if path in paths:
        if is_default and paths[0] != path:
            paths.remove(path)
            paths.insert(0, path)
    elif is_default:
        paths.insert(0, path)
    else:
        paths.append(path)

def get_folder_paths(name):
    return folder_names_and_paths[map_legacy(name)][0][:]

def get_filename_list(name):
    paths, wanted = folder_names_and_paths[map_legacy(name)]
    found = set()
    for path in paths:
        for folder, names, files in os.walk(path, followlinks=True):
            found |= {
                os.path.relpath(os.path.join(folder, file), path)
                for file in files
                if not wanted or os.path.splitext(file)[1] in wanted
            }
    return sorted(found)
"""


def comfyui_code(version, tiny, schema, has_models_directory=False, **more):
    """The files of a small ComfyUI that needs one version of `tiny`, knows one schema, and has the flags of the real."""
    own = "os.path.join(base_path, 'models')"
    flag = 'parser.add_argument("--models-directory", type=str, default=None)' if has_models_directory else ""
    models = f"os.path.abspath(args.models_directory) if args.models_directory else {own}" if flag else own
    return {
        "main.py": f"WANTED_TINY, SCHEMA = {tiny!r}, {schema}\n" + textwrap.dedent(COMFYUI_MAIN),
        "nodes.py": "",
        "comfyui_version.py": f"__version__ = {version!r}\n",
        "comfy/options.py": "args_parsing = False\n\ndef enable_args_parsing(enable=True):\n"
        "    global args_parsing\n    args_parsing = enable\n",
        "comfy/cli_args.py": COMFYUI_ARGS.replace("MORE", flag),
        "folder_paths.py": COMFYUI_FOLDERS.replace("MODELS", models),
        "requirements.txt": f"torch\nnumpy<2\ntiny=={tiny}\n",
        "models/checkpoints/put_checkpoints_here": "",
        "custom_nodes/websocket_image_save.py": "",
        ".gitignore": "__pycache__/\n/user/\n/temp/\n/input/\n/models/**/*.safetensors\n/custom_nodes/*\n",
        **more,
    }


@needs_git
class WithAComfyUI(InWorkshop):
    """Real git, real pip, a small ComfyUI that does not start with another version's packages."""

    template = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if cls.template is not None:
            return
        upstream = make_repository("UpdatedComfyUI", comfyui_code("1.0.0", "1.0", 1), "v1.0.0")
        git(upstream, "config", "uploadpack.allowAnySHA1InWant", "true")
        new = comfyui_code("1.1.0", "2.0", 2, **{"comfy_extras/nodes_new.py": "new = 1\n"})
        commit(upstream, new, "v1.1.0")
        commit(upstream, comfyui_code("1.2.0", "9.9", 3), "v1.2.0-rc1")
        WithAComfyUI.upstream = "file://" + upstream
        WithAComfyUI.template = join(Workshop.root, "updates", "template")
        options = {"comfyui": "v1.0.0", "source": cls.upstream, "python": sys.executable, "torch_backend": "cpu"}
        paths = dock.EnvironmentPaths(join(cls.template, "environments", "main"))
        dock.create_environment(paths, lambda line: None, **options)

    def setUp(self):
        """Make a workspace with one environment, whose venv shares its files with the template's."""
        self.root = join(Workshop.root, "updates", "workspace")
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.fresh()

    def fresh(self, template=None):
        """Begin anew with a copy of a workspace; of the venv, in which files are only replaced, the files are shared."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.copy(template or self.template, self.root)
        self.said = []
        self.environment = dock.Workspace(self.root).get_environment("main")
        self.environment.tell = self.said.append
        self.paths, self.comfyui = self.environment.paths, self.environment.paths.comfyui

    def copy(self, source, target):
        inside = join("environments", "main")
        apart = shutil.ignore_patterns("ComfyUI", ".cec")
        shutil.copytree(source, target, symlinks=True, copy_function=os.link, ignore=apart)
        for folder in ("ComfyUI", ".cec"):
            shutil.copytree(join(source, inside, folder), join(target, inside, folder), symlinks=True)

    def installed(self):
        return sorted(name[:-10] for name in os.listdir(packages_in(self.paths.venv)) if name.endswith(".dist-info"))

    def state(self):
        """What must be the old or the new as a whole: commit, changed files, packages, and what the manifest says."""
        changed = git(self.comfyui, "status", "--porcelain")
        manifest = dock.read_manifest(self.paths)
        return git(self.comfyui, "rev-parse", "HEAD"), changed, self.installed(), manifest.comfyui_version

    def starts(self):
        """The version that ComfyUI says it is when it is started."""
        port = free_port()
        self.environment.run(["--port", str(port)])
        try:
            self.environment.wait_until_ready(20.0)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats") as answer:
                return json.load(answer)["system"]["comfyui_version"]
        finally:
            self.environment.stop()

    def failing(self, words, function, *arguments, **named):
        error = error_of(function, *arguments, **named)
        self.assertIn(words, error.message)
        return error


class UpdatingComfyUI(WithAComfyUI):
    def test_there_and_back(self):
        old = self.state()
        self.assertEqual(
            self.environment.update(check=True), {"old": "v1.0.0", "new": "v1.1.0", "changed": False, "available": True}
        )
        self.assertEqual(self.state(), old)
        self.assertEqual(
            self.environment.update(), {"old": "v1.0.0", "new": "v1.1.0", "changed": True, "available": True}
        )
        new = self.state()
        self.assertEqual((new[1], new[3]), ("", "v1.1.0"))
        self.assertIn("tiny-2.0", new[2])
        self.assertTrue(os.path.exists(join(self.comfyui, "comfy_extras", "nodes_new.py")))
        self.assertEqual(self.starts(), "1.1.0")
        self.assertFalse(self.environment.update()["changed"])
        os.rename(Workshop.root + "/repositories", Workshop.root + "/gone")  # nothing needs the network
        try:
            self.assertEqual(self.environment.go_back()["new"], "v1.0.0")
        finally:
            os.rename(Workshop.root + "/gone", Workshop.root + "/repositories")
        self.assertEqual(self.state(), old)
        self.assertEqual(self.starts(), "1.0.0")
        self.assertFalse(os.path.exists(self.paths.venv_before))
        self.failing("no update to go back from", self.environment.go_back)
        messages = git(self.paths.cec, "log", "--format=%s").splitlines()
        self.assertEqual(messages[:2], ["Back to ComfyUI v1.0.0 from v1.1.0", "Update ComfyUI from v1.0.0 to v1.1.0"])

    def test_a_version_that_cannot_be_installed_or_does_not_start_leaves_all_as_it_was(self):
        old = self.state()
        port = str(free_port())
        self.environment.run(["--port", port])
        self.environment.wait_until_ready(20.0)
        pid = self.environment.report()["pid"]
        self.failing("tiny==9.9", self.environment.update, "v1.2.0-rc1")
        self.assertEqual((self.state(), self.environment.report()["pid"]), (old, pid))
        error = self.failing("needs tiny 2.0, but", self.environment.update, self.branch("lies", tiny="1.0"))
        self.assertIn(join("main", "update", "comfyui.log"), error.hint)
        self.assertEqual(self.state(), old)
        self.environment.wait_until_ready(30.0)
        report = self.environment.report(5.0)
        self.assertEqual((report["state"], report["args"]), ("running", ["--port", port]))
        self.assertNotEqual(report["pid"], pid)
        self.environment.stop()

    def branch(self, name, tiny):
        """A branch upstream whose ComfyUI wants another tiny than its requirements say."""
        folder = self.upstream.removeprefix("file://")
        git(folder, "checkout", "--quiet", "-b", name, "v1.1.0")
        commit(folder, {"requirements.txt": f"torch\nnumpy<2\ntiny=={tiny}\n", "lie.txt": name})
        git(folder, "checkout", "--quiet", "main")
        self.addCleanup(git, folder, "branch", "-D", name)
        return name

    def test_it_is_stopped_for_the_change_and_started_again_as_it_was(self):
        port = str(free_port())
        self.environment.run(["--port", port, "--auto-launch"], set_env={"WORD": "kept"})
        self.environment.wait_until_ready(20.0)
        asked = []
        self.environment.update(confirm=lambda: asked.append(self.environment.report()["state"]))
        self.environment.wait_until_ready(20.0)
        record = dock.read_state(self.paths.state)
        self.assertEqual(
            (asked, record.args, record.env), (["running"], ["--port", port, "--auto-launch"], {"WORD": "kept"})
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats") as answer:
            self.assertEqual(json.load(answer)["system"]["comfyui_version"], "1.1.0")
        self.environment.stop()

    def test_the_trial_start_touches_nothing_of_the_user(self):
        temp, user = join(self.comfyui, "temp"), join(self.comfyui, "user")
        write(join(temp, "preview.png"), "a preview")
        self.assertEqual(self.starts(), "1.0.0")  # which makes the database
        write(join(temp, "preview.png"), "a preview")
        database = read_bytes(join(user, "comfyui.db"))
        self.environment.update()
        self.assertEqual(tree(temp), {"preview.png": b"a preview"})
        self.assertEqual(tree(user), {"comfyui.db": database})
        self.assertEqual(dock.comfyui_processes(self.comfyui), [])

    def schema(self):
        path = join(self.comfyui, "user", "comfyui.db")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return connection.execute("select version_num from alembic_version").fetchone()[0]

    def test_a_database_with_a_newer_schema_is_brought_back_on_request_and_never_lost(self):
        self.assertEqual((self.starts(), self.schema()), ("1.0.0", 1))
        self.environment.update()
        self.assertEqual(self.schema(), 1)
        self.assertEqual((self.starts(), self.schema()), ("1.1.0", 2))
        updated = self.root + " updated"
        self.addCleanup(shutil.rmtree, updated, ignore_errors=True)
        self.copy(self.root, updated)
        self.environment.go_back()
        self.assertEqual(self.schema(), 2)
        self.assertEqual(len(glob.glob(join(self.paths.removed, "*", "0.comfyui.db"))), 1)
        self.fresh(updated)
        self.environment.go_back(with_databases=True)
        self.assertEqual((self.starts(), self.schema()), ("1.0.0", 1))
        self.assertFalse(os.path.exists(join(self.comfyui, "user", "comfyui.db.bkp")))
        [kept] = glob.glob(join(self.paths.removed, "*", "comfyui.db"))
        with contextlib.closing(sqlite3.connect(kept)) as connection:
            self.assertEqual(connection.execute("select version_num from alembic_version").fetchone(), (2,))

    def test_own_changes_are_refused_by_name_and_go_on_a_branch_with_force(self):
        write(join(self.comfyui, "nodes.py"), "mine = 1\n")
        write(join(self.comfyui, "comfy_extras", "nodes_new.py"), "mine = 2\n")
        os.remove(join(self.comfyui, "models", "checkpoints", "put_checkpoints_here"))  # which loses nothing
        before = tree(self.comfyui)
        error = self.failing("changes of your own: nodes.py, comfy_extras/nodes_new.py", self.environment.update)
        self.assertEqual((error.code, tree(self.comfyui)), ("local-changes", before))
        self.failing("needs tiny 2.0, but", self.environment.update, self.branch("lie", tiny="1.0"), force=True)
        self.assertEqual(tree(self.comfyui), before)
        self.environment.update(force=True)
        self.assertEqual(self.starts(), "1.1.0")
        branches = git(self.comfyui, "branch", "--format=%(refname:short)", "--list", "comfydock/*").split()
        self.assertEqual(git(self.comfyui, "show", f"{branches[-1]}:nodes.py"), "mine = 1")
        self.environment.go_back()
        found = {name: data for name, data in tree(self.comfyui).items() if not name.startswith(("user/", "temp/"))}
        self.assertEqual(found, before)

    def test_a_commit_of_ones_own_is_named(self):
        write(join(self.comfyui, "nodes.py"), "mine = 1\n")
        git(self.comfyui, "commit", "--quiet", "-am", "mine")
        self.failing(f"commit {git(self.comfyui, 'rev-parse', 'HEAD')[:8]}", self.environment.update)

    @needs_links
    def test_models_that_are_a_link_stay_one(self):
        """As comfydock 1.0.x has it: to git that is an untracked file in the way of a folder."""
        shared = join(self.root, "shared")
        write(join(shared, "checkpoints", "big.safetensors"), "weights")
        shutil.rmtree(join(self.comfyui, "models"))
        os.symlink(shared, join(self.comfyui, "models"))
        folder = self.upstream.removeprefix("file://")
        git(folder, "checkout", "--quiet", "-b", "more-models", "v1.1.0")
        commit(folder, {"models/new/put_here": "", "models/checkpoints/put_checkpoints_here": "changed"})
        git(folder, "checkout", "--quiet", "main")
        self.addCleanup(git, folder, "branch", "-D", "more-models")
        for step in (lambda: self.environment.update("more-models"), self.environment.go_back):
            step()
            self.assertTrue(os.path.islink(join(self.comfyui, "models")))
            self.assertEqual(tree(shared), {"checkpoints/big.safetensors": b"weights"})

    def adopted(self, *words):
        """Another clone of the same repository, adopted with the Python of the first."""
        folder = join(self.root, "mine", "ComfyUI")
        git(Workshop.root, "clone", "--quiet", *words, self.upstream, folder)
        return dock.Workspace(self.root).adopt(folder, "adopted", self.environment.python), folder

    def test_an_adopted_checkout_whole_or_shallow_follows_its_branch_and_comes_back(self):
        upstream = self.upstream.removeprefix("file://")
        self.addCleanup(git, upstream, "branch", "-D", "stable")
        for words in ([], ["--depth", "1"]):
            with self.subTest(words=words):
                git(upstream, "branch", "-f", "stable", "v1.0.0")
                self.fresh()
                environment, checkout = self.adopted(*words, "--branch", "stable")
                old, packages = git(checkout, "rev-parse", "HEAD"), self.installed()
                self.assertFalse(environment.update()["changed"])
                git(upstream, "branch", "-f", "stable", "v1.1.0")
                self.assertTrue(environment.update()["changed"])
                self.assertEqual(git(checkout, "symbolic-ref", "--short", "HEAD"), "stable")
                self.assertEqual(git(checkout, "rev-parse", "HEAD"), git(upstream, "rev-parse", "v1.1.0"))
                self.assertEqual(git(checkout, "rev-list", "--count", "HEAD"), "2")
                self.assertIn("tiny-2.0", self.installed())
                environment.go_back()
                self.assertEqual(git(checkout, "symbolic-ref", "--short", "HEAD"), "stable")
                self.assertEqual(git(checkout, "status", "--porcelain"), "")
                self.assertEqual((git(checkout, "rev-parse", "HEAD"), self.installed()), (old, packages))
        git(checkout, "commit", "--quiet", "--allow-empty", "-m", "mine")
        self.failing("changes of your own: commit", environment.update)

    def test_one_of_ours_that_was_made_of_a_branch_follows_it(self):
        upstream = self.upstream.removeprefix("file://")
        git(upstream, "branch", "-f", "next", "v1.0.0")
        self.addCleanup(git, upstream, "branch", "-D", "next")
        other = dock.Workspace(self.root).create("other", source=self.upstream, comfyui="next", no_install=True)
        git(upstream, "branch", "-f", "next", "v1.1.0")
        self.assertEqual(other.update()["new"], "next")
        self.assertEqual(git(other.paths.comfyui, "symbolic-ref", "--short", "HEAD"), "next")
        self.assertEqual(git(other.paths.comfyui, "rev-parse", "HEAD"), git(upstream, "rev-parse", "v1.1.0"))
        self.assertFalse(other.update()["changed"])
        other.go_back()
        self.assertEqual(git(other.paths.comfyui, "rev-parse", "next"), git(upstream, "rev-parse", "v1.0.0"))

    def test_what_cannot_be_updated_says_how_to_go_on(self):
        environment, checkout = self.adopted("--branch", "v1.0.0")
        error = self.failing("is not on a branch", environment.update)
        self.assertIn("--to", str(error.hint))
        self.assertTrue(environment.update("v1.1.0")["changed"])
        environment.go_back()
        shutil.rmtree(join(checkout, ".git"))
        self.failing("is not a git clone", environment.update)
        error = self.failing("has no v1.0.1", self.environment.update, "v1.0.1")
        self.assertIn("v1.0.0", error.hint)

    def test_nodes_that_were_changed_since_come_back_too(self):
        for version in ("1.0.0", "2.0.0"):
            Workshop.registry.publish(
                "went-on", version, {"__init__.py": version, "requirements.txt": f"tiny<={version}"}
            )
        write(join(self.root, "work", "mine", "__init__.py"), "")
        self.environment.add_node("went-on@1.0.0", no_test=True)
        before = self.state(), tree(join(self.comfyui, "custom_nodes"))
        self.failing("tiny", self.environment.update)  # the node holds it back
        Workshop.registry.publish("went-on", "1.0.0", {"__init__.py": "1.0.0"})
        self.environment.remove_node("went-on")
        self.environment.add_node("went-on@1.0.0")
        before = self.state(), tree(join(self.comfyui, "custom_nodes"))
        self.environment.update()
        self.environment.update_node("went-on")
        Workshop.registry.publish("came-later", "1.0.0", {"__init__.py": ""})
        self.environment.add_node("came-later")
        self.environment.add_node(join(self.root, "work", "mine"), is_development=True)
        self.environment.go_back()
        after = tree(join(self.comfyui, "custom_nodes"))
        self.assertEqual((self.state(), after), before)
        self.assertEqual(sorted(self.environment.nodes.manifest.nodes), ["mine", "went-on"])
        self.assertEqual(self.environment.nodes.compare().is_synced, True)

    def test_nothing_starts_on_a_mixture(self):
        """A killed update: code of one version, packages of the other, and a monitor that would start it again."""
        old = self.state()
        update = dock.ComfyUIUpdate(self.environment.nodes)
        new = update.find(None)
        update.fetch(new)
        update.keep(new, [], [])
        git(self.comfyui, "checkout", "--quiet", new.commit)
        write(join(self.comfyui, ".git", "index.lock"), "")
        with patch.object(dock.NodeManager, "changing", lambda *words: contextlib.nullcontext()):
            self.failing("interrupted", self.environment.run, [])  # by another command, after this one has looked
        self.assertEqual(self.starts(), "1.0.0")
        self.assertEqual(self.state(), old)

    def dies(self, call, point, number=signal.SIGTERM):
        """Do a call in another process that gets a signal before its `point`th effect; its effects when it gets none."""

        def work():
            dock.prepare_signals()
            getattr(dock.Workspace(self.root).get_environment("main"), call)()

        names = ("replace", "rename", "unlink", "rmdir", "mkdir", "link", "symlink", "kill")
        effects = [(os, name) for name in names]
        effects += [(dock, name) for name in ("run_command", "create_background_process", "write_atomic", "look_at")]
        return killed_at(point, work, effects, number)

    def sweep(self, call):
        """Break a call off before 100 of its effects (3 in the everyday suite): what starts then is the old or the new.

        By SIGKILL, by SIGTERM and by Ctrl-C in turn.
        """
        beginning = self.root + " at first"
        self.addCleanup(shutil.rmtree, beginning, ignore_errors=True)
        self.copy(self.root, beginning)
        outcomes = {"1.0.0" if call == "update" else "1.1.0": self.state()}
        effects = self.dies(call, 0)
        outcomes[self.starts()] = self.state()
        for version, tiny in (("1.0.0", "tiny-1.0"), ("1.1.0", "tiny-2.0")):
            commit, changed, packages, named = outcomes[version]
            self.assertEqual((changed, named), ("", f"v{version}"))
            self.assertIn(tiny, packages)
        telling = [number for number, name in enumerate(effects, 1) if name not in ("link", "unlink", "rmdir", "mkdir")]
        others, dice = sorted({*range(1, len(effects) + 1)} - {*telling}), random.Random(len(effects))
        points = [*telling, *dice.sample(others, min(len(others), max(0, 100 - len(telling))))]
        points = points if LONG else [*dice.sample(telling, 2), dice.choice(others)]
        signals = itertools.cycle((signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
        for point, number in zip(points, signals):
            self.fresh(beginning)
            with self.subTest(call=call, point=point, effect=effects[point - 1], number=number):
                said = {signal.SIGTERM: "Terminated", signal.SIGINT: "KeyboardInterrupt", signal.SIGKILL: "None"}[
                    number
                ]
                self.assertIn(said, str(self.dies(call, point, number)))
                version = self.starts()
                self.assertEqual(self.state(), outcomes[version])
                self.assertEqual(dock.comfyui_processes(self.comfyui), [])
                self.assertFalse(dock.is_half_updated(self.paths))

    def test_an_update_that_is_killed_anywhere_leaves_the_old_or_the_new(self):
        self.sweep("update")

    def test_a_return_that_is_killed_anywhere_leaves_the_old_or_the_new(self):
        self.environment.update(no_try=True)
        self.sweep("go_back")

    def test_killed_while_git_or_pip_is_at_work(self):
        """Killed alone, as the system kills it: what it had started may go on."""
        dice, old = random.Random(3), self.state()
        for _ in range(40 if LONG else 1):
            self.fresh()
            code = f"import comfydock as dock; dock.Workspace({self.root!r}).get_environment('main').update()"
            with subprocess.Popen([sys.executable, "-c", code], cwd=HERE) as process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(dice.uniform(1.0, 8.0))
                process.kill()
            if self.starts() == "1.0.0":
                self.assertEqual(self.state(), old)
            self.assertEqual(self.state()[1], "")

    def types(self, *words):
        """What a person sees who types this."""
        command = [sys.executable, installed(), "--workspace", self.root, *words]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)

    def test_typed(self):
        done = self.types("update", "main", "--check")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("ComfyUI v1.1.0 is available; this is v1.0.0.", done.stdout)
        done = self.types("-e", "main", "update", "--json")
        data = json.loads(done.stdout)["data"]
        self.assertEqual((data["old"], data["new"], data["changed"]), ("v1.0.0", "v1.1.0", True))
        self.assertEqual(self.types("update").stdout, "✓ ComfyUI v1.1.0 is the newest\n")
        done = self.types("update", "--back")
        self.assertIn("✓ ComfyUI is v1.0.0 now (it was v1.1.0)", done.stdout)
        done = self.types("history")
        self.assertRegex(
            done.stdout.splitlines()[0], r"^  20\d\d-\d\d-\d\d \d\d:\d\d  [0-9a-f]{7,}  Back to ComfyUI v1.0.0"
        )
        done = self.types("-e", "main", "update", "--back")
        self.assertEqual((done.returncode, done.stderr.count(" -e main history\n")), (1, 1), done.stderr)
        for command in ("update", "history", "models"):
            done = self.types(command, "--json")
            self.assertEqual(untold_keys(done.stdout, command), set())
        git(self.comfyui, "remote", "remove", "origin")
        done = self.types("update", "--check")
        self.assertIn("has no remote.\n  set one: git -C ", done.stderr)
        self.assertEqual(self.types("update", "--back", "--check").returncode, 2)
        self.assertEqual(self.types("update", "--database").returncode, 2)
        folder = join(self.root, "shared")
        os.mkdir(folder)
        self.assertEqual(
            self.types("models", "--all", "--set", folder).stdout, f"✓ main: Models in {folder}, and its own\n"
        )
        self.assertEqual(self.types("models", "main").stdout, f"✓ Models in {folder}, and its own\n")
        self.assertEqual(self.types("models", "--off").stdout, "✓ Its own models alone\n")
        self.assertEqual(self.types("models", "--set", folder + "x").returncode, 1)


class OneModelsFolderForMany(WithAComfyUI):
    """Listed by a folder_paths that behaves as ComfyUI's own, of a version without and with --models-directory."""

    def setUp(self):
        super().setUp()
        self.shared = join(self.root, "shared models \N{SNOWMAN} $HOME")
        write(join(self.shared, "loras", "styles", "ours.safetensors"), "")
        write(join(self.shared, "text_encoders", "ours.safetensors"), "")
        write(join(self.comfyui, "models", "loras", "own.safetensors"), "")

    def listed(self, environment, *args):
        """What ComfyUI lists: files and folders by kind."""
        port = free_port()
        environment.run(["--port", str(port), *args])
        try:
            environment.wait_until_ready(20.0)
            found = {}
            for name in ("loras", "text_encoders", "custom_nodes"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/models/{name}") as answer:
                    found[name] = json.load(answer)
            return found
        finally:
            environment.stop()

    def test_a_file_in_the_shared_folder_is_seen_by_all_and_it_is_the_first_place(self):
        other = dock.Workspace(self.root).create(
            "other", source=self.upstream, comfyui="v1.0.0", no_install=True, models=self.shared
        )
        shutil.copytree(self.paths.venv, other.paths.venv, symlinks=True)
        own = join(self.comfyui, "models")
        before = self.listed(self.environment)
        self.environment.set_models(self.shared)
        alone = {}
        for step in ("1.0.0 without --models-directory", "with it"):
            with self.subTest(step=step):
                both = self.listed(self.environment)
                files, places = both["loras"]
                self.assertEqual(files, ["own.safetensors", join("styles", "ours.safetensors")])
                self.assertEqual(places, [join(self.shared, "loras"), join(own, "loras")])
                encoders = [join(folder, name) for folder in (self.shared, own) for name in ("text_encoders", "clip")]
                self.assertEqual(both["text_encoders"][1], encoders)
                self.assertEqual(both["custom_nodes"], before["custom_nodes"])
                alone = alone or self.listed(other)["loras"]
                self.assertEqual(alone[0], [join("styles", "ours.safetensors")])
                record = dock.read_state(self.paths.last_run)
                self.assertEqual(record.args[0::2], ["--port"])
            if step.startswith("1"):
                code = comfyui_code("1.0.1", "1.0", 1, has_models_directory=True)
                for name in ("comfy/cli_args.py", "folder_paths.py"):
                    write(join(self.comfyui, name), code[name])
        self.environment.set_models(None)
        self.assertEqual(self.listed(self.environment), before)

    def test_the_users_own_files_and_flags_stay_in_force(self):
        self.environment.set_models(self.shared)
        mine = join(self.root, "mine.yaml")
        folder = join(self.root, "mine")
        write(mine, json.dumps({"mine": {"loras": folder}}))
        places = self.listed(self.environment, "--extra-model-paths-config", mine)["loras"][1]
        self.assertEqual(places[0], join(self.shared, "loras"))
        self.assertIn(folder, places)
        code = comfyui_code("1.0.1", "1.0", 1, has_models_directory=True)
        for name in ("comfy/cli_args.py", "folder_paths.py"):
            write(join(self.comfyui, name), code[name])
        places = self.listed(self.environment, "--models-directory", folder)["loras"][1]
        self.assertEqual(places, [join(folder, "loras")])

    def test_a_folder_that_is_not_there_starts_nothing_and_stops_nothing(self):
        self.environment.set_models(self.shared)
        self.environment.run(["--port", str(free_port())])
        pid = self.environment.report()["pid"]
        os.rename(self.shared, self.shared + ".away")
        self.failing("Is its disk mounted?", self.environment.restart)
        self.assertEqual(self.environment.report()["pid"], pid)
        self.environment.stop()
        self.failing("Is its disk mounted?", self.environment.run, [])
        self.failing("is not there", self.environment.set_models, self.shared)

    def test_the_workspace_has_a_default_and_delete_never_enters_it(self):
        workspace = dock.Workspace(self.root)
        workspace.set_models(self.shared)
        other = workspace.create("other", source=self.upstream, comfyui="v1.0.0", no_install=True)
        self.assertEqual(other.manifest.models_path, self.shared)
        self.assertIsNone(self.environment.manifest.models_path)
        before = tree(self.shared)
        workspace.delete("other")
        self.assertEqual(tree(self.shared), before)

    def test_what_another_uses_is_not_deleted(self):
        other = dock.Workspace(self.root).create("other", source=self.upstream, comfyui="v1.0.0", no_install=True)
        other.set_models(join(self.comfyui, "models"))
        before = tree(self.comfyui)
        self.failing("'other' uses the models in", dock.Workspace(self.root).delete, "main")
        self.assertEqual(tree(self.comfyui), before)


# ======================================================================================================================
# 9. Environment
# ======================================================================================================================


class EndingAProcess(Stage):
    def setUp(self):
        super().setUp()
        self.child = self.start()
        self.process = dock.process_table().process(self.child.pid)

    def test_one_that_survives_even_the_kill_is_told(self):
        signals = []
        with patch.object(dock, "signal_process", lambda pid, how, is_it: signals.append(how)):
            with patch.object(dock, "wait_for_exit", lambda *_: False):
                with self.assertRaisesRegex(dock.CDEnvironmentError, "did not end, not even when killed"):
                    dock.terminate(self.process, 4)
        self.assertEqual([how for how in signals if how != "continue"], ["interrupt", "terminate", "kill"])

    def test_one_of_another_user_is_left_alone_and_told(self):
        with patch.object(dock, "signal_process", side_effect=PermissionError):
            self.assertFalse(dock.signal_process_of(self.process, "interrupt"))
            error = error_of(dock.terminate, self.process, 0)
            dock.resume(self.process)
        self.assertEqual(error.code, "permission")
        self.assertIn(f"PID {self.process.pid}", error.message)

    def test_one_that_ends_by_itself_meanwhile_is_ended(self):
        with patch.object(dock, "signal_process", side_effect=ProcessLookupError):
            self.assertTrue(dock.signal_process_of(self.process, "kill"))
            with dock.paused([self.process]):
                pass
        self.assertTrue(alive(self.process.pid))

    def test_the_exit_code_is_told_once_it_is_there(self):
        self.child.kill()
        self.assertTrue(dock.wait_for_exit(self.process, 20))
        self.assertEqual(dock.exit_code_of(self.process.pid), 1 if WINDOWS else -9)
        if not WINDOWS:
            self.assertIsNone(dock.exit_code_of(self.process.pid))

    def test_a_server_elsewhere_is_not_ours(self):
        row = dock.Process(1, command=[sys.executable, self.script, "--cpu"])
        cases = [([self.script, "--cpu"], True), ([self.script], True), (["main.py", "--cpu"], False),
                 ([self.script + "x"], False), (["main.py"], False)]  # fmt: skip
        for argv, ours in cases:
            with self.subTest(argv=argv):
                self.assertEqual(dock.is_own_argv(argv, row, self.script), ours)
        by_hand = dock.Process(1, command=["python", "main.py", "--cpu"])
        self.assertTrue(dock.is_own_argv(["main.py", "--cpu"], by_hand, self.script))


# ======================================================================================================================
# 10. The demo
# ======================================================================================================================


def load():
    """The module loaded as vendoring code does: without an entry in sys.modules."""
    spec = importlib.util.spec_from_file_location("vendored", MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLEEP = {"prompt": {"1": {"class_type": "DemoSleep", "inputs": {"seconds": 60}}}}
INFO = "\x1b[32m[INFO]\x1b[0m "


class DemoSource(unittest.TestCase):
    def test_is_a_program_that_names_nothing_outside_itself(self):
        def loaded(code):
            """Every global name that the code can ask for, nested functions included."""
            steps = [step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
            inner = [part for part in code.co_consts if hasattr(part, "co_code")]
            return {step.argval for step in steps}.union(*map(loaded, inner))

        names = loaded(compile(load().demo_source(), "main.py", "exec")) - set(dir(builtins))
        self.assertEqual(names - {"do_GET", "__qualname__"}, {"demo_server"})  # those two are of class bodies

    def test_that_cannot_be_read_is_one_clear_error(self):
        module = load()
        module.demo_server = types.FunctionType(compile("0", "nowhere.py", "eval"), {"__name__": "nowhere"})
        with self.assertRaises(module.CDEnvironmentError) as caught:
            module.demo_source()
        self.assertTrue(caught.exception.hint)


class TheDemo(unittest.TestCase):
    def setUp(self):
        self.folder, self.port = temporary_folder(self), free_port()
        self.log_path = join(self.folder, "log")
        # Not the program written out, which the journeys start: of the function itself coverage can be measured.
        program = f"import sys\n\nsys.path.insert(0, {HERE!r})\nfrom comfydock import demo_server\n\ndemo_server()\n"
        Path(self.folder, "main.py").write_text(program, encoding="utf-8")

    def log(self):
        return Path(self.log_path).read_text(encoding="utf-8")

    def start(self, *args, **variables):
        """Start it; it is ended by a signal first, that lets coverage write down what it saw."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("COMFYDOCK_", "__COMFY_CLI"))}
        command = [sys.executable, "main.py", "--port", str(self.port), *args]
        keys = {"cwd": self.folder, "env": {**clean, **variables}, "stdin": subprocess.DEVNULL,
            "start_new_session": True}  # fmt: skip
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **keys)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.terminate)

    def ready(self, *args, **variables):
        self.start(*args, **variables)
        eventually(lambda: "To see the GUI go to: " in self.log())

    def ask(self, method, path, body=None, **headers):
        """Return status and body of one exchange."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            text = body if body is None or isinstance(body, str) else json.dumps(body)
            connection.request(method, path, text, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path):
        return json.loads(self.ask("GET", path)[1])

    def test_its_log_and_answers_are_like_comfyuis_and_pages_from_elsewhere_are_refused(self):
        self.ready("--cpu", "--a-flag-that-only-comfyui-knows")
        lines = iter(self.log().split("\n"))
        for expected in ("Checkpoint files", "Total VRAM", "Python version: ", "Starting server",
            "To see the GUI go to: http://"):  # fmt: skip
            self.assertTrue(any(line.startswith(INFO + expected) for line in lines), expected)
        system = self.json("/system_stats")["system"]
        self.assertEqual(system["argv"][:4], ["main.py", "--port", str(self.port), "--cpu"])
        self.assertEqual(
            (system["demo"], system["os"], system["comfyui_version"]), ("comfydock", sys.platform, "0.33.0")
        )
        self.assertEqual(self.json("/api/system_stats")["system"]["argv"], system["argv"])
        self.assertEqual(self.ask("GET", "/no"), (404, b""))
        self.assertIn(b"makes no images", self.ask("GET", "/")[1])
        self.assertEqual(list(self.json("/object_info")), ["DemoSleep"])
        here, far = f"127.0.0.1:{self.port}", "http://evil.example"
        cases = ((here, far, 403), (here, f"http://{here}", 200), (here, "", 200),
            (f"localhost:{self.port}", f"http://{here}", 403), ("192.0.2.1", far, 200))  # fmt: skip
        for host, origin, status in cases:
            with self.subTest(host=host, origin=origin):
                self.assertEqual(self.ask("GET", "/queue", Host=host, Origin=origin)[0], status)

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "no IPv6 here")
    def test_a_bare_listen_answers_on_both_families(self):
        self.ready("--listen")
        eventually(lambda: "To see the GUI go to: http://[::]:" in self.log())
        for host in ("127.0.0.1", "::1"):
            self.assertTrue(dock.check_http_health(host, self.port))

    @unittest.skipUnless(has("openssl"), "no openssl to make a certificate")
    def test_tls_is_probed_with_a_certificate_that_nobody_signed(self):
        key, cert = (join(self.folder, name) for name in ("key.pem", "cert.pem"))
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "2"]
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
        self.ready("--tls-keyfile", key, "--tls-certfile", cert)
        self.assertIn("To see the GUI go to: https://127.0.0.1:", self.log())
        self.assertEqual(dock.look_at(dock.ComfyUIConfig("127.0.0.1", self.port, True), 5).queue, (0, 0))
        self.assertFalse(dock.check_http_health("127.0.0.1", self.port))

    @unittest.skipIf(WINDOWS, "POSIX signals")
    def test_sigint_is_a_clean_stop_even_while_busy_and_other_signals_have_their_default(self):
        self.ready()
        self.ask("POST", "/prompt", SLEEP)
        self.process.send_signal(signal.SIGINT)
        self.assertEqual(self.process.wait(30), 0)
        self.assertTrue(self.log().endswith(f"{INFO}\nStopped server\n"))
        self.ready()
        self.process.send_signal(signal.SIGTERM)
        self.assertEqual(self.process.wait(30), -signal.SIGTERM)


# ======================================================================================================================
# 11. Workspace
# ======================================================================================================================


class MakingAWorkspace(unittest.TestCase):
    def setUp(self):
        self.folder = temporary_folder(self)

    def refusal(self, function, *words, **options):
        error = error_of(function, *words, **options)
        return error.message

    def test_an_adoption_that_was_interrupted_goes_on_and_becomes_nothing_else(self):
        checkout = join(self.folder, "ComfyUI")
        write(join(checkout, "main.py"), "")
        os.makedirs(join(checkout, "custom_nodes", "pack"))
        workspace = dock.Workspace(join(self.folder, "w"))
        for owner, broken in ((dock, "first_manifest"), (dock.GitManager, "initialize_environment_repo")):
            with patch.object(owner, broken, side_effect=KeyboardInterrupt):
                with self.assertRaises(KeyboardInterrupt):
                    workspace.adopt(checkout, "a", sys.executable)
            if broken == "first_manifest":
                self.assertEqual(workspace.list_environments(), [])
                continue
            environment = workspace.get_environment("a")
            self.assertFalse(environment.is_complete)
            command = ("create", "a", "--from", os.path.realpath(checkout))
            self.assertEqual(environment.report()["resume"], command)
            self.assertIn("is another environment", self.refusal(workspace.create, "a", no_install=True))
        for name in ("a", None):
            environment = workspace.adopt(checkout, name)
            self.assertEqual((environment.name, environment.python), ("a", sys.executable))
            self.assertEqual(environment.manifest.found_nodes, ["pack"])
            self.assertTrue(environment.is_complete)
            self.assertIsNone(environment.report()["resume"])

    def test_a_creation_of_which_nothing_came_leaves_nothing(self):
        workspace = dock.Workspace(join(self.folder, "w"))
        empty = join(self.folder, "empty")
        os.mkdir(empty)
        for options in ({"source": "nothere.zip"}, {"source": "ext::sh -c id"}, {"source": empty}, {"comfyui": "v0 1"}):
            with self.subTest(options=options), self.assertRaises(dock.CDEnvironmentError):
                workspace.create("x", no_install=True, **{"source": self.folder, **options})
            self.assertEqual(workspace.list_environments(), [])

    def test_an_unfinished_environment_is_gone_on_with_or_deleted_but_never_made_anew(self):
        code = join(self.folder, "code of mine")
        write(join(code, "main.py"), "")
        workspace = dock.Workspace(join(self.folder, "w"))
        options = {"source": code, "no_install": True}
        stopped = patch.object(dock.GitManager, "initialize_environment_repo", side_effect=KeyboardInterrupt)
        with stopped:
            with self.assertRaises(KeyboardInterrupt):
                workspace.create("x", **options)
        environment = workspace.get_environment("x")
        self.assertEqual(environment.report()["resume"], ("create", "x"))
        art = join(environment.paths.comfyui, "output", "art.png")
        write(art, "precious")
        error = error_of(environment.run)
        self.assertEqual(error.message, "Environment 'x' is not complete.")
        self.assertEqual(error.hint, ["Go on with: ", ("create", "x")])
        workspace.create("x", **options)
        self.assertTrue(environment.is_complete and os.path.exists(art))

    def test_an_adopted_checkout_that_was_moved_is_found_again(self):
        checkout, place = (join(self.folder, name) for name in ("ComfyUI", "Moved"))
        write(join(checkout, "main.py"), "")
        workspace = dock.Workspace(join(self.folder, "w"))
        environment = workspace.adopt(checkout, "a", sys.executable)
        os.rename(checkout, place)
        self.assertEqual(environment.report()["missing"], join(os.path.realpath(checkout), "main.py"))
        self.assertIn("has no ComfyUI", self.refusal(environment.run))
        self.assertIn("has no ComfyUI", self.refusal(environment.require_comfyui))
        self.assertEqual(workspace.adopt(place, "a", sys.executable).name, "a")
        self.assertEqual(str(environment.comfyui_path), os.path.realpath(place))
        self.assertIsNone(environment.report()["missing"])
        write(join(checkout, "main.py"), "")
        self.assertIn("exists already", self.refusal(workspace.adopt, checkout, "a", sys.executable))

    def test_what_was_there_before_a_creation_that_fails_stays(self):
        workspace = dock.Workspace(join(self.folder, "w"))
        model = join(workspace.paths.environments, "x", "models", "big")
        write(model, "big")
        with self.assertRaises(dock.CDEnvironmentError):
            workspace.create("x", source="nothere.zip", no_install=True)
        self.assertEqual(os.listdir(join(workspace.paths.environments, "x")), ["models"])
        write(join(workspace.paths.environments, "x", ".cec", ".content.lock"), "")
        with self.assertRaisesRegex(dock.CDEnvironmentError, "is not there"):
            workspace.create("x", source="nothere.zip", no_install=True)
        self.assertTrue(os.path.exists(model))

    def test_no_name_is_made_that_cannot_be_opened(self):
        for name in ("a..b", "..", ".a", "a/b", "a.", "con", "a b"):
            with self.subTest(name=name):
                self.assertIn("cannot name an environment", self.refusal(dock.require_new_name, name))

    def test_an_environment_that_is_closed_to_us_is_listed_and_not_called_missing(self):
        workspace, real = dock.Workspace(join(self.folder, "w")), os.stat

        def closed(path, *words, **more):
            if os.sep + "b" + os.sep in str(path):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *words, **more)

        for name in "abc":
            os.makedirs(join(workspace.paths.environments, name, ".cec"))
        with patch("os.stat", closed):
            self.assertEqual([environment.name for environment in workspace.list_environments()], ["a", "b", "c"])
            self.assertRaises(PermissionError, workspace.get_environment, "b")

    def test_the_record_of_another_machine_takes_no_port_here(self):
        workspace = dock.Workspace(join(self.folder, "w"))
        environment = workspace.demo()
        record = dock.ProcessState(77, "127.0.0.1", 8188, [], dock.utc_now(), environment.log_path)
        record.identity = {"machine": "another"}
        here = {**dock.this_machine(), "machine": "this one"}
        patched = patch.object(dock, "this_machine", return_value=here)
        patched.start()
        self.addCleanup(patched.stop)
        dock.write_state(environment.paths.state, record)
        self.assertEqual((environment.observe().state, environment.claimed_port()), (dock.FOREIGN, None))
        record.pid, record.phase, record.starter = None, dock.STARTING, {"pid": 77, "identity": record.identity}
        record.identity = {}
        dock.write_state(environment.paths.state, record)
        self.assertEqual((environment.report()["machine"], environment.claimed_port()), ("another", None))

    def test_it_is_made_once_and_only_of_an_empty_folder(self):
        empty = dock.Workspace(join(self.folder, "new"))
        self.assertEqual([empty.initialize(), empty.initialize()], [True, False])
        self.assertEqual(empty.list_environments(), [])
        other = join(self.folder, "other")
        write(join(other, "file"), "")
        self.assertIn("is neither empty nor a workspace", self.refusal(dock.Workspace(other).initialize))
        self.assertEqual(os.listdir(other), ["file"])
        for method in ("initialize", "list_environments"):
            self.assertIn("is not a folder", self.refusal(getattr(dock.Workspace(join(other, "file")), method)))

    def checkout(self):
        folder = join(self.folder, "a", "ComfyUI")
        for name in ("main.py", "nodes.py", "folder_paths.py"):
            write(join(folder, name), "")
        return folder

    def test_the_python_of_an_adopted_checkout_can_be_changed_for_one_that_works(self):
        workspace = dock.Workspace(join(self.folder, "ws"))
        for python in (self.folder, join(self.folder, "nowhere")):
            self.assertIn("There is no Python at", self.refusal(workspace.adopt, self.checkout(), None, python))
        self.assertEqual(workspace.list_environments(), [])
        environment = workspace.adopt(self.checkout(), None, sys.executable)
        self.assertEqual(environment.name, "a")
        self.assertIn("There is no Python at", self.refusal(workspace.adopt, self.checkout(), None, self.folder))
        self.assertEqual(workspace.get_environment("a").manifest.python_path, sys.executable)
        if not WINDOWS:
            other = join(self.folder, "python")
            write(other, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            os.chmod(other, 0o755)
            workspace.adopt(self.checkout(), None, other)
            self.assertEqual(workspace.get_environment("a").manifest.python_path, other)

    @unittest.skipIf(WINDOWS, "a python in bin")
    def test_the_python_of_a_checkout_is_its_venv_else_one_that_has_pytorch(self):
        checkout = self.checkout()
        pythons = {name: join(self.folder, name, "bin", "python") for name in ("active", "conda", "system")}
        for name, python in pythons.items():
            write(python, f"#!/bin/sh\ntest -e '{self.folder}/torch-in-{name}' && echo found\n")
            os.chmod(python, 0o755)
        os.symlink("python", join(self.folder, "system", "bin", "python3"))
        variables = {"VIRTUAL_ENV": join(self.folder, "active"),
            "CONDA_PREFIX": join(self.folder, "conda"), "PATH": join(self.folder, "system", "bin")}  # fmt: skip
        with patch.dict(os.environ, variables):
            error = error_of(dock.find_checkout_python, checkout, None)
            for python in pythons.values():
                self.assertIn(f"{python} has no PyTorch", error.message)
            self.assertNotIn("unreadable", error.message)
            self.assertEqual(error.hint, ("run", "--python", pythons["system"]))
            for name, python in reversed(pythons.items()):
                write(join(self.folder, f"torch-in-{name}"), "")
                found = dock.find_checkout_python(checkout, None)
                self.assertEqual(found, pythons["system"] + "3" if name == "system" else python)
            for folder in (join("a", "ComfyUI", "venv"), join("a", "ComfyUI", ".venv")):
                python = join(self.folder, folder, "bin", "python")
                write(python, "")
                os.chmod(python, 0o755)
                self.assertEqual(dock.find_checkout_python(checkout, None), python)


# ======================================================================================================================
# 12. Hand-over
# ======================================================================================================================


def described(**facts):
    """What an engine is told of an environment."""
    values = {"name": "main", "program": ["/usr/bin/python3", "/opt/comfydock.py"], "workspace": "/home/al/.comfydock"}
    values.update(args=["--port", "8190"], variables={}, port=8190, places=["/usr/bin/python3"], owner="al")
    return dock.Description(**{**values, **facts})


class HandOver(unittest.TestCase):
    def test_a_unit_quotes_what_systemd_would_take_for_something_else(self):
        it = described(program=["/a b/$p%/python", "/c\\d.py"], args=["--x", 'a "b" $HOME 50%', "é"])
        unit = dock.systemd_unit(it, user=False)
        command = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
        self.assertTrue(
            command.startswith('ExecStart="/a b/$p%%/python" "/c\\\\d.py" -e main --workspace /home/al/.comfydock run ')
        )
        self.assertTrue(command.endswith(' --foreground -- --x "a \\"b\\" $$HOME 50%%" é'), command)

    def test_a_unit_leaves_out_what_takes_the_card_or_the_files_away(self):
        unit = dock.systemd_unit(described(), user=False)
        for line in ("Type=notify", "User=al", "PrivateTmp=yes", "ProtectSystem=full", "SuccessExitStatus=143"):
            self.assertIn(f"\n{line}\n", unit)
        for word in ("PrivateDevices", "DeviceAllow", "ProtectProc", "MemoryDenyWriteExecute", "Watchdog"):
            self.assertNotIn(word, unit)
        places = ["/usr/bin/python3", "/tmp/x", "/usr/local/comfy"]
        unit = dock.systemd_unit(described(places=places), user=False)
        self.assertFalse({"PrivateTmp=yes", "ProtectSystem=full"} & set(unit.splitlines()))
        unit = dock.systemd_unit(described(), user=True)
        self.assertFalse({"User=al", "ProtectKernelModules=yes"} & set(unit.splitlines()))
        self.assertIn("WantedBy=default.target", unit)

    def test_names_of_engines_are_valid_and_differ(self):
        names = ["main", "a.b", "a-b", "A-B", "a_b", "2nd", "-", "мир", "x" * 63]
        labels = [described(name=name).label for name in names]
        for label in labels:
            self.assertRegex(f"comfydock-{label}", r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])$")
        self.assertEqual((labels[0], labels[2], len(set(labels))), ("main", "a-b", len(names)))
        self.assertEqual(described(name="a.b-c d/é").unit, "comfydock-a.b-c\\x20d\\x2f\\xc3\\xa9")

    def test_an_image_has_an_address_a_card_and_places_of_its_own(self):
        cases = {
            "--port 8190 --listen --lowvram": ("--lowvram", [], []),
            "--listen=1.2.3.4 --por=9 --preview-method auto": ("--preview-method auto", [], []),
            "--cuda-device 1 --fast a b": ("--fast a b", [], ["1"]),
            "--output-directory /data/out --fp16-vae --tls-keyfile=/k": (
                "--fp16-vae", ["--output-directory /data/out", "--tls-keyfile /k"], []),
        }  # fmt: skip
        if WINDOWS:
            cases.popitem()
        for words, (kept, left_out, cards) in cases.items():
            self.assertEqual(dock.image_args(words.split()), (kept.split(), left_out, cards))

    def test_an_image_pins_what_can_be_fetched_and_copies_the_rest(self):
        code = [dock.Code("", "/c", "https://x/ComfyUI", "ab12"), dock.Code("custom_nodes/my node", "/d")]
        it = described(
            code=code, python="3.11", index="https://t/cu128", held=["torch==2+cu128"], packages=["pillow==1"]
        )
        files = dock.image_files(it)
        text = files["Dockerfile"]
        self.assertIn("RUN git clone --recurse-submodules https://x/ComfyUI . && \\\n    git -C . checkout", text)
        self.assertIn('COPY --chown=1000:1000 ["custom_nodes/my node", "custom_nodes/my node/"]', text)
        self.assertIn("ARG BASE=python:3.11-slim", text)
        self.assertIn("ARG TORCH_INDEX=https://t/cu128", text)
        self.assertEqual((files["constraints.txt"], files["requirements.txt"]), ("torch==2+cu128\n", "pillow==1\n"))
        health = json.loads(re.search(r"CMD (\[\"python3.*)", text)[1])[2]
        with listening(answer=saying(stats())) as port:
            self.assertEqual(subprocess.run([sys.executable, "-c", health.replace("8188", str(port))]).returncode, 0)
            self.assertIn("'127.0.0.1', 8188, ", health)

    def test_each_engine_gets_the_card_in_its_own_words(self):
        words = {"none": (None, "docker run -d -p"), "nvidia": ("driver: nvidia", "--gpus all"),
            "cdi": ("- nvidia.com/gpu=all", "--device nvidia.com/gpu=all")}  # fmt: skip
        for gpu, (spelled, typed) in words.items():
            it = described(gpu=gpu)
            compose, kubernetes = dock.compose_file([it]), dock.kubernetes_file(it)
            self.assertEqual("nvidia" in compose, gpu != "none")
            self.assertIn(spelled or "127.0.0.1:8190:8188", compose)
            self.assertEqual("nvidia.com/gpu: 1" in kubernetes, gpu != "none")
            self.assertIn(typed, dock.next_steps("dockerfile", "/x", [it], False)[1])
        self.assertIn('device_ids: ["1"]', dock.compose_file([described(gpu="nvidia", gpus=["1"])]))
        self.assertIn("- nvidia.com/gpu=1", dock.compose_file([described(gpu="cdi", gpus=["1"])]))
        for gpu, typed in (("nvidia", dock.quote('"device=0,2"')),
            ("cdi", "nvidia.com/gpu=0 --device nvidia.com/gpu=2")):  # fmt: skip
            run = dock.next_steps("dockerfile", "/x", [described(gpu=gpu, gpus=["0", "2"])], False)[1]
            self.assertIn(f" {typed} ", run)

    def test_autostart_off_removes_the_variables_of_a_unit_whatever_its_name(self):
        with tempfile.TemporaryDirectory() as folder:
            unit, variables = (join(folder, "in", f"comfydock-a.service.{end}") for end in ("service", "env"))
            for path in (unit, variables):
                write(path, "")
            write(join(folder, "mine"), "")
            self.assertFalse(dock.switch_files("off", {unit: ""}, None))
            self.assertEqual(os.listdir(folder), ["mine"])

    def test_values_of_variables_are_in_no_file_but_their_own(self):
        it = described(variables={"TOKEN": 'se"cr$et'})
        texts = [dock.systemd_unit(it, True), dock.compose_file([it]), dock.kubernetes_file(it), dock.dockerfile(it)]
        self.assertFalse(any("cr$et" in text for text in texts))
        self.assertEqual(dock.environment_file(it.variables), 'TOKEN="se\\"cr\\$et"\n')

    def test_launchd_and_the_task_scheduler_read_what_was_meant(self):
        it = described(name="a & <b>", args=["--x", "a b", "<é>"], variables={"TOKEN": "x"}, owner="PC\\al")
        facts = plistlib.loads(dock.launchd_plist(it, True).encode())
        self.assertEqual(facts["ProgramArguments"], it.words())
        self.assertEqual((facts["EnvironmentVariables"], facts["UserName"]), ({"TOKEN": "x"}, "PC\\al"))
        self.assertEqual((facts["KeepAlive"], facts["RunAtLoad"]), ({"SuccessfulExit": False}, True))
        it.program[0] = "C:\\Program Files\\Python\\python.exe"
        root = xml.etree.ElementTree.fromstring(dock.task_xml(it).encode("utf-16"))
        told = {element.tag.partition("}")[2]: element.text for element in root.iter()}
        self.assertEqual(told["Command"], "C:\\Program Files\\Python\\pythonw.exe")
        self.assertEqual(told["Arguments"], subprocess.list2cmdline(it.words()[1:]))
        self.assertEqual((told["UserId"], told["ExecutionTimeLimit"], told["Priority"]), ("PC\\al", "PT0S", "5"))


# ======================================================================================================================
# 13. Hidden entries
# ======================================================================================================================


class TheEntriesAreNoCommands(unittest.TestCase):
    def test_typed_by_a_person_they_say_nothing_and_fail(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), patch.dict(os.environ):
            os.environ.pop("COMFYDOCK_DEBUG", None)
            self.assertEqual([dock.main(["--console-interrupt", "x"]), dock.main(["--monitor"])], [1, 1])
            os.environ["COMFYDOCK_DEBUG"] = "1"
            self.assertRaises(ValueError, dock.main, ["--console-interrupt", "x"])
        self.assertEqual(out.getvalue(), "")


class Watched:
    """An environment as the monitor needs it, whose ComfyUI starts as often as `starts` says."""

    def __init__(self, *starts, restarts=()):
        self.starts, self.notes, self.exits = list(starts), [], []
        self.record = dock.ProcessState(77, "127.0.0.1", 8188, [], "2026-01-01T00:00:00+00:00", "/log", run_id="a")
        self.record.monitor = {"restarts": [time.time() - age for age in restarts]}

    def _read_state(self):
        return self.record

    def amend_record(self, run_id, last_exit=None, monitor=None):
        if last_exit:
            self.exits.append((run_id, last_exit["code"]))
        else:
            self.notes.append((run_id, monitor))

    def is_held_back(self):
        return False

    def restart_kept(self, run_id, note):
        started = self.starts.pop(0)
        if isinstance(started, Exception):
            raise started
        return started

    def take_on_as_monitor(self, note):
        return self.restart_kept("", note)


class AfterACrash(unittest.TestCase):
    def setUp(self):
        patched = patch.object(dock, "LONGEST_BACKOFF", 0.0)
        patched.start()
        self.addCleanup(patched.stop)

    def test_comfyui_is_started_again_and_the_time_is_noted(self):
        watched = Watched(True, restarts=(10, 1000))
        monitor = dock.Monitor(watched)
        self.assertTrue(monitor.goes_on(1))
        self.assertEqual((watched.exits, watched.notes), ([("a", 1)], []))
        ages = [time.time() - moment for moment in monitor.entry["restarts"]]
        self.assertEqual([age < 5 for age in ages], [False, True])  # the one of long ago counts no more

    def test_an_end_that_a_restart_would_repeat_or_that_was_wanted_is_none(self):
        with patch.object(dock, "IS_WINDOWS", False):  # where a good end may be ComfyUI-Manager's restart
            self.assertFalse(dock.Monitor(Watched(True)).goes_on(0))
        self.assertFalse(dock.Monitor(Watched(True)).goes_on(2))
        watched = Watched(True)
        monitor = dock.Monitor(watched)
        watched.record = watched.record.from_dict({**watched.record.to_dict(), "wanted": "stopped"})
        self.assertFalse(monitor.goes_on(1))
        self.assertEqual(watched.exits, [])

    def test_too_many_crashes_are_given_up_with_the_reason(self):
        watched = Watched(restarts=(10, 20, 30, 40, 50))
        self.assertFalse(dock.Monitor(watched).goes_on(3))
        self.assertEqual(watched.notes[0][1]["gave_up"], "6 crashes within 5m, the last with code 3")

    def test_a_start_that_ends_at_once_is_a_crash_like_any_other(self):
        ended = [dock.CDEndedError("it ended", "", 1) for _ in range(2)]
        self.assertTrue(dock.Monitor(Watched(*ended, True)).goes_on(1))
        watched = Watched(*ended, restarts=(10, 20, 30))
        self.assertFalse(dock.Monitor(watched).goes_on(1))
        self.assertIn("6 crashes", watched.notes[0][1]["gave_up"])

    def test_on_a_full_disk_it_is_tried_until_there_is_room(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        watched = Watched(full, full, full, full, full, full, full, True)
        self.assertTrue(dock.Monitor(watched).goes_on(1))
        self.assertEqual(watched.notes, [])

    def test_a_start_of_which_not_even_the_intent_could_be_taken_back_is_tried_again(self):
        environment = dock.Workspace(temporary_folder(self)).demo()
        former = dock.ProcessState(
            2**22 - 1, "127.0.0.1", free_port(), [], dock.utc_now(), environment.log_path, run_id="a"
        )
        former.identity = {"created": 1.0}
        former.args = ["--port", str(former.port)]
        dock.write_state(environment.paths.state, former)
        full, real = OSError(errno.ENOSPC, "No space left on device"), dock.write_state

        def intents_only(path, state):
            if state.pid is not None:
                raise full
            real(path, state)

        with (patch.object(dock, "begin_session", side_effect=full),
            patch.object(dock, "write_state", intents_only), self.assertRaises(OSError)):  # fmt: skip
            environment.restart_kept(former, {})
        monitor = dock.Monitor(environment)
        self.assertIsNone(monitor.record.pid)
        monitor.record = former
        self.assertEqual(monitor._wish(), "running")
        self.assertTrue(environment.restart_kept(former, {}))
        self.addCleanup(environment.stop, kill=True)
        self.assertTrue(environment.is_running())

    def test_arguments_that_comfyui_refuses_are_not_tried_again(self):
        watched = Watched(dock.CDEndedError("unrecognized arguments", "", 2), True)
        self.assertFalse(dock.Monitor(watched).goes_on(1))
        self.assertIn("unrecognized arguments", watched.notes[0][1]["gave_up"])
        self.assertEqual(watched.starts, [True])

    def test_what_cannot_start_is_given_up_with_the_reason(self):
        for trouble in (dock.CDEnvironmentError("port 8188 is in use"), OSError("port 8188 is in use")):
            watched = Watched(trouble)
            self.assertFalse(dock.Monitor(watched).goes_on(1))
            self.assertIn("port 8188 is in use", watched.notes[0][1]["gave_up"])

    def test_on_windows_a_comfyui_that_restarted_itself_is_found_again(self):
        with patch.object(dock, "IS_WINDOWS", True):
            watched = Watched(dock.CDEnvironmentError("busy"), True)
            self.assertTrue(dock.Monitor(watched).goes_on(0))
            self.assertEqual(watched.exits, [])
            with patch.object(dock, "REBORN_PATIENCE", 0.01):
                self.assertFalse(dock.Monitor(Watched(False, False)).goes_on(0))


# ======================================================================================================================
# 14. The console
# ======================================================================================================================


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Cp437(io.StringIO):
    encoding = "cp437"


class TheConsoleSpeaksPlainly(unittest.TestCase):
    def test_what_could_drive_a_terminal_is_not_said(self):
        out = io.StringIO()
        dock.Console(out, None, None).result("PID 7 is \x1b[31mEVIL\x1b]0;x\x07, \x9b2J a\tb\r")
        self.assertEqual(out.getvalue(), "PID 7 is  [31mEVIL ]0;x ,  2J a\tb \n")

    def test_signs_become_ascii_where_the_stream_can_do_no_better(self):
        out = Cp437()
        dock.Console(out, None, None).say("✓ ComfyUI • über 日本")
        self.assertEqual(out.getvalue(), "[ok] ComfyUI * über \\u65e5\\u672c\n")

    def test_colours_are_for_terminals_and_no_color_is_obeyed(self):
        with patch.dict(os.environ, {"TERM": "xterm", "NO_COLOR": ""}):
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
        console = dock.Console(None, None, None, call=lambda: "python3 comfydock.py")
        console.chosen, console.where = ("-e", "dev"), ("--workspace", "W")
        cases = [
            (("logs", "-f"), "--workspace W -e dev logs -f"), (("list",), "--workspace W list"), (("use", "x"), "--workspace W use x"),
            (("-e", "a b", "run"), f"--workspace W -e {dock.quote('a b')} run"), (("--workspace", "X", "list"), "--workspace X list"),
        ]  # fmt: skip
        for words, shown in cases:
            self.assertEqual(console.typed(*words), f"python3 comfydock.py {shown}")

    def test_a_hint_is_text_a_command_or_both_and_quoted_text_is_never_rewritten(self):
        err = io.StringIO()
        console = dock.Console(None, err, None, call=lambda: "./dock")
        for hint in ("what 'comfydock run' said", ("repair",), ["First: ", ("stop",), "."]):
            console.fail("status", dock.CDEnvironmentError("node 'comfydock stop' failed", hint))
        shown = err.getvalue().splitlines()
        self.assertEqual(shown[::2], ["comfydock: Node 'comfydock stop' failed."] * 3)
        self.assertEqual(shown[1::2], ["  what 'comfydock run' said", "  Try: ./dock repair", "  First: ./dock stop."])

    def test_without_a_terminal_there_is_no_answer(self):
        self.assertIsNone(dock.Console(io.StringIO(), None, io.StringIO("y\n")).ask("Sure?", True))
        self.assertIsNone(dock.Console(Terminal(), None, None).ask("Sure?", True))

    def test_a_terminal_is_asked(self):
        for typed, default, answer in (("\n", True, True), ("\n", False, False), ("Y\n", False, True),
            ("no\n", True, False)):  # fmt: skip
            self.assertIs(dock.Console(Terminal(), None, Terminal(typed)).ask("Sure?", default), answer)
        self.assertIs(dock.Console(Terminal(), None, Terminal("")).ask("Sure?", True), False)

    def test_a_closed_stream_is_no_terminal(self):
        closed = io.StringIO()
        closed.close()
        self.assertEqual([dock.is_terminal(one) for one in (closed, None, Terminal())], [False, False, True])

    def test_missing_streams_are_no_fault(self):
        console = dock.Console(None, None, None)
        console.say("x")
        console.warn("x")
        console.raw(b"x")
        console.flush()

    def test_color_decides_and_auto_leaves_it_to_the_terminal(self):
        for choice, stream, coloured in (("always", io.StringIO(), True), ("never", Terminal(), False)):
            console = dock.Console(stream, None, None)
            console.colour = choice
            console.say("✓ done")
            self.assertEqual("\x1b[32m✓\x1b[0m done\n" == stream.getvalue(), coloured)

    def test_quiet_leaves_results_warnings_and_errors(self):
        out, err = io.StringIO(), io.StringIO()
        console = dock.Console(out, err, None)
        console.quiet = True
        console.say("chatter")
        console.work("pip talks")
        console.warn("careful")
        lines = ["✓ ComfyUI started in background (PID 7)", "", "Tip: View logs"]
        console.show("run", dock.Report({}, lines=lines))
        self.assertEqual(out.getvalue().splitlines()[0], "✓ ComfyUI started in background (PID 7)")
        self.assertNotIn("Tip", out.getvalue())
        self.assertEqual(err.getvalue(), "⚠ careful\n")

    def test_progress_is_drawn_over_and_taken_away_without_escape_codes(self):
        err = Terminal()
        console = dock.Console(err, err, None)
        console.progress("   waiting ... 1 s")
        console.progress("   waiting ... 2 s")
        console.say("done")
        self.assertTrue(err.getvalue().endswith("\r" + " " * 18 + "\rdone\n"))
        self.assertNotIn("\x1b[K", err.getvalue())
        quiet = dock.Console(io.StringIO(), io.StringIO(), None)
        quiet.progress("x")
        self.assertEqual(quiet.err.getvalue(), "")

    def test_silence_of_more_than_a_second_is_bridged_on_a_terminal(self):
        err = Terminal()
        console = dock.Console(io.StringIO(), err, None)
        with console.ticking("stop"):
            eventually(lambda: "   stop ... " in err.getvalue())
        self.assertTrue(err.getvalue().endswith("\r"))
        log = io.StringIO()
        with dock.Console(log, log, None).ticking("stop"):
            time.sleep(1.5)
        self.assertEqual(log.getvalue(), "")

    def test_a_terminal_that_is_gone_while_progress_is_shown_keeps_nobody_from_work(self):
        err = Terminal()
        console = dock.Console(out := io.StringIO(), err, None)
        console.progress("   working")
        with patch.object(err, "write", side_effect=OSError(errno.EIO, "Input/output error")):
            console.say("done")
        self.assertEqual(out.getvalue(), "done\n")

    def test_how_it_was_called(self):
        with patch.object(sys, "orig_argv", ["python3", "comfydock.py", "run"], create=True):
            self.assertEqual(dock.how_called(["comfydock.py"]), "python3 comfydock.py")
        folder = os.get_exec_path()[0]
        self.assertEqual(dock.how_called([join(folder, "comfydock")]), "comfydock")
        self.assertIn(dock.how_called(["/tmp/a link/dock"]), ("'/tmp/a link/dock'", '"/tmp/a link/dock"'))
        with patch.object(sys, "orig_argv", ["python", "-m", "comfydock"], create=True):
            self.assertEqual(dock.how_called(["/x/comfydock.py"]), "python -m comfydock")
        with patch.object(sys, "orig_argv", ["python3", "comfydock.pyz"], create=True):
            self.assertEqual(dock.how_called(["comfydock.pyz"]), "python3 comfydock.pyz")


# ======================================================================================================================
# 16. The command line
# ======================================================================================================================


class WordsAreSharedOutBetweenUsAndComfyUI(unittest.TestCase):
    def parse(self, *words):
        return dock.parse(list(words))

    def test_comfyui_gets_its_own_words_untouched(self):
        cases = [(["run", "--listen", "--port", "9"], ["--listen", "--port", "9"]),
            (["run", "--", "--json", "-e", "x"], ["--json", "-e", "x"]),
            (["run", "--cpu", "--", "--", "x"], ["--cpu", "--", "x"]),
            (["run", "--listen", "-e", "dev", "--cpu"], ["--listen", "--cpu"]),
            (["run", "--wait", "--listen"], ["--listen"]), (["run", "--wait", "5", "--listen"], ["--listen"]),
            (["run", "--wait=5", "1.2.3.4"], ["1.2.3.4"]),
            (["run", "--fore", "--verbose", "DEBUG"], ["--fore", "--verbose", "DEBUG"]),
            (["run", "--output-directory", "stop", "--set-env", "A=b=c"], ["--output-directory", "stop"]),
            (["run", "-v", "--verbose", "--cpu", "-v", "--verbose"], ["--verbose", "--cpu", "--verbose"]),
            (["run", "--reserve-vram", "-1", "-0.5"], ["--reserve-vram", "-1", "-0.5"]),
            (["run", "--verbose", "DEBUG"], ["--verbose", "DEBUG"]),
            (["run", "--verbose=INFO", "-q"], ["--verbose=INFO"])]  # fmt: skip
        for words, theirs in cases:
            with self.subTest(words=words):
                self.assertEqual(self.parse(*words)[1].comfyui_args, theirs)

    def test_our_options_may_stand_before_and_after_the_command(self):
        for words in (["-e", "dev", "status"], ["status", "-e", "dev"], ["--env=dev", "status"],
            ["status", "--env", "dev"]):  # fmt: skip
            self.assertEqual(self.parse(*words)[1].env, "dev", words)

    def test_a_name_is_the_very_first_word_behind_a_command(self):
        for words in (["stop", "sdxl"], ["run", "sdxl", "--wait", "--", "--lowvram"], ["logs", "sdxl", "-f"],
            ["-e", "sdxl", "status", "sdxl"]):  # fmt: skip
            self.assertEqual(self.parse(*words)[1].env, "sdxl", words)
        _, args = self.parse("run", "--port", "8190", "x")
        self.assertEqual((args.env, args.comfyui_args), (None, ["--port", "8190", "x"]))
        self.assertEqual(self.parse("stop", "--when-idle", "5")[1].when_idle, 5.0)

    def test_what_exec_runs_begins_with_the_first_word_that_is_no_option(self):
        for words, env, theirs in ((["exec", "pip", "list", "--json"], None, ["pip", "list", "--json"]),
            (["exec", "-e", "dev", "git", "checkout", "--", "x"], "dev", ["git", "checkout", "--", "x"]),
            (["-e", "dev", "exec", "--", "python", "-V"], "dev", ["python", "-V"])):  # fmt: skip
            _, args = self.parse(*words)
            self.assertEqual((args.env, args.comfyui_args), (env, theirs))

    def test_words_that_people_type_lead_to_the_command_that_does_it(self):
        for word, hint in (("ps", ("list",)), ("up", ("run",)), ("sh", ("exec",)), ("rm", ("delete",)),
            ("deleet", ("help",))):  # fmt: skip
            error = error_of(self.parse, word)
            self.assertEqual((error.message, error.hint), (f"Unknown command '{word}'.", hint))
        with self.assertRaises(dock.CDEnvironmentError) as caught:
            self.parse("install")
        self.assertEqual(caught.exception.hint, ["Try: ", ("node", "add"), ", or: ", ("create",)])

    def test_values_are_read(self):
        _, args = self.parse("run", "--wait", "--set-env", "A=1", "--set-env", "B=x=y", "--demo")
        self.assertEqual((args.wait, args.set_env, args.demo), (180.0, {"A": "1", "B": "x=y"}, True))
        self.assertEqual(self.parse("run", "--wait", "2.5")[1].wait, 2.5)
        self.assertEqual(self.parse("stop", "--timeout", "3")[1].timeout, 3.0)
        self.assertEqual(self.parse("logs", "-n", "7", "-f")[1].tail, 7)
        self.assertEqual(self.parse("repair", "dev", "--orphan")[1].env, "dev")

    def test_nonsense_is_a_usage_error_with_a_hint(self):
        cases = [
            ["frobnicate"], ["stauts"], ["stop", "--timeout", "x"], ["stop", "--timeout", "-1"], ["stop", "--timeout"],
            ["logs", "-n", "-5"], ["logs", "-n5"], ["logs", "--json"], ["run", "--foreground", "--json"], ["list", "--watch", "--json"], ["status", "-e", "a", "x"], ["status", "x", "y"], ["stop", "a", "-e", "b"], ["stop", "a", "--all"],
            ["status", "--fol"], ["use"], ["use", "a", "b"], ["create", "x", "--from", "d", "--no-install"], ["node"], ["node", "frob"], ["node", "remove"], ["repair", "--adopt", "--end"], ["node", "add", "x", "--restart", "--no-restart"], ["run", "--set-env", "A"],
            ["stop", "--kil"], ["stop", "--port", "0"], ["stop", "--port", "99999"], ["-e"], ["run", "-e"], ["logs", "-fn", "5"], ["run", "--cpu", "-fe"], ["run", "-f=1"], ["status", "--json=1"], ["status", "--env"], ["--", "x"],
        ]  # fmt: skip
        for words in cases:
            with self.subTest(words=words), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.parse(*words)
            self.assertEqual(caught.exception.code, "usage")
            self.assertTrue(caught.exception.hint)

    def test_options_that_need_or_exclude_another_say_so(self):
        cases = ((["stop", "--dry-run"], "--dry-run needs --port."),
            (["stop", "--timeout", "x"], "--timeout takes SECONDS, not 'x'."),
            (["logs", "-n"], "-n/--tail needs a value."),
            (["logs", "-f", "--all"], "--follow and --all cannot be combined."),
            (["logs", "-f", "main"], "'logs' takes no name behind its options."),
            (["stop", "--all", "--port", "8190"], "--all and --port cannot be combined."),
            (["-q", "-v", "list"], "--quiet and -v cannot be combined."),
            (["node", "add", "x", "--restart", "--no-restart"], "--restart and --no-restart cannot be combined."),
            (["run", "--all", "--foreground"], "--foreground and --all cannot be combined."),
            (["create", "x", "--from", "d", "--comfyui", "v1"], "--from and --comfyui cannot be combined."))  # fmt: skip
        for words, message in cases:
            with self.subTest(words=words), self.assertRaises(dock.CDEnvironmentError) as caught:
                self.parse(*words)
            self.assertEqual((caught.exception.message, caught.exception.code), (message, "usage"))

    def test_help_is_ours_wherever_it_stands_before_two_dashes(self):
        for words in (["use", "dev", "--help"], ["run", "--cpu", "-h"], ["--help", "run"], ["node", "add", "-h"],
            ["use", "-h"]):  # fmt: skip
            command, args = self.parse(*words)
            self.assertIn("[options]", command.act(dock.Console(None, None, None), args).data["text"], words)
        self.assertEqual(self.parse("run", "--", "--help")[1].comfyui_args, ["--help"])
        with self.assertRaises(dock.CDEnvironmentError):
            dock.show_help(dock.Console(None, None, None), self.parse("help", "nothing")[1])

    def test_quiet_verbose_and_color(self):
        _, args = self.parse("-q", "status", "--color", "never")
        self.assertEqual((args.quiet, args.verbose, args.color), (True, False, "never"))
        for words in (["list", "--color", "red"], ["completion"], ["completion", "tcsh"]):
            with self.subTest(words=words), self.assertRaises(dock.CDEnvironmentError) as caught:
                command, args = self.parse(*words)
                command.act(dock.Console(None, None, None), args)
            self.assertEqual(caught.exception.code, "usage")

    def test_every_help_fits_a_screen(self):
        console = dock.Console(None, None, None)
        with patch.object(dock, "columns", return_value=80):
            for topic in ("", "json", "files", "stop", "node", *dock.COMMANDS):
                lines = dock.show_help(console, self.parse("help", *topic.split())[1]).data["text"].splitlines()
                self.assertLessEqual(max(map(len, lines)), 80, topic)
                self.assertLess(len(lines), 60 if topic == "generate" else 48, topic)


class CompletionScripts(unittest.TestCase):
    @patch.dict(os.environ, COMFYDOCK_HOME=join(HERE, "no workspace"))
    def offered(self, *words):
        return dock.completions([*words[:-1], f"={words[-1]}"])

    def test_every_command_and_flag_is_offered(self):
        for name, command in dock.COMMANDS.items():
            words = name.split()
            self.assertIn(words[-1], self.offered(*words))
            self.assertIn(words[-1], self.offered("help", *words))
            flags = [flag for flags, _, _ in dock.options_of(command) for flag in flags]
            self.assertEqual(
                self.offered(*words, "-"), [flag for flag in flags if flag != "--json" or command.has_json]
            )

    def test_what_is_offered_depends_on_what_stands_before(self):
        cases = [
            (["--color", ""], ["auto", "always", "never"]), (["status", "--color", "n"], ["never"]), (["node", "r"], ["remove"]),
            (["--color", "never", "sta"], ["status"]), (["help", "node", "up"], ["update"]), (["nod"], ["node"]),
            (["completion", ""], list(dock.SCRIPTS)), (["completion", "bash", ""], []), (["nonsense", ""], []), (["run", "--", "x"], []),
            (["run", "--input", ""], []), (["create", "x", "--from", ""], []), (["stop", "--timeout", ""], []),
            (["run", "--wait", "--mon"], ["--monitor"]), (["run", "--wait", "5", ""], []), (["status", ""], []),
        ]  # fmt: skip
        for words, found in cases:
            with self.subTest(words=words):
                self.assertEqual(self.offered(*words), found)

    def test_no_script_has_a_gap_left(self):
        for shell in dock.SCRIPTS:
            self.assertNotRegex(dock.completion_script(shell), "@[A-Z]+@")

    @unittest.skipUnless(
        has_module("tree_sitter_powershell"), "no grammar of PowerShell: pip install tree-sitter-powershell"
    )
    def test_the_script_for_powershell_is_powershell(self):
        import tree_sitter
        import tree_sitter_powershell

        parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
        self.assertTrue(parser.parse(b"if ($x { y }").root_node.has_error)
        with patch.object(dock, "own_command", return_value=["/it's here/py $x", "-c", "a; b", 'say "x"']):
            self.assertFalse(parser.parse(dock.completion_script("powershell").encode()).root_node.has_error)


class TheFrontDoorNeverShowsATraceback(unittest.TestCase):
    def test_a_fault_of_ours_is_one_clear_sentence(self):
        err = io.StringIO()
        with patch.object(dock, "answer", side_effect=KeyError("x")), contextlib.redirect_stderr(err):
            self.assertEqual(dock.main(["status"]), 1)
        self.assertIn("Internal error: KeyError: 'x'", err.getvalue())
        self.assertNotIn("Traceback", err.getvalue())

    def test_who_looks_for_the_fault_is_shown_it(self):
        with patch.object(dock, "answer", side_effect=KeyError("x")):
            with patch.dict(os.environ, COMFYDOCK_DEBUG="1"):
                self.assertRaises(KeyError, dock.main, ["status"])

    def test_a_second_ctrl_c_does_not_break_off_the_last_words(self):
        with patch.object(dock, "complain", side_effect=[KeyboardInterrupt, 130]) as complain:
            with patch.object(dock, "answer", side_effect=KeyboardInterrupt):
                self.assertEqual(dock.main(["status"]), 130)
        self.assertEqual(complain.call_count, 2)

    def test_ctrl_c_is_130(self):
        with patch.object(dock, "answer", side_effect=KeyboardInterrupt):
            with contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(dock.main(["status"]), 130)


# ======================================================================================================================
# The house itself
# ======================================================================================================================


class Sentences(unittest.TestCase):
    """What the program says is the plain English of the tools that people like: subject, verb, object."""

    REFUSED = (  # inverted order, and the turns of phrase that nobody uses
        r"that (is|was) there", r"all the same", r"\bgoes on\b", r"\bstands? in\b", r"(?<![Tt]here )\b([Ii]s|are|was|were) no (?!longer)",
        r"held where", r"\bmend", r"fault of", r"\bin line\b", r"exclude each other", r"\bat work\b", r"[Nn]obody", r"\banew\b", r"broken off",
    )  # fmt: skip

    def said(self):
        """Every text with a blank that is no docstring and not the demo's, holes as {}: line -> text."""
        tree = ast.parse(Path(MODULE).read_text(encoding="utf-8"))
        holders = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))]
        skipped = {id(node.body[0].value) for node in holders if isinstance(node.body[0], ast.Expr)}
        demo = next(node for node in holders if getattr(node, "name", "") == "demo_server")
        skipped |= {id(node) for node in ast.walk(demo)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) and id(node) not in skipped:
                skipped |= {id(inner) for inner in ast.walk(node)}
                yield (node.lineno,
                    "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield node.lineno, node.value

    def test_none_is_crooked(self):
        said = [(line, text) for line, text in self.said() if " " in text.strip()]
        self.assertGreater(len(said), 500)
        for line, text in said:
            for pattern in self.REFUSED:
                self.assertNotRegex(text, pattern, f"line {line}")


class TheHouse(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.source = Path(MODULE).read_text(encoding="utf-8")
        cls.tree = ast.parse(cls.source)
        cls.sections = [
            (number, int(match[1]))
            for number, line in enumerate(cls.source.splitlines(), 1)
            if (match := re.match(r"# (\d+)\. \S", line))
        ]

    def section(self, line):
        return max((section for first, section in self.sections if first <= line), default=0)

    def test_the_sections_are_in_order_and_the_map_names_them_all(self):
        self.assertEqual([section for _, section in self.sections], list(range(1, len(self.sections) + 1)))
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

    def test_what_users_call_is_explained(self):
        for name in dock.__all__:
            subject = getattr(dock, name)
            methods = vars(subject).values() if isinstance(subject, type) else ()
            public = [method for method in methods if callable(method) and not method.__name__.startswith("_")]
            for thing in [subject, *public]:
                self.assertTrue(isinstance(thing, str) or thing.__doc__, thing)

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
                here, there = self.section(node.lineno), self.section(defined[name])
                self.assertLessEqual(there, here, f"{name} of section {there} used in line {node.lineno}")

    def test_each_rule_holds(self):
        rules = {
            "print": {14}, "input": {14}, "psutil_module": {4}, "argparse": {16}, "signal": {3}, "fcntl": {3}, "msvcrt": {3},
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
                if word in rules and self.section(node.lineno) not in (0, 10):
                    self.assertIn(self.section(node.lineno), rules[word], f"{word} in line {node.lineno}")

    def test_nothing_that_is_started_opens_a_window_on_windows(self):
        forks = [node for node in self.tree.body if isinstance(node, ast.If) and "win32" in ast.unparse(node.test)]
        elsewhere = {id(inner) for fork in forks for node in fork.orelse for inner in ast.walk(node)}
        starts = ("subprocess.run", "subprocess.Popen")
        for node in ast.walk(self.tree):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in starts
            if is_call and id(node) not in elsewhere and self.section(node.lineno) != 10:
                options = [ast.unparse(one) for one in node.keywords]
                self.assertTrue(
                    {"**GROUP", "**options"} & set(options) or "CREATE_NO_WINDOW" in str(options), node.lineno
                )

    def test_importing_costs_little(self):
        slow = "argparse dataclasses hashlib inspect pathlib shutil signal socket subprocess threading typing urllib.request"
        code = f"import sys; sys.path.insert(0, {HERE!r}); import comfydock; print(*set({slow!r}.split()) & set(sys.modules))"
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout.strip(), done.stderr), (0, "", ""))

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
# Journeys: real processes through the real command, for FirstContact `python3 comfydock.py`
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

    def does(self, *words, **more):
        """Run a command that must end well; returns the CompletedProcess."""
        done = self.person.types(*words, **more)
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        return done

    def environment_of_person(self, name="demo"):
        return dock.Workspace(self.person.workspace).get_environment(name)

    def comes_to_be(self, state):
        """Look from here, which is cheaper than by a command, until the demo is in a state; returns the report."""
        environment = self.environment_of_person()
        return eventually(lambda: (now := environment.report())["state"] == state and now, 30)

    def manager_restarts(self, port, name="demo"):
        """Have ComfyUI-Manager restart the demo, and wait until it answers again."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            post(port, "/v2/manager/reboot", {})
        eventually(lambda: self.person.log(name).count("To see the GUI") == 2)

    def ends_at_once(self, *words, **variables):
        """Start a demo that ends while `run` watches, which takes longer on a busy machine than `run` usually does."""
        self.person.program = installed("comfydock.FIRST_LINE_SECONDS = 30")
        done = self.person.types("run", "--demo", "--port", str(free_port()), *words, **variables)
        self.person.program = installed()
        return done

    def assertClear(self, done, code, *fragments):
        """One clear sentence on the error stream, no traceback, and the exit code."""
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn("comfydock: ", done.stderr)
        for fragment in fragments:
            self.assertIn(fragment, done.stderr)


class FirstContact(Journey):
    def setUp(self):
        super().setUp()
        self.person.program = MODULE

    def test_a_newcomer_in_an_empty_home_gets_all_the_way(self):
        person = self.person
        done = self.does("run", "--demo")
        url = re.search(r"http://127\.0\.0\.1:(\d+)", done.stdout)
        port = int(url[1])
        eventually(lambda: http_status(port) == 200)
        pid = int(re.search(r"PID (\d+)", done.stdout)[1])
        self.assertIn("Health: ✓ Healthy", person.types("status").stdout)
        self.assertRegex(person.types("list").stdout, rf"(?m)^✓  demo .* running .* {port} ")
        self.assertIn("To see the GUI go to", person.types("logs", "-n", "5").stdout)
        self.does("stop")
        port = free_port()  # of its own: in the moment of a restart 8188 is free for every other suite that runs here
        self.does("run", "--demo", "--port", str(port))
        pid = person.status()["pid"]
        self.does("restart")
        again = person.status()["pid"]
        self.assertNotEqual(again, pid)
        self.assertFalse(alive(pid))
        eventually(lambda: http_status(port) == 200)
        done = person.types("stop")
        self.assertEqual((done.returncode, "✓ ComfyUI stopped" in done.stdout), (0, True), done.stderr)
        self.assertFalse(alive(again))
        self.assertFalse(dock.is_port_bound(port))
        self.assertIsNone(person.state())
        self.assertIn("Stopped server", person.types("logs").stdout)
        self.assertEqual(person.types("status").returncode, 3)
        self.does("stop")

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
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        links = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        self.assertEqual((links["0"], links["1"], links["2"]), ("/dev/null", log, log))
        others = [target for number, target in links.items() if int(number) > 2]
        others.remove(join(os.path.dirname(self.person.state_file()), dock.ALIVE_NAME))
        self.assertEqual(
            [target for target in others if not target.startswith(("socket:", "anon_inode:", "pipe:"))], []
        )
        status = read(f"/proc/{pid}/status")
        ignored = int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16)
        blocked = int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16)
        self.assertFalse(ignored & (1 << (signal.SIGINT - 1)) or ignored & (1 << (signal.SIGTERM - 1)) or blocked)
        eventually(lambda: http_status(self.person.state()["port"]) == 200)
        self.assertEqual([row.pid for row in self.person.processes()], [pid])

    def test_without_a_terminal_nothing_waits_for_input(self):
        self.person.program = installed()
        read, write = os.pipe()
        self.addCleanup(os.close, write)
        self.addCleanup(os.close, read)
        for words in (["run", "--demo", "--port", str(free_port())], ["status"], ["list"], ["restart"], ["logs"],
            ["stop"], []):  # fmt: skip
            with self.subTest(words=words):
                self.assertIn(self.person.types(*words, stdin=read, seconds=30).returncode, (0, 3))


class Running(Journey):
    def test_of_sixteen_at_once_exactly_one_starts(self):
        several = 6 if WINE else 16  # under Wine the last of sixteen would wait longer than a lock is waited for
        port = str(free_port())
        self.person.types("list")
        children = [self.person.starts("run", "--demo", "--port", port) for _ in range(several)]
        codes = [child.wait(60) for child in children]
        said = [read(child.said) for child in children]
        self.assertEqual(sorted(codes), [0] + [1] * (several - 1), said)
        pid = self.person.state()["pid"]
        for code, text in zip(codes, said):
            self.assertNotIn("Traceback", text)
            if code:
                self.assertIn(f"already running (PID {pid}", text)
        self.assertEqual([row.pid for row in self.person.processes()], [pid])

    def test_arguments_that_comfyui_refuses_are_told_at_once_and_change_nothing(self):
        done = self.ends_at_once("--bogus", COMFYDOCK_DEMO_REFUSE="yes")
        self.assertClear(done, 1, "code 2", "main.py: error: unrecognized arguments: --bogus")
        self.assertIsNone(self.person.state())
        self.assertEqual(self.person.processes(), [])

    def test_wait_returns_when_it_answers_and_tells_what_is_then(self):
        done = self.does("run", "--demo", "--port", str(free_port()), "--wait", COMFYDOCK_DEMO_START_SECONDS="0.7")
        self.assertIn("✓ ComfyUI is ready", done.stdout)
        self.assertEqual(self.person.state()["health"]["status"], "healthy")
        data = json.loads(self.does("restart", "--wait", "--json", COMFYDOCK_DEMO_START_SECONDS="0.7").stdout)["data"]
        self.assertEqual((data["ready"], data["health"], data["pid"]), (True, "healthy", self.person.state()["pid"]))

    def test_wait_shows_the_last_lines_when_it_dies_first(self):
        done = self.person.types("run", "--demo", "--port", str(free_port()), "--wait",
            COMFYDOCK_DEMO_START_SECONDS="1", COMFYDOCK_DEMO_EXIT="bind:3")  # fmt: skip
        self.assertClear(done, 1, "ComfyUI ended before it answered", "Starting server")

    def test_wait_gives_up_in_time_and_leaves_it_running(self):
        done = self.person.types(
            "run", "--demo", "--port", str(free_port()), "--wait", "0.5", COMFYDOCK_DEMO_START_SECONDS="60"
        )
        self.assertClear(done, 1, "Not ready after 0.5 s")
        data = self.person.status()
        self.assertEqual((data["state"], data["health"]), ("starting", "starting"))

    def test_variables_are_kept_for_restarts_and_shown_to_nobody(self):
        data = self.run_demo("--set-env", "COMFYDOCK_DEMO_SAY=1234")
        self.does("restart")
        state = self.person.state()
        self.assertEqual(state["env"], {"COMFYDOCK_DEMO_SAY": "1234"})
        eventually(lambda: http_status(data["port"]) == 200)
        self.assertEqual(self.person.log().count("said: 1234"), 2)
        self.assertNotIn(
            "1234", self.person.types("status", "--json").stdout + self.person.types("list", "--json").stdout
        )
        if not WINDOWS:
            self.assertEqual(stat.S_IMODE(os.stat(self.person.state_file()).st_mode), 0o600)

    def test_variables_that_lead_comfyui_astray_are_dropped_and_said_once(self):
        done = self.does("run", "--demo", "--port", str(free_port()), __COMFY_CLI_SESSION__="/tmp/x", PYTHONHOME="")
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
        self.does("run", "-e", "a", "--port", port, COMFYDOCK_DEMO_START_SECONDS="60")
        self.assertFalse(dock.is_port_bound(int(port)))
        self.assertClear(
            person.types("run", "-e", "b", "--port", port), 1, f"Port {port} is already in use by environment 'a'"
        )
        self.does("run", "-e", "b", "--auto-port", "--port", port)

    def test_a_log_over_ten_megabytes_becomes_old_at_start(self):
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        os.makedirs(os.path.dirname(log))
        Path(log).write_bytes(b"earlier\n" * (2 * 1024 * 1024))
        self.start_demo()
        self.assertEqual(os.path.getsize(log + ".old"), 16 * 1024 * 1024)
        self.assertTrue(self.person.log().startswith("=== comfydock session "))
        self.assertTrue(self.person.types("logs", "--all").stdout.startswith("earlier\n"))


class HandingOver(Journey):
    def generated(self, *words, code=0):
        done = self.person.types("generate", *words)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout + done.stderr

    def test_a_folder_is_written_and_what_to_type_is_said(self):
        self.run_demo("--set-env", "TOKEN=se cret")
        for engine, files in {"systemd": ["comfydock-demo.env", "comfydock-demo.service"],
            "dockerfile": ["Dockerfile", "comfydock.py"], "compose": ["compose.yaml", "demo", "demo.env"],
            "kubernetes": ["demo", "demo.yaml"]}.items():  # fmt: skip
            said = self.generated(engine, "demo")
            folder = join(self.person.home, f"comfydock-{engine}")
            self.assertEqual(sorted(os.listdir(folder)), files)
            self.assertIn("enable --now" if engine == "systemd" else "docker", said)
            self.assertNotIn("se cret", said)
            holders = [path for path in Path(folder).rglob("*") if path.is_file() and b"se cret" in path.read_bytes()]
            self.assertEqual([path.suffix for path in holders], [".env"] if ".env" in str(files) else [])
            self.assertTrue(WINDOWS or all(path.stat().st_mode & 0o777 == 0o600 for path in holders))
            self.assertIn("already exists", self.generated(engine, "demo", code=1))

    def test_what_cannot_be_is_said_and_leaves_nothing(self):
        self.run_demo()
        self.assertIn("choose one of", self.generated("nomad", "demo", code=2))
        self.assertIn("choose one of", self.generated("compose", "demo", "--gpu", "amd", code=2))
        self.assertIn("no environment 'x'", self.generated("compose", "x", code=1))
        checkout = self.person.checkout()
        port = str(self.person.state()["port"])
        self.person.environment("two", checkout)
        environment = self.environment_of_person("two")
        dock.write_state(environment.paths.last_run,
            dock.ProcessState(2**22 - 1, "127.0.0.1", int(port), ["--port", port, "--cuda-device", "1"], "", ""))  # fmt: skip
        self.assertIn(f"Port {port}", self.generated("compose", "demo", "two", code=1))
        self.assertEqual([name for name in os.listdir(self.person.home) if name.startswith("comfydock-")], [])
        self.assertIn("Not carried over: the choice of card 1", self.generated("kubernetes", "demo", "two"))

    @needs_git
    def test_changes_that_only_this_machine_has_go_into_no_image_and_paths_are_named(self):
        checkout = self.person.checkout()
        for words in (["init", "-q"], ["remote", "add", "origin", "https://example.invalid/x"], ["add", "main.py"]):
            subprocess.run(["git", *words], cwd=checkout, check=True)
        self.person.environment("two", checkout)
        said = self.generated("dockerfile", "two", code=1)
        self.assertIn("ComfyUI has changes or new commits", said)
        shutil.rmtree(join(checkout, ".git"), onerror=lambda remove, path, _: (os.chmod(path, 0o700), remove(path)))
        write(join(checkout, "models", "x"), "big")
        write(join(checkout, "custom_nodes", "node", "__init__.py"), "")
        write(join(checkout, "custom_nodes", "one.py"), "")
        self.generated("dockerfile", "two")
        made = {str(path.relative_to(self.person.home))
            for path in Path(self.person.home, "comfydock-dockerfile").rglob("*")}  # fmt: skip
        made = {path.replace(os.sep, "/").partition("/")[2] for path in made}
        self.assertLessEqual({"comfyui/custom_nodes/one.py", "custom_nodes/node/__init__.py", "comfyui/main.py"}, made)
        self.assertFalse({"comfyui/models", "comfyui/.venv", "comfyui/custom_nodes/node"} & made)

    @unittest.skipIf(WINDOWS, "the Task Scheduler keeps its tasks where it likes")
    def test_autostart_on_and_off_leaves_no_trace(self):
        self.run_demo("--set-env", "TOKEN=se cret")
        for system, suffix in (("linux", ".service"), ("macos", ".plist")):
            self.person.program = installed(f"comfydock.IS_MACOS = {system == 'macos'}")
            before = tree(self.person.home)
            said = self.person.types("autostart", "on", "demo")
            self.assertEqual(said.returncode, 0, said.stderr)
            new = sorted(set(tree(self.person.home)) - set(before))
            self.assertTrue(any(path.endswith(f"comfydock-demo{suffix}") for path in new), new)
            secret = [
                path
                for path in Path(self.person.home).rglob("comfydock-demo*")
                if path.is_file() and b"se cret" in path.read_bytes()
            ]
            self.assertEqual([path.stat().st_mode & 0o777 for path in secret], [0o600])
            self.assertIn("is on", self.person.types("autostart", "status", "demo").stdout)
            self.assertIn("is off", self.person.types("autostart", "off", "demo").stdout)
            self.assertEqual(tree(self.person.home), before)
            self.assertIn("is off", self.person.types("autostart", "status", "demo").stdout)

    @unittest.skipUnless(WINDOWS and has("schtasks"), "needs the Task Scheduler")
    def test_the_task_scheduler_has_the_task_from_on_to_off(self):
        self.run_demo()
        delete = ["schtasks", "/Delete", "/TN", "comfydock-demo", "/F"]
        for deleter in (delete, self.person.command("autostart", "off", "demo")):
            self.does("autostart", "on", "demo")
            self.assertEqual(subprocess.run(deleter, env=self.person.variables, cwd=self.person.home).returncode, 0)
            self.assertEqual(subprocess.run(delete, stderr=subprocess.DEVNULL).returncode, 1)

    def test_the_words_that_an_engine_is_given_start_it(self):
        self.run_demo()
        self.does("stop")
        it = dock.describe(self.environment_of_person())
        it.program[1:] = [self.person.program]
        if WINDOWS:
            root = xml.etree.ElementTree.fromstring(dock.task_xml(it).encode("utf-16"))
            told = {element.tag.partition("}")[2]: element.text for element in root.iter()}
            words = f'"{told["Command"]}" {told["Arguments"]}'
        else:
            words = plistlib.loads(dock.launchd_plist(it, False).encode())["ProgramArguments"]
        child = subprocess.Popen(words, env=self.person.variables, cwd=self.person.home, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        self.comes_to_be("running")
        self.assertIsNone(child.poll())
        self.does("stop")
        self.assertEqual(child.wait(30), 0)


class Foreground(Journey):
    def foreground(self, *words, **variables):
        child = self.person.starts("run", "--demo", "--foreground", "--port", str(free_port()), *words, **variables)
        read_until(child, "To see the GUI go to" if "COMFYDOCK_DEMO_START_SECONDS" not in variables else "Streaming")
        return child

    def test_ctrl_c_stops_comfyui_and_ends_well(self):
        child = self.foreground()
        dock.signal_process(child.pid, "interrupt")
        self.assertEqual(child.wait(30), 0)
        self.assertIn("Stopped server", read(child.said))
        self.assertEqual(self.person.processes(), [])
        self.assertIsNone(self.person.state())

    def test_a_second_ctrl_c_kills(self):
        child = self.foreground(COMFYDOCK_DEMO_IGNORE="INT,TERM")
        dock.signal_process(child.pid, "interrupt")
        read_until(child, "Stopping ComfyUI")
        began = time.monotonic()
        dock.signal_process(child.pid, "interrupt")
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
        later = 0.6
        cases = [(f"later:3:{later}", 3), (f"later:0:{later}", 0)]
        cases += [] if WINDOWS else [(f"later:segv:{later}", 139)]
        for fault, code in cases:
            with self.subTest(fault=fault):
                child = self.foreground(COMFYDOCK_DEMO_EXIT=fault)
                self.assertEqual(child.wait(30), code)
                self.assertIn("ComfyUI process exited", read(child.said))
                data = self.person.status()
                self.assertEqual(data["state"], "stopped" if code == 0 else "crashed")

    def test_a_stop_from_elsewhere_ends_it_and_is_said(self):
        child = self.foreground()
        self.does("stop")
        self.assertEqual(child.wait(30), 0)
        self.assertIn("stopped from elsewhere", read(child.said))

    def test_a_restart_by_comfyui_manager_is_followed(self):
        child = self.foreground()
        self.manager_restarts(self.person.state()["port"])
        self.assertRaises(subprocess.TimeoutExpired, child.wait, 1)
        dock.signal_process(child.pid, "interrupt")
        self.assertEqual(child.wait(30), 0)
        self.assertEqual((self.person.processes(), self.person.state()), ([], None))

    def test_a_restart_from_elsewhere_is_left_to_it(self):
        child = self.foreground()
        former = self.person.state()["pid"]
        done = self.does("restart", "--json")
        eventually(lambda: read(child.said).count("To see the GUI") == 2)
        self.assertIsNone(child.poll())
        pid = self.person.state()["pid"]
        self.assertEqual(json.loads(done.stdout)["data"]["pid"], pid)
        self.assertNotEqual(pid, former)
        self.assertEqual(dock.process_table().process(pid).ppid, child.pid)
        self.does("stop")
        self.assertEqual(child.wait(30), 0)

    def test_who_stops_it_for_a_while_starts_it_again_and_a_keeper_that_is_gone_hinders_nobody(self):
        child = self.foreground()
        environment = dock.Workspace(self.person.workspace).get_environment("demo")
        self.assertTrue(environment.stop_for_restart())
        self.assertTrue(environment.is_held_back())
        self.assertFalse(dock.until(lambda: child.poll() is not None, 0.6))
        self.assertFalse(environment.is_running())
        self.assertTrue(environment.restart())
        self.assertEqual(environment.observe().process.ppid, child.pid)
        dock.signal_process(child.pid, "kill")
        child.wait(30)
        self.assertTrue(environment.restart())
        self.assertEqual(environment.observe().process.ppid, os.getpid())
        environment.stop()

    def test_there_is_one_keeper_at_a_time(self):
        child = self.foreground()
        self.assertClear(
            self.person.types("run", "--demo", "--monitor"), 1, f"'run --foreground' watches it (PID {child.pid})"
        )

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "engines that want to be told are those of Unix")
    def test_an_engine_is_told_when_it_answers_and_when_it_stops_and_comfyui_does_not_see_its_variables(self):
        for address in (join(temporary_folder(self), "notify"), f"\0comfydock-{os.getpid()}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as engine, self.subTest(address=address):
                engine.bind(address)
                engine.settimeout(20)
                named = {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
                child = self.foreground(COMFYDOCK_DEMO_START_SECONDS="0.5", **named)
                self.assertEqual(engine.recv(100), b"READY=1")
                self.assertEqual(self.person.status()["state"], "running")
                if LINUX:
                    inherited = Path(f"/proc/{self.person.state()['pid']}/environ").read_bytes()
                    self.assertNotRegex(inherited, b"NOTIFY_SOCKET|WATCHDOG")
                dock.signal_process(child.pid, "terminate")
                self.assertEqual(engine.recv(100), b"STOPPING=1")
                self.assertEqual(child.wait(30), 143)

    @unittest.skipIf(WINDOWS, "no SIGHUP on Windows")
    def test_under_nohup_a_hangup_ends_nothing(self):
        deaf = (
            "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.person.prefix = [sys.executable, "-c", deaf]
        child = self.person.starts("run", "--demo", "--foreground", "--port", str(free_port()))
        self.person.prefix = []
        read_until(child, "To see the GUI go to")
        child.send_signal(signal.SIGHUP)
        child.send_signal(signal.SIGTERM)
        self.assertEqual(child.wait(30), 143)

    @unittest.skipUnless(LINUX and has("unshare") and not os.geteuid(), "needs root and unshare for a PID namespace")
    def test_as_pid_1_it_stays_reaps_and_hands_on_sigterm(self):
        command = self.person.command("run", "--demo", "--port", str(free_port()))
        said = join(self.person.home, "said")
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
        rows = dock.process_table().processes(containing=self.person.program)
        inner = next(row for row in rows if row.command[-1] == str(port) and row.command[1] == self.person.program)
        dock.signal_process(inner.pid, "terminate")
        self.assertEqual(child.wait(30), 143)
        self.assertIn("ComfyUI stopped", read(said))


class ComfyUIsOwnParser(Journey):
    """A checkout with the file in which ComfyUI has its parser, asked before anything starts."""

    PARSER = """
        import argparse
        parser = argparse.ArgumentParser()
        for flag in ("--lowvram", "--cpu", "--auto-launch", "--disable-auto-launch"):
            parser.add_argument(flag, action="store_true")
        parser.add_argument("--listen", default="127.0.0.1", nargs="?", const="0.0.0.0,::")
        parser.add_argument("--port", type=int, default=8188)
        for flag in ("--tls-keyfile", "--tls-certfile"):
            parser.add_argument(flag)
        args = parser.parse_args([])
    """

    def setUp(self):
        super().setUp()
        self.folder = self.person.checkout("studio")
        os.makedirs(join(self.folder, "comfy"))
        self.parser = Path(self.folder, "comfy", "cli_args.py")
        self.parser.write_text(textwrap.dedent(self.PARSER), encoding="utf-8")
        self.port = str(free_port())

    def run_here(self, *words):
        python = ["--python", sys.executable] if WINDOWS else []  # there the checkout has none of its own
        return self.person.types("run", "--port", self.port, *python, *words, cwd=self.folder, DISPLAY="")

    def test_a_mistyped_flag_is_told_and_nothing_starts(self):
        for words, hint in (("--lowvarm",), "did you mean --lowvram?"), (("--lowvram", "--cpu", "--xyzzy=1"), None):
            done = self.run_here(*words)
            self.assertClear(done, 2, f"ComfyUI refuses its arguments: unrecognized arguments: {words[-1]}")
            self.assertEqual("did you mean" in done.stderr, hint is not None)
            self.assertIn(hint or "", done.stderr)
        for words, flag in ((("--monitr",), "--monitor"), (("--wiat", "3"), "--wait")):
            self.assertClear(self.run_here(*words), 2, f"unrecognized arguments: {words[0]}", f"did you mean {flag}?")
        self.assertEqual((self.person.state("studio"), self.person.processes()), (None, []))
        self.assertEqual(list(Path(self.folder, "comfy").iterdir()), [self.parser], "no compiled code is left there")

    def test_what_we_add_is_no_part_of_what_was_typed(self):
        self.assertIn("✓ Starting on", self.run_here("--cpu").stdout)
        state = self.person.state("studio")
        self.assertEqual(state["args"], ["--port", self.port, "--cpu"])
        self.assertEqual(state["command"][-2:], ["--cpu", "--disable-auto-launch"])
        self.does("-e", "studio", "restart", "--wait")
        self.assertEqual(self.person.state("studio")["args"], state["args"])
        self.does("-e", "studio", "stop")
        self.assertIn(f"Last time: --port {self.port} --cpu. comfydock restart", self.run_here("--lowvram").stdout)

    def test_a_restart_whose_arguments_are_no_more_stops_nothing(self):
        self.assertEqual(self.run_here("--cpu", "--wait").returncode, 0)
        self.parser.write_text(textwrap.dedent(self.PARSER).replace('"--cpu"', '"--gpu"'), encoding="utf-8")
        self.assertClear(self.person.types("-e", "studio", "restart"), 2, "unrecognized arguments: --cpu")
        self.assertEqual(self.person.status("-e", "studio")["state"], "running")

    @unittest.skipIf(WINDOWS, "needs a desktop that is told from none, which Windows always has")
    def test_a_browser_is_opened_by_us_once_comfyui_answers(self):
        done = self.run_here("--auto-launch")
        self.assertIn(f"Open it in your browser: http://127.0.0.1:{self.port}", done.stdout)
        self.assertIn("--disable-auto-launch", self.person.state("studio")["command"])

    def test_a_parser_that_cannot_be_asked_keeps_nobody_from_starting(self):
        for text in ("import nonsense", "parser = None", "raise SystemExit(3)"):
            self.parser.write_text(text, encoding="utf-8")
            self.assertEqual(self.run_here().returncode, 0)
            self.does("-e", "studio", "stop")


class TellingTheTruth(Journey):
    def test_after_a_crash_status_tells_of_it_and_restart_starts_with_the_same_arguments(self):
        data = self.run_demo("--cpu")
        with open(data["log"], "ab") as log:
            log.write(b"RuntimeError: \033]0;CUDA\007 is gone\nbye\n")
        dock.signal_process(data["pid"], "kill")
        eventually(lambda: not alive(data["pid"]))
        done = self.person.types("status")
        self.assertEqual(done.returncode, 3)
        self.assertRegex(done.stdout, r"Status: Crashed \(\d+s ago\): RuntimeError:  \]0;CUDA  is gone")
        for fragment in ("Last known alive", data["log"]):
            self.assertIn(fragment, done.stdout)
        self.assertRegex(self.person.types("list").stdout, r"(?m)^✗  demo .*  crashed$")
        self.assertIn("To see the GUI", self.person.types("logs").stdout)
        self.does("restart")
        self.assertEqual(self.person.state()["args"], ["--port", str(data["port"]), "--cpu"])

    def test_stop_tells_of_the_crash_that_status_will_no_longer_show(self):
        data = self.run_demo()
        with open(data["log"], "ab") as log:
            log.write(b"RuntimeError: CUDA is gone\n")
        dock.signal_process(data["pid"], "kill")
        eventually(lambda: not alive(data["pid"]))
        said = self.person.types("stop").stdout
        self.assertRegex(said, r"is not running.*\n  It had crashed \(\d+s ago\): RuntimeError: CUDA is gone\n")
        self.assertNotIn("crashed", self.person.types("stop").stdout)

    def test_the_last_error_line_is_found(self):
        words = ("run", "--demo", "--port", str(free_port()), "--wait")
        done = self.person.types(*words, COMFYDOCK_DEMO_EXIT="import:1")
        self.assertEqual(done.returncode, 1)
        self.assertIn("(code 1): ModuleNotFoundError: No module named 'PIL'", done.stderr)
        self.assertEqual(self.person.status()["exit_code"], 1)

    def test_alive_but_not_answering_yet_is_told_apart_from_not_responding(self):
        self.start_demo(COMFYDOCK_DEMO_START_SECONDS="60")
        done = self.person.types("status")
        self.assertIn("Starting (alive, not answering yet)", done.stdout)
        self.assertEqual(done.returncode, 0)
        self.does("stop")
        self.start_demo(COMFYDOCK_DEMO_HANG="1")
        self.comes_to_be("unresponsive")
        self.assertIn("Not responding", self.person.types("status").stdout)

    def test_a_stopped_process_is_alive_but_not_responding_and_can_be_ended(self):
        data = self.run_demo()
        dock.signal_process(data["pid"], "pause")
        self.assertEqual(self.person.status()["state"], "unresponsive")
        self.does("stop")
        self.assertFalse(alive(data["pid"]))

    def test_list_shows_marks_for_all(self):
        for name in ("a", "b"):
            self.person.environment(name)
        self.person.types("use", "b")
        self.run_demo()
        lines = self.person.types("list").stdout.splitlines()
        self.assertEqual(lines[0].split(), ["NAME", "STATE", "QUEUE", "VRAM", "UPTIME", "PORT", "VERSION"])
        self.assertRegex(lines[1], r"^   a  +stopped")
        self.assertRegex(lines[2], r"^   b \(active\)  +stopped")
        self.assertRegex(lines[3], r"^✓  demo \(the built-in demo\)  running +0\+0 +0\.0/8\.0 GB +\d+s +\d+  0\.33\.0$")

    def test_a_narrow_table_loses_columns_and_then_letters(self):
        row = {" ": "✓", "NAME": "a-long-name", "STATE": "running", "QUEUE": "1+2", "VERSION": "0.33.0"}
        for width, line in ((80, "✓  a-long-name  running  1+2    0.33.0"), (32, "✓  a-long-name  running  1+2"),
            (24, "✓  a-long-name  running"), (21, "✓  a-long-n…  running")):  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):  # which takes every sign
                shown = list(dock.table([row], ("VERSION", "QUEUE"), width))
            self.assertEqual(shown[1], line)
            self.assertLessEqual(max(map(len, shown)), width)

    def test_status_tells_versions_device_memory_and_arguments(self):
        data = self.run_demo("--cpu")
        said = self.person.types("status").stdout
        self.assertIn(f"ComfyUI: 0.33.0, Python {sys.version.split()[0]}\n", said)
        self.assertRegex(said, r"Device: \S.*, VRAM 0\.0/8\.0 GB\n")
        self.assertIn(f"Arguments: --port {data['port']} --cpu\n", said)
        told = self.person.status()
        self.assertEqual((told["version"], told["vram"]["total"]), ("0.33.0", 8 << 30))

    def test_json_is_one_object_with_the_promised_keys(self):
        data = self.run_demo()
        for words in (["status"], ["list"], ["restart"], ["stop"]):
            done = self.person.types(*words, "--json")
            whole = json.loads(done.stdout)
            self.assertEqual((whole["schema"], whole["command"], whole["ok"], whole["error"], done.stderr),
                (2, words[0], True, None, ""))  # fmt: skip
            self.assertEqual(list(whole), ["schema", "command", "ok", "environment", "data", "error"])
        done = self.person.types("-e", "nobody", "status", "--json")
        whole = json.loads(done.stdout)
        self.assertEqual((done.returncode, whole["ok"], whole["data"]), (1, False, None))
        self.assertEqual(set(whole["error"]), {"message", "hint", "try", "code"})
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
        state = {**PLANS_STATE, "log_path": join(self.person.home, "x.log"), **changes}
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
        row = dock.process_table().process(child.pid)
        for identity in ({}, {**dock.identity_of(row), "start_ticks": (row.start_ticks or 0) - 1, "created": 1.0}):
            with self.subTest(identity=identity):
                shutil.rmtree(self.person.workspace, ignore_errors=True)
                shutil.rmtree(join(self.person.home, "a"), ignore_errors=True)
                self.write_state(pid=child.pid, identity=identity)
                self.assertEqual(self.person.types("-e", "a", "status").returncode, 3)
                done = self.person.types("-e", "a", "stop")
                self.assertEqual((done.returncode, "not running" in done.stdout), (0, True), done.stderr)
                self.assertIsNone(child.poll())

    @unittest.skipIf(WINDOWS, "needs a system that tells a folder from a file that is closed")
    def test_a_folder_in_place_of_the_state_file_is_set_aside_by_run(self):
        self.person.environment("a")
        os.mkdir(self.person.state_file("a"))
        self.assertClear(self.person.types("status", "a"), 1, "is damaged", "-e a run")
        self.does("-e", "a", "run", "--port", str(free_port()))
        self.assertTrue(os.path.isdir(self.person.state_file("a") + ".damaged"))

    def test_damaged_state_files_are_one_clear_line_and_stay_even_beside_a_new_one(self):
        self.person.environment("a")
        path = Path(self.person.state_file("a"))
        for content in (b"", os.urandom(100), b"[1]",
            *(json.dumps({**PLANS_STATE, "pid": pid}).encode() for pid in (-1, 0, 1))):  # fmt: skip
            with self.subTest(content=content[:20]):
                path.write_bytes(content)
                for command in ("status", "stop", "restart"):
                    self.assertClear(
                        self.person.types("-e", "a", command), 1, "state file of environment 'a' is damaged"
                    )
                    self.assertEqual(path.read_bytes(), content)
        self.does("-e", "a", "run", "--port", str(free_port()))
        self.assertEqual(read_bytes(f"{path}.damaged"), content)

    @unittest.skipUnless(LINUX and has("setpriv") and not os.geteuid(), "needs root and setpriv for a second user")
    def test_a_process_of_another_user_is_named_and_not_signalled(self):
        data = self.run_demo()
        for folder, _, files in os.walk(self.person.home):
            os.chmod(folder, 0o777)
            for name in files:
                os.chmod(join(folder, name), 0o666)
        plain = shutil.which("python3", path="/usr/bin:/bin") or self.skipTest("no python3 that others may run")
        copy = join(self.person.home, "comfydock.py")
        shutil.copy(MODULE, copy)
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", plain, copy, "-e", "demo", "stop"],
                              env=self.person.variables, cwd=self.person.home, capture_output=True, text=True, timeout=60)  # fmt: skip
        self.assertClear(done, 1, f"PID {data['pid']}", "belongs to another user")
        self.assertTrue(alive(data["pid"]))

    def test_who_breaks_off_a_stop_is_told_whether_comfyui_runs(self):
        data = self.run_demo(COMFYDOCK_DEMO_IGNORE="INT,TERM")
        child = self.person.starts("stop", "--timeout", "60")
        read_until(child, "Stopping ComfyUI")
        eventually(lambda: self.person.state()["wanted"] == "stopped")
        dock.signal_process(child.pid, "interrupt")
        self.assertEqual((child.wait(20), alive(data["pid"])), (130, True))
        self.assertIn("Interrupted. ComfyUI keeps running.", read_until(child, "status"))

    def test_what_ignores_every_polite_signal_is_killed_in_time_and_its_children_too(self):
        for child in ("yes", "session"):
            with self.subTest(child=child):
                self.run_demo(COMFYDOCK_DEMO_IGNORE="INT,TERM", COMFYDOCK_DEMO_CHILD=child)
                pid = int(re.search(r"child: (\d+)", self.person.types("logs").stdout)[1])
                self.assertTrue(alive(pid))
                began = time.monotonic()
                self.does("stop", "--timeout", "2")
                self.assertLess(time.monotonic() - began, 9)
                eventually(lambda pid=pid: not alive(pid), 3)
                self.assertEqual(self.person.processes(), [])

    def test_kill_does_not_ask_politely(self):
        self.run_demo()
        self.does("stop", "--kill")
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
        done = self.does("-e", "a", "run", "--take-over", "--port", str(free_port()))

    def test_a_state_from_before_a_reboot_is_not_running(self):
        here = dock.identity_of(dock.process_table().process(os.getpid()))
        if here["boot_id"] is None or not here["machine"]:
            self.skipTest("this system names no boots, or not itself")
        self.write_state(pid=os.getpid(), identity={**here, "boot_id": "before"})
        self.assertIn("the machine was restarted", self.person.types("-e", "a", "status").stdout)
        self.does("-e", "a", "stop")
        self.assertIsNone(self.person.state("a"))


class NobodyGetsLost(Journey):
    def start_by_hand(self, name, **variables):
        """What a starter leaves that was killed between the spawn and the record: a process, and nobody who knows it."""
        checkout = join(self.person.home, name, "ComfyUI")
        command = [sys.executable, join(checkout, "main.py"), "--port", str(free_port())]
        child = subprocess.Popen(command, cwd=checkout, env={**self.person.variables, **variables}, start_new_session=not WINDOWS,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.person.children.append(child)
        eventually(lambda: dock.comfyui_processes(checkout))
        return child

    def intent(self, name, run_id):
        state = {**PLANS_STATE, "pid": None, "phase": "starting", "run_id": run_id,
            "starter": {"pid": 2**22 - 3, "identity": {}}}  # fmt: skip
        Path(self.person.state_file(name)).write_text(json.dumps(state), encoding="utf-8")

    def test_what_an_interrupted_start_left_is_adopted_and_can_be_stopped(self):
        self.person.environment("a")
        child = self.start_by_hand("a", COMFYDOCK_RUN_ID="the-run")
        self.intent("a", "the-run")
        self.assertEqual(self.person.status("-e", "a")["pid"], child.pid)
        self.assertClear(self.person.types("-e", "a", "run"), 1, f"already running (PID {child.pid}")
        self.assertEqual(self.person.state("a")["pid"], child.pid)
        self.does("-e", "a", "stop")
        self.assertIsNotNone(child.wait(10))

    def test_an_interrupted_start_that_left_nothing_is_told_and_started_over(self):
        self.person.environment("a")
        self.intent("a", "the-run")
        self.assertIn("a start was interrupted", self.person.types("-e", "a", "status").stdout)
        self.does("-e", "a", "run", "--port", str(free_port()))

    def test_what_runs_is_not_brought_in_line(self):
        self.run_demo()
        environment = dock.Workspace(self.person.workspace).get_environment("demo")
        self.assertFalse(environment.nodes.is_synced())
        with patch.object(dock.NodeManager, "sync", side_effect=AssertionError):
            self.assertEqual(environment.sync(), dock.SyncReport())

    def test_what_a_stop_that_was_broken_off_has_told_to_end_is_awaited_by_run(self):
        data = self.run_demo(COMFYDOCK_DEMO_STOP_SECONDS="1.5")
        state = dock.read_state(self.person.state_file())
        state.desired_state = "stopped"
        dock.write_state(self.person.state_file(), state)
        dock.signal_process(data["pid"], "interrupt")
        self.assertNotEqual(self.run_demo()["pid"], data["pid"])

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
        done = self.does("-e", "a", "repair", "--orphan")
        self.assertIn(f"PID {child.pid}", done.stdout)
        self.assertIsNone(self.person.state("a"))
        self.does("-e", "a", "repair", "--orphan", "--adopt")
        self.assertEqual(self.person.state("a")["pid"], child.pid)
        self.assertIsNone(self.person.status("-e", "a")["log"])
        self.assertClear(self.person.types("-e", "a", "logs"), 1, f"PID {child.pid} was not started by comfydock")
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

    def test_a_restart_by_comfyui_manager_keeps_it_tracked(self):
        data = self.run_demo()
        self.manager_restarts(data["port"])
        again = self.person.status()
        self.assertEqual((again["state"], again["note"]), ("running", "moved" if WINDOWS else None))
        self.assertEqual(again["pid"] == data["pid"], not WINDOWS, "Windows' exec is another process")
        self.assertIn("No orphaned processes found", self.person.types("repair", "--orphan").stdout)
        self.does("stop")
        self.assertEqual(self.person.processes(), [])


@unittest.skipUnless(LINUX and has("unshare") and not os.geteuid(), "needs root and unshare for namespaces")
class Containers(Journey):
    """What a container does to a program: a PID 1 that is no init, no ps, no /proc, a home that cannot be written."""

    def inside(self, *words, options=("--pid", "--mount-proc", "--kill-child"), **variables):
        """Run a command as PID 1 of namespaces of its own, to its end."""
        return subprocess.run(
            ["unshare", "--fork", *options, *words], cwd=self.person.home, env={**self.person.variables, **variables},
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=90,
        )  # fmt: skip

    def test_below_a_pid_1_that_is_no_init_it_warns_and_knows_the_dead_from_the_living(self):
        first = """
import json, os, signal, subprocess, sys, time
def comfydock(*words):
    done = subprocess.run([*sys.argv[1:], *words], capture_output=True, text=True)
    return [done.returncode, done.stdout, done.stderr]
facts = {"run": comfydock("run", "--demo", "--wait", "--json", "--port", sys.argv.pop(1))}
pid = json.loads(facts["run"][1])["data"]["pid"]
os.kill(pid, signal.SIGKILL)
time.sleep(0.2)
facts["letter"] = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
facts["status"] = comfydock("status", "--json")
facts["again"] = comfydock("restart", "--json")
facts["stop"] = comfydock("stop", "--json")
facts["end"] = comfydock("status", "--json")
print(json.dumps(facts))
"""
        done = self.inside(sys.executable, "-c", first, str(free_port()), *self.person.command())
        self.assertEqual(done.returncode, 0, done.stderr)
        facts = json.loads(done.stdout)
        self.assertIn("does not reap zombies; start the container with --init.", facts["run"][2])
        self.assertIn("--init", facts["run"][2])
        self.assertEqual(facts["letter"], "Z", "the zombie that nobody reaps")
        self.assertEqual(json.loads(facts["status"][1])["data"]["state"], "crashed")
        self.assertEqual([facts[name][0] for name in ("again", "stop", "end")], [0, 0, 3], facts)

    def test_who_reaps_is_read_from_its_signals(self):
        status = "Name:\t{}\nThreads:\t{}\nSigBlk:\t{:016x}\nSigIgn:\t{:016x}\nSigCgt:\t{:016x}\n"
        cases = (
            ("sleep", 1, 0, 0, 0, False), ("python3", 1, 0, 1 << 12, 0x4002, False), ("systemd", 1, 0x10000, 0, 0, True),
            ("node", 7, 0, 0, 0, True), ("s6-svscan", 1, 0, 0, 0x10000, True), ("init", 1, 0, 0, 0, True),
            ("x", 1, 0, 0x10000, 0, True), ("bash", 1, 0, 0, 0, True),
        )  # fmt: skip
        for *facts, reaps in cases:
            self.assertEqual(dock.non_reaping_init(status.format(*facts)) is None, reaps, facts)
        self.assertIsNone(dock.non_reaping_init(""), "no /proc, no warning")

    def test_without_ps_and_without_psutil(self):
        empty = join(self.person.home, "no programs")
        os.makedirs(empty)
        self.does("run", "--demo", "--wait", "--port", str(free_port()), PATH=empty)
        self.assertIn("Healthy", self.person.types("status", PATH=empty).stdout)
        self.does("stop", PATH=empty)

    def test_without_proc_and_ps_there_is_one_clear_line(self):
        command = self.person.command("run", "--demo")
        hidden = ["sh", "-c", 'mount -t tmpfs none /proc && PATH=/nowhere exec "$@"', "sh", *command]
        done = self.inside(*hidden, options=("--mount",))
        self.assertClear(done, 1, "running processes cannot be seen", "pip install psutil")

    def test_a_home_that_cannot_be_written_needs_comfydock_home(self):
        data = temporary_folder(self)
        script = f"mount --bind '{self.person.home}' '{self.person.home}' && mount -o remount,ro,bind '{self.person.home}' && exec \"$@\""
        words = ["sh", "-c", script, "sh", *self.person.command()]
        self.assertClear(self.inside(*words, "run", "--demo", options=("--mount",)), 1, self.person.home, "ead-only")
        self.addCleanup(self.person.types, "stop", COMFYDOCK_HOME=data)
        for command in (["run", "--demo", "--wait"], ["status"], ["logs", "-n", "1"], ["stop"]):
            done = self.inside(*words, *command, options=("--mount",), COMFYDOCK_HOME=data)
            self.assertEqual(done.returncode, 0, done.stderr)


class AliveOrDead(Journey):
    """One workspace, seen from several PID namespaces: the lock that ComfyUI holds tells the living from the dead."""

    def setUp(self):
        super().setUp()
        if not namespaces_work():
            self.skipTest("needs root, unshare and nsenter for other PID namespaces")

    def container(self):
        """Start ComfyUI as `run --demo` in a container of its own, which lives until it is killed."""
        port = str(free_port())
        words = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child=KILL",
            *self.person.command("run", "--demo", "--port", port)]  # fmt: skip
        said = open(join(self.person.home, f"said-{port}"), "w+")
        self.addCleanup(said.close)
        child = subprocess.Popen(
            words, cwd=self.person.home, env=self.person.variables, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        self.addCleanup(lambda: (child.kill(), child.wait()))
        self.assertTrue(eventually(lambda: http_status(int(port)) == 200 or child.poll(), 30) is True, read(said.name))
        return child, int(port)

    def end(self, child, port):
        child.kill()
        child.wait()
        self.assertTrue(eventually(lambda: http_status(port) != 200))

    def test_a_container_that_was_killed_comes_back_and_one_that_lives_is_never_doubled(self):
        for number in range(20 if "--long" in sys.argv else 3):
            child, port = self.container()
            self.assertEqual(self.person.status("-e", "demo")["state"], "foreign")
            self.assertClear(self.person.types("run", "--demo", "--port", str(free_port())), 1, "in another container")
            if number == 1:  # as a version without the lock has it
                recorded = {**self.person.state(), "alive": None}
                Path(self.person.state_file()).write_text(json.dumps(recorded), encoding="utf-8")
                self.assertClear(self.person.types("run", "--demo"), 1, "in another container")
                self.end(child, port)
                self.does("run", "--demo", "--take-over", "--port", str(free_port()))
                self.does("-e", "demo", "stop")
                continue
            self.end(child, port)
            self.assertEqual(self.person.status("-e", "demo")["state"], "crashed")
        self.run_demo()

    def test_one_that_lives_here_is_never_doubled_whatever_became_of_the_lock(self):
        for what in ("closed", "git clean", "no lock recorded"):
            with self.subTest(what=what):
                checkout = self.person.checkout(parent=what)
                main = Path(checkout, "main.py")
                if what == "closed":
                    main.write_text(
                        "import os, sys\nos.closerange(3, 99)\n" + main.read_text(encoding="utf-8"), encoding="utf-8"
                    )
                name = what.replace(" ", "-")
                self.person.environment(name, checkout)
                self.does("-e", name, "run", "--port", str(free_port()))
                path = self.person.state_file(name)
                pid = self.person.state(name)["pid"]
                if what == "git clean":
                    for file in (path, join(os.path.dirname(path), dock.ALIVE_NAME)):
                        os.unlink(file)
                if what == "no lock recorded":
                    Path(path).write_text(json.dumps({**self.person.state(name), "alive": None}), encoding="utf-8")
                self.assertClear(self.person.types("-e", name, "run"), 1, f"already running (PID {pid}")
                self.does("-e", name, "stop")
                self.assertFalse(alive(pid))

    def test_what_a_free_lock_proves_depends_on_who_could_hold_it(self):
        path = join(self.person.home, "alive")
        Path(path).write_text("", encoding="utf-8")
        record = dock.ProcessState.from_dict({**PLANS_STATE, "alive": {"dev": 1, "ino": os.stat(path).st_ino}})
        here = dock.identity_of(None)
        here["machine"] = "m"
        places = {"here": {}, "beside": {"pid_ns": "1"}, "rebooted": {"boot_id": "x"},
            "foreign": {"boot_id": "x", "host": "x"}}  # fmt: skip
        for kind in ("ext4", "nfs4"):
            for place, other in places.items():
                record.identity = {**here, **other}
                for held in (False, True):
                    with (self.subTest(kind=kind, place=place, held=held),
                        patch.object(dock, "this_machine", return_value={**dock.this_machine(), "machine": "m"}),
                        patch.object(dock, "mounts", lambda kind=kind: [("/", "tmpfs"), ("/", kind)]),
                        dock.take_lock(path) if held else contextlib.nullcontext()):  # fmt: skip
                        unknown = place == "foreign" and kind == "nfs4"
                        self.assertEqual(dock.lives_elsewhere(record, path), place != "here" and (held or unknown))
        record.identity = {**here, **places["foreign"]}
        for alive_, error in ((None, None), ({"ino": 1}, None), (record.alive, OSError(errno.ENOLCK, "No locks"))):
            record.alive = alive_
            with patch.object(dock, "lock_handle", side_effect=error, return_value=True):
                self.assertTrue(dock.lives_elsewhere(record, path))

    def test_forks_that_survive_hold_the_lock_and_are_ended_with_it(self):
        checkout = self.person.checkout()
        main = Path(checkout, "main.py")
        fork = "import os\nif os.fork() == 0:\n    os.setsid()\n    os.execve('/bin/sleep', ['sleep', '600'], {})\n"
        main.write_text(fork + main.read_text(encoding="utf-8"), encoding="utf-8")
        self.person.environment("a", checkout)
        self.does("-e", "a", "run", "--port", str(free_port()))
        state = self.person.state("a")
        dock.signal_process(state["pid"], "kill")
        eventually(lambda: not alive(state["pid"]))
        seen = self.person.status("-e", "a")
        self.assertEqual((seen["state"], [one["command"] for one in seen["relics"]]), ("crashed", ["sleep 600"]))
        self.does("-e", "a", "run", "--port", str(free_port()))
        self.assertFalse(alive(seen["relics"][0]["pid"]))


class WhatUsersMet(Journey):
    @needs_links
    def test_the_demo_can_be_repaired(self):
        self.start_demo()
        node = join(self.person.home, "work", "my node")
        os.makedirs(node)
        self.does("-e", "demo", "node", "add", "--dev", node)
        shutil.rmtree(node)
        done = self.person.types("-e", "demo", "repair", "-y", "--json")
        said = json.loads(done.stdout)
        self.assertEqual((done.returncode, said["ok"], said["error"]["code"]), (1, False, "repair"), done.stderr)
        self.assertIn(f"node remove {dock.quote('my node')}", said["error"]["message"])

    @needs_links
    def test_a_node_is_the_folder_one_stands_in_but_not_what_holds_all_nodes(self):
        self.start_demo()
        node = join(self.person.home, "my-node")
        os.makedirs(node)
        self.does("-e", "demo", "node", "add", "--dev", ".", cwd=node)
        listed = json.loads(self.person.types("-e", "demo", "node", "list", "--json").stdout)["data"]["nodes"]
        self.assertEqual([item["name"] for item in listed], ["my-node"])
        nodes = join(self.person.workspace, "environments", "demo", "ComfyUI", "custom_nodes")
        for folder in (nodes, os.path.dirname(nodes)):
            done = self.person.types("-e", "demo", "node", "add", "--dev", folder)
            self.assertEqual((done.returncode, "holds custom_nodes itself" in done.stderr), (1, True), done.stderr)

    def test_in_json_what_is_not_ok_has_an_error(self):
        self.start_demo()
        said = json.loads(self.person.types("-e", "demo", "node", "remove", "nothing", "--json").stdout)
        self.assertEqual(
            (said["ok"], said["error"]["code"], said["data"]["nodes"][0]["ok"]), (False, "not-found", False)
        )

    def test_a_script_that_waits_in_vain_learns_what_was_started(self):
        words = ("run", "--demo", "--wait", "0.2", "--json", "--port", str(free_port()))
        done = self.person.types(*words, COMFYDOCK_DEMO_HANG="yes")
        said = json.loads(done.stdout)
        self.assertEqual((done.returncode, said["ok"], said["error"]["code"]), (1, False, "timeout"), done.stderr)
        self.assertEqual((said["data"]["pid"], said["data"]["ready"]), (self.person.state()["pid"], False))
        self.assertGreaterEqual(said["data"]["waited"], 0.2)

    def test_the_hint_for_a_port_that_is_none_means_the_same_environment(self):
        self.person.environment("up")
        for words, option in (("run", "up"), "up"), (("-e", "up", "run"), "up"), (("run", "--demo"), "demo"):
            done = self.person.types(*words, "--port", "99999")
            self.assertClear(done, 2, f"-e {option} run --port 8188")

    def test_a_port_that_is_none_makes_nothing(self):
        for words in (("--demo", "--port", "0"), ("--port", "70000")):
            self.assertClear(self.person.types("run", *words, cwd=self.person.checkout(parent=words[-1])), 2, "port")
        self.assertFalse(os.path.exists(self.person.workspace))

    def test_nothing_that_belongs_to_another_option_is_ignored(self):
        for words in (("logs", "--path", "--rotate"), ("logs", "--rotate", "-f"), ("logs", "--rotate", "-n", "0")):
            self.assertClear(self.person.types(*words), 2, "cannot be combined")
        for number in ("-1", "1e9", "nan"):
            self.assertClear(self.person.types("run", "--demo", "--wait", number), 2, "--wait takes SECONDS")
        self.assertClear(self.person.types("node"), 2, "needs one of: add, ", "help node")
        self.does("node", "--help")
        self.assertClear(self.person.types("init", ""), 2, "needs a folder")

    @needs_git
    def test_an_update_that_nobody_may_agree_to_is_not_done(self):
        self.start_demo("--no-sync")
        repository = join(self.person.home, "pack")
        os.makedirs(repository)
        git(repository, "init", "--quiet", "-b", "main")
        commit(repository, {"__init__.py": "1"})
        self.does("-e", "demo", "node", "add", repository)
        commit(repository, {"__init__.py": "2"})
        done = self.person.types("-e", "demo", "node", "update", "pack", "--force")
        self.assertEqual(done.returncode, 1)
        self.assertIn("node update pack -y --force", done.stderr)

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_a_repair_in_which_nothing_was_wanted_restarts_nothing(self):
        data = self.run_demo()
        os.makedirs(join(self.person.workspace, "environments", "demo", "ComfyUI", "custom_nodes", "pack"))
        code, said = self.person.at_a_terminal("repair", answers=[b"y\n", b"n\n", b"y\n"])
        self.assertIn("Nothing was changed.", said)
        self.assertNotIn("Restart", said)
        self.assertEqual((code, self.person.status()["pid"]), (1, data["pid"]))

    def test_a_stop_between_two_starts_of_the_monitor_says_what_it_did(self):
        longer = "lambda question, seconds, *pause: until(question, 60 if seconds == 1.0 else seconds, *pause)"
        itself = "comfydock.own_command = lambda: [sys.executable, __file__]"  # the monitor is started so, too
        self.person.program = installed("until = comfydock.until", f"comfydock.until = {longer}", itself)
        self.start_demo("--monitor", COMFYDOCK_DEMO_EXIT="later:3:0.1")
        eventually(lambda: self.environment_of_person().observe().state == "crashed", 60)
        self.assertIn("its monitor will not start it again", self.person.types("stop").stdout)
        self.assertIn("is not running", self.person.types("stop").stdout)

    def test_an_environment_that_may_not_be_looked_at_is_not_called_stopped(self):
        self.start_demo()
        environment = self.environment_of_person()
        with patch.object(dock.Environment, "observe", side_effect=PermissionError(errno.EACCES, "no")):
            listed = dock.Workspace(self.person.workspace).reports()
        self.assertEqual([item["state"] for item in listed], [dock.UNKNOWN])
        self.assertIn("unknown, unreadable record", dock.list_row(listed[0])["STATE"])
        self.assertTrue(environment.is_running())

    def test_a_log_that_was_removed_meanwhile_is_begun_anew_by_a_restart(self):
        self.start_demo()
        shutil.rmtree(join(self.person.workspace, "logs")) if not WINDOWS else self.skipTest("files in use stay")
        self.assertClear(self.person.types("logs"), 1, "No log file found.", "restart")

    def test_the_queue_of_what_listens_on_our_port_is_asked_at_once(self):
        if not shows_listeners():
            self.skipTest("this system does not tell who listens on a port")
        self.run_demo()
        with patch.object(dock, "look_at", side_effect=AssertionError("asked twice")):
            self.assertEqual(self.environment_of_person().queue(), (0, 0))

    def test_a_missing_comfyui_is_all_that_status_says_of_repairs(self):
        self.person.environment("a")
        os.rename(join(self.person.home, "a"), join(self.person.home, "b"))
        done = self.person.types("status")
        self.assertIn("Its ComfyUI is missing", done.stdout)
        self.assertNotIn("needs repair", done.stdout)
        self.assertIn("stopped, ComfyUI is missing", self.person.types("list").stdout)

    def test_the_name_of_a_new_environment_is_no_option(self):
        for command in ("create", "use", "delete"):
            self.assertClear(self.person.types(command, "x", "-e", "y"), 2, "takes the name without -e")

    def test_a_workspace_in_the_home_folder_may_be_named_with_a_tilde(self):
        self.does("init", "--workspace=~/other")
        self.assertTrue(os.path.isdir(join(self.person.home, "other", ".metadata")))

    def test_a_start_that_was_refused_does_not_change_the_story_of_the_crash_before(self):
        data = self.run_demo()
        with open(data["log"], "a", encoding="utf-8") as log:
            log.write("Traceback (most recent call last):\n  x\nValueError: the real reason\n")
        dock.signal_process(data["pid"], "kill")
        eventually(lambda: not alive(data["pid"]))
        before = self.person.status()
        self.assertEqual(before["last_error"], "ValueError: the real reason")
        self.assertEqual(self.ends_at_once("--bogus", COMFYDOCK_DEMO_REFUSE="yes").returncode, 1)
        after = self.person.status()
        self.assertEqual((after["state"], after["last_error"]), (dock.CRASHED, before["last_error"]))
        self.assertLessEqual(after["last_alive"], before["last_alive"])

    @unittest.skipIf(WINDOWS, "whoever starts a monitor there is not told by a marker")
    def test_a_monitor_belongs_to_no_family_of_the_shell_it_was_typed_in(self):
        self.run_demo("--monitor", COMFYDOCK_RUN_ID="another")
        monitor = dock.process_table().process(self.person.state()["monitor"]["pid"])
        self.assertNotEqual(dock.process_table().marker(monitor.pid), "another")

    def test_a_monitored_start_that_fails_shows_the_last_lines(self):
        done = self.ends_at_once("--monitor", "--wait", "--bogus", COMFYDOCK_DEMO_REFUSE="yes")
        self.assertEqual(done.returncode, 1)
        self.assertIn("unrecognized arguments: --bogus", done.stderr.partition("comfydock: ")[0])

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_comfyui_is_not_made_to_hold_back_what_it_says(self):
        data = self.start_demo(PYTHONUNBUFFERED="1")
        self.assertNotIn(b"PYTHONUNBUFFERED=", Path(f"/proc/{data['pid']}/environ").read_bytes())

    def test_another_comfyui_on_our_port_is_not_taken_for_ours(self):
        checkout = self.person.checkout()
        data = self.start_demo(COMFYDOCK_DEMO_START_SECONDS="60")
        for script in ("main.py", join(checkout, "main.py")):
            body = {"system": {"argv": [script, "--port", str(data["port"])]}, "devices": []}
            text = json.dumps(body).encode()
            answer = saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            with self.subTest(script=script), listening(data["port"], answer):
                told = self.person.status()
                self.assertEqual(
                    (told["state"], told["health"], told["queue"]), (dock.STARTING, dock.OTHER_SERVICE, None)
                )
                self.assertIn("Another program answers on port", self.person.types("status").stdout)
                self.assertIsNone(self.environment_of_person().queue())

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_nodes_from_before_an_adoption_are_offered_for_tracking(self):
        checkout = self.person.checkout()
        os.makedirs(join(checkout, "custom_nodes", "pack"))
        self.person.environment("a", checkout)
        for answer, tracked in ((b"\n", []), (b"y\n", ["pack"])):
            code, said = self.person.at_a_terminal("repair", answers=[answer])
            self.assertIn("1 custom nodes are from before the adoption (pack)", said)
            nodes = json.loads(self.person.types("node", "list", "--json").stdout)["data"]["nodes"]
            self.assertEqual((code, [item["name"] for item in nodes]), (0, tracked), said)
            self.assertEqual("No changes to apply" in said, not tracked)

    def test_as_pid_1_what_is_for_the_background_is_refused(self):
        words = [("--json",), ("--monitor",), ("--wait",)]
        with patch.object(os, "getpid", return_value=1):
            for flags in [*words, ("--wait", "0"), ("--all",)]:
                error = error_of(dock.parse, ["run", *flags])
                self.assertEqual((error.code, error.message[:15]), ("usage", "As PID 1 'run' "), flags)

    def test_a_checkout_is_adopted_once(self):
        self.person.environment("a")
        again = self.person.types("create", "b", "--from", join(self.person.home, "a", "ComfyUI"))
        self.assertClear(again, 1, "is environment 'a' already")

    def test_an_environment_that_was_never_finished_does_not_make_one_choose(self):
        self.start_demo()
        self.assertEqual(self.person.types("create", "x", "--source", "/nope.zip", "--no-install").returncode, 1)
        self.does("status")

    def test_paths_in_hints_are_left_as_they_are_and_quoted_where_they_must_be(self):
        place = join(self.person.home, "my comfydock list", ".comfydock")
        done = self.person.types("init", place)
        self.assertIn(f"--workspace {dock.quote(place)} list", done.stdout)

    @unittest.skipIf(WINDOWS, "no modes of files on Windows")
    def test_a_rotated_log_is_its_owners_to_read(self):
        self.run_demo()
        self.does("logs", "--rotate")
        old = join(self.person.workspace, "logs", "demo", "comfyui.log.old")
        self.assertEqual(stat.S_IMODE(os.stat(old).st_mode), 0o600)

    @unittest.skipIf(WINDOWS, "a pipe does not tell there that its reader has gone")
    def test_who_shows_a_log_ends_with_its_reader_though_nothing_is_written(self):
        for words in (("run", "--demo", "-f", "--port", str(free_port())), ("logs", "-f")):
            command = self.person.command(*words)
            child = subprocess.Popen(command, cwd=self.person.home, env=self.person.variables, stdout=subprocess.PIPE)
            self.person.children.append(child)
            while words[0] == "run" and b"Streaming logs" not in child.stdout.readline():
                pass
            child.stdout.read(1)
            child.stdout.close()
            self.assertEqual(child.wait(20), 0)
            self.assertTrue(alive(self.person.state()["pid"]))

    def test_restart_while_the_monitor_waits_to_start_it_again(self):
        data = self.run_demo("--monitor")
        dock.signal_process(data["pid"], "kill")
        eventually(lambda: not alive(data["pid"]))
        self.does("restart")
        self.assertNotEqual(self.person.state()["pid"], data["pid"])
        self.assertTrue(alive(self.person.state()["monitor"]["pid"]))


class Logs(Journey):
    @staticmethod
    def noise():
        return b"bad \xff\xfe bytes\n" + b"x" * 200000 + b"\n\r 0%\r 50%\r100%\nlast line\n"

    def test_invalid_bytes_long_lines_and_progress_bars_pass_through(self):
        self.run_demo()
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        with open(log, "ab") as file:
            file.write(self.noise())
        command = self.person.command("logs")
        whole = subprocess.run(
            command, env=self.person.variables, cwd=self.person.home, capture_output=True, timeout=30
        )
        self.assertTrue(whole.stdout.replace(b"\r\n", b"\n").endswith(self.noise()) or WINDOWS)
        self.assertEqual((whole.returncode, whole.stderr), (0, b""))
        self.assertEqual(self.person.types("logs", "-n", "1").stdout, "last line\n")

    def test_colours_reach_only_who_wants_them_and_raw_is_every_byte(self):
        data = self.run_demo()
        whole = read_bytes(data["log"])[self.person.state()["log_offset"] :].decode().replace("\r\n", "\n")
        self.assertIn("\x1b[32m[INFO]\x1b[0m To see the GUI go to", whole)
        plain = re.sub(r"\x1b\[\d+m", "", whole)
        for words, shown in (([], plain), (["--color", "never"], plain), (["--raw"], whole),
            (["--color", "always"], whole)):  # fmt: skip
            with self.subTest(words=words):
                self.assertEqual(self.person.types("logs", *words).stdout, shown)
        if not WINDOWS:
            for words, has_colours in (([], True), (["--color", "never"], False), (["--raw"], True)):
                with self.subTest(terminal=words):
                    self.assertEqual("\x1b[32m[INFO]" in self.person.at_a_terminal("logs", *words)[1], has_colours)
            self.person.variables["NO_COLOR"] = "1"
            self.assertNotIn("\x1b[32m", self.person.at_a_terminal("logs")[1])

    def test_a_colour_that_is_cut_in_two_is_left_out_all_the_same(self):
        whole = b"\x1b[1m\x1b[31m[ERROR]\x1b[0m no\n\x1b[2K\x1b[A100%|\n"
        for size in range(1, len(whole)):
            sink = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            console = dock.Console(sink, None, None)
            for start in range(0, len(whole), size):
                console.log(whole[start : start + size])
            self.assertEqual(sink.buffer.getvalue(), b"[ERROR] no\n\x1b[2K\x1b[A100%|\n")

    def test_follow_shows_the_noise_of_a_living_server_and_goes_on_through_a_restart(self):
        self.run_demo(COMFYDOCK_DEMO_NOISE="1")
        child = self.person.starts("logs", "-f", "-n", "3")
        read_until(child, "To see the GUI")
        self.does("restart")
        eventually(lambda: Path(child.said).read_text(encoding="utf-8", errors="replace").count("To see the GUI") == 2)
        self.does("stop")
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
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        with open(log, "ab") as file:
            file.write(b"line\n" * 100000)
        child = subprocess.Popen(self.person.command("logs"), env=self.person.variables, cwd=self.person.home,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        child.stdout.readline()
        child.stdout.close()
        self.assertEqual((child.wait(20), child.stderr.read()), (0, b""))
        child.stderr.close()


class WhichEnvironment(Journey):
    def test_a_checkout_is_adopted_where_it_stands(self):
        person = self.person
        checkout = person.checkout()
        inside = join(checkout, "custom_nodes")
        before = sorted(os.listdir(checkout))
        self.assertClear(person.types("status", cwd=inside), 1, "No environment has adopted")
        if WINDOWS:
            done = self.does("create", "code", "--from", checkout, "--python", sys.executable)
        done = self.does("run", "--port", str(free_port()), cwd=inside)
        if not WINDOWS:
            self.assertIn("Adopted", done.stdout)
        self.assertEqual(sorted(os.listdir(checkout)), before)
        state = person.state("code")
        self.assertEqual(state["command"][1], join(checkout, "main.py"))
        self.assertIn("Environment: code", person.types("status", cwd=checkout).stdout)
        self.does("stop", cwd=checkout)

    def test_the_python_of_a_checkout_is_found_and_gets_its_environment(self):
        person, port = self.person, free_port()
        checkout = person.checkout()
        venv = join(checkout, ".venv")
        if WINDOWS:  # where python.exe of a venv starts the real one and waits: two processes for one
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        self.does("run", "--wait", "--port", str(port), cwd=checkout)
        state = person.state("code")
        self.assertEqual(state["command"][0], dock.venv_python(venv))
        if LINUX:
            environ = Path(f"/proc/{state['pid']}/environ").read_bytes().split(b"\0")
            self.assertIn(f"VIRTUAL_ENV={venv}".encode(), environ)
        if WINDOWS:
            self.assertEqual(dock.process_facts(state["pid"]).environment["VIRTUAL_ENV"], venv)
        self.manager_restarts(port, "code")
        self.assertEqual(person.status()["pid"] == state["pid"], not WINDOWS)
        self.assertEqual(len(person.processes()), 2 if WINDOWS else 1)
        self.does("stop")
        self.assertEqual(person.processes(), [])
        self.assertIn("Stopped server", person.log("code"))

    def test_by_name_by_folder_the_active_one_the_only_one(self):
        person = self.person
        self.assertClear(person.types("status"), 1, "There is no environment", "run --demo")
        for done in (person.types("list").stdout, person.types("run").stderr):
            ways = [line.split("  ")[-1] for line in done.splitlines() if line.startswith("  ")]
            self.assertEqual(ways[0], "in your ComfyUI folder: adopts and starts it")
            self.assertEqual(len(ways), 3, done)
        person.environment("a")
        self.assertIn("Environment: a", person.types("status").stdout)
        person.environment("b")
        self.assertClear(person.types("status"), 1, "Which environment?", "a, b")
        self.does("use", "b")
        self.assertIn("Environment: b", person.types("status").stdout)
        self.assertIn("Environment: a", person.types("-e", "a", "status").stdout)
        self.assertIn("Environment: a", person.types("status", "--env=a").stdout)
        inside = join(person.workspace, "environments", "a", ".cec")
        self.assertIn("Environment: a", person.types("status", cwd=inside).stdout)
        self.assertIn("Environment: a", person.types("status", cwd=join(person.home, "a", "ComfyUI")).stdout)
        self.assertClear(person.types("-e", "bb", "status"), 1, "There is no environment 'bb'", "did you mean 'b'")

    def test_another_workspace_can_be_named(self):
        other = join(self.person.home, "elsewhere")
        self.does("--workspace", other, "run", "--demo", "--port", str(free_port()))
        self.assertFalse(os.path.exists(self.person.workspace))
        self.does("stop", COMFYDOCK_HOME=other)

    def test_who_deletes_what_is_not_there_is_not_told_to_create_it(self):
        self.assertClear(
            self.person.types("delete", "main", "-y"), 1, "There is no environment 'main'", "comfydock list"
        )

    @unittest.skipIf(WINDOWS, "links to a Python")
    def test_the_hint_for_a_checkout_without_a_python_keeps_the_words_that_were_typed(self):
        checkout, empty = self.person.checkout(), join(self.person.home, "empty")
        shutil.rmtree(join(checkout, ".venv"))
        os.mkdir(empty)
        done = self.person.types("run", "--port", "8477", "--lowvram", "--auto-port", cwd=checkout, PATH=empty)
        self.assertClear(done, 1, "No Python was found", "run --python ", " --port 8477 --lowvram --auto-port\n")

    def test_a_workspace_that_does_not_exist_is_no_empty_one(self):
        nowhere = join(self.person.home, "nowhere")
        self.assertClear(self.person.types("--workspace", nowhere, "list"), 1, f"{nowhere} does not exist.")
        self.assertFalse(os.path.exists(nowhere))

    def test_a_comfyui_one_level_down_is_found_but_a_chosen_environment_comes_first(self):
        person = self.person
        person.checkout(parent="portable")
        root = join(person.home, "portable")
        python = ["--python", sys.executable] if WINDOWS else []  # there the checkout has none of its own
        done = person.types("run", "--port", str(free_port()), *python, cwd=root)
        self.assertIn("Adopted", done.stdout, done.stderr)
        self.assertIn("Environment: portable", person.types("status", cwd=root).stdout)
        self.assertIn("ComfyUI stopped", person.types("stop", cwd=root).stdout)
        person.environment("chosen")
        person.types("use", "chosen")
        self.assertIn("Environment: chosen", person.types("status", cwd=root).stdout)
        os.mkdir(join(root, "python_embeded"))
        self.assertIn("Environment: portable", person.types("status", cwd=root).stdout)

    def test_the_demo_is_started_by_its_name_alone_and_is_never_active(self):
        person = self.person
        self.does("run", "-e", "demo")
        self.assertIn("Environment: demo", person.types("status").stdout)
        self.does("stop")
        self.assertClear(person.types("run"), 1, "There is no environment but the demo", "create main", "run --demo")
        self.assertClear(person.types("open"), 1, "-e demo run")
        self.assertClear(person.types("use", "demo"), 1, "never the active environment")
        person.environment("mine")
        self.assertIn("Environment: mine", person.types("status").stdout)
        inside = join(person.workspace, "environments", "demo")
        self.assertIn("Environment: demo", person.types("status", cwd=inside).stdout)
        self.assertIn("environment: mine", person.types("run", "--port", str(free_port()), cwd=inside).stdout)

    @needs_links
    def test_an_environment_is_the_same_from_wherever_one_stands(self):
        person = self.person
        person.environment("a")
        root = join(person.workspace, "environments", "a")
        elsewhere = join(person.home, "disk", "a")
        os.makedirs(os.path.dirname(elsewhere))
        os.rename(root, elsewhere)
        os.symlink(elsewhere, root)
        os.symlink(join(person.home, "a", "ComfyUI"), join(person.home, "link"))
        person.environment("b")
        for folder in (root, elsewhere, join(person.home, "link", "custom_nodes")):
            self.assertIn("Environment: a", person.types("status", cwd=folder).stdout, folder)

    def test_run_takes_another_python_for_an_adopted_folder(self):
        person = self.person
        checkout = person.checkout()
        shutil.rmtree(join(checkout, ".venv"))
        self.does("run", "--python", sys.executable, "--port", str(free_port()), cwd=checkout)
        self.assertEqual(dock.Workspace(person.workspace).get_environment("code").python, sys.executable)
        self.assertClear(person.types("run", "--python", "/nowhere", cwd=checkout), 1,
            f"There is no Python at {'' if WINDOWS else '/nowhere'}", "not a version")  # fmt: skip

    @unittest.skipIf(WINDOWS, "there the folder of a lock that is held cannot be deleted")
    def test_who_waits_while_an_environment_is_deleted_starts_nothing(self):
        person = self.person
        person.environment("a")
        environment = dock.Workspace(person.workspace).get_environment("a")
        with environment._process_lock("delete"):
            waiting = person.starts("-e", "a", "run", "--no-sync", "--port", str(free_port()))
            eventually(lambda: b"Starting" in read_bytes(waiting.said))
            time.sleep(0.3)  # it has come to the lock by now, or the test is a weaker one
            dock.delete_environment(environment.paths, contextlib.nullcontext())
        self.assertEqual(waiting.wait(20), 1)
        self.assertIn("no longer there", read(waiting.said))
        self.assertFalse(os.path.exists(environment.paths.root))
        self.assertEqual(person.processes(), [])

    def test_a_workspace_may_lie_deep_and_bear_any_name(self):
        if WINE:
            self.skipTest("needs paths of more than 260 characters, which Wine does not take everywhere")
        person = self.person
        person.workspace = join(person.home, *["fünf Örter ☃ " + "x" * 40] * 5)
        self.assertGreater(len(person.workspace), 260)
        person.variables["COMFYDOCK_HOME"] = person.workspace
        person.environment("a")
        self.does("run", "--wait", "--port", str(free_port()))
        self.does("logs", "--rotate")
        self.assertIn("Running", person.types("status").stdout)
        self.does("stop")
        self.assertIn("Stopped server", person.log("a"))
        self.assertIn("To see the GUI", person.types("logs", "--all").stdout)

    def test_bad_input_is_one_clear_line_and_changes_nothing(self):
        person = self.person
        checkout = person.checkout()
        empty = join(person.home, "empty")
        os.makedirs(empty)
        person.environment("a")
        cases = [
            (["-e", "nobody", "run"], 1), (["-e", "a/b", "run"], 2), (["-e", "..", "status"], 2), (["-e", "", "status"], 2),
            (["-e", "a", "run", "--port", "0"], 2), (["-e", "a", "run", "--port", "70000"], 2),
            (["-e", "a", "run", "--port", "abc"], 2), (["create", "x", "--from", empty], 1),
            (["create", "../x", "--from", checkout], 2), (["create", "logs", "--from", checkout], 2),
            (["create", "a", "--from", checkout, "--python", sys.executable], 1),
            (["create", "y", "--from", checkout, "--python", "/nowhere/python"], 1), (["use", "nobody"], 1), (["frob"], 2),
            (["--workspace", join(checkout, "main.py"), "list"], 1),
        ]  # fmt: skip
        before = self.everything()
        for words, code in cases:
            with self.subTest(words=words):
                self.assertClear(person.types(*words), code)
                self.assertEqual(self.everything(), before)
        self.assertEqual(person.processes(), [])

    def everything(self):
        """Every file below the home, but for the locks and what is derived from a manifest at any time."""
        files = {}
        for folder, _, names in os.walk(self.person.home):
            for name in names:
                path = join(folder, name)
                if not name.endswith((".lock", ".manifest.json")) and not os.path.islink(path):
                    files[path] = Path(path).read_bytes()
        return files

    def test_a_python_that_is_gone_is_named(self):
        self.person.environment("a")
        manifest = dock.Workspace(self.person.workspace).get_environment("a")
        gone = join(self.person.home, "gone")
        with patch.object(dock.Environment, "python", gone), self.assertRaises(dock.CDEnvironmentError) as caught:
            manifest.run()
        self.assertIn(gone, caught.exception.message)

    def test_a_log_folder_that_is_a_file_is_named_and_nothing_starts(self):
        self.person.environment("a")
        Path(self.person.workspace, "logs").write_text("", encoding="utf-8")
        self.assertClear(self.person.types("-e", "a", "run", "--port", str(free_port())), 1, "logs")
        self.assertIsNone(self.person.state("a"))
        self.assertEqual(self.person.processes(), [])


class TheCommandLine(Journey):
    def test_quiet_says_results_and_errors_alone(self):
        done = self.person.types("run", "--demo", "-q", "--port", str(free_port()))
        self.assertEqual(len(done.stdout.splitlines()), 3, done.stdout)
        self.assertIn("✓ ComfyUI started in background", done.stdout)
        self.assertEqual(self.person.types("-q", "stop").stdout, "✓ ComfyUI stopped\n")
        self.assertClear(self.person.types("-q", "-e", "nobody", "status"), 1, "There is no environment")

    def test_verbose_tells_on_the_error_stream_what_is_run_where_and_how_long(self):
        done = self.person.types(
            "run", "-v", "--demo", "--json", "--set-env", "SECRET=hush", "--port", str(free_port())
        )
        self.assertEqual(json.loads(done.stdout)["ok"], True)
        for words in ("main.py", "(in ", "environment 'demo' at", "Table", "done, exit code 0"):
            self.assertIn(words, done.stderr)
        self.assertRegex(done.stderr, r"(?m)^\[ +\d+\.\d{3}\] ")
        self.assertNotIn("hush", done.stderr)
        self.assertIn("/system_stats: ", self.person.types("status", "-v").stderr)

    def test_passwords_in_addresses_are_not_traced(self):
        told = []
        with patch.object(dock, "TRACERS", [told.append]):
            dock.trace("$ git clone https://me:secret@host/x")
        self.assertEqual(told, ["$ git clone https://host/x"])

    def test_color_is_obeyed_by_a_real_command(self):
        self.run_demo()
        for words, variables, coloured in ((["--color", "always"], {"NO_COLOR": "1"}, True),
            (["--color=never"], {}, False), ([], {}, False)):  # fmt: skip
            done = self.person.types("status", *words, **variables)
            self.assertEqual("\x1b[32m✓\x1b[0m Healthy" in done.stdout, coloured, done)

    def test_streams_that_know_no_signs_get_ascii(self):
        self.run_demo()
        for encoding in ("cp1252", "cp437", "ascii"):
            done = self.person.types("status", PYTHONUTF8="0", PYTHONIOENCODING=encoding)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("[ok] Healthy", done.stdout)
        done = self.person.types("restart", PYTHONUTF8="0", PYTHONIOENCODING="cp437")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("[ok] Restarted", done.stdout)


SHELL_CASES = {  # what is typed before Tab -> what stands there then
    "sta": "status",
    "node rem": "node remove",
    "help node up": "help node update",
    "stop --ti": "stop --timeout",
    "completion fi": "completion fish",
    "--color al": "--color always",
    "-e al": "-e alpha",
    "use be": "use beta",
    "--env beta node remove my": "--env beta node remove my-node",
    "create new --from cod": "create new --from code",
    "run --dem": "run --demo",
}


class SmallCommands(Journey):
    def test_every_key_of_json_is_told_by_help_json(self):
        text = self.person.types("help", "json").stdout
        self.run_demo()
        whole = [self.person.types(*words, "--json").stdout
            for words in (["status"], ["list"], ["restart", "--wait"], ["open", "--wait", "0"])]  # fmt: skip
        dock.signal_process(self.person.status()["pid"], "kill")
        eventually(lambda: self.person.status()["state"] == "crashed")
        whole += [self.person.types(*words, "--json").stdout for words in (
            ["status"], ["repair", "--orphan"], ["stop"], ["stop", "--all"], ["node", "list"], ["create", "a", "--from", self.person.checkout()], ["use", "a"],
            ["-e", "a", "history"], ["-e", "a", "models"], ["models", "--all"], ["-e", "a", "node", "update"], ["delete", "a", "-y"], ["init", join(self.person.home, "w")], ["--version"], ["help"], ["completion", "bash"], ["-e", "nobody", "status"])]  # fmt: skip
        keys = set()
        for line in whole:
            pieces = [json.loads(line)]
            while pieces:
                piece = pieces.pop()
                keys |= set(piece) if isinstance(piece, dict) else set()
                pieces += list(piece.values()) if isinstance(piece, dict) else piece if isinstance(piece, list) else []
        self.assertEqual({key for key in keys if not re.search(rf"\b{key}\b", text)}, set())

    def test_help_tells_what_is_taken_and_no_more(self):
        for words, shown in ((("logs",), 0), (("exec",), 0), (("top",), 0), (("node", "list"), 1)):
            self.assertEqual(self.person.types("help", *words).stdout.count("--json"), shown, words)
        text = self.person.types("help", "completion").stdout
        for shell, script in dock.SCRIPTS.items():
            self.assertIn(f"comfydock completion {shell}", text)
            self.assertIn(re.search(rf"comfydock completion {shell}[^\n]*", text)[0], script)
        for words, said in ((("help", "completion", "zsh"),
            "'help completion' does not take 'zsh'.\n  Try: comfydock help completion\n"),
            (("help", "json", "files"), "'help json' does not take 'files'.\n  Try: comfydock help json\n"),
            (("help", "node", "add", "x"), "'help node add' does not take 'x'.\n  Try: comfydock help node add\n"),
            (("--foo",), "has no option --foo.\n  Try: comfydock help\n"),
            (("-e",), "needs a value.\n  Try: comfydock help\n")):  # fmt: skip
            self.assertClear(self.person.types(*words), 2, said)

    def test_nothing_to_do_is_said(self):
        self.person.environment("alpha")
        for words in (["stop", "--all"], ["restart", "--all"]):
            self.assertEqual(self.person.types(*words).stdout, "Nothing is running.\n")
        self.assertEqual(self.person.types("node", "update").stdout, "No nodes to update.\n")

    def test_ctrl_c_ends_a_followed_log_in_silence(self):
        self.run_demo()
        child = self.person.starts("logs", "-f")
        read_until(child, "To see the GUI")
        dock.signal_process(child.pid, "interrupt")
        self.assertEqual(child.wait(20), 0)
        self.assertNotIn("nterrupt", read(child.said))

    def test_a_name_may_be_the_first_word_and_is_told_when_it_is_none(self):
        self.person.environment("alpha")
        self.assertEqual(self.person.types("status", "alpha").returncode, 3)
        self.assertClear(self.person.types("stop", "nobody"), 1, "There is no environment 'nobody'")
        self.assertClear(self.person.types("run", "8190"), 1, "There is no environment '8190'")

    def test_all_does_it_to_each_and_fails_when_one_fails(self):
        for name in ("alpha", "beta"):
            self.person.environment(name)
        console, asked = dock.Console(io.StringIO(), io.StringIO(), None), []
        with unittest.mock.patch.object(dock, "run_in_background", lambda _, __, environment, options: (
            asked.append(options["auto_port"]) or dock.Report({}, environment.name))):  # fmt: skip
            command, args = dock.parse(["--workspace", self.person.workspace, "run", "--all"])
            dock.do_all(console, args, command)
        self.assertEqual(asked, [True, True])  # of themselves from 8188 on, which other tests may take meanwhile
        run_all = ("run", "--all", "--auto-port", "--port", str(free_port()))
        done = self.person.types(*run_all)
        self.assertEqual((done.returncode, len(done.stdout.splitlines())), (0, 2), done)
        self.assertRegex(done.stdout, r"(?m)^✓ beta: ComfyUI started in background \(PID \d+\), .*http://")
        self.assertIn("✓ alpha: already running", self.person.types("run", "--all").stdout)
        self.does("stop", "alpha")
        done = self.person.types("restart", "--all")
        self.assertRegex(done.stdout, r"\A✓ beta: Restarted .*\n\Z", done.stderr)
        done = self.person.types(*run_all, "--json")
        self.assertEqual([item["ok"] for item in json.loads(done.stdout)["data"]["environments"]], [True, True])
        self.assertEqual(self.person.types("stop", "--all").stdout.count("✓"), 2)
        os.remove(join(self.person.home, "beta", "ComfyUI", "main.py"))
        done = self.person.types(*run_all)
        self.assertEqual(
            (done.returncode, done.stdout.count("✓"), done.stderr.count("✗ Beta:") + done.stderr.count("✗ beta:")),
            (1, 1, 1),
            done,
        )

    def test_exec_runs_in_the_folder_with_the_python_of_the_environment(self):
        self.person.environment("alpha")
        code = "import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)"
        done = self.person.types("exec", "python", "-c", code, "--json", "-v")
        folder = join(self.person.home, "alpha", "ComfyUI")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (7, f"{folder} ['--json', '-v']\n", ""))
        self.assertIn("pip", self.person.types("-e", "alpha", "exec", "--", "pip", "--version").stdout)
        self.assertClear(self.person.types("exec", "no-such-program"), 1, "There is no program 'no-such-program'")
        self.assertClear(self.person.types("exec"), 2, "needs a program")

    @unittest.skipUnless(LINUX, "what Linux has for a browser")
    def test_open_waits_for_the_answer_and_uses_only_a_browser_that_can_be_seen(self):
        self.assertClear(self.person.types("open", "--wait", "x"), 2)
        self.run_demo()
        there = {"DISPLAY": ":7", "WAYLAND_DISPLAY": "", "SSH_CONNECTION": ""}
        path, told = join(self.person.home, "bin"), join(self.person.home, "told")
        os.mkdir(path)
        write(join(path, "xdg-open"), f"#!/bin/sh\necho $1 >'{told}'\n")
        os.chmod(join(path, "xdg-open"), 0o755)
        there["PATH"] = path + os.pathsep + self.person.variables["PATH"]
        url = self.person.status()["url"]
        self.assertEqual(self.person.types("open", **there).stdout, f"✓ {url}\n")
        eventually(lambda: os.path.exists(told) and Path(told).read_text() == f"{url}\n")
        self.assertIn(f"Open it in your browser: {url}", self.person.types("open", **{**there, "DISPLAY": ""}).stdout)
        self.assertIn(
            "ssh -L", self.person.types("open", **{**there, "SSH_CONNECTION": "10.0.0.2 5 10.0.0.9 22"}).stdout
        )
        self.person.types("stop")
        self.assertClear(self.person.types("open"), 1, "ComfyUI is not running")


@unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
class Top(Journey):
    def watched(self, shell, how):
        """What a terminal shows while a shell runs `top` in it, and whether its modes are afterwards as they were."""
        import pty
        import termios

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.person.home)
            words = [shell, "--norc"] if shell == "bash" else [shell]
            os.execvpe(shell, words, {**self.person.variables, "PS1": "$ ", "TERM": "xterm"})
        self.addCleanup(os.waitpid, pid, 0)
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        said = self.until(terminal, rb"\$ ")
        before = termios.tcgetattr(terminal)
        os.write(terminal, " ".join(map(shlex.quote, self.person.command("top"))).encode() + b"\n")
        said += self.until(terminal, b"MEMORY(?s:.)*MEMORY")
        running = next(row for row in dock.process_table().processes(containing="top") if row.ppid == pid)
        if how == "Ctrl-C":
            os.write(terminal, b"\x03")
        else:
            os.kill(running.pid, signal.SIGKILL)
        said += self.until(terminal, rb"\$ ")
        os.write(terminal, b"echo still $((40 + 2))\n")
        said += self.until(terminal, rb"still 42\r\n.*\$ ")
        self.assertEqual(termios.tcgetattr(terminal)[:3], before[:3])
        return said

    @staticmethod
    def until(terminal, text):
        """Read from a terminal until it shows what a pattern says."""
        said, deadline = b"", time.monotonic() + 30
        while not re.search(text, said):
            if time.monotonic() > deadline or not select.select([terminal], [], [], 20)[0]:
                raise AssertionError(f"no {text!r} in {said!r}")
            said += os.read(terminal, 65536)
        return said

    def test_the_terminal_is_as_it_was_after_ctrl_c_and_after_sigkill(self):
        self.run_demo()
        for shell in filter(has, ("bash", "dash")):
            for how in ("Ctrl-C", "SIGKILL"):
                with self.subTest(shell=shell, how=how):
                    said = self.watched(shell, how)
                    self.assertNotRegex(said, rb"\x1b\[\?(25|1049|1000)")  # no hidden cursor, other screen, or mouse
                    self.assertNotIn(b"Traceback", said)
        self.assertEqual(self.person.status()["state"], "running")

    def test_without_a_terminal_it_is_one_look(self):
        self.run_demo()
        for words in (["top"], ["list", "--watch"]):
            done = self.person.types(*words)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertRegex(done.stdout.splitlines()[1], r"^✓  demo .*  running .* \d+\.\d MB +\d+% +\d+$")

    def test_what_ps_tells_of_cpu_and_memory(self):
        text = "    1     0   0:01.50  2048\n  77     1 1-02:03:04 10\n 5 1 - -\nnonsense\n".replace(" 5 1 - -\n", "")
        self.assertEqual(dock.parse_usage(text), {1: (0, 1.5, 2 << 20), 77: (1, 93784.0, 10240)})


class CompletionInRealShells(Journey):
    """Tab is pressed in a real interactive shell, where `comfydock` is a function that tells its words."""

    def setUp(self):
        super().setUp()
        self.person.environment("alpha")
        self.person.environment("beta")
        manifest = Path(self.person.workspace, "environments", "beta", ".cec", "pyproject.toml")
        entry = '\n[tool.comfydock.nodes.my-node]\nname = "my-node"\nsource = "development"\n'
        manifest.write_text(manifest.read_text(encoding="utf-8") + entry, encoding="utf-8")
        os.makedirs(join(self.person.home, "code"))

    def script(self, shell):
        if not has(shell):
            self.skipTest(f"needs {shell}")
        done = self.person.types("completion", shell)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        path = join(self.person.home, f"completion.{shell}")
        Path(path).write_text(done.stdout, encoding="utf-8")
        return path

    def typed_in(self, *shell, **variables):
        """Type each case and Tab in a shell on a pseudo-terminal; returns what `comfydock` was called with."""
        import pty

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.person.home)
            os.execvpe(shell[0], shell, {**self.person.variables, "TERM": "dumb", **variables})
        try:
            self.read_terminal(terminal, b"READY")
            return {line: self.pressed_tab(terminal, line) for line in SHELL_CASES}
        finally:
            os.kill(pid, signal.SIGKILL)
            os.close(terminal)
            os.waitpid(pid, 0)

    def pressed_tab(self, terminal, line):
        os.write(terminal, f"comfydock {line}\t\n".encode())  # keys are taken one after the other
        said = self.read_terminal(terminal, b"]]")
        return re.search(rb"GOT\[\[(.*?)[ /]*\]\]", said)[1].decode()

    def read_terminal(self, terminal, until):
        """What comes until it holds some bytes, or until nothing came for half a minute."""
        said = b""
        while until not in said and select.select([terminal], [], [], 30)[0]:
            said += os.read(terminal, 65536)
        return said

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_bash(self):
        rc = join(self.person.home, "rc")
        script = self.script("bash")
        tell = "comfydock() { printf 'GOT[[%s]]' \"$*\"; }"
        Path(rc).write_text(f"PS1='> '\nsource '{script}'\n{tell}\necho READ''Y\n", encoding="utf-8")
        self.assertEqual(self.typed_in("bash", "--noprofile", "--rcfile", rc, "-i"), SHELL_CASES)

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_zsh(self):
        script = self.script("zsh")
        tell = "comfydock() { printf 'GOT[[%s]]' \"$*\" }"
        text = f"PS1='> '\nautoload -Uz compinit; compinit -u -D\nsource '{script}'\n{tell}\necho READ''Y\n"
        Path(self.person.home, ".zshrc").write_text(text, encoding="utf-8")
        self.assertEqual(self.typed_in("zsh", "-i", ZDOTDIR=self.person.home), SHELL_CASES)

    def test_fish(self):
        script = self.script("fish")
        asked = "".join(
            f"echo (complete -C 'comfydock {line}' | string split -f 1 \\t | string join '|')\n" for line in SHELL_CASES
        )
        done = subprocess.run(["fish", "--no-config", "-c", f"source '{script}'\n{asked}"],
            cwd=self.person.home, env=self.person.variables, capture_output=True, text=True, timeout=60)  # fmt: skip
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout.replace("/", "").splitlines(), [line.split()[-1] for line in SHELL_CASES.values()])

    def test_a_name_that_is_shell_code_is_not_offered(self):
        script = self.script("bash")
        os.makedirs(join(self.person.workspace, "environments", "$(touch planted)", ".cec"))
        code = f"source '{script}'; COMP_WORDS=(comfydock use ''); COMP_CWORD=2; _comfydock; printf '%s\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-c", code], cwd=self.person.home, env=self.person.variables,
            capture_output=True, text=True, timeout=60)  # fmt: skip
        self.assertEqual(sorted(done.stdout.splitlines()), ["alpha", "beta"])
        self.assertFalse(os.path.exists(join(self.person.home, "planted")))

    def test_names_are_told_fast_and_trouble_says_nothing(self):
        done = self.person.types("--complete", "-e", "nobody", "node", "remove", "=")
        self.assertEqual((done.stdout, done.stderr), ("", ""))


@unittest.skipUnless(has("git"), "needs git")
class FromNothingToANode(Journey):
    """Offline: a local repository stands for ComfyUI, wheels and a registry are the workshop's."""

    @classmethod
    def setUpClass(cls):
        raise_workshop()
        cls.source = join(Workshop.root, "repositories", "Runnable")
        if not os.path.isdir(cls.source):
            code = {"main.py": dock.demo_source(), "requirements.txt": "tiny\n", "custom_nodes/.gitkeep": "",
                    "manager_requirements.txt": "comfyui_manager\n"}  # fmt: skip
            make_repository("Runnable", code, "v1.0.0")

    def setUp(self):
        self.person = Person(self, COMFYDOCK_REGISTRY_URL=Workshop.registry.url)

    def types(self, *words, code=0, **more):
        """Run a command that must end with `code`; returns all it says."""
        done = self.person.types(*words, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stdout + done.stderr

    def make(self, name="main"):
        """An environment with its code and a venv that is shared, so that it costs no time."""
        shared_environment()
        self.types("create", name, "--source", self.source, "--no-install", "--use")
        root = join(self.person.workspace, "environments", name)
        os.symlink(Workshop.paths.venv, join(root, ".venv"))
        return join(root, "ComfyUI", "custom_nodes")

    def test_an_environment_without_a_python_is_not_called_ready(self):
        said = self.types("create", "main", "--source", self.source, "--no-install")
        self.assertNotIn("is ready", said)
        self.assertIn("no Python yet", said)
        self.assertIn(join("main", ".venv"), said)

    def test_create_makes_a_whole_environment_and_delete_takes_it_away(self):
        said = self.types("create", "main", "--source", self.source, "--torch-backend", "cpu", "--python", sys.executable, "--use",
                          seconds=300)  # fmt: skip
        for stage in ("ComfyUI: done in", "Python: done in", "PyTorch: done in", "requirements: done in"):
            self.assertIn(stage, said)
        cec = join(self.person.workspace, "environments", "main", ".cec")
        python = dock.venv_python(join(os.path.dirname(cec), ".venv"))
        self.assertIn("comfyui_manager==4.2", [line.replace("-", "_") for line in dock.Packages(python).freeze()])
        self.assertIn("Initial environment setup", git(cec, "log", "--format=%s"))
        self.assertEqual(git(cec, "status", "--porcelain"), "")
        self.assertRegex(self.types("list"), r"main \(active\) +stopped")
        self.types("run", "--wait", "30", "--port", str(free_port()))
        self.assertEqual(git(cec, "status", "--porcelain"), "")
        self.assertRegex(self.types("delete", "main", "-y", code=1), r"ComfyUI runs \(PID \d+\) in environment 'main'")
        self.types("stop")
        self.assertIn("no terminal to ask on", self.types("delete", "main", code=1))
        self.types("delete", "main", "-y")
        self.assertFalse(os.path.exists(os.path.dirname(cec)))
        self.assertIn("No environments found", self.types("list"))

    def test_an_interrupted_create_is_shown_as_incomplete_and_goes_on(self):
        self.types("create", "main", "--source", join(Workshop.root, "nowhere"), "--no-install", code=1)
        self.assertIn("No environments found.", self.types("list"))
        self.types("create", "main", "--source", self.source, "--no-install")
        paths = dock.Workspace(self.person.workspace).get_environment("main").paths
        os.remove(paths.complete)
        self.assertIn("  stopped, incomplete", self.types("list"))
        self.types("create", "main", "--source", self.source, "--no-install")
        self.assertNotIn("incomplete", self.types("list"))

    @needs_git
    @unittest.skipIf(WINDOWS, "no signals there")
    def test_a_create_that_is_told_to_end_takes_git_along_and_leaves_nothing(self):
        def silent(connection):
            while connection.recv(4096):
                pass

        with listening(answer=silent) as port:
            source = f"http://127.0.0.1:{port}/x.git"

            def asking():
                return [one for one in dock.process_table().processes(containing=source) if "ls-remote" in one.text]

            for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
                child = self.person.starts("create", "main", "--source", source)
                eventually(asking)
                child.send_signal(number)
                self.assertEqual(child.wait(20), code, read(child.said))
                self.assertEqual(asking(), [])
                self.assertEqual(os.listdir(join(self.person.workspace, "environments")), [])
            self.assertNotIn("Traceback", read(child.said))

    @unittest.skipIf(WINDOWS, "the venv is shared by a link")
    def test_nodes_come_change_and_go_and_comfyui_is_restarted_or_the_user_told(self):
        nodes = self.make()
        registry = Workshop.registry
        registry.publish("journey-pack", "1.0.0", {"__init__.py": "", "requirements.txt": "tiny\n"})
        pack = make_repository(f"Pack{os.getpid()}", {"__init__.py": ""})
        own = join(self.person.home, "own-node")
        write(join(own, "__init__.py"), "")
        self.types("run", "--wait", "30", "--port", str(free_port()))
        before = self.person.state("main")["pid"]

        said = self.types("node", "add", "journey-pack")
        self.assertIn("✓ Added node: journey-pack", said)
        done = self.person.types("node", "add", "journey-pack", "--json")
        self.assertEqual(untold_keys(done.stdout, "node add"), set(), done.stdout)
        self.assertIn("Changes won't take effect until restart.", said)
        self.assertIn("restart", said.splitlines()[-2] + said.splitlines()[-1])
        self.assertEqual(self.person.state("main")["pid"], before)

        said = self.types("node", "add", pack, "no-such-node", "--restart", code=1)
        self.assertIn("✗ ", said)
        self.assertIn("Restarting to apply changes", said)
        after = self.person.state("main")["pid"]
        self.assertNotEqual(after, before)
        self.assertIn("no-such-node", said)
        said = self.types("node", "add", own, "--dev", "--no-restart")
        self.assertEqual(self.person.state("main")["pid"], after)

        said = self.types("node", "list")
        for line in ("journey-pack (registry) v1.0.0", "(git) @ ", "own-node (development) (dev)"):
            self.assertIn(line, said)

        registry.publish("journey-pack", "1.1.0", {"__init__.py": "", "requirements.txt": "tiny\n"})
        self.assertIn("updated", self.types("node", "update", "journey-pack", "-y", "--no-restart"))
        self.assertIn("v1.1.0", self.types("node", "list"))
        self.assertIn("newest version", self.types("node", "update", "journey-pack", "-y"))

        self.types("stop")
        shutil.rmtree(join(nodes, "journey-pack"))
        write(join(nodes, "stranger", "__init__.py"), "")
        said = self.types("status", code=3)
        for line in ("Environment needs repair", "1 nodes in pyproject.toml not installed: journey-pack", "stranger"):
            self.assertIn(line, said)
        self.types("run", "--port", str(free_port()))
        self.assertTrue(os.path.isdir(join(nodes, "journey-pack")))
        self.types("stop")
        self.assertIn("No terminal to ask on", self.types("repair", code=1))
        self.assertIn("✓ Tracked stranger", self.types("repair", "-y"))
        self.assertIn("No changes to apply", self.types("repair"))

        self.assertIn("(deleted)", self.types("node", "remove", "journey-pack"))
        self.assertIn("(disabled)", self.types("node", "remove", "own-node"))
        self.assertTrue(os.path.isdir(own))
        self.assertFalse(os.path.exists(join(nodes, "journey-pack")))

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_a_terminal_is_asked_once_for_several_nodes(self):
        self.make()
        for name in ("ask-one", "ask-two"):
            Workshop.registry.publish(name, "1.0.0", {"__init__.py": ""})
        self.types("run", "--wait", "30", "--port", str(free_port()))
        before = self.person.state("main")["pid"]
        code, said = self.person.at_a_terminal("node", "add", "ask-one", "ask-two", answers=[b"\n"])
        self.assertEqual((code, said.count("[Y/n]")), (0, 1), said)
        self.assertIn("Restarted (new PID:", said)
        self.assertNotEqual(self.person.state("main")["pid"], before)

    def test_a_failed_sync_starts_nothing_and_names_the_way_round(self):
        nodes = self.make() if not WINDOWS else self.skipTest("the venv is shared by a link")
        Workshop.registry.publish("gone-pack", "1.0.0", {"__init__.py": ""})
        self.types("node", "add", "gone-pack")
        shutil.rmtree(join(nodes, "gone-pack"))
        del Workshop.registry.answers["/files/gone-pack/1.0.0/node.zip"]
        said = self.types("run", "--port", str(free_port()), code=1)
        self.assertIn("gone-pack", said)
        self.assertIn("run --no-sync", said)
        self.assertIsNone(self.person.state("main"))
        self.types("run", "--no-sync", "--port", str(free_port()))

    @unittest.skipIf(WINDOWS, "the venv is shared by a link")
    def test_who_asks_for_a_manager_that_is_not_installed_is_told_before_the_start(self):
        self.make()
        said = self.types("run", "--port", str(free_port()), "--enable-manager")
        self.assertIn("ComfyUI-Manager is not installed here:", said)
        self.assertIn("pip install -r", said)

    @unittest.skipIf(WINDOWS, "the venv is made by links")
    def test_a_workspace_of_1_0_opens_runs_and_gains_a_node(self):
        person = self.person
        root = join(person.home, "comfydock")
        person.workspace = root
        cec = join(root, "environments", "old", ".cec")
        write(join(cec, "pyproject.toml"), OLD_MANIFEST)
        write(join(cec, ".gitignore"), ".complete\n*.tmp\n")
        write(join(cec, ".complete"), "")
        settings = {"version": 1, "active_environment": "old", "created_at": "2025-10-30T12:00:00.000000",
                    "global_model_directory": None, "api_credentials": None, "prefer_registry_cache": True}  # fmt: skip
        write(join(root, ".metadata", "workspace.json"), json.dumps(settings))
        write(join(root, "environments", "old", "ComfyUI", "main.py"), dock.demo_source())
        os.makedirs(join(root, "environments", "old", "ComfyUI", "custom_nodes"))
        shared_environment()
        os.symlink(Workshop.paths.venv, join(root, "environments", "old", ".venv"))
        git(cec, "init", "--quiet")
        git(cec, "add", "-A")
        git(cec, "commit", "--quiet", "-m", "Initial environment setup")
        self.assertRegex(self.types("list"), r"old \(active\) +stopped")
        self.types("run", "--no-sync", "--wait", "30", "--port", str(free_port()))
        self.assertEqual(git(cec, "status", "--porcelain"), "")
        before = read(join(cec, "pyproject.toml"))
        Workshop.registry.publish("gained", "1.0.0", {"__init__.py": ""})
        self.types("node", "add", "gained", "--no-restart")
        after = read(join(cec, "pyproject.toml"))
        added = [line for line in after.splitlines() if line not in before.splitlines()]
        self.assertIn("[tool.comfydock.nodes.gained]", added)
        self.assertEqual([line for line in before.splitlines() if line not in after.splitlines()], [])
        kept = json.loads(read(join(root, ".metadata", "workspace.json")))
        self.assertEqual(kept, settings)
        self.types("stop")

    def test_a_broken_manifest_is_one_line_with_its_number_and_stop_still_works(self):
        person = self.person
        person.environment("a")
        self.types("-e", "a", "run", "--port", str(free_port()))
        manifest = Path(person.workspace, "environments", "a", ".cec", "pyproject.toml")
        broken = manifest.read_text(encoding="utf-8") + "\nthis is no toml\n"
        manifest.write_text(broken, encoding="utf-8")
        self.assertRegex(self.types("-e", "a", "node", "list", code=1), r"pyproject\.toml line \d+")
        self.assertIn("pyproject.toml line", self.types("-e", "a", "status"))
        self.types("-e", "a", "stop")
        self.assertEqual(manifest.read_text(encoding="utf-8"), broken)


class QueuedWork(Journey):
    def busy_demo(self, seconds=60, **variables):
        data = self.run_demo(**variables)
        self.give_work(data["port"], seconds)
        return data

    def give_work(self, port, seconds=60):
        """Two prompts, the first of which is at work on return."""
        for _ in range(2):
            prompt = {"1": {"class_type": "DemoSleep", "inputs": {"seconds": seconds}}}
            self.assertEqual(post(port, "/prompt", {"prompt": prompt})[0], 200)
        eventually(lambda: dock.queue_counts(dock.ComfyUIConfig("127.0.0.1", port), 2.0) == (1, 1))

    def test_status_and_list_show_what_is_queued(self):
        self.busy_demo()
        self.assertIn("Queue: 1 running, 1 queued", self.person.types("status").stdout)
        self.assertIn("  1+1  ", self.person.types("list").stdout)
        listed = json.loads(self.person.types("list", "--json").stdout)["data"]["environments"][0]
        self.assertEqual(listed["queue"], {"running": 1, "pending": 1})

    def test_a_script_is_obeyed_and_told_what_it_cut_off(self):
        data = self.busy_demo()
        done = self.person.types("restart", "--json")
        self.assertEqual(json.loads(done.stdout)["data"]["cut_off"], {"running": 1, "pending": 1})
        eventually(lambda: http_status(data["port"]) == 200)
        self.give_work(data["port"])
        done = self.person.types("stop")
        self.assertEqual(
            (done.returncode, "This cuts off work: 1 running, 1 queued" in done.stderr), (0, True), done.stderr
        )

    def test_when_idle_waits_for_the_work(self):
        data = self.busy_demo(seconds=2)
        done = self.does("stop", "--when-idle", "30")
        self.assertNotIn("cuts off", done.stderr)
        self.assertEqual(self.person.log().count("Prompt executed in"), 2)
        self.assertFalse(alive(data["pid"]))

    def test_a_queue_that_never_drains_and_a_server_that_never_answers_hold_nobody_up(self):
        self.run_demo()
        port = self.person.state()["port"]
        post(port, "/prompt", {"prompt": {"1": {"class_type": "DemoSleep", "inputs": {"seconds": 600}}}})
        eventually(lambda: dock.queue_counts(dock.ComfyUIConfig("127.0.0.1", port), 2.0) == (1, 0))
        done = self.person.types("stop", "--when-idle", "1")
        self.assertEqual((done.returncode, "This cuts off work" in done.stderr), (0, True), done.stderr)
        self.start_demo(COMFYDOCK_DEMO_HANG="1")
        self.comes_to_be("unresponsive")
        self.does("stop", "--when-idle")

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_a_terminal_is_asked_and_no_means_no(self):
        data = self.busy_demo()
        code, said = self.person.at_a_terminal("stop", answers=[b"\n"])
        self.assertIn("ComfyUI is busy: 1 running, 1 queued. Stop anyway? [y/N]", said)
        self.assertEqual((code, alive(data["pid"])), (1, True))
        self.assertIn("stop --when-idle", said)
        for key in (b"\x03", b"\x04"):
            code, said = self.person.at_a_terminal("stop", answers=[key])
            self.assertRegex(said, r"\[y/N\] (\^C|\^D\x08\x08)?\r\n.*error:")
            self.assertEqual((code, alive(data["pid"])), (130 if key == b"\x03" else 1, True), said)
        code, said = self.person.at_a_terminal("stop", answers=[b"y\n"])
        self.assertEqual((code, alive(data["pid"])), (0, False), said)

    def test_where_files_are_locked_in_use_work_is_not_cut_off_for_a_change_of_nodes(self):
        data, seen = self.busy_demo(), []
        environment = dock.Workspace(self.person.workspace).get_environment("demo")
        args = dock.Arguments({"restart": True, "no_restart": False, "wait": None})

        def change(name):
            seen.append(alive(data["pid"]))
            return "changed", None

        def is_idle():
            with contextlib.suppress(OSError):  # it may be starting again
                post(data["port"], "/interrupt", {})
            return environment.queue() == (0, 0)

        with patch.object(dock, "FILES_ARE_LOCKED_IN_USE", True):
            for _ in range(2):
                console = dock.Console(None, None, None)
                report = dock.change_nodes_one_by_one(console, args, environment, ["x"], change)
                self.assertEqual(report.code, 0)
                eventually(is_idle)
        self.assertEqual(seen, [True, False])
        self.assertTrue(report.data["restarted"])

    def test_force_does_not_ask(self):
        data = self.busy_demo()
        self.does("stop", "--force")
        self.assertFalse(alive(data["pid"]))


class RotatingWhileItRuns(Journey):
    def numbers(self, text):
        return [int(number) for number in re.findall(r"^spam (\d+)", text, re.M)]

    def old_names(self):
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        return dock.old_logs(log) + [log]

    def test_no_line_is_lost_or_doubled_and_follow_goes_on(self):
        rounds = 10 if "--long" in sys.argv else 4
        self.run_demo(COMFYDOCK_DEMO_SPAM="2000:200")
        follower = self.person.starts("logs", "-f", "-n", "0")
        read_until(follower, "spam")
        for _ in range(rounds):
            before = os.path.getsize(self.old_names()[-1])
            eventually(lambda before=before: os.path.getsize(self.old_names()[-1]) > before + 100000)
            done = self.person.types("logs", "--rotate", "--keep", "20")
            self.assertEqual((done.returncode, "Rotated" in done.stdout), (0, True), done.stderr)
        self.does("stop")
        self.assertEqual(follower.wait(30), 0)
        self.assertEqual(len(self.old_names()), rounds + 1)
        kept = "".join(read(name) for name in self.old_names())
        numbers = self.numbers(kept)
        self.assertEqual(numbers, list(range(numbers[0], numbers[0] + len(numbers))))
        shown = self.numbers(read(follower.said))
        self.assertEqual(shown, list(range(shown[0], numbers[-1] + 1)))
        self.assertEqual(self.numbers(self.person.types("logs", "--all").stdout), numbers)

    def test_a_comfyui_that_lost_its_record_is_recorded_and_its_log_rotates_in_use(self):
        data = self.run_demo()
        os.unlink(self.person.state_file())
        done = self.person.types("-e", "demo", "logs", "--rotate")
        self.assertEqual((done.returncode, self.person.state()["pid"]), (0, data["pid"]), done.stderr)
        post(data["port"], "/prompt", {})
        eventually(lambda: "got prompt" in self.person.log())
        self.does("stop")

    def test_the_log_of_another_machine_is_left_alone(self):
        self.run_demo()
        state = self.person.state()
        state["identity"].update(machine="elsewhere", boot_id="another")
        Path(self.person.state_file()).write_text(json.dumps(state), encoding="utf-8")
        self.assertClear(self.person.types("logs", "--rotate"), 1, "on another machine")
        self.assertEqual(len(self.old_names()), 1)

    def test_keep_says_how_many_old_logs_stay(self):
        self.run_demo(COMFYDOCK_DEMO_SPAM="100")
        for _ in range(4):
            eventually(lambda: "spam" in self.person.log())
            self.person.types("logs", "--rotate", "--keep", "2")
        self.assertEqual(len(self.old_names()), 3)

    def test_a_log_at_rest_is_moved(self):
        self.run_demo()
        self.person.types("stop")
        self.assertIn("Rotated", self.person.types("logs", "--rotate").stdout)
        self.assertIn("To see the GUI", self.person.types("logs", "--all").stdout + read(self.old_names()[0]))

    def test_what_a_killed_rotation_left_standing_goes_on_with_the_next_command(self):
        data = self.run_demo()
        state = self.person.state()
        pause(data["pid"])
        dock.write_state(self.person.state_file(), dock.ProcessState.from_dict({**state, "phase": "rotating"}))
        self.does("status")
        eventually(lambda: http_status(data["port"]) == 200)
        self.assertEqual(self.person.state()["phase"], "running")


class Monitored(Journey):
    def monitored_demo(self, **variables):
        return self.run_demo("--monitor", **variables)

    def monitor_pid(self):
        return self.person.state()["monitor"]["pid"]

    def crash(self, pid):
        row = dock.process_table().process(pid)
        dock.signal_process(pid, "kill")
        self.assertTrue(dock.wait_for_exit(row, 10))

    def test_a_crash_is_followed_by_a_restart_with_the_same_arguments(self):
        data = self.monitored_demo()
        self.crash(data["pid"])
        again = self.comes_to_be("running")
        self.assertNotEqual(again["pid"], data["pid"])
        self.assertEqual(
            (again["port"], again["monitor"]["restarts"], again["monitor"]["alive"]), (data["port"], 1, True)
        )
        self.assertIn("Monitor: watching, restarted ComfyUI 1 time", self.person.types("status").stdout)
        self.assertIn("monitored", self.person.types("list").stdout)

    def test_a_stop_is_never_undone_and_takes_the_monitor_along(self):
        self.monitored_demo()
        monitor = self.monitor_pid()
        self.does("stop")
        self.assertFalse(alive(monitor))
        self.assertEqual(self.person.processes(), [])
        self.assertEqual(self.person.status()["state"], "stopped")

    def test_it_is_kept_across_a_restart(self):
        self.monitored_demo()
        monitor = self.monitor_pid()
        self.does("restart")
        self.assertEqual(self.monitor_pid(), monitor)
        data = self.person.status()
        self.assertEqual((data["monitor"]["alive"], data["monitor"]["restarts"]), (True, 0))
        self.assertEqual(dock.process_table().process(data["pid"]).ppid, monitor)
        self.assertClear(self.person.types("run", "--demo", "--monitor"), 1, "already running", "a monitor watches it")

    def test_comfyui_outlives_a_killed_monitor_and_a_new_one_can_be_started(self):
        data = self.monitored_demo()
        self.crash(self.monitor_pid())
        self.assertTrue(alive(data["pid"]))
        self.assertIn("Monitor: ⚠ gone", self.person.types("status").stdout)
        self.assertClear(self.person.types("run", "--demo", "--monitor", "--cpu"), 1, "cannot be given other arguments")
        done = self.does("run", "--demo", "--monitor")
        self.assertIn(f"A monitor now watches ComfyUI (PID {data['pid']})", done.stdout)
        self.assertEqual(self.person.status()["pid"], data["pid"])
        self.assertTrue(self.person.status()["monitor"]["alive"])
        self.crash(data["pid"])
        self.comes_to_be("running")

    def test_killed_between_a_crash_and_its_restart_it_is_told_and_run_starts_again(self):
        data = self.monitored_demo()
        self.crash(self.monitor_pid())
        self.crash(data["pid"])
        done = self.person.types("status")
        self.assertEqual((done.returncode, "Crashed" in done.stdout, "Monitor: ⚠ gone" in done.stdout), (3, True, True))
        self.does("run", "--demo", "--port", str(free_port()))
        self.assertEqual(len(self.person.processes()), 1)

    def test_a_restart_by_comfyui_manager_is_no_crash(self):
        data = self.monitored_demo()
        self.manager_restarts(data["port"])
        again = self.comes_to_be("running")
        self.assertEqual(again["pid"] == data["pid"], not WINDOWS, "Windows' exec is another process")
        eventually(lambda: self.person.state()["pid"] == again["pid"])
        self.assertEqual((self.person.status()["monitor"]["restarts"], len(self.person.processes())), (0, 2))
        self.does("stop")
        self.assertEqual(self.person.processes(), [])

    def test_what_cannot_start_is_told_by_the_one_who_asked(self):
        with listening() as port:
            self.assertClear(self.person.types("run", "--demo", "--monitor", "--port", str(port)), 1,
                f"Port {port} is already in use")  # fmt: skip
        eventually(lambda: not self.person.processes())  # it has answered, and ends

    def test_an_end_with_code_0_is_no_crash(self):
        self.run_demo("--monitor", COMFYDOCK_DEMO_EXIT="later:0:1")
        self.comes_to_be("stopped")
        eventually(lambda: self.person.processes() == [])

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_it_costs_next_to_nothing(self):
        self.person.program = shutil.copy(MODULE, self.person.home)
        self.monitored_demo(PYTHONDONTWRITEBYTECODE="1", COVERAGE_PROCESS_START="")
        code = "import time; print('up', flush=True); time.sleep(60)"
        bare = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
        self.person.children.append(bare)
        bare.stdout.readline()
        bare.stdout.close()

        def private(pid):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            return sum(int(size) for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) / 1024

        self.assertLess(private(self.monitor_pid()) - private(bare.pid), 8)

    def test_a_crash_loop_is_given_up_and_status_says_why(self):
        name = "--long" in sys.argv
        if not name:
            self.skipTest("takes 35 s of growing pauses: python3 test_comfydock.py --long")
        self.run_demo("--monitor", COMFYDOCK_DEMO_EXIT="later:3:0.4")
        eventually(lambda: (self.person.state()["monitor"] or {}).get("gave_up"), 120)
        self.assertIn("gave up: 6 crashes within 5m, the last with code 3", self.person.types("status").stdout)

    @unittest.skipUnless("--long" in sys.argv, "fifty kills: python3 test_comfydock.py --long")
    def test_killed_at_any_moment_there_are_never_two_servers(self):
        chance = random.Random(1)
        for _ in range(50):
            self.person.types("run", "--demo", "--monitor", "--port", str(free_port()))
            state = self.person.state()
            if chance.random() < 0.5:
                with contextlib.suppress(OSError):
                    dock.signal_process(state["pid"], "kill")
            until = time.monotonic() + chance.random() * 2
            while time.monotonic() < until:
                self.assertLessEqual(len(dock.comfyui_processes(self.checkout())), 1)
            with contextlib.suppress(OSError):
                dock.signal_process(state["monitor"]["pid"], "kill")
            self.assertLessEqual(len(dock.comfyui_processes(self.checkout())), 1)
        self.assertIn(self.person.types("stop").returncode, (0,))

    def checkout(self):
        return join(self.person.workspace, "environments", "demo", "ComfyUI")


def shows_listeners():
    """Whether the system tells who listens on a port (macOS without lsof does not)."""
    with listening() as port:
        return os.getpid() in dock.process_table().listeners(port)


class StoppingByPort(Journey):
    def setUp(self):
        super().setUp()
        if not shows_listeners():
            self.skipTest("this system does not tell who listens on a port")

    def test_a_comfyui_is_ended_whoever_started_it_once_it_is_proved_to_be_one(self):
        checkout = self.person.checkout()
        port = free_port()
        command = [sys.executable, join(checkout, "main.py"), "--port", str(port)]
        child = subprocess.Popen(command, cwd=checkout, env=self.person.variables, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.person.children.append(child)
        eventually(lambda: http_status(port) == 200)
        done = self.person.types("stop", "--port", str(port), "--dry-run")
        self.assertEqual(
            (done.returncode, f"PID {child.pid} is the ComfyUI on port {port}" in done.stdout), (0, True), done.stderr
        )
        self.assertIsNone(child.poll())
        self.does("stop", "--port", str(port))
        self.assertIsNotNone(child.wait(10))

    def test_it_is_asked_where_its_own_arguments_say(self):
        checkout = self.person.checkout()
        for host in ["127.0.0.2", "::1"] if LINUX else ["::1"]:
            port = free_port()
            command = [sys.executable, join(checkout, "main.py"), "--port", str(port), "--listen", host]
            child = subprocess.Popen(command, cwd=checkout, env=self.person.variables, stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            self.person.children.append(child)
            eventually(functools.partial(dock.check_http_health, host, port))
            done = self.person.types("stop", "--port", str(port))
            self.assertEqual((host, done.returncode), (host, 0), done.stderr)
            self.assertIsNotNone(child.wait(10))

    def test_a_tracked_one_is_stopped_as_its_environment_would(self):
        data = self.run_demo()
        done = self.person.types("stop", "--port", str(data["port"]), "--json")
        self.assertEqual(json.loads(done.stdout)["environment"], "demo")
        self.assertIsNone(self.person.state())

    def test_anything_else_is_left_alone(self):
        with listening(answer=saying(stats(["main.py"]))) as port:
            self.assertClear(self.person.types("stop", "--port", str(port)), 1, "not proved to be a ComfyUI")
        self.assertClear(
            self.person.types("stop", "--port", str(free_port())), 1, "Nothing you can see is listening on port"
        )


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
        self.assertEqual(facts["logs"], join(self.person.workspace, "logs"))

    def test_errors_are_raised_with_a_hint(self):
        error = error_of(dock.Workspace(self.person.workspace).get_environment, "nobody")
        self.assertTrue(error.hint)


class EveryWayToHaveIt(Journey):
    """Copied, as a module, as an archive, vendored; what needs a package index is tried by .ci/install."""

    def setUp(self):
        super().setUp()
        self.folder = join(self.person.home, "où it lies")
        os.makedirs(self.folder)
        shutil.copy(MODULE, self.folder)

    def calls(self, *words, cwd=None):
        """Run Python with these words; returns the CompletedProcess."""
        return subprocess.run(
            [sys.executable, *words], cwd=cwd or self.person.home, env=self.person.variables, stdin=subprocess.DEVNULL,
            capture_output=True, encoding="utf-8", timeout=60,
        )  # fmt: skip

    def goes_all_the_way(self, *call, cwd=None):
        """Run, ask and stop the demo by this call; returns what `run` said."""
        done = self.calls(*call, "run", "--demo", "--wait", "--port", str(free_port()), cwd=cwd)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Health: ✓ Healthy", self.calls(*call, "status", cwd=cwd).stdout)
        stopped = self.calls(*call, "stop", cwd=cwd)
        self.assertEqual((stopped.returncode, "ComfyUI stopped" in stopped.stdout), (0, True), stopped.stderr)
        self.assertEqual(self.calls(*call, "status", cwd=cwd).returncode, 3)
        self.assertIn("Stopped server", self.person.log())
        return done.stdout

    def test_one_file_that_was_copied(self):
        path = join(self.folder, "comfydock.py")
        self.assertIn(f"{dock.quote(path)} -e demo logs", self.goes_all_the_way(path))
        self.assertEqual([name for name in os.listdir(self.folder) if name != "__pycache__"], ["comfydock.py"])

    def test_as_a_module(self):
        self.assertIn("-m comfydock -e demo logs", self.goes_all_the_way("-m", "comfydock", cwd=self.folder))

    def test_as_an_archive(self):
        os.rename(join(self.folder, "comfydock.py"), join(self.folder, "__main__.py"))
        done = self.calls("-m", "zipapp", "--compress", self.folder, "--output", "comfydock.pyz")
        self.assertEqual(done.returncode, 0, done.stderr)
        shutil.rmtree(self.folder)
        self.assertIn("comfydock.pyz -e demo logs", self.goes_all_the_way("comfydock.pyz"))
        self.assertIn("comfydock.pyz", self.calls("comfydock.pyz", "completion", "bash").stdout)

    VENDORED = """
import sys
{load}
workspace = comfydock.Workspace(sys.argv[1])
environment = workspace.demo()
environment.run(["--port", sys.argv[2]])
print(environment.is_running(), comfydock.is_process_alive(environment._read_state().pid), environment.stop(timeout=20))
"""
    LOADS = {
        "imported from a folder": "sys.path.insert(0, sys.argv[3]); import comfydock",
        "in a package": "sys.path.insert(0, sys.argv[3] + '/..'); from package.vendor import comfydock",
        "by path, without an entry in sys.modules": (
            "import importlib.util as u; spec = u.spec_from_file_location('x', sys.argv[3] + '/comfydock.py');"
            " comfydock = u.module_from_spec(spec); spec.loader.exec_module(comfydock)"
        ),
    }

    def test_a_copy_that_is_called_as_a_command_starts_itself_as_such(self):
        path = join(self.folder, "comfydock")
        os.rename(path + ".py", path)
        done = self.calls(path, "run", "--demo", "--monitor", "--wait", "--port", str(free_port()))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.calls(path, "stop").returncode, 0)

    def test_what_it_starts_of_itself_takes_nothing_from_the_folder_one_stands_in(self):
        for name in ("json.py", "comfydock.py"):
            Path(self.person.home, name).write_text(
                "raise SystemExit('of the folder one stands in')\n", encoding="utf-8"
            )
        done = self.calls(*dock.own_command()[1:], "--version")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, f"comfydock {dock.__version__}\n", ""))

    def test_vendored(self):
        package = join(self.person.home, "package", "vendor")
        shutil.copytree(self.folder, package)
        for how, load in self.LOADS.items():
            with self.subTest(how=how):
                folder = os.path.dirname(package) if "package" in how else package
                done = self.calls("-W", "error", "-c", self.VENDORED.format(load=load), self.person.workspace,
                    str(free_port()), folder)  # fmt: skip
                self.assertEqual((done.stdout, done.stderr), ("True True True\n", ""))


# ----------------------------------------------------------------------------------------------------------------------
# Journeys: faults, races, damage
# ----------------------------------------------------------------------------------------------------------------------

LONG = "--long" in sys.argv
AS_ROOT = LINUX and not WINDOWS and not os.geteuid()


@functools.cache
def strace_works():
    """Whether strace is here and may trace."""
    command = ["strace", "-qq", "-o", os.devnull, "-e", "trace=getpid", "true"]
    return has("strace") and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


@functools.cache
def namespaces_work():
    """Whether we may have mounts and PIDs of our own."""
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    return (
        AS_ROOT
        and has("nsenter")
        and has("unshare")
        and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    )


NOT_RUN = {  # commands of README that its test does not run -> why
    "curl -LO URL-OF-THIS-REPOSITORY/raw/main/comfydock.py": "there is no such address before the file is published",
    "comfydock open": "it would open a browser: SmallCommands has a stand-in for one",
    "comfydock logs -f": "it ends with ComfyUI: Logs, LogsOfAllKinds",
    "comfydock create main --use": "it downloads ComfyUI and PyTorch: FromNothingToANode has repositories of its own",
    "comfydock node add comfyui-kjnodes --restart": "it asks the registry: FromNothingToANode has one of its own",
    "comfydock node add --workflow portrait.json": "it asks the registry: AddTest and others have one of their own",
    "comfydock update main": "it fetches ComfyUI: UpdatingComfyUI",
    "comfydock update main --back": "it needs an update before it: UpdatingComfyUI",
    "comfydock autostart on main": "it writes to the system's own service manager: .ci/engines",
    "comfydock generate compose main": "it needs git and a repository of ComfyUI: .ci/engines",
    "comfydock models sdxl --set /data/models": "it needs that folder: OneModelsFolderForMany",
    "comfydock node update": "it needs a registry: ChangeTest",
    "comfydock run --foreground": "it stays: Foreground",
    "comfydock delete sdxl": "it asks at a terminal: DeleteTest",
}


class Readme(Journey):
    """Each command in README, in its order, in the home of somebody who has two ComfyUI folders."""

    text = read(join(HERE, "README.md"))

    def commands(self):
        pieces = re.split(r"^```", self.text, flags=re.MULTILINE)  # prose and blocks in turn
        lines = [line for block in pieces[1::2] if block.startswith("\n") for line in block.splitlines() if line]
        typed = [line.partition("  #")[0].removeprefix("$ ").strip() for line in lines if not line.startswith("{")]
        return typed + re.findall(r"`(comfydock [^`]+)`", " ".join(pieces[0::2]))

    def test_it_is_short_and_the_list_of_what_is_not_run_is_true(self):
        self.assertLessEqual(len(self.text.splitlines()), 190)
        self.assertEqual(set(NOT_RUN) - set(self.commands()), set())

    @unittest.skipIf(WINDOWS, "the venvs are links")
    def test_each_command_in_it_does_what_it_says(self):
        checkout, folder = self.person.checkout, self.person.home
        places = {"~/ComfyUI": checkout(parent="me"), "/workspace/ComfyUI": checkout(parent="pod")}
        here = {"~/sdxl/ComfyUI": checkout(parent="sdxl"), "/usr/bin/python3": sys.executable, "8190": free_port(),
            "8191": free_port()}  # fmt: skip
        for line in self.commands():
            words = [str(here.get(word, word)) for word in shlex.split(line)]
            if words[0] == "cd":
                folder = places[words[1]]
            elif line == "comfydock create main --use":  # by a folder in place of a download
                self.does("create", "main", "--from", checkout(parent="main"), "--use")
            elif line not in NOT_RUN:
                words = words[2:] if words[0] == "python3" else words[1:]
                if words[0] == "run":
                    self.person.types("stop", "--all")
                    words.insert(
                        words.index("--") if "--" in words else len(words), "--auto-port"
                    )  # others run here, too
                done = self.person.types(*words, cwd=folder)
                self.assertIn(
                    done.returncode, (0, 3) if words[0] == "status" else (0,), (line, done.stdout, done.stderr)
                )

    def test_what_is_named_in_the_other_papers_is_there(self):
        known = {name: dir(kind) for name, kind in globals().items() if isinstance(kind, type)}
        paper = read(join(HERE, ".github", "TESTING.md"))
        for name, test in re.findall(r"`([A-Z][a-z]\w+)(?:\.(\w+?)(?:\.\.\.)?)?`", paper):
            self.assertIn(name, known)
            self.assertTrue(not test or any(one.startswith(test) for one in known[name]), (name, test))


class Trouble(Journey):
    """A journey in which something goes wrong, with what most of them ask afterwards."""

    def servers(self):
        """The live ComfyUI processes of this person, the demo's own child processes left out."""
        return [row for row in self.person.processes() if "main.py" in row.text]

    # ComfyUI's log is shown with what stands in it: a server stopped while it starts leaves a traceback that begins in
    # main.py, or in Python's own start.
    TRACEBACK_OF_OURS = (
        r'Traceback \(most recent call last\):\n(?!  File "(?:<frozen (?!runpy)|[^"\n]*[\\/](?:main|site)\.py"))'
    )

    def assertQuiet(self, done, *codes):
        """No traceback and no fault of ours, whatever happened; the exit code is one of `codes`."""
        said = done.stdout + done.stderr
        self.assertNotRegex(said, self.TRACEBACK_OF_OURS)
        self.assertNotIn("Internal error", said)
        self.assertIn(done.returncode, codes, said)
        return said

    def own_mounts(self, script, *options):
        """Have all commands of the person run where the shell `script` was run first; returns a PID inside."""
        command = ["unshare", "--mount", *options, "sh", "-ec", f"{script}\necho ready\nexec cat", "sh",
            self.person.home]  # fmt: skip
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(self.end_keeper, keeper)
        self.assertEqual(keeper.stdout.readline(), b"ready\n")
        inside = keeper.pid
        if options:  # unshare has forked
            inside = eventually(lambda: [row for row in dock.process_table().processes() if row.ppid == keeper.pid])[
                0
            ].pid
        spaces = [f"--mount=/proc/{inside}/ns/mnt", *([f"--pid=/proc/{inside}/ns/pid"] if options else [])]
        self.person.prefix = ["nsenter", *spaces]
        return inside

    def end_keeper(self, keeper):
        self.person.prefix = []
        keeper.stdin.close()
        keeper.stdout.close()
        keeper.wait()


class KilledAnywhere(Trouble):
    """SIGKILL, on Windows TerminateProcess, for comfydock itself; what the next command makes of it."""

    DEEDS = {
        "write", "fsync", "rename", "unlink", "mkdir", "ftruncate", "flock", "vfork", "clone", "clone3", "kill", "wait4", "poll",
        "socket", "bind", "symlink", "rmdir", "link", "exit_group",
    }  # fmt: skip

    def points(self, count, turn, *words):
        """Where to kill a command, which is run once for that: at system calls where strace is, else at moments.

        The first thing done after the call `turn` is always among them.
        """
        chance = random.Random(7)
        trace = join(self.person.home, "trace")
        if strace_works():
            self.person.prefix = ["strace", "-qq", "-o", trace]
        began = time.monotonic()
        self.assertQuiet(self.person.types(*words), 0)
        took = time.monotonic() - began
        self.person.prefix = []
        if not strace_works():
            return [chance.uniform(0, took) for _ in range(70 if LONG else count)]
        calls = self.calls_in(trace)
        deeds = [call for call in calls if call[2]]
        others = [call for call in calls if not call[2]]
        if LONG:
            return deeds + chance.sample(others, min(len(others), 30)) + [chance.uniform(0, took) for _ in range(20)]
        turned = [number for number, call in enumerate(deeds[:-1]) if call[0] == turn]
        telling = [deeds[turned[-1] + 1]] if turned else []
        return [*telling, *chance.sample(deeds, count - 1), chance.choice(others)]

    def calls_in(self, trace):
        """The system calls of a trace from the first look at the workspace on: (name, how manieth, changes something)."""
        counts, calls, begun = {}, [], False
        for line in Path(trace).read_text(encoding="utf-8", errors="replace").splitlines():
            name = re.match(r"\w*", line)[0]
            counts[name] = counts.get(name, 0) + 1
            begun = begun or self.person.workspace in line
            if name and begun:
                calls.append((name, counts[name], name in self.DEEDS or "O_CREAT" in line))
        return calls

    def killed(self, point, *words):
        """Run a command that is killed at a point, a system call or a number of seconds; whether it was."""
        if isinstance(point, float):
            child = self.person.starts(*words)
            try:
                child.wait(point)
                return False
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                return True
        name, number, _ = point
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        self.person.prefix = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={name}", "-e", inject]
        done = self.person.types(*words)
        self.person.prefix = []
        return done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)

    def assertKilled(self, kills, points):
        """Most points were met; of a few some may not come, for how often a command looks is a matter of time."""
        self.assertGreater(kills, len(points) // 2 if LONG else 0)

    def age_leftovers(self):
        """Make what a killed writer left look as old as it will be some day; returns the paths."""
        found = glob.glob(join(glob.escape(self.person.workspace), "**", "*.tmp"), recursive=True)
        found += glob.glob(join(glob.escape(self.person.workspace), "**", ".*.tmp"), recursive=True)
        for path in found:
            os.utime(path, (1, 1))
        return found

    def log_bytes(self):
        with contextlib.suppress(FileNotFoundError):
            return Path(self.person.workspace, "logs", "demo", "comfyui.log").read_bytes()
        return b""

    def check(self, port, before):
        """After a kill: state whole or absent, one ComfyUI at most, and the next commands put all in order."""
        path = self.person.state_file()
        self.assertTrue(dock.read_state(path) is not None or not os.path.exists(path))
        self.assertLessEqual(len(self.servers()), 1)
        self.assertTrue(self.log_bytes().startswith(before))
        self.age_leftovers()
        done = self.person.types("run", "--demo", "--port", port)
        said = self.assertQuiet(done, 0, 1)
        self.assertIn(f"http://127.0.0.1:{port}" if done.returncode == 0 else "already running", said)
        [row] = self.servers()
        self.assertEqual(self.person.state()["pid"], row.pid)
        self.assertEqual(self.age_leftovers(), [])
        log = self.log_bytes()
        self.assertTrue(log.startswith(before))
        self.assertIn(self.person.state()["run_id"].encode(), log)

    def sweep(self, command, count, turn):
        """Kill `command` at many points, each time from the same beginning."""
        port = str(free_port())
        words = ["run", "--demo", "--port", port] if command == "run" else ["-e", "demo", command]
        self.assertQuiet(self.person.types("run", "--demo", "--port", port), 0)
        if command == "run":
            self.assertQuiet(self.person.types("stop", "--kill"), 0)
        points, kills = self.points(count, turn, *words), 0
        if command == "stop":
            self.assertQuiet(self.person.types("run", "--demo", "--port", port), 0)
        for point in points:
            with self.subTest(command=command, point=point):
                if command == "run":
                    self.assertQuiet(self.person.types("stop", "--kill"), 0)
                before = self.log_bytes()
                kills += self.killed(point, *words)
                self.check(port, before)
        self.assertQuiet(self.person.types("stop", "--kill"), 0)
        self.assertEqual((self.servers(), self.person.state()), ([], None))
        self.assertKilled(kills, points)

    def test_run_killed_anywhere(self):
        self.sweep("run", 3, "vfork")

    def test_stop_killed_anywhere(self):
        self.sweep("stop", 1, "kill")

    def test_restart_killed_anywhere(self):
        self.sweep("restart", 2, "kill")

    def test_logs_rotate_killed_anywhere(self):
        """ComfyUI goes on, and every line that it ever wrote is in one of the logs, once."""
        person, words = self.person, ["-e", "demo", "logs", "--rotate", "--keep", "300"]
        port = str(free_port())
        done = person.types("run", "--demo", "--json", "--port", port, "--wait", COMFYDOCK_DEMO_SPAM="300:100")
        self.assertQuiet(done, 0)
        pid, kills = person.state()["pid"], 0
        points = self.points(2, "kill", *words)
        for point in points:
            with self.subTest(point=point):
                kills += self.killed(point, *words)
                self.assertQuiet(person.types("-e", "demo", "status"), 0)
                self.assertEqual((person.state()["pid"], person.state()["phase"]), (pid, "running"))
                eventually(lambda: dock.process_table().process(pid).state == "running")
        self.assertEqual(http_status(json.loads(done.stdout)["data"]["port"]), 200)
        self.assertQuiet(person.types("stop"), 0)
        log = join(person.workspace, "logs", "demo", "comfyui.log")
        kept = b"".join(Path(name).read_bytes() for name in [*dock.old_logs(log), log])
        numbers = [int(number) for number in re.findall(rb"^spam (\d+)", kept, re.M)]
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertKilled(kills, points)

    @unittest.skipUnless(can_link(), "needs links, which Wine does not make")
    def test_node_add_killed_anywhere(self):
        person = self.person
        person.environment("a")
        node = join(person.home, "work", "my-node")
        os.makedirs(node)
        Path(node, "__init__.py").write_text("", encoding="utf-8")
        words = ["-e", "a", "node", "add", node, "--dev"]
        points, kills = self.points(1, "symlink", *words), 0
        self.assertQuiet(person.types("-e", "a", "node", "remove", "my-node"), 0)
        for point in points:
            with self.subTest(point=point):
                kills += self.killed(point, *words)
                self.assertQuiet(person.types("-e", "a", "node", "list"), 0)
                self.assertQuiet(person.types("-e", "a", "repair", "-y"), 0)
                data = person.status("-e", "a")
                self.assertTrue(data["difference"]["synced"], data)
                listed = json.loads(person.types("-e", "a", "node", "list", "--json").stdout)["data"]["nodes"]
                if listed:
                    self.assertQuiet(person.types("-e", "a", "node", "remove", "my-node"), 0)
                custom_nodes = join(person.home, "a", "ComfyUI", "custom_nodes")
                self.assertEqual([name for name in os.listdir(custom_nodes) if name.startswith(".")], [])
                self.assertTrue(os.path.exists(join(node, "__init__.py")))
        self.assertKilled(kills, points)


class ManyAtOnce(Trouble):
    def test_sixteen_people_who_run_stop_restart_and_look(self):
        port, chance = str(free_port()), random.Random()
        words = [["run", "--demo", "--port", port], ["-e", "demo", "stop"], ["-e", "demo", "restart"], ["-e", "demo", "status", "--json"],
                 ["list"], ["-e", "demo", "logs", "-n", "3"]]  # fmt: skip
        self.assertQuiet(self.person.types(*words[0]), 0)
        deadline = time.monotonic() + (20 if LONG else 3)
        done, seen = [], []

        def somebody():
            while time.monotonic() < deadline:
                done.append(self.person.types(*chance.choice(words), seconds=120))

        def watcher():
            while time.monotonic() < deadline:
                seen.append([row.pid for row in self.servers()])
                time.sleep(0.01)

        threads = [threading.Thread(target=work) for work in (*[somebody] * 16, watcher)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertGreater(len(done), 4)
        for one in done:
            self.assertQuiet(one, 0, 1, 3)
        self.assertLessEqual(max(map(len, seen)), 1, seen)
        rows, data = self.servers(), self.person.status("-e", "demo")
        self.assertEqual([data["pid"]] if data["pid"] else [], [row.pid for row in rows])
        self.assertEqual(data["note"], None)
        self.assertQuiet(self.person.types("-e", "demo", "stop"), 0)
        self.assertEqual((self.servers(), self.person.state()), ([], None))

    def test_a_reader_sees_no_half_of_a_change(self):
        self.start_demo()
        environment = self.environment_of_person()
        real = dock.comfyui_processes
        old = environment._read_state()

        def restarted_meanwhile(*words):
            if environment._read_state() == old:
                self.assertQuiet(self.person.types("restart"), 0)
            return real(*words)

        dock.signal_process(old.pid, "kill")
        eventually(lambda: not alive(old.pid))
        with patch.object(dock, "comfyui_processes", restarted_meanwhile):
            snapshot = environment.observe()
        self.assertEqual(
            (snapshot.state, snapshot.note, snapshot.process.pid), ("running", "", self.person.state()["pid"])
        )


class DisksAndFolders(Trouble):
    def filled(self):
        """A workspace on a disk of 1 MB that the demo has run on once, now full; returns (port, its path from outside)."""
        inside = self.own_mounts('mkdir "$1/.comfydock"; mount -t tmpfs -o size=1m tmpfs "$1/.comfydock"')
        port = str(free_port())
        self.assertQuiet(self.person.types("run", "--demo", "--port", port), 0)
        return port, f"/proc/{inside}/root{self.person.workspace}"

    def fill(self, workspace):
        with contextlib.suppress(OSError), open(join(workspace, "fill"), "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))

    def test_a_full_disk_stops_no_stop_and_orphans_nobody(self):
        if not namespaces_work():
            self.skipTest("needs root, unshare and nsenter for a small disk")
        port, workspace = self.filled()
        state = join(workspace, "environments", "demo", ".cec", ".comfyui.state")
        pid = json.loads(read(state))["pid"]
        self.fill(workspace)
        before = Path(state).read_bytes()
        self.assertIn(f"PID: {pid}", self.assertQuiet(self.person.types("-e", "demo", "status"), 0))
        self.assertClear(self.person.types("-e", "demo", "restart"), 1, "No space left on device", ".comfyui.state")
        self.assertTrue(alive(pid), "it was stopped though it cannot be started again")
        self.assertEqual(Path(state).read_bytes(), before)
        self.assertQuiet(self.person.types("-e", "demo", "stop"), 0)
        self.assertEqual((alive(pid), os.path.exists(state)), (False, False))
        self.fill(workspace)
        self.assertClear(self.person.types("run", "--demo", "--port", port), 1, "No space left on device")
        self.assertEqual((self.servers(), os.path.exists(state)), ([], False))
        self.assertIn("To see the GUI", self.person.types("-e", "demo", "logs").stdout)
        self.assertEqual(glob.glob(join(glob.escape(workspace), "**", "*.tmp"), recursive=True), [])

    def test_each_write_that_fails_while_starting_leaves_all_as_it_was(self):
        if not strace_works():
            self.skipTest("needs strace, and leave to trace")
        port = str(free_port())
        self.assertQuiet(self.person.types("run", "--demo", "--port", port), 0)
        self.assertQuiet(self.person.types("stop"), 0)
        for call, error, number in (("fsync", "ENOSPC", 1), ("fsync", "EIO", 3), ("rename", "EACCES", 2),
                                    ("vfork,clone,clone3", "EAGAIN", 1)):  # fmt: skip
            with self.subTest(call=call, number=number):
                self.person.prefix = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e",
                                      f"inject={call}:error={error}:when={number}"]  # fmt: skip
                done = self.person.types("run", "--demo", "--port", port)
                self.person.prefix = []
                self.assertClear(done, 1)
                self.assertLessEqual(len(done.stderr.strip().splitlines()), 2, done.stderr)  # with what to do about it
                self.assertEqual((self.servers(), self.person.state()), ([], None))
                self.assertEqual(glob.glob(self.person.state_file().replace(".comfyui.state", "*.tmp")), [])

    def test_a_read_only_disk_stops_no_stop(self):
        if not namespaces_work():
            self.skipTest("needs root, unshare and nsenter for a read-only disk")
        port, workspace = self.filled()
        [row] = self.servers()
        again = [self.person.workspace, self.person.workspace]
        subprocess.run([*self.person.prefix, "mount", "--bind", "-o", "ro", *again], check=True)
        self.assertIn(f"PID: {row.pid}", self.assertQuiet(self.person.types("-e", "demo", "status"), 0))
        self.assertClear(self.person.types("-e", "demo", "restart"), 1, "Read-only file system")
        self.assertEqual([one.pid for one in self.servers()], [row.pid])
        done = self.person.types("-e", "demo", "stop")
        self.assertClear(done, 1, "ComfyUI was stopped, but its record", "Read-only file system")
        self.assertEqual(self.servers(), [])
        self.assertClear(self.person.types("run", "--demo", "--port", port), 1, "Read-only file system")
        self.assertEqual(self.servers(), [])
        self.assertTrue(os.path.exists(join(workspace, "logs", "demo", "comfyui.log")))
        subprocess.run([*self.person.prefix, "umount", self.person.workspace], check=True)
        self.assertQuiet(self.person.types("-e", "demo", "stop"), 0)
        subprocess.run([*self.person.prefix, "mount", "--bind", "-o", "ro", *again], check=True)
        self.assertIn("is not running", self.assertQuiet(self.person.types("-e", "demo", "stop"), 0))

    def test_folders_without_permission_are_named(self):
        plain = shutil.which("python3", path="/usr/bin:/bin")
        if not (AS_ROOT and has("setpriv") and plain):
            self.skipTest("needs root, setpriv and a python3 that others may run")
        person, port = self.person, str(free_port())
        copy = join(person.home, "comfydock.py")
        shutil.copy(MODULE, copy)
        os.chown(person.home, 65534, 65534)
        person.command = lambda *words: ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", plain, copy,
            *words]  # fmt: skip
        self.assertQuiet(person.types("run", "--demo", "--port", port), 0)
        [row] = self.servers()
        cec, logs = os.path.dirname(person.state_file()), join(person.workspace, "logs", "demo")
        os.chmod(cec, 0o500)
        self.addCleanup(os.chmod, cec, 0o700)
        self.assertClear(person.types("-e", "demo", "restart"), 1, ".comfyui.state: Permission denied")
        self.assertTrue(alive(row.pid))
        os.chmod(cec, 0o700)
        self.assertQuiet(person.types("-e", "demo", "stop"), 0)
        os.chmod(logs, 0o500)
        os.remove(join(logs, "comfyui.log"))
        self.assertClear(person.types("run", "--demo", "--port", port), 1, "comfyui.log: Permission denied")
        self.assertEqual((self.servers(), person.state()), ([], None))

    @unittest.skipIf(WINDOWS, "Windows keeps files that are in use")
    def test_a_log_folder_removed_while_it_runs(self):
        data = self.run_demo()
        follower = self.person.starts("logs", "-f")
        read_until(follower, "To see the GUI")
        shutil.rmtree(join(self.person.workspace, "logs"))
        self.assertIn(f"PID: {data['pid']}", self.assertQuiet(self.person.types("status"), 0))
        self.assertClear(self.person.types("logs"), 1, "No log file found.")
        self.assertQuiet(self.person.types("restart"), 0)
        self.assertFalse(alive(data["pid"]))
        eventually(lambda: read(follower.said).count("=== comfydock session") == 2)
        shutil.rmtree(join(self.person.workspace, "logs"))
        self.assertQuiet(self.person.types("stop"), 0)
        self.assertEqual((self.servers(), self.person.state()), ([], None))
        self.assertNotIn("Traceback", read(follower.said))

    @unittest.skipIf(WINDOWS, "Windows knows the home folder without variables")
    def test_no_home_and_no_folder_to_stand_in(self):
        self.assertClear(self.person.types("run", "--demo", HOME=""), 1, "No home folder is known", "COMFYDOCK_HOME")
        self.assertClear(self.person.types("status", HOME="not/absolute"), 1, "No home folder is known")
        data = self.start_demo()
        gone = join(self.person.home, "gone")
        self.person.prefix = ["sh", "-c", 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"', gone]
        self.assertIn(f"PID: {data['pid']}", self.assertQuiet(self.person.types("status"), 0))
        self.assertQuiet(self.person.types("restart"), 0)
        self.assertQuiet(self.person.types("stop", HOME="", COMFYDOCK_HOME=self.person.workspace), 0)
        self.assertEqual(self.servers(), [])

    def test_no_home_that_anybody_knows(self):
        plain = shutil.which("python3", path="/usr/bin:/bin")
        if not (AS_ROOT and has("setpriv") and plain):
            self.skipTest("needs root, setpriv and a python3 that others may run")
        code = "import sys; sys.path.insert(0, sys.argv.pop()); import comfydock; sys.exit(comfydock.main())"
        shutil.copy(MODULE, join(self.person.home, "comfydock.py"))
        os.chmod(self.person.home, 0o755)
        command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", plain, "-B", "-c", code, "list",
            self.person.home]  # fmt: skip
        done = subprocess.run(
            command, env={"PATH": os.environ["PATH"]}, cwd="/", capture_output=True, text=True, timeout=60
        )
        self.assertClear(done, 1, "No home folder is known", "COMFYDOCK_HOME")


class TimeAndIdentity(Trouble):
    @unittest.skipUnless(LINUX, "needs start ticks; elsewhere only the wall clock tells")
    def test_a_clock_moved_by_hours_changes_neither_life_nor_uptime(self):
        data = self.run_demo()
        code = "import sys, time; real, shift = time.time, float(sys.argv.pop(1)); time.time = lambda: real() + shift\n" \
            "import comfydock; sys.exit(comfydock.main())"  # fmt: skip
        for hours in (-30, 5):
            words = [sys.executable, "-c", code, str(hours * 3600), "-e", "demo", "status", "--json"]
            done = subprocess.run(
                words, cwd=HERE, env=self.person.variables, capture_output=True, text=True, timeout=60
            )
            seen = json.loads(done.stdout)["data"]
            self.assertEqual((seen["state"], seen["pid"], seen["note"]), ("running", data["pid"], None))
            self.assertTrue(0 <= seen["uptime"] < 120, seen["uptime"])
            self.assertClear(
                subprocess.run(
                    [*words[:4], "run", "--demo"], cwd=HERE, env=self.person.variables, capture_output=True, text=True
                ),
                1,
                f"already running (PID {data['pid']}",
            )

    @unittest.skipUnless(dock.this_machine()["machine"], "needs a machine with an id")
    def test_a_boot_since_then_is_known(self):
        if not namespaces_work():
            self.skipTest("needs root, unshare and nsenter for another boot id")
        data = self.run_demo()
        self.own_mounts('echo another-boot > "$1/boot"; mount --bind "$1/boot" /proc/sys/kernel/random/boot_id')
        os.kill(data["pid"], signal.SIGKILL)
        eventually(lambda: not alive(data["pid"]))
        self.assertIn("Stopped (the machine was restarted since)", self.assertQuiet(self.person.types("status"), 3))
        self.assertIn("To see the GUI", self.person.types("logs").stdout)
        self.assertQuiet(self.person.types("stop"), 0)
        self.assertIsNone(self.person.state())
        self.assertIn("To see the GUI", self.person.types("logs").stdout)

    def left_by_a_crash(self):
        """A ComfyUI that was killed, and a process with its marker and command line: its PID in the record, and that one."""
        data = self.run_demo()
        state = self.person.state()
        dock.signal_process(data["pid"], "kill")
        eventually(lambda: not alive(data["pid"]))
        again = subprocess.Popen(
            state["command"], cwd=state["cwd"], env={**self.person.variables, "COMFYDOCK_RUN_ID": state["run_id"]},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.person.children.append(again)
        eventually(lambda: http_status(data["port"]) == 200)
        return data, again

    @unittest.skipUnless(WINDOWS, "elsewhere ComfyUI keeps its PID")
    def test_one_that_goes_on_under_another_pid_is_found_again(self):
        data, again = self.left_by_a_crash()
        seen = self.person.status()
        self.assertEqual((seen["pid"], seen["state"], seen["port"]), (again.pid, "running", data["port"]))
        self.assertIn("(it has restarted itself under another PID)", self.person.types("status").stdout)
        self.assertClear(self.person.types("run", "--demo"), 1, f"already running (PID {again.pid}")
        self.assertEqual(self.person.state()["pid"], again.pid)
        self.assertIsNone(self.person.status()["note"])
        self.assertQuiet(self.person.types("stop"), 0)
        self.assertIsNotNone(again.wait(20))

    @unittest.skipIf(WINDOWS, "there it may be ComfyUI itself")
    def test_what_a_crash_left_is_named_and_ended_before_the_next_start(self):
        for words in (("run", "--demo"), ("restart",), ("stop",), ("repair", "--orphan")):
            with self.subTest(words=words):
                data, again = self.left_by_a_crash()
                seen = self.person.status()
                self.assertEqual((seen["state"], [relic["pid"] for relic in seen["relics"]]), ("crashed", [again.pid]))
                self.assertIn(f"Left over: PID {again.pid}", self.person.types("status").stdout)
                self.does(*words)
                self.assertIsNotNone(again.wait(20))
                self.person.types("stop")

    @unittest.skipIf(WINDOWS or os.geteuid(), "needs root, who can give a file to another user")
    def test_a_record_of_another_user_starts_nothing(self):
        data = self.run_demo()
        record = Path(self.person.state_file())
        state = {**self.person.state(), "env": {"PYTHONSTARTUP": "/planted"}}
        self.assertQuiet(self.person.types("stop"), 0)
        last = record.with_name(".comfyui.last")
        last.write_text(json.dumps(state), encoding="utf-8")
        os.chown(last, 4242, 4242)
        self.assertClear(self.person.types("restart"), 1, "belongs to another user (uid 4242)", "run")
        self.assertFalse(http_status(data["port"]))
        os.chown(last, 0, 0)
        self.assertQuiet(self.person.types("restart"), 0)

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_who_only_writes_to_the_log_is_named_and_left_alone(self):
        self.run_demo()
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        with open(log, "ab") as file:
            browser = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=file)
        self.person.children.append(browser)
        with open(log, "rb") as reader:
            done = self.assertQuiet(self.person.types("stop"), 0)
            self.assertNotIn(f"PID {os.getpid()} ", done, reader)
        self.assertIn(f"Left alone: PID {browser.pid}", done)
        self.assertIsNone(browser.poll())
        browser.communicate()

    def test_another_environments_comfyui_in_the_record_is_never_signalled(self):
        data = self.run_demo()
        self.person.environment("a")
        for identity in ({}, {**self.person.state()["identity"], "start_ticks": 1, "created": 1.0}):
            state = {**self.person.state(), "identity": identity}
            Path(self.person.state_file("a")).write_text(json.dumps(state), encoding="utf-8")
            self.assertQuiet(self.person.types("-e", "a", "status"), 3)
            self.assertIn("not running", self.assertQuiet(self.person.types("-e", "a", "stop"), 0))
            self.assertEqual((alive(data["pid"]), http_status(data["port"])), (True, 200))


class Exhausted(Trouble):
    def test_who_may_open_too_few_files_takes_nobody_for_dead(self):
        if not LINUX or not has("prlimit"):
            self.skipTest("needs prlimit")
        data = self.run_demo()
        self.person.prefix = ["prlimit", "--nofile=5:5"]
        for words in (("status",), ("run",), ("stop",), ("repair", "-y")):
            done = self.person.types("-e", "demo", *words)
            self.assertNotIn("not running", done.stdout + done.stderr)
            self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertClear(done, 1, "Too many open files", "ulimit -n")
        self.assertTrue(alive(data["pid"]))
        self.person.prefix = ["prlimit", "--nofile=20:20"]
        self.assertQuiet(self.person.types("-e", "demo", "stop"), 0)

    def test_without_another_thread_all_goes_on_or_one_line_says_why(self):
        if not strace_works() or not has("git"):
            self.skipTest("needs strace, and git for a command to run")
        self.run_demo()
        clone = join(self.person.home, "clone")
        os.mkdir(clone)
        git(clone, "init", "--quiet")
        self.person.prefix = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=clone,clone3", "-e",
            "inject=clone,clone3:error=EAGAIN"]  # fmt: skip
        for words, code in ((("status",), 0), (("list",), 0), (("stop",), 0), (("node", "add", clone, "--dev"), 1)):
            done = self.person.types("-e", "demo", *words)
            self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn("ulimit -u", done.stderr)

    def test_what_is_written_can_be_read_a_record_of_64_mb_too(self):
        data = self.run_demo()
        state = self.person.state()
        for size, is_read in ((60, True), (70, False)):
            record = json.dumps({**state, "later": "x" * (size << 20)})
            Path(self.person.state_file()).write_text(record, encoding="utf-8")
            done = self.person.types("-e", "demo", "status")
            self.assertIn(f"PID: {data['pid']}", self.assertQuiet(done, 0))
            self.assertEqual("tracked" not in done.stdout, is_read, done.stdout)
        self.assertQuiet(self.person.types("-e", "demo", "stop"), 0)


class LogsOfAllKinds(Trouble):
    @unittest.skipUnless(LINUX, "reads /proc")
    def test_a_log_that_logrotate_moved_is_found_and_put_right(self):
        self.start_demo(COMFYDOCK_DEMO_SPAM="20")
        log = Path(self.person.workspace, "logs", "demo", "comfyui.log")
        eventually(lambda: log.read_text("utf-8").count("spam") > 2)
        os.rename(log, f"{log}.1")
        log.touch()
        done = self.person.types("logs", "-n", "2")
        self.assertIn(f"ComfyUI writes to {log}.1", done.stderr)
        self.assertEqual(done.stdout.count("spam"), 2)
        self.does("logs", "--rotate")
        self.assertFalse(os.path.exists(f"{log}.1"))
        numbers = [int(number) for number in re.findall(r"spam (\d+)", read(f"{log}.old"))]
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        eventually(lambda: f"spam {len(numbers) + 1} " in log.read_text("utf-8"))
        self.assertEqual(self.person.types("logs", "-n", "2").stderr, "")

    LITTLE_MEMORY = ["sh", "-c", 'ulimit -v 200000; exec "$@"', "sh"]

    @unittest.skipUnless(LINUX, "needs files with holes and limits of memory")
    def test_two_gigabytes_take_little_memory_and_time(self):
        self.start_demo()
        self.assertQuiet(self.person.types("stop"), 0)
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        os.truncate(log, 2 << 30)  # NULs without a line's end
        with open(log, "ab") as file:
            file.write(b"\nlast but one\nlast\n")
        self.person.prefix = self.LITTLE_MEMORY
        self.assertEqual(self.person.types("logs", "-n", "2").stdout, "last but one\nlast\n")
        self.assertQuiet(self.person.types("status"), 3)
        if not LONG:
            os.truncate(log, 250 << 20)  # more than the memory that it may have
        self.person.prefix = ["sh", "-c", 'ulimit -v 200000; "$@" | wc -c', "sh"]
        done = self.person.types("logs", "--all", "--raw")
        self.assertEqual((int(done.stdout), done.stderr), (os.path.getsize(log), ""))

    def numbers(self, child):
        text = Path(child.said).read_text(encoding="utf-8", errors="replace")
        return [int(number) for number in re.findall(r"^spam (\d+)", text, re.M)]

    def rest(self, pid, child, log):
        """Stand ComfyUI still until its log is shown to the end."""
        pause(pid)
        last = Path(log).read_bytes()[-12:]
        eventually(lambda: Path(child.said).read_bytes().endswith(last), pause=0.1)

    def test_followed_through_truncation_and_rotation_no_line_is_lost_or_doubled(self):
        data = self.run_demo("--set-env", "COMFYDOCK_DEMO_SPAM=200")
        log = data["log"]
        child = self.person.starts("logs", "-f", "-n", "100000")
        for _ in range(3):
            eventually(lambda: b"spam" in Path(log).read_bytes())
            self.rest(data["pid"], child, log)
            os.truncate(log, 0)
            dock.signal_process(data["pid"], "continue")
        eventually(lambda: b"spam" in Path(log).read_bytes())
        self.rest(data["pid"], child, log)
        first = self.numbers(child)
        self.assertEqual(first, list(range(1, len(first) + 1)))
        with open(log, "ab") as file:
            file.write(b"filler\n" * (dock.LOG_LIMIT // 7 + 1))
        self.assertQuiet(self.person.types("restart"), 0)
        self.assertTrue(os.path.exists(log + ".old"))
        pid = self.person.state()["pid"]
        eventually(lambda: b"spam" in Path(log).read_bytes())
        self.rest(pid, child, log)
        more = self.numbers(child)[len(first) :]
        again = more.index(1)
        self.assertEqual(more[:again], list(range(len(first) + 1, len(first) + 1 + again)))
        self.assertEqual(more[again:], list(range(1, len(more) - again + 1)))
        self.assertEqual(Path(child.said).read_bytes().count(b"filler\n"), dock.LOG_LIMIT // 7 + 1)
        dock.signal_process(pid, "continue")
        self.assertQuiet(self.person.types("stop"), 0)
        self.assertEqual(child.wait(30), 0)

    def test_a_log_that_grows_without_pause_keeps_nobody_from_stopping(self):
        child = self.person.starts(
            "run", "--demo", "--foreground", "--port", str(free_port()), COMFYDOCK_DEMO_SPAM="100000:20000"
        )
        eventually(lambda: os.path.getsize(child.said) > 1 << 20)  # never read: it may be gigabytes by then
        dock.signal_process(child.pid, "interrupt")
        self.assertEqual(child.wait(60), 0)
        self.assertEqual((self.servers(), self.person.state()), ([], None))


class ServersOfAllKinds(Trouble):
    def test_whatever_answers_on_the_port_status_comes_in_time_and_takes_little_memory(self):
        data = self.start_demo(COMFYDOCK_DEMO_START_SECONDS="300")
        environment = self.environment_of_person()
        redirect = saying(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/system_stats\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\n"
        cases = {
            "hung": lambda connection: connection.recv(4096) and connection.recv(4096), "dripping": dripping, "endless": endless,
            "garbage": saying(os.urandom(5000)), "redirect": redirect, "huge length": saying(head + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}"),
            "no end of head": saying(head + b"X: y\r\n" * 100000), "not JSON": saying(head + b"\r\n" + b"\xff" * 100),
        }  # fmt: skip
        for name, answer in cases.items():
            with self.subTest(server=name), listening(data["port"], answer):
                tracemalloc.start()
                began = time.monotonic()
                report = environment.report(timeout=0.4)
                took = time.monotonic() - began
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                self.assertEqual((report["pid"], report["health"] == "healthy"), (data["pid"], False))
                self.assertLess(peak, 16 << 20)
                self.assertLess(took, 3)
        with listening(data["port"], endless):
            self.person.prefix = LogsOfAllKinds.LITTLE_MEMORY if LINUX else []
            self.assertIn(f"PID: {data['pid']}", self.assertQuiet(self.person.types("status"), 0))
        self.assertQuiet(self.person.types("stop"), 0)

    def test_no_proxy_is_asked(self):
        asked = []
        with listening(answer=asked.append) as proxy:
            variables = {name: f"http://127.0.0.1:{proxy}"
                for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY")}  # fmt: skip
            self.run_demo(**variables)
            done = self.person.types("status", "--json", **variables)
        self.assertEqual((json.loads(done.stdout)["data"]["health"], asked), ("healthy", []))


@unittest.skipIf(WINDOWS, "links need rights on Windows")
class PlantedByOthers(Trouble):
    def test_links_at_the_log_the_record_and_the_lock_are_not_followed(self):
        person, port = self.person, str(free_port())
        self.assertQuiet(person.types("run", "--demo", "--port", port), 0)
        self.assertQuiet(person.types("stop"), 0)
        precious = join(person.home, "precious")
        log = join(person.workspace, "logs", "demo", "comfyui.log")
        places = [log, person.state_file(), join(os.path.dirname(person.state_file()), ".comfyui.lock"),
                  join(person.workspace, ".metadata", "workspace.json"), join(person.workspace, ".metadata", ".workspace.lock")]  # fmt: skip
        for place in places:
            for target in [precious, join(person.home, "not there")][: None if LONG else 1]:
                with self.subTest(place=place, target=target):
                    Path(precious).write_bytes(b"precious")
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(place, place + ".kept")
                    os.symlink(target, place)
                    reads_it = ["list"] if place.endswith("workspace.json") else ["run", "--demo", "--port", port]
                    self.assertClear(person.types(*reads_it), 1, place, "is a link")
                    self.assertQuiet(person.types("-e", "demo", "stop"), 0, 1)
                    self.assertEqual((Path(precious).read_bytes(), self.servers()), (b"precious", []))
                    self.assertFalse(os.path.lexists(join(person.home, "not there")))
                    if os.path.lexists(place):
                        os.remove(place)
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(place + ".kept", place)

    def test_pipes_devices_and_giants_in_place_of_our_files_are_one_clear_line_and_hold_nobody_up(self):
        person, port = self.person, str(free_port())
        self.start_demo()
        cec, metadata = os.path.dirname(person.state_file()), join(person.workspace, ".metadata")
        log = join(person.workspace, "logs", "demo", "comfyui.log")
        places = [person.state_file(), log, join(cec, "pyproject.toml"), join(metadata, "workspace.json")]
        places += [join(cec, name) for name in (".comfyui.lock", ".comfyui.last", ".manifest.json")]
        commands = [["run", "--demo", "--port", port], ["logs", "-n", "5"], ["status"], ["stop", "--timeout", "3"]]
        commands += [["logs", "--rotate"], ["list"], ["repair"], ["restart"]]
        in_turn = itertools.cycle(commands)

        def giant(path):
            with open(path, "wb") as file:
                file.truncate(64 << 20)

        for make in (os.mkfifo, giant):
            for place in places:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(place, place + ".kept")
                make(place)
                for words in commands if LONG else itertools.islice(in_turn, 2):
                    with self.subTest(make=make.__name__, place=os.path.basename(place), words=words):
                        self.assertQuiet(person.types("-e", "demo", *words, seconds=30), 0, 1, 3)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place)
                with contextlib.suppress(FileNotFoundError):
                    os.rename(place + ".kept", place)
                person.types("-e", "demo", "stop", "--kill")

    def test_a_rotation_leaves_the_target_of_a_link_whole(self):
        data, precious = self.run_demo(), join(self.person.home, "precious")
        Path(precious).write_bytes(b"precious")
        os.unlink(data["log"])
        os.symlink(precious, data["log"])
        self.assertClear(self.person.types("-e", "demo", "logs", "--rotate"), 1, data["log"])
        self.assertEqual(Path(precious).read_bytes(), b"precious")

    def test_names_of_others_neither_drive_a_terminal_nor_forge_a_line(self):
        self.run_demo()
        environments = join(self.person.workspace, "environments")
        signs = ("\n✓ ComfyUI stopped", "\r✓ ComfyUI stopped", "\x1b]0;owned\a", "\u202etxt.exe", "\u2066x", "\x9b31m",
            "\u2028✓ ComfyUI stopped", "\udcff")  # fmt: skip
        for number, sign in enumerate(signs):
            os.makedirs(join(environments, f"e{number}{sign}", ".cec"))
            os.makedirs(join(environments, "demo", "ComfyUI", "custom_nodes", f"n{number}{sign}"))
        for words in (["list"], ["-e", "demo", "status"], ["-e", "demo", "repair"], ["-e", "demo", "node", "list"],
            ["-e", "demo", "node", "track", *(f"n{number}{sign}" for number, sign in enumerate(signs))]):  # fmt: skip
            with self.subTest(words=words[:3]):
                done = self.person.types(*words)
                said = done.stdout + done.stderr
                self.assertNotIn("Internal error", said)
                self.assertEqual([sign for sign in "\r\x1b\x07\x9b\u202e\u2066\u2028" if sign in said], [])
                self.assertFalse([line for line in said.splitlines() if line.startswith("✓ ComfyUI stopped")])

    def test_a_link_where_the_old_log_goes_is_replaced(self):
        log = join(self.person.workspace, "logs", "demo", "comfyui.log")
        os.makedirs(os.path.dirname(log))
        Path(log).write_bytes(b"earlier\n" * (2 * 1024 * 1024))
        precious = join(self.person.home, "precious")
        Path(precious).write_bytes(b"precious")
        os.symlink(precious, log + ".old")
        self.start_demo()
        self.assertEqual((Path(precious).read_bytes(), os.path.islink(log + ".old")), (b"precious", False))

    def test_a_workspace_that_everybody_may_write_into_is_warned_of_once(self):
        person, port = self.person, str(free_port())
        self.assertEqual(person.types("run", "--demo", "--port", port).stderr, "")
        self.assertQuiet(person.types("stop"), 0)
        for folder in (person.workspace, os.path.dirname(person.state_file()), join(person.workspace, "logs", "demo")):
            with self.subTest(folder=folder):
                os.chmod(folder, 0o777)
                done = person.types("run", "--demo", "--port", port)
                self.assertQuiet(done, 0)
                self.assertRegex(done.stderr, r"\A⚠ Other users may write into [^\n]+\n\Z")
                self.assertIn(f"{folder}, and", done.stderr)
                self.assertEqual(person.types("stop").stderr, "")
                os.chmod(folder, 0o755)


class TerminalsAndPipes(Trouble):
    HEARING = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def on_a_terminal(self, *words):
        """Run a command as the leader of a terminal of its own; returns (PID, our end of the terminal)."""
        import pty

        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.person.home)
            command = self.person.command(*words)
            os.execve(command[0], command, self.person.variables)
        return pid, terminal

    def read_terminal(self, terminal, text):
        said = b""
        while text not in said:
            said += os.read(terminal, 4096)

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_a_closed_terminal_stops_what_runs_in_its_foreground_and_nothing_else(self):
        port = str(free_port())
        pid, terminal = self.on_a_terminal("run", "--demo", "--foreground", "--port", port)
        self.read_terminal(terminal, b"To see the GUI")
        os.close(terminal)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 129)
        self.assertEqual((self.servers(), self.person.state()), ([], None))
        self.assertIn("Stopped server", self.person.log())
        data = self.run_demo()
        for words in (["logs", "-f"], ["run", "--demo", "--port", port]):
            pid, terminal = self.on_a_terminal(*words)
            os.read(terminal, 1)
            os.close(terminal)
            os.waitpid(pid, 0)
            self.assertTrue(alive(data["pid"]))
        self.assertEqual(self.person.status()["state"], "running")

    @unittest.skipIf(WINDOWS, "no pseudo-terminals on Windows")
    def test_a_terminal_closed_while_it_starts_leaves_one_comfyui_at_most(self):
        pid, terminal = self.on_a_terminal("run", "--demo", "--foreground", "--port", str(free_port()))
        os.read(terminal, 1)
        os.close(terminal)
        self.assertIn(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (129, -signal.SIGHUP))
        self.assertQuiet(self.person.types("-e", "demo", "status"), 0, 3)
        self.assertLessEqual(len(self.servers()), 1)
        self.assertQuiet(self.person.types("-e", "demo", "stop", "--kill"), 0)
        self.assertEqual(self.servers(), [])

    def test_a_terminal_that_is_gone_before_its_signal_comes_is_a_hangup(self):
        self.start_demo()
        gone = OSError(errno.EIO, "Input/output error")
        calls = {"buffer.write.side_effect": gone, "write.side_effect": gone, "isatty.return_value": False}
        out = Mock(encoding="utf-8", **calls)
        watcher = dock.Foreground(dock.Console(out, out, None), self.environment_of_person(), [])
        with patch.object(dock, "forget_output"):
            self.assertEqual(watcher.watch(), 129)
        self.assertEqual((self.servers(), self.person.state()), ([], None))

    def test_ctrl_c_twice_is_130_without_a_traceback_and_comfyui_lives(self):
        self.person.prefix = [] if WINDOWS else [sys.executable, "-c", self.HEARING]
        port = str(free_port())
        waiting = self.person.starts("run", "--demo", "--port", port, "--wait", COMFYDOCK_DEMO_START_SECONDS="300",
            COMFYDOCK_DEMO_IGNORE="INT,TERM")  # fmt: skip
        pid = eventually(lambda: (self.person.state() or {}).get("pid"))
        follower = self.person.starts("-e", "demo", "logs", "-f")
        read_until(follower, "=== comfydock session")
        stopper = self.person.starts("-e", "demo", "stop", "--timeout", "60")
        read_until(stopper, "Stopping ComfyUI")
        for child in (waiting, follower, stopper):
            for seconds in (0.002, 0):
                with contextlib.suppress(OSError):  # Windows: the first may have ended it
                    dock.signal_process(child.pid, "interrupt")
                time.sleep(seconds)
            said = read(child.said)
            self.assertEqual(child.wait(30), 0 if child is follower else 130, said)
            self.assertNotIn("Traceback", read(child.said))
        self.assertTrue(alive(pid))
        self.person.prefix = []
        self.assertQuiet(self.person.types("-e", "demo", "stop", "--kill"), 0)

    def in_shell(self, redirection, *words):
        self.person.prefix = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
        done = self.person.types(*words)
        self.person.prefix = []
        self.assertNotIn("Traceback", done.stdout + done.stderr)
        self.assertNotIn("Exception ignored", done.stdout + done.stderr)
        return done

    @unittest.skipIf(WINDOWS, "needs a shell and /dev/full")
    def test_closed_and_full_outputs_keep_no_command_from_its_work(self):
        port = str(free_port())
        cases = ((">&- 2>&- <&-", 0), ("<&- 2>&-", 0), (">/dev/full", 1), (">&-", 0), (">/dev/full 2>&1", 1))
        for redirection, code in cases if LONG else cases[:3]:
            with self.subTest(redirection=redirection):
                self.assertEqual(self.in_shell(redirection, "run", "--demo", "--port", port).returncode, code)
                pid = self.person.state()["pid"]
                self.assertTrue(alive(pid))
                done = self.in_shell(redirection, "-e", "demo", "status")
                self.assertEqual(done.returncode, code)
                if redirection == ">/dev/full":
                    self.assertClear(done, 1, "The output: No space left on device.")
                    self.assertClear(self.in_shell(redirection, "logs"), 1, "The output: No space left on device.")
                self.assertEqual(self.in_shell(redirection, "-e", "demo", "stop").returncode, code)
                self.assertEqual((self.servers(), self.person.state()), ([], None))

    def test_a_reader_that_is_gone_keeps_no_command_from_its_work(self):
        port = str(free_port())
        read, write = os.pipe()
        os.close(read)
        self.addCleanup(os.close, write)

        def types(*words):
            return subprocess.run(self.person.command(*words), cwd=self.person.home, env=self.person.variables, stdin=subprocess.DEVNULL,
                                  stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)  # fmt: skip

        for words, code in ((["run", "--demo", "--port", port], 0), (["status"], 0), (["logs"], 0), (["stop"], 0),
            (["status"], 3)):  # fmt: skip
            with self.subTest(words=words):
                done = types(*words)
                self.assertEqual((done.returncode, done.stderr), (code, ""))
                self.assertEqual(len(self.servers()), words[0] in ("run", "logs") or words[0] == "status" and code == 0)
        done = types("run", "--demo", "--foreground", "--port", port)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(len(self.servers()), 1, "who only watched has left, and ComfyUI goes on")

    def test_signs_and_names_survive_any_locale(self):
        person = self.person
        person.variables = {
            key: value for key, value in person.variables.items() if not key.startswith(("LC_", "LANG", "PYTHON"))
        }
        checkout = person.checkout(parent="Bücher ☃")
        self.assertQuiet(person.types("create", "a", "--from", checkout, "--python", sys.executable, LANG="C"), 0)
        for variables in ({"LANG": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}):
            with self.subTest(**variables):
                said = self.assertQuiet(person.types("run", "--wait", "--port", str(free_port()), **variables), 0)
                is_plain = WINDOWS or "PYTHONIOENCODING" in variables  # a pipe of Windows speaks cp1252
                self.assertIn("[ok] ComfyUI started" if is_plain else "✓ ComfyUI started", said)
                self.assertQuiet(person.types("status", **variables), 0)
                self.assertIn("Starting server", self.assertQuiet(person.types("logs", **variables), 0))
                self.assertQuiet(person.types("stop", **variables), 0)


class DamagedFiles(Trouble):
    """In process: whatever the files hold, no command falls, signals anybody, or destroys what it cannot read."""

    ROUNDS = 10000 if LONG else 250

    def say(self, *words):
        """One command in this process; returns (exit code, all that it says)."""
        out, err = io.StringIO(), io.StringIO()
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            patch.dict(os.environ, {"HOME": self.person.home})):  # fmt: skip
            code = dock.main(["--workspace", self.person.workspace, *words])
        return code, out.getvalue() + err.getvalue()

    def mutations(self, texts):
        """Texts that were damaged in many ways, and some that never were any."""
        chance = random.Random(11)
        signs = b'{}[]",:0123456789-+.eEntf\\u\xff\x00\n =#'
        words = [b"null", b"true", b"-1", b"1e999", b"NaN", b'"\\ud800"', b'"\\u0000"', b"[]", b"{}", b'""', b"99999999999999999999", b"0",
                 b'"0001-01-01T00:00:00"', b'"9999-12-31T23:59:59.999-23:59"', str(os.getpid()).encode(), b"1"]  # fmt: skip
        for _ in range(self.ROUNDS):
            text = bytearray(chance.choice(texts))
            for _ in range(chance.randrange(1, 5)):
                at = chance.randrange(len(text) + 1)
                how = chance.randrange(5)
                if how == 0:
                    text[at : at + chance.randrange(40)] = b""
                elif how == 1:
                    text[at:at] = bytes(chance.choice(signs) for _ in range(chance.randrange(1, 6)))
                elif how == 2:
                    text = text[:at] or bytearray(b"x")
                else:  # another value in place of one that is there
                    values = list(re.finditer(rb'(?<=[:=\[,] )("[^"\n]*"|[\w.-]+)', text))
                    if values:
                        value = chance.choice(values)
                        text[value.start() : value.end()] = chance.choice(words)
            yield bytes(text) if chance.random() < 0.97 else os.urandom(chance.randrange(300))

    def sweep(self, path, texts, commands, may_go, without=None):
        """Each damaged text in turn at `path`, and a command that reads it; none that holds `without`."""
        signalled, chance = [], random.Random(5)
        with (patch.object(dock, "signal_process", lambda *words: signalled.append(words)),
            patch.object(dock, "create_background_process", side_effect=dock.CDEnvironmentError("no start"))):  # fmt: skip
            for content in self.mutations(texts):
                if without and without in content:
                    continue
                Path(path).write_bytes(content)
                words = chance.choice(commands)
                code, said = self.say(*words)
                about = (words, content, said)
                self.assertIn(code, (0, 1, 2, 3), about)
                self.assertNotIn("Internal error", said, about)
                self.assertEqual(signalled, [], about)
                kept = [
                    place
                    for place in (path, path + ".damaged")
                    if os.path.exists(place) and Path(place).read_bytes() == content
                ]
                self.assertTrue(kept or may_go(content, words), about)
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path + ".damaged")

    def test_state_files(self):
        self.person.environment("a")
        here = dock.identity_of(dock.process_table().process(os.getpid()))
        record = dock.ProcessState.from_dict(
            {**PLANS_STATE, "pid": os.getpid(), "identity": {**here, "start_ticks": 1, "created": 1.0}}
        )
        record.command, record.run_id, record.cwd, record.env = ["python", "main.py"], "run", "/tmp", {"A": "b"}
        intent = {**record.to_dict(), "pid": None, "phase": "starting",
            "starter": {"pid": os.getpid(), "identity": here}}  # fmt: skip
        texts = [json.dumps(one, indent=2).encode() for one in (record.to_dict(), PLANS_STATE, intent)]
        path = self.person.state_file("a")
        commands = [[*words, "-e", "a"] for words in (["status"], ["status", "--json"], ["list"], ["stop"], ["logs"], ["restart"],
                    ["run", "--port", str(free_port())], ["repair", "--orphan"])]  # fmt: skip

        def was_a_record(content, words):
            """Only a record that can be read is cleared, and only by the commands that clear."""
            Path(path + ".again").write_bytes(content)
            return words[0] in ("stop", "run", "repair", "restart") and dock.read_state(path + ".again") is not None

        self.sweep(path, texts, commands, was_a_record)

    def test_settings_of_the_workspace(self):
        self.person.environment("a")
        self.person.environment("b")
        path = join(self.person.workspace, ".metadata", "workspace.json")
        texts = [Path(path).read_bytes(), b'{"version": 1, "active_environment": "a", "x": [1, {"y": null}]}']
        commands = [["list"], ["list", "--json"], ["status"], ["use", "a"], ["stop"]]

        def was_whole(content, words):
            with contextlib.suppress(ValueError, RecursionError):
                return words[0] == "use" and isinstance(json.loads(content.decode("utf-8")), dict)
            return False

        self.sweep(path, texts, commands, was_whole)

    def test_manifests(self):
        self.person.environment("a")
        path = join(self.person.workspace, "environments", "a", ".cec", "pyproject.toml")
        node = b'\n[tool.comfydock.nodes."x-y"]\nname = "x-y"\nsource = "git"\nversion = "1"\nrepository = "https://x.org/y"\n'
        whole = Path(path).read_bytes()
        commands = [[*words, "-e", "a"] for words in (["status"], ["list"], ["node", "list"], ["stop"], ["logs"])]
        self.sweep(path, [whole, whole + node], commands, lambda content, words: False)


class Result(unittest.TextTestResult):
    """Counts what passed, which unittest does not."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


SHARES = {"--units": lambda case: not isinstance(case, Journey),
    "--sections": lambda case: not isinstance(case, (Journey, InWorkshop))}  # fmt: skip
CLAIMS = "COMFYDOCK_TEST_CLAIMS"  # the folder in which lanes claim classes, and what they share
LONGEST = (
    "UpdatingComfyUI FromNothingToANode WhatUsersMet PlantedByOthers OneWorld WhichEnvironment SmallCommands Foreground FirstContact"
    " AddTest ChangeTest KilledAnywhere Monitored StoppingAndNothingElse Running LogsOfAllKinds QueuedWork TellingTheTruth HandingOver"
    " EveryWayToHaveIt CreateTest KilledTest Readme ManyAtOnce DisksAndFolders Top CompletionInRealShells"
).split()  # they are begun with, so that no lane runs long behind the others


def flattened(suite):
    """Every test of a suite of suites."""
    for case in suite:
        if isinstance(case, unittest.TestSuite):
            yield from flattened(case)
        else:
            yield case


def rank(case):
    name = type(case).__name__
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


class Claimed(unittest.TestSuite):
    """Tests that several lanes share: a class is run by the one that comes to it first."""

    def __iter__(self):
        for kind, cases in itertools.groupby(sorted(self._tests, key=rank), type):
            try:
                os.mkdir(join(os.environ[CLAIMS], kind.__name__))
            except FileExistsError:
                continue
            yield from cases


def run_here(names, share):
    """Run the named tests, or a share of all; returns (passed, failed, skipped)."""
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"__main__.{name}" for name in names] or ["__main__"])
    kind = Claimed if CLAIMS in os.environ else unittest.TestSuite
    chosen = kind(case for case in flattened(suite) if share is None or SHARES[share](case))
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2 if "--verbose" in sys.argv else 1).run(chosen)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    return result.passed, failed, len(result.skipped)


def run_in_lanes():
    """Run all tests in three processes side by side; returns (passed, failed, skipped), a lost count being a failure."""
    totals = [0, 0, 0]
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        variables = {**os.environ, CLAIMS: stack.enter_context(tempfile.TemporaryDirectory())}
        command = [sys.executable, __file__, *sys.argv[1:]]
        pipes = [{"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file} for file in said]
        lanes = [subprocess.Popen(command, env=variables, **pipe) for pipe in pipes]
        for lane, file in zip(lanes, said):
            lane.wait()
            file.seek(0)
            text = file.read()
            print(text)
            counts = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\s*$", text)
            totals = [a + int(b) for a, b in zip(totals, counts.groups() if counts else (0, 1, 0))]
    return totals


# ======================================================================================================================
# The command line of the tests
# ======================================================================================================================


def main():
    """Run the tests that the words of the call ask for; the last line counts them."""
    for name, heard in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(
            signal, name, None
        )  # a shell without job control, and nohup, start us deaf, and so our children
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, heard)
    names = [word for word in sys.argv[1:] if not word.startswith("--")]
    share = next((word for word in sys.argv[1:] if word in SHARES), None)
    passed, failed, skipped = run_here(names, share) if names or share or CLAIMS in os.environ else run_in_lanes()
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
