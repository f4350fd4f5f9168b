"""How far the host dispatches ahead of the device."""

import collections

import pytest

from airjax.engine.sweep import hold_back


@pytest.mark.parametrize(("tokens", "waited"), [(512, [0, 1, 2, 3, 4]), (1, [])])
def test_the_host_is_only_some_layers_of_a_prompt_ahead(tokens, waited):
    seen, passed = [], collections.deque()

    class Hidden:
        shape = (1, tokens, 8)

        def __init__(self, layer):
            self.layer = layer

        def block_until_ready(self):
            seen.append(self.layer)

    for layer in range(8):
        hold_back(passed, Hidden(layer))
    assert seen == waited
