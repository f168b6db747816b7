// From text to token ids and back: id for id what tokenizer.py does, from the dict that a checkpoint's header holds.
//
//   const enc = new Tokenizer(meta.tokenizer);
//   enc.decode(enc.encode("def main"))
import { UserError } from "./errors.js";

const EOT = "<|endoftext|>";
const NOTHING = new Uint8Array();

export class Tokenizer {
  /** dict: {kind: byte | char | bpe | hf, tokens: [base64], special: {text: id}, pattern, bos?, eot?} */
  constructor(dict) {
    check(dict);
    const tokens = dict.tokens.map(fromBase64);
    const special = Object.entries(dict.special);
    this.kind = dict.kind;
    this.n_vocab = special.reduce((most, [, id]) => Math.max(most, id + 1), tokens.length);
    this.eot = dict.eot ?? dict.special[EOT]; // ends a document
    this.bos = dict.bos ?? this.eot; // begins it
    this.pieces = new Array(this.n_vocab).fill(NOTHING); // the bytes of each token
    tokens.forEach((token, id) => token && (this.pieces[id] = Uint8Array.from(token, byteOf)));
    for (const [text, id] of special) this.pieces[id] = new TextEncoder().encode(text);
    const encoder = { byte: byteEncoder, char: charEncoder, bpe: bpeEncoder, hf: hfEncoder }[dict.kind];
    /** Token ids of a text, a Uint32Array. The text of a special token is encoded like any other text. */
    this.encode = encoder(tokens, dict.pattern);
  }

  /** The text of token ids; what is no UTF-8 becomes U+FFFD. An id beyond the vocabulary is padding, without text. */
  decode(ids) {
    const stream = this.stream();
    return Array.from(ids, stream.push).join("") + stream.end();
  }

  /** For text that comes token by token: push(id) gives what is complete, end() what is left of a cut character. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // or else a U+FEFF at the start would be dropped
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

/** UserError if a dict is none that this page can use. */
function check(dict) {
  if (!dict) throw new UserError("This checkpoint holds no tokenizer: it cannot read or write text.");
  const { kind, tokens, special, pattern, bos, eot } = dict;
  if (!["byte", "char", "bpe", "hf"].includes(kind)) {
    throw new UserError(`This checkpoint's tokenizer is of the unknown kind ${JSON.stringify(kind)}: ` +
      "it must be byte, char, bpe or hf.");
  }
  const isId = (id) => Number.isInteger(id) && id >= 0 && id < 2 ** 22;
  const whole = Array.isArray(tokens) && tokens.length <= 2 ** 22 &&
    tokens.every((token) => typeof token === "string") && special && typeof special === "object" &&
    Object.values(special).every(isId) && [bos, eot].every((id) => (id ?? null) === null || isId(id)) &&
    typeof (pattern ?? "") === "string";
  if (!whole) throw new UserError("This checkpoint's tokenizer is damaged: copy the file again.");
  if (!isId(eot ?? special[EOT])) {
    throw new UserError("This checkpoint's tokenizer names no token that ends a document: make the file again.");
  }
}

// ---- bytes ----------------------------------------------------------------------------------------------------------
// Where bytes are looked up they are "binary strings", a character U+0000 to U+00FF for each byte, as a Map finds
// strings by what they hold, and typed arrays only by identity.

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
  return parts.join(""); // in parts, as a call takes only so many arguments
}

/** A text with the escapes of Python's unicode_escape. */
function escaped(text) {
  const names = { "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\" };
  return text.replace(/[^ -[\]-~]/gu, (character) => {
    const point = character.codePointAt(0), [letter, width] = point < 256 ? "x2" : point < 65536 ? "u4" : "U8";
    return names[character] ?? "\\" + letter + point.toString(16).padStart(Number(width), "0");
  });
}

// ---- byte, char, hf -------------------------------------------------------------------------------------------------

// Each takes the tokens, as binary strings, and returns the function that encodes.

function byteEncoder() {
  return (text) => Uint32Array.from(new TextEncoder().encode(text)); // which itself makes U+FFFD of half a pair
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

function hfEncoder() {
  return () => {
    throw new UserError("This checkpoint's tokenizer is run by a Python package, so the page can show what the model " +
      "writes but cannot read a text for it: use sample.py.");
  };
}

// ---- bpe ------------------------------------------------------------------------------------------------------------

function bpeEncoder(tokens, pattern) {
  const ranks = new Map();
  let longest = 0, regex;
  tokens.forEach((token, id) => {
    if (token) ranks.set(token, id); // an empty one is a gap
    longest = Math.max(longest, token.length);
  });
  return (text) => {
    regex ??= wordRegex(pattern ?? ""); // not before: where the page cannot run it, it can still decode
    const well = text.toWellFormed(), seen = withoutFalsePairs(well), ids = [];
    const known = new Map(); // a text repeats most of its words; it is forgotten then, as its keys hold the whole text
    try {
      checkBlanks(well, well === text ? 999_999 : 50_000);
      for (const { 0: { length }, index } of seen.matchAll(regex)) { // what it leaves out is left out, as in tiktoken
        const word = well.slice(index, index + length);
        let found = known.get(word);
        if (!found) known.set(word, found = encodeWord(binary(word), ranks, longest));
        for (const id of found) ids.push(id);
      }
    } catch (error) {
      if (!(error instanceof RangeError || error.name === "InternalError")) throw error;
      // The stack of the browser's regex engine has overflowed, which Firefox calls an InternalError.
      throw new UserError("The text has a word, or a run of blanks, of millions of characters: break it up.");
    }
    return Uint32Array.from(ids);
  };
}

/** The ids of a word: of its two neighbours whose union has the lowest id (rank), and of such the leftmost, again and
 *  again. A heap finds them, so that a word of a megabyte takes a second and not an hour. */
function encodeWord(word, ranks, longest) {
  const whole = ranks.get(word);
  if (whole !== undefined) return [whole]; // as tiktoken does, even where no merges lead there
  const n = word.length, end = new Int32Array(n), previous = new Int32Array(n);
  const rank = new Int32Array(n); // of the part that begins here together with the next; -1 if they are no token
  const heap = []; // rank * 2^31 + place: the smallest is the next to be merged, if it is still true
  const look = (place) => {
    const next = end[place], last = next < n ? end[next] : Infinity;
    rank[place] = last - place > longest ? -1 : ranks.get(word.slice(place, last)) ?? -1;
    if (rank[place] >= 0) push(heap, rank[place] * 2 ** 31 + place);
  };
  for (let place = n - 1; place >= 0; place--) {
    end[place] = place + 1;
    previous[place] = place - 1;
    look(place);
  }
  while (heap.length) {
    const key = pop(heap), place = key % 2 ** 31;
    if (rank[place] !== Math.floor(key / 2 ** 31)) continue; // one of the two has become another part since
    const next = end[place];
    rank[next] = -1; // no part begins there any more
    end[place] = end[next];
    if (end[place] < n) previous[end[place]] = place;
    look(place);
    if (place > 0) look(previous[place]);
  }
  const ids = [];
  for (let place = 0; place < n; place = end[place]) {
    const id = ranks.get(word.slice(place, end[place]));
    if (id === undefined) throw new UserError("This checkpoint's tokenizer lacks some of the 256 bytes.");
    ids.push(id);
  }
  return ids;
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

/** UserError for a run of blanks that tokenizer.py cuts, which gives other ids: its regex engine cannot take a million;
 *  and in a text with half of a surrogate pair, which it cannot take either, 50,000 are cut along the way. */
function checkBlanks(text, limit) {
  for (const [blanks] of text.length < limit ? [] : text.matchAll(/[\p{White_Space}\x1c-\x1f]{1000,}/gu)) {
    if (blanks.length >= limit) throw new UserError(`The text has ${blanks.length} blanks in a row: leave some out.`);
  }
}

const LIKE = [ // what may stand for another character of its kind
  [/\p{Script=Han}/u, "\u4e00"], [/\p{Lo}/u, "\u05d0"], [/\p{Ll}/u, "\u0149"], [/\p{M}/u, "\u05bf"],
  [/\p{S}/u, "\u2212"], [/\p{Co}/u, "\ue000"], [/\p{Cn}/u, "\ufdd0"],
];

/** A text with the same words, for the regex. WebKitGTK 2.50 reads one of U+F800 to U+FBFF (forms of Arabic and
 *  Chinese letters) before one from U+FC00 on (a wide comma) as a surrogate pair, which is another character. */
function withoutFalsePairs(text) {
  return text.replace(/[\uf800-\ufbff](?=[\ufc00-\uffff])/g, (character) =>
    LIKE.find(([kind]) => kind.test(character))[1]);
}

// ---- the regex that cuts a text into words --------------------------------------------------------------------------

const SETS = { // what Rust means by them, written so that it fits inside a class, too
  s: "\\p{White_Space}", // JavaScript's own has U+FEFF, which is no blank in Unicode, and lacks U+0085, which is one
  d: "\\p{Nd}", // the digits of all scripts
  w: "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}",
};
const CONTROLS = { n: "\n", r: "\r", t: "\t", f: "\f", v: "\v", a: "\x07" };

/** The RegExp that matches what a regex matches in Rust's fancy-regex. It knows what tokenizers use; anything else is a
 *  UserError, as a regex that is almost the same would give other tokens than the model was trained on.
 *
 *  What differs: JavaScript has no possessive quantifiers; (?i:...) is too new for some browsers; \s, \d, \w and . mean
 *  other characters; and with the u flag most escapes of signs are errors.
 */
export function wordRegex(pattern) {
  let i = 0;

  const unknown = (what) => new UserError(
    `This checkpoint's tokenizer has ${what} in its regex, which the page cannot run: use sample.py.`);

  /** Goes past what a sticky RegExp matches here; null if it matches nothing. */
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
    // X++ never gives back what it took, which is all X there are: where it stops there is none, or it has enough. (The
    // shorter ways, to look for a group and then refer to it, or X{2}|X, WebKitGTK 2.50 does not always get right.)
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
      const kind = opening[1] ?? "?:"; // what a plain group captures is of no use here
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
      } else if (!take(/-(?![-\]])/y)) { // a - at the end is itself
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

  /** The next character, or the set that an escape stands for, as it is written in a class. */
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

  /** What (?i:...) takes for the same letter, in Unicode's simple case folding. */
  function sameLetters(character, anyCase) {
    if (!anyCase || /[\p{P}\p{Z}\p{Nd}]/u.test(character)) return [character]; // which have no case
    if (character > "\x7f") throw unknown(`${character} in (?i:...)`);
    const strange = { s: ["\u017f"], k: ["\u212a"] }; // the long s, the sign of kelvin: of ASCII's letters no others
    const lower = character.toLowerCase();
    return [...new Set([lower, lower.toUpperCase(), ...strange[lower] ?? []])];
  }

  function lettersBetween(first, last) {
    if (last > "\x7f") throw unknown(`a range up to ${last} in (?i:...)`);
    const letters = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"];
    return letters.filter((letter) => first <= letter && letter <= last);
  }

  /** A character as a RegExp has it, inside a class or not. */
  function literal(character) {
    return /^[\dA-Za-z]$/.test(character) ? character : `\\u{${character.codePointAt(0).toString(16)}}`;
  }

  const source = alternatives(false);
  if (i < pattern.length) throw unknown("a ) without its (");
  let regex;
  try {
    regex = new RegExp(source, "gu");
  } catch (error) { // a quantifier of what has no width, a property that this browser does not know
    throw unknown(`what this browser refuses (${error.message})`);
  }
  if (regex.test("")) throw unknown("a way to match nothing"); // which tiktoken cannot run, either
  return regex;
}
