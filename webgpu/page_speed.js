// The ladder of kernels, and what they measure.

import { $, aloneWith, attempt, during, make, needModel, onModel, page } from "./page_common.js";
import { stopWriting } from "./page_write.js";

export function showLadder() {
  const { info, ladder } = page.gpu;
  const slow = ". It is a software adapter, the processor in place of a graphics card: take small models.";
  $("adapter").textContent = info.name + (info.fallback ? slow : "");
  $("ladder").replaceChildren(...ladder.map(({ name, used, reason }) => make("tr", {},
    make("td", {}, name), make("td", {}, used ? "✓ yes" : "– no"), make("td", {}, reason))));
}

let measuring = false;

function measure() {
  return attempt("speed-wrong", async () => {
    if (measuring) return;
    const model = needModel(), { benchmark } = await import("./bench.js");
    await stopWriting();
    const figures = $("figures");
    figures.hidden = false;
    figures.textContent = "";
    $("copy").hidden = true;
    measuring = true;
    try {
      const line = (text) => { figures.textContent += `${text}\n`; };
      const { text } = await during("measure", "Measuring", () =>
        aloneWith(model, () => benchmark(page.gpu, model, line)));
      figures.textContent = text;
      $("copy").hidden = false;
      $("measured").textContent = "Measured.";
    } finally {
      measuring = false;
    }
  });
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("figures").textContent);
    $("measured").textContent = $("copy").textContent = "Copied";
    setTimeout(() => { $("copy").textContent = "Copy as text"; }, 2000);
  } catch {  // not allowed: mark it, for the person to copy
    getSelection().selectAllChildren($("figures"));
  }
}

export function setUpSpeed() {
  $("measure").addEventListener("click", measure);
  $("copy").addEventListener("click", copy);
  onModel(() => { $("figures").hidden = $("copy").hidden = true; });
}
