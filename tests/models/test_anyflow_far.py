"""The ring of a chunk-causal network against the stock network: what is written, what is seen, what never grows."""

from __future__ import annotations

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.models.anyflow_far.engine import ChunkEngine, chunk_window
from tests.support.chunked import SIZE, TEXT, numbers, stock_context, stock_velocity, tiny_network

SIZES = [1, 2, 2, 2, 2, 2, 2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def engine_of(model, far, **options):
    return ChunkEngine(model, chunk_window(model, 4 + far, 2, "test"), 2, SIZE, SIZE, **options)


def clip(sizes):
    return [numbers(2, size, 4, SIZE, SIZE, seed=number) for number, size in enumerate(sizes)]


def levels(t):
    return torch.full((2,), t), torch.zeros(2)


@pytest.mark.slow  # the stock network makes masks of all tokens by all
@pytest.mark.parametrize("far", [2, 3, 20])
def test_the_ring_equals_the_whole_video_under_its_mask(far):
    model, text = tiny_network(), numbers(2, 3, TEXT)
    engine, chunks = engine_of(model, far), clip(SIZES)
    x = numbers(2, 2, 4, SIZE, SIZE, seed=50)
    engine.begin()
    for number, chunk in enumerate(chunks):
        engine.keep(chunk, text)
        if number not in (2, len(SIZES) - 1):
            continue
        cache, seen = engine.memory.cache, chunks[: number + 1]
        memory, compressed = stock_context(model, seen, text, far)
        assert cache.count == compressed
        for frame in range(max(0, compressed - far), compressed):
            place = cache.places - 1 - frame % cache.places
            assert int(cache.ids[place]) == frame
            for layer, kept in enumerate(memory):
                key, value = kept["compressed_cache"][:, :, :, frame]
                torch.testing.assert_close(cache.keys[layer, :, :, place], key, **CLOSE)
                torch.testing.assert_close(cache.values[layer, :, :, place], value, **CLOSE)
        expected = stock_velocity(model, seen, x, 700.0, text, far)
        torch.testing.assert_close(engine.velocity(x, *levels(700.0), text), expected, **CLOSE)


def test_a_ring_that_short_chunks_make_larger_keeps_its_frames_in_order():
    """Frames have left it before: what it holds is then one piece from the end, as the evaluations read it."""
    model, text = tiny_network(num_layers=1), numbers(2, 3, TEXT)
    engine, wide, seen = engine_of(model, 3), engine_of(model, 40), []
    engine.begin()
    wide.begin()
    for chunk in clip([1, 2, 2, 2, 2, 2, 2, *[1] * 5]):
        engine.keep(chunk, text)
        wide.keep(chunk, text)
        cache, ring = engine.memory.cache, engine.memory.held
        ids = range(cache.count - ring, cache.count)
        assert sorted(cache.ids[cache.places - ring :].tolist()) == list(ids)
        for frame in ids:
            (place,), (other,) = ((kept.ids == frame).nonzero()[0].tolist() for kept in (cache, wide.memory.cache))
            for name in ("keys", "rotated", "values"):
                pair = (getattr(kept, name)[:, :, :, at] for kept, at in ((cache, place), (wide.memory.cache, other)))
                torch.testing.assert_close(*pair, **CLOSE)
        seen.append(ring + sum(part.shape[1] for part in engine.recent))
    assert seen == [1, 3, 5, *[7] * 9] and engine.memory.origin > 0


@pytest.mark.slow
def test_a_short_chunk_sees_the_zeros_that_the_network_pads_with():
    model, text = tiny_network(), numbers(2, 3, TEXT)
    engine, chunks, x = engine_of(model, 4), clip([1, 2]), numbers(2, 2, 4, SIZE, SIZE, seed=50)
    engine.begin()
    for chunk in chunks:
        engine.keep(chunk, text)
    engine.velocity(x, *levels(700.0), text)  # of two frames, whose keys lie where one frame's zeros come next
    expected = stock_velocity(model, chunks, x[:, :1], 700.0, text, 4)
    torch.testing.assert_close(engine.velocity(x[:, :1], *levels(700.0), text), expected, **CLOSE)


def test_times_count_from_a_frame_that_moves_along():
    model, text = tiny_network(), numbers(2, 3, TEXT)
    x, chunks = numbers(2, 2, 4, SIZE, SIZE, seed=50), clip(SIZES)
    engines = [engine_of(model, 4), engine_of(model, 4)]
    for engine in engines:
        engine.begin()
        for chunk in chunks[:-1]:
            engine.keep(chunk, text)
    cache = engines[1].memory.cache
    places = [part.data_ptr() for part in (cache.keys, cache.rotated, cache.values)]
    later = 2 * 1024 - 8
    cache.ids += later  # as after so many frames more
    cache.count += later
    engines[1].count += later
    cache.move_base(later)
    for engine in engines:
        engine.keep(chunks[-1], text)
    assert engines[1].count == later + engines[0].count
    expected = engines[0].velocity(x, *levels(300.0), text)
    torch.testing.assert_close(engines[1].velocity(x, *levels(300.0), text), expected, **CLOSE)
    cache.note(2 * 1024)  # and so many more, after which keys are rotated anew
    assert cache.base > later and places == [part.data_ptr() for part in (cache.keys, cache.rotated, cache.values)]


def test_memory_is_that_of_the_window():
    model, text = tiny_network(num_layers=1), numbers(2, 3, TEXT)
    engine = engine_of(model, 4)
    engine.begin()
    cache, counts = engine.memory.cache, []
    places, size = cache.values.data_ptr(), engine.bytes
    for number in range(12):
        before = engine.evaluations
        engine.keep(numbers(2, 2, 4, SIZE, SIZE, seed=number), text)
        counts.append(engine.evaluations - before)
    assert counts == [1, 2] + [3] * 10  # one chunk is compressed, and two are written whole, however long the video
    assert (cache.values.data_ptr(), engine.bytes) == (places, size) and len(engine.recent) == 2
    assert engine.bytes < 4 * sum(part[0].numel() * 4 for part in (cache.keys, cache.rotated, cache.values))


@pytest.mark.parametrize(
    ("options", "asked", "sentence"),
    [
        ({}, {"window": 5, "chunk": 2}, "window is 5 latent frames.*must be 6 or more"),
        ({}, {"window": 2000, "chunk": 2}, "too long; 1024"),
        ({"full_chunk_limit": 1}, {}, "full_chunk_limit is 1; it must be 2 or more"),
        ({"compressed_patch_size": (2, 4, 4)}, {}, "patches of one latent frame"),
    ],
)
def test_windows_that_cannot_be_are_refused(options, asked, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        chunk_window(tiny_network(**options), asked.get("window"), asked.get("chunk"), "test")


def test_what_does_not_fit_the_memory_is_refused():
    model, text = tiny_network(num_layers=1), numbers(2, 3, TEXT)
    engine = engine_of(model, 4)
    with pytest.raises(DiffAccelError, match=r"A chunk is \(2, 3, 4, 4, 4\); the memory is for \(2, 1 to 2, 4, 4, 4\)"):
        engine.keep(numbers(2, 3, 4, SIZE, SIZE), text)
    with pytest.raises(DiffAccelError, match=r"The text is \(1, 3, 8\)"):
        engine.keep(numbers(2, 2, 4, SIZE, SIZE), text[:1])
    with pytest.raises(DiffAccelError, match="a multiple of the patch 2x2 and at least 4x4"):
        ChunkEngine(model, engine.window, 2, 2, 2)
    with pytest.raises(DiffAccelError, match="got a Linear"):
        chunk_window(torch.nn.Linear(1, 1), None, None, "test")
