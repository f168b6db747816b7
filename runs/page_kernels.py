"""Whether the page's kernels, in a browser on this machine's graphics card, give what their tests expect.

    python runs/page_kernels.py                                # makes out-kernels/ first, by tests/test_kernels.py
    python runs/page_kernels.py --browser=/path/to/chromium    # a machine without pytest, where out-kernels/ is a copy

tests/test_kernels.py compares each kernel with numpy and MLX, on the wgpu package's device. Every call of a kernel that
passes there is kept, with its results, and is run again in the browser, with its own compiler and this card. Numbers
must agree within 2e-5 of the largest one of their array, or within 4e-6, as sums of numbers near 1 may all be 0;
integers must be equal, and nothing may be written behind the end of an array. Of the tokens that sample.wgsl draws one
in a hundred may differ: another last bit of a probability can move the border between two tokens.
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import UserError, overrides  # noqa: E402
from runs.headless import run_in_browser  # noqa: E402

browser = ""            # a Chromium; "": chromium or google-chrome, where it is installed
folder = "out-kernels"  # where the calls are kept
software = False        # the processor instead of a graphics card
timeout = 500.0         # seconds
tests = ""              # only tests whose names match, as pytest's -k; "": all

settings = overrides(globals())

GUARD = 9  # numbers behind the end of an array, see guarded() in tests/test_kernels.py
MODULE = """
  const {GPU} = await import("/gpu.js");
  const gpu = await GPU.open();
  gpu.info.fallback = false;  // kernels of their usual size, also on a processor
  const {calls, lanes} = await (await fetch("/files/calls.json")).json();
  const data = await (await fetch("/files/calls.bin")).arrayBuffer();
  const worst = {}, failed = [];
  for (const [i, {name, constants, params, arrays, groups, out, times}] of calls.entries()) {
    if (/subgroup|packed/.test(name)) {
      if (!gpu.lanes) continue;
      groups[0] = Math.ceil(groups[0] * gpu.lanes / lanes);  // a subgroup computes a number of y
    }
    const buffers = arrays.map(([at, size]) => gpu.buffer(new Uint8Array(data, at, size)));
    const pipeline = await gpu.kernel(name, constants);
    const uniform = gpu.device.createBuffer({size: 256, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST});
    gpu.device.queue.writeBuffer(uniform, 0, new Uint8Array(data, ...params));
    const entries = [uniform, ...buffers].map((buffer, binding) => ({binding, resource: {buffer}}));
    const group = gpu.device.createBindGroup({layout: pipeline.getBindGroupLayout(0), entries});
    const encoder = gpu.device.createCommandEncoder(), pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    for (let k = 0; k < times; k++) pass.dispatchWorkgroups(...groups);
    pass.end();
    gpu.device.queue.submit([encoder.finish()]);
    worst[name] ??= {calls: 0, error: 0};
    worst[name].calls += 1;
    for (const {binding, at, size, type} of out) {
      const View = type === "u" ? Uint32Array : Float32Array;
      const found = new View(await gpu.read(buffers[binding - 1], size)), right = new View(data, at, size / 4);
      const n = found.length - GUARD, largest = right.subarray(0, n).reduce((m, x) => Math.max(m, Math.abs(x)), 0);
      let error = 0, draws = 0;
      for (let k = 0; k < found.length; k++) {
        if (Object.is(found[k], right[k]) || found[k] === right[k]) continue;
        if (k < n && type === "f" && Math.abs(found[k] - right[k]) < 4e-6) continue;
        if (name === "sample") { draws += 1; continue; }
        const off = k >= n || type === "u" ? Infinity : Math.abs(found[k] - right[k]) / (largest || 1);
        error = Math.max(error, Number.isNaN(off) ? Infinity : off);
      }
      if (draws > found.length / 100) error = draws / found.length;
      worst[name].error = Math.max(worst[name].error, error);
      if (error > 2e-5) failed.push(`${name} ${JSON.stringify(constants)}, call ${i}: ${error.toExponential(1)}`);
    }
    [uniform, ...buffers].forEach((buffer) => buffer.destroy());
  }
  await say(gpu.info.name);
  for (const [name, {calls, error}] of Object.entries(worst).sort()) {
    await say(`${name.padEnd(28)} ${String(calls).padStart(5)} calls   largest error ${error.toExponential(1)}`);
  }
  if (gpu.errors.length) throw new Error(gpu.errors[0]);
  if (failed.length) throw new Error(`${failed.length} calls differ: ${failed.slice(0, 5).join("; ")}`);
  await say(`all ${Object.values(worst).reduce((sum, {calls}) => sum + calls, 0)} calls agree`);
""".replace("GUARD", str(GUARD))


def make():
    """Run the tests, and write calls.json and calls.bin: what each call of a kernel was given, and gave."""
    import numpy as np
    import pytest

    import wgsl

    wgsl.device()  # UserError where there is none
    os.makedirs(folder)
    calls, lanes, run = [], [], wgsl.run
    with open(os.path.join(folder, "calls.bin"), "wb") as file:
        places = {}

        def put(array):
            raw = np.ascontiguousarray(array).tobytes()
            if raw not in places:  # many calls are given equal arrays
                places[raw] = file.tell()
                file.write(raw + bytes(-len(raw) % 16))
            return places[raw], len(raw)

        def recorded(name, constants, params, arrays, groups, out, times=1):
            found = run(name, constants, params, arrays, groups, out, times)
            if params[:2] == (512, 128):  # this call asks how many rows a workgroup computes: 128 / lanes
                if name == "matvec_subgroup":
                    lanes.append(128 // int(np.count_nonzero(found[0][:-GUARD])))
                return found
            numbers = [np.array(value, np.float32 if isinstance(value, float) else np.uint32) for value in params]
            results = [dict(binding=i, type="u" if each.dtype == np.uint32 else "f",
                            **dict(zip(("at", "size"), put(each), strict=True)))
                       for i, each in zip(out, found, strict=True)]
            calls.append(dict(name=name, constants={key: float(value) for key, value in constants.items()},
                              params=put(np.frombuffer(b"".join(each.tobytes() for each in numbers), np.uint32)),
                              arrays=[put(each) for each in arrays], groups=list(groups), times=times, out=results))
            return found

        wgsl.run = recorded
        path, only = os.path.join(ROOT, "tests", "test_kernels.py"), ["-k", tests] if tests else []
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", path, *only])
        wgsl.run = run
    if status:
        raise UserError("the kernels' tests fail on this machine: mend that first, and remove " + folder)
    with open(os.path.join(folder, "calls.json"), "w") as file:
        json.dump({"calls": calls, "lanes": lanes[0] if lanes else 1}, file)
    print(f"made {folder}: {len(calls):,} calls, {os.path.getsize(os.path.join(folder, 'calls.bin')) / 1e6:.0f} MB")


if __name__ == "__main__":
    if not os.path.exists(folder):
        make()
    if not os.path.exists(os.path.join(folder, "calls.json")):
        raise UserError(f"{folder} has no calls.json: it was not made by this script, or not to the end; remove it")
    run_in_browser(MODULE, browser, folder, software, timeout)
