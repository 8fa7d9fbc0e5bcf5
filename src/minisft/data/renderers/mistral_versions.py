"""The version of the Mistral form that a tokenizer is made for.

mistral-common numbers its instruct tokenizers v1, v2, v3, v7, v11, v13 and v15 (`tokens/tokenizers/base.py`). A native
file states its version: `tekken.json` in its configuration, a SentencePiece model in its name (`tokenizer.model.v7`).
A converted tokenizer (`tokenizer.json`) has only its control tokens, which leave some versions open.
"""

from collections.abc import Iterable

from minisft.errors import UserError

INSTRUCTION = ("[INST]", "[/INST]")
TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_V7 = (*INSTRUCTION, *TOOLS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_V11 = (*_V7, "[CALL_ID]", "[ARGS]")
# The control tokens without which a version cannot be written. A tokenizer of v3 without those of tools writes them as
# text.
REQUIRED = {1: (), 2: (*INSTRUCTION, *TOOLS), 3: INSTRUCTION, 7: _V7, 11: _V11, 13: _V11}
_SETTINGS = "[MODEL_SETTINGS]"  # v15 alone has it
_PREFIX = "[PREFIX]"  # v2 lacks it, and so do the first tokenizers of v3
V2_OR_V3 = (3, 2)


def choose_version(name: str, controls: Iterable[str], stated: str | None, adds_space: bool) -> int:
    """Return the version that `data.template` means on a tokenizer.

    Args:
        name: "mistral", or one version: "mistral-v1", "mistral-v3" and so on.
        controls: The control tokens of the tokenizer.
        stated: The version that the tokenizer's own file states, such as "v7", or None.
        adds_space: Whether the tokenizer puts a space before a text, as SentencePiece does and tekken does not.

    Raises:
        UserError: The tokenizer is of another version, of a version that is not implemented, or it may be of several
            versions and none is named.
    """
    # 1. The versions that the tokenizer may be of.
    controls = set(controls)
    possible = possible_versions(controls, stated, adds_space)
    names = " or ".join(f"mistral-v{version}" for version in possible)
    ambiguous = len(possible) > 1 and possible != V2_OR_V3
    if name == "mistral" and ambiguous:
        problem = f"the control tokens of this tokenizer do not tell whether it is {names}"
        raise UserError("data.template", problem, f"name the version of the model, data.template: {names}")
    # 2. The version that is meant.
    version = possible[0] if name == "mistral" else int(name.removeprefix("mistral-v"))
    fix = f"use data.template: {names if ambiguous else 'mistral'}, which is the form of this tokenizer"
    missing = [token for token in REQUIRED[version] if token not in controls]
    if missing:
        problem = (
            f"mistral-v{version} needs a tokenizer with the control tokens {', '.join(REQUIRED[version])}, and this "
            f"one lacks {', '.join(missing)}"
        )
        raise UserError("data.template", problem, "give the published tokenizer" if version in possible else fix)
    if version == 1 and version not in possible:
        problem = "mistral-v1 writes [INST] as text, and for this tokenizer it is a control token"
        raise UserError("data.template", problem, fix)
    if version not in possible:
        raise UserError("data.template", f"this tokenizer is of {names}, and {name} is another form", fix)
    return version


def possible_versions(controls: set[str], stated: str | None, adds_space: bool) -> tuple[int, ...]:
    """Return the versions that a tokenizer may be of, the likely one first; the arguments are those of above.

    Raises:
        UserError: It is of a version that is not implemented.
    """
    if stated is None and _SETTINGS in controls:
        stated = "v15"
    if stated is not None:
        known = {f"v{version}": version for version in REQUIRED}
        if stated not in known:
            problem = f"this tokenizer is of Mistral's {stated}, and only the forms {', '.join(known)} are implemented"
            fix = "set data.template to the path of a .jinja file with this model's template, or use another model"
            raise UserError("data.template", problem, fix)
        return (known[stated],)
    if not controls.issuperset(INSTRUCTION):
        return (1,)
    if controls.issuperset(_V11):
        return (11, 13)
    if controls.issuperset(_V7):  # tekken tokenizers of v3 have the control tokens of v7 too
        return (7,) if adds_space else (3, 7)
    return V2_OR_V3 if controls.issuperset(TOOLS) and _PREFIX not in controls else (3,)
