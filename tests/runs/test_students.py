"""A distilled student makes its own number of steps, and that is the number in the run's record."""

from __future__ import annotations

import logging

import pytest
import tiny
from PIL import Image

from diffaccel.distill.scheduler import SIMFewStepScheduler, SIMOneStepScheduler
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request


@pytest.fixture
def student():
    pipe = tiny.make("flux")
    pipe.scheduler = SIMFewStepScheduler()
    return pipe


def ask(model, steps):
    size = tiny.call_kwargs("flux")["height"]
    return Request(prompts=("a cat",), model=str(model), steps=steps, size=(size, size), device="cpu")


def test_the_record_of_a_folder_says_what_was_made(student, tmp_path, caplog):
    student.save_pretrained(tmp_path / "student")
    with caplog.at_level(logging.WARNING):
        run = generate_run(ask(tmp_path / "student", 7), tmp_path / "seven")
    assert run["settings"]["steps"] == run["call"]["num_inference_steps"] == run["cost"]["nfe"] == 2
    (told,) = [message for message in caplog.messages if "distilled student" in message]
    assert "of 2 steps: steps=7 is not followed, and the record says 2" in told
    assert Image.open(tmp_path / "seven" / "00000.png").text["diffaccel"].count('"steps": 2')
    caplog.clear()
    again = generate_run(ask(tmp_path / "student", 2), tmp_path / "seven")  # the same run
    assert again["drawn"] == 0 and not [message for message in caplog.messages if "distilled student" in message]


@pytest.mark.parametrize("asked", [None, 1, 3])
def test_the_record_of_an_open_student_says_what_was_made(student, tmp_path, asked, caplog):
    student.scheduler = SIMOneStepScheduler()
    run = generate_run(ask("mine", asked), tmp_path / "drawn", pipe=student)
    assert run["call"]["num_inference_steps"] == run["cost"]["nfe"] == 1
    assert run["settings"]["steps"] == (None if asked is None else 1)
    assert any("of 1 step: steps=3" in message for message in caplog.messages) == (asked == 3)
