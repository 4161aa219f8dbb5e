"""The project itself: imports go one way, versions are pinned once, no file names a registry or this checkout."""

import ast
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import in_fresh_process

ROOT = Path(__file__).parents[1]
PACKAGES = {"cluster": set(), "preprocessing": {"cluster"}, "job": {"cluster", "preprocessing"}}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports_of(path)} & set(PACKAGES)
        assert ours <= PACKAGES[package] | {package}, path


IMPORT_ALL = """
import csv, importlib, json, logging, os, socket, sys, warnings

for name in list(os.environ):  # what other tests, or the user, have set already would hide that a module sets it
    if name.startswith(("GCSFS_", "KERAS_", "RAY_", "TF_")):
        del os.environ[name]
import cv2, keras, ray.data, ray.train, tensorflow  # what they set is theirs

def state():
    return {
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in sorted(logging.root.manager.loggerDict)},
        "threads": cv2.getNumThreads(),
        "others": [csv.field_size_limit(), socket.getdefaulttimeout(), os.getcwd()],
        "warnings": len(warnings.filters),
    }

for name in ("gcsfs", "google.cloud.storage", "googleapiclient.discovery", "matplotlib.figure", "requests", "upath"):
    importlib.import_module(name)
for name in sys.argv[1:]:  # so that what they import is not taken for what they do
    logging.getLogger(name)
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
after["levels"] = {name: after["levels"][name] for name in before["levels"]}
print(json.dumps([before, after]))
"""


def test_importing_a_module_changes_nothing_of_the_process(tmp_path: Path) -> None:
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sorted(paths)]
    before, after = json.loads(in_fresh_process(IMPORT_ALL, *names, cwd=tmp_path).splitlines()[-1])
    assert after == before


def test_keras_is_never_reached_through_tensorflow() -> None:
    for path in ROOT.glob("[cjpt]*/**/*.py"):
        assert not any(name.startswith("tensorflow.keras") for name in imports_of(path)), path
        assert not re.search(r"\btf\.keras\b", path.read_text().replace("never `tf.keras`", "")) or path == Path(
            __file__
        )


def test_architectures_import_keras_only() -> None:
    outside = {name.split(".")[0] for name in imports_of(ROOT / "job" / "model" / "architectures.py")}
    assert outside - {"collections", "functools", "typing"} == {"keras", "preprocessing"}  # for the size of a crop


def locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[.*\])?==(\S+)", (ROOT / name).read_text(), re.M))


def test_lock_files_hold_hashes_and_the_same_versions_and_no_address() -> None:
    run = locked("requirements.lock")
    for name in ("requirements-dev.lock", "requirements-gpu.lock"):
        assert run.items() <= locked(name).items()
    pinned = dict(re.findall(r'"(ray|tensorflow|keras)(?:\[.*\])?==([^"]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pinned == {name: run[name] for name in ("ray", "tensorflow", "keras")}
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-gpu.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--index" not in text
        packages = [part for part in re.split(r"\n(?=\S)", text) if re.match(r"\S+==", part)]
        assert len(packages) >= len(locked(name))  # some have a version for each Python
        assert all("--hash=sha256:" in package for package in packages)


def test_nothing_names_a_registry_or_the_place_where_it_was_made() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # The parent of the checkout; the checkout itself if many machines have such a parent.
    here = ROOT if ROOT.parent in (Path(tempfile.gettempdir()), Path.home(), Path("/")) else ROOT.parent
    hosts = "|".join([r"py" + r"pi\.org", "python" + r"hosted\.org", f"{here}/"])
    for name in tracked:
        if (ROOT / name).suffix not in (".png", ".jpg"):
            assert not re.search(hosts, (ROOT / name).read_text(encoding="utf-8")), name


def pythons(folder: Path, **codes: int) -> Path:
    """Make a folder of fake Pythons with these exit codes, like the shims of pyenv for versions it does not have."""
    folder.mkdir()
    for name, code in codes.items():
        (folder / f"python3.{name[1:]}").write_text(f'#!/bin/sh\necho $0 "$@"\nexit {code}\n')
        (folder / f"python3.{name[1:]}").chmod(0o755)
    return folder


def make_venv(tmp_path: Path, pythons: Path) -> "subprocess.CompletedProcess[str]":
    """Run `make` without a .venv. Nothing is installed."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    make = [str(shutil.which("make")), ".venv/.installed"]
    alone = {"PATH": str(pythons)}
    return subprocess.run(make, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("make"), reason="need make (apt install make)")
def test_make_takes_the_newest_python_that_runs_or_says_in_a_line_what_to_install(tmp_path: Path) -> None:
    some = make_venv(tmp_path, pythons(tmp_path / "some", v13=127, v12=0, v11=0))
    assert "python3.12 -m venv .venv" in some.stdout
    none = make_venv(tmp_path, pythons(tmp_path / "none", v13=127))
    assert none.returncode == 2
    said = [line for line in none.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith("Install Python 3.11, 3.12 or 3.13")
