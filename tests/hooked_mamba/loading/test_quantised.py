"""Quantised checkpoints, written entry by entry, are read as the numbers they stand for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from _pytest.mark import ParameterSet

from hooked_mamba import load_model
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.support import SUPPORTED
from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.loading.adapter_files import factors, merged, write_adapter
from tests.hooked_mamba.loading.folders import files_of, linears, write
from tests.hooked_mamba.loading.packing import VARIANTS, WAYS, quantise
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("unchecked")


def modules_of(family: str, most: int = 10) -> list[str]:
    """Linear layers, the unembedding apart: one of each name, which is enough for every place in a family's table."""
    names = [name for name in linears(files_of(family)[1]) if not name.endswith("lm_head")]
    by_end = {name.rpartition(".")[2]: name for name in reversed(names)}
    return list(by_end.values())[:most]


def check(way, family, tmp_path) -> int:
    """Load a folder, and the one of the weights that it stands for; how many modules were packed."""
    config, packed, plain, count = quantise(way, *files_of(family), modules_of(family))
    model = load_model(write(tmp_path / "packed", config, packed), dtype="float64")
    wanted = {name: value.double() for name, value in plain.items()}
    expected = load_model(write(tmp_path / "plain", files_of(family)[0], wanted), dtype="float64").state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=3e-7, atol=1e-9), name
    return count


def in_turn(pairs: list[tuple[str, str]], every: int) -> list[ParameterSet]:
    """Pairs of a way and a family, of which every so many are tested by default: each way, and each family."""
    ways, families = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    return [
        pytest.param(way, family, marks=[pytest.mark.slow] * bool((ways.index(way) + families.index(family)) % every))
        for way, family in pairs
    ]


@pytest.mark.parametrize(("way", "family"), in_turn([(way, family) for way in WAYS for family in SUPPORTED[way]], 3))
def test_every_family(way, family, tmp_path):
    assert check(WAYS[way], family, tmp_path) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, tmp_path):
    assert check(VARIANTS[variant], "Mamba", tmp_path) > 1


def test_an_adapter_on_a_quantised_base(tmp_path):
    """QLoRA: the LoRA is added to the numbers that the codes stand for."""
    module = "backbone.layers.0.mixer.in_proj"
    config, packed, plain, _ = quantise(WAYS["bitsandbytes 4-bit"], *files_of("Mamba"), [module])
    made = factors(module, plain[f"{module}.weight"])
    folder = write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    model = load_model(write(tmp_path / "base", config, packed), adapter=folder)
    expected = merged(plain[f"{module}.weight"].float(), *made.values(), 5 / 3)
    assert torch.allclose(model.state_dict()["blocks.0.mixer.in_proj.weight"], expected, rtol=1e-6, atol=1e-7)


def test_half_precision_and_back(tmp_path):
    """What is loaded is a plain model: it is saved as one, in the precision asked for."""
    config, packed, plain, _ = quantise(WAYS["GPTQ"], *files_of("Mamba-2"), modules_of("Mamba-2"))
    model = load_model(write(tmp_path / "base", config, packed), dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype="bfloat16").state_dict()
    assert torch.equal(again["blocks.0.mixer.in_proj.weight"], model.state_dict()["blocks.0.mixer.in_proj.weight"])
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(again["blocks.0.mixer.in_proj.weight"], plain[name].float().bfloat16())


def test_packed_weights_without_a_config(tmp_path):
    for way, said in (
        ("GPTQ", "gptq or awq"),
        ("bitsandbytes 8-bit", "bitsandbytes"),
        ("fp8", "float8_e4m3fn without"),
    ):
        config, packed, _, _ = quantise(WAYS[way], *files_of("Mamba"), modules_of("Mamba"))
        del config["quantization_config"]
        with pytest.raises(CheckpointError, match=rf"model\.safetensors is .*{said}.* has no quantization_config"):
            load_model(write(tmp_path / way.replace(" ", ""), config, packed))


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "torchao", "mxfp4", "bitnet"])
def test_other_methods_are_named(method, tmp_path):
    config, packed, _, _ = quantise(WAYS["AWQ"], *files_of("Mamba"), modules_of("Mamba"))
    config["quantization_config"] = {"quant_method": method}
    with pytest.raises(
        CheckpointError, match=rf"quantised by {method} .*not read here; read are bitsandbytes, gptq, awq"
    ):
        load_model(write(tmp_path, config, packed))


HYBRIDS = ("Jamba", "Bamba", "Granite 4 H", "Nemotron-H", "Falcon-H1", "Zamba", "Zamba2", "LFM2")
"""Families whose equations are written once more in float64 over the names that files have."""


@torch.no_grad()
@pytest.mark.parametrize(("way", "family"), in_turn(list(product([*WAYS, "PEFT LoRA"], HYBRIDS)), 3))
def test_logits_are_those_of_the_equations(family, way, tmp_path):
    """To float32's rounding of the weights, the only one there is."""
    modules = modules_of(family)
    if way == "PEFT LoRA":
        modules = [name for name in modules if ".experts." not in name and not name.endswith("dt_proj")]
        config, packed = files_of(family)
        adapter, plain = {}, dict(packed)
        for module in modules:
            made = factors(module, packed[f"{module}.weight"])
            adapter |= made
            plain[f"{module}.weight"] = merged(packed[f"{module}.weight"], *made.values(), 5 / 3)
        options = {"adapter": write_adapter(tmp_path / "a", adapter, target_modules=modules)}
    else:
        config, packed, plain, _ = quantise(WAYS[way], *files_of(family), modules)
        options = {}
    model = load_model(write(tmp_path / "base", config, packed), dtype="float64", **options)
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = reference.forward(config, {n: v.double().numpy() for n, v in plain.items()}, tokens.numpy()).logits
    assert relative(model(tokens), expected) < 1e-5
