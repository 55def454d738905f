"""Import of JumpReLU coders as plain `.pt` files: a dict of W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d] and
threshold [F], as many published ones are. Read as tensors alone (`weights_only=True`).

    z = relu(pre) [pre > threshold],    pre = x W_enc + b_enc

Such a file does not say its site, nor whether b_dec is subtracted from x first; in most it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from saes.config import CoderConfig
from saes.files.checks import CoderFileError, Hints, check_names, check_tensors
from saes.files.saelens import shapes_of
from saes.files.sites import coder_config

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read_jumprelu(
    tensors: Mapping[str, Tensor], hints: Hints, where: Path
) -> tuple[CoderConfig, Callable[[], dict[str, Tensor]]]:
    """The config that the tensors and the hints amount to, and what reads the weights.

    Raises
    ------
    CoderFileError
        Other tensors or shapes than a JumpReLU has, or no site.
    """
    check_names(tensors, NAMES, where)
    shape = tuple(tensors["W_enc"].shape)
    if len(shape) != 2 or 0 in shape:
        raise CoderFileError(f"W_enc in {where} has shape {list(shape)}, expected d x F")
    if hints.in_site is None and hints.place is None:
        raise CoderFileError(
            f"{where} does not say which site it is of: give in_site= with a full name such as"
            " 'blocks.0.hook_resid_post', or load it with saes.load_coder(name, model), which lists those that fit"
        )
    d, F = shape
    cfg = coder_config(
        hints,
        where,
        transcoder=False,
        found_in=None,
        found_out=None,
        found_model=None,
        architecture="jumprelu",
        d_in=d,
        d_out=d,
        d_sae=F,
        apply_b_dec_to_input=bool(hints.apply_b_dec_to_input),
    )

    def weights() -> dict[str, Tensor]:
        check_tensors(tensors, shapes_of("jumprelu", d, d, F, skip=False), where)
        return {name: tensors[name] for name in NAMES}

    return cfg, weights
