"""Rounds on the ring of earlier frames, against full evaluations under the banded mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffaccel.models.next_frame.cache import FrameCache
from diffaccel.models.next_frame.engine import FrameEngine, FrameSettings
from diffaccel.models.next_frame.levels import levels, step
from diffaccel.models.next_frame.noise import FrameNoise
from tests.support.worlds import tiny_world

CLOSE = {"rtol": 0, "atol": 1e-10}


def prompt(model, frames: int = 2, batch: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shape = (batch, frames, *model.frame_shape)
    return torch.rand(shape, generator=draw, dtype=torch.float64), torch.randint(4, (batch, frames), generator=draw)


def plain(engine: FrameEngine, actions: list[int]) -> Tensor:
    drawn = []
    for action in actions:
        row = torch.full((engine.batch, 1), action)
        drawn.append(engine.draft(row).clone())
        engine.keep(1, row)
    return torch.cat(drawn, 1)


def by_full_evaluations(model, frames: Tensor, given: Tensor, actions: list[int], settings: FrameSettings) -> Tensor:
    """Draw each frame from all frames before it, by evaluations of the whole video under the banded mask."""
    noise, level = FrameNoise((0,), torch.device("cpu")), settings.context_noise

    def drawn_noise(frame: int, number: int) -> Tensor:
        target = torch.zeros(1, *model.frame_shape, dtype=torch.float64)
        noise.fill(target, frame, number)
        return target[:, None]

    sigmas, start = levels(settings.steps, settings.shift), frames.shape[1]
    for action in actions:
        count = frames.shape[1]
        given = torch.cat([given, torch.tensor([[action]])], 1)
        context = [(1 - level) * frames[:, i : i + 1] + level * drawn_noise(i, -1) for i in range(count)]
        x = drawn_noise(count, 0)
        for k in range(settings.steps):
            sigma = torch.tensor([[level] * count + [sigmas[k]]], dtype=torch.float64)
            v = model(torch.cat([*context, x], 1), sigma, given)[:, -1:]
            new = drawn_noise(count, k + 1) if settings.rule == "consistency" and k + 1 < settings.steps else None
            x = step(settings.rule, x, v, sigmas[k], sigmas[k + 1], new)
        frames = torch.cat([frames, x], 1)
    return frames[:, start:]


@pytest.mark.parametrize(
    "settings",
    [
        FrameSettings(steps=3),
        FrameSettings(steps=2, context_noise=0.1, shift=3.0, merged=False),
        FrameSettings(steps=3, rule="consistency", context_noise=0.05),
    ],
)
@torch.no_grad()
def test_a_rollout_on_the_ring_equals_full_evaluations(settings):
    """Many times the window of 4 frames, so that frames leave the ring."""
    model, actions = tiny_world(), [0, 1, 1, 2, 3, 3, 0, 2, 1, 0, 3, 1]
    engine = FrameEngine(model, settings)
    frames, given = prompt(model)
    engine.reset(frames, given)
    expected = by_full_evaluations(model, frames, given, actions, settings)
    torch.testing.assert_close(plain(engine, actions), expected, **CLOSE)


def test_the_dtype_of_a_model_changes_rounding_alone():
    """The same noise in every precision: a model in double precision draws the frames of one in single precision."""
    double, single, actions = tiny_world(), tiny_world().float(), [0, 1, 1, 2, 3]
    drawn = []
    for model in (double, single):
        engine = FrameEngine(model, FrameSettings(steps=3, rule="consistency", context_noise=0.1))
        engine.reset(*prompt(double))
        drawn.append(plain(engine, actions))
    assert drawn[0].dtype == torch.float64 and drawn[1].dtype == torch.float32
    torch.testing.assert_close(drawn[1].double(), drawn[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_frame_of_a_round_equals_that_of_a_round_of_one(count):
    model = tiny_world()
    frames, given = prompt(model, 3)
    single, together = FrameEngine(model, FrameSettings(steps=3)), FrameEngine(model, FrameSettings(steps=3), most=3)
    single.reset(frames, given)
    together.reset(frames, given)
    for action in (1, 1, 2, 0, 3):
        row = torch.full((1, count), action)
        first = single.draft(row[:, :1]).clone()
        drawn = together.draft(row).clone()
        torch.testing.assert_close(drawn[:, :1], first, **CLOSE)
        single.keep(1, row[:, :1])
        together.keep(1, row[:, :1])
    later = drawn[:, 1:] - plain(single, [3] * (count - 1)) if count > 1 else torch.ones(1)
    assert later.abs().max() > 1e-4  # later drafts see noisy frames: they are others


def test_merged_evaluations_equal_those_of_their_own():
    model = tiny_world()
    drawn = []
    for merged in (True, False):
        engine = FrameEngine(model, FrameSettings(steps=3, merged=merged, context_noise=0.1), most=3)
        engine.reset(*prompt(model, 4))
        frames = []
        for count, kept in ((3, 2), (2, 2), (3, 1), (3, 3), (1, 1)):
            row = torch.full((1, count), 2)
            frames.append(engine.draft(row)[:, :kept].clone())
            engine.keep(kept, row[:, :kept])
        drawn.append((torch.cat(frames, 1), engine.evaluations))
    torch.testing.assert_close(drawn[0][0], drawn[1][0], **CLOSE)
    assert drawn[1][1] - drawn[0][1] == 5 - 1 + 1  # of five rounds all but the last; and the prompt's end


def test_frames_taken_back_were_never_written():
    model = tiny_world()
    frames, given = prompt(model, 7)
    straight, back = (
        FrameEngine(model, FrameSettings(steps=2), most=3),
        FrameEngine(model, FrameSettings(steps=2), most=3),
    )
    for engine, count in ((straight, 5), (back, 7)):
        engine.reset(frames[:, :count], given[:, :count])
        engine.write_pending()
    back.cache.rollback(5)
    back.count = 5
    torch.testing.assert_close(plain(back, [1, 2, 3]), plain(straight, [1, 2, 3]), **CLOSE)


def test_dropped_frames_change_no_earlier_one():
    model = tiny_world()
    row = torch.full((1, 3), 2)
    drawn = []
    for poll in (None, lambda k: 3, lambda k: 3 if k == 1 else 1):
        engine = FrameEngine(model, FrameSettings(steps=4), most=3)
        engine.reset(*prompt(model, 5))
        drawn.append(engine.draft(row, poll).clone())
    assert [part.shape[1] for part in drawn] == [3, 3, 1]
    torch.testing.assert_close(drawn[1], drawn[0], **CLOSE)
    torch.testing.assert_close(drawn[2], drawn[0][:, :1], **CLOSE)


def test_branches_equal_rounds_of_one_under_each_action():
    model = tiny_world()
    engine = FrameEngine(model, FrameSettings(steps=3), branches=3)
    engine.reset(*prompt(model, 5))
    choices = torch.tensor([[3, 0, 2]])
    drawn = engine.draft(choices, branches=True).clone()
    for number in range(3):
        single = FrameEngine(model, FrameSettings(steps=3))
        single.reset(*prompt(model, 5))
        torch.testing.assert_close(
            drawn[:, number : number + 1], single.draft(choices[:, number : number + 1]), **CLOSE
        )
    engine.keep(1, choices[:, 1:2], first=1)
    follower = engine.draft(torch.tensor([[1]])).clone()
    single = FrameEngine(model, FrameSettings(steps=3))
    single.reset(*prompt(model, 5))
    torch.testing.assert_close(follower, plain(single, [0, 1])[:, 1:], **CLOSE)


def test_a_saved_state_goes_on_exactly():
    model = tiny_world()
    engine = FrameEngine(model, FrameSettings(steps=2, context_noise=0.1), most=2)
    engine.reset(*prompt(model, 3))
    plain(engine, [1, 2, 0])
    state = engine.state_dict()
    expected = plain(engine, [3, 1, 1])
    other = FrameEngine(model, FrameSettings(steps=2, context_noise=0.1), most=2)
    other.load_state_dict(state)
    assert torch.equal(plain(other, [3, 1, 1]), expected)
    engine.load_state_dict(state)
    assert torch.equal(plain(engine, [3, 1, 1]), expected)


def test_rows_of_a_batch_are_independent():
    model = tiny_world()
    frames, given = prompt(model, 3, batch=2)
    both = FrameEngine(model, FrameSettings(steps=2), seeds=(5, 9))
    both.reset(frames, given)
    alone = FrameEngine(model, FrameSettings(steps=2), seeds=(9,))
    alone.reset(frames[1:], given[1:])
    torch.testing.assert_close(plain(both, [1, 2, 3])[1:], plain(alone, [1, 2, 3]), **CLOSE)


def test_the_base_of_rotations_moves_without_effect():
    model = tiny_world()
    engines = [FrameEngine(model, FrameSettings(steps=2)) for _ in range(2)]
    for engine in engines:
        engine.reset(*prompt(model, 4))
    expected = plain(engines[0], [1, 2, 3, 0])
    first = plain(engines[1], [1, 2])
    engines[1].cache.move_base(3)
    torch.testing.assert_close(torch.cat([first, plain(engines[1], [3, 0])], 1), expected, rtol=0, atol=1e-9)


def test_the_ring_keeps_its_memory():
    model = tiny_world(torch.float32, window=3, num_layers=1)
    engine = FrameEngine(model, FrameSettings(steps=1))
    engine.reset(*prompt(model))
    places = [part.data_ptr() for part in (engine.cache.keys, engine.cache.values, engine.cache.rotated)]
    plain(engine, [1, 2] * 10)
    scale = engine.cache.keys.abs().max()
    engine.count = engine.cache.count = 2 * 1024 + 5  # as after so many frames
    engine.cache.ids += engine.cache.count - int(engine.cache.ids.max()) - 1
    drawn = plain(engine, [1, 2] * 10)
    assert places == [part.data_ptr() for part in (engine.cache.keys, engine.cache.values, engine.cache.rotated)]
    assert engine.cache.base > 0 and bool(torch.isfinite(drawn).all())
    assert engine.cache.keys.abs().max() < 2 * scale


@pytest.mark.parametrize(("count", "sentence"), [(-1, "Give 0 to 9"), (10, "Give 0 to 9"), (4, "Evicted frames")])
def test_a_rollback_that_cannot_be_is_refused(count, sentence):
    cache = FrameCache(tiny_world(), 1, 4, 2, 2)
    cache.ids.copy_(torch.tensor([5, 6, 7, 8, 4]))
    cache.count = 9
    with pytest.raises(ValueError, match=sentence):
        cache.rollback(count)
    cache.rollback(7)
    assert sorted(cache.ids.tolist())[-3:] == [4, 5, 6]
