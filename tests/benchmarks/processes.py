"""What two processes gain over one: a sweep of patches, a capture and a collection, shared under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hooked_mamba import patching
from hooked_mamba.analysis.many_prompts import sweep_prompts
from hooked_mamba.pieces import load_tensors
from hooked_mamba.world import World, torchrun
from saes import SparseCoder, sae_config
from saes.explorer import collect
from saes.store import Capture, DataConfig, rows_of
from saes.store.shared import capture_shared
from tests.benchmarks.graphs import model_of
from tests.benchmarks.models import shape_text
from tests.benchmarks.report import Bound, Section, Table, number
from tests.benchmarks.sizes import BY_NAME, Sizes

FASTER = 1.7
"""Times faster that two processes are to be than one."""
PROMPTS, ROWS = 8, 64
"""Pairs of prompts of the sweep; rows of text of the capture and of the collection."""


def run(sizes: Sizes) -> Section:
    """Each job by one process and by two, in turns; what starting them costs is left out."""
    g = sizes.graphs
    section = Section(
        "Two processes",
        f"{shape_text(sizes)}. A sweep of {PROMPTS} pairs of prompts of {g.sweep_length // 2} tokens, a patch of the"
        f" residual stream at every layer and position; the activations of one site, and what the explorer collects of"
        f" a dictionary of {g.d_sae:,} latents ({g.k} active) in the middle of the model, on {ROWS} rows of"
        f" {g.length} tokens. Processes of torchrun (gloo), one thread each; the clock of the first, from a barrier"
        " to the end of the work, files and merging included.",
    )
    counts = (1, 2) if sizes.fresh_process else (1,)
    rounds = 2 if sizes.claims else 1
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
    for i in range(rounds):
        for n in counts if i % 2 == 0 else reversed(counts):
            found[n].append(_processes(sizes, n) if sizes.fresh_process else in_this_process(sizes))
    same = len({str(job["digest"]) for jobs in found.values() for job in jobs}) == 1
    rows = []
    for what in ("sweep", "capture", "collection"):
        seconds = [median(job[what] for job in found[n]) for n in counts]
        gain = seconds[0] / seconds[-1]
        rows.append([what, *map(number, seconds), *[number(gain)] * (len(counts) > 1)])
        if sizes.claims:
            section.bounds.append(Bound(f"Two processes, times faster than one, {what}", gain, FASTER, True))
    columns = ["", "s, one process", "s, two processes", "times faster"][: 2 * len(counts)]
    section.tables.append(Table("The same work", columns, rows))
    section.remarks.append(f"The sweeps' numbers are {'the same, bit for bit' if same else 'NOT the same'}.")
    return section


def _processes(sizes: Sizes, n: int) -> dict[str, Any]:
    """What the first of n processes measured, in a folder that goes away."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["tests.benchmarks.processes", sizes.name, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def in_this_process(sizes: Sizes) -> dict[str, Any]:
    """The jobs, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        return jobs(sizes, Path(folder), World())


def jobs(sizes: Sizes, out: Path, world: World) -> dict[str, Any]:
    """Seconds of each job, after a small one of its kind that does not count."""
    g = sizes.graphs
    model = model_of(sizes)
    site = f"blocks.{sizes.n_layers // 2}.mixer.hook_out_proj"
    coder = SparseCoder(sae_config(site, sizes.d_model, g.d_sae, architecture="topk", k=g.k), seed=0)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(1, sizes.d_vocab, (2, PROMPTS, g.sweep_length // 2), generator=generator)
    text = torch.randint(1, sizes.d_vocab, (ROWS, g.length), generator=generator)
    data = DataConfig(context_length=g.length, epochs=1)

    def sweep(folder: Path, share: int) -> None:
        n = PROMPTS // share
        options: Any = {"prompts_per_piece": 1, "progress": False}
        sweep_prompts(model, patching.get_act_patch_resid_pre, clean[:n], corrupted[:n], _last_logit, folder, **options)

    def capture(folder: Path, share: int) -> None:
        rows = rows_of(text[: ROWS // share], model, data)
        capture_shared(Capture(model, [site]), rows, folder, rows_per_shard=8, rows_per_pass=4, progress=False)

    def collection(folder: Path, share: int) -> None:
        some: Any = text[: ROWS // share]
        collect(
            model, {"it": coder}, some, folder=folder, context_length=g.length, rows_per_pass=4, passes_per_piece=2,
            progress=False,
        )  # fmt: skip

    found: dict[str, Any] = {}
    work: dict[str, Callable[[Path, int], None]] = {"sweep": sweep, "capture": capture, "collection": collection}
    for name, job in work.items():
        job(out / f"small-{name}", PROMPTS // 2)  # a piece for each of two processes
        world.wait()
        started = time.perf_counter()
        job(out / name, 1)
        world.wait()
        found[name] = time.perf_counter() - started
    found["digest"] = {name: float(value.double().sum()) for name, value in load_tensors(out / "sweep").items()}
    return found


def _last_logit(logits: torch.Tensor, prompt: int) -> torch.Tensor:
    return logits[0, -1, prompt]


def main(name: str, folder: str) -> None:
    """What each process under torchrun does."""
    torch.set_num_threads(1)
    with torchrun() as world:
        found = jobs(BY_NAME[name], Path(folder), world)
        if world.first:
            print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
