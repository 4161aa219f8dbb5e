"""A short round of chaos (see chaos.py; the long one is `make chaos`): nothing differs."""

from pathlib import Path

import chaos


def test_a_few_kills_at_random_change_no_byte_of_a_dataset_and_leave_no_process(tmp_path: Path) -> None:
    found = chaos.run(tmp_path / "work", rounds=1, seed=48, kills=2, names=["prepare"])
    assert found.differences == []
    assert found.killed.total() == 2
    assert found.processes() == []
    assert not found.temporary.exists()
