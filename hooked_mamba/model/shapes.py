"""Which weights a config calls for, read from the modules themselves, which are built without allocating memory."""

from __future__ import annotations

from hooked_mamba.config import ModelConfig
from hooked_mamba.model.hooked_model import HookedModel, model_class

Shape = tuple[int, ...]


def weight_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Every weight of a model of `cfg`, by its name, with its shape; a tied unembedding is left out."""
    return shapes_of(model_class(cfg).empty(cfg))


def shapes_of(model: HookedModel) -> dict[str, Shape]:
    """The shapes of what a checkpoint of the model holds."""
    return {name: tuple(value.shape) for name, value in model.state_dict_for_files().items()}
