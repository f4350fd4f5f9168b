"""Presets: each one's plan works for a model of its shape, and is what its comment says."""

import json
import re
from pathlib import Path

import gguf
import pytest
import synthetic

from airjax import models
from airjax.gguf import open_gguf
from airjax.main import main
from airjax.plan import GIB, plan_layers

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.flags"))
CARDS = (8, 12, 16, 24, 48, 80)
SHAPES = ("8b", "32b", "70b", "120b")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Files with a shape's header and a hole for its weights."""
    folder = tmp_path_factory.mktemp("shapes")
    paths = {name: folder / f"{name}.gguf" for name in SHAPES}
    for name, path in paths.items():
        nbytes = synthetic.write_sparse(str(path), synthetic.SHAPES[name], gguf.GGMLQuantizationType.Q4_K)
        assert path.stat().st_size == nbytes and path.stat().st_blocks * 512 < 16 << 20
    return paths


def test_there_is_a_preset_for_every_model_and_card():
    assert {path.stem for path in PRESETS} == {f"{name}-{card}gb" for name in SHAPES for card in CARDS}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_plans(capsys, shapes, preset):
    name, card = re.fullmatch(r"(\d+b)-(\d+)gb", preset.stem).groups()
    words = [f"--flagfile={preset}", "--ram_budget_gib=128", "--compute_dtype=bfloat16", "--json"]
    words.append("--compilation_cache_dir=")  # leaves JAX's settings of this process alone
    assert main(["plan", f"--model={shapes[name]}", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Something of a card is left to others.
    assert plan["peak_bytes"] <= plan["vram_budget_bytes"] <= 0.96 * int(card) * GIB
    assert not plan["shuttle"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_a_gpu_would_stream(shapes, preset):
    text = preset.read_text()
    flags = dict(re.findall(r"^--(\w+)=(\S+)$", text, re.MULTILINE))
    with open_gguf(shapes[preset.stem.split("-")[0]]) as file:
        _, config = models.from_gguf(file, "bfloat16")
        _, plan = plan_layers(
            file,
            1,
            config,
            backend="cuda",
            vram_budget_bytes=int(float(flags["vram_budget_gib"]) * GIB),
            ram_budget_bytes=128 * GIB,
            context=int(flags["context"]),
            stream_depth=int(flags["stream_depth"]),
        )
    told = f"all {config.n_layers} layers stay on the card"
    if plan.streamed:
        told = f"{len(plan.streamed)} of {config.n_layers} layers are streamed, {plan.bytes_per_sweep / GIB:.1f} GiB"
    assert told in text
