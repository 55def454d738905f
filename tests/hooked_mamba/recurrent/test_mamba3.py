"""Mamba-3 against an independent loop: every site read, edited and differentiated, chunks, steps, padding."""

from __future__ import annotations

import functools
import json
import re
import zlib

import numpy as np
import pytest
import torch

from hooked_mamba import HookedHybrid, HookedMamba3, load_model
from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading import CheckpointError
from hooked_mamba.recurrent_config import Mamba3Config, Mamba3MIMOConfig
from tests.hooked_mamba import reference
from tests.hooked_mamba.recurrent import mamba3_oracle
from tests.hooked_mamba.recurrent.models import everything, tokens_for
from tests.hooked_mamba.tiny import arrays, relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-12
LENGTH = 6
KINDS = {
    "plain": {"A_act": "softplus"},
    "all": {"A_act": "heavy_tail", "n_groups": 2, "norm_of_heads": True, "use_bias": True, "rope_fraction": 1.0},
    "mimo": {"A_act": "softplus", "mimo_rank": 2, "d_state": 8},
    "mimo-all": {"A_act": "heavy_tail", "mimo_rank": 3, "d_state": 4, "n_groups": 2, "norm_of_heads": True},
}


def mixer_config(kind: str, **changes) -> Mamba3Config:
    fields = {"d_model": 6, "d_state": 5, "head_dim": 3} | KINDS[kind] | changes
    return (Mamba3MIMOConfig if "mimo_rank" in fields else Mamba3Config)(**fields)


@functools.lru_cache
@torch.no_grad()
def model_of(kind: str) -> HookedHybrid:
    """One block, so that its mixer's input is known."""
    mixer = mixer_config(kind, n_layers=1)
    cfg = HybridConfig(
        d_model=6, n_layers=1, d_vocab=17, tie_embeddings=False, branches={"mixer": mixer}, layout=((("mixer",),),)
    )
    model = HookedHybrid(cfg, seed=0).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return model


AT = "blocks.0.mixer."


def equations(model, x, edits=None, memory=None):
    p = {n.removeprefix(AT): w for n, w in arrays(model.state_dict()).items() if n.startswith(AT)}
    return mamba3_oracle.mixer(model.cfg.branches["mixer"], p, np.asarray(x), edits, memory)


def inputs(model, tokens, **kwargs):
    return model.run_with_cache(tokens, names_filter="blocks.0.norm.hook_out", **kwargs)[1]["blocks.0.norm.hook_out"]


SITES = {kind: [n for n in model_of(kind).hook_dict if n.startswith(AT)] for kind in KINDS}
CASES = [(kind, n) for kind in KINDS for n in [*SITES[kind], *(f"{AT}hook_h.{t}" for t in (0, 3, LENGTH - 1))]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_cached_site_equals_the_equations(kind):
    model, tokens = model_of(kind), tokens_for(length=LENGTH)
    _, cache = everything(model, tokens)
    out, sites, _ = equations(model, inputs(model, tokens))
    assert {n.removeprefix(AT) for n in cache if n.startswith(AT)} == set(sites)
    for name, value in sites.items():
        assert relative(cache[AT + name], value) < EXACT, name
        assert tuple(cache[AT + name].shape) == model.site(AT + name).shape(2, LENGTH), name
    assert relative(cache["blocks.0.hook_mixer_out"], out) < EXACT


def draw_edit(name: str):
    rng, draw = np.random.default_rng(zlib.crc32(name.encode())), {}

    def edit(value: np.ndarray) -> np.ndarray:
        noise = draw.setdefault(value.shape, rng.standard_normal(value.shape))
        if name.endswith(("hook_scale", "hook_dt", "hook_A", "hook_A_bar")):
            return value * (1 + 0.3 * np.abs(noise))
        return value * 1.3 + noise * 0.3

    return edit, lambda value, hook: torch.from_numpy(edit(value.detach().numpy()))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_edit_is_the_equations_with_that_edit(kind, name):
    model, tokens = model_of(kind), tokens_for(length=LENGTH, seed=5)
    edit, hook = draw_edit(name)
    x = inputs(model, tokens)
    out, sites, _ = equations(model, x, {name.removeprefix(AT): edit})
    _, cache = everything(model, tokens, fwd_hooks=[(name, hook)])
    assert np.abs(out - equations(model, x)[0]).max() > 1e-6, "the edit has no effect: the test shows nothing"
    for own, value in sites.items():
        assert relative(cache[AT + own], value) < EXACT, own


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_read_at_every_site_is_the_derivative(kind):
    model, tokens = model_of(kind), tokens_for(length=LENGTH, seed=1)
    x, rng, grads = inputs(model, tokens), np.random.default_rng(0), {}
    V = rng.standard_normal((2, LENGTH, 6))
    names = [*SITES[kind], f"{AT}hook_h.1"]
    discrete = [n for n in names if re.search(r"hook_(A_bar|beta|gamma|Bx_prev|Bx|h)$", n)]
    for group in ([n for n in names if n not in discrete], discrete):

        def keep(grad, hook) -> None:
            grads[hook.name] = grad.numpy().copy()

        with model.hooks(bwd_hooks=[(name, keep) for name in group]):
            out = model.blocks[0].mixer(x.clone().requires_grad_())[0]
            (out * torch.from_numpy(V)).sum().backward()
        for name in group:
            direction = rng.standard_normal(grads[name].shape)
            step = 1j * reference.STEP * direction
            moved = equations(model, x, {name.removeprefix(AT): lambda value, step=step: value + step})[0]
            expected = float((reference.derivative(moved) * V).sum())
            terms = grads[name] * direction
            assert abs(terms.sum() - expected) <= EXACT * np.abs(terms).sum() + 1e-17, name


def check_memory(state, memory, rows=slice(None)) -> None:
    for name, value in memory.items():
        assert relative(state[0]["mixer"]._asdict()[name][rows], value) < EXACT, name


@pytest.mark.parametrize("lengths", [(3, 4), (1,) * 7], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_are_one_pass(kind, lengths):
    model, tokens = model_of(kind), tokens_for(length=7, seed=2)
    _, sites, memory = equations(model, inputs(model, tokens))
    state, start = None, 0
    for length in lengths:
        chunk = slice(start, start + length)
        (_, state), cache = everything(model, tokens[:, chunk], initial_state=state, return_state=True)
        for name in SITES[kind]:
            assert relative(cache[name], sites[name.removeprefix(AT)][:, chunk]) < EXACT, name
        start += length
    check_memory(state, memory)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_if_it_were_not_there(kind, side):
    model, first, tokens = model_of(kind), tokens_for(length=4, seed=6), tokens_for(length=8, seed=4)
    _, state = model(first, return_state=True)
    real = [slice(3, 8), slice(1, 8)] if side == "left" else [slice(0, 5), slice(0, 7)]
    mask = torch.zeros(2, 8, dtype=torch.long)
    for row, where in enumerate(real):
        mask[row, where] = 1
    (_, after), cache = everything(model, tokens, attention_mask=mask, initial_state=state, return_state=True)
    for row, where in enumerate(real):
        whole = torch.cat([first[row : row + 1], tokens[row : row + 1, where]], 1)
        _, sites, memory = equations(model, inputs(model, whole))
        for name in SITES[kind]:
            assert relative(cache[name][row, where], sites[name.removeprefix(AT)][0, 4:]) < EXACT, name
        check_memory(after, memory, slice(row, row + 1))


def test_the_rate_has_no_default():
    usual = {"d_model": 6, "n_layers": 1, "d_state": 5, "head_dim": 3}
    with pytest.raises(TypeError, match="A_act"):
        Mamba3Config(**usual)
    with pytest.raises(ValueError, match="'softplus' or 'heavy_tail', got 'relu'"):
        Mamba3Config(**usual, A_act="relu")
    with pytest.raises(ValueError, match="no pair to turn"):
        Mamba3Config(**(usual | {"d_state": 3}), A_act="softplus")
    with pytest.raises(ValueError, match="do not fit"):
        Mamba3Config(**usual, n_groups=3, A_act="softplus")


# Files -----------------------------------------------------------------------------------------------------------


def in_files(kind: str, **changes) -> HookedMamba3:
    """Two layers, of architecture "mamba3"."""
    mixer = mixer_config(kind, n_layers=2, **{"use_bias": False, **changes})
    layout = ((("mixer",),),) * 2
    stack = {"d_model": 6, "n_layers": 2, "d_vocab": 24, "tie_embeddings": kind == "plain", "architecture": "mamba3"}
    return HookedMamba3(HybridConfig(**stack, branches={"mixer": mixer}, layout=layout), seed=0).eval()


@pytest.mark.parametrize(
    ("kind", "format"), [("plain", "raw"), ("all", "raw"), ("plain", "hf"), ("mimo", "raw"), ("mimo-all", "raw")]
)
def test_files_both_ways(kind, format, tmp_path):
    model, tokens = in_files(kind), tokens_for()
    model.save_pretrained(tmp_path, format=format)
    for loaded in (load_model(tmp_path), HookedMamba3.from_pretrained(tmp_path)):
        assert loaded.cfg.branches == model.cfg.branches
        assert torch.equal(loaded(tokens), model(tokens))
    if format == "raw":
        names = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        rank, N = getattr(model.cfg.branches["mixer"], "mimo_rank", 1), model.cfg.branches["mixer"].d_state
        assert names["backbone.layers.1.mixer.B_bias"].shape == (4, rank, N)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["ssm_cfg"]["layer"] == "Mamba3"


def test_a_raw_file_must_say_which_rate(tmp_path):
    in_files("plain").save_pretrained(tmp_path, format="raw")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["ssm_cfg"]["A_act"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"two variants.*softplus.*heavy_tail"):
        load_model(tmp_path)
    config["ssm_cfg"] |= {"A_act": "softplus", "is_mimo": True, "mimo_rank": 2, "d_state": 6}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mimo_x"):
        load_model(tmp_path)


def test_what_a_form_cannot_say(tmp_path):
    with pytest.raises(CheckpointError, match="format='raw'"):
        in_files("all").save_pretrained(tmp_path, format="hf")
    with pytest.raises(CheckpointError, match="MIMO"):
        in_files("mimo").save_pretrained(tmp_path, format="hf")
    with pytest.raises(CheckpointError, match="use_bias=True"):
        in_files("plain", use_bias=True).save_pretrained(tmp_path, format="raw")
