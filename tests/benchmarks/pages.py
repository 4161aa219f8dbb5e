"""From pages to crops: one core against the study's code and against decoding only, then all cores with Ray Data."""

import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import simplejpeg
from PIL import Image
from test_crops import study_crop

from benchmarks.pairs import Ratio, compare
from cluster.manifest import read_manifest
from cluster.places import place
from preprocessing.config import PrepareConfig
from preprocessing.crop import clip_box, crop
from preprocessing.dataset import DatasetManifest
from preprocessing.labels.read import read_labels
from preprocessing.prepare import prepare
from preprocessing.sample.sample import sample
from preprocessing.scan import decode_scan

REAL = Path(__file__).parents[3] / "shared" / "kuzushiji"


@dataclass(frozen=True)
class Page:
    data: bytes
    boxes: list[list[int]]


@dataclass(frozen=True)
class Source:
    """A few full-size pages, with their labels."""

    images: Path
    labels: Path

    def pages(self) -> list[Page]:
        labels = read_labels(place(self.labels))
        ends = labels.starts[1:]
        boxes = [labels.boxes[begin:end].tolist() for begin, end in zip(labels.starts, ends, strict=False)]
        return [
            Page((self.images / f"{page_id}.jpg").read_bytes(), of_page)
            for page_id, of_page in zip(labels.page_ids, boxes, strict=True)
        ]

    def repeated(self, times: int, folder: Path) -> "Source":
        """Return the same pages under other names, as hard links, so that they take no space on the disk."""
        source = Source(folder / "images", folder / "labels.csv")
        source.images.mkdir(parents=True)
        rows = pd.read_csv(self.labels, dtype=str)
        copies = []
        for time_ in range(times):
            copies.append(rows.assign(image_id=f"{time_:05d}-" + rows["image_id"]))
            for page_id in rows["image_id"]:
                os.link(self.images / f"{page_id}.jpg", source.images / f"{time_:05d}-{page_id}.jpg")
        pd.concat(copies).to_csv(source.labels, index=False)
        return source


def source_in(folder: Path) -> Source:
    """Return the real pages if they are there, otherwise drawn pages of the same size."""
    if not REAL.is_dir():
        sample(folder / "drawn", num_pages=3)
        return Source(folder / "drawn" / "train_images", folder / "drawn" / "train.csv")
    # Copied, because they may be on another disk, to which hard links are not possible.
    shutil.copytree(REAL / "pages", folder / "images")
    return Source(folder / "images", REAL / "train.csv")


def cut(page: Page) -> list[np.ndarray]:
    """Cut the boxes of a page with our code, as a task of `prepare` does."""
    gray = decode_scan(page.data).image
    return [crop(gray, clip_box(box, gray.shape)) for box in page.boxes]


def cut_as_the_study(page: Page) -> list[np.ndarray]:
    gray = Image.open(io.BytesIO(page.data)).convert("L")
    return [study_crop(gray, box) for box in page.boxes]


def decode_with_pillow(page: Page) -> object:
    image = Image.open(io.BytesIO(page.data))
    image.draft("L", image.size)
    return image.load()


DECODERS: dict[str, Callable[[Page], object]] = {
    "Pillow draft": decode_with_pillow,
    "OpenCV": lambda page: cv2.imdecode(np.frombuffer(page.data, np.uint8), cv2.IMREAD_GRAYSCALE),
    "simplejpeg": lambda page: simplejpeg.decode_jpeg(page.data, colorspace="GRAY"),
    "simplejpeg, fastdct": lambda page: simplejpeg.decode_jpeg(page.data, colorspace="GRAY", fastdct=True),
}


def on_one_core(work: Callable[[Page], object], pages: Sequence[Page], rounds: int) -> float:
    """Return pages per second of CPU time."""
    begin = time.process_time()
    for _ in range(rounds):
        for page in pages:
            work(page)
    return rounds * len(pages) / (time.process_time() - begin)


def grey_levels(pages: Sequence[Page]) -> tuple[float, float]:
    """Return the mean absolute difference of our crops from the study's: over all crops, and of the worst crop."""
    differences = [
        np.abs(ours.astype(int) - theirs).mean()
        for page in pages
        for ours, theirs in zip(cut(page), cut_as_the_study(page), strict=True)
    ]
    return float(np.mean(differences)), float(max(differences))


def measure_one_core(pages: Sequence[Page], pairs: int, rounds: int) -> tuple[list[Ratio], str]:
    """Measure `crop_vs_study` and `crop_vs_decode`. Return them, and the name of the fastest decoder."""
    one_core = partial(on_one_core, pages=pages, rounds=rounds)
    tried = [{name: one_core(decode) for name, decode in DECODERS.items()} for _ in range(3)]
    fastest = max(DECODERS, key=lambda name: sorted(rates[name] for rates in tried)[1])
    ratios = [
        compare(key, at_least, "pages/s of CPU", lambda: one_core(cut), partial(one_core, theirs), pairs)
        for key, at_least, theirs in (
            ("crop_vs_study", 2.0, cut_as_the_study),
            ("crop_vs_decode", 0.8, DECODERS[fastest]),
        )
    ]
    return ratios, fastest


def measure_all_cores(source: Source, times: int, pairs: int, rounds: int, folder: Path) -> tuple[Ratio, Path]:
    """Measure `prepare_vs_crop` in the Ray that this process is connected to. Return it, and the dataset.

    Start-up does not count: the time to cut a third of the pages is subtracted.
    """
    pages, dataset, cores = source.pages(), folder / "dataset", os.cpu_count() or 1
    few, many = source.repeated(times // 3, folder / "few"), source.repeated(times, folder / "many")

    def seconds(of: Source) -> float:
        shutil.rmtree(dataset, ignore_errors=True)
        begin = time.perf_counter()
        prepare(place(of.images), place(of.labels), place(dataset), PrepareConfig())
        return time.perf_counter() - begin

    def whole() -> float:
        return (times - times // 3) * len(pages) / (-seconds(few) + seconds(many))

    def limit() -> float:
        # This takes seconds, like `whole`: the speed of a shared core varies.
        return cores * on_one_core(cut, pages, 8 * rounds)

    return compare("prepare_vs_crop", 0.8, "pages/s", whole, limit, pairs), dataset


def bytes_of_a_crop(dataset: Path) -> float:
    """Return the bytes per crop of a dataset folder, including all its files."""
    crops = read_manifest(place(dataset), DatasetManifest).counts
    total = sum(path.stat().st_size for path in dataset.iterdir())
    return total / sum(of_split["examples"] for of_split in crops.values())
