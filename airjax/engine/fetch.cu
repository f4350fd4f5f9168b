// Finds slots for the experts that a layer's router chose and that are not in the pool; and brings them there from host
// memory, or leaves that to the kernels that multiply (quants/experts.cu).
//
// fetch.py puts quants/chunks.cu in front, and defines
//   EXPERTS    of a layer                 PAIRS      entries of `chosen`
//   SLOTS      of the pool                COPIES     1: airjax_fetch; 0: airjax_assign, which copies nothing
// and for copies
//   SLOT_BYTES of one slot                PARTS      tensors of an expert
//   PART_BYTES, PART_OFFSETS of each: {..., ...}
//
// Of airjax_fetch every block finds out for itself which experts are missing and which slots they take, and copies its
// share of the bytes. All of them read the old tables; the block that is done last writes the new ones. airjax_assign is
// one block.

#define THREADS 256
#define WARPS (THREADS / 32)

// How many threads before this one hold `yes`; *total is how many of all. All threads of the block call it.
DEVICE int rank_of(bool yes, int* total) {
  __shared__ int held[WARPS];
  const u32 votes = __ballot_sync(0xffffffffu, yes);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) held[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), all = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += held[w];
    all += held[w];
  }
  __syncthreads();
  *total = all;
  return before;
}

// Whether a slot, if it is one, holds nothing that the layer needs.
DEVICE bool is_free(int slot, const int* held, const unsigned char* needed, int first) {
  if (slot < 0) return false;
  const int expert = held[slot] - first;
  return expert < 0 || expert >= EXPERTS || !needed[expert];
}

// chosen [PAIRS]: experts, negative for none.
// info [1 + 2 PARTS]: number of the layer's first unit; address of each tensor's first expert, low word first.
// order [SLOTS]: slots in the order in which they are given away.
// wanted: 1 for each unit that is worth a slot of its own.
// table: slot of each unit, negative if it is not there.  held [SLOTS]: unit in each slot, negative for none.
// given [4]: where those in transit begin; blocks that are done, 0 between launches; where the others begin; how many
// slots of the order are in transit, for experts that are not wanted.
// uses: how many tokens chose each unit.  fetched [layers][2]: experts; nanoseconds.
// where [EXPERTS]: slot of each expert of the layer, negative if it is not there.  arrival: see chunks.cu.
#if COPIES
extern "C" __global__ void __launch_bounds__(THREADS) airjax_fetch(
    const int* chosen, const int* info, const int* order, const int* wanted, int* table, int* held,
    int* given, int* uses, int* fetched, char* pool, int* where) {
#else
extern "C" __global__ void __launch_bounds__(THREADS) airjax_assign(
    const int* chosen, const int* info, const int* order, const int* wanted, int* table, int* held,
    int* given, int* uses, int* fetched, int* where, int* arrival) {
#endif
  __shared__ unsigned char needed[EXPERTS];
  __shared__ short expert_of[EXPERTS];
  __shared__ int slot_of[EXPERTS];
  __shared__ int inner[EXPERTS], outer[EXPERTS];
  __shared__ int inner_taken, outer_taken;
#if COPIES
  __shared__ int last;
#endif
  const u64 begin = nanoseconds();
  const int thread = threadIdx.x, first = info[0];
  for (int e = thread; e < EXPERTS; e += THREADS) needed[e] = 0;
  __syncthreads();
  for (int p = thread; p < PAIRS; p += THREADS) {
    const int e = chosen[p];
    if (e >= 0) {
      needed[e] = 1;
      if (blockIdx.x == 0) atomicAdd(&uses[first + e], 1);
    }
  }
  __syncthreads();
  int missing = 0, staying = 0;
  for (int base = 0; base < EXPERTS; base += THREADS) {
    const int e = base + thread;
    const bool absent = e < EXPERTS && needed[e] && table[first + e] < 0;
    const bool stays = absent && wanted[first + e];
    int absents, stay;
    const int rank = missing + rank_of(absent, &absents), stay_rank = staying + rank_of(stays, &stay);
    if (absent) {
      expert_of[rank] = e;
      // Its rank among those that stay, or below 0 among those that pass.
      slot_of[rank] = stays ? stay_rank : -1 - (rank - stay_rank);
    }
    missing += absents, staying += stay;
  }
  const int passing = missing - staying;
  // The slots that hold nothing that this layer needs now, first those in transit, then as many others as are needed.
  const int inner_begin = given[0], outer_begin = given[2], transit = given[3];
  const int others = SLOTS - transit, turn = others > 0 ? others : 1;
  int inner_frees = 0, outer_frees = 0;
  if (thread == 0) inner_taken = outer_taken = 0;
  __syncthreads();
  for (int at = 0; inner_frees < missing && at < transit; at += THREADS) {
    const int place = at + thread;
    const int slot = place < transit ? order[(inner_begin + place) % transit] : -1;
    const bool free = is_free(slot, held, needed, first);
    int count;
    const int rank = inner_frees + rank_of(free, &count);
    if (free) {
      if (rank < EXPERTS) inner[rank] = slot;
      if (rank < passing) atomicMax(&inner_taken, place + 1);
    }
    inner_frees += count;
  }
  const int turned = passing < inner_frees ? passing : inner_frees;
  for (int at = 0; outer_frees < missing - turned && at < others; at += THREADS) {
    const int place = at + thread;
    const int slot = place < others ? order[transit + (outer_begin + place) % turn] : -1;
    const bool free = is_free(slot, held, needed, first);
    int count;
    const int rank = outer_frees + rank_of(free, &count);
    if (free) {
      if (rank < EXPERTS) outer[rank] = slot;
      if (rank < staying) atomicMax(&outer_taken, place + 1);
    }
    outer_frees += count;
  }
  __syncthreads();
  for (int i = thread; i < missing; i += THREADS) {
    const int rank = slot_of[i], place = rank >= 0 ? rank : staying + (-1 - rank) - turned;
    if (rank < 0 && -1 - rank < turned) slot_of[i] = inner[-1 - rank];
    else slot_of[i] = place < outer_frees ? outer[place] : inner[turned + place - outer_frees];
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int e = thread; e < EXPERTS; e += THREADS) where[e] = table[first + e];
    __syncthreads();
    for (int i = thread; i < missing; i += THREADS) {
      // What leaves may be of this layer too.
      const int old = held[slot_of[i]];
      if (old >= first && old < first + EXPERTS) where[old - first] = -1;
    }
    __syncthreads();
    for (int i = thread; i < missing; i += THREADS) where[expert_of[i]] = slot_of[i];
  }
#if COPIES
  if (!missing) return;
  constexpr int part_bytes[PARTS] = PART_BYTES, part_offsets[PARTS] = PART_OFFSETS;
  int chunks = 0;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) chunks += chunks_of(part_bytes[part], THREADS);
  for (int job = blockIdx.x; job < missing * chunks; job += gridDim.x) {
    const int i = job / chunks;
    int chunk = job % chunks;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int own = chunks_of(part_bytes[part], THREADS);
      if (chunk >= 0 && chunk < own)
        copy_chunk<THREADS>(address(info, part) + (u64)expert_of[i] * part_bytes[part],
            pool + (u64)slot_of[i] * SLOT_BYTES + part_offsets[part], part_bytes[part], chunk);
      chunk -= own;
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) last = atomicAdd(&given[1], 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
#else
  for (int i = thread; i < ARRIVAL_SIZE(EXPERTS); i += THREADS) arrival[i] = 0;
  __syncthreads();
  if (thread == 0) arrival[MISSING] = missing, arrival[BEGIN] = (int)begin;
  for (int i = thread; i < missing; i += THREADS) {
    arrival[PENDING + expert_of[i]] = 1;
    arrival[PENDING + EXPERTS + i] = expert_of[i];
    arrival[PENDING + 2 * EXPERTS + i] = slot_of[i];
  }
  if (!missing) return;
  __syncthreads();
#endif
  for (int i = thread; i < missing; i += THREADS) {
    const int old = held[slot_of[i]];
    if (old >= 0) table[old] = -1;
  }
  __syncthreads();
  for (int i = thread; i < missing; i += THREADS) {
    table[first + expert_of[i]] = slot_of[i];
    held[slot_of[i]] = first + expert_of[i];
  }
  if (thread == 0) {
    given[0] = (inner_begin + inner_taken) % transit;
    given[2] = (outer_begin + outer_taken) % turn;
    given[1] = 0;
    fetched[2 * (first / EXPERTS)] += missing;
#if COPIES
    fetched[2 * (first / EXPERTS) + 1] += (int)(nanoseconds() - begin);
#endif
  }
}
