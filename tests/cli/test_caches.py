"""Caches from a shell: beside a sampler or alone, in the record, and in a word of a comparison."""

from __future__ import annotations

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.runs.variant import parse
from diffaccel.samplers import Euler, Spectrum, TaylorSeer


@pytest.mark.slow
def test_a_cache_is_a_method_beside_a_sampler(run, models, tmp_path):
    words = ["sample", "a cat", "two cats", "--model", str(models / "flux"), "--steps", "6", "--size", "32"]
    cache = ["--method", "taylorseer", "--taylorseer.real_steps", "[0,1,3]", "--taylorseer.payload=last"]
    ran = run(*words, *cache, "--sampler", "euler", "--out", str(tmp_path / "out"), "--json")
    assert ran.status == 0, ran.err
    record = ran.json
    assert [method["name"] for method in record["settings"]["methods"]] == ["taylorseer", "euler"]
    caches = record["cost"]["caches"]
    assert (caches["real_calls"], caches["skipped_calls"]) == (6, 6) and caches["real_steps"] == {"cond": [0, 1, 3]}
    assert 0 < caches["skipped_share_of_seconds"] < 1
    shown = run(*words, *cache, "--out", str(tmp_path / "alone")).out
    assert "by taylorseer: 6 steps" in shown and "6 of 12 network calls skipped" in shown


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--sampler", "spectrum"], "'spectrum' is no sampler: it works on the blocks. Pass --method spectrum"),
        (["--method", "euler"], "'euler' is a sampler: it replaces the loop. Pass --sampler euler."),
        (["--method", "spectrm"], "Did you mean 'spectrum'"),
        (["--spectrum.growth", "3"], "Pass --method spectrum, or leave the option out"),
    ],
)
def test_refusals_name_the_other_option(run, words, match):
    assert match in run("sample", "a cat", *words).err


def test_a_word_for_a_mix_of_methods():
    variant = parse("plain+spectrum:steps=28,growth=1.5")
    assert variant.methods == (Spectrum(growth=1.5),) and variant.call == {"steps": 28}
    mix = parse("euler+taylorseer:steps=28,taylorseer.real_steps=[0,1,5],euler.state=stock")
    assert mix.methods == (Euler(state="stock"), TaylorSeer(real_steps=(0, 1, 5)))
    assert parse(mix.name) == mix and parse(variant.name) == variant
    with pytest.raises(DiffAccelError, match="real_steps"):
        parse("taylorseer:real_steps=x")
