#!/usr/bin/env bash
# OLMo Hybrid in transformers: saved convolution weights of q, k and v are cut in equal thirds, so a file's
# q_conv1d holds rows that belong to k, and k_conv1d rows that belong to v.
#
# The model keeps one fused convolution over the channels of q, k and v side by side. Files have three
# tensors. Loading joins them; saving divides the fused weight into three chunks of equal size, whatever
# the widths of q, k and v are. With the defaults a value head is twice as wide as a key head, so the
# thirds never fall on the borders. Inside the library nothing shows: joined again, the rows are right.
# A reader that takes q_conv1d for the convolution of q gets a wrong shape, or, where shapes happen to
# agree with another reading, wrong channels. The projections q_proj, k_proj and v_proj are apart in the
# model and saved with their true rows.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU, 2 key heads of 6 and 4 value heads of 5:
#     rows of q, k, v          in the model 12 12 20
#     rows of *_proj in file   12 12 20
#     rows of *_conv1d in file 15 15 14
#     joined, they are the model's weight: True; read back by the library, all weights equal: True
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - "$dir/model" <<'PYTHON'
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.utils.logging.disable_progress_bar()

cfg = OlmoHybridConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=6,
    linear_value_head_dim=5,
    pad_token_id=0,
)
torch.manual_seed(0)
model = OlmoHybridForCausalLM(cfg)
model.save_pretrained(sys.argv[1])
file = load_file(f"{sys.argv[1]}/model.safetensors")
at = "model.layers.0.linear_attn."
true = [12, 12, 20]
projections = [len(file[f"{at}{part}_proj.weight"]) for part in "qkv"]
convolutions = [len(file[f"{at}{part}_conv1d.weight"]) for part in "qkv"]
fused = next(p for name, p in model.named_parameters() if name.endswith("layers.0.linear_attn.conv1d.weight"))
joined = torch.cat([file[f"{at}{part}_conv1d.weight"] for part in "qkv"])
back = OlmoHybridForCausalLM.from_pretrained(sys.argv[1])
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
print("rows of q, k, v          in the model", *true)
print("rows of *_proj in file  ", *projections)
print("rows of *_conv1d in file", *convolutions)
print("joined, they are the model's weight:", torch.equal(joined, fused), "; read back, all weights equal:", same)
ok = projections == true and convolutions == [15, 15, 14] and torch.equal(joined, fused) and same
sys.exit(0 if ok else 1)
PYTHON
