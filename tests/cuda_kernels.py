"""CUDA kernels on a processor, for tests: what NVRTC compiles for a GPU, g++ compiles with cuda_on_cpu.h."""
import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

import gpu_kernels
import matvec

compiles = pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("g++"),
                              reason="no g++, or not Linux")  # where g++ is and the kernels do not compile, tests fail
SCALARS = {int: ctypes.c_int, float: ctypes.c_float}
KEPT = tempfile.TemporaryDirectory()  # until the process ends
FOLDER = Path(KEPT.name)


def library_of(code: str) -> ctypes.CDLL:
    """C++ source text that includes cuda_on_cpu.h, compiled and loaded, once for all tests of a process."""
    # Without -fno-gnu-unique, variables of templates would be shared by libraries in which they have other sizes.
    options = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-pthread", "-fno-gnu-unique"]
    header = FOLDER / "cuda_on_cpu.h"
    if not header.exists():  # compiled once for all kernels, which halves their time
        shutil.copy(ROOT / "tests" / header.name, header)
        subprocess.run([*options, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    path = FOLDER / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.with_suffix(".cpp").write_text(code)
        subprocess.run([*options, "-shared", f"-I{FOLDER}", path.with_suffix(".cpp"), "-o", path], check=True)
    return ctypes.CDLL(str(path))


def on_cpu(monkeypatch) -> list[str]:
    """gpu_kernels.py believes in a GPU with three multiprocessors, whose kernels g++ compiles. The names of those that
    have run."""
    ran = []

    def library(source: str, name: str, shared: int) -> ctypes.CDLL:
        parameters = re.search(rf"__launch_bounds__\([^)]*\)\s+{name}\(([^)]*)\) {{", source)[1].split(",")
        kinds = [parameter.replace("__restrict__", "").strip().rsplit(" ", 1)[0].strip() for parameter in parameters]
        given = ", ".join(f"({kind})given[{i}]" if "*" in kind else f"*({kind}*)given[{i}]"
                          for i, kind in enumerate(kinds))
        return library_of("\n".join([
            '#include "cuda_on_cpu.h"', source, "static void body(void* all) {",
            f"void** given = (void**)all; {name}({given}); }}",
            'extern "C" void launch_it(int blocks, int threads, void** given) {',
            f"launch(blocks, threads, {shared}, body, given); }}"]))

    def run(inputs, **given):
        @mx.custom_function
        def kernel(*inputs):
            return computed(inputs=inputs, **given)

        @kernel.vjp
        def refused(*_):  # as MLX does: a gradient must not reach a kernel, not even one of zeros
            raise ValueError(f"[Primitive::vjp] Not implemented for the kernel {given['name']}.")

        return [*kernel(*inputs)]

    def computed(name, compiled_source, inputs, output_shapes, output_dtypes, scalars, grid, threadgroup, shared_memory,
                 ensure_row_contiguous):
        assert ensure_row_contiguous and grid[0] % threadgroup[0] == 0
        assert all(x == ctypes.c_float(x).value for x in scalars if isinstance(x, float))  # MLX refuses others
        made = [mx.full(shape, 99 if dtype in (mx.uint32, mx.int32) else np.nan, dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        arrays = [*map(mx.contiguous, inputs), *made]
        mx.eval(arrays)
        values = [SCALARS[type(x)](x) for x in scalars]
        given = [*map(matvec.address, arrays), *map(ctypes.addressof, values)]
        library(compiled_source.decode(), name, shared_memory).launch_it(
            grid[0] // threadgroup[0], threadgroup[0], (ctypes.c_void_p * len(given))(*given))
        ran.append(name)
        return made

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run, raising=False)
    monkeypatch.setattr(gpu_kernels, "compiled", lambda source: source.encode())
    monkeypatch.setattr(gpu_kernels, "device", lambda: (3, 101_376, 8))
    return ran
