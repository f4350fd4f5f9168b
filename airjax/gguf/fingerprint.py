"""A short name for the content of a model file, without reading all of it."""

from __future__ import annotations

import hashlib

from airjax.gguf.reader import GGUF

_SAMPLE_BYTES = 4096


def fingerprint(gguf: GGUF) -> str:
    """32 hexadecimal digits that differ between models, and stay when a file is copied or renamed.

    They cover the metadata, the tensor table, and the first and last 4 KiB of each tensor: a model of 70 billion
    parameters takes some 10 MB of reading. A change in the middle of a tensor alone goes unseen.

    Args:
      gguf: the open file.
    """
    digest = hashlib.blake2b(digest_size=16)
    for shard, data in enumerate(gguf.maps):
        starts = [info.offset for info in gguf.tensors.values() if info.shard == shard]
        header_bytes = min(starts, default=len(data))
        digest.update(data[:header_bytes].data)
    for name in gguf.tensors:
        raw = gguf.raw(name)
        digest.update(raw[:_SAMPLE_BYTES].data)
        digest.update(raw[-_SAMPLE_BYTES:].data)
    return digest.hexdigest()
