"""Each detail of the equations, wrong on purpose: the comparison with the reference must notice it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_mamba import HookedHybrid
from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.hybrids.tiny import tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
Change = Callable[[Any], Any]


def branch(name: str, **fields: Any) -> Change:
    def change(cfg: Any) -> Any:
        changed = dataclasses.replace(cfg.branches[name], **fields)
        return dataclasses.replace(cfg, branches={**cfg.branches, name: changed})

    return change


def stack(**fields: Any) -> Change:
    return lambda cfg: dataclasses.replace(cfg, **fields)


def without(kind: str, name: str) -> Change:
    """One of the factors dropped."""

    def change(cfg: Any) -> Any:
        return dataclasses.replace(cfg, **{kind: {k: v for k, v in getattr(cfg, kind).items() if k != name}})

    return change


MUTATIONS: dict[str, tuple[str, Change]] = {
    "jamba: norms without weights": ("jamba", branch("mixer", mixer_norm_weights=False)),
    "jamba: no norms": ("jamba", branch("mixer", mixer_norms=False, mixer_norm_weights=False)),
    "jamba: another eps in them": ("jamba", branch("mixer", mixer_norm_eps=1e-2)),
    "jamba: positions": ("jamba", branch("attn", rotary_dim=8)),
    "jamba: weights renormalised": ("jamba", branch("moe", normalize=True)),
    "jamba: softmax over the chosen": ("jamba", branch("moe", scoring="top_k_softmax")),
    "bamba: norm before gate": ("bamba", branch("mixer", gated_norm="norm_first")),
    "bamba: norm over all channels": ("bamba", branch("mixer", norm_groups=1)),
    "bamba: positions on the whole head": ("bamba", branch("attn", rotary_dim=8)),
    "bamba: no positions": ("bamba", branch("attn", rotary_dim=0)),
    "bamba: another base": ("bamba", branch("attn", rotary_base=500000.0)),
    "granite: scale c^-0.5": ("granite-moe", branch("attn", scale=None)),
    "granite: positions": ("granite-moe", branch("attn", rotary_dim=8)),
    "granite: no positions": ("granite-dense", branch("attn", rotary_dim=0)),
    "granite: softmax over all": ("granite-moe", branch("moe", scoring="softmax")),
    "granite: no factor of the embedding": ("granite-moe", stack(embedding_multiplier=1.0)),
    "granite: no factor of additions": ("granite-moe", stack(out_scales={})),
    "granite: none of the mixer's": ("granite-moe", without("out_scales", "mixer")),
    "granite: none of the experts'": ("granite-moe", without("out_scales", "moe")),
    "granite: none of the MLP's": ("granite-moe", without("out_scales", "mlp")),
    "granite: logits not divided": ("granite-moe", stack(logit_multiplier=1.0)),
    "nemotron: positions": ("nemotron", branch("attn", rotary_dim=10)),
    "nemotron: relu not squared": ("nemotron", branch("mlp", activation="relu")),
    "nemotron: relu not squared in the shared expert": ("nemotron", branch("shared", activation="relu")),
    "nemotron: relu not squared in experts": ("nemotron", branch("moe", activation="relu")),
    "nemotron: no groups": ("nemotron", branch("moe", n_groups=1)),
    "nemotron: both groups": ("nemotron", branch("moe", top_k_groups=2)),
    "nemotron: weights not normalised": ("nemotron", branch("moe", normalize=False)),
    "nemotron: no factor of weights": ("nemotron", branch("moe", routed_scale=1.0)),
    "nemotron: softmax": ("nemotron", branch("moe", scoring="softmax")),
    "nemotron: dt clamped": ("nemotron", branch("mixer", dt_limit=(0.1, 1.0))),
    "falcon: no factor of the mixer's input": ("falcon", without("in_scales", "mixer")),
    "falcon: no factors behind in_proj": ("falcon", branch("mixer", in_scales=None)),
    "falcon: those in another order": ("falcon", branch("mixer", in_scales=(0.5, 0.7, 0.6, 0.8, 0.9))),
    "falcon: no factor of the mixer's output": ("falcon", without("out_scales", "mixer")),
    "falcon: gate before norm": ("falcon-norm-first", branch("mixer", gated_norm="gate_first")),
    "falcon: norm before gate": ("falcon-gate-first", branch("mixer", gated_norm="norm_first")),
    "falcon: no factor of attention's input": ("falcon", without("in_scales", "attn")),
    "falcon: no factor of the keys": ("falcon", branch("attn", key_multiplier=1.0)),
    "falcon: no factor of attention's output": ("falcon", without("out_scales", "attn")),
    "falcon: no factor of the gate": ("falcon", branch("mlp", gate_multiplier=1.0)),
    "falcon: no factor of the MLP's output": ("falcon", without("out_scales", "mlp")),
    "falcon: no factor of the embedding": ("falcon", stack(embedding_multiplier=1.0)),
    "falcon: no factor of the logits": ("falcon", stack(logit_multiplier=1.0)),
    "lfm2: no norm of queries and keys": ("lfm2", branch("attn", qk_norm_eps=None)),
    "lfm2: another base": ("lfm2", branch("attn", rotary_base=10000.0)),
    "zamba: scale c^-0.5": ("zamba", branch("attn", scale=None)),
    "zamba: positions": ("zamba", branch("attn", rotary_dim=16)),
    "zamba: silu": ("zamba", branch("mlp", activation="silu")),
    "zamba: no shared transformer": ("zamba", stack(shared=None, layout=((("mixer",),),) * 5)),
    "zamba2: no positions": ("zamba2", branch("attn", rotary_dim=0)),
    "zamba2: no adapters of attention": ("zamba2", branch("attn", adapter_rank=None)),
    "zamba2: no adapters of the MLP": ("zamba2", branch("mlp", adapter_rank=None)),
    "zamba2: another eps of the gated norm": ("zamba2", branch("mixer", norm_eps=1e-2)),
    "falcon: one stage after the other": (
        "falcon",
        stack(layout=((("mixer",), ("attn",), ("mlp",)),) * 3),
    ),
}


@torch.no_grad()
def distance(case: str, change: Change, edit: Callable[[Any], None] = lambda model: None) -> float:
    one = tiny(case)
    model = HookedHybrid(change(one.model.cfg)).double()
    model.load_state_dict(one.model.state_dict(), strict=False)
    edit(model)
    expected = reference.forward(one.config, one.weights, tokens_for().numpy())
    return relative(model(tokens_for()), expected.logits)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_detail_is_noticed(name):
    assert distance(*MUTATIONS[name]) > 1e-6
    assert distance(MUTATIONS[name][0], lambda cfg: cfg) < 1e-12


def swapped_gate(model: Any) -> None:
    """The gate's factor behind silu instead of before."""
    for block in model.blocks:
        block.mlp.cfg = dataclasses.replace(block.mlp.cfg, gate_multiplier=1.0)
        block.mlp.up_proj.weight.mul_(0.9)


def biased_weights(model: Any) -> None:
    """Weights of scores with the bias in."""
    moe = model.blocks[1].moe
    moe.weigh = lambda logits, scores, indices: 2.5 * (w := scores.gather(-1, indices)) / w.sum(-1, keepdim=True)


def unbiased_choice(model: Any) -> None:
    """The best experts by scores without the bias."""
    moe = model.blocks[1].moe
    moe.scores = lambda logits: logits.sigmoid()


def best_of_each_group(model: Any) -> None:
    """Groups ranked by their best expert alone."""
    moe = model.blocks[1].moe

    def choose(scores: torch.Tensor) -> torch.Tensor:
        groups = scores.unflatten(-1, (2, -1))
        kept = groups.amax(-1).argmax(-1, keepdim=True)
        only = groups.masked_fill((torch.arange(2) != kept)[..., None], -torch.inf).flatten(-2)
        return only.topk(2, -1).indices

    moe.choose = choose


def shared_reads_latent(model: Any) -> None:
    """Experts see the stream turned round: any other reading of the latent width."""
    model.blocks[1].moe.latent_in.weight.copy_(model.blocks[1].moe.latent_in.weight.flip(0))


def heads_of_other_groups(model: Any) -> None:
    """Query heads that share keys in turns instead of in blocks."""
    for block in model.blocks:
        if hasattr(block, "attn"):
            weight = block.attn.q_proj.weight.unflatten(0, (4, -1))
            block.attn.q_proj.weight.copy_(weight[[0, 2, 1, 3]].flatten(0, 1))


def embedding_first(model: Any) -> None:
    """The embedding before the stream in what shared attention reads."""
    for block in model.blocks:
        if hasattr(block, "norm_shared"):
            forward = block.norm_shared.forward
            block.norm_shared.forward = lambda x, forward=forward: forward(torch.cat(x.chunk(2, -1)[::-1], -1))


def residual_inside(model: Any) -> None:
    """The shared MLP's output added to attention's."""
    kept: dict[str, Any] = {}
    model.add_hook("blocks.*.attn.hook_out", lambda v, hook: kept.update(out=v))
    model.add_hook(lambda n: n.endswith("mlp.hook_out"), lambda v, hook: v + kept["out"])


def shared_to_stream(model: Any) -> None:
    """What the transformer makes added to the stream as well."""
    kept: dict[str, Any] = {}
    model.add_hook("blocks.*.hook_shared_out", lambda v, hook: kept.update(out=v))
    model.add_hook("blocks.1.hook_resid_post", lambda v, hook: v + kept["out"])


def halves_of_in_proj(model: Any) -> None:
    """Rows of x and z one behind the other in the file."""
    for block in model.blocks:
        weight = block.mixer.in_proj.weight
        weight.copy_(torch.stack(weight.chunk(2), 1).flatten(0, 1))


def gates_changed(model: Any) -> None:
    """B and C of the short convolution for each other."""
    for block in model.blocks:
        if hasattr(block, "mixer"):
            for p in block.mixer.in_proj.parameters():
                p.copy_(torch.cat([p.chunk(3)[i] for i in (1, 0, 2)]))


def another_transformer(model: Any) -> None:
    """The last use takes the second transformer, as if not only hybrid blocks counted."""
    model.blocks[4].share_with(model.blocks[3])


EDITS = {
    "zamba: embedding before stream": ("zamba", embedding_first),
    "zamba: a residual inside": ("zamba", residual_inside),
    "zamba: into the stream": ("zamba", shared_to_stream),
    "zamba: in_proj in halves": ("zamba", halves_of_in_proj),
    "zamba2: another transformer": ("zamba2", another_transformer),
    "lfm2: B and C exchanged": ("lfm2", gates_changed),
    "falcon: the gate's factor behind silu": ("falcon", swapped_gate),
    "nemotron: weights of biased scores": ("nemotron", biased_weights),
    "nemotron: a choice without the bias": ("nemotron", unbiased_choice),
    "nemotron: groups by their best one": ("nemotron", best_of_each_group),
    "nemotron: another latent width": ("nemotron", shared_reads_latent),
    "jamba: keys shared in turns": ("jamba", heads_of_other_groups),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_line_is_noticed(name):
    case, edit = EDITS[name]
    assert distance(case, lambda cfg: cfg, edit) > 1e-6
