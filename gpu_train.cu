// Kernels for training on an NVIDIA GPU. gpu_train.py compiles each one by itself, with the sizes of a model as constants,
// and says what they are for.
//
// Shapes: N rows (the tokens of a batch), C = n_embd, H heads, KV key/value heads, D = head_dim, F = ffn_dim, V =
// vocab_size. T is the type of the activations; sums are float32. A lane of a warp holds 8 neighbouring columns at a time.
// Sums over rows are made in two steps, so that they are the same in every run: each thread block writes those of its own
// rows, and column_sums adds them up.

template <typename U> struct alignas(16) Eight { U x[8]; };

template <typename U> __device__ Eight<U> eight(const U* from) { return *(const Eight<U>*)from; }
template <typename U> __device__ void numbers(float (&y)[8], const Eight<U>& x) {
  for (int i = 0; i < 8; i++) y[i] = number(x.x[i]);
}
__device__ void store(T* to, const float (&x)[8]) {
  Eight<T> y;
  for (int i = 0; i < 8; i++) y.x[i] = T(x[i]);
  *(Eight<T>*)to = y;
}

constexpr int WARPS = THREADS / 32;

// ---- norms: y = (x - mean) / sqrt(variance + EPS) * weight + bias; of RMSNorm the mean is 0, and there is no bias -----

#ifdef NORM
constexpr int ROWS = WARPS / WARPS_A_ROW;  // rows at a time

__device__ int column(int chunk) {
  return ((chunk * WARPS_A_ROW + threadIdx.x / 32 % WARPS_A_ROW) * 32 + threadIdx.x % 32) * 8;
}

// Each x[i] becomes its sum over the threads of the row. All threads of the block come here together.
template <int N> __device__ void sum_over_row(float (&x)[N]) {
  for (int far = 16; far; far /= 2)
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(~0u, x[i], far);
  if (WARPS_A_ROW > 1) {
    __shared__ float of_warp[WARPS][N];
    int warp = threadIdx.x / 32, first = warp / WARPS_A_ROW * WARPS_A_ROW;
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < N; i++) of_warp[warp][i] = x[i];
    __syncthreads();
    for (int i = 0; i < N; i++) {
      x[i] = 0;
      for (int w = 0; w < WARPS_A_ROW; w++) x[i] += of_warp[first + w][i];
    }
    __syncthreads();
  }
}

// y = norm(x), (N, C); with ADD of the sum x + added, which it writes too.
template <bool ADD>
__device__ void norm_forward(const T* __restrict__ x, const T* __restrict__ added, const float* __restrict__ weight,
                             const float* __restrict__ bias, T* __restrict__ sum, T* __restrict__ y, int rows) {
  int row = blockIdx.x * ROWS + threadIdx.x / 32 / WARPS_A_ROW;
  size_t at = (size_t)row * C;
  float a[CHUNKS][8], total[1] = {}, squares[1] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int col = column(c);
    bool here = row < rows && col < C;
    if (here) numbers(a[c], eight(x + at + col));
    if (here && ADD) {
      float b[8];
      numbers(b, eight(added + at + col));
      Eight<T> rounded;
      for (int i = 0; i < 8; i++) rounded.x[i] = T(a[c][i] + b[i]);
      *(Eight<T>*)(sum + at + col) = rounded;
      numbers(a[c], rounded);
    }
    for (int i = 0; i < 8; i++) total[0] += a[c][i] = here ? a[c][i] : 0;
  }
  if (LAYER) sum_over_row(total);
  float mean = LAYER ? total[0] / C : 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (column(c) < C)
      for (int i = 0; i < 8; i++) squares[0] += (a[c][i] - mean) * (a[c][i] - mean);
  sum_over_row(squares);
  float scale = rsqrtf(squares[0] / C + EPS);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int col = column(c);
    if (row < rows && col < C) {
      for (int i = 0; i < 8; i++) a[c][i] = (a[c][i] - mean) * scale * weight[col + i] + (BIASED ? bias[col + i] : 0);
      store(y + at + col, a[c]);
    }
  }
}

// The sums over the rows of this thread block of what its threads have added up for their columns.
__device__ void add_up(const float (&x)[CHUNKS][8], float* out) {
  __shared__ float all[C];
  for (int turn = 0; turn < ROWS; turn++) {
    if (threadIdx.x / 32 / WARPS_A_ROW == turn)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        if (column(c) < C)
          for (int i = 0; i < 8; i++) all[column(c) + i] = (turn ? all[column(c) + i] : 0) + x[c][i];
    __syncthreads();
  }
  for (int i = threadIdx.x; i < C; i += THREADS) out[i] = all[i];
  __syncthreads();
}

// dx, the gradient of norm(x) by dy, (N, C). IN_BLOCK: plus `residual`, the gradient that x has from elsewhere; and
// y = norm(x) once more. sums (thread blocks, kinds, C): dy xhat and dy, the gradients of weight and bias; with SUMS
// also those of residual and dx.
template <bool IN_BLOCK, bool SUMS>
__device__ void norm_backward(const T* __restrict__ x, const T* __restrict__ dy, const T* __restrict__ residual,
                              const float* __restrict__ weight, const float* __restrict__ bias, T* __restrict__ dx,
                              T* __restrict__ y, float* __restrict__ sums, int rows) {
  constexpr int KINDS = 1 + BIASED + 2 * SUMS;
  float dweight[CHUNKS][8] = {}, dbias[CHUNKS][8] = {}, sum_before[CHUNKS][8] = {}, sum_after[CHUNKS][8] = {};
  float w[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    for (int i = 0; i < 8; i++) w[c][i] = weight[column(c) < C ? column(c) + i : 0];
  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
    int row = first + threadIdx.x / 32 / WARPS_A_ROW;
    size_t at = (size_t)row * C;
    float a[CHUNKS][8], g[CHUNKS][8], totals[2] = {}, products[2] = {};
    Eight<T> rest[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int col = column(c);
      bool here = row < rows && col < C;
      if (here) {
        numbers(a[c], eight(x + at + col));
        numbers(g[c], eight(dy + at + col));
        if (IN_BLOCK) rest[c] = eight(residual + at + col);
      }
      for (int i = 0; i < 8; i++) {
        if (!here) a[c][i] = g[c][i] = 0;
        totals[0] += a[c][i];
        if (LAYER) totals[1] += g[c][i] * w[c][i];
      }
    }
    if (LAYER) sum_over_row(totals);
    float mean = LAYER ? totals[0] / C : 0, mean_g = LAYER ? totals[1] / C : 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (column(c) < C)
        for (int i = 0; i < 8; i++) {
          float centred = a[c][i] - mean;
          products[0] += centred * centred;
          products[1] += centred * g[c][i] * w[c][i];
        }
    sum_over_row(products);
    float scale = rsqrtf(products[0] / C + EPS), mean_gx = products[1] * scale / C;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int col = column(c);
      if (row >= rows || col >= C) continue;
      float other[8];
      for (int i = 0; i < 8; i++) {
        a[c][i] = (a[c][i] - mean) * scale;
        dweight[c][i] += g[c][i] * a[c][i];
        if (BIASED) dbias[c][i] += g[c][i];
        if (IN_BLOCK) other[i] = a[c][i] * w[c][i] + (BIASED ? bias[col + i] : 0);
      }
      if (IN_BLOCK) store(y + at + col, other), numbers(other, rest[c]);
      for (int i = 0; i < 8; i++) {
        a[c][i] = scale * (g[c][i] * w[c][i] - mean_g - a[c][i] * mean_gx) + (IN_BLOCK ? other[i] : 0);
        if (SUMS) sum_before[c][i] += other[i], sum_after[c][i] += a[c][i];
      }
      store(dx + at + col, a[c]);
    }
  }
  sums += (size_t)blockIdx.x * KINDS * C;
  add_up(dweight, sums);
  if (BIASED) add_up(dbias, sums + C);
  if (SUMS) add_up(sum_before, sums + (1 + BIASED) * C), add_up(sum_after, sums + (2 + BIASED) * C);
}
#endif

#ifdef NORM_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS) norm_forward(const T* x, const float* weight, const float* bias, T* y, int rows) {
  norm_forward<false>(x, nullptr, weight, bias, nullptr, y, rows);
}
#endif
#ifdef ADD_NORM_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS) add_norm_forward(const T* x, const T* added, const float* weight, const float* bias, T* sum, T* y, int rows) {
  norm_forward<true>(x, added, weight, bias, sum, y, rows);
}
#endif
#ifdef NORM_BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward(const T* x, const T* dy, const float* weight, const float* bias, T* dx, float* sums, int rows) {
  norm_backward<false, false>(x, dy, nullptr, weight, bias, dx, nullptr, sums, rows);
}
#endif
#ifdef NORM_BACKWARD_IN_BLOCK
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_in_block(const T* x, const T* dy, const T* residual, const float* weight, const float* bias, T* dx, T* y, float* sums, int rows) {
  norm_backward<true, SUMS>(x, dy, residual, weight, bias, dx, y, sums, rows);
}
#endif

// ---- queries and keys: QK-norm and rotary positions of the packed products qkv (N, (H + 2 KV) D) -----------------------

#ifdef QKV
constexpr int LANES = D / 8;  // that hold a head
constexpr int QUERIES = H * D, KEYS = QUERIES + KV * D, WIDTH = KEYS + KV * D;

// The angles of this lane's numbers: y = x cosine + other sine, where `other` is the number half a head away.
__device__ void turns(float (&cosine)[8], float (&sine)[8], const float* inverse, float position) {
  int first = threadIdx.x % LANES * 8;
  for (int i = 0; i < 8; i++) {
    sincosf(position * (1 / inverse[(first + i) % (D / 2)]), &sine[i], &cosine[i]);
    if (first < D / 2) sine[i] = -sine[i];
  }
}

__device__ float sum_over_head(float x) {
  for (int far = 1; far < LANES; far *= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

__device__ float position_of(int token, const int* positions, int length, int offset) {
  return length ? offset + token % length : positions[token];
}
#endif

#ifdef QKV_FORWARD
// length: tokens of a row, whose positions are offset, offset + 1, ...; 0: `positions` (N,) has them
extern "C" __global__ void __launch_bounds__(THREADS) qkv_forward(const T* qkv, const float* q_weight, const float* k_weight, const float* inverse, const int* positions, T* q, T* k, int rows, int length, int offset) {
  int token = blockIdx.x * WARPS + threadIdx.x / 32, first = threadIdx.x % LANES * 8;
  if (token >= rows) return;
  float cosine[8], sine[8];
  if (TURNS) turns(cosine, sine, inverse, position_of(token, positions, length, offset));
#pragma unroll
  for (int c = 0; c < (KEYS + 255) / 256; c++) {
    int col = c * 256 + threadIdx.x % 32 * 8;
    float y[8] = {};
    if (col < KEYS) numbers(y, eight(qkv + (size_t)token * WIDTH + col));
    if (QK_NORM) {
      float squares = 0;
      for (int i = 0; i < 8; i++) squares += y[i] * y[i];
      float scale = rsqrtf(sum_over_head(squares) / D + EPS);
      for (int i = 0; i < 8; i++) y[i] *= scale * (col < QUERIES ? q_weight : k_weight)[first + i];
    }
    if (TURNS)
      for (int i = 0; i < 8; i++) {
        float other = __shfl_xor_sync(~0u, y[i], LANES / 2);
        y[i] = y[i] * cosine[i] + other * sine[i];
      }
    if (col < QUERIES) store(q + (size_t)token * QUERIES + col, y);
    else if (col < KEYS) store(k + (size_t)token * (KEYS - QUERIES) + col - QUERIES, y);
  }
}
#endif

#ifdef QKV_BACKWARD
// The gradient of qkv by those of the queries, keys and values. sums (thread blocks, ...): with BIASED that of the bias
// (WIDTH); with QK_NORM those of both weights (2, D).
extern "C" __global__ void __launch_bounds__(THREADS) qkv_backward(const T* __restrict__ qkv, const T* __restrict__ dq, const T* __restrict__ dk, const T* __restrict__ dv, const float* __restrict__ q_weight, const float* __restrict__ k_weight, const float* __restrict__ inverse, const int* __restrict__ positions, T* __restrict__ dqkv, float* __restrict__ sums, int rows, int length, int offset) {
  constexpr int CHUNKS = (WIDTH + 255) / 256;
  int first = threadIdx.x % LANES * 8, warp = threadIdx.x / 32;
  float dbias[CHUNKS][8] = {}, dweight[2][8] = {};
  for (int token = blockIdx.x * WARPS + warp; token < rows; token += gridDim.x * WARPS) {
    float cosine[8], sine[8];
    if (TURNS) turns(cosine, sine, inverse, position_of(token, positions, length, offset));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int col = c * 256 + threadIdx.x % 32 * 8;
      float g[8] = {};
      if (col < QUERIES) numbers(g, eight(dq + (size_t)token * QUERIES + col));
      else if (col < KEYS) numbers(g, eight(dk + (size_t)token * (KEYS - QUERIES) + col - QUERIES));
      else if (col < WIDTH) numbers(g, eight(dv + (size_t)token * (WIDTH - KEYS) + col - KEYS));
      if (TURNS)
        for (int i = 0; i < 8; i++) {
          float other = __shfl_xor_sync(~0u, g[i], LANES / 2);
          if (col < KEYS) g[i] = g[i] * cosine[i] - other * sine[i];
        }
      if (QK_NORM) {
        float x[8] = {}, squares = 0, product = 0;
        const float* weight = col < QUERIES ? q_weight : k_weight;
        if (col < KEYS) numbers(x, eight(qkv + (size_t)token * WIDTH + col));
        for (int i = 0; i < 8; i++) squares += x[i] * x[i], product += x[i] * g[i] * weight[first + i];
        squares = sum_over_head(squares), product = sum_over_head(product);
        float scale = rsqrtf(squares / D + EPS), mean = product * scale * scale / D;
        if (col < KEYS)
          for (int i = 0; i < 8; i++) {
            float step = g[i] * x[i] * scale;
            if (col < QUERIES) dweight[0][i] += step;
            else dweight[1][i] += step;
            g[i] = scale * (g[i] * weight[first + i] - x[i] * mean);
          }
      }
      if (col < WIDTH) {
        store(dqkv + (size_t)token * WIDTH + col, g);
        if (BIASED)
          for (int i = 0; i < 8; i++) dbias[c][i] += g[i];
      }
    }
  }
  sums += (size_t)blockIdx.x * ((BIASED ? WIDTH : 0) + (QK_NORM ? 2 * D : 0));
  if (BIASED) {
    __shared__ float all[BIASED ? WIDTH : 1];
    for (int turn = 0; turn < WARPS; turn++) {
      if (warp == turn)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          int col = c * 256 + threadIdx.x % 32 * 8;
          if (col < WIDTH)
            for (int i = 0; i < 8; i++) all[col + i] = (turn ? all[col + i] : 0) + dbias[c][i];
        }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < WIDTH; i += THREADS) sums[i] = all[i];
    sums += WIDTH;
  }
  if (QK_NORM) {
    __shared__ float all[THREADS][8];
    for (int kind = 0; kind < 2; kind++) {
      for (int i = 0; i < 8; i++) all[threadIdx.x][i] = dweight[kind][i];
      __syncthreads();
      for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0;
        for (int t = d / 8; t < THREADS; t += LANES) sum += all[t][d % 8];
        sums[kind * D + d] = sum;
      }
      __syncthreads();
    }
  }
}
#endif

// ---- differential attention: y = norm(first - lambda second) weight (1 - lambda_0), of pairs of heads with W numbers each,
// lambda = exp(q1 k1) - exp(q2 k2) + lambda_0 ------------------------------------------------------------------------------

#ifdef PAIRS
constexpr int LANES = W / 8, AT_ONCE = THREADS / LANES;  // that hold a pair; pairs of a thread block at a time

__device__ float sum_over_pair(float x) {
  for (int far = 1; far < LANES; far *= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

// x = first - lambda second, second, and 1 / sqrt(mean of squares) of the pair: heads (pairs, 2, W)
__device__ float difference(float (&x)[8], float (&second)[8], const T* heads, float lambda, int pair, int pairs) {
  const T* from = heads + (size_t)pair * 2 * W + threadIdx.x % LANES * 8;
  float squares = 0;
  if (pair < pairs) numbers(x, eight(from)), numbers(second, eight(from + W));
  for (int i = 0; i < 8; i++) x[i] -= lambda * second[i], squares += x[i] * x[i];
  return rsqrtf(sum_over_pair(squares) / W + EPS);
}
#endif
#ifdef PAIRS_FORWARD
// lambdas (3,): lambda and both exponentials
extern "C" __global__ void __launch_bounds__(THREADS) pairs_forward(const T* heads, const float* q1, const float* k1, const float* q2, const float* k2, const float* weight, T* y, float* lambdas, int pairs, float lambda_0) {
  __shared__ float powers[2];
  int warp = threadIdx.x / 32;
  if (warp < 2) {
    float sum = 0;
    for (int i = threadIdx.x % 32; i < W / 2; i += 32) sum += warp ? q2[i] * k2[i] : q1[i] * k1[i];
    for (int far = 16; far; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
    powers[warp] = __expf(sum);
  }
  __syncthreads();
  float lambda = powers[0] - powers[1] + lambda_0;
  if (blockIdx.x == 0 && threadIdx.x < 3) lambdas[threadIdx.x] = threadIdx.x ? powers[threadIdx.x - 1] : lambda;
  int pair = blockIdx.x * AT_ONCE + threadIdx.x / LANES, first = threadIdx.x % LANES * 8;
  float x[8] = {}, second[8] = {}, scale = difference(x, second, heads, lambda, pair, pairs) * (1 - lambda_0);
  for (int i = 0; i < 8; i++) x[i] *= scale * weight[first + i];
  if (pair < pairs) store(y + (size_t)pair * W + first, x);
}
#endif
#ifdef PAIRS_BACKWARD
// sums (thread blocks, W + 1): of the gradients of the weight and of lambda
extern "C" __global__ void __launch_bounds__(THREADS) pairs_backward(const T* heads, const T* dy, const float* lambdas, const float* weight, T* dheads, float* sums, int pairs, float lambda_0) {
  __shared__ float all[THREADS][9];
  int first = threadIdx.x % LANES * 8;
  float dweight[8] = {}, dlambda = 0, lambda = lambdas[0];
  for (int base = blockIdx.x * AT_ONCE; base < pairs; base += gridDim.x * AT_ONCE) {
    int pair = base + threadIdx.x / LANES;
    float x[8] = {}, second[8] = {}, g[8] = {}, product = 0;
    float scale = difference(x, second, heads, lambda, pair, pairs);
    if (pair < pairs) numbers(g, eight(dy + (size_t)pair * W + first));
    for (int i = 0; i < 8; i++) g[i] *= 1 - lambda_0;
    for (int i = 0; i < 8; i++) dweight[i] += g[i] * x[i] * scale, g[i] *= weight[first + i], product += g[i] * x[i];
    float mean = sum_over_pair(product) * scale * scale / W;
    for (int i = 0; i < 8; i++) {
      g[i] = scale * (g[i] - x[i] * mean);
      dlambda -= g[i] * second[i];
      second[i] = -lambda * g[i];
    }
    T* to = dheads + (size_t)pair * 2 * W + first;
    if (pair < pairs) store(to, g), store(to + W, second);
  }
  for (int i = 0; i < 8; i++) all[threadIdx.x][i] = dweight[i];
  all[threadIdx.x][8] = dlambda;
  __syncthreads();
  for (int i = threadIdx.x; i <= W; i += THREADS) {
    float sum = 0;
    for (int t = i < W ? i / 8 : 0; t < THREADS; t += i < W ? LANES : 1) sum += all[t][i < W ? i % 8 : 8];
    sums[blockIdx.x * (W + 1) + i] = sum;
  }
}
#endif

// ---- the MLP's activation: pre (N, F), or (N, 2 F) with the gate before the values -> hidden (N, F) --------------------

#ifdef MLP
enum { RELU2, GELU, GELU_TANH, SWIGLU, GEGLU };

// f(x) and its derivative
__device__ void activation(float x, float& f, float& slope) {
  if (ACTIVATION == RELU2) {
    float positive = x > 0 ? x : 0;
    f = positive * positive, slope = 2 * positive;
  } else if (ACTIVATION == GELU) {
    float below = 0.5f + 0.5f * erff(x * 0.70710678f);
    f = x * below, slope = below + x * 0.39894228f * __expf(-0.5f * x * x);
  } else {
    float inner = ACTIVATION == SWIGLU ? x : 1.5957691f * (x + 0.044715f * x * x * x);
    float inner_slope = ACTIVATION == SWIGLU ? 1 : 1.5957691f * (1 + 3 * 0.044715f * x * x);
    float sigmoid = 1 / (1 + __expf(-inner));
    f = x * sigmoid, slope = sigmoid + f * (1 - sigmoid) * inner_slope;
  }
}
constexpr bool GATED = ACTIVATION >= SWIGLU;
constexpr int WIDE = GATED ? 2 * F : F;
#endif

#ifdef MLP_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS) mlp_forward(const T* __restrict__ pre, T* __restrict__ hidden, int rows) {
  size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 8, from = at / F * WIDE + at % F;
  if (at >= (size_t)rows * F) return;
  float x[8], values[8], slope;
  numbers(x, eight(pre + from));
  if (GATED) numbers(values, eight(pre + from + F));
  for (int i = 0; i < 8; i++) {
    activation(x[i], x[i], slope);
    if (GATED) x[i] *= values[i];
  }
  store(hidden + at, x);
}
#endif

#ifdef MLP_BACKWARD
// hidden once more, and the gradient of pre by that of hidden; sums (parts of the rows, WIDE): over rows of dpre. A thread
// block takes 256 columns.
extern "C" __global__ void __launch_bounds__(THREADS) mlp_backward(const T* __restrict__ pre, const T* __restrict__ dhidden, T* __restrict__ hidden, T* __restrict__ dpre, float* __restrict__ sums, int rows) {
  constexpr int ACROSS = (F + 255) / 256;
  int warp = threadIdx.x / 32, part = blockIdx.x / ACROSS, parts = gridDim.x / ACROSS;
  int col = blockIdx.x % ACROSS * 256 + threadIdx.x % 32 * 8;
  float sum[1 + GATED][8] = {};
#pragma unroll 2
  for (int row = part * WARPS + warp; row < (col < F ? rows : 0); row += parts * WARPS) {
    size_t from = (size_t)row * WIDE + col, at = (size_t)row * F + col;
    float x[8], g[8], values[8], dvalues[8];
    numbers(x, eight(pre + from));
    if (GATED) numbers(values, eight(pre + from + F));
    numbers(g, eight(dhidden + at));
    for (int i = 0; i < 8; i++) {
      float f, slope;
      activation(x[i], f, slope);
      x[i] = GATED ? f * values[i] : f;
      if (GATED) dvalues[i] = g[i] * f, sum[GATED][i] += dvalues[i];
      g[i] *= GATED ? slope * values[i] : slope;
      sum[0][i] += g[i];
    }
    store(hidden + at, x);
    store(dpre + from, g);
    if (GATED) store(dpre + from + F, dvalues);
  }
  if (BIASED) {
    __shared__ float all[WARPS][256];
    for (int kind = 0; kind <= GATED; kind++) {
      for (int i = 0; i < 8; i++) all[warp][threadIdx.x % 32 * 8 + i] = sum[kind][i];
      __syncthreads();
      for (int i = threadIdx.x; i < 256; i += THREADS) {
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += all[w][i];
        int to = blockIdx.x % ACROSS * 256 + i;
        if (to < F) sums[(size_t)part * WIDE + kind * F + to] = total;
      }
      __syncthreads();
    }
  }
}
#endif

// ---- cross-entropy ---------------------------------------------------------------------------------------------------

#ifdef CROSS_ENTROPY
// losses (N,): -log softmax(logits)[target], and the gradient of their sum, weighted: weight (softmax - 1 at the target)
extern "C" __global__ void __launch_bounds__(THREADS, 3) cross_entropy(const T* __restrict__ logits, const int* __restrict__ targets, const float* __restrict__ weights, float* __restrict__ losses, T* __restrict__ dlogits) {
  const T* x = logits + (size_t)blockIdx.x * V;
  float top = -1e30f, total = 0;
  for (int col = threadIdx.x * 8; col < V; col += THREADS * 8) {
    float y[8], most = top;
    numbers(y, eight(x + col));
    for (int i = 0; i < 8; i++) most = y[i] > most ? y[i] : most;
    total *= __expf(top - most);
    top = most;
    for (int i = 0; i < 8; i++) total += __expf(y[i] - top);
  }
  __shared__ float tops[WARPS], totals[WARPS];
  for (int far = 16; far; far /= 2) {
    float other = __shfl_xor_sync(~0u, top, far), rest = __shfl_xor_sync(~0u, total, far);
    float most = top > other ? top : other;
    total = total * __expf(top - most) + rest * __expf(other - most);
    top = most;
  }
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, totals[threadIdx.x / 32] = total;
  __syncthreads();
  top = -1e30f, total = 0;
  for (int w = 0; w < WARPS; w++) top = tops[w] > top ? tops[w] : top;
  for (int w = 0; w < WARPS; w++) total += totals[w] * __expf(tops[w] - top);
  float lse = top + logf(total), weight = weights[blockIdx.x];
  int target = targets[blockIdx.x];
  if (threadIdx.x == 0) losses[blockIdx.x] = lse - number(x[target]);
  for (int col = threadIdx.x * 8; col < V; col += THREADS * 8) {
    float y[8];
    numbers(y, eight(x + col));
    for (int i = 0; i < 8; i++) y[i] = weight * (__expf(y[i] - lse) - (col + i == target));
    store(dlogits + (size_t)blockIdx.x * V + col, y);
  }
}
#endif

// ---- sums ------------------------------------------------------------------------------------------------------------

#ifdef COLUMN_SUMS
// x (rows, columns) -> (columns,)
extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const float* x, float* y, int rows, int columns) {
  __shared__ float all[WARPS][32];
  int col = blockIdx.x * 32 + threadIdx.x % 32;
  float sum = 0;
#pragma unroll 16
  for (int row = threadIdx.x / 32; row < rows; row += WARPS) sum += col < columns ? x[(size_t)row * columns + col] : 0;
  all[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32 && col < columns) {
    for (int w = 1; w < WARPS; w++) sum += all[w][threadIdx.x];
    y[col] = sum;
  }
}
#endif

#ifdef ADD_UP
// out (n,): factor times the sums over PARTS arrays.
__device__ void add_up(const T* const (&parts)[PARTS], float factor, float* out, int n) {
  for (int i = (blockIdx.x * THREADS + threadIdx.x) * 8; i < n; i += gridDim.x * THREADS * 8) {
    Eight<float> sums = {};
    for (int p = 0; p < PARTS; p++) {
      Eight<T> x = eight(parts[p] + i);
      for (int j = 0; j < 8; j++) sums.x[j] += number(x.x[j]);
    }
    for (int j = 0; j < 8; j++) sums.x[j] *= factor;
    *(Eight<float>*)(out + i) = sums;
  }
}
#endif

#ifdef TENSORS
// Kernels of many arrays, which gpu_train.py lists in SIZES and ENDS: how many pieces of PIECE numbers an array and those
// before it have. work(t, begin, n): the numbers begin to begin + n - 1 of array t. pick(t) tells where array t is.
template <typename Work> __device__ void for_all_pieces(Work work) {
  for (int piece = blockIdx.x, t = 0; piece < ENDS[COUNT - 1]; piece += gridDim.x) {
    while (piece >= ENDS[t]) t++;
    int begin = (piece - (t ? ENDS[t - 1] : 0)) * PIECE, left = SIZES[t] - begin;
    work(t, begin, left < PIECE ? left : PIECE);
  }
}

__device__ float sum_of_block(float x) {
  __shared__ float all[WARPS];
  for (int far = 16; far; far /= 2) x += __shfl_xor_sync(~0u, x, far);
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < WARPS; w++) x += all[w];
  return x;
}

#ifdef MOVE
struct Place {
  const FROM* from;
  TO* to;
};

// Arrays from one place and type to others.
template <typename Pick> __device__ void move(Pick pick) {
  for_all_pieces([&](int t, int begin, int n) {
    const FROM* from = pick(t).from + begin;
    TO* to = pick(t).to + begin;
    int whole = ((size_t)from | (size_t)to) % 16 ? 0 : n / 8 * 8;
    for (int i = threadIdx.x * 8; i < whole; i += THREADS * 8) {
      Eight<FROM> x = eight(from + i);
      Eight<TO> y;
      for (int j = 0; j < 8; j++) y.x[j] = TO(number(x.x[j]));
      *(Eight<TO>*)(to + i) = y;
    }
    for (int i = whole + threadIdx.x; i < n; i += THREADS) to[i] = TO(number(from[i]));
  });
}
#endif

struct Tensor {
  const float *p, *g, *m, *v;         // parameter, gradient, and the means of the gradient and of its square
  float *new_p, *new_m, *new_v;
};

// sums (thread blocks,): of the squares of all gradients.
template <typename Pick> __device__ void squares(Pick pick, float* sums) {
  float sum = 0;
  for_all_pieces([&](int t, int begin, int n) {
    const float* g = pick(t).g + begin;
    int whole = (size_t)g % 16 ? 0 : n / 4 * 4;
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < whole; i += THREADS * 4) {
      float4 x = *(const float4*)(g + i);
      sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    for (int i = whole + threadIdx.x; i < n; i += THREADS) sum += g[i] * g[i];
  });
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

#ifdef ADAM
// Adam (Kingma & Ba 2015) of gradients clipped to a norm of `largest`, after weight decay (Loshchilov & Hutter 2019).
// rates: the factors by which parameters decay, of the mean, of the root; and the squared norm of all gradients.
template <typename Pick> __device__ void adam(Pick pick, const float* rates, float largest) {
  float decay = rates[0], of_mean = rates[1], of_root = rates[2], clip = largest / (sqrtf(rates[3]) + 1e-6f);
  clip = clip < 1 ? clip : 1;
  for_all_pieces([&](int t, int begin, int n) {
    Tensor x = pick(t);
    float keep = DECAYS[t] ? decay : 1;
    auto update = [&](float& p, float g, float& m, float& v) {
      g *= clip;
      m = BETA1 * m + (1 - BETA1) * g;
      v = BETA2 * v + (1 - BETA2) * g * g;
      p = p * keep - of_mean * m / (sqrtf(v) * of_root + ADAM_EPS);
    };
    bool odd = ((size_t)x.p | (size_t)x.g | (size_t)x.m | (size_t)x.v) % 16;
    int end = begin + n, whole = odd ? begin : begin + n / 4 * 4;
#pragma unroll 2
    for (int i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
      float4 p = *(const float4*)(x.p + i), g = *(const float4*)(x.g + i);
      float4 m = *(const float4*)(x.m + i), v = *(const float4*)(x.v + i);
      update(p.x, g.x, m.x, v.x), update(p.y, g.y, m.y, v.y), update(p.z, g.z, m.z, v.z), update(p.w, g.w, m.w, v.w);
      *(float4*)(x.new_p + i) = p, *(float4*)(x.new_m + i) = m, *(float4*)(x.new_v + i) = v;
    }
    for (int i = whole + threadIdx.x; i < end; i += THREADS) {
      float p = x.p[i], m = x.m[i], v = x.v[i];
      update(p, x.g[i], m, v);
      x.new_p[i] = p, x.new_m[i] = m, x.new_v[i] = v;
    }
  });
}
#endif
#endif
