"""submit: a command runs as a job on a real head that requires the token; its log and exit code come back."""

import asyncio
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import aiohttp
import grpc
import psutil
import pytest
from aiohttp import web
from conftest import KUZUSHIJI, TRIES_TO_START_RAY, Kuzushiji, one_at_a_time
from test_project import ROOT

from cluster import head as heads
from cluster import submit
from cluster.errors import KuzushijiError
from cluster.ray_address import check_address

RAY = Path(sys.executable).with_name("ray")
SECONDS_AT_MOST = 600  # on a busy machine


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

    @contextmanager
    def popen(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        with subprocess.Popen(
            self.kuzushiji(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as here:
            try:
                yield here
            except BaseException:
                here.kill()  # otherwise the block waits for its job
                raise

    def submit(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.kuzushiji(*arguments),
            env=self.environment | changed,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_AT_MOST,
        )


@pytest.fixture(scope="module")
def head(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ExitStack() as stack:
        with one_at_a_time(tmp_path_factory, "ray"):  # Ray's limit of 30 s is short while others start
            for tries in range(TRIES_TO_START_RAY):
                try:
                    head = stack.enter_context(started_head(tmp_path_factory))
                    break
                except OverdueError:
                    if tries + 1 == TRIES_TO_START_RAY:
                        raise
        yield head


class OverdueError(Exception):
    """Ray exited while it started."""


@contextmanager
def started_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    short = tempfile.mkdtemp(prefix="kh-")  # for Ray's sockets, whose paths must be short
    token = home / "auth_token"
    token.write_text(os.environ["RAY_AUTH_TOKEN"])  # that of the tests' Ray: a process has one token
    token.chmod(0o600)
    dashboard = free_port()
    ports = {service: free_port() for service in METHODS}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # The job finds its command in PATH, as in the image.
    environment["PATH"] = f"{KUZUSHIJI.parent}:{environment['PATH']}"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_enable_metrics_collection"] = "0"
    environment |= {"HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", f"--port={ports['gcs']}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={short}",
        "--object-store-memory=100000000", f"--ray-client-server-port={ports['client']}",
        f"--node-manager-port={ports['raylet']}", f"--object-manager-port={ports['objects']}",
        f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={ports['agent']}",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    below: set[psutil.Process] = set()
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS_AT_MOST
        # Once the head accepts a job, all its services run.
        while answer(f"http://127.0.0.1:{dashboard}/api/jobs/", token.read_text(), b'{"entrypoint": "true"}') != 200:
            if process.poll() is not None:
                raise OverdueError((home / "log").read_text()[-2000:])
            below |= below_it(process.pid)
            assert time.monotonic() < deadline, (home / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield Head(f"http://127.0.0.1:{dashboard}", ports, environment)
    finally:
        # SIGKILL: after SIGTERM, Ray takes half a minute to end.
        for one in [process, *(below | below_it(process.pid))]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=SECONDS_AT_MOST)
        shutil.rmtree(short, ignore_errors=True)


def below_it(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def answer(url: str, token: str | None, body: bytes | None = None) -> int | None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, headers | {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


# Exits with code 7 once the file exists that its last argument names.
JOB = """
import pathlib, sys, time

def main():
    print("begun", flush=True)
    while not pathlib.Path(sys.argv[-1]).exists():
        print("at work", flush=True)
        time.sleep(0.1)
    return 7
"""


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a job that runs until a file exists, but for the last one, the path of the file."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "job").mkdir()
    (checkout / "job" / "__init__.py").touch()
    (checkout / "job" / "cli.py").write_text(JOB)
    return ["--working-dir", str(checkout), "--", "verify"]


@pytest.fixture(scope="module")
def going_on(head: Head, waiting: list[str]) -> str:
    """Start a job that runs until its head ends. Return its id."""
    submitted = head.submit("--no-wait", "--json", *waiting, "/nowhere")
    assert submitted.returncode == 0, submitted.stderr
    job: str = json.loads(submitted.stdout.splitlines()[-1])["job"]
    return job


def is_running(head: Head, job: str) -> bool:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.address}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return bool(json.load(response)["status"] == "RUNNING")


# Forwards a port to the head, as `ray dashboard` does with ssh for a cluster of `ray up` (see `test_cloud.py`).
RAY_DASHBOARD = """#!{python}
import asyncio, os, sys

async def pour(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def lead(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", {port})
    await asyncio.gather(pour(reader, there[1]), pour(there[0], writer))

async def main():
    server = await asyncio.start_server(lead, "127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
    await server.serve_forever()

with open({pid!r}, "w") as file:
    file.write(str(os.getpid()))
asyncio.run(main())
"""
# `submit` looks for `ray` next to the interpreter. The tests may run under nohup or the like, which ignores SIGHUP.
KUZUSHIJI_BESIDE = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.executable = {python!r}
from job.cli import main
main()
"""


@dataclass(frozen=True)
class Cluster(Head):
    """The head, reached through a cluster file."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "ray_cluster.yaml"

    @property
    def tunnel(self) -> Path:
        """Return the path of the file with the process id of the tunnel, written when the tunnel starts."""
        return self.folder / "pid"

    def kuzushiji(self, *arguments: str) -> list[str]:
        script = KUZUSHIJI_BESIDE.format(python=str(self.folder / "python"))
        return [sys.executable, "-c", script, "submit", "--cluster", str(self.file), *arguments]


@pytest.fixture
def cluster(head: Head, tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "a cluster"
    folder.mkdir()
    environment = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_MODE"}
    cluster = Cluster(head.address, head.ports, environment, folder)
    text = (ROOT / "ray_cluster.yaml").read_text().replace("<PROJECT>", "a-project")
    token = head.environment["RAY_AUTH_TOKEN_PATH"]
    cluster.file.write_text(text.replace('token": "~/.ray/auth_token"', f'token": "{token}"'))
    port = head.address.rpartition(":")[2]
    (folder / "ray").write_text(RAY_DASHBOARD.format(python=sys.executable, port=port, pid=str(cluster.tunnel)))
    (folder / "ray").chmod(0o755)
    yield cluster
    with suppress(FileNotFoundError, psutil.NoSuchProcess):  # the tunnel has ended, unless a test failed
        left = psutil.Process(int(cluster.tunnel.read_text()))
        if str(folder / "ray") in left.cmdline():
            left.kill()


PassOn = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def behind(head: Head, answer: Callable[[web.Request, PassOn], Awaitable[web.StreamResponse]]) -> Iterator[Head]:
    """Yield the head behind a proxy that may answer in its place."""

    async def pass_on(request: web.Request) -> web.StreamResponse:
        what = {"headers": request.headers, "data": await request.read()}
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, head.address + request.path_qs, **what) as there,
        ):
            return web.Response(status=there.status, body=await there.read(), content_type=there.content_type)

    async def start() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(lambda request: answer(request, pass_on)), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield dataclasses.replace(head, address=f"http://127.0.0.1:{runner.addresses[0][1]}")
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait_for(text: str, stream: IO[str] | None) -> None:
    assert stream is not None
    while text not in (line := stream.readline()):
        assert line, "it ended"


def job_of(line: str) -> str:
    """Return the id of the job from a line that says how to follow it."""
    return line.partition("--attach ")[2].partition(";")[0]


def test_a_failed_job_fails_here_with_its_exit_code(head: Head, kuzushiji: Kuzushiji, tmp_path: Path) -> None:
    submit = ["submit", "--address", head.address]
    failed = kuzushiji(*submit, "--json", "--", "verify", tmp_path)
    assert failed.code == 1
    assert "must hold manifest.json" in failed.stdout
    result = json.loads(failed.stdout.splitlines()[-1])
    assert result["exit_code"] == 1
    wrong = ["train", "--dataset", "x", "--models", "y", "--architecture", "vgg"]
    assert kuzushiji(*submit, "--", *wrong).code == 2


def test_usage_errors_are_reported_before_a_job_starts(head: Head, kuzushiji: Kuzushiji) -> None:
    says = {
        "Missing option": ["--", "prepare", "--pages", "x"],
        "a job must be one of": ["--", "pull", "--models", "x", "--to", "y"],
        "Options of the job come after --": ["prepare", "--pages", "/x"],
        "Received: --models models": [
            "--", "train", "--dataset", "/x", "--models", "models", "--architecture", "resnet",
        ],
        "Received: --dataset file://x": [
            "--", "train", "--dataset", "file://x", "--models", "/m", "--architecture", "resnet",
        ],
        "Received: --weights base.h5": [
            "--", "train", "--dataset", "/x", "--models", "/m", "--architecture", "xception", "--weights", "base.h5",
        ],
        "--attach must be letters": ["--attach", "../x"],
        "--working-dir must be an existing folder": ["--working-dir", "/nowhere", "--", "verify", "/x"],
        "--working-dir must be given with a command": ["--working-dir", ".", "--attach", "job"],
    }  # fmt: skip
    for text, arguments in says.items():
        done = kuzushiji("submit", "--address", head.address, *arguments)
        assert done.code == 2
        assert text in done.stderr
    for path in ("/x", "file:///x", "local:///x", "file:///x/y://z"):
        elsewhere = kuzushiji("submit", "--", "verify", path)
        assert (elsewhere.code, "each place of a job must be an address" in elsewhere.stderr) == (2, True)


def test_a_job_that_is_not_waited_for_can_be_followed_later(head: Head, kuzushiji: Kuzushiji, dataset: Path) -> None:
    submit = ["submit", "--address", head.address]
    handed_in = kuzushiji(*submit, "--no-wait", "--", "verify", dataset)
    assert handed_in.code == 0, handed_in.stderr
    (hint,) = handed_in.stdout.splitlines()
    job = hint.split()[-1]
    assert f"--attach {job}; stop it: RAY_AUTH_MODE=token ray job stop --address {head.address} {job}" in hint
    assert "Follow it: RAY_AUTH_MODE=token kuzushiji submit --address" in hint
    followed = kuzushiji(*submit, "--attach", job)
    assert (followed.code, "files are valid" in followed.stdout) == (0, True)
    unknown = kuzushiji(*submit, "--attach", "nobody")
    assert unknown.code == 1
    assert "must be the id of a job" in unknown.lines[-1]


def test_a_job_runs_the_code_of_a_checkout_where_it_is_asked_for_and_its_log_and_outcome_come_back(
    head: Head, dataset: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("cluster", "preprocessing", "job"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = checkout / "cluster" / "manifest.py"
    manifest.write_text(manifest.read_text() + '\nprint("of the checkout")\n')
    done = head.submit("--working-dir", str(checkout), "--", "verify", str(dataset))
    assert done.returncode == 0, done.stderr
    assert "of the checkout" in done.stdout
    assert "files are valid" in done.stdout
    assert "succeeded" in done.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_it(head: Head, pages: Path, tmp_path: Path) -> None:
    source = ["--pages", str(pages / "train_images"), "--labels", str(pages / "train.csv")]
    job = ["--", "prepare", *source, "--dataset", str(tmp_path / "crops")]
    with head.popen(*job) as here:
        wait_for("using the Ray cluster at", here.stdout)
        here.send_signal(signal.SIGINT)
        said = here.communicate(timeout=SECONDS_AT_MOST)[1]
    assert here.returncode == 1
    (line,) = [line for line in said.splitlines() if "continues. Follow it: RAY_AUTH_MODE=token kuzushiji" in line]
    assert "stop it: RAY_AUTH_MODE=token ray job stop --address" in line
    followed = head.submit("--attach", job_of(line))
    assert followed.returncode == 0, followed.stdout
    assert (tmp_path / "crops" / "manifest.json").is_file()


def test_ctrl_c_before_the_head_has_answered_names_the_job_that_it_may_have_taken(
    head: Head, waiting: list[str], tmp_path: Path
) -> None:
    taken = threading.Event()

    async def silent_on_jobs(request: web.Request, pass_on: PassOn) -> web.StreamResponse:
        response = await pass_on(request)
        if request.method == "POST":
            taken.set()
            await asyncio.sleep(3600)
        return response

    with behind(head, silent_on_jobs) as way, way.popen(*waiting, str(tmp_path)) as here:
        assert taken.wait(SECONDS_AT_MOST)
        here.send_signal(signal.SIGINT)
        said = here.communicate(timeout=SECONDS_AT_MOST)[1]
    assert here.returncode == 1
    (line,) = [
        line for line in said.splitlines() if "may have been submitted. Follow it: RAY_AUTH_MODE=token kuzu" in line
    ]
    assert head.submit("--attach", job_of(line)).returncode == 7


@contextmanager
def in_this_process(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Iterator[str]:
    """Yield the address of a fake head. `answer` answers all requests but that for the version."""

    async def of_a_head(request: web.Request, _: PassOn) -> web.StreamResponse:
        if request.path == "/api/version":
            return web.json_response(dict.fromkeys(("version", "ray_version", "ray_commit", "session_name"), "4.0"))
        return await answer(request)

    with behind(Head("", {}, {}), of_a_head) as head:
        yield head.address


def information(job: str) -> web.Response:
    return web.json_response({"type": "SUBMISSION", "submission_id": job, "status": "SUCCEEDED", "entrypoint": "true"})


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    taken: set[str] = set()

    async def lose(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if request.method == "POST":
            job = (await request.json())["submission_id"]
            taken.update([] if "lost" in job else [job])
            request.transport.abort()
        job = request.path.rpartition("/")[2]
        if "unknown" in job:
            request.transport.abort()
        return information(job) if job in taken else web.Response(status=404, text=f"Job {job} does not exist")

    with in_this_process(lose) as address, heads.connected(head := heads.Head(address)) as client:
        assert {submit.submit_job(client, ["taken"], None, head)} == taken
        with pytest.raises(KuzushijiError, match="which may have been submitted. .* Follow it: .*kuzushiji") as unknown:
            submit.submit_job(client, ["unknown"], None, head)
        assert job_of(str(unknown.value)) in taken
        with pytest.raises(KuzushijiError, match="the head must accept the job.* Run the same command again"):
            submit.submit_job(client, ["lost"], None, head)


def test_a_log_comes_through_the_proxy_that_leads_to_the_head(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def log(request: web.Request) -> web.StreamResponse:
        assert request.host == "head.example"
        if not request.path.endswith("/logs/tail"):
            return information("job")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("through\n")
        await socket.close()
        return socket

    with in_this_process(log) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        head = heads.Head("http://head.example", insecure=True)
        with heads.connected(head) as client:
            assert submit.follow(client, "job", head) == 0
    assert capsys.readouterr().out == "through\n"


def test_a_log_that_is_cut_off_is_not_the_end_of_the_job(head: Head, waiting: list[str], tmp_path: Path) -> None:
    async def without_log(request: web.Request, pass_on: PassOn) -> web.StreamResponse:
        if not request.path.endswith("/logs/tail"):
            return await pass_on(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close()
        return socket

    with behind(head, without_log) as way, way.popen(*waiting, str(tmp_path / "end")) as here:
        wait_for("the log was cut off", here.stderr)
        (tmp_path / "end").touch()
        said = here.communicate(timeout=SECONDS_AT_MOST)[1]
    assert (here.returncode, "failed" in said) == (7, True)


def test_closing_the_log_does_not_stop_the_job(head: Head, going_on: str) -> None:
    with head.popen("--attach", going_on) as here:
        assert here.stdout is not None
        assert here.stderr is not None
        wait_for("begun", here.stdout)
        here.stdout.close()
        here.wait(timeout=SECONDS_AT_MOST)
        said = here.stderr.read().splitlines()
    assert here.returncode == 1
    assert f"job {going_on}" in said[-2], said
    assert "continues. Follow it: RAY_AUTH_MODE=token kuzushiji submit" in said[-1]
    assert "reach" not in said[-1]
    assert is_running(head, going_on)


def test_a_signal_ends_the_tunnel_too_and_the_job_goes_on(head: Head, cluster: Cluster, going_on: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        with cluster.popen("--attach", going_on) as here:
            wait_for("begun", here.stdout)
            assert psutil.pid_exists(int(cluster.tunnel.read_text()))
            here.send_signal(number)
            said = here.communicate(timeout=SECONDS_AT_MOST)[1]
        assert here.returncode == 128 + number, said
        assert not psutil.pid_exists(int(cluster.tunnel.read_text()))
        (line,) = [line for line in said.splitlines() if "continues. Follow it" in line]
        assert shlex.join(["kuzushiji", "submit", "--cluster", str(cluster.file), "--attach", going_on]) in line
        assert is_running(head, going_on)


def test_local_addresses_bypass_proxies(head: Head, cluster: Cluster, waiting: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        asks = {"http_proxy": url, "all_proxy": url, "NO_PROXY": "", "no_proxy": ""}
        done = head.submit(*waiting, str(tmp_path), **asks)
        assert done.returncode == 7, done.stderr
        job = done.stderr.partition(" was submitted")[0].split()[-1]
        assert cluster.submit("--attach", job, **asks).returncode == 7
        with pytest.raises(BlockingIOError):  # nothing connected
            proxy.accept()


def test_a_cluster_file_with_faults_is_named_and_not_given_to_ray(cluster: Cluster) -> None:
    cluster.file.write_text((ROOT / "ray_cluster.yaml").read_text())
    done = cluster.submit("--", "verify", "gs://b/x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "replace <PROJECT>" in line
    assert line.endswith(f"Run `kuzushiji verify '{cluster.file}'`. See docs/google-cloud.md")
    assert not cluster.tunnel.exists()


def test_a_cluster_that_is_down_is_one_line_with_the_reason_of_ray(tmp_path: Path) -> None:
    script = "print('x' * 999); print('RuntimeError: Head node of cluster (kuzushiji) not found!'); print('try again')"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as tunnel:
        tunnel.wait()
        with pytest.raises(
            KuzushijiError, match=r"Received: RuntimeError: Head node of cluster \(kuzushiji\) not found!"
        ):
            heads._wait_for(tunnel, 1, tmp_path / "ray_cluster.yaml")


def test_a_silent_server_is_not_accepted_as_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "SECONDS_FOR_ANSWER", 0.5)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(KuzushijiError, match="the address must be a Ray head's.* timed out"),
            heads.connected(heads.Head(address)),
        ):
            pass


def test_http_asks_for_the_token(head: Head) -> None:
    right = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        assert answer(head.address + path, None) == 401
        assert answer(head.address + path, "0" * 64) == 403
        assert answer(head.address + path, right) == 200


def test_a_wrong_token_or_none_is_one_line(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    done = head.submit("--", "verify", "gs://b/x", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 1
    assert "must accept this machine's token" in done.stderr.splitlines()[-1]
    none = head.submit("--", "verify", "gs://b/x", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE="disabled")
    assert none.returncode == 1
    assert "must accept this machine's token" in none.stderr.splitlines()[-1]


def test_a_token_that_is_refused_later_is_one_line_too(head: Head, kuzushiji: Kuzushiji) -> None:
    async def refused(request: web.Request, pass_on: PassOn) -> web.StreamResponse:
        return await pass_on(request) if request.path == "/api/version" else web.Response(status=403)

    with behind(head, refused) as way:
        for arguments in (["--", "verify", "gs://b/x"], ["--attach", "nobody"]):
            done = kuzushiji("submit", "--address", way.address, *arguments)
            assert done.code == 1
            assert "kuzushiji: the head must accept this machine's token" in done.lines[-1]


ASKS_A_RAY = """
import sys
from cluster.errors import KuzushijiError
from cluster.ray_address import check_address
try:
    check_address(sys.argv[1])
except KuzushijiError as error:
    print(error)
"""


def test_a_command_without_the_token_of_the_ray_at_ray_address_is_one_line(head: Head) -> None:
    script = [sys.executable, "-c", ASKS_A_RAY, f"127.0.0.1:{head.ports['gcs']}"]
    with_other = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    (line,) = subprocess.check_output(script, env=with_other, text=True).splitlines()
    assert "a Ray cluster must answer at RAY_ADDRESS" in line
    assert "token is missing or incorrect. Put the cluster's token into" in line
    with pytest.raises(KuzushijiError, match="a Ray cluster must answer at RAY_ADDRESS"):
        check_address(head.address.removeprefix("http://"))  # the dashboard


# A method of each gRPC service that a head exposes to the network.
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
                channel.unary_unary(METHODS[service])(b"", timeout=SECONDS_AT_MOST, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    assert ask(None) == grpc.StatusCode.UNAUTHENTICATED
    assert ask("0" * 64) == grpc.StatusCode.UNAUTHENTICATED
    assert ask(Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()) != grpc.StatusCode.UNAUTHENTICATED
