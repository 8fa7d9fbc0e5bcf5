"""What the pages share: one file that opens offline, loads nothing from anywhere, and shows untrusted text as text."""

import json
import platform
from contextlib import suppress
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

_PACKAGES = ("minisft", "torch", "transformers", "deepspeed", "sacrebleu")
# The browser loads nothing from anywhere, whatever a model has written.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# The inputs that the curves' scripts read.
CURVE_CONTROLS = """<div class="controls"><label><input type="checkbox" id="log"> logarithmic</label>
<label>smoothing <input type="range" id="smooth" min="0" max="98" value="0"></label></div>"""


def whole_page(heading: str, kind: str, body: str, data: dict[str, Any], script: str) -> str:
    """Return a complete page of HTML.

    Args:
        heading: The page's heading, as plain text.
        kind: What the page is, for its title.
        body: HTML in which untrusted text is escaped.
        data: The data that the script reads.
        script: Name of the resource that draws, which runs after `chart.js`.
    """
    # The JSON must not end the script element that holds it, and old JavaScript ends a line at U+2028 and U+2029.
    json_text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    json_text = json_text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(heading)}: {escape(kind)}</title>
<style>{_resource("page.css")}</style>
</head>
<body>
<main>
<h1>{escape(heading)}</h1>
{body}
</main>
<script type="application/json" id="data">{json_text}</script>
<script>{_resource("chart.js")}{_resource(script)}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return (files("minisft.report") / name).read_text(encoding="utf-8")


def table(heads: list[str], rows: list[tuple[list[str], bool]], repeat_heads: bool = False) -> str:
    """Return a table of text cells; the rows marked True are the best ones.

    Args:
        heads: The heads of the columns.
        rows: The cells of each row, and whether it is marked.
        repeat_heads: Whether each cell has its head in `data-head`, which page.css shows on a narrow screen.
    """

    def cell(text: str, head: str) -> str:
        label = f' data-head="{escape(head, quote=True)}"' if repeat_heads and head else ""
        return f"<td{label}>{escape(text)}</td>"

    head = "".join(f'<th scope="col">{escape(text)}</th>' if text else "<td></td>" for text in heads)
    body = "".join(
        f"<tr{' class=best' if best else ''}>{''.join(map(cell, cells, heads))}</tr>" for cells, best in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def scrolling_table(heading_id: str, heads: list[str], rows: list[tuple[list[str], bool]]) -> str:
    """Return a wide table, labelled by the heading with the given id.

    It scrolls sideways where it does not fit; on a phone each row is a block with a line for each cell.
    """
    inner = table(heads, rows, repeat_heads=True)
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{heading_id}">{inner}</div>\n'


def environment() -> str:
    """Return the versions of this machine's Python, system and packages as text."""
    versions = []
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; {', '.join(versions)}"
