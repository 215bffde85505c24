"""Presets: read, checked, applied by ``accelerate``, switched by ``set_quality``, taken off to the bit."""

from __future__ import annotations

import copy
import json
import sys
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch

import diffaccel
from diffaccel import compose, presets
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.runs.request import Request

NAN = float("nan")
CALL = {"prompt": "a cat", "height": 32, "width": 32, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


@pytest.fixture
def values(pipe):
    return {
        "default": "fast",
        "architecture": presets.architecture(pipe),
        "points": {
            "fast": {"methods": [{"name": "dpmpp2m"}], "call": {"steps": 2}, "certificate": {"sentence": "fast"}},
            "balanced": {"methods": [{"name": "euler", "state": "stock"}], "call": {"steps": 3}},
            "baseline": {"methods": [], "call": {"steps": 4}},
        },
    }


@pytest.fixture
def file(tmp_path, values):
    presets.write(tmp_path / "preset.json", values)
    return tmp_path / "preset.json"


@pytest.fixture(autouse=True)
def plain(pipe):
    yield
    diffaccel.remove(pipe)


def drawn(pipe, **changes):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **changes}).images


@pytest.mark.parametrize("name", [None, 3])
def test_a_quality_is_a_name(pipe, file, name):
    """None was the default point, without a word."""
    diffaccel.accelerate(pipe, str(file))
    with pytest.raises(DiffAccelError, match=f"set_quality got {name}; give the name of a point"):
        diffaccel.set_quality(pipe, name)


@pytest.mark.slow
def test_its_methods_and_steps_are_a_call_s_own(pipe, file):
    stock = {steps: drawn(pipe, num_inference_steps=steps) for steps in (2, 3, 4)}
    expected = drawn(diffaccel.accelerate(pipe, "dpmpp2m"), num_inference_steps=2)
    stock_class = type(diffaccel.remove(pipe))
    assert diffaccel.accelerate(pipe, str(file)) is pipe
    assert torch.equal(drawn(pipe), expected)
    assert diffaccel.summary(pipe).preset == {"source": str(file), "quality": "fast", "call": {"steps": 2}}
    assert "fast of" in str(diffaccel.summary(pipe))
    diffaccel.set_quality(pipe, "balanced")
    assert torch.equal(drawn(pipe), stock[3])
    assert torch.equal(drawn(pipe, num_inference_steps=2), stock[2])  # what a caller says stands
    diffaccel.set_quality(pipe, "baseline")
    assert diffaccel.summary(pipe).methods == [] and torch.equal(drawn(pipe), stock[4])
    assert torch.equal(pipe("a cat", None, None, None, 1.0, 32, 32, 2, **{
        "generator": torch.Generator().manual_seed(0), "output_type": "latent"}).images, stock[2])  # fmt: skip
    diffaccel.set_quality(pipe, "fast")
    assert torch.equal(drawn(pipe), expected)
    diffaccel.remove(pipe)
    assert type(pipe) is stock_class and torch.equal(drawn(pipe, num_inference_steps=4), stock[4])


def test_a_preset_without_a_loop_beside_a_sampler_that_comes_later(pipe, file, values):
    values["default"] = "baseline"
    presets.write(file, values)
    stock_class = type(pipe)
    diffaccel.accelerate(pipe, file)
    own = type(pipe)
    diffaccel.accelerate(pipe, "dpmpp2m")
    assert type(pipe) is own is not stock_class
    expected = drawn(pipe, num_inference_steps=4)
    assert torch.equal(drawn(pipe), expected)
    with pytest.raises(DiffAccelError, match="both replace the sampling loop"):
        diffaccel.set_quality(pipe, "balanced")
    assert torch.equal(drawn(pipe), expected)  # nothing half-done
    assert type(diffaccel.remove(pipe)) is stock_class


def test_a_call_keeps_the_point_that_it_began_with(pipe, file):
    """A switch from another thread waits for the call, and the next call has the new point."""
    diffaccel.accelerate(pipe, file)
    expected = drawn(pipe)
    steps = []
    switched = threading.Thread(target=diffaccel.set_quality, args=(pipe, "balanced"))

    def callback(pipe, i, t, tensors):
        steps.append(i)
        if i == 0:
            switched.start()
            switched.join(0.2)
            assert switched.is_alive() and compose.active(pipe).point.name == "fast"
        return tensors

    assert torch.equal(drawn(pipe, callback_on_step_end=callback), expected) and steps == [0, 1]
    switched.join()
    assert compose.active(pipe).point.name == "balanced"
    counted = []
    drawn(pipe, callback_on_step_end=lambda pipe, i, t, tensors: counted.append(i) or tensors)
    assert counted == [0, 1, 2]


def test_a_switch_inside_a_call_is_refused(pipe, file):
    diffaccel.accelerate(pipe, file)
    expected, said = drawn(pipe), []

    def callback(pipe, i, t, tensors):
        with pytest.raises(DiffAccelError, match="inside a running call of FluxPipeline") as caught:
            diffaccel.set_quality(pipe, "baseline")
        said.append(caught.value)
        return tensors

    for name in ("fast", "baseline"):  # a call in our loop, and the stock call with the preset's steps
        diffaccel.set_quality(pipe, name)
        result = drawn(pipe, callback_on_step_end=callback)
        assert said and compose.active(pipe).point.name == name
        assert torch.equal(result, expected) == (name == "fast")
        said.clear()


def test_a_comparison_of_an_open_pipeline_has_its_preset_s_steps(pipe, file, tmp_path):
    """And the pipeline has its preset again after another candidate was drawn on it without."""
    from diffaccel.eval.sets.candidates import candidate

    diffaccel.accelerate(pipe, file)
    request = Request(prompts=("a cat",), model="tiny", size=(32, 32), device="cpu", batch=1)
    preset = candidate(pipe)
    assert preset.name == "dpmpp2m-steps=2"
    run = preset.draw(request, tmp_path / "preset")
    assert run.record["settings"]["steps"] == 2 and run.record["cost"]["nfe"] == 2
    plain = candidate("plain:steps=3", host=pipe).draw(request, tmp_path / "plain")
    assert plain.record["cost"]["nfe"] == 3
    assert diffaccel.summary(pipe).preset["quality"] == "fast"
    diffaccel.set_quality(pipe, "balanced")
    candidate("plain:steps=3", host=pipe).draw(request, tmp_path / "plain2")
    assert diffaccel.summary(pipe).preset["quality"] == "balanced"
    assert candidate(pipe).draw(request, tmp_path / "balanced").record["cost"]["nfe"] == 3


@dataclass(frozen=True, kw_only=True)
class Tint(Config):
    """Adds a number to what a network predicts."""

    name: ClassVar[str] = "tint"
    touches: ClassVar[Any] = "blocks"
    amount: float = 1.0

    def apply(self, pipe):
        if self.amount < 0:
            raise DiffAccelError("a negative tint")
        applied.append(self)
        return pipe.transformer.register_forward_hook(lambda module, args, out: (out[0] + self.amount,))


@dataclass(frozen=True, kw_only=True)
class Shade(Tint):
    """Another one."""

    name: ClassVar[str] = "shade"


@dataclass(frozen=True, kw_only=True)
class Halved(Tint):
    """One on the weights."""

    name: ClassVar[str] = "halved"
    touches: ClassVar[Any] = "weights"


applied: list[Any] = []


def test_a_switch_touches_what_differs_alone(pipe, values, tmp_path, monkeypatch):
    monkeypatch.setattr(presets.registry, "METHODS", {**presets.registry.METHODS, **{
        cls.name: f"{__name__}:{cls.__name__}" for cls in (Tint, Shade, Halved)}})  # fmt: skip
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Tint.__module__])
    configs = {"fast": [Shade(), Tint()], "balanced": [Shade(), Tint(amount=0.5)], "worse": [Shade(), Tint(amount=-1)]}
    configs |= {"baseline": [], "small": [Halved(), Shade(), Tint()]}
    values["points"] = {
        name: {"methods": [config.to_dict() for config in chosen], "call": {"steps": 2}}
        for name, chosen in configs.items()
    }
    presets.write(tmp_path / "p.json", values)
    stock = drawn(pipe, num_inference_steps=2)
    expected = {}
    for name in ("fast", "balanced"):
        expected[name] = drawn(diffaccel.accelerate(pipe, *configs[name]), num_inference_steps=2)
        diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, tmp_path / "p.json")
    applied.clear()
    for name in ("balanced", "fast"):
        diffaccel.set_quality(pipe, name)
        assert torch.equal(drawn(pipe), expected[name])
    assert applied == [Tint(amount=0.5), Tint()]  # and never Shade
    with pytest.raises(DiffAccelError, match="a negative tint"):
        diffaccel.set_quality(pipe, "worse")
    with pytest.raises(DiffAccelError, match="'fast' and 'small' differ in 'halved', which changes weights"):
        diffaccel.set_quality(pipe, "small")
    assert torch.equal(drawn(pipe), expected["fast"]) and compose.active(pipe).point.name == "fast"
    diffaccel.set_quality(pipe, "baseline")
    assert torch.equal(drawn(pipe), stock)
    diffaccel.remove(pipe)
    assert not pipe.transformer._forward_hooks and compose.active(pipe) is None


def test_copies_have_the_preset_too(pipe, file):
    diffaccel.accelerate(pipe, file)
    expected = drawn(pipe)
    for twin in (copy.copy(pipe), copy.deepcopy(pipe)):
        assert torch.equal(drawn(twin), expected)
        diffaccel.set_quality(twin, "baseline")
        assert compose.active(pipe).point.name == "fast"
        diffaccel.remove(twin)
    assert torch.equal(drawn(pipe), expected)


def point(method, **options):
    return {"fast": {"methods": [{"name": method, **options}], "call": {}}}


def test_errors_say_what_is_wrong(pipe, file, values, tmp_path):
    def refused(match, **changes):
        text = {"kind": presets.KIND, "format": presets.FORMAT, **values, **changes}
        (tmp_path / "bad.json").write_text(json.dumps(text))
        with pytest.raises(DiffAccelError, match=match):
            diffaccel.accelerate(pipe, str(tmp_path / "bad.json"))
        assert compose.active(pipe) is None

    refused("has format 2, and this diffaccel reads up to 1. Update diffaccel", format=2)
    refused("is no preset of diffaccel", kind="other")
    refused("is damaged: default is missing", default="none")
    refused("is damaged: points.fast.methods", points={"fast": {"call": {}}})
    other = {"fast": {"methods": [{"name": "dpmpp3m"}], "call": {}}}
    refused("The point 'fast' .* uses 'dpmpp3m', .* Did you mean 'dpmpp2m'", points=other)
    other = {"fast": {"methods": [{"name": "euler", "stat": "stock"}], "call": {}}}
    refused("uses 'euler', which does not fit .* 'stat'", points=other)
    refused("uses 'euler', .* Euler.state is nan; .* Correct the file, or install", points=point("euler", state=NAN))
    refused("has 'euler' twice. Keep one", points={"fast": {"methods": [{"name": "euler"}] * 2, "call": {}}})
    refused("has steps 0; it must be 1 or more", points={"fast": {"methods": [], "call": {"steps": 0}}})
    for steps in (10**400, NAN, True, "4", -1, 2.5, None):  # the first one is more than any float
        refused(r"is damaged: points\.fast\.call\.steps", points={"fast": {"methods": [], "call": {"steps": steps}}})
    for part, certificate in (("", 7), ("", "x"), (".settings", "x"), (".settings.size", ["a"])):
        keys = certificate if not part else {"settings": certificate if part == ".settings" else {"size": certificate}}
        wrong = {"fast": {"methods": [], "call": {}, "certificate": keys}}
        refused(r"is damaged: points\.fast\.certificate is missing or no such value", points=wrong)
    refused("is damaged: format", format=0)
    refused(r"has format 100.* more characters\) .*000, and this diffaccel reads up to 1", format=10**400)
    refused("Unknown call setting .* 'step'", points={"fast": {"methods": [], "call": {"step": 3}}})
    architecture = json.loads(json.dumps(values["architecture"]))
    architecture["networks"][0]["config"]["num_layers"] = 19
    refused("another architecture: num_layers is 19 in its FluxTransformer2DModel, and", architecture=architecture)
    refused(
        "FluxImg2ImgPipeline, and this is FluxPipeline",
        architecture={**architecture, "pipeline": "FluxImg2ImgPipeline"},
    )
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DiffAccelError, match="cannot be read"):
        presets.read(tmp_path / "bad.json")
    whole = file.read_text()
    for text in (*(whole[:end] for end in range(0, len(whole) - 2, 97)), "[" * 100_000, "9" * 5000, "\ufeff" + whole):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        with pytest.raises(DiffAccelError, match=r"^The preset '.*bad\.json' cannot be read \(.*\)\. Make it again\.$"):
            diffaccel.accelerate(pipe, str(tmp_path / "bad.json"))
        assert compose.active(pipe) is None
    with pytest.raises(DiffAccelError, match=r"There is no preset 'none\.json'. Make one with diffaccel tune"):
        diffaccel.accelerate(pipe, "none.json")
    with pytest.raises(DiffAccelError, match="The pipeline has no preset"):
        diffaccel.set_quality(pipe, "fast")
    diffaccel.accelerate(pipe, file)
    with pytest.raises(DiffAccelError, match=r"Unknown quality .* 'blanced'\. Did you mean 'balanced'"):
        diffaccel.set_quality(pipe, "blanced")
    with pytest.raises(DiffAccelError, match=r"is already active\. Switch with diffaccel\.set_quality"):
        diffaccel.accelerate(pipe, file)


def test_sample_takes_the_point_s_methods_and_steps(pipe, file, tmp_path):
    from diffaccel.cli import main
    from diffaccel.cli.sample import make_parser, note_of_other_settings, preset_point

    model = tmp_path / "model"
    pipe.save_pretrained(model)
    words = ["a cat", "--model", str(model), "--preset", str(file)]
    assert preset_point(make_parser().parse(words)).call == {"steps": 2}
    point = preset_point(make_parser().parse([*words, "--quality", "balanced"]))
    assert point.methods[0].name == "euler"
    assert main(["sample", *words, "--quality", "balanced", "--size", "32", "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["steps"] == 3 and settings["methods"] == [point.methods[0].to_dict()]
    measured = presets.PresetPoint("fast", (), {"steps": 3}, {"settings": {"size": [64, 32], "guidance": None}})
    assert note_of_other_settings(measured, Request(prompts=("a",), steps=3, size=(64, 32))) == ""
    note = note_of_other_settings(measured, Request(prompts=("a",), steps=3, size=(32, 32)))
    assert "'fast' was measured with size 32x64, and this run has 32x32" in note
    for wrong, match in ((["--sampler", "euler"], "Leave one of them out"), (["--quality", "x"], "Unknown quality")):
        with pytest.raises(DiffAccelError, match=match):
            preset_point(make_parser().parse([*words, *wrong]))
    with pytest.raises(DiffAccelError, match="Pass --preset FILE"):
        preset_point(make_parser().parse(["a cat", "--quality", "fast"]))
    with pytest.raises(DiffAccelError, match="measured on another architecture"):
        preset_point(make_parser().parse(["a cat", "--preset", str(file)]))  # emoji-flux
