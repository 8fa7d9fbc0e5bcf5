"""The Jinja twins of the Mistral forms, saved with the model so that other tools render the same text."""

import re
from collections.abc import Mapping

from minisft.data.conversation import JOIN
from minisft.data.renderers.templates import TEXT_MACRO, TOOLS_SET, MistralTemplate, quote

_CONTENT_MACRO = "{%- macro text(message) -%}{{- message['content'] or '' }}{%- endmacro %}"
_RESULT_MACRO = """
{%- macro written_result(message) -%}
{{- '[TOOL_RESULTS]'@ID_IN_RESULT + (@GAP + message['content'] if message['content'] else '') + '[/TOOL_RESULTS]' }}
{%- endmacro %}
"""
_ID_IN_RESULT = " + (@GAP + message['tool_call_id'] if message.get('tool_call_id') else '') + '[TOOL_CONTENT]'"
_TOOLS_LIST = """
{%- set parts = namespace(tools='') %}
{%- for tool in tools or [] %}
{%- set given = tool['function'] if 'function' in tool else tool %}
{%- set parts.tools = parts.tools + (', ' if parts.tools else '[') + '{"type": "function", "function": {"name": '
                      + (given['name'] | tojson) + ', "description": ' + ((given['description'] or '') | tojson)
                      + ', "parameters": ' + ((given['parameters'] or {}) | tojson) %}
{%- for key, value in given.items() if key not in ('name', 'description', 'parameters', 'strict', 'type') %}
{%- set parts.tools = parts.tools + ', ' + (key | tojson) + ': ' + (value | tojson) %}
{%- endfor %}
{%- set parts.tools = parts.tools + '}}' %}
{%- endfor %}
{%- if parts.tools %}{%- set parts.tools = parts.tools + ']' %}{%- endif %}
"""
_TOOLS_IN_SYSTEM = """
{%- if parts.tools %}{%- set ns.system = ns.system + (@JOIN if ns.system else '') + parts.tools %}{%- endif %}
"""
_TOOLS_BEFORE = """
{%- if parts.tools and ns.user == @TOOLS_PLACE %}
{{- '[AVAILABLE_TOOLS]' + @GAP + parts.tools + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
"""
_SYSTEM_TURN = """{%- elif message['role'] == 'system' %}
{{- '[SYSTEM_PROMPT]' + (@GAP + message['content'] if message['content'] else '') + '[/SYSTEM_PROMPT]' }}
"""
_RESULT_AS_USER = "{{- @OPENER + message['content'] + @CLOSER }}"
_PARSED_RESULT = """
{%- set value = message['content'] or '{}' %}
{%- set is_json = value[:1] in ('[', '{') or value in ('true', 'false', 'null')
                  or value | int | string == value or value | float | string == value %}
"""
_RESULT_V2 = (
    _PARSED_RESULT
    + """{%- if ns.user == ns.users %}
{{- '[TOOL_RESULTS]' + @GAP + '[{"name": ' + (message.get('name') | tojson) }}
{{- ', "content": ' + (value if is_json else value | tojson) + '}][/TOOL_RESULTS]' }}
{%- endif %}
"""
)
_RESULT_V3 = (
    _PARSED_RESULT
    + """{{- '[TOOL_RESULTS]' + @GAP + '{"content": ' + (value if is_json else value | tojson) }}
{%- if message.get('tool_call_id') %}{{- ', "call_id": ' + (message['tool_call_id'] | tojson) }}{%- endif %}
{{- '}[/TOOL_RESULTS]' }}
"""
)
_RESULT_V7 = "{{- written_result(message) }}"
_RESULTS_V11 = """
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
{%- set run = namespace(open=true, results=[]) %}
{%- for result in messages[loop.index0:] %}
{%- if result['role'] != 'tool' %}{%- set run.open = false %}
{%- elif run.open %}{%- set run.results = run.results + [result] %}{%- endif %}
{%- endfor %}
{%- for id in ns.calls %}
{%- for result in run.results if result.get('tool_call_id') == id %}{{- written_result(result) }}{%- endfor %}
{%- endfor %}
{%- for result in run.results if result.get('tool_call_id') not in ns.calls %}{{- written_result(result) }}{%- endfor %}
{%- endif %}
"""
_CALLS = """
{%- for call in message.get('tool_calls') or [] %}
{%- set arguments = call['function']['arguments'] %}
{{- '[TOOL_CALLS]' + @GAP + '[' if loop.first else ', ' }}
{{- '{"name": ' + (call['function']['name'] | tojson) + ', "arguments": ' }}
{{- arguments if arguments is string else arguments | tojson }}
@CALL_ID{{- '}]' if loop.last else '}' }}
{%- endfor %}
"""
_ID_V3 = """{%- if call.get('id') and call['id'] != 'null' %}{{- ', "id": ' + (call['id'] | tojson) }}{%- endif %}
"""
_CALLS_V11 = """
{%- for call in message.get('tool_calls') or [] %}
{%- set arguments = call['function']['arguments'] %}
{{- '[TOOL_CALLS]' + @GAP + call['function']['name'] }}
@CALL_ID{{- '[ARGS]' + @GAP + (arguments if arguments is string else arguments | tojson) }}
{%- endfor %}
"""
_ID_V11 = """{%- if call.get('id') and call['id'] != 'null' %}{{- '[CALL_ID]' + @GAP + call['id'] }}{%- endif %}
"""
_IDS_OF_CALLS = """
{%- set ns.calls = (message.get('tool_calls') or []) | map(attribute='id') | list %}
"""
_NOT_AN_EARLIER_CALL = " and (ns.user == ns.users or not message.get('tool_calls'))"
_COUNT_USERS = """{%- set ns = namespace(users=0, user=0, calls=[]) %}
{%- for message in messages if message['role'] == 'user' %}{%- set ns.users = ns.users + 1 %}{%- endfor %}"""
_JOIN_SYSTEM = """{%- set ns = namespace(system='', users=0, user=0) %}
{%- for message in messages %}
{%- if message['role'] == 'system' and message['content'] %}
{%- set ns.system = ns.system + (@JOIN if ns.system else '') + message['content'] %}
{%- elif message['role'] == 'user' %}{%- set ns.users = ns.users + 1 %}{%- endif %}
{%- endfor %}"""
_SYSTEM_IN_USER = """
{%- if ns.system and ns.user == @PLACE %}{{- ns.system + @JOIN }}{%- endif %}"""
_MISTRAL = """{# minisft: @NAME #}
@TEXT@TOOLS
@COUNT
@IN_SYSTEM
{{- @BEGIN }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- set ns.user = ns.user + 1 %}
@BEFORE_USER
{{- @OPENER }}@SYSTEM_IN_USER
{{- message['content'] + @CLOSER }}
@SYSTEM_TURN{%- elif message['role'] == 'tool' %}
@RESULT
{%- elif message['role'] == 'assistant'@IS_WRITTEN %}
{%- set written = text(message)@STRIP %}
{{- @ANSWER_GAP + written if written else '' }}
@CALLS
{{- @EOS }}
{{- @TURN_GAP if not loop.last else '' }}
{%- endif %}
{%- endfor %}
"""


def mistral_jinja(template: MistralTemplate) -> str:
    """Return the Jinja twin of a Mistral form: the same ids for texts whose joint and separate encodings are equal."""
    version = template.version
    # 1. The parts. A form without control tokens for tools writes them as text.
    parts = {
        "TEXT": TEXT_MACRO,
        "TOOLS": TOOLS_SET,
        "COUNT": _JOIN_SYSTEM if version < 7 else _COUNT_USERS,
        "IN_SYSTEM": _TOOLS_IN_SYSTEM,
        "BEFORE_USER": "",
        "SYSTEM_IN_USER": _SYSTEM_IN_USER if version < 7 else "",
        "SYSTEM_TURN": _SYSTEM_TURN if version >= 7 else "",
        "RESULT": _RESULT_AS_USER,
        "IS_WRITTEN": _NOT_AN_EARLIER_CALL if version == 2 else "",
        "CALLS": "",
    }
    if template.tools:
        results = {2: _RESULT_V2, 3: _RESULT_V3, 7: _RESULT_V7, 11: _RESULTS_V11, 13: _RESULTS_V11}
        parts |= {
            "TEXT": _CONTENT_MACRO + (_RESULT_MACRO if version >= 7 else ""),
            "TOOLS": _TOOLS_LIST,
            "IN_SYSTEM": "",
            "BEFORE_USER": _TOOLS_BEFORE,
            "RESULT": results[version],
            "CALLS": _CALLS_V11 + _IDS_OF_CALLS if version >= 11 else _CALLS,
        }
    # 2. The values in them.
    opener, closer = ("[INST]" + template.gap_after_control, "[/INST]") if version > 1 else ("[INST] ", " [/INST]")
    turn_gap = "" if version > 1 else template.gap_after_control
    values = {
        "OPENER": quote(opener),
        "CLOSER": quote(closer),
        "BEGIN": quote(template.bos + (turn_gap if template.bos else "")),
        "ANSWER_GAP": quote(template.gap_after_control if version > 1 else template.gap),
        "TURN_GAP": quote(turn_gap),
        "GAP": quote(template.gap_after_control),
        "EOS": quote(template.eos),
        "JOIN": quote(JOIN),
        "NAME": template.name,
        "STRIP": ".rstrip(' ')" if version > 1 else "",
        "PLACE": "ns.users" if version > 1 else "1",
        "TOOLS_PLACE": "ns.users" if version < 13 else "1",
        "ID_IN_RESULT": _ID_IN_RESULT if version < 13 else "",
        "CALL_ID": {3: _ID_V3, 7: _ID_V3, 11: _ID_V11}.get(version, ""),
    }
    return _fill(_fill(_fill(_MISTRAL, parts), values), values)  # a value may hold another


def _fill(text: str, values: Mapping[str, str]) -> str:
    return re.sub(f"@({'|'.join(values)})\\b", lambda name: values[name[1]], text)
