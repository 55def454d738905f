"""What our directories add to SAELens' fields: the full config, a digest of the weights, metrics, the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_mamba.hooks.names import unalias
from saes.config import CoderConfig
from saes.files.checks import (
    DTYPES,
    STORED,
    TEXT,
    CoderFileError,
    Hints,
    check_tensors,
    dtype_name,
    field,
    nearest,
    sha256,
)
from saes.files.saelens import config_of, file_shapes, from_file

KEY = "hooked_mamba"
"""In cfg.json. SAELens leaves keys that it does not know alone."""

FORMAT = 1

FIELDS = ("format", "coder", "weights_sha256", "metrics", "training", "stored")

Metrics = dict[str, float | None]

Training = dict[str, str | int | float | bool | None]
"""What a coder was trained on, by name: "text", "tokens", "context_length" and the like."""


def clean_metrics(metrics: Mapping[str, Any]) -> Metrics:
    """Numbers by name; what is not finite becomes None, which JSON can hold."""
    out: Metrics = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float | None):
            raise CoderFileError(f"metrics are numbers by name, got {name!r}: {value!r}")
        out[name] = None if value is None else _finite(value)
    return out


def clean_training(training: Mapping[str, Any]) -> Training:
    """Short texts, truth values and numbers by name; numbers that are not finite become None.

    Raises
    ------
    CoderFileError
        For anything else.
    """
    out: Training = {}
    for name, value in training.items():
        short = all(not isinstance(text, str) or len(text) <= TEXT for text in (name, value))
        if not short or not isinstance(name, str) or not isinstance(value, str | int | float | None):
            raise CoderFileError(f"training holds short texts and numbers by name, got {name!r}: {value!r}")
        out[name] = _finite(value) if isinstance(value, float) else value
    return out


def _finite(value: int | float) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        return None
    return number if math.isfinite(number) else None


def full_config(
    cfg: CoderConfig, dtype: str, digest: str, metrics: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """All that cfg.json holds; SAELens is told the length of the training's rows, that no BOS was prepended, and of
    float8, which it does not know by name, what it becomes when it is loaded."""
    ours = {"format": FORMAT, "coder": cfg.to_dict(), "weights_sha256": digest, "metrics": clean_metrics(metrics)}
    if dtype not in DTYPES:
        ours["stored"] = dtype
    config = config_of(cfg, dtype if dtype in DTYPES else "float32")
    if training:
        ours["training"] = clean_training(training)
        length = training.get("context_length")
        if isinstance(length, int):
            config["metadata"] |= {"context_size": length, "prepend_bos": False}
    return {**config, KEY: ours}


def stored_dtype(config: Mapping[str, Any], where: Path) -> str:
    """The number format of the matrices in a directory that we wrote."""
    if "stored" in config[KEY]:
        return dtype_name(field(config[KEY], "stored", str, where), f"{KEY}.stored in {where}", STORED)
    return dtype_name(field(config, "dtype", str, where), f"dtype in {where}")


def read_own(
    config: Mapping[str, Any], tensors: Callable[[], Mapping[str, Tensor]], hints: Hints, where: Path, weights_at: Path
) -> tuple[CoderConfig, Metrics, Training, Callable[[], dict[str, Tensor]]]:
    """Config, metrics, training, and what reads the weights, of a directory that :func:`saes.files.save` wrote.

    Raises
    ------
    CoderFileError
        If the two configs in cfg.json, the weights or the hints contradict each other.
    """
    ours = field(config, KEY, dict, where)
    for name in ours:
        if name not in FIELDS:
            raise CoderFileError(f"{where} has the unknown field {KEY}.{name}{nearest(name, FIELDS)}")
    if ours.get("format") != FORMAT or isinstance(ours["format"], bool):
        raise CoderFileError(f"{where} is of format {ours.get('format')!r}; this version reads format {FORMAT}")
    values = field(ours, "coder", dict, where)
    _check_types(values, where)
    try:
        cfg = CoderConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CoderFileError(f"{where}: {error}") from None
    if cfg.input_norm != "none":
        raise CoderFileError(f"{where} has input_norm={cfg.input_norm!r}; in a file it is folded, and 'none'")
    dtype = dtype_name(field(config, "dtype", str, where), f"dtype in {where}")
    stored = stored_dtype(config, where)
    if stored != dtype and (stored in DTYPES or dtype != "float32"):
        raise CoderFileError(f"{where} contradicts itself: dtype is {dtype}, {KEY}.stored says {stored}")
    _check_agreement(config, config_of(cfg, dtype), where)
    _check_hints(cfg, hints, where)
    digest = field(ours, "weights_sha256", str, where)
    metrics = ours.get("metrics", {})
    if not isinstance(metrics, dict):
        raise CoderFileError(f"{where} has metrics={metrics!r}, expected numbers by name")
    training = ours.get("training", {})
    if not isinstance(training, dict):
        raise CoderFileError(f"{where} has training={training!r}, expected texts and numbers by name")

    def weights() -> dict[str, Tensor]:
        found = tensors()
        check_tensors(found, file_shapes(cfg), weights_at, STORED)
        for name in file_shapes(cfg):
            got, matrix = str(found[name].dtype).removeprefix("torch."), name.startswith("W_")
            if got not in ((stored,) if matrix else (dtype, "float32")):
                right = f"{where.name} says {stored}" if matrix or dtype == stored else "expected float32"
                raise CoderFileError(f"{name} in {weights_at} is {got}, {right}")
        actual = sha256(weights_at)
        if actual != digest:
            raise CoderFileError(
                f"{weights_at} is not the file that {where.name} was written with: its SHA-256 is {actual[:16]}...,"
                f" expected {digest[:16]}... (changed, or a save was interrupted)"
            )
        return from_file(cfg, found, weights_at)

    return cfg, clean_metrics(metrics), clean_training(training), weights


def _check_types(values: Mapping[str, Any], where: Path) -> None:
    """Of the fields whose type a config relies on; their values are its own concern."""
    for name, kind in {"d_in": int, "d_out": int, "d_sae": int, "in_site": str, "out_site": str}.items():
        field(values, name, kind, where)
    kinds = {"k": int, "window": int, "model_name": str, "model_hash": str, "matryoshka_widths": list}
    for name, right in kinds.items():
        value = values.get(name)
        if isinstance(value, str) and len(value) > TEXT:
            raise CoderFileError(f"{where} has a {name} of {len(value):,} characters, expected at most {TEXT}")
        if value is not None and (not isinstance(value, right) or isinstance(value, bool)):
            expected = {int: "an integer", str: "a text", list: "a list of integers"}[right]
            raise CoderFileError(f"{where} has {name}={value!r}, expected {expected} or null")
    for width in values.get("matryoshka_widths") or ():
        if not isinstance(width, int) or isinstance(width, bool):
            raise CoderFileError(f"{where} has {width!r} among its matryoshka_widths, expected integers")


def _check_agreement(config: Mapping[str, Any], expected: Mapping[str, Any], where: Path, prefix: str = "") -> None:
    """Raise if SAELens' fields contradict our own config."""
    for name, right in expected.items():
        if name in ("device", "sae_lens_version", "sae_lens_training_version"):
            continue
        if isinstance(right, dict):
            _check_agreement(field(config, name, dict, where), right, where, f"{name}.")
        elif name not in config or config[name] != right or isinstance(config[name], bool) != isinstance(right, bool):
            said = repr(config[name]) if name in config else "nothing"
            raise CoderFileError(f"{where} contradicts itself: {prefix}{name} is {said}, {KEY} says {right!r}")


def _check_hints(cfg: CoderConfig, hints: Hints, where: Path) -> None:
    for name in ("k", "in_site", "out_site", "target", "reads", "model_name"):
        given, own = getattr(hints, name), getattr(cfg, name)
        if given is not None and (unalias(given) if name.endswith("site") else given) != own:
            raise CoderFileError(f"{where} has {name}={own!r}, but {name}={given!r} was given")
