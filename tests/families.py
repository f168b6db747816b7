"""Tiny models of every family, made by transformers from random weights, and a table of how near ours are to them.

    python tests/families.py                  the table; needs torch and transformers, and mlx-lm for the last column
    python tests/families.py model.gguf ...   rows for files, which transformers unpacks; export: the file's export as
                                              a folder
    python tests/families.py --fixtures       writes tests/fixtures/families again

It stands beside the tests, since test_families.py checks the same models by the same functions.

Columns: error, the largest difference between two logits of this collection and of the peer, divided by the largest
logit; tokens, how many of 16 tokens that follow a prompt greedily are equal; cached, the largest difference between
logits of one token at a time with a key/value cache and of all at once; export, the error of transformers with the
folder that hf_reader.py writes; mlx-lm, the error of mlx-lm with that folder (-: it does not have the family, or not
all of its settings).
"""
import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import blas  # noqa: F401, E402  (before mlx)
import mlx.core as mx  # noqa: E402
from conftest import run_here  # noqa: E402
from peers import peer  # noqa: E402

from model import GPT, load_checkpoint  # noqa: E402

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "families"
LENGTH = 24
SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64)
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GEMMA = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=3)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
MODELS = {  # transformers' config class, settings; with windows of 5 tokens, of the LENGTH that are read
    "gpt2": ("GPT2", dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": ("GPTNeoX", dict(NEOX, rotary_pct=0.25)),
    "gpt_neox-in-turn": ("GPTNeoX", dict(NEOX, use_parallel_residual=False, hidden_act="gelu_new",
                                      intermediate_size=64)),
    "gemma3_text": ("Gemma3Text", dict(GEMMA, sliding_window=5, query_pre_attn_scalar=32, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"], rope_parameters={
            "full_attention": dict(rope_type="linear", factor=4.0, rope_theta=1e4),
            "sliding_attention": dict(rope_type="default", rope_theta=100.0)})),
    "gemma2": ("Gemma2", dict(GEMMA, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=2.0,
                              final_logit_softcapping=3.0)),
    "gemma": ("Gemma", dict(GEMMA)),
    "qwen3_moe": ("Qwen3Moe", dict(SIZES, head_dim=8, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2,
                                   norm_topk_prob=True)),
    "phi": ("Phi", dict(SIZES, num_key_value_heads=2, partial_rotary_factor=0.5)),
    "phi3": ("Phi3", dict(SIZES, sliding_window=5, pad_token_id=0)),
    "phi3-partial": ("Phi3", dict(SIZES, pad_token_id=0, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="default", rope_theta=500.0, partial_rotary_factor=0.75))),
    "olmo2": ("Olmo2", SIZES),
    "smollm3": ("SmolLM3", dict(SIZES, no_rope_layers=[1, 0], pad_token_id=0)),
    "smollm3-windows": ("SmolLM3", dict(SIZES, no_rope_layers=[1, 0], pad_token_id=0, use_sliding_window=True,
                                        sliding_window=5)),
    "stablelm": ("StableLm", dict(SIZES, use_qkv_bias=True)),
    "stablelm-parallel": ("StableLm", dict(SIZES, use_parallel_residual=True, partial_rotary_factor=0.5)),
    "granite": ("Granite", dict(SIZES, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
                                logits_scaling=4.0)),
    "gpt_oss": ("GptOss", dict(SIZES, hidden_size=32, intermediate_size=32, head_dim=16, num_local_experts=3,
                               num_experts_per_tok=2, sliding_window=5, rope_parameters=YARN | dict(truncate=False))),
    "llama-attention_bias": ("Llama", dict(SIZES, attention_bias=True)),
    "llama-biases": ("Llama", dict(SIZES, attention_bias=True, mlp_bias=True)),
    "qwen3-attention_bias": ("Qwen3", dict(SIZES, head_dim=16, attention_bias=True)),
    "llama-linear": ("Llama", dict(SIZES, rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0))),
    "llama-dynamic": ("Llama", dict(SIZES, rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=4.0))),
    "llama-yarn": ("Llama", dict(SIZES, rope_parameters=YARN)),
    "qwen2-yarn": ("Qwen2", dict(SIZES, rope_parameters=YARN | dict(attention_factor=0.8, beta_fast=4.0,
                                                                    beta_slow=0.5))),
    "qwen3-yarn": ("Qwen3", dict(SIZES, head_dim=8, rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.3))),
    "gpt_neox-linear": ("GPTNeoX", dict(NEOX, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4,
                                                                    partial_rotary_factor=0.5))),
}
NOT_IN_MLX_LM = {  # what mlx-lm 0.32.2 does not have, so that its logits are others
    "gpt_neox": "gelu without an approximation", "gpt_neox-linear": "scaling", "gemma": "the approximation of gelu",
    "gemma2": "windows", "phi3": "windows", "smollm3-windows": "windows", "qwen3-attention_bias": "biases",
    "phi3-partial": "a tied head", "gpt_oss": "experts that are not packed"}


def tokens(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, (2, length))


def make(name: str, folder: Path, **change):
    """Write a model, with some settings changed; norms and biases are random too. Returns it, and its logits."""
    torch, transformers = peer("torch"), peer("transformers")
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings | change)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
        for key, p in model.named_parameters():
            if key.endswith("gate_up_proj_bias"):  # so that inputs of GPT-OSS's activation are clipped
                p *= 30
    model.save_pretrained(folder)
    return model, logits_there(model)


def logits_there(model, length: int = LENGTH) -> np.ndarray:
    """The logits of one of transformers' models."""
    import torch
    with torch.no_grad():
        return model(torch.tensor(tokens(length))).logits.float().numpy()


def in_transformers(folder: Path):
    """A folder as transformers reads it. Nothing may be missing or left over."""
    model, told = peer("transformers").AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def logits_here(model: GPT, length: int = LENGTH) -> np.ndarray:
    return np.array(model.eval()(mx.array(tokens(length))).astype(mx.float32))


def logits_cached(model: GPT, length: int = LENGTH) -> np.ndarray:
    """The logits of one token at a time."""
    cache = model.make_cache()
    steps = [model(mx.array(column[:, None]), cache=cache) for column in tokens(length).T]
    return np.array(mx.concatenate(steps, axis=1).astype(mx.float32))


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two logits, divided by the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def older(folder: Path):
    """Spell a folder's config.json as transformers 4 did."""
    raw = json.loads((folder / "config.json").read_text())
    raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        neox = raw["model_type"] == "gpt_neox"
        raw["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            raw["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {"type": rope["rope_type"]}
    (folder / "config.json").write_text(json.dumps(raw))


def write_fixtures():
    """tests/fixtures/families: for each model a folder, and the logits that transformers computes from it."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name in MODELS.keys() - {"gpt2", "llama-linear"}:  # make_hf.py has them
        logits = make(name, FIXTURES / name)[1]
        (FIXTURES / name / "generation_config.json").unlink(missing_ok=True)
        np.save(FIXTURES / name / "logits.npy", logits)


# ---- the table -------------------------------------------------------------------------------------------------------


def greedy(logits_of, n: int = 16) -> list[int]:
    """n tokens after a prompt. logits_of: token ids (1, T) -> logits (1, T, V)."""
    ids = tokens()[:1, :8].tolist()[0]
    for _ in range(n):
        ids.append(int(np.argmax(logits_of(np.array([ids]))[0, -1])))
    return ids[8:]


def row(name: str, folder: Path) -> dict:
    import torch
    theirs, logits = make(name, folder / "theirs")
    run_here("hf_reader.py", folder / "theirs", folder / "ours.safetensors")
    ours, _ = load_checkpoint(str(folder / "ours.safetensors"))
    run_here("hf_reader.py", folder / "ours.safetensors", f"--export={folder / 'back'}")
    with torch.no_grad():
        there = greedy(lambda ids: theirs(torch.tensor(ids)).logits.numpy())
    here = greedy(lambda ids: np.array(ours(mx.array(ids))))
    return {"error": error(logits_here(ours), logits), "tokens": sum(a == b for a, b in zip(here, there, strict=True)),
            "cached": error(logits_cached(ours), logits_here(ours)),
            "export": error(logits_there(in_transformers(folder / "back")), logits),
            "mlx-lm": error_in_mlx_lm(name, folder / "back", logits)}


def error_in_mlx_lm(name: str, folder: Path, logits: np.ndarray) -> float | None:
    if name in NOT_IN_MLX_LM:
        return None
    model, _ = peer("mlx_lm.utils").load_model(folder)
    return error(np.array(model(mx.array(tokens()))), logits)


def row_of_file(path: Path, folder: Path) -> dict:
    """700 tokens, of whose logits the last 20 are compared; in float32, with packed layers as they are in the file."""
    import torch
    run_here("gguf_reader.py", path, folder / "ours.safetensors")
    ours, _ = load_checkpoint(str(folder / "ours.safetensors"))
    ours.set_dtype(mx.float32)
    run_here("hf_reader.py", folder / "ours.safetensors", f"--export={folder / 'back'}")
    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (1, 700))
    here = np.array(ours(mx.array(ids))[:, -20:])
    cache = ours.make_cache()
    ours(mx.array(ids[:, :-20]), cache=cache)
    steps = [np.array(ours(mx.array(ids[:, i:i + 1]), cache=cache)) for i in range(680, 700)]
    next_here = greedy(lambda ids: np.array(ours(mx.array(ids), last=True)))
    there, next_there = [], []
    for place, more in ((path.parent, {"gguf_file": path.name}), (folder / "back", {})):
        theirs = peer("transformers").AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more).eval()
        with torch.no_grad():
            there.append(theirs(torch.tensor(ids), logits_to_keep=20).logits.numpy())
            next_there.append(greedy(lambda ids, theirs=theirs: theirs(torch.tensor(ids)).logits.numpy()))
        del theirs
    return {"error": error(here, there[0]), "tokens": sum(map(int.__eq__, next_here, next_there[0])),
            "cached": error(np.concatenate(steps, axis=1), here), "export": error(there[1], there[0]), "mlx-lm": None}


def table(files: list[str]):
    print(f"{'model':22} {'error':>8} {'tokens':>7} {'cached':>8} {'export':>8} {'mlx-lm':>8}")
    for name in files or MODELS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            found = row_of_file(Path(name), Path(folder)) if files else row(name, Path(folder))
        name = Path(name).stem[:22]
        shown = [f"{found[key]:8.0e}" if found[key] is not None else f"{'-':>8}"
                 for key in ("error", "cached", "export", "mlx-lm")]
        print(f"{name:22} {shown[0]} {found['tokens']:4}/16 {' '.join(shown[1:])}", flush=True)


if __name__ == "__main__":
    write_fixtures() if "--fixtures" in sys.argv else table(sys.argv[1:])
