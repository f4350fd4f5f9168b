"""Layers that pass whole and layers that pass in pieces, side by side on one GPU: one line for each setting.

    python bench/pieces.py [--settings=70b:18.62:1:128,70b:18.62:32:128,70b:18.62:1:0] [--deadline_s=140]

A setting is a shape, the VRAM budget in GiB, how many sequences, the largest piece in MiB (0 for whole layers), and the
slots of the ring where they are not to be three. All run in one process, so the peak is that of the process so far.
What does not fit before the deadline is left out. The link is measured as by `gpu_levels`, whose models are taken where
it kept them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gguf
import gpu_levels
import synthetic


def one(path: str, budget_gib: float, batch: int, piece_mib: int, depth: int, link: float | None) -> str:
    """Runs one setting; what it gave."""
    import airjax
    from airjax import bench, plan

    plan.limits.WHOLE_FIRST, plan.limits.PIECE_BYTES = not piece_mib, (piece_mib or 1) << 20
    begin, prompt, decode = time.monotonic(), 512 if batch == 1 else 128, 8
    with airjax.load(
        path,
        vram_budget_gib=budget_gib,
        ram_budget_gib=110,
        stream_depth=depth,
        context=bench.context_for(batch, prompt, decode, plan.PREFILL_CHUNK),
        max_batch=None if batch == 1 else batch,
    ) as engine:
        loaded = time.monotonic() - begin
        measured = bench.measure(engine.model, batch=batch, prompt=prompt, decode=decode)
        planned = engine.plan
    words = [f"{len(planned.streamed)} layers streamed, {len(planned.kept)} pieces kept"]
    for name, phase in (("prefill", measured.prefill), ("decode", measured.decode)):
        assert phase is not None
        rate = phase.bytes_per_s
        share = f", {rate / link:.1%} of the link" if rate and link else ""
        rates = "" if rate is None else f" ({rate / 1e9:.1f} GB/s{share}, waited {phase.stall_share:.0%})"
        words.append(f"{name} {phase.tokens_per_s:.2f} tok/s{rates}")
    peak = (measured.peak_device_bytes or 0) / plan.GIB
    words.append(f"peak {peak:.2f} of planned {planned.peak_bytes / plan.GIB:.2f} of {budget_gib} GiB")
    words.append(f"loaded in {loaded:.0f} s, all in {time.monotonic() - begin:.0f} s")
    return ("compiled meanwhile; " if measured.compiled else "") + "; ".join(words)


def main() -> None:
    """Writes the models and runs the settings."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="70b:18.62:1:128,70b:18.62:32:128,70b:18.62:1:0")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--deadline_s", type=float, default=140)
    args = parser.parse_args()
    link = gpu_levels.torch_link()
    print(f"torch's pinned copy: {'n/a' if link is None else f'{link / 1e9:.1f} GB/s'}", flush=True)
    written: dict[str, Path] = {}
    longest = 0.0
    try:
        for setting in args.settings.split(","):
            shape, budget_gib, batch, piece_mib, *depth = setting.split(":")
            start = time.monotonic()
            path = args.folder / f"airjax-levels-{shape}.gguf"
            if shape not in written and not path.exists():
                written[shape] = args.folder / f"airjax-pieces-{shape}.gguf"
                kind = gguf.GGMLQuantizationType.Q4_K
                synthetic.write(str(written[shape]), synthetic.SHAPES[shape], kind)
                print(f"{shape} written in {time.monotonic() - start:.0f} s", flush=True)
                start = time.monotonic()
            if start - begin + longest > args.deadline_s:
                print(f"{setting}: no time left before the deadline", flush=True)
                continue
            path = written.get(shape, path)
            slots = int(depth[0]) if depth else 3
            told = one(str(path), float(budget_gib), int(batch), int(piece_mib), slots, link)
            longest = max(longest, time.monotonic() - start)
            print(f"{setting}: {told}", flush=True)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
