"""A short round of chaos.py, in which nothing differs, and a helper of it. `make chaos` runs the long rounds."""

import os
import subprocess
from pathlib import Path

import chaos
import psutil
import pytest


@pytest.mark.long
def test_a_few_kills_at_random_change_no_byte_of_a_dataset_and_leave_no_process(tmp_path: Path) -> None:
    found = chaos.run(tmp_path / "work", rounds=1, seed=48, kills=2, names=["prepare"])
    assert found.differences == []
    assert found.killed.total() == 2
    assert found.processes() == []
    assert not found.temporary.exists()


def test_an_ended_process_has_an_empty_title() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"begun\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"begun\n"  # just after its start, a process may have no title
        found = psutil.Process(process.pid)
        assert chaos.title(found) == "cat"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert chaos.title(found) == ""  # a zombie: ended, but not waited for
    assert chaos.title(found) == ""
