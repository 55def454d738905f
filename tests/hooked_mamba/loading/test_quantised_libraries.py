"""Files of the libraries that quantise, where these run on a CPU: what is read here is what they dequantise to."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hooked_mamba import HookedMamba, load_model
from tests.hooked_mamba.loading.folders import MAKERS, files_of, linears, write

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unchecked")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Mamba whose layers are as wide as blocks of 64 want them, and its folder."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=61, state_size=4, use_bias=True, time_step_rank=6
    )
    folder = tmp_path_factory.mktemp("base")
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    return folder


def ours(model: HookedMamba, layer: int, name: str) -> torch.Tensor:
    return model.state_dict()[f"blocks.{layer}.mixer.{name}.weight"]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(base, tmp_path, kind, double):
    bnb = pytest.importorskip("bitsandbytes.functional")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    _quantise(base, tmp_path, transformers.BitsAndBytesConfig(**options))
    model, tensors = load_model(tmp_path), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for name in ("in_proj", "x_proj"):
            key = f"backbone.layers.{layer}.mixer.{name}.weight"
            parts = {f"weight{k.removeprefix(key)}": v for k, v in tensors.items() if k.startswith(f"{key}.")}
            expected = bnb.dequantize_4bit(tensors[key], bnb.QuantState.from_dict(parts, device="cpu"))
            assert torch.allclose(ours(model, layer, name), expected, rtol=3e-7, atol=0), key
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes, such as backbone.layers.0.mixer"):
        HookedMamba.from_hf(transformers.MambaForCausalLM.from_pretrained(tmp_path, device_map="cpu"))


def test_bitsandbytes_in_8_bits(base, tmp_path):
    bnb = pytest.importorskip("bitsandbytes.functional")
    _quantise(base, tmp_path, transformers.BitsAndBytesConfig(load_in_8bit=True))
    model, tensors = load_model(tmp_path), load_file(tmp_path / "model.safetensors")
    for name in ("in_proj", "x_proj", "dt_proj"):
        key = f"backbone.layers.1.mixer.{name}"
        expected = bnb.int8_vectorwise_dequant(tensors[f"{key}.weight"], tensors[f"{key}.SCB"])
        assert torch.equal(ours(model, 1, name), expected)


def _quantise(base, folder, config) -> None:
    model = transformers.MambaForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)


SCHEMES = {
    "packed, 4 bits": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "packed, 4 bits, zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "packed, 8 bits by rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "packed, 2 bits, one scale": ("pack-quantized", {"num_bits": 2, "strategy": "tensor"}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8, zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "float8 by rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float8 by blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
    ),
}


class Compressor:
    """The library's own, of one scheme: from a weight to (tensors by part, what it decompresses them to)."""

    def __init__(self, scheme: str) -> None:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        form, fields = SCHEMES[scheme]
        self.args = QuantizationArgs(**fields)
        self.library = BaseCompressor.get_value_from_registry(form)
        self.scheme = QuantizationScheme(targets=["Linear"], weights=self.args)
        groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(self.args.model_dump_json())}}
        about = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        self.config = {"quantization_config": about | {"config_groups": groups}}

    def __call__(self, weight):
        scale, zero = _scales(weight, self.args)
        parts = {"weight": weight, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
        made = self.library.compress(parts, self.scheme)
        meant = self.library.decompress(dict(made), self.scheme)["weight"]
        return {part: tensor.contiguous() for part, tensor in made.items()}, meant


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(base, tmp_path, scheme):
    """Its compressor on every layer, and its own way back."""
    compressor = Compressor(scheme)
    tensors, expected = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        if not name.endswith(("in_proj.weight", "x_proj.weight")):
            tensors[name] = value
            continue
        made, expected[name] = compressor(value)
        tensors |= {name.removesuffix("weight") + part: t for part, t in made.items()}
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | compressor.config))
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    for name, value in expected.items():
        parts = name.split(".")
        got = ours(model, int(parts[2]), parts[4])
        assert torch.allclose(got, value.float(), rtol=3e-7, atol=1e-9), name


def _scales(weight, args):
    """Scales, and zeros where the scheme has them, of groups, rows, blocks or all."""
    rows, into = weight.shape
    if str(args.strategy) == "block":
        high, wide = args.block_structure
        scale = torch.zeros(-(-rows // high), -(-into // wide))
        for a in range(scale.shape[0]):
            for b in range(scale.shape[1]):
                part = weight[a * high : (a + 1) * high, b * wide : (b + 1) * wide]
                scale[a, b] = part.abs().max() / 448
        return scale, None
    size = {"group": args.group_size, "channel": into, "tensor": None}[str(args.strategy)]
    parts = weight.reshape(1, 1, -1) if size is None else weight.reshape(rows, -1, size)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    most = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 0.5
    if args.symmetric:
        return torch.maximum(-low, high).div(most).reshape(-1 if size is None else rows, parts.shape[1]), None
    scale = (high - low) / (2**args.num_bits - 1)
    zero = (-(2 ** (args.num_bits - 1)) - low / scale).round().clamp(-(2 ** (args.num_bits - 1)), -low.min() * 0 + 127)
    return scale, zero.clamp(max=2 ** (args.num_bits - 1) - 1).to(torch.int8)


FAMILIES = [family for family in MAKERS if family not in ("gated DeltaNet", "RWKV-7", "Mamba-3")]
"""Those that transformers has."""


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitsandbytes_in_every_family(family, options, tmp_path):
    """Its plain arithmetic, since its CPU kernel misreads rows that are no multiple of a block."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    base = write(tmp_path / "base", *files_of(family))
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    tensors, plain = load_file(tmp_path / "packed" / "model.safetensors"), {}
    for name, value in tensors.items():
        parts = {f"weight{k.removeprefix(name)}": v for k, v in tensors.items() if k.startswith(f"{name}.")}
        if value.dtype == torch.int8:
            plain[name] = bnb.int8_vectorwise_dequant(value, tensors[f"{name.removesuffix('weight')}SCB"])
        elif parts and value.dtype == torch.uint8:
            state = bnb.QuantState.from_dict(parts, device="cpu")
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            args = (value.flatten(), absmax, state.code, state.blocksize, state.shape, torch.float32)
            plain[name] = _dequantize_4bit_compute(*args)
        elif ".weight." not in name and not name.endswith((".SCB", ".weight_format")):
            plain[name] = value
    assert sum(tensors[name].dtype in (torch.int8, torch.uint8) for name in plain) > 3
    expected = load_model(write(tmp_path / "plain", files_of(family)[0], plain)).state_dict()
    for name, value in load_model(tmp_path / "packed").state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("scheme", ["packed, 8 bits by rows", "int8, zeros", "float8 by rows"])
@pytest.mark.parametrize("family", MAKERS)
def test_compressed_tensors_in_every_family(family, scheme, tmp_path):
    """Every linear layer by its compressor; logits are those of what it decompresses to."""
    compressor = Compressor(scheme)
    config, weights = files_of(family)
    tensors, plain = dict(weights), dict(weights)
    for module in linears(weights):
        made, meant = compressor(tensors.pop(f"{module}.weight").float())
        tensors |= {f"{module}.{part}": t for part, t in made.items()}
        plain[f"{module}.weight"] = meant.float()
    packed = load_model(write(tmp_path / "packed", config | compressor.config, tensors), dtype="float64")
    expected = load_model(write(tmp_path / "plain", config, plain), dtype="float64")
    tokens = torch.arange(11)[None]
    found, meant = packed(tokens), expected(tokens)
    assert float((found - meant).abs().max()) < 1e-5 * float(meant.abs().max())
