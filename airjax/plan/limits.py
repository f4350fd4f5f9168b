"""The numbers that plans are made with, and where they come from."""

from __future__ import annotations

from airjax import models

PREFILL_CHUNK = 512
# More tokens share a sweep, and the decoding of its weights, where that costs nothing else on the device.
WIDE_CHUNKS = (2048, 1024)
# Where experts are streamed, a long prompt needs nearly all of them in each sweep, however many tokens it has: there it
# may cost such a share of the experts' slots.
EXPERT_CHUNK_SHARE = 0.07
EMBEDDING = "token_embd.weight"
# An embedding that has a part for each layer. Of both a sweep reads the rows of its tokens alone.
PER_LAYER = "per_layer_token_embd.weight"
TABLES = (EMBEDDING, PER_LAYER)
EXPERT_TENSORS = tuple(f"{name}.weight" for name in models.EXPERT_STACKS)
# Where fused kernels may exist; whether they do is known when the device is there.
KERNEL_BACKENDS = ("gpu", "cuda")
# Positions of one page of a batch's cache.
KV_PAGE = 64
# Bytes of a block of positions that the shuttle sends in one piece. An H100's link reached 37, 47 and 49 GB/s with 32,
# 64 and 128 MiB (8B shape, 131,072 positions); more takes the place of resident layers.
KV_BLOCK_BYTES = 128 << 20
LOGIT_ROWS_BYTES = 32 << 20
# Where layers don't fit whole, a larger one passes in pieces of at most so much: the ring then takes less memory.
PIECE_BYTES = 128 << 20
# Pieces leave more room to resident layers too: at 18.62 GiB two of 70B's 80, which decodes 3 to 6 % faster. But a
# prompt took 17 % longer, and 32 prompts twice as long, since no room is left for more tokens in a sweep (H200).
WHOLE_FIRST = True
# One row meets so many bytes of weights while one byte crosses the link: of blocks as they lie in the file, and of
# re-laid ones by the fused kernels. An H100 took 1.23 and 0.21 ms for a layer of 70B, its link 8.78.
PLAIN_SPEED = 7.0
KERNEL_SPEED = 40.0
# Between the slots of the ring and other buffers, with an allocator that does not round up.
GAP_BYTES = 32 << 20
# And beside half a piece with one that does.
ROUNDING_BYTES = 64 << 20
BATCH_ROUNDING_BYTES = 320 << 20
# Threads, compiled programs and the allocator's rounding; measured on an H100 and on CPU, rounded up.
FIXED_WORKSPACE_BYTES = 64 << 20
# Host slots that experts are read into, where the file does not fit in RAM.
HOST_SLOTS = 12
# What the kernel that fetches experts reads at once.
FETCHED_WORD = 16
# An embedding that would take more of the pool's place than this stays on the host.
EMBEDDING_SHARE = 0.1
