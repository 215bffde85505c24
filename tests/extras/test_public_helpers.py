"""Public helpers give on an accelerated pipeline what they give on the stock one, and outlast ``remove``.

Caches of diffusers come with it; ``pip install -e '.[helpers]'`` installs the others, which are skipped without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig

import diffaccel
from diffaccel.samplers import Euler, Scheduler

STEPS = 6


@contextmanager
def cached(pipe: Any, config: Any) -> Any:
    pipe.transformer.enable_cache(config)
    yield
    pipe.transformer.disable_cache()


def broadcast(pipe: Any) -> Any:
    """Pyramid attention broadcast (arXiv 2408.12588): attention of every other step."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
        cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip
    return cached(pipe, config)


def faster_cache(pipe: Any) -> Any:
    """FasterCache (arXiv 2410.19355): attention of every other step, and the negative branch of some."""
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 900),
        attention_weight_callback=lambda module: 0.3, tensor_format="BFCHW",
        is_guidance_distilled="CogVideoX" not in type(pipe).__name__,
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip
    return cached(pipe, config)


@contextmanager
def token_merging(pipe: Any) -> Any:
    """Token merging (arXiv 2303.17604)."""
    tomesd = pytest.importorskip("tomesd")
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=4, use_rand=False)
    yield
    tomesd.remove_patch(pipe)


@contextmanager
def deep_cache(pipe: Any) -> Any:
    """DeepCache (arXiv 2312.00858)."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    yield
    helper.disable()


@contextmanager
def cache_dit(pipe: Any) -> Any:
    """DBCache of cache-dit, which replaces ``__call__`` on the pipeline's class and ``forward`` on its network."""
    cache = pytest.importorskip("cache_dit")
    options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}
    cache.enable_cache(pipe, cache_config=cache.DBCacheConfig(**options))
    yield
    cache.disable_cache(pipe)


def tiny_call(name: str) -> Callable[[Any], torch.Tensor]:
    if name in tiny.FAMILIES:
        return lambda pipe: pipe(**tiny.call_kwargs(name, steps=STEPS)).images
    return lambda pipe: tiny_more.result(pipe(**tiny_more.call_kwargs(name, steps=STEPS)))


@pytest.mark.parametrize(
    ("helper", "name"),
    [
        (broadcast, "flux"), (broadcast, "cogvideox"), (faster_cache, "flux"), (faster_cache, "cogvideox"),
        (token_merging, "sd"), (token_merging, "sdxl"), (deep_cache, "sd"), (deep_cache, "sdxl"), (cache_dit, "flux"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False], ids=["helper_first", "helper_last"])
def test_a_helper_gives_what_it_gives_on_the_stock_pipeline(helper: Any, name: str, is_first: bool) -> None:
    pipe, call = (tiny if name in tiny.FAMILIES else tiny_more).make(name), tiny_call(name)
    plain, kind = call(pipe), type(pipe)
    with helper(pipe):
        helped = [call(pipe) for _ in range(2)]
    assert not torch.equal(helped[0], plain)
    for config in (Scheduler(), *([Euler()] if name in tiny.FAMILIES else [])):
        if not is_first:
            diffaccel.accelerate(pipe, config)
        with helper(pipe):
            if is_first:
                diffaccel.accelerate(pipe, config)
            assert all(torch.equal(call(pipe), latents) for latents in helped)
            diffaccel.remove(pipe)
            assert all(torch.equal(call(pipe), latents) for latents in helped)
        assert torch.equal(call(pipe), plain)
        diffaccel.remove(pipe)
        assert type(pipe) is kind
