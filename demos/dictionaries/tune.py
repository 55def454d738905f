"""Fine-tune dictionaries through the model, all layers at once, on the model's own mix of text.

    python -m demos.dictionaries.tune --run runs/writes --text train.txt --n-tokens 500_000 --out runs/writes-tuned

The coders in RUN/coders (or in the folder itself) are spliced in together and trained on what they lose of the model's
predictions, see `saes.training.finetune`. Of several folders the means of the weights are taken. --match keeps coders
whose name holds a word, --architecture batchtopk goes on with BatchTopK where they were TopK. Ctrl-C leaves a
checkpoint, and the same command with --resume continues from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from demos.dictionaries.text import told_by, training_rows
from demos.dictionaries.train import ended
from saes.coder import SparseCoder
from saes.store import DataConfig
from saes.training import FinetuneConfig, finetune_coders, load_model, local_device


def coders_in(run: Path, match: str = "") -> dict[str, SparseCoder]:
    """The finished coders of a training, or those of a folder, whose name holds `match`.

    Raises
    ------
    FileNotFoundError
        There are none.
    """
    folder = run / "coders" if (run / "coders").is_dir() else run
    found = sorted(path.parent for path in folder.glob("[!.]*/cfg.json") if match in path.parent.name)
    if not found:
        raise FileNotFoundError(f"{folder} holds no coder{f' with {match!r} in its name' if match else ''}")
    return {path.name: SparseCoder.load(path) for path in found}


def chosen_by(coder: SparseCoder, architecture: str, k: int) -> SparseCoder:
    """The same weights, with active latents chosen in another way: TopK and BatchTopK differ in nothing else."""
    other = SparseCoder(dataclasses.replace(coder.cfg, architecture=architecture, k=k))
    other.load_state_dict(coder.state_dict(), strict=False)  # a threshold, which one of them has, is fitted at the end
    return other


@torch.no_grad()
def mean_of(several: list[dict[str, SparseCoder]]) -> dict[str, SparseCoder]:
    """Coders whose weights are the means over several trainings of the same ones; the first are changed in place."""
    first, *others = several
    for name, coder in first.items():
        for key, value in coder.state_dict().items():
            value.copy_(torch.stack([value, *(other[name].state_dict()[key] for other in others)]).mean(0))
    return first


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.dictionaries.tune", description="Fine-tune dictionaries.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--run", type=Path, nargs="+", required=True, help="folder of a finished training, or of coders; several: means"
    )
    add("--match", default="", help="only coders whose name holds this")
    add("--architecture", choices=("topk", "batchtopk"), help="how latents are chosen from now on (default: as before)")
    add("--k", type=int, help="how many are active from now on (default: as before)")
    add("--model", help="name or folder of the model (default: the coders')")
    add("--text", type=Path, required=True, help="training text, documents parted by lines <|endoftext|>")
    add("--generated-share", type=float, help="share of rows told by the grammar (default: the model's own mix)")
    add("--samples", type=Path, help="file of stories that the model told itself (see `samples`)")
    add("--samples-share", type=float, default=0.5, help="their share of the rows (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of checkpoints, log and finished coders")
    add("--n-tokens", type=int, default=500_000, help="positions to train on (default: %(default)s)")
    add("--lr", type=float, default=3e-4, help="highest learning rate (default: %(default)s)")
    add("--reconstruction", type=float, default=1.0, help="weight of the variance missed (default: %(default)s)")
    add("--rows", type=int, default=8, help="rows a step (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens a row (default: %(default)s)")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the text's order (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out, bit for bit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 130 means stopped and resumable."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = DataConfig(rows_per_pass=args.rows, context_length=args.context, seed=args.seed)
    try:
        found = [coders_in(run, args.match) for run in args.run]
        if args.architecture or args.k:
            found = [
                {n: chosen_by(c, args.architecture or c.cfg.architecture, args.k or c.cfg.k) for n, c in coders.items()}
                for coders in found
            ]
        coders = mean_of(found)
        name = args.model or next(iter(coders.values())).cfg.model_name or ""
        model = load_model(name).to(local_device(args.device))
        config = FinetuneConfig(
            n_tokens=args.n_tokens,
            lr=args.lr,
            reconstruction=args.reconstruction,
            seed=args.seed,
            checkpoint_every=args.checkpoint_every,
            progress=sys.stderr.isatty(),
        )
        rows = training_rows(model, args.text, None, args.generated_share, data, told_by(args))
        coders = {name: coder.to(model.device) for name, coder in coders.items()}
        result = finetune_coders(model, coders, rows, config, data, out=args.out, resume=args.resume)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, row in result.measured.items():
        print(f"{name:24} KL {row['kl']:.4f}  EV {row['ev']:.4f}  L0 {row['l0']:.2f}")
    return ended(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
