"""The caches of diffusers under the driver: they skip, are reset, and say where they would do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_more
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import DiffusersCache, Spectrum

RATIOS = {"mag_ratios": [1.0] * 8, "retention_ratio": 0.25, "max_skip_steps": 3}
HUGE = {"threshold": 1e9}


PAB = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 999)}


def make(family: str) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family)


def draw(pipe: Any, family: str, steps: int = 8, **changes: Any) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**{**kwargs, "num_inference_steps": steps})).clone()


@pytest.mark.parametrize(
    ("family", "kind", "options", "skipped"),
    [
        ("flux", "first_block", HUGE, 14),
        pytest.param("wan", "first_block", HUGE, 14, marks=pytest.mark.slow),
        pytest.param(
            "hunyuan",
            "taylorseer",
            {"cache_interval": 2, "taylor_factors_dtype": "float32"},
            None,
            marks=pytest.mark.slow,
        ),
        ("wan", "taylorseer", {"cache_interval": 2, "taylor_factors_dtype": "float32"}, None),
        ("flux", "mag", RATIOS, None),
        ("wan", "sea", {**HUGE, "max_consecutive_cached": 0}, 12),
        pytest.param("flux", "sea", {**HUGE, "max_consecutive_cached": 0}, 12, marks=pytest.mark.slow),
        ("cogvideox", "pab", PAB, None),
    ],
)
def test_it_skips_is_reset_and_removed(family: str, kind: Any, options: dict[str, Any], skipped: int | None) -> None:
    pipe = make(family)
    stock, first = draw(pipe, family), draw(pipe, family, steps=1, size=48)
    diffaccel.accelerate(pipe, DiffusersCache(kind=kind, options=options))
    cached = draw(pipe, family)
    caches = diffaccel.summary(pipe).last_run["caches"]
    assert caches["skipped_calls"] == skipped if skipped else caches["skipped_calls"] > 0
    assert torch.equal(draw(pipe, family, steps=1, size=48), first)
    assert torch.equal(draw(pipe, family), cached)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe, family), stock) and not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("kind", ["first_block", "mag", "sea"])
def test_a_threshold_of_0_is_no_cache_where_nothing_changes_either(kind: Any) -> None:
    """The first block adds nothing and all ratios are 1: a change of 0 from step to step, or 0 / 0."""
    pipe = make("flux")
    with torch.no_grad():
        for weight in pipe.transformer.transformer_blocks[0].parameters():
            weight.zero_()
    stock = draw(pipe, "flux", steps=4)
    ratios = {"mag_ratios": [1.0] * 4, "retention_ratio": 0.0} if kind == "mag" else {}
    diffaccel.accelerate(pipe, DiffusersCache(kind=kind, options={"threshold": 0.0, **ratios}))
    assert torch.equal(draw(pipe, "flux", steps=4), stock)
    assert not diffaccel.summary(pipe).last_run["caches"]["skipped_calls"] and not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("family", "kind", "options", "match"),
    [
        ("sd3", "first_block", {}, "needs a network that diffusers can cache, and SD3Transformer2DModel is none"),
        ("sd", "first_block", {}, "UNet2DConditionModel is none"),
        ("flux", "first_block", {"treshold": 1.0}, "Did you mean 'threshold'"),
        (
            "wan",
            "taylorseer",
            {"cache_identifiers": [r"blocks\.\d+\.attn"]},
            "hooked no module of WanTransformer3DModel",
        ),
        ("wan", "mag", {}, "needs the ratios of this checkpoint"),
        ("flux", "faster", {}, "takes both guidance branches in one call, and FluxPipeline makes two"),
        ("flux", "first_block", {"tresh": 0.1}, "^Unknown option of FirstBlockCacheConfig 'tresh'"),
        ("flux", "sea", {"threshold": -1.0}, "was refused by diffusers: `threshold` must be non-negative"),
    ],
)
def test_what_would_fail_silently_is_an_error(family: str, kind: Any, options: dict[str, Any], match: str) -> None:
    pipe = make(family)
    with pytest.raises(DiffAccelError, match=match):
        diffaccel.accelerate(pipe, DiffusersCache(kind=kind, options=options))
    assert diffaccel.summary(pipe).methods == []


def test_one_cache_at_a_time() -> None:
    pipe = diffaccel.accelerate(make("flux"), Spectrum())
    with pytest.raises(DiffAccelError, match="cannot be active together"):
        diffaccel.accelerate(pipe, DiffusersCache())
    diffaccel.remove(pipe)
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(DiffAccelError, match="has a FirstBlockCacheConfig already"):
        diffaccel.accelerate(pipe, DiffusersCache())


def test_pyramid_attention_has_one_history_and_says_so() -> None:
    pipe = diffaccel.accelerate(make("wan"), DiffusersCache(kind="pab", options=PAB))
    with pytest.raises(DiffAccelError, match="'pab' mixes the calls 'cond' and 'uncond' of a step"):
        draw(pipe, "wan")
    draw(pipe, "wan", guided=False)
    assert diffaccel.summary(pipe).last_run["caches"]["skipped_calls"] > 0
