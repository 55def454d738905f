"""The tuned lens: one small trained translator per layer, from its residual stream to the last one's.

Belrose et al. 2023, arXiv:2303.08112. Translator i maps x to x + W_i x + b_i; it starts as the logit lens (0) and is
trained so that final norm and unembedding predict what the whole model predicts: mean KL(model || lens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hooked_mamba.analysis.patch_runs import residuals
from hooked_mamba.components import at_least_fp32

FORMAT = "hooked-mamba tuned lens 1"


class TunedLens(nn.Module):
    """Translators of the streams entering blocks 0 to n_layers - 1.

    Parameters
    ----------
    n_layers, d_model
        Of the model that it reads.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(n_layers, d_model))

    @classmethod
    def of(cls, model: Any) -> TunedLens:
        """An untrained lens, which equals the logit lens, on the model's device."""
        return cls(model.cfg.n_layers, model.cfg.d_model).to(model.device)

    def translate(self, resid: Float[Tensor, "... d"], layer: int) -> Float[Tensor, "... d"]:
        """The stream entering block `layer`, translated to the last one's basis."""
        resid = resid.to(self.weight.dtype)
        return resid + resid @ self.weight[layer].t() + self.bias[layer]

    def logits(self, model: Any, resid: Float[Tensor, "... d"], layer: int) -> Float[Tensor, "... v"]:
        """The lens's logits for the stream entering block `layer`; layer n_layers is the model's own output."""
        x = resid if layer == len(self.weight) else self.translate(resid, layer)
        norm = model.ln_final
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        return at_least_fp32(x.to(model.W_U.dtype) @ model.W_U)

    @torch.no_grad()
    def read(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Float[Tensor, "layer b l v"]:
        """The lens's logits for every stream of a run; the last are the model's own."""
        streams = residuals(model, tokens, attention_mask)
        return torch.stack([self.logits(model, stream, i) for i, stream in enumerate(streams)])

    def fit(
        self, model: Any, batches: Iterable[Tensor], lr: float = 1e-3, clip: float = 1.0, weight_decay: float = 0.0
    ) -> list[list[float]]:
        """Train on batches of tokens b l, one Adam step each.

        Returns
        -------
        list
            For each step, the KL in nats of every layer before that step.
        """
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay)
        history = []
        for tokens in batches:
            streams = residuals(model, tokens, None)
            with torch.no_grad():
                target = self.logits(model, streams[-1], len(self.weight)).log_softmax(-1)
            losses = []
            with torch.enable_grad():
                for i, stream in enumerate(streams[:-1]):
                    said = self.logits(model, stream, i).log_softmax(-1)
                    losses.append((target.exp() * (target - said)).sum(-1).mean())
                optimizer.zero_grad()
                # Only the lens learns: the model's weights may want gradients of their own.
                grads = torch.autograd.grad(torch.stack(losses).sum(), list(self.parameters()))
            for parameter, grad in zip(self.parameters(), grads, strict=True):
                parameter.grad = grad
            nn.utils.clip_grad_norm_(self.parameters(), clip)
            optimizer.step()
            history.append(torch.stack(losses).tolist())
        return history

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        n_layers, d_model = self.bias.shape
        about = {"format": FORMAT, "config": json.dumps({"n_layers": n_layers, "d_model": d_model})}
        save_file({name: value.detach().contiguous() for name, value in self.state_dict().items()}, path, about)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> TunedLens:
        """Read a safetensors file; with `model`, check that it fits and move to its device.

        Raises
        ------
        ValueError
            Not a tuned lens, or one of another model's shape.
        """
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is no tuned lens: its format is {about.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(about["config"])
        if model is not None:
            wanted = {"n_layers": model.cfg.n_layers, "d_model": model.cfg.d_model}
            if config != wanted:
                raise ValueError(f"{path} was made for {config}, the model has {wanted}")
        lens = cls(**config).to(next(iter(tensors.values())).dtype)
        lens.load_state_dict(tensors)
        return lens if model is None else lens.to(model.device)
