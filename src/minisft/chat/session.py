"""A conversation with one model: prompts, the context limit, and streamed answers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minisft.data.conversation import Message
    from minisft.data.encoder import Encoder
    from minisft.evaluation.generation import Generated, Sampling
    from minisft.evaluation.kv_cache import PromptCache


@dataclass
class Session:
    """A conversation with one model.

    Args:
        model: The model, in eval mode.
        encoder: Renders prompts and decodes answers.
        system: The system prompt; "": none.
        max_new_tokens: The most tokens of an answer.
        sampling: Sampling settings; None: greedy decoding.
        turns: The messages so far, without the system prompt.
        cache: Keys and values of the last prompt and answer.
        answer_count: Number of answers so far. It is added to the seed, so that `/regen` samples another answer.
    """

    model: "PreTrainedModel"
    encoder: "Encoder"
    system: str = ""
    max_new_tokens: int = 512
    sampling: "Sampling | None" = None
    turns: list["Message"] = field(default_factory=list)
    cache: "PromptCache | None" = None
    answer_count: int = 0

    def messages(self) -> list["Message"]:
        """Return the conversation with the system prompt."""
        from minisft.data.conversation import Message

        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def reset(self) -> None:
        self.turns = []

    def prompt(self) -> list[int]:
        """Return the token ids of the prompt for the next answer.

        Raises:
            UserError: The template refuses the conversation.
        """
        from minisft.data.renderers.base import RefusedError

        try:
            return self.encoder.encode_prompt(self.messages())
        except RefusedError as refusal:
            fix = "leave the system prompt out" if refusal.reason.startswith("system") else "change the message"
            raise UserError("chat", refusal.problem, f"{fix}, or talk to another model") from None

    def set_system(self, text: str) -> None:
        """Set the system prompt.

        Raises:
            UserError: The template refuses it; the earlier system prompt stays.
        """
        from minisft.data.conversation import Message

        question = [] if self.turns and self.turns[-1].role == "user" else [Message("user", "Hello")]
        replace(self, system=text, turns=[*self.turns, *question]).prompt()
        self.system = text

    def fit(self) -> int:
        """Drop the oldest exchanges until a quarter of the context (or a full answer) is free; return their number.

        Raises:
            UserError: The last message alone is too long, or the template refuses the conversation.
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
        """Answer the conversation, which must end with a user's message, and append the answer to it.

        Args:
            on_text: Called with each new piece of text; it stops the answer by returning True.

        Raises:
            UserError: The template refuses the conversation.
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
            if text.endswith("\ufffd"):  # the bytes so far end within a character: wait for the rest
                return on_text("")
            piece, shown = text[len(shown) :], text
            return on_text(piece)

        sampling = replace(self.sampling, seed=self.sampling.seed + self.answer_count) if self.sampling else None
        self.answer_count += 1
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
        reasoning, content = self.encoder.split_answer(generated.ids)
        self.turns.append(Message("assistant", content, reasoning=reasoning))
        return generated


def load_model_and_encoder(
    name: str, trust_remote_code: bool, base: str | None = None, template: str = "auto"
) -> "tuple[PreTrainedModel, Encoder]":
    """Load a model, by folder or name, and the encoder that renders its prompts and decodes its answers.

    Args:
        name: Name or folder of the model.
        trust_remote_code: Run code from the folder.
        base: The base model if the folder holds adapters; None: the base model that the adapters name.
        template: Name of a template or a .jinja file; auto: the model's own.

    Raises:
        UserError: There is no such model, it has no chat template, or there is no template of that name.
    """
    from minisft.data.encoder import Encoder
    from minisft.data.renderers.templates import NATIVE_TEMPLATES
    from minisft.models import load_tokenizer, resolve_model

    folder = resolve_model(name, trust_remote_code, adapters=True).folder
    tokenizer = load_tokenizer(folder, trust_remote_code)
    try:
        encoder = Encoder(tokenizer, template)
    except UserError as error:
        if error.where != "data.template":
            raise
        fix = f"name the one that the model was trained with: --template {'|'.join(NATIVE_TEMPLATES)}, or a .jinja file"
        raise UserError("--template", error.problem, fix) from None
    return load_for_chat(name, trust_remote_code, base), encoder


def load_for_chat(name: str, trust_remote_code: bool, base: str | None = None) -> "PreTrainedModel":
    """Load the model alone, in eval mode, on the GPU if there is one, or over several GPUs."""
    from minisft.evaluation.generation import inference_dtype
    from minisft.evaluation.placement import load_for_inference
    from minisft.models import is_adapter, resolve_model

    folder = resolve_model(name, trust_remote_code, adapters=True).folder
    base_folder = resolve_model(base, trust_remote_code).folder if base and is_adapter(folder) else None
    return load_for_inference(folder, dtype=inference_dtype(), trust_remote_code=trust_remote_code, base=base_folder)
