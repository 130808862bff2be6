#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""comfydock: run ComfyUI as a background daemon, and know the truth about it.

One file, standard library only, Python 3.9 and later. Copy it anywhere and type
`python comfydock.py run`, install it with pipx, or vendor it and `import comfydock`.

    run -> [intent in the state file] -> detached ComfyUI -> logs/<env>/comfyui.log
                                              |
                .cec/.comfyui.state  <--------+   pid, identity, port, arguments
                         |
    status, list, logs, stop, restart, repair     each reads the state and then looks at
                                                  the process itself, never at a bare PID

Nothing of comfydock stays resident after `run`. A recorded process counts only while its
identity holds: same machine and PID namespace, same boot, same PID, same start.

The file is read downward: a definition uses only what stands above it.

    1. Words                         what the others speak of
    2. Places                        the layout on disk
    3. The machine                   spawning, signals, locks: the operating system
    4. The process table             who is running, and is it still the same process
    5. The network                   probes, ports
    6. Files                         atomic writes, locks, logs
    7. The state file                the record of one process
    8. Manifest, git and nodes       what an environment is made of
    9. Environment                   run, stop, restart, observe
    10. The demo                     a stand-in for ComfyUI
    11. Workspace                    several environments
    12. Hidden entries               how the file starts itself
    13. The console                  the one printer
    14. Commands                     one function a command
    15. The command line             the table of commands
    16. The front door               main()
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

# Importing typing would cost every command 3 ms, so only type checkers do: they take this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import subprocess
    from datetime import timedelta
    from pathlib import Path
    from typing import IO, Any, BinaryIO, Optional, Union
else:
    Any = object

    class Optional:
        """Stands for typing.Optional where annotations are evaluated."""

        def __class_getitem__(cls, item):
            return item


__version__ = "2.0.0"
__all__ = [
    "CDEnvironmentError",
    "CDNodeConflictError",
    "ComfyUIConfig",
    "Environment",
    "NodeInfo",
    "NodeOperationResult",
    "NodeRemovalResult",
    "ProcessState",
    "UpdateResult",
    "Workspace",
    "WorkspacePaths",
    "check_http_health",
    "create_background_process",
    "is_port_bound",
    "is_process_alive",
    "main",
]


# ====================================================================================================================
# 1. Words
# Pure: no file, process, socket or environment variable. What the other rooms speak of.

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8188
RUN_ID_VARIABLE = "COMFYDOCK_RUN_ID"
STATE_SCHEMA = 2

STARTING, RUNNING, UNRESPONSIVE = "starting", "running", "unresponsive"
STOPPED, CRASHED, FOREIGN = "stopped", "crashed", "foreign"
LIVE_STATES = (STARTING, RUNNING, UNRESPONSIVE)

Tell = Callable[[str], None]  # long work tells its progress through one of these, a short line a call


def say_nothing(line: str) -> None:
    """The Tell of a caller who does not listen."""


class CDEnvironmentError(Exception):
    """What could not be done, in one sentence that names the thing.

    `hint` (str) is a line that can be typed or acted on, or empty. `code` (str) is a stable
    word for scripts; "usage" means that the words of the call were wrong.
    """

    def __init__(self, message: str, hint: str = "", code: str = "failed") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class CDNodeConflictError(CDEnvironmentError):
    """A custom node cannot be added because something already stands in its place."""


@dataclass
class ComfyUIConfig:
    """Where ComfyUI will listen, as its own arguments say it: `host` may be a comma list."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    tls: bool = False


@dataclass
class ProcessState:
    """The record of one ComfyUI process, as `.cec/.comfyui.state` keeps it.

    The first eight fields are the plan's. `started_at` is ISO 8601 in UTC, `log_offset` is in
    bytes. `pid` is None only while `phase` is "starting": the intent, written before the spawn.
    `identity` and `starter["identity"]` are what `identity_of` says of a process; `extra` holds
    keys that a later version wrote.
    """

    pid: Optional[int]
    host: str
    port: int
    args: list[str]
    started_at: str
    log_path: str
    last_health_check: Optional[str] = None
    health_status: Optional[str] = None
    phase: str = "running"
    wanted: str = "running"
    run_id: Optional[str] = None
    identity: dict[str, Any] = field(default_factory=dict)
    starter: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    cwd: Optional[str] = None
    env: dict[str, str] = field(default_factory=dict)
    log_offset: int = 0
    log_inode: int = 0
    monitor: Optional[dict[str, Any]] = None
    last_exit: Optional[dict[str, Any]] = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the state file: the plan's keys first."""
        data: dict[str, Any] = {key: getattr(self, key) for key in _PLAN_KEYS}
        data["health"] = {"last_check": self.last_health_check, "status": self.health_status}
        data["schema"] = STATE_SCHEMA
        data.update((key, getattr(self, key)) for key in _OWN_KEYS)
        return {**self.extra, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProcessState":
        """The record in a JSON object. Raises ValueError when it is not one that may be trusted."""
        if not isinstance(data, dict):
            raise ValueError("not an object")
        health = {} if data.get("health") is None else data["health"]
        record = {key: data[key] for key in (*_PLAN_KEYS, *_OWN_KEYS) if key in data}
        known = {*_PLAN_KEYS, *_OWN_KEYS, "health", "schema"}
        _require(isinstance(health, dict), "health")
        _require(all(key in data for key in _PLAN_KEYS), "a key of the plan is missing")
        state = cls(
            **record,
            last_health_check=health.get("last_check"),
            health_status=health.get("status"),
            extra={key: value for key, value in data.items() if key not in known},
        )
        state._check()
        return state

    def _check(self) -> None:
        _require(is_pid(self.pid) or (self.pid is None and self.phase == STARTING), "pid")
        _require(is_port(self.port), "port")
        for name in ("host", "started_at", "log_path", "phase", "wanted"):
            _require(isinstance(getattr(self, name), str), name)
        for name in ("run_id", "cwd", "last_health_check", "health_status"):
            _require(isinstance(getattr(self, name), (str, type(None))), name)
        for name in ("args", "command"):
            _require(is_text_list(getattr(self, name)), name)
        for name in ("identity", "starter", "env"):
            _require(isinstance(getattr(self, name), dict), name)
        for name in ("monitor", "last_exit"):
            _require(isinstance(getattr(self, name), (dict, type(None))), name)
        for name in ("log_offset", "log_inode"):
            _require(type(getattr(self, name)) is int and getattr(self, name) >= 0, name)
        _require(all(isinstance(value, str) for value in self.env.values()), "env")
        _require(isinstance(self.starter.get("identity", {}), dict), "starter")

    def get_uptime(self) -> "timedelta":
        """Time since `started_at` by the wall clock; naive times are local. Never negative.

        Raises ValueError when `started_at` is not a time.
        """
        from datetime import timedelta

        return timedelta(seconds=max(0.0, time.time() - epoch_of(self.started_at)))


_PLAN_KEYS = ("pid", "host", "port", "args", "started_at", "log_path")
_OWN_KEYS = (
    "phase",
    "wanted",
    "run_id",
    "identity",
    "starter",
    "command",
    "cwd",
    "env",
    "log_offset",
    "log_inode",
    "monitor",
    "last_exit",
)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def is_pid(value: object) -> bool:
    """Whether `value` may be the PID of a ComfyUI: an int above 1 (0, 1 and -1 name others, True is no number)."""
    return type(value) is int and 1 < value < 2**31


def is_port(value: object) -> bool:
    """Whether `value` is an int from 1 to 65535."""
    return type(value) is int and 0 < value < 65536


def is_text_list(value: object) -> bool:
    """Whether `value` is a list of str."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


@dataclass
class NodeInfo:
    """A custom node as the manifest keeps it.

    `name` is its directory in custom_nodes; `version` a registry version, a commit, or "dev";
    `source` one of registry, git, development, unknown.
    """

    name: str
    registry_id: Optional[str] = None
    repository: Optional[str] = None
    version: Optional[str] = None
    download_url: Optional[str] = None
    source: str = "unknown"
    dependency_sources: list[str] = field(default_factory=list)

    @property
    def identifier(self) -> str:
        """What a user calls it: its directory name."""
        return self.name


@dataclass
class NodeOperationResult:
    """What `add_node` did, and whether a running ComfyUI needs a restart for it."""

    node_info: NodeInfo
    restart_recommended: bool = False
    restart_reason: Optional[str] = None


@dataclass
class NodeRemovalResult:
    """What `remove_node` did. `filesystem_action` is disabled, deleted or none."""

    identifier: str
    name: str
    source: str
    filesystem_action: str
    restart_recommended: bool = True
    restart_reason: str = "Node removed - restart to unload node classes"


@dataclass
class UpdateResult:
    """What `update_node` did."""

    node_name: str
    source: str
    changed: bool = False
    message: str = ""
    requirements_added: list[str] = field(default_factory=list)
    requirements_removed: list[str] = field(default_factory=list)
    old_version: Optional[str] = None
    new_version: Optional[str] = None
    restart_recommended: bool = False
    restart_reason: Optional[str] = None


def parse_comfyui_args(args: list[str]) -> ComfyUIConfig:
    """Host, port and TLS as ComfyUI's own argparse will read them from `args`.

    Both spellings, unique prefixes (`--por 9`, `--lis`), the last one wins, a bare `--listen` is
    "0.0.0.0,::" (all observed on ComfyUI 0.3.64). Raises CDEnvironmentError for a port that is
    no number or outside 1-65535: ComfyUI would notice only after its whole start.
    """
    config = ComfyUIConfig()
    tls = set()
    for flag, value in _flag_values(args):
        if _is_flag(flag, "--port", "--po"):
            config.port = _port_number(value)
        elif _is_flag(flag, "--listen", "--li"):
            config.host = "0.0.0.0,::" if value is None else value
        elif _is_flag(flag, "--tls-keyfile", "--tls-k") or _is_flag(flag, "--tls-certfile", "--tls-c"):
            tls.add(flag[:7])
    config.tls = tls == {"--tls-k", "--tls-c"}
    return config


def _flag_values(args: list[str]) -> "Iterator[tuple[str, Optional[str]]]":
    """Each `--flag` with its value: behind "=", or the next word when that is no flag itself."""
    for index, word in enumerate(args):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        following = args[index + 1] if index + 1 < len(args) else "--"
        is_value = not following.startswith("-") or following.lstrip("-").isdigit()
        yield flag, value if equals else following if is_value else None


def _is_flag(word: str, flag: str, shortest: str) -> bool:
    return word.startswith(shortest) and flag.startswith(word)


def _port_number(text: Optional[str]) -> int:
    try:
        port = int(text or "")
    except ValueError:
        port = 0
    if not is_port(port):
        raise CDEnvironmentError(
            f"'{text or ''}' is not a port: ComfyUI needs a number from 1 to 65535.",
            "comfydock run --port 8188",
            "usage",
        )
    return port


def with_port(args: list[str], port: int) -> list[str]:
    """`args` with every `--port` taken out and `--port <port>` at the end."""
    kept: list[str] = []
    skip = False
    for word in args:
        is_port_flag = _is_flag(word.partition("=")[0], "--port", "--po")
        if not skip and not is_port_flag:
            kept.append(word)
        skip = is_port_flag and "=" not in word
    return [*kept, "--port", str(port)]


def connect_host(host: str) -> str:
    """The address to connect to for a `--listen` value: the first of a list, loopback for a wildcard."""
    first = host.split(",")[0].strip()
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(first, first)  # noqa: S104 (nothing is bound)


def local_url(config: ComfyUIConfig) -> str:
    """The URL to open on this machine: IPv6 in brackets, https when TLS is on."""
    host = connect_host(config.host)
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls else 'http'}://{shown}:{config.port}"


def is_loopback(host: str) -> bool:
    """Whether every address of a `--listen` value can be reached from this machine alone."""
    names = [name.strip() for name in host.split(",")]
    return all(name in ("localhost", "::1") or name.startswith("127.") for name in names)


def utc_now() -> str:
    """The time as the state file writes it: ISO 8601, UTC, milliseconds."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}+00:00"


def epoch_of(stamp: Optional[str]) -> float:
    """Seconds since 1970 of an ISO 8601 time; a naive one is local. Raises ValueError."""
    from datetime import datetime

    if not isinstance(stamp, str):
        raise ValueError("not a time")
    return datetime.fromisoformat(stamp[:-1] + "+00:00" if stamp.endswith("Z") else stamp).timestamp()


def duration_words(seconds: float) -> str:
    """A length of time for people: 12s, 15m, 3h 5m, 2d 4h."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m" if minutes else f"{whole}s"


def size_words(count: float) -> str:
    """A number of bytes for people: 512 B, 1.4 GB."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


NAME_RULE = "letters, digits, dot, dash and underscore, at most 63, beginning with a letter or digit"
RESERVED_NAMES = {"workspace", "logs", "models", ".comfydock", "con", "prn", "aux", "nul"} | {
    device + digit for device in ("com", "lpt") for digit in "123456789"
}


def is_new_name(name: str) -> bool:
    """Whether an environment may be made under this name (existing others still open)."""
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    legal = plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 63 and name[-1] != "."
    return legal and name.split(".")[0].lower() not in RESERVED_NAMES


def is_folder_name(name: str) -> bool:
    """Whether `name` stays inside the folder it is joined to."""
    return bool(name) and not name.startswith(".") and not any(sign in name for sign in "/\\:\0") and ".." not in name


def require_new_name(name: str) -> None:
    """Raises CDEnvironmentError when no environment may be made under this name."""
    if not name or not is_new_name(name):
        raise CDEnvironmentError(
            f"'{name}' cannot name an environment: {NAME_RULE}.", "comfydock create my-env", "usage"
        )


def made_valid(name: str) -> str:
    """`name` bent into one that may name an environment."""
    bent = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "-" for sign in name)
    bent = bent.strip("._-")[:50].rstrip("._-") or "comfyui"
    return bent if is_new_name(bent) else f"{bent}-env"


def last_error_line(text: str) -> Optional[str]:
    """The line of a log that most likely says why ComfyUI ended: its last error line, else its last line."""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if not line.startswith(SESSION_MARK)]
    errors = [line for line in lines if _looks_like_an_error(line)]
    return next(reversed(errors or lines), None)


def _looks_like_an_error(line: str) -> bool:
    head = line.partition(":")[0]
    name = head.rpartition(".")[2]
    return name.endswith(("Error", "Exception", "Interrupt")) and " " not in head or ": error:" in line


SESSION_MARK = "=== comfydock session "


def session_header(run_id: str, environment: str) -> str:
    """The line that begins a run in the log."""
    return f"{SESSION_MARK}{run_id} {utc_now()} environment {environment}, comfydock {__version__} ===\n"


# ====================================================================================================================
# 2. Places
# The only room that spells a name of the layout on disk.


class WorkspacePaths:
    """Where a workspace keeps its things. `root` (str) is absolute.

    The layout is the one of comfydock 1.0.x, whose workspaces open as they are.
    """

    def __init__(self, root: "Union[str, Path]") -> None:
        self.root = os.path.abspath(root)
        self.environments = os.path.join(self.root, "environments")
        self.metadata = os.path.join(self.root, ".metadata")
        self.settings = os.path.join(self.metadata, "workspace.json")
        self.port_lock = os.path.join(self.metadata, ".ports.lock")

    @property
    def logs(self) -> "Path":
        """The folder of all logs: one folder an environment inside."""
        from pathlib import Path

        return Path(self.root, "logs")

    def log_file(self, name: str) -> str:
        """The log of the environment `name`."""
        return os.path.join(self.root, "logs", name, "comfyui.log")


class EnvironmentPaths:
    """Where an environment keeps its things, all as absolute str."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.cec = os.path.join(root, ".cec")
        self.manifest = os.path.join(self.cec, "pyproject.toml")
        self.cache = os.path.join(self.cec, ".manifest.json")
        self.complete = os.path.join(self.cec, ".complete")
        self.state = os.path.join(self.cec, ".comfyui.state")
        self.lock = os.path.join(self.cec, ".comfyui.lock")
        self.content_lock = os.path.join(self.cec, ".content.lock")
        self.gitignore = os.path.join(self.cec, ".gitignore")
        self.removed = os.path.join(self.cec, "removed")
        self.venv = os.path.join(root, ".venv")
        self.comfyui = os.path.join(root, "ComfyUI")


def rotated(log_path: str) -> str:
    """Where the log goes that a rotation replaces."""
    return log_path + ".old"


def main_script(comfyui_path: str) -> str:
    """The file that starts ComfyUI in a checkout."""
    return os.path.join(comfyui_path, "main.py")


def is_checkout(folder: str) -> bool:
    """Whether `folder` is a ComfyUI checkout (`models` may be a link or absent, so it is not asked for)."""
    signs = ("nodes.py", "folder_paths.py", "comfy", "comfy_extras", "custom_nodes", "comfyui_version.py")
    present = sum(os.path.exists(os.path.join(folder, sign)) for sign in signs)
    return os.path.isfile(main_script(folder)) and present >= 2


def checkout_above(folder: str) -> Optional[str]:
    """The ComfyUI checkout that holds `folder`, or None."""
    return next((here for here in _upward(folder) if is_checkout(here)), None)


def environment_above(folder: str) -> "Optional[tuple[str, str]]":
    """(workspace root, environment name) when `folder` lies in `<workspace>/environments/<name>`, or None."""
    for here in _upward(folder):
        parent, name = os.path.split(here)
        if os.path.basename(parent) == "environments" and os.path.isdir(EnvironmentPaths(here).cec):
            return os.path.dirname(parent), name
    return None


def _upward(folder: str) -> Iterator[str]:
    while True:
        yield folder
        parent = os.path.dirname(folder)
        if parent == folder:
            return
        folder = parent


def default_workspace() -> str:
    """COMFYDOCK_HOME, else ~/.comfydock, else a 1.0.x workspace at ~/comfydock.

    Raises CDEnvironmentError when there is no home folder to look in.
    """
    chosen = os.environ.get("COMFYDOCK_HOME")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise CDEnvironmentError("No home folder is known, so there is no place for a workspace.", "set COMFYDOCK_HOME")
    ours, older = os.path.join(home, ".comfydock"), os.path.join(home, "comfydock")
    has_older = os.path.isdir(WorkspacePaths(older).metadata)
    return older if has_older and not os.path.isdir(WorkspacePaths(ours).environments) else ours


# ====================================================================================================================
# 3. The machine
# The only room that names sys.platform, subprocess, signal, fcntl, msvcrt, ctypes; the only one that can end a process.


IS_WINDOWS = sys.platform == "win32"

# How `ps` is asked for the environment behind each command: macOS has -E, procps the BSD letter e.
PS_WITH_ENVIRONMENT = "-axwwE" if sys.platform == "darwin" else "axeww"

# Dates in plain English and UTC, for every locale writes them its own way. LC_ALL=C would do that too, but it sets
# LC_CTYPE as well, and then ps prints ? for each letter of a path that is not ASCII.
PS_LOCALE = {"LC_TIME": "C", "LC_CTYPE": "UTF-8" if sys.platform == "darwin" else "C.UTF-8", "TZ": "UTC"}


def read_text(path: str) -> str:
    """Return the stripped text of a small file, "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def on_path(program: str) -> bool:
    """Tell whether a program can be found."""
    from shutil import which

    return which(program) is not None


def cannot_start(cmd: list[str], cwd: "Optional[Union[str, Path]]", error: OSError) -> CDEnvironmentError:
    """Put into words why `cmd` did not start; code "missing" where the program or its folder is not there."""
    if cwd is not None and not os.path.isdir(cwd):
        return CDEnvironmentError(f"the folder {cwd} is not there, so {cmd[0]} cannot run in it", code="missing")
    named_only = not os.path.dirname(cmd[0])  # one closed folder on PATH turns "not found" into "permission denied"
    if isinstance(error, FileNotFoundError) or named_only and not on_path(cmd[0]):
        return CDEnvironmentError(f"{cmd[0]} was not found", "install it, or put its folder on PATH", "missing")
    return CDEnvironmentError(f"{cmd[0]} cannot be started: {error.strerror or error}")


@dataclass
class ProcessFacts:
    """What Windows tells about one process; what it does not tell is None.

    `created` is in seconds since 1970 (UTC); `command_line` is one string, as Windows keeps it.
    """

    pid: int
    alive: bool = True
    ppid: Optional[int] = None
    created: Optional[float] = None
    command_line: Optional[str] = None
    cwd: Optional[str] = None
    environment: dict[str, str] = field(default_factory=dict)


if sys.platform == "win32":
    PROCESS_TERMINATE, PROCESS_VM_READ, PROCESS_SUSPEND_RESUME = 0x0001, 0x0010, 0x0800
    PROCESS_QUERY_INFORMATION, PROCESS_QUERY_LIMITED_INFORMATION, SYNCHRONIZE = 0x0400, 0x1000, 0x00100000
    CTRL_C_EVENT = 0
    LOCK_OFFSET = 0x7FFF0000  # msvcrt.locking counts in 32 bits
    FILETIME_OF_1970 = 116444736000000000  # in units of 100 ns since 1601

    # Offsets in the PEB and in RTL_USER_PROCESS_PARAMETERS (winternl.h names them in part, Wine's winternl.h in full).
    # They have not moved since Windows Vista: parameters, current folder, command line, environment block.
    if sys.maxsize > 2**32:
        PEB_PARAMETERS, AT_FOLDER, AT_COMMAND_LINE, AT_ENVIRONMENT = 0x20, 0x38, 0x70, 0x80
    else:
        PEB_PARAMETERS, AT_FOLDER, AT_COMMAND_LINE, AT_ENVIRONMENT = 0x10, 0x24, 0x40, 0x48

    @cache
    def libraries() -> tuple[Any, Any]:
        """Return kernel32 and ntdll; handles are pointers, so every function that takes or gives one says so."""
        import ctypes
        from ctypes import wintypes

        kernel, ntdll = ctypes.WinDLL("kernel32", use_last_error=True), ctypes.WinDLL("ntdll")
        handle, dword = wintypes.HANDLE, wintypes.DWORD
        kernel.OpenProcess.restype = kernel.CreateFileW.restype = handle
        kernel.OpenProcess.argtypes = [dword, wintypes.BOOL, dword]
        kernel.CloseHandle.argtypes = [handle]
        kernel.TerminateProcess.argtypes = [handle, wintypes.UINT]
        kernel.WaitForSingleObject.argtypes = [handle, dword]
        kernel.GetExitCodeProcess.argtypes = [handle, ctypes.c_void_p]
        kernel.GetProcessTimes.argtypes = [handle] + [ctypes.c_void_p] * 4
        kernel.ReadProcessMemory.argtypes = [handle, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        kernel.CreateFileW.argtypes = [wintypes.LPCWSTR, dword, dword, ctypes.c_void_p, dword, dword, handle]
        kernel.SetConsoleCtrlHandler.argtypes = [ctypes.c_void_p, wintypes.BOOL]
        ntdll.NtQueryInformationProcess.argtypes = [handle, ctypes.c_int, ctypes.c_void_p, dword, ctypes.c_void_p]
        ntdll.NtSuspendProcess.argtypes = ntdll.NtResumeProcess.argtypes = [handle]
        return kernel, ntdll

    @contextmanager
    def opened_process(pid: int, rights: int) -> Iterator[Any]:
        """Open a process for `rights`; ProcessLookupError where there is none, PermissionError where it is refused."""
        import ctypes

        kernel, _ = libraries()
        handle = kernel.OpenProcess(rights, False, pid) if is_pid(pid) else None
        if not handle:
            error = ctypes.get_last_error()
            if is_pid(pid) and error != 87:  # ERROR_INVALID_PARAMETER: there is no such PID
                raise ctypes.WinError(error)
            raise ProcessLookupError(f"there is no process {pid}")
        try:
            yield handle
        finally:
            kernel.CloseHandle(handle)

    def has_ended(handle: Any, milliseconds: int = 0) -> bool:
        """Tell whether an open process has ended, waiting up to `milliseconds`; exit code 259 may be a real one."""
        return bool(libraries()[0].WaitForSingleObject(handle, milliseconds) == 0)

    def detached(cmd: list[str], cwd: str, log_file: "IO[Any]", env: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start `cmd` on a console of its own that has no window, outside our terminal's job where that is allowed.

        No new process group: in one, CTRL_C is switched off, and CTRL_C is the only clean stop. The switch is
        inherited, so it is put back first.
        """
        import subprocess

        libraries()[0].SetConsoleCtrlHandler(None, False)

        def spawn(flags: int) -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                cmd,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                creationflags=flags | subprocess.CREATE_NO_WINDOW,
            )

        try:
            return spawn(subprocess.CREATE_BREAKAWAY_FROM_JOB)
        except PermissionError:  # the job does not let its processes go
            return spawn(0)

    def group_options() -> dict[str, Any]:
        """Return the Popen options of a command that we wait for: no console window may flash up."""
        import subprocess

        return {"creationflags": subprocess.CREATE_NO_WINDOW}

    def end_group(process: "subprocess.Popen[str]") -> None:
        """End a waited-for command and all that it started."""
        import subprocess

        subprocess.run(
            ["taskkill", "/PID", str(process.pid), "/T", "/F"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **group_options(),
        )
        process.kill()

    def open_append(path: str) -> "BinaryIO":
        """Open a log so that every write lands at its end, whoever else writes, and others may read, truncate, rename.

        Python's mode "a" on Windows only moves to the end before it writes; FILE_APPEND_DATA alone is atomic.
        The handle is not inherited. A link raises OSError (ELOOP).
        """
        import ctypes
        import errno
        import msvcrt

        if os.path.islink(path):
            raise OSError(errno.ELOOP, "is a link", path)
        append_data, share_all, open_always, normal = 0x0004, 0x7, 4, 0x80
        handle = libraries()[0].CreateFileW(path, append_data | SYNCHRONIZE, share_all, None, open_always, normal, None)
        if handle is None or handle == ctypes.c_void_p(-1).value:
            raise ctypes.WinError(ctypes.get_last_error())
        return os.fdopen(msvcrt.open_osfhandle(handle, os.O_APPEND), "ab", buffering=0)

    def lock_handle(fd: int) -> bool:
        """Take the exclusive lock of an open file without waiting; it falls with the descriptor or the process.

        Windows locks bytes and refuses reading them, so the byte lies far past the end.
        """
        import msvcrt

        place = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, LOCK_OFFSET, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False
        finally:
            os.lseek(fd, place, os.SEEK_SET)

    def attach_and_interrupt(pid: int) -> None:
        """Press Ctrl-C on the console of `pid`. Only for a short-lived helper: it leaves its own console for that.

        Raises OSError where the process is gone, has no console or belongs to someone else.
        """
        import ctypes

        kernel, _ = libraries()
        kernel.FreeConsole()
        if not kernel.AttachConsole(pid):
            raise ctypes.WinError(ctypes.get_last_error())
        kernel.SetConsoleCtrlHandler(None, True)
        if not kernel.GenerateConsoleCtrlEvent(CTRL_C_EVENT, 0):
            raise ctypes.WinError(ctypes.get_last_error())
        time.sleep(0.1)  # the event is delivered by threads: who leaves the console at once may take it along

    def console_interrupt(pid: int) -> bool:
        """Have a helper process press Ctrl-C on the console of `pid`; True where it could.

        A process can be attached to one console only, hence the helper. Should the console be ours too, we are deaf.
        """
        import subprocess

        kernel, _ = libraries()
        kernel.SetConsoleCtrlHandler(None, True)
        try:
            helper = [sys.executable, os.path.abspath(__file__), "--console-interrupt", str(pid)]
            return (
                subprocess.run(
                    helper,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    timeout=15,
                    stderr=subprocess.DEVNULL,
                    **group_options(),
                ).returncode
                == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        finally:
            kernel.SetConsoleCtrlHandler(None, False)

    def suspend_or_resume(pid: int, function: str) -> None:
        """Call NtSuspendProcess or NtResumeProcess; they count, so each pause needs its continue."""
        with opened_process(pid, PROCESS_SUSPEND_RESUME) as handle:
            if getattr(libraries()[1], function)(handle) != 0:
                raise PermissionError(f"{function} was refused for process {pid}")

    def terminate(pid: int) -> None:
        """End a process at once (TerminateProcess); one that has just ended refuses, which is as good."""
        import ctypes

        with opened_process(pid, PROCESS_TERMINATE | SYNCHRONIZE) as handle:
            if not libraries()[0].TerminateProcess(handle, 1) and not has_ended(handle):
                raise ctypes.WinError(ctypes.get_last_error())

    def signal_process(pid: int, how: str) -> None:
        """Do to a process what a signal does: "interrupt", "terminate", "kill", "pause" or "continue".

        Raises ProcessLookupError where it is not there, PermissionError where it is refused or has no console to
        interrupt. "terminate" and "kill" are the same here. Never os.kill: its 0 is CTRL_C, all else is the end.
        """
        if how == "interrupt":
            with opened_process(pid, PROCESS_QUERY_LIMITED_INFORMATION):
                if not console_interrupt(pid):
                    raise PermissionError(f"process {pid} has no console that we may interrupt")
        elif how in ("terminate", "kill"):
            terminate(pid)
        else:
            suspend_or_resume(pid, {"pause": "NtSuspendProcess", "continue": "NtResumeProcess"}[how])

    def reap(pid: int) -> Optional[int]:
        """Return the exit code of a process that has ended and that somebody still holds open, else None."""
        import ctypes

        try:
            with opened_process(pid, PROCESS_QUERY_LIMITED_INFORMATION | SYNCHRONIZE) as handle:
                code = ctypes.c_ulong()
                known = has_ended(handle) and libraries()[0].GetExitCodeProcess(handle, ctypes.byref(code))
                return code.value if known else None
        except OSError:
            return None

    def reap_strangers(own: int) -> None:
        """Do nothing: Windows has no zombies."""

    def wait_handle(pid: int, seconds: float) -> Optional[bool]:
        """Wait for the end of a process: True it has ended, False the time is up, None it may not be watched."""
        try:
            with opened_process(pid, SYNCHRONIZE) as handle:
                return has_ended(handle, max(0, int(seconds * 1000)))
        except ProcessLookupError:
            return True
        except OSError:
            return None

    def read_memory(handle: Any, address: int, size: int) -> bytes:
        """Read another process's memory; b"" where it cannot be read."""
        import ctypes

        buffer = ctypes.create_string_buffer(size)
        return buffer.raw if libraries()[0].ReadProcessMemory(handle, address, buffer, size, None) else b""

    def read_pointer(handle: Any, address: int) -> int:
        """Read one pointer; 0 where it cannot be read."""
        import struct

        return int.from_bytes(read_memory(handle, address, struct.calcsize("P")), "little")

    def read_string(handle: Any, address: int) -> Optional[str]:
        """Read the text of a UNICODE_STRING (length in bytes, capacity, pointer) at `address`."""
        import struct

        length = int.from_bytes(read_memory(handle, address, 2), "little")
        text = read_memory(handle, read_pointer(handle, address + struct.calcsize("P")), length) if length else b""
        return text.decode("utf-16-le", "replace") if text else None

    def read_environment(handle: Any, address: int) -> dict[str, str]:
        """Read an environment block: NAME=value, each ended by a zero, the last by two; page by page, 1 MB at most."""
        block = b""
        while address and len(block) < 2**20:
            page = read_memory(handle, address + len(block), 4096 - (address + len(block)) % 4096)
            block += page
            text = block.decode("utf-16-le", "replace")
            if not page or "\0\0" in text:
                pairs = (entry.partition("=") for entry in text.split("\0\0")[0].split("\0"))
                return {name: value for name, _, value in pairs if name}  # "=C:=C:\\here" is cmd's own
        return {}

    def add_basic_facts(facts: ProcessFacts, handle: Any) -> int:
        """Fill in life, creation time and parent; return the address of the process's PEB, 0 where it is not told."""
        import ctypes

        kernel, ntdll = libraries()
        times = (ctypes.c_uint64 * 4)()  # created, ended, in the kernel, outside it
        if kernel.GetProcessTimes(handle, *(ctypes.byref(times, 8 * index) for index in range(4))):
            facts.created = (times[0] - FILETIME_OF_1970) / 1e7
            facts.alive = times[1] == 0
        basic = (ctypes.c_size_t * 6)()  # exit status, PEB, affinity, priority, PID, parent
        if ntdll.NtQueryInformationProcess(handle, 0, ctypes.byref(basic), ctypes.sizeof(basic), None) != 0:
            return 0
        facts.ppid = int(basic[5])
        return int(basic[1])

    def process_facts(pid: int) -> Optional[ProcessFacts]:
        """Return what Windows tells about a process, or None where it may not even be opened.

        The command line, folder and environment are read from the parameter block in its own memory, which needs no
        more than being the same user. learn.microsoft.com documents NtQueryInformationProcess, and the block in part.
        """
        facts = ProcessFacts(pid)
        try:
            with opened_process(pid, PROCESS_QUERY_INFORMATION | PROCESS_VM_READ) as handle:
                block = read_pointer(handle, add_basic_facts(facts, handle) + PEB_PARAMETERS)
                if block:
                    facts.command_line = read_string(handle, block + AT_COMMAND_LINE)
                    folder = read_string(handle, block + AT_FOLDER)
                    facts.cwd = os.path.normpath(folder) if folder else None  # Windows keeps a \\ at its end
                    facts.environment = read_environment(handle, read_pointer(handle, block + AT_ENVIRONMENT))
            return facts
        except ProcessLookupError:
            return None
        except OSError:
            return limited_facts(facts)

    def limited_facts(facts: ProcessFacts) -> Optional[ProcessFacts]:
        """Return what even a process of someone else tells: life, creation time, parent."""
        try:
            with opened_process(facts.pid, PROCESS_QUERY_LIMITED_INFORMATION) as handle:
                add_basic_facts(facts, handle)
            return facts
        except OSError:
            return None

    @cache
    def machine_id() -> str:
        """Return a text that names this machine: the MachineGuid of the installation, else the computer's name."""
        import winreg

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
                return str(winreg.QueryValueEx(key, "MachineGuid")[0])
        except OSError:
            return os.environ.get("COMPUTERNAME", "")

    def boot_id() -> Optional[str]:
        """Return None: Windows names no boot. Creation times are absolute here, so nothing is lost."""
        return None

    def pid_namespace() -> Optional[str]:
        """Return None: Windows has one table of PIDs."""
        return None

    def venv_python(folder: str) -> str:
        """Return the path of the interpreter in a venv folder; whether it is there is not checked."""
        return os.path.join(folder, "Scripts", "python.exe")

    def session_of(pid: int) -> Optional[int]:
        """Return None: there are no POSIX sessions on Windows."""
        return None

    def boot_time() -> float:
        """Return 0.0: nobody counts from the boot here."""
        return 0.0

    def clock_ticks() -> int:
        """Return 1: nobody counts in ticks here."""
        return 1

    def passes_interrupt_on() -> bool:
        """Tell whether a process started now hears the interrupt; always so here."""
        return True

else:

    @contextmanager
    def default_signals() -> Iterator[None]:
        """Give children the default SIGINT, SIGTERM and signal mask for the time of a spawn.

        A caught signal is at its default after exec, an ignored one stays ignored: so an ignored one is caught by a
        handler that does nothing, which changes nothing for us. Only the main thread may set handlers.
        """
        import signal

        ignored = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is signal.SIG_IGN]
        caught = []
        try:
            for number in ignored:
                signal.signal(number, lambda *_: None)
                caught.append(number)
        except ValueError:  # not the main thread: passes_interrupt_on() tells
            pass
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number in caught:
                signal.signal(number, signal.SIG_IGN)

    def passes_interrupt_on() -> bool:
        """Tell whether a process started now hears SIGINT: not where it is ignored and we are off the main thread."""
        import signal
        import threading

        in_main_thread = threading.current_thread() is threading.main_thread()
        return in_main_thread or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN

    def detached(cmd: list[str], cwd: str, log_file: "IO[Any]", env: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start `cmd` as the leader of a session of its own."""
        import subprocess

        with default_signals():
            return subprocess.Popen(
                cmd,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                close_fds=True,
                start_new_session=True,
            )

    def group_options() -> dict[str, Any]:
        """Return the Popen options of a command that we wait for: its own session, so that it can be ended as a whole.

        Without a terminal git and ssh cannot stop and ask for a password either.
        """
        return {"start_new_session": True}

    def end_group(process: "subprocess.Popen[str]") -> None:
        """End a waited-for command and all that it started."""
        import signal

        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM of a group that has only zombies left
            pass

    def open_append(path: str) -> "BinaryIO":
        """Open a log so that every write lands at its end, whoever else writes; a new one is its owner's to read.

        The descriptor is not inherited. A link raises OSError (ELOOP).
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(path, flags, 0o600), "ab", buffering=0)

    def lock_handle(fd: int) -> bool:
        """Take the exclusive lock of an open file without waiting; it falls with the descriptor or the process.

        flock, not lockf: lockf's lock falls as soon as any descriptor of that file is closed in this process.
        """
        import fcntl

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def reap_strangers(own: int) -> None:
        """Reap, as PID 1 of a container must, every ended process but `own`, whose exit code somebody waits for."""
        if not hasattr(os, "waitid"):  # macOS, where nothing runs as PID 1 of a container
            return
        try:
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid == own:
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            pass

    def attach_and_interrupt(pid: int) -> None:
        """Do nothing: only Windows presses Ctrl-C through a console."""

    def console_interrupt(pid: int) -> bool:
        """Return False: only Windows presses Ctrl-C through a console."""
        return False

    def signal_process(pid: int, how: str) -> None:
        """Send a signal to one process: "interrupt", "terminate", "kill", "pause" or "continue".

        Raises ProcessLookupError where it is not there (or `pid` is no PID of ours: 0 and -1 would reach a crowd),
        PermissionError where it belongs to someone else.
        """
        import signal

        if not is_pid(pid):
            raise ProcessLookupError(f"there is no process {pid}")
        os.kill(
            pid,
            {
                "interrupt": signal.SIGINT,
                "terminate": signal.SIGTERM,
                "kill": signal.SIGKILL,
                "pause": signal.SIGSTOP,
                "continue": signal.SIGCONT,
            }[how],
        )

    def reap(pid: int) -> Optional[int]:
        """Return the exit code (negative: the signal) of our child `pid` if it has ended, else None. Never blocks."""
        try:
            ended, status = os.waitpid(pid, os.WNOHANG) if is_pid(pid) else (0, 0)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status) if ended else None

    def wait_handle(pid: int, seconds: float) -> Optional[bool]:
        """Wait for the end of a process: True it has ended, False the time is up, None this system cannot tell.

        Linux 5.3 has pidfd_open; sandboxes and older kernels refuse it. A zombie counts as ended.
        """
        import select

        pidfd_open = getattr(os, "pidfd_open", None)
        if pidfd_open is None:
            return None
        try:
            fd = pidfd_open(pid)
        except ProcessLookupError:
            return True
        except OSError:
            return None
        try:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            return bool(poller.poll(max(0.0, seconds * 1000)))
        finally:
            os.close(fd)

    def process_facts(pid: int) -> Optional[ProcessFacts]:
        """Return None: only Windows is asked this way."""
        return None

    def mac_text(function: str, *arguments: Any) -> Optional[str]:
        """Call a C function of macOS that fills a buffer with text or a UUID, None where it does not."""
        import ctypes
        import uuid

        buffer, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
        try:
            library = ctypes.CDLL(None)
            if function == "gethostuuid":
                failed = library.gethostuuid(buffer, (ctypes.c_long * 2)())
                return None if failed else str(uuid.UUID(bytes=buffer.raw[:16]))
            failed = library.sysctlbyname(*arguments, buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
            return None if failed else buffer.value.decode("ascii", "replace")
        except (OSError, AttributeError):
            return None

    @cache
    def machine_id() -> str:
        """Return a text that names this machine: systemd's machine-id, the host UUID of macOS, else the host name."""
        known = read_text("/etc/machine-id") or read_text("/var/lib/dbus/machine-id")
        if not known and sys.platform == "darwin":  # a Mac's host name changes with the network it is in
            known = mac_text("gethostuuid") or ""
        return known or os.uname().nodename

    @cache
    def boot_id() -> Optional[str]:
        """Return a text that names this boot of the machine, None where the system has none."""
        known = read_text("/proc/sys/kernel/random/boot_id")
        if not known and sys.platform == "darwin":
            known = mac_text("sysctlbyname", b"kern.bootsessionuuid") or ""
        return known or None

    @cache
    def pid_namespace() -> Optional[str]:
        """Return the number of our PID namespace (a container has its own), None where there are none."""
        try:
            return os.readlink("/proc/self/ns/pid").strip("pid:[]")
        except OSError:
            return None

    def venv_python(folder: str) -> str:
        """Return the path of the interpreter in a venv folder; whether it is there is not checked."""
        return os.path.join(folder, "bin", "python")

    def session_of(pid: int) -> Optional[int]:
        """Return the session of a process, None where the system does not tell."""
        try:
            return os.getsid(pid)
        except OSError:
            return None

    def boot_time() -> float:
        """Return when the machine was started, in seconds since 1970, by the clock as it goes now."""
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        return time.time() - time.clock_gettime(clock) if clock is not None else 0.0

    def clock_ticks() -> int:
        """Return how many ticks of /proc are one second."""
        return os.sysconf("SC_CLK_TCK")


def create_background_process(
    cmd: list[str], cwd: "Union[str, Path]", log_file: "IO[Any]", env: Optional[dict[str, str]] = None
) -> "subprocess.Popen[bytes]":
    """Start a process that outlives us: detached from terminal and console, all output into `log_file`, stdin empty.

    `env` is the whole environment (ours if None). No other descriptor is inherited; SIGINT, SIGTERM and the signal mask
    are at their defaults when called in the main thread. The caller closes its `log_file`, and hands the process to
    `release` when it no longer watches it. Raises CDEnvironmentError where the program cannot be started.
    """
    try:
        return detached(cmd, os.fspath(cwd), log_file, dict(os.environ) if env is None else env)
    except OSError as error:
        raise cannot_start(cmd, cwd, error) from error


def release(process: "subprocess.Popen[Any]") -> None:
    """Let go of a process that may outlive us: Popen's finalizer otherwise warns that it still runs."""
    vars(process)["_child_created"] = False  # the finalizer's own first question, on 3.9 to 3.14


def exit_code_within(process: "subprocess.Popen[Any]", seconds: float) -> Optional[int]:
    """Return the exit code (negative: the signal) of a process that ends within `seconds`, else None."""
    import subprocess

    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Yield a list to which SIGINT, SIGTERM and SIGHUP add "interrupt", "terminate", "hangup" instead of acting.

    Off the main thread, where handlers cannot be set, the list stays empty.
    """
    import signal

    received: list[str] = []
    words = {"SIGINT": "interrupt", "SIGTERM": "terminate", "SIGHUP": "hangup", "SIGBREAK": "terminate"}
    before = {}
    try:
        for name, word in words.items():
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, lambda *_, word=word: received.append(word))
    except ValueError:
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pumped_lines(process: "subprocess.Popen[str]", deadline: Optional[float]) -> Iterator[tuple[str, str]]:
    """Yield ("stdout" or "stderr", line) as they come, until both are closed; TimeoutError when the deadline is past.

    A pipe can be held open by a daemon that the command left behind: a second of silence after its end is enough.
    """
    import queue
    import threading

    lines: "queue.Queue[tuple[str, str]]" = queue.Queue()

    def pump(name: str, stream: "IO[str]") -> None:
        with stream:
            for line in stream:
                lines.put((name, line))
        lines.put((name, ""))

    for name in ("stdout", "stderr"):
        threading.Thread(target=pump, args=(name, getattr(process, name)), daemon=True).start()
    still_open, silences = 2, 0
    while still_open and silences < 10:
        try:
            name, line = lines.get(timeout=0.1)  # short: Windows hears Ctrl-C only between two waits
        except queue.Empty:
            silences += process.poll() is not None
        else:
            still_open, silences = still_open - (not line), 0
            if line:
                yield name, line
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError


def run_command(
    cmd: list[str],
    cwd: Optional[str] = None,
    env: Optional[dict[str, str]] = None,
    timeout: Optional[float] = None,
    tell: Optional[Callable[[str], None]] = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end and return its code and output (text; bytes that are not UTF-8 are replaced).

    `timeout` is in seconds; `tell` is given each line of output as it comes. A code other than 0 does not raise.
    Raises CDEnvironmentError with code "missing" where the program is not there, "timeout" when the time is up: then,
    as with any other exception, the command and all that it started are ended.
    """
    import subprocess

    try:
        process = subprocess.Popen(
            cmd,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            **group_options(),
        )
    except OSError as error:
        raise cannot_start(cmd, cwd, error) from error
    deadline = None if timeout is None else time.monotonic() + timeout
    output: dict[str, list[str]] = {"stdout": [], "stderr": []}
    try:
        for name, line in pumped_lines(process, deadline):
            output[name].append(line)
            if tell is not None:
                tell(line.rstrip("\n"))
        code = process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except BaseException as error:
        end_group(process)
        process.wait()
        if isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
            raise CDEnvironmentError(f"{cmd[0]} did not finish within {timeout:g} seconds", code="timeout") from error
        raise
    return subprocess.CompletedProcess(cmd, code, "".join(output["stdout"]), "".join(output["stderr"]))


# ====================================================================================================================
# 4. The process table
# The only room that asks the system who is running; psutil is named only here.


PATH_RULES = os.path  # how paths compare; a test puts ntpath here

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

PS_COLUMNS = "pid=,ppid=,uid=,stat=,lstart=,command="  # all known to both procps and macOS

SYSTEM_HELPERS = {"conhost.exe"}  # Windows adds it below each process with a console, and takes it away by itself

PSUTIL_FACTS = ("pid", "ppid", "uids", "status", "create_time", "cmdline", "name")


def same_path(one: str, other: str) -> bool:
    """Tell whether two absolute paths are the same place: by spelling, else behind all links."""

    def plain(path: str) -> str:
        return PATH_RULES.normcase(PATH_RULES.normpath(path))

    return plain(one) == plain(other) or plain(PATH_RULES.realpath(one)) == plain(PATH_RULES.realpath(other))


def is_python(name: str) -> bool:
    """Tell whether a program's file name is a Python's: python, python3.13t, pythonw.exe, Python (macOS), pypy3."""
    plain = name.lower().removesuffix(".exe")
    for family in ("python", "pypy"):
        if plain.startswith(family):
            return not plain[len(family) :].strip("0123456789.-tdwbg")
    return False


def option_width(option: str) -> int:
    """Return how many words an option of the interpreter takes, 0 when no script can follow it (-c, -m, -)."""
    if option.startswith("--"):
        return 2 if option == "--check-hash-based-pycs" else 1
    for place, letter in enumerate(option[1:], 2):
        if letter in "cm":
            return 0
        if letter in "XW":
            return 1 if place < len(option) else 2
    return 1 if option != "-" else 0


def options_width(words: list[str]) -> Optional[int]:
    """Return how many of the words behind the interpreter are its options, None when no script follows them."""
    index = 0
    while index < len(words) and words[index].startswith("-"):
        width = option_width(words[index])
        if not width:
            return None
        index += width
    return index if index < len(words) else None


def interpreter_width(words: list[str], joined: bool) -> int:
    """Return how many words are the path of a Python, 0 when another program runs.

    Words that ps joined may be parts of one absolute path with spaces; a word that begins a path or an option is not.
    """
    for width in range(1, len(words) + 1 if joined and words[0].startswith("/") else min(2, len(words) + 1)):
        if width > 1 and words[width - 1].startswith(("/", "-")):
            return 0
        if is_python(PATH_RULES.basename(" ".join(words[:width]))):
            return width
    return 0


def possible_scripts(words: list[str], joined: bool) -> list[str]:
    """Return what a Python's command may mean as its script: one word, or any run of joined words that begins there."""
    start = interpreter_width(words, joined)
    width = options_width(words[start:]) if start else None
    if width is None:
        return []
    rest = words[start + width :]
    return [" ".join(rest[:end]) for end in range(1, len(rest) + 1 if joined else 2)]


class ProcessRow:
    """One process as one source saw it.

    pid, ppid        ints; ppid 0 where it is not told
    session, uid     int or None where it is not told
    state            "running", "stopped" (by SIGSTOP) or "zombie" (dead, not yet waited for)
    created          seconds since 1970, or None; on Linux reckoned from start_ticks by today's clock
    start_ticks      clock ticks from the boot to the start (field 22 of /proc/PID/stat), or None without /proc
    command          the words of the command line; read when first asked for where that costs something extra
    joined           True where the source had joined the words by spaces: then command is a guess, text is right
    """

    __slots__ = ("pid", "ppid", "session", "uid", "state", "created", "start_ticks", "joined", "_command")

    def __init__(
        self,
        pid: int,
        ppid: int = 0,
        session: Optional[int] = None,
        uid: Optional[int] = None,
        state: str = "running",
        created: Optional[float] = None,
        start_ticks: Optional[int] = None,
        command: "Union[list[str], Callable[[], list[str]]]" = lambda: [],
        joined: bool = False,
    ) -> None:
        self.pid, self.ppid, self.session, self.uid, self.state = pid, ppid, session, uid, state
        self.created, self.start_ticks, self.joined = created, start_ticks, joined
        self._command = command

    def __repr__(self) -> str:
        """Return pid, state and command, for messages of tests."""
        return f"<ProcessRow {self.pid} {self.state} {self.text!r}>"

    @property
    def command(self) -> list[str]:
        """The words of the command line; only the program's name where the rest may not be read."""
        if callable(self._command):
            self._command = self._command()
        return self._command

    def age(self) -> float:
        """Seconds since the start, 0.0 where it is not told; a moved clock moves both ends of it on Linux."""
        return max(0.0, time.time() - self.created) if self.created is not None else 0.0

    @property
    def text(self) -> str:
        """The command line as one line."""
        return " ".join(self.command)

    @property
    def name(self) -> str:
        """The file name of the program."""
        words = self.command
        width = interpreter_width(words, self.joined) if words else 0
        return PATH_RULES.basename(" ".join(words[: width or 1]))

    def mentions(self, text: str) -> bool:
        """Tell whether the command line contains a text, in whatever case where paths have none."""
        return PATH_RULES.normcase(text) in PATH_RULES.normcase(self.text)

    def is_as_old_as(self, other: "ProcessRow") -> bool:
        """Tell whether this is the start of the same process: same ticks, else created within 2 s."""
        if self.start_ticks is not None and other.start_ticks is not None:
            return self.start_ticks == other.start_ticks
        return self.created is None or other.created is None or abs(self.created - other.created) <= 2

    def can_be_child_of(self, parent: "ProcessRow") -> bool:
        """Tell whether `parent` is the parent and not a later process that was given the dead parent's PID."""
        if self.ppid != parent.pid or self.pid == parent.pid:
            return False
        if self.start_ticks is not None and parent.start_ticks is not None:
            return self.start_ticks >= parent.start_ticks
        return self.created is None or parent.created is None or self.created >= parent.created - 1

    def runs(self, script: str, cwd_of: Callable[[int], Optional[str]]) -> bool:
        """Tell whether this is a Python that runs the file `script` (absolute); `cwd_of` resolves a relative one.

        Options such as -s, -u, -X utf8 may stand before the script. An editor of it, or another script that is given it
        as an argument, does not count.
        """

        def plain_name(path: str) -> str:
            return PATH_RULES.normcase(PATH_RULES.basename(path))

        for path in possible_scripts(self.command, self.joined):
            if plain_name(path) != plain_name(script):
                continue
            folder = "" if PATH_RULES.isabs(path) else cwd_of(self.pid)
            if folder is not None and same_path(PATH_RULES.join(folder, path), script):
                return True
        return False


def parse_stat(
    data: bytes,
    boot: float,
    ticks: int,
    uid: Optional[int] = None,
    command: Optional[Callable[[int], list[str]]] = None,
) -> Optional[ProcessRow]:
    """Read one /proc/PID/stat (man 5 proc_pid_stat); None where it is none.

    The name stands in parentheses and may hold spaces and parentheses itself, hence the search from the right. `boot`
    is the boot's time, `ticks` how many make a second; `command` reads the command line when it is asked for.
    """
    head, _, tail = data.rpartition(b")")
    fields = tail.split(None, 20)
    if len(fields) < 20:
        return None
    start, (number, _, name) = int(fields[19]), head.partition(b" (")
    pid, letter = int(number), fields[0]
    # A leader that ended before its threads is not dead yet: it still holds its sockets and cannot be reaped.
    state = "zombie" if letter in b"ZXx" and int(fields[17]) <= 1 else "stopped" if letter == b"T" else "running"
    return ProcessRow(
        pid,
        int(fields[1]),
        int(fields[3]),
        uid,
        state,
        boot + start / ticks,
        start,
        lambda: command and command(pid) or [os.fsdecode(name)],
    )


def parse_proc_net(text: str, port: int) -> set[int]:
    """Return the inodes of the sockets that listen on `port`, from the text of /proc/net/tcp or tcp6.

    Columns: number, local address:port (hex), remote, state (0A = LISTEN), ..., the tenth is the inode.
    """
    rows = (line.split() for line in text.splitlines()[1:])
    end = f":{port:04X}"
    return {int(row[9]) for row in rows if len(row) > 9 and row[3] == "0A" and row[1].endswith(end)}


def parse_ps_date(text: str) -> Optional[float]:
    """Return the epoch seconds of `Wed Jul 29 15:37:10 2026` (UTC), None where it is written otherwise."""
    from datetime import datetime, timezone

    try:
        _, month, day, clock, year = text.split()
        hour, minute, second = (int(part) for part in clock.split(":"))
        moment = datetime(int(year), MONTHS.index(month) + 1, int(day), hour, minute, second, tzinfo=timezone.utc)
    except ValueError:
        return None
    return moment.timestamp()


def parse_ps(text: str) -> list[ProcessRow]:
    """Read what ps prints for PS_COLUMNS under PS_LOCALE.

    The date takes 24 columns (macOS pads it to 28). A zombie's command is <defunct> or ends with it; macOS prints
    (name) where the command line may not be read.
    """
    rows = []
    for line in text.splitlines():
        fields = line.split(None, 4)
        if len(fields) < 5 or not (fields[0] + fields[1]).isdigit():
            continue
        state = "zombie" if fields[3][0] == "Z" else "stopped" if fields[3][0] == "T" else "running"
        command = fields[4][24:].strip()
        if " " not in command and command[:1] + command[-1:] == "()":
            command = command[1:-1]
        uid = int(fields[2]) if fields[2].lstrip("-").isdigit() else None
        rows.append(
            ProcessRow(
                int(fields[0]),
                int(fields[1]),
                None,
                uid,
                state,
                parse_ps_date(fields[4][:24]),
                None,
                command.split(" "),
                joined=True,
            )
        )
    return rows


def parse_markers(text: str) -> dict[int, str]:
    """Return run ids by PID, from `ps` output of pid and command with the environment behind it."""
    found = {}
    for line in text.splitlines():
        pid, _, rest = line.strip().partition(" ")
        _, marked, value = (" " + rest).partition(f" {RUN_ID_VARIABLE}=")
        if marked and pid.isdigit():
            found[int(pid)] = value.partition(" ")[0]
    return found


def parse_tasklist(text: str) -> list[tuple[int, str]]:
    """Return (pid, program) from `tasklist /FO CSV /NH`: "python.exe","288","Console","1","25,940 K".

    Where nothing matches Windows prints a line of words (INFO: ...) instead, in its own language.
    """
    rows = (line.strip().strip('"').split('","') for line in text.splitlines() if line.startswith('"'))
    return [(int(row[1]), row[0]) for row in rows if len(row) >= 2 and row[1].isdigit()]


def parse_netstat(text: str, port: int) -> list[int]:
    """Return who listens on `port`, from Windows' `netstat -ano`.

    The word for LISTENING is translated (ABHÖREN, ECOUTE); that the foreign port is 0 is not.
    """
    rows = (line.split() for line in text.splitlines())
    found = {
        int(row[-1])
        for row in rows
        if len(row) >= 4
        and row[0] == "TCP"
        and row[1].endswith(f":{port}")
        and row[2].endswith(":0")
        and row[-1].isdigit()
    }
    return sorted(found)


def parse_lsof(text: str, letter: str) -> list[str]:
    """Return the fields of one letter from `lsof -F` output: p a PID, n a name."""
    return [line[1:] for line in text.splitlines() if line.startswith(letter)]


def split_windows_command(line: str) -> list[str]:
    """Split a Windows command line into words, as Microsoft's C runtime does.

    The program's name knows quotes but no escapes. Behind it 2n backslashes before a quote are n, one more makes the
    quote a letter, and two quotes inside quotes are one letter.
    """
    words: list[str] = []
    rest = line.lstrip()
    while rest:
        word, rest = first_word(rest, escapes=bool(words))
        words.append(word)
        rest = rest.lstrip()
    return words


def first_word(rest: str, escapes: bool) -> tuple[str, str]:
    """Return the first word of a Windows command line without its quotes, and what follows it."""
    word, quoted, index = "", False, 0
    while index < len(rest) and (quoted or rest[index] not in " \t"):
        slashes = len(rest) - index - len(rest[index:].lstrip("\\")) if escapes else 0
        index += slashes
        if rest[index : index + 1] != '"':
            word += "\\" * slashes
            if not slashes:
                word, index = word + rest[index], index + 1
            continue
        word, index = word + "\\" * (slashes // 2), index + 1
        if slashes % 2:
            word += '"'
        elif quoted and escapes and rest[index : index + 1] == '"':
            word, index = word + '"', index + 1
        else:
            quoted = not quoted
    return word, rest[index:]


class ProcessTable:
    """What every source can be asked; what it cannot tell is None, {} or []."""

    @classmethod
    def usable(cls) -> bool:
        """Tell whether this source works here."""
        raise NotImplementedError

    def row(self, pid: int) -> Optional[ProcessRow]:
        """Return one process (a zombie too), None where there is none."""
        raise NotImplementedError

    def rows(self, containing: str = "") -> list[ProcessRow]:
        """Return all processes, or those whose command line contains a text."""
        raise NotImplementedError

    def markers(self) -> dict[int, str]:
        """Return pid -> COMFYDOCK_RUN_ID of all processes whose environment has it and may be read."""
        raise NotImplementedError

    def cwd(self, pid: int) -> Optional[str]:
        """Return the folder a process stands in."""
        raise NotImplementedError

    def listeners(self, port: int) -> list[int]:
        """Return the PIDs that listen on a TCP port, as far as the system tells us."""
        raise NotImplementedError


def read_bytes(path: str, size: int = 32768) -> bytes:
    """Return a whole file of /proc, b"" where it is gone or closed to us. os.read: three times as fast as open()."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        data = part = os.read(fd, size)
        while len(part) == size:
            part = os.read(fd, size)
            data += part
        return data
    except OSError:
        return b""
    finally:
        os.close(fd)


def proc_command(pid: int) -> list[str]:
    """Return the words of /proc/PID/cmdline, [] for a zombie, a kernel thread or a closed door."""
    data = read_bytes(f"/proc/{pid}/cmdline")
    return [os.fsdecode(word) for word in data.rstrip(b"\0").split(b"\0")] if data else []


def proc_row(pid: int, boot: float, ticks: int) -> Optional[ProcessRow]:
    """Return the row of one PID from one open, stat and read; None where there is none."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        return parse_stat(os.read(fd, 4096), boot, ticks, os.fstat(fd).st_uid, proc_command)
    except OSError:
        return None
    finally:
        os.close(fd)


def proc_start_ticks(pid: int) -> Optional[int]:
    """Return field 22 of /proc/PID/stat, whichever table lists the process: wall-clock times move, this does not."""
    row = None if IS_WINDOWS else proc_row(pid, 0.0, 1)
    return row.start_ticks if row is not None else None


class ProcTable(ProcessTable):
    """Linux: /proc, read directly."""

    @classmethod
    def usable(cls) -> bool:
        """Tell whether /proc is there and is Linux's (Wine shows that of its host, with other PIDs than its own)."""
        return not IS_WINDOWS and os.path.exists("/proc/self/stat")

    def pids(self) -> list[int]:
        """Return all PIDs."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def row(self, pid: int) -> Optional[ProcessRow]:
        """Return one process from one read of its stat file."""
        return proc_row(pid, boot_time(), clock_ticks())

    def rows(self, containing: str = "") -> list[ProcessRow]:
        """Return all processes, or those whose command line contains a text (only they are looked at closely)."""
        boot, ticks, needle = boot_time(), clock_ticks(), os.fsencode(containing)
        pids = [pid for pid in self.pids() if not needle or needle in read_bytes(f"/proc/{pid}/cmdline")]
        rows = (proc_row(pid, boot, ticks) for pid in pids)
        return [row for row in rows if row is not None]

    def markers(self) -> dict[int, str]:
        """Return run ids by PID from /proc/PID/environ (our own user's processes; all for root)."""
        found, needle = {}, b"\0" + RUN_ID_VARIABLE.encode() + b"="
        for pid in self.pids():
            _, marked, value = (b"\0" + read_bytes(f"/proc/{pid}/environ")).partition(needle)
            if marked:
                found[pid] = os.fsdecode(value.partition(b"\0")[0])
        return found

    def cwd(self, pid: int) -> Optional[str]:
        """Return the folder a process stands in, None where it may not be read."""
        try:
            return os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            return None

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`: the socket's inode is in /proc/net, its holder among all descriptors."""
        wanted: set[str] = set()
        for name in ("tcp", "tcp6"):
            text = read_bytes(f"/proc/net/{name}").decode("ascii", "replace")
            wanted.update(f"socket:[{inode}]" for inode in parse_proc_net(text, port))
        return [pid for pid in self.pids() if self.holds(pid, wanted)] if wanted else []

    def holds(self, pid: int, wanted: set[str]) -> bool:
        """Tell whether a process has one of these links among its descriptors."""
        folder = f"/proc/{pid}/fd"
        try:
            return any(os.readlink(f"{folder}/{fd}") in wanted for fd in os.listdir(folder))
        except OSError:  # gone, or someone else's
            return False


def psutil_module() -> Any:
    """Return psutil; ImportError where it is not installed."""
    from importlib import import_module

    return import_module("psutil")


class PsutilTable(ProcessTable):
    """psutil where it is installed."""

    @classmethod
    def usable(cls) -> bool:
        """Tell whether psutil can be imported."""
        try:
            return bool(psutil_module())
        except ImportError:
            return False

    def make_row(self, facts: dict[str, Any]) -> ProcessRow:
        """Make a row of what Process.as_dict gave; what may not be read is None there."""
        state = {"zombie": "zombie", "dead": "zombie", "stopped": "stopped"}.get(facts["status"], "running")
        pid, uids = facts["pid"], facts.get("uids")
        return ProcessRow(
            pid,
            facts["ppid"] or 0,
            session_of(pid),
            uids.real if uids else None,
            state,
            facts["create_time"],
            proc_start_ticks(pid),
            facts["cmdline"] or [facts["name"] or ""],
        )

    def facts(self) -> list[str]:
        """Return the names to ask for: Windows has no uids."""
        return [name for name in PSUTIL_FACTS if hasattr(psutil_module().Process, name)]

    def row(self, pid: int) -> Optional[ProcessRow]:
        """Return one process."""
        psutil = psutil_module()
        try:
            return self.make_row(psutil.Process(pid).as_dict(self.facts()))
        except (psutil.Error, ValueError, OverflowError):
            return None

    def rows(self, containing: str = "") -> list[ProcessRow]:
        """Return all processes, or those whose command line contains a text."""
        rows = (self.make_row(process.info) for process in psutil_module().process_iter(self.facts()))
        return [row for row in rows if row.mentions(containing)]

    def markers(self) -> dict[int, str]:
        """Return run ids by PID."""
        processes = psutil_module().process_iter(["pid", "environ"])
        environments = {process.pid: process.info["environ"] or {} for process in processes}
        return {pid: env[RUN_ID_VARIABLE] for pid, env in environments.items() if RUN_ID_VARIABLE in env}

    def cwd(self, pid: int) -> Optional[str]:
        """Return the folder a process stands in; psutil says "" of a zombie."""
        psutil = psutil_module()
        try:
            return psutil.Process(pid).cwd() or None
        except (psutil.Error, OSError, ValueError):
            return None

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`; macOS lets only root ask for all connections, lsof asks for ours."""
        psutil = psutil_module()
        try:
            found = psutil.net_connections("tcp")
        except (psutil.Error, OSError):
            return PsTable().listeners(port)
        return sorted({one.pid for one in found if one.status == "LISTEN" and one.laddr.port == port and one.pid})


def printed(cmd: list[str], env: Optional[dict[str, str]] = None) -> str:
    """Return what a system tool prints, "" where it is missing or hangs: then this source knows nothing."""
    try:
        return run_command(cmd, env=env, timeout=20).stdout
    except CDEnvironmentError:
        return ""


class PsTable(ProcessTable):
    """macOS, BSD: the text of `ps`, and `lsof` for folders and ports."""

    @classmethod
    def usable(cls) -> bool:
        """Tell whether there is a ps that knows our columns (that of busybox does not)."""
        return on_path("ps") and bool(cls().row(os.getpid()))

    def ps(self, *options: str) -> str:
        """Return what ps prints, with dates in English and UTC."""
        inherited = {name: value for name, value in os.environ.items() if name != "LC_ALL"}
        return printed(["ps", *options], {**inherited, **PS_LOCALE})

    def with_start(self, rows: list[ProcessRow]) -> list[ProcessRow]:
        """Add what ps does not print: the session, and the start ticks where there is a /proc."""
        for row in rows:
            row.session, row.start_ticks = session_of(row.pid), proc_start_ticks(row.pid)
        return rows

    def row(self, pid: int) -> Optional[ProcessRow]:
        """Return one process."""
        rows = self.with_start(parse_ps(self.ps("-ww", "-p", str(pid), "-o", PS_COLUMNS)))
        return rows[0] if rows else None

    def rows(self, containing: str = "") -> list[ProcessRow]:
        """Return all processes, or those whose command line contains a text."""
        rows = parse_ps(self.ps("-axww", "-o", PS_COLUMNS))
        return self.with_start([row for row in rows if row.mentions(containing)])

    def markers(self) -> dict[int, str]:
        """Return run ids by PID; ps shows the environment of our own user's processes."""
        return parse_markers(self.ps(PS_WITH_ENVIRONMENT, "-o", "pid=,command="))

    def cwd(self, pid: int) -> Optional[str]:
        """Return the folder a process stands in."""
        names = parse_lsof(printed(["lsof", "-a", "-p", str(pid), "-d", "cwd", "-Fn"]), "n")
        return names[0] if names else None

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`."""
        text = printed(["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fp"])
        return [int(pid) for pid in parse_lsof(text, "p")]


class TasklistTable(ProcessTable):
    """Windows: the list from tasklist, all else from the processes themselves (`process_facts`)."""

    @classmethod
    def usable(cls) -> bool:
        """Tell whether there is a tasklist."""
        return on_path("tasklist")

    def make_row(self, pid: int, program: str, facts: Optional[ProcessFacts]) -> Optional[ProcessRow]:
        """Make a row of what the process tells; of a dead one that somebody still holds open, none."""
        facts = facts or ProcessFacts(pid)
        if not facts.alive:
            return None
        words = split_windows_command(facts.command_line or "") or [program]
        return ProcessRow(pid, facts.ppid or 0, created=facts.created, command=words)

    def listed(self, *filters: str) -> list[tuple[int, str]]:
        """Return (pid, program) of the processes that tasklist lists."""
        return parse_tasklist(printed(["tasklist", *filters, "/FO", "CSV", "/NH"]))

    def row(self, pid: int) -> Optional[ProcessRow]:
        """Return one process; tasklist is asked only where the process itself does not tell its command line."""
        facts = process_facts(pid)
        if facts is not None and (facts.command_line or not facts.alive):
            return self.make_row(pid, "", facts)
        rows = [self.make_row(*one, facts) for one in self.listed("/FI", f"PID eq {pid}") if one[0] == pid]
        return rows[0] if rows else None

    def rows(self, containing: str = "") -> list[ProcessRow]:
        """Return all processes, or those whose command line contains a text, in whatever case."""
        rows = (self.make_row(pid, program, process_facts(pid)) for pid, program in self.listed())
        return [row for row in rows if row is not None and row.mentions(containing)]

    def markers(self) -> dict[int, str]:
        """Return run ids by PID."""
        facts = (process_facts(pid) for pid, _ in self.listed())
        marked = (one for one in facts if one is not None and RUN_ID_VARIABLE in one.environment)
        return {one.pid: one.environment[RUN_ID_VARIABLE] for one in marked}

    def cwd(self, pid: int) -> Optional[str]:
        """Return the folder a process stands in."""
        facts = process_facts(pid)
        return facts.cwd if facts is not None else None

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`."""
        return parse_netstat(printed(["netstat", "-ano"]), port)


TABLES: dict[str, type[ProcessTable]] = {
    "proc": ProcTable,
    "psutil": PsutilTable,
    "tasklist": TasklistTable,
    "ps": PsTable,
}


@cache
def is_usable(name: str) -> bool:
    """Tell whether a source of TABLES works here; asked once, for trying ps costs a process."""
    return name in TABLES and TABLES[name].usable()


def process_table() -> ProcessTable:
    """Return the first source of TABLES that works here, or the one that COMFYDOCK_PROCESS_TABLE names.

    Raises CDEnvironmentError where the named one is unknown or does not work here, or none does.
    """
    forced = os.environ.get("COMFYDOCK_PROCESS_TABLE", "")
    hint = "unset COMFYDOCK_PROCESS_TABLE, or set it to one of: " + ", ".join(TABLES)
    if forced:
        if not is_usable(forced):
            raise CDEnvironmentError(f"COMFYDOCK_PROCESS_TABLE={forced} does not work on this machine", hint)
        return TABLES[forced]()
    for name, table in TABLES.items():
        if is_usable(name):
            return table()
    raise CDEnvironmentError(
        "this machine has no /proc, no ps and no tasklist, so nobody can tell what is running",
        f"{sys.executable} -m pip install psutil",
        "missing",
    )


def is_script_of(row: ProcessRow, script: str, folder: str = "") -> bool:
    """Tell whether `row` is a Python that runs `script` (absolute, or the name of a file in `folder`)."""
    return row.runs(PATH_RULES.join(folder, script), process_table().cwd)


def identity_of(row: Optional[ProcessRow]) -> dict[str, Any]:
    """Return what tells this process from every other, for the state file; of one that is gone, only where it was."""
    row = row or ProcessRow(0)
    return {
        "start_ticks": row.start_ticks,
        "boot_id": boot_id(),
        "pid_ns": pid_namespace(),
        "machine": machine_id(),
        "created": row.created,
    }


def place_of(identity: object) -> str:
    """Return where a recorded process lives: "here", "foreign" (another machine or namespace) or "rebooted".

    "rebooted" is this machine before its last start: the process is surely dead. What either side does not know counts
    as equal; so an empty identity is "here".
    """

    def differs(key: str, ours: Optional[str]) -> bool:
        theirs = identity.get(key) if isinstance(identity, dict) else None
        return bool(theirs) and bool(ours) and str(theirs) != ours

    if differs("machine", machine_id()):
        return "foreign"
    if differs("boot_id", boot_id()):
        return "rebooted"
    return "foreign" if differs("pid_ns", pid_namespace()) else "here"


def number_in(identity: object, key: str) -> Optional[float]:
    """Return a number of a recorded identity, None where there is none (a state file may hold anything)."""
    value = identity.get(key) if isinstance(identity, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def fits(row: ProcessRow, identity: object, script: Optional[str]) -> bool:
    """Tell whether a live process is the recorded one: by its start ticks, else by script and creation time (2 s)."""
    ticks, created = number_in(identity, "start_ticks"), number_in(identity, "created")
    if ticks is not None and row.start_ticks is not None:
        return row.start_ticks == ticks
    if created is not None and (row.created is None or abs(row.created - created) > 2):
        return False
    return created is not None if script is None else is_script_of(row, script)


def find_process(pid: object, identity: object, script: Optional[str] = None) -> Optional[ProcessRow]:
    """Return the process that was recorded with this PID and identity, None where it is dead, a zombie or elsewhere.

    `identity` is what identity_of gave; an empty one (a state file that has only a PID) is matched by `script`
    (absolute) in the command line. Without a `script` any program will do whose start is the recorded one.
    """
    if not isinstance(pid, int) or not is_pid(pid) or place_of(identity) != "here":
        return None
    row = process_table().row(pid)
    return row if row is not None and row.state != "zombie" and fits(row, identity, script) else None


def is_process_alive(pid: int) -> bool:
    """Tell whether `pid` is a Python that runs: no zombie, no other program, no PID below 2."""
    row = process_table().row(pid) if is_pid(pid) else None
    return row is not None and row.state != "zombie" and is_python(row.name)


def still_runs(row: ProcessRow) -> bool:
    """Tell whether the very process of `row` runs, and is neither a zombie nor another one with its PID."""
    now = process_table().row(row.pid) if is_pid(row.pid) else None
    return now is not None and now.state != "zombie" and now.is_as_old_as(row)


def wait_for_exit(row: ProcessRow, seconds: float, meanwhile: Optional[Callable[[], bool]] = None) -> bool:
    """Wait up to `seconds` for the end of a process; True when it has ended (a zombie has).

    `meanwhile` is called every 20 to 50 ms; when it returns True the wait is broken off, and the answer is False.
    """
    deadline = time.monotonic() + seconds
    while still_runs(row):
        left = deadline - time.monotonic()
        if left <= 0 or meanwhile is not None and meanwhile():
            return False
        if wait_handle(row.pid, min(left, 0.05)) is None:
            time.sleep(min(left, 0.02))
    return True


def ancestors_of(pid: int, rows: dict[int, ProcessRow]) -> set[int]:
    """Return the PIDs of a process's parent, its parent's parent and so on, as far as `rows` knows them."""
    found: set[int] = set()
    row = rows.get(pid)
    while row is not None and row.pid not in found:
        parent = rows.get(row.ppid)
        if parent is None or not row.can_be_child_of(parent):
            break
        found.add(parent.pid)
        row = parent
    return found


def family_of(row: ProcessRow, run_id: Optional[str]) -> list[ProcessRow]:
    """Return the process itself and all that belongs to it, alive: what one stop must end.

    That is its session (where it leads one), its descendants, and every process that bears the marker `run_id`. Neither
    ourselves nor our ancestors, which may bear the marker too. Parents stand before their children.
    """
    table = process_table()
    rows = {one.pid: one for one in table.rows() if one.state != "zombie"}
    markers = table.markers() if run_id else {}
    spared = ancestors_of(os.getpid(), rows) | {os.getpid()}
    now = rows.get(row.pid)
    same = now is not None and now.is_as_old_as(row)
    family = {pid for pid in rows if same and row.pid in {pid, *ancestors_of(pid, rows)}}
    if row.session == row.pid and (same or now is None):  # a session keeps its number from reuse after its leader's end
        family |= {pid for pid, one in rows.items() if one.session == row.pid}
    family |= {pid for pid in rows if run_id and markers.get(pid) == run_id}
    members = (rows[pid] for pid in family - spared if rows[pid].name.lower() not in SYSTEM_HELPERS)
    return sorted(members, key=lambda one: (one.start_ticks or one.created or 0, one.pid))


def scan_for_comfyui() -> list[ProcessRow]:
    """Return the live processes that have a main.py in their command line, of whatever program."""
    return [row for row in process_table().rows(containing="main.py") if row.state != "zombie"]


def comfyui_processes(comfyui_path: str, scanned: Optional[list[ProcessRow]] = None) -> list[ProcessRow]:
    """Return the live processes that run main.py of one checkout, among `scanned` or all that there are.

    Forked workers show the same command line as their parent, and so does the child of a venv's python.exe on Windows:
    a candidate below a candidate is left out.
    """
    table, script = process_table(), os.path.join(comfyui_path, "main.py")
    candidates = scan_for_comfyui() if scanned is None else scanned
    found = {row.pid: row for row in candidates if row.runs(script, table.cwd)}
    if len(found) < 2:
        return list(found.values())
    rows = {row.pid: row for row in table.rows()}
    return [row for pid, row in found.items() if not ancestors_of(pid, rows) & found.keys()]


def port_holders(port: int) -> list[ProcessRow]:
    """Return the processes that listen on a TCP port; those of other users may stay hidden."""
    table = process_table()
    rows = (table.row(pid) for pid in table.listeners(port))
    return [row for row in rows if row is not None]


# ====================================================================================================================
# 5. The network
# The only room that opens a socket or a URL; every call has a wall-clock deadline and a byte limit.

HEALTHY, REFUSED, SILENT, STRANGER = "healthy", "refused", "silent", "stranger"
ANSWER_LIMIT = 1 << 20


@dataclass
class Answer:
    """What a probe met: healthy, refused (nobody listens), silent (no answer in time), or a stranger.

    `argv` is the command line that ComfyUI says it has, or None.
    """

    kind: str
    argv: Optional[list[str]] = None


def http_get(config: ComfyUIConfig, path: str, timeout: float, limit: int = ANSWER_LIMIT) -> tuple[int, bytes]:
    """(status, body) of one GET to ComfyUI, all within `timeout` seconds and `limit` bytes.

    A raw exchange: urllib would follow redirects and proxies, and its timeout counts from each
    byte (0.5 s became 8 s against a dripping server). No Origin header, which ComfyUI would
    compare with Host. Raises OSError (refused, TimeoutError) or ValueError (no HTTP, too long).
    """
    deadline = time.monotonic() + timeout
    host = connect_host(config.host)
    request = f"GET {path} HTTP/1.0\r\nHost: {host}:{config.port}\r\nAccept: application/json\r\n\r\n"
    with _connected(config, host, deadline) as connection:
        connection.sendall(request.encode("ascii", "replace"))
        return _read_answer(connection, deadline, limit)


@contextmanager
def _connected(config: ComfyUIConfig, host: str, deadline: float) -> "Iterator[Any]":
    import socket

    with socket.create_connection((host, config.port), _remaining(deadline)) as plain:
        plain.settimeout(_remaining(deadline))
        if not config.tls:
            yield plain
            return
        with _loopback_tls().wrap_socket(plain) as secured:
            yield secured


def _loopback_tls() -> "Any":
    """TLS to our own server: its certificate is self-signed, and nothing secret is sent."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _read_answer(connection: "Any", deadline: float, limit: int) -> tuple[int, bytes]:
    received, wanted = b"", limit
    while len(received) < wanted:
        connection.settimeout(_remaining(deadline))
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
        wanted = min(wanted, _answer_length(received, limit))
    else:
        if len(received) >= limit:
            raise ValueError("the answer is too long")
    head, _, body = received.partition(b"\r\n\r\n")
    return _status_code(head), body


def _answer_length(received: bytes, limit: int) -> int:
    """The length of the whole answer once its head tells it, else `limit`. Raises ValueError for what is no HTTP."""
    if not b"HTTP/".startswith(received[:5]):
        raise ValueError("not HTTP")
    head, end, _ = received.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:] if end else []:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return len(head) + len(end) + int(value)
    return limit


def _status_code(head: bytes) -> int:
    words = head.split(b"\r\n")[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError("not HTTP")
    return int(words[1])


def probe(config: ComfyUIConfig, timeout: float) -> Answer:
    """What answers where ComfyUI should: `GET /system_stats`, within `timeout` seconds. Never raises."""
    try:
        status, body = http_get(config, "/system_stats", timeout)
    except ConnectionRefusedError:
        return Answer(REFUSED)
    except ValueError:
        return Answer(STRANGER)
    except OSError:
        return Answer(SILENT)
    if status in (401, 403, 407):  # a reverse proxy with a password: up, but not for us to read
        return Answer(HEALTHY)
    return _read_stats(body) if status == 200 else Answer(STRANGER)


def _read_stats(body: bytes) -> Answer:
    try:
        system = json.loads(body)["system"]
        argv = system.get("argv")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Answer(STRANGER)
    return Answer(HEALTHY, argv if is_text_list(argv) else None)


def probe_all(configs: list[ComfyUIConfig], timeout: float) -> list[Answer]:
    """`probe` of each, all at once: as slow as the slowest, not as their sum."""
    if len(configs) < 2:
        return [probe(config, timeout) for config in configs]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(lambda config: probe(config, timeout), configs))


def check_http_health(host: str, port: int, timeout: float = 2.0) -> bool:
    """Whether a ComfyUI answers on host:port within `timeout` seconds. For display only."""
    return probe(ComfyUIConfig(host, port), timeout).kind == HEALTHY


def is_port_bound(port: int, expected_pid: Optional[int] = None, host: str = DEFAULT_HOST) -> bool:
    """Whether `port` is in use where ComfyUI with `--listen host` would bind it.

    With `expected_pid`: whether that process is the one that listens. The question is asked as
    ComfyUI binds (each address, reuse on POSIX, so that TIME_WAIT after a stop does not count) and
    by a connection, because some systems let a second program bind beside a wildcard.
    """
    if expected_pid is not None:
        return expected_pid in process_table().listeners(port)
    return any(not _can_bind(name.strip(), port) for name in host.split(",")) or _accepts(connect_host(host), port)


def _can_bind(name: str, port: int) -> bool:
    import errno
    import socket

    try:
        places = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True  # ComfyUI itself will say that the name does not resolve
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                _bind_as_comfyui_does(trial, address)
        except OSError as problem:
            if problem.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", None)):
                return False
    return True


def _bind_as_comfyui_does(trial: "Any", address: "Any") -> None:
    import socket

    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if trial.family == socket.AF_INET6:
        trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    trial.bind(address)


def _accepts(host: str, port: int) -> bool:
    import socket

    try:
        with socket.create_connection((host, port), 0.2):
            return True
    except OSError:
        return False


def next_free_port(start: int, host: str, taken: "dict[int, str]") -> int:
    """The first port from `start` on that nobody has. Raises CDEnvironmentError when there is none."""
    for port in range(start, min(start + 1000, 65536)):
        if port not in taken and not is_port_bound(port, host=host):
            return port
    raise CDEnvironmentError(f"No free port from {start} on.", "comfydock run --port <number>")


# ====================================================================================================================
# 6. Files
# The only room that creates, replaces, renames or deletes.

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
LOG_LIMIT = 10 * 1024 * 1024
BLOCK = 1 << 16


def make_folder(path: str) -> None:
    """The folder and those above it, if they are not there."""
    os.makedirs(path, exist_ok=True)


def write_atomic(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path` by `data`, whole or not at all, also through a power cut. Raises OSError.

    The temporary file stands beside it under a name of its own; one that a killed writer left
    is removed by `sweep_leftovers`.
    """
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        _write_new(temporary, data, mode)
        replace_file(temporary, path)
    except BaseException:
        _unlink_if_there(temporary)
        raise
    _sync_folder(os.path.dirname(path))


def _write_new(path: str, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(source: str, target: str, seconds: float = 2.0) -> None:
    """os.replace, tried again for `seconds` while Windows says that a reader has the target open."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _unlink_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _sync_folder(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse; the file itself is synced
        pass
    finally:
        os.close(handle)


def sweep_leftovers(path: str) -> None:
    """Remove temporary files that killed writers of `path` left. For the holder of its lock alone."""
    folder, name = os.path.split(path)
    for entry in os.listdir(folder):
        if entry.startswith(name + ".") and entry.endswith(".tmp"):
            _unlink_if_there(os.path.join(folder, entry))


def remove_file(path: str) -> None:
    """Remove a file; that it is not there is no error. Raises OSError otherwise."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def set_aside(path: str) -> None:
    """Keep a damaged file under `<path>.damaged` instead of losing it."""
    replace_file(path, path + ".damaged")


def read_small(path: str, limit: int = 1 << 20) -> Optional[bytes]:
    """The content of a small file, None when it is not there.

    Raises OSError, also when the path is a link (ELOOP), and ValueError when it is larger than `limit` bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError("too long")
    return data


@contextmanager
def locked(path: str, seconds: float, purpose: str) -> Iterator[None]:
    """Hold the lock file at `path`, waiting up to `seconds` for it.

    The lock is the system's and ends with its holder, so the file is never deleted and never
    stale; its text only tells others who holds it. Raises CDEnvironmentError naming the holder.
    """
    handle = _lock_by(path, time.monotonic() + seconds)
    try:
        _sign(handle, f"{os.getpid()} {purpose}")
        yield
    finally:
        os.close(handle)


def _lock_by(path: str, deadline: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
        if lock_handle(handle) and _is_still_at(handle, path):
            return handle
        os.close(handle)
        if time.monotonic() > deadline:
            raise _locked_out(path)
        time.sleep(0.01)


def _is_still_at(handle: int, path: str) -> bool:
    """Whether the locked file is the one that the next comer would open."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(handle: int, text: str) -> None:
    try:
        os.ftruncate(handle, 0)
        os.write(handle, text.encode())
    except OSError:  # a full disk must not keep anyone from stopping ComfyUI
        pass


def _locked_out(path: str) -> CDEnvironmentError:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            pid, _, purpose = file.read(200).partition(" ")
    except OSError:
        pid, purpose = "", ""
    holder = f" ('comfydock {purpose}', PID {pid})" if pid.isdigit() else ""
    return CDEnvironmentError(
        f"Another comfydock command{holder} is busy with this environment.",
        "wait until it is done, then try again",
        "locked",
    )


def rotate_at_start(path: str, limit: int = LOG_LIMIT) -> None:
    """Move a log over `limit` bytes to `.old`. A start never fails for rotation, so nothing is raised."""
    try:
        if os.lstat(path).st_size > limit:
            _move_log(path)
    except OSError:
        pass


def _move_log(path: str) -> None:
    try:
        os.replace(path, rotated(path))
    except PermissionError:  # Windows, while somebody reads the log
        with open(path, "rb") as source, open(rotated(path), "wb") as target:
            copy_bytes(source, target.write, os.fstat(source.fileno()).st_size)
        os.truncate(path, 0)


def begin_session(path: str, header: str) -> "tuple[BinaryIO, int, int]":
    """The log opened for appending, with the session header written: (file, offset of the header, inode)."""
    make_folder(os.path.dirname(path))
    log = open_append(path)
    try:
        size = os.fstat(log.fileno()).st_size
        gap = b"" if size == 0 or _last_byte(path, size) == b"\n" else b"\n"
        log.write(gap + header.encode())
        log.flush()
        return log, size + len(gap), os.fstat(log.fileno()).st_ino
    except BaseException:
        log.close()
        raise


def _last_byte(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1)


def copy_bytes(source: "BinaryIO", write: Callable[[bytes], object], count: int) -> None:
    """Hand `count` bytes of `source` to `write`, a block at a time (fewer when the file is shorter)."""
    while count > 0:
        piece = source.read(min(count, 1 << 20))
        if not piece:
            return
        write(piece)
        count -= len(piece)


def last_lines_offset(file: "BinaryIO", count: int, floor: int, end: int) -> int:
    """Where the last `count` lines before `end` begin, not before `floor`.

    Reads from the end, a block at a time; a line feed alone ends a line.
    """
    if count <= 0:
        return end
    position, found = end, 0
    while position > floor:
        start = max(floor, position - BLOCK)
        file.seek(start)
        block = file.read(position - start)
        stop = len(block) - 1 if position == end and block.endswith(b"\n") else len(block)
        while (stop := block.rfind(b"\n", 0, stop)) >= 0:
            found += 1
            if found == count:
                return start + stop + 1
        position = start
    return floor


def count_lines(file: "BinaryIO", start: int, end: int) -> int:
    """The number of line ends between two offsets."""
    counts: list[int] = []
    file.seek(start)
    copy_bytes(file, lambda piece: counts.append(piece.count(b"\n")), end - start)
    return sum(counts)


def find_session(file: "BinaryIO", end: int) -> int:
    """Where the last session header before `end` begins, 0 when there is none. Reads from the end."""
    mark = SESSION_MARK.encode()
    position, after = end, b""
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        block = file.read(position - start) + after
        at = block.rfind(b"\n" + mark)
        if at >= 0:
            return start + at + 1
        if start == 0 and block.startswith(mark):
            return 0
        position, after = start, block[: len(mark) + 1]
    return 0


class LogFollower:
    """Hands on what is appended to a log, through rotation by rename and through truncation.

    `position` is the offset of the next byte, `path` where the current log is expected; the open
    file may meanwhile have been moved to `.old`, and is read to its end before the new one.
    """

    def __init__(self, path: str, position: int) -> None:
        self.path = path
        self.position = position
        self._file: "Optional[BinaryIO]" = None

    def read(self) -> bytes:
        """What is new, at most 1 MiB; empty when there is nothing. Raises OSError."""
        piece = self._read_on()
        if piece or not self._has_moved():
            return piece
        piece = self._read_on()  # written between the read and the move
        if not piece:
            self.close()
            self.position = 0
        return piece or self._read_on()

    def _read_on(self) -> bytes:
        if self._file is None:
            try:
                self._file = open(self.path, "rb", buffering=0)
            except FileNotFoundError:
                return b""
        self._file.seek(self.position)
        piece = self._file.read(1 << 20) or b""
        self.position += len(piece)
        return piece

    def _has_moved(self) -> bool:
        """Whether the open file is no longer the log, or has become shorter than what was read of it."""
        if self._file is None:
            return False
        try:
            here, there = os.fstat(self._file.fileno()), os.stat(self.path)
        except FileNotFoundError:
            return False
        return not os.path.samestat(here, there) or here.st_size < self.position

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            self._file.close()
            self._file = None


# ====================================================================================================================
# 7. The state file
# The only room that knows its shape; malformed reads as None, unreadable raises.


def read_state(path: str) -> Optional[ProcessState]:
    """The record at `path`, or None when there is none or it is malformed. Raises OSError when it cannot be read."""
    try:
        data = read_small(path)
        return None if data is None else ProcessState.from_dict(json.loads(data.decode("utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def write_state(path: str, state: ProcessState) -> None:
    """Write the record: atomic, synced, readable by its owner alone. Raises OSError."""
    write_atomic(path, (json.dumps(state.to_dict(), indent=2) + "\n").encode("utf-8"))


def clear_state(path: str) -> None:
    """Remove the record, if there is one. Raises OSError."""
    remove_file(path)


def is_damaged(path: str) -> bool:
    """Whether a file stands there that is no record. Raises OSError when it cannot be read."""
    return os.path.lexists(path) and read_state(path) is None


# ====================================================================================================================
# 8. Manifest, git and nodes
# Knows nothing of processes; returns what changed.


@dataclass
class Manifest:
    """What the manifest says of its environment."""

    comfyui_path: Optional[str] = None
    python_path: Optional[str] = None
    demo: bool = False


def read_manifest(paths: EnvironmentPaths) -> Manifest:
    """Interim"""
    data = read_small(paths.cache)
    return Manifest(**json.loads(data)) if data else Manifest()


def write_new_manifest(paths: EnvironmentPaths, name: str, manifest: Manifest) -> None:
    """Interim"""
    make_folder(paths.cec)
    write_atomic(paths.cache, json.dumps(manifest.__dict__).encode())


# ====================================================================================================================
# 9. Environment
# Returns or raises; never prints, asks or exits. The only room that decides to end a process.

LOCK_SECONDS = 10.0
EARLY_WATCH = 0.25  # bad arguments end ComfyUI in 0.05 s (observed)
START_GRACE = 180.0  # first starts with many custom nodes take minutes: until then silence is no fault
DROPPED_VARIABLES = ("__COMFY_CLI_SESSION__", "PYTHONHOME", "PYTHONPATH")


@dataclass
class Sighting:
    """What there is to see of an environment's ComfyUI without asking it anything.

    `state` is starting (an intent whose starter lives), running, stopped, crashed or foreign. `row`
    is its process, if it has one here; `note` says what is special: untracked, interrupted,
    rebooted, damaged, or nothing.
    """

    state: str
    record: Optional[ProcessState] = None
    row: Optional[ProcessRow] = None
    note: str = ""


class Environment:
    """One ComfyUI environment of a workspace: its checkout, its Python, its one ComfyUI process.

    `taken_ports` tells which ports other environments have recorded (port -> words for who).
    """

    def __init__(
        self,
        name: str,
        workspace_paths: WorkspacePaths,
        taken_ports: "Optional[Callable[[], dict[int, str]]]" = None,
    ) -> None:
        self.name = name
        self.workspace_paths = workspace_paths
        self.paths = EnvironmentPaths(os.path.join(workspace_paths.environments, name))
        self._taken_ports = taken_ports or dict

    # Where its things are ------------------------------------------------------------

    @property
    def cec_path(self) -> "Path":
        """The folder of the manifest and the state file."""
        from pathlib import Path

        return Path(self.paths.cec)

    @property
    def comfyui_path(self) -> "Path":
        """The ComfyUI checkout, which lies elsewhere when it was adopted. Raises CDEnvironmentError."""
        from pathlib import Path

        return Path(self._checkout)

    @property
    def _state_file(self) -> "Path":
        from pathlib import Path

        return Path(self.paths.state)

    @property
    def manifest(self) -> Manifest:
        """The manifest as it stands. Raises CDEnvironmentError when it is broken."""
        return read_manifest(self.paths)

    @property
    def is_complete(self) -> bool:
        """Whether its creation was finished."""
        return os.path.exists(self.paths.complete)

    @property
    def log_path(self) -> str:
        """The log of this environment's runs."""
        return self.workspace_paths.log_file(self.name)

    @property
    def _checkout(self) -> str:
        return self.manifest.comfyui_path or self.paths.comfyui

    @property
    def _script(self) -> str:
        return main_script(self._checkout)

    @property
    def python(self) -> str:
        """The interpreter that runs this ComfyUI (not checked)."""
        return self.manifest.python_path or venv_python(self.paths.venv)

    # The record ----------------------------------------------------------------------

    def _read_state(self) -> Optional[ProcessState]:
        return read_state(self.paths.state)

    def _write_state(self, state: ProcessState) -> None:
        write_state(self.paths.state, state)

    def _clear_state(self) -> None:
        clear_state(self.paths.state)

    def _put_back(self, state: Optional[ProcessState]) -> None:
        """Make the record what it was before something that failed."""
        if state is None:
            self._clear_state()
        else:
            self._write_state(state)

    @contextmanager
    def _process_lock(self, purpose: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        with locked(self.paths.lock, seconds, purpose):
            sweep_leftovers(self.paths.state)
            yield

    def _parse_comfyui_args(self, args: list[str]) -> ComfyUIConfig:
        return parse_comfyui_args(args)

    # Looking -------------------------------------------------------------------------

    def observe(self, scanned: "Optional[list[ProcessRow]]" = None, lock_held: bool = False) -> Sighting:
        """What is there now; changes nothing. Raises CDEnvironmentError for a broken manifest, OSError.

        `scanned` are the rows of one `scan_for_comfyui`, when many environments are looked at.
        Whoever holds the process lock says so: then no starter can be at work.
        """
        record = self._read_state()
        if record is None:
            note = "damaged" if is_damaged(self.paths.state) else ""
            return self._unrecorded(None, STOPPED, note, scanned)
        place = place_of(record.identity if record.pid else record.starter.get("identity", {}))
        if place == "foreign":
            return Sighting(FOREIGN, record)
        if record.pid is None:
            return self._intended(record, place, scanned, lock_held)
        row = find_process(record.pid, record.identity, self._script) if place == "here" else None
        if row is not None:
            return Sighting(RUNNING, record, row)
        return self._unrecorded(record, *self._ending(record, place), scanned)

    def _intended(
        self, record: ProcessState, place: str, scanned: "Optional[list[ProcessRow]]", lock_held: bool
    ) -> Sighting:
        """An intent without a PID: somebody is starting ComfyUI, or was killed while starting it."""
        starter = record.starter
        is_alive = place == "here" and find_process(starter.get("pid"), starter.get("identity", {})) is not None
        if is_alive and not lock_held:
            return Sighting(STARTING, record)
        return self._unrecorded(record, STOPPED, "interrupted", scanned)

    @staticmethod
    def _ending(record: ProcessState, place: str) -> "tuple[str, str]":
        """(state, note) of a recorded process that is gone."""
        if place == "rebooted":
            return STOPPED, "rebooted"
        ended_well = record.wanted == STOPPED or (record.last_exit or {}).get("code") == 0
        return (STOPPED if ended_well else CRASHED), ""

    def _unrecorded(
        self, record: Optional[ProcessState], state: str, note: str, scanned: "Optional[list[ProcessRow]]"
    ) -> Sighting:
        """A live ComfyUI of this checkout that the record does not name, else `state` and `note`."""
        rows = comfyui_processes(self._checkout, scanned)
        return Sighting(RUNNING, record, rows[0], "untracked") if rows else Sighting(state, record, None, note)

    def is_running(self) -> bool:
        """Whether a ComfyUI of this environment is alive. Asks only for the process, and changes nothing."""
        return self.observe().row is not None

    def report(self, timeout: float = 1.0) -> dict[str, Any]:
        """All that `status` tells, with a health check of at most `timeout` seconds. See `describe`."""
        sight = self.observe()
        answer = probe(self.config_of(sight), timeout) if sight.row else Answer(REFUSED)
        return self.describe(sight, answer)

    def config_of(self, sight: Sighting) -> ComfyUIConfig:
        """Where the ComfyUI of a sighting listens, by its arguments."""
        if sight.record is not None and sight.note != "untracked":
            args = sight.record.args
        else:
            args = self._arguments_of(sight.row) if sight.row else []
        try:
            return parse_comfyui_args(args)
        except CDEnvironmentError:
            return ComfyUIConfig()

    def _arguments_of(self, row: ProcessRow) -> list[str]:
        """What follows main.py on the command line of `row`."""
        words = row.command
        at = next((i for i, word in enumerate(words) if os.path.basename(word) == "main.py"), len(words))
        return words[at + 1 :]

    def describe(self, sight: Sighting, answer: Answer) -> dict[str, Any]:
        """A sighting and a probe as one JSON-ready object: UTC ISO times, seconds, bytes."""
        record, row = sight.record, sight.row
        config = self.config_of(sight)
        state = _state_word(sight, answer, self._script) if row else sight.state
        return {
            "name": self.name,
            "state": state,
            "note": sight.note or None,
            "demo": self.manifest.demo,
            "complete": self.is_complete,
            "pid": row.pid if row else record.pid if record and state == FOREIGN else None,
            "host": config.host if row else None,
            "port": config.port if row else None,
            "url": local_url(config) if row else None,
            "health": _health_word(state) if row else None,
            "answer": answer.kind if row else None,
            "uptime": round(row.age(), 3) if row else None,
            "started_at": record.started_at if record else None,
            "args": record.args if record else [],
            "log": record.log_path if record else self.log_path,
            "machine": record.identity.get("machine") if record and state == FOREIGN else None,
            **(self._last_words(record) if record and state == CRASHED else {}),
        }

    def _last_words(self, record: ProcessState) -> dict[str, Any]:
        """What is left of a run that ended by itself: last sign of life, last error line, exit code."""
        return {
            "last_alive": self._last_alive(record),
            "last_error": self.last_error(),
            "exit_code": (record.last_exit or {}).get("code"),
        }

    def _last_alive(self, record: ProcessState) -> Optional[float]:
        """Seconds since 1970 of the last sign of life: a health check or a line in the log."""
        signs = [os.stat(record.log_path).st_mtime] if os.path.exists(record.log_path) else []
        try:
            signs.append(epoch_of(record.last_health_check))
        except ValueError:
            pass
        return max(signs, default=None)

    # The log -------------------------------------------------------------------------

    def session_offset(self) -> int:
        """Where this run begins in the log. Raises OSError when there is no log."""
        record = self._read_state()
        with open(self.log_path, "rb") as log:
            here = os.fstat(log.fileno())
            is_recorded = record is not None and record.log_inode == here.st_ino and record.log_offset <= here.st_size
            return record.log_offset if record and is_recorded else find_session(log, here.st_size)

    def last_error(self) -> Optional[str]:
        """The line of this run's log that most likely says why it ended, looked for in its last 64 KB."""
        try:
            start = self.session_offset()
            with open(self.log_path, "rb") as log:
                log.seek(max(start, os.fstat(log.fileno()).st_size - BLOCK))
                return last_error_line(log.read(BLOCK).decode("utf-8", "replace"))
        except OSError:
            return None

    def note_health(self, status: str) -> None:
        """Record a health check. Left undone when another command is at work, for it is only a note."""
        self._note(lambda record: _set_health(record, status))

    def note_exit(self, run_id: Optional[str], code: Optional[int]) -> None:
        """Record how the run `run_id` ended, unless another has begun."""
        self._note(lambda record: _set_exit(record, code) if record.run_id == run_id else None)

    def _note(self, change: "Callable[[ProcessState], None]") -> None:
        try:
            with self._process_lock("note", 0.5):
                record = self._read_state()
                if record is not None and record.pid is not None:
                    change(record)
                    self._write_state(record)
        except (CDEnvironmentError, OSError):
            pass

    def claimed_port(self) -> "Optional[tuple[int, str]]":
        """(port, words for who has it) when this environment runs or is starting, without a look at all processes."""
        record = self._read_state()
        if record is None:
            return None
        pid, identity = record.pid, record.identity
        if pid is None:
            pid, identity = record.starter.get("pid"), record.starter.get("identity", {})
        elsewhere = place_of(identity) == "foreign"
        if not elsewhere and find_process(pid, identity, self._script if record.pid else None) is None:
            return None
        return record.port, f"environment '{self.name}' (PID {pid})"

    # Starting ------------------------------------------------------------------------

    def run(
        self,
        args: Optional[list[str]] = None,
        *,
        auto_port: bool = False,
        set_env: Optional[dict[str, str]] = None,
        take_over: bool = False,
    ) -> "subprocess.CompletedProcess[str]":
        """Start ComfyUI as a detached daemon; returns once it has outlived the first 0.25 s.

        `auto_port` takes the next free port when the asked one is in use; `set_env` are variables
        for ComfyUI, kept in the state file and repeated by `restart`; `take_over` drops the record
        of another machine or PID namespace. The result's stdout is "Started on host:port".
        Raises CDEnvironmentError when it runs already, the port is taken, Python or main.py is
        missing, or ComfyUI ended at once; OSError when a file cannot be written.
        """
        words = list(args or [])
        parse_comfyui_args(words)
        self._require_startable()
        with self._process_lock("run"):
            self._require_not_running(self.observe(lock_held=True), take_over)
            return self._start_on_some_port(words, set_env or {}) if auto_port else self._start(words, set_env or {})

    def _require_startable(self) -> None:
        if not os.path.isfile(self._script):
            raise CDEnvironmentError(
                f"Environment '{self.name}' has no ComfyUI: {self._script} is missing.", "comfydock list", "missing"
            )
        if not os.access(self.python, os.X_OK):
            raise CDEnvironmentError(
                f"The Python of environment '{self.name}' is missing: {self.python}",
                f"comfydock create {self.name} --from {self._checkout} --python PATH"
                if self.manifest.comfyui_path
                else f"comfydock create {self.name}",
                "missing",
            )

    def _require_not_running(self, sight: Sighting, take_over: bool) -> None:
        record, row = sight.record, sight.row
        if sight.state == FOREIGN and not take_over:
            raise self._foreign(sight)
        if sight.note == "damaged" and row is None:
            set_aside(self.paths.state)
        if row is None:
            return
        if sight.note == "untracked":
            record = self._adopt(row, record)
        raise CDEnvironmentError(
            f"ComfyUI is already running (PID {row.pid}, port {record.port if record else DEFAULT_PORT}).",
            f"comfydock -e {self.name} restart",
            "running",
        )

    def _foreign(self, sight: Sighting) -> CDEnvironmentError:
        machine = sight.record.identity.get("machine") or "unknown" if sight.record else "unknown"
        return CDEnvironmentError(
            f"Environment '{self.name}' was started on another machine or in another container ({machine});"
            " whether it still runs there cannot be seen from here.",
            f"stop it there, or: comfydock -e {self.name} run --take-over",
            "foreign",
        )

    def _start_on_some_port(self, args: list[str], variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        """Start on the first free port; when a stranger snatches it meanwhile, on the next."""
        for _ in range(4):
            try:
                return self._start(args, variables, auto_port=True)
            except CDEnvironmentError as error:
                if "while attempting to bind on address" not in error.message:
                    raise
        return self._start(args, variables, auto_port=True)

    def _start(
        self,
        args: list[str],
        variables: dict[str, str],
        auto_port: bool = False,
        previous: Optional[ProcessState] = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Intent, log, process, record, watch. Whatever fails before the record leaves all as it was."""
        previous = previous or self._read_state()
        record = self._write_intent(args, variables, auto_port)
        process = None
        try:
            rotate_at_start(self.log_path)
            header = session_header(record.run_id or "", self.name)
            log, record.log_offset, record.log_inode = begin_session(self.log_path, header)
            with log:
                process = create_background_process(
                    record.command, record.cwd or self._checkout, log, self._variables(record)
                )
            self._write_started(record, process.pid)
        except BaseException:
            if process is not None:
                self._end_failed_start(process.pid)
            self._put_back(previous)
            raise
        self._watch(process, previous)
        config = parse_comfyui_args(record.args)
        return _completed(record.command, f"Started on {config.host}:{config.port}")

    def _write_intent(self, args: list[str], variables: dict[str, str], auto_port: bool) -> ProcessState:
        """Choose the port and write down what is about to start, so that no other environment takes the port."""
        import uuid

        make_folder(self.workspace_paths.metadata)
        with locked(self.workspace_paths.port_lock, LOCK_SECONDS, "run"):
            args = self._with_usable_port(args, auto_port)
            config = parse_comfyui_args(args)
            record = ProcessState(None, config.host, config.port, args, utc_now(), self.log_path, phase=STARTING)
            record.run_id = str(uuid.uuid4())
            record.command, record.cwd = self._command(args)
            record.env = variables
            record.starter = {"pid": os.getpid(), "identity": identity_of(process_table().row(os.getpid()))}
            record.starter["interrupt_ignored"] = not passes_interrupt_on()
            self._write_state(record)
        return record

    def _with_usable_port(self, args: list[str], auto_port: bool) -> list[str]:
        config = parse_comfyui_args(args)
        taken = self._taken_ports()
        if config.port not in taken and not is_port_bound(config.port, host=config.host):
            return args
        if not auto_port:
            raise self._port_in_use(config, taken)
        return with_port(args, next_free_port(config.port + 1, config.host, taken))

    def _port_in_use(self, config: ComfyUIConfig, taken: dict[int, str]) -> CDEnvironmentError:
        port = config.port
        holders = [f"{row.name}, PID {row.pid}" for row in port_holders(port)]
        holder = taken.get(port) or "; ".join(holders)
        try:
            free = str(next_free_port(port + 1, config.host, taken))
        except CDEnvironmentError:
            free = "<number>"
        return CDEnvironmentError(
            f"Port {port} is already in use" + (f" by {holder}." if holder else "."),
            "Possible solutions:\n"
            "  • Stop the other service using this port\n"
            f"  • Use a different port: comfydock run --port {free}\n"
            "  • Let comfydock choose one: comfydock run --auto-port\n"
            f"  • Check what's using the port: lsof -i:{port} (Unix) or netstat -ano | findstr :{port} (Windows)",
            "port",
        )

    def _command(self, args: list[str]) -> "tuple[list[str], str]":
        """(command, folder) that start ComfyUI. The Windows portable build runs from its own root, with -s."""
        folder = os.path.dirname(self.python)
        if os.path.basename(folder) == "python_embeded":
            return [self.python, "-s", self._script, *args], os.path.dirname(folder)
        return [self.python, self._script, *args], self._checkout

    def _variables(self, record: ProcessState) -> dict[str, str]:
        """The environment variables ComfyUI starts with."""
        variables = {key: value for key, value in os.environ.items() if key not in DROPPED_VARIABLES}
        folder = os.path.dirname(self.python)
        variables["PATH"] = os.pathsep.join([folder, variables.get("PATH", os.defpath)])
        variables["PYTHONIOENCODING"] = "utf-8"
        variables.pop("VIRTUAL_ENV", None)
        if os.path.exists(os.path.join(os.path.dirname(folder), "pyvenv.cfg")):
            variables["VIRTUAL_ENV"] = os.path.dirname(folder)
        variables.update(record.env)
        variables[RUN_ID_VARIABLE] = record.run_id or ""
        return variables

    @staticmethod
    def dropped_variables() -> list[str]:
        """Variables that are set here and that ComfyUI does not get, because they would lead it astray."""
        return [name for name in DROPPED_VARIABLES if name in os.environ]

    def _write_started(self, record: ProcessState, pid: int) -> None:
        record.pid, record.phase = pid, "running"
        record.identity = identity_of(process_table().row(pid))
        record.started_at = utc_now()
        self._write_state(record)

    def _end_failed_start(self, pid: int) -> None:
        row = process_table().row(pid)
        if row is not None:
            self._end_all([row, *family_of(row, None)])
            reap(pid)

    def _watch(self, process: "subprocess.Popen[bytes]", previous: Optional[ProcessState]) -> None:
        """Raises CDEnvironmentError when ComfyUI ends within the first moments."""
        code = exit_code_within(process, EARLY_WATCH)
        if code is None:
            release(process)
            return
        last = self.last_error()
        self._put_back(previous)
        raise CDEnvironmentError(
            f"ComfyUI ended at once with code {code}" + (f": {last}" if last else "."),
            f"comfydock -e {self.name} logs",
            "ended",
        )

    def _adopt(self, row: ProcessRow, record: Optional[ProcessState]) -> ProcessState:
        """Record a live ComfyUI of ours that has no record. Raises CDEnvironmentError when it is somebody else's."""
        run_id = process_table().markers().get(row.pid)
        if not self._is_ours(run_id, record):
            raise CDEnvironmentError(
                f"PID {row.pid} runs this ComfyUI ({self._checkout}), but environment '{self.name}' did not start it.",
                f"comfydock -e {self.name} repair --orphan",
                "stranger",
            )
        return self.adopt(row, record, run_id)

    def adopt(self, row: ProcessRow, record: Optional[ProcessState], run_id: Optional[str]) -> ProcessState:
        """Write the record of a ComfyUI process of this checkout. The caller holds the process lock."""
        if record is None or record.run_id != run_id:
            args = self._arguments_of(row)
            record = ProcessState(row.pid, DEFAULT_HOST, DEFAULT_PORT, args, utc_now(), self.log_path, run_id=run_id)
        config = self.config_of(Sighting(RUNNING, record, row))
        record.pid, record.host, record.port = row.pid, config.host, config.port
        record.phase, record.wanted, record.command = "running", "running", row.command
        record.identity = identity_of(row)
        self._write_state(record)
        return record

    # Orphans -------------------------------------------------------------------------

    def orphans(self) -> list[ProcessRow]:
        """The live ComfyUI processes of this checkout that the record does not name, started by whomever."""
        sight = self.observe()
        tracked = sight.row.pid if sight.row is not None and sight.note != "untracked" else None
        return [row for row in comfyui_processes(self._checkout) if row.pid != tracked]

    def take_back(self, row: ProcessRow) -> ProcessState:
        """Adopt an orphan: from now on it is this environment's ComfyUI. Raises CDEnvironmentError when it has another."""
        with self._process_lock("repair"):
            sight = self.observe(lock_held=True)
            if sight.row is not None and sight.note != "untracked":
                raise CDEnvironmentError(
                    f"Environment '{self.name}' has a ComfyUI already (PID {sight.row.pid}).",
                    "comfydock stop",
                    "running",
                )
            return self.adopt(row, sight.record, process_table().markers().get(row.pid))

    def end_orphan(self, row: ProcessRow, timeout: float = 10) -> None:
        """End an orphan and what it started. Raises CDEnvironmentError when it is another user's or does not end."""
        with self._process_lock("repair", timeout):
            family = family_of(row, process_table().markers().get(row.pid))
            self._end(row, timeout, lambda: False)
            self._end_all(family)

    def clean_stale(self) -> bool:
        """Clear a record of what no longer runs here; whether there was one. Damaged ones are kept beside it."""
        with self._process_lock("repair"):
            sight = self.observe(lock_held=True)
            if sight.row is not None or sight.state == FOREIGN or not os.path.lexists(self.paths.state):
                return False
            if sight.note == "damaged":
                set_aside(self.paths.state)
            self._clear_state()
            return True

    def _is_ours(self, run_id: Optional[str], record: Optional[ProcessState]) -> bool:
        """Whether a marker is of a run of this environment: the record or the log's last header has it."""
        if not run_id or (record is not None and record.run_id == run_id):
            return bool(run_id)
        try:
            with open(self.log_path, "rb") as log:
                log.seek(find_session(log, os.fstat(log.fileno()).st_size))
                return log.read(200).startswith(f"{SESSION_MARK}{run_id} ".encode())
        except OSError:
            return False

    # Stopping ------------------------------------------------------------------------

    def stop(
        self,
        timeout: float = 10,
        *,
        kill: bool = False,
        meanwhile: "Optional[Callable[[], bool]]" = None,
    ) -> bool:
        """End ComfyUI and what it started: SIGINT, its only clean stop, then SIGTERM, SIGKILL at `timeout` seconds.

        `kill` goes straight to SIGKILL; `meanwhile` is called while waiting, and True from it does
        the same. Returns whether there was anything to stop. Raises CDEnvironmentError when the
        process belongs to another user, machine, or program, or does not end.
        """
        with self._process_lock("stop", timeout):
            sight = self.observe(lock_held=True)
            if sight.state == FOREIGN:
                raise self._foreign(sight)
            if sight.row is None:
                self._tidy(sight)
                return False
            self._stop_seen(sight, 0 if kill else timeout, meanwhile)
            self._clear_state()
            return True

    def _tidy(self, sight: Sighting) -> None:
        """Nothing runs: a record of what ran is no longer wanted. Raises CDEnvironmentError for a damaged one."""
        if sight.note == "damaged":
            raise self.damaged_state()
        if sight.record is not None and sight.record.pid is not None:
            reap(sight.record.pid)
        self._clear_state()

    def damaged_state(self) -> CDEnvironmentError:
        """The error of a state file that is no record."""
        return CDEnvironmentError(
            f"The state file of environment '{self.name}' is damaged, its ComfyUI is not running: {self.paths.state}",
            f"comfydock -e {self.name} run  (keeps the damaged file beside it)",
            "damaged",
        )

    def _stop_seen(self, sight: Sighting, timeout: float, meanwhile: "Optional[Callable[[], bool]]" = None) -> None:
        """End the process of a sighting and its family. The caller holds the process lock."""
        row, record = sight.row, sight.record
        if row is None:
            return
        if record is None or sight.note == "untracked":
            record = self._adopt(row, record)
        self._want_stopped(record)
        family = family_of(row, record.run_id)
        self._end(row, timeout, meanwhile or (lambda: False), record)
        reap(row.pid)
        self._end_all([*family, *family_of(row, record.run_id)])

    def _want_stopped(self, record: ProcessState) -> None:
        record.wanted = STOPPED
        try:
            self._write_state(record)
        except OSError:  # a full disk must not keep anyone from stopping ComfyUI
            pass

    def _end(
        self, row: ProcessRow, timeout: float, meanwhile: Callable[[], bool], record: Optional[ProcessState] = None
    ) -> None:
        """Interrupt, terminate 3 s before the deadline, kill at the deadline."""
        polite = max(timeout - 3, timeout / 2)
        steps = [("interrupt", polite), ("terminate", timeout - polite), ("kill", 5.0)]
        if record is not None and record.starter.get("interrupt_ignored"):
            steps = [("terminate", timeout), ("kill", 5.0)]
        hurry = timeout <= 0
        for how, patience in steps:
            if hurry and how != "kill" or not self._signal(row, how):
                continue
            if wait_for_exit(row, patience, meanwhile if how != "kill" else None):
                return
            hurry = hurry or (how != "kill" and meanwhile())
        raise CDEnvironmentError(
            f"ComfyUI (PID {row.pid}) did not end, not even when killed: the system holds it.",
            f"comfydock -e {self.name} status",
            "stuck",
        )

    @staticmethod
    def _signal(row: ProcessRow, how: str) -> bool:
        """Signal a process that is still the one of `row`; that it is gone is no error.

        Returns whether it is worth waiting for the effect: a Windows process without a console cannot be interrupted.
        """
        try:
            if still_runs(row):
                signal_process(row.pid, how)
                signal_process(row.pid, "continue")
        except ProcessLookupError:
            pass
        except PermissionError as refused:
            if how == "interrupt":
                return False
            raise CDEnvironmentError(
                f"PID {row.pid} ({row.name}) belongs to another user and was not stopped.",
                "ask its owner, or try again as that user",
                "permission",
            ) from refused
        return True

    def _end_all(self, rows: "list[ProcessRow]") -> None:
        """What a process left behind: terminate all, and after a second kill what remains."""
        for how, seconds in (("terminate", 1.0), ("kill", 2.0)):
            rows = [row for row in rows if still_runs(row)]
            for row in rows:
                self._signal(row, how)
            deadline = time.monotonic() + seconds
            for row in rows:
                wait_for_exit(row, max(0.0, deadline - time.monotonic()))
                reap(row.pid)

    def restart(self, timeout: float = 10) -> bool:
        """Stop ComfyUI if it runs, and start it with the arguments and variables it was started with.

        Python, main.py, log and port are checked before anything is stopped. Returns True. Raises
        CDEnvironmentError when nothing was ever started or something stands in the way.
        """
        self._require_startable()
        with self._process_lock("restart", timeout):
            sight = self.observe(lock_held=True)
            self._require_restartable(sight)
            if sight.row is not None:
                self._require_port_for_restart(sight)
                self._stop_seen(sight, timeout)
            record = self._read_state()
            if record is None:
                raise CDEnvironmentError("Cannot restart: ComfyUI not running", "comfydock run", "stopped")
            self._await_port(record)
            self._start(record.args, record.env, previous=record)
            return True

    def _require_restartable(self, sight: Sighting) -> None:
        if sight.state == FOREIGN:
            raise self._foreign(sight)
        if sight.note == "damaged":
            raise self.damaged_state()
        if sight.record is None and sight.row is None:
            raise CDEnvironmentError(
                f"Cannot restart: ComfyUI not running in environment '{self.name}', and no arguments are recorded.",
                f"comfydock -e {self.name} run",
                "stopped",
            )
        make_folder(os.path.dirname(self.log_path))
        open_append(self.log_path).close()

    def _require_port_for_restart(self, sight: Sighting) -> None:
        """While ComfyUI is still importing, another program may have taken its port."""
        record, row = sight.record, sight.row
        if record is None or row is None or not is_port_bound(record.port, host=record.host):
            return
        own = {row.pid, *(member.pid for member in family_of(row, record.run_id))}
        holders = process_table().listeners(record.port)
        if holders and not own.intersection(holders):
            raise self._port_in_use(ComfyUIConfig(record.host, record.port), {})

    @staticmethod
    def _await_port(record: ProcessState) -> None:
        deadline = time.monotonic() + 5
        while is_port_bound(record.port, host=record.host) and time.monotonic() < deadline:
            time.sleep(0.02)


def _state_word(sight: Sighting, answer: Answer, script: str) -> str:
    """The state of a live process: running once ComfyUI answers, starting while nobody listens yet."""
    row, record = sight.row, sight.record
    if answer.kind == HEALTHY and is_own_argv(answer.argv, script):
        return RUNNING
    was_healthy = record is not None and record.health_status == HEALTHY
    is_young = row is not None and row.age() < START_GRACE and row.state != "stopped"
    return STARTING if is_young and answer.kind != SILENT and not was_healthy else UNRESPONSIVE


def is_own_argv(argv: Optional[list[str]], script: str) -> bool:
    """Whether the command line that a server says it has can be of a ComfyUI started from `script`."""
    if not argv or not os.path.isabs(argv[0]):
        return True
    return os.path.realpath(argv[0]) == os.path.realpath(script)


def _set_health(record: ProcessState, status: str) -> None:
    record.last_health_check, record.health_status = utc_now(), status


def _set_exit(record: ProcessState, code: Optional[int]) -> None:
    record.last_exit = {"code": code, "at": utc_now()}


def _health_word(state: str) -> str:
    return {RUNNING: "healthy", STARTING: "starting"}.get(state, "unhealthy")


def _completed(command: list[str], words: str) -> "subprocess.CompletedProcess[str]":
    from subprocess import CompletedProcess

    return CompletedProcess(command, 0, words, "")


# ====================================================================================================================
# 10. The demo
# Another program that lives here: exempt from the other doors, imports inside, uses nothing above it.


def demo_server() -> None:
    """Stand in for the `main.py` of ComfyUI 0.3.64: its flags, log lines, endpoints, Origin rule and signal behaviour.

    `demo_source` writes this function out as a whole program, so it uses no name from outside its own body. On purpose
    it is ready in 0.1 s, stops in 0.1 s (ComfyUI: 2 s), opens no browser and makes no images. A node of its own keeps
    the queue busy: {"prompt": {"1": {"class_type": "DemoSleep", "inputs": {"seconds": 5}}}}. `POST /manager/reboot`
    restarts as ComfyUI-Manager does: marker `$__COMFY_CLI_SESSION__.reboot` and exit 0 if that is set, else exec.

    Faults on demand, from environment variables COMFYDOCK_DEMO_<NAME> ("yes" = any text; empty or unset = off):

    START_SECONDS  N             sleep N seconds before binding
    STOP_SECONDS   N             a clean stop takes N seconds
    EXIT           WHEN:CODE[:N] end with CODE, or crash if it is "segv". WHEN: import (with a traceback), bind (after
                                 the GUI line), later (N seconds after it, 0.5 if not said). "segv" is later:segv
    HANG           yes           accept connections, never answer
    DRIP           yes           answer one byte each 0.2 s
    GARBAGE        yes           answer bytes that are no HTTP
    ENDLESS        yes           answer with a body that never ends
    STATUS         CODE          answer every request with this status and no body
    LONG_ANSWER    BYTES         pad /system_stats by so many bytes
    IGNORE         INT,TERM      ignore these signals
    CHILD          yes|session   spawn a child that outlives us, in our session or its own; the log says "child: <pid>"
    NOISE          yes           log invalid UTF-8, bars drawn with carriage returns, a line of 200,000 characters
    SPAM           N[:BYTES]     log N numbered lines a second ("spam 1" ...), each padded to BYTES
    STUCK          yes           the worker dies at its first prompt (as by sys.exit() in a node): it runs for ever
    REEXEC         yes           restart once during startup, as Manager does after installing dependencies
    ONCE           PATH          only the process that creates the file PATH misbehaves, later ones do not
    """
    import argparse
    import heapq
    import http.server
    import json
    import os
    import signal
    import socket
    import sys
    import threading
    import time
    import traceback
    import urllib.parse

    # --- the command line

    LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
    TEXTS = """--tls-keyfile --tls-certfile --base-directory --output-directory --temp-directory --input-directory
        --oneapi-device-selector --front-end-version --comfy-api-base --database-url"""
    FOLDERS = "--user-directory --front-end-root"
    INTEGERS = "--cuda-device --default-device --preview-size"
    DECIMALS = "--max-upload-size --reserve-vram"
    SWITCHES = """--auto-launch --disable-auto-launch --cpu-vae --force-channels-last --disable-ipex-optimize
        --supports-fp8-compute --disable-xformers --async-offload --force-non-blocking --disable-smart-memory
        --multi-user --log-stdout --deterministic --mmap-torch-files --disable-mmap --dont-print-server
        --quick-test-for-ci --disable-metadata --windows-standalone-build --disable-all-custom-nodes
        --disable-api-nodes --enable-compress-response-body"""
    ONE_OF_EACH = (
        "--cuda-malloc --disable-cuda-malloc",
        "--force-fp32 --force-fp16",
        "--fp32-unet --fp64-unet --bf16-unet --fp16-unet --fp8_e4m3fn-unet --fp8_e5m2-unet --fp8_e8m0fnu-unet",
        "--fp16-vae --fp32-vae --bf16-vae",
        "--fp8_e4m3fn-text-enc --fp8_e5m2-text-enc --fp16-text-enc --fp32-text-enc --bf16-text-enc",
        "--cache-classic --cache-lru --cache-none",
        """--use-split-cross-attention --use-quad-cross-attention --use-pytorch-cross-attention --use-sage-attention
        --use-flash-attention""",
        "--force-upcast-attention --dont-upcast-attention",
        "--gpu-only --highvram --normalvram --lowvram --novram --cpu",
    )

    def folder(path: str) -> str:
        """Return `path` if it is a readable folder, as ComfyUI demands of two of its flags."""
        if not os.path.isdir(path) or not os.access(path, os.R_OK):
            raise argparse.ArgumentTypeError(f"'{path}' is not a directory that can be read.")
        return path

    def build_parser() -> argparse.ArgumentParser:
        """Know the flags of ComfyUI 0.3.64; abbreviations are accepted and a bad one exits 2, as there."""
        parser = argparse.ArgumentParser(description="A stand-in for ComfyUI, part of comfydock: no images, no models.")
        add = parser.add_argument
        add("--listen", default="127.0.0.1", metavar="IP", nargs="?", const="0.0.0.0,::")
        add("--port", type=int, default=8188)
        add("--enable-cors-header", metavar="ORIGIN", nargs="?", const="*")
        add("--verbose", default="INFO", nargs="?", const="DEBUG", choices=list(LEVELS))
        add("--extra-model-paths-config", metavar="PATH", nargs="+", action="append")
        add("--whitelist-custom-nodes", nargs="+", default=[])
        add("--directml", type=int, nargs="?", const=-1)
        add("--fast", nargs="*", choices=["fp16_accumulation", "fp8_matrix_mult", "cublas_ops", "autotune"])
        add("--preview-method", choices=["none", "auto", "latent2rgb", "taesd"])
        add("--default-hashing-function", choices=["md5", "sha1", "sha256", "sha512"])
        for kind, names in ((folder, FOLDERS), (str, TEXTS), (int, INTEGERS), (float, DECIMALS)):
            for name in names.split():
                add(name, type=kind)
        for name in SWITCHES.split():
            add(name, action="store_true")
        for names in ONE_OF_EACH:
            group = parser.add_mutually_exclusive_group()
            for name in names.split():
                group.add_argument(name, **({"type": int} if name == "--cache-lru" else {"action": "store_true"}))
        return parser

    def read_faults() -> dict[str, str]:
        """Return the faults asked for by the environment, by name."""
        prefix = "COMFYDOCK_DEMO_"
        found = {name[len(prefix) :]: value for name, value in os.environ.items() if name.startswith(prefix) and value}
        if "ONCE" in found:
            try:
                os.close(os.open(found["ONCE"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return {}
        return found

    args = build_parser().parse_args()
    faults = read_faults()
    stopping = threading.Event()

    def say(text: str, level: str = "INFO") -> None:
        """Log as ComfyUI does: bare lines, to stderr; with --log-stdout those below ERROR to stdout."""
        if LEVELS[level] < LEVELS[args.verbose]:
            return
        stream = sys.stdout if args.log_stdout and LEVELS[level] < LEVELS["ERROR"] else sys.stderr
        stream.write(text + "\n")
        stream.flush()

    # --- the queue and its worker

    SIZE = ("INT", {"default": 512, "min": 1, "max": 16384, "step": 1})
    BATCH = ("INT", {"default": 1, "min": 1, "max": 4096})
    COLOR = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1, "display": "color"})
    SECONDS = ("FLOAT", {"default": 5.0, "min": 0.0, "max": 86400.0})
    PREFIX = ("STRING", {"default": "ComfyUI"})
    NODES: dict[str, dict[str, Any]] = {  # class -> its inputs, as /object_info shows them
        "DemoSleep": {"seconds": SECONDS},
        "EmptyImage": {"width": SIZE, "height": SIZE, "batch_size": BATCH, "color": COLOR},
        "SaveImage": {"images": ("IMAGE", {}), "filename_prefix": PREFIX},
        "PreviewImage": {"images": ("IMAGE", {})},
    }
    SOURCES = ("EmptyImage",)  # every other class is an output node

    def problem(kind: str, message: str, details: str = "", **extra: object) -> "dict[str, Any]":
        """Shape an error as `POST /prompt` reports it."""
        return {"type": kind, "message": message, "details": details, "extra_info": extra}

    def input_problem(name: str, kind: str, given: "dict[str, Any]") -> "Any":
        """Say what is wrong with one input of a node, or None; links and ranges are taken on trust."""
        if name not in given:
            return problem("required_input_missing", "Required input is missing", name, input_name=name)
        if kind == "IMAGE":
            return None
        try:
            {"INT": int, "FLOAT": float, "STRING": str}[kind](given[name])
        except (TypeError, ValueError) as error:
            message, details = f"Failed to convert an input value to a {kind} value", f"{name}, {given[name]}, {error}"
            return problem("invalid_input_type", message, details, input_name=name)
        return None

    def validate(workflow: "dict[str, Any]") -> "tuple[list[str], Any, dict[str, Any]]":
        """Return a workflow's output nodes, the error that refuses it (or None) and the errors of its nodes."""
        for node, body in workflow.items():
            if "class_type" not in body:
                message = "Cannot execute because a node is missing the class_type property."
                return [], problem("invalid_prompt", message, f"Node ID '#{node}'"), {}
            if body["class_type"] not in NODES:
                message = f"Cannot execute because node {body['class_type']} does not exist."
                return [], problem("invalid_prompt", message, f"Node ID '#{node}'"), {}
        outputs = [node for node, body in workflow.items() if body["class_type"] not in SOURCES]
        if not outputs:
            return [], problem("prompt_no_outputs", "Prompt has no outputs"), {}
        bad = {}
        for node, body in workflow.items():
            wanted, given = NODES[body["class_type"]], body.get("inputs", {})
            checks = [input_problem(name, kind, given) for name, (kind, _) in wanted.items()]
            errors = [check for check in checks if check]
            if errors:
                bad[node] = {"errors": errors, "dependent_outputs": outputs, "class_type": body["class_type"]}
        if not bad:
            return outputs, None, {}
        shown = [error for node in outputs if node in bad for error in bad[node]["errors"]]
        details = "\n".join(f"{error['message']}: {error['details']}" for error in shown)
        return [], problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", details), bad

    class Work:
        """ComfyUI's prompt queue, the history, and the one thread that executes.

        pending: a heap of [number, prompt id, workflow, extra data, outputs]; running: at most one of them; number: the
        next one; history: prompt id -> record, oldest first; interrupted: set by /interrupt, cleared by each prompt.
        """

        def __init__(self) -> None:
            self.pending: list[list[Any]] = []
            self.running: list[list[Any]] = []
            self.history: dict[str, Any] = {}
            self.number = 0
            self.changed = threading.Condition()
            self.interrupted = threading.Event()

        def next_number(self, wanted: "dict[str, Any]") -> float:
            """Number a prompt: as it wishes, or next in line, negative to go before all others."""
            if "number" in wanted:
                return float(wanted["number"])
            number, self.number = self.number, self.number + 1
            return -number if wanted.get("front") else number

        def put(self, item: "list[Any]") -> None:
            """Queue a prompt."""
            with self.changed:
                heapq.heappush(self.pending, item)
                self.changed.notify()

        def drop(self, unwanted: "Callable[[list[Any]], bool]") -> None:
            """Remove pending prompts; the running one stays."""
            with self.changed:
                self.pending = [item for item in self.pending if not unwanted(item)]
                heapq.heapify(self.pending)

        def execute_forever(self) -> None:
            """Execute one prompt after another, recording each."""
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.pending)
                    item = heapq.heappop(self.pending)
                    self.running.append(item)
                began = time.monotonic()
                record = self.execute(item)
                with self.changed:
                    self.running.remove(item)
                    self.history[item[1]] = record
                say(f"Prompt executed in {time.monotonic() - began:.2f} seconds")

        def execute(self, item: "list[Any]") -> "dict[str, Any]":
            """Run the nodes of one prompt in the order they are written; return its history record."""
            if "STUCK" in faults:
                raise SystemExit  # a thread swallows it without a word: the prompt stays in `running` for ever
            self.interrupted.clear()
            messages: list[Any] = []

            def tell(event: str, **facts: object) -> None:
                """Add what /history will show."""
                messages.append([event, {"prompt_id": item[1], **facts, "timestamp": int(time.time() * 1000)}])

            tell("execution_start")
            tell("execution_cached", nodes=[])
            completed = True
            for node, body in item[2].items():
                seconds = float(body["inputs"]["seconds"]) if body["class_type"] == "DemoSleep" else 0.0
                if self.interrupted.wait(max(0.0, min(seconds, 86400.0))):
                    say("Processing interrupted")
                    tell("execution_interrupted", node_id=node, node_type=body["class_type"], executed=[])
                    completed = False
                    break
            else:
                tell("execution_success")
            status = {"status_str": "success" if completed else "error", "completed": completed, "messages": messages}
            shown = item[4] if completed else []
            outputs: dict[str, Any] = {node: {"images": []} for node in shown}
            names = ("node_id", "display_node", "real_node_id")
            meta = {node: {**dict.fromkeys(names, node), "parent_node": None} for node in shown}
            return {"prompt": item, "outputs": outputs, "status": status, "meta": meta}

    work = Work()

    # --- the endpoints: each returns a text, a JSON value, None (empty), a status, or (status, one of these)

    def get_index(request: "Handler") -> str:
        return (
            "<!doctype html><html lang=en><head><meta charset=utf-8><title>ComfyUI (comfydock demo)</title></head>"
            "<body><h1>ComfyUI demo</h1><p>This is not ComfyUI but the stand-in that comes with comfydock: it answers "
            "as ComfyUI does and makes no images.</p><p><a href=system_stats>system_stats</a> <a href=queue>queue</a> "
            "<a href=history>history</a> <a href=object_info>object_info</a></p></body></html>\n"
        )

    def get_system_stats(request: "Handler") -> object:
        memory = 8 << 30
        system = {
            "os": os.name,
            "ram_total": memory,
            "ram_free": memory,
            "comfyui_version": "0.3.64",
            "required_frontend_version": "1.27.10",
            "installed_templates_version": "0.1.95",
            "required_templates_version": "0.1.95",
            "python_version": sys.version,
            "embedded_python": False,
            "pytorch_version": "none (comfydock demo)",
            "argv": sys.argv,
            "demo": "comfydock",
        }
        if "LONG_ANSWER" in faults:
            system["padding"] = "x" * int(faults["LONG_ANSWER"])
        device = {
            "name": "comfydock demo",
            "type": "cpu",
            "index": None,
            "vram_total": memory,
            "vram_free": memory,
            "torch_vram_total": memory,
            "torch_vram_free": memory,
        }
        return {"system": system, "devices": [device]}

    def get_queue(request: "Handler") -> object:
        with work.changed:
            return {"queue_running": list(work.running), "queue_pending": list(work.pending)}

    def post_queue(request: "Handler") -> None:
        wanted = request.json()
        if wanted.get("clear"):
            work.drop(lambda item: True)
        work.drop(lambda item: item[1] in wanted.get("delete", ()))

    def get_prompt(request: "Handler") -> object:
        return {"exec_info": {"queue_remaining": len(work.running) + len(work.pending)}}

    def post_prompt(request: "Handler") -> object:
        import uuid

        say("got prompt")
        wanted = request.json()
        number = work.next_number(wanted)
        if "prompt" not in wanted:
            return 400, {"error": problem("no_prompt", "No prompt provided", "No prompt provided"), "node_errors": {}}
        outputs, error, node_errors = validate(wanted["prompt"])
        if error:
            say(f"invalid prompt: {error}", "WARNING")
            return 400, {"error": error, "node_errors": node_errors}
        extra = dict(wanted.get("extra_data", {}))
        if "client_id" in wanted:
            extra["client_id"] = wanted["client_id"]
        name = str(wanted.get("prompt_id", uuid.uuid4()))
        work.put([number, name, wanted["prompt"], extra, outputs])
        return {"prompt_id": name, "number": number, "node_errors": {}}

    def post_interrupt(request: "Handler") -> None:
        try:
            wanted = request.json().get("prompt_id")
        except json.JSONDecodeError:
            wanted = None
        if not wanted:
            say("Global interrupt (no prompt_id specified)")
        elif any(item[1] == wanted for item in list(work.running)):
            say(f"Interrupting prompt {wanted}")
        else:
            say(f"Prompt {wanted} is not currently running, skipping interrupt")
            return
        work.interrupted.set()

    def get_history(request: "Handler") -> object:
        with work.changed:
            records = dict(work.history)
        if request.rest:
            return {name: record for name, record in records.items() if name == request.rest}
        most = int(request.query.get("max_items", len(records)))
        offset = int(request.query.get("offset", -1))
        start = offset if offset >= 0 else max(0, len(records) - most)
        return dict(list(records.items())[start : start + most])

    def post_history(request: "Handler") -> None:
        wanted = request.json()
        with work.changed:
            for name in list(work.history) if wanted.get("clear") else wanted.get("delete", ()):
                work.history.pop(name, None)

    def get_object_info(request: "Handler") -> object:
        return {name: node_info(name) for name in NODES if request.rest in ("", name)}

    def node_info(name: str) -> object:
        """Describe one node class."""
        shown = ["IMAGE"] if name in SOURCES else []
        return {
            "input": {"required": NODES[name]},
            "input_order": {"required": list(NODES[name])},
            "output": shown,
            "output_is_list": [False for _ in shown],
            "output_name": shown,
            "name": name,
            "display_name": name,
            "description": "",
            "python_module": "nodes",
            "category": "demo",
            "output_node": name not in SOURCES,
        }

    def post_reboot(request: "Handler") -> object:
        if request.headers.get("Content-Type", "").startswith(("application/x-www-form", "multipart/", "text/plain")):
            return 400  # what a page from elsewhere can send without asking
        restart()
        return None

    def restart() -> None:
        """Restart as ComfyUI-Manager 3 does; the caller gets no answer, as there."""
        session = os.environ.get("__COMFY_CLI_SESSION__")
        say("\nRestarting...\n\n" if session else "\nRestarting... [Legacy Mode]\n\n")
        if session:
            open(session + ".reboot", "w").close()
            os._exit(0)
        argv = [word for word in sys.argv if word != "--windows-standalone-build"]
        # Windows joins the words of exec without quoting them, starts another process and ends this one.
        argv = [f'"{sys.executable}"', f'"{argv[0]}"', *argv[1:]] if os.name == "nt" else [sys.executable, *argv]
        os.execv(sys.executable, argv)

    ROUTES: dict[tuple[str, str], Callable[[Any], object]] = {  # "/*": one more word may follow
        ("GET", "/"): get_index,
        ("GET", "/system_stats"): get_system_stats,
        ("GET", "/queue"): get_queue,
        ("POST", "/queue"): post_queue,
        ("GET", "/prompt"): get_prompt,
        ("POST", "/prompt"): post_prompt,
        ("POST", "/interrupt"): post_interrupt,
        ("GET", "/history"): get_history,
        ("GET", "/history/*"): get_history,
        ("POST", "/history"): post_history,
        ("GET", "/object_info"): get_object_info,
        ("GET", "/object_info/*"): get_object_info,
        ("POST", "/manager/reboot"): post_reboot,
    }

    # --- HTTP

    def is_loopback(host: "Any") -> bool:
        """Whether every address of a host name is a loopback address."""
        import ipaddress

        try:
            found = socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM) if host else []
        except OSError:
            return False
        return bool(found) and all(ipaddress.ip_address(str(info[4][0]).split("%")[0]).is_loopback for info in found)

    def is_foreign(host: str, origin: str) -> bool:
        """Whether a browser page from elsewhere asks a loopback server: ComfyUI's rule against such requests."""
        to, by = urllib.parse.urlsplit("//" + host.lower()), urllib.parse.urlsplit(origin.lower())
        asked = to.hostname if by.port is None else to.netloc
        asker = by.hostname if to.port is None else by.netloc
        if not asked or not asker or asked == asker or not is_loopback(to.hostname):
            return False
        say(f"WARNING: request with non matching host and origin {asked} != {asker}, returning 403", "WARNING")
        return True

    class Handler(http.server.BaseHTTPRequestHandler):
        """One connection.

        rest: what followed a "/*" route; query: parameter -> its last value; data: the body.
        """

        protocol_version = "HTTP/1.1"
        server_version = "comfydock-demo"
        timeout = 75
        disable_nagle_algorithm = True

        def log_message(self, *words: object) -> None:
            """Stay silent: ComfyUI keeps no access log."""

        def json(self) -> "Any":
            """Return the body as JSON; junk raises, and ends as the 500 that ComfyUI gives."""
            return json.loads(self.data.decode())

        def answer(self) -> None:
            """Answer one request: find its function, call it, send what it returns."""
            path, _, query = self.path.partition("?")
            try:
                self.query = dict(urllib.parse.parse_qsl(query))
                self.data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                result = int(faults["STATUS"]) if "STATUS" in faults else self.result(urllib.parse.unquote(path))
            except Exception:  # noqa: BLE001  # whatever an endpoint does, the server goes on
                say(f"Error handling request from {self.client_address[0]}\n{traceback.format_exc()}".rstrip(), "ERROR")
                self.close_connection = True
                result = 500, "500 Internal Server Error\n\nServer got itself in trouble"
            if isinstance(result, int):
                result = result, None
            self.send(*(result if isinstance(result, tuple) else (200, result)))

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer

        def result(self, path: str) -> object:
            """Apply the Origin rule and the route; unknown paths are static files to ComfyUI, hence 404 or 405."""
            host, origin = self.headers.get("Host"), self.headers.get("Origin")
            if not args.enable_cors_header and host is not None and origin is not None and is_foreign(host, origin):
                return 403
            method = "GET" if self.command == "HEAD" else self.command
            if path.startswith("/api/"):
                path = path[4:]
            head, _, self.rest = path[1:].partition("/")
            found = ROUTES.get((method, path)) or ROUTES.get((method, f"/{head}/*"))
            if found:
                return found(self)
            if method in ("GET", "OPTIONS"):
                return 404 if method == "GET" else 200
            self.allow = "GET,HEAD,POST" if ("POST", path) in ROUTES else "GET,HEAD"
            return 405, "405: Method Not Allowed"

        def send(self, status: int, body: object) -> None:
            """Send an answer: texts as they are, None as nothing, the rest as JSON."""
            kind = "application/json" if not isinstance(body, str) else "text/html" if status == 200 else "text/plain"
            data = (body if isinstance(body, str) else "" if body is None else json.dumps(body)).encode()
            self.send_response(status)
            if body is not None:
                self.send_header("Content-Type", kind + "; charset=utf-8")
            if status == 405:
                self.send_header("Allow", self.allow)
            if args.enable_cors_header:
                self.send_header("Access-Control-Allow-Origin", args.enable_cors_header)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

    def misbehave(connection: socket.socket, fault: str) -> None:
        """Answer a request wrongly: not at all, byte by byte, in no HTTP, or without end."""
        while connection.recv(65536) and fault == "HANG":
            pass
        if fault == "GARBAGE":
            connection.sendall(b"\x00\xff\xfe this is not HTTP\r\n\r\n" * 100)
        elif fault == "DRIP":
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.2)
        elif fault == "ENDLESS":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while True:
                connection.sendall(b" " * 65536)

    def converse(connection: socket.socket, client: "Any", tls: "Any") -> None:
        """Serve one connection to its end, in a thread of its own; a client that leaves is no news."""
        wrong = [name for name in ("HANG", "DRIP", "GARBAGE", "ENDLESS") if name in faults or stopping.is_set()]
        try:
            connection = tls.wrap_socket(connection, server_side=True) if tls else connection
            if wrong:
                misbehave(connection, wrong[0])
            else:
                Handler(connection, client, None)  # type: ignore[arg-type]  # it never asks its server
        except OSError:
            pass
        finally:
            connection.close()

    def accept_forever(listener: socket.socket, tls: "Any") -> None:
        """Accept until we stop; then the backlog still accepts and nobody answers, as with ComfyUI."""
        while not stopping.is_set():
            try:
                connection, client = listener.accept()
            except OSError:  # the client has gone again, or we are out of descriptors
                time.sleep(0.05)
                continue
            threading.Thread(target=converse, args=(connection, client, tls), daemon=True).start()

    def bind(host: str, port: int) -> list[socket.socket]:
        """Listen on every address of one host name ("" is all), as asyncio does, whose error text ComfyUI shows."""
        found = []
        resolved = socket.getaddrinfo(host or None, 0, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        for family, kind, protocol, _, address in resolved:
            where = (address[0], port, *address[2:])
            try:
                listener = socket.socket(family, kind, protocol)
            except OSError:  # a machine without that family; asyncio goes on without a word
                continue
            if os.name == "posix":  # on Windows it would let two programs share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(where)
            except OSError as error:
                text = f"error while attempting to bind on address {where!r}: {str(error.strerror).lower()}"
                raise OSError(error.errno, text) from None
            listener.listen(128)
            found.append(listener)
        return found

    # --- faults and startup

    def end(code: str) -> None:
        """End this process at once: no teardown, no last words."""
        if code == "segv":  # Windows: TerminateProcess with the code of an access violation
            os.kill(os.getpid(), 0xC0000005 if os.name == "nt" else signal.SIGSEGV)
        os._exit(int(code))

    def leave(when: str) -> None:
        """Do what the fault EXIT says for this moment: import, bind or later."""
        wanted = faults.get("EXIT", "")
        moment, code, seconds = ((f"later:{wanted}" if wanted == "segv" else wanted) + "::").split(":")[:3]
        if moment != when:
            return
        if when == "import":
            try:
                raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
            except ModuleNotFoundError:
                traceback.print_exc()
        if when == "later":
            time.sleep(float(seconds or 0.5))
        end(code)

    def spawn_child() -> None:
        """Leave a child that outlives us and holds our log (for ten minutes at most)."""
        import subprocess

        apart = faults["CHILD"] == "session"
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=apart)
        say(f"child: {child.pid}")

    def make_noise() -> None:
        """Write what real logs contain and readers stumble over."""
        bars = "".join(f"\r{20 * n:3}%|{chr(0x2588) * n:5}| {n}/5 [00:0{n}<00:0{5 - n},  1.00it/s]" for n in range(6))
        sys.stderr.buffer.write(b"bad \xff\xfe bytes\n" + bars.encode() + b"\n" + b"x" * 200000 + b"\n")
        sys.stderr.buffer.flush()

    def spam() -> None:
        """Write numbered lines at a steady rate."""
        rate, _, size = faults["SPAM"].partition(":")
        began, number = time.monotonic(), 0
        while True:
            while number < (time.monotonic() - began) * float(rate):
                number += 1
                say(f"spam {number} ".ljust(int(size or 0), "."))
            time.sleep(0.01)

    def custom_nodes() -> None:
        """List the custom nodes as ComfyUI does after loading them: folders without an __init__.py fail."""
        here = os.path.join(args.base_directory or os.path.dirname(os.path.abspath(sys.argv[0])), "custom_nodes")
        if not args.base_directory and not os.path.isdir(here):
            return
        lines = []
        for name in os.listdir(here):  # a --base-directory without this folder ends ComfyUI, too
            path = os.path.join(here, name)
            if name.endswith(".disabled") or name == "__pycache__" or not (os.path.isdir(path) or name.endswith(".py")):
                continue
            if args.disable_all_custom_nodes and name not in args.whitelist_custom_nodes:
                continue
            failed = os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__init__.py"))
            lines.append(f"   0.0 seconds{' (IMPORT FAILED)' if failed else ''}: {path}")
        if lines:
            say("\nImport times for custom nodes:\n" + "\n".join(lines) + "\n")

    def start_up() -> None:
        """Write the log lines of a start, up to the moment before the sockets."""
        leave("import")
        say("Checkpoint files will always be loaded safely.")
        say("Total VRAM 8192 MB, total RAM 8192 MB\npytorch version: none (comfydock demo)")
        say("Set vram state to: DISABLED\nDevice: cpu (comfydock demo)\nUsing no attention: this is a demo")
        say(f"Python version: {sys.version}\nComfyUI version: 0.3.64\nComfyUI frontend version: 1.27.10")
        say("[Prompt Server] web root: built into the comfydock demo")
        custom_nodes()
        if os.environ.pop("COMFYDOCK_DEMO_REEXEC", "") and "REEXEC" in faults:
            say("Restarting to reapply dependency installation.")
            restart()
        if "CHILD" in faults:
            spawn_child()
        if "NOISE" in faults:
            make_noise()
        time.sleep(float(faults.get("START_SECONDS", 0)))
        say("Context impl SQLiteImpl.\nWill assume non-transactional DDL.\nNo target revision found.")

    def serve() -> None:
        """Bind every address, announce each, then answer until something ends us."""
        tls = None
        if args.tls_keyfile and args.tls_certfile:
            import ssl

            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(args.tls_certfile, args.tls_keyfile)
        announce = (lambda text: None) if args.dont_print_server else say
        announce("Starting server\n")
        listeners = []
        for host in args.listen.split(","):
            listeners += bind(host, args.port)
            shown = f"[{host}]" if ":" in host else host
            announce(f"To see the GUI go to: {'https' if tls else 'http'}://{shown}:{args.port}")
        leave("bind")
        threading.Thread(target=work.execute_forever, daemon=True).start()
        if "SPAM" in faults:
            threading.Thread(target=spam, daemon=True).start()
        for listener in listeners:
            threading.Thread(target=accept_forever, args=(listener, tls), daemon=True).start()
        leave("later")
        while True:
            time.sleep(3600)  # Windows lets Ctrl-C interrupt a sleep, not a wait for a lock

    def main() -> None:
        """Start, serve, and stop on SIGINT; every other signal keeps its default."""
        for name in faults.get("IGNORE", "").split(","):
            if name:
                signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
        start_up()
        if args.quick_test_for_ci:
            return
        try:
            serve()
        except KeyboardInterrupt:
            say("\nStopped server")
            stopping.set()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends us, as during ComfyUI's teardown
            time.sleep(float(faults.get("STOP_SECONDS", 0.1)))
            sys.stdout.flush()
            os._exit(0)  # past the interpreter's teardown, where a thread that still logs can make it abort

    main()


def demo_source() -> str:
    """Return the text of a `main.py` that is the demo.

    Raises CDEnvironmentError when Python cannot show the source of `demo_server` (only compiled code is there).
    """
    import inspect

    try:
        source = inspect.getsource(demo_server)
    except (OSError, TypeError):
        raise CDEnvironmentError(
            "The demo cannot be written out: the source of comfydock.py is not readable here.",
            "Run it from a comfydock.py file: python3 comfydock.py run --demo",
        ) from None
    header = "# The demo of comfydock: a stand-in for ComfyUI's main.py. comfydock rewrites this file when it differs."
    return f'{header}\n\n\n{source}\n\nif __name__ == "__main__":\n    demo_server()\n'


# ====================================================================================================================
# 11. Workspace
# The only room that knows there are several environments.

DEMO_NAME = "demo"


class Workspace:
    """A folder of environments, their logs, and which of them is active. `path` is `default_workspace()` if None."""

    def __init__(self, path: "Union[str, Path, None]" = None) -> None:
        self.paths = WorkspacePaths(path if path is not None else default_workspace())

    def list_environments(self) -> list[Environment]:
        """All environments by name, unfinished ones too (`is_complete` tells). Raises OSError when it cannot look."""
        try:
            names = sorted(os.listdir(self.paths.environments), key=str.lower)
        except FileNotFoundError:
            self._require_folder()
            return []
        environments = [self._environment(name) for name in names]
        return [environment for environment in environments if os.path.isdir(environment.paths.cec)]

    def _require_folder(self) -> None:
        if os.path.exists(self.paths.root) and not os.path.isdir(self.paths.root):
            raise CDEnvironmentError(f"The workspace {self.paths.root} is no folder.", "comfydock --workspace DIR list")

    def get_environment(self, name: str) -> Environment:
        """The environment `name`. Raises CDEnvironmentError when there is none."""
        if not is_folder_name(name):
            raise CDEnvironmentError(f"'{name}' cannot name an environment: {NAME_RULE}.", "comfydock list", "usage")
        environment = self._environment(name)
        if not os.path.isdir(environment.paths.cec):
            raise CDEnvironmentError(f"There is no environment '{name}'.", self._suggestion(name), "unknown")
        return environment

    def get_active_environment(self) -> Optional[Environment]:
        """The environment that `use` chose, None when it is not set or gone. Raises CDEnvironmentError."""
        name = self._settings().get("active_environment")
        environment = self._environment(name) if isinstance(name, str) and is_folder_name(name) else None
        return environment if environment is not None and os.path.isdir(environment.paths.cec) else None

    def use(self, name: str) -> Environment:
        """Make `name` the active environment. Raises CDEnvironmentError when there is none, OSError."""
        environment = self.get_environment(name)
        self._write_settings({**self._settings(), "active_environment": name})
        return environment

    def select(self, name: Optional[str], folder: str) -> Environment:
        """The environment that is meant: by name, by the folder one stands in, the active one, the only one.

        Raises CDEnvironmentError when none of these holds.
        """
        if name is not None:
            return self.get_environment(name)
        standing_in = self.environment_of(folder)
        if standing_in is not None:
            return standing_in
        checkout = checkout_above(folder)
        if checkout is not None:
            raise CDEnvironmentError(f"No environment has adopted {checkout} yet.", "comfydock run", "unknown")
        active = self.get_active_environment()
        if active is not None:
            return active
        return self._only_one()

    def _only_one(self) -> Environment:
        environments = self.list_environments()
        if len(environments) == 1:
            return environments[0]
        if not environments:
            raise CDEnvironmentError(
                f"There is no environment in {self.paths.root} yet.", "comfydock run --demo", "unknown"
            )
        names = ", ".join(environment.name for environment in environments[:8])
        hint = f"comfydock -e {environments[0].name} COMMAND, or choose once: comfydock use {environments[0].name}"
        raise CDEnvironmentError(f"Which environment? There are {len(environments)}: {names}.", hint, "unknown")

    def environment_of(self, folder: str) -> Optional[Environment]:
        """The environment whose folder, or whose adopted checkout, holds `folder`; None when there is none."""
        real = os.path.realpath(folder)
        inside = environment_above(real)
        if inside is not None and os.path.realpath(self.paths.root) == inside[0]:
            return self._environment(inside[1])
        checkout = checkout_above(real)
        return self._adopter_of(checkout) if checkout else None

    def _adopter_of(self, checkout: str) -> Optional[Environment]:
        for environment in self.list_environments():
            path = environment.manifest.comfyui_path
            if path and os.path.realpath(path) == os.path.realpath(checkout):
                return environment
        return None

    def adopt(self, folder: str, name: Optional[str] = None, python: Optional[str] = None) -> Environment:
        """Make an environment of a ComfyUI checkout where it stands; nothing is written into it.

        `name` is the folder's by default (its parent's when that is "ComfyUI"), `python` the one
        found with it. Raises CDEnvironmentError when it has no main.py, no Python is found, or the
        name is taken.
        """
        checkout = os.path.abspath(os.path.expanduser(folder))
        if not os.path.isfile(main_script(checkout)):
            raise CDEnvironmentError(f"{checkout} is no ComfyUI checkout: it has no main.py.", "", "missing")
        present = self._adopter_of(checkout)
        if present is not None and name in (None, present.name) and python is None:
            return present
        name = name or self._free_name(made_valid(_folder_title(checkout)))
        require_new_name(name)
        environment = self._environment(name)
        if os.path.isdir(environment.paths.cec) and (present is None or present.name != name):
            raise CDEnvironmentError(f"Environment '{name}' exists already.", f"comfydock -e {name} status", "exists")
        interpreter = os.path.abspath(os.path.expanduser(python)) if python else find_checkout_python(checkout)
        if not os.access(interpreter, os.X_OK) or os.path.isdir(interpreter):
            raise CDEnvironmentError(
                f"There is no Python at {interpreter}.", "give the path of an interpreter", "missing"
            )
        self._write_new(environment, Manifest(comfyui_path=checkout, python_path=interpreter))
        return environment

    def demo(self) -> Environment:
        """The environment of the built-in demo, made or brought up to date. Raises CDEnvironmentError, OSError."""
        environment = self._environment(DEMO_NAME)
        is_there = os.path.isdir(environment.paths.cec)
        if is_there and environment.is_complete and not environment.manifest.demo:
            raise CDEnvironmentError(
                f"The environment '{DEMO_NAME}' is one of yours, not the demo.",
                "comfydock --workspace DIR run --demo",
                "exists",
            )
        source = demo_source().encode()
        script = main_script(environment.paths.comfyui)
        if _file_differs(script, source):
            make_folder(os.path.join(environment.paths.comfyui, "custom_nodes"))
            write_atomic(script, source, 0o644)
        wanted = Manifest(python_path=sys.executable, demo=True)
        if not is_there or not environment.is_complete or environment.manifest.python_path != sys.executable:
            self._write_new(environment, wanted)
        return environment

    def _write_new(self, environment: Environment, manifest: Manifest) -> None:
        make_folder(environment.paths.cec)
        self._write_settings(self._settings())
        write_new_manifest(environment.paths, environment.name, manifest)
        write_atomic(environment.paths.complete, b"")

    def reports(self, timeout: float = 0.5) -> list[dict[str, Any]]:
        """What `list` tells: each environment described, with one look at the processes and all probes at once."""
        environments = self.list_environments()
        scanned = scan_for_comfyui()
        sights = [environment.observe(scanned) for environment in environments]
        alive = [index for index, sight in enumerate(sights) if sight.row is not None]
        configs = [environments[index].config_of(sights[index]) for index in alive]
        answers = dict(zip(alive, probe_all(configs, timeout)))
        active = self.get_active_environment()
        return [
            {
                **environment.describe(sights[index], answers.get(index, Answer(REFUSED))),
                "active": active is not None and environment.name == active.name,
            }
            for index, environment in enumerate(environments)
        ]

    def _environment(self, name: str) -> Environment:
        return Environment(name, self.paths, lambda: self._ports_of_others(name))

    def _ports_of_others(self, name: str) -> dict[int, str]:
        """Port -> who has it, of every other environment that runs or is starting."""
        claims = [other.claimed_port() for other in self.list_environments() if other.name != name]
        return dict(claim for claim in claims if claim is not None)

    def _free_name(self, name: str) -> str:
        taken = {environment.name.lower() for environment in self.list_environments()}
        numbered = (f"{name}-{number}" for number in range(2, 1000))
        return name if name.lower() not in taken else next(other for other in numbered if other.lower() not in taken)

    def _suggestion(self, name: str) -> str:
        from difflib import get_close_matches

        names = [environment.name for environment in self.list_environments()]
        close = get_close_matches(name, names, 1)
        if close:
            return f"did you mean '{close[0]}'?"
        return "comfydock list" if names else "comfydock run --demo"

    def _settings(self) -> dict[str, Any]:
        """workspace.json, with the keys that comfydock 1.0.x needs. Raises CDEnvironmentError when it is damaged."""
        try:
            text = read_small(self.paths.settings)
            settings = {} if text is None else json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise CDEnvironmentError(
                f"The workspace's settings are damaged: {self.paths.settings}", "mend or remove that file", "damaged"
            )
        return settings

    def _write_settings(self, settings: dict[str, Any]) -> None:
        needed = {
            "version": 1,
            "active_environment": "",
            "created_at": utc_now(),
            "global_model_directory": None,
        }
        complete = {**needed, **settings}
        if complete == settings and os.path.exists(self.paths.settings) and settings == self._settings():
            return
        make_folder(self.paths.metadata)
        write_atomic(self.paths.settings, (json.dumps(complete, indent=2) + "\n").encode())


def _file_differs(path: str, data: bytes) -> bool:
    try:
        return read_small(path) != data
    except (OSError, ValueError):
        return True


def _folder_title(checkout: str) -> str:
    parent, name = os.path.split(os.path.realpath(checkout))
    return os.path.basename(parent) or name if name.lower() == "comfyui" else name


def find_checkout_python(checkout: str) -> str:
    """The Python of an existing checkout: a venv in or beside it, the portable build's, or the active conda's.

    Raises CDEnvironmentError when there is none.
    """
    parent = os.path.dirname(checkout)
    places = [venv_python(os.path.join(folder, name)) for folder in (checkout, parent) for name in (".venv", "venv")]
    places.append(os.path.join(parent, "python_embeded", "python.exe"))
    conda = os.environ.get("CONDA_PREFIX")
    if conda:
        places += [os.path.join(conda, "bin", "python"), os.path.join(conda, "python.exe")]
    found = next((place for place in places if os.access(place, os.X_OK)), None)
    if found is None:
        raise CDEnvironmentError(
            f"No Python was found for {checkout} (looked for .venv, venv, python_embeded and conda).",
            f"comfydock create NAME --from {checkout} --python PATH",
            "missing",
        )
    return found


def select_workspace(chosen: Optional[str], named: bool, folder: str) -> Workspace:
    """The workspace that is meant: `--workspace`, the one whose environment one stands in, or the default."""
    if chosen is not None:
        return Workspace(os.path.expanduser(chosen))
    inside = None if named else environment_above(os.path.realpath(folder))
    return Workspace(inside[0]) if inside else Workspace()


# ====================================================================================================================
# 12. Hidden entries
# What the file runs when it starts itself: never typed by anyone.


def console_interrupt_entry(words: list[str]) -> int:
    """The short-lived Windows helper: attach to the console of the PID in `words` and press Ctrl-C there."""
    attach_and_interrupt(int(words[0]))
    return 0


HIDDEN_ENTRIES = {"--console-interrupt": console_interrupt_entry}


# ====================================================================================================================
# 13. The console
# The only room that prints or asks.

JSON_SCHEMA = 1
SIGNS = {  # sign -> (in ASCII, colour)
    "✓": ("[ok]", 32),
    "✗": ("[x]", 31),
    "⚠": ("[!]", 33),
    "\ufe0f": ("", None),
    "•": ("*", None),
    "🎮": (">", None),
    "📋": (">", None),
    "🔄": (">", None),
    "⏸": (">", None),
    "🧹": (">", None),
    "🔍": (">", None),
}
PLAIN = str.maketrans({sign: plain for sign, (plain, _) in SIGNS.items()})
TYPED = r"\bcomfydock (?=(?:run|stop|restart|status|list|logs|use|create|repair|help)(?:\W|$)|-e |--workspace )"
ONE_ENVIRONMENT = ("run", "stop", "restart", "status", "logs", "repair", "node")


@dataclass
class Report:
    """What a command found or did: JSON-ready `data`, the environment it is about, and the exit code.

    `is_told` is true when the command has shown all there is to show while it worked.
    """

    data: dict[str, Any]
    environment: Optional[str] = None
    code: int = 0
    is_told: bool = False


class Console:
    """The one who speaks: words on `out`, warnings and errors on `err`, questions on a terminal alone.

    In JSON mode nothing is said but the one object at the end. `call` is how comfydock was called,
    and replaces the name "comfydock" wherever a line shows a command; `chosen` is the `-e NAME`
    that such a line needs.
    """

    def __init__(self, out: "Any", err: "Any", source: "Any", json_mode: bool = False, call: str = "comfydock") -> None:
        self.out = out
        self.err = err
        self.source = source
        self.json_mode = json_mode
        self.call = call
        self.chosen = ""

    def say(self, line: str = "") -> None:
        """One line for people; nothing in JSON mode."""
        if not self.json_mode:
            self._write(self.out, line + "\n")

    def warn(self, line: str) -> None:
        """One line on the error stream, in JSON mode too."""
        self._write(self.err, f"⚠ {line}\n")

    def warn_plain(self, line: str) -> None:
        """One line on the error stream without a sign: of a log, say."""
        self._write(self.err, line + "\n")

    def progress(self, line: str) -> None:
        """A line that the next one overwrites; only a terminal shows it."""
        if is_terminal(self.err) and not self.json_mode:
            self._write(self.err, f"\r\x1b[K{line}")

    def raw(self, data: bytes) -> None:
        """Bytes of a log, as they are."""
        if self.out is None:
            return
        self.out.flush()
        sink = getattr(self.out, "buffer", None)
        if sink is None:
            self.out.write(data.decode("utf-8", "replace"))
        else:
            sink.write(data)
            sink.flush()

    def ask(self, question: str, default: bool) -> Optional[bool]:
        """The answer to a yes-or-no question; None where no terminal can answer."""
        if self.json_mode or not (is_terminal(self.source) and is_terminal(self.out)):
            return None
        self._write(self.out, f"{question} ({'Y/n' if default else 'y/N'}): ")
        self.out.flush()
        answer = self.source.readline()
        if not answer:
            return None
        return default if not answer.strip() else answer.strip().lower() in ("y", "yes")

    def show(self, command: str, report: Report, words: "Callable[[dict[str, Any]], Iterator[str]]") -> None:
        """A report, in words or as the one JSON object."""
        if self.json_mode:
            self._object(command, True, report.environment, report.data, None)
            return
        for line in [] if report.is_told else words(report.data):
            self.say(line)

    def fail(self, command: str, error: CDEnvironmentError) -> None:
        """An error: a sentence and a hint on the error stream, or the one JSON object."""
        if self.json_mode:
            problem = {"message": error.message, "hint": self._typed(error.hint) or None, "code": error.code}
            self._object(command, False, None, None, problem)
            return
        self._write(self.err, f"comfydock: {error.message}\n")
        if error.hint:
            indent = "" if "\n" in error.hint else "  "
            self._write(self.err, f"{indent}{error.hint}\n")

    def flush(self) -> None:
        """Send what is still buffered; raises OSError (a closed pipe, a full disk)."""
        for stream in (self.out, self.err):
            if stream is not None and not stream.closed:
                stream.flush()

    def _object(self, command: str, ok: bool, environment: Optional[str], data: Any, error: Any) -> None:
        whole = {
            "schema": JSON_SCHEMA,
            "command": command,
            "ok": ok,
            "environment": environment,
            "data": data,
            "error": error,
        }
        self._write(self.out, json.dumps(whole, ensure_ascii=True) + "\n")

    def _write(self, stream: "Any", text: str) -> None:
        if stream is None:  # closed by whoever started us
            return
        text = self._coloured(stream, self._typed(text)) if stream is not self.out or not self.json_mode else text
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()

    def _coloured(self, stream: "Any", text: str) -> str:
        if not wants_colour(stream):
            return text
        for sign, (_, colour) in SIGNS.items():
            if colour is not None and sign in text:
                text = text.replace(sign, f"\x1b[{colour}m{sign}\x1b[0m")
        return text

    def _typed(self, text: str) -> str:
        """`text` with its commands as they must be typed here."""
        if "comfydock " not in text:
            return text
        import re

        def call(match: "re.Match[str]") -> str:
            following = text[match.end() :].split(None, 1)[0].strip("'\"`.,")
            return f"{self.call}{self.chosen if following in ONE_ENVIRONMENT else ''} "

        return re.sub(TYPED, call, text)


def is_terminal(stream: "Any") -> bool:
    """Whether a stream is a terminal; a closed or missing one is not."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:
        return False


def wants_colour(stream: "Any") -> bool:
    """Colours on a terminal that knows them, unless NO_COLOR asks for none (no-color.org)."""
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and os.name != "nt"
    )


def how_called(argv: list[str]) -> str:
    """The words with which comfydock was called: `comfydock`, `python3 comfydock.py`, `python3 -m comfydock`."""
    script = argv[0]
    if os.path.basename(script) not in ("comfydock.py", "__main__.py"):
        return "comfydock"
    original = getattr(sys, "orig_argv", None) or [os.path.basename(sys.executable or "python3")]
    python = "python3" if len(original[0]) > 20 else original[0]
    if "-m" in original[1:3]:
        return f"{python} -m comfydock"
    return f"{python} {script}"


def environment_title(data: dict[str, Any]) -> str:
    """The name of an environment as reports show it: the demo is always labelled."""
    return f"{data['name']} (the built-in demo)" if data.get("demo") else str(data["name"])


def run_words(data: dict[str, Any]) -> Iterator[str]:
    """What `run` says once ComfyUI is started."""
    if data.get("ready"):
        yield f"✓ ComfyUI is ready ({data['waited']:.1f} s)"
    yield f"✓ ComfyUI started in background (PID {data['pid']})"
    yield f"✓ Running on {data['url']}"
    yield f"  Log: {data['log']}"
    yield ""
    yield "Tip: View logs with 'comfydock logs', stop with 'comfydock stop'"


def restart_words(data: dict[str, Any]) -> Iterator[str]:
    """What `restart` says when it is done."""
    yield f"✓ Restarted (new PID: {data['pid']})"
    yield f"✓ Running on {data['url']}"


def stop_words(data: dict[str, Any]) -> Iterator[str]:
    """What `stop` says when it is done."""
    if data["stopped"]:
        yield "✓ ComfyUI stopped"
    else:
        yield f"ComfyUI is not running in environment '{data['name']}'"


def status_words(data: dict[str, Any]) -> Iterator[str]:
    """The report of one environment."""
    yield f"Environment: {environment_title(data)}"
    yield ""
    yield "📋 Process:"
    yield f"   Status: {_status_line(data)}"
    if data["state"] in LIVE_STATES and data["pid"]:
        yield from _live_lines(data)
    if data["state"] == CRASHED:
        yield from _crash_lines(data)
    yield f"   Log: {data['log']}"
    if not data["complete"]:
        yield f"⚠ Not complete: its creation was interrupted (comfydock create {data['name']} goes on)."


def _status_line(data: dict[str, Any]) -> str:
    if data["state"] == FOREIGN:
        return f"Unknown: started on another machine or in another container ({data['machine']})"
    if data["state"] == CRASHED:
        return "Stopped: ComfyUI ended by itself"
    if data["state"] == STOPPED:
        return "Stopped" + _NOTES.get(data["note"], "")
    if data["state"] == STARTING:
        return "Starting (alive, not answering yet)" if data["pid"] else "Starting"
    return "Running ✓" + _NOTES.get(data["note"], "")


_NOTES = {
    "interrupted": " (a start was interrupted before ComfyUI came up)",
    "rebooted": " (the machine was restarted since)",
    "damaged": " (the state file is damaged)",
    "untracked": " (not tracked: comfydock repair --orphan)",
}
_HEALTH_WORDS = {
    "healthy": "✓ Healthy",
    "starting": "not answering yet",
    "unhealthy": "⚠ Not responding",
}


def _live_lines(data: dict[str, Any]) -> Iterator[str]:
    health = _HEALTH_WORDS[data["health"]]
    if data["answer"] == STRANGER and data["health"] != "healthy":
        health = f"⚠ Another program answers on port {data['port']}"
    yield f"   PID: {data['pid']}"
    yield f"   URL: {data['url']}"
    yield f"   Health: {health}"
    yield f"   Uptime: {duration_words(data['uptime'])}"


def _crash_lines(data: dict[str, Any]) -> Iterator[str]:
    if data["exit_code"] is not None:
        yield f"   Exit code: {data['exit_code']}"
    if data["last_alive"]:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(data["last_alive"]))
        yield f"   Last known alive: {moment} ({duration_words(time.time() - data['last_alive'])} ago)"
    if data["last_error"]:
        yield f"   Last error: {data['last_error']}"
    yield "   Start it again: comfydock restart"


def list_words(data: dict[str, Any]) -> Iterator[str]:
    """All environments, a line each."""
    if not data["environments"]:
        yield "No environments found."
        yield "Create one with: comfydock create <name>"
        return
    yield "Environments:"
    width = max(15, *(len(environment_title(item)) for item in data["environments"]))
    for item in data["environments"]:
        marker, label = ("✓", "(active)") if item["active"] else (" ", "        ")
        yield f"  {marker} {environment_title(item):{width}} {label} {_list_status(item)}"


def _list_status(item: dict[str, Any]) -> str:
    state = item["state"]
    if state in LIVE_STATES and item["pid"]:
        sign = "✓" if state == RUNNING else "⚠"
        words = {RUNNING: "running", STARTING: "starting", UNRESPONSIVE: "not responding"}[state]
        return f"({sign} {words} on {item['url']}, PID {item['pid']})" + (
            " untracked" if item["note"] == "untracked" else ""
        )
    if state == STOPPED and not item["complete"]:
        return "(incomplete)"
    return f"({state})"


def repair_words(data: dict[str, Any]) -> Iterator[str]:
    """What `repair` found and did."""
    if data["cleaned"]:
        yield "🧹 Cleaned a stale process state file"
    if not data["orphans"]:
        yield "✓ No orphaned processes found"
    for item in data["orphans"]:
        done = {"adopted": "✓ Adopted", "ended": "✓ Ended", "left": "Left running:"}[item["action"]]
        yield f"  {done} PID {item['pid']}"
    if any(item["action"] == "left" for item in data["orphans"]):
        yield "Take it back with: comfydock repair --orphan --adopt, or end it with: comfydock repair --orphan --end"


def orphan_line(item: dict[str, Any]) -> str:
    """An orphaned process in one line."""
    return f"  • PID {item['pid']}, {duration_words(item['age'])} old, port {item['port']}: {item['command']}"


def use_words(data: dict[str, Any]) -> Iterator[str]:
    """What `use` says."""
    yield f"✓ Active environment: {data['name']}"


def create_words(data: dict[str, Any]) -> Iterator[str]:
    """What `create` says."""
    yield f"✓ Environment '{data['name']}' is ready"
    yield f"  ComfyUI: {data['comfyui']}"
    yield f"  Python: {data['python']}"
    yield ""
    yield f"Start it with: comfydock -e {data['name']} run"


def text_words(data: dict[str, Any]) -> Iterator[str]:
    """A report that is a text."""
    yield data["text"]


# ====================================================================================================================
# 14. Commands
# One short function a command: find, act, return a report. No print, no exit.

READY_SECONDS = 180.0
FOLLOW_PAUSE = 0.05
FOLLOW_PATIENCE = 2.0
SHOWN_ON_FAILURE = 20


def selected(console: Console, args: "argparse.Namespace") -> Environment:
    """The environment a command is about; the console learns whether its commands need `-e`."""
    folder = os.getcwd()
    workspace = select_workspace(args.workspace, args.env is not None, folder)
    environment = workspace.select(args.env, folder)
    remember_choice(console, args, environment)
    return environment


def remember_choice(console: Console, args: "argparse.Namespace", environment: Environment) -> None:
    """Let the commands that the console shows reach the same environment."""
    where = f" --workspace {args.workspace}" if args.workspace else ""
    console.chosen = where + (f" -e {environment.name}" if args.env or args.__dict__.get("demo") else "")


def run(console: Console, args: "argparse.Namespace") -> Report:
    """Start ComfyUI, and stay with it when asked to."""
    environment = environment_to_run(console, args)
    what = "the built-in demo" if environment.manifest.demo else "ComfyUI"
    console.say(f"🎮 Starting {what} in environment: {environment.name}")
    if args.comfyui_args:
        console.say(f"   Arguments: {' '.join(args.comfyui_args)}")
    warn_before_start(console, environment, args)
    environment.run(
        args.comfyui_args,
        auto_port=args.auto_port or is_demo_on_any_port(args),
        set_env=args.set_env,
        take_over=args.take_over,
    )
    report = started_report(environment)
    if args.foreground or os.getpid() == 1:
        console.show("run", report, run_words)
        return stay_in_foreground(console, environment)
    if args.wait is not None:
        report.data["waited"] = wait_until_ready(console, environment, args.wait)
        report.data["ready"] = True
    return report


def environment_to_run(console: Console, args: "argparse.Namespace") -> Environment:
    """As `selected`; the demo is made, and a checkout that nobody has adopted is adopted."""
    folder = os.getcwd()
    workspace = select_workspace(args.workspace, args.env is not None or args.demo, folder)
    if args.demo:
        if args.env not in (None, DEMO_NAME):
            raise CDEnvironmentError("--demo has an environment of its own, so -e cannot name another.", "", "usage")
        environment = workspace.demo()
    else:
        environment = adopted_here(console, args, workspace, folder) or workspace.select(args.env, folder)
    remember_choice(console, args, environment)
    return environment


def adopted_here(
    console: Console, args: "argparse.Namespace", workspace: Workspace, folder: str
) -> Optional[Environment]:
    """The checkout one stands in, adopted now if it was not yet."""
    checkout = checkout_above(os.path.realpath(folder))
    if args.env is not None or checkout is None or workspace.environment_of(folder) is not None:
        return None
    environment = workspace.adopt(checkout)
    console.say(f"✓ Adopted {checkout} as environment '{environment.name}' (Python: {environment.python})")
    return environment


def is_demo_on_any_port(args: "argparse.Namespace") -> bool:
    """Whether the demo may take the next free port: no port was asked for."""
    words = [word.partition("=")[0] for word in args.comfyui_args]
    return bool(args.demo) and not any(word.startswith("--po") and "--port".startswith(word) for word in words)


def warn_before_start(console: Console, environment: Environment, args: "argparse.Namespace") -> None:
    """What a user should know before ComfyUI is up."""
    for name in environment.dropped_variables():
        console.warn(f"{name} is set here; ComfyUI starts without it.")
    host = parse_comfyui_args(args.comfyui_args).host
    if not is_loopback(host):
        console.warn(f"ComfyUI has no password: whoever can reach this machine on {host or 'any address'} can use it.")


def started_report(environment: Environment) -> Report:
    """What there is to say of a ComfyUI that was just started."""
    record = environment._read_state()
    if record is None:  # another command has stopped it meanwhile
        raise CDEnvironmentError(
            f"ComfyUI of environment '{environment.name}' was stopped meanwhile.", "comfydock status"
        )
    data = {
        "name": environment.name,
        "pid": record.pid,
        "url": local_url(parse_comfyui_args(record.args)),
        "host": record.host,
        "port": record.port,
        "args": record.args,
        "log": record.log_path,
        "started_at": record.started_at,
        "demo": environment.manifest.demo,
    }
    return Report(data, environment.name)


def wait_until_ready(console: Console, environment: Environment, seconds: float) -> float:
    """Wait for the first healthy answer; returns the seconds it took.

    Raises CDEnvironmentError when ComfyUI ends first, or when the time is up (then it runs on).
    """
    began = time.monotonic()
    while True:
        data = environment.report(timeout=1.0)
        waited = time.monotonic() - began
        if data["state"] == RUNNING:
            console.progress("")
            environment.note_health(HEALTHY)
            return waited
        if data["pid"] is None:
            console.progress("")
            raise ended_while_waiting(console, environment, data)
        if waited > seconds:
            console.progress("")
            raise CDEnvironmentError(
                f"ComfyUI did not answer within {seconds:g} s; it goes on starting (PID {data['pid']}).",
                "comfydock logs -f",
                "timeout",
            )
        console.progress(f"   Waiting for ComfyUI to answer on {data['url']} ... {waited:.0f} s")
        time.sleep(0.1)


def ended_while_waiting(console: Console, environment: Environment, data: dict[str, Any]) -> CDEnvironmentError:
    """The last lines of the log go to the error stream; the sentence names the one that matters."""
    for line in last_lines(environment, SHOWN_ON_FAILURE).decode("utf-8", "replace").splitlines():
        console.warn_plain(line)
    reason = environment.last_error()
    return CDEnvironmentError(
        "ComfyUI ended before it answered" + (f": {reason}" if reason else "."), "comfydock logs", "ended"
    )


def last_lines(environment: Environment, count: int) -> bytes:
    """The last lines of this run."""
    try:
        start = environment.session_offset()
        with open(environment.log_path, "rb") as log:
            end = os.fstat(log.fileno()).st_size
            log.seek(last_lines_offset(log, count, start, end))
            return log.read(1 << 20)
    except OSError:
        return b""


def stay_in_foreground(console: Console, environment: Environment) -> Report:
    """Stream the log; Ctrl-C, SIGTERM and SIGHUP stop ComfyUI, its own end ends us with its exit code."""
    console.say("=" * 60)
    console.say("Streaming logs (Ctrl+C to stop ComfyUI)...")
    console.say("=" * 60)
    with noted_signals() as received:
        code = Foreground(console, environment, received).watch()
    return Report({}, environment.name, code, is_told=True)


def show_new(console: Console, follower: LogFollower) -> bool:
    """Show what is new in a log; whether there was anything."""
    piece = follower.read()
    if piece:
        console.raw(piece)
    return bool(piece)


def exit_code_of(pid: int) -> Optional[int]:
    """The exit code of a child that has ended, within the moment that the system may need to hand it out."""
    for _ in range(10):
        code = reap(pid)
        if code is not None:
            return code
        time.sleep(0.01)
    return None


class Foreground:
    """The old blocking feel: one who watches a daemon until it ends, and ends it when told to.

    `received` is the list that signal handlers append to: "interrupt", "terminate" or "hangup".
    """

    def __init__(self, console: Console, environment: Environment, received: list[str]) -> None:
        self.console = console
        self.environment = environment
        self.received = received
        self.follower = LogFollower(environment.log_path, environment.session_offset())
        self.record = environment._read_state()
        self.was_healthy = False

    def watch(self) -> int:
        """Returns the exit code of the command."""
        pid = self.record.pid if self.record and self.record.pid else 0
        row = process_table().row(pid)
        while row is not None and still_runs(row):
            self._pump()
            if self.received:
                return self._stop()
            if os.getpid() == 1:
                reap_strangers(pid)
            time.sleep(FOLLOW_PAUSE)
        self._pump()
        return self._ended(exit_code_of(pid))

    def _pump(self) -> None:
        while show_new(self.console, self.follower):
            pass

    def _stop(self) -> int:
        """Stop ComfyUI for the first signal; a second Ctrl-C meanwhile kills it."""
        first = self.received[0]
        self.console.say("\n⏸  Stopping ComfyUI...")
        self.environment.stop(meanwhile=self._is_impatient)
        self._pump()
        self.console.say("✓ ComfyUI stopped")
        if self._is_impatient():
            return 130
        return {"interrupt": 0, "terminate": 143, "hangup": 129}[first]

    def _is_impatient(self) -> bool:
        self._pump()
        return self.received.count("interrupt") > 1

    def _ended(self, code: Optional[int]) -> int:
        record = self.environment._read_state()
        is_ours = record is not None and self.record is not None and record.run_id == self.record.run_id
        if not is_ours or record is None or record.wanted == STOPPED:
            return self._gone_elsewhere()
        self.environment.note_exit(self.record.run_id if self.record else None, code)
        shown = "" if code is None else f" with code {code}"
        self.console.say(f"\n⚠️  ComfyUI process exited{shown}")
        return 1 if code is None else 128 - code if code < 0 else code

    def _gone_elsewhere(self) -> int:
        """Stopped by another command: go on with what a restart starts, else say so."""
        successor = await_successor(self.environment, self.record.run_id if self.record else None)
        if successor is not None:
            self.record = successor
            return self.watch()
        self.console.say("\nComfyUI was stopped from elsewhere.")
        return 0


def await_successor(environment: Environment, run_id: Optional[str]) -> Optional[ProcessState]:
    """The record of a run that replaces `run_id` within 2 s, or None."""
    deadline = time.monotonic() + FOLLOW_PATIENCE
    while time.monotonic() < deadline:
        record = environment._read_state()
        if record is not None and record.pid is not None and record.run_id != run_id and environment.is_running():
            return record
        time.sleep(FOLLOW_PAUSE)
    return None


def stop(console: Console, args: "argparse.Namespace") -> Report:
    """End ComfyUI."""
    environment = selected(console, args)
    sight = environment.observe()
    if sight.row is not None:
        console.say(f"⏸  Stopping ComfyUI (PID {sight.row.pid})...")
    stopped = environment.stop(args.timeout, kill=args.kill)
    return Report(
        {"name": environment.name, "stopped": stopped, "pid": sight.row.pid if sight.row else None}, environment.name
    )


def restart(console: Console, args: "argparse.Namespace") -> Report:
    """Stop and start again with the same arguments."""
    environment = selected(console, args)
    sight = environment.observe()
    if sight.record is not None:
        console.say("🔄 Restarting ComfyUI...")
        previous = f"PID {sight.row.pid}" if sight.row else "not running"
        console.say(f"   Previous: {previous}, args: {' '.join(sight.record.args) or '(none)'}")
    environment.restart(args.timeout)
    return started_report(environment)


def status(console: Console, args: "argparse.Namespace") -> Report:
    """The truth about one environment."""
    environment = selected(console, args)
    data = environment.report()
    if data["note"] == "damaged" and data["pid"] is None:
        raise environment.damaged_state()
    return Report(data, environment.name, 3 if data["state"] in (STOPPED, CRASHED) else 0)


def list_all(console: Console, args: "argparse.Namespace") -> Report:
    """The truth about all environments."""
    workspace = select_workspace(args.workspace, args.env is not None, os.getcwd())
    return Report({"workspace": workspace.paths.root, "environments": workspace.reports()})


def repair(console: Console, args: "argparse.Namespace") -> Report:
    """Clean a stale record, and find and settle processes that nobody tracks; no file of the environment is touched."""
    environment = selected(console, args)
    console.say("🔍 Checking for process/state issues...")
    cleaned = environment.clean_stale()
    found = [(row, orphan_data(environment, row)) for row in environment.orphans()]
    if found:
        console.say(f"\n⚠️  Found {len(found)} orphaned ComfyUI process(es):")
    for row, item in found:
        console.say(orphan_line(item))
        item["action"] = settle_orphan(console, args, environment, row)
    return Report(
        {"name": environment.name, "cleaned": cleaned, "orphans": [item for _, item in found]}, environment.name
    )


def orphan_data(environment: Environment, row: ProcessRow) -> dict[str, Any]:
    """What there is to tell of an orphan."""
    port = environment.config_of(Sighting(RUNNING, None, row, "untracked")).port
    return {"pid": row.pid, "age": round(row.age(), 3), "port": port, "command": row.text}


def settle_orphan(console: Console, args: "argparse.Namespace", environment: Environment, row: ProcessRow) -> str:
    """Adopt or end an orphan as told, or as a terminal answers; returns what was done."""
    if args.adopt or (not args.end and console.ask("    Adopt it?", True)):
        environment.take_back(row)
        return "adopted"
    if args.end or console.ask("    End it?", False):
        environment.end_orphan(row)
        return "ended"
    return "left"


def use(console: Console, args: "argparse.Namespace") -> Report:
    """Choose the active environment."""
    environment = select_workspace(args.workspace, True, os.getcwd()).use(args.name)
    return Report({"name": environment.name}, environment.name)


def create(console: Console, args: "argparse.Namespace") -> Report:
    """Make an environment."""
    workspace = select_workspace(args.workspace, True, os.getcwd())
    require_new_name(args.name)
    environment = workspace.adopt(args.from_dir, args.name, args.python)
    if args.use:
        workspace.use(args.name)
    data = {"name": environment.name, "comfyui": str(environment.comfyui_path), "python": environment.python}
    return Report(data, environment.name)


def logs(console: Console, args: "argparse.Namespace") -> Report:
    """The log of this run, of all runs, or as it grows."""
    environment = selected(console, args)
    path = environment.log_path
    if args.path:
        return Report({"text": path}, environment.name)
    if not os.path.exists(path):
        raise CDEnvironmentError("No log file found.", "Start ComfyUI with: comfydock run", "no-log")
    if args.follow:
        follow_log(console, environment, 20 if args.tail is None else args.tail)
    else:
        for span in log_spans(environment, args.all, args.tail):
            copy_span(console, span)
    return Report({}, environment.name, is_told=True)


def log_spans(environment: Environment, everything: bool, tail: Optional[int]) -> "list[tuple[str, int, int]]":
    """(path, start, end) of the parts of the log that are asked for, in the order to show them."""
    path = environment.log_path
    start = 0 if everything else environment.session_offset()
    spans = [(path, start, os.path.getsize(path))]
    if everything and os.path.exists(rotated(path)):
        spans.insert(0, (rotated(path), 0, os.path.getsize(rotated(path))))
    return spans if tail is None else last_of_spans(spans, tail)


def last_of_spans(spans: "list[tuple[str, int, int]]", count: int) -> "list[tuple[str, int, int]]":
    """The part of `spans` that holds their last `count` lines."""
    chosen: "list[tuple[str, int, int]]" = []
    for path, start, end in reversed(spans):
        with open(path, "rb") as log:
            offset = last_lines_offset(log, count, start, end)
            chosen.insert(0, (path, offset, end))
            if offset > start or count <= 0:
                break
            count -= count_lines(log, start, end)
    return chosen


def copy_span(console: Console, span: "tuple[str, int, int]") -> None:
    """Show one part of a log."""
    path, start, end = span
    with open(path, "rb") as log:
        log.seek(start)
        copy_bytes(log, console.raw, end - start)


def follow_log(console: Console, environment: Environment, tail: int) -> None:
    """Show the last `tail` lines and what comes, until ComfyUI has been gone for 2 s."""
    span = log_spans(environment, False, tail)[-1]
    copy_span(console, span)
    follower = LogFollower(environment.log_path, span[2])
    last_alive = next_look = time.monotonic()
    while True:
        if show_new(console, follower):
            continue
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 0.5
            last_alive = now if environment.observe().state in LIVE_STATES else last_alive
        if now - last_alive > FOLLOW_PATIENCE:
            console.say("\n⚠️  ComfyUI process exited")
            return
        time.sleep(FOLLOW_PAUSE)


def show_help(console: Console, args: "argparse.Namespace") -> Report:
    """How to use comfydock, or one of its commands."""
    return Report({"text": args.help_text})


def show_version(console: Console, args: "argparse.Namespace") -> Report:
    """Which comfydock this is."""
    return Report({"text": f"comfydock {__version__}"})


# ====================================================================================================================
# 15. The command line
# The only room that names argparse: a literal table of commands, and a parser that walks it.


class Option:
    """An option of comfydock: a switch without `metavar`, else with a value, which `bare` lets one leave out."""

    def __init__(
        self,
        flags: str,
        text: str,
        metavar: str = "",
        kind: "Callable[[str], Any]" = str,
        default: Any = None,
        bare: Any = None,
        repeated: bool = False,
    ) -> None:
        self.flags = flags.split()
        self.text = text
        self.metavar = metavar
        self.kind = kind
        self.default = default
        self.bare = bare
        self.repeated = repeated

    def add_to(self, parser: "argparse.ArgumentParser") -> None:
        """Declare it to argparse."""
        if not self.metavar:
            parser.add_argument(*self.flags, action="store_true", help=self.text)
            return
        settings: dict[str, Any] = {
            "metavar": self.metavar,
            "type": self.kind,
            "default": self.default,
            "help": self.text,
        }
        if "--from" in self.flags:  # a word of Python, so it cannot name an attribute
            settings["dest"] = "from_dir"
        if self.bare is not None:
            settings.update(nargs="?", const=self.bare)
        if self.repeated:
            settings.update(action="append", default=[])
        parser.add_argument(*self.flags, **settings)


class Command:
    """A command: its name, what runs it, how its report reads, its options, and examples that can be typed."""

    def __init__(
        self,
        name: str,
        summary: str,
        act: "Callable[[Console, argparse.Namespace], Report]",
        words: "Callable[[dict[str, Any]], Iterator[str]]",
        options: "tuple[Option, ...]" = (),
        operands: "tuple[tuple[str, str], ...]" = (),
        passes_on: bool = False,
        has_json: bool = True,
        examples: "tuple[str, ...]" = (),
    ) -> None:
        self.name = name
        self.summary = summary
        self.act = act
        self.words = words
        self.options = options
        self.operands = operands
        self.passes_on = passes_on
        self.has_json = has_json
        self.examples = examples


def seconds(text: str) -> float:
    """A length of time in seconds. Raises ValueError."""
    value = float(text)
    if not 0 <= value < 1e8:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """A number of lines. Raises ValueError."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def assignment(text: str) -> "tuple[str, str]":
    """KEY=VALUE, for an environment variable. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key or "\0" in text:
        raise ValueError(text)
    return key, value


EVERYWHERE = (
    Option("-e --env", "the environment (default: the one you stand in, else the active one)", "NAME"),
    Option("--workspace", "the workspace (default: COMFYDOCK_HOME, else ~/.comfydock)", "DIR"),
    Option("--json", "one JSON object instead of words"),
    Option("-h --help", "this help"),
    Option("--version", "the version of comfydock"),
)
COMMANDS = (
    Command(
        "run",
        "start ComfyUI in the background; its own arguments pass through",
        run,
        run_words,
        (
            Option("-f --foreground", "stay and stream the log; Ctrl-C stops ComfyUI"),
            Option(
                "--wait", "return only when ComfyUI answers (default: 180 s)", "SECONDS", seconds, bare=READY_SECONDS
            ),
            Option("--auto-port", "take the next free port when the port is in use"),
            Option(
                "--set-env",
                "an environment variable for ComfyUI, kept for restarts",
                "KEY=VALUE",
                assignment,
                repeated=True,
            ),
            Option("--demo", "run the built-in stand-in for ComfyUI"),
            Option("--take-over", "drop the record of another machine or container"),
            Option("--no-sync", "do not bring the environment in line first"),
        ),
        passes_on=True,
        examples=(
            "comfydock run --demo",
            "comfydock run --wait -- --listen --port 8190",
            "comfydock -e dev run --foreground",
        ),
    ),
    Command(
        "stop",
        "stop ComfyUI and what it started",
        stop,
        stop_words,
        (
            Option("--timeout", "seconds until it is killed (default: 10)", "SECONDS", seconds, 10.0),
            Option("--kill", "kill it at once"),
        ),
        examples=("comfydock stop", "comfydock -e dev stop --timeout 60"),
    ),
    Command(
        "restart",
        "stop and start again with the same arguments",
        restart,
        restart_words,
        (Option("--timeout", "seconds until it is killed (default: 10)", "SECONDS", seconds, 10.0),),
        examples=("comfydock restart",),
    ),
    Command(
        "status",
        "what ComfyUI is doing (exit code 3 when it is not running)",
        status,
        status_words,
        examples=("comfydock status", "comfydock -e dev status --json"),
    ),
    Command("list", "all environments and what runs in them", list_all, list_words, examples=("comfydock list",)),
    Command(
        "logs",
        "the log of this run; it is kept after a crash",
        logs,
        text_words,
        (
            Option("-f --follow", "the last 20 lines and what comes"),
            Option("-n --tail", "the last N lines", "N", count),
            Option("--all", "earlier runs too"),
            Option("--path", "where the log is"),
        ),
        has_json=False,
        examples=("comfydock logs -n 50", "comfydock logs -f"),
    ),
    Command(
        "repair",
        "find ComfyUI processes that nobody tracks, clean a stale state file",
        repair,
        repair_words,
        (
            Option("--orphan", "processes and state only; no file of the environment is touched"),
            Option("--adopt", "take back every orphan found, without asking"),
            Option("--end", "end every orphan found, without asking"),
        ),
        examples=("comfydock repair --orphan", "comfydock -e dev repair --orphan --adopt"),
    ),
    Command(
        "create",
        "make an environment of an existing ComfyUI folder",
        create,
        create_words,
        (
            Option("--from", "the ComfyUI folder, which stays where it is", "DIR"),
            Option("--python", "its Python (default: the one found with it)", "PATH"),
            Option("--use", "make it the active environment"),
        ),
        (("name", "the name of the new environment"),),
        examples=("comfydock create main --from ~/ComfyUI --use",),
    ),
    Command(
        "use",
        "choose the active environment",
        use,
        use_words,
        operands=(("name", "the environment"),),
        examples=("comfydock use dev",),
    ),
    Command(
        "help",
        "how to use a command",
        show_help,
        text_words,
        operands=(("topic", "a command"),),
        examples=("comfydock help run",),
    ),
)


def find_command(words: list[str]) -> "tuple[Optional[Command], list[str]]":
    """(command, the other words): the command is the first word that is no option of comfydock.

    Raises CDEnvironmentError for a word that is no command.
    """
    index = 0
    while index < len(words) and words[index].startswith("-"):
        index += width_of(words, index, EVERYWHERE) or 1
    if index >= len(words):
        return None, words
    found = next((command for command in COMMANDS if command.name == words[index]), None)
    if found is None:
        raise unknown_command(words[index])
    return found, words[:index] + words[index + 1 :]


def unknown_command(word: str) -> CDEnvironmentError:
    """The error of a word that is no command, with the command that it may have been."""
    from difflib import get_close_matches

    close = get_close_matches(word, [command.name for command in COMMANDS], 1)
    hint = f"did you mean: comfydock {close[0]}" if close else "comfydock help"
    return CDEnvironmentError(f"'{word}' is no command of comfydock.", hint, "usage")


def option_named(word: str, options: "tuple[Option, ...]") -> Optional[Option]:
    """The option that `word` spells in full, with its value behind "=" or without."""
    flag = word.partition("=")[0] if word.startswith("--") else word
    return next((option for option in options if flag in option.flags), None)


def width_of(words: list[str], index: int, options: "tuple[Option, ...]") -> int:
    """How many words the option at `index` takes with its value; 0 when it is none of `options`."""
    word = words[index]
    option = option_named(word, options)
    if option is None:
        return 0
    if not option.metavar or "=" in word and word.startswith("--"):
        return 1
    if option.bare is None:
        return 2
    following = words[index + 1] if index + 1 < len(words) else ""
    return 2 if following.replace(".", "", 1).isdigit() else 1


def split_words(words: list[str], command: Command) -> "tuple[list[str], list[str]]":
    """(words of comfydock, words of ComfyUI). The first `--` is dropped, and all after it is ComfyUI's."""
    options = (*EVERYWHERE, *command.options)
    ours: list[str] = []
    theirs: list[str] = []
    index = 0
    while index < len(words):
        if words[index] == "--":
            return ours, [*theirs, *words[index + 1 :]]
        width = width_of(words, index, options)
        is_theirs = width == 0 or (theirs and words[index] in ("-h", "--help"))
        (theirs if is_theirs else ours).extend(words[index : index + max(width, 1)])
        index += max(width, 1)
    return ours, theirs


def parse(words: list[str], call: str) -> "tuple[Command, argparse.Namespace]":
    """The command and its arguments. Raises CDEnvironmentError with code "usage"."""
    command, rest = find_command(words)
    if command is None:
        command = COMMANDS[-1]
    ours, theirs = split_words(rest, command)
    parser = build_parser(command, call)
    if not command.passes_on:
        theirs = take_operands(parser, command, theirs)
    args = parser.parse_args(ours)
    args.__dict__.update(zip([name for name, _ in command.operands], theirs))
    args.comfyui_args = theirs
    return finish(command, args, call)


def take_operands(parser: "argparse.ArgumentParser", command: Command, words: list[str]) -> list[str]:
    """The words that are no options, one for each operand. Raises CDEnvironmentError when they do not fit."""
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown is not None:
        raise CDEnvironmentError(
            f"'{command.name}' has no option {unknown}.", f"comfydock help {command.name}", "usage"
        )
    if len(words) > len(command.operands):
        extra = words[len(command.operands)]
        raise CDEnvironmentError(
            f"'{command.name}' does not take '{extra}'.", f"comfydock help {command.name}", "usage"
        )
    return words


def finish(command: Command, args: "argparse.Namespace", call: str) -> "tuple[Command, argparse.Namespace]":
    """What depends on more than one word: help, version, things that exclude each other."""
    by_name = {entry.name: entry for entry in COMMANDS}
    if args.version:
        return Command("version", "", show_version, text_words), args
    if args.help or command.name == "help":
        topic = args.__dict__.get("topic") or ("" if command.name == "help" else command.name)
        if topic and topic not in by_name:
            raise unknown_command(topic)
        args.help_text = build_parser(by_name[topic], call).format_help().rstrip() if topic else overview(call)
        return by_name["help"], args
    for name, _ in command.operands:
        if not args.__dict__.get(name):
            raise CDEnvironmentError(
                f"'{command.name}' needs a {name.upper()}.", f"comfydock help {command.name}", "usage"
            )
    if command.name == "create" and args.from_dir is None:
        raise CDEnvironmentError("'create' needs --from DIR.", "comfydock create my-env --from ~/ComfyUI", "usage")
    if args.json and (not command.has_json or args.__dict__.get("foreground")):
        what = "run --foreground" if command.has_json else command.name
        raise CDEnvironmentError(f"'{what}' streams a log, so it has no --json.", f"comfydock {what}", "usage")
    if command.name == "repair" and args.adopt and args.end:
        raise CDEnvironmentError("--adopt and --end exclude each other.", "comfydock help repair", "usage")
    if command.name == "run":
        args.set_env = dict(args.set_env)
    return command, args


def build_parser(command: Command, call: str) -> "argparse.ArgumentParser":
    """The parser of one command; the others' are never built."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "Any":
            raise CDEnvironmentError(f"'{command.name}': {message}.", f"comfydock help {command.name}", "usage")

    operands = "".join(f" {name.upper()}" for name, _ in command.operands)
    passed_on = " [--] [ComfyUI's arguments]" if command.passes_on else ""
    parser = Parser(
        prog=f"{call} {command.name}",
        usage=f"{call} {command.name} [options]{operands}{passed_on}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples:\n" + "\n".join("  " + line.replace("comfydock", call, 1) for line in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    for option in (*command.options, *EVERYWHERE):
        option.add_to(parser)
    return parser


def overview(call: str) -> str:
    """The help of the whole, on one screen."""
    lines = [
        f"comfydock {__version__}: run ComfyUI in the background, and know the truth about it",
        "",
        f"usage: {call} [-e NAME] COMMAND [options]",
        "",
        *(f"  {command.name:9} {command.summary}" for command in COMMANDS),
        "",
        "examples:",
        f"  {call} run --demo          try everything in a second, without ComfyUI",
        f"  {call} run                 in a ComfyUI folder: adopt it and start it",
        f"  {call} logs -f             watch the log",
        f"  {call} help run            all options of a command",
    ]
    return "\n".join(lines)


# ====================================================================================================================
# 16. The front door
# The only catch-all; turns errors into words and exit codes.


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]); returns the exit code. Never raises, never exits.

    0 done, 1 could not, 2 wrong usage, 3 `status` of something that does not run, 130 interrupted;
    with --foreground ComfyUI's own code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in HIDDEN_ENTRIES:
        return HIDDEN_ENTRIES[words[0]](words[1:])
    own_words = words[: words.index("--")] if "--" in words else words
    console = Console(sys.stdout, sys.stderr, sys.stdin, "--json" in own_words, how_called(sys.argv))
    try:
        return answer(console, words)
    except BrokenPipeError:  # `logs | head`: the reader has seen enough
        forget_output()
        return 0
    except KeyboardInterrupt:
        return complain(console, words, CDEnvironmentError("Interrupted.", "comfydock status", "interrupted"), 130)
    except CDEnvironmentError as error:
        return complain(console, words, error, 2 if error.code == "usage" else 1)
    except OSError as error:
        return complain(console, words, CDEnvironmentError(os_error_sentence(error), "", "system"), 1)
    except Exception as error:
        if os.environ.get("COMFYDOCK_DEBUG"):
            raise
        sentence = f"This is a fault of comfydock: {type(error).__name__}: {error}"
        return complain(console, words, CDEnvironmentError(sentence, "set COMFYDOCK_DEBUG=1 to see where", "bug"), 1)


def answer(console: Console, words: list[str]) -> int:
    """Do what `words` ask for and show the report; returns the exit code."""
    command, args = parse(words, console.call)
    report = command.act(console, args)
    console.show(command.name, report, command.words)
    console.flush()
    return report.code


def complain(console: Console, words: list[str], error: CDEnvironmentError, code: int) -> int:
    """Show an error as far as the streams allow; returns `code`."""
    try:
        console.fail(next((word for word in words if not word.startswith("-")), ""), error)
        console.flush()
    except OSError:
        forget_output()
    return code


def os_error_sentence(error: OSError) -> str:
    """An OSError as one sentence that names the file."""
    reason = error.strerror or str(error) or type(error).__name__
    if getattr(error, "errno", None) == 40:
        reason = "is a link, which is not followed here"
    return f"{error.filename}: {reason}." if error.filename else f"{reason}."


def forget_output() -> None:
    """Send the rest to nowhere, so that the interpreter's last flush does not fail."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            os.dup2(sink, number)
        except OSError:
            pass
    os.close(sink)


if __name__ == "__main__":
    sys.exit(main())
