"""A network call that does not fit in memory is tried again with half its rows, once."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from search_bed import latent_reward

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import SVDD, Euler

SEARCH = SVDD(reward=latent_reward(lambda x0: x0.flatten(1).mean(1)), budget=40, particles=1)


def limited(pipe, most: int) -> None:
    """The network of a card that holds so many rows."""
    forward = pipe.transformer.forward

    def call(hidden_states, **kwargs):
        if len(hidden_states) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")
        return forward(hidden_states=hidden_states, **kwargs)

    pipe.transformer.forward = call


def test_half_the_rows_give_the_same_decisions(caplog):
    call = tiny.call_kwargs("flux", steps=4)
    whole = diffaccel.accelerate(tiny.make("flux"), SEARCH)
    whole(**call)
    halved = diffaccel.accelerate(tiny.make("flux"), SEARCH)
    limited(halved, 12)
    with caplog.at_level(logging.WARNING, "diffaccel.runtime.native"):
        halved(**tiny.call_kwargs("flux", steps=4))
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory with 20 rows in a network call: going on with 10."
    ]
    mine, other = (diffaccel.summary(pipe).last_run["report"]["search"]["pictures"] for pipe in (halved, whole))
    assert [p["nfe"] for p in mine] == [p["nfe"] for p in other]
    decisions = [[(d["stage"], d["tried"]) for d in p["decisions"]] for p in mine]
    assert decisions == [[(d["stage"], d["tried"]) for d in p["decisions"]] for p in other]
    assert [p["reward"] for p in mine] == pytest.approx([p["reward"] for p in other], abs=1e-5)


def test_it_is_tried_once_and_by_searches_alone():
    for config, most in ((SEARCH, 3), (Euler(), 1)):
        pipe = diffaccel.accelerate(tiny.make("flux"), config)
        limited(pipe, most)
        with pytest.raises(DiffAccelError, match="Out of memory: try a smaller batch"):
            pipe(**tiny.call_kwargs("flux", steps=4))
