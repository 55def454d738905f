"""What a cache of a hybrid can be taken apart into, and interventions on its branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mamba import HookedHybrid, patching
from hooked_mamba.analysis import attention_map, attention_rollout, logit_lens
from hooked_mamba.analysis.ablation import ablate
from hooked_mamba.analysis.attention_knockout import attention_knockout
from hooked_mamba.analysis.causal_tracing import causal_trace
from hooked_mamba.analysis.direct_logits import direct_logit_attribution
from hooked_mamba.analysis.knockout import knockout, knockout_sweep
from hooked_mamba.analysis.lens import lens_labels
from hooked_mamba.analysis.path_patching import path_patch, path_places
from hooked_mamba.analysis.rank_one_edit import key_moment, rank_one_edit
from tests.hooked_mamba.hybrids.tiny import CASES, SOME, tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
FP64 = 1e-12
TOKENS = tokens_for(length=6)
WITH_EXPERTS = ("jamba", "granite-moe", "nemotron")


@torch.no_grad()
def run(case: str, **kwargs):
    model = tiny(case).model
    logits, cache = model.run_with_cache(TOKENS, names_filter=lambda name: True, **kwargs)
    return model, logits, cache


@pytest.mark.parametrize("case", CASES)
def test_what_is_tested_of_a_case_is_what_it_has(case):
    branches = {name for block in tiny(case).model.blocks for name in block.branches}
    assert {"attn", "mlp"} <= branches
    assert ("moe" in branches) == (case in WITH_EXPERTS)


# Decompositions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_branches_add_sums_to_the_stream_and_the_logits(case):
    model, logits, cache = run(case)
    for layer in range(model.cfg.n_layers + 1):
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        assert relative(stack.sum(0), cache.resid_entering(layer)) < FP64
        if f"blocks.{layer}.hook_resid_mid" in cache:
            stack, labels = cache.decompose_resid(layer, mlp_input=True, return_labels=True)
            assert relative(stack.sum(0), cache["resid_mid", layer]) < FP64
            assert (
                relative(cache.apply_ln_to_stack(stack, layer, True).sum(0), cache[f"blocks.{layer}.norm2.hook_out"])
                < FP64
            )
        else:
            with pytest.raises(ValueError, match="two stages"):
                cache.decompose_resid(layer, mlp_input=True)
    stack, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "embed"
    assert set(labels[1:]) == {f"{i}_{n}_out" for i in range(model.cfg.n_layers) for n in model.block(i).written}
    chosen = TOKENS[:, -1]
    attrs = cache.logit_attrs(stack, chosen, pos_slice=None)
    expected = logits.gather(-1, chosen[:, None, None].expand(-1, 6, 1))[..., 0]
    assert relative(attrs.sum(0), expected) < FP64


@pytest.mark.parametrize("case", CASES)
def test_the_stream_between_stages_is_accumulated(case):
    _, _, cache = run(case)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    middles = [n for n in cache if n.endswith("resid_mid")]
    assert len([label for label in labels if label.endswith("_mid")]) == len(middles)
    for name in middles:
        layer = name.split(".")[1]
        assert torch.equal(stack[labels.index(f"{layer}_mid")], cache[name])


@pytest.mark.parametrize("case", CASES)
def test_the_lens_ends_in_the_logits(case):
    _, logits, cache = run(case)
    lens = logit_lens(cache, incl_mid=True)
    assert len(lens) == len(lens_labels(cache, incl_mid=True))
    assert relative(lens[-1], logits) < FP64


# In Zamba's shared blocks attention adds to no stream by itself.
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("zamba")])
def test_heads_of_attention(case):
    model, _, cache = run(case)
    layers = [i for i in range(model.cfg.n_layers) if "attn" in model.block(i).written]
    assert layers
    stack, labels = cache.stack_head_results(kind="attn", return_labels=True)
    heads = [[k for k, label in enumerate(labels) if label.startswith(f"L{i}H")] for i in layers]
    for i, mine in zip(layers, heads, strict=True):
        result = cache[f"blocks.{i}.attn.hook_result"] * cache.out_scale(i, "attn")
        assert relative(stack[mine].movedim(0, 2), result) < FP64
        assert relative(stack[mine].sum(0), cache[f"blocks.{i}.hook_attn_out"]) < FP64
    whole, _ = cache.stack_head_results(kind="attn", return_labels=True, incl_remainder=True)
    assert relative(whole.sum(0), cache.resid_entering(model.cfg.n_layers)) < FP64


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("zamba")])
def test_neurons(case):
    model, _, cache = run(case)
    stack, labels = cache.stack_neuron_results(return_labels=True)
    direction = torch.randn(32, dtype=torch.float64)
    for i in [i for i in range(model.cfg.n_layers) if "mlp" in model.block(i).written]:
        mine = [k for k, label in enumerate(labels) if label.startswith(f"L{i}N")]
        assert relative(stack[mine].sum(0), cache[f"blocks.{i}.hook_mlp_out"]) < FP64
    projected = cache.stack_neuron_results(project_output_onto=direction, pos_slice=-1)
    assert relative(projected, stack[:, :, -1] @ direction) < FP64


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_experts(case):
    model, _, cache = run(case)
    stack, labels = cache.stack_expert_results(return_labels=True, apply_ln=False)
    for i in [i for i in range(model.cfg.n_layers) if "moe" in model.block(i).written]:
        mine = [k for k, label in enumerate(labels) if label.startswith(f"L{i}E")]
        assert relative(stack[mine].sum(0), cache[f"blocks.{i}.hook_moe_out"]) < FP64
        chosen = torch.zeros(2, 6, len(mine)).scatter(-1, cache[f"blocks.{i}.moe.hook_expert_indices"], 1).bool()
        assert (stack[mine].abs().sum(-1).permute(1, 2, 0)[~chosen] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by", ["layer", "channel"])
def test_direct_logits_sum_to_the_logit(case, by):
    _, logits, cache = run(case)
    found = direct_logit_attribution(cache, 7, 9, by=by)
    assert relative(found.values.sum(0), logits[:, -1, 7] - logits[:, -1, 9]) < 1e-10


# Attention of both kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_call_gives_hidden_attention_and_patterns(case):
    model, _, cache = run(case)
    for i in range(model.cfg.n_layers):
        names = model.block(i).branches
        if "attn" in names:
            pattern = cache[f"blocks.{i}.attn.hook_pattern"]
            assert relative(cache.hidden_attention(i, branch="attn"), pattern) == 0
            assert relative(cache.pattern(i, heads=1, queries=-1), pattern[:, 1, -1]) == 0
            assert relative(attention_map(cache, i, branch="attn"), pattern.mean(1)) < FP64
        if "mixer" in names:
            alpha, mixer = cache.hidden_attention(i), model.mixer(i)
            u, expected = (cache[f"blocks.{i}.mixer.{mixer.site_at(place)}"] for place in ("u", "y"))
            y = torch.einsum("bhts,bshp->bthp", alpha, u if u.ndim == 4 else u.unsqueeze(-1)).reshape(expected.shape)
            bias = mixer.scan_bias()
            assert relative(y if bias is None else y + bias, expected) < FP64
        if not {"mixer", "attn"} & set(names):
            with pytest.raises(ValueError, match="moves values"):
                cache.hidden_attention(i)
    rows = attention_rollout(cache)
    assert relative(rows.sum(-1), torch.ones(2, 6, dtype=rows.dtype)) < FP64
    assert (rows.triu(1) == 0).all()


# Interventions -------------------------------------------------------------------------------------------------------


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].mean()


SWEEPS = {
    "attn_head_q_by_pos": ("hook_q", 2), "attn_head_k_all_pos": ("hook_k", None), "attn_head_v_by_pos": ("hook_v", 2),
    "attn_head_out_all_pos": ("hook_z", None), "attn_head_pattern_all_pos": ("hook_pattern", None),
    "attn_head_pattern_by_pos": ("hook_pattern", 2),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("case", ["nemotron", "falcon"])
def test_sweeps_over_the_blocks_that_have_attention(case, sweep):
    model, other = tiny(case).model, tokens_for(length=5, seed=9)
    tokens = tokens_for(length=5, seed=8)
    _, clean = model.run_with_cache(tokens)
    values = getattr(patching, f"get_act_patch_{sweep}")(model, other, clean, metric, progress=False)
    site, pos = SWEEPS[sweep]
    for layer in range(model.cfg.n_layers):
        if "attn" not in model.block(layer).branches:
            assert values[layer].isnan().all()
            continue
        name = f"blocks.{layer}.attn.{site}"

        def patch(v: Tensor, hook, name: str = name) -> Tensor:
            where = (slice(None), 1) if site == "hook_pattern" else (slice(None), slice(None), 1)
            if pos is not None:
                where = (slice(None), 1, pos) if site == "hook_pattern" else (slice(None), pos, 1)
            v[where] = clean[name][where]
            return v

        expected = metric(model.run_with_hooks(other, fwd_hooks=[(name, patch)]))
        got = (
            values[layer, 1] if pos is None else values[layer, 1, 2] if site == "hook_pattern" else values[layer, 2, 1]
        )
        assert abs(float(got) - float(expected)) < 1e-6 * abs(float(expected))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["neuron_all_pos", "expert_score_all_pos", "mlp_out", "moe_out", "resid_mid", "attn_out"]
)
def test_further_sweeps_run(name):
    model = tiny("granite-moe").model
    _, clean = model.run_with_cache(tokens_for(length=4, seed=8))
    values = getattr(patching, f"get_act_patch_{name}")(
        model, tokens_for(length=4, seed=9), clean, metric, progress=False
    )
    assert values.isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_cut_source_is_not_noticed_through_values(case):
    """With the value path cut everywhere and the selection held, what the source's values are makes no difference."""
    model, logits, cache = run(case)
    with knockout(model, sources=2, targets=slice(3, None)):
        assert relative(model(TOKENS)[:, :3], logits[:, :3]) < FP64
        assert relative(model(TOKENS)[:, 3:], logits[:, 3:]) > 1e-4
    layer = max(i for i in range(model.cfg.n_layers) if "attn" in model.block(i).branches)
    site = f"blocks.{layer}.attn."
    with attention_knockout(model, 2, slice(3, None), layer), torch.no_grad():
        _, cut = model.run_with_cache(TOKENS, names_filter=[f"{site}hook_z", f"{site}hook_pattern"])
    pattern = cache[f"{site}hook_pattern"].clone()
    pattern[:, :, 3:, 2] = 0
    assert relative(cut[f"{site}hook_pattern"], pattern) < FP64
    with attention_knockout(model, 2, slice(3, None), layer, renormalise=True):
        _, cut = model.run_with_cache(TOKENS, names_filter=[f"{site}hook_pattern"])
    assert relative(cut[f"{site}hook_pattern"], pattern / pattern.sum(-1, keepdim=True)) < FP64


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_nested_cuts_are_one(case):
    """Cuts of every kind of branch, which overlap: what both take is taken once."""
    model, behind = tiny(case).model, slice(4, None)
    with knockout(model, sources=[1, 2, 3], targets=behind):
        whole = model(TOKENS)
    with knockout(model, sources=[1, 2], targets=behind), knockout(model, sources=[2, 3], targets=behind):
        assert relative(model(TOKENS), whole) < FP64
    with (
        knockout(model, sources=[2, 3], targets=behind, source="scan"),
        knockout(model, sources=[1, 2], targets=behind, source="scan"),
        knockout(model, sources=2, targets=5, source="scan", layers=1),
    ):
        nested = model(TOKENS)
    with knockout(model, sources=[1, 2, 3], targets=behind, source="scan"):
        assert relative(model(TOKENS), nested) < FP64


@torch.no_grad()
@pytest.mark.parametrize("case", ["nemotron", "lfm2", "zamba"])
def test_a_cut_stays_while_generating(case):
    model = HookedHybrid.from_hf(tiny(case).hf)
    with knockout(model, sources=[1, 2], targets=slice(4, None)):
        whole = model.generate(TOKENS, 5, do_sample=False, stop_at_eos=False, verbose=False)
        again = TOKENS
        for _ in range(5):
            again = torch.cat([again, model(again)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(whole, again)
    sweep = knockout_sweep(model, TOKENS, metric, progress=False)
    assert sweep.shape == (model.cfg.n_layers, 6)


@torch.no_grad()
@pytest.mark.parametrize("case", ["falcon", "granite-moe", "nemotron"])
def test_paths_between_sublayers(case):
    """Against the same by hand: the difference added where the receiver reads, its output patched."""
    model, a, b = tiny(case).model, tokens_for(1, 4, seed=1), tokens_for(1, 4, seed=2)
    _, clean = model.run_with_cache(a)
    _, bad = model.run_with_cache(b)
    result, places = path_patch(model, b, clean, metric, progress=False), path_places(model)
    outs = [f"blocks.{i}.{model.block(i).written[name]}" for i, name in places]
    assert result.shape == (len(places) + 1, len(places) + 1)
    stage = [next(s for s, names in enumerate(model.block(i).stages) if n in names) for i, n in places]
    for s, r in ((0, 1), (1, 3), (2, 3)):
        change = clean[outs[s]] - bad[outs[s]]
        if places[s][0] == places[r][0] and stage[s] == stage[r]:
            assert result[s + 1, r].isnan()
            continue
        layer = places[r][0]
        read = f"blocks.{layer}.hook_resid_{'mid' if case in ('falcon', 'granite-moe') and stage[r] else 'pre'}"
        keep: dict[str, Tensor] = {}
        model.run_with_hooks(
            b,
            fwd_hooks=[
                (read, lambda v, hook, c=change: v + c),
                (outs[r], lambda v, hook, k=keep: k.update(out=v.clone())),
            ],
        )
        expected = metric(model.run_with_hooks(b, fwd_hooks=[(outs[r], lambda v, hook, k=keep: k["out"])]))
        assert abs(float(result[s + 1, r]) - float(expected)) < 1e-6 * abs(float(expected))


@torch.no_grad()
@pytest.mark.parametrize("case", ["zamba", "zamba2"])
def test_paths_into_through_and_past_a_shared_transformer(case):
    """Against the block's modules called one by one."""
    model, a, b = tiny(case).model, tokens_for(1, 4, seed=1), tokens_for(1, 4, seed=2)
    _, clean = model.run_with_cache(a)
    _, bad = model.run_with_cache(b)
    result, places = path_patch(model, b, clean, metric, progress=False), path_places(model)
    layer = next(i for i in range(1, model.cfg.n_layers) if model.block(i).beside)
    block, at = model.block(layer), f"blocks.{layer}."
    number = {place: i for i, place in enumerate(places)}
    attn, mlp, mixer = (number[layer, name] for name in ("attn", "mlp", "mixer"))
    earlier = number[layer - 1, "mixer"]

    def change(name):
        return clean[name] - bad[name]

    def patched(branch, norm, read):
        """The metric with a branch's output for another input."""
        new, _ = getattr(block, branch)(getattr(block, norm)(read))
        return metric(model.run_with_hooks(b, fwd_hooks=[(f"{at}{branch}.{block.branches[branch].out_site}",
                                                          lambda value, hook: new)]))  # fmt: skip

    stream, embed = bad[f"{at}hook_resid_pre"], bad["hook_embed"]
    before, looked = f"blocks.{layer - 1}.hook_mixer_out", f"{at}attn.{block.attn.out_site}"
    said = block.linear(change(f"{at}mlp.{block.mlp.out_site}"))
    both = torch.cat([stream + change("hook_embed"), embed + change("hook_embed")], -1)
    expected = {
        (earlier + 1, attn): patched("attn", "norm_shared", torch.cat([stream + change(before), embed], -1)),
        (0, attn): patched("attn", "norm_shared", both),
        (attn + 1, mlp): patched("mlp", "norm2", bad[looked] + change(looked)),
        (mlp + 1, mixer): patched("mixer", "norm", bad[f"{at}hook_mixer_in"] + said),
        (earlier + 1, mixer): patched("mixer", "norm", bad[f"{at}hook_mixer_in"] + change(before)),
    }
    for at_pair, value in expected.items():
        assert abs(float(result[at_pair]) - float(value)) < 1e-6 * abs(float(value)), at_pair
    # Attention reaches the mixer through the MLP alone, and neither writes into the stream.
    none = [(attn + 1, mixer), (attn + 1, -1), (mlp + 1, -1), (earlier + 1, mlp), (0, mlp), (mlp + 1, attn)]
    assert all(bool(result[pair].isnan()) for pair in none)


@torch.no_grad()
def test_ablation_and_tracing():
    model, logits, cache = run("granite-moe")
    with ablate(model, "blocks.*.attn.hook_z", units=1):
        assert relative(model(TOKENS), logits) > 1e-4
    with ablate(model, "blocks.2.hook_moe_out", "mean", reference=cache):
        assert relative(model(TOKENS), logits) > 1e-4
    trace = causal_trace(model, TOKENS[:1], 7, [1], site="mlp_out", samples=2, progress=False)
    assert trace.restored.shape == (4, 6)


@pytest.mark.parametrize("case", ["bamba", "nemotron"])
def test_a_fact_written_into_an_mlp(case):
    model = HookedHybrid.from_hf(tiny(case).hf).requires_grad_(False)
    layer = 3 if case == "nemotron" else 1
    moment = key_moment(model, layer, [tokens_for(4, 12, seed=s) for s in range(8)], branch="mlp")
    prompt = tokens_for(1, 5, seed=3)
    edit = rank_one_edit(model, [prompt], [4], 7, layer, moment, steps=30, lr=2.0, branch="mlp")
    with torch.no_grad():
        before, after = model(prompt)[0, -1].softmax(-1)[7], edit.apply(model)(prompt)[0, -1].softmax(-1)[7]
    assert edit.losses[-1] < edit.losses[0]
    assert after > before
