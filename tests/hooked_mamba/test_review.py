"""Small promises that a reader of the code found untested."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import ActivationCache
from hooked_mamba.names import HookNameError
from tests.hooked_mamba.tiny import build, tokens_for

pytestmark = pytest.mark.usefixtures("unchecked")
DT = "blocks.0.mixer.hook_dt"


@pytest.fixture(params=["mamba", "mamba2"])
def model(request):
    return build(request.param)


@pytest.fixture
def tokens(model):
    return tokens_for(model, rows=2, length=6)


def test_a_cache_tells_what_was_not_cached_from_what_does_not_exist(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=DT)
    assert isinstance(cache, ActivationCache)
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_h.4 was not cached"):
        cache["h.4", 0]
    with pytest.raises(
        HookNameError, match=rf"'blocks.1.mixer.hook_dtt'.* has {len(model.hook_dict)} sites in 2 blocks"
    ):
        cache["dtt", 1]
