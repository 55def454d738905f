"""MLX folders: logits and weights are those of the checkpoint that was converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mamba import load_model
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.mlx_quantised import unpacked
from hooked_mamba.verification import verify
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.loading import mlx_folders
from tests.hooked_mamba.loading.adapter_files import factors, write_adapter
from tests.hooked_mamba.loading.families import CASES

CONVERTED = [case for case in CASES if case != "bamba"]


def _logits(model: Any) -> Tensor:
    ids = torch.randint(0, model.cfg.d_vocab, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids)


def _read(folder: Path) -> Any:
    falcon = json.loads((folder / "config.json").read_text())["model_type"] == "falcon_h1"
    with pytest.warns(UserWarning, match="key_multiplier") if falcon else nullcontext():
        return load_model(folder, dtype="float64")


@pytest.mark.parametrize("case", CONVERTED)
def test_logits_are_those_of_the_source(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    expected = _logits(load_model(folders(case), dtype="float64"))
    mlx_folders.convert(folders(case), tmp_path / "mlx")
    found = _logits(_read(tmp_path / "mlx"))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised_weights(bits: int, folders: Callable[[str], Path], tmp_path: Path) -> None:
    meant = mlx_folders.convert(folders("mamba"), tmp_path / "mlx", bits, by_layer=True)
    read = load_model(tmp_path / "mlx")
    assert torch.equal(read.embed.weight, meant["backbone.embeddings.weight"])
    for i, block in enumerate(read.blocks):
        there = f"backbone.layers.{i}.mixer"
        for name in ("in_proj", "x_proj", "out_proj"):
            assert torch.equal(getattr(block.mixer, name).weight, meant[f"{there}.{name}.weight"])


@pytest.mark.parametrize("case", ["jamba", "granite-moe", "nemotron-moe", "qwen3-next"])
def test_quantised_experts(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    meant = mlx_folders.convert(folders(case), tmp_path / "mlx", 4, group_size=4)
    stacks = [t for name, t in meant.items() if ".switch_mlp." in name]
    read = _read(tmp_path / "mlx")
    found = [p for name, p in read.named_parameters() if ".moe." in name and p.ndim == 3]
    assert stacks
    for stack in stacks:
        assert any(p.shape == stack.shape and torch.equal(p.float(), stack) for p in found)


FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "another mode": (
        lambda c, s: c["quantization"].update(mode="mxfp4"),
        r"quantization has mode='mxfp4', which is not read",
    ),
    "nine bits": (
        lambda c, s: c["quantization"].update(bits=9),
        r"quantization has bits=9 and group_size=32; expected bits of 2",
    ),
    "bits as text": (lambda c, s: c["quantization"].update(bits="4"), r"quantization has bits='4'"),
    "groups of none": (lambda c, s: c["quantization"].update(group_size=0), r"has bits=4 and group_size=0"),
    "other groups": (
        lambda c, s: c["quantization"].update(group_size=64),
        r"embeddings\.weight in model\.safetensors has .* in groups of 64",
    ),
    "other bits": (
        lambda c, s: c["quantization"].update(bits=8),
        r"embeddings\.weight in model\.safetensors has .* of 8 bits",
    ),
    "a layer of other bits": (
        lambda c, s: c["quantization"].update({"backbone.layers.0.mixer.in_proj": {"bits": 2, "group_size": 32}}),
        r"layers\.0\.mixer\.in_proj\.weight in model\.safetensors has .* of 2 bits",
    ),
    "no biases": (
        lambda c, s: s.pop("backbone.layers.0.mixer.in_proj.biases"),
        r"in_proj\.scales .* stands without .*in_proj\.biases",
    ),
    "no words": (
        lambda c, s: s.pop("backbone.layers.1.mixer.in_proj.weight"),
        r"in_proj\.scales .* stands without .*in_proj\.weight",
    ),
    "no scales": (
        lambda c, s: s.pop("backbone.layers.0.mixer.in_proj.scales"),
        r"unexpected: backbone\.layers\.0\.mixer\.in_proj\.biases",
    ),
    "short scales": (
        lambda c, s: s.update({"backbone.embeddings.scales": s["backbone.embeddings.scales"][:-1].contiguous()}),
        r"embeddings\.weight in model\.safetensors has .* expected scales and biases \(64, 1\)",
    ),
    "words of another type": (
        lambda c, s: s.update({"backbone.embeddings.weight": s["backbone.embeddings.weight"].to(torch.int64)}),
        r"embeddings\.weight in model\.safetensors is torch\.int64, which no quantised weight is",
    ),
    "scales of another type": (
        lambda c, s: s.update({"backbone.embeddings.scales": torch.ones(64, 1, dtype=torch.int32)}),
        r"the scales of backbone\.embeddings\.weight in model\.safetensors are torch\.int32",
    ),
    "fewer rows": (
        lambda c, s: s.update({k: s[k][:9].contiguous() for k in s if k.startswith("backbone.embeddings")}),
        r"shape: backbone\.embeddings\.weight in model\.safetensors got \(9, 32\), expected \(64, 32\)",
    ),
    "a scale without end": (
        lambda c, s: s["backbone.embeddings.scales"].fill_(float("inf")),
        r"not finite: backbone\.embeddings\.weight in model\.safetensors",
    ),
    "a convolution of other taps": (
        lambda c, s: s.update({"backbone.layers.0.mixer.conv1d.weight": torch.ones(64, 3, 1)}),
        r"layers\.0\.mixer\.conv1d\.weight in model\.safetensors got \(64, 1, 3\), expected \(64, 1, 4\)",
    ),
    "one weight twice": (
        lambda c, s: s.update({"language_model.model.x": torch.ones(1), "model.x": torch.ones(1)}),
        r"language_model\.model\.x in model\.safetensors and model\.x in model\.safetensors hold one weight",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_spoilt_folders(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    spoil, match = FAULTS[case]
    mlx_folders.convert(folders("mamba"), tmp_path / "mlx", 4)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    state = load_file(tmp_path / "mlx" / "model.safetensors")
    spoil(config, state)
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "mlx" / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        load_model(tmp_path / "mlx")


def test_factors_where_embeddings_are_one(tmp_path: Path) -> None:
    """The embedding holds its factor, and so the unembedding does, which had another."""
    tiny.twin("falcon", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    expected = _logits(load_model(tmp_path / "source", dtype="float64"))
    mlx_folders.convert(tmp_path / "source", tmp_path / "mlx")
    found = _logits(_read(tmp_path / "mlx"))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.usefixtures("unchecked")
def test_factors_in_weights_and_an_adapter(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A LoRA was trained beside weights without the factors: added to those with them it would be another one."""
    mlx_folders.convert(folders("falcon-h1"), tmp_path / "mlx")
    module = "model.layers.0.self_attn.k_proj"
    weight = load_file(folders("falcon-h1") / "model.safetensors")[f"{module}.weight"]
    adapter = write_adapter(tmp_path / "a", factors(module, weight), target_modules=[module])
    with pytest.raises(CheckpointError, match=r"mlx is a Falcon-H1 .* \(ssm_in_multiplier=1\.25\), and adapters"):
        load_model(tmp_path / "mlx", adapter=adapter)
    path = tmp_path / "mlx" / "config.json"
    config = json.loads(path.read_text())
    ones = {n: [1.0] * len(v) if isinstance(v, list) else 1.0 for n, v in config.items() if "_multiplier" in n}
    path.write_text(json.dumps(config | ones))
    assert load_model(tmp_path / "mlx", adapter=adapter).cfg.d_model == config["hidden_size"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", ["granite-moe", "nemotron", "qwen3.5"])
def test_an_adapter_of_the_source(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    mlx_folders.convert(folders(case), tmp_path / "mlx")
    state = load_file(folders(case) / "model.safetensors")
    name = next(name for name in state if name.endswith((".q_proj.weight", ".out_proj.weight")))
    module = name.removesuffix(".weight")
    adapter = write_adapter(tmp_path / "a", factors(module, state[name]), target_modules=[module])
    expected = _logits(load_model(folders(case), adapter=adapter, dtype="float64"))
    found = _logits(load_model(tmp_path / "mlx", adapter=adapter, dtype="float64"))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_a_word_for_packing_and_nothing_packed(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers' norms are read as such, whatever a config says of its weights."""
    expected = _logits(load_model(folders("qwen3.5"), dtype="float64"))
    shutil.copytree(folders("qwen3.5"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"quantization": {"bits": 4}}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert torch.equal(_logits(load_model(tmp_path / "plain", dtype="float64")), expected)


def test_verified_against_what_was_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers takes such a folder for its own, and stumbles over the convolution."""
    mlx_folders.convert(folders("mamba"), tmp_path / "mlx")
    found = verify(str(tmp_path / "mlx"), dtypes=("float32",), repeats=1)
    assert (found.reference, found.format) == ("converted", "hf_mamba")


def test_numbers_of_any_bits() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        numbers = torch.randint(0, 2**bits, (3, 32), generator=torch.Generator().manual_seed(bits))
        stream = [[(int(n) >> b) & 1 for n in row for b in range(bits)] for row in numbers]
        words = [
            [sum(bit << i for i, bit in enumerate(row[at : at + 32])) for at in range(0, len(row), 32)]
            for row in stream
        ]
        assert torch.equal(unpacked(torch.tensor(words).to(torch.uint32), bits), numbers.float())
