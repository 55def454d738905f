"""Other libraries' files: what is read computes what their formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes import SparseCoder
from saes.files import CoderFileError, open_coder
from tests.saes import naive
from tests.saes.files.formats import D, F, change, recurrentlens, saelens, sparsify, weights

X = torch.randn(20, D, generator=torch.Generator().manual_seed(7))


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5) and bool((b != 0).any())


def test_standard(tmp_path):
    W = weights("b_enc")
    made = SparseCoder.load(saelens(tmp_path / "c", W, "standard"))
    z = ((X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]).relu()
    assert close(made.encode(X), z)
    assert close(made(X), z @ W["W_dec"] + W["b_dec"])
    assert made.cfg.in_site == "blocks.3.hook_resid_post"
    assert made.cfg.model_name == "mamba-130m"
    assert open_coder(tmp_path / "c").format == "saelens"


def test_an_input_that_is_not_centred(tmp_path):
    W = weights("b_enc")
    made = SparseCoder.load(saelens(tmp_path / "c", W, "standard", apply_b_dec_to_input=False))
    assert close(made.encode(X), (X @ W["W_enc"] + W["b_enc"]).relu())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_one_factor_for_all_inputs(tmp_path, architecture, centred):
    """z = act((f x - b_dec) W_enc + b_enc), y = (z W_dec + b_dec) / f: SAELens' expected_average_only_in."""
    f = 2.7
    biases = {"jumprelu": ["b_enc", "threshold"], "gated": ["b_gate", "r_mag", "b_mag"]}.get(architecture, ["b_enc"])
    W = weights(*biases)
    about = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": centred}
    folder = saelens(tmp_path / "c", W, architecture, **about, **({"k": 5} if architecture == "topk" else {}))
    made = SparseCoder.load(folder, norm_factor=f)
    pre = (f * X - (W["b_dec"] if centred else 0)) @ W["W_enc"]
    if architecture == "gated":
        z = (pre + W["b_gate"] > 0) * (W["r_mag"].exp() * pre + W["b_mag"]).relu()
    else:
        pre = pre + W["b_enc"]
        z = {"topk": naive.topk(pre, 5), "standard": pre.relu()}.get(architecture)
        z = pre.relu() * (pre > W["threshold"]) if z is None else z
    assert close(made.encode(X), z)
    assert close(made(X), (z @ W["W_dec"] + W["b_dec"]) / f)


def test_topk(tmp_path):
    W = weights("b_enc")
    made = SparseCoder.load(saelens(tmp_path / "c", W, "topk", k=5, rescale_acts_by_decoder_norm=False))
    assert made.k == 5
    assert close(made.encode(X), naive.topk((X - W["b_dec"]) @ W["W_enc"] + W["b_enc"], 5))


@pytest.mark.parametrize("rescale", [False, True])
def test_a_threshold_in_float64_makes_no_wide_coder(tmp_path, rescale):
    W = weights("b_enc", "topk_threshold")
    W["topk_threshold"] = W["topk_threshold"].double()
    folder = saelens(tmp_path / "c", W, "batchtopk", k=5, rescale_acts_by_decoder_norm=rescale)
    assert SparseCoder.load(folder).encode(X).dtype == torch.float32


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_latents_in_units_of_the_decoder(tmp_path, architecture):
    """z = act(|d| pre), y = sum z / |d| d: what SAELens' training calls rescale_acts_by_decoder_norm."""
    W = weights("b_enc", *(["topk_threshold"] if architecture == "batchtopk" else []))
    made = SparseCoder.load(saelens(tmp_path / "c", W, architecture, k=5.0, rescale_acts_by_decoder_norm=True))
    norm = W["W_dec"].norm(dim=1)
    pre = ((X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]) * norm
    z = naive.topk(pre, 5) if architecture == "topk" else pre.relu() * (pre > W["topk_threshold"])
    assert close(made.encode(X), z)
    assert close(made(X), (z / norm) @ W["W_dec"] + W["b_dec"])


def test_jumprelu(tmp_path):
    W = weights("b_enc", "threshold")
    made = SparseCoder.load(saelens(tmp_path / "c", W, "jumprelu"))
    pre = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    assert close(made.encode(X), pre * (pre > W["threshold"]))


def test_gated(tmp_path):
    W = weights("b_gate", "r_mag", "b_mag")
    made = SparseCoder.load(saelens(tmp_path / "c", W, "gated"))
    x = (X - W["b_dec"]) @ W["W_enc"]
    z = (x + W["b_gate"] > 0) * (x * W["r_mag"].exp() + W["b_mag"]).relu()
    assert close(made.encode(X), z)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_transcoders(tmp_path, skip, jump):
    d_out = 5
    names = ["b_enc", *(["threshold"] if jump else []), *(["W_skip"] if skip else [])]
    W = weights(*names, d_out=d_out)
    name = f"{'jumprelu_' if jump else ''}{'skip_' if skip else ''}transcoder"
    sites = {"hook_name": "blocks.2.hook_normalized_input", "hook_name_out": "blocks.2.mixer.hook_z"}
    options = {"apply_b_dec_to_input": False, "d_out": d_out, "metadata": sites}
    made = SparseCoder.load(saelens(tmp_path / "c", W, name, **options))
    pre = X @ W["W_enc"] + W["b_enc"]
    z = pre.relu() * (pre > W["threshold"]) if jump else pre.relu()
    y = z @ W["W_dec"] + W["b_dec"] + (X @ W["W_skip"].t() if skip else 0)
    assert close(made(X), y)
    cfg = made.cfg
    assert (cfg.in_site, cfg.out_site) == ("blocks.2.norm.hook_out", "blocks.2.mixer.hook_z")
    assert (cfg.reads, cfg.target) == ("normalized", "block")


def test_before_version_6(tmp_path):
    W = weights("b_enc") | {"scaling_factor": torch.ones(F)}
    folder = saelens(tmp_path / "c", W, "standard")
    old = {
        "d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.4.hook_ssm_input", "model_name": "mamba",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    made = SparseCoder.load(folder)
    assert (made.cfg.architecture, made.k, made.cfg.in_site) == ("topk", 3, "blocks.4.mixer.hook_x")
    assert close(made.encode(X), naive.topk((X - W["b_dec"]) @ W["W_enc"] + W["b_enc"], 3))
    save_file(W | {"scaling_factor": torch.full((F,), 2.0)}, folder / "sae_weights.safetensors")
    with pytest.raises(CoderFileError, match="scaling_factor other than 1"):
        SparseCoder.load(folder)


def test_our_jumprelu_export_is_read_without_our_key(tmp_path):
    from tests.saes.coders import activations, coder

    made = coder("matryoshka", "skip", dtype=torch.float32)
    folder = made.save(tmp_path / "c")
    change(folder, hooked_mamba=...)
    back = SparseCoder.load(folder)
    x = activations(9, 12, dtype=torch.float32)
    assert back.cfg.architecture == "jumprelu"
    assert torch.equal(back.encode(x), made.encode(x))
    assert torch.allclose(back(x), made(x))


def test_recurrentlens(tmp_path):
    W = weights("b_enc")
    pre = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    made = SparseCoder.load(recurrentlens(tmp_path / "a.safetensors", W, "vanilla"))
    assert close(made.encode(X), pre.relu())
    assert made.cfg.in_site == "blocks.2.mixer.hook_out_proj"
    assert made.cfg.model_name == "state-spaces/mamba-130m-hf"
    path = recurrentlens(tmp_path / "b.safetensors", W, "topk", hook_site="ssm_h_t")
    with pytest.raises(CoderFileError, match="recurrentlens does not save k; give k="):
        SparseCoder.load(path)
    assert close(SparseCoder.load(path, k=3).encode(X), naive.topk(pre, 3))
    jump = W | {"log_theta": torch.linspace(-3, 1, F)}
    folder = tmp_path / "repo"
    folder.mkdir()
    recurrentlens(folder / "sae.safetensors", jump, "jumprelu")
    assert close(SparseCoder.load(folder).encode(X), pre * (pre > jump["log_theta"].exp()))
    assert open_coder(folder).format == "recurrentlens"


@pytest.mark.parametrize(("name", "site"), [
    ("layers.3.mixer", "blocks.3.mixer.hook_out_proj"), ("layers.0", "blocks.0.hook_resid_post"),
    ("backbone.layers.11", "blocks.11.hook_resid_post"), ("model.layers.2.norm", "blocks.2.norm.hook_out"),
    ("embeddings", "hook_embed"),
])  # fmt: skip
def test_sparsify(tmp_path, name, site):
    folder = sparsify(tmp_path / name)
    W = load_file(folder / "sae.safetensors")
    made = SparseCoder.load(folder)
    z = naive.topk((X - W["b_dec"]) @ W["encoder.weight"].t() + W["encoder.bias"], 4)
    assert close(made.encode(X), z)
    assert close(made(X), z @ W["W_dec"] + W["b_dec"])
    assert made.cfg.in_site == site
    assert open_coder(folder).format == "sparsify"


def test_sparsify_transcoder(tmp_path):
    folder = sparsify(tmp_path / "layers.1.mixer", skip=True, transcode=True, num_latents=0, expansion_factor=1)
    with pytest.raises(CoderFileError, match=r"encoder.weight in .* has shape \[16, 6\], expected \[6, 6\]"):
        SparseCoder.load(folder)
    change(folder, num_latents=F)
    W = load_file(folder / "sae.safetensors")
    made = SparseCoder.load(folder)
    z = naive.topk(X @ W["encoder.weight"].t() + W["encoder.bias"], 4)
    assert close(made(X), z @ W["W_dec"] + W["b_dec"] + X @ W["W_skip"].t())
    assert (made.cfg.in_site, made.cfg.out_site) == ("blocks.1.norm.hook_out", "blocks.1.mixer.hook_out_proj")


def test_half_precision_is_read_as_float32(tmp_path):
    made = SparseCoder.load(sparsify(tmp_path / "layers.3", dtype=torch.bfloat16))
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_float8_of_others_is_refused(tmp_path):
    """It may need a scale that is not there."""
    folder = sparsify(tmp_path / "layers.3", dtype=torch.float8_e4m3fn)
    with pytest.raises(
        CoderFileError, match="has dtype float8_e4m3fn, expected one of float16, bfloat16, float32, float64"
    ):
        SparseCoder.load(folder)


def test_sites_of_other_models_must_be_named(tmp_path):
    folder = saelens(tmp_path / "c", weights("b_enc"), "standard", metadata={"hook_name": "blocks.5.hook_attn_in"})
    with pytest.raises(
        CoderFileError, match=r"names the site 'blocks.5.hook_attn_in', which no model here.*give in_site="
    ):
        SparseCoder.load(folder)
    assert SparseCoder.load(folder, in_site="blocks.5.mixer.hook_y_gated").cfg.layer == 5
    with pytest.raises(CoderFileError, match="target='block' is for MambaCoders"):
        SparseCoder.load(folder, in_site="blocks.5.hook_resid_post", target="block")
    moved = sparsify(tmp_path / "layers.3.mlp")
    with pytest.raises(CoderFileError, match=r"names the site 'layers.3.mlp'"):
        SparseCoder.load(moved)


def test_saved_again_it_is_ours(tmp_path):
    made = SparseCoder.load(sparsify(tmp_path / "layers.3"))
    back = SparseCoder.load(made.save(tmp_path / "ours"))
    assert back.cfg == made.cfg
    assert torch.equal(back(X), made(X))
    assert Path(tmp_path / "ours" / "cfg.json").is_file()
