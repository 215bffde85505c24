"""Options of Bottleneck: every one of them counts or is refused."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Bottleneck

BASE = {
    "speed": {"scales": (0.5, 1.0), "tolerance": 0.2, "spectrum": (3.0, 1.4)},
    "bottleneck": {
        "scales": (1.0, 0.5, 1.0),
        "stage_steps": (2, 3, 1),
        "starts": (1.0, 0.8, 0.6),
        "shifts": (9.0, 6.0, 9.0),
    },
    "selflift-zero": {},
    "lightx2v": {"scales": (0.5, 1.0)},
}
OTHER = {
    "speed": {"scales": (1.0,), "tolerance": 0.02, "spectrum": (0.5, 1.4), "noise": "fresh"},
    "bottleneck": {
        "scales": (1.0, 0.75, 1.0), "stage_steps": (1, 3, 2), "starts": (1.0, 0.7, 0.6), "shifts": (3.0, 3.0, 3.0),
        "stage_end": "handoff", "strength_space": "linear", "count": "truncated", "noise": "fresh", "resize": "nearest",
    },
    "selflift-zero": {
        "scales": (0.75, 1.0), "switches": (0.5,), "lift": (0.9, 1.0, 1.0), "noise": "fresh", "resize": "nearest",
    },
    "lightx2v": {"scales": (0.75, 1.0), "switches": (0.75,), "noise": "fresh", "resize": "nearest"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


def draw(pipe, config: Bottleneck, steps: int = 6) -> torch.Tensor:
    diffaccel.accelerate(pipe, config)
    try:
        kwargs = {**tiny.call_kwargs("flux", size=64, batch=1), "num_inference_steps": steps}
        return pipe(**kwargs).images.clone()
    finally:
        diffaccel.remove(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(BASE))
def test_every_option_changes_the_picture(pipe, preset: str) -> None:
    base = draw(pipe, Bottleneck(preset=preset, **BASE[preset]))
    assert torch.equal(draw(pipe, Bottleneck(preset=preset, **BASE[preset])), base)
    for name, value in OTHER[preset].items():
        changed = {**BASE[preset], name: value}
        assert not torch.equal(draw(pipe, Bottleneck(preset=preset, **changed)), base), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.1}, "tolerance needs a preset, since 'auto' chooses one by the number of steps"),
        (
            {"preset": "speed", "stage_steps": (1, 2)},
            "The preset 'speed' has no option stage_steps. It has: scales, tolerance",
        ),
        ({"preset": "speed", "scales": (1.0, 0.5, 1.0)}, "those of the preset 'speed' grow"),
        ({"preset": "speed", "scales": (0.5, 0.75)}, "numbers in (0, 1], the last of them 1"),
        ({"preset": "speed", "scales": ()}, "numbers in (0, 1], the last of them 1"),
        ({"preset": "speed", "tolerance": 1.0}, "tolerance is 1.0; it must be in (0, 1)"),
        ({"preset": "speed", "switches": (0.5,), "tolerance": 0.1}, "in the place of tolerance and spectrum"),
        ({"preset": "speed", "spectrum": (0.0, 1.0)}, "spectrum is (0.0, 1.0); each must be above 0"),
        ({"preset": "bottleneck", "scales": (0.5, 1.0)}, "begins and ends at 1"),
        ({"preset": "bottleneck", "stage_steps": (6, 0, 8)}, "stage_steps is (6, 0, 8); each must be 1 or more"),
        ({"preset": "bottleneck", "stage_steps": (6, 8)}, "3 stages need 3 numbers"),
        ({"preset": "bottleneck", "starts": (0.9, 0.8, 0.6)}, "the first stage begins at 1"),
        ({"preset": "bottleneck", "starts": (1.0, 1.2, 0.6)}, "each must be in (0, 1]"),
        ({"preset": "bottleneck", "shifts": (9.0, 0.0, 9.0)}, "each must be above 0"),
        ({"preset": "bottleneck", "count": "truncated", "strength_space": "sigma"}, "count='truncated' cuts each grid"),
        ({"preset": "lightx2v", "switches": (1.0,)}, "each must be in (0, 1)"),
        ({"preset": "lightx2v", "scales": (0.5, 0.75, 1.0)}, "switches is (0.5,); 3 stages need 2 numbers"),
        ({"preset": "lightx2v", "scales": (0.5, 0.75, 1.0), "switches": (0.6, 0.3)}, "shares of the steps must grow"),
        ({"preset": "selflift-zero", "lift": (2.0, 0.5, 1.0)}, "each must be in [0, 1]"),
        ({"preset": "selflift-zero", "lift": (0.3, 0.9, 0.5)}, "its least weight, the second number, is above"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(DiffAccelError) as error:
        Bottleneck(**options)
    assert message in str(error.value)


def test_published_forms() -> None:
    paper = Bottleneck.paper()
    assert (paper.preset, paper.stage_steps, paper.starts) == ("bottleneck", (6, 20, 8), (1.0, 0.8, 0.6))
    assert paper.shifts == (9.0, 6.0, 9.0) and paper.scales == (1.0, 0.5, 1.0)
    video = Bottleneck.paper(video=True)
    assert (video.stage_steps, video.starts, video.shifts) == ((4, 24, 16), (1.0, 0.8, 0.7), (7.0, 9.0, 9.0))
    assert Bottleneck.from_dict(paper.to_dict()) == paper


def test_what_a_tuner_may_try_is_valid() -> None:
    space = Bottleneck.tunable()
    for name, values in space.items():
        for value in values:
            Bottleneck(**{"preset": "speed", name: value})


def test_steps_that_do_not_fill_the_stages(pipe) -> None:
    early = Bottleneck(preset="lightx2v", scales=(0.5, 1.0), switches=(0.05,))
    assert torch.isfinite(draw(pipe, early)).all()  # each stage has a step at least
    with pytest.raises(DiffAccelError, match="1 step does not fill 2 stages"):
        draw(pipe, early, steps=1)
    with pytest.raises(DiffAccelError, match=r"stage_steps is .*, 34 in all, and the call makes 6"):
        draw(pipe, Bottleneck.paper())
