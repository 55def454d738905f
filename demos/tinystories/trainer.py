"""The training loop's state and one step of it.

A step: crops -> loss with dropout hooks, plus the balance of experts -> gradients, clipped -> AdamW at the learning
rate of this step.
Everything a step reads (weights, moments, two random states, the step's number) is in the checkpoint, so a resumed
run continues bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from demos.hunger.concepts import HUNGRY
from demos.tinystories import checkpoint
from demos.tinystories.balance import Balance
from demos.tinystories.data import Corpus, HeldOut, crops, held_out_loss
from demos.tinystories.dropout import dropout_hooks
from demos.tinystories.leads import lead_area
from demos.tinystories.models import build_model
from demos.tinystories.options import Options
from hooked_mamba import load_model


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr * lr` at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    low = options.final_lr * options.lr
    return low + (options.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW that decays matrices: the weights of layers, as those who train Mamba and RWKV do.

    A_log is a table of rates, not a map; RWKV's low-rank factors have names of their own.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.endswith("weight")
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2), eps=1e-8)


class Trainer:
    """One run: model, optimiser, random states, and what was measured so far.

    Files in `options.out`: `checkpoint.safetensors`, `best.safetensors` (the weights with the lowest held-out
    loss), `log.jsonl` (one line a measurement).
    """

    def __init__(self, options: Options, corpus: Corpus) -> None:
        self.options, self.corpus = options, corpus
        self.model = build_model(options, corpus.tokenizer)
        if options.start is not None:
            self.load_weights(dict(load_model(options.start).named_parameters()))
        self.optimizer = build_optimizer(self.model, options)
        self.data_random = torch.Generator().manual_seed(options.seed + 1)
        self.dropout_random = torch.Generator().manual_seed(options.seed + 2)
        self.dropout = dropout_hooks(self.model, options.dropout, self.dropout_random)
        self.balance = Balance(self.model)
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.recent: list[float] = []
        self.seconds = 0.0
        self._started = time.perf_counter()
        self.checkpoint_path = options.out / "checkpoint.safetensors"
        self.best_path = options.out / "best.safetensors"
        self.log_path = options.out / "log.jsonl"

    @property
    def tokens_seen(self) -> int:
        """Tokens read so far, repeats counted."""
        return self.step * self.options.batch * self.options.length

    @property
    def best(self) -> dict[str, float] | None:
        """The log's row of the weights that are kept: with the lowest held-out loss, or the last."""
        if self.options.choose == "last":
            return self.rows[-1] if self.rows else None
        return min(self.rows, key=lambda row: row["nats_per_token"], default=None)

    def wall_seconds(self) -> float:
        """Seconds of running, resumed stretches added up."""
        return self.seconds + time.perf_counter() - self._started

    def take_step(self) -> float:
        """One optimiser step; returns the loss (mean nats per token, under dropout).

        Raises
        ------
        FloatingPointError
            If the loss is no number any more.
        """
        rate = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = crops(self.corpus, self.options, self.data_random)
        with self.model.hooks(fwd_hooks=self.dropout + self.balance.hooks()):
            loss = self.model(tokens, return_type="loss")
        even = self.options.balance * self.balance.loss() if self.balance.places else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        (loss + even).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip or math.inf)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: try a lower --lr or a smaller --clip")
        self.optimizer.step()
        self.step += 1
        self.recent.append(value)
        return value

    def measure(self) -> HeldOut:
        """Held-out loss now; adds a line to the log and keeps the weights if they are the best so far."""
        held_out = held_out_loss(self.model, self.corpus.held_out, self.corpus.held_out_chars)
        row = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "seconds": round(self.wall_seconds(), 1),
            "lr": learning_rate(self.step - 1, self.options),
            "train_loss": sum(self.recent) / max(1, len(self.recent)),
            **held_out._asdict(),
        }
        if self.options.cue_stories:
            row["area"] = lead_area(self.model, HUNGRY, "find")
        self.recent = []
        self.rows.append(row)
        if row is self.best:
            checkpoint.save_checkpoint(self.best_path, self._weights(), {"step": self.step, **held_out._asdict()})
        lines = "".join(json.dumps(entry) + "\n" for entry in self.rows)
        checkpoint.write_atomically(self.log_path, lines.encode())
        return held_out

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"model.{name}": value for name, value in self._weights().items()}
        tensors |= checkpoint.optimizer_tensors(self.model, self.optimizer)
        tensors["random.data"] = self.data_random.get_state()
        tensors["random.dropout"] = self.dropout_random.get_state()
        scalars = {
            "step": self.step,
            "seconds": self.wall_seconds(),
            "rows": self.rows,
            "recent": self.recent,
            "options": self.options.to_dict(),
            "digest": self.corpus.digest,
        }
        checkpoint.save_checkpoint(self.checkpoint_path, tensors, scalars)

    def resume(self) -> None:
        """Go back to the checkpoint's state.

        Raises
        ------
        ValueError
            If it was made with other options or another text.
        """
        tensors, scalars = checkpoint.load_checkpoint(self.checkpoint_path)
        self.options.check_same_run(scalars["options"])
        if scalars["digest"] != self.corpus.digest:
            raise ValueError("cannot resume: the checkpoint was made with another text or tokenizer")
        self.load_weights({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        checkpoint.restore_optimizer(self.model, self.optimizer, tensors)
        self.data_random.set_state(tensors["random.data"])
        self.dropout_random.set_state(tensors["random.dropout"])
        self.step, self.rows, self.recent = scalars["step"], scalars["rows"], scalars["recent"]
        self.seconds, self._started = scalars["seconds"], time.perf_counter()

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the model by name."""
        parameters = self._weights()
        if parameters.keys() != weights.keys():
            raise ValueError(f"weights do not fit: {sorted(parameters.keys() ^ weights.keys())[:5]} on one side only")
        for name, value in weights.items():
            if parameters[name].shape != value.shape:
                shapes = f"{tuple(value.shape)}, the model {tuple(parameters[name].shape)}"
                raise ValueError(f"weights do not fit: {name} has {shapes}; give the options of the first training")
            parameters[name].copy_(value)

    def load_best(self) -> dict[str, Any]:
        """Put the weights that are kept into the model (see `Options.choose`), averaged with those of
        `Options.blend`; returns when they were reached and what their loss was."""
        weights, scalars = checkpoint.load_checkpoint(self.best_path)
        if self.options.blend is not None:
            share, others = self.options.blend_share, dict(load_model(self.options.blend).named_parameters())
            weights = {name: torch.lerp(others[name].detach(), value, share) for name, value in weights.items()}
        self.load_weights(weights)
        return scalars
