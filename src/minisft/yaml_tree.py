"""YAML text as a tree of values with their line numbers: strict about keys, and limited in size and depth.

PyYAML parses the text; this module adds the limits that PyYAML lacks. References (`*name`) can repeat a value, so that
a few lines expand to billions of values; a value can contain itself; brackets can nest deeper than Python can recurse.
Here each of these is an error with its line number.
"""

from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from minisft.errors import UserError

MOST_CHARACTERS = 1 << 20  # parsed in about 5 seconds
MOST_VALUES = 20_000  # each use of a reference counts
MOST_DEPTH = 40
_MOST_DIGITS = 100  # in a number; PyYAML parses some forms in quadratic time
_TAG = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp")
# What PyYAML raises for a value that does not match its tag, such as `!!int x`, or for a date such as 2024-13-45.
_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


class NotYamlError(UserError):
    """The text is not YAML, or a value in it cannot be read."""


@dataclass
class Node:
    """A YAML value with its line number.

    Args:
        value: a dict of nodes, a list of nodes, or a scalar.
        line: from 1; None: it did not come from a file.
        empty: nothing at all was written, as in `key:`. The word `null` is not empty; both have the value None.
        place: where it came from, for messages, where it has no line.
    """

    value: Any
    line: int | None
    empty: bool = False
    place: str = "the command line"

    def plain(self) -> Any:
        """Return the value without line numbers; keys without a value are left out."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items() if not child.empty}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def parse(text: str, where: str, *, lines: bool = True) -> Node:
    """Parse one YAML document; a text without any value gives an empty node.

    Args:
        text: The document.
        where: The file or key, for messages.
        lines: Whether nodes and messages have line numbers; False for a value of the command line.

    Raises:
        NotYamlError: The text is not YAML, or holds a value that cannot be read.
        UserError: The text is too large or too deep, refers to itself, or gives a key twice.
    """
    if len(text) > MOST_CHARACTERS:
        problem = f"the YAML text has {len(text):,} characters, and may have {MOST_CHARACTERS:,}"
        raise UserError(where, problem, "keep long lists in files of their own")
    reader = _Reader(where, lines)
    root = reader.compose(text)
    return Node(None, None, empty=True) if root is None else reader.to_node(root, 1)


class _BoundedLoader(yaml.SafeLoader):
    """A loader that composes at most MOST_VALUES nodes, at most MOST_DEPTH deep."""

    def __init__(self, text: str, reader: "_Reader") -> None:
        super().__init__(text)
        self._reader, self._depth, self._composed = reader, 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._composed += 1
        self._reader.check_limits(self._composed, self._depth, self.peek_event())  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Reader:
    """Composes one text and turns its graph of YAML nodes into a tree."""

    def __init__(self, where: str, lines: bool) -> None:
        self._where, self._lines, self._visited = where, lines, 0

    def compose(self, text: str) -> yaml.Node | None:
        """Return the root of the graph, or None for a text without a value."""
        try:
            loader = _BoundedLoader(text, self)
            return loader.get_single_node()
        except yaml.reader.ReaderError as error:
            problem = f"the character {error.character!r} at position {error.position:,} is not allowed in YAML"
            raise NotYamlError(self._where, problem, "remove it, or write it as an escape in double quotes") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{self._where}:{mark.line + 1}" if mark and self._lines else self._where
            problem = getattr(error, "problem", None) or str(error)
            lines = text.splitlines()
            line = lines[mark.line] if mark and mark.line < len(lines) else ""
            fix = "correct the line"  # most often, a text without quotes holds a character that means something in YAML
            if any(sign in line for sign in ("?", ": ", "[", "{", "*", "&", "%", "@", "`")):
                fix += "; a text with one of ? : [ ] { } , * & % @ in it needs quotes"
            raise NotYamlError(where, f"this is not YAML ({problem})", fix) from None
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
            raise NotYamlError(self._where, f"this is not YAML ({error})", "check the escapes in it") from None

    def check_limits(self, values: int, depth: int, at: Any) -> None:
        if values > MOST_VALUES:
            problem = f"there are more than {MOST_VALUES:,} values, references (*name) counted each time they are used"
            raise UserError(self._place(at), problem, "write out what is needed, and keep long lists in files")
        if depth > MOST_DEPTH:
            problem = f"the values are nested more than {MOST_DEPTH} deep, or one refers to itself"
            raise UserError(self._place(at), problem, "write it without so many brackets, and without the reference")

    def to_node(self, node: yaml.Node, depth: int) -> Node:
        self._visited += 1
        self.check_limits(self._visited, depth, node)
        if isinstance(node, yaml.ScalarNode):
            empty = node.tag == f"{_TAG}null" and node.value == ""
            return Node(self._scalar(node), self._line(node), empty)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return Node(self._mapping(node, depth), self._line(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return Node([self.to_node(item, depth + 1) for item in node.value], self._line(node))
        raise self._unreadable(node, f"the tag {node.tag} is not supported")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged += self._merged(value_node, depth)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._unreadable(key_node, "a key must be a single word")
            key = str(key_node.value)
            if key in entries:
                raise UserError(self._place(key_node), f"the key {quoted(key)} is given twice", "remove one")
            entries[key] = child = self.to_node(value_node, depth + 1)
            if not isinstance(value_node, yaml.MappingNode):
                child.line = self._line(key_node)
        for mapping in merged:
            for key, child in mapping.value.items():
                entries.setdefault(key, child)
        return entries

    def _merged(self, node: yaml.Node, depth: int) -> list[Node]:
        """Return the mappings of a merge key, `<<: *name` or `<<: [*name, *other]`; the first one with a key wins."""
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        mappings = [self.to_node(item, depth + 1) for item in items]
        if not all(isinstance(mapping.value, dict) for mapping in mappings):
            raise self._unreadable(node, "<< takes a mapping, or a list of mappings")
        return mappings

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise self._unreadable(node, f"a number of more than {_MOST_DIGITS} characters")
        try:
            value = SafeConstructor().construct_object(node)  # type: ignore[no-untyped-call]
        except _UNREADABLE as error:
            raise self._unreadable(node, getattr(error, "problem", None) or str(error)) from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise self._unreadable(node, "a number of more than 63 bits")
        return value

    def _unreadable(self, node: yaml.Node, reason: str) -> NotYamlError:
        return NotYamlError(self._place(node), f"this value cannot be read ({reason})", "put it in quotes")

    def _line(self, at: Any) -> int | None:
        return at.start_mark.line + 1 if self._lines else None

    def _place(self, at: Any) -> str:
        return f"{self._where}:{self._line(at)}" if self._lines else self._where


def quoted(value: Any) -> str:
    """Return the `repr` of a value for a message, shortened to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
