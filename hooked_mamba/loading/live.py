"""Model objects whose weights are not what they compute: what they are called, and what to give instead."""

from __future__ import annotations

from typing import Any

from hooked_mamba.loading.tables import CheckpointError

_QUANTISED = ("Linear4bit", "Linear8bitLt", "Params4bit", "QuantLinear", "WQLinear", "FP8Linear", "HQQLinear")


def refuse_wrapped(model: Any) -> None:
    """Refuse a model that something is wrapped around or put into.

    Raises
    ------
    CheckpointError
        Naming what it is, and the way out.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise CheckpointError(
            f"this model is compiled ({name} of torch.compile); give the model in it, model._orig_mod"
        )
    if name in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise CheckpointError(f"this model is wrapped for training ({name}); give the one in it, model.module")
    modules = list(model.named_modules()) if hasattr(model, "named_modules") else []
    layer = next(
        (n for n, m in modules if hasattr(m, "base_layer") or type(m).__name__ == "ModulesToSaveWrapper"), None
    )
    if hasattr(model, "peft_config") or layer is not None or getattr(model, "_hf_peft_config_loaded", False):
        at = f" (on {layer} and others)" if layer is not None else ""
        raise CheckpointError(
            f"this model has adapters of PEFT{at}, which its weights do not show: give peft_model.merge_and_unload(),"
            " or load the base from its folder with load_model(base, adapter=folder)"
        )
    method = getattr(model, "quantization_method", None)
    packed = next((n for n, m in modules if type(m).__name__.endswith(_QUANTISED)), None)
    if packed is not None or method is not None or getattr(model, "is_quantized", False):
        how = getattr(method, "value", method) or "by a library"
        at = f", such as {packed}" if packed is not None else ""
        raise CheckpointError(
            f"this model is quantised ({how}{at}), and its weights are packed: give model.dequantize(), where"
            " transformers can, or load the files with load_model, which dequantises what docs/loading.md lists"
        )
