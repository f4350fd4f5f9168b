"""Layers that are cut among devices. A process has one device, or many from its start, so the checks run in another."""

from several_devices import run_checks


def test_devices_together_do_what_one_does(smollm2, gemma3):
    models = {"AIRJAX_TEST_SMOLLM2": str(smollm2), "AIRJAX_TEST_GEMMA3": str(gemma3)}
    assert run_checks("on_eight_devices.py", 8, **models) > 20
