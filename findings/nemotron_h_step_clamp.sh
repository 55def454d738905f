#!/usr/bin/env bash
# Nemotron-H in transformers: the same tokens give other logits as a prompt than as single steps,
# because only the prompt's dt is clamped, and the config field that names the clamp is not the one used.
#
# After the softplus the scan of a prompt clamps dt to at least config.time_step_min, which is 0.001 by
# default and elsewhere only shapes the initial dt_bias. A step of one token does not clamp. The field
# time_step_limit, (0, inf) by default, which says that nothing is clamped, is not read: a value given
# there changes nothing. So a head that has learnt a dt below 0.001, that is, one that hardly writes or
# forgets, behaves differently while a prompt is read and while text is generated. With
# time_step_min = 1e-30 in force, the two agree: the clamp is the whole of the difference.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU (last digits vary), logits of std 1, D = 0:
#     largest error of the logits, all tokens one by one against one pass
#     dt about 0.1     time_step_min 0.001   8e-06
#     dt about 0.0001  time_step_min 0.001   3
#     dt about 0.0001  time_step_min 1e-30   2e-06
#     change of the logits of one pass when time_step_limit goes from (0, inf) to (0.01, 0.02): 0
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'EOF'
import math

import torch
import transformers
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)


def build(dt, time_step_min=0.001, **fields):
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        mamba_num_heads=6,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=6,
        conv_kernel=4,
        chunk_size=5,
        time_step_min=time_step_min,
        **fields,
    )
    model = NemotronHForCausalLM(config).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
        elif key.endswith("dt_bias"):  # softplus(dt_bias) = dt
            torch.nn.init.constant_(p, math.log(math.expm1(dt)))
        elif key.endswith(".D"):  # no skip connection: what the mixer writes comes from the state alone
            torch.nn.init.zeros_(p)
    return model


@torch.no_grad()
def error(model, tokens):
    cache = DynamicCache(config=model.config)
    steps = [model(tokens[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(tokens.shape[1])]
    return float((torch.cat(steps, 1) - model(tokens).logits).abs().max())


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("largest error of the logits, all tokens one by one against one pass")
for dt, time_step_min, wrong in ((0.1, 0.001, False), (1e-4, 0.001, True), (1e-4, 1e-30, False)):
    e = error(build(dt, time_step_min), tokens)
    print(f"dt about {dt:<7g} time_step_min {time_step_min:<5g}   {e:.1g}")
    as_described &= (e > 0.1) if wrong else (e < 1e-3)

with torch.no_grad():
    models = [build(0.1, time_step_limit=limit) for limit in ((0.0, float("inf")), (0.01, 0.02))]
    change = float((models[0](tokens).logits - models[1](tokens).logits).abs().max())
print(f"change of the logits of one pass when time_step_limit goes from (0, inf) to (0.01, 0.02): {change:g}")
as_described &= change < 1e-3
as_described &= NemotronHConfig().time_step_min == 0.001 and NemotronHConfig().time_step_limit[0] == 0.0
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
