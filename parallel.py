"""Several devices that share out what one device would keep whole: mlx.launch -n 4 -- python train.py --parallel=fsdp.

""        every process computes a part of the batch; gradients are summed in buckets of 32 MiB (Li et al. 2020)
zero1     and each keeps the optimizer's states for 1/n of every parameter (Rajbhandari et al. 2020, stage 1)
fsdp      and 1/n of every parameter; a block's parameters are gathered when the block is computed (stage 3)
tensor    each keeps and computes a part of every matrix, for the whole batch (Shoeybi et al. 2019). With --slices=t,
          t processes share a matrix, and n / t groups of them compute parts of the batch
pipeline  each keeps some of the blocks; the micro-steps of an update pass through them (Huang et al. 2019)

Losses and weights are those of one process, and a checkpoint holds whole arrays, so that a run may go on with another
number of processes, another mode, or one process. Deleting this file leaves sums of gradients, in MLX's own buckets.

Sums wait for the backward pass. A stream of their own would let them run beside it, but with several streams in one
evaluation MLX signals by kernels and by memory whose release waits for the GPU. Between two cards that cost 6 ms a
step, and the sums take 1.4.
"""
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import model as plain
from config import UserError
from model import GPT, LOSS_CHUNK, GPTConfig, check_known, chunked_loss, no_tap
from muon import Muon

MODES = ("", "zero1", "fsdp", "tensor", "pipeline")
# Instead of an axis: FLAT cuts an array's numbers, in one row with zeros behind, into n equal parts. A process does not
# keep what is ELSEWHERE.
FLAT, ELSEWHERE = "flat", "elsewhere"


@dataclass
class Shares:
    """What this process keeps of each parameter, and which rows of a batch it computes."""
    mode: str
    model: GPT
    config: GPTConfig                  # of the whole model
    group: mx.distributed.Group        # its processes share out the parameters
    others: mx.distributed.Group       # its processes share out the rows of a batch
    dtype: mx.Dtype                    # of the gradients and parameters that are sent
    shapes: dict[str, tuple]           # of the whole parameters, by name
    axes: dict[str, int | str | None]  # along which a parameter is cut; None: each process has all of it
    states: dict[str, mx.array]        # zeros like the optimizer's whole arrays, which are never computed
    scatters: bool                     # whether the backend has sum_scatter, and
    sends: bool                        # send


def share(mode: str, model: GPT, opt: optim.Optimizer | None, world: mx.distributed.Group, slices: int = 0,
          dtype: mx.Dtype = mx.float32) -> Shares:
    """Keep this process's share of a model and of its optimizer's state, in place, and train it as the mode says. They
    were made as for one process; opt is None where nothing trains. UserError for settings that
    the mode does not know."""
    n, names = world.size(), dict(tree_flatten(model.parameters()))
    if mode not in MODES:
        raise UserError(f"parallel={mode!r} is not one of {', '.join(MODES[1:])}")
    slices = slices or n
    if n % slices or slices != n and mode != "tensor":
        raise UserError(f"slices={slices} needs --parallel=tensor, and it must divide the {n} processes")
    group, others = subgroups(world, slices) if mode == "tensor" else (world, world)
    if mode == "pipeline":
        others = Some(world, [world.rank()])
    shares = Shares(mode, model, model.config, group, others, dtype, {name: p.shape for name, p in names.items()},
                    dict.fromkeys(names), {}, *backend(world))
    if mode == "tensor":
        split_matrices(shares)
    elif mode == "pipeline":
        keep_stage(shares)
    elif mode in ("zero1", "fsdp"):
        shares.axes.update(dict.fromkeys((name for name, _ in tree_flatten(model.trainable_parameters())), FLAT))
    if mode == "fsdp":
        model.update(alone(own(shares, model.trainable_parameters())))
        model.__class__ = GatheringGPT
    model._shares = shares
    for moe in (block.mlp for block in model.blocks if "router" in block.get("mlp", {})):
        if others.size() > 1 and moe.config.expert_balance == "loss":  # Switch's loss is a product of means of all rows
            moe.over_processes = lambda count: summed(count, others) / others.size()
    if not opt:
        return shares
    for muon in getattr(opt, "optimizers", [opt]):
        if isinstance(muon, Muon) and mode == "pipeline":
            muon.group = None  # each process has other matrices
        elif isinstance(muon, Muon) and mode:
            muon.whole, muon.own = partial(whole, shares), partial(own, shares)
    shares.states = {name: mx.zeros(x.shape, x.dtype) for name, x in tree_flatten(opt.state)}
    opt.state = kept(opt.state, lambda name, x: own_part(x, shares.axes.get(name_of(name, shares)), group))
    opt.state = alone(opt.state)
    return shares


# ---- groups of processes ---------------------------------------------------------------------------------------------


class Some:
    """Some of the processes, on a backend that cannot split a group: all send to all, and most of it is dropped."""

    def __init__(self, world: mx.distributed.Group, ranks: list[int]):
        self.world, self.ranks = world, ranks

    def rank(self) -> int:
        return self.ranks.index(self.world.rank())

    def size(self) -> int:
        return len(self.ranks)


def subgroups(world: mx.distributed.Group, slices: int) -> tuple:
    """The group of `slices` neighbours of this process, and the group of those at its place among their neighbours."""
    rank, n = world.rank(), world.size()
    neighbours, places = range(rank // slices * slices, (rank // slices + 1) * slices), range(rank % slices, n, slices)
    if slices == n:
        return world, Some(world, [rank])
    try:
        return world.split(rank // slices), world.split(rank % slices)
    except (RuntimeError, ValueError):
        return Some(world, list(neighbours)), Some(world, list(places))


def backend(world: mx.distributed.Group) -> tuple[bool, bool]:
    """Whether this backend has sum_scatter, and send. Every process must call it."""
    n, rank, found = world.size(), world.rank(), []

    def send():  # each even rank to the next one, if there is one
        if rank % 2:
            return mx.distributed.recv((1,), mx.float32, rank - 1, group=world)
        return mx.distributed.send(mx.zeros(1), rank + 1, group=world) if rank + 1 < n else mx.zeros(1)

    for call in (lambda: mx.distributed.sum_scatter(mx.zeros(n), group=world), send):
        try:
            mx.eval(call())
            found.append(True)
        except (RuntimeError, ValueError):
            found.append(False)
    return tuple(bool(x) for x in gathered(mx.array(found, mx.int32), world).min(0).tolist())  # the same ones for all


def gathered(x: mx.array, group) -> mx.array:
    """(...) of each process -> (n, ...). Its gradient is the own part of the cotangent."""
    if group.size() == 1:
        return x[None]
    if isinstance(group, Some):
        return mx.distributed.all_gather(x[None], group=group.world)[mx.array(group.ranks)]
    return mx.distributed.all_gather(x[None], group=group)


def summed(x: mx.array, group) -> mx.array:
    """The sum over processes. Its gradient is the cotangent."""
    if group.size() == 1 or isinstance(group, Some):
        return gathered(x, group).sum(0)
    return mx.distributed.all_sum(x, group=group)


def copied(x: mx.array, group) -> mx.array:
    """x, of which every process makes another use: its gradient is the sum of theirs."""
    @mx.custom_function
    def forward(x):
        return mx.stop_gradient(x)

    @forward.vjp
    def backward(primals, cotangent, _):
        return summed(cotangent, group)

    return forward(x)


# ---- parts of arrays -------------------------------------------------------------------------------------------------


def own_part(x: mx.array, axis: int | str | None, group) -> mx.array | None:
    """This process's part of an array. FLAT gives (1, ..., 1, ceil(size / n)), with as many axes as x."""
    n, rank = group.size(), group.rank()
    if axis == FLAT:
        each = -(-x.size // n)
        flat = x.reshape(-1) if x.size == each * n else mx.pad(x.reshape(-1), (0, each * n - x.size))
        return flat[rank * each:(rank + 1) * each].reshape(*[1] * (x.ndim - 1), each)
    if axis == ELSEWHERE:
        return None
    return x if axis is None else mx.split(x, n, axis=axis)[rank]


def alone(parts: dict) -> dict:
    """Copies of parts, so that they do not keep the memory of the whole arrays of which they are views."""
    return tree_map(lambda part: part * mx.array(1, part.dtype), parts)


def in_rows(arrays: list[mx.array], dtype: mx.Dtype, n: int = 1) -> mx.array:
    """(n, numbers): row r has the r-th of n equal parts (FLAT) of each array, one behind the other, in a dtype."""
    if plain.gpu_train and (rows := plain.gpu_train.in_rows(arrays, dtype, n)) is not None:
        return rows
    rows = [mx.pad(x.reshape(-1), (0, -x.size % n)) if x.size % n else x for x in arrays]
    return mx.concatenate([x.astype(dtype).reshape(n, -1) for x in rows], axis=1)


def from_rows(rows: mx.array, shapes: list[tuple], dtype: mx.Dtype) -> list[mx.array]:
    """The arrays of these shapes that in_rows() put into rows."""
    if plain.gpu_train and (arrays := plain.gpu_train.from_rows(rows, shapes, dtype)) is not None:
        return arrays
    pieces = in_pieces(rows, [-(-math.prod(shape) // len(rows)) for shape in shapes])
    return [piece.reshape(-1)[:math.prod(shape)].astype(dtype).reshape(shape)
            for piece, shape in zip(pieces, shapes, strict=True)]


def joined(pieces: mx.array, axis: int, shape: tuple) -> mx.array:
    """The whole array of this shape from the parts along an axis of all processes, (n, size of a part)."""
    part = [*shape[:axis], shape[axis] // len(pieces), *shape[axis + 1:]]
    return mx.moveaxis(pieces.reshape(len(pieces), *part), 0, axis).reshape(shape)


def joined_all(parts: list[mx.array], axes: list, shapes: list, group) -> list[mx.array]:
    """The whole arrays of these shapes from this process's parts, in one gather for each dtype."""
    found = list(parts)
    for dtype in dict.fromkeys(part.dtype for part in parts):
        flat, cut = ([i for i, part in enumerate(parts) if part.dtype == dtype and axes[i] is not None
                      and (axes[i] == FLAT) == is_flat] for is_flat in (True, False))
        for at in filter(None, (flat, cut)):
            rows = gathered(in_rows([parts[i] for i in at], dtype)[0], group)
            if at is flat:
                arrays = from_rows(rows, [shapes[i] for i in at], dtype)
            else:
                pieces = in_pieces(rows, [parts[i].size for i in at])
                arrays = [joined(piece, axes[i], shapes[i]) for i, piece in zip(at, pieces, strict=True)]
            for i, array in zip(at, arrays, strict=True):
                found[i] = array
    return found


def in_pieces(x: mx.array, sizes: list[int]) -> list[mx.array]:
    """x cut along its last axis into pieces of these sizes."""
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes) - 1)]
    return mx.split(x, ends, axis=-1) if ends else [x]


def kept(tree, f, path: str = ""):
    """tree_map_with_path(f, tree) without the leaves for which f gives None, as tree_unflatten() would make it."""
    if isinstance(tree, list):
        found = [kept(value, f, f"{path}.{i}") for i, value in enumerate(tree)]
        while found and found[-1] is None:
            found.pop()
        return [{} if value is None else value for value in found] or None
    if isinstance(tree, dict):
        found = {name: kept(value, f, f"{path}.{name}") for name, value in tree.items()}
        return {name: value for name, value in found.items() if value is not None} or None
    return f(path[1:], tree)


def own(shares: Shares, tree: dict) -> dict:
    """This process's parts of whole parameters, or of their gradients."""
    return kept(tree, lambda name, x: own_part(x, shares.axes[name], shares.group))


def whole(shares: Shares, tree: dict) -> dict:
    """Whole parameters, or gradients, from the parts of all processes, which must all call it."""
    names, parts = zip(*tree_flatten(tree), strict=True)
    axes, shapes = [shares.axes[name] for name in names], [shares.shapes[name] for name in names]
    return tree_unflatten(list(zip(names, joined_all(parts, axes, shapes, shares.group), strict=True)))


def whole_model(shares: Shares) -> GPT:
    """The model with all of its parameters, as a checkpoint has them. Every process must call it."""
    if shares.mode in ("", "zero1"):
        return shares.model
    model, arrays = GPT(shares.config, seed=None), shares.model.parameters()
    if shares.mode == "pipeline":
        names = dict(tree_flatten(model.parameters()))
        arrays = tree_unflatten(list(of_stages(shares, dict(tree_flatten(arrays)), names).items()))
    else:
        arrays = whole(shares, arrays)
    model.update(arrays)
    return model


def name_of(state: str, shares: Shares) -> str:
    """The parameter to which an array of an optimizer's state belongs, "" for none: its name is within the state's."""
    parts = state.split(".")[:-1]
    return next((path for i in range(len(parts)) if (path := ".".join(parts[i:])) in shares.shapes), "")


def whole_state(shares: Shares, state: dict) -> dict:
    """An optimizer's state by name, as a checkpoint has it. Every process must call it."""
    arrays = dict(tree_flatten(state))
    if shares.mode == "pipeline":
        return of_stages(shares, arrays, shares.states)
    axes = [shares.axes.get(name_of(name, shares)) for name in arrays]
    shapes = [shares.states[name].shape for name in arrays]
    return dict(zip(arrays, joined_all(list(arrays.values()), axes, shapes, shares.group), strict=True))


# ---- gradients and the update ----------------------------------------------------------------------------------------


def average(shares: Shares, gradients: dict) -> dict:
    """What the backward pass has left to do: the means over the processes that computed other rows, and the sums over
    those that computed other parts of the same rows. Under zero1, as under fsdp, this process's parts of the means."""
    if shares.mode == "fsdp":
        return gradients
    if shares.mode == "pipeline":
        return sum_of_ends(shares, gradients)
    arrays = dict(tree_flatten(gradients))
    if shares.mode == "tensor":
        shared = [name for name in arrays if PARTIAL.search(name)]  # by the heads of every process
        arrays.update(zip(shared, sums([arrays[name] for name in shared], shares.group), strict=True))
    if shares.mode == "zero1":
        means = [part for bucket in buckets([*arrays.values()], shares.dtype) for part in mean_parts(shares, bucket)]
    else:
        means = sums([*arrays.values()], shares.others, shares.dtype, mean=True)
    return tree_unflatten(list(zip(arrays, means, strict=True)))


def buckets(arrays: list[mx.array], dtype: mx.Dtype) -> Iterator[list[mx.array]]:
    """The arrays in lists of 32 MiB, or of one larger array."""
    bucket, size = [], 0
    for x in arrays:
        if bucket and size + x.size * dtype.size > 2**25:
            yield bucket
            bucket, size = [], 0
        bucket, size = [*bucket, x], size + x.size * dtype.size
    if bucket:
        yield bucket


def sums(arrays: list[mx.array], group, dtype: mx.Dtype = mx.float32, mean: bool = False) -> list[mx.array]:
    """The sums of arrays over processes, or their means, in one call for each bucket, sent in a dtype."""
    if group.size() == 1:
        return arrays
    found = []
    for bucket in buckets(arrays, dtype):
        total = summed(in_rows(bucket, dtype), group)
        total = total / group.size() if mean else total
        found += from_rows(total, [x.shape for x in bucket], bucket[0].dtype)
    return found


def mean_parts(shares: Shares, arrays: list[mx.array]) -> list[mx.array]:
    """This process's parts (FLAT) of the means of arrays over the processes, in one call, float32."""
    n, rows = shares.group.size(), in_rows(arrays, shares.dtype, shares.group.size())
    row = mx.distributed.sum_scatter(rows, group=shares.group) if shares.scatters and n > 1 else (
        summed(rows, shares.group)[shares.group.rank()][None])
    shapes = [(*[1] * (x.ndim - 1), -(-x.size // n)) for x in arrays]
    return from_rows(row / n, shapes, mx.float32)


def norm(shares: Shares, gradients: dict) -> mx.array:
    """The norm of all gradients, of which this process has parts. What several processes have counts once."""
    rank, stages = shares.group.rank(), shares.group.size() if shares.mode == "pipeline" else 0
    counted = [g for name, g in tree_flatten(gradients) if shares.axes[name] is not None
               or rank == (holders(name, shares.config, stages)[0] if stages else 0)]
    if plain.gpu_train and (floats := plain.gpu_train.floats(counted)):
        square = plain.gpu_train.squares(floats).sum()
    else:
        square = sum((g.astype(mx.float32).square().sum() for g in counted), mx.array(0.0))
    return mx.sqrt(summed(square, shares.group))


def updated_parts(shares: Shares, gradients: dict) -> tuple[nn.Module, dict]:
    """The module whose parameters an optimizer updates, and their gradients, of average(): under zero1 this process's
    parts."""
    if shares.mode != "zero1":
        return shares.model, gradients
    parts = nn.Module()
    dict.update(parts, own(shares, shares.model.trainable_parameters()))
    return parts, gradients


def join_updated(shares: Shares, parts: nn.Module):
    """Put what the processes have updated into the model."""
    if shares.mode == "zero1":
        shares.model.update(whole(shares, parts.parameters()))


# ---- fsdp ------------------------------------------------------------------------------------------------------------


class GatheringGPT(GPT):
    """Its parameters are parts (FLAT). The whole ones of a block are there while the block is computed; with
    checkpoint_every=1 they are gathered again in the backward pass, else they stay until then."""

    def run(self, block, x: mx.array, offset, cache, tap, carry: dict):
        every = self.checkpoint_every

        def computed(x, parts, carry):
            block.update(whole_parameters(self._shares, parts, f"blocks.{block.layer}."))
            self.checkpoint_every = 0  # the block is recomputed here, or not at all
            after = GPT.run(self, block, x, offset, cache, tap, carry)
            self.checkpoint_every = every
            block.update(parts)
            return after

        again = self.training and tap is no_tap and every and block.layer % every == 0
        return (mx.checkpoint(computed) if again else computed)(x, block.trainable_parameters(), carry)

    def loss(self, *arguments, **named) -> mx.array:
        parts = outside_of_blocks(self)
        self.update(whole_parameters(self._shares, parts))
        total = super().loss(*arguments, **named)
        self.update(parts)
        return total


def outside_of_blocks(model: GPT) -> dict:
    return {name: value for name, value in model.trainable_parameters().items() if name != "blocks"}


def whole_parameters(shares: Shares, parts: dict, prefix: str = "") -> dict:
    """The whole parameters of one block, from the parts of all processes, in one gather. The gradient is this process's
    part of the mean over processes. prefix: of their names."""
    names, arrays = zip(*tree_flatten(parts), strict=True)
    shapes = [shares.shapes[prefix + name] for name in names]

    @mx.custom_function
    def forward(*parts):
        rows = gathered(in_rows(parts, shares.dtype)[0], shares.group)
        return tuple(from_rows(rows, shapes, shares.dtype))

    @forward.vjp
    def backward(parts, gradients, _):
        parts, gradients = ([a] if isinstance(a, mx.array) else a for a in (parts, gradients))
        return tuple(mean_parts(shares, gradients))

    whole = forward(*arrays)
    return tree_unflatten(list(zip(names, whole if isinstance(whole, tuple | list) else [whole], strict=True)))


# ---- tensor ----------------------------------------------------------------------------------------------------------

KNOWN = """rotary_dim rope_scaling rope_pattern parallel norm_place norm_bias out_bias head_bias embed_scale attn_scale
    residual_scale logit_scale sink_logits sliding_window window_pattern sinks window_theta n_expert expert_top_k
    n_shared_expert expert_balance router_bias mod mod_capacity mod_every yoco value_residual softcap attn_softcap"""
AXES = {"embed.weight": 0, "head.weight": 0, "head.bias": 0, "out.weight": 1, "sink.weight": 0,
        **{f"{name}.{kind}": 0 for name in ("q", "k", "v", "gate", "up") for kind in ("weight", "bias")},
        "down.weight": 1}
PARTIAL = re.compile(r"(q_norm|k_norm)\.weight$|value_mix$")  # used by the heads of every process


def split_matrices(shares: Shares):
    """Keep this process's heads, and its part of the hidden widths and of the vocabulary."""
    model, config, group, n = shares.model, shares.config, shares.group, shares.group.size()
    check_known(config, KNOWN, "parallel=tensor")
    for name in ("n_head", "n_kv_head", "ffn_dim", "vocab_size"):
        if getattr(config, name) % n:
            raise UserError(f"{name}={getattr(config, name)} is not divisible by the {n} processes of a group: change "
                            "it, or --slices")
    if getattr(config, "n_expert", 0) and config.bias:
        raise UserError("parallel=tensor does not know experts with biases: leave out --bias or --n_expert")
    layers = {key.split(".")[0] for key in AXES} - {"sink"}
    for path, module in model.named_modules():
        known = plain.Linear, plain.Embedding, getattr(plain, "Experts", None)
        if path.split(".")[-1] in layers and type(module) not in known:
            raise UserError(f"parallel=tensor does not know {path}, a {type(module).__name__}: give a checkpoint "
                            "that is neither packed nor an adapter")
    if getattr(model, "dropout", 0):
        raise UserError("parallel=tensor does not know dropout: leave out --dropout")
    for name in shares.shapes:
        axis = AXES.get(".".join(name.split(".")[-2:]))
        axis = axis + 1 if axis is not None and len(shares.shapes[name]) == 3 else axis
        shares.axes[name] = axis
    kinds = {"SharedKeysValues": SplitKeysValues, "Attention": SplitAttention, "MLP": SplitMLP, "MoE": SplitMoE}
    for path, module in model.named_modules():
        if isinstance(module.get("config"), GPTConfig) and module is not model:
            of = module.config
            module.config = replace(of, n_head=of.n_head // n, n_kv_head=of.n_kv_head // n, ffn_dim=of.ffn_dim // n)
        kind = next((new for old, new in kinds.items() if isinstance(module, getattr(plain, old, ()))), None)
        if isinstance(module, plain.Linear) and path.split(".")[-1] in ("out", "down"):
            kind = JoinedLinear
        if kind:
            become(module, kind, group)
    become(model.embed, SplitEmbedding, group)
    model.update(alone(own(shares, model.parameters())))
    model.__class__ = SplitGPT


def become(module: nn.Module, kind: type, group):
    """Put the methods of a class before those that a module has."""
    module.__class__, module._group = type(f"{kind.__name__}{type(module).__name__}", (kind, type(module)), {}), group


class JoinedLinear:
    """A layer of which each process has some of the inputs: the products are summed, and the bias is added once."""

    def __call__(self, x: mx.array) -> mx.array:
        y = summed(x @ self.weight.astype(x.dtype).T, self._group)
        return y + self.bias.astype(x.dtype) if "bias" in self else y


class SplitEmbedding:
    """Rows of some tokens. As the unembedding it gives their logits."""

    def __call__(self, ids: mx.array) -> mx.array:
        own = ids - self._group.rank() * len(self.weight)
        here = (own >= 0) & (own < len(self.weight))
        return summed(self.weight[mx.where(here, own, 0)] * here[..., None].astype(self.weight.dtype), self._group)


class SplitAttention:
    def heads(self, x: mx.array, *others) -> mx.array:
        return super().heads(copied(x, self._group), *others)


class SplitKeysValues:
    def keys_values(self, x: mx.array, *others) -> tuple:
        return super().keys_values(copied(x, self._group), *others)


class SplitMLP:
    def __call__(self, x: mx.array, tap) -> mx.array:
        return super().__call__(copied(x, self._group), tap)


class SplitMoE:
    """Every process has a part of the hidden width of every expert, so that all have equally much to compute. Each
    computes the whole router."""

    def weighed(self, x: mx.array, gates: mx.array, chosen: mx.array) -> mx.array:
        x, gates = copied(x, self._group), copied(gates, self._group)
        return summed(super().weighed(x, gates, chosen), self._group)


class SplitGPT(GPT):
    """Each process has some columns of the logits."""

    def project(self, x: mx.array) -> mx.array:
        logits = super().project(x)
        return mx.concatenate(list(gathered(logits, self._shares.group)), axis=-1)

    def loss(self, idx: mx.array, targets: mx.array, mask: mx.array | None = None, tap=no_tap, places=None) -> mx.array:
        """GPT.loss(). The logits of a chunk are computed again in the backward pass."""
        group, head = self._shares.group, self.embed if self.config.tie else self.head
        x = copied(self.norm(self.residual(idx, tap=tap, places=places)), group)
        x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        weights = mx.ones(targets.shape) if mask is None else mask.astype(mx.float32).reshape(-1)
        V, parameters = len(head.weight), head.trainable_parameters()

        def chunk(parameters, x, start):
            head.update(parameters)
            logits = GPT.project(self, x).astype(mx.float32)
            top = mx.stop_gradient(gathered(logits.max(-1), group).max(0))
            own = targets[start:start + rows] - group.rank() * V
            here = (own >= 0) & (own < V)
            found = mx.take_along_axis(logits, mx.where(here, own, 0)[:, None], axis=-1)[:, 0] * here
            total, found = summed(mx.stack([mx.exp(logits - top[:, None]).sum(-1), found]), group)
            return ((mx.log(total) + top - found) * weights[start:start + rows]).sum()

        rows = max(1, LOSS_CHUNK // V)
        total = sum(mx.checkpoint(partial(chunk, start=start))(parameters, x[start:start + rows])
                    for start in range(0, len(x), rows))
        head.update(parameters)
        return total / mx.where(weights.sum() > 0, weights.sum(), 1)


# ---- pipeline --------------------------------------------------------------------------------------------------------


def stage_of(layer: int, config: GPTConfig, n: int) -> int:
    """The process that has a block."""
    return next(r for r in range(n) if layer < config.n_layer * (r + 1) // n)


def holders(name: str, config: GPTConfig, n: int) -> list[int]:
    """The processes that have a parameter: embeddings are at the first one, norm and head at the last one, and an
    embedding that is also the head at both."""
    if name.startswith("blocks."):
        return [stage_of(int(name.split(".")[1]), config, n)]
    if name.startswith("embed.") and config.tie:
        return sorted({0, n - 1})
    return [0] if "embed" in name.split(".")[0] else [n - 1]


def keep_stage(shares: Shares):
    """Keep the blocks of this process, and what stands before or after them."""
    model, config, rank, n = shares.model, shares.config, shares.group.rank(), shares.group.size()
    for name in ("yoco", "value_residual"):
        if getattr(config, name, False):
            raise UserError(f"parallel=pipeline does not know {name}=True, which passes arrays by: leave it out")
    if getattr(model, "dropout", 0):
        raise UserError("parallel=pipeline does not know dropout: leave out --dropout")
    if config.n_layer < n:
        raise UserError(f"parallel=pipeline needs a block for each of the {n} processes, not {config.n_layer} blocks")
    for name in shares.shapes:
        shares.axes[name] = None if rank in holders(name, config, n) else ELSEWHERE
    for layer in range(config.n_layer):
        if stage_of(layer, config, n) != rank:
            model.blocks[layer] = nn.Module()
            if getattr(config, "n_expert", 0):  # rebalance() sums the counts of all layers
                model.blocks[layer].mlp = nn.Module()
                model.blocks[layer].mlp._count = mx.zeros((config.n_expert,))
    for name in ("embed", "pos_embed", "norm", "head"):
        if name in model and shares.axes[f"{name}.weight"] == ELSEWHERE:
            del model[name]
    model.compute_dtype = model.compute_dtype or shares.dtype


def of_stages(shares: Shares, arrays: dict, like: dict) -> dict:
    """All arrays by name from those of all processes; like: an array of the shape and dtype of each."""
    rank, n, found = shares.group.rank(), shares.group.size(), {}
    for name, x in like.items():
        parameter = name if name in shares.shapes else name_of(name, shares)
        mine = rank == (holders(parameter, shares.config, n)[0] if parameter else 0)
        found[name] = summed(arrays[name] if mine else mx.zeros(x.shape, x.dtype), shares.group)
        mx.eval(found[name])
    return found


def sum_of_ends(shares: Shares, gradients: dict) -> dict:
    """The gradients of an embedding that is also the head, of which each end has computed a part."""
    n, shape = shares.group.size(), shares.shapes["embed.weight"]
    if shares.config.tie and n > 1:
        own = gradients["embed"]["weight"] if shares.group.rank() in (0, n - 1) else mx.zeros(shape)
        total = summed(own, shares.group)
        mx.async_eval(total)  # also between the ends, which do not use it: a sum waits for all processes
        if shares.group.rank() in (0, n - 1):
            gradients["embed"]["weight"] = total
    return gradients


def shifted(x: mx.array, shares: Shares, by: int) -> mx.array:
    """What the process before this one (by=1), or after it (-1), gives; zeros at the end of the row."""
    group = shares.group
    rank, n = group.rank(), group.size()
    if n == 1:
        return mx.zeros_like(x)
    if shares.sends:
        sent = [mx.distributed.send(x, rank + by, group=group)] if 0 <= rank + by < n else []
        found = mx.distributed.recv_like(x, rank - by, group=group) if 0 <= rank - by < n else mx.zeros_like(x)
    else:  # all get all
        sent = [gathered(x, group)]
        found = sent[0][rank - by] if 0 <= rank - by < n else mx.zeros_like(x)
    return mx.depends([found], sent)[0] if sent else found


def run_stage(shares: Shares, x: mx.array, y: mx.array, m: int, train: bool) -> tuple[mx.array, dict | None]:
    """The loss of a batch (m B, T), and its gradients: m micro-batches pass through the stages, forward and then back.
    A stage keeps their inputs, and computes its blocks again in the backward pass. The loss is that of the batch times
    n at the last process, and 0 at the others, so that the mean over processes is that of the batch."""
    model, config, rank, n = shares.model, shares.config, shares.group.rank(), shares.group.size()
    blocks = [block for layer, block in enumerate(model.blocks) if stage_of(layer, config, n) == rank]
    ids, targets = mx.split(x, m), mx.split(y, m)
    last, empty = rank == n - 1, mx.zeros((*ids[0].shape, config.n_embd), shares.dtype)

    def stage(parameters, h, j):
        model.update(parameters)
        h = model.embedded(ids[j], 0) if rank == 0 else h
        carry = {"token_ids": ids[j]} if getattr(config, "value_embeds", False) else {}
        for block in blocks:
            h, carry = model.run(block, h, 0, None, no_tap, carry)
        return loss_of(model, model.norm(h), targets[j]) if last else h

    parameters = model.trainable_parameters()
    total, gradients, inputs, back = mx.array(0.0), None, [None] * m, [None] * m
    received = empty
    for tick in range(m + n - 1):
        j, sent = tick - rank, empty
        if 0 <= j < m:
            inputs[j] = received
            if last and train:
                loss, (new, back[j]) = mx.value_and_grad(stage, (0, 1))(parameters, received, j)
                total = total + loss
                gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            elif last:
                total = total + stage(parameters, received, j)
            else:
                sent = stage(parameters, received, j)
        received = shifted(sent, shares, 1)
        mx.async_eval(received, total, back[j] if 0 <= j < m and back[j] is not None else total)
    received = empty
    for tick in range(m + n - 1 if train else 0):
        j, sent = tick - (n - 1 - rank), empty
        if 0 <= j < m and last:
            sent = back[j]
        elif 0 <= j < m:
            def product(parameters, h, j=j, dy=received):
                return (stage(parameters, h, j).astype(mx.float32) * dy.astype(mx.float32)).sum()
            new, sent = mx.grad(product, (0, 1))(parameters, inputs[j])
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
        received = shifted(sent, shares, -1)
        mx.async_eval(received, gradients)
    model.update(parameters)
    gradients = tree_unflatten([(name, g / m) for name, g in tree_flatten(gradients)]) if train else None
    return total * (n / m), gradients


def loss_of(model: GPT, x: mx.array, targets: mx.array) -> mx.array:
    return chunked_loss(model, x.reshape(-1, x.shape[-1]), targets.reshape(-1), mx.ones(targets.size)) / targets.size


if __name__ == "__main__":
    print("parallel.py has no command of its own: run mlx.launch -n 2 -- python train.py --parallel=zero1",
          file=sys.stderr)
    sys.exit(2)
