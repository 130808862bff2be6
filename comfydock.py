#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""comfydock: run ComfyUI as a background daemon, and know the truth about it.

One file, standard library only, Python 3.9 and later. Copy it anywhere and type
`python comfydock.py run`, install it with pipx, or vendor it and `import comfydock`.

    what is typed -> main (17) -> parse (16) -> a command (15) -> Environment (9) -> a report -> the console (14)
                                                     |
                     run: intent -> .cec/.comfyui.state -> detached ComfyUI -> logs/<env>/comfyui.log
                                          |                       |
                     pid, identity, port, arguments         holds .cec/.comfyui.alive
                                          |                       |
    status, list, logs, stop, restart, repair: read the record, then look at the process itself, never at a bare PID

Nothing of comfydock stays resident after `run`, but for the small watcher of `run --monitor`. A recorded
process counts only while its identity holds: same machine and PID namespace, same boot, same PID, same start.

Words: a workspace holds environments; an environment has a ComfyUI checkout, a Python, a manifest
(`.cec/pyproject.toml`) and at most one ComfyUI process; its record is what the state file says of that process; a
`Process` is one as the system shows it; a snapshot is both together; a report is what a command answers. A starter
wrote the intent to start one, a keeper watches one and starts it again; a holder has the port, or the lock that it
signs.

To vendor it: `comfydock.Workspace().get_environment("main").run(["--port", "8190"])`.

The file is read downward: a section uses only itself and what stands above it, and keeps the rule below its title.
Another program lives here as a guest, exempt from the rules: the demo (10).

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
    12. Hand-over                    files for the engines that exist
    13. Hidden entries               how the file starts itself
    14. The console                  the one printer
    15. Commands                     one function a command
    16. The command line             reading words, help, completion
    17. The front door               main()
"""

import errno
import io
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, lru_cache, partial
from itertools import takewhile

# Importing typing and dataclasses would cost every command 1.5 times what the interpreter itself costs, so only type
# checkers do: they take this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import subprocess
    import threading
    from contextlib import AbstractContextManager
    from dataclasses import dataclass, field
    from datetime import timedelta
    from pathlib import Path
    from typing import IO, Any, BinaryIO, Optional, TypeVar, Union

    Thing = TypeVar("Thing")
else:
    Any = object

    class Optional:
        """Stands for typing.Optional where annotations are evaluated."""

        def __class_getitem__(cls, item):
            return item


__version__ = "2.0.0"
__all__ = [
    "CDEndedError",
    "CDEnvironmentError",
    "CDNodeConflictError",
    "ComfyUIConfig",
    "Environment",
    "EnvironmentComparison",
    "EnvironmentPaths",
    "GitManager",
    "Manifest",
    "NodeInfo",
    "NodeManager",
    "NodeOperationResult",
    "NodeRemovalResult",
    "ProcessState",
    "SyncReport",
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
# Pure: no file, process, socket or environment variable. What the other sections speak of.

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8188
RUN_ID_VARIABLE = "COMFYDOCK_RUN_ID"
DEMO_NAME = "demo"

STARTING, RUNNING, UNRESPONSIVE = "starting", "running", "unresponsive"
STOPPED, CRASHED, FOREIGN, UNKNOWN = "stopped", "crashed", "foreign", "unknown"
LIVE_STATES = (STARTING, RUNNING, UNRESPONSIVE)
RESTART = "restart"  # what a record says is wanted, beside running and stopped

Progress = Callable[[str], None]  # long work tells its progress through one of these, a short line a call


def no_progress(line: str) -> None:
    """The Progress of a caller who does not listen."""


if not TYPE_CHECKING:

    class field:
        """Stand for dataclasses.field: a default that is made anew for each record."""

        def __init__(self, default_factory):
            self.default_factory = default_factory

    def dataclass(kind):
        """Stand for dataclasses.dataclass, whose import costs as much as the interpreter: init, equality and repr."""
        names = list(kind.__annotations__)
        defaults = {name: value for name, value in vars(kind).items() if name in names}

        def __init__(self, *values, **named):
            given = {**dict(zip(names, values)), **named}
            if len(given) < len(values) + len(named) or not set(names) - set(defaults) <= set(given) <= set(names):
                raise TypeError(f"{kind.__name__}({', '.join(names)}): an argument is missing, unknown or repeated")
            for name in names:
                default = defaults.get(name)
                made = default.default_factory() if isinstance(default, field) and name not in given else default
                setattr(self, name, given.get(name, made))
            getattr(self, "__post_init__", bool)()

        def __eq__(self, other):
            return vars(self) == vars(other) if type(other) is kind else NotImplemented

        def __repr__(self):
            return f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

        kind.__init__, kind.__eq__, kind.__hash__, kind.__repr__ = __init__, __eq__, None, __repr__
        return kind


if TYPE_CHECKING:
    Hint = Union[str, tuple[Any, ...], list[Any]]


def redact(text: str) -> str:
    """Return text without what lets somebody in: users and passwords of addresses, values called token, and tokens."""
    secret = "token|key|secret|passw|auth|signature|credential"
    text = re.sub(r"(?i)\b((?!ssh:)[a-z][a-z0-9+.-]*://)[^\s/@'\"]*@", r"\1", text)
    text = re.sub(r"(?i)\b((?:[a-z]+\+)?ssh://[^\s/:@]*):[^\s/@]*@", r"\1@", text)
    text = re.sub(rf"(?i)([?&;#][\w-]*(?:{secret})[\w-]*=)[^\s&#'\"\\]+", r"\1***", text)
    # A name may begin as the tokens of two services do (hf_models, sk-image): those have capitals, or many figures.
    own = r"(?:hf_|sk-)(?:(?=[\w-]*[A-Z])[\w-]{8,}|(?=[\w-]*\d)[\w-]{16,})"
    return re.sub(rf"\b(?:(?:gh[pousr]_|github_pat_|glpat-|npm_|pypi-)[\w-]{{4,}}|{own})", "***", text)


class CDEnvironmentError(Exception):
    """What could not be done, in one sentence that names the thing.

    `hint` is what to do about it: a text, a command of ours as words (`("restart",)`), or a list of both; the console
    adds how comfydock was called. `code` (str) is a stable word for scripts; "usage" means that the words of the call
    were wrong. `body` (str): how the text began that came with "http-404" or the like.
    """

    body = ""

    def __init__(self, message: str, hint: "Hint" = "", code: str = "failed") -> None:
        self.message = redact(message)
        super().__init__(self.message)
        self.hint = hint
        self.code = code


class CDEndedError(CDEnvironmentError):
    """ComfyUI ended within the first moments. `exit_code` (int) is its own, negative for a signal."""

    def __init__(self, message: str, hint: "Hint", exit_code: int) -> None:
        super().__init__(message, hint, "ended")
        self.exit_code = exit_code


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

    Its fields are the keys of the file and their types: the six of the first version must be there; what may be null
    has the default None. `started_at` is ISO 8601 in UTC, `log_offset` is in bytes. `pid` is None only while `phase` is
    "starting": the intent, written before the spawn. `identity` and `starter["identity"]` are what `identity_of` says
    of a process, `uid` is its user, `alive` the lock file that it holds; `extra` has keys that a later version wrote.
    `owner` is not on disk: the user whose file it was read from, who alone may speak of his processes.
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
    desired_state: str = "running"  # the key "wanted"
    run_id: Optional[str] = None
    identity: dict[str, Any] = field(default_factory=dict)
    starter: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    cwd: Optional[str] = None
    env: dict[str, str] = field(default_factory=dict)
    uid: Optional[int] = None
    alive: Optional[dict[str, Any]] = None
    tls: Optional[bool] = None
    log_offset: int = 0
    log_inode: int = 0
    monitor: Optional[dict[str, Any]] = None
    last_exit: Optional[dict[str, Any]] = None
    extra: dict[str, Any] = field(default_factory=dict)
    owner: Optional[int] = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the state file, the keys of the first version first."""
        data = {_KEYS.get(name, name): getattr(self, name) for name in type(self).__annotations__}
        health = {"last_check": data.pop("last_health_check"), "status": data.pop("health_status")}
        first = {name: data.pop(name) for name in ("pid", "host", "port", "args", "started_at", "log_path")}
        del data["extra"], data["owner"]
        return {**first, "health": health, "schema": 2, **data, **self.extra}

    @property
    def has_log(self) -> bool:
        """Whether its output is in our log: not that of a process that was started by hand and adopted later."""
        return self.run_id is not None or not self.identity

    @property
    def subject(self) -> "tuple[Any, dict[str, Any]]":
        """PID and identity of the process that the record is about: ComfyUI, or until there is one its starter."""
        if self.pid is not None:
            return self.pid, self.identity
        return self.starter.get("pid"), self.starter.get("identity", {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProcessState":
        """Return the record in a JSON object. Raises ValueError or TypeError when it is not one that may be trusted."""
        health = {} if isinstance(data, dict) and data.get("health") is None else data["health"]
        if not isinstance(health, dict):
            raise TypeError("no object")
        flat = {**data, "last_health_check": health.get("last_check"), "health_status": health.get("status")}
        known = {name: _KEYS.get(name, name) for name in cls.__annotations__ if name not in ("extra", "owner")}
        extra = {key: data[key] for key in data if key not in (*known.values(), "health", "schema")}
        state = cls(**{name: flat[key] for name, key in known.items() if key in flat}, extra=extra)
        for key, kind in cls.__annotations__.items():
            value = getattr(state, key)
            is_null = value is None and (key == "pid" or getattr(cls, key, 0) is None)
            if not is_null and type(value) is not getattr(kind, "__origin__", kind):
                raise TypeError(key)
        is_sound = (
            (is_pid(state.pid) or state.pid is None and state.phase == STARTING)
            and is_port(state.port)
            and is_text_list(state.args)
            and is_text_list(state.command)
            and all(is_variable(*pair) for pair in state.env.items())
            and min(state.log_offset, state.log_inode) >= 0
            and isinstance(state.starter.get("identity", {}), dict)
            and type((state.last_exit or {}).get("code")) in (int, type(None))
        )
        if not is_sound:
            raise ValueError("a value out of its bounds")
        return state

    def get_uptime(self) -> "timedelta":
        """Time since `started_at` by the wall clock, never negative. Raises ValueError when that is not a time."""
        from datetime import timedelta

        return timedelta(seconds=max(0.0, time.time() - epoch_of(self.started_at)))


_KEYS = {"desired_state": "wanted"}  # where a key of the file is called otherwise here


def is_pid(value: object) -> bool:
    """Whether `value` may be the PID of a ComfyUI: an int above 1 (0, 1 and -1 name others, True is no number)."""
    return type(value) is int and 1 < value < 2**31


def is_port(value: object) -> bool:
    """Whether `value` is an int from 1 to 65535."""
    return type(value) is int and 0 < value < 65536


def is_text_list(value: object) -> bool:
    """Whether `value` is a list of str that can be words of a command (no system takes a NUL in one)."""
    return isinstance(value, list) and all(isinstance(item, str) and "\0" not in item for item in value)


def is_variable(name: str, value: object) -> bool:
    """Whether an environment variable may be called `name` and hold `value`."""
    return bool(name) and isinstance(value, str) and "=" not in name and "\0" not in name + value


@dataclass
class NodeInfo:
    """A custom node as the manifest keeps it; `name` is its directory in custom_nodes.

    `version` is a registry version, a commit, or "dev"; `source` one of registry, git, development, unknown; `branch`
    that of a git repository, if asked for; `pin` the version, tag or commit at which it is to stay. `released` are
    packages that are not held because of it, with the versions that they had; `skipped_lines` requirements that could
    not be installed; `no_deps` tells that none were.
    """

    name: str
    registry_id: Optional[str] = None
    repository: Optional[str] = None
    version: Optional[str] = None
    download_url: Optional[str] = None
    source: str = "unknown"
    dependency_sources: list[str] = field(default_factory=list)
    branch: Optional[str] = None
    pin: Optional[str] = None
    released: list[str] = field(default_factory=list)
    skipped_lines: list[str] = field(default_factory=list)
    no_deps: bool = False

    @property
    def identifier(self) -> str:
        """What a user calls it: its directory name."""
        return self.name

    def altered(self, **fields: Any) -> "NodeInfo":
        """The same node but for some fields."""
        return NodeInfo(**{**vars(self), **fields})


@dataclass
class NodeOperationResult:
    """What `add_node` did, and whether a running ComfyUI needs a restart for it."""

    node_info: NodeInfo
    restart_recommended: bool = False
    restart_reason: Optional[str] = None


@dataclass
class NodeRemovalResult:
    """What `remove_node` did. `filesystem_action` is disabled, deleted, moved (local changes) or none."""

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


@dataclass
class EnvironmentComparison:
    """How custom_nodes differs from the manifest; the field names are those of 1.0.x."""

    missing_nodes: list[str] = field(default_factory=list)
    extra_nodes: list[str] = field(default_factory=list)
    found_nodes: list[str] = field(default_factory=list)  # untracked, but there when the checkout was adopted
    version_mismatches: list[dict[str, str]] = field(default_factory=list)  # {"name", "expected", "actual"}
    interrupted: int = 0  # node changes that were broken off

    @property
    def is_synced(self) -> bool:
        """Nothing to repair. Nodes found at adoption are the user's own and do not count."""
        return not (self.missing_nodes or self.extra_nodes or self.version_mismatches or self.interrupted)


@dataclass
class SyncReport:
    """What `sync` did: names of nodes, and a sentence for each that could not be put right."""

    installed: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parse_comfyui_args(args: list[str]) -> ComfyUIConfig:
    """Host, port and TLS as ComfyUI's own argparse will read them from `args`.

    Both spellings, unique prefixes (`--por 9`, `--lis`), the last one wins, a bare `--listen` is "0.0.0.0,::" (all
    observed on ComfyUI 0.3.64). Raises CDEnvironmentError for a port that ComfyUI would refuse after its whole start.
    """
    config, tls = ComfyUIConfig(), {"--tls-k": "", "--tls-c": ""}
    for word, following in zip(args, [*args[1:], "--"]):
        flag, equals, value = word.partition("=")
        if not equals and (not following.startswith("-") or following.lstrip("-").isdigit()):
            value = following
        if _is_flag(flag, "--port", "--po"):
            if not re.fullmatch(r"\+?[0-9]+", value) or not is_port(int(value)):
                message = f"'{value}' is not a port: ComfyUI needs a number from 1 to 65535."
                raise CDEnvironmentError(message, ("run", "--port", "8188"), "usage")
            config.port = int(value)
        elif _is_flag(flag, "--listen", "--li"):
            config.host = value if value or equals else "0.0.0.0,::"
        elif _is_flag(flag, "--tls-keyfile", "--tls-k") or _is_flag(flag, "--tls-certfile", "--tls-c"):
            tls[flag[:7]] = value
    config.tls = all(tls.values())  # empty values mean http
    return config


def _is_flag(word: str, flag: str, shortest: str) -> bool:
    return word.startswith(shortest) and flag.startswith(word)


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
    return f"http{'s' * config.tls}://{f'[{host}]' if ':' in host else host}:{config.port}"


def is_loopback(host: str) -> bool:
    """Whether every address of a `--listen` value can be reached from this machine alone."""
    return all(re.fullmatch(r"localhost|::1|127[.\d]+", name.strip().lower()) for name in host.split(","))


def utc_now(moment: Optional[float] = None) -> str:
    """Return the time, or another one in seconds since 1970, as the state file has it: ISO 8601, UTC, milliseconds."""
    moment = time.time() if moment is None else moment
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03d}+00:00"


def epoch_of(stamp: Optional[str]) -> float:
    """Seconds since 1970 of an ISO 8601 time; a naive one is local. Raises ValueError."""
    from datetime import datetime

    if not isinstance(stamp, str):
        raise ValueError("not a time")
    return datetime.fromisoformat(re.sub("Z$", "+00:00", stamp)).timestamp()


def format_size(count: float) -> str:
    """Return an amount of bytes for people: 512 B, 3.4 MB, 12.0 GB."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ("KB", "MB", "GB", "TB")
    power = min(len(units), (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.1f} {units[power - 1]}"


def format_duration(seconds: float) -> str:
    """A length of time for people: 12s, 15m, 3h 5m, 2d 4h."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m" if minutes else f"{whole}s"


NAME_RULE = "letters, digits, dot, dash, underscore, at most 63, a letter or digit first, and no reserved word"
NEW_NAME = re.compile(
    r"(?!(?:workspace|logs|models|con|prn|aux|nul|com[1-9]|lpt[1-9])(?:\.|$))(?!.*\.\.)"
    r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9_-])?",
    re.ASCII | re.IGNORECASE,
)


def is_new_name(name: str) -> bool:
    """Tell whether an environment may be made under this name (existing others still open)."""
    return NEW_NAME.fullmatch(name) is not None


def is_folder_name(name: str) -> bool:
    """Tell whether `name` stays inside the folder it is joined to."""
    return re.fullmatch(r"(?!\.)(?!.*\.\.)[^/\\:\0]+", name, re.DOTALL) is not None


def require_new_name(name: str) -> None:
    """Raise CDEnvironmentError when no environment may be made under this name."""
    if not is_new_name(name):
        raise CDEnvironmentError(f"'{name}' cannot name an environment: {NAME_RULE}.", ("create", "my-env"), "usage")


def sanitize_name(name: str) -> str:
    """`name` bent into one that may name an environment."""
    bent = re.sub(r"[^A-Za-z0-9._-]|\.(?=\.)", "-", name).strip("._-")[:50].rstrip("._-") or "comfyui"
    return bent if is_new_name(bent) else f"env-{bent}"


SESSION_MARK = "=== comfydock session "
ERROR_LINE = r"[^ :]*(Error|Exception|ExceptionGroup|Interrupt|Exit)(:|$)|.*: error:"
FATAL_LINE = r"Fatal Python error: |Windows fatal exception: |terminate called "
LEVEL = r"\[(DEBUG|DETAIL|INFO|WARNING|ERROR|CRITICAL)\] ?"  # ComfyUI 0.33 begins its lines with one, in colour


def without_colours(text: str) -> str:
    """Return a text without the sequences by which terminals are coloured."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def last_error_line(text: str, code: Optional[int] = None) -> Optional[str]:
    """Return the line of a log that most likely says why ComfyUI ended (with `code`), or None.

    That is what ends a traceback or looks like an error, a fatal one with the custom node that its stack names; and
    after `sys.exit("text")`, which is code 1, the last line.
    """
    found, in_traceback, line = "", False, ""
    text = without_colours(text)
    for line in filter(str.strip, re.split(r"[\r\n]+", text)):
        if code == 1 and re.match(LEVEL, line):  # ComfyUI went on after that error
            found = ""
        line = re.sub(rf"^({LEVEL}|  [|+] )", "", line)  # the tracebacks of groups are framed
        if re.match(r"(Exception Group )?Traceback \(most recent call last\)", line):
            in_traceback = True
        elif re.match(FATAL_LINE, line):
            stack = text[text.rindex(line) :]
            node = re.search(r'custom_nodes[\\/]+([^\\/"]+)', stack.partition("Current thread")[2] or stack)
            what = re.search(r"what\(\): *(.*)", stack)
            return printable(line + (f" (custom node {node[1]})" if node else "") + (f": {what[1]}" if what else ""))
        elif in_traceback and not line[:1].isspace() or re.match(ERROR_LINE, line.strip()):
            found, in_traceback = line.strip(), False
    last = line.strip() if code == 1 and not line.startswith(SESSION_MARK) else ""
    return printable(found or last) or None


def closest_flag(refusal: str, flags: list[str]) -> Optional[str]:
    """The one of `flags` that is spelled most like the first unknown one that a parser's refusal names, or None."""
    unknown = re.search(r"(?<=unrecognized arguments: )(--[\w-]+)", refusal)
    if unknown is None:
        return None
    from difflib import get_close_matches

    return next(iter(get_close_matches(unknown[0], flags, 1, 0.7)), None)


def printable(text: str) -> str:
    """`text` without control characters, which could drive a terminal; at most 500 characters."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:500]).strip()


# ====================================================================================================================
# 2. Places
# The layout on disk: where a workspace and an environment keep what is theirs, and what a checkout is known by.


class WorkspacePaths:
    """Where a workspace keeps its things, laid out as comfydock 1.0.x does; `root` (str) is absolute."""

    def __init__(self, root: "Union[str, Path]") -> None:
        self.root = os.path.abspath(root)
        self.environments = os.path.join(self.root, "environments")
        self.metadata = os.path.join(self.root, ".metadata")
        self.settings = os.path.join(self.metadata, "workspace.json")
        self._logs = os.path.join(self.root, "logs")
        self.lock = os.path.join(self.metadata, ".workspace.lock")
        self.kept = os.path.join(self.root, "kept")

    @property
    def logs(self) -> "Path":
        """The folder of all logs: one folder an environment inside."""
        from pathlib import Path

        return Path(self._logs)

    def log_file(self, name: str) -> str:
        """Return the path of the log of the environment `name`."""
        return os.path.join(self._logs, name, "comfyui.log")


ALIVE_NAME = ".comfyui.alive"  # the lock file that ComfyUI has open as long as it lives


class EnvironmentPaths:
    """Where an environment keeps its things, all as absolute str. IGNORED is what is no part of its history in git."""

    IGNORED = (
        ".comfyui.state .comfyui.state.damaged .comfyui.last .comfyui.alive .comfyui.lock .content.lock .complete "
        ".manifest.json .sync.json .packages.json .nodes/ removed/ before/ before.json models.json *.tmp"
    ).split()

    def __init__(self, root: str) -> None:
        self.root = root
        self.name = os.path.basename(root)
        self.cec = os.path.join(root, ".cec")
        inside = os.path.join(self.cec, "")
        self.manifest = inside + "pyproject.toml"
        self.cache = inside + ".manifest.json"
        self.complete = inside + ".complete"
        self.state = inside + ".comfyui.state"
        self.last_run = inside + ".comfyui.last"
        self.lock = inside + ".comfyui.lock"
        self.alive = inside + ALIVE_NAME
        self.content_lock = inside + ".content.lock"
        self.gitignore = inside + ".gitignore"
        self.removed = inside + "removed"
        self.stamp = inside + ".sync.json"
        self.packages = inside + ".packages.json"  # while packages are changed: what was installed before
        self.nodes = inside + ".nodes"
        self.python_version = inside + ".python-version"
        self.models_config = inside + "models.json"
        self.before = inside + "before"
        self.before_record = inside + "before.json"
        self.venv = os.path.join(root, ".venv")
        self.venv_before = self.venv + ".before"
        self.venv_partial = self.venv_before + ".tmp"
        self.partial = os.path.join(root, "ComfyUI.partial")
        self.comfyui = os.path.join(root, "ComfyUI")


def rotated(log_path: str, number: int = 1) -> str:
    """Return the path of a log before its last `number` rotations: .old, .old.2, .old.3."""
    return f"{log_path}.old" + (f".{number}" if number > 1 else "")


def rotation_draft(log_path: str) -> str:
    return log_path + ".rotating.tmp"


def main_script(comfyui_path: str) -> str:
    return os.path.join(comfyui_path, "main.py")


def custom_nodes_of(comfyui_path: str) -> str:
    return os.path.join(comfyui_path, "custom_nodes")


def current_folder() -> str:
    """Return the folder one stands in, as the shell spells it (with its links); the root when it was deleted."""
    try:
        real, spelled = os.getcwd(), os.environ.get("PWD", "")
        return spelled if os.path.isabs(spelled) and os.path.realpath(spelled) == real else real
    except OSError:
        return os.path.abspath(os.sep)


def is_there(path: str) -> bool:
    """Tell whether there is such a file. Raises OSError where one may not look: what is closed is not missing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_checkout(folder: str) -> bool:
    """Whether `folder` is a ComfyUI checkout (`models` may be a link or absent, so it is not asked for)."""
    signs = ("nodes.py", "folder_paths.py", "comfy", "comfy_extras", "custom_nodes", "comfyui_version.py")
    present = sum(os.path.exists(os.path.join(folder, sign)) for sign in signs)
    return os.path.isfile(main_script(folder)) and present >= 2


def checkout_at(folder: str) -> Optional[str]:
    """Return the ComfyUI checkout that holds `folder`, or that is in it where it is the root of a portable build."""
    below = os.path.join(folder, "ComfyUI")
    if os.path.isdir(os.path.join(folder, "python_embeded")) and is_checkout(below):
        return below
    return next((here for here in upward(folder) if is_checkout(here)), None)


def environment_above(folder: str) -> "Optional[tuple[str, str]]":
    """Return (workspace root, environment name) when `folder` lies in `<workspace>/environments/<name>`, else None."""
    for here in (*upward(folder), *upward(os.path.realpath(folder))):
        parent, name = os.path.split(here)
        if os.path.basename(parent) == "environments" and os.path.isdir(EnvironmentPaths(here).cec):
            return os.path.dirname(parent), name
    return None


def upward(folder: str) -> Iterator[str]:
    """Yield a folder and all that it lies in."""
    yield folder
    if os.path.dirname(folder) != folder:
        yield from upward(os.path.dirname(folder))


def default_workspace() -> str:
    """COMFYDOCK_HOME, else a 1.0.x workspace at ~/comfydock when there is no newer one, else ~/.comfydock.

    A ~/.comfydock of the comfydock before 1.0, which used Docker, is left alone. Raises CDEnvironmentError: no home.
    """
    chosen = os.environ.get("COMFYDOCK_HOME")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or os.environ.get("HOME") == "":  # of an empty HOME expanduser makes the root folder
        raise CDEnvironmentError("No home folder is known, so there is no place for a workspace.", "set COMFYDOCK_HOME")
    ours, older = os.path.join(home, ".comfydock"), os.path.join(home, "comfydock")
    has_older = os.path.isdir(WorkspacePaths(older).metadata) or os.path.isfile(os.path.join(ours, "environments.json"))
    return older if has_older and not os.path.isdir(WorkspacePaths(ours).environments) else ours


# ====================================================================================================================
# 3. The machine
# The only section that names sys.platform, signal, fcntl, msvcrt, ctypes, that starts programs and can end a process.


IS_WINDOWS = sys.platform == "win32"
IS_MACOS = sys.platform == "darwin"
FILES_ARE_LOCKED_IN_USE = IS_WINDOWS  # whether files that a process has open can be neither replaced nor deleted


def until(question: "Callable[[], Thing]", seconds: float, pause: float = 0.01) -> "Thing":
    """Ask at once, then every `pause` seconds, until the answer is true or `seconds` (infinity, too) are over."""
    deadline = time.monotonic() + seconds
    while not (answer := question()) and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, left))
    return answer


# How `ps` is asked for the environment behind each command: macOS has -E, procps the BSD letter e.
PS_WITH_ENVIRONMENT = "-axwwE" if sys.platform == "darwin" else "axeww"

# Dates in plain English and UTC, for every locale writes them its own way. LC_ALL=C would do that too, but it sets
# LC_CTYPE as well, and then ps prints ? for each letter of a path that is not ASCII.
PS_LOCALE = {
    "LC_TIME": "C",
    "LC_NUMERIC": "C",
    "LC_CTYPE": "UTF-8" if sys.platform == "darwin" else "C.UTF-8",
    "TZ": "UTC",
}


def inherited_environment() -> dict[str, str]:
    """Return the variables for what we start: ours, without a notebook's backend and an engine's words with us."""
    told_us = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    variables = {key: value for key, value in os.environ.items() if key not in told_us}
    if variables.get("MPLBACKEND", "").startswith("module://"):
        del variables["MPLBACKEND"]
    return variables


def mounts() -> "list[tuple[str, str]]":
    """Return (mount point, type of file system) of all that is mounted, in order; [] where the system does not tell."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = os.fsdecode(file.read()).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # "36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw" (man proc_pid_mountinfo)
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split(" ")[4])
        found.append((point, right.split(" ")[0]))
    return found


def open_regular(path: str, mode: str = "rb", buffering: int = -1) -> "BinaryIO":
    """Open a file that others may have planted, to read or append: no link is followed, and nothing is waited for.

    A new one is its owner's alone. Raises OSError, also for a link (ELOOP), a pipe, a device and a folder.
    """
    if IS_WINDOWS and os.path.islink(path):  # other systems look while they open
        raise OSError(errno.ELOOP, "is a link", path)
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file: Any = open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags | careful, 0o600))
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file  # type: ignore[no-any-return]
        file.close()
    except OSError as error:
        if error.errno not in (None, errno.ENXIO, errno.ESPIPE, errno.EISDIR):  # of pipes, devices and folders
            raise
    raise OSError(errno.EINVAL, "Not a regular file", path)


# The first place of sys.path is, as for a script, the folder of the file, and not the one we stand in.
IMPORTED = "import sys; sys.path[0] = sys.argv.pop(1); from {} import main; sys.exit(main())"


def own_file() -> str:
    """Return this very file, or the .pyz archive that it is in: what Python is given to start it."""
    here = os.path.abspath(__file__)
    return here if os.path.isfile(here) else os.path.dirname(here)


def own_command() -> list[str]:
    """Return the words that start this very file, as a module: then Python need not compile it anew (0.2 s)."""
    here = own_file()
    folder, file = os.path.split(here)
    name, suffix = os.path.splitext(file)
    is_module = suffix == ".py" and name.isidentifier() and os.path.isfile(here)
    return [sys.executable, "-c", IMPORTED.format(name), folder] if is_module else [sys.executable, here]


def quote(path: str) -> str:
    """Return a path as it must be typed: quoted where it has to be, by the rules of the shells of this system."""
    import shlex

    if IS_WINDOWS:
        return f'"{path}"' if " " in path else path
    return shlex.quote(path)


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
    hint = "the limit of processes is reached: end some, or raise it (ulimit -u)" if error.errno == errno.EAGAIN else ""
    return CDEnvironmentError(f"{cmd[0]} cannot be started: {error.strerror or error}", hint)


@dataclass
class ProcessFacts:
    """What Windows tells about one process; what it does not tell is None. `created` is in seconds since 1970 (UTC)."""

    pid: int
    alive: bool = True
    ppid: Optional[int] = None
    created: Optional[float] = None
    command: list[str] = field(default_factory=list)
    cwd: Optional[str] = None
    environment: dict[str, str] = field(default_factory=dict)


NO_MORE_FILES = {errno.EMFILE, errno.ENFILE}


def read_proc(path: str, folder: Optional[int] = None) -> bytes:
    """Return a whole file of the system (/proc, /etc), b"" where it is none or closed to us.

    A relative path begins at the descriptor `folder`. os.read is three times as fast as open(). Raises OSError where no
    more files can be opened: who cannot look takes nobody for dead.
    """
    try:
        fd = os.open(path, os.O_RDONLY, dir_fd=folder)
    except OSError as error:
        if error.errno in NO_MORE_FILES:
            raise
        return b""
    try:
        return b"".join(iter(partial(os.read, fd, 32768), b""))  # /proc/net gives its lines page by page
    except OSError:
        return b""
    finally:
        os.close(fd)


def unknown(*_: object) -> Any:
    """Answer for a system that has no such thing: it does not tell, there is none, and there is nothing to do."""
    return None


own_user: Callable[[], Optional[int]] = getattr(os, "geteuid", unknown)
give_to: Callable[[int, int, int], None] = getattr(os, "fchown", unknown)  # an open file, its new user and group


if sys.platform == "win32":
    import ctypes
    import msvcrt
    import winreg
    from ctypes import wintypes

    PROCESS_TERMINATE, PROCESS_VM_READ, PROCESS_SUSPEND_RESUME = 0x0001, 0x0010, 0x0800
    PROCESS_QUERY_INFORMATION, PROCESS_QUERY_LIMITED_INFORMATION, SYNCHRONIZE = 0x0400, 0x1000, 0x00100000
    CTRL_C_EVENT = 0
    LOCK_OFFSET = 0x7FFF0000  # msvcrt.locking counts in 32 bits
    FILETIME_OF_1970 = 116444736000000000  # in units of 100 ns since 1601

    # Offsets in the PEB and in RTL_USER_PROCESS_PARAMETERS (winternl.h names them in part, Wine's winternl.h in full).
    # They have not moved since Windows Vista: parameters, current folder, command line, environment block.
    POINTER_SIZE = ctypes.sizeof(ctypes.c_void_p)
    OFFSETS = (0x20, 0x38, 0x70, 0x80) if POINTER_SIZE == 8 else (0x10, 0x24, 0x40, 0x48)
    PEB_PARAMETERS, AT_FOLDER, AT_COMMAND_LINE, AT_ENVIRONMENT = OFFSETS

    @cache
    def libraries() -> tuple[Any, Any]:
        """Return kernel32 and ntdll; handles are pointers, so every function that takes or gives one says so."""
        kernel, ntdll = ctypes.WinDLL("kernel32", use_last_error=True), ctypes.WinDLL("ntdll")
        handle, dword = wintypes.HANDLE, wintypes.DWORD
        kernel.OpenProcess.restype = kernel.CreateFileW.restype = kernel.CreateToolhelp32Snapshot.restype = handle
        kernel.CreateJobObjectW.restype = handle
        kernel.CreateJobObjectW.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        kernel.SetInformationJobObject.argtypes = [handle, ctypes.c_int, ctypes.c_void_p, dword]
        kernel.AssignProcessToJobObject.argtypes = [handle, handle]
        kernel.OpenProcess.argtypes = [dword, wintypes.BOOL, dword]
        kernel.CloseHandle.argtypes = [handle]
        kernel.CreateToolhelp32Snapshot.argtypes = [dword, dword]
        kernel.Process32FirstW.argtypes = kernel.Process32NextW.argtypes = [handle, ctypes.c_void_p]
        kernel.TerminateProcess.argtypes = [handle, wintypes.UINT]
        kernel.WaitForSingleObject.argtypes = [handle, dword]
        kernel.GetExitCodeProcess.argtypes = [handle, ctypes.c_void_p]
        kernel.GetProcessTimes.argtypes = [handle] + [ctypes.c_void_p] * 4
        kernel.ReadProcessMemory.argtypes = [handle, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        kernel.CreateFileW.argtypes = [wintypes.LPCWSTR, dword, dword, ctypes.c_void_p, dword, dword, handle]
        kernel.SetConsoleCtrlHandler.argtypes = [ctypes.c_void_p, wintypes.BOOL]
        kernel.LocalFree.argtypes = [ctypes.c_void_p]
        ntdll.NtQueryInformationProcess.argtypes = [handle, ctypes.c_int, ctypes.c_void_p, dword, ctypes.c_void_p]
        ntdll.NtSuspendProcess.argtypes = ntdll.NtResumeProcess.argtypes = [handle]
        return kernel, ntdll

    @contextmanager
    def opened_process(pid: int, rights: int) -> Iterator[Any]:
        """Open a process for `rights`; ProcessLookupError where there is none, PermissionError where it is refused."""
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

    BACKGROUND: list[dict[str, Any]] = [{"creationflags": 0x09000000}, {"creationflags": 0x08000000}]
    """Popen options of a process that outlives us, tried in turn: on a console without a window (CREATE_NO_WINDOW) and
    outside our terminal's job (CREATE_BREAKAWAY_FROM_JOB), else inside it. No new process group: in one, CTRL_C is
    switched off, and CTRL_C is the only clean stop."""

    GROUP: dict[str, Any] = {"creationflags": 0x08000000}
    """Popen options of a command that we wait for: no console window may flash up."""

    @contextmanager
    def default_signals() -> Iterator[None]:
        """Have children hear CTRL_C: the switch is inherited, so it is put back first."""
        libraries()[0].SetConsoleCtrlHandler(None, False)
        yield

    def end_group(process: "subprocess.Popen[str]") -> None:
        import subprocess

        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.run(["taskkill", "/PID", str(process.pid), "/T", "/F"], **quiet, **GROUP)
        process.kill()

    def open_append(path: str) -> "BinaryIO":
        """Open a log so that every write lands at its end, whoever else writes, and others may read, truncate, rename.

        Python's mode "a" only moves to the end before it writes; FILE_APPEND_DATA alone is atomic. A link raises ELOOP.
        """
        if os.path.islink(path):
            raise OSError(errno.ELOOP, "is a link", path)
        append_data, share_all, open_always, normal = 0x0004, 0x7, 4, 0x80
        handle = libraries()[0].CreateFileW(path, append_data | SYNCHRONIZE, share_all, None, open_always, normal, None)
        if handle is None or handle == ctypes.c_void_p(-1).value:
            raise ctypes.WinError(ctypes.get_last_error())
        return os.fdopen(msvcrt.open_osfhandle(handle, os.O_APPEND), "ab", buffering=0)

    def lock_handle(fd: int, shared: bool = False) -> bool:
        """Take the exclusive lock of an open file without waiting: a byte far past the end, which none reads."""
        place = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, LOCK_OFFSET, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False
        finally:
            os.lseek(fd, place, os.SEEK_SET)

    @cache
    def job() -> Any:
        """Return a job whose processes end with us: the system closes its only handle then."""
        # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, whose flags (0x2000: KILL_ON_JOB_CLOSE) stand behind two of 64 bits
        kernel, limits = libraries()[0], ctypes.create_string_buffer(144 if POINTER_SIZE == 8 else 112)
        limits[17] = b"\x20"
        handle = kernel.CreateJobObjectW(None, None)
        kernel.SetInformationJobObject(handle, 9, limits, len(limits))
        return handle

    def bind_to_us(process: "subprocess.Popen[str]") -> None:
        """Have a child, and what it starts from now on, end when we have ended, however."""
        libraries()[0].AssignProcessToJobObject(job(), int(process._handle))  # type: ignore[attr-defined]

    def attach_and_interrupt(pid: int) -> None:
        """Press Ctrl-C on the console of `pid`, in a short-lived helper: it leaves its own for that. Raises OSError."""
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

        A process has one console, hence the helper. Should it be ours too, or not be told, we are deaf meanwhile; else
        not, for a second Ctrl-C of the user means something.
        """
        import subprocess

        kernel, _ = libraries()
        pids = (ctypes.c_ulong * 256)()
        count = kernel.GetConsoleProcessList(pids, len(pids))
        is_deaf = not 0 < count <= len(pids) or pid in pids[:count]
        if is_deaf:
            kernel.SetConsoleCtrlHandler(None, True)
        try:
            helper = [*own_command(), "--console-interrupt", str(pid)]
            quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            return subprocess.run(helper, timeout=15, **quiet, **GROUP).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False
        finally:
            if is_deaf:
                kernel.SetConsoleCtrlHandler(None, False)

    def signal_process(pid: int, how: str, is_it: "Optional[Callable[[Optional[int]], bool]]" = None) -> None:
        """Do to a process what a signal does: "interrupt", "terminate", "kill", "pause" or "continue".

        `is_it` tells whether the PID is still the one that is meant, which it stays as long as it is open here. Raises
        ProcessLookupError where it is not, PermissionError where it is refused or has no console to interrupt. Never
        os.kill: its 0 is CTRL_C, all else is the end.
        """
        kernel, ntdll = libraries()
        rights = {"interrupt": PROCESS_QUERY_LIMITED_INFORMATION, "pause": PROCESS_SUSPEND_RESUME}
        rights["continue"], ends = PROCESS_SUSPEND_RESUME, how in ("terminate", "kill")
        with opened_process(pid, rights.get(how, PROCESS_TERMINATE) | SYNCHRONIZE) as handle:
            if is_it is not None and not is_it(None):
                raise ProcessLookupError(f"there is no such process {pid} any more")
            if how == "interrupt":
                done = console_interrupt(pid)
            elif ends:
                done = kernel.TerminateProcess(handle, 1) or has_ended(handle)  # one that has just ended refuses
            else:  # these count: each pause needs its continue
                done = {"pause": ntdll.NtSuspendProcess, "continue": ntdll.NtResumeProcess}[how](handle) == 0
            if not done:
                raise PermissionError(f"process {pid} refuses to {how}: {ctypes.FormatError(ctypes.get_last_error())}")

    def owner_of(path: str) -> str:
        return f"{os.environ.get('USERDOMAIN', '.')}\\{os.environ.get('USERNAME', '')}"

    def reap(pid: int) -> Optional[int]:
        """Return the exit code of a process that has ended and that somebody still holds open, else None."""
        code = ctypes.c_ulong()
        with suppress(OSError), opened_process(pid, PROCESS_QUERY_LIMITED_INFORMATION | SYNCHRONIZE) as handle:
            if has_ended(handle) and libraries()[0].GetExitCodeProcess(handle, ctypes.byref(code)):
                return code.value
        return None

    def exit_code_kept(pid: int) -> "AbstractContextManager[Any]":
        """Have `reap` tell the exit code of a process that is no child: it is known while somebody has it open."""
        stack = ExitStack()
        with suppress(OSError):
            stack.enter_context(opened_process(pid, SYNCHRONIZE))
        return stack

    def await_end(pid: int, seconds: float) -> None:
        try:
            with opened_process(pid, SYNCHRONIZE) as handle:
                has_ended(handle, max(0, int(seconds * 1000)))
        except PermissionError:
            time.sleep(seconds)
        except OSError:
            pass

    def read_memory(handle: Any, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        return buffer.raw if libraries()[0].ReadProcessMemory(handle, address, buffer, size, None) else b""

    def read_pointer(handle: Any, address: int) -> int:
        return int.from_bytes(read_memory(handle, address, POINTER_SIZE), "little")

    def read_string(handle: Any, address: int) -> str:
        """Read the text of a UNICODE_STRING (length in bytes, capacity, pointer) at `address`."""
        length = int.from_bytes(read_memory(handle, address, 2), "little")
        text = read_memory(handle, read_pointer(handle, address + POINTER_SIZE), length) if length else b""
        return text.decode("utf-16-le", "replace")

    def split_command_line(line: str) -> list[str]:
        """Split a command line into words, as programs that Microsoft's C runtime starts do; of none, no words."""
        split, count = ctypes.WinDLL("shell32").CommandLineToArgvW, ctypes.c_int()
        split.argtypes, split.restype = [wintypes.LPCWSTR, ctypes.c_void_p], ctypes.POINTER(wintypes.LPWSTR)
        words = split(line, ctypes.byref(count)) if line.strip() else None
        if not words:
            return []
        try:
            return [str(words[index]) for index in range(count.value)]
        finally:
            libraries()[0].LocalFree(words)

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

    def listed_processes() -> list[tuple[int, str]]:
        """Return (pid, program) of every process from one snapshot of the system, [] where that is refused."""

        class Entry(ctypes.Structure):
            """PROCESSENTRY32W."""

            _fields_ = [(name, wintypes.DWORD) for name in ("size", "usage", "pid")]
            _fields_ += [("heap", ctypes.c_size_t), ("counts", wintypes.DWORD * 5), ("program", wintypes.WCHAR * 260)]

        kernel, entry, found = libraries()[0], Entry(), []
        entry.size = ctypes.sizeof(entry)
        snapshot = kernel.CreateToolhelp32Snapshot(2, 0)  # TH32CS_SNAPPROCESS
        try:
            there = kernel.Process32FirstW(snapshot, ctypes.byref(entry))
            while there:
                found.append((entry.pid, entry.program))
                there = kernel.Process32NextW(snapshot, ctypes.byref(entry))
        finally:
            kernel.CloseHandle(snapshot)
        return found

    def tcp_listeners(family: int) -> bytes:
        """Return Windows' table of the TCP sockets that listen (MIB_TCPTABLE_OWNER_PID), b"" where it is refused."""
        too_small, listeners = 122, 3  # ERROR_INSUFFICIENT_BUFFER, TCP_TABLE_OWNER_PID_LISTENER
        library, size, answer = ctypes.WinDLL("iphlpapi"), ctypes.c_ulong(4096), too_small
        while answer == too_small:
            buffer = ctypes.create_string_buffer(size.value)
            answer = library.GetExtendedTcpTable(buffer, ctypes.byref(size), False, family, listeners, 0)
        return buffer.raw if answer == 0 else b""

    def process_facts(pid: int) -> Optional[ProcessFacts]:
        """Return what Windows tells about a process, or None where it may not even be opened.

        Command line, folder and environment are read from the parameter block in its own memory (learn.microsoft.com
        has it in part), which needs no more than being the same user.
        """
        kernel, ntdll = libraries()
        facts = ProcessFacts(pid)
        for rights in (PROCESS_QUERY_INFORMATION | PROCESS_VM_READ, PROCESS_QUERY_LIMITED_INFORMATION):
            with suppress(OSError), opened_process(pid, rights) as handle:
                times = (ctypes.c_uint64 * 4)()  # created, ended, in the kernel, outside it
                if kernel.GetProcessTimes(handle, *(ctypes.byref(times, 8 * index) for index in range(4))):
                    facts.created = (times[0] - FILETIME_OF_1970) / 1e7
                    facts.alive = times[1] == 0
                basic = (ctypes.c_size_t * 6)()  # exit status, PEB, affinity, priority, PID, parent
                if ntdll.NtQueryInformationProcess(handle, 0, ctypes.byref(basic), ctypes.sizeof(basic), None) != 0:
                    return facts
                facts.ppid = int(basic[5])
                block = read_pointer(handle, int(basic[1]) + PEB_PARAMETERS)
                if block:
                    facts.command = split_command_line(read_string(handle, block + AT_COMMAND_LINE))
                    folder = read_string(handle, block + AT_FOLDER)
                    facts.cwd = os.path.normpath(folder) if folder else None  # Windows keeps a \ at its end
                    facts.environment = read_environment(handle, read_pointer(handle, block + AT_ENVIRONMENT))
                return facts
        return None

    @cache
    def this_machine() -> dict[str, Optional[str]]:
        """Return what machine this is; creation times are absolute here, so that a boot needs no name."""
        machine = ""
        with suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            machine = str(winreg.QueryValueEx(key, "MachineGuid")[0])
        return {"boot_id": None, "pid_ns": None, "machine": machine, "host": os.environ.get("COMPUTERNAME", "")}

    def venv_python(folder: str) -> str:
        return os.path.join(folder, "Scripts", "python.exe")

    session_of = kernel_clock = open_proc = unlock_handle = ending_with_us = unknown
    is_writable_by_others = unknown  # a matter of ACLs, which the mode of a file does not show
    reap_strangers = unknown  # there are no zombies

else:
    BACKGROUND: list[dict[str, Any]] = [{"start_new_session": True}]
    """Popen options of a process that outlives us: the leader of a session of its own."""

    GROUP: dict[str, Any] = {"start_new_session": True}
    """Popen options of a command that we wait for: its own session, so that it can be ended as a whole. Without a
    terminal git and ssh cannot stop and ask for a password either."""

    bind_to_us = unknown
    exit_code_kept = nullcontext  # the system keeps exit codes for parents, and for nobody else
    attach_and_interrupt = listed_processes = tcp_listeners = process_facts = unknown

    @contextmanager
    def default_signals() -> Iterator[None]:
        """Give children the default SIGINT, SIGTERM, SIGCHLD and signal mask for the time of a spawn.

        A caught signal is at its default after exec, an ignored one stays ignored: so an ignored one is caught by a
        handler that does nothing, which changes nothing for us. Only the main thread may set handlers.
        """
        import signal

        caught = []
        with suppress(ValueError):  # not the main thread: passes_interrupt_on() tells
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                if signal.getsignal(number) is signal.SIG_IGN:
                    signal.signal(number, lambda *_: None)
                    caught.append(number)
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number in caught:
                signal.signal(number, signal.SIG_IGN)

    def end_group(process: "subprocess.Popen[str]") -> None:
        import signal

        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group that has only zombies left
            os.killpg(process.pid, signal.SIGKILL)

    open_append = partial(open_regular, mode="ab", buffering=0)

    def lock_handle(fd: int, shared: bool = False) -> bool:
        """Take the lock of an open file without waiting; it falls with the last copy of the descriptor.

        flock, not lockf: lockf's falls as soon as any descriptor of that file is closed here. Who only wants to know
        takes a `shared` one, for two who ask must not meet each other. Raises OSError where there are no locks.
        """
        import fcntl

        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def reap_strangers(own: int) -> None:
        """Reap, as PID 1 of a container must, every ended process but `own`, whose exit code somebody waits for."""
        if not hasattr(os, "waitid"):  # macOS, where nothing runs as PID 1 of a container
            return
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != own:
                os.waitpid(ended.si_pid, os.WNOHANG)

    def signal_process(pid: int, how: str, is_it: "Optional[Callable[[Optional[int]], bool]]" = None) -> None:
        """Send a signal to one process: "interrupt", "terminate", "kill", "pause" or "continue".

        `is_it` tells whether it is still the one that is meant. It is asked of a descriptor of /proc/PID, where there
        is one, through which the signal goes, too: a process that is given the PID meanwhile is not hit. Raises
        ProcessLookupError where it is not there (or `pid` is no PID of ours: 0 and -1 would reach a crowd),
        PermissionError where it belongs to someone else.
        """
        import signal

        names = {"interrupt": "INT", "terminate": "TERM", "kill": "KILL", "pause": "STOP", "continue": "CONT"}
        number = signal.Signals["SIG" + names[how]]
        if not is_pid(pid):
            raise ProcessLookupError(f"there is no process {pid}")
        folder = open_proc(pid)
        try:
            if is_it is not None and not is_it(folder):
                raise ProcessLookupError(f"there is no such process {pid} any more")
            try:
                signal.pidfd_send_signal(folder, number)  # type: ignore
            except ProcessLookupError:
                raise
            except (AttributeError, TypeError, OSError):  # an older Linux or Python, a sandbox, macOS
                os.kill(pid, number)
        finally:
            if folder is not None:
                os.close(folder)

    def ending_with_us() -> Optional[Callable[[], None]]:
        """Return what a child does so that it is killed when we have ended, however; None where there is no way."""
        import ctypes

        parent, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is None:
            return None

        def prepare() -> None:
            prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
            if os.getppid() != parent:
                os._exit(1)

        return prepare

    def unlock_handle(fd: int) -> None:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_UN)

    def open_proc(pid: int) -> Optional[int]:
        """Open the folder of a process in /proc, which is then that of no other; None where there is none."""
        try:
            return os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in NO_MORE_FILES:  # who cannot look takes nobody for dead
                raise
            return None

    def owner_of(path: str) -> str:
        """Return the user whom a path belongs to, by name where that is known."""
        import pwd

        uid = os.stat(path).st_uid
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)

    def reap(pid: int) -> Optional[int]:
        """Return the exit code (negative: the signal) of our child `pid` if it has ended, else None. Never blocks."""
        try:
            ended, status = os.waitpid(pid, os.WNOHANG) if is_pid(pid) else (0, 0)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status) if ended else None

    def await_end(pid: int, seconds: float) -> None:
        """Wait for the end of a process, or so many seconds; where it may not be watched, always the latter."""
        import select

        try:
            fd = getattr(os, "pidfd_open")(pid)  # noqa: B009 (mypy knows that macOS has none)
        except ProcessLookupError:
            return
        except (OSError, AttributeError):
            return time.sleep(seconds)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            poller.poll(max(0.0, seconds * 1000))
        finally:
            os.close(fd)

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
    def this_machine() -> dict[str, Optional[str]]:
        """Return what boot of what machine this is, and in which PID namespace (a container has its own), where told.

        The host name tells clones of one image apart; a Mac's changes with the network, its id does not.
        """
        paths = ("/proc/sys/kernel/random/boot_id", "/etc/machine-id", "/var/lib/dbus/machine-id")
        boot, machine, older = (os.fsdecode(read_proc(path)).strip() for path in paths)
        machine, host, namespace = machine or older, os.uname().nodename, None
        if sys.platform == "darwin":
            boot = boot or mac_text("sysctlbyname", b"kern.bootsessionuuid") or ""
            machine, host = machine or mac_text("gethostuuid") or "", ""
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
        return {"boot_id": boot or None, "pid_ns": namespace, "machine": machine, "host": host}

    def venv_python(folder: str) -> str:
        return os.path.join(folder, "bin", "python")

    def is_writable_by_others(path: str) -> bool:
        """Tell whether everybody may write there. A group may be the user's own, so it does not count."""
        with suppress(OSError):
            return bool(os.stat(path).st_mode & 0o002)
        return False

    def session_of(pid: int) -> Optional[int]:
        with suppress(OSError):
            return os.getsid(pid)
        return None

    def kernel_clock() -> tuple[float, int, int]:
        """Return when this boot began (s since 1970, by today's clock), ticks of a second, shift in /proc."""
        clock, ticks = getattr(time, "CLOCK_BOOTTIME", None), os.sysconf("SC_CLK_TCK")
        shift = re.search(rb"^boottime +(-?\d+) +(\d+)", read_proc("/proc/self/timens_offsets"), re.MULTILINE)
        boot = time.time() - time.clock_gettime(clock) if clock is not None else 0.0
        return boot, ticks, int(shift[1]) * ticks + int(shift[2]) * ticks // 10**9 if shift else 0


def passes_interrupt_on() -> bool:
    """Tell whether a process started now hears the interrupt: not off the main thread where it is ignored."""
    import signal
    import threading

    in_main_thread = threading.current_thread() is threading.main_thread()
    return IS_WINDOWS or in_main_thread or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


TRACERS: list[Progress] = []  # who is told what is run, where, and how long it took; empty but for --verbose


def trace(told: "Union[str, list[str]]", cwd: "Optional[Union[str, Path]]" = None) -> None:
    """Tell those who want to know a line, or of a command as a shell would take it, and its folder."""
    if isinstance(told, list) and TRACERS:
        from shlex import join

        told = f"$ {join(told)}" + (f"  (in {cwd})" if cwd is not None else "")
    for tell in TRACERS:
        tell(redact(str(told)))


def create_background_process(
    cmd: list[str],
    cwd: "Union[str, Path]",
    log_file: "IO[Any]",
    env: Optional[dict[str, str]] = None,
    pass_fds: tuple[int, ...] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process that outlives us: detached from terminal and console, all output into `log_file`, stdin empty.

    `env` is the whole environment (ours if None); no descriptor but `pass_fds` is inherited. The caller closes its
    `log_file`. Raises CDEnvironmentError where the program cannot be started.
    """
    import subprocess

    trace(cmd, cwd)
    files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log_file, "stderr": subprocess.STDOUT}
    for options in BACKGROUND:
        try:
            with default_signals():
                process = subprocess.Popen(cmd, cwd=cwd, env=env, pass_fds=pass_fds, **files, **options)
            vars(process)["_child_created"] = False  # its finalizer's first question (3.9 to 3.14), lest it warns
            return process
        except OSError as error:
            if options is BACKGROUND[-1] or not isinstance(error, PermissionError):
                raise cannot_start(cmd, cwd, error) from error
    raise AssertionError("unreachable")


def run_at_terminal(cmd: list[str], cwd: str, env: dict[str, str]) -> int:
    """Run a program that has our streams, and hears Ctrl-C itself; return its exit code, negative for a signal."""
    import signal
    import subprocess

    trace(cmd, cwd)
    former = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which it would inherit
    try:
        return subprocess.call(cmd, cwd=cwd, env=env)
    except OSError as error:
        raise cannot_start(cmd, cwd, error) from error
    finally:
        signal.signal(signal.SIGINT, former)


def open_in_browser(url: str) -> bool:
    """Open `url` in the user's browser, which outlives us; False where none can be seen from here."""
    if sys.platform == "win32":
        os.startfile(url)  # noqa: S606 (a URL of our own making)
        return True
    is_wsl = "microsoft" in os.uname().release.lower()
    is_seen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get("SSH_CONNECTION") or not (is_wsl or sys.platform == "darwin" or is_seen):
        return False
    known = ["wslview", "explorer.exe"] if is_wsl else ["open"] if sys.platform == "darwin" else ["xdg-open"]
    program = next(filter(on_path, known), None)
    if program is not None:
        with open(os.devnull, "wb") as nowhere:
            create_background_process([program, url], "/", nowhere)
    return program is not None


def format_exit(code: int) -> str:
    """An exit code for people: code 3, signal 11 (SIGSEGV)."""
    import signal

    if code >= 0:
        return f"code {code}"
    with suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


def ignore_interrupts(is_program: bool) -> None:
    """Hear no Ctrl-C from now on, if a program is about to end; off the main thread nothing changes."""
    import signal

    with suppress(ValueError):
        if is_program:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: what a Ctrl-C means, with the exit code of that signal."""

    exit_code = 130


def prepare_signals() -> None:
    """Have SIGTERM and SIGHUP raise Terminated, so that what was begun is ended and undone on the way out.

    For a program in its main thread. What we were made to inherit is undone: SIGCHLD ignored would lose exit codes,
    blocked signals would not be heard. A SIGHUP ignored by nohup stays so.
    """
    import signal

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # the undoing is not broken off by a second one
        terminated = Terminated()
        terminated.exit_code = 128 + number
        raise terminated

    with suppress(ValueError):  # off the main thread
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Yield a list to which SIGINT, SIGTERM and SIGHUP add "interrupt", "terminate", "hangup" instead of acting.

    Off the main thread the list stays empty. A SIGHUP ignored by nohup stays so.
    """
    import signal

    received: list[str] = []
    words = {"SIGINT": "interrupt", "SIGTERM": "terminate", "SIGHUP": "hangup", "SIGBREAK": "terminate"}
    before = {}
    with suppress(ValueError):
        for name, word in words.items():
            number = getattr(signal, name, None)
            is_deaf = name == "SIGHUP" and number is not None and signal.getsignal(number) is signal.SIG_IGN
            if number is not None and not is_deaf:
                before[number] = signal.signal(number, lambda *_, word=word: received.append(word))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def start_thread(work: Callable[[], None]) -> "threading.Thread":
    """Start work beside us, which keeps nobody from ending. Raises CDEnvironmentError where no thread is to be had."""
    import threading

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        hint = "end some programs, or raise the limit of processes (ulimit -u)"
        raise CDEnvironmentError("The system starts no more threads for this user.", hint, "exhausted") from error
    return thread


def pumped_lines(process: "subprocess.Popen[str]", deadline: Optional[float]) -> Iterator[tuple[str, str]]:
    """Yield ("stdout" or "stderr", line) as they come, until both are closed; TimeoutError when the deadline is past.

    A pipe can be held open by a daemon that the command left behind: a second of silence after its end is enough.
    """
    import queue

    lines: "queue.Queue[tuple[str, str]]" = queue.Queue()

    def pump(name: str, stream: "IO[str]") -> None:
        with stream:
            for line in stream:
                lines.put((name, line))
        lines.put((name, ""))

    for name in ("stdout", "stderr"):
        start_thread(partial(pump, name, getattr(process, name)))
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


# The lock files that the commands we run hold with us, as descriptors, and who notes which command that is.
HANDED_ON: dict[int, Callable[[int, list[str]], None]] = {}


def run_command(
    cmd: list[str],
    cwd: Optional[str] = None,
    env: Optional[dict[str, str]] = None,
    timeout: Optional[float] = None,
    tell: Progress = no_progress,
    only_looks: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end and return its code and output (text; bytes that are not UTF-8 are replaced).

    `timeout` is in seconds; `tell` is given each line as it comes. A code other than 0 does not raise. Raises
    CDEnvironmentError with code "missing" where the program is not there, "timeout" when the time is up: then, as with
    any other exception, the command and all that it started are ended. What runs under a lock of HANDED_ON has its
    descriptor, and ends with us where the system can see to that; not what only looks: to sign a lock asks ps.
    """
    import subprocess

    trace(cmd, cwd)
    began, locks = time.monotonic(), {} if only_looks else HANDED_ON
    try:
        pipe, options = subprocess.PIPE, {**GROUP, "env": inherited_environment() if env is None else env}
        options.update(stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")
        if locks and not IS_WINDOWS:
            options.update(pass_fds=tuple(locks), preexec_fn=ending_with_us())
        with default_signals():
            process = subprocess.Popen(cmd, cwd=cwd, **options)
    except OSError as error:
        raise cannot_start(cmd, cwd, error) from error
    deadline = None if timeout is None else time.monotonic() + timeout
    output: dict[str, list[str]] = {"stdout": [], "stderr": []}
    try:
        for note in locks.values():
            bind_to_us(process)
            note(process.pid, cmd)
        for name, line in pumped_lines(process, deadline):
            output[name].append(line)
            tell(line.rstrip("\n"))
        code = process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except BaseException as error:
        end_group(process)
        process.wait()
        if isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
            raise CDEnvironmentError(f"{cmd[0]} did not finish within {timeout:g} seconds", code="timeout") from error
        raise
    trace(f"  ended with code {code} after {time.monotonic() - began:.2f} s")
    return subprocess.CompletedProcess(cmd, code, "".join(output["stdout"]), "".join(output["stderr"]))


# ====================================================================================================================
# 4. The process table
# The only section that asks the system who is running; psutil is named only here.


PATH_RULES = os.path  # how paths compare; a test puts ntpath here

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

PS_COLUMNS = "pid=,ppid=,uid=,stat=,lstart=,command="  # all known to both procps and macOS

PSUTIL_FACTS = ("pid", "ppid", "uids", "status", "create_time", "cmdline", "name")


def real_path(path: str) -> str:
    """Return what is behind all links of a path, as it compares; one that cannot be resolved is taken as it is written.

    Some drives of Windows cannot say what lies behind a link, and Wine cannot of a long path.
    """
    with suppress(OSError):
        path = PATH_RULES.realpath(path)
    return PATH_RULES.normcase(PATH_RULES.normpath(path))


def same_path(one: str, other: str) -> bool:
    """Tell whether two absolute paths are the same place, behind all links."""
    return real_path(one) == real_path(other)


def is_python(name: str) -> bool:
    """Tell whether a program's file name is a Python's: python, python3.13t, pythonw.exe, Python (macOS), pypy3."""
    return re.fullmatch(r"(python|pypy)[-0-9.tdwbg]*", name.lower().removesuffix(".exe")) is not None


def interpreter_width(words: list[str], joined: bool) -> int:
    """Return how many words are the path of a Python, 0 when another program runs.

    Words that ps joined may be parts of one absolute path with spaces; a word that begins a path or an option is not.
    """
    for width in range(1, len(words) + 1):
        if width > 1 and (not joined or words[0][:1] != "/" or words[width - 1].startswith(("/", "-"))):
            return 0
        if is_python(PATH_RULES.basename(" ".join(words[:width]))):
            return width
    return 0


@dataclass
class Process:
    """One process as one source saw it; what is not told is None.

    `ppid` is 0 where it is not told. `state` is "running", "stopped" (by SIGSTOP) or "zombie" (dead, not yet waited
    for). `created` is in seconds since 1970, on Linux reckoned by today's clock from `start_ticks`: clock ticks from
    the boot to the start. `command` has the words of the command line, or the program's name where they may not be
    read; where a source joined them by spaces, `joined` says so: then `command` is a guess, `text` is right.
    """

    pid: int
    ppid: int = 0
    session: Optional[int] = None
    uid: Optional[int] = None
    state: str = "running"
    created: Optional[float] = None
    start_ticks: Optional[int] = None
    command: list[str] = field(default_factory=list)
    joined: bool = False

    def age(self) -> float:
        """Return the seconds since the start, 0.0 where it is not told; a moved clock moves both ends on Linux."""
        return max(0.0, time.time() - self.created) if self.created is not None else 0.0

    @property
    def text(self) -> str:
        """The command line as one line."""
        return " ".join(self.command)

    @property
    def name(self) -> str:
        """The file name of the program."""
        return PATH_RULES.basename(" ".join(self.command[: interpreter_width(self.command, self.joined) or 1]))


def parse_stat(data: bytes, boot: float, ticks: int, shift: int = 0) -> Optional[Process]:
    """Read one /proc/PID/stat (man 5 proc_pid_stat); None where it is none. The command is the program's name alone."""
    head, _, tail = data.rpartition(b")")
    fields = tail.split(None, 20)
    if len(fields) < 20:
        return None
    pid, _, name = head.partition(b" (")
    start, letter = int(fields[19]), fields[0]
    # A leader that ended before its threads is not dead yet: it still holds its sockets and cannot be reaped.
    state = "zombie" if letter in b"ZXx" and int(fields[17]) <= 1 else "stopped" if letter == b"T" else "running"
    created, command = boot + start / ticks, [os.fsdecode(name)]
    return Process(int(pid), int(fields[1]), int(fields[3]), None, state, created, start - shift, command)


def parse_proc_net(text: str, port: int) -> set[int]:
    """Return the inodes of the sockets that listen on `port` (state 0A), from the text of /proc/net/tcp or tcp6."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {int(row[9]) for row in rows if len(row) > 9 and row[3] == "0A" and row[1].endswith(f":{port:04X}")}


def parse_ps(text: str) -> list[Process]:
    """Read what ps prints for PS_COLUMNS under PS_LOCALE; its dates take 24 columns, on macOS padded to 28."""
    from calendar import timegm

    processes = []
    for line in text.splitlines():
        fields = line.split(None, 4)
        if len(fields) < 5 or not (fields[0] + fields[1]).isdigit():
            continue
        command = fields[4][24:].strip()
        if " " not in command and command[:1] + command[-1:] == "()":
            command = command[1:-1]
        process = Process(int(fields[0]), int(fields[1]), command=command.split(" "), joined=True)
        process.uid = int(fields[2]) if fields[2].lstrip("-").isdigit() else None
        process.state = {"Z": "zombie", "T": "stopped"}.get(fields[3][0], "running")
        with suppress(ValueError):  # a date in another language
            _, month, day, clock, year = fields[4][:24].split()
            hour, minute, second = map(int, clock.split(":"))
            process.created = float(timegm((int(year), MONTHS.index(month) + 1, int(day), hour, minute, second)))
        processes.append(process)
    return processes


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
    """Return (pid, program) from `tasklist /FO CSV /NH`: "python.exe","288","Console","1","25,940 K"."""
    rows = (line.strip().strip('"').split('","') for line in text.splitlines() if line.startswith('"'))
    return [(int(row[1]), row[0]) for row in rows if len(row) >= 2 and row[1].isdigit()]


def parse_netstat(text: str, port: int) -> list[int]:
    """Return who listens on `port`, from `netstat -ano`: LISTENING is translated, that the foreign port is 0 is not."""
    rows = (line.split() for line in text.splitlines())
    tcp = (row for row in rows if len(row) > 3 and row[0] == "TCP" and row[-1].isdigit())
    return sorted({int(row[-1]) for row in tcp if row[1].endswith(f":{port}") and row[2].endswith(":0")})


# Windows' numbers for AF_INET and AF_INET6, how many numbers of 32 bits a row of their tables has, and which one is the
# port, in the network's order; the last is the PID.
TCP_TABLES = ((2, 6, 2), (23, 14, 5))


def parse_tcp_listeners(table: bytes, width: int, port_at: int) -> list[tuple[int, int]]:
    """Return (port, PID) of each row of a table whose first number says how many there are."""
    count = int.from_bytes(table[:4], "little")
    rows = (table[start : start + 4 * width] for start in range(4, 4 + 4 * width * count, 4 * width))
    port = slice(4 * port_at, 4 * port_at + 2)
    return [(int.from_bytes(row[port], "big"), int.from_bytes(row[-4:], "little")) for row in rows]


def parse_lsof(text: str, letter: str) -> list[str]:
    """Return the fields of one letter from `lsof -F` output: p a PID, n a name."""
    return [line[1:] for line in text.splitlines() if line.startswith(letter)]


class ProcessTable:
    """What every source can be asked; what it cannot tell is None, "" or [].

    A process may be a zombie; its `marker` is the COMFYDOCK_RUN_ID in its environment, its `cwd` the folder it stands
    in; `listeners` are the PIDs that listen on a TCP port, as far as the system tells us.
    """

    if TYPE_CHECKING:

        def pids(self) -> list[int]: ...
        def process(self, pid: int) -> Optional[Process]: ...
        def marker(self, pid: int) -> str: ...
        def cwd(self, pid: int) -> Optional[str]: ...
        def listeners(self, port: int) -> list[int]: ...

    def processes(self, containing: str = "") -> list[Process]:
        """Return all processes, or those whose command line contains a text, in whatever case where paths have none."""
        needle = PATH_RULES.normcase(containing)
        processes = filter(None, map(self.process, self.pids()))
        return [process for process in processes if needle in PATH_RULES.normcase(process.text)]

    def markers(self) -> dict[int, str]:
        """Return pid -> marker of all processes that have one."""
        return {pid: marker for pid in self.pids() if (marker := self.marker(pid))}

    def usage(self) -> "dict[int, tuple[int, float, int]]":
        """Return pid -> (parent's pid, seconds of CPU, resident bytes) of every process that tells."""
        return {}


def proc_process(
    pid: int, folder: Optional[int] = None, clock: "Optional[tuple[float, int, int]]" = None
) -> Optional[Process]:
    """Return a process by its folder in /proc; by an open one (`folder`) it is no other that has its PID meanwhile."""
    opened = open_proc(pid) if folder is None else folder
    if opened is None:
        return None
    try:
        process = parse_stat(read_proc("stat", opened), *(clock or kernel_clock()))
        if process is not None:
            words = read_proc("cmdline", opened).rstrip(b"\0").split(b"\0")  # of a zombie or a kernel thread none
            process.command = [os.fsdecode(word) for word in words] if any(words) else process.command
            # The owner of the folder is root where the process may not be looked into.
            _, told, uid = read_proc("status", opened).partition(b"\nUid:\t")
            process.uid = int(uid.split(None, 1)[0]) if told else None
        return process
    finally:
        if folder is None:
            os.close(opened)


def proc_start_ticks(pid: int) -> Optional[int]:
    """Return field 22 of /proc/PID/stat, whichever table lists the process: wall-clock times move, this does not."""
    process = proc_process(pid)
    return process.start_ticks if process is not None else None


def open_files(pid: int) -> Iterator[tuple[str, str]]:
    """Yield (its link in /proc, what it leads to) of each descriptor of a process, as far as we may look."""
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for fd in os.listdir(folder):
            with suppress(FileNotFoundError):  # closed meanwhile
                yield f"{folder}/{fd}", os.readlink(f"{folder}/{fd}")


def opened_inodes(pid: int, name: str) -> set[str]:
    """Return the inodes of the files called `name`, deleted or not, that a process has open."""
    found = set()
    for place, target in open_files(pid):
        if os.path.basename(target).split(" ")[0] == name:
            with suppress(OSError):
                found.add(str(os.stat(place).st_ino))
    return found


class ProcTable(ProcessTable):
    """Linux: /proc, read directly."""

    def pids(self) -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def process(self, pid: int) -> Optional[Process]:
        return proc_process(pid)

    def processes(self, containing: str = "") -> list[Process]:
        """Return all processes, or those whose command line contains a text (only they are looked at closely)."""
        needle, pids, clock = os.fsencode(containing), self.pids(), kernel_clock()
        found = [pid for pid in pids if not needle or needle in read_proc(f"/proc/{pid}/cmdline")]
        return list(filter(None, (proc_process(pid, None, clock) for pid in found)))

    def marker(self, pid: int) -> str:
        block = b"\0" + read_proc(f"/proc/{pid}/environ")
        return os.fsdecode(block.partition(f"\0{RUN_ID_VARIABLE}=".encode())[2].partition(b"\0")[0])

    def cwd(self, pid: int) -> Optional[str]:
        try:
            return os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            return None

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`: the socket's inode is in /proc/net, its holder among all descriptors."""
        text = "".join(read_proc(f"/proc/net/{name}").decode("ascii", "replace") for name in ("tcp", "tcp6"))
        wanted = {f"socket:[{inode}]" for inode in parse_proc_net(text, port)}
        return [pid for pid in self.pids() if wanted and wanted & {target for _, target in open_files(pid)}]

    def usage(self) -> "dict[int, tuple[int, float, int]]":
        from mmap import PAGESIZE

        (_, ticks, _), found = kernel_clock(), {}
        for pid in self.pids():
            fields = read_proc(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            if len(fields) > 21:  # from field 3 of proc(5) on: 4 ppid, 14 utime, 15 stime, 24 rss
                found[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * PAGESIZE
        return found


def psutil_module() -> Any:
    """Return psutil; ImportError where it is not installed."""
    from importlib import import_module

    return import_module("psutil")


class PsutilTable(ProcessTable):
    """psutil where it is installed."""

    def pids(self) -> list[int]:
        return list(psutil_module().pids())

    def process(self, pid: int) -> Optional[Process]:
        psutil = psutil_module()
        names = [name for name in PSUTIL_FACTS if hasattr(psutil.Process, name)]  # Windows has no uids
        try:
            process = psutil.Process(pid)
            try:
                facts = process.as_dict(names)
            except OSError:  # Windows reads no command line of a process that is just ending
                names.remove("cmdline")
                facts = {"cmdline": None, **process.as_dict(names)}
        except (psutil.Error, OSError, ValueError, OverflowError):
            return None
        uids, words = facts.get("uids"), facts["cmdline"] or [facts["name"] or ""]
        state = {"zombie": "zombie", "dead": "zombie", "stopped": "stopped"}.get(facts["status"], "running")
        uid, created, start = uids.real if uids else None, facts["create_time"], proc_start_ticks(pid)
        return Process(facts["pid"], facts["ppid"] or 0, session_of(pid), uid, state, created, start, words)

    def usage(self) -> "dict[int, tuple[int, float, int]]":
        found = {}
        for one in psutil_module().process_iter(["ppid", "cpu_times", "memory_info"]):
            times, memory = one.info["cpu_times"], one.info["memory_info"]
            if times and memory:
                found[one.pid] = one.info["ppid"], times.user + times.system, memory.rss
        return found

    def marker(self, pid: int) -> str:
        psutil = psutil_module()
        with suppress(psutil.Error, OSError, ValueError):
            return str(psutil.Process(pid).environ().get(RUN_ID_VARIABLE, ""))
        return ""

    def cwd(self, pid: int) -> Optional[str]:
        psutil = psutil_module()
        with suppress(psutil.Error, OSError, ValueError):
            return psutil.Process(pid).cwd() or None  # "" of a zombie
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
    with suppress(CDEnvironmentError):
        return run_command(cmd, env=env, timeout=20, only_looks=True).stdout
    return ""


def parse_usage(text: str) -> "dict[int, tuple[int, float, int]]":
    """Return what `ps -o pid=,ppid=,time=,rss=` tells: times are [[days-]hours:]minutes:seconds, memory is in KiB."""
    found = {}
    for pid, ppid, spent, size in (line.split() for line in text.splitlines() if len(line.split()) == 4):
        days, _, clock = spent.rpartition("-")
        hours = [float(part) for part in ["0", "0", *clock.split(":")][-3:]]
        seconds = float(days or 0) * 86400 + hours[0] * 3600 + hours[1] * 60 + hours[2]
        found[int(pid)] = int(ppid), seconds, int(size) * 1024
    return found


class PsTable(ProcessTable):
    """macOS, BSD: the text of `ps`, and `lsof` for folders and ports; the ps of busybox does not know our columns."""

    def ps(self, *options: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if name != "LC_ALL"}
        return printed(["ps", *options], {**inherited, **PS_LOCALE})

    def usage(self) -> "dict[int, tuple[int, float, int]]":
        return parse_usage(self.ps("-A", "-o", "pid=,ppid=,time=,rss="))

    def shown(self, *options: str, containing: str = "") -> list[Process]:
        """Return what ps lists, with what it does not print: the session, and start ticks where there is a /proc."""
        listed, needle = parse_ps(self.ps("-ww", *options, "-o", PS_COLUMNS)), PATH_RULES.normcase(containing)
        processes = [process for process in listed if needle in PATH_RULES.normcase(process.text)]
        for process in processes:
            process.session, process.start_ticks = session_of(process.pid), proc_start_ticks(process.pid)
        return processes

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes()]

    def process(self, pid: int) -> Optional[Process]:
        return next(iter(self.shown("-p", str(pid))), None)

    def processes(self, containing: str = "") -> list[Process]:
        return self.shown("-ax", containing=containing)

    def marker(self, pid: int) -> str:
        return self.markers().get(pid, "")

    def markers(self) -> dict[int, str]:
        return parse_markers(self.ps(PS_WITH_ENVIRONMENT, "-o", "pid=,command="))

    def cwd(self, pid: int) -> Optional[str]:
        names = parse_lsof(printed(["lsof", "-a", "-p", str(pid), "-d", "cwd", "-Fn"]), "n")
        return names[0] if names else None

    def listeners(self, port: int) -> list[int]:
        text = printed(["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fp"])
        return [int(pid) for pid in parse_lsof(text, "p")]


class WindowsTable(ProcessTable):
    """Windows: the list from a snapshot of the system, or from tasklist; all else from the processes themselves."""

    def listed(self) -> list[tuple[int, str]]:
        """Return (pid, program) of every process."""
        return listed_processes() or parse_tasklist(printed(["tasklist", "/FO", "CSV", "/NH"]))

    def process(self, pid: int, program: str = "") -> Optional[Process]:
        """Return one process, unless it is dead and held open; `program` is what the list has, where it was read."""
        facts = process_facts(pid) or ProcessFacts(pid)
        command = facts.command or [program or dict(self.listed()).get(pid, "")] if facts.alive else []
        return Process(pid, facts.ppid or 0, created=facts.created, command=command) if any(command) else None

    def processes(self, containing: str = "") -> list[Process]:
        needle, processes = PATH_RULES.normcase(containing), (self.process(*one) for one in self.listed())
        return [one for one in processes if one is not None and needle in PATH_RULES.normcase(one.text)]

    def pids(self) -> list[int]:
        return [pid for pid, _ in self.listed()]

    def marker(self, pid: int) -> str:
        return (process_facts(pid) or ProcessFacts(pid)).environment.get(RUN_ID_VARIABLE, "")

    def cwd(self, pid: int) -> Optional[str]:
        return (process_facts(pid) or ProcessFacts(pid)).cwd

    def listeners(self, port: int) -> list[int]:
        """Return who listens on `port`, from the system's tables, or where they are refused from netstat."""
        tables = [tcp_listeners(family) for family, _, _ in TCP_TABLES]
        if not any(tables):
            return parse_netstat(printed(["netstat", "-ano"]), port)
        rows = (parse_tcp_listeners(table, *layout) for table, (_, *layout) in zip(tables, TCP_TABLES))
        return sorted({pid for found in rows for one, pid in found if one == port})


TABLES: dict[str, type[ProcessTable]] = {
    "proc": ProcTable,
    "windows": WindowsTable,
    "psutil": PsutilTable,
    "ps": PsTable,
}


@cache
def is_usable(name: str) -> bool:
    """Tell whether a source of TABLES works here: it sees us. Asked once, for trying ps costs a process."""
    try:
        may_be = name in TABLES and (IS_WINDOWS or name != "windows")
        return may_be and TABLES[name]().process(os.getpid()) is not None
    except Exception as error:  # psutil reads /proc on Linux, and raises anything without it
        if getattr(error, "errno", None) in NO_MORE_FILES:  # who cannot look now can later
            raise
        return False


def process_table() -> ProcessTable:
    """Return the first source of TABLES that works here, or the one that COMFYDOCK_PROCESS_TABLE names.

    Raises CDEnvironmentError where the named one is unknown or does not work here, or none does.
    """
    forced = os.environ.get("COMFYDOCK_PROCESS_TABLE", "")
    name = next(filter(is_usable, [forced] if forced else TABLES), None)
    if name is not None:
        return TABLES[name]()
    if forced:
        hint = "unset COMFYDOCK_PROCESS_TABLE, or set it to one of: " + ", ".join(TABLES)
        raise CDEnvironmentError(f"COMFYDOCK_PROCESS_TABLE={forced} does not work on this machine", hint)
    message = "this machine has no /proc, ps or tasklist, so running processes cannot be seen"
    raise CDEnvironmentError(message, f"{sys.executable} -m pip install psutil", "missing")


def scripts_of(process: Process, name: str) -> list[str]:
    """Return the absolute paths of what a Python may run as its script, if that is a file called `name`.

    Options such as -s, -u, -X utf8 may stand before the script, which is one word, or any run of joined words that
    begins there. An editor of it, or another script that is given it as an argument, does not count.
    """
    rest, found = process.command[interpreter_width(process.command, process.joined) or len(process.command) :], []
    while rest and rest[0].startswith("-"):
        option = re.fullmatch(r"-[^-cmXW]*([cmXW])(.*)", rest[0], re.DOTALL)
        if rest[0] == "-" or option and option[1] in "cm":  # no script follows these
            return []
        takes_next = rest[0] == "--check-hash-based-pycs" or option and not option[2]
        rest = rest[2 if takes_next else 1 :]
    for end in range(1, len(rest) + 1 if process.joined else 2):
        path = " ".join(rest[:end])
        if PATH_RULES.normcase(PATH_RULES.basename(path)) == PATH_RULES.normcase(name):
            folder = "" if PATH_RULES.isabs(path) else process_table().cwd(process.pid)
            found += [PATH_RULES.join(folder, path)] if folder is not None else []
    return found


def runs_script(process: Process, script: str) -> bool:
    """Tell whether this is a Python that runs the file `script` (absolute)."""
    return any(same_path(path, script) for path in scripts_of(process, PATH_RULES.basename(script)))


def identity_of(process: Optional[Process]) -> dict[str, Any]:
    """Return what tells this process from every other, for the state file; of one that is gone, only where it was."""
    process = process or Process(0)
    return {"start_ticks": process.start_ticks, **this_machine(), "created": process.created}


def is_identity_of(process: Process, recorded: object) -> bool:
    """Tell whether an identity is that of a process: each field that this system can tell must be there and match.

    Where the boot has a name those of the machine are not compared, for they change; where there are ticks, the
    creation time is not, for clocks move; else it may differ by 2 s. Without either nothing is proved.
    """
    told = {key: value for key, value in identity_of(process).items() if value is not None}
    known = recorded if isinstance(recorded, dict) else {}
    if "boot_id" in told:
        del told["machine"], told["host"]
    created, theirs = told.pop("created", None), known.get("created")
    is_number = isinstance(theirs, (int, float)) and not isinstance(theirs, bool)
    is_as_old = created is not None and is_number and abs(theirs - created) <= 2
    return ("start_ticks" in told or is_as_old) and all(known.get(key) == value for key, value in told.items())


def locate(identity: object) -> str:
    """Return where a recorded process lives: "here", "beside" us in another PID namespace, "foreign" or "rebooted".

    "rebooted" is this machine before its last start: the process is surely dead. The same boot is the same kernel; else
    both names of the machine must match, for clones have one id, and an empty id is nobody's. Other fields that a
    record lacks count as equal; so an empty identity is "here".
    """
    ours = identity_of(None)
    theirs = {**ours, "boot_id": None, **identity} if isinstance(identity, dict) and identity else ours
    if theirs["boot_id"] is None or theirs["boot_id"] != ours["boot_id"]:
        if (theirs["machine"], theirs["host"]) != (ours["machine"] or None, ours["host"]) and theirs is not ours:
            return "foreign"
        if theirs["boot_id"] and ours["boot_id"]:
            return "rebooted"
    return "here" if theirs["pid_ns"] == ours["pid_ns"] else "beside"


def recorded_process(noted: Optional[dict[str, Any]], *users: Optional[int]) -> Optional[Process]:
    """Return the live process that `noted` names ("pid", "identity"), else None.

    `users` are whose it must be, by the file that says so and by what that says, as far as known: a record speaks for
    its owner, of another user's process it proves nothing.
    """
    pid = noted.get("pid") if noted else None
    if noted is None or not isinstance(pid, int) or pid != 1 and not is_pid(pid):  # a keeper in a container is PID 1
        return None
    process = process_table().process(pid)
    if process is None or process.state == "zombie" or not is_identity_of(process, noted.get("identity")):
        return None
    return process if all(user in (None, process.uid) for user in users) else None


def recorded_starter(record: ProcessState) -> Optional[Process]:
    """Return the process that wrote an intent, if it lives."""
    return recorded_process(record.starter, record.owner, record.uid)


def subject_of(record: ProcessState, python: str, script: str) -> Optional[Process]:
    """Return the live process that a record is about: of an intent its starter, else a Python that runs `script`.

    So does a wrapper in place of `python`, a script, that has not become it: a shell shows their names behind its own.
    A record without an identity, of the first version, names a candidate, which is its own proof.
    """
    if record.pid is None:
        return recorded_starter(record)
    identity = record.identity or identity_of(process_table().process(record.pid))
    process = recorded_process({"pid": record.pid, "identity": identity}, record.owner, record.uid)
    if process is None or runs_script(process, script):
        return process
    with suppress(OSError), open_regular(os.path.realpath(python)) as file:
        is_wrapped = any(f" {python} {option}{script}" in process.text for option in ("", "-s "))
        return process if is_wrapped and file.read(2) == b"#!" else None
    return None


def is_process_alive(pid: int) -> bool:
    """Tell whether `pid` is a Python that runs: no zombie, no other program, no PID below 2."""
    process = process_table().process(pid) if is_pid(pid) else None
    return process is not None and process.state != "zombie" and is_python(process.name)


def is_same_process(process: Process, folder: Optional[int] = None) -> bool:
    """Tell whether the very process of `process` runs, by a descriptor of /proc/PID or the table; a zombie does not."""
    now = proc_process(process.pid, folder) if folder is not None else process_table().process(process.pid)
    is_alive = now is not None and now.state != "zombie" and now.uid == process.uid
    return now is not None and is_alive and is_identity_of(now, identity_of(process))


def signal_same(process: Process, how: str) -> None:
    """Signal the very process of `process`, nothing between look and kill. Raises as `signal_process`."""
    signal_process(process.pid, how, lambda folder: is_same_process(process, folder))


def non_reaping_init(status: Optional[str] = None) -> Optional[str]:
    """Return the command of a PID 1 that does not reap orphans: their entries stay until the container ends.

    Who neither catches, blocks (signalfd, sigwait) nor ignores SIGCHLD never hears of them; but a thread may be
    waiting, and a shell reaps whatever ends while it waits for its own. `status` is the text of /proc/1/status.
    """
    status = os.fsdecode(read_proc("/proc/1/status")) if status is None else status
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    masks = [int(facts.get(name, "0"), 16) for name in ("SigBlk", "SigIgn", "SigCgt")]
    is_shell = facts.get("Name") in ("init", "sh", "dash", "ash", "bash", "busybox")
    if facts.get("Threads", "").strip() != "1" or is_shell or any(mask & 1 << 16 for mask in masks):  # SIGCHLD is 17
        return None
    return os.fsdecode(read_proc("/proc/1/cmdline").replace(b"\0", b" ")).strip() or "the first process"


def is_stopped(process: Process) -> bool:
    """Tell whether no thread of a process runs any more: a stop is asked for, and each thread heeds it by itself."""
    folder = f"/proc/{process.pid}/task"
    try:
        threads = os.listdir(folder)
    except OSError:
        now = process_table().process(process.pid)
        return now is None or now.state != "running" or IS_WINDOWS  # which tells no such state
    states = (read_proc(f"{folder}/{thread}/stat").rpartition(b") ")[2][:1] for thread in threads)
    return all(state in b"TtZX" for state in states)


def wait_for_exit(
    process: Process, seconds: float, meanwhile: Optional[Callable[[], bool]] = None, pause: float = 0.05
) -> bool:
    """Wait up to `seconds` for the end of a process; True when it has ended (a zombie has).

    `meanwhile` is called every `pause` seconds at most; when it returns True the wait is broken off.
    """
    began = time.monotonic()

    def outcome() -> str:
        if not is_same_process(process):
            return "ended"
        if meanwhile is not None and meanwhile():
            return "called off"
        await_end(process.pid, min(pause, max(0.0, began + seconds - time.monotonic())))
        return ""

    return until(outcome, seconds, 0.0) == "ended"


def ancestors_of(pid: int, processes: dict[int, Process]) -> set[int]:
    """Return the PIDs of a process's parent, its parent's parent and so on, as far as `processes` knows them."""
    found: set[int] = set()
    process = processes.get(pid)
    while process is not None and (parent := processes.get(process.ppid)) and parent.pid not in {process.pid, *found}:
        ticks, created, later = process.start_ticks, process.created, float("inf")
        if (ticks or later) < (parent.start_ticks or 0) or (created or later) < (parent.created or 0) - 1:
            break  # a later process that was given the dead parent's PID
        found.add(parent.pid)
        process = parent
    return found


def output_of(process: Process) -> Optional[str]:
    """Return the regular file that a process writes its output to, None where that is none or not told."""
    with suppress(OSError):
        path = os.readlink(f"/proc/{process.pid}/fd/1")
        return path if os.path.isfile(path) else None
    return None


def writers_of(path: str) -> list[Process]:
    """Return which others have a file open for writing, as far as we may look."""

    def writes(pid: int) -> bool:
        with suppress(OSError):  # closed meanwhile
            return any(target == path and os.lstat(place).st_mode & 0o200 for place, target in open_files(pid))
        return False

    table, ours = process_table(), os.getpid()
    pids = [pid for pid in table.pids() if pid != ours and writes(pid)] if is_usable("proc") else []
    return list(filter(None, map(table.process, pids)))


def process_tree(process: Process, run_id: Optional[str], alive: Optional[dict[str, Any]] = None) -> list[Process]:
    """Return the process itself and all that belongs to it, alive: what one stop must end; parents before children.

    That is its session (where it leads one), its descendants, and every process that bears the marker `run_id` or has
    the same lock file open, as forks do: its own, or the recorded one of a process that has ended (`alive`). Neither
    ourselves nor our ancestors, which may bear the marker too; nor what is another user's.
    """
    table = process_table()
    processes = {one.pid: one for one in table.processes() if one.state != "zombie"}
    markers = table.markers() if run_id else {}
    spared = ancestors_of(os.getpid(), processes) | {os.getpid()}
    now = processes.get(process.pid)
    same = now is not None and is_identity_of(now, identity_of(process))
    family = {pid for pid in processes if same and process.pid in {pid, *ancestors_of(pid, processes)}}
    # A session keeps its number from reuse after its leader's end.
    if process.session == process.pid and (same or now is None):
        family |= {pid for pid, one in processes.items() if one.session == process.pid}
    family |= {pid for pid in processes if run_id and markers.get(pid) == run_id}
    locks = {str(alive.get("ino"))} if alive else opened_inodes(process.pid, ALIVE_NAME)
    family |= {pid for pid in processes if locks and locks & opened_inodes(pid, ALIVE_NAME)}
    # Windows adds a conhost.exe below each process with a console, and takes it away by itself.
    candidates = (processes[pid] for pid in family - spared if processes[pid].name.lower() != "conhost.exe")
    members = (one for one in candidates if one.uid == process.uid)
    return sorted(members, key=lambda one: (one.start_ticks or one.created or 0, one.pid))


Scan = dict[str, list[Process]]  # the live processes that run a main.py, by its real path


def scan_for_comfyui() -> Scan:
    """Return the live Pythons that run a file called main.py, by its real path."""
    table = process_table()
    found: Scan = {}
    for process in table.processes(containing="main.py"):
        for script in set(map(real_path, scripts_of(process, "main.py"))) if process.state != "zombie" else ():
            found.setdefault(script, []).append(process)
    return found


def comfyui_processes(comfyui_path: str, scan: Optional[Scan] = None) -> list[Process]:
    """Return the live processes that run main.py of one checkout, by `scan` or a new one.

    Forked workers show the same command line as their parent, and so does the child of a venv's python.exe on Windows:
    a candidate below a candidate is left out.
    """
    scan = scan_for_comfyui() if scan is None else scan
    found = {process.pid: process for process in scan.get(real_path(main_script(comfyui_path)), [])}
    if len(found) < 2:
        return list(found.values())
    processes = {process.pid: process for process in process_table().processes()}
    return [process for pid, process in found.items() if not ancestors_of(pid, processes) & found.keys()]


def port_holders(port: int) -> list[Process]:
    """Return the processes that listen on a TCP port; those of other users may stay hidden."""
    table = process_table()
    return list(filter(None, map(table.process, table.listeners(port))))


# ====================================================================================================================
# 5. The network
# Alone opens sockets and URLs; every call has a wall-clock deadline and a byte limit.

HEALTHY, REFUSED, TIMEOUT, OTHER_SERVICE, BAD_ANSWER = "healthy", "refused", "timeout", "other-service", "bad-answer"
ANSWER_LIMIT = 1 << 20
QUEUE_LIMIT = 16 << 20


@dataclass
class Answer:
    """What was met: healthy, refused (nobody listens), timeout, other-service, or bad-answer: our own process's.

    `argv` is the command line that ComfyUI says it has, `queue` how many prompts run and wait, or None.
    """

    kind: str
    argv: Optional[list[str]] = None
    queue: Optional[tuple[int, int]] = None
    facts: dict[str, Any] = field(default_factory=dict)


def facts_of(stats: Any) -> dict[str, Any]:
    """Return versions, device and VRAM (bytes) of /system_stats; what is not what it should be is left out or None."""
    system, devices = stats["system"], stats.get("devices")
    device = devices[0] if isinstance(devices, list) and devices and isinstance(devices[0], dict) else {}
    named = (system.get("comfyui_version"), system.get("python_version"), device.get("name"))
    version, python, name = (printable(value) if isinstance(value, str) else None for value in named)
    facts: dict[str, Any] = {"version": version, "python": (python or "").partition(" ")[0] or None, "device": name}
    total, free = device.get("vram_total"), device.get("vram_free")
    if type(total) is int and type(free) is int and total >= free >= 0 and total > 1 << 20:  # a CPU has had 1 byte
        facts["vram"] = {"used": total - free, "total": total}
    return facts


def begin(work: "Callable[[], Thing]") -> "Callable[[float], Thing]":
    """Begin work in a thread; return what waits for its result until a moment of the monotonic clock (or TimeoutError).

    For what heeds no deadline: a silent name server takes seconds, and a server that drips its headers takes what it
    likes. The work is then left to itself: no program waits for it at its end.
    """
    import threading

    done, results, troubles = threading.Event(), [], []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised in whoever asks for the result)
            troubles.append(error)
        done.set()

    def result(deadline: float) -> "Thing":
        if not done.wait(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)):
            raise TimeoutError("no answer in time")
        for trouble in troubles:
            raise trouble
        return results[0]

    try:
        start_thread(run)
    except CDEnvironmentError:
        run()
    return result


def remaining(deadline: float) -> float:
    """Return the seconds until a moment of the monotonic clock. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def addresses(host: str, port: int, deadline: float) -> list[Any]:
    """Return what getaddrinfo says of a host ("" is every address), by the deadline. Raises OSError, UnicodeError."""
    import socket

    # For a str Python imports the rules of international names (2 ms).
    place: Any = (host.encode() if host.isascii() else host) or None
    try:
        return socket.getaddrinfo(place, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE | socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name
        return begin(lambda: socket.getaddrinfo(place, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE))(deadline)


def connected_socket(host: str, port: int, deadline: float, tls: bool = False) -> Any:
    """Return a connection to the first address of a host that takes one, by the deadline. Raises OSError."""
    import socket

    problem: OSError = ConnectionRefusedError(f"{host} has no address")
    for family, kind, protocol, _, address in addresses(host, port, deadline):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(remaining(deadline))
            connection.connect(address)
            if not tls:
                return connection
            import ssl

            connection.settimeout(remaining(deadline))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # its certificate is self-signed, and we send no secret
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context.wrap_socket(connection)
        except OSError as error:
            connection.close()
            problem = error
    raise problem


def http_get(config: ComfyUIConfig, path: str, deadline: float, limit: int = ANSWER_LIMIT) -> tuple[int, bytes]:
    """Return (status, body) of one GET to ComfyUI, all by a moment of the monotonic clock and within `limit` bytes.

    A raw exchange: urllib would follow redirects and proxies, and its timeout counts from each byte (0.5 s became 8 s
    against a dripping server). No Origin header, which ComfyUI would compare with Host. Raises OSError (refused,
    TimeoutError) or ValueError (no HTTP, too long).
    """
    place, answer = local_url(config).partition("//")[2], bytearray()
    request = f"GET {path} HTTP/1.0\r\nHost: {place}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    with connected_socket(connect_host(config.host), config.port, deadline, config.tls) as connection:
        connection.settimeout(remaining(deadline))
        connection.sendall(request.encode("ascii", "replace"))
        piece = b"HTTP"
        while piece:
            connection.settimeout(remaining(deadline))
            piece = connection.recv(65536)
            answer += piece
            if len(answer) > limit or not b"HTTP/".startswith(answer[:5]):
                raise ValueError("too long, or no HTTP")
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/\S+ ([0-9]{3})\b", head)
    if status is None:
        raise ValueError("no HTTP")
    return int(status[1]), body


def queue_counts(config: ComfyUIConfig, timeout: float) -> Optional[tuple[int, int]]:
    """Return (running, pending) prompts within `timeout` seconds; None when ComfyUI cannot be asked. Never raises."""
    deadline = time.monotonic() + timeout
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        waiting = json.loads(http_get(config, "/queue", deadline, QUEUE_LIMIT)[1])
        return len(waiting["queue_running"]), len(waiting["queue_pending"])
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        count = int(json.loads(http_get(config, "/prompt", deadline)[1])["exec_info"]["queue_remaining"])
        return min(1, count), max(0, count - 1)
    return None


def look_at(config: ComfyUIConfig, timeout: float, with_queue: bool = True) -> Answer:
    """Return what answers where ComfyUI should, and of a healthy one the queue, within `timeout` s. Never raises."""
    began, answer = time.monotonic(), Answer(OTHER_SERVICE)
    try:
        status, body = http_get(config, "/system_stats", began + timeout)
        if status == 200:
            stats = json.loads(body)
            argv = stats["system"].get("argv")
            answer = Answer(HEALTHY, argv if is_text_list(argv) else None, facts=facts_of(stats))
        elif status in (401, 403, 407):  # a reverse proxy with a password: up, but not for us to read
            answer = Answer(HEALTHY)
    except ConnectionRefusedError:
        answer = Answer(REFUSED)
    except OSError:
        answer = Answer(TIMEOUT)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    trace(f"GET {local_url(config)}/system_stats: {answer.kind} after {time.monotonic() - began:.2f} s")
    if with_queue and answer.argv is not None:
        answer.queue = queue_counts(config, began + timeout - time.monotonic())
    return answer


def probe_all(configs: list[ComfyUIConfig], timeout: float) -> list[Answer]:
    """`look_at` each, all at once: as slow as the slowest, not as their sum."""
    results = [begin(lambda config=config: look_at(config, timeout)) for config in configs]  # type: ignore[misc]
    return [result(float("inf")) for result in results]


def check_http_health(host: str, port: int, timeout: float = 2.0) -> bool:
    """Tell whether a ComfyUI answers on host:port within `timeout` seconds. For display only."""
    return look_at(ComfyUIConfig(host, port), timeout, with_queue=False).kind == HEALTHY


def is_port_bound(port: int, expected_pid: Optional[int] = None, host: str = DEFAULT_HOST) -> bool:
    """Tell whether `port` is in use where ComfyUI with `--listen host` would bind it.

    With `expected_pid`: whether that process is the one that listens. The question is asked as
    ComfyUI binds (each address, reuse on POSIX, so that TIME_WAIT after a stop does not count) and
    by a connection, because some systems let a second program bind beside a wildcard.
    """
    if expected_pid is not None:
        return expected_pid in process_table().listeners(port)
    if not all(_can_bind(name.strip(), port) for name in host.split(",")):
        return True
    nearby = connect_host(host)
    with suppress(OSError):
        if is_loopback(nearby):
            connected_socket(nearby, port, time.monotonic() + 0.2).close()
            return True
    return False


def _can_bind(name: str, port: int) -> bool:
    import socket

    try:
        places = addresses(name, port, time.monotonic() + 2.0)
    except (OSError, UnicodeError):
        return True  # ComfyUI itself will say that the name does not resolve
    option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)  # the former on Windows
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, option, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
        except OSError as problem:
            if problem.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", None)):
                return False
    return True


def next_free_port(start: int, host: str, taken: "dict[int, str]") -> int:
    """Return the first port from `start` on that nobody has. Raises CDEnvironmentError when there is none."""
    for port in range(start, min(start + 1000, 65536)):
        if port not in taken and not is_port_bound(port, host=host):
            return port
    raise CDEnvironmentError(f"No free port from {start} on.", ("run", "--port", "NUMBER"))


USER_AGENT = "comfydock/2 (process manager for ComfyUI)"
RETRY_DELAYS = (1.0, 3.0, 9.0)  # seconds before the second, third and fourth try
LONGEST_RETRY_AFTER = 60.0  # a server that asks for more is taken as down
PASSING_ANSWERS = (429, 500, 502, 503, 504)  # too busy or broken now, may serve later
CHUNK = 256 * 1024
MEGABYTE = 1024 * 1024


def check_url(url: str) -> None:
    """Raise CDEnvironmentError (code "url") unless the URL is https, or http to this machine, and holds no password."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host = (parts.hostname or "") if parts.port != 0 else ""  # asking for a port that is none raises ValueError
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("https", "http") or not (url.isascii() and url.isprintable()) or " " in url:
        raise CDEnvironmentError(f"{url[:200]!a} is not an https address", "use an https:// address", "url")
    if "@" in parts.netloc:
        raise CDEnvironmentError(f"the address of {host} holds a user name or password", "leave them out", "url")
    if parts.scheme == "http" and not is_loopback(host):
        raise CDEnvironmentError(f"{url} is not https", "use the https:// address", "url")


def url_opener(url: str) -> Any:
    """Return an opener whose redirects stay on https; proxies from the environment serve other machines only."""
    from urllib.parse import urlsplit
    from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

    class SafeRedirects(HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            check_url(newurl)
            if req.full_url.startswith("https:") and not newurl.startswith("https:"):
                raise CDEnvironmentError(f"{req.full_url} redirects to an address that is not https", code="url")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    local = is_loopback(urlsplit(url).hostname or "")
    return build_opener(SafeRedirects, *([ProxyHandler({})] if local else []))


def download(
    url: str, limit: int, timeout: float = 30.0, seconds: float = 3600.0, tell: Progress = no_progress
) -> Iterator[bytes]:
    """Yield the bytes at an https URL, in pieces; a busy server is asked again, and a broken transfer begins anew.

    `limit` is in bytes; `timeout` the seconds without a byte that end one try, `seconds` the time for all of it; `tell`
    hears of progress once a second. Raises CDEnvironmentError with code "url" (refused address), "network" (down, too
    slow, broken), "too-big", or "http-404" and the like.
    """
    from http.client import HTTPException
    from urllib.request import Request

    check_url(url)
    request = Request(url, headers={"User-Agent": USER_AGENT, "Accept": "*/*"})  # noqa: S310 (check_url has seen it)
    deadline, told, received, whole = time.monotonic() + seconds, time.monotonic(), 0, None
    for delay in (*RETRY_DELAYS, None):
        try:
            opening = begin(lambda: url_opener(url).open(request, timeout=timeout))
            reply = opening(min(deadline, time.monotonic() + timeout))
            read = partial(reply.read1, CHUNK)  # never closed but dropped: to close waits for a reading that hangs
            if received and whole != (reply.length, reply.headers.get("ETag")):
                message = f"{url} changed while it was downloaded"
                raise CDEnvironmentError(message, "run the command again", "network")
            whole, skip = (reply.length, reply.headers.get("ETag")), received  # what was handed on comes again
            while piece := begin(read)(min(deadline, time.monotonic() + timeout)):
                fresh, skip = piece[skip:], max(0, skip - len(piece))
                received += len(fresh)
                if max(received, whole[0] or 0) > limit:
                    raise CDEnvironmentError(f"{url} is larger than {limit // MEGABYTE or 1} MB", code="too-big")
                if time.monotonic() - told >= 1.0:
                    told, size = time.monotonic(), f" of {whole[0] / MEGABYTE:.1f}" if whole[0] else ""
                    tell(f"downloaded {received / MEGABYTE:.1f}{size} MB")
                yield fresh
            if received < (whole[0] or 0):
                raise ConnectionResetError("the connection broke off")
            return
        except (OSError, HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise CDEnvironmentError(f"the download of {url} took too long", code="network") from None
            pause = pause_after(url, error, delay)
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))


def pause_after(url: str, error: Exception, delay: Optional[float]) -> float:
    """Return the seconds to wait before a download is tried again. Raises CDEnvironmentError when it is not."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import urlsplit

    if isinstance(error, HTTPError):
        if error.code not in PASSING_ANSWERS or delay is None:
            refusal = CDEnvironmentError(f"{url} answered {error.code} {error.reason}", code=f"http-{error.code}")
            with suppress(OSError, HTTPException):
                refusal.body = begin(partial(error.read, 4096))(time.monotonic() + 2.0).decode("utf-8", "replace")
            raise refusal from None
        asked = error.headers.get("Retry-After", "")
        delay = max(delay, float(asked) if asked.isdecimal() else 0.0)
        if delay > LONGEST_RETRY_AFTER:
            message = f"{url} asks to wait for {delay:.0f} seconds"
            raise CDEnvironmentError(message, "run the command again later", "network") from None
    host, reason = urlsplit(url).hostname, getattr(error, "reason", None) or error
    words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        message = f"the TLS certificate of {host} cannot be verified: {words}"
        hint = "update the machine's certificates, or set SSL_CERT_FILE"
        raise CDEnvironmentError(message, hint, "network") from None
    if delay is None or isinstance(error, ValueError):  # a host that can be no name, for one
        hint = "check the network (and https_proxy), then run the command again"
        raise CDEnvironmentError(f"cannot reach {host}: {words}", hint, "network") from None
    return delay


def fetch_json(url: str, limit: int = 16 * MEGABYTE) -> Any:
    """Return the JSON document at a URL. Raises CDEnvironmentError as download does, "network" when it is no JSON."""
    try:
        answer = json.loads(b"".join(download(url, limit, seconds=300.0)))
        json.dumps(answer, ensure_ascii=False).encode()  # halves of letters, which no file and no terminal takes
        return answer
    except (ValueError, RecursionError):
        raise CDEnvironmentError(f"{url} answered something that is not JSON", code="network") from None


def is_reachable(url: str) -> bool:
    """Tell whether a server answers at a URL, whatever it says."""
    try:
        for _ in download(url, MEGABYTE, seconds=5.0):
            break
    except CDEnvironmentError as error:
        return error.code != "network"
    return True


def notify_engine(words: str) -> None:
    """Tell the engine that started us what has become true, as sd_notify(3) has it; it is no error if nobody hears."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with suppress(OSError), socket.socket(getattr(socket, "AF_UNIX"), socket.SOCK_DGRAM) as sender:  # noqa: B009
            sender.settimeout(1.0)
            sender.sendto(words.encode(), re.sub("^@", "\0", address))


# ====================================================================================================================
# 6. Files
# Alone replaces, renames and deletes.

LOG_LIMIT = 10 * MEGABYTE
BLOCK = 1 << 16  # bytes; what a pipe of Linux holds, so that reader and writer work side by side
LOG_HEAD = 160  # bytes: the session header, which tells one log from another
LEFTOVER_AGE = 60.0  # seconds; a writer needs milliseconds
IN_USE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY)  # may be gone once what uses a file has ended


def make_folder(path: str) -> None:
    os.makedirs(path, exist_ok=True)


def write_atomic(path: str, data: bytes, mode: int = 0o600, owner: Optional[int] = None) -> None:
    """Replace the file at `path` by `data`, whole or not at all, also through a power cut. Raises OSError."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            if owner is not None:
                with suppress(OSError):  # who is not root can give nothing, and some file systems know no owners
                    give_to(file.fileno(), owner, -1)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):  # it names the temporary file, or on a full disk none
            error.filename, error.filename2 = path, None
        raise
    with suppress(OSError):  # Windows opens no folders, some network file systems sync none; the file itself is synced
        handle = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def speaker_of(path: str, owner: int) -> Optional[int]:
    """Return for whose processes a file of `owner` speaks: None on a system without users.

    Some file systems (vfat, cifs, drvfs) give all files one owner. There, where a file that we just made is not ours
    either, ownership says nothing, and it speaks for our own.
    """
    user: Optional[int] = own_user()
    if user is None or owner == user:
        return user
    trial = temporary_name(path)
    with suppress(OSError), open_regular(trial, "xb") as file:
        owner = owner if os.fstat(file.fileno()).st_uid == user else user
        os.unlink(trial)
    return owner


def temporary_name(path: str) -> str:
    """Return a new name beside `path`, which `sweep_leftovers` knows."""
    return f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"


def sweep_leftovers(path: str) -> None:
    """Remove what killed writers left: of a file, for the holder of its lock; in a folder, what is old enough."""
    is_folder = os.path.isdir(path)
    folder, name = (path, "") if is_folder else os.path.split(path)
    newest = time.time() - LEFTOVER_AGE if is_folder else float("inf")
    for entry in os.listdir(folder):
        draft = os.path.join(folder, entry)
        with suppress(OSError):
            is_ours = entry.startswith(name) and re.search(r"\.\d+-[0-9a-f]{8}\.tmp$", entry)
            if is_ours and os.lstat(draft).st_mtime < newest:
                os.unlink(draft)


def again_while_busy(action: Callable[[], object], seconds: float) -> None:
    """Do something with files, again while they are in use (by Windows' virus scanners). Raises the last OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            action()
            return
        except OSError as error:
            if time.monotonic() >= deadline or error.errno not in IN_USE:
                raise
        time.sleep(0.05)


def replace_file(source: str, target: str, seconds: float = 2.0) -> None:
    """os.replace, tried again for `seconds` while Windows says that a reader has the target open."""
    again_while_busy(lambda: os.replace(source, target), seconds if FILES_ARE_LOCKED_IN_USE else 0.0)


def retry_while_busy(action: Callable[[], object], path: str) -> None:
    """Do something with a file or folder, again for a second. Raises CDEnvironmentError ("in-use" or "failed")."""
    try:
        again_while_busy(action, 1.0)
    except OSError as error:
        told = ("stop what uses it, then run the command again", "in-use") if error.errno in IN_USE else ("", "failed")
        raise CDEnvironmentError(f"{path} cannot be changed: {error.strerror or error}", *told) from error


def remove_file(path: str) -> None:
    """Remove a file; that it is not there is no error. Raises OSError otherwise."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EROFS or os.path.lexists(path):  # a read-only disk refuses before it looks
            raise


def set_aside(path: str) -> None:
    """Keep a damaged file under `<path>.damaged` instead of losing it."""
    replace_file(path, path + ".damaged")


def read_file(path: str, limit: int = 16 * MEGABYTE) -> Optional[bytes]:
    """Return a small file, None where there is none. Raises OSError, for a link and a large one (EFBIG), too."""
    try:
        with open_regular(path) as file:
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)  # so much memory is asked for
    except FileNotFoundError:
        return None
    if len(data) > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return data


NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}

# Where a lock that is free is nobody's. On all else, a network's above all, one of another machine may not show.
LOCAL_FILE_SYSTEMS = frozenset("ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs tmpfs overlay".split())


def file_system_of(path: str) -> str:
    """Return the type of the file system that holds a path, "" where it is not told."""
    place, longest, found = os.path.join(os.path.realpath(path), ""), "", ""
    for point, kind in mounts():  # of two at one point the last one shows
        point = os.path.join(point, "")
        if place.startswith(point) and len(point) >= len(longest):
            longest, found = point, kind
    return found


@contextmanager
def locked(path: str, seconds: float, purpose: str, handed_on: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, waiting up to `seconds` for it.

    The lock is the system's and ends with its holder, so the file is never deleted and never stale; its text only tells
    others who holds it. One that is `handed_on` is held by the commands that we run meanwhile, too: one that outlives
    us is waited for by the next comer, and then ended. Raises CDEnvironmentError: code "locked", naming the holder, or
    "no-locks" where the file system has none.
    """
    try:
        lock = until(lambda: take_lock(path), seconds)
        if lock is None and end_orphan_at(path):
            lock = until(lambda: take_lock(path), 10.0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        kind = file_system_of(path) or error.strerror
        message = f"{path} cannot be locked: its file system ({kind}) has no locks."
        hint = "keep the workspace on a local disk: --workspace DIR, or set COMFYDOCK_HOME"
        raise CDEnvironmentError(message, hint, "no-locks") from error
    if lock is None:
        raise _locked_out(path)
    with lock:
        _sign(lock, purpose)
        if handed_on:
            HANDED_ON[lock.fileno()] = lambda pid, cmd: _sign(lock, purpose, pid, cmd)
        try:
            yield
        finally:
            if handed_on:
                del HANDED_ON[lock.fileno()]
                with suppress(OSError):
                    unlock_handle(lock.fileno())  # what a command that has ended left behind holds nothing


def _sign(lock: "BinaryIO", purpose: str, pid: int = 0, cmd: Optional[list[str]] = None) -> None:
    text = f"{os.getpid()} {purpose}"
    if cmd is not None:
        identity = identity_of(process_table().process(pid))
        text += "\n" + json.dumps({"pid": pid, "identity": identity, "command": cmd})
    with suppress(OSError):  # a full disk must not keep anyone from stopping ComfyUI
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), text.encode("utf-8", "backslashreplace"))


def holder_of(path: str) -> "tuple[Optional[Process], str, str]":
    """Return (who has a lock file open, the purpose if it is who signed it, what the text says of a command).

    Who signed it, if he still has it, else another; None where that is hidden.
    """
    try:
        line, _, command = (read_file(path) or b"").decode("utf-8", "replace").partition("\n")
    except (OSError, ValueError):
        line = command = ""
    signer, _, purpose = line.partition(" ")
    signed_by = holder = int(signer) if signer.isascii() and signer.isdigit() else 0
    with suppress(OSError):
        inode, name = str(os.stat(path).st_ino), os.path.basename(path)
        if is_usable("proc"):
            openers = [pid for pid in process_table().pids() if inode in opened_inodes(pid, name)]
            holder = holder if holder in openers else next(iter(openers), 0)
    process = process_table().process(holder) if is_pid(holder) else None
    return process, purpose if process is not None and process.pid == signed_by else "", command


def end_orphan_at(path: str) -> bool:
    """End the command that a lock file names, if it has outlived who ran it; tell whether there was one."""
    _, purpose, text = holder_of(path)
    try:
        noted: Any = None if purpose else json.loads(text)
        orphan = recorded_process(noted, speaker_of(path, os.stat(path).st_uid))
        is_it = orphan is not None and orphan.command == noted["command"]
    except (ValueError, TypeError, AttributeError, KeyError, OSError):
        return False
    for process in process_tree(orphan, None) if orphan is not None and is_it else []:
        with suppress(OSError):
            signal_same(process, "kill")
    return is_it


def is_held(path: str) -> bool:
    """Tell whether somebody holds the lock file at `path` now."""
    with suppress(OSError), open_regular(path, "r+b") as lock:
        return not lock_handle(lock.fileno())
    return False


def take_lock(path: str) -> "Optional[BinaryIO]":
    """Return the lock file at `path`, made if need be and locked; None while another has it."""
    try:
        lock = open_regular(path, "ab")
    except FileNotFoundError:
        raise CDEnvironmentError(f"{os.path.dirname(path)} is no longer there.", code="unknown") from None
    except OSError:
        if not os.path.exists(path):
            raise
        lock = open_regular(path, "rb")  # enough to lock: ComfyUI on a read-only disk must be stoppable, too
    try:
        # Who waited for one that was deleted meanwhile opens the next one.
        if lock_handle(lock.fileno()) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            return lock
    except FileNotFoundError:
        pass
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def _locked_out(path: str) -> CDEnvironmentError:
    holder, purpose, _ = holder_of(path)
    who, hint, state = "Another comfydock command", "wait until it is done, then try again", ""
    if holder is not None and purpose:
        who += f" ('comfydock {purpose}', PID {holder.pid})"
    elif holder is not None:
        who = f"Another program ({holder.name}, PID {holder.pid})"
    if holder is not None and holder.state == "stopped":
        state, hint = " and stands still", f"continue it: kill -CONT {holder.pid}"
    return CDEnvironmentError(f"{who} is busy here{state}.", hint, "locked")


def rotate_at_start(path: str, limit: int = LOG_LIMIT) -> None:
    """Move a log over `limit` bytes to `.old`. A start never fails for rotation, so nothing is raised."""
    with suppress(OSError):
        if os.lstat(path).st_size > limit:
            move_log(path, None)


def old_logs(path: str) -> list[str]:
    """Return the rotated logs that are there, oldest first."""
    first, folder = os.path.basename(rotated(path)), os.path.dirname(path)
    ends = [name[len(first) :] for name in os.listdir(folder) if name.startswith(first)] if is_there(folder) else []
    numbers = [int(end[1:] or 1) for end in ends if re.fullmatch(r"(\.([2-9]|[1-9]\d+))?", end, re.ASCII)]
    return [rotated(path, number) for number in sorted(numbers, reverse=True)]


def shift_old_logs(path: str, keep: Optional[int]) -> None:
    """Make room for a new `.old`: each older log moves one place on, and all but `keep` go (None: as many stay)."""
    present = old_logs(path)
    surplus = max(0, len(present) - (max(1, len(present)) if keep is None else keep) + 1)
    for old in present[:surplus]:
        remove_file(old)
    for old in present[surplus:]:
        replace_file(old, rotated(path, int(old[len(rotated(path)) + 1 :] or 1) + 1))


def copy_log(path: str, target: str, start: int, spare: int) -> int:
    """Append the log from `start` on to `target` until less than `spare` bytes are left; return how far it came."""
    with open_regular(path, "rb") as source, open_regular(target, "ab") as sink:
        source.seek(start)
        while os.fstat(source.fileno()).st_size - source.tell() > spare:
            sink.write(source.read(1 << 20))
        sink.flush()
        os.fsync(sink.fileno())
        return source.tell()


def same_beginning(one: str, other: str) -> bool:
    """Tell whether two logs begin with the same header."""
    with suppress(FileNotFoundError), open_regular(one, "rb") as first, open_regular(other, "rb") as second:
        return first.read(LOG_HEAD) == second.read(LOG_HEAD)
    return False


def empty_log(path: str) -> None:
    with open_regular(path, "r+b") as log:
        log.truncate(0)


def move_log(path: str, keep: Optional[int]) -> None:
    """Make a log that nobody of ours writes to the newest old one; of those `keep` stay. Raises OSError."""
    shift_old_logs(path, keep)
    try:
        os.replace(path, rotated(path))
    except PermissionError:
        if not FILES_ARE_LOCKED_IN_USE:
            raise
        copy_log(path, rotated(path), 0, spare=0)
        empty_log(path)


def begin_session(path: str, run_id: Optional[str], environment: str) -> "tuple[BinaryIO, int, int]":
    """Return the log opened for appending, the session header written: (file, offset of the header, inode)."""
    header = f"{SESSION_MARK}{run_id or ''} {utc_now()} environment {environment}, comfydock {__version__} ===\n"
    make_folder(os.path.dirname(path))
    log = open_append(path)
    try:
        with open_regular(path, "rb") as before:
            size = before.seek(0, os.SEEK_END)
            before.seek(max(0, size - 1))
            gap = b"" if before.read(1) in (b"", b"\n") else b"\n"
        log.write(gap + header.encode())
        log.flush()
        return log, size + len(gap), os.fstat(log.fileno()).st_ino
    except BaseException as error:
        log.close()
        if isinstance(error, OSError):  # a full disk names no file
            error.filename = path
        raise


def blocks_from_end(file: "BinaryIO", end: int, floor: int = 0) -> "Iterator[tuple[int, bytes]]":
    """Yield the blocks of a file between two offsets, the last one first, each with where it begins."""
    while end > floor:
        start = max(floor, end - BLOCK)
        file.seek(start)
        yield start, file.read(end - start)
        end = start


def last_lines_offset(file: "BinaryIO", count: int, floor: int, end: int) -> tuple[int, int]:
    """Return where the last `count` lines before `end` begin, not before `floor`, and how many lines that are."""
    if count <= 0 or end <= floor:
        return end, 0
    found = 0
    for start, block in blocks_from_end(file, end, floor):
        stop = len(block) - (start + len(block) == end and block.endswith(b"\n"))
        while (stop := block.rfind(b"\n", 0, stop)) >= 0:
            found += 1
            if found == count:
                return start + stop + 1, count
    return floor, found + 1


def find_session(file: "BinaryIO", end: int) -> int:
    """Return where the last session header before `end` begins, 0 when there is none."""
    mark, after = b"\n" + SESSION_MARK.encode(), b""
    for start, block in blocks_from_end(file, end):
        at = (block + after).rfind(mark)
        if at >= 0:
            return start + at + 1
        after = block[: len(mark)]
    return 0


def log_size(path: str) -> int:
    """Return the size of a log in bytes, 0 where there is none. Raises OSError where one may not look."""
    return os.lstat(path).st_size if is_there(path) else 0


def file_mark(path: str) -> str:
    """Return size and time of a file, which change with its content; "" where there is none."""
    with suppress(OSError):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    return ""


class LogFollower:
    """Hands on what is appended to a log, each byte once, through every kind of rotation.

    `position` is the offset of the next byte. `head` is how the log begins: each begins with a header of its own, so
    another beginning means that the log was rotated, and what was not yet read of the former one is in an old log.
    `exhausted` is the mark of the log (file_mark) in which there was nothing new.
    """

    def __init__(self, path: str, position: int) -> None:
        self.path = path
        self.position = position
        self.head = b""
        self.exhausted = ""

    def read(self) -> bytes:
        """Return what is new, at most 1 MiB; b"" when there is nothing. Raises OSError."""
        mark = file_mark(self.path)
        if mark and mark == self.exhausted:
            return b""
        try:
            head, piece = self._look_into(self.path)
            if piece is None:
                return self._rest_of_former(head)
        except FileNotFoundError:  # the old ones, too, while they are being shifted
            return b""
        except PermissionError:
            if not FILES_ARE_LOCKED_IN_USE:
                raise
            return b""  # Windows, in the moment of a rotation
        self.head = head
        self.position += len(piece)
        self.exhausted = "" if piece else mark
        return piece

    def _look_into(self, path: str) -> tuple[bytes, Optional[bytes]]:
        """Return how a log begins, and what follows `position` in it; None where it is not the one that is followed."""
        with open_regular(path, buffering=0) as log:
            head = self._head_of(log)
            if not head.startswith(self.head):
                return head, None
            log.seek(self.position)
            piece = log.read(1 << 20)
            return head, piece if self._head_of(log).startswith(self.head) else b""  # rotated between the two

    def _rest_of_former(self, head: bytes) -> bytes:
        """Return what the former log had after `position`; when that was all, the log after it is followed."""
        after, newest = head, file_mark(rotated(self.path))
        for path in reversed(old_logs(self.path)):  # from the newest on; `after` is how the one that came later begins
            its_head, piece = self._look_into(path)
            if piece:
                self.position += len(piece)
                return piece
            if piece is not None:
                head = after
                break
            after = its_head
        else:
            if newest != file_mark(rotated(self.path)):
                return b""  # rotated meanwhile
        if head:
            self.head, self.position = head, 0
        return b""

    def _head_of(self, log: "BinaryIO") -> bytes:
        log.seek(0)
        return log.read(LOG_HEAD)


def is_link(path: str) -> bool:
    """Tell whether a path is a symbolic link, or a Windows junction, which os.path.islink does not know."""
    with suppress(OSError):
        mount_point = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT, what a junction carries
        return os.path.islink(path) or getattr(os.lstat(path), "st_reparse_tag", 0) == mount_point
    return False


def remove_empty(path: str) -> None:
    """Delete a folder if there is nothing in it."""
    with suppress(OSError):
        os.rmdir(path)


def refuse_existing(path: str) -> None:
    """Raise CDEnvironmentError (code "exists") when something stands where a thing is to be put."""
    if os.path.lexists(path):
        raise CDEnvironmentError(f"{path} already exists", "move it away, then run the command again", "exists")


def move(source: str, target: str, scratch: Optional[str] = None) -> None:
    """Rename; to another disk copy, and then delete. Raises CDEnvironmentError: the target exists, a file is in use.

    A container's overlay file system is another disk in this: it renames no folder that comes from the image (EXDEV).
    The target is whole as soon as it is there; until then the copy is in `scratch`, a folder on the target's disk, by
    default its own.
    """
    refuse_existing(target)
    refuse_mounts(source)
    try:
        retry_while_busy(lambda: os.rename(source, target), source)
    except CDEnvironmentError as error:
        if getattr(error.__cause__, "errno", None) != errno.EXDEV:
            raise
        copy = temporary_name(os.path.join(scratch or os.path.dirname(target), os.path.basename(target)))
        try:
            copy_any(source, copy)
            if hasattr(os, "sync"):
                os.sync()  # the copy is on the disk before the original goes
            os.rename(copy, target)
        finally:
            remove_tree(copy)
        remove_tree(source)


def remove_tree(path: str) -> None:
    """Delete a folder and all in it; links and junctions are deleted, never followed; nothing there is fine.

    Raises CDEnvironmentError: "in-use" when a file cannot be deleted; "mounted", before anything is gone, when there is
    a mount inside, as a volume with somebody's models must not be emptied.
    """
    import shutil

    def remove() -> None:
        if is_link(path) or not os.path.isdir(path):
            remove_file(path)
        elif sys.version_info >= (3, 12):
            shutil.rmtree(path, onexc=partial(unlock_and_retry, path))  # novm
        else:
            shutil.rmtree(path, onerror=lambda work, inner, trouble: unlock_and_retry(path, work, inner, trouble[1]))

    refuse_mounts(path)
    retry_while_busy(remove, path)


def unlock_and_retry(top: str, function: Callable[..., Any], path: str, trouble: BaseException) -> None:
    """For shutil.rmtree of `top`: Windows deletes no read-only file (git's objects); others look at its folder."""
    if isinstance(trouble, FileNotFoundError):
        return
    if is_link(path) or not isinstance(trouble, PermissionError):
        raise trouble
    for place in (os.path.dirname(path), path) if path != top else (path,):
        os.chmod(place, stat.S_IRWXU if os.path.isdir(place) else stat.S_IRUSR | stat.S_IWUSR)
    if function not in (os.unlink, os.rmdir):  # listing was refused: the caller's next round walks it again
        raise trouble
    function(path)


def refuse_mounts(path: str) -> None:
    """Raise CDEnvironmentError (code "mounted") when a mount is at a path or below: somebody's volume or bind mount."""
    if is_link(path) or not os.path.lexists(path):
        return
    top = os.path.join(os.path.realpath(path), "")
    points = [point for point, _ in mounts()] or [place for place, _, _ in os.walk(top) if os.path.ismount(place)]
    for point in points:
        if os.path.join(point, "").startswith(top):
            raise CDEnvironmentError(f"{point} is mounted there, so nothing was changed", f"umount {point}", "mounted")


def move_aside(path: str, shelf: str, name: str) -> str:
    """Move a file or folder to `shelf`/<UTC time>/`name` and return that path; the shelf may be on another disk."""
    stamp = os.path.join(shelf, time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
    place, number = stamp, 1
    while os.path.lexists(os.path.join(place, name)):
        number += 1
        place = f"{stamp}-{number}"
    make_folder(place)
    move(path, os.path.join(place, name))
    return os.path.join(place, name)


def link_folder(folder: str, link: str) -> None:
    """Make `link` show what is in `folder`, as a link or a junction. Raises CDEnvironmentError where it cannot."""
    from importlib import import_module

    refuse_existing(link)
    try:
        os.symlink(folder, link, target_is_directory=True)
    except OSError as error:  # Windows without the right to make one
        try:
            import_module("_winapi").CreateJunction(folder, link)
        except (ImportError, OSError):
            raise CDEnvironmentError(f"cannot make the link {link}: {error.strerror}") from error


def copy_any(source: str, target: str, **options: Any) -> None:
    """Copy a file, or a folder (by shutil.copytree's `options`), links as links. Raises CDEnvironmentError, OSError."""
    import shutil

    if is_link(source) or not os.path.isdir(source):
        shutil.copy2(source, target, follow_symlinks=False)
        return
    if os.path.realpath(target).startswith(os.path.join(os.path.realpath(source), "")):
        raise CDEnvironmentError(f"{source} cannot be copied into itself ({target})", "name another folder", "usage")
    try:
        shutil.copytree(source, target, symlinks=True, **options)
    except shutil.Error as error:  # it holds all that went wrong, as (source, target, reason)
        path, _, reason = error.args[0][0]
        raise CDEnvironmentError(f"{path} cannot be copied: {reason}") from error


def link_tree(source: str, target: str, copied: int = 0) -> None:
    """Make a folder a second time out of hard links, and of copies for files of up to `copied` bytes.

    Where the disk has no hard links all is copied. Raises CDEnvironmentError ("disk-full" before it is), OSError.
    """
    import shutil

    @cache
    def require_room() -> None:
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
        needed, free = sum(os.lstat(path).st_size for path in paths), shutil.disk_usage(os.path.dirname(target)).free
        if needed > free:
            message = f"{source} cannot be kept: {needed // MEGABYTE} MB are needed, {free // MEGABYTE} MB are free."
            raise CDEnvironmentError(message, "make room on that disk", "disk-full")

    def link_or_copy(path: str, place: str) -> None:
        if os.path.getsize(path) > copied:
            try:
                return os.link(path, place)
            except OSError:  # FAT has none, a file may have too many
                require_room()
        shutil.copy2(path, place)

    remove_tree(target)
    make_folder(os.path.dirname(target))
    copy_any(source, target, copy_function=link_or_copy)


def carry_over(old: str, new: str, known: set[str]) -> list[str]:
    """Give a folder's successor the files that are not `known`; return those in whose place it has its own.

    By hard link, as they may be gigabytes. Names are relative, with /; links count as files, and are not followed; the
    folder's .git and any __pycache__ stay behind.
    """
    import shutil

    taken, top = [], os.path.realpath(new)
    for here, folders, files in os.walk(old):
        links = [name for name in folders if is_link(os.path.join(here, name))]
        hidden = {*links, "__pycache__", ".git" if here == old else ""}
        folders[:] = [name for name in folders if name not in hidden]
        for source in [os.path.join(here, name) for name in files + links]:
            name = os.path.relpath(source, old)
            target, folder = os.path.join(top, name), os.path.dirname(os.path.join(top, name))
            if name.replace(os.sep, "/") in known:
                continue
            try:
                if os.path.lexists(target) or os.path.realpath(folder) != folder:  # never through a link of the new one
                    raise FileExistsError
                make_folder(folder)
            except (FileExistsError, NotADirectoryError):  # it has a file where a folder was
                taken.append(name)
                continue
            try:
                os.link(source, target, follow_symlinks=False)
            except (OSError, NotImplementedError):  # a file system without hard links
                shutil.copy2(source, target, follow_symlinks=False)
    return taken


def file_digest(path: str) -> str:
    """Return the sha256 of a file, in hex; of a link, of where it points."""
    import hashlib

    digest = hashlib.sha256()
    if is_link(path):
        digest.update(os.fsencode(os.readlink(path)))
    else:
        with open(path, "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
    return digest.hexdigest()


CODE_LIMIT = 2048 * MEGABYTE  # of an archive of ComfyUI or of a node, as sent
UNPACKED_LIMIT = 8192 * MEGABYTE
MOST_MEMBERS = 100_000  # of an archive; ComfyUI has about 1,000
DIRECTORY_LIMIT = 16 * MEGABYTE  # of an archive's list of its members


class BoundedReads(io.FileIO):
    """A file for zipfile, which reads the list of an archive's members at once, however large it claims to be."""

    def read(self, size: Optional[int] = -1, /) -> Any:
        """Read as a file does. Raises ValueError for a list that is too large, in bytes or in members."""
        wanted = DIRECTORY_LIMIT if size is None or size < 0 else size
        data = super().read(wanted) if wanted <= DIRECTORY_LIMIT else b""
        if wanted > DIRECTORY_LIMIT or data.startswith(b"PK\1\2") and data.count(b"PK\1\2") > MOST_MEMBERS:
            raise ValueError(f"it has more than {MOST_MEMBERS} members")
        return data


def unpack(archive: str, folder: str, limit: int, strip: bool = False) -> list[str]:
    """Unpack a zip file into a new folder and return the relative paths of the files, with /.

    All members are judged before a byte is written; together they may have `limit` bytes. `strip` leaves out the one
    folder that all are in, as in GitHub's archives. Raises CDEnvironmentError (code "archive") for what is refused.
    """
    import shutil
    import zipfile

    try:
        with BoundedReads(archive) as file, zipfile.ZipFile(file) as opened:
            members = judged(opened.infolist(), limit)
            tops = {parts[0] for parts, _, _ in members}
            if strip and len(tops) == 1 and all(is_folder or parts[1:] for parts, is_folder, _ in members):
                members = [(parts[1:], is_folder, info) for parts, is_folder, info in members if parts[1:]]
            make_folder(folder)
            for parts, is_folder, info in members:
                path = os.path.join(folder, *parts)
                make_folder(path if is_folder else os.path.dirname(path))
                if not is_folder:
                    with opened.open(info) as source, open(path, "wb") as target:
                        shutil.copyfileobj(source, target, CHUNK)
                    if info.external_attr >> 16 & 0o100:
                        os.chmod(path, 0o755)  # noqa: S103 (a program of the archive)
    except Exception as error:  # a damaged archive makes zipfile raise anything
        message = f"{archive} cannot be unpacked: {error}"
        raise CDEnvironmentError(message, "name a zip file, or run the command again", "archive") from error
    return ["/".join(parts) for parts, is_folder, _ in members if not is_folder]


def judged(infos: list[Any], limit: int) -> "list[tuple[list[str], bool, Any]]":
    """Return (path as parts, whether it is a folder, ZipInfo) of each member. Raises ValueError for what is refused."""
    members = []
    for info in infos:
        parts, kind = member_parts(info.orig_filename), stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1 or info.compress_type not in (0, 8):
            raise ValueError(f"{info.orig_filename[:120]!a} is a link, a device, encrypted or packed in an odd way")
        if parts:
            members.append((parts, info.orig_filename.endswith(("/", "\\")), info))
    if sum(info.file_size for info in infos) > limit:
        raise ValueError(f"unpacked it has more than {limit // MEGABYTE} MB")
    files = {tuple(parts) for parts, is_folder, _ in members if not is_folder}
    for parts, is_folder, info in members:
        if any(tuple(parts[:length]) in files for length in range(1, len(parts) + is_folder)):
            raise ValueError(f"{info.orig_filename[:120]!a} is inside of a file, or a file and a folder")
    return members


def member_parts(name: str) -> list[str]:
    r"""Return the parts of a member's path. Raises ValueError for one that could lead out of the folder.

    Backslashes separate on Windows, a colon names a drive or a stream there, and trailing dots and spaces are dropped
    there, so that "..  " is "..": refused everywhere, so that an archive does the same on every machine.
    """
    path, refusal = name.replace("\\", "/"), ""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or any(not part.rstrip(" .") for part in parts):
        refusal = "would be written outside of its folder"
    elif ":" in path or has_control(path):
        refusal = "has a drive letter or a control character"
    elif len(path) > 4096 or any(len(part.encode()) > 255 for part in parts):  # PATH_MAX and NAME_MAX of Linux
        refusal = "is too long a name for every file system"
    if refusal:
        raise ValueError(f"{name[:120]!a} {refusal}")
    return parts


def unpack_from(source: str, folder: str, strip: bool = False, tell: Progress = no_progress) -> list[str]:
    """Unpack an archive: a path, or an address that is downloaded first. Raises CDEnvironmentError as both do."""
    if "://" not in source:
        if not os.path.isfile(source):
            raise CDEnvironmentError(f"{source} is not there", "name another archive", "not-found")
        return unpack(source, folder, UNPACKED_LIMIT, strip)
    archive = folder + ".archive"
    remove_file(archive)
    try:
        with open(archive, "xb") as file:
            file.writelines(download(source, CODE_LIMIT, tell=tell))
        return unpack(archive, folder, UNPACKED_LIMIT, strip)
    finally:
        remove_file(archive)


def has_control(text: str) -> bool:
    """Tell whether a name holds control characters, or bytes that are no text."""
    return re.search(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]", text) is not None


# ====================================================================================================================
# 7. The state file
# Alone reads and writes it; what is none reads as None, what is closed raises.


STATE_LIMIT = 64 * MEGABYTE  # bytes


def read_state(path: str) -> Optional[ProcessState]:
    """Return the record at `path`, None where none is: nothing, nonsense, a link, a folder. Raises OSError."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            data, owner = file.read(min(STATE_LIMIT, status.st_size) + 1), status.st_uid
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
            return None
        raise
    try:
        record = ProcessState.from_dict(json.loads(data.decode("utf-8")) if len(data) <= STATE_LIMIT else {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    record.owner = speaker_of(path, owner)
    return record


def write_state(path: str, state: ProcessState) -> None:
    """Write the record: atomic, synced, readable by its owner alone, who stays its owner. Raises OSError."""
    write_atomic(path, (json.dumps(state.to_dict(), indent=2) + "\n").encode("utf-8"), owner=state.owner)


def lives_elsewhere(record: ProcessState, path: str) -> bool:
    """Tell whether the process of a record, which is not found here, lives where we cannot look, or may live there.

    While it lives it holds the lock file at `path`. Nothing follows from a lock that is free where no lock is recorded,
    that very file is not there any more, the file system has no locks, or another machine may hold it.
    """
    place, is_free = locate(record.subject[1]), None
    if place != "here" and record.alive:
        with suppress(OSError), open_regular(path) as lock:
            if os.fstat(lock.fileno()).st_ino == record.alive.get("ino"):  # the device has another number at each mount
                is_free = lock_handle(lock.fileno(), shared=True)
    if is_free and place == "foreign" and file_system_of(path) not in LOCAL_FILE_SYSTEMS:
        is_free = None
    return is_free is False or is_free is None and place in ("beside", "foreign")


# ====================================================================================================================
# 8. Manifest, git and nodes
# Knows nothing of ComfyUI's process; who changes something holds the content lock.


COMFYUI_REPOSITORY = "https://github.com/Comfy-Org/ComfyUI.git"
REGISTRY_URL = "https://api.comfy.org"
TORCH_INDEX = "https://download.pytorch.org/whl/"
TORCH_PACKAGES = ["torch", "torchvision", "torchaudio"]
COPIED_SIZE = 4 * MEGABYTE  # larger files of nodes are kept as hard links: nothing writes into weights and packs of git
HELD_PACKAGES = (*TORCH_PACKAGES, "xformers", "triton", "numpy")
STAGING = ".comfydock.disabled"  # inside custom_nodes, so that renames stay on one disk; ComfyUI skips *.disabled
TRACKING = ".tracking"  # inside a registry node: the files of its archive, as ComfyUI-Manager writes them down
CNR_ID = ".cnr-id"  # inside a clone's .git: the id that the registry has for it, also by ComfyUI-Manager
NODE_RECORD = ".comfydock.json"  # what older versions wrote into a registry node: the digests of its files
GIT_SECONDS = 1800.0
INSTALL_SECONDS = 7200.0
COMMIT = r"[0-9a-f]{7,64}"


def read_any_text(path: str) -> str:
    """Return a text file, "" for none: UTF-8, UTF-16 with its mark (Windows editors), else as Windows has it."""
    path = os.path.realpath(path)
    data = (read_file(path) if os.path.isfile(path) else None) or b""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8-sig")
    return data.decode("cp1252", "replace")


def read_json(path: str) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads(read_file(path) or b"{}")
        return data if isinstance(data, dict) else {}
    return {}


# The manifest as text: TOML can be read with the standard library but not written, and the file is the user's; so the
# tables that are ours are replaced as text, and the result must parse to exactly what was meant before it is saved.

TOML_KEY = r'(?:"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|[A-Za-z0-9_-]+)'
TOML_NAME = rf"{TOML_KEY}(?:[ \t]*\.[ \t]*{TOML_KEY})*"
TOML_LINE = rf"^\ufeff?[ \t]*(?:(\[\[?)[ \t]*({TOML_NAME})[ \t]*\]|({TOML_NAME})[ \t]*=)"
TOML_STRING = r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'|#[^\n]*"
TOML_GAP = r"(?<=\n)(?:[ \t\r]*(?:#[^\n]*)?(?:\n|\Z))+\Z"  # blank lines and comments at the end
Name = tuple[str, ...]  # of a table or a pair, part by part


@dataclass
class Statement:
    """A table with its pairs, or a `key = value`, of a TOML text: its full name, and the offsets of its lines."""

    name: Name
    is_table: bool
    start: int
    end: int


def toml_statements(text: str) -> list[Statement]:
    """Return the statements of a TOML text, as far as patterns see them; a key with escapes is not understood."""
    plain = re.sub(TOML_STRING, lambda found: found[0].replace("\n", " "), text, flags=re.S)
    heads = list(re.finditer(TOML_LINE, plain, re.M))
    statements, table = [], Statement((), True, 0, 0)
    for head, stop in zip(heads, [*(after.start() for after in heads[1:]), len(text)]):
        keys = re.findall(TOML_KEY, head[2] or head[3])
        name = tuple(key[1:-1] if key[0] in "\"'" else key for key in keys)
        end = head.start() + len(re.sub(TOML_GAP, "", plain[head.start() : stop]))
        own = Statement(name if head[1] else table.name + name, bool(head[1]), head.start(), end)
        table = own if head[1] else table
        table.end = end
        statements.append(own)
    return statements


def toml_value(value: Any) -> str:
    """Return a string, number, boolean, date, list or dict as TOML on one line. JSON's strings are TOML strings."""
    if isinstance(value, dict):
        return "{ " + ", ".join(toml_lines(value)) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_lines(table: dict[str, Any], *header: str) -> list[str]:
    """Return the `key = value` lines of a table, without what is None, below the header that its name makes."""
    keys = {key: key if re.fullmatch("[A-Za-z0-9_-]+", key) else toml_value(key) for key in (*header, *table)}
    head = ["[" + ".".join(keys[part] for part in header) + "]"] if header else []
    return head + [f"{keys[key]} = {toml_value(value)}" for key, value in table.items() if value is not None]


def edited(text: str, name: Name, value: Any) -> str:
    """Return the text with a table (a dict) or a pair in its place, else beside its next of kin; None takes it out."""
    statements, is_table = toml_statements(text), isinstance(value, dict)
    own = [item for item in statements if item.name[: len(name)] == name]
    lines = toml_lines(value, *name) if is_table else toml_lines({name[-1]: value})
    if value is None:
        family = [item for item in statements if item.name[: len(name) - 1] == name[:-1]]
        # the last pair takes its table along
        own = family if own and [item.is_table for item in family] == [True, False] else own
        tables = [item for item in own if item.is_table]
        for item in own[::-1]:  # they may stand apart
            if item.is_table or not any(table.start <= item.start < table.end for table in tables):
                before = text[: item.start]
                before = re.sub(r"(\A|\n)\r?\n\Z", r"\1", before) if item.is_table else before
                text = before + text[item.end :]
        return text
    if own and [item.name for item in own if item.is_table] != [name] * is_table:
        return edited(edited(text, name, None), name, value)  # what was there was inline, or had sub-tables
    if own:
        start, end = own[0].start, own[-1].end
    else:
        tables = [item for item in statements if item.is_table] or statements
        home = [item.end for item in tables if item.name == name[:-1] and not is_table]
        kinship = [(len(os.path.commonprefix([item.name, name])), item.end) for item in tables]
        start = end = home[0] if home else max(kinship, default=(0, 0))[1]
        if not home:
            lines = [""] * bool(start) + (lines if is_table else toml_lines({name[-1]: value}, *name[:-1]))
    before, stop = text[:start], "\r\n" if "\r\n" in text else "\n"
    if start and before[-1] != "\n":
        before += stop
    return before + "".join(line + stop for line in lines) + text[end:]


def parse_toml(text: str, path: str, python: Optional[str] = None) -> dict[str, Any]:
    """Return the data of a TOML text at `path`, read by tomllib or pip's tomli, ours or that of a `python`.

    Raises CDEnvironmentError: code "manifest" with the line number when it is broken; "no-toml" when nothing reads it.
    """
    reader = toml_module(python)
    if reader is None:
        message = f"nothing here can read {path}: this Python is older than 3.11 and has no new pip"
        hint = f"use Python 3.11 or later, or: {sys.executable} -m pip install --upgrade pip"
        raise CDEnvironmentError(message, hint, "no-toml")
    try:
        text.encode()  # as manifest_text has it, what is not UTF-8 cannot be
        return dict(reader.loads(text.removeprefix("\ufeff")))
    except UnicodeEncodeError as error:
        line, reason = text.count("\n", 0, error.start), "not UTF-8"
    except (ValueError, RecursionError) as error:
        reason, _, place = str(error).partition(" (at line ")
        line = int(place.partition(",")[0]) - 1 if place else text.count("\n")
    raise CDEnvironmentError(f"{path} line {line + 1}: {reason}", "fix that line; the file was not changed", "manifest")


def toml_module(python: Optional[str]) -> Any:
    """Return tomllib, or the same reader in our pip, or in the one of a venv's Python; None where there is none."""
    from glob import escape, glob
    from importlib import import_module

    vendored = os.path.join(escape(os.path.dirname(os.path.dirname(python or "-"))), "[Ll]ib*", "**", "pip", "_vendor")
    for name in ("tomllib", "pip._vendor.tomli", "tomli"):
        folders = glob(vendored, recursive=True) if name == "tomli" else []
        sys.path[:0] = folders
        try:
            return import_module(name)
        except ImportError:
            continue
        finally:
            del sys.path[: len(folders)]
    return None


def part_of(table: Any, key: str, kind: Any = dict) -> Any:
    """Return what a table has under a key; an empty dict, or other `kind`, where it has no such thing."""
    found = table.get(key) if isinstance(table, dict) else None
    return found if isinstance(found, kind) else kind()


def texts_in(table: Any, key: str) -> list[str]:
    return [item for item in part_of(table, key, list) if isinstance(item, str)]


def info_from_table(key: str, table: dict[str, Any]) -> NodeInfo:
    """Return a node as its table has it; a field of the wrong type is left out."""
    info = NodeInfo(name=key)
    for name, usual in [*vars(info).items()]:
        value = table.get(name)
        if value and isinstance(value, str if usual is None else type(usual)):
            setattr(info, name, [str(item) for item in value] if isinstance(value, list) else value)
    return info


class Manifest:
    """What an environment's pyproject.toml says of it; what is of the wrong type reads as absent.

    `data` is the parsed file, `toml` its text. `settings` is the table of the tool that `tool` names: ours, or
    comfygit's, which has the same in it. `nodes` has the nodes by key (the registry id, else the name), `tables` their
    tables; `groups` are the dependency groups, `dependencies` those of [project], `constraints` those of [tool.uv].
    """

    def __init__(self, data: dict[str, Any], toml: str = "") -> None:
        self.toml, tools = toml, part_of(data, "tool")
        self.tool = "comfygit" if "comfygit" in tools and "comfydock" not in tools else "comfydock"
        self.settings, self.groups = part_of(tools, self.tool), part_of(data, "dependency-groups")
        self.dependencies = texts_in(data.get("project"), "dependencies")
        self.constraints = texts_in(tools.get("uv"), "constraint-dependencies")
        self.comfyui_path = self.text("comfyui_path")  # the checkout of an adopted environment, else None
        self.python_path = self.text("python_path")  # the interpreter of an adopted environment
        self.comfyui_version = self.text("comfyui_version")  # the tag, branch or commit that was asked for
        self.torch_backend = self.text("torch_backend")  # as asked for, such as "auto"
        self.models_path = self.text("models_path")  # the models folder that it shares with others
        self.demo = self.settings.get("demo") is True
        self.found_nodes = texts_in(self.settings, "found_nodes")  # there at the adoption
        nodes = part_of(self.settings, "nodes")
        self.tables: dict[str, dict[str, Any]] = {key: nodes[key] for key in nodes if isinstance(nodes[key], dict)}
        self.nodes = {key: info_from_table(key, table) for key, table in self.tables.items()}

    def text(self, name: str) -> Optional[str]:
        """Return a setting that is a text, neither empty nor with a NUL, which no path may hold; else None."""
        value = self.settings.get(name)
        return value if isinstance(value, str) and value and "\0" not in value else None

    def group_name(self, info: NodeInfo) -> str:
        """Return the name of a node's dependency group, as 1.0.x makes it: its name and 8 hex digits of its origin."""
        import hashlib

        digest = hashlib.sha256((info.repository or info.registry_id or info.name).encode()).hexdigest()[:8]
        plain = re.sub(r"[^a-z0-9]+", "-", info.name.lower()).strip("-") or "node"
        there = (name for name in self.groups if name.endswith(f"-{digest}"))  # whatever it begins with
        return next(there, f"{plain}-{digest}")

    def requirements(self, info: NodeInfo) -> list[str]:
        """Return the requirements that are written down for a node."""
        return texts_in(self.groups, self.group_name(info))


def read_manifest(paths: EnvironmentPaths, python: Optional[str] = None) -> Manifest:
    """Return an environment's manifest; run, stop, status and logs need no TOML reader, for there is JSON beside it.

    Raises CDEnvironmentError: code "manifest" when it cannot be read, or as parse_toml does with this `python`.
    """
    return manifest_of(manifest_text(paths), paths.manifest, paths.cache, python)


@lru_cache(1024)  # a command looks at it a dozen times: nobody changes it
def manifest_of(text: str, path: str, cache_path: str, python: Optional[str]) -> Manifest:
    cached = read_json(cache_path)
    if cached.get("toml") == text and "data" in cached:  # compared whole: hashlib takes longer to import than `status`
        return Manifest(part_of(cached, "data"), text)
    data = parse_toml(text, path, python)
    with suppress(OSError):  # a read-only workspace is read all the same
        write_atomic(cache_path, json.dumps({"toml": text, "data": data}, default=str).encode())
    return Manifest(data, text)


def last_known_manifest(paths: EnvironmentPaths) -> Manifest:
    """Return the manifest, or while it is broken what it last said: ComfyUI must be found and stopped all the same."""
    try:
        return read_manifest(paths)
    except CDEnvironmentError:
        return Manifest(part_of(read_json(paths.cache), "data"))


def manifest_text(paths: EnvironmentPaths) -> str:
    reason = "there is none"
    try:
        data = read_file(os.path.realpath(paths.manifest), 4 * MEGABYTE)  # the user's may be a link
        if data is not None:
            return data.decode(errors="surrogateescape")
    except OSError as error:
        reason = str(error.strerror)
    raise CDEnvironmentError(f"{paths.manifest} cannot be read: {reason}", ("list",), "manifest")


def change_manifest(
    paths: EnvironmentPaths, plan: "Callable[[Manifest], dict[Name, Any]]", python: Optional[str] = None
) -> None:
    """Make the changes that `plan` names, tables and pairs (None takes one out); every other byte stays.

    The file is replaced once it is sure that the text says what is meant and nothing else. Raises CDEnvironmentError
    (code "manifest") otherwise.
    """
    text = manifest_text(paths)
    data = parse_toml(text, paths.manifest, python)
    try:
        for name, value in plan(Manifest(data)).items():
            inner = data
            for part in name[:-1]:
                inner = inner.setdefault(part, {})
            if inner.get(name[-1]) != value:
                text, inner[name[-1]] = edited(text, name, value), {} if value is None else value
        is_meant = without_empty(parse_toml(text, paths.manifest, python)) == without_empty(data)
    except (ValueError, TypeError, AttributeError, CDEnvironmentError):  # a number where a table is meant, for one
        is_meant = False
    if not is_meant:
        message = f"{paths.manifest} is laid out in a way that cannot be changed piece by piece"
        raise CDEnvironmentError(message, "write each node as its own table [tool.comfydock.nodes.NAME]", "manifest")
    real = os.path.realpath(paths.manifest)
    write_atomic(real, text.encode(), os.stat(real).st_mode & 0o777)


def without_empty(table: dict[str, Any]) -> dict[str, Any]:
    inner = {key: without_empty(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in inner.items() if value != {}}


def change_node(
    paths: EnvironmentPaths, key: str, info: Optional[NodeInfo], needs: list[str], python: Optional[str] = None
) -> None:
    """Write what the manifest says of a node and its requirements; None takes it out. Raises as change_manifest."""

    def plan(manifest: Manifest) -> dict[Name, Any]:
        table, nodes = None, ("tool", manifest.tool, "nodes")
        groups: dict[str, Any] = {manifest.group_name(manifest.nodes[key]): None} if key in manifest.nodes else {}
        if info:
            groups[manifest.group_name(info)] = needs or None
            unknown = {name: one for name, one in manifest.tables.get(key, {}).items() if name not in vars(info)}
            table = {**{name: value for name, value in vars(info).items() if value}, **unknown}
        return {**{("dependency-groups", group): lines for group, lines in groups.items()}, (*nodes, key): table}

    change_manifest(paths, plan, python)


def change_settings(
    paths: EnvironmentPaths, settings: dict[str, Any], python: Optional[str] = None, needs: Optional[list[str]] = None
) -> None:
    """Write settings, None takes one out; `needs` are the dependencies of [project], None leaves them as they are."""
    more: dict[Name, Any] = {} if needs is None else {("project", "dependencies"): needs}
    change_manifest(
        paths, lambda one: {**{("tool", one.tool, name): settings[name] for name in settings}, **more}, python
    )


# Git

GIT_LOCAL = (  # what `git rev-parse --local-env-vars` lists: which repository, and its own settings
    "GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_CONFIG GIT_CONFIG_PARAMETERS GIT_CONFIG_COUNT GIT_OBJECT_DIRECTORY GIT_DIR "
    "GIT_WORK_TREE GIT_IMPLICIT_WORK_TREE GIT_GRAFT_FILE GIT_INDEX_FILE GIT_NO_REPLACE_OBJECTS GIT_REPLACE_REF_BASE "
    "GIT_PREFIX GIT_SHALLOW_FILE GIT_COMMON_DIR GIT_NAMESPACE"
).split()
NO_HOOKS = ["-c", f"core.hooksPath={os.devnull}", "-c", "core.fsmonitor=false"]  # no program of a repository or a user
LOOK = ["-c", "safe.directory=*"]  # for what runs nothing of a repository, whose ever it is


def git_path() -> Optional[str]:
    import shutil

    return shutil.which("git")


def scratch_folder() -> Any:
    """Return a context with an empty folder of ours: for files, and for programs that look for settings around them."""
    from tempfile import TemporaryDirectory

    options: dict[str, Any] = {"ignore_cleanup_errors": True} if sys.version_info >= (3, 10) else {}
    return TemporaryDirectory(prefix="comfydock-", **options)


def git(words: list[str], folder: Optional[str] = None, url: str = "") -> str:
    """Return what a git command prints; `folder` is a repository, `url` where it fetches from.

    It never asks. Raises CDEnvironmentError (code "git") with git's own last words when it fails.
    """
    program = git_path()
    if program is None:
        raise CDEnvironmentError("git is not installed", "install git, then run the command again", "missing")
    kept = {key: value for key, value in inherited_environment().items() if key not in GIT_LOCAL}
    # this also holds for redirects and submodules: one of an https repository cannot name a local path
    ways = "https:ssh" + (":http" if url.startswith("http://") else "" if url.startswith("https://") else ":file")
    ours = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GCM_INTERACTIVE": "never", "LC_ALL": "C"}
    with scratch_folder() as empty:
        ceiling = os.path.dirname(os.path.realpath(empty))
        environ = {**kept, **ours, "GIT_ALLOW_PROTOCOL": ways, "GIT_CEILING_DIRECTORIES": ceiling}
        if url and not url.startswith("http") and not is_local(url) and not {"GIT_SSH", "GIT_SSH_COMMAND"} & {*environ}:
            own = run_command([program, "config", "--get", "core.sshCommand"], empty, environ, 30.0).stdout.strip()
            environ["GIT_SSH_COMMAND"] = own or "ssh -oBatchMode=yes"  # the user's; never one of a repository
        done = run_command([program, *NO_HOOKS, *words], folder or empty, environ, GIT_SECONDS)
    if done.returncode == 0:
        return done.stdout.strip()
    message = f"git {words[0]} failed{f' for {url}' if url else ''}: {last_words(done)}"
    hint = "check the address and the network, then run the command again" if url else ""
    if "dubious ownership" in done.stderr and folder:
        message = f"git does not read {folder}: it belongs to another user"
        hint = f"git config --global --add safe.directory {quote(folder)}"
    raise CDEnvironmentError(message, hint, "git")


def git_answer(words: list[str], folder: str) -> Optional[str]:
    """Return what git prints about a folder that is itself a repository; None when it is none or git fails."""
    if os.path.lexists(os.path.join(folder, ".git")):
        with suppress(CDEnvironmentError):
            return git(words, folder)
    return None


def remote_of(folder: str) -> "tuple[str, Optional[str]]":
    """Return name and address, without secrets, of the repository that a clone is from; ("", None) for no clone."""
    if not os.path.lexists(os.path.join(folder, ".git")) or git_path() is None:
        return "", None
    git([*LOOK, "rev-parse", "--git-dir"], folder)  # raises when git refuses
    lines = (git_answer([*LOOK, "config", "--get-regexp", r"^remote\..*\.url$"], folder) or "").splitlines()
    remotes = {key[len("remote.") : -len(".url")]: url for key, _, url in (line.partition(" ") for line in lines)}
    name = "origin" if "origin" in remotes else next(iter(remotes), "")
    url = redact(remotes.get(name, ""))
    return name, (re.sub(r"[?#].*", "", url) if "://" in url else url) or None


def last_words(done: Any) -> str:
    """Return the lines of a failed command that say why: those marked as errors, else the last."""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    marked = [line for line in lines if line.lower().startswith(("error:", "fatal:", "\u00d7", "\u2570"))]
    return " / ".join((marked or lines[-1:])[:3]) or f"exit code {done.returncode}"


def check_repository(url: str) -> None:
    """Raise CDEnvironmentError (code "url") unless git may be given this: https, ssh, or a path on this machine.

    Options, transports that run programs ("ext::sh -c ..."), unencrypted ones and passwords are refused.
    """
    if re.match("https?://", url):
        return check_url(url)
    ssh = r"ssh://([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_\[][^/@\s]*/[^-]"
    known = re.match(rf"(?![A-Za-z][A-Za-z0-9+.-]*://)|file://|{ssh}", url)
    if not known or url.startswith("-") or "::" in url or not url.isprintable():
        hint = "use https://..., ssh://..., git@host:path or a folder"
        raise CDEnvironmentError(f"{url!r} is not a repository address that is used", hint, "url")


def check_reference(reference: str) -> None:
    """Raise CDEnvironmentError (code "url") unless this can be a branch, tag or commit, and nothing else."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,200}", reference) or ".." in reference:
        raise CDEnvironmentError(f"{reference!r} is not a branch, tag or commit", "name one like v1.2.3", "url")


def clone(url: str, reference: Optional[str], folder: str) -> None:
    """Clone a branch, tag or commit (None: the default branch) and submodules, shallow where that is enough."""
    check_repository(url)
    check_reference(reference or "HEAD")
    options, branch = ["--quiet", "--recurse-submodules", "--shallow-submodules"], f"--branch={reference}"
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", reference or ""):
        try:
            git(["clone", *options, "--depth=1", *[branch] * bool(reference), "--", url, folder], url=url)
            return
        except CDEnvironmentError:
            if not re.fullmatch(COMMIT, reference or ""):  # else it may be a short commit, or a branch 20250101
                raise
            remove_tree(folder)
    git(["clone", *options, "--no-checkout", "--filter=blob:none", "--", url, folder], url=url)
    git(["checkout", "--quiet", "--detach", str(reference), "--"], folder, url)
    git(["submodule", "--quiet", "update", "--init", "--recursive"], folder, url)


def remote_names(url: str, *what: str) -> list[str]:
    lines = git(["ls-remote", *what, "--refs", "--", url], url=url).splitlines()
    return [line.split("/", 2)[-1] for line in lines]


def newest_release(url: str) -> Optional[str]:
    """Return the highest vX.Y.Z tag of a repository, compared as versions; None when it has no such tag."""
    if git_path() is not None:
        tags = remote_names(url, "--tags")
    else:
        answer = fetch_json(f"https://api.github.com/repos/{github_name(url)}/releases/latest")
        tags = [str(answer.get("tag_name"))] if isinstance(answer, dict) else []
    return max((tag for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)), key=version_key, default=None)


def nearest_names(wanted: str, names: list[str]) -> list[str]:
    """Return up to five of the tags and branches that may have been meant, newest first; else the newest versions."""
    from difflib import get_close_matches

    near = get_close_matches(wanted, names, 5, 0.5) or [name for name in names if re.match(r"v?\d", name)]
    return sorted(near, key=version_key, reverse=True)[:5]


STAGES = {"dev": -4, "alpha": -3, "a": -3, "beta": -2, "b": -2, "preview": -1, "pre": -1, "rc": -1, "c": -1}
STAGE = rf"[-_.]?({'|'.join(STAGES)}|post|rev|r)[-_.]?(\d*)|-(\d+)"  # before a release, or after it
VERSION = rf"v?(?:(\d+)!)?(\d+(?:\.\d+)*)((?:{STAGE}){{0,3}})(?:\+.*)?"


def version_key(version: str) -> tuple[Any, ...]:
    """Return a sort key that compares versions as PEP 440 has it, others by their numbers: 9.1 is 9.1.0."""
    found = re.fullmatch(VERSION, version.strip().lower())
    epoch, numbers, rest = found.group(1, 2, 3) if found else ("", version, "")
    release = [int(number) for number in re.findall(r"\d{1,18}", numbers)]
    while release and not release[-1]:
        release.pop()
    stages = [(STAGES.get(word, 1), int((one or other or "0")[:18])) for word, one, other in re.findall(STAGE, rest)]
    return int((epoch or "0")[:18]), release, [*stages, (0, found is not None)]


def github_name(url: str) -> str:
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if found is None:
        hint = "install git, or use --source with an archive"
        raise CDEnvironmentError(f"{url} cannot be read without git", hint, "missing")
    return found[1]


def same_repository(*urls: Optional[str]) -> bool:
    plain = set()
    for url in urls:
        address = re.sub(r"^(?:ssh://)?[\w.-]+@([\w.-]+)[:/]", r"\1/", (url or "").strip())
        plain.add(re.sub(r"^[a-z+]+://", "", address).rstrip("/").removesuffix(".git").casefold())
    return all(urls) and len(plain) == 1


def is_local(url: str) -> bool:
    """Tell whether a repository address is a path on this machine: no scheme, and no HOST:PATH as ssh has it."""
    return "://" not in url and not re.match(r"[\w.-]+@[\w.-]+:|[\w.-]{2,}:(?!\\)", url)


def split_reference(identifier: str) -> tuple[str, Optional[str]]:
    """Return ADDRESS@REFERENCE in its parts. A browser's page means the repository, and what the page shows of it."""
    if is_local(identifier):
        url, mark, reference = identifier.rpartition("@")
        return (identifier, None) if os.path.isdir(identifier) or not mark else (url, reference)  # a real name has an @
    head = re.match(r"[A-Za-z+.-]+://[^/]*|[^/:]*:", identifier)
    start = head.end() if head else 0
    path, _, reference = identifier[start:].partition("@")
    view = r"(?:/-)?/(?:tree|commit|releases/tag|src/branch)/([^?#]+?)"
    page = re.fullmatch(rf"(/[^/]+/[^/?#]+?)(?:\.git)?(?:{view})?/?([?#].*)?", path)
    if page and identifier.startswith("http") and (page[2] or page[3]):
        path, reference = page[1], reference or page[2] or ""
    return identifier[:start] + path, reference or None


class GitManager:
    """The git repository of an environment's .cec folder: the history of its manifest."""

    GITIGNORE = "\n".join(["# ComfyUI process state (runtime only, not configuration)", *EnvironmentPaths.IGNORED, ""])

    def __init__(self, repo_path: str) -> None:
        self.repo_path = str(repo_path)
        self.ignore = os.path.join(self.repo_path, ".gitignore")
        self.git_folder = os.path.join(self.repo_path, ".git")  # of a worktree it is a file

    def initialize_environment_repo(self, message: str) -> bool:
        """Make the repository with .gitignore and a first commit. False, with .gitignore alone, without git."""
        if os.path.lexists(self.git_folder):  # it is not ours: it gets no commit, and its own files stay as they are
            self.hide_runtime_files()
            return False
        if not os.path.exists(self.ignore):
            write_atomic(self.ignore, self.GITIGNORE.encode(), 0o644)
        if git_path() is None:
            return False
        try:
            git(["init", "--quiet"], self.repo_path)
            self.commit(message)
        except CDEnvironmentError:
            remove_tree(self.git_folder)  # a repository without a commit would look like one of the user's
            raise
        return True

    def commit(self, message: str) -> None:
        """Commit all that is not ignored, under the user's name or, where git knows none, under ours."""
        for name, value in (("user.name", "comfydock"), ("user.email", "comfydock@localhost")):
            if git_answer(["config", name], self.repo_path) is None:
                git(["config", name, value], self.repo_path)
        git(["add", "--all"], self.repo_path)
        git(["commit", "--quiet", "--no-gpg-sign", "--no-verify", "-m", message], self.repo_path)

    def commit_changes(self, message: str) -> None:
        """Commit what changed, where there is git and the repository is ours: its list of ignored files tells."""
        is_ours = read_any_text(self.ignore).startswith(self.GITIGNORE.splitlines()[0])
        if is_ours and git_path() and git_answer(["status", "--porcelain"], self.repo_path):
            self.hide_runtime_files()
            self.commit(message)

    def hide_runtime_files(self) -> None:
        """See that git ignores our files: what .gitignore lacks goes to .git/info/exclude, which is never committed."""
        exclude = os.path.join(self.git_folder, "info", "exclude")
        excluded = read_any_text(exclude).splitlines()
        known = [*excluded, *read_any_text(self.ignore).splitlines()]
        lacking = [line for line in EnvironmentPaths.IGNORED if line not in known]
        if lacking and os.path.isdir(self.git_folder):
            make_folder(os.path.dirname(exclude))
            write_atomic(exclude, "\n".join([*excluded, *lacking, ""]).encode(), 0o644)


# Packages: pip, or uv where it is (environments of 1.0.x have no pip)

PIP_SOURCES = (  # where things come from; whatever says where they go, or what is shown, is ours to say
    "index-url extra-index-url no-index find-links proxy cert client-cert trusted-host cache-dir no-cache-dir "
    "constraint timeout retries keyring-provider"
).split()
UV_SOURCES = (
    r"UV_((DEFAULT_|EXTRA_)?INDEX(_\w+)?|FIND_LINKS|NO_INDEX|OFFLINE|(NO_)?CACHE(_DIR)?|CONSTRAINT|NATIVE_TLS|"
    r"SYSTEM_CERTS|INSECURE_HOST|KEYRING_PROVIDER|HTTP_TIMEOUT|LINK_MODE|PYTHON_INSTALL_DIR)"
)


def packages_error(why: str) -> CDEnvironmentError:
    return CDEnvironmentError(f"packages cannot be installed: {why}", code="packages")


def with_interpreter(variables: dict[str, str], python: str) -> dict[str, str]:
    """Return variables as an activated environment has them: its folder leads PATH, VIRTUAL_ENV names a venv."""
    folder = os.path.dirname(python)
    venv = os.path.dirname(folder)
    kept = {key: value for key, value in variables.items() if key != "VIRTUAL_ENV"}
    kept["PATH"] = os.pathsep.join([folder, kept.get("PATH", os.defpath)])
    return {**kept, "VIRTUAL_ENV": venv} if os.path.exists(os.path.join(venv, "pyvenv.cfg")) else kept


def package_environment(python: str) -> dict[str, str]:
    """Return the environment variables under which packages are installed and install.py runs."""
    dropped = rf"(?!{UV_SOURCES}$)(PIP_|UV_|PYTHONHOME$|PYTHONPATH$)"
    kept = {key: value for key, value in inherited_environment().items() if not re.match(dropped, key)}
    ours = {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    # ComfyUI's portable Python is started with -s and does not see packages of the user's own site
    rest = {"UV_NO_CONFIG": "1", "PYTHONNOUSERSITE": "1", "PYTHONIOENCODING": "utf-8"}
    return {**with_interpreter(kept, python), **pip_settings(python), **uv_settings(), **ours, **rest}


@lru_cache(8)
def pip_settings(python: str) -> dict[str, str]:
    """Return the user's settings of pip, from its files and variables, that say where packages come from."""
    from ast import literal_eval

    ours = inherited_environment().items()
    kept = {key: value for key, value in ours if not re.match("PIP_(?!CONFIG_FILE$)|PYTHON", key)}
    with scratch_folder() as empty:
        said = run_command([python, "-m", "pip", "config", "list"], empty, {**kept, "PIP_QUIET": "0"}, 60.0).stdout
    found = sorted(re.findall(r"(?m)^(global|install)\.([\w-]+)=(.*)$", said))  # the latter counts
    said_by_name = {name: str(literal_eval(value)) for _, name, value in found}
    settings = {}
    for name in PIP_SOURCES:
        key = "PIP_" + name.upper().replace("-", "_")
        words = os.environ.get(key, said_by_name.get(name, "")).split()  # paths were meant from where the user stands
        settings[key] = " ".join(os.path.abspath(one) if os.path.exists(one) else one for one in words)
    return {key: value for key, value in settings.items() if value}


def uv_settings() -> dict[str, str]:
    """Return the indexes of the user's own uv.toml; all else in it, and any file around us, counts for nothing."""
    home = os.environ.get("APPDATA") if IS_WINDOWS else os.environ.get("XDG_CONFIG_HOME")
    path = os.path.join(home or os.path.expanduser("~/.config"), "uv", "uv.toml")
    with suppress(CDEnvironmentError, OSError, AttributeError, TypeError, KeyError):
        data = parse_toml(read_any_text(path), path)
        data = {**data.get("pip", {}), **data}
        others = data.get("index", [])
        urls = {
            "UV_DEFAULT_INDEX": [one["url"] for one in others if one.get("default")] or [data.get("index-url", "")],
            "UV_INDEX": [one["url"] for one in others if not one.get("default")] + texts_in(data, "extra-index-url"),
            "UV_FIND_LINKS": texts_in(data, "find-links"),
        }
        return {name: " ".join(found) for name, found in urls.items() if any(found) and name not in os.environ}
    return {}


@dataclass
class Package:
    """One installed package: `line` are the words that install it again, `files` its own, relative to all packages'."""

    name: str
    version: str
    line: list[str]
    files: set[str]

    @property
    def pinned(self) -> str:
        return f"{self.name}=={self.version}"


def installed_packages(python: str) -> dict[str, Package]:
    """Return the packages that an interpreter finds, by their normalised names. They are read, not asked of pip."""
    from importlib.metadata import distributions

    words = "import sys; print('\\n'.join(sys.path[1:]))"
    with scratch_folder() as empty:
        done = run_command([python, "-c", words], empty, package_environment(python), 60.0)
    if done.returncode != 0:
        raise CDEnvironmentError(f"{python} does not tell its packages: {last_words(done)}", code="packages")
    found: dict[str, Package] = {}
    for one in distributions(path=done.stdout.splitlines()):
        name, version = one.metadata["Name"], one.version
        if isinstance(name, str) and isinstance(version, str):
            rows = (one.read_text("RECORD") or "").splitlines()
            files = {row.rsplit(",", 2)[0] for row in rows if not re.search(r"\.dist-info/|__pycache__|,0$", row)}
            found.setdefault(package_name(name), Package(name, version, origin(name, version, one), files))
    if not found:  # who took this for all that there was would remove the rest in an undo
        raise CDEnvironmentError(f"{python} has no packages, not even pip", f"{quote(python)} -m ensurepip", "no-pip")
    return found


def origin(name: str, version: str, distribution: Any) -> list[str]:
    """Return the words that install a package again: a file, folder or commit of direct_url.json, else its version."""
    direct: Any = {}
    with suppress(ValueError):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    url, commit = part_of(direct, "url", str), part_of(direct, "vcs_info")
    if part_of(direct, "dir_info").get("editable"):
        from urllib.request import url2pathname

        return ["-e", url2pathname(url.removeprefix("file://"))]
    if commit:
        url = f"{commit.get('vcs')}+{url}@{commit.get('commit_id')}"
    return [f"{name} @ {url}" if url else f"{name}=={version}"]


def package_name(line: str) -> str:
    """Return the normalised package name in a requirement line; the line itself when it has none."""
    found = re.match(r"(?:-e .*[#&]egg=)?([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return re.sub(r"[-_.]+", "-", found[1]).lower() if found else line


def held_index(frozen: list[str]) -> Optional[str]:
    """Return the index that the installed PyTorch is from, by its local version: 2.9.0+cu128 is from .../whl/cu128."""
    local = re.search(r"(?mi)^torch==[^+\n]*\+(cpu|cu\d+|rocm[\d.]+|xpu)$", "\n".join(frozen))
    return torch_index(local[1]) if local else None


def torch_index(backend: str) -> str:
    """Return the address of PyTorch's index for a backend. Raises CDEnvironmentError for a word that can be none."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9]+)?", backend):
        hint = "--torch-backend auto, cpu, cu128, rocm6.4, xpu"
        raise CDEnvironmentError(f"{backend!r} is not a PyTorch backend", hint)
    return TORCH_INDEX + backend


def detect_torch_backend() -> str:
    """Return the PyTorch backend for this machine's graphics card: cuNNN, rocmX.Y or cpu (on Macs it has Metal too)."""
    if on_path("nvidia-smi"):
        with suppress(CDEnvironmentError):  # it hangs, or is no program for this machine
            done = run_command(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], timeout=30.0)
            driver = re.match(r"\s*(\d+)", done.stdout)
            if driver and done.returncode == 0:  # CUDA 13 needs driver 580, CUDA 12.8 570 (NVIDIA's release notes)
                return "cu130" if int(driver[1]) >= 580 else "cu128" if int(driver[1]) >= 570 else "cu126"
    return "rocm6.4" if on_path("rocminfo") else "cpu"


# What somebody needs: the lines of a requirements.txt, read once, and said to pip in one file for all


def requirement_entries(text: str) -> list[str]:
    """Return the entries of a requirements.txt, without hashes: pip would want them for all that is installed."""
    lines = [re.sub(r"(^|\s)#.*$", "", line) for line in re.sub(r"\\\r?\n", " ", text).splitlines()]
    return [line for line in (re.sub(r"\s+--hash[= ]\S+", "", line).strip() for line in lines) if line]


def requirement_lines(entries: list[str]) -> list[str]:
    """Return the plain requirements, which a manifest can hold; options and paths left out."""
    return [redact(entry) for entry in entries if is_plain(entry)]


def is_plain(entry: str) -> bool:
    """Tell whether an entry is a requirement by name: its extras, its versions or its address, and its condition."""
    version = r"(?:===?|[<>!~]=?)\s*[^\s,;()<>=!~]+\s*"
    versions = rf"\(?\s*(?:{version}(?:,\s*{version})*)?,?\s*\)?\s*"
    return bool(re.fullmatch(rf"[A-Za-z0-9][\w.-]*\s*(\[[^\]]*\])?\s*(@\s*\S+\s*|{versions})(;.*)?", entry))


def pip_entry(entry: str, folder: str) -> str:
    """Return an entry as it is meant in a folder, wherever it is read; empty for an option that is not obeyed."""
    option = re.fullmatch(r"(-r|--requirement|-c|--constraint|-e|--editable)[ =]?\s*(\S.*)", entry)
    index = re.fullmatch(r"(?:-i|--index-url|--extra-index-url)[ =]\s*(\S+)", entry)
    if index:  # one more for all: it takes no other node's away
        return f"--extra-index-url {index[1]}"
    if entry.startswith("-") and not option:
        return entry if re.match(r"(-f|--find-links|--pre|--only-binary|--no-binary|--prefer-binary)\b", entry) else ""
    path = (option[2] if option else entry).strip("'\"")
    if option and "://" not in path or re.match(r"\.{1,2}([/\\\[]|$)", path):
        path = os.path.join(folder, path)
    return f"{option[1]} {path}" if option else path


def project_table(folder: str, python: Optional[str] = None) -> Any:
    path = os.path.join(folder, "pyproject.toml")
    with suppress(OSError, CDEnvironmentError):
        return part_of(parse_toml(read_any_text(path), path, python), "project")
    return {}


def node_requirements(folder: str, python: Optional[str] = None) -> list[str]:
    """Return the entries of what a node or ComfyUI needs: of its requirements.txt, else of its pyproject.toml."""
    path = os.path.join(folder, "requirements.txt")
    listed = [] if os.path.isfile(path) else texts_in(project_table(folder, python), "dependencies")
    return requirement_entries("\n".join(listed) or read_any_text(path))


@dataclass
class Need:
    """What one who is named needs: entries of requirements, or where `is_limit` only what must not be broken."""

    who: str
    entries: list[str]
    is_limit: bool = False


class Packages:
    """The packages of one environment, for one change: tried and installed as one world, and put back.

    `world` is who needs what there, `is_whole` whether that fits together; `before` what was installed when the change
    began, `frozen` its lines NAME==VERSION and `held` those that stay. Of the last question there are `is_needed` (is
    there anything to install?), `said`, `conflict`, and `bad`, the entries that made it fail.
    """

    def __init__(
        self, python: str, world: "list[Need] | tuple[()]" = (), released: "set[str] | tuple[()]" = ()
    ) -> None:
        from shutil import which

        self.python, self.uv, self.world = python, which("uv"), [*world]
        self.before = installed_packages(python)
        self.frozen = [one.pinned for one in self.before.values()]
        self.held = [line for line in self.frozen if package_name(line) in {*HELD_PACKAGES} - {*released}]
        self.is_whole, self.is_needed, self.said, self.conflict = True, True, "", ""
        self.bad: list[str] = []

    def run(self, words: list[str], tell: Progress = no_progress) -> Any:
        """Run a command of pip's, by uv where it is, and return its code and output. Raises CDEnvironmentError."""
        pip = [self.uv, "pip", words[0], "--python", self.python] if self.uv else [self.python, "-m", "pip", words[0]]
        with scratch_folder() as empty:
            done = run_command([*pip, *words[1:]], empty, package_environment(self.python), INSTALL_SECONDS, tell)
        if "No module named pip" in done.stderr:
            hint = f"{quote(self.python)} -m ensurepip"
            raise CDEnvironmentError(f"{self.python} has no pip, and uv is not installed", hint, "no-pip")
        return done

    def must(self, words: list[str], tell: Progress = no_progress) -> None:
        done = self.run(words, tell)
        if done.returncode != 0:
            raise packages_error(last_words(done))

    def uninstall(self, names: list[str]) -> None:
        self.must(["uninstall", *([] if self.uv else ["--yes"]), *names])

    def install_torch(self, backend: str, tell: Progress) -> None:
        """Install PyTorch; uv finds the graphics card by itself, but may be too old to have heard of a backend."""
        if self.uv:
            with suppress(CDEnvironmentError):
                return self.must(["install", f"--torch-backend={backend}", *TORCH_PACKAGES], tell)
        index = torch_index(detect_torch_backend() if backend == "auto" else backend)
        self.must(["install", "--index-url", index, *TORCH_PACKAGES], tell)

    def freeze(self) -> list[str]:
        """Return what is installed now, as lines NAME==VERSION."""
        return [one.pinned for one in installed_packages(self.python).values()]

    def torch_words(self, frozen: list[str]) -> list[str]:
        """Return the words for the index of that PyTorch. It has old copies of other packages: uv must look at both."""
        index, policy = held_index(frozen), ["--index-strategy", "unsafe-best-match"] if self.uv else []
        return ["--extra-index-url", index, *policy] if index else []

    @contextmanager
    def words(self, needs: list[Need]) -> Iterator[list[str]]:
        """Write what is needed and what is held into files, and hand on the words by which pip is given them."""
        held = {package_name(line) for line in self.held}
        entries = [entry for need in needs if not need.is_limit for entry in need.entries]
        bounds = [line for need in needs if need.is_limit for line in need.entries if package_name(line) not in held]
        bounds = [line for line in bounds if re.fullmatch(r"[\w.-]+\s*([<>=!~;].*)?", line)]  # pip takes no extras here
        with scratch_folder() as folder:
            files = []
            for option, name, lines in (("-r", "requirements", entries), ("-c", "constraints", [*self.held, *bounds])):
                files += [option, os.path.join(folder, f"{name}.txt")]
                write_atomic(files[-1], "".join(f"{line}\n" for line in dict.fromkeys(lines)).encode())
            # PyTorch's index is asked for what it has and is not here yet, not for each package of the world
            lacking = {package_name(entry) for entry in entries}.intersection(HELD_PACKAGES) - self.before.keys()
            yield [*files, *(self.torch_words(self.frozen) if lacking else [])]

    def ask(self, needs: list[Need], tell: Progress = no_progress, is_trial: bool = True) -> str:
        """Try or install what is needed; return why it cannot be, empty when it can."""
        with self.words(needs) as words:
            done = self.run(["install", *["--dry-run"] * is_trial, *words], tell)
        self.said = done.stderr
        self.is_needed = not is_trial or bool(re.search("Would (?!make no)|no such option", done.stdout + done.stderr))
        if done.returncode == 0 or is_trial and "no such option" in done.stderr:  # pip before 22.2
            return ""
        self.conflict = self.reason(done.stderr + done.stdout, needs)
        return self.conflict or re.sub(r" \(from (line \d+ of|-r) [^()]*(\([^()]*\))?\)", "", last_words(done))

    def reason(self, said: str, needs: list[Need]) -> str:
        """Return a conflict as who wants what, and what is held; empty when the text tells of none."""
        if not re.search(r"conflict|unsatisfiable|No solution", said):
            return ""
        block = said.partition("conflict is caused by")[2] or said
        named = {package_name(word) for word in re.findall(r"[A-Za-z0-9][A-Za-z0-9._-]*", block)}
        wants = [f"{one.who} needs {entry}" for one in needs for entry in one.entries if package_name(entry) in named]
        wants += [f"{who} needs {what}" for who, what in re.findall(r"^\s+(\S+ \S+) depends on (.+)$", block, re.M)]
        held = [line.split("==") for line in self.held if package_name(line) in named]
        wants += [f"{name} is held at {version}" + " for PyTorch" * self.is_whole for name, version in held]
        return "; ".join(dict.fromkeys(wants))

    def try_install(self, new: Need, skip_bad: bool, tell: Progress) -> list[str]:
        """Find out whether `new` can be installed beside all else; return the entries of it that are left out as bad.

        A world that does not fit together already is told of once: then the new one alone is tried, all else as it is.
        """
        left_out: list[str] = []
        while why := self.ask([*self.world, new]):
            said = self.said.replace(" ", "")
            odd = [entry for entry in new.entries if re.match(r"\w[^/@:]*$", entry) and not is_plain(entry)]
            self.bad = odd or [one for one in new.entries if not self.conflict and one.replace(" ", "") in said]
            if skip_bad and self.bad:
                left_out.append(max(self.bad, key=len))
                new.entries.remove(left_out[-1])
                tell(f"warning: left out, as it cannot be installed: {left_out[-1]}")
            elif self.is_whole and self.world and (already := self.ask(self.world)):
                tell(f"warning: what is here does not fit together already: {already}")
                self.is_whole, self.world = False, []
                self.held = self.frozen
            else:
                raise packages_error(why)
        return left_out

    def differences(self) -> "tuple[dict[str, Package], list[str], list[str]]":
        """Return what is installed now, and the names of what is new in it and of what has another version."""
        now, before = installed_packages(self.python), self.before
        changed = [name for name, one in now.items() if name in before and one.version != before[name].version]
        return now, [name for name in now if name not in before], changed

    def install(self, new: Need, tell: Progress) -> None:
        """Install what was tried. Raises CDEnvironmentError (code "packages"), also when something fits no more."""
        if not self.is_needed:
            return
        if why := self.ask([*self.world, new], tell, is_trial=False):
            raise packages_error(why)
        now, added, changed = self.differences()
        if added or changed:
            done = self.run(["check"])
            lines = f"{done.stdout}\n{done.stderr}".splitlines()
            names = "|".join(re.escape(now[name].name) for name in added + changed)
            said = [line.strip() for line in lines if re.search(" requires | has requirement ", line)]
            broken = [line for line in said if re.search(rf"(?i)(?<![\w.-])({names})(?![\w-])", line)]
            if broken:
                message = f"packages do not fit together any more: {'; '.join(broken[:3])}"
                raise CDEnvironmentError(message, code="packages")

    def tell_changes(self, tell: Progress) -> list[str]:
        """Tell what was installed and changed, and which packages share files; returns the names of the new ones."""
        from itertools import combinations

        now, added, changed = self.differences()
        if added:
            tell(f"new packages: {', '.join(f'{now[name].name} {now[name].version}' for name in added)}")
        if changed:
            moves = [f"{now[name].name} {self.before[name].version} -> {now[name].version}" for name in changed]
            tell(f"changed packages: {', '.join(moves)}")
        for one, other in combinations(sorted(now, key=lambda name: name not in added), 2):
            if one in added and (shared := now[one].files & now[other].files):
                names = f"{now[one].name} and {now[other].name}"
                tell(f"warning: {names} share files ({min(shared)}): keep or remove both")
        return [now[name].name for name in added]

    def run_install_script(self, folder: str, comfyui: str, tell: Progress) -> None:
        """Run a node's install.py, whose own calls of pip are held to the same versions."""
        with self.words([]) as words:
            held = {"PIP_CONSTRAINT": words[3], "UV_CONSTRAINT": words[3], "COMFYUI_PATH": comfyui}
            variables = {**package_environment(self.python), **held}
            done = run_command([self.python, "install.py"], folder, variables, INSTALL_SECONDS, tell)
        if done.returncode != 0:
            message = f"{os.path.join(folder, 'install.py')} failed: {last_words(done)}"
            raise CDEnvironmentError(message, code="install-script")
        if lost := {*self.held}.difference(self.freeze()):
            raise CDEnvironmentError(f"install.py replaced {', '.join(sorted(lost))}", code="install-script")

    def remembered(self) -> dict[str, Any]:
        """Return what was there before, for `put_back`, as JSON keeps it."""
        return {name: (one.name, one.version, one.line) for name, one in self.before.items()}

    def put_back(self, tell: Progress, before: dict[str, Any]) -> None:
        """Install what was there before and remove what was not; tells the packages, and what could not be done.

        What shares files with a package that is removed or replaced is installed again. `before` is as `remembered`.
        """
        now, lines = self.before, {name: line for name, (_, _, line) in before.items()}
        new = [name for name in now if name not in lines]
        gone = [name for name in lines if name not in now or now[name].line != lines[name]]
        touched = {path for name in new + gone if name in now for path in now[name].files}
        hurt = [name for name in lines if name not in gone and touched & now[name].files]
        steps = {f"{', '.join(new)} removed": partial(self.uninstall, new)} if new else {}
        torch_words = self.torch_words([f"{name}=={version}" for name, version, _ in before.values()])
        for name in gone + hurt:  # one by one: what no index has any more keeps no other back
            words = ["install", "--no-deps", "--force-reinstall", *lines[name]]
            words += torch_words if name in HELD_PACKAGES else []
            steps[" ".join(lines[name])] = partial(self.must, words)
        done = []
        for what, step in steps.items():
            try:
                step()
                done.append(what)
            except CDEnvironmentError as error:
                tell(f"warning: packages could not all be put back ({what}): {error.message}")
        if done:
            tell(f"packages put back: {', '.join(done)}")


# Node sources: each can find a node by what was typed, fetch it into a folder, name the newest version, and tell what
# was changed in a folder since. `receipt` is what was written down when the node came.


def check_node_name(name: str) -> None:
    """Raise CDEnvironmentError unless this, maybe a display name of 1.0.x, can be a folder's name on every system."""
    devices = r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)"
    refused = rf'(?i)$|[.-]|.*[<>:"/\\|?*]|.*[. ]$|.*\.disabled$|__pycache__$|{devices}'
    if len(name) > 120 or has_control(name) or re.match(refused, name):
        hint = "give its folder or its entry another name"
        raise CDEnvironmentError(f"{name!r} cannot be the name of a node", hint, "name")


class RegistrySource:
    """The Comfy Registry at api.comfy.org, or where COMFYDOCK_REGISTRY_URL says.

    `ID` and `ID@latest` are the newest version, `ID@1.2` is that one, `ID@nightly` and `ID@BRANCH` its repository.
    """

    name = "registry"
    lists = (TRACKING, NODE_RECORD)  # files that tell of the others; an archive's own count for nothing

    def find(self, identifier: str, tell: Progress) -> NodeInfo:
        """Return the node and the version to install, named as the registry spells it; say what speaks against it."""
        identity, _, version = identifier.replace("==", "@", 1).partition("@")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", identity):
            hint = "use an id of registry.comfy.org, https://..., or --dev FOLDER"
            raise CDEnvironmentError(f"{identifier!r} is neither a registry id nor a git address", hint, "name")
        node = self.ask(f"/nodes/{identity.lower()}", identity)
        self.judge(identity, node, tell)
        name, repository = str(node.get("id") or identity), str(node.get("repository") or "") or None
        if name.lower() != identity.lower():
            raise CDEnvironmentError(f"the registry answered {name!r} when asked for {identity}", code="not-found")
        check_node_name(name)
        version = "" if version == "latest" else version
        check_reference(version or "latest")
        if version and not version[0].isdigit():
            if repository is None:
                raise CDEnvironmentError(f"the registry names no repository of {identity}", code="not-found")
            check_repository(repository)
            wanted = None if version == "nightly" else version
            return NodeInfo(name, name, repository, wanted, source="git", pin=wanted)
        release = self.release(identity, version) if version else node.get("latest_version")
        if not isinstance(release, dict) or not release.get("version"):
            hint = f"name one: {identity}@1.2.3, or use its git address"
            message = f"the registry has no {identity}@{version}" if version else f"the registry offers no {identity}"
            raise CDEnvironmentError(message, hint, "not-found")
        self.judge(f"{identity} {release['version']}", release, tell)
        url = str(release.get("downloadUrl") or "") or None
        return NodeInfo(name, name, repository, str(release["version"]), url, self.name, pin=version or None)

    def release(self, identity: str, version: str) -> Any:
        """Return what the registry says of a version: of one that means the same, when it spells it otherwise."""
        place = f"/nodes/{identity.lower()}/versions"
        found = self.ask(f"{place}/{version}", f"{identity}@{version}", default={})
        others = [] if found else [one for one in self.ask(place, identity, default=[]) if isinstance(one, dict)]
        same = [one for one in others if version_key(str(one.get("version"))) == version_key(version)]
        return found or (same[0] if same else None)

    def ask(self, path: str, what: str, default: Any = None) -> Any:
        """Return an answer of the kind that `default` is, or a dict; `default` where there is none."""
        base = os.environ.get("COMFYDOCK_REGISTRY_URL") or REGISTRY_URL
        try:
            answer = fetch_json(base.rstrip("/") + path)
        except CDEnvironmentError as error:
            said = re.search(r'"message"\s*:\s*"([^"]{1,200})', error.body)
            if error.code == "http-403" and said and "banned" in said[1].lower():
                raise CDEnvironmentError(f"{what} is banned in the registry", code="banned") from None
            if error.code == "http-404" and default is None:
                hint = "give the node's git address instead"
                raise CDEnvironmentError(f"the registry has no {what}", hint, "not-found") from None
            if error.code == "http-404":
                return default
            if error.code.startswith("http-"):
                reason = f": {printable(said[1])}" if said else "; what answered may be a proxy in between"
                raise CDEnvironmentError(error.message + reason, code=error.code) from None
            raise
        if not isinstance(answer, dict if default is None else type(default)):
            raise CDEnvironmentError(f"the registry answered nothing usable about {what}", code="network")
        return answer

    def judge(self, what: str, answer: dict[str, Any], tell: Progress) -> None:
        """Refuse a banned or deleted node or version; warn of one that is deprecated, flagged or not yet checked."""
        status = re.sub("^Node(Version)?Status", "", str(answer.get("status") or ""))
        if status in ("Banned", "Deleted"):
            raise CDEnvironmentError(f"{what} is {status.lower()} in the registry", code="banned")
        if status == "Flagged":
            tell(f"warning: {what} was flagged by the registry's security scan: look at its code before you run it")
        if status == "Pending":
            tell(f"warning: {what} has not been checked by the registry yet")
        if answer.get("deprecated"):
            tell(f"warning: {what} is deprecated by its author")

    def search(self, words: str) -> list[dict[str, Any]]:
        from urllib.parse import quote_plus

        found = part_of(self.ask(f"/nodes/search?search={quote_plus(words)}&limit=20", words), "nodes", list)
        return [one for one in found if isinstance(one, dict) and one.get("id")]

    def pack_of(self, node_class: str) -> str:
        """Return the id of the pack that a class of nodes is from; empty when the registry knows none."""
        from urllib.parse import quote as quote_url

        place = f"/comfy-nodes/{quote_url(node_class, safe='')}/node"
        return str(self.ask(place, node_class, default={}).get("id") or "")

    def fetch(self, info: NodeInfo, folder: str, tell: Progress) -> NodeInfo:
        """Download and unpack into a new folder, with the list of its files by which ComfyUI-Manager knows it."""
        identity, url, files = info.registry_id or info.name, info.download_url, None
        try:
            files = unpack_from(url, folder, tell=tell) if url else None
        except CDEnvironmentError as error:
            if error.code not in ("http-403", "http-404", "http-410"):  # else it is out of date: what is it now?
                raise
        if files is None:
            url = self.ask(f"/nodes/{identity.lower()}/install?version={info.version}", identity).get("downloadUrl")
            if not url:
                hint: Hint = ("node", "add", info.repository) if info.repository else ""
                message = f"the registry has no archive of {identity} {info.version}"
                raise CDEnvironmentError(message, hint, "not-found")
            files = unpack_from(str(url), folder, tell=tell)
        listed = "\n".join(name for name in files if name not in self.lists)
        write_atomic(os.path.join(folder, TRACKING), listed.encode(), 0o644)
        return info.altered(download_url=str(url))

    def newest(self, info: NodeInfo, tell: Progress) -> NodeInfo:
        found = self.find(info.registry_id or info.name, tell)
        return found if version_key(found.version or "") > version_key(info.version or "") else info

    def version_in(self, folder: str) -> Optional[str]:
        """Return the version that a folder holds, as its pyproject.toml says; no TOML reader, for `status`."""
        pattern = r"""^[ \t]*\[project\]((?!^[ \t]*\[).)*?^[ \t]*version[ \t]*=[ \t]*["']([^"']+)["']"""
        found = re.search(pattern, read_any_text(os.path.join(folder, "pyproject.toml")), re.M | re.S)
        return found[2] if found else None

    def tracked(self, folder: str) -> list[str]:
        """Return the files that the node's archive had, as the folder lists them; it may list anything."""
        path = os.path.join(folder, TRACKING)
        return [] if is_link(path) else read_any_text(path).splitlines()

    def digests(self, folder: str, names: Optional[Any] = None) -> dict[str, str]:
        paths = {name: os.path.join(folder, name) for name in (self.tracked(folder) if names is None else names)}
        return {name: file_digest(path) for name, path in paths.items() if is_link(path) or os.path.isfile(path)}

    def changes(self, folder: str, receipt: dict[str, Any]) -> Optional[list[str]]:
        """Return what somebody changed in a folder; None when nobody can tell."""
        known = receipt.get("files")
        now = self.digests(folder, known) if isinstance(known, dict) else {}
        return [name for name in known if now.get(name) != known[name]] if isinstance(known, dict) else None

    def files(self, folder: str, receipt: dict[str, Any]) -> Optional[set[str]]:
        """Return what in a folder came with the node; None when nobody can tell."""
        known = receipt.get("files") or self.tracked(folder)
        return {*self.lists, *known} if known else None


class GitSource:
    """A git repository: an address or a folder, with `@` and a branch, tag or commit when wanted."""

    name = "git"

    def find(self, identifier: str, tell: Progress) -> NodeInfo:
        """Return the node; its version is the reference that was asked for until it is fetched."""
        url, reference = split_reference(identifier)
        check_repository(url)
        check_reference("HEAD" if reference is None else reference)
        if is_local(url):
            url = os.path.abspath(os.path.expanduser(url))
        name = re.split(r"[/\\:]", url.rstrip("/\\"))[-1].removesuffix(".git")
        check_node_name(name)
        return NodeInfo(name=name, repository=url, version=reference, source=self.name, pin=reference)

    def fetch(self, info: NodeInfo, folder: str, tell: Progress) -> NodeInfo:
        """Clone into a new folder; the answer has the commit as its version, and a branch is no pin."""
        if not info.repository:
            hint = ("node", "remove", info.name)
            raise CDEnvironmentError(f"the manifest names no repository for {info.name}", hint, "not-found")
        clone(info.repository, info.version, folder)
        commit = git_answer(["rev-parse", "--verify", "HEAD"], folder)
        if commit is None:
            raise CDEnvironmentError(f"{info.repository} is an empty repository", code="not-found")
        if info.registry_id:
            write_atomic(os.path.join(folder, ".git", CNR_ID), info.registry_id.encode(), 0o644)
        branch = git_answer([*LOOK, "symbolic-ref", "--quiet", "--short", "HEAD"], folder) if info.version else None
        return info.altered(version=commit, branch=branch or info.branch, pin=None if branch else info.pin)

    def newest(self, info: NodeInfo, tell: Progress) -> NodeInfo:
        url, branch = info.repository or "", info.branch
        check_repository(url)
        answer = git(["ls-remote", "--", url, f"refs/heads/{branch}" if branch else "HEAD"], url=url).split()
        if branch and not answer:
            hint = ("node", "add", url, "--force")
            raise CDEnvironmentError(f"{url} has no branch {branch} any more", hint, "not-found")
        return info.altered(version=answer[0]) if answer else info

    def version_in(self, folder: str) -> Optional[str]:
        return git_answer([*LOOK, "rev-parse", "HEAD"], folder)

    def changes(self, folder: str, receipt: dict[str, Any]) -> Optional[list[str]]:
        status = git_answer(["status", "--porcelain", "--untracked-files=no"], folder)
        if status is None:
            return None
        known = [f"^{receipt['version']}"] if receipt.get("version") == self.version_in(folder) else []
        words = ["rev-list", "--max-count=9", "HEAD", "--branches", *known, "--not", "--remotes", "--tags"]
        commits = (git_answer(words, folder) or "").split()
        stashes = (git_answer(["stash", "list"], folder) or "").splitlines()
        return [line[2:].strip() for line in status.splitlines()] + [f"commit {one[:8]}" for one in commits] + stashes

    def files(self, folder: str, receipt: dict[str, Any]) -> Optional[set[str]]:
        listed = git_answer(["ls-files", "-z", "--recurse-submodules"], folder)
        return None if listed is None else {".git", *listed.split("\0")}


class DevelopmentSource:
    """A folder that its author works in: linked into custom_nodes when it lies elsewhere, never copied or deleted."""

    name = "development"

    def __init__(self, custom_nodes: str) -> None:
        self.custom_nodes = custom_nodes
        self.place = ""  # of the folder that was found
        self.disabled = ""  # where it stands now when it was disabled in custom_nodes

    def find(self, identifier: str, tell: Progress) -> NodeInfo:
        """Return the node; a bare name is a folder of custom_nodes. Raises CDEnvironmentError for none."""
        inside = os.path.join(self.custom_nodes, identifier)
        is_name = os.path.basename(identifier) == identifier and identifier not in (".", "..")
        folder = inside if is_name and any(map(os.path.isdir, (inside, f"{inside}.disabled"))) else identifier
        self.place = os.path.abspath(os.path.expanduser(folder))
        if any(same_path(above, self.place) for above in upward(os.path.abspath(self.custom_nodes))):
            raise CDEnvironmentError(f"{self.place} holds custom_nodes itself", "name the folder of one node", "name")
        if same_path(os.path.dirname(self.place), self.custom_nodes) and not os.path.lexists(self.place):
            self.disabled = f"{self.place}.disabled"
        if not identifier or not os.path.isdir(self.disabled or self.place):
            raise CDEnvironmentError(f"{self.place} is not a folder", "name a folder with --dev", "not-found")
        name = os.path.basename(self.place)
        check_node_name(name)
        remote = remote_of(self.disabled or self.place)[1]
        return NodeInfo(name=name, repository=remote, version="dev", source=self.name)

    def place_in(self, folder: str) -> str:
        """Return where the node lies in custom_nodes already, of which `folder` is its place; empty when nowhere."""
        is_there = not self.place or os.path.isdir(folder) and os.path.samefile(self.place, folder)
        return folder if is_there else self.disabled

    def fetch(self, info: NodeInfo, folder: str, tell: Progress) -> NodeInfo:
        link_folder(self.place, folder)
        return info

    def newest(self, info: NodeInfo, tell: Progress) -> NodeInfo:
        return info


# Workflow files: what ComfyUI saved, as JSON or in the text chunks of a PNG image

FRONTEND_NODES = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")  # the browser's own, which are in no file


def workflow_data(path: str) -> Any:
    """Return the workflow in a file. Raises CDEnvironmentError (code "workflow") when it holds none."""
    import zlib

    hint = "name a .json or .png file that ComfyUI saved"
    data = read_file(os.path.realpath(path), 256 * MEGABYTE)
    if data is None:
        raise CDEnvironmentError(f"{path} is not there", hint, "workflow")
    texts: dict[bytes, bytes] = {b"workflow": data}
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        place, texts = 8, {}
        while place + 12 <= len(data):
            size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
            key, _, text = data[place + 8 : place + 8 + size].partition(b"\0")
            place += size + 12
            if kind == b"tEXt":
                texts.setdefault(key, text.decode("latin-1").encode())
            elif kind == b"iTXt" and text.count(b"\0", 2) >= 2:
                packed, (_, _, text) = text[:1] == b"\1", text[2:].split(b"\0", 2)
                with suppress(zlib.error):
                    text = zlib.decompressobj().decompress(text, 64 * MEGABYTE) if packed else text
                texts.setdefault(key, text)
    for name in (b"workflow", b"prompt"):
        with suppress(ValueError, RecursionError):
            return json.loads(texts.get(name, b"").decode("utf-8-sig"))
    raise CDEnvironmentError(f"{path} holds no workflow of ComfyUI", hint, "workflow")


def workflow_nodes(data: Any) -> "Iterator[tuple[str, dict[str, Any]]]":
    """Yield class and properties of each node of a workflow, in the format of its editor or of the API."""
    parts = part_of(part_of(data, "definitions"), "subgraphs", list)
    own = [part.get("id") for part in parts if isinstance(part, dict)]  # the class of a node that stands for a part
    nodes = [node for part in [data, *parts] for node in part_of(part, "nodes", list)]
    for node in nodes or (data.values() if isinstance(data, dict) else ()):
        kind = (node.get("type") or node.get("class_type")) if isinstance(node, dict) else None
        if isinstance(kind, str) and kind not in own and kind not in FRONTEND_NODES:
            yield kind, part_of(node, "properties")


# Changing nodes: what is fetched lies in custom_nodes/.comfydock.disabled/FOLDER/new, the folder that it replaces in
# .../old; renames put them in place, and the write of the manifest is the moment from which a change holds. After a
# kill that layout is all that counts: an `old` goes back where its place is empty and our manifest names it.


class NodeChange:
    """One change of a node: `place` is for its folder, `new` where it is fetched to, `old` where the former one waits.

    `former` is where that is now, which may be spelled otherwise, and `info` what the manifest has of the node; `undo`
    takes back what was done; `keeps` tells that `old` holds somebody's work, which goes to the shelf.
    """

    def __init__(self, place: str, former: str = "", info: Optional[NodeInfo] = None) -> None:
        self.place, self.former, self.info = place, former, info
        self.folder = os.path.join(os.path.dirname(place), STAGING, os.path.basename(place))
        self.new, self.old = os.path.join(self.folder, "new"), os.path.join(self.folder, "old")
        self.keeps, self.undo = False, ExitStack()
        self.goal: object = ""  # what the manifest is to have of the node, None for nothing

    def move(self, source: str, target: str) -> None:
        """Rename, so that it is taken back with the change; across disks, a part of the source may be left."""

        def back() -> None:
            if os.path.lexists(target):
                remove_tree(source)
                move(target, source, self.folder)

        refuse_existing(target)
        self.undo.callback(back)
        move(source, target, self.folder)


def is_half_updated(paths: EnvironmentPaths) -> bool:
    """Tell whether an update of ComfyUI is busy, or was broken off: see ComfyUIUpdate."""
    return bool(read_json(paths.before_record).get("phase") == "changing")


def node_folders(custom_nodes: str) -> list[str]:
    """Return the names of the folders that ComfyUI loads nodes from and that are no tool's own.

    Raises OSError where one may not look, or the disk is away: what is closed is not missing.
    """

    def is_folder(entry: Any) -> bool:
        try:
            return bool(entry.is_dir())
        except OSError:  # a link to a disk that is away
            return True

    try:
        with os.scandir(custom_nodes) as entries:
            names = sorted(entry.name for entry in entries if is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    hidden = re.compile(r"\.|.*\.disabled$|__pycache__$", re.S)
    return [name for name in names if not hidden.match(name) and not has_control(name)]  # which no manifest can hold


class NodeManager:
    """The custom nodes of one environment: in its manifest, in custom_nodes, and their packages.

    Methods that change something hold the content lock, take back what a killed command left half done, and either do
    all they say or leave folders, manifest and packages as they were.
    """

    def __init__(self, paths: EnvironmentPaths, python: Optional[str], tell: Progress) -> None:
        """Take the environment's interpreter, None when it has none yet: then no packages are installed."""
        self.paths, self.python, self.tell = paths, python, tell
        self.end_trial: Callable[[], object] = bool  # what an update of ComfyUI does before it puts the old one back

    # What is there

    @property
    def manifest(self) -> Manifest:
        """What the manifest says now. Raises as read_manifest does."""
        return read_manifest(self.paths, self.python)

    @property
    def comfyui(self) -> str:
        """The ComfyUI checkout: an adopted one, else the environment's own."""
        return self.manifest.comfyui_path or self.paths.comfyui

    @property
    def custom_nodes(self) -> str:
        """Where ComfyUI loads nodes from."""
        return custom_nodes_of(self.comfyui)

    def folder_of(self, info: NodeInfo) -> str:
        """Return a node's folder, whatever the case of its letters. Raises CDEnvironmentError (code "name")."""
        check_node_name(info.name)
        same = (name for name in self.folders() if name.casefold() == info.name.casefold())
        return os.path.join(self.custom_nodes, next(same, info.name))

    def source_of(self, info: NodeInfo) -> Any:
        """Return the source of a node in the manifest; None for one found at adoption or of an unknown kind."""
        sources = (RegistrySource(), GitSource(), DevelopmentSource(self.custom_nodes))
        return next((source for source in sources if source.name == info.source), None)

    def _key_of(self, identifier: str) -> Optional[str]:
        nodes, wanted = self.manifest.nodes, identifier.casefold()
        keys = [
            key for key, one in nodes.items() if wanted in map(str.casefold, (key, one.name, one.registry_id or key))
        ]
        keys += [key for key, one in nodes.items() if same_repository(identifier, one.repository)]
        return keys[0] if keys else None

    def find_node(self, identifier: str) -> tuple[str, NodeInfo]:
        """Return key and node of what an identifier means. Raises CDEnvironmentError (code "not-found")."""
        key = self._key_of(identifier)
        if key is None:
            raise CDEnvironmentError(f"no node {identifier!r} in the manifest", ("node", "list"), "not-found")
        return key, self.manifest.nodes[key]

    def folders(self) -> list[str]:
        """Return the names of the nodes' folders in custom_nodes. Raises OSError as node_folders does."""
        return node_folders(self.custom_nodes)

    def disabled_folder(self, info: NodeInfo) -> Optional[str]:
        """Return where a disabled node lies: .disabled/NAME[@VERSION] or NAME.disabled, by its name or registry id."""
        names, shelf = {info.name.casefold(), (info.registry_id or info.name).casefold()}, ".disabled"
        for folder, end in ((os.path.join(self.custom_nodes, shelf), ""), (self.custom_nodes, shelf)):
            for name in sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else ():
                plain = name.removesuffix(shelf).partition("@")[0].casefold()
                if name.endswith(end) and not name.startswith(".") and plain in names:
                    return os.path.join(folder, name)
        return None

    def compare(self) -> EnvironmentComparison:
        """Return how custom_nodes differs from the manifest. Changes nothing."""
        manifest, folders = self.manifest, self.folders()
        there = {name.casefold() for name in folders}
        tracked = {info.name.casefold(): info for info in manifest.nodes.values()}
        found = {name.casefold() for name in manifest.found_nodes}
        extra = [name for name in folders if name.casefold() not in tracked]
        missing = [info for name, info in tracked.items() if name not in there and not self.disabled_folder(info)]
        return EnvironmentComparison(
            missing_nodes=[info.name for info in missing],
            extra_nodes=[name for name in extra if name.casefold() not in found],
            found_nodes=[name for name in extra if name.casefold() in found],
            version_mismatches=[wrong for name in tracked if name in there for wrong in self._mismatch(tracked[name])],
            interrupted=0 if is_held(self.paths.content_lock) else len(self._interrupted()),  # else one is at work
        )

    def _mismatch(self, info: NodeInfo) -> list[dict[str, str]]:
        """Return what 1.0.x calls a version mismatch: none or one. Git nodes count when a commit is recorded."""
        is_number, version = info.source == "registry", info.version or ""
        if not version or not is_number and not (info.source == "git" and re.fullmatch("[0-9a-f]{40,64}", version)):
            return []
        actual = self.source_of(info).version_in(self.folder_of(info)) or version
        same = actual == version or is_number and version_key(actual) == version_key(version)
        return [] if same else [{"name": info.name, "expected": version, "actual": actual}]

    def packs_of(self, workflow: str) -> "tuple[list[str], list[str]]":
        """Return what is to be added for a workflow file to run, as add_node takes it, and classes nobody knows."""
        import glob

        packs: dict[str, str] = {}
        unknown: dict[str, str] = {}
        places = [os.path.join(glob.escape(self.comfyui), *part) for part in (["nodes.py"], ["comfy_*", "*.py"])]
        core = "".join(read_any_text(path) for place in places for path in glob.glob(place))
        for kind, properties in workflow_nodes(workflow_data(workflow)):
            pack, repository, version = (str(properties.get(name) or "") for name in ("cnr_id", "aux_id", "ver"))
            is_named, pattern = pack or repository, r"\d+(\.\d+)+\S*"
            if pack.lower() == "comfy-core" or not is_named and re.search(rf"""["']{re.escape(kind)}["']""", core):
                continue
            if not pack and re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
                pack, pattern = f"https://github.com/{repository}", COMMIT
            else:
                pack = pack.lower() or RegistrySource().pack_of(kind)
            version = f"@{version}" if re.fullmatch(pattern, version) else ""
            (packs if pack else unknown).setdefault(pack or kind, version)
        return [pack + version for pack, version in packs.items() if self._key_of(pack) is None], [*unknown]

    # What changes nodes

    def add_node(
        self,
        identifier: str,
        is_development: bool = False,
        no_test: bool = False,
        force: bool = False,
        no_deps: bool = False,
        release: "tuple[str, ...]" = (),
        skip_bad_lines: bool = False,
    ) -> NodeOperationResult:
        """Add a node and what it needs: a registry id `ID[@VERSION]` or a git address or path `ADDRESS[@REFERENCE]`.

        With `is_development` it is a folder, the user's own work: linked, and never deleted. `no_test` does not try the
        requirements before they are installed; `force` replaces what is there, and moves somebody's work aside.
        `no_deps` leaves out what the node needs, `skip_bad_lines` what of it cannot be installed; packages named in
        `release` are not held for it. Raises CDNodeConflictError when the node, or a folder of its name, is there
        already, and CDEnvironmentError when it cannot be found, fetched or installed; then all is as before.
        """
        with self.changing(f"add {identifier}"):
            place = r"/|\./|\.\./|~|\.\\|\.\.\\|[A-Za-z]:[\\/]|.*://|.*::|[\w.-]+@[\w.-]+:"  # a path or an address
            source: Any = GitSource() if re.match(place, identifier) else RegistrySource()
            source = DevelopmentSource(self.custom_nodes) if is_development else source
            key, info = self._key_for(source.find(identifier, self.tell), force)
            info = info.altered(no_deps=no_deps, released=[*map(package_name, release)])
            source = self.source_of(info) if info.source == "git" else source  # the registry may name a repository
            info = self._put(key, info, source, no_test, force, skip_bad_lines)
        return NodeOperationResult(info, True, "Node added - ComfyUI needs to load new node classes")

    def remove_node(self, identifier: str) -> NodeRemovalResult:
        """Take a node out of custom_nodes and the manifest; its packages stay, others may use them.

        A development node is renamed to NAME.disabled, another is deleted, or moved aside when it holds local changes.
        """
        with self.changing(f"remove {identifier}"):
            key, info = self.find_node(identifier)
            with self._change(key, info) as change:
                self._check_former(change, True)
                action = self._make_room(change)
                change.goal = None
                change_node(self.paths, key, None, [], self.python)
            self._without_failing(self._settle_packages, info)
            self._without_failing(remove_file, self._receipt_path(info))
        return NodeRemovalResult(identifier, info.name, info.source, action)

    def update_node(
        self,
        identifier: str,
        confirmation_strategy: Optional[Callable[[str, str, str], bool]] = None,
        no_test: bool = False,
        force: bool = False,
    ) -> UpdateResult:
        """Bring a node to its newest version, NODE@VERSION to that; a development node's requirements are read again.

        `confirmation_strategy` is asked with (name, old version, new version) before anything changes; no lock is held
        meanwhile. `force` replaces the node's own local changes, which are moved aside. Raises CDNodeConflictError when
        the node has local changes, CDEnvironmentError as add_node does.
        """
        base, _, asked = identifier.replace("==", "@", 1).rpartition("@")
        if self._key_of(identifier) is not None or self._key_of(base) is None:
            base, asked = identifier, ""
        key, info = self.find_node(base)
        result = UpdateResult(info.name, info.source, old_version=info.version, new_version=info.version)
        newest, why = self._newest(key, info, asked)
        is_other = (newest.version, newest.pin) != (info.version, info.pin)
        if is_other and confirmation_strategy is not None:
            is_agreed = confirmation_strategy(info.name, str(info.version), str(newest.version or asked))
            why = "" if is_agreed else "was left as it is"
        if why:
            result.message = f"{info.name} {why}"
            return result
        with self.changing(f"update {info.name}"):
            if self.manifest.nodes.get(key) != info:
                hint = ("node", "update", key)
                raise CDEnvironmentError(f"node '{info.name}' was changed by another command", hint)
            before = self.manifest.requirements(info)
            if newest != info or self._manifest_lines(info, self.folder_of(info)) != before:
                source = self.source_of(newest)
                newest = self._put(key, newest, source, no_test, force, bool(info.skipped_lines))
            after = self.manifest.requirements(newest)
        result.new_version = newest.version
        result.requirements_added = [one for one in after if one not in before]
        result.requirements_removed = [one for one in before if one not in after]
        result.changed = result.restart_recommended = info.version != newest.version or before != after
        result.message = f"{info.name} " + ("updated" if result.changed else "is up to date")
        result.restart_reason = f"Node '{info.name}' updated to {newest.version}" if result.changed else None
        return result

    def _newest(self, key: str, info: NodeInfo, asked: str) -> "tuple[NodeInfo, str]":
        """Return a node at the version that was asked for, else at its newest; and why it stays as it is, or ""."""
        source = self.source_of(info)
        if not os.path.lexists(self.folder_of(info)) and self.disabled_folder(info):
            return info, "is disabled, and was left as it is"
        if info.pin and not asked:
            return info, f"stays at {info.pin}; to move it: node update {key}@latest"
        if source is None:
            raise CDEnvironmentError(f"the source of {info.name} is not recorded", ("repair",), "not-found")
        if not asked:
            found = source.newest(info, self.tell)
        elif info.registry_id:
            found = RegistrySource().find(f"{info.registry_id}@{asked}", self.tell)
        else:
            found = source.find(f"{info.repository}" + f"@{asked}" * (asked != "latest"), self.tell)
        kept = ("name", "registry_id", "released", "skipped_lines", "no_deps")
        found = found.altered(**{name: getattr(info, name) for name in kept})
        is_same = (found.version, found.pin) == (info.version, info.pin) and info.source != "development"
        return found, "is at its newest version" if is_same else ""

    def sync(self, correct_versions: bool = False) -> SyncReport:
        """Install what the manifest has and the disk lacks; nothing is removed.

        `correct_versions` also replaces nodes of another version than the manifest has. Raises CDEnvironmentError when
        packages cannot be installed or the manifest cannot be read; what fails for single nodes is in `problems`.
        """
        with self.changing("sync"):
            report, difference = SyncReport(), self.compare()
            wanted = dict.fromkeys(difference.missing_nodes, report.installed)
            for wrong in difference.version_mismatches if correct_versions else []:
                if not self._taken_in(wrong, report):
                    wanted[wrong["name"]] = report.corrected
            for name, done in wanted.items():
                key, info = self.find_node(name)
                try:
                    if info.source not in ("registry", "git"):
                        lost = "it is not in custom_nodes, and only you know where it is: put it back"
                        raise CDEnvironmentError(f"{lost}, or: node remove {quote(name)}")
                    self._put(key, info, self.source_of(info))
                    done.append(name)
                except CDEnvironmentError as error:
                    report.problems.append(f"{name}: {error.message}")
            if self._install_requirements() and not report.problems:
                write_atomic(self.paths.stamp, json.dumps({"stamp": self._stamp()}).encode())
        return report

    def _taken_in(self, wrong: dict[str, str], report: SyncReport) -> bool:
        """Write down a version that somebody else has put there; False when it is the manifest that has changed."""
        key, info = self.find_node(wrong["name"])
        if not self._receipt(info).get("version"):
            return False
        place, version = self.folder_of(info), wrong["actual"]
        url = None if info.source == "registry" else info.download_url
        info = info.altered(version=version, pin=info.pin and version, download_url=url)
        change_node(self.paths, key, info, self._manifest_lines(info, place), self.python)
        self._without_failing(self._write_receipt, info, place)
        report.corrected.append(f"{info.name}: {version}, as it is there now")
        return True

    def switch_node(self, identifier: str, is_on: bool) -> str:
        """Disable a node or enable it again, on disk as ComfyUI-Manager does it; tells what became of it."""
        with self.changing(f"{'enable' if is_on else 'disable'} {identifier}"):
            _, info = self.find_node(identifier)
            place, state = self.folder_of(info), "enabled" if is_on else "disabled"
            if os.path.lexists(place) == is_on:
                return f"{info.name} is {state} already"
            number = "nightly" if info.source == "git" else str(info.version).replace(".", "_")
            name = f"{info.registry_id.lower()}@{number}" if info.registry_id else os.path.basename(place)
            away = os.path.join(self.custom_nodes, ".disabled", name)
            source, target = (self.disabled_folder(info), place) if is_on else (place, away)
            if source is None:
                raise CDEnvironmentError(f"{info.name} is not there", ("repair",), "not-found")
            make_folder(os.path.dirname(target))
            move(source, target)
            return f"{info.name} is {state}"

    def track(self, name: str) -> NodeInfo:
        """Write a folder in custom_nodes into the manifest: a clone, a node of the registry, else somebody's work."""
        with self.changing(f"track {name}"):
            folder = os.path.join(self.custom_nodes, name)
            if name not in self.folders():
                raise CDEnvironmentError(f"there is no folder {folder}", ("repair",), "not-found")
            info = self._recognised(folder, name)
            key = info.registry_id or info.name
            if key in self.manifest.nodes:
                raise CDNodeConflictError(f"the manifest has another {key}", ("node", "remove", key), "conflict")
            change_node(self.paths, key, info, self._manifest_lines(info, folder), self.python)
            self._without_failing(self._write_receipt, info, folder)
        return info

    def _recognised(self, folder: str, name: str) -> NodeInfo:
        check_node_name(name)
        remote, url = remote_of(folder)
        if url:
            look = [*LOOK, "symbolic-ref", "--quiet", "--short"]
            head, usual = (git_answer([*look, ref], folder) for ref in ("HEAD", f"refs/remotes/{remote}/HEAD"))
            branch = None if usual == f"{remote}/{head}" else head
            mark = re.fullmatch(r"\s*([\w.-]{1,100})\s*", read_any_text(os.path.join(folder, ".git", CNR_ID)))
            version, identity = GitSource().version_in(folder), mark[1] if mark else None
            return NodeInfo(name, identity, url, version, source="git", branch=branch)
        if os.path.isfile(os.path.join(folder, TRACKING)):
            plain, _, number = name.rpartition("@")  # NAME@1_0_5, as ComfyUI-Manager once named them
            version = RegistrySource().version_in(folder) or plain and number.replace("_", ".")
            project = project_table(folder, self.python).get("name")
            identity = project if isinstance(project, str) else plain
            if identity and version:
                return NodeInfo(name, identity.lower(), version=version, source="registry")
        return NodeInfo(name, version="dev", source="development")

    # The steps of a change

    @contextmanager
    def changing(self, purpose: str) -> Iterator[None]:
        """Hold the content lock, on ground that no killed command left half done."""
        with locked(self.paths.content_lock, 30.0, purpose, handed_on=True):
            self._take_back_interrupted()
            if is_half_updated(self.paths):
                ComfyUIUpdate(self).put_back()
            if self.manifest.tool != "comfydock":
                self.tell(f"the manifest is one of {self.manifest.tool}: its tables are used as ours are")
            yield
            self._without_failing(GitManager(self.paths.cec).commit_changes, redact(purpose))

    def _interrupted(self) -> list[str]:
        """Return the names of nodes that a killed command left in the staging folder, their places being empty."""
        staged, there = os.path.join(self.custom_nodes, STAGING), {name.casefold() for name in self.folders()}
        names = [] if is_link(staged) else [info.name for info in self.manifest.nodes.values()]
        return [name for name in names if name.casefold() not in there and os.path.lexists(f"{staged}/{name}/old")]

    def _take_back_interrupted(self) -> None:
        for name in self._interrupted():
            self.tell(f"an interrupted node change is undone: {name}")
            change = NodeChange(os.path.join(self.custom_nodes, name))
            move(change.old, change.place, change.folder)
        self._put_packages_back()
        staged = os.path.join(self.custom_nodes, STAGING)
        for name in os.listdir(staged) if os.path.isdir(staged) and not is_link(staged) else []:
            with suppress(CDEnvironmentError, OSError):  # it was told when it happened
                self._tidy(NodeChange(os.path.join(self.custom_nodes, name)))

    def _put_packages_back(self, is_failed: bool = False) -> None:
        """Put packages back that were changed for a node which the manifest does not have, or whose change failed."""
        kept = read_json(self.paths.packages)
        node = self.manifest.nodes.get(str(kept.get("key"))) if kept else None
        if kept and self.python and (is_failed or node is None or vars(node) != kept.get("node")):
            Packages(self.python).put_back(self.tell, kept["before"])
        remove_file(self.paths.packages)

    @contextmanager
    def _change(self, key: str, info: NodeInfo) -> Iterator[NodeChange]:
        """Prepare a change of one node; it is taken back when anything goes wrong before the manifest has it."""
        if not os.path.isdir(self.comfyui) or is_link(os.path.join(self.custom_nodes, STAGING)):
            raise CDEnvironmentError(f"ComfyUI is not at {self.comfyui}", ("repair",), "not-found")
        place, former = os.path.join(self.custom_nodes, info.name), self.folder_of(info)
        change, is_done = NodeChange(place, former, self.manifest.nodes.get(key)), False
        make_folder(change.folder)
        try:
            yield change
            is_done = True
        finally:
            with suppress(CDEnvironmentError):  # Ctrl-C may come when the manifest was just replaced
                is_done = is_done or change.goal == self.manifest.nodes.get(key)
            if not is_done:
                self._without_failing(change.undo.close)
            elif not change.keeps:
                with suppress(CDEnvironmentError):  # somebody else's files in it: then as a whole to the shelf
                    remove_tree(change.old)
            self._without_failing(self._put_packages_back, not is_done)
            self._without_failing(self._tidy, change)

    def _tidy(self, change: NodeChange) -> None:
        self.shelve(change.old, os.path.basename(change.place))
        remove_tree(change.folder)
        remove_empty(os.path.dirname(change.folder))

    def shelve(self, path: str, name: str) -> None:
        """Move what nobody is to lose out of the way, if it is there, and tell where it is."""
        if os.path.lexists(path):
            self.tell(f"the former {name} is kept: {move_aside(path, self.paths.removed, name)}")

    def _without_failing(self, action: Callable[..., object], *words: Any) -> None:
        """Do what must not keep a command from its end: what goes wrong is told."""
        try:
            action(*words)
        except (CDEnvironmentError, OSError) as error:
            self.tell(f"warning: {error}")

    def _key_for(self, info: NodeInfo, force: bool) -> tuple[str, NodeInfo]:
        """Return the key for a node that is to be added, and it, named as what it replaces; refuse what has to stay."""
        for key, old in self.manifest.nodes.items():
            same_name = (info.registry_id or info.name).casefold() in (key.casefold(), old.name.casefold())
            if not same_name and not same_repository(info.repository, old.repository):
                continue
            version_asked = info.source == old.source and info.pin and info.version != old.version
            if not force and not version_asked and os.path.isdir(self.folder_of(old)):
                hint = ("node", "update" if info.source == old.source else "remove", key)
                message = f"node '{key}' is already here ({old.source} {old.version})"
                raise CDNodeConflictError(message, hint, "conflict")
            return key, info if info.source == "development" else info.altered(name=old.name)
        return info.registry_id or info.name, info

    def _put(
        self, key: str, info: NodeInfo, source: Any, no_test: bool = False, force: bool = False, skip_bad: bool = False
    ) -> NodeInfo:
        """Fetch a node, install what it needs, put it in its place, and write it down: all or nothing."""
        with self._change(key, info) as change:
            fetched = source.place_in(change.former) if info.source == "development" else ""
            if not fetched:
                fetched, info = change.new, self._fetch(change, info, source, force)
            info, packages = self._install_needs(change, key, info, fetched, no_test, skip_bad)
            place = change.former if fetched == change.former else change.place
            if fetched != place:
                self._make_room(change)
                change.move(fetched, place)
            if packages and os.path.isfile(os.path.join(place, "install.py")):
                self.tell(f"running install.py of {info.name}")
                packages.run_install_script(place, self.comfyui, self.tell)
            needs = self._manifest_lines(info, place)
            if info != change.info or needs != self.manifest.requirements(info):
                change.goal = info if info != change.info else ""
                change_node(self.paths, key, info, needs, self.python)
        self._without_failing(self._write_receipt, info, place, packages, True)
        return info

    def _fetch(self, change: NodeChange, info: NodeInfo, source: Any, force: bool) -> NodeInfo:
        """Fetch a node beside its place, and give it the files that the user put into the former one."""
        known = self._check_former(change, force)
        self.tell(f"fetching {info.name} {info.version or ''}".rstrip())
        info = source.fetch(info, change.new, self.tell)
        taken = [] if known is None or is_link(change.new) else carry_over(change.former, change.new, known)
        if taken and not force:
            message = f"the new {os.path.basename(change.place)} has files of its own in place of yours ({taken[0]})"
            raise CDNodeConflictError(message, "save them, or use --force (they are moved aside)", "local-changes")
        change.keeps = change.keeps or bool(taken)
        return info

    def _check_former(self, change: NodeChange, force: bool) -> Optional[set[str]]:
        """Find out whether a folder that makes room holds somebody's work; return what is not, if anybody can tell."""
        name, old = os.path.basename(change.former), change.info
        if not os.path.lexists(change.former):
            return None
        if (old is None or old.name.casefold() != name.casefold()) and not force:
            message = f"custom_nodes has a folder {name} that the manifest does not know"
            hint = ["To track it: ", ("repair",), ". To move it aside: --force."]
            raise CDNodeConflictError(message, hint, "conflict")
        change.keeps = True
        source = None if old is None or is_link(change.former) else self.source_of(old)
        if old is None or source is None or old.source == "development":
            return None
        receipt = self._receipt(old)
        changes: Optional[list[str]] = source.changes(change.former, receipt)
        if changes and not force:
            message = f"node '{name}' has local changes ({', '.join(changes[:3])})"
            raise CDNodeConflictError(message, "save them, or use --force (they are moved aside)", "local-changes")
        change.keeps = changes != []
        known: Optional[set[str]] = source.files(change.former, receipt)
        return known

    def _make_room(self, change: NodeChange) -> str:
        """Move a folder from its place, a development node to NAME.disabled; tells what becomes of it."""
        if not os.path.lexists(change.former):
            return "none"
        if change.info is None or change.info.source != "development":
            change.move(change.former, change.old)
            return "moved" if change.keeps else "deleted"
        disabled, change.keeps = f"{change.former}.disabled", False
        if os.path.lexists(disabled):  # of the last time: a link leads elsewhere, a folder is named as in 1.0.x
            aside = change.old if is_link(disabled) else f"{change.former}.{time.time_ns() // 10**6}.disabled"
            change.move(disabled, aside)
        change.move(change.former, disabled)
        return "disabled"

    def _install_needs(
        self, change: NodeChange, key: str, info: NodeInfo, folder: str, no_test: bool, skip_bad: bool
    ) -> "tuple[NodeInfo, Optional[Packages]]":
        """Install what a fetched node needs, if anything; it comes back with what was left out and what is not held."""
        need = self._need_of(info, folder)
        if not need.entries and not os.path.isfile(os.path.join(folder, "install.py")):
            return info, None
        if not self.python or info.no_deps:
            why = "as asked" if self.python else "for this environment has no Python yet"
            self.tell(f"warning: what {info.name} needs is not installed, {why}")
            return info, None
        if folder == change.new:  # a package that stays tied to this folder would lose it
            need.entries = [re.sub(r"^(-e|--editable)\b[ =]?\s*", "", entry) for entry in need.entries]
        names, released = [*map(package_name, info.released)], self._released()
        packages = Packages(self.python, self.world(key), {*released, *names})
        there = {name: one.pinned for name, one in packages.before.items()}
        info = info.altered(released=[released.get(name) or there.get(name, name) for name in names])
        try:
            if not no_test or skip_bad:
                self.tell(f"trying the requirements of {info.name}")
                left_out = packages.try_install(need, skip_bad, self.tell)
                info = info.altered(skipped_lines=[*info.skipped_lines, *map(redact, left_out)])
            kept = {"key": key, "node": vars(info), "before": packages.remembered()}
            write_atomic(self.paths.packages, json.dumps(kept).encode())
            self.tell(f"installing the requirements of {info.name}")
            packages.install(need, self.tell)
        except CDEnvironmentError as error:
            if error.code == "packages":
                error.hint = self._ways_on(info, packages, error.message)
            raise
        return info, packages

    def _released(self) -> dict[str, str]:
        """Return what is not held for some node: the line of what was there before by the package's name."""
        return {package_name(line): line for one in self.manifest.nodes.values() for line in one.released}

    def _ways_on(self, info: NodeInfo, packages: Packages, why: str) -> Any:
        add = ("node", "add", info.registry_id or info.repository or info.name)
        ways: list[Any] = []
        for name in re.findall(r"(\S+) is held at \S+ for PyTorch", why):
            if package_name(name) not in TORCH_PACKAGES:
                ways += [f"To let {name} move: ", (*add, "--release", name), ". "]
        if packages.bad:
            ways += ["Without the lines that cannot be met: ", (*add, "--skip-bad-lines"), ". "]
        return [*ways, "Without all that it needs: ", (*add, "--no-deps")]

    def _settle_packages(self, info: NodeInfo) -> None:
        """Tell which packages a removed node leaves behind, and give back what was not held for it alone."""
        brought, others = self._receipt(info).get("packages") or [], self._released()
        back = [line for line in info.released if package_name(line) not in others]
        if not self.python or not (brought or back):
            return
        packages = Packages(self.python, self.world(), {*others, *map(package_name, back)})
        if back:
            why = packages.ask([*packages.world, Need("what was before", back)], self.tell, is_trial=False)
            lines = ", ".join(back)
            self.tell(f"warning: {lines} cannot be given back: {why}" if why else f"given back: {lines}")
        wanted = {package_name(entry) for need in packages.world for entry in need.entries}
        left = [name for name in brought if package_name(name) in packages.before.keys() - wanted]
        if left:
            self.tell(f"packages that {info.name} brought stay installed: {', '.join(left)}")

    def _need_of(self, info: NodeInfo, folder: str) -> Need:
        """Return what the node in a folder needs, as pip is to be told it."""
        lines = [] if info.no_deps else node_requirements(folder, self.python)
        entries = [pip_entry(line, folder) for line in lines if redact(line) not in info.skipped_lines]
        return Need(info.name, [entry for entry in entries if entry])

    def _manifest_lines(self, info: NodeInfo, folder: str) -> list[str]:
        """Return the requirements of the node in a folder as the manifest has them."""
        return requirement_lines(self._need_of(info, folder).entries)

    def world(self, but: str = "", comfyui: Optional[str] = None) -> list[Need]:
        """Return who needs what here: ComfyUI, by the files in its folder or in another, the manifest, and the nodes.

        In an adopted environment, whose packages are the user's, ComfyUI's are only not to be broken.
        """
        manifest, folder = self.manifest, comfyui or self.comfyui
        own, former = (self._need_of(NodeInfo("ComfyUI"), place) for place in (folder, self.comfyui))
        own.is_limit = bool(manifest.comfyui_path) and comfyui is None
        named = {package_name(entry) for entry in own.entries + former.entries}  # which know better than a copy of them
        rest = [line for line in manifest.dependencies if package_name(line) not in named]
        others = [one for key, one in manifest.nodes.items() if key != but and self.source_of(one)]
        nodes = [self._need_of(one, there) for one in others if os.path.isdir(there := self.folder_of(one))]
        bounds = Need("the manifest", manifest.constraints, True)
        path = os.path.join(folder, "manager_requirements.txt")
        manager = Need("ComfyUI's manager", requirement_entries(read_any_text(path)), True)
        return [own, Need("the manifest", rest), manager, bounds, *nodes]

    # Receipts: what was put in a node's place, in .cec/.nodes

    def _receipt_path(self, info: NodeInfo) -> str:
        return os.path.join(self.paths.nodes, f"{info.name}.json")

    def _write_receipt(
        self, info: NodeInfo, place: str, packages: Optional[Packages] = None, is_ours: bool = False
    ) -> None:
        """Write down what is in a place now: the version, the packages it brought, and of our files the digests."""
        make_folder(self.paths.nodes)
        brought = packages.tell_changes(self.tell) if packages else []
        files = RegistrySource().digests(place) if is_ours and info.source == "registry" else None
        all_brought = dict.fromkeys([*(self._receipt(info).get("packages") or []), *brought])
        receipt = {"version": info.version, "files": files, "packages": [*all_brought]}
        write_atomic(self._receipt_path(info), json.dumps(receipt).encode())

    def _receipt(self, info: NodeInfo) -> dict[str, Any]:
        """Return what was last put in a node's place; of another version than the manifest has the packages alone."""
        older = os.path.join(self.folder_of(info), NODE_RECORD)  # where versions before this one wrote it
        receipt = read_json(self._receipt_path(info)) or read_json(older)
        return receipt if receipt.get("version") == info.version else {"packages": receipt.get("packages")}

    # Sync

    def _install_requirements(self) -> bool:
        """Install what ComfyUI and the nodes need; what cannot be installed together is told, and left as it is.

        False without pip and uv: 1.0.x made venvs without pip, and such an environment ran before.
        """
        world = self.world()
        if not self.python or not any(need.entries for need in world if not need.is_limit):
            return True
        try:
            packages = Packages(self.python, world, {*self._released()})
            why = packages.ask(world, self.tell, is_trial=False)
        except CDEnvironmentError as error:
            if error.code != "no-pip":
                raise
            self.tell(f"warning: {error.message}, so its packages were not looked at: {error.hint}")
            return False
        if why and not packages.conflict:
            raise packages_error(why)
        if why:
            self.tell(f"warning: not all that is needed fits together: {why}")
        return True

    def is_synced(self) -> bool:
        """Tell whether nothing changed since the last sync that found no problem."""
        return bool(read_json(self.paths.stamp).get("stamp") == self._stamp())

    def _stamp(self) -> str:
        """Return all that sync depends on, as one text: a few dozen stat calls, no program is run."""
        places, custom_nodes = [self.comfyui], self.custom_nodes
        for folder in (custom_nodes, os.path.join(custom_nodes, ".disabled"), os.path.join(custom_nodes, STAGING)):
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            places += [os.path.join(folder, name) for name in names if name != "__pycache__"]
        watched = [os.path.join(place, name) for place in places for name in ("requirements.txt", "pyproject.toml")]
        if self.python:  # the latter changes with a new venv
            watched += [self.python, os.path.join(os.path.dirname(os.path.dirname(self.python)), "pyvenv.cfg")]
        return "\n".join([self.manifest.toml, *(f"{path} {file_mark(path)}" for path in watched)])


# Creating and deleting an environment

OWN_FOLDERS = ("models", "output", "input", "user")  # of ComfyUI: what is a user's there outlives the environment
DELETED = ".deleted-"  # in the name of what is being deleted
DISK_NEEDED = {"code": 500, "cpu": 4000}  # MB, measured: the code; PyTorch for the CPU (1.7 GB of packages)
DISK_FOR_CARDS = 12000  # MB: PyTorch for a graphics card (5 to 8 GB of packages)


def create_environment(
    paths: EnvironmentPaths,
    tell: Progress,
    comfyui: Optional[str] = None,
    source: Optional[str] = None,
    python: Optional[str] = None,
    torch_backend: str = "auto",
    no_install: bool = False,
    no_manager: bool = False,
    models: Optional[str] = None,
) -> None:
    """Make an environment in stages, each of which looks at its own result: run again it goes on where it broke off.

    The options are those of `Workspace.create`. Raises CDEnvironmentError: code "exists" as `claimed` does, or when an
    unfinished environment has another ComfyUI; else as the stages do.
    """
    with claimed(paths):
        check_space(paths, "code" if no_install or os.path.isdir(paths.venv) else torch_backend)
        if not os.path.isdir(paths.comfyui):
            with stage("ComfyUI", tell, source or COMFYUI_REPOSITORY):
                remove_tree(paths.partial)  # made beside its place, then renamed: a folder ComfyUI is a whole one
                fetch_comfyui(source or COMFYUI_REPOSITORY, comfyui, paths.partial, tell)
                move(paths.partial, paths.comfyui)
        settings = {**code_facts(paths.comfyui, source, comfyui), "torch_backend": torch_backend, "models_path": models}
        make_folder(custom_nodes_of(paths.comfyui))
        frozen: list[str] = []
        if not no_install:
            settings["python_version"] = ensure_venv(paths, python, tell)
            frozen = install_packages(paths, torch_backend, not no_manager, tell)
        complete_environment(paths, tell, settings, requirement_lines(node_requirements(paths.comfyui)), frozen)


def create_from_checkout(paths: EnvironmentPaths, checkout: str, python: str, tell: Progress) -> None:
    """Make an environment of a checkout that is there already; nothing is written into it, its nodes are left alone."""
    checkout = os.path.realpath(checkout)
    if has_control(checkout + python):
        message = f"no manifest can hold such a path: {checkout!r}, {python!r}"
        raise CDEnvironmentError(message, "rename the folder", "path")
    with claimed(paths, checkout):
        found = node_folders(custom_nodes_of(checkout))
        places = {"comfyui_path": checkout, "python_path": python, "found_nodes": found or None}
        complete_environment(paths, tell, {**code_facts(checkout), **places}, [], [])


@contextmanager
def claimed(paths: EnvironmentPaths, checkout: Optional[str] = None) -> Iterator[None]:
    """Hold an environment's folder while it becomes one; when nothing comes of it, nothing stays.

    `checkout` is the one that it is made of. Raises CDEnvironmentError (code "exists") for an environment that is
    complete or was to become another, and for a folder of somebody else: ours begins with its lock.
    """
    is_new = not os.path.lexists(paths.root)
    names = [] if is_new else os.listdir(paths.root) + (os.listdir(paths.cec) if os.path.isdir(paths.cec) else [])
    if {*names} - {os.path.basename(paths.cec)} and not any(map(os.path.exists, (paths.content_lock, paths.complete))):
        message = f"{paths.root} exists and is not an unfinished environment"
        raise CDEnvironmentError(message, "use another name", "exists")
    make_folder(paths.cec)
    try:
        with locked(paths.content_lock, 5.0, f"create {paths.name}", handed_on=True):
            if os.path.exists(paths.complete):
                raise CDEnvironmentError(f"{paths.root} already holds an environment", "choose another name", "exists")
            begun = last_known_manifest(paths).comfyui_path
            if begun not in (None, checkout) or checkout and any(map(os.path.lexists, (paths.partial, paths.comfyui))):
                message = f"{paths.root} is another environment, whose creation was interrupted"
                hint = ["Go on with: ", create_command(paths), ". Or start over: ", ("delete", paths.name)]
                raise CDEnvironmentError(message, hint, "exists")
            yield
    except BaseException:
        kept = (paths.complete, paths.manifest, paths.comfyui)
        if is_new and not any(map(os.path.exists, kept)) and not is_held(paths.content_lock):
            with suppress(CDEnvironmentError, OSError):
                remove_tree(paths.root)
        raise


def create_command(paths: EnvironmentPaths) -> tuple[str, ...]:
    adopted = last_known_manifest(paths).comfyui_path
    return ("create", paths.name, *(("--from", adopted) if adopted else ()))


@contextmanager
def stage(title: str, tell: Progress, url: str = "") -> Iterator[None]:
    """Tell of one stage of a creation, and how long it took; when it fails for want of the network to `url`, say so."""
    tell(f"{title} ...")
    began = time.monotonic()
    try:
        yield
    except CDEnvironmentError as error:
        host = re.match(r"https?://(?:[^/]*@)?([^/]+)", url)
        if host and error.code in ("git", "packages", "network") and not is_reachable(url):
            hint = "Run the same command again to go on."
            raise CDEnvironmentError(f"Could not reach {host[1]}.", hint, "network") from error
        raise
    tell(f"{title}: done in {time.monotonic() - began:.1f} s")


def check_space(paths: EnvironmentPaths, backend: str) -> None:
    """Refuse to begin what cannot end."""
    import shutil

    needed = DISK_NEEDED.get(detect_torch_backend() if backend == "auto" else backend, DISK_FOR_CARDS)
    free = shutil.disk_usage(paths.root).free // MEGABYTE
    if free < needed:
        message = f"{paths.root} has {free} MB free, about {needed} MB are needed"
        raise CDEnvironmentError(message, "make room, or use another --workspace", "disk-full")


def fetch_comfyui(source: str, reference: Optional[str], folder: str, tell: Progress) -> None:
    """Make a new folder of ComfyUI's code: of a repository, a zip file, or a folder that is no repository."""
    is_folder = os.path.isdir(source)
    is_copied = is_folder and not os.path.lexists(os.path.join(source, ".git")) and not source.endswith(".git")
    is_archive = not is_folder and source.lower().endswith(".zip")
    if not is_folder and source.lower().endswith((".tar.gz", ".tgz")):
        raise CDEnvironmentError(f"{source} is not a zip file", "name the .zip of the same code", "usage")
    if reference and (is_archive or is_copied):
        message = f"{source} is not a repository, so it has no {reference}"
        raise CDEnvironmentError(message, "leave --comfyui out", "usage")
    if is_archive:
        unpack_from(source, folder, True, tell)
    elif not is_copied:
        fetch_repository(os.path.abspath(source) if is_folder else source, reference, folder, tell)
    elif os.path.isfile(main_script(source)):
        copy_any(source, folder)
    if not os.path.isfile(main_script(folder)):
        raise CDEnvironmentError(f"{source} is not ComfyUI (no main.py).", "name another --source", "not-found")


def fetch_repository(url: str, wanted: Optional[str], folder: str, tell: Progress) -> None:
    """Fetch the version that is wanted, else the newest release: by git, else as the archive that GitHub makes."""
    check_repository(url)
    check_reference(wanted or "HEAD")
    reference = wanted or newest_release(url)
    tell(f"fetching {url} {reference or '(no release: its default branch)'}")
    if git_path() is None:
        archive = f"https://github.com/{github_name(url)}/archive/{reference or 'HEAD'}.zip"
        unpack_from(archive, folder, True, tell)
        return
    try:
        clone(url, reference, folder)
    except CDEnvironmentError as error:
        names = remote_names(url, "--tags", "--heads") if wanted and error.code == "git" else []
        if not names or wanted in names or re.fullmatch(COMMIT, wanted or ""):
            raise
        hint = f"Nearest are: {', '.join(nearest_names(wanted or '', names))}"
        raise CDEnvironmentError(f"ComfyUI at {url} has no version {wanted}.", hint, "not-found") from error


def code_facts(folder: str, source: Optional[str] = None, reference: Optional[str] = None) -> dict[str, Any]:
    """Return what the manifest says of a checkout, in the words of 1.0.x; refuse a clone of what is not asked for."""
    path = os.path.join(folder, "comfyui_version.py")
    found = re.search(r"""__version__\s*=\s*["']([^"']+)""", read_any_text(path))
    tag = git_answer(["describe", "--tags", "--exact-match", "--match=v[0-9]*"], folder)
    version = tag or (f"v{found[1]}" if found else None)
    commit, remote = git_answer(["rev-parse", "HEAD"], folder), remote_of(folder)[1]
    asked = os.path.abspath(source) if source and os.path.isdir(source) else source
    named = git_answer(["rev-parse", "--verify", f"{reference}^{{commit}}"], folder) if reference else commit
    if commit and named != commit or asked and remote and not same_repository(remote, asked):
        found_there = (version or "another version") + (f" from {remote}" if remote else "")
        message = f"{folder} is {found_there}, and something else is asked for now"
        name = os.path.basename(os.path.dirname(folder))
        raise CDEnvironmentError(message, ["To start over: ", ("delete", name)], "exists")
    version = reference or version
    kind = "commit" if re.fullmatch(COMMIT, version or "") else "branch" if version else None
    return {
        "comfyui_version": version,
        "comfyui_version_type": "release" if re.fullmatch(r"v?\d+\.\d+\.\d+", version or "") else kind,
        "comfyui_commit_sha": commit,
    }


def ensure_venv(paths: EnvironmentPaths, python: Optional[str], tell: Progress) -> str:
    """Make the venv unless it is there, whole as `.python-version` tells; return its Python's version."""
    interpreter, version = venv_python(paths.venv), read_any_text(paths.python_version).strip()
    wanted = version if python is None else python if python[:1].isdigit() else version_of_python(python)
    if version and os.path.exists(interpreter) and wanted.startswith(version):
        return version
    with stage("Python", tell):
        remove_file(paths.python_version)
        make_venv(paths.venv, python)
        version = version_of_python(interpreter)
        if not version:
            raise CDEnvironmentError(f"{interpreter} does not run", "name another --python", "python")
        write_atomic(paths.python_version, f"{version}\n".encode(), 0o644)
    return version


def make_venv(folder: str, python: Optional[str]) -> None:
    """Make a venv with pip: by uv where it is (which also fetches Pythons), else by the Python itself."""
    import shutil

    uv, interpreter = shutil.which("uv"), sys.executable
    if python is not None:
        interpreter = shutil.which(python) or shutil.which(f"python{python}") or ""
    ways = [[uv, "venv", "--seed", "--quiet", *(["--python", python] if python else []), folder]] if uv else []
    for words in [*ways, [interpreter, "-m", "venv", folder]]:
        if not words[0]:
            hint = "give --python a path, or install uv"
            raise CDEnvironmentError(f"there is no Python {python!r} here", hint, "python")
        remove_tree(folder)
        done = run_command(words, timeout=INSTALL_SECONDS)
        if done.returncode == 0:
            return
    message = f"{interpreter} cannot make a venv: {last_words(done)}"
    hint = "install python3-venv (Debian, Ubuntu) or uv, or name another --python"
    raise CDEnvironmentError(message, hint, "python")


def ask_python(python: str, words: str) -> str:
    """Return what a line of Python prints in an interpreter, "" where that does not work."""
    try:
        return str(run_command([python, "-E", "-c", words], timeout=60.0).stdout.strip())  # as ComfyUI starts
    except CDEnvironmentError:
        return ""


def version_of_python(python: str) -> str:
    return ask_python(python, "import sys; print('%d.%d' % sys.version_info[:2])")


def has_module(python: str, name: str) -> bool:
    """Tell whether an interpreter would find a module; to import torch takes seconds."""
    return bool(ask_python(python, f"import importlib.util as u; print(u.find_spec('{name}') or '')"))


def install_packages(paths: EnvironmentPaths, backend: str, with_manager: bool, tell: Progress) -> list[str]:
    """Install PyTorch, first and from its own index, which knows the hardware, and what ComfyUI needs; return all."""
    packages = Packages(venv_python(paths.venv))
    frozen = packages.freeze()
    is_other = backend != "auto" and held_index(frozen) not in (None, torch_index(backend))
    if is_other or not {*TORCH_PACKAGES} <= {*map(package_name, frozen)}:
        with stage("PyTorch", tell, TORCH_INDEX):
            if is_other:
                packages.uninstall(TORCH_PACKAGES)
            packages.install_torch(backend, tell)
    lines = node_requirements(paths.comfyui)
    if lines:
        path = os.path.join(paths.comfyui, "manager_requirements.txt")
        lines += requirement_entries(read_any_text(path)) if with_manager else []
        world = [Need("ComfyUI", [pip_entry(line, paths.comfyui) for line in lines])]
        with stage("requirements", tell, os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple/"):
            if why := Packages(packages.python, world).ask(world, tell, is_trial=False):
                raise packages_error(why)
    return packages.freeze()


def models_folder(folder: Optional[str]) -> Optional[str]:
    """Return the path of a models folder. Raises CDEnvironmentError where there is none."""
    path = os.path.abspath(os.path.expanduser(folder)) if folder else None
    if path is not None and (not os.path.isdir(path) or has_control(path)):
        raise CDEnvironmentError(f"The models folder {path} is not there. Is its disk mounted?", "", "models")
    return path


def first_manifest(name: str, settings: dict[str, Any], needs: list[str], frozen: list[str]) -> str:
    """Return the text of a new environment's manifest; the tables of uv let it find the same PyTorch again."""
    project = {
        "name": f"comfydock-env-{name}",
        "version": "0.1.0",
        "requires-python": f">={settings.get('python_version') or '3.9'}",
        "dependencies": needs,
    }
    tables: dict[str, dict[str, Any]] = {"[project]": project, "[tool.comfydock]": settings}
    torch = [line for line in frozen if package_name(line) in TORCH_PACKAGES]
    if index := held_index(torch):
        title = "pytorch-" + index.removeprefix(TORCH_INDEX)
        tables["[[tool.uv.index]]"] = {"name": title, "url": index, "explicit": True}
        tables["[tool.uv.sources]"] = {package_name(line): {"index": title} for line in torch}
        tables["[tool.uv]"] = {"constraint-dependencies": torch}
    return "\n".join("\n".join([header, *toml_lines(table), ""]) for header, table in tables.items())


def complete_environment(
    paths: EnvironmentPaths, tell: Progress, settings: dict[str, Any], needs: list[str], frozen: list[str]
) -> None:
    """Write the manifest, begin its history where there is a git that works, and say that all is there."""
    text = first_manifest(paths.name, settings, needs, frozen)
    parse_toml(text, paths.manifest, settings.get("python_path") or venv_python(paths.venv))
    write_atomic(paths.manifest, text.encode(), 0o644)
    try:
        GitManager(paths.cec).initialize_environment_repo("Initial environment setup")
    except CDEnvironmentError as error:
        tell(f"warning: no history is kept of the manifest: {error.message}")
    write_atomic(paths.complete, b"", 0o644)


def own_files(comfyui: str, seconds: float = 2.0) -> dict[str, tuple[int, int, bool]]:
    """Count what a user put into a ComfyUI: folder -> (files, bytes, whether that is all), without the empty ones.

    What git tracks there came with ComfyUI. Links are not followed. Each folder is counted for `seconds` at most.
    """
    listed = (git_answer(["ls-files", "-z", "--", *OWN_FOLDERS], comfyui) or "").split("\0")
    tracked, counts = {os.path.join(comfyui, *name.split("/")) for name in listed}, {}
    for name in OWN_FOLDERS:
        top = os.path.join(comfyui, name)
        walk = () if is_link(top) else os.walk(top)
        paths = (os.path.join(folder, file) for folder, _, files in walk for file in files)
        number, size, is_all, deadline = 0, 0, True, time.monotonic() + seconds
        for length in (os.lstat(path).st_size for path in paths if path not in tracked):
            number, size, is_all = number + (length > 0), size + length, time.monotonic() < deadline
            if not is_all:
                break
        if number or not is_all:
            counts[name] = number, size, is_all
    return counts


def delete_environment(
    paths: EnvironmentPaths, idle: Any, shelf: Optional[str] = None, tell: Progress = no_progress
) -> Optional[str]:
    """Delete an environment's folder inside the context `idle`. Links and junctions out of it are cut.

    What a user put into its ComfyUI goes to a new folder in `shelf`, which is returned, unless that is None. Raises
    CDEnvironmentError: code "locked", "mounted", "in-use" as the steps do, "disk" when the shelf is on another one, or
    "adopted" when the checkout that was adopted lies inside the environment's folder.
    """
    if is_link(paths.root):
        with idle:
            remove_file(paths.root)
        return None
    adopted = last_known_manifest(paths).comfyui_path
    if adopted and os.path.realpath(adopted).startswith(os.path.join(os.path.realpath(paths.root), "")):
        message = f"{adopted} was adopted and lies inside {paths.root}"
        raise CDEnvironmentError(message, "move it out first", "adopted")
    parent = os.path.dirname(paths.root)
    doomed = os.path.join(parent, f"{DELETED}{paths.name}-{os.urandom(4).hex()}")
    with locked(paths.content_lock, 5.0, "delete the environment"), idle:
        refuse_mounts(paths.root)
        with ExitStack() as undo:
            if os.path.exists(paths.complete):  # what breaks off leaves nothing that looks whole
                undo.callback(write_atomic, paths.complete, b"", 0o644)
                remove_file(paths.complete)
            kept = keep_own_files(paths, shelf, undo) if shelf else None
            undo.pop_all()
        try:
            replace_file(paths.root, doomed, 0.0)  # gone at once: who waits for its locks finds nothing
        except OSError:  # Windows, where the locks are open files, or a layer of an image: piece by piece
            doomed = paths.root
            for path in (os.path.join(paths.root, name) for name in os.listdir(paths.root)):
                if path != paths.cec:
                    move(path, f"{path}{DELETED}")
                    remove_tree(f"{path}{DELETED}")
    if doomed == paths.root:
        remove_tree(doomed)
    sweep_deleted(parent, tell)
    return kept


def keep_own_files(paths: EnvironmentPaths, shelf: str, undo: "ExitStack") -> Optional[str]:
    """Move what a user put into a ComfyUI to a new folder in `shelf`, by renames alone; return it, None for nothing."""
    names = [*own_files(paths.comfyui)]
    kept = os.path.join(shelf, f"{paths.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    for name in names:
        source, target = os.path.join(paths.comfyui, name), os.path.join(kept, name)
        make_folder(kept)
        try:
            replace_file(source, target)
        except OSError as error:
            message = f"{source} cannot be moved to {shelf}: {error.strerror}"
            hint = ["Delete it, too: ", ("delete", paths.name, "--purge")]
            raise CDEnvironmentError(message, hint, "disk") from error
        undo.callback(replace_file, target, source)
    return kept if names else None


def sweep_deleted(environments: str, tell: Progress) -> None:
    """Remove what deletions have left under a name of its own, killed ones, too."""
    for name in os.listdir(environments) if os.path.isdir(environments) else ():
        left = EnvironmentPaths(os.path.join(environments, name))
        if name.startswith(DELETED) and not is_held(left.content_lock):
            try:
                remove_tree(left.root)
            except (CDEnvironmentError, OSError) as error:  # the environment is gone all the same
                tell(f"warning: {left.root} cannot be removed: {error}")


# Updating ComfyUI itself. What leads back is kept until the next update: the commit under refs/comfydock/before, the
# packages in .venv.before, nodes and databases in .cec/before, the rest in .cec/before.json. Its phase is
# "changing" until the new version has answered: who takes the content lock meanwhile puts the old one back. Then it is
# "kept", which `go_back` alone reads.


@dataclass
class CodeVersion:
    """A version of ComfyUI: name, commit, the ref it is fetched by, and the branch (a full ref) that moves there."""

    name: str
    commit: str
    ref: str = ""
    branch: Optional[str] = None


class ComfyUIUpdate:
    """The code, packages and nodes of an environment's ComfyUI, which change and return together.

    The content lock is held by who calls; `before` is what before.json has. A folder of the checkout that is a link
    (`models` in 1.0.x) counts as no part of it: to git it is an untracked file in the way of a tracked folder, which a
    forced checkout would replace.
    """

    def __init__(self, nodes: NodeManager) -> None:
        self.nodes, self.paths, self.tell, self.checkout = nodes, nodes.paths, nodes.tell, nodes.comfyui
        self.manifest, self.before = nodes.manifest, read_json(nodes.paths.before_record)
        self.is_own = self.manifest.comfyui_path is None
        with os.scandir(self.checkout) as entries:
            self.linked = [entry.name for entry in entries if is_link(entry.path) and entry.is_dir()]

    def git(self, *words: str, url: str = "") -> str:
        if self.linked:
            patterns = git(["rev-parse", "--git-path", "info/sparse-checkout"], self.checkout)
            patterns = os.path.join(self.checkout, patterns)
            if not os.path.exists(patterns):
                make_folder(os.path.dirname(patterns))
                write_atomic(patterns, "".join(["/*\n", *(f"!/{name}/\n" for name in self.linked)]).encode(), 0o644)
            words = ("-c", "core.sparseCheckout=true", "-c", "core.sparseCheckoutCone=false", *words)
        return git([*words], self.checkout, url)

    def branch(self) -> Optional[str]:
        return git_answer(["symbolic-ref", "--quiet", "HEAD"], self.checkout)

    def current(self) -> CodeVersion:
        """Return the version that is there. Raises CDEnvironmentError for what cannot be updated, with the way on."""
        problem = ("The demo is part of comfydock.", "") if self.manifest.demo else None
        if "python_embeded" in (self.manifest.python_path or ""):
            problem = ("The portable build of ComfyUI has an updater of its own.", "update\\update_comfyui.bat")
        elif not os.path.lexists(os.path.join(self.checkout, ".git")):
            problem = (f"{self.checkout} is not a git clone, so it cannot be updated.", "clone it again")
        if problem:
            raise CDEnvironmentError(*problem, "no-update")
        facts = code_facts(self.checkout)
        return CodeVersion(facts["comfyui_version"] or "", self.git("rev-parse", "HEAD"), "", self.branch())

    def find(self, wanted: Optional[str]) -> CodeVersion:
        """Return the version `wanted` (tag, branch or commit), else the newest release or one of its branch."""
        check_reference(wanted or "HEAD")
        current, url = self.current(), remote_of(self.checkout)[1] or ""
        if not url:
            hint = f"set one: git -C {quote(self.checkout)} remote add origin {COMFYUI_REPOSITORY}"
            raise CDEnvironmentError(f"The clone {self.checkout} has no remote.", hint, "no-update")
        check_repository(url)
        if wanted is None and current.branch is None:
            wanted = newest_release(url) if self.is_own else None
            if wanted is None:
                message = f"{self.checkout} is not on a branch, so it has no newest version."
                raise CDEnvironmentError(message, ["name one: ", ("update", "--to", "REF")], "detached")
            if version_key(wanted) <= version_key(current.name):
                return current
        lines = self.git("ls-remote", "--tags", "--heads", "--", url, url=url).splitlines()
        refs = {ref: commit for commit, _, ref in (line.partition("\t") for line in lines)}
        names = [f"refs/{name}{wanted}" for name in ("tags/", "tags/v", "heads/")] if wanted else [current.branch]
        for ref in names:
            if ref in refs:
                name, commit = re.sub("^refs/(tags|heads)/", "", ref), refs.get(f"{ref}^{{}}", refs[ref])
                return CodeVersion(name, commit, ref, None if wanted else current.branch)
        known = git_answer(["rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}"], self.checkout)
        if wanted and (known or re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", wanted)):
            return CodeVersion(wanted, known or wanted, "" if known else wanted)
        tags = [ref[10:] for ref in refs if re.match(r"refs/tags/.*(?<!\^\{\})$", ref)]
        hint = f"Nearest are: {', '.join(nearest_names(wanted or '', tags))}"
        raise CDEnvironmentError(f"{url} has no {wanted or current.branch}.", hint, "not-found")

    def fetch(self, version: CodeVersion) -> None:
        """Have the commits of a version here, one alone where the clone is shallow and ours."""
        if git_answer(["cat-file", "-e", f"{version.commit}^{{commit}}"], self.checkout) is None:
            url = remote_of(self.checkout)[1] or ""
            is_shallow = self.is_own and self.git("rev-parse", "--is-shallow-repository") == "true"
            self.tell(f"fetching ComfyUI {version.name} from {url}")
            self.git("fetch", "--quiet", *["--depth=1"] * is_shallow, "--", url, version.ref, url=url)
        self.git("update-ref", "refs/comfydock/new", version.commit)

    def files(self, *words: str) -> list[str]:
        """Return the files that `git diff` names, those of linked folders left out."""
        names = self.git("diff", "--name-only", "--no-renames", "-z", *words).split("\0")
        return [name for name in names if name and name.partition("/")[0] not in self.linked]

    def own_work(self, version: CodeVersion, force: bool, *words: str) -> list[str]:
        """Return the user's changed files, files in the way, and commits; refuse them unless `force`.

        `words` were typed behind `update`.
        """
        own = self.files("--diff-filter=d", "HEAD")  # that a file was deleted loses nothing
        added = self.files("--diff-filter=A", "HEAD", version.commit)
        own += [name for name in added if os.path.lexists(os.path.join(self.checkout, name)) and name not in own]
        if version.branch or self.branch() is None:
            ours = ("--not", "--remotes", "--tags", "--glob=refs/comfydock")
            own += [f"commit {one[:8]}" for one in self.git("rev-list", "--max-count=9", "HEAD", *ours).split()]
        if version.ref and version.branch and not self.is_own and not own:
            if git_answer(["merge-base", "--is-ancestor", "HEAD", version.commit], self.checkout) is None:
                own = [f"commit {self.git('rev-parse', 'HEAD')[:8]}"]
        if own and not force:
            more = f" and {len(own) - 5} more" if len(own) > 5 else ""
            message = f"ComfyUI in {self.checkout} has changes of your own: {', '.join(own[:5])}{more}."
            hint = ["put them on a branch first: ", ("update", *words, "--force")]
            raise CDEnvironmentError(message, hint, "local-changes")
        return own

    def try_packages(self, version: CodeVersion) -> None:
        """Find out whether what a version needs can be installed beside what the nodes need and what is held."""
        if not self.nodes.python:
            return
        with scratch_folder() as folder:
            for name in ("requirements.txt", "manager_requirements.txt"):
                text = git_answer(["show", f"{version.commit}:{name}"], self.checkout)
                if text is not None:
                    write_atomic(os.path.join(folder, name), f"{text}\n".encode())
            self.tell(f"trying the packages of ComfyUI {version.name} and all nodes")
            why = Packages(self.nodes.python).ask(self.nodes.world(comfyui=folder), self.tell)
        if why:
            raise CDEnvironmentError(f"ComfyUI {version.name} does not fit: {why}", code="packages")

    def branch_off(self, own: list[str]) -> str:
        """Put the user's own work on a branch; return a commit that has the files as they are."""
        commit, files = self.git("rev-parse", "HEAD"), [name for name in own if not name.startswith("commit ")]
        if files:
            self.git("add", "--", *files)
            commit = self.git("stash", "create", "Own changes in ComfyUI") or commit
            self.git("reset", "--quiet")
        if own:
            branch = time.strftime("comfydock/own-%Y%m%d-%H%M%S", time.gmtime())
            self.git("branch", branch, commit)
            self.tell(f"your own changes are on the branch {branch} now")
        return commit

    def keep(self, version: CodeVersion, own: list[str], databases: list[str]) -> None:
        """Keep the old state. Once before.json is written it is put back by whoever comes next, until `confirm`."""
        self.forget()
        facts, worktree = code_facts(self.checkout), self.branch_off(own)
        self.git("update-ref", "refs/comfydock/before", worktree)
        make_folder(self.paths.before)
        for number, path in enumerate(databases):
            copy_any(path, os.path.join(self.paths.before, f"{number}.{os.path.basename(path)}"))
        for info in self.manifest.nodes.values():
            folder = self.nodes.folder_of(info)
            if info.source in ("registry", "git") and os.path.isdir(folder) and not is_link(folder):
                link_tree(folder, os.path.join(self.paths.before, "nodes", info.name), COPIED_SIZE)
        packages = None
        if self.is_own and os.path.isdir(self.paths.venv) and not is_link(self.paths.venv):
            self.tell("keeping the packages as they are")
            link_tree(self.paths.venv, self.paths.venv_partial)
            move(self.paths.venv_partial, self.paths.venv_before)
        elif self.nodes.python:
            packages = Packages(self.nodes.python).remembered()
        needs, tables = self.manifest.requirements, self.manifest.tables
        self.write(
            phase="changing",
            old=facts["comfyui_version"],
            new=version.name,
            commit=facts["comfyui_commit_sha"],
            worktree=worktree,
            branch=self.branch(),
            goal=version.commit,
            settings={name: self.manifest.settings.get(name) for name in facts},
            needs=project_table(self.paths.cec, self.nodes.python).get("dependencies") if self.is_own else None,
            nodes={key: [tables[key], needs(info)] for key, info in self.manifest.nodes.items()},
            databases=databases,
            freeze=packages,
        )

    def write(self, **changes: Any) -> None:
        self.before.update(changes)
        write_atomic(self.paths.before_record, json.dumps(self.before, default=str).encode())

    def change(self, version: CodeVersion) -> None:
        former, needs = requirement_lines(node_requirements(self.checkout)), self.before["needs"]
        self.tell(f"changing ComfyUI from {self.before['old']} to {version.name}")
        forced = ["--force"] * (self.before["worktree"] != self.before["commit"])
        self.git("checkout", "--quiet", *forced, "--detach", version.commit)
        self.set_branch(version.branch, version.commit)
        if needs is not None:
            needs = [line for line in needs if line not in former] + requirement_lines(node_requirements(self.checkout))
        kind = "branch" if version.ref.startswith("refs/heads/") else "commit"
        kind = "release" if re.fullmatch(r"v?\d+\.\d+\.\d+", version.name) else kind
        facts = zip(self.before["settings"], (version.name, kind, version.commit))
        change_settings(self.paths, dict(facts), self.nodes.python, needs)
        if self.nodes.python:
            self.tell(f"installing the packages of ComfyUI {version.name}")
            own, *others = self.nodes.world(comfyui=self.checkout)
            Packages(self.nodes.python, others).install(own, self.tell)

    def set_branch(self, branch: Optional[str], commit: str) -> None:
        if branch:
            self.git("update-ref", branch, commit)
            self.git("symbolic-ref", "HEAD", branch)

    def confirm(self) -> None:
        """Let the new version stay: it has answered."""
        self.write(phase="kept")
        GitManager(self.paths.cec).commit_changes(f"Update ComfyUI from {self.before['old']} to {self.before['new']}")

    def go_back(self, own: list[str], with_databases: bool) -> None:
        """Return to what was before the last update; `own` goes on a branch first."""
        self.branch_off(own)
        self.write(phase="changing", goal=self.git("rev-parse", "HEAD"), returns=True, all=with_databases)
        self.put_back()

    def put_back(self) -> None:
        """Put the old state back when before.json says that it is to be; when this is killed, the next one goes on."""
        before = self.before
        if before.get("phase") != "changing":
            return
        self.tell(f"putting ComfyUI {before['old']} back")
        self.nodes.end_trial()
        self.put_code_back(*(before[name] for name in ("worktree", "commit", "branch", "goal")))
        if os.path.isdir(self.paths.venv_before):
            remove_tree(self.paths.venv_partial)
            if os.path.lexists(self.paths.venv):
                move(self.paths.venv, self.paths.venv_partial)
            move(self.paths.venv_before, self.paths.venv)
        if before["freeze"] is not None and self.nodes.python:
            Packages(self.nodes.python).put_back(self.tell, before["freeze"])
        self.put_nodes_back()
        for number, path in enumerate(before["databases"] if "returns" in before else ()):
            kept = os.path.join(self.paths.before, f"{number}.{os.path.basename(path)}")
            for name in [path, f"{path}-wal", f"{path}-shm"] if before["all"] else [kept]:
                self.nodes.shelve(name, os.path.basename(name))
            if before["all"] and os.path.exists(kept):
                copy_any(kept, path)
        change_settings(self.paths, before["settings"], self.nodes.python, before["needs"])
        GitManager(self.paths.cec).commit_changes(f"Back to ComfyUI {before['old']} from {before['new']}")
        self.forget()

    def put_code_back(self, worktree: str, commit: str, branch: Optional[str], goal: str) -> None:
        """Put commit, branch and files back, also where git was killed half-way."""
        folder = os.path.join(self.checkout, git(["rev-parse", "--git-dir"], self.checkout))
        for name in os.listdir(folder):
            if name.endswith(".lock"):  # of a git that was killed: who has the content lock is alone here
                remove_file(os.path.join(folder, name))
        self.git("checkout", "--quiet", "--force", "--detach", worktree)
        for name in self.files("--diff-filter=A", "HEAD", goal):  # written, and not yet noted by git
            remove_file(os.path.join(self.checkout, name))
        if worktree != commit:
            self.git("update-ref", "--no-deref", "HEAD", commit)
        self.set_branch(branch, commit)
        self.git("reset", "--quiet")

    def put_nodes_back(self) -> None:
        """Put nodes back that were changed, added or removed since; what stands in their place goes to the shelf."""
        manifest = self.nodes.manifest
        for key in {**self.before["nodes"], **manifest.nodes}:
            table, needs = self.before["nodes"].get(key, (None, []))
            old, new = info_from_table(key, table) if table else None, manifest.nodes.get(key)
            infos = [info for info in (new, old) if info]
            if any(info.source not in ("registry", "git") for info in infos):
                continue
            place, source = self.nodes.folder_of(infos[0]), self.nodes.source_of(infos[0])
            kept = os.path.join(self.paths.before, "nodes", old.name) if old else ""
            is_kept = os.path.isdir(kept)
            if old == new and not (is_kept and source.version_in(place) != source.version_in(kept)):
                continue
            if is_kept or old is None:
                self.nodes.shelve(place, infos[0].name)
            if old and is_kept:
                move(kept, os.path.join(self.nodes.custom_nodes, old.name))
            change_node(self.paths, key, old, needs, self.nodes.python)

    def forget(self) -> None:
        """Remove all that was kept, before.json first."""
        remove_file(self.paths.before_record)
        for folder in (self.paths.before, self.paths.venv_partial, self.paths.venv_before):
            remove_tree(folder)
        self.git("update-ref", "-d", "refs/comfydock/before")
        self.before = {}


# ====================================================================================================================
# 9. Environment
# Returns or raises; never prints, asks or exits. Alone decides to end a ComfyUI and what belongs to it.

LOCK_SECONDS = 10.0
LEAVING_SECONDS = 3.0  # a clean stop takes up to 2 s
TRY_SECONDS = 600.0  # for the first start of a new version
START_GRACE = 180.0  # first starts with many custom nodes take minutes: until then silence is no fault
PARSER_SECONDS = 20.0  # 0.15 s (observed); virus scanners look at a Python that starts for the first time
FIRST_LINE_SECONDS = 5.0  # a ComfyUI whose parser cannot be asked is watched until it says something
MONITOR_SECONDS = 20.0  # a monitor answers within the patience for the lock and the first moments of ComfyUI
MONITOR_VARIABLE = "COMFYDOCK_MONITOR_TASK"
DROPPED_VARIABLES = ("__COMFY_CLI_SESSION__", "PYTHONHOME", "PYTHONPATH")  # they would lead ComfyUI astray
KEEPER_PATIENCE = 30.0  # it waits for the port to be free, and a virus scanner may read all that it starts


@dataclass
class Snapshot:
    """What there is to see of an environment's ComfyUI without asking it anything.

    `state` is starting (an intent whose starter lives), running, stopped, crashed, foreign or unknown; `note` says what
    is special: untracked, moved (Windows: the recorded run goes on; its new PID is in `record`, not yet in the file),
    interrupted, rebooted, damaged, or nothing. `relics` are what is left of a recorded run whose ComfyUI is gone.
    """

    state: str
    record: Optional[ProcessState] = None
    process: Optional[Process] = None
    note: str = ""
    relics: list[Process] = field(default_factory=list)


@dataclass
class Launch:
    """What is about to start: which words, typed and added, for which program, where it listens, under which variables.

    `told` is what ComfyUI's own parser makes of the words, empty where it could not be asked; `variables` are those of
    every ComfyUI of the environment, `set_env` this run's own; `monitor` is what its record says of one.
    """

    args: list[str]
    config: ComfyUIConfig
    interpreter: list[str]
    folder: str
    variables: dict[str, str]
    added: list[str]
    told: dict[str, Any] = field(default_factory=dict)
    set_env: dict[str, str] = field(default_factory=dict)
    monitor: Optional[dict[str, Any]] = None
    auto_port: bool = False


def print_parsed_arguments() -> None:
    """Run in the environment's Python, as a program of its own: print ComfyUI's flags, the words as parsed, folders."""
    import json
    import sys
    from importlib import import_module

    sys.path.insert(0, sys.argv.pop(1))
    asks_for_folders = sys.argv.pop(1) == "folders"
    options: Any = import_module("comfy.cli_args")
    sys.stdout.write(json.dumps(sorted(options.parser._option_string_actions)) + "\n")
    options.args = options.parser.parse_args()
    sys.stdout.write(json.dumps(vars(options.args), default=str) + "\n")
    if asks_for_folders:
        folders = import_module("folder_paths")
        places = {name: list(entry[0]) for name, entry in folders.folder_names_and_paths.items()}
        sys.stdout.write(json.dumps([folders.models_dir, places]) + "\n")


def terminate(
    process: Process, timeout: float, meanwhile: "Optional[Callable[[], bool]]" = None, ignores_interrupt: bool = False
) -> None:
    """End one process: interrupt, terminate 3 s before the deadline (or half-way), kill at `timeout` seconds.

    `meanwhile` is called while waiting, and True from it kills at once. Raises CDEnvironmentError when the process is
    another user's or does not end.
    """
    polite = 0.0 if ignores_interrupt else max(timeout - 3, timeout / 2)
    hurry = timeout <= 0
    for how, patience in (("interrupt", polite), ("terminate", timeout - polite)):
        if not hurry and patience > 0 and signal_process_of(process, how):
            if wait_for_exit(process, patience, meanwhile):
                return
            hurry = meanwhile is not None and meanwhile()
    signal_process_of(process, "kill")
    if not wait_for_exit(process, 5.0):
        message = f"PID {process.pid} did not end, not even when killed: the system holds it."
        raise CDEnvironmentError(message, ("status",), "stuck")


def end_all(processes: "list[Process]") -> None:
    """End what a process left behind: terminate all, and after a second kill what remains."""
    for how, seconds in (("terminate", 1.0), ("kill", 2.0)):
        processes = [process for process in processes if is_same_process(process)]
        for process in processes:
            signal_process_of(process, how)
        deadline = time.monotonic() + seconds
        for process in processes:
            wait_for_exit(process, max(0.0, deadline - time.monotonic()))
            reap(process.pid)


def family_of(process: Process) -> list[Process]:
    """Return a live process and all that belongs to it, by the marker that it bears itself: a record may be forged."""
    return process_tree(process, process_table().marker(process.pid))


def end_with_family(process: Process, timeout: float) -> None:
    """End a process that nobody recorded, and what belongs to it. Raises as `terminate`."""
    family = family_of(process)
    terminate(process, timeout)
    end_all(family)


def resume(process: Process) -> None:
    with suppress(OSError):
        signal_same(process, "continue")


def signal_process_of(process: Process, how: str) -> bool:
    """Signal this very process, and resume it; False where that has no effect (Windows, an interrupt, no console)."""
    try:
        signal_same(process, how)
        resume(process)
    except ProcessLookupError:
        pass
    except PermissionError as refused:
        if how == "interrupt":
            return False
        message = f"PID {process.pid} ({process.name}) belongs to another user and was not stopped."
        raise CDEnvironmentError(message, "ask its owner, or try again as that user", "permission") from refused
    return True


@contextmanager
def paused(processes: "list[Process]") -> Iterator[None]:
    """Let processes stand still for a moment; they go on whatever happens."""
    standing: list[Process] = []
    try:
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                standing.append(process)
                signal_same(process, "pause")
        until(lambda: all(map(is_stopped, standing)), 1.0, 0.001)
        yield
    finally:
        for process in standing:
            resume(process)


def comfyui_on_port(port: int) -> Process:
    """Return the process that listens on `port`, proved to be a ComfyUI by what it is and by what it says of itself.

    Raises CDEnvironmentError when nobody listens there or the proof fails.
    """
    holders = port_holders(port)
    if not holders:
        raise CDEnvironmentError(f"Nothing you can see is listening on port {port}.", ("list",), "stopped")
    for process in filter(lambda process: is_python(process.name), holders):
        told = config_told_by(arguments_of(process))  # its address, and whether by TLS
        argv = look_at(ComfyUIConfig(told.host, port, told.tls), 5.0, with_queue=False).argv or []
        folders = map(os.path.dirname, scripts_of(process, "main.py"))
        is_comfyui = any(is_checkout(folder) or environment_above(folder) for folder in folders)
        if is_comfyui and os.path.basename((argv or [""])[0]) == "main.py" and is_own_argv(argv, process):
            return process
    named = ", ".join(f"{process.name}, PID {process.pid}" for process in holders)
    message = f"Port {port} is held by {named}, which is not proved to be a ComfyUI; nothing was ended."
    raise CDEnvironmentError(message, ("list",), "stranger")


def arguments_of(process: Process) -> list[str]:
    """Return what follows main.py on the command line of a process."""
    words = process.command
    at = next((i for i, word in enumerate(words) if os.path.basename(word) == "main.py"), len(words))
    return words[at + 1 :]


def config_told_by(args: list[str]) -> ComfyUIConfig:
    """Return where ComfyUI listens by its arguments; the defaults when they name no port that there can be."""
    try:
        return parse_comfyui_args(args)
    except CDEnvironmentError:
        return ComfyUIConfig()


def is_own_argv(argv: list[str], process: Process, script: Optional[str] = None) -> bool:
    """Tell whether the command line that a server says it has can be that of `process`, started from `script`."""
    follows_interpreter = process.text.endswith(" " + " ".join(argv))
    return follows_interpreter or script is not None and os.path.isabs(argv[0]) and same_path(argv[0], script)


def exit_code_of(pid: int) -> Optional[int]:
    """Return the exit code of a child that has ended, within the moment that the system may need to hand it out."""
    codes = until(lambda: [code for code in [reap(pid)] if code is not None], 0.1)
    return codes[0] if codes else None


def ourselves() -> dict[str, Any]:
    """Return how a record names this very process."""
    return {"pid": os.getpid(), "identity": identity_of(process_table().process(os.getpid()))}


def own_monitor() -> dict[str, Any]:
    return {**ourselves(), "restarts": [], "gave_up": None}


def as_path(text: str) -> "Path":
    from pathlib import Path

    return Path(text)


def is_own_intent(record: ProcessState) -> bool:
    """Tell whether a record is of a start by this very process that came to nothing."""
    return record.pid is None and record.starter.get("pid") == os.getpid() and recorded_starter(record) is not None


@contextmanager
def workspace_lock(paths: WorkspacePaths, purpose: str) -> Iterator[None]:
    """Hold the lock on what environments share, their ports and the settings: for milliseconds only."""
    make_folder(paths.metadata)
    with locked(paths.lock, LOCK_SECONDS, purpose):
        sweep_leftovers(paths.settings)
        yield


class Environment:
    """One ComfyUI environment of a workspace: its checkout, its Python, its one ComfyUI process.

    `taken_ports` tells, of a name, which ports other environments have recorded (port -> words for who).
    """

    def __init__(
        self, name: str, paths: WorkspacePaths, taken_ports: "Callable[[str], dict[int, str]]" = lambda name: {}
    ) -> None:
        self.name = name
        self.workspace_paths = paths
        self.paths = EnvironmentPaths(os.path.join(paths.environments, name))
        self.log_path = paths.log_file(name)  # the log of this environment's runs
        self.tell: Progress = no_progress  # long work (nodes, sync) tells its progress here
        self._taken_ports = partial(taken_ports, name)
        self.is_keeper = False  # whether this process stays, and starts ComfyUI again when it is told to
        self._process: "Optional[subprocess.Popen[bytes]]" = None  # Windows forgets an exit code with the last handle
        self._manifest: "tuple[str, Manifest]" = ("", Manifest({}))  # as it was read last, and the mark of its file

    # Where its things are ------------------------------------------------------------

    @property
    def cec_path(self) -> "Path":
        """The folder of the manifest and the state file."""
        return as_path(self.paths.cec)

    @property
    def comfyui_path(self) -> "Path":
        """The ComfyUI checkout, which lies elsewhere when it was adopted. Raises CDEnvironmentError."""
        return as_path(self._checkout)

    @property
    def _state_file(self) -> "Path":
        return as_path(self.paths.state)

    @property
    def manifest(self) -> Manifest:
        """What the manifest says, or while it is broken what it last said (`nodes.manifest` reads strictly)."""
        mark = file_mark(self.paths.manifest)
        if not mark or mark != self._manifest[0]:
            self._manifest = mark, last_known_manifest(self.paths)
        return self._manifest[1]

    @property
    def nodes(self) -> NodeManager:
        """The custom nodes; what it does is told to `tell`."""
        manager = NodeManager(self.paths, self.python if os.path.exists(self.python) else None, self.tell)
        manager.end_trial = self._end_trial
        return manager

    @property
    def is_complete(self) -> bool:
        """Whether its creation was finished."""
        return os.path.exists(self.paths.complete)

    @property
    def _checkout(self) -> str:
        return self.manifest.comfyui_path or self.paths.comfyui

    @property
    def python(self) -> str:
        """The interpreter that runs this ComfyUI (not checked)."""
        return self.manifest.python_path or venv_python(self.paths.venv)

    # The record ----------------------------------------------------------------------

    def _read_state(self) -> Optional[ProcessState]:
        return read_state(self.paths.state)

    def _write_state(self, state: Optional[ProcessState]) -> None:
        if state is not None:
            write_state(self.paths.state, state)
        else:
            self._clear_state()

    def _clear_state(self) -> None:
        remove_file(self.paths.state)

    def amend_record(self, run_id: Optional[str] = None, seconds: float = LOCK_SECONDS, **fields: Any) -> None:
        """Set fields of the record (of that run), unless another command is at work or the disk is full."""
        with suppress(CDEnvironmentError, OSError), self._process_lock("note", seconds):
            record = self._read_state()
            if record is not None and record.pid is not None and run_id in (None, record.run_id):
                vars(record).update(fields)
                self._write_state(record)

    @contextmanager
    def _process_lock(self, purpose: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        if not os.path.exists(self.paths.lock) or not os.path.exists(self.paths.alive):
            GitManager(self.paths.cec).hide_runtime_files()  # the first time here: git shall not see our files
        with locked(self.paths.lock, seconds, purpose):
            sweep_leftovers(self.paths.state)
            sweep_leftovers(self.paths.cec)
            yield

    # Looking -------------------------------------------------------------------------

    def observe(self, scan: Optional[Scan] = None, lock_held: bool = False) -> Snapshot:
        """Return what is there now; change nothing. Raises CDEnvironmentError where no process table works, OSError.

        `scan` is one `scan_for_comfyui` for many environments. While the process lock is held no starter can be at
        work; for others the record may change between the look at it and that at the processes: they look again.
        """
        for _ in range(10):
            record = self._read_state()
            is_damaged = record is None and os.path.lexists(self.paths.state)
            snapshot = self._compared(record, "damaged" if is_damaged else "", scan, lock_held)
            if lock_held or self._read_state() == record:
                break
            scan = None
        return snapshot

    def _compared(self, record: Optional[ProcessState], note: str, scan: Optional[Scan], lock_held: bool) -> Snapshot:
        state = STOPPED
        if record is not None:
            process = subject_of(record, self.python, main_script(self._checkout))
            if process is None and lives_elsewhere(record, self.paths.alive):
                return Snapshot(FOREIGN, record)
            if process is not None and record.pid is not None:
                return Snapshot(RUNNING, record, process)
            if process is not None and not lock_held:  # somebody is starting ComfyUI
                return Snapshot(STARTING, record)
            if record.pid is None:
                note = "interrupted"
            elif locate(record.identity) == "rebooted":
                note = "rebooted"
            elif record.desired_state != STOPPED and (record.last_exit or {}).get("code") != 0:
                state = CRASHED
        return Snapshot(state, record, None, note) if scan == {} else self._unrecorded(record, state, note, scan)

    def _unrecorded(self, record: Optional[ProcessState], state: str, note: str, scan: Optional[Scan]) -> Snapshot:
        """Look for what the record does not name: a live ComfyUI of this checkout, or what is left of the other."""
        run_id = record.run_id if record is not None and record.pid is not None else None
        found = comfyui_processes(self._checkout, scan)
        strangers = [one for one in found if not run_id or process_table().marker(one.pid) != run_id]
        if strangers:
            return Snapshot(RUNNING, record, strangers[0], "untracked")
        if record is None or not run_id or note == "rebooted":
            return Snapshot(state, record, None, note)
        # On Windows a ComfyUI that restarts itself, as ComfyUI-Manager has it do, goes on under another PID; elsewhere
        # it keeps its own, and a worker that it forked has the same command line.
        for process in found if IS_WINDOWS else []:
            if self._serves(process, record.port):
                moved = ProcessState(**{**vars(record), "pid": process.pid, "identity": identity_of(process)})
                return Snapshot(RUNNING, moved, process, "moved")
        user = record.owner if record.uid is None else record.uid
        relics = process_tree(Process(0, uid=user), record.run_id, record.alive)
        scripts = [script for relic in relics for script in scripts_of(relic, "main.py")]
        is_ours = all(
            same_path(script, main_script(self._checkout)) for script in scripts
        )  # a forged record names another's run
        return Snapshot(state, record, None, note, relics if is_ours else [])

    @staticmethod
    def _serves(process: Process, port: int) -> bool:
        """Tell whether a process, or one of its family, listens on a port."""
        listeners = process_table().listeners(port)
        return process.pid in listeners or bool(listeners) and any(one.pid in listeners for one in family_of(process))

    def is_running(self) -> bool:
        """Tell whether a ComfyUI of this environment is alive. Asks only for the process, and changes nothing."""
        return self.observe().process is not None

    def report(self, timeout: float = 1.0) -> dict[str, Any]:
        """Return all that `status` tells, with a health check of at most `timeout` seconds. See `describe`."""
        snapshot = self.observe()
        answer = look_at(self.config_of(snapshot), timeout) if snapshot.process else Answer(REFUSED)
        return self.describe(snapshot, answer)

    def queue(self, timeout: float = 2.0) -> Optional[tuple[int, int]]:
        """Return (running, pending) prompts; None when nothing runs or does not answer within `timeout` seconds."""
        snapshot, began = self.observe(), time.monotonic()
        if snapshot.process is None:
            return None
        config = self.config_of(snapshot)
        is_its_own = is_port_bound(config.port, snapshot.process.pid)  # so the answer will be, too
        if (
            not is_its_own
            and self._own_answer(snapshot, config, look_at(config, timeout, with_queue=False)).kind != HEALTHY
        ):
            return None
        return queue_counts(config, max(0.0, began + timeout - time.monotonic()))

    def config_of(self, snapshot: Snapshot) -> ComfyUIConfig:
        """Return where the ComfyUI of a snapshot listens, by its arguments."""
        record = snapshot.record
        if record is None or snapshot.note == "untracked":
            return config_told_by(arguments_of(snapshot.process) if snapshot.process else [])
        if record.tls is not None:
            return ComfyUIConfig(record.host, record.port, record.tls)
        return config_told_by(record.args)

    def watch(self, pause: float) -> "Iterator[tuple[Snapshot, Optional[int]]]":
        """Yield (snapshot, exit code) of ComfyUI now, every `pause` seconds, and at once when it ends; never end.

        Once it has ended a snapshot has no process; the exit code is told once, where the system tells it. A restart,
        by whomever, is one more process: who watches decides when to go.
        """
        snapshot = self.observe()
        ended = snapshot.record.pid if snapshot.record is not None and snapshot.process is None else None
        code = exit_code_of(ended) if ended else None
        while True:
            yield snapshot, code
            process, code = snapshot.process, None
            if process is None:
                time.sleep(max(pause, 0.2))  # now a look is one at all processes
            else:
                with exit_code_kept(process.pid):
                    while not wait_for_exit(process, pause, pause=min(pause, 1.0)):
                        yield snapshot, None
                    code = exit_code_of(process.pid)
            snapshot = self.observe()

    def wait_until_ready(self, seconds: float = START_GRACE, tell: Progress = no_progress) -> None:
        """Wait for ComfyUI's first healthy answer, and record it; `tell` hears of the waiting.

        Raises CDEnvironmentError: code "ended" when ComfyUI ends first, "timeout" when the time is up: then it runs on.
        """
        began = time.monotonic()
        for snapshot, code in self.watch(0.1):
            config, waited = self.config_of(snapshot), time.monotonic() - began
            if snapshot.process is None and snapshot.state != STARTING:
                if code is not None and snapshot.record is not None:
                    self.amend_record(snapshot.record.run_id, last_exit={"code": code, "at": utc_now()})
                raise self._ended("before it answered", code)
            answer = look_at(config, 1.0, with_queue=False) if snapshot.process else Answer(REFUSED)
            if snapshot.process and self.describe(snapshot, answer)["state"] == RUNNING:
                return self.amend_record(seconds=0.5, last_health_check=utc_now(), health_status=HEALTHY)
            if waited > seconds:
                message = f"Not ready after {seconds:g} s, still starting."
                raise CDEnvironmentError(message, ["Watch it: ", ("-e", self.name, "logs", "-f")], "timeout")
            tell(f"   Waiting for ComfyUI to answer on {local_url(config)} ... {waited:.0f} s")

    def _ended(self, when: str, code: Optional[int]) -> CDEnvironmentError:
        """Return the error of a ComfyUI that has ended, with the reason that its log gives."""
        reason = last_error_line(self._end_of_session()[0], code)
        how = "" if code is None else f" ({format_exit(code)})"
        message = f"ComfyUI ended {when}{how}" + (f": {reason}" if reason else ".")
        return CDEnvironmentError(message, ("-e", self.name, "logs"), "ended")

    @property
    def url(self) -> Optional[str]:
        """Where the ComfyUI that runs can be opened on this machine; None when none runs."""
        snapshot = self.observe()
        return local_url(self.config_of(snapshot)) if snapshot.process else None

    def describe(self, snapshot: Snapshot, answer: Answer) -> dict[str, Any]:
        """Return a snapshot and a probe as one JSON-ready object: UTC ISO times, seconds, bytes."""
        record, process, state = snapshot.record, snapshot.process, snapshot.state
        config, is_complete = self.config_of(snapshot), self.is_complete
        monitor: dict[str, Any] = (record.monitor if record else None) or {}
        restarts, missing, script = monitor.get("restarts"), None, main_script(self._checkout)
        with suppress(OSError):  # what may not be looked at is not missing
            missing = None if not is_complete or is_there(script) else script
        if process is not None:
            answer = self._own_answer(snapshot, config, answer)
            was_healthy = record is not None and record.health_status == HEALTHY
            is_young = process.age() < START_GRACE and process.state != "stopped" and not was_healthy
            is_late = answer.kind in (TIMEOUT, BAD_ANSWER) or not is_young
            state = RUNNING if answer.kind == HEALTHY else UNRESPONSIVE if is_late else STARTING
        is_told = answer.kind in (HEALTHY, OTHER_SERVICE, BAD_ANSWER)
        health = answer.kind if is_told else STARTING if state == STARTING else "unhealthy"
        facts = answer.facts if state == RUNNING else {}
        return {
            "name": self.name,
            "state": state,
            "note": snapshot.note or None,
            "demo": self.manifest.demo,
            "complete": is_complete,
            "resume": None if is_complete else create_command(self.paths),
            "missing": missing,
            "pid": process.pid if process else None,
            "host": config.host if process else None,
            "port": config.port if process else None,
            "url": local_url(config) if process else None,
            "health": health if process else None,
            "queue": {"running": answer.queue[0], "pending": answer.queue[1]} if answer.queue else None,
            "version": facts.get("version") or self.manifest.comfyui_version,
            **{key: facts.get(key) for key in ("python", "device", "vram")},
            "monitor": {
                "alive": self.monitor_process(record) is not None,
                "restarts": len(restarts) if isinstance(restarts, list) else 0,
                "gave_up": monitor.get("gave_up"),
            }
            if monitor
            else None,
            "uptime": round(process.age(), 3) if process else None,
            "relics": [{"pid": one.pid, "command": one.text} for one in snapshot.relics],
            "started_at": record.started_at if record else None,
            "args": record.args if record else [],
            "log": self.log_path if record is None else record.log_path if record.has_log else None,
            "machine": self._machine_of(record) if state == FOREIGN else None,
            **dict.fromkeys(("last_alive", "last_error", "exit_code")),
            **(self.last_words(record) if record and state == CRASHED else {}),
        }

    def _own_answer(self, snapshot: Snapshot, config: ComfyUIConfig, answer: Answer) -> Answer:
        """Return what a probe met, now that it is known whose answer that is: argv or port must be our own."""
        process = snapshot.process
        if process is None or answer.kind not in (HEALTHY, OTHER_SERVICE):
            return answer
        if answer.argv and is_own_argv(answer.argv, process, main_script(self._checkout)):
            return answer
        is_its_own, is_comfyui = self._serves(process, config.port), answer.kind == HEALTHY
        return answer if is_its_own == is_comfyui else Answer(BAD_ANSWER if is_its_own else OTHER_SERVICE)

    def monitor_process(self, record: Optional[ProcessState]) -> Optional[Process]:
        """Return the living monitor that a record names, if it is our own entry for this environment, else None."""
        process = recorded_process(record.monitor, record.owner, record.uid) if record is not None else None
        if process is None or not is_python(process.name):
            return None
        head, _, place = process.text.rpartition(" --monitor ")
        is_entry = IMPORTED.partition("{}")[0] in head or runs_script(process, own_command()[-1])
        return process if is_entry and same_path(place, self.paths.root) else None

    def keeper_of(self, record: Optional[ProcessState]) -> Optional[Process]:
        """Return the other process that alone may start ComfyUI again, while it lives: its monitor or its `run -f`."""
        keeper = self.monitor_process(record)
        if keeper is None and record is not None and record.starter.get("keeps"):
            keeper = recorded_starter(record)
        return keeper if keeper is not None and keeper.pid != os.getpid() else None

    @staticmethod
    def _machine_of(record: Optional[ProcessState]) -> str:
        identity = record.subject[1] if record else {}
        return str(identity.get("host") or identity.get("machine") or "unknown")

    def last_words(self, record: ProcessState) -> dict[str, Any]:
        """Return of a run that ended by itself the exit code, last error line, last health check or line (UTC)."""
        code, (end, is_last) = (record.last_exit or {}).get("code"), self._end_of_session()
        signs = [os.stat(record.log_path).st_mtime] if is_last and os.path.exists(record.log_path) else []
        with suppress(ValueError):
            signs.append(epoch_of(record.last_health_check))
        last_alive = utc_now(max(signs)) if signs else None
        return {"last_alive": last_alive, "last_error": last_error_line(end, code), "exit_code": code}

    # The log -------------------------------------------------------------------------

    def session_offset(self) -> int:
        """Return where this run begins in the log. Raises OSError when there is no log."""
        record = self._read_state()
        with open_regular(self.log_path) as log:
            here = os.fstat(log.fileno())
            is_recorded = record is not None and record.log_inode == here.st_ino and record.log_offset <= here.st_size
            return record.log_offset if record and is_recorded else find_session(log, here.st_size)

    def _end_of_session(self) -> tuple[str, bool]:
        """Return what the last 64 KB of the log have of this run, and whether no start that was refused follows it."""
        try:
            start = self.session_offset()
            with open_regular(self.log_path) as log:
                begin = max(start, os.fstat(log.fileno()).st_size - BLOCK)
                log.seek(begin)
                piece = log.read(BLOCK)
        except OSError:
            return "", True
        mark = SESSION_MARK.encode()
        if begin > start and piece.startswith(mark):
            return "", False
        own, others, _ = piece.partition(b"\n" + mark)
        return own.decode("utf-8", "replace"), not others

    def moved_log(self, snapshot: Snapshot) -> Optional[str]:
        """Return the file into which ComfyUI writes where its log was moved away (by logrotate), else None."""
        has_log = snapshot.record is not None and snapshot.record.has_log and snapshot.note != "untracked"
        path = output_of(snapshot.process) if has_log and snapshot.process else None
        return path if path and not same_path(path, self.log_path) else None

    def claimed_port(self) -> "Optional[tuple[int, str]]":
        """Return (port, words for who has it) when this environment runs or is starting, by its record alone."""
        try:
            record = self._read_state()
        except OSError:  # closed to us: one environment must not keep the others from starting
            return None
        if (
            record is None or subject_of(record, self.python, main_script(self._checkout)) is None
        ):  # or it is another machine's
            return None
        return record.port, f"environment '{self.name}' (PID {record.subject[0]})"

    def rotate_log(self, keep: Optional[int] = None) -> bool:
        """Move the log to `.old` while ComfyUI keeps writing, losing no line; `keep` old ones stay (None: as many).

        Most is copied while ComfyUI writes; for the rest its processes stand still for some milliseconds. Returns False
        when there is nothing to rotate. Raises CDEnvironmentError, OSError.
        """
        self.finish_rotation()
        with self._process_lock("logs --rotate"):
            snapshot = self.observe(lock_held=True)
            path, draft, moved = self.log_path, rotation_draft(self.log_path), self.moved_log(snapshot)
            if moved is not None:  # ComfyUI goes on into the moved file, which is the log again from now on
                if log_size(path):
                    move_log(path, keep)
                replace_file(moved, path)
            if log_size(path) == 0:
                return False
            self._refuse_foreign(snapshot)
            if snapshot.process is None:
                move_log(path, keep)
                return True
            record = self._own_record(snapshot, snapshot.process)
            remove_file(draft)
            try:
                copied = copy_log(path, draft, 0, spare=1 << 20)
                record.phase = "rotating"
                self._write_state(record)
                with paused(family_of(snapshot.process)):
                    copy_log(path, draft, copied, spare=0)
                    shift_old_logs(path, keep)
                    replace_file(draft, rotated(path))
                    self._start_log_anew(record)
            finally:
                remove_file(draft)
                record.phase = "running"
                self._write_state(record)
            return True

    def _start_log_anew(self, record: ProcessState) -> None:
        empty_log(self.log_path)
        log, record.log_offset, record.log_inode = begin_session(self.log_path, record.run_id, self.name)
        log.close()

    def finish_rotation(self) -> None:
        """Finish a rotation that was killed: resume the processes that it left standing still."""
        record = self._read_state()
        if record is None or record.phase != "rotating":
            return
        with suppress(CDEnvironmentError), self._process_lock("repair", 0.0):  # else it is at work just now
            record = self._read_state()
            if record is None or record.phase != "rotating":
                return
            path, process = self.log_path, subject_of(record, self.python, main_script(self._checkout))
            was_moved = not os.path.exists(rotation_draft(path)) and same_beginning(path, rotated(path))
            if was_moved and os.path.getsize(path) == os.path.getsize(rotated(path)):
                self._start_log_anew(record)
            remove_file(rotation_draft(path))
            for member in family_of(process) if process is not None else []:
                resume(member)
            record.phase = "running"
            self._write_state(record)

    # Starting ------------------------------------------------------------------------

    _parse_comfyui_args = staticmethod(parse_comfyui_args)

    def run(
        self,
        args: Optional[list[str]] = None,
        *,
        auto_port: bool = False,
        set_env: Optional[dict[str, str]] = None,
        take_over: bool = False,
        monitored: bool = False,
        wait: Optional[float] = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Start ComfyUI as a detached daemon; it answers seconds to minutes later (`wait_until_ready`).

        `auto_port` takes the next free port when the asked one is in use; `set_env` are variables for ComfyUI, kept in
        the state file and repeated by `restart`; `take_over` drops the record of another machine or PID namespace;
        `monitored` records this very process as the monitor; `wait` is how many seconds to wait for the first healthy
        answer (None: not at all). The result's stdout is "Started on host:port".
        Raises CDEnvironmentError when it runs already, the port is taken, Python or main.py is missing, ComfyUI refuses
        its arguments or ended at once, and as `wait_until_ready`; OSError when a file cannot be written.
        """
        words = list(args or [])
        if isinstance(args, str) or not is_text_list(words):
            raise TypeError("args is a list of str, one word each")
        with self._about_to_start("run") as snapshot:
            record, leaving = snapshot.record, snapshot.process if snapshot.note != "untracked" else None
            if leaving and record and record.desired_state == STOPPED and wait_for_exit(leaving, LEAVING_SECONDS):
                snapshot = self.observe(lock_held=True)  # told so by a stop that was broken off then
            self._require_not_running(snapshot, take_over)
            launch = self._launch(words)
            launch.set_env, launch.auto_port = set_env or {}, auto_port
            launch.monitor = own_monitor() if monitored else None
            self._end_relics(snapshot.relics)
            done = self._start(launch)
        if wait is not None:
            self.wait_until_ready(wait)
        return done

    def require_comfyui(self) -> None:
        """Raise CDEnvironmentError where the creation broke off or the checkout is gone, OSError where it is closed."""
        if not self.is_complete:
            message = f"Environment '{self.name}' is not complete."
            raise CDEnvironmentError(message, ["Go on with: ", create_command(self.paths)], "incomplete")
        script = main_script(self._checkout)
        if not is_there(script):
            message = f"Environment '{self.name}' has no ComfyUI: {script} is missing."
            if self.manifest.comfyui_path:
                raise CDEnvironmentError(message, ("create", self.name, "--from", "FOLDER"), "missing")
            raise CDEnvironmentError(message, ["Create it again after: ", ("delete", self.name)], "missing")

    @contextmanager
    def _about_to_start(self, purpose: str, seconds: float = LOCK_SECONDS) -> Iterator[Snapshot]:
        """Hold the process lock and yield what there is to see, once all is there that a start needs."""
        if is_half_updated(self.paths):
            with self.nodes.changing("put ComfyUI back"):
                pass  # it is back now
        with self._process_lock(purpose, seconds):
            self.require_comfyui()  # asked only now: who had the lock may have deleted all
            if is_half_updated(self.paths):
                raise CDEnvironmentError("An update of ComfyUI was interrupted.", ("repair",), "updating")
            if not is_there(self.python):
                message = f"The Python of environment '{self.name}' is missing: {self.python}"
                anew = "Make a venv there with what ComfyUI needs, or create it again after: "
                hint: Hint = [anew, ("delete", self.name)]
                if self.manifest.comfyui_path:
                    hint = ("create", self.name, "--from", self._checkout, "--python", "PATH")
                raise CDEnvironmentError(message, hint, "missing")
            if not os.access(self.python, os.X_OK):
                raise CDEnvironmentError(f"{self.python} cannot be run here: Permission denied.", code="closed")
            yield self.observe(lock_held=True)

    def _require_not_running(self, snapshot: Snapshot, take_over: bool) -> None:
        if take_over and snapshot.state == FOREIGN:
            snapshot = self._compared(None, "", None, True)
        self._refuse_foreign(snapshot)
        if snapshot.process is not None:
            record = self._own_record(snapshot, snapshot.process)
            message = f"ComfyUI is already running (PID {snapshot.process.pid}, port {record.port})."
            raise CDEnvironmentError(message, ("-e", self.name, "restart"), "running")
        if snapshot.note == "damaged":
            if os.path.islink(self.paths.state):
                message = f"{self.paths.state} is a link, which is not followed here."
                raise CDEnvironmentError(message, f"rm {self.paths.state}", "damaged")
            set_aside(self.paths.state)

    def _refuse_foreign(self, snapshot: Snapshot) -> None:
        if snapshot.state == FOREIGN:
            raise CDEnvironmentError(
                f"Environment '{self.name}' was started on another machine or in another container"
                f" ({self._machine_of(snapshot.record)}); whether it still runs there cannot be seen from here.",
                ["Stop it there, or: ", ("-e", self.name, "run", "--take-over")],
                "foreign",
            )

    def _parser_text(self) -> str:
        return read_any_text(os.path.join(self._checkout, "comfy", "cli_args.py"))

    def opens_browser(self, args: list[str]) -> bool:
        """Tell whether `args` ask for a browser, which ComfyUI is then kept from opening: we do, once it answers."""
        asking, other = (("--auto-launch", "--au"), ("--windows-standalone-build", "--w")), "--disable-auto-launch"
        is_asked = any(_is_flag(word, *flag) for word in args for flag in asking)
        return is_asked and other not in args and other in self._parser_text()

    def _launch(self, args: list[str]) -> Launch:
        """Return what `args` mean, by ComfyUI's own parser where it can be asked. Raises CDEnvironmentError."""
        import inspect

        interpreter, folder, own = [self.python], self._checkout, os.path.dirname(self.python)
        if os.path.basename(own) == "python_embeded":  # the portable build's runs in its own root
            interpreter, folder = [self.python, "-s"], os.path.dirname(own)
        variables = {key: value for key, value in inherited_environment().items() if key not in DROPPED_VARIABLES}
        variables.pop("PYTHONUNBUFFERED", None)  # ComfyUI wraps its streams: its output would be held back longer
        variables = {**with_interpreter(variables, self.python), "PYTHONIOENCODING": "utf-8"}
        text, shared = self._parser_text(), models_folder(self.manifest.models_path)
        added = ["--disable-auto-launch"] if "--disable-auto-launch" in text else []  # its browser would end with it
        launch = Launch(args, parse_comfyui_args(args), interpreter, folder, variables, added)
        if not text and shared is None:
            return launch

        try:
            program = inspect.getsource(print_parsed_arguments) + "\n\nprint_parsed_arguments()"
            command = [*interpreter, "-c", program, self._checkout, "folders" if shared else "", *args]
            done = run_command(command, folder, {**variables, "PYTHONDONTWRITEBYTECODE": "1"}, PARSER_SECONDS)
            flags, *told = [json.loads(line) for line in done.stdout.splitlines()]
            if done.returncode != 2:
                tls = bool(told[0]["tls_keyfile"] and told[0]["tls_certfile"])
                config = ComfyUIConfig(told[0]["listen"], told[0]["port"], tls)
                launch.added += self._words_for_models(shared, told[0], told[1:])
                launch.config, launch.told = config, told[0]
                return launch
        except (CDEnvironmentError, OSError, ValueError, KeyError, TypeError, IndexError):
            if shared is not None:
                message = "This ComfyUI does not tell its model folders."
                raise CDEnvironmentError(message, ("models", self.name, "--off"), "models") from None
            return launch  # another parser than we know, or a Python that does not start
        reason = done.stderr.strip().rpartition("\n")[2].partition("error: ")[2]
        close = closest_flag(reason, flags)
        hint = f"did you mean {close}?" if close else ""
        raise CDEnvironmentError(f"ComfyUI refuses its arguments: {reason}", hint, "usage")

    def _start(self, launch: Launch, previous: Optional[ProcessState] = None) -> "subprocess.CompletedProcess[str]":
        """Intent, log, process, record, watch. Whatever fails before the record leaves all as it was."""
        from subprocess import CompletedProcess

        previous = previous or self._read_state()
        with self._alive_lock() or nullcontext() as alive:
            record = self._write_intent(launch, alive)
            child = None
            try:
                rotate_at_start(self.log_path)
                log, record.log_offset, record.log_inode = begin_session(self.log_path, record.run_id, self.name)
                environ = {**launch.variables, **record.env, RUN_ID_VARIABLE: record.run_id or ""}
                handed = (alive.fileno(),) if alive else ()
                with log:
                    child = create_background_process(record.command, launch.folder, log, environ, handed)
                record.pid, record.phase = child.pid, "running"
                process = process_table().process(child.pid)
                record.identity, record.uid = identity_of(process), process.uid if process is not None else own_user()
                record.started_at = utc_now()
                self._write_state(record)
            except BaseException:
                process = process_table().process(child.pid) if child is not None else None
                if process is not None:
                    end_all([process, *process_tree(process, None)])
                    reap(process.pid)
                self._write_state(previous)
                raise
        if not launch.told:
            self._watch_first_moments(child, record, previous)
        self._process = child
        return CompletedProcess(record.command, 0, f"Started on {record.host}:{record.port}", "")

    def _alive_lock(self) -> "Optional[BinaryIO]":
        """Return the lock that ComfyUI will hold while it lives; to unlock it here would free it for ComfyUI, too."""
        if this_machine()["pid_ns"] is None:
            return None
        with suppress(OSError):
            lock = until(lambda: take_lock(self.paths.alive), 1.0)
            if lock is None:
                message = f"A process that an earlier ComfyUI left holds {self.paths.alive} and does not end."
                raise CDEnvironmentError(message, ("repair", "--orphan"), "stranger")
            return lock
        return None

    def _write_intent(self, launch: Launch, alive: "Optional[BinaryIO]") -> ProcessState:
        """Choose the port and write down what is about to start, so that no other environment takes the port."""
        with workspace_lock(self.workspace_paths, "run"):
            config, args = launch.config, launch.args
            try:
                self.require_free_port(config)
            except CDEnvironmentError:
                if not launch.auto_port:
                    raise
                config.port = next_free_port(config.port + 1, config.host, self._taken_ports())
                args = with_port(args, config.port)
            record = ProcessState(None, config.host, config.port, args, utc_now(), self.log_path, phase=STARTING)
            record.run_id, record.env, record.monitor = os.urandom(16).hex(), launch.set_env, launch.monitor
            record.command = [*launch.interpreter, main_script(self._checkout), *args, *launch.added]
            record.cwd, record.tls = launch.folder, config.tls
            record.starter = {**ourselves(), "interrupt_ignored": not passes_interrupt_on(), "keeps": self.is_keeper}
            if alive is not None:
                here = os.fstat(alive.fileno())
                record.alive = {"dev": here.st_dev, "ino": here.st_ino}
            self._write_state(record)
        return record

    def require_free_port(self, config: ComfyUIConfig) -> None:
        """Raise CDEnvironmentError when a program or another environment has the port of `config`."""
        taken = self._taken_ports()
        if config.port in taken or is_port_bound(config.port, host=config.host):
            raise self._port_in_use(config, taken)

    def _port_in_use(self, config: ComfyUIConfig, taken: dict[int, str]) -> CDEnvironmentError:
        port = config.port
        holder = taken.get(port) or "; ".join(f"{process.name}, PID {process.pid}" for process in port_holders(port))
        try:
            free = str(next_free_port(port + 1, config.host, taken))
        except CDEnvironmentError:
            free = "NUMBER"
        return CDEnvironmentError(
            f"Port {port} is already in use" + (f" by {holder}." if holder else "."),
            [
                "Possible solutions:\n  • Stop the other service using this port\n  • Use a different port: ",
                ("run", "--port", free),
                "\n  • Let comfydock choose one: ",
                ("run", "--auto-port"),
                f"\n  • Check what's using the port: lsof -i:{port} (Unix) or netstat -ano | findstr :{port} (Windows)",
            ],
            "port",
        )

    def _watch_first_moments(
        self, child: "subprocess.Popen[bytes]", record: ProcessState, previous: Optional[ProcessState]
    ) -> None:
        """Raise CDEndedError when ComfyUI ends before it says anything but a usage text; of code 2 nothing stays."""
        with suppress(OSError), open_regular(self.log_path, buffering=0) as log:

            def is_decided() -> bool:
                log.seek(record.log_offset)
                said = log.read(BLOCK).partition(b"\n")[2]  # behind the header
                return child.poll() is not None or b"\n" in said and not said.startswith(b"usage:")

            until(is_decided, FIRST_LINE_SECONDS, 0.02)
        code = child.poll()
        if code is None:
            return
        error, flags = self._ended("at once", code), re.findall(r"--[\w-]+", self._end_of_session()[0])
        record.last_exit = {"code": code, "at": utc_now()}
        with suppress(OSError):  # on a full disk it is told all the same
            self._write_state(previous if code == 2 else record)
        close = closest_flag(error.message, flags)
        raise CDEndedError(error.message, f"did you mean {close}?" if close else error.hint, code)

    def _end_relics(self, relics: list[Process]) -> None:
        if relics:
            self.tell("Ending what the last run left: " + ", ".join(f"PID {one.pid}" for one in relics))
            end_all(relics)

    def _own_record(self, snapshot: Snapshot, process: Process) -> ProcessState:
        """Return the record of a process; it is written where there is none, and the marker is of a run of ours.

        Such a marker is in the old record, or in the log's last header. Raises CDEnvironmentError for another's.
        """
        record = snapshot.record
        if record is not None and snapshot.note not in ("untracked", "moved"):
            return record
        run_id = process_table().marker(process.pid)
        is_ours = bool(run_id) and record is not None and record.run_id == run_id
        if run_id and not is_ours:
            with suppress(OSError), open_regular(self.log_path) as log:
                log.seek(find_session(log, os.fstat(log.fileno()).st_size))
                is_ours = log.read(200).startswith(f"{SESSION_MARK}{run_id} ".encode())
        if not is_ours or process.uid not in (own_user(), os.stat(self.paths.cec).st_uid, None):
            message = f"PID {process.pid} runs this ComfyUI ({self._checkout}), but environment '{self.name}' did not"
            raise CDEnvironmentError(f"{message} start it.", ("-e", self.name, "repair", "--orphan"), "stranger")
        return self.adopt(process, record, run_id)

    def adopt(self, process: Process, record: Optional[ProcessState], run_id: str) -> ProcessState:
        """Write the record of a ComfyUI process of this checkout. The caller holds the process lock."""
        if record is None or not run_id or record.run_id != run_id:
            began = utc_now(process.created) if process.created is not None else utc_now()
            args = arguments_of(process)
            record = ProcessState(process.pid, DEFAULT_HOST, DEFAULT_PORT, args, began, self.log_path)
            record.run_id = run_id or None
        config = self.config_of(Snapshot(RUNNING, record, process))
        record.pid, record.host, record.port = process.pid, config.host, config.port
        record.phase, record.desired_state, record.command = "running", "running", process.command
        record.identity, record.uid, record.owner = identity_of(process), process.uid, process.uid
        if self._read_state() is None and os.path.lexists(self.paths.state):
            set_aside(self.paths.state)
        self._write_state(record)
        return record

    # Nodes ---------------------------------------------------------------------------

    def add_node(self, identifier: str, *options: Any, **more: Any) -> NodeOperationResult:
        """Add a custom node: a registry id, a git address or a folder. See `NodeManager.add_node` for the options."""
        return self.nodes.add_node(identifier, *options, **more)

    def remove_node(self, identifier: str) -> NodeRemovalResult:
        """Remove a custom node. See `NodeManager.remove_node`."""
        return self.nodes.remove_node(identifier)

    def update_node(self, identifier: str, *options: Any, **more: Any) -> UpdateResult:
        """Bring a custom node to its newest version. See `NodeManager.update_node` for the options."""
        return self.nodes.update_node(identifier, *options, **more)

    def sync(self) -> SyncReport:
        """Install what the manifest has and the disk lacks, before a start. Costs almost nothing when nothing changed.

        Raises CDEnvironmentError, with a hint that names --no-sync, when something could not be put right.
        """
        hint = ["To start it as it is: ", ("-e", self.name, "run", "--no-sync")]
        try:
            if self.nodes.is_synced() or self.is_running():  # what runs is not changed: `run` will refuse
                return SyncReport()
            report = self.nodes.sync()
        except CDEnvironmentError as error:
            message = f"What the environment needs could not be installed: {error.message}"
            raise CDEnvironmentError(message, hint, "sync") from error
        if report.problems:
            message = f"Missing nodes could not be installed: {'; '.join(report.problems)}"
            raise CDEnvironmentError(message, hint, "sync")
        return report

    # Updating ComfyUI ----------------------------------------------------------------

    def update(
        self,
        to: Optional[str] = None,
        *,
        check: bool = False,
        force: bool = False,
        no_try: bool = False,
        confirm: "Optional[Callable[[], object]]" = None,
    ) -> dict[str, Any]:
        """Bring ComfyUI and its packages to its newest version, or to the tag, branch or commit `to`, or change none.

        The new version is started once beside the user's things, unless `no_try`. `check` only looks what is new;
        `force` puts the user's own changes in the checkout on a branch; `confirm` is called before ComfyUI is stopped.
        Returns {"old", "new": names of versions, "changed", "available"}. Raises CDEnvironmentError; the old version is
        back then, and started again if it ran.
        """
        self.require_comfyui()
        with self._updating(stopped=False) as update:
            old, new = update.current(), update.find(to)
            result = {"old": old.name, "new": new.name, "changed": False, "available": new.commit != old.commit}
            if check or new.commit == old.commit:
                return result
            update.fetch(new)
            update.own_work(new, force, *(("--to", to) if to else ()))
            update.try_packages(new)
        if confirm is not None:
            confirm()
        with self._updating(stopped=True) as update:
            if update.current() != old:
                raise CDEnvironmentError("ComfyUI was changed by another command.", ("update",), "changed")
            update.keep(new, update.own_work(new, force), self._databases())
            update.change(new)
            if not no_try and os.path.exists(self.python):
                self._try_start()
            update.confirm()
        return {**result, "changed": True}

    def go_back(self, *, force: bool = False, with_databases: bool = False) -> dict[str, Any]:
        """Return to what was before the last update: commit, packages, nodes, and `with_databases` ComfyUI's database.

        `force` and the result are those of `update`. Raises CDEnvironmentError (code "no-way-back").
        """
        self.require_comfyui()
        for stopped in (False, True):  # what is in the way is found before ComfyUI is stopped
            with self._updating(stopped) as update:
                before = update.before
                if before.get("phase") != "kept":
                    message = f"Environment '{self.name}' has no update to go back from."
                    raise CDEnvironmentError(message, ("history",), "no-way-back")
                version = CodeVersion(before["old"], before["worktree"], "", before["branch"])
                own = update.own_work(version, force, "--back")
                if stopped:
                    update.go_back(own, with_databases)
        return {"old": before["new"], "new": before["old"], "changed": True, "available": False}

    @contextmanager
    def _updating(self, stopped: bool) -> Iterator[ComfyUIUpdate]:
        """Hold the content lock, with ComfyUI stopped meanwhile if it is to be; after a failure the old one is back."""
        with self.nodes.changing("update"):
            update, was_running = ComfyUIUpdate(self.nodes), stopped and self.stop_for_restart()
            try:
                with self.idle("update") if stopped else nullcontext():
                    try:
                        yield update
                    finally:
                        update.put_back()
            except BaseException:
                with suppress(CDEnvironmentError):
                    was_running = was_running and not self.restart()
                raise
            if was_running:
                self.restart()

    def _databases(self) -> list[str]:
        """Return the files that ComfyUI's database may be in, as far as they are there."""
        last = self.last_record()
        told = self._launch(last.args if last else []).told
        user = os.path.join(told.get("base_directory") or self._checkout, "user")
        folders = [told.get("user_directory") or user, os.path.join(self._checkout, "user")]
        paths = [os.path.join(one, "comfyui.db") for one in folders]
        paths.insert(0, (told.get("database_url") or "").partition("sqlite:///")[2])
        return [path for path in dict.fromkeys(map(os.path.abspath, filter(None, paths))) if os.path.isfile(path)]

    def _trial(self) -> "Environment":
        """Return this environment with a record, a lock and a log of its own."""
        trial = Environment(os.path.join(self.name, "update"), self.workspace_paths)
        trial._taken_ports = self._taken_ports
        trial.paths, apart = EnvironmentPaths(self.paths.root), EnvironmentPaths(os.path.join(self.paths.before, "try"))
        for name in ("state", "last_run", "lock", "alive", "before_record"):
            setattr(trial.paths, name, getattr(apart, name))
        return trial

    def _end_trial(self) -> None:
        trial = self._trial()
        if os.path.exists(trial.paths.state):
            trial.stop()

    def _try_start(self) -> None:
        """Start ComfyUI until it answers, away from the user's temp folder and database. Raises CDEnvironmentError."""
        last, trial = self.last_record(), self._trial()
        folder = os.path.dirname(trial.paths.state)
        make_folder(os.path.join(folder, "user"))
        database = "sqlite:///" + os.path.join(folder, "comfyui.db").replace("\\", "/")
        flags = {"temp-directory": folder, "user-directory": os.path.join(folder, "user"), "database-url": database}
        port = DEFAULT_PORT + 1000 + os.getpid() % 10000  # another one than an update beside this one tries
        args = [*(last.args if last else []), "--listen", DEFAULT_HOST, "--port", str(port)]
        for flag, value in flags.items():
            args += [f"--{flag}", value] if f'"--{flag}"' in self._parser_text() else []
        self.tell("trying to start it")
        try:
            trial.run(args, auto_port=True, set_env=last.env if last else {})
            trial.wait_until_ready(TRY_SECONDS, self.tell)
        except CDEnvironmentError as error:
            message = f"The trial start failed: {error.message}"
            raise CDEnvironmentError(message, f"its log: {trial.log_path}", "trial") from error
        finally:
            self._end_trial()

    # Models of several environments --------------------------------------------------

    def set_models(self, folder: Optional[str]) -> None:
        """Use the models in `folder`, too, from the next start on; None: no longer. Raises CDEnvironmentError."""
        path = models_folder(folder)
        if self.manifest.demo:
            raise CDEnvironmentError("The demo has no models.", "", "usage")
        with self.nodes.changing(f"use the models in {path or 'its own folder alone'}"):
            change_settings(self.paths, {"models_path": path}, self.python)

    def _words_for_models(self, shared: Optional[str], told: dict[str, Any], folders: list[Any]) -> list[str]:
        """Return what to add for a shared models folder, after our file of more model paths is written (JSON is YAML).

        Where ComfyUI takes `--models-directory` the file adds its own models back; else the shared ones, as the first
        of all (is_default), so in reverse order.
        """
        if shared is None or told.get("models_directory") or same_path(folders[0][0], shared):
            return []
        (own, places), has_flag = folders[0], "models_directory" in told
        texts: dict[str, Any] = {} if has_flag else {"is_default": True}
        for name, paths in places.items():
            inside = [path for path in paths if path.startswith(os.path.join(own, ""))]
            if not has_flag:
                inside = [os.path.join(shared, os.path.relpath(path, own)) for path in reversed(inside)]
            texts.update({name: "\n".join(inside)} if inside else {})
        path = self.paths.models_config
        write_atomic(path, json.dumps({"comfydock": texts}, ensure_ascii=False, indent=1).encode())
        return ["--models-directory", shared] * has_flag + ["--extra-model-paths-config", path]

    # Orphans -------------------------------------------------------------------------

    def orphans(self) -> list[Process]:
        """Return the live ComfyUI processes of this checkout that the record does not name, started by whomever."""
        snapshot, tracked = self.observe(), set()
        if snapshot.process is not None and snapshot.note != "untracked":
            tracked = {member.pid for member in process_tree(snapshot.process, None)}
        return [process for process in comfyui_processes(self._checkout) if process.pid not in tracked]

    def take_back(self, process: Process) -> ProcessState:
        """Adopt an orphan as this environment's ComfyUI. Raises CDEnvironmentError when it has another."""
        with self._process_lock("repair"):
            snapshot = self.observe(lock_held=True)
            if snapshot.process is not None and snapshot.note != "untracked":
                message = f"Environment '{self.name}' has a ComfyUI already (PID {snapshot.process.pid})."
                raise CDEnvironmentError(message, ("-e", self.name, "stop"), "running")
            if not is_same_process(process):
                raise CDEnvironmentError(f"PID {process.pid} has ended.", ("status",), "ended")
            return self.adopt(process, snapshot.record, process_table().marker(process.pid))

    def end_orphan(self, process: Process, timeout: float = 10) -> None:
        """End an orphan and what it started. Raises CDEnvironmentError when it is another user's or does not end."""
        with self._process_lock("repair", timeout):
            end_with_family(process, timeout)

    def clean_stale(self) -> bool:
        """Clear a record of what no longer runs here; whether there was one. Damaged ones are kept beside it."""
        with self._process_lock("repair"):
            snapshot = self.observe(lock_held=True)
            if snapshot.process is not None or snapshot.state == FOREIGN or not os.path.lexists(self.paths.state):
                return False
            if snapshot.note == "damaged":
                set_aside(self.paths.state)
            self._end_relics(snapshot.relics)
            self._retire_state()
            return True

    # Stopping ------------------------------------------------------------------------

    def stop(
        self, timeout: float = 10, *, kill: bool = False, meanwhile: "Optional[Callable[[], bool]]" = None
    ) -> bool:
        """End ComfyUI and what it started: SIGINT, its only clean stop, then SIGTERM, SIGKILL at `timeout` seconds.

        `kill` goes straight to SIGKILL; `meanwhile` is called while waiting, and True from it does the same. Returns
        whether there was anything to stop. Raises CDEnvironmentError when it is another's, or does not end.
        """
        with self._lock_to_stop(timeout, kill):
            snapshot = self.observe(lock_held=True)
            self._refuse_foreign(snapshot)
            if snapshot.note == "damaged":
                raise self.damaged_state()
            if snapshot.process is not None:
                record = self._own_record(snapshot, snapshot.process)
                record.desired_state = STOPPED
                self._end(snapshot.process, record, 0 if kill else timeout, meanwhile)
            elif snapshot.record is None or snapshot.record.pid is None:
                self._clear_state()
                return False
            else:
                reap(snapshot.record.pid)
                self._end_relics(snapshot.relics)
            self._retire_state()
            return snapshot.process is not None or bool(snapshot.relics)

    @contextmanager
    def _lock_to_stop(self, seconds: float, is_kill: bool) -> Iterator[None]:
        """Hold the process lock; go on where there are no locks, or for a kill where its holder stands still."""
        holder = holder_of(self.paths.lock)[0] if is_kill else None
        is_barred = holder is not None and holder.state == "stopped"
        with ExitStack() as held:
            try:
                held.enter_context(self._process_lock("stop", 0.0 if is_barred else seconds))
            except CDEnvironmentError as error:
                if error.code != "no-locks" and not (is_barred and error.code == "locked"):
                    raise
                self.tell(error.message)
            yield

    def _retire_state(self) -> None:
        """The record is no longer of anything that runs: it becomes the last run, which `restart` starts again."""
        try:
            if self._read_state() is not None:
                replace_file(self.paths.state, self.paths.last_run)
            self._clear_state()
        except OSError as error:
            message = f"ComfyUI was stopped, but its record {self.paths.state} cannot be removed: {error.strerror}."
            raise CDEnvironmentError(message, ("-e", self.name, "status"), "system") from error

    @contextmanager
    def idle(self, purpose: str) -> Iterator[None]:
        """Hold the environment still while nothing of it runs. Raises CDEnvironmentError as `require_idle`."""
        with self._process_lock(purpose):
            self.require_idle(lock_held=True)
            yield

    def require_idle(self, lock_held: bool = False) -> None:
        """Raise CDEnvironmentError while a ComfyUI of this environment starts, runs, or may run elsewhere."""
        snapshot = self.observe(lock_held=lock_held)
        self._refuse_foreign(snapshot)
        if snapshot.process is not None or snapshot.state == STARTING:
            how = f"runs (PID {snapshot.process.pid})" if snapshot.process else "starts"
            message = f"ComfyUI {how} in environment '{self.name}'."
            raise CDEnvironmentError(message, ("-e", self.name, "stop"), "running")

    def damaged_state(self) -> CDEnvironmentError:
        """Return the error of a state file that is no record."""
        message = f"The state file of environment '{self.name}' is damaged, its ComfyUI is not running: "
        return CDEnvironmentError(message + self.paths.state, ("-e", self.name, "run"), "damaged")

    def _end(
        self, process: Process, record: ProcessState, timeout: float, meanwhile: "Optional[Callable[[], bool]]" = None
    ) -> None:
        """End a recorded process and its family, and its monitor unless the record wants a restart."""
        with suppress(OSError):  # a full disk must not keep anyone from stopping ComfyUI
            self._write_state(record)
        marker = process_table().marker(process.pid)
        family = process_tree(process, marker)
        inner = [process, *family]  # ComfyUI itself where the recorded process is a wrapper
        comfyui = next((one for one in inner if runs_script(one, main_script(self._checkout))), process)
        terminate(comfyui, timeout, meanwhile, bool(record.starter.get("interrupt_ignored")))
        wait_for_exit(process, 1.0)
        reap(process.pid)
        end_all([*family, *process_tree(process, marker)])
        monitor = self.monitor_process(record) if record.desired_state == STOPPED else None
        if monitor is not None and monitor.pid != os.getpid() and not wait_for_exit(monitor, 3):
            end_all([monitor])  # it goes by itself when ComfyUI was stopped

    # Starting again ------------------------------------------------------------------

    def last_record(self) -> Optional[ProcessState]:
        """Return the record of what runs or ran last."""
        return self._read_state() or read_state(self.paths.last_run)

    def stop_for_restart(self) -> bool:
        """Stop ComfyUI for a `restart` by this process, for which its keeper waits; tell whether it ran."""
        with self._process_lock("stop"):
            snapshot = self.observe(lock_held=True)
            if snapshot.process is None:
                return False
            record = self._own_record(snapshot, snapshot.process)
            record.desired_state = RESTART if self.keeper_of(record) else STOPPED
            record.starter["waits_for"] = ourselves()
            self._end(snapshot.process, record, 10)
            return True

    def restart(self, timeout: float = 10) -> bool:
        """Stop ComfyUI if it runs, and start it with the arguments and variables it was started with.

        Python, main.py, log, record and port are checked before anything is stopped. While it has a keeper, that one
        starts it, as its child. Returns True. Raises CDEnvironmentError when nothing was ever started or something
        stands in the way.
        """
        with self._about_to_start("restart", timeout) as snapshot:
            self._refuse_foreign(snapshot)
            if snapshot.note == "damaged":
                raise self.damaged_state()
            process = snapshot.process
            record = self._own_record(snapshot, process) if process is not None else self.last_record()
            if record is None:
                message = f"Cannot restart: ComfyUI not running in environment '{self.name}', and it never was."
                raise CDEnvironmentError(message, ("-e", self.name, "run"), "stopped")
            self._require_own_record(record)
            launch = self._launch(record.args)
            make_folder(os.path.dirname(self.log_path))
            open_append(self.log_path).close()
            keeper, port = self.keeper_of(record), record.port
            is_bound = process is not None and process_table().listeners(port) and is_port_bound(port, host=record.host)
            if process is not None and is_bound and not self._serves(process, port):  # taken while it was importing
                raise self._port_in_use(ComfyUIConfig(record.host, port), {})
            if process is not None or keeper is not None:
                record.desired_state = RESTART if keeper else STOPPED
                record.starter.pop("waits_for", None)
                self._write_state(record)  # a full disk shows now, not when ComfyUI is down already
            if process is not None:
                self._end(process, record, timeout)
            self._end_relics(snapshot.relics)
            if keeper is None and record.monitor is None:
                self._start_again(record, launch, None)
                return True
        if keeper is None:
            self.start_monitored(record.args, set_env=record.env)
            return True
        return self._await_keeper(keeper, record, timeout)

    def _await_keeper(self, keeper: Process, record: ProcessState, timeout: float) -> bool:
        """Wait until its keeper has started ComfyUI again; one that ends instead leaves it to us."""

        def is_settled() -> bool:
            now = self._read_state()
            return now is None or now.run_id != record.run_id and now.pid is not None or not is_same_process(keeper)

        if not until(is_settled, KEEPER_PATIENCE, 0.02):
            message = f"PID {keeper.pid}, which keeps ComfyUI, does not start it again."
            raise CDEnvironmentError(message, ("-e", self.name, "status"), "stuck")
        now = self.observe()
        if now.record is not None and now.record.run_id == record.run_id:
            return self.restart(timeout)
        if now.process is None:
            raise self._ended("at once", None)
        return True

    def _start_again(self, record: ProcessState, launch: Launch, monitor: Optional[dict[str, Any]]) -> None:
        until(lambda: not is_port_bound(record.port, host=record.host), 5, 0.02)
        launch.set_env, launch.monitor = record.env, monitor
        self._start(launch, record)

    def _require_own_record(self, record: ProcessState) -> None:
        if record.owner not in (None, own_user()):
            message = f"The record of the last run belongs to another user (uid {record.owner}), so it starts nothing."
            raise CDEnvironmentError(message, ["Start it with: ", ("-e", self.name, "run")], "owner")

    def take_on_as_monitor(self, monitor: Optional[dict[str, Any]] = None) -> bool:
        """Record this process as the monitor of the ComfyUI that runs; return False when none of ours does.

        `monitor` is what the record says of it. Raises CDEnvironmentError when ComfyUI has a keeper already.
        """
        with self._process_lock("monitor"):
            snapshot = self.observe(lock_held=True)
            record, process = snapshot.record, snapshot.process
            if process is None:
                return False
            present = self.keeper_of(record)
            if present is not None:
                who = "a monitor" if self.monitor_process(record) else "'run --foreground'"
                message = f"ComfyUI is already running (PID {process.pid}), and {who} watches it (PID {present.pid})."
                raise CDEnvironmentError(message, ("-e", self.name, "restart"), "running")
            record = self._own_record(snapshot, process)
            record.monitor = monitor or own_monitor()
            self._write_state(record)
            return True

    def start_monitored(self, args: list[str], **options: Any) -> None:
        """Start a detached monitor, which starts ComfyUI itself or takes on the one that runs.

        `options` are those of `run`. They go through the monitor's environment, where only this user can read them.
        Raises CDEnvironmentError as `run` does, and when the monitor does not answer.
        """
        from compileall import compile_file

        compile_file(os.path.abspath(__file__), quiet=2)  # who compiles it keeps 20 MiB that it never needs
        task = {"workspace": self.workspace_paths.root, "environment": self.name, "args": args, "options": options}
        command = [*own_command(), "--monitor", self.paths.root]  # the word is for people who look at the processes
        variables = {**os.environ, MONITOR_VARIABLE: json.dumps(task)}
        variables.pop(RUN_ID_VARIABLE, None)  # in a shell that a ComfyUI started: it is none of that one's family
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as answering:
            child = create_background_process(command, self.workspace_paths.root, answering, variables)
        answers = os.fdopen(reader, "rb")
        try:
            said = begin(answers.read)(time.monotonic() + MONITOR_SECONDS)
            answers.close()  # not before: to close waits for a reading that hangs
            error = dict(json.loads(said.splitlines()[-1]))
        except TimeoutError:
            monitor = process_table().process(child.pid)
            end_all([monitor] if monitor is not None else [])
            message = f"The monitor (PID {child.pid}) did not answer within {MONITOR_SECONDS:g} s, so it was ended."
            raise CDEnvironmentError(message, ("-e", self.name, "status"), "timeout") from None
        except (ValueError, IndexError, TypeError):
            words = said.decode("utf-8", "replace").strip()[-500:] or "it said nothing"
            raise CDEnvironmentError(f"The monitor could not start: {words}") from None
        if "exit_code" in error:
            raise CDEndedError(error["message"], error["hint"], error["exit_code"])
        if error:
            raise CDEnvironmentError(error["message"], error["hint"], error["code"])

    def restart_kept(self, former: ProcessState, monitor: Optional[dict[str, Any]]) -> bool:
        """Start again, for its keeper, what crashed or was stopped for a restart; False when that is not wanted.

        Nor when another run has begun. `monitor` is what the record says of a monitor.
        """
        with self._about_to_start("restart") as snapshot:
            record = snapshot.record
            if record is not None and is_own_intent(record):  # of a start that a full disk kept from being taken back
                self._write_state(former)
                record = former
            is_same = record is not None and record.run_id == former.run_id and record.desired_state != STOPPED
            if record is None or not is_same or snapshot.process is not None:
                return False
            self._require_own_record(record)
            self._end_relics(snapshot.relics)
            self._start_again(record, self._launch(record.args), monitor)
            return True

    def is_held_back(self) -> bool:
        """Tell whether who stopped ComfyUI for a restart has something to do before it, and lives."""
        record = self._read_state()
        waits_for = record.starter.get("waits_for") if record is not None else None
        return record is not None and recorded_process(waits_for, record.owner) is not None


# ====================================================================================================================
# 10. The demo
# Another program that lives here: exempt from the rules of the others, imports inside, uses nothing above it.


def demo_server() -> None:  # noqa: C901  # a whole program
    """Stand in for the `main.py` of ComfyUI 0.33: its log, its common flags, the endpoints we ask, its way to stop.

    `demo_source` writes this function out as a whole program, so it uses no name from outside its own body. It is ready
    in 0.1 s, opens no browser and makes no images. A node of its own keeps the queue busy:
    {"prompt": {"1": {"class_type": "DemoSleep", "inputs": {"seconds": 5}}}}.
    """
    import argparse
    import faulthandler
    import http.server
    import itertools
    import json
    import logging
    import os
    import signal
    import socket
    import ssl
    import sys
    import threading
    import time
    import uuid

    parser = argparse.ArgumentParser(description="A stand-in for ComfyUI, part of comfydock: no images, no models.")
    parser.add_argument("--listen", nargs="?", default="127.0.0.1", const="0.0.0.0,::")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--tls-keyfile")
    parser.add_argument("--tls-certfile")
    parser.add_argument("--verbose", nargs="*", default=["INFO"])
    args = parser.parse_known_args()[0]

    for level, colour in (("INFO", "32"), ("WARNING", "33"), ("ERROR", "1m\033[31")):
        logging.addLevelName(getattr(logging, level), f"\033[{colour}m[{level}]\033[0m")
    logging.basicConfig(level=(args.verbose or ["DEBUG"])[0], format="%(levelname)s %(message)s")
    say = logging.info

    changed, interrupted, numbers = threading.Condition(), threading.Event(), itertools.count()
    pending: list[list[Any]] = []  # items as /queue shows them: number, prompt id, workflow, extra data, output nodes
    running: list[list[Any]] = []  # one of them at most; who looks at either holds `changed`

    def duration(workflow: "dict[str, Any]") -> float:
        """Return the seconds that a workflow takes; an odd one raises."""
        asked = [float(body["inputs"]["seconds"]) for body in workflow.values() if body["class_type"] == "DemoSleep"]
        return max(0.0, min(sum(asked), 86400.0))

    def work() -> None:
        while True:
            with changed:
                changed.wait_for(lambda: pending)
                interrupted.clear()  # before it shows as running: who interrupts what he saw is heard
                running.append(pending.pop(0))
            began = time.monotonic()
            interrupted.wait(duration(running[0][2]))
            with changed:
                running.clear()
            say(f"Prompt executed in {time.monotonic() - began:.2f} seconds")

    def queue_prompt(wanted: "Any") -> object:
        say("got prompt")
        workflow, name = wanted["prompt"], str(wanted.get("prompt_id") or uuid.uuid4())
        duration(workflow)  # if that raises, then here and not in the worker
        pending.append([next(numbers), name, workflow, {}, list(workflow)])
        changed.notify()
        return {"prompt_id": name, "number": pending[-1][0], "node_errors": {}}

    def interrupt(wanted: "Any") -> str:
        say("Global interrupt (no prompt_id specified)")
        interrupted.set()
        return ""

    def restart(wanted: object) -> None:
        """Restart as ComfyUI-Manager does; who asked for it gets no answer, as there."""
        session = os.environ.get("__COMFY_CLI_SESSION__")
        say("\nRestarting...\n\n")
        if session:
            open(session + ".reboot", "w").close()
            os._exit(0)
        # Windows joins the words of exec without quoting them, starts another process and ends this one.
        first = [f'"{word}"' if os.name == "nt" else word for word in (sys.executable, sys.argv[0])]
        os.execv(sys.executable, first + [word for word in sys.argv[1:] if word != "--windows-standalone-build"])

    versions = {"comfyui_version": "0.33.0", "python_version": sys.version, "pytorch_version": "comfydock demo"}
    system = {"os": sys.platform, "argv": sys.argv, **versions, "embedded_python": False, "demo": "comfydock"}
    memory = dict.fromkeys(("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"), 8 << 30)
    device = {"name": "comfydock demo", "type": "cpu", "index": None, **memory}
    ANSWERS: dict[str, Callable[[Any], Any]] = {
        "GET /": lambda _: (
            "<!doctype html><meta charset=utf-8><title>ComfyUI (comfydock demo)</title><h1>ComfyUI demo</h1>"
            "<p>Not ComfyUI but the stand-in that comes with comfydock. It makes no images.</p>"
        ),
        "GET /system_stats": lambda _: {"system": system, "devices": [device]},
        "GET /queue": lambda _: {"queue_running": list(running), "queue_pending": list(pending)},
        "GET /prompt": lambda _: {"exec_info": {"queue_remaining": len(running) + len(pending)}},
        "GET /object_info": lambda _: {"DemoSleep": {"name": "DemoSleep", "category": "demo", "output_node": True}},
        "POST /prompt": queue_prompt,
        "POST /interrupt": interrupt,
        "POST /v2/manager/reboot": restart,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        """One connection, in a thread of its own."""

        protocol_version, server_version, timeout = "HTTP/1.1", "comfydock-demo", 30

        def log_message(self, *words: object) -> None:
            """Stay silent: ComfyUI keeps no access log."""

        def do_GET(self) -> None:
            """Answer one request; whatever goes wrong is a 500, and the server goes on."""
            try:
                size, path = int(self.headers.get("Content-Length", 0)), self.path.partition("?")[0]
                data = self.rfile.read(size) if 0 <= size <= 64 << 20 else b"too long, and no JSON"
                host, origin = (self.headers.get(name, "").lower() for name in ("Host", "Origin"))
                is_foreign = origin and origin.partition("//")[2] != host  # a browser's page from elsewhere
                answer = ANSWERS.get(f"{self.command} {path[4:] if path.startswith('/api/') else path}")
                status, content = (200, None) if answer else (404, "")
                if is_foreign and host.startswith(("localhost", "127.", "[::1]")):  # ComfyUI's rule
                    status, content = 403, ""
                elif answer:
                    with changed:
                        content = answer(json.loads(data or b"{}"))
                text = content if isinstance(content, str) else json.dumps(content)
            except Exception:  # noqa: BLE001  # a stand-in for the web framework, which swallows all, too
                logging.exception(f"Error handling request from {self.client_address[0]}")
                self.close_connection, status, text = True, 500, "500 Internal Server Error"
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if text[:1] == "<" else "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

    def listen(host: str) -> None:
        """Serve on every address of one host name ("" is all), with asyncio's words for one that is taken."""
        found = socket.getaddrinfo(host or None, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            server = http.server.ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
            server.socket.close()
            server.handle_error = lambda *client: None  # type: ignore[method-assign]  # a client that leaves is no news
            try:
                server.socket = socket.create_server(address, family=family, backlog=128)
            except OSError as error:
                why = str(error.strerror).partition(" (while ")[0].lower()
                raise OSError(error.errno, f"error while attempting to bind on address {address!r}: {why}") from None
            if args.tls_keyfile and args.tls_certfile:
                tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                tls.load_cert_chain(args.tls_certfile, args.tls_keyfile)
                server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            threading.Thread(target=server.serve_forever, daemon=True).start()

    faulthandler.enable()
    say("Checkpoint files will always be loaded safely.")
    say("Total VRAM 8192 MB, total RAM 8192 MB\npytorch version: none (comfydock demo)\nDevice: cpu (comfydock demo)")
    say(f"Python version: {sys.version}\nComfyUI version: 0.33.0\n[Prompt Server] web root: built into the demo")
    try:
        threading.Thread(target=work, daemon=True).start()
        say("Starting server\n")
        for host in args.listen.split(","):
            listen(host)
            shown = f"[{host}]" if ":" in host else host
            say(f"To see the GUI go to: http{'s' * bool(args.tls_keyfile and args.tls_certfile)}://{shown}:{args.port}")
        while True:
            time.sleep(3600)  # Windows lets Ctrl-C interrupt a sleep, not a wait for a lock
    except KeyboardInterrupt:
        say("\nStopped server")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends us
        time.sleep(0.1)
        os._exit(0)  # past the interpreter's teardown, where a thread that still logs can make it abort


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
# Knows the environments of a folder: which there are, which is meant, and that their ports differ.

THREE_WAYS: "Hint" = [
    "Three ways to get one:\n  ",
    ("run",),
    "  in your ComfyUI folder: adopts and starts it\n  ",
    ("create", "main"),
    "  a new ComfyUI\n  ",
    ("run", "--demo"),
    "  a small stand-in, to try everything",
]


class Workspace:
    """A folder of environments, their logs, and which of them is active. `path` is `default_workspace()` if None."""

    def __init__(self, path: "Union[str, Path, None]" = None) -> None:
        self.paths = WorkspacePaths(path if path is not None else default_workspace())

    def list_environments(self) -> list[Environment]:
        """Return all environments by name, unfinished ones (`is_complete` tells) and those that are closed to us, too.

        Raises CDEnvironmentError when the workspace is no folder, OSError when it cannot look.
        """
        found, root = [], self.paths.root
        try:
            names = sorted(os.listdir(self.paths.environments), key=str.lower)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.exists(root) and not os.path.isdir(root):
                message = f"The workspace {root} is not a folder."
                raise CDEnvironmentError(message, "name another --workspace") from None
            return []
        for environment in (Environment(name, self.paths, self._ports_of_others) for name in names):
            try:
                is_one = not environment.name.startswith(DELETED) and is_there(environment.paths.cec)
            except OSError:
                is_one = True
            found += [environment] if is_one else []
        return found

    def get_environment(self, name: str) -> Environment:
        """The environment `name`. Raises CDEnvironmentError when there is none."""
        if not is_folder_name(name):
            raise CDEnvironmentError(f"'{name}' cannot name an environment: {NAME_RULE}.", ("list",), "usage")
        environment = Environment(name, self.paths, self._ports_of_others)
        if not is_there(environment.paths.cec):
            raise CDEnvironmentError(f"There is no environment '{name}'.", self._suggestion(name), "unknown")
        return environment

    def get_active_environment(self) -> Optional[Environment]:
        """Return the environment that `use` chose, None when it is not set or gone. Raises CDEnvironmentError."""
        name = self._settings().get("active_environment")
        if not isinstance(name, str) or not is_folder_name(name):
            return None
        environment = Environment(name, self.paths, self._ports_of_others)
        return environment if os.path.isdir(environment.paths.cec) and not environment.manifest.demo else None

    def use(self, name: str) -> Environment:
        """Make `name`, which may not be the demo, the active environment. Raises CDEnvironmentError, OSError."""
        environment = self.get_environment(name)
        if environment.manifest.demo:
            raise CDEnvironmentError("The demo is never the active environment.", ("run", "--demo"), "demo")
        self._change_settings(active_environment=name)
        return environment

    def select(self, name: Optional[str], folder: Optional[str] = None, to_start: bool = False) -> Environment:
        """Return the environment that is meant: by name, by the folder one stands in, the active one, the only one.

        The demo is meant only where there is no other, and `to_start` only by its name, with which it is made. Raises
        CDEnvironmentError when none of these holds.
        """
        if name == DEMO_NAME and to_start:
            found = Environment(name, self.paths, self._ports_of_others)
            return self.demo(found) if found.manifest.demo or not os.path.isdir(found.paths.cec) else found
        if name is not None:
            return self.get_environment(name)
        folder = folder or current_folder()
        here, checkout = self.around(folder)
        if here is not None and not (to_start and here.manifest.demo):
            return here
        if here is None and checkout_at(folder) is not None:
            raise CDEnvironmentError(f"No environment has adopted {checkout} yet.", ("run",), "unknown")
        return self.get_active_environment() or self._only_one(to_start)

    def _only_one(self, to_start: bool) -> Environment:
        environments = self.list_environments()
        others = [environment for environment in environments if not environment.manifest.demo]
        likely = [environment for environment in others if environment.is_complete] or others
        if environments and not others and not to_start:
            likely = environments
        if len(likely) == 1:
            return likely[0]
        if not others:
            which = "There is no environment but the demo" if environments else "There is no environment"
            raise CDEnvironmentError(f"{which} in {self.paths.root} yet.", THREE_WAYS, "unknown")
        names = ", ".join(environment.name for environment in others[:8]) + (", ..." if len(others) > 8 else "")
        first = others[0].name
        hint = [("-e", first, "COMMAND"), ", or choose once: ", ("use", first)]
        raise CDEnvironmentError(f"Which environment? There are {len(others)}: {names}.", hint, "unknown")

    def around(self, folder: str) -> "tuple[Optional[Environment], Optional[str]]":
        """Return the environment, and the ComfyUI checkout, that hold `folder` behind all links, each None without.

        A checkout one level below counts, too, while no environment is active, and in the root of a portable build.
        """
        checkout, below = checkout_at(folder), os.path.join(folder, "ComfyUI")
        if checkout is None and is_checkout(below) and self.get_active_environment() is None:
            checkout = below
        roots = {real_path(environment.paths.root): environment for environment in self.list_environments()}
        for here in (*upward(os.path.realpath(folder)), *upward(os.path.realpath(checkout or folder))):
            found = roots.get(real_path(here)) or (self._owner_of(here) if os.path.isfile(main_script(here)) else None)
            if found is not None:
                return found, checkout
        return None, checkout

    def _owner_of(self, checkout: str) -> Optional[Environment]:
        return next((one for one in self.list_environments() if same_path(one._checkout, checkout)), None)

    def adopt(self, path: str, name: Optional[str] = None, python: Optional[str] = None) -> Environment:
        """Make an environment of the ComfyUI checkout at `path`, or one level below it; nothing is written into it.

        `name` is the folder's by default (its parent's when that is "ComfyUI"), `python` the one that is found with it.
        An environment of that checkout gets another `python`, or the new place of a checkout that has moved. Raises
        CDEnvironmentError when there is no main.py, no Python is found, or the name is taken; OSError.
        """
        folder = os.path.abspath(os.path.expanduser(path))
        places = (folder, os.path.join(folder, "ComfyUI"))
        checkout = next((place for place in places if is_there(main_script(place))), None)
        if checkout is None:
            raise CDEnvironmentError(f"{folder} is not a ComfyUI folder (no main.py).", "", "missing")
        present = self._owner_of(checkout)
        if present is not None and name not in (None, present.name):  # one process a checkout: they would mix theirs up
            message = f"{checkout} is environment '{present.name}' already."
            raise CDEnvironmentError(message, ("-e", present.name, "status"), "exists")
        chosen = present.name if present else name or self._free_name(checkout)
        if present is None:
            require_new_name(chosen)
        environment = Environment(chosen, self.paths, self._ports_of_others)
        former, is_complete = environment.manifest.comfyui_path, environment.is_complete
        has_moved = former is None or not same_path(former, checkout)
        if is_complete and has_moved and (former is None or is_there(main_script(former))):
            message = f"Environment '{environment.name}' exists already."
            raise CDEnvironmentError(message, ("-e", environment.name, "status"), "exists")
        if is_complete and not has_moved and python is None:
            return environment
        begun_with = None if is_complete else environment.manifest.python_path
        interpreter = working_python(python or begun_with or find_checkout_python(checkout, name))
        if is_complete:
            held = environment.idle("create") if has_moved else nullcontext()
            with locked(environment.paths.content_lock, LOCK_SECONDS, "create", handed_on=True), held:
                settings = {"comfyui_path": os.path.realpath(checkout), "python_path": interpreter}
                change_settings(environment.paths, settings, interpreter)
        else:
            self._change_settings()
            create_from_checkout(environment.paths, checkout, interpreter, environment.tell)
        return environment

    def demo(self, found: Optional[Environment] = None) -> Environment:
        """Return the environment of the built-in demo, made or updated. Raises CDEnvironmentError, OSError."""
        environment = found or Environment(DEMO_NAME, self.paths, self._ports_of_others)
        paths, is_complete = environment.paths, environment.is_complete
        if (os.path.lexists(paths.content_lock) or is_complete) and not environment.manifest.demo:
            message = f"The environment '{DEMO_NAME}' is one of yours, not the demo."
            raise CDEnvironmentError(message, ("--workspace", "DIR", "run", "--demo"), "exists")
        files = {main_script(paths.comfyui): demo_source()}
        if not is_complete or environment.manifest.python_path != sys.executable:
            self._change_settings()
            make_folder(paths.cec)
            files[paths.manifest] = first_manifest(DEMO_NAME, {"demo": True, "python_path": sys.executable}, [], [])
            files.update({paths.gitignore: GitManager.GITIGNORE, paths.complete: ""})
        make_folder(custom_nodes_of(paths.comfyui))
        sweep_leftovers(paths.comfyui)
        for path, text in files.items():
            if read_any_text(path) != text or not os.path.exists(path):
                write_atomic(path, text.encode(), 0o644)
        return environment

    def create(
        self,
        name: str,
        *,
        comfyui: Optional[str] = None,
        source: Optional[str] = None,
        python: Optional[str] = None,
        torch_backend: str = "auto",
        no_install: bool = False,
        no_manager: bool = False,
        models: Optional[str] = None,
        tell: Progress = no_progress,
    ) -> Environment:
        """Make an environment with a ComfyUI of its own; after a failure or a kill it goes on where it broke off.

        `comfyui` is a tag, branch or commit (None: the newest release), `source` a git address, a folder or an archive,
        `python` an interpreter's path or a version such as "3.12", `torch_backend` a word such as "cpu" or "cu128",
        `models` a folder that it shares with others (None: the workspace's, if it has one).
        Raises CDEnvironmentError when the name is taken or a stage fails, OSError.
        """
        require_new_name(name)
        environment = Environment(name, self.paths, self._ports_of_others)
        self._change_settings()
        default = self._settings().get("global_model_directory")
        folder = models_folder(models or (default.get("path") if isinstance(default, dict) else None))
        create_environment(
            environment.paths, tell, comfyui, source, python, torch_backend, no_install, no_manager, folder
        )
        return environment

    def delete(self, name: str, *, purge: bool = False, tell: Progress = no_progress) -> Optional[str]:
        """Delete an environment; its logs and a checkout that was adopted stay.

        Models, outputs, inputs and user files in its ComfyUI are moved to a folder in `kept`, whose path (str) is
        returned, None when there were none; with `purge` they are deleted, too. Raises CDEnvironmentError when there is
        no such environment, while its ComfyUI runs, or when a file system is mounted inside.
        """
        sweep_deleted(self.paths.environments, tell)
        environment = self.get_environment(name)
        inside = os.path.join(os.path.realpath(environment.paths.root), "")
        for other in self.list_environments():
            models = other.manifest.models_path
            if other.name != name and models and os.path.realpath(models).startswith(inside):
                message = f"Environment '{other.name}' uses the models in {models}."
                raise CDEnvironmentError(message, ("models", other.name, "--off"), "in-use")
        shelf = None if purge else self.paths.kept
        kept = delete_environment(environment.paths, environment.idle("delete"), shelf, tell)
        if self._settings().get("active_environment") == name:
            self._change_settings(active_environment="")
        return kept

    def set_models(self, folder: str) -> None:
        """Have the environments that are made from now on use the models in a folder. Raises CDEnvironmentError."""
        now = utc_now()
        self._change_settings(global_model_directory={"path": models_folder(folder), "added_at": now, "last_sync": now})

    def initialize(self) -> bool:
        """Make the workspace's folder; False when it is one already. Raises CDEnvironmentError for another folder."""
        if os.path.isdir(self.paths.metadata):
            return False
        if self.list_environments() or os.path.isdir(self.paths.root) and os.listdir(self.paths.root):
            message = f"{self.paths.root} is neither empty nor a workspace."
            raise CDEnvironmentError(message, "name another folder", "exists")
        make_folder(self.paths.environments)
        self._change_settings()
        return True

    def reports(self, timeout: float = 0.5) -> list[dict[str, Any]]:
        """What `list` tells: each environment described, with one look at the processes and all probes at once."""
        scan, active = scan_for_comfyui(), self.get_active_environment()
        seen = [(environment, observe_or_say(environment, scan)) for environment in self.list_environments()]
        alive = [(environment, snapshot) for environment, snapshot in seen if snapshot.process is not None]
        answers = probe_all([environment.config_of(snapshot) for environment, snapshot in alive], timeout)
        told = {environment.name: answer for (environment, _), answer in zip(alive, answers)}
        return [
            {
                **environment.describe(snapshot, told.get(environment.name, Answer(REFUSED))),
                "active": active is not None and environment.name == active.name,
            }
            for environment, snapshot in seen
        ]

    def _ports_of_others(self, name: str) -> dict[int, str]:
        """Port -> who has it, of every other environment that runs or is starting."""
        claims = [other.claimed_port() for other in self.list_environments() if other.name != name]
        return dict(claim for claim in claims if claim is not None)

    def tracker_of(self, pid: int) -> Optional[Environment]:
        """The environment whose record names the living process `pid`, or None."""
        for environment in self.list_environments():
            snapshot = observe_or_say(environment, {})
            run_id = snapshot.record.run_id if snapshot.record else None
            if snapshot.process and (snapshot.process.pid == pid or run_id and process_table().marker(pid) == run_id):
                return environment
        return None

    def _free_name(self, checkout: str) -> str:
        parent, name = os.path.split(os.path.realpath(checkout))
        name = sanitize_name(os.path.basename(parent) or name if name.lower() == "comfyui" else name)
        taken = {environment.name.lower() for environment in self.list_environments()}
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        return next(one for one in names if one.lower() not in taken)

    def _suggestion(self, name: str) -> "Hint":
        from difflib import get_close_matches

        names = [environment.name for environment in self.list_environments()]
        close = get_close_matches(name, names, 1)
        if close:
            return f"did you mean '{close[0]}'?"
        return ("list",) if names or not is_new_name(name) else ("create", name)

    def _settings(self) -> dict[str, Any]:
        """workspace.json, with the keys that comfydock 1.0.x needs. Raises CDEnvironmentError when it is damaged."""
        try:
            settings = json.loads((read_file(self.paths.settings) or b"{}").decode("utf-8"))
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            message = f"The workspace's settings are damaged: {self.paths.settings}"
            raise CDEnvironmentError(message, "fix or remove that file", "damaged")
        return settings

    def _change_settings(self, **changes: Any) -> None:
        """Set keys of workspace.json, and those that comfydock 1.0.x needs; others may do the same meanwhile."""
        needed = {"version": 1, "active_environment": "", "created_at": utc_now(), "global_model_directory": None}
        if changes or not needed.keys() <= self._settings().keys():
            with workspace_lock(self.paths, "use"):
                settings = {**needed, **self._settings(), **changes}
                write_atomic(self.paths.settings, (json.dumps(settings, indent=2) + "\n").encode())


def observe_or_say(environment: Environment, scan: Scan) -> Snapshot:
    """What is there of one of many environments; one whose files are closed to us does not hide the others."""
    try:
        return environment.observe(scan)
    except OSError:
        return Snapshot(UNKNOWN, note="unreadable")


def working_python(path: str) -> str:
    """Return the absolute path of an interpreter (of a venv, where `path` is one).

    Raises CDEnvironmentError unless there is a Python that works, OSError where one may not look.
    """
    path = os.path.abspath(os.path.expanduser(path))
    path = venv_python(path) if os.path.isdir(path) else path
    if not is_there(path):
        hint = "give the path of an interpreter, not a version"
        raise CDEnvironmentError(f"There is no Python at {path}.", hint, "missing")
    if not version_of_python(path):
        raise CDEnvironmentError(f"{path} is not a Python that works.", "give the path of an interpreter", "missing")
    return path


def find_checkout_python(checkout: str, name: Optional[str]) -> str:
    """Return the Python of a ComfyUI checkout: a venv in it, the portable build's; else one near it with PyTorch.

    Of several of its own the first with PyTorch. `name` is that of the environment, where one was typed. Raises
    CDEnvironmentError, which names what was tried.
    """
    from shutil import which

    parent, conda = os.path.dirname(checkout), os.environ.get("CONDA_PREFIX")
    own = [venv_python(os.path.join(checkout, ".venv")), venv_python(os.path.join(checkout, "venv"))]
    own.append(os.path.join(parent, "python_embeded", "python.exe"))
    venvs = (os.path.join(parent, ".venv"), os.path.join(parent, "venv"), os.environ.get("VIRTUAL_ENV"))
    active = [venv_python(venv) for venv in venvs if venv]
    active += [os.path.join(conda, "bin", "python"), os.path.join(conda, "python.exe")] if conda else []
    active += filter(None, map(which, ("python3", "python")))
    tried = []

    def is_usable(python: str) -> bool:
        with suppress(OSError):
            if not is_there(python):
                return False
            if os.access(python, os.X_OK):
                return True
        tried.append(f"{python} is unreadable")
        return False

    found = list(filter(is_usable, own))
    if found:
        return next((one for one in found if len(found) > 1 and has_module(one, "torch")), found[0])
    for python in filter(is_usable, dict.fromkeys(active)):
        if has_module(python, "torch"):
            return python
        tried.append(f"{python} has no PyTorch")
    command = ("create", name, "--from", checkout) if name else ("run",)
    missing = f"No Python was found for {checkout}: no .venv, venv or python_embeded there"
    hint = (*command, "--python", active[-1] if active else sys.executable)
    raise CDEnvironmentError("; ".join([missing, *tried]) + ".", hint, "missing")


def select_workspace(chosen: Optional[str], named: bool, to_make: bool = False) -> Workspace:
    """Return the workspace that is meant: `--workspace`, the one whose environment one stands in, or the default.

    Raises CDEnvironmentError for a `--workspace` that does not exist, unless the command is one `to_make` it.
    """
    if chosen is not None:
        if not chosen:
            raise CDEnvironmentError("--workspace needs a folder.", ("--workspace", "DIR", "list"), "usage")
        workspace = Workspace(os.path.expanduser(chosen))
        if not to_make and not is_there(workspace.paths.root):
            raise CDEnvironmentError(f"{workspace.paths.root} does not exist.", "", "missing")
        return workspace
    inside = None if named else environment_above(current_folder())
    return Workspace(inside[0]) if inside else Workspace()


# ====================================================================================================================
# 12. Hand-over
# Text for the engines that exist, from templates and one description; nothing is read, written or started.

ENGINES = ("systemd", "dockerfile", "compose", "kubernetes")
IMAGE_PORT = DEFAULT_PORT  # inside a container, which has a network of its own


@dataclass
class Code:
    """A piece of an image's code, at `place` below ComfyUI's folder ("" is ComfyUI itself).

    It is `commit` of the repository `url`, or where that is empty a copy of `source`.
    """

    place: str
    source: str
    url: str = ""
    commit: str = ""


@dataclass
class Description:
    """What an engine is told of one environment; paths are absolute.

    `program` starts comfydock, `args` are ComfyUI's arguments, `variables` those of --set-env, `places` what of this
    machine it needs, `owner` whom it belongs to. The rest is for images: `gpu` is nvidia, cdi or none, `gpus` the cards
    (all when empty), `python` its version, `index` that of PyTorch, `held` and `packages` are requirement lines. The
    demo has no `code`; `scripts` tells whether nodes have an install.py; `left_out` is what no image can hold.
    """

    name: str
    program: list[str]
    workspace: str
    args: list[str]
    variables: dict[str, str]
    port: int
    places: list[str]
    owner: str
    gpu: str = "none"
    gpus: list[str] = field(default_factory=list)
    python: str = "3.12"
    index: str = ""
    held: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)
    scripts: bool = False
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import zlib

        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:32]
        changed = f"{plain or 'env'}-{zlib.crc32(self.name.encode()):08x}"  # what had to change is told apart
        self.label = plain if plain == self.name else changed  # for who wants lower-case letters, digits and dashes
        self.image, self.home = f"comfydock-{self.label}", f"/opt/{self.label}/ComfyUI"
        escaped = re.sub(rb"[^\w:.-]", lambda sign: b"\\x%02x" % ord(sign[0]), self.name.encode())
        self.unit = f"comfydock-{escaped.decode()}"  # as systemd wants it; a property list and a task bear it, too
        self.origin = f"Written by comfydock {__version__} for the environment '{self.name}'"

    def words(self) -> list[str]:
        """The command by which an engine of this machine runs it: in the foreground, nothing is installed first."""
        named = [word for key in self.variables for word in ("--set-env", key)]
        place = ["-e", self.name, "--workspace", self.workspace]
        return [*self.program, *place, "run", "--no-sync", *named, "--foreground", "--", *self.args]


# systemd

UNIT = """\
# {origin}.
[Unit]
Description=ComfyUI, environment {name}
{after}StartLimitIntervalSec=3600
StartLimitBurst=5

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{more}Restart=on-failure
RestartSec=1
RestartPreventExitStatus=2
SuccessExitStatus=143
KillMode=mixed
TimeoutStartSec=infinity
TimeoutStopSec=30
NoNewPrivileges=yes
RestrictSUIDSGID=yes
LockPersonality=yes
UMask=0027

[Install]
WantedBy={target}
"""


def unit_word(text: str, is_program: bool = False) -> str:
    """A word of a command line in a unit: quoted, with % and $ doubled; the program is not looked through for $."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("%", "%%")
    escaped = escaped if is_program else escaped.replace("$", "$$")
    return escaped if re.fullmatch(r"[\w%@=:,./+-]+", escaped) else f'"{escaped}"'


def systemd_unit(it: Description, user: bool) -> str:
    """The unit of an environment, for the user's own systemd or for the system's.

    Left out is what takes the graphics card away or forbids what PyTorch does: PrivateDevices, MemoryDenyWriteExecute.
    """
    program, *words = it.words()
    more = [] if user else [f"User={it.owner}"]
    if it.variables:
        folder = "%E/systemd/user" if user else "/etc/systemd/system"
        more.append(f"EnvironmentFile={folder}/{it.unit}.env".replace("\\", "\\\\"))
    if not user:
        more += ["ProtectKernelModules=yes", "ProtectControlGroups=yes"]
        if not any(path.startswith(("/tmp/", "/var/tmp/")) for path in it.places):  # noqa: S108 (nothing is made)
            more.append("PrivateTmp=yes")
        if not any(path.startswith(("/usr/", "/etc/", "/boot/")) for path in it.places[1:]):
            more.append("ProtectSystem=full")
    return UNIT.format(
        origin=it.origin,
        name=it.name.replace("%", "%%"),
        command=" ".join([unit_word(program, True), *map(unit_word, words)]),
        after="" if user else "After=network.target\n",
        more="".join(f"{line}\n" for line in more),
        target="default.target" if user else "multi-user.target",
    )


def environment_file(variables: dict[str, str]) -> str:
    """Variables as systemd and Compose read them from a file."""
    escaped = {key: re.sub(r'(["\\$])', r"\\\1", value) for key, value in variables.items()}
    return "".join(f'{key}="{value}"\n' for key, value in escaped.items())


# launchd and the Task Scheduler


def launchd_plist(it: Description, system: bool) -> str:
    """The property list of an agent, or of a daemon of the whole system. It holds the variables."""
    import plistlib

    facts: dict[str, Any] = {
        "Label": it.unit,
        "ProgramArguments": it.words(),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": 30,
        "ThrottleInterval": 10,
        "ProcessType": "Interactive",
        "StandardOutPath": os.devnull,  # ComfyUI's log is kept by comfydock
        "StandardErrorPath": os.path.join(it.workspace, "logs", it.name, "launchd.log"),
        **({"EnvironmentVariables": it.variables} if it.variables else {}),
        **({"UserName": it.owner} if system else {}),
    }
    return plistlib.dumps(facts, sort_keys=False).decode()


TASK = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo><Description>{origin}</Description></RegistrationInfo>
  <Triggers><LogonTrigger><Enabled>true</Enabled><UserId>{owner}</UserId></LogonTrigger></Triggers>
  <Principals><Principal id="Author">
    <UserId>{owner}</UserId><LogonType>InteractiveToken</LogonType><RunLevel>LeastPrivilege</RunLevel>
  </Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
    <Priority>5</Priority>
    <RestartOnFailure><Interval>PT1M</Interval><Count>5</Count></RestartOnFailure>
  </Settings>
  <Actions Context="Author"><Exec>
    <Command>{program}</Command>
    <Arguments>{arguments}</Arguments>
    <WorkingDirectory>{workspace}</WorkingDirectory>
  </Exec></Actions>
</Task>
"""


def task_xml(it: Description) -> str:
    """The task that starts an environment when its owner logs on. Without a window, whose X would be ComfyUI's end."""
    from html import escape
    from subprocess import list2cmdline

    program, *words = it.words()
    windowless = re.sub(r"(?i)python\.exe$", "pythonw.exe", program)
    facts = {"origin": it.origin, "owner": it.owner, "program": windowless, "workspace": it.workspace}
    facts["arguments"] = list2cmdline(words)
    return TASK.format(**{key: escape(value, quote=False) for key, value in facts.items()})


# Images

DOCKERFILE = """\
# {origin}.
# Build it:  docker build -t {image} .
ARG BASE=python:{python}-slim
FROM ${{BASE}}
{tools}RUN useradd --non-unique --uid 1000 --create-home comfydock && \\
    install -d -o 1000 -g 1000 /opt/{label} {home}
USER 1000
WORKDIR {home}
{code}RUN mkdir -p {folders}
COPY comfydock.py /opt/comfydock.py
ENV COMFYDOCK_HOME={home}/user/comfydock
# What these hold outlives a container, also comfydock's record of what runs: a second container on them is refused.
VOLUME [{volumes}]
EXPOSE {port}
STOPSIGNAL SIGINT
HEALTHCHECK --interval=10s --timeout=10s --start-period=30m --retries=6 CMD ["python3", "-c", {health}]
ENTRYPOINT ["python3", "/opt/comfydock.py", "run", "--foreground", {start}, "--"]
# ComfyUI's own arguments: other words behind `docker run {image}` replace them all.
CMD {args}
"""
HEALTH = (
    f"import http.client as h; c = h.HTTPConnection('127.0.0.1', {IMAGE_PORT}, timeout=8); "
    "c.request('GET', '/system_stats'); raise SystemExit(c.getresponse().status != 200)"
)
TOOLS = """\
# hadolint ignore=DL3008
RUN command -v git || {{ apt-get update && \\
    apt-get install -y --no-install-recommends git ca-certificates libgl1 libglib2.0-0 && \\
    rm -rf /var/lib/apt/lists/*; }}
"""
PACKAGES = """\
# PyTorch for another card: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX={index}
COPY constraints.txt requirements.txt /opt/{label}/
RUN python3 -m venv /opt/{label}/venv && /opt/{label}/venv/bin/pip install --no-cache-dir --no-deps \\
    --extra-index-url "${{TORCH_INDEX}}" -c /opt/{label}/constraints.txt \\
    -r /opt/{label}/constraints.txt -r /opt/{label}/requirements.txt
"""


def dockerfile(it: Description) -> str:
    """The image of an environment: code and packages inside, pinned; models, input, output and user on volumes."""
    from shlex import quote as quote_posix

    code = [PACKAGES.format(**vars(it))] if it.code else []
    for piece in it.code:
        place, target = piece.place or ".", quote_posix(piece.place or ".")
        if piece.url:
            code.append(f"RUN git clone --recurse-submodules {quote_posix(piece.url)} {target} && \\\n")
            code.append(f"    git -C {target} checkout --quiet --recurse-submodules {piece.commit}\n")
        else:
            words = json.dumps([piece.place or "comfyui", place + "/"], ensure_ascii=False)
            code.append(f"COPY --chown=1000:1000 {words}\n")
    if it.scripts:
        code.append('RUN for script in custom_nodes/*/install.py; do (cd "${script%/*}" && \\\n')
        code.append(f"    /opt/{it.label}/venv/bin/python install.py) || exit 1; done\n")
    args = [*it.args, "--listen", "0.0.0.0", "--port", str(IMAGE_PORT)]  # noqa: S104
    facts = {
        "tools": TOOLS.format() if any(piece.url for piece in it.code) else "",
        "folders": " ".join(OWN_FOLDERS),
        "code": "".join(code),
        "volumes": ", ".join(json.dumps(f"{it.home}/{folder}") for folder in OWN_FOLDERS),
        "port": IMAGE_PORT,
        "health": json.dumps(HEALTH),
        "start": f'"--no-sync", "--python", "/opt/{it.label}/venv/bin/python"' if it.code else '"--demo"',
        "args": json.dumps(args, ensure_ascii=False),
    }
    return DOCKERFILE.format(**{**vars(it), **facts})


def image_args(args: list[str]) -> "tuple[list[str], list[str], list[str]]":
    """Return (kept, left out, cards) of ComfyUI's arguments: an image has an address, a port and places of its own."""
    groups: list[list[str]] = []
    kept, left_out, cards = [], [], []
    for word in args:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for flag, *values in groups:
        name, _, value = flag.partition("=")
        values = [value, *values] if value else values
        if name == "--cuda-device":
            cards = ",".join(values).split(",")
        elif any(map(os.path.isabs, values)):
            left_out.append(" ".join([name, *values]))
        elif not (_is_flag(name, "--port", "--po") or _is_flag(name, "--listen", "--li")):
            kept += [name, *values]
    return kept, left_out, cards


def image_files(it: Description) -> dict[str, str]:
    """What an image is built from, by path; with it go comfydock.py and the pieces of code that are copied."""
    files = {"Dockerfile": dockerfile(it)}
    if it.code:
        files["constraints.txt"] = "".join(f"{line}\n" for line in it.held)
        files["requirements.txt"] = "".join(f"{line}\n" for line in it.packages)
    return files


COMPOSE = """\
  {label}:
    build: ./{label}
    image: {image}
    ports:
      - "127.0.0.1:{port}:{inside}"
    volumes:
{volumes}
    stop_grace_period: 30s
    restart: unless-stopped
{more}"""
COMPOSE_GPUS = {  # nvidia: Docker with NVIDIA's hook; cdi: Podman, and Docker with Compose 5, which older ones refuse
    "none": "",
    "nvidia": """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              capabilities: [gpu]
              {which}
""",
    "cdi": """\
    devices:
{devices}
""",
}


def compose_file(many: list[Description]) -> str:
    """Return a service for each environment, with a port of this machine, volumes and a card of its own."""
    lines = [f"# {it.origin}.\n" for it in many] + ["name: comfydock\nservices:\n"]
    for it in many:
        which = f"device_ids: {json.dumps(it.gpus)}" if it.gpus else "count: all"
        devices = "\n".join(f"      - nvidia.com/gpu={gpu}" for gpu in it.gpus or ["all"])
        more = f"    env_file: ./{it.label}.env\n" if it.variables else ""
        more += COMPOSE_GPUS[it.gpu].format(which=which, devices=devices)
        volumes = "\n".join(f"      - {it.label}-{folder}:{it.home}/{folder}" for folder in OWN_FOLDERS)
        lines.append(COMPOSE.format(**vars(it), inside=IMAGE_PORT, volumes=volumes, more=more))
    named = [f"  {it.label}-{folder}:\n" for it in many for folder in OWN_FOLDERS]
    return "".join([*lines, "volumes:\n", *named])


KUBERNETES = """\
# {origin}.
# Push the image of ./{label} to a registry of yours, and name it here in place of {image}:latest.
# One pod, for each has a queue of its own: for more put a queue in front and let KEDA scale on that.
{before}---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {image}}}
spec:
  replicas: 1
  strategy: {{type: Recreate}}
  selector:
    matchLabels: {{app.kubernetes.io/name: {image}}}
  template:
    metadata:
      labels: {{app.kubernetes.io/name: {image}}}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 60
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        fsGroup: 1000
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: {{type: RuntimeDefault}}
      containers:
        - name: comfyui
          image: {image}:latest
          imagePullPolicy: IfNotPresent
          ports: [{{name: http, containerPort: {port}}}]
          # ComfyUI may take minutes to start, and does not answer while a node blocks it.
          startupProbe:
            httpGet: &look {{path: /system_stats, port: {port}}}
            timeoutSeconds: 10
            failureThreshold: 180
          readinessProbe: {{httpGet: *look, timeoutSeconds: 10}}
          livenessProbe: {{httpGet: *look, timeoutSeconds: 10, periodSeconds: 30, failureThreshold: 10}}
          securityContext:
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
{more}          volumeMounts:
{mounts}      volumes:
{volumes}---
apiVersion: v1
kind: Service
metadata: {{name: {image}}}
spec:
  selector: {{app.kubernetes.io/name: {image}}}
  ports: [{{name: http, port: {port}, targetPort: http}}]
"""
CLAIM = """\
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {image}-{folder}}}
spec:
  accessModes: [ReadWriteOnce]
  resources: {{requests: {{storage: {size}}}}}
"""
SECRET = """\
---
# Its values are yours to fill in: kubectl create secret generic {image} --from-env-file=FILE
apiVersion: v1
kind: Secret
metadata: {{name: {image}}}
stringData: {names}
"""
MOUNT = "            - {{name: {folder}, mountPath: {home}/{folder}}}\n"
VOLUME = "        - {{name: {folder}, persistentVolumeClaim: {{claimName: {image}-{folder}}}}}\n"


def kubernetes_file(it: Description) -> str:
    """Return volumes, deployment and service of an environment, and a secret whose values are left to be filled in."""
    facts = {**vars(it), "port": IMAGE_PORT}

    def of_each(template: str) -> str:
        sizes = {folder: "100Gi" if folder == "models" else "20Gi" for folder in OWN_FOLDERS}
        return "".join(template.format(**facts, folder=folder, size=size) for folder, size in sizes.items())

    before, more = of_each(CLAIM), ""
    if it.variables:
        before += SECRET.format(**facts, names=json.dumps(dict.fromkeys(it.variables, "")))
        more += f"          envFrom: [{{secretRef: {{name: {it.image}}}}}]\n"
    if it.gpu != "none":
        more += "          resources: {limits: {nvidia.com/gpu: 1}}\n"
    return KUBERNETES.format(**facts, before=before, more=more, mounts=of_each(MOUNT), volumes=of_each(VOLUME))


# ====================================================================================================================
# 13. Hidden entries
# What the file runs when it starts itself; a person types them in vain.


HEALTH_PAUSE, NOTE_PAUSE = 10.0, 300.0  # how often the monitor asks for health, and how often it writes the same down
CRASH_LIMIT, CRASH_WINDOW = 5, 300.0
LONGEST_BACKOFF = 30.0
REBORN_PATIENCE = 15.0  # ComfyUI-Manager's restart on Windows: another process, there before the former has ended


def console_interrupt_entry(words: list[str]) -> int:
    """Be the short-lived Windows helper: attach to the console of the PID in `words` and press Ctrl-C there."""
    attach_and_interrupt(int(words[0]))
    return 0


def monitor_entry(words: list[str]) -> int:
    """Start ComfyUI or take on the one that runs, answer the one who waits at our pipe, and watch."""
    task, trouble = json.loads(os.environ.pop(MONITOR_VARIABLE)), None
    try:
        environment = Workspace(task["workspace"]).get_environment(task["environment"])
        if not environment.take_on_as_monitor():
            environment.run(task["args"], monitored=True, **task["options"])
    except CDEnvironmentError as error:
        trouble = error
    except OSError as error:
        trouble = CDEnvironmentError(f"{error.filename}: {error.strerror}", code="system")
    except Exception as error:  # who waits at the pipe must hear of it
        trouble = CDEnvironmentError(f"{type(error).__name__}: {error}", code="bug")
    os.write(1, json.dumps(vars(trouble) if trouble else {}).encode() + b"\n")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    return 1 if trouble else Monitor(environment).watch()


class Monitor:
    """Watches one ComfyUI: health, exit codes, restarts after crashes, rotation. What is wanted the state file says.

    `record` is the run it watches; `entry` is what the record says of us: PID, times of restarts, and why we gave up.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.record = environment._read_state()
        self.entry: dict[str, Any] = dict((self.record.monitor if self.record else None) or {})
        self.written = ("", 0.0)  # the health that was written down last, and when

    def watch(self) -> int:
        """Return when ComfyUI was stopped, ended well, or crashed too often."""
        while True:
            for snapshot, code in self.environment.watch(HEALTH_PAUSE):
                if snapshot.process is not None:
                    self.look_after(snapshot)
                elif self.goes_on(code):
                    break
                else:
                    return 0
            self.record = self.environment._read_state()

    def look_after(self, snapshot: Snapshot) -> None:
        """Write news of its health down, and rotate a log that has grown."""
        environment = self.environment
        with suppress(CDEnvironmentError, OSError):  # another command is at work, or the disk is full: next time
            answer = look_at(environment.config_of(snapshot), 5.0, with_queue=False)
            state = environment.describe(snapshot, answer)["state"]
            health, now = {RUNNING: HEALTHY, STARTING: STARTING}.get(state, "unhealthy"), time.monotonic()
            if health != self.written[0] or now - self.written[1] > NOTE_PAUSE:
                environment.amend_record(seconds=0.5, last_health_check=utc_now(), health_status=health)
                self.written = (health, now)
            if os.path.getsize(environment.log_path) > LOG_LIMIT:
                environment.rotate_log()

    def goes_on(self, code: Optional[int]) -> bool:
        """Decide what to do after an end; return whether ComfyUI runs again, by itself or by us."""
        wish = self._wish()
        if wish == STOPPED:
            return False
        may_be_reborn = IS_WINDOWS and wish != RESTART and code in (0, None)
        if may_be_reborn and until(self._is_taken_on, REBORN_PATIENCE, 0.5):
            return True
        while self.record is not None:
            is_asked, now = self._wish() == RESTART, time.time()
            if not is_asked:
                self.environment.amend_record(self.record.run_id, last_exit={"code": code, "at": utc_now()})
                if code in (0, 2):  # a good end, or arguments that ComfyUI refuses every time
                    break
            recent = [moment for moment in self.entry.get("restarts", []) if 0 <= now - moment < CRASH_WINDOW]
            if not is_asked and len(recent) >= CRASH_LIMIT:
                last = "an unknown code" if code is None else format_exit(code)
                times = f"{len(recent) + 1} crashes within {format_duration(CRASH_WINDOW)}"
                return self._give_up(f"{times}, the last with {last}")
            try:
                return self._restarts(recent)
            except (CDEnvironmentError, OSError) as error:
                if not isinstance(error, CDEndedError) or error.exit_code == 2:  # 2: the record is the former run's
                    return self._give_up(f"it could not be started again: {error}")
                code, self.record = error.exit_code, self.environment._read_state()  # a crash like any other
        return False

    def _wish(self) -> str:
        """Return what is wanted of it: running, restart, or stopped, also when another run has begun."""
        now = self.environment._read_state()
        if now is None or self.record is None:
            return STOPPED
        return now.desired_state if now.run_id == self.record.run_id or is_own_intent(now) else STOPPED

    def _is_taken_on(self) -> bool:
        """On Windows ComfyUI-Manager's restart is a good end and another PID: find it by its marker and record it."""
        with suppress(CDEnvironmentError, OSError):  # another command is at work
            return self.environment.take_on_as_monitor(self.entry)
        return False

    def _restarts(self, recent: list[float]) -> bool:
        """Start again after a pause that doubles; a full disk, where nothing can be written, is waited for."""
        pause = min(2.0 ** len(recent), LONGEST_BACKOFF)
        until(lambda: self._wish() != "running", pause, 0.2)
        until(lambda: self._wish() == STOPPED or not self.environment.is_held_back(), float("inf"), 0.2)
        while self._wish() != STOPPED and self.record is not None:
            if self._wish() == "running":
                self.entry["restarts"] = [*recent, time.time()]
            try:
                return self.environment.restart_kept(self.record, self.entry)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
                    raise
            until(lambda: self._wish() == STOPPED, LONGEST_BACKOFF, 0.2)
        return False

    def _give_up(self, reason: str) -> bool:
        """Record why, and watch no longer."""
        self.entry["gave_up"] = reason
        self.environment.amend_record(self.record.run_id if self.record else None, monitor=self.entry)
        return False


HIDDEN_ENTRIES = {"--console-interrupt": console_interrupt_entry, "--monitor": monitor_entry}


# ====================================================================================================================
# 14. The console
# The only section that prints or asks.

BEGAN = time.monotonic()
COLOUR_CHOICES = ("auto", "always", "never")
COLOURS = {"✓": 32, "✗": 31, "⚠": 33}
IN_ASCII = {"✓": "[ok]", "✗": "[x]", "⚠": "[!]", "\ufe0f": "", "•": "*", "…": "~", **dict.fromkeys("🎮📋🔄⏸🧹🔍", ">")}
PLAIN = str.maketrans(IN_ASCII)
# What can drive a terminal, begin a line, or make it show letters in another order than they stand in.
STEERING = (*range(9), *range(10, 32), *range(127, 160), 0x61C, *range(0x200E, 0x2010), *range(0x2028, 0x202F))
CONTROLS = dict.fromkeys((*STEERING, *range(0x2066, 0x206A)), " ")
ONE_ENVIRONMENT = tuple("run stop restart status logs repair node open exec update history".split())
Typed = Callable[..., str]  # the words of one of our commands -> how it must be typed here


@dataclass
class Report:
    """What a command found or did: JSON-ready `data`, `lines` for people, the environment it is about, the exit code.

    `error` is what was not done, for JSON; people were told of it already.
    """

    data: dict[str, Any]
    environment: Optional[str] = None
    lines: "Iterable[str]" = ()
    code: int = 0
    error: Optional[CDEnvironmentError] = None


@dataclass
class Console:
    """The one who speaks: words on `out`, warnings and errors on `err`, questions on a terminal alone.

    In JSON mode nothing is said but the one object at the end. `call` tells how comfydock was called; `where` is the
    `--workspace DIR` and `chosen` the `-e NAME` that a command needs to mean the same again. A line that cannot be
    written (a full disk, no reader any more) must not keep ComfyUI from being stopped: `write_error` holds the error
    until `flush` raises it. `drawn` is what `progress` has on the terminal, `spoke` when something was written last,
    `gate` keeps a ticker from writing into a line, `cut` is the beginning of a colour code at the end of a log.
    """

    out: Any
    err: Any
    source: Any
    json_mode: bool = False
    call: "Callable[[], str]" = lambda: "comfydock"
    chosen: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    environment: Optional[str] = None
    quiet: bool = False
    colour: str = "auto"
    log_as_it_is: bool = False
    write_error: Optional[OSError] = None
    drawn: str = ""
    spoke: float = BEGAN
    gate: Any = nullcontext()
    cut: bytes = b""

    def say(self, line: str = "") -> None:
        """Say what goes on, in one line; nothing in JSON mode or when quiet."""
        if not self.quiet:
            self.result(line)

    def result(self, line: str) -> None:
        """Tell in one line what was found or done; nothing in JSON mode."""
        if not self.json_mode:
            self._write(self.out, line + "\n")

    def work(self, line: str) -> None:
        """Be a Progress: show a line of long work, but not what pip says of things that are there already."""
        noise = ("Requirement already satisfied", "Looking in ", "[notice]", "WARNING: Retrying")
        if not line.lstrip().startswith(noise):
            self.say(f"   {line}")

    def warn(self, line: str, sign: str = "⚠ ") -> None:
        """Put one line on the error stream, in JSON mode too."""
        self._write(self.err, f"{sign}{line}\n")

    def trace(self, line: str) -> None:
        """Put one line of -v on the error stream, in JSON mode too."""
        self.warn(line, f"[{time.monotonic() - BEGAN:7.3f}] ")

    def typed(self, *words: str) -> str:
        """Return one of our commands as it must be typed here."""
        where = () if words[0] in ("--workspace", "init", "help") else self.where
        chosen = self.chosen if words[0] in ONE_ENVIRONMENT and "--demo" not in words else ()
        if words[0] == "run" and "--demo" not in words and self.environment == DEMO_NAME:  # taken only by its name
            chosen = ("-e", DEMO_NAME)
        return " ".join([self.call(), *map(quote, (*where, *chosen, *words))])

    def hint(self, error: CDEnvironmentError) -> "tuple[str, Optional[str]]":
        """Return what to do about an error, as a text (or ""), and the first command in it."""
        if isinstance(error.hint, str):
            return error.hint, None
        is_command = all(isinstance(part, str) for part in error.hint)
        parts = ["Try: ", tuple(error.hint)] if is_command else error.hint
        shown = [part if isinstance(part, str) else self.typed(*part).translate(CONTROLS) for part in parts]
        return "".join(shown), next(text for text, part in zip(shown, parts) if not isinstance(part, str))

    def progress(self, line: str) -> None:
        """Draw a line that the next one overwrites; only a terminal shows it, and "" takes it away."""
        self.spoke = time.monotonic()
        if is_terminal(self.err) and not self.json_mode and not self.quiet and line != self.drawn:
            line = line[: columns(self.err) - 1]
            self._write(self.err, line)
            self.drawn = line

    @contextmanager
    def ticking(self, what: str) -> Iterator[None]:
        """Show on a terminal that we are still at it, whenever nothing was said for a second."""
        if not is_terminal(self.err) or self.json_mode or self.quiet:
            yield
            return
        import threading

        self.gate, done, began = threading.RLock(), threading.Event(), time.monotonic()

        def tick() -> None:
            while not done.wait(0.25):
                with self.gate, suppress(OSError, ValueError):  # the terminal may be gone
                    if time.monotonic() - self.spoke > 1.0 or self.drawn.startswith(f"   {what} ..."):
                        self.progress(f"   {what} ... {time.monotonic() - began:.0f} s")

        ticker = None
        with suppress(CDEnvironmentError):  # without it, too
            ticker = start_thread(tick)
        try:
            yield
        finally:
            done.set()
            if ticker is not None:
                ticker.join()
            self.progress("")

    def log(self, data: bytes) -> None:
        """Show bytes of a log, without its colours where there shall be none, unless `log_as_it_is`. Raises OSError."""
        if not self.log_as_it_is and not wants_colour(self.out, self.colour):
            whole = re.sub(rb"\x1b\[[0-9;]*m", b"", self.cut + data)
            end = re.search(rb"\x1b(\[[0-9;]{0,20})?$", whole[-30:])
            self.cut = end[0] if end else b""
            data = whole[: len(whole) - len(self.cut)]
        self.raw(data)

    def redraw(self, lines: list[str], over: int) -> None:
        """Show `lines` in place of the `over` lines that stand above the cursor."""
        up = f"\x1b[{over}A" if over else ""
        shown = "".join(f"{line.translate(CONTROLS)}\x1b[K\n" for line in lines)
        self.raw(f"{up}{shown}\x1b[J".encode(getattr(self.out, "encoding", None) or "utf-8", "replace"))

    def raw(self, data: bytes) -> None:
        """Show bytes as they are. Raises OSError: who only shows a log has nothing else to do."""
        if self.out is None:
            return
        self.progress("")
        try:
            self.out.flush()
            sink = getattr(self.out, "buffer", None)
            if sink is None:
                self.out.write(data.decode("utf-8", "replace"))
            else:
                sink.write(data)
                sink.flush()
        except OSError as error:
            raise output_error(error) from error

    def has_reader(self) -> bool:
        """Tell whether somebody may still read `out`: a pipe tells when its reader has gone, not on Windows."""
        import select
        import stat

        poll: Any = getattr(select, "poll", None)
        try:
            poller, number = poll(), self.out.fileno()
            poller.register(number, 0)
            return not stat.S_ISFIFO(os.fstat(number).st_mode) or not poller.poll(0)
        except (AttributeError, TypeError, OSError, ValueError):
            return True

    def can_ask(self) -> bool:
        """Tell whether a terminal is there to answer."""
        return not self.json_mode and is_terminal(self.source) and is_terminal(self.out)

    def ask(self, question: str, default: bool) -> Optional[bool]:
        """Return the answer to a yes-or-no question; None where no terminal can answer."""
        if not self.can_ask():
            return None
        with self.gate:
            answer = ""
            try:
                self._write(self.out, f"{question} [{'Y/n' if default else 'y/N'}] ")
                answer = self.source.readline()
            finally:
                self._write(self.out, "" if answer else "\n")  # Ctrl-C and Ctrl-D leave the cursor behind the question
        if answer and not answer.strip():
            return default
        return answer.strip().lower() in ("y", "yes")  # Ctrl-D is no yes

    def show(self, command: str, report: Report) -> None:
        """Show a report in words, or as the one JSON object."""
        if self.json_mode:
            return self._object(command, report.environment, report.data, report.error)
        for line in report.lines:
            if not self.quiet or line and not line.startswith("Tip:"):
                self.result(line)

    def fail(self, command: str, error: CDEnvironmentError) -> None:
        """Tell of an error: a sentence and a hint on the error stream, or the one JSON object."""
        if self.json_mode:
            return self._object(command, self.environment, None, error)
        self.problem(error, "error:" if is_terminal(self.err) else "comfydock:")

    def problem(self, error: CDEnvironmentError, opening: str = "✗") -> None:
        """Tell of an error; with no other opening, of one of several things that could not be done."""
        self._write(self.err, opening, "1;31")
        self._write(self.err, f" {as_sentence(error.message)}\n")
        hint, _ = self.hint(error)
        indent = "" if "\n" in hint else "  "
        for line in hint.split("\n") if hint else ():
            self._write(self.err, indent + line, "2")
            self._write(self.err, "\n")

    def flush(self) -> None:
        """Send what is still buffered; raises OSError (a closed pipe, a full disk), and for what went unheard."""
        if self.write_error is not None:
            error, self.write_error = self.write_error, None
            raise error
        for stream in (self.out, self.err):
            if stream is not None and not stream.closed:
                stream.flush()

    def _object(self, command: str, environment: Optional[str], data: Any, error: Optional[CDEnvironmentError]) -> None:
        problem = None
        if error is not None:
            hint, typed = self.hint(error)
            prose = None if hint == f"Try: {typed}" else hint or None
            problem = {"message": error.message, "hint": prose, "try": typed, "code": error.code}
        whole = {"schema": 2, "command": command, "ok": error is None, "environment": environment}
        self._write(self.out, json.dumps({**whole, "data": data, "error": problem}) + "\n")

    def _write(self, stream: Any, text: str, colour: str = "") -> None:
        """Write `text` as a stream can show it, in place of what `progress` has drawn."""
        if stream is None:  # closed by whoever started us
            return
        text = redact(text)
        line = text.strip("\n")  # our own line feeds stand around it; names of strangers may be in it
        text = text.replace(line, line.translate(CONTROLS), 1)
        if wants_colour(stream, self.colour) and not (self.json_mode and stream is self.out):
            for sign, number in COLOURS.items():
                text = text.replace(sign, f"\x1b[{number}m{sign}\x1b[0m")
            text = f"\x1b[{colour}m{text}\x1b[0m" if colour else text
        text = written_in(text, stream)
        with self.gate:
            self.spoke = time.monotonic()
            if self.drawn:
                blanks, self.drawn = " " * len(self.drawn), ""  # every terminal understands blanks
                with suppress(OSError):  # the terminal is gone
                    self.err.write(f"\r{blanks}\r")
                    self.err.flush()
            try:
                stream.write(text)
                stream.flush()
            except OSError as error:
                self.write_error = self.write_error or output_error(error)


def written_in(text: str, stream: Any) -> str:
    """Return `text` in ASCII where the encoding of a stream can do no better."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def as_sentence(text: str) -> str:
    """Return `text` with a capital at its beginning, unless that is a name or a path, and a stop at its end."""
    first = text.split(" ", 1)[0]
    opened = text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text
    return opened if opened.endswith((".", "!", "?", ":")) or "\n" in opened else f"{opened}."


def output_error(error: OSError) -> OSError:
    """Return what went wrong with the output: a pipe that nobody reads is to Windows an invalid argument."""
    if error.errno == errno.EINVAL:
        return BrokenPipeError(errno.EPIPE, "the reader has gone", "the output")
    error.filename = "the output"
    return error


def forget_output() -> None:
    """Send the rest to nowhere, so that the interpreter's last flush does not fail."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with suppress(OSError):
            os.dup2(sink, number)
    os.close(sink)


@contextmanager
def on_ctrl_c(error: Optional[Callable[[], CDEnvironmentError]] = None) -> Iterator[None]:
    """Raise what `error` returns for Ctrl-C; without it, Ctrl-C is how one ends what only watches."""
    try:
        yield
    except KeyboardInterrupt as caught:
        if isinstance(caught, Terminated):
            raise
        if error is not None:
            raise error() from None


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal; a closed or missing one is not."""
    return stream is not None and not stream.closed and bool(stream.isatty())


def columns(stream: Any) -> int:
    """Return how wide a terminal is, 80 where it does not tell."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def table(rows: list[dict[str, str]], dropped: tuple[str, ...], width: int) -> Iterator[str]:
    """Yield rows (title -> text) as lines below their titles; where `width` is less, columns go, then names are cut."""
    rows = [{title: written_in(text, sys.stdout) for title, text in row.items()} for row in rows]  # signs need places
    sizes = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    excess = sum(sizes.values()) + 2 * len(sizes) - 2 - width
    for title in dropped:
        excess -= sizes.pop(title) + 2 if excess > 0 else 0
    sizes["NAME"] = max(6, sizes["NAME"] - max(0, excess))
    for row in [dict(zip(sizes, sizes)), *rows]:
        if len(row["NAME"]) > sizes["NAME"]:
            row["NAME"] = row["NAME"][: sizes["NAME"] - 1] + written_in("…", sys.stdout)
        yield "  ".join(f"{row[title]:{size}}" for title, size in sizes.items()).rstrip()


def wants_colour(stream: Any, choice: str) -> bool:
    """Tell whether to colour; "auto": on a terminal that knows how, unless NO_COLOR asks for none (no-color.org)."""
    if choice != "auto":
        return choice == "always"
    is_able = is_terminal(stream) and os.environ.get("TERM") != "dumb" and not IS_WINDOWS
    return is_able and not os.environ.get("NO_COLOR")


def how_called(argv: list[str]) -> str:
    """Return how comfydock was called: `comfydock`, `python3 comfydock.py`, `python3 -m comfydock`."""
    script = argv[0]
    folder, name = os.path.split(os.path.abspath(script))
    if not name.endswith((".py", ".pyz")):
        is_found = os.path.normcase(folder) in map(os.path.normcase, os.get_exec_path())
        return "comfydock" if is_found and name.startswith("comfydock") else quote(script)
    original = getattr(sys, "orig_argv", None) or [os.path.basename(sys.executable or "python3")]
    is_short = len(original[0]) <= 20 or IS_WINDOWS or not on_path("python3")  # a venv's path says little, and is long
    python = quote(original[0]) if is_short else "python3"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)  # Python 3.9 has no orig_argv
    is_module = "-m" in original[1:3] or spec is not None and spec.name == "comfydock"
    return f"{python} -m comfydock" if is_module else f"{python} {quote(script)}"


# ====================================================================================================================
# 15. Commands
# A function for each command: find, act, return a report. It may tell and ask through the console, and never exits.

FOLLOW_PAUSE = 0.05


class Arguments:
    """What was typed, by name: the options and operands that the command has, and what `parse` adds."""

    comfyui_args: list[str]
    env: Optional[str]

    def __init__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def has(self, name: str) -> bool:
        """Tell whether an option was typed, which the command need not have; a number may well be 0."""
        value = vars(self).get(name)
        return value is not None and value is not False


Act = Callable[[Console, Arguments], Report]
COMMANDS: "dict[str, Command]" = {}


class Command:
    """A command, made by its text and what runs it: "USAGE: SUMMARY", a line for each option, and examples.

    An option's line has its flags, its metavar and what it does. A metavar in brackets may be left out, and a single
    word behind "default:" is the default. The operand is what is typed behind the name: "NAME", "ID...", "[PATH]".
    """

    act: Act

    def __init__(self, text: str) -> None:
        head, *self.lines = map(str.strip, text.splitlines())
        self.usage, _, self.summary = head.partition(": ")
        self.name = re.split(r" [\[A-Z]", self.usage)[0]
        self.operand = self.usage[len(self.name) :].strip()
        self.has_json = self.name not in ("logs", "exec", "top")  # these show bytes as they come, or are another's

    def __call__(self, act: Act) -> Act:
        """Take the function below; as a decorator."""
        self.act = act
        COMMANDS[self.name] = self
        return act


IDLE_OPTION = "--when-idle [SECONDS]  first wait until nothing is queued, at most this long (default: 3600)"
QUEUE_OPTIONS = f"""--timeout SECONDS     seconds until it is killed (default: 10)
    {IDLE_OPTION}
    --force               do not ask about queued work"""
ALL_OPTION = "--all                 every environment of the workspace, one after the other"
WAIT_OPTION = "--wait [SECONDS]      return only when ComfyUI answers (default: 180)"
RESTART_OPTIONS = f"""--restart             restart a running ComfyUI afterwards, without asking
    --no-restart          do not restart it, and do not ask
    {WAIT_OPTION}"""


def workspace_of(args: Arguments, is_named: bool = True, to_make: bool = False) -> Workspace:
    """Return the workspace that is meant, which where no environment `is_named` may be that of this folder."""
    return select_workspace(args.workspace, is_named, to_make)


def selected(console: Console, args: Arguments, name: Optional[str] = None) -> Environment:
    """Return the environment that a command is about."""
    name = name or args.env
    return prepare(console, args, workspace_of(args, name is not None).select(name))


def prepare(console: Console, args: Arguments, environment: Environment) -> Environment:
    """Return it, healed and telling the console, which learns whether hints need `-e` to reach it again."""
    environment.tell = console.work
    environment.finish_rotation()
    trace(f"environment '{environment.name}' at {environment.paths.root}")
    trace(f"processes are read by {type(process_table()).__name__}")
    console.environment = environment.name
    console.chosen = ("-e", environment.name) if args.env or args.has("demo") else ()
    return environment


def do_all(console: Console, args: Arguments, command: Command) -> Report:
    """Do a command to every environment, a line each; one that fails does not keep the others."""
    items, first_error, was_quiet, needs_life = [], None, console.quiet, command.name in ("stop", "restart")
    for environment in workspace_of(args).list_environments():
        if not environment.is_running() if needs_life else environment.manifest.demo:
            continue
        name, report, error = environment.name, Report({}), None
        console.quiet = True
        try:
            report = command.act(console, Arguments({**vars(args), "env": name, "all": False, "one_of_all": True}))
            error = report.error
        except CDEnvironmentError as problem:
            error = problem
        finally:
            console.quiet = was_quiet
        is_done = error is None or error.code == "running"
        items.append({"environment": name, "ok": is_done, "data": report.data})
        if is_done:
            line = ", ".join(one.lstrip("✓ ") for one in report.lines if one.startswith("✓"))
            console.result(f"✓ {name}: {line or ('already running' if error else 'nothing to do')}")
        elif error is not None:
            console.problem(CDEnvironmentError(f"{name}: {error.message}", error.hint))
            first_error = first_error or error
    if not items:
        console.result("Nothing is running." if needs_life else "No environment to act on.")
    return Report({"environments": items}, code=1 if first_error else 0, error=first_error)


def stays_in_foreground(command: str, args: Arguments) -> bool:
    """Tell whether a command is a `run` that streams the log until ComfyUI ends; as PID 1 it is, for its container."""
    return command == "run" and (args.foreground or os.getpid() == 1)


@Command(f"""run [NAME]: start ComfyUI in the background; its own arguments pass through
    -f --foreground       stay and stream the log (without --json); Ctrl-C stops ComfyUI
    --auto-port           take the next free port when the port is in use
    --set-env KEY=VALUE   an environment variable for ComfyUI, kept for restarts (KEY: as it is here)
    --monitor             start it under a small watcher that restarts it after a crash
    --demo                run the built-in stand-in for ComfyUI
    --python PATH         the Python of a ComfyUI folder, kept for later starts
    --take-over           drop the record of another machine or container
    --no-sync             do not install what is missing first
    --open                wait until ComfyUI answers, then open it in the browser
    {WAIT_OPTION}
    {ALL_OPTION}
    e.g. run --demo; run --wait -- --listen --port 8190; -e dev run --foreground""")
def run(console: Console, args: Arguments) -> Report:
    config = parse_comfyui_args(args.comfyui_args)  # before anything is made or changed
    stays = stays_in_foreground("run", args)
    environment = environment_to_run(console, args)
    say_what_starts(console, environment, args.comfyui_args, config.host, stays)
    is_demo = environment.manifest.demo
    asks_for_port = any(_is_flag(word.partition("=")[0], "--port", "--po") for word in args.comfyui_args)
    auto_port = args.auto_port or (is_demo or args.has("one_of_all")) and not asks_for_port
    if not args.no_sync and not is_demo:
        seen = environment.observe()
        if seen.state in (STOPPED, CRASHED) and not seen.relics and not auto_port:
            environment.require_free_port(config)  # before anything is installed, and once more at the start
        environment.sync()
    options = {"auto_port": auto_port, "set_env": args.set_env, "take_over": args.take_over}
    if stays:
        return run_in_foreground(console, environment, args.comfyui_args, options)
    return run_in_background(console, args, environment, options)


def environment_to_run(console: Console, args: Arguments) -> Environment:
    """As `selected`; the demo is made, and a checkout that nobody has adopted is adopted."""
    is_named = args.env is not None or args.demo
    workspace = workspace_of(args, is_named, to_make=True)
    here, checkout = (None, None) if is_named else workspace.around(os.path.realpath(current_folder()))
    if args.demo:
        if args.env not in (None, DEMO_NAME):
            raise CDEnvironmentError("--demo has an environment of its own, so -e cannot name another.", "", "usage")
        environment = workspace.demo()
    elif checkout and here is None:
        try:
            environment = workspace.adopt(checkout, python=args.python)
        except CDEnvironmentError as error:
            if error.hint[:2] == ("run", "--python"):
                error.hint = (*error.hint, *args.typed)
            raise
        console.result(f"✓ Adopted {checkout} as environment '{environment.name}' (Python: {environment.python})")
    else:
        environment = workspace.select(args.env, to_start=True)
        if args.python is not None:
            if environment.manifest.comfyui_path is None:
                message = f"Environment '{environment.name}' has a Python of its own, so it takes no other."
                raise CDEnvironmentError(message, "", "usage")
            workspace.adopt(environment.manifest.comfyui_path, environment.name, args.python)
    return prepare(console, args, environment)


def say_what_starts(console: Console, environment: Environment, words: list[str], host: str, stays: bool) -> None:
    is_demo, last, python = environment.manifest.demo, environment.last_record(), environment.python
    console.say(f"🎮 Starting {'the built-in demo' if is_demo else 'ComfyUI'} in environment: {environment.name}")
    if words:
        console.say(f"   Arguments: {' '.join(words)}")
    for name in filter(os.environ.__contains__, DROPPED_VARIABLES):
        console.warn(f"{name} is set here; ComfyUI starts without it.")
    shared, own, logs = environment.workspace_paths, environment.paths, os.path.dirname(environment.log_path)
    folders = (shared.root, shared.metadata, shared.environments, own.root, own.cec, os.path.dirname(logs), logs)
    for folder in list(filter(is_writable_by_others, folders))[:1]:  # there every user may plant files
        console.warn(f"Other users may write into {folder}, and so change what runs here: chmod o-w '{folder}'")
    init = None if stays else non_reaping_init()
    if init is not None:
        console.warn(f"PID 1 ({init[:60]}) does not reap zombies; start the container with --init.")
    if not is_loopback(host):
        console.warn(f"ComfyUI has no password: whoever can reach this machine on {host or 'any address'} can use it.")
    if last and last.args and last.args != words and not is_demo:
        console.say(f"   Last time: {' '.join(map(quote, last.args))}. {console.typed('restart')} starts with these.")
    if "--enable-manager" in words and not (is_demo or has_module(python, "comfyui_manager")):
        file = quote(os.path.join(environment.comfyui_path, "manager_requirements.txt"))
        console.warn(f"ComfyUI-Manager is not installed here: {quote(python)} -m pip install -r {file}")


def run_in_background(console: Console, args: Arguments, environment: Environment, options: dict[str, Any]) -> Report:
    watched = environment.observe().process if args.monitor else None
    if watched is not None and args.comfyui_args:
        message = f"ComfyUI is already running (PID {watched.pid}), so it cannot be given other arguments."
        raise CDEnvironmentError(message, ("-e", environment.name, "run", "--monitor"), "running")
    try:
        starting = environment.start_monitored if args.monitor else environment.run
        starting(args.comfyui_args, **options)
    except CDEndedError:
        if args.wait is not None:
            show_last_lines(console, environment)
        raise
    opens = args.open or environment.opens_browser(args.comfyui_args)
    seconds = START_GRACE if opens and args.wait is None else args.wait
    what = "A monitor now watches ComfyUI (PID {pid})" if watched else "ComfyUI started in background (PID {pid})"
    report = started_report(console, environment, what, seconds)
    report.data["only_watched"] = watched is not None
    tip = f"Tip: View logs with '{console.typed('logs')}', stop with '{console.typed('stop')}'"
    report.lines = [*report.lines, f"  Log: {report.data['log']}", "", tip]
    if opens and report.error is None:
        show_in_browser(console, report.data["url"])
    return report


def started_report(console: Console, environment: Environment, what: str, seconds: Optional[float] = None) -> Report:
    """Report that `what` was started; where `seconds` are given, wait so long for ComfyUI's first answer."""
    waited: dict[str, Any] = {}
    error = None if seconds is None else await_answer(console, environment, seconds, waited)
    record = environment._read_state()
    if record is None:  # another command has stopped it meanwhile
        message = f"ComfyUI of environment '{environment.name}' was stopped by another command."
        raise CDEnvironmentError(message, ("status",))
    is_ready, url = waited.get("ready", False), local_url(environment.config_of(Snapshot(RUNNING, record)))
    data = {
        **{name: getattr(record, name) for name in ("pid", "host", "port", "args", "started_at")},
        "url": url,
        "health": HEALTHY if is_ready else environment.report(0.5)["health"] or STARTING,
        "log": record.log_path,
        "demo": environment.manifest.demo,
        **waited,
    }
    lines = [f"✓ ComfyUI is ready ({waited['waited']:.1f} s)"] if is_ready else []
    waits = f"{console.typed('open')} or {console.typed('run', '--wait')}"
    where = f"✓ Starting on {url} (answers when ComfyUI has loaded; {waits} waits)"
    lines += [f"✓ {what.format(**data)}", f"✓ Running on {url}" if data["health"] == HEALTHY else where]
    return Report(data, environment.name, lines, 1 if error else 0, error)


def await_answer(
    console: Console, environment: Environment, seconds: float, data: dict[str, Any]
) -> Optional[CDEnvironmentError]:
    """Wait for ComfyUI's first healthy answer and note in `data` whether it came; return what went wrong.

    People are told by raising it; a script needs to know the PID, too.
    """
    began, failed = time.monotonic(), None
    gone = CDEnvironmentError("Stopped waiting. ComfyUI keeps running.", ("status",), "interrupted")
    try:
        with on_ctrl_c(lambda: gone):
            environment.wait_until_ready(seconds, console.progress)
    except CDEnvironmentError as error:
        if error.code == "ended":
            show_last_lines(console, environment)
        if not console.json_mode or error is gone:
            raise
        failed = error
    data.update(ready=failed is None, waited=round(time.monotonic() - began, 3))
    return failed


def show_in_browser(console: Console, url: str) -> bool:
    """Open `url`; where no browser can be seen from here, tell it, and over SSH how to reach it."""
    if open_in_browser(url):
        return True
    console.result(f"Open it in your browser: {url}")
    if os.environ.get("SSH_CONNECTION"):
        port = url.rpartition(":")[2]
        server = os.environ["SSH_CONNECTION"].split()[2:3]
        console.result(f"From your own machine: ssh -L {port}:127.0.0.1:{port} {(server or ['SERVER'])[0]}")
    return False


@Command("""open [NAME]: open ComfyUI in the browser, once it answers
    --wait SECONDS        how long to wait for it (default: 180)
    e.g. open; open sdxl""")
def open_it(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    if environment.observe().process is None:
        raise CDEnvironmentError(f"ComfyUI is not running in environment '{environment.name}'", ("run",), "stopped")
    environment.wait_until_ready(args.wait, console.progress)
    url = environment.report()["url"]
    is_open = show_in_browser(console, url)
    return Report({"url": url, "opened": is_open}, environment.name, [f"✓ {url}"] if is_open else [])


@Command("""exec CMD...: run a program in the ComfyUI folder with the environment's Python
    e.g. exec pip list; -e dev exec -- python -V""")
def execute(console: Console, args: Arguments) -> Report:
    if not args.comfyui_args:
        raise CDEnvironmentError("'exec' needs a program to run.", ("help", "exec"), "usage")
    from shutil import which

    environment = selected(console, args)
    environment.require_comfyui()
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    variables, (program, *words) = with_interpreter(kept, environment.python), args.comfyui_args
    own = {"python": [environment.python], "pip": [environment.python, "-m", "pip"]}
    found = own.get(program, [which(program, path=variables["PATH"]) or ""])  # Windows would look along our own PATH
    if not found[0]:
        message = f"There is no program '{program}' on the PATH of environment '{environment.name}'."
        raise CDEnvironmentError(message, "", "not-found")
    code = run_at_terminal([*found, *words], str(environment.comfyui_path), variables)
    return Report({}, environment.name, code=shell_code(code))


def run_in_foreground(console: Console, environment: Environment, words: list[str], options: dict[str, Any]) -> Report:
    """Start and stay; from the very start a signal stops ComfyUI instead of leaving it behind."""
    environment.is_keeper = True
    with noted_signals() as received:
        try:
            environment.run(words, **options)
            started = started_report(console, environment, "ComfyUI started (PID {pid})")
            for line in (*started.lines, f"  Log: {started.data['log']}"):
                console.result(line)
            for line in ("=" * 60, "Streaming logs (Ctrl+C to stop ComfyUI)...", "=" * 60):
                console.say(line)
            code = Foreground(console, environment, received).watch()
        except CDEndedError as error:
            show_last_lines(console, environment)
            console.problem(error)
            code = shell_code(error.exit_code)
        return Report({}, environment.name, code=code)


def show_last_lines(console: Console, environment: Environment) -> None:
    with suppress(OSError), open_regular(environment.log_path) as log:
        end = os.fstat(log.fileno()).st_size
        log.seek(last_lines_offset(log, 20, environment.session_offset(), end)[0])
        for line in without_colours(log.read(1 << 20).decode("utf-8", "replace")).split("\n"):
            console.warn(line, "")


def show_new(console: Console, follower: LogFollower) -> None:
    """Show what is new in a log, as far as one look can tell: it may grow faster than it can be shown."""
    for piece in takewhile(bool, (follower.read() for _ in range(16))):
        console.log(piece)


def shell_code(code: Optional[int]) -> int:
    """Return the exit code as a shell shows it: 128+N for signal N, 1 when it is not known."""
    return 1 if code is None else 128 - code if code < 0 else code


class Foreground:
    """The old blocking feel: one who watches a daemon until it ends, and ends it when told to.

    `received` is the list that signal handlers append to: "interrupt", "terminate" or "hangup".
    """

    def __init__(self, console: Console, environment: Environment, received: list[str]) -> None:
        self.console = console
        self.environment = environment
        self.received = received
        self.follower = LogFollower(environment.log_path, environment.session_offset())

    def watch(self) -> int:
        """Return the exit code of the command. What was stopped for a restart is started again; see keeper_of."""
        ours, is_ready = None, "NOTIFY_SOCKET" not in os.environ
        for snapshot, code in self.environment.watch(FOLLOW_PAUSE):
            record, process = snapshot.record, snapshot.process
            self._pump()
            is_ready = is_ready or self._tells_readiness(snapshot)
            if self.received:
                return self._stop()
            if os.getpid() == 1:
                reap_strangers(process.pid if process else 0)
            elif not self.console.has_reader():
                self._lose_reader()
            if process is not None or snapshot.state == STARTING:
                ours = record
                continue
            if record is None or record.desired_state == STOPPED or record.run_id != (ours or record).run_id:
                self._drain()
                self.console.say("\nComfyUI was stopped from elsewhere.")
                break
            if record.desired_state == RESTART:
                if not self.environment.is_held_back():
                    self.environment.restart_kept(record, None)
            elif not self._is_restarted(code):
                self._drain()
                self.environment.amend_record(record.run_id, last_exit={"code": code, "at": utc_now()})
                self.console.say(f"\n⚠️  ComfyUI process exited{'' if code is None else f' ({format_exit(code)})'}")
                return shell_code(code)
        return 0

    def _is_restarted(self, code: Optional[int]) -> bool:
        """Tell whether to look again: on Windows a restart by ComfyUI-Manager goes on under another PID."""
        may_be, environment = IS_WINDOWS and code in (0, None), self.environment
        return may_be and until(lambda: bool(self.received) or environment.is_running(), REBORN_PATIENCE, 0.5)

    def _tells_readiness(self, snapshot: Snapshot) -> bool:
        """Tell the engine that waits for it of ComfyUI's first healthy answer; return whether there was one."""
        answer = look_at(self.environment.config_of(snapshot), 0.3, with_queue=False)
        is_ready = snapshot.process is not None and self.environment.describe(snapshot, answer)["state"] == RUNNING
        if is_ready:
            notify_engine("READY=1")
        return is_ready

    def _pump(self) -> None:
        """Show what is new in the log, and return to where signals are heard.

        A terminal that is closed says EIO, perhaps before its SIGHUP comes: that is a hangup, with nobody to tell.
        """
        try:
            show_new(self.console, self.follower)
        except BrokenPipeError:
            self._lose_reader()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.received.append("hangup")
            forget_output()

    def _lose_reader(self) -> None:
        """Wait a moment for the signal that ended the reader, for it is on its way to us, too: `run -f | tee`, Ctrl-C.

        Raises BrokenPipeError when there is none: `run -f | head`, the reader has seen enough.
        """
        if not until(lambda: self.received, 1.0):
            raise BrokenPipeError
        forget_output()

    def _drain(self) -> None:
        """Show what is left, up to where the log ends now: a child of ComfyUI may go on writing for ever."""
        path, before = self.environment.log_path, -1
        end = os.path.getsize(path) if os.path.exists(path) else 0
        while before < self.follower.position < end:
            before = self.follower.position
            self._pump()

    def _stop(self) -> int:
        """Stop ComfyUI for the first signal; a second Ctrl-C meanwhile kills it."""
        first = self.received[0]
        notify_engine("STOPPING=1")
        self.console.say("\n⏸  Stopping ComfyUI...")
        self.environment.stop(meanwhile=self._is_impatient)
        self._drain()
        self.console.say("✓ ComfyUI stopped")
        if first == "hangup" and self.console.write_error is not None:  # its terminal is closed: no fault of ours
            self.console.write_error = None
            forget_output()
        return 130 if self._is_impatient() else {"interrupt": 0, "terminate": 143, "hangup": 129}[first]

    def _is_impatient(self) -> bool:
        self._pump()
        return self.received.count("interrupt") > 1


def crash_words(data: dict[str, Any]) -> str:
    """Return how and when a ComfyUI crashed, and why, as far as it is known."""
    code = data["exit_code"]
    known = "" if code is None else f"{'exit ' if code >= 0 else ''}{format_exit(code)}"
    when = f"{format_duration(time.time() - epoch_of(data['last_alive']))} ago" if data["last_alive"] else ""
    if when and code is None and not data["last_error"]:  # nobody watched it, and its log says nothing of an end
        when = f"last seen alive {when}"
    about = ", ".join(filter(None, (known, when)))
    return (f" ({about})" if about else "") + (f": {data['last_error']}" if data["last_error"] else "")


@Command(f"""stop [NAME]: stop ComfyUI and what it started
    {QUEUE_OPTIONS}
    --kill                kill it at once
    --port PORT           end the ComfyUI on this port, whoever started it
    --dry-run             with --port: only say what would be ended
    {ALL_OPTION}
    e.g. stop; -e dev stop --timeout 60""")
def stop(console: Console, args: Arguments) -> Report:
    if args.port is not None:
        return stop_port(console, args)
    environment = selected(console, args)
    cut_off = settle_queue(console, args, environment, "stop")
    snapshot = environment.observe()
    process, record = snapshot.process, snapshot.record
    if process is not None and snapshot.note != "untracked":
        console.say(f"⏸  Stopping ComfyUI (PID {process.pid})...")
    crash = environment.last_words(record) if record and snapshot.state == CRASHED else None
    had_monitor = process is None and environment.monitor_process(record) is not None

    def interrupted() -> CDEnvironmentError:
        now = "keeps running" if environment.is_running() else "has stopped"
        return CDEnvironmentError(f"Interrupted. ComfyUI {now}.", ("status",), "interrupted")

    with on_ctrl_c(interrupted):
        stopped = environment.stop(args.timeout, kill=args.kill)
    left = writers_of(real_path(environment.log_path)) if stopped else []
    called_off = had_monitor and not stopped
    called = "✓ ComfyUI was down after a crash; its monitor will not start it again" if called_off else ""
    lines = [
        "✓ ComfyUI stopped" if stopped else called or f"ComfyUI is not running in environment '{environment.name}'"
    ]
    lines += [f"  Left alone: PID {one.pid} ({one.text[:80]}) still writes to its log" for one in left]
    lines += [f"  It had crashed{crash_words(crash)}"] if crash else []
    data = {"stopped": stopped, "pid": process.pid if process else None, "cut_off": cut_off, "crash": crash}
    named = [{"pid": one.pid, "command": one.text} for one in left]
    return Report({**data, "called_off": called_off, "left": named}, environment.name, lines)


def stop_port(console: Console, args: Arguments) -> Report:
    """End the ComfyUI on a port, once it is proved to be one; an environment that tracks it is told."""
    process = comfyui_on_port(args.port)
    owner = workspace_of(args, args.env is not None).tracker_of(process.pid)
    name = owner.name if owner else None
    data = {"stopped": False, "pid": process.pid, "port": args.port, "command": process.text}
    if args.dry_run:
        line = f"PID {process.pid} is the ComfyUI on port {args.port}; it would be ended: {process.text}"
        return Report({**data, "dry_run": True}, name, [line])
    if owner is not None:
        data["cut_off"] = settle_queue(console, args, owner, f"stop --port {args.port}")
    console.say(f"⏸  Stopping ComfyUI (PID {process.pid}) on port {args.port}...")
    if owner is not None:
        owner.stop(args.timeout, kill=args.kill)
    else:
        end_with_family(process, 0 if args.kill else args.timeout)
    return Report({**data, "stopped": True}, name, ["✓ ComfyUI stopped"])


def format_queue(counts: "tuple[int, int]") -> str:
    return "{} running, {} queued".format(*counts)


def queued_work(environment: Environment) -> "Optional[tuple[int, int]]":
    """Return what runs and what waits in ComfyUI's queue; None where there is nothing, or nobody answers."""
    counts = environment.queue()
    return counts if counts is not None and any(counts) else None


def settle_queue(console: Console, args: Arguments, environment: Environment, command: str) -> Optional[dict[str, int]]:
    """Return what work a `command` that interrupts cuts off: a terminal is asked, --when-idle waits, scripts are told.

    A ComfyUI that does not answer, and a queue that never drains, hold nobody up for ever. Raises
    CDEnvironmentError when a terminal says no.
    """
    counts, limit = None if args.has("kill") else queued_work(environment), args.when_idle

    def is_idle() -> bool:
        nonlocal counts
        counts = queued_work(environment)
        if counts is not None:
            left = format_duration(max(0.0, deadline - time.monotonic()))
            console.progress(f"   Waiting for ComfyUI's queue: {format_queue(counts)}, at most {left} more")
        return counts is None

    if counts is not None and limit is not None:
        if not is_terminal(console.err):
            console.warn(f"Waiting until ComfyUI's queue is empty, at most {format_duration(limit)}.")
        deadline = time.monotonic() + limit
        until(is_idle, limit, 0.25)
    if counts is None:
        return None
    if not args.force and limit is None:
        question = f"ComfyUI is busy: {format_queue(counts)}. {command.split()[0].capitalize()} anyway?"
        if console.ask(question, False) is False:
            message = f"Nothing was done: ComfyUI is busy, {format_queue(counts)}."
            raise CDEnvironmentError(message, (*command.split(), "--when-idle"), "busy")
    console.warn(f"This cuts off work: {format_queue(counts)}.")
    return {"running": counts[0], "pending": counts[1]}


@Command(f"""restart [NAME]: stop and start again with the same arguments
    {QUEUE_OPTIONS}
    {WAIT_OPTION}
    {ALL_OPTION}
    e.g. restart; restart sdxl --wait""")
def restart(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    cut_off = settle_queue(console, args, environment, "restart")
    snapshot = environment.observe()
    last = environment.last_record()
    if last is not None and snapshot.state != FOREIGN:
        console.say("🔄 Restarting ComfyUI...")
        previous = f"PID {snapshot.process.pid}" if snapshot.process else "not running"
        console.say(f"   Previous: {previous}, args: {' '.join(last.args) or '(none)'}")
    environment.restart(args.timeout)
    report = started_report(console, environment, "Restarted (new PID: {pid})", args.wait)
    report.data["cut_off"] = cut_off
    return report


def environment_title(data: dict[str, Any]) -> str:
    """Return the name of an environment as reports show it: the demo is always labelled."""
    return f"{data['name']} (the built-in demo)" if data["demo"] else str(data["name"])


_NOTES = {
    "interrupted": " (a start was interrupted before ComfyUI came up)",
    "rebooted": " (the machine was restarted since)",
    "damaged": " (the state file is damaged)",
    "moved": " (it has restarted itself under another PID)",
}
_HEALTH_WORDS = {
    "healthy": "✓ Healthy",
    "starting": "not answering yet",
    "unhealthy": "⚠ Not responding",
    OTHER_SERVICE: "⚠ Another program answers on port {port}",
    BAD_ANSWER: "⚠ It answers, but not as a healthy ComfyUI does",
}


def format_status(data: dict[str, Any], typed: Typed) -> Iterator[str]:
    live, monitor, alive, vram = data["pid"] is not None, data["monitor"], data["last_alive"], _vram(data)
    refused = "unrecognized arguments:" in (data["last_error"] or "")
    again = typed("run") + " with other arguments" if refused else typed("restart")
    if monitor and monitor["alive"] and not monitor["gave_up"]:
        again = "its monitor does so in a moment"
    facts = [
        ("Status", _status_line(data, typed)),
        ("PID", data["pid"]),
        ("URL", data["url"]),
        ("Health", live and _HEALTH_WORDS[data["health"]].format(**data)),
        ("Queue", data["queue"] and format_queue(tuple(data["queue"].values()))),
        ("Uptime", live and format_duration(data["uptime"])),
        ("ComfyUI", data["python"] and f"{data['version'] or 'unknown version'}, Python {data['python']}"),
        ("Device", data["device"] and data["device"] + (f", VRAM {vram}" if vram else "")),
        ("Arguments", live and " ".join(map(quote, data["args"]))),
        ("Last known alive", alive and time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_of(alive)))),
        *(
            ("Left over", f"PID {one['pid']} ({one['command'][:80]}); the next start or stop ends it")
            for one in data["relics"]
        ),
        ("Start it again", data["state"] == CRASHED and again),
        ("Monitor", monitor and _monitor_line(monitor, typed)),
        ("Log", data["log"] or "none, for comfydock has not started it"),
    ]
    yield from (f"Environment: {environment_title(data)}", "", "📋 Process:")
    yield from (f"   {title}: {fact}" for title, fact in facts if fact)
    if data["difference"] is not None and not data["difference"]["synced"]:
        yield ""
        yield f"⚠️  Environment needs repair: {typed('repair')}"
        yield from difference_lines(data["difference"])
    if data["missing"]:
        yield f"⚠ Its ComfyUI is missing: {data['missing']}"
    if not data["complete"]:
        yield f"⚠ Not complete: its creation was interrupted. Go on with: {typed(*data['resume'])}"


def _status_line(data: dict[str, Any], typed: Typed) -> str:
    if data["state"] == FOREIGN:
        return f"Unknown: started on another machine or in another container ({data['machine']})"
    if data["state"] == CRASHED:
        return f"Crashed{crash_words(data)}"
    if data["note"] == "untracked":
        return f"Running (not tracked: {typed('repair', '--orphan')})"
    if data["state"] == STARTING:
        return "Starting (alive, not answering yet)" if data["pid"] else "Starting"
    return {STOPPED: "Stopped", RUNNING: "Running ✓"}.get(data["state"], "Running") + _NOTES.get(data["note"], "")


def _monitor_line(monitor: dict[str, Any], typed: Typed) -> str:
    count = monitor["restarts"]
    times = f", restarted ComfyUI {count} time{'s' if count != 1 else ''}" if count else ""
    if monitor["gave_up"]:
        return f"⚠ gave up: {monitor['gave_up']}"
    return f"watching{times}" if monitor["alive"] else f"⚠ gone{times} (start a new one: {typed('run', '--monitor')})"


def _vram(data: dict[str, Any]) -> str:
    return f"{data['vram']['used'] / 2**30:.1f}/{data['vram']['total'] / 2**30:.1f} GB" if data["vram"] else ""


def difference_lines(difference: dict[str, Any]) -> Iterator[str]:
    if difference.get("error"):
        yield f"   • {difference['error']}"
        return
    for key, what in (("missing", "nodes in pyproject.toml not installed"), ("untracked", "extra nodes on filesystem")):
        if difference[key]:
            yield f"   • {len(difference[key])} {what}: {', '.join(difference[key])}"
    for item in difference["mismatches"]:
        yield f"   • {item['name']} is {item['actual']}, the manifest says {item['expected']}"
    if difference["interrupted"]:
        yield f"   • {difference['interrupted']} node changes were interrupted"


def difference_data(found: EnvironmentComparison) -> dict[str, Any]:
    return {
        "synced": found.is_synced,
        "error": None,
        "missing": found.missing_nodes,
        "untracked": found.extra_nodes,
        "mismatches": found.version_mismatches,
        "interrupted": found.interrupted,
    }


@Command("""status [NAME]: what ComfyUI is doing (exit code 3 when it is not running)
    e.g. status; -e dev status --json""")
def status(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    data = environment.report()
    if data["note"] == "damaged" and data["pid"] is None:
        raise environment.damaged_state()
    data["difference"] = None
    if not data["missing"] and data["complete"] and not data["demo"]:
        try:
            data["difference"] = difference_data(environment.nodes.compare())
        except (CDEnvironmentError, OSError) as error:
            message = error.message if isinstance(error, CDEnvironmentError) else f"{error.filename}: {error.strerror}"
            data["difference"] = {"synced": False, "error": message}
    lines = list(format_status(data, console.typed))
    del data["name"]  # the report has it
    return Report(data, environment.name, lines, 3 if data["state"] in (STOPPED, CRASHED) else 0)


_STATE_SIGNS = {RUNNING: "✓", STARTING: "•", UNRESPONSIVE: "⚠", CRASHED: "✗", FOREIGN: "?", UNKNOWN: "?"}
_STATE_NOTES = {"damaged": "damaged record", "unreadable": "unreadable record", "untracked": "untracked"}


def list_row(item: dict[str, Any]) -> dict[str, str]:
    """Return what a table shows of an environment, by column."""
    queue, monitor = item["queue"], item["monitor"] if item["pid"] else None
    remarks = [
        "not responding" if item["state"] == UNRESPONSIVE else item["state"],
        "monitored" if monitor and monitor["alive"] else "monitor gone" if monitor else "",
        "" if item["complete"] else "incomplete",
        _STATE_NOTES.get(item["note"]),
        "ComfyUI is missing" if item["missing"] else "",
    ]
    return {
        " ": _STATE_SIGNS.get(item["state"], " "),
        "NAME": environment_title(item) + (" (active)" if item["active"] else ""),
        "STATE": ", ".join(filter(None, remarks)),
        "QUEUE": f"{queue['running']}+{queue['pending']}" if queue else "",
        "VRAM": _vram(item),
        "UPTIME": format_duration(item["uptime"]) if item["uptime"] is not None else "",
        "PORT": str(item["port"] or ""),
        "VERSION": item["version"] or "",
    }


@Command("""list: all environments and what runs in them
    --watch               redraw it every 2 seconds, with memory and CPU: the same as top (without --json)
    e.g. list; list --json""")
def list_all(console: Console, args: Arguments) -> Report:
    if args.watch:
        return top(console, args)
    workspace = workspace_of(args, args.env is not None)
    shelf, reports = workspace.paths.kept, workspace.reports()
    kept = [os.path.join(shelf, name) for name in sorted(os.listdir(shelf))] if os.path.isdir(shelf) else []
    width = columns(sys.stdout) if is_terminal(sys.stdout) else 1000
    lines = list(table(list(map(list_row, reports)), ("VERSION", "VRAM", "UPTIME", "QUEUE"), width)) if reports else []
    if not reports:
        ways = "".join(part if isinstance(part, str) else console.typed(*part) for part in THREE_WAYS)
        lines = ["No environments found.", *ways.split("\n")]
    lines += [f"Kept of {len(kept)} deleted: {shelf}"] if kept else []
    return Report({"workspace": workspace.paths.root, "environments": reports, "kept": kept}, None, lines)


@Command("""top: watch all environments: queue, VRAM, memory, CPU
    e.g. top""")
def top(console: Console, args: Arguments) -> Report:
    """Redraw a table on the normal screen; no key is read and no mode is set, so a terminal needs no repair."""
    workspace = workspace_of(args)
    before, drawn = process_table().usage(), 0
    began = moment = time.monotonic()
    with on_ctrl_c():
        time.sleep(0.3)  # CPU is the difference of two looks
        while True:
            usage, now = process_table().usage(), time.monotonic()
            rows = [top_row(item, usage, before, now - moment) for item in workspace.reports()]
            dropped = ("VRAM", "UPTIME", "QUEUE")
            lines = list(table(rows, dropped, columns(console.out))) if rows else ["No environments found."]
            if not is_terminal(console.out):
                return Report({}, None, lines)
            height = os.get_terminal_size(console.out.fileno()).lines or 24
            if len(lines) >= height:
                lines = [*lines[: height - 2], f"... and {len(lines) - height + 2} more"]
            console.redraw(lines, drawn)
            before, moment, drawn = usage, now, len(lines)
            time.sleep(2.0 - (time.monotonic() - began) % 2.0)
    return Report({})


Usage = dict[int, tuple[int, float, int]]


def top_row(item: dict[str, Any], usage: Usage, before: Usage, seconds: float) -> dict[str, str]:
    """Return what `top` shows of an environment: what `list` does, and memory and CPU of its process tree."""
    row = list_row(item)
    port, _ = row.pop("PORT"), row.pop("VERSION")
    tree, size = {item["pid"]} & usage.keys(), 0
    while len(tree) > size:
        size = len(tree)
        tree |= {pid for pid, (parent, _, _) in usage.items() if parent in tree}
    spent = sum(usage[pid][1] - before[pid][1] for pid in tree if pid in before)
    memory = format_size(sum(usage[pid][2] for pid in tree)) if tree else ""
    share = f"{100 * spent / seconds:.0f}%" if tree else ""
    return {**row, "MEMORY": memory, "CPU": share, "PORT": port}


@Command(f"""repair [NAME]: install what is missing, and settle lost processes
    -y --yes              do not ask
    --orphan              processes and state only; no file of the environment is touched
    --adopt               take back the first orphaned process found, without asking
    --end                 end every orphaned process found, without asking
    {RESTART_OPTIONS}
    e.g. repair; repair dev --orphan --adopt""")
def repair(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    console.say("🔍 Checking for process/state issues...")
    cleaned = environment.clean_stale()
    if cleaned:
        console.result("🧹 Cleaned a stale process state file")
    orphans = settle_orphans(console, args, environment)
    data = {"orphan_only": args.orphan, "cleaned": cleaned, "orphans": orphans}
    if args.orphan:
        return Report(data, environment.name, ["✓ Process repair complete (no environment changes made)"])
    environment.require_comfyui()
    done = repair_content(console, args, environment)
    lines = [f"✓ {what.capitalize()} {name}" for what in ("installed", "corrected", "tracked") for name in done[what]]
    lines += [f"✗ {problem}" for problem in done["problems"]]
    lines += ["✓ No changes to apply"] if done["synced"] and not done["tracked"] else []
    sentences = " ".join(map(as_sentence, done["problems"]))
    error = CDEnvironmentError(sentences, "", "repair") if sentences else None
    return Report({**data, **done}, environment.name, lines, 1 if error else 0, error)


def settle_orphans(console: Console, args: Arguments, environment: Environment) -> list[dict[str, Any]]:
    """Adopt or end orphans as told, or as a terminal answers; return each with what was done."""
    items, orphans = [], environment.orphans()
    found = f"\n⚠️  Found {len(orphans)} orphaned ComfyUI process(es):"
    console.result(found if orphans else "✓ No orphaned processes found")
    for process in orphans:
        port, action = environment.config_of(Snapshot(RUNNING, None, process, "untracked")).port, "left"
        item = {"pid": process.pid, "age": round(process.age(), 3), "port": port, "command": process.text}
        console.result(f"  • PID {process.pid}, {format_duration(process.age())} old, port {port}: {process.text}")
        try:
            if args.adopt or (not args.end and console.ask("    Adopt it?", True)):
                environment.take_back(process)
                action = "adopted"
            elif args.end or console.ask("    End it?", False):
                environment.end_orphan(process)
                action = "ended"
        except CDEnvironmentError as error:
            console.problem(error)
        console.result(f"  {'Left running:' if action == 'left' else f'✓ {action.capitalize()}'} PID {process.pid}")
        items.append({**item, "action": action})
    if any(item["action"] == "left" for item in items):
        adopt, end = (console.typed("repair", "--orphan", flag) for flag in ("--adopt", "--end"))
        console.result(f"Take it back with: {adopt}, or end it with: {end}")
    return items


def repair_content(console: Console, args: Arguments, environment: Environment) -> dict[str, Any]:
    nodes = environment.nodes
    done: dict[str, Any] = {"synced": False, "installed": [], "corrected": [], "tracked": [], "problems": []}
    difference = nodes.compare()
    found = difference.found_nodes
    few = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    question = f"{len(found)} custom nodes are from before the adoption ({few}). Track them in the manifest?"
    if found and not args.yes and console.ask(question, False):
        for name in found:
            nodes.track(name)
        done["tracked"], difference = found, nodes.compare()
    if difference.is_synced:
        report = nodes.sync()
        return {**done, "synced": not report.problems, "problems": report.problems}
    console.result("\n⚠️  Environment needs repair:")
    for line in difference_lines(difference_data(difference)):
        console.say(line)
    is_agreed = True if args.yes else console.ask("Fix this?", True)
    if is_agreed is None:
        console.warn(f"No terminal to ask on, so nothing was changed: {console.typed('repair', '-y')}")
    if is_agreed:
        put_right(console, args, environment, done)
    if not any(done.values()) and not (is_agreed and not difference.extra_nodes):
        done["problems"] = ["Nothing was changed."]
    return done


def put_right(console: Console, args: Arguments, environment: Environment, done: dict[str, Any]) -> None:
    nodes = environment.nodes
    with nodes.changing("repair"):  # what an addition that was broken off left is no node that somebody put there
        untracked = nodes.compare().extra_nodes
    for name in untracked:
        if args.yes or console.ask(f"   Track {name} in the manifest?", True):
            nodes.track(name)
            done["tracked"] += [name]
    report = nodes.sync(correct_versions=True)
    done.update(installed=report.installed, corrected=report.corrected, problems=report.problems)
    if report.installed or report.corrected:
        offer_restart(console, args, environment, "The environment was repaired")


@Command("""use NAME: choose the active environment
    e.g. use dev""")
def use(console: Console, args: Arguments) -> Report:
    name = workspace_of(args).use(args.name).name
    return Report({}, name, [f"✓ Active environment: {name}"])


@Command("""create NAME: make an environment: with a new ComfyUI, or of a folder you have
    --from DIR            adopt this ComfyUI folder, which stays where it is
    --comfyui REF         the version: a tag, branch or commit (default: the newest release)
    --source URL|DIR|ARCHIVE  where ComfyUI comes from (default: the official repository)
    --python PATH         an interpreter, or a version such as 3.12
    --torch-backend BACKEND  cpu, cu128, rocm6.4, xpu ... (default: what this machine has)
    --no-install          the code only: no Python packages
    --no-manager          without ComfyUI-Manager's package, where ComfyUI names it
    --models DIR          use the models in this folder, beside its own
    --use                 make it the active environment
    e.g. create main --use; create old --from ~/ComfyUI""")
def create(console: Console, args: Arguments) -> Report:
    workspace = workspace_of(args, to_make=True)
    require_new_name(args.name)
    if args.from_dir is not None:
        environment = workspace.adopt(args.from_dir, args.name, args.python)
        if args.models is not None:
            environment.set_models(args.models)
    else:
        named = ("comfyui", "source", "python", "no_install", "no_manager", "models")
        options = {"torch_backend": args.torch_backend or "auto", **{name: getattr(args, name) for name in named}}
        environment = workspace.create(args.name, **options, tell=console.work)
    if args.use:
        workspace.use(args.name)
    python = environment.python if os.path.exists(environment.python) else None
    data = {"python": python, "venv": environment.paths.venv, "comfyui": str(environment.comfyui_path)}
    data["version"] = version = environment.manifest.comfyui_version
    lines = [
        f"✓ Environment '{environment.name}' " + ("is ready" if python else "has its code, but no Python yet"),
        f"  ComfyUI: {data['comfyui']}" + (f" ({version})" if version else ""),
        f"  Python: {python or f'make a venv with what ComfyUI needs at {environment.paths.venv}'}",
        "",
        f"{'Start it' if python else 'Then start it'} with: {console.typed('-e', environment.name, 'run')}",
    ]
    return Report(data, environment.name, lines)


@Command("""delete NAME: delete an environment; your models, images and workflows are kept
    -y --yes              do not ask
    --purge               delete its models, outputs, inputs and user files, too
    e.g. delete dev""")
def delete(console: Console, args: Arguments) -> Report:
    name, workspace = args.name, workspace_of(args)
    if not workspace.list_environments():  # else it would be told how to create what it wants to delete
        raise CDEnvironmentError(f"There is no environment '{name}'.", ("list",), "unknown")
    environment = workspace.get_environment(name)
    environment.require_idle()
    adopted = environment.manifest.comfyui_path
    counts = {} if adopted else own_files(environment.paths.comfyui)
    for folder, (number, size, is_all) in counts.items():
        more = "" if is_all else "at least "
        console.say(f"   {folder}: {more}{number} file{'' if number == 1 else 's'}, {format_size(size)}")
    if counts:
        console.say("   These are deleted, too." if args.purge else f"   These are kept in {workspace.paths.kept}.")
    if adopted:
        console.say(f"   Your folder {adopted} stays.")
    answer = True if args.yes else console.ask(f"Delete environment '{name}' ({environment.paths.root})?", False)
    if answer is None:
        message = f"Environment '{name}' was not deleted: no terminal to ask on."
        raise CDEnvironmentError(message, ("delete", name, "-y"), "unsure")
    kept = workspace.delete(name, purge=args.purge, tell=console.work) if answer else None
    lines = [f"✓ Environment '{name}' deleted" if answer else f"Environment '{name}' was left as it is"]
    lines += [f"  Kept: {kept}"] if kept else []
    return Report({"deleted": answer, "kept": kept}, name, lines, 0 if answer else 1)


@Command("""init [PATH]: set up a workspace elsewhere
    --models-dir DIR      the models folder of environments that are created from now on
    e.g. init /data/comfy; init --models-dir /data/models""")
def init(console: Console, args: Arguments) -> Report:
    chosen = args.workspace if args.path is None else args.path
    workspace = select_workspace(chosen, True, to_make=True)
    root, made = workspace.paths.root, workspace.initialize()
    if args.models_dir is not None:
        workspace.set_models(args.models_dir)
    call = console.typed("--workspace", root, "list")
    lines = [f"✓ Workspace {root}" + ("" if made else " (it was one already)")]
    return Report({"workspace": root, "made": made}, None, [*lines, f"Use it with: {call}, or set COMFYDOCK_HOME"])


@Command(f"""node add [ID...]: add custom nodes: ID, ID@VERSION, a git address, or --dev FOLDER
    --workflow FILE       what this workflow needs: a .json file, or an image that ComfyUI saved
    --dev                 the ID is a folder with your own work
    --force               replace what is in the way; your own changes are moved aside
    --no-test             do not try the requirements first
    --release PACKAGE     let a package move that is held, such as numpy, as long as the node is here
    --skip-bad-lines      leave out the requirements that cannot be installed
    --no-deps             without the packages that the node needs
    {RESTART_OPTIONS}
    e.g. node add comfyui-kjnodes; node add https://github.com/owner/pack@v1.2; node add --workflow art.png""")
def node_add(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    environment.require_comfyui()
    unknown: list[str] = []
    names = args.ids
    if args.workflow:
        packs, unknown = environment.nodes.packs_of(args.workflow)
        names = [*names, *packs]
    elif not names:
        raise CDEnvironmentError("'node add' needs an ID, or --workflow FILE.", ("help", "node", "add"), "usage")
    if not names:
        console.result("✓ All that this workflow needs is here" + (", as far as is known" if unknown else ""))

    def add(identifier: str) -> "tuple[str, Optional[str]]":
        more = {"no_deps": args.no_deps, "skip_bad_lines": args.skip_bad_lines}
        release = tuple((args.release or "").replace(",", " ").split())
        result = environment.add_node(identifier, args.dev, args.no_test, args.force, release=release, **more)
        return f"Added node: {result.node_info.name}", result.restart_reason

    report = change_nodes_one_by_one(console, args, environment, names, add)
    if unknown:
        console.warn(f"unknown source: {', '.join(unknown)}")
    report.data["unknown"] = unknown
    return report


@Command(f"""node enable NODE...: have disabled nodes loaded again
    {RESTART_OPTIONS}
    e.g. node enable kjnodes""")
@Command(f"""node disable NODE...: keep custom nodes from being loaded
    {RESTART_OPTIONS}
    e.g. node disable kjnodes""")
def node_switch(console: Console, args: Arguments) -> Report:
    environment, is_on = selected(console, args), args.command == "node enable"
    reason = "Node enabled" if is_on else "Node disabled"
    switch = environment.nodes.switch_node
    return change_nodes_one_by_one(console, args, environment, args.nodes, lambda name: (switch(name, is_on), reason))


@Command("""node search WORD...: search the registry for custom nodes
    e.g. node search upscale""")
def node_search(console: Console, args: Arguments) -> Report:
    items = [
        {
            "id": str(one["id"]),
            "version": (one.get("latest_version") or {}).get("version"),
            "description": " ".join(str(one.get("description") or one.get("name") or "").split()),
            "repository": one.get("repository"),
        }
        for one in RegistrySource().search(" ".join(args.words))
    ]
    lines = [printable(f"  {one['id']} {one['version'] or ''}: {one['description']}")[:120] for one in items]
    add = f"Add one with: {console.typed('node', 'add', 'ID')}"
    return Report({"nodes": items}, None, [*lines, add if items else "Nothing was found in the registry"])


@Command(f"""node remove NODE...: remove custom nodes (development nodes are disabled, not deleted)
    {RESTART_OPTIONS}
    e.g. node remove comfyui-kjnodes""")
def node_remove(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)

    def remove(identifier: str) -> "tuple[str, Optional[str]]":
        result = environment.remove_node(identifier)
        what = {"none": "its folder was not there"}.get(result.filesystem_action, result.filesystem_action)
        return f"Removed node: {result.name} ({what})", result.restart_reason

    return change_nodes_one_by_one(console, args, environment, args.nodes, remove)


@Command(f"""node update [NODE...]: update custom nodes, or all of them
    -y --yes              do not ask
    --force               replace your own changes; they are moved aside
    --no-test             do not try the requirements first
    {RESTART_OPTIONS}
    e.g. node update; node update comfyui-kjnodes -y --restart""")
def node_update(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)

    def agreed(name: str, old: str, new: str) -> bool:
        answer = True if args.yes else console.ask(f"Update {name} from {old[:12]} to {new[:12]}?", True)
        if answer is None:
            hint = ("node", "update", name, "-y", *(["--force"] if args.force else []))
            raise CDEnvironmentError(f"{name} was not updated: no terminal to ask on", hint, "unsure")
        return answer

    def update(identifier: str) -> "tuple[str, Optional[str]]":
        result = environment.update_node(identifier, agreed, args.no_test, args.force)
        return result.message, result.restart_reason if result.restart_recommended else None

    names = args.nodes or list(environment.nodes.manifest.nodes)
    report = change_nodes_one_by_one(console, args, environment, names, update)
    if not names:
        console.result("No nodes to update.")
    return report


def change_nodes_one_by_one(
    console: Console,
    args: Arguments,
    environment: Environment,
    names: list[str],
    change: "Callable[[str], tuple[str, Optional[str]]]",
) -> Report:
    """Do `change` to each of `names`; one that fails does not keep the others. One restart offer at the end.

    On Windows a running ComfyUI locks the files of its nodes, so there the offer is to stop, change, and start.
    """
    environment.require_comfyui()
    stopped_for_it = False
    if FILES_ARE_LOCKED_IN_USE and names and not args.no_restart and environment.is_running():
        busy = is_busy(console, environment)
        question = "ComfyUI is running and locks its files. Stop it, make the change, and start it again?"
        if args.restart and not busy or console.ask(question, not busy):
            stopped_for_it = environment.stop_for_restart()
    items, reasons, first_error = [], [], None
    for name in names:
        try:
            message, reason = change(name)
            console.result(f"✓ {message}")
            reasons += [reason] if reason else []
            error = None
        except CDEnvironmentError as problem:
            console.problem(problem)
            message, error = problem.message, problem
        items.append({"node": name, "ok": error is None, "message": message})
        first_error = first_error or error
    if stopped_for_it:
        restarted = environment.restart()
    else:
        restarted = bool(reasons) and offer_restart(console, args, environment, reasons[0])
    data: dict[str, Any] = {"nodes": items, "restarted": restarted}
    late = await_answer(console, environment, args.wait, data) if restarted and args.wait is not None else None
    record = environment._read_state() if restarted else None
    data["pid"] = record.pid if record else None
    lines = [f"✓ Restarted (new PID: {data['pid']})"] if restarted else []
    error = first_error or late
    return Report(data, environment.name, lines, 1 if error else 0, error)


def is_busy(console: Console, environment: Environment) -> bool:
    """Tell whether ComfyUI has queued work, and say so: it is not thrown away for a change of nodes."""
    counts = queued_work(environment)
    if counts is not None:
        console.say(f"\n⚠️  ComfyUI is busy: {format_queue(counts)}.")
    return counts is not None


def offer_restart(console: Console, args: Arguments, environment: Environment, reason: str) -> bool:
    """Restart a running ComfyUI for a change: as the flags say, or as a terminal answers; return whether it was."""
    if not environment.is_running():
        return False
    busy = is_busy(console, environment)
    if args.restart and not busy:
        console.say("\n🔄 ComfyUI is running. Restarting to apply changes...")
        return environment.restart()
    if args.no_restart or not console.can_ask():
        console.result("\n⚠️  ComfyUI is running. Changes won't take effect until restart.")
        console.result(f"   Restart with: {console.typed('restart', *(['--when-idle'] if busy else []))}")
        return False
    console.result(f"\n⚠️  ComfyUI is running. Restart to apply changes? ({reason})")
    if console.ask("  ", not busy):
        console.say("🔄 Restarting...")
        return environment.restart()
    console.result("⚠️  Skipped restart. Changes won't take effect until you restart.")
    return False


def format_node_list(data: dict[str, Any], typed: Typed) -> Iterator[str]:
    if not data["nodes"]:
        yield "No custom nodes installed"
    for item in data["nodes"]:
        version = item["version"] or ""
        ways = {"git": f"@ {version[:8]}", "development": "(dev)"}
        shown = ways.get(item["source"], f"v{version}" if version else "")
        notes = [f"stays at {item['pin']}" if item["pin"] else "", "disabled" if item["disabled"] else ""]
        notes += ["without its packages" if item["no_deps"] else "", *(f"without {one}" for one in item["skipped"])]
        noted = "".join(f", {note}" for note in notes if note)
        missing = "" if item["installed"] or item["disabled"] else f"  ⚠ not installed: {typed('repair')}"
        yield printable(f"  • {item['name']} ({item['source']}) {shown}{noted}") + missing


@Command("""node list: the custom nodes of an environment
    e.g. node list""")
def node_list(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    nodes = environment.nodes
    present = {name.casefold() for name in nodes.folders()}
    items = [
        {
            "name": info.registry_id or info.name,
            "folder": info.name,
            **{key: getattr(info, key) for key in ("source", "version", "repository", "pin", "no_deps")},
            "installed": info.name.casefold() in present,
            "disabled": info.name.casefold() not in present and nodes.disabled_folder(info) is not None,
            "skipped": info.skipped_lines,
        }
        for info in nodes.manifest.nodes.values()
    ]
    data = {"nodes": items}
    return Report(data, environment.name, format_node_list(data, console.typed))


@Command("""logs [NAME]: the log of this run; it is kept after a crash
    -f --follow           the last 20 lines and what comes
    -n --tail N           the last N lines
    --all                 earlier runs too
    --rotate              move the log aside now, while ComfyUI keeps writing
    --keep N              with --rotate: how many old logs stay (default: as many as there are)
    --raw                 the bytes as they are; else colours reach only a terminal that is to have them
    --path                where the log is
    e.g. logs -n 50; logs -f""")
def logs(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    path, console.log_as_it_is = environment.log_path, args.raw
    if args.path:
        return Report({}, environment.name, [path])
    if args.rotate:
        done = environment.rotate_log(None if args.keep is None else max(1, args.keep))
        return Report({}, environment.name, [f"✓ Rotated to {rotated(path)}" if done else "The log is empty."])
    moved = environment.moved_log(environment.observe())
    if moved is not None:
        call = console.typed("logs", "--rotate")
        console.warn(f"ComfyUI writes to {moved}: its log was moved. To put that right: {call}")
        environment.log_path = path = moved
    record, has_older = environment._read_state(), bool(old_logs(path))
    earlier: Hint = ["Earlier runs: ", ("logs", "--all")]
    if record is not None and not record.has_log and not args.all:
        message = f"PID {record.pid} was not started by comfydock, so its output is not here."
        raise CDEnvironmentError(message, earlier, "no-log")
    if not is_there(path) and not (args.all and has_older):
        hint: Hint = earlier if has_older else ["Start ComfyUI with: ", ("run",)]
        if environment.is_running():
            hint = ["It was removed. A new one begins with: ", ("restart",)]
        raise CDEnvironmentError("No log file found.", hint, "no-log")
    if args.follow:
        with on_ctrl_c():
            follow_log(console, environment, 20 if args.tail is None else args.tail)
        return Report({}, environment.name)
    for span_path, start, end in log_spans(environment, args.all, args.tail):
        with open_regular(span_path) as log:
            log.seek(start)
            while piece := log.read(max(0, min(BLOCK, end - log.tell()))):
                console.log(piece)
    return Report({}, environment.name)


def log_spans(environment: Environment, everything: bool, tail: Optional[int]) -> "list[tuple[str, int, int]]":
    """Return (path, start, end) of the parts of the log that are asked for, in the order to show them."""
    path = environment.log_path
    paths = [one for one in [*(old_logs(path) if everything else ()), path] if os.path.exists(one)]
    spans = [(one, 0 if everything else environment.session_offset(), os.path.getsize(one)) for one in paths]
    if tail is None:
        return spans
    chosen: "list[tuple[str, int, int]]" = []
    for path, start, end in reversed(spans):
        with open_regular(path) as log:
            offset, found = last_lines_offset(log, tail, start, end)
        chosen.insert(0, (path, offset, end))
        tail -= found
        if tail <= 0:
            break
    return chosen


def follow_log(console: Console, environment: Environment, tail: int) -> None:
    """Show the last `tail` lines and what comes, until ComfyUI has been gone for 2 s and no monitor will start it."""
    follower = LogFollower(environment.log_path, log_spans(environment, False, tail)[-1][1])
    last_alive = time.monotonic()
    for snapshot, _ in environment.watch(FOLLOW_PAUSE):
        show_new(console, follower)
        if not console.has_reader():
            raise BrokenPipeError
        noted = (snapshot.record.monitor if snapshot.record else None) or {}
        monitor = environment.monitor_process(snapshot.record)
        if snapshot.state in LIVE_STATES or monitor is not None and not noted.get("gave_up"):
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > 2.0:
            return console.say("\n⚠️  ComfyUI process exited")


def describe(environment: Environment) -> Description:
    """Return what an engine of this machine is told: start it with what it had last, as its owner."""
    record = environment.last_record()
    args, variables = (record.args, dict(record.env)) if record else ([], {})
    port, root, program = config_told_by(args).port, environment.workspace_paths.root, [sys.executable, own_file()]
    places = [*program, root, environment.python, str(environment.comfyui_path)]
    owner = owner_of(environment.paths.root)
    return Description(environment.name, program, root, with_port(args, port), variables, port, places, owner)


def pack(environment: Environment, it: Description, gpu: Optional[str]) -> None:
    """Complete a description for an image.

    Raises CDEnvironmentError for repositories with changes that lie on this machine alone.
    """
    cards = it.variables.pop("CUDA_VISIBLE_DEVICES", "")
    it.args, it.left_out, chosen = image_args(it.args)
    it.gpu, it.gpus = gpu or "none", chosen or [card for card in cards.split(",") if card]
    if not environment.manifest.demo:
        environment.require_comfyui()
        it.python = version_of_python(environment.python) or it.python
        pack_packages(environment.python, it)
        it.gpu = gpu or ("nvidia" if any(line.startswith("nvidia-") for line in it.packages) else "none")
        pack_code(environment, it)


def pack_packages(python: str, it: Description) -> None:
    """Take in the packages as they are; those of files and folders that are here are left out: no index has them."""
    from urllib.request import url2pathname

    for name, package in installed_packages(python).items():
        line, version = " ".join(package.line), f"{package.name}=={package.version}"
        path = url2pathname(line.partition("file://")[2].partition("#")[0])
        if package.line[0] == "-e" or path and os.path.exists(path):
            it.left_out.append(f"the package {line}")
        elif name in HELD_PACKAGES:
            it.held.append(version)
        elif name not in ("pip", "setuptools", "wheel"):
            it.packages.append(version if path else line)
    it.index = held_index(it.held) or "https://pypi.org/simple"


def pack_code(environment: Environment, it: Description) -> None:
    """Take in ComfyUI and its nodes: pinned where another machine can fetch them, else copied."""
    nodes, unsaved = environment.nodes, []
    development = {info.name for info in nodes.manifest.nodes.values() if info.source == "development"}
    it.code = [Code("", str(environment.comfyui_path))]
    it.code += [Code(f"custom_nodes/{name}", os.path.join(nodes.custom_nodes, name)) for name in nodes.folders()]
    it.scripts = any(os.path.exists(os.path.join(piece.source, "install.py")) for piece in it.code[1:])
    for piece in it.code:
        piece.source = os.path.realpath(piece.source)
        title, url = os.path.basename(piece.place) or "ComfyUI", remote_of(piece.source)[1]
        if url and not is_local(url) and title not in development:
            piece.url, piece.commit = url, git_answer(["rev-parse", "HEAD"], piece.source) or ""
            others = git_answer(["ls-files", "--others", "--exclude-standard", "--directory"], piece.source) or ""
            it.left_out += [f"{title}/{name}" for name in others.splitlines() if name not in (".venv/", "venv/")]
            if GitSource().changes(piece.source, {"version": ""}) != []:
                unsaved.append(title)
    if unsaved:
        message = f"No image can hold what only this machine has: {', '.join(unsaved)} has changes or new commits."
        raise CDEnvironmentError(message, "commit and push them; a node of your own: node add --dev", "changed")


def next_steps(engine: str, folder: str, many: list[Description], user: bool) -> list[str]:
    """Return what to type to bring what was written to its engine."""
    here, units = quote(folder), " ".join(quote(it.unit) for it in many)
    if engine == "systemd":
        sudo, place = ("", "~/.config/systemd/user/") if user else ("sudo ", "/etc/systemd/system/")
        call = f"{sudo}systemctl{' --user' if user else ''}"
        lines = ["mkdir -p " + place] if user else []
        lines.append(f"{sudo}install -m 644 {here}/*.service {place}")
        lines += [f"{sudo}install -m 600 {here}/*.env {place}"] if any(it.variables for it in many) else []
        lines.append(f"{call} daemon-reload && {call} enable --now {units}")
        return lines + (["loginctl enable-linger  (else it ends when you log out)"] if user else [])
    if engine == "compose":
        file = quote(os.path.join(folder, "compose.yaml"))
        return [f"docker compose -f {file} up -d --build --wait", f"docker compose -f {file} down"]
    lines = []
    for it in many:
        inside = quote(folder if engine == "dockerfile" and len(many) == 1 else os.path.join(folder, it.label))
        lines.append(f"docker build -t {it.image} {inside}")
        if engine == "kubernetes":
            lines.append(f"kubectl apply -f {quote(os.path.join(folder, it.label))}.yaml")
            continue
        cards = quote(f'"device={",".join(it.gpus)}"') if it.gpus else "all"  # Docker wants the double quotes
        devices = "".join(f" --device nvidia.com/gpu={quote(card)}" for card in it.gpus or ["all"])
        gpu = {"none": "", "nvidia": f" --gpus {cards}", "cdi": devices}[it.gpu]
        volumes = "".join(f" -v {it.label}-{name}:{it.home}/{name}" for name in OWN_FOLDERS)
        names = "".join(f" -e {key}" for key in it.variables)
        lines.append(f"docker run -d -p 127.0.0.1:{it.port}:{IMAGE_PORT}{gpu}{names}{volumes} {it.image}")
    return lines


def no_part_of_image(folder: str, names: list[str]) -> list[str]:
    """Return what of a folder of code is left out: what volumes hold, and the nodes, which are copied by themselves."""
    left_out = [".git", "__pycache__"]
    if os.path.isfile(main_script(folder)):
        left_out += [*OWN_FOLDERS, "temp", ".venv", "venv"]
    if os.path.isfile(main_script(os.path.dirname(folder))) and os.path.basename(folder) == "custom_nodes":
        left_out += [name for name in names if os.path.isdir(os.path.join(folder, name))]
    return [name for name in names if name in left_out]


def written_for(
    engine: str, chosen: list[Environment], many: list[Description], args: Arguments
) -> "tuple[dict[str, str], dict[str, str]]":
    """Return path -> text, and path -> what is copied to it. Raises as `pack` does."""
    files: dict[str, str] = {}
    copies: dict[str, str] = {}
    for environment, it in zip(chosen, many):
        if engine == "systemd":
            files[f"{it.unit}.service"] = systemd_unit(it, args.user)
        else:
            pack(environment, it, args.gpu)
            if it.gpus and (it.gpu == "none" or engine == "kubernetes"):
                it.left_out.append(f"the choice of card {', '.join(it.gpus)}")
            inside = "" if engine == "dockerfile" and len(many) == 1 else f"{it.label}/"
            files.update({inside + name: text for name, text in image_files(it).items()})
            copies.update({inside + (piece.place or "comfyui"): piece.source for piece in it.code if not piece.url})
            copies[f"{inside}comfydock.py"] = own_file()
        if engine == "kubernetes":
            files[f"{it.label}.yaml"] = kubernetes_file(it)
        elif it.variables and engine != "dockerfile":
            name = it.unit if engine == "systemd" else it.label
            files[f"{name}.env"] = environment_file(it.variables)
    if engine == "compose":
        files["compose.yaml"] = compose_file(many)
    return files, copies


def write_files(files: dict[str, str]) -> None:
    """Write path -> text; what holds values of variables for this user alone."""
    for path, text in files.items():
        make_folder(os.path.dirname(path))
        write_atomic(path, text.encode(), 0o600 if path.endswith((".env", ".plist")) else 0o644)


def require_known(topic: str, word: str, known: "Iterable[str]") -> None:
    """Raise CDEnvironmentError with code "usage" for a word that a command does not know."""
    if word not in known:
        message = f"Unknown word '{word}': choose one of {', '.join(known)}."
        raise CDEnvironmentError(message, ("help", topic), "usage")


@Command("""generate ENGINE [NAME...]: write files for systemd, Docker, Compose or Kubernetes
    --out DIR             the new folder for it (comfydock-ENGINE, if you name none)
    --gpu KIND            how a container gets the card: nvidia, cdi (Podman) or none
    --user                systemd: for your own units, not for the system's
    e.g. generate systemd --user; generate dockerfile main; generate compose main dev --gpu nvidia""")
def generate(console: Console, args: Arguments) -> Report:
    engine = args.engine
    require_known("generate", engine, ENGINES)
    require_known("generate", args.gpu or "none", COMPOSE_GPUS)
    folder = os.path.abspath(args.out or f"comfydock-{engine}")
    refuse_existing(folder)
    chosen = [selected(console, args, name) for name in dict.fromkeys(args.names or [args.env])]
    many = [describe(environment) for environment in chosen]
    ports = [it.port for it in many]
    twice = next((it for it in many if ports.count(it.port) > 1), None) if engine != "kubernetes" else None
    if twice:
        message = f"Port {twice.port} is that of several of these environments."
        raise CDEnvironmentError(message, ("-e", twice.name, "run", "--port", "NUMBER"), "port")
    files, copies = written_for(engine, chosen, many, args)
    try:
        write_files({os.path.join(folder, name): text for name, text in files.items()})
        for name, source in copies.items():
            make_folder(os.path.dirname(os.path.join(folder, name)))
            copy_any(source, os.path.join(folder, name), ignore=no_part_of_image)
    except BaseException:
        remove_tree(folder)
        raise
    steps, names = next_steps(engine, folder, many, args.user), [*files, *copies]
    left_out = [name for it in many for name in it.left_out]
    data = {"engine": engine, "folder": folder, "files": names, "left_out": left_out, "next": steps}
    lines = [f"✓ Wrote {', '.join(names)} to {folder}", *(f"⚠ Not carried over: {name}" for name in left_out), "Next:"]
    return Report(data, chosen[0].name, [*lines, *(f"  {line}" for line in steps)])


def autostart_files(it: Description, is_system: bool) -> dict[str, str]:
    """Return path -> text of what has systemd or launchd start it; the first is the thing itself."""
    if IS_MACOS:
        folder = "/Library/LaunchDaemons" if is_system else os.path.expanduser("~/Library/LaunchAgents")
        return {f"{folder}/comfydock-{it.name}.plist": launchd_plist(it, is_system)}
    config = "/etc" if is_system else os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    start = f"{config}/systemd/{'system' if is_system else 'user'}/{it.unit}"
    files = {f"{start}.service": systemd_unit(it, not is_system)}
    return {**files, f"{start}.env": environment_file(it.variables)} if it.variables else files


def switch_files(state: str, files: dict[str, str], link: Optional[str]) -> bool:
    """Write or remove what autostart_files names, with the link by which systemd wants it; return whether it is on."""
    first = next(iter(files))
    if state == "on":
        write_files(files)
        if link and not os.path.lexists(link):
            make_folder(os.path.dirname(link))
            link_folder(first, link)
    if state == "off":
        for path in [*([link] if link else []), *files, first.removesuffix(".service") + ".env"]:
            remove_file(path)
            for above in list(upward(os.path.dirname(path)))[:3]:  # what `on` has made: .config/systemd/user/...wants
                remove_empty(above)
    if link and state != "status":
        with suppress(CDEnvironmentError):  # without a systemd that runs there is nobody to be told
            run_command(["systemctl", *([] if link.startswith("/etc/") else ["--user"]), "daemon-reload"], timeout=20)
    return os.path.exists(first)


def switch_task(state: str, it: Description, draft: str) -> bool:
    """Make or delete a task of the Task Scheduler; return whether it is there then. Raises CDEnvironmentError."""
    words = {"on": ["/Create", "/XML", draft, "/F"], "off": ["/Delete", "/F"], "status": ["/Query"]}
    try:
        if state == "on":
            write_atomic(draft, task_xml(it).encode("utf-16"))
        done = run_command(["schtasks", words[state][0], "/TN", f"comfydock-{it.name}", *words[state][1:]])
    finally:
        remove_file(draft)
    if done.returncode and state == "on":
        raise CDEnvironmentError(f"The Task Scheduler refused: {last_words(done)}", "", "system")
    return state != "off" and done.returncode == 0


@Command("""autostart STATE [NAME]: start ComfyUI when you log in: on, off or status
    --system              when the machine starts, which takes root
    e.g. autostart on; autostart status; autostart off main""")
def autostart(console: Console, args: Arguments) -> Report:
    state = args.state
    require_known("autostart", state, ("on", "off", "status"))
    if IS_WINDOWS and args.system:
        message = "The Task Scheduler starts ComfyUI when you log in: there is no --system on Windows."
        raise CDEnvironmentError(message, ("autostart", state), "usage")
    environment = selected(console, args, args.name)
    it = describe(environment)
    if IS_WINDOWS:
        task = f"comfydock-{it.name}"
        steps = [f"set it once: setx {key} VALUE  (a task carries no variables)" for key in it.variables]
        steps.append(f"start it now: schtasks /Run /TN {quote(task)}")
        it.variables, written = {}, [f"task {task}"]
        is_on = switch_task(state, it, os.path.join(environment.paths.cec, "task.xml.tmp"))
    else:
        files = autostart_files(it, args.system)
        written = list(files)
        kind, user = ("multi-user", "") if args.system else ("default", " --user")
        link = f"{os.path.dirname(written[0])}/{kind}.target.wants/{it.unit}.service"
        is_on = switch_files(state, files, None if IS_MACOS else link)
        steps = [f"start it now: systemctl{user} start {quote(it.unit)}"]
        if IS_MACOS:
            domain = "system" if args.system else "gui/$(id -u)"
            steps = [f"start it now: launchctl bootstrap {domain} {quote(written[0])}"]
        elif user and not os.path.exists(f"/var/lib/systemd/linger/{it.owner}"):
            steps.append("also while you are logged out: loginctl enable-linger")
    data = {"on": is_on, "system": args.system, "files": written if is_on else []}
    data["next"] = steps if is_on and state == "on" else []
    lines = [f"{'✓' if is_on else '•'} Autostart of '{it.name}' is {'on' if is_on else 'off'}"]
    lines += [f"  {line}" for line in [*data["files"], *data["next"]]]
    undo = console.typed("autostart", "off", it.name, *(["--system"] if args.system else []))
    return Report(data, it.name, [*lines, f"  undo: {undo}"] if is_on else lines)


@Command(f"""update [NAME]: bring ComfyUI to its newest version, or back to the one before
    --to REF              to this tag, branch or commit
    --check               only tell whether there is a newer version
    --back                return to what was before the last update: code, packages and nodes
    --database            with --back: ComfyUI's database, too
    --no-try              do not start the new version once before it counts
    {IDLE_OPTION}
    --force               put your own changes in ComfyUI's folder on a branch; do not ask
    e.g. update; update main --to v0.3.64; update --back""")
def update(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    if args.back:
        has_database = read_json(environment.paths.before_record).get("databases")
        question = "Restore ComfyUI's earlier database, too?"
        with_databases = args.database or bool(has_database and console.ask(question, True))
        settle_queue(console, args, environment, "update --back")
        data = environment.go_back(force=args.force, with_databases=with_databases)
    else:
        data = environment.update(
            args.to,
            check=args.check,
            force=args.force,
            no_try=args.no_try,
            confirm=lambda: settle_queue(console, args, environment, "update"),
        )
    old, new = data["old"], data["new"]
    lines = [f"✓ ComfyUI {old} is the newest"]
    if data["changed"]:
        back = "" if args.back else f"  Return to {old} with: {console.typed('update', '--back')}"
        lines = [f"✓ ComfyUI is {new} now (it was {old})", back]
    elif data["available"]:
        lines = [f"ComfyUI {new} is available; this is {old}. Update with: {console.typed('update')}"]
    return Report({"back": args.back, **data}, environment.name, lines)


@Command("""history [NAME]: the changes of ComfyUI, nodes and settings
    e.g. history""")
def history(console: Console, args: Arguments) -> Report:
    environment = selected(console, args)
    logged = (git_answer(["log", "--format=%h\t%cI\t%s"], environment.paths.cec) or "").splitlines()
    commits = [dict(zip(("commit", "at", "message"), line.split("\t", 2))) for line in logged]
    lines = [f"  {one['at'][:16].replace('T', ' ')}  {one['commit']}  {one['message']}" for one in commits]
    none = "No history: git keeps it, and there is none here."
    return Report({"commits": commits}, environment.name, lines or [none])


@Command(f"""models [NAME]: one models folder for several environments: show it, or choose it
    --set DIR             use the models in this folder, beside the environment's own
    --off                 use its own models alone
    {ALL_OPTION}
    e.g. models --all; models main --set /mnt/models; models --off""")
def models(console: Console, args: Arguments) -> Report:
    environment, changes = selected(console, args), args.off or args.set is not None
    if changes:
        environment.set_models(args.set)
    is_running, folder = bool(changes) and environment.is_running(), environment.manifest.models_path
    lines = [f"✓ Models in {folder}, and its own" if folder else "✓ Its own models alone"]
    lines += [f"  ComfyUI sees this after: {console.typed('restart')}"] if is_running else []
    return Report({"models": folder, "running": is_running}, environment.name, lines)


# ====================================================================================================================
# 16. The command line
# The only section that names argparse: it reads what was typed, writes help, and completes.

EVERYWHERE = """-e --env NAME         the environment (default: this folder's, else the active one)
    --workspace DIR       the workspace (default: COMFYDOCK_HOME, else ~/.comfydock)
    --json                one JSON object instead of words
    -q --quiet            results, warnings and errors only
    -v                    tell what is run, where, and how long it took
    --color WHEN          auto, always or never (default: auto)
    -h --help             this help
    --version             the version of comfydock"""
FLAGS = {"verbose": "-v", "from_dir": "--from"}  # those whose value has another name in Arguments
EXCLUDE_EACH_OTHER = {
    "quiet": "verbose",
    "adopt": "end",
    "set": "off",
    "back": "to check no_try",
    "restart": "no_restart",
    "foreground": "monitor wait all",
    "follow": "all",
    "all": "port",
    "rotate": "path follow all tail",
    "path": "follow all tail",
    "from_dir": "comfyui source torch_backend no_install no_manager",
}


def usage_error(message: str, topic: str = "") -> CDEnvironmentError:
    """Return the error of wrong words; `topic` is the command whose help tells more."""
    return CDEnvironmentError(message, ("help", *topic.removeprefix("help").split()), "usage")


def flag_of(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def is_number(text: str) -> bool:
    """Tell whether a word is a number, and no argument of ComfyUI (such as 1.2.3.4)."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# Metavar -> how it is read, what must hold. Of KEY alone the value is what it has here, else one that may not be.
KINDS: "dict[str, tuple[Callable[[str], Any], Callable[[Any], bool]]]" = {
    "SECONDS": (float, lambda value: 0 <= value < 1e8),
    "N": (int, lambda value: value >= 0),
    "PORT": (int, is_port),
    "DIR": (str, bool),  # of a variable of a script that is not set the current folder would become
    "KEY=VALUE": (
        lambda text: text.split("=", 1) if "=" in text else [text, os.environ.get(text, "\0")],
        lambda pair: is_variable(*pair),
    ),
    "WHEN": (str, COLOUR_CHOICES.__contains__),
}


def read_value(topic: str, flag: str, metavar: str, text: str) -> Any:
    """Return the value of an option. Raises CDEnvironmentError with code "usage"."""
    read, holds = KINDS.get(metavar, (str, lambda value: True))
    with suppress(ValueError):
        value = read(text)
        if holds(value):
            return value
    raise usage_error(f"{flag} takes {metavar}, not '{text}'.", topic)


def options_of(command: Optional[Command]) -> "Iterator[tuple[list[str], str, str]]":
    """Yield flags, metavar ("" for a switch) and text of each option of a command and of those valid everywhere."""
    for line in [*(command.lines[:-1] if command else ()), *EVERYWHERE.splitlines()]:
        spelled, _, text = line.strip().partition("  ")
        words = spelled.split()
        flags = [word for word in words if word.startswith("-")]
        yield flags, "".join(words[len(flags) :]), text.strip()


def build_parser(command: Command, call: str = "comfydock") -> "argparse.ArgumentParser":
    """Return the parser of one command; the others' are never built.

    It knows no operands: argparse has no words that belong to another program, so they are taken from what it leaves.
    """
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            flags, _, problem = message.removeprefix("argument ").partition(": ")
            what = "takes no value" if "explicit" in problem else "needs a value"
            raise usage_error(f"{flags} {what}.", command.name)

    examples = command.lines[-1].removeprefix("e.g. ").split("; ")
    width = columns(sys.stdout) - 2
    parser = Parser(
        usage=f"{call} {command.usage} [options]" + (" [--] [ComfyUI's arguments]" if command.name == "run" else ""),
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="\n".join(["examples:", *(f"  {call} {example}" for example in examples)]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=width),
        add_help=False,
        allow_abbrev=False,
    )
    vars(parser)["color"] = False  # from 3.14 on argparse has colours of its own
    names = {flag: name for name, flag in FLAGS.items()}
    for flags, metavar, text in options_of(command):
        name = names.get(flags[-1], flags[-1][2:].replace("-", "_"))
        shown = argparse.SUPPRESS if name == "json" and not command.has_json else text
        if not metavar:
            parser.add_argument(*flags, dest=name, help=shown, action="store_true")
            continue
        default = None if metavar.startswith("[") else re.search(r"\(default: (\S+)\)", text)
        parser.add_argument(
            *flags,
            dest=name,
            help=shown,
            metavar=metavar,
            type=partial(read_value, command.name, flags[-1], metavar.strip("[]")),
            action="append" if metavar == "KEY=VALUE" else "store",
            default=default and default[1],
        )
    return parser


def leading_options(words: list[str]) -> int:
    """Return how many words stand before `--` or the first that is no option valid everywhere, nor its value."""
    count = 0
    while count < len(words) and words[count].startswith("-") and words[count] != "--":
        count += 2 if words[count] in ("-e", "--env", "--workspace", "--color") else 1
    return min(count, len(words))


def find_command(words: list[str]) -> "tuple[Optional[Command], list[str], list[str]]":
    """Return the command, the options before its name and the words behind it; it is None where no name stands."""
    start = leading_options(words)
    for end in (start + 2, start + 1):
        command = COMMANDS.get(" ".join(words[start:end]))
        if command is not None:
            return command, words[:start], words[end:]
    return None, words[:start], words[start:]


def parse(words: list[str]) -> "tuple[Command, Arguments]":
    """Return the command and its arguments. The first `--` is dropped, and all after it is another program's.

    Raises CDEnvironmentError with code "usage".
    """
    command, front, rest = find_command(words)
    if command is None:
        if rest[:1] == ["--"]:
            raise usage_error("No command stands before '--'.")
        if rest and not (rest[0] == "node" and {"-h", "--help"} & set(rest)):
            raise unknown_command(rest)
        command = COMMANDS["help"]
    name = rest.pop(0) if command.operand == "[NAME]" and rest and not rest[0].startswith("-") else None
    cut = leading_options(rest) if command.name == "exec" else (rest + ["--"]).index("--")
    known, others = build_parser(command).parse_known_args(with_values(command, [*front, *rest[:cut]]))
    args = Arguments({**vars(known), "typed": tuple(rest), "command": command.name})
    args.comfyui_args = [*others, *rest[cut + (rest[cut : cut + 1] == ["--"]) :]]
    if args.version:
        command = Command("version")
        command.act = show_version
        return command, args
    if args.help and command.name != "help":
        args.comfyui_args = command.name.split()
        command = COMMANDS["help"]
    if name is not None and args.env not in (None, name):
        raise usage_error(f"Two environments are named: '{name}' and '{args.env}'.", command.name)
    args.env = name or args.env
    if command.name not in ("run", "exec"):  # their other words belong to another program
        take_operands(command, args)
    check(command, args)
    if args.command == "run":
        vars(args)["set_env"] = dict(args.set_env or ())
    return command, args


def with_values(command: Command, words: list[str]) -> list[str]:
    """Return `words` with a value for each option that may go without one: the number that follows, or its default.

    Raises CDEnvironmentError for letters that share a dash: `-n5` and `-fn 5` are no words of ours, nor ComfyUI's.
    """
    optional = [(flags, text) for flags, metavar, text in options_of(command) if metavar.startswith("[")]
    defaults = {flags[0]: text.rpartition("(default: ")[2].rstrip(")") for flags, text in optional}
    done, rest = [], words[::-1]
    while rest:
        word = rest.pop()
        if word.startswith("-") and word[1:2] not in ("-", "") and len(word) > 2 and not is_number(word):
            raise usage_error(f"A single dash takes one letter, so '{word}' is not an option.", command.name)
        if word in defaults:
            word += f"={rest.pop() if rest and is_number(rest[-1]) else defaults[word]}"
        done.append(word)
    return done


def take_operands(command: Command, args: Arguments) -> None:
    """Give each operand its word: NAME one, `ID...` a list, `[...]` perhaps none; a first [NAME] was taken already.

    Raises CDEnvironmentError with code "usage" for an unknown option, and for too few and too many words.
    """
    words = args.comfyui_args
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown is not None:
        who = "comfydock" if command.name == "help" else f"'{command.name}'"
        raise usage_error(f"{who} has no option {unknown}.", command.name)
    for operand in command.operand.split() if command.operand != "[NAME]" else ():
        if not words and not operand.startswith("["):
            raise usage_error(f"'{command.name}' needs {operand.rstrip('.')}.", command.name)
        name, is_list = operand.strip("[.]").lower(), "..." in operand
        vars(args)[name + "s" if is_list else name] = words[:] if is_list else words[0] if words else None
        del words[: None if is_list else 1]
    if words and command.operand == "[NAME]" and args.env is None:
        hint = ["Put the name first: ", (*command.name.split(), words[0]), ", then the options"]
        raise CDEnvironmentError(f"'{command.name}' takes no name behind its options.", hint, "usage")
    if words:
        raise usage_error(f"'{command.name}' does not take '{words[0]}'.", command.name)


def check(command: Command, args: Arguments) -> None:
    """Raise CDEnvironmentError with code "usage" for what does not go together."""

    def refuse(problem: str) -> None:
        raise usage_error(problem, command.name)

    if args.has("all") and args.env is not None and command.name != "logs":
        refuse(f"'{command.name} --all' takes no environment.")
    if args.env is not None and command.operand == "NAME":
        refuse(f"'{command.name}' takes the name without -e.")
    for one, other in [(one, other) for one, others in EXCLUDE_EACH_OTHER.items() for other in others.split()]:
        if args.has(one) and args.has(other):
            refuse(f"{flag_of(one)} and {flag_of(other)} cannot be combined.")
    for one, other in (("dry_run", "port"), ("keep", "rotate"), ("database", "back")):
        if args.has(one) and not args.has(other):
            refuse(f"{flag_of(one)} needs {flag_of(other)}.")
    for_background = [name for name in ("json", "monitor", "wait", "all") if args.has(name)]
    if for_background and command.name == "run" and os.getpid() == 1:  # with which a container ends
        refuse(f"As PID 1 'run' stays in the foreground, so it has no {flag_of(for_background[0])}.")
    lively = next((f" {flag_of(name)}" for name in ("foreground", "watch") if args.has(name)), "")
    if args.json and (lively or not command.has_json):
        refuse(f"'{command.name}{lively}' has no --json.")


MEANT = {  # our command -> what people type instead
    "list": "ps ls", "run": "start up launch", "stop": "down kill", "top": "monit watch", "exec": "shell sh",
    "logs": "log tail", "repair": "doctor", "update": "upgrade", "delete": "rm", "node add": "install",
    "create": "install",
}  # fmt: skip


def unknown_command(words: list[str]) -> CDEnvironmentError:
    """Return the error of words that are no command, with those that do what was meant.

    A command that deletes is never suggested for its spelling.
    """
    from difflib import get_close_matches

    if words[0] == "node":
        names = ", ".join(name[5:] for name in COMMANDS if name.startswith("node "))
        return usage_error(f"'node' needs one of: {names}.", "node")
    harmless = [name for name in COMMANDS if name not in ("delete", "node remove")]
    meant = [name for name, typed in MEANT.items() if words[0] in typed.split()]
    meant = meant or get_close_matches(words[0], harmless, 1) or ["help"]
    first, *others = [tuple(name.split()) for name in meant]
    hint = ["Try: ", first, ", or: ", *others] if others else first
    return CDEnvironmentError(f"Unknown command '{words[0]}'.", hint, "usage")


@Command("""completion SHELL: print what makes a shell complete our words
    e.g. completion bash; completion fish""")
def completion(console: Console, args: Arguments) -> Report:
    """Print the script that teaches a shell our words; as it is, for a shell takes no other line ends."""
    script = completion_script(args.shell)
    if not console.json_mode:
        console.raw(script.encode())
    return Report({"shell": args.shell, "text": script})


TOPICS = {
    "json": """
--json prints one object on one line of stdout, and nothing else:
  {"schema": 2, "command": "status", "ok": true, "environment": "main",
   "data": {...}, "error": null}
  error: {"message", "hint": prose or null, "try": a command or null, "code"}
Times are ISO 8601 in UTC, durations seconds, sizes bytes. What is not known is
null. "data" is null when nothing could be done. Keys of data:
  status, and each of environments in list:
    name (list only)  state: starting, running, unresponsive, stopped, crashed,
    foreign, unknown  health: healthy, starting, unhealthy, other-service,
    bad-answer  note: interrupted, rebooted, damaged, untracked, moved,
    unreadable  demo  complete  resume: words that go on with create
    missing: main.py's path  pid  host  port  url  queue: {running, pending}
    version (ComfyUI's)  python  device  vram: {used, total}  uptime
    started_at  args  log  machine  relics: [{pid, command}]
    monitor: {alive, restarts, gave_up}  last_alive  last_error  exit_code
    difference (status): {synced, error, missing, untracked, mismatches,
    interrupted}  active (list)
  list: workspace, environments, kept: folders that delete kept
  run, restart: pid host port url args log started_at health demo; with --wait
    also ready, waited; run: only_watched; restart: cut_off
  stop: stopped pid cut_off: {running, pending} called_off left: {pid, command}
    crash: {last_alive, last_error, exit_code}; with --port also port command
    dry_run
  run, stop, restart, models --all: environments: [{environment, ok, data}]
  open: url opened  use: nothing more  init: workspace made
  create: comfyui version python venv  delete: deleted kept
  update: old new: names of versions  changed  available  back
  history: commits: [{commit, at, message}]
  models: models: the folder or null  running: sees it after a restart
  node add, remove, update, enable, disable: nodes: [{node, ok, message}]
    restarted pid; with --wait also ready, waited; add: unknown: what is in no
    registry
  node list: nodes: [{name, folder, source, version, repository, installed,
    disabled, pin, no_deps, skipped}]
  node search: nodes: [{id, version, description, repository}]
  repair: orphan_only cleaned orphans: [{pid, age, port, command, action}]
    synced installed corrected tracked problems
  generate: engine folder files left_out next: commands to type
  autostart: on system files next
  completion: shell text  help, version: text; version: version
Exit codes: 0 done, 1 could not, 2 wrong usage, 3 status of what does not run,
130 interrupted.""",
    "files": """
A workspace is ~/.comfydock, or what --workspace or COMFYDOCK_HOME name:
  environments/NAME/ComfyUI         its checkout (not of an adopted folder)
  environments/NAME/.venv           its Python
  environments/NAME/.cec            manifest (pyproject.toml), history, state
  environments/NAME/.cec/.comfyui.state   the record of the running process
  logs/NAME/comfyui.log             the log; older ones are .old, .old.2 ...
  kept/NAME-TIME                    what delete kept of an environment
  .metadata/workspace.json          the active environment
Nothing is written outside of it, and nothing into a ComfyUI folder that you
adopted but custom nodes that you add. To uninstall: stop --all, delete the
workspace and comfydock.py.""",
    "completion": """
SHELL is one of these; the line behind it goes into the file, and counts from
the next shell on. It completes what is typed as comfydock or comfydock.py.
  bash        ~/.bashrc:  eval "$(comfydock completion bash)"
  zsh         ~/.zshrc:  source <(comfydock completion zsh)
  fish        ~/.config/fish/config.fish:  comfydock completion fish | source
  powershell  $PROFILE:
              comfydock completion powershell | Out-String | Invoke-Expression""",
    "stop": """
ComfyUI is asked as Ctrl-C asks it (SIGINT, its only clean stop), 3 s before the
timeout with SIGTERM, and at the timeout it is killed; then what it started is
ended, too. --kill skips the asking. A process that is not provably ours, or
that belongs to another user, is never signalled. At a terminal you are asked
before queued work is cut off; --when-idle waits for it, --force does not ask.""",
    "generate": """
A new folder is written, nothing is installed, and what to type next is
printed. An engine is told to start the environment as it ran last: arguments,
port and variables of --set-env, whose values are kept in a file of yours
alone (NAME.env).
  systemd     a unit that is ready when ComfyUI answers, starts it again after
              a crash (5 times in an hour), and stays stopped after comfydock
              stop; its owner runs it. --user: a unit of your own
  dockerfile  an image: code at its commits, packages as they are installed,
              with the index of PyTorch as TORCH_INDEX; models, input, output
              and user lie on volumes, which one container at a time may use.
              Another base: --build-arg BASE=...
  compose     a service for each environment: its port on 127.0.0.1, its
              volumes, its card (--cuda-device or CUDA_VISIBLE_DEVICES says
              which)
  kubernetes  volumes, deployment and service of each environment, and a
              secret whose values you fill in
--gpu nvidia is for Docker with NVIDIA's hook, cdi for Podman and for Docker
with Compose 5. Not carried over, and named: packages installed from files
here, arguments that name paths of this machine, files that git does not have.
Changes and commits that are not pushed are refused; your own nodes (--dev)
are copied. While such a unit or container runs, comfydock restart is done by
it.""",
}


@Command("""help [COMMAND...]: how to use a command, or a topic
    e.g. help run; help json""")
def show_help(console: Console, args: Arguments) -> Report:
    topic, call = " ".join(args.commands), console.call()
    parts = [build_parser(COMMANDS[topic], call).format_help().rstrip()] if topic in COMMANDS else []
    parts += [TOPICS[topic].strip()] if topic in TOPICS else []
    if not topic:
        parts = [overview(call)]
    if not parts:
        found, _, _ = find_command(args.commands)
        known = found.name if found else args.commands[0] if args.commands[0] in TOPICS else ""
        if known:
            raise usage_error(f"'help {known}' does not take '{topic[len(known) + 1 :]}'.", known)
        parts = ["\n".join(summary(name) for name in COMMANDS if name.startswith(f"{topic} "))]
        if not parts[0]:
            raise unknown_command(args.commands)
    text = "\n\n".join(parts)
    return Report({"text": text}, None, text.split("\n"))


def summary(name: str) -> str:
    """Return a command, or `node` for all of its kind, and what it does, in as many lines as it takes."""
    from textwrap import wrap

    kinds = ", ".join(other[5:] for other in COMMANDS if other.startswith("node "))
    text = COMMANDS[name].summary if name in COMMANDS else f"{kinds} custom nodes: see help node"
    return f"  {name:12} " + f"\n{'':15}".join(wrap(text, min(columns(sys.stdout), 100) - 15))


def overview(call: str) -> str:
    """Return the help of the whole, on one screen."""
    rest = [name for name in COMMANDS if " " not in name] + ["node"]
    groups = {
        "every day": "run open stop restart status list top logs".split(),
        "environments": "create use delete exec update history models repair".split(),
    }
    groups["more"] = [name for name in rest if not any(name in names for names in groups.values())]
    listed = [f"{title}:\n" + "\n".join(map(summary, names)) + "\n" for title, names in groups.items()]
    return "\n".join([
        f"comfydock {__version__}: run ComfyUI in the background, and know the truth about it\n",
        f"usage: {call} COMMAND [NAME] [options]\n",
        *listed,
        "examples:",
        f"  {call} run --demo     try everything in a second, without ComfyUI",
        f"  {call} run            in a ComfyUI folder: adopt it and start it",
        f"  {call} help run       all options of a command\n",
        f"topics: {', '.join(TOPICS)} (help TOPIC)",
    ])  # fmt: skip


def show_version(console: Console, args: Arguments) -> Report:
    text = f"comfydock {__version__}"
    return Report({"text": text, "version": __version__}, None, [text])


# Completion: a shell's script hands on the words before the cursor and, behind "=", the one at it (PowerShell drops
# empty words); each line that comes back is a word to offer. Without one a shell offers files.
SCRIPTS = {
    "bash": r"""# Completion of comfydock for bash 3.2 and later. In ~/.bashrc:  eval "$(comfydock completion bash)"
_comfydock() {
    local IFS=$'\n'
    COMPREPLY=($(@CALL@ --complete "${COMP_WORDS[@]:1:COMP_CWORD-1}" "=${COMP_WORDS[COMP_CWORD]}" 2>/dev/null))
}
complete -o default -F _comfydock comfydock comfydock.py
""",
    "zsh": r"""#compdef comfydock comfydock.py
# Completion of comfydock for zsh. In ~/.zshrc:  source <(comfydock completion zsh)
_comfydock() {
    local -a found
    found=(${(f)"$(@CALL@ --complete "${(@)words[2,CURRENT-1]}" "=$PREFIX" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
if [[ $funcstack[1] == _comfydock ]]; then
    _comfydock "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef _comfydock comfydock comfydock.py
fi
""",
    "fish": r"""# Completion of comfydock for fish. In ~/.config/fish/config.fish:  comfydock completion fish | source
function __comfydock_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found (@CALL@ --complete $words[2..-1] "=$current" 2>/dev/null)
    or set found (__fish_complete_path "$current")
    printf '%s\n' $found
end
for name in comfydock comfydock.py
    complete -c $name -f -a '(__comfydock_complete)'
end
""",
    "powershell": r"""# Completion of comfydock for PowerShell. In $PROFILE:
#   comfydock completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName 'comfydock', 'comfydock.py' -ScriptBlock {
    param($current, $tree, $cursor)
    $typed = @($tree.CommandElements | Select-Object -Skip 1 | Where-Object { $_.Extent.EndOffset -lt $cursor } |
        ForEach-Object { "$_" })
    & @CALL@ --complete $typed "=$current" 2>$null
}
""",
}


def completion_script(shell: str) -> str:
    """Return the script that teaches a shell our words. Raises CDEnvironmentError for a shell we do not know."""
    from shlex import quote as quote_posix

    if shell not in SCRIPTS:
        raise usage_error(f"Unknown shell '{shell}': choose one of {', '.join(SCRIPTS)}.", "completion")
    doubled = [word.replace("'", "''") for word in own_command()]
    call = [f"'{word}'" for word in doubled] if shell == "powershell" else map(quote_posix, own_command())
    return SCRIPTS[shell].replace("@CALL@", " ".join(call))


def completions(words: list[str]) -> list[str]:
    """Return what may stand at the cursor: `words` are those before it and, behind "=", the one there."""
    before, current = words[:-1], words[-1][1:]
    if "--" in before:
        return []
    command, _, rest = find_command(before)
    flags = {flag: metavar for names, metavar, _ in options_of(command) for flag in names}
    wanted = flags.get(before[-1], "") if before else ""
    if wanted and not wanted.startswith("["):
        offers = values_of(wanted, before)
    elif current.startswith("-"):
        offers = [flag for flag in flags if flag != "--json" or command is None or command.has_json]
    elif command is None or command.name == "help":
        begun = "".join(f"{word} " for word in rest)
        names = [name for name in COMMANDS if name.startswith(begun) and name != begun.strip()]
        offers = [name[len(begun) :].split()[0] for name in names]
    else:
        is_taken = "..." not in command.operand and any(not word.startswith("-") for word in rest)
        offers = [] if is_taken else values_of(command.operand.strip("[.]"), before)
    return [word for word in dict.fromkeys(offers) if word.startswith(current)]


def values_of(metavar: str, before: list[str]) -> list[str]:
    """Return the words that may stand for a metavar; names that a shell would have to quote are left out."""
    if metavar not in ("NAME", "NODE"):
        return list({"SHELL": SCRIPTS, "WHEN": COLOUR_CHOICES}.get(metavar, ()))
    chosen = {flag: value for flag, value in zip(before, before[1:])}
    name = chosen.get("-e", chosen.get("--env"))
    workspace = select_workspace(chosen.get("--workspace"), name is not None)
    if metavar == "NAME":
        names = [environment.name for environment in workspace.list_environments()]
    else:
        nodes = workspace.select(name).nodes.manifest.nodes.values()
        names = [node.registry_id or node.name for node in nodes]
    return [name for name in names if re.fullmatch(r"[\w.@/-]+", name)]


# ====================================================================================================================
# 17. The front door
# Turns whatever happens into words and an exit code.


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]); return the exit code. Never exits.

    0 done, 1 could not, 2 wrong usage, 3 `status` of something that does not run, 130 interrupted;
    with --foreground ComfyUI's own code. Raises only with COMFYDOCK_DEBUG set.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in (*HIDDEN_ENTRIES, "--complete"):
        return hidden(words)
    own_words = words[: [*words, "--"].index("--")]
    console = Console(sys.stdout, sys.stderr, sys.stdin, "--json" in own_words, lambda: how_called(sys.argv))
    try:
        if argv is None:
            prepare_signals()
        return answer(console, words)
    except BrokenPipeError:  # `logs | head`: the reader has seen enough
        forget_output()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        caught = error
    finally:
        ignore_interrupts(argv is None)
    is_fault = not isinstance(caught, (KeyboardInterrupt, CDEnvironmentError, OSError))
    if is_fault and os.environ.get("COMFYDOCK_DEBUG"):
        raise caught
    while True:
        with suppress(KeyboardInterrupt):  # a second one would only break off our last words
            return complain(console, words, *explained(caught, words))


def hidden(words: list[str]) -> int:
    """Enter where the file starts itself, or a shell completes; typed by a person it says nothing and fails."""
    try:
        return {**HIDDEN_ENTRIES, "--complete": complete}[words[0]](words[1:])
    except Exception:
        if os.environ.get("COMFYDOCK_DEBUG"):
            raise
        return 1


def complete(words: list[str]) -> int:
    """Offer a completion script what may stand at the cursor; 1 where that is nothing."""
    offers = completions(words)
    for offer in offers:
        Console(sys.stdout, None, None).result(offer)
    return 0 if offers else 1


def answer(console: Console, words: list[str]) -> int:
    """Do what `words` ask for and show the report; return the exit code."""
    command, args = parse(words)
    console.quiet, console.colour, console.json_mode = args.quiet, args.color, args.json
    console.where = ("--workspace", args.workspace) if args.workspace else ()
    console.chosen = ("-e", args.env) if args.env else ("-e", DEMO_NAME) if args.has("demo") else ()
    streams = stays_in_foreground(command.name, args) or args.has("watch")
    streams = streams or not command.has_json and not args.has("rotate")
    TRACERS[:] = [console.trace] if args.verbose else []
    with nullcontext() if streams else console.ticking(command.name):
        is_for_all = args.has("all") and command.name not in ("logs", "help", "version")
        report = do_all(console, args, command) if is_for_all else command.act(console, args)
    console.show(command.name, report)
    if args.verbose:
        console.trace(f"done, exit code {report.code}")
    try:
        console.flush()
    except BrokenPipeError:  # the reader has seen enough, and what was asked for is done
        forget_output()
    return report.code


def explained(caught: BaseException, words: list[str]) -> "tuple[CDEnvironmentError, int]":
    """Return what happened as an error with a sentence for people, and the exit code."""
    if isinstance(caught, CDEnvironmentError):
        return caught, {"usage": 2, "interrupted": 130}.get(caught.code, 1)
    if isinstance(caught, KeyboardInterrupt):
        is_create = find_command(words)[0] is COMMANDS["create"]
        hint: Hint = "Run the same command again to go on." if is_create else ("status",)
        return CDEnvironmentError("Interrupted.", hint, "interrupted"), getattr(caught, "exit_code", 130)
    if isinstance(caught, OSError):
        reason = caught.strerror or str(caught) or type(caught).__name__
        if caught.errno == errno.ELOOP:
            reason = "is a link, which is not followed here"
        sentence = f"{caught.filename}: {reason}." if caught.filename else f"{reason}."
        if caught.filename is None and caught.errno == errno.ENOENT:
            sentence = "The current folder no longer exists. Change to another one."
        hint = "raise the limit of open files: ulimit -n 4096" if caught.errno in NO_MORE_FILES else ""
        return CDEnvironmentError(sentence, hint, "system"), 1
    sentence = f"Internal error: {type(caught).__name__}: {caught}"
    return CDEnvironmentError(sentence, "set COMFYDOCK_DEBUG=1 to see where", "bug"), 1


def complain(console: Console, words: list[str], error: CDEnvironmentError, code: int) -> int:
    """Show an error as far as the streams allow; return `code`."""
    named, _, _ = find_command(words)
    close = closest_flag(error.message, [flags[-1] for flags, _, _ in options_of(named)])
    if close and close not in words and "did you mean" not in error.hint:
        error.hint = f"did you mean {close}?"
    try:
        console.fail(named.name if named else "", error)
        console.flush()
    except OSError:
        forget_output()
    return code


if __name__ == "__main__":
    sys.exit(main())
