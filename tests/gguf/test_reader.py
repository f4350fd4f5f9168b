"""Opening files: whole and split, what is refused before anything is read, and what open files give."""

import gc
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import gguf_bytes as raw
import numpy as np
import pytest

from airjax.gguf import GGUFError, open_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every value type."""
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.every_value_type())
    return path


def refusal(path: Path) -> str:
    """The sentence with which this path is refused."""
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path.parent))
    return str(caught.value)


def split(folder: Path, parts: int = 3, **changes: object) -> list[Path]:
    """A model in parts with one tensor in each; `changes` override the metadata "split.*" of the second."""
    paths = [folder / f"m-{n + 1:05}-of-{parts:05}.gguf" for n in range(parts)]
    for n, path in enumerate(paths):
        entries = [raw.entry("general.architecture", raw.STRING, "llama")] if n == 0 else []
        own = {"no": n, "count": parts, "tensors.count": parts} | (changes if n == 1 else {})
        for key, value in own.items():
            entries.append(
                raw.entry(f"split.{key}", raw.STRING if isinstance(value, str) else raw.U16, value)
            )
        name = str(changes.get("tensor", f"t{n}")) if n == 1 else f"t{n}"
        path.write_bytes(raw.build(entries, [raw.tensor(name)], bytes([n] * 32)))
    return paths


class TestOpen:
    def test_a_path_as_text_or_object(self, model):
        for path in (model, str(model)):
            with open_gguf(path) as file:
                assert file.path == model
                assert file.paths == (model,)
                assert (file.version, file.alignment) == (3, 32)

    def test_raw_is_a_read_only_view_of_the_mapping(self, model):
        with open_gguf(model) as file:
            view = file.raw("blk.0.attn_q.weight")
            assert view.dtype == np.uint8
            assert view.tolist() == [i % 251 for i in range(160, 160 + 48)]
            assert np.shares_memory(view, file.maps[0])
            assert not view.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                view.setflags(write=True)

    def test_views_outlive_the_open_file(self, model):
        with open_gguf(model) as file:
            view = file.raw("token_embd.weight")
        del file
        assert view[5] == 5

    def test_closing_twice_and_failing_leave_no_descriptors(self, model):
        gc.collect()  # the mappings of tests before
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        file = open_gguf(model)
        file.close()
        file.close()
        model.write_bytes(b"GGUF\3")
        refusal(model)
        del file
        gc.collect()  # a mapping goes with the last traceback that looks at it
        if before:
            assert len(os.listdir("/proc/self/fd")) == before

    def test_the_package_imports_no_jax(self):
        code = "import sys, airjax.gguf; sys.exit(any(m.split('.')[0] in ('jax', 'jaxlib') for m in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRefusedPaths:
    def test_a_missing_file(self, tmp_path):
        assert "there is no such file" in refusal(tmp_path / "absent.gguf")
        assert "there is no such file" in refusal(tmp_path / "absent" / "m.gguf")

    def test_a_file_taken_for_a_directory(self, model):
        with pytest.raises(GGUFError, match="can't be opened"):
            open_gguf(model / "m.gguf")

    def test_a_directory(self, tmp_path):
        assert "it is a directory: name the .gguf file in it" in refusal(tmp_path)

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "m.gguf").touch()
        assert "the file is empty" in refusal(tmp_path / "m.gguf")

    def test_a_dangling_link_and_a_circle_of_links(self, tmp_path):
        (tmp_path / "a").symlink_to("nowhere")
        (tmp_path / "b").symlink_to("b")
        assert "there is no such file" in refusal(tmp_path / "a")
        assert "can't be opened" in refusal(tmp_path / "b")

    @pytest.mark.parametrize("name", ["x" * 300, "m\0.gguf", f"{'x' * 300}-00001-of-00002.gguf"])
    def test_names_that_no_file_has(self, tmp_path, name):
        assert "can't be opened" in refusal(tmp_path / name)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
    def test_no_permission(self, model):
        model.chmod(0)
        assert "you lack the permission" in refusal(model)

    def test_permission_refused_by_the_system_is_named(self, model, monkeypatch):
        def denied(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(GGUFError, match="you lack the permission"):
            open_gguf(model)

    # In a process of its own, since what is tested for is that it ends.
    @pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null", "socket"])
    def test_pipes_devices_and_sockets_are_refused_without_waiting(self, tmp_path, kind):
        path = Path(kind) if kind.startswith("/") else tmp_path / "m.gguf"
        with socket.socket(socket.AF_UNIX) as server:
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "socket":
                server.bind(str(path))
            code = "import sys, airjax.gguf as g\ntry: g.open_gguf(sys.argv[1])\nexcept g.GGUFError as e: print(e)"
            result = subprocess.run(
                [sys.executable, "-c", code, str(path)],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        assert result.stdout.startswith(f"{path}: it is a pipe, socket or device")


class TestSplit:
    def test_any_part_opens_all(self, tmp_path):
        paths = split(tmp_path)
        for path in paths:
            with open_gguf(path) as file:
                assert file.paths == tuple(paths)
                assert file.path == paths[0]
                assert file.get("general.architecture", str) == "llama"
                assert [(info.name, info.shard) for info in file.tensors.values()] == [
                    ("t0", 0),
                    ("t1", 1),
                    ("t2", 2),
                ]
                assert [set(file.raw(f"t{n}").tolist()) for n in range(3)] == [{0}, {1}, {2}]

    def test_parts_that_the_gguf_package_splits(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
        weights = {f"blk.{n}.w.weight": np.full((2, 8), n, np.float32) for n in range(5)}
        for name, weight in weights.items():
            writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open_gguf(tmp_path / "m-00002-of-00003.gguf") as file:
            assert list(file.tensors) == list(weights)
            for name, weight in weights.items():
                np.testing.assert_array_equal(file.raw(name).view(np.float32).reshape(2, 8), weight)

    def test_a_missing_part_is_named(self, tmp_path):
        paths = split(tmp_path)
        paths[1].unlink()
        assert "split into 3 files and m-00002-of-00003.gguf is missing: download it" in refusal(paths[2])
        assert refusal(paths[1]).endswith("m-00002-of-00003.gguf: there is no such file: check the path")

    def test_each_part_may_have_an_alignment_of_its_own(self, tmp_path):
        paths = split(tmp_path)
        entries = [raw.entry("general.alignment", raw.U32, 64)]
        paths[0].write_bytes(raw.build(entries, [raw.tensor("t0")], bytes(32), alignment=64))
        with open_gguf(paths[0]) as file:
            assert file.alignment == 64
            assert set(file.raw("t1").tolist()) == {1}

    def test_a_stated_alignment_that_differs_is_refused(self, tmp_path):
        paths = split(tmp_path)
        entries = [raw.entry("general.alignment", raw.U32, 64)]
        paths[1].write_bytes(raw.build(entries, [raw.tensor("t1")], bytes(32), alignment=64))
        assert "its alignment differs from that of m-00001-of-00003.gguf" in refusal(paths[0])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"count": 4}, "split into 4 files by its metadata, but its name says 3"),
            ({"no": 2}, "the file says it is part 2 but its name says 1: rename it"),
            ({"no": "1"}, "metadata split.no must be a whole number, got str"),
            ({"count": "3"}, "metadata split.count must be a whole number, got str"),
            ({"tensor": "t0"}, "tensor t0 is in m-00001-of-00003.gguf too"),
        ],
    )
    def test_parts_that_do_not_belong_together(self, tmp_path, changes, words):
        paths = split(tmp_path, **changes)
        sentence = refusal(paths[0])
        assert words in sentence
        assert sentence.startswith(str(paths[1]))

    def test_a_part_under_another_name_is_refused(self, tmp_path):
        path = split(tmp_path)[0].rename(tmp_path / "m.gguf")
        assert "split into 3 files by its metadata, but its name says 1" in refusal(path)

    @pytest.mark.parametrize("number", [0, 3])
    def test_a_part_numbered_outside_its_count_is_refused(self, tmp_path, number):
        paths = split(tmp_path, 2)
        path = paths[0].with_name(f"m-{number:05}-of-00002.gguf")
        path.write_bytes(paths[0].read_bytes())
        assert f"the number of a part must be 1 to 2, got {number}" in refusal(path)

    @pytest.mark.parametrize("count", [0, 4097, 99999])
    def test_an_absurd_count_by_the_name_is_refused(self, tmp_path, count):
        path = tmp_path / f"m-00001-of-{count:05}.gguf"
        path.write_bytes(raw.every_value_type())
        assert f"must have 1 to 4096 files, got {count}" in refusal(path)

    def test_a_tensor_missing_from_the_parts_is_refused(self, tmp_path):
        paths = split(tmp_path)
        paths[2].write_bytes(raw.build([], [raw.tensor("t2"), raw.tensor("t3", offset=32)], bytes(64)))
        assert "the parts hold 4 tensors, but 3 are promised" in refusal(paths[0])

    def test_a_model_of_one_part_needs_no_other(self, tmp_path):
        path = split(tmp_path, 1)[0]
        with open_gguf(path) as file:
            assert file.paths == (path,)

    def test_a_damaged_part_is_named(self, tmp_path):
        paths = split(tmp_path)
        paths[2].write_bytes(paths[2].read_bytes()[:-1])
        assert refusal(paths[0]).startswith(str(paths[2]))

    def test_a_merged_model_keeps_no_parts(self, tmp_path):
        path = (
            tmp_path / "m.gguf"
        )  # the splitting tool of the ggml project writes a count of 0 when it merges
        path.write_bytes(raw.build([raw.entry("split.count", raw.U16, 0)], [raw.tensor("w")], bytes(32)))
        with open_gguf(path) as file:
            assert list(file.tensors) == ["w"]


class TestGet:
    @pytest.mark.parametrize(
        ("key", "kind", "expected"),
        [
            ("text", str, "grüße 🙂"),
            ("u64", int, 2**64 - 1),
            ("f32", float, 0.5),
            ("true", bool, True),
            ("u8", float, 255.0),
            ("u64", float, 2.0**64),
        ],
    )
    def test_values_of_the_type_asked_for(self, model, key, kind, expected):
        with open_gguf(model) as file:
            value = file.get(key, kind)
        assert value == expected
        assert type(value) is kind

    @pytest.mark.parametrize(
        ("key", "kind", "got"),
        [
            ("text", int, "str"),
            ("u8", str, "int"),
            ("true", int, "bool"),
            ("true", float, "bool"),
            ("u8", bool, "int"),
            ("f32", int, "float"),
            ("array.4", int, "ndarray"),
            ("array.strings", str, "list"),
        ],
    )
    def test_another_type_is_refused_by_name(self, model, key, kind, got):
        with open_gguf(model) as file, pytest.raises(GGUFError) as caught:
            file.get(key, kind)
        assert str(caught.value) == (
            f"{model}: metadata {key} must be of type {kind.__name__}, got {got}: convert the model again"
        )

    def test_a_default_stands_in_for_an_absent_key_only(self, model):
        with open_gguf(model) as file:
            assert file.get("absent", int, None) is None
            assert file.get("u8", int, 1) == 255
            with pytest.raises(GGUFError, match="metadata text must be of type int"):
                file.get("text", int, 1)
            with pytest.raises(GGUFError, match="metadata absent is missing"):
                file.get("absent", int)

    def test_an_unknown_tensor_is_a_key_error(self, model):
        with open_gguf(model) as file, pytest.raises(KeyError):
            file.raw("absent")


class TestCheckUnchanged:
    def test_an_untouched_or_deleted_file_passes(self, model):
        with open_gguf(model) as file:
            file.check_unchanged()
            file.check_unchanged()
            model.unlink()
            file.check_unchanged()

    def test_a_relative_path_means_the_file_that_was_opened(self, model, monkeypatch):
        monkeypatch.chdir(model.parent)
        with open_gguf("m.gguf") as file:
            other = model.parent / "elsewhere"
            other.mkdir()
            (other / "m.gguf").write_bytes(b"another file of that name")
            monkeypatch.chdir(other)
            file.check_unchanged()
            os.truncate(model, 100)
            with pytest.raises(GGUFError, match=r"^m\.gguf: the file changed"):
                file.check_unchanged()

    def test_a_moved_file_passes_even_when_its_folder_became_something_else(self, tmp_path):
        folder = tmp_path / "models"
        folder.mkdir()
        (folder / "m.gguf").write_bytes(raw.every_value_type())
        with open_gguf(folder / "m.gguf") as file:
            folder.rename(tmp_path / "moved")
            folder.touch()
            file.check_unchanged()
            os.truncate(tmp_path / "moved" / "m.gguf", 100)
            with pytest.raises(GGUFError, match="the file changed"):
                file.check_unchanged()

    def test_a_file_that_its_server_lost(self, model, monkeypatch):
        def stale(descriptor: int) -> os.stat_result:
            raise OSError(116, "Stale file handle")

        with open_gguf(model) as file, monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            with pytest.raises(GGUFError, match="the file changed"):
                file.check_unchanged()

    def test_a_shrunken_file(self, model):
        with open_gguf(model) as file:
            os.truncate(model, 100)
            with pytest.raises(GGUFError, match="the file changed while it was open"):
                file.check_unchanged()

    def test_a_grown_file(self, model):
        with open_gguf(model) as file:
            with open(model, "ab") as appended:
                appended.write(b"more")
            with pytest.raises(GGUFError, match="the file changed"):
                file.check_unchanged()

    def test_a_file_written_over_at_the_same_size(self, model):
        with open_gguf(model) as file:
            status = model.stat()
            with open(model, "r+b") as written:
                written.write(b"GGUF")
            os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
            with pytest.raises(GGUFError, match="the file changed"):
                file.check_unchanged()

    def test_a_file_that_another_took_the_place_of(self, model, tmp_path):
        status = model.stat()
        other = tmp_path / "other.gguf"
        other.write_bytes(model.read_bytes())
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        with open_gguf(model) as file:
            os.replace(other, model)
            with pytest.raises(GGUFError, match="the file changed"):
                file.check_unchanged()

    def test_the_changed_part_is_named(self, tmp_path):
        paths = split(tmp_path)
        with open_gguf(paths[0]) as file:
            os.truncate(paths[2], 10)
            with pytest.raises(GGUFError) as caught:
                file.check_unchanged()
        assert str(caught.value).startswith(str(paths[2]))


class TestRealModels:
    def test_metadata_and_tensors_are_those_of_the_gguf_package(self, smollm2):
        reader = gguf.GGUFReader(smollm2)
        with open_gguf(smollm2) as file:
            fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
            assert list(file.metadata) == list(fields)
            for key, field in fields.items():
                value, expected = file.metadata[key], field.contents()
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
            assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
            for theirs in reader.tensors:
                info = file.tensors[theirs.name]
                assert info.type == theirs.tensor_type
                assert info.shape == tuple(reversed([int(size) for size in theirs.shape]))
                assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
                np.testing.assert_array_equal(file.raw(theirs.name), theirs.data.reshape(-1).view(np.uint8))

    def test_opening_a_large_file_allocates_little(self, gemma3):
        tracemalloc.start()
        try:
            with open_gguf(gemma3) as file:
                peak = tracemalloc.get_traced_memory()[1]
                tokens = file.metadata.length("tokenizer.ggml.tokens")
        finally:
            tracemalloc.stop()
        assert tokens == 262144
        # The token list alone, decoded, takes more than 16 MB; the weights 240 MB.
        assert peak < 16e6
