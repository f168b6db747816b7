// The products of gpu_experts.cu on a Hopper GPU (H100, H200), by wgmma: one instruction of 128 threads multiplies 64 x 16
// numbers by 16 x 256, which it reads from shared memory itself, while the threads go on. So they load the operands of later
// steps and compute addresses while the tensor cores work. gpu_experts.py adds this file to the other one.
//
// Operands in shared memory are rows of 128 bytes, whose pieces of 16 bytes are permuted by the lower three bits of the row
// ("swizzle 128B"; a stage begins at a multiple of 1,024 bytes). An operand by its side has a row of 64 k for each row or
// column of the tile; one by k has a row of 64 rows or columns for each k, and BK of these rows for each 64.

#ifndef ON_CPU  // a test of these kernels, tests/cuda_on_cpu.h, has its own definitions
using Operand = unsigned long long;  // what wgmma takes: the address, two distances in bytes, and the kind of permutation
__device__ __forceinline__ Operand operand(Shared at, unsigned leading, unsigned stride) {
  return (at & 0x3ffff) >> 4 | (Operand)(leading >> 4) << 16 | (Operand)(stride >> 4) << 32 | (Operand)1 << 62;
}
#define GROUP_MULTIPLY(type)                                                                                             \
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type          \
               REGISTERS ", %128, %129, p, 1, 1, %130, %131;}" : SUMS : "l"(a), "l"(b), "n"(A_BY_K), "n"(B_BY_K))
__device__ __forceinline__ void group_begins() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_ends() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int MORE>  // wait for the products of all groups but the last MORE
__device__ __forceinline__ void wait_for_groups() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(MORE) : "memory"); }
// What this thread has copied to shared memory can be read by wgmma
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

// c (64, 256) += a (64, 16) times b (16, 256)
template <bool A_BY_K, bool B_BY_K>
__device__ __forceinline__ void group_multiply(float (&c)[32][4], Operand a, Operand b) {
  if constexpr (HALF) GROUP_MULTIPLY("f16");
  else GROUP_MULTIPLY("bf16");
}

// 16 k of an operand, of which `part` x 16 come before
template <bool BY_K>
__device__ __forceinline__ Operand part_of(Shared at, int part) {
  return operand(at + part * (BY_K ? 16 * 128 : 32), BK * 128, 8 * 128);  // by its side, the first distance is not used
}

// A group of four warps computes 64 x BN sums of a tile.
template <bool A_BY_K, bool B_BY_K, typename Problem>
__device__ __forceinline__ void products(const Problem& problem) {
  static_assert(BN == 256 && BK == 64 && STAGES >= 4, "as wgmma is used here");
  DYNAMIC_SHARED;
  Shared stages = address_of(shared);
  stages += 1023 - ((size_t)stages + 1023) % 1024;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  Loader<A_BY_K, B_BY_K, Problem> loader(problem, stages);
  Tile tile;
  int from = 0;  // the stage that is computed
  for (int i = 0; i < STAGES - 2; i++) loader.step();
  for (int number = blockIdx.x; problem.find(number, tile); number += gridDim.x) {
    float sums[32][4];
#pragma unroll
    for (int i = 0; i < 128; i++) sums[i / 4][i % 4] = 0;
    for (int done = 0; done < tile.depth; done += BK) {
      Shared stage = stages + from * STAGE;
      wait_for_stages<STAGES - 3>();
      publish();
      __syncthreads();  // all threads have copied this stage, and wait no more for the products of the one before the last
      group_begins();
#pragma unroll
      for (int part = 0; part < BK / 16; part++)
        group_multiply<A_BY_K, B_BY_K>(sums, part_of<A_BY_K>(stage + group * 64 * 128, part),
                                       part_of<B_BY_K>(stage + SECOND, part));
      group_ends();
      loader.step();  // into the stage of the one before the last
      wait_for_groups<1>();
      from = from + 1 == STAGES ? 0 : from + 1;
    }
    wait_for_groups<0>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = warp * 16 + half * 8 + lane / 4;  // of the tile
      typename Problem::Before before[BN / 32];
#pragma unroll
      for (int j = 0; j < BN / 32; j++) before[j] = problem.before(tile, row, tile.n + 32 * j + lane % 4 * 8);
#pragma unroll
      for (int part = 0; part < BN / 64; part++) {
        float of_row = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float x[8];
          turn(sums + 8 * part + 4 * j, half, x);
          int column = tile.n + 64 * part + 32 * j + lane % 4 * 8;
          if (row < tile.rows && column < problem.columns(tile))
            of_row += problem.found(tile, row, column, x, before[2 * part + j]);
        }
        if constexpr (Problem::SUMS_OF_ROWS) {
          of_row += __shfl_xor_sync(~0u, of_row, 1);
          of_row += __shfl_xor_sync(~0u, of_row, 2);
          if (lane % 4 == 0 && row < tile.rows && tile.n + 64 * part < problem.columns(tile))
            problem.found_row(tile, row, tile.n / 64 + part, of_row);
        }
      }
    }
  }
}
