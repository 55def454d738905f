#!/usr/bin/env bash
# Bamba in transformers: a call with a cache but without position_ids rotates the queries and keys
# as if the sequence began anew.
#
# Where position_ids are left out, most models of transformers count on from the cache's length. Bamba's
# forward counts from 0 whatever the cache holds, so the attention blocks apply RoPE at the wrong
# positions. No warning is given. The Mamba-2 blocks have no positions and stay right. generate() passes
# position_ids and is right; a loop of one's own over model(token, cache=...) is not. Falcon-H1, which
# also has Mamba-2 and RoPE, is right either way.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU (last digits vary), logits of std 1:
#     largest error of the logits against one pass, steps of one token after a prompt of 9
#     bamba      without position_ids 1.7   with 2e-06
#     falcon_h1  without position_ids 3.3e-06   with 3e-06
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, FalconH1Config, FalconH1ForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_hidden_layers=4,
    mamba_d_state=6,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_chunk_size=5,
)
MODELS = {
    "bamba": lambda: BambaForCausalLM(BambaConfig(**SHAPE, attn_layer_indices=[1, 2])),
    "falcon_h1": lambda: FalconH1ForCausalLM(FalconH1Config(**SHAPE, mamba_d_ssm=64, head_dim=8)),
}


def build(name):
    """A model whose every matrix is random and of order one in effect: nothing is hidden by a small init."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def error(model, tokens, with_positions, split=9):
    full = model(tokens).logits
    cache = model(tokens[:, :split], use_cache=True).cache
    steps = []
    for t in range(split, tokens.shape[1]):
        positions = {"position_ids": torch.full((len(tokens), 1), t)} if with_positions else {}
        steps.append(model(tokens[:, t : t + 1], cache=cache, use_cache=True, **positions).logits)
    return float((torch.cat(steps, 1) - full[:, split:]).abs().max())


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("largest error of the logits against one pass, steps of one token after a prompt of 9")
for name in MODELS:
    model = build(name)
    without, given = error(model, tokens, False), error(model, tokens, True)
    print(f"{name:<9}  without position_ids {without:.2g}   with {given:.0e}")
    as_described &= given < 1e-3 and ((without > 0.1) if name == "bamba" else (without < 1e-3))
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
