"""Products of a few rows with a packed weight on a CPU, for decoding: matvec.c, compiled when it is first needed.

MLX multiplies by a packed weight on one core, 1.5 billion weights a second; matvec.c does 7 to 15, on every core. It
is compiled by the C compiler of the machine, for this processor, and kept in the user's cache (~/.cache/tinygpt). Where
there is no compiler, or its result is wrong, MLX's own product is used. Deleting this file and matvec.c costs speed and
nothing else.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

import blas  # before mlx
import mlx.core as mx
import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
SOURCES = [path for name in ("matvec.c", "cpu_decode.c") if os.path.exists(path := os.path.join(FOLDER, name))]
OPTIONS = "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-fno-math-errno"  # errno: sqrtf() by one instruction
KINDS = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}  # as in matvec.c
ROWS = 64  # of x; for more it is faster to unpack the weight


class Layer(ctypes.Structure):  # as in matvec.c
    _fields_ = [("weight", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("biases", ctypes.c_void_p),
                ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("group", ctypes.c_int64),
                ("bits", ctypes.c_int), ("kind", ctypes.c_int)]


def address(array: mx.array | np.ndarray) -> int:
    """Where the numbers of an array begin in memory. It computes an array that is lazy. ValueError or TypeError if the
    array is a part of a computation that is being traced, or is not contiguous."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))


def _compiled(folder: str, sources: list[str]) -> str:
    """Compile the last of the sources, which includes the others, into a folder, unless it is there. The name tells the
    sources, the options and the processor."""
    if not sources:
        raise OSError("no sources")
    facts = " ".join(OPTIONS).encode()
    for source in sources:
        with open(source, "rb") as file:
            facts += file.read()
    with open("/proc/cpuinfo", "rb") as file:
        facts += next((line for line in file if line.lower().startswith((b"flags", b"features"))), b"")
    path = os.path.join(folder, f"matvec-{hashlib.sha256(facts).hexdigest()[:16]}.so")
    if not os.path.exists(path):
        compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
        if not compiler:
            raise OSError("no C compiler")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # renamed once whole: other processes see no part of it
            new = os.path.join(work, "matvec.so")
            subprocess.run([compiler, *OPTIONS, sources[-1], "-o", new, "-lm"], check=True, capture_output=True)
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    return path


def loaded(sources: list[str]) -> ctypes.PyDLL | None:
    """C sources, compiled and loaded; None where that is not possible."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        try:
            # Py: it keeps Python's lock, so that calls follow one another
            return ctypes.PyDLL(_compiled(blas.cache_folder(), sources))
        except OSError:  # the home folder is read-only, full, or mounted without permission to execute
            with tempfile.TemporaryDirectory() as folder:  # removed at once: a library that is loaded needs no file
                return ctypes.PyDLL(_compiled(folder, sources))
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def library() -> ctypes.PyDLL | None:
    """matvec.c (and cpu_decode.c), or None where that is not possible, or a product is wrong here."""
    try:
        found = loaded(SOURCES)
        return found if found and _is_right(found) else None
    except AttributeError:  # it holds no such function
        return None


def _is_right(found: ctypes.PyDLL) -> bool:
    """Whether the product is that of the unpacked weight, for a small one of 5 bits."""
    q, x = np.arange(4 * 64).reshape(4, 64) % 32, np.linspace(-1, 1, 64, dtype=np.float32)
    words = np.packbits((q[..., None] >> np.arange(5) & 1).reshape(4, -1), axis=1, bitorder="little")
    scales, biases = np.linspace(0, 1, 16, dtype=np.float16).reshape(2, 4, 2)
    y = np.empty(4, np.float32)
    layer = Layer(address(words), address(scales), address(biases), 4, 64, 32, 5, 1)
    failed = found.product(ctypes.byref(layer), ctypes.c_void_p(address(x)), ctypes.c_int64(1),
                           ctypes.c_void_p(address(y)), 1)
    weight = np.repeat(scales, 32, axis=1).astype(np.float32) * q + np.repeat(biases, 32, axis=1)
    return not failed and np.allclose(y, weight @ x, atol=1e-3)


@functools.cache
def threads() -> int:
    """As many as BLAS uses: OPENBLAS_NUM_THREADS, or one for each core."""
    given = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


def layer(weight: mx.array, scales: mx.array | None = None, biases: mx.array | None = None, group_size: int = 0,
          bits: int = 0) -> Layer | None:
    """A weight (out, in) as matvec.c sees it: packed, or dense (bits = 0). The arrays must outlive it. None where the
    dtype of the weight or its shape is another. TypeError, ValueError or RuntimeError: see address()."""
    kind, inputs = KINDS.get((weight if scales is None else scales).dtype), weight.shape[-1] * 32 // (bits or 32)
    if kind is None or inputs % 8 or bits and weight.dtype != mx.uint32:
        return None
    arrays = [0 if array is None else address(array) for array in (weight, scales, biases)]
    return Layer(*arrays, len(weight), inputs, group_size or inputs, bits, kind)


def product(x: mx.array, *weight) -> mx.array | None:
    """x (..., in) times the transpose of a weight (out, in), float32; the weight is what layer() takes. It is computed
    at once, not lazily. None where it cannot be: x is not float32 or is being traced, the machine has no compiler, or
    the weight is not as layer() wants it."""
    if x.dtype != mx.float32 or not library():
        return None
    try:
        made = layer(*weight)
        if made is None or made.inputs != x.shape[-1]:
            return None
        y = np.empty((*x.shape[:-1], made.outputs), np.float32)
        rows = x.size // made.inputs
        failed = library().product(ctypes.byref(made), ctypes.c_void_p(address(x)), ctypes.c_int64(rows),
                                   ctypes.c_void_p(y.ctypes.data), threads())
    except (TypeError, ValueError, RuntimeError):  # see address()
        return None
    return None if failed else mx.array(y)


if __name__ == "__main__":
    print("matvec.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
