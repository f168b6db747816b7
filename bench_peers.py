"""The peers that bench.py compares our code with. bench.py runs them in a process without our threads:

    python bench_peers.py torch '{"n_layer": 4, ..., "bits": 0, "tasks": [{"kind": "write", "batch": 16, ...}, ...]}'

It builds the model, does every task once or twice to warm up, and prints a line. For every line on its standard input,
the number of a task, it does this task and prints {"seconds": ..., "peak": GiB}. torch: GPT-2 as nanoGPT writes it, or
Llama; eager float32 on a CPU; torch.compile, bfloat16 and a fused AdamW on a GPU; writing with a preallocated key/value
cache. torch_graphs: writing with a cache of fixed size, whose step, the draw included, is compiled and replayed as a
CUDA graph. mlx_lm: mlx-lm's GPT-2 or Llama, generate_step, and BatchGenerator for several texts; "bits": 4 packs its
weights. Exit status 3: the package is not installed.
"""
import json
import signal
import sys
import time
from functools import partial


def time_of_writing(task: dict, tokens) -> float | None:
    """Read an iterator of tokens to its end: the seconds after its first one, or None for a task of all the time."""
    next(tokens)
    began = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - began if task["kind"] == "write" else None


def serve(task: dict, works: list, peak):
    """Do the tasks that bench.py asks for. works: functions that return the seconds of what is to be timed, or None for
    all of their time. peak: a function that returns GiB."""
    for work, each in zip(works, task["tasks"], strict=True):
        for _ in range(1 if each["kind"] == "many" else 2):
            work()
    print(json.dumps({"peak": peak()}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        taken = works[int(line)]()
        print(json.dumps({"seconds": taken or time.perf_counter() - began, "peak": peak()}), flush=True)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_works(task: dict, graphs: bool = False):
    import torch
    import torch.nn.functional as F
    from torch import nn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    L, H, C, T, V, hidden = (task[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size",
                                                     "ffn_dim"))
    llama = task["mlp"] == "swiglu"
    Norm, bias = (nn.RMSNorm if llama else nn.LayerNorm), not llama
    if not llama:
        hidden = 4 * C

    def turned(x, places):
        """Rotary positions: x (B, H, T, D), places (T,)."""
        D = x.shape[-1]
        angle = places[:, None] * task["rope_theta"] ** (torch.arange(0, D, 2, device=device) / -D)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(C), Norm(C)
            self.qkv, self.out = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
            self.up, self.down = nn.Linear(C, hidden * (1 + llama), bias), nn.Linear(hidden, C, bias)

        def forward(self, x, cache, offset, mask):
            B, T, C = x.shape
            q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
            if llama:
                places = torch.arange(offset, offset + T, device=device) if mask is None else offset
                q, k = turned(q, places), turned(k, places)
            if mask is not None:  # offset: the places of the tokens; all of the cache is read
                cache[0].index_copy_(2, offset, k), cache[1].index_copy_(2, offset, v)
                k, v = cache
            elif cache is not None:  # (2, B, H, S, D), filled up to offset
                cache[0, :, :, offset:offset + T], cache[1, :, :, offset:offset + T] = k, v
                k, v = cache[:, :, :, :offset + T]
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            y = self.up(self.norm2(x))
            if llama:
                gate, y = y.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * y if llama else F.gelu(y))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, C)
            if not llama:
                self.pos = nn.Embedding(T, C)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), Norm(C)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, idx, targets=None, caches=None, offset=0, mask=None):
            x = self.embed(idx)
            if not llama:
                x = x + (self.pos.weight[offset:offset + idx.shape[1]] if mask is None else self.pos(offset))
            for i, block in enumerate(self.blocks):
                x = block(x, None if caches is None else caches[i], offset, mask)
            if targets is None:
                return self.norm(x[:, -1]) @ self.embed.weight.T
            return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1), targets.flatten())

    model = GPT().to(device)

    def peak():
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0

    def training(task):
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=device == "cuda")
        run = torch.compile(model) if device == "cuda" else model
        tokens = torch.randint(V, (task["batch"], T + 1), device=device)

        def step():
            for _ in range(task["steps"]):
                with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                    loss = run(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss.item()

        return step

    if task["tasks"][0]["kind"] == "train":
        return [training(each) for each in task["tasks"]], peak
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()

    def writing(task, name):
        prompt = torch.randint(V, (task["batch"], task["prompt"]), device=device)
        room = torch.arange(task["prompt"] + task["new"], device=device)
        size = L, 2, len(prompt), H, len(room), C // H

        def draw(logits):
            if not task["temperature"]:
                return logits.argmax(-1, keepdim=True)
            largest, ids = logits.topk(task["top_k"])
            noise = torch.rand_like(largest, dtype=torch.float32).clamp(1e-20)
            noisy = largest.float() / task["temperature"] - (-noise.log()).log()  # Gumbel's: the largest one is a draw
            return ids.gather(-1, noisy.argmax(-1, keepdim=True))

        @torch.no_grad()
        def write():
            caches = torch.zeros(size, device=device, dtype=model.embed.weight.dtype)
            token, offset = draw(model(prompt, None, caches, 0)), task["prompt"]
            token.tolist()
            began = time.perf_counter()
            for _ in range(task["new"] - 1):
                token, offset = draw(model(token, None, caches, offset)), offset + 1
                if offset % 16 == 0:
                    token.tolist()  # as if a user read the tokens as they are generated
            token.tolist()
            return time.perf_counter() - began if task["kind"] == "write" else None

        if not graphs:
            return write
        model.register_buffer(name, torch.zeros(size, device=device, dtype=model.embed.weight.dtype))

        def read(tokens, places):
            return draw(model(tokens, None, getattr(model, name), places, room <= places[:, None]))

        step = torch.compile(read, mode="reduce-overhead", fullgraph=True, dynamic=False)

        @torch.no_grad()
        def write_by_graphs():
            token = read(prompt, room[:task["prompt"]])
            token.tolist()
            began = time.perf_counter()
            for i in range(task["new"] - 1):
                token = step(token, room[task["prompt"] + i:][:1]).clone()
                if i % 16 == 0:
                    token.tolist()
            token.tolist()
            return time.perf_counter() - began

        return write_by_graphs

    return [writing(each, f"caches{i}") for i, each in enumerate(task["tasks"])], peak


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------


def mlx_lm_works(task: dict):
    import blas  # noqa: F401, I001  (before mlx)
    import mlx.core as mx
    from mlx import nn
    sys.modules["hqq"] = None  # transformers would take our hqq.py for the package of that name
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models import gpt2, llama
    from mlx_lm.sample_utils import make_sampler

    if task["mlp"] == "swiglu":
        model = llama.Model(llama.ModelArgs(
            model_type="llama", hidden_size=task["n_embd"], num_hidden_layers=task["n_layer"],
            intermediate_size=task["ffn_dim"], num_attention_heads=task["n_head"], rms_norm_eps=1e-5,
            vocab_size=task["vocab_size"], tie_word_embeddings=True))
    else:
        model = gpt2.Model(gpt2.ModelArgs(
            model_type="gpt2", n_ctx=task["block_size"], n_embd=task["n_embd"], n_head=task["n_head"],
            n_layer=task["n_layer"], n_positions=task["block_size"], layer_norm_epsilon=1e-5,
            vocab_size=task["vocab_size"]))
    model.set_dtype(getattr(mx, task["dtype"]))
    if task["bits"]:
        nn.quantize(model, 64, task["bits"])
    mx.eval(model.parameters())

    def writing(task):
        prompts = mx.random.randint(0, model.args.vocab_size, (task["batch"], task["prompt"]))
        sampler = make_sampler(temp=task["temperature"], top_k=task["top_k"])

        def tokens():
            if len(prompts) == 1:
                yield from generate_step(prompts[0], model, max_tokens=task["new"], sampler=sampler)
                return
            batch = BatchGenerator(model, sampler=sampler, completion_batch_size=len(prompts),
                                   prefill_batch_size=len(prompts))
            batch.insert(prompts.tolist(), [task["new"]] * len(prompts))
            while found := batch.next_generated():
                yield found

        return lambda: time_of_writing(task, tokens())

    def many(task):
        def write():
            batch = BatchGenerator(model, completion_batch_size=task["batch"], prefill_batch_size=min(8, task["batch"]))
            batch.insert(task["prompts"], task["lengths"])
            written = 0
            while found := batch.next_generated():
                written += len(found)
            assert written == sum(task["lengths"])

        return write

    works = [(many if each["kind"] == "many" else writing)(each) for each in task["tasks"]]
    return works, lambda: mx.get_peak_memory() / 2**30


# ---- serve -----------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # bench.py says that it was stopped
    peers = {"torch": torch_works, "torch_graphs": partial(torch_works, graphs=True), "mlx_lm": mlx_lm_works}
    if len(sys.argv) != 3 or sys.argv[1] not in peers or not sys.argv[2].startswith("{"):
        print(f"{sys.argv[0]} is started by bench.py: run `python bench.py` instead", file=sys.stderr)
        sys.exit(2)
    try:
        described = json.loads(sys.argv[2])
        works, peak = peers[sys.argv[1]](described)
    except ImportError:
        sys.exit(3)  # not installed
    serve(described, works, peak)
