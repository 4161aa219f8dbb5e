"""Run a command as a Ray job on a cluster, and print its log.

Ray's command line does the same in two terminals: `ray dashboard ray_cluster.yaml` in one, `ray job submit -- kuzushiji
train ...` in the other.
"""

import asyncio
import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError, KuzushijiError, squeezed
from cluster.head import Head

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger("kuzushiji")

# If the job still runs this long after its log ended, the connection for the log was lost.
SECONDS_TO_END = 5


def submit_job(client: "JobSubmissionClient", arguments: Sequence[str], working_dir: Path | None, head: Head) -> str:
    """Submit `kuzushiji ARGUMENTS` as a job and return its id.

    Args:
        client: the connection to the head.
        arguments: the command, such as `train`, and its options.
        working_dir: a checkout whose code the job runs instead of the image's. Files that git ignores are not uploaded.
        head: named in messages.

    Raises:
        KuzushijiError: the head did not accept the job, or it is not known whether it did.
        KeyboardInterrupt: Ctrl-C. The head may have accepted the job; the log says how to find out.
    """
    job = f"{arguments[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    environment = {"working_dir": str(working_dir), "excludes": [".git"]} if working_dir else {}
    try:
        try:
            client.submit_job(
                entrypoint=shlex.join(["kuzushiji", *arguments]), submission_id=job, runtime_env=environment
            )
        except (RuntimeError, ValueError, OSError) as error:
            _check_taken(client, job, head, error)
    except (KeyboardInterrupt, SystemExit):
        log.warning("job %s may have been submitted. %s", job, head.follow_and_stop_hint(job))
        raise
    return job


def _check_taken(client: "JobSubmissionClient", job: str, head: Head, error: Exception) -> None:
    """Check whether the head has a job whose submission failed with `error`: only the response may have been lost.

    Raises:
        KuzushijiError: the head does not have the job, or does not answer.
    """
    received = squeezed(error, 300)
    try:
        client.get_job_info(job)
    except (RuntimeError, OSError) as failed:
        if "does not exist" in str(failed):
            raise KuzushijiError(
                f"the head must accept the job. Received: {received}. Run the same command again"
            ) from error
        raise KuzushijiError(
            f"the head must report whether it has job {job}, which may have been submitted. Received: {received}. "
            f"{head.follow_and_stop_hint(job)}"
        ) from error


def follow(client: "JobSubmissionClient", job: str, head: Head) -> int:
    """Print a job's log until the job ends. Return its exit code, or 1 if standard output was closed before.

    Raises:
        InputError: the cluster has no such job.
        KuzushijiError: the connection to the head was lost.
        KeyboardInterrupt: Ctrl-C. The job continues; the log says how to follow it again.
    """
    continues = f"job {job} continues. {head.follow_and_stop_hint(job)}"
    try:
        client.get_job_info(job)  # the log stream of an unknown job ends without an error
        if not asyncio.run(_print_log(client, job)):
            log.warning(continues)
            return 1
        details = _wait_for_end(client, job, continues)
    except (KeyboardInterrupt, SystemExit):
        log.warning(continues)
        raise
    except (RuntimeError, OSError) as error:  # exceptions of requests are OSErrors
        text = squeezed(error, 200)
        if "does not exist" in text:
            raise InputError(
                "--attach must be the id of a job that the head knows; after a restart it knows none. "
                f"Received: {job}. See docs/google-cloud.md#jobs"
            ) from error
        raise KuzushijiError(
            f"the head must stay reachable. Received: {text}. Unless the cluster was stopped or restarted, {continues}"
        ) from error
    log.info("job %s: %s", job, details.status.value.lower())
    if details.status.value == "SUCCEEDED":
        return 0
    return details.driver_exit_code or 1


async def _print_log(client: "JobSubmissionClient", job: str) -> bool:
    """Print a job's log until it ends. Return False if standard output was closed before, as by `| head`.

    This replaces `client.tail_job_logs`, which does not use the proxy of Ray's other requests.

    Raises:
        OSError: there is no connection.
    """
    import aiohttp
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    url = f"{client.get_address()}/api/jobs/{job}/logs/tail"
    proxy = select_proxy(url, get_environ_proxies(url))
    proxy = prepend_scheme_if_needed(proxy, "http") if proxy else None
    try:
        async with aiohttp.ClientSession(headers=client._headers) as session:
            # Not `async with`: on exit it waits for the server, which keeps sending, to close the connection.
            # Without `heartbeat`: the head only sends on this connection, and so answers no ping.
            log_stream = await session.ws_connect(url, proxy=proxy)
            async for message in log_stream:
                if message.type is aiohttp.WSMsgType.TEXT and not _print(message.data):
                    return False
    except aiohttp.ClientError as error:
        raise OSError(str(error)) from error
    return True


def _print(text: str) -> bool:
    """Return False if standard output is closed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Discard the rest: otherwise Python flushes it at exit and prints another error.
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        return False
    return True


def _wait_for_end(client: "JobSubmissionClient", job: str, continues: str) -> Any:
    """Wait for the end of a job and return its details. Its log may end earlier: proxies may drop the connection."""
    details, waited = client.get_job_info(job), 0
    while not details.status.is_terminal():
        if waited == SECONDS_TO_END:
            log.warning("the log was cut off; waiting for the outcome: %s", continues)
        time.sleep(1)
        waited += 1
        details = client.get_job_info(job)
    return details
