"""Requests and runs as a library: what a request means for each family, and how runs use an open pipeline."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from search_bed import latent_reward

import diffaccel
from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets.run import open_run
from diffaccel.families import network
from diffaccel.modules import Capture
from diffaccel.quant import W8A8
from diffaccel.runs import generate as sampling
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.cost import drawn_before, total_cost
from diffaccel.runs.failures import failures
from diffaccel.runs.folder import RunFailed
from diffaccel.runs.request import Request
from diffaccel.samplers import RBF, Ancestral, BoN, Euler, Heun
from diffaccel.samplers.search import engine, report


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny.make(family) for family in tiny.FAMILIES} | {"dev": tiny.make("flux", guidance_embeds=True)}


def guidance(pipe, **wanted):
    chosen = call_arguments(pipe, Request(prompts=("a",), model="mine", steps=2, **wanted))
    chosen.pop("num_inference_steps")
    return chosen


GUIDANCE = [
    ("flux", {}, {}),
    ("flux", {"guidance": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
    ("flux", {"guidance": 1.0}, {"true_cfg_scale": 1.0}),
    ("flux", {"guidance": 3.0, "negative": "dull"}, {"true_cfg_scale": 3.0, "negative_prompt": "dull"}),
    ("dev", {}, {}),
    ("dev", {"guidance": 3.0}, {"guidance_scale": 3.0}),
    ("sd3", {"guidance": 3.0, "negative": "dull"}, {"guidance_scale": 3.0, "negative_prompt": "dull"}),
    ("sdxl", {"guidance": 3.0}, {"guidance_scale": 3.0}),
    ("sd", {"negative": "dull"}, {"negative_prompt": "dull"}),
]


@pytest.mark.parametrize(("family", "wanted", "expected"), GUIDANCE)
def test_guidance_is_asked_for_as_the_family_wants_it(pipes, family, wanted, expected):
    assert guidance(pipes[family], **wanted) == expected


@pytest.mark.parametrize(("family", "wanted", "branches"), [(f, w, 2 if len(e) > 1 else 1) for f, w, e in GUIDANCE[:6]])
def test_guidance_has_the_effect_that_was_asked_for(pipes, family, wanted, branches, tmp_path):
    """The network sees both branches exactly when the request is guided by two."""
    request = Request(prompts=("a cat",), model="mine", steps=1, size=(32, 32), **wanted)
    cost = sampling.generate_run(request, tmp_path, pipe=pipes[family])["cost"]
    assert cost["forwards"] == branches * cost["nfe"] and cost["nfe"] == 1


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("dev", {"negative": "dull"}, "guidance embedded"),
        ("flux", {"negative": "dull"}, "no effect at guidance 1"),
        ("sd", {"guidance": 1.0, "negative": "dull"}, "no effect at guidance 1"),
        ("sd", {"size": (36, 32)}, "size 32x36"),
        ("sd3", {"size": (40, 40)}, "multiples of 16"),
    ],
)
def test_what_a_family_cannot_do(pipes, family, wanted, message):
    with pytest.raises(DiffAccelError, match=message):
        call_arguments(pipes[family], Request(prompts=("a",), model="mine", **wanted))


def test_a_pipeline_without_guidance(pipes):
    class Plain:
        def __call__(self, prompt, num_inference_steps=5, generator=None):
            raise NotImplementedError

    assert call_arguments(Plain(), Request(prompts=("a",), model="mine")) == {"num_inference_steps": 5}
    with pytest.raises(DiffAccelError, match="Plain takes no guidance"):
        call_arguments(Plain(), Request(prompts=("a",), model="mine", guidance=3.0))


def test_items_are_prompt_by_prompt_with_their_own_seeds():
    request = Request(prompts=("a", "b"), num=2, seed=5, batch=3)
    assert [(i.id, i.prompt, i.seed) for i in request.items()] == [(0, "a", 5), (1, "a", 6), (2, "b", 7), (3, "b", 8)]
    assert [[i.id for i in chunk] for chunk in request.chunks()] == [[0, 1, 2], [3]]


def test_a_bare_text_is_no_tuple_of_prompts():
    with pytest.raises(DiffAccelError, match="must be a tuple"):
        Request(prompts="a cat")


def test_a_zoo_card_gives_defaults_that_a_request_overrides(pipes, monkeypatch):
    defaults = {"height": 48, "width": 32, "num_inference_steps": 6, "true_cfg_scale": 3.0, "max_sequence_length": 24}
    monkeypatch.setattr(zoo, "names", lambda: ["tiny-flux"])
    monkeypatch.setattr(zoo, "card", lambda name: {"defaults": {**defaults, "negative_prompt": ""}})
    request = Request(prompts=("a",), model="tiny-flux").with_model_defaults()
    expected = {**defaults, "negative_prompt": ""}
    assert call_arguments(pipes["flux"], request) == expected
    request = Request(prompts=("a",), model="tiny-flux", steps=2, size=(32, 32), guidance=1.0).with_model_defaults()
    changed = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 1.0, "max_sequence_length": 24}
    assert call_arguments(pipes["flux"], request) == changed


def test_an_open_pipeline_is_used_as_it_is(pipes, tmp_path):
    """Its methods go into the settings, so that one folder cannot hold two methods' images."""
    pipe = pipes["flux"]
    request = Request(prompts=("a cat",), model="mine", steps=2, size=(32, 32))
    plain = sampling.generate_run(request, tmp_path / "plain", pipe=pipe)
    diffaccel.accelerate(pipe, Heun())
    try:
        heun = sampling.generate_run(request, tmp_path / "heun", pipe=pipe)
        with pytest.raises(DiffAccelError, match="methods"):
            sampling.generate_run(request, tmp_path / "plain", pipe=pipe)
    finally:
        diffaccel.remove(pipe)
    assert plain["settings"]["methods"] == [] and heun["settings"]["methods"] == [Heun().to_dict()]
    assert plain["settings"]["model"] == "mine" and (plain["cost"]["nfe"], heun["cost"]["nfe"]) == (2, 3)


def test_a_run_of_a_search_leaves_its_folder_off_the_pipeline(pipes, tmp_path):
    """The traces of a run lie in its folder; a later call of the caller's own leaves no file there."""
    pipe = diffaccel.accelerate(pipes["sd3"], BoN(reward="compress", budget=4))
    try:
        sampling.generate_run(
            Request(prompts=("a cat",), model="mine", steps=2, size=(32, 32), threads=1), tmp_path / "run", pipe=pipe
        )
        before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
        assert any("search" in file.parts for file in before)
        assert "noise_sha256" not in json.loads((tmp_path / "run/run.json").read_text())["images"][0], "one of many"
        pipe("two cats", num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(5))
    finally:
        diffaccel.remove(pipe)
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before


def test_a_finished_search_is_known_by_all_its_files(pipes, tmp_path, monkeypatch):
    """One that is changed or gone is made anew, never gone on from; eval refuses a changed one as it does a picture."""
    monkeypatch.setattr(report, "plot", lambda values, file: file.write(b"plot 0"))
    request = Request(prompts=("a cat",), model="mine", steps=2, size=(32, 32), threads=1)
    pipe = diffaccel.accelerate(pipes["sd3"], BoN(reward="compress", budget=2))
    try:
        sampling.generate_run(request, tmp_path, pipe=pipe)
        files = {file: file.read_bytes() for file in (tmp_path / "search/00000").iterdir() if file.name != ".lock"}
        assert {"rewards.jsonl", "latents.safetensors", "trace.json"} < {file.name for file in files}
        assert sampling.generate_run(request, tmp_path, pipe=pipe)["drawn"] == 0
        for file, data in files.items():
            file.write_bytes(data.replace(b"0", b"1"))
        with pytest.raises(DiffAccelError, match=r"search/00000/.*' has been changed since its run wrote it"):
            open_run(tmp_path)
        (tmp_path / "search/00000/trace.json").unlink()
        assert sampling.generate_run(request, tmp_path, pipe=pipe)["drawn"] == 1
        assert {file: file.read_bytes() for file in files} == files and open_run(tmp_path)
        old = json.loads((tmp_path / "run.json").read_text())
        del old["chunks"][0]["side_files"]  # a record of an earlier version lists none
        (tmp_path / "run.json").write_text(json.dumps(old))
        (tmp_path / "search/00000/trace.json").unlink()
        assert sampling.generate_run(request, tmp_path, pipe=pipe)["drawn"] == 0 and open_run(tmp_path)
    finally:
        diffaccel.remove(pipe)


@pytest.mark.parametrize("config", [Euler(), Ancestral()], ids=lambda config: config.name)
def test_rows_of_a_batch_do_not_depend_on_each_other(pipes, tmp_path, config):
    """A row differs from the same image alone by rounding, never by its neighbours' prompts or seeds."""
    pipe = diffaccel.accelerate(pipes["sd3"], config)
    try:
        images = []
        for other in ("two cats", "a red apple"):
            request = Request(prompts=("a house", other), model="mine", steps=2, size=(32, 32), batch=2, threads=1)
            images.append(sampling.generate_run(request, tmp_path / other, pipe=pipe)["images"])
    finally:
        diffaccel.remove(pipe)
    assert images[0][0]["pixels_sha256"] == images[1][0]["pixels_sha256"]
    assert images[0][1]["pixels_sha256"] != images[1][1]["pixels_sha256"]


def test_threads_are_put_back(pipes, tmp_path):
    before = torch.get_num_threads()
    request = Request(prompts=("a cat",), model="mine", steps=1, size=(32, 32), threads=before + 1)
    made = sampling.generate_run(request, tmp_path, pipe=pipes["flux"])
    assert made["settings"]["threads"] == before + 1 and torch.get_num_threads() == before


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(pipes, tmp_path):
    """Ctrl-C in the third call, and the next run makes that chunk and no other."""
    pipe, calls = pipes["flux"], []

    def press(module, args):
        calls.append(module)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    request = Request(prompts=("a cat",), model="mine", num=4, steps=1, size=(32, 32), threads=1)
    hook = pipe.transformer.register_forward_pre_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt, match="same command continues"):
            sampling.generate_run(request, tmp_path / "run", pipe=pipe)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "running"
        continued = sampling.generate_run(request, tmp_path / "run", pipe=pipe)
    finally:
        hook.remove()
    assert len(calls) == 3 + 2
    assert continued["images"] == sampling.generate_run(request, tmp_path / "whole", pipe=pipe)["images"]


@pytest.mark.slow
def test_the_cost_of_a_search_that_goes_on_says_what_was_made_before(pipes, tmp_path, monkeypatch):
    """NFE are those of the whole search; the rest is of the process that ended it, and the summary says so."""
    monkeypatch.setattr(engine, "STORING_SHARE", math.inf)
    calls, limit = [], math.inf

    def total(x0):
        calls.append(len(x0))
        if len(calls) == limit:
            raise KeyboardInterrupt
        return x0.flatten(1).sum(1)

    request = Request(prompts=("a cat",), model="mine", steps=2, size=(32, 32), threads=1)
    reward = latent_reward(total, identity="the sum")
    pipe = diffaccel.accelerate(pipes["sd3"], RBF(reward=reward, budget=40, initial=2))
    try:
        whole = sampling.generate_run(request, tmp_path / "whole", pipe=pipe)
        limit = 2 * len(calls) - 1  # the last but one of its calls
        with pytest.raises(KeyboardInterrupt):
            sampling.generate_run(request, tmp_path / "parts", pipe=pipe)
        ended = sampling.generate_run(request, tmp_path / "parts", pipe=pipe)
    finally:
        diffaccel.remove(pipe)
    assert ended["images"] == whole["images"]
    before = ended["cost"]["resumed"]["nfe"]
    assert before > 0 and "resumed" not in whole["cost"]
    assert ended["cost"]["nfe"] == whole["cost"]["nfe"]
    assert ended["cost"]["forwards"] == whole["cost"]["forwards"] - 2 * before
    assert drawn_before(whole, "image") == ""
    assert f"stopped after {before} of these NFE" in drawn_before(ended, "image")
    assert total_cost([whole["cost"], ended["cost"], ended["cost"]])["resumed"] == {"nfe": 2 * before}


def test_a_run_in_parts_is_the_run(pipes, tmp_path):
    request = Request(prompts=("a cat",), model="mine", num=5, batch=2, steps=1, size=(32, 32), threads=1)
    states = []
    for _ in range(3):
        record = sampling.generate_run(request, tmp_path / "parts", pipe=pipes["flux"], stop_after=1)
        states.append((record["state"], len(list((tmp_path / "parts").glob("*.png")))))
    assert states == [("running", 2), ("running", 4), ("finished", 5)]
    whole = sampling.generate_run(request, tmp_path / "whole", pipe=pipes["flux"])
    assert record["images"] == whole["images"]


def test_the_network_of_a_pipeline(pipes):
    assert network(pipes["sd"]) is pipes["sd"].unet
    assert network(pipes["flux"]) is pipes["flux"].transformer
    assert network(object()) is None


def test_graphs_are_recorded_of_weights_that_are_in_place(monkeypatch, tmp_path):
    """Other methods change the weights before they are moved, which a quantized network makes cheaper."""
    done = []

    class Pipe:
        def to(self, device):
            done.append(device.type)
            return self

    for check in ("check_settings", "check_subjects"):
        monkeypatch.setattr(loading, check, lambda pipe, request: None)
    monkeypatch.setattr(loading, "read_whole", lambda *place: Pipe())
    monkeypatch.setattr(
        loading, "accelerate", lambda pipe, *configs: done.append([config.name for config in configs]) or pipe
    )
    request = Request(prompts=("a",), model="mine", methods=(Capture(), W8A8()))
    loading.open_pipeline(request, tmp_path, torch.device("meta"), torch.float32)
    assert done == [["w8a8"], "meta", ["capture"]]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_for_what_a_method_writes_is_one_sentence(tmp_path: Path, code: int) -> None:
    """A search writes its trace in the middle of a call, where a full disk is no fault of the call."""
    folder: Any = SimpleNamespace(path=tmp_path)
    with pytest.raises(RunFailed, match=rf"^'{tmp_path}' cannot be written \(.*\)\. Make room\. Finished images stay"):
        with failures(Request(prompts=("a",)), folder):
            raise OSError(code, os.strerror(code))


def test_a_stop_before_the_first_image_does_not_say_that_images_stay(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path, rf"Stopped\. Finished images stay in '{tmp_path}'"),
        (tmp_path / "none", r"Stopped\.$"),
    ):
        folder: Any = SimpleNamespace(path=path)
        with pytest.raises(KeyboardInterrupt, match=text), failures(Request(prompts=("a",)), folder):
            raise KeyboardInterrupt
