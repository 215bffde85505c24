"""``diffaccel doctor``: rows that are true on this machine, and reasons instead of crashes."""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from diffaccel import registry
from diffaccel.cli import doctor
from diffaccel.cli.doctor import compute as doctor_compute
from diffaccel.cli.doctor import host as doctor_host
from diffaccel.cli.doctor import model as doctor_model
from diffaccel.cli.doctor.host import Check
from diffaccel.config import Config, Machine
from diffaccel.errors import DiffAccelError
from tests.layout import tree

SECTIONS = ("software", "cpu", "attention", "dtypes", "compile", "video", "storage")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def row(report: dict, section: str, name: str) -> dict:
    return next(row for row in report[section] if row["name"] == name)


@pytest.mark.slow
@on_cpu
def test_what_a_cpu_can_do(report):
    assert report["device"] == "cpu" and report["gpus"] == [] and report["no_gpu"]
    works = {r["name"]: r["works"] for r in report["attention"]}
    assert works["torch-math"] and works["torch-flash"]
    assert not works["torch-cudnn"] and not works["torch-efficient"]
    assert all(r["detail"] for section in SECTIONS for r in report[section])
    assert row(report, "attention", "torch-cudnn")["detail"] == "torch has no such kernel for cpu"
    assert "the speed of float32" in row(report, "dtypes", "bfloat16")["detail"]
    assert not row(report, "compile", "triton")["works"] and row(report, "compile", "torch.compile")["works"] is None
    assert row(report, "video", "mp4")["works"]


@pytest.mark.gpu
def test_what_a_gpu_can_do(report):
    card = report["gpus"][0]
    assert report["device"] == "cuda" and report["no_gpu"] is None and card["works"] and card["detail"] == "multiplies"
    assert card["name"] == torch.cuda.get_device_name(0) and 0 < card["free"] <= card["memory"]
    assert card["driver"] != "unknown" and tuple(map(int, card["capability"].split("."))) >= (7, 0)
    works = {r["name"]: r["works"] for r in report["attention"]}
    assert works["torch-math"] and works["torch-flash"] and works["torch-efficient"]
    assert row(report, "dtypes", "bfloat16")["works"] and row(report, "compile", "triton")["works"]


def test_a_gpu_that_fails_is_a_row(monkeypatch, capsys):
    """Say one that is newer than this torch."""
    about = types.SimpleNamespace(name="Card", total_memory=8 << 30, major=12, minor=0)

    def fail(number):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    (card,), no_gpu = doctor_host.gpus()
    assert no_gpu is None and card["works"] is False and "no kernel image" in card["detail"]
    assert (card["capability"], card["memory"], card["free"]) == ("12.0", 8 << 30, None)
    doctor._show_gpus({"gpus": [card]})
    shown = capsys.readouterr().out
    assert "Card" in shown and "8.0 GiB" in shown and "no kernel" in shown


def test_why_a_kernel_refused_is_told(monkeypatch):
    def attend(call, device):
        for text in (
            "Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)",
            "Memory Efficient attention has been runtime disabled. (Triggered internally at x.h:2.)",
            "Flash attention only supports gpu architectures in the range [sm80, sm121]. (Triggered internally at y.)",
        ):
            warnings.warn(text, UserWarning, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(doctor_compute, "_attend", attend)
    check = doctor_compute.torch_attention("cuda")[0]
    assert check.detail == "Flash attention only supports gpu architectures in the range [sm80, sm121]."


@pytest.mark.slow
def test_the_report_is_one_json_object(run, monkeypatch, report):
    monkeypatch.setattr(doctor, "examine", lambda full: report)
    done = run("doctor", "--json")
    assert done.status == 0 and done.err == "" and done.out.count("\n") == 1
    assert done.json == report
    assert {*SECTIONS, "format", "device", "gpus", "no_gpu", "methods"} == done.json.keys()
    for section in SECTIONS:
        assert all(r.keys() == {"name", "works", "detail"} for r in done.json[section])
        assert all(r["works"] in (True, False, None) for r in done.json[section])
    shown = run("doctor").out
    assert all(word in shown for word in ("torch-math", "bfloat16", "mp4", *registry.names()))


def test_every_package_asked_for_has_a_row_with_its_version(report):
    names = [r["name"] for r in report["software"]]
    assert {"python", "diffaccel", "torch", "diffusers", "transformers"} <= set(names) and len(names) == len(set(names))
    assert row(report, "software", "torch")["detail"] == torch.__version__.partition("+")[0]


def test_every_method_has_a_row(report):
    assert [r["name"] for r in report["methods"]] == list(registry.names())
    for method in report["methods"]:
        assert method.keys() == {"name", "kind", "level", "reason"} and method["reason"]
        if method["kind"] == "sampler" and method["name"] != "nfd":  # which is fast by its graphs
            assert method["level"] == "fast" and "time follows NFE" in method["reason"]
    assert "2 predictions a step" in row(report, "methods", "heun")["reason"]


@dataclass(frozen=True, kw_only=True)
class Planted(Config):
    name: ClassVar[str] = "planted"
    touches: ClassVar[str] = "weights"


def answers(monkeypatch, support=None, **members) -> tuple[str, str]:
    """What doctor says of a plugin whose ``support`` is this."""
    if support is not None:
        members["support"] = classmethod(support)
    module = types.ModuleType("planted_method")
    module.Planted = type("Planted", (Planted,), members)
    monkeypatch.setitem(sys.modules, "planted_method", module)
    monkeypatch.setattr(registry, "names", lambda: {"planted": "planted_method:Planted"})
    (found,) = doctor.methods(Machine(device="cpu"))
    return found["level"], found["reason"]


def test_a_plugin_speaks_for_itself(monkeypatch):
    assert answers(monkeypatch) == ("unknown", "the method does not say what it needs")
    seen = []

    def support(cls, machine):
        seen.append(machine)
        return "slow", "no GPU"

    assert answers(monkeypatch, support) == ("slow", "no GPU") and seen == [Machine(device="cpu")]


def test_a_plugin_whose_support_fails_is_a_row(monkeypatch):
    def broken(cls, machine):
        raise KeyError("gpu")

    assert answers(monkeypatch, broken) == ("unknown", "its own check failed: KeyError: 'gpu'")
    level, why = answers(monkeypatch, lambda cls, machine: ("quick", "really"))
    assert level == "unknown" and "'quick', which is none of fast" in why
    assert answers(monkeypatch, lambda cls, machine: None)[0] == "unknown"


def test_a_plugin_that_cannot_be_imported_is_a_row(monkeypatch):
    monkeypatch.setattr(registry, "names", lambda: {"gone": "nowhere.at_all:Method"})
    (found,) = doctor.methods(Machine(device="cpu"))
    assert found["level"] == "unsupported" and "cannot be imported" in found["reason"]


@pytest.mark.slow
def test_a_machine_without_torch_is_told_so(tmp_path):
    """Every check that needs it is a row with its reason."""
    code = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None
from diffaccel.cli import main
sys.exit(main(["doctor", "--json"]))
"""
    found = json.loads(tree.python("-c", code, cwd=tmp_path).stdout)
    assert "torch" in row(found, "attention", "torch-math")["detail"]
    assert not row(found, "attention", "torch-math")["works"] and not row(found, "dtypes", "bfloat16")["works"]
    assert found["no_gpu"] and {m["level"] for m in found["methods"]} == {"unsupported"}


@pytest.mark.slow
def test_wrong_results_are_no_support(monkeypatch):
    check = doctor_host.tried("x", lambda: doctor_compute._attend(lambda q, k, v: 2 * q, "cpu"))
    assert check.works is False and "% off" in check.detail
    monkeypatch.setattr(torch, "_scaled_mm", lambda x, y, **kwargs: torch.zeros(len(x), y.shape[1]))
    check = doctor_compute.dtypes("cpu")[2]
    assert check.works is False and "100 % off" in check.detail


@pytest.mark.slow
def test_attention_packages_run_in_a_child(monkeypatch):
    """The native backend stands for an installed package."""
    monkeypatch.setattr(doctor_compute, "DIFFUSERS_ATTENTION", {"stand-in": "native", "flash": "flash"})
    found, missing = doctor_compute.diffusers_attention("cpu")
    assert found.works and 'set_attention_backend("native")' in found.detail
    assert missing.works is False and "flash-attn" in missing.detail


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended the process with signal 11"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
        ("raise SystemExit('bad library')", "bad library"),
        ("pass", "said nothing"),
    ],
)
def test_a_child_that_crashes_or_hangs_is_a_row(monkeypatch, tmp_path, python, expected):
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{python}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setitem(doctor_compute.SECONDS, "compile", 1)
    start = time.monotonic()
    assert doctor_compute.in_child("x", "compile") == Check("x", False, expected)
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_compile_is_tried_when_asked_for():
    (check,) = [c for c in doctor_compute.compilers("cpu", full=True) if c.name == "torch.compile"]
    assert check.works is not None and check.detail


def test_no_compiler_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = doctor_compute.compilers("cpu", full=False)[0]
    assert check.works is False and "no C++ compiler on PATH" in check.detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in doctor_compute.compilers("cpu", full=False)[0].detail


def test_a_folder_that_cannot_be_written_is_a_row(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "file" / "cache"))
    assert doctor_host.storage()[0].works is False
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "new" / "cache"))
    assert doctor_host.storage()[0].works and not (tmp_path / "new").exists()
    monkeypatch.setattr(doctor_host, "LOW_DISK", 1 << 60)
    assert "only" in doctor_host.storage()[0].detail


def test_an_old_package_is_a_row():
    check = doctor_host.tried("torch", lambda: doctor_host._package_version("torch", ">=99"))
    assert check.works is False and "diffaccel needs >=99; pip install 'torch>=99'" in check.detail
    check = doctor_host.tried("nothing-such", lambda: doctor_host._package_version("nothing-such", ">=1"))
    assert check.detail == "not installed; pip install 'nothing-such>=1'"


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def examined(run, monkeypatch):
    """``examined(model)``: the command on a model, without looking at the machine again."""
    monkeypatch.setattr(doctor, "examine", lambda full: {"methods": [], "gpus": [], "no_gpu": "", "device": "cpu"})
    return lambda model: run("doctor", "--json", "--model", model)


@pytest.mark.slow
def test_a_model_and_its_family(examined, models):
    found = examined(models / "flux").json["model"]
    assert found["pipeline"] == "FluxPipeline" and found["family"] == "flux" and found["bytes"] > 0
    assert all(part["works"] for part in found["components"])
    assert {part["name"] for part in found["components"]} >= {"transformer", "vae", "text_encoder", "scheduler"}
    assert [m["name"] for m in found["methods"]] == list(registry.names())
    assert all(
        m["fits"] and "runs its own loop" in m["reason"] for m in found["methods"] if m["name"] in ("euler", "heun")
    )


def index(folder, **changes):
    values = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def flux(models, tmp_path):
    return shutil.copytree(models / "flux", tmp_path / "copy")


@pytest.mark.slow
def test_a_pipeline_without_a_family_is_rehearsed(examined, flux):
    found = examined(index(flux, _class_name="AuraFlowPipeline")).json["model"]
    assert found["family"] is None and found["note"].startswith("none")
    reasons = {m["name"]: m["reason"] for m in found["methods"]}
    assert reasons["euler"] == "runs at least inside the loop of AuraFlowPipeline, 8 predictions for 8 steps"
    assert "15 predictions" in reasons["heun"]
    fits = {m["name"]: m["fits"] for m in found["methods"]}
    assert fits["euler"] is True and fits["scheduler"] is True and "own call" in reasons["scheduler"]


@pytest.mark.slow
def test_a_pipeline_of_another_diffusers(examined, flux):
    found = examined(index(flux, _class_name="TomorrowPipeline")).json["model"]
    assert "has no class TomorrowPipeline" in found["note"]


@pytest.mark.slow
def test_a_schedule_that_cannot_be_followed_says_why(examined, flux):
    (flux / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True})
    )
    methods = {m["name"]: m for m in examined(flux).json["model"]["methods"]}
    assert methods["euler"]["fits"] is False and "invert_sigmas" in methods["euler"]["reason"]


@pytest.mark.slow
def test_a_method_may_say_which_models_it_fits(monkeypatch, models):
    model = doctor_model.read(str(models / "flux"))

    def fits(cls, pipeline, family):
        return False, f"made for UNets, not for {pipeline} ({family.name})"

    answers(monkeypatch, fits=classmethod(fits))
    (found,) = doctor_model.fit(model)["methods"]
    assert found == {"name": "planted", "fits": False, "reason": "made for UNets, not for FluxPipeline (flux)"}
    answers(monkeypatch)
    assert doctor_model.fit(model)["methods"][0]["fits"] is None


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "missing", "shard", "class"])
def test_damaged_parts_are_rows(examined, flux, damage):
    weights = flux / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing":
        shutil.rmtree(flux / "transformer")
    elif damage == "shard":
        (flux / "transformer" / "x.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')
    else:
        index(flux, transformer=["diffusers", "NextTransformer"])
    done = examined(flux)
    part = next(p for p in done.json["model"]["components"] if p["name"] == "transformer")
    said = {"cut": "its own header asks", "missing": "is missing", "shard": "1 of 1 weight files", "class": "no class"}
    assert done.status == 0 and part["works"] is False and said[damage] in part["detail"]


@pytest.mark.parametrize(
    ("damage", "said"), [("no index", "no pipeline"), ("no json", "cannot be read"), ("no class", "names no pipeline")]
)
def test_a_broken_model_folder_is_one_sentence(examined, flux, damage, said):
    if damage == "no index":
        (flux / "model_index.json").unlink()
    else:
        (flux / "model_index.json").write_text("{" if damage == "no json" else "{}")
    done = examined(flux)
    assert done.status == 2 and done.out == "" and said in done.err and done.err.count("\n") == 1


def test_models_that_are_not_there(examined, monkeypatch):
    assert "Did you mean 'emoji-flux'" in examined("emoji-fluks").err

    def download(name, file):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    done = examined("nobody/nothing")
    assert done.status == 2 and "the hub gave: no network" in done.err
    with pytest.raises(DiffAccelError, match="Unknown model"):
        doctor_model.read("./nowhere/at-all")


def test_a_checkout_that_was_not_installed(monkeypatch):
    def missing(name):
        raise doctor_host.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_host.importlib.metadata, "requires", missing)
    rows = {check.name: check for check in doctor_host.software()}
    assert rows["python"].works and rows["diffaccel"].works is None and "pip install -e ." in rows["diffaccel"].detail
