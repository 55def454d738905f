"""Turns Python arguments in error messages into what a command offers: `n_tokens=` becomes `--n-tokens`.

Advice that names an argument or a function which the command does not have is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from typer.models import OptionInfo

VERBS = "pass|give|leave|use|set|say|ask|call|load|install|splice|name|choose|pad|save"

ADVICE = re.compile(rf"([;:.] )(?=(?:{VERBS})\b|load_model\()", re.I)
"""What stands before a part of a message that says what to do."""

PYTHON = re.compile(r"(?<![\w.\"'/-])[a-z]\w*=(?!=)|[a-z]\w*\((?!s\))")
"""An argument or a call."""

LOADED = re.compile(r"load_model\('?([^',()]+)'?, (\w+)='?([^',()]+)'?\)")
"""A model loaded with one option."""


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """Parameter -> flag, of those parameters of a command that are flags."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for option in getattr(hint, "__metadata__", ()):
            if isinstance(option, OptionInfo):
                names = [str(name) for name in (option.default, *(option.param_decls or ()))]  # the first may be either
                spelled = [flag.split("/")[0] for flag in names if flag.startswith("--")]
                found[name] = spelled[0] if spelled else "--" + name.replace("_", "-")
    return found


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with flags in place of arguments, see :func:`flags_of`."""

    def flag(found: re.Match[str]) -> str:
        return flags.get(found[1], found[0])

    def loaded(found: re.Match[str]) -> str:
        both = "model" in flags and found[2] in flags
        return f"give {flags['model']} {found[1]} {flags[found[2]]} {found[3]}" if both else found[0]

    message = LOADED.sub(loaded, message)
    message = re.sub(r"(?<![\w.\"'-])([a-z]\w*)=(?:True|False|\.\.\.|(?=[\s,;)]|$))", flag, message)  # n_tokens=
    message = re.sub(r"^([a-z]\w*)(?= must be )", flag, message)
    if "nearest: " not in message:  # names of what is in a file
        message = re.sub(r"(?<![\w.\"'/=-])([a-z]+_[a-z_]+)(?![\w(.=])", flag, message)
    return message


def offered(message: str) -> str:
    """A message without the advice, and of several ways without those, that only Python has."""
    said, *advice = ADVICE.split(message)
    for before, part in zip(advice[::2], advice[1::2], strict=True):
        ways = re.split(r", or (?=[a-z])", part)
        left = [way for way in ways if not PYTHON.search(way)]
        said += before + ", or ".join(left) if left else ""
    return said
