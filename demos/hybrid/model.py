"""The two models of the comparison: alike but for the first branch of the second block.

    hybrid    M*    block 0: Mamba-2, block 1: attention
    state     MM    Mamba-2 in both

Behind each stand experts and an MLP, as in Granite 4. The states are small on purpose: B and C, which write and read
them, have N = 8 numbers, and no more than N keys can be told apart without mixing.
"""

from __future__ import annotations

import math

from demos.hybrid.options import Options
from demos.tinystories.models import LETTERS
from hooked_mamba import HookedHybrid, Mamba2Config
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig, MoEConfig


def build(options: Options) -> HookedHybrid:
    """A model with random weights drawn from the run's seed."""
    size = {"d_model": options.d_model, "n_layers": options.n_layers}
    d_vocab = math.ceil(options.vocab / 16) * 16
    branches = {
        "mixer": Mamba2Config(**size, d_vocab=d_vocab, d_state=options.d_state, head_dim=options.head_dim),
        "attn": AttentionConfig(
            **size, n_heads=options.n_heads, n_key_value_heads=options.n_heads, d_head=options.d_head
        ),
        "mlp": MLPConfig(**size, d_mlp=options.d_mlp),
        "moe": MoEConfig(
            **size,
            n_experts=options.n_experts,
            top_k=options.top_k,
            d_mlp=options.d_expert,
            scoring="top_k_softmax",
        ),
    }
    cfg = HybridConfig(
        **size,
        d_vocab=d_vocab,
        model_name=options.out.name,
        branches=branches,
        layout=tuple(((LETTERS[letter],), ("moe", "mlp")) for letter in options.pattern),
        tie_embeddings=False,
        architecture="granitemoehybrid",
    )
    return HookedHybrid(cfg, seed=options.seed)
