"""What the commands share: coders, models and text by name. Imports torch, so commands import it when they run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel, load_model
from hooked_mamba.world import World, local_device, torchrun
from saes.coder import SparseCoder
from saes.find import bundled_names, resolve
from saes.options import OptionError, read_file
from saes.run_options import RUN
from saes.store.data import DataConfig, rows_of
from saes.training.loop import TrainResult


def coder_folders(names: Sequence[str]) -> dict[str, Path]:
    """Paths of coders on this machine by name: folders, folders of coders, bundled names and hub ids.

    A folder of coders, or a bundled model's name, means all coders in it. A coder is named after its folder; if two
    would have the same name, the second keeps its full one.
    """
    found: dict[str, Path] = {}
    for name in names:
        for single in _expanded(name):
            path = resolve(single)
            short = path.resolve().name if Path(single).expanduser().exists() else single.rpartition("/")[2]
            found[short if short not in found else single.replace("/", "-")] = path
    return found


def _expanded(name: str) -> list[str]:
    """The names of the coders that a name stands for."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "cfg.json").exists():
        inside = sorted(folder.glob("*/cfg.json")) or sorted(folder.glob("coders/*/cfg.json"))  # as a training ends
        return [str(path.parent) for path in inside] or [name]
    return [known for known in bundled_names() if known.startswith(f"{name}/")] or [name]


def load_coders(names: Sequence[str], device: str = "cpu") -> dict[str, SparseCoder]:
    """Coders by name, see :func:`coder_folders`."""
    return {name: SparseCoder.load(path).to(device) for name, path in coder_folders(names).items()}


@contextmanager
def processes(device: str, work: Path | None) -> Iterator[tuple[World, str]]:
    """The processes of torchrun (or this one alone), and this one's device.

    Raises
    ------
    OptionError
        Several processes, and no folder through which they could share the work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and work is None:
        raise OptionError("several processes share work through a folder: give --work")
    with torchrun(device) as world:
        yield world, local_device(device)


def trained_model(names: Sequence[str]) -> str | None:
    """The model of the trainings in whose folders these coders are; None if there is no such training, or several."""
    folders = [Path(name).expanduser() for name in names]
    kept = [path / RUN for folder in folders for path in (folder, folder.parent, folder.parent.parent)]
    found = {str(read_file(path).get("model")) for path in kept if path.is_file()}
    return found.pop() if len(found) == 1 else None


def model_of(coders: Mapping[str, SparseCoder], name: str | None, device: str) -> HookedModel:
    """The model to run: the one named, or the one that the coders were trained on.

    Raises
    ------
    OptionError
        They name no model, or several.
    """
    said = sorted({str(coder.cfg.model_name) for coder in coders.values()})
    if name is None and (len(said) != 1 or said[0] in ("None", "custom")):
        raise OptionError(f"which model to run: --model; the coders were trained on {', '.join(said)}")
    model = load_model(name or said[0], device=device)
    note_other_weights(coders, model, name or said[0])
    return model


def note_other_weights(coders: Mapping[str, SparseCoder], model: HookedModel, name: str) -> None:
    """Print a note for coders that were trained on other weights than the model's."""
    there = model_hash(model) if any(coder.cfg.model_hash for coder in coders.values()) else None
    for short, coder in coders.items():
        if coder.cfg.model_hash not in (None, there):
            typer.echo(f"note: {short} was trained on other weights than those of {name}", err=True)


def text_rows(text: Path, model: HookedModel, context_length: int, seed: int = 0) -> Any:
    """Rows of tokens of a text file, read once."""
    return rows_of(text, model, DataConfig(context_length=context_length, epochs=1, seed=seed))


def tell_ending(result: TrainResult, out: Path, again: str) -> None:
    """Say how a training ended, and where its coders are; exit code 130: it was stopped and can go on."""
    if result.ended == "stopped":
        typer.echo(f"{result.ending()}; to continue: {again}", err=True)
        raise typer.Exit(130)
    if result.ended == "text":
        typer.echo(f"{result.ending()}: coders are as they were then, before the learning rate had come down", err=True)
    typer.echo(f"coders in {out / 'coders'}")
