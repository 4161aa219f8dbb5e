"""Hostile input: whatever the files of pages, archives, manifests, datasets and models hold, they are read, listed as
losses, or refused in one line. None makes a command crash or hang, take more memory than stated, run code, or write
elsewhere.

The rounds are those of fuzz.py, with fixed seeds; `make fuzz` runs new ones.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fuzz import LABEL_FORMS, ODD_VALUES, example, progressive, run_round, segment, write_dataset
from upath import UPath

from cluster.errors import DamageError, InputError, KuzushijiError
from cluster.manifest import MAX_MANIFEST_VALUES, is_sealed, read_any_manifest, seal, write_listed
from cluster.models import ModelManifest, read_latest
from cluster.places import place
from job.verify import KINDS
from preprocessing.classes import read_class_names
from preprocessing.crop import MAX_PAGE_SCANS, PageFault
from preprocessing.pages import list_pages, page_reader
from preprocessing.records import frame
from preprocessing.scan import decode_scan

if TYPE_CHECKING:
    import keras

PAGE = progressive(40, 56, 3, 10)


def one_line(caught: pytest.ExceptionInfo[BaseException], longest: int = 2000) -> str:
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text.encode()) < longest
    return text


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_1_000_mutated_pages_a_round_are_crops_or_listed_losses_within_the_stated_memory(rounds: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(rounds):
        outcomes += run_round("pages", seed).outcomes
    assert outcomes["pages"] > 1_000 * rounds
    # Some pages are still read, but less than half of them.
    assert 50 * rounds < outcomes["pages read"] < 500 * rounds


@pytest.mark.parametrize("pages", [1, pytest.param(4, marks=pytest.mark.long)])
def test_the_largest_pages_are_cut_within_the_stated_memory(pages: int) -> None:
    assert run_round("largest", 0, pages).outcomes["pages read"] == pages


@pytest.mark.parametrize(
    "disguise",
    [b"", b"\xff", b"\xff\xd0", segment(0xE1, b"\xff\xd8" + segment(0xC0, b"\0" * 15)), segment(0xFE, b"\xff\xc0")],
    ids=["none", "filled up", "restart", "thumbnail", "comment"],
)
def test_a_progressive_jpeg_with_too_many_scans_is_a_fault(disguise: bytes) -> None:
    def page(scans: int) -> bytes:
        plain = progressive(40, 56, 1, scans)
        return plain[:2] + disguise + plain[2:]

    assert decode_scan(page(MAX_PAGE_SCANS)).image.shape == (56, 40)
    with pytest.raises(PageFault, match="101 scans is over 100"):
        decode_scan(page(MAX_PAGE_SCANS + 1))


@pytest.mark.parametrize("seed", range(3))
def test_mutated_archives_are_listed_and_read_or_refused_in_one_line(seed: int) -> None:
    outcomes = run_round("archives", seed).outcomes
    assert min(outcomes["read"], outcomes["PageFault"], outcomes["InputError"]) > 50


def test_no_more_is_unpacked_of_an_archive_than_a_page_may_have() -> None:
    assert run_round("bombs", 0).outcomes["page file over N bytes"] == 8


def test_an_archive_of_many_names_is_listed_in_bounded_memory() -> None:
    assert run_round("names", 0, 200_000).megabytes < 300


def archive_of(path: Path, method: int = zipfile.ZIP_STORED) -> bytearray:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a_1.jpg", PAGE)
    return bytearray(path.read_bytes())


def _says_longer(data: bytearray) -> None:
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<L", len(PAGE) + 5)


def _begins_past_the_end(data: bytearray) -> None:
    at = data.index(b"PK\1\2")
    data[at + 42 : at + 46] = struct.pack("<L", len(data) - 10)


def _is_packed_in_an_unknown_way(data: bytearray) -> None:
    for mark, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(mark) + offset] = 97


def _is_encrypted(data: bytearray) -> None:
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1


@pytest.mark.parametrize(
    "damage",
    [_says_longer, _begins_past_the_end, _is_packed_in_an_unknown_way, _is_encrypted],
    ids=lambda f: f.__name__,
)
def test_a_page_with_a_false_archive_entry_is_a_fault(damage: Callable[[bytearray], None], tmp_path: Path) -> None:
    data = archive_of(tmp_path / "pages.zip", zipfile.ZIP_DEFLATED)
    damage(data)
    (tmp_path / "pages.zip").write_bytes(data)
    pages = place(tmp_path / "pages.zip")
    (name,) = list_pages(pages).scans
    with page_reader(pages) as read, pytest.raises(PageFault, match="can't be read from the archive") as caught:
        read(name)
    one_line(caught)


def test_a_page_that_begins_where_no_file_has_a_byte_is_a_fault(tmp_path: Path) -> None:
    data = archive_of(tmp_path / "pages.zip")
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    extra = struct.pack("<HHQ", 1, 8, (1 << 64) - 1)
    data[at + 42 : at + 46] = b"\xff" * 4
    data[at + 30 : at + 32] = struct.pack("<H", len(extra))
    data[end:end] = extra
    data[end + len(extra) + 12 : end + len(extra) + 16] = struct.pack("<L", end + len(extra) - at)
    (tmp_path / "pages.zip").write_bytes(data)
    pages = place(tmp_path / "pages.zip")
    assert list_pages(pages)
    with page_reader(pages) as read, pytest.raises(PageFault, match="can't be read from the archive"):
        read("a_1.jpg")


@pytest.mark.parametrize("odd", ["a name that is no text", "a version that is not known", "a name twice"])
def test_an_archive_that_can_not_be_listed_is_refused_in_one_line(odd: str, tmp_path: Path) -> None:
    data = archive_of(tmp_path / "pages.zip")
    at = data.index(b"PK\1\2")
    if odd == "a name that is no text":
        data[at + 9] |= 8
        data[at + 46] = 0xFF
    elif odd == "a version that is not known":
        data[at + 6] = 255
    else:
        entry = data[at : data.index(b"PK\5\6")]
        end = data.index(b"PK\5\6")
        data[end:end] = entry
        end += len(entry)
        data[end + 8 : end + 16] = struct.pack("<HHL", 2, 2, end - at)
    (tmp_path / "pages.zip").write_bytes(data)
    with pytest.raises(
        InputError, match="--pages must be a folder or a valid .zip|must hold one file per page"
    ) as caught:
        list_pages(place(tmp_path / "pages.zip"))
    one_line(caught)


def test_mutated_label_files_of_every_form_are_read_or_refused_in_one_line() -> None:
    outcomes = run_round("labels", 0, 300).outcomes
    for form in LABEL_FORMS:
        assert min(outcomes[f"{form} read"], outcomes[f"{form} InputError"]) > 2


@pytest.mark.parametrize("seed", range(3))
def test_mutated_manifests_are_read_or_refused_in_one_line(seed: int) -> None:
    outcomes = run_round("manifests", seed).outcomes
    assert min(outcomes["read"], outcomes["DamageError"]) > 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": [1] * 1_000_000}, "files.0"),
        ({"losses": [1] * 1_000_000}, "losses.0"),
        ({"losses": [{"what": "no page", "box": [0, 0, 1, 1], "unicode": None}]}, "'losses.0.page': Field required"),
        ({"losses": [{"page": "p", "box": [0, 0, 1, 1], "unicode": None}]}, "'losses.0.what': Field required"),
        ({"clipped": [{"page": 1, "box": [0, 0, 1, 1]}]}, "'clipped.0.page': Input should be a valid string"),
        ({"clipped": [{"page": "p"}]}, "'clipped.0.box': Field required"),
        ({"counts": {str(i): {} for i in range(100_000)}}, "each shard must be of a split"),
        ({"counts": {str(i): 1 for i in range(100_000)}}, "counts.0"),
        ({"counts": {"train": {"examples": 1}}}, "each shard must be of a split"),
        ({"counts": {"test": {"examples": 1}}}, "each shard must be of a split"),
        ({"ink": {"crops": 1, "without_ink": 2}}, "the crops without ink must be some of all"),
        ({"ink": {"listed": [{"page": "p", "crops": 0, "without_ink": 0}]}}, "'ink.listed.0.crops'"),
        ({"shards": []}, "read"),
        ({"deep": {"\n\ud800" * 100: 1}, "counts": {"\n\ud800" * 100: 1}}, "counts"),
        ({"more": [0] * MAX_MANIFEST_VALUES}, "must hold at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_manifest_is_refused_with_its_first_fault(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "dataset", b"", 0)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | change))
    if says == "read":
        read_any_manifest(place(folder), KINDS)
        return
    with pytest.raises(DamageError, match=says) as caught:
        read_any_manifest(place(folder), KINDS)
    one_line(caught)


def test_a_manifest_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(write_dataset(tmp_path / "dataset", b"", 0))
    manifest = read_any_manifest(folder, KINDS)
    (folder / "manifest.json").unlink()
    monkeypatch.setattr("cluster.manifest.MAX_MANIFEST_VALUES", 10)
    with pytest.raises(InputError, match="at most .* and 10 values. Received: .* Fix the input") as caught:
        seal(folder, manifest)
    one_line(caught)
    assert not is_sealed(folder)


def test_a_manifest_that_lists_a_file_twice_is_damage(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "dataset", b"", 0)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {"shards": content["shards"] * 2}))
    with pytest.raises(DamageError, match="a file must be listed once"):
        read_any_manifest(place(folder), KINDS)


NO_RUNS = [value for value in ODD_VALUES if value not in ("x", "manifest.json", "x" * 3000)]


@pytest.mark.parametrize("value", NO_RUNS, ids=lambda value: repr(value)[:20])
def test_a_pointer_that_names_no_run_is_damage_in_one_line(value: Any, tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_text(json.dumps({"run": value, "finished_at": "2026-01-01T00:00:00Z"}))
    with pytest.raises(DamageError, match="must name a run") as caught:
        read_latest(place(tmp_path))
    one_line(caught)
    (tmp_path / "latest.json").write_bytes(b" " * 20_000)
    with pytest.raises(DamageError, match="at most"):
        read_latest(place(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\nrare\n", b"U+306F\n" * 2_000_000, b"x" * 100_000, b"\0", b"rare"])
def test_a_file_of_classes_is_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    if content == b"rare":
        assert read_class_names(place(tmp_path / "classes.txt")) == ["rare"]
        return
    with pytest.raises(InputError) as caught:
        read_class_names(place(tmp_path / "classes.txt"))
    one_line(caught)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where datasets are staged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kuzushiji" / "staged"


@pytest.mark.parametrize(
    ("records", "examples", "says"),
    [
        ([example()], 10**12, "must hold 1000000000000 crops"),
        ([example()], 2, "must hold 2 crops"),
        ([example(image=bytes(7500))] * 2, 2, "an image that is not 80 x 80"),
        ([example()] * 3, 2, "more crops than the manifest says"),
        ([example(image=bytes(3200))] * 4, 2, "must hold"),
        ([example(image=bytes(3200)), example(), example()], 2, "must hold"),
        ([example(image=bytes(6399))], 1, "an image that is not 80 x 80"),
        ([example(image=None, image_id=b"a" * 6400)], 1, "crops as prepare writes them"),
        ([example(image=bytes(8000))], 1, "an image that is not 80 x 80"),
        ([example(image=bytes(20_000))], 1, "at most 8192 bytes"),
        ([example(label=[2])], 1, "none of the 2 classes"),
        ([example(label=[-1])], 1, "none of the 2 classes"),
        ([example(label=[0, 1])], 1, "crops as prepare writes them"),
        ([example(label=b"U+306F")], 1, "crops as prepare writes them"),
        ([example(label=None)], 1, "crops as prepare writes them"),
        ([example(box=[1, 2, 3])], 1, "crops as prepare writes them"),
        ([example(box=[1, 2, 3, 1 << 40])], 1, "a box with more than nine digits"),
        ([example(box=[-(1 << 63), 2, 3, 4])], 1, "a box with more than nine digits"),
        ([example(unicode=b"U+D800")], 1, "a code point must look like"),
        ([example(unicode=b"\xff")], 1, "can't decode"),
        ([example(image_id=b"a\nb")], 1, "an image_id must be"),
        ([example(image_id=b"../../evil")], 1, "an image_id must be"),
        ([example(image_id=b"a" * 500)], 1, "an image_id must have at most"),
        ([b"\xff" * 7000], 1, "crops as prepare writes them"),
    ],
)
def test_records_that_are_no_crops_are_damage_in_one_line_and_nothing_is_left_staged(
    records: list[bytes], examples: int, says: str, tmp_path: Path, cache: Path
) -> None:
    from job.data.staging import staged

    dataset = write_dataset(tmp_path / "dataset", b"".join(map(frame, records)), examples)
    with pytest.raises(DamageError, match=says) as caught, staged(place(dataset), ["test"]):
        pass
    one_line(caught)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_shard_that_ends_within_a_record_is_named(tmp_path: Path, cache: Path) -> None:
    from job.data.staging import staged

    shard = frame(example()) + frame(example())
    dataset = write_dataset(tmp_path / "dataset", shard[:-5], 1)
    with (
        pytest.raises(DamageError, match="tfrecord-00000-of-00001 must .* complete record"),
        staged(place(dataset), ["test"]),
    ):
        pass


def test_datasets_of_mutated_records_are_staged_as_they_are_or_refused_in_one_line() -> None:
    outcomes = run_round("datasets", 0).outcomes
    assert min(outcomes["staged"], outcomes["DamageError"]) > 2


def test_what_a_training_wrote_is_read_or_damage_in_one_line(tmp_path: Path) -> None:
    from job.model.folder import read_json

    for content in (b"[" * 100_000, b"\xff", b"[]", b"9" * 5000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(DamageError, match="written by a training") as caught:
            read_json(place(tmp_path / "config.json"))
        one_line(caught)


# An attacker's models, each in a folder that is sealed correctly.


def small_model(*last: "keras.layers.Layer", classes: int = 2) -> "keras.Model":
    import keras

    layers = [keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax"), *last]
    return keras.Sequential([keras.Input((80, 80, 1)), *layers])


def saved(model: "keras.Model", folder: Path) -> dict[str, bytes]:
    """Return the members of a model's archive."""
    model.save(folder / "saved.keras")
    with zipfile.ZipFile(folder / "saved.keras") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def sealed_model(folder: UPath, archive: bytes) -> UPath:
    entries = [write_listed(folder / "model.keras", archive), write_listed(folder / "labels.txt", b"U+306F\nrare\n")]
    seal(folder, ModelManifest(files=entries, dataset_manifest_sha256="0" * 64, finished_at=datetime.now(UTC)))
    return folder


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "evil"))


def _lambda(folder: Path) -> bytes:
    import keras

    evil = str(folder / "evil")
    run = lambda x: (__import__("pathlib").Path(evil).touch(), x)[1]  # noqa: E731 - a lambda is what is not let in
    archive = packed(saved(small_model(keras.layers.Lambda(run)), folder))
    Path(evil).unlink()  # the Lambda ran when the model was made
    return archive


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        members = saved(small_model(), folder)
        return packed(members | {"config.json": json.dumps(change(json.loads(members["config.json"]))).encode()})

    return make


def _member(name: str) -> Callable[[Path], bytes]:
    return lambda folder: packed(saved(small_model(), folder) | {name.format(folder): b"evil"})


def _function(module: str, name: str, **more: Any) -> Callable[[Path], bytes]:
    activation = {"module": module, "class_name": "function", "config": name, "registered_name": name} | more

    def change(config: dict[str, Any]) -> dict[str, Any]:
        config["config"]["layers"][-1]["config"]["activation"] = activation
        return config

    return _config(change)


def _vocabulary(folder: Path) -> bytes:
    """Return a model with a layer that reads a file of the machine that loads it."""
    layer = {"module": "keras.layers", "class_name": "StringLookup", "config": {"vocabulary": str(folder / "secret")}}
    (folder / "secret").write_text("secret\n")
    return _config(lambda config: config["config"]["layers"].append(layer) or config)(folder)


def _legacy(folder: Path) -> bytes:
    small_model().save(folder / "saved.h5")
    return (folder / "saved.h5").read_bytes()


def _of_other_classes(folder: Path) -> bytes:
    return packed(saved(small_model(classes=3), folder))


def _without_weights(folder: Path) -> bytes:
    return packed(saved(small_model(), folder) | {"model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(500)})


def _cut_weights(folder: Path) -> bytes:
    members = saved(small_model(), folder)
    return packed(members | {"model.weights.h5": members["model.weights.h5"][:-20_000]})


MODELS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a Lambda layer": (_lambda, "[Ll]ambda"),
    "a path that climbs out": (_member("../../evil"), "other than config.json"),
    "an asset that climbs out": (_member("assets/../../../evil"), "other than config.json"),
    "an absolute path": (_member("{}/evil"), "other than config.json"),
    "weights of NumPy": (_member("model.weights.npz"), "other than config.json"),
    "packed members": (lambda folder: packed(saved(small_model(), folder), zipfile.ZIP_DEFLATED), "compressed members"),
    "a function that runs commands": (_function("os", "system"), ""),
    "a function of Python's": (_function("builtins", "exec"), ""),
    "a function that fetches files": (_function("keras.utils", "get_file"), ""),
    "a layer that reads files": (_vocabulary, ""),
    "no configuration": (_config(lambda config: [config]), ""),
    "no model": (_config(lambda config: config["config"]["layers"][-1]), ""),
    "a deep configuration": (
        lambda folder: packed(saved(small_model(), folder) | {"config.json": b"[" * 100_000}), ""),
    "garbage for weights": (_without_weights, ""),
    "weights that are cut off": (_cut_weights, ""),
    "other classes": (_of_other_classes, "not a model of 2 classes"),
    "the older HDF5 form": (_legacy, "not a zip file"),
    "a pickle": (lambda folder: pickle.dumps(Evil(folder / "evil")), "not a zip file"),
    "nothing": (lambda folder: b"", "not a zip file"),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_an_attackers_model_is_refused_in_one_line_and_nothing_is_run_or_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.evaluate import evaluate
    from job.model.folder import load_model

    make, says = MODELS[what]
    (tmp_path / "attacker").mkdir()
    model = sealed_model(place(tmp_path / "models" / "run"), make(tmp_path / "attacker"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = sorted(tmp_path.rglob("*"))
    for ask in (load_model, lambda folder: evaluate(folder, place(tmp_path / "dataset"), "test")):
        with pytest.raises(DamageError, match=f"model.keras must be a classifier.*{says}") as caught:
            ask(model)
        one_line(caught)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "attacker" / "evil").exists()


def test_a_config_that_the_manifest_of_a_model_does_not_list_is_not_read(tmp_path: Path) -> None:
    from job.model.folder import read_trained_on

    model = sealed_model(place(tmp_path), b"")
    (tmp_path / "config.json").write_text('{"margin": 0.5}')
    with pytest.raises(DamageError, match="the manifest must list config.json. Pull the model again"):
        read_trained_on(model)


def test_a_model_of_ours_is_loaded(tmp_path: Path) -> None:
    from job.model.folder import load_model

    folder = sealed_model(place(tmp_path / "run"), packed(saved(small_model(), tmp_path)))
    model, names, _ = load_model(folder)
    assert model.output_shape == (None, len(names))


def test_without_safe_mode_the_lambda_would_run(tmp_path: Path) -> None:
    import keras

    (tmp_path / "model.keras").write_bytes(_lambda(tmp_path))
    assert not (tmp_path / "evil").exists()
    keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert (tmp_path / "evil").exists()


def test_a_model_is_checksummed_before_it_is_loaded(tmp_path: Path) -> None:
    from job.model.folder import load_model

    archive = _lambda(tmp_path)
    folder = sealed_model(place(tmp_path / "run"), archive[:-1] + bytes([archive[-1] ^ 1]))
    (tmp_path / "run" / "model.keras").write_bytes(archive)
    with pytest.raises(KuzushijiError, match=r"model.keras was changed"):
        load_model(folder)
