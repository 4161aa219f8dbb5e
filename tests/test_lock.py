"""Locks: one process at a time holds one, on a disk and elsewhere; that of a killed process is free again."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import GIVEN
from upath import UPath

from cluster import lock
from cluster.errors import KuzushijiError, OptionError
from cluster.lock import locked
from cluster.places import place
from cluster.pull import pull
from cluster.storage import is_file, read_bytes, remove_file, write_bytes
from job.config import TrainConfig
from job.data.staging import staged
from job.train.driver import _check_taken_over, train
from job.train.run import Run

HOLD = """
import sys, time
from threading import Event
from cluster.lock import locked
from cluster.places import place
with locked(place(sys.argv[1]), "it", Event()):
    print("held", flush=True)
    time.sleep(1e6)
"""


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> UPath:
    """Return the place of a lock that is no file of this machine, and shorten its times."""
    monkeypatch.setattr(lock, "SECONDS_UNTIL_LOST", 30)
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_RENEWALS", 0.05)
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_LOOKS", 0.02)
    return place(f"memory://{uuid.uuid4().hex}/it.lock")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_process_at_a_time_holds_a_lock_and_its_file_goes_with_it(
    elsewhere: bool, lease: UPath, tmp_path: Path
) -> None:
    at = lease if elsewhere else place(tmp_path / "runs" / "it.lock")
    for _ in range(2):
        with locked(at, "it", Event()):
            with (
                pytest.raises(OptionError, match="only one process at a time may work on it"),
                locked(at, "it", Event()),
            ):
                pass
            assert is_file(at)
        assert not is_file(at)


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lock files as NFS does (flock(2), "NFS details"): an exclusive lock needs a file that is open for writing, a
    shared lock one that is open for reading. Return the names of the locked files.
    """
    asked, flock = [], fcntl.flock

    def checked(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # folders are locked by the host's kernel
            asked.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            if access == (os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY):
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", checked)
    return asked


def test_what_is_locked_can_be_locked_on_nfs(nfs: list[str], few: Path, trained: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second round checks whether what the first one staged is in use
        with staged(place(few), ["test"]), staged(place(few), ["train", "test"]):
            pass
    with locked(place(tmp_path / "it.lock"), "it", Event()):
        pass
    assert pull(place(trained.parents[1]), place(tmp_path / "models"), ["baseline"])
    assert {"in-use", "lock", "it.lock", ".model.keras.part"} <= {*nfs}


def test_a_killed_process_releases_its_lock_on_a_disk_at_once(tmp_path: Path) -> None:
    at = place(tmp_path / "it.lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(at)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OptionError), locked(at, "it", Event()):
            pass
        holder.kill()
        holder.wait()
        with locked(at, "it", Event()):
            pass


def test_a_holder_whose_lock_was_removed_leaves_the_lock_of_another(tmp_path: Path) -> None:
    at = place(tmp_path / "locks" / "it.lock")
    with ExitStack() as others:
        with locked(at, "it", Event()):
            shutil.rmtree(tmp_path / "locks")
            others.enter_context(locked(at, "it", Event()))
        with pytest.raises(OptionError, match="a second one"), locked(at, "it", Event()):
            pass


def test_a_stale_lease_is_taken_over_with_a_log_line(
    lease: UPath, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS_UNTIL_LOST", 0.5)
    caplog.set_level("INFO", "kuzushiji")
    write_bytes(lease, b"of-a-killed-process 1\n")
    with locked(lease, "it", Event()):
        assert not read_bytes(lease).startswith(b"of-a-killed-process")
    assert "it may be in use: waiting up to 0.5 s to see whether its process is alive" in caplog.text


def test_a_process_whose_lease_was_taken_over_is_told_and_leaves_the_other_its_lease(lease: UPath) -> None:
    lost = Event()
    with locked(lease, "it", lost):
        for _ in range(300):  # again, if a renewal that had read the lease before overwrote it
            write_bytes(lease, b"of-another 1\n")
            if lost.wait(0.2):
                break
        assert lost.is_set()
    assert read_bytes(lease) == b"of-another 1\n"


def test_a_lease_that_was_removed_by_hand_is_written_again(lease: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Event()
    with locked(lease, "it", lost):
        remove_file(lease)
        until = time.monotonic() + 60
        while not is_file(lease) and time.monotonic() < until:
            time.sleep(0.05)
        assert is_file(lease)
        assert not lost.is_set()
        # After a minute without a renewal, another process may have held it, and released it.
        monkeypatch.setattr(lock, "SECONDS_UNTIL_LOST", 0.0)
        remove_file(lease)
        assert lost.wait(60)


def test_a_file_system_without_locks_is_one_line_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    says = pytest.raises(KuzushijiError, match=f"with locks .flock.. Received: {tmp_path}: Function not implemented")
    with says, locked(place(tmp_path / "lock"), "it", Event()):
        pass


def test_a_training_that_was_taken_over_ends_in_one_line(few: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(GIVEN)
    run = Run("first", config, place(few), "0" * 64, place(tmp_path))
    _check_taken_over([run])
    run.lost.set()
    with pytest.raises(KuzushijiError, match="--run first of baseline, which another process has taken over"):
        _check_taken_over([run])


def test_a_run_that_another_process_trains_is_refused_and_keeps_its_checkpoints(
    few: Path, ray_here: None, tmp_path: Path
) -> None:
    checkpoint = tmp_path / ".runs" / "baseline-twice" / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    refused = pytest.raises(OptionError, match="may work on --run twice of baseline")
    with locked(place(tmp_path / ".runs" / "baseline-twice.lock"), "it", Event()), refused:
        train(place(few), place(tmp_path), [TrainConfig.model_validate(GIVEN)], "twice")
    assert checkpoint.exists()
