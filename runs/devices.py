"""How long a training step takes on many devices, and how much memory each needs: a simulation, which needs no device.

    python runs/devices.py --mode=fsdp --devices=1,2,4,8     # 1 s on two AMD EPYC cores, shared
    123.6M parameters, 16 x 1,024 tokens a device, adamw; predicted
    fsdp               ms        tok/s   eff  wait  idle      GB     GiB = ...
              1     33.61      487,488  100%    0%    0%    0.00    8.59 = ...
              2     33.52      977,554  100%    1%    0%    0.46    7.68 = ...
              4     33.53    1,954,689  100%    2%    0%    0.68    7.22 = ...
              8     33.60    3,901,320  100%    2%    0%    0.80    6.99 = ...

    python runs/devices.py --mode=all --picture=devices.png

It plays one step as events: the forward and the backward pass of each block, the loss, the optimizer, and what goes
over the wires. A device computes one event at a time, and so does its link, in the order in which they were asked for;
an event also waits for those whose results it needs. The modes are

    data          every device has the whole model and a share of the batch; gradients are summed, in buckets that go
                  out while the backward pass still runs (Li et al. 2020)
    zero1         as data, but each device updates its part of the parameters, which all then gather (Rajbhandari 2020)
    fsdp          each device keeps a part of the parameters, too; a block's are gathered before it computes, one block
                  ahead, and its gradients are summed into the parts (ZeRO-3)
    tensor        each device has a slice of every matrix (Shoeybi et al. 2019); four sums of activations a block
    pipeline      each device has some of the blocks, and the batch passes in micro-batches: gpipe (Huang et al. 2019)
                  sends all of them forward and then back, 1f1b (Narayanan et al. 2019) as soon as it can
    data-tensor   groups of `slices` devices share the matrices, and gradients are summed between groups

A line tells: milliseconds a step; tokens a second of all devices; eff, those over the number of devices times the
tokens a second of one device (of the same batch in all with --strong=True, else of the same batch a device); wait, the
share of the step in which a device waits for a link; idle, in which it waits for other devices (the pipeline's bubble);
GB, what a device sends in a step; and GiB of memory, of the device that needs the most. A star: more than `capacity`.

The figures of the device are those of an H200, measured on one card, and the link is that of two H100 in one host.
Those that nobody measured say "assumed". docs/devices.md has the formulas, and compares with what was measured.
"""
import heapq
import math
import os
import sys
from collections import defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError, given, overrides  # noqa: E402
from draw import COLOURS, pictures, write_figure  # noqa: E402

# mode
mode = "data"           # data | zero1 | fsdp | tensor | pipeline | data-tensor, several with commas, or all
devices = "1,2,4,8,16,32,64,128,256,512"  # numbers of devices
strong = False          # batch_size is that of all devices together; False: of each device
grad_accum = 1          # parts of the batch, one after the other; not for pipeline
overlap = True          # links work while devices compute
bucket = 33554432       # bytes of gradients that are summed at once
scatter = False         # zero1: sum_scatter in place of all_sum, where the backend has it
prefetch = 1            # fsdp: blocks that are gathered ahead
schedule = "1f1b"       # pipeline: 1f1b | gpipe
micro = 32              # pipeline: micro-batches of a step
slices = 8              # data-tensor: devices that share the matrices of a model
shared_muon = False     # data: each device orthogonalizes its share of the matrices, which all then gather
checkpoint = False      # recompute blocks in the backward pass
# shape
n_layer = 12            # blocks
n_head = 12             # heads
n_embd = 768            # width
ffn_dim = 0             # hidden width of the MLP; 0: 4 n_embd
vocab_size = 50304      # V
block_size = 1024       # context, tokens
batch_size = 16         # sequences an update, of a device or of all of them: see strong
optimizer = "adamw"     # adamw | muon
dtype_bytes = 2         # of a number in computing, and of parameters that fsdp gathers
gradient_bytes = 4      # of a number of the gradients
# device
matmul = 595e12         # FLOP/s of a step's matmuls: 12.1 TFLOP in 20.4 ms of a profile (8192^3 alone: 788e12)
attention = 183e12      # FLOP/s of causal attention: 1.08 TFLOP in 5.9 ms of that profile
newton_schulz = 300e12  # FLOP/s of Muon's iteration: 1.63 TFLOP in the 5.4 ms that it adds to AdamW's step
memory = 4.3e12         # bytes/s, read plus written, of a copy
passes = 41.0           # numbers times n_embd that kernels between matmuls read and write, a token and block (fitted)
launch = 84e-6          # seconds of a block's pass that do not depend on its tokens (fitted)
kept = 10.0             # numbers times n_embd that a block keeps of a token for its backward pass
queue = 2.9e9           # bytes that MLX's queue of work holds: the measured peak less what a step needs
capacity = 80e9         # bytes of memory of a device
# links
link = 329e9            # bytes/s in a node, the bus bandwidth of an all-reduce of 1 GiB (two H100, NCCL)
latency = 5e-6          # seconds of a hop in a node; assumed
per_node = 8            # devices of a node
link_across = 50e9      # bytes/s of a device to other nodes; assumed: a 400 Gbit/s card for each
latency_across = 10e-6  # seconds of a hop between nodes; assumed
call = 0.0              # further seconds of each collective operation, on the link
# output
picture = ""            # a PNG: the timeline of a step, and efficiency over devices; "": none
picture_devices = 8     # the number of devices of the timeline
markdown = False        # print one table of all modes, efficiency and GiB, in Markdown

settings = overrides(globals())

MODES = "data", "zero1", "fsdp", "tensor", "pipeline", "data-tensor"
USED_BY = {"bucket": ("data", "zero1", "data-tensor"), "scatter": ("zero1",), "prefetch": ("fsdp",),
           "schedule": ("pipeline",), "micro": ("pipeline",), "grad_accum": MODES[:4] + MODES[5:],
           "slices": ("data-tensor",), "shared_muon": ("data",)}
LOGITS = 2**28       # logits in memory at a time: LOSS_CHUNK of gpu_train.py
UNSPLIT = 1 / 3      # tensor: share of `passes` on whole tokens, which are norms and the residual stream's sums
FORWARD = 0.4        # share of `passes` in the forward pass
GIB = 2**30

# ---- discrete events -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Event:
    name: str
    stream: str                # "compute 0", "link 0": events of a stream run one after the other
    seconds: float
    after: tuple = ()          # events that must have ended, whatever their streams
    sent: float = 0.0          # bytes that a device sends; compute has none
    devices: tuple = (0,)      # whose event it is; a transfer's sender and receiver
    start: float = field(default=math.nan, init=False)
    end: float = field(default=math.nan, init=False)

    @property
    def link(self) -> bool:
        return self.name.startswith(("sum", "gather", "scatter", "send"))


def simulate(events: list[Event]) -> float:
    """Set start and end of all events, and return the last end. A stream takes its events in the order of the list,
    each as soon as those in its `after` have ended."""
    queues, missing, followers = defaultdict(deque), {}, defaultdict(list)
    for event in events:
        queues[event.stream].append(event)
        missing[event] = len(event.after)
        for earlier in event.after:
            followers[earlier].append(event)
    running, busy, clock, done = [], set(), 0.0, 0

    def begin(stream: str):
        if stream not in busy and queues[stream] and not missing[queues[stream][0]]:
            event = queues[stream].popleft()
            event.start, event.end = clock, clock + event.seconds
            busy.add(stream)
            heapq.heappush(running, (event.end, id(event), event))

    for stream in [*queues]:
        begin(stream)
    while running:
        clock, _, event = heapq.heappop(running)
        done += 1
        busy.discard(event.stream)
        for follower in followers[event]:
            missing[follower] -= 1
            begin(follower.stream)
        begin(event.stream)
    assert done == len(events), "events wait for one another in a circle"
    return clock


def length(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares(events: list[Event], n: int) -> tuple[float, float]:
    """The shares of the step in which a device waits for a link, and for another device, as means over n devices."""
    step, waits, idles = max(event.end for event in events), 0.0, 0.0
    for device in range(n):
        own = [event for event in events if device in event.devices]
        busy = length([(event.start, event.end) for event in own if not event.link])
        either = length([(event.start, event.end) for event in own])
        waits, idles = waits + (either - busy) / step / n, idles + (step - either) / step / n
    return waits, idles


# ---- what a model costs ----------------------------------------------------------------------------------------------


def sizes(s: SimpleNamespace) -> SimpleNamespace:
    """Numbers of parameters of model.py's default architecture: a block, its matrices, the embedding, all."""
    C, F = s.n_embd, s.ffn_dim or 4 * s.n_embd
    matrices = 4 * C * C + 2 * C * F
    block = matrices + 2 * C + 2 * C // s.n_head  # two norms, and those of a head's queries and keys
    embedding = s.vocab_size * C
    return SimpleNamespace(block=block, matrices=matrices, embedding=embedding, vectors=block - matrices,
                           all=s.n_layer * block + embedding + C)


def newton_schulz_flops(s: SimpleNamespace) -> float:
    """Of Muon's iteration (muon.py) on the matrices of a block: 5 times X X^T, A A, and a product with X."""
    def one(rows, columns):
        m, k = min(rows, columns), max(rows, columns)
        return 5 * (4 * m * m * k + 2 * m**3)
    return 4 * one(s.n_embd, s.n_embd) + 2 * one(s.n_embd, s.ffn_dim or 4 * s.n_embd)


def costs(s: SimpleNamespace, tokens: float, split: int = 1) -> SimpleNamespace:
    """Seconds of each part for so many tokens, forward and backward, where `split` devices share the matrices."""
    C, size = s.n_embd, sizes(s)
    F = s.ffn_dim or 4 * C
    between = s.passes * tokens * C * s.dtype_bytes / s.memory * (UNSPLIT + (1 - UNSPLIT) / split)
    cast = 6 * size.matrices / split / s.memory  # reads 4 bytes and writes 2, or the other way

    def part(weights: float, scores: float, share: float) -> tuple[float, float]:
        """A share of what a block computes: matmuls of so many weights, attention of so many FLOPs forward."""
        product = 2 * tokens * weights / split / s.matmul
        rest = share * between, share * (cast + s.launch)
        forward = product + scores / split / s.attention + FORWARD * rest[0] + rest[1]
        backward = 2 * product + 2.5 * scores / split / s.attention + (1 - FORWARD) * rest[0] + rest[1]
        return forward, backward + forward * s.checkpoint

    attended = part(4 * C * C, 2 * tokens * s.block_size * C, 0.5)
    mlp = part(2 * C * F, 0, 0.5)
    logits = tokens * s.vocab_size / split
    head = 2 * logits * C / s.matmul
    return SimpleNamespace(
        attention=attended, mlp=mlp, block=(attended[0] + mlp[0], attended[1] + mlp[1]),
        embedding=(tokens * C * 6 / s.memory, (4 * size.embedding / split + 8 * tokens * C) / s.memory),
        loss=(head + logits * 2 * s.dtype_bytes / s.memory, 2 * head + logits * s.dtype_bytes / s.memory))


def update_seconds(s: SimpleNamespace, adam: float, muon: float, blocks: float) -> float:
    """Of the optimizer: so many parameters under Adam and under Muon, whose iteration takes the matrices of so many
    blocks. Gradients are read twice, the first time for their norm."""
    g = 2 * s.gradient_bytes
    moved = (24 + g) * adam + (24 + g) * muon  # Muon: parameter and momentum, and the update in two bytes, four times
    return moved / s.memory + blocks * newton_schulz_flops(s) / s.newton_schulz


# ---- what the wires cost ---------------------------------------------------------------------------------------------


def wire(s: SimpleNamespace, n: int, nbytes: float, passes: int, stride: int = 1) -> tuple[float, float]:
    """Seconds, and bytes that a device sends, of a ring over n devices that stand `stride` apart. passes: 2 for a sum
    that all receive, (n - 1) / n of the bytes twice; 1 for a gather, or a sum of which each receives its part."""
    if n == 1:
        return 0.0, 0.0
    inside = max(1, min(n, s.per_node // stride))  # devices of the group in one node
    nodes = -(-n // inside)
    speed, hops = s.link, inside - 1
    delay = hops * s.latency
    if nodes > 1:  # as many rings as a node has devices of the group, each through the card of another one
        speed, delay = min(s.link, inside * s.link_across), delay + math.ceil(math.log2(nodes)) * s.latency_across
    sent = passes * (n - 1) / n * nbytes
    return s.call + passes * delay + sent / speed, sent


def group_of(s: SimpleNamespace, name: str, n: int) -> int:
    """How many of n devices have a part of the same model each, and work on the same tokens."""
    return {"tensor": n, "data-tensor": s.slices, "pipeline": n}.get(name, 1)


def local_batch(s: SimpleNamespace, name: str, n: int) -> float:
    """Tokens that a group of devices works on at a time. UserError if the batch cannot be divided so."""
    group = group_of(s, name, n)
    parts = s.micro if name == "pipeline" and n > 1 else s.grad_accum
    whole = s.batch_size * (1 if s.strong else n)
    if whole % (parts * (n // group)):
        raise UserError(f"{whole} sequences are not {parts * (n // group)} equal parts: change batch_size")
    return whole // (parts * (n // group)) * s.block_size


def memory_of(s: SimpleNamespace, name: str, n: int) -> dict[str, float]:
    """Bytes of a device: of the stage that needs the most in a pipeline."""
    size = sizes(s)
    group, tokens = group_of(s, name, n), local_batch(s, name, n)
    split = group if name != "pipeline" else 1
    if name == "pipeline" and n > 1:
        found = [stage_memory(s, size, stage, n, tokens) for stage in range(n)]
        return max(found, key=lambda parts: sum(parts.values()))
    vectors = s.n_layer * size.vectors + s.n_embd
    mine = (size.all - vectors) / split + vectors
    matrices = s.n_layer * size.matrices / split if s.optimizer == "muon" else 0
    parts = n if name in ("zero1", "fsdp") else 1
    muon_parts = n if name == "data" and s.shared_muon else parts
    activations = block_activations(s, tokens, split)
    blocks = s.n_layer * (s.dtype_bytes * tokens * s.n_embd if s.checkpoint else activations)
    buffers = s.queue
    if n > 1 and name in ("data", "zero1", "data-tensor"):  # what is summed lies beside the gradients
        buffers += s.gradient_bytes * mine if not s.overlap else 2 * s.bucket
    if n > 1 and name == "fsdp":  # gathered: the embedding, and the blocks at work with their gradients
        buffers += s.dtype_bytes * (size.embedding + (1 + s.prefetch) * size.block)
        buffers += s.gradient_bytes * max(size.block, size.embedding)
    casts = 0 if n > 1 and name == "fsdp" else s.dtype_bytes * mine
    return {"parameters": 4 * mine / (n if name == "fsdp" else 1),
            "gradients": s.gradient_bytes * mine / (n if name == "fsdp" else 1),
            "optimizer": 8 * (mine - matrices) / parts + 4 * matrices / muon_parts,
            "activations": blocks + activations * s.checkpoint, "logits": logits_bytes(s, tokens, split),
            "buffers": buffers + casts}


def block_activations(s: SimpleNamespace, tokens: float, split: int) -> float:
    """Bytes that a block keeps; its input and the residual stream after attention are whole on every device."""
    return s.dtype_bytes * tokens * s.n_embd * (2 + (s.kept - 2) / split)


def logits_bytes(s: SimpleNamespace, tokens: float, split: int) -> float:
    return 2 * s.dtype_bytes * min(tokens * s.vocab_size / split, LOGITS)  # they and their gradients


def stage_memory(s: SimpleNamespace, size: SimpleNamespace, stage: int, p: int, tokens: float) -> dict[str, float]:
    """Of a pipeline's stage, whose first and last one both hold the embedding, which is also the unembedding."""
    layers, ends = layers_of(s, p)[stage], stage in (0, p - 1)
    mine = layers * size.block + ends * size.embedding + (stage == p - 1) * s.n_embd
    matrices = layers * size.matrices if s.optimizer == "muon" else 0
    waiting = s.micro if s.schedule == "gpipe" else min(s.micro, p - stage)  # micro-batches between forward and back
    whole = block_activations(s, tokens, 1)
    each = s.dtype_bytes * tokens * s.n_embd if s.checkpoint else whole
    return {"parameters": 4 * mine, "gradients": s.gradient_bytes * mine,
            "optimizer": 8 * (mine - matrices) + 4 * matrices,
            "activations": waiting * layers * each + whole * s.checkpoint,
            "logits": logits_bytes(s, tokens, 1) * (stage == p - 1), "buffers": s.queue + s.dtype_bytes * mine}


# ---- a step of each mode, as events ----------------------------------------------------------------------------------


def layers_of(s: SimpleNamespace, p: int) -> list[int]:
    """The number of blocks of each of p stages. The last one, which has the head too, has the fewest."""
    return [s.n_layer // p + (stage < s.n_layer % p) for stage in range(p)]


def place(s: SimpleNamespace, name: str = "link 0") -> str:
    """The stream of a transfer: where links do not work beside devices, it takes the device's own time."""
    return name if s.overlap else "compute 0"


def reduced(s: SimpleNamespace, events: list, ready: list, n: int, passes: int, stride: int, stream: str) -> list:
    """Add the sums of gradients, which are ready as (event, bytes), in buckets: each goes out after the event that
    fills it. Returns them. Gradients are copied into a bucket."""
    waiting, sums = 0.0, []

    def send(nbytes: float, event: Event):
        copy = Event("copy", "compute 0", 2 * nbytes / s.memory, (event,))
        seconds, sent = wire(s, n, nbytes, passes, stride)
        sums.append(Event("sum of gradients", place(s, stream), seconds, (copy,), sent))
        at = events.index(event) + 1 if s.overlap else len(events)
        while s.overlap and at < len(events) and events[at].name == "copy":
            at += 1
        events[at:at] = [copy]
        events.append(sums[-1])

    if n == 1:
        return []
    for event, nbytes in ready:
        waiting += nbytes
        while waiting >= s.bucket:
            send(s.bucket, event)
            waiting -= s.bucket
    if waiting:
        send(waiting, ready[-1][0])
    return sums


def data_step(s: SimpleNamespace, n: int, c: SimpleNamespace, zero1: bool = False) -> list[Event]:
    size, events, ready = sizes(s), [], []

    def compute(name: str, seconds: float, after: tuple = ()) -> Event:
        events.append(Event(name, "compute 0", seconds, after))
        return events[-1]

    for step in range(s.grad_accum):
        compute("embedding", c.embedding[0])
        for layer in range(s.n_layer):
            compute(f"forward {layer}", c.block[0])
        compute("loss", sum(c.loss))
        for layer in reversed(range(s.n_layer)):
            event = compute(f"backward {layer}", c.block[1])
            if step == s.grad_accum - 1:
                ready.append((event, s.gradient_bytes * size.block))
        event = compute("embedding back", c.embedding[1])
    ready.append((event, s.gradient_bytes * (size.embedding + s.n_embd)))  # tied to the head: complete at the end
    sums = tuple(reduced(s, events, ready, n, 1 if zero1 and s.scatter else 2, 1, "link 0"))
    whole = s.gradient_bytes * size.all * 2 / s.memory if n > 1 else 0.0  # the mean of what was summed
    matrices = s.n_layer * size.matrices if s.optimizer == "muon" else 0
    parts = n if zero1 else 1
    muon_parts = n if zero1 or s.shared_muon else 1
    event = compute("optimizer", whole + update_seconds(s, (size.all - matrices) / parts, matrices / muon_parts,
                                                        bool(matrices) * s.n_layer / muon_parts), sums)
    nbytes = 4 * size.all if zero1 else 2 * matrices * s.shared_muon  # parameters, or Muon's updates in bfloat16
    if nbytes and n > 1:
        seconds, sent = wire(s, n, nbytes, 1)
        events.append(Event("gather of parameters", place(s), seconds, (event,), sent))
    return events


def fsdp_step(s: SimpleNamespace, n: int, c: SimpleNamespace) -> list[Event]:
    """Units are the embedding, which stays gathered for the head, and the blocks. Reduced gradients are summed up in
    the device's own part, micro-step by micro-step."""
    size, events = sizes(s), []

    def transfer(name: str, nbytes: float, after: tuple) -> Event:
        seconds, sent = wire(s, n, nbytes, 1)
        events.append(Event(name, place(s), seconds, after, sent))
        return events[-1]

    def compute(name: str, seconds: float, after: tuple = ()) -> Event:
        events.append(Event(name, "compute 0", seconds, after))
        return events[-1]

    def sweep(order: list[int], name: str, seconds: float, begin: tuple, last: Event, scattered: bool) -> Event:
        """Blocks in this order, the first one after `last`. While a block computes, the next `prefetch` ones are
        gathered, the first ones of all after `begin`."""
        ahead = s.prefetch if s.overlap else 0
        done, gathered, scatters = [last], deque(), []
        for i in range(len(order) + ahead):
            if i < len(order):
                free = (done[i - ahead],) if i > ahead or not ahead else begin
                gathered.append(transfer(f"gather {order[i]}", s.dtype_bytes * size.block, free))
            for scatter in scatters:
                transfer(*scatter)
            scatters = []
            if i >= ahead:
                block = order[i - ahead]
                done.append(compute(f"{name} {block}", seconds, (gathered.popleft(), last)))
                if scattered:
                    scatters.append((f"scatter of gradients {block}", s.gradient_bytes * size.block, (done[-1],)))
        for scatter in scatters:
            transfer(*scatter)
        return done[-1]

    if n == 1:
        return data_step(s, 1, c)
    layers = [*range(s.n_layer)]
    for _ in range(s.grad_accum):
        begin = tuple(events[-1:])
        first = transfer("gather of the embedding", s.dtype_bytes * size.embedding, begin)
        event = compute("embedding", c.embedding[0], (first,))
        event = sweep(layers, "forward", c.block[0], begin, event, False)
        sweep(layers[::-1], "backward", c.block[1], (event,), compute("loss", sum(c.loss)), True)
        event = compute("embedding back", c.embedding[1])
        transfer("scatter of gradients", s.gradient_bytes * (size.embedding + s.n_embd), (event,))
    matrices = s.n_layer * size.matrices if s.optimizer == "muon" else 0
    event = events[-1]
    if matrices:  # Muon needs whole matrices: every device gathers the momentum and orthogonalizes all of it
        event = transfer("gather of matrices", s.dtype_bytes * matrices, (event,))
    compute("optimizer", update_seconds(s, (size.all - matrices) / n, matrices / n, bool(matrices) * s.n_layer),
            (event,))
    return events


def tensor_step(s: SimpleNamespace, t: int, groups: int, c: SimpleNamespace, tokens: float) -> list[Event]:
    """t devices share the matrices and the vocabulary. Each sum of activations is waited for: the next part needs it.
    Gradients are summed between groups, over links of their own."""
    size, events, ready = sizes(s), [], []
    width = s.dtype_bytes * tokens * s.n_embd

    def compute(name: str, seconds: float) -> Event:
        events.append(Event(name, "compute 0", seconds, tuple(events[-1:])))
        return events[-1]

    def total(nbytes: float = width, name: str = "sum of activations", passes: int = 2):
        if t > 1:
            seconds, sent = wire(s, t, nbytes, passes)
            events.append(Event(name, place(s), seconds, tuple(events[-1:]), sent))

    for step in range(s.grad_accum):
        compute("embedding", c.embedding[0])
        total()
        for layer in range(s.n_layer):
            compute(f"forward {layer}", c.attention[0])
            total()
            compute(f"forward {layer}", c.mlp[0])
            total()
        compute("loss", sum(c.loss))
        for name in ("largest logits", "sums of exponentials", "target's logits"):
            total(4 * tokens, f"sum: {name}")
        total()
        for layer in reversed(range(s.n_layer)):
            compute(f"backward {layer}", c.mlp[1])
            total()
            event = compute(f"backward {layer}", c.attention[1])
            if step == s.grad_accum - 1:
                ready.append((event, s.gradient_bytes * (size.matrices / t + size.vectors)))
            total()
        event = compute("embedding back", c.embedding[1])
    ready.append((event, s.gradient_bytes * (size.embedding / t + s.n_embd)))
    sums = reduced(s, events, ready, groups, 2, t, "link between groups")
    matrices = s.n_layer * size.matrices / t if s.optimizer == "muon" else 0
    vectors = s.n_layer * size.vectors + s.n_embd
    mine = (size.all - vectors) / t + vectors
    if matrices and t > 1:
        total(s.dtype_bytes * matrices * t, "gather of matrices", 1)
    last = (*sums, events[-1])
    means = 2 * s.gradient_bytes * mine / s.memory if groups > 1 else 0.0
    events.append(Event("optimizer", "compute 0", means + update_seconds(s, mine - matrices, matrices,
                                                                        bool(matrices) * s.n_layer), last))
    return events


def pipeline_order(p: int, stage: int, m: int, schedule: str) -> list[tuple[str, int]]:
    """What a stage of p does with m micro-batches, in order: ("forward" | "backward", micro-batch)."""
    ahead = m if schedule == "gpipe" else min(m, p - 1 - stage)  # forward passes before the first backward pass
    order = [("forward", i) for i in range(ahead)]
    for i in range(m - ahead):
        order += [("forward", ahead + i), ("backward", i)]
    return order + [("backward", i) for i in range(m - ahead, m)]


def pipeline_events(forward: list[float], backward: list[float], m: int, schedule: str, send: tuple[float, float],
                    beside: bool = True) -> list[Event]:
    """m micro-batches through stages of so many seconds. send: seconds and bytes of one transfer between two stages.
    beside: transfers take no time of the devices."""
    p = len(forward)
    done = {(what, stage, i): Event(f"{what} {i}", f"compute {stage}", (forward, backward)[what == "backward"][stage],
                                    devices=(stage,))
            for stage in range(p) for what in ("forward", "backward") for i in range(m)}
    streams = [[done[what, stage, i] for what, i in pipeline_order(p, stage, m, schedule)] for stage in range(p)]
    transfers = []
    for (what, stage, i), event in done.items():
        to = stage + (1 if what == "forward" else -1)
        if 0 <= to < p:
            stream = f"link {stage} to {to}" if beside else f"compute {stage}"
            sent = Event(f"send {what} {i}", stream, send[0], (event,), send[1], (stage, to))
            target = done[what, to, i]
            target.after += (sent,)
            if beside:
                transfers.append(sent)
            else:
                streams[stage].insert(streams[stage].index(event) + 1, sent)
    if beside:  # a link takes transfers in the order in which its device makes what they carry
        place_of = {event: i for stream in streams for i, event in enumerate(stream)}
        transfers.sort(key=lambda event: place_of[event.after[0]])
    return [event for stream in streams for event in stream] + transfers


def pipeline_step(s: SimpleNamespace, p: int, c: SimpleNamespace, tokens: float) -> list[Event]:
    size, layers = sizes(s), layers_of(s, p)
    forward, backward = ([n * c.block[way] for n in layers] for way in (0, 1))
    forward[0], backward[0] = forward[0] + c.embedding[0], backward[0] + c.embedding[1]
    backward[-1] += sum(c.loss)
    seconds, sent = (0.0, 0.0) if p == 1 else (
        s.call + (s.latency if p <= s.per_node else s.latency_across)
        + s.dtype_bytes * tokens * s.n_embd / (s.link if p <= s.per_node else s.link_across),
        s.dtype_bytes * tokens * s.n_embd)
    events = pipeline_events(forward, backward, s.micro, s.schedule, (seconds, sent), s.overlap)
    last = [next(event for event in reversed(events) if event.stream == f"compute {stage}") for stage in range(p)]
    for stage in range(p):
        matrices = layers[stage] * size.matrices if s.optimizer == "muon" else 0
        ends, after = stage in (0, p - 1), (last[stage],)
        if ends and p > 1:  # both ends hold the embedding: its gradients are summed
            if stage == 0:
                both = wire(s, 2, s.gradient_bytes * size.embedding, 2, 1 if p <= s.per_node else s.per_node)
                tied = Event("sum of the embedding's gradients", "link 0 and last", both[0], (last[0], last[-1]),
                             both[1], (0, p - 1))
                events.append(tied)
            after += (tied,)
        mine = layers[stage] * size.block + ends * size.embedding
        events.append(Event("optimizer", f"compute {stage}", update_seconds(
            s, mine - matrices, matrices, bool(matrices) * layers[stage]), after, devices=(stage,)))
    return events


def check(s: SimpleNamespace, name: str, n: int):
    """UserError if this mode cannot run on so many devices."""
    if name in ("tensor", "data-tensor"):
        t = n if name == "tensor" else s.slices
        if n % t:
            raise UserError(f"{n} is no multiple of slices={t}")
        if s.n_head % t:
            raise UserError(f"{s.n_head} heads are not divisible by {t}")
    if name == "pipeline" and n > s.n_layer:
        raise UserError(f"{s.n_layer} blocks are fewer than {n} stages")


def step_events(s: SimpleNamespace, name: str, n: int) -> list[Event]:
    """The events of one device's step, or in a pipeline of all devices'. UserError if the mode cannot run so."""
    check(s, name, n)
    group, tokens = group_of(s, name, n), local_batch(s, name, n)
    c = costs(s, tokens, group if "tensor" in name else 1)
    if "tensor" in name:
        return tensor_step(s, group, n // group, c, tokens)
    if name == "pipeline" and n > 1:
        return pipeline_step(s, n, c, tokens)
    return fsdp_step(s, n, c) if name == "fsdp" else data_step(s, n, c, zero1=name == "zero1")


def predict(s: SimpleNamespace, name: str, n: int) -> SimpleNamespace:
    """A line of the table. UserError if the mode cannot run on so many devices."""
    events = step_events(s, name, n)
    seconds = simulate(events)
    tokens = s.batch_size * s.block_size * (1 if s.strong else n)
    stages = n if name == "pipeline" else 1
    waits, idle = shares(events, stages)
    sent = max(sum(e.sent for e in events if d == e.devices[0]) for d in range(stages))
    alone = simulate(step_events(s, "data", 1))
    return SimpleNamespace(n=n, seconds=seconds, speed=tokens / seconds,
                           efficiency=alone / seconds / (n if s.strong else 1), waits=waits,
                           idle=idle, sent=sent, memory=memory_of(s, name, n), events=events)


# ---- table and picture -----------------------------------------------------------------------------------------------

COLUMNS = "parameters", "gradients", "optimizer", "activations", "logits", "buffers"


def table(s: SimpleNamespace, name: str, numbers: list[int]) -> list[str]:
    lines = [f"{name:11} {'ms':>9} {'tok/s':>12} {'eff':>5} {'wait':>5} {'idle':>5} {'GB':>7}  {'GiB':>6} ="
             + "".join(f"{column[:11]:>12}" for column in COLUMNS)]
    for n in numbers:
        try:
            row = predict(s, name, n)
        except UserError as error:
            lines.append(f"{n:11,} {error}")
            continue
        whole = sum(row.memory.values())
        lines.append(
            f"{n:11,} {1e3 * row.seconds:9.2f} {row.speed:12,.0f} {row.efficiency:5.0%} {row.waits:5.0%} "
            f"{row.idle:5.0%} {row.sent / 1e9:7.2f} {'*' if whole > s.capacity else ' '}{whole / GIB:6.2f} ="
            + "".join(f"{row.memory[column] / GIB:12.2f}" for column in COLUMNS))
    return lines


def summary(s: SimpleNamespace, names: list[str], numbers: list[int]) -> list[str]:
    """A table in Markdown: efficiency and GiB of each mode."""
    lines = ["| devices | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for n in numbers:
        cells = []
        for name in names:
            try:
                row = predict(s, name, n)
                whole = sum(row.memory.values())
                cells.append(f"{row.efficiency:.0%}, {whole / GIB:.1f}{'*' if whole > s.capacity else ''}")
            except UserError:
                cells.append("")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return lines


def draw(s: SimpleNamespace, names: list[str], numbers: list[int], path: str, at: int):
    """A PNG: above one another the timelines of a step of each mode on `at` devices, and efficiency over devices."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = []
    for name in names:
        try:
            shown.append((name, predict(s, name, at)))
        except UserError:
            continue
    height = sum(0.55 + 0.22 * len({e.stream for e in row.events if not e.link}) for _, row in shown)
    figure = Figure(figsize=(13, 1.2 + max(3.4, height)), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2.2, 1]})
    y, ticks = 0.0, {}
    colours = {"forward": COLOURS[0], "backward": "#56b4e9", "loss": COLOURS[3], "optimizer": COLOURS[2],
               "links": COLOURS[1], "other": "#999999"}
    for name, row in shown:
        n = 1 + max(max(event.devices) for event in row.events)
        for device in range(n + 1):  # the last line is that of all links
            for event in row.events:
                if event.seconds and (event.link if device == n else not event.link and device in event.devices):
                    colour = colours.get("links" if event.link else event.name.split()[0], colours["other"])
                    left.broken_barh([(1e3 * event.start, 1e3 * event.seconds)], (y, 0.8), facecolor=colour,
                                     edgecolor=colour if event.link else "white", linewidth=0.3)
            ticks[y + 0.4] = "links" if device == n else f"device {device}" if n > 1 else "each device"
            y -= 1
        left.text(0, y + n + 1.9, name, fontsize=8, fontweight="bold", va="bottom")
        y -= 0.9
    left.set_yticks([*ticks], [*ticks.values()], fontsize=7)
    left.set(xlabel="ms", title=f"one step on {at} devices")
    left.title.set_fontsize(10)
    left.legend(handles=[Patch(color=colour, label=kind) for kind, colour in colours.items()], fontsize=7,
                loc="upper left",
                bbox_to_anchor=(1, 1))
    left.spines[["top", "right"]].set_visible(False)
    for i, name in enumerate(names):
        points = []
        for n in numbers:
            try:
                points.append((n, 100 * predict(s, name, n).efficiency))
            except UserError:
                continue
        if points:
            right.plot(*zip(*points, strict=True), "o--" if i == len(COLOURS) else "o-", ms=4, label=name,
                       color=[*COLOURS, "#555555"][i])
    right.set_xscale("log", base=2)
    right.set_xticks(numbers, [str(n) for n in numbers], fontsize=7)
    right.set(xlabel="devices", ylim=(0, 110))
    right.set_title("predicted efficiency, %", fontsize=10)
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    figure.suptitle(f"{sizes(s).all / 1e6:,.0f}M parameters, {s.batch_size} x {s.block_size:,} tokens "
                    f"{'in all' if s.strong else 'a device'}: predicted", fontsize=11)
    write_figure(path, figure)


def check_settings(s: SimpleNamespace, names: list[str]) -> list[int]:
    """The numbers of devices. UserError for settings that make no sense, or that no mode here uses."""
    for name in names:
        if name not in MODES:
            raise UserError(f"mode={name!r} is not one of {', '.join(MODES)}, all")
    for name, users in USED_BY.items():
        if name in given and not set(users) & set(names):
            raise UserError(f"--{name} is used by {' and '.join(users)}: leave it out, or change --mode")
    try:
        numbers = [int(text) for text in s.devices.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1 or max(numbers) > 2**16:
        raise UserError(f"devices={s.devices!r}: it must be whole numbers from 1 to 65,536, with commas between them")
    for name, value in vars(s).items():
        zero = name in ("call", "latency", "latency_across", "launch", "queue", "prefetch", "ffn_dim", "passes", "kept")
        if type(value) in (int, float) and not (1e-15 <= value <= 1e18 or zero and value == 0):
            raise UserError(f"{name}={value}: it must be from {'0' if zero else '1e-15'} to 1e18")
    if s.n_embd % s.n_head:
        raise UserError(f"n_embd={s.n_embd} is not divisible by n_head={s.n_head}: change one of them")
    count = 8 * s.n_layer * s.grad_accum + 5 * min(s.n_layer, max(numbers)) * s.micro * ("pipeline" in names)
    if s.n_layer > 1000 or count + s.gradient_bytes * sizes(s).all / s.bucket > 50_000:
        raise UserError("these are too many events: make n_layer, grad_accum or micro smaller, or bucket larger")
    for name, choices in (("schedule", ("1f1b", "gpipe")), ("optimizer", ("adamw", "muon"))):
        if getattr(s, name) not in choices:
            raise UserError(f"{name}={getattr(s, name)!r} is not one of {', '.join(choices)}")
    if s.shared_muon and s.optimizer != "muon":
        raise UserError("--shared_muon needs --optimizer=muon")
    if "picture_devices" in given and not s.picture:
        raise UserError("--picture_devices needs --picture=FILE.png")
    return numbers


if __name__ == "__main__":
    s = SimpleNamespace(**settings)
    names = [*MODES] if mode == "all" else mode.split(",")
    numbers = check_settings(s, names)
    if picture:
        picture, _ = pictures(picture)
    size = sizes(s)
    print(f"{size.all / 1e6:.1f}M parameters, {batch_size} x {block_size:,} tokens "
          f"{'in all' if strong else 'a device'}, {optimizer}; predicted\n")
    tables = [summary(s, names, numbers)] if markdown else [table(s, name, numbers) for name in names]
    print("\n\n".join("\n".join(lines) for lines in tables))
    if picture:
        draw(s, names, numbers, picture, picture_devices)
        print(f"\n{picture}")
