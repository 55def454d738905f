"""`python -m tests.benchmarks`: run benchmarks, print what they found, and with --write keep it in the docs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from tests.benchmarks import (
    analysis,
    attribution,
    cache,
    coder_step,
    delta,
    graphs,
    hybrid_peers,
    hybrids,
    loading,
    mamba2,
    model,
    processes,
    rwkv,
    scan,
    states,
)
from tests.benchmarks.machine import described
from tests.benchmarks.report import Section, show, write_section
from tests.benchmarks.sizes import FULL, QUICK, Sizes

BENCHMARKS: dict[str, Callable[[Sizes], Section]] = {
    "scan": scan.run,
    "memory": scan.run_memory,
    "states": states.run,
    "ssd": scan.run_ssd,
    "delta": delta.run,
    "rwkv": rwkv.run,
    "model": model.run,
    "mamba2": mamba2.run,
    "cache": cache.run,
    "hooks": cache.run_hooks,
    "generation": model.run_generation,
    "hybrids": hybrids.run,
    "loading": loading.run,
    "hybrid-peers": hybrid_peers.run,
    "analysis": analysis.run,
    "attention": analysis.run_long,
    "attribution": attribution.run,
    "graphs": graphs.run,
    "processes": processes.run,
    "coder": coder_step.run,
}

PAGE = Path("docs/benchmark-tables.md")
PAGES = {"coder": Path("docs/coders.md")}
"""Where results stand that are not in PAGE."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; the bounds are not stated")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the scans (default: 1)")
    parser.add_argument("--write", action="store_true", help=f"put the results into {PAGE} and its like")
    asked = parser.parse_args(argv)
    unknown = [name for name in asked.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if asked.write and asked.quick:
        parser.error("--write keeps figures at full size only: leave out --quick")
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()  # it says for each function that no kernel of the hub is used
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    command = " ".join(["python -m tests.benchmarks", *(argv if argv is not None else sys.argv[1:])])
    head = described(command, load)
    print(head)
    kept = True
    for name in asked.names or BENCHMARKS:
        started = time.perf_counter()
        section = BENCHMARKS[name](QUICK if asked.quick else FULL)
        show(section)
        print(f"({name}: {time.perf_counter() - started:.0f} s)", flush=True)
        kept &= all(bound.kept for bound in section.bounds)
        if asked.write:
            write_section(PAGES.get(name, PAGE), name, f"{section.markdown()}\n\n{head}")
    if not kept:
        print("\nA bound is not kept: see NOT KEPT above.")


if __name__ == "__main__":
    main()
