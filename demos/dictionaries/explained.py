"""How much of what a model says graphs of its dictionaries explain, on held-out text: one line for each kind.

    python -m demos.dictionaries.explained --valid valid.txt --of write runs/writes write --of blocks runs/blocks block

Each --of names a kind, a folder of coders (or of a training), the mode in which a graph takes them, and a word that
their names hold, if need be. Prompts are spread evenly over the text; a graph explains the likeliest next tokens, as
many as make 95%, at most ten. Scores are those of circuit-tracer (`circuits.scores`): replacement is the share of the
influence on the target that ends in embeddings rather than in errors, completeness the share of the nodes' input that
does not come from errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from circuits import FrozenModel, build_graph, scores, top_logits
from demos.dictionaries import kinds
from demos.tinystories.text import read_stories
from demos.tinystories.tokenizer import encode_stream
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder

FEATURES = 1000
"""Features of a graph that are traced on, at most."""


class Line(NamedTuple):
    """One kind of dictionary on one model, means over prompts."""

    kind: str
    mode: str
    prompts: int
    features: float
    """Traced in a graph."""
    replacement: float
    completeness: float
    worst: float
    """The least replacement score of a prompt."""


def prompts_of(model: HookedModel, valid: Path, n: int, length: int) -> Int[Tensor, "n length"]:
    """Pieces of the held-out text, evenly spread over it."""
    stream = torch.tensor(encode_stream(model.tokenizer, read_stories(valid)))
    if len(stream) < n * length:
        raise ValueError(f"{valid} has {len(stream):,} tokens, {n} prompts of {length} need {n * length:,}")
    starts = torch.linspace(0, len(stream) - length, n).long()
    return stream[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def measure(
    model: HookedModel, kind: str, coders: dict[str, SparseCoder], mode: str, prompts: Int[Tensor, "n length"]
) -> Line:
    """Scores of a graph for each prompt, all layers' coders in it."""
    found, traced = [], []
    for tokens in tqdm(prompts, desc=kind, disable=None):
        frozen = FrozenModel(model, tokens[None], list(coders.values()), mode=mode)
        graph = build_graph(frozen, top_logits(frozen), max_features=FEATURES, max_heads=0)
        found.append(scores(graph))
        traced.append(int(graph.where("feature").sum()))
    n = len(found)
    return Line(
        kind,
        mode,
        n,
        sum(traced) / n,
        sum(one.replacement for one in found) / n,
        sum(one.completeness for one in found) / n,
        min(one.replacement for one in found),
    )


def table(lines: dict[str, list[Line]]) -> str:
    """Markdown; model -> its lines."""
    rows = [
        "| model | dictionaries | mode | features traced | replacement | the least of a prompt | completeness |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, found in lines.items():
        rows += [
            f"| {model} | {line.kind} | {line.mode} | {line.features:.0f} | {line.replacement:.3f}"
            f" | {line.worst:.3f} | {line.completeness:.3f} |"
            for line in found
        ]
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    what = "a kind, a folder of coders, the mode of a graph, and a word that their names hold"
    parser = kinds.parser("python -m demos.dictionaries.explained", what)
    parser.add_argument("--prompts", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--length", type=int, default=32, help="tokens of each (default: %(default)s)")
    args = parser.parse_args(argv)

    def line(model: HookedModel, *of: Any) -> Line:
        return measure(model, *of, prompts_of(model, args.valid, args.prompts, args.length))

    kinds.write_lines(args, line, table, more=1)


if __name__ == "__main__":
    main()
