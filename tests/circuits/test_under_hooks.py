"""Attribution of a run on which functions sit: its parts sum to the target, or it is refused and says why."""

import pytest

from circuits import FrozenModel, Logit, attribute, build_graph, patch_effects, trace_paths
from circuits.interventions import ScaleEmbedding, frozen_effects
from saes import steer
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
