"""The old place of :class:`hooked_mamba.frozen.tokens.TokenPath`, for one release."""

from hooked_mamba.renamed import renamed_in

__getattr__ = renamed_in(__name__, {"TokenPath": "hooked_mamba.frozen.tokens.TokenPath"})
