"""The options of a training, from a file, flags and `--set KEY=VALUE`; imports nothing slow, so help comes at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saes.options import OptionError, check_keys, read_file

PARTS = ("train", "data")
"""Mappings within a run's options."""

CODER_FLAGS = ("site", "layer", "d_sae", "k", "architecture", "reads", "target", "window")
"""Flags that describe coders, which a file may do instead."""


RUN = "run.json"
"""The options of a training, in its own folder."""


def run_options(
    config: Path | None, flags: Mapping[str, Any], settings: Sequence[str] = (), resume: bool = False
) -> dict[str, Any]:
    """A training's options: those of a file, then `flags` that were given, then `KEY=VALUE` settings.

    Parameters
    ----------
    config
        JSON or TOML file, or the folder of an earlier training; None: flags alone.
    flags
        Names of `RunConfig`, or "train.lr" and the like; and those of `CODER_FLAGS`. None: not given.
    settings
        Such as "train.warmup=0.1", "data.dtype=float32".
    resume
        Whether the options that the training in `out` was started with apply where neither file nor flags say more.

    Raises
    ------
    OptionError
        A setting without "=", or coders described by the file and by flags.
    """
    kept = _kept_options(config, flags, resume)
    source = kept or config
    options = {} if source is None else read_file(source)
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
    if coder and "coders" in options and kept is None:
        raise OptionError(f"{config} lists coders, and so do the flags ({_flags(coder)}): use one of the two")
    if coder:
        options["coders"] = coder_specs(coder)
    for length, other in (("n_tokens", "steps"), ("steps", "n_tokens")):
        if f"train.{length}" in given:  # a flag takes the file's place
            options["train"].pop(other, None) if f"train.{other}" not in given else None
    if "model" not in options and source is None:
        options["model"] = "tinystories-4l"
    if kept is not None and "out" not in given:
        options["out"] = str(kept.parent)
    options.setdefault("train", {})
    missing = [f"--{name}" for name in ("text", "out") if name not in options]
    if missing:
        raise OptionError(f"a training needs {' and '.join(missing)}, as flags or in a file")
    if "n_tokens" not in options["train"] and "steps" not in options["train"]:
        raise OptionError("a training needs its length: --n-tokens or --steps")
    if "coders" not in options:
        raise OptionError("a training needs coders: --layer (a MambaCoder) or --site, with --d-sae; or a file's list")
    return options


def _kept_options(config: Path | None, flags: Mapping[str, Any], resume: bool) -> Path | None:
    """The file of options in a training's folder, where that is what was asked for."""
    folder = config if config is not None and config.is_dir() else None
    out: Any = flags.get("out")
    if folder is None and (config is not None or not resume):
        return None
    if folder is None and out is None:
        raise OptionError("--resume needs the folder of the training to continue: --out")
    kept = (folder or Path(out).expanduser()) / RUN
    if folder is not None and not kept.exists():
        raise OptionError(f"{folder} holds no {RUN}, the options of a training; give a file or flags")
    if resume and not kept.exists() and not any(flags.get(key) for key in ("text", *CODER_FLAGS)):
        raise OptionError(f"there is no training to resume in {kept.parent}: it holds no {RUN}")
    return kept if kept.exists() else None


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
