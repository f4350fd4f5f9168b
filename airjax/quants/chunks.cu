// Copies of experts from host memory that the device sees under addresses of its own, by chunks; and what kernels that
// multiply some experts while others come tell one another about these (an "arrival").

#ifndef DEVICE
#define DEVICE __device__ __forceinline__
#endif
typedef unsigned int u32;
typedef unsigned long long u64;
#define LOADS 4
#define LINE 128

// An arrival is int32, all 0 at first but for:
//   [MISSING]             how many experts are fetched
//   [BEGIN]               when they were found missing: nanoseconds, the low word
//   [PENDING + e]         1: expert e is fetched
//   [PENDING + E + i]     the i-th that is, and
//   [PENDING + 2 E + i]   the slot that it takes
// The launches (0: gate and up, 1: down) count there
//   [TICKETS + launch]    blocks that began
//   [DONE + launch]       of those that fetch, how many are done
//   [HITS + launch]       blocks done that multiplied what was there
//   [ENDS + launch]       when the last of these was, in nanoseconds from BEGIN
//   [PENDING + (3 + launch) E + e]  chunks of expert e that are there
enum Arrival { MISSING, BEGIN, TICKETS, DONE = 4, HITS = 6, ENDS = 8, PENDING = 10 };
#define ARRIVAL_SIZE(experts) (PENDING + 5 * (experts))

DEVICE uint4 load16(const char* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

DEVICE u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// No assembly from here on.

// Chunks of so many bytes, wherever they begin in a line.
DEVICE constexpr int chunks_of(int bytes, int threads) {
  return (bytes + LINE - 16 + threads * LOADS * 16 - 1) / (threads * LOADS * 16);
}

// Address number `part` of a layer's: of the first expert's part.
DEVICE const char* address(const int* info, int part) {
  return (const char*)((u64)(u32)info[1 + 2 * part] | (u64)(u32)info[2 + 2 * part] << 32);
}

// All threads of a block copy one chunk.
template <int THREADS_OF_BLOCK> DEVICE void copy_chunk(const char* from, char* to, int bytes, int chunk) {
  // A warp's loads begin with a line of the link: off by 32 bytes an H100 read 44 GB/s in place of 50.
  const int begin = chunk * (THREADS_OF_BLOCK * LOADS * 16) + threadIdx.x * 16 - (int)((u64)from & (LINE - 1));
  uint4 v[LOADS];
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int at = begin + n * THREADS_OF_BLOCK * 16;
    if (at >= 0 && at < bytes) v[n] = load16(from + at);
  }
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int at = begin + n * THREADS_OF_BLOCK * 16;
    if (at >= 0 && at < bytes) *(uint4*)(to + at) = v[n];
  }
}
