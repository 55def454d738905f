"""Ctrl-C and SIGTERM as a request to stop, so that a training ends between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """While active, Ctrl-C and SIGTERM only request a stop, and print that they did; a second Ctrl-C interrupts."""
    wanted = False
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: wanted
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal wanted
        wanted = True
        with suppress(OSError, ValueError, RuntimeError):  # stderr may be closed, or just being written to
            sys.stderr.write("\nstopping after this step; press Ctrl-C again to stop without a checkpoint\n")
            sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
