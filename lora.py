"""Adapters for fine-tuning: LoRA, rsLoRA and DoRA on any linear layer, quantized or not.

    attach(model, "attn, mlp", rank=8, alpha=16)               # freezes the base; A and B (and m) are trained
    save_adapter("adapter.safetensors", model, bases=["ckpt.safetensors"])
    model, meta = load_adapted("adapter.safetensors")          # the base is found; several adapters add up
    merge(model)                                               # folds the adapters into the weights

    lora    W x + s B A x                       s = alpha / rank        (Hu et al. 2021)
    rslora  W x + s B A x                       s = alpha / sqrt(rank)  (Kalajdzievski 2023)
    dora    m (W + s B A) x / ||W + s B A||     s = alpha / rank        (Liu et al. 2024)

||.|| is the norm of each row, a constant for the gradient. B starts at 0 and m at ||W||, so that a new adapter does not
change the model. On a quantized base this is QLoRA (Dettmers et al. 2023), with MLX's affine integers instead of NF4:
the integers stay packed and frozen, and the gradient of a layer's input is computed from them.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

import quantized
from config import UserError
from model import (
    GPT,
    VERSION,
    Embedding,
    Linear,
    give_one_of,
    load_arrays,
    load_checkpoint,
    maker_of,
    other_kind,
    save_arrays,
)
from packing import check_finite, matrices
from quantized import BITS, replace_module
from readers import FUSED, GEMMAS, NAMES, family_of, fused_rows, join, names_of, split, their_name, title_of
from run_folder import describe, newest_result, read_header
from tokenizer import Tokenizer

KINDS = ("lora", "rslora", "dora")


class Adapter(nn.Module):
    """A linear layer `base` with an adapter. The adapter's parameters are a (rank, in), b (out, rank) and, for dora,
    m (out,). They are cast to the dtype of the input, so that float32 parameters can be trained in bfloat16."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, kind: str, seed: list[int]):
        super().__init__()
        outputs, inputs = dense_shape(base)
        self.base, self.kind, self.alpha = base, kind, alpha
        self.scale = alpha / (math.sqrt(rank) if kind == "rslora" else rank)
        bound = inputs ** -0.5  # Kaiming's uniform distribution, as in PEFT
        self.a = mx.array(np.random.default_rng(seed).uniform(-bound, bound, (rank, inputs)).astype(np.float32))
        self.b = mx.zeros((outputs, rank))
        if kind == "dora":
            self.m = row_norms(base)
            self._norms = self.m  # of the base's rows; "_": not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        a, b, y = self.a.astype(x.dtype), self.b.astype(x.dtype), self.base(x)
        change = (self.scale * (x @ a.T)) @ b.T
        if self.kind != "dora":
            return y + change
        bias = 0 if self.bias is None else self.bias.astype(x.dtype)
        return (y - bias + change) * (self.m / mx.stop_gradient(self.norms(a, b))).astype(x.dtype) + bias

    def norms(self, a: mx.array, b: mx.array) -> mx.array:
        """||W + s B A|| of each row (out,), float32, by products with A and B alone: the square is
        ||W||^2 + 2 s b (A W^T) + s^2 b A A^T b^T for a row b of B."""
        bias = 0 if self.bias is None else self.bias.astype(a.dtype)
        cross = (self.base(a) - bias).astype(mx.float32).T  # W A^T (out, rank)
        a, b, s = a.astype(mx.float32), b.astype(mx.float32), self.scale
        square = mx.square(self._norms) + 2 * s * (b * cross).sum(1) + s * s * ((b @ (a @ a.T)) * b).sum(1)
        return mx.sqrt(mx.maximum(square, 1e-12))

    def merged(self) -> Linear:
        """A dense linear layer with the weight that the adapter gives."""
        weight = dense_weight(self.base) + self.scale * self.b.astype(mx.float32) @ self.a.astype(mx.float32)
        if self.kind == "dora":
            weight = weight * (self.m / mx.linalg.norm(weight, axis=1))[:, None]
        linear = Linear(*weight.shape[::-1], bias=self.bias is not None)
        linear.weight = weight.astype(self.b.dtype)
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    @property
    def bias(self) -> mx.array | None:
        return self.base.bias if isinstance(self.base, Adapter) else self.base.get("bias")


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, with or without adapters, quantized or not."""
    return quantized.dense_shape(linear) if not isinstance(linear, Adapter) else dense_shape(linear.base)


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight (out, in) of a linear layer, with its adapters folded in, in float32."""
    if isinstance(linear, Adapter):
        return linear.merged().weight.astype(mx.float32)
    return quantized.dense_weight(linear)


def row_norms(linear: nn.Module) -> mx.array:
    return mx.linalg.norm(dense_weight(linear), axis=1)


# ---- attach, merge ---------------------------------------------------------------------------------------------------


def linear_layers(model: GPT) -> dict[str, nn.Module]:
    """The linear layers by path (blocks.0.attn.q, ...), those with an adapter as Adapter. Routers and their predictors
    are left out."""
    found = {}
    for path, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
        linear = isinstance(module, (nn.Linear, nn.QuantizedLinear, Adapter))
        if linear and not re.search(r"\.base\b|router$|predictor$", path):
            found[path] = module
    return found


def attach(model: GPT, targets: str = "attn, mlp", rank: int = 8, alpha: float = 16, kind: str = "lora",
           seed: int = 0) -> list[str]:
    """Freeze the model, and put an adapter on every linear layer whose path matches one of the targets: regular
    expressions separated by commas ("attn, mlp": all of the blocks; "attn.(q|v)$": those of Hu et al.). Returns the
    paths."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if rank < 1:
        raise UserError(f"rank={rank}: it must be 1 or more")
    layers, chosen = linear_layers(model), set()
    for target in filter(None, (part.strip() for part in targets.split(","))):
        try:
            matching = {path for path in layers if re.search(target, path)}
        except re.error as error:
            raise UserError(f"target {target!r} is not a regular expression ({error})") from error
        if not matching:
            names = sorted({re.sub(r"^blocks\.\d+\.", "", path) for path in layers})
            raise UserError(f"target {target!r} matches no linear layer: they are {', '.join(names)}")
        chosen |= matching
    if not chosen:
        raise UserError("there are no targets: name some layers, such as attn")
    model.freeze()
    paths = [path for path in layers if path in chosen]
    for i, path in enumerate(paths):
        replace_module(model, path, Adapter(layers[path], rank, alpha, kind, [seed, i]))
        adapter = linear_layers(model)[path]
        adapter.freeze()
        adapter.unfreeze(keys=["a", "b", "m"], recurse=False)
    return paths


def merge(model: GPT):
    """Fold all adapters into the weights. A quantized layer with an adapter becomes a dense one."""
    for path, module in linear_layers(model).items():
        if isinstance(module, Adapter):
            replace_module(model, path, module.merged())
    for module in whole_modules(model).values():
        del module.whole


@contextlib.contextmanager
def without_adapters(model: GPT):
    """Inside, the model computes without the adapters that attach() put on it: it is their base, packed or not, and so
    the reference of a run that trains them. No weight is copied."""
    adapters = {path: module for path, module in linear_layers(model).items() if isinstance(module, Adapter)}
    for path, module in adapters.items():
        replace_module(model, path, module.base)
    try:
        yield
    finally:
        for path, module in adapters.items():
            replace_module(model, path, module)


def whole_modules(model: GPT) -> dict[str, nn.Module]:
    """The modules, by path, that an adapter replaced as a whole (PEFT's modules_to_save)."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "whole")}


def replace_whole(model: GPT, path: str, target: str, found: dict[str, mx.array]):
    """Give a module of the model, at the path `target`, the weight, and the bias, that are `found` in an adapter; path:
    its file, for errors. Where the embedding is tied and one of the two is replaced, the unembedding becomes a layer
    of its own."""
    if target in ("embed", "head") and model.config.tie:
        weight = model.embed.weight if "scales" not in model.embed else dense_weight(model.embed)
        model.head = Linear(*weight.shape[::-1], bias=False)
        model.head.weight = weight
        model.config = replace(model.config, tie=False)
    module = dict(model.named_modules()).get(target)
    if module is None or not isinstance(module, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding,
                                                 nn.RMSNorm, nn.LayerNorm)):
        raise UserError(f"{path} holds {target} as a whole, which this model lacks, or adapts too: give the adapter's "
                        "own base")
    parts = {"weight": mx.zeros(quantized.dense_weight(module).shape)} if "scales" in module else module.parameters()
    for part, array in found.items():
        if part not in parts and part not in module or array.shape != parts.get(part, module.get(part)).shape:
            raise UserError(f"{path}: {target}.{part} has shape {array.shape}, which does not fit this model")
    if "scales" in module:
        dense = Linear(1, 1, bias=False) if isinstance(module, nn.QuantizedLinear) else Embedding(1, 1)
        if "bias" in module:
            dense.bias = module.bias
        replace_module(model, target, dense)
        module = dense
    module.update(found)
    module.whole = True


# ---- files, and quantizing the base ----------------------------------------------------------------------------------


def base_fingerprint(model: GPT) -> str:
    """A hash of the model's weights without adapters, which identifies the base of an adapter. Take it before a change
    of dtype and before quantize_base(), which change the weights."""
    digest, own = hashlib.sha256(), adapter_arrays(model)
    arrays = {name.replace(".base", ""): p for name, p in tree_flatten(model.parameters())
              if name not in own and not re.search(r"\.base\.[abm]$", name)}
    for name, p in sorted(arrays.items()):
        digest.update(f"{name} {p.dtype} {p.shape} ".encode())
        digest.update(np.array(p.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def adapter_arrays(model: GPT) -> dict[str, mx.array]:
    """The parameters of the adapters by path: blocks.0.attn.q.a, ...; and of modules that they replace as a whole."""
    whole = {f"{path}.{name}": module[name] for path, module in whole_modules(model).items()
             for name in ("weight", "bias") if name in module}
    return whole | {f"{path}.{name}": module[name] for path, module in linear_layers(model).items()
                    if isinstance(module, Adapter) for name in ("a", "b", "m") if name in module}


def save_adapter(path: str, model: GPT, meta: dict | None = None, fingerprint: str | None = None,
                 bases: Sequence[str] = (), more: dict[str, mx.array] | None = None):
    """Write the adapters alone, which must be of one kind, rank and alpha. meta: more for the header, as JSON, with
    "base_bits", the bits that the base was quantized to before. fingerprint: of the base, from base_fingerprint() or
    load_adapted(); None: of the model as it is. bases: the files by which load_adapted() finds the base: a checkpoint
    or an adapter, and adapters for it as PATH or PATH:WEIGHT. more: further arrays."""
    adapters = [module for module in linear_layers(model).values() if isinstance(module, Adapter)]
    facts = {(module.kind, len(module.a), module.alpha) for module in adapters}
    if len(facts) != 1 or any(isinstance(module.base, Adapter) for module in adapters):
        raise UserError("a file holds adapters of one kind, rank and alpha, one for each layer: merge the others first")
    kind, rank, alpha = facts.pop()
    header = {"kind": kind, "rank": rank, "alpha": alpha, **(meta or {}), "version": VERSION, "adapter": True,
              "base": fingerprint or base_fingerprint(model)}
    if bases:  # relative to the folder of the adapter, so that a tree of folders can be moved
        folder = os.path.realpath(os.path.dirname(path))
        real = [os.path.join(os.path.realpath(os.path.dirname(base)), os.path.basename(base)) for base in bases]
        header["bases"] = [os.path.relpath(base, folder) for base in real]
    save_arrays(path, adapter_arrays(model) | (more or {}), header)


def save_merged(path: str, model: GPT, meta: dict, more: dict[str, mx.array] | None = None):
    """Write the model as a checkpoint with its adapters folded in. The model itself is unchanged. more: further
    arrays."""
    layers = linear_layers(model)
    adapted = {path: module.merged() for path, module in layers.items() if isinstance(module, Adapter)}
    arrays = {name: p for name, p in tree_flatten(model.parameters())
              if not any(name.startswith(f"{layer}.") for layer in adapted)}
    arrays |= {f"{layer}.{name}": p for layer, linear in adapted.items() for name, p in linear.parameters().items()}
    save_arrays(path, arrays | (more or {}), {**meta, "version": VERSION, "config": asdict(model.config)})


def load_adapted(path: str, adapters: Sequence[str] = (), reward: bool = False) -> tuple[GPT, dict]:
    """A checkpoint with adapters attached: (model, meta). path: a checkpoint, or an adapter file, whose base is found
    through its header. adapters: more of them, each PATH or PATH:WEIGHT. Adapters with an equal base add up. Before an
    adapter that was trained on a model with adapters, these are merged.

    meta is the checkpoint's, with "template" and "chat" of the last adapter that names a template, "files", all paths
    that were read, and if there are adapters "fingerprint", which identifies this model as the base of another
    adapter. reward: the file is one of reward.py, whose vector becomes meta["reward"]; else such a file is refused."""
    checkpoint, chain = chain_of(path)
    n_found = len(chain)
    chain += [path_and_weight(adapter) for adapter in adapters]
    model, meta = load_checkpoint(checkpoint, reward and not n_found)
    check_finite(checkpoint, dict(tree_flatten(model.parameters())))
    if meta.get("tokenizer") and Tokenizer.from_dict(meta["tokenizer"]).n_vocab > model.config.vocab_size:
        raise UserError(f"{checkpoint} has a tokenizer with more tokens than its vocab_size={model.config.vocab_size}: "
                        "copy or train it again")
    meta["files"] = [checkpoint, *(path for path, _ in chain)]
    base = fingerprint = base_fingerprint(model) if chain else ""  # of the model without, and with, what is attached
    for i, (path, weight) in enumerate(chain):
        modules, own = read_adapter(path, model, meta, reward and i == n_found - 1)
        if own.get("base", base) != base:  # a folder of PEFT's does not identify its base
            if own["base"] != fingerprint:
                raise UserError(another_base(path, own, i < n_found))
            merge(model)
            base = fingerprint
        add_adapter(model, path, modules, own, weight)
        fingerprint = adapted_fingerprint(fingerprint, modules, own, weight)
        if own.get("template") not in (None, meta.get("template")):
            meta |= {"template": own["template"], "chat": own.get("chat")}  # the base's "chat" is of another template
        if "reward" in own:
            meta["reward"] = own["reward"]
    if chain:
        meta["fingerprint"] = fingerprint
    return model, meta


def chain_of(path: str) -> tuple[str, list[tuple[str, float]]]:
    """The checkpoint under an adapter file, and the adapters to load onto it in turn as (path, weight), of which this
    file is the last. A checkpoint has none."""
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(f"{path} is an adapter of PEFT's, which does not tell its base: give the checkpoint, and "
                        f"--adapter={shlex.quote(path)}")
    chain, seen = [], set()
    while (header := read_header(path)).get("adapter"):
        bases = bases_of(path, header)
        beside = [path_and_weight(base) for base in bases[1:]]
        chain = [*beside, (path, 1.0), *chain]
        seen.add(os.path.realpath(path))
        given = (f"{adapter}:{weight}" if weight != 1 else adapter for adapter, weight in chain)
        to_do = f"give the checkpoint, and {' '.join(f'--adapter={shlex.quote(adapter)}' for adapter in given)}"
        if not bases:
            raise UserError(f"{path} is an adapter that does not tell where its base is: {to_do}")
        for base in (bases[0], *(adapter for adapter, _ in beside)):
            if not os.path.exists(base):
                raise UserError(f"{path} was trained on {base}, which is missing: {to_do}")
        if os.path.realpath(bases[0]) in seen:
            raise UserError(f"{path} names {bases[0]} as its base, which is or needs {path} itself: {to_do}")
        path = bases[0]
    return path, chain


def bases_of(path: str, header: dict) -> list[str]:
    """The files that make the base of an adapter, as its header names them: a checkpoint or an adapter, and adapters
    as PATH or PATH:WEIGHT. Files of earlier code name a checkpoint relative to the current folder, or nothing."""
    bases, settings = header.get("bases"), header.get("settings")
    if isinstance(bases, list) and bases and all(isinstance(base, str) for base in bases):
        folder = os.path.dirname(os.path.realpath(path))
        bases = [os.path.normpath(os.path.join(folder, base)) for base in bases]
        return [min(base, os.path.relpath(base), key=len) for base in bases]
    checkpoint = settings.get("checkpoint") if isinstance(settings, dict) else None
    return [checkpoint] if isinstance(checkpoint, str) else []


def path_and_weight(adapter: str) -> tuple[str, float]:
    """PATH or PATH:WEIGHT -> (path, weight)."""
    path, colon, text = adapter.rpartition(":")
    try:
        weight = float(text) if colon else 1.0
    except ValueError:  # the colon is part of the path
        return adapter, 1.0
    if not math.isfinite(weight):
        raise UserError(f"{adapter}: the weight of an adapter must be a finite number")
    return (path, weight) if colon else (adapter, 1.0)


def another_base(path: str, meta: dict, found: bool) -> str:
    """The line for an adapter of another base than this. found: this one was found through the adapter's header.
    UserError where the base that the header names cannot be loaded, either."""
    bases = bases_of(path, meta)
    if found:
        held = " + ".join(describe(path_and_weight(base)[0]) for base in bases)
        return (f"{path} was trained on {' + '.join(bases)}, which has changed since then, to {held}: put the old file "
                "back, or tune again")
    if not bases:
        return f"{path} was trained on another base than this checkpoint: give its own base"
    for base, _ in map(path_and_weight, bases):
        if not os.path.exists(base):
            return f"{path} was trained on another base, {base}, which is missing: put it back, or tune again"
    load_adapted(path)
    return (f"{path} was trained on another base, {' + '.join(bases)}: give {path} as the checkpoint, and its base is "
            "found")


def adapted_fingerprint(fingerprint: str, modules: dict[str, dict], meta: dict, weight: float) -> str:
    """The fingerprint of a model to which an adapter is added. It is made from what the files hold, not from merged
    weights, whose last bits depend on the machine."""
    facts = [fingerprint, meta.get("base"), meta["kind"], meta.get("base_bits", 0), float(weight)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for target, found in sorted(modules.items()):
        digest.update(f"{target} {float(found.get('alpha', 1))} ".encode())
        for name, array in sorted(found.items()):
            if name != "alpha":
                digest.update(f"{name} {array.dtype} {array.shape} ".encode())
                digest.update(np.array(array.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def read_adapter(path: str, model: GPT, base: dict, reward: bool = False) -> tuple[dict[str, dict], dict]:
    """The arrays a, b, m and the alpha for each linear layer by path, and the meta, of an adapter file or a folder of
    PEFT's for a model, whose checkpoint has the header `base`."""
    if os.path.isdir(path):
        if "adapter_config.json" not in os.listdir(path) and newest_result(path):
            raise UserError(f"{path} is a folder, not an adapter: {give_one_of(path)}")
        return read_peft(path, model, base)
    if not os.path.exists(path):
        script = "dpo.py" if maker_of(path) == "dpo.py" else "sft.py"
        raise UserError(f"no adapter at {path}: train one with `python {script}`, or check the name")
    arrays, meta = load_arrays(path)
    check_finite(path, arrays)
    if "reward" in meta and not reward:
        raise UserError(other_kind(path, arrays, meta))
    if "reward" in meta:
        meta["reward"] = arrays.pop("reward.weight", None)
    if not meta.get("adapter"):
        raise UserError(f"{path} is a checkpoint, not an adapter: give it as --checkpoint" if "config" in meta else
                        other_kind(path, arrays, meta))
    alpha, bits = meta.get("alpha"), meta.get("base_bits", 0)
    if (meta.get("kind") not in KINDS or type(alpha) not in (int, float) or not -1e30 < alpha < 1e30
            or not isinstance(meta.get("base"), str) or type(bits) is not int):
        raise UserError(f"{path} has no kind, alpha or base in its header that can be read: copy or train it again")
    modules = {}
    for name, array in arrays.items():
        target, _, part = name.rpartition(".")
        modules.setdefault(target, {"alpha": alpha} if part in ("a", "b", "m") else {})[part] = array
    return modules, meta


def add_adapter(model: GPT, path: str, modules: dict[str, dict], meta: dict, weight: float):
    """Put an adapter that read_adapter() gave onto a model. path: for errors."""
    if meta["kind"] == "dora" and weight != 1:
        raise UserError(f"{path} is of kind dora, which can have no weight but 1: leave out the weight")
    quantize_base(model, meta.get("base_bits", 0))
    whole = [target for target, found in modules.items() if "weight" in found]
    if whole and weight != 1:
        raise UserError(f"{path} holds {whole[0]} as a whole, and can have no weight but 1: leave out the weight")
    for target in whole:
        replace_whole(model, path, target, modules[target])
    layers = linear_layers(model)
    for target, found in modules.items():
        if target in whole:
            continue
        if target not in layers:
            raise UserError(f"{path} adapts {target}, which this model lacks: give the adapter's own base")
        if meta["kind"] == "dora" and isinstance(layers[target], Adapter):
            raise UserError(f"{path} is of kind dora, and {target} already has an adapter: load dora first")
        rank = len(found["a"]) if "a" in found and found["a"].ndim else 1
        adapter = Adapter(layers[target], rank, found.get("alpha", 1) * weight, meta["kind"], [0])
        for name in ("a", "b", "m"):
            if name in adapter:
                array = found.get(name)
                if array is None or array.shape != adapter[name].shape:
                    shape = "no array" if array is None else f"shape {array.shape}"
                    raise UserError(f"{path}: {target}.{name} has {shape}, but {adapter[name].shape} fits this model")
                adapter[name] = array
        replace_module(model, target, adapter)
    model.freeze()


def quantize_base(model: GPT, bits: int):
    """Quantize the dense matrices of the blocks by rounding, in groups of 64; 0 bits: leave them as they are."""
    if not bits:
        return
    if bits not in BITS:
        raise UserError(f"base_bits={bits} is not one of {', '.join(map(str, BITS))}")
    chosen = {path for path, module in matrices(model).items() if path.startswith("blocks.")
              and "scales" not in module and module.weight.shape[-1] % 64 == 0}
    nn.quantize(model, group_size=64, bits=bits, class_predicate=lambda path, _: path in chosen)


# ---- PEFT's folders: adapter_config.json, adapter_model.safetensors --------------------------------------------------

PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "m", "weight": "weight", "bias": "bias"}


def family_here(model: GPT, header: dict) -> str:
    """The family by which PEFT names a model's layers: the one that its checkpoint was read from, by the header, else
    the one that fits the settings best."""
    found = header.get("hf")
    found = found.get("model_type") if isinstance(found, dict) else None
    return found if isinstance(found, str) and found in NAMES else family_of(model.config)


def peft_names(model: GPT, family: str) -> dict[str, list[str]]:
    """Our paths of a model's modules by their names in PEFT. A matrix there may be several modules here (FUSED), and so
    may the one norm for attention and MLP of Phi-2. Routers and experts have no name."""
    names, found = names_of(family, model.config), {}
    for path, _ in model.named_modules():
        layer, _, inner = path.removeprefix("blocks.").partition(".")
        fused = next((name for name in FUSED if name in names and inner in FUSED[name]), None)
        theirs = their_name(f"blocks.{layer}.{fused}" if fused else path, names)
        if fused:
            found[theirs] = [f"blocks.{layer}.{name}" for name in FUSED[fused]]
        elif theirs and "{}" not in theirs and inner != "mlp.router":
            found.setdefault(theirs, []).append(path)
    return found | {"lm_head": ["head"], names["head"]: ["head"]}  # may be tied; transformers 5 has lm_head everywhere


def fused_of(paths: list[str]) -> str | None:
    """attn.qkv or mlp.gate_up for the paths of the modules that one matrix holds; None for others."""
    return next((name for name, (first, *_) in FUSED.items() if len(paths) > 1 and paths[0].endswith(first)), None)


def read_peft(folder: str, model: GPT, header: dict) -> tuple[dict[str, dict], dict]:
    """The arrays a, b, m and the alpha for each linear layer of the model, by path; and a meta as save_adapter()
    writes. header: of the model's checkpoint."""
    config_path, path = (os.path.join(folder, name) for name in ("adapter_config.json", "adapter_model.safetensors"))
    for wanted in (config_path, path):
        if not os.path.exists(wanted):
            raise UserError(f"{wanted} is missing: a folder of PEFT's must hold adapter_config.json and "
                            "adapter_model.safetensors (a .bin file is a pickle, and is not read)")
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        with safe_open(path, "numpy"), open(path, "rb") as file:  # safe_open checks the header by the file's length
            arrays = mx.load(path if path.isascii() else f"/dev/fd/{file.fileno()}", format="safetensors")
            mx.eval(arrays)
        return peft_modules(config_path, config, path, arrays, model, family_here(model, header))
    except UserError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, re.error) as error:
        raise UserError(f"{folder} is not a whole adapter ({error!r}): copy the folder again") from error


def peft_modules(config_path: str, config: dict, path: str, arrays: dict[str, mx.array], model: GPT,
                 family: str) -> tuple[dict, dict]:
    """What read_peft() returns, from the contents of the two files."""
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{config_path} has peft_type {config.get('peft_type')} and bias {config.get('bias')}: only "
                        "LORA with bias none can be read")
    if re.match("pissa|olora|corda|loftq", str(start := config.get("init_lora_weights"))):
        raise UserError(f"{config_path} has init_lora_weights {start}, which changed the base's weights, too: convert "
                        "it to plain LoRA with peft (path_initial_model_for_weight_conversion)")
    kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    if kind == "dora" and config.get("use_rslora"):
        raise UserError(f"{config_path} has both use_dora and use_rslora: only one of them can be read")
    modules, names = {}, peft_names(model, family)
    for name, array in arrays.items():
        match = re.fullmatch(rf"base_model\.model\.(.+?)\.({'|'.join(map(re.escape, PARTS))})", name)
        theirs, part = match.groups() if match else ("", "")
        if is_of_base(model, names.get(theirs.removesuffix(".base_layer")), theirs, part, array):
            continue  # PEFT saves the unembedding beside an adapter for it
        if theirs not in names:
            raise UserError(f"{path} holds {name}, which is not a layer of this {title_of(family)} model: give the "
                            "adapter's own base")
        part, targets, fused = PARTS[part], names[theirs], fused_of(names[theirs])
        alpha = next((value for pattern, value in (config.get("alpha_pattern") or {}).items()
                      if re.fullmatch(rf"(.*\.)?({pattern})", theirs)), config["lora_alpha"])
        if part == "weight" and is_transposed(family, theirs, array):
            array = array.T
        if part == "weight" and family in GEMMAS and "norm" in theirs:
            array = array.astype(mx.float32) + 1  # the files hold what is added to 1
        pieces = split(model.config, family, fused, array, f"{path}: {name}") if fused and part != "a" else [
            array] * len(targets)  # the rows of a fused matrix share A
        for target, piece in zip(targets, pieces, strict=True):
            found = modules.setdefault(target, {} if part in ("weight", "bias") else {"alpha": float(alpha)})
            found[part] = piece
    check_finite(path, arrays)
    return modules, {"kind": kind, "rank": config["r"], "alpha": config["lora_alpha"]}


def is_of_base(model: GPT, paths: list[str] | None, theirs: str, part: str, array: mx.array) -> bool:
    """Whether an array in PEFT's folder is the weight or the bias, before the adapter, of the layer that it adapts."""
    if not paths or not theirs.endswith(".base_layer"):
        return False
    module = dict(model.named_modules()).get(paths[0], {})
    while isinstance(module, Adapter):
        module = module.base
    if part == "weight" and "scales" in module:  # it differs, as all quantized layers do
        return array.shape == dense_shape(module)
    return part in module and mx.array_equal(module[part], array.astype(module[part].dtype)).item()


def is_transposed(family: str, theirs: str, array: mx.array) -> bool:
    """Whether a weight is one of GPT-2's matrices (in, out)."""
    return family == "gpt2" and array.ndim == 2 and theirs.startswith(NAMES[family]["blocks."])


def save_peft(folder: str, model: GPT, header: dict):
    """Write the model's adapters, which must be of one kind, as a folder of PEFT's, by the names that layers have in
    the model's family. header: of the model's checkpoint. UserError for a layer that has no name there."""
    adapters = {path: module for path, module in linear_layers(model).items() if isinstance(module, Adapter)}
    kinds = {module.kind for module in adapters.values()}
    if len(kinds) != 1 or any(isinstance(module.base, Adapter) for module in adapters.values()):
        raise UserError("a folder of PEFT's holds adapters of one kind, one for each layer: save others as a file")
    family, whole = family_here(model, header), whole_modules(model)
    names, arrays, ranks, alphas, saved = peft_names(model, family), {}, {}, {}, []
    named = {path for paths in names.values() for path in paths}
    for path in (*adapters, *whole):
        if path not in named or family == "gpt_neox" and path == "head":  # two names, by the version of transformers
            raise UserError(f"{path} has no name in PEFT's folders for {title_of(family)}: save the adapter as a file")
    for theirs, paths in names.items():
        if any(path in adapters for path in paths):
            a, b, m, scale = peft_arrays(model, family, theirs, paths)
            ranks[theirs], alphas[theirs] = len(a), scale * (math.sqrt(len(a)) if "rslora" in kinds else len(a))
            found = {"lora_A.weight": a, "lora_B.weight": b} | ({} if m is None else {"lora_magnitude_vector": m})
        elif any(path in whole for path in paths):
            found = peft_whole(model, family, theirs, paths)
            saved.append(theirs)
        else:
            continue
        arrays |= {f"base_model.model.{theirs}.{part}": mx.contiguous(array) for part, array in found.items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": max(ranks.values()), "rank_pattern": ranks,
              "lora_alpha": max(alphas.values()), "alpha_pattern": alphas, "target_modules": sorted(ranks),
              "lora_dropout": 0.0, "bias": "none", "use_dora": "dora" in kinds, "use_rslora": "rslora" in kinds,
              "fan_in_fan_out": family == "gpt2", "inference_mode": True, "base_model_name_or_path": None,
              "modules_to_save": saved or None}
    wanted = {name: os.path.join(folder, name) for name in ("adapter_model.safetensors", "adapter_config.json")}
    temporary = {name: f"{path}.tmp{os.getpid()}" for name, path in wanted.items()}
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary["adapter_model.safetensors"], "wb") as file, \
                open(temporary["adapter_config.json"], "w") as config_file:
            mx.save_safetensors(file, arrays, {"format": "pt"})
            json.dump(config, config_file, indent=1)
            for written in (file, config_file):
                written.flush()
                os.fsync(written.fileno())
        for name, path in wanted.items():
            os.replace(temporary[name], path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; what was there is unharmed") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                os.remove(path)


def peft_arrays(model: GPT, family: str, theirs: str, paths: list[str]) -> tuple:
    """A, B, m (None but for dora) and the scale of the adapter for the matrix that PEFT knows as `theirs`. For one that
    holds q, k and v, or gate and up, the As are stacked, and B is block-diagonal."""
    layers = linear_layers(model)
    modules = [layers.get(path) for path in paths]
    adapted = [module for module in modules if isinstance(module, Adapter)]
    kind, scale = adapted[0].kind, adapted[0].scale
    if not (fused := fused_of(paths)):
        return adapted[0].a, adapted[0].b, adapted[0].get("m"), scale
    rows = [module and dense_shape(module)[0] for module in modules]
    if rows != fused_rows(model.config, family, fused) or {*paths} & {*whole_modules(model)}:
        raise UserError(f"{paths[0]} has no name in PEFT's folders, since {theirs} of {title_of(family)} holds "
                        f"{' and '.join(paths[1:])} too, which differ: save the adapter as a file")
    columns = [[module.b * (module.scale / scale) if module is other else mx.zeros((n, len(other.a)))
                for other in adapted] for module, n in zip(modules, rows, strict=True)]
    b = join(model.config, family, [mx.concatenate(row, axis=1) for row in columns])
    m = [module.get("m") if isinstance(module, Adapter) else row_norms(module) for module in modules]
    return (mx.concatenate([module.a for module in adapted]), b,
            join(model.config, family, m) if kind == "dora" else None, scale)


def peft_whole(model: GPT, family: str, theirs: str, paths: list[str]) -> dict[str, mx.array]:
    """The weight, and the bias, of what PEFT knows as `theirs`, and the model's adapter replaced as a whole."""
    whole, found, fused = whole_modules(model), {}, fused_of(paths)
    modules = [whole.get(path) for path in paths]
    for part in ("weight", "bias"):
        each = [module[part] for module in modules if module and part in module]
        if not each and None not in modules:
            continue
        if len(each) < len(paths) or not fused and not all(mx.array_equal(each[0], array) for array in each):
            raise UserError(f"{paths[0]} has no name in PEFT's folders, since {theirs} of {title_of(family)} is "
                            f"{' and '.join(paths[1:])} too, which differ: save the adapter as a file")
        array = join(model.config, family, each) if fused else each[0]
        if family in GEMMAS and "norm" in theirs:
            array = array.astype(mx.float32) - 1
        found[part] = array.T if is_transposed(family, theirs, array) else array
    return found


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run sft.py, which uses it", file=sys.stderr)
    sys.exit(2)
