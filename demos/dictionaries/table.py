"""One table of what a model loses when every layer is replaced by dictionaries of one kind, without their errors.

    python -m demos.dictionaries.table --valid valid.txt --of "write" runs/writes --of "block coders" runs/blocks

Each --of names a kind and a folder of coders (or of a training), one coder a layer; --match after the folder keeps
those whose name holds a word: --of "write" runs/all write. With --text, thresholds of BatchTopK are set anew, such that
k latents are active on average in that text, as `bundle` does. All figures are of held-out text:

    excess nats     cross-entropy with all coders in place less the model's own
    KL              KL(clean || spliced) a position
    recovered       share of the loss between zeros (or the sites' means) and the model that the coders give back
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from demos.dictionaries import kinds
from demos.dictionaries.bundle import calibrate_on, held_out_rows
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.metrics.model_loss import LossSums, next_token_log_probs
from saes.metrics.reconstruction import ReconstructionSums
from saes.rewriting import Rewrite, rewritten
from saes.splicing import splice
from saes.store import Rows


class Line(NamedTuple):
    """One kind of dictionary on one model."""

    kind: str
    d_sae: int
    k: int | None
    l0: float
    """Mean over coders."""
    ev: float
    """The least of the coders', on clean text."""
    clean: float
    excess: float
    kl: float
    recovered_zero: float
    recovered_mean: float


@torch.no_grad()
def measure(model: HookedModel, kind: str, coders: dict[str, SparseCoder], rows: list[Rows]) -> Line:
    """All coders at once on held-out rows."""
    sums = {name: ReconstructionSums(coder.cfg.d_out) for name, coder in coders.items()}
    active = dict.fromkeys(coders, 0.0)

    def reading(name: str, coder: SparseCoder, real: Tensor) -> Rewrite:
        def look(x: Tensor, y: Tensor) -> None:
            codes = coder.encode_topk(x[real])
            sums[name].add(y[real], coder.decode_sparse(codes, x[real]))
            active[name] += float((codes.values > 0).sum())

        return Rewrite(coder.cfg, look)

    def constant(value: Tensor | None, coder: SparseCoder) -> Rewrite:
        return Rewrite(coder.cfg, lambda x, y: torch.zeros_like(y) if value is None else value.to(y).expand_as(y))

    for batch in rows:
        with rewritten(model, [reading(name, coder, batch.real) for name, coder in coders.items()]):
            model(batch.tokens, **batch.arguments(), return_type=None)
    means = {name: total.mean for name, total in sums.items()}
    losses = LossSums()
    for batch in rows:

        def log_probs(batch: Rows = batch) -> tuple[Tensor, Tensor]:
            return next_token_log_probs(model(batch.tokens, **batch.arguments()), batch.tokens, batch.real)

        clean, next_tokens = log_probs()
        losses.add("clean", clean, next_tokens)
        with splice(model, coders, positions=batch.real):
            losses.add("spliced", *log_probs(), clean)
        with rewritten(model, [constant(None, coder) for coder in coders.values()], batch.real):
            losses.add("zero", *log_probs())
        with rewritten(model, [constant(means[name], coder) for name, coder in coders.items()], batch.real):
            losses.add("mean", *log_probs())
    found = losses.result()
    n = sum(int(batch.real.sum()) for batch in rows)
    first = next(iter(coders.values())).cfg
    values = {key: float(value or 0.0) for key, value in found.items()}
    return Line(
        kind,
        max(coder.cfg.d_sae for coder in coders.values()),
        first.k,
        sum(active.values()) / n / len(coders),
        min(float(total.result().ev) for total in sums.values()),
        values["ce_clean"],
        values["ce_spliced"] - values["ce_clean"],
        values["kl"],
        values["ce_recovered_zero"],
        values["ce_recovered_mean"],
    )


def table(lines: dict[str, list[Line]]) -> str:
    """Markdown; model -> its lines."""
    rows = [
        "| model (clean, nats) | all layers replaced by | latents | L0 | least EV | excess nats | KL"
        " | recovered, zero | recovered, mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, found in lines.items():
        rows += [
            f"| {model} ({line.clean:.3f}) | {line.kind} | {line.d_sae:,} | {line.l0:.1f} | {line.ev:.3f}"
            f" | {line.excess:.3f} | {line.kl:.3f} | {line.recovered_zero:.4f} | {line.recovered_mean:.4f} |"
            for line in found
        ]
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    what = "a kind, a folder of coders, and a word that their names hold"
    parser = kinds.parser("python -m demos.dictionaries.table", what)
    parser.add_argument("--text", type=Path, help="text on which BatchTopK's thresholds are calibrated")
    args = parser.parse_args(argv)

    def line(model: HookedModel, kind: str, coders: dict[str, SparseCoder]) -> Line:
        if args.text is not None:
            calibrate_on(model, coders, args.text)
        return measure(model, kind, coders, held_out_rows(model, args.valid))

    kinds.write_lines(args, line, table)


if __name__ == "__main__":
    main()
