"""Sixteen float32 numbers as one numba value, so that a kernel's inner loop is vector code by construction.

Loops over arrays are vectorised by LLVM only if it can prove that the arrays do not overlap, which it gives up on
when there are many of them. Values of the type `f32x16` are LLVM vectors: one AVX-512 register, two of AVX2, four of
SSE or NEON.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)

# 2^r on [-1/2, 1/2], minimax polynomial, highest power first; relative error about 1e-8 in exact arithmetic.
_EXP2 = (
    1.5403530393381609954e-4,
    1.3333558146428443423e-3,
    9.6181291076284771619e-3,
    5.5504108664821579953e-2,
    2.4022650695910071233e-1,
    6.9314718055994530942e-1,
    1.0,
)
_LOG2E = 1.44269504088896340736


class _F32x16(types.Type):
    def __init__(self):
        super().__init__(name="f32x16")


f32x16 = _F32x16()


@register_model(_F32x16)
class _F32x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _FLOATS)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), value)] * LANES)


def _int_constant(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(ir.IntType(32), value)] * LANES)


def _llvm(builder, name, *args):
    """Call LLVM's vector intrinsic of that name."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, args)


def _pointer(context, builder, array_type, array, offset):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _FLOATS.as_pointer())


@intrinsic
def load(typingctx, array, offset):
    """The 16 numbers at array.ravel()[offset:], of a contiguous float32 array."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=4)

    return f32x16(array, types.intp), codegen


@intrinsic
def store(typingctx, array, offset, value):
    """Write 16 numbers to array.ravel()[offset:]."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line of array.ravel()[offset], which need not lie inside the array."""

    def codegen(context, builder, signature, args):
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], *args), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, ir.Constant(number, 0), ir.Constant(number, 3), ir.Constant(number, 1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def splat(typingctx, number):
    """One number in all lanes."""

    def codegen(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _int_constant(0))

    return f32x16(types.float32), codegen


@intrinsic
def broadcast(typingctx, array, offset):
    """The number array.ravel()[offset] in all lanes; offsets are not counted from the end, which would cost a test."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        number = builder.load(builder.gep(data, [args[1]]))
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _int_constant(0))

    return f32x16(array, types.intp), codegen


@intrinsic
def mul(typingctx, a, b):
    """a b"""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a b + c, rounded once where the processor can."""

    def codegen(context, builder, signature, args):
        return _llvm(builder, "fmuladd", *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


@intrinsic
def add(typingctx, a, b):
    """a + b"""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def div(typingctx, a, b):
    """a / b"""

    def codegen(context, builder, signature, args):
        return builder.fdiv(*args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def positive(typingctx, a):
    """a where it is positive (or not a number), else 0."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(0.0)), _constant(0.0), args[0])

    return f32x16(f32x16), codegen


@intrinsic
def minus_abs(typingctx, a):
    """-|a|"""

    def codegen(context, builder, signature, args):
        return builder.fsub(_constant(-0.0), _llvm(builder, "fabs", args[0]))

    return f32x16(f32x16), codegen


@intrinsic
def total(typingctx, a):
    """Sum over the lanes, halves onto halves."""

    def codegen(context, builder, signature, args):
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            lanes = ir.Constant(_INTS, [(i + width) % LANES for i in range(LANES)])
            value = builder.fadd(value, builder.shuffle_vector(value, value, lanes))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(f32x16), codegen


@intrinsic
def transpose(typingctx, source, start, stride, target, target_start, target_stride):
    """Copy a block of 16 rows of 16 numbers, `stride` apart, transposed to rows `target_stride` apart."""

    def codegen(context, builder, signature, args):
        def row(which, i):
            array, first, step = args[which : which + 3]
            offset = builder.add(first, builder.mul(step, ir.Constant(step.type, i)))
            return _pointer(context, builder, signature.args[which], array, offset)

        rows = [builder.load(row(0, i), align=4) for i in range(LANES)]
        # Exchange the off-diagonal quarters of ever smaller squares.
        half = LANES // 2
        while half:
            for i in (i for i in range(LANES) if not i & half):
                upper = [j + LANES - half if j & half else j for j in range(LANES)]
                lower = [j + LANES if j & half else j + half for j in range(LANES)]
                pair = rows[i], rows[i + half]
                rows[i], rows[i + half] = (
                    builder.shuffle_vector(*pair, ir.Constant(_INTS, lanes)) for lanes in (upper, lower)
                )
            half //= 2
        for i, value in enumerate(rows):
            builder.store(value, row(3, i), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


def _held(builder, a, low, high):
    """a inside [low, high]; low where a is not a number."""
    low, high = _constant(low), _constant(high)
    a = builder.select(builder.fcmp_ordered(">", a, low), a, low)
    return builder.select(builder.fcmp_ordered("<", a, high), a, high)


def _polynomial(builder, rest):
    """2^rest, rest within [-1/2, 1/2]."""
    value = _constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        value = _llvm(builder, "fmuladd", value, rest, _constant(coefficient))
    return value


def _power_of_two(builder, whole, rest):
    """2^(whole + rest), rest within [-1/2, 1/2]."""
    value = _polynomial(builder, rest)
    # Times 2^whole: add to the exponent's bits.
    exponent = builder.shl(builder.fptosi(whole, _INTS), _int_constant(23))
    return builder.bitcast(builder.add(builder.bitcast(value, _INTS), exponent), _FLOATS)


def _has_avx512() -> bool:
    """Whether numba compiles for this very processor, and it has AVX-512."""
    settings: Any = numba.config  # its attributes are made when it is imported
    chosen = settings.CPU_NAME or settings.CPU_FEATURES
    return not chosen and bool(llvm.get_host_cpu_features().get("avx512f"))


def _scaled(builder, a, whole):
    """a 2^whole, down to denormal numbers and up to infinity, in one instruction of AVX-512."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3 + [ir.IntType(16), ir.IntType(32)])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.scalef.ps.512")
    all_lanes, current_rounding = ir.Constant(ir.IntType(16), -1), ir.Constant(ir.IntType(32), 4)
    return builder.call(function, [a, whole, a, all_lanes, current_rounding])


@intrinsic
def exp2(typingctx, a):
    """2^a to about 1e-7, and 2^0 is 1 exactly; below 2^-126 it may be 2^-126, above 2^127 it may be 2^127."""

    def codegen(context, builder, signature, args):
        if _has_avx512():
            low = _constant(-160.0)  # infinity less itself would be no number
            a = builder.select(builder.fcmp_ordered(">", args[0], low), args[0], low)
            whole = _llvm(builder, "nearbyint", a)
            return _scaled(builder, _polynomial(builder, builder.fsub(a, whole)), whole)
        a = _held(builder, args[0], -126.0, 127.0)
        whole = _llvm(builder, "nearbyint", a)
        return _power_of_two(builder, whole, builder.fsub(a, whole))

    return f32x16(f32x16), codegen


@intrinsic
def exp(typingctx, a):
    """e^a to about 1e-7 wherever a lies in [-87, 88], where it is first held.

    exp2(a log2 e) errs by |a| roundings: here the whole powers of two are taken off with ln 2 in two parts, the
    first short enough for exact products (Cody & Waite 1980).
    """

    def codegen(context, builder, signature, args):
        a = _held(builder, args[0], -87.0, 88.0)
        whole = _llvm(builder, "nearbyint", builder.fmul(a, _constant(_LOG2E)))
        rest = _llvm(builder, "fmuladd", whole, _constant(-0.693359375), a)
        rest = _llvm(builder, "fmuladd", whole, _constant(2.12194440e-4), rest)
        return _power_of_two(builder, whole, builder.fmul(rest, _constant(_LOG2E)))

    return f32x16(f32x16), codegen
