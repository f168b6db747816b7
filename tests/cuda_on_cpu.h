// What gpu_decode.cu and gpu_train.cu need of CUDA, on a processor: for tests. A thread block is a thread of the system, and its threads are
// coroutines, which take turns where they wait for each other.

#include <sched.h>
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

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct Index { unsigned x; };
struct __half { uint16_t bits; __half() = default; explicit __half(float) : bits() {} };  // not for use
inline float __half2float(__half) { std::abort(); }
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
};
inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t all = (uint32_t)x.bits << 16;
  float found;
  std::memcpy(&found, &all, 4);
  return found;
}

struct bfloat16 { __nv_bfloat16 x; };
struct float16 { _Float16 x; };
inline float number(bfloat16 x) { return __bfloat162float(x.x); }
inline float number(float16 x) { return x.x; }
inline void round_to(bfloat16& y, float x) { y.x = __nv_bfloat16(x); }
inline void round_to(float16& y, float x) { y.x = x; }

constexpr int MOST = 1024, STACK = 1 << 16;
struct Block {
  ucontext_t threads[MOST], begin;
  bool over[MOST];
  int size, now, left, arrived, round, warp_arrived[MOST / 32], warp_round[MOST / 32];
  unsigned words[MOST][6];  // what a thread gives to the others of its warp
  void (*body)(void*);
  void* argument;
};
inline thread_local Block* block;
inline thread_local Index threadIdx, blockIdx, gridDim;
inline thread_local std::vector<float4> dynamic_shared;
#define DYNAMIC_SHARED float4* shared = dynamic_shared.data()
#define PREFETCH(address) (void)(address)

inline void give_way() {  // to the next thread that is not over
  int before = block->now, next = before;
  do next = (next + 1) % block->size; while (block->over[next] && next != before);
  if (next == before) return;
  block->now = threadIdx.x = next;
  swapcontext(&block->threads[before], &block->threads[next]);
  threadIdx.x = block->now;
}

inline void meet(int& arrived, int& round, int size) {
  int mine = round;
  if (++arrived == size) arrived = 0, round++;
  while (round == mine) give_way();
}

inline void __syncthreads() { meet(block->arrived, block->round, block->size); }
inline void __syncwarp() { meet(block->warp_arrived[threadIdx.x / 32], block->warp_round[threadIdx.x / 32], 32); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); sched_yield(); }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
template <typename T> T __ldcg(const T* x) { return *x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
using std::min;

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
    __nv_bfloat16 x;
    x.bits = word >> 16 * half;
    return __bfloat162float(x);
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
      swapcontext(&block->begin, &block->threads[0]);
    });
  }
  for (auto& each : all)
    if (each.joinable()) each.join();
}
