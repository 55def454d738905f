"""What a model that nobody here trained knows, and where: the character classifier of the PyPI package typeseg."""
