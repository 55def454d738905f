"""Which kinds of mixers tests run on: all that the package declares, or some of them under a name that says why."""

from __future__ import annotations

import hooked_mamba.models  # noqa: F401  (declares them)
from hooked_mamba.hooks.sited import rows_of
from hooked_mamba.mixers.base import KINDS

DECLARED = {kind: cls for kind, cls in KINDS.items() if cls.__module__.startswith("hooked_mamba.")}
"""Kind -> class, of every branch that comes with the package; tests and pages declare others."""

MIXERS = tuple(kind for kind, cls in DECLARED.items() if cls.place == "mixer")
"""Every kind of mixer: what holds for all models is tested on these. `tests.hooked_mamba.tiny.build(kind)` makes a tiny
model of each."""

MAMBA = ("mamba", "mamba2")
"""The kinds with dt, B, C and a selective scan, in models of nothing else, which is what the test is about."""

RECURRENCES = ("mamba", "mamba2", "rwkv7", "gated_deltanet")
"""One mixer of each kind of recurrence: a diagonal scan, one with heads, delta rules with and without token shift. For
tests that take long on all of them."""

WITH_STATES = tuple(kind for kind in MIXERS if any(name == "hook_h" for name, _ in rows_of(DECLARED[kind])))
"""The kinds with a state that has a site."""

LINEAR = tuple(kind for kind in MIXERS if DECLARED[kind].frozen_sites)
"""The kinds that declare their linear form."""
