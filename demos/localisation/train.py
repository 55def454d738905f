"""Train a small model on associative recall or induction.

    python -m demos.localisation.train --task recall --family rwkv7 --out runs/recall-rwkv7

Progress is shown, accuracy on held-out prompts logged, a checkpoint written every --checkpoint-every steps and on
Ctrl-C; the same command with --resume continues from there. At the end the model is saved in `OUT/model`, with a card.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from demos.localisation.families import TITLES
from demos.localisation.options import Options, parse_args
from demos.localisation.stats import Rate
from demos.localisation.task import SMALLEST
from demos.localisation.trainer import HELD_OUT_SEED, Trainer, accuracy, largest_at
from demos.tinystories.checkpoint import write_atomically
from hooked_mamba import load_model
from saes.training.signals import stop_on_signal

CARD = Path(__file__).with_name("card_template.md")
CARD_SEED = 1_000_002
CARD_PROMPTS = 5000
CARD_OPTIONS = ("steps", "batch", "questions", "lr", "weight_decay", "seed")


def train(
    options: Options,
    resume: bool = False,
    console: Console | None = None,
    trainer_class: type[Trainer] = Trainer,
    last: Callable[[Trainer], Path] | None = None,
) -> bool:
    """Train until the last step or until asked to stop; returns whether the run is complete.

    `last` saves the finished model and returns its folder; None: :func:`finish`.

    Raises
    ------
    FileExistsError
        If the folder holds a checkpoint and `resume` is False: nothing is overwritten by accident.
    """
    console = console or Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    trainer = trainer_class(options)
    if resume:
        trainer.resume()
        console.print(f"Resumed at step {trainer.step}.")
    elif trainer.checkpoint_path.exists():
        raise FileExistsError(f"{options.out} holds a checkpoint: pass --resume to continue, or choose another --out")
    with stop_on_signal() as stop:
        complete = run_steps(trainer, console, stop)
    if not complete:
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Continue with --resume.")
        return False
    console.print(f"Model and card saved in {(last or finish)(trainer)}")
    return True


def run_steps(trainer: Trainer, console: Console, stop: Callable[[], bool]) -> bool:
    """Steps, measurements and checkpoints until the end; returns False if `stop()` asked to leave early."""
    options = trainer.options
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held-out accuracy {task.fields[accuracy]:.1%}"),
        TimeRemainingColumn(),
    )
    right = trainer.rows[-1]["accuracy"] if trainer.rows else 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(
            options.task, total=options.steps, completed=trainer.step, loss=float("nan"), accuracy=right
        )
        while trainer.step < options.steps and not stop():
            loss = trainer.take_step()
            if trainer.step % options.eval_every == 0 or trainer.step == options.steps:
                right = trainer.measure()
                row = trainer.rows[-1]
                console.print(
                    f"step {trainer.step:5d}  {row['seconds']:6.0f} s  train {row['train_loss']:.4f}"
                    f"  held-out accuracy {right:.1%}"
                )
            if trainer.step % options.checkpoint_every == 0:
                trainer.save()
            progress.update(bar, completed=trainer.step, loss=loss, accuracy=right)
    trainer.save()
    return trainer.step >= options.steps


def finish(trainer: Trainer) -> Path:
    """Save the model, its task and a card with what the stored file measures; returns the folder."""
    options, goal, cfg = trainer.options, trainer.options.goal, trainer.model.cfg
    about = {
        "name": options.name,
        "title": TITLES[options.family],
        "smallest": SMALLEST[options.task],
        "unit": "pairs" if options.task == "recall" else "tokens",
        "vocab": goal.vocab,
        "function": "associative_recall" if options.task == "recall" else "induction",
        "drill": f"{options.task}_drill",
        "shape": f"d_model {cfg.d_model}, a state of {2 * cfg.d_model * options.d_state:,} numbers in each",
        "n_layers": cfg.n_layers,
    }
    return write_model(trainer, CARD, about)


def write_model(trainer: Trainer, card: Path, about: Mapping[str, object]) -> Path:
    """Save a model, its task and a card; returns the folder.

    Parameters
    ----------
    card
        The card's template; how the model was trained and what the stored file measures is filled in.
    about
        What else it names.
    """
    options, goal = trainer.options, trainer.options.goal
    folder = options.out / "model"
    trainer.model.save_pretrained(folder)
    goal.save(folder)
    stored = load_model(folder)
    right = accuracy(stored, goal, CARD_PROMPTS, CARD_SEED)
    curve = [
        f"| {row['step']} | {row['seconds']:.0f} | {row['train_loss']:.4f} | {row['accuracy']:.1%} |"
        for row in trainer.rows
    ]
    values = {
        **{name: getattr(options, name) for name in CARD_OPTIONS},
        "size": goal.size,
        "length": goal.length,
        "largest": largest_at(options, options.steps - 1),
        "grow": min(options.grow, options.steps),
        "parameters": f"{sum(p.numel() for p in stored.parameters()):,}",
        "held_out_seed": HELD_OUT_SEED,
        "minutes": f"{trainer.wall_seconds() / 60:.0f}",
        "threads": torch.get_num_threads(),
        "accuracy": Rate(round(right * CARD_PROMPTS), CARD_PROMPTS),
        "n": f"{CARD_PROMPTS:,}",
        "card_seed": CARD_SEED,
        "command": options.command(),
        "curve": "\n".join(curve),
        **about,
    }
    text = Template(card.read_text(encoding="utf-8")).substitute(values)
    write_atomically(folder / "README.md", text.encode())
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command line; 130 means stopped and resumable."""
    options, resume = parse_args(argv)
    try:
        return 0 if train(options, resume) else 130
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
