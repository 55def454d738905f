"""A fingerprint of a coder: what work in pieces remembers of the coders that it was done with."""

from __future__ import annotations

import hashlib
import json

from hooked_mamba.pieces import digest
from saes.parameters import CoderParameters


def coder_hash(coder: CoderParameters) -> str:
    """16 hex digits of the SHA-256 of config and weights."""
    sha = hashlib.sha256(json.dumps(coder.cfg.to_dict(), sort_keys=True, default=str).encode())
    for name, value in sorted(coder.state_dict().items()):
        sha.update(f"{name} {digest(value)}".encode())
    return sha.hexdigest()[:16]
