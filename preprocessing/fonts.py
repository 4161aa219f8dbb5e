"""Fonts with Japanese characters: the packaged one, and those of this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fontTools.ttLib import TTCollection, TTFont

FONT_FOLDERS = tuple(
    Path(folder).expanduser()
    for folder in ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
)
HIRAGANA = frozenset(range(0x3042, 0x3094))


@dataclass(frozen=True)
class Font:
    """One face: its file, its number in the file (0 unless the file is a collection) and its name."""

    path: str
    index: int
    name: str


def find_fonts(folders: Iterable[Path] = FONT_FOLDERS) -> tuple[Font, ...]:
    """Fonts with all hiragana, sorted by file name; the packaged one if there is no other.

    Unreadable files are skipped. A collection gives its first such face: its others are mostly the same shapes for
    other languages.
    """
    suffixes = (".ttf", ".otf", ".ttc")
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in suffixes}
    found = (_japanese_face(path) for path in sorted(files, key=lambda path: (path.name, str(path))))
    return tuple(font for font in found if font) or (packaged_font(),)


def _japanese_face(path: Path) -> Font | None:
    collection = path.suffix.lower() == ".ttc"
    try:
        with path.open("rb") as file:
            faces = TTCollection(file, lazy=True).fonts if collection else [TTFont(file, lazy=True)]
            for index, face in enumerate(faces):
                if HIRAGANA.issubset(face.getBestCmap() or {}):
                    return Font(str(path), index, face["name"].getBestFullName() or path.stem)
    except Exception:  # fontTools raises many kinds for a damaged file, which is nobody's concern here
        return None
    return None


@cache
def coverage(font: Font) -> frozenset[int]:
    """The code points that a font draws."""
    with TTFont(font.path, fontNumber=font.index, lazy=True) as face:
        return frozenset(face.getBestCmap() or {})


@cache
def packaged_font() -> Font:
    """The font that comes with a package we depend on. The package isn't imported: that would load matplotlib."""
    package = find_spec("matplotlib_fontja")
    assert package is not None
    assert package.origin is not None
    return Font(str(Path(package.origin).parent / "fonts" / "ipaexg.ttf"), 0, "IPAexGothic")
