"""One training run, step by step.

Prompts grow: a step's size is drawn from the smallest to a limit that rises to the full size, so that the model
learns to bind one thing to another where that is easy. (From the full size alone, recall stays at "some value of the
prompt" for a long time.) Every sequence holds several questions, all of which count in the loss.

A step's sequences are decided by the run's seed and the step's number, so that a resumed run needs no random state
and continues bit for bit. Their seeds are above 2**32, those of held-out prompts below: no prompt is drawn twice from
one seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from demos.localisation.families import build_model
from demos.localisation.options import Options
from demos.localisation.task import SMALLEST, Task
from demos.tinystories import checkpoint

HELD_OUT_SEED = 1_000_001


def training_seed(options: Options, step: int) -> int:
    """The seed of one step's sequences."""
    return (options.seed + 1) * 2**32 + step


def largest_at(options: Options, step: int) -> int:
    """The largest size that this step may draw. A run that ends before `options.grow` never comes to the full one."""
    full, low = options.goal.size, SMALLEST[options.task]
    return min(full, low + (full - low + 1) * step // options.grow)


def task_at(options: Options, step: int) -> Task:
    """The task at the size of this step."""
    generator = torch.Generator().manual_seed(training_seed(options, step))
    sizes = (SMALLEST[options.task], largest_at(options, step) + 1)
    return dataclasses.replace(options.goal, size=int(torch.randint(*sizes, (1,), generator=generator)))


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr * lr` at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    low = options.final_lr * options.lr
    return low + (options.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def accuracy(model: Any, task: Task, n: int, seed: int) -> float:
    """The share of prompts whose likeliest next token is the answer."""
    prompts = task.prompts(n, seed)
    return float((model(prompts.tokens)[:, -1].argmax(-1) == prompts.answers).float().mean())


class Trainer:
    """Model, optimiser, and what was measured so far. Files in `options.out`: `checkpoint.safetensors`, `log.jsonl`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = self.build(options)
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.ndim >= 2 and name.endswith("weight")]
        free = [p for name, p in named if p.ndim < 2 or not name.endswith("weight")]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2))
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.recent: list[float] = []
        self.seconds = 0.0
        self._started = time.perf_counter()
        self.checkpoint_path = options.out / "checkpoint.safetensors"
        self.log_path = options.out / "log.jsonl"

    def build(self, options: Any) -> Any:
        """A model with random weights drawn from the run's seed."""
        shape = (options.d_model, options.n_layers, options.d_state, options.vocab)
        return build_model(options.family, *shape, f"localisation-{options.name}", options.seed)

    def extra_loss(self) -> Tensor | float:
        """What is added to the loss of the answers, from what the last pass left behind."""
        return 0.0

    def wall_seconds(self) -> float:
        """Seconds of running, resumed stretches added up."""
        return self.seconds + time.perf_counter() - self._started

    def take_step(self) -> float:
        """One optimiser step; returns the loss, nats per answer.

        Raises
        ------
        FloatingPointError
            If the loss is no number any more.
        """
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, options)
        drill = task_at(options, self.step).drill(options.batch, options.questions, training_seed(options, self.step))
        logits = self.model(drill.tokens[:, :-1])[:, drill.asked]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), drill.answers.flatten())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: try a lower --lr or a smaller --clip")
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.extra_loss()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        self.recent.append(value)
        return value

    def measure(self) -> float:
        """Accuracy on held-out prompts of full size; adds a line to the log."""
        options = self.options
        row = {
            "step": self.step,
            "seconds": round(self.wall_seconds(), 1),
            "train_loss": sum(self.recent) / max(1, len(self.recent)),
            "accuracy": accuracy(self.model, options.goal, options.held_out, HELD_OUT_SEED),
        }
        self.recent = []
        self.rows.append(row)
        checkpoint.write_atomically(self.log_path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return row["accuracy"]

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors |= checkpoint.optimizer_tensors(self.model, self.optimizer)
        scalars = {
            "step": self.step,
            "seconds": self.wall_seconds(),
            "rows": self.rows,
            "recent": self.recent,
            "options": self.options.to_dict(),
        }
        checkpoint.save_checkpoint(self.checkpoint_path, tensors, scalars)

    @torch.no_grad()
    def resume(self) -> None:
        """Go back to the checkpoint's state.

        Raises
        ------
        ValueError
            If it was made with other options.
        """
        tensors, scalars = checkpoint.load_checkpoint(self.checkpoint_path)
        mine = self.options.to_dict()
        for name, stored in scalars["options"].items():
            if mine.get(name) != stored:
                raise ValueError(f"cannot resume: the checkpoint has {name}={stored!r}, this run {mine.get(name)!r}")
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        checkpoint.restore_optimizer(self.model, self.optimizer, tensors)
        self.step, self.rows, self.recent = scalars["step"], scalars["rows"], scalars["recent"]
        self.seconds, self._started = scalars["seconds"], time.perf_counter()
