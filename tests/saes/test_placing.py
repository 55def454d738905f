"""Coders whose files name a module of transformers, put on their sites in a model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hooked_mamba import load_model
from hooked_mamba.loading import from_hf_model
from hooked_mamba.model.hooked_model import MODELS
from saes import LossState, SparseCoder, load_coder, splice
from saes.files import CoderFileError
from saes.files.modules import ModulePath
from saes.loss import loss
from saes.placing import outputs
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.loading.builders import random_hf_model
from tests.hooked_mamba.recurrent.test_deltanet_families import theirs as deltanets
from tests.saes.files.formats import saelens, sparsify, weights

pytestmark = pytest.mark.usefixtures("unchecked")

HYBRIDS = ("jamba", "bamba", "granite-moe", "nemotron", "falcon", "lfm2")
OTHERS = {"mamba": random_hf_model, "falcon_mamba": random_hf_model, "mamba2": random_hf_model}
FAMILIES = (*OTHERS, *HYBRIDS, "qwen3_next", "olmo_hybrid")


@pytest.fixture
def unchecked():
    """Errors are those that users see."""


def pair(family: str):
    """A tiny model of transformers in float32, and ours."""
    if family in OTHERS:
        hf = OTHERS[family](family, 3)
    else:
        hf = tiny.twin(family) if family in HYBRIDS else deltanets(family).float()
    cfg, _ = from_hf_model(hf)
    cls = next(cls for cls in MODELS.values() if type(cfg) is cls.config_class)
    return hf, cls.from_hf(hf).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_outputs_are_the_sites_values(family):
    """Every module whose path is read: what transformers' own hook on it sees is what stands at our site."""
    hf, model = pair(family)
    seen, found = {}, {}

    def keep(name):
        def hook(module, inputs, out):
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    for name, module in hf.named_modules():
        path = ModulePath.parse(name)
        sites = [] if path is None else outputs(path, model)
        if len(sites) == 1:
            found[name] = sites[0]
            module.register_forward_hook(keep(name))
    tokens = torch.randint(3, 16, (2, 7), generator=torch.Generator().manual_seed(0))
    hf(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=list(found.values()))
    for name, value in seen.items():
        site = cache[found[name]]
        assert torch.allclose(value.reshape(site.shape), site, rtol=1e-3, atol=1e-3), (name, found[name])
    layers = {ModulePath.parse(name).layer for name in seen}
    assert set(range(model.cfg.n_layers)) <= layers
    parts = {part for name in seen for part in ModulePath.parse(name).parts[:1]}
    assert len(parts) >= 2, parts  # a branch and a norm at least


@pytest.fixture(scope="module")
def nemotron():
    return pair("nemotron")[1]


@pytest.mark.parametrize(("layer", "site"), [(0, "mixer.hook_out_proj"), (2, "attn.hook_out"), (3, "mlp.hook_out")])
def test_one_name_for_every_kind_of_layer(nemotron, tmp_path, layer, site):
    """Published coders of Nemotron name `backbone.layers.25.mixer`, whatever that layer is."""
    W = weights("b_enc", d_in=32, d_out=32)
    about = {"hook_name": f"backbone.layers.{layer}.mixer", "model_name": "nvidia/some-nemotron"}
    folder = saelens(tmp_path / "c", W, "standard", d_in=32, metadata=about)
    coder = load_coder(folder, nemotron)
    assert coder.cfg.in_site == f"blocks.{layer}.{site}"
    x = torch.randn(5, 32)
    assert torch.allclose(coder.encode(x), ((x - W["b_dec"]) @ W["W_enc"] + W["b_enc"]).relu(), atol=1e-5)
    tokens = torch.arange(3, 9)[None]
    with splice(nemotron, coder, error=True):
        assert torch.equal(nemotron(tokens), nemotron(tokens))
    assert SparseCoder.load(folder).cfg.in_site == f"blocks.{layer}.mixer.hook_out_proj"  # what a Mamba layer has


def test_experts_beside_a_shared_mlp_are_no_site(nemotron, tmp_path):
    """The module's output is the sum of two branches."""
    W = weights("b_enc", d_in=32, d_out=32)
    folder = saelens(tmp_path / "c", W, "standard", d_in=32, metadata={"hook_name": "backbone.layers.1.mixer"})
    with pytest.raises(CoderFileError, match=r"whose output is the sum of blocks\.1\.mlp\.hook_out and blocks\.1\.moe"):
        load_coder(folder, nemotron)


def test_a_layers_output_and_a_path_that_needs_the_model(tmp_path):
    model = load_model("tinystories-hybrid-4l")
    d = model.cfg.d_model
    W = weights("b_enc", d_in=d, d_out=d)
    folder = saelens(tmp_path / "c", W, "standard", d_in=d, metadata={"hook_name": "model.layers.3"})
    assert load_coder(folder, model).cfg.in_site == "blocks.3.hook_resid_post"
    assert SparseCoder.load(folder).cfg.in_site == "blocks.3.hook_resid_post"
    several = saelens(tmp_path / "s", W, "standard", d_in=d, metadata={"hook_name": "model.layers.3.mlp"})
    with pytest.raises(CoderFileError, match=r"'model.layers.3.mlp', a module that is not the same in all families"):
        SparseCoder.load(several)
    with pytest.raises(CoderFileError, match=r"is the sum of blocks\.3\.mlp\.hook_out and blocks\.3\.moe\.hook_out"):
        load_coder(several, model)
    assert load_coder(several, model, in_site="blocks.3.moe.hook_out").cfg.layer == 3
    gone = saelens(tmp_path / "g", W, "standard", d_in=d, metadata={"hook_name": "model.layers.9"})
    with pytest.raises(CoderFileError, match=r"which this model does not have with that width; give in_site="):
        load_coder(gone, model)
    about = {"hook_name": "blocks.3.hook_attn_in"}
    other = saelens(tmp_path / "w", weights("b_enc", d_in=7, d_out=7), "standard", d_in=7, metadata=about)
    with pytest.raises(ValueError, match=r"no site of this model holds 7 numbers: the coder is of another model"):
        load_coder(other, model)


@pytest.mark.parametrize("read", ["blocks.1.norm2.hook_out", "model.layers.1.pre_ff_layernorm"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_an_mlp(tmp_path, read, skip):
    """SAELens' transcoders name the site they predict `hook_name_out`."""
    _, model = pair("bamba")
    W = weights("b_enc", *(["W_skip"] if skip else []), d_in=32, d_out=32)
    about = {"hook_name": read, "hook_name_out": "model.layers.1.feed_forward", "hook_layer_out": 1}
    options = {"apply_b_dec_to_input": False, "d_in": 32, "d_out": 32, "metadata": about}
    folder = saelens(tmp_path / "c", W, f"{'skip_' if skip else ''}transcoder", **options)
    coder = load_coder(folder, model)
    assert (coder.cfg.in_site, coder.cfg.out_site) == ("blocks.1.norm2.hook_out", "blocks.1.mlp.hook_out")
    assert (coder.cfg.reads, coder.cfg.target) == ("normalized", "block")
    tokens = torch.arange(3, 9)[None]
    _, cache = model.run_with_cache(tokens)
    x = cache["blocks.1.norm2.hook_out"]
    y = (x @ W["W_enc"] + W["b_enc"]).relu() @ W["W_dec"] + W["b_dec"] + (x @ W["W_skip"].t() if skip else 0)
    with splice(model, coder):
        _, spliced = model.run_with_cache(tokens)
    assert torch.allclose(spliced["blocks.1.mlp.hook_out"], y, atol=1e-4)
    back = SparseCoder.load(coder.save(tmp_path / "ours"))
    assert back.cfg == coder.cfg


def test_a_plain_archive(tmp_path):
    """A published JumpReLU: a dict of five tensors, which says neither its site nor its model."""
    _, model = pair("mamba2")
    d = model.cfg.d_model
    W = weights("b_enc", "threshold", d_in=d, d_out=d)
    torch.save(W, tmp_path / "sae.pt")
    x = torch.randn(9, d)
    pre = x @ W["W_enc"] + W["b_enc"]
    coder = load_coder(tmp_path / "sae.pt", model, in_site="blocks.0.hook_resid_post")
    assert torch.allclose(coder.encode(x), pre.relu() * (pre > W["threshold"]), atol=1e-5)
    centred = SparseCoder.load(tmp_path / "sae.pt", in_site="blocks.0.hook_resid_post", apply_b_dec_to_input=True)
    pre = (x - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    assert torch.allclose(centred.encode(x), pre.relu() * (pre > W["threshold"]), atol=1e-5)
    with pytest.raises(CoderFileError, match=r"sae.pt does not say which site it is of: give in_site="):
        SparseCoder.load(tmp_path / "sae.pt")
    with pytest.raises(
        CoderFileError, match=r"give in_site=\. sites that hold \d+ numbers: hook_embed, blocks\.\{i\}\."
    ):
        load_coder(tmp_path / "sae.pt", model)
    torch.save(W | {"log_threshold": W["threshold"]}, tmp_path / "more.pt")
    with pytest.raises(CoderFileError, match=r"more.pt does not hold this coder's tensors: unexpected 'log_threshold'"):
        load_coder(tmp_path / "more.pt", model)
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    with pytest.raises(CoderFileError, match=r"code.pt does not read as plain weights.*holds code, which is never run"):
        load_coder(tmp_path / "code.pt", model)


def test_float64_stays(tmp_path):
    W = {name: value.double() for name, value in weights("b_enc", "threshold").items()}
    torch.save(W, tmp_path / "sae.pt")
    made = SparseCoder.load(tmp_path / "sae.pt", in_site="blocks.3.hook_resid_post").requires_grad_(False)
    x = torch.randn(9, 6, dtype=torch.float64)
    pre = x @ W["W_enc"] + W["b_enc"]
    expected = pre.relu() * (pre > W["threshold"])
    assert made.dtype == torch.float64
    assert float((made.encode(x) - expected).abs().max()) < 1e-13
    assert float((made(x) - expected @ W["W_dec"] - W["b_dec"]).abs().max()) < 1e-13


def test_architectures_that_are_only_read(tmp_path):
    """AbsTopK keeps signs; GroupMax takes one latent of each group."""
    W, x = weights("b_enc"), torch.randn(30, 6)
    pre = (x - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    folder = saelens(tmp_path / "c", W, "abstopk", k=5)
    made = SparseCoder.load(folder)
    least = pre.abs().sort(dim=1, descending=True).values[:, 4:5]
    z = torch.where(pre.abs() >= least, pre, 0.0)
    assert bool((z < 0).any())
    assert torch.allclose(made.encode(x), z, atol=1e-5)
    assert torch.allclose(made(x), z @ W["W_dec"] + W["b_dec"], atol=1e-4)
    back = SparseCoder.load(made.save(tmp_path / "ours"))
    assert back.cfg == made.cfg
    assert torch.equal(back.encode(x), made.encode(x))
    with pytest.raises(ValueError, match="abstopk coders are read from files and not trained here; train 'topk'"):
        loss(made, x, x, LossState.of(made))

    folder = sparsify(tmp_path / "layers.3", activation="groupmax")
    made = SparseCoder.load(folder)
    z = torch.zeros_like(pre)
    for row in range(30):
        for group in range(4):
            best = max(range(4 * group, 4 * group + 4), key=lambda j, row=row: float(pre[row, j]))
            z[row, best] = max(float(pre[row, best]), 0.0)
    assert torch.allclose(made.encode(x), z, atol=1e-5)
    assert torch.allclose(made(x), z @ W["W_dec"] + W["b_dec"], atol=1e-4)
    codes = made.encode_topk(x)
    assert bool((codes.values.diff(dim=1) <= 0).all())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("matching_pursuit", "one latent after the other"),
        ("temporal", "reads other positions of the text by attention"),
    ],
)
def test_architectures_that_are_not(tmp_path, name, why):
    folder = saelens(tmp_path / "c", weights("b_enc"), name)
    with pytest.raises(CoderFileError, match=rf"has architecture '{name}', which .*{why}.*only be used in SAELens"):
        SparseCoder.load(folder)


def test_our_own_and_bundled_ones(tmp_path):
    model = load_model("tinystories-4l")
    assert load_coder("tinystories-4l/l2-out", model).cfg.in_site == "blocks.2.mixer.hook_out_proj"
    W = weights("b_enc")
    save_file(W, tmp_path / "x.safetensors")
    with pytest.raises(CoderFileError, match="does not say what it is"):
        load_coder(tmp_path / "x.safetensors", model)
