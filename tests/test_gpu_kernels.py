"""gpu_kernels.py: every kernel compiles by CUDA's own compiler, which needs no GPU, and is kept in the cache."""
import ctypes
import glob
import os
import re
import site
import sys

import blas
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import gpu_decode
import gpu_experts
import gpu_kernels
import gpu_sample
import gpu_train
import model as core
from model import GPT, GPTConfig

GPT2 = dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False)
LLAMA = dict(n_kv_head=4, mlp="swiglu", qk_norm=True)
SIZES = dict(n_layer=2, n_head=12, n_embd=768, vocab_size=50304)


def nvrtc() -> ctypes.CDLL:
    """CUDA's compiler from the package nvidia-cuda-nvrtc."""
    for folder in (*site.getsitepackages(), site.getusersitepackages(), *sys.path):
        for path in glob.glob(f"{glob.escape(folder)}/nvidia/cu13/lib/libnvrtc.so.13"):
            for part in glob.glob(f"{glob.escape(os.path.dirname(path))}/libnvrtc-builtins.so.*"):
                ctypes.CDLL(part, ctypes.RTLD_GLOBAL)  # NVRTC looks for it by its name alone
            return ctypes.CDLL(path)
    pytest.skip("the package nvidia-cuda-nvrtc is not installed")


@pytest.fixture
def reports(monkeypatch) -> dict[str, str]:
    """gpu_kernels.py believes in an H100, for which NVRTC compiles; the kernels do not run. By source text: what the
    compiler says of each."""
    compiler, said = nvrtc(), {}

    class Verbose:
        def __getattr__(self, name):
            return getattr(compiler, name)

        def nvrtcCompileProgram(self, program, n, options):  # noqa: N802
            options, size = [*options, b"--ptxas-options=-v"], ctypes.c_size_t()
            failed = compiler.nvrtcCompileProgram(program, n + 1, (ctypes.c_char_p * (n + 1))(*options))
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            said[""] = log.value.decode()
            return failed

    def compiled(source: str) -> bytes:
        if source not in said:
            code = gpu_kernels.compiled_now(source, "sm_90a")
            said[source] = said.pop("")
            assert code[:4] == b"\x7fELF"
        return source.encode()

    def run(name, code, inputs, outputs, blocks, threads, scalars=(), shared=0):
        parameters = re.search(rf"__launch_bounds__\([^)]*\)\s+{name}\(([^)]*)\) {{", code.decode())[1].split(",")
        assert len(parameters) == len(inputs) + len(outputs) + len(scalars), name
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(gpu_kernels, "library", Verbose)
    monkeypatch.setattr(gpu_kernels, "compiled", compiled)
    monkeypatch.setattr(gpu_kernels, "run", run)
    monkeypatch.setattr(gpu_kernels, "device", lambda: (132, 232_448, 9))
    monkeypatch.setattr(core, "cpu_train", None)
    for module in (gpu_decode, gpu_sample, gpu_experts):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_train, "usable", lambda x: True)
    cached = (gpu_sample.kernel, gpu_train.kernel, gpu_experts.kernel, gpu_experts.functions, gpu_experts.usable)
    for each in cached:
        each.cache_clear()
    yield said
    for each in cached:
        each.cache_clear()


def check(reports: dict[str, str], least: int, spilled: int = 0):
    """So many kernels were compiled, and each has room in registers for all its numbers, but for so many bytes."""
    assert len(reports) >= least
    for source, report in reports.items():
        assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= spilled, source[-300:] + report


@pytest.mark.parametrize("settings, dtype, bits, rows", [
    (GPT2, mx.bfloat16, 0, 1), (LLAMA, mx.float16, 4, 16), (LLAMA, mx.float32, 0, 4)])
def test_decode(reports, settings, dtype, bits, rows):
    gpt = GPT(GPTConfig(**SIZES, **settings), seed=None)
    gpt.set_dtype(dtype)
    if bits:
        nn.quantize(gpt, 64, bits)
    gpt.eval()
    idx, cache = mx.zeros((rows, 3), mx.int32), gpt.make_cache()
    gpt(idx, cache=cache)
    assert gpu_decode.logits(gpt, idx[:, :1], cache) is not None
    check(reports, 1, spilled=512)


def test_sample(reports):
    for dtype in gpu_sample.TYPES:
        assert gpu_sample.draw(mx.zeros((2, 1000), dtype), mx.random.key(0), 0.8, 50, 0.1) is not None
    check(reports, 3)


@pytest.mark.parametrize("settings, dtype", [(GPT2, mx.bfloat16), (LLAMA, mx.float16),
                                             (dict(diff_attn=True, n_expert=4), mx.bfloat16)])
def test_train(reports, settings, dtype):
    gpt = GPT(GPTConfig(**SIZES, **settings)).train()
    gpt.compute_dtype, idx = dtype, mx.zeros((1, 64), mx.int32)
    opt = optim.Adam(1e-3, bias_correction=True)
    opt.init(gpt.trainable_parameters())
    _, gradients = nn.value_and_grad(gpt, gpt.loss)(idx, idx)
    assert gpu_train.adamw(gpt, opt, gradients, 1.0, 0.1) is not None
    check(reports, 14)


@pytest.mark.parametrize("mlp, dtype", [("relu2", mx.bfloat16), ("swiglu", mx.float16)])
def test_experts(reports, monkeypatch, mlp, dtype):
    rows = 2 * 256 if mlp == "swiglu" else 256
    sort, mixture = gpu_experts.functions(dtype, mlp, 4, 2, 128, 256)
    places = sort(mx.zeros((64, 2), mx.int32))
    given = [mx.zeros((64, 128), dtype), mx.zeros((64, 2), dtype), mx.zeros((4, rows, 128)), mx.zeros((4, 128, 256))]
    mx.grad(lambda *x: mixture(*x, *places)[0].sum(), (0, 1, 2, 3))(*given)
    monkeypatch.setattr(gpu_experts, "is_right", lambda *_: True)
    moe = core.MoE(GPTConfig(n_embd=128, n_head=2, n_expert=4, mlp=mlp, ffn_dim=256), 0).train()
    mx.grad(lambda logits: gpu_experts.routed(moe, logits)[0].sum())(mx.zeros((300, 4), dtype))
    check(reports, 11)


def test_kept(monkeypatch, tmp_path):
    """A kernel is compiled once; again for another GPU, or a changed source; also where the cache cannot be written."""
    made = []

    class Library:
        def nvrtcVersion(self, major, minor):  # noqa: N802
            pass

    def compiled_now(source, architecture):
        made.append((source, architecture))
        return f"{source} for {architecture}".encode()

    monkeypatch.setattr(gpu_kernels, "library", Library)
    monkeypatch.setattr(gpu_kernels, "compiled_now", compiled_now)
    monkeypatch.setattr(blas, "cache_folder", lambda: str(tmp_path / "kept"))
    for architecture, source in (("sm_80", "a"), ("sm_80", "a"), ("sm_90", "a"), ("sm_90", "b"), ("sm_80", "a")):
        monkeypatch.setattr(mx, "device_info", lambda device, name=architecture: {"architecture": name})
        gpu_kernels.compiled.cache_clear()  # as in another process
        full = {"sm_90": "sm_90a"}.get(architecture, architecture)
        assert gpu_kernels.compiled(source) == f"{source} for {full}".encode()
    assert made == [("a", "sm_80"), ("a", "sm_90a"), ("b", "sm_90a")] and len(os.listdir(tmp_path / "kept")) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(blas, "cache_folder", lambda: str(tmp_path / "file" / "kept"))
    gpu_kernels.compiled.cache_clear()
    assert gpu_kernels.compiled("c") == gpu_kernels.compiled("c") == b"c for sm_80" and len(made) == 4
    gpu_kernels.compiled.cache_clear()


def test_definitions():
    text = gpu_kernels.definitions(A=3, B=0.5, C=True, D=(1, True, 0), T=mx.bfloat16, U=mx.float32)
    assert text.split("\n")[2:] == [
        "constexpr int A = 3;", "constexpr float B = 0.5f;", "constexpr int C = 1;",
        "__device__ const int D[] = {1, 1, 0};", "using T = bfloat16;", "using U = float;", ""]
    assert np.float32(1e-5) == np.float32(float(gpu_kernels.definitions(E=1e-5).split("= ")[1][:-3]))
