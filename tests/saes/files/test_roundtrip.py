"""What is saved is what is loaded: every architecture, kind, skip and number format."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooked_mamba.durable import DiskFullError
from saes import SAE, MambaCoder, SparseCoder
from saes.config import ARCHITECTURES, NEEDS_K
from saes.files import CoderFileError, open_coder
from saes.files.save import write_files
from saes.find import PRETRAINED
from tests.saes.coders import activations, coder

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LESS = HALF | {"float8_e4m3fn": torch.float8_e4m3fn}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from(ARCHITECTURES), kind=st.sampled_from(["sae", "mambacoder", "skip"]),
    dtype=st.sampled_from([torch.float32, torch.float64]), sizes=st.tuples(st.integers(1, 9), st.integers(8, 30)),
    norm=st.sampled_from(["none", "scale"]), name=st.none() | st.text(max_size=12), centred=st.booleans(),
)  # fmt: skip
def test_every_coder_comes_back(tmp_path_factory, architecture, kind, dtype, sizes, norm, name, centred):
    d, F = sizes
    options = {"apply_b_dec_to_input": centred} if kind == "sae" else {}
    made = coder(architecture, kind, dtype=dtype, d=d, F=F, k=3, input_norm=norm, model_name=name, **options)
    folder = made.save(tmp_path_factory.mktemp("coder") / "inner" / "one")
    before = torch.get_rng_state()
    back = SparseCoder.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert back.cfg == made.fold().cfg
    expected = made.fold().state_dict()
    assert {k: v.dtype for k, v in back.state_dict().items()} == dict.fromkeys(expected, dtype)
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())
    assert back.W_enc.t().is_contiguous()
    assert [(n, p.requires_grad) for n, p in back.named_parameters()] == [(n, True) for n, _ in made.named_parameters()]
    x = activations(5, d, dtype=dtype)
    assert torch.equal(back(x), made.fold()(x))
    assert sorted(os.listdir(folder)) == ["cfg.json", "sae_weights.safetensors"]
    assert os.listdir(folder.parent) == ["one"]


def test_a_sae_with_a_skip_comes_back(tmp_path):
    made = SparseCoder(coder("topk").cfg.replace(skip=True), seed=0)
    torch.nn.init.normal_(made.W_skip)
    back = SparseCoder.load(made.save(tmp_path / "c"))
    x = activations(3, 12, dtype=torch.float32)
    assert torch.equal(back(x), made(x))


@pytest.mark.parametrize("dtype", LESS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_and_less_on_disk(tmp_path, architecture, dtype):
    made = coder(architecture, "skip", dtype=torch.float32)
    folder = made.save(tmp_path / "half", dtype=dtype)
    back = SparseCoder.load(folder)
    for name, value in made.state_dict().items():
        expected = value.to(LESS[dtype]).float() if name.startswith("W_") else value
        assert torch.equal(back.state_dict()[name], expected)
        assert back.state_dict()[name].dtype == torch.float32
    whole = made.save(tmp_path / "whole")
    sizes = [(f / "sae_weights.safetensors").stat().st_size for f in (folder, whole)]
    assert sizes[0] < 0.8 * sizes[1]
    assert torch.equal(SparseCoder.load(made.save(tmp_path / "d", dtype=LESS[dtype])).W_enc, back.W_enc)


def test_what_a_dtype_cannot_hold_is_not_written(tmp_path):
    made = coder("topk", dtype=torch.float32)
    with torch.no_grad():
        made.W_dec[3, 2] = 1e6
    with pytest.raises(CoderFileError, match=r"W_dec has numbers up to 1e\+06, beyond float16's 65504; use bfloat16"):
        made.save(tmp_path / "x", dtype="float16")
    made.save(tmp_path / "x", dtype="bfloat16")
    with pytest.raises(CoderFileError, match=r"must be one of float16, bfloat16.*'float61'; nearest: 'float64'"):
        made.save(tmp_path / "y", dtype="float61")
    with torch.no_grad():
        made.b_enc[1] = float("nan")
    with pytest.raises(CoderFileError, match="b_enc holds numbers that are not finite"):
        made.save(tmp_path / "y")
    assert os.listdir(tmp_path) == ["x"]


def test_what_float8_cannot_hold_is_not_written(tmp_path):
    made = coder("topk", dtype=torch.float32)
    small = SparseCoder(made.cfg)
    small.load_state_dict(made.state_dict())
    with torch.no_grad():
        made.W_dec[3, 2] = 1e3
        small.W_enc /= 1000
    with pytest.raises(CoderFileError, match="W_dec has numbers up to 1000, beyond float8_e4m3fn's 448"):
        made.save(tmp_path / "x", dtype="float8_e4m3fn")
    with pytest.raises(CoderFileError, match=r"rounding W_enc to float8.* would miss \d+\.\d% of its norm.*float16"):
        small.save(tmp_path / "x", dtype="float8_e4m3fn")
    with pytest.raises(CoderFileError, match="dtype must be one of float16, bfloat16, float32, float64, got"):
        SparseCoder.load_from_disk(PRETRAINED / "tinystories-4l/l2-out", dtype="float8_e4m3fn")
    assert os.listdir(tmp_path) == []


def test_the_thin_classes_check_the_kind(tmp_path):
    sae, other = coder("jumprelu").save(tmp_path / "a"), coder("jumprelu", "mambacoder").save(tmp_path / "b")
    assert type(SAE.load(sae)) is SAE
    assert type(MambaCoder.load(other)) is MambaCoder
    with pytest.raises(ValueError, match="an SAE's in_site and out_site are the same"):
        SAE.load(other)
    with pytest.raises(ValueError, match="reads and predicts different sites"):
        MambaCoder.load(sae)


def test_metrics_are_kept_and_are_numbers(tmp_path):
    made = coder("topk")
    folder = made.save(tmp_path / "c", metrics={"fvu": 0.25, "l0": 4, "ce_recovered": float("nan"), "huge": 10**400})
    assert open_coder(folder).metrics == {"fvu": 0.25, "l0": 4.0, "ce_recovered": None, "huge": None}
    with pytest.raises(CoderFileError, match="metrics are numbers by name, got 'fvu': '<b>'"):
        made.save(tmp_path / "d", metrics={"fvu": "<b>"})


def test_hints_must_agree_with_what_our_files_say(tmp_path):
    folder = coder("topk").save(tmp_path / "c")
    assert SparseCoder.load(folder, k=4, in_site="blocks.1.hook_resid_post").k == 4
    with pytest.raises(CoderFileError, match="has k=4, but k=5 was given"):
        SparseCoder.load(folder, k=5)
    with pytest.raises(TypeError, match="unknown options kk: a coder is loaded with k, in_site"):
        SparseCoder.load(folder, kk=5)


def test_saving_again_replaces_and_leaves_other_files(tmp_path):
    folder = coder("topk").save(tmp_path / "c")
    (folder / "README.md").write_text("mine")
    made = coder("gated", "skip")
    made.save(folder)
    assert SparseCoder.load(folder).cfg == made.cfg
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stop_in_the_midst_of_a_save_is_seen(tmp_path, monkeypatch, stop):
    old, new = coder("topk", dtype=torch.float32), coder("topk", dtype=torch.float32)
    with torch.no_grad():
        new.W_dec.mul_(2)
    folder = old.save(tmp_path / "c")
    replace, count = os.replace, 0

    def dying(source, target):
        nonlocal count
        if str(target).startswith(str(folder)):
            count += 1
            if count > stop:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    if stop < 2:
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)
    else:
        new.save(folder)
    if stop == 1:
        with pytest.raises(CoderFileError, match=r"is not the file that cfg.json was written with.*interrupted"):
            SparseCoder.load(folder)
    else:
        assert torch.equal(SparseCoder.load(folder).W_dec, (old, new)[stop // 2].W_dec)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = coder("topk").save(tmp_path / "c")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hooked_mamba.durable.write_through", full)
    with pytest.raises(DiskFullError, match="no room for"):
        coder("gated").save(folder)
    with pytest.raises(DiskFullError):
        coder("gated").save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["c"]
    assert SparseCoder.load(folder).cfg.architecture == "topk"


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoderFileError, match="file is a file; expected a folder"):
        coder("topk").save(tmp_path / "file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sae.safetensors").write_text("x")
    with pytest.raises(CoderFileError, match="another library's coder"):
        write_files(tmp_path / "theirs", {})


def test_the_config_says_what_saelens_wants(tmp_path):
    for architecture in ARCHITECTURES:
        for kind in ("sae", "mambacoder", "skip"):
            made = coder(architecture, kind)
            config = json.loads((made.save(tmp_path / architecture / kind) / "cfg.json").read_text())
            assert {"architecture", "d_in", "d_sae", "dtype", "metadata", "apply_b_dec_to_input"} <= set(config)
            assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
            plain = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(architecture, architecture)
            prefix = "" if plain == "standard" else f"{plain}_"
            expected = {"sae": plain, "mambacoder": f"{prefix}transcoder", "skip": f"{prefix}skip_transcoder"}[kind]
            assert config["architecture"] == expected
            assert ("d_out" in config) == (kind != "sae")
            assert ("k" in config) == (architecture == "topk")
            assert (architecture in NEEDS_K) == (config["hooked_mamba"]["coder"]["k"] == 4)
