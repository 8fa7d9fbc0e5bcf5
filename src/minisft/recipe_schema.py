"""The JSON Schema of a recipe (draft 2020-12), for editors and agents.

Keys, types, choices and defaults are those of the dataclasses in `recipe`; descriptions are those of docs/recipe.md.
The schema accepts every recipe that `load_recipe` accepts. It cannot express all that `load_recipe` refuses: a key
without a value (its default) and `null` are the same in JSON, and so are `1` and `1.0`; limits of numbers and
combinations of keys are checked by the dataclasses only.
"""

import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minisft.errors import UserError
from minisft.recipe import Recipe

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ROW = re.compile(r"^\| `([\w.]+)` \| .*? \| (.*) \|$")
_LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
# A number in a text: `8e-6`, without a dot, is a text in YAML 1.1, and `load_recipe` reads it as a number.
_NUMBER = r"^\s*[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?\s*$"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe.

    Raises:
        UserError: The installation lacks docs/recipe.md.
    """
    schema = _schema_of(Recipe, "", read_descriptions())
    return {"$schema": _DRAFT, "title": "MiniSFT recipe", **schema}


def recipe_keys(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a recipe, sections and their keys, in the order of the dataclasses."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        yield prefix + entry.name
        for option in _options(hints[entry.name]):
            if is_dataclass(option):
                yield from recipe_keys(option, f"{prefix}{entry.name}.")


def read_descriptions() -> dict[str, str]:
    """Return the descriptions of docs/recipe.md by dotted key, without their links.

    Raises:
        UserError: The page is missing.
    """
    package = Path(__file__).parent
    pages = [root / "docs" / "recipe.md" for root in (package, package.parents[1])]  # of a wheel, of a checkout
    page = next((path for path in pages if path.is_file()), None)
    if page is None:
        raise UserError("docs/recipe.md", "the reference of the recipe is missing", "install MiniSFT again")
    found: dict[str, str] = {}
    prefix = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = re.fullmatch(r"## `(\w+)`", line)
            prefix = f"{section[1]}." if section else ""
        elif row := _ROW.match(line):
            found[prefix + row[1]] = _LINK.sub(r"\1", row[2])
    return found


def _schema_of(kind: Any, prefix: str, descriptions: dict[str, str]) -> dict[str, Any]:
    """Return the schema of a dataclass, whose keys have `prefix`."""
    hints = get_type_hints(kind)
    properties: dict[str, Any] = {}
    required = []
    for entry in fields(kind):
        key = prefix + entry.name
        options = _options(hints[entry.name])
        has_default = entry.default is not MISSING or entry.default_factory is not MISSING
        if has_default and type(None) not in options:
            options = (*options, type(None))  # a key without a value
        section = next((option for option in options if is_dataclass(option)), None)
        summary = str(section.__doc__).partition("\n")[0] if section and key not in descriptions else descriptions[key]
        schema = {"description": summary} | _any_of([_schema_of_type(one, key, descriptions) for one in options])
        if entry.default is not MISSING:
            schema["default"] = entry.default
        elif entry.default_factory is not MISSING and section is None:
            schema["default"] = entry.default_factory()
        if not has_default:
            required.append(entry.name)
        properties[entry.name] = schema
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _schema_of_type(option: Any, key: str, descriptions: dict[str, str]) -> dict[str, Any]:
    origin, arguments = get_origin(option), get_args(option)
    if is_dataclass(option):
        return _schema_of(option, f"{key}.", descriptions)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (list, dict) and arguments[-1] is Any:
        return {"type": "array" if origin is list else "object"}
    if origin is list:
        items = [_schema_of_type(one, key, descriptions) for one in _options(arguments[0])]
        return {"type": "array", "items": _any_of(items)}
    if origin is dict:
        values = [_schema_of_type(one, key, descriptions) for one in (*_options(arguments[1]), type(None))]
        return {"type": "object", "additionalProperties": _any_of(values)}
    if option is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _NUMBER}]}
    return {"type": _TYPES[option]}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one schema that accepts what any of `schemas` accepts, in its shortest form."""
    flat = [inner for schema in schemas for inner in (schema["anyOf"] if set(schema) == {"anyOf"} else [schema])]
    names = [schema["type"] for schema in flat if set(schema) == {"type"}]
    rest = [schema for schema in flat if set(schema) != {"type"}]
    if not rest:
        return {"type": names[0] if len(names) == 1 else names}
    if names == ["null"] and len(rest) == 1 and set(rest[0]) == {"enum"}:
        return {"enum": [*rest[0]["enum"], None]}
    return rest[0] if len(flat) == 1 else {"anyOf": [*rest, *({"type": name} for name in names)]}
