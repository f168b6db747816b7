"""Kernels for NVIDIA GPUs: what gpu_decode.py, gpu_sample.py, gpu_train.py and gpu_experts.py share.

A kernel is compiled by NVRTC, CUDA's compiler, which MLX has loaded, and kept in the user's cache (~/.cache/tinygpt),
so that it is compiled once for a machine. mx.fast.cuda_kernel would compile it in every process, with MLX's own
headers, which takes 3 s. Deleting this file and the others costs speed and nothing else.
"""
import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import blas
import mlx.core as mx

FOLDER = Path(__file__).parent
TYPES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float", mx.uint32: "unsigned", mx.int32: "int"}


@cache
def device() -> tuple[int, int, int]:
    """How many multiprocessors the GPU has, the bytes of shared memory that a thread block may have, and the major
    number of its compute capability. OSError where there is no driver, or no GPU."""
    number, found, driver = ctypes.c_int(), [], ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(number), 0)
    for attribute in (16, 97, 75):  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, ..._MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        value = ctypes.c_int()      # ..._COMPUTE_CAPABILITY_MAJOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number):
            raise OSError("no CUDA device")
        found.append(value.value)
    return tuple(found)


@cache
def library() -> ctypes.CDLL:
    """NVRTC. OSError where there is none."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("no NVRTC")


def source_of(*names: str) -> str:
    """The text of gpu_kernels.cuh and of other files beside this one. OSError where one is missing."""
    return "".join((FOLDER / each).read_text(encoding="utf-8") for each in ("gpu_kernels.cuh", *names))


def definitions(**constants: int | float | bool | tuple | mx.Dtype) -> str:
    """Constants of a kernel as source text: numbers, arrays of integers, types."""
    lines = ["struct bfloat16;", "struct float16;"]
    for name, value in constants.items():
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {TYPES[value]};")
        elif isinstance(value, tuple):
            lines.append(f"__device__ const int {name}[] = {{{', '.join(map(str, map(int, value)))}}};")
        else:
            lines.append(f"constexpr float {name} = {value!r}f;" if isinstance(value, float) else
                         f"constexpr int {name} = {int(value)};")
    return "\n".join([*lines, ""])


@cache
def compiled(source: str) -> bytes:
    """Machine code for this GPU. It is kept, and found again. OSError tells why there is none."""
    architecture, version = mx.device_info(mx.gpu)["architecture"], (ctypes.c_int(), ctypes.c_int())
    architecture += "a" * (int(architecture.removeprefix("sm_")) >= 90)  # with what this generation alone has
    library().nvrtcVersion(*map(ctypes.byref, version))
    facts = f"{architecture} {version[0].value}.{version[1].value}\n{source}"
    path = os.path.join(blas.cache_folder(), f"cuda-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.cubin")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    code = compiled_now(source, architecture)
    with contextlib.suppress(OSError):  # the home folder is read-only or full
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as work:  # renamed once it is whole
            new = os.path.join(work, "kernel.cubin")
            with open(new, "wb") as file:
                file.write(code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    return code


def compiled_now(source: str, architecture: str) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library().nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    try:
        if library().nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            library().nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library().nvrtcGetProgramLog(program, log)
            raise OSError(log.value.decode())
        library().nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library().nvrtcGetCUBIN(program, code)
    finally:
        library().nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def run(name: str, code: bytes, inputs: list, outputs: list, blocks: int, threads: int, scalars: tuple = (),
        shared: int = 0) -> list[mx.array]:
    """Run the function `name` of code in so many thread blocks. Its arguments are inputs, outputs, scalars. outputs:
    (shape, dtype) of each. shared: bytes of shared memory beside what the code declares."""
    shapes, dtypes = zip(*outputs, strict=True)
    # MLX refuses a float that float32 does not hold exactly, as 0.8
    scalars = [ctypes.c_float(x).value if isinstance(x, float) else x for x in scalars]
    return mx.fast.precompiled_cuda_kernel(
        name=name, compiled_source=code, inputs=inputs, output_shapes=shapes, output_dtypes=dtypes,
        scalars=scalars, grid=(blocks * threads, 1, 1), threadgroup=(threads, 1, 1), shared_memory=shared,
        ensure_row_contiguous=True)


if __name__ == "__main__":
    print("gpu_kernels.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
