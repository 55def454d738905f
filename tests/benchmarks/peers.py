"""Other libraries, as far as they are installed, all in this process; see requirements.txt for versions that run."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from importlib import metadata
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hooked_mamba.config import MambaConfig
from tests.benchmarks.sizes import Sizes

INSTALL = "see tests/benchmarks/requirements.txt"


@cache
def why_missing(module: str) -> str | None:
    """Why a peer cannot take part; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own deprecations
            importlib.import_module(module)
    except ImportError as error:
        return f"{module} is left out: {error} ({INSTALL})"
    return None


def remarks(*modules: str) -> list[str]:
    """One line for each peer that is not there."""
    return [reason for reason in map(why_missing, modules) if reason]


def transformers_model(sizes: Sizes) -> Any:
    """A random MambaForCausalLM; without kernels of the hub it takes the plain path on a CPU."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.n_layers,
        vocab_size=sizes.d_vocab,
        state_size=sizes.N,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.MambaForCausalLM(config).eval()


class MambapyModel(nn.Module):
    """mamba.py's stack between an embedding and an unembedding, as its own `lm.LM`, which needs CUDA to be imported."""

    def __init__(self, cfg: MambaConfig) -> None:
        from mambapy.mamba import Mamba, RMSNorm
        from mambapy.mamba import MambaConfig as PeerConfig

        super().__init__()
        self.config = PeerConfig(d_model=cfg.d_model, n_layers=cfg.n_layers, d_state=cfg.d_state)
        self.embedding = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.mamba = Mamba(self.config)
        self.norm_f = RMSNorm(cfg.d_model, self.config.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits b l V."""
        return self.lm_head(self.norm_f(self.mamba(self.embedding(tokens))))

    def step(self, token: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits b V of one more token, and the memory after it."""
        x, caches = self.mamba.step(self.embedding(token), caches)
        return self.lm_head(self.norm_f(x)), caches


def mambapy_model(hf_model: Any, cfg: MambaConfig) -> MambapyModel:
    """mamba.py's model with the weights of transformers' model."""
    peer = MambapyModel(cfg)
    peer.load_state_dict({_for_mambapy(name): value for name, value in hf_model.state_dict().items()})
    return peer.eval()


def _for_mambapy(name: str) -> str:
    for ours, theirs in (("backbone.embeddings", "embedding"), ("backbone.norm_f", "norm_f"), ("backbone", "mamba")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def mamba_lens_model(hf_model: Any, cfg: MambaConfig) -> Any:
    """mamba-lens' model with the weights of transformers' model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mamba_lens import HookedMamba as Peer
        from mamba_lens.HookedMamba import MambaCfg, convert_original_state_dict_to_hooked_state_dict

    peer_cfg = MambaCfg(
        d_model=cfg.d_model,
        n_layers=cfg.n_layers,
        vocab_size=cfg.d_vocab,
        d_state=cfg.d_state,
        dt_rank=cfg.R,
        device="cpu",
    )
    raw = {name.replace("embeddings", "embedding"): value for name, value in hf_model.state_dict().items()}
    peer = Peer(peer_cfg, tokenizer=None)
    peer.load_state_dict(convert_original_state_dict_to_hooked_state_dict(peer_cfg, raw))
    return peer.eval()


def transformer_lens_model(hf_model: Any) -> Any:
    """TransformerLens 4's bridge around transformers' model, which it changes in place; in a process of its own."""
    package = importlib.import_module("transformer_lens_4")  # a folder beside the older one that mamba-lens needs
    sys.path.insert(0, next(iter(package.__path__)))

    def build() -> Any:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        return build_bridge_from_module(hf_model, type(hf_model).__name__, hf_config=hf_model.config)

    return quietly(build)


def transformer_lens_version() -> str:
    """Of the newer one."""
    if why_missing("transformer_lens_4"):
        return "4 (absent)"
    folder = next(iter(importlib.import_module("transformer_lens_4").__path__))
    return next(found.version for found in metadata.distributions(name="transformer-lens", path=[folder]))


def transformer_lens_patching() -> Any:
    """The patching module of whichever transformer-lens this process has imported."""
    return quietly(lambda: importlib.import_module("transformer_lens.patching"))


def quietly(call: Callable[[], Any]) -> Any:
    """A call without the peers' own warnings and progress bars."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        return call()


def transformers_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """transformers' scan without kernels; x, dt, B, C and the result have positions last."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(x, dt, A, B, C, D)


def mambapy_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """mamba.py's parallel scan, as its block calls it."""
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan(None, x, dt, A, B, C, D)  # it uses nothing of the block


def transformers_ssd(chunk: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """transformers' chunked scan of Mamba-2."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D)


def gated_delta(r: Tensor, w: Tensor, k: Tensor, v: Tensor, key: Tensor, rate: Tensor) -> Tensor:
    """transformers' chunked gated delta rule, as Qwen3-Next calls it; it divides queries by the root of their size."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    y, _ = rule(r * r.shape[-1] ** 0.5, k, v, w.squeeze(-1).log(), rate.squeeze(-1))
    return y
