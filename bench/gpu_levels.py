"""The levels that airjax should reach on an H100, each by `airjax bench` in a process of its own: one short table.

    python bench/gpu_levels.py [--folder=/dev/shm] [--disk_folder=/tmp] [--deadline_s=460] [--levels=8b,ring]

Writes random models of the shapes of Llama 3 8B and 70B in Q4_K (43 GB in --folder, 5 GB in --disk_folder), and
removes them. GB are 10^9 bytes: a budget of 20 GB is 18.62 GiB; a card that is sold as one of 20 GB has 20 GiB. What
fails, or does not fit before the deadline, is listed with the reason. The link's limit is torch's pinned copy in the
same run, where torch is installed, else the bench's own probe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import synthetic
import tables

GIB = 1 << 30
# Some machines show their memory only as it is used, so what is free is not asked.
_RAM_GIB = 110
_TORCH_LINK = """
import time, torch
host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
target = torch.empty_like(host, device="cuda")
best = 0.0
for _ in range(6):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(4):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    best = max(best, 4 * host.numel() / (time.perf_counter() - begin))
print(best)
"""


class Level(NamedTuple):
    """One call of `airjax bench`, and what it should show.

    Attributes:
      group: name for --levels.
      what: for people.
      shape: of the model.
      on_disk: the file lies in --disk_folder.
      flags: of the bench; a later set is tried where the plan refuses the one before.
      targets: (batch, phase, what must be reached): "90" tokens/s, "90%" of the link or of the disk.
    """

    group: str
    what: str
    shape: str
    on_disk: bool
    flags: tuple[str, ...]
    targets: tuple[tuple[int, str, str], ...]


LEVELS = (
    Level(
        "8b",
        "8B, all resident",
        "8b",
        False,
        ("--resident=all --vram_budget_gib=40 --prompt=512 --decode=32 --batch=1",),
        ((1, "prefill", ""), (1, "decode", "260")),
    ),
    Level(
        "8b-batch",
        "8B, all resident",
        "8b",
        False,
        ("--resident=all --vram_budget_gib=40 --prompt=128 --decode=32 --batch=8,32",),
        ((8, "decode", ""), (32, "decode", "2500")),
    ),
    Level(
        "8b-stream",
        "8B, all streamed",
        "8b",
        False,
        ("--resident=none --vram_budget_gib=2.79 --prompt=512 --decode=16",),
        ((1, "prefill", ""), (1, "decode", "95%")),
    ),
    Level(
        "70b",
        "70B, 20 GB",
        "70b",
        False,
        ("--vram_budget_gib=18.62 --prompt=512 --decode=10",),
        ((1, "prefill", "900"), (1, "decode", "2.6")),
    ),
    Level(
        "70b-batch",
        "70B, 20 GB",
        "70b",
        False,
        ("--vram_budget_gib=18.62 --prompt=128 --decode=10 --batch=8,32",),
        ((8, "decode", "20"), (32, "prefill", ""), (32, "decode", "75")),
    ),
    Level(
        "70b-long",
        "70B, 20 GB, prompt of 4096",
        "70b",
        False,
        ("--vram_budget_gib=18.62 --prompt=4096 --decode=4",),
        ((1, "prefill", ""), (1, "decode", "")),
    ),
    Level(
        "70b-long-512",
        "70B, 20 GB, prompt of 4096 by 512",
        "70b",
        False,
        ("--vram_budget_gib=18.62 --prompt=4096 --decode=4 --prefill_chunk=512",),
        ((1, "prefill", ""), (1, "decode", "")),
    ),
    Level(
        "70b-20gib",
        "70B, 20 GiB",
        "70b",
        False,
        ("--vram_budget_gib=20 --prompt=512 --decode=10",),
        ((1, "prefill", ""), (1, "decode", "2.6")),
    ),
    Level(
        "70b-20gib-batch",
        "70B, 20 GiB",
        "70b",
        False,
        ("--vram_budget_gib=20 --prompt=128 --decode=10 --batch=8,32",),
        ((8, "decode", "20"), (32, "decode", "75")),
    ),
    Level(
        "70b-stream",
        "70B, all streamed, 3 GB",
        "70b",
        False,
        tuple(
            f"--resident=none --prompt=128 --decode=8 {flags}"
            for flags in (
                "--vram_budget_gib=2.79",
                "--vram_budget_gib=2.79 --stream_depth=2",
                "--vram_budget_gib=3.7",
            )
        ),
        ((1, "decode", "95%"),),
    ),
    Level(
        "ring",
        "8B, ring, RAM 2 GB",
        "8b",
        True,
        ("--resident=none --vram_budget_gib=2.79 --ram_budget_gib=1.86 --prompt=128 --decode=5",),
        ((1, "decode", "90%"),),
    ),
    Level(
        "131k",
        "70B, 131,072 positions, 20 GB",
        "70b",
        False,
        ("--vram_budget_gib=18.62 --decode_at=131064 --decode=8",),
        ((1, "decode", "90%"),),
    ),
    Level(
        "70b-resident",
        "70B, all resident",
        "70b",
        False,
        ("--resident=all --vram_budget_gib=70 --prompt=512 --decode=16",),
        ((1, "prefill", ""), (1, "decode", "42")),
    ),
)
_COLUMNS = (
    "what",
    "batch",
    "phase",
    "level",
    "tok/s",
    "% link",
    "% disk",
    "pred/meas",
    "peak/plan/budget GiB",
)


def torch_link() -> float | None:
    """Bytes per second of torch's pinned copy to the device; None without torch or a GPU."""
    done = subprocess.run([sys.executable, "-c", _TORCH_LINK], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def bench(level: Level, path: str, timeout_s: float, more: str = "") -> dict[str, Any] | str:
    """Runs one level; its report, or one line that says why there is none."""
    error = ""
    for flags in (f"{flags} {more}".strip() for flags in level.flags):
        words = flags.split()
        if "--ram_budget_gib" not in flags:
            words.append(f"--ram_budget_gib={_RAM_GIB}")
        command = [sys.executable, "-m", "airjax.main", "bench", f"--model={path}", "--json", *words]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        print(f"\n{level.what}: airjax bench {flags}", flush=True)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout_s:.0f} s"
        lines = done.stderr.strip().splitlines()
        if done.returncode == 0:
            return dict(json.loads(done.stdout), flags=flags)
        error = lines[-1] if lines else f"exit code {done.returncode}"
        print("\n".join(lines[-12:]), flush=True)
        if "device memory but the budget is" not in error:
            break
    return error


def rows(level: Level, report: dict[str, Any] | str, link: float | None) -> list[tuple[str, ...]]:
    """The lines of the table for one level."""
    lines: list[tuple[str, ...]] = []
    for batch, phase, target in level.targets:
        head = (level.what, str(batch), phase, f">= {target}" if target else "-")
        if isinstance(report, str):
            lines.append((*head, f"not run: {report[:110]}"))
            continue
        found = [run for run in report["runs"] if (run["batch"], run["phase"]) == (batch, phase)]
        if not found:
            lines.append((*head, "not run: the bench did not get that far"))
            continue
        run = found[0]
        limit = link or report["ceilings"]["link_up_bytes_per_s"]
        share = run["bytes_per_s"] / limit if run["bytes_per_s"] and limit else None
        sizes = [run[name] for name in ("peak_device_bytes", "planned_peak_bytes", "vram_budget_bytes")]
        memory = "/".join("n/a" if size is None else f"{size / GIB:.2f}" for size in sizes)
        speed = f"{run['tokens_per_s']:.2f}{'*' if run['compiled'] else ''}"
        shares = (_percent(share), _percent(run["disk_share"]))
        ratio = run["predicted_by_measured"]
        lines.append((*head, speed, *shares, "n/a" if ratio is None else f"{ratio:.2f}", memory))
    return lines


def format_table(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; a line that is too short ends in a sentence."""
    return tables.aligned(_COLUMNS, lines)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}"


def main() -> None:
    """Writes the models, runs the levels and prints the table."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(level.group for level in LEVELS)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--disk_folder", type=Path, default=Path("/tmp"), help="on a real disk, for the ring")
    parser.add_argument("--deadline_s", type=float, default=460)
    parser.add_argument("--run_s", type=float, default=200, help="of one level at most")
    parser.add_argument("--levels", default=names)
    parser.add_argument("--flags", default="", help="more flags for each call of the bench")
    parser.add_argument("--keep", action="store_true", help="leave the models, and take those that are there")
    parser.add_argument("--reports", type=Path, help="a folder for the whole JSON report of each level")
    args = parser.parse_args()
    wanted = [name for name in args.levels.split(",") if name]
    unknown = [name for name in wanted if name not in names.split(",")]
    if unknown:
        sys.exit(f"--levels must be some of {names}, got {unknown[0]}")
    link = torch_link()
    print(f"torch's pinned copy: {'n/a' if link is None else f'{link / 1e9:.1f} GB/s'}", flush=True)
    written: dict[tuple[str, bool], Path] = {}
    lines: list[tuple[str, ...]] = []
    try:
        for level in (level for level in LEVELS if level.group in wanted):
            left = args.deadline_s - (time.monotonic() - begin)
            report: dict[str, Any] | str = "no time left before the deadline"
            if left > 20:
                path = _model(level, args, written)
                left = args.deadline_s - (time.monotonic() - begin)
                report = bench(level, str(path), min(left, args.run_s), args.flags)
            if isinstance(report, dict) and args.reports:
                args.reports.mkdir(parents=True, exist_ok=True)
                (args.reports / f"{level.group}.json").write_text(json.dumps(report, indent=1))
            lines += rows(level, report, link)
            print(f"({time.monotonic() - begin:.0f} s)", flush=True)
    finally:
        for path in written.values() if not args.keep else ():
            path.unlink(missing_ok=True)
    print(f"\ntorch's pinned copy: {'n/a' if link is None else f'{link / 1e9:.1f} GB/s'}")
    print(format_table(lines), flush=True)


def _model(level: Level, args: argparse.Namespace, written: dict[tuple[str, bool], Path]) -> Path:
    key = (level.shape, level.on_disk)
    if key not in written:
        folder: Path = args.disk_folder if level.on_disk else args.folder
        path = folder / f"airjax-levels-{level.shape}.gguf"
        written[key] = path
        if args.keep and path.exists():
            return path
        begin = time.monotonic()
        nbytes = synthetic.write(str(path), synthetic.SHAPES[level.shape], gguf.GGMLQuantizationType.Q4_K)
        if level.on_disk:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        print(f"{path}: {nbytes / GIB:.1f} GiB written in {time.monotonic() - begin:.0f} s", flush=True)
    return written[key]


if __name__ == "__main__":
    main()
