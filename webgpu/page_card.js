// The card that describes the model that is open.

import { megabytes } from "./gpu.js";
import { $, count, make, many } from "./page_common.js";

const NORMS = { rms: "RMSNorm", layer: "LayerNorm" };
const PLACES = { before: "", after: " after each part", both: " before and after each part" };
const MLPS = { relu2: "ReLU²", gelu: "GELU", gelu_tanh: "GELU (tanh)", swiglu: "SwiGLU", geglu: "GEGLU", swiglu_clip: "clipped SwiGLU" };
const POSITIONS = { rope: "rotary", learned: "learned positions", none: "no positions" };
const TOKENS = { byte: "bytes", char: "characters", bpe: "BPE", hf: "Hugging Face" };

const WORDS = { Reads: "context", Loss: "nats" };  // explained in the list of words

export function showCard(model) {
  const rows = [
    ["Parameters", many(model.n_parameters)],
    ["Weights", `${megabytes(model.blob.size)}, ${model.format}`],
    ["Layers", layers(model.config)],
    ["Design", design(model.config)],
    ["Reads", reads(model)],
    ["Chat", chat(model)],
    ["Loss", loss(model.meta)],
    ["Made by", [model.meta.script, model.meta.step && `update ${count(model.meta.step)}`].filter(Boolean).join(", ")],
  ].filter(([, value]) => value);
  $("card-name").textContent = model.blob.name ?? "checkpoint";
  const term = (name) => WORDS[name] ? make("a", { href: `#word-${WORDS[name]}` }, name) : name;
  $("card").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, term(name)), make("dd", {}, value)]));
  $("glyph").replaceChildren(...glyph(model.config));
}

function layers({ n_layer, n_head, n_kv_head, n_embd }) {
  const groups = n_kv_head < n_head ? ` (${n_kv_head} for keys)` : "";
  return `${n_layer}, each with ${n_head} head${n_head > 1 ? "s" : ""}${groups}, width ${n_embd}`;
}

function design(config) {
  const { alibi, pos, norm, norm_place, parallel, mlp, qk_norm, softcap, tie } = config;
  const all = [alibi ? "ALiBi" : POSITIONS[pos], NORMS[norm] + PLACES[norm_place], MLPS[mlp],
    config.diff_attn && `differential attention (version ${config.diff_attn_version}, ${config.n_head * config.diff_attn_version / 2} pairs of heads)`,  // diff
    config.yoco && "YOCO",  // yoco
    config.value_residual && "value residual",  // resformer
    config.value_embeds && "value embeddings",  // valembed
    config.sinks > 0 && `${config.sinks} sinks`, config.sink_logits && "sink logits",  // sinks
    config.n_expert > 0 && `${config.n_expert} experts, of which a token uses ${config.expert_top_k}`,  // moe
    config.mod !== "none" && `Mixture of Depths (${config.mod}) in ${config.mod_every > 1 ? `one layer of ${config.mod_every}` : "every layer"}`,  // mod
    parallel && "parallel", qk_norm && "QK-norm", softcap > 0 && `softcap ${softcap}`, tie && "tied"];
  return all.filter(Boolean).join(", ");
}

function reads({ config, enc, whole_context }) {
  const part = config.block_size < whole_context ? ` of its ${count(whole_context)}` : "";
  const window = config.sliding_window ? `, window ${config.sliding_window} ${config.window_pattern}` : "";
  const kind = enc ? ` (${TOKENS[enc.kind]})` : "";
  return `${count(config.block_size)}${part} tokens, from a vocabulary of ${count(config.vocab_size)}${kind}${window}`;
}

/** A model that was tuned on conversations has a template for them. */
function chat({ chat, meta: { template, chat_template } }) {
  if (chat) return `It was trained on conversations, and answers your prompt through ${template === "own" ? "its own chat template" : `the chat template ${template}`}.`;
  return template || chat_template ? "It was trained on conversations. The page continues the prompt as a plain text, since " +
    "this file does not hold its template in a form without Jinja: python sample.py applies it." : "";
}

function loss({ losses }) {
  if (!Number.isFinite(losses?.val)) return "";
  const bits = Number.isFinite(losses.bits_per_byte) ? `, ${losses.bits_per_byte.toFixed(2)} bits per byte` : "";
  return `${losses.val.toFixed(2)} nats per held-out token${bits}`;
}

/** A small picture of the model: a line for each layer, with its heads and its MLP. */
function glyph({ n_layer, n_head }) {
  if (n_layer > 12 || n_head > 8) return [];
  const heads = () => Array.from({ length: n_head }, () => make("b"));
  return Array.from({ length: n_layer }, () => make("span", {}, ...heads(), make("b", { class: "mlp" })));
}
