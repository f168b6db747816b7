// From text to token ids and back, with the same ids as tokenizer.py, by the dict in a checkpoint's header.
//
//   const enc = new Tokenizer(meta.tokenizer);
//   enc.decode(enc.encode("def main"))
import { UserError } from "./errors.js";

const EOT = "<|endoftext|>";
const NOTHING = new Uint8Array();

export class Tokenizer {
  /** dict: {kind: byte | char | bpe | hf, tokens: [base64], special: {text: id}, added?: {text: id}, pattern, normalizer?,
   *  bos?, eot?, source?: the text of a tokenizer.json} */
  constructor(dict) {
    check(dict);
    const tokens = dict.tokens.map(fromBase64), named = Object.entries({ ...dict.special, ...dict.added });
    this.kind = dict.kind;
    this.n_vocab = named.reduce((most, [, id]) => Math.max(most, id + 1), tokens.length);
    this.eot = dict.eot ?? dict.special[EOT]; // ends a document
    this.bos = dict.bos === undefined ? this.eot : dict.bos; // begins it; null: no token does
    this.start = this.bos === null ? [] : [this.bos];
    this.pieces = new Array(this.n_vocab).fill(NOTHING); // the bytes of each token
    tokens.forEach((token, id) => token && (this.pieces[id] = Uint8Array.from(token, byteOf)));
    for (const [text, id] of named) {
      if (!this.pieces[id].length || Object.hasOwn(dict.special, text)) this.pieces[id] = new TextEncoder().encode(text);
    }
    const encoder = { byte: byteEncoder, char: charEncoder, bpe: bpeEncoder, hf: hfEncoder }[dict.kind](tokens, dict);
    /** Token ids of a text, a Uint32Array. The text of a special token is encoded like any other text, unless `special`, as for
     *  a chat template; that of an added token, which is not special, is that token. */
    this.encode = dict.kind === "hf" ? encoder : (text, special = false) => {
      const found = special ? { ...dict.special, ...dict.added } : dict.added ?? {};
      if (!Object.keys(found).length) return encoder(text);
      return Uint32Array.from(splitAt(found, dict.special, text).flatMap(({ id, part }) => id ?? [...encoder(part)]));
    };
  }

  /** The text of token ids. Bytes that are not UTF-8 become U+FFFD. An id beyond the vocabulary is padding, without text. */
  decode(ids) {
    const stream = this.stream();
    return Array.from(ids, stream.push).join("") + stream.end();
  }

  /** For text that comes token by token: push(id) returns the characters that are complete, end() the rest of a cut one. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // ignoreBOM keeps a U+FEFF at the start
    return {
      push: (id) => decoder.decode(this.pieces[id] ?? NOTHING, { stream: true }),
      end: () => decoder.decode(),
    };
  }
}

/** The dict of the tokenizer whose tokens are the 256 bytes. */
export function byteTokenizer() {
  const tokens = Array.from({ length: 256 }, (_, byte) => btoa(String.fromCharCode(byte)));
  return { kind: "byte", tokens, special: { [EOT]: 256 }, pattern: "" };
}

/** The dict of the tokenizer whose tokens are the characters of a text, sorted. */
export function charTokenizer(text) {
  const characters = [...new Set(text.toWellFormed())].sort((a, b) => a.codePointAt(0) - b.codePointAt(0));
  const tokens = characters.map((character) => btoa(binary(character)));
  return { kind: "char", tokens, special: { [EOT]: tokens.length }, pattern: "" };
}

/** UserError if a dict is not one that this page can use. */
function check(dict) {
  if (!dict) throw new UserError("This checkpoint holds no tokenizer: it cannot read or write text.");
  const { kind, tokens, special, added = {}, pattern, normalizer = "", bos, eot, source = "" } = dict;
  if (!["byte", "char", "bpe", "hf"].includes(kind)) {
    throw new UserError(`This checkpoint's tokenizer is of the unknown kind ${JSON.stringify(kind)}: ` +
      "it must be byte, char, bpe or hf.");
  }
  const isId = (id) => Number.isInteger(id) && id >= 0 && id < 2 ** 22;
  const whole = Array.isArray(tokens) && tokens.length <= 2 ** 22 &&
    tokens.every((token) => typeof token === "string") &&
    [special, added].every((named) => named && typeof named === "object" && Object.values(named).every(isId)) &&
    [bos, eot].every((id) => (id ?? null) === null || isId(id)) &&
    [pattern ?? "", source].every((text) => typeof text === "string") && ["", "NFC"].includes(normalizer);
  if (!whole) throw new UserError("This checkpoint's tokenizer is damaged: copy the file again.");
  if (!isId(eot ?? special[EOT])) {
    throw new UserError("This checkpoint's tokenizer names no token that ends a document: make the file again.");
  }
}

// ---- bytes ----------------------------------------------------------------------------------------------------------
// Bytes that are keys of a Map are "binary strings", with a character U+0000 to U+00FF for each byte, since a Map compares
// strings by their content, and typed arrays only by identity.

const byteOf = (character) => character.charCodeAt(0);

function fromBase64(text) {
  try {
    return atob(text);
  } catch {
    throw new UserError("This checkpoint's tokenizer is damaged: copy the file again.");
  }
}

/** The UTF-8 of a text, as a binary string. */
function binary(text) {
  if (/^[\0-\x7f]*$/.test(text)) return text;
  const bytes = new TextEncoder().encode(text), parts = [];
  for (let i = 0; i < bytes.length; i += 8192) parts.push(String.fromCharCode(...bytes.subarray(i, i + 8192)));
  return parts.join(""); // in parts, as the number of arguments is limited
}

/** A text with the escape sequences of Python's unicode_escape. */
function escaped(text) {
  const names = { "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\" };
  return text.replace(/[^ -[\]-~]/gu, (character) => {
    const point = character.codePointAt(0), [letter, width] = point < 256 ? "x2" : point < 65536 ? "u4" : "U8";
    return names[character] ?? "\\" + letter + point.toString(16).padStart(Number(width), "0");
  });
}

/** The parts of a text, each {id} of an added token or {part}: the text between. At each place the longest name counts;
 *  names of special tokens that are not in `added` are text, but an added token's name inside one is not found. blanks:
 *  {name: {lstrip, rstrip}} of tokens that take the blanks before or after them with them; a name that begins in blanks that
 *  were taken counts too, as in the tokenizers package. */
function splitAt(added, special, text, blanks = {}) {
  const names = Object.keys({ ...special, ...added }).filter(Boolean).sort((a, b) => b.length - a.length);
  if (!names.length) return [{ part: text }];
  const parts = [];
  let start = 0;
  for (const { 0: name, index } of text.matchAll(new RegExp(names.map(quoted).join("|"), "gu"))) {
    if (!Object.hasOwn(added, name)) continue;
    let before = text.slice(start, index);
    if (blanks[name]?.lstrip) before = before.replace(/\p{White_Space}+$/u, "");
    if (before) parts.push({ part: before });
    parts.push({ id: added[name] });
    start = index + name.length;
    if (blanks[name]?.rstrip) start += text.slice(start).match(/^\p{White_Space}*/u)[0].length;
  }
  if (start < text.length) parts.push({ part: text.slice(start) });
  return parts;
}

const quoted = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");

// ---- byte, char -----------------------------------------------------------------------------------------------------

// Each of these takes the tokens, as binary strings, and the dict, and returns a function that encodes a text.

function byteEncoder() {
  return (text) => Uint32Array.from(new TextEncoder().encode(text)); // it replaces half a surrogate pair by U+FFFD itself
}

function charEncoder(tokens) {
  const ids = new Map(tokens.map((token, id) => [new TextDecoder("utf-8", { ignoreBOM: true }).decode(
    Uint8Array.from(token, byteOf)), id]));
  return (text) => {
    const characters = [...text.toWellFormed()];
    const missing = [...new Set(characters)].filter((character) => !ids.has(character));
    if (missing.length) {
      const shown = missing.slice(0, 10).map((character) => `'${/[\p{C}\p{Z}]/u.test(character) ?
        escaped(character) : character}'`).join(", ") + (missing.length > 10 ? ` and ${missing.length - 10} more` : "");
      throw new UserError(`This model knows only the characters that it was trained on, and not ${shown}: ` +
        "leave them out.");
    }
    return Uint32Array.from(characters, (character) => ids.get(character));
  };
}

// ---- bpe ------------------------------------------------------------------------------------------------------------

function bpeEncoder(tokens, { pattern, normalizer }) {
  const ranks = new Map();
  let longest = 0, regex;
  tokens.forEach((token, id) => {
    if (token) ranks.set(token, id); // an empty token stands for an id that is not used
    longest = Math.max(longest, token.length);
  });
  return (text) => {
    regex ??= wordRegex(pattern ?? ""); // made only now: without it, the page can still decode
    let well = text.toWellFormed();
    const whole = well === text, ids = [];
    if (normalizer) well = well.normalize(normalizer);
    const known = new Map(); // most words of a text repeat; the Map is dropped after it, as its keys keep the text in memory
    return unlessTooLong(() => {
      checkBlanks(well, whole ? 999_999 : 50_000);
      for (const { 0: { length }, index } of withoutFalsePairs(well).matchAll(regex)) { // text that it does not match is left out, as in tiktoken
        const word = well.slice(index, index + length);
        let found = known.get(word);
        if (!found) known.set(word, found = encodeWord(binary(word), ranks, longest));
        for (const id of found) ids.push(id);
      }
      return Uint32Array.from(ids);
    });
  };
}

/** The result of work(). UserError where it has a regex that overflows the stack of the browser's engine. */
function unlessTooLong(work) {
  try {
    return work();
  } catch (error) {
    if (!(error instanceof RangeError || error.name === "InternalError")) throw error;  // the second is Firefox's
    throw new UserError("The text has a word, or a run of blanks, of millions of characters: break it up.");
  }
}

/** The ids of a word, a binary string. The rank of two neighbouring parts is the id of the token that is their union. */
function encodeWord(word, ranks, longest) {
  const whole = ranks.get(word);
  if (whole !== undefined) return [whole]; // as in tiktoken, even if no merges lead to it
  const known = Array.from(word).filter((byte) => ranks.has(byte)).join("");  // a vocabulary may lack bytes that no text had
  const rankOf = (start, _, end) => end - start > longest ? -1 : ranks.get(known.slice(start, end)) ?? -1;
  return mergedParts(known, rankOf).map((part) => ranks.get(part));
}

/** The parts of a word, which at first are its characters. The two neighbours with the lowest rank are merged, the leftmost
 *  first where several are equal, until no two have a rank. rankOf(start, middle, end): that of the neighbours
 *  word.slice(start, middle) and word.slice(middle, end), -1 for none. A heap finds the lowest, so that a word of a megabyte
 *  takes a second and not an hour. */
function mergedParts(word, rankOf) {
  const n = word.length, end = new Int32Array(n), previous = new Int32Array(n);
  const rank = new Int32Array(n).fill(-1); // of the part that begins here and the next part
  const heap = []; // of rank * 2^31 + place: the smallest is merged next, if it is still valid
  const look = (place) => {
    const next = end[place];
    rank[place] = next < n ? rankOf(place, next, end[next]) : -1;
    if (rank[place] >= 0) push(heap, rank[place] * 2 ** 31 + place);
  };
  for (let place = 0, last = -1; place < n; last = place, place = end[place]) {
    end[place] = place + (word.codePointAt(place) > 0xffff ? 2 : 1);
    previous[place] = last;
  }
  for (let place = 0; place < n; place = end[place]) look(place);
  while (heap.length) {
    const key = pop(heap), place = key % 2 ** 31;
    if (rank[place] !== Math.floor(key / 2 ** 31)) continue; // one of the two parts has changed since
    const next = end[place];
    rank[next] = -1; // no part begins there any more
    end[place] = end[next];
    if (end[place] < n) previous[end[place]] = place;
    look(place);
    if (place > 0) look(previous[place]);
  }
  const parts = [];
  for (let place = 0; place < n; place = end[place]) parts.push(word.slice(place, end[place]));
  return parts;
}

function push(heap, key) {
  let i = heap.length;
  for (let above; i > 0 && heap[above = (i - 1) >> 1] > key; i = above) heap[i] = heap[above];
  heap[i] = key;
}

function pop(heap) {
  const smallest = heap[0], key = heap.pop(), n = heap.length;
  let i = 0;
  for (let below; n && (below = 2 * i + 1) < n; i = below) {
    if (below + 1 < n && heap[below + 1] < heap[below]) below++;
    if (heap[below] >= key) break;
    heap[i] = heap[below];
  }
  if (n) heap[i] = key;
  return smallest;
}

/** UserError for a run of blanks that tokenizer.py cuts, which gives other ids: its regex engine cannot handle a million,
 *  and it cuts 50,000 in a text with half a surrogate pair. */
function checkBlanks(text, limit) {
  for (const [blanks] of text.length < limit ? [] : text.matchAll(/[\p{White_Space}\x1c-\x1f]{1000,}/gu)) {
    if (blanks.length >= limit) throw new UserError(`The text has ${blanks.length} blanks in a row: leave some out.`);
  }
}

const LIKE = [ // for each kind of character, one that may replace another of that kind
  [/\p{Script=Han}/u, "\u4e00"], [/\p{Lo}/u, "\u05d0"], [/\p{Ll}/u, "\u0149"], [/\p{M}/u, "\u05bf"],
  [/\p{S}/u, "\u2212"], [/\p{Co}/u, "\ue000"], [/\p{Cn}/u, "\ufdd0"],
];

/** A text with the same word boundaries, for the regex. WebKitGTK 2.50 takes a character from U+F800 to U+FBFF (forms of
 *  Arabic and Chinese letters) before one from U+FC00 on (a wide comma) for a surrogate pair, which is another character. */
function withoutFalsePairs(text) {
  return text.replace(/[\uf800-\ufbff](?=[\ufc00-\uffff])/g, (character) =>
    LIKE.find(([kind]) => kind.test(character))[1]);
}

// ---- hf: byte pair encoding by the text of a tokenizer.json ----------------------------------------------------------
// Byte-level as in Llama 3 and Qwen, and on characters as in SentencePiece (Llama 2, Gemma). A file with any other step is
// refused by the step's name.

const GPT2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

const refuse = (what) => new UserError(`This checkpoint's tokenizer has ${what}, which the page cannot run: use sample.py.`);

function hfEncoder(_, { source }) {
  let encode; // made only for the first text: without it, the page can still decode
  return (text, special = false) => {
    return unlessTooLong(() => {
      encode ??= sourceEncoder(source ?? "");
      return encode(text.toWellFormed(), special);
    });
  };
}

function sourceEncoder(source) {
  let file;
  try {
    file = JSON.parse(source);
  } catch {
    throw new UserError("This checkpoint's tokenizer is damaged: copy the file again.");
  }
  const normalize = normalizer(file.normalizer), split = preTokenizer(file.pre_tokenizer), encodePart = mergesOf(file.model ?? {});
  const all = file.added_tokens ?? [], named = (tokens, nameOf = (name) => name) => Object.fromEntries(
    tokens.map(({ content, id }) => [nameOf(content), id]));
  const odd = all.find((token) => token.single_word);
  if (odd) throw refuse(`the token ${odd.content} that is found as a whole word only`);
  // As the tokenizers package does: names are found in the text, and others in what the normalizer has made of the rest.
  const found = (list, normalized) => list.filter((token) => Boolean(token.normalized) === normalized);
  const blanks = Object.fromEntries(all.map((token) => [token.content, token]));
  const [first, second] = [false, true].map((normalized) => [false, true].map((special) =>
    named(found(all, normalized).filter((token) => Boolean(token.special) === special), normalized ? normalize : undefined)));
  return (text, special) => {
    const ids = [], names = ([added, other]) => special ? [{ ...added, ...other }, {}] : [added, other];
    let place = 0;
    for (const { id, part } of splitAt(...names(first), text, blanks)) {
      if (id !== undefined) ids.push(id);
      else {
        for (const { id, part: inside } of splitAt(...names(second), normalize(part), blanks)) {
          if (id !== undefined) ids.push(id);
          else for (const word of split([inside], place === 0)) for (const token of encodePart(word)) ids.push(token);
          place = 1;
        }
      }
      place = 1;
    }
    return Uint32Array.from(ids);
  };
}

/** The function that a `normalizer` of tokenizer.json describes: from text to text. */
function normalizer(step) {
  if (!step) return (text) => text;
  switch (step.type) {
    case "Sequence": {
      const all = step.normalizers.map(normalizer);
      return (text) => all.reduce((sofar, each) => each(sofar), text);
    }
    case "Prepend": return (text) => text && step.prepend + text;
    case "Replace":
      if (typeof step.pattern?.String !== "string") throw refuse("a regex in its normalizer");
      return (text) => text.replaceAll(step.pattern.String, () => step.content);
    case "NFC": return (text) => text.normalize("NFC");
    default: throw refuse(`the normalizer ${step.type}`);
  }
}

/** The function that a `pre_tokenizer` of tokenizer.json describes: from parts of a text to smaller parts. Its second
 *  argument: whether the first part begins the text. */
function preTokenizer(step) {
  const each = (cut) => (parts, begins) => parts.flatMap((part, i) => cut(part, begins && i === 0));
  if (!step) return (parts) => parts;
  switch (step.type) {
    case "Sequence": {
      const all = step.pretokenizers.map(preTokenizer);
      return (parts, begins) => all.reduce((sofar, cut) => cut(sofar, begins), parts);
    }
    case "Split": {
      const { Regex, String: plain } = step.pattern, regex = Regex === undefined ? new RegExp(quoted(plain), "gu") : wordRegex(Regex);
      return each((part) => cutAt(part, regex, step.behavior, step.invert));
    }
    case "Digits": {
      const regex = step.individual_digits ? /\p{N}/gu : /\p{N}+/gu;
      return each((part) => cutAt(part, regex, "Isolated"));
    }
    case "ByteLevel": {
      const regex = step.use_regex ?? true ? wordRegex(GPT2) : null;
      return each((part) => {
        const whole = (step.add_prefix_space ?? true) && !part.startsWith(" ") ? ` ${part}` : part;
        return (regex ? cutAt(whole, regex, "Isolated") : [whole]).map(inLetters);
      });
    }
    case "Metaspace": {
      const blank = step.replacement, scheme = step.prepend_scheme ?? (step.add_prefix_space ?? true ? "always" : "never");
      return each((part, begins) => {
        let text = part.replaceAll(" ", blank);
        if ((scheme === "always" || scheme === "first" && begins) && !text.startsWith(blank)) text = blank + text;
        if (step.split === false) return [text];
        return cutAt(text, new RegExp(`${quoted(blank)}[^${quoted(blank)}]*`, "gu"), "Isolated");
      });
    }
    default: throw refuse(`the pre-tokenizer ${step.type}`);
  }
}

/** A text cut at the matches of a regex, which with `invert` are what lies between them. */
function cutAt(text, regex, behavior, invert = false) {
  const parts = [];
  let start = 0, merged = false; // merged: the part before is a match
  const take = (end, isMatch) => {
    if (end === start) return;
    const part = text.slice(start, end);
    start = end;
    if (behavior === "MergedWithPrevious" && isMatch && !merged && parts.length) parts.push(parts.pop() + part);
    else if (behavior !== "Removed" || !isMatch) parts.push(part);
    merged = isMatch;
  };
  if (!["Isolated", "Removed", "MergedWithPrevious"].includes(behavior)) throw refuse(`a pre-tokenizer with ${behavior}`);
  for (const { 0: match, index } of withoutFalsePairs(text).matchAll(regex)) {
    take(index, invert);
    take(index + match.length, !invert);
  }
  take(text.length, invert);
  return parts;
}

let letters;

/** A text in GPT-2's letters for its bytes: printable bytes are their own letters, the others U+0100 and on. */
function inLetters(text) {
  if (!letters) {
    let others = 0x100;
    letters = Array.from({ length: 256 }, (_, byte) => byte > 32 && byte < 127 || byte > 160 && byte !== 173 ?
      String.fromCharCode(byte) : String.fromCharCode(others++));
  }
  return Array.from(binary(text), (byte) => letters[byteOf(byte)]).join("");
}

/** The function that a `model` of tokenizer.json describes, byte pair encoding: from a part of a text to ids. */
function mergesOf(model) {
  if ((model.type ?? "BPE") !== "BPE" || !model.merges) throw refuse(`the model ${model.type}`);
  for (const name of ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]) if (model[name]) throw refuse(name);
  const ids = new Map(Object.entries(model.vocab)), ranks = new Map(), known = new Map();
  const keyOf = (length, both) => `${length} ${both}`; // of two neighbours: where the second begins
  model.merges.forEach((merge, rank) => {
    const [a, b] = typeof merge === "string" ? merge.split(" ") : merge;
    ranks.set(keyOf(a.length, a + b), rank);
  });
  const unknown = model.unk_token ? ids.get(model.unk_token) : undefined;
  const encodeWord = (word) => {
    const whole = model.ignore_merges ? ids.get(word) : undefined;
    if (whole !== undefined) return [whole];
    const found = [];
    for (const part of mergedParts(word, (start, middle, end) => ranks.get(keyOf(middle - start, word.slice(start, end))) ?? -1)) {
      const id = ids.get(part);
      const bytes = id === undefined && model.byte_fallback ? Array.from(binary(part), (byte) =>
        ids.get(`<0x${byteOf(byte).toString(16).toUpperCase().padStart(2, "0")}>`)) : [undefined];
      if (id !== undefined) found.push(id);
      else if (!bytes.includes(undefined)) found.push(...bytes);
      else if (unknown !== undefined && !(model.fuse_unk && found.at(-1) === unknown)) found.push(unknown);
    }
    return found;
  };
  return (word) => {
    let found = known.get(word);
    if (found) return found;
    if (known.size > 100_000) known.clear();
    found = encodeWord(word);
    if (word.length < 50) known.set(word, found);
    return found;
  };
}

// ---- the regex that cuts a text into words --------------------------------------------------------------------------

const SETS = { // the characters that Rust means by these, written so that they fit inside a class
  s: "\\p{White_Space}", // JavaScript's \s has U+FEFF, which is not a blank in Unicode, and lacks U+0085, which is one
  d: "\\p{Nd}", // the digits of all scripts
  w: "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}",
};
const CONTROLS = { n: "\n", r: "\r", t: "\t", f: "\f", v: "\v", a: "\x07" };

/** The RegExp that matches what a regex matches in Rust's fancy-regex. It translates the syntax that tokenizers use. For any
 *  other syntax it throws a UserError, since a regex that is not quite equal would give other tokens than in training.
 *
 *  The differences are: JavaScript has no possessive quantifiers; (?i:...) is too new for some browsers; \s, \d, \w and .
 *  mean other characters; and with the u flag most escapes of punctuation are errors.
 */
export function wordRegex(pattern) {
  let i = 0;

  const unknown = (what) => new UserError(
    `This checkpoint's tokenizer has ${what} in its regex, which the page cannot run: use sample.py.`);

  /** The match of a sticky RegExp at the current position, which moves behind it; null if there is no match. */
  function take(regex) {
    regex.lastIndex = i;
    const match = regex.exec(pattern);
    if (match) i = regex.lastIndex;
    return match;
  }

  function alternatives(anyCase) {
    let source = "";
    while (i < pattern.length && pattern[i] !== ")") source += take(/\|/y) ? "|" : piece(anyCase);
    return source;
  }

  function piece(anyCase) {
    const single = !"(^$".includes(pattern[i]), source = atom(anyCase);
    const repeat = take(/([?*+]|\{(\d+)(?:,(\d*))?\})(\??)(\+?)/y);
    if (!repeat) return source;
    refuseQuantifier();
    const [whole, sign, least, most = least, lazy, possessive] = repeat;
    if (!possessive) return source + whole;
    // X++ matches as many X as there are and never fewer: after it comes no further X, or it has as many as it may. (There
    // are shorter ways, a lookahead with a group and a reference to it, or X{2}|X, but WebKitGTK 2.50 has bugs in them.)
    if (!single || lazy) throw unknown(`the possessive ${whole} after more than a character`);
    if (sign === "*" || sign === "+" || !most && sign !== "?") return `${source}${sign}(?!${source})`;
    const upTo = (n) => n > 0 ? `(?:${source}${upTo(n - 1)}|(?!${source}))` : "";
    return sign === "?" ? upTo(1) : source.repeat(least) + upTo(most - least);
  }

  function refuseQuantifier() {
    if ("?*+{".includes(pattern[i] ?? " ")) throw unknown(`the quantifier ${pattern[i]} out of place`);
  }

  function atom(anyCase) {
    refuseQuantifier();
    if (take(/\./y)) return "[^\\n]";
    if (take(/\^/y)) return "^";
    if (take(/\$/y)) return "$";
    if (take(/\\W/y)) return `[^${SETS.w}]`;
    if (take(/\[/y)) return characterClass(anyCase);
    const opening = take(/\((\?(?:i?:|<?[=!]))?/y);
    if (opening) {
      const kind = opening[1] ?? "?:"; // a plain group need not capture here
      if (pattern[i] === "?") throw unknown(`the group (${pattern.slice(i, i + 3)}`);
      const source = alternatives(anyCase || kind === "?i:");
      if (!take(/\)/y)) throw unknown("a group without end");
      return `(${kind.replace("i", "")}${source})`;
    }
    const { set, character } = element(anyCase);
    if (set) return `[${set}]`;
    const same = sameLetters(character, anyCase);
    return same.length > 1 ? `[${same.map(literal).join("")}]` : literal(character);
  }

  function characterClass(anyCase) {
    let source = take(/\^/y) ? "^" : "";
    if (pattern[i] === "]") throw unknown("a class that begins with ]");
    while (!take(/\]/y)) {
      const other = take(/\[|&&|--|~~/y);
      if (other) throw unknown(`${other[0]} in a class`);
      const { set, character: first } = element(anyCase);
      if (set) {
        source += set;
      } else if (!take(/-(?![-\]])/y)) { // a - at the end stands for itself
        source += sameLetters(first, anyCase).map(literal).join("");
      } else {
        const { character: last } = element(anyCase);
        if (!last || last.codePointAt(0) < first.codePointAt(0)) throw unknown("a range without end");
        source += `${literal(first)}-${literal(last)}`;
        if (anyCase) source += lettersBetween(first, last).flatMap((c) => sameLetters(c, true)).map(literal).join("");
      }
    }
    return `[${source}]`;
  }

  /** The next character, or the set that an escape sequence stands for, as it is written in a class. */
  function element(anyCase) {
    const character = take(/[^\\]/uy);
    if (character) return { character: character[0] };
    const code = take(/\\(?:x([\da-fA-F]{2})|u([\da-fA-F]{4})|[xu]\{([\da-fA-F]{1,6})\})/y);
    if (code) {
      const point = parseInt(code[1] ?? code[2] ?? code[3], 16);
      if (point > 0x10ffff) throw unknown(code[0]);
      return { character: String.fromCodePoint(point) };
    }
    const control = take(/\\([nrtfva])/y);
    if (control) return { character: CONTROLS[control[1]] };
    const sign = take(/\\([!-/:;=?@[-`{-~])/y);
    if (sign) return { character: sign[1] };
    const set = take(/\\([sdw])/y);
    if (set) return { set: SETS[set[1]] };
    const others = take(/\\([SD])/y);
    if (others) return { set: SETS[others[1].toLowerCase()].replace("p", "P") };
    const property = take(/\\([pP])(?:\{(\w+)\}|([A-Z]))/y);
    if (!property || anyCase) throw unknown(`\\${pattern.slice(i + 1, i + 2)}${anyCase ? " in (?i:...)" : ""}`);
    const name = property[2] ?? property[3];
    for (const full of [name, `Script=${name}`]) { // Rust says \p{Greek} where JavaScript says \p{Script=Greek}
      try {
        new RegExp(`\\p{${full}}`, "u");
        return { set: `\\${property[1]}{${full}}` };
      } catch {
        continue;
      }
    }
    throw unknown(property[0]);
  }

  /** The letters that (?i:...) treats as equal to one, by Unicode's simple case folding. */
  function sameLetters(character, anyCase) {
    if (!anyCase || /[\p{P}\p{Z}\p{Nd}]/u.test(character)) return [character]; // these have no case
    if (character > "\x7f") throw unknown(`${character} in (?i:...)`);
    const strange = { s: ["\u017f"], k: ["\u212a"] }; // the long s and the kelvin sign; no other letter folds to ASCII
    const lower = character.toLowerCase();
    return [...new Set([lower, lower.toUpperCase(), ...strange[lower] ?? []])];
  }

  function lettersBetween(first, last) {
    if (last > "\x7f") throw unknown(`a range up to ${last} in (?i:...)`);
    const letters = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"];
    return letters.filter((letter) => first <= letter && letter <= last);
  }

  /** A character as it is written in a RegExp, inside a class or not. */
  function literal(character) {
    return /^[\dA-Za-z]$/.test(character) ? character : `\\u{${character.codePointAt(0).toString(16)}}`;
  }

  const source = alternatives(false);
  if (i < pattern.length) throw unknown("a ) without its (");
  let regex;
  try {
    regex = new RegExp(source, "gu");
  } catch (error) { // such as a quantifier of a lookahead, or a property that this browser does not know
    throw unknown(`what this browser refuses (${error.message})`);
  }
  if (regex.test("")) throw unknown("a way to match nothing"); // tiktoken cannot run that either
  return regex;
}
