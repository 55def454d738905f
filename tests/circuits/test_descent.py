"""What is left out of a descent adds nothing: layers above a target, positions behind it, and others where none mix."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from circuits.attribution import attribute
from circuits.descent import Descent, alike
from circuits.effect_rows import EffectRows
from circuits.frozen_model import FrozenModel
from circuits.parts import Parts
from circuits.points import PointDescent, stays
from circuits.targets import Channel, Direction, Feature, Logit
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.circuits.test_branches import LAYOUTS, hybrid

LENGTH = 19


WAYS = ("plain", "continued", "gradient", "half", "block", "mixed")


def read_in_a_way(name):
    tokens, mask = random_tokens(3, batch=2, length=LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    one, other = random_model(3, "mamba", n_layers=3), random_model(4, "mamba2", n_layers=3)
    model = one if name in ("plain", "gradient", "block") else other
    past, selection, coders = None, "none", []
    if name in ("continued", "gradient"):
        with torch.no_grad():
            _, past = model(tokens[:, :2], return_state=True)
    if name in ("gradient", "half"):
        selection = name
    if name == "block":
        coders = coders_for(model, skip=True)
    elif name == "mixed":
        coders = coders_for(model, "local")[:1] + coders_for(model)[2:]
    mask = mask if name in ("plain", "half", "block") else None
    return FrozenModel(model, tokens, coders, attention_mask=mask, initial_state=past, selection=selection)


def targets_of(frozen):
    found = [Logit(t % 17, t, minus=1) for t in (6, 9, LENGTH - 1)]
    for layer in range(frozen.n_layers):
        vector = torch.randn(frozen.model.cfg.d_model, generator=torch.Generator().manual_seed(layer)).double()
        found += [Direction(vector, layer, t) for t in (5, 12)] + [Direction(vector, layer + 1, 9)]
        if layer in frozen.coded:
            found += [Feature(frozen.coded[layer].coder, layer, t) for t in (7, 18)]
        else:
            found += [Channel(layer, 1, t) for t in (8, 16)]
    return found


def whole(frozen, targets, nodes):
    """Every target by itself, down the whole run from its top."""
    covectors = [target.covector(frozen, row) for target in targets for row in range(frozen.batch)]
    pieces = []
    for covector, row in zip(covectors, frozen.rows_of(len(targets)), strict=True):
        descent = Descent(frozen, [covector], row[None], set(), True, nodes)
        descent.top, descent.depths = frozen.n_layers, [frozen.n_layers]
        pieces.append(descent.run())
    return Parts.joined(pieces, [[i] for i in range(len(pieces))], frozen.length, nodes)


def check(found, expected):
    for part in fields(Parts):
        mine, theirs = getattr(found, part.name), getattr(expected, part.name)
        if part.name == "embeddings":
            mine, theirs = {0: mine}, {0: theirs}
        assert set(mine) >= {key for key in theirs if theirs[key].any()}, part.name
        for key, values in theirs.items():
            if key in mine:
                assert mine[key].shape == values.shape, (part.name, key)
                assert (mine[key] - values).abs().max() < 1e-12 * (1 + values.abs().max()), (part.name, key)


@pytest.mark.parametrize("name", WAYS)
def test_batches_are_what_each_target_is_by_itself(name):
    frozen = read_in_a_way(name)
    targets = targets_of(frozen)
    mixers = frozen.mixed_layers()
    nodes = {i: (torch.rand(LENGTH, frozen.chain(i).width) < 0.2).double() for i in mixers}
    assert len(alike([t.covector(frozen, 0) for t in targets], frozen, 64)) > 4
    check(attribute(frozen, targets=targets, nodes=nodes), whole(frozen, targets, nodes))


def test_points_are_what_streams_are():
    frozen = read_in_a_way("block")
    targets = [target for target in targets_of(frozen) if not isinstance(target, Channel)]
    covectors = [target.covector(frozen, row) for target in targets for row in range(2)]
    assert stays(frozen, covectors)
    rows, order = frozen.rows_of(len(targets)), alike(covectors, frozen, 64)
    pieces = [PointDescent(frozen, [covectors[i] for i in places], rows[places], True).run() for places in order]
    check(Parts.joined(pieces, order, LENGTH, {}), whole(frozen, targets, {}))
    assert not stays(frozen.read_by(frozen.rule, {}), covectors)  # without coders, mixers mix


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hybrid_with_attention_and_padding(layout):
    model, tokens = hybrid(LAYOUTS[layout]), random_tokens(0, batch=2, length=11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    frozen = FrozenModel(model, tokens, attention_mask=mask)
    targets = [Logit(3, 2), Logit(4, 5, minus=3), Logit(3, 7)]
    check(attribute(frozen, targets=targets), whole(frozen, targets, {}))


def test_reach_is_a_sum_over_paths():
    generator = torch.Generator().manual_seed(0)
    effects, weight = torch.randn(2, 30, generator=generator), torch.tensor([0.3, 0.7])
    weights = torch.randn(30, 30, generator=generator).tril(-1)  # node i has earlier ones below it
    rows, places = EffectRows(30, 12, torch.float32), list(range(29, 17, -1))
    for start in range(0, 12, 5):
        some = places[start : start + 5]
        rows.add(some, weights[some], torch.zeros(len(some)))
    shares = weights.abs() / weights.abs().sum(1, keepdim=True).clamp_min(1e-30)
    shares[[i for i in range(30) if i not in places]] = 0
    arriving = weight @ (effects.abs() / effects.abs().sum(1, keepdim=True))
    expected = arriving @ torch.linalg.inv(torch.eye(30) - shares)
    assert torch.allclose(rows.reach(effects, weight), expected, rtol=1e-5)
