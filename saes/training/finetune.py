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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hooked_mamba.models import HookedModel
from saes.naming import Coders, check_fits, named_coders
from saes.store.data import DataConfig, Text, rows_of
from saes.store.rows import EveryNth, Rows, RowSource, take
from saes.training.checkpoint import ResumeError, load_checkpoint, save_checkpoint, steps_saved
from saes.training.coder_run import calibrate
from saes.training.finetune_config import FinetuneConfig
from saes.training.loggers import Logger, make_loggers
from saes.training.signals import stop_on_signal
from saes.training.spliced_pass import along_spheres, frozen, spliced_pass
from saes.training.trainer import TrainResult, check_folder
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


class Finetuning:
    """Coders in training through the model; see :func:`finetune_coders`."""

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
        self.model, self.config, self.data = model, config, data or DataConfig(seed=config.seed)
        self.coders = named_coders(coders)
        for name, coder in self.coders.items():
            check_fits(coder, model, name)
            if coder.cfg.architecture not in KINDS:
                raise ValueError(
                    f"{name} is {coder.cfg.architecture}: how many of its latents are active is held by a penalty,"
                    f" which fine-tuning has none of; expected {', '.join(KINDS)}"
                )
        self.world = World.current()
        rows: RowSource = rows_of(text, model, self.data)
        self.rows = EveryNth(rows, self.world.rank, self.world.size) if self.world.size > 1 else rows
        self.out = None if out is None else Path(out)
        self.logger_names = tuple(loggers)
        self.parameters = {f"{n}.{p}": value for n, c in self.coders.items() for p, value in c.named_parameters()}
        self.norms = {name: coder.W_dec.detach().norm(dim=1, keepdim=True) for name, coder in self.coders.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, betas=(config.beta1, config.beta2))
        self.tokens_a_step = self.data.rows_per_pass * self.data.context_length * self.world.size
        self.n_steps = config.n_steps(self.tokens_a_step)
        self.step = 0
        self.measured: dict[str, dict[str, float]] = {}
        self.sums = torch.zeros(1 + 2 * len(self.coders), dtype=torch.float64)
        """Divergence, shares missed and active latents, since the last line of the log."""
        self.summed = 0
        self._seen: dict[str, Tensor] = {}
        self._loggers: list[Logger] = []

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to the last step, the end of the text, or Ctrl-C, which leaves a checkpoint."""
        check_folder(self.out, resume)
        if resume and self.out is not None and steps_saved(self.out / "checkpoints"):
            self.resume()
        if self.out is not None and self.world.first:
            self._loggers = make_loggers(self.logger_names, self.out, self.config.to_dict(), self.step)
        hidden = not (self.config.progress and self.world.first)
        try:
            bar = tqdm(total=self.n_steps, initial=self.step, disable=hidden, unit="step")
            with bar, stop_on_signal() as stop, frozen(self.model):
                self._steps(stop, bar)
            self.save()
        finally:
            for logger in self._loggers:
                logger.close()
            self._loggers = []
        complete = self.step >= self.n_steps
        if complete:
            self._finish()
        return TrainResult(self.coders, self.step, complete, self.measured)

    def _steps(self, stop: Callable[[], bool], bar: tqdm) -> None:
        device = self.model.device
        while self.step < self.n_steps and not self.world.any(stop(), device):
            rows = take(self.rows, self.data.rows_per_pass)
            if self.world.any(rows is None, device):
                break
            assert rows is not None
            self.take_step(rows.to(device))
            if self.step % self.config.log_every == 0 or self.step == self.n_steps:
                self._log()
                kl = next(iter(self.measured.values()))["kl"]
                bar.set_postfix_str(f"KL {kl:.4f}", refresh=False)
            if self.step % self.config.checkpoint_every == 0 and self.step < self.n_steps:
                self.save()
            bar.update()

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
        self._seen = found.seen
        self.summed += 1
        self.step += 1

    def _log(self) -> None:
        self.world.mean_([self.sums])
        kl, *rest = (self.sums / max(1, self.summed)).tolist()
        self.sums.zero_()
        self.summed = 0
        n = len(self.coders)
        for name, missed, active in zip(self.coders, rest[:n], rest[n:], strict=True):
            self.measured[name] = {"kl": kl, "ev": 1 - missed, "l0": active}
        numbers = {f"{n}/{kind}": value for n, mine in self.measured.items() for kind, value in mine.items()}
        for logger in self._loggers:
            logger.log(self.step, {**numbers, "tokens": self.step * self.tokens_a_step})

    def _finish(self) -> None:
        """Thresholds for inference from the last batch, and the coders' files."""
        for name, x in self._seen.items():
            if calibrate(self.coders[name], x):
                self.world.share_([self.coders[name].threshold])
        if self.out is None or not self.world.first:
            return
        about: dict[str, Any] = {
            "finetuned": "KL(clean || spliced), all coders at once",
            "reconstruction": self.config.reconstruction,
            "tokens": self.step * self.tokens_a_step,
            "steps": self.step,
            "metrics_from": "the last training batches",
        }
        for name, coder in self.coders.items():
            metrics = {key: self.measured[name][key] for key in ("ev", "l0")} if name in self.measured else {}
            coder.save(self.out / "coders" / name, metrics=metrics, training=about)

    # Keeping -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, if there is a folder for it."""
        if self.out is None:
            return
        tensors: dict[str, Tensor] = {"sums": torch.cat([self.sums, torch.tensor([self.summed], dtype=torch.float64)])}
        for name, coder in self.coders.items():
            tensors |= {f"coder/{name}/{key}": value for key, value in coder.state_dict().items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam/{name}/{kind}": v for kind, v in self.optimizer.state[parameter].items()}
        for name, norms in self.norms.items():
            tensors[f"norms/{name}"] = norms
        process = {"rows": self.rows.state_dict(), "digest": self.rows.digest()}
        folder = self.out / "checkpoints"
        save_checkpoint(folder, self.step, tensors, self._about(), process, world=self.world, keep=self.config.keep)

    @torch.no_grad()
    def resume(self, step: int | None = None) -> None:
        """Restore a checkpoint, by default the last.

        Raises
        ------
        ResumeError
            If it was made with other options, coders or text.
        """
        assert self.out is not None
        tensors, about, process = load_checkpoint(self.out / "checkpoints", self.world, step)
        mine = self._about()
        for part in ("finetune", "coders"):
            if about.get(part) != mine[part]:
                raise ResumeError(
                    f"cannot resume: the checkpoint has {part} {about.get(part)!r}, this run {mine[part]!r}"
                )
        if process["digest"] != self.rows.digest():
            raise ResumeError("cannot resume: the checkpoint was made with other text, or text cut another way")
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
        self.rows.load_state_dict(process["rows"])
        self.step, self.measured = about["step"], about["measured"]

    def _about(self) -> dict[str, Any]:
        return {
            "finetune": self.config.same_run() | {"rows": self.data.rows_per_pass, "length": self.data.context_length},
            "coders": {name: coder.cfg.to_dict() for name, coder in self.coders.items()},
            "measured": self.measured,
        }
