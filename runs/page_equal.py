"""Whether the page, in a browser on this machine's graphics card, computes what the Python scripts compute.

    python runs/page_equal.py                                # makes out-page/ first, by MLX
    python runs/page_equal.py --browser=/path/to/chromium    # a machine without MLX, where out-page/ was copied to

For six architectures, a prompt of 200 tokens is continued by 150 tokens of temperature 0, by model.py's generate() and
by the page with the kernels that it chooses on this card: all tokens must be equal, and so must be the most probable
tokens after each token of the prompt. Then come 30 updates of train.py and of the page, from one checkpoint and with
equal windows: their losses must agree within 0.2%.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import UserError, overrides  # noqa: E402
from runs.headless import program_of, run_in_browser  # noqa: E402

browser = ""          # a Chromium; "": chromium or google-chrome, where it is installed
folder = "out-page"   # where the checkpoints and what MLX computes are kept
software = False      # the processor instead of a graphics card
timeout = 500.0       # seconds

settings = overrides(globals())

SHAPE = dict(n_layer=2, n_head=4, n_embd=256, block_size=512, vocab_size=320)
CASES = {
    "default": {},
    "gpt2 in float16": dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False),
    "llama in 4 bits": dict(mlp="swiglu", qk_norm=False, tie=False, n_kv_head=2),
    "window and alibi": dict(alibi=True, sliding_window=64, window_pattern="SL"),
    "gemma": dict(norm_place="both", mlp="geglu", embed_scale=16.0, attn_scale=0.1, n_kv_head=1, sliding_window=100,
                  window_pattern="SL", window_theta=100.0, attn_softcap=30.0),
    "neox": dict(parallel=True, rotary_dim=16, norm="layer", norm_bias=True, mlp="gelu", bias=True, qk_norm=False,
                 tie=False),
}
UPDATES = 30
MODULE = """
  const {GPU, chooseKernels} = await import("/gpu.js"), {GPT} = await import("/gpt.js");
  const {Trainer} = await import("/train.js");
  const gpu = await GPU.open();
  await chooseKernels(gpu);
  await say(`${gpu.info.name}: ${gpu.choices.filter(({used}) => used).map(({name}) => name).join(", ")}`);
  const file = async (name) => new File([await (await fetch(`/files/${name}`)).blob()], name);
  const {prompt, cases, ids, starts, losses} = await (await fetch("/files/cases.json")).json();
  const different = [];
  for (const {name, path, text, best} of cases) {
    const model = await GPT.load(gpu, await file(path)), found = [];
    const settings = {max_new_tokens: text.length, temperature: 0};
    for await (const {token} of model.generate(prompt, settings)) found.push(token);
    const equal = text.findIndex((token, i) => token !== found[i]);
    const logits = await model.logits(prompt), V = model.config.vocab_size;
    const same = best.filter((id, t) => logits.subarray(t * V, t * V + 257)
      .every((x) => x <= logits[t * V + id])).length;
    await say(`${name}: ${equal < 0 ? text.length : equal} of ${text.length} tokens equal, ` +
      `${same} of ${best.length} most probable tokens after the prompt's`);
    if (equal >= 0 || same < best.length) different.push(name);
    model.destroy();
  }
  const resume = {checkpoint: await file("ckpt.safetensors"), optimizer: await file("ckpt.optimizer-3.safetensors")};
  const heldOut = ids.slice(0, Math.ceil(ids.length / 9) + 200);  // so that all of ids is what it learns from
  const trainer = await Trainer.create(gpu, {ids: ids.concat(heldOut), resume, max_iters: 3 + starts.length});
  let worst = 0, first = 0, last = 0;
  for (const [i, start] of starts.entries()) {
    const {loss} = await trainer.step(start);
    worst = Math.max(worst, Math.abs(loss / losses[i] - 1));
    if (i === 0) first = loss;
    last = loss;
  }
  await say(`${starts.length} updates: loss ${first.toFixed(4)} to ${last.toFixed(4)}, ` +
    `at most ${(100 * worst).toFixed(4)}% from train.py's`);
  if (gpu.errors.length) throw new Error(gpu.errors[0]);
  if (!(worst < 0.002)) different.push("losses");
  if (different.length) throw new Error(`it differs in ${different.join(", ")}`);
"""


def make():
    """Write the checkpoints, and cases.json with the tokens and losses of MLX."""
    import blas  # noqa: F401  (before mlx)
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_map

    from model import GPT, GPTConfig, generate, save_checkpoint
    from tokenizer import byte_tokenizer

    os.makedirs(folder)
    rng, cases = np.random.default_rng(0), []
    prompt = rng.integers(0, 257, 200).tolist()
    for i, (name, flags) in enumerate(CASES.items()):
        model = GPT(GPTConfig(**SHAPE | flags), seed=i).eval()
        model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(p.size)),
                              model.parameters()))
        if "float16" in name:
            model.set_dtype(mx.float16)
        if "4 bits" in name:
            nn.quantize(model, 64, 4)
        save_checkpoint(os.path.join(folder, f"{i}.safetensors"), model, {"tokenizer": byte_tokenizer().to_dict()})
        model.set_dtype(mx.float32)
        text = list(generate(model, prompt, 150, temperature=0, n_vocab=257))
        best = mx.argmax(model(mx.array([prompt]))[0, :, :257], axis=-1).tolist()  # after each token of the prompt
        cases.append({"name": name, "path": f"{i}.safetensors", "text": text, "best": best})
        print(f"made {name}: {len(set(text))} different tokens in the text, {len(set(best))} after the prompt's tokens")

    def script(*command):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    work = tempfile.mkdtemp()
    data, run = os.path.join(work, "data"), os.path.join(work, "run")
    script("data.py", "--source=model.py", "--tokenizer=byte", f"--out={data}")
    ids, batch_size, T = np.fromfile(os.path.join(data, "train.bin"), np.uint16), 8, 128
    script("train.py", "--optimizer=adamw", "--learning_rate=3e-3", f"--batch_size={batch_size}", f"--block_size={T}",
           "--n_layer=2", "--n_embd=256", "--n_head=4", "--sample_tokens=0", "--log_interval=1", "--eval_interval=1000",
           "--eval_windows=4", f"--data={data}", f"--out_dir={run}", "--max_iters=3")
    for name in ("ckpt.safetensors", "ckpt.optimizer-3.safetensors"):
        shutil.copy(os.path.join(run, name), folder)
    script("train.py", f"--data={data}", f"--out_dir={run}", "--resume=True", f"--max_iters={3 + UPDATES}")
    with open(os.path.join(run, "loss.csv"), newline="") as file:
        losses = {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}
    starts = [np.random.default_rng([1337, step]).integers(len(ids) - T, size=batch_size).tolist()
              for step in range(3, 3 + UPDATES)]  # as train.py draws them
    with open(os.path.join(folder, "cases.json"), "w") as file:
        json.dump({"prompt": prompt, "cases": cases, "ids": ids.tolist(), "starts": starts,
                   "losses": [losses[step] for step in range(4, 4 + UPDATES)]}, file)
    shutil.rmtree(work)


if __name__ == "__main__":
    if browser:
        program_of(browser)  # UserError, before MLX computes for a minute
    if not os.path.exists(folder):
        make()
    if not os.path.exists(os.path.join(folder, "cases.json")):
        raise UserError(f"{folder} has no cases.json: it was not made by this script, or not to the end; remove it")
    run_in_browser(MODULE, browser, folder, software, timeout)
