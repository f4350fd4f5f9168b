"""Headers: every value type is read, and every damage is named in one sentence."""

import struct
import time
import tracemalloc

import gguf
import gguf_bytes as raw
import numpy as np
import pytest

from airjax.gguf import GGMLType, GGUFError
from airjax.gguf.header import Header, StringArray, parse_header


def parse(data: bytes) -> Header:
    """The header of these bytes."""
    return parse_header(memoryview(data), "m.gguf", 0)


def refusal(data: bytes) -> str:
    """The sentence with which these bytes are refused."""
    with pytest.raises(GGUFError) as caught:
        parse(data)
    sentence = str(caught.value)
    assert sentence.startswith("m.gguf: ")
    assert len(sentence) < 500
    return sentence


def one_tensor(data: bytes = bytes(4096), **fields: object) -> bytes:
    """A file of one tensor "w"."""
    return raw.build([], [raw.tensor("w", **fields)], data)


class TestValues:
    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("general.architecture", "llama"),
            ("u8", 255),
            ("i8", -128),
            ("u16", 65535),
            ("i16", -32768),
            ("u32", 2**32 - 1),
            ("i32", -(2**31)),
            ("f32", 0.5),
            ("true", True),
            ("false", False),
            ("text", "grüße 🙂"),
            ("empty", ""),
            ("u64", 2**64 - 1),
            ("i64", -(2**63)),
            ("f64", 1e300),
        ],
    )
    def test_scalars_keep_their_value_and_their_python_type(self, key, expected):
        value = parse(raw.every_value_type()).metadata[key]
        assert value == expected
        assert type(value) is type(expected)

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            (raw.U8, "u1"),
            (raw.I8, "i1"),
            (raw.U16, "u2"),
            (raw.I16, "i2"),
            (raw.U32, "u4"),
            (raw.I32, "i4"),
            (raw.F32, "f4"),
            (raw.BOOL, "?"),
            (raw.U64, "u8"),
            (raw.I64, "i8"),
            (raw.F64, "f8"),
        ],
    )
    def test_numeric_arrays_become_numpy_arrays_of_their_type(self, kind, dtype):
        array = parse(raw.every_value_type()).metadata[f"array.{kind}"]
        assert array.dtype == np.dtype(dtype)
        assert array.tolist() == [0, 1, 1]

    def test_arrays_do_not_look_into_the_mapping(self):
        data = bytearray(raw.build([raw.entry("a", raw.ARRAY, (raw.I32, [5, 6]))]))
        metadata = parse_header(memoryview(data), "m.gguf", 0).metadata
        data[:] = bytes(len(data))
        assert metadata["a"].tolist() == [5, 6]

    def test_nested_arrays(self):
        nested = parse(raw.every_value_type()).metadata["array.nested"]
        assert nested[0].tolist() == [1, 2]
        assert nested[1] == ["x", "y"]
        assert nested[2][0].tolist() == [7]

    def test_empty_arrays_even_as_the_last_bytes_of_the_file(self):
        for kind, empty in ((raw.F32, 0), (raw.BOOL, 0), (raw.STRING, 0), (raw.ARRAY, 0)):
            data = raw.build([raw.entry("a", raw.ARRAY, (kind, []))], alignment=1)
            assert len(parse(data).metadata["a"]) == empty

    def test_strings_of_an_array_are_decoded_on_first_access_only(self, monkeypatch):
        decoded = []
        decode = StringArray.decode
        monkeypatch.setattr(StringArray, "decode", lambda self: decoded.append(1) or decode(self))
        metadata = parse(raw.every_value_type()).metadata
        decoded.clear()  # nested ones are decoded at once
        assert metadata.length("array.strings") == 4
        assert decoded == []
        assert metadata["array.strings"] == ["a", "", "grüße", "long " * 20]
        assert metadata["array.strings"] is metadata["array.strings"]
        assert metadata.length("array.strings") == 4
        assert decoded == [1]

    def test_strings_of_an_array_may_hold_bytes_that_are_not_utf8(self):
        data = raw.build([raw.entry("a", raw.ARRAY, (raw.STRING, [b"\xff", b"ok"]))])
        assert parse(data).metadata["a"] == ["�", "ok"]

    def test_asking_whether_a_key_is_there_decodes_nothing(self, monkeypatch):
        metadata = parse(raw.every_value_type()).metadata
        monkeypatch.setattr(StringArray, "decode", lambda self: pytest.fail("decoded"))
        assert "array.strings" in metadata
        assert "absent" not in metadata

    def test_length_is_that_of_arrays_and_zero_of_all_else(self):
        metadata = parse(raw.every_value_type()).metadata
        assert [
            metadata.length(key) for key in ("array.4", "array.nested", "array.none", "text", "absent")
        ] == [
            3,
            3,
            0,
            0,
            0,
        ]

    def test_metadata_is_a_mapping_in_file_order(self):
        metadata = parse(raw.every_value_type()).metadata
        assert list(metadata)[:3] == ["general.architecture", "general.alignment", "u8"]
        assert len(metadata) == len(list(metadata)) == 31
        assert "absent" not in metadata


class TestTable:
    def test_shape_is_reversed_and_offset_absolute(self):
        data = raw.every_value_type()
        tensors = parse(data).tensors
        start = len(data) - (160 + 48)
        info = tensors["blk.0.attn_q.weight"]
        assert info.shape == (2, 3, 4)
        assert info.type is GGMLType.F16
        assert (info.offset, info.nbytes) == (start + 160, 48)
        assert tensors["token_embd.weight"].nbytes == 3 * 34
        assert list(tensors) == ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"]

    @pytest.mark.parametrize("version", [2, 3])
    def test_versions_2_and_3(self, version):
        header = parse(raw.build([], [raw.tensor("w")], bytes(32), version=version))
        assert header.version == version

    @pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
    def test_alignment_of_the_file_places_the_data(self, alignment):
        entries = [raw.entry("general.alignment", raw.U32, alignment)]
        data = raw.build(entries, [raw.tensor("w")], bytes(range(32)), alignment=alignment)
        header = parse(data)
        info = header.tensors["w"]
        assert header.alignment == alignment
        assert info.offset % alignment == 0
        assert data[info.offset : info.offset + info.nbytes] == bytes(range(32))

    @pytest.mark.parametrize("kind", sorted(gguf.GGML_QUANT_SIZES))
    def test_every_known_block_type_has_its_size(self, kind):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        info = parse(one_tensor(dims=(2 * block, 3), kind=int(kind))).tensors["w"]
        assert info.type is kind
        assert info.nbytes == 6 * block_bytes

    def test_tensor_order_in_the_file_need_not_be_that_of_the_data(self):
        tensors = [raw.tensor("b", offset=32), raw.tensor("a", offset=0)]
        assert list(parse(raw.build([], tensors, bytes(64))).tensors) == ["b", "a"]

    def test_a_file_without_tensors(self):
        assert parse(raw.build([raw.entry("a", raw.U8, 1)], alignment=1)).tensors == {}

    def test_reads_what_the_gguf_package_writes(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_uint32("a", 7)
        writer.add_array("names", ["x", "yy"])
        writer.add_array("flags", [True, False])
        weight = np.arange(12, dtype=np.float32).reshape(3, 4)
        writer.add_tensor("w", weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = (tmp_path / "m.gguf").read_bytes()
        header = parse(data)
        assert header.metadata["a"] == 7
        assert header.metadata["names"] == ["x", "yy"]
        assert header.metadata["flags"].tolist() == [True, False]
        info = header.tensors["w"]
        assert info.shape == (3, 4)
        np.testing.assert_array_equal(
            np.frombuffer(data, np.float32, 12, info.offset).reshape(info.shape), weight
        )


class TestNotGGUF:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (struct.pack("<Q", 20) + b'{"__metadata__":{}}', "safetensors"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\n  <html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
            (b"PK\x03\x04 archive/data.pkl", "PyTorch"),
            (b"lmgg" + bytes(60), "old GGML"),
            (b"fmgg" + bytes(60), "old GGML"),
            (b"tjgg" + bytes(60), "old GGML"),
            (b"algg" + bytes(60), "an adapter"),
            (b"\x89PNG\r\n", "not a GGUF file (it begins with b'\\x89PNG')"),
            (b"GG", "not a GGUF file"),
            (b"", "the file is empty"),
            (b"FUGG" + bytes(60), "big-endian"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
            (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian"),
            (raw.build(version=1), "version must be 2 or 3, got 1"),
            (raw.build(version=4), "version must be 2 or 3, got 4"),
            (raw.build(version=2**32 - 1), "version must be 2 or 3, got 4294967295"),
        ],
    )
    def test_other_files_are_named_for_what_they_are(self, data, words):
        assert words in refusal(data)


class TestDamage:
    def test_truncation_at_every_byte_is_refused(self):
        data = raw.every_value_type()
        parse(data)
        for size in range(len(data)):
            refusal(data[:size])

    @pytest.mark.parametrize("claimed", [1, 1000, 2**32, 2**63, 2**64 - 1])
    def test_counts_beyond_the_file_are_refused_at_once(self, claimed):
        assert "truncated or damaged" in refusal(raw.build(counts=(0, claimed)))
        assert "truncated or damaged" in refusal(raw.build(counts=(claimed, 0), alignment=1))

    @pytest.mark.parametrize("claimed", [100, 2**31, 2**61, 2**63, 2**64 - 1])
    @pytest.mark.parametrize("item", [raw.U8, raw.BOOL, raw.F64, raw.STRING, raw.ARRAY])
    def test_item_counts_beyond_the_file_are_refused_at_once(self, item, claimed):
        array = raw.string("a") + raw.u32(raw.ARRAY) + raw.u32(item) + raw.u64(claimed)
        assert "metadata 'a'" in refusal(raw.build([array]))

    @pytest.mark.parametrize("claimed", [100, 2**20, 2**63, 2**64 - 8, 2**64 - 1])
    def test_string_lengths_beyond_the_file_are_refused(self, claimed):
        key = raw.u64(claimed) + b"a"
        assert "the key of metadata entry 0" in refusal(raw.build([key + raw.u32(0) + b"\0"]))
        text = raw.string("a") + raw.u32(raw.STRING) + raw.u64(claimed)
        assert "metadata 'a'" in refusal(raw.build([text]))
        strings = raw.string("a") + raw.u32(raw.ARRAY) + raw.u32(raw.STRING) + raw.u64(1) + raw.u64(claimed)
        assert "the strings of metadata 'a'" in refusal(raw.build([strings]))
        name = raw.u64(claimed) + b"w" + bytes(24)
        assert "the name of tensor 0" in refusal(raw.build([], [name]))

    def test_a_string_array_that_ends_inside_the_length_of_its_last_string_is_refused(self):
        # Three strings are claimed, which 24 bytes could hold, but the second ends 3 bytes before the file does.
        array = (
            raw.u32(raw.ARRAY)
            + raw.u32(raw.STRING)
            + raw.u64(3)
            + raw.string("")
            + raw.string("12345")
            + b"abc"
        )
        assert "the strings of metadata 'a'" in refusal(raw.build([raw.string("a") + array], alignment=1))

    def test_a_value_is_bounded_even_where_the_file_is_long(self):
        size = 1 << 28
        data = np.zeros(size, np.uint8)  # untouched pages cost nothing
        for item in (raw.STRING, raw.ARRAY, raw.U8):
            head = raw.build(
                [raw.string("a") + raw.u32(raw.ARRAY) + raw.u32(item) + raw.u64(size // 12 - 100)]
                if item != raw.U8
                else [raw.string("a") + raw.u32(raw.STRING) + raw.u64(size - 1000)],
                alignment=1,
            )
            data[: len(head)] = np.frombuffer(head, np.uint8)
            tracemalloc.start()
            begin = time.perf_counter()
            with pytest.raises(GGUFError) as sentence:
                parse_header(memoryview(data), "m.gguf", 0)
            seconds = time.perf_counter() - begin
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert f"more than {65536 if item == raw.ARRAY else 67108864}" in str(sentence.value)
            assert peak < 1e6 and seconds < 1

    def test_long_strings_of_an_array_are_bounded_together(self):
        data = np.zeros(1 << 28, np.uint8)
        array = raw.u32(raw.ARRAY) + raw.u32(raw.STRING) + raw.u64(2) + raw.u64(1 << 27)
        head = raw.build([raw.string("a") + array], alignment=1)
        data[: len(head)] = np.frombuffer(head, np.uint8)
        with pytest.raises(GGUFError, match="the strings of metadata 'a'"):
            parse_header(memoryview(data), "m.gguf", 0)

    def test_unknown_value_types_are_refused(self):
        assert "value type 13" in refusal(raw.build([raw.string("a") + raw.u32(13) + bytes(64)]))
        array = raw.string("a") + raw.u32(raw.ARRAY) + raw.u32(99) + raw.u64(1) + bytes(64)
        assert "item type 99" in refusal(raw.build([array]))

    def test_deep_nesting_is_refused(self):
        content = (raw.U8, [1])
        for _ in range(4):
            content = (raw.ARRAY, [content])
        assert "nests arrays deeper than 4" in refusal(raw.build([raw.entry("a", raw.ARRAY, content)]))
        endless = raw.string("a") + raw.u32(raw.ARRAY) + (raw.u32(raw.ARRAY) + raw.u64(1)) * 5000
        assert "nests arrays deeper than 4" in refusal(raw.build([endless]))

    def test_nested_arrays_are_bounded_over_the_whole_file(self):
        # Each level keeps to the bound of 65536; together they would make a million arrays out of zeros.
        inner = raw.u32(raw.ARRAY) + raw.u64(65536) + bytes(12 * 65536)
        array = raw.u32(raw.ARRAY) + raw.u32(raw.ARRAY) + raw.u64(16) + inner * 16
        entries = [raw.string("a") + array]
        data = raw.build(entries, alignment=1)
        tracemalloc.start()
        try:
            assert "brings the nested arrays to 65552, more than 65536" in refusal(data)
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()
        half = [raw.entry(key, raw.ARRAY, (raw.ARRAY, [(raw.U8, [])] * 40000)) for key in "ab"]
        assert len(parse(raw.build(half[:1])).metadata["a"]) == 40000
        assert "metadata 'b' brings the nested arrays to 80000" in refusal(raw.build(half))

    def test_long_names_are_cut_off_in_messages(self):
        name = "x" * 60000
        for data in (
            raw.build([raw.entry(name, raw.U8, 1)] * 2),
            raw.build([raw.string(name) + raw.u32(99)]),
            raw.build([], [raw.tensor(name, offset=4096)], bytes(32)),
            raw.build([], [raw.tensor(name, dims=(0,))], bytes(32)),
            raw.build([], [raw.tensor(name), raw.tensor(name, offset=32)], bytes(64)),
            raw.build([], [raw.tensor(name), raw.tensor(name + "y")], bytes(64)),
        ):
            assert "x" * 80 + "..." in refusal(data)

    def test_names_that_would_steer_a_terminal_are_escaped_in_messages(self):
        name = "a\x1b[31m\n\u202eb"
        for data in (
            raw.build([raw.entry(name, raw.U8, 1)] * 2),
            raw.build([raw.string(name) + raw.u32(99)]),
            raw.build([], [raw.tensor(name, offset=4096)], bytes(32)),
            raw.build([], [raw.tensor(name, dims=(31,), kind=raw.Q8_0_TYPE)], bytes(32)),
            raw.build([], [raw.tensor(name), raw.tensor(name, offset=32)], bytes(64)),
        ):
            assert r"a\x1b[31m\n\u202eb" in refusal(data)

    def test_a_key_twice_is_refused(self):
        assert "'a' appears twice" in refusal(raw.build([raw.entry("a", raw.U8, 1)] * 2))

    def test_a_tensor_twice_is_refused(self):
        tensors = [raw.tensor("w"), raw.tensor("w", offset=32)]
        assert "tensor w appears twice" in refusal(raw.build([], tensors, bytes(64)))

    @pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
    def test_text_that_is_not_utf8_is_refused(self, text):
        assert "metadata entry 0 is not UTF-8" in refusal(raw.build([raw.entry(text, raw.U8, 1)]))
        assert "metadata 'a' is not UTF-8" in refusal(raw.build([raw.entry("a", raw.STRING, text)]))
        assert "tensor 0 is not UTF-8" in refusal(raw.build([], [raw.tensor(text)], bytes(32)))

    def test_a_name_too_long_is_refused(self):
        sentence = refusal(raw.build([raw.entry("a" * 65537, raw.U8, 1)]))
        assert "the key of metadata entry 0 is 65537 bytes long, more than 65536" in sentence

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (raw.U32, 0),
            (raw.U32, 3),
            (raw.U32, 33),
            (raw.U32, 2**31),
            (raw.I32, -32),
            (raw.U64, 2**64 - 1),
            (raw.U64, 2**63),
            (raw.F32, 32.0),
            (raw.F32, float("nan")),
            (raw.BOOL, True),
            (raw.BOOL, False),
            (raw.STRING, "32"),
            (raw.ARRAY, (raw.U32, [32])),
            (raw.ARRAY, (raw.STRING, ["32"] * 1000)),
        ],
    )
    def test_an_alignment_that_is_no_power_of_two_is_refused(self, kind, value):
        entries = [raw.entry("general.alignment", kind, value)]
        assert "general.alignment must be a power of two" in refusal(
            raw.build(entries, [raw.tensor("w")], bytes(64))
        )

    @pytest.mark.parametrize("rank", [0, 5, 1000, 2**32 - 1])
    def test_a_rank_that_no_tensor_has_is_refused(self, rank):
        sentence = refusal(one_tensor(dims=(1,) * min(rank, 5), rank=rank))
        assert f"tensor w must have 1 to 4 axes, got {rank}" in sentence

    @pytest.mark.parametrize("dims", [(0,), (8, 0), (0, 8), (8, 1, 0, 1)])
    def test_an_axis_of_zero_is_refused(self, dims):
        assert "with an axis of 0" in refusal(one_tensor(dims=dims))

    @pytest.mark.parametrize(
        "dims", [(2**62,), (2**32, 2**32), (2**64 - 1,), (2**63, 2, 2, 2), (2**64 - 1,) * 4]
    )
    def test_absurd_shapes_are_refused(self, dims):
        assert "absurd" in refusal(one_tensor(dims=dims))

    @pytest.mark.parametrize("kind", [4, 5, 36, 99, 2**31, 2**32 - 1])
    def test_unknown_block_types_are_refused(self, kind):
        assert f"tensor w has block type number {kind}" in refusal(one_tensor(kind=kind))

    @pytest.mark.parametrize(("dims", "kind"), [((31,), 8), ((33, 32), 8), ((128, 256), 12)])
    def test_rows_that_are_no_multiple_of_the_block_are_refused(self, dims, kind):
        sentence = refusal(one_tensor(dims=dims, kind=kind))
        assert f"tensor w has rows of {dims[0]}, not a multiple of" in sentence

    @pytest.mark.parametrize("offset", [1, 16, 31, 2**63 + 1, 2**64 - 1])
    def test_misaligned_offsets_are_refused(self, offset):
        assert "must start at a multiple of 32" in refusal(one_tensor(offset=offset))

    @pytest.mark.parametrize("offset", [4096, 2**32, 2**63, 2**64 - 32])
    def test_offsets_outside_the_file_are_refused(self, offset):
        assert "tensor w lies at bytes" in refusal(one_tensor(offset=offset))

    def test_a_tensor_may_end_with_the_file_but_not_a_byte_later(self):
        data = one_tensor(data=bytes(32))
        parse(data)
        assert "it is truncated" in refusal(data[:-1])

    @pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 32), (32, 0)])
    def test_overlapping_tensors_are_refused(self, first, second):
        tensors = [raw.tensor("a", (16,), offset=first), raw.tensor("b", (16,), offset=second)]
        assert "overlap" in refusal(raw.build([], tensors, bytes(128)))

    def test_a_large_tensor_hides_no_overlap_with_one_further_on(self):
        tensors = [raw.tensor("a", (64,)), raw.tensor("b", offset=256), raw.tensor("c", offset=224)]
        assert "tensors a and c overlap" in refusal(raw.build([], tensors, bytes(512)))
