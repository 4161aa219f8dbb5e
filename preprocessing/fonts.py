"""Fonts with Japanese characters: the packaged font, and the fonts installed on this machine."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fontTools.ttLib import TTCollection, TTFont

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
HIRAGANA = frozenset(range(0x3042, 0x3094))


@dataclass(frozen=True)
class Font:
    """One font face: its file, its index in the file (0 unless the file is a collection), and its name."""

    path: str
    index: int
    name: str


def find_fonts() -> tuple[Font, ...]:
    """Return the fonts of this machine that have all hiragana, or the packaged font if there are none."""
    # `Path.expanduser` raises for a user without a home directory, as in some containers.
    return japanese_fonts(Path(os.path.expanduser(folder)) for folder in FONT_FOLDERS) or (packaged_font(),)


def japanese_fonts(folders: Iterable[Path]) -> tuple[Font, ...]:
    """Return the fonts below the folders that have all hiragana, sorted by file name.

    Files that can't be read are skipped. Of a collection, only the first such face is returned: its other faces mostly
    have the same shapes, for other languages.
    """
    suffixes = (".ttf", ".otf", ".ttc")
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in suffixes}
    faces = (_japanese_face(path) for path in sorted(files, key=lambda path: (path.name, str(path))))
    return tuple(font for font in faces if font)


def _japanese_face(path: Path) -> Font | None:
    """Return the first face of a file that has all hiragana, or None if there is none or the file can't be read."""
    collection = path.suffix.lower() == ".ttc"
    try:
        with path.open("rb") as file:
            faces = TTCollection(file, lazy=True).fonts if collection else [TTFont(file, lazy=True)]
            for index, face in enumerate(faces):
                if HIRAGANA.issubset(face.getBestCmap() or {}):
                    return Font(str(path), index, face["name"].getBestFullName() or path.stem)
    except Exception:  # fontTools raises many types for damaged files, and any damaged font can be skipped
        return None
    return None


@cache
def coverage(font: Font) -> frozenset[int]:
    """Return the code points that a font maps to a glyph. The glyph may be blank."""
    with TTFont(font.path, fontNumber=font.index, lazy=True) as face:
        return frozenset(face.getBestCmap() or {})


@cache
def packaged_font() -> Font:
    """Return the font that the dependency matplotlib-fontja ships.

    The package is located without importing it, because importing it would load matplotlib.
    """
    package = find_spec("matplotlib_fontja")
    assert package is not None
    assert package.origin is not None
    return Font(str(Path(package.origin).parent / "fonts" / "ipaexg.ttf"), 0, "IPAexGothic")
