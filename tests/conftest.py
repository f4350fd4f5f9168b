"""Fixtures of all tests."""

import os
from pathlib import Path

import jax
import pytest
import real_models


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache():
    """Programs are compiled once for all test processes, and kept for the next run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "airjax-tests" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def smollm2():
    """Path of the real SmolLM2-135M-Instruct."""
    return real_models.smollm2()


@pytest.fixture(scope="session")
def gemma3():
    """Path of the real Gemma 3 270M."""
    return real_models.gemma3()
