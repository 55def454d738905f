"""Parsing the full name of a hook site, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

BLOCKS = "blocks"
"""The list of blocks in every model."""

_STATE = re.compile(r"^(?P<base>.+\.hook_\w+)\.(?P<t>-?\d+)$")


@dataclass(frozen=True)
class SiteName:
    """`blocks.{block}.{place}.{hook}.{t}`, where every part but the hook may be missing.

    `blocks.3.mixer.norm.hook_scale` is (block "3", place "mixer.norm", hook "hook_scale"); `ln_final.hook_out` is
    (place "ln_final", hook "hook_out"); `blocks.*.mixer.hook_h.17` is (block "*", place "mixer", hook "hook_h", t 17).
    """

    block: str | None
    """Number of the block as text, a glob in a filter; None outside of blocks."""
    place: str
    """Modules between the block (or the model) and the hook point, joined by dots; "" for none."""
    hook: str
    """The hook point's own name."""
    t: int | None = None
    """Position of a single state, `hook_h.{t}`; None for every other site."""

    @classmethod
    def parse(cls, name: str) -> SiteName:
        """The parts of a full name; any text parses, even if it is not a site."""
        t = None
        if match := _STATE.match(name):
            name, t = match["base"], int(match["t"])
        parts = name.split(".")
        if parts[0] == BLOCKS and len(parts) > 2:
            return cls(parts[1], ".".join(parts[2:-1]), parts[-1], t)
        return cls(None, ".".join(parts[:-1]), parts[-1], t)

    def __str__(self) -> str:
        parts = [] if self.block is None else [BLOCKS, self.block]
        parts += [self.place] if self.place else []
        return ".".join([*parts, self.hook, *([] if self.t is None else [str(self.t)])])

    @property
    def layer(self) -> int | None:
        """The block's number; None outside of blocks and for a glob."""
        return int(self.block) if self.block is not None and self.block.isdigit() else None

    @property
    def local(self) -> str:
        """The name within its block (or the model): "mixer.norm.hook_scale"."""
        return str(replace(self, block=None))

    @property
    def base(self) -> SiteName:
        """The stacked site that a single state belongs to; any other name as it is."""
        return replace(self, t=None)

    def at(self, place: str, hook: str) -> SiteName:
        """Another site of the same block, and the same position if this is a single state."""
        return replace(self, place=place, hook=hook)
