// Root-mean-square norm of a few rows, a block each; or of their sums with others.
//
// norming.py puts warps.cu in front, appends the entry point, and defines
//   WIDTH, THREADS   of a row, a multiple of 4; of a block, a multiple of 32
//   EPS              added to the mean square
//   SUM              1: x + update is normed, and written too
//
// The order of a row's sum follows from its width, so its bits do not depend on the other rows.

DEVICE void norm(const float4* x, const float4* update, const float4* weight, float4* sum, float4* out) {
  constexpr int quads = WIDTH / 4, each = (quads + THREADS - 1) / THREADS;
  __shared__ float parts[THREADS / 32];
  const long long row = (long long)blockIdx.x * quads;
  float4 held[each];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int at = threadIdx.x + i * THREADS;
    if (at >= quads) break;
    float4 v = x[row + at];
    if (SUM) {
      const float4 u = update[row + at];
      v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      sum[row + at] = v;
    }
    held[i] = v;
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  squares = sum_of_warp(squares);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += parts[warp];
  const float factor = rsqrtf(total / WIDTH + EPS);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int at = threadIdx.x + i * THREADS;
    if (at >= quads) break;
    const float4 v = held[i], w = weight[at];
    float4 y;
    y.x = v.x * factor * w.x, y.y = v.y * factor * w.y, y.z = v.z * factor * w.z, y.w = v.w * factor * w.w;
    out[row + at] = y;
  }
}
