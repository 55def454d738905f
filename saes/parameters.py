"""A coder's config and tensors. Architectures and files depend only on this class.

:class:`saes.coder.SparseCoder` adds the computation. It imports the architectures, which therefore cannot import it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saes.config import CoderConfig
from saes.saelens_names import CODER, advice

C = TypeVar("C", bound="CoderParameters")


class _Named(type):
    """A class of coders; for names of SAELens' classes an error says what to use here."""

    def __getattr__(cls, name: str) -> Any:
        if name in CODER:
            raise AttributeError(advice(name, CODER))
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


class CoderParameters(nn.Module, metaclass=_Named):
    """The tensors of a coder with F latents. Which of them exist depends on the architecture and on `cfg`.

    Attributes
    ----------
    W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec [d_out]
        Encoder and decoder. W_enc is kept in memory by latents, each latent's d_in numbers side by side.
    W_skip [d_in, d_out]
        With cfg.skip, else None.
    threshold
        jumprelu: [F], learned. batchtopk and matryoshka: a scalar, estimated in training. Others have none.
    b_gate, r_mag, b_mag [F]
        gated, in place of b_enc.
    s_in, s_out
        Scalars, only in training with cfg.input_norm="scale": x and y are multiplied by them.
    """

    cfg: CoderConfig
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    W_skip: nn.Parameter | None
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    b_gate: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    threshold: Tensor
    s_in: Tensor
    s_out: Tensor

    @property
    def k(self) -> int:
        """cfg.k.

        Raises
        ------
        ValueError
            If the architecture has none.
        """
        if self.cfg.k is None:
            raise ValueError(f"{self.cfg.architecture} has no k: how many latents are active is learned")
        return self.cfg.k

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_dec.dtype

    def __getattr__(self, name: str) -> Any:
        """Parameters and buffers; for SAELens' names an error says what to use here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in CODER:
                raise AttributeError(advice(name, CODER)) from None
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's; SAELens' switches do not exist here, and setting one is an error that says what to use."""
        if name in CODER:
            raise AttributeError(advice(name, CODER))
        super().__setattr__(name, value)

    @torch.no_grad()
    def fold(self: C) -> C:
        """A copy that maps raw activations to the same output, with the scales in its weights and input_norm="none".

        Latents come out in the units of y, so that decoder rows keep their norms: z W_dec = (s z / s) W_dec.
        """
        out = copy.deepcopy(self)
        if self.cfg.input_norm == "none":
            return out
        out.cfg = self.cfg.replace(input_norm="none")
        out.W_enc.mul_(self.s_in / self.s_out)
        if out.W_skip is not None:
            out.W_skip.mul_(self.s_in / self.s_out)
        for name in ("b_dec", "b_enc", "b_gate", "b_mag", "threshold"):
            if hasattr(out, name):
                getattr(out, name).div_(self.s_out)
        del out.s_in, out.s_out
        return out
