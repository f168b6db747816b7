"""Runs the page's kernels, webgpu/kernels/*.wgsl, from Python, with the wgpu package, on a GPU or a software driver."""
import glob
import os
import re
import sys
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
        found = glob.glob("/usr/share/vulkan/icd.d/lvp*.json")  # other drivers only print warnings
        if found:
            os.environ["VK_DRIVER_FILES"] = found[0]
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        import wgpu
    except ImportError as error:
        raise UserError("the page's kernels need the wgpu package: pip install wgpu") from error
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except Exception as error:  # a driver may raise anything
        raise UserError(f"WebGPU finds no adapter ({error}): install a Vulkan driver, such as mesa-vulkan-drivers"
                        ) from error
    limits = {name: adapter.limits[name] for name in ("max-buffer-size", "max-storage-buffer-binding-size")}
    return adapter.request_device_sync(required_features=["subgroup"] if "subgroup" in adapter.features else [],
                                       required_limits=limits)


def source(name: str) -> str:
    """A kernel's code, joined with the files that its first comment names, as gpu.js joins them. `enable subgroups` is
    left out: wgpu does not need it and refuses it."""
    text = (KERNELS / f"{name}.wgsl").read_text(encoding="utf-8")
    text = re.sub(r"^enable subgroups;\n", "", text, flags=re.M)
    more = re.match(r"// \(\+ (.*)\)\n", text)
    return "".join(map(source, more[1].replace(".wgsl", "").split() if more else [])) + text


@cache
def pipeline(name: str, constants: tuple):
    """A compiled kernel with its override constants, ((name, value), ...)."""
    module = device().create_shader_module(code=source(name), label=name)
    return device().create_compute_pipeline(
        layout="auto", compute={"module": module, "entry_point": "main", "constants": dict(constants)})


def buffer(array: np.ndarray):
    """A storage buffer that holds the array."""
    import wgpu
    raw = np.ascontiguousarray(array).tobytes()
    raw += bytes(-len(raw) % 16 or (16 if not raw else 0))
    return device().create_buffer_with_data(data=raw, usage=wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC)


def bound(name: str, constants: dict, params: tuple, buffers: list):
    """A kernel's pipeline, and the bind group of its uniforms, `params`, and buffers."""
    import wgpu
    gpu, made = device(), pipeline(name, tuple(sorted((key, float(value)) for key, value in constants.items())))
    uniform = b"".join(np.array(value, np.float32 if isinstance(value, float) else np.uint32).tobytes()
                       for value in params)
    uniform = gpu.create_buffer_with_data(data=uniform + bytes(-len(uniform) % 16), usage=wgpu.BufferUsage.UNIFORM)
    entries = [{"binding": i, "resource": {"buffer": each, "offset": 0, "size": each.size}}
               for i, each in enumerate([uniform, *buffers])]
    return made, gpu.create_bind_group(layout=made.get_bind_group_layout(0), entries=entries)


def submit(made, bindings: list, groups: tuple, times: int = 1):
    """Dispatch a kernel with each of the bind groups in turn, and all of that `times` times."""
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
    """Run a kernel `times` times. params: its uniforms, in order (int: u32, float: f32); arrays: for the bindings 1, 2,
    ...; out: the bindings whose contents are returned afterwards."""
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
    """Seconds that one dispatch takes, the median of some rounds. several: lists of buffers, used in turn, so that a
    cache does not hold them all. The time of submitting cancels: each round takes the difference between many
    dispatches and few."""
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
    """The number of workgroups of `size` threads for n threads, in two dimensions as in gpu.js."""
    groups = -(-n // size)
    return (groups, 1) if groups <= 65535 else (65535, -(-groups // 65535))


if __name__ == "__main__":
    print("wgsl.py has no command of its own: run bench_page.py, which uses it", file=sys.stderr)
    sys.exit(2)
