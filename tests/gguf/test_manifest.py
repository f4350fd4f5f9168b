"""Spans: they cover their tensors, carry little else, and equal layers have equal layouts."""

from pathlib import Path

import gguf_bytes as raw
import numpy as np
import pytest

from airjax.gguf import GGUF, GGUFError, Manifest, Span, build_manifest, open_gguf


def model(
    path: Path, tensors: list[tuple[str, int]], gaps: dict[str, int] | None = None, alignment: int = 32
) -> GGUF:
    """A file of float32 vectors by name and length, in this order, with extra bytes before those in `gaps`."""
    rows, at = [], 0
    for name, size in tensors:
        at += -at % alignment + (gaps or {}).get(name, 0)
        rows.append(raw.tensor(name, (size,), offset=at))
        at += 4 * size
    data = np.random.default_rng(0).integers(0, 256, at, np.uint8).tobytes()
    entries = [raw.entry("general.alignment", raw.U32, alignment)]
    path.write_bytes(raw.build(entries, rows, data, alignment=alignment))
    return open_gguf(path)


def layers(count: int, order: tuple[str, ...] = ("norm.weight", "attn_q.weight", "ffn_up.weight")) -> list:
    """Equal layers, each of whole 64-byte steps."""
    return [(f"blk.{n}.{name}", 16 * (k + 1)) for n in range(count) for k, name in enumerate(order)]


def spans(manifest: Manifest) -> list[Span]:
    """All of them."""
    return [*manifest.layers, *manifest.globals.values()]


def assert_holds(file: GGUF, manifest: Manifest, align: int) -> None:
    """What every manifest promises: each tensor's bytes, once, through the slot of its span."""
    seen = []
    for span in spans(manifest):
        buffers = [file.maps[e.shard][e.start : e.start + e.nbytes] for e in span.extents]
        assert span.layout.sizes == tuple(len(buffer) for buffer in buffers)
        assert [name for name, _ in span.layout.tensors] == sorted(name for name, _ in span.layout.tensors)
        for short, slot in span.layout.tensors:
            name = f"{span.name}.{short}" if span.name.startswith("blk.") else short
            info = file.tensors[name]
            assert (slot.type, slot.shape, slot.nbytes) == (info.type, info.shape, info.nbytes)
            bytes_ = buffers[slot.extent][slot.offset : slot.offset + slot.nbytes]
            theirs = file.raw(name)
            assert (bytes_.ctypes.data, len(bytes_)) == (theirs.ctypes.data, len(theirs))
            seen.append(name)
        assert span.nbytes == sum(len(buffer) for buffer in buffers)
        assert span.used_bytes == sum(slot.nbytes for _, slot in span.layout.tensors)
        assert span.waste_bytes == span.nbytes - span.used_bytes >= 0
        for number, extent in enumerate(span.extents):
            assert extent.start % align == 0
            slots = [slot for _, slot in span.layout.tensors if slot.extent == number]
            assert min(slot.offset for slot in slots) < align
            assert max(slot.offset + slot.nbytes for slot in slots) == extent.nbytes
            assert extent.page_start % 4096 == extent.page_end % 4096 == 0
            assert extent.page_start <= extent.start < extent.page_start + 4096
            assert extent.page_end - 4096 < extent.start + extent.nbytes <= extent.page_end
    assert sorted(seen) == sorted(file.tensors)


def test_equal_layers_have_equal_layouts_and_hashes(tmp_path):
    with model(tmp_path / "m.gguf", layers(3), alignment=64) as file:
        manifest = build_manifest(file)
        assert_holds(file, manifest, 64)
    assert [span.name for span in manifest.layers] == ["blk.0", "blk.1", "blk.2"]
    assert len({span.layout for span in manifest.layers}) == 1
    assert [span.waste_bytes for span in manifest.layers] == [0, 0, 0]


def test_another_shape_type_or_order_is_another_layout(tmp_path):
    tensors = layers(1) + layers(2)[:2:-1]
    with model(tmp_path / "m.gguf", tensors, alignment=64) as file:
        first, second = build_manifest(file).layers
    assert first.layout != second.layout
    rows = [raw.tensor("blk.0.w", (16,), raw.F32_TYPE, 0), raw.tensor("blk.1.w", (32,), raw.F16_TYPE, 64)]
    (tmp_path / "m.gguf").write_bytes(raw.build([], rows, bytes(128), alignment=64))
    with open_gguf(tmp_path / "m.gguf") as file:
        first, second = build_manifest(file, align=1).layers
    assert first.layout.sizes == second.layout.sizes == (64,)
    assert first.layout != second.layout


@pytest.mark.parametrize("align", [1, 64, 4096])
@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_ranges_begin_at_a_multiple_of_align_and_end_exactly(tmp_path, align, alignment):
    tensors = [("token_embd.weight", 7), *layers(2), ("output_norm.weight", 3), ("output.weight", 5)]
    with model(tmp_path / "m.gguf", tensors, alignment=alignment) as file:
        manifest = build_manifest(file, align=align)
        assert_holds(file, manifest, align)
    assert list(manifest.globals) == ["token_embd.weight", "output_norm.weight", "output.weight"]
    if align == 1:
        assert all(span.waste_bytes == 0 for span in manifest.globals.values())


def test_align_of_64_wastes_less_than_64_bytes_and_makes_views_aligned(tmp_path):
    with model(tmp_path / "m.gguf", [("a", 3), ("b", 3), ("c", 3)]) as file:
        manifest = build_manifest(file)
        assert [span.waste_bytes % 32 for span in manifest.globals.values()] == [0, 0, 0]
        assert {span.waste_bytes for span in manifest.globals.values()} == {0, 32}
        for span in manifest.globals.values():
            view = file.maps[0][span.extents[0].start :]
            assert view.ctypes.data % 64 == 0


def test_padding_between_tensors_is_counted_as_waste(tmp_path):
    with model(tmp_path / "m.gguf", [("blk.0.a", 3), ("blk.0.b", 3)]) as file:
        (span,) = build_manifest(file, align=1).layers
    assert (span.nbytes, span.used_bytes, span.waste_bytes) == (32 + 12, 24, 20)


@pytest.mark.parametrize(("gap", "extents"), [(4096, 1), (4128, 2)])
def test_a_gap_up_to_the_limit_is_carried_along_and_a_larger_one_splits_the_range(tmp_path, gap, extents):
    with model(tmp_path / "m.gguf", [("blk.0.a", 8), ("blk.0.b", 8)], {"blk.0.b": gap}) as file:
        manifest = build_manifest(file, align=32, max_gap=4096)
        assert_holds(file, manifest, 32)
    (span,) = manifest.layers
    assert len(span.extents) == len(span.layout.sizes) == extents
    assert span.waste_bytes == (gap if extents == 1 else 0)


def test_a_scattered_layer_has_several_ranges_and_no_foreign_tensors(tmp_path):
    # Kinds of tensors together, as some converters write them, so that each layer lies in pieces.
    tensors = [(f"blk.{n}.{name}", 4096) for name in ("a", "b", "c") for n in range(4)]
    with model(tmp_path / "m.gguf", tensors) as file:
        manifest = build_manifest(file, align=32, max_gap=1024)
        assert_holds(file, manifest, 32)
        assert [len(span.extents) for span in manifest.layers] == [3, 3, 3, 3]
        assert len({span.layout for span in manifest.layers}) == 1
        assert all(span.waste_bytes == 0 for span in manifest.layers)
        carried = build_manifest(file, align=32, max_gap=1 << 20)
        assert_holds(file, carried, 32)
        assert [len(span.extents) for span in carried.layers] == [1, 1, 1, 1]
        assert carried.layers[0].waste_bytes == 6 * 4096 * 4


def test_a_layer_across_two_files_has_a_range_in_each(tmp_path):
    paths = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    paths[0].write_bytes(
        raw.build([], [raw.tensor("blk.0.a"), raw.tensor("blk.1.a", offset=32)], bytes(range(64)))
    )
    paths[1].write_bytes(
        raw.build([], [raw.tensor("blk.1.b"), raw.tensor("out", offset=32)], bytes(range(64, 128)))
    )
    with open_gguf(paths[0]) as file:
        manifest = build_manifest(file)
        assert_holds(file, manifest, 64)
    assert [[extent.shard for extent in span.extents] for span in manifest.layers] == [[0], [0, 1]]
    assert manifest.globals["out"].extents[0].shard == 1


@pytest.mark.parametrize(
    ("numbers", "missing", "present"),
    [([0, 2], 1, 2), ([1], 0, 1), ([0, 1, 5, 9], 2, 5), ([999999], 0, 999999)],
)
def test_a_missing_layer_is_refused(tmp_path, numbers, missing, present):
    with (
        model(tmp_path / "m.gguf", [(f"blk.{n}.a", 8) for n in numbers]) as file,
        pytest.raises(GGUFError) as caught,
    ):
        build_manifest(file)
    assert str(caught.value) == (
        f"{tmp_path}/m.gguf: layer {missing} has no tensors but layer {present} has: download the file again"
    )


@pytest.mark.parametrize(
    "name", ["blk.00.a", "blk.-1.a", "blk.٣.a", "blk." + "9" * 5000 + ".a", "blk.0", "xblk.0.a"]
)
def test_names_that_only_resemble_a_layer_are_globals(tmp_path, name):
    with model(tmp_path / "m.gguf", [("blk.0.a", 8), (name, 8)]) as file:
        manifest = build_manifest(file)
    assert list(manifest.globals) == [name]
    assert len(manifest.layers) == 1


def test_layers_are_ordered_by_number_and_not_by_place(tmp_path):
    with model(tmp_path / "m.gguf", [(f"blk.{n}.a", 8) for n in (10, 2, 0, 1, 9, 3, 8, 4, 7, 5, 6)]) as file:
        manifest = build_manifest(file)
    assert [span.name for span in manifest.layers] == [f"blk.{n}" for n in range(11)]


@pytest.mark.parametrize("align", [0, -64, 48])
def test_align_must_be_a_power_of_two(tmp_path, align):
    with (
        model(tmp_path / "m.gguf", layers(1)) as file,
        pytest.raises(ValueError, match=f"power of two, got {align}"),
    ):
        build_manifest(file, align=align)


def test_a_file_without_layers(tmp_path):
    with model(tmp_path / "m.gguf", [("a", 8)]) as file:
        assert build_manifest(file).layers == ()


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_have_one_range_a_layer_and_waste_under_a_thousandth(request, name):
    with open_gguf(request.getfixturevalue(name)) as file:
        manifest = build_manifest(file)
        assert_holds(file, manifest, 64)
        total = sum(span.nbytes for span in spans(manifest))
    assert all(len(span.extents) == 1 for span in manifest.layers)
    assert sum(span.waste_bytes for span in spans(manifest)) < total / 1000


def test_a_layer_is_cut_into_pieces_between_its_tensors_and_small_ones_stay_apart(tmp_path):
    tensors = [("blk.0.norm.weight", 16), *((f"blk.0.ffn_{n}.weight", 1024) for n in range(5))]
    with model(tmp_path / "a.gguf", [*tensors, ("blk.0.z.bias", 16)]) as file:
        (whole,) = build_manifest(file, align=1).layers
        for piece_bytes, sizes in ((9000, (64, 8192, 8192, 4096, 64)), (5000, (64, *[4096] * 5, 64))):
            manifest = build_manifest(file, align=1, piece_bytes=piece_bytes)
            assert_holds(file, manifest, align=1)
            (span,) = manifest.layers
            assert span.layout.sizes == sizes
            assert span.layout.pieces == tuple(range(1, len(sizes) - 1))
            assert span.nbytes == whole.nbytes
        # One that is no larger than a piece, or has but one, is not cut.
        assert build_manifest(file, align=1, piece_bytes=whole.nbytes).layers == (whole,)
    with model(tmp_path / "b.gguf", [("blk.0.norm.weight", 16), ("blk.0.ffn_up.weight", 4096)]) as file:
        (span,) = build_manifest(file, align=1, piece_bytes=8192).layers
        assert span.layout.pieces == ()


def numbered(path: Path, entries: list[bytes], count: int = 3) -> GGUF:
    """A file of a few layers with these entries of the metadata."""
    entries = [
        raw.entry("general.architecture", raw.STRING, "toy"),
        raw.entry("general.alignment", raw.U32, 64),
        raw.entry("toy.block_count", raw.U32, count),
        *entries,
    ]
    rows = [raw.tensor(f"blk.{n}.w", (16,), offset=64 * n) for n in range(count)]
    path.write_bytes(raw.build(entries, rows, bytes(64 * count), alignment=64))
    return open_gguf(path)


def test_numbers_of_the_metadata_that_a_layer_reads_are_part_of_its_span(tmp_path):
    values = {"xielu.alpha_n": [1.0, 2.0, 3.0], "xielu.eps": [-1.0, -2.0, -3.0]}
    entries = [raw.entry(key, raw.ARRAY, (raw.F32, own)) for key, own in values.items()]
    with numbered(tmp_path / "m.gguf", entries) as file:
        manifest = build_manifest(file)
        # Wherever the file has them, layers have one layout, and the weights begin at a multiple of 64 bytes.
        assert len({span.layout for span in manifest.layers}) == 1
        for layer, span in enumerate(manifest.layers):
            tensors = dict(span.layout.tensors)
            assert sorted(tensors) == ["w", *sorted(values)]
            assert span.extents[tensors["w"].extent].start % 64 == 0
            for key, own in values.items():
                slot = tensors[key]
                extent = span.extents[slot.extent]
                at = extent.start + slot.offset
                assert file.maps[0][at : at + 4].view(np.float32) == own[layer]
                assert file.raw(f"blk.{layer}.{key}").view(np.float32) == own[layer]


@pytest.mark.parametrize(
    "entry",
    [
        raw.entry("xielu.beta", raw.ARRAY, (raw.F32, [1.0, 2.0])),
        raw.entry("xielu.beta", raw.ARRAY, (raw.I32, [1, 2, 3])),
        raw.entry("xielu.beta", raw.F32, 1.0),
        raw.entry("xielu.other", raw.ARRAY, (raw.F32, [1.0, 2.0, 3.0])),
    ],
    ids=["too short", "of another type", "no array", "another key"],
)
def test_other_metadata_is_no_part_of_a_layer(tmp_path, entry):
    with numbered(tmp_path / "m.gguf", [entry]) as file:
        assert not file.numbers
        assert [name for name, _ in build_manifest(file).layers[0].layout.tensors] == ["w"]
