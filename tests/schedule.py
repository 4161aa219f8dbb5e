"""Which process runs which tests, in what order, and what is told of those that were skipped: hooks of pytest."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# The tests of a file stay in one process, for the fixtures of the file; so do those of files that must not run beside
# one another: they mount disks, or look at all mounts.
TOGETHER = dict.fromkeys(("test_fake_cloud", "test_storage_faults", "test_pull_and_verify"), "mounts")
# Those that take longest begin first. test_survival is not among the first three: it needs what test_train trains.
LONGEST = (
    "test_submit", "test_train", "test_architectures", "test_survival", "test_weights", "mounts", "test_bucket",
    "test_prepare_survives", "test_terminal", "test_predict", "test_report", "test_hostile", "test_command_line",
)  # fmt: skip


def group_of(file: str) -> str:
    name = Path(file).stem
    return TOGETHER.get(name, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = [*LONGEST, *sorted({group_of(item.path.name) for item in items} - set(LONGEST))]
    items.sort(key=lambda item: groups.index(group_of(item.path.name)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadgroup`, whose marks pytest-xdist 3.8 loses with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by the number of tests
    return Groups(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell in one line what was skipped, and how to have it."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(re.sub("^Skipped: ", "", report.longrepr[2]) for report in reports)
    if reasons:
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped: {len(reports)} tests: {told}")
