"""Checkpoints that survive a kill at any moment: a temporary folder is written, synced and renamed.

folder/step-00001000/state.safetensors   weights, optimiser, counters of dead latents
                     state.json          step, options, configs, sums of the log, digest of the data
                     process-0.json      data cursor and random state, one file a process
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_mamba.durable import room_for, sync, write_through
from saes.renamed import renamed_in
from saes.training.world import World

_STEP = re.compile(r"step-(\d{8})")


class ResumeError(ValueError):
    """A checkpoint from which this training cannot continue."""


def steps_saved(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    process: dict[str, Any],
    *,
    world: World,
    keep: int = 2,
) -> None:
    """Write the checkpoint of a step and remove all but the last `keep`.

    Parameters
    ----------
    tensors, about
        What all processes share; only the first one's are written.
    process
        What each has for itself, fit for JSON.

    Raises
    ------
    DiskFullError
        If there is no room; earlier checkpoints stay whole, and nothing is left of this one.
    """
    path = _path(folder, step)
    aside = folder / f".step-{step:08d}.tmp"
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
        aside.mkdir()
    world.wait()
    if not path.exists():  # the same step of the same run holds the same
        try:
            _write_parts(aside, path, tensors, about | {"step": step, "processes": world.size}, process, world)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    world.wait()
    if world.first:
        if path.exists():
            shutil.rmtree(aside)
        else:
            sync(aside)
            os.rename(aside, path)
            sync(folder)
        for old in steps_saved(folder)[:-keep]:
            away = folder / f".step-{old:08d}.old.tmp"  # a kill while its files go must not leave half a checkpoint
            os.rename(_path(folder, old), away)
            shutil.rmtree(away)
    world.wait()


def _write_parts(
    aside: Path, path: Path, tensors: dict[str, Tensor], about: dict[str, Any], process: dict[str, Any], world: World
) -> None:
    """The files of a checkpoint, into `aside`; a full disk is reported with their place in `path`."""
    files: dict[str, Callable[[], bytes]] = {
        f"process-{world.rank}.json": lambda: json.dumps(process | {"random": _random_state()}).encode()
    }
    if world.first:
        files["state.safetensors"] = lambda: save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
        files["state.json"] = lambda: json.dumps(about).encode()
    for name, made in files.items():
        data = made()
        with room_for(path / name, len(data)):
            write_through(aside / name, data)


def load_checkpoint(
    folder: Path, world: World, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, about, this process's part) of a step, by default the last; random states are restored.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ResumeError
        If it is damaged, or of another number of processes.
    """
    steps = steps_saved(folder)
    if not steps or (step is not None and step not in steps):
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{what} in {folder}" + (f"; there are {steps}" if steps else ""))
    path = _path(folder, steps[-1] if step is None else step)
    try:
        tensors = load((path / "state.safetensors").read_bytes())
        about = json.loads((path / "state.json").read_text())
        if about["processes"] != world.size:
            raise ResumeError(
                f"{path} is of {about['processes']} processes, this run has {world.size}: each has its own place in"
                " the data, so it can only continue with the same number"
            )
        process = json.loads((path / f"process-{world.rank}.json").read_text())
        _set_random_state(process.pop("random"))
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResumeError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return tensors, about, process


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


__getattr__ = renamed_in(__name__, {"CheckpointError": "saes.training.checkpoint.ResumeError"})
