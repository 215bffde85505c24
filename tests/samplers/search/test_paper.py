"""Rollover Budget Forcing as published, beside our defaults."""

from __future__ import annotations

from search_bed import plan, play

from diffaccel.samplers import RBF


def test_the_published_form_is_a_preset_that_options_override() -> None:
    paper = RBF.paper(budget=500)
    assert paper == RBF(
        preset="paper", budget=500, path="vp", kernel="em", tail_steps=0, particles=2, initial=25, beam=1, chunk=1
    )
    assert (paper.path, paper.kernel, paper.tail_steps, paper.initial, paper.beam, paper.chunk) == (
        "vp", "em", 0, 25, 1, 1
    )  # fmt: skip
    assert RBF.paper(kernel="em", beam=2).beam == 2 and RBF.paper(initial=5).initial == 5
    assert RBF.from_dict(paper.to_dict()) == paper
    assert "preset" not in RBF().to_dict() and RBF().path == "native"


def test_its_ledger_is_the_published_one() -> None:
    """500 predictions, 2 chains of 25 noises, 10 levels: a quota of 22 and 224 children a chain."""
    played = play(RBF.paper(budget=500), 500, plan(10), lambda move: -float(move.stage))
    assert played.search.used["quota"] == 22
    assert played.proposals()[:-1] == [22] * 8 and abs(sum(played.proposals()) - 224) <= 1
