"""What the commands share: options from flags, coders and models by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saes.options import OptionError, check_keys, read_file

if TYPE_CHECKING:
    from hooked_mamba.models import HookedSSM
    from saes.coder import SparseCoder

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


def coder_folders(names: Sequence[str]) -> dict[str, Path]:
    """Coders' places on this machine by name: folders, folders of coders, bundled names and hub ids.

    A folder of coders, and a bundled model's name, stand for all there is in them. A coder is called as its folder is;
    of two that would be called the same, the second keeps its whole name.
    """
    from saes.find import resolve

    found: dict[str, Path] = {}
    for name in names:
        for single in _expanded(name):
            path = resolve(single)
            short = path.resolve().name if Path(single).expanduser().exists() else single.rpartition("/")[2]
            found[short if short not in found else single.replace("/", "-")] = path
    return found


def _expanded(name: str) -> list[str]:
    """A name that stands for several coders as theirs; any other as it is."""
    from saes.find import bundled_names

    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "cfg.json").exists():
        return sorted(str(path.parent) for path in folder.glob("*/cfg.json")) or [name]
    return [known for known in bundled_names() if known.startswith(f"{name}/")] or [name]


def load_coders(names: Sequence[str], device: str = "cpu") -> dict[str, SparseCoder]:
    """Coders by name, see :func:`coder_folders`."""
    from saes.coder import SparseCoder

    return {name: SparseCoder.load(path).to(device) for name, path in coder_folders(names).items()}


def model_of(coders: Mapping[str, SparseCoder], name: str | None, device: str) -> HookedSSM:
    """The model that coders are for: the one named, or the one they were trained on.

    Raises
    ------
    OptionError
        They do not say, or name several.
    """
    from hooked_mamba.cli import load_model

    said = sorted({str(coder.cfg.model_name) for coder in coders.values()})
    if name is None and (len(said) != 1 or said[0] in ("None", "custom")):
        raise OptionError(f"say which model to read: --model; the coders were trained on {', '.join(said)}")
    model = load_model(name or said[0], device)
    note_other_weights(coders, model, name or said[0])
    return model


def note_other_weights(coders: Mapping[str, SparseCoder], model: HookedSSM, name: str) -> None:
    """Say which coders were trained on other weights than the model's."""
    from saes.model_hash import model_hash

    there = model_hash(model) if any(coder.cfg.model_hash for coder in coders.values()) else None
    for short, coder in coders.items():
        if coder.cfg.model_hash not in (None, there):
            typer.echo(f"note: {short} was trained on other weights than those of {name}", err=True)


def text_rows(text: Path, model: HookedSSM, context_length: int, seed: int = 0) -> Any:
    """Rows of tokens of a text file, read once."""
    from saes.store.data import DataConfig, rows_of

    return rows_of(text, model, DataConfig(context_length=context_length, epochs=1, seed=seed))
