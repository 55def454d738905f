"""The best that any MambaCoder of block 0 can do, whatever its size: give every token its mean output.

    python -m demos.dictionaries.bound --text train.txt --valid valid.txt

Block 0 reads the embedding of a token and of those before it, a MambaCoder only that of the token itself. So the mean
output of each token, taken over the training text, is the best prediction there is; its explained variance and the
loss that it recovers on held-out text are a ceiling for every coder of that block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from demos.dictionaries.text import training_rows
from demos.tinystories.data import windows
from demos.tinystories.text import read_stories
from demos.tinystories.tokenizer import encode_stream
from hooked_mamba.models import HookedModel
from saes.store import DataConfig, RowSource, take
from saes.training import load_model

SITE = "blocks.0.mixer.hook_out_proj"


class Bound(NamedTuple):
    """What the table of means reaches on held-out text."""

    explained_variance: float
    clean: float
    """Nats per token of the model as it is."""
    zero: float
    """With block 0's output set to 0."""
    table: float
    """With block 0's output replaced by its token's mean."""

    @property
    def recovered(self) -> float:
        """Share of the loss between zero and clean that the table recovers."""
        return (self.zero - self.table) / (self.zero - self.clean)


@torch.no_grad()
def means_by_token(
    model: HookedModel, rows: RowSource, n_rows: int, pull: float = 2.0
) -> tuple[Float[Tensor, "v d"], Float[Tensor, " d"]]:
    """Each token's mean output of block 0, and the overall mean, towards which rare tokens are pulled.

    Parameters
    ----------
    pull
        The overall mean counts as so many occurrences of every token.
    """
    sums = torch.zeros(model.cfg.d_vocab, model.cfg.d_model, dtype=torch.float64)
    counts = torch.zeros(model.cfg.d_vocab, dtype=torch.float64)
    for _ in range(0, n_rows, 16):
        found = take(rows, 16)
        if found is None:
            break
        _, cache = model.run_with_cache(found.tokens, names_filter=SITE, stop_at_layer=1, return_type=None)
        tokens = found.tokens[found.real]
        sums.index_add_(0, tokens, cache[SITE][found.real].double())
        counts += torch.bincount(tokens, minlength=len(counts))
    mean = sums.sum(0) / counts.sum()
    table = (sums + pull * mean) / (counts[:, None] + pull)
    return table.float(), mean.float()


@torch.no_grad()
def measure(model: HookedModel, table: Tensor, mean: Tensor, batches: list[Tensor]) -> Bound:
    """Explained variance and losses on held-out batches."""

    def loss(replace) -> float:
        nats, count = 0.0, 0
        for tokens in batches:
            with model.hooks(fwd_hooks=[(SITE, lambda value, hook, tokens=tokens: replace(value, tokens))]):
                n = tokens.shape[0] * (tokens.shape[1] - 1)
                nats += float(model(tokens, return_type="loss")) * n
                count += n
        return nats / count

    error, variance = 0.0, 0.0
    for tokens in batches:
        _, cache = model.run_with_cache(tokens, names_filter=SITE, stop_at_layer=1, return_type=None)
        error += float((cache[SITE] - table[tokens]).square().sum())
        variance += float((cache[SITE] - mean).square().sum())
    return Bound(
        1 - error / variance,
        clean=loss(lambda value, tokens: None),
        zero=loss(lambda value, tokens: torch.zeros_like(value)),
        table=loss(lambda value, tokens: table[tokens].to(value.dtype)),
    )


def main(argv: list[str] | None = None) -> Bound:
    """Take the means, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m demos.dictionaries.bound", allow_abbrev=False)
    parser.add_argument("--model", default="tinystories-4l", help="bundled name or folder (default: %(default)s)")
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument(
        "--rows", type=int, default=2400, help="rows of 256 tokens for the means (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    model = load_model(args.model)
    rows = training_rows(model, args.text, None, None, DataConfig())
    table, mean = means_by_token(model, rows, args.rows)
    held_out = windows(torch.tensor(encode_stream(model.tokenizer, read_stories(args.valid))), 256)
    bound = measure(model, table, mean, held_out)
    print(f"explained variance {bound.explained_variance:.4f}, loss recovered {bound.recovered:.4f}")
    print(f"nats per token: clean {bound.clean:.4f}, zero {bound.zero:.4f}, the table {bound.table:.4f}")
    return bound


if __name__ == "__main__":
    main()
