"""Random blocks of every format, with the scales one asks for."""

import numpy as np
from gguf import GGML_QUANT_SIZES

_SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_rows(kind, rows, n, seed, scales=None):
    """Random bytes; each block's float16 scales are random too, or drawn from `scales`."""
    generator = np.random.default_rng(seed)
    block, nbytes = GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (rows * n // block, nbytes), np.uint8)
    if scales is not None:
        for at in _SCALES_AT.get(kind.name, ()):
            chosen = generator.choice(np.asarray(scales, np.uint16), len(data))
            data[:, at : at + 2] = chosen[:, None].view(np.uint8)
    return data.reshape(rows, -1)
