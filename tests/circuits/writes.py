"""Write dictionaries for tests: untrained SAEs, and transcoders, on the value that enters a branch's memory."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits import FrozenModel, attribute
from hooked_mamba.frozen.places import Part, branch_of, part_of, u_site
from saes import CoderConfig, SparseCoder
from saes.targets import input_of, taps_of
from tests.circuits.oracle import Off, Replay, array
from tests.circuits.test_attribution import ARCHITECTURES

EXACT = 1e-10


def noisy(coder: SparseCoder, seed: int) -> SparseCoder:
    """In float64, biases and skip away from zero, so that some latents are active at any input."""
    coder = coder.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            if parameter.ndim == 1 or name == "W_skip":
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.2 * noise.abs())
    return coder


def writable(model: Any) -> list[Part]:
    """Every branch whose value can be read by a dictionary of its own."""
    found: list[Part] = []
    for layer in range(model.cfg.n_layers):
        for name, branch in model.block(layer).branches.items():
            if u_site(branch) is not None and branch.kind != "moe":
                found.append(part_of(layer, name))
    return found


def writer(model: Any, part: Part, architecture: str = "topk", seed: int = 0, d_sae: int = 11, **fields: Any):
    """An SAE on what a branch writes; with `reads` a transcoder from the block's input."""
    layer, name = branch_of(part)
    site = f"blocks.{layer}.{name}.{u_site(model.block(layer).branches[name])}"
    d = model.site(site).width
    source, d_in = site, d
    if "reads" in fields:
        source = f"blocks.{layer}." + ("norm.hook_out" if fields["reads"] == "normalized" else "hook_resid_pre")
        d_in, fields["target"] = model.cfg.d_model, "block"
    cfg = CoderConfig(
        architecture=architecture, in_site=source, out_site=site, d_in=d_in, d_out=d, d_sae=d_sae,
        **{**ARCHITECTURES[architecture], **fields},
    )  # fmt: skip
    return noisy(SparseCoder(cfg, seed=seed), seed)


def window_writer(
    model: Any, part: Part, window: int | None = None, architecture: str = "topk", seed: int = 0, d_sae: int = 11,
    skip: bool = False, reads: str = "normalized",
) -> SparseCoder:  # fmt: skip
    """A transcoder to what a branch writes, from what its norm gives (or the stream) at the last positions."""
    layer, name = branch_of(part)
    block = model.block(layer)
    site = f"blocks.{layer}.{name}.{u_site(block.branches[name])}"
    if block.norm_after or reads == "resid":  # there is no norm before the branch
        source = f"blocks.{layer}." + ("hook_resid_pre" if name in block.stages[0] else "hook_resid_mid")
    else:
        source = input_of(model, site)
    window = taps_of(model, site) if window is None else window
    cfg = CoderConfig(
        architecture=architecture, in_site=source, out_site=site, d_in=window * model.site(source).width,
        d_out=model.site(site).width, d_sae=d_sae, window=window, reads=reads, target="block", skip=skip,
        **ARCHITECTURES[architecture],
    )  # fmt: skip
    return noisy(SparseCoder(cfg, seed=seed), seed)


def some_writers(model: Any, seed: int, share: float = 0.7) -> list[SparseCoder]:
    """Dictionaries for a part of a model, each of a random kind."""
    draw = random.Random(seed)
    found = []
    for i, part in enumerate(writable(model)):
        if draw.random() > share and i:
            continue
        fields: dict[str, Any] = {}
        if isinstance(part, int) and not model.block(part).beside and draw.random() < 0.3:
            fields = {"reads": draw.choice(["normalized", "resid"]), "skip": draw.random() < 0.5}
            if model.block(part).norm_after or "mixer" not in model.block(part).stages[0]:
                fields = {}
        found.append(writer(model, part, draw.choice(list(ARCHITECTURES)), seed + i, **fields))
    return found


def begun(model: Any, tokens: Tensor, start: str) -> dict[str, Any]:
    """How a run of two rows begins: "empty", "padded", or "going on" from a memory."""
    if start == "padded":
        return {"attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    if start == "going on":
        return {"initial_state": model(tokens.flip(0), return_state=True)[1].detach()}
    return {}


def check_against_whole(monkeypatch: pytest.MonkeyPatch, frozen: FrozenModel, targets: list[Any], start: str) -> None:
    """Covectors at few positions find what covectors at all of them do."""
    found = attribute(frozen, targets=targets)
    monkeypatch.setattr("circuits.attribution.stays", lambda frozen, covectors: False)
    whole = attribute(frozen, targets=targets)
    assert found.residual.abs().max() < EXACT
    for name in ("embeddings", "features", "errors", "biases", "coder_biases", "initial", "heads", "experts"):
        mine, theirs = getattr(found, name), getattr(whole, name)
        mine, theirs = ({0: mine}, {0: theirs}) if name == "embeddings" else (mine, theirs)
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[key], theirs[key], atol=EXACT) for key in mine), name
    if start == "going on":
        assert any(float(part.abs().max()) > 1e-9 for part in found.initial.values())


class Written(Replay):
    """A replay in which what chosen layers write is what it was, less what is taken away: `gone[layer]`, l E."""

    def __init__(self, model: Any, cache: Any, row: int, layers: set[int]) -> None:
        super().__init__(model, cache, row)
        self.u = {i: array(cache[f"blocks.{i}.mixer.hook_x"][row]).reshape(len(self.embed), -1) for i in layers}
        self.gone = {i: np.zeros_like(u) for i, u in self.u.items()}

    def out(self, i: int, x: np.ndarray, off: Off) -> np.ndarray:
        if i not in self.u:
            return super().out(i, x, off)
        layer = self.layers[i]
        y = np.einsum("ets,se->te", layer.alpha, self.u[i] - self.gone[i])
        return (y * layer.gain) @ layer.W_o.T + layer.b_o

    def own_u(self, i: int, x: np.ndarray) -> np.ndarray:
        """What a layer itself would write, of the stream entering it."""
        layer = self.layers[i]
        p = x * layer.norm_factor @ layer.W_x.T + layer.b_x
        K = layer.kappa.shape[1]
        mixed = [sum(layer.kappa[:, K - 1 - k] * p[t - k] for k in range(min(K, t + 1))) for t in range(len(p))]
        return layer.sigma * (np.array(mixed) + layer.b_c)


def row_of(tensor: Tensor, row: int) -> np.ndarray:
    return array(tensor[row])
