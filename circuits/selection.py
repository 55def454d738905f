"""The old place of :mod:`circuits.patch_effects`, for one release."""

from hooked_mamba.renamed import renamed_in

__getattr__ = renamed_in(
    __name__, {name: f"circuits.patch_effects.{name}" for name in ("PatchEffects", "Split", "patch_effects")}
)
