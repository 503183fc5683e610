"""The SIMD instructions of the scan: one table look-up for 32 or 64 codes at once, written as LLVM IR.

**What is computed.** For one block of 64 codes and one query, ``bound_*`` return a 64-bit mask: a bit that is 0 says that this
lane's distance is certainly larger than the query's limit. In NumPy::

    total = np.zeros(64, np.uint8)
    for m in range(M):
        total = np.minimum(255, total.astype(int) + small[m][block[m]]).astype(np.uint8)
    mask = total != 255

``small`` is the query's distance table rounded *down* to bytes (``scan._quantise``), in units in which the limit is 254. A sum
of numbers that were rounded down is a lower bound of the distance; a lower bound of 255 or more exceeds the limit; so what the
mask leaves out can't be a neighbour, and only the few lanes that it keeps need their exact float32 distance.

**Why the sum may saturate.** Unsigned saturating addition gives min(255, a + b). Entries are not negative, so a total that has
reached 255 stays there, and a total below 255 never saturated: it is the true sum. One byte a lane is therefore enough, no
wider sums are needed, and one instruction (``vpaddusb``) adds a look-up to 32 or 64 lanes.

**How 64 codes look up a table at once.** The instructions that look up bytes know small tables only, in registers:

- ``vpshufb`` (AVX2): the low 4 bits of each of 32 bytes choose one of 16 table bytes; a byte whose bit 7 is set gives 0; bits
  4 to 6 are ignored. A table of 256 is 16 such tables T₀ … T₁₅, and code c wants table c >> 4. Bit 7 chooses between Tⱼ and
  Tⱼ₊₈ by the rule about zero, at the price of an "or": ``vpshufb(Tⱼ, c) | vpshufb(Tⱼ₊₈, c ^ 128)``. Bits 4, 5 and 6 choose
  among the remaining 8 by a tree of 7 ``vpblendvb``. In all 16 shuffles, 8 ors and 7 blends for 32 look-ups.
- ``vpermi2b`` (AVX-512 VBMI): the low 7 bits of each of 64 bytes choose one of 128 table bytes in two registers. Two of them
  and a blend by bit 7 look up 256 bytes; one ``vpermb`` serves a table of 64 or less.

The loops over M are loops in the IR; everything inside is straight-line code. Numba compiles these functions into the scan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from ..errors import InvalidParameterError

__all__ = ["LEVELS", "bound_avx2", "bound_vbmi", "requested_level", "supported_levels"]

BLOCK = 64

# From the best to the one that every machine has, with the CPU features that each needs.
LEVELS: dict[str, tuple[str, ...]] = {
    "vbmi": ("avx512f", "avx512bw", "avx512vbmi"),
    "avx2": ("avx2",),
    "generic": (),
}

_i8, _i32, _i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def supported_levels() -> list[str]:
    """The levels that compiled code can use here, the best first."""
    features = _features()
    return [level for level, needs in LEVELS.items() if all(features.get(name) for name in needs)]


def requested_level() -> str:
    """The level to use: the best that the CPU has, or the one that the environment variable HYPERFAISS_SIMD names.

    Raises InvalidParameterError for an unknown level and for one that this CPU lacks.
    """
    usable = supported_levels()
    wanted = os.environ.get("HYPERFAISS_SIMD", "").strip().lower()
    if not wanted:
        return usable[0]
    if wanted not in usable:
        known = "this CPU has" if wanted in LEVELS else "the levels are " + ", ".join(LEVELS) + "; this CPU has"
        raise InvalidParameterError(f"HYPERFAISS_SIMD={wanted!r} can't be used: {known} {', '.join(usable)}")
    return wanted


def _features() -> dict[str, bool]:
    """CPU features that Numba generates code for: the host's, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise."""
    settings: Any = config
    if settings.DISABLE_JIT:
        return {}
    if settings.CPU_FEATURES is not None:
        return {name[1:]: name[0] == "+" for name in settings.CPU_FEATURES.split(",") if name}
    if settings.CPU_NAME == "generic":
        return {}
    return dict(binding.get_host_cpu_features())


# ------------------------------------------------------------------------------------------------ the emitter


class _Emitter:
    """Vectors of ``width`` bytes over an IR builder: the dozen operations that the look-ups are made of."""

    def __init__(self, builder: ir.IRBuilder, width: int) -> None:
        self.builder = builder
        self.width = width
        self.vector = ir.VectorType(_i8, width)

    def splat(self, value: int) -> ir.Constant:
        """The vector that holds ``value`` in each lane."""
        return ir.Constant(self.vector, [value] * self.width)

    def load(self, address: ir.Value, offset: int, width: int | None = None) -> ir.Value:
        """``width`` bytes (a whole vector if not given) at ``address + offset``, which need not be aligned."""
        kind = self.vector if width is None else ir.VectorType(_i8, width)
        pointer = self.builder.inttoptr(self.builder.add(address, _i64(offset)), kind.as_pointer())
        value = self.builder.load(pointer)
        value.align = 1
        return value

    def repeat(self, few: ir.Value) -> ir.Value:
        """A short vector again and again, up to the full width."""
        count = few.type.count
        lanes = ir.Constant(ir.VectorType(_i32, self.width), [i % count for i in range(self.width)])
        return self.builder.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), lanes)

    def instruction(self, name: str, *operands: ir.Value) -> ir.Value:
        """The LLVM intrinsic ``name``, all of whose operands and whose result are whole vectors."""
        kind = ir.FunctionType(self.vector, [self.vector] * len(operands))
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, operands)

    def add_saturating(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """min(255, a + b) in each lane."""
        return self.instruction(f"llvm.uadd.sat.v{self.width}i8", a, b)

    def choose(self, bit: int, codes: ir.Value, if_set: ir.Value, if_clear: ir.Value) -> ir.Value:
        """In each lane, one of two bytes by a bit of the lane's code."""
        # Blends look at bit 7 of a byte, its sign, only: shift the wanted bit there. There are no shifts of bytes, but those of
        # 16 bits will do: what a byte gets from its neighbour comes in below.
        words = ir.VectorType(ir.IntType(16), self.width // 2)
        shift = ir.Constant(words, [7 - bit] * words.count)
        signed = self.builder.bitcast(self.builder.shl(self.builder.bitcast(codes, words), shift), self.vector)
        return self.builder.select(self.builder.icmp_signed("<", signed, self.splat(0)), if_set, if_clear)


def _lookup_avx2(emit: _Emitter, table: ir.Value, codes: ir.Value, ksub: int) -> ir.Value:
    """Bytes ``table[codes]`` of 32 lanes."""

    def shuffle(part: int, index: ir.Value) -> ir.Value:
        return emit.instruction("llvm.x86.avx2.pshuf.b", emit.repeat(emit.load(table, 16 * part, 16)), index)

    flipped = emit.builder.xor(codes, emit.splat(128))

    def tree(first: int, count: int) -> ir.Value:
        """Look up with the codes whose bits 4 to 6 lie in [first, first + count)."""
        if count > 1:
            low, high = tree(first, count // 2), tree(first + count // 2, count // 2)
            return emit.choose(3 + (count - 1).bit_length(), codes, high, low)
        if ksub <= 128:  # bit 7 is never set
            return shuffle(first, codes)
        return emit.builder.or_(shuffle(first, codes), shuffle(first + 8, flipped))

    return tree(0, min(ksub // 16, 8))


def _lookup_vbmi(emit: _Emitter, table: ir.Value, codes: ir.Value, ksub: int) -> ir.Value:
    """Bytes ``table[codes]`` of 64 lanes."""
    if ksub <= 64:
        entries = emit.repeat(emit.load(table, 0, ksub)) if ksub < 64 else emit.load(table, 0)
        return emit.instruction("llvm.x86.avx512.permvar.qi.512", entries, codes)

    def half(offset: int) -> ir.Value:
        return emit.instruction(
            "llvm.x86.avx512.vpermi2var.qi.512", emit.load(table, offset), codes, emit.load(table, offset + 64)
        )

    return half(0) if ksub == 128 else emit.choose(7, codes, half(128), half(0))


def _emit_bound(
    builder: ir.IRBuilder,
    width: int,
    lookup: Callable[[_Emitter, ir.Value, ir.Value, int], ir.Value],
    ksub: int,
    block: ir.Value,
    small: ir.Value,
    M: ir.Value,
) -> ir.Value:
    """The mask. ``block`` and ``small`` are addresses of M · 64 codes and of M · ksub bytes."""
    emit = _Emitter(builder, width)
    mask: ir.Value = _i64(0)
    # One loop over m for each vector of lanes: a loop for two would need more registers than there are.
    for lane in range(0, BLOCK, width):
        before, loop, after = builder.block, builder.append_basic_block("subspace"), builder.append_basic_block("mask")
        builder.branch(loop)

        builder.position_at_end(loop)
        m, total = builder.phi(_i64), builder.phi(emit.vector)
        codes = emit.load(builder.add(block, builder.mul(m, _i64(BLOCK))), lane)
        table = builder.add(small, builder.mul(m, _i64(ksub)))
        total_after = emit.add_saturating(total, lookup(emit, table, codes, ksub))
        m_after = builder.add(m, _i64(1))
        builder.cbranch(builder.icmp_signed("<", m_after, M), loop, after)
        for phi, start, following in ((m, _i64(0), m_after), (total, emit.splat(0), total_after)):
            phi.add_incoming(start, before)
            phi.add_incoming(following, loop)

        builder.position_at_end(after)
        kept = builder.bitcast(builder.icmp_unsigned("!=", total_after, emit.splat(255)), ir.IntType(width))
        wide = kept if width == BLOCK else builder.zext(kept, _i64)
        mask = builder.or_(mask, builder.shl(wide, _i64(lane)))
    return mask


def _bound(width: int, lookup: Callable[[_Emitter, ir.Value, ir.Value, int], ir.Value], ksub: int) -> Any:
    """The Numba function ``bound(block, small)`` of uint8 arrays (M, 64) and (M, ksub)."""

    @intrinsic
    def bound(_typing: Any, block: Any, small: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
            arrays = [
                context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True)
            ]
            block_address, small_address = (builder.ptrtoint(array.data, _i64) for array in arrays)
            M = builder.extract_value(arrays[0].shape, 0)
            return _emit_bound(builder, width, lookup, ksub, block_address, small_address, M)

        return types.uint64(block, small), generate

    return bound


SIZES = (16, 32, 64, 128, 256)  # ksub for nbits 4 … 8
bound_avx2 = {ksub: _bound(32, _lookup_avx2, ksub) for ksub in SIZES}
bound_vbmi = {ksub: _bound(64, _lookup_vbmi, ksub) for ksub in SIZES}


def _trailing_zeros(_typing: Any, _mask: Any) -> Any:
    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


def _trailing_zeros_without_jit(mask: Any) -> int:
    return (int(mask) & -int(mask)).bit_length() - 1


def _prefetch(_typing: Any, block: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        array = context.make_array(block)(context, builder, arguments[0])
        rows = builder.extract_value(array.shape, 0)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _i32, _i32, _i32])
        name = "llvm.prefetch.p0" if pointer.is_opaque else "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        with cgutils.for_range(builder, rows) as loop:
            line = builder.gep(array.data, [builder.mul(loop.index, _i64(BLOCK))])
            builder.call(function, [builder.bitcast(line, pointer), _i32(0), _i32(3), _i32(1)])  # to be read, soon, data
        return context.get_dummy_value()

    return types.void(block), generate


# Bring a block (M, 64), one cache line a row, nearer to the processor: a hint.
prefetch: Any = (lambda _block: None) if config.DISABLE_JIT else intrinsic(_prefetch)  # type: ignore[attr-defined]

# Number of the lowest bit that is set in a uint64 mask, which must not be 0.
trailing_zeros: Any = _trailing_zeros_without_jit if config.DISABLE_JIT else intrinsic(_trailing_zeros)  # type: ignore[attr-defined]
