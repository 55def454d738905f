"""The architectures, one file each."""

from __future__ import annotations

from saes.activations.base import Activation as Activation
from saes.activations.base import Latents as Latents
from saes.activations.batchtopk import BatchTopK
from saes.activations.gated import Gated
from saes.activations.jumprelu import JumpReLU
from saes.activations.matryoshka import Matryoshka
from saes.activations.signed import AbsTopK, GroupMax
from saes.activations.standard import Standard
from saes.activations.topk import TopK
from saes.config import Architecture

ACTIVATIONS: dict[Architecture, Activation] = {
    "topk": TopK(),
    "batchtopk": BatchTopK(),
    "jumprelu": JumpReLU(),
    "standard": Standard(),
    "gated": Gated(),
    "matryoshka": Matryoshka(),
    "abstopk": AbsTopK(),
    "groupmax": GroupMax(),
}
