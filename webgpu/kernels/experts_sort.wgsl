// Sorts P pairs of a token and an expert into rows, by chosen (P,), the experts of the pairs. The rows come in blocks of 32, and
// a block has pairs of one expert only, so that experts_matmul.wgsl multiplies it by one matrix. sorted is, one after another:
//
//   (blocks,)     the expert of each block; E: the block is empty
//   (blocks, 32)  the pair of each row; EMPTY: there is none, as at the end of an expert's last block
//   (P,)          the row of each pair
//
// ceil(P / 32) + E blocks suffice for any choice; rows of empty blocks are not written. One workgroup; a thread takes an expert, and reads all pairs.

override SIZE: u32 = 64;  // threads

struct Params { P: u32, E: u32, blocks: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> chosen: array<u32>;
@group(0) @binding(2) var<storage, read_write> sorted: array<u32>;

const ROWS = 32u;
const EMPTY = 0xffffffffu;
var<workgroup> counts: array<u32, 1024>;  // pairs of each expert

@compute @workgroup_size(SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
  for (var e = thread; e < p.E; e += SIZE) {
    var count = 0u;
    for (var pair = 0u; pair < p.P; pair++) { count += u32(chosen[pair] == e); }
    counts[e] = count;
  }
  workgroupBarrier();
  for (var e = thread; e < p.E; e += SIZE) {
    var first = 0u;       // block of this expert
    for (var before = 0u; before < e; before++) { first += (counts[before] + ROWS - 1) / ROWS; }
    let end = first + (counts[e] + ROWS - 1) / ROWS;
    for (var block = first; block < end; block++) { sorted[block] = e; }
    var row = first * ROWS;
    for (var pair = 0u; pair < p.P; pair++) {
      if (chosen[pair] == e) {
        sorted[p.blocks + row] = pair;
        sorted[p.blocks + p.blocks * ROWS + pair] = row;
        row++;
      }
    }
    for (; row < end * ROWS; row++) { sorted[p.blocks + row] = EMPTY; }
    if (e + 1 == p.E) {
      for (var block = end; block < p.blocks; block++) { sorted[block] = p.E; }
    }
  }
}
