"""Train one of the two models on recall.

    python -m demos.hybrid.train --pattern "M*" --out runs/hybrid
    python -m demos.hybrid.train --pattern MM --out runs/state

Progress is shown, accuracy on held-out prompts logged, a checkpoint written every --checkpoint-every steps and on
Ctrl-C; the same command with --resume goes on from there. At the end the model is saved in `OUT/model`, with a card.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from demos.hybrid.model import build
from demos.hybrid.options import Options
from demos.localisation.options import parse_args
from demos.localisation.train import train, write_model
from demos.localisation.trainer import Trainer
from demos.tinystories.balance import Balance
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
    options, cfg = trainer.options, trainer.model.cfg
    mixer, words = cfg.branches["mixer"], {"mixer": "Mamba-2", "attn": "attention"}
    about = {
        "name": options.out.name,
        "blocks": ", then ".join(f"{words[block[0][0]]} (block {i})" for i, block in enumerate(cfg.layout)),
        "half": options.goal.vocab // 2,
        "state": f"{mixer.H} heads of {mixer.P} channels, state size N = {mixer.d_state}",
        "experts": f"{options.n_experts} experts of {options.d_expert} neurons, {options.top_k} a token",
        "attention": f"{options.n_heads} heads of {options.d_head}" if "*" in options.pattern else "none",
        **{name: getattr(options, name) for name in ("d_model", "d_mlp", "balance")},
    }
    return write_model(trainer, CARD, about)


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
