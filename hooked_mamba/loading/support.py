"""Which files are read of which family. The table in docs/loading.md is printed from this; every cell has a test."""

from __future__ import annotations

FAMILIES = (
    "Mamba",
    "Falcon-Mamba",
    "Mamba-2",
    "Jamba",
    "Bamba",
    "Granite 4 H",
    "Nemotron-H",
    "Falcon-H1",
    "Zamba",
    "Zamba2",
    "LFM2",
    "Qwen3-Next",
    "Qwen3.5",
    "OLMo Hybrid",
    "gated DeltaNet",
    "RWKV-7",
    "Mamba-3",
)

CONVERTED = tuple(
    name for name in FAMILIES if name not in ("Zamba", "Zamba2", "OLMo Hybrid", "gated DeltaNet", "Mamba-3")
)
"""What llama.cpp's converter and mlx-lm's know; Bamba is llama.cpp's alone."""

SUPPORTED: dict[str, tuple[str, ...]] = {
    "safetensors": FAMILIES,
    "safetensors, sharded": FAMILIES,
    "PyTorch archive": FAMILIES,
    "authors' own files": ("Mamba", "Mamba-2", "RWKV-7", "Mamba-3"),
    "PEFT LoRA": FAMILIES,
    "bitsandbytes 8-bit": FAMILIES,
    "bitsandbytes 4-bit": FAMILIES,
    "GPTQ": FAMILIES,
    "AWQ": FAMILIES,
    "compressed-tensors": FAMILIES,
    "fp8": FAMILIES,
    "GGUF": CONVERTED,
    "MLX": tuple(name for name in CONVERTED if name != "Bamba"),
}
"""Kind of files -> families of which a test reads them."""


def support_table() -> str:
    """Families by kinds of files; a cell is empty where nothing was tested."""
    lines = [f"| | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    for kind, families in SUPPORTED.items():
        cells = ("yes" if family in families else "" for family in FAMILIES)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
