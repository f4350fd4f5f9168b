"""Probed ceilings and the file that keeps them."""

import dataclasses
import json

import jax
import pytest

from airjax import bench
from airjax.bench import probes
from airjax.predict import Ceilings

HERE = {"device": "a", "jax": "1"}
KEPT = Ceilings(1e9, 2e9, 3e9, 4e9, 5e9, None, 6e12, 7e-6)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "file"
    path.write_bytes(bytes(3 << 20))
    return path


@pytest.fixture(scope="module")
def probed(file):
    return bench.probe(jax.devices()[0], file, memory_bytes=8 << 20)


def test_probes_give_positive_numbers_and_nothing_where_there_is_no_link(probed):
    assert probed.link_up_bytes_per_s is None and probed.link_down_bytes_per_s is None
    for name in ("memory_bytes_per_s", "product_bytes_per_s", "flops_per_s", "dispatch_s"):
        assert getattr(probed, name) > 0
    # A file system may refuse direct reads; then there is no rate, and not that of the page cache.
    assert probed.disk_bytes_per_s is None or probed.disk_bytes_per_s > 0


def test_a_file_shorter_than_a_page_has_no_disk_rate(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    assert probes.probe_disk(path) is None


def test_a_disk_is_known_by_its_file_system(file, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert bench.disk_of(file) == bench.disk_of(other)


def test_ceilings_are_read_as_they_were_written(tmp_path, probed):
    path = tmp_path / "new" / "ceilings.json"
    bench.save_ceilings(path, HERE, "8:1", probed)
    assert bench.load_ceilings(path, HERE, "8:1") == probed
    assert {"identity", "date", "ceilings", "disks"} == json.loads(path.read_text()).keys()


@pytest.mark.parametrize("other", [{"device": "b", "jax": "1"}, {"device": "a", "jax": "2"}, {"device": "a"}])
def test_another_machine_or_version_does_not_count(tmp_path, other):
    path = tmp_path / "ceilings.json"
    bench.save_ceilings(path, HERE, "8:1", KEPT)
    assert bench.load_ceilings(path, other, "8:1") is None
    bench.save_ceilings(path, other, "8:2", KEPT)
    assert bench.load_ceilings(path, HERE, "8:1") is None
    assert bench.load_ceilings(path, other, "8:1").disk_bytes_per_s is None


def test_each_disk_of_a_machine_has_its_own_rate(tmp_path):
    path = tmp_path / "ceilings.json"
    bench.save_ceilings(path, HERE, "8:1", KEPT)
    bench.save_ceilings(path, HERE, "8:2", dataclasses.replace(KEPT, disk_bytes_per_s=9e9))
    rates = [bench.load_ceilings(path, HERE, disk).disk_bytes_per_s for disk in ("8:1", "8:2", "8:3")]
    assert rates == [3e9, 9e9, None]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"identity": {"device": "a", "jax": "1"}, "ceilings": {}, "disks": {}}']
)
def test_a_broken_file_is_as_none(tmp_path, text):
    path = tmp_path / "ceilings.json"
    assert bench.load_ceilings(path, HERE, "8:1") is None
    path.write_text(text)
    assert bench.load_ceilings(path, HERE, "8:1") is None
    bench.save_ceilings(path, HERE, "8:1", KEPT)
    assert bench.load_ceilings(path, HERE, "8:1") == KEPT


def test_the_identity_names_machine_and_versions():
    identity = bench.identity(jax.devices()[0])
    assert identity["jax"] == jax.__version__
    assert all(isinstance(value, str) and value for value in identity.values())


def test_links_of_several_devices_are_kept(tmp_path):
    path = tmp_path / "ceilings.json"
    probed = dataclasses.replace(KEPT, links_alone_bytes_per_s=(5e10, 4e10), links_together_bytes_per_s=7e10)
    bench.save_ceilings(path, {"device": "one"}, "8:1", probed)
    kept = bench.load_ceilings(path, {"device": "one"}, "8:1")
    assert kept == probed
    assert kept.links.scale == 1.4
    assert kept.link_of(1) == KEPT.link_up_bytes_per_s and kept.link_of(2) == 3.5e10
