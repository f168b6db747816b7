"""CUDA kernels on a processor, for tests: what mx.fast.cuda_kernel makes on a GPU, g++ makes with cuda_on_cpu.h."""
import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import pytest
from conftest import ROOT

import matvec

compiles = pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("g++"),
                              reason="no g++, or not Linux")  # where g++ is and the kernels do not compile, tests fail
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float", mx.uint32: "uint32_t",
         mx.int32: "int32_t"}
KEPT = tempfile.TemporaryDirectory()  # until the process ends
FOLDER = Path(KEPT.name)


def library_of(code: str) -> ctypes.CDLL:
    """C++ source text that includes cuda_on_cpu.h, compiled and loaded, once for all tests of a process."""
    path = FOLDER / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.with_suffix(".cpp").write_text(code)
        subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'tests'}",
                        path.with_suffix(".cpp"), "-o", path], check=True)
    return ctypes.CDLL(str(path))


def cuda_kernel(name, input_names, output_names, source, header="", shared_memory=0):
    """As mx.fast.cuda_kernel(), for kernels without templates, whose arrays are row-contiguous."""

    def kernel(inputs, grid, threadgroup, output_shapes, output_dtypes):
        made = [mx.full(shape, 99, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        arrays = [*map(mx.contiguous, inputs), *made]
        mx.eval(arrays)
        kinds = ["const " * (i < len(inputs)) + TYPES[array.dtype] + "*" for i, array in enumerate(arrays)]
        arguments = "".join(f"{kind} {each} = ({kind})arguments[{i}];\n" for i, (kind, each) in
                            enumerate(zip(kinds, [*input_names, *output_names], strict=True)))
        code = f"""#include "cuda_on_cpu.h"
{header.replace("#include <cuda_", "// <cuda_")}
static void body(void* given) {{
  void** arguments = (void**)given;
  {arguments}
  {source}
}}
extern "C" void run(int blocks, int threads, void** arguments) {{
  launch(blocks, threads, {shared_memory}, body, arguments);
}}"""
        addresses = (ctypes.c_void_p * len(arrays))(*map(matvec.address, arrays))
        library_of(code).run(grid[0] // threadgroup[0], threadgroup[0], addresses)
        return made

    return kernel
