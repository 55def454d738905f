"""What must hold for every model and every input: paths, cuts, padding, copies, precisions."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, ModelState, ops
from tests.hooked_mamba.tiny import FAMILIES, build, relative, tokens_for
from tests.kinds import MAMBA

pytestmark = pytest.mark.usefixtures("fast")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
families = st.sampled_from(FAMILIES)
seeds = st.integers(0, 1000)
few = settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate])

_models: dict = {}


def model_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float64):
    key = family, seed % 3, dtype
    if key not in _models:
        _models[key] = build(family, seed % 3).to(dtype).requires_grad_(False)
    return _models[key]


def all_sites(model, *args, **kwargs) -> tuple[Tensor, ModelState, dict[str, Tensor]]:
    """Logits, state, and every site but the tokens."""
    names = [name for name in model.hook_dict if name != "hook_tokens"]
    (logits, state), cache = model.run_with_cache(*args, names_filter=names, return_state=True, **kwargs)
    return logits, state, cache.cache_dict


def check_states(got: ModelState, expected: ModelState, tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert relative(mine.conv, theirs.conv) < tolerance
        assert relative(mine.ssm, theirs.ssm) < tolerance


IDENTITIES = {
    "nothing returned": lambda v, hook: None,
    "the same tensor": lambda v, hook: v,
    "a copy": lambda v, hook: v.clone(),
}


# Paths -------------------------------------------------------------------------------------------------------


@few
@given(families, seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from(list(IDENTITIES)))
def test_identity_hooks_change_no_bit_of_the_materialised_path(family, seed, dtype, kind):
    model, identity = model_of(family, seed, dtype), IDENTITIES[kind]
    tokens = tokens_for(model, rows=2, length=1 + seed % 9, seed=seed)
    names = [name for name in model.hook_dict if name != "hook_tokens"]
    names += [f"blocks.{i}.mixer.hook_h.{t}" for i in range(2) for t in range(-1, tokens.shape[1])]
    with model.hooks(fwd_hooks=[("blocks.*.mixer.hook_h", lambda h, hook: None)]):
        materialised = all_sites(model, tokens)
    with model.hooks(fwd_hooks=[(name, identity) for name in names]):
        hooked = all_sites(model, tokens)
    assert torch.equal(hooked[0], materialised[0])
    for name, value in materialised[2].items():
        assert torch.equal(hooked[2][name], value), name
    for mine, theirs in zip(hooked[1], materialised[1], strict=True):
        assert torch.equal(mine.conv, theirs.conv)
        assert torch.equal(mine.ssm, theirs.ssm)


@few
@given(families, seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["A_bar", "B_bar", "Bx", "h"]))
def test_the_materialised_path_equals_the_fused_one(family, seed, dtype, site):
    model = model_of(family, seed, dtype)
    tokens = tokens_for(model, rows=2, length=1 + seed % 70, seed=seed)
    fused = all_sites(model, tokens)
    with model.hooks(fwd_hooks=[(f"blocks.*.mixer.hook_{site}", lambda v, hook: None)]):
        materialised = all_sites(model, tokens)
    assert relative(materialised[0], fused[0]) < TOLERANCE[dtype]
    for name, value in fused[2].items():
        assert relative(materialised[2][name], value) < TOLERANCE[dtype], name
    check_states(materialised[1], fused[1], TOLERANCE[dtype])


@torch.no_grad()
def test_reading_dt_leaves_the_fused_pass_alone(monkeypatch):
    """dt alone is formed on the side, but not where its gradient may be asked for, or where it is edited."""
    model, passes = build("mamba"), []
    tokens, fused = tokens_for(model), ops.gated_scan

    def counted(*args, **kwargs):
        passes.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(ops, "gated_scan", counted)
    expected = model(tokens)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(("hook_dt", "hook_dt_pre")))
    assert len(passes) == 2 * model.cfg.n_layers
    assert torch.equal(logits, expected)
    assert torch.allclose(cache["dt", 0], torch.nn.functional.softplus(cache["dt_pre", 0]))
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_dt", lambda dt, hook: dt)])
    assert len(passes) == 3 * model.cfg.n_layers - 1
    with torch.enable_grad():
        model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_dt")
    assert len(passes) == 4 * model.cfg.n_layers - 2


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_hooks_on_small_sites_change_no_bit_of_the_fused_path(family):
    model = model_of(family, dtype=torch.float32)
    tokens = tokens_for(model, length=9)
    names = [n for n in model.hook_dict if not n.endswith(("hook_A_bar", "hook_B_bar", "hook_Bx", "hook_h"))]
    hooked = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v) for name in names])
    assert torch.equal(hooked, model(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_changes_no_bit(family):
    model = model_of(family, dtype=torch.float32)
    tokens = tokens_for(model, length=9)
    logits, _ = model.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens))
    logits, _ = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert relative(logits, model(tokens)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_on_and_off_give_the_same_bits(family):
    model = build(family)
    tokens = tokens_for(model, length=9)
    with torch.no_grad():
        off = model(tokens)
    on = model(tokens)
    assert on.requires_grad
    assert not off.requires_grad
    assert torch.equal(on, off)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_two_paths_are_equal(family):
    grads = []
    for hooks in ([], [("blocks.*.mixer.hook_B_bar", lambda v, hook: v)]):
        model = build(family).double()
        model.run_with_hooks(tokens_for(model, length=10), return_type="loss", fwd_hooks=hooks).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert relative(grads[1][name], grad) < 1e-11, name


# Cuts --------------------------------------------------------------------------------------------------------


@few
@given(families, seeds, st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_chunks_and_single_steps_equal_one_pass(family, seed, pieces):
    model = model_of(family, seed)
    tokens = tokens_for(model, rows=2, length=sum(pieces), seed=seed)
    logits, end, sites = all_sites(model, tokens)
    parts, state, start = [], None, 0
    for n in pieces:
        part = all_sites(model, tokens[:, start : start + n], initial_state=state)
        parts.append(part)
        state, start = part[1], start + n
    assert relative(torch.cat([part[0] for part in parts], 1), logits) < 1e-12
    check_states(state, end)
    for name, value in sites.items():
        assert relative(torch.cat([part[2][name] for part in parts], 1), value) < 1e-12, name


@pytest.mark.parametrize("family", FAMILIES)
def test_single_states_count_from_the_call(family):
    model = model_of(family)
    tokens = tokens_for(model, length=7)
    _, whole = model.run_with_cache(tokens, names_filter="blocks.1.mixer.hook_h.5")
    _, state = model(tokens[:, :4], return_state=True)
    _, part = model.run_with_cache(
        tokens[:, 4:], names_filter=["blocks.1.mixer.hook_h.1", "blocks.1.mixer.hook_h.-2"], initial_state=state
    )
    for name in part:
        assert relative(part[name], whole["h.5", 1]) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_travel_through_the_state(family):
    model = build(family).double()
    tokens = tokens_for(model, length=8)
    weight = torch.randn(2, 8, model.cfg.d_vocab, dtype=torch.float64)

    def gradients(cuts: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        outs, state = [], None
        for piece in tokens.split(cuts, 1):
            out, state = model(piece, initial_state=state, return_state=True)
            outs.append(out)
        (torch.cat(outs, 1) * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, cut = gradients([8]), gradients([3, 1, 4])
    for name, grad in whole.items():
        assert relative(cut[name], grad) < 1e-11, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_branches(family):
    model = model_of(family)
    tokens = tokens_for(model, rows=3, length=6)
    _, state = model(tokens[:, :4], return_state=True)
    before = state.clone()
    twice = model(tokens[[2, 0], 4:], initial_state=state.rows([2, 0]))
    assert relative(twice, model(tokens)[[2, 0], 4:]) < 1e-12
    check_states(state, before, 1e-300)  # running from a state leaves it as it was
    assert state.nbytes() == sum(layer.conv.nbytes + layer.ssm.nbytes for layer in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compose(family):
    model = model_of(family)
    tokens = tokens_for(model)
    logits, end, _ = all_sites(model, tokens)
    for cut in (0, 1, 2, -1):
        resid, state = model(tokens, stop_at_layer=cut, return_state=True)
        out, state = model(resid, start_at_layer=cut, initial_state=state, return_state=True)
        if cut in (1, -1):  # the second half's own layers are given an empty memory by the first
            check_states(state, end)
        assert relative(out, logits) < 1e-12


# Padding -----------------------------------------------------------------------------------------------------


@st.composite
def padded_batches(draw):
    """Rows of real lengths in a width, with padding at the left, the right, or both."""
    width = draw(st.integers(2, 9))
    rows = draw(st.integers(1, 3))
    layout = []
    for _ in range(rows):
        real = draw(st.integers(1, width))
        left = draw(st.one_of(st.just(0), st.just(width - real), st.integers(0, width - real)))
        layout.append((left, real))
    return width, layout


def padded(tokens: list[Tensor], width: int, layout, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows put into a batch of this width; padding holds random tokens, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, vocab, (len(layout), width), generator=generator)
    mask = torch.zeros(len(layout), width, dtype=torch.long)
    for i, (left, real) in enumerate(layout):
        batch[i, left : left + real] = tokens[i]
        mask[i, left : left + real] = 1
    return batch, mask


@settings(few, max_examples=30)
@given(families, seeds, padded_batches(), padded_batches(), st.booleans())
def test_padded_rows_are_what_they_are_alone(family, seed, first, second, materialised):
    """Logits, every site at real positions, the state, and a padded second chunk from that state."""
    model = model_of(family, seed)
    width, layout = first
    layout2 = [(second[1] * 3)[i] for i in range(len(layout))]
    rows = [
        tokens_for(model, 1, a + b, seed + i)[0] for i, ((_, a), (_, b)) in enumerate(zip(layout, layout2, strict=True))
    ]
    batch, mask = padded(
        [r[:a] for r, (_, a) in zip(rows, layout, strict=True)], width, layout, model.cfg.d_vocab, seed
    )
    batch2, mask2 = padded(
        [r[a:] for r, (_, a) in zip(rows, layout, strict=True)], second[0], layout2, model.cfg.d_vocab, seed
    )
    hooks = [("blocks.*.mixer.hook_A_bar", lambda v, hook: None)] if materialised else []
    logits, state, sites = all_sites(model, batch, attention_mask=mask, fwd_hooks=hooks)
    logits2, state2, sites2 = all_sites(model, batch2, attention_mask=mask2, initial_state=state, fwd_hooks=hooks)
    for i, row in enumerate(rows):
        (left, a), (left2, b) = layout[i], layout2[i]
        here, there = slice(left, left + a), slice(left2, left2 + b)
        alone, state_alone, sites_alone = all_sites(model, row[None, :a])
        check_states(state.rows([i]), state_alone)
        assert relative(logits[i, here], alone[0]) < 1e-12
        for name, value in sites_alone.items():
            assert relative(sites[name][i, here], value[0]) < 1e-12, name
        whole, state_whole, sites_whole = all_sites(model, row[None])
        check_states(state2.rows([i]), state_whole)
        assert relative(logits2[i, there], whole[0, a:]) < 1e-12
        for name, value in sites_whole.items():
            assert relative(sites2[name][i, there], value[0, a:]) < 1e-12, name


@pytest.mark.parametrize("family", MAMBA)
def test_edits_in_a_padded_row_are_those_of_the_row_alone(family):
    """A hook that scales every position alike, at each site in turn: left padding gives nothing to scale."""
    model = model_of(family)
    row = tokens_for(model, 1, 5, seed=2)
    batch, mask = padded([row[0]], 8, [(3, 5)], model.cfg.d_vocab, 0)
    for name in model.hook_dict:
        if name != "hook_tokens":
            hooks = [(name, lambda v, hook: 1.3 * v)]
            alone = model.run_with_hooks(row, fwd_hooks=hooks)
            assert relative(model.run_with_hooks(batch, attention_mask=mask, fwd_hooks=hooks)[:, 3:], alone) < 1e-12, (
                name
            )
    for t in range(5):
        alone = model.run_with_hooks(row, fwd_hooks=[(f"blocks.0.mixer.hook_h.{t}", lambda h, hook: h + 1)])
        hooks = [(f"blocks.0.mixer.hook_h.{t + 3}", lambda h, hook: h + 1)]
        assert relative(model.run_with_hooks(batch, attention_mask=mask, fwd_hooks=hooks)[:, 3:], alone) < 1e-12, t


@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_padding_alone_keeps_its_state_to_the_bit(family, materialised):
    model = model_of(family, dtype=torch.float32)
    tokens = tokens_for(model, rows=2, length=6)
    _, state = model(tokens, return_state=True)
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    hooks = [("blocks.*.mixer.hook_Bx", lambda v, hook: None)] if materialised else []
    with model.hooks(fwd_hooks=hooks):
        _, after = model(tokens[:, :3], attention_mask=mask, initial_state=state, return_state=True)
    for mine, before in zip(after, state, strict=True):
        assert torch.equal(mine.ssm[0], before.ssm[0])
        assert torch.equal(mine.conv[0], before.conv[0])
        assert not torch.equal(mine.ssm[1], before.ssm[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_padded_rows(family):
    """Padding gets no gradient, and real positions the one they have alone; not even NaN in padding gets through."""
    model = model_of(family)
    resid = torch.randn(1, 4, model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    model(resid, start_at_layer=0)[:, -1].square().sum().backward()
    for left in (0, 2):
        wide = torch.full((1, 6, model.cfg.d_model), 3.0, dtype=torch.float64)
        wide[:, left : left + 4] = resid.detach()
        wide.requires_grad_()
        mask = torch.zeros(1, 6)
        mask[:, left : left + 4] = 1
        model(wide, start_at_layer=0, attention_mask=mask)[:, left + 3].square().sum().backward()
        assert relative(wide.grad[:, left : left + 4], resid.grad) < 1e-11
        assert wide.grad[mask == 0].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_padded_batch_is_the_mean_over_its_tokens(family):
    model = model_of(family)
    layout = [(3, 4), (0, 7), (1, 3)]
    rows = [tokens_for(model, 1, real, seed=real)[0] for _, real in layout]
    batch, mask = padded(rows, 7, layout, model.cfg.d_vocab, 0)
    each = [model(row, return_type="loss", loss_per_token=True)[0] for row in rows]
    loss = model(batch, return_type="loss", attention_mask=mask)
    assert relative(loss, torch.cat(each).mean()) < 1e-12
    per_token = model(batch, return_type="loss", loss_per_token=True, attention_mask=mask)
    assert per_token.shape == (3, 6)
    for (left, real), mine, alone in zip(layout, per_token, each, strict=True):
        assert relative(mine[left : left + real - 1], alone) < 1e-12
        assert mine[:left].abs().sum() == mine[left + real - 1 :].abs().sum() == 0


# Copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*MAMBA, "falcon"])
def test_saved_and_loaded(family, dtype, format, tmp_path):
    if (family, format) == ("falcon", "raw"):
        pytest.skip("mamba_ssm has no norms inside the mixer")
    model = build(family, d_vocab=16).to(dtype)
    tokens = tokens_for(model)
    model.save_pretrained(tmp_path / "model", format=format)
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=dtype)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.cfg.tie_embeddings == model.cfg.tie_embeddings
    assert (loaded.unembed.weight is loaded.embed.weight) == model.cfg.tie_embeddings
    assert list(loaded.hook_dict) == list(model.hook_dict)


@pytest.mark.parametrize("family", ["mamba", "falcon", "mamba2"])
def test_there_and_back_through_transformers(family):
    model = build(family)
    tokens = tokens_for(model)
    hf = model.to_hf()
    with torch.no_grad():
        assert relative(hf(tokens).logits, model(tokens)) < 1e-5
        assert torch.equal(type(model).from_hf(hf)(tokens), model(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy(family):
    model = build(family)
    tokens = tokens_for(model)
    plain = model(tokens)
    model.add_hook("blocks.0.mixer.hook_dt", lambda v, hook: v * 2)
    model.add_hook("blocks.0.mixer.hook_h.2", lambda v, hook: v * 2)
    hooked = model(tokens)
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens), hooked), "hooks come along"
    other.reset_hooks()
    assert torch.equal(other(tokens), plain)
    assert torch.equal(model(tokens), hooked), "the copy's hooks are its own"
    model.reset_hooks()
    other.add_hook("blocks.1.mixer.hook_h.1", lambda v, hook: v * 0)
    other.hook_dict["hook_embed"].ctx["x"] = 1
    assert not torch.equal(other(tokens), plain)
    assert torch.equal(model(tokens), plain)
    assert model.hook_dict["hook_embed"].ctx == {}
    with torch.no_grad():
        other.reset_hooks()
        other.embed.weight.add_(1)
    assert torch.equal(model(tokens), plain)
    assert (other.unembed.weight is other.embed.weight) == model.cfg.tie_embeddings
    assert [p.name for p in other.hook_points()] == [p.name for p in model.hook_points()]


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_round_trip(family):
    model, other = build(family, seed=1), build(family, seed=2)
    tokens = tokens_for(model)
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))


# Compilers and precisions ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled():
    """torch.compile gives the same values and gradients (it cannot trace the checker that runs in this process)."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hooked_mamba.compiled"], cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled models are equal" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close_to_float64(family):
    model = build(family)
    tokens = tokens_for(model, rows=2, length=40)
    assert relative(model(tokens), copy.deepcopy(model).double()(tokens)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float64(family):
    """Against the same rounded weights: what is left is the rounding of activations, 2^-9 each."""
    model = build(family).to(torch.bfloat16)
    tokens = tokens_for(model, rows=2, length=40)
    logits, state = model(tokens, return_state=True)
    exact, exact_state = copy.deepcopy(model).double()(tokens, return_state=True)
    assert logits.dtype == torch.float32
    assert relative(logits, exact) < 0.05
    for layer, exact_layer in zip(state, exact_state, strict=True):
        assert layer.ssm.dtype == torch.float32
        assert layer.conv.dtype == torch.bfloat16
        assert relative(layer.ssm, exact_layer.ssm) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_chunks_and_padding(family):
    """Nothing that is kept between calls loses digits: cut or padded, a bfloat16 model gives nearly the same."""
    model = build(family).to(torch.bfloat16)
    tokens = tokens_for(model, rows=1, length=12)
    whole = model(tokens)
    first, state = model(tokens[:, :5], return_state=True)
    second = model(tokens[:, 5:], initial_state=state)
    assert relative(torch.cat([first, second], 1), whole) < 0.02
    batch = torch.cat([tokens[:, :2], tokens], 1)
    mask = torch.tensor([[0, 0] + [1] * 12])
    assert relative(model(batch, attention_mask=mask)[:, 2:], whole) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_decays_and_steps_stay_float32(family, dtype):
    model = build(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.to(dtype)
    wide = ("A_log", "mixer.D", "dt_bias", "dt_proj.bias")
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(wide) else dtype), name
        if name.endswith(wide):
            assert torch.equal(p, before[name]), f"{name} was rounded on the way"
    assert sum(name.endswith(wide) for name in before) == 2 * 3
    assert all(p.dtype == torch.float64 for p in model.double().parameters())


def test_state_of_a_float64_model_is_float64():
    for family in FAMILIES:
        _, state = model_of(family)(tokens_for(model_of(family)), return_state=True)
        assert all(t.dtype == torch.float64 for layer in state for t in layer)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_residual_precision(residual_in_fp32):
    for family in MAMBA:
        model = build(family, residual_in_fp32=residual_in_fp32).to(torch.bfloat16)
        _, cache = model.run_with_cache(tokens_for(model))
        wide = torch.float32 if residual_in_fp32 else torch.bfloat16
        assert cache["resid_pre", 1].dtype == wide
        assert cache["resid_post", 1].dtype == wide


@few
@given(seeds, st.sampled_from([1, 2, 3, 64, 200]))
def test_chunk_size_changes_nothing(seed, chunk):
    cfg = Mamba2Config(d_model=6, n_layers=1, d_vocab=9, d_state=5, head_dim=4, chunk_size=chunk)
    other = build(cfg, seed).double()
    model = build(Mamba2Config(d_model=6, n_layers=1, d_vocab=9, d_state=5, head_dim=4), seed).double()
    tokens = tokens_for(model, length=1 + seed % 70, seed=seed)
    assert relative(other(tokens), model(tokens)) < 1e-12


def test_models_are_reproducible():
    for cls, family in ((HookedMamba, "mamba"), (HookedMamba2, "mamba2")):
        cfg = build(family).cfg
        first, second, other = cls(cfg, seed=3), cls(cfg, seed=3), cls(cfg, seed=4)
        tokens = tokens_for(first)
        assert torch.equal(first(tokens), second(tokens))
        assert not torch.equal(first(tokens), other(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_follow_the_weights_that_stay_float32(family):
    model = build(family)
    model(tokens_for(model), return_type="loss").backward()
    model.bfloat16()
    assert all(p.grad.dtype is p.dtype for p in model.parameters())
    torch.optim.AdamW(model.parameters()).step()
