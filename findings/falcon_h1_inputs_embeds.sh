#!/usr/bin/env bash
# Falcon-H1 in transformers: model(inputs_embeds=model.get_input_embeddings()(ids)) is not model(ids).
#
# The model multiplies the embeddings by config.embedding_multiplier only where it looks them up itself;
# given as inputs_embeds, they are taken as they come. GraniteMoeHybrid, a hybrid with a field of the
# same name, multiplies after either. Whatever goes through inputs_embeds (soft prompts, noise on the
# embeddings, integrated gradients, which needs the two calls to be equal at its end point) runs a
# different Falcon-H1, without a warning; scaling the embeddings by hand, which mends this one, breaks
# the other. RMSNorm in every block does not undo it, as it changes the embedding's share of the stream.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU (last digits vary), logits of std 1:
#     largest change of the logits when the embeddings are passed as inputs_embeds
#     falcon_h1         as they are 4   times embedding_multiplier 0
#     granitemoehybrid  as they are 0   times embedding_multiplier 1.9
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
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
)

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
    embedding_multiplier=5.0,
    mamba_d_state=6,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_chunk_size=5,
)
MODELS = {
    "falcon_h1": lambda: FalconH1ForCausalLM(FalconH1Config(**SHAPE, mamba_d_ssm=64, head_dim=8)),
    "granitemoehybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SHAPE,
            layer_types=["mamba", "attention", "mamba"],
            position_embedding_type="rope",
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=40,
        )
    ),
}


def build(name):
    """A model whose every matrix is random and of order one in effect: nothing is hidden by a small init."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("largest change of the logits when the embeddings are passed as inputs_embeds")
for name in MODELS:
    model = build(name)
    with torch.no_grad():
        want, embeds = model(tokens).logits, model.get_input_embeddings()(tokens)
        plain, scaled = (
            float((model(inputs_embeds=s * embeds).logits - want).abs().max())
            for s in (1.0, model.config.embedding_multiplier)
        )
    print(f"{name:<16}  as they are {plain:.2g}   times embedding_multiplier {scaled:.2g}")
    wrong, right = (plain, scaled) if name == "falcon_h1" else (scaled, plain)
    as_described &= wrong > 0.1 and right < 1e-3
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
