"""The launcher: `airjax COMMAND --flags`. It reads the command line and the environment, and sets up JAX."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from absl import flags

from airjax import __version__
from airjax.commands.ceilings import user_cache_dir

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model in the terminal",
    "inspect": "show what a GGUF file holds",
    "plan": "show what would live where under a memory budget",
    "perplexity": "measure how well a model predicts a text",
    "serve": "answer clients of OpenAI's API, all in shared sweeps",
    "experiment": "compare samplers over prompts and seeds, in shared sweeps",
    "bench": "measure the machine, and what a model reaches on it",
}
# CUDA's own allocator, for small budgets: JAX's usual one gives a slot of the ring up to 128 MiB more than it needs
# (70B shape, three slots: a peak of 2.90 instead of 2.53 GiB). It is slower where layers stay on the device.
_COMPACT = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_INTERRUPTED = 130
_BROKEN_PIPE = 141


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after the program's name; None for those of this process.

    Returns:
      The exit status: 0; 1 for a user's mistake, with one sentence on stderr; 130 after ctrl-C; 141 when the
      reader of the output went away. Bugs are raised.
    """
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; give it something that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"airjax: error: {sentence}", file=sys.stderr)
        return 1
    return 0


def program() -> NoReturn:
    """Runs the command of this process, and ends it."""
    status = main()
    several = status and _one_of_several()
    if several:
        print("airjax: this process ends, and the others with it", file=sys.stderr)
    if status == _INTERRUPTED or several:
        # The interpreter's own way out waits for the other processes, which wait for this one; and after an interrupt
        # it would pull the ground from under a layer that still runs on a thread of XLA.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _one_of_several() -> bool:
    # Nothing of JAX is imported for a command that has not needed it.
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def explain(error: Exception) -> str | None:
    """One sentence for what a user can mend; None for a bug, which deserves its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"{text.rstrip(' ?')}{'?' if 'Did you mean' in text else ''}: see airjax COMMAND --help"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or text).lower()}"
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8 (byte {error.start}): convert it first"
    if isinstance(error, (ValueError, flags.Error)):
        return text.removeprefix("ERROR:: ")  # of absl, when a flagfile cannot be opened
    if isinstance(error, MemoryError):
        return "out of memory: pass a smaller --ram_budget_gib, --context or --stream_depth"
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
        return "out of device memory: pass a smaller --vram_budget_gib or --context, or --resident=none"
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return text
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _one_of_several():
        return f"another process of this run has ended or can't be reached ({text[:200]}): see what it said"
    return None


def usage() -> str:
    """What `airjax help` prints."""
    lines = [
        f"airjax {__version__}: language models larger than the GPU's memory, streamed from a GGUF file.",
        "",
        "Usage: airjax COMMAND --flags",
        "",
    ]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    lines += [
        "",
        "airjax COMMAND --helpshort lists the flags of a command, --flagfile=FILE reads some from a file.",
    ]
    return "\n".join(lines)


def flag_help(values: flags.FlagValues) -> str:
    """A command's flags with their defaults, in the order of their definition."""
    lines = ["Flags:"]
    for flag in {
        flag.name: flag for part in values.flags_by_module_dict().values() for flag in part
    }.values():
        name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        if not flag.boolean and flag.default not in (None, []):
            name += f"={flag.default}"
        lines += textwrap.wrap(flag.help, 100, initial_indent=f"  {name:<26} ", subsequent_indent=" " * 29)
    lines.append(f"  {'--flagfile':<26} Read flags from this file, one a line.")
    return "\n".join(lines)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("help", "--help", "--helpshort", "-h"):
        if len(args) < 2:
            print(usage())
            return
        args = [args[1], "--help"]
    if args[0] == "--version":
        print(__version__)
        return
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}: use one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"airjax.commands.{name}")
    values = _flags_of(command)
    extra = values([f"airjax {name}", *rest])[1:]
    if values.help or values.helpshort:
        print(f"airjax {name}: {COMMANDS[name]}\n{command.HELP}\n{flag_help(values)}")
        return
    if extra:
        raise UsageError(f"airjax {name} takes flags only, got {extra[0]!r}: see airjax {name} --help")
    if not values.model:
        raise UsageError(f"which model? Pass airjax {name} --model=FILE.gguf")
    logging.basicConfig(stream=sys.stderr, format="airjax: %(message)s", level=logging.WARNING)
    if command.USES_JAX:
        compact = "resident" in values and values.resident == "none"
        # With several devices that allocator's calls wait for each other: 13.9 instead of 28 sweeps of 8 layers of 70B.
        compact = compact and ("devices" not in values or values.devices == "1")
        _set_up_jax(values.compilation_cache_dir, compact)
        if "coordinator_address" in values and values.coordinator_address is not None:
            _join_others(values)
    command.run(values)


def _flags_of(command: ModuleType) -> flags.FlagValues:
    values = flags.FlagValues()
    command.define_flags(values)
    flags.DEFINE_bool("help", False, "Show this help.", flag_values=values, short_name="h")
    flags.DEFINE_bool("helpshort", False, "Show this help.", flag_values=values)
    return values


def _set_up_jax(cache_dir: str | None, compact: bool) -> None:
    """Turns on the persistent compilation cache, so that only the first run of a model compiles.

    Args:
      cache_dir: where; None for JAX_COMPILATION_CACHE_DIR or else the user's cache folder, "" for nowhere.
      compact: take the allocator that wastes no memory.
    """
    # XLA's notes about the machine's features are for its developers; real errors arrive as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, value in _COMPACT.items() if compact else ():
        os.environ.setdefault(name, value)
    import jax

    if cache_dir is None:
        cache_dir = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(user_cache_dir())
    if cache_dir:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _join_others(values: flags.FlagValues) -> None:
    """Becomes one of several processes that run the same command; the first alone prints."""
    from airjax.engine import hosts

    address = None if values.coordinator_address == "auto" else values.coordinator_address
    if address is not None and None in (values.num_processes, values.process_id):
        raise UsageError("with --coordinator_address pass --num_processes and --process_id too")
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise UsageError(f"--coordinator_address must be HOST:PORT or auto, got {address!r}")
    if address is not None and values.process_id >= values.num_processes:
        raise UsageError(
            f"--process_id must be less than --num_processes, got {values.process_id} of {values.num_processes}"
        )
    hosts.join(address, values.num_processes, values.process_id)
    if not hosts.first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    program()
