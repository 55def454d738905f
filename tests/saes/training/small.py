"""A small training: one model, a few coders, a second or two."""

from __future__ import annotations

from pathlib import Path

import torch

from hooked_mamba import HookedMamba, MambaConfig
from saes.coder import SparseCoder
from saes.config import mambacoder_config, sae_config
from saes.store import ActivationStore, Capture, DocumentRows, ListedDocuments, MemoryBlocks, ModelBlocks
from saes.targets import all_streams
from saes.training import TrainConfig, Trainer, TrainResult

D, F = 12, 32


def model() -> HookedMamba:
    return HookedMamba(MambaConfig(d_model=D, n_layers=2, d_vocab=50, d_state=4), seed=0)


def coders() -> dict[str, SparseCoder]:
    """Of every kind of state that a checkpoint must hold: sparse, thresholds, scales, skip, nested, gated."""
    site = "blocks.1.mixer.hook_out_proj"
    configs = {
        "topk": sae_config(site, D, F, k=4),
        "batchtopk": mambacoder_config(1, D, F, k=4, input_norm="scale", skip=True),
        "local": mambacoder_config(0, D, F, k=4, target="local", reads="normalized", input_norm="scale"),
        "jumprelu": sae_config(site, D, F, architecture="jumprelu", input_norm="scale"),
        "gated": sae_config(site, D, F, architecture="gated"),
        "standard": sae_config(site, D, F, architecture="standard"),
        "matryoshka": sae_config(site, D, F, architecture="matryoshka", k=4),
    }
    return {name: SparseCoder(cfg, seed=i) for i, (name, cfg) in enumerate(configs.items())}


def documents() -> ListedDocuments:
    generator = torch.Generator().manual_seed(0)
    return ListedDocuments([torch.randint(50, (n,), generator=generator).tolist() for n in range(20, 90)])


def documents_text() -> DocumentRows:
    """Rows of those documents."""
    return DocumentRows(documents(), 12)


def store(named: dict[str, SparseCoder]) -> ActivationStore:
    streams = all_streams([coder.cfg for coder in named.values()])
    capture = Capture(model(), streams, dtype=torch.bfloat16)
    return ActivationStore(ModelBlocks(capture, DocumentRows(documents(), 16), tokens=400, rows_per_pass=8), 64)


def config(**changes) -> TrainConfig:
    settings = {
        "steps": 24,
        "lr": 3e-3,
        "dead_after_tokens": 500,
        "sparsity": 1e-3,
        "log_every": 5,
        "checkpoint_every": 4,
        "progress": False,
    }
    return TrainConfig.from_dict({**settings, **changes})


def train(out: Path | None, *, resume: bool = False, only: tuple[str, ...] = (), **changes) -> TrainResult:
    """Train all coders, or `only` some."""
    named = {name: coder for name, coder in coders().items() if not only or name in only}
    return Trainer(named, store(named), config(**changes), out=out).train(resume=resume)


def planted(n: int = 4000, atoms: int = 24, d: int = D, seed: int = 0) -> MemoryBlocks:
    """Sparse sums of known directions, as the stream "blocks.1.mixer.hook_out_proj"."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    active = torch.rand(n, atoms, generator=generator) < 2 / atoms
    sizes = 1 + torch.rand(n, atoms, generator=generator)
    return MemoryBlocks({"blocks.1.mixer.hook_out_proj": (active * sizes) @ directions})
