"""Write a model's states to a file, for work outside: residual streams, heads, queries, keys, values, neurons.

    python activations.py webgpu/demo.safetensors --prompt="def main():" --sites=resid,heads --layers=0,3-4
    python activations.py webgpu/demo.safetensors --data=README.md --sites=mlp --layers=2 --positions=last \\
        --out=mlp.safetensors

A site is a place in every layer (inside.py lists them): resid, the residual stream that enters a layer, or, for the
layer after the last one, the stream that the head reads; mid, the stream between attention and the MLP; attn and mlp,
what attention and the MLP add to it; heads, the output of each head before the output projection; q, k and v, queries,
keys and values as attention takes them, after positions; hidden, the neurons of the MLP.

The states are those of a prompt, or of the whole windows of a text, in its order. A prompt and each window begin with
the token that begins a text (--bos=False: they do not). They are computed in float32 on a CPU and in bfloat16 on a
GPU, and written as float32. The file holds an array for each site and layer:

    resid.3     (N, T, C): N windows, T positions. So are mid, attn and mlp; hidden is (N, T, ffn_dim)
    heads.3     (N, T, H, D): a vector of D numbers for each of H heads. So are q, k and v
    tokens      (N, T'), the token ids of each window; positions (T,): which of its T' positions the states are of

and as JSON what they were computed from: the checkpoint with its sha256, the command, the sites, the text of each
token. An .npz file is compressed; it is made in memory, so it is for 1 GiB at most. A .safetensors file is written
window by window, so that it may be larger than the memory. The size is told before the work begins. In Python:

    >>> from model import load_checkpoint; from activations import states_of; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> states = states_of(model, mx.array([[5, 17, 2]]), ["resid", "heads"], [0, 1])  # {"resid.0": (1, 3, C), ...}

and of a file: `arrays, about = read_states("states.npz")`, then `about["texts"][str(arrays["tokens"][0, 2])]` is the
text of the first window's token 2.
"""
import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from safetensors.numpy import safe_open
from tqdm import tqdm

from config import UserError, check_output, check_replaced, given, overrides
from draw import check_finite, check_folder, prompt_ids, state_name, whole_file
from inside import SITES, about, check_saved, check_site, chosen_layers, numpy_of, record, save_arrays
from model import GPT, VERSION, compute_dtype, load_checkpoint
from score import read_tokens, window_length
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
out = ""              # the file, .npz or .safetensors; "": the name of the checkpoint with -states.npz
sites = "resid"       # of resid, mid, attn, mlp, heads, q, k, v, hidden: one or more, with commas between them
layers = ""           # the layers, as in 0,3-5; "": all. The layer after the last one has the site resid only
positions = "all"     # all | last: which positions of a window
# text
prompt = ""           # a text to read
data = ""             # in its place a text file, or a folder that data.py made (its val split)
samples = 16          # windows of that text, from its beginning; 0: all whole ones
block_size = 0        # tokens of a window; 0: the model's context, but 1,024 at most
batch_size = 4        # windows that are computed together
bos = True            # a prompt and each window begin with the token that begins a text, if the tokenizer has one

settings = overrides(globals(), "checkpoint")

LARGEST_NPZ = 2**30  # bytes

# ---- states ----------------------------------------------------------------------------------------------------------


def states_of(model: GPT, idx: mx.array, sites: Iterable[str], layers: Iterable[int] | None = None,
              positions: str = "all") -> dict[str, np.ndarray]:
    """The states of tokens (N, T) at each site of each layer (None: of all), {"resid.0": (N, T, C)}, for heads, q, k
    and v (N, T, H, D). positions="last": of the last position alone, (N, 1, ...). What a layer does not have is left
    out."""
    found = chosen(record(model, idx, sites), sites, layers, positions)
    mx.eval(found)
    return {name: numpy_of(x) for name, x in found.items()}


def chosen(states: dict, sites: Iterable[str], layers: Iterable[int] | None, positions: str) -> dict[str, mx.array]:
    """Those of record()'s states that are wanted, with positions (N, T, ...) as the second axis."""
    found = {}
    for (site, layer), x in sorted(states.items(), key=lambda item: item[0][1]):
        if site in sites and (layers is None or layer in layers):
            x = x.swapaxes(1, 2) if x.ndim == 4 else x
            found[f"{site}.{layer}"] = x[:, -1:] if positions == "last" else x
    return found


def shapes_of(model: GPT, n: int, T: int, sites: list[str], layers: list[int]) -> dict[str, tuple]:
    """The shapes of the arrays for n windows of which T positions are kept. UserError if there are none."""
    states = chosen(record(model, mx.zeros((1, 1), mx.int32), sites), sites, layers, "all")  # lazy: nothing is computed
    missing = [site for site in sites if not any(name.startswith(f"{site}.") for name in states)]
    if missing:
        raise UserError(f"the model has no {' and no '.join(missing)} in layers {', '.join(map(str, layers))}: give "
                        "other --sites or --layers")
    return {name: (n, T, *x.shape[2:]) for name, x in states.items()}


# ---- files -----------------------------------------------------------------------------------------------------------


def check_size(path: str, size: int):
    """Say how large the file gets. UserError if there is no room for it."""
    print(f"{path}: {size / 1e9:.2f} GB of states" if size >= 1e8 else f"{path}: {size / 1e6:.2f} MB of states")
    advice = "give fewer --sites, --layers or --samples, or --positions=last"
    if path.endswith(".npz") and size > LARGEST_NPZ:
        raise UserError(f"{path} would have {size / 1e9:.1f} GB, and an .npz file is made in memory: give a name that "
                        f"ends in .safetensors, or {advice}")
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if size > free:
        raise UserError(f"{path} needs {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free: {advice}")


@contextlib.contextmanager
def in_pieces(path: str, shapes: dict[str, tuple], header: dict) -> Iterator[Callable]:
    """A safetensors file with arrays of these shapes, of integers where the name has no number, which are written in
    pieces: append(name, rows) writes the next rows of an array. An error removes the file."""
    entries, end = {"__metadata__": {"tinygpt": json.dumps({"version": VERSION, **header})}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32" if "." in name else "I32", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    place = {name: 8 + len(head) + entries[name]["data_offsets"][0] for name in shapes}
    with whole_file(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)

        def append(name, rows):
            file.seek(place[name])
            place[name] += file.write(np.ascontiguousarray(rows).data)

        yield append


def read_states(path: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a file that this script wrote, and what they were computed from."""
    if path.endswith(".npz"):
        with np.load(path) as file:
            arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("about")))
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["tinygpt"])


# ---- text ------------------------------------------------------------------------------------------------------------


def windows_of(enc: Tokenizer, tokens: np.ndarray, T: int, n: int, bos: bool) -> np.ndarray:
    """The first n windows (n, T) of a text, 0: all whole ones; each begins with the tokens that begin a text. A text
    that is shorter than a window is one."""
    start = enc.start if bos else []
    step = min(T - len(start), len(tokens))
    if step < 1:
        raise UserError(f"block_size={T}: it must be more than the {len(start)} tokens that begin a window")
    rows = tokens[:len(tokens) // step * step].reshape(-1, step)[:n or None]
    return np.concatenate([np.tile(np.array(start, np.int32), (len(rows), 1)), rows], axis=1).astype(np.int32)


def texts_of(enc: Tokenizer, ids: np.ndarray) -> dict[str, str]:
    """The texts of the tokens that occur; a token of broken characters is written with escapes."""
    return {str(i): enc.decode_bytes([i]).decode(errors="backslashreplace") for i in np.unique(ids).tolist()}


# ---- run -------------------------------------------------------------------------------------------------------------


def write(model: GPT, rows: np.ndarray, shapes: dict[str, tuple], wanted: tuple,
          append: Callable) -> dict[str, np.ndarray]:
    """Compute the states of windows (N, T), and hand the next rows of each array to append(name, rows). wanted: the
    arguments of states_of(). Returns for each array the sums of its numbers, of their squares, and of the lengths of
    its vectors: (3,)."""
    sums = {name: np.zeros(3) for name in shapes}
    with tqdm(total=rows.size, unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for begin in range(0, len(rows), batch_size):
            part = rows[begin:begin + batch_size]
            states = states_of(model, mx.array(part), *wanted)
            for name, x in states.items():
                squares = np.square(x, dtype=np.float64)
                sums[name] += x.sum(dtype=np.float64), squares.sum(), np.sqrt(squares.sum(-1)).sum()
                check_finite(sums[name])
                append(name, x)
            bar.update(part.size)
    return sums


def report(sums: dict[str, np.ndarray], shapes: dict[str, tuple]):
    print(f"{'array':12} {'shape':20} {'mean':>9} {'deviation':>9} {'norm':>9}  the state")
    for name, shape in shapes.items():
        (total, squares, lengths), n = sums[name], math.prod(shape)
        site, layer = name.split(".")
        what = state_name(int(layer)) if site == "resid" else f"layer {layer}, {SITES[site]}"
        deviation = math.sqrt(max(0, squares / n - (total / n) ** 2))
        print(f"{name:12} {' x '.join(map(str, shape)):20} {total / n:9.4f} {deviation:9.4f} "
              f"{lengths * shape[-1] / n:9.3f}  {what}")
    print("norm: the mean length of a vector")


if __name__ == "__main__":
    site_names = [name.strip() for name in sites.split(",")]
    for name in site_names:
        if name not in SITES:
            raise UserError(f"sites={sites!r}: {name!r} is not one of {', '.join(SITES)}")
    if positions not in ("all", "last"):
        raise UserError(f"positions={positions!r} is not one of all, last")
    if samples < 0 or batch_size < 1:
        raise UserError("samples must be 0 or more, and batch_size 1 or more")
    if bool(prompt) == bool(data):
        raise UserError("give either --prompt=TEXT or --data=FILE")
    idle = given & {"samples", "block_size", "batch_size"}
    if prompt and idle:
        raise UserError(f"{', '.join(sorted(idle))}: used with --data only; a prompt is one window")
    out = out or f"{checkpoint.removesuffix('.safetensors')}-states.npz"
    if not out.endswith((".npz", ".safetensors")):
        raise UserError(f"out={out!r}: its name must end in .npz or .safetensors")
    if out.endswith(".npz"):
        check_saved(out, checkpoint, data)
    else:
        check_output(out, checkpoint, data)
        check_folder(out)
        check_replaced(out, os.path.basename(__file__))
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a text with: give another checkpoint")
    for name in site_names:
        check_site(model, name)
    enc, n_layer = Tokenizer.from_dict(meta["tokenizer"]), model.config.n_layer
    numbers = chosen_layers(layers, n_layer + ("resid" in site_names))
    wanted = site_names, numbers, positions
    if prompt:
        rows = np.array([prompt_ids(enc, prompt, model, bos=bos)], np.int32)
    else:
        rows = windows_of(enc, read_tokens(data, enc), window_length(model.config, block_size), samples, bos)
    known = about(checkpoint, model, **({"prompt": prompt} if prompt else {"data": data}), sites=site_names,
                  layers=numbers, bos=bos, script=os.path.basename(__file__))
    model.set_dtype(compute_dtype("auto"))
    at = np.arange(rows.shape[1], dtype=np.int32)[-1 if positions == "last" else 0:]
    shapes = shapes_of(model, len(rows), len(at), site_names, numbers)
    check_size(out, 4 * sum(map(math.prod, shapes.values())))
    known["texts"] = texts_of(enc, rows)
    if out.endswith(".npz"):
        pieces = {name: [] for name in shapes}
        sums = write(model, rows, shapes, wanted, lambda name, x: pieces[name].append(x))
        report(sums, shapes)
        save_arrays(out, tokens=rows, positions=at, about=np.array(json.dumps(known)),
                    **{name: np.concatenate(parts) for name, parts in pieces.items()})
    else:
        with in_pieces(out, {"tokens": rows.shape, "positions": at.shape, **shapes}, known) as append:
            append("tokens", rows)
            append("positions", at)
            sums = write(model, rows, shapes, wanted, append)
        report(sums, shapes)
        print(f"written: {out}")
