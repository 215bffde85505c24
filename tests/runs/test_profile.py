"""What is measured inside a pipeline call, and that nothing of it stays or changes a bit."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.runs import profile as meter
from diffaccel.samplers import Bottleneck, Heun

CALL = dict(height=32, width=32, num_inference_steps=3, output_type="pt")


def draw(pipe, seed=0, **kwargs):
    generator = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return pipe(["a", "b"], generator=generator, **CALL, **kwargs).images


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_a_call_is_measured_and_left_alone(family):
    pipe = tiny.make(family)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    before = dict(pipe.vae.__dict__)
    with meter.measure(pipe) as measured:
        images = draw(pipe)
    assert torch.equal(images, plain)
    assert pipe.vae.__dict__ == before and "decode" not in pipe.vae.__dict__
    assert measured.calls == 3 and measured.forwards in (6, 12)
    assert len(measured.steps) == 3 and all(seconds > 0 for seconds in measured.steps)
    assert sum(measured.parts.values()) <= measured.seconds and all(measured.parts.values())
    assert sum(measured.steps) == pytest.approx(measured.parts["network"])
    with torch.no_grad():
        decoded = pipe.vae.decode(measured.latents(len(images)), return_dict=False)[0]
    assert torch.allclose(pipe.image_processor.postprocess(decoded, output_type="pt"), images, atol=1e-6)


def test_latents_are_those_of_the_pictures_also_where_a_sampler_decodes_on_the_way():
    pipe = tiny.make("flux")
    pipe.set_progress_bar_config(disable=True)
    size = tiny.call_kwargs("flux")["height"]
    diffaccel.accelerate(pipe, Bottleneck(preset="selflift-zero", switches=(0.5,)))
    with meter.measure(pipe) as measured:
        images = pipe("a", height=size, width=size, num_inference_steps=4, output_type="pt").images
    assert len(measured.decoded) == 2 and measured.decoded[0].shape != measured.decoded[1].shape
    with torch.no_grad():
        decoded = pipe.vae.decode(measured.latents(1), return_dict=False)[0]
    assert torch.allclose(pipe.image_processor.postprocess(decoded, output_type="pt"), images, atol=1e-6)
    assert measured.latents(5) is None


def test_equal_noise_has_equal_hashes():
    pipe = tiny.make("flux")
    pipe.set_progress_bar_config(disable=True)
    found = []
    for seed, methods in ((0, ()), (0, (Heun(),)), (1, ())):
        if methods:
            diffaccel.accelerate(pipe, *methods)
        with meter.measure(pipe) as measured:
            draw(pipe, seed)
        diffaccel.remove(pipe)
        found.append(measured.noise_sha256(2))
    assert found[0] == found[1] and len(set(found[0])) == 2
    assert found[2][0] == found[0][1] and found[2][1] not in found[0]  # row i depends on its own seed alone


def test_a_failed_call_leaves_nothing_behind():
    pipe = tiny.make("sd")
    with pytest.raises(ValueError), meter.measure(pipe):
        pipe("a", height=33, width=33)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks and "decode" not in pipe.vae.__dict__
