"""Looking inside, beside TransformerLens on the same weights: states, attention, patching, ablation, causal tracing and
the logit lens of a GPT-2-like and a Llama-like model.

    python -m pytest -s tests/test_transformer_lens.py    prints how large each difference is

A difference is the largest one of two arrays, divided by the largest number in TransformerLens's.
"""
from itertools import product

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from peers import peer

import patching
from attribution import attribute, direct
from habits import attention_maps
from inside import BY_HEAD, SITES, record, with_changes
from model import GPT, GPTConfig
from tuned_lens import logit_lens

torch = peer("torch")
lens = peer("transformer_lens")
theirs_of_patching = peer("transformer_lens.patching")
DataFrame = peer("pandas").DataFrame

TOLERANCE = 1e-4
torch.set_num_threads(1)  # of tiny arrays, and the tests of other files may run beside these
SIZES = dict(block_size=16, vocab_size=48, n_layer=3, n_head=4, n_embd=32, ffn_dim=40, qk_norm=False)
MODELS = {
    "gpt2": dict(SIZES, pos="learned", norm="layer", mlp="gelu_tanh", bias=True),
    "llama": dict(SIZES, n_kv_head=2, mlp="swiglu", tie=False),
}
RNG = np.random.default_rng(0)
CLEAN, CORRUPT = RNG.integers(0, 48, (2, 6))
N_LAYER, T = SIZES["n_layer"], len(CLEAN)


# ---- two models with the same weights --------------------------------------------------------------------------------


def ours(name: str) -> GPT:
    """A model with random weights, norms and biases too."""
    model, rng = GPT(GPTConfig(**MODELS[name]), seed=1).eval(), np.random.default_rng(1)
    model.update(tree_unflatten([
        (path, mx.array((rng.standard_normal(p.shape) * 0.3 + ("norm.weight" in path)).astype(np.float32)))
        for path, p in tree_flatten(model.parameters())]))
    return model


def theirs(model: GPT):
    """A HookedTransformer with this model's weights."""
    config, p = model.config, dict(tree_flatten(model.parameters()))
    C, H, D, KV, V = config.n_embd, config.n_head, config.head_dim, config.n_kv_head, config.vocab_size
    made = lens.HookedTransformer(lens.HookedTransformerConfig(
        n_layers=config.n_layer, d_model=C, n_ctx=config.block_size, d_head=D, n_heads=H, d_mlp=config.ffn_dim,
        d_vocab=V, n_key_value_heads=KV if KV < H else None, act_fn="silu" if config.mlp == "swiglu" else "gelu_new",
        gated_mlp=config.mlp == "swiglu", normalization_type="LN" if config.norm == "layer" else "RMS",
        positional_embedding_type="standard" if config.pos == "learned" else "rotary", rotary_dim=D,
        rotary_base=int(config.rope_theta), eps=config.norm_eps, device="cpu", seed=0)).eval()
    names = {"embed.weight": "embed.W_E", "pos_embed.weight": "pos_embed.W_pos", "norm.weight": "ln_final.w",
             "norm.bias": "ln_final.b"}
    their_p = {names[name]: array for name, array in p.items() if name in names}
    their_p["unembed.W_U"] = (p["embed.weight"] if config.tie else p["head.weight"]).T
    for layer in range(config.n_layer):
        own = {path.removeprefix(f"blocks.{layer}."): array for path, array in p.items()
               if path.startswith(f"blocks.{layer}.")}
        found = {"attn.W_O": own["attn.out.weight"].reshape(C, H, D).transpose(1, 2, 0),
                 "mlp.W_in": own["mlp.up.weight"].T, "mlp.W_out": own["mlp.down.weight"].T,
                 "ln1.w": own["attn_norm.weight"], "ln2.w": own["mlp_norm.weight"]}
        for one, heads in ("q", H), ("k", KV), ("v", KV):
            grouped = "_" * (KV < H and one != "q")
            found[f"attn.{grouped}W_{one.upper()}"] = own[f"attn.{one}.weight"].reshape(heads, D, C).swapaxes(1, 2)
            if config.bias:
                found[f"attn.{grouped}b_{one.upper()}"] = own[f"attn.{one}.bias"].reshape(heads, D)
        if config.mlp == "swiglu":
            found["mlp.W_gate"] = own["mlp.gate.weight"].T
        if config.bias:
            found |= {"attn.b_O": own["attn.out.bias"], "mlp.b_in": own["mlp.up.bias"],
                      "mlp.b_out": own["mlp.down.bias"], "ln1.b": own["attn_norm.bias"], "ln2.b": own["mlp_norm.bias"]}
        their_p |= {f"blocks.{layer}.{key}": array for key, array in found.items()}
    state = {key: torch.tensor(np.array(array)) for key, array in their_p.items()}
    left = made.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left
    assert all(key.rsplit(".")[-1] in ("mask", "IGNORE", "rotary_sin", "rotary_cos") or ".b_" in key or "._b_" in key
               or key.startswith("unembed.b") for key in left.missing_keys), left.missing_keys  # biases there are 0
    made.requires_grad_(False)
    return made


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    """Our model and theirs, and their states of both prompts."""
    model = ours(request.param)
    made = theirs(model)
    return model, made, *(made.run_with_cache(torch.tensor(ids)[None])[1] for ids in (CLEAN, CORRUPT))


def check(name: str, found, expected):
    found, expected = np.array(found), expected.numpy() if torch.is_tensor(expected) else np.array(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert np.abs(expected).max() > 0.01, f"{name}: nothing to compare"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name:40} {error:.0e}")
    assert error < TOLERANCE, f"{name} differs by {error:.0e}"


def last(logits):
    return logits[0, -1]


# ---- states ----------------------------------------------------------------------------------------------------------


def hook_of(site: str, model: GPT, layer: int) -> str:
    """The name of a site there."""
    turned = model.config.pos == "rope"
    within = {"resid": "hook_resid_pre", "mid": "hook_resid_mid", "attn": "hook_attn_out", "mlp": "hook_mlp_out",
              "heads": "attn.hook_z", "q": "attn.hook_rot_q" if turned else "attn.hook_q",
              "k": "attn.hook_rot_k" if turned else "attn.hook_k", "v": "attn.hook_v", "hidden": "mlp.hook_post"}
    if (site, layer) == ("resid", N_LAYER):
        return f"blocks.{layer - 1}.hook_resid_post"
    return f"blocks.{layer}.{within[site]}"


def test_states(both):
    """The states at every site of every layer, and the logits."""
    model, made, cache, _ = both
    idx = mx.array(CLEAN)[None]
    check("logits", model(idx), made(torch.tensor(CLEAN)[None]))
    states = record(model, idx, SITES)
    assert len(states) == 9 * N_LAYER + 1
    for (site, layer), x in states.items():
        x = x.swapaxes(1, 2) if x.ndim == 4 else x  # there (B, T, H, D)
        check(f"{site}, layer {layer}", x, cache[hook_of(site, model, layer)])


def test_attention(both):
    model, _, cache, _ = both
    for layer, named in enumerate(attention_maps(model, mx.array(CLEAN))):
        check(f"attention, layer {layer}", named["map"], cache["pattern", layer][0])


def test_logit_lens(both):
    model, made, cache, _ = both
    states = torch.stack([cache[hook_of("resid", model, layer)] for layer in range(N_LAYER + 1)])
    check("logit lens", logit_lens(model, mx.array(CLEAN)[None]), made.unembed(made.ln_final(states)))


# ---- patching --------------------------------------------------------------------------------------------------------


def heads_at(model, site: str) -> int:
    return 0 if site not in BY_HEAD else model.config.n_head if site in ("heads", "q") else model.config.n_kv_head


def by_position(model, site: str, found: list) -> torch.Tensor:
    """Logits of every layer, position and head in turn, as (n_layer, [H,] T, V)."""
    H = heads_at(model, site)
    return torch.stack(found).reshape(N_LAYER, T, H, -1).swapaxes(1, 2) if H else torch.stack(found).reshape(
        N_LAYER, T, -1)


@pytest.mark.parametrize("site", SITES)
def test_swap(site, both):
    """Every cell of the grids that transformer_lens.patching computes."""
    model, made, clean, _ = both
    hook = {"resid": "resid_pre", "mid": "resid_mid", "attn": "attn_out", "mlp": "mlp_out", "heads": "z",
            "hidden": "post"}.get(site, site)
    H, found = heads_at(model, site), []
    cells = [*product(range(N_LAYER), range(T), *[range(H)] * bool(H))]
    setter = theirs_of_patching.layer_pos_head_vector_patch_setter if H else theirs_of_patching.layer_pos_patch_setter
    theirs_of_patching.generic_activation_patch(
        made, torch.tensor(CORRUPT)[None], clean, lambda logits: found.append(last(logits)) or logits.sum(), setter,
        hook, index_df=DataFrame(cells, columns=["layer", "pos", "head"][:len(cells[0])]))
    check(f"swap, {site}", patching.swap(model, mx.array(CLEAN), mx.array(CORRUPT), site),
          by_position(model, site, found))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("source", ["zero", "mean"])
def test_replaced(source, site, both):
    """One state becomes zeros, or the mean over the positions."""
    model, made, clean, _ = both
    expected = []
    for layer in range(N_LAYER):
        for position in range(T):
            for head in range(heads_at(model, site)) or [...]:
                def put(x, hook, position=position, head=head):
                    x[:, position, head] = x[:, :, head].mean(1) if source == "mean" else 0
                    return x

                expected.append(last(made.run_with_hooks(
                    torch.tensor(CLEAN)[None], fwd_hooks=[(hook_of(site, model, layer), put)])))
    found = patching.replaced(model, mx.array(CLEAN), source, site, [*range(T)], [*range(T)])
    check(f"{source}, {site}", found, by_position(model, site, expected))


@pytest.mark.parametrize("site, window", [("resid", 1), ("mid", 1), ("attn", 1), ("mlp", 2), ("mlp", 3), ("heads", 1)])
def test_trace(site, window, both):
    """Noise on the embeddings of two positions, and clean states restored one position at a time."""
    model, made, clean, _ = both
    subject, noise = [2, 3], RNG.standard_normal((2, 2, SIZES["n_embd"])).astype(np.float32)
    low, found = patching.trace(model, mx.array(CLEAN), subject, mx.array(noise), site, window)

    def noisy(x, hook):
        x[:, subject] += torch.tensor(noise)
        return x

    rows = torch.tensor(np.stack([CLEAN, CLEAN]))
    check("corrupted", low, made.run_with_hooks(rows, fwd_hooks=[("hook_embed", noisy)])[:, -1])
    expected = []
    for layer in range(N_LAYER):
        begin = max(0, layer - (window - 1) // 2)
        for position in range(T):
            for head in range(heads_at(model, site)) or [...]:
                def restore(x, hook, position=position, head=head):
                    x[:, position, head] = clean[hook.name][:, position, head]
                    return x

                hooks = [(hook_of(site, model, at), restore)
                         for at in range(begin, min(N_LAYER, layer + window // 2 + 1))]
                expected.append(made.run_with_hooks(rows, fwd_hooks=[("hook_embed", noisy), *hooks])[:, -1].flatten())
    expected = by_position(model, site, expected)
    expected = expected.reshape(*expected.shape[:-1], 2, -1)
    check(f"trace, {site}, window {window}", found, expected)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@pytest.mark.parametrize("site", ["attn", "mlp", "block", "head"])
def test_ablation(site, how, both):
    """Attention, an MLP, a whole layer or one head is set to zeros, to its mean over the tokens, or to what it is for
    other tokens."""
    model, made, *caches = both
    rows, C, other = np.stack([CLEAN, CORRUPT]), SIZES["n_embd"], np.stack([CORRUPT, CLEAN])
    states = with_changes(record(model, mx.array(other), ["attn", "mlp", "heads"])) if how == "resample" else None
    for layer in range(N_LAYER):
        name = hook_of({"head": "heads", "block": "resid"}.get(site, site), model, layer + (site == "block"))
        theirs_of_other = torch.cat([cache[name] for cache in caches[::-1]])
        if site == "block":
            theirs_of_other = theirs_of_other - torch.cat([cache[hook_of("resid", model, layer)]
                                                           for cache in caches[::-1]])
        for head in range(4) if site == "head" else [None]:
            entered = {}

            def enter(x, hook, entered=entered):
                entered["x"] = x.clone()

            def put(x, hook, entered=entered, head=head, theirs_of_other=theirs_of_other):
                if site == "head":
                    x[:, :, head] = {"zero": 0, "mean": x[:, :, head].mean((0, 1)),
                                     "resample": theirs_of_other[:, :, head]}[how]
                    return x
                change = x - entered["x"] if site == "block" else x
                change = {"zero": torch.zeros_like(x), "mean": change.mean((0, 1)).expand(2, T, C),
                          "resample": theirs_of_other}[how]
                return entered["x"] + change if site == "block" else change

            expected = made.run_with_hooks(torch.tensor(rows), fwd_hooks=[(hook_of("resid", model, layer), enter),
                                                                           (name, put)])
            found = patching.ablate(model, mx.array(rows), site, layer, how, head, states)
            check(f"{how} {site} {'' if head is None else head}, layer {layer}", found, expected)


# ---- attribution -----------------------------------------------------------------------------------------------------


def test_direct_logit_attribution(both):
    """Shares of the embedding, each head, attention and each MLP of a logit difference. The weights of the last norm
    are not in its scale there."""
    model, made, cache, _ = both
    direction = made.ln_final.w * (made.W_U[:, 3] - made.W_U[:, 5])
    shares = direct(model, mx.array(CLEAN), lambda logits: logits[..., 3] - logits[..., 5])

    def theirs_of(stack):
        return cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)[:, 0] @ direction

    check("heads", shares.heads.reshape(-1), theirs_of(cache.stack_head_results(layer=-1, pos_slice=-1)))
    parts, names = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    named = dict(zip(names, theirs_of(parts), strict=True))
    check("MLPs", shares.mlp, torch.stack([named[f"{layer}_mlp_out"] for layer in range(N_LAYER)]))
    check("attention", shares.heads.sum(1) + shares.bias,
          torch.stack([named[f"{layer}_attn_out"] for layer in range(N_LAYER)]))
    check("embedding", shares.embedding, named["embed"])


@pytest.mark.parametrize("site", ["resid", "attn", "mlp", "heads", "q", "k", "v", "hidden"])
def test_attribution_patching(site, both):
    """The change of a state times the gradient there, which torch computes."""
    model, made, clean, corrupt = both
    found, grads = attribute(model, mx.array(CLEAN), mx.array(CORRUPT),
                             lambda logits: logits[..., 3] - logits[..., 5], [site]), {}

    def keep(x, hook):
        x.requires_grad_(True)
        grads[hook.name] = x
        x.retain_grad()
        return x

    with torch.enable_grad():
        hooks = [(hook_of(site, model, layer), keep) for layer in range(N_LAYER)]
        logits = last(made.run_with_hooks(torch.tensor(CORRUPT)[None], fwd_hooks=hooks))
        (logits[3] - logits[5]).backward()
    expected = []
    for layer in range(N_LAYER):
        name = hook_of(site, model, layer)
        products = ((clean[name] - corrupt[name]) * grads[name].grad)[0]  # (T, C), (T, H, D) or (T, F)
        expected.append(products.T if site == "hidden" else products.sum(-1).reshape(T, -1).T)
    check(f"attribution, {site}", mx.stack([found[site, layer] for layer in range(N_LAYER)]), torch.stack(expected))
