// The speed panel: the kernels that this device uses, and measurements.

import { Stopped } from "./errors.js";
import { imported } from "./fetching.js";
import { $, queueWith, attempt, during, make, needModel, onModel, page } from "./page_common.js";
import { stopWriting } from "./page_write.js";

export function showChoices() {
  const { info, choices } = page.gpu;
  const slow = ". It is a software adapter: the processor computes, not a graphics card, so take small models.";
  $("adapter").textContent = info.name + (info.fallback ? slow : "");
  $("choices").replaceChildren(...choices.map(({ name, used, reason }) => make("tr", {},
    make("td", {}, name), make("td", {}, used ? "✓ yes" : "– no"), make("td", {}, reason))));
}

let measuring = null;  // the AbortController of the measurement that is going on

/** Measure, or stop the measurement that is going on. */
function measure() {
  if (measuring) return measuring.abort(new Stopped());
  const { signal } = measuring = new AbortController(), figures = $("figures");
  $("measure").textContent = "Stop";
  return attempt("speed-wrong", async () => {
    try {
      const model = needModel(), { benchmark } = await imported("bench.js");
      await stopWriting();
      figures.hidden = false;
      figures.textContent = "";
      $("copy").hidden = true;
      const line = (text) => { figures.textContent += `${text}\n`; };
      const { text } = await during("measure", "Measuring", () =>
        queueWith(model, () => benchmark(page.gpu, model, line, signal), signal)).finally(() => signal.aborted && line("stopped"));
      figures.textContent = text;
      $("copy").hidden = false;
      $("measured").textContent = "Measured.";
    } finally {
      measuring = null;
      $("measure").textContent = "Measure";
    }
  });
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("figures").textContent);
    $("measured").textContent = $("copy").textContent = "Copied";
    setTimeout(() => { $("copy").textContent = "Copy as text"; }, 2000);
  } catch {  // not allowed: select the text, so that the user can copy it
    getSelection().selectAllChildren($("figures"));
  }
}

export function setUpSpeed() {
  $("measure").addEventListener("click", measure);
  $("copy").addEventListener("click", copy);
  onModel(() => { $("figures").hidden = $("copy").hidden = true; });
}
