// Enough of CUDA to run the kernels on a CPU, a block at a time: threads are fibers that take turns at barriers.
//
// It takes the place of the assembly in airjax/quants/warps.cu. Copies to shared memory arrive only when they are waited
// for; shared memory keeps what the last block left; a warp's product is exact up to its last rounding.

#include <fenv.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define MOST_THREADS 1024
#define MOST_COPIES 256
#define STACK_BYTES (64 << 10)

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;

struct Copy { char* to; const char* from; int batch; };
struct Fiber {
  jmp_buf place;  // where it waits
  char* stack;
  bool begun, done;
  int batch, first, copies;  // of copies: the open batch, the first that did not arrive, one past the last
  Copy copy[MOST_COPIES];
};
struct Barrier { int waiting; long passed; };
struct Lane { u32 a[4], b[2]; int value; };
static Fiber* fibers;
static jmp_buf host;
static int thread_count;
static Barrier all_threads, warps[MOST_THREADS / 32];
static Lane lanes[MOST_THREADS];

static void fail(const char* why) {
  fprintf(stderr, "%s (block %d, thread %d)\n", why, blockIdx.x, threadIdx.x);
  abort();
}

static void arrive(Barrier& at, int count) {
  const long passed = at.passed;
  if (++at.waiting == count) {
    at.waiting = 0;
    ++at.passed;
  }
  while (at.passed == passed)
    if (!_setjmp(fibers[threadIdx.x].place)) _longjmp(host, 1);
}

static void __syncthreads() { arrive(all_threads, thread_count); }
static void __syncwarp() { arrive(warps[threadIdx.x / 32], 32); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int atomicAdd(int* at, int n) { return (*at += n) - n; }
static int atomicSub(int* at, int n) { return (*at -= n) + n; }
static int atomicMax(int* at, int n) {
  const int before = *at;
  if (n > before) *at = n;
  return before;
}
static void __threadfence() {}
static int __popc(u32 bits) { return __builtin_popcount(bits); }
// Blocks run one after another: what one waits for is there, or never comes.
static void __nanosleep(int) { fail("a block waits for a later one"); }
static u64 nanoseconds() {
  static u64 now = 0;
  return now += 7;
}
static uint4 load16(const char* at) {
  if ((size_t)at % 16) fail("a load of 16 bytes must be aligned to 16");
  return *(const uint4*)at;
}
static u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((unsigned long long)high << 32 | low) >> (by & 31)); }

static u32 __byte_perm(u32 low, u32 high, u32 places) {
  const u64 all = (u64)high << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(all >> (places >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}

static float __uint_as_float(u32 bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

static float rsqrtf(float v) { return 1.0f / sqrtf(v); }

static int exchanged(int value, int from) {
  lanes[threadIdx.x].value = value;
  __syncwarp();
  const int got = lanes[from].value;
  __syncwarp();
  return got;
}
static u32 __ballot_sync(u32, bool yes) {
  lanes[threadIdx.x].value = yes;
  __syncwarp();
  u32 votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (u32)lanes[(threadIdx.x & ~31) + i].value << i;
  __syncwarp();
  return votes;
}
static int __shfl_sync(u32, int value, int lane) { return exchanged(value, (threadIdx.x & ~31) + lane); }
static float __shfl_xor_sync(u32, float value, int mask) {
  int bits;
  memcpy(&bits, &value, 4);
  return __uint_as_float(exchanged(bits, threadIdx.x ^ mask));
}
static int __shfl_up_sync(u32, int value, int by) {
  return exchanged(value, (threadIdx.x & 31) < by ? threadIdx.x : threadIdx.x - by);
}

static float half_low(u32 v) {
  const unsigned short bits = v;
  _Float16 h;
  memcpy(&h, &bits, 2);
  return h;
}
static float half_high(u32 v) { return half_low(v >> 16); }

static unsigned short float16(float v) {
  const _Float16 h = (_Float16)v;
  unsigned short bits;
  memcpy(&bits, &h, 2);
  return bits;
}

static unsigned short bfloat16(float v) {
  u32 bits;
  memcpy(&bits, &v, 4);
  return v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static u32 bfloat16_pair(float low, float high) { return bfloat16(low) | (u32)bfloat16(high) << 16; }

static float bf16_at(u32 pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); }

static u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (int i = 0; i < 2; ++i)
    d |= (u32)bfloat16((float)((double)bf16_at(a, i) * bf16_at(b, i) + bf16_at(c, i))) << 16 * i;
  return d;
}

static u32 masked_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }

// "Matrix Fragments for mma.m16n8k16" in NVIDIA's Parallel Thread Execution ISA.
static void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  const Lane own = {{a0, a1, a2, a3}, {b0, b1}, 0};
  lanes[threadIdx.x] = own;
  __syncwarp();
  const Lane* warp = lanes + (threadIdx.x & ~31);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const u32 a = warp[g * 4 + k % 8 / 2].a[k / 8 * 2 + i / 2];
      const u32 b = warp[(2 * t + i % 2) * 4 + k % 8 / 2].b[k / 8];
      sum += (double)bf16_at(a, k % 2) * bf16_at(b, k % 2);
    }
    sums[i] = (float)sum;
  }
  __syncwarp();
  memcpy(d, sums, sizeof sums);
}

// The products of four warps at once, each of its own 16 rows: B is read when they are waited for, as late as can be.
struct Product { float* d; u32 a[4]; const uint4* b; int tiles, chunk, batch; };
struct Products { Product held[8]; int count, batch; };
static Products products[MOST_THREADS];

template <int CHUNK, int N> void wgmma(float (&d)[N][4], const u32 (&a)[4], const uint4* b) {
  Products& own = products[threadIdx.x];
  if (own.count == 8) fail("too many products on their way");
  const Product product = {d[0], {a[0], a[1], a[2], a[3]}, b, N, CHUNK / 16, own.batch};
  own.held[own.count++] = product;
}
static void copies_show() {}
static void products_begin() {}
static void products_end() { ++products[threadIdx.x].batch; }
template <int N> void products_wait() {
  Products& all = products[threadIdx.x];
  int done = 0;
  for (; done < all.count && all.held[done].batch < all.batch - N; ++done) {
    const Product own = all.held[done];
    for (int n = 0; n < own.tiles; ++n) {
      const u32* column = (const u32*)(own.b + n * 8 + threadIdx.x % 32 / 4) + threadIdx.x % 4;
      float(&sum)[4] = *(float(*)[4])(own.d + 4 * n);
      mma(sum, own.a[0], own.a[1], own.a[2], own.a[3], column[0], column[own.chunk * 4], sum);
    }
  }
  all.count -= done;
  memmove(all.held, all.held + done, all.count * sizeof(Product));
}
template <int N> void products_done(float (&)[N][4]) {}

static void copy16(void* to, const void* from) {
  Fiber& own = fibers[threadIdx.x];
  if (((size_t)to | (size_t)from) % 16) fail("a copy of 16 bytes must be aligned to 16");
  if (own.copies == MOST_COPIES) fail("too many copies on their way");
  const volatile char touched = *(const char*)from;
  (void)touched;
  const Copy copy = {(char*)to, (const char*)from, own.batch};
  own.copy[own.copies++] = copy;
}
static void prefetch(const void* at) {
  const volatile char touched = *(const char*)at;
  (void)touched;
}
static void copies_end() { ++fibers[threadIdx.x].batch; }
template <int N> void copies_wait() {
  Fiber& own = fibers[threadIdx.x];
  while (own.first < own.copies && own.copy[own.first].batch < own.batch - N) {
    memcpy(own.copy[own.first].to, own.copy[own.first].from, 16);
    ++own.first;
  }
  if (own.first == own.copies) own.first = own.copies = 0;
}

static void (*entry)(void**);
static void** arguments;

static void run_thread() {
  entry(arguments);
  fibers[threadIdx.x].done = true;
  _longjmp(host, 1);
}

// Lets a thread run up to its next barrier. Only its first time needs a context, whose switches are slow.
static void go_on(Fiber& thread) {
  if (_setjmp(host)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&context, run_thread, 0);
  setcontext(&context);
}

static void run_block(int block, int threads) {
  blockIdx.x = block;
  thread_count = threads;
  all_threads = Barrier();
  memset(warps, 0, sizeof warps);
  for (int i = 0; i < threads; ++i) {
    Fiber& own = fibers[i];
    own.begun = own.done = false;
    own.batch = own.first = own.copies = 0;
  }
  for (int left = threads, turns = 0; left; ++turns) {
    if (turns > 1000000) fail("threads wait for each other");
    for (int i = 0; i < threads; ++i)
      if (!fibers[i].done) {
        threadIdx.x = i;
        go_on(fibers[i]);
        left -= fibers[i].done;
      }
  }
}

extern "C" void run_grid(void (*kernel)(void**), void** pointers, int blocks, int threads) {
  entry = kernel;
  arguments = pointers;
  gridDim.x = blocks;
  if (!fibers) {
    fibers = (Fiber*)calloc(MOST_THREADS, sizeof(Fiber));
    for (int i = 0; i < MOST_THREADS; ++i) fibers[i].stack = (char*)malloc(STACK_BYTES);
  }
  // XLA's threads take subnormal numbers for 0.
  fenv_t before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  for (int block = 0; block < blocks; ++block) run_block(block, threads);
  fesetenv(&before);
}
