"""This source tree beside an earlier one: `git worktree add ../old db23af9; python -m tests.benchmarks.builds ../old`.

Each tree runs in a process of its own, kept for the whole comparison; the two take turns, with the same weights and
inputs, which are made here from seeds. A job uses only what both trees have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hooked_mamba import HookedMamba, MambaConfig, ops, patching

HERE, PAGE = Path(__file__).resolve().parents[2], Path("docs/benchmark-tables.md")
BUILDS = ("earlier", "now")
H, P, N = 24, 64, 128
"""Of Mamba-2's scan."""


def prompt(length: int, seed: int = 0) -> Tensor:
    """Tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(50280, (1, length), generator=generator)


def model() -> HookedMamba:
    """The shape of mamba-130m, random weights."""
    cfg = MambaConfig(d_model=768, n_layers=24, d_vocab=50280, d_state=16)
    return HookedMamba(cfg, seed=0).requires_grad_(False)


def sweep() -> Callable[[], Any]:
    """resid_pre, 24 layers x 32 positions."""
    net = model()
    _, cache = net.run_with_cache(prompt(32), names_filter=lambda name: name.endswith("hook_resid_pre"))

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 1] - logits[:, -1, 2]

    return lambda: patching.get_act_patch_resid_pre(net, prompt(32, 1), cache, metric, progress=False)


def heads() -> Callable[[], Any]:
    """A graph of 128 heads, 64 tokens."""
    from circuits import FrozenModel, Logit
    from circuits.build import build_graph

    frozen = FrozenModel(model(), prompt(64))
    return lambda: build_graph(frozen, Logit(1, minus=2), max_features=0, max_heads=128)


def forward() -> Callable[[], Any]:
    """A whole pass, 256 tokens."""
    net = model()
    return torch.no_grad()(lambda: net(prompt(256)))


def scan(b: int, length: int, gradients: bool) -> Callable[[], Any]:
    """Mamba-2's, the same ten times."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt, A = torch.rand(b, length, H, generator=generator) / 10 + 1e-3, -1 - 15 * torch.rand(H, generator=generator)
    inputs = [draw(b, length, H, P), dt, A, draw(b, length, 1, N), draw(b, length, 1, N), draw(H)]
    if not gradients:
        return torch.no_grad()(lambda: [ops.ssd(*inputs) for _ in range(10)])
    leaves, dy = [part.requires_grad_() for part in inputs], draw(b, length, H, P)
    return lambda: [torch.autograd.grad(ops.ssd(*leaves)[0], leaves, dy) for _ in range(10)]


JOBS: dict[str, tuple[Callable[[], Callable[[], Any]], float | None]] = {
    "sweep of 24 x 32 patches": (sweep, 3),
    "graph of 128 heads, 1 x 64": (heads, 2.5),
    "Mamba-2's scan, forward, 1 x 256, 10 times": (lambda: scan(1, 256, False), 1.8),
    "Mamba-2's scan, forward, 8 x 256, 10 times": (lambda: scan(8, 256, False), 1.8),
    "Mamba-2's scan, forward and backward, 1 x 256, 10 times": (lambda: scan(1, 256, True), 2),
    "Mamba-2's scan, forward and backward, 8 x 256, 10 times": (lambda: scan(8, 256, True), 2),
    "whole forward pass of Mamba-1, 1 x 256": (forward, None),
}
"""What is timed -> how it is set up, and how many times as fast as build db23af9 it is to be."""


def serve() -> None:
    """One tree's side: a job's name in, its CPU seconds out."""
    torch.set_num_threads(1)
    ready: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = json.loads(line)
        if name not in ready:
            ready.clear()  # one job's tensors at a time
            ready[name] = JOBS[name][0]()
            ready[name]()
        started = time.process_time()
        found = ready[name]()
        print(json.dumps(time.process_time() - started), flush=True)
        del found


class Tree:
    """A process that runs jobs on the packages of one source tree."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
        )  # fmt: skip

    def seconds(self, job: str) -> float:
        """CPU seconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args} ended; its error is above")
        return json.loads(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.builds", description=__doc__)
    parser.add_argument("earlier", type=Path, nargs="?", help="folder of the earlier source tree")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each job (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"put the results into {PAGE}")
    asked = parser.parse_args(argv)
    if asked.serve:
        serve()
        return
    if asked.earlier is None or not (asked.earlier / "hooked_mamba").is_dir():
        parser.error(f"expected the folder of an earlier source tree, got {asked.earlier}")
    from tests.benchmarks.machine import described
    from tests.benchmarks.report import Bound, Section, Table, number, show, write_section

    torch.set_num_threads(1)  # as in the trees' processes
    head = described("python -m tests.benchmarks.builds ../old --write", os.getloadavg()[0])
    trees = {"earlier": Tree(asked.earlier.resolve()), "now": Tree(HERE)}
    section = Section(
        "Beside an earlier build",
        "An earlier build, db23af9 where the bounds are to hold, and this one, each in a process of its own, in turns,"
        f" with the same random weights: mamba-130m's shape, and a scan of H={H}, P={P}, N={N}, float32. Ratios are"
        " medians over rounds.",
    )
    rows = []
    for job, (_, least) in JOBS.items():
        found: dict[str, list[float]] = {name: [] for name in BUILDS}
        for i in range(asked.rounds):
            for name in BUILDS if i % 2 == 0 else reversed(BUILDS):
                found[name].append(trees[name].seconds(job))
        gain = median(a / b for a, b in zip(*found.values(), strict=True))
        rows.append([job, *(number(1000 * median(found[name])) for name in BUILDS), number(gain)])
        if least is not None:
            section.bounds.append(Bound(f"{job}, times faster", gain, least, True))
    section.tables.append(Table("CPU ms", ["", *BUILDS, "times faster"], rows))
    show(section)
    if asked.write:
        write_section(PAGE, "builds", f"{section.markdown()}\n\n{head}")


if __name__ == "__main__":
    main()
