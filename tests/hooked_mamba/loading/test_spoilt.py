"""Adapters and quantised files that are wrong, each in one way: the error names file, key and cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mamba import load_model
from hooked_mamba.loading import CheckpointError
from tests.hooked_mamba.loading.adapter_files import PREFIX, factors, write_adapter
from tests.hooked_mamba.loading.folders import files_of, write
from tests.hooked_mamba.loading.packing import VARIANTS, WAYS, quantise

pytestmark = pytest.mark.usefixtures("unchecked")

MODULE = "backbone.layers.0.mixer.in_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
SAFE = "adapter_model.safetensors"


def tensors(file: str = SAFE, **changes: Callable[[Tensor], Tensor] | Tensor | None) -> Callable[[Path], None]:
    """Change tensors whose keys end as named ("__" for "."); None deletes, a tensor is added under the name itself."""

    def spoil(folder: Path) -> None:
        there = load_file(folder / file)
        for end, change in changes.items():
            end = end.replace("__", ".")
            if isinstance(change, Tensor):
                there[end] = change
                continue
            keys = [key for key in there if key.endswith(end)]
            assert keys, end
            for key in keys:
                if change is None:
                    del there[key]
                else:
                    there[key] = change(there[key]).contiguous()
        save_file(there, folder / file)

    return spoil


def config(file: str, inside: str | None = None, **fields) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        at = values if inside is None else values[inside]
        for name, value in fields.items():
            at.pop(name, None) if value is ... else at.update({name: value})
        (folder / file).write_text(json.dumps(values))

    return spoil


def about(**fields) -> Callable[[Path], None]:
    return config("adapter_config.json", **fields)


def data(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.reshape(-1)[0] = value
        return tensor

    return change


ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (gone("adapter_config.json"), r"has no adapter_config\.json; expected a folder that PEFT wrote"),
    "no weights": (gone(SAFE), r"has no adapter_model\.safetensors; found adapter_config\.json"),
    "half a config": (data("adapter_config.json", b'{"peft_type": '), r"adapter_config\.json is not valid JSON"),
    "cut off": (data(SAFE, b"\x40\0\0\0\0\0\0\0{"), rf"{SAFE} is truncated: its header alone takes"),
    "another method": (about(peft_type="IA3"), r"adapter_config\.json has peft_type='IA3', and only 'LORA' is merged"),
    "no method": (about(peft_type=...), r"adapter_config\.json has no peft_type"),
    "PiSSA": (about(init_lora_weights="pissa_niter_4"), r"init_lora_weights='pissa_niter_4', which changes the base"),
    "aLoRA": (about(alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\]: this adapter acts only behind"),
    "bare parameters": (about(target_parameters=["A_log"]), r"target_parameters=\['A_log'\], and only experts'"),
    "a field from the future": (about(use_magic=True), r"has use_magic=True, which is not known here"),
    "a rank of 0": (about(r=0), r"adapter_config\.json has r=0, expected a number above 0"),
    "alpha in words": (about(lora_alpha="five"), r"has lora_alpha='five', expected a number above 0"),
    "no pattern": (about(rank_pattern={"(": 2}), r"has a pattern that is no regular expression"),
    "another rank": (about(r=4), r"lora_A\.weight and lora_B\.weight in .*\(3, 32\) and \(128, 3\); expected rank 4"),
    "DoRA by the config": (about(use_dora=True), r"has no .*in_proj\.lora_magnitude_vector, and .* says use_dora=true"),
    "one factor": (tensors(lora_B__weight=None), r"lacks base_model.*in_proj\.lora_B\.weight, and has "),
    "another base": (
        tensors(lora_A__weight=lambda t: t[:, :20]),
        r"lora_A\.weight in .* makes a change of shape \(128, 20\), and .* has shape \(128, 32\): .* another base",
    ),
    "not a number": (
        tensors(lora_A__weight=set_first(float("nan"))), r"lora_A\.weight in .* has numbers that are not finite",
    ),
    "whole numbers": (tensors(lora_A__weight=lambda t: t.int()), r"lora_A\.weight in .* is torch\.int32; expected"),
    "a convolution": (
        tensors(lora_A__weight=lambda t: t.unsqueeze(2)), r"lora_A\.weight in .*\(3, 32, 1\): a LoRA of a conv",
    ),
    "a module that is nowhere": (
        tensors(**{f"{PREFIX}backbone__layers__7__mixer__in_proj__lora_A__weight": torch.zeros(3, 32),
                   f"{PREFIX}backbone__layers__7__mixer__in_proj__lora_B__weight": torch.zeros(128, 3)}),
        r"layers\.7\.mixer\.in_proj\.lora_A\.weight in .* does not mean",
    ),
    "a weight that is nowhere": (
        tensors(base_model__model__nothing__weight=torch.zeros(3)),
        r"base_model\.model\.nothing\.weight in .* changes nothing\.weight, which the checkpoint's files do not hold",
    ),
    "an unknown part": (
        tensors(base_model__model__x__lora_C__weight=torch.zeros(3)), r"x\.lora_C\.weight in .* is no part of a LoRA",
    ),
    "a resized embedding": (
        tensors(base_model__model__backbone__embeddings__weight=torch.zeros(62, 32)),
        r"embeddings\.weight in .* has shape \(62, 32\), and .* has \(61, 32\): save",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, tmp_path):
    spoil, said = ADAPTERS[case]
    settings, weights = files_of("Mamba")
    base = write(tmp_path / "base", settings, weights)
    made = factors(MODULE, weights[f"{MODULE}.weight"])
    folder = write_adapter(tmp_path / "a", made, layers_to_transform=[0])
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        load_model(base, adapter=folder)


MODEL = "model.safetensors"


def packed(**changes) -> Callable[[Path], None]:
    return tensors(MODEL, **changes)


def settings(**fields) -> Callable[[Path], None]:
    return config("config.json", "quantization_config", **fields)


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


ALL = WAYS | VARIANTS
QUANTISED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "int8 without its scales": ("bitsandbytes 8-bit", packed(SCB=None), r"in_proj\.weight@ is int8, and"),
    "scales of other rows": (
        "bitsandbytes 8-bit", packed(SCB=lambda t: t[1:]), r"SCB@ has shape \(127,\), expected \(128,\)",
    ),
    "rows in a GPU's order": (
        "bitsandbytes 8-bit", packed(weight_format=lambda t: t + 2), r"weight_format@ is not 0",
    ),
    "no state": (
        "bitsandbytes 4-bit", packed(nf4=None),
        r"absmax@ has no .*quant_state\.bitsandbytes__nf4",
    ),
    "a state that is no JSON": (
        "bitsandbytes 4-bit", packed(nf4=lambda t: t[:-9]),
        r"quant_state\.bitsandbytes__nf4@ does not say how its weight is packed: JSONDecodeError",
    ),
    "half the codes": (
        "bitsandbytes 4-bit", packed(in_proj__weight=lambda t: t[: len(t) // 2]),
        r"in_proj\.weight@ has 1024 bytes, expected 2048",
    ),
    "no table": ("bitsandbytes 4-bit", packed(quant_map=None), r"in_proj\.weight\.quant_map is missing"),
    "scales that are infinite": (
        "bitsandbytes 4-bit", packed(absmax=set_first(float("inf"))), r"absmax@ has numbers that",
    ),
    "nested scales without theirs": ("nf4, double", packed(nested_absmax=None), r"weight\.nested_absmax is missing"),
    "3 bits": ("GPTQ", settings(bits=3), r"config\.json has bits=3, and only 2, 4, 8 is read"),
    "a layout for one kernel": (
        "GPTQ", settings(checkpoint_format="marlin"), r"checkpoint_format='marlin', and only 'gptq', 'gptq_v2' is read",
    ),
    "some layers otherwise": (
        "GPTQ", settings(dynamic={"-:.*lm_head": {}, "+:.*in_proj": {"bits": 8}}), r"layers otherwise \(dynamic: '\+:",
    ),
    "turned weights": (
        "compressed-tensors", settings(transform_config={"config_groups": {"R1": {}}}), r"json has a transform_config",
    ),
    "weights left out": (
        "compressed-tensors", settings(sparsity_config={"format": "sparse-24-bitmask"}), r"json has a sparsity_config",
    ),
    "no scales": ("GPTQ", packed(scales=None), r"in_proj\.scales is missing: without it .*in_proj cannot be"),
    "words of 64 bits": (
        "GPTQ", packed(qweight=lambda t: t.long()), r"in_proj\.qweight@ is int64, expected int32",
    ),
    "groups beyond the scales": (
        "GPTQ", packed(g_idx=lambda t: t + 1), r"g_idx@ has groups up to 2 for 2 rows of scales",
    ),
    "a zero with two readings": (
        "GPTQ", packed(qzeros=lambda t: t | 15), r"qzeros@ has a zero stored as 15, which readers",
    ),
    "zeros of other groups": (
        "GPTQ", packed(qzeros=lambda t: t[:1]), r"qzeros@ has shape \(1, 16\), expected \(2, 16\)",
    ),
    "another version of AWQ": ("AWQ", settings(version="gemv"), r"has version='gemv', and only 'gemm', 'GEMM' is read"),
    "another group size": ("AWQ", settings(group_size=24), r"qweight@ has 32 inputs, no multiple of"),
    "groups in words": ("AWQ", settings(group_size="all"), r"has group_size='all', expected a whole number"),
    "no shape": ("compressed-tensors", packed(weight_shape=None), r"in_proj\.weight_shape is missing"),
    "a shape of another weight": (
        "compressed-tensors", packed(weight_shape=lambda t: t + 8),
        r"weight_packed@ has shape \(128, 4\), expected \(136, 5\)",
    ),
    "an unknown format": (
        "compressed-tensors", settings(format="nvfp4-pack-quantized"), r"format='nvfp4-pack-quantized' of compressed",
    ),
    "scales without codes": (
        "compressed-tensors", packed(weight_packed=None), r"weight_scale@ has no .*weight_packed or",
    ),
    "codes without scales": (
        "compressed-tensors", packed(weight_scale=None), r"weight_packed@ is int32, and nothing",
    ),
    "float8 without scales": (
        "fp8", packed(weight_scale_inv=None), r"in_proj\.weight@ is float8_e4m3fn without a scale",
    ),
    "float8 of other blocks": (
        "fp8", settings(weight_block_size=[8, 8]), r"weight_scale_inv@ has shape \(8, 2\), expected \(16, 4\)",
    ),
    "float8 of blocks of none": (
        "fp8", settings(weight_block_size=[0, 16]), r"weight_scale_inv@ is of blocks of \[0, 16\] by config\.json",
    ),
    "float8 of blocks of text": ("fp8", settings(weight_block_size="16"), r"weight_scale_inv@ is of blocks of '16' by"),
    "float8 of one axis": ("fp8", settings(weight_block_size=[16]), r"weight_scale_inv@ is of blocks of \[16\] by"),
    "rules that are none": ("GPTQ", settings(dynamic=5), r"has dynamic=5, expected rules by module"),
    "a group that is none": (
        "compressed-tensors", settings(config_groups={"g": {"weights": 5}}), r"config_groups=.*, expected objects",
    ),
    "sparse in a word": ("compressed-tensors", settings(sparsity_config="x"), r"json has a sparsity_config"),
    "groups of another size": (
        "compressed-tensors",
        config("config.json", "quantization_config", config_groups={"g": {"weights": {
            "num_bits": 4, "strategy": "group", "group_size": 8,
        }}}),
        r"weight_scale@ has 2 groups of 32 inputs, and config\.json says strategy='group' with group_size=8",
    ),
    "groups of rows": (
        "compressed-tensors",
        config("config.json", "quantization_config", config_groups={"g": {"weights": {
            "num_bits": 4, "strategy": "channel",
        }}}),
        r"weight_scale@ has 2 groups of 32 inputs, and config\.json says strategy='channel'",
    ),
    "other groups in a row": (
        "GPTQ", both(settings(group_size=32), packed(g_idx=None)), r"scales@ has 2 rows for 32 inputs in groups of 32",
    ),
    "groups beyond all numbers": (
        "GPTQ", both(settings(group_size=2**70), packed(g_idx=None)), r"scales@ has 2 rows for 32 inputs in groups",
    ),
    "ModelOpt in 4 bits": ("modelopt", settings(quant_algo="NVFP4"), r"has quant_algo='NVFP4', and only 'FP8'"),
}  # fmt: skip
"""Case -> (what is written, what spoils it, the error, in which @ is the file)."""


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised(case, tmp_path):
    way, spoil, said = QUANTISED[case]
    made, there, _, _ = quantise(ALL[way], *files_of("Mamba"), [MODULE])
    folder = write(tmp_path, made, there)
    spoil(folder)
    with pytest.raises(CheckpointError, match=said.replace("@", r" in model\.safetensors")):
        load_model(folder)


def test_a_block_longer_than_the_weight(tmp_path):
    """It takes no more memory than the weight: its length is a number in a file."""
    made, there, plain, _ = quantise(WAYS["bitsandbytes 4-bit"], *files_of("Mamba"), [MODULE])
    name = f"{MODULE}.weight"
    key = next(key for key in there if key.startswith(f"{name}.quant_state"))
    about = json.loads(bytes(there[key].tolist())) | {"blocksize": 2**50}
    there[key] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    first = there[f"{name}.absmax"][:1].clone()
    there[f"{name}.absmax"] = first
    found = load_model(write(tmp_path, made, there)).state_dict()["blocks.0.mixer.in_proj.weight"]
    block = found.flatten()[:64] / plain[name].float().flatten()[:64]
    assert torch.allclose(block[~block.isnan()], torch.ones(()), rtol=1e-6)
