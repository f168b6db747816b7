// Files that the page fetches from its server. A failure is told as a UserError and is not kept, so that the next try asks
// the server again.

import { UserError } from "./errors.js";

export class LostConnection extends UserError {}

const lostBy = (name) => new LostConnection(`The page has lost the connection to its server (${name} could not be fetched): ` +
  "start python playground.py again, and try again. What you typed is still here.");

/** A file of the page's server, as "text", "blob" or "json"; messages call it by its name. LostConnection if the server does
 *  not answer, UserError if it has no such file. */
export async function fetched(path, kind = "text", name = path) {
  const lost = () => { throw lostBy(name); };
  const answer = await fetch(new URL(path, import.meta.url)).catch(lost);
  if (!answer.ok) throw new UserError(`${name} could not be fetched (${answer.status}): it may have been moved or deleted.`);
  const content = await answer.blob().catch(lost);  // the connection may break in the middle
  if (kind === "blob") return content;
  return kind === "json" ? JSON.parse(await content.text()) : content.text();
}

/** The promise of a key, which make() makes if there is none. A failure is forgotten, so that the next call tries again. */
export function kept(promises, key, make) {
  if (!promises.has(key)) {
    const promise = make();
    promises.set(key, promise);
    promise.catch(() => promises.get(key) === promise && promises.delete(key));
  }
  return promises.get(key);
}

const texts = new Map(), modules = new Map();

/** The text of a file of the page, fetched once. */
export const textOf = (path) => kept(texts, path, () => fetched(path));

/** A module that is not needed at the start, as imported("bench.js"). Some browsers keep the failure of an import, so that no
 *  later import of that file can succeed: therefore the file is fetched first, and imported only if that went well. */
export const imported = (path) => kept(modules, path, async () => {
  await fetched(path);
  return import(`./${path}`).catch((error) => { throw /import/i.test(error.message) ? lostBy(path) : error; });
});
