"""One device and several, each case in a process of its own: one table.

    python bench/devices.py [--shape=70b | --model=FILE.gguf] [--devices=2] [--forms=tensor,pipeline,replica]
        [--settings=3gb,20gb,resident] [--batches=1,8,32] [--deadline_s=600] [--json=FILE]

First every link is probed alone and all at once (by airjax, and by torch's pinned copy where torch is installed), then
the forms are compared with one device on a small float32 model, then the cases run: all streamed within 3 GB, 20 GB,
and all resident, of each device (GB are 10^9 bytes). One sequence has a prompt of --prompt tokens, several have
--batch_prompt each. A random model of --shape is written to --folder and removed. What fails, or does not fit before
the deadline, is listed with the reason. On a machine without GPUs
XLA_FLAGS=--xla_force_host_platform_device_count=2 gives two devices that share one memory: the table then shows that it
works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import synthetic
import tables

GIB = 1 << 30
# Some machines show their memory only as it is used, so what is free is not asked.
_RAM_GIB = 110.0
FORMS = ("tensor", "pipeline", "replica")
# Largest difference of a logit from one device's, as a share of the largest logit: sums in another order alone.
_TOLERANCE = 1e-4


class Setting(NamedTuple):
    """How much of the model stays on each device.

    Attributes:
      what: for people.
      flags: options of `airjax.load`; a later set is tried where the plan refuses the one before.
    """

    what: str
    options: tuple[dict[str, Any], ...]


_STREAMED = {"resident": "none", "vram_budget_gib": 2.79}
SETTINGS = {
    "3gb": Setting(
        "streamed, 3 GB",
        (_STREAMED, {**_STREAMED, "stream_depth": 2}, {**_STREAMED, "vram_budget_gib": 3.7}),
    ),
    "20gb": Setting("20 GB", ({"vram_budget_gib": 18.62},)),
    "resident": Setting("all resident", ({"resident": "all", "vram_budget_gib": 70.0},)),
    # For a machine without GPUs.
    "tiny": Setting("streamed", ({"resident": "none", "vram_budget_gib": 1.0, "ram_budget_gib": 4.0},)),
}
_COLUMNS = (
    "setting",
    "form",
    "devices",
    "batch",
    "phase",
    "tok/s",
    "ratio",
    "MB/sweep/device",
    "GB/s",
    "% joint",
    "stall %",
    "peak/plan/budget GiB",
)
_TORCH = """
import json, sys, time, torch
count = int(sys.argv[1])
hosts = [torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
targets = [torch.empty_like(host, device=f"cuda:{n}") for n, host in enumerate(hosts)]
def rate(numbers):
    best = 0.0
    for _ in range(6):
        for n in numbers:
            torch.cuda.synchronize(n)
        begin = time.perf_counter()
        for _ in range(4):
            for n in numbers:
                targets[n].copy_(hosts[n], non_blocking=True)
        for n in numbers:
            torch.cuda.synchronize(n)
        best = max(best, 4 * (256 << 20) * len(numbers) / (time.perf_counter() - begin))
    return best
print(json.dumps({"alone": [rate([n]) for n in range(count)], "together": rate(range(count))}))
"""


def links(devices: int) -> dict[str, Any]:
    """airjax's probe of the links, and which machine this is."""
    import jax

    from airjax import bench

    found = jax.local_devices()
    if len(found) < devices:
        raise SystemExit(f"--devices={devices}, but JAX sees {len(found)} here")
    probed = bench.probe_links(found[:devices], 1 << 30)
    return {
        "machine": {**bench.identity(found[0]), "python": platform.python_version()},
        "links": None if probed is None else probed._asdict(),
    }


def check(path: str, form: str, devices: int) -> dict[str, Any]:
    """A form beside one device, streamed: float32 logits, greedy tokens alone and in a batch."""
    import numpy as np

    import airjax

    generator = np.random.default_rng(0)
    ids = generator.integers(300, 2000, 60).tolist()
    prompts = [generator.integers(300, 2000, size).tolist() for size in (3, 60)]

    def outputs(**options: Any) -> tuple[Any, list[list[int]]]:
        batch: dict[int, list[int]] = {}
        with airjax.load(
            path,
            vram_budget_gib=4.0,
            resident="none",
            compute_dtype="float32",
            context=256,
            max_batch=2,
            **options,
        ) as engine:
            logits = engine.logits(ids)
            alone = [token.id for token in engine.generate(ids[:20], max_tokens=12, ignore_eos=True)]
            for n, token in engine.generate_batch(prompts, max_tokens=12, ignore_eos=True):
                batch.setdefault(n, []).append(token.id)
        return logits, [alone, *(batch[n] for n in range(len(prompts)))]

    expected, texts = outputs()
    logits, drawn = outputs(**_form_options(form, devices))
    return {
        "away": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "tokens": sum(a == b for a, b in zip(drawn, texts, strict=True)),
        "of": len(texts),
    }


def lanes_of(parallel: str, devices: int) -> int:
    """Among how many a batch is spread: each device of a pipeline and each replica has sequences of its own."""
    return devices if parallel in ("pipeline", "replica") else 1


def case(
    path: str, options: dict[str, Any], batches: Sequence[int], prompts: Sequence[int], decode: int
) -> Iterator[dict[str, Any]]:
    """Measures the batches under one set of options, as they are done."""
    import jax

    import airjax
    from airjax import bench
    from airjax.plan import PlanError

    lanes = lanes_of(options.get("parallel", ""), options.get("devices", 1))
    for batch, prompt in zip(batches, prompts, strict=True):
        context = bench.context_for(batch, prompt, decode, 512, lanes)
        max_batch = None if batch == 1 else -(-batch // lanes)
        begin, compiled_s = time.perf_counter(), bench.compilation_seconds()
        try:
            loaded = airjax.load(path, context=context, max_batch=max_batch, **options)
        except PlanError as error:
            yield {"batch": batch, "refused": str(error)}
            continue
        with loaded as engine:
            plan, model = engine.plan, engine.model
            load_s = time.perf_counter() - begin
            measured = bench.measure(
                model, batch=batch, prompt=prompt, decode=decode, lanes=engine.lanes if batch > 1 else ()
            )
            # The first device is that of JAX; a form takes the first ones.
            stats = [device.memory_stats() or {} for device in jax.local_devices()]
            yield {
                "batch": batch,
                "prompt": prompt,
                "compiled": measured.compiled,
                "load_s": load_s,
                "whole_s": time.perf_counter() - begin,
                # The programs are made side by side, so this may be more than what it took.
                "compiled_s": bench.compilation_seconds() - compiled_s,
                "tier": plan.tier,
                "resident_layers": len(plan.resident),
                "streamed_layers": len(plan.streamed),
                "peak_bytes": [each.get("peak_bytes_in_use") for each in stats],
                "planned_peak_bytes": plan.peak_bytes,
                "vram_budget_bytes": plan.vram_budget_bytes,
                "phases": {
                    name: {
                        "tokens_per_s": phase.tokens_per_s,
                        "bytes_per_sweep": phase.bytes_per_sweep,
                        "bytes_per_s": phase.bytes_per_s,
                        "stall_share": phase.stall_share,
                        "seconds": phase.seconds,
                        "sweeps": phase.sweeps,
                    }
                    for name, phase in (("prefill", measured.prefill), ("decode", measured.decode))
                    if phase is not None
                },
            }


def profile(path: str, form: str, devices: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a streamed layer takes, in milliseconds a layer: on the link, on the device, and of the host's time."""
    import jax
    import numpy as np

    import airjax
    from airjax import engine
    from airjax.engine.step import block_step

    count = 24
    options = {**options, **(_form_options(form, devices) if form else {})}
    with airjax.load(path, context=256, **options) as loaded:
        model = loaded.model
        source, layers = model.weights.rings[0]._source, model.plan.streamed

        def milliseconds(begin: float) -> float:
            return 1e3 * (time.perf_counter() - begin) / count

        jax.block_until_ready(source.put(layers[0]))
        begin, host_s, before = time.perf_counter(), 0.0, None
        for n in range(count):
            put = time.perf_counter()
            weights = source.put(layers[n % len(layers)])
            host_s += time.perf_counter() - put
            # Two are under way at a time, as in a ring.
            jax.block_until_ready(before)
            before = weights
        jax.block_until_ready(before)
        found = {"link": milliseconds(begin), "host's share of the link": 1e3 * host_s / count}
        state = engine.new_state(model)
        step = block_step(model.manifest.layers[layers[0]].layout, model.config, model.kinds[layers[0]], 256)
        zeros = np.zeros((1, 1, model.config.d_model), model.config.compute_dtype)
        x, positions = jax.device_put((zeros, np.zeros((1, 1), np.int32)), model.everywhere)
        kv = state.kv[layers[0]]
        for name, waits in (("block", False), ("block, waited for", True)):
            for timed in (False, True):
                begin = time.perf_counter()
                for _ in range(count):
                    x, kv = step(weights, x, kv, positions)
                    if waits:
                        jax.block_until_ready(x)
                dispatched = milliseconds(begin)
                jax.block_until_ready(x)
                if timed:
                    found[name] = milliseconds(begin)
                    if not waits:
                        found[f"host's share of the {name}"] = dispatched
        # Both at once, as in a sweep.
        begin = time.perf_counter()
        for n in range(count):
            other = source.put(layers[n % len(layers)])
            x, kv = step(weights, x, kv, positions)
            jax.block_until_ready((x, other))
        found["link and block together"] = milliseconds(begin)
        state.kv[layers[0]] = kv
        model.pending = x
        state.close()
    return found


def _form_options(form: str, devices: int) -> dict[str, Any]:
    return {"devices": devices, "parallel": form}


class Runner:
    """Runs the parts in processes of their own, before a deadline.

    Args:
      deadline_s: seconds from now.
      allocator: of device memory; "default" for that of JAX.
    """

    def __init__(self, deadline_s: float, allocator: str) -> None:
        self._begin = time.monotonic()
        self._deadline_s = deadline_s
        self._allocator = allocator

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self._deadline_s - self.elapsed_s

    def run(self, words: Sequence[str], most_s: float = 1e9) -> tuple[list[dict[str, Any]], str]:
        """What a process prints, a JSON object a line, and why it failed, "" if it did not.

        Args:
          words: of the command line after the interpreter.
          most_s: how long it may take; no longer than to the deadline in any case.
        """
        if self.left_s < 5:
            return [], "no time left before the deadline"
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **({} if self._allocator == "default" else {"XLA_PYTHON_CLIENT_ALLOCATOR": self._allocator}),
            "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "airjax-devices-cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            **os.environ,
        }
        environment["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        with subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(min(most_s, self.left_s), end)
            timer.start()
            errors: list[str] = []
            reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
            reader.start()
            found = [json.loads(line) for line in process.stdout or () if line.startswith("{")]
            reader.join()
            timer.cancel()
        if late.is_set():
            return found, "it took too long"
        if process.returncode:
            print("".join(errors[-12:]), flush=True)
            return found, errors[-1].strip()[:200] if errors else f"exit code {process.returncode}"
        return found, ""


def rows(
    what: str,
    form: str,
    devices: int,
    found: dict[str, Any],
    one: dict[tuple[int, str], float],
    limit: float | None,
) -> list[tuple[str, ...]]:
    """The lines of the table for one batch of a case.

    Args:
      what: the setting.
      form: of parallelism, "" for one device.
      devices: how many.
      found: what `case` gave.
      one: tokens per second of one device by batch and phase; filled where `devices` is 1.
      limit: bytes per second of all links together.
    """
    head = (what, form or "one", str(devices), str(found["batch"]))
    if "refused" in found:
        return [(*head, f"not run: {found['refused'][:160]}")]
    lines: list[tuple[str, ...]] = []
    peaks = [peak for peak in found["peak_bytes"][:devices] if peak is not None]
    memory = ",".join(f"{peak / GIB:.2f}" for peak in peaks) or "n/a"
    memory += f"/{found['planned_peak_bytes'] / GIB:.2f}/{found['vram_budget_bytes'] / GIB:.2f}"
    for name, phase in found["phases"].items():
        key, speed, rate = (found["batch"], name), phase["tokens_per_s"], phase["bytes_per_s"]
        if devices == 1:
            one[key] = speed
        lines.append(
            (
                *head,
                name,
                f"{speed:.2f}{'*' if found['compiled'] else ''}",
                f"{speed / one[key]:.2f}" if key in one else "n/a",
                f"{phase['bytes_per_sweep'] / devices / 1e6:.0f}",
                "n/a" if rate is None else f"{rate / 1e9:.1f}",
                "n/a" if rate is None or not limit else f"{100 * rate / limit:.1f}",
                "n/a" if phase["stall_share"] is None else f"{100 * phase['stall_share']:.0f}",
                memory,
            )
        )
    return lines


def format_table(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; a line that is too short ends in a sentence."""
    return tables.aligned(_COLUMNS, lines)


def format_links(name: str, probed: dict[str, Any] | None) -> str:
    """A line on the links."""
    if probed is None:
        return f"{name}: n/a"
    alone = ", ".join(f"{rate / 1e9:.1f}" for rate in probed["alone"])
    share = probed["together"] / max(probed["alone"])
    return f"{name}: {alone} GB/s alone, {probed['together'] / 1e9:.1f} together ({share:.2f} of the fastest alone)"


def format_check(form: str, found: dict[str, Any], error: str) -> str:
    """A line on a form's numbers."""
    if error:
        return f"{form}: not compared with one device: {error}"
    logits = "equal" if found["away"] == 0 else f"{found['away']:.1e} away"
    wrong = "" if found["away"] <= _TOLERANCE and found["tokens"] == found["of"] else " (WRONG)"
    return f"{form}: logits {logits}, {found['tokens']} of {found['of']} greedy texts equal{wrong}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--shape", default="70b", choices=sorted(synthetic.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--model", type=Path, help="a file instead of a shape")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--settings", default="3gb,20gb,resident", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch_prompt", type=int, default=64)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--ram_gib", type=float, default=_RAM_GIB)
    parser.add_argument("--nocheck", action="store_true", help="leave the comparison with one device out")
    parser.add_argument("--nobaseline", action="store_true", help="leave one device out")
    parser.add_argument("--noprobe", action="store_true", help="leave the links out")
    parser.add_argument("--profile", action="store_true", help="time link and block of a streamed layer too")
    parser.add_argument(
        "--allocator",
        default="default",
        choices=("default", "cuda_async"),
        help="of device memory, in all cases",
    )
    parser.add_argument(
        "--check_s", type=float, default=60, help="how long the comparison of a form may take"
    )
    parser.add_argument("--deadline_s", type=float, default=600)
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of the work, for a process of its own
    args = parser.parse_args()
    for name, known in (("forms", FORMS), ("settings", tuple(SETTINGS))):
        unknown = [word for word in getattr(args, name).split(",") if word and word not in known]
        if unknown:
            sys.exit(f"--{name} must be some of {', '.join(known)}, got {unknown[0]}")
    if args.devices < 2:
        sys.exit(f"--devices must be at least 2, got {args.devices}")
    return args


def main() -> None:
    """Probes, checks, measures and prints the table."""
    args = _arguments()
    if args.part:
        for found in _part(json.loads(args.part)):
            print(json.dumps(found), flush=True)
        return
    runner = Runner(args.deadline_s, args.allocator)
    report: dict[str, Any] = {"cases": []}
    head: list[str] = []
    lines: list[tuple[str, ...]] = []
    written: list[Path] = []
    try:
        _measure(args, runner, report, head, lines, written)
    finally:
        for path in written:
            path.unlink(missing_ok=True)
        print("\n" + "\n".join([*head, "", format_table(lines)]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))


def _part(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    what = asked.pop("what")
    if what == "links":
        yield links(**asked)
    elif what == "profile":
        yield profile(**asked)
    elif what == "check":
        yield check(**asked)
    else:
        yield from case(**asked)


def _measure(
    args: argparse.Namespace,
    runner: Runner,
    report: dict[str, Any],
    head: list[str],
    lines: list[tuple[str, ...]],
    written: list[Path],
) -> None:
    forms = [form for form in args.forms.split(",") if form]

    def run(most_s: float = 1e9, **asked: Any) -> tuple[list[dict[str, Any]], str]:
        return runner.run([__file__, f"--part={json.dumps(asked)}"], most_s)

    def say(text: str) -> None:
        print(f"({runner.elapsed_s:.0f} s) {text}", flush=True)

    report |= {"allocator": args.allocator, "links": None, "torch": None}
    if not args.noprobe:
        probed, error = run(what="links", devices=args.devices)
        if error:
            sys.exit(f"the links can't be probed: {error}")
        torch, _ = runner.run(["-c", _TORCH, str(args.devices)])
        report |= {**probed[0], "torch": torch[0] if torch else None}
        head.append(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
        head += [format_links("links", report["links"]), format_links("torch's pinned copy", report["torch"])]
        say("\n".join(head))
    if not args.nocheck:
        small = args.folder / "airjax-devices-check.gguf"
        written.append(small)
        synthetic.write(str(small), synthetic.SHAPES["small"], gguf.GGMLQuantizationType.Q4_K)
        for form in forms:
            checked, error = run(args.check_s, what="check", path=str(small), form=form, devices=args.devices)
            head.append(format_check(form, checked[0] if checked else {}, error))
            report.setdefault("checks", {})[form] = checked[0] if checked else {"error": error}
            say(head[-1])
    path = args.model
    if path is None:
        path = args.folder / f"airjax-devices-{args.shape}.gguf"
        written.append(path)
        shape = synthetic.SHAPES[args.shape]
        shape = shape._replace(layers=args.layers) if args.layers else shape
        nbytes = synthetic.write(str(path), shape, gguf.GGMLQuantizationType.Q4_K)
        say(f"{path}: {nbytes / 1e9:.1f} GB written")
    if args.profile:
        options = {**_STREAMED, "vram_budget_gib": 3.7, "ram_budget_gib": args.ram_gib}
        for form in ("", *(form for form in forms if form == "tensor")):
            timed, error = run(
                60, what="profile", path=str(path), form=form, devices=args.devices, options=options
            )
            report.setdefault("profile", {})[form or "one"] = timed[0] if timed else {"error": error}
            times = ", ".join(f"{name} {value:.2f}" for name, value in timed[0].items()) if timed else error
            head.append(f"ms of a streamed layer, {form or 'one device'}: {times}")
            say(head[-1])
    limits = report["torch"] or report["links"]
    batches = [int(batch) for batch in args.batches.split(",")]
    prompts = [args.prompt if batch == 1 else args.batch_prompt for batch in batches]
    for name in [name for name in args.settings.split(",") if name]:
        setting, one = SETTINGS[name], dict[tuple[int, str], float]()
        for form in forms if args.nobaseline else ("", *forms):
            devices = args.devices if form else 1
            limit = None if limits is None else limits["together" if form else "alone"]
            limit = limit[0] if isinstance(limit, list) else limit
            left = dict(zip(batches, prompts, strict=True))
            for options in setting.options:
                options = {"ram_budget_gib": args.ram_gib, **options}
                options |= _form_options(form, devices) if form else {}
                asked = {"batches": list(left), "prompts": list(left.values()), "decode": args.decode}
                results, error = run(
                    what="case",
                    path=str(path),
                    options=options,
                    **asked,
                )
                last = options["vram_budget_gib"] == setting.options[-1]["vram_budget_gib"]
                last = last and options.get("stream_depth") == setting.options[-1].get("stream_depth")
                for found in results:
                    if "refused" in found and not last:
                        continue  # the next options may work
                    del left[found["batch"]]
                    report["cases"].append(
                        {"setting": name, "form": form, "devices": devices, "options": options, **found}
                    )
                    new = rows(setting.what, form, devices, found, one, limit)
                    lines += new
                    say("\n".join("  ".join(line) for line in new))
                    if "whole_s" in found:
                        spent = [found[key] for key in ("whole_s", "load_s", "compiled_s")]
                        say("{:.1f} s, of which loading {:.1f}, programs {:.1f}".format(*spent))
                if error or not left:
                    break
            for batch in left:
                lines.append((setting.what, form or "one", str(devices), str(batch), f"not run: {error}"))
                say("  ".join(lines[-1]))


if __name__ == "__main__":
    main()
