"""Every site of the families of gated DeltaNet edited, against plain loops with the same edit."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hooked_mamba import HookedHybrid
from tests.hooked_mamba.hybrids.test_edits import edit_of, one_of_each_kind
from tests.hooked_mamba.recurrent import families_oracle
from tests.hooked_mamba.recurrent.models import tokens_for
from tests.hooked_mamba.recurrent.test_deltanet_families import CASES, theirs
from tests.hooked_mamba.tiny import arrays, relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-11
LENGTH = 5


@functools.lru_cache
def model_of(case: str) -> HookedHybrid:
    return HookedHybrid.from_hf(theirs(case)).double().requires_grad_(False)


def everything(model, tokens, **options):
    states = [f"blocks.{i}.mixer.hook_h.{t}" for i in (0, 2) for t in (1, LENGTH - 1)]
    return model.run_with_cache(tokens, names_filter=[*model.hook_dict, *states], **options)


def check(case: str, name: str | None) -> None:
    model, tokens = model_of(case), tokens_for(length=LENGTH, seed=3)
    made: list[np.ndarray] = []

    def hook(value: torch.Tensor, hook) -> torch.Tensor:
        edit = (lambda v: (v + 1) % 17) if name == "hook_tokens" else edit_of(name, model.site(name))
        made.append(edit(value.numpy()))
        return torch.from_numpy(made[0])

    hooks = [] if name is None else [(name, hook)]
    got, cache = everything(model, tokens, fwd_hooks=hooks)
    edits = {} if name is None else {name: lambda v: made[0]}
    expected = families_oracle.forward(model.cfg, arrays(model.state_dict()), tokens.numpy(), edits)
    assert name is None or relative(got, model(tokens)) > 1e-9, f"an edit of {name} has no effect"
    assert relative(got, expected.logits) < EXACT, name
    for site, value in cache.items():
        finite = np.isfinite(expected.values[site])
        assert np.array_equal(torch.isfinite(value).numpy(), finite), site
        assert relative(value.numpy()[finite], expected.values[site][finite]) < EXACT, (name, site)


def names_of(case: str) -> list[str]:
    """Of every kind of site the first in a block of either sort, single states too."""
    model = model_of(case)
    states = [f"blocks.{i}.mixer.hook_h.{t}" for i in (0, 2) for t in (1, LENGTH - 1)]
    return [*one_of_each_kind(list(model.hook_dict)), *states]


@pytest.mark.parametrize("case", [c if "," not in c else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_every_site_equals_the_equations(case):
    check(case, None)


FEW = ("mixer.hook_recall", "mixer.hook_delta", "mixer.hook_h", "mixer.hook_h.1", "mixer.hook_beta", "attn.hook_gate")


@pytest.mark.parametrize("site", FEW)
def test_a_few_edits_equal_recomputation(site):
    check("qwen3_next", f"blocks.{3 if 'attn' in site else 2}.{site}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_edit_at_each_kind_of_site_equals_recomputation(case):
    for name in names_of(case):
        check(case, name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_edit_at_every_site_equals_recomputation(case):
    for name in model_of(case).hook_dict:
        check(case, name)
