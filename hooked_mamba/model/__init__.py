"""A language model as a stack of blocks of any kind: inputs, running, text, generation."""
