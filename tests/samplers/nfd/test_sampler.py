"""The sampler of world models: drafts, what is kept of them, what is prepared, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.samplers.nfd.sampler import NextFrameSampler
from tests.support.replayed_calls import ReplayedCalls, replayed_calls  # noqa: F401
from tests.support.worlds import tiny_world

CLOSE = {"rtol": 0, "atol": 1e-10}
CHANGING, HELD = [0, 1, 2, 3, 2, 1, 0, 3, 1], [2] * 10


def sampler(draft=1, steps=3, **options) -> NextFrameSampler:
    made = NextFrameSampler(tiny_world(), steps, draft=draft, **options)
    made.reset(*prompt(made))
    return made


def prompt(made: NextFrameSampler):
    draw = torch.Generator().manual_seed(3)
    shape = (made.engine.batch, 3, *made.model.frame_shape)
    return torch.rand(shape, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("draft", [2, 3])
def test_where_each_action_changes_drafts_make_no_difference(draft):
    """Every frame is the first of a round, and so that of N = 1."""
    plain, drafted = sampler().rollout(CHANGING), sampler(draft).rollout(CHANGING)
    torch.testing.assert_close(drafted.frames, plain.frames, **CLOSE)
    count = len(CHANGING)
    assert drafted.stats.rounds == drafted.stats.accepted == count
    assert drafted.stats.computed == draft * (count - draft + 1) + sum(range(1, draft))  # the last rounds are shorter
    assert drafted.stats.discarded == drafted.stats.computed - count


@pytest.mark.parametrize("draft", [1, 2, 3])
def test_a_held_action_needs_few_rounds(draft):
    stats = sampler(draft).rollout(HELD).stats
    assert stats.rounds == math.ceil(len(HELD) / draft)
    assert stats.computed == stats.accepted == len(HELD) and stats.discarded == 0
    assert stats.evaluations == 3 * stats.rounds  # none for keys and values alone


def test_a_changed_action_throws_the_rest_away():
    made = sampler(3)
    plain = sampler()
    first = made.step(1)
    torch.testing.assert_close(first, plain.step(1), **CLOSE)
    second = made.step(2)
    torch.testing.assert_close(second, plain.step(2), **CLOSE)
    assert made.stats.discarded == 2 and made.stats.rounds == 2 and made.action == [2]


def test_step_and_rollout_draw_the_same():
    actions = [1, 1, 1, 2, 2, 0, 0, 0, 0, 0]
    made = sampler(2)
    stepped = torch.stack([made.step(action) for action in actions], 1)
    torch.testing.assert_close(sampler(2).rollout(actions).frames, stepped, **CLOSE)


def test_an_oracle_knows_what_comes():
    made = sampler(3)
    rollout = made.rollout(CHANGING, oracle=True)
    assert rollout.stats.rounds == 3 and rollout.stats.discarded == 0 and rollout.stats.is_oracle
    assert not sampler(3).rollout(CHANGING).stats.is_oracle


def test_a_prepared_frame_is_that_of_one_draft():
    plain, made = sampler(), sampler(fan_out=4)
    made.prepare()
    before = made.engine.evaluations
    torch.testing.assert_close(made.step(2), plain.step(2), **CLOSE)
    assert made.engine.evaluations == before and made.stats.discarded == 3
    made.prepare([1, 3])
    torch.testing.assert_close(made.step(0), plain.step(0), **CLOSE)  # it was not among them
    made.prepare([1, 3])
    torch.testing.assert_close(made.step(3), plain.step(3), **CLOSE)
    torch.testing.assert_close(made.step(3), plain.step(3), **CLOSE)


def test_a_state_saved_inside_of_a_round_goes_on_exactly():
    made = sampler(3)
    made.step(1)
    state = made.state_dict()
    expected = [made.step(action) for action in (1, 1, 2, 0)]
    other = sampler(3)
    other.load_state_dict(state)
    for action, frame in zip((1, 1, 2, 0), expected, strict=True):
        assert torch.equal(other.step(action), frame)
    assert other.stats.rounds == 2


def test_another_action_between_steps_drops_drafts():
    made, plain = sampler(3), sampler()
    frame = made.step(1, poll=lambda: 2)
    torch.testing.assert_close(frame, plain.step(1), **CLOSE)
    assert made.stats.discarded == 2 and made.action == [1]
    torch.testing.assert_close(made.step(2), plain.step(2), **CLOSE)


def test_with_a_latency_a_round_is_given_up_once():
    made, plain = sampler(2, latency=1e6), sampler()
    asked = []

    def poll() -> int:
        asked.append(len(asked))
        return 2 if len(asked) < 3 else 3

    frame = made.step(1, poll)
    torch.testing.assert_close(frame, plain.step(2), **CLOSE)  # given up for 2; the wish for 3 comes too late for it
    assert made.stats.restarts == 1 and made.action == [2] and made.stats.rounds == 2
    assert made.stats.computed == made.stats.accepted + made.stats.discarded


def test_videos_of_a_batch_have_actions_of_their_own():
    made = sampler(2, seeds=(0, 7))
    rollout = made.rollout([[1, 1, 1, 2, 2], [1, 1, 3, 3, 3]])
    assert rollout.frames.shape[:2] == (2, 5)
    assert rollout.stats.discarded > 0  # where one video's action changes, drafts of both go
    torch.testing.assert_close(rollout.frames[:1, :1], sampler().rollout([1]).frames, **CLOSE)


def test_auto_measures_once_and_draws_what_its_number_draws():
    made = sampler("auto")
    costs = dict(made.step_seconds)
    assert sorted(costs) == [1, 2, 3] and all(seconds > 0 for seconds in costs.values())
    made.step_seconds = {1: 1.0, 2: 1.1, 3: 9.0}
    drawn = made.rollout(HELD)
    assert drawn.stats.drafts == {2: 5}
    torch.testing.assert_close(drawn.frames, sampler(2).rollout(HELD).frames, **CLOSE)
    made.step_seconds = {1: 1.0, 2: 2.1, 3: 3.2}
    made.reset(*prompt(made))
    assert made.rollout(HELD).stats.drafts == {1: 10}


def test_drafts_see_noisy_predecessors():
    """The second frame of a round is another one than with N = 1."""
    assert (sampler(2).rollout([1, 1]).frames - sampler().rollout([1, 1]).frames).abs()[:, 1].max() > 1e-4


MODEL = tiny_world(torch.float32)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draft": 0}, "draft is 0"),
        ({"draft": 1.5}, "draft is 1.5"),
        ({"draft": True}, "draft is True"),
        ({"draft": 4}, "window is 4 with 4 drafts"),
        ({"window": 1}, "window is 1"),
        ({"context_noise": 0.5}, "context_noise is 0.5"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0"),
        ({"latency": 0.0}, "latency is 0"),
        ({"fan_out": 5}, "from 0 to 4"),
        ({"rule": "heun"}, "'euler' or 'consistency'"),
        ({"capture": True}, "capture=True records CUDA graphs, and the model is on cpu"),
    ],
)
def test_options_that_do_not_fit_are_named(options, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        NextFrameSampler(MODEL, **options)


def test_a_step_before_reset_is_refused():
    made = NextFrameSampler(MODEL, draft=1)
    for call in (lambda: made.step(0), lambda: made.rollout([0]), made.prepare, made.state_dict):
        with pytest.raises(DiffAccelError, match="reset"):
            call()


def test_actions_and_frames_that_do_not_fit_are_named():
    made = NextFrameSampler(MODEL, draft=1, fan_out=2)
    frames = torch.zeros(3, 3, 8, 8)
    made.reset(frames)
    for call, sentence in [
        (lambda: made.step(4), "hold 4; they must be integers from 0 to 3"),
        (lambda: made.step(-1), "hold -1"),
        (lambda: made.step(1.0), "torch.float32; they must be integers"),
        (lambda: made.rollout([]), "shape"),
        (lambda: made.rollout([[0], [1]]), "of 2 videos"),
        (lambda: made.prepare(), "fan_out=4"),
        (lambda: made.prepare([1, 1]), "different"),
        (lambda: made.reset(frames[:, :, :4]), r"\(batch, frames, 3, 8, 8\)"),
        (lambda: made.reset(frames[:0]), "1 frame or more"),
        (lambda: made.reset(frames.repeat(2, 1, 1, 1)), "window is 4"),
        (lambda: made.reset(frames / 0), "NaN"),
        (lambda: made.reset(frames, [0, 1]), "one for each frame"),
        (lambda: made.reset(frames, seeds=(1, 2)), "2 seeds"),
        (lambda: made.reset(None, [1]), "without frames"),
    ]:
        with pytest.raises(DiffAccelError, match=sentence):
            call()
    made.reset(frames.repeat(2, 1, 1, 1), truncate=True)
    assert made.step(3).shape == (1, 3, 8, 8)


def test_a_model_that_moved_or_changed_its_dtype_is_noticed():
    model = tiny_world(torch.float32)
    made = NextFrameSampler(model, draft=1)
    made.reset()
    model.double()
    with pytest.raises(DiffAccelError, match=r"torch.float32 and is on cpu in torch.float64. Call reset"):
        made.step(0)


@pytest.mark.parametrize("options", [{}, {"latency": 1e6}, {"merged": False}], ids=["rounds", "steps", "not merged"])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_frame_that_was_interrupted_is_drawn_again(at, options):
    actions, calls = [1, 2, 2, 0], []
    plain, made = sampler(**options), sampler(**options)

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    handle = made.model.proj_in.register_forward_pre_hook(interrupt)
    interrupted = 0
    for action in actions:
        expected = plain.step(action)
        try:
            frame = made.step(action)
        except KeyboardInterrupt:
            interrupted += 1
            frame = made.step(action)
        torch.testing.assert_close(frame, expected, **CLOSE)
    handle.remove()
    assert interrupted == 1


def test_the_number_of_drafts_changes_between_rounds_only():
    made = sampler(3)

    def poll() -> int:
        made.draft = 1
        return 0

    with pytest.raises(DiffAccelError, match="inside of a running round"):
        made.step(0, poll)
    made.draft = 2
    assert made.draft == 2
    with pytest.raises(DiffAccelError, match="memory for 1 to 3"):
        made.draft = 4


def test_a_frame_is_never_kept_under_another_action():
    made = sampler(2)
    made.engine.draft(torch.tensor([[1, 1]]))
    with pytest.raises(DiffAccelError, match="drawn under another action"):
        made.engine.keep(1, torch.tensor([[2]]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": True}, "steps is True; it must be a whole number"), ({"steps": 2.0}, "steps is 2.0"),
        ({"window": "8"}, "window is '8'"), ({"latency": "a"}, "latency is 'a'"), ({"shift": math.nan}, "shift is nan"),
        ({"seeds": 3}, "seeds is 3; it must be a list"), ({"seeds": ()}, r"seeds is \(\)"),
        ({"seeds": (1.5,)}, "seeds holds 1.5"), ({"context_noise": "a"}, "context_noise is 'a'"),
        ({"steps": None}, "steps is None"), ({"latency": math.inf}, "latency is inf"), ({"latency": True}, "is True"),
        ({"fan_out": 1.5}, "fan_out is 1.5"), ({"fan_out": True}, "fan_out is True"), ({"merged": 1}, "merged is 1"),
        ({"capture": "no"}, "capture is 'no'; it must be True or False or None"),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_a_wrong_kind_are_told(changes, said):
    with pytest.raises(DiffAccelError, match=said):
        NextFrameSampler(tiny_world(), **{"steps": 2, "draft": 1, **changes})


def test_an_action_and_a_state_of_a_wrong_kind_are_told():
    made = sampler()
    with pytest.raises(DiffAccelError, match="action is 'a'; it must be a whole number"):
        made.step("a")
    with pytest.raises(DiffAccelError, match="The state lacks parts of a video"):
        made.load_state_dict({})
    made.step(1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"latency": 1e6}, {"merged": False}, {"fan_out": 2}])
def test_after_a_warm_up_nothing_is_recorded_and_the_video_is_the_same(options, monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", ReplayedCalls)
    warm, plain = sampler(3, capture=True, **options), sampler(3, capture=False, **options)
    assert warm.warm_up(poll=True) > 0
    for made in (warm, plain):
        made.step(1)
    assert warm.warm_up(poll=True) == 0  # inside of a round, which goes on
    recorded = warm.engine.captures
    for i in range(20):
        action, other = i % 3, (i * i) % 4
        if options.get("fan_out") and i % 5 == 0:
            for made in (warm, plain):
                made.prepare([action, 3])
        frames = [made.step(action, poll=lambda other=other: other) for made in (warm, plain)]
        torch.testing.assert_close(*frames, rtol=0, atol=0)
    assert warm.engine.captures == recorded and warm.stats.discarded == plain.stats.discarded
    assert plain.warm_up() == 0


def test_a_warm_up_that_fails_leaves_the_video_as_it_is(replayed_calls):  # noqa: F811
    warm, plain = sampler(3, capture=True), sampler(3, capture=False)
    for made in (warm, plain):
        made.step(1)
    replayed_calls.fails = MemoryError
    with pytest.raises(MemoryError, match="on purpose"):
        warm.warm_up()
    replayed_calls.fails = None
    for action in (1, 1, 1, 2):
        assert torch.equal(warm.step(action), plain.step(action))
    assert warm.stats.accepted == plain.stats.accepted == 5
