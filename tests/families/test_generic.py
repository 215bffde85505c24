"""Pipelines that no family describes: identified from their own call, and then as good as listed ones."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import pytest
import tiny
import tiny_others as others
import torch
import toy
from PIL import Image

import diffaccel
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.families.generic import Generic, identify
from diffaccel.families.generic.guidance_rule import fit_guidance
from diffaccel.families.generic.row_layout import find_rows, join_layout, map_layout
from diffaccel.families.generic.time_rule import fit_time
from diffaccel.families.generic.watching import NotIdentified
from diffaccel.runtime import call, stock_loop
from diffaccel.runtime.native import Native
from diffaccel.runtime.probe import arguments_of, stock_call
from diffaccel.samplers import Ancestral, Euler, Scheduler
from diffaccel.session import Decode, Eval, Step

NATIVE = [(name, guided) for name in others.NAMES for guided in (True, False) if (name, guided) != ("qwen", True)]


@pytest.fixture
def native_only(monkeypatch: pytest.MonkeyPatch) -> list[Generic]:
    """Fail when the stock driver runs, and collect the identified families."""
    families: list[Generic] = []

    def refuse(*args: Any) -> None:
        raise AssertionError("the stock driver ran")

    def keep(*args: Any) -> Generic:
        families.append(identify(*args))
        return families[-1]

    monkeypatch.setattr(stock_loop, "generate_stock", refuse)
    monkeypatch.setattr(call, "identify", keep)
    return families


def run(pipe: Any, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    return others.latents_of(pipe(**others.call_kwargs(name, *args, **kwargs)))


def family_of(pipe: Any, kwargs: dict[str, Any]) -> Generic:
    stock = stock_call(type(pipe))
    return identify(pipe, stock, arguments_of(stock, pipe, (), kwargs))


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guided", "size_index"),
    [(*pair, 0) for pair in NATIVE] + [(name, name != "qwen", 1) for name in others.NAMES],
)
def test_euler_equals_the_stock_call(name: str, guided: bool, size_index: int, native_only: list[Generic]) -> None:
    pipe, size = others.make(name, guided), others.SIZES[name][size_index]
    before = run(pipe, name, size, guided)
    diffaccel.accelerate(pipe, Euler())
    wrapped = run(pipe, name, size, guided)
    diffaccel.remove(pipe)
    after = run(pipe, name, size, guided)
    assert torch.equal(wrapped, before) and torch.equal(after, before)
    assert len(native_only) == 1 and (native_only[0].findings.guidance.scale is not None) == guided


@pytest.mark.parametrize("name", others.NAMES)
def test_one_prompt(name: str, native_only: list[Generic]) -> None:
    guided = name != "qwen"
    pipe = others.make(name, guided)
    before = run(pipe, name, None, guided, batch=1)
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, name, None, guided, batch=1), before)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["z_image", "lumina2", "flux2_klein"])
def test_few_steps(name: str, steps: int, native_only: list[Generic]) -> None:
    pipe = others.make(name)
    before = run(pipe, name, steps=steps)
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, name, steps=steps), before)


HALF = [name for name in others.NAMES if name not in ("mochi", "kandinsky5")]


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_bfloat16(name: str, native_only: list[Generic]) -> None:
    """Mochi rounds its latents between steps, and Kandinsky 5 keeps a part of its network in fp32."""
    guided = name != "qwen"
    pipe = others.make(name, guided).to(torch.bfloat16)

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value

    def half() -> torch.Tensor:
        kwargs = others.call_kwargs(name, None, guided)
        return others.latents_of(pipe(**{k: cast(v) for k, v in kwargs.items()}))

    before = half()
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(half(), before)


def test_tokens_of_a_picture_beside_the_latents(native_only: list[Generic]) -> None:
    """Image editing: the network also answers for the given picture's tokens, which are cut off."""
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    pipe = others.make("flux2_klein")

    def edit() -> torch.Tensor:
        return others.latents_of(pipe(**others.call_kwargs("flux2_klein"), image=picture))

    before = edit()
    assert not torch.equal(before, run(pipe, "flux2_klein"))
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(edit(), before)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_unet_with_condition_channels_from_the_middle_on(strength: float, native_only: list[Generic]) -> None:
    picture, mask = Image.effect_noise((32, 32), 50).convert("RGB"), Image.new("L", (32, 32), 255)
    parts = {k: v for k, v in tiny.make("sd", in_channels=9).components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        kwargs = tiny.call_kwargs("sd", steps=8)
        return pipe(**kwargs, image=picture, mask_image=mask, strength=strength).images

    before = paint()
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(paint(), before)


def test_learned_variance_is_cut_off(native_only: list[Generic]) -> None:
    pipe = others.make("sana", out_channels=8)
    before = run(pipe, "sana")
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, "sana"), before)


def test_the_pipelines_own_scheduler_steps(native_only: list[Generic]) -> None:
    """Mochi's noise levels run backwards, which samplers do not follow and its own scheduler does."""
    pipe = others.make("mochi", inverted=True)
    before = run(pipe, "mochi")
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(run(pipe, "mochi"), before)
    diffaccel.accelerate(diffaccel.remove(pipe), Euler())
    with pytest.raises(DiffAccelError, match="invert_sigmas"):
        run(pipe, "mochi")


@pytest.mark.parametrize("does", ["plain", "negative first", "joint, positive first"])
def test_order_of_branches(does: str, native_only: list[Generic]) -> None:
    pipe = toy.make()
    before = pipe(**toy.call_kwargs(does))["latents"]
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**toy.call_kwargs(does))["latents"], before)
    with diffaccel.open_session(pipe, **toy.call_kwargs(does)) as session:
        assert torch.equal(session.conds[0].positive["encoder_hidden_states"], toy.call_kwargs()["prompt_embeds"])


def test_a_sampler_with_noise_agrees_with_the_stock_driver(native_only: list[Generic], monkeypatch: Any) -> None:
    pipe = others.make("sana")
    diffaccel.accelerate(pipe, Ancestral())
    native = run(pipe, "sana")
    monkeypatch.undo()

    def refuse(*args: Any) -> None:
        raise NotIdentified("asked not to be.")

    monkeypatch.setattr(call, "identify", refuse)
    assert torch.equal(run(pipe, "sana"), native)


# -- what a session gives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in others.NAMES if name != "qwen"])
def test_branches_rows_and_a_noise_level_per_row(name: str) -> None:
    pipe = others.make(name)
    with diffaccel.open_session(pipe, **others.call_kwargs(name)) as session:
        x, sigma, later = session.x, session.sigmas[0], session.sigmas[2]

        def ask(*args: Any, **kwargs: Any) -> torch.Tensor:
            return Native(session).predict([Eval(*args, **kwargs)])[0].v

        with torch.no_grad():
            guided, positive, negative = (
                ask(x, sigma),
                ask(x, sigma, branch="positive"),
                ask(x, sigma, branch="negative"),
            )
            particles = ask(x[[1, 0, 1]], sigma, rows=[1, 0, 1])
            mixed = ask(x, torch.stack([sigma, later]))
            at_later = ask(x, later)
            alone = ask(x[1:], later, rows=[1], branch="negative")
            together = ask(x, later, branch="negative")
    assert not torch.allclose(positive, negative, atol=1e-5)
    rule = session.family.findings.guidance
    expected = rule.combine(negative, positive, rule.scale)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(particles, guided[[1, 0, 1]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([guided[0], at_later[1]]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone, together[1:], rtol=1e-3, atol=1e-3)


def test_another_prompt_in_the_same_call() -> None:
    pipe = others.make("ltx")
    with diffaccel.open_session(pipe, **others.call_kwargs("ltx")) as session:
        handle = session.add_cond(prompt=["a cup", "a hat"])
        first, second = session.conds[0].positive, session.conds[handle].positive
        assert first["encoder_hidden_states"].shape == second["encoder_hidden_states"].shape
        assert not torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
        with pytest.raises(UnsupportedBySampler, match="LTXPipeline: Another conditioning changes guidance_scale"):
            session.add_cond(guidance_scale=7.0)


def test_what_needs_the_layout_of_latents_is_refused() -> None:
    pipe = others.make("chroma")
    with diffaccel.open_session(pipe, **others.call_kwargs("chroma")) as session:
        with pytest.raises(UnsupportedBySampler, match="pixels between"):
            Native(session)._decode(Decode(session.x))


def test_another_size_is_a_session_of_a_call_of_it() -> None:
    pipe, other_call = others.make("chroma"), {**others.call_kwargs("chroma"), "height": 48, "width": 64}
    with diffaccel.open_session(pipe, **other_call) as session:
        expected, constants = session.x, session.conds[0].positive
    with diffaccel.open_session(pipe, **others.call_kwargs("chroma")) as session:
        other = session.at(48, 64)
        assert torch.equal(other.x, expected) and other.family is not session.family
        assert all(torch.equal(value, constants[name]) for name, value in other.conds[0].positive.items()
                   if isinstance(value, torch.Tensor))  # fmt: skip
        assert session.at(32, 32) is session
    with diffaccel.open_session(pipe, **{**others.call_kwargs("chroma"), "height": None, "width": None}) as session:
        with pytest.raises(UnsupportedBySampler, match=r"leaves its own size out\. .* Pass height and width"):
            session.at(48, 64)


def test_a_callback_may_change_latents() -> None:
    def zero(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (i != 1)}

    pipe = others.make("chroma")
    before = others.latents_of(pipe(**others.call_kwargs("chroma"), callback_on_step_end=zero))
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(others.latents_of(pipe(**others.call_kwargs("chroma"), callback_on_step_end=zero)), before)


def test_a_callback_that_turns_guidance_off_is_refused() -> None:
    def off(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {}

    pipe = diffaccel.accelerate(others.make("chroma"), Euler())
    with pytest.raises(UnsupportedBySampler, match="ChromaPipeline: Its guidance was changed during the call"):
        pipe(**others.call_kwargs("chroma"), callback_on_step_end=off)


# -- no trace, no cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others.NAMES)
def test_identifying_leaves_no_trace_and_evaluates_no_network(name: str) -> None:
    guided = name != "qwen"
    pipe = others.make(name, guided)
    run(pipe, name, None, guided)  # so that everything lazy exists
    parts = [pipe, *(part for part in pipe.components.values() if hasattr(part, "__dict__"))]
    before = [dict(vars(part)) for part in parts]
    kwargs = others.call_kwargs(name, None, guided)
    states = [g.get_state() for g in kwargs["generator"]]
    global_state = torch.random.get_rng_state()
    calls: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(args))
    family_of(pipe, kwargs)
    family_of(pipe, {**kwargs, "generator": None})
    handle.remove()
    assert calls == []
    for part, attributes in zip(parts, before, strict=True):
        assert vars(part).keys() == attributes.keys()
        same = [v is attributes[k] or isinstance(part, torch.nn.Module) for k, v in vars(part).items()]
        assert all(same), [k for k, ok in zip(attributes, same, strict=True) if not ok]
    assert all(torch.equal(g.get_state(), s) for g, s in zip(kwargs["generator"], states, strict=True))
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_text_is_encoded_once_and_the_network_called_as_often_as_the_sampler_asks(native_only: list[Generic]) -> None:
    """AuraFlow's loop cannot be interrupted: what is left of it must cost nothing."""
    pipe = others.make("aura_flow")
    counts = {"transformer": 0, "text_encoder": 0}
    for name in counts:

        def count(*args: Any, name: str = name) -> None:
            counts[name] += 1

        getattr(pipe, name).register_forward_pre_hook(count)
    run(pipe, "aura_flow")
    stock_counts = dict(counts)
    diffaccel.accelerate(pipe, Euler())
    run(pipe, "aura_flow")
    assert counts == {name: 2 * n for name, n in stock_counts.items()}


def test_attention_processors_are_put_back() -> None:
    """A pipeline of perturbed attention exchanges them for the time of a call, which here ends half-way."""
    parts = tiny.make("sd").components
    pipe = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    before = pipe.unet.attn_processors
    with pytest.raises(NotIdentified, match="joins 3 predictions a step"):
        family_of(pipe, {**tiny.call_kwargs("sd"), "pag_scale": 3.0})
    after = pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("name", ["aura_flow", "chroma"])
def test_hooks_are_freed_on_the_real_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = diffaccel.accelerate(others.make(name), Euler())
    seen: list[Any] = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: seen.append(vars(self)["transformer"]))
    network = pipe.transformer
    run(pipe, name)
    assert seen == [network] and "step" not in vars(pipe.scheduler)


def test_bad_arguments_raise_as_in_the_stock_call() -> None:
    pipe = others.make("chroma")
    with pytest.raises(ValueError) as stock_error:
        pipe(prompt=None)
    diffaccel.accelerate(pipe, Euler())
    with pytest.raises(ValueError) as error:
        pipe(prompt=None)
    assert str(error.value) == str(stock_error.value) and not isinstance(error.value, DiffAccelError)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "match"),
    [
        ("controlnet", "calls a second network, 'controlnet', whose residuals change"),
        ("two networks", "calls two networks, 'transformer' and 'refiner'"),
        ("residual", "argument 'residual' changes from step to step"),
        ("squared time", "argument 'timestep' is no affine map of its scheduler's time"),
        ("no time", "none of its network's arguments follows its scheduler's time"),
        ("scaled latents", r"none of its network's arguments holds the latents \(2, 4, 4, 4\)"),
        ("taller", r"called with hidden_states \(2, 4, 5, 4\)"),
        ("perturbed", r"joins 3 predictions a step .*\[3.5, -2.0, -0.5\]"),
        ("truncated", "joins 2 predictions at its first step and 1 at step 4"),
        ("interval", r"guidance changes from step to step: at step 4 its weights are \[1.5, -0.5\]"),
        ("blend", r"blends two predictions, .*\[0.75, 0.25\]"),
        ("rescaled in place", r"rescaled, as guidance_rescale does .*sum 0.9000"),
        ("rescaled", r"rescaled, as guidance_rescale does .*sum 0.9000"),
        ("clipped", r"not linear: a rule unknown here .*residual"),
        ("inpainting", "changes the latents between the scheduler's steps"),
        ("pixels only", "has no output_type 'latent'"),
    ],
)
def test_what_cannot_be_followed_is_named(does: str, match: str) -> None:
    with pytest.raises(NotIdentified, match=match):
        family_of(toy.make(), toy.call_kwargs(does, output_type="pt"))


@pytest.mark.parametrize(
    ("name", "extra", "match"),
    [
        ("qwen", {}, r"norm of an unguided one \(norm-preserving guidance\).*residual"),
        ("lumina2", {"cfg_normalization": True}, r"norm-preserving guidance"),
        ("lumina2", {"cfg_trunc_ratio": 0.5}, "joins 2 predictions at its first step and 1 at step 2"),
        ("z_image", {"cfg_truncation": 0.3}, "joins 2 predictions at its first step and 1 at step 3"),
        ("ltx", {"guidance_rescale": 0.7}, r"rescaled row by row \(as guidance_rescale does\)"),
    ],
)
def test_rules_of_real_pipelines_are_named(name: str, extra: dict[str, Any], match: str) -> None:
    with pytest.raises(NotIdentified, match=match):
        family_of(others.make(name), {**others.call_kwargs(name), **extra})


def test_the_fallback_says_why_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pipe = others.make("qwen")
    before = run(pipe, "qwen")
    diffaccel.accelerate(pipe, Euler())
    with caplog.at_level(logging.INFO, logger="diffaccel"):
        assert torch.equal(run(pipe, "qwen"), before)
    assert len(caplog.records) == 1
    assert "QwenImagePipeline runs in its own loop" in caplog.text and "norm-preserving" in caplog.text


class _Branch:
    """A sampler that the stock driver cannot serve."""

    name, state, max_batch, touches, searches = "branch", "float32", 0, "loop", False

    def sample(self, session: Any) -> Any:
        yield Eval(session.x, session.sigmas[0], branch="negative")
        return (yield Step(session.x, session.sigmas[-1]))


def test_the_fallbacks_refusal_carries_the_reason() -> None:
    pipe = others.make("qwen")
    with pytest.raises(UnsupportedBySampler, match=r"'branch' asks for more than one.*norm-preserving"):
        call.generate(pipe, _Branch(), stock_call(type(pipe)), (), others.call_kwargs("qwen"))


def test_a_callback_on_other_tensors_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    pipe = toy.make()
    extra = {"callback_on_step_end": lambda *a: {}, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    before = pipe(**toy.call_kwargs(**extra))["latents"]
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**toy.call_kwargs(**extra))["latents"], before)
    assert "its step callback asks for more than the latents" in caplog.text


def test_a_session_of_a_pipeline_that_is_not_identified_is_refused() -> None:
    with pytest.raises(DiffAccelError, match=r"No family for ToyPipeline.*second network.*FluxPipeline"):
        with diffaccel.open_session(toy.make(), **toy.call_kwargs("controlnet")):
            pass


# -- the rules themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: (1000 - t) / 1000, lambda t: t * 0.3,
     lambda t: (1000 - t), lambda t: t.to(torch.bfloat16) / 1000, lambda t: (t / 1000).to(torch.bfloat16),
     lambda t: t.long()],
)  # fmt: skip
def test_time_is_repeated_to_the_bit(form: Any) -> None:
    timesteps = list(torch.linspace(1000, 7.3, 40))
    rule = fit_time(timesteps[:3], [form(t) for t in timesteps[:3]], 1000)
    assert rule is not None and rule.exact
    assert all(torch.equal(rule(t), form(t)) for t in timesteps)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("scale", [1.5, 3.0, 7.77])
def test_guidance_is_repeated_to_the_bit(scale: float, around: bool, sign: int) -> None:
    negative, positive = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = positive + (scale - 1) * (positive - negative) if around else negative + scale * (positive - negative)
    for order in ([positive, negative], [negative, positive]):
        rule = fit_guidance(order, sign * guided)
        assert (rule.sign, order[rule.positive] is positive) == (sign, True)
        assert rule.scale == pytest.approx(scale) and torch.equal(rule(order), sign * guided)


def test_rows_are_found_in_every_kind_of_argument() -> None:
    batch, stack, shared = torch.arange(6.0).reshape(2, 3), torch.randn(5, 2, 3, 4), torch.randn(7, 3)
    value = {"a": batch, "b": [batch, batch], "c": [torch.ones(4, 2), torch.zeros(9, 2)], "d": stack, "e": shared,
             "f": [torch.arange(1), torch.arange(2)], "g": [[(1, 2, 2)], [(1, 4, 4)]], "h": (0.5, 1.0)}  # fmt: skip
    layout = find_rows(value, 2, "value")
    assert layout == {"a": 0, "b": {0: 0, 1: 0}, "c": "items", "d": 1, "e": None, "f": None, "g": "items", "h": None}
    second = map_layout(value, layout, lambda rows: rows[1:])
    both = join_layout([map_layout(value, layout, lambda rows: rows[:1]), second], layout)
    assert torch.equal(second["a"], batch[1:]) and torch.equal(second["d"], stack[:, 1:]) and len(second["c"]) == 1
    assert second["g"] == [[(1, 4, 4)]] and second["e"] is shared
    assert torch.equal(both["a"], batch) and torch.equal(both["d"], stack) and len(both["c"]) == 2
    with pytest.raises(NotIdentified, match="does not show which axis"):
        find_rows(torch.randn(2, 2, 3, 4), 2, "layers")


def test_listed_families_are_not_identified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "identify", None)
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    pipe(**tiny.call_kwargs("flux"))
