"""The commands of the launcher, one module each.

A command has `HELP`, `USES_JAX`, `define_flags(values)` and `run(values)`. It imports jax only inside `run`,
so that `airjax help` and `airjax inspect` answer at once.
"""
