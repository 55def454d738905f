#!/usr/bin/env bash
# nemotron-lens: hook_attn_out_prelinear is the output of attention AFTER o_proj, and on transformers' own
# classes the sites of experts do not exist.
#
# The name says "before the linear map", where heads are still apart. The hook sits on the output of the
# attention module, behind o_proj, so that no head can be read from it. hook_moe_out and hook_expert are found
# by the class name of the hub's code; transformers' own class is called otherwise, so that hook_points() lists
# no site of any MoE layer beside the stream, without a warning.
#
# Seen with torch 2.13.0, transformers 5.24.0 and nemotron-lens 0.1.0 on a CPU:
#     hook_attn_out_prelinear less o_proj's output: 0e+00, less its input: 3.8
#     sites of the MoE layer: blocks.1.hook_resid_post, blocks.1.hook_resid_pre
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 nemotron-lens==0.1.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
import transformers
from nemotron_lens import HookedNemotron
from transformers import NemotronHConfig, NemotronHForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = NemotronHConfig(
    vocab_size=61,
    hidden_size=32,
    layers_block_type=["mamba", "moe", "attention", "mlp"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    mamba_num_heads=6,
    mamba_head_dim=8,
    ssm_state_size=6,
    n_groups=2,
    chunk_size=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=28,
)
model = NemotronHForCausalLM(config).eval()
for key, p in model.named_parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=0.5 if "embed" in key else p[0].numel() ** -0.5)
tokens = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(5))
hooked = HookedNemotron(model)
attention = next(m for name, m in model.named_modules() if name.endswith("layers.2.mixer"))
seen = {}
attention.o_proj.register_forward_hook(lambda module, args, out: seen.update(before=args[0], after=out))
with torch.no_grad():
    _, cache = hooked.run_with_cache(tokens, names=["blocks.2.hook_attn_out_prelinear"])
found = cache["blocks.2.hook_attn_out_prelinear"]
after = float((found - seen["after"]).abs().max())
before = float((found - seen["before"]).abs().max()) if found.shape == seen["before"].shape else float("inf")
of_moe = [name for name in hooked.hook_points(include_experts=True) if name.startswith("blocks.1.")]
print(f"hook_attn_out_prelinear less o_proj's output: {after:.0e}, less its input: {before:.2g}")
print("sites of the MoE layer:", ", ".join(of_moe))
as_described = after == 0 and before > 0.05 and all("resid" in name for name in of_moe)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
