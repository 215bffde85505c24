"""Step caches on a GPU: a skipped step waits for nothing, and times come from the device."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.modules import block_stack
from diffaccel.samplers import FirstBlockCache, SeaCache, Spectrum, TaylorSeer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("config", [Spectrum(), TaylorSeer(), SeaCache(), FirstBlockCache(threshold=1e9)])
def test_a_skipped_step_waits_for_nothing(config, monkeypatch) -> None:
    """What a cache does, deciding, forecasting and keeping, runs under the mode that raises on a synchronisation."""
    pipe = tiny.make("flux").to("cuda")
    ask = block_stack.BlockStack.call

    def call_strictly(self, number, block, plain, args, kwargs):
        def relaxed(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return plain(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        torch.cuda.set_sync_debug_mode("error")
        try:
            return ask(self, number, block, relaxed, args, kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(block_stack.BlockStack, "call", call_strictly)
    diffaccel.accelerate(pipe, config)
    pipe(**{**tiny.call_kwargs("flux"), "num_inference_steps": 12})
    caches = diffaccel.summary(pipe).last_run["caches"]
    assert caches["skipped_calls"] > 0 and caches["real_seconds"] > 0 and caches["skipped_seconds"] > 0
