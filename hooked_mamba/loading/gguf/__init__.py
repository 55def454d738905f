"""GGUF, the files of llama.cpp: one table an architecture, and what its converter does to weights, undone."""

from hooked_mamba.loading.gguf.opened import GGUF_FORMATS as GGUF_FORMATS
from hooked_mamba.loading.gguf.opened import gguf_file as gguf_file
from hooked_mamba.loading.gguf.opened import open_gguf as open_gguf
from hooked_mamba.loading.gguf.vocabulary import find_tokenizer as find_tokenizer
