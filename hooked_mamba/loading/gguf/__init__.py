"""GGUF, the files of llama.cpp: one table an architecture, and what its converter does to weights, undone."""
