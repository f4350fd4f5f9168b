// y = x W^T for matrices of records (airjax/quants/packed.py), on the tensor cores of compute capability 8.0 and up.
//
// kernels.py puts warps.cu in front, appends the entry point, which calls `share` for each format, and defines
//   ROWS      rows of x             COLUMN_TILES  ceil(ROWS / 8)
//   SPLITS    bfloat16 terms that make up one activation
//   ROW_TILES tiles of 16 rows of W that a block owns
//   SUPERS    n_in / 256
//
// The eight warps of a block take the records of its tiles in turn and add up their sums in a fixed order at the end.
// Nothing in a row's sum depends on the other rows of x.

#define WARPS 8

template <Format F> struct Sizes {
  static constexpr int low = F == Q8_0 ? 8 : 4;  // loads of 512 bytes
  static constexpr int high = F == Q5_K ? 1 : F == Q6_K ? 2 : 0;
  static constexpr int supers = F == Q4_K || F == Q5_K ? 64 : F == Q6_K ? 32 : 0;
  static constexpr int bytes = 512 * (low + high) + 256 + supers;
};

// What a lane needs of a record.
template <Format F> struct Lane {
  uint4 low[Sizes<F>::low];
  uint4 high[Sizes<F>::high ? Sizes<F>::high : 1];
  uint4 scales[2];
  u32 supers[2];
};

DEVICE uint4 load16(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <Format F> DEVICE void load(Lane<F>& to, const char* record, int lane) {
  typedef Sizes<F> S;
  const int g = lane >> 2;
#pragma unroll
  for (int i = 0; i < S::low; ++i) to.low[i] = load16(record + i * 512 + lane * 16);
#pragma unroll
  for (int i = 0; i < S::high; ++i) to.high[i] = load16(record + (S::low + i) * 512 + lane * 16);
  const char* scales = record + (S::low + S::high) * 512;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    to.scales[h] = load16(scales + (h * 8 + g) * 16);
    if (S::supers == 64) to.supers[h] = *(const u32*)(scales + 256 + (h * 8 + g) * 4);
    if (S::supers == 32) to.supers[h] = *(const unsigned short*)(scales + 256 + (h * 8 + g) * 2);
  }
}

// Two neighbouring weights as bfloat16: 128 + q, or q itself for Q8_0. `side` is the half of the group of 32,
// `pair` the first or second two of a lane's four.
template <Format F> DEVICE u32 weights(const Lane<F>& from, int group, int h, int side, int pair) {
  if (F == Q8_0) {
    u32 w = word(from.low[group], h * 2 + side);
    w = __byte_perm(w, 0, pair ? 0x4342 : 0x4140);  // bytes 0 and 1, or 2 and 3, in the low halves
    return signed_bytes(w);
  }
  const u32 w = word(from.low[group / 2], (group & 1) * 2 + h);
  u32 q = ((w >> (side * 4 + pair * 8)) & 0x000F000Fu) | MAGIC;
  if (F == Q5_K) {
    const u32 bits = word(from.high[0], group / 2);
    const int e = ((group & 1) * 2 + h) * 4 + side * 2 + pair;
    q |= (e >= 4 ? bits >> (e - 4) : bits << (4 - e)) & 0x00100010u;
  }
  if (F == Q6_K) {
    const u32 bits = word(from.high[group / 4], group & 3);
    const int e = (h * 4 + side * 2 + pair) * 2;
    q |= (e >= 4 ? bits >> (e - 4) : bits << (4 - e)) & 0x00300030u;
  }
  return q;
}

// A group's factor: its scale, or for formats with super-blocks the small integer that d multiplies.
template <Format F> DEVICE float factor(const Lane<F>& from, int group, int h, int side) {
  const u32 w = word(from.scales[h], group / 2);
  if (F == Q4_0 || F == Q8_0) return group & 1 ? half_high(w) : half_low(w);
  if (F == Q6_K) return (float)(signed char)(w >> ((group & 1) * 16 + side * 8));
  return (float)((w >> ((group & 1) * 16)) & 255);
}

// The small integer that dmin multiplies.
template <Format F> DEVICE float minimum(const Lane<F>& from, int group, int h) {
  return (float)((word(from.scales[h], group / 2) >> ((group & 1) * 16 + 8)) & 255);
}

// What takes the bias of `128 + q` away: -128, and -8 or -32 more where the format's own integers are signed.
template <Format F> DEVICE u32 bias() { return F == Q4_0 ? 0xC308C308u : F == Q6_K ? 0xC320C320u : 0xC300C300u; }

template <Format F>
DEVICE void multiply(const Lane<F> (&w)[ROW_TILES], const uint4* x, int g, float (&sums)[ROW_TILES][COLUMN_TILES][4]) {
  constexpr bool halves = F == Q6_K, minima = F == Q4_K || F == Q5_K, supers = halves || minima;
  // With one row the odd columns are empty.
  constexpr int step = ROWS == 1 ? 2 : 1;
  float scaled[ROW_TILES][COLUMN_TILES][4] = {}, offset[ROW_TILES][COLUMN_TILES][4] = {};
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    uint4 b[COLUMN_TILES][SPLITS];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
      for (int p = 0; p < SPLITS; ++p)
        // Columns past the last row of x repeat it; nobody reads their sums.
        b[n][p] = x[(p * ROWS + min(n * 8 + g, ROWS - 1)) * (SUPERS * 32) + group * 4];
    // A product with a constant: the sum of the activations times the bias, where the other sums will be.
    float start[COLUMN_TILES][2][4] = {};
    if (F != Q8_0) {
      const u32 k = bias<F>();
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int p = 0; p < SPLITS; ++p) {
          mma(start[n][0], k, k, k, k, b[n][p].x, b[n][p].y, start[n][0]);
          mma(start[n][halves], k, k, k, k, b[n][p].z, b[n][p].w, start[n][halves]);
        }
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      u32 a[2][4];
      float s[2][2], o[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          a[side][h] = weights<F>(w[m], group, h, side, 0);
          a[side][2 + h] = weights<F>(w[m], group, h, side, 1);
          if (side == 0 || halves) s[side][h] = factor<F>(w[m], group, h, side);
        }
        if (minima) o[h] = minimum<F>(w[m], group, h);
      }
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
        float c[2][4];
#pragma unroll
        for (int p = 0; p < SPLITS; ++p) {
          mma(c[0], a[0][0], a[0][1], a[0][2], a[0][3], b[n][p].x, b[n][p].y, p ? c[0] : start[n][0]);
          mma(c[halves], a[1][0], a[1][1], a[1][2], a[1][3], b[n][p].z, b[n][p].w,
              p || !halves ? c[halves] : start[n][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += step) {
          float& sum = supers ? scaled[m][n][i] : sums[m][n][i];
#pragma unroll
          for (int side = 0; side <= halves; ++side) sum = fmaf(s[side][i >> 1], c[side][i], sum);
          if (minima) offset[m][n][i] = fmaf(o[i >> 1], start[n][0][i], offset[m][n][i]);
        }
      }
    }
  }
  if (supers)
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += step) {
          const u32 d = w[m].supers[i >> 1];
          sums[m][n][i] = fmaf(half_low(d), scaled[m][n][i], sums[m][n][i]);
          if (minima) sums[m][n][i] = fmaf(half_high(d) * (1.0f / 128.0f), offset[m][n][i], sums[m][n][i]);
        }
}

// Up to three matrices of one format, whose tiles are numbered through.
struct Matrices {
  const char* records[3];
  float* y[3];
  int tiles[3];  // of each; 0 past the last

  DEVICE int count() const { return tiles[0] + tiles[1] + tiles[2]; }

  DEVICE const char* at(int tile, int bytes) const {
    int i = 0;
    if (tile >= tiles[0]) tile -= tiles[0], i = 1;
    if (i == 1 && tile >= tiles[1]) tile -= tiles[1], i = 2;
    return (i == 0 ? records[0] : i == 1 ? records[1] : records[2]) + (long long)tile * SUPERS * bytes;
  }

  DEVICE float* out(int tile, int column) const {
    int i = 0;
    if (tile >= tiles[0]) tile -= tiles[0], i = 1;
    if (i == 1 && tile >= tiles[1]) tile -= tiles[1], i = 2;
    const int rows = (i == 0 ? tiles[0] : i == 1 ? tiles[1] : tiles[2]) * 16;
    return (i == 0 ? y[0] : i == 1 ? y[1] : y[2]) + (long long)column * rows + tile * 16;
  }
};

// Adds up the warps' sums in their order and writes them.
DEVICE void finish(const float (&sums)[ROW_TILES][COLUMN_TILES][4], const Matrices& all, int first) {
  __shared__ float partial[WARPS][4][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, i = warp & 3;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 4; ++k) partial[warp][k][lane] = sums[m][n][k];
      __syncthreads();
      const int column = n * 8 + 2 * t + (i & 1);
      if (warp < 4 && column < ROWS && first + m < all.count()) {
        float sum = partial[0][i][lane];
#pragma unroll
        for (int k = 1; k < WARPS; ++k) sum += partial[k][i][lane];
        all.out(first + m, column)[(i >> 1) * 8 + g] = sum;
      }
    }
}

// A block's share of the tiles.
template <Format F> DEVICE void share(const uint4* x, const Matrices& all, int block, int blocks) {
  constexpr int bytes = Sizes<F>::bytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = all.count();
  x += lane & 3;
  for (int first = block * ROW_TILES; first < count; first += blocks * ROW_TILES) {
    float sums[ROW_TILES][COLUMN_TILES][4] = {};
    const char* record[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) record[m] = all.at(min(first + m, count - 1), bytes);
#pragma unroll 1
    for (int super = warp; super < SUPERS; super += WARPS) {
      Lane<F> w[ROW_TILES];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) load<F>(w[m], record[m] + super * bytes, lane);
      multiply<F>(w, x + super * 32, lane >> 2, sums);
    }
    finish(sums, all, first);
  }
}
