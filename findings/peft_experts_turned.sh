#!/usr/bin/env bash
# PEFT: a LoRA on a square experts' parameter that 0.19 saved is read by 0.21 transposed, without a word.
#
# With target_parameters a LoRA sits on a bare parameter of shape (experts, out, in). Release 0.19 takes its second
# axis for the layer's input, releases from 0.20 on its third: A and B exchange their sides. Where out and in differ,
# loading an older file fails by its sizes. Where they are equal (a gate_up_proj whose experts are half as wide as
# the stream, as in OLMoE) it loads, and what is added to the weight is the product of the wrong sides. Nothing looks
# at the peft_version that both write into adapter_config.json.
#
# Seen with torch 2.13.0, transformers 5.24.0, peft 0.19.0 and 0.21.2 on a CPU, a tiny Qwen3-Next (last digits vary),
# logits of size 3:
#     saved by 0.21.2, loaded by 0.21.2     0 off the model that was saved
#     saved by 0.19.0, loaded by 0.21.2     5.6 off
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$dir/venv/bin/pip" install --quiet --no-compile --no-deps --target "$dir/older" peft==0.19.0

cat > "$dir/run.py" <<'PY'
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

what, folder = sys.argv[1:]
torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    layer_types=["linear_attention", "full_attention"], pad_token_id=0,
)
model = Qwen3NextForCausalLM(config).eval()
for key, p in model.named_parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=1 if "embed" in key else p.shape[-1] ** -0.5)
assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 16, 16)
tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    if what == "save":
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]))
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p)
        adapted.save_pretrained(folder)
        torch.save(adapted.eval()(tokens).logits, f"{folder}/logits.pt")
    else:
        adapted = PeftModel.from_pretrained(model, folder).eval()
        saved = torch.load(f"{folder}/logits.pt", weights_only=True)
        off = float((adapted(tokens).logits - saved).abs().max())
        by = adapted.peft_config["default"].peft_version
        print(f"saved by {by}, loaded by {peft.__version__}     {off:.2g} off, logits to {float(saved.abs().max()):.2g}")
        print(f"{off:.6f}", file=open(f"{folder}/off", "w"))
PY
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
"$dir/venv/bin/python" -W ignore "$dir/run.py" save "$dir/new"
PYTHONPATH="$dir/older" "$dir/venv/bin/python" -W ignore "$dir/run.py" save "$dir/old"
"$dir/venv/bin/python" -W ignore "$dir/run.py" load "$dir/new"
"$dir/venv/bin/python" -W ignore "$dir/run.py" load "$dir/old"
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys

new, old = (float(open(f"{sys.argv[1]}/{name}/off").read()) for name in ("new", "old"))
raise SystemExit(0 if new < 1e-4 and old > 0.1 else "the behaviour has changed")
PY
