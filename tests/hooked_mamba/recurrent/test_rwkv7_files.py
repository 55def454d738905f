"""RWKV-7's files: read and written in both forms, all sizes from shapes, other variants refused by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_mamba import HookedMamba, HookedRWKV7, load_model
from hooked_mamba.loading import CheckpointError, load_checkpoint
from hooked_mamba.loading.world_tokenizer import VOCABULARY
from hooked_mamba.recurrent_config import RWKV7Config
from tests.hooked_mamba.recurrent.models import build, tokens_for

RANKS = {"decay_rank": 5, "rate_rank": 2, "value_rank": 3, "gate_rank": 6}


@pytest.fixture(scope="module")
def model() -> HookedRWKV7:
    return build("rwkv7").float()


def raw_tensors(model, layer_0_value: bool = True) -> dict[str, torch.Tensor]:
    """The weights under the names and in the shapes of the authors' files, written out by hand."""
    w, cfg = model.state_dict(), model.cfg
    raw = {"emb.weight": w["embed.weight"], "head.weight": w["unembed.weight"]}
    for kind in ("weight", "bias"):
        raw[f"blocks.0.ln0.{kind}"] = w[f"ln_embed.{kind}"]
        raw[f"ln_out.{kind}"] = w[f"ln_final.{kind}"]
    for i in range(cfg.n_layers):
        b = f"blocks.{i}."
        for kind in ("weight", "bias"):
            raw[f"{b}ln1.{kind}"], raw[f"{b}ln2.{kind}"] = w[f"{b}norm.{kind}"], w[f"{b}norm2.{kind}"]
            raw[f"{b}att.ln_x.{kind}"] = w[f"{b}mixer.norm.{kind}"]
        for j in "rwkvag":
            raw[f"{b}att.x_{j}"] = w[f"{b}mixer.x_{j}"].view(1, 1, -1)
        for j in "wavg":
            for n in (1, 2):
                if f"{b}mixer.{j}{n}" in w:
                    raw[f"{b}att.{j}{n}"] = w[f"{b}mixer.{j}{n}"]
            if f"{b}mixer.{j}0" in w:
                raw[f"{b}att.{j}0"] = w[f"{b}mixer.{j}0"].view(1, 1, -1)
        for name in ("k_k", "k_a"):
            raw[f"{b}att.{name}"] = w[f"{b}mixer.{name}"].view(1, 1, -1)
        raw[f"{b}att.r_k"] = w[f"{b}mixer.r_k"]
        for name in ("receptance", "key", "value", "output"):
            raw[f"{b}att.{name}.weight"] = w[f"{b}mixer.{name}.weight"]
        raw[f"{b}ffn.x_k"] = w[f"{b}mlp.x_k"].view(1, 1, -1)
        for name in ("key", "value"):
            raw[f"{b}ffn.{name}.weight"] = w[f"{b}mlp.{name}.weight"]
    if layer_0_value:  # in official files; nothing reads them
        for name in ("v0", "v1", "v2"):
            raw[f"blocks.0.att.{name}"] = torch.randn_like(raw[f"blocks.1.att.{name}"])
    return {name: tensor.contiguous().clone() for name, tensor in raw.items()}


@pytest.fixture
def raw_file(model, tmp_path):
    path = tmp_path / "RWKV-tiny.pth"
    torch.save(raw_tensors(model), path)
    return path


@pytest.mark.parametrize("by", ["file", "folder", "text"])
def test_a_raw_file_is_read_without_a_config(model, raw_file, by):
    place = {"file": raw_file, "folder": raw_file.parent, "text": str(raw_file)}[by]
    loaded = HookedRWKV7.from_pretrained(place)
    assert loaded.cfg.n_layers == 2
    assert (loaded.cfg.d_model, loaded.cfg.d_vocab, loaded.cfg.K, loaded.cfg.F) == (12, 17, 4, 11)
    assert {name: getattr(loaded.cfg, name) for name in RANKS} == RANKS
    assert (loaded.cfg.bos_token_id, loaded.cfg.eos_token_id) == (0, 0)
    assert torch.equal(loaded(tokens_for()), model(tokens_for()))
    assert isinstance(load_model(place), HookedRWKV7)
    assert load_checkpoint(raw_file).cfg.model_name == "RWKV-tiny"


@pytest.mark.parametrize("format", ["raw", "hf"])
def test_written_files_are_read_back(model, tmp_path, format):
    model.save_pretrained(tmp_path / "out", format=format)
    again = load_model(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.cfg.head_eps == model.cfg.head_eps


def test_raw_files_are_those_of_the_authors(model, tmp_path):
    model.save_pretrained(tmp_path / "out", format="raw")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pth"]
    got = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    expected = raw_tensors(model, layer_0_value=False)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_hf_files_are_those_of_fla(model, tmp_path):
    """Names, shapes and the transposed projections, from fla's modelling file."""
    model.save_pretrained(tmp_path / "out", format="hf")
    got, w = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    attn = "model.layers.1.attn."
    assert torch.equal(got["model.layers.0.pre_norm.weight"], w["ln_embed.weight"])
    assert torch.equal(got[attn + "x_g"], w["blocks.1.mixer.x_g"].view(1, 1, -1))
    assert torch.equal(got[attn + "w_lora.lora.0.weight"], w["blocks.1.mixer.w1"].T)
    assert torch.equal(got[attn + "w_lora.lora.2.weight"], w["blocks.1.mixer.w2"].T)
    assert torch.equal(got[attn + "w_lora.lora.2.bias"], w["blocks.1.mixer.w0"])
    assert torch.equal(got[attn + "g_norm.bias"], w["blocks.1.mixer.norm.bias"])
    assert attn + "g_lora.lora.2.bias" not in got
    assert "model.layers.0.attn.v_lora.lora.0.weight" not in got
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"model_type": "rwkv7", "head_dim": 4, "a_low_rank_dim": 2, "v_low_rank_dim": 3, "norm_first": True}
    assert expected.items() <= config.items()
    assert config["value_dim"] == [12, 12]


def test_old_files_of_fla_hold_the_mixes_in_one(model, tmp_path):
    folder = tmp_path / "out"
    model.save_pretrained(folder, format="hf")
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        rows = [tensors.pop(f"model.layers.{i}.attn.x_{j}").flatten() for j in "rwkvag"]
        tensors[f"model.layers.{i}.attn.x_x"] = torch.stack(rows)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_model(folder)(tokens_for()), model(tokens_for()))


def test_ranks_are_those_of_the_tensors(model, tmp_path):
    model.save_pretrained(tmp_path / "out", format="hf")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decay_low_rank_dim": 64}))
    assert load_model(tmp_path / "out").cfg.decay_rank == 5


def test_decay_stays_float32(raw_file):
    loaded = load_model(raw_file, dtype="bfloat16")
    assert {n for n, p in loaded.named_parameters() if p.dtype == torch.float32} == {
        f"blocks.{i}.mixer.w0" for i in (0, 1)
    }
    loaded.save_pretrained(raw_file.parent / "half", dtype="bfloat16")
    assert torch.equal(load_model(raw_file.parent / "half").blocks[1].mixer.w0, load_model(raw_file).blocks[1].mixer.w0)


def test_saving_another_form_replaces_the_first(model, tmp_path):
    for format, other in (("raw", "hf"), ("hf", "raw"), ("raw", "hf")):
        model.save_pretrained(tmp_path / "out", format=format)
        model.save_pretrained(tmp_path / "out", format=other)
        assert torch.equal(load_model(tmp_path / "out")(tokens_for()), model(tokens_for()))


@pytest.mark.parametrize("name", ["blocks.0.ffn.s_emb.weight", "blocks.1.qkv.weight", "blocks.0.ffn.s0"])
def test_later_variants_are_refused_by_name(model, tmp_path, name):
    torch.save(raw_tensors(model) | {name: torch.zeros(3)}, tmp_path / "later.pth")
    with pytest.raises(CheckpointError, match=rf"{name}.*7a, 7b or 8"):
        load_model(tmp_path / "later.pth")


def test_errors_of_raw_files(model, tmp_path):
    torch.save({"emb.weight": torch.zeros(3, 2), "blocks.0.att.time_mix_k": torch.zeros(2)}, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="RWKV-4 to 6"):
        load_model(tmp_path / "old.pth")
    tensors = raw_tensors(model)
    del tensors["blocks.0.att.w1"]
    torch.save(tensors, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.att\.w1"):
        load_model(tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"holds damaged\.pth, old\.pth; give the path"):
        load_model(tmp_path)
    tensors = raw_tensors(model)
    del tensors["blocks.1.ffn.value.weight"]
    torch.save(tensors, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.ffn\.value\.weight"):
        load_model(tmp_path / "short.pth")
    torch.save(raw_tensors(model), tmp_path / "good.pth")
    with pytest.raises(CheckpointError, match=r"HookedRWKV7\.from_pretrained"):
        HookedMamba.from_pretrained(tmp_path / "good.pth")


class Hostile:
    def __reduce__(self):
        return sys.exit, (1,)


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save({"emb.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="never run"):
        load_model(tmp_path / "hostile.pth")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norm_first": False}, "norm_first=False"),
        ({"norm_bias": False}, "norm_bias=False"),
        ({"value_dim": [12, 24]}, r"value_dim=\[12, 24\]"),
        ({"attn": {"layers": [1]}}, "attn="),
        ({"hidden_size": 16, "value_dim": None}, "says d_model=16"),
    ],
)
def test_errors_of_hf_files(model, tmp_path, change, match):
    model.save_pretrained(tmp_path / "out", format="hf")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        load_model(tmp_path / "out")


def test_what_a_form_cannot_say(tmp_path):
    usual = {"d_model": 8, "n_layers": 1, "d_vocab": 5, "head_dim": 4}
    odd = HookedRWKV7(RWKV7Config(**usual, head_eps=1e-3))
    for format in ("raw", "hf"):
        with pytest.raises(CheckpointError, match="head_eps"):
            odd.save_pretrained(tmp_path / format, format=format)
    with pytest.raises(CheckpointError, match="has no RWKV7ForCausalLM"):
        HookedRWKV7(RWKV7Config(**usual)).to_hf()


def test_one_layer_has_no_value_to_mix_in(tmp_path):
    model = build("rwkv7", n_layers=1).float()
    for format in ("raw", "hf"):
        model.save_pretrained(tmp_path / format, format=format)
        assert torch.equal(load_model(tmp_path / format)(tokens_for()), model(tokens_for()))


def test_the_vocabulary_of_the_folder_is_the_tokenizer(model, raw_file):
    lines = [f"{i + 1} {chr(97 + i)!r} 1" for i in range(12)] + ["13 'ab' 2"]
    (raw_file.parent / VOCABULARY).write_text("\n".join(lines) + "\n")
    for place in (raw_file, raw_file.parent):
        loaded = load_model(place)
        assert loaded.to_tokens("abc").tolist() == [[13, 3]]
        assert loaded.to_tokens("abc", prepend_bos=True).tolist() == [[0, 13, 3]]
        assert loaded.to_str_tokens("abc") == ["ab", "c"]
        assert loaded.to_string(torch.tensor([13, 3])) == "abc"
    loaded.save_pretrained(raw_file.parent / "again")
    assert load_model(raw_file.parent / "again").to_tokens("abc").tolist() == [[13, 3]]
    given = load_model(raw_file, tokenizer=raw_file.parent / VOCABULARY)
    tokens, mask = given.to_tokens_and_mask(["abc", "a"])
    assert tokens.tolist() == [[13, 3], [1, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert given.generate("abc", 2, do_sample=False, verbose=False).startswith("abc")
