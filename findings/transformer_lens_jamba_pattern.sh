#!/usr/bin/env bash
# TransformerLens, Jamba: edits of hook_pattern and hook_attn_scores are taken and change nothing.
#
# With the attention that transformers chooses (sdpa) the bridge lists both sites and neither ever fires: a
# hook there is never called, without a warning. With attn_implementation="eager" both fire and hold the right
# pattern, but what a hook returns is thrown away, since the values have been mixed by then. An ablation of a
# head through its pattern comes out as exactly no effect. An edit of hook_z acts. In the bridges of Bamba,
# Granite 4 and Falcon-H1 an edit of the pattern acts.
#
# Seen with torch 2.13.0, transformers 5.24.0 and transformer-lens 4.3.0 on a CPU (last digits vary):
#     attention  site              listed  calls  change of the logits when set to 0
#     sdpa       hook_attn_scores  True    0      0
#     sdpa       hook_pattern      True    0      0
#     sdpa       hook_z            True    1      2.3
#     eager      hook_attn_scores  True    1      0
#     eager      hook_pattern      True    1      0
#     eager      hook_z            True    1      2.3
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
from transformers import JambaConfig, JambaForCausalLM

logging.disable(logging.WARNING)
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

print("torch", torch.__version__, "transformers", transformers.__version__)
tokens = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(5))


def build(attention):
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=6,
        mamba_dt_rank=5,
        pad_token_id=0,
    )
    model = JambaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p[0].numel() ** -0.5)
    return build_bridge_from_module(model, "JambaForCausalLM", hf_config=config)


@torch.no_grad()
def try_site(bridge, site):
    want, calls = bridge(tokens), []

    def zero(value, hook):
        calls.append(site)
        return torch.zeros_like(value)

    name = f"blocks.1.attn.{site}"
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero)])
    return name in bridge.hook_dict, len(calls), float((edited - want).abs().max())


as_described = True
print("attention  site              listed  calls  change of the logits when set to 0")
for attention in ("sdpa", "eager"):
    bridge = build(attention)
    for site in ("hook_attn_scores", "hook_pattern", "hook_z"):
        listed, calls, change = try_site(bridge, site)
        print(f"{attention:<9}  {site:<16}  {listed!s:<6}  {calls}      {change:.2g}")
        as_described &= listed and calls == (site == "hook_z" or attention == "eager")
        as_described &= (change > 0.05) if site == "hook_z" else (change == 0)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
