// safetensors files, which Python and the page share: 8 bytes, the length of the header; the header, JSON; the numbers.
//
//   const { meta, tensors } = await readHeader(blob);
//   const embed = toFloat32(await readTensor(blob, tensors.get("embed.weight")), tensors.get("embed.weight").dtype);
//   const file = writeSafetensors({ "embed.weight": { dtype: "F32", shape: [64, 8], data } }, meta);
//
// A blob is a File, or any other object with slice(): only the parts that are asked for are read from the disk.
import { UserError } from "./errors.js";

const BYTES = { // per number
  BOOL: 1, I8: 1, U8: 1, F8_E4M3: 1, F8_E5M2: 1, I16: 2, U16: 2, F16: 2, BF16: 2, I32: 4, U32: 4, F32: 4,
  I64: 8, U64: 8, F64: 8, C64: 8,
};
const LONGEST_HEADER = 100_000_000; // the format's own limit

/** The header of a file: {meta, tensors, size}. meta: the entry of this project's scripts, null if there is none. tensors: a
 *  Map from names to {dtype, shape, start, end}, the bytes of the file. UserError if the file is damaged or cut short. */
export async function readHeader(blob) {
  const name = blob.name ?? "This file";
  const foreign = (why) => new UserError(`${name} is not a safetensors file (${why}): choose a checkpoint.`);
  const damaged = (why) => new UserError(`${name} is damaged or was cut short (${why}): copy it again.`);
  if (blob.size < 8) throw foreign(blob.size ? `it has only ${blob.size} bytes` : "it is empty");
  const length = Number(new DataView(await bytesOf(blob, 0, 8)).getBigUint64(0, true));
  if (length > LONGEST_HEADER) throw foreign("its header would be over 100 MB long");
  if (8 + length > blob.size) {
    throw String.fromCharCode(...new Uint8Array(await bytesOf(blob, 8, 9))) === "{" ? damaged("its header has no end") :
      foreign("its header would be longer than the file");
  }
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(await bytesOf(blob, 8, 8 + length)));
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw foreign("its header is not JSON");
  }
  if (!isObject(header)) throw foreign("its header is not a list of tensors");

  const tensors = new Map(), first = 8 + length;
  for (const [key, entry] of Object.entries(header)) {
    if (key === "__metadata__") continue;
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    if (typeof dtype !== "string" || !Array.isArray(shape) || !shape.every(isCount) || !Array.isArray(offsets) ||
        offsets.length !== 2 || !offsets.every(isCount)) {
      throw damaged(`its header cannot be read at ${key}`);
    }
    if (!Object.hasOwn(BYTES, dtype)) throw new UserError(`${name} has numbers of the unknown type ${dtype} (${key}).`);
    if (offsets[1] - offsets[0] !== shape.reduce((n, size) => n * size, BYTES[dtype])) {
      throw damaged(`${key} does not have as many bytes as its shape needs`);
    }
    tensors.set(key, { dtype, shape, start: first + offsets[0], end: first + offsets[1] });
  }
  // By the format, the tensors follow one another without gaps and fill the file.
  let end = first;
  for (const [key, tensor] of [...tensors].sort(([, a], [, b]) => a.start - b.start || a.end - b.end)) {
    if (tensor.end > blob.size) throw damaged(`${key} ends after the file does`);
    if (tensor.start !== end) throw damaged(`${key} does not begin where another tensor ends`);
    end = tensor.end;
  }
  if (end !== blob.size) throw damaged(`it has ${blob.size - end} bytes too many`);
  return { meta: readMeta(header.__metadata__, damaged), tensors, size: blob.size };
}

/** The bytes of a tensor, an ArrayBuffer. */
export async function readTensor(blob, { start, end }) {
  return bytesOf(blob, start, end);
}

/** The numbers of a tensor of dtype F32, F16 or BF16, without rounding. */
export function toFloat32(buffer, dtype) {
  if (dtype === "F32") return new Float32Array(buffer);
  const halves = new Uint16Array(buffer), floats = new Uint32Array(halves.length); // as bits, so that a NaN stays the NaN that it is
  if (dtype === "BF16") { // the upper half of a float32
    for (let i = 0; i < halves.length; i++) floats[i] = halves[i] << 16;
  } else if (dtype === "F16") { // Float16Array is too new for some browsers
    const all = float16Bits();
    for (let i = 0; i < halves.length; i++) floats[i] = all[halves[i]];
  } else {
    throw new UserError(`Numbers of the type ${dtype} are no weights: they must be F32, F16 or BF16.`);
  }
  return new Float32Array(floats.buffer);
}

/** A file, as a Blob, which load_arrays of model.py reads. arrays: a Map or object from names to {dtype, shape, data: a typed
 *  array}; meta: for the header, anything that JSON can hold. */
export function writeSafetensors(arrays, meta) {
  const entries = [...(arrays instanceof Map ? arrays : Object.entries(arrays))]
    .sort(([, a], [, b]) => BYTES[b.dtype] - BYTES[a.dtype]); // wide numbers first, so that all are aligned
  const header = { __metadata__: { tinygpt: JSON.stringify(meta) } };
  let end = 0;
  for (const [name, { dtype, shape, data }] of entries) {
    if (data.byteLength !== shape.reduce((n, size) => n * size, BYTES[dtype])) {
      throw new Error(`${name} has ${data.byteLength} bytes, not those of ${dtype} [${shape}]`);
    }
    header[name] = { dtype, shape: [...shape], data_offsets: [end, end += data.byteLength] };
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(8 + Math.ceil(json.length / 8) * 8).fill(0x20, 8); // with spaces, so that the data are aligned
  padded.set(json, 8);
  new DataView(padded.buffer).setBigUint64(0, BigInt(padded.length - 8), true);
  return new Blob([padded, ...entries.map(([, { data }]) => data)], { type: "application/octet-stream" });
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;

async function bytesOf(blob, start, end) {
  try {
    return await blob.slice(start, end).arrayBuffer();
  } catch {
    throw new UserError(`${blob.name ?? "The file"} cannot be read any more, as it has changed: choose it again.`);
  }
}

function readMeta(metadata, damaged) {
  const text = metadata?.tinygpt;
  if (typeof text !== "string") return null;
  let meta;
  try {
    meta = JSON.parse(text);
  } catch {
    try { // Python's JSON also has NaN and Infinity
      meta = JSON.parse(text.replace(/"[^"\\]*(?:\\.[^"\\]*)*"|-?\b(?:NaN|Infinity)\b/g, (part) =>
        part[0] === '"' ? part : "null"));
    } catch {
      throw damaged("the entry of this project in its header is not JSON");
    }
  }
  return isObject(meta) ? meta : null;
}

let float16Table;

/** A table of the float32 bits of all 65,536 float16 numbers. */
function float16Bits() {
  if (float16Table) return float16Table;
  float16Table = new Uint32Array(65536);
  for (let half = 0; half < 65536; half++) {
    const sign = (half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent === 31) float16Table[half] = sign | 0x7f800000 | fraction << 13; // infinities, NaNs
    else if (exponent) float16Table[half] = sign | (exponent + 112) << 23 | fraction << 13;
    else float16Table[half] = sign | new Uint32Array(Float32Array.of(fraction * 2 ** -24).buffer)[0]; // subnormal, 0
  }
  return float16Table;
}
