"""Hosts: like a machine, each has its own processes, network, host name and files, and an sshd."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fake_cloud.plan import VISIBLE, Plan
from fake_cloud.room import GATEWAY, NETWORK, Room, answers

SECONDS_TO_BOOT = 300.0
BOOT = str(Path(__file__).with_name("boot.sh"))


class Host:
    """A machine in the room. It has booted, and its sshd answers.

    Raises:
        OSError: it does not boot, or its sshd does not answer. A failed boot has the console's output.
    """

    def __init__(self, room: Room, plan: Plan, address: str) -> None:
        self.name, self.address = plan.name, address
        self._room, self._plan = room, plan
        self._card = "card" + address.removeprefix("10.128.").replace(".", "-")
        self._process = self._start()
        try:
            # The processes are nsenter, unshare, and the machine's own first one. `pid` is its number outside its
            # namespace.
            self.pid = psutil.Process(self._process.pid).children()[0].children()[0].pid
            self._connect()
        except BaseException:
            self._kill()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        new = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        script = ["bash", BOOT, self.name, " ".join(self._plan.keys), *VISIBLE]
        with tempfile.TemporaryFile() as files, tempfile.TemporaryFile() as console:
            files.write(self._plan.tar(self.address))
            files.seek(0)
            process = self._room.start([*new, *script], stdin=files, stdout=subprocess.PIPE, stderr=console)
            assert process.stdout is not None
            with process.stdout as out:
                if out.readline() != b"ready\n":
                    process.wait()
                    console.seek(0)
                    raise OSError(f"{self.name} does not boot: {console.read().decode().strip()}")
        return process

    def _connect(self) -> None:
        link = f"link add {self._card} type veth peer name eth0 netns {self.pid}"
        self._room.ip(link, f"link set {self._card} master bridge0 up")
        address = f"address add {self.address}/{NETWORK.partition('/')[2]} dev eth0"
        self._room.ip(
            "link set lo up", address, "link set eth0 up", f"route add default via {GATEWAY}", inside=self.pid
        )
        end = time.monotonic() + SECONDS_TO_BOOT
        while not answers(self.pid, 22):
            if time.monotonic() > end or not self.alive:
                raise OSError(f"the sshd of {self.name} does not answer")
            time.sleep(0.05)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Remove the machine. Its network card goes first: others hear no more of it, like of a lost real machine."""
        with contextlib.suppress(subprocess.CalledProcessError):  # already gone, alone or with the room
            self._room.ip(f"link delete {self._card}")
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for unshare in psutil.Process(self._process.pid).children() if self.alive else ():
                unshare.kill()  # and with it, all processes below it
        self._process.wait()

    def popen(
        self, command: str | Sequence[str], *, user: str = "root", env: Mapping[str, str] | None = None, **streams: Any
    ) -> subprocess.Popen[Any]:
        """Start a command in the user's home (a string: with bash). It is killed when the returned process is.

        env: in addition to the host's own. streams: as for subprocess; pipes by default.
        """
        home = "/root" if user == "root" else f"/home/{user}"
        login = {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash"}
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--pdeathsig=KILL"]
        inner = ["bash", "-c", command] if isinstance(command, str) else command
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [*enter, *become, "sh", "-c", 'cd && exec "$@"', "-", *inner],
            env={**self._plan.variables, **login, **(env or {})},
            **(options | streams),
        )

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str = "root",
        timeout: float = 300.0,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command. Return its output and exit code.

        Raises:
            TimeoutExpired: the command was killed after `timeout` seconds.
            CalledProcessError: it failed, and `check` is set.
        """
        with self.popen(command, user=user, env=env) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            error = subprocess.CalledProcessError(process.returncode, command, out, err)
            error.add_note(f"on {self.name}:\n{out[-4000:]}\n{err[-4000:]}")
            raise error
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def write(self, path: str, data: str | bytes, mode: int = 0o600) -> None:
        """Write a file owned by root, and create the folders above it.

        Raises:
            OSError: the file can't be written.
        """
        command = ["install", "-D", f"--mode={mode:o}", "/dev/stdin", path]
        with self.popen(command, stdin=subprocess.PIPE, text=False) as process:
            error = process.communicate(data.encode() if isinstance(data, str) else data)[1]
        if process.returncode:
            raise OSError(f"{path} on {self.name}: {error}")

    def read(self, path: str) -> str:
        return self.run(["cat", path]).stdout
