"""Our models against transformers (float32), and against the equations (float64): values and gradients."""

from __future__ import annotations

import inspect
import json
import random

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from hooked_mamba import HookedMamba, HookedMamba2, LayerState, Mamba2Config, MambaConfig, ModelState
from tests.hooked_mamba import reference
from tests.hooked_mamba.tiny import FAMILIES, arrays, build, randomize, relative, tokens_for
from tests.kinds import MAMBA

FP32 = 1e-5  # of the largest |logit|
FP64 = 1e-12


def random_mamba(seed: int, falcon: bool | None = None) -> MambaConfig:
    draw = random.Random(seed)
    return MambaConfig(
        d_model=draw.randint(3, 13),
        n_layers=draw.randint(1, 3),
        d_vocab=draw.randint(5, 30),
        d_state=draw.choice([1, 2, 3, 5, 8, 16]),
        d_conv=draw.choice([2, 3, 4]),
        expand=draw.choice([1, 2, 3]),
        dt_rank=draw.choice([1, 2, 3, 5]),
        use_bias=draw.random() < 0.5,
        conv_bias=draw.random() < 0.5,
        tie_embeddings=draw.random() < 0.5,
        eps=draw.choice([1e-5, 1e-6, 1e-3]),
        mixer_norms=draw.random() < 0.3 if falcon is None else falcon,
        mixer_norm_eps=draw.choice([1e-6, 1e-3]),
    )


def random_mamba2(seed: int) -> Mamba2Config:
    draw = random.Random(seed)
    groups, heads_per_group, head_dim = draw.choice([1, 1, 2, 4]), draw.randint(1, 3), draw.choice([1, 2, 3, 4])
    inner = groups * heads_per_group * head_dim
    expand = draw.choice([e for e in (1, 2, 3) if inner % e == 0])
    return Mamba2Config(
        d_model=inner // expand,
        n_layers=draw.randint(1, 3),
        d_vocab=draw.randint(5, 30),
        d_state=draw.choice([1, 2, 3, 5, 16]),
        d_conv=draw.choice([2, 3, 4]),
        expand=expand,
        head_dim=head_dim,
        n_groups=groups,
        dt_limit=draw.choice([(0.0, float("inf")), (0.0, 0.3), (0.1, float("inf")), (0.05, 0.4)]),
        use_bias=draw.random() < 0.5,
        conv_bias=draw.random() < 0.5,
        tie_embeddings=draw.random() < 0.5,
        eps=draw.choice([1e-5, 1e-6, 1e-3]),
        chunk_size=draw.choice([4, 8, 64]),
    )


def random_config(seed: int) -> MambaConfig | Mamba2Config:
    return random_mamba2(seed) if seed % 2 else random_mamba(seed)


def hf_twin(cfg: MambaConfig | Mamba2Config, seed: int) -> torch.nn.Module:
    """A transformers model of the same shape, made by transformers alone."""
    common = {
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "state_size": cfg.d_state,
        "num_hidden_layers": cfg.n_layers,
        "layer_norm_epsilon": cfg.eps,
        "conv_kernel": cfg.d_conv,
        "expand": cfg.expand,
        "use_bias": cfg.use_bias,
        "use_conv_bias": cfg.conv_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if isinstance(cfg, Mamba2Config):
        hf = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **common,
                head_dim=cfg.head_dim,
                num_heads=cfg.H,
                n_groups=cfg.n_groups,
                time_step_limit=cfg.dt_limit,
                chunk_size=cfg.chunk_size,
            )
        )
    elif cfg.mixer_norms:
        common |= {"time_step_rank": cfg.R, "mixer_rms_eps": cfg.mixer_norm_eps}
        hf = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**common))
    else:
        hf = transformers.MambaForCausalLM(transformers.MambaConfig(**common, time_step_rank=cfg.R))
    return randomize(hf, seed).eval()


def ours(hf: torch.nn.Module) -> HookedMamba | HookedMamba2:
    cls = HookedMamba2 if hf.config.model_type == "mamba2" else HookedMamba
    return cls.from_hf(hf)


MIXES_GROUPS_UP = "repeat_interleave" not in inspect.getsource(modeling_mamba2)
"""transformers before 4.53 repeats B and C of the groups in turns, so that heads read other groups than their own."""


def check_against_hf(cfg: MambaConfig | Mamba2Config, seed: int) -> None:
    if isinstance(cfg, Mamba2Config) and 1 < cfg.n_groups < cfg.H and MIXES_GROUPS_UP:
        pytest.skip(f"transformers {transformers.__version__} gives heads other groups' B and C")
    hf = hf_twin(cfg, seed)
    model = ours(hf)
    tokens = tokens_for(model, rows=2, length=1 + seed % 13, seed=seed)
    with torch.no_grad():
        mine, theirs = model(tokens), hf(tokens).logits
    if relative(mine, theirs) >= FP32:  # badly conditioned, such as norms of one channel: both are off
        expected = reference.forward(model.cfg, arrays(model.state_dict()), tokens.numpy()).logits
        assert relative(mine, expected) < max(FP32, 8 * relative(theirs, expected))
        assert relative(mine, theirs) < 1e-4


def check_against_equations(cfg: MambaConfig | Mamba2Config, seed: int) -> None:
    model = build(cfg, seed).double()
    tokens = tokens_for(model, rows=2, length=1 + seed % 11, seed=seed)
    expected = reference.forward(model.cfg, arrays(model.state_dict()), tokens.numpy())
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert relative(logits, expected.logits) < FP64
    assert list(cache) == [name for name in expected.sites if ".hook_h." not in name]
    worst = max((relative(value, expected.sites[name]), name) for name, value in cache.items())
    assert worst < (FP64, ""), f"{worst[1]} is off by {worst[0]:.1e}"


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers(seed):
    check_against_hf(random_config(seed), seed)


@pytest.mark.parametrize("seed", range(6))
def test_falcon_mamba_equals_transformers(seed):
    check_against_hf(random_mamba(seed, falcon=True), seed)


@pytest.mark.parametrize("seed", range(24))
def test_every_site_equals_the_equations(seed):
    check_against_equations(random_config(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400))
def test_wide_sweep(seed):
    check_against_hf(random_config(seed), seed)
    check_against_equations(random_config(seed), seed)


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("family", ["mamba", "mamba2-groups"])
def test_lengths_around_a_tile(family, length):
    model = build(family, seed=3).double()
    tokens = tokens_for(model, rows=1, length=length)
    expected = reference.forward(model.cfg, arrays(model.state_dict()), tokens.numpy())
    with torch.no_grad():
        assert relative(model(tokens), expected.logits) < FP64


def test_norm_groups_apart_from_groups_of_B():
    """mamba_ssm and newer transformers take the gated norm per group, older ones over all channels."""
    for groups in (1, 2, 6):
        check_against_equations(Mamba2Config(d_model=6, n_layers=2, d_vocab=9, head_dim=2, norm_groups=groups), 0)


# Raw layouts -------------------------------------------------------------------------------------------------


def raw_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of mamba_ssm's files."""
    renamed = {}
    for name, value in state_dict.items():
        name = name.replace("blocks.", "layers.")
        name = {"embed.weight": "embedding.weight", "ln_final.weight": "norm_f.weight"}.get(name, name)
        renamed["lm_head.weight" if name == "unembed.weight" else f"backbone.{name}"] = value.clone()
    return renamed


RAW_CASES = {
    "mamba": (MambaConfig(d_model=9, n_layers=2, d_vocab=16, d_state=5, d_conv=3, dt_rank=2, use_bias=True), False),
    "mamba untied": (MambaConfig(d_model=16, n_layers=1, d_vocab=24, tie_embeddings=False, conv_bias=False), False),
    "mamba2": (
        Mamba2Config(d_model=8, n_layers=2, d_vocab=32, d_state=6, head_dim=2, n_groups=4, dt_limit=(0.05, 0.4)),
        False,
    ),
    "mamba2 with D per channel": (Mamba2Config(d_model=8, n_layers=1, d_vocab=16, d_state=3, head_dim=4), True),
}


@pytest.mark.parametrize("case", RAW_CASES)
def test_raw_files_equal_the_equations(case, tmp_path):
    cfg, long_D = RAW_CASES[case]
    twin = build(cfg, seed=5)
    weights = raw_names(twin.state_dict())
    ssm = {"d_state": cfg.d_state, "d_conv": cfg.d_conv, "expand": cfg.expand, "bias": cfg.use_bias}
    ssm["conv_bias"] = cfg.conv_bias
    if isinstance(cfg, Mamba2Config):
        ssm |= {"layer": "Mamba2", "headdim": cfg.head_dim, "ngroups": cfg.n_groups}
        if cfg.dt_limit[1] < 1:
            ssm["dt_limit"] = list(cfg.dt_limit)
        if long_D:
            for name in [n for n in weights if n.endswith(".D")]:
                weights[name] = weights[name].repeat_interleave(cfg.head_dim)
            ssm["D_has_hdim"] = True
    else:
        ssm["dt_rank"] = cfg.R
    multiple = 16 if isinstance(cfg, Mamba2Config) else 8
    config = {"d_model": cfg.d_model, "n_layer": cfg.n_layers, "vocab_size": cfg.d_vocab - 3, "ssm_cfg": ssm}
    config |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    config |= {"pad_vocab_size_multiple": multiple, "tie_embeddings": cfg.tie_embeddings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")

    cls = HookedMamba2 if isinstance(cfg, Mamba2Config) else HookedMamba
    model = cls.from_pretrained(tmp_path)
    tokens = tokens_for(model, length=9)
    expected = reference.forward(cfg, arrays(twin.state_dict()), tokens.numpy())
    with torch.no_grad():
        assert relative(model(tokens), expected.logits) < FP32
        assert relative(model.double()(tokens), expected.logits) < FP64


# Where transformers itself is wrong --------------------------------------------------------------------------

SEEN_IN = "5.23."
"""The releases of transformers whose errors are stated here; another may have mended them."""


def errors(model, hf, tokens: Tensor, hf_logits: Tensor, our_logits: Tensor, last: int) -> tuple[float, float]:
    """Errors of transformers and of ours at the last positions, against the float64 equations."""
    expected = reference.forward(model.cfg, arrays(model.state_dict()), tokens.numpy()).logits[:, -last:]
    return relative(hf_logits[:, -last:], expected), relative(our_logits[:, -last:], expected)


def memory_of(hf_output):
    return getattr(hf_output, "cache_params", None) or hf_output.past_key_values


def state_they_fail(hf_error: float, our_error: float) -> None:
    assert our_error < FP32
    assert hf_error > 0.05, f"transformers {transformers.__version__} is right here ({hf_error:.1e}): say so"


where_seen = pytest.mark.skipif(
    not transformers.__version__.startswith(SEEN_IN), reason="what another version of transformers does was not noted"
)


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("falcon", [False, True])
def test_second_prefill_chunk_of_mamba_forgets_the_state_in_transformers(falcon):
    hf = hf_twin(MambaConfig(d_model=12, n_layers=2, d_vocab=20, dt_rank=2, mixer_norms=falcon), 1)
    model = ours(hf)
    tokens = tokens_for(model, length=14)
    first = hf(tokens[:, :6], use_cache=True)
    second = hf(tokens[:, 6:], cache_params=memory_of(first), use_cache=True)
    _, state = model(tokens[:, :6], return_state=True)
    mine = model(tokens[:, 6:], initial_state=state)
    state_they_fail(*errors(model, hf, tokens, second.logits, mine, 8))


@where_seen
@torch.no_grad()
def test_decode_step_of_mamba2_skips_the_clamp_in_transformers():
    cfg = Mamba2Config(d_model=12, n_layers=2, d_vocab=20, d_state=5, head_dim=4, dt_limit=(0.0, 0.1))
    hf = hf_twin(cfg, 1)
    model = ours(hf)
    tokens = tokens_for(model, length=9)
    first = hf(tokens[:, :8], use_cache=True)
    second = hf(tokens[:, 8:], cache_params=memory_of(first), use_cache=True)
    _, state = model(tokens[:, :8], return_state=True)
    mine = model(tokens[:, 8:], initial_state=state)
    state_they_fail(*errors(model, hf, tokens, second.logits, mine, 1))


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("family", MAMBA)
def test_step_after_right_padding_in_transformers(family):
    cfg = random_mamba(4) if family == "mamba" else random_mamba2(5)
    hf = hf_twin(cfg, 1)
    model = ours(hf)
    tokens = tokens_for(model, rows=1, length=9)
    padded = torch.cat([tokens[:, :6], torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    first = hf(padded, attention_mask=mask, use_cache=True)
    second = hf(tokens[:, 6:7], cache_params=memory_of(first), use_cache=True)
    _, state = model(padded, attention_mask=mask, return_state=True)
    mine = model(tokens[:, 6:7], initial_state=state)
    state_they_fail(*errors(model, hf, tokens[:, :7], second.logits, mine, 1))


@torch.no_grad()
@pytest.mark.parametrize("family", MAMBA)
def test_hooks_on_convolutions_never_fire_in_transformers(family):
    hf = hf_twin(random_mamba(0) if family == "mamba" else random_mamba2(1), 1)
    model = ours(hf)
    fired, ours_fired = [], []
    for block in hf.backbone.layers:
        block.mixer.conv1d.register_forward_hook(lambda *a: fired.append("conv1d"))
    hf(tokens_for(model))
    model.run_with_hooks(
        tokens_for(model), fwd_hooks=[("blocks.*.mixer.hook_conv", lambda v, hook: ours_fired.append(1))]
    )
    assert len(ours_fired) == model.cfg.n_layers
    if transformers.__version__.startswith(SEEN_IN):
        assert fired == []


# Gradients ---------------------------------------------------------------------------------------------------


def a_state(model, rows: int, seed: int = 0) -> ModelState:
    generator = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    return ModelState(tuple(LayerState(like(s.conv), like(s.ssm)) for s in model.initial_state(rows)))


@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck_of_embeddings_and_memory(family, materialised):
    model = build(family, seed=2, n_layers=1).double().requires_grad_(False)
    resid = torch.randn(1, 4, model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    memory = [t.requires_grad_() for layer in a_state(model, 1) for t in layer]
    if materialised:
        model.add_hook("blocks.*.mixer.hook_h", lambda h, hook: h)

    def run(resid: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        state = ModelState(tuple(LayerState(*memory[i : i + 2]) for i in range(0, len(memory), 2)))
        logits, end = model(resid, start_at_layer=0, initial_state=state, return_state=True)
        return logits, *(t for layer in end for t in layer)

    assert torch.autograd.gradcheck(run, (resid, *memory), fast_mode=True)


@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_gradients_equal_the_equations(family, materialised):
    model = build(family, seed=4).double()
    tokens = tokens_for(model, rows=2, length=9)
    if materialised:
        model.add_hook("blocks.*.mixer.hook_Bx", lambda Bx, hook: Bx)
    model(tokens, return_type="loss").backward()
    weights, rng = arrays(model.state_dict()), np.random.default_rng(0)
    for name, p in model.named_parameters():
        direction = rng.standard_normal(p.shape)
        moved = weights | {name: weights[name] + 1j * reference.STEP * direction}
        if name == "embed.weight" and model.cfg.tie_embeddings:
            moved["unembed.weight"] = moved[name]
        logits = reference.forward(model.cfg, moved, tokens.numpy()).logits
        expected = reference.derivative(reference.cross_entropy(logits, tokens.numpy()))
        terms = p.grad.numpy() * direction
        assert abs(terms.sum() - expected) <= 1e-11 * np.abs(terms).sum(), name
        assert np.abs(terms).sum() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_gradients_equal_the_equations(family):
    model = build(family, seed=6).double()
    tokens = tokens_for(model, rows=2, length=5)
    start = a_state(model, 2)
    for layer in start:
        layer.conv.requires_grad_()
        layer.ssm.requires_grad_()
    model(tokens, return_type="loss", initial_state=start).backward()
    rng, weights = np.random.default_rng(0), arrays(model.state_dict())
    memory = {part: [getattr(layer, part).detach().numpy() for layer in start] for part in ("conv", "ssm")}
    for part in ("conv", "ssm"):
        for i, layer in enumerate(start):
            grad = getattr(layer, part).grad.numpy()
            direction = rng.standard_normal(grad.shape)
            moved = {k: list(v) for k, v in memory.items()}
            moved[part][i] = moved[part][i] + 1j * reference.STEP * direction
            logits = reference.forward(model.cfg, weights, tokens.numpy(), **moved).logits
            expected = reference.derivative(reference.cross_entropy(logits, tokens.numpy()))
            assert abs((grad * direction).sum() - expected) <= 1e-11 * np.abs(grad * direction).sum(), (part, i)
