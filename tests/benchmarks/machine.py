"""Where and with what the figures were measured."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "hooked-mamba",
    "torch",
    "numba",
    "transformers",
    "rwkv",
    "mambapy",
    "mamba-lens",
    "transformer-lens",
    "sae-lens",
)


def cpu_model() -> str:
    """The processor's name and its widest vectors, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
        )
        name = fields.get("model name", name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> str:
    """Python and the packages that take part."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)


def described(command: str, load: float) -> str:
    """One paragraph for the head of a report; `load` is the system's mean of running processes at the start."""
    return (
        f"Measured {datetime.date.today():%Y-%m-%d} by `{command}` with {torch.get_num_threads()} thread(s) on"
        f" {cpu_model()}; {load:.1f} processes were running at the start. {versions()}."
    )
