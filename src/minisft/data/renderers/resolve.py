"""Find the template that a recipe names, and adapt it to a tokenizer, which may lack some of its markers."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minisft.data.conversation import ROLES
from minisft.data.renderers.base import AFTER_CONTROL, CONTINUE, START, Control, MarkerSplitter, Renderer, TurnRenderer
from minisft.data.renderers.mistral import MistralRenderer
from minisft.data.renderers.mistral_jinja import mistral_jinja
from minisft.data.renderers.mistral_versions import (
    INSTRUCTION,
    REQUIRED,
    TOOLS,
    V2_OR_V3,
    choose_version,
    possible_versions,
)
from minisft.data.renderers.reasoning import AnswerForm
from minisft.data.renderers.template_options import Option, with_options
from minisft.data.renderers.templates import (
    EOS,
    NATIVE_TEMPLATES,
    TURN_TEMPLATES,
    MistralTemplate,
    TurnTemplate,
    turn_jinja,
)
from minisft.data.segment_encoder import SegmentEncoder
from minisft.errors import UserError
from minisft.files import expand_user_path
from minisft.models import MISTRAL_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ResolvedTemplate:
    """A template adapted to one tokenizer.

    Args:
        name: Name of the template; for `mistral` the form that was chosen.
        chat_template: The Jinja text to save with the model.
        renderer: Conversations to segments.
        stop_token_ids: The terminators; the first is the main one.
        markers: Names of the control tokens that the template writes.
        plain_markers: Markers that the template writes as text, since the tokenizer has no such token.
        answer_context: The context of an answer's text, such as CONTINUE.
        joint: Whether the tokenizer itself would encode a prompt and its answer jointly.
        reads_reasoning: Whether the template has a key for the reasoning of an answer.
        form: What the template writes around the reasoning of an answer; None if it writes none there.
    """

    name: str
    chat_template: str
    renderer: Renderer
    stop_token_ids: tuple[int, ...]
    markers: list[str] = field(default_factory=list)
    plain_markers: list[str] = field(default_factory=list)
    answer_context: int = START
    joint: bool = False
    reads_reasoning: bool = False
    form: AnswerForm | None = None


class TemplateResolver:
    """Find the template that a recipe names, and adapt it to a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        probe: An encoder of this tokenizer, which shows where the tokenizer puts spaces.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", probe: SegmentEncoder) -> None:
        self.tokenizer = tokenizer
        self._probe = probe
        self._added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}

    def resolve(self, template: str, options: Mapping[str, Option] | None = None) -> ResolvedTemplate:
        """Return a template, adapted to the tokenizer.

        Args:
            template: What `data.template` names: "auto", a native name, a Jinja text, or a file's path.
            options: Values for variables that a Jinja template reads, `data.template_options`.

        "auto" is the tokenizer's own template. One of Mistral whose file states its version needs none.

        Raises:
            UserError: There is no such template, the tokenizer lacks what the template needs, or the template does not
                read one of the variables.
        """
        if template == "auto":
            own = own_template(self.tokenizer)
            if not own and MISTRAL_VERSION in self.tokenizer.init_kwargs:
                return self._native("mistral")
            if not own:
                raise UserError(
                    "data.template",
                    "the model's tokenizer has no chat template of its own",
                    f"name one in the recipe, data.template: {' or '.join(NATIVE_TEMPLATES)}, or a .jinja file",
                )
            return self._jinja_or_native(own, "auto", options or {})
        if template in NATIVE_TEMPLATES:
            _refuse_options(template, options)
            return self._native(template)
        if _is_jinja(template):
            return self._jinja_or_native(template, "jinja", options or {})
        path = template_file(template)
        if path is None:
            known = ", ".join((*NATIVE_TEMPLATES, "auto"))
            raise UserError(
                "data.template", f"there is no template {template!r}", f"use one of {known} or a .jinja file's path"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(path, f"the template cannot be read ({error})", "give a readable UTF-8 file") from None
        return self._jinja_or_native(text, path.name, options or {})

    def _jinja_or_native(self, text: str, name: str, options: Mapping[str, Option]) -> ResolvedTemplate:
        """Return our own renderer where the text is the Jinja twin of a native template, else the Jinja renderer.

        A model that was trained with a native template carries its twin, and continues with the same renderer.
        """
        # 1. The twin of a native template names it in its first line.
        match = re.match(r"\{# minisft: ([\w-]+) #\}", text)
        if match:
            native = {"mistral-text": "mistral"}.get(match[1], match[1])
            if native in NATIVE_TEMPLATES:
                resolved = None
                with contextlib.suppress(UserError):  # the form is not of this tokenizer: then it is any Jinja text
                    resolved = self._native(native)
                if resolved is not None and resolved.chat_template == text:
                    _refuse_options(resolved.name, options)
                    return resolved
        # 2. Any other text is split at the tokens that it spells.
        from minisft.data.renderers.jinja import JinjaRenderer

        text = with_options(text, options) if options else text
        spelled = [token for token in self._added if token.strip() and (self._is_special(token) or token in text)]
        splitter = MarkerSplitter({token: self._control(token) for token in spelled})
        renderer = JinjaRenderer(self.tokenizer, text, splitter, frozenset(filter(self._is_special, spelled)))
        return ResolvedTemplate(
            name,
            text,
            renderer,
            renderer.stops,
            markers=spelled,
            answer_context=CONTINUE,
            joint=True,
            reads_reasoning=renderer.reads_reasoning,
            form=renderer.form,
        )

    def _native(self, name: str) -> ResolvedTemplate:
        if name in TURN_TEMPLATES:
            return self._turns(TURN_TEMPLATES[name])
        return self._mistral(name)

    def _turns(self, template: TurnTemplate) -> ResolvedTemplate:
        """Adapt a turn template: markers that the tokenizer lacks are text, and EOS ends an answer instead."""
        if template.end == EOS:
            self._require_eos(template.name)
            template = replace(template, end=str(self.tokenizer.eos_token))
        headers = "".join(map(template.open_turn, ROLES))
        written = [template.begin, template.end, *re.findall(r"<\|\w+\|>", headers)]
        controls = {name: self._control(name) for name in written if self._is_special(name)}
        stop = controls[template.end].id if template.end in controls else self._require_eos(template.name)
        if template.begin not in controls:
            template = replace(template, begin="")
        plain = [name for name in written if name and name not in controls]
        answer_end = template.end if template.end in controls else str(self.tokenizer.eos_token)
        return ResolvedTemplate(
            template.name,
            turn_jinja(template, answer_end),
            TurnRenderer(template, MarkerSplitter(controls), stop),
            (stop,),
            markers=list(controls),
            plain_markers=plain,
            answer_context=CONTINUE,
            joint=True,
        )

    def _mistral(self, name: str) -> ResolvedTemplate:
        """Choose the Mistral form by the version of the tokenizer, and adapt it."""
        # 1. The form.
        special = set(filter(self._is_special, self._added))
        stated, adds_space = self.tokenizer.init_kwargs.get(MISTRAL_VERSION), self._probe.adds_space()
        version = choose_version(name, special, stated, adds_space)
        eos = self._require_eos(name)
        # 2. The BOS token: v1 has one where the tokenizer itself puts it before a text.
        bos_id = self.tokenizer.bos_token_id
        adds_bos = bos_id is not None and self.tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos_id]
        bos = self.tokenizer.bos_token if version > 1 or adds_bos else None
        form = f"mistral-v{version}" if version > 1 or name == "mistral-v1" or bos else "mistral-text"
        # 3. The spaces that make a joint encoding equal to a separate one: in a text, and after a control token.
        gap = " " if adds_space else ""
        gap_after_control = gap if self._probe.guards[AFTER_CONTROL] else ""
        has_tools = version > 1 and special.issuperset(TOOLS)
        written = MistralTemplate(
            form, version, has_tools, bos or "", str(self.tokenizer.eos_token), gap, gap_after_control
        )
        controls = dict.fromkeys((*REQUIRED[version], *(TOOLS if has_tools else ())))
        ids = {control: self._id(control) for control in controls}
        # 4. Where tools are written in one of two ways, and the recipe does not say in which, their rows are counted.
        assumed = name == "mistral" and possible_versions(special, stated, adds_space) == V2_OR_V3
        return ResolvedTemplate(
            form,
            mistral_jinja(written),
            MistralRenderer(written, self._id(bos) if bos else None, eos, ids, assumed),
            (eos,),
            markers=list(controls),
            plain_markers=[] if version > 1 else list(INSTRUCTION),
            answer_context=START,
        )

    # --- tokens of the tokenizer ---------------------------------------------------------------------------

    def _is_special(self, name: str) -> bool:
        return name in self._added and self._added[name][1].special

    def _id(self, name: str) -> int:
        return (
            self._added[name][0]
            if name in self._added
            else int(cast("int", self.tokenizer.convert_tokens_to_ids(name)))
        )

    def _control(self, name: str) -> Control:
        id, token = self._added[name]
        return Control(id, token.lstrip, token.rstrip)

    def _require_eos(self, template: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "model", f"its tokenizer has no EOS token, with which {template} ends an answer", "set eos_token"
            )
        return int(self.tokenizer.eos_token_id)


def _refuse_options(name: str, options: Mapping[str, Option] | None) -> None:
    if options:
        fix = "leave data.template_options out, or use a Jinja template that reads these variables"
        raise UserError("data.template_options", f"the template {name} reads no variables", fix)


def own_template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the tokenizer's own chat template; the default one where it has several."""
    own: Any = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def template_file(template: str) -> Path | None:
    """Return the file that `data.template` names; None for a template's name, a Jinja text, or a missing file."""
    if template in ("auto", *NATIVE_TEMPLATES) or _is_jinja(template):
        return None
    try:
        path = expand_user_path(template, "data.template")
        return path if path.is_file() else None
    except OSError:  # a name too long
        return None


def _is_jinja(template: str) -> bool:
    return "{{" in template or "{%" in template
