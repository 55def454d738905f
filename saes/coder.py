"""The sparse coder: latents of the value at one site, and the value at the same or another site predicted from them.

    z = act((s_in x - b_dec) W_enc + b_enc)          b_dec only with cfg.apply_b_dec_to_input
    y_hat = (z W_dec + b_dec + s_in x W_skip) / s_out      W_skip only with cfg.skip

s_in and s_out are 1, except while training a coder with input_norm="scale"; :meth:`SparseCoder.fold` folds them into
the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.names_elsewhere import SAE_LENS, knows_options
from saes.activations import ACTIVATIONS
from saes.activations.base import affine, runs
from saes.activations.topk import TopK
from saes.config import CoderConfig
from saes.parameters import CoderParameters
from saes.saelens_names import LOADING
from saes.sparse import Codes, Pattern, decode


class SparseCoder(CoderParameters):
    """An SAE or a MambaCoder of any architecture. Inputs may have any leading axes.

    Parameters
    ----------
    cfg
        Architecture, sites and sizes.
    seed
        Of the initial weights; None draws from torch's global generator. The weights start as those of an untrained
        coder; :func:`saes.init.initialise` fits biases and scales to activations.
    """

    def __init__(self, cfg: CoderConfig, seed: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self._check_cfg()
        self.activation = ACTIVATIONS[cfg.architecture]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        F = cfg.d_sae
        W_dec = torch.randn(F, cfg.d_out, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        by_latent = W_dec.clone()
        if not cfg.is_sae:
            by_latent = torch.randn(F, cfg.d_in, generator=generator)
            by_latent /= by_latent.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(by_latent.t())
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out))
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_out)) if cfg.skip else None
        self.activation.setup(self)
        if cfg.input_norm == "scale":
            self.register_buffer("s_in", torch.ones(()))
            self.register_buffer("s_out", torch.ones(()))

    def _check_cfg(self) -> None:
        if not isinstance(self.cfg, CoderConfig):
            raise TypeError(f"expected a CoderConfig, got {type(self.cfg).__name__}")

    @property
    def encoder_bias(self) -> Float[Tensor, " F"]:
        """The bias of the pre-activations: b_gate in a gated coder, else b_enc."""
        return self.activation.bias(self)

    def _rows(self, x: Tensor) -> Float[Tensor, "n d"]:
        """The encoder's input as rows: scaled, and centred if the config says so."""
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(f"expected {self.cfg.d_in} numbers along the last axis, got shape {tuple(x.shape)}")
        rows = x.reshape(-1, self.cfg.d_in).to(self.W_enc.dtype)
        if self.cfg.input_norm == "scale":
            rows = rows * self.s_in
        return rows - self.b_dec if self.cfg.apply_b_dec_to_input else rows

    def _finish(self, rows: Float[Tensor, "n d_out"], x: Tensor | None) -> Float[Tensor, "n d_out"]:
        """Add b_dec and the skip, undo the scale; `x` is the input as given."""
        rows = rows + self.b_dec
        if self.W_skip is not None:
            if x is None:
                raise ValueError("this coder has a skip: decoding needs its input too, decode(z, x)")
            x = x.reshape(-1, self.cfg.d_in).to(rows.dtype)
            rows = rows + (x * self.s_in if self.cfg.input_norm == "scale" else x) @ self.W_skip
        return rows / self.s_out if self.cfg.input_norm == "scale" else rows

    def preact(self, x: Float[Tensor, "*leading d_in"]) -> Float[Tensor, "*leading F"]:
        """Pre-activations; for a gated coder, those of its gate."""
        return affine(self._rows(x), self.W_enc, self.encoder_bias).reshape(*x.shape[:-1], self.cfg.d_sae)

    def preact_of(self, x: Float[Tensor, "*leading d_in"], index: int) -> Float[Tensor, "*leading"]:
        """The pre-activation of one latent."""
        return (self._rows(x) @ self.W_enc[:, index] + self.encoder_bias[index]).reshape(x.shape[:-1])

    def encode(self, x: Float[Tensor, "*leading d_in"]) -> Float[Tensor, "*leading F"]:
        """All latents, active or not, as at inference: BatchTopK and Matryoshka use the stored threshold."""
        pre = affine(self._rows(x), self.W_enc, self.encoder_bias)
        return self.activation.infer(self, pre).reshape(*x.shape[:-1], self.cfg.d_sae)

    def encode_topk(self, x: Float[Tensor, "*leading d_in"]) -> Codes:
        """The active latents of each example, the largest first, padded with zeros to the largest number of them.

        Equals :meth:`encode`, without ever holding all latents of all examples at once.
        """
        rows, leading = self._rows(x), x.shape[:-1]
        if isinstance(self.activation, TopK):
            pattern, pre = self.activation.select(self, rows, self.k, ordered=True)
            shape = (*leading, self.k)
            return Codes(self.activation.value(pre).reshape(shape), pattern.indices.reshape(shape))
        found = [self._active(run) for run in runs(rows, self.cfg.d_sae)]
        widest = max((values.shape[1] for values, _ in found), default=0)
        values, indices = (
            torch.cat([nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts])
            for parts in zip(*found, strict=True)
        )
        return Codes(values.reshape(*leading, widest), indices.reshape(*leading, widest))

    def _active(self, rows: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        z = self.activation.infer(self, affine(rows, self.W_enc, self.encoder_bias))
        most = int((z != 0).sum(1).max()) if len(z) else 0
        values, indices = z.topk(most)
        return values, torch.where(values != 0, indices, 0)

    def decode(
        self, z: Float[Tensor, "*leading F"], x: Float[Tensor, "*leading d_in"] | None = None
    ) -> Float[Tensor, "*leading d_out"]:
        """The output of dense latents. A coder with a skip needs its input x too."""
        if z.shape[-1] != self.cfg.d_sae:
            raise ValueError(f"expected {self.cfg.d_sae} latents along the last axis, got shape {tuple(z.shape)}")
        rows = z.reshape(-1, self.cfg.d_sae) @ self.W_dec
        return self._finish(rows, x).reshape(*z.shape[:-1], self.cfg.d_out)

    def decode_sparse(
        self, codes: Codes | tuple[Tensor, Tensor], x: Float[Tensor, "*leading d_in"] | None = None
    ) -> Float[Tensor, "*leading d_out"]:
        """The output of active latents, at their cost alone. A coder with a skip needs its input x too."""
        values, indices = codes
        leading, k = values.shape[:-1], values.shape[-1]
        pattern = Pattern.of_codes(indices.reshape(leading.numel(), k), self.cfg.d_sae)
        rows = decode(values.reshape(-1), pattern, self.W_dec)
        return self._finish(rows, x).reshape(*leading, self.cfg.d_out)

    def forward(self, x: Float[Tensor, "*leading d_in"]) -> Float[Tensor, "*leading d_out"]:
        """The reconstruction of x, or in a MambaCoder the prediction."""
        if self.cfg.architecture in ("standard", "gated"):  # they may have most latents active
            return self.decode(self.encode(x), x)
        return self.decode_sparse(self.encode_topk(x), x)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write cfg.json and sae_weights.safetensors; see :func:`saes.files.save`."""
        from saes.files import save

        return save(self, folder, **options)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> SparseCoder:
        """Read what :meth:`save` wrote, or another library's coder; see :func:`saes.files.load`."""
        from saes.files import load

        return load(folder, cls, **options)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """:meth:`save` under SAELens' name; returns the files of weights and config, as there."""
        folder = self.save(path)
        return folder / "sae_weights.safetensors", folder / "cfg.json"

    @classmethod
    def load_from_disk(cls, path: str | Path, device: str = "cpu", dtype: Any = None, **options: Any) -> SparseCoder:
        """:meth:`load` under SAELens' name; `dtype`: a number format, such as "float32"."""
        from saes.files.checks import DTYPES, dtype_name

        coder = cls.load(path, device=device, **options)
        return coder if dtype is None else coder.to(DTYPES[dtype_name(dtype)])

    @classmethod
    def load_from_pretrained(cls, path: str | Path, device: str = "cpu", dtype: Any = None) -> SparseCoder:
        """:meth:`load_from_disk` under SAELens' older name."""
        return cls.load_from_disk(path, device, dtype)

    def get_name(self) -> str:
        """A name made of model, site and width, as SAELens makes it."""
        return f"sae_{self.cfg.model_name}_{self.cfg.in_site}_{self.cfg.d_sae}"

    @classmethod
    @knows_options(LOADING, {}, SAE_LENS)
    def from_pretrained(
        cls, name: str | Path, subfolder: str | None = None, revision: str | None = None, **options: Any
    ) -> SparseCoder:
        """A bundled coder, one in a folder, or one of the hub's, by name; looked for in this order.

        Parameters
        ----------
        name
            "tinystories-4l/l1-mambacoder", "path/to/folder", "owner/name" or "owner/name/folder/in/it".
        subfolder
            The coder's folder in a repository or local folder that holds several.
        revision
            Branch, tag or commit of a hub repository.
        options
            Those of :func:`saes.files.load`.
        """
        from saes.find import resolve

        return cls.load(resolve(name, subfolder, revision), **options)

    def extra_repr(self) -> str:
        """One line about it."""
        cfg = self.cfg
        k = "" if cfg.k is None else f", k={cfg.k}"
        read = cfg.in_site if cfg.window == 1 else f"{cfg.window} x {cfg.in_site}"
        arrow = cfg.in_site if cfg.is_sae else f"{read} -> {cfg.out_site}"
        return f"{cfg.architecture}, {cfg.d_in} -> {cfg.d_sae} -> {cfg.d_out}{k}, {arrow}"


class SAE(SparseCoder):
    """A sparse coder that predicts what it reads."""

    def _check_cfg(self) -> None:
        super()._check_cfg()
        if not self.cfg.is_sae:
            raise ValueError(f"an SAE's in_site and out_site are the same, got {self.cfg.in_site}, {self.cfg.out_site}")


class MambaCoder(SparseCoder):
    """A sparse coder that predicts a block's output from its input: a transcoder for a Mamba block."""

    def _check_cfg(self) -> None:
        super()._check_cfg()
        if self.cfg.is_sae:
            raise ValueError(f"a MambaCoder reads and predicts different sites, got {self.cfg.in_site} twice")
