"""airjax and llama.cpp read the same random files: do their logits agree?

    python bench/check_llama_cpp.py [--shapes=tiny,tiny-moe,tiny-oss] [--tokens=192]
    PYTHONPATH=.:tests/support python bench/check_llama_cpp.py --toys=apertus,openelm,grok-1,grok-2 [--most=1e-5]

With --toys the files are those of the tests' random models, in float32. Some of these llama.cpp can't read or runs in
its own way, since it takes windows or a rope from the number of layers of the models that it knows.

Both on whatever device they take; on a CPU airjax computes in float32, and llama.cpp rounds activations to blocks of 8
bits. Prints the largest and the mean KL divergence of a position, how often the likeliest token is the same, and the
correlation of the logits. Exits with 1 if the mean divergence of a shape is above --most.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import synthetic
import workers

from airjax.gguf import open_gguf

_TYPES = {"gpt-oss": "MXFP4"}
# Toys that llama.cpp reads without an output matrix of their own alone.
_TIED = ("cohere2", "gemma", "gemma2", "openelm")


def logits(path: str, ids: np.ndarray) -> np.ndarray:
    """airjax's, `[T, V]`."""
    import airjax

    with airjax.load(path, compute_dtype="float32", resident="all", context=len(ids)) as engine:
        return np.asarray(engine.logits(ids.tolist()))


def make_uneven(path: str) -> None:
    """Gives biases and sinks, which are zeros for speed, random values."""
    generator = np.random.default_rng(2)
    with open_gguf(path) as file:
        places = {
            info.offset: info
            for name, info in file.tensors.items()
            if name.endswith((".bias", "_sinks.weight"))
        }
    with open(path, "r+b") as out:
        for offset, info in places.items():
            out.seek(offset)
            out.write(generator.normal(size=info.shape).astype(np.float32).tobytes())


def write_shape(path: str, name: str) -> str:
    """One of the benchmarks' shapes; how it is to be called."""
    shape = synthetic.SHAPES[name]
    kind = gguf.GGMLQuantizationType[_TYPES.get(shape.architecture, "Q4_K")]
    synthetic.write(path, shape, kind, skew=1)
    make_uneven(path)
    return f"{name} ({shape.architecture}, {kind.name})"


def write_toy(path: str, name: str) -> str:
    """One of the tests' toys; how it is to be called."""
    toys, mixtures = (importlib.import_module(f"toy_{kind}") for kind in ("models", "experts"))
    if name in mixtures.MIXTURES:
        mixtures.toy_mixture(Path(path), name)
    else:
        toys.toy_decoder(Path(path), name, separate_output=name not in _TIED)
    return f"{name} (toy)"


def random_ids(path: str, count: int) -> np.ndarray:
    """Tokens that are no special ones."""
    with open_gguf(path) as file:
        size = file.tensors["token_embd.weight"].shape[0]
    return np.random.default_rng(1).integers(min(300, size // 2), min(500, size), count)


def compare(own: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two sets of logits, `[T, V]`, are apart."""
    first, second = (_log_softmax(logits.astype(np.float64)) for logits in (own, theirs))
    divergence = (np.exp(first) * (first - second)).sum(-1)
    return {
        "largest": float(divergence.max()),
        "mean": float(divergence.mean()),
        "same": float((own.argmax(-1) == theirs.argmax(-1)).mean()),
        "correlation": float(np.corrcoef(own.reshape(-1), theirs.reshape(-1))[0, 1]),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main() -> None:
    """Writes each file, runs each engine in a process of its own, and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="tiny,tiny-moe,tiny-oss")
    parser.add_argument("--toys", default="", help="of the tests, in place of the shapes")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--most", type=float, default=1e-2, help="mean divergence")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        ids = np.load(f"{args.folder}/ids.npy")
        np.save(f"{args.folder}/airjax.npy", logits(f"{args.folder}/model.gguf", ids))
        return
    failed = False
    write = write_toy if args.toys else write_shape
    for name in (args.toys or args.shapes).split(","):
        with tempfile.TemporaryDirectory() as folder:
            label = write(f"{folder}/model.gguf", name)
            np.save(f"{folder}/ids.npy", random_ids(f"{folder}/model.gguf", args.tokens))
            peer = str(Path(__file__).with_name("llama_cpp_peer.py"))
            of_peer = [
                f"--model={folder}/model.gguf",
                f"--ids={folder}/ids.npy",
                f"--logits={folder}/llama_cpp.npy",
            ]
            for command in ([__file__, f"--folder={folder}"], [peer, *of_peer]):
                _, why = workers.run(command, 120)
                if why:
                    sys.exit(f"{name}, {Path(command[0]).name}: {why}")
            found = compare(*(np.load(f"{folder}/{engine}.npy") for engine in ("airjax", "llama_cpp")))
        print(
            f"{label}: KL largest {found['largest']:.1e}, mean {found['mean']:.1e}; "
            f"same token {100 * found['same']:.0f}%; correlation {found['correlation']:.5f}"
        )
        failed |= found["mean"] > args.most
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
