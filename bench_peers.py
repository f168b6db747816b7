"""The peers that bench.py compares our code with. bench.py runs them in a process without our threads:

    python bench_peers.py torch '{"kind": "train", "n_layer": 4, ...}'

It builds the task, does two rounds to warm up, and prints a line. Then it does a round for every line on its standard
input, and prints {"seconds": ..., "peak": GiB}. torch: GPT-2 as nanoGPT writes it; eager float32 on a CPU;
torch.compile, bfloat16 and a fused AdamW on a GPU; decoding with a preallocated key/value cache. torch_graphs: decoding
with a cache of fixed size, whose step is compiled and replayed as a CUDA graph. mlx_lm: mlx-lm's Llama and
generate_step. Exit status 3: the package is not installed.
"""
import json
import signal
import sys
import time
from functools import partial

# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_round(task: dict, graphs: bool = False):
    import torch
    import torch.nn.functional as F
    from torch import nn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    L, H, C, T, V, B = (task[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in
                                                      ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)))

        def forward(self, x, cache, offset, mask):
            B, T, C = x.shape
            q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
            if mask is not None:  # offset: the places of the tokens; all of the cache is read
                cache[0].index_copy_(2, offset, k), cache[1].index_copy_(2, offset, v)
                k, v = cache
            elif cache is not None:  # (2, B, H, S, D), filled up to offset
                cache[0, :, :, offset:offset + T], cache[1, :, :, offset:offset + T] = k, v
                k, v = cache[:, :, :, :offset + T]
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.pos = nn.Embedding(V, C), nn.Embedding(T, C)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(C)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, idx, targets=None, caches=None, offset=0, mask=None):
            x = self.embed(idx) + (self.pos.weight[offset:offset + idx.shape[1]] if mask is None else self.pos(offset))
            for i, block in enumerate(self.blocks):
                x = block(x, None if caches is None else caches[i], offset, mask)
            if targets is None:
                return self.norm(x[:, -1]) @ self.embed.weight.T
            return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1), targets.flatten())

    model = GPT().to(device)

    def peak():
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0

    if task["kind"] == "train":
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=device == "cuda")
        run = torch.compile(model) if device == "cuda" else model
        tokens = torch.randint(V, (B, T + 1), device=device)

        def step():
            for _ in range(task["steps"]):
                with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                    loss = run(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss.item()

        return step, peak

    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
    prompt = torch.randint(V, (B, task["prompt"]), device=device)

    @torch.no_grad()
    def decode():
        caches = torch.zeros(L, 2, B, H, T, C // H, device=device, dtype=model.embed.weight.dtype)
        token, offset = model(prompt, None, caches, 0).argmax(-1, keepdim=True), task["prompt"]
        for _ in range(task["new"] - 1):
            token, offset = model(token, None, caches, offset).argmax(-1, keepdim=True), offset + 1
            if offset % 16 == 0:
                token.tolist()  # as if a user read the tokens as they are generated
        return token.tolist()

    if not graphs:
        return decode, peak

    room = torch.arange(task["prompt"] + task["new"], device=device)
    model.register_buffer("caches", torch.zeros(L, 2, B, H, len(room), C // H, device=device,
                                                dtype=model.embed.weight.dtype))

    def read(tokens, places):
        return model(tokens, None, model.caches, places, room <= places[:, None]).argmax(-1, keepdim=True)

    step = torch.compile(read, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad
    def decode_by_graphs():
        token = read(prompt, room[:task["prompt"]])
        for i in range(task["new"] - 1):
            token = step(token, room[task["prompt"] + i:][:1]).clone()
            if i % 16 == 0:
                token.tolist()
        return token.tolist()

    return decode_by_graphs, peak


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------


def mlx_lm_round(task: dict):
    import blas  # noqa: F401, I001  (before mlx)
    import mlx.core as mx
    sys.modules["hqq"] = None  # transformers would take our hqq.py for the package of that name
    from mlx_lm.generate import generate_step
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs(
        model_type="llama", hidden_size=task["n_embd"], num_hidden_layers=task["n_layer"],
        intermediate_size=task["ffn_dim"], num_attention_heads=task["n_head"], rms_norm_eps=1e-5,
        vocab_size=task["vocab_size"], tie_word_embeddings=True))
    model.set_dtype(getattr(mx, task["dtype"]))
    mx.eval(model.parameters())
    prompt = mx.random.randint(0, task["vocab_size"], (task["prompt"],))

    def decode():
        for _ in generate_step(prompt, model, max_tokens=task["new"]):
            pass

    return decode, lambda: mx.get_peak_memory() / 2**30


# ---- serve -----------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # bench.py says that it was stopped
    peers = {"torch": torch_round, "torch_graphs": partial(torch_round, graphs=True), "mlx_lm": mlx_lm_round}
    if len(sys.argv) != 3 or sys.argv[1] not in peers or not sys.argv[2].startswith("{"):
        print(f"{sys.argv[0]} is started by bench.py: run `python bench.py` instead", file=sys.stderr)
        sys.exit(2)
    try:
        work, peak = peers[sys.argv[1]](json.loads(sys.argv[2]))
    except ImportError:
        sys.exit(3)  # not installed
    for _ in range(2):
        work()
    print(json.dumps({"peak": peak()}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak()}), flush=True)
