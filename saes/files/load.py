"""Reading a coder in any supported format: its format, config and weights, all checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from saes.config import CoderConfig
from saes.files.checks import (
    CoderFileError,
    Hints,
    file_metadata,
    open_archive,
    open_tensors,
    plain_file,
    read_object,
)
from saes.files.jumprelu_pt import read_jumprelu
from saes.files.own import KEY, Metrics, Training, read_own
from saes.files.recurrentlens import read_recurrentlens
from saes.files.saelens import read_foreign
from saes.files.save import CONFIG, WEIGHTS
from saes.files.sparsify import read_sparsify

C = TypeVar("C", bound=nn.Module)

Format = Literal["hooked_mamba", "saelens", "sparsify", "recurrentlens", "jumprelu.pt"]

SINGLE = "sae.safetensors"
"""sparsify's weights beside a cfg.json; recurrentlens' file without one."""

ARCHIVES = (".pt", ".pth")
"""Of tensors alone, read as such; what else is in one is refused."""

PICKLES = (".bin", ".pkl", ".pickle", ".ckpt", ".npz", ".npy")


@dataclass(frozen=True)
class Opened:
    """A coder on disk whose weights are not read yet."""

    cfg: CoderConfig
    """What it is."""
    format: Format
    """Whose format it is in."""
    metrics: Metrics
    """What was measured when it was saved; empty in other libraries' formats."""
    weights: Callable[[], dict[str, Tensor]]
    """Reads and checks all tensors, under our names, as they are on disk."""
    training: Training = field(default_factory=dict)
    """What it was trained on; empty in other libraries' formats."""


def open_coder(path: str | Path, **hints: Any) -> Opened:
    """What a coder on disk is, without its weights. Arguments and errors are those of :func:`load`."""
    try:
        known = Hints(**hints)
    except TypeError:
        fields = ", ".join(name for name in Hints.__dataclass_fields__ if name != "place")
        raise TypeError(f"unknown options {', '.join(sorted(hints))}: a coder is loaded with {fields}") from None
    path = Path(path).expanduser()
    opened = _open(path, known)
    if known.apply_b_dec_to_input is not None and opened.format != "jumprelu.pt":
        raise CoderFileError(f"apply_b_dec_to_input= is for .pt files, {path} is of {opened.format}; leave it out")
    if known.norm_factor is not None and opened.format != "saelens":
        raise CoderFileError(f"norm_factor= is for SAELens' coders, {path} is of {opened.format}; leave it out")
    return opened


def _open(path: Path, known: Hints) -> Opened:
    if path.is_file():
        return _open_file(path, known)
    if not path.is_dir():
        raise CoderFileError(f"{path} is not there; expected a coder's folder")
    config, weights, single = path / CONFIG, path / WEIGHTS, path / SINGLE
    if weights.exists() or weights.is_symlink():
        read = read_object(config)
        if KEY in read:
            cfg, metrics, training, get = read_own(read, lambda: open_tensors(weights), known, config, weights)
            plain_file(weights)
            return Opened(cfg, "hooked_mamba", metrics, get, training)
        return Opened(*_with("saelens", *read_foreign(read, open_tensors(weights), known, config, weights)))
    if single.exists() or single.is_symlink():
        if not config.exists():
            return _open_file(single, known)
        return Opened(*_with("sparsify", *read_sparsify(read_object(config), open_tensors(single), known, config)))
    raise CoderFileError(_nothing_in(path))


def _with(
    format: Format, cfg: CoderConfig, get: Callable[[], dict[str, Tensor]]
) -> tuple[CoderConfig, Format, Metrics, Callable[[], dict[str, Tensor]]]:
    return cfg, format, {}, get


def _open_file(path: Path, hints: Hints) -> Opened:
    if path.suffix in ARCHIVES:
        return Opened(*_with("jumprelu.pt", *read_jumprelu(open_archive(path), hints, path)))
    if path.suffix in PICKLES:
        raise CoderFileError(f"{path} may contain code and is not read; expected safetensors (a folder, or one file)")
    if path.name in (CONFIG, WEIGHTS):
        raise CoderFileError(f"{path} is one file of a coder; give its folder, {path.parent}")
    about = file_metadata(path)
    if "variant" not in about:
        raise CoderFileError(
            f"{path} does not say what it is: recurrentlens writes `variant` into the header, other coders are"
            f" folders with {CONFIG} and {WEIGHTS}"
        )
    return Opened(*_with("recurrentlens", *read_recurrentlens(about, open_tensors(path), hints, path)))


def _nothing_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    found = sorted(folder.glob("*/cfg.json")) or sorted(folder.glob("coders/*/cfg.json"))
    inner = [entry.parent.relative_to(folder).as_posix() for entry in found]
    if inner:
        more = " ..." if inner[8:] else ""
        return f"{folder} is not itself a coder; it contains the coders {', '.join(inner[:8])}{more}"
    more = " ..." if names[8:] else ""
    return f"{folder} has no coder: expected {CONFIG} and {WEIGHTS}; found {', '.join(names[:8]) or 'nothing'}{more}"


def load(path: str | Path, cls: type[C], *, device: str = "cpu", **hints: Any) -> C:
    """Read a coder and check it: every tensor's name, shape, dtype and finiteness, architecture and sites.

    Parameters
    ----------
    path
        A directory that :func:`saes.files.save` or SAELens wrote, one of sparsify's, recurrentlens' file, or a JumpReLU
        as a `.pt` file of W_enc, b_enc, W_dec, b_dec and threshold.
    cls
        SparseCoder, or SAE or MambaCoder, which refuse the other kind.
    device
        Where to put it.
    **hints
        k, in_site, out_site, target, reads, model_name, norm_factor, apply_b_dec_to_input: what other libraries' files
        do not say or name otherwise. The k of a recurrentlens TopK must be given, the factor of a SAELens coder with
        normalised input, sites that no model here has, and the site of a `.pt` file. Our own files say all of this,
        and what is given must agree.

    Returns
    -------
    C
        In float32; in float64 if it was saved so. No random numbers are drawn.

    Raises
    ------
    CoderFileError
        Saying what was found and what was expected.
    """
    opened = open_coder(path, **hints)
    state = opened.weights()
    wide = state["W_dec"].dtype == torch.float64  # SAELens keeps single thresholds in float64 beside float32 matrices
    coder = cls(opened.cfg, seed=0)  # random weights of its own generator, overwritten; torch's is not drawn from
    coder = coder.to(device=device, dtype=torch.float64 if wide else torch.float32)
    coder.load_state_dict(state)
    return coder
