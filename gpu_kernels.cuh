// What all kernels that gpu_kernels.py compiles begin with: numbers of 16 bits, and their products by tensor cores. CUDA's own
// types need CUDA's headers, which not every machine has.

#ifndef ON_CPU  // a test of the kernels, tests/cuda_on_cpu.h, has its own definitions
using uint8_t = unsigned char;
#define INFINITY __int_as_float(0x7f800000)

struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ explicit bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
};
struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ explicit float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
};
__device__ __forceinline__ float number(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float number(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <typename U>  // a number of 16 bits that another thread block has just written
__device__ __forceinline__ U __ldcg(const U* x) {
  U y;
  y.bits = ::__ldcg(&x->bits);
  return y;
}
#define DYNAMIC_SHARED extern __shared__ float4 shared[]
// c (16, 8) += rows of x (16, 16), low and high, times rows w of a matrix (8, 16)
#define MULTIPLY(type)                                                                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "       \
      "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(w.x), "r"(w.y))
#endif
__device__ __forceinline__ float number(float x) { return x; }
