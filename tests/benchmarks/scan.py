"""The scans of both families against other libraries: time, error, memory."""

from __future__ import annotations

from tests.benchmarks import peers
from tests.benchmarks.contenders import SCANS, able, compare, memory
from tests.benchmarks.report import Bound, Section, Table, number
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import ratio


def run(sizes: Sizes) -> Section:
    """Mamba-1: forward at several shapes, forward with backward at one."""
    section = Section(
        "The selective scan of Mamba-1",
        f"E={sizes.E}, N={sizes.N}, float32. Discretisation and the D skip are part of the scan, the gate is not. Every"
        " library gets its inputs in the layout it likes. Errors are against our plain loop in float64: the largest"
        " difference by the largest value, over all gradients where there is a backward.",
        remarks=peers.remarks("mambapy.mamba"),
    )
    for shape in sizes.shapes:
        section.tables.append(compare("selective_scan", shape, sizes)[0])
    table, timings = compare("selective_scan", sizes.grad_shape, sizes, backward=True)
    section.tables.append(table)
    if sizes.claims:
        gain = ratio(timings["transformers"], timings["ours, torch"])
        section.bounds.append(
            Bound("Forward and backward, torch alone, times faster than transformers", gain, 30, True)
        )
    return section


def run_memory(sizes: Sizes) -> Section:
    """Mamba-1: memory above the inputs."""
    b, l = sizes.long_shape
    section = Section(
        "Memory of the scan",
        f"{b} x {l}, E={sizes.E}, N={sizes.N}, float32: memory resident at the peak of one call above what was"
        " resident before it, the outputs included, each in a fresh process."
        " transformers' backward takes minutes here.",
    )
    names = able("selective_scan", sizes) if sizes.fresh_process else {"ours, torch": SCANS["ours, torch"]}
    peaks = {name: [memory("selective_scan", name, sizes, backward) for backward in (False, True)] for name in names}
    rows = [[name, *map(number, found)] for name, found in peaks.items()]
    section.tables.append(Table("MiB above the inputs", ["", "forward", "forward and backward"], rows))
    if sizes.claims and None not in (peaks["transformers"][0], peaks["ours, torch"][0]):
        share = peaks["ours, torch"][0] / peaks["transformers"][0]  # type: ignore[operator]
        section.bounds.append(Bound("Forward, torch alone, as a share of transformers'", share, 0.1, False))
    return section


def run_ssd(sizes: Sizes) -> Section:
    """Mamba-2: forward at several shapes, forward with backward at one."""
    H, P, N = sizes.heads
    section = Section(
        "The scan of Mamba-2",
        f"H={H}, P={P}, N={N}, one group, float32. transformers' own chunk is 256 positions; at 64, which is ours, it"
        " is shown too. Errors as above.",
    )
    for shape in sizes.shapes:
        section.tables.append(compare("ssd", shape, sizes)[0])
    section.tables.append(compare("ssd", sizes.grad_shape, sizes, backward=True)[0])
    return section
