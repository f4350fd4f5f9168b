// What goes before the products of experts (experts.cu): pairs of a token and one of its experts are put together by
// expert, and activations become bfloat16 terms.
//
// mixture.py puts warps.cu in front, and defines
//   X_ROWS, WIDTH  of the activations
//   SPLITS   bfloat16 terms that make up one of them
//   PAIRS    how many pairs there are
//   EXPERTS  how many experts a layer has
//   COLUMNS  pairs of a group at most
//   GROUPS   how many groups there can be
//   SLOTS    1: where an expert lies stands in `slots`, negative if it is not there; 0: each has its place
//   WIDE     1: activations lie as wide.cu takes them
//   ARRIVING 1: some experts are fetched meanwhile (chunks.cu, which is then in front too)
//
// A row of the table is a group: its slot (-1: no group), its expert, how many pairs it has, and these. In which order
// they come makes no difference to any of them; experts that are fetched come last, in the order in which they arrive.

#define THREADS 512
#define TABLE (3 + COLUMNS)

DEVICE int slot_of(const int* slots, int expert) {
  if (expert < 0 || expert >= EXPERTS) return -1;
  return SLOTS ? slots[expert] : expert;
}

// *hits: how many groups are of experts that are there.
DEVICE void group(const int* pairs, const int* slots, const int* arrival, int* table, int* hits) {
  __shared__ int held[EXPERTS], first[EXPERTS], used;
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) held[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < PAIRS; p += THREADS) {
    const int expert = pairs[p];
    if (slot_of(slots, expert) >= 0) atomicAdd(&held[expert], 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int total = 0;
    for (int turn = 0; turn <= ARRIVING; ++turn) {
      for (int base = 0; base < EXPERTS; base += 32) {
        const int e = base + threadIdx.x;
        bool mine = e < EXPERTS;
#if ARRIVING
        mine = mine && arrival[PENDING + e] == turn;
#endif
        const int own = mine ? (held[e] + COLUMNS - 1) / COLUMNS : 0;
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(~0u, sum, step);
          if (threadIdx.x >= step) sum += other;
        }
        if (mine) first[e] = total + sum - own;
        total += __shfl_sync(~0u, sum, 31);
      }
      if (ARRIVING && threadIdx.x == 0 && turn == 0) *hits = total;
    }
    if (threadIdx.x == 0) used = total;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    const int slot = slot_of(slots, e), count = held[e];
    for (int i = 0; i * COLUMNS < count; ++i) {
      int* row = table + (first[e] + i) * TABLE;
      row[0] = slot, row[1] = e, row[2] = min(count - i * COLUMNS, COLUMNS);
    }
  }
  for (int i = used + threadIdx.x; i < GROUPS; i += THREADS) table[i * TABLE] = -1;
  __syncthreads();
  for (int p = threadIdx.x; p < PAIRS; p += THREADS) {
    const int expert = pairs[p];
    if (slot_of(slots, expert) < 0) continue;
    const int rank = atomicSub(&held[expert], 1) - 1;
    table[(first[expert] + rank / COLUMNS) * TABLE + 3 + rank % COLUMNS] = p;
  }
}

// Eight activations of a lane: fours 16 apart, each as pairs (0, 2) and (1, 3).
DEVICE void split_rows(const float4* x, uint4* to, int at) {
  if (at >= X_ROWS * (WIDTH / 8)) return;
  const int lane = at & 3;
  float4 halves[2] = {x[(at - lane) * 2 + lane], x[(at - lane) * 2 + 4 + lane]};
#pragma unroll
  for (int p = 0; p < SPLITS; ++p) {
    u32 words[4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float4& v = halves[side];
      const unsigned short a = bfloat16(v.x), b = bfloat16(v.y), c = bfloat16(v.z), d = bfloat16(v.w);
      words[side * 2] = a | (u32)c << 16;
      words[side * 2 + 1] = b | (u32)d << 16;
      v.x -= widened(a), v.y -= widened(b), v.z -= widened(c), v.w -= widened(d);
    }
    uint4* own = to + p * (X_ROWS * (WIDTH / 8)) + at;
#if WIDE
#pragma unroll
    for (int i = 0; i < 4; ++i) ((u32*)(own - lane))[i * 4 + lane] = words[i];
#else
    uint4 all;
    all.x = words[0], all.y = words[1], all.z = words[2], all.w = words[3];
    *own = all;
#endif
  }
}

DEVICE void prepare(const float4* x, const int* pairs, const int* slots, const int* arrival, uint4* to, int* table, int* hits) {
  if (blockIdx.x == 0)
    group(pairs, slots, arrival, table, hits);
  else
    split_rows(x, to, (blockIdx.x - 1) * THREADS + threadIdx.x);
}
