"""Reference pages made from the code: recipe keys, commands, Python API. `scripts/build_docs.py` puts them on the site.

Nothing heavy is imported: options come from the parsers, keys from the recipe's dataclasses, and the Python API from
the text of the source files.
"""

import argparse
import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import minisft
from minisft.cli import VERBS
from minisft.recipe import Recipe

SOURCE = Path(minisft.__file__).parent
# Units of the numbers of a recipe; every other number is a count, a ratio or a setting without a unit.
UNITS = {
    "data.max_length": "tokens", "data.limit": "rows", "data.test_fraction": "share of the rows",
    "data.processes": "processes", "training.processes": "processes", "training.epochs": "epochs",
    "training.max_steps": "optimizer steps", "training.batch_size": "conversations per process and micro-step",
    "training.gradient_accumulation": "micro-steps", "training.learning_rate": "per optimizer step",
    "training.warmup_ratio": "share of the steps", "training.save_every": "optimizer steps",
    "training.keep_checkpoints": "checkpoints", "training.log_every": "optimizer steps",
    "training.eval_every": "optimizer steps", "training.early_stopping": "evaluations",
    "training.sequence_parallel": "processes", "training.row_tokens": "tokens", "training.memory_limit_gb": "GB",
    "training.lora.dropout": "probability", "evaluation.max_new_tokens": "tokens", "evaluation.examples": "answers",
    "evaluation.limit": "conversations", "evaluation.batch_size": "prompts", "evaluation.top_p": "probability",
    "evaluation.processes": "processes", "evaluation.tensor_parallel_size": "GPUs",
    "evaluation.gpu_memory_utilization": "share of the memory",
}  # fmt: skip
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_ROW = re.compile(r"^\| `([a-z_.0-9]+)` \| (.*?) \| (.*) \|$")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the recipe.

    Args:
        name: The dotted name.
        type: Type and unit in words.
        default: The default as YAML, or "required".
        choices: The words that are valid, where not every text is.
    """

    name: str
    type: str
    default: str
    choices: tuple[str, ...] = ()


def recipe_keys(kind: type = Recipe, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a recipe in the order of its dataclasses; a section is no key, but `training.lora` is one."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        name, hint = prefix + entry.name, hints[entry.name]
        section = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if section is None or section is not hint:
            unit = UNITS.get(name)
            yield Key(name, _type_text(hint) + (f": {unit}" if unit else ""), _default_text(entry), _choices(hint))
        if section is not None:
            yield from recipe_keys(typing.cast(type, section), f"{name}.")


def with_types(page: str) -> str:
    """Return the text of docs/recipe.md with the type, the unit and the default of each key taken from the code.

    Raises:
        ValueError: The page documents a key that does not exist, lacks one, or states another default.
    """
    keys = {key.name: key for key in recipe_keys()}
    missing, section, lines = set(keys), "", []
    for line in page.splitlines():
        if heading := re.match(r"## (?:`(\w+)`)?", line):
            section = f"{heading[1]}." if heading[1] else ""
        if line == "| key | default | meaning |":
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        elif found := _ROW.match(line):
            name = section + found[1]
            if name not in keys:
                raise ValueError(f"docs/recipe.md documents `{name}`, which is no key of the recipe")
            key = keys[name]
            if found[2] != key.default:
                raise ValueError(f"docs/recipe.md gives {found[2]} as default of `{name}`; the code has {key.default}")
            missing.discard(name)
            if unnamed := [choice for choice in key.choices if choice not in found[3]]:
                raise ValueError(f"docs/recipe.md does not name the values {unnamed} of `{name}`")
            lines.append(f"| `{found[1]}` | {key.type} | {key.default} | {found[3]} |")
        elif line != "|---|---|---|":
            lines.append(line)
    if missing:
        raise ValueError(f"docs/recipe.md does not document {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


def _type_text(hint: object) -> str:
    if hint in _NAMES:
        return _NAMES[hint]  # type: ignore[index]
    parts = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "choice" if len(parts) > 1 else f"`{parts[0]}`"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_type_text(part) for part in parts if part is not types.NoneType))
    if origin is list or hint is list:
        return "list" if not parts or parts[0] is typing.Any else f"list of {_type_text(parts[0])}s"
    return "mapping"


def _choices(hint: object) -> tuple[str, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(choice for part in typing.get_args(hint) for choice in _choices(part))


def _default_text(entry: dataclasses.Field) -> str:
    if entry.default_factory is not dataclasses.MISSING:
        value = entry.default_factory()
        return f"[{', '.join(value)}]" if isinstance(value, list) else "{}"
    if entry.default is dataclasses.MISSING:
        return "required"
    if entry.default is None or isinstance(entry.default, bool):
        return {None: "null", True: "true", False: "false"}[entry.default]
    if isinstance(entry.default, float) and 0 < entry.default < 1e-3:
        digits, exponent = f"{entry.default:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    return str(entry.default)


# --- commands ---------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return the page of all commands with their options, from the parsers that read the command line."""
    lines = [
        "# Commands",
        "",
        "Made from the parsers of the command line. `minisft COMMAND --help` prints the same. Words such as",
        "`training.epochs=3` change single keys of the [recipe](recipe.md). Exit status: 0 done; 2 an error that you",
        "can fix; 1 any other error. Which file each command writes: [the run folder](run_folder.md).",
        "",
    ]
    for name, verb in VERBS.items():
        parser = verb.parser(name)
        lines += [f"## minisft {name}", "", f"{_sentence(verb.summary)}", "", "```text"]
        lines += [(parser.usage or parser.format_usage()).replace("%(prog)s", parser.prog), "```", ""]
        options = [action for action in parser._actions if action.option_strings and action.dest != "help"]
        shown = [action for action in options if action.help != argparse.SUPPRESS]
        if shown:
            lines += ["| option | meaning |", "|---|---|"]
            lines += [f"| {_option_text(action)} | {_cell(_sentence(_help_text(action)))} |" for action in shown]
            lines.append("")
    return "\n".join(lines)


def _option_text(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        choices = "|".join(map(str, action.choices)) if action.choices else ""
        value = f" {choices or action.metavar or action.dest.upper()}"
    return ", ".join(f"`{name}{value}`" for name in action.option_strings)


def _help_text(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    default = action.default
    silent = default in (None, False, True, [], argparse.SUPPRESS) or "default" in text or action.nargs == 0
    return text if silent else f"{text} (default {default})"


def _sentence(text: str) -> str:
    first = text[:1].upper() if re.match(r"[a-z]+\b(?!\.)", text) else text[:1]
    return first + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


# --- Python API -------------------------------------------------------------------------------------------


def python_page() -> str:
    """Return the page of the names that `import minisft` offers, with their signatures and docstrings."""
    lines = [
        "# Python API: reference",
        "",
        "Made from the docstrings. [The Python API](api.md) shows how the parts are used together.",
        "",
    ]
    for name in sorted(minisft.__all__, key=lambda name: (not name.islower(), name.lower())):
        if name == "__version__":
            continue
        node = _definition(SOURCE / (minisft._MODULES[name].replace(".", "/") + ".py"), name)
        lines += [f"## minisft.{name}", ""]
        lines += [*_signature(node, name), *_docstring(node)]
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                lines += [f"### {name}.{member.name}", "", *_signature(member, member.name), *_docstring(member)]
    return "\n".join(lines)


def _definition(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    raise ValueError(f"{path} does not define {name}")


def _signature(node: ast.FunctionDef | ast.ClassDef, name: str) -> list[str]:
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
        is_dataclass = any("dataclass" in ast.unparse(part) for part in node.decorator_list)
        return ["```python", f"{name}({', '.join(fields)})", "```", ""] if is_dataclass else []
    returns = f" -> {_unquoted(ast.unparse(node.returns))}" if node.returns else ""
    if any(ast.unparse(part) in ("property", "cached_property") for part in node.decorator_list):
        return ["```python", name + returns.replace(" -> ", ": "), "```", ""]
    arguments = [_argument(text) for text in _split_arguments(ast.unparse(node.args)) if text != "self"]
    text = f"{name}({', '.join(arguments)}){returns}"
    if len(text) > 90:
        text = f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returns}"
    return ["```python", text, "```", ""]


def _argument(text: str) -> str:
    """Return `name: type = default` of an argument as `ast.unparse` writes it."""
    name, colon, rest = text.partition(": ")
    kind, equals, default = rest.rpartition("=")
    if not colon or not equals:
        return f"{name}{colon}{_unquoted(rest)}"
    default = default.replace("'", '"')
    return f"{name}: {_unquoted(kind)} = {default}"


def _unquoted(annotation: str) -> str:
    return annotation.strip("'\"")


def _split_arguments(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Return a docstring as Markdown: its sections Args, Returns and Raises become lists."""
    lines, in_section = [], False
    for line in (ast.get_docstring(node) or "").splitlines():
        if found := re.fullmatch(r"(Args|Raises|Returns|Yields|Attributes):", line):
            lines += [f"**{ {'Args': 'Arguments'}.get(found[1], found[1]) }**", ""]
            in_section = True
        elif in_section and (entry := re.match(r"    (\*{0,2}\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith("    "):
            in_list = lines[-1].startswith(("- ", "  "))
            lines.append(f"{'  ' if in_list else ''}{line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return [*lines, ""]
