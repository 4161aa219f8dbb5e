"""The room of the hosts: an isolated network, and a process that is the ancestor of all processes of the hosts.

Nothing in it has a name on the real machine: namespaces, their mounts and network cards exist as long as a process in
them. The room's first process ends when the pipe from this process closes, which happens at the end of `Room`, and also
when this process is killed. The kernel then ends all other processes of the room, and frees what they held, so that no
later start has to clean up.
"""

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

GATEWAY = "10.128.0.1"  # in the range of Google's default network in us-central1
NETWORK = "10.128.0.0/20"
METADATA_ADDRESS = "169.254.169.254"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Ray runs `uptime` on a new host, and takes a host without it for dead.
PROGRAMS = ["bash", "chroot", "hostname", "ip", "mount", "nsenter", "pivot_root", "rsync", "setpriv", "ssh"]
PROGRAMS += ["ssh-keygen", "sshd", "tar", "umount", "unshare", "uptime", "useradd", "usermod"]
PACKAGES = "hostname iproute2 mount openssh-server passwd procps rsync util-linux"

# A bridge takes the MAC address of one of its ports, and changes it when that port is removed. Every host would then
# lose its gateway for a minute, so the address is set. A client that connects to the outside gets an error at once.
SCRIPT = f"""set -e
ip link set lo up
ip link add bridge0 type bridge
ip link set bridge0 address 02:00:0a:80:00:01 up
ip address add {GATEWAY}/20 dev bridge0
ip address add {METADATA_ADDRESS}/32 dev bridge0
ip route add unreachable default
echo 1 >/proc/sys/net/ipv4/ip_forward
echo ready
read -r end || true
"""
TRIAL = """mount --make-rprivate / && mount -t tmpfs tmpfs /sys && mkdir /sys/u /sys/w /sys/r &&
mount -t overlay overlay -o lowerdir=/,upperdir=/sys/u,workdir=/sys/w /sys/r && mount -t proc proc /sys/r/proc &&
ip link add one type veth peer name two && ip link add bridge0 type bridge"""

T = TypeVar("T")


def why_none() -> str | None:
    """Return why there can be no room on this machine, in one line, or None."""
    if sys.platform != "linux":
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root, to make namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"programs are missing: {', '.join(missing)} (Debian: {PACKAGES})"
    trial = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "sh", "-c", TRIAL]
    done = subprocess.run(trial, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    return f"namespaces, overlays or bridges are not to be had: {said}" if done.returncode else None


def in_network(pid: int, function: Callable[[], T]) -> T:
    """Call a function in the network of a process, and return its result. Sockets that it creates stay there."""

    def enter() -> T:
        with open(f"/proc/{pid}/ns/net") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"the network of process {pid} cannot be entered")
        return function()

    with ThreadPoolExecutor(1) as thread:  # the network is set for this thread only
        return thread.submit(enter).result()


class Room:
    """A network with a bridge. `pid` is that of its first process, outside its namespace."""

    def __init__(self) -> None:
        self._numbers = itertools.count(2)
        self._inside: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["unshare", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT],
            env={"PATH": SYSTEM_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            said = self._process.communicate()[1].decode()
            raise OSError(f"the network of the fake cloud cannot be made: {said.strip()}")
        self.pid = psutil.Process(self._process.pid).children()[0].pid
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()  # closes the pipe; unshare ends after the last process below it
        for process in self._inside:
            process.wait()

    def start(self, command: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
        """Start a command of the real machine in the room, but not in its network. Its parent process ends with it."""
        enter = ["nsenter", f"--target={self.pid}", "--pid", "--"]
        process = subprocess.Popen([*enter, *command], env={"PATH": SYSTEM_PATH}, **streams)
        self._inside.append(process)
        return process

    def ip(self, *lines: str, inside: int | None = None) -> None:
        """Run lines of `ip` commands in the room's network, or in that of the process `inside`.

        Raises:
            CalledProcessError: a line fails.
        """
        command = ["nsenter", f"--target={inside or self.pid}", "--net", "ip", "-batch", "-"]
        batch = "\n".join(lines).encode() + b"\n"
        subprocess.run(command, env={"PATH": SYSTEM_PATH}, input=batch, capture_output=True, check=True)

    def address(self) -> str:
        """Return an address that no host has had."""
        number = next(self._numbers)
        return f"10.128.{number // 256}.{number % 256}"

    def listen(self, function: Callable[[], T]) -> T:
        """Call a function in the room's network, and return its result."""
        return in_network(self.pid, function)


def answers(pid: int, port: int) -> bool:
    """Return whether a process listens on a port, in the network of the process `pid`."""
    try:
        in_network(pid, lambda: socket.create_connection(("127.0.0.1", port), 5).close())
    except ConnectionRefusedError:
        return False
    return True
