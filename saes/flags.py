"""Turns Python arguments in error messages into command-line flags: `n_tokens=` becomes `--n-tokens`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

TRAIN = (
    "warmup", "decay", "sparsity", "sparsity_warmup", "bandwidth", "aux_alpha", "aux_k", "wide_alpha", "beta1",
    "beta2", "grad_clip", "decoder_norm", "b_dec", "init_tokens", "dead_after_tokens", "autocast", "log_every",
    "checkpoint_every", "keep",
)  # fmt: skip
"""Options of `TrainConfig` without a flag of their own."""

DATA = (
    "block_tokens", "rows_per_pass", "exclude_tokens", "positions_per_row", "disk_tokens", "shards_per_block",
    "epochs", "dtype", "folder", "channels", "pack", "boundaries",
)  # fmt: skip
"""The same of `DataConfig`."""


def in_flags(message: str, flags: Collection[str], settings: bool = False) -> str:
    """A message with flags in place of arguments.

    Parameters
    ----------
    flags
        The command's arguments that are flags, as Python names them.
    settings
        Whether other options of a training can be set by `--set`.
    """

    def flag(found: re.Match[str]) -> str:
        name = found[1]
        if name in flags:
            return "--" + name.replace("_", "-")
        part = "train" if name in TRAIN else "data" if name in DATA else None
        return f"--set {part}.{name}" if settings and part else found[0]

    assigned = r"(?<![\w.\"'-])([a-z]\w*)=(?:True|False|\.\.\.|(?=[\s,;)]|$))"  # n_tokens= and resume=True
    message = re.sub(assigned, flag, message)
    message = re.sub(r"^([a-z]\w*)(?= must be )", flag, message)
    if "nearest: " in message:  # names of what is in a file
        return message
    return re.sub(r"(?<![\w.\"'/=-])([a-z]+_[a-z_]+)(?![\w(.=])", flag, message)


def speaks_in_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors name its flags."""
    flags = [name for name in inspect.signature(command).parameters if name not in ("config", "coders")]
    settings = "setting" in flags

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (in_flags(error.args[0], flags, settings),)
            raise

    return run
