"""A Modelfile for Ollama, whose Go template renders the text that the trained chat template renders.

Ollama executes a Go `text/template` with `.Messages`, each with `.Role` and `.Content` (its documentation, "Template"
and "Modelfile"). A Jinja template cannot be translated in general, so the trained one is compared on sample
conversations with the forms that have a Go template: turns of a header, a text and an end (ChatML, Llama 3, Zephyr),
and Mistral's [INST] forms.

Functions and calls are not translated, since Ollama's JSON has no spaces and so is another text: the template leaves
out `.Tools` and `.ToolCalls`, and results of tools where they are no plain turns. Ollama joins adjacent messages of one
role by an empty line before the template sees them. Where a form trims texts, the Go template trims ASCII white space.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from minisft.data.conversation import JOIN, ROLES
from minisft.data.renderers.templates import EOS, TURN_TEMPLATES, TurnTemplate
from minisft.errors import UserError
from minisft.exporting.gguf_vocabulary import probe_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FIX = "use export --to gguf: llama.cpp renders the Jinja template itself"

Turn = tuple[str, str]  # role and text
# Conversations whose renderings tell the forms apart: system prompts, several turns, white space, one that ends with an
# answer, braces and quotes.
_SAMPLES: tuple[tuple[Turn, ...], ...] = (
    (("user", "one"),),
    (("system", "two"), ("user", "three")),
    (("user", "four"), ("assistant", "five"), ("user", "six")),
    (("system", "seven"), ("user", "eight"), ("assistant", "nine"), ("user", "ten")),
    (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
    (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")),
    (("user", " a\n"), ("assistant", "b  "), ("user", "\tc ")),
    (("system", "  s\n"), ("user", " a\n"), ("assistant", "\n b "), ("user", "c")),
    (("user", '{{ "a" }} {% b %} """ \\n'), ("assistant", "`c` {{- . -}}"), ("user", "é 🙂")),
    (("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc"), ("user", "d")),
)
_RESULT: tuple[Turn, ...] = (("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e"))


@dataclass(frozen=True)
class TextForm:
    """A template that writes each message as a text before it, its text, and a text after it.

    Args:
        name: Name of the form.
        begin: Text before the first message.
        before: Text before a message, by role.
        after: Text after a message, by role.
        between: Text after an answer that is not the last message.
        prompt: Text before the answer to generate.
        system: Where the system prompt is written: as a turn, or before the text of the first or last user.
        default: System prompt of conversations that have none, or "".
        trim: Which texts lose white space: none, answers the spaces at their end, all texts what is around them.
    """

    name: str
    begin: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    between: str = ""
    prompt: str = ""
    system: Literal["turn", "first", "last"] = "turn"
    default: str = ""
    trim: Literal["none", "answers", "all"] = "none"

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the text of a conversation, with the prompt for the next answer where the last turn is no answer."""
        system = JOIN.join(text for role, text in turns if role == "system" and text)
        kept = [turn for turn in turns if self.system == "turn" or turn[0] != "system"]
        if self.system == "turn" and self.default and turns[0][0] != "system":
            kept.insert(0, ("system", self.default))
        users = [place for place, (role, _) in enumerate(kept) if role == "user"]
        holder = users[0 if self.system == "first" else -1] if users and self.system != "turn" else -1
        parts = [self.begin]
        for place, (role, text) in enumerate(kept):
            text = self._trim(role, text)
            if place == holder and system:
                text = system + JOIN + text
            parts += [self.before[role], text, self.after[role]]
            parts += [self.between] if role == "assistant" and place < len(kept) - 1 else []
        return "".join(parts) + (self.prompt if turns[-1][0] != "assistant" else "")

    def without(self, role: str) -> "TextForm":
        """Return the form without a role, whose messages it does not write."""
        before, after = ({key: text for key, text in part.items() if key != role} for part in (self.before, self.after))
        return replace(self, before=before, after=after)

    def _trim(self, role: str, text: str) -> str:
        if self.trim == "answers" and role == "assistant":
            return text.rstrip(" ")
        return text.strip() if self.trim == "all" else text

    def go_template(self) -> str:
        """Return the form as a Go template for Ollama; every text is a quoted string, so that no space is by chance."""
        lines = [*_TRIM_TEMPLATES[self.trim], _write(self.begin)]
        if self.system == "turn":
            if self.default:
                block = self.before["system"] + self.default + self.after["system"]
                lines.append('{{- if ne (index .Messages 0).Role "system" }}' + _write(block) + "{{ end }}")
        else:
            lines += ["{{- $holder := -1 }}", "{{- range $i, $_ := .Messages }}"]
            unset = "(eq $holder -1) " if self.system == "first" else ""
            user = '(eq .Role "user")' if unset else 'eq .Role "user"'
            lines += [
                f"{{{{- if {'and ' if unset else ''}{unset}{user} }}}}{{{{ $holder = $i }}}}{{{{ end }}}}",
                "{{- end }}",
            ]
        lines.append("{{- range $i, $_ := .Messages }}")
        lines.append("{{- $last := eq (len (slice $.Messages $i)) 1 }}")
        for place, role in enumerate(self.before):
            lines.append(f'{{{{- {"else " if place else ""}if eq .Role "{role}" }}}}')
            lines.append(_write(self.before[role]))
            if role == "user" and self.system != "turn":
                join = _write(JOIN)
                lines.append("{{- if and $.System (eq $i $holder) }}{{ $.System }}" + join + "{{ end }}")
            lines += [_content(role, self.trim), _write(self.after[role])]
            if role == "assistant" and self.between:
                lines.append("{{- if not $last }}" + _write(self.between) + "{{ end }}")
        lines.append("{{- end }}")
        if self.prompt:
            lines.append('{{- if and $last (ne .Role "assistant") }}' + _write(self.prompt) + "{{ end }}")
        lines.append("{{- end -}}")
        return "\n".join(line for line in lines if line)


def modelfile(
    tokenizer: "PreTrainedTokenizerFast",
    chat_template: str,
    *,
    stop_ids: Sequence[int],
    num_ctx: int,
    model: str = "./model.gguf",
    adapter: str | None = None,
) -> str:
    """Return a Modelfile: the model, the template, the stop tokens, and greedy decoding.

    Ollama's own repeat penalty would change greedy answers, so it is set to 1.

    Args:
        tokenizer: The tokenizer.
        chat_template: The trained template as Jinja text.
        stop_ids: The ids at which generation ends.
        num_ctx: Tokens of prompt and answer.
        model: The GGUF file, as Ollama finds it from the Modelfile.
        adapter: A GGUF adapter, or None.

    Raises:
        UserError: The template has no Go form, or a stop token cannot be written.
    """
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    lines.append(f'TEMPLATE """{go_template(tokenizer, chat_template)}"""')
    for text in dict.fromkeys(str(tokenizer.convert_ids_to_tokens(int(id))) for id in stop_ids):
        if '"""' in text or text.endswith('"') or text.startswith('"'):
            raise UserError("Modelfile", f"the stop token {text!r} cannot be quoted in it", "use export --to gguf")
        lines.append(f'PARAMETER stop """{text}"""' if "\n" in text else f'PARAMETER stop "{text}"')
    lines += [f"PARAMETER num_ctx {num_ctx}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: "PreTrainedTokenizerFast", chat_template: str) -> str:
    """Return a Go template that renders the text of a Jinja template, without a BOS that the engine adds.

    Raises:
        UserError: The template's renderings are those of no form that has a Go template.
    """
    form = find_form(tokenizer, chat_template)
    _, engine_adds_bos = probe_prompt(tokenizer, chat_template)
    if engine_adds_bos:
        form = replace(form, begin=form.begin.removeprefix(str(tokenizer.bos_token)))
    return form.go_template()


def find_form(tokenizer: "PreTrainedTokenizerFast", chat_template: str) -> TextForm:
    """Return the form that renders the samples as the Jinja template does, with the BOS that this writes.

    A sample that the template refuses, for example because it has no system prompts, does not count.

    Raises:
        UserError: There is none.
    """
    rendered = {sample: text for sample in _SAMPLES if (text := _render(tokenizer, chat_template, sample)) is not None}
    first, with_system = _SAMPLES[0], _SAMPLES[1]
    if first in rendered and with_system in rendered:
        for form in _candidates(tokenizer, rendered[first]):
            if all(form.render(sample) == text for sample, text in rendered.items()):
                known = "tool" not in form.before or form.render(_RESULT) == _render(tokenizer, chat_template, _RESULT)
                return form if known else form.without("tool")
    raise UserError(
        "chat template", "no Go form of this template is known, and Ollama renders no other templates", _FIX
    )


def _render(tokenizer: "PreTrainedTokenizerFast", chat_template: str, turns: Sequence[Turn]) -> str | None:
    """Return what the Jinja template renders; None where it refuses the conversation."""
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = turns[-1][0] != "assistant"
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template raises any exception
        return None
    return str(text)


def _candidates(tokenizer: "PreTrainedTokenizerFast", rendered: str) -> Iterator[TextForm]:
    """Yield all known forms on a tokenizer; `rendered` is the first sample, which shows a default system prompt."""
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    begins = list(dict.fromkeys([bos, ""]))
    for template, begin, trim in itertools.product(TURN_TEMPLATES.values(), begins, ("none", "all")):
        for answer_end in dict.fromkeys([template.end if template.end != EOS else eos, eos]):
            form = _turn_form(template, begin, answer_end, eos, "all" if trim == "all" else "none")
            yield form
            opener, closer = form.begin + form.before["system"], form.after["system"] + form.before["user"]
            if rendered.startswith(opener) and closer in rendered:
                yield replace(form, default=rendered[len(opener) :].partition(closer)[0])
    spaces = ("", " ")
    places: tuple[Literal["turn", "first", "last"], ...] = ("first", "last", "turn")
    trims: tuple[Literal["none", "answers", "all"], ...] = ("none", "answers", "all")
    for gaps in itertools.product(spaces, repeat=5):
        after_bos, after_opener, before_closer, before_answer, between = gaps
        for begin, place, trimmed in itertools.product(begins, places, trims):
            before = {"user": "[INST]" + after_opener, "assistant": before_answer}
            after = {"user": before_closer + "[/INST]", "assistant": eos}
            if place == "turn":  # from v7 on
                before["system"], after["system"] = "[SYSTEM_PROMPT]" + after_opener, "[/SYSTEM_PROMPT]"
            yield TextForm("mistral", begin + after_bos, before, after, between, "", place, "", trimmed)


def _turn_form(
    template: TurnTemplate, begin: str, answer_end: str, eos: str, trim: Literal["none", "answers", "all"]
) -> TextForm:
    end = eos if template.end == EOS else template.end
    after = dict.fromkeys(ROLES, end + template.after) | {"assistant": answer_end + template.after}
    before = {role: template.open_turn(role) for role in ROLES}
    return TextForm(template.name, begin, before, after, prompt=before["assistant"], trim=trim)


# --- Go's text/template -----------------------------------------------------------------------------------


def _write(text: str) -> str:
    """Return an action that writes a text, with JSON's escapes, which are among Go's."""
    return "{{- " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _content(role: str, trim: str) -> str:
    if trim == "all":
        return '{{- template "trim" .Content }}'
    return '{{- template "trim" .Content }}' if trim == "answers" and role == "assistant" else "{{- .Content }}"


# A text without its last byte is `slice . 0 (len (slice . 1))`: Go's templates cannot subtract, and have no loop.
_REST, _LAST = "(slice . 0 (len (slice . 1)))", "(slice . (len (slice . 1)))"
_SPACES = r'" " "\t" "\n" "\r" "\v" "\f"'
_TRIM_TEMPLATES: dict[str, list[str]] = {
    "none": [],
    "answers": [
        '{{- define "trim" }}{{ if . }}{{ if eq ' + _LAST + ' " " }}{{ template "trim" ' + _REST + " }}"
        "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}",
    ],
    "all": [
        '{{- define "trim" }}{{ if . }}{{ if eq (slice . 0 1) ' + _SPACES + ' }}{{ template "trim" (slice . 1) }}'
        '{{ else }}{{ template "trim_end" . }}{{ end }}{{ end }}{{ end }}',
        '{{- define "trim_end" }}{{ if . }}{{ if eq '
        + _LAST
        + " "
        + _SPACES
        + ' }}{{ template "trim_end" '
        + _REST
        + " }}"
        "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}",
    ],
}
