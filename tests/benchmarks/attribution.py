"""What attribution costs: by the side of a forward and backward pass, of dense attention, and of loops in Python."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits import FrozenModel, Logit, attribute
from hooked_mamba import HookedMamba, MambaConfig
from hooked_mamba.frozen.chain import Chain
from tests.benchmarks import child
from tests.benchmarks.memory import peak_above
from tests.benchmarks.models import shape_text
from tests.benchmarks.report import Bound, Section, Table, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio

PASSES = 3
"""Times a forward and backward pass that one target may take, the run of the prompt included."""
BESIDE = "forward and backward"


def run(sizes: Sizes) -> Section:
    """One target through a whole model; one layer's heads by three ways; memory by length."""
    l = sizes.attribution_length
    section = Section(
        "Attribution",
        f"{shape_text(sizes)}. A target is one logit at the last position, taken back through every layer to heads"
        " (layer, source, channel), embeddings and biases. The backward pass is that of the same logit to the"
        " embeddings, weights left out. One layer's heads are also found by the dense hidden attention of every"
        " channel, l x l numbers each, and by loops over sources and over the products between source and target in"
        " Python, vectorised over channels and states alone, as published code has them; all from the same cache."
        " The longest run keeps one block at a time.",
    )
    section.tables.append(_whole_model(sizes, section.bounds))
    section.tables.append(_one_layer(sizes))
    rows = []
    for length in (l // 2, l, 2 * l):
        peak = child.call("tests.benchmarks.attribution:memory_here", sizes, length=length)
        rows.append([f"{length} positions", number(peak)])
    section.tables.append(Table("Memory of the run and one target, above the weights", ["", "MiB"], rows))
    return section


def _whole_model(sizes: Sizes, bounds: list[Bound]) -> Table:
    l = sizes.attribution_length
    model, tokens = _model(sizes), torch.arange(l)[None] % sizes.d_vocab
    target = Logit(1)
    frozen = FrozenModel(model, tokens)
    runs = {
        BESIDE: lambda: _gradient(model, tokens),
        "run of the prompt": lambda: FrozenModel(model, tokens),
        "run and one target": lambda: attribute(FrozenModel(model, tokens), targets=target),
        "one more target": lambda: attribute(frozen, targets=target),
        "4 more targets": lambda: attribute(frozen, targets=[Logit(i) for i in range(4)], keep_heads=False),
    }
    timings = race(runs, sizes)
    if sizes.claims:
        cost = ratio(timings["run and one target"], timings[BESIDE])
        bounds.append(Bound("Run and one target, in forward and backward passes", cost, PASSES, False))
    return timing_table(f"Whole model, 1 x {l}", timings, BESIDE, cost=True)


def _model(sizes: Sizes) -> HookedMamba:
    cfg = MambaConfig(d_model=sizes.d_model, n_layers=sizes.n_layers, d_vocab=sizes.d_vocab, d_state=sizes.N)
    return HookedMamba(cfg, seed=0).requires_grad_(False)


def _gradient(model: HookedMamba, tokens: Tensor) -> Tensor:
    """Of one logit by the embeddings, in the real model."""
    embed = model.embed(tokens).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(embed, start_at_layer=0)
        return torch.autograd.grad(logits[0, -1, 1], embed)[0]


def memory_here(sizes: Sizes, length: int) -> float | None:
    """MiB above the weights, after a short run for what loads or compiles."""
    model = _model(sizes)
    attribute(model, (), torch.ones(1, 4, dtype=torch.long), Logit(1))
    return peak_above(lambda: attribute(model, (), torch.ones(1, length, dtype=torch.long), Logit(1)))


# One layer's heads -------------------------------------------------------------------------------------------------


def _one_layer(sizes: Sizes) -> Table:
    d, l = sizes.analysis[0]
    cfg = MambaConfig(d_model=d, n_layers=1, d_vocab=40, d_state=sizes.N)
    tokens = torch.arange(l)[None] % 40
    mixers = {dtype: FrozenModel(HookedMamba(cfg, seed=0).to(dtype), tokens).chain(0) for dtype in FLOATS}
    mixer = mixers[torch.float32]
    vy = torch.randn(1, cfg.E, generator=torch.Generator().manual_seed(0))
    V = {dtype: _last(l, mixers[dtype].output.push(vy.to(dtype))) for dtype in FLOATS}
    row = torch.zeros(1, dtype=torch.long)
    ways = {
        "loops in Python": lambda: _by_loops(mixer, V[torch.float32]),
        "dense attention": lambda: _by_dense_attention(mixer, V[torch.float32]),
        "ours": lambda: mixer.pull(V[torch.float32], row).at["u"] * mixer.u,
    }
    exact = mixers[torch.float64].pull(V[torch.float64], row).at["u"] * mixers[torch.float64].u
    errors = {name: number(relative_error(way(), exact)) for name, way in ways.items()}
    timings = race(ways, sizes)
    return timing_table(f"One layer's heads, d={d}, 1 x {l}", timings, "loops in Python", extra={"error": errors})


FLOATS = (torch.float32, torch.float64)


def _last(l: int, v: Float[Tensor, "1 d"]) -> Float[Tensor, "1 l d"]:
    V = v.new_zeros(1, l, v.shape[1])
    V[:, -1] = v
    return V


def _by_dense_attention(mixer: Chain, V: Float[Tensor, "1 l d"]) -> Float[Tensor, "1 l E"]:
    alpha = mixer.scan.rows()
    vy = mixer.pull(V, torch.zeros(1, dtype=torch.long), until="y").below
    return torch.einsum("bets,bte->bse", alpha, vy) * mixer.u


def _by_loops(mixer: Chain, V: Float[Tensor, "1 l d"]) -> Float[Tensor, "1 l E"]:
    """For the last position alone, a product of A_bar anew for every source."""
    view, t = mixer.scan, V.shape[1] - 1
    vy = mixer.pull(V, torch.zeros(1, dtype=torch.long), until="y").below[0, t]
    heads = torch.zeros_like(mixer.u)
    for s in range(t + 1):
        product = torch.ones_like(view.A)
        for j in range(s + 1, t + 1):
            product = product * torch.exp(view.dt[0, j].unsqueeze(-1) * view.A)
        alpha = (view.C[0, t, 0] * product * view.dt[0, s].unsqueeze(-1) * view.B[0, s, 0]).sum(-1)
        heads[0, s] = vy * (alpha + (view.D if s == t else 0)) * mixer.u[0, s]
    return heads
