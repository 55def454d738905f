"""Train a small Mamba-1 or Mamba-2 on any text file.

    python -m demos.tinystories.train --text train.txt --valid valid.txt --family mamba --out runs/mamba

Progress is shown, held-out loss logged, a checkpoint written every --checkpoint-every steps and on Ctrl-C; the same
command with --resume continues from there. At the end the best weights are saved, in bfloat16, in `OUT/model`, with a
model card.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from demos.tinystories.card import finish
from demos.tinystories.data import load_corpus
from demos.tinystories.options import Options, parse_args
from demos.tinystories.trainer import Trainer
from saes.training.signals import stop_on_signal


def train(options: Options, resume: bool = False, console: Console | None = None) -> bool:
    """Train until the last step or until asked to stop; returns whether the run is complete.

    Raises
    ------
    FileExistsError
        If the folder holds a checkpoint and `resume` is False: nothing is overwritten by accident.
    """
    console = console or Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = load_corpus(options)
    trainer = Trainer(options, corpus)
    if resume:
        trainer.resume()
        console.print(f"Resumed at step {trainer.step}.")
    elif trainer.checkpoint_path.exists():
        raise FileExistsError(f"{options.out} holds a checkpoint: pass --resume to continue, or choose another --out")
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    told = 0 if corpus.generated is None else len(corpus.generated)
    console.print(
        f"{options.family}: {size:,} parameters, {len(corpus.real):,} real and {told:,} generated tokens,"
        f" {len(corpus.tokenizer):,} entries, {options.steps} steps of {options.batch} x {options.length}"
    )
    with stop_on_signal() as stop:
        complete = run_steps(trainer, console, stop)
    if not complete:
        console.print(f"Stopped at step {trainer.step}; the checkpoint is written. Continue with --resume.")
        return False
    console.print(f"Best weights saved with their card in {finish(trainer)}")
    return True


def run_steps(trainer: Trainer, console: Console, stop: Callable[[], bool]) -> bool:
    """Steps, measurements and checkpoints until the end; returns False if `stop()` asked to leave early."""
    options = trainer.options
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "loss {task.fields[loss]:.3f}  held-out {task.fields[held_out]:.3f}  {task.fields[speed]:,.0f} tok/s"
        ),
        TimeRemainingColumn(),
    )
    first, start = trainer.step, trainer.wall_seconds()
    held_out = trainer.rows[-1]["nats_per_token"] if trainer.rows else float("nan")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(
            "training", total=options.steps, completed=first, loss=float("nan"), held_out=held_out, speed=0.0
        )
        while trainer.step < options.steps and not stop():
            loss = trainer.take_step()
            if trainer.step % options.eval_every == 0 or trainer.step == options.steps:
                held_out = trainer.measure().nats_per_token
                row = trainer.rows[-1]
                console.print(
                    f"step {trainer.step:5d}  {row['seconds']:7.0f} s  train {row['train_loss']:.4f}"
                    f"  held-out {held_out:.4f} nats/token, {row['nats_per_char']:.4f} nats/char"
                )
            if trainer.step % options.checkpoint_every == 0 or trainer.step == options.steps:
                trainer.save()
            tokens = (trainer.step - first) * options.batch * options.length
            speed = tokens / (trainer.wall_seconds() - start)
            progress.update(task, completed=trainer.step, loss=loss, held_out=held_out, speed=speed)
    trainer.save()
    return trainer.step >= options.steps


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
