#!/usr/bin/env bash
# TransformerLens, Falcon-H1: decompose_resid returns a decomposition that does not sum to the stream, without
# an error.
#
# Falcon-H1's blocks add a Mamba-2 mixer and attention side by side, each times a factor. decompose_resid
# collects embedding, attention and MLP alone and returns them with labels: no component of any mixer, and
# attention without its factor. The sum misses the stream by more than the stream's own spread. For Bamba,
# Granite 4, Jamba, Nemotron-H and Zamba2 the same call raises a KeyError.
#
# Seen with torch 2.13.0, transformers 5.24.0 and transformer-lens 4.3.0 on a CPU (last digits vary):
#     components: embed, 0_attn_out, 0_mlp_out, 1_attn_out, 1_mlp_out
#     their sum less the stream: up to 12, std of the stream 1.8
#     with both mixers, and attention times its factor: 1e-06
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 transformer-lens==4.3.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'EOF'
import logging

import torch
import transformers
from transformers import FalconH1Config, FalconH1ForCausalLM

logging.disable(logging.WARNING)
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = FalconH1Config(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    mamba_d_ssm=64,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=6,
    mamba_n_groups=2,
    mamba_chunk_size=5,
    attention_out_multiplier=0.5,
)
model = FalconH1ForCausalLM(config).eval()
for key, p in model.named_parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=0.5 if "embed" in key else p[0].numel() ** -0.5)
tokens = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(5))
bridge = build_bridge_from_module(model, "FalconH1ForCausalLM", hf_config=config)
with torch.no_grad():
    _, cache = bridge.run_with_cache(tokens)
    parts, labels = cache.decompose_resid(2, return_labels=True)
    stream = cache["blocks.1.hook_resid_post"]
    off = float((parts.sum(0) - stream).abs().max())
    mixers = sum(cache[f"blocks.{i}.mamba.hook_out"] * config.ssm_out_multiplier for i in range(2))
    attention = sum(cache[f"blocks.{i}.attn.hook_out"] for i in range(2)) * (1 - config.attention_out_multiplier)
    mended = float((parts.sum(0) + mixers - attention - stream).abs().max())
print("components:", ", ".join(labels))
print(f"their sum less the stream: up to {off:.2g}, std of the stream {float(stream.std()):.2g}")
print(f"with both mixers, and attention times its factor: {mended:.0e}")
as_described = off > float(stream.std()) and mended < 1e-3
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
