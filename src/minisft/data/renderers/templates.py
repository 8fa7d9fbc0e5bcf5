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

NATIVE_TEMPLATES = ("mistral", "mistral-v1", "mistral-v3", "chatml", "llama3", "zephyr")
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
        name: mistral-v1, mistral-v3 or mistral-text (v1's rule on a tokenizer of another family).
        controls: Whether [INST] and [/INST] are control tokens (v3) or text (v1).
        tools: Whether tools, calls and results have control tokens too.
        bos: The BOS token that the template writes, or "".
        eos: The token that ends every answer.
        gap: The space that a joint encoding needs where mistral-common encodes separately, "" or " ".
        gap_after_control: The same after a control token.
    """

    name: str
    controls: bool
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

_TEXT_MACRO = """
{%- macro text(message) -%}
{{- message['content'] or '' }}
{%- for call in message.get('tool_calls') or [] %}
{{- '\\n' if message['content'] or not loop.first else '' }}
{{- {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}
{%- endfor %}
{%- endmacro %}
"""
_TOOLS_SET = """
{%- set parts = namespace(tools='') %}
{%- if tools %}
{%- set parts.tools = '@' %}
{%- for tool in tools %}
{%- set parts.tools = parts.tools + '\\n' + (tool | tojson) %}
{%- endfor %}
{%- endif %}
""".replace("@", TOOLS_INTRODUCTION)


_CONTENT_MACRO = "{%- macro text(message) -%}{{- message['content'] or '' }}{%- endmacro %}"
_TOOLS_LIST = """
{%- set parts = namespace(tools=[], function={}) %}
{%- for tool in tools or [] %}
{%- set given = tool['function'] if 'function' in tool else tool %}
{%- set parts.function = {'name': given['name'], 'description': given['description'] or '',
                          'parameters': given['parameters'] or {}} %}
{%- for key, value in given.items() if key not in ('name', 'description', 'parameters', 'strict', 'type') %}
{%- set parts.function = dict(parts.function, **{key: value}) %}
{%- endfor %}
{%- set parts.tools = parts.tools + [{'type': 'function', 'function': parts.function}] %}
{%- endfor %}
"""
_TOOLS_IN_SYSTEM = """
{%- if parts.tools %}{%- set ns.system = ns.system + (@JOIN if ns.system else '') + parts.tools %}{%- endif %}
"""
_TOOLS_BEFORE = """
{%- if parts.tools and ns.user == @PLACE %}
{{- '[AVAILABLE_TOOLS]' + @GAP + (parts.tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
"""
_RESULT_AS_USER = "{{- @OPENER + message['content'] + @CLOSER }}"
_RESULT = """
{%- set value = message['content'] or '{}' %}
{%- set is_json = value[:1] in ('[', '{') or value in ('true', 'false', 'null')
                  or value | int | string == value or value | float | string == value %}
{{- '[TOOL_RESULTS]' + @GAP + '{"content": ' + (value if is_json else value | tojson) }}
{%- if message.get('tool_call_id') %}{{- ', "call_id": ' + (message['tool_call_id'] | tojson) }}{%- endif %}
{{- '}[/TOOL_RESULTS]' }}
"""
_CALLS = """
{%- for call in message.get('tool_calls') or [] %}
{%- set arguments = call['function']['arguments'] %}
{{- '[TOOL_CALLS]' + @GAP + '[' if loop.first else ', ' }}
{{- '{"name": ' + (call['function']['name'] | tojson) + ', "arguments": ' }}
{{- arguments if arguments is string else arguments | tojson }}
{%- if call.get('id') and call['id'] != 'null' %}{{- ', "id": ' + (call['id'] | tojson) }}{%- endif %}
{{- '}]' if loop.last else '}' }}
{%- endfor %}
"""
_MISTRAL = """{# minisft: @NAME #}
@TEXT@TOOLS
{%- set ns = namespace(system='', users=0, user=0) %}
{%- for message in messages %}
{%- if message['role'] == 'system' and message['content'] %}
{%- set ns.system = ns.system + (@JOIN if ns.system else '') + message['content'] %}
{%- elif message['role'] == 'user' %}{%- set ns.users = ns.users + 1 %}{%- endif %}
{%- endfor %}
@IN_SYSTEM
{{- @BEGIN }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- set ns.user = ns.user + 1 %}
@BEFORE_USER
{{- @OPENER }}
{%- if ns.system and ns.user == @PLACE %}{{- ns.system + @JOIN }}{%- endif %}
{{- message['content'] + @CLOSER }}
{%- elif message['role'] == 'tool' %}
@RESULT
{%- elif message['role'] == 'assistant' %}
{%- set written = text(message)@STRIP %}
{{- @ANSWER_GAP + written if written else '' }}
@CALLS
{{- @EOS }}
{{- @TURN_GAP if not loop.last else '' }}
{%- endif %}
{%- endfor %}
"""


def turn_jinja(template: TurnTemplate, answer_end: str) -> str:
    """Return the Jinja twin of a turn template; `answer_end` is the token that ends an answer."""
    header, closer = template.open_turn("@").split("@")
    names = "".join(f" if role != {_quote(role)} else {_quote(name)}" for role, name in template.role_names.items())
    trim = " | trim" if template.trim else ""
    system = _quote(template.open_turn("system"))
    end, after = _quote(template.end), _quote(template.after)
    return (
        "{# minisft: " + template.name + " #}" + _TEXT_MACRO + _TOOLS_SET + "{{- " + _quote(template.begin) + " }}\n"
        "{%- if parts.tools and messages[0]['role'] != 'system' %}"
        "{{- " + f"{system} + parts.tools + {end} + {after}" + " }}{%- endif %}\n"
        "{%- for message in messages %}\n"
        "{%- set role = message['role'] %}\n"
        "{%- set content = text(message)" + trim + " %}\n"
        "{%- if loop.first and role == 'system' and parts.tools %}"
        "{%- set content = content + " + _quote(JOIN) + " + parts.tools %}{%- endif %}\n"
        "{{- " + _quote(header) + " + (role" + names + ") + " + _quote(closer) + " + content }}\n"
        "{{- " + f"{_quote(answer_end)} if role == 'assistant' else {end}" + " }}\n"
        "{{- " + after + " }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- " + _quote(template.open_turn("assistant")) + " }}{%- endif %}\n"
    )


def mistral_jinja(template: MistralTemplate) -> str:
    """Return the Jinja twin of a Mistral form: the same ids for texts whose joint and separate encodings are equal."""
    if template.controls:
        opener, closer = "[INST]" + template.gap_after_control, "[/INST]"
        answer_gap, place, strip = template.gap_after_control, "ns.users", ".rstrip(' ')"
    else:
        opener, closer = "[INST] ", " [/INST]"
        answer_gap, place, strip = template.gap, "1", ""
    turn_gap = "" if template.controls else template.gap_after_control
    parts = {
        "TEXT": _CONTENT_MACRO if template.tools else _TEXT_MACRO,
        "TOOLS": _TOOLS_LIST if template.tools else _TOOLS_SET,
        "IN_SYSTEM": "" if template.tools else _TOOLS_IN_SYSTEM,
        "BEFORE_USER": _TOOLS_BEFORE if template.tools else "",
        "RESULT": _RESULT if template.tools else _RESULT_AS_USER,
        "CALLS": _CALLS if template.tools else "",
    }
    values = {
        "OPENER": _quote(opener),
        "CLOSER": _quote(closer),
        "BEGIN": _quote(template.bos + (turn_gap if template.bos else "")),
        "ANSWER_GAP": _quote(answer_gap),
        "TURN_GAP": _quote(turn_gap),
        "GAP": _quote(template.gap_after_control),
        "EOS": _quote(template.eos),
        "JOIN": _quote(JOIN),
        "NAME": template.name,
        "STRIP": strip,
        "PLACE": place,
    }
    return _fill(_fill(_MISTRAL, parts), values)


def _fill(text: str, values: Mapping[str, str]) -> str:
    return re.sub(f"@({'|'.join(values)})\\b", lambda name: values[name[1]], text)


def _quote(text: str) -> str:
    """Return a text as a Jinja string literal."""
    escaped = re.sub(r"[\\']", lambda match: "\\" + match.group(), text)
    return "'" + escaped.replace("\n", "\\n") + "'"
