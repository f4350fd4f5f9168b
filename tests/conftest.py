"""Fixtures of all tests."""

import itertools
import os
import signal
from pathlib import Path

import hypothesis
import jax
import pytest
import real_models

# Shells start background jobs with ctrl-C ignored, and what these start inherits that; tests send it to airjax.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is timed: a machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache():
    """Programs are compiled once for all test processes, and kept for the next run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "airjax-tests" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


# XLA's CPU backend maps some hundred pieces of memory for each program. Linux allows a process 65,530 of them, and past
# that it crashes.
_MOST_MAPS = 30_000
_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _few_programs():
    """Programs are forgotten before a test process holds too many of them."""
    yield
    maps = Path("/proc/self/maps")
    if next(_TESTS) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """Path of the real SmolLM2-135M-Instruct."""
    return real_models.smollm2()


@pytest.fixture(scope="session")
def gemma3():
    """Path of the real Gemma 3 270M."""
    return real_models.gemma3()
