"""Checks and times the fused kernels for mixtures of experts on a GPU: one run, one table.

    python bench/expert_kernels.py [--deadline_s=60] [--parts=check,bits,base,wide,variants,layer] [--quick]

The check is against float64, with extreme scales and experts that are not there. Experts are chosen anew, all equally
likely, for each of a dozen launches from a layer's own 340 MB and more, so that no cache helps; GB/s are the bytes of
the different experts that were chosen, by the time of the kernel that the profiler saw (medians).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type

from airjax import layers, models, quants
from airjax.models import experts as forms
from airjax.quants import cuda, mixture, selftest

_LAUNCHES = 12
_KERNELS = ("airjax_experts_prepare", "airjax_experts_up", "airjax_experts_down")
_THREADS = 12


class Shape(NamedTuple):
    """Of a layer of experts."""

    d_model: int
    d_ff: int
    experts: int
    used: int
    biases: bool = False


SHAPES = {
    "30b-a3b": Shape(2048, 768, 128, 8),
    "gpt-oss": Shape(2880, 2880, 128, 4, biases=True),
    "mixtral": Shape(4096, 14336, 8, 2),
}


class Case(NamedTuple):
    """One line of the table; `up` and `down` are other tunings than the usual ones."""

    shape: str
    kind: Type
    down_kind: Type
    rows: int
    columns: int | None = None
    up: mixture.Tuning | None = None
    down: mixture.Tuning | None = None
    dtype: str = "bfloat16"


class Layer(NamedTuple):
    """Random experts: bits that nobody decodes to anything sensible."""

    ws: tuple[quants.Stacked, quants.Stacked, quants.Stacked]
    biases: tuple[jax.Array, jax.Array, jax.Array] | None


def layer(shape: Shape, kind: Type, down_kind: Type) -> Layer:
    """A layer's experts on the device."""

    def stack(kind: Type, n_out: int, n_in: int) -> quants.Stacked:
        nbytes = n_out * quants.row_bytes(kind, n_in)
        bits = jax.random.bits(jax.random.key(n_out), (shape.experts, nbytes), jnp.uint8)
        return quants.Stacked(bits, kind, (n_out, n_in))

    d, f = shape.d_model, shape.d_ff
    biases = tuple(jnp.zeros((shape.experts, n)) for n in (f, f, d)) if shape.biases else None
    return Layer((stack(kind, f, d), stack(kind, f, d), stack(down_kind, d, f)), biases)  # type: ignore[arg-type]


def choices(shape: Shape, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """int32 `[count, rows * k]`."""
    generator = np.random.default_rng(seed)
    keys = generator.random((count, rows, shape.experts))
    return np.argsort(keys, axis=-1)[..., : shape.used].astype(np.int32).reshape(count, -1)


def products(case: Case, capability: str) -> Callable[[jax.Array, jax.Array, Layer], jax.Array]:
    """`(x [rows, D], pairs [P], layer) -> [P, D]` by the kernels."""
    shape = SHAPES[case.shape]

    def run(x: jax.Array, pairs: jax.Array, of: Layer) -> jax.Array:
        columns = case.columns or mixture.columns_for(len(pairs), shape.experts, capability)
        terms = 1 if case.dtype == "bfloat16" else 3
        made = mixture.prepare(
            x, pairs, None, experts=shape.experts, columns=columns, terms=terms, capability=capability
        )
        own = (None, None) if of.biases is None else (of.biases[:2], of.biases[2:])
        (h,) = mixture.gate_up(
            made,
            of.ws[0],
            of.ws[1],
            own[0],
            len(pairs),
            activation="clamped" if shape.biases else "silu",
            capability=capability,
            tuned=case.up,
        )
        return mixture.down_product(
            mixture.Groups(h, made.table), of.ws[2], own[1], capability=capability, tuned=case.down
        )[0]

    return run


def check(capability: str, pool: concurrent.futures.Executor, quick: bool) -> None:
    """Every type against float64."""
    ways = [(1, 8, "bfloat16"), (2, 8, "bfloat16"), (8, 8, "bfloat16"), (32, 16, "bfloat16")]
    ways += [(64, 8, "bfloat16"), (512, 32, "bfloat16"), (3, 8, "float32"), (33, 48, "float32")]
    ways += [(33, mixture.WIDE_COLUMNS, "bfloat16"), (600, mixture.WIDE_COLUMNS, "bfloat16")]
    if quick:
        ways = [ways[at] for at in (2, 5, 7, 9)]

    def one(kind: Type, rows: int, columns: int, dtype: str) -> float:
        return selftest.mixture_error(
            kind, rows, columns, capability=capability, dtype=dtype, experts=16, used=4, seed=rows
        )

    print("error by the magnitude of what is summed, at most", selftest._TOLERANCE)
    print("  rows/columns/dtype:", " ".join(f"{r}/{c}/{d}" for r, c, d in ways))
    asked = {kind: [pool.submit(one, kind, *way) for way in ways] for kind in sorted(mixture.TYPES)}
    for kind, futures in asked.items():
        print(f"  {kind.name}: " + " ".join(_result(future) for future in futures), flush=True)


def _result(future: concurrent.futures.Future[float]) -> str:
    try:
        return f"{future.result():.1e}"
    except Exception as error:  # what can't run is a result too
        return f"{type(error).__name__}: {str(error)[:300]}"


def same_bits(capability: str) -> None:
    """A token's products alone, in a batch and in groups of other sizes."""
    shape = SHAPES["30b-a3b"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, shape.d_model)), jnp.float32)
    # Some experts are chosen much more often than others.
    generator = np.random.default_rng(1)
    worth = 1 / np.arange(1, shape.experts + 1)
    pairs = jnp.asarray(
        np.concatenate(
            [generator.choice(shape.experts, shape.used, False, worth / worth.sum()) for _ in range(64)]
        ).astype(np.int32)
    )
    for kind in (Type.Q4_K, Type.Q6_K, Type.MXFP4):
        ws = []
        for i, (n_out, n_in) in enumerate(
            ((shape.d_ff, shape.d_model),) * 2 + ((shape.d_model, shape.d_ff),)
        ):
            w = selftest._random_matrix(kind, 8 * n_out, n_in, i)
            bits = jnp.tile(w.data.reshape(8, -1), (shape.experts // 8, 1))
            ws.append(quants.Stacked(bits, kind, (n_out, n_in)))

        of = Layer((ws[0], ws[1], ws[2]), None)

        def run(rows: slice, columns: int, of: Layer = of, kind: Type = kind) -> np.ndarray:
            case = Case("30b-a3b", kind, kind, 0, columns)
            own = pairs.reshape(64, -1)[rows].reshape(-1)
            return np.asarray(jax.jit(products(case, capability))(x[rows], own, of))

        whole = run(slice(0, 64), 8)
        found = []
        for rows, columns in (
            (slice(0, 64), 16),
            (slice(0, 64), 32),
            (slice(0, 1), 8),
            (slice(37, 38), 8),
            (slice(3, 35), 16),
        ):
            got = run(rows, columns)
            expected = whole.reshape(64, shape.used, -1)[rows].reshape(got.shape)
            found.append(np.array_equal(got, expected, equal_nan=True))
        print(f"  {kind.name} same bits alone and in batches: {found}", flush=True)


def measure(cases: Sequence[Case], capability: str, pool: concurrent.futures.Executor) -> None:
    """Compiles all, runs each under one trace, and prints a line for each."""
    made: dict[tuple[Any, ...], Layer] = {}
    runs = []
    for case in cases:
        key = (case.shape, case.kind, case.down_kind)
        if key not in made:
            made[key] = layer(SHAPES[case.shape], case.kind, case.down_kind)

    def compiled(case: Case) -> Any:
        shape = SHAPES[case.shape]
        chosen = choices(shape, case.rows, _LAUNCHES)
        x = jnp.asarray(
            np.random.default_rng(0).normal(size=(_LAUNCHES, case.rows, shape.d_model)), jnp.float32
        )
        one = products(case, capability)
        of = made[(case.shape, case.kind, case.down_kind)]

        def all_of(x: jax.Array, pairs: jax.Array, of: Layer) -> jax.Array:
            return jax.lax.map(lambda each: jnp.sum(one(each[0], each[1], of), axis=0), (x, pairs))

        given = (x, jnp.asarray(chosen), of)
        run = jax.jit(all_of).lower(*given).compile()
        jax.block_until_ready(run(*given))
        return run, given, chosen

    for case, future in [(case, pool.submit(compiled, case)) for case in cases]:
        try:
            runs.append((case, *future.result()))
        except Exception as error:  # what can't run is a result too
            print(_name(case), type(error).__name__, str(error)[:300], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _, run, given, _ in runs:
                jax.block_until_ready(run(*given))
        (path,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    events = [
        (event.start_ns, event.name, event.duration_ns)
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
        if event.name in _KERNELS
    ]
    events.sort()
    times = {name: iter([d for _, n, d in events if n == name]) for name in _KERNELS}
    if len(events) != 3 * _LAUNCHES * len(runs):
        print(f"  the profiler saw {len(events)} launches of {3 * _LAUNCHES * len(runs)}")
        return
    for case, _, _, chosen in runs:
        own = {name: [next(times[name]) for _ in range(_LAUNCHES)] for name in _KERNELS}
        ws = made[(case.shape, case.kind, case.down_kind)].ws
        hit = [len(np.unique(row)) for row in chosen]
        line = f"{_name(case)}: {statistics.mean(hit):.0f} experts, prepare "
        line += f"{statistics.median(own[_KERNELS[0]]) / 1e3:.1f} us"
        for what, name, nbytes in (
            ("gate+up", _KERNELS[1], 2 * ws[0].nbytes),
            ("down", _KERNELS[2], ws[2].nbytes),
        ):
            rate = statistics.median(n * nbytes / t for n, t in zip(hit, own[name], strict=True))
            line += f", {what} {statistics.median(own[name]) / 1e3:.1f} us {rate:.0f} GB/s"
        print(line, flush=True)


def _name(case: Case) -> str:
    name = f"{case.shape} {case.kind.name}/{case.down_kind.name} rows {case.rows} {case.dtype}"
    if case.columns:
        name += f" columns {case.columns}"
    for what, tuned in (("up", case.up), ("down", case.down)):
        if tuned:
            name += f" {what} {'/'.join(str(n) for n in tuned[1:])}"
    return name


def time_layers(case: Case, capability: str, count: int = 8) -> None:
    """Wall time of a layer's experts in a chain of layers, with the kernels and in XLA's form."""
    shape = SHAPES[case.shape]
    of = layer(shape, case.kind, case.down_kind)
    pairs = jnp.asarray(choices(shape, case.rows, count))
    x = jnp.zeros((1, case.rows, shape.d_model), jnp.float32)
    gates = jnp.ones((1, case.rows, shape.used), jnp.float32)
    mixture_of = forms.Experts(
        shape.experts,
        shape.d_ff,
        layers.Routing(shape.used),
        activation="clamped" if shape.biases else "silu",
        biases=shape.biases,
    )
    config: Any = types.SimpleNamespace(compute_dtype=case.dtype, experts=mixture_of, d_model=shape.d_model)
    own = {} if of.biases is None else dict(zip(forms.EXPERT_MATRICES, of.biases, strict=True))
    line = f"layer of {_name(case)}:"
    by_kernels = products(case, capability)

    def kernels(x: jax.Array, pairs: jax.Array, of: Layer) -> jax.Array:
        made = by_kernels(x[0], pairs, of).reshape(1, case.rows, shape.used, -1)
        return x + models.combined(made, gates, None)

    def xla(x: jax.Array, pairs: jax.Array, of: Layer) -> jax.Array:
        ids = pairs.reshape(1, case.rows, -1)
        parts = dict(zip(forms.EXPERT_MATRICES, of.ws, strict=True))
        return x + models.combined(
            models.expert_products(x, ids, parts, own, None, None, config), gates, None
        )

    for name, one in (("kernels", kernels), ("XLA", xla)):

        def chain(x: jax.Array, pairs: jax.Array, of: Layer, one: Any = one) -> jax.Array:
            for row in pairs:
                x = one(x, row, of) * 1e-3
            return x

        run = jax.jit(chain)
        jax.block_until_ready(run(x, pairs, of))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run(x, pairs, of))
            times.append((time.perf_counter() - start) / count)
        line += f"  {name} {statistics.median(times) * 1e6:.0f} us"
    print(line, flush=True)


def time_all_layers(capability: str, quick: bool) -> None:
    """A line for each shape and number of rows."""
    small = [("30b-a3b", Type.Q4_K), ("gpt-oss", Type.MXFP4)]
    cases = [(*shape, rows) for rows in (1, 32, 512) for shape in small if not quick]
    cases += [("mixtral", Type.Q4_K, rows) for rows in (128, 512)]
    for shape, kind, rows in cases:
        time_layers(Case(shape, kind, kind, rows), capability)


def base_cases() -> list[Case]:
    """What the engine would run."""
    cases = []
    for rows in (1, 2, 8, 32, 64, 512):
        cases += [Case("30b-a3b", Type.Q4_K, Type.Q4_K, rows), Case("gpt-oss", Type.MXFP4, Type.MXFP4, rows)]
    for kind in (Type.Q6_K, Type.Q5_K, Type.Q8_0, Type.Q4_0):
        cases += [Case("30b-a3b", kind, kind, rows) for rows in (1, 8)]
    cases += [Case("mixtral", Type.Q4_K, Type.Q6_K, rows) for rows in (1, 32, 512)]
    cases.append(Case("30b-a3b", Type.Q4_K, Type.Q4_K, 1, dtype="float32"))
    return cases


def wide_cases() -> list[Case]:
    """Groups of both widths, where experts have many rows."""
    cases = []
    for rows in (32, 64, 128, 256, 512, 2048):
        for shape, kind, down_kind in (
            ("30b-a3b", Type.Q4_K, Type.Q6_K),
            ("gpt-oss", Type.MXFP4, Type.MXFP4),
        ):
            # What a device takes that has no room for wide ones.
            narrow = mixture.columns_for(rows * SHAPES[shape].used, SHAPES[shape].experts, "")
            cases += [
                Case(shape, kind, down_kind, rows, columns) for columns in (narrow, mixture.WIDE_COLUMNS)
            ]
    return cases


def variants() -> list[Case]:
    """Other tunings."""
    t = mixture.Tuning
    q4, mx = Type.Q4_K, Type.MXFP4
    cases = [Case("30b-a3b", q4, q4, 32, columns) for columns in (8, 16)]
    for columns, blocks in ((32, 2), (48, 2), (48, 1), (64, 1)):
        for turns in (1, 2, 3):
            up = t(columns, 4, 1, turns, 1 if turns == 1 else 2, blocks)
            down = t(columns, 3, 2, (1, 2, 4)[turns - 1], 1, blocks)
            cases.append(Case("30b-a3b", q4, q4, 512, columns, up, down))
    for rows in (1, 8):
        for up, down in (
            (t(8, 4, 1, 1, 1, 4), t(8, 3, 1, 1, 1, 10)),
            (t(8, 4, 1, 1, 2, 3), t(8, 3, 1, 1, 1, 8)),
            (t(8, 4, 1, 1, 2, 2), t(8, 3, 2, 1, 1, 4)),
            (t(8, 4, 1, 2, 2, 3), t(8, 3, 2, 2, 2, 4)),
            (t(8, 8, 1, 1, 1, 2), t(8, 3, 4, 1, 1, 2)),
        ):
            cases.append(Case("30b-a3b", q4, q4, rows, 8, up, down))
        for up, down in (
            (t(8, 4, 1, 1, 1, 4), t(8, 4, 2, 1, 1, 4)),
            (t(8, 4, 1, 1, 2, 3), t(8, 4, 1, 1, 2, 6)),
            (t(8, 4, 1, 2, 2, 3), t(8, 4, 2, 2, 2, 3)),
        ):
            cases.append(Case("gpt-oss", mx, mx, rows, 8, up, down))
    return cases


def main() -> None:
    """Runs it all."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--deadline_s", type=float, default=60)
    parser.add_argument("--parts", default="check,bits,base,wide,variants,layer")
    parser.add_argument("--quick", action="store_true", help="fewer checks and layers")
    args = parser.parse_args()
    capability = cuda.capability(jax.devices()[0])
    print(jax.__version__, jax.devices()[0].device_kind, capability, flush=True)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts: dict[str, Callable[[], None]] = {
            "check": lambda: check(capability, pool, args.quick),
            "base": lambda: measure(base_cases(), capability, pool),
            "bits": lambda: same_bits(capability),
            "layer": lambda: time_all_layers(capability, args.quick),
            "wide": lambda: measure(wide_cases(), capability, pool),
            "variants": lambda: measure(variants(), capability, pool),
        }
        for name in args.parts.split(","):
            if time.monotonic() - begin > args.deadline_s:
                print(f"{name}: not run, no time left before the deadline")
                continue
            try:
                parts[name]()
            except Exception as error:  # the other parts are worth running
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(f"-- {name}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
