"""Stories that a model tells itself: text to train its dictionaries on that it has not learnt by heart.

    python -m demos.dictionaries.samples --model tinystories-4l --stories 3000 --out runs/samples.txt

A small text is read many times in training, and on it the model is surer than on any other; dictionaries that saw
nothing else do worse on new text. Sampled at temperature 1 from the model's own distribution, one story a row, with a
seed, and the same on every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from demos.dictionaries import made
from hooked_mamba.models import HookedModel
from saes.training import load_model


@torch.no_grad()
def tell(model: HookedModel, stories: int, tokens: int = 255, batch: int = 64, seed: int = 0) -> Iterator[str]:
    """Stories of at most so many tokens, from the beginning of a text to its end or the last token.

    Parameters
    ----------
    stories, tokens
        How many, and how long at most.
    batch
        Told at once.
    seed
        Of all draws.
    """
    generator = torch.Generator().manual_seed(seed)
    end = model.eos_token_id
    for first in range(0, stories, batch):
        start = torch.full((min(batch, stories - first), 1), end)
        rows = model.generate(
            start, max_new_tokens=tokens, temperature=1.0, generator=generator, verbose=False, return_type="tokens",
            stop_at_eos=False,
        )  # fmt: skip
        for row in rows[:, 1:].tolist():
            told = row[: row.index(end)] if end in row else row
            if told:
                yield model.tokenizer.decode(told)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = made.parser("samples", stories=3000, text=False)
    add = parser.add_argument
    add("--model", required=True, help="bundled name or folder")
    add("--batch", type=made.count, default=64, help="told at once; more is faster (default: %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")

    def make(args: argparse.Namespace) -> Iterable[str]:
        if args.threads:
            torch.set_num_threads(args.threads)
        told = tell(load_model(args.model), args.stories, batch=args.batch, seed=args.seed)
        return tqdm(told, total=args.stories, unit="story", disable=None)

    return made.write(parser, argv, make)


if __name__ == "__main__":
    sys.exit(main())
