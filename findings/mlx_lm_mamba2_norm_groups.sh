#!/usr/bin/env bash
# Mamba-2 in mlx-lm with n_groups above 1: the gated norm takes its mean over all channels, not per group.
#
# Checkpoints with several groups (Codestral-Mamba has 8) were trained with a mean square per group, which is
# what mamba_ssm computes, transformers since release 5, and mlx-lm's own Nemotron-H; its Mamba-2 and its
# Granite 4 take one mean over the full width. With one group both are the same.
#
# Seen with torch 2.13.0, transformers 5.24.0, mlx 0.32.4 (CPU) and mlx-lm 0.32.2 (last digits vary),
# logits of std 1:
#     largest difference of the logits between transformers and mlx-lm
#     n_groups=1  2e-06
#     n_groups=2  2
#     n_groups=4  3
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
SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, expand=2, num_heads=8, head_dim=8, state_size=6)


def build(groups):
    """A model whose every matrix is random and of order one in effect."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**SHAPE, n_groups=groups, chunk_size=5, tie_word_embeddings=False)
    model = transformers.Mamba2ForCausalLM(config).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


tokens = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(5))
found = {}
print("largest difference of the logits between transformers and mlx-lm")
for groups in (1, 2, 4):
    model, folder = build(groups), Path(sys.argv[1]) / str(groups)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 64  # a field that mlx-lm asks for and transformers does not write: the inner width
    (folder / "config.json").write_text(json.dumps(config))
    peer, _ = load_model(folder)
    theirs = torch.from_numpy(np.array(peer(mx.array(tokens.numpy())).astype(mx.float32)))
    with torch.no_grad():
        found[groups] = float((theirs - model(tokens).logits).abs().max())
    print(f"n_groups={groups}  {found[groups]:.1g}")
as_described = all(found[g] > 0.1 if g > 1 else found[g] < 1e-3 for g in found)
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
