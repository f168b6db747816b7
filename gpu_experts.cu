// A mixture of experts on an NVIDIA GPU, forward and backward: gpu_experts.py compiles it and says what it knows.
//
// Shapes: N tokens, each with K of E experts; n = N K rows, the (token, expert) pairs sorted by expert; C = n_embd, HID = the
// hidden width of an expert, F = HID, or 2 HID with gates, where columns 2 i and 2 i + 1 are the gate and the input of neuron i.
// pair (n,) is the pair of each row, of which pair / K is the token; row (n,) the row of each pair; begin (E + 1,) the first
// row of each expert.

constexpr int F = GATED ? 2 * HID : HID, THREADS = 32 * (BM / 64) * (BN / 64);
constexpr int SORTED = 1024, SUMMED = 256;  // threads of a block of sort(), and of sum_of_...()

#ifndef ON_CPU  // a test of these kernels, tests/cuda_on_cpu.h, has its own definitions
using Shared = unsigned;  // an address in shared memory, in bytes
__device__ __forceinline__ Shared address_of(void* x) { return (unsigned)__cvta_generic_to_shared(x); }

// 16 bytes from device memory to shared memory, while the thread goes on; zeros where not `inside`
__device__ __forceinline__ void copy_16(Shared to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int MORE>  // wait for the copies of all stages but the last MORE
__device__ __forceinline__ void wait_for_stages() { asm volatile("cp.async.wait_group %0;" ::"n"(MORE) : "memory"); }

// Four 8 x 8 matrices: lane 8 i + j gives the address of row j of matrix i, and gets two neighbours of a row of each, or of a
// column where TURNED
template <bool TURNED>
__device__ __forceinline__ void load_matrices(Shared row, uint2& first, uint2& second) {
  if constexpr (TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(first.x), "=r"(first.y), "=r"(second.x), "=r"(second.y) : "r"(row) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(first.x), "=r"(first.y), "=r"(second.x), "=r"(second.y) : "r"(row) : "memory");
}
// Bring a number into the cache: the thread does not wait for it
__device__ __forceinline__ void touch(const int* x) {
  int unused;
  asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(unused) : "l"(x));
  (void)unused;
}
#endif

template <typename U, int N>
struct alignas(N * sizeof(U) % 16 == 0 ? 16 : N * sizeof(U)) Several {
  U x[N];
};

template <int N, typename U>
__device__ __forceinline__ void store(U* to, const float* x) {
  Several<U, N> rounded;
#pragma unroll
  for (int i = 0; i < N; i++) rounded.x[i] = U(x[i]);
  *(Several<U, N>*)to = rounded;
}

// ---- tiles of products ------------------------------------------------------------------------------------------------
//
// A thread block computes a tile of BM x BN sums over k, BK = 64 at a time, by tensor cores. STAGES steps of k are on their way
// from device memory at once, also across tiles. In shared memory an operand is stored by its side, (BM or BN, BK), or by k,
// (BK, BM or BN); pieces of 8 numbers are permuted within a row, so that the 8 rows of a matrix lie in different banks. For
// gpu_experts_hopper.cu rows have 64 numbers: those by k are cut.

#ifdef HOPPER
constexpr bool CUT = true;
#else
constexpr bool CUT = false;
#endif
constexpr int STAGE = (BM + BN) * BK * 2, SECOND = BM * BK * 2;  // bytes; where the second operand begins

struct Tile {
  int expert, first, rows, m, n, depth, which;  // first: row of all rows; depth: of the sum
};

// SIDE x BK numbers; at(i, k) is the address of 8 of them, from k on, or from i on where BY_K
template <int SIDE, bool BY_K, typename At>
__device__ __forceinline__ void put(Shared to, int k, int depth, At at) {
  constexpr int PIECES = (BY_K ? SIDE : BK) / 8, STEP = THREADS / PIECES;  // of rows; a multiple of 8
  constexpr int ROW = CUT ? 128 : PIECES * 16;                             // bytes
  int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, cut = CUT ? piece / 8 : 0;
  to += cut * BK * ROW + first * ROW + ((piece - 8 * cut) ^ first % 8) * 16;
#pragma unroll
  for (int j = 0; j < SIDE * BK / 8 / THREADS; j++) {
    int row = first + j * STEP, own = k + (BY_K ? row : 8 * piece);
    copy_16(to + j * STEP * ROW, at(BY_K ? 8 * piece : row, min(own, depth - 1)), own < depth);
  }
}

// Brings the operands of tile after tile, step after step, to the stages
template <bool A_BY_K, bool B_BY_K, typename Problem>
struct Loader {
  const Problem& problem;
  Shared stages;
  Tile tile;
  int number = blockIdx.x, k = 0, to = 0;  // the tile and the step that come next, and their stage
  bool more = problem.find(number, tile);

  __device__ __forceinline__ Loader(const Problem& problem, Shared stages) : problem(problem), stages(stages) {}
  __device__ __forceinline__ void step() {
    while (more && k >= tile.depth) {
      number += gridDim.x, k = 0;
      more = problem.find(number, tile);
    }
    if (more) {
      Shared stage = stages + to * STAGE;
      put<BM, A_BY_K>(stage, k, tile.depth, [&](int i, int k) { return problem.a(tile, i, k); });
      put<BN, B_BY_K>(stage + SECOND, k, tile.depth, [&](int i, int k) { return problem.b(tile, i, k); });
      k += BK;
      problem.ahead(tile, k);
    }
    to = to + 1 == STAGES ? 0 : to + 1;
    end_of_stage();
  }
};

// A warp's share of an operand, 64 x BK, from `side` on, in pieces of 16 x 16: where a lane finds its row of them
template <int SIDE, bool BY_K, bool IS_A>
struct Share {
  static constexpr int PIECES = (BY_K ? SIDE : BK) / 8;
  int offsets[4];  // of pieces along the row; the others are at equal distances

  __device__ __forceinline__ Share(int side) {
    int lane = threadIdx.x % 32, quarter = lane / 8, far = IS_A ? quarter % 2 : quarter / 2;  // in the second 8 of the side
    int later = IS_A ? quarter / 2 : quarter % 2, row = lane % 8 + 8 * (BY_K ? later : far) + (BY_K ? 0 : side);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int piece = BY_K ? side / 8 + 2 * i + far : 2 * i + later;
      offsets[i] = (row * PIECES + (piece ^ lane % 8)) * 16;
    }
  }
  // A: the registers are a0, a1 and a2, a3 of mma.m16n8k16; else b0, b1 of the first 8 columns, and of the others
  __device__ __forceinline__ void get(Shared stage, int i, int part, uint2& first, uint2& second) const {
    load_matrices<BY_K>(stage + offsets[BY_K ? i : part] + (BY_K ? part : i) * 16 * PIECES * 16, first, second);
  }
};

// The sums of a quad of lanes, each with two columns of four 8 x 8 matrices: afterwards each has all columns of its own
__device__ __forceinline__ void turn(const float (*c)[4], int half, float (&x)[8]) {
  int lane = threadIdx.x % 4;
  bool upper = lane & 2, odd = lane & 1;
  float kept[4], got[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {  // i / 2: which of the two matrices that are left, i % 2: the column
    float a = c[i / 2][2 * half + i % 2], b = c[2 + i / 2][2 * half + i % 2];
    kept[i] = upper ? b : a;
    got[i] = __shfl_xor_sync(~0u, upper ? a : b, 2);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float own = odd ? kept[2 + i] : kept[i], far = odd ? got[2 + i] : got[i];  // from this lane, and from lane ^ 2
    float near = __shfl_xor_sync(~0u, odd ? kept[i] : kept[2 + i], 1);
    float last = __shfl_xor_sync(~0u, odd ? got[i] : got[2 + i], 1);
    float a = upper ? far : own, b = upper ? own : far, c = upper ? last : near, d = upper ? near : last;
    x[i] = odd ? c : a, x[2 + i] = odd ? a : c, x[4 + i] = odd ? d : b, x[6 + i] = odd ? b : d;
  }
}

// A warp computes 64 x 64 sums of a tile.
#ifndef HOPPER
template <bool A_BY_K, bool B_BY_K, typename Problem>
__device__ __forceinline__ void products(const Problem& problem) {
  DYNAMIC_SHARED;
  Shared stages = address_of(shared);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side_a = warp / (BN / 64) * 64, side_b = warp % (BN / 64) * 64;
  Share<BM, A_BY_K, true> share_a(side_a);
  Share<BN, B_BY_K, false> share_b(side_b);
  Loader<A_BY_K, B_BY_K, Problem> loader(problem, stages);
  Tile tile;
  int from = 0;  // the stage that is computed
  for (int i = 0; i < STAGES - 2; i++) loader.step();
  wait_for_stages<STAGES - 3>();
  __syncthreads();
  uint2 a[2][4][2], b[2][2];  // for this k and for the next one; for these columns and for the next ones
#pragma unroll
  for (int i = 0; i < 4; i++) share_a.get(stages, i, 0, a[0][i][0], a[0][i][1]);
  share_b.get(stages + SECOND, 0, 0, b[0][0], b[0][1]);
  for (int number = blockIdx.x; problem.find(number, tile); number += gridDim.x) {
    float sums[4][8][4];
#pragma unroll
    for (int i = 0; i < 4 * 8 * 4; i++) sums[i / 32][i / 4 % 8][i % 4] = 0;
    for (int done = 0; done < tile.depth; done += BK) {
      Shared stage = stages + from * STAGE, after = from + 1 == STAGES ? stages : stage + STAGE;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        Shared then = part < 3 ? stage : after;
        if (part == 0) loader.step();  // into a stage that no warp has read since the last barrier
        if (part == 3) {
          wait_for_stages<STAGES - 3>();
          __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          share_b.get((j < 3 ? stage : then) + SECOND, (j + 1) % 4, j < 3 ? part : (part + 1) % 4, b[(j + 1) % 2][0],
                      b[(j + 1) % 2][1]);
          share_a.get(then, j, (part + 1) % 4, a[(part + 1) % 2][j][0], a[(part + 1) % 2][j][1]);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            float (&c)[4] = sums[i / 2][2 * j + i % 2];
            uint2 one = a[part % 2][i / 2][0], two = a[part % 2][i / 2][1], w = b[j % 2][i % 2];
            uint2 low = {one.x, two.x}, high = {one.y, two.y};
            if constexpr (HALF) MULTIPLY("f16");
            else MULTIPLY("bf16");
          }
        }
      }
      from = from + 1 == STAGES ? 0 : from + 1;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int row = side_a + i * 8 + lane / 4;  // of the tile
      float of_row = 0;
      typename Problem::Before before[2];
#pragma unroll
      for (int j = 0; j < 2; j++) before[j] = problem.before(tile, row, tile.n + side_b + 32 * j + lane % 4 * 8);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float x[8];
        turn(sums[i / 2] + 4 * j, i % 2, x);
        int column = tile.n + side_b + 32 * j + lane % 4 * 8;
        if (row < tile.rows && column < problem.columns(tile)) of_row += problem.found(tile, row, column, x, before[j]);
      }
      if constexpr (Problem::SUMS_OF_ROWS) {
        of_row += __shfl_xor_sync(~0u, of_row, 1);
        of_row += __shfl_xor_sync(~0u, of_row, 2);
        if (lane % 4 == 0 && row < tile.rows && tile.n + side_b < problem.columns(tile))
          problem.found_row(tile, row, (tile.n + side_b) / 64, of_row);
      }
    }
  }
}
#endif

// ---- rows times the matrices of their experts -----------------------------------------------------------------------

struct Nothing {};

// x (n, DEPTH), or tokens (N, DEPTH) where GATHER, times weights (E, COLUMNS, DEPTH), or (E, DEPTH, COLUMNS) where BY_K
template <int COLUMNS, int DEPTH, bool GATHER, bool BY_K>
struct Rows {
  static constexpr bool SUMS_OF_ROWS = false;
  const T *x, *weight;
  const int *pair, *begin;

  __device__ __forceinline__ bool find(int number, Tile& tile) const {
    constexpr int ACROSS = (COLUMNS + BN - 1) / BN;
    int block = number / ACROSS;
    for (int e = 0; e < E; e++) {
      int first = begin[e], end = begin[e + 1], blocks = (end - first + BM - 1) / BM;
      if (block < blocks) {
        tile = {e, first + block * BM, min(BM, end - first - block * BM), 0, number % ACROSS * BN, DEPTH, 0};
        return true;
      }
      block -= blocks;
    }
    return false;
  }
  __device__ __forceinline__ const T* a(const Tile& tile, int i, int k) const {
    int row = tile.first + min(i, tile.rows - 1);
    return x + (size_t)(GATHER ? pair[row] / K : row) * DEPTH + k;
  }
  __device__ __forceinline__ const T* b(const Tile& tile, int i, int k) const {
    int column = min(tile.n + i, COLUMNS - (BY_K ? 8 : 1));
    return weight + (BY_K ? ((size_t)tile.expert * DEPTH + k) * COLUMNS + column
                          : ((size_t)tile.expert * COLUMNS + column) * DEPTH + k);
  }
  __device__ __forceinline__ void ahead(const Tile&, int) const {}
  using Before = Nothing;  // what found() needs from device memory, which is asked for early
  __device__ __forceinline__ Before before(const Tile&, int, int) const { return {}; }
  __device__ __forceinline__ int columns(const Tile&) const { return COLUMNS; }
  __device__ __forceinline__ void found_row(const Tile&, int, int, float) const {}
};

// A neuron's value and its slope, of its input or, with gates, its gate
__device__ __forceinline__ float activation(float x, float& slope) {
  if (ACTIVATION == 0) {
    float y = fmaxf(x, 0);
    slope = 2 * y;
    return y * y;
  }
  if (ACTIVATION == 1) {
    float half = 0.5f + 0.5f * erff(x * 0.70710678f);
    slope = half + x * 0.39894228f * __expf(-0.5f * x * x);
    return x * half;
  }
  bool silu = ACTIVATION == 3;
  float z = silu ? x : 1.59576912f * (x + 0.044715f * x * x * x), share = 1 / (1 + __expf(-z));
  slope = share + x * share * (1 - share) * (silu ? 1 : 1.59576912f * (1 + 0.134145f * x * x));
  return x * share;
}

// x (N, C) -> h (n, F) before the activation, and hidden (n, HID) after it
struct Up : Rows<F, C, true, false> {
  T *h, *hidden;
  __device__ __forceinline__ float found(const Tile& tile, int row, int column, const float (&x)[8], Nothing) const {
    size_t at = (size_t)(tile.first + row) * F + column;
    float y[8], slope;
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = number(T(x[i]));
    store<8>(h + at, y);
    if constexpr (GATED) {
      for (int i = 0; i < 4; i++) y[i] = activation(y[2 * i], slope) * y[2 * i + 1];
      store<4>(hidden + at / 2, y);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = activation(y[i], slope);
      store<8>(hidden + at, y);
    }
    return 0;
  }
};

// rows (n, DEPTH) -> y (n, C)
template <int DEPTH, bool BY_K>
struct Plain : Rows<C, DEPTH, false, BY_K> {
  T* y;
  __device__ __forceinline__ float found(const Tile& tile, int row, int column, const float (&x)[8], Nothing) const {
    store<8>(y + (size_t)(tile.first + row) * C + column, x);
    return 0;
  }
};

// The gradient dy (N, C) and h (n, F) -> dh (n, F); hidden (n, HID) times the row's gate; and, of 64 neurons each, the parts
// (HID / 64, n) of the gate's gradient
struct DownBackward : Rows<HID, C, true, true> {
  static constexpr bool SUMS_OF_ROWS = true;
  const T *h, *gates;
  T *dh, *weighed;
  float* parts;
  static constexpr int WIDE = GATED ? 16 : 8;
  struct Before {
    Several<T, 8> h[WIDE / 8];
    float gate;
  };
  __device__ __forceinline__ Before before(const Tile& tile, int row, int column) const {
    Before found = {};
    if (row >= tile.rows || column >= HID) return found;
    const Several<T, 8>* from = (const Several<T, 8>*)(h + (size_t)(tile.first + row) * F + WIDE / 8 * column);
#pragma unroll
    for (int i = 0; i < WIDE / 8; i++) found.h[i] = from[i];
    found.gate = number(gates[this->pair[tile.first + row]]);
    return found;
  }
  __device__ __forceinline__ float found(const Tile& tile, int row, int column, const float (&x)[8],
                                         const Before& before) const {
    int r = tile.first + row;
    float gate = before.gate, sum = 0, d[WIDE], w[8];
    T* to = dh + (size_t)r * F + WIDE / 8 * column;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float slope, value, dx = gate * x[i];
      if constexpr (GATED) {
        float y = number(before.h[i / 4].x[2 * i % 8 + 1]);
        value = activation(number(before.h[i / 4].x[2 * i % 8]), slope);
        d[2 * i] = dx * y * slope, d[2 * i + 1] = dx * value;
        value *= y;
      } else {
        value = activation(number(before.h[0].x[i]), slope);
        d[i] = dx * slope;
      }
      sum += x[i] * value;
      w[i] = gate * value;
    }
#pragma unroll
    for (int i = 0; i < WIDE / 8; i++) store<8>(to + 8 * i, d + 8 * i);
    store<8>(weighed + (size_t)r * HID + column, w);
    return sum;
  }
  __device__ __forceinline__ void found_row(const Tile& tile, int row, int part, float sum) const {
    parts[(size_t)part * begin[E] + tile.first + row] = sum;
  }
};

// ---- gradients of the matrices -----------------------------------------------------------------------------------------

// which = 0: dy (N, C) and weighed (n, HID) -> (E, C, HID); 1: dh (n, F) and x (N, C) -> (E, F, C); sums over an expert's rows
struct Weights {
  static constexpr bool SUMS_OF_ROWS = false;
  const T *x, *dy, *dh, *weighed;
  const int *pair, *begin;
  float *down, *up;

  __device__ __forceinline__ bool find(int number, Tile& tile) const {
    constexpr int DOWN = ((C + BM - 1) / BM) * ((HID + BN - 1) / BN), UP = ((F + BM - 1) / BM) * ((C + BN - 1) / BN);
    if (number >= E * (DOWN + UP)) return false;
    int which = number >= E * DOWN, at = which ? number - E * DOWN : number, tiles = which ? UP : DOWN;
    int across = ((which ? C : HID) + BN - 1) / BN, e = at / tiles, first = begin[e], m = at % tiles / across * BM;
    tile = {e, first, min(BM, (which ? F : C) - m), m, at % across * BN, begin[e + 1] - first, which};
    return true;
  }
  __device__ __forceinline__ const T* a(const Tile& tile, int i, int k) const {
    int row = tile.first + k, column = min(tile.m + i, (tile.which ? F : C) - 8);
    return tile.which ? dh + (size_t)row * F + column : dy + (size_t)(pair[row] / K) * C + column;
  }
  __device__ __forceinline__ const T* b(const Tile& tile, int i, int k) const {
    int row = tile.first + k, column = min(tile.n + i, (tile.which ? C : HID) - 8);
    return tile.which ? x + (size_t)(pair[row] / K) * C + column : weighed + (size_t)row * HID + column;
  }
  __device__ __forceinline__ void ahead(const Tile& tile, int k) const {
    if (threadIdx.x < BK && k + threadIdx.x < tile.depth) touch(pair + tile.first + k + threadIdx.x);
  }
  using Before = Nothing;
  __device__ __forceinline__ Before before(const Tile&, int, int) const { return {}; }
  __device__ __forceinline__ int columns(const Tile& tile) const { return tile.which ? C : HID; }
  __device__ __forceinline__ float found(const Tile& tile, int row, int column, const float (&x)[8], Nothing) const {
    int M = tile.which ? F : C, N = columns(tile);
    float* to = (tile.which ? up : down) + ((size_t)tile.expert * M + tile.m + row) * N + column;
    store<4>(to, x);
    store<4>(to + 4, x + 4);
    return 0;
  }
  __device__ __forceinline__ void found_row(const Tile&, int, int, float) const {}
};

// ---- the router: p = softmax(logits); the K experts of largest p + balance, with gates p, over their sum where K > 1 ----------

// p (E,) of a token; returns the logarithm of the sum of exponentials
__device__ __forceinline__ float softmax(const T* logits, float (&p)[E]) {
  float top = -INFINITY, sum = 0;
#pragma unroll
  for (int e = 0; e < E; e++) p[e] = number(logits[e]), top = fmaxf(top, p[e]);
#pragma unroll
  for (int e = 0; e < E; e++) p[e] = __expf(p[e] - top), sum += p[e];
#pragma unroll
  for (int e = 0; e < E; e++) p[e] /= sum;
  return top + logf(sum);
}

// logits (N, E) -> gates and chosen (N, K), counts (thread blocks, E) of the chosen experts
template <int>
__device__ void route(const T* logits, const float* balance, int n, T* gates, unsigned* chosen, float* counts) {
  __shared__ unsigned all[E];
  int token = blockIdx.x * SUMMED + threadIdx.x;
  if (threadIdx.x < E) all[threadIdx.x] = 0;
  __syncthreads();
  if (token < n) {
    float p[E], found[K], sum = 0;
    unsigned taken = 0;
    softmax(logits + (size_t)token * E, p);
    for (int k = 0; k < K; k++) {
      int best = -1;
      float most = 0, own = 0;
#pragma unroll
      for (int e = 0; e < E; e++)
        if (float score = p[e] + balance[e]; !(taken >> e & 1) && (best < 0 || score > most)) best = e, most = score, own = p[e];
      taken |= 1u << best;
      chosen[(size_t)token * K + k] = best;
      atomicAdd(&all[best], 1);
      found[k] = own, sum += own;
    }
    for (int k = 0; k < K; k++) gates[(size_t)token * K + k] = T(K > 1 ? found[k] / sum : found[k]);
  }
  __syncthreads();
  if (threadIdx.x < E) counts[blockIdx.x * E + threadIdx.x] = all[threadIdx.x];
}

// The gradient of the logits (N, E) by those of the gates; and, with the model's loss, of SWITCH times the sum over experts of
// their share of the pairs times their mean p, and of Z_LOSS times the mean square of the logarithm that softmax() returns
template <int>
__device__ void route_backward(const T* logits, const unsigned* chosen, const float* count, const T* dgates, int n, T* dlogits) {
  int token = blockIdx.x * SUMMED + threadIdx.x;
  if (token >= n) return;
  float p[E], dp[E], top = softmax(logits + (size_t)token * E, p), sum = 0, mean = 0;
  unsigned taken = 0;
  for (int k = 0; k < K; k++) taken |= 1u << chosen[(size_t)token * K + k];
#pragma unroll
  for (int e = 0; e < E; e++) {
    dp[e] = 0;
    if (taken >> e & 1) sum += p[e];
  }
  for (int k = 0; k < K; k++) {
    int own = chosen[(size_t)token * K + k];
#pragma unroll
    for (int e = 0; e < E; e++)
      if (e == own) dp[e] = number(dgates[(size_t)token * K + k]), mean += dp[e] * p[e] / sum;
  }
  float all = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (K > 1 && taken >> e & 1) dp[e] = (dp[e] - mean) / sum;
    dp[e] += SWITCH * count[e] / K / n / n;
    all += dp[e] * p[e];
  }
#pragma unroll
  for (int e = 0; e < E; e++) dlogits[(size_t)token * E + e] = T(p[e] * (dp[e] - all + 2 * Z_LOSS * top / n));
}

// ---- tokens and rows ---------------------------------------------------------------------------------------------------

// chosen (n,), the expert of each pair -> pair, row, begin: pairs of an expert keep their order. A thread block sorts 1,024
// pairs, and counts all others too, since these say where its own go.
template <int>
__device__ void sort(const unsigned* chosen, int n, int* pair, int* row, int* begin) {
  __shared__ int in_all[32][32], before_all[32][32], here[32][32], starts[33];  // by warps and experts
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = blockIdx.x * 1024 + threadIdx.x;
  int all = 0, before = 0, mine = 0, rank = 0, expert = E;
  for (int i = threadIdx.x; i - lane < n; i += 1024) {
    int e = i < n ? (int)chosen[i] : E;
    for (int other = 0; other < E; other++) {
      unsigned same = __ballot_sync(~0u, e == other);
      if (i == own && e == other) rank = __popc(same & ((1u << lane) - 1)), expert = e;
      if (lane == other) {
        all += __popc(same);
        if (i - lane < (int)blockIdx.x * 1024) before += __popc(same);
        if (i - lane == own - lane) mine = __popc(same);
      }
    }
  }
  in_all[warp][lane] = all, before_all[warp][lane] = before, here[warp][lane] = mine;
  __syncthreads();
  if (warp == 0) {  // a lane has an expert
    int total = 0, earlier = 0;
    for (int w = 0; w < 32; w++) total += in_all[w][lane], earlier += before_all[w][lane];
    starts[lane + 1] = total;
    __syncwarp();
    if (lane == 0) {
      starts[0] = 0;
      for (int e = 0; e < 32; e++) starts[e + 1] += starts[e];
    }
    __syncwarp();
    int at = starts[lane] + earlier;
    for (int w = 0; w < 32; w++) before_all[w][lane] = at, at += here[w][lane];
  }
  __syncthreads();
  if (expert < E) {
    int at = before_all[warp][expert] + rank;
    pair[at] = own;
    row[own] = at;
  }
  if (blockIdx.x == 0 && threadIdx.x <= E) begin[threadIdx.x] = starts[threadIdx.x];
}

// y (N, C): the sums of a token's rows of y (n, C), weighed by gates (N, K) where there are any
template <int>
__device__ void sum_of_rows(const T* rows, const int* row, const T* gates, const int* begin, T* y) {
  constexpr int PIECES = C / 8;
  int i = blockIdx.x * SUMMED + threadIdx.x, token = i / PIECES, piece = i % PIECES;
  if (token >= begin[E] / K) return;
  float sum[8] = {};
#pragma unroll
  for (int k = 0; k < K; k++) {
    Several<T, 8> some = ((const Several<T, 8>*)(rows + (size_t)row[token * K + k] * C))[piece];
    float gate = gates ? number(gates[token * K + k]) : 1;
#pragma unroll
    for (int c = 0; c < 8; c++) sum[c] += gate * number(some.x[c]);
  }
  store<8>(y + (size_t)token * C + 8 * piece, sum);
}

// The gradients of the gates, dgates (n,) by pair, from their parts (HID / 64, n) by row
template <int>
__device__ void sum_of_parts(const float* parts, const int* row, const int* begin, T* dgates) {
  int i = blockIdx.x * SUMMED + threadIdx.x, n = begin[E];
  if (i >= n) return;
  float sum = 0;
  for (int p = 0; p < HID / 64; p++) sum += parts[(size_t)p * n + row[i]];
  dgates[i] = T(sum);
}
