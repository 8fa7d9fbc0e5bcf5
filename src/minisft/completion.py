"""Completion scripts for shells, made by shtab from the parsers of the commands."""

import argparse
from collections.abc import Iterable, Mapping
from textwrap import dedent

from minisft.options import Verb
from minisft.recipe_schema import recipe_keys

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "minisft"
_WORDS = f"_{_PROGRAM}_words"  # shell function that completes files and keys of the recipe
# Appended for bash: no space after `training.epochs=`, where the value follows.
_NO_SPACE = dedent(f"""
    _{_PROGRAM}_completed() {{
      _shtab_{_PROGRAM} "$@"
      [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
      return 0
    }}
    complete -o bashdefault -F _{_PROGRAM}_completed {_PROGRAM}
""")


def completion_script(shell: str, verbs: Mapping[str, Verb]) -> str:
    """Return the completion script of a shell: commands, their options, files and keys of the recipe.

    Args:
        shell: One of SHELLS.
        verbs: The commands by name.
    """
    import shtab

    parser = argparse.ArgumentParser(prog=_PROGRAM)
    commands = parser.add_subparsers()
    for name, verb in verbs.items():
        own = verb.parser(name)
        commands.add_parser(name, description=verb.summary, help=verb.summary, parents=[own], add_help=False)
        for action in own._actions:
            if action.dest in ("words", "run", "folder") and not action.option_strings:
                action.complete = _words_completer() if action.dest == "words" else shtab.DIRECTORY  # type: ignore[attr-defined]
    script = str(shtab.complete(parser, shell=shell))
    return script + (_NO_SPACE if shell == "bash" else "")


def _words_completer() -> dict[str, object]:
    """Return what shtab takes for an argument: by shell, the function to call and the text that defines it."""
    keys = [f"{key}=" for key in _settable(recipe_keys())]
    return {
        "bash": _WORDS,
        "zsh": _WORDS,
        "fish": f"({_WORDS})",
        "preamble": {
            "bash": f'{_WORDS}() {{\n  compgen -W "{" ".join(keys)}" -- "$1"\n  compgen -f -- "$1"\n}}\n',
            "zsh": f"{_WORDS}() {{\n  _files\n  compadd -S '' -- {' '.join(keys)}\n}}\n",
            "fish": f"function {_WORDS}\n  __fish_complete_path (commandline -ct)\n"
            f"  printf '%s\\n' {' '.join(keys)}\nend\n",
        },
    }


def _settable(keys: Iterable[str]) -> list[str]:
    """Leave out the sections, such as `training`, whose keys are set one by one."""
    listed = list(keys)
    return [key for key in listed if not any(other.startswith(f"{key}.") for other in listed)]
