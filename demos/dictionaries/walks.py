"""New texts that walk through real ones: after every three tokens that stand elsewhere too, perhaps on from there.

    python -m demos.dictionaries.walks --model tinystories-4l --text train.txt --stories 6500 --out runs/walks.txt

What comes next is drawn as a Markov chain of third order draws it, but for steps in which the walk stays where it is.
So every four tokens in a row are real ones, and what is farther apart is new: a text that no model has learnt by heart,
made without running one. Three in ten walks through 2,538 little stories were cut off at 255 tokens. Drawn with a seed,
the same on every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from demos.dictionaries import made
from demos.tinystories.text import read_stories
from demos.tinystories.tokenizer import encode_stream
from saes.training import load_model

ORDER = 3
"""Tokens that must be the same where a walk goes on."""

MOVES = 0.7
"""Share of the steps in which it goes on elsewhere, if it can."""


def walks(stream: Sequence[int], end: int, n: int, tokens: int = 255, seed: int = 0) -> Iterator[list[int]]:
    """Walks through a text.

    Parameters
    ----------
    stream
        Its tokens, `end` before every document.
    end
        The token that parts documents: walks begin there, and end there if they come to it.
    n, tokens
        How many, and where they are cut off, as stories that models tell are too.
    seed
        Of all draws.

    Raises
    ------
    ValueError
        No document has a token.
    """
    text = np.asarray(stream, dtype=np.int64)
    starts = np.flatnonzero((text[:-1] == end) & (text[1:] != end))
    if not len(starts):
        raise ValueError("no document has a token: there is nothing to walk through")
    key = np.zeros(len(text), dtype=np.int64)  # the last ORDER tokens as one number
    key[: ORDER - 1] = -1 - np.arange(len(text))[: ORDER - 1]  # the first have too few, and are like no other
    for i in range(ORDER):
        key[ORDER - 1 :] += text[ORDER - 1 - i : len(text) - i] * (int(text.max()) + 1) ** i
    by_key = np.argsort(key, kind="stable")
    first, last = (np.searchsorted(key[by_key], key, side) for side in ("left", "right"))
    draw = np.random.default_rng(seed)
    for _ in range(n):
        at, walk = int(draw.choice(starts)), []
        while (at := at + 1) < len(text) and text[at] != end and len(walk) < tokens:
            walk.append(int(text[at]))
            if draw.random() < MOVES and last[at] - first[at] > 1:
                at = int(by_key[draw.integers(first[at], last[at])])
        yield walk


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = made.parser("walks", stories=6500)
    parser.add_argument("--model", required=True, help="bundled name or folder, for its tokenizer")

    def make(args: argparse.Namespace) -> Iterator[str]:
        model = load_model(args.model)
        stream, end = encode_stream(model.tokenizer, read_stories(args.text)), model.eos_token_id
        return (model.tokenizer.decode(walk) for walk in walks(stream, end, args.stories, seed=args.seed))

    return made.write(parser, argv, make)


if __name__ == "__main__":
    sys.exit(main())
