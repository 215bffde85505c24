"""The language of gates: what holds, what does not, and what is refused."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.gate import Clause, Joined, parse


def test_the_example() -> None:
    gate = parse("lpips>0.05 or clip_score<-0.3")
    assert gate.metrics == ("lpips", "clip_score")
    assert gate.condition == Joined("or", (Clause("lpips", ">", 0.05), Clause("clip_score", "<", -0.3)))
    failed, sentences = gate.check({"lpips": 0.061, "clip_score": -0.1, "ssim": None})
    assert failed and sentences == ["lpips is 0.061, above 0.05.", "clip_score is -0.1, not below -0.3."]
    failed, sentences = gate.check({"lpips": 0.05, "clip_score": -0.3})
    assert not failed and sentences == ["lpips is 0.05, not above 0.05.", "clip_score is -0.3, not below -0.3."]


@pytest.mark.parametrize(
    ("op", "holds"),
    [
        (">", [False, False, True]),
        (">=", [False, True, True]),
        ("<", [True, False, False]),
        ("<=", [True, True, False]),
    ],
)
def test_operators_at_and_beside_the_limit(op: str, holds: list[bool]) -> None:
    gate = parse(f"x{op}1e-1")
    assert [gate.check({"x": x})[0] for x in (math.nextafter(0.1, 0), 0.1, math.nextafter(0.1, 1))] == holds
    assert gate.check({"x": math.nextafter(0.1, 1)})[1][0].startswith("x is 0.1000000000000000")


def test_and_binds_tighter_than_or() -> None:
    texts = {
        "a>0 or b>0 and c>0": lambda a, b, c: a or (b and c),
        "a>0 and b>0 or c>0": lambda a, b, c: (a and b) or c,
        "(a>0 or b>0) and c>0": lambda a, b, c: (a or b) and c,
        "a>0 AND (b>0 OR ((c>0)))": lambda a, b, c: a and (b or c),
    }
    for text, truth in texts.items():
        for a, b, c in itertools.product((0, 1), repeat=3):
            assert parse(text).check({"a": a, "b": b, "c": c})[0] == bool(truth(a, b, c)), (text, a, b, c)


def test_random_conditions_agree_with_python() -> None:
    rng = random.Random(0)

    def condition(depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return (
                f"m{rng.randrange(4)}{rng.choice(['>', '>=', '<', '<='])}{rng.choice(['-1', '0', '+.5', '2e0', '1.'])}"
            )
        inner = f" {rng.choice(['and', 'or'])} ".join(condition(depth - 1) for _ in range(rng.randint(2, 3)))
        return f"({inner})" if rng.random() < 0.6 else inner

    refused = 0
    for _ in range(300):
        text = condition(3)
        values = {f"m{i}": rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]) for i in range(4)}
        try:
            parse(text)
        except DiffAccelError as error:  # a part that never holds
            part = compile(re.findall("asks for '(.*)', which no number is", str(error))[0], "part", "eval")
            tried = ({f"m{i}": rng.randrange(-12, 13) / 4 for i in range(4)} for _ in range(300))
            assert not any(eval(part, {}, numbers) for numbers in tried), text
            refused += 1
            continue
        assert parse(text).check(values)[0] == eval(text, {}, dict(values)), text  # text made here
    assert 10 < refused < 150


@pytest.mark.parametrize(
    "name", ["clip_score[ViT-L-14/openai]", "FD-tiny@1a2b3c4d", "a.b/c:d", "fd", "order", "android", "x[a b,c>2]"]
)
def test_names_of_metrics_may_carry_their_network(name: str) -> None:
    gate = parse(f"{name} < -1 and {name}>-3")
    assert gate.metrics == (name,) and gate.check({name: -2.0})[0] and not gate.check({name: -4})[0]


def test_a_metric_without_a_value_is_never_a_pass() -> None:
    gate = parse("lpips>0.05 or psnr<30")
    for nothing in (None, math.nan):
        with pytest.raises(DiffAccelError, match=r"'psnr' has no value, so 'lpips>0.05 or psnr<30' cannot be checked"):
            gate.check({"lpips": 1.0, "psnr": nothing})  # although lpips alone decides
    with pytest.raises(DiffAccelError, match=r"Unknown metric 'lpips'. Did you mean 'lpips-alex'"):
        gate.check({"lpips-alex": 1.0, "psnr": 2.0})
    assert gate.check({"lpips": 0.0, "psnr": math.inf}) == (
        False,
        ["lpips is 0, not above 0.05.", "psnr is inf, not below 30."],
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wants a metric at character 1, got the end"),
        ("lpips", "wants one of >, >=, <, <= at character 6, got the end"),
        ("lpips=0.05", "wants one of >, >=, <, <= at character 6, got '=0.05'"),
        ("lpips >", "wants a number at character 8, got the end"),
        ("lpips > high", "wants a number at character 9, got 'high'"),
        ("lpips > inf", "wants a number"),
        ("lpips > 1.2.3", "wants a number at character 9, got '1.2.3'"),
        ("lpips > 5dB", "wants a number"),
        ("lpips>1 ssim<2", "wants 'and', 'or' or the end at character 9, got 'ssim'"),
        ("lpips>1 or", "wants a metric at character 11, got the end"),
        ("(lpips>1", r"wants '\)' at character 9, got the end"),
        ("lpips>1)", r"wants 'and', 'or' or the end at character 8, got '\)'"),
        ("or>1", "wants a metric at character 1, got 'or'"),
        ("1>lpips", "wants a metric at character 1, got '1'"),
        ("__import__('os')>1", "wants one of >"),
    ],
)  # fmt: skip
def test_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(DiffAccelError, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["", " ", "x<1e400", "x<-1e999 or y>0"])
def test_a_gate_that_could_never_fail_is_refused(text: str) -> None:
    with pytest.raises(DiffAccelError, match="wants a"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ssim<0.9 and ssim>0.95", "ssim<0.9 and ssim>0.95"),
        ("lpips>1 or (ssim<1 and ssim>=1)", "ssim<1 and ssim>=1"),
        ("(a>1 or a>2) and b>0 and a<=1", "(a>1 or a>2) and b>0 and a<=1"),
    ],
)
def test_clauses_that_never_hold_together_are_refused(text: str, part: str) -> None:
    """A build that such a gate guards would never fail."""
    with pytest.raises(DiffAccelError) as error:
        parse(text)
    assert f"'{part}', which no number is" in str(error.value)
    for held in ("ssim>=1 and ssim<=1", "ssim<0.9 and ssim>0.5", "(a>1 or b<0) and a<0"):
        parse(held)


def test_a_gate_says_why_a_number_is_missing_and_what_is_a_difference() -> None:
    gate = parse("fd>3 or nfe>3")
    with pytest.raises(DiffAccelError, match=r"'fd' has no value \(too few pictures\)"):
        gate.check({"fd": None, "nfe": 1.0}, reasons={"fd": "too few pictures"})
    said = gate.check({"fd": 1.0, "nfe": -2.0}, differences={"nfe"})[1]
    assert said == ["fd is 1, not above 3.", "nfe, less the baseline's, is -2, not above 3."]
