// A token for each row of logits (B, V), drawn among the k largest: gpu_sample.py compiles it. A thread block does a row.

constexpr int MOST = 4096;  // numbers in the list of candidates

// An integer that is larger for a larger float
__device__ unsigned ordered(float x) {
  unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// The largest integer that count() says to be reached by k numbers or more
template <typename Count>
__device__ unsigned kth(int k, Count count) {
  unsigned found = 0;
  for (int bit = 31; bit >= 0; bit--)
    if (count(found | 1u << bit) >= k) found |= 1u << bit;
  return found;
}

// Word n of the N random words that MLX makes with a key: Threefry-2x32 with 20 rounds (Salmon et al. 2011)
__device__ unsigned random_word(const unsigned* key, unsigned n, unsigned N) {
  unsigned half = (N + 1) / 2, first = n < half ? n : n - half, second = first + half < N ? first + half : 0;
  unsigned keys[] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA}, x = first + keys[0], y = second + keys[1];
  constexpr int TURNS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
#pragma unroll
  for (int i = 0; i < 5; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x += y;
      y = (y << TURNS[i % 2][j] | y >> 32 - TURNS[i % 2][j]) ^ x;
    }
    x += keys[(i + 1) % 3];
    y += keys[(i + 2) % 3] + i + 1;
  }
  return n < half ? x : y;
}

// -log(-log(u)) with a uniform u: the largest logit with this noise is a draw from their softmax (Gumbel 1954)
__device__ float gumbel(unsigned word) { return -logf(-logf(fminf(word / 4294967295.0f, 0.99999994f))); }

// The index, among all threads of the block, whose score is largest, and the smallest such index
__device__ unsigned best_of_block(float score, unsigned index) {
  __shared__ float scores[THREADS];
  __shared__ unsigned indices[THREADS];
  scores[threadIdx.x] = score, indices[threadIdx.x] = index;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    int other = threadIdx.x + half;
    if (threadIdx.x < half && (scores[other] > scores[threadIdx.x] ||
                               scores[other] == scores[threadIdx.x] && indices[other] < indices[threadIdx.x]))
      scores[threadIdx.x] = scores[other], indices[threadIdx.x] = indices[other];
  }
  __syncthreads();
  return indices[0];
}

// k: of the largest logits that are kept; 0: take the largest one. n_keys: of random numbers, one for each row, or 1 for all.
// log_min_p: a logit that lies so far below the largest one is left out.
extern "C" __global__ void __launch_bounds__(THREADS) draw(const T* logits, const unsigned* keys, unsigned* tokens, int k,
                                                           int n_keys, float temperature, float log_min_p) {
  __shared__ unsigned list[MOST], count;
  const T* row = logits + (size_t)blockIdx.x * V;
  bool own_key = n_keys > 1;
  float largest = -INFINITY, best = -INFINITY;
  unsigned own = 0, index = ~0u;
  bool nan = false;
#pragma unroll 8
  for (int i = threadIdx.x; i < V; i += THREADS) {
    float x = number(row[i]);
    own = max(own, ordered(x));
    nan |= x != x;
    if (x > largest) largest = x, index = i;
  }
  if (threadIdx.x == 0) count = 0;
  unsigned top = best_of_block(largest, index);  // also a barrier
  bool any_nan = __syncthreads_count(nan);
  if (any_nan || k == 0 || top == ~0u) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = any_nan ? ~0u : top;  // ~0u: model.py's callers see that it is no token
    return;
  }
  // k threads have a number as large as the kth of their largest ones: a bound by which few candidates are left.
  unsigned bound = kth(k, [&](unsigned u) { return __syncthreads_count(own >= u); });
#pragma unroll 8
  for (int i = threadIdx.x; i < V; i += THREADS)
    if (ordered(number(row[i])) >= bound) {
      unsigned place = atomicAdd(&count, 1);
      if (place < MOST) list[place] = i;
    }
  __syncthreads();
  bool fits = count <= MOST;  // else many are equal, or the large ones lie side by side
  int n = fits ? count : V;
  auto candidate = [&](int i) { return fits ? list[i] : i; };
  unsigned lowest = kth(k, [&](unsigned u) {
    int reach = 0;
    for (int i = threadIdx.x; i - (int)threadIdx.x < n; i += THREADS)
      reach += __syncthreads_count(i < n && ordered(number(row[candidate(i)])) >= u);
    return reach;
  });
  float floor = number(row[top]) / temperature + log_min_p;
  index = ~0u;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    unsigned c = candidate(i), noise = own_key ? c : blockIdx.x * V + c;
    float x = number(row[c]);
    if (ordered(x) < lowest || x / temperature < floor) continue;
    x = x / temperature +
        gumbel(random_word(keys + own_key * 2 * blockIdx.x, noise, own_key ? V : gridDim.x * V));
    if (x > best || x == best && c < index) best = x, index = c;
  }
  index = best_of_block(best, index);
  if (threadIdx.x == 0) tokens[blockIdx.x] = index;
}
