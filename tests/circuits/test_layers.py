"""Adapters, parametrisations and torch hooks on layers: each acts, or is refused by name where weights are read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from circuits import FrozenModel
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent import models as recurrent
from tests.hooked_mamba.tiny import build, tokens_for
from tests.kinds import MAMBA

FAMILIES = ("mamba", "falcon", "mamba2", "deltanet", "rwkv7", "jamba", "lfm2", "granite-moe")


def model_of(family: str) -> nn.Module:
    if family in recurrent.KINDS:
        return recurrent.build(family)
    if family in hybrids.CASES:
        return copy.deepcopy(hybrids.tiny(family).model)
    return build(family).double().requires_grad_(False)


class Adapter(nn.Module):
    """As PEFT puts one in a layer's place: base(x) + change(x), `.weight` being the base's."""

    def __init__(self, base: nn.Module, change: Tensor) -> None:
        super().__init__()
        self.base_layer, self.change = base, change

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Conv1d):
            return self.base_layer(x) + nn.functional.conv1d(x, self.change, groups=x.shape[1])
        return self.base_layer(x) + x @ self.change.t()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def change_of(weight: Tensor, seed: int) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype) * 0.2


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and convolution, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)}


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def attach(model: nn.Module, name: str, change: Tensor, how: str) -> None:
    layer = model.get_submodule(name)
    if how == "adapter":
        put(model, name, Adapter(layer, change))
    elif how == "hook":
        other = copy.deepcopy(layer)
        other.weight.data = change
        other.bias = None
        layer.register_forward_hook(lambda module, args, out: out + nn.Module.__call__(other, *args))
    else:

        class Plus(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight + change

        parametrize.register_parametrization(layer, "weight", Plus(), unsafe=True)


@pytest.mark.parametrize("how", ["adapter", "hook", "parametrisation"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in (*MAMBA, "jamba") else pytest.mark.slow) for f in FAMILIES]
)
def test_every_layer_acts_as_if_merged_or_is_refused(unchecked, family, how):
    """Every linear layer and convolution in turn, of every kind of layer once."""
    seen = set()
    tokens = tokens_for(model_of(family), length=9)
    names = list(layers_of(model_of(family)))
    refused = []
    for seed, name in enumerate(names):
        kind = (name.split(".", 2)[-1], name.rpartition(".")[2])
        if kind in seen:
            continue
        seen.add(kind)
        live, merged = model_of(family), model_of(family)
        change = change_of(live.get_submodule(name).weight, seed)
        merged.get_submodule(name).weight.data += change
        attach(live, name, change, how)
        mask = torch.ones_like(tokens)
        mask[0, 6:] = 0
        for options in ({}, {"attention_mask": mask}):
            expected = merged(tokens, **options)
            try:
                got = live(tokens, **options)
            except ValueError as error:
                said = str(error)
                refused.append(name if name.rpartition(".")[2] in said and "merge" in said else said)
                continue
            real = mask.bool() if options else torch.ones_like(mask).bool()
            torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-6)
    assert all(name.endswith("router") for name in refused), refused
    assert how != "parametrisation" or not refused


@pytest.mark.parametrize("how", ["adapter", "hook"])
@pytest.mark.parametrize("name", ["in_proj", "conv1d", "out_proj"])
@pytest.mark.parametrize("family", MAMBA)
def test_what_reads_weights_refuses(unchecked, family, name, how):
    model, full = model_of(family), f"blocks.1.mixer.{name}"
    tokens = tokens_for(model)
    attach(model, full, change_of(model.get_submodule(full).weight, 1), how)
    _, cache = model.run_with_cache(tokens)
    asks = {
        "in_proj": (lambda: model.W_in, lambda: model.blocks[1].mixer.value_input()),
        "conv1d": (lambda: model.W_conv, lambda: cache.token_path(1)),
        "out_proj": (lambda: model.W_out, lambda: cache.stack_source_results(1)),
    }
    for ask in (*asks[name], lambda: FrozenModel(model, tokens).chain(1)):
        with pytest.raises(ValueError, match=f"{name} (is a Adapter|has a torch hook).*merge"):
            ask()


def test_a_hook_on_a_norm_is_refused(unchecked):
    model = model_of("mamba")
    model.blocks[1].norm.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match=r"norm .*has a torch hook"):
        FrozenModel(model, tokens_for(model)).chain(1)
