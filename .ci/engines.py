"""What `generate` and `autostart` write, run by real engines: systemd, Podman, Docker and Compose.

`.ci/engines` runs this as root inside its bed. The ComfyUI of these tests is a stand-in of thirty lines: it starts
slowly when it is told to, refuses unknown arguments with code 2, and tells what it was given.
"""

import json
import os
import pwd
import re
import shlex
import subprocess
import sys
import time
import unittest
import urllib.request

COMFYDOCK = "/src/comfydock.py"
TOOLS = "/bed/tools"
ODD = "/home/alice/Ein Ordner mit 50%, $HOME und ü"  # what a template has to quote
SECRET = "a b$HOME \"c\" `d` \\e 50%n 'f'"
STAND_IN = """
import argparse, http.server, json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
parser = argparse.ArgumentParser()
parser.add_argument("--listen", nargs="?", const="0.0.0.0", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8188)
parser.add_argument("--slow", type=float, default=0)
parser.add_argument("--note")
parser.add_argument("--output-directory")
parser.add_argument("--disable-auto-launch", action="store_true")
args = parser.parse_args()
time.sleep(args.slow)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told = {"system": {"argv": sys.argv}, "note": args.note, "environ": dict(os.environ), "pid": os.getpid()}
        told.update(queue_running=[], queue_pending=[])
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass

server = http.server.ThreadingHTTPServer((args.listen, args.port), Handler)
print("To see the GUI go to: http://%s:%s" % (args.listen, args.port), flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("Stopped server", flush=True)
"""


def run(*words, user=None, code=0, seconds=120, **options):
    """The output of a command, which must end with `code` (None: whatever it is)."""
    environment = {**os.environ, **options.pop("env", {})}
    if user:
        entry = pwd.getpwnam(user)
        environment.update(HOME=entry.pw_dir, USER=user, XDG_RUNTIME_DIR=f"/run/user/{entry.pw_uid}")
        options.update(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
    options.setdefault("cwd", "/")
    done = subprocess.run(
        words, env=environment, timeout=seconds, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )
    if code is not None and done.returncode != code:
        raise AssertionError(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def eventually(question, seconds=30):
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        if time.monotonic() > end:
            raise AssertionError(f"did not come true within {seconds} s")
        time.sleep(0.05)
    return answer


def ask(port, path="/system_stats", host="127.0.0.1"):
    """What the ComfyUI on a port says, None when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def tree(folder):
    """All that is below a folder, by path."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(here, name)
            found[path] = os.readlink(path) if os.path.islink(path) else os.lstat(path).st_mode
    return found


def read(path):
    """The text of a file, "" of what is none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def holds(folder, text):
    """The files below a folder that hold a text."""
    return [path for path in tree(folder) if os.path.isfile(path) and text in read(path)]


class Bed(unittest.TestCase):
    """Two environments of alice, in a folder with an odd name, on a Python of their own."""

    @classmethod
    def setUpClass(cls):
        if not os.path.exists("/home/alice"):
            run("useradd", "--create-home", "--uid", "1234", "alice")
            run("useradd", "--create-home", "bob")
            run("loginctl", "enable-linger", "alice")
            eventually(lambda: os.path.exists("/run/user/1234/bus"))
        cls.python = f"{ODD}/venv/bin/python3"
        if not os.path.exists(ODD):
            run("mkdir", ODD, user="alice")
            run("python3", "-m", "venv", f"{ODD}/venv", user="alice")
            for name in ("one.1-a", "two"):
                cls.checkout(f"{ODD}/{name}/ComfyUI")
                cls.comfydock("create", name, "--from", f"{ODD}/{name}/ComfyUI", "--python", cls.python)
        cls.began = time.monotonic()

    @staticmethod
    def checkout(folder):
        run("mkdir", "-p", f"{folder}/custom_nodes", f"{folder}/comfy", f"{folder}/models", user="alice")
        for name, text in {"main.py": STAND_IN, "nodes.py": "", "folder_paths.py": ""}.items():
            with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        run("chown", "-R", "alice:", folder)

    @classmethod
    def comfydock(cls, *words, user="alice", **options):
        options.setdefault("cwd", ODD)
        home = {"COMFYDOCK_HOME": f"{ODD}/work"}
        return run(cls.python, COMFYDOCK, *words, user=user, env={**home, **options.pop("env", {})}, **options)

    @staticmethod
    def note(line):
        print(f"  {line}", flush=True)

    @classmethod
    def told_once(cls, name, port, *words):
        """Run and stop an environment, so that its arguments and variables are known."""
        cls.comfydock(
            "-e", name, "run", "--wait", "60", "--set-env", f"SECRET={SECRET}", "--", "--port", str(port), *words
        )
        cls.comfydock("-e", name, "stop")


class Units:
    """What holds for a unit, of the system or of a user: `systemctl` asks the one whose it is."""

    unit = "comfydock-one.1-a"

    def shown(self, name):
        return self.systemctl("show", "-P", name, self.unit).strip()

    def is_up(self):
        return self.shown("ActiveState") == "active" and ask(8301)

    def test_it_is_started_when_it_answers_and_ends_cleanly(self):
        began = time.monotonic()
        self.systemctl("start", self.unit)
        self.assertGreater(time.monotonic() - began, 1.0)
        said = ask(8301)
        self.assertEqual((said["environ"]["SECRET"], said["note"]), (SECRET, "100% $HOME"))
        self.assertFalse({"NOTIFY_SOCKET", "WATCHDOG_USEC"} & said["environ"].keys())
        began = time.monotonic()
        self.systemctl("stop", self.unit)
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual((self.shown("ActiveState"), self.shown("Result")), ("inactive", "success"))
        self.assertIsNone(ask(8301))

    def test_it_comes_back_after_a_crash_of_comfyui_and_of_its_watcher(self):
        self.systemctl("start", self.unit)
        for number, victim in enumerate((ask(8301)["pid"], None), 1):
            former = ask(8301)["pid"]
            os.kill(victim or int(self.shown("MainPID")), 9)
            eventually(lambda former=former: (ask(8301) or {}).get("pid", former) != former and self.is_up())
            self.assertEqual(self.shown("NRestarts"), str(number))
            self.assertFalse(os.path.exists(f"/proc/{former}"))

    def test_a_restart_by_hand_leaves_it_in_its_control_group_and_a_stop_by_hand_holds(self):
        self.systemctl("start", self.unit)
        main, former = self.shown("MainPID"), ask(8301)["pid"]
        self.comfydock("-e", "one.1-a", "restart")
        pid = eventually(lambda: ask(8301))["pid"]
        self.assertNotEqual(pid, former)
        self.assertEqual(self.shown("MainPID"), main)
        self.assertIn(f"/{self.unit}.service", read(f"/proc/{pid}/cgroup"))
        self.comfydock("-e", "one.1-a", "stop")
        eventually(lambda: self.shown("ActiveState") == "inactive")
        time.sleep(2.5)
        self.assertEqual((self.shown("ActiveState"), self.shown("NRestarts")), ("inactive", "0"))
        self.assertIsNone(ask(8301))

    def test_wrong_arguments_are_final(self):
        text = read(self.file)
        self.addCleanup(self.rewrite, text)
        self.rewrite(text.replace("--slow", "--slowly"))
        self.systemctl("start", self.unit, code=1)
        self.assertEqual((self.shown("ExecMainStatus"), self.shown("NRestarts")), ("2", "0"))

    def rewrite(self, text):
        with open(self.file, "w", encoding="utf-8") as file:
            file.write(text)
        self.systemctl("daemon-reload")

    def test_the_secret_is_in_one_file_of_its_owner(self):
        files = holds(os.path.dirname(self.file), "50%n")
        self.assertEqual(files, [self.file.replace(".service", ".env")])
        self.assertEqual(os.stat(files[0]).st_mode & 0o777, 0o600)


class SystemUnit(Units, Bed):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.told_once("one.1-a", 8301, "--slow", "1", "--note", "100% $HOME")
        cls.comfydock("generate", "systemd", "one.1-a", "--out", f"{ODD}/units")
        cls.file = f"/etc/systemd/system/{cls.unit}.service"
        for mode, end in (("644", "service"), ("600", "env")):
            run("install", "-m", mode, f"{ODD}/units/{cls.unit}.{end}", "/etc/systemd/system/")
        cls.systemctl("daemon-reload")

    @classmethod
    def tearDownClass(cls):
        cls.systemctl("stop", cls.unit)

    def setUp(self):
        self.systemctl("stop", self.unit)
        self.systemctl("reset-failed", self.unit, code=None)

    @staticmethod
    def systemctl(*words, code=0):
        return run("systemctl", *words, code=code)

    def test_the_tool_that_verifies_is_silent(self):
        self.assertEqual(run("systemd-analyze", "verify", self.file), "")


class UserUnit(Units, Bed):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.told_once("one.1-a", 8301, "--slow", "1", "--note", "100% $HOME")
        cls.before = tree("/home/alice/.config")
        cls.comfydock("autostart", "on", "one.1-a")
        cls.file = f"/home/alice/.config/systemd/user/{cls.unit}.service"

    def setUp(self):
        self.systemctl("stop", self.unit)
        self.systemctl("reset-failed", self.unit, code=None)

    @classmethod
    def tearDownClass(cls):
        cls.systemctl("stop", cls.unit)
        cls.comfydock("autostart", "off", "one.1-a")

    @staticmethod
    def systemctl(*words, code=0):
        return run("systemctl", "--user", *words, user="alice", code=code)

    def test_the_tool_that_verifies_is_silent(self):
        self.assertEqual(run("systemd-analyze", "--user", "verify", self.file, user="alice"), "")

    def test_systemd_wants_it_and_off_leaves_no_trace(self):
        self.assertEqual(self.systemctl("is-enabled", self.unit).strip(), "enabled")
        self.assertIn("is on", self.comfydock("autostart", "status", "one.1-a"))
        self.comfydock("autostart", "off", "one.1-a")
        self.assertEqual(tree("/home/alice/.config"), self.before)
        self.assertIn("is off", self.comfydock("autostart", "status", "one.1-a"))
        self.comfydock("autostart", "on", "one.1-a")


class SystemAutostart(Bed):
    def test_root_has_the_machine_start_it_as_its_owner_and_off_leaves_no_trace(self):
        self.told_once("two", 8302)
        before = tree("/etc/systemd")
        self.comfydock("autostart", "on", "two", "--system", user=None)
        self.addCleanup(self.comfydock, "autostart", "off", "two", "--system", user=None)
        self.assertEqual(run("systemctl", "is-enabled", "comfydock-two").strip(), "enabled")
        self.assertIn("is on", self.comfydock("autostart", "status", "two", "--system", user=None))
        run("systemctl", "start", "comfydock-two")
        self.assertEqual(os.stat(f"/proc/{ask(8302)['pid']}").st_uid, pwd.getpwnam("alice").pw_uid)
        run("systemctl", "stop", "comfydock-two")
        self.assertIsNone(ask(8302))
        self.comfydock("autostart", "off", "two", "--system", user=None)
        self.assertEqual(tree("/etc/systemd"), before)


class Images(Bed):
    """Both environments as images of Podman's, made with no network."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.told_once("one.1-a", 8301, "--slow", "1", "--note", "100% $HOME", "--output-directory", ODD)
        cls.told_once("two", 8302)
        if "localhost/base" not in run("podman", "images"):
            run("podman", "import", "/bed/base.tar", "localhost/base")
        cls.label = "one-1-a-ec2f0b3b"

    @classmethod
    def generate(cls, engine, *words):
        out = f"/home/alice/{cls.__name__.lower()}-{engine}"
        run("rm", "-rf", out)
        said = cls.comfydock("generate", engine, *words, "--out", out)
        return out, said


class Podman(Images):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.out, cls.said = cls.generate("dockerfile", "one.1-a")
        began = time.monotonic()
        cls.built = run(
            "podman",
            "build",
            "--format",
            "docker",
            "--network=none",
            "--build-arg",
            "BASE=localhost/base",
            "-t",
            "one",
            cls.out,
        )
        cls.note(f"podman build {time.monotonic() - began:.1f} s")
        volumes = re.findall(r"-v (\S+)", cls.said)
        cls.volumes = [word for volume in volumes for word in ("-v", volume)]

    def tearDown(self):
        run("podman", "rm", "-f", "-t", "0", "one", "other", code=None)
        run("podman", "volume", "prune", "-f")

    def start(self, name="one", port=8301):
        return run(
            "podman", "run", "-d", "--name", name, "-p", f"127.0.0.1:{port}:8188", *self.volumes, "one", code=None
        )

    def test_it_is_healthy_and_stops_at_once_and_well(self):
        self.start()
        eventually(lambda: not subprocess.run(["podman", "healthcheck", "run", "one"], capture_output=True).returncode)
        said = ask(8301)
        self.assertEqual((said["note"], said["environ"].get("SECRET")), ("100% $HOME", None))
        self.assertIn("--output-directory", self.said)
        self.assertNotIn("--output-directory", said["system"]["argv"])
        began = time.monotonic()
        run("podman", "stop", "-t", "30", "one")
        self.note(f"podman stop {time.monotonic() - began:.1f} s")
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(run("podman", "inspect", "--format", "{{.State.ExitCode}}", "one").strip(), "0")

    def test_it_is_as_the_file_says(self):
        image = json.loads(run("podman", "inspect", "one"))[0]["Config"]
        self.assertEqual((image["StopSignal"], image["User"]), ("SIGINT", "1000"))
        self.assertEqual(sorted(map(os.path.basename, image["Volumes"])), ["input", "models", "output", "user"])
        self.assertEqual(holds(self.out, "50%n"), [])

    def test_killed_and_started_ten_times_with_its_volumes_it_always_comes_back(self):
        self.start()
        for _ in range(10):
            self.assertTrue(eventually(lambda: ask(8301)))
            run("podman", "kill", "-s", "KILL", "one")
            run("podman", "wait", "one")
            run("podman", "start", "one")
        self.assertTrue(eventually(lambda: ask(8301)), run("podman", "logs", "one"))

    def test_another_container_on_its_volumes_starts_only_when_it_is_gone(self):
        self.start()
        eventually(lambda: ask(8301))
        self.start("other", 8302)
        self.assertNotEqual(run("podman", "wait", "other").strip(), "0")
        self.assertIn("another container", run("podman", "logs", "other"))
        run("podman", "rm", "-f", "-t", "0", "one", "other")
        self.start("other", 8302)
        self.assertTrue(eventually(lambda: ask(8302)))

    def test_a_restart_inside_is_left_to_its_pid_1(self):
        self.start()
        former = eventually(lambda: ask(8301))["pid"]
        run("podman", "exec", "one", "python3", "/opt/comfydock.py", "restart")
        self.assertNotEqual(eventually(lambda: ask(8301))["pid"], former)
        self.assertIn("PPid:\t1\n", run("podman", "exec", "one", "cat", f"/proc/{ask(8301)['pid']}/status"))
        run("podman", "stop", "one")
        self.assertEqual(run("podman", "inspect", "--format", "{{.State.ExitCode}}", "one").strip(), "0")


class Pinned(Images):
    def test_what_git_has_is_fetched_at_its_commit_and_what_only_this_machine_has_is_refused(self):
        folder = f"{ODD}/three/ComfyUI"
        self.checkout(folder)
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
        run(*git, "init", "-q", "-b", "main", user="alice")
        run(*git, "add", ".", user="alice")
        run(*git, "commit", "-qm", "one", user="alice")
        run("git", "clone", "-q", "--bare", folder, f"{ODD}/three.git", user="alice")
        run("git", "--git-dir", f"{ODD}/three.git", "update-server-info", user="alice")
        server = subprocess.Popen(["python3", "-m", "http.server", "8400", "-d", ODD], stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        eventually(
            lambda: not subprocess.run(["curl", "-sf", "http://127.0.0.1:8400/"], capture_output=True).returncode
        )
        run(*git, "remote", "add", "origin", "http://127.0.0.1:8400/three.git", user="alice")
        run(*git, "fetch", "-q", user="alice")
        self.comfydock("create", "three", "--from", folder, "--python", self.python)
        out, _ = self.generate("dockerfile", "three")
        self.assertIn(run(*git, "rev-parse", "HEAD", user="alice").strip(), read(f"{out}/Dockerfile"))
        run(
            "podman",
            "build",
            "--format",
            "docker",
            "--network=host",
            "--build-arg",
            "BASE=localhost/base",
            "-t",
            "three",
            out,
        )
        self.addCleanup(run, "podman", "rm", "-f", "-t", "0", "three")
        run("podman", "run", "-d", "--name", "three", "-p", "127.0.0.1:8303:8188", "three")
        self.assertTrue(eventually(lambda: ask(8303)))
        run("sh", "-c", f"echo >> {shlex.quote(folder)}/nodes.py")
        self.assertIn(
            "ComfyUI has changes", self.comfydock("generate", "dockerfile", "three", "--out", f"{out}-2", code=1)
        )
        self.assertFalse(os.path.exists(f"{out}-2"))


class Kubernetes(Images):
    def test_what_is_written_is_valid_and_played_by_podman(self):
        out, _ = self.generate("kubernetes", "one.1-a", "two")
        files = sorted(path for path in tree(out) if path.endswith(".yaml"))
        self.assertEqual(len(files), 2)
        self.assertEqual(holds(out, "50%n"), [])
        tools = {"PYTHONPATH": TOOLS}
        for file in files:
            run("python3", "-m", "kubernetes_validate", "-k", "1.32", "--strict", file, env=tools)
        for name in sorted(os.listdir(out)):
            if os.path.isdir(f"{out}/{name}"):
                words = ("--format", "docker", "--build-arg", "BASE=localhost/base", "-t", f"comfydock-{name}")
                run("podman", "build", *words, f"{out}/{name}")
        for file in files:
            began = time.monotonic()
            run("podman", "kube", "play", file)
            self.addCleanup(run, "podman", "kube", "down", "--force", file)
            pods = json.loads(run("podman", "pod", "ps", "--format", "json"))
            infra = pods[0]["InfraId"]
            networks = json.loads(run("podman", "inspect", infra))[0]["NetworkSettings"]["Networks"]
            address = next(iter(networks.values()))["IPAddress"]
            self.assertTrue(eventually(lambda address=address: ask(8188, host=address)), run("podman", "ps", "-a"))
            self.note(f"podman kube play answers after {time.monotonic() - began:.1f} s")
            began = time.monotonic()
            run("podman", "kube", "down", file)
            self.note(f"podman kube down {time.monotonic() - began:.1f} s")
            self.assertEqual(json.loads(run("podman", "pod", "ps", "--format", "json")), [])


CDI = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {
            "name": name,
            "containerEdits": {
                "env": [f"FAKE_GPU={name}"],
                "deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/null"}],
            },
        }
        for name in ("0", "1", "all")
    ],
}


class Compose(Images):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for folder, name, text in (
            ("/etc/cdi", "nvidia.json", json.dumps(CDI)),
            ("/etc/docker", "daemon.json", json.dumps({"features": {"cdi": True}})),
            ("/usr/local/bin", "nvidia-container-runtime-hook", "#!/bin/sh\n"),
        ):
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        run("chmod", "755", "/usr/local/bin/nvidia-container-runtime-hook")
        run("systemctl", "restart", "docker")
        run("sh", "-c", "docker import /bed/base.tar base")

    def compose(self, program, out, *words, **options):
        return run(
            *program, "-f", f"{out}/compose.yaml", *words, env={"BUILDKIT": "0", "DOCKER_BUILDKIT": "0"}, **options
        )

    def test_two_environments_on_two_ports(self):
        out, _ = self.generate("compose", "one.1-a", "two", "--gpu", "none")
        run(
            "python3",
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            f"{out}/compose.yaml",
            env={"PYTHONPATH": TOOLS},
        )
        for path in tree(out):
            if path.endswith("Dockerfile"):
                self.assertEqual(run(f"{TOOLS}/bin/hadolint", path), "")
        self.assertEqual([oct(os.stat(path).st_mode & 0o777) for path in holds(out, "50%n")], ["0o600", "0o600"])
        for program in (["docker", "compose"], [f"{TOOLS}/bin/docker-compose"]):
            with self.subTest(program=program):
                self.up_and_down(program, out)

    def up_and_down(self, program, out):
        began = time.monotonic()
        self.compose(program, out, "build", "--build-arg", "BASE=base")
        self.note(f"{program[-1]} build {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        self.compose(program, out, "up", "-d", "--wait")
        self.note(f"{program[-1]} up --wait {time.monotonic() - began:.1f} s")
        self.assertEqual((ask(8301)["environ"]["SECRET"], ask(8301)["note"]), (SECRET, "100% $HOME"))
        self.assertTrue(ask(8302))
        began = time.monotonic()
        self.compose(program, out, "down", "-v")
        self.note(f"{program[-1]} down {time.monotonic() - began:.1f} s")
        self.assertIsNone(ask(8301))

    def card_seen_by(self, program, gpu):
        """What the stand-in sees of a card when `program` brings it up: a variable that CDI or NVIDIA's hook sets."""
        out, _ = self.generate("compose", "two", "--gpu", gpu)
        try:
            self.compose(
                program, out, "build", "--build-arg", "BASE=" + ("localhost/base" if "podman" in program[0] else "base")
            )
            self.compose(program, out, "up", "-d")
            seen = eventually(lambda: ask(8302))["environ"]
            return seen.get("FAKE_GPU") or seen.get("NVIDIA_VISIBLE_DEVICES")
        except AssertionError as error:
            return str(error).strip().splitlines()[-1]
        finally:
            self.compose(program, out, "down", "-v", code=None)

    def test_each_spelling_of_the_card_reaches_the_engines_it_is_for(self):
        old, new, podman = ["docker", "compose"], [f"{TOOLS}/bin/docker-compose"], ["podman-compose"]
        for program, gpu in ((old, "nvidia"), (new, "nvidia"), (new, "cdi"), (podman, "nvidia"), (podman, "cdi")):
            with self.subTest(program=program, gpu=gpu):
                self.assertEqual(self.card_seen_by(program, gpu), "all")
        self.assertIn("no such file", self.card_seen_by(old, "cdi"))  # at least it is not silent


if __name__ == "__main__":
    result = unittest.main(exit=False, verbosity=2).result
    bad = len(result.failures) + len(result.errors)
    print(f"{max(0, result.testsRun - bad - len(result.skipped))} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bool(bad))
