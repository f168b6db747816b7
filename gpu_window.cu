// Attention in a sliding window on an NVIDIA GPU, forward and backward: gpu_window.py compiles it and says what it knows.
//
//   forward    S = SCALE Q K^T for keys j with 0 <= i - j < WINDOW,   P = softmax(S),   Y = P V
//   backward   delta = sum(dY Y),   dS = P (dY V^T - delta),   dQ = SCALE dS K,   dK = SCALE dS^T Q,   dV = P^T dY
//
// As in FlashAttention-2 (Dao 2023) no score leaves the registers: the forward pass keeps the logarithm of each query's
// sum, from which the backward pass computes the weights again. A thread block takes a tile of 64 queries and goes through
// the tiles of keys that their windows reach (forward, dQ), or takes 64 keys and goes through tiles of queries (dK and dV).
// Each of its four warps has 16 of the 64 rows, and leaves out groups of 16 rows of the other side that no window reaches.
// Nothing is added up in an order that changes from run to run.
//
// Shapes: q (B, H, T, D), k and v (B, KV, T, D), of any strides; y (B, T, H, D); logs and deltas (B, H, T), float32.

constexpr int TILE = 64;
constexpr int ROW = D + 8;  // numbers between rows in shared memory: eight neighbouring rows are in different banks
constexpr int STEPS = D / 16;
constexpr float LOG2E = 1.4426950408889634f, UNIT = SCALE * LOG2E;  // powers of 2 are faster than those of e
constexpr float LOWEST = -1e30f;

#ifndef ON_CPU  // a test of these kernels, tests/cuda_on_cpu.h, has its own definitions
#define MULTIPLY(type)                                                                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "       \
      "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(w.x), "r"(w.y))
#define LOAD_MATRICES(transposed)                                                                                        \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];"                         \
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"((unsigned)__cvta_generic_to_shared(from)))
#define COPY_16_BYTES(to, from, there)                                                                                   \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"                                                          \
               ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"((there) ? 16 : 0))
#define WAIT_FOR_COPIES asm volatile("cp.async.wait_all;" ::: "memory")
#define PAIR(type) asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x))
#define DYNAMIC_SHARED extern __shared__ float4 shared[]
__device__ float number(__half x) { return __half2float(x); }
__device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float power_of_2(float x) {
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
}
#endif

// ---- rows of a head, in device memory and in shared memory ---------------------------------------------------------

struct Rows {  // of one head: row i begins at first + i * row, and its numbers are `step` apart
  const T* first;
  long long row, step;
  int length;
  bool in_line;  // whether 16 bytes can be copied at a time
};

template <typename Shape, typename Strides>
__device__ Rows rows_of(const T* x, const Shape& shape, const Strides& strides, int b, int h) {
  const T* first = x + b * strides[0] + h * strides[1];
  bool in_line = strides[3] == 1 && strides[2] % 8 == 0 && (size_t)first % 16 == 0;
  return {first, strides[2], strides[3], (int)shape[2], in_line};
}

// Copy rows `first` to first + 63 to shared memory. Rows behind the last one are 0. Neighbouring threads copy a row together,
// 16 bytes each.
__device__ void stage(T* to, const Rows& x, int first) {
  constexpr int COPIES = D / 8, TOGETHER = COPIES % 16 == 0 ? 16 : COPIES % 8 == 0 ? 8 : COPIES % 4 == 0 ? 4 : 2;
  if (x.in_line) {
    int row = threadIdx.x / TOGETHER, column = threadIdx.x % TOGETHER * 8;
    const T* from = x.first + (first + row) * x.row + column;
    T* at = to + row * ROW + column;
#pragma unroll
    for (int r = 0; r < TILE; r += THREADS / TOGETHER, from += THREADS / TOGETHER * x.row)
#pragma unroll
      for (int c = 0; c < D; c += TOGETHER * 8)
        COPY_16_BYTES(at + r * ROW + c, from + c, first + row + r < x.length);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE * D; i += THREADS) {
      int row = i / D, column = i % D;
      to[row * ROW + column] = first + row < x.length ? x.first[(first + row) * x.row + column * x.step] : T(0.0f);
    }
  }
}

__device__ void arrive() {  // what all threads have staged is there
  WAIT_FOR_COPIES;
  __syncthreads();
}

// ---- products by tensor cores --------------------------------------------------------------------------------------
//
// Of a matrix of 16 rows a lane holds rows lane / 4 and lane / 4 + 8, in sums at [columns / 8][row / 8 * 2 + column % 2] with
// the columns lane % 4 * 2 and the next one of each eight.

template <int N>
using Sums = float[N / 8][4];  // (16, N)

// c (16, 8) += a (16, 16) times b (16, 8)
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  uint2 low = {a[0], a[2]}, high = {a[1], a[3]}, w = {b0, b1};
  if constexpr (HALF) MULTIPLY("f16");
  else MULTIPLY("bf16");
}

__device__ unsigned pair(float x, float y) {  // in 16 bits each
  unsigned both;
  if constexpr (HALF) PAIR("f16");
  else PAIR("bf16");
  return both;
}

// A left factor (16, D) of later products, from shared memory
__device__ void load_left(unsigned (&a)[STEPS][4], const T* x) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    const T* from = x + lane % 16 * ROW + lane / 16 * 8 + k * 16;
    unsigned(&w)[4] = a[k];
    LOAD_MATRICES("");
  }
}

// c (16, 16) = a (16, D) times the transpose of rows x (16, D)
__device__ void rows_times_rows(Sums<16>& c, const unsigned (&a)[STEPS][4], const T* x) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) c[0][i] = c[1][i] = 0;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    const T* from = x + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8 + k * 16;
    unsigned w[4];
    LOAD_MATRICES("");
    multiply_add(c[0], a[k], w[0], w[1]);
    multiply_add(c[1], a[k], w[2], w[3]);
  }
}

// c (16, D) += weights (16, 16) times rows x (16, D)
__device__ void add_weighted(Sums<D>& c, const Sums<16>& weights, const T* x) {
  int lane = threadIdx.x % 32;
  unsigned a[4];
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = pair(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    const T* from = x + lane % 16 * ROW + lane / 16 * 8 + n * 16;
    unsigned w[4];
    LOAD_MATRICES(".trans");
    multiply_add(c[2 * n], a, w[0], w[1]);
    multiply_add(c[2 * n + 1], a, w[2], w[3]);
  }
}

// The sums of a warp, times a factor for each of a lane's two rows, to rows in device memory, of which n are there. room:
// shared memory that nobody else uses.
__device__ void put(T* to, long long row, int n, const Sums<D>& sums, float factor, float factor_8, T* room) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
    unsigned low = pair(sums[i][0] * factor, sums[i][1] * factor);
    unsigned high = pair(sums[i][2] * factor_8, sums[i][3] * factor_8);
    T* at = room + lane / 4 * ROW + i * 8 + lane % 4 * 2;
    memcpy(at, &low, 4);
    memcpy(at + 8 * ROW, &high, 4);
  }
  __syncwarp();
  for (int i = lane; i < 2 * D; i += 32) {
    int r = i / (D / 8), column = i % (D / 8) * 8;
    if (r < n) *(float4*)(to + r * row + column) = *(const float4*)(room + r * ROW + column);
  }
  __syncwarp();
}

// ---- the window ----------------------------------------------------------------------------------------------------

// Whether a window of the 16 queries from i on reaches one of the 16 keys from j on, and whether all reach all of them
__device__ bool reached(int i, int j) { return j <= i + 15 && i - j - 15 < WINDOW; }
__device__ bool all_reached(int i, int j) { return j + 15 <= i && i + 15 - j < WINDOW; }
__device__ bool sees(int i, int j) { return j <= i && i - j < WINDOW; }

__device__ float sum_of_four(float x) {  // lanes, which hold a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ float max_of_four(float x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

struct Place {  // of a thread block, among H heads of n tiles
  int tile, b, h, first;
  __device__ Place(int H, int n) {
    tile = blockIdx.x % n, b = blockIdx.x / n / H, h = blockIdx.x / n % H, first = tile * TILE;
  }
};

struct Tiles {  // four tiles in shared memory: two of each kind, of which one is read and one is filled
  T* all;
  __device__ T* first(int i) { return all + i * TILE * ROW; }
  __device__ T* second(int i) { return all + (2 + i) * TILE * ROW; }
};

template <typename Shape, typename Strides>
__device__ void forward(const T* q, const Shape& q_shape, const Strides& q_strides, const T* k, const Shape& k_shape,
                        const Strides& k_strides, const T* v, const Strides& v_strides, const float* sinks, T* y,
                        float* logs) {
  DYNAMIC_SHARED;
  Tiles tiles = {(T*)shared};
  int H = q_shape[1], length = q_shape[2], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Place at(H, (length + TILE - 1) / TILE);
  int kv = at.h / (H / k_shape[1]), begin = max(0, at.first - WINDOW + 1) / TILE, i = at.first + warp * 16;
  Rows keys = rows_of(k, k_shape, k_strides, at.b, kv), values = rows_of(v, k_shape, v_strides, at.b, kv);
  stage(tiles.first(1), rows_of(q, q_shape, q_strides, at.b, at.h), at.first);
  stage(tiles.first(0), keys, begin * TILE);
  stage(tiles.second(0), values, begin * TILE);
  arrive();
  unsigned query[STEPS][4];
  load_left(query, tiles.first(1) + warp * 16 * ROW);
  __syncthreads();
  Sums<D> out = {};
  float highest[2] = {LOWEST, LOWEST}, sum[2] = {};  // of a lane's two rows
  for (int t = begin; t <= at.tile; t++) {
    int here = (t - begin) % 2;
    if (t < at.tile) {
      stage(tiles.first(!here), keys, (t + 1) * TILE);
      stage(tiles.second(!here), values, (t + 1) * TILE);
    }
    float s[4][2][4], most[2] = {highest[0], highest[1]};
#pragma unroll
    for (int g = 0; g < 4; g++) {
      int j = t * TILE + g * 16;
      if (!reached(i, j)) continue;
      rows_times_rows(s[g], query, tiles.first(here) + g * 16 * ROW);
#pragma unroll
      for (int c = 0; c < 8 && !all_reached(i, j); c++)
        if (!sees(i + lane / 4 + c % 4 / 2 * 8, j + c / 4 * 8 + lane % 4 * 2 + c % 2)) s[g][c / 4][c % 4] = LOWEST;
#pragma unroll
      for (int c = 0; c < 8; c++) most[c % 4 / 2] = max(most[c % 4 / 2], s[g][c / 4][c % 4]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = max_of_four(most[r]);
      float factor = power_of_2((highest[r] - most[r]) * UNIT);
      highest[r] = most[r];
      most[r] = highest[r] == LOWEST ? 0 : highest[r] * UNIT;  // 0 where a row has seen no key yet: its weights are 0
      sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; n++) out[n][2 * r] *= factor, out[n][2 * r + 1] *= factor;
    }
#pragma unroll
    for (int g = 0; g < 4; g++) {
      if (!reached(i, t * TILE + g * 16)) continue;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        float& weight = s[g][c / 4][c % 4];
        weight = power_of_2(weight * UNIT - most[c % 4 / 2]);
        sum[c % 4 / 2] += weight;
      }
      add_weighted(out, s[g], tiles.second(here) + g * 16 * ROW);
    }
    arrive();
  }
  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = sum_of_four(sum[r]), own = highest[r] * UNIT, most = own;
    if (sinks) {
      float sink = sinks[at.h] * LOG2E;
      most = max(most, sink);
      total = total * power_of_2(own - most) + power_of_2(sink - most);
    }
    factors[r] = power_of_2(own - most) / total;
    int row = i + lane / 4 + r * 8;
    if (lane % 4 == 0 && row < length) logs[((long long)at.b * H + at.h) * length + row] = most + log2f(total);
  }
  put(y + (((long long)at.b * length + i) * H + at.h) * D, (long long)H * D, length - i, out, factors[0], factors[1],
      tiles.all + warp * 16 * ROW);
}

// dQ (B, T, H, D), and the deltas
template <typename Shape, typename Strides>
__device__ void backward_queries(const T* q, const Shape& q_shape, const Strides& q_strides, const T* k,
                                 const Shape& k_shape, const Strides& k_strides, const T* v, const Strides& v_strides,
                                 const T* y, const float* logs, const T* change, const Strides& change_strides, T* dq,
                                 float* deltas) {
  DYNAMIC_SHARED;
  __shared__ float own_deltas[TILE];
  Tiles tiles = {(T*)shared};
  int H = q_shape[1], length = q_shape[2], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Place at(H, (length + TILE - 1) / TILE);
  int kv = at.h / (H / k_shape[1]), begin = max(0, at.first - WINDOW + 1) / TILE, i = at.first + warp * 16;
  Rows keys = rows_of(k, k_shape, k_strides, at.b, kv), values = rows_of(v, k_shape, v_strides, at.b, kv);
  long long head = ((long long)at.b * H + at.h) * length;
  stage(tiles.first(1), rows_of(q, q_shape, q_strides, at.b, at.h), at.first);
  stage(tiles.second(1), rows_of(change, q_shape, change_strides, at.b, at.h), at.first);
  stage(tiles.first(0), keys, begin * TILE);
  stage(tiles.second(0), values, begin * TILE);
  arrive();
  unsigned query[STEPS][4], dy[STEPS][4];
  load_left(query, tiles.first(1) + warp * 16 * ROW);
  load_left(dy, tiles.second(1) + warp * 16 * ROW);
  {  // two threads a row
    int row = threadIdx.x / 2, half = threadIdx.x % 2 * (D / 2);
    float delta = 0;
    if (at.first + row < length) {
      const T* own = y + (((long long)at.b * length + at.first + row) * H + at.h) * D + half;
      for (int c = 0; c < D / 2; c += 8) {
        T eight[8];
        float4 words = *(const float4*)(own + c);
        memcpy(eight, &words, 16);
        for (int d = 0; d < 8; d++) delta += number(eight[d]) * number(tiles.second(1)[row * ROW + half + c + d]);
      }
    }
    delta += __shfl_xor_sync(~0u, delta, 1);
    own_deltas[row] = delta;
    if (half == 0 && at.first + row < length) deltas[head + at.first + row] = delta;
  }
  __syncthreads();
  float delta[2], log[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = i + lane / 4 + r * 8;
    delta[r] = own_deltas[row - at.first];
    log[r] = row < length ? logs[head + row] : -LOWEST;
  }
  Sums<D> sums = {};
  for (int t = begin; t <= at.tile; t++) {
    int here = (t - begin) % 2;
    if (t < at.tile) {
      stage(tiles.first(!here), keys, (t + 1) * TILE);
      stage(tiles.second(!here), values, (t + 1) * TILE);
    }
#pragma unroll
    for (int g = 0; g < 4; g++) {
      int j = t * TILE + g * 16;
      if (!reached(i, j)) continue;
      Sums<16> s, ds;
      rows_times_rows(s, query, tiles.first(here) + g * 16 * ROW);
      rows_times_rows(ds, dy, tiles.second(here) + g * 16 * ROW);
#pragma unroll
      for (int c = 0; c < 8 && !all_reached(i, j); c++)
        if (!sees(i + lane / 4 + c % 4 / 2 * 8, j + c / 4 * 8 + lane % 4 * 2 + c % 2)) s[c / 4][c % 4] = LOWEST;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        int r = c % 4 / 2;
        ds[c / 4][c % 4] = power_of_2(s[c / 4][c % 4] * UNIT - log[r]) * (ds[c / 4][c % 4] - delta[r]);
      }
      add_weighted(sums, ds, tiles.first(here) + g * 16 * ROW);
    }
    arrive();
  }
  put(dq + (((long long)at.b * length + i) * H + at.h) * D, (long long)H * D, length - i, sums, SCALE, SCALE,
      tiles.all + warp * 16 * ROW);
}

// dK and dV (B, T, KV, D): a tile of keys, for all query heads that share them. The scores are transposed: a lane's two rows
// are keys, and its columns queries.
template <typename Shape, typename Strides>
__device__ void backward_keys(const T* q, const Shape& q_shape, const Strides& q_strides, const T* k,
                              const Shape& k_shape, const Strides& k_strides, const T* v, const Strides& v_strides,
                              const float* logs, const float* deltas, const T* change, const Strides& change_strides, T* dk,
                              T* dv) {
  DYNAMIC_SHARED;
  __shared__ float own_logs[2][TILE], own_deltas[2][TILE];
  Tiles tiles = {(T*)shared};
  int H = q_shape[1], KV = k_shape[1], length = q_shape[2], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int n = (length + TILE - 1) / TILE, here = 0;
  Place at(KV, n);
  int j = at.first + warp * 16, end = min(n, (at.first + TILE + WINDOW - 2) / TILE + 1);
  int t = at.tile, h = at.h * (H / KV), last_h = h + H / KV - 1;  // of the queries that are staged next
  Rows queries = rows_of(q, q_shape, q_strides, at.b, h), changes = rows_of(change, q_shape, change_strides, at.b, h);

  auto stage_queries = [&](int here) {
    stage(tiles.first(here), queries, t * TILE);
    stage(tiles.second(here), changes, t * TILE);
    int row = t * TILE + threadIdx.x;
    if (threadIdx.x < TILE) {
      long long place = ((long long)at.b * H + h) * length + row;
      own_logs[here][threadIdx.x] = row < length ? logs[place] : -LOWEST;  // so that weights of no query are 0
      own_deltas[here][threadIdx.x] = row < length ? deltas[place] : 0;
    }
  };

  stage(tiles.first(1), rows_of(k, k_shape, k_strides, at.b, at.h), at.first);
  stage(tiles.second(1), rows_of(v, k_shape, v_strides, at.b, at.h), at.first);
  stage_queries(0);
  arrive();
  unsigned key[STEPS][4], value[STEPS][4];
  load_left(key, tiles.first(1) + warp * 16 * ROW);
  load_left(value, tiles.second(1) + warp * 16 * ROW);
  __syncthreads();
  Sums<D> key_sums = {}, value_sums = {};
  while (t < end) {
    int now = t++;
    if (t == end && h < last_h) {  // the next head
      t = at.tile, h++;
      queries = rows_of(q, q_shape, q_strides, at.b, h), changes = rows_of(change, q_shape, change_strides, at.b, h);
    }
    if (t < end) stage_queries(!here);
#pragma unroll
    for (int g = 0; g < 4; g++) {
      int i = now * TILE + g * 16;
      if (!reached(i, j)) continue;
      Sums<16> s, ds;
      rows_times_rows(s, key, tiles.first(here) + g * 16 * ROW);
      rows_times_rows(ds, value, tiles.second(here) + g * 16 * ROW);
#pragma unroll
      for (int c = 0; c < 8 && !all_reached(i, j); c++)
        if (!sees(i + c / 4 * 8 + lane % 4 * 2 + c % 2, j + lane / 4 + c % 4 / 2 * 8)) s[c / 4][c % 4] = LOWEST;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        int column = g * 16 + c / 4 * 8 + lane % 4 * 2 + c % 2;
        s[c / 4][c % 4] = power_of_2(s[c / 4][c % 4] * UNIT - own_logs[here][column]);
        ds[c / 4][c % 4] = s[c / 4][c % 4] * (ds[c / 4][c % 4] - own_deltas[here][column]);
      }
      add_weighted(value_sums, s, tiles.second(here) + g * 16 * ROW);
      add_weighted(key_sums, ds, tiles.first(here) + g * 16 * ROW);
    }
    arrive();
    here = !here;
  }
  long long to = (((long long)at.b * length + j) * KV + at.h) * D, row = (long long)KV * D;
  put(dk + to, row, length - j, key_sums, SCALE, SCALE, tiles.all + warp * 16 * ROW);
  put(dv + to, row, length - j, value_sums, 1, 1, tiles.all + warp * 16 * ROW);
}
