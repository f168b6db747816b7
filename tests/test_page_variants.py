"""Each variant of the page can be deleted and the rest stands, as in model.py; and those that lie in attention give
model.py's numbers: sinks, differential attention, YOCO, value residuals, value embeddings."""
import re
from functools import cache

import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import numpy as np
import pytest
from browser import js
from conftest import ROOT
from test_page_ffn import check_inside, check_text, shaken
from test_page_model import IDS, TILES, in_page, refused, save, small

from model import generate

# ---- deletion --------------------------------------------------------------------------------------------------------

FOLDER = ROOT / "webgpu"
SOURCES = {str(path.relative_to(FOLDER)): path.read_text()
           for pattern in ("*.js", "kernels/*.wgsl") for path in sorted(FOLDER.glob(pattern))}
VARIANTS = sorted(set(re.findall(r"^ *// ---- variant (\w+): ", "".join(SOURCES.values()), re.M)))
PLAIN = {"default": {}, "llama": dict(mlp="swiglu", n_kv_head=1, qk_norm=False, sliding_window=9, tie=False)}


def without(*variants: str) -> dict[str, str]:
    """The files without these variants' sections, their tagged lines and the kernels that gpu.js then does not list."""
    found = {}
    for name, text in SOURCES.items():
        kept, inside = [], None
        for line in text.splitlines(keepends=True):
            begins, ends = (re.match(rf" *// ---- {word} (\w+)\b", line) for word in ("variant", "end of"))
            if begins:
                assert not inside, f"{name}: {inside} does not close"
                inside = begins[1]
            if inside not in variants and not re.search(rf"\S  // ({'|'.join(variants)})$", line):
                kept.append(line)
            if ends:
                assert ends[1] == inside, f"{name}: {ends[1]} ends, but did not begin"
                inside = None
        assert not inside, f"{name}: {inside} does not close"
        found[name] = "".join(kept)
    listed = re.findall(r"\w+", found["gpu.js"].partition("const FILES = [")[2].partition("]")[0])
    return {name: text for name, text in found.items()
            if text.strip() and (not name.startswith("kernels/") or name[8:-5] in listed)}


@cache
def words(variant: str) -> set[str]:
    """What must go with a variant: its name, its settings, the names of its files, and what its lines alone define."""
    kept = without(variant)
    lines = "\n".join(kept.values())
    own = "\n".join(line for name, text in SOURCES.items() for line in text.splitlines()
                    if line not in kept.get(name, "").splitlines())
    settings = re.findall(r"(\w+): \[[^\[]*, (?:whole|flag|among|number|factor)\b", own)
    files = [name.rpartition("/")[2] for name in SOURCES if name not in kept]
    defined = re.findall(r"(?:function|class|const) (\w+)|^  (?:async )?(\w+)\(.*\) \{$", own, re.M)
    alone = {word for pair in defined for word in pair if word and not re.search(rf"\b{word}\b", lines)}
    return {variant, *settings, *files, *(f'"{name[:-5]}"' for name in files if name.endswith(".wgsl")), *alone}


def assert_words_gone(files: dict[str, str], variant: str):
    for name, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("const PARTS = "):  # it names settings that stand in every checkpoint
                continue
            if found := words(variant) & {*re.findall(r'\w+\.\w+|"\w+"', line), *re.findall(r"\w+", line)}:
                raise AssertionError(f"{name}, line {number} without {variant}: {line.strip()}\n{min(found)} belongs "
                                     f"to {variant}, but this line stays: end it with the tag '// {variant}'")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_word_is_left(variant):
    assert_words_gone(without(variant), variant)


PLAIN_RUN = """async (name, ids, all) => {
    const { GPU } = await import("/gpu.js"), { GPT } = await import("/gpt.js"), { Trainer } = await import("/train.js");
    const { ablate, attention, lens, swap } = await import("/inside.js"), { flow } = await import("/flow.js");
    await Promise.all(["steer", "habits", "bench"].map((module) => import(`/${module}.js`)));
    globalThis.gpu ??= await GPU.open();
    const file = new File([await (await fetch(`/checkpoints/${name}`)).blob()], name);
    const model = await GPT.load(gpu, file), text = [];
    const last = async (steps) => { let found; for await (found of steps); return found; };
    for await (const { token } of model.generate(ids, { max_new_tokens: 9, temperature: 0 })) text.push(token);
    const found = { text, logits: Array.from(await model.logits(ids)), errors: gpu.errors };
    found.plans = [...model.writer().plans].map(([key, { plan }]) => [key, plan.steps.map(({ name }) => name)]);
    if (!all) return found;
    const short = ids.slice(0, 7), other = [9, ...ids.slice(1, 7)];
    found.maps = (await attention(model, short)).map((map) => Array.from(map));
    found.panels = [await lens(model, short), (await flow(model, short)).logit,
        (await last(ablate(model, short, 5))).values, (await last(swap(model, short, other, 5))).values];
    const trainer = await Trainer.create(gpu, { model, ids: [...ids, ...ids, ...ids, ...ids], batch_size: 1 });
    found.trained = await trainer.step([3]);
    trainer.destroy();
    return found;
}"""


@pytest.fixture(scope="module")
def plain(chromium, server):
    """What a page gives of plain models: with all files, or with those that without() leaves."""
    names = [save(server, f"plain-{name}.safetensors", small(**settings)) for name, settings in PLAIN.items()]

    def numbers(*variants):
        with browser.page(chromium, server) as page:
            if variants:
                files = without(*variants)

                def answer(route):
                    name = route.request.url.removeprefix(f"{server.url}/").split("?")[0]
                    kind = "text/javascript" if name.endswith(".js") else "text/plain"
                    if name not in SOURCES:
                        return route.continue_()
                    return route.fulfill(body=files[name], content_type=kind) if name in files else route.abort()

                page.route("**/*", answer)
            few = len(variants) == 1
            return [js(page, PLAIN_RUN, name, IDS, not few) for name in (names[:1] if few else names)]

    return numbers


@pytest.fixture(scope="module")
def whole(plain):
    return plain()


@pytest.mark.parametrize("variants", [[variant] for variant in VARIANTS] + [VARIANTS], ids=" ".join)
def test_deletion(variants, plain, whole):
    """Plain models give the same dispatches, and numbers that are equal to the last bit."""
    made = plain(*variants)
    for found, expected in zip(made, whole[:len(made)], strict=True):
        assert found["errors"] == []
        for part in found:
            assert found[part] == expected[part], part


# ---- numbers ---------------------------------------------------------------------------------------------------------

WINDOW = dict(sliding_window=5, window_pattern="SL")
IDEAS = {
    "sink-logits": dict(sink_logits=True, n_kv_head=1, mlp="swiglu", bias=True, **WINDOW),
    "sinks": dict(sinks=2, window_theta=100.0, **WINDOW),
    "sinks-alibi": dict(sinks=3, alibi=True, n_head=3, n_embd=96, attn_softcap=3.0, **WINDOW),
    "both-sinks": dict(sinks=2, sink_logits=True, n_kv_head=1, rotary_dim=8, qk_norm=False, pos="rope", **WINDOW),
    "diff": dict(diff_attn=True, n_head=4, **WINDOW),
    "diff-grouped": dict(diff_attn=True, n_head=6, n_kv_head=2, n_embd=96, alibi=True, sink_logits=True, bias=True),
    "diff2": dict(diff_attn=True, diff_attn_version=2, mlp="swiglu"),
    "diff2-grouped": dict(diff_attn=True, diff_attn_version=2, n_kv_head=1, qk_norm=False, alibi=True, sinks=2,
                          sink_logits=True, **WINDOW),
    "yoco": dict(yoco=True, n_layer=4, sliding_window=5),
    "yoco-more": dict(yoco=True, n_layer=5, diff_attn=True, n_kv_head=2, sink_logits=True, norm="layer", bias=True,
                      value_residual=True, value_embeds=True, parallel=True, qk_norm=False, tie=False),
    "yoco-alibi": dict(yoco=True, n_layer=3, alibi=True, sinks=2, sliding_window=6, norm_place="both"),
    "value-residual": dict(value_residual=True, n_kv_head=1, mlp="swiglu", **WINDOW),
    "value-embeddings": dict(value_embeds=True, pos="learned", n_layer=4),
    "gpt-oss": dict(sink_logits=True, n_expert=4, expert_balance="none", router_bias=True, mlp="swiglu_clip", bias=True,
                    ffn_dim=64, tie=False, n_kv_head=1, qk_norm=False, rope_scaling="yarn_untruncated", rope_factor=4.0,
                    rope_original=64, rope_high_freq=32.0, rope_theta=100.0, **WINDOW),
    "sinks-mod": dict(sink_logits=True, mod="topk", mod_capacity=0.5, **WINDOW),
}


@pytest.fixture(scope="module")
def checkpoint(server):
    """A function of an idea's name: a checkpoint, and its model."""
    made = {}

    def of(name: str):
        if name not in made:
            model = shaken(small(**IDEAS[name])).eval()
            made[name] = save(server, f"idea-{name}.safetensors", model), model
        return made[name]

    return of


@pytest.mark.parametrize("name", IDEAS)
def test_text(name, opened, checkpoint):
    check_text(opened, *checkpoint(name))


@pytest.mark.parametrize("name", ["sinks-alibi", "both-sinks", "diff-grouped", "diff2-grouped", "yoco", "yoco-more",
                                  "yoco-alibi", "value-residual", "sinks-mod"])
def test_inside(name, opened, checkpoint):
    check_inside(opened, *checkpoint(name))


@pytest.mark.parametrize("name", ["both-sinks", "diff2"])
def test_faster_kernels(name, page, checkpoint):
    """As on a card: with kernels in tiles, and for one token."""
    path, model = checkpoint(name)
    logits, text = in_page(page, path, """
        gpu.paths.tiles = tiles;
        gpu.info.fallback = false;
        const text = [], how = { max_new_tokens: 20, temperature: 0 };
        for await (const { token } of model.generate(ids.slice(0, 9), how)) text.push(token);
        return [Array.from(await model.logits(ids)), text];""", IDS, [TILES], parameters="ids, tiles")
    expected = np.array(model(mx.array([IDS]))[0])
    assert np.abs(np.array(logits).reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()
    assert text == list(generate(model, IDS[:9], 20, temperature=0, n_vocab=257))


def test_flow(opened, checkpoint):
    """What heads and MLPs give to the logit sums up, also where the second half of the layers has shared keys."""
    path, _ = checkpoint("yoco")
    logit, rest = in_page(opened, path, """
        const { logit, rest } = await (await import("/flow.js")).flow(model, ids.slice(0, 9));
        return [logit, rest].map((all) => Array.from(all));""", IDS, parameters="ids")
    assert np.abs(rest).max() < 1e-5 * np.abs(logit).max()


def test_a_long_prompt(opened, server):
    """It is read in parts, of which only the last one passes through YOCO's second half."""
    model = shaken(small(yoco=True, n_layer=4, sliding_window=20, block_size=300)).eval()
    path, ids = save(server, "idea-long.safetensors", model), (IDS * 5)[:150]
    text, parts = in_page(opened, path, """
        const text = [], how = { max_new_tokens: 9, temperature: 0 };
        for await (const { token } of model.generate(ids, how)) text.push(token);
        const count = ({ steps }) => steps.filter(({ name }) => name === "attention").length;
        return [text, [...model.writer().plans].map(([key, { plan }]) => [key, count(plan)])];
        """, ids, parameters="ids")
    assert text == list(generate(model, ids, 9, temperature=0, n_vocab=257))
    assert dict(parts) == {"pass 64 false false": 2, "pass 64 true false": 4, "pass 1 true false": 4}


@pytest.mark.parametrize("settings, says", [
    (dict(yoco=True), "yoco"), (dict(diff_attn=True), "diff_attn"), (dict(value_residual=True), "value_residual"),
    (dict(value_embeds=True), "value_embeds"), (dict(sinks=2, sliding_window=9), "sinks")], ids=str)
def test_training_is_refused(settings, says, opened, server):
    path = save(server, "untrained.safetensors", small(**settings))
    said = in_page(opened, path, """const { Trainer } = await import("/train.js");
        return Trainer.create(gpu, { model, text: "a" }).catch((error) => error.message);""")
    assert said == f"This model has {says}, with which this page cannot train: python train.py --init can."


@pytest.mark.parametrize("settings, says", [
    (dict(diff_attn=True, sliding_window=9, sinks=2), "diff_attn and sinks"),
    (dict(yoco=True, mod="topk"), "mod=topk and yoco"),
    (dict(value_residual=True, mod="topk", mod_every=1), "value_residual and mod_every=1")], ids=str)
def test_pairs_that_are_refused(settings, says, opened, server):
    path = save(server, "refused.safetensors", small(**settings))
    assert refused(opened, path) == (f"This checkpoint uses {says}, which this page cannot run together: python "
                                     "sample.py can.")
