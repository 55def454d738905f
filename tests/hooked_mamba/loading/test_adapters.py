"""PEFT's LoRA folders merged into the weights of every family."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from typer.testing import CliRunner

from hooked_mamba import HookedMamba, load_model
from hooked_mamba.cli.app import make_app
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.support import SUPPORTED
from tests.hooked_mamba.loading.adapter_files import embedding_factors, factors, merged, write_adapter
from tests.hooked_mamba.loading.builders import assert_same, random_hf_model
from tests.hooked_mamba.loading.folders import files_of, linears, write

pytestmark = pytest.mark.usefixtures("unchecked")
MIXER = "backbone.layers.0.mixer"


@pytest.fixture
def mamba(tmp_path):
    """(folder of a Mamba, its tensors)"""
    torch.manual_seed(0)
    config, weights = files_of("Mamba")
    return write(tmp_path / "base", config, weights), weights


def close(model, folder, config, weights) -> bool:
    """The model's weights are those of a folder with these tensors, to the last bit but one of float32."""
    expected = load_model(write(folder, config, weights)).state_dict()
    assert set(model.state_dict()) == set(expected)
    return all(near(value, expected[name]) for name, value in model.state_dict().items())


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit but one of float32."""
    return torch.allclose(a, b, rtol=3e-7, atol=1e-9)


def some_linears(family: str) -> dict[str, torch.Tensor]:
    """A linear layer of each name, but those of experts (which are one tensor in memory, where PEFT finds none)."""
    _, weights = files_of(family)
    by_end = {}
    for module in linears(weights):
        if ".experts." not in module and not module.endswith("lm_head"):
            by_end.setdefault(module.rpartition(".")[2], module)
    return {module: weights[f"{module}.weight"] for module in by_end.values()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", SUPPORTED["PEFT LoRA"])
def test_every_family_takes_one(family, dora, tmp_path):
    config, weights = files_of(family)
    adapter, expected = {}, dict(weights)
    for module, weight in some_linears(family).items():
        made = factors(module, weight, dora=dora)
        adapter |= made
        m = made.get(f"{module}.lora_magnitude_vector")
        A, B = made[f"{module}.lora_A.weight"], made[f"{module}.lora_B.weight"]
        expected[f"{module}.weight"] = merged(weight, A, B, 5 / math.sqrt(3) if dora else 5 / 3, m)
    base = write(tmp_path / "base", config, weights)
    names = [name.partition(".lora_")[0] for name in adapter]
    folder = write_adapter(tmp_path / "a", adapter, use_dora=dora, use_rslora=dora, target_modules=sorted(set(names)))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not any(n.endswith("dt_proj") for n in names) else "ignore")
        model = load_model(base, adapter=folder)
    assert close(model, tmp_path / "expected", config, expected)
    assert not close(model, tmp_path / "unchanged", config, weights)


EXPERTS = {
    "Jamba": ("model.layers.1.feed_forward.experts", "gate_up_proj", ("gate_proj", "up_proj")),
    "Nemotron-H": ("model.layers.1.mixer.experts", "up_proj", ("up_proj",)),
    "Qwen3-Next": ("model.layers.0.mlp.experts", "gate_up_proj", ("gate_proj", "up_proj")),
}
"""Family -> a module of experts by its name in memory, its first parameter, and the tensors of it in files."""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(family, turned, tmp_path):
    """One pair of factors for all experts of a parameter, wrapper within wrapper; older PEFT has their sides turned."""
    module, first, parts = EXPERTS[family]
    config, weights = files_of(family)
    there = module if f"{module}.0.down_proj.weight" in weights else module.replace("model.", "backbone.", 1)
    count = sum(name.startswith(f"{there}.") and name.endswith("down_proj.weight") for name in weights)
    adapter, expected, generator = {}, dict(weights), torch.Generator().manual_seed(0)
    for wrapper, tensors, r in ((".base_layer", parts, 4), ("", ("down_proj",), 2)):
        joined = [torch.cat([weights[f"{there}.{e}.{part}.weight"] for part in tensors]) for e in range(count)]
        out, into = joined[0].shape[::-1] if turned else joined[0].shape
        A = torch.randn(count * r, into, generator=generator)
        B = torch.randn(out, count * r, generator=generator)
        adapter |= {f"{module}{wrapper}.lora_A.weight": A, f"{module}{wrapper}.lora_B.weight": B}
        for e in range(count):
            of_e = A[e * r : (e + 1) * r], B[:, [k * count + e for k in range(r)]]
            pair = (of_e[1].t(), of_e[0].t()) if turned else of_e
            whole = merged(joined[e], *pair, 5 / r)
            sizes = [len(weights[f"{there}.{e}.{part}.weight"]) for part in tensors]
            for part, rows in zip(tensors, whole.split(sizes), strict=True):
                expected[f"{there}.{e}.{part}.weight"] = rows
    options = {"target_modules": [], "target_parameters": [f"experts.{first}", "experts.down_proj"], "r": 2}
    options |= {"rank_pattern": {rf".*\.{first}": 4}, "peft_version": "0.19.1" if turned else "0.21.2"}
    folder = write_adapter(tmp_path / "a", adapter, **options)
    base = write(tmp_path / "base", config, weights)
    assert close(load_model(base, adapter=folder), tmp_path / "expected", config, expected)
    folder = write_adapter(tmp_path / "b", adapter, **(options | {"peft_version": "0.20.0" if turned else "0.18.0"}))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight in .* fits 0 of down_proj, .*peft_version='0"):
        load_model(base, adapter=folder)


def test_patterns_of_ranks_and_alphas(mamba, tmp_path):
    """The first pattern that is the end of a module's name counts."""
    base, weights = mamba
    adapter, expected = {}, dict(weights)
    for i, r, alpha in ((0, 2, 7.0), (1, 4, 5.0)):
        module = f"backbone.layers.{i}.mixer.in_proj"
        made = factors(module, weights[f"{module}.weight"], r=r)
        adapter |= made
        A, B = made.values()
        expected[f"{module}.weight"] = merged(weights[f"{module}.weight"], A, B, alpha / r)
    patterns = {"rank_pattern": {"layers.0.mixer.in_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 7.0}}
    folder = write_adapter(tmp_path / "a", adapter, r=4, **patterns)
    assert close(load_model(base, adapter=folder), tmp_path / "b", files_of("Mamba")[0], expected)


def test_layers_to_transform(mamba, tmp_path):
    base, weights = mamba
    made = factors("backbone.layers.1.mixer.in_proj", weights["backbone.layers.1.mixer.in_proj.weight"])
    load_model(base, adapter=write_adapter(tmp_path / "a", made, layers_to_transform=[1], layers_pattern="layers"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.in_proj\.lora_A.* a module that .* does not mean"):
        load_model(base, adapter=write_adapter(tmp_path / "b", made, layers_to_transform=[0]))
    with pytest.raises(CheckpointError, match=r"no lora_A and lora_B of backbone\.layers\.0\.mixer\.in_proj"):
        load_model(base, adapter=write_adapter(tmp_path / "c", made))


def test_biases_and_modules_saved_whole(mamba, tmp_path):
    base, weights = mamba
    module = f"{MIXER}.in_proj"
    made = factors(module, weights[f"{module}.weight"])
    whole = {f"{module}.base_layer.bias": torch.randn(128), f"{MIXER}.conv1d.bias": torch.randn(64)}
    whole |= {"backbone.norm_f.weight": torch.rand(32)}
    options = {"bias": "all", "modules_to_save": ["norm_f"], "layers_to_transform": [0]}
    model = load_model(base, adapter=write_adapter(tmp_path / "a", made | whole, **options))
    expected = dict(weights) | {name.replace(".base_layer", ""): value for name, value in whole.items()}
    expected[f"{module}.weight"] = merged(weights[f"{module}.weight"], *made.values(), 5 / 3)
    assert close(model, tmp_path / "b", files_of("Mamba")[0], expected)
    bias = {f"{module}.lora_B.bias": torch.randn(128)}
    model = load_model(
        base, adapter=write_adapter(tmp_path / "c", made | bias, lora_bias=True, layers_to_transform=[0])
    )
    expected = dict(weights) | {f"{module}.weight": expected[f"{module}.weight"]}
    expected[f"{module}.bias"] = (weights[f"{module}.bias"].double() + 5 / 3 * bias[f"{module}.lora_B.bias"]).float()
    assert close(model, tmp_path / "d", files_of("Mamba")[0], expected)


@pytest.mark.parametrize("dora", [False, True])
def test_one_of_tied_embeddings(mamba, tmp_path, dora):
    """While it was trained the other one had the base's numbers: both are kept."""
    base, weights = mamba
    E = weights["backbone.embeddings.weight"]
    made = embedding_factors("backbone.embeddings", E, dora=dora)
    B, A = (made[f"backbone.embeddings.lora_embedding_{part}"] for part in "BA")
    m = made.get("backbone.embeddings.lora_magnitude_vector")
    there = {"target_modules": ["embeddings"], "use_dora": dora}
    model = load_model(base, adapter=write_adapter(tmp_path / "a", made, **there))
    assert near(model.embed.weight, merged(E.t(), A, B, 5 / 3, m).t())
    assert torch.equal(model.unembed.weight, E)
    assert not model.cfg.tie_embeddings
    head = factors("lm_head", E)
    model = load_model(base, adapter=write_adapter(tmp_path / "b", head))
    assert torch.equal(model.embed.weight, E)
    assert near(model.unembed.weight, merged(E, *head.values(), 5 / 3))
    whole = {"lm_head.weight": torch.randn(61, 32)}
    model = load_model(base, adapter=write_adapter(tmp_path / "c", whole, modules_to_save=["lm_head"]))
    assert torch.equal(model.embed.weight, E)
    assert torch.equal(model.unembed.weight, whole["lm_head.weight"])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("LFM2", {"tie_embedding": True}),
        ("LFM2", {"tie_embedding": True, "tie_word_embeddings": None}),
        ("Qwen3.5", {"text_config": {"tie_word_embeddings": True}}),
    ],
)
def test_tied_embeddings_by_every_name(family, fields, tmp_path):
    """Configs say it under other names, or once more for the text."""
    config, weights = files_of(family)
    nested = fields.get("text_config")
    config = {"model_type": "qwen3_5", "text_config": config | nested} if nested else config | fields
    config = {name: value for name, value in config.items() if value is not None}
    base = write(tmp_path / "base", config, {n: t for n, t in weights.items() if n != "lm_head.weight"})
    assert load_model(base).cfg.tie_embeddings
    E = weights["model.embed_tokens.weight"]
    made = embedding_factors("model.embed_tokens", E)
    model = load_model(base, adapter=write_adapter(tmp_path / "a", made, target_modules=["embed_tokens"]))
    assert torch.equal(model.unembed.weight, E)
    B, A = (made[f"model.embed_tokens.lora_embedding_{part}"] for part in "BA")
    assert near(model.embed.weight, merged(E.t(), A, B, 5 / 3).t())


@pytest.mark.parametrize("ids", [[4, 1], {"embeddings": [4, 1]}])
def test_rows_of_new_tokens(mamba, tmp_path, ids):
    """They are trained in both of tied embeddings."""
    base, weights = mamba
    rows = torch.randn(2, 32)
    given = {"backbone.embeddings.token_adapter.trainable_tokens_delta": rows}
    folder = write_adapter(tmp_path / "a", given, trainable_token_indices=ids, target_modules=["in_proj"])
    model = load_model(base, adapter=folder)
    expected = weights["backbone.embeddings.weight"].clone()
    expected[4], expected[1] = rows
    assert torch.equal(model.embed.weight, expected)
    assert model.unembed.weight is model.embed.weight


def test_several_in_order(mamba, tmp_path):
    base, weights = mamba
    module = f"{MIXER}.in_proj"
    W, first = weights[f"{module}.weight"], factors(module, weights[f"{module}.weight"])
    second = factors(module, W, seed=1, dora=True)
    only = {"layers_to_transform": [0]}
    a = write_adapter(tmp_path / "a", first, **only)
    b = write_adapter(tmp_path / "b", second, use_dora=True, **only)
    model = load_model(base, adapter=[a, str(b)])
    A, B, m = second.values()
    expected = merged(merged(W, *first.values(), 5 / 3), A, B, 5 / 3, m)
    assert torch.allclose(model.state_dict()["blocks.0.mixer.in_proj.weight"], expected, rtol=1e-6, atol=1e-7)
    other = load_model(base, adapter=(b, a)).state_dict()["blocks.0.mixer.in_proj.weight"]
    assert not torch.allclose(other, expected, atol=1e-3)


def test_half_precision_is_rounded_once(tmp_path):
    """The sum is not rounded to the base's bfloat16, nor the factors' product."""
    config, weights = files_of("Mamba")
    half = {name: value.bfloat16() for name, value in weights.items()}
    base, module = write(tmp_path / "base", config, half), f"{MIXER}.in_proj"
    made = {name: value.bfloat16() for name, value in factors(module, weights[f"{module}.weight"]).items()}
    folder = write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    expected = merged(half[f"{module}.weight"], *made.values(), 5 / 3)
    got = load_model(base, adapter=folder).state_dict()["blocks.0.mixer.in_proj.weight"]
    assert near(got, expected)
    got = load_model(base, adapter=folder, dtype="bfloat16").state_dict()["blocks.0.mixer.in_proj.weight"]
    assert torch.equal(got, expected.bfloat16())


def test_what_transformers_ran_asleep_is_said(mamba, tmp_path):
    base, weights = mamba
    made = factors(f"{MIXER}.dt_proj", weights[f"{MIXER}.dt_proj.weight"])
    folder = write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    with pytest.warns(UserWarning, match=r"a LoRA on dt_proj \(1 layers\).*not the one that was trained"):
        model = load_model(base, adapter=folder)
    expected = merged(weights[f"{MIXER}.dt_proj.weight"], *made.values(), 5 / 3)
    assert near(model.state_dict()["blocks.0.mixer.dt_proj.weight"], expected)


def test_raw_files_take_adapters_of_transformers_names(tmp_path):
    """mamba_ssm calls the embedding `backbone.embedding`, transformers `backbone.embeddings`."""
    config, weights = files_of("Mamba")
    model = load_model(write(tmp_path / "base", config, weights))
    model.save_pretrained(tmp_path / "raw", format="raw")
    made = factors(f"{MIXER}.x_proj", weights[f"{MIXER}.x_proj.weight"])
    made |= embedding_factors("backbone.embeddings", weights["backbone.embeddings.weight"])
    options = {
        "target_modules": ["x_proj", "embeddings"],
        "layers_to_transform": None,
        "exclude_modules": r".*1\.mixer.*",
    }
    folder = write_adapter(tmp_path / "a", made, **options)
    raw, hf = (load_model(tmp_path / base, adapter=folder) for base in ("raw", "base"))
    assert_same(raw.state_dict(), hf.state_dict())


def test_an_archive_and_the_class_and_the_command_line(mamba, tmp_path):
    base, weights = mamba
    made = factors(f"{MIXER}.in_proj", weights[f"{MIXER}.in_proj.weight"])
    folder = write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    expected = load_model(base, adapter=folder).state_dict()
    torch.save({f"base_model.model.{n}": v for n, v in made.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert_same(HookedMamba.from_pretrained(base, adapter=folder).state_dict(), expected)
    result = CliRunner().invoke(
        make_app([]), ["cache", "x", "-m", str(base), "--adapter", str(tmp_path / "gone" / "x")]
    )
    assert result.exit_code == 2
    assert "does not exist: there is no folder" in " ".join(result.output.split())


def test_an_adapter_on_the_hub(mamba, tmp_path, monkeypatch):
    """Its config and its weights are fetched, and nothing else."""
    import huggingface_hub

    base, weights = mamba
    made = factors(f"{MIXER}.in_proj", weights[f"{MIXER}.in_proj.weight"])
    write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    asked = []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path / "a")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_model(base, adapter="owner/lora").cfg.n_layers == 2
    assert asked[1:] == [("owner/lora", ["adapter_model.safetensors"])]


def test_an_adapter_is_no_model(mamba, tmp_path):
    folder = write_adapter(tmp_path / "a", {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"an adapter of PEFT, not a model: load_model\('some/base', adapter='"):
        load_model(folder)


class TestLive:
    """Model objects whose weights are not what they compute."""

    def test_compiled(self):
        with pytest.raises(CheckpointError, match=r"compiled \(OptimizedModule of torch\.compile\).*model\._orig_mod"):
            HookedMamba.from_hf(torch.compile(random_hf_model("mamba", 0), backend="eager"))

    def test_wrapped(self):
        model = torch.nn.DataParallel(random_hf_model("mamba", 0))
        with pytest.raises(CheckpointError, match=r"wrapped for training \(DataParallel\).*model\.module"):
            HookedMamba.from_hf(model)

    def test_with_adapters(self):
        model = random_hf_model("mamba", 0)
        layer = model.backbone.layers[0].mixer
        layer.in_proj = torch.nn.Sequential(layer.in_proj)
        layer.in_proj.base_layer = layer.in_proj[0]
        with pytest.raises(CheckpointError, match=r"PEFT \(on backbone\.layers\.0\.mixer\.in_proj.*merge_and_unload"):
            HookedMamba.from_hf(model)

    def test_quantised(self):
        class Linear4bit(torch.nn.Linear):
            pass

        model = random_hf_model("mamba", 0)
        model.backbone.layers[0].mixer.in_proj = Linear4bit(2, 2)
        model.quantization_method = "bitsandbytes"
        with pytest.raises(CheckpointError, match=r"quantised \(bitsandbytes, such as backbone.*model\.dequantize\(\)"):
            HookedMamba.from_hf(model)


def test_a_config_says_what_is_merged(mamba, tmp_path):
    """Without target_modules (older PEFT) every module of the file is meant."""
    base, weights = mamba
    made = factors(f"{MIXER}.in_proj", weights[f"{MIXER}.in_proj.weight"])
    folder = write_adapter(tmp_path / "a", made)
    about = json.loads((folder / "adapter_config.json").read_text())
    kept = {name: about[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")} | {"target_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    assert load_model(base, adapter=folder).cfg.n_layers == 2
