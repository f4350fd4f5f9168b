"""The timeline: what it records and what it writes."""

import itertools
import json
import time

import jax.numpy as jnp
import pytest

from airjax.streaming import Timeline


def test_events_come_in_order_of_their_start():
    timeline = Timeline()
    now = time.perf_counter()
    timeline.add("disk", "second", now + 2, now + 3, 7)
    timeline.add("compute", "first", now, now + 1)
    first, second = timeline.events()
    assert (first.name, second.name, second.nbytes) == ("first", "second", 7)
    assert second.end_s - second.start_s == pytest.approx(1)


def test_watched_work_on_a_lane_does_not_overlap():
    timeline = Timeline()
    for step in range(20):
        timeline.watch("compute", str(step), jnp.ones((200, 200)) @ jnp.ones((200, 200)))
    events = timeline.events()
    assert [event.name for event in events] == [str(step) for step in range(20)]
    for before, after in itertools.pairwise(events):
        assert before.start_s <= before.end_s <= after.end_s
        assert after.start_s >= before.end_s - 1e-9


def test_the_saved_file_is_a_trace_with_named_lanes(tmp_path):
    timeline = Timeline()
    now = time.perf_counter()
    timeline.add("host to device", "layer 3", now, now + 0.5, 1024)
    timeline.save(tmp_path / "trace.json")
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert list(names.values()) == ["disk", "host to device", "compute", "device to host"]
    (bar,) = [row for row in rows if row["ph"] == "X"]
    assert names[bar["tid"]] == "host to device" and bar["name"] == "layer 3"
    assert bar["dur"] == pytest.approx(5e5) and bar["args"] == {"bytes": 1024}
