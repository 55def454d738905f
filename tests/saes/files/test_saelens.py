"""Our directories read by SAELens itself, and its own read here."""

from __future__ import annotations

import pytest
import torch

from saes import SparseCoder
from saes.config import ARCHITECTURES
from saes.files.saelens import saelens_reads
from tests.saes.coders import activations, coder

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

X = activations(40, 12, dtype=torch.float32)


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens")


@pytest.mark.parametrize("kind", ["sae", "mambacoder", "skip"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_reads_what_we_write(sae_lens, tmp_path, architecture, kind):
    made = coder(architecture, kind, dtype=torch.float32, model_name="state-spaces/mamba-130m-hf")
    folder = made.save(tmp_path / "c")
    if not saelens_reads(made.cfg):
        assert architecture in ("topk", "gated")
        assert kind != "sae"
        with pytest.raises(KeyError, match=f"{architecture}_.*transcoder"):
            sae_lens.SAE.load_from_disk(folder)
        return
    theirs = sae_lens.SAE.load_from_disk(folder)
    z = made.encode(X)
    assert int((z != 0).sum()) > 0
    assert torch.allclose(theirs.encode(X), z, rtol=1e-5, atol=1e-6)
    assert torch.allclose(theirs(X), made(X), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == made.cfg.in_site
    assert theirs.cfg.metadata.model_name == "state-spaces/mamba-130m-hf"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_it_reads_half_precision_and_less(sae_lens, tmp_path, dtype):
    folder = coder("batchtopk", "mambacoder", dtype=torch.float32).save(tmp_path / "c", dtype=dtype)
    theirs = sae_lens.SAE.load_from_disk(folder, dtype="float32")
    back = SparseCoder.load(folder)
    assert torch.equal(theirs.W_dec, back.W_dec)
    assert torch.allclose(theirs(X), back(X), rtol=1e-5, atol=1e-5)


def theirs_of(sae_lens, architecture: str):
    """One of SAELens' own, with random values everywhere."""
    name = {
        "topk": "TopK",
        "abstopk": "AbsTopK",
        "jumprelu": "JumpReLU",
        "standard": "Standard",
        "gated": "Gated",
        "transcoder": "Transcoder",
    }
    name |= {"skip_transcoder": "SkipTranscoder", "jumprelu_transcoder": "JumpReLUTranscoder"}
    name |= {"jumprelu_skip_transcoder": "JumpReLUSkipTranscoder"}
    kind = name[architecture]
    transcoder = "Transcoder" in kind
    options = {"k": 3} if "topk" in architecture else {}
    if transcoder:
        options |= {"d_out": 12, "apply_b_dec_to_input": False}
    suffix = "" if transcoder else "SAE"
    cfg = getattr(sae_lens, f"{kind}{suffix}Config")(d_in=12, d_sae=40, **options)
    cfg.metadata.hook_name = "blocks.1.norm.hook_out" if transcoder else "blocks.1.hook_resid_post"
    if transcoder:
        cfg.metadata.hook_name_out = "blocks.1.mixer.hook_out_proj"
    made = getattr(sae_lens, f"{kind}{suffix}")(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3))
    return made


@pytest.mark.parametrize("architecture", [
    "standard", "topk", "abstopk", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
])  # fmt: skip
def test_we_read_what_it_writes(sae_lens, tmp_path, architecture):
    theirs = theirs_of(sae_lens, architecture)
    theirs.save_model(tmp_path / "c")
    back = SparseCoder.load(tmp_path / "c")
    z = theirs.encode(X)
    assert int((z != 0).sum()) > 0
    assert torch.allclose(back.encode(X), z, rtol=1e-5, atol=1e-5)
    assert torch.allclose(back(X), theirs(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", [
    "standard", "topk", "abstopk", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
])  # fmt: skip
def test_in_float64_to_rounding(sae_lens, tmp_path, architecture):
    theirs = theirs_of(sae_lens, architecture).double()
    theirs.cfg.dtype, theirs.dtype = "float64", torch.float64
    theirs.save_model(tmp_path / "c")
    x, back = X.double(), SparseCoder.load(tmp_path / "c")
    assert back.dtype == torch.float64
    assert float((back.encode(x) - theirs.encode(x)).abs().max()) < 1e-13
    assert float((back(x) - theirs(x)).abs().max()) < 1e-12


def test_what_we_cannot_say_is_refused_by_name(sae_lens, tmp_path):
    from sae_lens.registry import SAE_CLASS_REGISTRY

    from saes.files.saelens import READ, REFUSED

    assert set(SAE_CLASS_REGISTRY) <= set(READ) | set(REFUSED)
    cfg = sae_lens.MatchingPursuitSAEConfig(d_in=12, d_sae=40)
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae_lens.MatchingPursuitSAE(cfg).save_model(tmp_path / "c")
    with pytest.raises(ValueError, match="'matching_pursuit', which chooses one latent after the other"):
        SparseCoder.load(tmp_path / "c")


def test_a_path_of_modules_is_found_in_the_model(sae_lens, tmp_path):
    from hooked_mamba import load_model
    from saes import load_coder

    theirs = theirs_of(sae_lens, "jumprelu")
    theirs.cfg.metadata.hook_name = "backbone.layers.2.mixer"
    theirs.save_model(tmp_path / "c")
    with pytest.raises(ValueError, match=r"does not have with that width; give in_site="):
        load_coder(tmp_path / "c", load_model("tinystories-4l"))
    assert SparseCoder.load(tmp_path / "c").cfg.in_site == "blocks.2.mixer.hook_out_proj"


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_a_factor_is_folded_as_it_folds_it(sae_lens, tmp_path, architecture):
    theirs = theirs_of(sae_lens, architecture)
    theirs.cfg.normalize_activations = "expected_average_only_in"
    theirs.save_model(tmp_path / "c")
    theirs.fold_activation_norm_scaling_factor(1.7)
    back = SparseCoder.load(tmp_path / "c", norm_factor=1.7)
    assert torch.allclose(back.encode(X), theirs.encode(X), rtol=1e-5, atol=1e-5)
    assert torch.allclose(back(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_it_reads_the_numbers_of_a_training(sae_lens, tmp_path):
    made = coder("topk", dtype=torch.float32)
    made.save(tmp_path / "c", training={"text": "stories.txt", "context_length": 77})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "c")
    assert (theirs.cfg.metadata.context_size, theirs.cfg.metadata.prepend_bos) == (77, False)
    assert theirs.cfg.k == made.k
    assert theirs.cfg.rescale_acts_by_decoder_norm is False
    assert theirs.cfg.normalize_activations == "none"


def test_we_read_a_batchtopk_in_training_and_after(sae_lens, tmp_path):
    cfg = sae_lens.BatchTopKTrainingSAEConfig(d_in=12, d_sae=40, k=3)
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    theirs = sae_lens.BatchTopKTrainingSAE(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3))
        theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "after")
    after = sae_lens.SAE.load_from_disk(tmp_path / "after")
    for name in ("training", "after"):
        back = SparseCoder.load(tmp_path / name)
        assert torch.allclose(back.encode(X), after.encode(X), rtol=1e-5, atol=1e-5)
        assert torch.allclose(back(X), after(X), rtol=1e-5, atol=1e-5)
    assert int((after.encode(X) != 0).sum()) > 0
