"""Train one of the two models on recall.

    python -m demos.hybrid.train --pattern "M*" --out runs/hybrid
    python -m demos.hybrid.train --pattern MM --out runs/state

Progress is shown, accuracy on held-out prompts logged, a checkpoint written every --checkpoint-every steps and on
Ctrl-C; the same command with --resume goes on from there. At the end the model is saved in `OUT/model`, with a card.
"""

from __future__ import annotations

import sys
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from demos.hybrid.model import build
from demos.hybrid.options import Options
from demos.localisation.options import parse_args
from demos.localisation.stats import Rate
from demos.localisation.train import CARD_PROMPTS, CARD_SEED, train
from demos.localisation.trainer import HELD_OUT_SEED, Trainer, accuracy
from demos.tinystories.balance import Balance
from demos.tinystories.checkpoint import write_atomically
from hooked_mamba import HookedHybrid

CARD = Path(__file__).with_name("card_template.md")


class HybridTrainer(Trainer):
    """A run whose loss also evens the load of the experts."""

    options: Options

    def build(self, options: Options) -> HookedHybrid:
        model = build(options)
        self.balance = Balance(model)
        return model

    def take_step(self) -> float:
        with self.model.hooks(fwd_hooks=self.balance.hooks()):
            return super().take_step()

    def extra_loss(self) -> Tensor:
        return self.options.balance * self.balance.loss()


def finish(trainer: Any) -> Path:
    """Save the model, its task and a card with what the stored file measures; returns the folder."""
    options, goal, cfg = trainer.options, trainer.options.goal, trainer.model.cfg
    folder = options.out / "model"
    trainer.model.save_pretrained(folder)
    goal.save(folder)
    stored = HookedHybrid.from_pretrained(folder)
    mixer = cfg.branches["mixer"]
    right = accuracy(stored, goal, CARD_PROMPTS, CARD_SEED)
    curve = [
        f"| {row['step']} | {row['seconds']:.0f} | {row['train_loss']:.4f} | {row['accuracy']:.1%} |"
        for row in trainer.rows
    ]
    words = {"mixer": "Mamba-2", "attn": "attention"}
    values = {
        "name": options.out.name,
        "blocks": ", then ".join(f"{words[block[0][0]]} (block {i})" for i, block in enumerate(cfg.layout)),
        "size": goal.size,
        "length": goal.length,
        "half": goal.vocab // 2,
        "parameters": f"{sum(p.numel() for p in stored.parameters()):,}",
        "state": f"{mixer.H} heads of {mixer.P} channels, state size N = {mixer.d_state}",
        "experts": f"{options.n_experts} experts of {options.d_expert} neurons, {options.top_k} a token",
        "attention": f"{options.n_heads} heads of {options.d_head}" if "*" in options.pattern else "none",
        **{name: getattr(options, name) for name in ("d_model", "d_mlp", "steps", "batch", "questions", "grow", "lr")},
        **{name: getattr(options, name) for name in ("weight_decay", "seed", "balance")},
        "held_out_seed": HELD_OUT_SEED,
        "minutes": f"{trainer.wall_seconds() / 60:.0f}",
        "threads": torch.get_num_threads(),
        "accuracy": Rate(round(right * CARD_PROMPTS), CARD_PROMPTS),
        "n": f"{CARD_PROMPTS:,}",
        "card_seed": CARD_SEED,
        "command": options.command(),
        "curve": "\n".join(curve),
    }
    text = Template(CARD.read_text(encoding="utf-8")).substitute(values)
    write_atomically(folder / "README.md", text.encode())
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command line; 130 means stopped and resumable."""
    options, resume = parse_args(argv, Options, "Train a small hybrid on recall.")
    try:
        return 0 if train(options, resume, trainer_class=HybridTrainer, last=finish) else 130
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
