"""One answer of a run's model to a message or a conversation, for the Python API: nothing is printed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minisft.chat.session import Session, load_model_and_encoder
from minisft.chat.terminal import check_options, choose_model
from minisft.data.conversation import Message
from minisft.errors import UserError

_ROLES = ("system", "user", "assistant")


def answer_once(
    folder: str | Path,
    message: str | Sequence[Mapping[str, str]],
    *,
    system: str | None,
    template: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    trust_remote_code: bool,
) -> str:
    """Load the model and return its answer.

    Args:
        folder: A run folder, a model folder or any other model name.
        message: The user's message, or a conversation that ends with one.
        system: The system prompt; None: none besides the conversation's own.
        template: Name of a template or a .jinja file; auto: the model's own.
        max_new_tokens: The most tokens of the answer.
        temperature: 0 for greedy decoding, above 0 for sampling.
        top_p: Probability mass to sample from.
        seed: Seed of the sampling.
        trust_remote_code: Run code from the model's folder.

    Raises:
        UserError: An argument is out of range, there is no model yet, or the conversation does not fit the context.
    """
    try:
        sampling = check_options(max_new_tokens, temperature, top_p, seed)
    except UserError as error:  # it names the command-line option instead of the argument
        raise UserError(error.where.lstrip("-").replace("-", "_"), error.problem, error.fix) from None
    prompt, turns = _conversation(message)
    if prompt is not None and system is not None:
        raise UserError("system", "the conversation has a system message too", "give one of the two")
    chosen, base = choose_model(str(folder))
    model, encoder = load_model_and_encoder(chosen, trust_remote_code, base, template)
    session = Session(model, encoder, "", max_new_tokens, sampling)
    session.set_system(prompt or system or "")
    session.turns = turns
    session.fit()
    session.answer(lambda piece: None)
    return session.turns[-1].content


def _conversation(message: str | Sequence[Mapping[str, str]]) -> tuple[str | None, list[Message]]:
    """Return the system prompt, if there is one, and the other messages, the last of which is the user's."""
    if isinstance(message, str):
        return None, [Message("user", message)]
    fix = 'give text, or dicts such as {"role": "user", "content": "Hi!"}'
    if not isinstance(message, Sequence) or not message:
        raise UserError("message", "this is not a message", fix)
    turns = []
    for number, turn in enumerate(message):
        if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            raise UserError(f"message[{number}]", f"it lacks a role ({', '.join(_ROLES)}) or a content", fix)
        turns.append(Message(turn["role"], turn["content"]))
    system = turns.pop(0).content if turns[0].role == "system" else None
    if not turns or turns[-1].role != "user":
        raise UserError("message", "the conversation does not end with a user's message", fix)
    return system, turns
