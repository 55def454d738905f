#!/usr/bin/env bash
# TransformerLens, Falcon-H1: eager_scan=True, which opens the scan's sites, gives other logits.
#
# TransformerLens runs a loop of its own in place of transformers' scan where eager_scan is set, so that
# states and writes become sites. In Falcon-H1's bridge that loop leaves out what is special to this family.
# With mamba_rms_norm=True the logits are others, without an error or a warning; with mamba_rms_norm=False,
# as in most published Falcon-H1, the call ends in a TypeError. In Bamba's bridge the same loop gives the same
# logits.
#
# Seen with torch 2.13.0, transformers 5.24.0 and transformer-lens 4.3.0 on a CPU (last digits vary):
#     bamba                      logits change by 1.2e-06, their std 0.97
#     falcon_h1, mamba_rms_norm  logits change by 2.1, their std 0.99
#     falcon_h1                  TypeError: Identity.forward() takes 2 positional arguments but 3 were given
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
from transformers import BambaConfig, BambaForCausalLM, FalconH1Config, FalconH1ForCausalLM

logging.disable(logging.WARNING)
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

print("torch", torch.__version__, "transformers", transformers.__version__)
SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=6,
    mamba_n_groups=2,
    mamba_chunk_size=5,
)
FALCON = dict(SHAPE, head_dim=8, mamba_d_ssm=64, ssm_multipliers=[0.7, 0.5, 0.6, 0.8, 0.9])
MODELS = {
    "bamba": lambda: BambaForCausalLM(BambaConfig(**SHAPE, attn_layer_indices=[1])),
    "falcon_h1, mamba_rms_norm": lambda: FalconH1ForCausalLM(FalconH1Config(**FALCON, mamba_rms_norm=True)),
    "falcon_h1": lambda: FalconH1ForCausalLM(FalconH1Config(**FALCON, mamba_rms_norm=False)),
}
tokens = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def change(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p[0].numel() ** -0.5)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    want = bridge(tokens, use_cache=False)
    mixer = bridge.blocks[0].mixer if name == "bamba" else bridge.blocks[0].mamba
    mixer.eager_scan = True
    try:
        got = bridge(tokens, use_cache=False)
    except TypeError as error:
        return f"TypeError: {error}", float(want.std())
    return float((got - want).abs().max()), float(want.std())


found = {name: change(name) for name in MODELS}
for name, (off, std) in found.items():
    said = f"logits change by {off:.2g}, their std {std:.2g}" if isinstance(off, float) else off
    print(f"{name:<26} {said}")
as_described = found["bamba"][0] < 1e-4 and found["falcon_h1, mamba_rms_norm"][0] > 0.1
as_described &= isinstance(found["falcon_h1"][0], str)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
