"""A probe is invisible, whatever happens while it runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_variants
import torch
from diffusers import FluxKontextPipeline

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find
from diffaccel.modules.stand_in import TextMemo, network_arguments
from diffaccel.runtime.guidance_check import check_guidance
from diffaccel.runtime.interception import Recording, intercept
from diffaccel.runtime.probe import arguments_of, stock_call
from diffaccel.samplers import Euler


def snapshot(pipe) -> dict:
    denoiser = getattr(pipe, find(pipe).denoiser)
    return {
        "pipe": {k: v for k, v in pipe.__dict__.items()},
        "class": type(pipe),
        "config": copy.deepcopy(dict(pipe.config)),
        "scheduler": copy.deepcopy({k: v for k, v in pipe.scheduler.__dict__.items()}),
        "denoiser": set(denoiser.__dict__),
        "weights": {k: v.clone() for k, v in denoiser.state_dict().items()},
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["pipe"].keys() == after["pipe"].keys()
    assert all(before["pipe"][k] is after["pipe"][k] or before["pipe"][k] == after["pipe"][k] for k in before["pipe"])
    assert before["class"] is after["class"]
    assert before["config"] == after["config"]
    assert before["denoiser"] == after["denoiser"]
    assert before["scheduler"].keys() == after["scheduler"].keys()
    for key, value in before["scheduler"].items():
        other = after["scheduler"][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert all(torch.equal(v, after["weights"][k]) for k, v in before["weights"].items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_open_session_leaves_no_trace(family: str) -> None:
    pipe = tiny.make(family)
    pipe(**tiny.call_kwargs(family))  # so that everything lazy exists
    kwargs = tiny.call_kwargs(family)
    states = [g.get_state() for g in kwargs["generator"]]
    torch.manual_seed(3)
    global_state = torch.random.get_rng_state()
    before = snapshot(pipe)
    with diffaccel.open_session(pipe, **kwargs) as session:
        session.at(64, 64)
        session.add_cond(prompt=["a cup", "a hat"])
    assert_same(before, snapshot(pipe))
    assert all(torch.equal(g.get_state(), s) for g, s in zip(kwargs["generator"], states, strict=True))
    assert torch.equal(torch.random.get_rng_state(), global_state)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_open_session_without_a_generator_draws_what_the_call_draws(family: str) -> None:
    """From a copy of torch's global generator, which stays as it is: noise of the session is not its latents' again."""
    pipe = tiny.make(family)
    kwargs = {**tiny.call_kwargs(family), "generator": None}
    drawn: list[torch.Tensor] = []

    class Noisy(Euler):
        def sample(self, session):
            drawn.extend([session.latents, session.randn_like(session.x)])
            return super().sample(session)

    torch.manual_seed(3)
    diffaccel.accelerate(pipe, Noisy())(**kwargs)
    diffaccel.remove(pipe)
    state = torch.manual_seed(3).get_state()
    with diffaccel.open_session(pipe, **kwargs) as session:
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(session.latents, drawn[0])
        assert torch.equal(session.randn_like(session.x), drawn[1])
        torch.randn(5)  # the user's own
        assert torch.equal(session.reopen().latents, session.latents)
        state = torch.random.get_rng_state()
        assert not torch.equal(session.randn_like(session.x), drawn[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_open_session_with_an_encoder_that_draws_keeps_the_global_state() -> None:
    pipe = tiny.make("flux")
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: (torch.rand(1), encode(*args, **kwargs))[1]
    state = torch.manual_seed(3).get_state()
    with diffaccel.open_session(pipe, **tiny.call_kwargs("flux")) as session:
        session.add_cond(prompt=["a cup", "a hat"])
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["session", "call"])
def test_an_exception_while_preparing_leaves_no_trace(family: str, wrapped: bool, monkeypatch) -> None:
    pipe = tiny.make(family)
    stock = pipe(**tiny.call_kwargs(family)).images
    if wrapped:
        diffaccel.accelerate(pipe, Euler())

    class Broken(Exception):
        pass

    def broken(*args, **kwargs):
        raise Broken

    scheduler = dict(pipe.scheduler.__dict__)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "encode_prompt", broken)
        with pytest.raises(Broken):
            if wrapped:
                pipe(**tiny.call_kwargs(family))
            else:
                with diffaccel.open_session(pipe, **tiny.call_kwargs(family)):
                    pass
    assert "encode_prompt" not in pipe.__dict__ and "progress_bar" not in pipe.__dict__
    assert "step" not in pipe.scheduler.__dict__ and scheduler.keys() == pipe.scheduler.__dict__.keys()
    assert isinstance(getattr(pipe, find(pipe).denoiser), torch.nn.Module)
    diffaccel.remove(pipe)
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, stock)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_exception_in_the_network_leaves_no_trace(family: str) -> None:
    pipe = tiny.make(family)
    stock = pipe(**tiny.call_kwargs(family)).images
    diffaccel.accelerate(pipe, Euler())
    denoiser = getattr(pipe, find(pipe).denoiser)

    class Broken(Exception):
        pass

    def hook(*args) -> None:
        raise Broken

    handle = denoiser.register_forward_pre_hook(hook)
    with pytest.raises(Broken):
        pipe(**tiny.call_kwargs(family))
    handle.remove()
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, stock)
    assert "encode_prompt" not in pipe.__dict__ and "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_text_memo_keeps_positive_and_negative_apart(family: str) -> None:
    pipe = tiny.make(family)
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as session:
        for resolution in (session, session.at(64, 64)):
            cond = resolution.conds[0]
            positive, negative = cond.positive["encoder_hidden_states"], cond.negative["encoder_hidden_states"]
            assert positive.shape == negative.shape and not torch.equal(positive, negative)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_is_encoded_once_for_all_resolutions(family: str) -> None:
    pipe = tiny.make(family)
    count = 0

    def hook(*args) -> None:
        nonlocal count
        count += 1

    handle = pipe.text_encoder.register_forward_pre_hook(hook)
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as session:
        once = count
        session.at(64, 64)
        session.at(64, 32)
        assert count == once
    handle.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_declared_guidance_is_what_the_pipeline_does(family: str) -> None:
    """Fitted weights equal (1 - s, s) to 1e-5; a wrong scale is found out."""
    pipe = tiny.make(family)
    fam = find(pipe)
    kwargs = tiny.call_kwargs(family)
    arguments = arguments_of(stock_call(type(pipe)), pipe, (), kwargs)
    seen: list[Recording] = []

    class Stop(Exception):
        pass

    def stop(record: Recording) -> None:
        seen.append(record)
        check_guidance(fam, pipe, record, arguments)
        record.guided = record.guided * 1.01
        with pytest.raises(DiffAccelError, match="does not combine its predictions by classifier-free guidance"):
            check_guidance(fam, pipe, record, arguments)
        raise Stop

    with pytest.raises(Stop), intercept(pipe, fam, TextMemo(), pipe.device, stop):
        pipe(**kwargs)
    assert len(seen[0].calls) == (2 if family == "flux" else 1)


@pytest.mark.parametrize(
    ("family", "extra", "match"),
    [
        ("sd3", {"skip_guidance_layers": [0]}, "skip_guidance_layers"),
        ("sdxl", {"denoising_end": 0.5}, "denoising_end"),
        ("sd", {"callback": print, "callback_steps": 1}, "callback_on_step_end"),
        ("sd3", {"height": 40}, "nearest valid size is 32x32"),
        ("sd", {"height": 36}, "nearest valid size is 32x32"),
        ("sd3", {"height": 40, "width": 64}, "The size 64x40 does not fit .* nearest valid size is 64x32"),
        ("flux", {"output_type": "jpeg"}, "output_type 'jpeg' is unknown"),
        ("sd", {"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_what_a_sampler_cannot_follow_is_refused_before_any_work(family: str, extra: dict, match: str) -> None:
    pipe = tiny.make(family)
    diffaccel.accelerate(pipe, Euler())
    with pytest.raises(DiffAccelError, match=match):
        pipe(**{**tiny.call_kwargs(family), **extra})


def test_an_unknown_network_argument_is_refused_by_name() -> None:
    pipe = tiny.make("flux")
    fam = find(pipe)
    with pytest.raises(DiffAccelError, match="controlnet_block_samples"):
        fam.conditioning(
            pipe, [{"hidden_states": 0, "controlnet_block_samples": torch.zeros(1)}], {"true_cfg_scale": 1.0}
        )


def test_a_watched_call_encodes_its_prompts_and_pictures_once() -> None:
    parts = tiny.make("flux").components
    pipe = FluxKontextPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    encode, pictures = pipe.vae.encode, []

    def counted(picture: torch.Tensor, *args: object, **kwargs: object) -> object:
        pictures.append(picture)
        return encode(picture, *args, **kwargs)

    pipe.vae.encode = counted

    def edit(seed: int) -> torch.Tensor:
        image = tiny_variants.picture(32, seed=seed)
        arguments = tiny.call_kwargs("flux", steps=3) | {"image": image, "_auto_resize": False, "max_area": 32 * 32}
        return pipe(**arguments).images

    stock = [edit(seed) for seed in (1, 1, 2)]
    encoded = len(pictures)
    diffaccel.accelerate(pipe, Euler())
    assert all(torch.equal(edit(seed), latents) for seed, latents in zip((1, 1, 2), stock, strict=True))
    assert len(pictures) == 2 * encoded  # no more than the stock calls
    assert pipe.vae is parts["vae"]


def test_the_arguments_of_a_catch_all_parameter_of_any_name_are_the_call_s() -> None:
    class Odd:
        def __call__(self, prompt: str = "", steps: int = 3, **model_options: Any) -> None: ...

    arguments = arguments_of(Odd.__call__, Odd(), ("a cat",), {"eta": 0.5, "model_options": 1})
    assert arguments == {"prompt": "a cat", "steps": 3, "eta": 0.5, "model_options": 1}
    assert arguments_of(Odd.__call__, Odd(), (), {}) == {"prompt": "", "steps": 3}
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        arguments_of(Odd.__call__, Odd(), ("a cat",), {"prompt": "two cats"})


def test_a_network_s_catch_all_parameter_may_have_any_name() -> None:
    class Net(torch.nn.Module):
        def forward(self, hidden_states: Any, timestep: Any = None, **joint: Any) -> None: ...

    assert network_arguments(Net(), (1,), {"scale": 2}) == {"hidden_states": 1, "scale": 2}
