"""How fast is it here? One table, beside PyTorch and tokenizers where they are installed.

    python bench.py
    python bench.py --only=train --shapes=124M,124M-gpt2      # on a GPU

Ours and the peer's are timed in turn, A B A B ..., in this one process, after a warm-up; each figure is a median over
the rounds, and `ratio` the median over the rounds of the peer's time by ours: above 1 we are faster. The peers: a
nanoGPT-like GPT-2 in PyTorch (eager on a CPU; torch.compile, bfloat16 and fused AdamW on a GPU), which trains the same
shape with its own architecture and decodes with a key/value cache; and the tokenizers package, on one BPE vocabulary.
A step is forward, backward, clipping and AdamW. Peak memory is what MLX and torch.cuda allocated.
"""
import datetime
import glob
import os
import statistics
import sysconfig
import time
from functools import partial

import blas  # before mlx
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from config import UserError, overrides
from model import GPT, ON_CPU, GPTConfig, compute_dtype, generate
from tokenizer import train_bpe

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    torch = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

only = "train,decode,tokenize"  # sections
shapes = ""            # of SHAPES below, separated by commas; none: those that suit the device
rounds = 0             # timed rounds; 0: 5 on a CPU, 20 on a GPU
new_tokens = 64        # written in each round of decoding
compile = not ON_CPU   # compile our training step; PyTorch's is compiled on a GPU

settings = overrides(globals())

GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)
SHAPES = {  # layers, heads, width, context, batch, vocabulary, our architecture
    "4x4x128": (4, 4, 128, 64, 12, 128, {}),
    "6x6x384": (6, 6, 384, 256, 12, 128, {}),
    "124M": (12, 12, 768, 1024, 16, 50304, {}),
    "124M-gpt2": (12, 12, 768, 1024, 16, 50304, GPT2),
}
names = shapes.split(",") if shapes else ["4x4x128", "6x6x384"] if ON_CPU else ["124M", "124M-gpt2"]
if unknown := set(names) - set(SHAPES):
    raise UserError(f"no shape {unknown.pop()}: choose among {', '.join(SHAPES)}")
rounds = rounds or (5 if ON_CPU else 20)
dtype = compute_dtype("auto")
rows = []

# ---- measuring -------------------------------------------------------------------------------------------------------


def race(ours, peer, warmup: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of each round of ours() and, in turn, of peer(), which may be None."""
    times = [], []
    for i in tqdm(range(warmup + rounds), leave=False, disable=None):
        for run, seconds in zip((ours, peer), times, strict=True):
            if run:
                began = time.perf_counter()
                run()
                if i >= warmup:
                    seconds.append(time.perf_counter() - began)
    return times


def row(what: str, times, work: float, unit: str, memory: str = ""):
    """Add a line: `work` units are done in a round."""
    ours, peer = times
    speed = [f"{work / statistics.median(seconds):,.1f}" if seconds else "not installed" for seconds in times]
    ms = [f"{statistics.median(seconds) * 1e3:,.1f}" if seconds else "" for seconds in times]
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=False))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
    rows.append([what, unit, speed[0], speed[1], ratio, ms[0], ms[1], memory])


# ---- the peer: GPT-2 in PyTorch, as nanoGPT writes it ----------------------------------------------------------------

if torch:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    class Block(nn.Module):
        def __init__(self, H, C):
            super().__init__()
            self.H, self.norm1, self.norm2 = H, nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in
                                                      ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)))

        def forward(self, x, cache=None, offset=0):
            B, T, C = x.shape
            q, k, v = (part.view(B, T, self.H, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
            if cache is not None:  # (2, B, H, S, D), filled up to offset
                cache[0, :, :, offset:offset + T], cache[1, :, :, offset:offset + T] = k, v
                k, v = cache[:, :, :, :offset + T]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class TorchGPT(nn.Module):
        def __init__(self, L, H, C, T, V):
            super().__init__()
            self.embed, self.pos = nn.Embedding(V, C), nn.Embedding(T, C)
            self.blocks, self.norm = nn.ModuleList(Block(H, C) for _ in range(L)), nn.LayerNorm(C)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, idx, targets=None, caches=None, offset=0):
            x = self.embed(idx) + self.pos.weight[offset:offset + idx.shape[1]]
            for i, block in enumerate(self.blocks):
                x = block(x, caches[i] if caches is not None else None, offset)
            if targets is None:
                return self.norm(x[:, -1]) @ self.embed.weight.T
            return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1), targets.flatten())


def torch_step(L, H, C, T, V, x, y):
    model = TorchGPT(L, H, C, T, V).to(device)
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if device == "cuda" else model
    x, y = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (x, y))

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


# ---- training --------------------------------------------------------------------------------------------------------


def our_step(L, H, C, T, V, x, y, architecture):
    """train.py's step, with AdamW."""
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **architecture))
    opt = optim.Adam(1e-4, betas=[0.9, 0.95], bias_correction=True)
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f

    def loss(parameters, x, y):
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        return model.loss(x, y)

    @compiled
    def gradients(x, y):
        parameters = model.trainable_parameters()
        value, grads = mx.value_and_grad(loss)(parameters, x, y)
        model.update(parameters)
        return value, grads

    @compiled
    def update(grads):
        grads, length = optim.clip_grad_norm(grads, 1.0)
        decay = 1 - 0.1 * opt.learning_rate
        model.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, model.trainable_parameters()))
        opt.update(model, grads)
        return length

    x, y = mx.array(x), mx.array(y)

    def step():
        value, grads = gradients(x, y)
        length = update(grads)
        del grads
        mx.eval(value, length, state)

    return step


def bench_training(name: str):
    L, H, C, T, B, V, architecture = SHAPES[name]
    tokens = np.random.default_rng(0).integers(V, size=(B, T + 1), dtype=np.int32)
    ours = our_step(L, H, C, T, V, tokens[:, :-1], tokens[:, 1:], architecture)
    peer = torch_step(L, H, C, T, V, tokens[:, :-1], tokens[:, 1:]) if torch else None
    ours()
    mx.reset_peak_memory()
    ours()
    memory = f"{mx.get_peak_memory() / 2**30:.2f}"
    if torch and device == "cuda":
        peer()
        torch.cuda.reset_peak_memory_stats()
        peer()
        memory += f" / {torch.cuda.max_memory_allocated() / 2**30:.2f}"
    row(f"train {name}, batch {B} x {T}", race(ours, peer), B * T, "tok/s", memory)


# ---- decoding --------------------------------------------------------------------------------------------------------


def bench_decoding(name: str):
    L, H, C, T, _, V, architecture = SHAPES[name]
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **architecture))
    model.eval()
    model.set_dtype(dtype)
    n, prompt = min(new_tokens, T // 2), T // 4
    if torch:
        peer = TorchGPT(L, H, C, T, V).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()

    @torch.no_grad() if torch else lambda f: f
    def peer_decode(idx):
        caches = torch.zeros(L, 2, len(idx), H, T, C // H, device=device, dtype=peer.embed.weight.dtype)
        token, offset = peer(idx, None, caches, 0).argmax(-1, keepdim=True), idx.shape[1]
        for _ in range(n - 1):
            token, offset = peer(token, None, caches, offset).argmax(-1, keepdim=True), offset + 1
        return token.tolist()

    @torch.no_grad() if torch else lambda f: f
    def peer_prefill(idx):
        return peer(idx).argmax(-1).tolist()

    def prefill(idx):
        mx.eval(model.unembed(model.residual(idx, model.make_cache())[:, -1]))

    def on_device(ids):
        return torch.from_numpy(ids.astype(np.int64)).to(device) if torch else None

    for B in (1, 16):
        ids = np.random.default_rng(0).integers(V, size=(B, prompt))
        times = race(lambda ids=ids: list(generate(model, ids, n, temperature=0)),
                     partial(peer_decode, on_device(ids)) if torch else None)
        row(f"decode {name}, batch {B}, {n} after {prompt}", times, B * n, "tok/s")
    ids = np.random.default_rng(0).integers(V, size=(1, T))
    times = race(partial(prefill, mx.array(ids)), partial(peer_prefill, on_device(ids)) if torch else None)
    row(f"prefill {name}, {T} tokens", times, T, "tok/s")


# ---- tokenizing ------------------------------------------------------------------------------------------------------


def bench_tokenizing():
    """Python's own sources, by a vocabulary of 4096 learned from them; one thread each."""
    text = ""
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            text += file.read()
    text = text[:4_000_000]
    ours = train_bpe([text[i:i + 100_000] for i in range(0, len(text), 100_000)], 4096)
    peer = None
    if tokenizers:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        letters = dict(zip(*(reversed(column) for column in zip(*byte_letters().items(), strict=True)), strict=True))
        spelled = {token: "".join(letters[byte] for byte in token) for token in ours.tokens}
        ranks, merges = {token: i for i, token in enumerate(ours.tokens)}, []
        for token in ours.tokens[256:]:  # the two tokens that it was merged from: those whose union comes last
            cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
            best = min(cuts, key=lambda cut: max(ranks[cut[0]], ranks[cut[1]]))
            merges.append((spelled[best[0]], spelled[best[1]]))
        peer = tokenizers.Tokenizer(models.BPE({spelled[token]: i for token, i in ranks.items()}, merges))
        peer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(ours.pattern.replace("?+", "?").replace("++", "+")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        peer.decoder = decoders.ByteLevel()
    times = race(lambda: ours.encode(text), (lambda: peer.encode(text)) if peer else None, warmup=1)
    row("tokenize stdlib, one thread", times, len(text.encode()) / 1e6, "MB/s")


def byte_letters() -> dict[str, int]:
    """The printable letters by which GPT-2's files write the 256 bytes: letter -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ---- run -------------------------------------------------------------------------------------------------------------

info = mx.device_info()
print(f"{info.get('device_name')}, {os.cpu_count()} cores, mlx {mx.__version__}, {blas.loaded or 'no other BLAS'}, "
      f"{'torch ' + torch.__version__ if torch else 'no torch'}, {str(dtype).split('.')[-1]}, {datetime.date.today()}")
for name in names:
    if "train" in only:
        bench_training(name)
        mx.clear_cache()
    if "decode" in only:
        bench_decoding(name)
        mx.clear_cache()
if "tokenize" in only:
    bench_tokenizing()

head = ["", "unit", "ours", "peer", "ratio (range)", "ours ms", "peer ms", "GiB ours / peer"]
widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
for line in [head, *rows]:
    print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in
                    enumerate(zip(line, widths, strict=True))))
