// Products of experts with many rows each (experts.cu, which is in front, has few): a warp decodes 32 rows of weights into
// its registers once for all columns of the group, and all warps of the block take these from shared memory.
//
// Weights become bfloat16, rounded once, as in XLA's form. Sums are taken along the row, group after group of 32. A
// multiprocessor holds one such block, whose registers are full of sums: so blocks and columns come to shared memory
// long before they are needed, and the weights of a group are decoded while the one before is multiplied.
//
// mixture.py defines SHARED_BYTES, those that a block has.

#define ROWS_OF_WARP (MATRICES == 2 ? 16 : 32)  // of one matrix
#define COLUMN_STAGES 5
#define COLUMN_BYTES (COLUMN_STAGES * COLUMNS * 64)
#define AT_ONCE 4  // tiles of columns

extern __shared__ uint4 stages[];

// Two integers as bfloat16 times a scale, plus an offset.
DEVICE u32 scaled_pair(u32 v, float scale, float offset) {
  return bfloat16_pair(fmaf(scale, __uint_as_float(v << 16), offset), fmaf(scale, __uint_as_float(v & 0xFFFF0000u), offset));
}

// Sixteen rows, whose units take turns in two stages.
template <Format F> struct Tile {
  typedef Unit<F> U;
  static constexpr int stage_bytes = 16 * U::pitch;
  // The columns are waited for up to COLUMN_STAGES - 1 groups after they were asked for, and what was asked for with them.
  static_assert(COLUMN_STAGES - 1 <= U::groups, "a unit is needed before it is there");
  Rows<F> rows;
  Scales<F> scales;
  const char* from;
  int start;  // of the stages

  DEVICE void begin(const char* first, int at) {
    from = first;
    start = at;
    rows.stage = (const u32*)stages;
  }

  // Asks for a unit; the one before the last is needed no more.
  DEVICE void ask(int unit, int lane) {
    if (unit < U::count) fetch<F>((char*)stages + start + (unit & 1) * stage_bytes, from, unit, lane);
  }

  // Goes to a unit, which is there.
  DEVICE void enter(int unit, int g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = g + 8 * h;
      const int shift = U::align == 16 ? 0 : ((int)(size_t)from + row * U::row_bytes + unit * U::bytes) & 15;
      rows.at[h] = start + (unit & 1) * stage_bytes + row * U::pitch + shift;
    }
    if (U::super) scales.load(rows);
  }

  // The lane's weights of row g + 8 h in a group, as it has them in A fragments: see `decode`.
  DEVICE void weights(int group, int h, int t, u32 (&a)[2][4]) {
    // What `decode` adds to every integer.
    constexpr float bias = F == Q4_0 ? 136.0f : F == Q6_K ? 160.0f : F == Q4_K || F == Q5_K ? 128.0f : 0.0f;
    decode_row<F>(rows, group, h, t, a);
    if (F == MXFP4) {
      // A power of two: the product is exact in bfloat16.
      const u32 e = rows.byte(h, group * 17), scale = (e < 2 ? 0 : e - 1) * 0x00800080u;
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + h] = fma_pair(a[i / 2][i % 2 * 2 + h], scale, 0x80008000u);
      return;
    }
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
  constexpr int warp_bytes = 2 * (Tile<F>::stage_bytes + Tile<UP>::stage_bytes);
  // Reads of a word may go 4 bytes past the last unit.
  static_assert(SHARED_BYTES == COLUMN_BYTES + WARPS * warp_bytes + 16, "mixture.py counts in another way");
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
  Tile<F> one;
  Tile<UP> other;
  const char* below = first.data + slot * first.stride + (long long)row * Unit<F>::row_bytes;
  one.begin(below, COLUMN_BYTES + warp * warp_bytes);
  other.begin(MATRICES == 2 ? second.data + slot * second.stride + (long long)row * Unit<UP>::row_bytes : below + 16 * Unit<F>::row_bytes,
      one.start + 2 * Tile<F>::stage_bytes);
#pragma unroll
  for (int stage = 0; stage < COLUMN_STAGES - 1; ++stage) {
    if (active && stage < 2) one.ask(stage, lane), other.ask(stage, lane);
#pragma unroll
    for (int n = 0; n < copies; ++n) {
      const int at = n * WARPS * 32 + threadIdx.x;
      if (stage < groups && at < tiles * 32) copy16(&stages[stage * COLUMNS * 4 + at], columns[n] + stage * 4);
    }
    copies_end();
  }
  float sums[2][TILES][4] = {};
  u32 a[2][2][2][4];  // of the group that is multiplied and of the next, by turns
  copies_wait<COLUMN_STAGES - 2>();
  __syncwarp();
  if (active) {
    one.enter(0, g);
    other.enter(0, g);
#pragma unroll
    for (int h = 0; h < 2; ++h) one.weights(0, h, t, a[0][0]), other.weights(0, h, t, a[0][1]);
  }
  int next = COLUMN_STAGES - 1, stage = 0;  // the group whose columns are asked for; where those of the present one are
#pragma unroll 1
  for (int base = 0; base < groups; base += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (groups % 8 && base + k >= groups) break;
      copies_wait<COLUMN_STAGES - 2>();
      // Everybody's copies of this group are there, and nobody needs the one before any more.
      __syncthreads();
      uint4* to = stages + (stage == 0 ? COLUMN_STAGES - 1 : stage - 1) * (COLUMNS * 4);
#pragma unroll
      for (int n = 0; n < copies; ++n) {
        const int at = n * WARPS * 32 + threadIdx.x;
        if (next < groups && at < tiles * 32) copy16(&to[at], columns[n] + next * 4);
      }
      if (active) {
        if ((k + 1) % Unit<F>::groups == 0) one.ask((base + k + 1) / Unit<F>::groups + 1, lane);
        if ((k + 1) % Unit<UP>::groups == 0) other.ask((base + k + 1) / Unit<UP>::groups + 1, lane);
      }
      copies_end();
      const uint4* own = stages + stage * (COLUMNS * 4) + lane;
      ++next;
      stage = stage + 1 == COLUMN_STAGES ? 0 : stage + 1;
      if (!active) continue;
      const bool more = base + k + 1 < groups;
      if (more && (k + 1) % Unit<F>::groups == 0) one.enter((base + k + 1) / Unit<F>::groups, g);
      if (more && (k + 1) % Unit<UP>::groups == 0) other.enter((base + k + 1) / Unit<UP>::groups, g);
#pragma unroll
      for (int part = 0; part < 4 || part * AT_ONCE < TILES; ++part) {
        const bool some = part * AT_ONCE < TILES && (part == 0 || part * AT_ONCE < tiles);
        uint4 b[AT_ONCE];
        // Columns past the last are of any old group; nobody reads their sums.
        if (some)
#pragma unroll
          for (int n = 0; n < AT_ONCE; ++n) b[n] = own[(part * AT_ONCE + n) * 32];
        if (more && part < 4) {
          if (part < 2)
            one.weights((k + 1) % Unit<F>::groups, part, t, a[(k + 1) & 1][0]);
          else
            other.weights((k + 1) % Unit<UP>::groups, part - 2, t, a[(k + 1) & 1][1]);
        }
        if (some)
#pragma unroll
          for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              float(&sum)[4] = sums[m][part * AT_ONCE + n];
              const u32(&w)[2][4] = a[k & 1][m];
              mma(sum, w[0][0], w[0][1], w[0][2], w[0][3], b[n].x, b[n].y, sum);
              mma(sum, w[1][0], w[1][1], w[1][2], w[1][3], b[n].z, b[n].w, sum);
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
