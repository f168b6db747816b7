"""The states of AdamW, Muon and Lion as integers of 8 or 4 bits: train.py --optimizer_bits=8 (Dettmers et al. 2021,
2110.02861; Li et al. 2023, 2309.01507).

    opt = PackedAdam(1e-3, 8, betas=[0.9, 0.95], bias_correction=True)    # as mlx.optimizers.Adam
    opt = PackedMuon(0.05, 8)                                             # as muon.Muon
    opt = PackedLion(1e-4, 8, betas=[0.9, 0.95])                          # as mlx.optimizers.Lion

Adam keeps two float32 numbers for each parameter, the mean m of its gradients and that of their squares v; Muon and
Lion keep one mean. Here a state is  scale x table[code]:  a code of 8 or 4 bits a number, and a scale for many numbers.
A step unpacks an array's states, updates them in float32, and packs them again with the nearest values of the table.

    bits   numbers a scale           table of m                      table of v
    8      256                       dynamic, signed                 dynamic, unsigned
    4      m 128; v: a row and a     dynamic, signed                 1/16, 2/16, ..., 1: without 0, as an update
           column (rank 1)                                           divides by the root of v

Half of the dynamic codes are for numbers over a tenth of the largest one, a quarter for those over a hundredth, and so
on. Arrays of fewer than SMALL numbers keep float32. Rounding is to the nearest value and draws no random numbers: a
resumed run continues bit for bit. Deleting this file costs --optimizer_bits and nothing else.
"""
import functools
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from muon import Muon

SMALL = 4096  # numbers of an array
BLOCK = {8: 256, 4: 128}  # numbers with a scale of their own

# ---- codes -----------------------------------------------------------------------------------------------------------


@functools.cache
def dynamic_table(bits: int, signed: bool) -> np.ndarray:
    """The values of "dynamic tree" codes, in order: 0, 1, and between 10^-k and 10^(-k-1) the middles of equal parts,
    half as many for each k as for the one before (2110.02861, section 1.3): (2^bits,) float32."""
    found = [0.0, 1.0]
    for k in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (bits - 2 - k + (not signed)) + 1)
        middles = 10.0 ** -k * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *(-middles if signed else ())]
    return np.sort(np.float32(found))


@functools.cache
def linear_table(bits: int) -> np.ndarray:
    return np.arange(1, 2 ** bits + 1, dtype=np.float32) / 2 ** bits


def table_of(bits: int, signed: bool) -> np.ndarray:
    return dynamic_table(bits, signed) if signed or bits == 8 else linear_table(bits)


def encode(x: mx.array, table: np.ndarray) -> mx.array:
    """The place of the nearest value of a table with 2^bits values, in order: a binary search among their middles."""
    middles, code, half = mx.array((table[1:] + table[:-1]) / 2), mx.zeros(x.shape, mx.uint8), len(table) // 2
    while half:
        code = code + half * (x > middles[code + (half - 1)]).astype(mx.uint8)
        half //= 2
    return code


# ---- packed arrays ---------------------------------------------------------------------------------------------------


def pack(x: mx.array, bits: int, signed: bool) -> dict[str, mx.array]:
    """Codes, and one scale a block; or for an unsigned array of 4 bits and two axes or more, the largest number along
    each axis: the smallest of those that meet at a number is its scale (rank 1, 2309.01507, section 4.2)."""
    if bits == 4 and not signed and x.ndim > 1:
        tops = {f"top{axis}": x.max([i for i in range(x.ndim) if i != axis], keepdims=True) for axis in range(x.ndim)}
        rows, scale = x, functools.reduce(mx.minimum, tops.values())
    else:
        rows = mx.pad(x.reshape(-1), (0, -x.size % BLOCK[bits])).reshape(-1, BLOCK[bits])
        scale = mx.abs(rows).max(axis=1, keepdims=True)
        tops = {"scale": scale}
    codes = encode(rows / mx.maximum(scale, 1e-30), table_of(bits, signed))
    if bits == 4:  # two in a byte
        codes = mx.pad(codes.reshape(-1), (0, codes.size % 2))
        codes = codes[0::2] | (codes[1::2] << 4)
    return {"codes": codes, **tops}


def unpack(state: dict[str, mx.array], bits: int, signed: bool, shape: tuple) -> mx.array:
    """The float32 array of this shape."""
    codes, tops = state["codes"], [part for name, part in state.items() if name != "codes"]
    if bits == 4:
        codes = mx.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    size = int(np.prod(shape))
    if "scale" in state:
        codes = codes.reshape(-1, BLOCK[bits])
    else:
        codes = codes[:size].reshape(shape)
    values = mx.array(table_of(bits, signed))[codes] * functools.reduce(mx.minimum, tops)
    return values.reshape(-1)[:size].reshape(shape)


def pack_all(state: dict, bits: int, signed: dict[str, bool]) -> dict:
    """The state of one parameter, packed if it is not small. signed: of each of its parts."""
    return {name: pack(part, bits, signed[name]) if part.size >= SMALL else part for name, part in state.items()}


def unpack_all(state: dict, bits: int, signed: dict[str, bool], shape: tuple) -> dict:
    return {name: unpack(part, bits, signed[name], shape) if isinstance(part, dict) else part
            for name, part in state.items()}


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Packed:
    """What follows shares this: an optimizer that packs each parameter's state as it begins."""

    def __init__(self, learning_rate: float, bits: int, **others):
        super().__init__(learning_rate, **others)
        self.bits = bits

    def init_single(self, parameter: mx.array, state: dict):
        super().init_single(parameter, state)
        state.update(pack_all(state, self.bits, self.SIGNED))


class PackedSingle(Packed):
    """One whose update of an array needs no other array."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        whole = unpack_all(state, self.bits, self.SIGNED, parameter.shape)
        updated = super().apply_single(gradient, parameter, whole)
        state.update(pack_all(whole, self.bits, self.SIGNED))
        return updated


class PackedAdam(PackedSingle, optim.Adam):
    SIGNED = {"m": True, "v": False}


class PackedLion(PackedSingle, optim.Lion):
    SIGNED = {"m": True}


class PackedMuon(Packed, Muon):
    SIGNED = {"v": True}

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        if not self._initialized:
            self.init(gradients)
        bits, signed = self.bits, self.SIGNED
        self.state.update(tree_map(lambda g, state: unpack_all(state, bits, signed, g.shape), gradients, self.state))
        updated = super().apply_gradients(gradients, parameters)
        self.state.update(tree_map(lambda g, state: pack_all(state, bits, signed), gradients, self.state))
        return updated


if __name__ == "__main__":
    print("packed_states.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
