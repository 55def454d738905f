"""Files that are wrong, each in one way: each is a clear error, none is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saes import SparseCoder
from saes.files import CoderFileError
from tests.saes.coders import coder
from tests.saes.files.formats import F, change, recurrentlens, retensor, saelens, sparsify, weights

NAN, INF = math.nan, math.inf


def set_at(index: tuple[int, ...], value: float) -> Callable:
    def setter(tensor):
        tensor[index] = value
        return tensor

    return setter


def config(**fields) -> Callable[[Path], None]:
    return lambda folder: change(folder, **fields)


def ours(**fields) -> Callable[[Path], None]:
    return config(**{f"hooked_mamba__{name}": value for name, value in fields.items()})


def tensors(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        try:
            retensor(folder / "sae_weights.safetensors", **changes)
        except KeyError as error:
            if error.args == (torch.complex64,):
                pytest.skip("this version of safetensors writes no complex numbers")
            raise

    return change


def write(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def raw_safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def cut(size: int) -> Callable[[Path], None]:
    def cutting(folder):
        path = folder / "sae_weights.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return cutting


def link(name: str, target: str) -> Callable[[Path], None]:
    def linking(folder):
        outside = folder.parent / "outside"
        outside.mkdir()
        for file in folder.iterdir():
            (outside / file.name).write_bytes(file.read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return linking


def pickled(folder: Path) -> None:
    torch.save(coder("topk").state_dict(), folder / "sae_weights.safetensors")


def flipped(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def as_folder(name: str) -> Callable[[Path], None]:
    def making(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return making


def as_pipe(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")


HUGE = 10**15
entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

OURS = {
    "no config": (lambda f: (f / "cfg.json").unlink(), "cfg.json is not there"),
    "no weights": (lambda f: (f / "sae_weights.safetensors").unlink(), "has no coder: expected cfg.json and"),
    "config is empty": (write("cfg.json", ""), "is not valid JSON"),
    "config is no JSON": (write("cfg.json", "architecture: topk"), "is not valid JSON"),
    "config is binary": (write("cfg.json", b"\xff\xfe\x00\x80"), "is not valid JSON"),
    "config is a list": (write("cfg.json", "[]"), "holds a list; expected an object"),
    "config nests too deep": (write("cfg.json", '{"a":' * 100_000), "is not valid JSON"),
    "config with an odd float": (write("cfg.json", '{"a": {"__float__": []}}'), "cfg.json: float"),
    "config is a folder": (as_folder("cfg.json"), "is a folder; expected a file"),
    "config is a pipe": (as_pipe, "is no regular file"),
    "config leads elsewhere": (link("cfg.json", "../outside/cfg.json"), "link that leads out of its folder"),
    "config leads to the system": (link("cfg.json", "/etc/passwd"), "link that leads out of its folder"),
    "weights lead elsewhere": (
        link("sae_weights.safetensors", "../outside/sae_weights.safetensors"), "link that leads out of its folder",
    ),
    "weights lead nowhere": (link("sae_weights.safetensors", "gone"), "which is not there"),
    "weights are a folder": (as_folder("sae_weights.safetensors"), "is a folder; expected a file"),
    "weights are a pickle": (pickled, "is not a safetensors file"),
    "weights are text": (write("sae_weights.safetensors", "hello, world"), "is not a safetensors file"),
    "weights are empty": (write("sae_weights.safetensors", b""), "is empty"),
    "weights are a git-lfs pointer": (
        write("sae_weights.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git-lfs pointer",
    ),
    "weights end in their header": (cut(40), "is truncated: its header alone"),
    "weights end early": (cut(-7), "is truncated: expected"),
    "weights go on too long": (lambda f: write("sae_weights.safetensors",
        (f / "sae_weights.safetensors").read_bytes() + b"more")(f), "longer than its header says"),
    "a header of huge length": (
        write("sae_weights.safetensors", struct.pack("<Q", 2**62) + b"{"), "is not a safetensors file",
    ),
    "a header that is no JSON": (write("sae_weights.safetensors", raw_safetensors(b"{nope")), "header does not read"),
    "a header without offsets": (
        write("sae_weights.safetensors", raw_safetensors({"W_enc": {"dtype": "F32", "shape": [1]}})),
        "header does not read",
    ),
    "a tensor of a huge claimed shape": (
        write("sae_weights.safetensors", raw_safetensors({"W_enc": entry | {"shape": [HUGE, HUGE]}}, b"\0" * 16)),
        "does not read as safetensors",
    ),
    "a tensor of an unknown dtype": (
        write("sae_weights.safetensors", raw_safetensors({"W_enc": entry | {"dtype": "F31"}}, b"\0" * 16)),
        "does not read as safetensors",
    ),
    "offsets that run backwards": (
        write("sae_weights.safetensors", raw_safetensors({"W_enc": entry | {"data_offsets": [16, 16]}}, b"\0" * 16)),
        "does not read as safetensors",
    ),
    "W_enc is missing": (tensors(W_enc=...), "missing W_enc"),
    "a tensor too many": (tensors(extra=torch.zeros(2)), "unexpected 'extra'"),
    "a tensor by another name": (tensors(b_enc=..., b_emc=torch.zeros(40)), "unexpected 'b_emc'; nearest: 'b_enc'"),
    "a name that is a path": (tensors(**{"../../W": torch.zeros(1)}), r"unexpected '\.\./\.\./W'"),
    "W_enc is transposed": (tensors(W_enc=lambda t: t.t()), r"W_enc in .* shape \[40, 12\], expected \[12, 40\]"),
    "W_dec lacks a row": (tensors(W_dec=lambda t: t[1:]), r"W_dec in .* shape \[39, 12\], expected \[40, 12\]"),
    "b_dec has an axis too many": (tensors(b_dec=lambda t: t[None]), r"b_dec in .* shape \[1, 12\], expected \[12\]"),
    "b_enc is empty": (tensors(b_enc=lambda t: t[:0]), r"b_enc in .* shape \[0\], expected \[40\]"),
    "a threshold that TopK has not": (tensors(threshold=torch.zeros(40)), "unexpected 'threshold'"),
    "NaN": (tensors(W_enc=set_at((3, 2), NAN)), "W_enc in .* has 1 of 480 numbers that are not finite"),
    "infinity": (tensors(b_dec=set_at((0,), INF)), "b_dec in .* has 1 of 12 numbers that are not finite"),
    "whole numbers": (tensors(W_dec=lambda t: t.int()), "W_dec in .* has dtype int32, expected one of float16"),
    "truth values": (tensors(b_enc=lambda t: t > 0), "b_enc in .* has dtype bool, expected"),
    "complex numbers": (tensors(W_dec=lambda t: t.to(torch.complex64)), "has dtype complex64, expected"),
    "another dtype than said": (tensors(W_enc=lambda t: t.half()), "W_enc in .* is float16, cfg.json says float32"),
    "a dtype that is not there": (config(dtype="float16"), "is float32, cfg.json says float16"),
    "an unknown dtype": (config(dtype="float8"), "dtype in .* must be one of float16.*got 'float8'; nearest:"),
    "float8 that is not there": (ours(stored="float8_e4m3fn"), "is float32, cfg.json says float8_e4m3fn"),
    "stored in two ways": (ours(stored="float16"), "contradicts itself: dtype is float32, .*stored says float16"),
    "stored in no text": (ours(stored=["float8_e4m3fn"]), "has stored=.*expected a text"),
    "stored in a long text": (ours(stored="x" * 10_000), "has a stored of 10,000 characters, expected at most"),
    "stored in no known way": (ours(stored="int4"), "stored in .* must be one of float16.*got 'int4'"),
    "other weights": (tensors(W_enc=lambda t: t + 1), "is not the file that cfg.json was written with"),
    "one bit flipped": (flipped, "is not the file that cfg.json was written with"),
    "an unknown architecture": (ours(coder__architecture="topq"), "must be one of.*'topq'; nearest: 'topk'"),
    "another architecture there": (config(architecture="jumprelu"), "contradicts itself: architecture is 'jumprelu'"),
    "another architecture here": (ours(coder__architecture="standard", coder__k=None), "contradicts itself: architec"),
    "another d_sae": (config(d_sae=41), "contradicts itself: d_sae is 41, hooked_mamba says 40"),
    "another k": (ours(coder__k=5), "contradicts itself: k is 4, hooked_mamba says 5"),
    "another d_in in both": (
        config(d_in=11, hooked_mamba__coder__d_in=11, hooked_mamba__coder__d_out=11), r"expected \[11, 40\]",
    ),
    "a huge d_sae in both": (
        config(d_sae=HUGE, hooked_mamba__coder__d_sae=HUGE), rf"shape \[12, 40\], expected \[12, {HUGE}\]",
    ),
    "a negative d_sae": (ours(coder__d_sae=-40), "d_sae=-40, expected a positive integer"),
    "a d_sae in words": (ours(coder__d_sae="forty"), "d_sae='forty', expected a positive integer"),
    "a fractional d_in": (ours(coder__d_in=12.0), r"d_in=12\.0, expected a positive integer"),
    "k is missing": (ours(coder__k=None), "topk needs k from 1 to d_sae=40, got None"),
    "k above d_sae": (ours(coder__k=41), "topk needs k from 1 to d_sae=40, got 41"),
    "k is true": (ours(coder__k=True), "k=True, expected an integer or null"),
    "a site that is none": (ours(coder__in_site="blocks.1.hook_resid_pst"), "full name of a hook site.*nearest"),
    "a site that is a path": (ours(coder__in_site="blocks.1/../../x"), "full name of a hook site"),
    "a site of no block": (ours(coder__in_site="blocks.one.hook_resid_post"), "full name of a hook site"),
    "a site of 2 MB": (ours(coder__in_site="x" * 2**21), "in_site of 2,097,152 characters"),
    "a layer that no model has": (
        ours(**dict.fromkeys(("coder__in_site", "coder__out_site"), "blocks.999999999999.hook_resid_post")),
        "full name of a hook site",
    ),
    "a model name of 2 MB": (ours(coder__model_name="x" * 2**21), "model_name of 2,097,152 characters"),
    "a tensor's name of 50 kB": (tensors(**{"x" * 50_000: torch.zeros(1)}), "unexpected 'xxx.*left out"),
    "metrics of 2 MB": (ours(metrics=["x" * 2**21]), "metrics=.*left out"),
    "a site that is a number": (ours(coder__in_site=7), "in_site=7, expected a text"),
    "other sites": (
        ours(coder__in_site="blocks.2.hook_resid_post", coder__out_site="blocks.2.hook_resid_post"),
        "contradicts itself: metadata.hook_name is 'blocks.1.hook_resid_post'",
    ),
    "an SAE that predicts elsewhere": (ours(coder__out_site="blocks.1.hook_resid_pre"), "a MambaCoder .* needs target"),
    "an unknown field": (ours(coder__d_saes=40), "no field 'd_saes'; nearest: 'd_sae'"),
    "a missing field": (ours(coder__d_out=...), "lacks d_out"),
    "an unknown field beside": (ours(coders={}), "unknown field hooked_mamba.coders; nearest: 'coder'"),
    "no coder": (ours(coder=...), "lacks coder"),
    "a coder that is a list": (ours(coder=[1]), r"coder=\[1\], expected an object"),
    "our key is a text": (config(hooked_mamba="yes"), "hooked_mamba='yes', expected an object"),
    "a later format": (ours(format=2), "is of format 2; this version reads format 1"),
    "a scale not folded": (ours(coder__input_norm="scale"), "input_norm='scale'; in a file it is folded"),
    "a skip that is not there": (ours(coder__skip=True), "contradicts itself: architecture"),
    "a model name that is a number": (ours(coder__model_name=5), "model_name=5, expected a text or null"),
    "metrics in words": (ours(metrics={"fvu": "good"}), "metrics are numbers by name, got 'fvu': 'good'"),
    "metrics that are a list": (ours(metrics=[1]), r"metrics=\[1\], expected numbers by name"),
    "widths of the nested in words": (ours(coder__matryoshka_widths=["5", "20"]), "'5' among its matryoshka_widths"),
    "widths that are one number": (ours(coder__matryoshka_widths=40), "matryoshka_widths=40, expected a list"),
    "no digest": (ours(weights_sha256=...), "lacks weights_sha256"),
    "no metadata": (config(metadata=...), "lacks metadata"),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_of_our_own(tmp_path, case):
    folder = coder("topk", dtype=torch.float32).save(tmp_path / "c")
    SparseCoder.load(folder)
    spoil, message = OURS[case]
    spoil(folder)
    with pytest.raises(CoderFileError, match=message) as error:
        SparseCoder.load(folder)
    assert len(str(error.value)) < 1500


def test_there_are_fifty():
    assert len(OURS) >= 50


def test_thresholds_that_differ_where_there_is_one(tmp_path):
    folder = coder("batchtopk", dtype=torch.float32).save(tmp_path / "c")
    tensors(threshold=set_at((4,), 0.9))(folder)
    with pytest.raises(CoderFileError, match="not the file"):
        SparseCoder.load(folder)
    digest = hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
    change(folder, hooked_mamba__weights_sha256=digest)
    with pytest.raises(CoderFileError, match=r"batchtopk, which has one threshold, but thresholds from 0\.6 to 0\.9"):
        SparseCoder.load(folder)


SAELENS = {
    "no architecture": ("standard", {"architecture": ...}, "lacks architecture"),
    "an unknown architecture": ("standard", {"architecture": "nonsense"}, "architecture 'nonsense', expected one of"),
    "no d_sae": ("standard", {"d_sae": ...}, "lacks d_sae"),
    "a d_in in words": ("standard", {"d_in": "six"}, "d_in='six', expected a positive integer"),
    "a d_sae of 0": ("standard", {"d_sae": 0}, "d_sae=0, expected a positive integer"),
    "TopK without k": ("topk", {}, "lacks k"),
    "a fractional k": ("topk", {"k": 2.5}, "k=2.5, expected a positive integer"),
    "k above d_sae": ("topk", {"k": 99}, "topk needs k from 1 to d_sae=16, got 99"),
    "inputs normalised": ("standard", {"normalize_activations": "layer_norm"}, "it shifts and divides each"),
    "an unknown dtype": ("standard", {"dtype": "float7"}, r"dtype in .*cfg\.json must .*got 'float7'; nearest"),
    "a dtype that is a number": ("standard", {"dtype": 32}, "dtype=32, expected a text"),
    "a layer that no model has": (
        "standard", {"metadata__hook_name": "blocks.999999999999.hook_resid_post"}, "which no model here",
    ),
    "a layer with leading zeros": ("standard", {"metadata__hook_name": "blocks.01.hook_resid_post"}, "no model here"),
    "a layer in other digits": ("standard", {"metadata__hook_name": "blocks.\u0661.hook_resid_post"}, "no model here"),
    "a hook name of 2 MB": ("standard", {"metadata__hook_name": "x" * 2**21}, r"names the site 'xxx.*left out"),
    "a model name of 2 MB": ("standard", {"metadata__model_name": "x" * 2**21}, "model_name of 2,097,152 characters"),
    "an architecture of 2 MB": ("standard", {"architecture": "x" * 2**21}, "architecture of 2,097,152 characters"),
    "a width of 2 MB": ("standard", {"d_in": "9" * 2**21}, "d_in of 2,097,152 characters"),
    "inputs normalised by their norm": (
        "standard", {"normalize_activations": "constant_norm_rescale"}, "each example by its own norm.*only.*SAELens",
    ),
    "inputs normalised by one factor": (
        "standard", {"normalize_activations": "expected_average_only_in"}, "not in the file. Give it, norm_factor=",
    ),
    "whitened inputs": (
        "standard", {"normalize_activations": "covariance_whitening"}, r"sae\.fold_activation_whitening\(mean",
    ),
    "inputs normalised oddly": ("standard", {"normalize_activations": "norm"}, "='norm'; expected 'none' or"),
    "heads": ("standard", {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'; expected 'none'"),
    "one head": ("standard", {"metadata__hook_head_index": 3}, "one attention head"),
    "centring in words": ("standard", {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input='no', expected"),
    "metadata that is a text": ("standard", {"metadata": "x", "sae_lens_version": "6.0"}, "metadata='x', expected"),
    "an odd version": ("standard", {"metadata__sae_lens_version": "six"}, "sae_lens_version='six', expected a version"),
    "no hook": ("standard", {"metadata__hook_name": ...}, "names the site None, which no model here"),
    "thresholds missing": ("jumprelu", {}, "missing threshold"),
    "a gated without its gate": ("gated", {}, "missing b_gate, b_mag, r_mag"),
    "a transcoder without d_out": ("transcoder", {"apply_b_dec_to_input": False}, "lacks d_out"),
    "an odd activation": (
        "standard", {"metadata__sae_lens_version": "5.9", "activation_fn_str": "tanh-relu"},
        "activation function 'tanh-relu'",
    ),
    "odd rescaling": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": "x"}, "expected true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAELENS)
def test_of_saelens(tmp_path, case):
    architecture, changes, message = SAELENS[case]
    folder = saelens(tmp_path / "c", weights("b_enc"), architecture)
    change(folder, **changes)
    with pytest.raises(CoderFileError, match=message) as error:
        SparseCoder.load(folder)
    assert len(str(error.value)) < 1500
    assert "fold it" not in str(error.value)


def test_faults_of_tensors_name_the_file_of_the_tensors(tmp_path):
    folder = saelens(tmp_path / "c", weights("b_enc"), "standard")
    path = folder / "sae_weights.safetensors"
    retensor(path, W_enc=lambda t: t.t())
    with pytest.raises(CoderFileError, match=r"W_enc in .*sae_weights\.safetensors has shape \[16, 6\]"):
        SparseCoder.load(folder)
    retensor(path, W_enc=lambda t: t.t(), W_skip=torch.zeros(6, 6))
    with pytest.raises(CoderFileError, match=r"sae_weights\.safetensors does not hold .* unexpected 'W_skip'"):
        SparseCoder.load(folder)


@pytest.mark.parametrize("kind", ["ours", "saelens", "sparsify", "inside"])
def test_a_key_twice(tmp_path, kind):
    if kind == "sparsify":
        folder = sparsify(tmp_path / "layers.3")
    elif kind == "saelens":
        folder = saelens(tmp_path / "c", weights("b_enc"), "standard")
    else:
        folder = coder("topk", dtype=torch.float32).save(tmp_path / "c")
    path = folder / "cfg.json"
    text = path.read_text()
    key = '"hook_name"' if kind == "inside" else '"d_in"'
    at = text.index(key)
    path.write_text(f"{text[:at]}{key}: 7, {text[at:]}")
    with pytest.raises(CoderFileError, match=rf"cfg\.json has the key '{key[1:-1]}' twice in one object"):
        SparseCoder.load(folder)


def test_a_factor_where_there_is_none(tmp_path):
    ours = coder("topk", dtype=torch.float32).save(tmp_path / "ours")
    with pytest.raises(CoderFileError, match=r"norm_factor= is for SAELens' coders, .* is of hooked_mamba"):
        SparseCoder.load(ours, norm_factor=2.0)
    plain = saelens(tmp_path / "plain", weights("b_enc"), "standard")
    with pytest.raises(CoderFileError, match="norm_factor= is for 'expected_average_only_in'"):
        SparseCoder.load(plain, norm_factor=2.0)
    for wrong in (0, -1.0, NAN, INF):
        with pytest.raises(CoderFileError, match="norm_factor must be a number above 0"):
            SparseCoder.load(plain, norm_factor=wrong)


def test_of_saelens_a_transcoder_that_centres_or_reads_elsewhere(tmp_path):
    sites = {"hook_name": "blocks.2.mixer.hook_x", "hook_name_out": "blocks.2.mixer.hook_out_proj"}
    folder = saelens(tmp_path / "c", weights("b_enc"), "transcoder", d_out=6, metadata=sites)
    with pytest.raises(CoderFileError, match=r"a MambaCoder reads blocks.0.norm.hook_out or blocks.0.hook_resid_pre"):
        SparseCoder.load(folder)
    with pytest.raises(CoderFileError, match="apply_b_dec_to_input is for SAEs"):
        SparseCoder.load(folder, in_site="blocks.2.norm.hook_out")


RECURRENTLENS = {
    "no variant": ({"variant": None}, "does not say what it is"),
    "an unknown variant": ({"variant": "gated"}, "variant='gated', expected one of vanilla, topk, jumprelu"),
    "no d_in": ({"d_in": None}, "d_in=None, expected a whole number from 1"),
    "a negative d_in": ({"d_in": "-6"}, "d_in='-6', expected a whole number"),
    "a huge d_sae": ({"d_sae": "9" * 5000}, "expected a whole number"),
    "another d_sae": ({"d_sae": "17"}, r"has shape \[6, 16\], expected \[6, 17\]"),
    "an unknown site": ({"hook_site": "in_proj"}, "hook_site='in_proj', expected one of out_proj_out, ssm_h_t"),
    "a layer in words": ({"layer": "two"}, "layer='two', expected a whole number from 0"),
    "a jumprelu without thresholds": ({"variant": "jumprelu"}, "missing log_theta"),
}


@pytest.mark.parametrize("case", RECURRENTLENS)
def test_of_recurrentlens(tmp_path, case):
    header, message = RECURRENTLENS[case]
    path = recurrentlens(tmp_path / "a.safetensors", weights("b_enc"), **{"variant": "vanilla"} | header)
    with pytest.raises(CoderFileError, match=message):
        SparseCoder.load(path)


def test_of_recurrentlens_thresholds_beyond_float32(tmp_path):
    W = weights("b_enc") | {"log_theta": torch.full((F,), 100.0)}
    with pytest.raises(CoderFileError, match="thresholds beyond float32"):
        SparseCoder.load(recurrentlens(tmp_path / "a.safetensors", W, "jumprelu"))


SPARSIFY = {
    "groups": ({"activation": "relu"}, "activation='relu'; expected 'topk' or 'groupmax'"),
    "either sign": ({"signed": True}, "latents of either sign"),
    "no k": ({"k": ...}, "lacks k"),
    "a k of 0": ({"k": 0}, "k=0, expected a positive integer"),
    "no d_in": ({"d_in": ...}, "lacks d_in"),
    "a skip in words": ({"skip_connection": "yes"}, "skip_connection='yes', expected true or false"),
    "a skip that is not there": ({"skip_connection": True}, "missing W_skip"),
    "num_latents in words": ({"num_latents": "many"}, "num_latents='many', expected a positive integer"),
    "no width": ({"num_latents": 0, "expansion_factor": ...}, "lacks expansion_factor"),
    "a transcoder of a block": ({"transcode": True}, "names the site 'the input of layers.3', which no"),
}


@pytest.mark.parametrize("case", SPARSIFY)
def test_of_sparsify(tmp_path, case):
    changes, message = SPARSIFY[case]
    folder = sparsify(tmp_path / "layers.3")
    change(folder, **changes)
    with pytest.raises(CoderFileError, match=message):
        SparseCoder.load(folder)


ARCHIVES = {
    "no threshold": ({"threshold": None}, "sae.pt does not hold this coder's tensors: missing threshold"),
    "one more": ({"b_gate": torch.zeros(F)}, "sae.pt does not hold this coder's tensors: unexpected 'b_gate'"),
    "a vector for W_enc": ({"W_enc": torch.zeros(6)}, r"W_enc in .*sae.pt has shape \[6\], expected d x F"),
    "W_dec lying down": ({"W_dec": torch.zeros(6, F)}, r"W_dec in .*sae.pt has shape \[6, 16\], expected \[16, 6\]"),
    "a threshold for all": ({"threshold": torch.tensor(0.1)}, r"threshold in .*sae.pt has shape \[\], expected \[16\]"),
    "whole numbers": (
        {"b_dec": torch.zeros(6, dtype=torch.int32)},
        "b_dec in .*sae.pt has dtype int32, expected one of",
    ),
    "an infinity": ({"b_enc": torch.full((F,), INF)}, "b_enc in .*sae.pt has 16 of 16 numbers that are not finite"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_of_an_archive(case, tmp_path):
    changes, said = ARCHIVES[case]
    W = weights("b_enc", "threshold") | changes
    torch.save({name: value for name, value in W.items() if value is not None}, tmp_path / "sae.pt")
    with pytest.raises(CoderFileError, match=said):
        SparseCoder.load(tmp_path / "sae.pt", in_site="blocks.0.hook_resid_post")


def test_what_is_no_coder_at_all(tmp_path):
    with pytest.raises(CoderFileError, match="is not there; expected a coder's folder"):
        SparseCoder.load(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CoderFileError, match=r"has no coder: expected cfg.json and sae_weights.safetensors; found nothing"
    ):
        SparseCoder.load(tmp_path / "empty")
    inner = coder("topk").save(tmp_path / "many" / "one")
    with pytest.raises(CoderFileError, match="is not itself a coder; it contains the coders one"):
        SparseCoder.load(tmp_path / "many")
    with pytest.raises(CoderFileError, match="is one file of a coder; give its folder"):
        SparseCoder.load(inner / "cfg.json")
    torch.save({}, tmp_path / "sae.pt")
    with pytest.raises(
        CoderFileError, match="does not hold this coder's tensors: missing W_dec, W_enc, b_dec, b_enc, thr"
    ):
        SparseCoder.load(tmp_path / "sae.pt")
    torch.save({}, tmp_path / "sae.ckpt")
    with pytest.raises(CoderFileError, match="may contain code and is not read"):
        SparseCoder.load(tmp_path / "sae.ckpt")


def test_links_within_the_hub_clients_cache_are_followed(tmp_path):
    made = coder("topk", dtype=torch.float32)
    folder = made.save(tmp_path / "models--a--b" / "snapshots" / "abc" / "one")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for i, name in enumerate(("cfg.json", "sae_weights.safetensors")):
        (folder / name).rename(blobs / str(i))
        (folder / name).symlink_to(f"../../../blobs/{i}")
    assert torch.equal(SparseCoder.load(folder).W_enc, made.W_enc)
    (blobs / "0").rename(tmp_path / "0")
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").symlink_to("../../../../0")
    with pytest.raises(CoderFileError, match="link that leads out of its folder"):
        SparseCoder.load(folder)
