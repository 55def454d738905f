"""The interface that TransformerLens users know: running with hooks and caches, contexts, types of results."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_mamba import ActivationCache, HookPoint
from hooked_mamba.hooks.names import get_act_name
from tests.hooked_mamba.tiny import FAMILIES, build, relative, tokens_for
from tests.kinds import MAMBA

DT = "blocks.0.mixer.hook_dt"
DTS = ["blocks.0.mixer.hook_dt", "blocks.1.mixer.hook_dt"]


@pytest.fixture(params=MAMBA)
def model(request):
    return build(request.param).double()


def nothing_left(model) -> bool:
    return not any(point.wanted for point in model.hook_points())


@pytest.mark.usefixtures("every_call_checked")
@pytest.mark.parametrize("family", FAMILIES)
def test_annotations_hold_on_every_path(family):
    """With the annotation checker on: fused and materialised, padded, cut at states, with gradients, in bfloat16."""
    model = build(family)
    tokens = tokens_for(model, rows=2, length=5)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    for hooks in (
        [],
        [("blocks.*.mixer.hook_Bx", lambda v, hook: v)],
        [("blocks.*.mixer.hook_h.2", lambda v, hook: v)],
    ):
        _, state = model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask, return_state=True)
        model.run_with_hooks(tokens, fwd_hooks=hooks, initial_state=state, return_type="loss").backward()
    model.run_with_cache(tokens, names_filter=lambda name: True, return_type="loss", incl_bwd=True)
    half = model.to(torch.bfloat16)
    half.run_with_cache(tokens, names_filter=lambda name: True, attention_mask=mask)
    half.generate(tokens, max_new_tokens=2, attention_mask=mask, verbose=False)
    half.run_with_cache(tokens, names_filter=["blocks.0.mixer.hook_h"], pos_slice=[1, 3])


# run_with_cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names_filter",
    [
        "blocks.*.mixer.hook_dt",
        DTS,
        [DT, "blocks.1.mixer.hook_d?"],
        "blocks.[01].mixer.hook_dt",
        lambda name: name.endswith("hook_dt"),
        ("blocks.1.mixer.hook_dt", "blocks.0.mixer.hook_dt"),
    ],
)
def test_names_filters(model, tokens, names_filter):
    logits, cache = model.run_with_cache(tokens, names_filter=names_filter)
    assert isinstance(cache, ActivationCache)
    assert list(cache) == DTS  # in computing order, whatever the filter's
    assert torch.equal(logits, model(tokens))
    assert nothing_left(model)


def test_filter_of_one_state(model, tokens):
    names = ["blocks.0.mixer.hook_h.2", "blocks.1.mixer.hook_h.-1", "blocks.1.mixer.hook_h"]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    assert set(cache) == set(names)
    assert torch.equal(cache["h", 1][:, -1], cache["h.-1", 1])
    assert cache["h.2", 0].shape == cache["h", 1][:, 0].shape
    assert "blocks.0.mixer.hook_h.2" not in model.hook_dict


@pytest.mark.parametrize("pos", [0, 3, -1, slice(1, 4), slice(-2, None), slice(None, None, 2), [0, 2], [-1, 0], (1, 3)])
def test_pos_slice(model, tokens, pos):
    full = model.run_with_cache(tokens, names_filter=lambda name: True)[1]
    names = [*full, "blocks.0.mixer.hook_h.2"]
    _, cache = model.run_with_cache(tokens, names_filter=names, pos_slice=pos)
    index = slice(*pos) if isinstance(pos, tuple) else pos
    for name, value in full.items():
        assert relative(cache[name], value[:, index]) < 1e-12, name
    assert relative(cache["h.2", 0], full["h", 0][:, 2]) < 1e-12, "a single state has no positions to choose from"
    _, by_tensor = model.run_with_cache(tokens, names_filter=DTS, pos_slice=torch.tensor([0, 2]))
    assert torch.equal(by_tensor["dt", 0], full["dt", 0][:, [0, 2]])


def test_pos_slice_keeps_only_what_was_asked_for(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_h", pos_slice=[1])
    assert cache["h", 0].untyped_storage().nbytes() == cache["h", 0].nbytes
    _, cache = model.run_with_cache(tokens, names_filter="hook_logits", pos_slice=-1)
    assert cache["hook_logits"].untyped_storage().nbytes() == cache["hook_logits"].nbytes


def test_device_and_kind_of_cache(model, tokens):
    _, cache = model.run_with_cache(tokens, device="cpu", return_cache_object=False)
    assert type(cache) is dict
    _, meta = model.run_with_cache(tokens, names_filter=DT, device="meta")
    assert meta[DT].device.type == "meta"
    assert all(not value.requires_grad for value in cache.values())


def test_rows_of_a_cache(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=["*hook_dt", "blocks.0.mixer.hook_h.2"])
    one = cache.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim
    assert torch.equal(one["dt", 1], cache["dt", 1][1])
    assert torch.equal(one["h.2", 0], cache["h.2", 0][1])
    for chosen in (slice(1, 2), [1], torch.tensor([1]), (1, 2)):
        part = cache.apply_slice_to_batch_dim(chosen)
        assert part.has_batch_dim
        assert torch.equal(part["dt", 0], cache["dt", 0][1:2])
    assert torch.equal(cache.apply_slice_to_batch_dim(None)["dt", 0], cache["dt", 0])
    assert torch.equal(cache.apply_slice_to_batch_dim([-1, 0])["dt", 0], cache["dt", 0].flip(0))
    with pytest.raises(IndexError, match=r"batch_slice: row 2 .* 2 rows"):
        cache.apply_slice_to_batch_dim([2])
    with pytest.raises(IndexError, match="row -3"):
        cache.apply_slice_to_batch_dim(-3)
    with pytest.raises(ValueError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    assert set(one.apply_slice_to_batch_dim(None)) == set(cache)


def test_toggle_autodiff(model, tokens):
    _, cache = model.run_with_cache(tokens)
    before = torch.is_grad_enabled()
    try:
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(True)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(before)


def test_labels_are_those_of_the_stacks(model, tokens):
    _, cache = model.run_with_cache(tokens)
    assert cache.stack_channel_results(return_labels=True)[1] == model.all_channel_labels
    if hasattr(model, "all_head_labels"):
        assert cache.stack_head_results(return_labels=True)[1] == model.all_head_labels
    else:
        assert model.family == "mamba"


def test_remove_batch_dim(model, tokens):
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    _, full = model.run_with_cache(tokens[:1])
    assert not cache.has_batch_dim
    assert all(torch.equal(cache[name], full[name][0]) for name in full)
    assert torch.equal(full.remove_batch_dim()["dt", 1], cache["dt", 1])


def test_incl_bwd(model, tokens):
    loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=[*DTS, "hook_tokens"])
    assert loss.ndim == 0
    assert list(cache) == ["hook_tokens", *DTS, *(f"{name}_grad" for name in DTS)]
    assert cache["dt_grad", 0].shape == cache["dt", 0].shape
    assert model.embed.weight.grad is not None
    _, sliced = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=DTS, pos_slice=2)
    assert relative(sliced["dt_grad", 0], cache["dt_grad", 0][:, 2]) < 1e-12
    assert nothing_left(model)


def test_incl_bwd_with_hooks_that_stay(model, tokens):
    seen = []
    model.run_with_cache(
        tokens,
        return_type="loss",
        incl_bwd=True,
        names_filter=DTS,
        reset_hooks_end=False,
        fwd_hooks=[(DT, lambda v, hook: seen.append(hook.name))],
    )
    point = model.hook_dict[DT]
    assert (len(point.fwd_hooks), len(point.bwd_hooks), len(point.readers)) == (1, 0, 0)
    model(tokens)
    assert seen == [DT, DT]
    model.reset_hooks()
    assert nothing_left(model)


def test_cached_values_are_what_hooks_made(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=[DT], fwd_hooks=[(DT, lambda v, hook: v * 0 + 2)])
    assert (cache["dt", 0] == 2).all()
    model.add_hook(DT, lambda v, hook: v * 0 + 3)
    _, cache = model.run_with_cache(tokens, names_filter=[DT])
    assert (cache["dt", 0] == 3).all()


def test_stop_at_layer_caches_what_was_reached(model, tokens):
    resid, cache = model.run_with_cache(tokens, stop_at_layer=1)
    assert all(not name.startswith(("blocks.1", "ln_final", "hook_logits")) for name in cache)
    assert torch.equal(resid, cache["resid_post", 0])
    _, full = model.run_with_cache(tokens)
    assert set(full) - set(cache) == {n for n in full if n.startswith(("blocks.1", "ln_final", "hook_logits"))}


def test_a_cache_leaves_nothing_behind_after_an_error(model, tokens):
    def broken(v: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run_with_cache(tokens, fwd_hooks=[(DT, broken)])
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_h.2", broken), (DT, broken)])
    assert nothing_left(model)
    assert model.context_level == 0


@pytest.mark.parametrize("with_edit", [False, True])
def test_no_positions(model, tokens, with_edit):
    hooks = [("blocks.0.mixer.hook_h.1", lambda h, hook: h * 2)] if with_edit else []
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.*", pos_slice=slice(6, None), fwd_hooks=hooks)
    assert "blocks.0.mixer.hook_h" in cache
    assert {value.shape[1] for value in cache.values()} == {0}


def test_positions_as_numpy_gives_them(model, tokens):
    _, whole = model.run_with_cache(tokens, names_filter=DT)
    for position in (np.int64(2), np.array([0, 3]), np.arange(2)):
        _, cache = model.run_with_cache(tokens, names_filter=DT, pos_slice=position)
        assert torch.equal(cache[DT], whole[DT][:, position])


def test_aliases_in_globs(model, tokens):
    _, cache = model.run_with_cache(
        tokens, names_filter=["blocks.*.hook_delta", "blocks.*.hook_ssm_out", "blocks.*.hook_h.2"]
    )
    sites = ("hook_dt", "hook_out_proj", "hook_h.2")
    assert set(cache) == {f"blocks.{i}.mixer.{site}" for i in range(model.cfg.n_layers) for site in sites}


# Keys --------------------------------------------------------------------------------------------------------


def test_keys(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    same = {
        "hook_embed": ["embed", "hook_embed"],
        "blocks.1.hook_resid_pre": [("resid_pre", 1), ("resid_pre", -1), "resid_pre1"],
        "blocks.0.mixer.hook_h": [("h", 0), ("h", -2), "h0", ("hook_h", 0)],
        "blocks.1.mixer.hook_A_bar": [("A_bar", 1)],
        "blocks.0.norm.hook_scale": [("scale", 0)],
        "ln_final.hook_scale": ["scale"],
        "ln_final.hook_normalized": ["normalized"],
        "blocks.0.mixer.hook_out_proj": [("out_proj", 0), ("ssm_out", 0), "blocks.0.hook_ssm_out"],
        "blocks.1.mixer.hook_dt": [("delta", 1), "blocks.1.hook_delta"],
        "hook_logits": ["logits"],
    }
    for full, keys in same.items():
        for key in [full, *keys]:
            assert cache[key] is cache.cache_dict[full], key
            assert key in cache
    assert "dt" not in cache
    assert ("nothing", 0) not in cache
    assert 3 not in cache
    assert len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.items()) == len(model.hook_dict)
    stacked = cache.stack_activation("dt")
    assert torch.equal(stacked, torch.stack([cache["dt", 0], cache["dt", 1]]))
    assert cache.stack_activation("dt", layer=1).shape[0] == 1
    assert cache.to(torch.device("cpu")) is cache
    assert cache.nbytes() > 0
    assert "sites" in repr(cache)


def test_key_of_the_gated_norm():
    model = build("mamba2")
    _, cache = model.run_with_cache(tokens_for(model))
    assert cache["scale", 1, "mixer.norm"] is cache["blocks.1.mixer.norm.hook_scale"]
    assert cache["scale", 1] is cache["blocks.1.norm.hook_scale"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("dt", 3), "blocks.3.mixer.hook_dt"),
        (("resid_post", 0), "blocks.0.hook_resid_post"),
        (("h.4", 1), "blocks.1.mixer.hook_h.4"),
        (("h.-1", 1), "blocks.1.mixer.hook_h.-1"),
        (("B_bar7",), "blocks.7.mixer.hook_B_bar"),
        (("embed",), "hook_embed"),
        (("out", 2), "blocks.2.norm.hook_out"),
        (("out", 2, "mixer.norm"), "blocks.2.mixer.norm.hook_out"),
        (("hook_embed",), "hook_embed"),
        (("blocks.2.mixer.hook_B",), "blocks.2.mixer.hook_B"),
        (("skip", 0), "blocks.0.mixer.hook_skip"),
    ],
)
def test_get_act_name(arguments, name):
    assert get_act_name(*arguments) == name


def test_aliases_work_as_hook_names(model, tokens):
    names = {"blocks.0.hook_ssm_out": "blocks.0.mixer.hook_out_proj", "blocks.1.hook_delta": "blocks.1.mixer.hook_dt"}
    for alias, name in names.items():
        double = lambda v, hook: v * 2  # noqa: E731
        by_alias = model.run_with_hooks(tokens, fwd_hooks=[(alias, double)])
        assert torch.equal(by_alias, model.run_with_hooks(tokens, fwd_hooks=[(name, double)]))


# Hooks -------------------------------------------------------------------------------------------------------


def test_hooks_run_in_the_order_added_and_prepend_comes_first(model, tokens):
    order = []

    def note(what: str):
        return lambda v, hook: order.append(what)

    model.add_hook(DT, note("first"))
    model.add_hook(DT, note("second"))
    model.add_hook(DT, note("zeroth"), prepend=True)
    model.run_with_hooks(tokens, fwd_hooks=[(DT, note("third")), (DT, note("fourth"))])
    assert order == ["zeroth", "first", "second", "third", "fourth"]
    values = [(DT, lambda v, hook: v * 0 + 1), (DT, lambda v, hook: v + 1), (DT, lambda v, hook: v * 5)]
    model.reset_hooks()
    _, cache = model.run_with_cache(tokens, names_filter=DT, fwd_hooks=values)
    assert (cache[DT] == 10).all()


def test_functions_of_all_kinds(model, tokens):
    def named_otherwise(value, point):
        return value * 2

    def keyword_only(value, *, hook):
        assert hook.name == DT
        return value * 2

    def with_rest(value, **rest):
        assert rest["hook"].name == DT
        return value * 2

    def by_place(value, *rest):
        assert rest[0].name == DT
        return value * 2

    def with_more(value, hook, factor=1):
        return value * factor

    class Doubler:
        def __call__(self, value, hook):
            return value * 2

        def method(self, value, hook):
            return value * 2

    def in_place(value, hook):
        value *= 2

    def part_in_place(value, hook):
        value[:, 1:] *= 2
        value[:, :1] *= 2
        return value

    expected = model.run_with_hooks(tokens, fwd_hooks=[(DT, lambda value, hook: value * 2)])
    functions = [named_otherwise, keyword_only, with_rest, by_place, partial(with_more, factor=2), Doubler()]
    functions += [Doubler().method, in_place, part_in_place, lambda v, hook=None: v * 2]
    for fn in functions:
        assert relative(model.run_with_hooks(tokens, fwd_hooks=[(DT, fn)]), expected.detach().numpy()) < 1e-12, fn


def test_edits_in_place_reach_no_other_site(model, tokens):
    """The parts of in_proj share its memory: overwriting one must change neither the others nor what was cached."""

    def overwrite(value, hook):
        value[:] = 7

    _, plain = model.run_with_cache(tokens)
    names = ["blocks.0.mixer.hook_x_pre", "blocks.0.mixer.hook_z", "blocks.0.hook_resid_pre", "blocks.0.mixer.hook_B"]
    for name in names:
        _, cache = model.run_with_cache(tokens, fwd_hooks=[(name, overwrite)])
        assert (cache[name] == 7).all()
        for other in list(plain)[: list(plain).index(name)]:
            assert torch.equal(cache[other], plain[other]), other
    _, cache = model.run_with_cache(tokens, fwd_hooks=[("blocks.0.mixer.hook_x_pre", overwrite)])
    assert torch.equal(cache["mixer.z", 0], plain["mixer.z", 0])


def test_a_hook_on_many_sites(model, tokens):
    seen = []
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: "norm" in name, lambda v, hook: seen.append(hook.name))])
    assert seen == [name for name in model.hook_dict if "norm" in name]
    seen.clear()
    model.run_with_hooks(tokens, fwd_hooks=[(["hook_embed", "blocks.*.mixer.hook_B"], lambda v, hook: seen.append(1))])
    assert len(seen) == 3


def test_hooks_fire_once_a_call_on_its_positions(model, tokens):
    shapes = []
    with model.hooks(fwd_hooks=[(DT, lambda v, hook: shapes.append(v.shape[1]))]):
        _, state = model(tokens, return_state=True)
        model(tokens[:, :1], initial_state=state)
    assert shapes == [6, 1]


def test_nested_contexts(model, tokens):
    calls: list[str] = []

    def note(what: str):
        return lambda v, hook: calls.append(what)

    model.add_hook(DT, note("added"))
    model.add_perma_hook(DT, note("permanent"))
    with model.hooks(fwd_hooks=[(DT, note("outer"))]) as same:
        assert same is model
        with model.hooks(fwd_hooks=[(DT, note("inner"))]):
            model(tokens)
        assert calls == ["added", "permanent", "outer", "inner"]
        calls.clear()
        with pytest.raises(KeyError), model.hooks(fwd_hooks=[(DT, note("never")), ("blocks.9.hook_x", note("never"))]):
            pass
        model(tokens)
        assert calls == ["added", "permanent", "outer"]
    calls.clear()
    model(tokens)
    assert calls == ["added", "permanent"]
    calls.clear()
    model.reset_hooks()
    model(tokens)
    assert calls == ["permanent"]
    model.reset_hooks(including_permanent=True)
    assert nothing_left(model)


def test_contexts_take_away_only_their_own(model, tokens):
    calls = []
    with model.hooks(fwd_hooks=[(DT, lambda v, hook: calls.append("context"))]):
        model.add_hook(DT, lambda v, hook: calls.append("added inside"))
    model(tokens)
    assert calls == ["added inside"]
    model.reset_hooks()
    with model.hooks(fwd_hooks=[(DT, lambda v, hook: calls.append("context"))]):
        model.reset_hooks()
    assert nothing_left(model)


def test_the_same_function_twice(model, tokens):
    calls = []

    def fn(v, hook):
        calls.append(1)

    model.add_hook(DT, fn)
    model.run_with_hooks(tokens, fwd_hooks=[(DT, fn), (DT, fn)])
    assert len(calls) == 3
    model(tokens)
    assert len(calls) == 4


def test_reset_hooks_end_false(model, tokens):
    calls = []
    model.run_with_hooks(tokens, fwd_hooks=[(DT, lambda v, hook: calls.append(1))], reset_hooks_end=False)
    model(tokens)
    assert len(calls) == 2
    model.reset_hooks()
    model(tokens)
    assert len(calls) == 2


def test_levels_and_directions(model):
    point = model.hook_dict[DT]

    def fn(v, hook):
        return None

    model.add_hook(DT, fn, level=1)
    model.add_hook(DT, fn, level=2)
    model.add_hook(DT, fn, dir="bwd")
    model.reset_hooks(level=1)
    assert [h.level for h in point.fwd_hooks] == [2]
    model.reset_hooks(direction="fwd")
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (0, 1)
    model.reset_hooks(direction="bwd")
    assert nothing_left(model)
    point.add_perma_hook(fn)
    point.add_hook(fn)
    point.remove_hooks()
    assert [h.is_permanent for h in point.fwd_hooks] == [True]
    point.remove_hooks("both", including_permanent=True)
    assert nothing_left(model)


def test_context_of_a_hook(model, tokens):
    def count(v, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    state_point = "blocks.1.mixer.hook_h.3"
    model.run_with_hooks(tokens, fwd_hooks=[(DT, count), (state_point, count)])
    model.run_with_hooks(tokens, fwd_hooks=[(DT, count), (state_point, count)])
    assert model.hook_dict[DT].ctx == {"calls": 2}
    assert model.hook_point(state_point).ctx == {"calls": 2}
    model.run_with_hooks(tokens, fwd_hooks=[(DT, count)], clear_contexts=True)
    assert model.hook_dict[DT].ctx == model.hook_point(state_point).ctx == {}
    model.run_with_hooks(tokens, fwd_hooks=[(DT, count)])
    model.reset_hooks(clear_contexts=False)
    assert model.hook_dict[DT].ctx == {"calls": 1}
    model.reset_hooks()
    assert model.hook_dict[DT].ctx == {}
    assert [model.hook_dict[name].layer() for name in DTS] == [0, 1]


def test_a_kept_hook_point_of_a_single_state_stays_alive(model, tokens):
    """Someone who holds the point of a state and resets the model can still put a hook on it."""
    point = model.hook_point("blocks.0.mixer.hook_h.2")
    model.reset_hooks()
    calls = []
    point.add_hook(lambda v, hook: calls.append(hook.name))
    model(tokens)
    assert calls == ["blocks.0.mixer.hook_h.2"]


def test_backward_hooks(model, tokens):
    order = []

    def note(what: str, factor: float | None):
        def fn(grad, hook):
            order.append((what, hook.name))
            return None if factor is None else (grad * factor,)  # a tuple of one, as TransformerLens takes it

        return fn

    plain = model.run_with_cache(tokens, names_filter=DT, return_type="loss", incl_bwd=True)[1]["dt_grad", 0]
    model.zero_grad()
    with model.hooks(bwd_hooks=[(DT, note("a", 2.0)), (DT, note("b", 3.0)), (DTS[1], note("c", None))]):
        loss = model(tokens, return_type="loss")
    loss.backward()  # they belong to the pass that saw them, and fire though the context is over
    assert order == [("c", DTS[1]), ("a", DT), ("b", DT)]
    hooks = [(DT, note("a", 2.0)), (DT, note("b", 3.0))]
    _, cache = model.run_with_cache(tokens, names_filter=DT, return_type="loss", incl_bwd=True, bwd_hooks=hooks)
    assert relative(cache["dt_grad", 0], 6 * plain.numpy()) < 1e-12


def test_backward_hooks_of_a_frozen_model(model, tokens):
    model.requires_grad_(False)
    seen = {}
    hooks = [(DTS[1], lambda g, hook: seen.update({hook.name: g}))]
    model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks).backward()
    assert seen[DTS[1]].abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
