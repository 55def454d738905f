"""TransformerLens' names and habits where a model has no such thing: one line that says what to use here."""

import pytest

from hooked_mamba.hooks.elsewhere import MEANT
from hooked_mamba.hooks.names import HookNameError
from tests.hooked_mamba.tiny import build, tokens_for


@pytest.fixture(scope="module")
def made():
    model = build("mamba")
    return model, model.run_with_cache(tokens_for(model))[1]


@pytest.mark.parametrize("name", sorted(set(MEANT) - {"z"}))
def test_every_meaning(made, name):
    _, cache = made
    with pytest.raises(HookNameError) as caught:
        cache[name, 1] if name != "pos_embed" else cache[name]
    said = str(caught.value)
    assert MEANT[name][0] in said
    assert "\n" not in said
    nearest = said.partition("nearest: ")[2].partition(". The model")[0]
    assert nearest in cache or not nearest


def test_nearest_by_meaning(made):
    _, cache = made
    for name, site in {"mlp_out": "mixer.hook_out_proj", "resid_per": "hook_resid_pre", "q": "mixer.hook_C"}.items():
        with pytest.raises(HookNameError, match=rf"nearest: blocks\.1\.{site}"):
            cache[name, 1]


def test_arguments(made, unchecked):
    model, _ = made
    tokens = tokens_for(model)
    with pytest.raises(TypeError, match=r"a names_filter is a name.*got int: 3"):
        model.run_with_cache(tokens, names_filter=3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'name_filter'; did you mean names_filter="):
        model.run_with_cache(tokens, name_filter="hook_embed")
    for fn in (lambda x: x, lambda: None, lambda x, hook, more: x, lambda x, *, other: x):
        with pytest.raises(TypeError, match=r"a hook at hook_embed is called as fn\(tensor, hook\)"):
            model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fn)])
    for fn in (lambda x, hook: x, lambda x, h: x, lambda *a: None, lambda x, hook=None, k=3: x, lambda x, **kw: x):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fn)])
