"""Chat in the terminal, with a run's model or any model folder.

Prompts are rendered by the module that rendered the training rows, and answers end at the trained terminators.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.chat.session import Session, load_model_and_encoder
from minisft.chat.terminal import Terminal, read_message
from minisft.console import warn
from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.evaluation.sampling import Sampling

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
    sampling = _check_options(max_new_tokens, temperature, top_p, seed)
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


def _check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> "Sampling | None":
    """How to sample, None for greedy; refuses what is out of its range."""
    from minisft.evaluation.sampling import Sampling

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
    from minisft.runs import RunFolder, load_run

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
