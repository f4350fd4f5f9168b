"""The picture of two sweeps: which events it shows, and that it is written."""

import pytest

from airjax.bench import plot_sweeps
from airjax.bench.plot import busy_share, two_sweeps
from airjax.streaming.timeline import Event


def sweeps(count, layers=3):
    """A link that is always busy; a block takes half the time and follows its copy."""
    events = []
    for step in range(count * layers):
        layer = step % layers
        events.append(Event("host to device", f"layer {layer}", step, step + 1, 100))
        events.append(Event("compute", f"layer {layer}", step + 1, step + 1.5, 0))
    return events


def test_two_whole_sweeps_are_shown_from_zero_on():
    shown = two_sweeps(sweeps(5))
    blocks = [event for event in shown if event.lane == "compute"]
    assert [event.name for event in blocks] == ["layer 0", "layer 1", "layer 2"] * 2
    assert blocks[0].start_s == 0
    assert min(event.start_s for event in shown) == 0
    assert max(event.end_s for event in shown) == 6


def test_copies_that_reach_over_the_ends_are_cut():
    copies = [event for event in two_sweeps(sweeps(5)) if event.lane == "host to device"]
    # The copy of the next sweep's first layer runs beside the last block of this one.
    assert copies[-1].name == "layer 0"
    assert sum(event.end_s - event.start_s for event in copies) == 6
    assert busy_share(copies, 6) == 1


def test_busy_time_counts_what_overlaps_once():
    bars = [Event("disk", "a", 0, 2, 0), Event("disk", "b", 1, 3, 0), Event("disk", "c", 5, 6, 0)]
    assert busy_share(bars, 8) == 0.5
    assert busy_share([], 8) == 0


def test_one_sweep_is_too_few():
    with pytest.raises(ValueError, match="needs two sweeps, got 1"):
        two_sweeps(sweeps(1))


def test_the_last_sweep_counts_when_there_are_two():
    blocks = [event for event in two_sweeps(sweeps(2)) if event.lane == "compute"]
    assert len(blocks) == 6


def test_the_picture_has_a_lane_for_each_resource(tmp_path):
    path = tmp_path / "sweeps.png"
    plot_sweeps(sweeps(3), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_bars_of_a_lane_are_its_events(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.broken_barh

    def note(self, xranges, yrange, **options):
        drawn.append((list(xranges), yrange))
        return original(self, xranges, yrange, **options)

    monkeypatch.setattr(Axes, "broken_barh", note)
    plot_sweeps(sweeps(3), tmp_path / "sweeps.png")
    shown = two_sweeps(sweeps(3))
    for row, lane in enumerate(("disk", "host to device", "compute", "device to host")):
        bars, (bottom, height) = drawn[row]
        assert bottom < row < bottom + height
        assert bars == [
            (event.start_s * 1e3, (event.end_s - event.start_s) * 1e3)
            for event in shown
            if event.lane == lane
        ]
