// What gpu_*.cu need of CUDA, on a processor: for tests. A thread block is a thread of the system, and its threads are
// coroutines, which take turns where they wait for each other.

#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define ON_CPU
#define alignas(bytes)  // MLX has arrays at any multiple of 8 here
#define __device__
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
};
struct float16 {
  _Float16 x;
  float16() = default;
  explicit float16(float x) : x(x) {}
};
inline float number(bfloat16 x) {
  uint32_t all = (uint32_t)x.bits << 16;
  float found;
  std::memcpy(&found, &all, 4);
  return found;
}
inline float number(float16 x) { return x.x; }
using __nv_bfloat16 = bfloat16;  // CUDA's names, for gpu_window.cu
using __half = float16;

constexpr int MOST_THREADS = 1024, STACK = 1 << 16;
struct Block {
  ucontext_t threads[MOST_THREADS], begin;
  jmp_buf places[MOST_THREADS];  // where a thread waits: unlike swapcontext(), going there calls no system
  bool begun[MOST_THREADS], over[MOST_THREADS];
  int size, now, left, arrived, round, warp_arrived[MOST_THREADS / 32], warp_round[MOST_THREADS / 32];
  int count;  // of __syncthreads_count
  unsigned words[MOST_THREADS][6];  // what a thread gives to the others of its warp
  void (*body)(void*);
  void* argument;
};
inline thread_local Block* block;
inline thread_local Index threadIdx, blockIdx, gridDim;
inline thread_local std::vector<float4> dynamic_shared;
#define DYNAMIC_SHARED float4* shared = dynamic_shared.data()
#define PREFETCH(address) (void)(address)
#define PAUSE sched_yield()

inline void give_way() {  // to the next thread that is not over
  int before = block->now, next = before;
  do next = (next + 1) % block->size; while (block->over[next] && next != before);
  if (next == before) return;
  block->now = threadIdx.x = next;
  if (_setjmp(block->places[before]) == 0) {
    if (block->begun[next]) _longjmp(block->places[next], 1);
    block->begun[next] = true;
    setcontext(&block->threads[next]);
  }
  threadIdx.x = block->now;
}

inline void meet(int& arrived, int& round, int size) {
  int mine = round;
  if (++arrived == size) arrived = 0, round++;
  while (round == mine) give_way();
}

inline void __syncthreads() { meet(block->arrived, block->round, block->size); }
inline int __syncthreads_count(int predicate) {
  __syncthreads();
  block->count += predicate != 0;
  __syncthreads();
  int found = block->count;
  __syncthreads();
  block->count = 0;
  return found;
}
inline void __syncwarp() { meet(block->warp_arrived[threadIdx.x / 32], block->warp_round[threadIdx.x / 32], 32); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); sched_yield(); }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
template <typename T> T __ldcg(const T* x) { return *x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void __sincosf(float x, float* sine, float* cosine) { *sine = std::sin(x), *cosine = std::cos(x); }
inline float __expf(float x) { return std::exp(x); }
using std::max;
using std::min;
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __shfl_sync(unsigned, float x, int lane) {
  std::memcpy(&block->words[threadIdx.x][0], &x, 4);
  __syncwarp();
  std::memcpy(&x, &block->words[threadIdx.x / 32 * 32 + lane][0], 4);
  __syncwarp();
  return x;
}
inline float __shfl_xor_sync(unsigned mask, float x, int far) { return __shfl_sync(mask, x, threadIdx.x % 32 ^ far); }

// mma.m16n8k16 by its description: registers a0 to a3 and b0, b1 of a lane hold two columns each.
inline void multiply(float (&c)[4], uint2 low, uint2 high, uint2 w) {
  unsigned own[6] = {low.x, high.x, low.y, high.y, w.x, w.y};
  std::memcpy(block->words[threadIdx.x], own, sizeof own);
  __syncwarp();
  auto number = [](unsigned word, int half) {
    bfloat16 x;
    x.bits = word >> 16 * half;
    return ::number(x);
  };
  int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned *a = block->words[first + row % 8 * 4 + k % 8 / 2], *b = block->words[first + n * 4 + k % 8 / 2];
      c[i] += number(a[k / 8 * 2 + row / 8], k % 2) * number(b[4 + k / 8], k % 2);
    }
  }
  __syncwarp();
}
#define MULTIPLY(type) multiply(c, low, high, w)

inline void thread_begins() {
  block->body(block->argument);
  block->over[block->now] = true;
  if (--block->left == 0) setcontext(&block->begin);
  give_way();
}

// Run body(argument) in `blocks` thread blocks of `size` threads. So many run at a time: those of kernels that wait for all
// must not be more.
constexpr int AT_A_TIME = 4;
inline void launch(int blocks, int size, int shared_bytes, void (*body)(void*), void* argument) {
  std::vector<std::thread> all;
  for (int i = 0; i < blocks; i++) {
    if (i >= AT_A_TIME) all[i - AT_A_TIME].join();
    all.emplace_back([=] {
      std::unique_ptr<char[]> stacks(new char[(size_t)size * STACK]);
      auto own = std::make_unique<Block>();
      block = own.get();
      *block = {};
      block->size = block->left = size, block->body = body, block->argument = argument;
      blockIdx.x = i, gridDim.x = blocks, threadIdx.x = 0;
      dynamic_shared.assign(shared_bytes / 16 + 1, {});
      for (int t = 0; t < size; t++) {
        getcontext(&block->threads[t]);
        block->threads[t].uc_stack.ss_sp = &stacks[(size_t)t * STACK];
        block->threads[t].uc_stack.ss_size = STACK;
        makecontext(&block->threads[t], thread_begins, 0);
      }
      block->begun[0] = true;
      swapcontext(&block->begin, &block->threads[0]);
    });
  }
  for (auto& each : all)
    if (each.joinable()) each.join();
}

// ---- what gpu_window.cu needs further ------------------------------------------------------------------------------

using std::max;
using std::memcpy;
template <typename T> struct EightOf { T x[8]; T operator[](int i) const { return x[i]; } };
using Shape = EightOf<int>;
using Strides = EightOf<long long>;
inline float power_of_2(float x) { return std::exp2(x); }
inline unsigned pair_of(bfloat16 x, bfloat16 y) { return x.bits | (unsigned)y.bits << 16; }
#define PAIR(type) both = pair_of(bfloat16(x), bfloat16(y))
#define COPY_16_BYTES(to, from, there) (there) ? (void)std::memcpy(to, from, 16) : (void)std::memset(to, 0, 16)
#define WAIT_FOR_COPIES

// ldmatrix.x4 by its description: lane l has the address of row l % 8 of matrix l / 8. Of each matrix (8, 8) it gets columns
// l % 4 * 2 and the next one of row l / 4, or, transposed, these rows of column l / 4.
inline void load_matrices(unsigned (&w)[4], const void* from, bool transposed) {
  int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  std::memcpy(block->words[threadIdx.x], &from, sizeof from);
  __syncwarp();
  for (int m = 0; m < 4; m++) {
    uint16_t halves[2];
    for (int i = 0; i < 2; i++) {
      int row = lane / 4, column = lane % 4 * 2 + i;
      if (transposed) std::swap(row, column);
      const uint16_t* numbers;
      std::memcpy(&numbers, block->words[first + m * 8 + row], sizeof numbers);
      halves[i] = numbers[column];
    }
    std::memcpy(&w[m], halves, 4);
  }
  __syncwarp();
}
#define LOAD_MATRICES(transposed) load_matrices(w, from, transposed[0])

// ---- for gpu_experts.cu ------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __ballot_sync(unsigned, bool x) {
  block->words[threadIdx.x][0] = x;
  __syncwarp();
  unsigned found = 0;
  for (int lane = 0; lane < 32; lane++) found |= block->words[threadIdx.x / 32 * 32 + lane][0] << lane;
  __syncwarp();
  return found;
}

// Copies to shared memory happen when they are waited for, as late as they may on a GPU; or at once, with COPIES_AT_ONCE in the
// environment.
using Shared = char*;
inline Shared address_of(void* x) { return (char*)x; }
struct Copy { void* to; const void* from; };
inline thread_local std::vector<std::vector<Copy>> copies[MOST_THREADS];  // of each thread: stages
inline void copy_16(void* to, const void* from, bool inside) {
  auto& own = copies[threadIdx.x];
  if (own.empty()) own.emplace_back();
  own.back().push_back({to, inside ? from : nullptr});
  if (std::getenv("COPIES_AT_ONCE")) {
    if (inside) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
    own.back().pop_back();
  }
}
inline void end_of_stage() {
  if (copies[threadIdx.x].empty()) copies[threadIdx.x].emplace_back();
  copies[threadIdx.x].emplace_back();
}
template <int MORE> void wait_for_stages() {
  auto& own = copies[threadIdx.x];
  while ((int)own.size() - 1 > MORE) {  // the last one is still open
    for (auto& copy : own.front())
      if (copy.from) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    own.erase(own.begin());
  }
}

template <bool TURNED> void load_matrices(const void* row, uint2& first, uint2& second) {
  unsigned w[4];
  load_matrices(w, row, TURNED);
  first = {w[0], w[1]}, second = {w[2], w[3]};
}
inline void touch(const int*) {}

// ---- for gpu_experts_hopper.cu -----------------------------------------------------------------------------------------

// wgmma with operands in shared memory, whose addresses have their bits 4 to 6 changed by bits 7 to 9. Its products happen when
// they are waited for, as late as they may on a GPU.
struct Operand {
  Shared at;
  int leading, stride;
  float number(int side, int k, bool by_k) const {
    Shared x = by_k ? at + side / 64 * leading + side % 64 * 2 + k / 8 * stride + k % 8 * 128
                    : at + side / 8 * stride + side % 8 * 128 + k * 2;
    return ::number(*(const bfloat16*)((size_t)x ^ ((size_t)x >> 7 & 7) << 4));
  }
};
inline Operand operand(Shared at, int leading, int stride) { return {at, leading, stride}; }
struct Products {
  float (*c)[4];
  Operand a, b;
  bool a_by_k, b_by_k;
};
inline thread_local std::vector<std::vector<Products>> groups[MOST_THREADS];  // of each thread
inline thread_local std::vector<Products> open_group[MOST_THREADS];
#define GROUP_MULTIPLY(type) open_group[threadIdx.x].push_back({c, a, b, A_BY_K, B_BY_K})
inline void group_begins() {}
inline void group_ends() {
  groups[threadIdx.x].push_back(open_group[threadIdx.x]);
  open_group[threadIdx.x].clear();
}
template <int MORE> void wait_for_groups() {
  auto& own = groups[threadIdx.x];
  int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
  while ((int)own.size() > MORE) {
    for (auto& [c, a, b, a_by_k, b_by_k] : own.front())
      for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++) {
          float x = a.number(first + 8 * half, k, a_by_k);
          for (int j = 0; j < 64; j++) c[j / 2][2 * half + j % 2] += x * b.number(j / 2 * 8 + lane % 4 * 2 + j % 2, k, b_by_k);
        }
    own.erase(own.begin());
  }
}
inline void publish() {}
