"""Folders by mlx-lm's own converter, with mlx on the CPU, and mlx's own numbers beside those read here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_mamba import load_model
from tests.hooked_mamba.loading.families import CASES

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

RIGHT = (
    "mamba",
    "mamba-bias",
    "falcon-mamba",
    "nemotron-moe",
    "nemotron",
    "lfm2",
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
)
"""Families whose logits in mlx-lm 0.32.2 are those of the checkpoint."""

WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


def _as_mlx_expects(folder: Path) -> None:
    """Fields of config.json that mlx-lm reads and transformers 5 does not write, or calls otherwise."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    kind = config["model_type"]
    positions = config.get("rope_parameters") or {}
    if kind == "granitemoehybrid":
        config["layer_types"] = [WORDS.get(word, word) for word in config["layer_types"]]
        if not config["num_local_experts"]:
            config["intermediate_size"] = config["shared_intermediate_size"]
    elif kind == "nemotron_h":
        letters = {
            "mamba": "M",
            "linear_attention": "M",
            "attention": "*",
            "full_attention": "*",
            "moe": "E",
            "mlp": "-",
        }
        config["hybrid_override_pattern"] = "".join(letters[word] for word in config["layers_block_type"])
        config["num_hidden_layers"] = len(config["layers_block_type"])
    elif kind == "mamba2":
        config["intermediate_size"] = config["expand"] * config["hidden_size"]
    elif kind == "lfm2":
        config["block_dim"] = config["hidden_size"]
    elif kind == "qwen3_next":
        config |= {"rope_theta": positions["rope_theta"], "partial_rotary_factor": positions["partial_rotary_factor"]}
        config |= {"decoder_sparse_step": 1}
    elif kind.startswith("qwen3_5"):
        _merge_experts(folder)
        config = {"model_type": kind.removesuffix("_text"), "text_config": config}
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"]
    path.write_text(json.dumps(config))


def _merge_experts(folder: Path) -> None:
    """As Qwen3.5 is published: experts in one tensor, gate and up too."""
    state = load_file(folder / "model.safetensors")
    single = [name for name in state if ".experts." in name]
    for base in {name.partition(".experts.")[0] for name in single}:
        count = len([name for name in single if name.startswith(base) and name.endswith("up_proj.weight")])
        rows = {
            p: [state.pop(f"{base}.experts.{e}.{p}_proj.weight") for e in range(count)] for p in ("gate", "up", "down")
        }
        gate, up, down = (torch.stack(found) for found in rows.values())
        state |= {f"{base}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{base}.experts.down_proj": down}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _everything(path: str, module: Any) -> bool | dict[str, Any]:
    """Routers in 8 bits, said for each of them."""
    rows = module.weight.shape[-1]
    routes = path.endswith((".gate", "router", "router.layer", "shared_expert_gate"))
    return {"group_size": 32, "bits": 8} if routes else rows % 32 == 0


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("case", [case for case in CASES if case != "bamba"])
def test_converted(case: str, bits: int | None, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    import numpy as np

    mx.set_default_device(mx.cpu)
    CASES[case]().save_pretrained(tmp_path / "hf")
    source = load_model(tmp_path / "hf", dtype="float64")
    _as_mlx_expects(tmp_path / "hf")
    model, config = utils.load_model(tmp_path / "hf")
    if bits is not None:
        model, config = utils.quantize_model(model, config, 32, bits, quant_predicate=_everything)
    (tmp_path / "mlx").mkdir()
    utils.save_model(tmp_path / "mlx", model)
    utils.save_config(config, tmp_path / "mlx" / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = load_model(tmp_path / "mlx", dtype="float64")
    ids = torch.randint(0, source.cfg.d_vocab, (1, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source(ids), read(ids)
    theirs = torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32))).double()
    size = float(expected.abs().max())
    off = {"read": float((found - expected).abs().max()), "mlx": float((theirs - expected).abs().max())}
    print(f"{case}, {bits} bits, logits up to {size:.3g}: read here {off['read']:.2g} off, in mlx {off['mlx']:.2g}")
    if bits is None:
        assert off["read"] < 1e-6 * size
    if case in RIGHT:
        assert float((found - theirs).abs().max()) < 2e-5 * max(size, 1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dequantised_as_mlx_does(bits: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    import numpy as np

    from hooked_mamba.loading.mlx_quantised import dequantised
    from hooked_mamba.loading.tables import LazyState

    mx.set_default_device(mx.cpu)
    weight = mx.random.normal((70, 256))
    parts = mx.quantize(weight, group_size=group_size, bits=bits)
    state = {
        f"w.{n}": torch.from_numpy(np.array(p)) for n, p in zip(("weight", "scales", "biases"), parts, strict=True)
    }
    read = dequantised(LazyState.of(state), {"group_size": group_size, "bits": bits})["w.weight"]
    expected = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=group_size, bits=bits)))
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)
