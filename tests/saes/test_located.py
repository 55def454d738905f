"""Widths of streams against the activations themselves, and how often a coder's streams are worked out."""

from __future__ import annotations

import pytest

import saes.naming
import saes.rewriting
from hooked_mamba.hooks.names import HookNameError
from saes import splice
from saes.located import locate
from saes.targets import LOCAL, stream_values
from tests.hooked_mamba.tiny import tokens_for
from tests.kinds import MIXERS
from tests.saes.models import mambacoder_on, sae_on, tiny


@pytest.mark.parametrize("family", MIXERS)
def test_widths_are_those_of_the_activations(family):
    model = tiny(family)
    block = [model.site(name) for name in model.hook_dict if name.startswith("blocks.1.")]
    streams = [
        "hook_embed",
        "ln_final.hook_out",
        *(site.name for site in block if " m" not in site.row.shape and not site.row.integer),
    ]
    streams += [f"blocks.1.mixer.{model.mixer(1).out_site}{LOCAL}"] if model.mixer(1).frozen_sites else []
    for stream in streams:
        place = locate(stream, model)
        _, cache = model.run_with_cache(tokens_for(model, 2, 5), names_filter=list(place.sites))
        assert stream_values(stream, cache, model).shape == (2, 5, place.width), stream
    several = next(site.name for site in block if ".mixer.hook_" in site.name)
    _, cache = model.run_with_cache(tokens_for(model, 2, 5), names_filter=[several])
    assert stream_values(several, cache, model, [1, 0]).shape[2] == locate(several, model, [1, 0]).width


def test_what_a_model_does_not_have():
    model = tiny("mamba")
    with pytest.raises(HookNameError, match=r"blocks\.9"):
        locate("blocks.9.mixer.hook_x", model)
    with pytest.raises(ValueError, match="does not have a value at every position"):
        locate("hook_tokens", model)
    with pytest.raises(IndexError, match="channel 99 of"):
        locate("blocks.0.mixer.hook_h", model, [99])


def test_a_splice_works_out_each_coders_streams_once(monkeypatch):
    model = tiny("mamba")
    coders = {"sae": sae_on(model, "blocks.1.hook_resid_post"), "coder": mambacoder_on(model, 0)}
    asked = []
    for module in (saes.naming, saes.rewriting):
        inner = module.streams_of
        monkeypatch.setattr(module, "streams_of", lambda cfg, inner=inner: asked.append(cfg) or inner(cfg))
    with splice(model, coders):
        model(tokens_for(model, 1, 4))
    assert len(asked) == 2
