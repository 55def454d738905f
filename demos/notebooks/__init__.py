"""Notebooks: each runs by itself, in Jupyter or in Colab; `python -m demos.notebooks` keeps their outputs."""
