"""The cluster file: the shipped one is safe and pinned; `verify` refuses what fails late, costs money, or is open."""

import re
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_project import ROOT, locked

from cluster.cluster_file import faults_of_cluster_file
from cluster.errors import InputError

SHIPPED = ROOT / "ray_cluster.yaml"
Config = dict[str, Any]


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a token's path in a new home, as `ray get-auth-token --generate` and `chmod 600` leave it."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    path = home / ".ray" / "auth_token"
    path.write_text("0" * 64)
    path.chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    return path


@pytest.fixture
def config() -> Config:
    """Return the shipped file with its project filled in."""
    filled: Config = yaml.safe_load(SHIPPED.read_text().replace("<PROJECT>", "demo-project-1"))
    return filled


def faults(config: Config, tmp_path: Path) -> list[str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return faults_of_cluster_file(path)


def test_the_shipped_file_can_go_up_once_its_project_is_filled_in(config: Config, tmp_path: Path) -> None:
    assert faults(config, tmp_path) == []


def test_every_placeholder_is_named_before_anything_else_but_the_token(token: Path) -> None:
    found = faults_of_cluster_file(SHIPPED)
    assert len(found) == str(yaml.safe_load(SHIPPED.read_text())).count("<PROJECT>") == 10
    assert all("replace <PROJECT>" in fault for fault in found)
    token.unlink()
    *placeholders, of_token = faults_of_cluster_file(SHIPPED)
    assert placeholders == found
    assert "auth_token must exist" in of_token


def test_a_wrong_zone_and_a_wrong_version_are_one_fault_each(config: Config, tmp_path: Path) -> None:
    config["provider"]["availability_zone"] = "europe-west4-b"
    config["setup_commands"] = ["pip show tensorflow keras", "true ray==2.59.0", *config["setup_commands"]]
    zone, ray = faults(config, tmp_path)
    assert "provider.availability_zone: must be a zone" in zone
    assert ray.startswith("setup_commands.1: ray must be")


def workers(config: Config) -> list[Config]:
    return [node["node_config"] for name, node in config["available_node_types"].items() if name != "head"]


def change(path: str, value: Any) -> Callable[[Config], None]:
    def apply(config: Config) -> None:
        *parents, last = path.split("/")
        for key in parents:
            config = config[key]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return apply


GPU = "available_node_types/gpu/node_config"
HEAD = "available_node_types/head/node_config"
START = "ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"
BROAD = "123-compute@developer.gserviceaccount.com"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (change("provider/project_id", "My Project"), "provider.project_id: must be the id of an existing"),
        (change("provider/project_id", None), "provider.project_id: must be the id of an existing"),
        (change("provider/project_id", "other-project-1"), "must be the project of an account or a resource"),
        (change(f"{GPU}/serviceAccounts", None), "gpu.node_config.serviceAccounts: must name an account"),
        (change(f"{GPU}/serviceAccounts", [{"email": BROAD}]), "must be a separate account"),
        (change(f"{HEAD}/serviceAccounts", [{"email": "ray-autoscaler-sa-v1@x.iam"}]), "must be a separate account"),
        (change(f"{GPU}/scheduling", {"provisioningModel": "SPOT"}), "onHostMaintenance: must be TERMINATE"),
        (change(f"{GPU}/guestAccelerators", None), ""),  # g2 machines have GPUs without it
        (change(f"{GPU}/machineType", None), "gpu.node_config.machineType: must be set"),
        (change(f"{GPU}/tags", None), "gpu.node_config.tags.items: must hold the tag"),
        (change("setup_commands", ["pip install ray==2.59.0"]), "as on this machine. Received: 2.59.0"),
        (change("setup_commands", []), "one must check that keras is"),
        (change("docker/image", "rayproject/ray:2.9.0"), "docker.image: ray must be"),
        (change("head_start_ray_commands", [START]), "must set RAY_AUTH_MODE=token"),
        (
            change("head_start_ray_commands", [f"RAY_AUTH_MODE=token {START} --dashboard-host=0.0.0.0"]),
            "--dashboard-host must be 127.0.0.1",
        ),
        (change("head_start_ray_commands", [f'RAY_AUTH_MODE="token" {START} --dashboard-host="127.0.0.1"']), ""),
        (change("head_start_ray_commands", [f"export RAY_AUTH_MODE='token'; {START}"]), ""),
        (change("head_start_ray_commands", None), "--dashboard-host must be 127.0.0.1"),  # then Ray's default is used
        (change("worker_start_ray_commands", ["ray start --address=$HEAD:6379"]), "must set RAY_AUTH_MODE=token"),
        (change("head_setup_commands", None), "head_setup_commands: must be set"),
        (change("head_start_ray_commands", [f"RAY_AUTH_MODE=token ray stop; {START}"]), "must set RAY_AUTH_MODE=token"),
        (change("head_start_ray_commands", [f"echo RAY_AUTH_MODE=token; {START}"]), "must set RAY_AUTH_MODE=token"),
        (change("provider/region", "europe-west4"), "must be in europe-west4, as provider.region"),
        (change("provider/region", "europe-west4"), "provider.availability_zone: must be a zone of provider.region"),
        (change("provider/cache_stopped_nodes", True), "provider.cache_stopped_nodes: must be false"),
        (change("provider/availability_zone", "us-central1-b"), "must be in us-central1-b, as provider.availab"),
        (change(f"{GPU}/scheduling", "x"), "must be a mapping or a list. Received: 'x'"),
        (change(f"{GPU}/scheduling", [1]), "onHostMaintenance: must be TERMINATE"),
        (change(f"{GPU}/tags", [1]), "tags: must be a mapping"),
        (change(f"{GPU}/tags", {"items": 3}), "tags.items: must hold the tag"),
        (change(f"{GPU}/serviceAccounts", 3), "serviceAccounts: must be a list"),
        (change("head_start_ray_commands", ["true"]), "head_start_ray_commands: one must run `ray start`"),
        (change("file_mounts", {}), "file_mounts: must copy the token"),
        (change("file_mounts", {"~/.ray/auth_token": "~/nowhere"}), "no such file. Run `ray get-auth-token --generate"),
    ],
)  # fmt: skip
def test_an_unsafe_or_costly_setting_is_refused_in_one_line(
    config: Config, tmp_path: Path, broken: Callable[[Config], None], says: str
) -> None:
    broken(config)
    found = faults(config, tmp_path)
    assert [fault for fault in found if says and says in fault] or (not says and not found)
    assert all("\n" not in fault for fault in found)


def test_a_gpu_on_another_machine_type_needs_the_rule_too(config: Config, tmp_path: Path) -> None:
    config["available_node_types"]["gpu"]["node_config"] |= {"machineType": "n1-standard-8", "scheduling": {}}
    assert any("onHostMaintenance" in fault for fault in faults(config, tmp_path))
    rules = [{"preemptible": True}, {"onHostMaintenance": "terminate"}]  # a list, as in Ray's examples
    config["available_node_types"]["gpu"]["node_config"]["scheduling"] = rules
    assert faults(config, tmp_path) == []


def test_a_relative_path_of_the_token_is_of_the_current_folder_as_for_ray(
    config: Config, tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["file_mounts"] = {"~/.ray/auth_token": "auth_token"}
    (tmp_path / "elsewhere").mkdir()
    assert any("auth_token must exist" in fault for fault in faults(config, tmp_path / "elsewhere"))
    monkeypatch.chdir(token.parent)
    assert faults(config, tmp_path / "elsewhere") == []


def test_a_token_that_others_can_read_is_refused(config: Config, tmp_path: Path, token: Path) -> None:
    token.chmod(0o644)
    assert any("must be readable by its owner only" in fault and "0644" in fault for fault in faults(config, tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "must be YAML"),
        ("- 1", "without `provider`"),
        ("provider: {type: aws}", "provider.type must be gcp"),
        ("provider: {type: gcp}\nmax_wokers: 3", "max_wokers"),
        ("provider: &p {type: gcp, own: *p}", "must be a cluster file of Ray"),
        ("!!python/object/apply:os.system ['true']", "must be YAML"),
    ],
)
def test_what_is_no_cluster_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as failure:
        faults_of_cluster_file(path)
    assert says in str(failure.value)
    assert "\n" not in str(failure.value)


def test_the_shipped_file_pins_the_versions_of_the_lock_files() -> None:
    pinned = dict(re.findall(r"\b(ray|tensorflow|keras)='([\d.]+)'", SHIPPED.read_text()))
    assert pinned == {name: locked("requirements.lock")[name] for name in ("ray", "tensorflow", "keras")}
    assert pinned == {name: locked("requirements-gpu.lock")[name] for name in pinned}


def test_the_head_does_no_work_and_workers_start_from_none_under_a_ceiling(config: Config) -> None:
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    for name in ("cpu", "gpu"):
        assert types[name]["min_workers"] == 0
        assert 0 < types[name]["max_workers"] <= config["max_workers"]
    assert "GPU" not in types["cpu"]["resources"]
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_spot_machines_end_for_good_and_drain_their_node_first(config: Config) -> None:
    machine = config["available_node_types"]["gpu"]["node_config"]
    assert machine["scheduling"]["provisioningModel"] == "SPOT"
    assert machine["scheduling"]["instanceTerminationAction"] == "DELETE"
    (script,) = [item["value"] for item in machine["metadata"]["items"] if item["key"] == "shutdown-script"]
    assert "instance/preempted" in script
    assert "ray drain-node" in script


def test_no_worker_has_an_address_in_the_internet_nor_the_heads_account(config: Config) -> None:
    head = config["available_node_types"]["head"]["node_config"]
    for machine in workers(config):
        assert not any("accessConfigs" in interface for interface in machine["networkInterfaces"])
        assert machine["serviceAccounts"] != head["serviceAccounts"]


@pytest.fixture(scope="module")
def commands() -> list[str]:
    """Echo the commands of the first block under "Once" in docs/google-cloud.md, with its variables filled in."""
    section = (ROOT / "docs" / "google-cloud.md").read_text().partition("## Once")[2]
    block = section.split("```")[1].replace("my-project", "demo-project-1")
    tell = "".join(f'{tool}() {{ echo {tool} "$@"; }}\n' for tool in ("gcloud", "docker", "ray", "sed", "chmod"))
    script = f"set -euo pipefail\n{tell}{block}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


def option(command: str, name: str) -> str:
    (value,) = re.findall(rf"--{name}[= ](\S+)", command)
    return str(value)


def test_the_commands_of_the_docs_make_what_the_file_names(commands: list[str], config: Config) -> None:
    types = config["available_node_types"]
    pushed = {command.split()[-1] for command in commands if command.startswith("docker push")}
    assert pushed == {config["docker"]["image"], types["gpu"]["docker"]["worker_image"]}
    assert config["docker"]["image"].endswith(f":{version('kuzushiji')}")
    made = {command.split()[-1] for command in commands if "service-accounts create" in command}
    used = {account["email"] for node in types.values() for account in node["node_config"]["serviceAccounts"]}
    assert {f"{name}@demo-project-1.iam.gserviceaccount.com" for name in made} == used
    (subnet,) = [command for command in commands if "subnets create" in command]
    path = f"projects/demo-project-1/regions/{option(subnet, 'region')}/subnetworks/{subnet.split()[5]}"
    assert {i["subnetwork"] for node in types.values() for i in node["node_config"]["networkInterfaces"]} == {path}
    assert config["provider"]["region"] == option(subnet, "region")


def test_the_commands_of_the_docs_give_the_least_rights(commands: list[str]) -> None:
    roles = [
        (command.split()[1], option(command, "member"), option(command, "role"))
        for command in commands
        if "--role" in command
    ]
    head, worker = (
        f"serviceAccount:kuzushiji-{name}@demo-project-1.iam.gserviceaccount.com" for name in ("head", "worker")
    )
    of_both = [("storage", "roles/storage.objectUser"), ("artifacts", "roles/artifactregistry.reader")]
    of_head = [("projects", "roles/compute.instanceAdmin.v1"), ("iam", "roles/iam.serviceAccountUser")]
    assert sorted(roles) == sorted(
        [(on, account, role) for on, role in of_both for account in (head, worker)]
        + [(on, head, role) for on, role in of_head]
    )


def test_the_firewall_of_the_docs_admits_only_the_tag_of_the_machines(commands: list[str], config: Config) -> None:
    rules = [command for command in commands if "firewall-rules create" in command]
    machines = [node["node_config"] for node in config["available_node_types"].values()]
    tags = {tag for machine in machines for tag in machine["tags"]["items"]}
    inside, ssh = rules
    for rule in rules:
        assert {option(rule, "target-tags")} == tags
    assert {option(inside, "source-tags")} == tags
    assert "--source-ranges" not in inside
    assert option(ssh, "allow") == "tcp:22"
    assert option(ssh, "source-ranges").endswith("/32")
