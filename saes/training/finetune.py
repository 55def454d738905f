"""Fine-tuning coders through the model: what they lose of its predictions, not only what they miss at their sites.

All coders are spliced in at once, without their errors, and trained on

    loss = KL(clean || spliced) + reconstruction * mean over coders of FVU

the divergence averaged over the positions of a batch, FVU the share of variance that a coder misses of the values that
it is to predict in the spliced pass. A coder trained at its site alone spends its latents on what varies most there;
this moves them to what later layers read (end-to-end dictionaries: Braun et al. 2024, arXiv:2405.12241; as a short last
stage of training: Karvonen 2025, arXiv:2503.17272). The second term keeps coders true to their sites: without it they
may compute the same prediction in another way.

The model's weights stay as they are, decoder rows keep their norms, and latents are chosen as in training: BatchTopK
and Matryoshka keep the largest of a batch, and their threshold for inference is fitted at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hooked_mamba.models import HookedModel
from saes.files.own import Training
from saes.naming import Coders, check_fits, named_coders
from saes.store.data import DataConfig, Text, rows_of
from saes.store.rows import EveryNth, Rows, RowSource, take
from saes.training.coder_run import calibrate
from saes.training.finetune_config import FinetuneConfig
from saes.training.loop import TrainingLoop, TrainResult
from saes.training.spliced_pass import along_spheres, frozen, spliced_pass
from saes.training.world import World, torchrun

KINDS = ("topk", "batchtopk", "matryoshka")
"""Architectures whose number of active latents is set, so that no penalty is needed to hold it."""


def finetune_coders(
    model: HookedModel,
    coders: Coders,
    text: Text,
    config: FinetuneConfig,
    data: DataConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    loggers: Sequence[str] = (),
) -> TrainResult:
    """Fine-tune trained coders, all of them spliced in at once.

    Parameters
    ----------
    model
        Stays as it is.
    coders
        Changed in place.
    text
        A file, texts, tokens or a data set; see `saes.store.data`.
    config, data
        How to train; of `data`, how text becomes rows, and how many of them make a batch (`rows_per_pass`).
    out
        Folder of checkpoints, log and finished coders; None: nothing is written.
    resume
        Go on from the last checkpoint in `out`, if there is one.
    loggers
        "tensorboard", "wandb".

    Raises
    ------
    ValueError
        A coder that does not fit the model, or whose number of active latents only a penalty would hold.
    ResumeError
        The checkpoint is of another training.
    FloatingPointError
        The loss is no longer finite.
    """
    with torchrun(model.device):
        return Finetuning(model, coders, text, config, data, out=out, loggers=loggers).train(resume=resume)


class Finetuning(TrainingLoop):
    """Coders in training through the model; see :func:`finetune_coders`."""

    config: FinetuneConfig
    kind, source_kind = "finetune", "rows"
    kept_figures: ClassVar = {"ev": "ev", "l0": "l0"}

    def __init__(
        self,
        model: HookedModel,
        coders: Coders,
        text: Text,
        config: FinetuneConfig,
        data: DataConfig | None = None,
        *,
        out: str | Path | None = None,
        loggers: Sequence[str] = (),
    ) -> None:
        self.model, self.data = model, data or DataConfig(seed=config.seed)
        named = named_coders(coders)
        for name, coder in named.items():
            check_fits(coder, model, name)
            if coder.cfg.architecture not in KINDS:
                raise ValueError(
                    f"{name} is {coder.cfg.architecture}: how many of its latents are active is held by a penalty,"
                    f" which fine-tuning has none of; expected {', '.join(KINDS)}"
                )
        world, rows = World.current(), rows_of(text, model, self.data)
        self.rows: RowSource = EveryNth(rows, world.rank, world.size) if world.size > 1 else rows
        tokens_a_step = self.data.rows_per_pass * self.data.context_length
        super().__init__(named, config, self.rows, tokens_a_step, out=out, loggers=loggers)
        self.parameters = {f"{n}.{p}": value for n, c in self.coders.items() for p, value in c.named_parameters()}
        self.norms = {name: coder.W_dec.detach().norm(dim=1, keepdim=True) for name, coder in self.coders.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, betas=(config.beta1, config.beta2))
        self.sums = torch.zeros(1 + 2 * len(self.coders), dtype=torch.float64)
        """Divergence, shares missed and active latents, since the last line of the log."""
        self.summed = 0
        self._last: Rows | None = None

    @contextmanager
    def running(self, stop: Callable[[], bool], bar: tqdm) -> Iterator[None]:
        """While active, the model's weights take no gradients."""
        with frozen(self.model):
            yield

    def next_batch(self) -> Rows | None:
        """The next rows of text."""
        rows = take(self.rows, self.data.rows_per_pass)
        return None if rows is None else rows.to(self.model.device)

    def take_step(self, rows: Rows) -> None:
        """One step of all coders on some rows.

        Raises
        ------
        FloatingPointError
            If the loss is no longer finite.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(self.step, self.n_steps)
        found = spliced_pass(self.model, self.coders, rows)
        total = found.kl + config.reconstruction * torch.stack(list(found.fvu.values())).mean()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {float(total.detach())} before step {self.step}: try a lower lr than {config.lr:.3g}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        for coder in self.coders.values():
            along_spheres(coder)
        if self.world.size > 1:
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.world.mean_([p.grad for p in self.parameters.values() if p.grad is not None])
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, coder in self.coders.items():
                coder.W_dec.mul_(self.norms[name] / coder.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
            parts = [found.kl, *found.fvu.values(), *found.l0.values()]
            self.sums += torch.stack([part.detach().double().cpu() for part in parts])
        self._last = rows
        self.summed += 1
        self.step += 1

    @torch.no_grad()
    def calibrate(self) -> None:
        """Thresholds for inference, from the last rows."""
        if self._last is None:
            return
        for name, x in spliced_pass(self.model, self.coders, self._last).seen.items():
            if calibrate(self.coders[name], x):
                self.world.share_([self.coders[name].threshold])

    def measure(self) -> dict[str, dict[str, float]]:
        """Divergence of all, ev and l0 of every coder since the last call."""
        self.world.mean_([self.sums])
        kl, *rest = (self.sums / max(1, self.summed)).tolist()
        self.sums.zero_()
        self.summed = 0
        n = len(self.coders)
        parts = zip(self.coders, rest[:n], rest[n:], strict=True)
        return {name: {"kl": kl, "ev": 1 - missed, "l0": active} for name, missed, active in parts}

    def shown(self) -> str:
        """The divergence."""
        return f"KL {next(iter(self.measured.values()))['kl']:.4f}"

    # Keeping -------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The config's, and what of the data makes a step."""
        return super().options() | {"rows": self.data.rows_per_pass, "length": self.data.context_length}

    def tensors(self) -> dict[str, Tensor]:
        """Coders, optimiser, norms, sums of the log and the last rows."""
        tensors: dict[str, Tensor] = {"sums": torch.cat([self.sums, torch.tensor([self.summed], dtype=torch.float64)])}
        for name, coder in self.coders.items():
            tensors |= {f"coder/{name}/{key}": value for key, value in coder.state_dict().items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam/{name}/{kind}": v for kind, v in self.optimizer.state[parameter].items()}
        for name, norms in self.norms.items():
            tensors[f"norms/{name}"] = norms
        if self._last is not None:
            tensors |= {f"last/{key}": value for key, value in self._last._asdict().items() if value is not None}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them."""
        for name, coder in self.coders.items():
            for key, value in coder.state_dict().items():
                value.copy_(tensors[f"coder/{name}/{key}"])
            self.norms[name] = tensors[f"norms/{name}"].to(coder.device)
        for name, parameter in self.parameters.items():
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam/{name}/{kind}" in tensors:
                    saved = tensors[f"adam/{name}/{kind}"]
                    like = torch.empty_like(parameter) if saved.ndim else torch.empty(())
                    self.optimizer.state[parameter][kind] = like.copy_(saved)
        self.sums.copy_(tensors["sums"][:-1])
        self.summed = int(tensors["sums"][-1])
        last = {key.removeprefix("last/"): value for key, value in tensors.items() if key.startswith("last/")}
        self._last = Rows(**last).to(self.model.device) if last else None

    def training(self) -> Training:
        """How it was fine-tuned."""
        return {"finetuned": "KL(clean || spliced), all coders at once", "reconstruction": self.config.reconstruction}
