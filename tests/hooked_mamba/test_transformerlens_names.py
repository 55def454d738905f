"""TransformerLens by heart: every public name of 2.18 and 4.3 works here, or gives one line that says what to use."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import hooked_mamba
from hooked_mamba import FactoredMatrix, patching, transformerlens_names, utils
from hooked_mamba.hook_points import HookedRootModule, HookPoint
from hooked_mamba.models import load_model
from hooked_mamba.names_elsewhere import SAE_LENS, advice, table
from tests.hooked_mamba import transformerlens
from tests.hooked_mamba.tiny import build, tokens_for

DOCS = Path(__file__).parents[2] / "docs" / "moving.md"
MAPPED = ("TOP", "MODEL", "CONFIG", "CACHE", "BLOCK", "POINT", "UTILS", "PATCHING", "FACTORED")
HYBRID = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_gate", "QK", "OV")


@pytest.fixture(scope="module")
def owners():
    """A model without attention, MLPs or heads, and all that belongs to it."""
    model = build("mamba")
    cache = model.run_with_cache(tokens_for(model))[1]
    factored = FactoredMatrix(model.W_out, model.W_in_x)
    things = (hooked_mamba, model, model.cfg, cache, model.blocks[0], model.hook_embed, utils, patching, factored)
    return dict(zip(MAPPED, things, strict=True))


@pytest.mark.parametrize("what", MAPPED)
def test_every_name(what, owners):
    owner, uses = owners[what], getattr(transformerlens_names, what)
    is_module = inspect.ismodule(owner)
    for name in getattr(transformerlens, what):
        if name not in uses:
            getattr(owner, name)
            continue
        with pytest.raises(ImportError if is_module else AttributeError) as caught:
            getattr(owner, name)
        assert str(caught.value) == advice(name, uses)
        assert "\n" not in str(caught.value)
    assert set(uses) <= set(getattr(transformerlens, what)), "a name that TransformerLens does not have"


@pytest.mark.parametrize("name", ["HookedTransformer", "utilities", "train"])
def test_modules(name):
    with pytest.raises(ImportError) as caught:
        exec(f"from hooked_mamba.{name} import anything")
    assert str(caught.value) == advice(name, transformerlens_names.TOP)


def test_names_of_saelens():
    with pytest.raises(ImportError) as caught:
        from hooked_mamba import HookedSAETransformer  # noqa: F401
    assert str(caught.value) == advice("HookedSAETransformer", transformerlens_names.SAELENS_TOP, SAE_LENS)


@pytest.mark.parametrize("method", transformerlens.ARGUMENTS)
def test_every_argument(method, owners, unchecked):
    function = getattr(owners["MODEL"], method)
    for name in set(transformerlens.ARGUMENTS[method]) - set(inspect.signature(function).parameters):
        with pytest.raises(TypeError) as caught:
            function(**{name: "asked"})
        assert str(caught.value) == (
            f"{method} has no argument {name!r}: {advice(name, transformerlens_names.OPTIONS)}"
        )


def test_arguments_that_ask_for_what_is_done_anyway():
    model = load_model("tinystories-4l", fold_ln=False, center_unembed=False, center_writing_weights=False)
    same = type(model).from_pretrained_no_processing("tinystories-4l")
    tokens = model.to_tokens("Once upon a time", move_to_device=True)
    assert torch.equal(model(tokens, past_kv_cache=None), same(tokens))
    assert model.generate(tokens, 2, use_past_kv_cache=True, verbose=False).shape == (1, tokens.shape[1] + 2)
    with pytest.raises(TypeError, match=r"load_model has no argument 'fold_ln': .*fold_norms"):
        load_model("tinystories-4l", fold_ln=True)


def test_saelens_methods_of_a_model(owners):
    uses = transformerlens_names.SAELENS_MODEL
    for name in uses:
        with pytest.raises(AttributeError) as caught:
            getattr(owners["MODEL"], name)
        assert str(caught.value) == advice(name, uses, SAE_LENS)


def test_unknown_names_stay_unknown(owners):
    for what in MAPPED:
        with pytest.raises(AttributeError, match="no attribute 'not_a_name'"):
            owners[what].not_a_name  # noqa: B018


def test_a_view_of_a_weight_that_blocks_lack():
    model = load_model("tinystories-rwkv7-4l")
    with pytest.raises(AttributeError, match="HookedRWKV7 has no W_B: its blocks have no such weight"):
        model.W_B  # noqa: B018


def test_a_site_that_another_block_has():
    model = load_model("tinystories-hybrid-4l")  # attention in block 2
    _, cache = model.run_with_cache("Once upon a time")
    with pytest.raises(KeyError, match=r"nearest: blocks\.2\.attn\.hook_pattern"):
        cache["pattern", 0]
    assert torch.equal(model.embed.W_E, model.W_E)
    assert torch.equal(model.unembed.W_U, model.W_U)


def test_attention_and_mlps_of_a_hybrid_are_real():
    model = build("gated_deltanet").double()
    tokens = tokens_for(model)
    cache = model.run_with_cache(tokens)[1]
    cfg = model.cfg
    attn = [layer for layer, _ in model.blocks_with("attn")]
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_mlp) == (4, 2, 4, 7)
    assert model.QK.shape == model.OV.shape == (len(attn), 4, 6, 6)
    for i, layer in enumerate(attn):
        read = cache[f"blocks.{layer}.{norm_of(model, layer, 'attn')}.hook_out"]
        q, k, v = (
            torch.einsum("bld,hdc->blhc", read, W[i]) + b[i]
            for W, b in ((model.W_Q, model.b_Q), (model.W_K, model.b_K), (model.W_V, model.b_V))
        )
        torch.testing.assert_close(q, cache["q", layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(k[:, :, ::2], cache["k", layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(v[:, :, 1::2], cache["v", layer], rtol=0, atol=1e-12)
        out = torch.einsum("blhc,hcd->bld", cache["attn.z", layer], model.W_O[i]) + model.b_O[i]
        torch.testing.assert_close(out, cache[f"blocks.{layer}.attn.hook_out"], rtol=0, atol=1e-12)
    for i, (layer, _) in enumerate(model.blocks_with("mlp")):
        read = cache[f"blocks.{layer}.{norm_of(model, layer, 'mlp')}.hook_out"]
        torch.testing.assert_close(read @ model.W_gate[i], cache["pre", layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(read @ model.W_in[i], cache["pre_linear", layer], rtol=0, atol=1e-12)
        out = cache["post", layer] @ model.W_out[i] + model.b_out[i]
        torch.testing.assert_close(out, cache[f"blocks.{layer}.mlp.hook_out"], rtol=0, atol=1e-12)


def norm_of(model, layer: int, branch: str) -> str:
    """The norm that a branch reads."""
    block = model.block(layer)
    return next(norm for norm, stage in zip(block.norm_names, block.stages, strict=True) if branch in stage)


def test_a_module_of_ones_own():
    class Twice(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.hook_in, self.hook_out = HookPoint(), HookPoint()
            self.setup()

        def forward(self, x):
            return self.hook_out(2 * self.linear(self.hook_in(x)))

    model, x = Twice(), torch.ones(1, 2)
    out, cache = model.run_with_cache(x)
    assert list(cache) == ["hook_in", "hook_out"]
    assert torch.equal(cache["hook_out"], out)
    zeroed = model.run_with_hooks(x, fwd_hooks=[("hook_out", lambda value, hook: 0 * value)])
    assert torch.equal(zeroed, 0 * out)
    assert len(model.hook_points()) == 2


def test_small_tools():
    x = torch.arange(24.0).reshape(1, 4, 6)
    assert torch.equal(utils.get_corner(x, 2), x[:1, :2, :2])
    assert torch.equal(utils.transpose(x), x.mT)
    assert utils.remove_batch_dim(x).shape == (4, 6)
    assert utils.is_lower_triangular(torch.eye(3))
    assert not utils.is_lower_triangular(torch.ones(3, 3))
    assert not utils.is_square(x)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    left, right = FactoredMatrix(drawn(2, 5, 3), drawn(2, 3, 5)), FactoredMatrix(drawn(4, 5, 3), drawn(4, 3, 5))
    scores = utils.composition_scores(left, right)
    product = left.AB[:, None] @ right.AB[None]
    expected = product.norm(dim=(-2, -1)) / left.AB.norm(dim=(-2, -1))[:, None] / right.AB.norm(dim=(-2, -1))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("what", [*MAPPED, "OPTIONS"])
def test_the_documents_tables_are_these(what):
    assert f"|---|---|\n{table(getattr(transformerlens_names, what))}\n" in DOCS.read_text(encoding="utf-8")


def test_arguments_of_caches(owners, unchecked):
    cache = owners["CACHE"]
    cache.get_full_resid_decomposition(expand_neurons=False)
    cache.to("cpu", move_model=False)
    for call in (
        lambda: cache.get_full_resid_decomposition(expand_neurons=True),
        lambda: cache.stack_neuron_results(neuron_slice=3),
        lambda: cache.to("cpu", move_model=True),
        lambda: patching.generic_activation_patch(baseline=3),
    ):
        with pytest.raises(TypeError, match=r"has no argument .*: TransformerLens' \w+ is here: "):
            call()
    with pytest.raises(KeyError, match="this block has no attention; C reads the state as a query does"):
        patching.get_act_patch_attn_head_q_all_pos(
            owners["MODEL"], tokens_for(owners["MODEL"]), cache, lambda logits: logits[0, -1, 0]
        )
