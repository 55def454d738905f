#!/usr/bin/env bash
# PEFT on Mamba: a LoRA on dt_proj is accepted, gets no gradient and no effect, until it is merged: then it acts.
#
# transformers' Mamba mixers (Mamba, Falcon-Mamba, Jamba) hand dt_proj.weight to functions and never call the
# module, so the wrapper that PEFT puts in its place never runs. PEFT refuses conv1d and out_proj on these models
# for that reason, and takes dt_proj: training goes on, its B stays where it was (zero, or whatever it was loaded
# with), and any weight there changes nothing. merge_and_unload() adds the product to the weight, which the
# functions do read: the merged model is not the one that ran before.
#
# Seen with torch 2.13.0, transformers 5.24.0 and peft 0.21.2 on a CPU (last digits vary), B drawn at random:
#     family        gradient of B   change of the logits: by the adapter, by merging it
#     mamba         none            0, 2.5
#     falcon_mamba  none            0, 10
#     jamba         none            0, 4.2
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

print("torch", torch.__version__, "transformers", t.__version__, "peft", peft.__version__)
SHAPE = dict(hidden_size=32, num_hidden_layers=2, vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_experts=1, num_experts_per_tok=1)
MODELS = {
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**SHAPE, state_size=6, time_step_rank=5)),
    "falcon_mamba": lambda: t.FalconMambaForCausalLM(t.FalconMambaConfig(**SHAPE, state_size=6, time_step_rank=5)),
    "jamba": lambda: t.JambaForCausalLM(
        t.JambaConfig(**SHAPE, **HEADS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=6, mamba_dt_rank=5)
    ),
}


def build(name):
    """A model whose every matrix is random and of order one in effect: nothing is hidden by a small init."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p[0].numel() ** -0.5)
    return model


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("family        gradient of B   change of the logits: by the adapter, by merging it")
for name in MODELS:
    model = build(name)
    with torch.no_grad():
        base = model(tokens).logits
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["dt_proj"])).eval()
    factors = [p for key, p in adapted.named_parameters() if "lora_B" in key]
    for p in factors:
        torch.nn.init.normal_(p)
    logits = adapted(tokens).logits
    gradient = "none"
    if logits.requires_grad:
        logits.square().sum().backward()
        gradient = "none" if all(p.grad is None or not p.grad.any() for p in factors) else "there"
    by_adapter = float((logits.detach() - base).abs().max())
    with torch.no_grad():
        by_merging = float((adapted.merge_and_unload()(tokens).logits - base).abs().max())
    print(f"{name:<13} {gradient:<15} {by_adapter:.2g}, {by_merging:.2g}")
    as_described &= gradient == "none" and by_adapter < 1e-5 and by_merging > 0.05
raise SystemExit(0 if as_described else "the behaviour has changed")
PY
