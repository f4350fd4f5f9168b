"""Pipelines and replicas. A process has one device, or many from its start, so the checks run in another."""

from several_devices import run_checks


def test_runs_of_layers_and_whole_models_do_what_one_device_does():
    assert run_checks("on_four_devices.py", 4) > 30
