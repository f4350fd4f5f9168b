// Products of experts with many rows each (experts.cu, which is in front, has few): a warp decodes sixteen rows of weights
// into its registers once for all columns of the group, and all warps of the block take these from shared memory.
//
// Weights become bfloat16, rounded once, as in XLA's form. Sums are taken along the row, group after group of 32. Blocks
// and columns come to shared memory long before they are needed, and the weights of a group are decoded while the tensor
// cores multiply the one before.
//
// mixture.py defines
//   WGMMA         1: four warps multiply together, and go on meanwhile (compute capability 9.0)
//   SHARED_BYTES  of a block

#define ROWS_OF_WARP (16 / MATRICES)  // of one matrix
#define COLUMN_BYTES (4 * COLUMNS * 128)  // of stages of several groups

extern __shared__ uint4 stages[];

// Two integers as bfloat16 times a scale, plus an offset.
DEVICE u32 scaled_pair(u32 v, float scale, float offset) {
  return bfloat16_pair(fmaf(scale, __uint_as_float(v << 16), offset), fmaf(scale, __uint_as_float(v & 0xFFFF0000u), offset));
}

// Eight rows, the H-th half of a warp's sixteen, whose units take turns in two stages.
template <Format F, int H> struct Half {
  typedef Unit<F> U;
  static constexpr int stage_bytes = 8 * U::pitch;
  Rows<F> rows;
  Scales<F> scales;
  const char* from;
  int start;  // of the stages
  float whole, least;  // what multiplies the scales and the minima of a super-block

  DEVICE void begin(const char* first, int at) {
    from = first;
    start = at;
    rows.stage = (const u32*)stages;
  }

  // Asks for a unit; the one before the last is needed no more.
  DEVICE void ask(int unit, int lane) {
    if (unit < U::count) fetch_eight<F>((char*)stages + start + (unit & 1) * stage_bytes, from, unit, lane);
  }

  // Goes to a unit, which is there.
  DEVICE void enter(int unit, int g) {
    const int shift = U::align == 16 ? 0 : ((int)(size_t)from + g * U::row_bytes + unit * U::bytes) & 15;
    rows.at[H] = start + (unit & 1) * stage_bytes + g * U::pitch + shift;
    if (!U::super) return;
    scales.load(rows, H);
    whole = half_low(scales.d[H]);
    least = half_high(scales.d[H]);
  }

  // The lane's weights in a group: see `decode_row`.
  DEVICE void weights(int group, int t, u32 (&a)[2][4]) {
    // What `decode_row` adds to every integer.
    constexpr float bias = F == Q4_0 ? 136.0f : F == Q6_K ? 160.0f : F == Q4_K || F == Q5_K ? 128.0f : 0.0f;
    decode_row<F>(rows, group, H, t, a);
    if (F == MXFP4) {
      // A power of two: the product is exact in bfloat16.
      const u32 scale = exponent(rows, group, H) * 0x00800080u;
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + H] = fma_pair(a[i / 2][i % 2 * 2 + H], scale, 0x80008000u);
      return;
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float scale = factor<F>(rows, scales, group, H, side), offset = 0.0f;
      if (U::super) scale *= whole;
      if (F == Q4_K || F == Q5_K) offset = -(least * byte_float(scales.minimum[H][group / 4], group & 3));
      offset = fmaf(-bias, scale, offset);
      a[side][H] = scaled_pair(a[side][H], scale, offset);
      a[side][2 + H] = scaled_pair(a[side][2 + H], scale, offset);
    }
  }
};

// Adds the products of 16 activations of all columns to the sums; `b` is theirs in the first column.
template <int NUMBER> DEVICE void multiply_columns(float (&sums)[NUMBER][4], const u32 (&a)[4], const uint4* b, int lane) {
#if WGMMA
  wgmma<NUMBER * 128>(sums, a, b);
#else
#pragma unroll
  for (int n = 0; n < NUMBER; ++n) {
    const u32* own = (const u32*)b + n * 32 + lane;
    mma(sums[n], a[0], a[1], a[2], a[3], own[0], own[NUMBER * 32], sums[n]);
  }
#endif
}

// A block's share for at most NUMBER tiles of eight columns.
template <int NUMBER, Format F, Format UP, typename Write>
DEVICE void share_columns(const uint4* x, const int* table, int row, Half<F, 0>& one, Half<UP, 1>& other, const Write& write) {
  constexpr int groups = WIDTH / 32;
  // The columns of so many groups, eight activations of each after another: in 16 bytes.
  constexpr int step = NUMBER <= 8 ? 4 : 2, chunk = NUMBER * 8, stage = chunk * 4 * step, count_of_stages = COLUMN_BYTES / (stage * 16);
  // Groups for which is asked in advance. A unit is asked for when the one before begins, and waited for so many later.
  constexpr int unit = Unit<F>::groups < Unit<UP>::groups ? Unit<F>::groups : Unit<UP>::groups;
  constexpr int most = (count_of_stages - 2) * step, ahead = most < unit ? most : unit;
  static_assert(ahead % step == 0 && step * NUMBER % WARPS == 0, "threads share the copies of a stage");
  const int expert = table[1], count = table[2], lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const bool active = row < OUT;
  // Four lanes copy a column.
  const int column = threadIdx.x / 4 % chunk, part = threadIdx.x / (NUMBER * 32);
  const uint4* from = x + table[3 + min(column, count - 1)] / SHARE * (WIDTH / 8) + t;
  auto copy_columns = [&](int first) {
    uint4* to = stages + first / step % count_of_stages * stage + t * chunk + column;
#pragma unroll
    for (int own = 0; own < step; own += WARPS / NUMBER)
      if (first + own + part < groups) copy16(&to[(own + part) * 4 * chunk], from + (first + own + part) * 4);
  };
#pragma unroll
  for (int k = 0; k < ahead; ++k) {
    if (k % step == 0) copy_columns(k);
    if (active && k < 2) one.ask(k, lane), other.ask(k, lane);
    copies_end();
  }
  float sums[NUMBER][4] = {};
  u32 a[2][2][4] = {};  // of the group that is multiplied and of the next, by turns
  copies_wait<ahead - 1>();
  __syncwarp();
  if (active) {
    one.enter(0, g);
    other.enter(0, g);
    one.weights(0, t, a[0]);
    other.weights(0, t, a[0]);
  }
#pragma unroll 1
  for (int base = 0; base < groups; base += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (groups % 8 && base + k >= groups) break;
      copies_wait<ahead - 1>();
      if (k % step == 0) {
        // Everybody's copies of the next groups are there, and nobody needs those of the stage before the last any more.
        copies_show();
        __syncthreads();
        copy_columns(base + k + ahead);
      } else {
        __syncwarp();
      }
      const uint4* b = stages + (base + k) / step % count_of_stages * stage + k % step * 4 * chunk;
      products_begin();
#pragma unroll
      for (int side = 0; side < 2; ++side) multiply_columns(sums, a[k & 1][side], b + side * 2 * chunk, lane);
      products_end();
      products_wait<1>();
      if (active) {
        const int next = base + k + 1;
        if ((k + 1) % Unit<F>::groups == 0) one.ask(next / Unit<F>::groups + 1, lane);
        if ((k + 1) % Unit<UP>::groups == 0) other.ask(next / Unit<UP>::groups + 1, lane);
        if (next < groups) {
          if ((k + 1) % Unit<F>::groups == 0) one.enter(next / Unit<F>::groups, g);
          if ((k + 1) % Unit<UP>::groups == 0) other.enter(next / Unit<UP>::groups, g);
          one.weights((k + 1) % Unit<F>::groups, t, a[(k + 1) & 1]);
          other.weights((k + 1) % Unit<UP>::groups, t, a[(k + 1) & 1]);
        }
      }
      copies_end();
    }
  }
  products_wait<0>();
  products_done(sums);
  if (!active) return;
#pragma unroll
  for (int n = 0; n < NUMBER; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = n * 8 + t * 2 + i;
      if (column >= count) continue;
      const int pair = table[3 + column];
      write(pair, expert, row + g, sums[n][i], sums[n][2 + i]);
      if (MATRICES == 1) write(pair, expert, row + 8 + g, sums[n][2 + i], 0.0f);
    }
}

// A block's share: WARPS * ROWS_OF_WARP rows of a matrix, or of two, for the pairs of one group.
template <Format F, Format UP, typename Write>
DEVICE void share_wide(int block, const uint4* x, const int* table, int* arrival, int hits, const Stack& first, const Stack& second, Write write) {
  constexpr int warp_bytes = 2 * (Half<F, 0>::stage_bytes + Half<UP, 1>::stage_bytes);
  // Reads of a word may go 4 bytes past the last unit.
  static_assert(SHARED_BYTES == COLUMN_BYTES + WARPS * warp_bytes + 16, "mixture.py counts in another way");
  table += block / SPANS * TABLE;
  const int slot = table[0], count = table[2], warp = threadIdx.x >> 5;
  if (slot < 0) return;
  const bool pending = awaited(arrival, table[1]);
  const int row = (block % SPANS * WARPS + warp) * ROWS_OF_WARP;
  const char* below = first.data + slot * first.stride + (long long)row * Unit<F>::row_bytes;
  Half<F, 0> one;
  Half<UP, 1> other;
  one.begin(below, COLUMN_BYTES + warp * warp_bytes);
  other.begin(MATRICES == 2 ? second.data + slot * second.stride + (long long)row * Unit<UP>::row_bytes : below + 8 * Unit<F>::row_bytes,
      one.start + 2 * Half<F, 0>::stage_bytes);
  if (count <= 32)
    share_columns<4>(x, table, row, one, other, write);
  else if (count <= 64)
    share_columns<8>(x, table, row, one, other, write);
  else
    share_columns<TILES>(x, table, row, one, other, write);
  if (!pending) done(arrival, hits);
}
