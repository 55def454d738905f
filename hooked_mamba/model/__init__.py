"""A language model as a stack of blocks, whatever stands in them: inputs, running, text, generation."""
