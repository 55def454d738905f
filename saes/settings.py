"""Options of a training without a flag of their own: in errors of `sae train`, `warmup` is `--set train.warmup`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hooked_mamba.cli.flags import in_flags

TRAIN = (
    "warmup", "decay", "sparsity", "sparsity_warmup", "bandwidth", "aux_alpha", "aux_k", "wide_alpha", "beta1",
    "beta2", "grad_clip", "decoder_norm", "b_dec", "init_tokens", "dead_after_tokens", "autocast", "log_every",
    "checkpoint_every", "keep",
)  # fmt: skip
"""Options of `TrainConfig`."""

DATA = (
    "block_tokens", "rows_per_pass", "exclude_tokens", "positions_per_row", "disk_tokens", "shards_per_block",
    "epochs", "dtype", "folder", "channels", "pack", "boundaries",
)  # fmt: skip
"""Options of `DataConfig`."""

SETTINGS = {name: f"--set {part}.{name}" for part, names in (("train", TRAIN), ("data", DATA)) for name in names}


def speaks_of_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors say how its settings are given."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (in_flags(error.args[0], SETTINGS),)
            raise

    return run
