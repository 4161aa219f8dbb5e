"""Reports: one file that needs nothing beside itself, and tells what the folder holds."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import KUZUSHIJI

from cluster.manifest import DatasetManifest, read_manifest
from cluster.storage import place
from job.dataset_report import dataset_report

CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """The addresses and the text of a page; every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


@pytest.fixture(scope="module")
def of_real(real_dataset: Path) -> str:
    return dataset_report(place(real_dataset)).decode()


def test_a_report_asks_for_nothing_beside_itself(of_real: str) -> None:
    addresses = Page(of_real).addresses
    assert {urlparse(address).scheme for address in addresses if not address.startswith("#")} == {"data"}
    assert set(re.findall(r"url\(\"?(data:|#|.)", of_real)) <= {"data:", "#"}
    assert "<script" not in of_real


def test_a_dataset_is_told_as_its_manifest_has_it(of_real: str, real_dataset: Path) -> None:
    counts = read_manifest(place(real_dataset), DatasetManifest).counts
    text = Page(of_real).text
    for split, of_split in counts.items():
        assert f"{split}\n{of_split['examples']}\n{of_split['pages']}\n{of_split['books']}\n" in text
    assert "0 boxes lost, 0 clipped" in text
    classes = len((real_dataset / "label.labels.txt").read_text().splitlines()) - 1
    assert f"{classes} have a class of their own" in text


def test_a_random_split_is_told_to_have_pages_and_books_on_both_sides(of_real: str, real_dataset: Path) -> None:
    held = read_manifest(place(real_dataset), DatasetManifest).counts["test"]["examples"]
    assert f"test\n{held}\n1.0000\n{held}\n1.0000\n" in Page(of_real).text


def test_the_same_dataset_gives_the_same_report(of_real: str, real_dataset: Path) -> None:
    assert dataset_report(place(real_dataset)).decode() == of_real


def test_the_command_writes_the_report_where_it_is_asked_to(dataset: Path, tmp_path: Path) -> None:
    asked = ["report", "--dataset", dataset, "--out", tmp_path / "out"]
    done = subprocess.run([KUZUSHIJI, *asked], capture_output=True, text=True, check=True)
    assert done.stdout == f"report: {tmp_path / 'out' / 'report.html'}\n"
    Page((tmp_path / "out" / "report.html").read_text())
