"""Scripts that show what the packages do; each one runs from the repository root with `python -m`."""
