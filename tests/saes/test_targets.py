"""The local part of a block's output, against derivatives of the frozen mixer, and the streams' names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from hooked_mamba.hooks.names import HookNameError
from saes.targets import all_streams, last_layer, local_part, read, sites_of, stream_values, streams_of


@dataclass(frozen=True)
class Config:
    in_site: str
    out_site: str
    target: str | None = None
    window: int = 1


SAE = Config("blocks.1.mixer.hook_x", "blocks.1.mixer.hook_x")
CODER = Config("blocks.1.norm.hook_out", "blocks.1.mixer.hook_out_proj", "local")


def mamba1(**changes: int) -> HookedMamba:
    cfg = MambaConfig(d_model=8, n_layers=2, d_vocab=17, d_state=3, **changes)
    return HookedMamba(cfg, seed=3).double()


def mamba2(groups: int = 1, **changes: int) -> HookedMamba2:
    cfg = Mamba2Config(d_model=8, n_layers=2, d_vocab=17, d_state=4, head_dim=4, n_groups=groups, **changes)
    return HookedMamba2(cfg, seed=3).double()


MODELS = {"mamba1": mamba1, "mamba2": mamba2, "mamba2, two groups": lambda: mamba2(2)}


@pytest.mark.parametrize("kind", MODELS)
def test_local_part_is_what_the_frozen_mixer_makes_of_the_own_input(kind: str) -> None:
    """Freeze sigma, dt, B, C, gate and gated norm; change n at one position by a finite step; read that position."""
    model = MODELS[kind]()
    randomise(model)
    tokens = torch.randint(17, (1, 9), generator=torch.Generator().manual_seed(0))
    layer, block = 1, "blocks.1."
    sites = sites_of(f"{block}mixer.hook_out_proj@local", model)
    _, clean = model.run_with_cache(tokens, names_filter=[*sites, f"{block}norm.hook_out", f"{block}mixer.hook_z"])
    local = local_part(model, layer, clean)

    def frozen_output(n: torch.Tensor) -> torch.Tensor:
        """The mixer on n, with all but the value path held at the clean run's numbers."""
        width = clean[f"{block}mixer.hook_conv"].shape[-1]
        sigma = torch.sigmoid(clean[f"{block}mixer.hook_conv"])
        E = model.cfg.E

        def u_only(value: torch.Tensor, hook: object) -> torch.Tensor:
            new = value.clone()  # hook_x: sigma (frozen) times this run's convolution
            u = (sigma * state["conv"])[..., :E]
            return u.reshape(new.shape)

        state: dict[str, torch.Tensor] = {}

        def keep_conv(value: torch.Tensor, hook: object) -> None:
            assert value.shape[-1] == width
            state["conv"] = value.clone()

        def frozen(name: str):
            return f"{block}{name}", lambda value, hook: clean[f"{block}{name}"].clone()

        names = ["mixer.hook_dt", "mixer.hook_B", "mixer.hook_C", "mixer.hook_gate"]
        if kind != "mamba1":
            names.append("mixer.norm.hook_scale")
        hooks = [
            (f"{block}norm.hook_out", lambda value, hook: n),
            (f"{block}mixer.hook_conv", keep_conv),
            (f"{block}mixer.hook_x", u_only),
            *map(frozen, names),
        ]
        _, cache = model.run_with_cache(tokens, fwd_hooks=hooks, names_filter=f"{block}mixer.hook_out_proj")
        return cache[f"{block}mixer.hook_out_proj"]

    n = clean[f"{block}norm.hook_out"]
    for t in (0, 2, 8):
        # The frozen mixer is affine in n: a whole step to zero is an exact finite difference.
        without = n.clone()
        without[:, t] = 0
        change = frozen_output(n) - frozen_output(without)
        torch.testing.assert_close(change[:, t], local[:, t], rtol=1e-10, atol=1e-12)
        assert change[:, t].abs().max() > 1e-3
        if t < 8:
            assert change[:, t + 1].abs().max() > 1e-9, "the rest of the mixer must read this position, too"


def randomise(model: torch.nn.Module) -> None:
    """Weights without symmetries or zeros: D, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_streams_of_coders() -> None:
    assert streams_of(SAE) == ("blocks.1.mixer.hook_x",) * 2
    assert streams_of(CODER) == ("blocks.1.norm.hook_out", "blocks.1.mixer.hook_out_proj@local")
    assert all_streams([SAE, CODER, SAE]) == [
        "blocks.1.mixer.hook_x",
        "blocks.1.norm.hook_out",
        "blocks.1.mixer.hook_out_proj@local",
    ]
    values = {name: torch.full((2, 3), float(i)) for i, name in enumerate(all_streams([CODER]))}
    x, y = read(CODER, values)
    assert x.unique().tolist() == [0.0]
    assert y.unique().tolist() == [1.0]
    with pytest.raises(KeyError, match=r"no stream 'blocks\.1\.mixer\.hook_x'"):
        read(SAE, values)


def test_sites_are_checked() -> None:
    model = mamba1()
    with pytest.raises(HookNameError, match="nearest"):
        sites_of("blocks.1.mixer.hook_xx", model)
    with pytest.raises(ValueError, match="only a block's output"):
        sites_of("blocks.1.mixer.hook_x@local", model)
    with pytest.raises(ValueError, match="does not have a value at every position"):
        sites_of("blocks.1.mixer.hook_h.3", model)
    with pytest.raises(HookNameError):
        sites_of("blocks.9.mixer.hook_out_proj@local", model)


def test_last_layer() -> None:
    assert last_layer(["blocks.0.norm.hook_out", "blocks.2.mixer.hook_x"]) == 2
    assert last_layer(["hook_embed"]) == -1
    assert last_layer(["blocks.0.norm.hook_out", "ln_final.hook_out"]) is None


def test_large_sites_give_chosen_channels() -> None:
    model = mamba1()
    tokens = torch.arange(5)[None]
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_h")
    values = stream_values("blocks.0.mixer.hook_h", cache, model, channels=[4, 1])
    assert values.shape == (1, 5, 6)
    torch.testing.assert_close(values[0, 2, :3], cache["blocks.0.mixer.hook_h"][0, 2, 4])
    torch.testing.assert_close(values[0, 2, 3:], cache["blocks.0.mixer.hook_h"][0, 2, 1])
