"""Chat templates by name, and their stop tokens.

There are three kinds: turn templates (a header, the text and an end for every turn), the Mistral forms (every message
is encoded separately, after mistral-common's `tokens/tokenizers/instruct.py`), and Jinja text, from a file or from the
tokenizer. Each native template also has a Jinja twin, which is saved with the model so that other tools render the
same text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minisft.data.conversation import JOIN

_MISTRAL_FORMS = ("mistral-v1", "mistral-v2", "mistral-v3", "mistral-v7", "mistral-v11", "mistral-v13")
NATIVE_TEMPLATES = ("mistral", *_MISTRAL_FORMS, "chatml", "llama3", "zephyr")
# The forms that write the system prompt, or the functions on offer, before the last turn of the user. A later turn
# moves them, so that only the last answer of a conversation has the prompt of inference.
MOVING_SYSTEM = frozenset({"mistral-v2", "mistral-v3"})
MOVING_TOOLS = MOVING_SYSTEM | {"mistral-v7", "mistral-v11"}
TOOLS_INTRODUCTION = "You can call these functions:"
EOS = "{eos}"  # as the end of a turn: the tokenizer's EOS token


@dataclass(frozen=True)
class TurnTemplate:
    """A template that writes every turn as header, text, end.

    Args:
        name: Name of the template in the recipe.
        header: Text that opens a turn, with `{role}` in place of the role's name.
        end: Text that ends every turn; where it is not a token of the tokenizer, an answer ends with EOS instead.
        after: Text between two turns.
        begin: Text that opens the conversation, "" or the BOS token.
        role_names: Roles that are written under another name.
        trim: Whether texts lose their surrounding white space.
    """

    name: str
    header: str
    end: str
    after: str
    begin: str = ""
    role_names: Mapping[str, str] = field(default_factory=dict)
    trim: bool = False

    def open_turn(self, role: str) -> str:
        return self.header.replace("{role}", self.role_names.get(role, role))


CHATML = TurnTemplate("chatml", "<|im_start|>{role}\n", "<|im_end|>", "\n")
LLAMA3 = TurnTemplate(
    "llama3",
    "<|start_header_id|>{role}<|end_header_id|>\n\n",
    "<|eot_id|>",
    "",
    begin="<|begin_of_text|>",
    role_names={"tool": "ipython"},
    trim=True,
)
ZEPHYR = TurnTemplate("zephyr", "<|{role}|>\n", EOS, "\n")
TURN_TEMPLATES = {template.name: template for template in (CHATML, LLAMA3, ZEPHYR)}


@dataclass(frozen=True)
class MistralTemplate:
    """A Mistral form on one tokenizer.

    Args:
        name: mistral-v1 and so on, or mistral-text (v1's rule on a tokenizer of another family).
        version: The number in the name. From v2 on, [INST] and [/INST] are control tokens and not text.
        tools: Whether tools, calls and results have control tokens too.
        bos: The BOS token that the template writes, or "".
        eos: The token that ends every answer.
        gap: The space that a joint encoding needs where mistral-common encodes separately, "" or " ".
        gap_after_control: The same after a control token.
    """

    name: str
    version: int
    tools: bool
    bos: str
    eos: str
    gap: str = ""
    gap_after_control: str = ""


def with_tools(system: str, tools: Sequence[str]) -> str:
    """Return a system prompt followed by the functions on offer, one JSON object per line."""
    if not tools:
        return system
    section = "\n".join([TOOLS_INTRODUCTION, *tools])
    return system + JOIN + section if system else section


# --- Jinja twins ------------------------------------------------------------------------------------------

TEXT_MACRO = """
{%- macro text(message) -%}
{{- message['content'] or '' }}
{%- for call in message.get('tool_calls') or [] %}
{{- '\\n' if message['content'] or not loop.first else '' }}
{{- {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}
{%- endfor %}
{%- endmacro %}
"""
TOOLS_SET = """
{%- set parts = namespace(tools='') %}
{%- if tools %}
{%- set parts.tools = '@' %}
{%- for tool in tools %}
{%- set parts.tools = parts.tools + '\\n' + (tool | tojson) %}
{%- endfor %}
{%- endif %}
""".replace("@", TOOLS_INTRODUCTION)


def turn_jinja(template: TurnTemplate, answer_end: str) -> str:
    """Return the Jinja twin of a turn template; `answer_end` is the token that ends an answer."""
    header, closer = template.open_turn("@").split("@")
    names = "".join(f" if role != {quote(role)} else {quote(name)}" for role, name in template.role_names.items())
    trim = " | trim" if template.trim else ""
    system = quote(template.open_turn("system"))
    end, after = quote(template.end), quote(template.after)
    return (
        "{# minisft: " + template.name + " #}" + TEXT_MACRO + TOOLS_SET + "{{- " + quote(template.begin) + " }}\n"
        "{%- if parts.tools and messages[0]['role'] != 'system' %}"
        "{{- " + f"{system} + parts.tools + {end} + {after}" + " }}{%- endif %}\n"
        "{%- for message in messages %}\n"
        "{%- set role = message['role'] %}\n"
        "{%- set content = text(message)" + trim + " %}\n"
        "{%- if loop.first and role == 'system' and parts.tools %}"
        "{%- set content = content + " + quote(JOIN) + " + parts.tools %}{%- endif %}\n"
        "{{- " + quote(header) + " + (role" + names + ") + " + quote(closer) + " + content }}\n"
        "{{- " + f"{quote(answer_end)} if role == 'assistant' else {end}" + " }}\n"
        "{{- " + after + " }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- " + quote(template.open_turn("assistant")) + " }}{%- endif %}\n"
    )


def quote(text: str) -> str:
    """Return a text as a Jinja string literal."""
    escaped = re.sub(r"[\\']", lambda match: "\\" + match.group(), text)
    return "'" + escaped.replace("\n", "\\n") + "'"
