"""One coder in training: its optimiser, its count of inactive latents, and one step.

A step: loss -> gradient of (loss / d_out), averaged over processes -> projected to keep the decoder's norms -> clipped
-> fused Adam -> unit decoder rows -> inactivity counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saes.coder import SparseCoder
from saes.init import after_step, initialise, project_decoder_gradient
from saes.loss import LossState, loss
from saes.training.config import TrainConfig
from saes.training.world import World

MEASURED = ("loss", "fvu", "l0", "aux")
"""What is summed between two lines of the log."""

CALIBRATED = 1 << 25
"""Pre-activations from which a threshold is taken."""


@torch.no_grad()
def calibrate(coder: SparseCoder, x: Float[Tensor, "n d_in"]) -> bool:
    """Set the threshold of a batchtopk or matryoshka coder so that k latents are active on average; True if it did.

    In training the threshold only follows the batches' smallest active values.
    """
    cfg = coder.cfg
    if cfg.architecture not in ("batchtopk", "matryoshka"):
        return False
    pre = coder.preact(x[: max(256, CALIBRATED // cfg.d_sae)])
    places = pre.numel() - len(pre) * coder.k
    if places <= 0:
        return False
    coder.threshold.copy_(pre.flatten().kthvalue(places).values.clamp(min=0))
    return True


class CoderRun:
    """One coder in training.

    Parameters
    ----------
    coder
        Trained in place.
    config
        How.
    world
        The processes among which gradients are averaged.
    """

    def __init__(self, coder: SparseCoder, config: TrainConfig, world: World) -> None:
        self.coder, self.config, self.world = coder, config, world
        settings = {
            "dead_after": config.dead_after_tokens,
            "aux_alpha": config.aux_alpha,
            "aux_k": config.aux_k,
            "wide_alpha": config.wide_alpha,
            "bandwidth": config.bandwidth,
        }
        self.state = LossState.of(coder, **settings)
        self.parameters = dict(coder.named_parameters())
        self.optimizer = torch.optim.Adam(
            list(self.parameters.values()),
            lr=config.highest_lr(coder.cfg.d_sae),
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=coder.W_dec.device)
        self.summed = 0

    def start(self, x: Tensor, y: Tensor) -> None:
        """Fit scales and b_dec to a sample; every process then starts from the first one's."""
        initialise(self.coder, x, y, b_dec=self.config.b_dec)
        self.world.share_([*self.coder.parameters(), *self.coder.buffers()])

    @torch.enable_grad()
    def step(self, x: Tensor, y: Tensor, step: int, n_steps: int) -> None:
        """One step of the training's `n_steps`; gradients are on, whatever they are outside."""
        coder, config = self.coder, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.highest_lr(coder.cfg.d_sae) * config.lr_factor(step, n_steps)
        self.state.sparsity = config.sparsity_at(step, n_steps)
        half = config.autocast is not None and x.is_cuda
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            losses = loss(coder, x, y, self.state)
        self.optimizer.zero_grad(set_to_none=True)
        (losses.total / coder.cfg.d_out).backward()
        if self.world.size > 1:
            self._average_gradients()
        if config.decoder_norm:
            project_decoder_gradient(coder)
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        self.optimizer.step()
        after_step(coder, config.decoder_norm)

        least = losses.least
        if self.world.size > 1 and "threshold" in dict(coder.named_buffers()):
            least = (coder.threshold if least is None else least).clone()
            self.world.mean_([least])
        fired = self.world.either(losses.fired)
        self.state.observe(coder, fired, len(x) * self.world.size, least)
        with torch.no_grad():
            self.sums += torch.stack([losses.total / coder.cfg.d_out, losses.fvu, losses.l0, losses.aux]).double()
        self.summed += 1

    def calibrate(self, x: Tensor) -> None:
        """After the last step, see :func:`calibrate`; every process then has the first one's threshold."""
        if calibrate(self.coder, x):
            self.world.share_([self.coder.threshold])

    def _average_gradients(self) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # nothing here, but perhaps in another process
                parameter.grad = torch.zeros_like(parameter)
        self.world.mean_([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])

    @property
    def finite(self) -> bool:
        """Whether the loss has been finite since the last line of the log."""
        return bool(torch.isfinite(self.sums).all())

    def measured(self) -> dict[str, float]:
        """Means since the last line of the log: loss per output dimension, ev, l0, aux; and the dead share now."""
        self.world.mean_([self.sums])
        means = dict(zip(MEASURED, (self.sums / max(1, self.summed)).tolist(), strict=True))
        self.sums.zero_()
        self.summed = 0
        dead = float(self.state.dead.float().mean())
        return {"loss": means["loss"], "ev": 1 - means["fvu"], "l0": means["l0"], "aux": means["aux"], "dead": dead}

    # Keeping -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step or the next line of the log depends on."""
        out = {f"coder.{name}": value for name, value in self.coder.state_dict().items()}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                out[f"adam.{kind}.{name}"] = value
        out["since_fired"] = self.state.since_fired
        out["sums"] = torch.cat([self.sums.cpu(), torch.tensor([self.summed], dtype=torch.float64)])
        return out

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned.

        Raises
        ------
        ValueError
            The tensors are those of a coder with other shapes.
        """
        mine = self.coder.state_dict()
        theirs = {name.removeprefix("coder."): v for name, v in tensors.items() if name.startswith("coder.")}
        if mine.keys() != theirs.keys() or any(mine[name].shape != value.shape for name, value in theirs.items()):
            raise ValueError("the checkpoint holds a coder of another shape")
        for name, value in theirs.items():
            mine[name].copy_(value)
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"adam.{kind}.{name}")
                if saved is None:  # no gradient yet
                    continue
                # Fused Adam takes memory to be laid out like the parameter's, and counts of steps to lie beside it.
                like = torch.empty_like(parameter) if saved.ndim else torch.empty((), device=parameter.device)
                state[kind] = like.copy_(saved)
        self.state = dataclasses.replace(self.state, since_fired=tensors["since_fired"].to(self.sums.device))
        self.sums.copy_(tensors["sums"][:-1])
        self.summed = int(tensors["sums"][-1])
