"""Views of the weights under the names of the field, multiplying from the right as in TransformerLens.

Each mixer defines its own views under these names, and a model stacks those of its layers. A view that its mixers do
not have is not an attribute of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.factored_matrix import FactoredMatrix
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch


class SharedWeights:
    """Stacked over layers, in front."""

    cfg: Any
    blocks: Any
    embed: Any
    unembed: Any

    @property
    def all_channel_labels(self) -> list[str]:
        """ "L0C0", "L0C1", ...: the order of `stack_channel_results`."""
        return [f"L{i}C{e}" for i, mixer in enumerate(self._mixers()) for e in range(mixer.width)]

    @property
    def all_head_labels(self) -> list[str]:
        """ "L0H0", "L0H1", ...: the order of `stack_head_results`, where mixers have heads."""
        widths = [(mixer.width, mixer.head_width) for mixer in self._mixers()]
        if any(P is None for _, P in widths):
            raise AttributeError("these mixers have no heads: see all_channel_labels")
        return [f"L{i}H{h}" for i, (E, P) in enumerate(widths) for h in range(E // (P or 1))]

    @property
    def W_E(self) -> Float[Tensor, "V d"]:
        """Embedding."""
        return weights_of(self.embed, "embed")[0]

    @property
    def W_U(self) -> Float[Tensor, "d V"]:
        """Unembedding."""
        return weights_of(self.unembed, "unembed")[0].t()

    @property
    def b_U(self) -> Float[Tensor, " V"]:
        """The unembedding's bias: these models have none, so zeros."""
        return self.unembed.weight.new_zeros(self.cfg.d_vocab)

    @property
    def w_norm(self) -> Float[Tensor, "layer d"]:
        """Weights of the blocks' norms."""
        return torch.stack([block.norm.weight for block in self.blocks])

    @property
    def W_in(self) -> Float[Tensor, "layer d inner"]:
        """in_proj of the mixers; in a model with MLPs theirs (the up projection), as in TransformerLens."""
        return self._stack("W_in", self._mlp_or_mixer)

    @property
    def b_in(self) -> Float[Tensor, "layer inner"]:
        """Its bias, zeros where the model has none."""
        return self._stack("b_in", self._mlp_or_mixer)

    @property
    def W_in_x(self) -> Float[Tensor, "layer d E"]:
        """Residual stream to the convolution inputs that become x."""
        return self._stack("W_in_x")

    @property
    def W_in_z(self) -> Float[Tensor, "layer d E"]:
        """Residual stream to gate."""
        return self._stack("W_in_z")

    @property
    def W_conv(self) -> Float[Tensor, "layer C K"]:
        """Convolution taps; the last multiplies the position itself."""
        return self._stack("W_conv")

    @property
    def b_conv(self) -> Float[Tensor, "layer C"]:
        """The convolution's bias, zeros where the model has none."""
        return self._stack("b_conv")

    @property
    def W_dt_low(self) -> Float[Tensor, "layer E R"]:
        """SSM input to low-rank step size (Mamba-1)."""
        return self._stack("W_dt_low")

    @property
    def W_dt_proj(self) -> Float[Tensor, "layer R E"]:
        """Low-rank step size to dt_pre (Mamba-1)."""
        return self._stack("W_dt_proj")

    @property
    def W_dt(self) -> Float[Tensor, "layer i o"]:
        """What dt_pre is computed from, to dt_pre: SSM input E to E in Mamba-1, the composed W_dt_low @ W_dt_proj
        (exact where the mixer has no norms of its own); residual stream d to H in Mamba-2."""
        return self._stack("W_dt")

    @property
    def b_dt(self) -> Float[Tensor, "layer o"]:
        """The step size's bias."""
        return self._stack("b_dt")

    @property
    def W_B(self) -> Float[Tensor, "layer i ..."]:
        """SSM input E to B, N, in Mamba-1; residual stream d to the convolution inputs that become B, G N, in
        Mamba-2."""
        return self._stack("W_B")

    @property
    def W_C(self) -> Float[Tensor, "layer i ..."]:
        """The same for C."""
        return self._stack("W_C")

    @property
    def A_log(self) -> Float[Tensor, "layer ..."]:
        """log(-A)."""
        return self._stack("A_log")

    @property
    def A(self) -> Float[Tensor, "layer ..."]:
        """Continuous-time decay rates -exp(A_log)."""
        return self._stack("A")

    @property
    def D(self) -> Float[Tensor, "layer ..."]:
        """Skip weights."""
        return self._stack("D")

    @property
    def w_gated_norm(self) -> Float[Tensor, "layer E"]:
        """Weights of the gated norms before out_proj (Mamba-2)."""
        return self._stack("w_gated_norm")

    @property
    def W_out(self) -> Float[Tensor, "layer E d"]:
        """out_proj of the mixers; in a model with MLPs theirs (the down projection), as in TransformerLens."""
        return self._stack("W_out", self._mlp_or_mixer)

    @property
    def b_out(self) -> Float[Tensor, "layer d"]:
        """Its bias, zeros where the model has none."""
        return self._stack("b_out", self._mlp_or_mixer)

    # Attention's and MLPs', over the blocks that have them: `blocks_with` says which ------------------------------

    @property
    def W_Q(self) -> Float[Tensor, "layer head d c"]:
        """Attention: residual stream to queries."""
        return self._stack("W_Q", "attn")

    @property
    def W_K(self) -> Float[Tensor, "layer head d c"]:
        """Attention: residual stream to keys, repeated for the query heads that share them."""
        return self._stack("W_K", "attn")

    @property
    def W_V(self) -> Float[Tensor, "layer head d c"]:
        """Attention: residual stream to values, repeated for the query heads that share them."""
        return self._stack("W_V", "attn")

    @property
    def W_O(self) -> Float[Tensor, "layer head c d"]:
        """Attention: mixed values to the residual stream."""
        return self._stack("W_O", "attn")

    @property
    def b_Q(self) -> Float[Tensor, "layer head c"]:
        """Queries' bias, zeros where the model has none."""
        return self._stack("b_Q", "attn")

    @property
    def b_K(self) -> Float[Tensor, "layer head c"]:
        """Keys' bias, zeros where the model has none."""
        return self._stack("b_K", "attn")

    @property
    def b_V(self) -> Float[Tensor, "layer head c"]:
        """Values' bias, zeros where the model has none."""
        return self._stack("b_V", "attn")

    @property
    def b_O(self) -> Float[Tensor, "layer d"]:
        """Attention's output bias, zeros where the model has none."""
        return self._stack("b_O", "attn")

    @property
    def W_gate(self) -> Float[Tensor, "layer d F"]:
        """Gated MLPs: residual stream to what the activation reads."""
        return self._stack("W_gate", "mlp")

    @property
    def QK(self) -> FactoredMatrix:
        """Attention: W_Q W_K^T of every head, without positions and norms; layer head d d."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """Attention: W_V W_O of every head, layer head d d."""
        return FactoredMatrix(self.W_V, self.W_O)

    def blocks_with(self, branch: str) -> list[tuple[int, Any]]:
        """Pairs (layer, block) of the blocks that have such a branch: "mixer", "attn", "mlp", "moe"."""
        return [(i, block) for i, block in enumerate(self.blocks) if branch in block.branches]

    @property
    def _mlp_or_mixer(self) -> str:
        return "mlp" if self.blocks_with("mlp") else "mixer"

    def _mixers(self) -> list[Branch]:
        return [block.mixer for block in self.blocks]

    def _stack(self, view: str, branch: str = "mixer") -> Tensor:
        blocks = [block for _, block in self.blocks_with(branch)]
        if not blocks:
            raise AttributeError(f"no block of this model has a branch {branch!r}")
        return torch.stack([getattr(block.branches[branch], view) for block in blocks])
