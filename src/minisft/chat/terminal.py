"""Chat in the terminal: commands, streaming, and Ctrl-C.

Prompts are rendered by the module that rendered the training rows, and answers end at the trained terminators.

Answers go to stdout, everything else to stderr, so that piped output holds answers only.
"""

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.chat.session import Session, load_for_chat, load_model_and_encoder
from minisft.console import console, warn
from minisft.errors import UserError
from minisft.text import dump_json, printable

if TYPE_CHECKING:
    from minisft.evaluation.generation import Finish, Sampling


__all__ = ["Session", "chat", "choose_model"]


def chat(
    folder: str | Path,
    message: str | None = None,
    system: str | None = None,
    *,
    template: str = "auto",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Talk to a model until /exit or the end of input; with `message`, print one answer.

    Args:
        folder: a run folder (its `model/`, or its newest checkpoint while it is training), a model folder or any
            other model name.
        message: the one message to answer.
        system: a system prompt.
        template: a template's name or a .jinja file; auto: the model's own.
        max_new_tokens: of an answer.
        temperature: 0 for the likeliest token, above 0 to sample.
        top_p: when sampling, the share of probability to draw from.
        seed: when sampling.
        trust_remote_code: let code from the model's folder run.

    Raises:
        UserError: an option is out of its range, there is no such model, it has no chat template or one that refuses
            the system prompt, or the one message does not fit its context.
    """
    sampling = check_options(max_new_tokens, temperature, top_p, seed)
    chosen, base = choose_model(str(folder))
    model, encoder = load_model_and_encoder(chosen, trust_remote_code, base, template)
    session = Session(model, encoder, "", max_new_tokens, sampling)
    session.set_system(system or "")
    terminal = Terminal(session, base, trust_remote_code)
    if message is not None:
        terminal.ask(message, one_shot=True)
        return
    warn(f"{chosen}, template {encoder.template_name}. /help lists the commands.")
    while True:
        try:
            text = read_message()
            if text is None or terminal.handle(text):
                return
        except KeyboardInterrupt:
            warn("\n/exit or Ctrl-D leaves.")


def check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> "Sampling | None":
    """How to sample, None for greedy; refuses what is out of its range."""
    from minisft.evaluation.generation import Sampling

    if max_new_tokens < 1:
        raise UserError("--max-new-tokens", f"{max_new_tokens} is below 1", "give 1 or more")
    if not 0 <= temperature < math.inf:  # nor is it not a number
        raise UserError("--temperature", f"{temperature} is no temperature", "give 0, or a number above it to sample")
    if not 0 < top_p <= 1:
        raise UserError("--top-p", f"{top_p} is no share of probability", "give a number above 0 and at most 1")
    return Sampling(temperature, top_p, seed) if temperature > 0 else None


def choose_model(name: str) -> tuple[str, str | None]:
    """The model to talk to, and the base model that it was trained from where that is known.

    Raises:
        UserError: a run folder without any model yet.
    """
    from minisft.run_folder import RunFolder, load_run

    run = RunFolder(Path(name))
    if not run.is_run():
        return name, None
    base = load_run(run.root).model
    if run.is_trained():
        return str(run.model), base
    checkpoints = run.list_checkpoints()
    if not checkpoints:
        raise UserError(run.root, "this run has no model and no checkpoint yet", "train first: minisft train")
    return str(checkpoints[-1]), base


HELP = """/system TEXT   set the system prompt; without TEXT, show it
/reset         begin a new conversation (the system prompt stays)
/regen         answer the last message again
/compare       the base model's answer to the last message beside this one's
/save FILE     write the conversation as a ShareGPT line that `data.source` takes
/help          this
/exit          leave (as does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next one. //text sends a message that begins with a slash."""
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


class Terminal:
    """Commands and answers of one session."""

    def __init__(self, session: Session, base: str | None, trust_remote_code: bool) -> None:
        self.session, self.base, self.trust_remote_code = session, base, trust_remote_code
        self.base_session: Session | None = None

    def handle(self, text: str) -> bool:
        """Acts on one input; True to leave."""
        if not text.strip():
            return False
        if not text.startswith("/") or text.startswith("//"):
            self.ask(text[1:] if text.startswith("//") else text)
            return False
        command, _, rest = text.strip().partition(" ")
        if command == "/exit":
            return True
        actions = {
            "/help": lambda: warn(HELP),
            "/reset": self._reset,
            "/system": lambda: self._system(rest.strip()),
            "/regen": self._regenerate,
            "/compare": self._compare,
            "/save": lambda: self._save(rest.strip()),
        }
        action = actions.get(command)
        if action is None:
            warn(f"There is no command {command}; /help lists them. //text sends a message that begins with a slash.")
            return False
        try:
            action()
        except UserError as error:  # the session goes on
            warn(str(error))
        return False

    def ask(self, text: str, one_shot: bool = False) -> None:
        from minisft.data.conversation import Message

        self.session.turns.append(Message("user", text))
        try:
            if dropped := self.session.fit():
                warn(f"The context is full: the oldest {_count(dropped, 'exchange')} dropped.")
        except UserError as error:
            self.session.turns.pop()
            if one_shot:
                raise
            warn(str(error))
            return
        self._answer()

    def _answer(self) -> None:
        before = len(self.session.turns)
        with _interruptible() as interrupted:

            def show(piece: str) -> bool:
                _write(piece)
                return interrupted()

            try:
                generated = self.session.answer(show)
            except KeyboardInterrupt:  # the second Ctrl-C: nothing of this exchange stays
                del self.session.turns[before - 1 :]
                raise
        _write("\n")
        _say_how_it_ended(generated.finish)
        if generated.finish == "interrupted" and not generated.ids:
            del self.session.turns[before - 1 :]

    def _reset(self) -> None:
        self.session.reset()
        warn("A new conversation.")

    def _system(self, text: str) -> None:
        if text:
            self.session.set_system(text)
        warn(f"System prompt: {self.session.system or 'none'}")

    def _regenerate(self) -> None:
        if self._nothing_to("answer again"):
            return
        answer = self.session.turns.pop()
        try:
            self._answer()
        except UserError:
            self.session.turns.append(answer)
            raise

    def _compare(self) -> None:
        if self._nothing_to("compare"):
            return
        if self.base is None:
            warn("The base model is known for a run folder only: minisft chat RUN.")
            return
        if self.base_session is None:
            model = load_for_chat(self.base, self.trust_remote_code)
            self.base_session = Session(model, self.session.encoder, "", self.session.max_new_tokens)
        other = self.base_session
        other.system, other.turns = self.session.system, self.session.turns[:-1]
        with _interruptible() as interrupted:
            other.answer(lambda piece: interrupted())
        _side_by_side({"base": other.turns[-1].content, "tuned": self.session.turns[-1].content})

    def _save(self, name: str) -> None:
        if not name:
            warn("Say where: /save FILE")
            return
        turns = [{"from": _SHAREGPT[m.role], "value": m.content} for m in self.session.messages()]
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(dump_json({"conversations": turns}) + "\n")
        except OSError as error:
            warn(f"{name} cannot be written: {error.strerror}")
            return
        warn(f"Added to {name}.")

    def _nothing_to(self, problem: str) -> bool:
        if self.session.turns and self.session.turns[-1].role == "assistant":
            return False
        warn(f"There is nothing to {problem} yet.")
        return True


def read_message() -> str | None:
    """A message from stdin, None at its end; a line that ends in a backslash goes on in the next."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history
    parts: list[str] = []
    while True:
        try:
            line = input(("... " if parts else "> ") if interactive else "")
        except EOFError:
            return "\n".join(parts) if parts else None
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(parts)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While it lasts, Ctrl-C only sets a flag, which the function that it gives tells; a second one raises."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _say_how_it_ended(finish: "Finish") -> None:
    reasons = {
        "length": "(cut: the answer reached --max-new-tokens)",
        "context": "(cut: the model's context is full)",
        "interrupted": "(stopped)",
    }
    if finish in reasons:
        warn(reasons[finish])


def _side_by_side(answers: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(printable(text)) for text in answers.values()))
    console.print(table)


def _count(number: int, noun: str) -> str:
    return f"{noun} was" if number == 1 else f"{number} {noun}s were"
