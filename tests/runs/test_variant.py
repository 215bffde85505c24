"""Variants: one word for methods and settings, read back from its own name."""

from __future__ import annotations

import json

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.runs import variant as variants
from diffaccel.runs.request import Request
from diffaccel.samplers import DPMpp2M, Euler


@pytest.mark.parametrize("text", ["plain", "plain:steps=8", "dpmpp2m:steps=8", "euler:steps=4,size=64x32,state=stock"])
def test_a_name_is_read_back(text):
    variant = variants.parse(text)
    assert variant.name == text and variants.parse(variant.name) == variant
    assert set(variant.folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789=.-+_")


def test_it_changes_a_request():
    request = variants.parse("euler:steps=4,size=64x32,guidance=2,state=stock").of(Request(prompts=("a",), steps=9))
    assert request.methods == (Euler(state="stock"),)
    assert (request.steps, request.size, request.guidance, request.prompts) == (4, (32, 64), 2.0, ("a",))


def test_files(tmp_path):
    (tmp_path / "a.yaml").write_text("- {name: dpmpp2m}\n")
    (tmp_path / "b.json").write_text(json.dumps({"methods": ["euler"], "steps": 3}))
    assert variants.parse(str(tmp_path / "a.yaml")).methods == (DPMpp2M(),)
    assert variants.parse(str(tmp_path / "b.json")).name == "euler:steps=3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dpmpp2:steps=3", "Did you mean 'dpmpp2m'"),
        ("plain:stesp=3", "Did you mean 'steps'"),
        ("euler:stat=stock", "Did you mean 'state'"),
        ("plain:steps=few", "must be a number"),
        ("euler:state=wrong", "must be one of"),
        ("plain:steps", "write key=value"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_said(text, said):
    with pytest.raises(DiffAccelError, match=said):
        variants.parse(text)


@pytest.mark.parametrize(
    ("content", "said"), [("3", "is no variant"), ("{step: 3}", "Did you mean 'steps'"), ("- {a: 1}", "must be a")]
)
def test_files_that_are_none(tmp_path, content, said):
    (tmp_path / "v.yaml").write_text(content)
    with pytest.raises(DiffAccelError, match=said):
        variants.parse(str(tmp_path / "v.yaml"))


@pytest.mark.parametrize("text", ["", " ", ":", ":steps=8"])
def test_no_method_is_not_the_plain_pipeline(text):
    """As ``--accel "$UNSET"`` of a shell gives."""
    with pytest.raises(DiffAccelError, match=r"names no method\. Write plain for the pipeline's own loop"):
        variants.parse(text)


@pytest.mark.parametrize("text", ["plain:size=64,size=32", "dpmpp2m:state=stock,dpmpp2m.state=float32"])
def test_a_setting_that_is_there_twice_is_refused(text):
    with pytest.raises(DiffAccelError, match=r"gives (size|dpmpp2m\.state) twice\. Keep one"):
        variants.parse(text)
