"""The shipped cluster file, brought up by unmodified Ray in a cloud of one machine, from `ray up` to `ray down`.

`.ci/run` runs the tests marked `smoke`, `make test-cloud` all. The tests are in the order of a user's steps.
"""

import io
import json
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from conftest import SHARED, draw
from fake_cloud.cloud import FakeCloud
from fake_cloud.machines import Instance
from test_docs import commands
from test_project import ROOT

from cluster.manifest import Manifest

pytestmark = pytest.mark.cloud

BUCKET = "demo-bucket"
# Each page of the docs, with the bucket, the folders of scans and the label files that it names.
OF_DOCS = {
    "README.md": ("bucket", ["scans"], ["train.csv"]),
    "docs/google-cloud.md": ("my-bucket", ["scans/train_images", "new"], ["scans/train.csv", "boxes.csv"]),
}
BUCKETS = [BUCKET, *(bucket for bucket, _, _ in OF_DOCS.values())]
HERE = "/root/kuzushiji"
CLUSTER_FILE = f"{HERE}/ray_cluster.yaml"
BIN = Path(sys.executable).parent
PLACES = ["--dataset", f"gs://{BUCKET}/crops", "--models", f"gs://{BUCKET}/models"]
# Two workers, for which only machines of the GPU group have the CPUs: see `cluster_file`.
TRAIN = ["train", *PLACES, "--architecture", "baseline", "--workers", "2", "--cpus-per-worker", "2",
         "--global-batch-size", "64", "--learning-rate", "1e-3"]  # fmt: skip


def cluster_file(project: str) -> str:
    """Return the shipped file with this project, without Docker, which hosts here lack, and with smaller machines."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text().replace("<PROJECT>", project))
    types = config["available_node_types"]
    del config["docker"], types["gpu"]["docker"]
    for key in ("initialization_commands", "setup_commands"):
        config[key] = [command for command in config[key] if "docker" not in command]
    types["cpu"]["resources"], types["gpu"]["resources"] = {"CPU": 1}, {"CPU": 2}
    types["cpu"]["max_workers"] = 1
    (script,) = [item for item in types["gpu"]["node_config"]["metadata"]["items"] if item["key"] == "shutdown-script"]
    in_container = "docker exec --env RAY_AUTH_MODE=token kuzushiji ray"
    assert in_container in script["value"]
    on_host = f"runuser -u ubuntu -- env HOME=/home/ubuntu RAY_AUTH_MODE=token {BIN}/ray"
    script["value"] = script["value"].replace(in_container, on_host)
    return yaml.safe_dump(config, sort_keys=False)


@dataclass(frozen=True)
class Cluster:
    cloud: FakeCloud

    def laptop(self, *command: str, timeout: float = 600, check: bool = True) -> CompletedProcess[str]:
        return self.cloud.laptop.run(f"cd {HERE} && {shlex.join(command)}", timeout=timeout, check=check)

    def submit(self, *arguments: str, timeout: float = 900) -> CompletedProcess[str]:
        return self.laptop("kuzushiji", "submit", "--", *arguments, timeout=timeout)

    def of_type(self, name: str) -> list[Instance]:
        return [one for one in self.cloud.instances() if one.node_type == name and one.status == "RUNNING"]

    @property
    def head(self) -> Instance:
        (head,) = self.of_type("head")
        return head

    def read(self, name: str) -> bytes:
        content = self.cloud.bucket.read(BUCKET, name)
        assert content is not None, name
        return content

    def weights(self, run: str) -> bytes:
        """Return the weights of a model alone: the archive around them holds the time."""
        with zipfile.ZipFile(io.BytesIO(self.read(f"models/baseline/{run}/model.keras"))) as archive:
            return archive.read("model.weights.h5")


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeCloud]:
    """Yield a project as docs/google-cloud.md sets it up: buckets, and two accounts with their rights."""
    if why := FakeCloud.cannot_run():
        pytest.skip(why)
    with FakeCloud(buckets=BUCKETS) as running:
        head, worker = running.account("kuzushiji-head"), running.account("kuzushiji-worker")
        running.add_account(head, "roles/compute.instanceAdmin.v1")
        running.add_account(worker)
        running.grant_use(head, worker)
        for account in (head, worker):
            for bucket in BUCKETS:
                running.grant(account, bucket)
        yield running


@pytest.fixture(scope="module")
def scans(cloud: FakeCloud, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Upload a sample, and the three real pages if they are on this machine."""
    drawn = tmp_path_factory.mktemp("drawn") / "pages"
    draw(drawn, num_pages=6, seed=7)
    real = sorted((SHARED / "pages").glob("*.jpg"))
    for page in [*real, *(drawn / "train_images").iterdir()]:
        cloud.bucket.write(BUCKET, f"scans/train_images/{page.name}", page.read_bytes())
    labels = (drawn / "train.csv").read_text()
    if real:
        labels += (SHARED / "train.csv").read_text().partition("\n")[2]
    cloud.bucket.write(BUCKET, "scans/train.csv", labels.encode())


@pytest.fixture(scope="module")
def cluster(cloud: FakeCloud) -> Iterator[Cluster]:
    """Run `ray up`, and after the last test `ray down`, which must leave no machine."""
    up = Cluster(cloud)
    cloud.laptop.write(CLUSTER_FILE, cluster_file(cloud.project))
    up.laptop("sh", "-c", "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
    up.laptop("kuzushiji", "verify", "ray_cluster.yaml")
    up.laptop("ray", "up", "-y", "ray_cluster.yaml", timeout=300)
    yield up
    up.laptop("ray", "down", "-y", "ray_cluster.yaml", timeout=300)
    assert [one.name for one in cloud.instances()] == []


@pytest.fixture(scope="module")
def prepared(cluster: Cluster, scans: None) -> str:
    """Prepare the scans in a job; return what it printed."""
    done = cluster.submit(
        "prepare", "--pages", f"gs://{BUCKET}/scans/train_images", "--labels", f"gs://{BUCKET}/scans/train.csv",
        "--dataset", f"gs://{BUCKET}/crops", "--coverage", "0.6",
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def trained(cluster: Cluster, prepared: str) -> str:
    """Train undisturbed in a job; return what it printed."""
    return cluster.submit(*TRAIN, "--epochs", "2", "--run", "undisturbed").stdout


@pytest.mark.smoke
def test_a_cluster_begins_with_its_head_alone(cluster: Cluster) -> None:
    assert cluster.head.email == cluster.cloud.account("kuzushiji-head")
    assert {one.node_type for one in cluster.cloud.instances()} <= {"head"}


@pytest.mark.smoke
def test_a_worker_comes_for_prepare_and_the_dataset_is_on_the_bucket(cluster: Cluster, prepared: str) -> None:
    assert re.search(r"[\d,]+ crops in \d+ shards", prepared)
    assert "0 boxes lost" in prepared
    assert [one.email for one in cluster.of_type("cpu")] == [cluster.cloud.account("kuzushiji-worker")]
    manifest = Manifest.model_validate_json(cluster.read("crops/manifest.json"))
    assert {file.name for file in manifest.files} >= {"label.labels.txt", "dataset_info.json"}


@pytest.mark.smoke
def test_two_hosts_train_one_model(cluster: Cluster, trained: str) -> None:
    assert "model: gs://demo-bucket/models/baseline/undisturbed" in trained
    spot = cluster.of_type("gpu")
    assert len(spot) == 2  # each has room for one worker
    assert json.loads(cluster.read("models/baseline/latest.json"))["run"] == "undisturbed"
    history = cluster.read("models/baseline/undisturbed/history.jsonl").splitlines()
    assert [json.loads(row)["epoch"] for row in history] == [1, 2]


@pytest.mark.smoke
def test_reports_and_curves_are_next_to_their_dataset_or_model(cluster: Cluster, trained: str) -> None:
    for report in ("crops.report.html", "models/baseline/undisturbed.report.html"):
        assert cluster.read(report).startswith(b"<!DOCTYPE html>")
    curves = "models/tensorboard/baseline/undisturbed/events.out.tfevents."
    assert [name for name in cluster.cloud.bucket.names(BUCKET) if name.startswith(curves)] == [
        f"{curves}00001",
        f"{curves}00002",
    ]


@pytest.mark.smoke
def test_pull_brings_a_verified_model_to_the_laptop(cluster: Cluster, trained: str) -> None:
    pulled = cluster.laptop("kuzushiji", "pull", "--models", f"gs://{BUCKET}/models", "--to", "here").stdout
    assert "baseline/undisturbed" in pulled
    assert "files are valid" in cluster.laptop("kuzushiji", "verify", "here/baseline").stdout


CURL = "curl -s -o /dev/null -w '%{http_code}' --max-time 20"


@pytest.mark.smoke
def test_http_ports_answer_only_to_the_token_and_the_dashboard_only_on_the_head(cluster: Cluster) -> None:
    def ask(host: Any, url: str, token: str) -> str:
        header = f"-H 'Authorization: Bearer {token}'" if token else ""
        answered: str = host.run(f"{CURL} {header} {url}", check=False).stdout
        return answered

    head, right = cluster.head, cluster.cloud.laptop.read("/root/.ray/auth_token").strip()
    url = "http://127.0.0.1:8265/api/jobs/"
    assert [ask(head.host, url, token) for token in ("", "0" * 64, right)] == ["401", "403", "200"]
    assert ask(cluster.cloud.laptop, f"http://{head.ip}:8265/api/jobs/", right) == "000"  # nobody listens there
    # Ray's agent on each machine listens on the network.
    url = f"http://{head.ip}:52365/api/job_agent/jobs/none/logs"
    assert [ask(cluster.cloud.laptop, url, token) for token in ("", "0" * 64)] == ["401", "403"]
    assert ask(cluster.cloud.laptop, url, right) not in ("000", "401", "403")  # accepted; there is no such job


GRPC = """
import sys
import ray
print(len(ray._raylet.GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None)))
"""


@pytest.mark.smoke
def test_grpc_answers_only_to_the_token(cluster: Cluster) -> None:
    """This asks the GCS; `test_submit.py` asks each service."""

    def ask(**environment: str) -> CompletedProcess[str]:
        command = [f"{BIN}/python", "-c", GRPC, f"{cluster.head.ip}:6379"]
        return cluster.cloud.laptop.run(command, env=environment, timeout=120, check=False)

    assert ask(RAY_AUTH_MODE="token").returncode == 0
    assert "InvalidAuthToken" in ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64).stderr
    assert "InvalidAuthToken" in ask(RAY_AUTH_MODE="disabled").stderr


@pytest.mark.smoke
def test_the_token_can_be_read_by_its_owner_alone_on_every_machine(cluster: Cluster, trained: str) -> None:
    for one in [cluster.head, *cluster.of_type("gpu")]:  # not the idle one of `prepare`, which may end meanwhile
        seen = one.host.run("stat -c '%a %U' /home/ubuntu/.ray/auth_token", check=False).stdout.strip()
        assert seen == "600 ubuntu", one.name
    assert cluster.laptop("stat", "-c", "%a", "/root/.ray/auth_token").stdout.strip() == "600"


@pytest.mark.smoke
def test_a_worker_that_is_set_up_once_more_stays_in_the_cluster(cluster: Cluster, trained: str) -> None:
    """The autoscaler does this if its cache says that the worker is not ready. A `ray stop` would cost a machine."""
    worker = cluster.of_type("gpu")[0]
    commands = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["worker_start_ray_commands"]
    raylet = "pgrep -x raylet"
    before = worker.host.run(raylet).stdout
    for command in commands:
        worker.host.run(f"runuser -u ubuntu -- env RAY_HEAD_IP={cluster.head.ip} bash -c {shlex.quote(command)}")
    assert worker.host.run(raylet).stdout == before != ""


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    """Call `what` until it returns something true, for at most `seconds`; return that."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(1)
    return found


def test_each_host_downloads_only_its_partition(cluster: Cluster, trained: str) -> None:
    before = len(cluster.cloud.requests)
    done = cluster.submit(*TRAIN, "--partitions", "2", "--epochs", "1", "--run", "parts")
    assert "model: gs://demo-bucket/models/baseline/parts" in done.stdout
    size_of = {shard["name"]: shard["bytes"] for shard in json.loads(cluster.read("crops/manifest.json"))["shards"]}
    fetched: dict[str, set[str]] = {}
    for asked in cluster.cloud.requests[before:]:
        if found := re.search(r"crops%2F(kuzushiji-[^?/]+)\?.*alt=media", asked.path):
            fetched.setdefault(asked.machine, set()).add(found[1])
    first, second = fetched.values()
    assert first | second == size_of.keys()
    assert not first & second
    shares = [sum(size_of[name] for name in names) / sum(size_of.values()) for names in (first, second)]
    assert max(shares) < 0.6


def test_losing_a_host_does_not_change_the_model(cluster: Cluster, trained: str) -> None:
    command = shlex.join(["kuzushiji", "submit", "--", *TRAIN, "--epochs", "2", "--run", "disturbed"])
    with cluster.cloud.laptop.popen(f"cd {HERE} && {command}", stderr=subprocess.STDOUT) as job:
        assert job.stdout is not None
        while "epoch 1 of 2" not in job.stdout.readline():
            assert job.poll() is None
        saved = "models/.runs/baseline-disturbed/checkpoint_manager_snapshot.json"
        wait_for(lambda: saved in cluster.cloud.bucket.names(BUCKET), 120)
        cluster.cloud.delete(cluster.of_type("gpu")[0].name)
        out = job.communicate(timeout=900)[0]
    assert job.returncode == 0, out[-3000:]
    assert "resuming after epoch" in out
    assert cluster.weights("disturbed") == cluster.weights("undisturbed")
    assert "files are valid" in cluster.laptop("kuzushiji", "verify", f"gs://{BUCKET}/models/baseline/disturbed").stdout


NODES = """
import ray
ray.init(log_to_driver=False)
for node in ray.nodes():
    print(node["NodeManagerAddress"], node["Alive"], node["DeathReasonMessage"])
"""


def test_a_spot_machine_that_is_taken_back_drains_its_node_first(cluster: Cluster, trained: str) -> None:
    def seen() -> str:
        environment = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "auto"}
        said: str = cluster.head.host.run([f"{BIN}/python", "-c", NODES], user="ubuntu", env=environment).stdout
        return said

    def joined() -> list[Instance]:
        """Return the machines whose node has joined Ray: a machine runs before that."""
        nodes = seen()
        return [one for one in cluster.of_type("gpu") if f"{one.ip} True" in nodes]

    spot = wait_for(joined, 300)[0]
    cluster.cloud.preempt(spot.name)
    assert f"{spot.ip} False Google takes the spot machine back" in seen(), spot.shutdown_output


@pytest.mark.parametrize("page", OF_DOCS)
def test_the_commands_of_the_docs_run_on_the_cluster(cluster: Cluster, pages: Path, page: str) -> None:
    """With two workers instead of those of the docs, without GPUs, for one epoch."""
    bucket, folders, labels = OF_DOCS[page]
    for scan in (pages / "train_images").iterdir():
        for folder in folders:
            cluster.cloud.bucket.write(bucket, f"{folder}/{scan.name}", scan.read_bytes())
    for name in labels:
        cluster.cloud.bucket.write(bucket, name, (pages / "train.csv").read_bytes())
    machines = r"--workers \d --gpus-per-worker 1 --cpus-per-worker 8"
    ran = 0
    for command in commands((ROOT / page).read_text()):
        if "gs://" in command or "ray_cluster.yaml" in command:
            command = command.replace("gs://$BUCKET", f"gs://{bucket}").replace("--to here", f"--to {bucket}")
            command = re.sub(machines, "--workers 2 --cpus-per-worker 2 --epochs 1", command)
            cluster.laptop(*shlex.split(command), timeout=1200)
            ran += 1
    assert ran >= 4
    assert "files are valid" in cluster.laptop("kuzushiji", "verify", f"{bucket}/resnet").stdout
