"""Places for small buffers on the device."""

import jax
import pytest
from toy_models import toy_llama

import airjax
from airjax.engine import memory, model
from airjax.plan import limits


def test_every_second_buffer_is_kept_and_all_fit_in_what_a_plan_leaves():
    (device,) = jax.local_devices()[:1]
    before = {id(array) for array in jax.live_arrays()}
    kept = memory.leave_holes([device])
    sizes = [array.nbytes for array in kept]
    assert {size: sizes.count(size) for size in set(sizes)} == memory._HOLES
    assert {id(array) for array in jax.live_arrays()} - before == {id(array) for array in kept}
    assert 2 * sum(sizes) < limits.FIXED_WORKSPACE_BYTES // 4


@pytest.mark.parametrize(("resident", "kept"), [("all", True), ("none", False)])
def test_a_model_has_them_where_the_host_is_waited_for(tmp_path, monkeypatch, resident, kept):
    monkeypatch.setattr("airjax.engine.model.shares_room", lambda device: True)
    path = toy_llama(tmp_path / "toy.gguf", layers=2)
    with airjax.load(path, vram_budget_gib=1, context=128, resident=resident) as loaded:
        spacers = list(loaded.model.spacers)
        assert bool(spacers) == kept
    assert all(array.is_deleted() for array in spacers)


def test_what_is_outside_the_layers_is_loaded_before_them(tmp_path, monkeypatch):
    """Its matrices are the largest, and there twice while they are re-laid: then no layer is there yet."""
    order = []

    def noting(name):
        load = getattr(model, name)

        def noted(*args, **options):
            order.append(name)
            return load(*args, **options)

        monkeypatch.setattr(model, name, noted)

    noting("put_globals")
    noting("open_weights")
    with airjax.load(toy_llama(tmp_path / "toy.gguf", layers=2), vram_budget_gib=1, context=128):
        assert order == ["put_globals", "open_weights"]
