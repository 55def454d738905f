#!/usr/bin/env bash
# circuit-tracer: a prompt ends in a bare StopIteration where the tokenizer's only special token has the id 0.
#
# In front of a prompt that does not begin with a special token circuit-tracer puts one: the first of bos, pad and eos and
# the other special ids that is not falsy. An id of 0 is, so that it counts as absent, and with no other special token
# the search ends in StopIteration, without a message. GPT-NeoX' tokenizer, which Pythia and the first Mamba models use,
# is of this kind: <|endoftext|> is its only special token, with the id 0. The warning that is meant for tokenizers
# without special tokens is never reached. A prompt that begins with token 0 passes.
#
# Seen with torch 2.13.0, circuit-tracer 0.5.0, transformers 4.57.3 on a CPU, "a b" in a vocabulary of three entries:
#     id of <|endoftext|>   what the prompt becomes
#     0                     StopIteration('')
#     2                     [2, 0, 1]
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0
"$dir/venv/bin/pip" install --quiet --no-compile circuit-tracer==0.5.0 transformers==4.57.3

HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

import torch
from circuit_tracer.replacement_model.common import ensure_tokenized
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print("torch", torch.__version__, *(f"{name} {version(name)}" for name in ("circuit-tracer", "transformers")))
END = "<|endoftext|>"


def read(*words):
    """ "a b" with a tokenizer whose entries are these words and whose only special token is the end of text."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token=END)), bos_token=END, eos_token=END, unk_token=END
    )
    try:
        return str(ensure_tokenized(torch.tensor([ids["a"], ids["b"]]), tokenizer, "cpu", "pythia-70m").tolist())
    except StopIteration as error:
        return f"StopIteration({str(error)!r})"


found = {0: read(END, "a", "b"), 2: read("a", "b", END)}
print("id of <|endoftext|>   what the prompt becomes")
for place, said in found.items():
    print(f"{place:<21} {said}")
raise SystemExit(0 if found == {0: "StopIteration('')", 2: "[2, 0, 1]"} else "the behaviour has changed")
PY
