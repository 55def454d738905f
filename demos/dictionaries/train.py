"""Train dictionaries (SAEs and MambaCoders) on a model.

    python -m demos.dictionaries.train --model tinystories-4l --text train.txt --out runs/dictionaries
    python -m demos.dictionaries.train --model state-spaces/mamba-130m-hf --dataset NAME \\
        --layers 2 6 10 --site out_proj --d-sae 16384 --architecture topk --n-tokens 100_000_000 --out runs/130m

A bundled model without --layers gets the dictionaries that come with the package. All are trained on the same forward
passes. Ctrl-C leaves a checkpoint, and the same command with --resume continues from it, as it does after a kill. Under
torchrun every process reads rows of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from demos.dictionaries.presets import KINDS, specs
from demos.dictionaries.text import told_by, training_rows
from hooked_mamba.hooks.names import HookNameError
from hooked_mamba.models import HookedModel
from saes.config import ARCHITECTURES
from saes.store import DataConfig
from saes.training import TrainConfig, TrainResult, coder_config, load_model, local_device, train_coders

GOAL = 100_000_000
"""Tokens that a public dictionary is usually trained on, for the estimate of the time it takes."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.dictionaries.train", description="Train dictionaries on a model.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="tinystories-4l", help="bundled name, folder or hub id (default: %(default)s)")
    add("--text", type=Path, help="training text, documents parted by lines <|endoftext|>")
    add("--dataset", help="hub data set instead, streamed (needs the package datasets)")
    add("--column", default="text", help="its column (default: %(default)s)")
    add("--generated-share", type=float, help="share of rows told by the grammar (default: the model's own mix)")
    add("--samples", type=Path, help="file of stories that the model told itself (see `samples`)")
    add("--samples-share", type=float, default=0.5, help="their share of the rows (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of checkpoints, log and finished coders")
    add("--layers", type=int, nargs="+", help="one coder for each of these blocks (default: the model's preset)")
    add("--preset", choices=KINDS, default="bundled", help="without --layers: which preset (default: %(default)s)")
    add("--site", help="with --layers: SAEs on this site (out_proj, x, dt, ...); without it MambaCoders")
    add(
        "--window",
        type=positions,
        help="with --layers: coders that read so many normalised inputs; taps: as many as the convolution",
    )
    add("--target", choices=("block", "local"), help="with --layers: what MambaCoders predict (default: block)")
    add("--d-sae", type=int, help="with --layers: latents of each")
    add("--architecture", "--variant", choices=ARCHITECTURES, help="with --layers: architecture")
    add("--k", type=int, help="with --layers: active latents (default: 32)")
    add("--skip", action="store_true", help="with --layers: a linear path beside the latents")
    add("--n-tokens", type=int, default=5_000_000, help="positions to train on (default: %(default)s)")
    add("--steps", type=int, help="or so many steps")
    add("--lr", type=float, help="highest learning rate (default: by d_sae)")
    add("--batch-size", type=int, default=2048, help="positions a step (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens a row (default: %(default)s)")
    add("--block", type=int, default=2**17, help="positions shuffled together (default: %(default)s)")
    add("--rows", type=int, default=16, help="rows in one forward pass (default: %(default)s)")
    add("--dead-after", type=int, default=500_000, help="silence of a dead latent, in tokens (default: %(default)s)")
    add("--checkpoint-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and orders (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out, bit for bit")
    return parser


def positions(text: str) -> int | str:
    """A number of positions, or "taps".

    Raises
    ------
    ArgumentTypeError
        Neither.
    """
    if text == "taps":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of positions or 'taps', got {text!r}")
    return int(text)


def train(args: argparse.Namespace, model: HookedModel) -> TrainResult:
    """Train what the command line asks for, and say how fast it went."""
    data = DataConfig(
        batch_size=args.batch_size,
        context_length=args.context,
        block_tokens=max(args.block, args.batch_size),
        rows_per_pass=args.rows,
        column=args.column,
        seed=args.seed,
    )
    config = TrainConfig(
        n_tokens=None if args.steps else args.n_tokens,
        steps=args.steps,
        lr=args.lr,
        dead_after_tokens=args.dead_after,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
        autocast="bfloat16" if args.device.startswith("cuda") else None,
        progress=sys.stderr.isatty(),
    )
    asked = specs(
        args.model,
        args.layers,
        args.site,
        args.d_sae,
        args.architecture,
        args.k,
        args.skip,
        args.preset,
        args.window,
        args.target,
    )
    named = {spec["name"]: coder_config(model, spec) for spec in asked}
    rows = training_rows(model, args.text, args.dataset, args.generated_share, data, told_by(args))
    before = time.perf_counter(), time.process_time()
    result = train_coders(model, named, rows, config, data, out=args.out, resume=args.resume)
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    tell(result, wall, cpu, args.batch_size, resumed=args.resume)
    return result


def tell(result: TrainResult, wall: float, cpu: float, batch_size: int, resumed: bool) -> None:
    """Print what was reached, and how fast."""
    print(f"{'coder':24} {'EV':>7} {'L0':>7} {'dead':>7}")
    for name, row in result.measured.items():
        print(f"{name:24} {row['ev']:7.4f} {row['l0']:7.2f} {row['dead']:7.2%}")
    tokens = result.step * batch_size
    if tokens and not resumed:
        print(
            f"{tokens:,} tokens in {wall:,.0f} s ({tokens / wall:,.0f} a second, all coders together;"
            f" {tokens / cpu:,.0f} a second of CPU time); {GOAL:,} would take {GOAL / tokens * wall / 3600:,.1f} hours"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line; 130 means stopped and resumable."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        model = load_model(args.model).to(local_device(args.device))
        result = train(args, model)
    except (ValueError, HookNameError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return ended(result, args.out)


def ended(result: TrainResult, out: Path) -> int:
    """Say how a training ended; the command's exit code."""
    if result.ended == "stopped":
        print(f"Stopped at step {result.step}; the checkpoint is written. Continue with --resume.")
        return 130
    if result.ended == "text":
        print(f"{result.ending()}: coders are as they were then.")
    print(f"Coders written in {out / 'coders'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
