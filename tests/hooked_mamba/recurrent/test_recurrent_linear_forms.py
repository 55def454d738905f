"""Linear forms of the delta rule and of Mamba-3: sums, hidden attention, parts, places against a replay that knows
nothing of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import Channel, Direction, FrozenModel, Logit, attribute, patch_effects
from circuits.push import Changes, Pushed
from hooked_mamba.analysis import direct_logit_attribution, knockout, source_logit_attribution
from hooked_mamba.analysis.memory_probes import receptive_field, write_survival
from hooked_mamba.frozen.run import Run
from tests.hooked_mamba import reference
from tests.hooked_mamba.analysis.test_knockout import generated
from tests.hooked_mamba.recurrent.held import held_edits, joined, value_site
from tests.hooked_mamba.recurrent.models import KINDS, LINEAR, bare, equations, everything, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-10
LENGTH = 7


def cases(model):
    """Keywords of runs: plain, from a memory, padded."""
    _, state = model(tokens_for(length=4, seed=8), return_state=True)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {"plain": {}, "state": {"initial_state": state}, "padded": {"attention_mask": mask}}


@pytest.mark.parametrize("case", ["plain", "state", "padded"])
@pytest.mark.parametrize("kind", LINEAR)
def test_a_branch_is_its_chain(kind, case):
    """Every value of the run, from the stream that entered; and pull is the transpose of push, constants apart."""
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    run = Run(model, tokens, **cases(model)[case])
    real = torch.ones(2, LENGTH, 1, dtype=torch.bool) if run.mask is None else run.mask.unsqueeze(-1)
    generator, rows = torch.Generator().manual_seed(0), torch.arange(2)
    for layer in range(2):
        for stage in run.stages(layer):
            for part in stage:
                chain, below = run.chain(part), run.entering(part)
                got = chain.apply(below)
                for name in ("p", "u"):
                    assert relative(got[name] * real, chain.values[name] * real) < EXACT
                out = run.out(layer, run.branch_of(part)[1])
                assert relative(got["out"] * real, out * real) < EXACT
                v, d = (torch.randn(below.shape, generator=generator, dtype=torch.float64) * real for _ in range(2))
                pulled = chain.pull(v, rows)
                assert torch.allclose((pulled.below * d).sum((1, 2)), (chain.push(d, rows)[0] * v).sum((1, 2)))
                constant = (v * (out - chain.push(below, rows)[0])).sum((1, 2))
                taken = sum((c * run.chain(0).u).sum((1, 2)) for c in pulled.carried.values())
                assert torch.allclose(pulled.bias + pulled.initial + taken, constant)


@pytest.mark.parametrize("case", ["plain", "state", "padded"])
@pytest.mark.parametrize("kind", LINEAR)
def test_parts_sum_to_targets(kind, case):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [Logit(3), Logit(4, minus=2, position=-2), Channel(1, 2, -2), Direction(direction, 1)]
    targets.append(Direction(direction, 1, stream="out"))
    found = attribute(model, (), tokens, targets, **cases(model)[case])
    assert float(found.residual.abs().max()) < EXACT
    heads = {0: torch.zeros(LENGTH, found.heads[0].shape[-1]), 1: torch.zeros(LENGTH, found.heads[1].shape[-1])}
    heads[0][2:4, ::2], heads[1][3:, 1] = 1, 1
    found = attribute(model, (), tokens, targets[:2], nodes=heads, **cases(model)[case])
    assert float(found.residual.abs().max()) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_places_are_those_of_a_held_replay(kind):
    """What each embedding and each channel adds, by the complex step through the equations with all else held."""
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    found = attribute(model, (), tokens, Logit(3, position=-1))
    held = held_edits(model, tokens)

    def derivative(name: str, direction: np.ndarray) -> float:
        moved = equations(model, tokens, joined(held, {name: lambda value: value + 1j * reference.STEP * direction}))
        return float(reference.derivative(moved.logits[0, -1, 3]))

    sites = equations(model, tokens).sites
    stream = sites["blocks.0.hook_resid_pre"]
    for s in range(LENGTH):
        only = np.zeros_like(stream)
        only[:, s] = stream[:, s]
        assert abs(derivative("blocks.0.hook_resid_pre", only) - float(found.embeddings[0, s])) < EXACT
    for layer in range(2):
        name = value_site(model, layer)
        value = sites[name]
        for s in (0, 3, LENGTH - 1):
            for e in range(value[0, 0].size):
                only = np.zeros_like(value).reshape(1, LENGTH, -1)
                only[0, s, e] = value.reshape(1, LENGTH, -1)[0, s, e]
                expected = derivative(name, only.reshape(value.shape))
                assert abs(expected - float(found.heads[layer][0, s, e])) < EXACT
    if kind == "rwkv7":
        value = sites["blocks.0.mixer.hook_v_first"]
        for s in range(LENGTH):
            only = np.zeros_like(value)
            only[:, s] = value[:, s]
            expected = derivative("blocks.0.mixer.hook_v_first", only)
            assert abs(expected - float(found.carried["v_first"][0, s])) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_hidden_attention_is_what_the_state_hands_on(kind):
    """alpha[t, s], with its sign: by the complex step through the equations, values alone moving."""
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    held = held_edits(model, tokens)
    for layer in range(2):
        alpha = cache.hidden_attention(layer)
        name, site = value_site(model, layer), f"blocks.{layer}.mixer.{model.mixer(layer).site_at('y')}"
        shape = equations(model, tokens).sites[name].shape
        for s in range(LENGTH):
            step = np.zeros(shape)
            step[:, s] = 1
            moved = equations(model, tokens, joined(held, {name: lambda v, d=step: v + 1j * reference.STEP * d}))
            response = reference.derivative(moved.sites[site]).reshape(2, LENGTH, alpha.shape[1], -1)
            assert np.abs(response - response[..., :1]).max() < EXACT, "all values of a lane move alike"
            assert relative(alpha[:, :, :, s], response[..., 0].transpose(0, 2, 1)) < EXACT
        assert bool((alpha < 0).any())
        assert bool((alpha > 0).any())
        some = cache.hidden_attention(layer, channels=[1, 0], queries=[5, 2])
        assert torch.equal(some, alpha[:, [1, 0]][:, :, [5, 2]])
        mean = cache.hidden_attention(layer, average=True)
        assert torch.allclose(mean, alpha.mean(1))


@pytest.mark.parametrize("source", ["scan", "token"])
@pytest.mark.parametrize("kind", LINEAR)
def test_sources_sum_to_the_mixers_output(kind, source):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    for layer in range(2):
        stack, labels = cache.stack_source_results(layer, source, return_labels=True)
        assert labels[-1] == "bias"
        assert relative(stack.sum(0), cache["out_proj", layer]) < EXACT
        few = cache.stack_source_results(layer, source, pos_slice=[5, 1])
        assert torch.allclose(few, stack[:, :, [5, 1]])


@pytest.mark.parametrize("kind", LINEAR)
def test_each_source_is_what_a_held_replay_says(kind):
    """By source "scan": the mixer's output with one value alone; by "token", in layer 0, with one token's stream."""
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    held = held_edits(model, tokens)
    sites = equations(model, tokens).sites
    places = [("scan", value_site(model, i), i) for i in range(2)] + [
        # A bias of the projection is the token's own.
        ("token", value_site(model, 0) if kind == "mamba3" else "blocks.0.norm.hook_out", 0)
    ]
    for source, name, layer in places:
        stack = cache.stack_source_results(layer, source)
        value = sites[name]
        for s in range(LENGTH):
            only = np.zeros_like(value)
            only[:, s] = value[:, s]
            moved = equations(model, tokens, joined(held, {name: lambda v, d=only: v + 1j * reference.STEP * d}))
            expected = reference.derivative(moved.sites[f"blocks.{layer}.mixer.hook_out_proj"])
            assert relative(stack[s], expected) < EXACT, (source, s)


@pytest.mark.parametrize("kind", LINEAR)
def test_states_are_those_of_the_equations(kind):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    sites = equations(model, tokens).sites
    for layer in range(2):
        expected = sites[f"blocks.{layer}.mixer.hook_h"]
        assert relative(cache.compute_ssm_state(layer), expected) < EXACT
        assert relative(cache.compute_ssm_state(layer, [4, 1]), expected[:, [4, 1]]) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_channels_heads_and_layers_sum(kind):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    logits, cache = model.run_with_cache(tokens)
    final = cache["resid_post", 1]
    for stack_units in (cache.stack_channel_results, cache.stack_head_results):
        units, labels = stack_units(return_labels=True)
        for layer in range(2):
            mine = [i for i, label in enumerate(labels) if label.startswith(f"L{layer}")]
            bias = model.mixer(layer).value_output().b
            assert relative(units[mine].sum(0) + (0 if bias is None else bias), cache["out_proj", layer]) < EXACT
        assert relative(stack_units(incl_remainder=True).sum(0), final) < EXACT
    assert relative(cache.decompose_resid().sum(0), final) < EXACT
    found = direct_logit_attribution(cache, 3)
    assert relative(found.values.sum(0), logits[:, -1, 3]) < EXACT
    found = direct_logit_attribution(cache, torch.tensor([3, 5]), torch.tensor([1, 2]))
    assert relative(found.values.sum(0), logits[[0, 1], -1, [3, 5]] - logits[[0, 1], -1, [1, 2]]) < EXACT
    by_layer = direct_logit_attribution(cache, 3)
    rows = source_logit_attribution(cache, 3, source="scan")
    mixers = [i for i, label in enumerate(by_layer.labels) if label.endswith("mixer_out")]
    assert relative(rows.sum(1), by_layer.values[mixers]) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_the_local_part_is_what_the_own_input_gives(kind):
    """By the complex step through the equations, as long as nothing else of the position reads it."""
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    held, sites = held_edits(model, tokens), equations(model, tokens).sites
    own = model.mixer(0).own_part(cache.reader(0))
    for s in range(LENGTH):
        only = np.zeros_like(sites["blocks.0.norm.hook_out"])
        only[:, s] = sites["blocks.0.norm.hook_out"][:, s]
        step = {"blocks.0.norm.hook_out": lambda v, d=only: v + 1j * reference.STEP * d}
        moved = equations(model, tokens, joined(held, step)).sites["blocks.0.mixer.hook_out_proj"]
        assert relative(own[:, s], reference.derivative(moved)[:, s]) < EXACT


@pytest.mark.parametrize(("kind", "cut"), [(kind, "read") for kind in KINDS] + [("rwkv7", "write")])
def test_a_source_knocked_out_is_a_value_that_was_never_there(kind, cut):
    """Against the equations with v at the source 0 in the state: with selection as it is, in one layer."""
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    s, t = 2, 5
    targets = None if cut == "write" else [t]
    with knockout(model, [s], targets, layers=[0], source="scan", cut=cut):
        _, cache = everything(model, tokens)
    name = "blocks.0.mixer."
    sites = equations(model, tokens).sites
    alpha = model.run_with_cache(tokens)[1].hidden_attention(0)
    lost = np.einsum("bhq,bhv->bqhv", alpha[:, :, :, s].numpy(), sites[f"{name}hook_v"][:, s])
    later = np.zeros((1, LENGTH, 1, 1))
    later[:, s if cut == "write" else t : None if cut == "write" else t + 1] = 1
    assert relative(cache[f"{name}hook_y_scan"], sites[f"{name}hook_y_scan"] - later * lost) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_what_is_left_of_a_write(kind):
    """The length of k_s M ... M, from states that differ by the write alone; of Mamba-3's, as a part of both halves."""
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    _, cache = model.run_with_cache(tokens)
    held, sites = held_edits(model, tokens), equations(model, tokens).sites
    name, at, s = value_site(model, 1), "blocks.1.mixer.", 2
    left = write_survival(cache, 1, s)
    step = np.zeros_like(sites[name])
    step[:, s] = 1
    moved = equations(model, tokens, joined(held, {name: lambda v: v + 1j * reference.STEP * step}))
    length = np.linalg.norm(reference.derivative(moved.sites[f"{at}hook_h"]), axis=(-2, -1))
    whole = length[:, s]
    if "mamba3" in kind:  # the second half comes at s + 1, decayed there
        whole = length[:, s + 1] / sites[f"{at}hook_A_bar"][:, s + 1]
    expected = length[:, s:] / whole[:, None]
    lanes = left.shape[2] // expected.shape[2]
    assert relative(left[:, s:], np.repeat(expected, lanes, 2)) < EXACT
    assert float(left[:, :s].abs().max()) == 0
    field = receptive_field(cache, 1)
    assert bool((field.mean_distance >= 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mamba3", "mamba3-mimo"])
def test_what_is_cut_stays_cut_while_generating(kind, side):
    """The last token's write has its second half in the next call: padded rows generate as each does alone, in one
    pass."""
    model, tokens = bare(kind), tokens_for(length=6)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    ends = [5, int(mask[1].nonzero().max())]
    sources = torch.zeros(2, 6, dtype=torch.bool)
    sources[[0, 1], ends] = True
    made, logits = generated(model, tokens, [{"sources": sources, "source": "scan"}], mask)
    for row in range(2):
        real = torch.cat([mask[row].bool(), torch.ones(4, dtype=torch.bool)])
        last = int(mask[row].sum()) - 1
        with knockout(model, last, source="scan"):
            whole = model(made[row : row + 1, :-1][:, real])
        assert relative(logits[row, real], whole[0]) < EXACT
        assert relative(whole, model(made[row : row + 1, :-1][:, real])) > 1e-3


def test_a_write_of_gated_deltanet_is_cut_at_its_value():
    model, tokens = bare("deltanet"), tokens_for(length=LENGTH)
    with pytest.raises(ValueError, match="no site for 'write'"), knockout(model, [2], layers=[0], cut="write"):
        model(tokens)


def test_tokens_cannot_be_knocked_out_of_two_taps():
    model, tokens = bare("rwkv7"), tokens_for(length=LENGTH)
    with pytest.raises(ValueError, match="source='scan'"), knockout(model, [2], [5], layers=[0]):
        model(tokens)


# Through whole models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LINEAR)
def test_pushed_forwards_is_pulled_back(kind):
    """Each embedding taken away from the frozen model changes a logit by minus what it is said to add."""
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    frozen, target = FrozenModel(model, tokens), Logit(3)
    found = attribute(frozen, targets=target)
    stream = frozen.resid(0)
    taken = torch.zeros(LENGTH, *stream.shape[1:], dtype=torch.float64)
    for s in range(LENGTH):
        taken[s, s] = -stream[0, s]
    pushed = Pushed(frozen, Changes(torch.zeros(LENGTH, dtype=torch.long), streams={0: taken}))
    assert relative(pushed.read(target.covector(frozen, 0)), -found.embeddings[0]) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_selection_gradient_is_the_gradient(kind):
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    found = attribute(FrozenModel(model, tokens, selection="gradient"), targets=Logit(3))
    stream = model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")[1]["blocks.0.hook_resid_pre"]
    for s in range(LENGTH):
        only = np.zeros_like(stream.numpy())
        only[:, s] = stream[:, s]
        moved = equations(model, tokens, {"blocks.0.hook_resid_pre": lambda v, d=only: v + 1j * reference.STEP * d})
        expected = float(reference.derivative(moved.logits[0, -1, 3]))
        assert abs(expected - float(found.embeddings[0, s])) < EXACT


@pytest.mark.parametrize("kind", LINEAR)
def test_value_selection_and_gate_sum_to_a_patch(kind):
    model, tokens = bare(kind), tokens_for(rows=1, length=LENGTH)
    found = patch_effects(FrozenModel(model, tokens), target=Logit(3), replace_by=5, positions=[1, 4])
    for i, s in enumerate((1, 4)):
        other = tokens.clone()
        other[0, s] = 5
        true = equations(model, tokens).logits[0, -1, 3] - equations(model, other).logits[0, -1, 3]
        for split in (found.forward, found.reverse):
            assert abs(float(split.total[i]) - true) < EXACT
            assert float(split.selection[i].abs()) > 1e-6


@pytest.mark.parametrize("rule", ["half", "shares"])
def test_rules_that_mean_nothing_here(rule):
    model, tokens = bare("rwkv7"), tokens_for(rows=1, length=LENGTH)
    with pytest.raises(ValueError, match=r"not defined for .*RWKV-7"):
        attribute(FrozenModel(model, tokens, selection=rule), targets=Logit(3))
