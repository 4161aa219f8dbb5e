"""The strict bucket keeps Google's promises, tested with the real clients: the cloud tests rely on it."""

import base64
import hashlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import google.api_core.exceptions
import google_crc32c
import psutil
import pytest
from fake_cloud.bucket import StrictBucket
from google.cloud import storage

BIG = random.Random(4).randbytes(9 * 2**20 + 5)
PAGE = 10
SECONDS_AT_MOST = 300  # on a busy machine
# gcsfs gives aiohttp each chunk as a whole; aiohttp warns about chunks over 1 MiB.
MAY_BE_LARGE = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
Answer = tuple[int, http.client.HTTPMessage, bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[StrictBucket]:
    with StrictBucket(page_size=PAGE) as running:
        yield running


@pytest.fixture
def strict(server: StrictBucket, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StrictBucket:
    """The server, with an empty bucket "demo"."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    if "demo" in server._objects.buckets():
        for name in server.names("demo"):
            server._objects.delete("demo", name, {})
    else:
        server.create("demo")
    server.faults.clear()
    server.requests.clear()
    return server


@pytest.fixture
def bucket(strict: StrictBucket) -> Iterator[storage.Bucket]:
    with storage.Client() as client:
        yield client.bucket("demo")


@pytest.fixture
def files(strict: StrictBucket) -> Any:
    from gcsfs.core import GCSFileSystem  # reads the environment when it is imported

    return GCSFileSystem(token="anon", skip_instance_cache=True, use_listings_cache=False)  # noqa: S106


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def ask(
    strict: StrictBucket, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
) -> Answer:
    """Send one request, without retries."""
    connection = http.client.HTTPConnection(urlsplit(strict.url).netloc, timeout=SECONDS_AT_MOST)
    try:
        connection.request(method, target, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def race(racers: int, run: Callable[[int], Any]) -> list[Any]:
    """Call `run` for all racers at the same time. Return what each call returned or raised."""
    barrier = threading.Barrier(racers)

    def start(racer: int) -> Any:
        barrier.wait()
        try:
            return run(racer)
        except Exception as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        return list(pool.map(start, range(racers)))


def test_one_of_64_racers_creates_an_object(strict: StrictBucket, bucket: storage.Bucket) -> None:
    def create(racer: int) -> int:
        bucket.blob("only").upload_from_string(str(racer), if_generation_match=0)
        return racer

    outcomes = race(64, create)
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    losers = [o for o in outcomes if isinstance(o, google.api_core.exceptions.PreconditionFailed)]
    assert (len(winners), len(losers)) == (1, 63)
    assert strict.read("demo", "only") == str(winners[0]).encode()


def test_one_of_64_racers_creates_a_file(strict: StrictBucket, files: Any) -> None:
    def create(racer: int) -> int:
        files.pipe_file("demo/only", str(racer).encode(), mode="create")
        return racer

    outcomes = race(64, create)
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, FileExistsError)]
    assert (len(winners), len(losers)) == (1, 63)
    assert strict.read("demo", "only") == str(winners[0]).encode()


def test_no_addition_of_16_racers_is_lost(strict: StrictBucket, bucket: storage.Bucket) -> None:
    strict.write("demo", "sum", b"0")

    def add(racer: int) -> int:
        for tries in range(1, 200):
            blob = bucket.get_blob("sum")
            try:
                total = int(blob.download_as_bytes(if_generation_match=blob.generation))
                blob.upload_from_string(str(total + 1), if_generation_match=blob.generation)
            except (google.api_core.exceptions.PreconditionFailed, google.api_core.exceptions.NotFound):
                continue
            return tries
        raise AssertionError("never won")

    outcomes = race(16, add)
    assert all(isinstance(outcome, int) for outcome in outcomes), outcomes
    assert strict.read("demo", "sum") == b"16"


def test_listings_are_complete_at_any_page_size(strict: StrictBucket, bucket: storage.Bucket, files: Any) -> None:
    names = sorted([f"{folder}/{number:02}" for folder in "abcdefghijkl" for number in (1, 2)] + ["é"])
    for name in reversed(names):
        strict.write("demo", name, name.encode())
    assert [blob.name for blob in bucket.list_blobs()] == names
    assert len(strict.requests) - len([r for r in strict.requests if "/o?" not in r.path]) == 3
    folders = bucket.list_blobs(delimiter="/")
    assert [blob.name for blob in folders] == ["é"]
    assert folders.prefixes == {f"{folder}/" for folder in "abcdefghijkl"}
    assert [blob.name for blob in bucket.list_blobs(prefix="c/")] == ["c/01", "c/02"]
    assert [b.name for b in bucket.list_blobs(start_offset="b/02", end_offset="d/")] == ["b/02", "c/01", "c/02"]
    assert [blob.name for blob in bucket.list_blobs(max_results=12)] == names[:12]
    assert [blob.name for page in bucket.list_blobs(page_size=4).pages for blob in page] == names
    assert list(bucket.list_blobs(prefix="nothing")) == []
    assert files.find("demo") == [f"demo/{name}" for name in names]
    assert files.ls("demo") == [f"demo/{folder}" for folder in "abcdefghijkl"] + ["demo/é"]


@pytest.mark.parametrize(("kind", "status"), [("429", 429), ("503", 503), ("401", 401), ("403", 403)])
def test_a_refusal_comes_once_in_googles_form(strict: StrictBucket, kind: str, status: int) -> None:
    strict.write("demo", "x", b"bytes")
    strict.faults.inject(kind, matching="o/x")
    assert ask(strict, "GET", "/storage/v1/b/demo/o")[0] == 200
    found, _, body = ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")
    assert (found, json.loads(body)["error"]["code"], strict.faults.left()) == (status, status, 0)
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")[::2] == (200, b"bytes")
    assert [logged.status for logged in strict.requests] == [200, status, 200]


def test_a_cut_body_ends_in_its_middle_once(strict: StrictBucket) -> None:
    strict.write("demo", "x", BIG)
    strict.faults.inject("cut")
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")
    assert cut.value.partial == BIG[: len(BIG) // 2]
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")[2] == BIG


def test_a_cut_answer_to_an_upload_leaves_the_object(strict: StrictBucket, bucket: storage.Bucket) -> None:
    strict.faults.inject("cut", method="POST")
    with pytest.raises(google.api_core.exceptions.PreconditionFailed):  # the client retries, but the object exists
        bucket.blob("x").upload_from_string("mine", if_generation_match=0)
    assert strict.read("demo", "x") == b"mine"


def test_a_flipped_byte_is_the_only_wrong_one(strict: StrictBucket) -> None:
    strict.write("demo", "x", b"123456")
    strict.faults.inject("flip")
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x")[0] == 200  # metadata is not affected
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")[2] == b"123556"
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")[2] == b"123456"


def test_a_flipped_byte_is_noticed_by_the_client(strict: StrictBucket, bucket: storage.Bucket) -> None:
    strict.write("demo", "x", b"123456")
    strict.faults.inject("flip", times=9)
    with pytest.raises(storage.exceptions.DataCorruption):
        bucket.blob("x").download_as_bytes()
    strict.faults.clear()
    assert strict.faults.left() == 0
    assert bucket.blob("x").download_as_bytes() == b"123456"


def test_a_slow_body_comes_whole_in_pieces(strict: StrictBucket) -> None:
    strict.write("demo", "x", BIG)
    strict.faults.inject("slow")
    connection = http.client.HTTPConnection(urlsplit(strict.url).netloc, timeout=SECONDS_AT_MOST)
    connection.request("GET", "/storage/v1/b/demo/o/x?alt=media")
    answer = connection.getresponse()
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media")[2] == BIG  # other requests do not wait
    pieces = list(iter(answer.read1, b""))
    connection.close()
    assert len(pieces) > 1
    assert b"".join(pieces) == BIG


def test_a_cut_upload_writes_nothing(strict: StrictBucket) -> None:
    strict.faults.inject("cut-upload")
    target = "/upload/storage/v1/b/demo/o?uploadType=media&name=x"
    with pytest.raises(ConnectionError):
        ask(strict, "POST", target, BIG)
    assert (strict.names("demo"), strict.requests[-1].status) == ([], None)
    assert ask(strict, "POST", target, BIG)[0] == 200
    assert strict.read("demo", "x") == BIG


def test_an_upload_whose_client_died_writes_nothing(strict: StrictBucket) -> None:
    head = "POST /upload/storage/v1/b/demo/o?uploadType=media&name=x HTTP/1.1\r\nHost: x\r\n"
    for rest in ("Content-Length: 9\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"):
        with socket.create_connection(
            (urlsplit(strict.url).hostname, urlsplit(strict.url).port), timeout=SECONDS_AT_MOST
        ) as client:
            client.sendall((head + rest).encode())
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
    assert strict.names("demo") == []
    assert [logged.status for logged in strict.requests] == [None, None]


def test_a_cut_resumable_upload_resumes_where_it_stopped(strict: StrictBucket, bucket: storage.Bucket) -> None:
    strict.faults.inject("cut-upload", method="PUT")
    blob = bucket.blob("x", chunk_size=2**20)
    blob.upload_from_string(BIG)
    assert strict.faults.left() == 0
    assert strict.read("demo", "x") == BIG


@MAY_BE_LARGE
def test_a_cut_file_upload_resumes_where_it_stopped(strict: StrictBucket, files: Any) -> None:
    strict.faults.inject("cut-upload", matching="upload_id")
    with files.open("demo/x", "wb", block_size=2**20) as file:
        file.write(BIG)
    assert strict.faults.left() == 0
    assert strict.read("demo", "x") == BIG


def test_a_wrong_declared_checksum_is_refused(strict: StrictBucket, bucket: storage.Bucket) -> None:
    wrong = crc32c(b"other")
    blob = bucket.blob("x")
    blob.crc32c = wrong
    with pytest.raises(google.api_core.exceptions.BadRequest, match="CRC32C"):
        blob.upload_from_string("bytes", checksum=None)
    blob = bucket.blob("x")
    blob.md5_hash = md5(b"other")
    with pytest.raises(google.api_core.exceptions.BadRequest, match="MD5"):
        blob.upload_from_string("bytes", checksum=None)
    _, headers, _ = ask(strict, "POST", "/upload/storage/v1/b/demo/o?uploadType=resumable&name=x", b"{}")
    session = headers["Location"].removeprefix(strict.url)
    assert ask(strict, "PUT", session, b"bytes", {"X-Goog-Hash": f"crc32c={wrong}"})[0] == 400
    assert strict.names("demo") == []


def test_big_objects_are_byte_for_byte_right(strict: StrictBucket, bucket: storage.Bucket, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    blob = bucket.blob("big", chunk_size=2**20)
    blob.upload_from_filename(tmp_path / "big")
    assert strict.read("demo", "big") == BIG
    assert len([logged for logged in strict.requests if logged.method == "PUT"]) == 10
    assert blob.crc32c == crc32c(BIG)
    assert blob.md5_hash == md5(BIG)
    blob.download_to_filename(tmp_path / "back")  # in ranges
    assert (tmp_path / "back").read_bytes() == BIG
    blob = bucket.blob("big")
    assert blob.download_as_bytes() == BIG
    assert blob.download_as_bytes(start=2**20 + 1, end=2**21) == BIG[2**20 + 1 : 2**21 + 1]


@MAY_BE_LARGE
def test_big_files_are_byte_for_byte_right(strict: StrictBucket, files: Any) -> None:
    with files.open("demo/big", "wb", block_size=2**20) as file:
        file.write(BIG)
    assert strict.read("demo", "big") == BIG
    files.pipe("demo/piped", BIG)
    assert files.cat("demo/piped") == BIG
    assert files.cat_file("demo/big", start=77, end=2**21) == BIG[77 : 2**21]
    with files.open("demo/big", "rb", block_size=2**18) as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == BIG[-1000:]


@pytest.mark.parametrize("data", [b"", b"\r", b"\n", b"\r\n", b"{}", b"a\r\n--==0==\r\n"])
def test_bytes_and_names_stay_as_they_are(
    strict: StrictBucket, bucket: storage.Bucket, files: Any, data: bytes
) -> None:
    for name in ("a/b", "a//b", "a/b/", "a/../b", "あ %2F?#"):
        bucket.blob(name).upload_from_string(data + name.encode() + data, content_type="application/json")
    for name in ("a/b", "a//b", "a/b/", "a/../b", "あ %2F?#"):
        assert strict.read("demo", name) == data + name.encode() + data
        assert bucket.blob(name).download_as_bytes() == data + name.encode() + data
    files.pipe("demo/c", data)
    assert strict.read("demo", "c") == data
    files.rm("demo/a/b")
    assert "a//b" in strict.names("demo")


def test_all_answers_report_the_same_generation(strict: StrictBucket, bucket: storage.Bucket) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string("first")
    first = blob.generation
    blob = bucket.blob("x")
    blob.upload_from_string("second")
    assert (blob.generation > first, blob.metageneration) == (True, 1)
    assert bucket.get_blob("x").generation == blob.generation
    assert next(iter(bucket.list_blobs())).generation == blob.generation
    _, headers, _ = ask(strict, "GET", "/download/storage/v1/b/demo/o/x?alt=media", headers={"Range": "bytes=0-1"})
    assert int(headers["x-goog-generation"]) == blob.generation
    assert headers["x-goog-hash"] == f"crc32c={blob.crc32c},md5={blob.md5_hash}"
    blob.metadata = {"made": "by a test"}
    blob.patch()
    assert (blob.metageneration, bucket.get_blob("x").metadata) == (2, {"made": "by a test"})
    with pytest.raises(google.api_core.exceptions.NotFound):
        bucket.blob("x", generation=first).download_as_bytes()


def test_preconditions_hold_everywhere(strict: StrictBucket, bucket: storage.Bucket) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string("bytes")
    failed = pytest.raises(google.api_core.exceptions.PreconditionFailed)
    for attempt in (
        lambda: blob.reload(if_generation_match=1),
        lambda: blob.reload(if_metageneration_match=2),
        lambda: bucket.blob("x").upload_from_string("other", if_generation_not_match=blob.generation),
        lambda: bucket.blob("new").upload_from_string("other", if_generation_match=7),
        lambda: bucket.blob("x", chunk_size=2**18).upload_from_string(BIG, if_generation_match=0),
        lambda: bucket.copy_blob(blob, bucket, "y", if_generation_match=7),
        lambda: bucket.copy_blob(blob, bucket, "y", if_source_generation_match=7),
        lambda: bucket.blob("x").rewrite(blob, if_generation_match=0),
        lambda: bucket.blob("x").compose([blob, blob], if_generation_match=0),
        lambda: blob.delete(if_generation_match=7),
    ):
        with failed:
            attempt()
    assert (strict.names("demo"), strict.read("demo", "x")) == (["x"], b"bytes")
    same = f"/storage/v1/b/demo/o/x?ifGenerationNotMatch={blob.generation}"
    assert ask(strict, "GET", same)[::2] == (304, b"")
    status, _, body = ask(strict, "DELETE", same)
    assert (status, json.loads(body)["error"]["errors"][0]["reason"]) == (412, "conditionNotMet")
    assert ask(strict, "GET", "/storage/v1/b/demo/o/x?ifGenerationMatch=many")[0] == 400
    bucket.blob("twice").compose([blob, blob], if_generation_match=0)
    bucket.copy_blob(blob, bucket, "copy", if_generation_match=0, if_source_generation_match=blob.generation)
    assert (strict.read("demo", "twice"), strict.read("demo", "copy")) == (b"bytesbytes", b"bytes")
    blob.delete(if_generation_match=blob.generation)
    assert strict.names("demo") == ["copy", "twice"]


def test_a_resumable_upload_that_was_overtaken_is_refused_at_its_end(strict: StrictBucket) -> None:
    start = "/upload/storage/v1/b/demo/o?uploadType=resumable&name=x&ifGenerationMatch=0"
    _, headers, _ = ask(strict, "POST", start, b"{}")
    session = headers["Location"].removeprefix(strict.url)
    status, headers, _ = ask(strict, "PUT", session, BIG[: 2**18], {"Content-Range": f"bytes 0-{2**18 - 1}/*"})
    assert (status, headers["Range"]) == (308, f"bytes=0-{2**18 - 1}")
    assert ask(strict, "PUT", session, b"", {"Content-Range": "bytes */*"})[0] == 308
    strict.write("demo", "x", b"faster")
    assert ask(strict, "PUT", session, b"end", {"Content-Range": f"bytes {2**18}-{2**18 + 2}/{2**18 + 3}"})[0] == 412
    assert strict.read("demo", "x") == b"faster"
    assert ask(strict, "POST", start, b"{}")[0] == 412


def test_ranges_are_those_of_http(strict: StrictBucket) -> None:
    strict.write("demo", "x", b"0123456789")
    for wanted, status, where, data in (
        ("bytes=2-4", 206, "bytes 2-4/10", b"234"),
        ("bytes=7-99", 206, "bytes 7-9/10", b"789"),
        ("bytes=-3", 206, "bytes 7-9/10", b"789"),
        ("bytes=8-", 206, "bytes 8-9/10", b"89"),
        ("nonsense", 200, None, b"0123456789"),
    ):
        answer = ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media", headers={"Range": wanted})
        assert (answer[0], answer[1]["Content-Range"], answer[2]) == (status, where, data)
    status, headers, _ = ask(strict, "GET", "/storage/v1/b/demo/o/x?alt=media", headers={"Range": "bytes=10-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */10")


def test_a_missing_bucket_is_said_to_be_missing(strict: StrictBucket, bucket: storage.Bucket, files: Any) -> None:
    missing = bucket.client.bucket("missing")
    for attempt in (
        lambda: missing.reload(),
        lambda: list(missing.list_blobs()),
        lambda: missing.blob("x").upload_from_string("bytes"),
        lambda: missing.blob("x", chunk_size=2**18).upload_from_string(BIG),
        lambda: missing.blob("x").delete(),
    ):
        with pytest.raises(google.api_core.exceptions.NotFound, match=r"The specified bucket does not exist\."):
            attempt()
    for attempt in (lambda: files.ls("missing"), lambda: files.pipe("missing/x", b""), lambda: files.cat("missing/x")):
        with pytest.raises(FileNotFoundError):
            attempt()
    with pytest.raises(google.api_core.exceptions.NotFound, match="No such object: demo/x"):
        bucket.blob("x").reload()


def test_a_batch_answers_each_of_its_calls(strict: StrictBucket, bucket: storage.Bucket) -> None:
    for name in ("a/1", "a/2"):
        strict.write("demo", name, b"")

    def delete_at_once(*names: str) -> None:
        with bucket.client.batch():
            for name in names:
                bucket.delete_blob(name)

    with pytest.raises(google.api_core.exceptions.NotFound, match="demo/b"):
        delete_at_once("a/1", "b", "a/2")
    assert strict.names("demo") == []


def test_addresses_in_answers_are_those_of_the_client(strict: StrictBucket) -> None:
    seen = {"Host": "storage.example", "X-Forwarded-Proto": "https"}
    _, headers, _ = ask(strict, "POST", "/upload/storage/v1/b/demo/o?uploadType=resumable&name=x", b"{}", seen)
    assert headers["Location"].startswith("https://storage.example/upload/")
    strict.write("demo", "a/x", b"")
    resource = json.loads(ask(strict, "GET", "/storage/v1/b/demo/o/a%2Fx", None, seen)[2])
    assert resource["selfLink"] == "https://storage.example/storage/v1/b/demo/o/a%2Fx"
    assert resource["mediaLink"].startswith("https://storage.example/download/storage/v1/b/demo/o/a%2Fx?generation=")


def test_chunked_and_expecting_requests_are_understood(strict: StrictBucket) -> None:
    connection = http.client.HTTPConnection(urlsplit(strict.url).netloc, timeout=SECONDS_AT_MOST)
    target = "/upload/storage/v1/b/demo/o?uploadType=media&name=x"
    for data in (b"first", b"second"):  # on one connection
        pieces = iter([data[:3], data[3:]])
        connection.request("POST", target, pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["size"]) == (200, str(len(data)))
    connection.request("POST", target, b"third", {"Expect": "100-continue"})
    assert connection.getresponse().status == 200
    connection.close()
    assert strict.read("demo", "x") == b"third"


def test_the_environment_is_all_that_both_libraries_need(strict: StrictBucket) -> None:
    strict.write("demo", "x", b"bytes")
    program = """
import fsspec
from google.cloud import storage
with storage.Client() as client:
    print(client.bucket("demo").blob("x").download_as_bytes(), fsspec.filesystem("gs").cat("gs://demo/x"))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | strict.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_AT_MOST,
    )
    assert (run.returncode, run.stdout) == (0, "b'bytes' b'bytes'\n"), run.stderr


def test_nothing_is_left_running() -> None:
    threads, children = set(threading.enumerate()), set(psutil.Process().children())
    connections = []

    def fail_in_the_middle(strict: StrictBucket) -> None:
        strict.create("demo")
        strict.write("demo", "x", BIG)
        strict.faults.inject("slow", matching="alt=media")
        for target in ("/storage/v1/b/demo/o/x", "/storage/v1/b/demo/o/x?alt=media"):  # one idle, one in its body
            connections.append(http.client.HTTPConnection(urlsplit(strict.url).netloc, timeout=SECONDS_AT_MOST))
            connections[-1].request("GET", target)
            assert connections[-1].getresponse().read(10)
        assert len(set(psutil.Process().children()) - children) == 1
        raise RuntimeError("of the test")

    server = StrictBucket()
    with pytest.raises(RuntimeError, match="of the test"), server:
        fail_in_the_middle(server)
    assert set(psutil.Process().children()) <= children
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/storage/v1/b")
    for connection in connections:
        connection.close()


def test_the_emulator_ends_with_a_killed_owner() -> None:
    program = """
import time
from fake_cloud.bucket import StrictBucket
with StrictBucket():
    print("running", flush=True)
    time.sleep(60)
"""
    folder = Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"running\n"
        emulators = psutil.Process(owner.pid).children()
        owner.kill()
    assert len(emulators) == 1
    assert psutil.wait_procs(emulators, timeout=SECONDS_AT_MOST)[1] == []
