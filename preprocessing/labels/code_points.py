"""Code points of characters, and their notation `U+306F`."""

import re
import unicodedata

LARGEST = 0x10FFFF  # of Unicode
UNKNOWN = -1  # the code point of a box without a character

# Categories of Unicode: controls, format characters, surrogates and spaces.
INVISIBLE = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")

_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")


def code_point_name(code_point: int) -> str:
    return f"U+{code_point:04X}"


def name_if_known(code_point: int) -> str | None:
    return None if code_point == UNKNOWN else code_point_name(code_point)


def parse_code_point(text: str) -> int:
    """Parse the Unicode notation of a character: return 0x306F for `U+306F`.

    Raises:
        ValueError: the text is not in this notation, or is a surrogate, which is not a character.
    """
    match = _CODE_POINT.fullmatch(text)
    value = int(match[1], 16) if match else -1
    if not 0 <= value <= LARGEST or 0xD800 <= value <= 0xDFFF or code_point_name(value) != text:
        raise ValueError(f"a code point must look like U+306F. Received: {text[:40]!r}")
    return value


def parse_character(text: str) -> int:
    """Return the code point of a character that is written as itself or in Unicode notation: `は` or `U+306F`.

    Raises:
        ValueError: the text is neither, or a space or another invisible character.
    """
    # Compose only texts of several code points, such as か with a voicing mark: NFC would change single ideographs too.
    character = unicodedata.normalize("NFC", text) if 1 < len(text) <= 4 else text
    if len(character) == 1 and unicodedata.category(character) in INVISIBLE:
        raise ValueError(f"a character must be visible. Received: U+{ord(character):04X}")
    if len(character) == 1:
        return ord(character)
    if _CODE_POINT.fullmatch(text):
        return parse_code_point(text)
    raise ValueError(f"a character must be one character or look like U+306F. Received: {text[:40]!r}")


def character_if_any(text: str) -> int:
    """Return the code point as `parse_character`, or `UNKNOWN` for other names, such as a detector's `text`."""
    try:
        return parse_character(text)
    except ValueError:
        return UNKNOWN
