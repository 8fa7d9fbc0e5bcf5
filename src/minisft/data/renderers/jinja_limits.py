"""Limits of time and memory for Jinja templates, which come with models and are programs.

transformers renders in Jinja's sandbox, which keeps a template from files and Python, but not from running forever.
This module adds limits to that sandbox: each iteration of a loop and each call of a macro checks the clock, and the
size of a value is computed before text is multiplied, joined or padded. The address space of the process is limited
too, for cases that these checks miss. A rendering that exceeds a limit raises `TemplateLimitError`.
"""

import contextlib
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # processor time of one rendering; real templates take milliseconds
LARGEST = 1 << 26  # characters or elements of one value; a row of a data file has at most a quarter of that
LONGEST_TEMPLATE = 1 << 20  # characters; the longest of a published model has some 30,000
_HEAVIEST = 1 << 20  # containers and their elements, each as often as it is reached
_MOST_DIGITS = 1 << 16  # bits of a whole number
_HEADROOM = 1 << 30  # bytes that a rendering may add to the process
_PAGE = resource.getpagesize()
# A width or precision of a million and more, or one that is an argument, in `%` and in `format`.
_WIDE = re.compile(r"%[-#0 +]*(?:\d*\.)?(?:\d{6}|\*)|\{[^{}]*:[^{}]*\d{6}")
_OPERATORS = ("*", "**", "+", "%", "//", "-")


class TemplateLimitError(Exception):
    """A template took more time or memory than a template that renders conversations needs."""


def bound_templates() -> None:
    """Apply the limits to every template that transformers compiles in this process."""
    from transformers.utils import chat_template_utils

    utils: Any = chat_template_utils
    utils.ImmutableSandboxedEnvironment = _Environment


class _Template(jinja2.Template):
    """A template that starts the clock at each rendering."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        with _bounded_memory(), _limits_named():
            self.environment.begin()  # type: ignore[attr-defined]
            return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        self.environment.begin()  # type: ignore[attr-defined]
        with _limits_named():
            yield from _measured(super().generate(*args, **kwargs))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits."""

    template_class = _Template
    intercepted_binops = frozenset(_OPERATORS)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._end = float("inf")
        self.filters = _Filters(self.tick, self.filters | {"sum": _sum})
        self.globals["lipsum"] = _none  # no conversation needs it, and it writes unlimited text

    def from_string(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        """Compile a template; compilation computes constants, so it is limited too."""
        with _bounded_memory(), _limits_named():
            self.begin()
            return super().from_string(*args, **kwargs)

    def begin(self) -> None:
        self._end = time.thread_time() + SECONDS

    def tick(self) -> str:
        """Check the clock of this thread's processor time, which a busy or suspended machine does not advance."""
        if time.thread_time() > self._end:
            raise TemplateLimitError(f"it takes more than {SECONDS:.0f} s")
        return ""

    def tilde(self, *parts: Any) -> str:
        """Join the operands of `~`."""
        return self.concat([str(part) for part in parts])

    def made(self, value: Any) -> Any:
        """Check the size of a list, a tuple or a dict that the template writes."""
        _weigh(value)
        return value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return "".join(_measured(parts))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateLimitError(f"it has {len(source):,} characters, more than {LONGEST_TEMPLATE:,}")
        tree: Any = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            node.body.insert(0, nodes.ExprStmt(_call("tick", node), lineno=node.lineno))
        _wrap_values(tree)
        tree.set_environment(self)
        return cast(nodes.Template, tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        _check_operands(operator, left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as the sandbox has it)
        __self.tick()
        text = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps `format`
        if isinstance(text, str):
            name = getattr(__obj, "__name__", "")
            _check_numbers(args, name)
            if name in ("wrapper", "format", "format_map"):
                _check_format(text)
            elif name == "replace" and len(args) > 1:
                _check_replace(text, args[0], args[1])
            elif name == "join" and args and isinstance(args[0], (list, tuple)):
                _check_join(args[0], text)
        return __self.made(super().call(__context, __obj, *args, **kwargs))


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name; each checks the size of its arguments and of its result."""

    def __init__(self, tick: Callable[[], object], filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self._tick = tick
        for name, made in filters.items():
            self[name] = made

    def __setitem__(self, name: str, made: Callable[..., Any]) -> None:
        @wraps(made)  # what Jinja notes on a filter (`pass_context`) stays
        def checked(*args: Any, **options: Any) -> Any:
            self._tick()
            _check_numbers((*args[1:], *options.values()), f"the filter {name}")
            texts = [value for value in args if isinstance(value, str)]
            if name == "format" and texts:
                _check_format(texts[0])
            elif name == "replace" and len(texts) > 2:
                _check_replace(*texts[-3:])
            elif name == "join":
                parts = next((value for value in args if isinstance(value, (list, tuple))), ())
                _check_join(parts, options.get("d", texts[-1] if texts else ""))
            result = made(*args, **options)
            _weigh(result)
            return result

        super().__setitem__(name, checked)


def _call(name: str, at: nodes.Node, parts: list[nodes.Expr] | None = None) -> nodes.Call:
    called = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(called, parts or [], [], None, None, lineno=at.lineno)


def _wrap_values(node: nodes.Node) -> None:
    """Pass `a ~ b`, lists, tuples and dicts through the environment, since the sandbox does not intercept them."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, list):
            value[:] = [_wrapped(item) for item in value]
        else:
            setattr(node, field, _wrapped(value))


def _wrapped(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _wrap_values(value)
    if isinstance(value, nodes.Concat):
        return _call("tilde", value, value.nodes)
    if isinstance(value, (nodes.List, nodes.Dict)) or (isinstance(value, nodes.Tuple) and value.ctx == "load"):
        return _call("made", value, [value])
    return value


# --- sizes of values ---------------------------------------------------------------------------------------


def _refuse_size(size: float) -> None:
    if size > LARGEST:
        raise TemplateLimitError(f"it makes a value of {size:,.0f} characters or elements, more than {LARGEST:,}")


def _weigh(value: Any) -> None:
    """Refuse a value whose containers share so many parts that writing or comparing it would take forever."""
    if not isinstance(value, (list, tuple, dict)):
        return
    weight, size, waiting = 0, 0, [value]
    while waiting:
        container = waiting.pop()
        weight += len(container)
        inside = list(container) + list(container.values()) if isinstance(container, dict) else container
        for part in inside if weight <= _HEAVIEST else ():
            if isinstance(part, str):
                size += len(part)
            elif isinstance(part, (list, tuple, dict)):
                waiting.append(part)
        if weight > _HEAVIEST or size > LARGEST:
            raise TemplateLimitError(f"it makes a value of more than {_HEAVIEST:,} elements or {LARGEST:,} characters")


def _measured(parts: Iterable[str]) -> Iterator[str]:
    size = 0
    for part in parts:
        size += len(part)
        _refuse_size(size)
        yield part


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_DIGITS:
            raise TemplateLimitError("it computes with numbers of thousands of digits")
    elif operator == "*":
        times = right if isinstance(right, int) else _length(right) * (left if isinstance(left, int) else 1)
        _refuse_size(_length(left) * times)
    elif operator == "+":
        _refuse_size(_length(left) + _length(right))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0 if isinstance(value, (int, float)) else 1


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        _refuse_size((text.count(old)) * len(new) + len(text))


def _check_join(parts: Any, separator: Any) -> None:
    _refuse_size(sum(len(part) for part in parts if isinstance(part, str)) + len(parts) * len(str(separator)))


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateLimitError("it pads a value to a width of a million and more, or to one that it computes")


def _check_numbers(values: Iterable[Any], called: str) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TemplateLimitError(f"it passes {value:,} to {called}")


def _sum(iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Sum numbers as Jinja's filter does. Lists and texts are refused: their sum takes quadratic time."""
    total = start
    for value in iterable:
        value = value[attribute] if attribute is not None else value
        if not isinstance(value, (int, float)):
            raise TemplateLimitError("it sums values that are not numbers")
        _check_operands("+", total, value)
        total += value
    return total


def _none(*args: Any, **kwargs: Any) -> str:
    raise TemplateLimitError("it makes filler text")


# --- the process ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _limits_named() -> Iterator[None]:
    """Replace the errors of Python and Jinja about values that are too large by this module's error."""
    try:
        yield
    except (MemoryError, OverflowError, RecursionError) as error:
        raise TemplateLimitError(f"it makes too much ({type(error).__name__}: {error})".replace(": )", ")")) from None


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limit what the process may add to its address space; on other systems than Linux, this does nothing."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * _PAGE + _HEADROOM
        if soft != resource.RLIM_INFINITY and soft <= wanted:
            wanted = soft
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
