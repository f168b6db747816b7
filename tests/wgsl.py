"""Kernels of webgpu/kernels run by the wgpu package: on a GPU, or on a driver in software."""
import glob
import os
import re
from functools import cache

import numpy as np
import pytest
from conftest import ROOT

KERNELS = ROOT / "webgpu" / "kernels"


@cache
def device():
    """A WebGPU device, or a skipped test where there is none."""
    if not os.environ.get("VK_DRIVER_FILES") and not glob.glob("/dev/nvidia*"):
        found = glob.glob("/usr/share/vulkan/icd.d/lvp*.json")  # others only complain
        if found:
            os.environ["VK_DRIVER_FILES"] = found[0]
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    wgpu = pytest.importorskip("wgpu")
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # whatever its driver says
        pytest.skip(f"no adapter for WebGPU: {error}")
    limits = {name: adapter.limits[name] for name in ("max-buffer-size", "max-storage-buffer-binding-size")}
    return adapter.request_device_sync(required_features=["subgroup"] if "subgroup" in adapter.features else [],
                                       required_limits=limits)


def source(name: str) -> str:
    """As gpu.js puts it together. naga does without `enable subgroups`, and refuses it."""
    text = (KERNELS / f"{name}.wgsl").read_text()
    text = re.sub(r"^enable subgroups;\n", "", text, flags=re.M)
    more = re.match(r"// \(\+ (\S+)\)\n", text)
    return (KERNELS / more[1]).read_text() + text if more else text


@cache
def pipeline(name: str, constants: tuple):
    module = device().create_shader_module(code=source(name), label=name)
    return device().create_compute_pipeline(
        layout="auto", compute={"module": module, "entry_point": "main", "constants": dict(constants)})


def buffer(array: np.ndarray):
    import wgpu
    raw = np.ascontiguousarray(array).tobytes()
    raw += bytes(-len(raw) % 16 or (16 if not raw else 0))
    return device().create_buffer_with_data(data=raw, usage=wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC)


def run(name: str, constants: dict, params: tuple, arrays: list, groups: tuple, out: list[int],
        times: int = 1) -> list[np.ndarray]:
    """Run a kernel, so many times in turn: params are its uniforms, in order (int: u32, float: f32); arrays those of
    bindings 1, 2, ...; what is then in those numbered `out` comes back."""
    import wgpu
    gpu, made = device(), pipeline(name, tuple(sorted((key, float(value)) for key, value in constants.items())))
    uniform = b"".join(np.array(value, np.float32 if isinstance(value, float) else np.uint32).tobytes()
                       for value in params)
    uniform = gpu.create_buffer_with_data(data=uniform + bytes(-len(uniform) % 16), usage=wgpu.BufferUsage.UNIFORM)
    buffers = [uniform, *map(buffer, arrays)]
    entries = [{"binding": i, "resource": {"buffer": each, "offset": 0, "size": each.size}}
               for i, each in enumerate(buffers)]
    group = gpu.create_bind_group(layout=made.get_bind_group_layout(0), entries=entries)
    encoder = gpu.create_command_encoder()
    work = encoder.begin_compute_pass()
    work.set_pipeline(made)
    work.set_bind_group(0, group)
    for _ in range(times):
        work.dispatch_workgroups(*groups)
    work.end()
    gpu.queue.submit([encoder.finish()])
    found = []
    for i in out:
        array = np.asarray(arrays[i - 1])
        raw = bytes(gpu.queue.read_buffer(buffers[i]))[:array.nbytes]
        found.append(np.frombuffer(raw, array.dtype).reshape(array.shape))
    return found


def threads(n: int, size: int = 64) -> tuple[int, int]:
    """Workgroups for n threads, as gpu.js lays them out."""
    groups = -(-n // size)
    return (groups, 1) if groups <= 65535 else (65535, -(-groups // 65535))
