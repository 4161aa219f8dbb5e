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
from typing import TYPE_CHECKING

from cluster.errors import InputError, KuzushijiError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger("kuzushiji")

SECONDS_FOR_TUNNEL = 60.0
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
        return f"--address {self.address}" if self.address else f"--cluster {self.cluster_file}"

    def how_to_stop(self, job: str) -> str:
        if self.address:
            return f"ray job stop --address {self.address} {job}"
        return f"ray exec {self.cluster_file} 'RAY_AUTH_MODE=token ray job stop {job}'"


@contextmanager
def connected(head: Head) -> Iterator["JobSubmissionClient"]:
    """Talk to a head for the time of the block, with the token of this machine (`ray get-auth-token`), if it has one.

    Raises:
        KuzushijiError: no cluster is up, nobody answers, or the token is not the head's.
    """
    if head.address:
        yield _client(head.address)
        return
    assert head.cluster_file is not None
    with _tunnel(head.cluster_file) as address:
        yield _client(address)


def _client(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # which tell of each connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise KuzushijiError(
            f"{address} must accept this machine's token. Received: {str(error).splitlines()[0]}. Put the cluster's "
            "token into ~/.ray/auth_token (mode 600) and set RAY_AUTH_MODE=token"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise KuzushijiError(
            f"--address must be a Ray head's, as http://127.0.0.1:{DASHBOARD_PORT}. Received: {address}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


@contextmanager
def _tunnel(cluster_file: Path) -> Iterator[str]:
    """An address of this machine that leads to the head's dashboard through ssh."""
    if not cluster_file.is_file():
        raise InputError(f"--cluster must be the file that `ray up` was given. Received: {cluster_file}, not there")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
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


def _wait_for(forward: "subprocess.Popen[str]", port: int, cluster_file: Path) -> None:
    deadline = time.monotonic() + SECONDS_FOR_TUNNEL
    while time.monotonic() < deadline:
        if forward.poll() is not None:
            assert forward.stdout is not None
            said = " ".join(forward.stdout.read().split())[-300:]
            raise KuzushijiError(
                f"the cluster of --cluster must be up. Received: {said}. Run `ray up -y {cluster_file}`"
            )
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise KuzushijiError(
        f"the head must answer by ssh within {SECONDS_FOR_TUNNEL:.0f} s. Received: nothing. "
        f"Try `ray exec {cluster_file} uptime`"
    )


def hand_in(client: "JobSubmissionClient", arguments: Sequence[str], working_dir: Path | None) -> str:
    """Start `kuzushiji ARGUMENTS` on the cluster; the job's id.

    working_dir: a checkout whose code the job is to run instead of the image's; what git ignores is left out.

    Raises:
        KuzushijiError: the head did not take it.
    """
    job = f"{arguments[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    environment = {"working_dir": str(working_dir), "excludes": [".git"]} if working_dir else {}
    try:
        client.submit_job(entrypoint=shlex.join(["kuzushiji", *arguments]), submission_id=job, runtime_env=environment)
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

    again = (
        f"job {job} goes on. Follow it: kuzushiji submit {head.option} --attach {job}; stop it: {head.how_to_stop(job)}"
    )
    try:
        client.get_job_info(job)  # a stream of an unknown job ends without a word on why
        asyncio.run(_print_log(client, job))
        details = client.get_job_info(job)
    except KeyboardInterrupt:
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


async def _print_log(client: "JobSubmissionClient", job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
