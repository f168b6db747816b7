// What a browser without WebGPU shows: a recording of the page's first model, made by runs/record_page.py. page.js imports it only
// there.

import { fetched } from "./fetching.js";
import { $, notice } from "./page_common.js";
import { showLens } from "./page_look.js";
import { showText } from "./page_write.js";

export async function showRecording() {
  const found = await fetched("recording.json", "json"), { tokens, eot, n_vocab, prompt, written, top, p } = found;
  const decode = (ids) => ids.map((id) => id === eot ? "" : tokens[id]).join("");
  const enc = { eot, pieces: [], start: [eot], decode, encode: () => prompt.slice(1), stream: () => ({ push: (id) => decode([id]) }) };
  showText(enc, decode(prompt), prompt, written.map((id, i) => ({ id, top: top[i].map((other, k) => [other, p[i][k]]) })));
  showLens({ enc, n_vocab }, found.lens.ids, found.lens.rows);
  $("card-name").textContent = `${found.model}, recorded`;
  $("pace").textContent = `A recording: ${written.length} tokens`;
  notice(`What you see is a recording: a text that ${found.model} wrote on another computer, with its most probable tokens, and ` +
    "the lens for one prompt. Point at a token of the text, or move the slider, to see what the model predicted there. Writing, " +
    "training and the other panels need WebGPU.", {});
}
