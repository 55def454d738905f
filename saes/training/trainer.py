"""Training many coders at once over one store; see `saes.training.loop` for what is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from saes.coder import SparseCoder
from saes.files.own import Training
from saes.store.blocks import ModelBlocks
from saes.store.store import ActivationStore, Batch
from saes.targets import read, streams_of
from saes.training.coder_run import CoderRun
from saes.training.config import TrainConfig
from saes.training.loop import Stopped, TrainingLoop

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Trainer(TrainingLoop):
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

    config: TrainConfig
    kind, source_kind = "train", "store"
    kept_figures: ClassVar = {"ev": "ev", "l0": "l0", "dead": "dead_share"}

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
        super().__init__(coders, config, store, store.batch_size, out=out, loggers=loggers)
        for name, coder in self.coders.items():
            _check(name, coder, store.widths)
        self.store, self.about = store, dict(about or {})
        self.runs = {name: CoderRun(coder, config, self.world) for name, coder in self.coders.items()}
        self._last_batch: dict[str, Any] | None = None
        """The store's place before the last batch."""

    def start(self) -> None:
        """Fit scales and b_dec to a sample."""
        torch.manual_seed(self.config.seed)
        sample = self.store.sample(self.config.init_tokens)
        for run in self.runs.values():
            run.start(*read(run.coder.cfg, sample))

    def next_batch(self) -> Batch | None:
        """The store's."""
        before = self.store.state_dict()
        batch = next(self.store, None)
        if batch is not None:
            self._last_batch = before
        return batch

    def take_step(self, batch: Batch) -> None:
        """One step of every coder on the same positions."""
        for run in self.runs.values():
            x, y = read(run.coder.cfg, batch)
            run.step(x, y, self.step, self.n_steps)
        self.step += 1

    def calibrate(self) -> None:
        """Thresholds for inference, from the next positions in the data; where it ended, from the last."""
        sample = self._sample()
        if sample is None and self._last_batch is not None:
            self.store.load_state_dict(self._last_batch)
            sample = self._sample()
        if self.world.any(sample is None, self._device):  # text that cannot be read again: thresholds stay as they are
            return
        assert sample is not None
        for run in self.runs.values():
            run.calibrate(read(run.coder.cfg, sample)[0])

    def _sample(self) -> Batch | None:
        try:
            return self.store.sample(self.config.init_tokens)
        except ValueError:
            return None

    # Telling -------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, stop: Callable[[], bool], bar: tqdm) -> Iterator[None]:
        """While active, passes over the text are shown in the bar and end when a stop is requested."""
        blocks = self.store.blocks
        if not isinstance(blocks, ModelBlocks):
            yield
            return

        def watch(found: int, wanted: int) -> None:
            if stop() and self.world.size == 1:  # several processes stop together, between steps
                raise Stopped
            bar.set_description_str(f"reading text {min(found, wanted) / wanted:.0%}" if found < wanted else "")

        blocks.watch = watch
        try:
            yield
        finally:
            blocks.watch = None

    def check(self) -> None:
        """Raise FloatingPointError where a loss is no longer finite."""
        for name, run in self.runs.items():
            if self.world.any(not run.finite, run.sums.device):
                raise FloatingPointError(
                    f"the loss of {name} is no longer finite before step {self.step}: try a lower lr than"
                    f" {self.config.highest_lr(run.coder.cfg.d_sae):.3g}; the last checkpoint is intact"
                )

    def measure(self) -> dict[str, dict[str, float]]:
        """Loss, ev, l0, aux and dead share of every coder since the last call."""
        return {name: run.measured() for name, run in self.runs.items()}

    def shown(self) -> str:
        """Means over the coders, and the worst of them."""
        rows = list(self.measured.values())
        loss, l0, ev, dead = (sum(row[kind] for row in rows) / len(rows) for kind in ("loss", "l0", "ev", "dead"))
        worst = f" (least {min(row['ev'] for row in rows):.3f})" if len(rows) > 1 else ""
        return f"loss {loss:.4f}, L0 {l0:.1f}, EV {ev:.3f}{worst}, dead {dead:.1%}"

    # Keeping -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Those of every coder's run."""
        return {f"{name}/{kind}": value for name, run in self.runs.items() for kind, value in run.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them."""
        for name, run in self.runs.items():
            run.load({k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")})

    def place(self) -> dict[str, Any]:
        """The store's, and the one before the last batch."""
        return super().place() | {"last_batch": self._last_batch}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Continue from there."""
        super().go_to(place)
        self._last_batch = place.get("last_batch")

    def training(self) -> Training:
        """What was told of the training."""
        return self.about


def _check(name: str, coder: SparseCoder, widths: Mapping[str, int]) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a coder's name must be letters, digits, '.', '_' and '-', got {name!r}")
    for stream, expected in zip(streams_of(coder.cfg), (coder.cfg.d_in, coder.cfg.d_out), strict=True):
        if stream not in widths:
            raise ValueError(f"{name} needs {stream}, which the store does not hold; it holds {', '.join(widths)}")
        if widths[stream] != expected:
            raise ValueError(f"{name} takes {stream} to have width {expected}, the store has it in {widths[stream]}")
