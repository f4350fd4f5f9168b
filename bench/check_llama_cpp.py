"""airjax and llama.cpp read the same random files: do their logits agree?

    python bench/check_llama_cpp.py [--shapes=tiny,tiny-moe,tiny-oss] [--tokens=192]

Both on whatever device they take; on a CPU airjax computes in float32, and llama.cpp rounds activations to blocks of 8
bits. Prints the largest and the mean KL divergence of a position, how often the likeliest token is the same, and the
correlation of the logits. Exits with 1 if the mean divergence of a shape is above --most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import synthetic
import workers

from airjax.gguf import open_gguf

_TYPES = {"gpt-oss": "MXFP4"}


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
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--most", type=float, default=1e-2, help="mean divergence")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        ids = np.load(f"{args.folder}/ids.npy")
        np.save(f"{args.folder}/airjax.npy", logits(f"{args.folder}/model.gguf", ids))
        return
    failed = False
    for name in args.shapes.split(","):
        shape = synthetic.SHAPES[name]
        kind = gguf.GGMLQuantizationType[_TYPES.get(shape.architecture, "Q4_K")]
        with tempfile.TemporaryDirectory() as folder:
            synthetic.write(f"{folder}/model.gguf", shape, kind, skew=1)
            make_uneven(f"{folder}/model.gguf")
            np.save(f"{folder}/ids.npy", np.random.default_rng(1).integers(300, 500, args.tokens))
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
            f"{name} ({shape.architecture}, {kind.name}): KL largest {found['largest']:.1e}, mean {found['mean']:.1e}; "
            f"same token {100 * found['same']:.0f}%; correlation {found['correlation']:.5f}"
        )
        failed |= found["mean"] > args.most
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
