"""The command line: its options are pinned, its help loads nothing heavy, an error is one line and exit code 1 or 2."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import psutil
import pytest
from chaos import title
from click.testing import CliRunner
from conftest import KUZUSHIJI, KUZUSHIJI_WITH_SMALL_HEAD, Kuzushiji, until_ray_starts

from cluster.errors import KuzushijiError
from cluster.progress import log
from cluster.runtime import ray_session
from job.cli import main

SURFACE = {
    "sample": {"--out", "--num-pages", "--seed", "--scale", "--layouts", "--fonts"},
    "prepare": {
        "--pages", "--labels", "--canvases", "--crops", "--dataset", "--split", "--seed", "--val-fraction",
        "--test-fraction", "--coverage", "--classes", "--shards", "--max-bad-fraction", "--start-limit", "--books",
        "--train-only", "--folds", "--fold", "--rescale", "--margin", "--license",
    },
    "train": {
        "--dataset", "--models", "--architecture", "--workers", "--gpus-per-worker", "--cpus-per-worker", "--epochs",
        "--global-batch-size", "--learning-rate", "--seed", "--patience", "--run", "--weights", "--unfreeze",
        "--precision", "--sampling", "--checkpoint-every", "--max-failures", "--step-limit", "--partitions",
        "--deterministic", "--start-limit", "--schedule", "--augment", "--weight-decay", "--label-smoothing",
    },
    "evaluate": {"--model", "--dataset", "--split", "--out"},
    "predict": {
        "--model", "--pages", "--boxes", "--canvases", "--out", "--format", "--annotate", "--gpus", "--start-limit",
        "--rescale", "--min-confidence",
    },
    "export": {"--model", "--format", "--quantize", "--out", "--dataset", "--split"},
    "report": {"--dataset", "--models", "--out"},
    "pull": {"--models", "--to", "names"},
    "verify": {"folder"},
    "submit": {"--cluster", "--address", "--insecure", "--working-dir", "--no-wait", "--attach", "arguments"},
}  # fmt: skip


def test_the_set_of_commands_and_options_is_unchanged() -> None:
    surface = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in main.commands.items()
    }
    assert surface == {name: options | {"--json", "--debug"} for name, options in SURFACE.items()}


def test_defaults_are_those_of_the_study() -> None:
    defaults = {parameter.name: parameter.default for parameter in main.commands["prepare"].params}
    assert (defaults["split"], defaults["seed"], defaults["coverage"]) == ("random", 42, 0.9)
    assert (defaults["val_fraction"], defaults["test_fraction"]) == (0.15, 0.15)


LIGHT = """
import sys
from job.cli import main
for command in sys.argv[1:]:
    main([*command.split(), "--help"], standalone_mode=False)
    heavy = {"tensorflow", "keras", "ray", "pandas", "numpy", "fsspec"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


@pytest.mark.parametrize("encoding", ["latin-1", "euc_jp"])
def test_characters_that_the_encoding_of_standard_output_lacks_are_printed_as_escapes(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    shown = subprocess.run([KUZUSHIJI, "predict", "--help"], capture_output=True, env=environment, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert (b"\\u3013" in shown.stdout) == (encoding != "euc_jp")  # the sign for `rare`
    command = [KUZUSHIJI, "verify", "/dé/\U0001b001", "--json"]
    refused = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert "/dé/\U0001b001" in json.loads(refused.stdout)["error"]


def test_help_loads_neither_tensorflow_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, "", *SURFACE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == 1 + len(SURFACE)


@pytest.mark.parametrize("command", ["", *SURFACE])
def test_help_fits_a_screen(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    wide = CliRunner().invoke(main, arguments, terminal_width=110).output
    assert len(wide.splitlines()) <= (35 if command == "train" else 30)  # `train` has 29 options


@pytest.mark.parametrize("command", SURFACE)
def test_every_option_has_a_line_of_help(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


SECONDS_TO_END = 300
XCEPTION = ["train", "--dataset", "x", "--models", "y", "--architecture", "xception"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prepare"], 2, "Missing option '--dataset'"),
        (["prepare", "--split", "half"], 2, "--split"),
        (["prepare", "--dataset", "z", "--pages", "x"], 2, "--pages and --labels, or --crops, must be given"),
        (["prepare", "--dataset", "z", "--pages", "x", "--labels", "y", "--crops", "x"], 2, "or --crops, must be"),
        (["prepare", "--pages", "foo://x", "--labels", "y", "--dataset", "z"], 2, "a place must be a path or an"),
        (["verify", "gs://b/x//y"], 2, "an address must not have //, /./, /../ or :: in its path"),
        (["verify", "gs://b/./y"], 2, "an address must not have //"),
        (["verify", "gs://b/crops::v2"], 2, "an address must not have //"),
        (["verify", "crops\r"], 2, "a place must not have control characters. Received: 'crops\\r'"),
        (["verify", "gs:/b/crops"], 2, "an address must have two slashes after its protocol"),
        (["verify", "~/crops"], 2, "a place must not begin with ~"),
        (["pull", "--models", "x", "--to", "y", "../x"], 2, "the name of a model must be"),
        (["train", "--dataset", "x", "--models", "y", "--architecture", "vgg"], 2, "must be one of resnet, baseline"),
        (["train", "--dataset", "x", "--models", "y", "--architecture", "baseline", "--workers", "0"], 2, "--workers"),
        (["train", "--dataset", "x", "--models", "y", "--architecture", "baseline"], 1, "must hold manifest.json"),
        ([*XCEPTION, "--weights", "z.h5"], 1, "does not exist"),
        ([*XCEPTION, "--weights", "z"], 2, "ends in .h5"),
        ([*XCEPTION, "--weights", "none", "--unfreeze", "last"], 2, "--unfreeze last must come with weights"),
        (["prepare", "--pages", "x", "--labels", "y", "--dataset", "z"], 1, "--labels must be a file"),
        (["prepare", "--pages", "x", "--labels", "y", "--dataset", "z", "--val-fraction", "2"], 2, "--val-fraction"),
        (["evaluate", "--model", "x", "--dataset", "y"], 1, "must hold manifest.json"),
        (["pull", "--models", "x", "--to", "y"], 1, "--models must hold"),
        (["verify", "x"], 1, "Received: {here}/x, which is missing, empty or a file"),
        (["sample", "--out", "x", "--num-pages", "0"], 2, "--num-pages must be at least 1"),
        (["sample", "--out", "gs://demo/y", "--num-pages", "1"], 2, "--out must be a path on this machine"),
        (["prepare", "--crops", "x", "--canvases", "y", "--dataset", "z"], 2, "--canvases must be given with --labels"),
        (["prepare", "--crops", "x", "--margin", ".1", "--dataset", "z"], 2, "--margin must be given with --labels"),
        (["prepare", "--pages", "x", "--labels", "y", "--dataset", "x/z"], 2, "must be a folder outside of --pages"),
        (["verify", "gs://"], 2, "must be gs://BUCKET/"),
        (["verify", "gs://Bad_Name/x"], 2, "must be gs://BUCKET/"),
        (["verify", "s3://bucket/x"], 2, "Install s3fs"),
        (["pull", "--models", "x", "--to", "gs://demo/y"], 2, "--to must be a path on this machine"),
        (["train", "--dataset", "x", "--models", "y", "--architecture", "resnet", "--run", ""], 2, "--run must have a"),
        (["evaluate", "--model", "x", "--dataset", "y", "--out", ""], 2, "--out must have a value. Received: an empty"),
        (["predict", "--model", "x", "--pages", "y", "--boxes", "", "--out", "z"], 2, "--boxes must have a value"),
        (["submit", "--address", "http://192.0.2.1:8265", "--attach", "x"], 2, "--address must be https://, or on"),
        (["submit", "--address", "http://127.example.com:1", "--attach", "x"], 2, "--address must be https://, or"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_the_rule_and_the_received_value(
    arguments: list[str], code: int, says: str, kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = kuzushiji(*arguments)
    assert done.code == code
    says = says.replace("{here}", str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert says in line
    for more in (["--json"], ["--json", "--debug"]):
        with_json = kuzushiji(*arguments, *more)
        assert with_json.code == code
        assert says in json.loads(with_json.stdout.splitlines()[-1])["error"]
        assert says in with_json.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_whole_chain_of_causes(kuzushiji: Kuzushiji, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff")
    arguments = ["prepare", "--pages", tmp_path, "--labels", tmp_path / "labels.csv", "--dataset", "out"]
    assert len(kuzushiji(*arguments).stderr.splitlines()) == 1
    shown = kuzushiji(*arguments, "--debug")
    assert shown.code == 1
    assert "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff" in shown.stderr
    assert "The above exception was the direct cause of the following exception" in shown.stderr


def test_debug_hides_the_ids_of_upload_sessions(
    kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        error = OSError("PUT https://x/upload?upload_id=ABC123&x=1: 503")
        log.debug("traceback:", exc_info=error)
        raise error

    monkeypatch.setattr("cluster.models.resolve_model", fails)
    shown = kuzushiji("verify", tmp_path, "--debug")
    assert shown.stderr.count("upload_id=...&x=1") == 3  # the log line, the traceback and the last line
    assert "ABC123" not in shown.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["verify", "x"], 1), (["prepare"], 2)])
def test_the_console_script_ends_with_the_code_and_the_line(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run([KUZUSHIJI, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)


def fields_in_the_docs(command: str) -> set[str]:
    """Return the names in a command's row of the table of `--json` in docs/cli.md."""
    (row,) = re.findall(
        rf"^\| `{command}` \| (.*) \|$", (Path(__file__).parents[1] / "docs" / "cli.md").read_text(), re.M
    )
    return set(re.findall("`([a-z_]+)`", row))


def test_a_user_walks_from_pages_to_a_checked_dataset(
    ray_here: None, kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = kuzushiji("sample", "--out", "pages", "--num-pages", "3", "--scale", "0.15", "--json")
    assert json.loads(drawn.stdout).keys() == fields_in_the_docs("sample")
    source = ["--pages", "pages/train_images", "--labels", "pages/train.csv", "--dataset", "crops"]
    done = kuzushiji("prepare", *source, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == fields_in_the_docs("prepare")
    assert result["written"] is True
    assert sum(result["crops"].values()) > 300
    assert "nothing written" in kuzushiji("prepare", *source).stdout
    checked = kuzushiji("verify", "crops", "--json")
    assert (checked.code, json.loads(checked.stdout)["faults"]) == (0, [])
    assert json.loads(checked.stdout).keys() == fields_in_the_docs("verify")
    shard = sorted((tmp_path / "crops").glob("*train.tfrecord*"))[0]
    shard.write_bytes(b"")
    checked = kuzushiji("verify", "crops")
    assert checked.code == 1
    assert re.search(rf"^{shard.name} has 0 bytes instead of \d+$", checked.stdout, re.M)


def test_prepare_loads_no_tensorflow_and_no_process_of_ray_is_left_when_it_ends(pages: Path, tmp_path: Path) -> None:
    seen: dict[int, psutil.Process] = {}
    source = ["--pages", str(pages / "train_images"), "--labels", str(pages / "train.csv"), "--dataset", "crops"]

    def run() -> "subprocess.CompletedProcess[str]":
        command = [*KUZUSHIJI_WITH_SMALL_HEAD, "prepare", *source]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as job:
            process = psutil.Process(job.pid)
            while job.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    seen.update((one.pid, one) for one in process.children(recursive=True))
                time.sleep(0.2)
            assert job.stderr
            return subprocess.CompletedProcess([], job.returncode, "", job.stderr.read())

    done = until_ray_starts(run)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "TensorFlow was loaded here: False"  # loading it takes 5 s and 600 MB
    assert len(seen) > 2  # Ray's GCS, raylet and workers
    deadline = time.monotonic() + SECONDS_TO_END  # until Ray's agents notice that their raylet is gone
    while (left := [one for one in seen.values() if one.is_running() and title(one)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


WAITING = """
import time
from cluster.runtime import ray_session
from job.command import command, main

@command
def wait():
    with ray_session():
        print("ready", flush=True)
        time.sleep(600)

main(["wait"])
"""


def test_sigterm_stops_a_command_as_ctrl_c_does(ray_address: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_ADDRESS": ray_address},  # Ray sets its handler of SIGTERM also when it connects
    ) as waiting:
        assert waiting.stdout
        assert waiting.stderr
        assert waiting.stdout.readline() == "ready\n"
        waiting.terminate()
        said = waiting.stderr.read()
    assert (waiting.returncode, said.splitlines()[-1]) == (1, "kuzushiji: stopped")
    assert "SIGTERM" not in said


def test_a_slow_start_of_ray_is_one_line_that_says_to_run_again(
    ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import node

    of_ray = "The current node timed out during startup."
    assert of_ray in inspect.getsource(node)  # its limit of 30 s is a constant there

    def init(**options: object) -> None:
        raise Exception(of_ray)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(
            KuzushijiError,
            match=r"^Ray must start within 30 s.*Run the same command again; .*docs/faq.md and Ray's logs",
        ),
        ray_session(),
    ):
        raise AssertionError("it did not start")
