"""Files of a named shape with random weights: that they are what they say, and that they run."""

import json
from unittest import mock

import gguf
import numpy as np
import pytest
import synthetic

import airjax
from airjax import plan
from airjax.gguf import build_manifest, open_gguf

TINY = synthetic.SHAPES["tiny"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"])
def test_a_file_of_each_type_runs_and_its_logits_are_those_of_a_model(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    nbytes = synthetic.write(str(path), TINY._replace(layers=2), gguf.GGMLQuantizationType[kind])
    assert path.stat().st_size == nbytes
    with airjax.load(path, vram_budget_gib=1, context=64) as engine:
        logits = engine.logits([300, 301, 302])
        types = {tensor.type.name for tensor in engine.model.gguf.tensors.values() if len(tensor.shape) == 2}
    assert types == ({kind, "Q6_K"} if kind.endswith("_K") else {kind})
    assert np.isfinite(logits).all()
    # Neither flat nor a single spike: the scales suit the formats.
    assert 0.2 < logits.std() < 5


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    written = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.gguf"
        synthetic.write(str(path), TINY._replace(layers=1), gguf.GGMLQuantizationType.Q4_0, seed=seed)
        written.append(path.read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("name", ["8b", "70b", "30b-a3b", "120b-a5b"])
def test_the_named_shapes_have_the_parameters_of_their_names(tmp_path, name):
    shape = synthetic.SHAPES[name]
    weights = sum(
        np.prod(size)
        for _, size, _ in synthetic._tensors(
            shape, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F32
        )
    )
    assert weights == pytest.approx(int(name.split("b")[0]) * 1e9, rel=0.05)


def test_layers_of_one_file_share_few_layouts(tmp_path):
    path = tmp_path / "tiny.gguf"
    synthetic.write(str(path), TINY, gguf.GGMLQuantizationType.Q4_K)
    with open_gguf(path) as file:
        assert len({span.layout for span in build_manifest(file).layers}) == 1


def _choices(path):
    """How often each expert of each layer was chosen, `[L, E]`, and how many choices there were in a layer."""
    # By the host, which sees what is chosen.
    with (
        mock.patch.object(plan.experts, "_fetchable", return_value=False),
        airjax.load(
            path, vram_budget_gib=1, context=256, resident="dense", compute_dtype="float32"
        ) as engine,
    ):
        pool, counted = engine.model.pool, {}
        need = pool.need

        def counting(layer, uses):
            counted[layer] = uses[:]
            return need(layer, uses)

        pool.need = counting
        logits = engine.logits(np.random.default_rng(0).integers(0, 512, 200).tolist())
        assert np.isfinite(logits).all() and 0.2 < logits.std() < 5
        return np.stack([counted[layer] for layer in range(4)])


@pytest.mark.parametrize(("shape", "kind"), [("tiny-moe", "Q4_K"), ("tiny-oss", "MXFP4")])
def test_the_routers_of_a_mixture_are_as_skewed_as_asked(tmp_path, shape, kind):
    shares = []
    for skew in (0.0, 1.0):
        path = tmp_path / "tiny.gguf"
        nbytes = synthetic.write(
            str(path), synthetic.SHAPES[shape], gguf.GGMLQuantizationType[kind], skew=skew
        )
        assert path.stat().st_size == nbytes
        chosen = _choices(path)
        assert (chosen.sum(axis=1) == 200 * 3).all()
        shares.append(np.sort(chosen, axis=1)[:, -4:].sum() / chosen.sum())
    # A quarter of the experts: evenly spread it takes a quarter of the choices, and some noise.
    assert shares[0] < 0.4 < 0.6 < shares[1]


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--type must be one of Q4_0"):
        synthetic.write(str(tmp_path / "x.gguf"), TINY, gguf.GGMLQuantizationType.Q8_K)


def test_the_checkpoint_for_transformers_holds_every_tensor_of_the_shape(tmp_path):
    import torch
    import transformers

    shape = TINY._replace(layers=2)
    nbytes = synthetic.write_hf(tmp_path / "hf", shape)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert nbytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 2
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all()) and 0.2 < float(logits.detach().float().std()) < 5
