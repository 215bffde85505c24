"""``diffaccel list`` and ``diffaccel explain``: they tell what the registry and the zoo hold, and load little."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import mixdq_bed
import pytest

from diffaccel import registry, zoo
from diffaccel.cli import listing
from diffaccel.cli.docstrings import documented_arguments
from diffaccel.config import Machine
from diffaccel.modules.capture.graphs import BACKENDS
from tests.layout import tree
from tests.support.replayed_calls import ReplayedCalls

CARD = {
    "title": "A tiny text-to-image pipeline",
    "state": "interim",
    "pipeline": "FluxPipeline",
    "defaults": {"num_inference_steps": 3},
    "quality": {"top1": 0.5, "notes": ["coarse", {"seen": True}]},
}


@pytest.fixture
def embedded(monkeypatch, tmp_path):
    """One zoo model with a card and a packed file."""
    folder = tmp_path / "tiny-flux"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "weights").write_bytes(b"x" * 2_000_000)
    (folder / "card.json").write_text(json.dumps(CARD))
    monkeypatch.setattr(zoo, "_ROOT", tmp_path)
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))


@pytest.mark.slow
def test_list_names_every_method_and_model(run, embedded):
    found = run("list", "--json").json
    kinds = {m["name"]: m["kind"] for m in found["methods"]}
    assert {name: kinds.pop(name) for name in registry.TRAINERS} == dict.fromkeys(registry.TRAINERS, "distillation")
    assert kinds.pop("nfd") == "sampler"  # of world models, whose pipeline it lets draft
    assert kinds.pop("fused_blocks") == "module"  # leaves every picture as it is
    assert kinds == {
        name: {"loop": "sampler", "blocks": "cache", "weights": "quantizer", "graphs": "module"}[
            registry.config_class(name).touches
        ]
        for name in registry.METHODS
        if name not in ("nfd", "fused_blocks")
    }
    for method in found["methods"]:
        if method["name"] in registry.TRAINERS:
            continue
        assert method["summary"] and method["paper"] == registry.config_class(method["name"]).citation
    size = 2_000_000 + len("{}") + len(json.dumps(CARD))
    assert found["models"] == [{"name": "tiny-flux", "bytes": size, "state": "interim", "summary": CARD["title"]}]
    shown = run("list").out
    assert all(name in shown for name in (*registry.METHODS, "tiny-flux", "2.0 MB", "interim"))


def test_explain_a_method_that_makes_a_model(run):
    about = run("explain", "sim", "--json").json
    assert about["kind"] == "distillation" and "arXiv 2410.16794" in about["paper"]
    assert {option["name"] for option in about["options"]} >= {"steps", "alpha", "assistant_momentum"}
    assert "--sim.steps" in run("explain", "sim").out
    about = run("explain", "tscd", "--json").json
    known = {option["name"]: option["help"] for option in about["options"]}
    assert {"segments", "grid", "target_decay", "lr", "noise_ratio"} <= known.keys() and all(known.values())
    assert "2404.13686" in about["paper"] and about["command"] == "diffaccel distill MODEL --method tscd"


def test_list_knows_plugins_without_running_them(run, monkeypatch, tmp_path):
    package = tmp_path / "planted_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "method.py").write_text('"""Draws faster. Really."""\nclass M:\n    citation: str = "P, arXiv 1"\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "names", lambda: {"fast": "planted_plugin.method:M", "gone": "nowhere.at_all:M"})
    methods = run("list", "--json").json["methods"]
    assert methods[0] == {"name": "fast", "kind": "plugin", "summary": "Draws faster", "paper": "P, arXiv 1"}
    assert methods[1]["summary"] == "(not importable)"


@pytest.mark.parametrize("name", registry.METHODS)
def test_explain_a_method(run, name):
    about = run("explain", name, "--json").json
    cls = registry.config_class(name)
    assert about["paper"] == cls.citation and about["touches"] == cls.touches and about["description"]
    assert "Args:" not in about["description"]
    assert [o["name"] for o in about["options"]] == [f.name for f in dataclasses.fields(cls)]
    assert all(o["help"] and o["type"] and o["default"] for o in about["options"])
    shown = run("explain", name).out
    field, option = (".state", "sampler") if cls.touches == "loop" else (".", "method")
    options = (f"--{name}{field}", f"--{option} {name}") if not cls.command else (cls.command,)
    assert all(part in shown for part in options) and "arXiv" in shown


@pytest.mark.slow
def test_explained_python_runs(models, monkeypatch, tmp_path):
    import diffaccel

    shutil.copyfile(mixdq_bed.uniform("flux").plan, tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    pipe = diffaccel.load(models / "flux")
    monkeypatch.setitem(BACKENDS, "cpu", ReplayedCalls)
    for name in registry.METHODS:
        if registry.config_class(name).support(Machine(device="cpu"))[0] == "unsupported":
            continue  # its package is not installed
        if name in ("nfd", "rolling_context"):
            continue  # for world models, and for videos drawn chunk by chunk: tests/samplers
        about = listing.explain_method(name)
        namespace = {"diffaccel": diffaccel, "pipe": pipe}
        exec(f"{about['import']}\n{about['python']}", namespace)
        assert diffaccel.summary(pipe).methods[0]["name"] == name
        diffaccel.remove(pipe)


def test_explain_a_model(run, embedded):
    assert run("explain", "tiny-flux", "--json").json["card"] == CARD
    shown = run("explain", "tiny-flux").out
    assert "State: interim" in shown and CARD["title"] in shown and "--model tiny-flux" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert {"top1 0.5", "notes coarse", "notes seen True", "num inference steps 3"} <= set(lines)


@pytest.mark.skipif("emoji-flux" not in zoo.names(), reason="no trained weights are in this checkout")
def test_explain_tells_what_a_model_draws(run):
    vocabulary = run("explain", "emoji-flux", "--json").json["vocabulary"]
    shown = " ".join(run("explain", "emoji-flux").out.split())
    labels = [label for labels in vocabulary["labels"].values() for label in labels]
    assert f"Things ({len(labels)})" in shown and all(label in shown for label in labels)
    assert all(" | ".join(vocabulary[key]) in shown for key in ("styles", "colours", "numbers", "relations"))
    assert "rocket in fluent 3d" in shown and "CC-BY 4.0" in shown and "golden" not in shown


@pytest.mark.parametrize("name", zoo.names())
def test_explain_shows_no_raw_keys(run, name):
    shown = run("explain", name).out
    assert "_top1" not in shown and "[{" not in shown and "{'" not in shown
    assert "diffaccel.zoo.path(name)" not in shown


def test_argument_texts_run_over_lines_and_share_entries():
    doc = "What.\n\nArgs:\n    a: first\n        and more.\n    b, c: both.\n\nRaises:\n    E: never."
    assert documented_arguments(doc) == {"a": "first and more.", "b": "both.", "c": "both."}


def test_method_options_are_in_the_help(run):
    with pytest.raises(SystemExit) as done:
        run("sample", "--help")
    assert done.value.code == 0


def test_nothing_heavy_is_loaded(tmp_path):
    """Naming the commands, listing and reading help need no torch."""
    code = """
import sys
from diffaccel.cli import main
for words in ("--help", "list --help", "explain --help", "list", "list --json", "--version", "explain nothing"):
    try:
        main(words.split())
    except SystemExit:
        pass
    heavy = {"torch", "diffusers", "transformers", "numpy", "jsonargparse"} & set(sys.modules)
    if heavy:
        sys.exit(f"diffaccel {words} loads {heavy}")
"""
    out = tree.python("-c", code, cwd=tmp_path).stdout
    assert "generate images from prompts" in out and "dpmpp2m" in out


def test_threads_are_told_to_share_before_torch_loads(tmp_path, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # make sets it for the whole suite
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = """
import os, sys
import diffaccel.cli.sample, diffaccel.runs.generate, diffaccel.runs.loading, diffaccel.terminal
assert "torch" not in sys.modules
diffaccel.terminal.share_cpu()
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    assert tree.python("-c", code, cwd=tmp_path).stdout == "5000\n"
    assert tree.python("-c", code, cwd=tmp_path, GOMP_SPINCOUNT="7").stdout == "7\n"
    assert tree.python("-c", code, cwd=tmp_path, OMP_WAIT_POLICY="ACTIVE").stdout == "None\n"


def test_python_dash_m(tmp_path):
    assert "dpmpp2m" in tree.python("-m", "diffaccel", "list", cwd=tmp_path).stdout
    assert Path(sys.executable).with_name("diffaccel").exists()
