"""Compile kernels for a GPU that is not there, exactly as an op launches them, and read what became of them.

    with recorded_launches("cuda", 90) as launches:
        selective_scan(...)
    launches[0].registers

A stand-in for the driver answers for the device; a launch compiles and is written down, but nothing runs: the outputs
of the op hold whatever memory held. Not for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launch:
    """One kernel as compiled for one launch."""

    kernel: str
    constants: dict[str, object]
    warps: int
    shared: int
    """Shared memory, bytes."""
    registers: int | None = None
    stack: int | None = None
    """Bytes of stack per thread: not 0 means registers did not suffice."""
    local_loads: int | None = None
    loops: list[Counter] = field(default_factory=list)
    """Instructions of each loop that holds no other loop, by name without suffixes, in the order of the code."""

    @property
    def slots(self) -> list[float]:
        """Issue slots per number of the state and position, of each loop of a kernel that walks along Mamba-1."""
        sizes = [self.constants.get(name) for name in ("BE", "N", "T")]
        if None in sizes:
            return []
        states = sizes[0] * sizes[1] * sizes[2]
        return [loop.total() * 32 * self.warps / states for loop in self.loops]

    def summary(self) -> dict[str, object]:
        """What a test looks at."""
        flags = {k: v for k, v in self.constants.items() if isinstance(v, (bool, int))}
        return {
            "kernel": self.kernel,
            "constants": flags,
            "registers": self.registers,
            "stack": self.stack,
            "local_loads": self.local_loads,
            "shared": self.shared,
            "slots": self.slots,
        }


class _Absent:
    """Answers for a device that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def recorded_launches(backend: str, arch: int | str) -> Iterator[list[Launch]]:
    """Record the launches of the block instead of making them."""
    launches: list[Launch] = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if name.isupper()}
        launch = Launch(self.__name__, constants, kernel.metadata.num_warps, kernel.metadata.shared)
        launches.append(_inspect(launch, kernel))
        return kernel

    driver.set_active(_Absent(GPUTarget(backend, arch, 64 if backend == "hip" else 32)))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = original
        driver._active = None


def _inspect(launch: Launch, kernel: triton.compiler.CompiledKernel) -> Launch:
    """Fill in what the binary tells."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            code = _tool("nvdisasm", "-c", file.name)
        launch.registers, launch.stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        instructions, launch.loops = innermost_loops(code)
        launch.local_loads = instructions["LDL"]
    elif "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        launch.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1))
        launch.stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code).group(1))
    return launch


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def innermost_loops(code: str) -> tuple[Counter, list[Counter]]:
    """All instructions of a disassembly, and those of each loop that holds no other.

    A loop is what stands between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            text = re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip())
            names.append(text.split()[0].split(".")[0])
            target = re.search(r"^BRA.*?`\((\.L_\w+)\)", text)
            if target and labels.get(target[1], len(names)) < len(names) - 1:
                loops.append((labels[target[1]], len(names)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return Counter(names), [Counter(names[start:stop]) for start, stop in sorted(inner)]
