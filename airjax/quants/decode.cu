// Matrices decoded to bfloat16, for products of many rows: as fast as memory takes them. What XLA makes of the same
// arithmetic takes several times as long.
//
// decoding.py puts warps.cu in front, appends the entry point, and defines
//   WIDTH    n_in
//   ROWS     rows that are decoded, from a given one on
//   THREADS  of a block
// Every weight is scale * q + offset, rounded once to float32 and once to bfloat16, as in airjax/quants/groups.py.

template <Format F> struct Block {
  static constexpr bool super = F == Q4_K || F == Q5_K || F == Q6_K;
  static constexpr int weights = super ? 256 : 32;
  static constexpr int bytes = F == Q4_0 ? 18 : F == Q8_0 ? 34 : F == MXFP4 ? 17 : F == Q4_K ? 144 : F == Q5_K ? 176 : 210;
  static constexpr int align = F == Q4_K || F == Q5_K ? 8 : F == MXFP4 ? 1 : 2;
};

// Eight bytes from anywhere that the alignment allows.
template <int ALIGN> DEVICE void eight_bytes(const unsigned char* at, u32 (&w)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned char* from = at + 4 * i;
    if (ALIGN >= 4) w[i] = *(const u32*)from;
    else if (ALIGN == 2) w[i] = *(const unsigned short*)from | (u32)*(const unsigned short*)(from + 2) << 16;
    else w[i] = from[0] | (u32)from[1] << 8 | (u32)from[2] << 16 | (u32)from[3] << 24;
  }
}

DEVICE u32 two_bytes(const unsigned char* at) { return *(const unsigned short*)at; }

// Twice a 4-bit float.
DEVICE int e2m1(u32 code) {
  const int m = code & 7, size = m + max(m - 4, 0) + 2 * max(m - 6, 0);
  return code & 8 ? -size : size;
}

// Weights `at` to at + 7 of a block, of which at is a multiple of 8: q, their scale and their offset.
template <Format F> DEVICE void eight(const unsigned char* block, int at, int (&q)[8], float& scale, float& offset) {
  u32 w[2];
  offset = 0.0f;
  const int group = at >> 5, in = at & 31;
  if (F == Q4_0 || F == MXFP4) {
    eight_bytes<Block<F>::align>(block + (F == Q4_0 ? 2 : 1) + (at & 15), w);
    const int shift = at & 16 ? 4 : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 code = w[i >> 2] >> ((i & 3) * 8 + shift) & 15;
      q[i] = F == Q4_0 ? (int)code - 8 : e2m1(code);
    }
    scale = F == Q4_0 ? half_low(two_bytes(block)) : __uint_as_float(block[0] < 2 ? 0 : (u32)(block[0] - 1) << 23);
  }
  if (F == Q8_0) {
    eight_bytes<2>(block + 2 + at, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = (signed char)(w[i >> 2] >> (i & 3) * 8);
    scale = half_low(two_bytes(block));
  }
  if (F == Q4_K || F == Q5_K) {
    const unsigned char* s = block + 4;
    const u32 low = s[group & 3], middle = s[4 + (group & 3)], high = s[8 + (group & 3)];
    const u32 factor = group < 4 ? low & 63 : (high & 15) | (low >> 2 & 48);
    const u32 minimum = group < 4 ? middle & 63 : high >> 4 | (middle >> 2 & 48);
    const u32 d = *(const u32*)block;
    scale = half_low(d) * (float)factor;
    offset = -(half_high(d) * (float)minimum);
    eight_bytes<8>(block + (F == Q5_K ? 48 : 16) + group / 2 * 32 + in, w);
    u32 fifth[2] = {0, 0};
    if (F == Q5_K) eight_bytes<8>(block + 16 + in, fifth);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int byte = (i & 3) * 8;
      q[i] = w[i >> 2] >> (byte + (group & 1) * 4) & 15;
      if (F == Q5_K) q[i] |= (fifth[i >> 2] >> (byte + group) & 1) << 4;
    }
  }
  if (F == Q6_K) {
    const int half = at >> 7, quarter = at >> 5 & 3;
    u32 bits[2];
    eight_bytes<2>(block + half * 64 + (quarter & 1) * 32 + in, w);
    eight_bytes<2>(block + 128 + half * 32 + in, bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int byte = (i & 3) * 8;
      const u32 low = w[i >> 2] >> (byte + quarter / 2 * 4) & 15, high = bits[i >> 2] >> (byte + quarter * 2) & 3;
      q[i] = (int)(low | high << 4) - 32;
    }
    scale = half_low(two_bytes(block + 208)) * (float)(signed char)block[192 + (at >> 4)];
  }
}

// Two weights. A sum with 0 would lose the sign of a zero.
template <Format F> DEVICE u32 pair(int a, int b, float scale, float offset) {
  float first = scale * (float)a, second = scale * (float)b;
  if (F == Q4_K || F == Q5_K) first += offset, second += offset;
  return bfloat16(first) | (u32)bfloat16(second) << 16;
}

// Rows of blocks as they lie in the file, from row *first on; y [ROWS, WIDTH].
template <Format F> DEVICE void decode(const char* rows, const int* first, uint4* y) {
  constexpr int row_bytes = WIDTH / Block<F>::weights * Block<F>::bytes;
  const long long id = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (id >= (long long)ROWS * (WIDTH / 8)) return;
  const int row = (int)(id / (WIDTH / 8)), at = (int)(id % (WIDTH / 8)) * 8;
  const unsigned char* block =
      (const unsigned char*)rows + (long long)(*first + row) * row_bytes + at / Block<F>::weights * Block<F>::bytes;
  int q[8];
  float scale, offset;
  eight<F>(block, at % Block<F>::weights, q, scale, offset);
  uint4 v;
  v.x = pair<F>(q[0], q[1], scale, offset), v.y = pair<F>(q[2], q[3], scale, offset);
  v.z = pair<F>(q[4], q[5], scale, offset), v.w = pair<F>(q[6], q[7], scale, offset);
  y[id] = v;
}

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Records (airjax/quants/packed.py) from the tile of 16 rows that row *first begins; a warp each. y [ROWS, WIDTH].
template <Format F> DEVICE void decode_records(const char* records, const int* first, uint2* y) {
  constexpr int lows = F == Q8_0 ? 8 : 4, highs = F == Q5_K ? 1 : F == Q6_K ? 2 : 0;  // loads of 512 bytes
  constexpr int supers = F == Q4_K || F == Q5_K ? 4 : F == Q6_K ? 2 : 0;              // bytes of a row
  constexpr int record_bytes = 512 * (lows + highs) + 256 + 16 * supers, wide = WIDTH / 256;
  const int warp = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if (warp >= ROWS / 16 * wide) return;
  const char* record = records + ((long long)(*first / 16) * wide + warp) * record_bytes;
  const uint4* parts = (const uint4*)record + lane;
  uint4 low[lows], high[highs ? highs : 1];
#pragma unroll
  for (int i = 0; i < lows; ++i) low[i] = parts[i * 32];
#pragma unroll
  for (int i = 0; i < highs; ++i) high[i] = parts[(lows + i) * 32];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = g + 8 * h;
    const char* scales = record + 512 * (lows + highs);
    const uint4 own = *(const uint4*)(scales + row * 16);
    u32 d = 0;
    if (supers == 4) d = *(const u32*)(scales + 256 + row * 4);
    if (supers == 2) d = two_bytes((const unsigned char*)scales + 256 + row * 2);
    uint2* to = y + ((long long)(warp / wide * 16 + row) * WIDTH + warp % wide * 256) / 4 + t;
#pragma unroll
    for (int group = 0; group < 8; ++group) {
      // Two bytes of scales a group.
      const u32 two = word_of(own, group >> 1) >> (group & 1) * 16 & 0xFFFF;
      float scale = half_low(two), offset = 0.0f;
      if (supers == 4) scale = half_low(d) * (float)(two & 255), offset = -(half_high(d) * (float)(two >> 8));
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (F == Q6_K) scale = half_low(d) * (float)(signed char)(two >> side * 8);
        const u32 w = F == Q8_0 ? word_of(low[group], h * 2 + side) : word_of(low[group >> 1], (group & 1) * 2 + h);
        int q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (F == Q8_0) {
            q[i] = (signed char)(w >> i * 8);
            continue;
          }
          // Bytes 0, 2, 1, 3: neighbours lie 16 bits apart.
          q[i] = w >> ((i & 1) * 16 + (i >> 1) * 8 + side * 4) & 15;
          const int place = ((F == Q5_K ? group & 1 : 0) * 2 + h) * 4 + side * 2 + (i >> 1);
          if (F == Q5_K) q[i] |= (word_of(high[0], group >> 1) >> (place + (i & 1) * 16) & 1) << 4;
          if (F == Q6_K) q[i] |= (word_of(high[group >> 2], group & 3) >> (place * 2 + (i & 1) * 16) & 3) << 4;
          if (F == Q4_0) q[i] -= 8;
          if (F == Q6_K) q[i] -= 32;
        }
        uint2 v;
        v.x = pair<F>(q[0], q[1], scale, offset), v.y = pair<F>(q[2], q[3], scale, offset);
        to[group * 8 + side * 4] = v;
      }
    }
  }
}
