#!/usr/bin/env bash
# OLMo Hybrid in transformers: loading a file and saving it again renames a norm of the attention layers,
# so one name in the file means two different norms.
#
# In the model, `post_attention_layernorm` is the norm BEFORE the MLP in a DeltaNet layer (pre-norm) and
# the norm of attention's OUTPUT in an attention layer (post-norm, as in OLMo 2). from_pretrained renames
# a file's `feedforward_layer_norm` to it; save_pretrained applies the rule backwards to every layer, the
# attention layers too. from_pretrained takes either name, so inside the library nothing shows. A reader
# of the file finds `feedforward_layer_norm` in every layer, and to take it for the norm before the MLP is
# right in the DeltaNet layers alone. And the names of state_dict() are not those in the file:
# load_state_dict() refuses what save_pretrained() has written.
#
# Seen with torch 2.13.0 and transformers 5.24.0 on a CPU:
#     layer 3 (full_attention), file as loaded:  post_attention_layernorm post_feedforward_layernorm
#     layer 3 (full_attention), file as saved:   feedforward_layer_norm post_feedforward_layernorm
#     layer 0 (linear_attention), file as saved: attention_layer_norm feedforward_layer_norm
#     missing on loading: none; change of the logits by the round trip: 0
#     names in state_dict() and not in the file: 10
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'EOF'
import os
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

transformers.utils.logging.disable_progress_bar()
print("torch", torch.__version__, "transformers", transformers.__version__)

torch.manual_seed(0)
model = OlmoHybridForCausalLM(
    OlmoHybridConfig(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_conv_kernel_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
).eval()
for p in model.parameters():
    if p.dim() == 1:
        torch.nn.init.uniform_(p, 0.5, 1.5)  # norms that differ, so that a swapped one would show


def norms(tensors, layer):
    """Names of a layer's own norms, without those inside attention and DeltaNet."""
    start = f"model.layers.{layer}."
    names = (key.removeprefix(start) for key in tensors if key.startswith(start))
    return sorted(n.removesuffix(".weight") for n in names if "norm" in n and n.count(".") == 1)


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "model.safetensors")
    model.save_pretrained(folder)
    given = {
        key.replace("layers.3.feedforward_layer_norm", "layers.3.post_attention_layernorm"): tensor
        for key, tensor in load_file(path).items()
    }
    save_file(given, path, metadata={"format": "pt"})
    loaded, info = OlmoHybridForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded.eval().save_pretrained(folder)
    saved = load_file(path)

tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    change = float((loaded(tokens).logits - model(tokens).logits).abs().max())
unknown = set(loaded.state_dict()) - set(saved)
print("layer 3 (full_attention), file as loaded: ", *norms(given, 3))
print("layer 3 (full_attention), file as saved:  ", *norms(saved, 3))
print("layer 0 (linear_attention), file as saved:", *norms(saved, 0))
print(
    f"missing on loading: {', '.join(info['missing_keys']) or 'none'}; "
    f"change of the logits by the round trip: {change:.2g}"
)
print("names in state_dict() and not in the file:", len(unknown))
as_described = (
    norms(given, 3) == ["post_attention_layernorm", "post_feedforward_layernorm"]
    and norms(saved, 3) == ["feedforward_layer_norm", "post_feedforward_layernorm"]
    and norms(saved, 0) == ["attention_layer_norm", "feedforward_layer_norm"]
    and not info["missing_keys"]
    and not info["unexpected_keys"]
    and change < 1e-3
    and "model.layers.3.post_attention_layernorm.weight" in unknown
)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
