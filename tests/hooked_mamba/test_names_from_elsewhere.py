"""TransformerLens' names and habits where a model has no such thing: one line that says what to use here."""

import pytest

from hooked_mamba import patching, utils
from hooked_mamba.hooks.elsewhere import MEANT
from hooked_mamba.hooks.names import HookNameError
from tests.hooked_mamba.tiny import build, tokens_for
from tests.kinds import MAMBA


@pytest.fixture(scope="module")
def made():
    model = build("mamba")
    return model, model.run_with_cache(tokens_for(model))[1]


@pytest.mark.parametrize("name", sorted(MEANT))
def test_every_meaning(made, name):
    model, cache = made
    with pytest.raises(HookNameError) as caught:
        cache[name, 1] if name != "pos_embed" else cache[name]
    said = str(caught.value)
    assert MEANT[name][0] in said
    assert "\n" not in said
    nearest = said.partition("nearest: ")[2].partition(". The model")[0]
    assert nearest in model.hook_dict or not nearest


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


def test_z_is_attentions():
    """A mixer's gate, which has the same name, is found by its branch alone."""
    assert utils.get_act_name("z", 3) == "blocks.3.attn.hook_z"
    for kind in MAMBA:  # no attention: refused, the mixer's own stays there
        model = build(kind)
        cache = model.run_with_cache(tokens_for(model))[1]
        assert cache["mixer.z", 0] is cache["blocks.0.mixer.hook_z"]
        for ask in (lambda: cache["z", 0], lambda: model.run_with_cache(tokens_for(model), names_filter="z0")):  # noqa: B023
            with pytest.raises(HookNameError):
                ask()
        with pytest.raises(HookNameError, match=r"no attention; .* a mixer's gate is 'mixer.z'; nearest: .*hook_y"):
            cache["z", 0]
        with pytest.raises(HookNameError, match=r"a mixer's gate is 'mixer.z'"):
            model.site(model.act_name("z", 0))
    hybrid = build("gated_deltanet")  # attention and a mixer with a gate in block 1, no attention in block 0
    cache = hybrid.run_with_cache(tokens_for(hybrid))[1]
    assert cache["z", 1] is cache["blocks.1.attn.hook_z"]
    assert cache["mixer.z", 1] is cache["blocks.1.mixer.hook_z"]
    with pytest.raises(HookNameError, match="this block has no attention"):
        cache["z", 0]


def test_the_old_name_of_the_gates_sweep():
    with pytest.warns(DeprecationWarning, match="get_act_patch_z is now .*get_act_patch_gate_pre"):
        assert patching.get_act_patch_z is patching.get_act_patch_gate_pre


def test_what_an_mlp_of_another_kind_adds():
    model = build("rwkv7")
    cache = model.run_with_cache(tokens_for(model))[1]
    assert cache["mlp_out", 1] is cache["blocks.1.mlp.hook_out"]
