"""Chat in the terminal: commands, streaming, and Ctrl-C.

The encoder that rendered the training rows renders the prompts, and answers end at the trained terminators.
Answers go to stdout and everything else to stderr, so that piped output holds only answers.
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
    from minisft.evaluation.generation import Sampling


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
        folder: A run folder (its `model/`, or its newest checkpoint during training), a model folder or any other
            model name.
        message: The only message to answer; None: read messages from stdin.
        system: The system prompt.
        template: Name of a template or a .jinja file; auto: the model's own.
        max_new_tokens: The most tokens of an answer.
        temperature: 0 for greedy decoding, above 0 for sampling.
        top_p: Probability mass to sample from.
        seed: Seed of the sampling.
        trust_remote_code: Run code from the model's folder.

    Raises:
        UserError: An option is out of range, there is no such model, it has no chat template or one that refuses the
            system prompt, or the only message does not fit the context.
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
    terminal.run()


def check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> "Sampling | None":
    """Return the sampling settings, None for greedy decoding.

    Raises:
        UserError: An option is out of range.
    """
    from minisft.evaluation.generation import Sampling

    if max_new_tokens < 1:
        raise UserError("--max-new-tokens", f"{max_new_tokens} is below 1", "give 1 or more")
    if not 0 <= temperature < math.inf:  # false for NaN too
        raise UserError(
            "--temperature", f"{temperature} is not a temperature", "give 0, or a number above it to sample"
        )
    if not 0 < top_p <= 1:
        raise UserError("--top-p", f"{top_p} is not a probability above 0", "give a number above 0 and at most 1")
    return Sampling(temperature, top_p, seed) if temperature > 0 else None


def choose_model(name: str) -> tuple[str, str | None]:
    """Return the model to talk to and, for a run folder, the base model that it was trained from.

    Raises:
        UserError: The run folder has neither a model nor a checkpoint yet.
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
/compare       show the base model's answer to the last message next to this one's
/save FILE     write the conversation as a ShareGPT line that `data.source` takes
/help          show this list
/exit          leave (as does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ continues on the next one. //text sends a message that begins with a slash."""
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


class Terminal:
    """Commands and answers of one session.

    Args:
        session: The conversation with the model.
        base: Name of the model's base model, for /compare; None: unknown.
        trust_remote_code: Run code from the base model's folder.
    """

    def __init__(self, session: Session, base: str | None, trust_remote_code: bool) -> None:
        self.session, self.base, self.trust_remote_code = session, base, trust_remote_code
        self.base_session: Session | None = None

    def run(self) -> None:
        """Read and handle inputs until /exit or the end of stdin."""
        while True:
            try:
                text = read_message()
                if text is None or self.handle(text):
                    return
            except KeyboardInterrupt:
                warn("\n/exit or Ctrl-D leaves.")

    def handle(self, text: str) -> bool:
        """Send one input to the model, or execute its command; return True for /exit."""
        if not text.strip():
            return False
        if not text.startswith("/") or text.startswith("//"):
            self.ask(text[1:] if text.startswith("//") else text)
            return False
        command, _, rest = text.strip().partition(" ")
        if command == "/exit":
            return True
        argument = rest.strip()
        try:
            match command:
                case "/help":
                    warn(HELP)
                case "/reset":
                    self.session.reset()
                    warn("A new conversation.")
                case "/system":
                    if argument:
                        self.session.set_system(argument)
                    warn(f"System prompt: {self.session.system or 'none'}")
                case "/regen":
                    self._regenerate()
                case "/compare":
                    self._compare()
                case "/save":
                    self._save(argument)
                case _:
                    fix = "/help lists them. //text sends a message that begins with a slash."
                    warn(f"There is no command {command}; {fix}")
        except UserError as error:  # an error of one command does not end the session
            warn(str(error))
        return False

    def ask(self, text: str, one_shot: bool = False) -> None:
        """Send a message, and print the answer.

        Args:
            text: The message.
            one_shot: Raise errors instead of printing them.

        Raises:
            UserError: The message does not fit the context, or the template refuses it; only under `one_shot`.
        """
        from minisft.data.conversation import Message

        self.session.turns.append(Message("user", text))
        try:
            if dropped := self.session.fit():
                exchanges = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
                warn(f"The context is full: the oldest {exchanges} dropped.")
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
            except KeyboardInterrupt:  # the second Ctrl-C: remove the exchange from the conversation
                del self.session.turns[before - 1 :]
                raise
        _write("\n")
        reasons = {
            "length": "(cut: the answer reached --max-new-tokens)",
            "context": "(cut: the model's context is full)",
            "interrupted": "(stopped)",
        }
        if generated.finish in reasons:
            warn(reasons[generated.finish])
        if generated.finish == "interrupted" and not generated.ids:
            del self.session.turns[before - 1 :]

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
        from rich.table import Table
        from rich.text import Text

        if self._nothing_to("compare"):
            return
        if self.base is None:
            warn("The base model is known for a run folder only: minisft chat RUN.")
            return
        if self.base_session is None:
            model = load_for_chat(self.base, self.trust_remote_code)
            self.base_session = Session(model, self.session.encoder, "", self.session.max_new_tokens)
        base = self.base_session
        base.system, base.turns = self.session.system, self.session.turns[:-1]
        with _interruptible() as interrupted:
            base.answer(lambda piece: interrupted())
        table = Table(expand=True)
        table.add_column("base", ratio=1)
        table.add_column("tuned", ratio=1)
        table.add_row(*(Text(printable(session.turns[-1].content)) for session in (base, self.session)))
        console.print(table)

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

    def _nothing_to(self, action: str) -> bool:
        """Return whether there is no answer yet, after a warning that names the action."""
        if self.session.turns and self.session.turns[-1].role == "assistant":
            return False
        warn(f"There is nothing to {action} yet.")
        return True


def read_message() -> str | None:
    """Read a message from stdin; None at its end. A line that ends in a backslash continues on the next one."""
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
    """Make Ctrl-C only set a flag, which the yielded function returns; a second Ctrl-C raises KeyboardInterrupt."""
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
