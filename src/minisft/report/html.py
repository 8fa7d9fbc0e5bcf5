"""What the pages share: one file that opens offline, asks nobody for anything, and shows foreign text as text."""

import json
import platform
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

_PACKAGES = ("minisft", "torch", "transformers", "deepspeed", "sacrebleu")
# Nothing is loaded from anywhere, whatever a model may have written.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def whole_page(heading: str, kind: str, body: str, data: dict[str, Any], script: str) -> str:
    """Return a page of HTML.

    Args:
        heading: as text.
        kind: what the page is, for its title.
        body: HTML; text that is not ours is escaped in it.
        data: what the script reads.
        script: the resource that draws, after `chart.js`.
    """
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
<script type="application/json" id="data">{_inert_json(data)}</script>
<script>{_resource("chart.js")}{_resource(script)}</script>
</body>
</html>
"""


def table(heads: list[str], rows: list[tuple[list[str], bool]]) -> str:
    """Return a table of text cells; the rows marked True are the best ones."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' if text else "<td></td>" for text in heads)
    body = "".join(
        f"<tr{' class=best' if best else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, best in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def environment() -> str:
    """Name this machine's Python, system and packages."""
    versions = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; {versions}"


def _inert_json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _resource(name: str) -> str:
    return (files("minisft.report") / name).read_text(encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
