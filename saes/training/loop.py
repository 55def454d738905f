"""The loop that trainings share: steps, a log, checkpoints, a request to stop, the end of the text, finished coders.

out/checkpoints/step-.../   from which a stopped or killed training continues, bit for bit
out/metrics.jsonl           figures of every coder
out/coders/<name>/          the finished coders
"""

from __future__ import annotations

import dataclasses
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from saes.coder import SparseCoder
from saes.files.own import Training
from saes.store.rows import RowSource
from saes.store.store import ActivationStore
from saes.training.checkpoint import ResumeError, load_checkpoint, save_checkpoint, steps_saved
from saes.training.config import TrainConfig
from saes.training.finetune_config import FinetuneConfig
from saes.training.loggers import Logger, make_loggers
from saes.training.signals import stop_on_signal
from saes.training.world import World

Ended = Literal["steps", "text", "stopped"]
"""All steps were taken; the text ended before; or Ctrl-C."""


class Stopped(Exception):
    """Ctrl-C while the model reads text."""


class TrainResult(NamedTuple):
    """How a training ended."""

    coders: dict[str, SparseCoder]
    step: int
    complete: bool
    """Whether all steps were taken. False: `ended` says why."""
    measured: dict[str, dict[str, float]]
    """Coder -> its figures in the last line of the log, or since then where the text ended."""
    ended: Ended
    """"text": coders are finished as far as they came; "stopped": `resume=True` continues."""
    n_steps: int
    """Steps that were asked for."""

    def ending(self) -> str:
        """Why it ended, and where, in a line."""
        why = {"steps": "all steps were taken", "text": "the text ended", "stopped": "stopped"}[self.ended]
        return f"{why} at step {self.step:,} of {self.n_steps:,}"


class TrainingLoop(ABC):
    """Coders in training. What a step is, and what it needs kept, its heirs say.

    A process takes `tokens_a_step` positions of `source` a step; the rest as for `Trainer`.
    """

    config: TrainConfig | FinetuneConfig
    kind: ClassVar[str]
    """What a checkpoint calls the options."""
    source_kind: ClassVar[str]
    """What it calls the place in the source."""
    kept_figures: ClassVar[Mapping[str, str]]
    """Figures of the log that finished coders carry, under the names of `saes.evaluation`."""

    def __init__(
        self,
        coders: Mapping[str, SparseCoder],
        config: TrainConfig | FinetuneConfig,
        source: ActivationStore | RowSource,
        tokens_a_step: int,
        *,
        out: str | Path | None,
        loggers: Sequence[str],
    ) -> None:
        self.coders, self.config, self._source = dict(coders), config, source
        self.out = None if out is None else Path(out)
        self.logger_names = tuple(loggers)
        if self.logger_names and self.out is None:
            raise ValueError(f"logging to {', '.join(self.logger_names)} needs a folder: out=...")
        self.world = World.current()
        self.tokens_a_step = tokens_a_step * self.world.size
        self.n_steps = config.n_steps(self.tokens_a_step)
        self.step = 0
        self.measured: dict[str, dict[str, float]] = {}
        self._loggers: list[Logger] = []

    # What heirs say -------------------------------------------------------------------------------------------

    @abstractmethod
    def next_batch(self) -> Any:
        """What the next step takes; None at the end of the text."""

    @abstractmethod
    def take_step(self, batch: Any) -> None:
        """One step of all coders."""

    @abstractmethod
    def measure(self) -> dict[str, dict[str, float]]:
        """Coder -> figures, the means since the last call."""

    @abstractmethod
    def shown(self) -> str:
        """The last figures in a few words, for the progress bar."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step or the next line of the log depends on."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""

    @abstractmethod
    def calibrate(self) -> None:
        """Thresholds for inference, after the last step."""

    @abstractmethod
    def training(self) -> Training:
        """What a finished coder records of its training, besides its length."""

    def start(self) -> None:  # noqa: B027  # most need nothing
        """Before the first step of a training that is not resumed."""

    def place(self) -> dict[str, Any]:
        """Where this process is in the source, fit for JSON."""
        return {self.source_kind: self._source.state_dict()}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Continue from what :meth:`place` returned."""
        self._source.load_state_dict(place[self.source_kind])

    def options(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return self.config.same_run()

    def check(self) -> None:  # noqa: B027
        """Raise FloatingPointError where a loss is no longer finite, before it is logged or kept."""

    @contextmanager
    def running(self, stop: Callable[[], bool], bar: tqdm) -> Iterator[None]:
        """Active from before the first step to after the last."""
        yield

    # The loop -------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path | None:
        """The folder of checkpoints."""
        return None if self.out is None else self.out / "checkpoints"

    @property
    def _device(self) -> torch.device:
        return next(iter(self.coders.values())).W_dec.device

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to the last step, to the end of the text, or until Ctrl-C, which leaves a clean checkpoint.

        Coders are finished and written after the last step, and where the text ends before it.

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
        ValueError
            If the text ends before the first step.
        """
        check_folder(self.out, resume)
        ended: Ended = "stopped"
        hidden = not (self.config.progress and self.world.first)
        try:
            with (
                stop_on_signal() as stop,
                tqdm(total=self.n_steps, disable=hidden, unit="step") as bar,
                self.running(stop, bar),
            ):
                ended = self._run(stop, bar, resume)
        finally:
            for logger in self._loggers:
                logger.close()
            self._loggers = []
        if ended != "stopped":
            self.calibrate()
            self.save_coders()
        return TrainResult(self.coders, self.step, ended == "steps", self.measured, ended, self.n_steps)

    def _run(self, stop: Callable[[], bool], bar: tqdm, resume: bool) -> Ended:
        """From the start or the last checkpoint to the end, or until `stop`, with a checkpoint of where it ends."""
        try:
            if resume and self.checkpoints is not None and steps_saved(self.checkpoints):
                self.resume()
            else:
                self.start()
        except Stopped:
            return "stopped"  # there is nothing to keep yet
        if self.out is not None and self.world.first:
            self._loggers = make_loggers(self.logger_names, self.out, self.config.to_dict(), self.step)
        bar.initial = bar.n = self.step
        self._show(bar)
        ended: Ended = "stopped"
        with suppress(Stopped):
            ended = self._steps(stop, bar)
        if ended == "text" and self.step == 0:
            raise ValueError("the text ended before the first step: there is nothing to train on")
        self.save()
        if ended == "text" and self.step % self.config.log_every:  # not a line of the log, which may yet go on
            self.measured = self.measure()
        return ended

    def _steps(self, stop: Callable[[], bool], bar: tqdm) -> Ended:
        while self.step < self.n_steps:
            if self.world.any(stop(), self._device):
                return "stopped"
            batch = self.next_batch()
            if self.world.any(batch is None, self._device):  # all processes end together
                return "text"
            self.take_step(batch)
            if self.step % self.config.log_every == 0 or self.step == self.n_steps:
                self._log()
                self._show(bar)
            if self.step % self.config.checkpoint_every == 0 and self.step < self.n_steps:
                self.save()
            bar.update()
        return "steps"

    def _log(self) -> None:
        self.check()
        self.measured = self.measure()
        numbers = {f"{name}/{kind}": value for name, mine in self.measured.items() for kind, value in mine.items()}
        for logger in self._loggers:
            logger.log(self.step, {**numbers, "tokens": self.step * self.tokens_a_step})

    def _show(self, bar: tqdm) -> None:
        if self.measured and not bar.disable:
            bar.set_postfix_str(self.shown(), refresh=False)

    # Keeping --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, if there is a folder for it."""
        if self.checkpoints is None:
            return
        self.check()
        process = self.place() | {"digest": self._source.digest()}
        save_checkpoint(
            self.checkpoints,
            self.step,
            self.tensors(),
            self._about() | {"measured": self.measured},
            process,
            world=self.world,
            keep=self.config.keep,
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
        # An option younger than the checkpoint had its default there, which is the way it was before.
        defaults = {f.name: f.default for f in dataclasses.fields(self.config)}
        for part, mine in self._about().items():
            theirs = about.get(part)
            if part == self.kind and isinstance(theirs, dict):
                theirs = {name: theirs.get(name, defaults.get(name)) for name in mine} | theirs
            if theirs != mine:
                raise ResumeError(_difference(part, theirs, mine))
        if process["digest"] != self._source.digest():
            raise ResumeError("cannot resume: the checkpoint was made with other data, or data cut another way")
        self.load(tensors)
        self.go_to(process)
        self.step, self.measured = about["step"], about["measured"]

    def _about(self) -> dict[str, dict[str, Any]]:
        return {self.kind: self.options(), "coders": {name: coder.cfg.to_dict() for name, coder in self.coders.items()}}

    def save_coders(self) -> None:
        """Write every coder, its scales folded into the weights, into `out`/coders."""
        if self.out is None or not self.world.first:
            return
        for leftover in (self.out / "coders").glob(".*.tmp"):  # of a kill while coders were written
            shutil.rmtree(leftover)
        length: Training = {"tokens": self.step * self.tokens_a_step, "steps": self.step}
        about: Training = {**self.training(), **length, "metrics_from": "the last training batches"}
        if self.step < self.n_steps:
            about["steps_asked"] = self.n_steps
        for name, coder in self.coders.items():
            measured = self.measured.get(name, {})
            metrics = {theirs: measured[ours] for ours, theirs in self.kept_figures.items() if ours in measured}
            coder.fold().save(self.out / "coders" / name, metrics=metrics, training=about)


def check_folder(out: Path | None, resume: bool) -> None:
    """Raise FileExistsError if a new training would overwrite another in the same folder."""
    if out is not None and not resume and steps_saved(out / "checkpoints"):
        raise FileExistsError(f"{out} holds a checkpoint: pass resume=True to continue, or choose another folder")


def _difference(part: str, theirs: Any, mine: Any) -> str:
    theirs = theirs if isinstance(theirs, dict) else {}
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key):
            return f"cannot resume: the checkpoint has {part}.{key} = {theirs.get(key)!r}, this run {mine.get(key)!r}"
    return f"cannot resume: the checkpoint has other {part}"
