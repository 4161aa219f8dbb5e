"""CODH's CSV, `<book>_coordinate.csv`: a row for each character of a book.

Unicode,Image,X,Y,Block ID,Char ID,Width,Height
U+306F,100241706_00004_2,1231,3465,B0001,C0001,133,53

Six columns are read, in any order. The character may be written as itself, so a spreadsheet can have this form.
"""

from collections.abc import Iterator, Sequence

from preprocessing.labels.code_points import UNKNOWN, parse_character
from preprocessing.labels.files import LabelFile, csv_rows
from preprocessing.labels.kaggle import parse_integer
from preprocessing.labels.page_ids import id_of_file
from preprocessing.labels.table import Collected, PageBoxes

PAGE, CHARACTER = "Image", "Unicode"
BOX = ("X", "Y", "Width", "Height")
NAME_END = "_coordinate.csv"


def is_codh_header(columns: Sequence[str]) -> bool:
    """Return whether a CSV with these columns is in CODH's form. `Unicode` may be missing in files for `--boxes`."""
    return {PAGE, *BOX} <= set(columns)


def read_codh(files: Sequence[LabelFile], bare: bool) -> Iterator[PageBoxes]:
    """Yield the pages of files in CODH's form. A file named `<book>_coordinate.csv` states the book of its pages.

    bare: as in `read_labels`.

    Raises:
        InputError: a file is not text or CSV, or has a malformed row.
    """
    for file in files:
        base = file.base_name
        book = base.removesuffix(NAME_END) if base.endswith(NAME_END) and base != NAME_END else None
        for page_id, table, _ in _parse(file, bare).tables():
            yield PageBoxes(page_id, table, file.where, book)


def _parse(file: LabelFile, bare: bool) -> Collected:
    collected, ids = Collected(), dict[str, str]()
    with csv_rows(file.read(), file.where, "docs/data.md#a-spreadsheet") as reader:
        header = next(reader, [])
        if len(set(header)) != len(header) or (CHARACTER not in header and not bare):
            raise ValueError(
                f"the header must name {CHARACTER} and each column once. Received: {','.join(header)[:80]!r}"
            )
        page, *box = (header.index(name) for name in (PAGE, *BOX))
        character = header.index(CHARACTER) if CHARACTER in header else None
        for row in filter(None, reader):  # skip empty lines
            if len(row) != len(header):
                raise ValueError(f"a row must have {len(header)} columns. Received: {len(row)}")
            name = row[page]
            if name not in ids:
                ids[name] = id_of_file(name)
            text = row[character] if character is not None else ""
            code_point = UNKNOWN if bare and not text.strip() else parse_character(text)
            collected.add(ids[name], code_point, [parse_integer(row[i]) for i in box])
    return collected
