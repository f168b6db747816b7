// The models that come with the page. The first one is fetched as the page opens, the others only when they are chosen.

import { fetched, kept } from "./fetching.js";
import { $, onModel, page } from "./page_common.js";

/** By name in a link: the file, and prompts that show something: of the text, and of the panels. */
export const MODELS = {
  python: { file: "demo.safetensors", prompt: "class", look: "def __init__(self, name):\n        self.name =" },
  english: { file: "english.safetensors", prompt: "Once upon a time", look: "She opened the door and went into the" },
};

const files = new Map(), names = new Map();  // promises of files by name; names by file

/** The file of one of these models, fetched once. */
export const modelFile = (name) => kept(files, name, async () => {
  const { file } = MODELS[name], found = new File([await fetched(file, "blob")], file);
  names.set(found, name);
  return found;
});

/** The name of the model that is open, if it is one of these. */
export const modelName = () => names.get(page.model?.blob) ?? null;

/** The buttons that choose a model; open(name) opens it. */
export function setUpModels(open) {
  for (const button of document.querySelectorAll("#models button")) button.addEventListener("click", () => open(button.dataset.model));
  onModel(() => {
    for (const button of document.querySelectorAll("#models button")) button.setAttribute("aria-pressed", button.dataset.model === modelName());
  });
}

/** Where the prompts are those of another of these models, put this model's in their place. */
export function takePrompts(name) {
  for (const [id, field] of [["prompt", "prompt"], ["look-prompt", "look"]]) {
    if (!Object.values(MODELS).some((each) => each[field] === $(id).value)) continue;
    $(id).value = MODELS[name][field];
    $(id).dispatchEvent(new Event("input", { bubbles: true }));
  }
}
