"""Times of several ways to do one thing, taken in turns so that a busy moment hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.benchmarks.sizes import Sizes


@dataclass
class Timing:
    """Seconds of every round."""

    cpu: list[float] = field(default_factory=list)
    """Processor time of all threads together."""
    wall: list[float] = field(default_factory=list)

    @property
    def cpu_ms(self) -> float:
        """Median processor time in milliseconds."""
        return 1e3 * median(self.cpu)

    @property
    def wall_ms(self) -> float:
        """Median time on the clock in milliseconds."""
        return 1e3 * median(self.wall)


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Processor time and clock time of one call. What it returns is freed after the clock has stopped."""
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        kept = run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        gc.enable()
    del kept
    return cpu, wall


def race(contenders: Mapping[str, Callable[[], Any]], sizes: Sizes) -> dict[str, Timing]:
    """Time every contender once a round, every other round in reverse order, after one round that does not count."""
    names = list(contenders)
    gc.freeze()  # what lives now is not looked through again: a collection costs 0.1 s otherwise
    try:
        return _rounds(contenders, names, sizes)
    finally:
        gc.unfreeze()


def _rounds(contenders: Mapping[str, Callable[[], Any]], names: list[str], sizes: Sizes) -> dict[str, Timing]:
    warm_up = sum(seconds(contenders[name])[1] for name in names)
    least, most = sizes.rounds
    rounds = max(least, min(most, int(sizes.seconds / max(warm_up, 1e-6))))
    timings = {name: Timing() for name in names}
    for i in range(rounds):
        for name in reversed(names) if i % 2 else names:
            cpu, wall = seconds(contenders[name])
            timings[name].cpu.append(cpu)
            timings[name].wall.append(wall)
    return timings


def ratio(slower: Timing, faster: Timing, clock: str = "cpu") -> float:
    """Median over rounds of how many times longer the first took than the second in the same round."""
    pairs = zip(getattr(slower, clock), getattr(faster, clock), strict=True)
    return median(a / max(b, 1e-9) for a, b in pairs)
