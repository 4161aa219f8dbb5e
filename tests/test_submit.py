"""submit: a command runs as a job on a real head, whose log and outcome come back, and which asks for the token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import KUZUSHIJI
from test_project import ROOT

RAY = Path(sys.executable).with_name("ray")
SECONDS_TO_START = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Head:
    """A head on loopback, as `ray_cluster.yaml` starts it."""

    address: str
    ports: dict[str, int]  # of its gRPC services
    environment: dict[str, str]

    def kuzushiji(self, *arguments: str) -> list[str]:
        return [str(KUZUSHIJI), "submit", "--address", self.address, *arguments]

    def submit(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.kuzushiji(*arguments),
            env=self.environment | changed,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    token = home / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dashboard = free_port()
    ports = {service: free_port() for service in METHODS}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # The command of the job must be found, as in the image.
    environment["PATH"] = f"{KUZUSHIJI.parent}:{environment['PATH']}"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", f"--port={ports['gcs']}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={home / 'ray'}",
        "--object-store-memory=100000000", f"--ray-client-server-port={ports['client']}",
        f"--node-manager-port={ports['raylet']}", f"--object-manager-port={ports['objects']}",
        f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={ports['agent']}",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while answer(f"http://127.0.0.1:{dashboard}/api/version", token.read_text()) != 200:
            assert process.poll() is None, (home / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (home / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield Head(f"http://127.0.0.1:{dashboard}", ports, environment)
    finally:
        # At once: asked nicely, it takes half a minute.
        for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=60)


def answer(url: str, token: str | None) -> int | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_job_runs_and_its_log_and_outcome_come_back(head: Head, dataset: Path) -> None:
    done = head.submit("--", "verify", str(dataset))
    assert done.returncode == 0, done.stderr
    assert "files are right" in done.stdout
    assert "succeeded" in done.stderr


def test_a_failed_job_fails_here_with_its_exit_code(head: Head, tmp_path: Path) -> None:
    failed = head.submit("--json", "--", "verify", str(tmp_path))
    assert failed.returncode == 1
    assert "must hold manifest.json" in failed.stdout
    result = json.loads(failed.stdout.splitlines()[-1])
    assert result["exit_code"] == 1
    used_wrongly = head.submit("--", "train", "--dataset", "x", "--models", "y", "--architecture", "vgg")
    assert used_wrongly.returncode == 2


def test_what_is_used_wrongly_is_told_before_any_job(head: Head) -> None:
    done = head.submit("--", "prepare", "--pages", "x")
    assert (done.returncode, "Missing option" in done.stderr) == (2, True)
    assert head.submit("--", "pull", "--models", "x", "--to", "y").returncode == 2


def test_a_job_that_is_not_waited_for_can_be_followed_later(head: Head, dataset: Path) -> None:
    handed_in = head.submit("--no-wait", "--json", "--", "verify", str(dataset))
    assert handed_in.returncode == 0, handed_in.stderr
    job = json.loads(handed_in.stdout.splitlines()[-1])["job"]
    followed = head.submit("--attach", job)
    assert (followed.returncode, "files are right" in followed.stdout) == (0, True)
    unknown = head.submit("--attach", "nobody")
    assert unknown.returncode == 1
    assert "must be the id of a job" in unknown.stderr.splitlines()[-1]


def test_the_code_of_a_checkout_is_shipped_where_it_is_asked_for(head: Head, dataset: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for package in ("cluster", "preprocessing", "job"):
        (checkout / package).mkdir(parents=True)
        for file in (ROOT / package).glob("*.py"):
            (checkout / package / file.name).write_text(file.read_text())
    manifest = checkout / "cluster" / "manifest.py"
    manifest.write_text(manifest.read_text() + '\nprint("of the checkout")\n')
    done = head.submit("--working-dir", str(checkout), "--", "verify", str(dataset))
    assert done.returncode == 0, done.stderr
    assert "of the checkout" in done.stdout


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(head: Head, pages: Path, tmp_path: Path) -> None:
    source = ["--pages", str(pages / "train_images"), "--labels", str(pages / "train.csv")]
    job = ["--", "prepare", *source, "--dataset", str(tmp_path / "crops")]
    with subprocess.Popen(
        head.kuzushiji(*job), env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as here:
        assert here.stderr is not None
        while "was handed in" not in here.stderr.readline():
            assert here.poll() is None
        time.sleep(2)
        here.send_signal(signal.SIGINT)
        said = here.communicate(timeout=30)[1]
    assert here.returncode == 1
    (line,) = [line for line in said.splitlines() if "goes on. Follow it: kuzushiji submit --address" in line]
    assert "stop it: ray job stop --address" in line
    name = line.partition("--attach ")[2].partition(";")[0]
    followed = head.submit("--attach", name)
    assert followed.returncode == 0, followed.stdout
    assert (tmp_path / "crops" / "manifest.json").is_file()


def test_http_asks_for_the_token(head: Head) -> None:
    right = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        assert answer(head.address + path, None) == 401
        assert answer(head.address + path, "0" * 64) == 403
        assert answer(head.address + path, right) == 200


def test_a_wrong_token_or_none_is_one_line(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    done = head.submit("--", "verify", "x", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 1
    assert "must accept this machine's token" in done.stderr.splitlines()[-1]
    none = head.submit("--", "verify", "x", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE="disabled")
    assert none.returncode == 1
    assert "must accept this machine's token" in none.stderr.splitlines()[-1]


# A method of each service that a head offers to the network.
METHODS = {
    "gcs": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "objects": "/ray.rpc.ObjectManagerService/Pull",
    "agent": "/ray.rpc.ReporterService/HealthCheck",
    "client": "/ray.rpc.RayletDriver/ClusterInfo",
}


@pytest.mark.parametrize("service", METHODS)
def test_grpc_asks_for_the_token(head: Head, service: str) -> None:
    def ask(token: str | None) -> grpc.StatusCode:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        with grpc.insecure_channel(f"127.0.0.1:{head.ports[service]}") as channel:
            try:
                channel.unary_unary(METHODS[service])(b"", timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    assert ask(None) == grpc.StatusCode.UNAUTHENTICATED
    assert ask("0" * 64) == grpc.StatusCode.UNAUTHENTICATED
    assert ask(Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()) != grpc.StatusCode.UNAUTHENTICATED
