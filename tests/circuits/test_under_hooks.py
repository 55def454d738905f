"""Attribution of a run on which functions sit: its parts sum to the target, or it is refused and says why."""

import pytest

from circuits import Feature, FrozenModel, Logit, attribute, build_graph, patch_effects, trace_paths
from circuits.interventions import ScaleEmbedding, frozen_effects
from hooked_mamba.hooks.site_name import SiteName
from saes import steer
from tests.circuits.test_writes import built
from tests.circuits.writes import writable, writer
from tests.hooked_mamba.tiny import tokens_for
from tests.kinds import MAMBA
from tests.saes.models import sae_on, tiny


def halved(value, hook):
    return value / 2


@pytest.mark.parametrize("family", MAMBA)
def test_every_site(fast, family):
    model = tiny(family)
    tokens = tokens_for(model, rows=1)
    outcomes = set()
    for site in [name for name, point in model.hook_dict.items() if not point.holds_integers]:
        with model.hooks([(site, halved)]):
            run = FrozenModel(model, tokens)
        kept = attribute(run, targets=Logit(5), unexplained="keep")
        explained = float(kept.residual.abs().max()) < 1e-9
        outcomes.add(explained)
        if explained:
            attribute(run, targets=Logit(5))
            continue
        with pytest.raises(ValueError, match=rf"sum to .* functions sat on {site} during the run.*unexplained='keep'"):
            attribute(run, targets=Logit(5))
    assert outcomes == {True, False}, "some edits are held (dt), others are no part of the sum (the stream)"


DEFAULT = {("granite-moe", True), ("zamba2", False)}


@pytest.mark.parametrize(
    ("kind", "coded"),
    [
        pytest.param(kind, coded, marks=[] if (kind, coded) in DEFAULT else pytest.mark.slow)
        for kind in ("granite-moe", "falcon", "zamba2")
        for coded in (False, True)
    ],
)
def test_every_site_of_hybrids(fast, kind, coded):
    """Write dictionaries read what a hook has made of a value: then it is in the sum, or the sum is refused."""
    model, tokens = built(kind)
    coders = [writer(model, part, seed=i) for i, part in enumerate(writable(model))] if coded else []
    targets = [Logit(5), *(Feature(coder, 2) for coder in coders[-1:])]
    outcomes = set()
    fullest = max(range(model.cfg.n_layers), key=lambda layer: len(model.block(layer).branches))
    numbers = [name for name, point in model.hook_dict.items() if not point.holds_integers]
    for site in [name for name in numbers if SiteName.parse(name).layer in (None, fullest)]:
        with model.hooks([(site, halved)]):
            run = FrozenModel(model, tokens, coders)
        kept = attribute(run, targets=targets, unexplained="keep")
        explained = bool((kept.residual.abs() < 1e-7 * kept.size).all())
        outcomes.add(explained)
        if explained:
            attribute(run, targets=targets)
            continue
        with pytest.raises(ValueError, match=rf"functions sat on {site} during the run"):
            attribute(run, targets=targets)
    assert outcomes == {True, False}


def test_rules_that_sum_refuse_as_well():
    """They run blocks anew, without the hooks that the run had."""
    model = tiny("mamba")
    tokens = tokens_for(model, rows=1)
    for selection in ("half", "shares"):
        with model.hooks([("blocks.0.mixer.hook_dt", halved)]):
            run = FrozenModel(model, tokens, selection=selection)
        with pytest.raises(ValueError, match=r"functions sat on blocks\.0\.mixer\.hook_dt"):
            attribute(run, targets=Logit(5))


def test_everything_built_on_it_refuses():
    model = tiny("mamba")
    tokens = tokens_for(model, rows=1)
    with steer(model, sae_on(model, "blocks.0.mixer.hook_out_proj"), 3, 5.0):
        run = FrozenModel(model, tokens)
    for ask in (
        lambda: build_graph(run, Logit(5)),
        lambda: trace_paths(run, Logit(5)),
        lambda: frozen_effects(run, ScaleEmbedding(0, 0.5), Logit(5)),
        lambda: patch_effects(run, target=Logit(5), replace_by=3),
    ):
        with pytest.raises(ValueError, match="functions sat on"):
            ask()
    found = attribute(run, targets=Logit(5), unexplained="keep")
    assert float(found.residual.abs().max()) > 1e-6
    with pytest.raises(ValueError, match="'refuse' or 'keep'"):
        attribute(run, targets=Logit(5), unexplained="drop")
    assert float(attribute(model, (), tokens, Logit(5)).residual.abs().max()) < 1e-9
