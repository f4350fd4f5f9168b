// What the kernels share: bfloat16 arithmetic, the tensor cores, copies to shared memory.

typedef unsigned int u32;
#define DEVICE __device__ __forceinline__

// 128 in bfloat16: with q in its low bits it is 128 + q.
#define MAGIC 0x43004300u

enum Format { Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, MXFP4 };

DEVICE float half_low(u32 v) {
  float f;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(f) : "r"(v));
  return f;
}

DEVICE float half_high(u32 v) {
  float f;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(f) : "r"(v));
  return f;
}

// Rounded to the nearest, ties to even.
DEVICE unsigned short float16(float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

DEVICE unsigned short bfloat16(float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// Two of them, the first in the low half.
DEVICE u32 bfloat16_pair(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// a * b + c of two bfloat16 each.
DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (a & mask) | c in one instruction, which the compiler does not find where mask and c are constants.
DEVICE u32 masked_or(u32 a, u32 mask, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
}

// Bits 0 to 3 of each half as 128 + q in bfloat16.
DEVICE u32 nibbles(u32 w) { return masked_or(w, 0x000F000Fu, MAGIC); }

// Byte i of four, without the slow conversion: 2^23 + byte, less 2^23.
DEVICE float byte_float(u32 v, int i) { return __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440 | i)) - 8388608.0f; }

// The signed bytes 0 and 2 as two bfloat16: the low bits as 128 + low, less 128, or 256 if negative.
DEVICE u32 signed_bytes(u32 w) {
  return fma_pair((w & 0x00800080u) ^ MAGIC, 0xBF80BF80u, masked_or(w, 0x007F007Fu, MAGIC));
}

DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Copies 16 aligned bytes to shared memory, in the background.
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}

// Asks for a line of memory that will be read.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }

// Ends a batch of copies of this thread.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of its batches are on their way.
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#if WGMMA
// Where columns lie in shared memory, eight of them 128 bytes apart and eight activations of a column CHUNK bytes: the
// matrix descriptor without swizzling of "Asynchronous Warpgroup Level Matrix Instructions" in NVIDIA's Parallel Thread
// Execution ISA.
template <int CHUNK> DEVICE unsigned long long columns_at(const void* b) {
  const u32 at = (u32)__cvta_generic_to_shared(b);
  return (at & 0x3FFFF) >> 4 | (unsigned long long)(CHUNK >> 4) << 16 | (unsigned long long)(128 >> 4) << 32;
}

#define FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SIXTEEN(n) FOUR(n), FOUR(n + 1), FOUR(n + 2), FOUR(n + 3)

// Four warps multiply their 16 rows each with so many tiles of eight columns, in the background.
template <int CHUNK> DEVICE void wgmma(float (&d)[4][4], const u32 (&a)[4], const void* b) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;}"
      : SIXTEEN(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns_at<CHUNK>(b)));
}

template <int CHUNK> DEVICE void wgmma(float (&d)[8][4], const u32 (&a)[4], const void* b) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
      : SIXTEEN(0), SIXTEEN(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns_at<CHUNK>(b)));
}

template <int CHUNK> DEVICE void wgmma(float (&d)[16][4], const u32 (&a)[4], const void* b) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : SIXTEEN(0), SIXTEEN(4), SIXTEEN(8), SIXTEEN(12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns_at<CHUNK>(b)));
}

// What was copied or stored to shared memory before is seen by the tensor cores.
DEVICE void copies_show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N batches of products are on their way.
template <int N> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// The sums that were waited for are read from here on.
template <int N> DEVICE void products_done(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : FOUR(n)::"memory");
}
#else
DEVICE void copies_show() {}
DEVICE void products_begin() {}
DEVICE void products_end() {}
template <int N> DEVICE void products_wait() {}
template <int N> DEVICE void products_done(float (&)[N][4]) {}
#endif

// A bfloat16 as float32.
DEVICE float widened(unsigned short v) { return __uint_as_float((u32)v << 16); }

// Where an activation lies in its group of 32: lanes of 4 + 4, each four as pairs (0, 2) and (1, 3).
DEVICE int place(int k) { return (k & 12) * 2 + (k >> 4 & 1) * 4 + (k & 1) * 2 + (k >> 1 & 1); }

// The same for wide.cu: the words of the lanes in turn, so that eight activations of a product lie side by side.
DEVICE int wide_place(int k) { return (k >> 4 & 1) * 16 + (k & 1) * 8 + (k & 12) / 2 + (k >> 1 & 1); }

// `value` as a sum of N bfloat16 terms, `stride` apart.
template <int N> DEVICE void split(float value, unsigned short* to, long long stride) {
#pragma unroll
  for (int p = 0; p < N; ++p) {
    const unsigned short term = bfloat16(value);
    to[p * stride] = term;
    value -= widened(term);
  }
}

DEVICE float sum_of_warp(float v) {
#pragma unroll
  for (int by = 16; by; by >>= 1) v += __shfl_xor_sync(~0u, v, by);
  return v;
}

DEVICE float largest_of_warp(float v) {
#pragma unroll
  for (int by = 16; by; by >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, by));
  return v;
}
