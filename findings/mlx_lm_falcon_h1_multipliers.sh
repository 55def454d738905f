#!/usr/bin/env bash
# A Falcon-H1 in mlx-lm: key_multiplier has no effect, and attention_in_multiplier leaves the values out.
#
# mlx-lm multiplies the factors of config.json into the weights when it loads a checkpoint. It looks for
# key_multiplier's matrix under "key_proj", which no Falcon-H1 has (it is k_proj), and for that of
# attention_in_multiplier under q_proj and k_proj, not v_proj. The loss is in files that it converts, too,
# whose config.json goes on naming all factors. Each factor is tried alone, the others at 1; those that reach
# their matrices change the logits of both libraries alike.
#
# Seen with torch 2.13.0, transformers 5.24.0, mlx 0.32.4 (CPU) and mlx-lm 0.32.2 (last digits vary),
# logits of std 1:
#     largest difference of the logits between transformers and mlx-lm, one factor at 0.5, the others at 1
#     none                      2e-06
#     ssm_in_multiplier         2e-06
#     attention_out_multiplier  2e-06
#     key_multiplier            1
#     attention_in_multiplier   3
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2

TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - "$dir" <<'EOF'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
print("torch", torch.__version__, "transformers", transformers.__version__, "mlx", mx.__version__)
FACTORS = ("ssm_in_multiplier", "attention_out_multiplier", "key_multiplier", "attention_in_multiplier")
SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    num_hidden_layers=2,
    mamba_d_ssm=64,
    mamba_d_state=6,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_chunk_size=5,
    tie_word_embeddings=False,
    mlp_multipliers=[1.0, 1.0],
    ssm_multipliers=[1.0] * 5,
    ssm_out_multiplier=1.0,
    embedding_multiplier=1.0,
    lm_head_multiplier=1.0,
)


def build(**factors):
    """A model whose every matrix is random and of order one in effect."""
    torch.manual_seed(0)
    config = transformers.FalconH1Config(**SHAPE, **(dict.fromkeys(FACTORS, 1.0) | factors))
    model = transformers.FalconH1ForCausalLM(config).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
found = {}
print("largest difference of the logits between transformers and mlx-lm, one factor at 0.5, the others at 1")
for factor in ("none", *FACTORS):
    model, folder = build(**({} if factor == "none" else {factor: 0.5})), Path(sys.argv[1]) / factor
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where published files have it, and mlx-lm reads it
    (folder / "config.json").write_text(json.dumps(config))
    peer, _ = load_model(folder)
    theirs = torch.from_numpy(np.array(peer(mx.array(tokens.numpy())).astype(mx.float32)))
    with torch.no_grad():
        found[factor] = float((theirs - model(tokens).logits).abs().max())
    print(f"{factor:<24}  {found[factor]:.1g}")
lost = ("key_multiplier", "attention_in_multiplier")
as_described = all(found[f] > 0.02 if f in lost else found[f] < 1e-3 for f in found)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
