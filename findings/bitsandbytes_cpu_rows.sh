#!/usr/bin/env bash
# bitsandbytes on a CPU with AVX-512: 4-bit weights whose rows are no multiple of the block size come back wrong.
#
# A 4-bit weight is a row of codes with one scale for each block of 64, counted through the whole matrix, so a block
# may begin in one row and end in the next. The library's CPU kernel reads the scales row by row instead. Where a row
# has 192 numbers all is well; where it has 48 (dt_proj of mamba-130m), 96 or 160 (dt_proj of mamba-2.8b) more than
# half of the weight is off by as much as the weights are large, in float32 and bfloat16, without a word. The
# library's own plain implementation, and the two lines of arithmetic below, give the right numbers from the same
# codes and scales: files are good, what such a CPU makes of them is not.
#
# Seen with torch 2.13.0 and bitsandbytes 0.50.2 on an AMD EPYC with AVX-512 (last digits vary), weights of std 1:
#     row     largest error: library, arithmetic   of its numbers wrong
#     48      1.9, 0.45                            80%
#     96      2, 0.45                              63%
#     160     2.2, 0.5                             63%
#     192     0.5, 0.5                             0%
#
# Exit status: 0 when the behaviour is as described, 1 when it has changed (or the CPU has no AVX-512).
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2

"$dir/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import bitsandbytes
import bitsandbytes.functional as F
import torch

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)


def by_arithmetic(packed, state):
    """code[n] of two to a byte, the high half first, times absmax[n / blocksize]."""
    count = state.shape.numel()
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()[:count]
    scales = state.absmax.repeat_interleave(state.blocksize)[:count]
    return (state.code[codes.int()] * scales).reshape(state.shape)


as_described = True
print("row     largest error: library, arithmetic   of its numbers wrong")
for row in (48, 96, 160, 192):
    torch.manual_seed(0)
    weight = torch.randn(128, row)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    library, plain = F.dequantize_4bit(packed, state), by_arithmetic(packed, state)
    off = float((library - weight).abs().max()), float((plain - weight).abs().max())
    wrong = float(((library - plain).abs() > 0.05).float().mean())
    print(f"{row:<7} {off[0]:.2g}, {off[1]:.2g}".ljust(45) + f"{wrong:.0%}")
    as_described &= off[1] < 0.8 and (wrong == 0 if row % 64 == 0 else wrong > 0.3 and off[0] > 1)
raise SystemExit(0 if as_described else "the behaviour has changed")
PY
