"""Training many coders at once over one store.

out/checkpoints/step-.../   from which a stopped or killed training continues, bit for bit
out/metrics.jsonl           loss, ev, l0, dead share of every coder
out/coders/<name>/          the finished coders
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from saes.coder import SparseCoder
from saes.files.own import Training
from saes.store.blocks import ModelBlocks
from saes.store.store import ActivationStore, Batch
from saes.targets import read, streams_of
from saes.training.checkpoint import ResumeError, load_checkpoint, save_checkpoint, steps_saved
from saes.training.coder_run import CoderRun
from saes.training.config import TrainConfig
from saes.training.loggers import Logger, make_loggers
from saes.training.signals import stop_on_signal
from saes.training.world import World

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


METRICS = {"ev": "ev", "l0": "l0", "dead": "dead_share"}
"""Figures of the log that finished coders carry, under the names of `saes.evaluation`."""


class _Stopped(Exception):
    """Ctrl-C while the model reads text."""


class TrainResult(NamedTuple):
    """How a training ended."""

    coders: dict[str, SparseCoder]
    step: int
    complete: bool
    """False: stopped by Ctrl-C or by the end of the data; `train(resume=True)` continues."""
    measured: dict[str, dict[str, float]]
    """Coder -> loss, ev, l0, aux and dead share of the last line of the log."""


class Trainer:
    """Coders in training.

    Parameters
    ----------
    coders
        Trained in place, by name, on the device where they are.
    store
        Batches of the streams that they read and predict.
    config
        Options, the same for all.
    out
        Folder of checkpoints, log and finished coders; None: nothing is written.
    loggers
        In addition to the log file: "tensorboard", "wandb".
    about
        What finished coders record of their training besides its length, such as {"text": "stories.txt"}.

    Raises
    ------
    ValueError
        If the store does not hold what a coder needs, in the width it needs, or a name is unfit for a folder.
    """

    def __init__(
        self,
        coders: Mapping[str, SparseCoder],
        store: ActivationStore,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        loggers: Sequence[str] = (),
        about: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> None:
        if not coders:
            raise ValueError("there is no coder to train")
        self.coders, self.store, self.config = dict(coders), store, config
        self.out = None if out is None else Path(out)
        self.logger_names, self.about = tuple(loggers), dict(about or {})
        if self.logger_names and self.out is None:
            raise ValueError(f"logging to {', '.join(self.logger_names)} needs a folder: out=...")
        for name, coder in self.coders.items():
            _check(name, coder, store.widths)
        self.world = World.current()
        self.runs = {name: CoderRun(coder, config, self.world) for name, coder in self.coders.items()}
        self.n_steps = config.n_steps(store.batch_size * self.world.size)
        self.step = 0
        self.measured: dict[str, dict[str, float]] = {}
        self._loggers: list[Logger] = []

    @property
    def checkpoints(self) -> Path | None:
        """The folder of checkpoints."""
        return None if self.out is None else self.out / "checkpoints"

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to the last step, to the end of the data, or until Ctrl-C, which leaves a clean checkpoint.

        Parameters
        ----------
        resume
            Continue from the last checkpoint in `out`, if there is one.

        Raises
        ------
        FileExistsError
            If there is a checkpoint and `resume` is False, so that nothing is overwritten by accident.
        ResumeError
            If the checkpoint is of another training.
        FloatingPointError
            If a loss is no longer finite.
        """
        check_folder(self.out, resume)
        try:
            with stop_on_signal() as stop, self._bar() as bar, self._watching(stop, bar):
                self._run(stop, bar, resume)
        finally:
            for logger in self._loggers:
                logger.close()
            self._loggers = []
        complete = self.step >= self.n_steps
        if complete:
            self._calibrate()
            self.save_coders()
        return TrainResult(self.coders, self.step, complete, self.measured)

    def _run(self, stop: Callable[[], bool], bar: tqdm, resume: bool) -> None:
        """From the start or the last checkpoint to the end, or until `stop`, with a checkpoint of where it ends."""
        try:
            self._start(resume)
        except _Stopped:
            return  # there is nothing to keep yet
        bar.initial = bar.n = self.step
        self._show(bar)
        with suppress(_Stopped):
            self._steps(stop, bar)
        self.save()

    def _start(self, resume: bool) -> None:
        if resume and self.checkpoints is not None and steps_saved(self.checkpoints):
            self.resume()
        else:
            torch.manual_seed(self.config.seed)
            sample = self.store.sample(self.config.init_tokens)
            for run in self.runs.values():
                run.start(*read(run.coder.cfg, sample))
        if self.out is not None and self.world.first:
            self._loggers = make_loggers(self.logger_names, self.out, self.config.to_dict(), self.step)

    def _steps(self, stop: Callable[[], bool], bar: tqdm) -> None:
        device = next(iter(self.coders.values())).W_dec.device
        while self.step < self.n_steps and not self.world.any(stop(), device):
            batch = next(self.store, None)
            if self.world.any(batch is None, device):  # all processes end together
                break
            assert batch is not None
            self.take_step(batch)
            if self.step % self.config.log_every == 0 or self.step == self.n_steps:
                self._log()
                self._show(bar)
            if self.step % self.config.checkpoint_every == 0 and self.step < self.n_steps:
                self.save()
            bar.update()

    def take_step(self, batch: Batch) -> None:
        """One step of every coder on the same positions."""
        for run in self.runs.values():
            x, y = read(run.coder.cfg, batch)
            run.step(x, y, self.step, self.n_steps)
        self.step += 1

    def _calibrate(self) -> None:
        """Thresholds for inference, from the next positions in the data."""
        try:
            sample = self.store.sample(self.config.init_tokens)
        except ValueError:  # the data ended with the training: thresholds stay as they are
            sample = None
        if self.world.any(sample is None, next(iter(self.coders.values())).W_dec.device):
            return
        assert sample is not None
        for run in self.runs.values():
            run.calibrate(read(run.coder.cfg, sample)[0])

    # Telling -------------------------------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        hidden = not (self.config.progress and self.world.first)
        return tqdm(total=self.n_steps, disable=hidden, unit="step")

    @contextmanager
    def _watching(self, stop: Callable[[], bool], bar: tqdm) -> Iterator[None]:
        """While active, passes over the text are shown in the bar and end when a stop is requested."""
        blocks = self.store.blocks
        if not isinstance(blocks, ModelBlocks):
            yield
            return

        def watch(found: int, wanted: int) -> None:
            if stop() and self.world.size == 1:  # several processes stop together, between steps
                raise _Stopped
            bar.set_description_str(f"reading text {min(found, wanted) / wanted:.0%}" if found < wanted else "")

        blocks.watch = watch
        try:
            yield
        finally:
            blocks.watch = None

    def _check_finite(self) -> None:
        for name, run in self.runs.items():
            if self.world.any(not run.finite, run.sums.device):
                raise FloatingPointError(
                    f"the loss of {name} is no longer finite before step {self.step}: try a lower lr than"
                    f" {self.config.highest_lr(run.coder.cfg.d_sae):.3g}; the last checkpoint is intact"
                )

    def _log(self) -> None:
        self._check_finite()
        self.measured = {name: run.measured() for name, run in self.runs.items()}
        numbers = {f"{name}/{kind}": value for name, mine in self.measured.items() for kind, value in mine.items()}
        for logger in self._loggers:
            logger.log(self.step, {**numbers, "tokens": self.step * self.store.batch_size * self.world.size})

    def _show(self, bar: tqdm) -> None:
        """Means over the coders, and the worst of them."""
        if not self.measured or bar.disable:
            return
        rows = list(self.measured.values())
        loss, l0, ev, dead = (sum(row[kind] for row in rows) / len(rows) for kind in ("loss", "l0", "ev", "dead"))
        worst = f" (least {min(row['ev'] for row in rows):.3f})" if len(rows) > 1 else ""
        bar.set_postfix_str(f"loss {loss:.4f}, L0 {l0:.1f}, EV {ev:.3f}{worst}, dead {dead:.1%}", refresh=False)

    # Keeping -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, if there is a folder for it."""
        if self.checkpoints is None:
            return
        self._check_finite()
        tensors: dict[str, Tensor] = {}
        for name, run in self.runs.items():
            tensors |= {f"{name}/{kind}": value for kind, value in run.tensors().items()}
        process = {"store": self.store.state_dict(), "digest": self.store.digest()}
        save_checkpoint(
            self.checkpoints, self.step, tensors, self._about(), process, world=self.world, keep=self.config.keep
        )

    def resume(self, step: int | None = None) -> None:
        """Restore a checkpoint, by default the last.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ResumeError
            If it was made with other options, coders or data.
        """
        if self.checkpoints is None:
            raise FileNotFoundError("this training has no folder and so no checkpoints: give out=...")
        tensors, about, process = load_checkpoint(self.checkpoints, self.world, step)
        mine = self._about()
        # An option younger than the checkpoint had its default there, which is the way it was before.
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
        about["train"] = {name: about["train"].get(name, defaults[name]) for name in mine["train"]} | about["train"]
        for part in ("train", "coders"):
            if about.get(part) != mine[part]:
                raise ResumeError(_difference(part, about.get(part), mine[part]))
        if process["digest"] != self.store.digest():
            raise ResumeError("cannot resume: the checkpoint was made with other data, or data cut another way")
        for name, run in self.runs.items():
            run.load({k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")})
        self.store.load_state_dict(process["store"])
        self.step, self.measured = about["step"], about["measured"]

    def _about(self) -> dict[str, Any]:
        return {
            "train": self.config.same_run(),
            "coders": {name: coder.cfg.to_dict() for name, coder in self.coders.items()},
            "measured": self.measured,
        }

    def save_coders(self) -> None:
        """Write every coder, its scales folded into the weights, into `out`/coders."""
        if self.out is None or not self.world.first:
            return
        for leftover in (self.out / "coders").glob(".*.tmp"):  # of a kill while coders were written
            shutil.rmtree(leftover)
        for name, coder in self.coders.items():
            measured = self.measured.get(name, {})
            metrics = {theirs: measured[ours] for ours, theirs in METRICS.items() if ours in measured}
            coder.fold().save(self.out / "coders" / name, metrics=metrics, training=self._training())

    def _training(self) -> Training:
        """What a finished coder records of its training."""
        tokens = self.step * self.store.batch_size * self.world.size
        return {**self.about, "tokens": tokens, "steps": self.step, "metrics_from": "the last training batches"}


def check_folder(out: Path | None, resume: bool) -> None:
    """Raise FileExistsError if a new training would overwrite another in the same folder."""
    if out is not None and not resume and steps_saved(out / "checkpoints"):
        raise FileExistsError(f"{out} holds a checkpoint: pass resume=True to continue, or choose another folder")


def _check(name: str, coder: SparseCoder, widths: Mapping[str, int]) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a coder's name must be letters, digits, '.', '_' and '-', got {name!r}")
    for stream, expected in zip(streams_of(coder.cfg), (coder.cfg.d_in, coder.cfg.d_out), strict=True):
        if stream not in widths:
            raise ValueError(f"{name} needs {stream}, which the store does not hold; it holds {', '.join(widths)}")
        if widths[stream] != expected:
            raise ValueError(f"{name} takes {stream} to have width {expected}, the store has it in {widths[stream]}")


def _difference(part: str, theirs: Any, mine: Any) -> str:
    theirs = theirs if isinstance(theirs, dict) else {}
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key):
            return f"cannot resume: the checkpoint has {part}.{key} = {theirs.get(key)!r}, this run {mine.get(key)!r}"
    return f"cannot resume: the checkpoint has other {part}"
