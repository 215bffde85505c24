"""The sampler of long videos: the pipeline's frames from the same noise, prompts that change, wrong input."""

from __future__ import annotations

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.models.anyflow_far import engine
from diffaccel.models.next_frame.noise import FrameNoise
from diffaccel.samplers import ChunkSampler
from tests.support.chunked import SIZE, TEXT, draw, numbers, tiny_chunked, tiny_network

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPT = numbers(1, 3, TEXT, seed=1)


def noise(frames: int, seeds: tuple[int, ...] = (5,)) -> torch.Tensor:
    drawn = torch.zeros(len(seeds), frames, 4, SIZE, SIZE)
    source = FrameNoise(seeds, torch.device("cpu"))
    for frame in range(frames):
        source.fill(drawn[:, frame], frame, 0)
    return drawn


def sampler(model=None, **options):
    return ChunkSampler(
        model or tiny_network(), **{"height": SIZE, "width": SIZE, "steps": 2, "seeds": (5,), **options}
    )


@pytest.mark.slow
def test_it_draws_what_the_pipeline_draws_from_the_same_noise():
    pipe = tiny_chunked(shift=3.0)
    expected = draw(pipe, latents=noise(9).transpose(1, 2)).transpose(1, 2)
    made = sampler(pipe.transformer, shift=3.0)
    made.reset(PROMPT)
    drawn = list(made.chunks(5))
    assert [chunk.shape[1] for chunk in drawn] == [1, 2, 2, 2, 2] and made.frames == 9
    torch.testing.assert_close(torch.cat(drawn, 1), expected, **CLOSE)


def test_a_video_is_continued_and_begun_again():
    made = sampler()
    made.reset(PROMPT)
    whole = torch.cat(list(made.chunks(5)), 1)
    made.reset(PROMPT)
    assert torch.equal(torch.cat(list(made.chunks(5)), 1), whole)
    made.reset(PROMPT, whole[:, :5])
    assert made.frames == 5
    torch.testing.assert_close(torch.cat(list(made.chunks(2)), 1), whole[:, 5:], **CLOSE)


def test_a_row_depends_on_its_own_seed_and_a_prompt_counts_from_its_chunk_on():
    alone, both = sampler(), sampler(seeds=(7, 5))
    for made in (alone, both):
        made.reset(PROMPT)
    first = torch.cat(list(alone.chunks(3)), 1)
    torch.testing.assert_close(torch.cat(list(both.chunks(3)), 1)[1:], first, **CLOSE)
    alone.reset(PROMPT)
    other = torch.cat([*alone.chunks(2), alone.step(numbers(1, 3, TEXT, seed=4))], 1)
    assert torch.equal(other[:, :3], first[:, :3]) and (other[:, 3:] - first[:, 3:]).abs().max() > 1e-4


def test_memory_stays_where_it_is():
    made = sampler(tiny_network(num_layers=1), window=6)
    made.reset(PROMPT)
    cache = made.engine.memory.cache
    places = [part.data_ptr() for part in (cache.keys, cache.rotated, cache.values)]
    for chunk in made.chunks(12):
        assert bool(torch.isfinite(chunk).all())
    assert made.frames == 23 and cache.count == 17 and len(made.engine.recent) == 2
    assert places == [part.data_ptr() for part in (cache.keys, cache.rotated, cache.values)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"first": 0}, "first is 0; it must be a whole number, 1 or more"),
        ({"first": 3}, "first is 3 and chunk 2"),
        ({"window": 5}, "it must be 6 or more"),
        ({"chunk": True}, "chunk is True"),
        ({"seeds": ()}, "seeds is"),
        ({"shift": 0.0}, "shift is 0"),
        ({"shift": float("nan")}, "shift is nan; it must be a positive number"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"height": "4"}, "height is '4'; it must be a whole number"),
        ({"height": 1 << 20}, "positions of 1024 patches a side"),
        ({"capture": True}, "capture=True records CUDA graphs"),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        sampler(tiny_network(num_layers=1), **options)


def test_wrong_input_is_refused():
    made = sampler(tiny_network(num_layers=1))
    with pytest.raises(DiffAccelError, match="no video yet"):
        made.step()
    for text in ("a cat", numbers(1, 0, TEXT), numbers(1, 3, TEXT + 1), numbers(2, 3, TEXT), numbers(3, TEXT)):
        with pytest.raises(DiffAccelError, match="it must be embedded prompts"):
            made.reset(text)
    for frames in (2, 4):
        with pytest.raises(DiffAccelError, match=r"give 1, 3, 5, \.\.\. of them"):
            made.reset(PROMPT, numbers(1, frames, 4, SIZE, SIZE))
    with pytest.raises(DiffAccelError, match="NaN or infinite"):
        made.reset(PROMPT, torch.full((1, 1, 4, SIZE, SIZE), torch.nan))
    for count in (-1, "x", 1.5):
        with pytest.raises(DiffAccelError, match="it must be a whole number of chunks"):
            next(made.chunks(count))
    with pytest.raises(DiffAccelError, match="text holds NaN"):
        made.reset(torch.full((1, 3, TEXT), torch.nan))


def test_a_chunk_that_an_interrupt_cut_off_is_made_again_to_the_same_bits(monkeypatch):
    made = sampler(tiny_network(num_layers=1))
    made.reset(PROMPT)
    whole = torch.cat(list(made.chunks(4)), 1)
    real, left = engine.evaluate, [0]

    def evaluate(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    for evaluations in (10, 12):  # before and after the first chunk that leaves the full resolution is written
        made.reset(PROMPT)
        left[0], chunks = evaluations, []
        with pytest.raises(KeyboardInterrupt):
            while True:
                chunks.append(made.step())
        while len(chunks) < 4:
            chunks.append(made.step())
        assert torch.equal(torch.cat(chunks, 1), whole), f"interrupted in evaluation {evaluations}"


def test_a_beginning_that_does_not_fit_is_refused_at_once_and_leaves_the_video_as_it_is():
    made = sampler(tiny_network(num_layers=1))
    made.reset(PROMPT)
    made.step()
    for latents in (numbers(1, 1, 4, 2 * SIZE, SIZE), numbers(2, 1, 4, SIZE, SIZE), numbers(1, 3, 5, SIZE, SIZE)):
        with pytest.raises(DiffAccelError, match=r"they must be \(1, latent frames, 4, 4, 4\)"):
            made.reset(PROMPT, latents)
    assert made.frames == 1 and made.step().shape[1] == 2


def test_latents_and_texts_that_the_caller_reuses_are_copies():
    made, text, latents = sampler(tiny_network(num_layers=1)), PROMPT.clone(), numbers(1, 1, 4, SIZE, SIZE)
    made.reset(PROMPT, latents)
    expected = torch.cat(list(made.chunks(2)), 1)
    made.reset(text, latents)
    text.zero_()
    latents.zero_()
    assert torch.equal(torch.cat(list(made.chunks(2)), 1), expected)
