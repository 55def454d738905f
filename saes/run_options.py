"""The options of a training, from a file, flags and `--set KEY=VALUE`; imports nothing slow, so help comes at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saes.options import OptionError, check_keys, read_file

PARTS = ("train", "data")
"""Mappings within a run's options."""

CODER_FLAGS = ("site", "layer", "d_sae", "k", "architecture", "reads", "target")
"""Flags that describe coders, which a file may do instead."""


def run_options(config: Path | None, flags: Mapping[str, Any], settings: Sequence[str] = ()) -> dict[str, Any]:
    """A training's options: those of a file, then `flags` that were given, then `KEY=VALUE` settings.

    Parameters
    ----------
    config
        JSON or TOML file; None: flags alone.
    flags
        Names of `RunConfig`, or "train.lr" and the like; and those of `CODER_FLAGS`. None: not given.
    settings
        Such as "train.warmup=0.1", "data.dtype=float32".

    Raises
    ------
    OptionError
        A setting without "=", or coders described by the file and by flags.
    """
    options = read_file(config) if config is not None else {}
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    coder = {key: given.pop(key) for key in CODER_FLAGS if key in given}
    for key, value in [*given.items(), *map(_setting, settings)]:
        part, _, name = key.rpartition(".")
        if part:
            check_keys("the run", {part: None}, PARTS)
        target = options.setdefault(part, {}) if part else options
        if not isinstance(target, dict):
            raise OptionError(f"{part} must be a mapping of options, got {target!r}")
        target[name] = value
    if coder and "coders" in options:
        raise OptionError(f"{config} lists coders, and so do the flags ({_flags(coder)}): use one of the two")
    if coder:
        options["coders"] = coder_specs(coder)
    for length, other in (("n_tokens", "steps"), ("steps", "n_tokens")):
        if f"train.{length}" in given:  # a flag takes the file's place
            options["train"].pop(other, None) if f"train.{other}" not in given else None
    if "model" not in options and config is None:
        options["model"] = "tinystories-4l"
    options.setdefault("train", {})
    missing = [f"--{name}" for name in ("text", "out") if name not in options]
    if missing:
        raise OptionError(f"a training needs {' and '.join(missing)}, as flags or in a file")
    if "coders" not in options:
        raise OptionError("a training needs coders: --layer (a MambaCoder) or --site, with --d-sae; or a file's list")
    return options


def coder_specs(flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Coders in short form from flags: one for each layer."""
    if "d_sae" not in flags:
        raise OptionError("--d-sae is missing: the number of latents")
    shared = {key: value for key, value in flags.items() if key != "layer"}
    layers = flags.get("layer")
    if not layers and "site" not in flags:
        raise OptionError("--layer is missing: the block of a MambaCoder, or of --site")
    return [{**shared, "layer": layer} for layer in layers] if layers else [shared]


def _flags(names: Mapping[str, Any]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise OptionError(f"--set takes KEY=VALUE, such as train.warmup=0.1; got {text!r}")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value  # plain text
