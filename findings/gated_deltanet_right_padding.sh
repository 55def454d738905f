#!/usr/bin/env bash
# Gated DeltaNet in transformers (Qwen3-Next): after a right-padded prompt the logits are right and the
# state in the cache is not, so every later token is wrong, whatever mask and positions are given.
#
# A mask hides padding from attention at every later step. A recurrence has no later chance: what the
# padding wrote into the state, and what it decayed there, stays. The blocks zero the inputs at masked
# positions, which is enough in front of the prompt (the state is still zero) and not behind it: the
# decay goes on and the convolution's window slides past the last real tokens. The logits at the last
# real token are right, so a check of the prompt alone shows nothing. Qwen3, attention only, is right
# with the same call. Left padding is right in both.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU (last digits vary), logits of std 1:
#     largest error of the logits against no padding
#     qwen3_next  left    last token of the prompt 8e-07   the next token 6.6e-06
#     qwen3_next  right   last token of the prompt 4e-07   the next token 3.5
#     qwen3       left    last token of the prompt 7e-07   the next token 7.2e-07
#     qwen3       right   last token of the prompt 8e-07   the next token 7.7e-07
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
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_hidden_layers=4,
)
MODELS = {
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SHAPE,
            num_experts=0,
            mlp_only_layers=[0, 1, 2, 3],
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            linear_conv_kernel_dim=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
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
def errors(model, prompt, following, side, n=5):
    want = model(torch.cat([prompt, following], 1)).logits
    pads, ones = torch.zeros(1, n, dtype=torch.long), torch.ones_like(prompt)
    padded = torch.cat([pads, prompt] if side == "left" else [prompt, pads], 1)
    mask = torch.cat([pads, ones] if side == "left" else [ones, pads], 1)
    last = int(mask.nonzero()[-1, 1])
    out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    step = model(
        following,
        attention_mask=torch.cat([mask, torch.ones_like(following)], 1),
        position_ids=torch.tensor([[prompt.shape[1]]]),
        cache=out.cache,
        use_cache=True,
    )
    return (
        float((out.logits[:, last] - want[:, -2]).abs().max()),
        float((step.logits[:, -1] - want[:, -1]).abs().max()),
    )


tokens = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(5))
as_described = True
print("largest error of the logits against no padding")
for name in MODELS:
    for side in ("left", "right"):
        prompt, following = errors(build(name), tokens[:, :8], tokens[:, 8:], side)
        print(f"{name:<10}  {side:<5}   last token of the prompt {prompt:.0e}   the next token {following:.2g}")
        wrong = name == "qwen3_next" and side == "right"
        as_described &= prompt < 1e-3 and ((following > 0.1) if wrong else (following < 1e-3))
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
