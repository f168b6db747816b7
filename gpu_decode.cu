// The logits of one position on an NVIDIA GPU: gpu_decode.py compiles it and says what it knows. All operations are one
// kernel, in whose steps the thread blocks wait for each other, since a kernel of its own for each of the 20 small
// operations of a block costs more time than the arithmetic.
//
// Shapes: B rows, C = n_embd, H heads, KV key/value heads, D = head_dim, F = ffn_dim, V = vocab_size, P parts of the keys. Activations between steps are in device memory: other thread blocks read them by __ldcg, since
// the first-level cache may hold what was there before.

constexpr int WARPS = THREADS / 32, WIDEST = C > F ? (C > H * D ? C : H * D) : (F > H * D ? F : H * D);
constexpr int STRIDE = WIDEST + (WIDEST % 64 ? 0 : 32);  // of rows in shared memory, which are not to be in the same banks
constexpr int QKV = (H + 2 * KV) * D, STATE = D + 2;  // STATE: of a part of attention: weighted values, maximum, sum
constexpr float LOWEST = -1e30f;

struct Matrix {
  const void *weight, *scales, *biases, *bias;
};

struct Row {  // of a matrix
  const Matrix& matrix;
  int row;
};

struct Layer {  // in the order of of_block() in gpu_decode.py
  const T *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *q_norm_bias, *k_norm, *k_norm_bias;
  Matrix q, k, v, out, gate, up, down;
  T *keys, *values;
};

struct Ends {  // what comes before and after the blocks, in the order of of_ends()
  const T *norm, *norm_bias;
  Matrix positions, embed, head;
};

// Where arrays are: in one buffer, at offsets in bytes; -1: there is none.
__device__ void find(const void** arrays, const void* buffer, const long long* offsets, int n) {
  for (int i = threadIdx.x % 32; i < n; i += 32)
    arrays[i] = offsets[i] < 0 ? nullptr : (const char*)buffer + offsets[i];
}


template <typename U, int N>
struct alignas(N * sizeof(U) % 16 == 0 ? 16 : N * sizeof(U) % 8 == 0 ? 8 : N % 2 == 0 ? 2 * sizeof(U) : sizeof(U)) Several {
  U x[N];
};

#ifndef ON_CPU  // a test of these kernels, tests/cuda_on_cpu.h, has its own definitions
#define PREFETCH(address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address))
#define PAUSE
#endif

// All thread blocks wait until all have come here. The top bit of *arrived flips each time, and its lower bits are 0 again.
__device__ void wait_for_all(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    unsigned before = atomicAdd(arrived, blockIdx.x ? 1 : 0x80000001u - gridDim.x);
    while (((before ^ *(volatile unsigned*)arrived) >> 31) == 0) PAUSE;
    __threadfence();
  }
  __syncthreads();
}

__device__ float sum_of_warp(float x) {
  for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

// ---- matrices times B rows in shared memory -----------------------------------------------------------------------

// Weights k to k + N - 1 of a row. BITS 16 and 32: of type T; 4 and 8: packed, as mx.quantize does it.
template <int BITS, int GROUP, int N>
__device__ void weights(const Matrix& m, size_t row, int k, int K, float (&w)[N]) {
  size_t at = row * K + k;
  if constexpr (BITS > 8) {
    Several<T, N> several = *(const Several<T, N>*)((const T*)m.weight + at);
    for (int i = 0; i < N; i++) w[i] = number(several.x[i]);
  } else {
    float scale = number(((const T*)m.scales)[at / GROUP]), bias = number(((const T*)m.biases)[at / GROUP]);
    Several<uint8_t, N * BITS / 8> bytes = *(const Several<uint8_t, N * BITS / 8>*)((const uint8_t*)m.weight + at * BITS / 8);
    for (int i = 0; i < N; i++) w[i] = scale * (bytes.x[i * BITS / 8] >> i * BITS % 8 & ((1 << BITS) - 1)) + bias;
  }
}

typedef float Sums[WARPS][16][8];  // of warps: 16 rows of x by 8 of a matrix

__device__ float bias_of(const Matrix& m, int row) { return m.bias ? number(((const T*)m.bias)[row]) : 0; }

// For each row of MATRICES matrices (N, K), found(row, b, sums) with their products with row b of x (B, STRIDE), which
// input() puts there: in float32. A warp takes a row, and the lanes take eight neighbouring columns each. Neighbouring rows
// are in different thread blocks, since a step may have fewer rows than there are warps.
template <int BITS, int GROUP, int MATRICES, int N, int K, typename Matrices, typename Input, typename Found>
__device__ void products_of_float32(Matrices matrix, const T* x, Input input, Found found) {
  int lane = threadIdx.x % 32;
  input();
  for (int row = blockIdx.x + gridDim.x * (threadIdx.x / 32); row < N; row += gridDim.x * WARPS) {
    float sums[MATRICES][B] = {}, own[MATRICES];
    for (int i = 0; i < MATRICES; i++) {
      auto [m, r] = matrix(row, i);
#pragma unroll 4
      for (int k = lane * 8; k < K; k += 256) {
        float w[8];
        weights<BITS, GROUP>(m, r, k, K, w);
#pragma unroll
        for (int b = 0; b < B; b++) {
          Several<T, 8> eight = *(const Several<T, 8>*)(x + b * STRIDE + k);
          for (int c = 0; c < 8; c++) sums[i][b] += w[c] * number(eight.x[c]);
        }
      }
#pragma unroll
      for (int b = 0; b < B; b++) {
        sums[i][b] = sum_of_warp(sums[i][b]);
        if (lane == b) own[i] = sums[i][b] + bias_of(m, r);
      }
    }
    if (lane < B) found(row, lane, own);
  }
}

// How many warps share the K columns of a group of 8 rows, so that the warps of all thread blocks have few steps to do.
__device__ constexpr int warps_of_group(int N, int K) {
  int best = 1, least = 1 << 30;
  for (int warps = 1; warps <= WARPS; warps *= 2) {
    int at_once = BLOCKS * (WARPS / warps), rounds = (N / 8 + at_once - 1) / at_once, steps = (K / 32 + warps - 1) / warps;
    if (rounds * (steps + 4) < least) least = rounds * (steps + 4), best = warps;
  }
  return best;
}

// Eight neighbouring weights of a row as they are stored.
template <int BITS>
struct Stored {
  Several<uint8_t, BITS> bytes;
  T scale, bias;
};

template <int BITS, int GROUP>
__device__ void fetch(const Matrix& m, size_t at, Stored<BITS>& to) {
  to.bytes = *(const Several<uint8_t, BITS>*)((const uint8_t*)m.weight + at * BITS / 8);
  if (BITS < 16) to.scale = ((const T*)m.scales)[at / GROUP], to.bias = ((const T*)m.biases)[at / GROUP];
}

template <int BITS>
__device__ uint4 in_16_bits(const Stored<BITS>& stored) {
  if constexpr (BITS == 16) return *(const uint4*)&stored.bytes;
  Several<T, 8> all;
  for (int i = 0; i < 8; i++)
    all.x[i] = T(number(stored.scale) * (stored.bytes.x[i * BITS / 8 % BITS] >> i * BITS % 8 & ((1 << BITS % 16) - 1)) +
                 number(stored.bias));
  return *(const uint4*)&all;
}

__device__ void multiply_add(float (&c)[4], uint2 low, uint2 high, uint2 w) {
  if constexpr (HALF) MULTIPLY("f16");
  else MULTIPLY("bf16");
}

// The same in 16 bits, by tensor cores. A thread block takes WARPS / SPLIT groups of 8 rows at a time, and SPLIT warps share
// the K columns of a group. A warp multiplies 32 columns at a time: 16 rows of x, of which B are there, by 8 of the matrix. Its
// lane holds eight neighbouring columns of row lane / 4 of the matrix, and of rows lane / 4 and lane / 4 + 8 of x. The
// instruction has another order of columns, which is no matter for a sum. The first weights are fetched before input(), in
// which the thread blocks wait for each other.
template <int BITS, int GROUP, int MATRICES, int N, int K, typename Matrices, typename Input, typename Found>
__device__ void products_of_16_bits(Matrices matrix, const T* x, Sums* parts, Input input, Found found) {
  constexpr int SPLIT = warps_of_group(N, K), SLOTS = WARPS / SPLIT, GROUPS = (N + 7) / 8;
  constexpr int STEPS = (K / 32 + SPLIT - 1) / SPLIT, SOME = STEPS < 6 / MATRICES ? STEPS : 6 / MATRICES;
  Stored<BITS> stored[MATRICES][SOME];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = lane / 4, k0 = (warp % SPLIT * 4 + lane % 4) * 8;
  auto fetch_some = [&](int group, int step) {
    if (group < GROUPS)
      for (int i = 0; i < MATRICES; i++) {
        auto [m, r] = matrix(min(group * 8 + n, N - 1), i);
#pragma unroll
        for (int s = 0; s < SOME; s++)
          if (int k = k0 + (step + s) * SPLIT * 32; k < K) fetch<BITS, GROUP>(m, (size_t)r * K + k, stored[i][s]);
      }
  };
  fetch_some(blockIdx.x + gridDim.x * (warp / SPLIT), 0);
  input();
  for (int first = blockIdx.x; first < GROUPS; first += gridDim.x * SLOTS) {
    int group = first + gridDim.x * (warp / SPLIT);
    float sums[MATRICES][4] = {};
    for (int step = 0; step < STEPS; step += SOME) {
      if (step || first >= gridDim.x) fetch_some(group, step);
      for (int i = 0; i < MATRICES; i++) {
        float(&c)[4] = sums[i];
#pragma unroll
        for (int s = 0; s < SOME; s++) {
          int k = k0 + (step + s) * SPLIT * 32;
          if (k - lane % 4 * 8 >= K) continue;
          uint4 w = in_16_bits(stored[i][s]), low = *(const uint4*)(x + min(n, B - 1) * STRIDE + k), high = {};
          if (B > 8) high = *(const uint4*)(x + min(n + 8, B - 1) * STRIDE + k);
          multiply_add(c, {low.x, low.y}, {high.x, high.y}, {w.x, w.y});
          multiply_add(c, {low.z, low.w}, {high.z, high.w}, {w.z, w.w});
        }
      }
    }
    for (int i = 0; i < MATRICES; i++) {
      float2* to = (float2*)&parts[i][warp][n][lane % 4 * 2];
      to[0] = {sums[i][0], sums[i][1]};
      to[32] = {sums[i][2], sums[i][3]};  // eight rows of x further on
    }
    __syncthreads();
    for (int t = threadIdx.x; t < SLOTS * B * 8; t += THREADS) {
      int slot = t / (B * 8), b = t / 8 % B, row = (first + gridDim.x * slot) * 8 + t % 8;
      if (row >= N) continue;
      float all[MATRICES];
      for (int i = 0; i < MATRICES; i++) {
        auto [m, r] = matrix(row, i);
        all[i] = bias_of(m, r);
#pragma unroll
        for (int w = 0; w < SPLIT; w++) all[i] += parts[i][slot * SPLIT + w][b][t % 8];
      }
      found(row, b, all);
    }
    __syncthreads();
  }
}

template <int BITS, int GROUP, int MATRICES, int N, int K, typename Matrices, typename Input, typename Found>
__device__ void products(Matrices matrix, const T* x, Sums* parts, Input input, Found found) {
  if constexpr (sizeof(T) == 4) products_of_float32<BITS, GROUP, MATRICES, N, K>(matrix, x, input, found);
  else products_of_16_bits<BITS, GROUP, MATRICES, N, K>(matrix, x, parts, input, found);
}

// Begins to bring a matrix from memory to the second-level cache, while thread blocks wait.
template <int BITS>
__device__ void prefetch(const Matrix& m, int N, int K) {
  size_t bytes = (size_t)N * K * BITS / 8;
  for (size_t at = (blockIdx.x * THREADS + threadIdx.x) * (size_t)128; at < bytes; at += gridDim.x * THREADS * (size_t)128)
    PREFETCH((const char*)m.weight + at);
}

// The same for what all thread blocks read: norms and biases of a layer.
__device__ void prefetch_vectors(const Layer& layer) {
  auto prefetch = [](int block, const void* vector, int n) {
    if (vector && blockIdx.x == block % BLOCKS && threadIdx.x * 128 < n * sizeof(T))
      PREFETCH((const char*)vector + threadIdx.x * 128);
  };
  prefetch(0, layer.attn_norm, C), prefetch(1, layer.attn_norm_bias, C);
  prefetch(2, layer.mlp_norm, C), prefetch(3, layer.mlp_norm_bias, C);
  prefetch(4, layer.q.bias, H * D), prefetch(5, layer.k.bias, KV * D), prefetch(6, layer.v.bias, KV * D);
  prefetch(7, layer.out.bias, C), prefetch(8, layer.up.bias, F);
  prefetch(9, layer.gate.bias, F), prefetch(10, layer.down.bias, C);
}

// ---- the input of a product, put into shared memory ---------------------------------------------------------------

// y (B, STRIDE) = norm(x), x (B, C): RMSNorm, or LayerNorm. TEAM warps take a row, and a lane 16 bytes at a time. Thread blocks
// begin with different rows, since one place in memory is slow for all at once.
__device__ void put_norm(const T* x, const T* weight, const T* bias, T* y) {
  constexpr int N = 16 / sizeof(T), TEAM = WARPS / B, STEP = 32 * TEAM, EACH = (C / N + STEP - 1) / STEP;
  using Some = Several<T, N>;
  __shared__ float sums[2][WARPS];
  int warp = threadIdx.x / 32, team = warp / TEAM, first = team < B ? warp % TEAM * 32 + threadIdx.x % 32 : C;
  int b = (team + blockIdx.x) % B;
  auto sum_of_team = [&](float own, float* all) {
    own = sum_of_warp(own);
    if (threadIdx.x % 32 == 0) all[warp] = own;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < TEAM; w++) sum += all[min(team * TEAM + w, WARPS - 1)];
    return sum;
  };
  float mean = 0, squares = 0;
  Some numbers[EACH] = {};
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + STEP * i < C / N) {
      float4 bytes = __ldcg((const float4*)(x + b * C) + first + STEP * i);
      numbers[i] = *(Some*)&bytes;
    }
  if (LAYER_NORM) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int c = 0; c < N; c++) mean += number(numbers[i].x[c]);
    mean = sum_of_team(mean, sums[0]) / C;
  }
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + STEP * i < C / N)
#pragma unroll
      for (int c = 0; c < N; c++) squares += (number(numbers[i].x[c]) - mean) * (number(numbers[i].x[c]) - mean);
  float scale = rsqrtf(sum_of_team(squares, sums[1]) / C + NORM_EPS);
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + STEP * i < C / N) {
      Some found, w = ((const Some*)weight)[first + STEP * i], more = {};
      if (bias) more = ((const Some*)bias)[first + STEP * i];
#pragma unroll
      for (int c = 0; c < N; c++)
        found.x[c] = T((number(numbers[i].x[c]) - mean) * scale * number(w.x[c]) + number(more.x[c]));
      ((Some*)(y + b * STRIDE))[first + STEP * i] = found;
    }
  __syncthreads();
}

// y (B, STRIDE) = x (B, N), N a multiple of 8
template <int N>
__device__ void put(const T* x, T* y) {
  constexpr int EACH = 16 / sizeof(T), MANY = B * N / EACH;
#pragma unroll 4
  for (int i = threadIdx.x; i < MANY; i += THREADS) {
    int at = (i + blockIdx.x * (MANY / BLOCKS)) % MANY * EACH;
    *(float4*)(y + at / N * STRIDE + at % N) = __ldcg((const float4*)(x + at));
  }
  __syncthreads();
}

// y (B, STRIDE) = the outputs of the heads (B, H D), from the P parts (P, B, H, STATE) of their softmax, where P > 1
__device__ void put_heads(const float* parts, T* y) {
  for (int i = threadIdx.x; i < B * H * D; i += THREADS) {
    const float* part = parts + (size_t)(i / D) * STATE;
    float top = LOWEST, sum = 0, value = 0;
#pragma unroll
    for (int p = 0; p < P; p++) top = fmaxf(top, __ldcg(part + (size_t)p * B * H * STATE + D));
#pragma unroll
    for (int p = 0; p < P; p++) {
      const float* state = part + (size_t)p * B * H * STATE;
      float share = __expf(__ldcg(state + D) - top);
      sum += share * __ldcg(state + D + 1);
      value += share * __ldcg(state + i % D);
    }
    y[i / (H * D) * STRIDE + i % (H * D)] = T(value / sum);
  }
  __syncthreads();
}

// ---- attention ----------------------------------------------------------------------------------------------------

// A warp puts a head of a query or key (D,) into shared memory, with its norm and rotary positions.
__device__ void put_turned(const float* x, const T* weight, const float* inverse, int position, float* y) {
  int lane = threadIdx.x % 32;
  float squares = 0, scale = 1;
  if (weight) {
    for (int c = lane; c < D; c += 32) squares += __ldcg(x + c) * __ldcg(x + c);
    scale = rsqrtf(sum_of_warp(squares) / D + NORM_EPS);
  }
  for (int c = lane; c < D; c += 32) y[c] = __ldcg(x + c) * scale * (weight ? number(weight[c]) : 1);
  __syncwarp();
  for (int c = lane; inverse && c < ROTARY / 2; c += 32) {
    float sine, cosine, a = y[c], b = y[c + ROTARY / 2], angle = position / inverse[c], turns = rintf(angle * 0.15915494f);
    // less whole turns of 2 pi = 6.2831855 - 1.7484556e-7, since sincosf() of large angles needs many registers
    __sincosf(fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, angle)), &sine, &cosine);
    y[c] = a * cosine - b * sine;
    y[c + ROTARY / 2] = a * sine + b * cosine;
  }
  __syncwarp();
}

__device__ float bounded(float score) { return ATTN_SOFTCAP ? ATTN_SOFTCAP * tanhf(score / ATTN_SOFTCAP) : score; }

// Attention from qkv (B, QKV) over the keys of the cache and the token's own, which comes to `column` of the cache. The text of
// row b begins at the column starts[b]. A unit is a head of a row and one of P parts of the keys. A thread block takes UNITS
// at a time, each by TEAM warps. A warp takes KEYS keys at a time: LANES lanes share a key, eight columns each, and keep the
// softmax of their keys, which are put together at the end. Part 0 includes the token's own key, and writes it to the cache:
// no other thread block reads it there in this step. With P = 1 the outputs go to heads (B, H D), else to parts
// (P, B, H, STATE).
__device__ void attend(const Layer& layer, const float* qkv, const float* inverse, int column, const int& room,
                       const unsigned* starts, float* parts, T* heads) {
  constexpr int LANES = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32, EACH = 12 / sizeof(T), KEYS = EACH * 32 / LANES;
  constexpr int UNITS = B * H * P > 2 * BLOCKS ? 4 : B * H * P > BLOCKS ? 2 : 1, TEAM = WARPS / UNITS;
  __shared__ float queries[UNITS][D], own_keys[UNITS][D], states[WARPS][STATE];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % TEAM, slot = threadIdx.x / 32 / TEAM;
  int own = lane % LANES * 8;  // columns
  bool inside = own < D;
  for (int first_unit = blockIdx.x; first_unit < B * H * P; first_unit += gridDim.x * UNITS) {
    int unit = first_unit + gridDim.x * slot, h = unit % H, b = unit / H % B, p = unit / H / B, kv = h / (H / KV);
    bool works = unit < B * H * P;
    int start = works ? __ldcg(starts + b) : 0, position = column - start;
    const float *q = qkv + b * QKV + h * D, *k = qkv + b * QKV + (H + kv) * D, *v = k + KV * D;
    if (works && warp == 0) put_turned(q, layer.q_norm, inverse, position, queries[slot]);
    if (works && warp == 1) put_turned(k, layer.k_norm, inverse, position, own_keys[slot]);
    __syncthreads();
    T* keys = layer.keys + (size_t)(b * KV + kv) * room * D + own;
    T* values = layer.values + (size_t)(b * KV + kv) * room * D + own;
    auto score_of = [&](const Several<T, 8>& key) {
      float score = 0;
      if (inside)
#pragma unroll
        for (int i = 0; i < 8; i++) score += queries[slot][own + i] * number(key.x[i]);
#pragma unroll
      for (int far = LANES / 2; far; far /= 2) score += __shfl_xor_sync(~0u, score, far);
      return bounded(score * SCALE);
    };
    float top = LOWEST, sum = 0, value[8] = {};
    if (works && p == 0 && warp == 0) {
      Several<T, 8> own_key = {}, own_value = {};
      if (inside)
#pragma unroll
        for (int i = 0; i < 8; i++) own_key.x[i] = T(own_keys[slot][own + i]), own_value.x[i] = T(__ldcg(v + own + i));
      float score = score_of(own_key);
      if (lane < LANES) {
        top = score, sum = 1;
        for (int i = 0; i < 8; i++) value[i] = number(own_value.x[i]);
        if (inside && h % (H / KV) == 0) {
          *(Several<T, 8>*)(keys + (size_t)column * D) = own_key;
          *(Several<T, 8>*)(values + (size_t)column * D) = own_value;
        }
      }
    }
    for (int first = start + (warp * P + p) * KEYS; works && first < column; first += P * TEAM * KEYS) {
      Several<T, 8> some_keys[EACH] = {}, some_values[EACH] = {};
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        size_t at = (size_t)min(first + j * 32 / LANES + lane / LANES, column - 1) * D;
        if (inside) some_keys[j] = *(const Several<T, 8>*)(keys + at), some_values[j] = *(const Several<T, 8>*)(values + at);
      }
      float scores[EACH], highest = top;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        scores[j] = score_of(some_keys[j]);
        if (first + j * 32 / LANES + lane / LANES >= column) scores[j] = LOWEST;
        highest = fmaxf(highest, scores[j]);
      }
      float shrink = __expf(top - highest);
      top = highest;
      sum *= shrink;
      for (int i = 0; i < 8; i++) value[i] *= shrink;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        float weight = scores[j] > LOWEST ? __expf(scores[j] - top) : 0;
        sum += weight;
        for (int i = 0; i < 8; i++) value[i] += weight * number(some_values[j].x[i]);
      }
    }
    float all = top;
    for (int far = LANES; far < 32; far *= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, far));
    float share = __expf(top - all);
    auto sum_of_groups = [&](float x) {
      x *= share;
      for (int far = LANES; far < 32; far *= 2) x += __shfl_xor_sync(~0u, x, far);
      return x;
    };
    sum = sum_of_groups(sum);
#pragma unroll
    for (int i = 0; i < 8; i++) value[i] = sum_of_groups(value[i]);
    float* state = states[slot * TEAM + warp];
    if (lane < LANES && inside)
#pragma unroll
      for (int i = 0; i < 8; i++) state[own + i] = value[i];
    if (lane == 0) state[D] = all, state[D + 1] = sum;
    __syncthreads();
    for (int c = warp * 32 + lane; works && c < (P > 1 ? STATE : D); c += TEAM * 32) {
      float all = LOWEST, found = 0, total = 0;
      for (int w = slot * TEAM; w < slot * TEAM + TEAM; w++) all = fmaxf(all, states[w][D]);
      for (int w = slot * TEAM; w < slot * TEAM + TEAM; w++) {
        float share = __expf(states[w][D] - all);
        found += states[w][c] * share;
        total += states[w][D + 1] * share;
      }
      if (P > 1) parts[(size_t)((p * B + b) * H + h) * STATE + c] = c == D ? all : found;
      else heads[(b * H + h) * D + c] = T(found / total);
    }
    __syncthreads();
  }
}

// ---- all blocks ---------------------------------------------------------------------------------------------------

__device__ float activation(float x, float gate) {
  if (ACTIVATION == 0) return fmaxf(x, 0) * fmaxf(x, 0);
  if (ACTIVATION == 1) return x * (0.5f + 0.5f * erff(x * 0.70710678f));
  if (ACTIVATION == 3) return x * gate / (1 + __expf(-gate));
  float y = ACTIVATION == 2 ? x : gate;
  y = y / (1 + __expf(-1.59576912f * (y + 0.044715f * y * y * y)));
  return ACTIVATION == 2 ? y : x * y;
}

// logits (B, V) of the position whose tokens are ids (B,). state: for wait_for_all; the column of the cache, which grows
// by 1; how many columns it has room for; and the columns at which the rows' texts begin. buffer: the activations between
// steps.
__device__ void decode(const Layer* layers, const Ends& ends, const unsigned* ids, const float* inverse, unsigned* state,
                       float* buffer, T* logits) {
  DYNAMIC_SHARED;
  T* row_of_x = (T*)shared;  // (B, STRIDE)
  float *qkv = buffer, *parts = qkv + B * QKV;
  T *heads = (T*)(parts + (P * B * H * STATE + 3) / 4 * 4), *hidden = heads + B * H * D, *x = hidden + B * F;
  __shared__ Sums sums_of_warps[GATED ? 2 : 1];
  unsigned *arrived = state, *starts = state + 3;
  int column = __ldcg(state + 1);
  __shared__ int room;  // in shared memory, as there are few registers
  if (threadIdx.x == 0) room = __ldcg(state + 2);
  prefetch_vectors(layers[0]);
  for (int i = 8 * (blockIdx.x * THREADS + threadIdx.x); i < B * C; i += 8 * gridDim.x * THREADS) {
    float eight[8], place[8] = {};
    weights<BITS_embed, GROUP_embed>(ends.embed, ids[i / C], i % C, C, eight);
    if (ends.positions.weight)
      weights<BITS_pos_embed, GROUP_pos_embed>(ends.positions, column - __ldcg(starts + i / C), i % C, C, place);
    for (int c = 0; c < 8; c++) x[i + c] = T(eight[c] * EMBED_SCALE + place[c]);
  }
  auto added_to_x = [&](int row, int b, const float* sums) {
    x[b * C + row] = T(number(__ldcg(x + b * C + row)) + RESIDUAL * sums[0]);
  };
  for (int l = 0; l < LAYERS; l++) {
    const Layer& layer = layers[l];
    products<BITS_qkv, GROUP_qkv, 1, QKV, C>(
        [&](int row, int) -> Row {
          if (row < H * D) return {layer.q, row};
          return row < (H + KV) * D ? Row{layer.k, row - H * D} : Row{layer.v, row - (H + KV) * D};
        },
        row_of_x, sums_of_warps,
        [&] {
          wait_for_all(arrived);
          put_norm(x, layer.attn_norm, layer.attn_norm_bias, row_of_x);
        },
        [&](int row, int b, const float* sums) { qkv[b * QKV + row] = sums[0]; });
    prefetch<BITS_out>(layer.out, C, H * D);
    wait_for_all(arrived);
    attend(layer, qkv, TURNS[l] ? inverse : nullptr, column, room, starts, parts, heads);
    prefetch<BITS_up>(layer.up, F, C);
    if (GATED) prefetch<BITS_up>(layer.gate, F, C);
    products<BITS_out, GROUP_out, 1, C, H * D>(
        [&](int row, int) -> Row { return {layer.out, row}; }, row_of_x, sums_of_warps,
        [&] {
          wait_for_all(arrived);
          if (P > 1) put_heads(parts, row_of_x);
          else put<H * D>(heads, row_of_x);
        },
        added_to_x);
    prefetch<BITS_down>(layer.down, C, F);
    if (l < LAYERS - 1) prefetch_vectors(layers[l + 1]);
    products<BITS_up, GROUP_up, GATED ? 2 : 1, F, C>(
        [&](int row, int i) -> Row { return {i ? layer.gate : layer.up, row}; }, row_of_x, sums_of_warps,
        [&] {
          wait_for_all(arrived);
          put_norm(x, layer.mlp_norm, layer.mlp_norm_bias, row_of_x);
        },
        [&](int row, int b, const float* sums) { hidden[b * F + row] = T(activation(sums[0], GATED ? sums[1] : 0)); });
    if (l < LAYERS - 1) {
      prefetch<BITS_qkv>(layers[l + 1].q, H * D, C);
      prefetch<BITS_qkv>(layers[l + 1].k, KV * D, C);
      prefetch<BITS_qkv>(layers[l + 1].v, KV * D, C);
    }
    products<BITS_down, GROUP_down, 1, C, F>(
        [&](int row, int) -> Row { return {layer.down, row}; }, row_of_x, sums_of_warps,
        [&] {
          wait_for_all(arrived);
          put<F>(hidden, row_of_x);
        },
        added_to_x);
  }
  products<BITS_head, GROUP_head, 1, V, C>(
      [&](int row, int) -> Row { return {ends.head, row}; }, row_of_x, sums_of_warps,
      [&] {
        wait_for_all(arrived);
        put_norm(x, ends.norm, ends.norm_bias, row_of_x);
      },
      [&](int row, int b, const float* sums) {
        float logit = sums[0] * LOGIT_SCALE;
        logits[(size_t)b * V + row] = T(SOFTCAP ? SOFTCAP * tanhf(logit / SOFTCAP) : logit);
      });
  if (blockIdx.x == 0 && threadIdx.x == 0) state[1] = column + 1;
}
