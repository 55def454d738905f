"""What is wrong with the weights of a file is said by the file's names, with the file, all of it at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mamba import HookedHybrid, load_model
from hooked_mamba.loading import CheckpointError
from tests.hooked_mamba.hybrids.tiny import SOME, tiny
from tests.hooked_mamba.tiny import build
from tests.kinds import MAMBA

PLAIN = (*MAMBA, "rwkv7")


def saved(kind: str, folder: Path) -> dict[str, Tensor]:
    """A tiny model's file in transformers' form."""
    model = build(kind) if kind in PLAIN else HookedHybrid.from_hf(tiny(kind).hf)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def in_two_files(folder: Path, weights: dict[str, Tensor]) -> dict[str, str]:
    """Write the weights to two shards with their index; tensor -> file."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def ordinary(weights: dict[str, Tensor]) -> list[str]:
    """Tensors of the last blocks, from which no size of the model is read."""
    last = max(int(found[1]) for name in weights if (found := re.search(r"layers\.(\d+)\.", name)))
    names = [name for name in sorted(weights) if f".layers.{last}." in name and weights[name].ndim > 0]
    return [name for name in names if "x_x" not in name]


@pytest.mark.parametrize("kind", [*PLAIN, *SOME])
def test_every_fault_is_named_as_the_file_names_it(kind, tmp_path):
    weights = saved(kind, tmp_path)
    missing, misshaped, spoiled = ordinary(weights)[:3]
    del weights[missing]
    weights[misshaped] = torch.zeros(*(n + 1 for n in weights[misshaped].shape))
    weights[spoiled] = weights[spoiled].clone().fill_(float("nan"))
    surplus = f"{missing.rpartition('.')[0]}.of_no_use"
    weights[surplus] = torch.zeros(3)
    where = in_two_files(tmp_path, weights)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    text = str(error.value)
    assert f"missing: {missing}" in text
    assert f"unexpected: {surplus} in {where[surplus]} (3,)" in text
    assert f"shape: {misshaped} in {where[misshaped]} got " in text
    assert f"not finite: {spoiled} in {where[spoiled]} has " in text
    first, *lines = text.splitlines()
    assert all(file in first for file in where.values())
    assert len(lines) == 4, text


@pytest.mark.parametrize(("case", "part"), [("jamba", "experts.2.up_proj.weight"), ("nemotron", "experts.5.")])
def test_one_of_many_experts(case, part, tmp_path):
    weights = saved(case, tmp_path)
    name = next(name for name in weights if part in name and "up_proj" in name)
    gone = name.replace("up_proj", "down_proj")
    weights[name] = torch.zeros(3, 5)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    text = str(error.value)
    assert f"shape: {name} in model.safetensors got (3, 5)" in text
    assert f"missing: {gone}" in text
    assert len(text.splitlines()) == 3, text


def test_a_fused_tensor_with_rows_too_many(tmp_path):
    weights = saved("granite-moe", tmp_path)
    name = next(name for name in weights if name.endswith("shared_mlp.input_linear.weight"))
    weights[name] = torch.cat([weights[name], torch.ones(2, 32)])
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shared_mlp.input_linear.weight in model.safetensors got \(82, 32\)"):
        load_model(tmp_path)
