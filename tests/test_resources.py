"""A command ends in one line if the GPUs, CPUs or hosts that it requests, or its Ray, are missing."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KUZUSHIJI, Kuzushiji, until_ray_starts

from cluster.errors import KuzushijiError, OptionError
from cluster.ray_address import check_address
from cluster.runtime import cause_of, usable_cpus
from job.config import TrainConfig
from job.train.driver import _log_unused_gpus

pytestmark = pytest.mark.usefixtures("ray_here")

# Runs commands, one after the other, on a Ray that claims a GPU where there is none, as with the image for CPUs or a
# driver that does not fit. Prints their exit codes.
CLAIMS_A_GPU = """
import json, sys
import ray
from cluster.runtime import START_TIMED_OUT, _set_environment
_set_environment()
try:
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
except Exception as error:
    sys.exit(START_TIMED_OUT if "timed out" in str(error) else str(error))
from job.cli import main
codes = []
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as done:
        codes.append(done.code)
print(codes)
"""


@pytest.fixture
def no_gpu(ray_here: None) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("need a machine without a GPU")


def of_train(dataset: Path, models: Path, *options: object) -> list[str]:
    places = ["--dataset", dataset, "--models", models, "--architecture", "baseline"]
    return ["train", *map(str, [*places, *options])]


def of_predict(model: Path, pages: Path, out: Path, *options: object) -> list[str]:
    places = ["--model", model, "--pages", pages / "train_images", "--boxes", pages / "train.csv", "--out", out]
    return ["predict", *map(str, [*places, *options])]


@pytest.mark.usefixtures("no_gpu")
def test_gpus_that_a_local_ray_does_not_have_are_refused_at_once(
    trained: Path, few: Path, pages: Path, kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")  # no cluster
    gpus = ["--workers", 2, "--cpus-per-worker", 1, "--gpus-per-worker", 1]
    for command, asked in (
        (of_predict(trained, pages, tmp_path / "out", "--gpus", 1), "1 process with 1 CPU"),
        (of_train(few, tmp_path, *gpus), "2 processes with 1 CPU"),
    ):  # fmt: skip
        refused = kuzushiji(*command)
        assert refused.code == 2
        assert re.search(
            f"{asked} and 1 GPU each; there is room for 0 on 1 host with [0-9]+ CPUs and 0 GPUs in all", refused.stderr
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".predict"]  # usable without --gpus


@pytest.mark.usefixtures("no_gpu")
def test_gpus_that_tensorflow_does_not_see_end_the_command_in_a_line_that_says_why(
    trained: Path, few: Path, pages: Path, tmp_path: Path
) -> None:
    commands = [
        of_train(few, tmp_path, "--gpus-per-worker", 1, "--cpus-per-worker", 1),
        of_predict(trained, pages, tmp_path / "out", "--gpus", 1),
    ]
    script = [sys.executable, "-c", CLAIMS_A_GPU, json.dumps(commands)]
    done = until_ray_starts(lambda: subprocess.run(script, capture_output=True, text=True, check=False))
    assert done.stdout.splitlines()[-1] == "[1, 1]", done.stderr
    of_command = [line for line in done.stderr.splitlines() if line.startswith("kuzushiji: ")]
    why = r"TensorFlow must see the GPUs of --gpus-per-worker. Received: 0 of 1 on .*: .*[Cc]uda.* Install requirements"
    assert re.search(why, of_command[0])
    assert "--gpus must be GPUs that TensorFlow can use. Received: none on" in of_command[1]
    assert "workers restart" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "baseline").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".predict"]


def test_tasks_that_wait_for_hosts_in_use_are_logged_and_end_at_the_start_limit(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from cluster import capacity, tasks
    from cluster.capacity import Request

    caplog.set_level("INFO", "kuzushiji")
    monkeypatch.setattr(tasks, "uses_cluster", lambda: True)
    monkeypatch.setattr(capacity, "SECONDS_BETWEEN_WAITS", 1.0)
    all_cpus = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    try:
        assert all_cpus.wait(60)
        with pytest.raises(KuzushijiError, match=r"must start within 2 s .--start-limit.. Received: 1 process with"):
            tasks._wait_for_room(Request(1), 2.0)
    finally:
        ray.util.remove_placement_group(all_cpus)
    assert re.search("waiting for [0-9]+ s: 1 process with 1 CPU each requested", caplog.text)


def test_the_task_that_waits_for_the_first_host_is_not_cancelled_once_it_has_ended(
    ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would end this process if the cancellation arrived just as the task ends."""
    import ray

    from cluster import tasks
    from cluster.capacity import Request

    monkeypatch.setattr(tasks, "uses_cluster", lambda: True)
    monkeypatch.setattr(ray, "cancel", lambda _: pytest.fail("it has ended"))
    tasks._wait_for_room(Request(1), 600.0)


def test_more_cpus_than_a_local_ray_can_have_are_refused_at_once(
    few: Path, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    refused = kuzushiji(*of_train(few, tmp_path, "--workers", 1, "--cpus-per-worker", cpus + 1))
    assert refused.code == 2
    assert f"Received: 1 process with {cpus + 1} CPUs each; there is room for 0" in refused.stderr
    command = [str(KUZUSHIJI), *of_train(few, tmp_path, "--workers", 5, "--cpus-per-worker", 1000)]  # a Ray of its own
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 2
    assert re.search("must have at most [0-9]+ CPUs, 8 times its own. Received: 5000", alone.stderr.splitlines()[-1])


# Runs commands, one after the other, on a cluster whose head does no work: first without an autoscaler, then with one
# that adds no hosts, which a host with a type simulates. Prints their exit codes.
CLUSTER_WITHOUT_ROOM = """
import json, os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
os.environ["RAY_ADDRESS"] = cluster.address
try:
    from cluster import capacity
    from job.cli import main
    capacity.SECONDS_BETWEEN_WAITS = 1.0
    codes = []
    refused, limited = json.loads(sys.argv[1])
    for command in [*refused, None, *limited]:
        if not command:
            cluster.add_node(num_cpus=0, env_vars={"RAY_NODE_TYPE_NAME": "small"})
            continue
        try:
            main(command)
        except SystemExit as done:
            codes.append(done.code)
    print(codes)
finally:
    cluster.shutdown()
"""


def test_a_cluster_without_room_refuses_at_once_or_with_an_autoscaler_at_the_start_limit(
    few: Path, pages: Path, tmp_path: Path
) -> None:
    of_prepare = ["prepare", "--pages", str(pages / "train_images"), "--labels", str(pages / "train.csv")]
    of_prepare += ["--dataset", str(tmp_path / "crops")]
    workers = of_train(few, tmp_path, "--workers", 2, "--cpus-per-worker", 8)
    limit = ["--start-limit", "3"]
    both = ["--architecture", "fcn"]
    commands = [of_prepare, [*workers, *both]], [[*of_prepare, *limit], [*workers, *limit, *both]]
    script = [sys.executable, "-uc", CLUSTER_WITHOUT_ROOM, json.dumps(commands)]
    done = until_ray_starts(lambda: subprocess.run(script, capture_output=True, text=True, check=False))
    assert done.stdout.endswith("[2, 2, 1, 1]\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kuzushiji: ")]
    tasks, two = "1 process with 1 CPU each", "2 processes with 8 CPUs each"
    for line, request in zip(lines[:2], (tasks, two), strict=True):
        assert (
            f"Received: {request}; there is room for 0 on 1 host with 0 CPUs and 0 GPUs in all, and no autoscaler"
            in line
        )
    there = "requested; the hosts have room for 0 in total, 0 now; pending hosts: none"
    ended = "the processes must start within 3 s (--start-limit). Received: "
    assert lines[2].startswith(f"kuzushiji: {ended}{tasks} {there}")
    for architecture in ("baseline", "fcn"):  # both wait at the same time: an autoscaler may add hosts for both
        assert f"{architecture}: failed: {ended}{two} {there}" in done.stderr
        assert f"{architecture}: starting 2 workers" in done.stderr
    for request in (tasks, two):
        assert re.search(f"waiting for [0-9]+ s: {request} {there}", done.stderr)


# Runs the command in each environment, in one process that has no Ray yet, and prints the exit codes.
IN_EACH = """
import json, os, sys
from job.cli import main
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    try:
        main(sys.argv[2:])
    except SystemExit as done:
        print(done.code)
"""


def test_an_unreachable_ray_is_one_line_that_names_the_fix(few: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing listens there
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        (tmp_path / "file").touch()
        (tmp_path / ("long" * 20)).mkdir()
        says = {
            r"a Ray cluster must answer at RAY_ADDRESS. Received: .*refused.*unset it": {"RAY_ADDRESS": nobody},
            r"RAY_ADDRESS must be HOST:PORT .*Received: http://127.*`kuzushiji submit": {"RAY_ADDRESS": f"http://{nobody}"},
            "short path.* Received: .*AF_UNIX.* Set RAY_TMPDIR": {
                "RAY_ADDRESS": "", "TMPDIR": str(tmp_path / ("long" * 20)),
            },
            "able to write in it.* Received: .*Not a directory.* Set RAY_TMPDIR": {"TMPDIR": str(tmp_path / "file")},
        }  # fmt: skip
        command = [sys.executable, "-c", IN_EACH, json.dumps(list(says.values())), *of_train(few, tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    of_command = [line for line in done.stderr.splitlines() if line.startswith("kuzushiji: ")]
    assert done.stdout.split() == ["1", "2", "1", "1"], done.stderr
    for text, line in zip(says, of_command, strict=True):
        assert re.search(text, line)


def test_a_silent_server_is_not_accepted_as_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_address.SECONDS_FOR_ANSWER", 0.5)
    with socket.create_server(("", 0)) as silent, pytest.raises(KuzushijiError, match="cluster must answer.*Deadline"):
        check_address(f"127.0.0.1:{silent.getsockname()[1]}")
    for address in ("ray://127.0.0.1:10001", "127.0.0.1", ":6379", "host:abc"):
        with pytest.raises(OptionError, match=f"must be HOST:PORT.* Received: {address}"):
            check_address(address)


def test_cpus_are_those_that_this_process_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("cluster.runtime.CGROUP_QUOTA", quota)
    here = len(os.sched_getaffinity(0))
    for content, usable in (
        (None, here),
        ("max 100000\n", here),
        ("150000 100000\n", 1),
        (f"{here + 1}00000 100000\n", here),
    ):
        if content:
            quota.write_text(content)
        assert usable_cpus() == usable
    limited = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c"]
    printed = subprocess.check_output([*limited, "from cluster.runtime import usable_cpus; print(usable_cpus())"])
    assert printed == b"1\n"


def test_gpus_that_a_training_does_not_use_are_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    for gpus in (1, 0):
        assert not caplog.messages
        given = {"epochs": 1, "global_batch_size": 4, "learning_rate": 1e-4, "gpus_per_worker": gpus}
        _log_unused_gpus(TrainConfig(architecture="baseline", **given))
    assert caplog.messages == ["Ray has 4 GPUs, and --gpus-per-worker is 0: training runs on CPUs"]


def test_the_cause_is_not_that_of_an_aborted_worker() -> None:
    from ray.train import WorkerGroupError

    aborted = RuntimeError("Collective ops is aborted by: the peer is gone")
    cause = cause_of(WorkerGroupError("two failed", {0: aborted, 1: OSError("no space")}))
    assert (type(cause), str(cause)) == (OSError, "no space")
