"""A fuzzer of all external input: pages, archives of pages, labels, manifests, datasets.

Every outcome must be a result, a listed loss, or an error of one line.

    python tests/fuzz.py --seconds 600                  # or: make fuzz FUZZ_SECONDS=600
    python tests/fuzz.py --only pages --seed 7          # one round, in this process: to debug a finding

A round is a process of its own, with a limit of time and of memory, because a fault in a native decoder may crash or
hang it. The seed determines its whole input.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import DamageError, InputError, KuzushijiError
from cluster.manifest import read_any_manifest, read_manifest
from cluster.models import ModelManifest, read_latest, resolve_model
from cluster.places import place
from cluster.storage import write_bytes
from job.verify import KINDS, verify
from preprocessing.classes import read_class_names
from preprocessing.crop import MAX_PAGE_BYTES, PageFault
from preprocessing.dataset import DatasetManifest
from preprocessing.group_files import write_groups
from preprocessing.groups import group_pages, plan_shards
from preprocessing.labels.read import read_labels
from preprocessing.pages import list_pages, page_reader
from preprocessing.records import encode_example, frame, read_frames
from preprocessing.shards import CutGroup, resumable

MEGABYTE = 1 << 20
ROUND_SECONDS = 300  # a round takes about ten; this is for a busy machine
# The limit of a task that cuts pages, whatever the pages. The largest accepted page is a JPEG 2000 with four channels:
# OpenJPEG holds 4 bytes per pixel and channel, then Pillow 1 byte, in two copies, and then the gray image.
PAGES_MEGABYTES = 2500
JPEG_MEGABYTES = 1500  # for a progressive JPEG with four channels
DATASETS_MEGABYTES = 300  # without TensorFlow
BOMB_MEGABYTES = 512
SIZES = (0, 1, 7, 8, 9, 255, 256, 1999, 9999, 30_000, 65_500, 65_535)
MARKERS = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd", b"\xff\xe1")


@dataclass(frozen=True)
class Round:
    """The result of a round: counts of the outcomes, and the peak memory of its process."""

    outcomes: Counter[str]
    megabytes: int


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def progressive(width: int, height: int, colours: int, scans: int) -> bytes:
    """Return a small file of a gray progressive page: a scan of mean values per channel, then scans without data."""
    blocks = -(-width // 8) * -(-height // 8)
    runs, rest = divmod(blocks, (1 << 15) - 1)  # a run has at most 2**15 - 1 empty blocks
    bits = "0" + "1" * 14
    empty = bits * runs + "0" * 15 * rest if rest < 8 else bits * (runs + 1)
    empty += "1" * (-len(empty) % 8)
    out = [b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64)]
    out.append(segment(0xC2, struct.pack(">BHHB", 8, height, width, colours) + b"".join(
        bytes([colour, 0x11, 0]) for colour in range(colours)
    )))  # fmt: skip
    codes = bytes([1, *[0] * 15])  # one code of one bit
    out.append(segment(0xC4, b"\0" + codes + b"\0") + segment(0xC4, b"\x10" + codes + b"\xe0"))
    for colour in range(colours):
        out.append(segment(0xDA, bytes([1, colour, 0, 0, 0, 0])) + bytes(-(-blocks // 8)))
    for scan in range(colours, scans):
        band = 1 + scan % 63
        out.append(segment(0xDA, bytes([1, 0, 0, band, band, 0])) + _packed(empty))
    return b"".join(out) + b"\xff\xd9"


def sequential(width: int, height: int, colours: int) -> bytes:
    """Return a small file of a page in one scan, rotated by its EXIF orientation: two bits per block and channel."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    components = b"".join(bytes([colour, 0x11, 0]) for colour in range(colours))
    codes = bytes([1, *[0] * 15]) + b"\0"  # one code of one bit: no change of the mean, or end of block
    scan = bytes([colours]) + b"".join(bytes([colour, 0]) for colour in range(colours)) + b"\0\x3f\0"
    bits = 2 * colours * -(-width // 8) * -(-height // 8)
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xE1, exif),
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC0, struct.pack(">BHHB", 8, height, width, colours) + components),
            segment(0xC4, b"\0" + codes) + segment(0xC4, b"\x10" + codes),
            segment(0xDA, scan),
            bytes(bits // 8) + (bytes([(1 << 8 - bits % 8) - 1]) if bits % 8 else b""),
            b"\xff\xd9",
        )
    )


def _packed(bits: str) -> bytes:
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def good_pages() -> list[bytes]:
    """Return small files of all kinds that may have a page's name."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    colour = Image.fromarray(noise)
    gray, exif = colour.convert("L"), Image.Exif()
    exif[0x010E], exif[0x0112] = "a page", 6
    see_through = colour.copy()
    see_through.putalpha(gray)
    ways: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (gray, "JPEG", {}),
        (gray, "JPEG", {"progressive": True}),
        (colour, "JPEG", {"subsampling": "4:4:4"}),
        (colour, "JPEG", {"subsampling": "4:2:0", "exif": exif}),
        (colour, "JPEG", {"subsampling": "4:1:1", "optimize": True}),
        (colour, "JPEG", {"progressive": True, "quality": 95}),
        (colour, "JPEG", {"restart_marker_blocks": 2, "comment": b"a page"}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("CMYK"), "JPEG", {"progressive": True}),
        *((colour, kind, {}) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000")),
        *((colour, "TIFF", {"compression": how}) for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        (Image.fromarray(noise), "TIFF", {"exif": exif, "save_all": True, "append_images": [see_through]}),
        (gray.convert("1"), "TIFF", {"compression": "group4"}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 99), "TIFF", {}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 99), "PNG", {"exif": exif}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 99), "JPEG2000", {}),
        (see_through, "PNG", {}),
        (see_through, "WEBP", {"lossless": True, "exif": exif}),
        (see_through, "JPEG2000", {"no_jp2": True}),
        (colour.quantize(9), "PNG", {"transparency": 3}),
        (see_through, "WEBP", {"save_all": True, "append_images": [colour]}),
    ]
    pages = [progressive(40, 56, 3, 90), progressive(40, 56, 1, 300)]
    for image, kind, options in ways:
        out = io.BytesIO()
        image.save(out, kind, **options)
        pages.append(out.getvalue())
    return pages


def mutated(rng: random.Random, good: list[bytes]) -> bytes:
    """Return one of the files with one, two or four mutations."""
    data = bytearray(rng.choice(good))
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(WAYS)(rng, data, good)
    return bytes(data)


def _flip(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    del data[rng.randint(0, len(data)) :]


def _splice(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    other = rng.choice(good)
    data[rng.randint(0, len(data)) :] = other[rng.randint(0, len(other)) :]


def _repeat(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    """Repeat a part, often one that begins with a marker."""
    begin = max(data.find(rng.choice(MARKERS)), 0) if rng.random() < 0.5 else rng.randint(0, len(data))
    end = begin + rng.choice((1, 2, 20, 70, 200, 2000))
    data[begin:begin] = data[begin:end] * rng.choice((1, 2, 30, 200))


def _zero(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    begin = rng.randint(0, len(data))
    count = len(data[begin : begin + rng.choice((1, 4, 40, 400))])
    data[begin : begin + count] = bytes(count)


def _insert(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    at = rng.randint(0, len(data))
    data[at : at + rng.choice((0, 8))] = rng.randbytes(rng.choice((1, 2, 8, 300)))


def _resize(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    """Change height and width in the header of a JPEG, and sometimes channels and sampling."""
    found = [at for marker in MARKERS[:3] if (at := data.find(marker)) > 0]
    if found:
        data[found[0] + 5 : found[0] + 9] = struct.pack(">HH", rng.choice(SIZES), rng.choice(SIZES))
        if rng.random() < 0.3:
            data[found[0] + 9 : found[0] + 12] = bytes([rng.randint(0, 5), rng.randint(0, 255), rng.randint(0, 255)])


def _number(rng: random.Random, data: bytearray, good: list[bytes]) -> None:
    """Overwrite bytes with a number that is small, large or negative, as if in a header."""
    at, size = rng.randint(0, len(data)), rng.choice((1, 2, 4, 8))
    data[at : at + size] = rng.choice((0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1)).to_bytes(size, "little")


WAYS: list[Callable[[random.Random, bytearray, list[bytes]], None]] = [
    _flip, _cut, _splice, _repeat, _zero, _insert, _resize, _number,
]  # fmt: skip


def fuzz_pages(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Cut a group of pages as `prepare` does. For each page: boxes in = crops out + listed losses."""
    good = good_pages()
    files = {f"fuzz_{i:05d}": mutated(rng, good) for i in range(count)}
    files |= {f"good_{i:05d}": data for i, data in enumerate(good)}
    if rng.random() < 0.3:
        with zipfile.ZipFile(folder / "pages.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for page_id, data in files.items():
                archive.writestr(f"{page_id}.jpg", data)
        return cut(list(files), folder / "pages.zip", folder)
    (folder / "pages").mkdir()
    for page_id, data in files.items():
        (folder / "pages" / f"{page_id}.jpg").write_bytes(data)
    return cut(list(files), folder / "pages", folder)


def fuzz_largest(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Cut the largest accepted pages, one after the other. All are read, within the stated memory."""
    ids = [f"page_{colours:05d}" for colours in (4, 1, 3)][:count]  # the one with four channels takes most memory
    large = "page_00000"
    with zipfile.ZipFile(folder / "pages.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for page_id in ids:
            page = progressive(9999, 9999, int(page_id[-1]), 10)
            archive.writestr(f"{page_id}.jpg", page + bytes(MAX_PAGE_BYTES - len(page)))
            del page
        if count > len(ids):
            page = sequential(16_000, 15_600, 3)
            archive.writestr(f"{large}.jpg", page + bytes(MAX_PAGE_BYTES - len(page)))
            del page
            ids.append(large)
    outcomes = cut(ids, folder / "pages.zip", folder)
    assert outcomes["pages read"] == len(ids)
    return outcomes


def fuzz_bombs(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Cut highly compressed pages of zeros. They are unpacked only up to the accepted size."""
    outcomes: Counter[str] = Counter()
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        here = folder / str(method)
        here.mkdir()
        with (
            zipfile.ZipFile(here / "pages.zip", "w", method, compresslevel=1) as archive,
            archive.open("page_00001.jpg", "w") as member,
        ):
            for _ in range(BOMB_MEGABYTES):
                member.write(bytes(MEGABYTE))
        outcomes += cut(["page_00001"], here / "pages.zip", here)
    return outcomes


def fuzz_names(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """List an archive of `count` pages."""
    entries = b"".join(
        struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0)
        + b"%07d.jpg" % i
        for i in range(count)
    )
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(entries), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (folder / "names.zip").write_bytes(entries + end)
    return Counter({"names": len(list_pages(place(folder / "names.zip")).scans)})


def cut(ids: list[str], pages: Path, folder: Path) -> Counter[str]:
    """List, plan and cut pages, and compare the result with the request."""
    cell = "U+306F 0 0 10 10 U+306F -5 -5 30 30 U+306F 20 20 99999 9 U+306F 70000 1 9 9"
    (folder / "train.csv").write_text("image_id,labels\n" + "".join(f"{page_id},{cell}\n" for page_id in ids))
    labels = read_labels(place(folder / "train.csv"))
    total = len(labels.boxes)
    splits = (np.arange(total) % 3).astype(np.int8)
    groups = group_pages(labels, list_pages(place(pages)).files_of(ids), 1)
    work, dataset = CutGroup(str(pages), str(folder / "crops")), resumable(place(folder / "crops"))
    write_groups(plan_shards(groups, np.zeros(total, np.int32), splits), dataset.progress_folder, work.attempt)
    write_bytes(dataset.plan_file, b"{}")
    report = work(0)
    found: Counter[str] = Counter()
    for shard in report.shards.values():
        data = (folder / "crops" / shard.name).read_bytes()
        records = list(read_frames(data))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert len(records) == shard.examples
        found.update(re.findall(rb"[a-z]+_[0-9]{5}", record)[-1].decode() for record in records)
    crops = found.copy()
    for loss in report.losses:
        assert loss["what"].isprintable(), loss
        found[loss["page"]] += 1
    assert found == dict.fromkeys(ids, 4), "boxes in = crops out + listed losses, of each page"
    reasons = Counter(re.sub("[0-9]+", "N", loss["what"])[:60] for loss in report.losses)
    return Counter({"pages": len(ids), "pages read": len(crops), "crops": crops.total()}) + reasons


def fuzz_archives(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Read broken archives: each is listed and read, or gives a loss, or an error of one line."""
    good = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for i, page in enumerate(good_pages()[2:5]):
                with archive.open(f"はpage_{i}.jpg", "w", force_zip64=i == 1) as member:
                    member.write(page)
        good.append(out.getvalue())
    path, outcomes = folder / "pages.zip", Counter[str]()
    for _ in range(count):
        path.write_bytes(mutated(rng, good))
        try:
            listing = list_pages(place(path))
            outcomes["listed"] += 1
            with page_reader(place(path)) as read:
                for name in listing.scans:
                    try:
                        read(name)
                        outcomes["read"] += 1
                    except (PageFault, FileNotFoundError) as error:
                        outcomes[type(error).__name__] += 1
        except KuzushijiError as error:
            outcomes[outcome_of(error)] += 1
    return outcomes


def outcome_of(error: KuzushijiError) -> str:
    """Return the type of an error. Its message must be one line of limited length that can be encoded."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert len(text.encode()) < 2000, text[:2000]
    return type(error).__name__


Row = tuple[int, int, int, int, int]  # code point, x, y, width, height
LABEL_FORMS = ("kaggle", "codh", "coco", "yolo", "curation")


def coco_of(
    page_ids: Sequence[str], boxes: Sequence[tuple[str, Row]], kinds: Sequence[int], size: tuple[int, int]
) -> dict[str, Any]:
    """Return the boxes of pages of one size in the COCO form, with these characters as categories."""
    images = [
        {"id": i, "file_name": f"{page_id}.jpg", "width": size[0], "height": size[1]}
        for i, page_id in enumerate(page_ids)
    ]
    annotations = [
        {"id": i, "image_id": page_ids.index(page_id), "category_id": code, "bbox": box, "area": box[2] * box[3],
         "iscrowd": 0}
        for i, (page_id, (code, *box)) in enumerate(boxes)
    ]  # fmt: skip
    categories = [{"id": code, "name": chr(code)} for code in kinds]
    return {"images": images, "categories": categories, "annotations": annotations}


def curation_of(boxes: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """Return the boxes of pages as an IIIF Curation."""
    members = [
        {
            "@id": f"https://example.org/canvas/{page_id}#xywh={x},{y},{w},{h}",
            "metadata": [{"label": "Char", "value": [{"resource": {"chars": chr(code)}}]}],
        }
        for page_id, (code, x, y, w, h) in boxes
    ]
    return {"selections": [{"members": members}]}


def write_form(
    form: str, rows: Mapping[str, Sequence[Row]], folder: Path, size: tuple[int, int],
    names_of: Mapping[str, Sequence[Row]] | None = None,
) -> Path:  # fmt: skip
    """Write labels into a folder in a form of other tools. Return the file, or for YOLO the folder of its files.

    size: width and height of all pages. names_of: the labels that define YOLO's classes; None: `rows`.
    """
    kinds = sorted({row[0] for boxes in (names_of or rows).values() for row in boxes})
    boxes = [(page_id, row) for page_id, page_rows in rows.items() for row in page_rows]
    folder.mkdir(parents=True, exist_ok=True)
    if form == "yolo":
        width, height = size
        (folder / "labels").mkdir(exist_ok=True)
        for page_id, page_rows in rows.items():
            text = ""
            for code, x, y, w, h in page_rows:
                shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                text += f"{kinds.index(code)} " + " ".join(f"{share:.6f}" for share in shares) + "\n"
            (folder / "labels" / f"{page_id}.txt").write_text(text)
        (folder / "classes.txt").write_text("".join(f"{chr(code)}\n" for code in kinds))
        return folder
    if form == "kaggle":
        cells = {
            page_id: " ".join(f"U+{code:04X} {x} {y} {w} {h}" for code, x, y, w, h in rows[page_id]) for page_id in rows
        }
        name, text = (
            "train.csv",
            "image_id,labels\n" + "".join(f"{page_id},{cell}\n" for page_id, cell in cells.items()),
        )
    elif form == "codh":
        lines = [f"U+{code:04X},{page_id},{x},{y},B0001,C0001,{w},{h}\n" for page_id, (code, x, y, w, h) in boxes]
        name = "book_coordinate.csv"
        text = "Unicode,Image,X,Y,Block ID,Char ID,Width,Height\n" + "".join(lines)
    elif form == "coco":
        name, text = "coco.json", json.dumps(coco_of(list(rows), boxes, kinds, size))
    else:
        name, text = "curation.json", json.dumps(curation_of(boxes), ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def fuzz_labels(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Read changed label files of every form: each is read as a whole, or refused in one line."""
    rows: dict[str, list[Row]] = {
        "a_1": [(0x306F, 1, 2, 30, 40), (0x304C, 5, 6, 70, 8)],
        "b_2": [(0x20B9F, 9, 8, 7, 6)],
    }
    outcomes: Counter[str] = Counter()
    for form in LABEL_FORMS:
        given = write_form(form, rows, folder / form, (200, 300))
        files = sorted(path for path in (folder / form).rglob("*") if path.is_file())
        good = {path: path.read_bytes() for path in files}
        for _ in range(count // len(LABEL_FORMS)):
            path = rng.choice(files)
            odd = form in ("coco", "curation") and rng.random() < 0.6
            content = json.loads(good[path]) if odd else None
            if form == "coco" and odd and rng.random() < 0.4:  # detections, or boxes alone
                boxes = [one["bbox"] for one in content["annotations"]]
                detections = [one | {"image_id": "a_1"} for one in content["annotations"]]
                content = rng.choice((detections, boxes, content | {"annotations": boxes}))
            path.write_bytes(odd_json(rng, content) if odd else mutated(rng, list(good.values())))
            try:
                labels = read_labels(place(given), bare=rng.random() < 0.5, size_of=lambda _: (200, 300))
                assert labels.starts[-1] == len(labels.boxes) == len(labels.code_points) > 0
                assert labels.page_ids == sorted(set(labels.page_ids))
                outcomes[f"{form} read"] += 1
            except KuzushijiError as error:
                outcomes[f"{form} {outcome_of(error)}"] += 1
            path.write_bytes(good[path])
    return outcomes


GOOD_MANIFESTS: list[dict[str, Any]] = [
    {
        "format": 1,
        "kind": "dataset",
        "files": [{"name": "label.labels.txt", "bytes": 12, "sha256": hashlib.sha256(b"U+306F\nrare\n").hexdigest()}],
        "shards": [{"name": "kuzushiji-test.tfrecord-00000-of-00001", "bytes": 9, "sha256": "0" * 64, "examples": 0}],
        "counts": {"test": {"boxes": 1, "examples": 0, "pages": 1, "books": 1}},
        "losses": [{"page": "a", "box": [0, 0, 1, 1], "unicode": "U+306F", "what": "page has no file"}],
        "clipped": [{"page": "a", "box": [0, 0, 1, 1]}],
        "unlabelled": ["b"],
        "seed": 42,
        "config": {"split": "random", "classes": None},
        "versions": {"numpy": "2"},
        "fingerprint": "0",
        "more_losses": 0,
        "book_rule": "volumes",
    },
    {
        "format": 1,
        "kind": "model",
        "files": [{"name": "labels.txt", "bytes": 12, "sha256": "0" * 64}],
        "dataset_manifest_sha256": "0" * 64,
        "finished_at": "2026-01-01T00:00:00Z",
    },
    {  # of 0.1.0
        "format": 1,
        "kind": "predictions",
        "files": [{"name": "pages-00000-of-00001.csv", "bytes": 12, "sha256": "0" * 64}],
        "counts": {"boxes": 2, "pages": 1, "read": 1},
        "accuracy": {},
        "losses": [{"page": "a", "box": [0, 0, 1, 1], "unicode": "U+306F", "what": "page has no file"}],
        "clipped": [],
        "model_manifest_sha256": "0" * 64,
        "fingerprint": "0",
        "versions": {"numpy": "2"},
    },
    {"run": "one", "finished_at": "2026-01-01T00:00:00Z"},
]
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**12, 10**30, -(10**400), float("nan"), float("inf"), "", "x", "../../evil", "/etc/x",
    "..", "a/b", "a\nb", "\ud800", "\0", "x" * 3000, "manifest.json", [], {}, [[]], {"a": {"b": []}}, {"\n": 1},
    {"\ud800": []}, [1, 2, 3, 4],
]  # fmt: skip


def odd_json(rng: random.Random, good: Any) -> bytes:
    """Return a manifest, or a file of labels, with some values replaced, repeated, removed, or deeply nested."""
    content = json.loads(json.dumps(good))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at: Any = content
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            change = rng.randrange(4)
            if change == 0:
                del at[key]
            elif change == 1 and isinstance(at, list):
                at += at * rng.choice((1, 50))
            else:
                at[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            break
    text = json.dumps(content)
    if rng.random() < 0.05:
        depth = rng.choice((100, 900, 5000, 100_000))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    return text.encode()


def fuzz_manifests(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Read manifests, pointers to the latest run, and lists of classes: each is read, or refused in one line."""
    texts = [json.dumps(good).encode() for good in GOOD_MANIFESTS] + [b"U+306F\r\nrare\n", b"U+306F\nU+20B9F\nrare"]
    here = place(folder)
    (folder / "label.labels.txt").write_bytes(b"U+306F\nrare\n")
    asked: list[Callable[[], object]] = [
        lambda: read_any_manifest(here, KINDS), lambda: verify(here), lambda: read_manifest(here, DatasetManifest),
        lambda: read_manifest(here, ModelManifest), lambda: read_latest(here), lambda: resolve_model(here),
        lambda: read_class_names(here / "classes.txt"),
    ]  # fmt: skip
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        odd = rng.random() < 0.6
        content = odd_json(rng, rng.choice(GOOD_MANIFESTS)) if odd else mutated(rng, texts)
        for name in ("manifest.json", "latest.json", "classes.txt"):
            (folder / name).write_bytes(content)
        for ask in asked:
            try:
                ask()
                outcomes["read"] += 1
            except KuzushijiError as error:
                outcomes[outcome_of(error)] += 1
    return outcomes


def write_dataset(folder: Path, shard: bytes, examples: int, classes: bytes = b"U+306F\nrare\n") -> Path:
    """Write a dataset of one shard as an attacker would: all hashes are right."""
    name = GOOD_MANIFESTS[0]["shards"][0]["name"]
    folder.mkdir()
    entries = []
    for file, data in ((name, shard), ("label.labels.txt", classes)):
        (folder / file).write_bytes(data)
        entries.append({"name": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = GOOD_MANIFESTS[0] | {"shards": [entries[0] | {"examples": examples}], "files": entries[1:]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def example(**other: Any) -> bytes:
    """Return a record as `prepare` writes it, but with the features in `other`. Those that are None are left out."""
    features = {"image": bytes(6400), "label": [0], "unicode": b"U+306F", "image_id": b"a_1", "box": [1, 2, 3, 4]}
    return encode_example({name: value for name, value in (features | other).items() if value is not None})


def fuzz_datasets(rng: random.Random, folder: Path, count: int) -> Counter[str]:
    """Stage datasets with records that are not crops: each is staged correctly, or refused in one line."""
    from job.data.staging import staged

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    values: list[Any] = [None, b"", b"x", bytes(6400), b"U+FFFF", b"a\nb", [], [0], [2], [-1], [1 << 40] * 4, [0] * 4]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        records = [example() for _ in range(rng.choice((1, 2, 9)))]
        at = rng.randrange(len(records))
        if rng.random() < 0.5:
            records[at] = example(**{rng.choice(("image", "label", "unicode", "image_id", "box")): rng.choice(values)})
        else:
            records[at] = mutated(rng, records)
        shard = b"".join(frame(record) for record in records)
        if rng.random() < 0.2:
            shard = mutated(rng, [shard])
        claimed = rng.choice((len(records), len(records), len(records) + 1, max(len(records) - 1, 1), 10**12))
        dataset = write_dataset(folder / str(number), shard, claimed)
        try:
            with staged(place(dataset), ["test"]) as data:
                crops = data.splits["test"]
                assert crops.images.shape == (claimed, 80, 80, 1)
                assert len(list(crops.page_ids())) == len(crops.labels) == claimed == len(records)
                assert set(crops.labels.tolist()) <= {0, 1}
                outcomes["staged"] += 1
        except (DamageError, InputError) as error:
            outcomes[outcome_of(error)] += 1
    return outcomes


# The function for each kind of input, its count per round, and its limit of memory in MB.
ROUNDS: dict[str, tuple[Callable[[random.Random, Path, int], Counter[str]], int, int]] = {
    "pages": (fuzz_pages, 1000, PAGES_MEGABYTES),
    "largest": (fuzz_largest, 4, JPEG_MEGABYTES),
    "bombs": (fuzz_bombs, 1, BOMB_MEGABYTES),
    "names": (fuzz_names, 1_000_000, PAGES_MEGABYTES),
    "archives": (fuzz_archives, 1000, PAGES_MEGABYTES),
    "labels": (fuzz_labels, 1000, PAGES_MEGABYTES),
    "manifests": (fuzz_manifests, 500, PAGES_MEGABYTES),
    "datasets": (fuzz_datasets, 100, DATASETS_MEGABYTES),
}


CHANGING = [kind for kind in ROUNDS if kind not in ("largest", "bombs", "names")]  # that depend on the seed


def run_round(kind: str, seed: int, count: int | None = None) -> Round:
    """Run a round in a process of its own.

    Raises:
        AssertionError: a forbidden outcome, a crash, a hang, or too much memory.
    """
    command = [sys.executable, __file__, "--only", kind, "--seed", str(seed), "--count", str(count or ROUNDS[kind][1])]
    again = f"found by: python tests/fuzz.py {' '.join(command[2:])}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ROUND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"a hang, {again}") from None
    assert done.returncode == 0, f"exit code {done.returncode}, {again}\n{done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["megabytes"] <= ROUNDS[kind][2], f"{result['megabytes']} MB of memory, {again}"
    return Round(Counter(result["outcomes"]), result["megabytes"])


def play_round(kind: str, seed: int, count: int | None = None) -> Round:
    """Run a round in this process."""
    make, usual, _ = ROUNDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = make(random.Random(f"{kind} {seed}"), Path(folder), count or usual)
    # Not getrusage's ru_maxrss, which begins with the size of the process that started this one.
    peak = re.search(r"VmHWM:\s+([0-9]+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return Round(outcomes, int(peak[1]) // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="no round is begun after these (600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="of the first round (a new one)")
    parser.add_argument("--only", choices=ROUNDS, help="one round of this kind, in this process")
    parser.add_argument("--count", type=int, help="of the files of that round")
    given = parser.parse_args()
    if given.only:
        done = play_round(given.only, given.seed, given.count)
        sys.stdout.write(json.dumps({"outcomes": done.outcomes, "megabytes": done.megabytes}) + "\n")
        return
    end, seed = time.monotonic() + given.seconds, given.seed
    sys.stdout.write(f"seed {seed}\n")
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in ROUNDS}
    most = dict.fromkeys(ROUNDS, 0)
    while time.monotonic() < end:
        for kind in ROUNDS if seed == given.seed else CHANGING:
            done = run_round(kind, seed)
            totals[kind] += done.outcomes
            most[kind] = max(most[kind], done.megabytes)
        seed += 1
    for kind, outcomes in totals.items():
        counts = ", ".join(f"{what} {count}" for what, count in outcomes.most_common())
        sys.stdout.write(f"{kind}: at most {most[kind]} MB; {counts}\n")


if __name__ == "__main__":
    main()
