"""Old names for one release; scans are in :mod:`hooked_mamba.frozen`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.renamed import renamed_in, warn_renamed


def hidden_attention(view: HeldScan, queries: Sequence[int] | None = None, **options: Any) -> Tensor:
    """:meth:`HeldScan.rows`."""
    warn_renamed("hidden_attention(view, ...)", "view.rows(...)")
    return view.rows(queries, **options)


def mean_hidden_attention(
    view: HeldScan, queries: Sequence[int] | None = None, weights: Tensor | None = None, **options: Any
) -> Tensor:
    """:meth:`HeldScan.mean_rows`."""
    warn_renamed("mean_hidden_attention(view, ...)", "view.mean_rows(...)")
    return view.mean_rows(queries, weights, **options)


def run_scan(view: HeldScan, h0: Tensor | None = None, *, frozen: bool = False) -> Tensor:
    """:meth:`HeldScan.out`'s outputs."""
    warn_renamed("run_scan(view, ...)", "view.out(...).y")
    return view.out(h0, frozen=frozen).y


__getattr__ = renamed_in(__name__, {"ScanView": "hooked_mamba.frozen.selective.SelectiveScan"})
