#!/usr/bin/env bash
# TransformerLens, Granite 4 with experts: hook_expert_indices holds the router's logits, and edits of it
# change nothing.
#
# The bridge lists blocks.i.moe.hook_expert_indices. In Granite 4's bridge it fires with floats, one for every
# expert: the products of the router's input with its weights, not the numbers of the chosen experts. An
# argmax over it still gives the first choice, so that a plot looks right; an edit of it is accepted and the
# experts that work stay the same. An edit of hook_expert_weights acts, which shows that hooks of this layer can.
#
# Seen with torch 2.13.0, transformers 5.24.0 and transformer-lens 4.3.0 on a CPU (last digits vary):
#     hook_expert_indices holds (17, 4) float32, of 4 experts of which 2 are chosen
#     less the router's logits: 0e+00
#     change of the logits: indices reversed 0, weights set to 0 1.5
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
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

logging.disable(logging.WARNING)
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = GraniteMoeHybridConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=["mamba", "attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    shared_intermediate_size=40,
    num_local_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=6,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_chunk_size=5,
    position_embedding_type="rope",
)
model = GraniteMoeHybridForCausalLM(config).eval()
for key, p in model.named_parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
router = next(p for key, p in model.named_parameters() if "layers.0" in key and "router" in key)
tokens = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(5))
bridge = build_bridge_from_module(model, "GraniteMoeHybridForCausalLM", hf_config=config)


def change(site, edit):
    with torch.no_grad():
        edited = bridge.run_with_hooks(tokens, fwd_hooks=[(site, lambda value, hook: edit(value))])
    return float((edited - logits).abs().max())


with torch.no_grad():
    logits, cache = bridge.run_with_cache(tokens)
    held = cache["blocks.0.moe.hook_expert_indices"]
    off = float((cache["blocks.0.moe.gate.hook_in"] @ router.T - held).abs().max())
reversed_ = change("blocks.0.moe.hook_expert_indices", lambda x: x.flip(-1))
weights = change("blocks.0.moe.hook_expert_weights", torch.zeros_like)
print("hook_expert_indices holds", tuple(held.shape), held.dtype, "of 4 experts of which 2 are chosen")
print(f"less the router's logits: {off:.0e}")
print(f"change of the logits: indices reversed {reversed_:.2g}, weights set to 0 {weights:.2g}")
as_described = held.is_floating_point() and held.shape[-1] == 4 and off < 1e-5
as_described &= reversed_ == 0 and weights > 0.05
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
