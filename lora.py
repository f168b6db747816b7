"""Adapters: LoRA, rsLoRA and DoRA on any linear layer, dense or packed.

    fingerprint = base_fingerprint(model)
    attach(model, "attn, mlp", rank=8, alpha=16)           # the base is frozen, the adapter trains
    save_adapter("adapter.safetensors", model, fingerprint, dict(rank=8, alpha=16, kind="lora"))
    load_adapter(model, "adapter.safetensors", fingerprint, weight=0.5)  # onto the same base; several add up
    merge(model)                                           # dense layers again

    lora    W x + s B A x                       s = alpha / rank        (Hu et al. 2021)
    rslora  the same                            s = alpha / sqrt(rank)  (Kalajdzievski 2023)
    dora    m (W + s B A) x / ||W + s B A||     norms of rows, not differentiated (Liu et al. 2024)

B starts at 0 and m at ||W||, so an adapter starts as nothing. On a packed base this is QLoRA (Dettmers et al. 2023),
with MLX's affine integers in place of NF4: the integers stay packed and frozen, and gradients flow past them.
"""
import hashlib
import math
import re
from dataclasses import asdict

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from config import UserError
from model import GPT, VERSION, load_arrays, save_arrays

KINDS = ("lora", "rslora", "dora")


class Adapter(nn.Module):
    """A linear layer and what an adapter adds to it. Its own parameters: a (rank, in), b (out, rank), m (out,)."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, kind: str, seed: list[int]):
        super().__init__()
        outputs, inputs = dense_shape(base)
        self.base, self.kind = base, kind
        self.scale = alpha / (math.sqrt(rank) if kind == "rslora" else rank)
        bound = inputs ** -0.5  # Kaiming's uniform, as PEFT has it
        self.a = mx.array(np.random.default_rng(seed).uniform(-bound, bound, (rank, inputs)).astype(np.float32))
        self.b = mx.zeros((outputs, rank))
        if kind == "dora":
            self.m = row_norms(base)
            self._norms = self.m  # of the base: a constant

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        change = (self.scale * (x @ self.a.T)) @ self.b.T
        if self.kind != "dora":
            return y + change
        bias = 0 if self.bias is None else self.bias
        return (y - bias + change) * (self.m / mx.stop_gradient(self.norms())).astype(y.dtype) + bias

    def norms(self) -> mx.array:
        """||W + s B A||, of each row, without W: ||W||^2 + 2 s b (A W^T) + s^2 b A A^T b^T."""
        a, b, s = self.a.astype(mx.float32), self.b.astype(mx.float32), self.scale
        cross = (self.base(self.a) - (0 if self.bias is None else self.bias)).astype(mx.float32).T  # (out, rank)
        square = mx.square(self._norms) + 2 * s * (b * cross).sum(1) + s * s * ((b @ (a @ a.T)) * b).sum(1)
        return mx.sqrt(mx.maximum(square, 1e-12))

    def merged(self) -> nn.Linear:
        """A dense linear layer that does the same."""
        weight = dense_weight(self.base) + self.scale * self.b.astype(mx.float32) @ self.a.astype(mx.float32)
        if self.kind == "dora":
            weight = weight * (self.m / mx.linalg.norm(weight, axis=1))[:, None]
        linear = nn.Linear(*weight.shape[::-1], bias=self.bias is not None)
        linear.weight = weight.astype(self.b.dtype)
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    @property
    def bias(self) -> mx.array | None:
        return self.base.bias if isinstance(self.base, Adapter) else self.base.get("bias")


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, packed or not."""
    if isinstance(linear, Adapter):
        return dense_shape(linear.base)
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def dense_weight(linear: nn.Module) -> mx.array:
    """(out, in), float32."""
    if isinstance(linear, Adapter):
        return linear.merged().weight.astype(mx.float32)
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits).astype(
            mx.float32)
    return linear.weight.astype(mx.float32)


def row_norms(linear: nn.Module) -> mx.array:
    return mx.linalg.norm(dense_weight(linear), axis=1)


# ---- attach, merge ---------------------------------------------------------------------------------------------------


def linear_layers(model: GPT) -> dict[str, nn.Module]:
    """By path: blocks.0.attn.q, ... An adapted one is an Adapter. Those that choose, as routers do, are left out."""
    found = {}
    for path, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
        linear = isinstance(module, (nn.Linear, nn.QuantizedLinear, Adapter))
        if linear and not re.search(r"\.base\b|router$|predictor$", path):
            found[path] = module
    return found


def attach(model: GPT, targets: str = "attn, mlp", rank: int = 8, alpha: float = 16, kind: str = "lora",
           seed: int = 0) -> list[str]:
    """Freeze the model and put an adapter on every linear layer whose path holds one of the targets, which are regular
    expressions separated by commas ("attn, mlp": all; "attn.(q|v)$": Hu et al.'s). Returns the paths."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if rank < 1:
        raise UserError(f"rank={rank}: it must be 1 or more")
    layers, chosen = linear_layers(model), set()
    for target in filter(None, (part.strip() for part in targets.split(","))):
        try:
            matching = {path for path in layers if re.search(target, path)}
        except re.error as error:
            raise UserError(f"target {target!r} is no regular expression ({error})") from error
        if not matching:
            names = sorted({re.sub(r"^blocks\.\d+\.", "", path) for path in layers})
            raise UserError(f"target {target!r} is in no linear layer's name: they are {', '.join(names)}")
        chosen |= matching
    if not chosen:
        raise UserError("no targets: name some layers, such as attn")
    model.freeze()
    paths = [path for path in layers if path in chosen]
    for i, path in enumerate(paths):
        replace_module(model, path, Adapter(layers[path], rank, alpha, kind, [seed, i]))
        adapter = linear_layers(model)[path]
        adapter.freeze()
        adapter.unfreeze(keys=["a", "b", "m"], recurse=False)
    return paths


def merge(model: GPT):
    """Each adapted layer becomes a dense one that does the same; a packed base is unpacked by it."""
    for path, module in linear_layers(model).items():
        if isinstance(module, Adapter):
            replace_module(model, path, module.merged())


def replace_module(model: nn.Module, path: str, module: nn.Module):
    *parents, name = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else model[part]
    model[name] = module


# ---- the base, and files ---------------------------------------------------------------------------------------------


def base_fingerprint(model: GPT) -> str:
    """A hash of the model's weights, before anything is attached or quantized: what tells one base from another."""
    digest = hashlib.sha256()
    for name, p in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {p.dtype} {p.shape} ".encode())
        digest.update(np.array(p.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def adapter_arrays(model: GPT) -> dict[str, mx.array]:
    """The adapter's own parameters, by path: blocks.0.attn.q.a, ..."""
    return {f"{path}.{name}": module[name] for path, module in linear_layers(model).items()
            if isinstance(module, Adapter) for name in ("a", "b", "m") if name in module}


def save_adapter(path: str, model: GPT, fingerprint: str, meta: dict):
    """Write the adapter alone. meta: rank, alpha, kind, and whatever else JSON can hold; base_bits: what the base was
    quantized to before it was attached, 0: not at all."""
    save_arrays(path, adapter_arrays(model), {**meta, "version": VERSION, "adapter": True, "base": fingerprint})


def save_merged(path: str, model: GPT, meta: dict):
    """Write the whole model as a checkpoint, its adapters folded in; the model keeps them."""
    layers = linear_layers(model)
    adapted = {path: module.merged() for path, module in layers.items() if isinstance(module, Adapter)}
    arrays = {name: p for name, p in tree_flatten(model.parameters())
              if not any(name.startswith(f"{layer}.") for layer in adapted)}
    arrays |= {f"{layer}.{name}": p for layer, linear in adapted.items() for name, p in linear.parameters().items()}
    packed = [module for module in layers.values() if isinstance(module, nn.QuantizedLinear)]
    more = {"quantization": {"group_size": packed[0].group_size, "bits": packed[0].bits}} if packed else {}
    save_arrays(path, arrays, {**meta, **more, "version": VERSION, "config": asdict(model.config)})


def load_adapter(model: GPT, path: str, fingerprint: str, weight: float = 1.0) -> dict:
    """Put a saved adapter on the model whose base_fingerprint this is, its change times `weight`. Returns its meta."""
    arrays, meta = load_arrays(path)
    if not meta.get("adapter"):
        raise UserError(f"{path} is a checkpoint, not an adapter: give it as the checkpoint")
    if meta["base"] != fingerprint:
        raise UserError(f"{path} was trained on another base than this checkpoint: give the checkpoint it belongs to")
    if meta["kind"] == "dora" and weight != 1:
        raise UserError(f"{path} is of kind dora, which has no weight but 1: its norms do not add up")
    quantize_base(model, meta.get("base_bits", 0))
    layers = linear_layers(model)
    paths = dict.fromkeys(name.rpartition(".")[0] for name in arrays)
    for target in paths:
        if target not in layers:
            raise UserError(f"{path} adapts {target}, which this model has not")
        if meta["kind"] == "dora" and isinstance(layers[target], Adapter):
            raise UserError(f"{path} is of kind dora, which goes on no other adapter: {target} has one; load it first")
        adapter = Adapter(layers[target], meta["rank"], meta["alpha"] * weight, meta["kind"], [0])
        for name in ("a", "b", "m"):
            if name in adapter:
                array = arrays.get(f"{target}.{name}")
                if array is None or array.shape != adapter[name].shape:
                    shape = "no array" if array is None else f"shape {array.shape}"
                    raise UserError(f"{path}: {target}.{name} has {shape}, but {adapter[name].shape} fits this model")
                adapter[name] = array
        replace_module(model, target, adapter)
    model.freeze()
    return meta


def quantize_base(model: GPT, bits: int):
    """Pack the dense linear layers of the blocks, 64 numbers a scale; 0 leaves them."""
    if not bits:
        return
    if bits not in (2, 3, 4, 5, 6, 8):
        raise UserError(f"base_bits={bits} is not one of 2, 3, 4, 5, 6, 8")
    nn.quantize(model, group_size=64, bits=bits, class_predicate=lambda path, module: (
        path in linear_layers(model) and path != "head" and type(module) is nn.Linear
        and module.weight.shape[1] % 64 == 0))
