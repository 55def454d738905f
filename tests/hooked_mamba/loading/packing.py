"""Quantised weights written from the descriptions of their formats, entry by entry, and the numbers they stand for.

Each writer takes a module's name and its weight, and gives (tensors of the file, the weight that they stand for), or
None where the format cannot hold such a shape: libraries leave those layers as they are. Nothing of the package is
used. Sources:

    bitsandbytes        functional.py and backends/default/ops.py of the library (0.50)
    GPTQ                qlinear_cuda_old.py `pack` of AutoGPTQ 0.7; checkpoint_format of GPTQModel
    AWQ                 awq/modules/linear/gemm.py `WQLinear_GEMM.from_linear` of AutoAWQ 0.2
    compressed-tensors  compressors/pack_quantized and naive_quantized of the library (0.20)
    fp8                 integrations/finegrained_fp8.py of transformers 5.23; ModelOpt's FP8 has one scale
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor] | None

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Normal quantiles (arXiv:2305.14314, appendix E)."""
FP4 = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = [*FP4, *(-value for value in FP4)]


def signed_word(value: int) -> int:
    """A word of 32 bits as the int32 that has them."""
    return value - 2**32 if value >= 2**31 else value


def words(numbers: list[int], bits: int, order: list[int] | None = None) -> list[int]:
    """Small numbers in words of 32 bits, lowest first; `order`: number of a word -> which one stands there."""
    per = 32 // bits
    order = order or list(range(per))
    out = []
    for start in range(0, len(numbers), per):
        part = numbers[start : start + per]
        part += [0] * (per - len(part))
        out.append(signed_word(sum(part[order[i]] << (bits * i) for i in range(per))))
    return out


def nearest(value: float, codes: list[float]) -> int:
    return min(range(len(codes)), key=lambda c: abs(codes[c] - value))


def bnb4(module: str, weight: Tensor, kind: str = "nf4", nested: bool = False, block: int = 64) -> Written:
    codes = NF4 if kind == "nf4" else FP4
    flat = weight.flatten().tolist()
    blocks = [flat[i : i + block] for i in range(0, len(flat), block)]
    absmax = [max(map(abs, part)) or 1.0 for part in blocks]
    name, extra, about = f"{module}.weight", {}, {"quant_type": kind, "blocksize": block, "dtype": "float32"}
    about["shape"] = list(weight.shape)
    if nested:  # the scales themselves: their mean apart, the rest in codes of 8 bits with a scale for each 256
        offset = sum(absmax) / len(absmax)
        table = [i / 127 - 128 / 127 for i in range(256)]
        outer = max(abs(a - offset) for a in absmax) or 1.0
        chosen = [nearest((a - offset) / outer, table) for a in absmax]
        absmax = [table[c] * outer + offset for c in chosen]
        extra = {f"{name}.nested_absmax": torch.tensor([outer] * math.ceil(len(chosen) / 256))}
        extra |= {f"{name}.nested_quant_map": torch.tensor(table), f"{name}.absmax": torch.tensor(chosen).byte()}
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        extra = {f"{name}.absmax": torch.tensor(absmax)}
    found = [nearest(v / a, codes) for part, a in zip(blocks, absmax, strict=True) for v in part]
    pairs = [*found, 0] if len(found) % 2 else found
    packed = [16 * pairs[i] + pairs[i + 1] for i in range(0, len(pairs), 2)]
    tensors = {name: torch.tensor(packed, dtype=torch.uint8).view(-1, 1), f"{name}.quant_map": torch.tensor(codes)}
    text = json.dumps(about).encode()
    tensors |= extra | {f"{name}.quant_state.bitsandbytes__{kind}": torch.tensor(list(text), dtype=torch.uint8)}
    numbers = [codes[c] * absmax[n // block] for n, c in enumerate(found)]
    return tensors, torch.tensor(numbers, dtype=torch.float64).reshape(weight.shape)


def bnb8(module: str, weight: Tensor) -> Written:
    rows = weight.tolist()
    scales = [max(map(abs, row)) or 1.0 for row in rows]
    q = [[round(127 * v / s) for v in row] for row, s in zip(rows, scales, strict=True)]
    tensors = {f"{module}.weight": torch.tensor(q, dtype=torch.int8), f"{module}.SCB": torch.tensor(scales)}
    tensors[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    scales = tensors[f"{module}.SCB"].tolist()
    numbers = [[v * s / 127 for v in row] for row, s in zip(q, scales, strict=True)]
    return tensors, torch.tensor(numbers, dtype=torch.float64)


def affine(values: list[float], bits: int, symmetric: bool) -> tuple[list[int], float, int]:
    """Unsigned codes, a float16 scale and a zero: v ~ scale (q - zero)."""
    top = 2**bits - 1
    low, high = min(*values, 0.0), max(*values, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = float(torch.tensor((high - low) / top or 1.0).half())
    zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 1), top)
    return [min(max(round(v / scale) + zero, 0), top) for v in values], scale, zero


def grouped(weight: Tensor, bits: int, groups: list[int], symmetric: bool) -> tuple[Any, Any, Any, Tensor]:
    """q[o][i], scale[g][o], zero[g][o] for inputs in groups, and the numbers."""
    out, into = weight.shape
    count = max(groups) + 1
    q = [[0] * into for _ in range(out)]
    scales, zeros = [[0.0] * out for _ in range(count)], [[0] * out for _ in range(count)]
    numbers = torch.zeros(out, into, dtype=torch.float64)
    for o in range(out):
        for g in range(count):
            inputs = [i for i in range(into) if groups[i] == g]
            codes, scale, zero = affine([float(weight[o, i]) for i in inputs], bits, symmetric)
            scales[g][o], zeros[g][o] = scale, zero
            for i, code in zip(inputs, codes, strict=True):
                q[o][i], numbers[o, i] = code, scale * (code - zero)
    return q, scales, zeros, numbers


def gptq(
    module: str, weight: Tensor, bits: int = 4, group: int = 16, act_order: bool = False, v2: bool = False,
    symmetric: bool = False,
) -> Written:  # fmt: skip
    out, into = weight.shape
    if into % (32 // bits) or out % (32 // bits) or into % group:
        return None
    groups = [i // group for i in range(into)]
    if act_order:
        groups = [groups[(7 * i + 3) % into] for i in range(into)] if into % 7 else groups[::-1]
    q, scales, zeros, numbers = grouped(weight, bits, groups, symmetric)
    columns = [words([q[o][i] for i in range(into)], bits) for o in range(out)]
    tensors = {
        f"{module}.qweight": torch.tensor(columns, dtype=torch.int32).t(),
        f"{module}.qzeros": torch.tensor(
            [words([z - (not v2) for z in row], bits) for row in zeros], dtype=torch.int32
        ),
        f"{module}.scales": torch.tensor(scales).half(),
        f"{module}.g_idx": torch.tensor(groups, dtype=torch.int32),
    }
    return tensors, numbers


def awq(module: str, weight: Tensor, group: int = 16) -> Written:
    out, into = weight.shape
    if out % 8 or into % group:
        return None
    q, scales, zeros, numbers = grouped(weight, 4, [i // group for i in range(into)], False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rows = [words([q[o][i] for o in range(out)], 4, order) for i in range(into)]
    tensors = {
        f"{module}.qweight": torch.tensor(rows, dtype=torch.int32),
        f"{module}.qzeros": torch.tensor([words(row, 4, order) for row in zeros], dtype=torch.int32),
        f"{module}.scales": torch.tensor(scales).half(),
    }
    return tensors, numbers


def compressed_packed(
    module: str, weight: Tensor, bits: int = 4, group: int | None = 16, symmetric: bool = True
) -> Written:
    out, into = weight.shape
    if group is not None and into % group:
        return None
    groups = [i // (group or into) for i in range(into)]
    q, scales, zeros, numbers = grouped(weight, bits, groups, symmetric)
    tensors = {
        f"{module}.weight_packed": torch.tensor([words(row, bits) for row in q], dtype=torch.int32),
        f"{module}.weight_scale": torch.tensor(scales).t().half(),
        f"{module}.weight_shape": torch.tensor([out, into]),
    }
    if not symmetric:
        packed = [words([zeros[g][o] for o in range(out)], bits) for g in range(len(zeros))]
        tensors[f"{module}.weight_zero_point"] = torch.tensor(packed, dtype=torch.int32).t()
    return tensors, numbers


def compressed_int8(module: str, weight: Tensor) -> Written:
    rows = weight.tolist()
    scales = [float(torch.tensor(max(map(abs, row)) / 127 or 1.0).half()) for row in rows]
    q = [[max(min(round(v / s), 127), -128) for v in row] for row, s in zip(rows, scales, strict=True)]
    numbers = [[v * s for v in row] for row, s in zip(q, scales, strict=True)]
    tensors = {f"{module}.weight": torch.tensor(q, dtype=torch.int8)}
    tensors[f"{module}.weight_scale"] = torch.tensor(scales).half().view(-1, 1)
    return tensors, torch.tensor(numbers, dtype=torch.float64)


def float8(
    module: str, weight: Tensor, block: tuple[int, int] | str = (16, 16), scale: str = "weight_scale_inv"
) -> Written:
    """float8 with scales of blocks, of rows ("row") or of all ("one")."""
    out, into = weight.shape
    high, wide = {"row": (1, into), "one": (out, into)}.get(block) if isinstance(block, str) else block  # type: ignore
    numbers, codes = torch.zeros(out, into, dtype=torch.float64), torch.zeros(out, into)
    scales = torch.zeros(math.ceil(out / high), math.ceil(into / wide))
    for a in range(scales.shape[0]):
        for b in range(scales.shape[1]):
            at = slice(a * high, (a + 1) * high), slice(b * wide, (b + 1) * wide)
            scales[a, b] = weight[at].abs().max().clamp(min=1e-12) / 448
            codes[at] = weight[at] / scales[a, b]
            numbers[at] = codes[at].to(torch.float8_e4m3fn).double() * float(scales[a, b])
    tensors = {f"{module}.weight": codes.to(torch.float8_e4m3fn)}
    tensors[f"{module}.{scale}"] = scales.reshape(()) if block == "one" else scales
    return tensors, numbers


BNB = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0}
CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}


def _ct(form: str, bits: int, kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    about = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | weights
    return CT | {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": about}}}


WAYS: dict[str, tuple[Callable[[str, Tensor], Written], dict[str, Any]]] = {
    "bitsandbytes 8-bit": (bnb8, BNB | {"load_in_8bit": True}),
    "bitsandbytes 4-bit": (bnb4, BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (compressed_packed, _ct("pack-quantized", 4, "int", "group", group_size=16)),
    "fp8": (float8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}),
}
"""Row of the table in docs/loading.md -> a writer, and the quantization_config beside it."""

VARIANTS: dict[str, tuple[Callable[[str, Tensor], Written], dict[str, Any]]] = {
    "nf4, double": (lambda m, w: bnb4(m, w, nested=True), BNB | {"bnb_4bit_use_double_quant": True}),
    "fp4": (lambda m, w: bnb4(m, w, "fp4"), BNB | {"bnb_4bit_quant_type": "fp4"}),
    "fp4, double, blocks of 128": (lambda m, w: bnb4(m, w, "fp4", True, 128), BNB),
    "gptq in order of activation": (lambda m, w: gptq(m, w, act_order=True), WAYS["GPTQ"][1] | {"desc_act": True}),
    "gptq, version 2": (lambda m, w: gptq(m, w, v2=True), WAYS["GPTQ"][1] | {"checkpoint_format": "gptq_v2"}),
    "gptq, 8 bits": (lambda m, w: gptq(m, w, 8), WAYS["GPTQ"][1] | {"bits": 8}),
    "gptq, 2 bits, symmetric": (lambda m, w: gptq(m, w, 2, symmetric=True), WAYS["GPTQ"][1] | {"bits": 2}),
    "packed, 8 bits by rows": (
        lambda m, w: compressed_packed(m, w, 8, None),
        _ct("pack-quantized", 8, "int", "channel"),
    ),
    "packed, 4 bits with zeros": (
        lambda m, w: compressed_packed(m, w, symmetric=False),
        _ct("pack-quantized", 4, "int", "group", group_size=16, symmetric=False),
    ),
    "int8 by rows": (compressed_int8, _ct("int-quantized", 8, "int", "channel")),
    "float8 by rows": (
        lambda m, w: float8(m, w, "row", "weight_scale"),
        _ct("float-quantized", 8, "float", "channel"),
    ),
    "float8 by blocks": (
        lambda m, w: float8(m, w, (16, 16), "weight_scale"),
        _ct("float-quantized", 8, "float", "block", block_structure=[16, 16]),
    ),
    "fbgemm": (lambda m, w: float8(m, w, "row", "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "modelopt": (lambda m, w: float8(m, w, "one", "weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8, one scale": (
        lambda m, w: float8(m, w, "one"),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "fp8, blocks that do not divide": (
        lambda m, w: float8(m, w, (24, 20)),
        WAYS["fp8"][1] | {"weight_block_size": [24, 20]},
    ),
}
"""More of each method."""


def quantise(
    way: tuple[Callable[[str, Tensor], Written], dict[str, Any]],
    config: dict[str, Any],
    weights: dict[str, Tensor],
    modules: list[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], int]:
    """(config, tensors of the quantised file, the weights they stand for, how many modules are packed)."""
    write, settings = way
    packed, plain, count = dict(weights), dict(weights), 0
    for module in modules:
        made = write(module, weights[f"{module}.weight"])
        if made is not None:
            del packed[f"{module}.weight"]
            packed |= made[0]
            plain[f"{module}.weight"] = made[1]
            count += 1
    return config | {"quantization_config": settings}, packed, plain, count
