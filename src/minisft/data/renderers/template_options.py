"""Values for the variables that a Jinja template reads, such as `enable_thinking`.

They are written into the template as defaults, so that training, evaluation, chat and every tool that loads the saved
model render with the same values; a caller that passes a variable of its own overrides them.
"""

import json
import re
from collections.abc import Mapping

from minisft.errors import UserError

Option = bool | int | float | str
# Variables that transformers and serving engines pass to every template (`chat_template_utils.render_jinja_template`).
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception",
    "strftime_now", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens",
}  # fmt: skip
_WHERE = "data.template_options"


def with_options(template: str, options: Mapping[str, Option]) -> str:
    """Return a Jinja template with defaults for some of its variables.

    Raises:
        UserError: The template does not read one of these variables, or does not parse.
    """
    read = variables(template)
    for name in options:
        if name in _GIVEN:
            raise UserError(_WHERE, f"{name} is a variable that every template is given", "leave it out")
        if name not in read:
            fix = f"name one that it reads: {', '.join(sorted(read))}" if read else "leave it out: it reads none"
            raise UserError(_WHERE, f"the template does not read the variable {name!r}", fix)
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in options.items()
    )
    # Jinja removes the first line break after a block, which here is one of the template's own.
    return defaults + ("\n" if defaults and template.startswith("\n") else "") + template


def variables(template: str) -> set[str]:
    """Return the variables that a template reads, beside those that every template is given.

    Raises:
        UserError: The template does not parse.
    """
    import jinja2
    from jinja2 import meta, nodes

    # transformers' own tag needs an extension that is not public; the tag reads no variable.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno} of the template: {error.message}"
        raise UserError("data.template", problem, "fix the template") from None
    # A variable that the template sets for itself in a block counts as undeclared too. It is the caller's only where
    # the template looks whether it was given.
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    looked_for = r"\b{0}\s+is\s+(?:not\s+)?(?:un)?defined|\b{0}\s*\|\s*default"
    asked = {name for name in own if re.search(looked_for.format(name), plain)}
    return meta.find_undeclared_variables(tree) - _GIVEN - (own - asked)


def _literal(value: Option) -> str:
    return json.dumps(value, ensure_ascii=False)
