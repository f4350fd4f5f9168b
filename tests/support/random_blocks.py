"""Random blocks of every format, with the scales one asks for."""

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

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
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
}


def _teach_gguf_q1_0():
    """The installed gguf names the format and has neither decoder nor quantizer of it."""

    class Bits(vars(gguf.quants)["__Quant"], qtype=GGMLQuantizationType.Q1_0):
        @classmethod
        def dequantize_blocks(cls, blocks):
            scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            ones = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
            return np.where(ones == 1, scales, -scales)

        @classmethod
        def quantize_blocks(cls, blocks):
            scales = np.abs(blocks).mean(axis=1, keepdims=True).astype(np.float16)
            return np.concatenate(
                [scales.view(np.uint8), np.packbits(blocks >= 0, axis=1, bitorder="little")], axis=1
            )


if GGMLQuantizationType.Q1_0 not in gguf.quants._type_traits:
    _teach_gguf_q1_0()


def random_rows(kind, rows, n, seed, scales=None):
    """Random bytes; each block's float16 scales are random too, or drawn from `scales`.

    MXFP4's scales are powers of two: any but the subnormal ones, or some about 1 where `scales` are given.
    """
    generator = np.random.default_rng(seed)
    block, nbytes = GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (rows * n // block, nbytes), np.uint8)
    if kind.name == "MXFP4":
        data[:, 0] = generator.integers(*((2, 256) if scales is None else (118, 128)), len(data), np.uint8)
    if scales is not None:
        for at in _SCALES_AT.get(kind.name, ()):
            chosen = generator.choice(np.asarray(scales, np.uint16), len(data))
            data[:, at : at + 2] = chosen[:, None].view(np.uint8)
        if kind.name == "IQ1_M":  # four bits of the scale in the highest bits of each of four words
            chosen = generator.choice(np.asarray(scales, np.uint16), len(data))
            for i in range(4):
                part = (chosen >> 4 * i & 15).astype(np.uint8) << 4
                data[:, 49 + 2 * i] = data[:, 49 + 2 * i] & 15 | part
    return data.reshape(rows, -1)
