"""``callback_on_step_end`` under a sampler: the stock loop's own contract."""

from __future__ import annotations

import pytest
import tiny
import tiny_more
import tiny_others
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Euler, Heun, Scheduler


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


def both(family: str, callback, batch: int = 2, **extra) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the same call stock and wrapped."""
    pipe = tiny.make(family)
    results = []
    for wrap in (False, True):
        if wrap:
            diffaccel.accelerate(pipe, Euler())
        results.append(pipe(**tiny.call_kwargs(family, batch=batch), callback_on_step_end=callback, **extra).images)
    return results[0], results[1]


def test_a_callback_that_zeroes_latents(family: str) -> None:
    def zero(pipe, i, t, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 2 else {}

    stock, wrapped = both(family, zero)
    assert torch.equal(stock, wrapped)


def test_a_callback_sees_what_the_stock_loop_shows(family: str) -> None:
    seen: list = []

    def look(pipe, i, t, kwargs):
        seen.append((i, t.clone(), kwargs["latents"].clone(), kwargs["prompt_embeds"].clone(), pipe.num_timesteps))
        return kwargs

    stock, wrapped = both(family, look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert torch.equal(stock, wrapped) and len(seen) == 8
    for a, b in zip(seen[:4], seen[4:], strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and a[4] == b[4]
        assert torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])


def test_a_callback_that_edits_the_prompt(family: str) -> None:
    def swap(pipe, i, t, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"].flip(1)} if i == 1 else {}

    stock, wrapped = both(family, swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.equal(stock, wrapped)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_guidance_switched_off_half_way(name: str) -> None:
    """The documented dynamic-guidance recipe, through diffusers' own callback classes."""
    from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback

    cutoff = {"sd": SDCFGCutoffCallback, "sdxl": SDXLCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}[name]
    stock, wrapped = both(name, cutoff(cutoff_step_ratio=0.5), batch=1)  # diffusers' classes keep one row only
    plain = tiny.make(name)(**tiny.call_kwargs(name, batch=1)).images
    assert torch.equal(stock, wrapped) and not torch.equal(stock, plain)


def test_interruption_keeps_the_latents_of_that_step(family: str) -> None:
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i >= 1
        return kwargs

    stock, wrapped = both(family, stop)
    assert torch.equal(stock, wrapped)


def test_after_an_interruption_the_next_call_is_whole(family: str) -> None:
    pipe = tiny.make(family)
    expected = pipe(**tiny.call_kwargs(family)).images
    diffaccel.accelerate(pipe, Euler())

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True
        return kwargs

    pipe(**tiny.call_kwargs(family), callback_on_step_end=stop)
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, expected)


def test_a_tensor_that_means_nothing_here_is_refused() -> None:
    pipe = tiny.make("sd")
    type(pipe)._callback_tensor_inputs.append("noise_pred")
    diffaccel.accelerate(pipe, Euler())
    try:
        with pytest.raises(DiffAccelError, match="asked for 'noise_pred'"):
            pipe(
                **tiny.call_kwargs("sd"),
                callback_on_step_end=lambda pipe, i, t, kwargs: pytest.fail("a step was computed"),
                callback_on_step_end_tensor_inputs=["noise_pred"],
            )
    finally:
        type(pipe)._callback_tensor_inputs.remove("noise_pred")


def test_the_progress_bar_is_the_pipelines(capsys, family: str) -> None:
    pipe = tiny.make(family)
    pipe.set_progress_bar_config(disable=False, desc="drawing", ascii=True)
    diffaccel.accelerate(pipe, Euler())
    pipe(**tiny.call_kwargs(family))
    output = capsys.readouterr().err
    assert "drawing" in output and "4/4" in output


@pytest.mark.parametrize("returns", [lambda kwargs: kwargs, lambda kwargs: {}], ids=["returned", "not returned"])
def test_latents_changed_in_place(family: str, returns) -> None:
    def darken(pipe, i, t, kwargs):
        kwargs["latents"].mul_(0.5)
        return returns(kwargs)

    stock, wrapped = both(family, darken)
    assert torch.equal(stock, wrapped)


def test_latents_changed_through_a_view_of_their_memory() -> None:
    def darken(pipe, i, t, kwargs):
        kwargs["latents"].numpy()[...] *= 0.5
        return kwargs

    stock, wrapped = both("flux", darken)
    assert torch.equal(stock, wrapped)


def test_a_prompt_changed_in_place(family: str) -> None:
    def fade(pipe, i, t, kwargs):
        kwargs["prompt_embeds"].mul_(0.5)
        return kwargs

    results = []
    for wrap in (False, True):
        pipe = tiny.make(family)
        if wrap:
            diffaccel.accelerate(pipe, Euler())
        call = tiny.call_kwargs(family)
        results.append(pipe(**call, callback_on_step_end=fade, callback_on_step_end_tensor_inputs=["prompt_embeds"]))
    assert torch.equal(results[0].images, results[1].images)


@pytest.mark.parametrize("sampler", [Euler(), Scheduler()], ids=lambda sampler: sampler.name)
def test_the_current_timestep_is_that_of_the_running_network(sampler) -> None:
    pipe = tiny.make("flux")
    seen: list[tuple[float, float]] = []

    def look(module, args, kwargs):
        seen.append((float(kwargs["timestep"][0]) * 1000, float(pipe.current_timestep)))

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe(**tiny.call_kwargs("flux"))
    stock = seen.copy()
    seen.clear()
    diffaccel.accelerate(pipe, sampler)(**tiny.call_kwargs("flux"))
    assert seen == stock and pipe.current_timestep is None


def test_the_current_timestep_within_a_step_of_two_predictions() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Heun())
    seen: list[tuple[float, float]] = []

    def look(module, args, kwargs):
        seen.append((float(kwargs["timestep"][0]) * 1000, float(pipe.current_timestep)))

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe(**tiny.call_kwargs("flux", guided=False))
    assert len(seen) == 7 and all(abs(time - shown) < 0.01 for time, shown in seen)


@pytest.mark.parametrize("asks", [True, False], ids=["asked for", "not asked for"])
@pytest.mark.parametrize("name", ["sd", "wan", "cogvideox"])
def test_the_negative_prompt_is_that_of_the_stock_loop(name: str, asks: bool) -> None:
    """Wan's loop uses a new one, the other two have joined it to the prompt before."""
    room = tiny if name == "sd" else tiny_more
    seen: list[torch.Tensor] = []

    def swap(pipe, i, t, kwargs):
        seen.append(kwargs["negative_prompt_embeds"].clone() if asks else torch.zeros(0))
        return {"negative_prompt_embeds": seen[-1].flip(1) if asks else new} if i == 1 else {}

    results = []
    new = torch.ones(2, 24 if name == "sd" else 16, 32)
    inputs = ["negative_prompt_embeds"] if asks else ["latents"]
    for wrap in (False, True):
        pipe = room.make(name)
        if wrap:
            diffaccel.accelerate(pipe, Scheduler())
        call = room.call_kwargs(name)
        output = pipe(**call, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=inputs)
        results.append(output.images if name == "sd" else output.frames)
    assert torch.equal(*results) and len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))


def test_a_tensor_that_a_callback_returns_without_asking_is_refused_where_it_has_no_place() -> None:
    call = tiny_others.call_kwargs("ltx")

    def swap(pipe, i, t, kwargs):
        return {"prompt_embeds": torch.zeros(4, 16, 32)} if i == 1 else {}

    pipe = diffaccel.accelerate(tiny_others.make("ltx"), Euler())
    with pytest.raises(DiffAccelError, match=r"returned 'prompt_embeds'.*tensor_inputs=\['latents', 'prompt_embeds'\]"):
        pipe(**call, callback_on_step_end=swap)


def test_a_tensor_that_a_loop_takes_without_listing_it_is_refused_too() -> None:
    """Z-Image's loop takes the negative prompt of a callback, which cannot ask for it."""

    def swap(pipe, i, t, kwargs):
        return {"negative_prompt_embeds": [torch.zeros(3, 16)] * 2} if i == 1 else {"notes": i}

    pipe = diffaccel.accelerate(tiny_others.make("z_image"), Euler())
    with pytest.raises(DiffAccelError, match=r"returned 'negative_prompt_embeds'.*Scheduler\(\)"):
        pipe(**tiny_others.call_kwargs("z_image"), callback_on_step_end=swap)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sd"])
def test_guidance_that_a_callback_raises(name: str) -> None:
    """Wan's loop keeps the scale of the call; the other two read it at every step."""
    room = tiny if name == "sd" else tiny_more

    def raise_it(pipe, i, t, kwargs):
        pipe._guidance_scale += 1.0
        return {}

    results = []
    for wrap in (False, True):
        pipe = room.make(name)
        if wrap:
            diffaccel.accelerate(pipe, Scheduler())
        output = pipe(**room.call_kwargs(name), callback_on_step_end=raise_it)
        results.append(output.images if name == "sd" else output.frames)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [None, [0.0], torch.zeros(3, 3)], ids=["none", "list", "shape"])
def test_latents_of_another_kind_are_refused(value) -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), Euler())
    with pytest.raises(DiffAccelError, match=r"callback_on_step_end returned latents of .* shape \(2, 4, 4, 4\)"):
        pipe(**tiny.call_kwargs("sd"), callback_on_step_end=lambda *args: {"latents": value})


def test_latents_of_one_row_are_those_of_all_rows() -> None:
    def first_row(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"][:1]} if i == 1 else {}

    stock = tiny.make("flux")(**tiny.call_kwargs("flux"), callback_on_step_end=first_row).images
    for sampler in (Euler(), Scheduler()):
        pipe = diffaccel.accelerate(tiny.make("flux"), sampler)
        torch.testing.assert_close(pipe(**tiny.call_kwargs("flux"), callback_on_step_end=first_row).images, stock)


@pytest.mark.parametrize(("name", "way"), [("flux", "in place"), ("sdxl", "replaced")])
def test_a_callback_that_edits_the_noise_levels_of_the_scheduler(name: str, way: str) -> None:
    def soften(pipe, i, t, kwargs):
        if i < 2:
            levels = pipe.scheduler.sigmas
            changed = torch.cat([levels[: i + 1], 0.8 * levels[i + 1 :]])
            if way == "in place":
                levels.copy_(changed)
            else:
                pipe.scheduler.sigmas = changed
        return kwargs

    stock, wrapped = both(name, soften)
    plain = tiny.make(name)(**tiny.call_kwargs(name, batch=2)).images
    assert torch.equal(stock, wrapped) and not torch.equal(stock, plain)


def test_a_callback_that_leaves_another_number_of_noise_levels() -> None:
    def cut(pipe, i, t, kwargs):
        pipe.scheduler.sigmas = pipe.scheduler.sigmas[:2]
        return kwargs

    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    with pytest.raises(DiffAccelError, match=r"left 2 as pipe.scheduler.sigmas, which were \d+ .*values and not their"):
        pipe(**tiny.call_kwargs("flux"), callback_on_step_end=cut)


def test_a_dict_that_a_callback_keeps_is_emptied_as_the_stock_loop_does(family: str) -> None:
    """A stock loop takes tensors out of the callback's own dict, so the second step finds nothing there."""
    kept: dict = {}
    left: list = []

    def once(pipe, i, t, kwargs):
        if i == 0:
            kept.update(latents=kwargs["latents"] * 0.5, prompt_embeds=kwargs["prompt_embeds"].flip(1), mine=i)
        left.append(sorted(kept))
        return kept

    stock, wrapped = both(family, once, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert torch.equal(stock, wrapped) and left[:4] == left[4:] and left[1] == ["mine"]


@pytest.mark.parametrize("config", [Scheduler(), Euler()], ids=["scheduler", "euler"])
def test_a_stop_iteration_of_a_callback_is_an_error_and_not_the_end(config) -> None:
    """``next()`` on an iterator that has run out must not end the sampler with what it holds as latents."""
    pipe = diffaccel.accelerate(tiny_more.make("wan"), config)

    def run_out(pipe, i, t, kwargs):
        raise StopIteration("run out")

    with pytest.raises(StopIteration, match="run out"):
        pipe(**tiny_more.call_kwargs("wan"), callback_on_step_end=run_out)


def test_a_callback_that_returns_no_dict_is_told_so() -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), Euler())
    with pytest.raises(DiffAccelError, match="returned an object of the class list; it must return a dict"):
        pipe(**tiny.call_kwargs("sd"), callback_on_step_end=lambda pipe, i, t, kwargs: [1])
