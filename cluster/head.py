"""The head of a cluster: a connection to it, through an ssh tunnel where only its cluster file is given."""

import ipaddress
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.cluster_file import faults_of_cluster_file
from cluster.errors import InputError, KuzushijiError, OptionError, squeezed
from cluster.progress import waiting

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SECONDS_FOR_TUNNEL = 60.0
SECONDS_FOR_ANSWER = 10.0
# Port of the head's dashboard, which listens on 127.0.0.1 only.
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Head:
    """Where jobs are submitted: the address of a head, or the cluster file that was given to `ray up`."""

    address: str | None = None
    cluster_file: Path | None = None
    insecure: bool = False
    """Send the token to `address` without encryption, even to another machine."""

    def follow_and_stop_hint(self, job: str) -> str:
        """Return the commands that follow or stop a job that this process no longer follows."""
        if self.address:
            options = ["--address", self.address, *(["--insecure"] if self.insecure else [])]
            stop = ["ray", "job", "stop", "--address", self.address, job]
            token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
        else:
            options = ["--cluster", str(self.cluster_file)]
            stop = ["ray", "exec", str(self.cluster_file), f"RAY_AUTH_MODE=token ray job stop {job}"]
            token = ""
        follow = f"{token}kuzushiji submit {shlex.join(options)} --attach {job}"
        return f"Follow it: {follow}; stop it: {token}{shlex.join(stop)}"


@contextmanager
def connected(head: Head) -> Iterator["JobSubmissionClient"]:
    """Connect to a head while the block runs, with the token of this machine (`ray get-auth-token`), if it has one.

    Raises:
        OptionError: the token would travel to another machine without encryption.
        InputError: the cluster file has faults.
        KuzushijiError: the cluster is not up, the head does not answer, or it rejects the token (now or in the block).
    """
    if head.address and not head.insecure:
        _check_encrypted(head.address)
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray's client would prefer these addresses
        os.environ.pop(variable, None)
    if not head.address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: it reads this once
    from ray.exceptions import AuthenticationError

    try:
        if head.address:
            yield _client(head.address)
            return
        assert head.cluster_file is not None
        with _exit_on_signals(), _tunnel(head.cluster_file) as address:
            yield _client(address)
    except AuthenticationError as error:
        raise KuzushijiError(
            f"the head must accept this machine's token. Received: {str(error).splitlines()[0]}. Put the cluster's "
            "token into ~/.ray/auth_token (mode 600) and set RAY_AUTH_MODE=token. See docs/google-cloud.md"
        ) from error


def _client(address: str) -> "JobSubmissionClient":
    import requests
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they log each connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        _bypass_proxies(address)
        # Ray's requests have no timeout: find out here whether the server answers. Any response will do.
        requests.get(f"{address.rstrip('/')}/api/version", timeout=SECONDS_FOR_ANSWER, allow_redirects=False)
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:  # the last two: JSON not from Ray
        raise KuzushijiError(
            f"the address must be a Ray head's, such as http://127.0.0.1:{DASHBOARD_PORT}. "
            f"Received: {address}: {squeezed(error, 200)}"
        ) from error


def _check_encrypted(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise OptionError(
            "--address must be https://, or on this machine (an ssh tunnel); otherwise others can read the token. "
            f"Received: {address}. Use --cluster, or --insecure on a network that you trust. See docs/google-cloud.md"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _bypass_proxies(address: str) -> None:
    """Add a host of this machine to NO_PROXY, since a proxy would receive the token."""
    host = urlsplit(address).hostname or ""
    if _is_loopback(host):
        existing = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{existing},{host}" if existing else host


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Raise SystemExit in the block on SIGTERM, and on SIGHUP (a closed terminal), so that its `finally` blocks run."""
    # Signals that are ignored, as under nohup, stay ignored.
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def leave(received: int, _frame: object) -> None:
        for number in handled:  # a second signal would interrupt the cleanup
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + received)

    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _tunnel(cluster_file: Path) -> Iterator[str]:
    """Open an ssh tunnel to the head's dashboard, and yield its local address."""
    # Check this first: `ray dashboard` may create the cluster's account and key, even the project, as `ray up` does.
    if faults := faults_of_cluster_file(cluster_file):
        raise InputError(f"{faults[0]}. Run {_quoted('kuzushiji', 'verify', cluster_file)}. See docs/google-cloud.md")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "dashboard", str(cluster_file), "--port", str(port), "--remote-port", str(DASHBOARD_PORT)]
    # In its own process group: Ctrl-C must not reach it, and its ssh process must end with it.
    with subprocess.Popen(  # noqa: S603 - no shell; the file is a separate argument
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as tunnel:  # fmt: skip
        try:
            with waiting("Connecting to the head ..."):
                _wait_for(tunnel, port, cluster_file)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(tunnel.pid, signal.SIGTERM)


def _quoted(*command: str | Path) -> str:
    """Format a command for a message."""
    return f"`{shlex.join(map(str, command))}`"


def _wait_for(tunnel: "subprocess.Popen[str]", port: int, cluster_file: Path) -> None:
    """Wait until the tunnel's local port accepts connections.

    Raises:
        KuzushijiError: the tunnel's process ended, or the timeout expired.
    """
    deadline = time.monotonic() + SECONDS_FOR_TUNNEL
    while time.monotonic() < deadline:
        if tunnel.poll() is not None:
            assert tunnel.stdout is not None
            text = tunnel.stdout.read()
            # Ray's reason, and not the end of its log, where there is one.
            (reason,) = re.findall(r"^.*(?:not found|Error:).*$", text, re.M)[-1:] or [" ".join(text.split())[-300:]]
            raise KuzushijiError(
                f"the cluster of --cluster must be up. Received: {reason.strip()[:300]}. "
                f"Run {_quoted('ray', 'up', '-y', cluster_file)}"
            )
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise KuzushijiError(
        f"the head must answer over ssh within {SECONDS_FOR_TUNNEL:.0f} s. Received: no answer. "
        f"Try {_quoted('ray', 'exec', cluster_file, 'uptime')}. See docs/google-cloud.md"
    )
