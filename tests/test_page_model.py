"""webgpu/gpt.js, inside.js and train.js in a browser give the numbers that model.py gives, from equal checkpoints."""
import base64
import csv
import json
import math
import re
from dataclasses import asdict

import blas  # noqa: F401  (before mlx)
import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from browser import js
from conftest import ROOT, run
from mlx.utils import tree_flatten, tree_map
from test_awq_reader import folder_of
from test_conversations import QUESTIONS

import attention_maps
import patching
import tuned_lens
from conversations import encode_prompt, template_of
from lora import base_fingerprint
from model import GPT, GPTConfig, generate, load_checkpoint, save_arrays, save_checkpoint
from tokenizer import Tokenizer, byte_tokenizer, letters_of_bytes

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 257, 37).tolist()
FLAVOURS = {
    "default": {}, "half": {}, "bfloat": {},
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "gpt2-tanh": dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False, tie=False),
    "llama": dict(mlp="swiglu", qk_norm=False, tie=False, n_kv_head=1),
    "qwen": dict(mlp="swiglu", qk_norm=False, n_kv_head=1, qkv_bias=True, rope_factor=8.0, rope_original=64),
    "window": dict(sliding_window=9, window_pattern="SL"), "alibi": dict(alibi=True, n_head=3, n_embd=96),
    "softcap": dict(softcap=2.0), "odd": dict(n_embd=54, n_head=3, head_dim=10, ffn_dim=77),
    "4-bit": dict(mlp="swiglu"), "8-bit": {}, "3-bit": {}, "2-bit": {},
    "neox": dict(parallel=True, rotary_dim=8, norm="layer", mlp="gelu", bias=True, qk_norm=False, tie=False),
    "phi": dict(parallel=True, rotary_dim=12, norm="layer", norm_bias=True, mlp="gelu_tanh", bias=True, qk_norm=False,
                tie=False, head_bias=True),
    "stablelm": dict(norm="layer", norm_bias=True, rotary_dim=8, mlp="swiglu", qk_norm=False, qkv_bias=True),
    "gemma": dict(norm_place="both", mlp="geglu", embed_scale=8.0, attn_scale=0.3, n_kv_head=1, sliding_window=9,
                  window_pattern="SL", window_theta=100.0, rope_scaling="linear", rope_factor=4.0),
    "gemma2": dict(norm_place="both", mlp="geglu", embed_scale=8.0, attn_softcap=3.0, softcap=5.0, qk_norm=False),
    "olmo": dict(norm_place="after", qk_norm_width=True, mlp="swiglu", n_kv_head=1, tie=False),
    "after-parallel": dict(norm_place="after", parallel=True, residual_scale=0.7),
    "smollm3": dict(rope_pattern="RRN", mlp="swiglu", qk_norm=False, out_bias=True, qkv_bias=True),
    "no-positions": dict(rope_pattern="RN"),
    "granite": dict(mlp="swiglu", qk_norm=False, embed_scale=3.0, attn_scale=0.1, residual_scale=0.4, logit_scale=0.2),
    "yarn": dict(mlp="swiglu", qk_norm=False, rope_scaling="yarn", rope_factor=4.0, rope_original=64, rope_low_freq=1.0,
                 rope_high_freq=32.0, rope_theta=100.0),
}
FILES = """
const fileOf = (text, name) => new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name);
const textOf = async (file) => {
  const letters = Array.from(new Uint8Array(await file.arrayBuffer()), (byte) => String.fromCharCode(byte));
  return btoa(letters.join(""));
};
"""  # files are passed as base64
LOAD = """
const { GPU } = await import("/gpu.js"), { GPT } = await import("/gpt.js");
globalThis.file ??= async (name) => new File([await (await fetch(`/checkpoints/${name}`)).blob()], name);
globalThis.gpu ??= await GPU.open();
const model = await GPT.load(gpu, await file(NAME));
const last = async (steps) => { let found; for await (found of steps); return found; };
"""


def in_page(page, name: str, body: str, *arguments, parameters: str = ""):
    """The result of a function's body, in which `model` is the model of a checkpoint and `gpu` the device."""
    found = js(page, f"async ({parameters}) => {{ {LOAD.replace('NAME', json.dumps(name))} {body} }}", *arguments)
    assert js(page, "async () => gpu.errors") == page.problems == []
    return found


def base64_of(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def small(**settings) -> GPT:
    sizes = dict(block_size=40, vocab_size=320, n_layer=3, n_head=2, n_embd=64)
    return GPT(GPTConfig(**sizes | settings), seed=1).eval()


def save(server, name: str, model: GPT) -> str:
    save_checkpoint(str(server.folder / name), model, {"tokenizer": byte_tokenizer().to_dict()})
    return name


def flavour(server, name: str) -> tuple[str, GPT]:
    """A checkpoint in which no parameter is near 0, and its model, in float32."""
    model = small(**FLAVOURS[name])
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(p.size)), model.parameters()))
    if name in ("half", "bfloat"):
        model.set_dtype(mx.float16 if name == "half" else mx.bfloat16)
    if "bit" in name:
        bits = int(name[0])
        nn.quantize(model, 32 if bits == 3 else 64, bits, class_predicate=lambda _, module: isinstance(
            module, nn.Linear | nn.Embedding))
    path = save(server, f"{name}.safetensors", model)
    model.set_dtype(mx.float32)
    return path, model


@pytest.mark.parametrize("name", FLAVOURS)
def test_logits_and_text(name, opened, server):
    """Logits of a prompt, and the text that follows, with a cache, beyond the context."""
    path, model = flavour(server, name)
    logits, text = in_page(opened, path, """
        const text = [];
        for await (const { token } of model.generate(ids, { max_new_tokens: 30, temperature: 0 })) text.push(token);
        return [Array.from(await model.logits(ids)), text];""", IDS, parameters="ids")
    expected = np.array(model(mx.array([IDS]))[0])
    assert np.abs(np.array(logits).reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()
    assert text == list(generate(model, IDS, 30, temperature=0, n_vocab=257))


@pytest.fixture
def limited(opened):
    """The page of these tests, and a function that lets its device have buffers of so many bytes only, until the end of
    the test."""
    set_limits = """async (limits) => {
        const { GPU } = await import("/gpu.js");
        globalThis.gpu ??= await GPU.open();
        const before = gpu.info.limits;
        gpu.info.limits = limits;
        return before;
    }"""
    before = []

    def to(bytes: int):
        before.append(js(opened, set_limits, {"buffer": bytes, "binding": bytes}))

    yield opened, to
    for limits in before:
        js(opened, set_limits, limits)


@pytest.mark.parametrize("name, bytes, slices", [("half", 70_000, 2), ("phi", 70_000, 4), ("4-bit", 20_000, 2)])
def test_matrices_beyond_the_limit(name, bytes, slices, limited, server, monkeypatch):
    """Embedding and head are held in slices of rows where a buffer cannot have all of them: logits and text are those
    of the whole matrices."""
    monkeypatch.setitem(FLAVOURS, name, FLAVOURS[name] | {"vocab_size": 1000})
    path, model = flavour(server, name)
    page, limit = limited
    limit(bytes)
    ids = IDS[:4]
    sizes, logits, text = in_page(page, path, """
        const text = [], sizes = model.made.map(({ size }) => size);
        for await (const { token } of model.generate(ids, { max_new_tokens: 12, temperature: 0 })) text.push(token);
        return [[model.weights.get("embed").slices.length, model.head().slices.length, Math.max(...sizes)],
          Array.from(await model.logits(ids)), text];""", ids, parameters="ids")
    assert sizes[:2] == [slices, slices] and sizes[2] <= bytes
    expected = np.array(model(mx.array([ids]))[0])
    assert np.abs(np.array(logits).reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()
    assert text == list(generate(model, ids, 12, temperature=0, n_vocab=257))


def test_too_large_for_the_device(limited, server):
    """Keys and values, attention maps and a batch that do not fit are told, with what to do."""
    path, _ = flavour(server, "default")
    page, limit = limited
    limit(2**20)
    said = in_page(page, path, """
        const { attention } = await import("/inside.js"), { Trainer } = await import("/train.js"), said = [];
        const tries = async (bytes, work) => {
            Object.assign(gpu.info.limits, { binding: bytes });
            said.push(await (async () => work())().then(() => "done", (error) => error.message));
        };
        await tries(10_000, () => model.generate(ids).next());
        await tries(2 * 4 * 36 ** 2, () => attention(model, ids));
        await tries(2 ** 18, () => Trainer.create(gpu, { model, ids: ids.concat(ids, ids, ids), batch_size: 2 }));
        return said;""", IDS, parameters="ids")
    assert said[0] == ("This needs a buffer of 10 KB, and this graphics card allows 10 KB: open the page with "
                       "?context=39.")
    assert "take a prompt of at most 36 tokens" in said[1]
    assert said[2].startswith("This needs a buffer of") and "take a smaller model" in said[2]


@pytest.mark.parametrize("name", ["default", "gpt2", "llama", "stablelm", "half", "4-bit", "8-bit", "3-bit", "granite"])
def test_text_by_fused_products(name, opened, server):
    """With the kernels of a card, the text is Python's, and a layer of most models takes five kernels for a token."""
    path, model = flavour(server, name)
    text, kernels = in_page(opened, path, """
        Object.assign(gpu.paths, { subgroups: true, packed: [4, 8] });
        const { fallback } = gpu.info, text = [];
        gpu.info.fallback = false;
        for await (const { token } of model.generate(ids, { max_new_tokens: 30, temperature: 0 })) text.push(token);
        const { plan } = await model.pass(1, true);
        Object.assign(gpu.paths, { subgroups: false, packed: [] });
        gpu.info.fallback = fallback;
        return [text, plan.steps.length];""", IDS, parameters="ids")
    assert text == list(generate(model, IDS, 30, temperature=0, n_vocab=257))
    around = 5  # the embedding, the last norm, the head, and two for the draw
    if name in ("llama", "granite"):  # keys that cannot be part of a joined matrix, and a factor of what a part adds
        assert kernels > 9 * model.config.n_layer
    else:
        assert kernels == 5 * model.config.n_layer + around


def test_kernels_of_short_rows(page):
    """Packed rows with fewer pairs of words than a subgroup has lanes are multiplied by the kernel for all formats, if
    that was chosen."""
    found = js(page, """async () => {
        const { GPU, Plan } = await import("/gpu.js"), gpu = await GPU.open(), names = [];
        gpu.lanes = 32;
        for (const [width, subgroups] of [[192, true], [512, true], [192, false]]) {
            const plan = new Plan(gpu);
            Object.assign(gpu.paths, { subgroups, packed: [4] });
            const weight = { rows: 8, width, bits: 4, group: 64, scaleBits: 16, buffer: gpu.none };
            gpu.vector(plan, weight, gpu.none, gpu.none);
            names.push(plan.steps[0].name);
        }
        return names;
    }""")
    assert found == ["matvec_subgroup", "matvec_packed", "matvec_packed"]


def test_golden(page, server):
    """From the page's own checkpoint, Python and the page generate a known text."""
    prompt = "raise ValueError("
    golden = ("InvalidOperation)\n        return self._getints(InvalidOperation)\n\n    def __repr__(self):\n"
              '        return "<')
    (server.folder / "demo.safetensors").write_bytes((ROOT / "webgpu" / "demo.safetensors").read_bytes())
    model, meta = load_checkpoint(str(server.folder / "demo.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids = enc.encode(prompt).tolist()
    assert enc.decode(generate(model, ids, 24, temperature=0, n_vocab=enc.n_vocab)) == golden
    texts = in_page(page, "demo.safetensors", """
        const ids = model.enc.encode(prompt), texts = [];
        for (const FASTER of [Infinity, 5]) {  // the second time, other kernels are found after so many tokens
            const found = [];
            for await (const { token } of model.generate(ids, { max_new_tokens: 24, temperature: 0 })) {
                if (found.push(token) !== FASTER) continue;
                Object.assign(gpu.paths, { tiles: [{ least: 0, SIDE: 64 }], subgroups: true, packed: [4, 8] });
            }
            texts.push(model.enc.decode(found));
        }
        if (gpu.errors.length) throw new Error(gpu.errors[0]);
        return texts;""", prompt, parameters="prompt")
    assert texts == [golden, golden]


@pytest.mark.parametrize("script", ["hqq.py", "awq_reader.py"])
def test_packed_by_our_scripts(script, opened, server, tmp_path):
    """Files of these scripts, with several numbers of bits, or with an embedding and a head that are not quantized."""
    if script == "hqq.py":
        source = server.folder / flavour(server, "default")[0]
        settings = ["--bits=3, mlp=8, embed=6", "--group_size=32"]
    else:
        source, settings = folder_of(tmp_path)[0], []
    path = server.folder / f"{script}.safetensors"
    run(script, source, *settings, *([f"--out={path}"] if script == "hqq.py" else [path]))
    model, _ = load_checkpoint(str(path))
    ids = [i % 64 for i in IDS]
    found = np.array(in_page(opened, path.name, "return Array.from(await model.logits(ids));", ids, parameters="ids"))
    model.set_dtype(mx.float32)
    expected = np.array(model(mx.array([ids]))[0])
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()


def small_smollm2(path):
    """A GGUF file of SmolLM2's layout with random weights: matrices of type Q4_1, an embedding of Q8_0, both in groups
    of 32; a tokenizer that lacks bytes, cuts digits apart and begins with no token; a chat template; a context of
    8,192."""
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "r e", "o n", "Ġthe re"]
    made = [letters_of_bytes()[byte] for byte in range(128)] + [merge.replace(" ", "") for merge in merges]
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    sizes = {"context_length": 8192, "embedding_length": 96, "block_count": 2, "feed_forward_length": 256,
             "attention.head_count": 3, "attention.head_count_kv": 1, "rope.dimension_count": 32,
             "vocab_size": len(named + made)}
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(named + made)
    writer.add_token_types([3] * len(named) + [1] * len(made))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
                             "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}")
    C, F, kind = 96, 256, gguf.GGMLQuantizationType
    shapes = {"token_embd": (len(named + made), C)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {
            "attn_q": (C, C), "attn_k": (32, C), "attn_v": (32, C), "attn_output": (C, C), "ffn_gate": (F, C),
            "ffn_up": (F, C), "ffn_down": (C, F), "attn_norm": (C,), "ffn_norm": (C,)}.items()}
    for name, shape in (shapes | {"output_norm": (C,)}).items():
        array = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", array)
            continue
        own = kind.Q8_0 if name == "token_embd" else kind.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array / C**0.5, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_like_smollm2(opened, server, tmp_path):
    """From a GGUF file to the page: ids, logits and greedy text as in Python; a message in the chat template as in
    sample.py; every panel gives numbers; the page takes a part of the context."""
    path = server.folder / "smollm2.safetensors"
    small_smollm2(tmp_path / "small.gguf")
    run("gguf_reader.py", tmp_path / "small.gguf", path)
    model, meta = load_checkpoint(str(path))
    enc, prompt = Tokenizer.from_dict(meta["tokenizer"]), "the  12 there é<|im_end|>"
    ids = enc.encode(prompt).tolist()
    bits = {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}
    assert enc.start == [] and bits == {4, 8} and meta["chat_template"]
    found = in_page(opened, path.name, """
        const { ablate, attention, lens, swap } = await import("/inside.js"), text = [];
        const ids = [...model.enc.start, ...model.enc.encode(prompt)];
        for await (const { token } of model.generate(ids, { max_new_tokens: 10, temperature: 0 })) text.push(token);
        const panels = [(await lens(model, ids)).map((row) => row.map(({ entropy }) => entropy)),
            (await attention(model, ids)).map((map) => Array.from(map)), (await last(ablate(model, ids, 5))).values,
            (await last(swap(model, ids, [...ids.slice(0, -1), 9], 5))).values];
        const long = await model.logits(new Array(3000).fill(5)).catch((error) => error.message);
        model.config.n_layer = 30, model.queries = 9;  // for the message alone
        const maps = await attention(model, new Array(1500).fill(5)).catch((error) => error.message);
        model.config.n_layer = 2, model.queries = 3;
        const { config: { block_size }, whole_context, ends } = model;
        const asked = questions.map((question) => model.promptOf(question));
        return { ids, asked, text, logits: Array.from(await model.logits(ids)), panels, long, maps, block_size,
                 whole_context, ends: [...ends] };""", prompt, QUESTIONS, parameters="prompt, questions")
    template = template_of(meta, enc)
    assert found["asked"] == [encode_prompt(enc, [{"role": "user", "content": question}], template)
                              for question in QUESTIONS]
    assert found["ids"] == ids and sorted(found["ends"]) == sorted(meta["ends"]) == [0, 2]
    model.set_dtype(mx.float32)
    expected = np.array(model(mx.array([ids]))[0])
    assert np.abs(np.array(found["logits"]).reshape(expected.shape) - expected).max() < 2e-5 * np.abs(expected).max()
    assert found["text"] == list(generate(model, ids, 10, temperature=0, n_vocab=enc.n_vocab))
    for panel in found["panels"]:
        assert np.isfinite(np.concatenate([np.array(row, np.float64).reshape(-1) for row in panel])).all()
    assert (found["block_size"], found["whole_context"]) == (2048, 8192)
    assert "3000 tokens, and this page takes 2048 of this model's 8192" in found["long"]
    assert "The 270 attention maps of 1500 tokens need 2430 MB: take a prompt of at most 997 tokens" in found["maps"]


@pytest.mark.parametrize("answers, fallback", [
    (["none", "card"], False), (["software", "card"], False), (["none", "software", "software"], True)], ids=str)
def test_a_card_that_comes_late(answers, fallback, page):
    """A browser may have no card, or only the processor, when it is first asked."""
    found, asked = js(page, """async (answers) => {
        const { GPU } = await import("/gpu.js"), { requestAdapter } = navigator.gpu;
        let asked = 0;
        navigator.gpu.requestAdapter = async (options) => {
            const answer = answers[asked++], adapter = await requestAdapter.call(navigator.gpu, options);
            if (answer === "none") return null;
            const isFallbackAdapter = answer === "software";
            const info = { vendor: answer, architecture: "", description: "", subgroupMaxSize: 4, isFallbackAdapter };
            return new Proxy(adapter, { get: (of, name) => {
                if (name === "info") return info;
                return typeof of[name] === "function" ? of[name].bind(of) : of[name];
            } });
        };
        const gpu = await GPU.open();
        delete navigator.gpu.requestAdapter;
        return [gpu.info, asked];
    }""", answers)
    assert found["fallback"] == fallback and found["name"] == answers[-1] and asked == len(answers)


def test_a_fetch_that_failed(page):
    """It is told as a lost connection, and forgotten: the next try fetches again. All files of kernels are fetched
    ahead, and then no server is needed."""
    said, names = js(page, """async () => {
        const { GPU } = await import("/gpu.js"), { fetch } = globalThis, said = [];
        let gpu = await GPU.open();
        const tries = async (name) => {
            said.push(await gpu.kernel(name, {}).then(() => "made", (error) => error.message));
        };
        globalThis.fetch = async () => { throw new TypeError("Failed to fetch"); };
        await tries("add");
        globalThis.fetch = async () => new Response("", { status: 503 });
        await tries("add");
        globalThis.fetch = fetch;
        await tries("add");
        await gpu.fetchAll();
        globalThis.fetch = async () => { throw new TypeError("Failed to fetch"); };
        gpu = await GPU.open();  // as after the loss of a device
        await tries("scale");
        globalThis.fetch = fetch;
        const asked = performance.getEntriesByType("resource").map(({ name }) => name.split("/kernels/")[1]);
        return [said, asked.filter(Boolean)];
    }""")
    assert "lost the connection to its server" in said[0] and "(503)" in said[1] and said[2:] == ["made", "made"]
    assert sorted(names) == sorted(path.name for path in (ROOT / "webgpu" / "kernels").iterdir())


def test_a_race_without_a_winner(page):
    """A kernel that is as fast as the plain one does not replace it, since the race cannot tell them apart."""
    choices = js(page, """async () => {
        const { chooseKernels, GPU } = await import("/gpu.js"), gpu = await GPU.open();
        let now = 0;
        performance.now = () => now += [7, 9, 8, 10][Math.floor(now) % 4];  // all times vary, and none is shorter
        await chooseKernels(gpu);
        delete performance.now;
        return gpu.choices;
    }""")
    reasons = {choice["name"]: choice for choice in choices}
    assert not reasons["subgroups"]["used"] and reasons["subgroups"]["reason"].endswith("within the spread")


@pytest.mark.parametrize("more", [{}, {"TRANSPOSE_X": True, "TRANSPOSE_W": True, "ACCUMULATE": True}], ids=len)
def test_products_in_parts(more, page):
    """A product with few tiles and many columns is computed in parts, with the bias, or added to what is there."""
    M, N, K = 64, 68, 2048
    x, weight, bias, before = (RNG.standard_normal(shape).astype(np.float32) for shape in ((M, K), (N, K), N, (M, N)))
    arrays = [(x.T if more else x), (weight.T if more else weight), bias, before]
    kernels, found = js(page, """async (arrays, M, N, K, more) => {
        const { GPU, Plan } = await import("/gpu.js"), gpu = await GPU.open(), plan = new Plan(gpu);
        const [x, buffer, bias, y] = arrays.map((numbers) => plan.scratch(Float32Array.from(numbers)));
        gpu.paths.tiles = [{ least: 0, SIDE: 64 }];
        gpu.linear(plan, { buffer, bias, rows: N, width: K }, x, y, M, { ...more, N, K });
        await plan.ready();
        plan.run();
        const found = Array.from(new Float32Array(await gpu.read(y)));
        return [plan.steps.map(({ name, groups }) => [name, groups]), found];
    }""", [array.reshape(-1).tolist() for array in arrays], M, N, K, more)
    assert kernels[0] == ["matmul_tiled", [2, 1, 8]] and [name for name, _ in kernels[1:]] == ["sum_parts"]
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (before if more else bias)
    assert np.abs(np.array(found).reshape(M, N) - expected).max() < 1e-5 * np.abs(expected).max()


def test_gate(page):
    """A kernel that gives other numbers is not used, for the bits with which it does, and the page says so."""
    packed, choices = js(page, """async () => {
        const { chooseKernels, GPU } = await import("/gpu.js"), gpu = await GPU.open();
        const spoil = async (name, right, wrong) => {
            const code = await gpu.text(name);
            if (!code.includes(right)) throw new Error(`${name} has no ${right}`);
            const { text } = gpu;
            gpu.text = (other) => other === name ? code.replace(right, wrong) : text.call(gpu, other);
        };
        await spoil("matvec_packed.wgsl", "products += four(second", "products -= four(second");  // that of 8 bits
        await spoil("matvec_subgroup.wgsl", "subgroupAdd(sum)", "sum");
        await chooseKernels(gpu);
        return [gpu.paths.packed, gpu.choices];
    }""")
    way = {choice["name"]: choice for choice in choices}
    assert not way["subgroups"]["used"] and way["subgroups"]["reason"].startswith("dropped: error")
    verdicts = r"4 bits: error \S+, \S+ times as fast(, which is within the spread)?; 8 bits: dropped: error \S+"
    assert re.fullmatch(verdicts, way["packed vectors"]["reason"])
    assert 8 not in packed and way["packed vectors"]["used"] == (packed == [4])


def test_probabilities(opened, server):
    """The five most probable tokens are those of the model, independent of temperature and filters."""
    path, model = flavour(server, "default")
    steps = in_page(opened, path, """
        const found = [], how = { max_new_tokens: 5, temperature: 0.7, top_k: 3, seed: 5, probabilities: true };
        for await (const step of model.generate(ids, how)) found.push(step);
        return found;""", IDS[:8], parameters="ids")
    ids = list(IDS[:8])
    for step in steps:
        p = np.array(mx.softmax(model(mx.array([ids]))[0, -1, :257]))
        assert [i for i, _ in step["top"]] == np.argsort(-p)[:5].tolist()
        np.testing.assert_allclose([share for _, share in step["top"]], np.sort(p)[::-1][:5], rtol=1e-4)
        assert step["token"] in [i for i, _ in step["top"][:3]]
        ids.append(step["token"])


# ---- looking inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "4-bit", "gpt2", "softcap", "phi", "granite"])
def test_lens(name, opened, server, tmp_path):
    """The logit lens and a tuned lens, from its sidecar file, as in tuned_lens.py; another model's lens is refused."""
    path, model = flavour(server, name)
    model, _ = load_checkpoint(str(server.folder / path))
    tuned = {part: 0.1 * mx.random.normal(array.shape, key=mx.random.key(array.ndim))
             for part, array in tuned_lens.start(model).items()}
    tuned_lens.save_lens(str(tmp_path / "a.lenses"), tuned, model, {"base": base_fingerprint(model)})
    tuned_lens.save_lens(str(tmp_path / "b.lenses"), tuned, model, {"base": "0" * 64})
    plain, tuned_rows, refused = in_page(opened, path, FILES + """
        const { lens, loadLens } = await import("/inside.js");
        const refused = await loadLens(model, fileOf(other, "b.lenses")).catch((error) => error.message);
        const lenses = await loadLens(model, fileOf(sidecar, "a.lenses"));
        return [await lens(model, ids), await lens(model, ids, lenses), refused];""",
        IDS, base64_of(tmp_path / "a.lenses"), base64_of(tmp_path / "b.lenses"), parameters="ids, sidecar, other")
    assert "made for another checkpoint" in refused
    for rows, lens in ((plain, {}), (tuned_rows, tuned)):
        logits = np.array(tuned_lens.logit_lens(model, mx.array([IDS]), lens).astype(mx.float32))[:, 0, :, :257]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        found = np.array([[cell["p"] for cell in row] for row in rows])
        np.testing.assert_allclose(found, -np.sort(-p)[..., :5], rtol=1e-3, atol=1e-6)
        best = np.array([[cell["ids"][0] for cell in row] for row in rows])
        assert (best == p.argmax(-1)).mean() > 0.99
        entropy = -(p * np.log2(p)).sum(-1)
        np.testing.assert_allclose([[cell["entropy"] for cell in row] for row in rows], entropy, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["default", "llama", "window", "alibi", "no-positions", "gemma", "gemma2", "olmo"])
def test_attention(name, opened, server):
    path, model = flavour(server, name)
    maps = in_page(opened, path, """
        const { attention } = await import("/inside.js");
        return (await attention(model, ids)).map((map) => Array.from(map));""", IDS, parameters="ids")
    for found, expected in zip(maps, attention_maps.attention_maps(model, mx.array(IDS)), strict=True):
        np.testing.assert_allclose(np.array(found).reshape(expected["map"].shape), expected["map"], atol=1e-5)


def log_p(logits, target: int) -> float:
    return float(patching.log_p(logits)[target])


@pytest.mark.parametrize("name", ["default", "4-bit", "neox", "granite", "after-parallel"])
def test_ablation(name, opened, server):
    """As patching.py's --mode=ablate on a prompt: zero, mean, skip."""
    path, model = flavour(server, name)
    for how in ("zero", "mean", "skip"):
        found = in_page(opened, path, """
            const { ablate } = await import("/inside.js");
            return last(ablate(model, ids, 65, how));""", IDS, how, parameters="ids, how")
        whole = log_p(model(mx.array([IDS]))[0, -1], 65)
        sites = [("attn", None), ("mlp", None), ("block", None), ("head", 0), ("head", 1)]
        expected = [[log_p(patching.ablate(model, mx.array([IDS]), site, layer, how, head)[0, -1], 65) - whole
                     for site, head in sites] for layer in range(3)]
        assert found["columns"] == ["attn", "mlp", "block", "head 0", "head 1"]
        assert found["whole"] == pytest.approx(whole, abs=1e-4)
        np.testing.assert_allclose(found["values"], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["default", "4-bit", "gemma"])
def test_patching(name, opened, server):
    """As patching.py's --mode=swap. Before the first block, a donor that differs in one token has an effect only there.
    """
    path, model = flavour(server, name)
    donor, recipient = IDS[:9], [*IDS[:4], 77, *IDS[5:9]]

    def effects(donor, recipient, site, pairs=None):
        clean, corrupt = (log_p(model(mx.array([ids]))[0, -1], 65) for ids in (donor, recipient))
        logits = patching.swap(model, mx.array(donor), mx.array(recipient), site, pairs)
        return (np.array(patching.log_p(logits)[..., 65]) - corrupt) / (clean - corrupt)

    call = """const { swap } = await import("/inside.js");
              return last(swap(model, donor, recipient, 65, site, pairs));"""
    for site in ("resid", "attn", "mlp"):
        found = in_page(opened, path, call, donor, recipient, site, None, parameters="donor, recipient, site, pairs")
        np.testing.assert_allclose(found["values"], effects(donor, recipient, site), atol=2e-3)
        if site == "resid":
            np.testing.assert_allclose(found["values"][0], np.eye(9)[4], atol=1e-4)
    if name == "default":  # so long that not all positions are computed at once
        other = [*IDS[:20], 77, *IDS[21:]]
        found = in_page(opened, path, call, IDS, other, "mlp", None, parameters="donor, recipient, site, pairs")
        np.testing.assert_allclose(found["values"], effects(IDS, other, "mlp"), atol=2e-3)
    pairs = [[6, 8], [2, 5]]
    found = in_page(opened, path, call, donor[:7], recipient, "attn", pairs, parameters="donor, recipient, site, pairs")
    np.testing.assert_allclose(found["values"], effects(donor[:7], recipient, "attn", pairs), atol=2e-3)
    says = call.replace("return", "return await").replace("pairs));", "pairs)).catch((error) => error.message);")
    names = "donor, recipient, site, pairs"
    assert "no effect" in in_page(opened, path, says, donor, donor, "mlp", None, parameters=names)
    assert "say which position" in in_page(opened, path, says, donor[:7], recipient, "mlp", None, parameters=names)
    assert "are not positions" in in_page(opened, path, says, donor, recipient, "mlp", [[0, 99]], parameters=names)


# ---- training --------------------------------------------------------------------------------------------------------

TINY = ["--optimizer=adamw", "--learning_rate=3e-3", "--batch_size=4", "--block_size=32", "--n_layer=2", "--n_embd=64",
        "--n_head=1", "--sample_tokens=0", "--log_interval=1", "--eval_interval=1000", "--eval_windows=4"]


def losses(folder) -> dict[int, float]:
    with open(folder / "loss.csv", newline="") as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}


LEARN = """
const { GPU } = await import("/gpu.js"), { Trainer } = await import("/train.js");
globalThis.gpu ??= await GPU.open();
const resume = { checkpoint: fileOf(state[0], "ckpt.safetensors"), optimizer: fileOf(state[1], "optimizer") };
const heldOut = ids.slice(0, Math.ceil(ids.length / 9) + 40);  // so that all of ids is what it learns from
const trainer = await Trainer.create(gpu, { ids: ids.concat(heldOut), resume, max_iters: 3 + starts.length });
const losses = [], written = [];
for (const start of starts) losses.push((await trainer.step(start)).loss);
for await (const { token } of trainer.model.generate([65], { max_new_tokens: 9, temperature: 0 })) written.push(token);
await trainer.evaluate();
const { checkpoint, name, optimizer, optimizerName } = await trainer.save();
if (gpu.errors.length) throw new Error(gpu.errors[0]);
return [losses, { [name]: await textOf(checkpoint), [optimizerName]: await textOf(optimizer) }, written];
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The bytes of model.py as tokens: --data=FOLDER, and the training tokens."""
    folder = tmp_path_factory.mktemp("data")
    run("data.py", f"--source={ROOT / 'model.py'}", "--tokenizer=byte", f"--out={folder}")
    return f"--data={folder}", np.fromfile(folder / "train.bin", np.uint16).tolist()


def follow(page, data, out, settings: list[str], updates: int) -> tuple[dict, list]:
    """Resume files of train.py after three updates, on the page and in train.py, with equal windows: the losses agree.
    Returns the page's files, and the tokens that its model then generates."""
    argument, tokens = data
    run("train.py", *TINY, *settings, argument, f"--out_dir={out}", "--max_iters=3")
    state = [base64_of(out / name) for name in ("ckpt.safetensors", "ckpt.optimizer-3.safetensors")]
    run("train.py", argument, f"--out_dir={out}", "--resume=True", f"--max_iters={3 + updates}")
    starts = [np.random.default_rng([1337, step]).integers(len(tokens) - 32, size=4).tolist()
              for step in range(3, 3 + updates)]
    found, files, written = js(page, f"async (state, ids, starts) => {{ {FILES} {LEARN} }}", state, tokens, starts)
    expected = losses(out)
    np.testing.assert_allclose(found, [expected[step] for step in range(4, 4 + updates)], rtol=2e-3)
    return files, written


@pytest.mark.parametrize("settings", [
    ["--mlp=swiglu", "--tie=False", "--n_head=2", "--n_kv_head=1", "--qkv_bias=True"],
    ["--pos=learned", "--norm=layer", "--mlp=gelu", "--bias=True", "--qk_norm=False", "--n_head=2"],
    ["--softcap=0.5", "--n_head=2"],
    ["--mlp=gelu_tanh", "--sliding_window=9", "--window_pattern=SL", "--alibi=True", "--n_head=2"],
], ids=" ".join)
def test_gradients(settings, opened, data, tmp_path):
    """A few updates follow train.py's losses, which a wrong or missing gradient would not."""
    follow(opened, data, tmp_path / "run", settings, 8)


TILES = {"least": 0, "SIDE": 64}
LEARNED = {  # flavours whose parts a backward pass has
    "gemma": dict(norm_place="both", mlp="geglu", embed_scale=6.0, attn_scale=0.3, n_kv_head=1, sliding_window=9,
                  window_pattern="SL", window_theta=100.0),
    "olmo": dict(norm_place="after", qk_norm_width=True, mlp="swiglu", n_kv_head=1, rope_pattern="RN"),
    "neox": dict(parallel=True, rotary_dim=8, norm="layer", norm_bias=True, mlp="gelu", qk_norm=False, tie=False,
                 head_bias=True, out_bias=True),
    "parallel": dict(parallel=True, norm_place="after", residual_scale=0.4, logit_scale=0.5),
    "granite": dict(embed_scale=3.0, residual_scale=0.4, logit_scale=0.2, pos="learned", bias=True),
    "sink-logits": dict(sink_logits=True, n_kv_head=1, bias=True, sliding_window=9, window_pattern="SL"),
}


@pytest.mark.parametrize("name, T, tiles", [*((name, 16, []) for name in LEARNED), ("gemma", 40, [TILES])])
def test_gradients_of(name, T, tiles, opened, server):
    """The gradient of each parameter is that of MLX, also with the kernels in tiles."""
    model = small(n_layer=2, block_size=T, **LEARNED[name])
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(p.size)), model.parameters()))
    path = save(server, f"learned-{name}.safetensors", model)
    ids = [i % 257 for i in RNG.integers(0, 257, 140).tolist()]
    starts = [3, 20]
    found, loss = in_page(opened, path, """
        gpu.paths.tiles = tiles;
        const { Trainer } = await import("/train.js");
        const trainer = await Trainer.create(gpu, { model, ids, batch_size: 2, learning_rate: 1e-9 });
        const { loss } = await trainer.step(starts), found = {};
        const all = new Float32Array(await gpu.read(trainer.gradients));
        for (const [name, { at, size }] of trainer.places) found[name] = Array.from(all.subarray(at, at + size));
        trainer.destroy();
        gpu.paths.tiles = [];
        return [found, loss];""", ids, starts, tiles, parameters="ids, starts, tiles")
    windows = mx.array([ids[start:start + T + 1] for start in starts])

    def of(parameters):
        model.update(parameters)
        return nn.losses.cross_entropy(model(windows[:, :-1]), windows[:, 1:]).mean()

    expected, gradients = mx.value_and_grad(of)(model.trainable_parameters())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(tree_flatten(gradients))
    assert gradients.keys() == found.keys()
    for path, gradient in gradients.items():
        exact = np.array(gradient).reshape(-1)
        assert np.abs(np.array(found[path]) - exact).max() < 2e-5 * max(np.abs(exact).max(), 0.01), path


def test_training(opened, data, tmp_path):
    """30 updates follow train.py's losses. Python resumes the files that the page saves, and samples from them."""
    out, resumed = tmp_path / "run", tmp_path / "resumed"
    files, written = follow(opened, data, out, [], 30)
    resumed.mkdir()
    for name, content in files.items():
        (resumed / name).write_bytes(base64.b64decode(content))
    assert sorted(files) == ["ckpt.optimizer-33.safetensors", "ckpt.safetensors"]
    model, meta = load_checkpoint(str(resumed / "ckpt.safetensors"))
    ours, _ = load_checkpoint(str(out / "ckpt.safetensors"))
    assert meta["step"] == 33 and model.config == ours.config
    drift = tree_map(lambda a, b: mx.abs(a - b).max().item(), model.parameters(), ours.parameters())
    assert max(size for _, size in tree_flatten(drift)) < 0.02
    assert written == list(generate(model, [65], 9, temperature=0, n_vocab=257))
    for folder in (out, resumed):
        run("train.py", data[0], f"--out_dir={folder}", "--resume=True", "--max_iters=36")
    both = [[of[step] for step in (34, 35, 36)] for of in (losses(resumed), losses(out))]
    np.testing.assert_allclose(*both, rtol=2e-3)
    assert run("sample.py", resumed / "ckpt.safetensors", "--prompt=def", "--max_new_tokens=8").stdout


def test_from_scratch(opened):
    """The loss of a new model is that of guessing, and falls; the checkpoint's header has the right entries."""
    first, last, meta = js(opened, """async (text) => {
        const { GPU } = await import("/gpu.js"), { Trainer } = await import("/train.js");
        const { configOf } = await import("/gpt.js");
        const { charTokenizer } = await import("/tokenizer.js"), { readHeader } = await import("/safetensors.js");
        const config = configOf({ block_size: 16, vocab_size: 64, n_layer: 1, n_head: 1, n_embd: 32 });
        const tokenizer = charTokenizer(text);
        globalThis.gpu ??= await GPU.open();
        const trainer = await Trainer.create(gpu, { config, tokenizer, text, batch_size: 4, learning_rate: 1e-2 });
        const found = [];
        for (let i = 0; i < 25; i++) found.push((await trainer.step()).loss);
        const { meta } = await readHeader((await trainer.save()).checkpoint);
        return [found[0], found.at(-1), meta];
    }""", "the cat sat on the mat. " * 40)
    assert first == pytest.approx(math.log(64), abs=0.3) and last < 0.6 * first
    assert meta["script"] == "train.py" and meta["step"] == 25 and meta["tokenizer"]["kind"] == "char"


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_settings_that_are_new(opened, server):
    """Fields that GPTConfig may gain. A checkpoint runs if the field's value turns it off, or if the field belongs to
    one that is off; else it is refused by the field's name. A field that an older checkpoint lacks has its default
    value."""
    model = small()
    weights, path = dict(tree_flatten(model.parameters())), "new.safetensors"

    def save_with(**change):
        config = {name: value for name, value in (asdict(model.config) | change).items() if value is not ...}
        save_arrays(str(server.folder / path), weights, {"version": 1, "config": config})

    logits = np.array(model(mx.array([IDS]))[0])
    lacking = dict.fromkeys(("norm_eps", "softcap", "window_pattern", "tie", "n_kv_head", "yoco", "mod"), ...)
    for change in (dict(new_flag=False, new_number=0, new_choice="none"), dict(expert_top_k=7, mod_every=9), lacking):
        save_with(**change)
        found = np.array(in_page(opened, path, "return Array.from(await model.logits(ids));", IDS, parameters="ids"))
        assert np.abs(found.reshape(logits.shape) - logits).max() < 1e-5 * np.abs(logits).max()
    for name, value in (("new_flag", True), ("new_number", 0.5), ("new_choice", "some"), ("toString", "x")):
        save_with(**{name: value})
        assert f"This checkpoint uses {name}, which this page cannot run" in refused(opened, path)


def refused(page, path: str) -> str:
    return js(page, f"async () => {{ try {{ {LOAD.replace('NAME', json.dumps(path))} }} catch (error) "
              "{ if (error.constructor.name !== 'UserError') throw error; return error.message; } }")


def test_broken(opened, server):
    """NaN, shapes of another config, bad settings and prompts that do not fit give messages."""
    model = small()
    model.blocks[1].mlp.up.weight[3, 5] = math.nan
    assert "blocks.1.mlp.up.weight holds infinite numbers" in refused(opened, save(server, "broken.safetensors", model))
    model = small()
    model.norm.weight = mx.ones((32,))
    assert "norm.weight has the shape 32" in refused(opened, save(server, "broken.safetensors", model))
    for name, value in (("pos", "spiral"), ("norm", "none"), ("mlp", "toString"), ("rope_theta", "x"), ("head_dim", 31),
                        ("n_kv_head", 3), ("window_pattern", ""), ("sliding_window", -1), ("n_layer", 1.5),
                        ("softcap", "x"), ("bias", "yes"), ("n_embd", None)):
        fine = small()
        setattr(fine.config, name, value)
        assert f"no model ({name})" in refused(opened, save(server, "senseless.safetensors", fine)), name
    path = save(server, "fine.safetensors", small())
    for ids, says in ((IDS * 2, "the prompt has 74 tokens"), ([], "nothing to continue"), ([400], "does not know")):
        message = in_page(opened, path, "return await model.logits(ids).catch((error) => error.message);", ids,
                          parameters="ids")
        assert says in message.lower() or says in message
    short = in_page(opened, path, """const { Trainer } = await import("/train.js");
        return await Trainer.create(gpu, { model, text: "ten chars." }).catch((error) => error.message);""")
    assert "The text has 10 tokens" in short
