"""Position -1 is each row's own last real token, on whichever side a batch is padded: every row is as it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import Logit, attribute
from circuits.frozen_model import FrozenModel
from circuits.interventions import CutTokens, ScaleEmbedding, ScaleState, SetFeature, frozen_effects, intervened
from hooked_mamba.analysis import ablate, knockout, knockout_sweep
from saes import steer
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent import models as recurrent
from tests.saes.models import sae_on, tiny

LENGTHS = (6, 3, 6, 5)
WIDTH = 7
STATEFUL = ("mamba", "falcon", "mamba2", "mamba2-groups", "rwkv7", "deltanet", "jamba", "zamba")


def model_of(family: str) -> Any:
    if family in recurrent.KINDS:
        return recurrent.build(family)
    return hybrids.tiny(family).model.double() if family in hybrids.CASES else tiny(family)


def padded(model: Any, side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens and mask of rows of different lengths, and each row alone."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in LENGTHS]
    tokens, mask = torch.zeros(len(rows), WIDTH, dtype=torch.long), torch.zeros(len(rows), WIDTH, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(WIDTH - len(row), WIDTH)
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask, rows


def each_alone(model: Any, way: Callable[[], Any], side: str) -> None:
    """The batch's real logits are those of each row alone, and the edit matters."""
    tokens, mask, rows = padded(model, side)
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask)
        with way():
            together = model(tokens, attention_mask=mask)
        for i, row in enumerate(rows):
            with way():
                alone = model(row)[0]
            real = mask[i].bool()
            torch.testing.assert_close(together[i, real], alone, rtol=1e-9, atol=1e-9)
            moved = float((plain[i, real] - alone).abs().max())
            assert moved > 1e-7, "the edit has no effect: the test shows nothing"


def bent(value: Tensor, hook: Any) -> Tensor:
    return value + value.square() + 0.1


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", STATEFUL)
def test_the_state_after_the_last_token(fast, family, side, stacked):
    model = model_of(family)
    layer = next(i for i in range(model.cfg.n_layers) if f"blocks.{i}.mixer.hook_h" in model.hook_dict)
    site = f"blocks.{layer}.mixer.hook_h"
    hooks = [(f"{site}.-1", bent)] + ([(site, lambda h, hook: h * 1.5)] if stacked else [])
    each_alone(model, lambda: model.hooks(hooks), side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", STATEFUL)
def test_reading_it_beside_an_edit(fast, family, side):
    model = model_of(family)
    site = next(name for name in model.hook_dict if name.endswith("mixer.hook_h"))
    tokens, mask, rows = padded(model, side)
    for hooks in ([], [(f"{site}.-1", bent)]):
        names = [site, f"{site}.-1"]
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names, fwd_hooks=hooks)
        for i, row in enumerate(rows):
            _, alone = model.run_with_cache(row, names_filter=names, fwd_hooks=hooks)
            torch.testing.assert_close(cache[f"{site}.-1"][i], alone[f"{site}.-1"][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(cache[site][i, mask[i].bool()], alone[site][0], rtol=1e-9, atol=1e-9)


def test_further_back_only_where_rows_end_together():
    model = tiny("mamba")
    hooks = [("blocks.0.mixer.hook_h.-2", bent)]
    each_alone(model, lambda: model.hooks(hooks), "left")
    tokens, mask, _ = padded(model, "right")
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    with pytest.raises(IndexError, match="3 real tokens"):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[("blocks.0.mixer.hook_h.-4", bent)])


def ways(model: Any) -> dict[str, Callable[[], Any]]:
    sae = sae_on(model, "blocks.0.mixer.hook_out_proj")
    embed = sae_on(model, "hook_embed")
    return {
        "steer": lambda: steer(model, sae, 3, 2.0, positions=-1),
        "steer two": lambda: steer(model, sae, 3, 2.0, positions=[-1, -3]),
        "steer the embedding": lambda: steer(model, embed, 3, 2.0, positions=-1),
        "ablate": lambda: ablate(model, "blocks.0.hook_resid_pre", positions=-1),
        "ablate the embedding": lambda: ablate(model, "hook_embed", positions=-2),
        "knockout of reads": lambda: knockout(model, -2, -1),
        "knockout of writes": lambda: knockout(model, [-2, -3], cut="write"),
        "embedding": lambda: intervened(model, ScaleEmbedding(-1, 0.3)),
        "latent": lambda: intervened(model, SetFeature(sae, 3, 9.0, -1)),
        "cut": lambda: intervened(model, CutTokens(-2, -1)),
        "state": lambda: intervened(model, ScaleState(0, -1, 0.5)),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", list(ways(tiny("mamba"))))
def test_ways_to_intervene(fast, way, side):
    model = tiny("mamba2" if "knockout" in way else "mamba")
    each_alone(model, ways(model)[way], side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attribution(side):
    model = tiny("mamba")
    tokens, mask, rows = padded(model, side)
    targets = [Logit(5), Logit(2, position=-3)]
    found = attribute(model, (), tokens, targets, attention_mask=mask)
    expected = torch.stack([attribute(model, (), row[None], targets).target for row in rows], 1).flatten()
    torch.testing.assert_close(found.target, expected)
    assert float(found.residual.abs().max()) < 1e-10
    edits = ScaleEmbedding(-1, 0.3)
    effects = frozen_effects(FrozenModel(model, tokens, attention_mask=mask), edits, targets[:1])
    alone = torch.stack([frozen_effects(FrozenModel(model, row[None]), edits, targets[:1])[0, 0] for row in rows])
    torch.testing.assert_close(effects[0], alone)
    run = FrozenModel(model, tokens, attention_mask=mask)
    with pytest.raises(IndexError, match="3 real tokens"):
        run.column(-4, 1)
    if side == "right":
        with pytest.raises(ValueError, match="padding_side='left'"):
            run.column(-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_knockout_sweep(side):
    model = tiny("mamba")
    tokens, mask, rows = padded(model, side)
    last = [WIDTH - 1] * len(rows) if side == "left" else [len(row) - 1 for row in rows]

    def at(columns: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda logits: logits[torch.arange(len(columns)), columns, 5]

    options = {"positions": [-3, -2], "progress": False}
    found = knockout_sweep(model, tokens, at(last), attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = knockout_sweep(model, row[None], at([len(row) - 1]), **options)
        torch.testing.assert_close(found[..., i], alone[..., 0])


def test_caches():
    model = tiny("mamba")
    tokens, mask, rows = padded(model, "left")
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    stack = cache.decompose_resid(pos_slice=-1)
    for i, row in enumerate(rows):
        _, alone = model.run_with_cache(row)
        torch.testing.assert_close(stack[:, i], alone.decompose_resid(pos_slice=-1)[:, 0])
    tokens, mask, _ = padded(model, "right")
    with pytest.raises(ValueError, match=r"pos_slice=-1 counts from the end.*padding_side='left'"):
        model.run_with_cache(tokens, attention_mask=mask, pos_slice=-1)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    for ask in (
        lambda c: c.decompose_resid(pos_slice=-1),
        lambda c: c.logit_attrs(c.decompose_resid(), 3, pos_slice=slice(-2, None)),
        lambda c: c.stack_source_results(0, pos_slice=[-1]),
        lambda c: c.compute_ssm_state(0, -1),
        lambda c: c.hidden_attention(0, queries=-1),
    ):
        with pytest.raises(ValueError, match="padding_side='left'"):
            ask(cache)
