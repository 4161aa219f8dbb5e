"""A command as a job on a cluster: through a tunnel to its head, with its token, log and outcome brought back.

The same by Ray's own means: `ray dashboard ray_cluster.yaml` in one terminal, `ray job submit -- kuzushiji train ...`
in another.
"""

import asyncio
import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.cluster_file import faults_of_cluster_file
from cluster.errors import InputError, KuzushijiError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger("kuzushiji")

SECONDS_FOR_TUNNEL = 60.0
SECONDS_FOR_ANSWER = 10.0
# A log that ends so long before its job was cut off.
SECONDS_TO_END = 5
# The head's dashboard, which listens to the head alone.
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Head:
    """Where jobs are handed in: the address of a head, or the cluster file that `ray up` was given."""

    address: str | None = None
    cluster_file: Path | None = None

    @property
    def option(self) -> str:
        """As on the command line."""
        return shlex.join(["--address", self.address] if self.address else ["--cluster", str(self.cluster_file)])

    def ways_back(self, job: str) -> str:
        """How to see or end a job that is not followed any more."""
        if self.address:
            stop = ["ray", "job", "stop", "--address", self.address, job]
        else:
            stop = ["ray", "exec", str(self.cluster_file), f"RAY_AUTH_MODE=token ray job stop {job}"]
        return f"Follow it: kuzushiji submit {self.option} --attach {job}; stop it: {shlex.join(stop)}"


@contextmanager
def connected(head: Head) -> Iterator["JobSubmissionClient"]:
    """Talk to a head for the time of the block, with the token of this machine (`ray get-auth-token`), if it has one.

    Raises:
        InputError: the cluster file is not one that should go up.
        KuzushijiError: no cluster is up, nobody answers, or the token is not the head's, be it in the block.
    """
    for other in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # to which Ray's client would turn instead
        os.environ.pop(other, None)
    if not head.address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is there, which reads it once
    from ray.exceptions import AuthenticationError

    try:
        if head.address:
            yield _client(head.address)
            return
        assert head.cluster_file is not None
        with _ended_by_signals(), _tunnel(head.cluster_file) as address:
            yield _client(address)
    except AuthenticationError as error:
        raise KuzushijiError(
            f"the head must accept this machine's token. Received: {str(error).splitlines()[0]}. Put the cluster's "
            "token into ~/.ray/auth_token (mode 600) and set RAY_AUTH_MODE=token"
        ) from None


def _client(address: str) -> "JobSubmissionClient":
    import requests
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # which tell of each connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        _past_proxies(address)
        # Ray's own requests would wait without end for one who is silent. Whatever is answered will do.
        requests.get(f"{address.rstrip('/')}/api/version", timeout=SECONDS_FOR_ANSWER, allow_redirects=False)
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:  # the last two: other JSON than Ray's
        raise KuzushijiError(
            f"--address must be a Ray head's, as http://127.0.0.1:{DASHBOARD_PORT}. Received: {address}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def _past_proxies(address: str) -> None:
    """See to it that this process asks no proxy for what is on this machine: it would be shown the token."""
    host = urlsplit(address).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{kept},{host}" if kept else host


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, end the block as a failure does: what it started ends with it."""
    # Where one is ignored, as by nohup, it stays so.
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, _frame: object) -> None:
        for one in ours:  # a second one would cut short how the block ends
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for one in ours:
        signal.signal(one, leave)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


@contextmanager
def _tunnel(cluster_file: Path) -> Iterator[str]:
    """An address of this machine that leads to the head's dashboard through ssh."""
    # `ray dashboard` may make the account and key of a cluster, even the project, as `ray up` does.
    if faults := faults_of_cluster_file(cluster_file):
        raise InputError(f"{faults[0]}. Run {_shown('kuzushiji', 'verify', cluster_file)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "dashboard", str(cluster_file), "--port", str(port), "--remote-port", str(DASHBOARD_PORT)]
    # In a group of its own: Ctrl-C is ours to answer, and its ssh must end with it.
    with subprocess.Popen(  # noqa: S603 - no shell; the file is an argument of its own
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as forward:  # fmt: skip
        try:
            _wait_for(forward, port, cluster_file)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(forward.pid, signal.SIGTERM)


def _shown(*command: str | Path) -> str:
    """A command for a person to run."""
    return f"`{shlex.join(map(str, command))}`"


def _wait_for(forward: "subprocess.Popen[str]", port: int, cluster_file: Path) -> None:
    deadline = time.monotonic() + SECONDS_FOR_TUNNEL
    while time.monotonic() < deadline:
        if forward.poll() is not None:
            assert forward.stdout is not None
            said = " ".join(forward.stdout.read().split())[-300:]
            raise KuzushijiError(
                f"the cluster of --cluster must be up. Received: {said}. Run {_shown('ray', 'up', '-y', cluster_file)}"
            )
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise KuzushijiError(
        f"the head must answer by ssh within {SECONDS_FOR_TUNNEL:.0f} s. Received: nothing. "
        f"Try {_shown('ray', 'exec', cluster_file, 'uptime')}"
    )


def hand_in(client: "JobSubmissionClient", arguments: Sequence[str], working_dir: Path | None, head: Head) -> str:
    """Start `kuzushiji ARGUMENTS` on the cluster; the job's id.

    working_dir: a checkout whose code the job is to run instead of the image's; what git ignores is left out.

    Raises:
        KuzushijiError: the head did not take it.
        KeyboardInterrupt: Ctrl-C; nobody knows whether the head took it, and the log tells how to find out.
    """
    job = f"{arguments[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    environment = {"working_dir": str(working_dir), "excludes": [".git"]} if working_dir else {}
    try:
        client.submit_job(entrypoint=shlex.join(["kuzushiji", *arguments]), submission_id=job, runtime_env=environment)
    except (KeyboardInterrupt, SystemExit):
        log.warning("job %s may have been taken. %s", job, head.ways_back(job))
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise KuzushijiError(
            f"the head must take the job. Received: {' '.join(str(error).split())[:300]}. Run the same command again"
        ) from None
    return job


def follow(client: "JobSubmissionClient", job: str, head: Head) -> int:
    """Print a job's log until it ends; its exit code.

    Raises:
        KuzushijiError: there is no such job, or sight of it was lost.
        KeyboardInterrupt: Ctrl-C; the job goes on, and the log tells how to get back to it.
    """
    import aiohttp

    again = f"job {job} goes on. {head.ways_back(job)}"
    try:
        client.get_job_info(job)  # a stream of an unknown job ends without a word on why
        if not asyncio.run(_print_log(client, job)):
            log.warning(again)
            return 1
        details = _ended(client, job, again)
    except (KeyboardInterrupt, SystemExit):
        log.warning(again)
        raise
    except (RuntimeError, OSError, aiohttp.ClientError) as error:  # requests' are OSErrors
        text = " ".join(str(error).split())[:200]
        if "does not exist" in text:
            raise InputError(f"--attach must be the id of a job that the cluster knows. Received: {job}") from None
        raise KuzushijiError(f"the head must stay in reach. Received: {text}; {again}") from None
    log.info("job %s: %s", job, details.status.value.lower())
    if details.status.value == "SUCCEEDED":
        return 0
    return details.driver_exit_code or 1


async def _print_log(client: "JobSubmissionClient", job: str) -> bool:
    """To its end; False if nobody reads what we print any more, as after `| head`."""
    async for lines in client.tail_job_logs(job):
        try:
            sys.stdout.write(lines)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is not written yet goes nowhere, or Python tries again as it ends, and complains.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            return False
    return True


def _ended(client: "JobSubmissionClient", job: str, again: str) -> Any:
    """The details of a job at its end, which is not always the end of its log: what is in between may cut that off."""
    details, waited = client.get_job_info(job), 0
    while not details.status.is_terminal():
        if waited == SECONDS_TO_END:
            log.warning("the log was cut off; the outcome is waited for, as %s", again)
        time.sleep(1)
        waited += 1
        details = client.get_job_info(job)
    return details
