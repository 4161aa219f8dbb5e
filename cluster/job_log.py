"""The log of a Ray job, printed while the job runs."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


async def print_log(client: "JobSubmissionClient", job: str) -> bool:
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
