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


def changed(**values):
    """A coder some of whose numbers are others: by tensor, what changes it in place."""
    made = coder("topk", "skip", dtype=torch.float64)
    with torch.no_grad():
        for name, change in values.items():
            change(getattr(made, name))
    return made


def test_what_float8_cannot_hold_is_not_written(tmp_path):
    cases = {
        "W_dec has numbers up to 1000, beyond float8_e4m3fn's 448; use bfloat16": {"W_dec": lambda W: W[3].fill_(1e3)},
        r"rounding W_enc to float8.* would miss \d+\.\d% of its norm.*float16": {"W_enc": lambda W: W.div_(1000)},
        "rounding W_skip to float8_e4m3fn would miss 100.0%": {"W_skip": lambda W: W.fill_(1e-300)},
        "rounding W_enc to float8_e4m3fn would take most of 3 of 40 latents": {"W_enc": lambda W: W[:, :3].mul_(1e-3)},
        "rounding W_dec to float8_e4m3fn would take most of 2 of 40 latents": {"W_dec": lambda W: W[5:7].mul_(1e-3)},
        r"b_enc has numbers up to 1e\+300, beyond float32's .*; use float64": {"b_enc": lambda b: b.fill_(1e300)},
        "W_dec holds numbers that are not finite": {"W_dec": lambda W: W[0, 0].fill_(float("inf"))},
    }
    for message, change in cases.items():
        with pytest.raises(CoderFileError, match=message):
            changed(**change).save(tmp_path / "x", dtype="float8_e4m3fn")
    assert os.listdir(tmp_path) == []
    nothing = changed(W_skip=lambda W: W.zero_(), W_enc=lambda W: W[:, 2].zero_())
    back = SparseCoder.load(nothing.save(tmp_path / "x", dtype="float8_e4m3fn"))
    assert not back.W_skip.any()
    assert not back.W_enc[:, 2].any()


def test_float8_is_a_format_of_files_alone(tmp_path):
    folder = coder("topk", dtype=torch.float32).save(tmp_path / "c", dtype="float8_e4m3fn")
    with pytest.raises(CoderFileError, match="'float8_e4m3fn': float8_e4m3fn is a format of files alone; leave it out"):
        SparseCoder.load_from_disk(folder, dtype="float8_e4m3fn")
    with pytest.raises(CoderFileError, match="got 'float8'; nearest: 'float8_e4m3fn'"):
        SparseCoder.load(folder).save(tmp_path / "d", dtype="float8")
    moved = SparseCoder.load(folder).to(torch.float8_e4m3fn)
    assert torch.equal(SparseCoder.load(moved.save(tmp_path / "e")).W_enc, SparseCoder.load(folder).W_enc)


def test_what_rounds_to_a_format_s_largest_number_is_written(tmp_path):
    made = changed(W_enc=lambda W: W[0, 0].fill_(65510.0))
    assert float(SparseCoder.load(made.save(tmp_path / "c", dtype="float16")).W_enc[0, 0].detach()) == 65504


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
