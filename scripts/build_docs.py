"""Build the documentation site: `make docs`, or `python scripts/build_docs.py`.

1. The pages of docs/ and the reference pages made from the code are written to build/docs.
2. Zensical builds site/ from them, as mkdocs.yml says.
3. Every page is copied to site/ as Markdown too, with llms.txt and llms-full.txt (https://llmstxt.org).
4. Every link and anchor of the site is checked.

The generated pages are not committed, so none of them can be out of date.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import reference_pages
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "site"
SUMMARY = (
    "Supervised fine-tuning (SFT) of causal language models on conversations, with guarantees that tests verify: exact "
    "tokens, exact loss, the same trajectory under every ZeRO stage, and a score for every checkpoint."
)
_LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
_MOST_WORDS = 40  # of the description of a page in llms.txt


@dataclass(frozen=True)
class Page:
    """A page of the site: its section and title in the navigation, its file name, and its text as Markdown."""

    section: str
    title: str
    name: str
    text: str


def main() -> int:
    try:
        pages = stage_pages(STAGED)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    zensical = Path(sys.executable).with_name("zensical")
    status = subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT).returncode
    if status:
        return status
    write_for_agents(SITE, pages)
    broken = broken_links(SITE.rglob("*"), SITE)
    print("\n".join([*broken, f"{len(pages)} pages in {SITE.relative_to(ROOT)}/, {len(broken)} broken links"]))
    return 1 if broken else 0


# --- pages ------------------------------------------------------------------------------------------------


def stage_pages(folder: Path, root: Path = ROOT) -> list[Page]:
    """Write all pages, with what they show and link to, into `folder`; return them in the order of the navigation.

    Raises:
        ValueError: The navigation in mkdocs.yml names a page that does not exist, or lacks one; or docs/recipe.md
            contradicts the code.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "docs", folder)
    texts = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.md")}
    texts["recipe.md"] = reference_pages.with_types(texts["recipe.md"])
    texts["commands.md"] = reference_pages.commands_page()
    texts["python_reference.md"] = reference_pages.python_page()
    navigation = list(_navigation(root))
    named = [name for _, _, name in navigation]
    if named_wrongly := sorted(set(named) ^ set(texts)):
        raise ValueError(f"mkdocs.yml: either its nav lacks these pages, or they do not exist: {named_wrongly}")
    for name, text in texts.items():
        for linked in _LINK.findall(text):  # a file outside docs/ goes along
            if (root / linked).is_file():
                (folder / "files" / linked).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / linked, folder / "files" / linked)
        texts[name] = _for_python_markdown(_LINK.sub(r"files/\1", text))
        (folder / name).write_text(texts[name], encoding="utf-8")
    return [Page(section, title, name, texts[name]) for section, title, name in navigation]


def _navigation(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield section, title and file name of each page of mkdocs.yml; a page outside all sections is in "Start"."""
    entries = yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    for entry in entries:
        ((title, content),) = entry.items()
        for page in content if isinstance(content, list) else [entry]:
            ((name, file),) = page.items()
            yield title if isinstance(content, list) else "Start", name, file


def _for_python_markdown(text: str) -> str:
    r"""Return Markdown of docs/, which is written for CommonMark, in the form that Python-Markdown renders equally.

    A list needs an empty line before it, a nested list needs four spaces, and `\|` in code of a table is `|`.
    """
    lines: list[str] = []
    in_code = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        if not in_code and line.startswith("<!-- not run:"):
            continue
        if not in_code and line.startswith("|"):
            line = re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), line)
        item = re.match(r"( *)(?:[-*]|\d+\.) ", line)
        if not in_code and item:
            line = " " * len(item[1]) + line
            if lines and lines[-1] and not re.match(r" *(?:[-*]|\d+\.) |  ", lines[-1]):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


# --- for agents -------------------------------------------------------------------------------------------


def write_for_agents(site: Path, pages: Iterable[Page]) -> None:
    """Write every page as Markdown beside its HTML, their list as llms.txt, and all of their text as llms-full.txt."""
    pages = list(pages)
    lines, section = [f"# MiniSFT\n\n> {SUMMARY}"], ""
    for page in pages:
        if page.section != section:
            section = page.section
            lines.append(f"\n## {section}\n")
        lines.append(f"- [{page.title}]({page.name}): {_description(page.text)}")
        (site / page.name).write_text(page.text, encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"<!-- {page.name} -->\n\n{page.text}" for page in pages]
    (site / "llms-full.txt").write_text("\n".join([lines[0], *texts]), encoding="utf-8")


def _description(text: str) -> str:
    """Return the beginning of a page's first paragraph, without links."""
    text = re.sub(r"^```.*?^```$|^<!--.*?-->$", "", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", text)
    first = next((part for part in paragraphs if part.strip() and part.strip()[0] not in "|#![-"), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(first.split()))
    words = re.split(r"(?<=[.]) (?=[A-Z`])", plain)[0].split()
    return " ".join(words[:_MOST_WORDS]) + (" ..." if len(words) > _MOST_WORDS else "")


# --- links ------------------------------------------------------------------------------------------------


def broken_links(files: Iterable[Path], root: Path) -> list[str]:
    """Return a message for each link in the HTML, Markdown and llms.txt files among `files` that leads nowhere.

    A link to another host is not followed, and one that begins with "/" is looked up in `root`. An anchor must be the
    id of an element, or in Markdown that of a heading as GitHub writes it.
    """
    found: list[str] = []
    anchors: dict[Path, set[str]] = {}
    for path in sorted(files):
        if path.suffix not in (".html", ".md") and path.name != "llms.txt":
            continue
        for link in dict.fromkeys(_read_page(path)[0]):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            folder = root if parts.path.startswith("/") else path.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path.resolve()
            if not target.exists() or (target.is_dir() and not (target / "index.html").is_file()):
                found.append(f"{path}: {link}: there is no such file")
            elif parts.fragment and target.suffix in (".html", ".md"):
                if target not in anchors:
                    anchors[target] = _read_page(target)[1]
                if unquote(parts.fragment) not in anchors[target]:
                    found.append(f"{path}: {link}: there is no such anchor")
    return found


def _read_page(path: Path) -> tuple[list[str], set[str]]:
    """Return the links of a page, those of pictures included, and its anchors."""
    text = path.read_text(encoding="utf-8")
    reader = _LinkReader()
    reader.feed(text if path.suffix == ".html" else MarkdownIt("commonmark").enable("table").render(text))
    return reader.links, reader.ids | {_github_anchor(heading) for heading in reader.headings}


class _LinkReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.headings: list[str] = []
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.update(str(values[key]) for key in ("id", "name") if values.get(key))
        self.links += [str(values[key]) for key in ("href", "src") if values.get(key) and tag != "base"]
        if re.fullmatch(r"h[1-6]", tag):
            self._in_heading = True
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch(r"h[1-6]", tag):
            self._in_heading = False

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings[-1] += data


def _github_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
