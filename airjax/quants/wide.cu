// Products of experts with many rows each (experts.cu, which is in front, has few): a warp decodes 32 rows of weights into
// its registers once for all columns of the group, and all warps of the block take these from shared memory.
//
// Weights become bfloat16, rounded once, as in XLA's form. Sums are taken along the row, group after group of 32. A
// multiprocessor holds one such block, whose registers are full of sums.

#define ROWS_OF_WARP (MATRICES == 2 ? 16 : 32)  // of one matrix
#define COLUMN_STAGES 4

// Sixteen rows where they lie: words at any address, as `Rows` has them in shared memory.
template <Format F> struct Memory {
  const u32* stage;
  int at[2];

  DEVICE u32 byte(int h, int offset) const { return ((const unsigned char*)stage)[at[h] + offset]; }
  DEVICE u32 half(int h, int offset) const { return ((const unsigned short*)stage)[(at[h] + offset) >> 1]; }
  // Nothing past the four bytes is read.
  DEVICE u32 word(int h, int offset) const {
    const int from = at[h] + offset;
    if (Unit<F>::align == 16) return stage[from >> 2];
    return __funnelshift_r(stage[from >> 2], stage[(from + 3) >> 2], (from & 3) * 8);
  }
};

// Two integers as bfloat16 times a scale, plus an offset.
DEVICE u32 scaled_pair(u32 v, float scale, float offset) {
  return bfloat16_pair(fmaf(scale, __uint_as_float(v << 16), offset), fmaf(scale, __uint_as_float(v & 0xFFFF0000u), offset));
}

template <Format F> struct Tile {
  typedef Unit<F> U;
  Memory<F> rows;
  Scales<F> scales;
  int first;  // where row g begins, in bytes

  // `row` is the lane's row g.
  DEVICE void begin(const char* row) {
    first = (int)((size_t)row & 15);
    rows.stage = (const u32*)(row - first);
  }

  // Goes to a unit, and asks for the lines of the next one.
  DEVICE void load(int unit, int t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows.at[h] = first + 8 * h * U::row_bytes + unit * U::bytes;
      if (t * 64 < min(U::bytes, U::row_bytes - (unit + 1) * U::bytes))
        prefetch((const char*)rows.stage + rows.at[h] + U::bytes + t * 64);
    }
    if (U::super) scales.load(rows);
  }

  // A group's weights as A fragments: see `decode`.
  DEVICE void fragments(int group, int t, u32 (&a)[2][4]) {
    // What `decode` adds to every integer.
    constexpr float bias = F == Q4_0 ? 136.0f : F == Q6_K ? 160.0f : F == Q4_K || F == Q5_K ? 128.0f : 0.0f;
    decode<F>(rows, group, t, a);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float scale = factor<F>(rows, scales, group, h, side), offset = 0.0f;
        if (U::super) scale *= half_low(scales.d[h]);
        if (F == Q4_K || F == Q5_K)
          offset = -(half_high(scales.d[h]) * (float)(scales.minimum[h][group / 4] >> (group & 3) * 8 & 255));
        offset = fmaf(-bias, scale, offset);
        a[side][h] = scaled_pair(a[side][h], scale, offset);
        a[side][2 + h] = scaled_pair(a[side][2 + h], scale, offset);
      }
  }
};

// A block's share: WARPS * ROWS_OF_WARP rows of a matrix, or of two, for the pairs of one group.
template <Format F, Format UP, typename Write>
DEVICE void share_wide(int block, const uint4* x, const int* table, int* arrival, int hits, const Stack& first, const Stack& second, Write write) {
  constexpr int groups = WIDTH / 32, copies = (COLUMNS * 4 + WARPS * 32 - 1) / (WARPS * 32);
  __shared__ uint4 stages[COLUMN_STAGES][COLUMNS * 4];
  table += block / SPANS * TABLE;
  const int slot = table[0], expert = table[1], count = table[2];
  if (slot < 0) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, tiles = (count + 7) / 8;
  const int row = (block % SPANS * WARPS + warp) * ROWS_OF_WARP;
  const bool active = row < OUT;
  // Four lanes copy a column.
  const uint4* columns[copies];
#pragma unroll
  for (int n = 0; n < copies; ++n) {
    const int column = (n * WARPS * 32 + threadIdx.x) / 4;
    columns[n] = x + table[3 + min(column, count - 1)] / SHARE * (WIDTH / 8) + t;
  }
#if ARRIVING
  const bool pending = arrival[PENDING + expert];
  if (pending) await(arrival, expert);
#endif
#pragma unroll
  for (int stage = 0; stage < COLUMN_STAGES - 1; ++stage) {
#pragma unroll
    for (int n = 0; n < copies; ++n) {
      const int at = n * WARPS * 32 + threadIdx.x;
      if (stage < groups && at < tiles * 32) copy16(&stages[stage][at], columns[n] + stage * 4);
    }
    copies_end();
  }
  Tile<F> one;
  Tile<UP> other;
  if (active) {
    one.begin(first.data + slot * first.stride + (long long)(row + g) * Unit<F>::row_bytes);
    other.begin(second.data + slot * second.stride + (long long)(row + (MATRICES == 2 ? 0 : 16) + g) * Unit<UP>::row_bytes);
  }
  float sums[2][TILES][4] = {};
#pragma unroll 1
  for (int base = 0; base < groups; base += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (groups % 8 && base + k >= groups) break;
      u32 a[2][2][4];
      if (active) {
        if (k % Unit<F>::groups == 0) one.load((base + k) / Unit<F>::groups, t);
        if (k % Unit<UP>::groups == 0) other.load((base + k) / Unit<UP>::groups, t);
        one.fragments(k % Unit<F>::groups, t, a[0]);
        other.fragments(k % Unit<UP>::groups, t, a[1]);
      }
      copies_wait<COLUMN_STAGES - 2>();
      // Everybody's copies of this group are there, and nobody reads the one before any more.
      __syncthreads();
      const int next = base + k + COLUMN_STAGES - 1;
#pragma unroll
      for (int n = 0; n < copies; ++n) {
        const int at = n * WARPS * 32 + threadIdx.x;
        if (next < groups && at < tiles * 32) copy16(&stages[next % COLUMN_STAGES][at], columns[n] + next * 4);
      }
      copies_end();
      if (!active) continue;
      const uint4* own = stages[(base + k) % COLUMN_STAGES] + lane;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        if (n && n >= tiles) break;
        const uint4 b = own[n * 32];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(sums[m][n], a[m][0][0], a[m][0][1], a[m][0][2], a[m][0][3], b.x, b.y, sums[m][n]);
          mma(sums[m][n], a[m][1][0], a[m][1][1], a[m][1][2], a[m][1][3], b.z, b.w, sums[m][n]);
        }
      }
    }
  }
  if (active)
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if (n && n >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + t * 2 + (i & 1), r = row + g + 8 * (i >> 1);
        if (column >= count) continue;
        const int pair = table[3 + column];
        write(pair, expert, r, sums[0][n][i], sums[1][n][i]);
        if (MATRICES == 1) write(pair, expert, r + 16, sums[1][n][i], 0.0f);
      }
    }
#if ARRIVING
  if (!pending && threadIdx.x == 0 && atomicAdd(&arrival[HITS + LAUNCH], 1) == hits - 1)
    atomicMax(&arrival[ENDS + LAUNCH], NOW(arrival));
#endif
}
