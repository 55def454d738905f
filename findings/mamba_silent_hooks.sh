#!/usr/bin/env bash
# Mamba blocks in transformers: hooks on conv1d and dt_proj never fire, though the model uses their weights.
#
# conv1d and dt_proj are modules, listed by named_modules(). The forward hands conv1d.weight and
# dt_proj.weight to functions (fused kernels where they are installed, plain PyTorch otherwise: the
# case run here) and calls neither module. A forward hook that should record or ablate the convolution
# is accepted, is never called and changes nothing: the ablation's effect comes out as exactly zero.
# Setting the same weights to zero shows that the effect is not zero. In the same block in_proj, x_proj
# and out_proj are called and their hooks act.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU (last digits vary), logits of std 1:
#     module                           calls   change of the logits: output zeroed by a hook, weights set to zero
#     jamba mamba.conv1d               0       0, 5.6
#     jamba mamba.dt_proj              0       0, 3.4
#     jamba mamba.in_proj              1       5.6, 5.6
#     jamba mamba.x_proj               1       5, 5
#     jamba mamba.out_proj             1       5.6, 5.6
#     granitemoehybrid mamba.conv1d    0       0, 4.7
#     granitemoehybrid mamba.in_proj   1       4.7, 4.7
#     granitemoehybrid mamba.out_proj  1       4.7, 4.7
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
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, JambaConfig, JambaForCausalLM

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
    num_hidden_layers=3,
)
MODELS = {
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **SHAPE,
            attn_layer_period=3,
            attn_layer_offset=1,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=6,
            mamba_dt_rank=5,
        )
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SHAPE,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=40,
            mamba_d_state=6,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_chunk_size=5,
        )
    ),
}
SILENT = {"jamba": ("conv1d", "dt_proj"), "granitemoehybrid": ("conv1d",)}
CALLED = {"jamba": ("in_proj", "x_proj", "out_proj"), "granitemoehybrid": ("in_proj", "out_proj")}


def build(name):
    """A model whose every matrix is random and of order one in effect: nothing is hidden by a small init."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            fan_in = p[0].numel()
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else fan_in**-0.5)
    return model


@torch.no_grad()
def try_module(name, part, tokens):
    model = build(name)
    module = model.get_submodule(f"model.layers.0.mamba.{part}")
    want, calls = model(tokens).logits, []

    def zero(module, args, output):
        calls.append(part)
        return torch.zeros_like(output)

    with module.register_forward_hook(zero):
        by_hook = float((model(tokens).logits - want).abs().max())
    for p in module.parameters():
        p.zero_()
    return len(calls), by_hook, float((model(tokens).logits - want).abs().max())


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("module                           calls   change of the logits: output zeroed by a hook, weights set to zero")
for name in MODELS:
    for part in SILENT[name] + CALLED[name]:
        calls, by_hook, by_weights = try_module(name, part, tokens)
        print(f"{name + ' mamba.' + part:<32} {calls}       {by_hook:.2g}, {by_weights:.2g}")
        as_described &= by_weights > 0.05
        as_described &= (calls == 0 and by_hook < 1e-3) if part in SILENT[name] else (calls == 1 and by_hook > 0.05)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
