// One position through the blocks of a model on an NVIDIA GPU: gpu_decode.py compiles it and says what it knows. All blocks
// are one kernel, in whose steps the thread blocks wait for each other, since a kernel of its own for each of the 20 small
// operations of a block costs more time than the arithmetic.
//
// Shapes: B rows, C = n_embd, H heads, KV key/value heads, D = head_dim, F = ffn_dim, ROOM positions of the cache, P parts
// of its keys. Activations between steps are float32, in device memory: other thread blocks read them by __ldcg, since
// the first-level cache may hold what was there before.

constexpr int WARPS = THREADS / 32, WIDEST = C > F ? (C > H * D ? C : H * D) : (F > H * D ? F : H * D);
constexpr int QKV = (H + 2 * KV) * D, STATE = D + 2;  // STATE: of a part of attention: weighted values, maximum, sum
constexpr float LOWEST = -1e30f;

struct Matrix {
  const void *weight, *scales, *biases, *bias;
};

struct Layer {  // in the order of NAMES in gpu_decode.py
  const T *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;
  Matrix q, k, v, out, gate, up, down;
  T *keys, *values;
};

__device__ float number(float x) { return x; }
__device__ float number(__half x) { return __half2float(x); }
__device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename U>
struct alignas(8 * sizeof(U) > 16 ? 16 : 8 * sizeof(U)) Eight {
  U x[8];
};

// All thread blocks wait until all have come here. The top bit of *arrived flips each time, and its lower bits are 0 again.
__device__ void wait_for_all(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    unsigned before = atomicAdd(arrived, blockIdx.x ? 1 : 0x80000001u - gridDim.x);
    while (((before ^ *(volatile unsigned*)arrived) >> 31) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

__device__ float sum_of_warp(float x) {
  for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

// ---- a matrix times B rows in shared memory -----------------------------------------------------------------------

// Weights k to k + 7 of a row. BITS 16 and 32: of type T; 4 and 8: packed, as mx.quantize does it.
template <int BITS, int GROUP>
__device__ void weights(const Matrix& m, size_t row, int k, int K, float (&w)[8]) {
  if constexpr (BITS > 8) {
    Eight<T> eight = *(const Eight<T>*)((const T*)m.weight + row * K + k);
    for (int i = 0; i < 8; i++) w[i] = number(eight.x[i]);
  } else {
    size_t group = (row * K + k) / GROUP;
    float scale = number(((const T*)m.scales)[group]), bias = number(((const T*)m.biases)[group]);
    uint64_t bits = BITS == 4 ? ((const uint32_t*)m.weight)[(row * K + k) / 8] : ((const uint64_t*)m.weight)[(row * K + k) / 8];
    for (int i = 0; i < 8; i++) w[i] = scale * (float)(bits >> BITS * i & ((1 << BITS) - 1)) + bias;
  }
}

// sums[b] = the product of a row of m (N, K) with row b of x (B, WIDEST), by a warp, whose lanes all get the sums.
template <int BITS, int GROUP>
__device__ void product(const Matrix& m, int row, int K, const T* x, float (&sums)[B]) {
  for (int b = 0; b < B; b++) sums[b] = 0;
#pragma unroll 4
  for (int k = threadIdx.x % 32 * 8; k < K; k += 256) {
    float w[8];
    weights<BITS, GROUP>(m, row, k, K, w);
#pragma unroll
    for (int b = 0; b < B; b++) {
      Eight<T> eight = *(const Eight<T>*)(x + b * WIDEST + k);
      for (int i = 0; i < 8; i++) sums[b] += w[i] * number(eight.x[i]);
    }
  }
#pragma unroll
  for (int b = 0; b < B; b++) sums[b] = sum_of_warp(sums[b]);
  if (m.bias)
    for (int b = 0; b < B; b++) sums[b] += number(((const T*)m.bias)[row]);
}

// The rows of a matrix that this warp computes: f(row) for each. Neighbours are in different thread blocks, since a step may
// have fewer rows than there are warps.
template <typename Function>
__device__ void for_rows(int N, Function f) {
  for (int row = blockIdx.x + gridDim.x * (threadIdx.x / 32); row < N; row += gridDim.x * WARPS) f(row);
}

// Of B equal numbers in all lanes, that of lane b.
__device__ float of_lane(const float (&sums)[B]) {
  float mine = sums[0];
#pragma unroll
  for (int b = 1; b < B; b++)
    if (threadIdx.x % 32 == b) mine = sums[b];
  return mine;
}

// ---- the input of a product, put into shared memory ---------------------------------------------------------------

// y (B, WIDEST) = norm(x), x (B, C): RMSNorm, or LayerNorm. A warp takes a row.
__device__ void put_norm(const float* x, const T* weight, const T* bias, T* y) {
  int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < B; b += WARPS) {
    float mean = 0, squares = 0;
    if (LAYER_NORM) {
      for (int c = lane; c < C; c += 32) mean += __ldcg(x + b * C + c);
      mean = sum_of_warp(mean) / C;
    }
    for (int c = lane; c < C; c += 32) {
      float centered = __ldcg(x + b * C + c) - mean;
      squares += centered * centered;
    }
    float scale = rsqrtf(sum_of_warp(squares) / C + NORM_EPS);
    for (int c = lane; c < C; c += 32) {
      float normal = (__ldcg(x + b * C + c) - mean) * scale * number(weight[c]);
      y[b * WIDEST + c] = T(bias ? normal + number(bias[c]) : normal);
    }
  }
  __syncthreads();
}

// y (B, WIDEST) = x (B, n)
__device__ void put(const float* x, int n, T* y) {
  for (int i = threadIdx.x; i < B * n; i += THREADS) y[i / n * WIDEST + i % n] = T(__ldcg(x + i));
  __syncthreads();
}

// y (B, WIDEST) = the outputs of the heads (B, H D), from the parts (P, B, H, STATE) of their softmax
__device__ void put_heads(const float* parts, T* y) {
  for (int i = threadIdx.x; i < B * H * D; i += THREADS) {
    const float* part = parts + (size_t)(i / D) * STATE;
    float top = LOWEST, sum = 0, value = 0;
    for (int p = 0; p < P; p++) top = fmaxf(top, __ldcg(part + (size_t)p * B * H * STATE + D));
    for (int p = 0; p < P; p++) {
      const float* state = part + (size_t)p * B * H * STATE;
      float share = __expf(__ldcg(state + D) - top);
      sum += share * __ldcg(state + D + 1);
      value += share * __ldcg(state + i % D);
    }
    y[i / (H * D) * WIDEST + i % (H * D)] = T(value / sum);
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
    float sine, cosine, a = y[c], b = y[c + ROTARY / 2];
    sincosf(position / inverse[c], &sine, &cosine);
    y[c] = a * cosine - b * sine;
    y[c + ROTARY / 2] = a * sine + b * cosine;
  }
  __syncwarp();
}

__device__ float bounded(float score) { return SOFTCAP ? SOFTCAP * tanhf(score / SOFTCAP) : score; }

// Attention of head h of row b over part p of the keys, by a thread block, from qkv (B, QKV). Part 0 includes the token's own
// key. The token's row of the cache is written too; no other thread block reads it in this step.
__device__ void attend(const Layer& layer, const float* qkv, const float* inverse, int position, int b, int h, int p, float* parts) {
  constexpr int OWN = D / 32;  // columns of a lane
  __shared__ float query[D], key[D], states[WARPS][STATE];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv = h / (H / KV);
  const float *q = qkv + b * QKV + h * D, *k = qkv + b * QKV + (H + kv) * D, *v = k + KV * D;
  if (warp == 0) put_turned(q, layer.q_norm, inverse, position, query);
  if (warp == 1) put_turned(k, layer.k_norm, inverse, position, key);
  __syncthreads();
  T* keys = layer.keys + (size_t)(b * KV + kv) * ROOM * D;
  T* values = layer.values + (size_t)(b * KV + kv) * ROOM * D;
  if (h % (H / KV) == 0 && p == 0)
    for (int c = threadIdx.x; c < D; c += THREADS) {
      keys[(size_t)position * D + c] = T(key[c]);
      values[(size_t)position * D + c] = T(__ldcg(v + c));
    }
  float top = LOWEST, sum = 0, value[OWN] = {};
  if (p == 0 && warp == 0) {
    float score = 0;
    for (int c = lane; c < D; c += 32) score += query[c] * number(T(key[c]));
    top = bounded(sum_of_warp(score) * SCALE);
    sum = 1;
    for (int i = 0; i < OWN; i++) value[i] = number(T(__ldcg(v + lane * OWN + i)));
  }
  for (int first = (p * WARPS + warp) * 32; first < position; first += P * WARPS * 32) {
    float score = LOWEST;
    if (first + lane < position) {
      const T* row = keys + (size_t)(first + lane) * D;
      score = 0;
#pragma unroll
      for (int c = 0; c < D; c += 8) {
        Eight<T> eight = *(const Eight<T>*)(row + c);
        for (int i = 0; i < 8; i++) score += query[c + i] * number(eight.x[i]);
      }
      score = bounded(score * SCALE);
    }
    float highest = score;
    for (int far = 16; far; far /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, far));
    highest = fmaxf(highest, top);
    float shrink = __expf(top - highest), weight = first + lane < position ? __expf(score - highest) : 0;
    top = highest;
    sum = sum * shrink + sum_of_warp(weight);
    for (int i = 0; i < OWN; i++) value[i] *= shrink;
    int count = min(32, position - first);
    const T* row = values + (size_t)first * D + lane * OWN;
#pragma unroll 8
    for (int j = 0; j < count; j++) {
      float w = __shfl_sync(~0u, weight, j);
      for (int i = 0; i < OWN; i++) value[i] += w * number(row[(size_t)j * D + i]);
    }
  }
  for (int i = 0; i < OWN; i++) states[warp][lane * OWN + i] = value[i];
  if (lane == 0) states[warp][D] = top, states[warp][D + 1] = sum;
  __syncthreads();
  float* state = parts + ((size_t)(p * B + b) * H + h) * STATE;
  for (int c = threadIdx.x; c < STATE; c += THREADS) {
    float all = LOWEST, found = 0;
    for (int w = 0; w < WARPS; w++) all = fmaxf(all, states[w][D]);
    for (int w = 0; w < WARPS; w++) found += states[w][c] * __expf(states[w][D] - all);
    state[c] = c == D ? all : found;
  }
  __syncthreads();
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

// x (B, C): the residual stream of one position; y: after all blocks. buffer: room for SCRATCH floats, see gpu_decode.py.
__device__ void decode(const Layer* layers, const T* given, int position, const float* inverse, unsigned* arrived, float* buffer, T* y) {
  extern __shared__ float4 shared[];
  T* row_of_x = (T*)shared;  // (B, WIDEST)
  float *x = buffer, *qkv = x + B * C, *hidden = qkv + B * QKV, *parts = hidden + B * F;
  int lane = threadIdx.x % 32;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < B * C; i += gridDim.x * THREADS) x[i] = number(given[i]);
  wait_for_all(arrived);
  for (int l = 0; l < LAYERS; l++) {
    const Layer& layer = layers[l];
    put_norm(x, layer.attn_norm, layer.attn_norm_bias, row_of_x);
    for_rows(QKV, [&](int row) {
      float sums[B];
      if (row < H * D) product<BITS_q, GROUP_q>(layer.q, row, C, row_of_x, sums);
      else if (row < (H + KV) * D) product<BITS_k, GROUP_k>(layer.k, row - H * D, C, row_of_x, sums);
      else product<BITS_v, GROUP_v>(layer.v, row - (H + KV) * D, C, row_of_x, sums);
      if (lane < B) qkv[lane * QKV + row] = of_lane(sums);
    });
    wait_for_all(arrived);
    for (int unit = blockIdx.x; unit < B * H * P; unit += gridDim.x)
      attend(layer, qkv, TURNS[l] ? inverse : nullptr, position, unit / H % B, unit % H, unit / H / B, parts);
    wait_for_all(arrived);
    put_heads(parts, row_of_x);
    for_rows(C, [&](int row) {
      float sums[B];
      product<BITS_out, GROUP_out>(layer.out, row, H * D, row_of_x, sums);
      if (lane < B) x[lane * C + row] = __ldcg(x + lane * C + row) + RESIDUAL * of_lane(sums);
    });
    wait_for_all(arrived);
    put_norm(x, layer.mlp_norm, layer.mlp_norm_bias, row_of_x);
    for_rows(F, [&](int row) {
      float sums[B], gates[B];
      product<BITS_up, GROUP_up>(layer.up, row, C, row_of_x, sums);
      if constexpr (ACTIVATION > 2) product<BITS_gate, GROUP_gate>(layer.gate, row, C, row_of_x, gates);
      if (lane < B) hidden[lane * F + row] = activation(of_lane(sums), ACTIVATION > 2 ? of_lane(gates) : 0);
    });
    wait_for_all(arrived);
    put(hidden, F, row_of_x);
    for_rows(C, [&](int row) {
      float sums[B];
      product<BITS_down, GROUP_down>(layer.down, row, F, row_of_x, sums);
      float found = lane < B ? __ldcg(x + lane * C + row) + RESIDUAL * of_lane(sums) : 0;
      if (lane < B && l < LAYERS - 1) x[lane * C + row] = found;
      if (lane < B && l == LAYERS - 1) y[lane * C + row] = T(found);
    });
    wait_for_all(arrived);
  }
}
