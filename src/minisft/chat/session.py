"""A conversation with one model: what is sent, what fits, what comes back."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from minisft.data.conversation import Message
    from minisft.data.encoder import Encoder
    from minisft.evaluation.generation import Generated, Sampling
    from minisft.evaluation.kv_cache import PromptCache


@dataclass
class Session:
    """A conversation with one model.

    Args:
        model: in eval mode.
        encoder: renders and decodes.
        system: the system prompt, "" for none.
        max_new_tokens: of an answer.
        sampling: None for greedy.
        turns: what was said.
        cache: of the last prompt and answer.
        asked: answers so far; each has a seed of its own, so that `/regen` draws anew.
    """

    model: "PreTrainedModel"
    encoder: "Encoder"
    system: str = ""
    max_new_tokens: int = 512
    sampling: "Sampling | None" = None
    turns: list["Message"] = field(default_factory=list)
    cache: "PromptCache | None" = None
    asked: int = 0

    def messages(self) -> list["Message"]:
        from minisft.data.conversation import Message

        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def reset(self) -> None:
        self.turns = []

    def prompt(self) -> list[int]:
        """The ids to send for the next answer.

        Raises:
            UserError: the template refuses the conversation.
        """
        from minisft.data.renderers.base import RefusedError

        try:
            return self.encoder.encode_prompt(self.messages())
        except RefusedError as refusal:
            whole = "leave the system prompt out" if refusal.reason.startswith("system") else "say it otherwise"
            raise UserError("chat", refusal.problem, f"{whole}, or talk to another model") from None

    def set_system(self, text: str) -> None:
        """Sets the system prompt.

        Raises:
            UserError: the template refuses it; the earlier one stays.
        """
        from minisft.data.conversation import Message

        question = [] if self.turns and self.turns[-1].role == "user" else [Message("user", "Hello")]
        replace(self, system=text, turns=[*self.turns, *question]).prompt()
        self.system = text

    def fit(self) -> int:
        """Drops the oldest exchanges until a quarter of the context (or a whole answer) is free; returns how many.

        Raises:
            UserError: the last message alone is too long, or the template refuses the conversation.
        """
        from minisft.evaluation.generation import context_length

        context, length = context_length(self.model.config), len(self.prompt())
        if context is None:
            return 0
        dropped, reserve = 0, min(self.max_new_tokens, context // 4)
        while length + reserve > context:
            later = [place for place, turn in enumerate(self.turns) if place > 0 and turn.role == "user"]
            if not later:
                if length < context:
                    break
                fix = "shorten it, or the system prompt"
                raise UserError("chat", f"{length} tokens do not fit the model's context of {context}", fix)
            self.turns, dropped = self.turns[later[0] :], dropped + 1
            length = len(self.prompt())
        return dropped

    def answer(self, on_text: Callable[[str], bool | None]) -> "Generated":
        """The model's answer to the conversation, which must end in a user's message; it joins the conversation.

        Args:
            on_text: called with each new piece of text; True stops the answer.

        Raises:
            UserError: the template refuses the conversation.
        """
        from minisft.data.conversation import Message
        from minisft.evaluation.generation import generate
        from minisft.evaluation.kv_cache import PromptCache

        ids: list[int] = []
        shown = ""

        def note(row: int, token: int) -> bool | None:
            nonlocal shown
            ids.append(token)
            text = self.encoder.decode_answer(ids)
            if text.endswith("\ufffd"):  # in the middle of a character
                return on_text("")
            piece, shown = text[len(shown) :], text
            return on_text(piece)

        sampling = replace(self.sampling, seed=self.sampling.seed + self.asked) if self.sampling else None
        self.asked += 1
        self.cache = self.cache or PromptCache([])
        [generated] = generate(
            self.model,
            [self.prompt()],
            stop_token_ids=self.encoder.stop_token_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            on_token=note,
            prompt_cache=self.cache,
        )
        text = self.encoder.decode_answer(generated.ids)
        on_text(text[len(shown) :])
        self.turns.append(Message("assistant", text))
        return generated


def load_model_and_encoder(
    name: str, trust_remote_code: bool, base: str | None = None, template: str = "auto"
) -> "tuple[PreTrainedModel, Encoder]":
    """A model to talk to, by folder or name, and what renders and decodes for it.

    `base` names the base model where the folder holds adapters; None: the one that they name.

    Raises:
        UserError: there is no such model, it has no chat template, or there is no template of that name.
    """
    from minisft.models import load_tokenizer, resolve_model

    folder = resolve_model(name, trust_remote_code, adapters=True).folder
    encoder = _encoder(load_tokenizer(folder, trust_remote_code), template)
    return load_for_chat(name, trust_remote_code, base), encoder


def _encoder(tokenizer: "PreTrainedTokenizerFast", template: str) -> "Encoder":
    from minisft.data.encoder import Encoder
    from minisft.data.renderers.templates import NATIVE_TEMPLATES

    try:
        return Encoder(tokenizer, template)
    except UserError as error:
        if error.where != "data.template":
            raise
        fix = f"name the one that the model was trained with: --template {'|'.join(NATIVE_TEMPLATES)}, or a .jinja file"
        raise UserError("--template", error.problem, fix) from None


def load_for_chat(name: str, trust_remote_code: bool, base: str | None = None) -> "PreTrainedModel":
    """The model alone, in eval mode on the device at hand."""
    import torch

    from minisft.evaluation.generation import inference_dtype
    from minisft.models import is_adapter, load_model, resolve_model

    folder = resolve_model(name, trust_remote_code, adapters=True).folder
    under = resolve_model(base, trust_remote_code).folder if base and is_adapter(folder) else None
    model = load_model(folder, dtype=inference_dtype(), trust_remote_code=trust_remote_code, base=under)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
