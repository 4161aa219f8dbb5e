"""The fake cloud: each host acts as a machine, Google's rules hold, and nothing is left at the end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import title
from fake_cloud.answers import Refusal
from fake_cloud.cloud import FakeCloud
from fake_cloud.instance_rules import check_instance
from fake_cloud.machines import Instance

ZONE = "us-central1-a"
WHY_NOT = FakeCloud.cannot_run()
needs_hosts = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# Runs on the laptop: calls Google's client, waits for an operation, and prints the answer or the error's body.
CALL = """
import json, sys, time
from googleapiclient import discovery
from googleapiclient.errors import HttpError

compute = discovery.build("compute", "v1", cache_discovery=False)
method, arguments, where = sys.argv[1], json.loads(sys.argv[2]), {"project": "demo-project-1", "zone": "us-central1-a"}
try:
    answer = getattr(compute.instances(), method)(**where, **arguments).execute()
    while answer.get("status") == "RUNNING" and answer["kind"] == "compute#operation":
        time.sleep(0.2)
        answer = compute.zoneOperations().get(**where, operation=answer["name"]).execute()
    print(json.dumps(answer))
except HttpError as error:
    print(error.content.decode())
"""
# Runs on an instance: prints the status of the metadata server's answer and, if there is one, the page.
METADATA = """
import sys, urllib.error, urllib.request

address = "http://metadata.google.internal/computeMetadata/v1/" + sys.argv[1]
try:
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""
# Prints for each bucket the content of an object, the names of the objects, and the bucket's name, or the error's code.
BUCKETS = """
import sys
from google.api_core.exceptions import GoogleAPIError
from google.cloud import storage

client = storage.Client()
for bucket in map(client.bucket, sys.argv[1:]):
    for ask in (
        lambda: bucket.blob("page").download_as_bytes().decode(),
        lambda: [blob.name for blob in client.list_blobs(bucket)],
        lambda: client.get_bucket(bucket).name,
    ):
        try:
            print(bucket.name, ask())
        except GoogleAPIError as error:
            print(bucket.name, error.code)
"""
CONNECT = """
import socket, sys

for address in sys.argv[1:]:
    host, port = address.split(":")
    try:
        print(socket.create_connection((host, int(port)), 5).recv(7).decode())
    except OSError as error:
        print(error.strerror)
"""


DEBIAN = {"sourceImage": "projects/debian/global/images/family/12"}


def wanted(name: str = "good", **changes: Any) -> dict[str, Any]:
    """Return the body of a request for an instance."""
    disk = {"boot": True, "autoDelete": True, "initializeParams": DEBIAN}
    body = {
        "name": name,
        "machineType": f"zones/{ZONE}/machineTypes/n2-standard-4",
        "disks": [disk],
        "networkInterfaces": [{"network": "global/networks/default"}],
    }
    return {key: value for key, value in {**body, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeCloud]:
    with FakeCloud(buckets=["demo-bucket", "other-bucket"]) as cloud:
        cloud.bucket.write("demo-bucket", "page", b"hello")
        cloud.bucket.write("other-bucket", "page", b"hello")
        yield cloud


def call(cloud: FakeCloud, method: str, **arguments: Any) -> dict[str, Any]:
    """Call a method of Google's client on the laptop; return the answer."""
    return json.loads(cloud.laptop.run(["python", "-c", CALL, method, json.dumps(arguments)]).stdout)


def made(cloud: FakeCloud, name: str, **changes: Any) -> Instance:
    """Make an instance; return it once it runs."""
    assert "error" not in call(cloud, "insert", body=wanted(name, **changes))
    assert cloud.instance(name).status == "RUNNING"
    return cloud.instance(name)


@needs_hosts
def test_a_host_is_a_machine_of_its_own(cloud: FakeCloud) -> None:
    key = cloud.laptop.run(
        "mkdir -p .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519 && cat .ssh/*.pub"
    ).stdout
    metadata = {"items": [{"key": "ssh-keys", "value": f"ubuntu:{key}"}]}
    instance = made(cloud, "own", metadata=metadata)
    ssh = [
        "ssh",
        "-o",
        "StrictHostKeyChecking=no",
        f"ubuntu@{instance.ip}",
        "bash --login -c 'hostname; id -un; pwd; which python'",
    ]
    python = Path(sys.prefix) / "bin" / "python"
    assert cloud.laptop.run(ssh).stdout.splitlines() == ["own", "ubuntu", "/home/ubuntu", str(python)]
    assert instance.host is not None
    instance.host.write("/tmp/here", "only")  # noqa: S108
    assert instance.host.read("/tmp/here") == "only"  # noqa: S108
    assert cloud.laptop.run("cat /tmp/here", check=False).returncode == 1
    checkout = Path(__file__).parents[1]
    assert cloud.laptop.run(["touch", str(checkout / "new")], check=False).returncode == 1
    assert (
        cloud.laptop.run(["cat", str(checkout / "pyproject.toml")]).stdout == (checkout / "pyproject.toml").read_text()
    )


@needs_hosts
def test_hosts_reach_each_other_and_nothing_else(cloud: FakeCloud) -> None:
    instance = made(cloud, "near")
    outside = {address.address for cards in psutil.net_if_addrs().values() for address in cards if address.family == 2}
    there = [f"{address}:22" for address in outside - {"127.0.0.1"}] + ["192.0.2.1:80"]
    said = cloud.laptop.run(["python", "-c", CONNECT, f"{instance.ip}:22", *there]).stdout.splitlines()
    assert said[0] == "SSH-2.0"
    assert set(said[1:]) == {"No route to host"}
    assert cloud.laptop.run("getent hosts example.org", check=False).returncode == 2


def speaking_for(email: str) -> list[dict[str, Any]]:
    """Return the `serviceAccounts` of an instance with this account."""
    return [{"email": email, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}]


@needs_hosts
def test_only_an_instance_with_an_account_gets_tokens_and_they_open_only_its_buckets(cloud: FakeCloud) -> None:
    email = cloud.account("workers")
    cloud.add_account(email)
    cloud.grant(email, "demo-bucket")
    token = ["python", "-c", METADATA, "instance/service-accounts/default/token"]
    poor = made(cloud, "poor")
    assert poor.host is not None
    assert poor.host.run(token).stdout == "404\n"
    rich = made(cloud, "rich", serviceAccounts=speaking_for(email))
    assert rich.host is not None
    assert rich.host.run(token).stdout.startswith("200 {")
    read = rich.host.run(["python", "-c", BUCKETS, "demo-bucket", "other-bucket", "no-bucket"]).stdout
    refused = ["other-bucket 403"] * 3 + ["no-bucket 404"] * 3
    assert read.splitlines() == ["demo-bucket hello", "demo-bucket ['page']", "demo-bucket 403", *refused]
    read = cloud.laptop.run(["python", "-c", BUCKETS, "demo-bucket"]).stdout  # as the owner
    assert read.splitlines() == ["demo-bucket hello", "demo-bucket ['page']", "demo-bucket demo-bucket"]
    assert {one.account for one in cloud.requests if one.machine == "rich" and one.host.startswith("storage")} == {
        email
    }
    # The account has rights in a bucket, but none over instances.
    assert rich.host.run(["python", "-c", CALL, "list", "{}"]).stdout.startswith('{"error": {"code": 403')


@needs_hosts
def test_an_account_can_give_instances_only_accounts_it_may_use(cloud: FakeCloud) -> None:
    maker, used, other = (cloud.account(name) for name in ("maker", "used", "other"))
    cloud.add_account(maker, "roles/compute.instanceAdmin.v1")
    cloud.add_account(used)
    cloud.add_account(other)
    cloud.grant_use(maker, used)
    host = made(cloud, "maker", serviceAccounts=speaking_for(maker)).host
    assert host is not None

    def insert(email: str) -> str:
        body = json.dumps({"body": wanted("given", serviceAccounts=speaking_for(email))})
        return host.run(["python", "-c", CALL, "insert", body]).stdout

    assert '"SERVICE_ACCOUNT_ACCESS_DENIED"' in insert(other)
    assert "was not found" in insert(cloud.account("nobody"))
    assert '"error"' not in insert(used)


@needs_hosts
def test_a_bad_label_is_refused_in_googles_form(cloud: FakeCloud) -> None:
    error = call(cloud, "insert", body=wanted("one", labels={"kind": "Head"}))["error"]
    assert (error["code"], error["errors"][0]["reason"]) == (400, "invalid")
    assert "Label value 'Head' violates format constraints" in error["message"]
    made(cloud, "labelled")
    error = call(cloud, "setLabels", instance="labelled", body={"labels": {}, "labelFingerprint": "stale"})["error"]
    assert error["code"] == 412


@needs_hosts
def test_a_spot_machine_that_is_taken_back_knows_it_and_runs_its_script(cloud: FakeCloud) -> None:
    script = f"#!{sys.executable}\nimport sys\nsys.argv[1:] = ['instance/preempted']\n{METADATA}"
    instance = made(
        cloud,
        "spot",
        scheduling=[{"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}],
        metadata={"items": [{"key": "shutdown-script", "value": script}]},
    )
    cloud.preempt("spot")
    assert instance.shutdown_output == "200 TRUE\n"
    assert instance.host is None
    assert call(cloud, "get", instance="spot")["error"]["code"] == 404
    made(cloud, "lost")
    with pytest.raises(ValueError, match="lost is no spot machine"):
        cloud.preempt("lost")
    cloud.delete("lost")
    assert "lost" not in [one["name"] for one in call(cloud, "list")["items"]]


GPU = {"acceleratorType": f"projects/p/zones/{ZONE}/acceleratorTypes/nvidia-tesla-t4", "acceleratorCount": 1}
N1 = f"zones/{ZONE}/machineTypes/n1-standard-8"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "Head"}, "resource.name"),
        ({"machineType": "n2-standard-4"}, "resource.machineType"),
        ({"machineType": "zones/us-east1-b/machineTypes/n2-standard-4"}, "does not exist"),
        ({"disks": None}, "No disks"),
        ({"disks": [{"initializeParams": DEBIAN}]}, "Boot disk"),
        ({"disks": [{"boot": True, "initializeParams": {"sourceImage": "debian"}}]}, "sourceImage"),
        ({"disks": [{"boot": True, "initializeParams": {**DEBIAN, "diskSizeGb": 5}}]}, "diskSizeGb"),
        ({"networkInterfaces": None}, "network interface"),
        ({"networkInterfaces": [{"network": "default"}]}, "networkInterfaces.0."),
        ({"networkConfig": {}}, 'Unknown name "networkConfig"'),
        ({"labels": {"9": "a"}}, "Label key"),
        ({"tags": {"items": ["Ray"]}}, "resource.tags.items"),
        ({"scheduling": [{"provisioningModel": "CHEAP"}]}, "CHEAP"),
        ({"scheduling": {"provisioningModel": "SPOT", "automaticRestart": True}}, "automaticRestart"),
        ({"scheduling": {"provisioningModel": "SPOT", "onHostMaintenance": "MIGRATE"}}, "onHostMaintenance"),
        ({"scheduling": {"instanceTerminationAction": "DELETE"}}, "only for SPOT"),
        ({"guestAccelerators": [GPU], "machineType": N1}, "live migration"),
        ({"guestAccelerators": [GPU]}, "not compatible"),
        ({"guestAccelerators": [{**GPU, "acceleratorCount": 3}], "machineType": N1}, "number of GPUs"),
        ({"guestAccelerators": [{**GPU, "acceleratorType": "nvidia-tesla-t4"}], "machineType": N1}, "malformed"),
        ({"metadata": {"items": [{"key": "a.b", "value": "1"}]}}, "metadata.items.key"),
        ({"metadata": {"items": [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]}}, "Duplicate"),
    ],
)
def test_what_google_refuses_is_refused(changes: dict[str, Any], why: str) -> None:
    check_instance(wanted(guestAccelerators=[GPU], machineType=N1, scheduling={"onHostMaintenance": "TERMINATE"}), ZONE)
    with pytest.raises(Refusal, match=why):
        check_instance(wanted(**changes), ZONE)


RUN = """
import sys
from fake_cloud.cloud import FakeCloud

with FakeCloud() as cloud:
    cloud.laptop.run("setsid --fork sleep 1000 >/dev/null 2>&1")
    print("ready", flush=True)
    sys.stdin.read()
"""


@needs_hosts
@pytest.mark.parametrize("end", [None, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_however_it_ends(end: signal.Signals | None, tmp_path: Path) -> None:
    def world() -> tuple[str, str]:
        links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
        return Path("/proc/self/mountinfo").read_text(), links

    before = world()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=Path(__file__).parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("sshd" in title(one) for one in below)
        if end is not None:
            process.send_signal(end)
        process.communicate()
    assert psutil.wait_procs(below, timeout=300)[1] == []
    assert world() == before
    assert list(tmp_path.iterdir()) == []
