"""The fallback driver: the same samplers inside a stock loop, for pipelines without a family."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_variants
import torch
import toy

import diffaccel
from diffaccel.errors import UnsupportedBySampler
from diffaccel.runtime.probe import arguments_of, stock_call
from diffaccel.runtime.stock_loop import generate_stock
from diffaccel.samplers import Ancestral, BoN, Bottleneck, DPMpp2M, Euler, Heun
from diffaccel.session import Eval, Step


def by_stock_driver(family: str, sampler: Any, **extra: Any) -> tuple[torch.Tensor, Any, Any]:
    pipe = tiny.make(family)
    call = stock_call(type(pipe))
    arguments = arguments_of(call, pipe, (), {**tiny.call_kwargs(family), **extra})
    result, stats = generate_stock(pipe, sampler, call, arguments)
    return result.images, stats, pipe


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Euler(), Heun(), DPMpp2M(), Ancestral()], ids=lambda s: s.name)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stock_and_native_driver_agree(family: str, sampler: Any) -> None:
    if family == "flux" and sampler.name == "ancestral":
        pytest.skip("noise is drawn for packed latents in the stock loop and for spatial ones in the native loop")
    images, stats, _ = by_stock_driver(family, sampler)
    pipe = diffaccel.accelerate(tiny.make(family), sampler)
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, images)
    last = diffaccel.summary(pipe).last_run
    assert (stats.steps, stats.nfe) == (last["steps"], last["nfe"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_scheduler_is_as_it_was(family: str) -> None:
    _, _, pipe = by_stock_driver(family, Heun())
    stock = tiny.make(family)(**tiny.call_kwargs(family)).images
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, stock)
    assert not {"step", "set_timesteps", "scale_model_input"} & pipe.scheduler.__dict__.keys()


def test_callbacks_still_edit_latents() -> None:
    def zero(pipe, i, t, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 1 else {}

    images, _, _ = by_stock_driver("sd3", Euler(), callback_on_step_end=zero)
    pipe = tiny.make("sd3")
    assert torch.equal(pipe(**tiny.call_kwargs("sd3"), callback_on_step_end=zero).images, images)


def test_an_unlisted_pipeline_runs_through_it() -> None:
    """PixArt has no family here; its own scheduler's rule is DDIM's in these coordinates."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=4, attention_bias=True, norm_elementwise_affine=False,
        norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=tiny.t5_tokenizer(), text_encoder=tiny._t5().eval(), vae=tiny._vae(4).eval(),
        transformer=transformer.eval(), scheduler=tiny.ddim(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return pipe(
            "a red apple", height=32, width=32, num_inference_steps=5, output_type="latent", max_sequence_length=24,
            use_resolution_binning=False, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    stock = run()
    diffaccel.accelerate(pipe, "euler")
    torch.testing.assert_close(run(), stock, rtol=1e-4, atol=1e-4)
    assert diffaccel.summary(pipe).last_run["nfe"] == 5
    diffaccel.remove(pipe)
    assert torch.equal(run(), stock)


class _Asks:
    """A sampler that asks for something else at its first step."""

    name, state, max_batch, touches = "asks", "float32", 0, "loop"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def sample(self, session: Any) -> Any:
        x, sigma = session.x, session.sigmas[0]
        if self.kind == "at":
            session.at(64, 64)
        if self.kind == "list":
            yield [Eval(x, sigma)]
        if self.kind == "branch":
            yield Eval(x, sigma, branch="positive")
        if self.kind == "elsewhere":
            x = x + 1
        yield Eval(x, sigma)
        return (yield Step(x, session.sigmas[-1]))


@pytest.mark.parametrize("kind", ["at", "list", "branch", "elsewhere"])
def test_what_a_stock_loop_cannot_give_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedBySampler, match="FluxPipeline"):
        by_stock_driver("sd3", _Asks(kind))


def test_latents_changed_in_place_by_a_callback() -> None:
    def darken(pipe, i, t, kwargs):
        kwargs["latents"].mul_(0.5)
        return kwargs

    images, _, _ = by_stock_driver("sd3", Euler(), callback_on_step_end=darken)
    stock = tiny.make("sd3")(**tiny.call_kwargs("sd3"), callback_on_step_end=darken).images
    torch.testing.assert_close(images, stock)


def test_noise_levels_that_the_pipeline_edits_after_setting_them() -> None:
    """Cosmos makes the last two equal, so that its last step changes nothing."""
    pipe = toy.make()
    stock = pipe(**toy.call_kwargs("edited levels"))["latents"]
    assert not torch.equal(stock, pipe(**toy.call_kwargs("inpainting"))["latents"])
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**toy.call_kwargs("edited levels"))["latents"], stock)
    last = diffaccel.summary(pipe).last_run
    assert (last["path"], last["steps"], last["calls"]) == ("stock loop", 5, 12)
    assert "decodes" in last["not_counted"]
    diffaccel.accelerate(diffaccel.remove(pipe), Heun())
    with pytest.raises(UnsupportedBySampler, match="ToyPipeline changes the noise levels of its FlowMatchEuler"):
        pipe(**toy.call_kwargs("edited levels"))


def test_the_levels_that_a_loop_looks_up_are_those_of_its_entries() -> None:
    seen: list[tuple[float, float]] = []

    def look(pipe, i, t, kwargs):
        seen.append((float(t), float(pipe.scheduler.sigmas[i])))
        return {}

    pipe = diffaccel.accelerate(toy.make(), Heun())
    pipe(**toy.call_kwargs("two networks", callback_on_step_end=look))
    assert len(seen) == 11 and all(abs(time - 1000 * sigma) < 1e-3 for time, sigma in seen)


def test_a_sampler_that_changes_the_size_says_what_inpainting_takes() -> None:
    pipe = tiny_variants.inpaint("flux")
    stock = pipe(**tiny_variants.inpaint_kwargs("flux", steps=3)).images
    diffaccel.accelerate(pipe, Bottleneck())
    with pytest.raises(UnsupportedBySampler, match=r"^'bottleneck' needs the layout of .* Use 'euler'"):
        pipe(**tiny_variants.inpaint_kwargs("flux", steps=3))
    diffaccel.remove(pipe)
    assert torch.equal(pipe(**tiny_variants.inpaint_kwargs("flux", steps=3)).images, stock)


def test_a_search_beside_a_controlnet_says_what_stands_in_its_way() -> None:
    pipe = diffaccel.accelerate(tiny_variants.controlnet("sdxl"), BoN(reward="compress", budget=8))
    arguments = {**tiny.call_kwargs("sdxl", batch=1), "image": tiny_variants.picture(32, 1)}
    with pytest.raises(
        UnsupportedBySampler, match=r"'bon' predicts many.*alone: .*'controlnet'.*Search with a pipeline"
    ):
        pipe(**arguments)
