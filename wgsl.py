"""The page's kernels, webgpu/kernels/*.wgsl, run by Python, with the wgpu package, on a GPU or a driver in software."""
import glob
import os
import re
import time
from functools import cache
from pathlib import Path

import numpy as np

from config import UserError

KERNELS = Path(__file__).resolve().parent / "webgpu" / "kernels"


@cache
def device():
    """A WebGPU device. UserError where there is none."""
    if not os.environ.get("VK_DRIVER_FILES") and not glob.glob("/dev/nvidia*"):
        found = glob.glob("/usr/share/vulkan/icd.d/lvp*.json")  # others only complain
        if found:
            os.environ["VK_DRIVER_FILES"] = found[0]
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        import wgpu
    except ImportError as error:
        raise UserError("the page's kernels are run by the wgpu package: pip install wgpu") from error
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # whatever its driver says
        raise UserError(f"no adapter for WebGPU ({error}): install a Vulkan driver, say mesa-vulkan-drivers") from error
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


def bound(name: str, constants: dict, params: tuple, buffers: list):
    """A kernel and what it works on: its pipeline, and the group of its uniforms and buffers."""
    import wgpu
    gpu, made = device(), pipeline(name, tuple(sorted((key, float(value)) for key, value in constants.items())))
    uniform = b"".join(np.array(value, np.float32 if isinstance(value, float) else np.uint32).tobytes()
                       for value in params)
    uniform = gpu.create_buffer_with_data(data=uniform + bytes(-len(uniform) % 16), usage=wgpu.BufferUsage.UNIFORM)
    entries = [{"binding": i, "resource": {"buffer": each, "offset": 0, "size": each.size}}
               for i, each in enumerate([uniform, *buffers])]
    return made, gpu.create_bind_group(layout=made.get_bind_group_layout(0), entries=entries)


def submit(made, bindings: list, groups: tuple, times: int = 1):
    """Dispatch a kernel with each of the groups of buffers in turn, all of them so many times."""
    encoder = device().create_command_encoder()
    work = encoder.begin_compute_pass()
    work.set_pipeline(made)
    for binding in bindings * times:
        work.set_bind_group(0, binding)
        work.dispatch_workgroups(*groups)
    work.end()
    device().queue.submit([encoder.finish()])


def run(name: str, constants: dict, params: tuple, arrays: list, groups: tuple, out: list[int],
        times: int = 1) -> list[np.ndarray]:
    """Run a kernel, so many times in turn: params are its uniforms, in order (int: u32, float: f32); arrays those of
    bindings 1, 2, ...; what is then in those numbered `out` comes back."""
    buffers = [*map(buffer, arrays)]
    made, binding = bound(name, constants, params, buffers)
    submit(made, [binding], groups, times)
    found = []
    for i in out:
        array = np.asarray(arrays[i - 1])
        raw = bytes(device().queue.read_buffer(buffers[i - 1]))[:array.nbytes]
        found.append(np.frombuffer(raw, array.dtype).reshape(array.shape))
    return found


def seconds(name: str, constants: dict, params: tuple, several: list[list], groups: tuple, rounds: int = 5) -> float:
    """What a dispatch takes, the median of some rounds. several: lists of buffers, taken in turn, so that a cache does
    not hold them all. What submitting itself takes is taken off: it is the difference of many dispatches and a few."""
    bindings = [bound(name, constants, params, buffers) for buffers in several]
    made, bindings = bindings[0][0], [binding for _, binding in bindings]

    def once(times: int) -> float:
        began = time.perf_counter()
        submit(made, bindings, groups, times)
        device().queue.read_buffer(several[0][-1], 0, 4)
        return time.perf_counter() - began

    once(1)
    times = max(2, min(200, int(0.1 / max(once(1), 1e-4))))
    differences = sorted(once(1 + times) - once(1) for _ in range(rounds))
    return differences[rounds // 2] / times / len(several)


def threads(n: int, size: int = 64) -> tuple[int, int]:
    """Workgroups for n threads, as gpu.js lays them out."""
    groups = -(-n // size)
    return (groups, 1) if groups <= 65535 else (65535, -(-groups // 65535))
