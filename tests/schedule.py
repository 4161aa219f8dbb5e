"""Pytest hooks: which process runs which tests, in what order, and the summary of skipped tests."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# The tests of a file stay in one process, because of its fixtures. So do those of files that must not run at the same
# time: they mount disks, or read all mounts.
TOGETHER = dict.fromkeys(("test_fake_cloud", "test_storage_faults", "test_pull_and_verify"), "mounts")
# The longest tests start first. test_survival is not among the first three, because it needs what test_train trains.
LONGEST = (
    "test_submit", "test_train", "test_architectures", "test_survival", "test_predict_survives", "test_resources",
    "test_weights", "mounts", "test_partitions", "test_bucket", "test_prepare_survives", "test_portable",
    "test_terminal", "test_predict", "test_report", "test_hostile", "test_command_line",
)  # fmt: skip


def group_of(file: str) -> str:
    name = Path(file).stem
    return TOGETHER.get(name, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = [*LONGEST, *sorted({group_of(item.path.name) for item in items} - set(LONGEST))]
    items.sort(key=lambda item: groups.index(group_of(item.path.name)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule like `--dist loadgroup`, whose marks pytest-xdist 3.8 loses with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # would order by the number of tests
    return Groups(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print in one line which tests were skipped, and what they need."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(re.sub("^Skipped: ", "", report.longrepr[2]) for report in reports)
    if reasons:
        counted = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped: {len(reports)} tests: {counted}")
