// Attention of one new token of each sequence over its cache: norm and rope of the new query and key, the new key and
// value into the cache, scores, softmax and the sum of the values, in one launch, and a second where a sequence has
// several splits.
//
// attending.py puts warps.cu in front, appends the entry points, and defines
//   HEADS, GROUP, WIDTH   heads of keys and values, heads of queries to each, elements of each
//   STORED                0: the cache is float32, 1: float16, 2: bfloat16
//   PAGED                 1: in pages, of which a table of COLUMNS has those of each sequence; 0: a row of slots each
//   SLOTS                 of a page, or of a row, where position p lies in slot p % SLOTS
//   SPLITS, CHUNKS        blocks that share a sequence's slots, and how often each takes CHUNK of them
//   CHUNK                 slots that are looked at together; a page has a multiple
//   WINDOW, CHUNKED       as AttentionForm has them
//   SCALE, SOFTCAP        of the scores
//   NORM, EPS             1: queries and keys are normed by the head
//   PAIRS, INTERLEAVED, ROPE_SCALE   that are rotated, whether they are neighbours, and by what they grow
//   SINKS                 1: each head has a score that gives nothing
//   THREADS               of a block that attends
//
// Sums are taken slot by slot in an order that follows from the position alone, so a sequence's bits do not depend on
// the batch.

#define NOTHING (-1e30f)
#define PADDED ((GROUP + 3) / 4 * 4)

#if STORED == 0
typedef float Stored;
struct __align__(8) Pair { float low, high; };
DEVICE Stored stored(float v) { return v; }
DEVICE float value_of(Stored v) { return v; }
DEVICE float first_of(const Pair& v) { return v.low; }
DEVICE float second_of(const Pair& v) { return v.high; }
#else
typedef unsigned short Stored;
struct Pair { u32 both; };
DEVICE Stored stored(float v) { return STORED == 1 ? float16(v) : bfloat16(v); }
DEVICE float first_of(const Pair& v) { return STORED == 1 ? half_low(v.both) : __uint_as_float(v.both << 16); }
DEVICE float second_of(const Pair& v) { return STORED == 1 ? half_high(v.both) : __uint_as_float(v.both & 0xFFFF0000u); }
DEVICE float value_of(Stored v) {
  const Pair pair = {v};
  return first_of(pair);
}
#endif

// Elements in 16 bytes, and the pairs in them.
#define PIECE (16 / (int)sizeof(Stored))
struct __align__(16) Piece { Pair pairs[PIECE / 2]; };

struct Given {
  const int *positions, *table;
  const float *q, *k, *v, *q_norm, *k_norm, *frequencies, *sinks;
  Stored *keys, *values;
};

DEVICE int first_seen(int position) {
  if (!WINDOW) return 0;
  return CHUNKED ? position / max(WINDOW, 1) * WINDOW : max(position - WINDOW + 1, 0);
}

// The slots that a token may see, from the first to one past the last; those of a row that has wrapped are looked at one by one.
DEVICE int slots_from(int position) { return PAGED || position < SLOTS ? first_seen(position) : 0; }
DEVICE int slots_to(int position) { return PAGED ? position + 1 : min(position + 1, SLOTS); }

// The position of what a slot holds.
DEVICE int held_in(int slot, int position) {
  return PAGED || position < SLOTS ? slot : position - (position % SLOTS - slot + SLOTS) % SLOTS;
}

// Where a head's rows begin from a slot on, which lie side by side up to the end of the page.
DEVICE long long rows_at(int page, int head, int slot) {
  return (((long long)page * HEADS + head) * SLOTS + (PAGED ? slot % SLOTS : slot)) * WIDTH;
}

// A warp norms and turns one head of the new token. What it reads is asked for before anything is computed.
DEVICE void turned(const float* from, const float* weight, const float* frequencies, int position, float* to) {
  constexpr int elements = (WIDTH + 31) / 32, pairs = (PAIRS + 31) / 32;
  const int lane = threadIdx.x & 31;
  float x[elements], w[elements], c[pairs + 1], s[pairs + 1];
#pragma unroll
  for (int j = 0; j < elements; ++j) {
    const int i = lane + 32 * j;
    x[j] = i < WIDTH ? from[i] : 0.0f;
    w[j] = NORM && i < WIDTH ? weight[i] : 1.0f;
  }
#pragma unroll
  for (int j = 0; j < pairs; ++j) {
    sincosf((float)position * frequencies[min(lane + 32 * j, PAIRS - 1)], &s[j], &c[j]);
    s[j] *= ROPE_SCALE, c[j] *= ROPE_SCALE;
  }
  float factor = 1.0f;
  if (NORM) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < elements; ++j) squares += x[j] * x[j];
    factor = rsqrtf(sum_of_warp(squares) / WIDTH + EPS);
  }
#pragma unroll
  for (int j = 0; j < elements; ++j)
    if (lane + 32 * j < WIDTH) to[lane + 32 * j] = x[j] * factor * w[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < pairs; ++j) {
    const int i = lane + 32 * j, a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + PAIRS;
    if (i >= PAIRS) break;
    const float first = to[a], second = to[b];
    to[a] = first * c[j] - second * s[j];
    to[b] = first * s[j] + second * c[j];
  }
  __syncwarp();
}

// A block's share: CHUNKS * CHUNK slots of one head of keys and values of a sequence. With several splits `out` is
// [B, HEADS, SPLITS, GROUP, WIDTH], and `sums` has the largest score of each and the sum of their exponentials.
DEVICE void attend(const Given& given, float* out, float* sums) {
  constexpr int halves = WIDTH / 2, parts = THREADS / halves, held_rows = (CHUNK + parts - 1) / parts;
  constexpr int pitch = WIDTH * (int)sizeof(Stored) + 16;
  constexpr int tile_bytes = CHUNK * pitch, summed = parts * GROUP * WIDTH * 4;
  __shared__ __align__(16) char tile[tile_bytes > summed ? tile_bytes : summed];
  __shared__ __align__(16) float queries[(GROUP + 1) * WIDTH];
  __shared__ __align__(16) float weights[CHUNK * PADDED];
  __shared__ float largest[PADDED], total[PADDED], factor[PADDED];
  __shared__ Stored fresh[WIDTH];
  const int split = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS % HEADS, sequence = blockIdx.x / (SPLITS * HEADS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int position = given.positions[sequence];
  // Of the split's first page, asked for together with the position.
  const int page = PAGED ? given.table[sequence * COLUMNS + min(split * CHUNKS * CHUNK / SLOTS, COLUMNS - 1)] : sequence;
  const long long heads = (long long)sequence * HEADS + head;
  if (position < 0) {
    for (int at = threadIdx.x; SPLITS == 1 && at < GROUP * WIDTH; at += THREADS) out[heads * GROUP * WIDTH + at] = 0.0f;
    return;
  }
  const int low = slots_from(position), high = slots_to(position), oldest = first_seen(position);
  const int own = PAGED ? position : position % SLOTS;
  const int begin = max(split * CHUNKS * CHUNK, low / CHUNK * CHUNK), end = min((split + 1) * CHUNKS * CHUNK, high);
  if (begin >= end) return;
  const int pair = threadIdx.x % halves, part = threadIdx.x / halves;
  float made[GROUP][2] = {};
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk += CHUNK) {
    const bool first_page = !PAGED || chunk / SLOTS == split * CHUNKS * CHUNK / SLOTS;
    const long long base = rows_at(first_page ? page : given.table[sequence * COLUMNS + chunk / SLOTS], head, chunk);
    // Keys come while the query is turned, values while scores are made.
    for (int at = threadIdx.x; at < CHUNK * (WIDTH / PIECE); at += THREADS) {
      const int row = at / (WIDTH / PIECE), piece = at % (WIDTH / PIECE), slot = chunk + row;
      if (slot >= low && slot < high && slot != own)
        copy16(tile + row * pitch + piece * 16, given.keys + base + row * WIDTH + piece * PIECE);
    }
    copies_end();
    Pair held[held_rows] = {};
#pragma unroll
    for (int i = 0; i < held_rows; ++i) {
      const int row = part + i * parts, slot = chunk + row;
      if (part < parts && row < CHUNK && slot >= low && slot < high && slot != own)
        held[i] = *(const Pair*)(given.values + base + row * WIDTH + 2 * pair);
    }
    if (chunk == begin) {
      // Whose split holds the new token's slot needs its key.
      const int heads_here = GROUP + (own >= begin && own < end);
#pragma unroll 1
      for (int row = warp; row < heads_here; row += THREADS / 32)
        turned(row < GROUP ? given.q + (heads * GROUP + row) * WIDTH : given.k + heads * WIDTH,
            row < GROUP ? given.q_norm : given.k_norm, given.frequencies, position, queries + row * WIDTH);
      if (threadIdx.x < PADDED) largest[threadIdx.x] = NOTHING, total[threadIdx.x] = 0.0f;
      __syncthreads();
    }
    copies_wait<0>();
    if (own >= chunk && own < chunk + CHUNK)
      for (int i = threadIdx.x; i < WIDTH; i += THREADS) {
        const Stored key = stored(queries[GROUP * WIDTH + i]), value = stored(given.v[heads * WIDTH + i]);
        const long long at = base + (own - chunk) * WIDTH + i;
        ((Stored*)(tile + (own - chunk) * pitch))[i] = key;
        fresh[i] = value;
        given.keys[at] = key;
        given.values[at] = value;
      }
    __syncthreads();
    constexpr int teams = THREADS / CHUNK, each = (GROUP + teams - 1) / teams;
    const int row = threadIdx.x % CHUNK, team = threadIdx.x / CHUNK, slot = chunk + row;
    float dots[each] = {};
#pragma unroll 4
    for (int at = 0; at < WIDTH; at += PIECE) {
      const Piece key = *(const Piece*)(tile + row * pitch + at * sizeof(Stored));
#pragma unroll
      for (int e = 0; e < each; ++e) {
        const float* query = queries + min(team + e * teams, GROUP - 1) * WIDTH + at;
#pragma unroll
        for (int i = 0; i < PIECE / 4; ++i) {
          const float4 four = *(const float4*)(query + 4 * i);
          dots[e] = fmaf(first_of(key.pairs[2 * i]), four.x, dots[e]);
          dots[e] = fmaf(second_of(key.pairs[2 * i]), four.y, dots[e]);
          dots[e] = fmaf(first_of(key.pairs[2 * i + 1]), four.z, dots[e]);
          dots[e] = fmaf(second_of(key.pairs[2 * i + 1]), four.w, dots[e]);
        }
      }
    }
    const bool seen = slot >= low && slot < high && held_in(slot, position) >= oldest;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if (team + e * teams < GROUP) {
        float score = dots[e] * SCALE;
        if (SOFTCAP > 0.0f) score = SOFTCAP * tanhf(score / SOFTCAP);
        weights[row * PADDED + team + e * teams] = seen ? score : NOTHING;
      }
    __syncthreads();
    for (int g = warp; g < GROUP; g += THREADS / 32) {
      float most = largest[g], sum = 0.0f;
      const float before = most;
      for (int i = lane; i < CHUNK; i += 32) most = fmaxf(most, weights[i * PADDED + g]);
      most = largest_of_warp(most);
      for (int i = lane; i < CHUNK; i += 32) {
        const float score = weights[i * PADDED + g], weight = score > NOTHING ? expf(score - most) : 0.0f;
        weights[i * PADDED + g] = weight;
        sum += weight;
      }
      sum = sum_of_warp(sum);
      if (lane == 0) {
        factor[g] = expf(before - most);
        total[g] = total[g] * factor[g] + sum;
        largest[g] = most;
      }
    }
    __syncthreads();
    if (chunk > begin)
#pragma unroll
      for (int g = 0; g < GROUP; ++g) made[g][0] *= factor[g], made[g][1] *= factor[g];
#pragma unroll
    for (int i = 0; i < held_rows; ++i) {
      const int at = part + i * parts;
      if (part >= parts || at >= CHUNK) break;
      float first = first_of(held[i]), second = second_of(held[i]);
      if (chunk + at == own) first = value_of(fresh[2 * pair]), second = value_of(fresh[2 * pair + 1]);
#pragma unroll
      for (int g = 0; g < PADDED; g += 4) {
        const float4 four = *(const float4*)(weights + at * PADDED + g);
        const float own_weights[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (g + j < GROUP) {
            made[g + j][0] = fmaf(own_weights[j], first, made[g + j][0]);
            made[g + j][1] = fmaf(own_weights[j], second, made[g + j][1]);
          }
      }
    }
    // The next chunk overwrites keys and weights.
    __syncthreads();
  }
  float* partial = (float*)tile;
  if (part < parts)
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float* to = partial + (part * GROUP + g) * WIDTH + 2 * pair;
      to[0] = made[g][0], to[1] = made[g][1];
    }
  __syncthreads();
  for (int at = threadIdx.x; at < GROUP * WIDTH; at += THREADS) {
    const int g = at / WIDTH;
    float sum = 0.0f;
    for (int i = 0; i < parts; ++i) sum += partial[i * GROUP * WIDTH + at];
    if (SPLITS > 1) {
      out[(heads * SPLITS + split) * GROUP * WIDTH + at] = sum;
      continue;
    }
    float divisor = total[g];
    if (SINKS) {
      const float sink = given.sinks[head * GROUP + g], most = fmaxf(largest[g], sink);
      sum *= expf(largest[g] - most);
      divisor = divisor * expf(largest[g] - most) + expf(sink - most);
    }
    out[heads * GROUP * WIDTH + at] = sum / divisor;
  }
  if (SPLITS > 1 && threadIdx.x < GROUP) {
    float* to = sums + ((heads * SPLITS + split) * GROUP + threadIdx.x) * 2;
    to[0] = largest[threadIdx.x], to[1] = total[threadIdx.x];
  }
}

// Puts the splits of one head of queries together; a block each.
DEVICE void combine(const int* positions, const float* made, const float* sums, const float* sinks, float* out) {
  const int head = blockIdx.x / GROUP % HEADS, g = blockIdx.x % GROUP, sequence = blockIdx.x / (GROUP * HEADS);
  const int position = positions[sequence];
  const long long heads = (long long)sequence * HEADS + head;
  const bool mine = threadIdx.x < WIDTH;
  float value = 0.0f, most = NOTHING, divisor = 0.0f;
  if (position >= 0) {
    constexpr int slots = CHUNKS * CHUNK;
    const int from = slots_from(position) / slots, to = (slots_to(position) + slots - 1) / slots;
    if (SINKS) most = sinks[head * GROUP + g];
    const float sink = most;
    for (int split = from; split < to; ++split) most = fmaxf(most, sums[((heads * SPLITS + split) * GROUP + g) * 2]);
    if (SINKS) divisor = expf(sink - most);
    for (int split = from; split < to; ++split) {
      const long long at = (heads * SPLITS + split) * GROUP + g;
      const float factor = expf(sums[at * 2] - most);
      divisor = fmaf(factor, sums[at * 2 + 1], divisor);
      if (mine) value = fmaf(factor, made[at * WIDTH + threadIdx.x], value);
    }
    value /= divisor;
  }
  if (mine) out[(heads * GROUP + g) * WIDTH + threadIdx.x] = value;
}
