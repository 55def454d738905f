"""The list of kinds that tests run on is whole: who declares a kind gives it a tiny config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hooked_mamba.models import MODELS
from tests.hooked_mamba.tiny import TINY, build, relative, tokens_for
from tests.kinds import DECLARED, MAMBA, MIXERS

TESTS = Path(__file__).parents[1]


def test_every_kind_has_a_tiny_config():
    missing = [kind for kind in MIXERS if kind not in TINY]
    assert not missing, f"give these a tiny config in tests/hooked_mamba/tiny.py: {missing}"
    assert set(MAMBA) <= set(MIXERS)


def test_every_branch_and_model_stands_in_a_tiny_one():
    models = [build(kind) for kind in MIXERS]
    branches = {branch.kind for model in models for i in range(2) for branch in model.block(i).branches.values()}
    assert set(DECLARED) <= branches, f"in no tiny model: {sorted(set(DECLARED) - branches)}"
    families = {family for family, cls in MODELS.items() if cls.__module__.startswith("hooked_mamba.")}
    assert families <= {model.family for model in models}
    for kind, model in zip(MIXERS, models, strict=True):
        assert model.block(0).branches["mixer"].kind == model.block(1).branches["mixer"].kind == kind


def test_no_test_lists_the_kinds_by_itself():
    pair = ", ".join(f'"{kind}"' for kind in MAMBA)
    found = [path.name for path in sorted(TESTS.rglob("*.py")) if pair in path.read_text(encoding="utf-8")]
    assert found == ["kinds.py"], "use the lists of tests/kinds.py"


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_what_is_declared_is_what_is_cached(kind):
    model = build(kind).double()
    tokens = tokens_for(model, rows=2, length=6)
    logits, cache = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
    assert list(cache) == list(model.hook_dict)
    for name, value in cache.items():
        assert tuple(value.shape) == model.site(name).shape(2, 6), name
        assert model.site(name).row.text, name
    assert relative(logits, model(tokens)) < 1e-12


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_chunks_and_padding_equal_one_pass(kind):
    model = build(kind).double()
    tokens = tokens_for(model, rows=2, length=6)
    whole = model(tokens)
    first, state = model(tokens[:, :2], return_state=True)
    second, state = model(tokens[:, 2:3], initial_state=state, return_state=True)
    rest = model(tokens[:, 3:], initial_state=state)
    assert relative(torch.cat([first, second, rest], 1), whole) < 1e-12
    for columns in (slice(0, 6), slice(3, 9), slice(2, 8)):
        padded, mask = torch.full((2, 9), 3), torch.zeros(2, 9)
        padded[:, columns], mask[:, columns] = tokens, 1
        assert relative(model(padded, attention_mask=mask)[:, columns], whole) < 1e-12


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_the_stream_is_the_sum_of_what_branches_add(kind):
    model = build(kind).double()
    _, cache = model.run_with_cache(tokens_for(model))
    parts, labels = cache.decompose_resid(return_labels=True)
    assert relative(parts.sum(0), cache["resid_post", 1]) < 1e-12
    branches = [f"{i}_{name}_out" for i in range(2) for name in model.block(i).branches]
    assert labels == ["embed", *branches]


@pytest.mark.parametrize("kind", MIXERS)
def test_every_site_on_the_path_matters(kind):
    """A new value at a site of the call's path changes the logits, also through a hook that is there for a gradient."""
    model = build(kind).double()
    tokens = tokens_for(model, rows=1, length=6)
    with torch.no_grad():
        whole = model(tokens)
        for name, point in model.hook_dict.items():
            if point.site.row.integer or point.site.row.kind != "point" or not name.startswith("blocks.0.mixer."):
                continue
            edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v * 1.5 + 0.25)])
            assert relative(edited, whole) > 1e-9, name
