// What a mixture of experts computes, on the tensor cores of compute capability 8.0 and up: products with the blocks of
// experts as they lie in the file, each expert's read once for the rows that chose it.
//
// mixture.py puts warps.cu in front, appends the entry point, and defines
//   COLUMNS   rows of x that a group holds at most, a multiple of 8
//   SPLITS    bfloat16 terms that make up one activation
//   X_ROWS    rows of x; pair p multiplies row p / SHARE
//   SHARE     pairs of each row
//   WIDTH     n_in, a multiple of 32
//   OUT       n_out, a multiple of 16 * ROW_TILES * TURNS
//   MATRICES  2: gate and up of one input, and the activation; 1: one matrix
//   ROW_TILES tiles of 16 rows of one matrix that are multiplied at once by a block
//   TURNS     how often in turn, which share activations
//   SLICES    warps that share a tile, each with every so manyth unit of its rows
//   STAGES    units of a warp that are on their way at once
//   WIDE      1: wide.cu follows, whose blocks have so many WARPS and whose COLUMNS are more
//   SPANS     blocks of a group
//   ARRIVING  1: the first FETCHERS blocks fetch the experts that are missing (chunks.cu, which is then in front too), the
//             others multiply those that are there, and then each one that arrives; 0: all are there
// and for such launches
//   LAUNCH    0: gate and up, 1: down     FETCHERS  blocks that fetch
//   EXPERTS   of a layer                  SLOT_BYTES  of one slot of the pool
//   PARTS     tensors that are fetched    PART_NUMBERS, PART_BYTES, PART_OFFSETS  of each: {..., ...}
//
// A warp copies a unit of 16 rows (some 128 or 256 weights each) to shared memory, whatever its alignment, decodes it
// there and multiplies. Sums are taken in an order that depends on the matrix's width and format alone.

#define TILES (COLUMNS / 8)
#define TABLE (3 + COLUMNS)
#if !WIDE
#define WARPS (MATRICES * ROW_TILES * SLICES)
#endif

// Where the blocks of an expert lie: `data + slot * stride`.
struct Stack {
  const char* data;
  long long stride;
};

template <Format F> struct Unit {
  static constexpr int block = F == Q4_0 ? 18 : F == Q8_0 ? 34 : F == MXFP4 ? 17 : F == Q4_K ? 144 : F == Q5_K ? 176 : 210;
  static constexpr bool super = F == Q4_K || F == Q5_K || F == Q6_K;
  static constexpr int groups = F == Q8_0 ? 4 : 8;  // of 32 weights
  static constexpr int bytes = super ? block : groups * block;
  static constexpr int align = F == Q4_K || F == Q5_K ? 16 : F == MXFP4 ? 1 : 2;
  static constexpr int chunks = (bytes + 16 - align + 15) / 16;  // of 16 bytes, wherever a row begins
  // An odd number of chunks from row to row: eight rows lie in different banks.
  static constexpr int pitch = 16 * (chunks | 1);
  static constexpr int row_bytes = super ? WIDTH / 256 * block : WIDTH / 32 * block;
  static constexpr int count = (WIDTH / 32 + groups - 1) / groups;
  // Blocks after which words lie alike again.
  static constexpr int period = F == MXFP4 ? 4 : 2;
};

// Eight rows of a unit, on their way to shared memory: four lanes a row, so that addresses differ by constants.
template <Format F> DEVICE void fetch_eight(char* stage, const char* rows, int unit, int lane) {
  typedef Unit<F> U;
  constexpr bool whole = WIDTH / 32 % U::groups == 0;
  const int bytes = whole ? U::bytes : min(U::bytes, U::row_bytes - unit * U::bytes);
  const int row = lane >> 2, part = (lane & 3) * 16;
  const char* from = rows + (long long)row * U::row_bytes + unit * U::bytes;
  const int shift = U::align == 16 ? 0 : (int)((size_t)from & 15);
  const char* aligned = from - shift + part;
  char* to = stage + row * U::pitch + part;
#pragma unroll
  for (int at = 0; at < U::chunks * 16; at += 64)
    if ((whole && at + 64 <= U::bytes) || at + part < shift + bytes) copy16(to + at, aligned + at);
}

template <Format F> DEVICE void fetch(char* stage, const char* rows, int unit, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) fetch_eight<F>(stage + 8 * h * Unit<F>::pitch, rows + 8 * h * Unit<F>::row_bytes, unit, lane);
}

// What a lane looks at in a stage: bytes of its rows g and g + 8.
template <Format F> struct Rows {
  const u32* stage;
  int at[2];  // where the unit begins, in bytes

  DEVICE u32 byte(int h, int offset) const { return ((const unsigned char*)stage)[at[h] + offset]; }
  DEVICE u32 half(int h, int offset) const { return ((const unsigned short*)stage)[(at[h] + offset) >> 1]; }
  // Four bytes from any place.
  DEVICE u32 word(int h, int offset) const {
    const int from = at[h] + offset;
    return __funnelshift_r(stage[from >> 2], stage[(from >> 2) + 1], (from & 3) * 8);
  }
  // The `index`-th four bytes of a super-block: addresses differ by constants.
  DEVICE u32 quad(int h, int index) const {
    const u32* own = stage + (at[h] >> 2) + index;
    return Unit<F>::align == 16 ? own[0] : __funnelshift_r(own[0], own[1], (at[h] & 3) * 8);
  }
};

// The scales of a super-block: of the lane's two rows.
template <Format F> struct Scales {
  u32 d[2];
  u32 scale[2][4];    // a byte each: 8 of 6 bits (Q4_K, Q5_K), 16 signed ones (Q6_K)
  u32 minimum[2][2];

  DEVICE void load(const Rows<F>& rows, int h) {
    if (F == Q4_K || F == Q5_K) {
      const uint4 v = *(const uint4*)(rows.stage + (rows.at[h] >> 2));
      d[h] = v.x;
      scale[h][0] = v.y & 0x3F3F3F3Fu;
      scale[h][1] = (v.w & 0x0F0F0F0Fu) | ((v.y >> 2) & 0x30303030u);
      minimum[h][0] = v.z & 0x3F3F3F3Fu;
      minimum[h][1] = ((v.w >> 4) & 0x0F0F0F0Fu) | ((v.z >> 2) & 0x30303030u);
    }
    if (F == Q6_K) {
      d[h] = rows.half(h, 208);
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[h][i] = rows.quad(h, 48 + i);
    }
  }
};

// Twice the 4-bit floats that bits 0 to 3 of each half hold. As exponent and mantissa of a bfloat16 the three low bits
// are smaller by 2^126, subnormal ones too.
DEVICE u32 floats(u32 magnitude, u32 sign) {
  return fma_pair(masked_or(magnitude, 0x01C001C0u, sign & 0x80008000u), 0x7F007F00u, 0x80008000u);
}

// The weights of row g + 8 h in one group of 32, as A fragments have them, by the half of the group: pairs of row g, of
// row g + 8, twice.
template <Format F> DEVICE void decode_row(const Rows<F>& rows, int group, int h, int t, u32 (&a)[2][4]) {
  if (F == Q4_0 || F == MXFP4) {
    const u32 w = rows.word(h, group * Unit<F>::block + (F == Q4_0 ? 2 : 1) + 4 * t);
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int low = side * 4 + pair * 8;  // the lowest bit
        if (F == Q4_0) a[side][pair * 2 + h] = nibbles(w >> low);
        if (F == MXFP4)
          a[side][pair * 2 + h] = floats(low > 6 ? w >> (low - 6) : w << (6 - low), w << (12 - low));
      }
  }
  if (F == Q8_0)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const u32 w = rows.word(h, group * 34 + 2 + side * 16 + 4 * t);
      a[side][h] = signed_bytes(w);
      a[side][2 + h] = signed_bytes(w >> 8);
    }
  if (F == Q4_K || F == Q5_K)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const u32 w = rows.quad(h, (F == Q5_K ? 12 : 4) + group / 2 * 8 + side * 4 + t) >> (group & 1) * 4;
      a[side][h] = nibbles(w);
      a[side][2 + h] = nibbles(w >> 8);
      if (F == Q5_K) {
        const u32 bits = rows.quad(h, 4 + side * 4 + t);
        a[side][h] = masked_or(group >= 4 ? bits >> (group - 4) : bits << (4 - group), 0x00100010u, a[side][h]);
        a[side][2 + h] = masked_or(bits >> (group + 4), 0x00100010u, a[side][2 + h]);
      }
    }
  if (F == Q6_K)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int part = group / 4, quarter = group & 3;
      const u32 w = rows.quad(h, part * 16 + (quarter & 1) * 8 + side * 4 + t) >> quarter / 2 * 4;
      const u32 bits = rows.quad(h, 32 + part * 8 + side * 4 + t);
      a[side][h] = masked_or((quarter >= 2 ? bits >> (quarter * 2 - 4) : bits << (4 - quarter * 2)), 0x00300030u, nibbles(w));
      a[side][2 + h] = masked_or(bits >> (quarter * 2 + 4), 0x00300030u, nibbles(w >> 8));
    }
}

template <Format F> DEVICE void decode(const Rows<F>& rows, int group, int t, u32 (&a)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) decode_row<F>(rows, group, h, t, a);
}

// That of a group of MXFP4 as a float has it, for half of its scale (see `floats`); 0 for a scale that is none.
template <Format F> DEVICE u32 exponent(const Rows<F>& rows, int group, int h) {
  const u32 e = rows.byte(h, group * 17);
  return e < 2 ? 0 : e - 1;
}

// A group's factor: its scale, or for formats with super-blocks the small integer that d multiplies.
template <Format F> DEVICE float factor(const Rows<F>& rows, const Scales<F>& s, int group, int h, int side) {
  if (F == Q4_0 || F == Q8_0) return half_low(rows.half(h, group * Unit<F>::block));
  if (F == MXFP4) return __uint_as_float(exponent(rows, group, h) << 23);
  if (F == Q6_K) return byte_float(s.scale[h][group / 2] ^ 0x80808080u, (group & 1) * 2 + side) - 128.0f;
  return byte_float(s.scale[h][group / 4], group & 3);
}

// Adds a unit's products to the sums. `x` points to the lane's part of the first group of each column.
template <Format F>
DEVICE void multiply(const Rows<F>& rows, int unit, int t, const uint4* const (&x)[TILES], int tiles, float (&sums)[TILES][4]) {
  typedef Unit<F> U;
  constexpr bool halves = F == Q6_K, minima = F == Q4_K || F == Q5_K, biased = F != Q8_0 && F != MXFP4;
  constexpr u32 bias = F == Q4_0 ? 0xC308C308u : F == Q6_K ? 0xC320C320u : 0xC300C300u;
  Scales<F> s;
  if (U::super) s.load(rows, 0), s.load(rows, 1);
  float scaled[TILES][4] = {}, offset[TILES][4] = {};
#pragma unroll
  for (int group = 0; group < U::groups; ++group) {
    // The last unit of a row may be short.
    if (WIDTH / 32 % U::groups && unit * U::groups + group >= WIDTH / 32) break;
    u32 a[2][4];
    decode<F>(rows, group, t, a);
    float factors[2][2], least[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int side = 0; side <= halves; ++side) factors[side][h] = factor<F>(rows, s, group, h, side);
      if (minima) least[h] = byte_float(s.minimum[h][group / 4], group & 3);
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if (n && n >= tiles) break;
      uint4 b[SPLITS];
#pragma unroll
      for (int p = 0; p < SPLITS; ++p) b[p] = x[n][(unit * U::groups + group) * 4 + p * (X_ROWS * (WIDTH / 8))];
      // A product with a constant: the sum of the activations times the bias, where the other sums will be.
      float start[2][4] = {}, c[2][4];
      if (biased)
#pragma unroll
        for (int p = 0; p < SPLITS; ++p) {
          mma(start[0], bias, bias, bias, bias, b[p].x, b[p].y, start[0]);
          mma(start[halves], bias, bias, bias, bias, b[p].z, b[p].w, start[halves]);
        }
#pragma unroll
      for (int p = 0; p < SPLITS; ++p) {
        mma(c[0], a[0][0], a[0][1], a[0][2], a[0][3], b[p].x, b[p].y, p ? c[0] : start[0]);
        mma(c[halves], a[1][0], a[1][1], a[1][2], a[1][3], b[p].z, b[p].w, p || !halves ? c[halves] : start[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = U::super ? scaled[n][i] : sums[n][i];
#pragma unroll
        for (int side = 0; side <= halves; ++side) sum = fmaf(factors[side][i >> 1], c[side][i], sum);
        if (minima) offset[n][i] = fmaf(least[i >> 1], start[0][i], offset[n][i]);
      }
    }
  }
  if (U::super)
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if (n && n >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[n][i] = fmaf(half_low(s.d[i >> 1]), scaled[n][i], sums[n][i]);
        if (minima) sums[n][i] = fmaf(half_high(s.d[i >> 1]) * (1.0f / 128.0f), offset[n][i], sums[n][i]);
      }
    }
}

// A warp's slice of the products of TURNS tiles of 16 rows, a unit of each after another.
template <Format F>
DEVICE void slice(char* shared, int start, const char* rows, int first, const uint4* const (&x)[TILES], int tiles, float (&sums)[TURNS][TILES][4]) {
  typedef Unit<F> U;
  constexpr long long tile_bytes = 16ll * U::row_bytes;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int steps = (U::count - first + SLICES - 1) / SLICES * TURNS;
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    if (i < steps) fetch<F>(shared + start + i * 16 * U::pitch, rows + i % TURNS * tile_bytes, first + i / TURNS * SLICES, lane);
    copies_end();
  }
  int stage = 0, next = STAGES;
#pragma unroll 1
  for (int unit = first; unit < U::count; unit += SLICES) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      // While the weights are on their way: lines of 128 bytes.
      if (t * 2 < min(U::groups, WIDTH / 32 - unit * U::groups) && (n == 0 || n < tiles))
        prefetch(x[n] - t + unit * U::groups * 4 + t * 8);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      copies_wait<STAGES - 1>();
      __syncwarp();
      Rows<F> mine;
      mine.stage = (const u32*)shared;
      const int base = start + stage * 16 * U::pitch;
      const char* own = rows + turn * tile_bytes + g * U::row_bytes + unit * U::bytes;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        mine.at[h] = base + (g + 8 * h) * U::pitch + (U::align == 16 ? 0 : (int)((size_t)(own + 8 * h * U::row_bytes) & 15));
      multiply<F>(mine, unit, t, x, tiles, sums[turn]);
      __syncwarp();
      if (next < steps) fetch<F>(shared + base, rows + next % TURNS * tile_bytes, first + next / TURNS * SLICES, lane);
      copies_end();
      ++next;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
}

#if ARRIVING
#define NOW(arrival) ((int)((u32)nanoseconds() - (u32)(arrival)[BEGIN]))

// Blocks in the order in which they begin, so that no block waits for one that does not run.
DEVICE int ticket(int* arrival) {
  __shared__ int own;
  if (threadIdx.x == 0) own = atomicAdd(&arrival[TICKETS + LAUNCH], 1);
  __syncthreads();
  return own;
}

// A block's share of the copies. `hits` blocks multiply what is there; the time from their end to that of the last copy,
// in which products waited for the link, is added to the layer's.
DEVICE void bring(int block, const int* info, int* arrival, int hits, int* fetched, char* pool) {
  constexpr int threads = WARPS * 32, numbers[PARTS] = PART_NUMBERS, bytes[PARTS] = PART_BYTES, offsets[PARTS] = PART_OFFSETS;
  const int missing = arrival[MISSING];
  if (!missing) return;
  if (block == 0 && threadIdx.x == 0) atomicMax(&arrival[ENDS + LAUNCH], NOW(arrival));
  int chunks = 0;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) chunks += chunks_of(bytes[part], threads);
  for (int job = block; job < missing * chunks; job += FETCHERS) {
    const int expert = arrival[PENDING + EXPERTS + job / chunks], slot = arrival[PENDING + 2 * EXPERTS + job / chunks];
    int chunk = job % chunks;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int own = chunks_of(bytes[part], threads);
      if (chunk >= 0 && chunk < own)
        copy_chunk<threads>(address(info, numbers[part]) + (u64)expert * bytes[part],
            pool + (u64)slot * SLOT_BYTES + offsets[part], bytes[part], chunk);
      chunk -= own;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&arrival[PENDING + (3 + LAUNCH) * EXPERTS + expert], 1);
  }
  if (threadIdx.x == 0 && atomicAdd(&arrival[DONE + LAUNCH], 1) == FETCHERS - 1) {
    const volatile int* seen = arrival;
    if (seen[HITS + LAUNCH] == hits) fetched[2 * (info[0] / EXPERTS) + 1] += max(NOW(arrival) - seen[ENDS + LAUNCH], 0);
  }
}

// Waits until an expert is there.
DEVICE void await(const int* arrival, int expert) {
  constexpr int threads = WARPS * 32, bytes[PARTS] = PART_BYTES;
  int chunks = 0;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) chunks += chunks_of(bytes[part], threads);
  const volatile int* there = arrival + PENDING + (3 + LAUNCH) * EXPERTS + expert;
  if (threadIdx.x == 0) {
    while (*there < chunks) __nanosleep(100);
    __threadfence();
  }
  __syncthreads();
}

// Whether an expert was waited for.
DEVICE bool awaited(const int* arrival, int expert) {
  const bool pending = arrival[PENDING + expert];
  if (pending) await(arrival, expert);
  return pending;
}

// Counts a block that waited for nothing, and notes when the last of them was done.
DEVICE void done(int* arrival, int hits) {
  if (threadIdx.x == 0 && atomicAdd(&arrival[HITS + LAUNCH], 1) == hits - 1) atomicMax(&arrival[ENDS + LAUNCH], NOW(arrival));
}
#else
DEVICE bool awaited(const int*, int) { return false; }
DEVICE void done(int*, int) {}
#endif

// A block's share: ROW_TILES * TURNS tiles of 16 rows of a matrix, or of two of them, for the pairs of one group.
template <Format F, Format UP, typename Write>
DEVICE void share(int block, const uint4* x, const int* table, int* arrival, int hits, const Stack& first, const Stack& second, Write write) {
  constexpr int staged = WARPS * STAGES * 16 * (Unit<F>::pitch > Unit<UP>::pitch ? Unit<F>::pitch : Unit<UP>::pitch);
  constexpr int summed = WARPS * TILES * 128 * 4;
  // Reads of a word may go 4 bytes past the last unit.
  __shared__ __align__(16) char shared[(staged > summed ? staged : summed) + 16];
  constexpr int block_rows = 16 * ROW_TILES * TURNS;
  table += block / SPANS * TABLE;
  const int slot = table[0], expert = table[1], count = table[2];
  if (slot < 0) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int part = warp / SLICES, begin = warp % SLICES, matrix = part / ROW_TILES;
  const int row = block % SPANS * block_rows, line = row + part % ROW_TILES * (16 * TURNS);
  const int tiles = (count + 7) / 8;
  const uint4* columns[TILES];
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    // Columns past the last repeat it; nobody reads their sums.
    columns[n] = x + (long long)(table[3 + min(n * 8 + g, count - 1)] / SHARE) * (WIDTH / 8) + t;
  float sums[TURNS][TILES][4] = {};
  const int start = warp * (staged / WARPS);
  const Stack& own = MATRICES == 2 && matrix == 1 ? second : first;
  const char* rows = own.data + slot * own.stride;
  const bool pending = awaited(arrival, expert);
  if (F == UP || matrix == 0)
    slice<F>(shared, start, rows + (long long)line * Unit<F>::row_bytes, begin, columns, tiles, sums);
  else
    slice<UP>(shared, start, rows + (long long)line * Unit<UP>::row_bytes, begin, columns, tiles, sums);
  // The slices are added up in their order.
  float* partial = (float*)shared;
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[((warp * TILES + n) * 4 + i) * 32 + lane] = sums[turn][n][i];
    __syncthreads();
    for (int at = threadIdx.x; at < count * 16 * ROW_TILES; at += WARPS * 32) {
      const int r = at % 16, tile = at / 16 % ROW_TILES, column = at / (16 * ROW_TILES);
      const int from = (column / 8 * 4 + (r >> 3) * 2 + (column & 1)) * 32 + (r & 7) * 4 + (column >> 1 & 3);
      float sum[2] = {};
#pragma unroll
      for (int m = 0; m < MATRICES; ++m)
#pragma unroll
        for (int k = 0; k < SLICES; ++k)
          sum[m] += partial[((m * ROW_TILES + tile) * SLICES + k) * TILES * 128 + from];
      write(table[3 + column], expert, row + (tile * TURNS + turn) * 16 + r, sum[0], sum[1]);
    }
  }
  if (!pending) done(arrival, hits);
}

enum Activation { silu, gelu, exact_gelu, relu, squared_relu, clamped };

// airjax/layers/mlp.py
template <Activation A> DEVICE float gated(float gate, float up) {
  if (A == silu) return gate / (1.0f + expf(-gate)) * up;
  if (A == relu) return fmaxf(gate, 0.0f) * up;
  if (A == squared_relu) return fmaxf(gate, 0.0f) * fmaxf(gate, 0.0f) * up;
  if (A == exact_gelu) return 0.5f * gate * (1.0f + erff(gate * 0.70710678f)) * up;
  if (A == gelu) return 0.5f * gate * (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate))) * up;
  gate = fminf(gate, 7.0f);
  up = fminf(fmaxf(up, -7.0f), 7.0f);
  return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
}
