"""Superposition on pipelines of every kind: components in the prompt, several pipelines, records, removal."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Ancestral, Spectrum, SuperDiff

PAIRS = ["a cat | a teapot", "red | two blue houses"]
STEPS = 4


def call(pipe: Any, family: str, prompts: list[str] | None = None, **changes: Any) -> Tensor:
    arguments = tiny.call_kwargs(family, steps=changes.pop("steps", STEPS))
    prompts = prompts or PAIRS
    arguments |= {"prompt": prompts, "negative_prompt": [""] * len(prompts)}
    arguments["generator"] = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(**arguments | changes).images.clone()


def made(
    family: str, config: SuperDiff, prompts: list[str] | None = None, **changes: Any
) -> tuple[Tensor, dict[str, Any]]:
    pipe = diffaccel.accelerate(tiny.make(family), config)
    return call(pipe, family, prompts, **changes), diffaccel.summary(pipe).last_run


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_predictions_of_a_step_share_one_network_call(family: str) -> None:
    """Both components and no prompt: three rows a picture, and the record has densities and weights of each picture."""
    images, run = made(family, SuperDiff())
    assert images.isfinite().all()
    assert (run["calls"], run["forwards"], run["steps"]) == (STEPS, STEPS * 3 * 2, STEPS)
    report = run["report"]["superdiff"]
    assert torch.tensor(report["kappa"]).shape == torch.tensor(report["log_density"]).shape == (STEPS, 1, 2, 2)
    difference = torch.tensor(report["log_density"])[-1, 0]
    assert (difference[:, 0] - difference[:, 1]).abs().max() < 0.05


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_component_is_the_ancestral_sampler(family: str) -> None:
    pipe = tiny.make(family)
    results = []
    for config in (SuperDiff(kernel="posterior"), Ancestral()):
        diffaccel.accelerate(pipe, config)
        results.append(call(pipe, family, ["a cat", "a dog"]))
        diffaccel.remove(pipe)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["or", "and", "average", "product", "dombi", "fkc", "mcmc"])
def test_every_operator_draws_and_leaves_the_pipeline_as_it_was(op: Any) -> None:
    pipe = tiny.make("flux")
    before = call(pipe, "flux", ["a", "b"])
    many = {"particles": 3} if op in ("product", "dombi", "fkc") else {}
    config = SuperDiff(op=op, first_sigma=0.99 if op == "fkc" else 0.0, **many)
    diffaccel.accelerate(pipe, config)
    images = call(pipe, "flux")
    assert images.isfinite().all() and len(images) == 2
    assert torch.equal(call(pipe, "flux"), images), "the same generators draw the same pictures"
    assert torch.equal(call(diffaccel.remove(pipe), "flux", ["a", "b"]), before)
    assert SuperDiff.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.slow
def test_a_row_depends_on_its_own_seed_alone() -> None:
    for config in (SuperDiff(), SuperDiff(op="product", particles=3)):
        both, _ = made("sd", config)
        first, _ = made("sd", config, PAIRS[:1])
        torch.testing.assert_close(first, both[:1], rtol=1e-3, atol=1e-3)


def test_three_components_one_text_and_a_single_generator() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff())
    arguments = tiny.call_kwargs("flux", steps=STEPS) | {"prompt": "a cat | a teapot | red", "negative_prompt": ""}
    arguments["generator"] = torch.Generator().manual_seed(0)
    assert len(pipe(**arguments).images) == 1
    assert diffaccel.summary(pipe).last_run["report"]["superdiff"]["components"] == 3


def test_equal_components_are_one() -> None:
    """A component twice is that component; and the prompt of one component is not split."""
    twice, _ = made("flux", SuperDiff(op="average"), ["a cat | a cat"] * 2)
    once, run = made("flux", SuperDiff(op="average"), ["a cat"] * 2)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)
    assert run["report"]["superdiff"]["components"] == 1 and run["forwards"] == 2 * 2 * STEPS


def test_the_deterministic_form_pays_one_probe_per_component() -> None:
    _, run = made("flux", SuperDiff(eta=0.0))
    assert run["forwards"] == 2 * (3 * STEPS + 2 * (STEPS - 1)), "none in the last step"


def test_the_curvature_term_pays_one_probe_per_component() -> None:
    _, run = made("flux", SuperDiff(curvature=True))
    assert run["forwards"] == 2 * (3 * STEPS + 2 * (STEPS - 1))


def test_guidance_stops_where_it_is_told_to() -> None:
    images, run = made("sd", SuperDiff(guidance_stop=0.5))
    assert run["forwards"] == 2 * (3 * 2 + 2 * 2)
    assert not torch.equal(images, made("sd", SuperDiff())[0])


@pytest.mark.parametrize(("formula", "null"), [("", 2), ("p1 and not p2", 4)])
def test_a_formula_without_not_needs_no_empty_prompt_once_guidance_has_ended(formula: str, null: int) -> None:
    _, run = made("sd", SuperDiff(op="dombi", formula=formula, guidance_stop=0.5))
    assert run["forwards"] == 2 * (2 * STEPS + null)


def test_without_guidance_no_prompt_is_left_out() -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), SuperDiff())
    call(pipe, "sd", guidance_scale=1.0)
    assert diffaccel.summary(pipe).last_run["forwards"] == 2 * 2 * STEPS


def test_callbacks_are_called_and_may_edit() -> None:
    seen = []

    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return {"latents": tensors["latents"] / 2}

    edited, _ = made("sd", SuperDiff(), callback_on_step_end=halve)
    assert seen == list(range(STEPS)) and not torch.equal(edited, made("sd", SuperDiff())[0])


# -- several pipelines -------------------------------------------------------------------------------------------------


def two(family: str = "flux") -> tuple[Any, Any]:
    """Two pipelines with one VAE and other networks."""
    first, second = tiny.make(family), tiny.make(family)
    name = "transformer" if family in tiny.FLOW else "unet"
    draw = torch.Generator().manual_seed(9)
    for parameter in getattr(second, name).parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return first, second


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_two_pipelines_are_composed_and_both_are_as_before(family: str) -> None:
    first, second = two(family)
    before = [call(pipe, family, ["a", "b"]) for pipe in (first, second)]
    pipe = diffaccel.accelerate([first, second], SuperDiff(op="or", weights=(0.7, 0.3)))
    assert pipe is first
    images = call(pipe, family, ["a", "b"])
    run = diffaccel.summary(pipe).last_run
    assert run["report"]["superdiff"]["components"] == 2 and run["forwards"] == 2 * 2 * 2 * STEPS
    assert torch.equal(call(second, family, ["a", "b"]), before[1]), "asked, and not changed"
    assert torch.equal(call(pipe, family, ["a", "b"]), images)
    assert torch.equal(call(diffaccel.remove(pipe), family, ["a", "b"]), before[0])


def test_a_pipeline_that_is_asked_is_busy_for_others() -> None:
    first, second = two()
    diffaccel.accelerate([first, second], SuperDiff())
    diffaccel.accelerate(second, Ancestral(), on_busy="refuse")
    errors: list[Exception] = []

    def call_other() -> None:
        try:
            call(second, "flux", ["a", "b"])
        except DiffAccelError as error:
            errors.append(error)

    def from_another_thread(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            thread = threading.Thread(target=call_other)
            thread.start()
            thread.join()
        return {}

    call(first, "flux", ["a", "b"], callback_on_step_end=from_another_thread)
    assert len(errors) == 1 and "busy" in str(errors[0])
    assert call(second, "flux", ["a", "b"]).isfinite().all()


def test_all_weight_on_a_pipeline_is_that_pipeline() -> None:
    first, second = two()
    diffaccel.accelerate([first, second], SuperDiff(op="average", weights=(0.0, 1.0), kernel="posterior"))
    diffaccel.accelerate(second, Ancestral())
    mixed, alone = call(first, "flux", ["a", "b"]), call(second, "flux", ["a", "b"])
    torch.testing.assert_close(mixed, alone, rtol=1e-3, atol=1e-3)


def test_a_prompt_of_two_components_gives_each_pipeline_one() -> None:
    first, second = two()
    diffaccel.accelerate([first, second], SuperDiff())
    images = call(first, "flux")
    assert diffaccel.summary(first).last_run["report"]["superdiff"]["components"] == 2
    assert not torch.equal(images, call(first, "flux", ["a cat", "red"]))


def test_pipelines_on_other_noise_levels_are_asked_at_equal_noise() -> None:
    """A model of noise predictions on another grid is asked at its own times of equal signal-to-noise ratio."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    first, second = two("sd")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    first.scheduler = EulerDiscreteScheduler(**config)
    second.scheduler = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
    diffaccel.accelerate([first, second], SuperDiff())
    assert call(first, "sd", ["a", "b"]).isfinite().all()


@pytest.mark.parametrize("change", ["scale", "weights", "same", "cache", "two", "alone"])
def test_pipelines_that_cannot_be_composed_are_refused(change: str) -> None:
    first, second = two()
    methods: tuple[Any, ...] = (SuperDiff(),)
    pipes = [first, second]
    if change == "scale":
        second.vae.register_to_config(scaling_factor=0.25)
    if change == "weights":
        next(second.vae.encoder.parameters()).data += 1
    if change == "same":
        pipes = [first, first]
    if change == "cache":
        diffaccel.accelerate(second, Spectrum())
    if change == "two":
        methods = (SuperDiff(), Spectrum())
    if change == "alone":
        pipes = [first]
    with pytest.raises(
        DiffAccelError, match=r"latents of different meaning|given twice|keeps what|takes the one|two or more"
    ):
        diffaccel.accelerate(pipes, *methods)
    assert not diffaccel.summary(first).methods


def test_a_cache_is_refused_beside_several_pipelines_and_particles() -> None:
    first, second = two()
    diffaccel.accelerate([first, second], SuperDiff())
    with pytest.raises(DiffAccelError, match="'spectrum' keeps what a network computed"):
        diffaccel.accelerate(first, Spectrum())
    with pytest.raises(DiffAccelError, match="keeps what each row"):
        diffaccel.accelerate(tiny.make("flux"), SuperDiff(op="product", particles=4), Spectrum())
    diffaccel.accelerate(pipe := tiny.make("flux"), SuperDiff(), Spectrum())
    assert call(pipe, "flux").isfinite().all()


# -- files, command line -----------------------------------------------------------------------------------------------


def test_densities_and_weights_are_written_and_plotted(tmp_path: Path) -> None:
    _, run = made("flux", SuperDiff(folder=str(tmp_path)))
    assert json.loads((tmp_path / "density.json").read_text())["kappa"] == run["report"]["superdiff"]["kappa"]
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_of_a_command_are_the_components_of_one_picture() -> None:
    from diffaccel.cli.sample import composed

    assert composed(("a cat", "a teapot"), None, (SuperDiff(),)) == ("a cat | a teapot",)
    assert composed(("a cat", "a teapot"), None, (Ancestral(),)) == ("a cat", "a teapot")
    assert composed(("a cat | b", "a teapot | c"), "file", (SuperDiff(),)) == ("a cat | b", "a teapot | c")


def test_a_cache_that_comes_later_to_an_asked_pipeline_is_refused_at_the_call() -> None:
    """It would do nothing there; after its removal both pipelines are what they were."""
    first, other = tiny.make("flux"), tiny.make("flux")
    diffaccel.accelerate([first, other], SuperDiff())
    expected = call(first, "flux")
    diffaccel.accelerate(other, Spectrum())
    with pytest.raises(DiffAccelError, match="'spectrum' keeps what a network computed"):
        call(first, "flux")
    diffaccel.remove(other)
    assert torch.equal(call(first, "flux"), expected)


def test_a_vae_without_values_is_refused_in_a_sentence() -> None:
    first, other = tiny.make("flux"), tiny.make("flux")
    other.vae.to("meta")
    with pytest.raises(DiffAccelError, match="is on the meta device"):
        diffaccel.accelerate([first, other], SuperDiff())
    assert not diffaccel.summary(first).methods


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"op": "or", "weights": (0.5, 0.2)}, "sum to 0.7"), ({"op": "or", "weights": (1.5, -0.5)}, "0 or more"),
        ({"op": "or", "temperature": 0.0}, "above 0"), ({"op": "or", "temperature": float("nan")}, "finite"),
        ({"eta": 0.5}, "no other has an estimator"), ({"op": "product", "eta": 0.0}, "stochastic"),
        ({"op": "or", "bias": (1.0, 0.0)}, "Write priors of OR as weights"),
        ({"particles": 4}, "gives them no weights"),
        ({"formula": "p1 and p2"}, "is of op dombi"), ({"regions": ("1a",)}, "is no mask"),
        ({"regions": ("10", "1/00")}, "is no mask"), ({"op": "fkc", "kernel": "euler"}, "always makes Euler"),
        ({"regions": ("10", "01"), "curvature": True}, "cannot be combined"), ({"first_sigma": -1.0}, "or more"),
        ({"resample": 0.9}, "no effect: it needs particles above 1"), ({"probe": 0.1}, "no effect: it needs curvature"),
        ({"eta": 0.0, "kernel": "posterior"}, "no effect: it needs the stochastic"),
        ({"op": "or", "eta": 0.0, "switch": "always"}, "no effect"), ({"switch": "never"}, "no effect"),
        ({"eta": 0.0, "data_std": 0.5}, "no effect"), ({"kernel": "posterior", "data_std": 0.5}, "no effect"),
        ({"op": "fkc", "data_std": 0.5}, "no effect"), ({"op": "dombi", "negation": 0.5}, "needs a 'not' or"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(DiffAccelError, match=why):
        SuperDiff(**options)


@pytest.mark.parametrize(
    ("config", "prompts", "why"),
    [
        (SuperDiff(op="or", weights=(0.5, 0.3, 0.2)), PAIRS, "3 numbers, and the picture 2 components"),
        (SuperDiff(kernel="euler"), PAIRS, "first_sigma=0.999"),
        (SuperDiff(), ["a | b", "a"], "1 and 2 components"),
        (SuperDiff(), ["a | ", "a | b"], "empty component"),
        (SuperDiff(op="dombi", formula="p1 and p3"), PAIRS, "names p3"),
        (SuperDiff(regions=("10/00",)), PAIRS, "leave a part of the picture out"),
        (SuperDiff(first_sigma=0.2), PAIRS, "must lie above the call's second level"),
        (SuperDiff(op="product", weights=(1.0, -1.0)), PAIRS, "more than 0"),
        (SuperDiff(density="guided", eta=0.0), PAIRS, "tracks the conditional"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_call_is_refused_before_any_prediction(
    config: SuperDiff, prompts: list[str], why: str
) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), config)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(DiffAccelError, match=why):
        call(pipe, "flux", prompts)


def test_a_single_step_tracks_no_density() -> None:
    with pytest.raises(DiffAccelError, match="makes 1 step"):
        made("flux", SuperDiff(), steps=1)


def test_embedded_guidance_is_guided_by_nature() -> None:
    pipe = tiny.make("flux")
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(DiffAccelError, match="embeds its guidance"):
        call(diffaccel.accelerate(pipe, SuperDiff(density="conditional")), "flux", negative_prompt=None)


def test_a_prediction_that_is_not_finite_is_named() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff())
    calls = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            output[0][2:4] = float("nan")  # rows of the second component of two pictures
        return output

    pipe.transformer.register_forward_hook(spoil)
    with pytest.raises(DiffAccelError, match=r"Step 2 of 4, at noise level .*: component 2 is not finite"):
        call(pipe, "flux")


@pytest.mark.slow
def test_a_call_of_unstable_steps_warns(caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff.paper(first_sigma=0.999))
    call(pipe, "flux", ["a | b"], num_inference_steps=2)
    assert "2 Euler-Maruyama steps from noise level 0.999 are unstable" in caplog.text
