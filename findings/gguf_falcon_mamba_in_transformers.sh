#!/usr/bin/env bash
# A Falcon-Mamba in a GGUF file becomes a plain Mamba in transformers, without a warning.
#
# llama.cpp gives both the architecture "mamba"; the key mamba.ssm.dt_b_c_rms alone says that dt, B and C
# have norms. The norms have no weights, so no tensor is left over that could tell. transformers does not
# read the key and makes a MambaForCausalLM of it, whose logits are other ones. The file is written here
# with gguf's own writer and name tables, as llama.cpp's converter writes it, and all in float32; a plain
# Mamba written the same way comes back as it was.
#
# Seen with torch 2.13.0, transformers 5.24.0 and gguf 0.19.0 on a CPU (last digits vary), logits of std 1:
#     largest change of the logits on the way through a GGUF file
#     mamba         read as MambaForCausalLM: 0
#     falcon_mamba  read as MambaForCausalLM: 1.4
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0

TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - "$dir" <<'EOF'
import sys
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
D, E, N, R, V = 32, 64, 8, 4, 61
FIELDS = dict(hidden_size=D, num_hidden_layers=2, state_size=N, time_step_rank=R, vocab_size=V, layer_norm_epsilon=1e-5)
MODELS = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**FIELDS)),
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(
        transformers.FalconMambaConfig(**FIELDS, mixer_rms_eps=1e-5)
    ),
}


def build(name):
    """A model whose matrices are of order one in effect, so that a small init hides nothing."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, p in model.named_parameters():
        if p.dim() == 2 and not key.endswith("A_log"):
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


def write(model, path):
    """What llama.cpp's converter writes."""
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(E)
    writer.add_ssm_state_size(N)
    writer.add_ssm_time_step_rank(R)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_dt_b_c_rms(model.config.model_type == "falcon_mamba")
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(V)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, 2)
    for key, tensor in model.state_dict().items():
        if key.endswith("A_log"):
            tensor = -tensor.exp()
        if key.endswith("conv1d.weight"):
            tensor = tensor.squeeze()
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


tokens = torch.randint(3, V, (2, 17), generator=torch.Generator().manual_seed(5))
as_described = True
print("largest change of the logits on the way through a GGUF file")
for name in MODELS:
    model, folder = build(name), Path(sys.argv[1]) / name
    folder.mkdir()
    write(model, folder / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        change = float((again(tokens).logits - model(tokens).logits).abs().max())
    print(f"{name:<12}  read as {type(again).__name__}: {change:.2g}")
    as_described &= type(again).__name__ == "MambaForCausalLM"
    as_described &= change > 0.1 if name == "falcon_mamba" else change < 1e-4
raise SystemExit(0 if as_described else "the behaviour has changed")
EOF
