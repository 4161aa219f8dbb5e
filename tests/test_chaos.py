"""A short round of chaos (see chaos.py; the long one is `make chaos`): nothing differs."""

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


def test_a_process_that_ends_while_it_is_looked_at_has_no_title() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"begun\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"begun\n"  # as it begins, it has none for a moment
        found = psutil.Process(process.pid)
        assert chaos.title(found) == "cat"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert chaos.title(found) == ""  # ended, and not yet waited for
    assert chaos.title(found) == ""
