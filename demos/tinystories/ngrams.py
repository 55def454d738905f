"""A cheap check before any training: do generated stories help to predict held-out real ones?

    python -m demos.tinystories.ngrams --text train.txt --valid valid.txt --tokenizer runs/tokenizer

Two interpolated Kneser-Ney models (Kneser & Ney 1995; Chen & Goodman 1999, with one discount) are counted, one on the
real and one on the generated tokens. The held-out loss of w * told + (1 - w) * real over a grid of w says how
much the generated text knows that the real text does not: at w = 0 it is the real text alone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from demos.tinystories.grammar import tell_stories
from demos.tinystories.text import read_stories
from demos.tinystories.tokenizer import encode_stream, load_tokenizer

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def gram_keys(tokens: np.ndarray, order: int, d_vocab: int) -> np.ndarray:
    """Each run of `order` tokens as one integer, its last token in the lowest digit (base d_vocab)."""
    keys = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for i in range(order):
        keys = keys * d_vocab + tokens[i : len(tokens) - order + 1 + i]
    return keys


class KneserNey:
    """Interpolated Kneser-Ney estimates from one token stream.

    Parameters
    ----------
    tokens : array of int, n
        The text.
    d_vocab : int
        Entries of the tokenizer.
    order : int
        Longest run counted; d_vocab ** order must fit 63 bits.
    discount : float
        Taken from every count and given to the shorter context.
    """

    def __init__(self, tokens: np.ndarray, d_vocab: int, order: int = 4, discount: float = 0.8) -> None:
        if order * math.log2(d_vocab) >= 63:
            raise ValueError(f"order {order} with {d_vocab} entries does not fit 63 bits")
        self.d_vocab, self.order, self.discount = d_vocab, order, discount
        self.grams: list[tuple[np.ndarray, np.ndarray]] = []
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        keys, counts = np.unique(gram_keys(tokens, order, d_vocab), return_counts=True)
        for n in range(order, 0, -1):
            if n < order:  # shorter runs count in how many different contexts they stand, not how often
                keys, counts = np.unique(keys % d_vocab**n, return_counts=True)
            self.grams.append((keys, counts))
            heads, first = np.unique(keys // d_vocab, return_index=True)
            kinds = np.diff(np.append(first, len(keys)))
            self.contexts.append((heads, np.add.reduceat(counts, first), kinds))
        self.grams.reverse()
        self.contexts.reverse()

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Probability of every token after the first `order - 1`, given those before it."""
        runs = gram_keys(tokens, self.order, self.d_vocab)
        result = np.full(len(runs), 1 / self.d_vocab)
        for n in range(1, self.order + 1):
            keys = runs % self.d_vocab**n
            count = _look_up(*self.grams[n - 1], keys)
            heads, totals, kinds = self.contexts[n - 1]
            total, kind = _look_up(heads, totals, keys // self.d_vocab), _look_up(heads, kinds, keys // self.d_vocab)
            seen = np.maximum(total, 1)
            mixed = np.maximum(count - self.discount, 0) / seen + self.discount * kind / seen * result
            result = np.where(total > 0, mixed, result)
        return result


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def mixture_losses(real: np.ndarray, told: np.ndarray, held_out: np.ndarray, d_vocab: int) -> dict[float, float]:
    """Held-out nats per token of w * told + (1 - w) * real, by w."""
    p_real, p_told = (KneserNey(tokens, d_vocab).probabilities(held_out) for tokens in (real, told))
    return {w: float(-np.log(w * p_told + (1 - w) * p_real).mean()) for w in WEIGHTS}


def main(argv: list[str] | None = None) -> None:
    """Print the held-out loss by weight, and of one model counted on both texts."""
    parser = argparse.ArgumentParser(description="Held-out n-gram loss with generated text.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--generated", type=int, default=6000, help="stories of the grammar")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    texts = (read_stories(args.text), tell_stories(args.generated, args.seed), read_stories(args.valid))
    real, told, held_out = (np.array(encode_stream(tokenizer, text), dtype=np.int64) for text in texts)
    print(f"{len(real):,} real, {len(told):,} generated, {len(held_out):,} held-out tokens")
    for weight, loss in mixture_losses(real, told, held_out, len(tokenizer)).items():
        print(f"weight of the generated text {weight:4.2f}: {loss:.4f} nats per token")
    both = KneserNey(np.concatenate([real, told]), len(tokenizer)).probabilities(held_out)
    print(f"counted together: {-np.log(both).mean():.4f} nats per token")


if __name__ == "__main__":
    main()
