"""Tiny random checkpoints of every format, made without the code under test."""

import inspect
import math
import random
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

HF_KINDS = ("mamba", "falcon_mamba", "mamba2")

PER_GROUP = "group_size" in inspect.signature(MambaRMSNormGated.__init__).parameters
"""Whether this release of transformers takes the gated norm per group, as the checkpoints mean it."""


def random_hf_model(kind: str, seed: int) -> Any:
    """A transformers model with every field that shapes it drawn at random."""
    draw = random.Random(f"{kind}{seed}")
    torch.manual_seed(seed)
    common = {
        "hidden_size": draw.choice([8, 24, 32]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "vocab_size": draw.choice([17, 40]),
        "state_size": draw.choice([1, 4, 7]),
        "conv_kernel": draw.choice([2, 4]),
        "expand": draw.choice([1, 2, 3]),
        "use_bias": draw.random() < 0.5,
        "use_conv_bias": draw.random() < 0.5,
        "layer_norm_epsilon": draw.choice([1e-5, 1e-6]),
        "residual_in_fp32": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "time_step_min": draw.choice([0.001, 0.01]),
        "eos_token_id": draw.choice([None, 3]),
    }
    if kind == "mamba2":
        head_dim = draw.choice([2, 4])
        heads = common["hidden_size"] * common["expand"] // head_dim
        limits = [(0.0, math.inf), (0.01, 0.2), (0.01, math.inf)]
        config = transformers.Mamba2Config(
            **common,
            head_dim=head_dim,
            num_heads=heads,
            n_groups=draw.choice([g for g in ((1, 2, 4) if PER_GROUP else (1,)) if heads % g == 0]),
            time_step_limit=draw.choice(limits),
            chunk_size=draw.choice([16, 256]),
        )
        return _perturbed(transformers.Mamba2ForCausalLM(config))
    common["time_step_rank"] = draw.choice(["auto", 3])
    if kind == "falcon_mamba":
        config = transformers.FalconMambaConfig(**common, mixer_rms_eps=draw.choice([1e-6, 1e-3]))
        return _perturbed(transformers.FalconMambaForCausalLM(config))
    return _perturbed(transformers.MambaForCausalLM(transformers.MambaConfig(**common)))


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype in a transformers config, whose field was renamed with release 5."""
    return config.dtype if hasattr(config, "dtype") else config.torch_dtype


def _perturbed(model: Any) -> Any:
    """No weight equal to another, so that two swapped ones are noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_raw(kind: str, seed: int, **fields: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config.json and a state dict as mamba_ssm writes them."""
    draw = random.Random(f"{kind}{seed}")
    generator = torch.Generator().manual_seed(seed)
    d, expand, K = draw.choice([16, 24]), draw.choice([1, 2]), draw.choice([3, 4])
    E = expand * d
    vocab, multiple = draw.choice([(21, 8), (33, 16), (16, 8)])
    bias, conv_bias = draw.random() < 0.5, draw.random() < 0.5
    config = {
        "d_model": d,
        "n_layer": draw.choice([1, 2]),
        "vocab_size": vocab,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": draw.random() < 0.5,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": draw.random() < 0.5,
    } | fields
    ssm_cfg: dict[str, Any] = {}
    if kind == "raw_mamba2":
        N, P = draw.choice([4, 128]), draw.choice([4, 8])
        H = E // P
        G = draw.choice([g for g in (1, 2) if H % g == 0])
        ssm_cfg = {"layer": "Mamba2", "headdim": P}
        if G != 1:
            ssm_cfg["ngroups"] = G
        if draw.random() < 0.5:
            ssm_cfg["dt_limit"] = (0.01, 0.3)
        if N != 128:
            ssm_cfg["d_state"] = N
        conv, rows = E + 2 * G * N, 2 * E + 2 * G * N + H
        mixer = {"dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (E,)}
    else:
        N, R = draw.choice([4, 16]), draw.choice([2, 5])
        if N != 16:
            ssm_cfg["d_state"] = N
        if math.ceil(d / 16) != R:
            ssm_cfg["dt_rank"] = R
        conv, rows = E, 2 * E
        mixer = {
            "x_proj.weight": (R + 2 * N, E),
            "dt_proj.weight": (E, R),
            "dt_proj.bias": (E,),
            "A_log": (E, N),
            "D": (E,),
        }
    ssm_cfg |= {"expand": expand} if expand != 2 else {}
    ssm_cfg |= {"d_conv": K} if K != 4 else {}
    ssm_cfg |= {"bias": True} if bias else {}
    ssm_cfg |= {"conv_bias": False} if not conv_bias else {}
    config["ssm_cfg"] = ssm_cfg
    mixer |= {"in_proj.weight": (rows, d), "conv1d.weight": (conv, 1, K), "out_proj.weight": (d, E)}
    mixer |= {"in_proj.bias": (rows,), "out_proj.bias": (d,)} if bias else {}
    mixer |= {"conv1d.bias": (conv,)} if conv_bias else {}

    def weight(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    V = -(-vocab // multiple) * multiple
    state = {"backbone.embedding.weight": weight((V, d)), "backbone.norm_f.weight": weight((d,))}
    for i in range(config["n_layer"]):
        state[f"backbone.layers.{i}.norm.weight"] = weight((d,))
        state |= {f"backbone.layers.{i}.mixer.{name}": weight(shape) for name, shape in mixer.items()}
    tied = config["tie_embeddings"]
    state["lm_head.weight"] = state["backbone.embedding.weight"] if tied else weight((V, d))
    return config, state


def codestral(n_groups: int = 2, tied: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """params.json and consolidated.safetensors of a tiny Codestral-Mamba: d_state 128, head_dim 64, expand 2."""
    d, N, H, G = 64, 128, 2, n_groups
    E = 2 * d
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "backbone.embedding.weight": (12, d),
        "backbone.norm_f.weight": (d,),
        "backbone.layers.0.norm.weight": (d,),
        "backbone.layers.0.mixer.in_proj.weight": (2 * E + 2 * G * N + H, d),
        "backbone.layers.0.mixer.conv1d.weight": (E + 2 * G * N, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (E + 2 * G * N,),
        "backbone.layers.0.mixer.dt_bias": (H,),
        "backbone.layers.0.mixer.A_log": (H,),
        "backbone.layers.0.mixer.D": (H,),
        "backbone.layers.0.mixer.norm.weight": (E,),
        "backbone.layers.0.mixer.out_proj.weight": (d, E),
    }
    shapes |= {} if tied else {"lm_head.weight": (12, d)}
    params = {
        "dim": d,
        "n_layers": 1,
        "vocab_size": 12,
        "n_groups": n_groups,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": tied,
        "model_type": "mamba",
    }
    return params, {f"model.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}


def module_of(state: dict[str, Tensor], device: str = "meta", tied: bool = False) -> torch.nn.Module:
    """A module with parameters of these names and shapes, as the models have them."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, torch.nn.Parameter(torch.zeros(tensor.shape, device=device)))
    for name, owner in root.named_modules():
        if name.endswith("mixer"):
            owner.keep_float32 = ("A_log", "D", "dt_bias", "dt_proj.bias")
    if tied:
        root.add_module("unembed", torch.nn.Module())
        root.unembed.weight = root.embed.weight
    return root


def assert_same(a: Any, b: Any) -> None:
    """Two state dicts of equal names, dtypes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
