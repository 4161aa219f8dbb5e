"""Self-contained HTML pages: no network, no scripts; the old characters are drawn with an embedded font."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image

from preprocessing.fonts import coverage, packaged_font
from preprocessing.labels.code_points import code_point_name

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --quiet: #666666; --line: #d8d8d8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --paper: #17181a; --quiet: #a0a0a0; --line: #3a3b3d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif, Kuzushiji; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 60rem; margin: .4rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.plots figure { margin: 0; min-width: 0; max-width: 40rem; } svg { width: 100%; height: auto; display: block; }
.crops { display: flex; flex-wrap: wrap; gap: .4rem; margin: .3rem 0 1rem; }
.crops figure { margin: 0; text-align: center; line-height: 1.3; }
.crops img { display: block; height: 64px; image-rendering: pixelated; margin: 0 auto; }
.crops figcaption, .lines { font-family: Kuzushiji, sans-serif; }
.lines { list-style: none; padding: 0; columns: 20rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0;
  text-align: left; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number, th.number { text-align: right; }
"""


def page(title: str, sections: Iterable[str]) -> bytes:
    """Return the HTML file. sections: HTML. Characters that the font lacks are replaced by their code points."""
    body = "\n".join(sections)
    missing = {ord(character) for character in body if ord(character) > 0x7F} - coverage(packaged_font())
    body = body.translate({code: code_point_name(code) for code in missing})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_font_face(title + body)}{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
""".encode(errors="replace")


def _font_face(text: str) -> str:
    """Return a CSS rule that embeds a font with the non-ASCII characters of a text."""
    font = TTFont(packaged_font().path)
    options = Options()
    options.flavor = "woff"
    options.layout_features = []
    options.notdef_outline = True
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=sorted({ord(character) for character in text if ord(character) > 0x7F}))
    subsetter.subset(font)
    font.flavor = "woff"
    font["head"].modified = font["head"].created  # so that the bytes do not depend on the time
    font.recalcTimestamp = False
    written = io.BytesIO()
    font.save(written)
    data = base64.b64encode(written.getvalue()).decode()
    return f'\n@font-face {{ font-family: Kuzushiji; src: url("data:font/woff;base64,{data}") format("woff"); }}'


def section(title: str, *parts: str) -> str:
    """Return a section with a heading. parts: HTML."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, css_class: str = "") -> str:
    """Return a paragraph. text: plain text, which is escaped."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def plots(*captioned: tuple[str, str]) -> str:
    """Return figures, side by side if the page is wide enough. captioned: SVG and caption of each."""
    figures = (f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in captioned)
    return f'<div class="plots">{"".join(figures)}</div>'


def crops(images: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> str:
    """Return pictures, shown 64 pixels high, with captions below. images: uint8, height x width."""
    figures = (
        f'<figure><img src="{_png(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div class="crops">{"".join(figures)}</div>'


def _png(image: NDArray[np.uint8]) -> str:
    written = io.BytesIO()
    Image.fromarray(image).save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def lines(texts: Sequence[str]) -> str:
    """Return a list with one text per line."""
    return '<ul class="lines">' + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. Columns of numbers are right-aligned; floats have four decimals, NaN is shown as `-`."""
    rows = list(rows)
    numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(header))]
    classes = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(f"<th{css}>{html.escape(text)}</th>" for css, text in zip(classes, header, strict=True))
    body = (
        "<tr>" + "".join(f"<td{css}>{_cell(value)}</td>" for css, value in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))
