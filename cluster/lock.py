"""A lock that one process at a time can hold, also across machines.

On this machine's file systems it is a file lock, which is released when its process ends. Elsewhere it is a lease: a
small file that the holder rewrites every 10 seconds. A lease that has not changed for a minute is taken over.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from upath import UPath

from cluster.errors import OptionError, one_line
from cluster.local import is_at
from cluster.local import lock as lock_file
from cluster.places import is_local
from cluster.storage import change_bytes, read_bytes, remove_file, writing_in

log = logging.getLogger("kuzushiji")

SECONDS_UNTIL_LOST = 60.0
SECONDS_BETWEEN_RENEWALS = 10.0
SECONDS_BETWEEN_LOOKS = 2.0


@contextmanager
def locked(path: UPath, what: str, lost: threading.Event) -> Iterator[None]:
    """Hold the lock at `path` while the block runs. Its file is removed afterwards, unless the process is killed.

    Args:
        path: file of the lock.
        what: what the lock protects, for messages, such as `--run first`.
        lost: set when another process has taken over the lease, for example after a laptop slept; the block must then
            end soon.

    Raises:
        OptionError: another process holds the lock.
        KuzushijiError: the file can't be written.
    """
    with _file_lock(Path(path.path), what) if is_local(path) else _lease(path, what, lost):
        yield


def _refused(what: str) -> OptionError:
    return OptionError(
        f"only one process at a time may work on {what}. Received: a second one. Wait for the first one to end, or use "
        "another name"
    )


@contextmanager
def _file_lock(path: Path, what: str) -> Iterator[None]:
    with writing_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _locked_descriptor(path, what)) is None:
            pass
    try:
        yield
    finally:
        try:
            if is_at(descriptor, path):  # otherwise it was removed, and another process may hold a new one
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _locked_descriptor(path: Path, what: str) -> int | None:
    """Return the descriptor of the locked file, or None if its last holder removed it in the meantime."""
    # Open for writing: NFS grants an exclusive lock only on such a descriptor.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_file(descriptor, path.parent)
        if is_at(descriptor, path):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise _refused(what) from error
    except (OSError, OptionError):
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def _lease(path: UPath, what: str, lost: threading.Event) -> Iterator[None]:
    holder = secrets.token_hex(8)
    _take(path, holder, what)
    done = threading.Event()
    renewals = threading.Thread(target=_renew, args=(path, holder, what, done, lost), daemon=True)
    renewals.start()
    try:
        yield
    finally:
        done.set()
        renewals.join()
        try:
            if _is_of(_read(path), holder):
                remove_file(path)
        except Exception as error:  # each file system raises its own types; the work is done
            log.warning("%s could not be removed, and expires in %g s: %s", path, SECONDS_UNTIL_LOST, one_line(error))


def _take(path: UPath, holder: str, what: str) -> None:
    """Write the lease, once there is none or the existing one has not changed for a minute."""
    seen, quiet = _read(path), 0.0
    if seen:
        log.info("%s may be in use: waiting up to %g s to see whether its process is alive", what, SECONDS_UNTIL_LOST)
    # Count only the seconds slept: while the storage does not answer, the holder can't renew its lease either.
    while (now := _read(path)) and now == seen and quiet < SECONDS_UNTIL_LOST:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        quiet += SECONDS_BETWEEN_LOOKS
    if now not in (None, seen) or not _change(path, lambda there: there == now, holder):
        raise _refused(what)


def _renew(path: UPath, holder: str, what: str, done: threading.Event, lost: threading.Event) -> None:
    renewed = _clock()
    while not done.wait(SECONDS_BETWEEN_RENEWALS):
        now = _clock()
        # If it is gone, it was removed by hand. Or it was taken over, and released, while this process could not renew
        # it for a minute.
        until = renewed + SECONDS_UNTIL_LOST
        try:
            if _change(path, partial(_is_own, holder, until), holder):
                renewed = now
                continue
        except Exception as error:  # each file system raises its own types: try again at the next renewal
            log.warning("%s: its lease could not be renewed: %s", what, one_line(error))
            continue
        lost.set()
        return


def _clock() -> float:
    """Return seconds, with those of a suspended laptop."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _change(path: UPath, may_replace: Callable[[bytes | None], bool], holder: str) -> bool:
    """Replace the lease with a new one, in one step. Return False if `may_replace` is False for what is there."""
    new = f"{holder} {time.time()}\n".encode()
    taken = False

    def unless_changed(there: bytes | None) -> bytes | None:
        nonlocal taken
        taken = there == new or may_replace(there)  # `new`: the response to a first attempt was lost
        return new if taken else None

    change_bytes(path, unless_changed)
    return taken


def _is_of(lease: bytes | None, holder: str) -> bool:
    return lease is not None and lease.startswith(f"{holder} ".encode())


def _is_own(holder: str, until: float, lease: bytes | None) -> bool:
    """Return whether a lease is that of `holder`, or there is none before `until`, a time of `_clock`."""
    return _is_of(lease, holder) or (lease is None and _clock() < until)


def _read(path: UPath) -> bytes | None:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None
