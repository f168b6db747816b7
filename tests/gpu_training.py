"""For tests of gpu_train.py on a machine without a GPU: its kernels, compiled for the processor by cuda_on_cpu.h."""
import ctypes
import hashlib
import re
import subprocess

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from conftest import ROOT

import gpu_train
import matvec

SCALARS = {int: ctypes.c_int, float: ctypes.c_float}


def on_processor(monkeypatch, folder):
    """gpu_train.py believes in a GPU, whose kernels g++ compiles into a folder."""

    def library(source: str, name: str):
        arguments = []
        parameters = re.search(rf"__launch_bounds__\([^)]*\) {name}\(([^)]*)\) {{", source).group(1).split(",")
        for i, parameter in enumerate(parameters):
            kind = parameter.strip().replace("__restrict__", "").rsplit(" ", 1)[0].strip()
            arguments.append(f"({kind})given[{i}]" if "*" in kind else f"*({kind}*)given[{i}]")
        code = "\n".join(['#include "cuda_on_cpu.h"', source, "static void body(void* all) {",
                          f"void** given = (void**)all; {name}({', '.join(arguments)}); }}",
                          'extern "C" void launch_it(int blocks, int threads, void** given) {',
                          "launch(blocks, threads, 0, body, given); }"])
        path = folder / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            path.with_suffix(".cpp").write_text(code)
            subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'tests'}",
                            path.with_suffix(".cpp"), "-o", path], check=True)
        return ctypes.CDLL(str(path))

    def run(name, compiled_source, inputs, output_shapes, output_dtypes, scalars, grid, threadgroup,
            ensure_row_contiguous):
        assert ensure_row_contiguous and grid[0] % threadgroup[0] == 0
        made = [mx.full(shape, np.nan, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        arrays = [*(mx.contiguous(x) for x in inputs), *made]
        mx.eval(arrays)
        given = [*map(matvec.address, arrays)]
        kept = [SCALARS[type(x)](x) for x in scalars]
        given += [ctypes.addressof(x) for x in kept]
        library(compiled_source.decode(), name).launch_it(
            grid[0] // threadgroup[0], threadgroup[0], (ctypes.c_void_p * len(given))(*given))
        return made

    gpu_train.kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run, raising=False)
    monkeypatch.setattr(gpu_train, "compiled", lambda source: source.encode())
    monkeypatch.setattr(gpu_train, "usable", lambda x: x.dtype in gpu_train.TYPES)
    monkeypatch.setattr(gpu_train, "BLOCKS", 3)
