"""Every bad input and failure is one clear sentence with its exit status, and nothing half-written."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from diffaccel.files import write_png

BAD = {
    "no prompt": ((), "No prompt was given"),
    "empty prompt": (("a cat", " "), "Prompt 2 is empty"),
    "size": (("a cat", "--size", "50x40"), "nearest valid size is 48x32"),
    "no size": (("a cat", "--size", "0"), "size is 0x0; both sides must be at least 1 pixel"),
    "half a size": (("a cat", "--size", "32x0"), "size is 32x0; both sides"),
    "empty output": (("a cat", "--out", ""), "--out: the path is empty"),
    "nobody's home": (("a cat", "--out", "~nobody-of-that-name/x"), "--out: '~nobody-of-that-name/x' names no home"),
    "half a surrogate pair": (("a cat", "a \udcff cat"), r"Prompt 2 is 'a \udcff cat', which holds half a surrogate"),
    "negative surrogate": (("a cat", "--negative", "\ud800"), r"The negative prompt is '\ud800', which holds"),
    "size text": (("a cat", "--size", "big"), "size is 'big'"),
    "steps": (("a cat", "--steps", "0"), "steps is 0; it must be at least 1"),
    "num": (("a cat", "--num", "0"), "num is 0; it must be at least 1"),
    "number": (("a cat", "--num", "many"), "--num: invalid int value: 'many'"),
    "seed": (("a cat", "--seed", "-3"), "seed is -3; it must be at least 0"),
    "guidance": (("a cat", "--guidance", "nan"), "guidance is nan"),
    "negative without guidance": (("a cat", "--negative", "blurry"), "no effect at guidance 1"),
    "dtype": (("a cat", "--dtype", "bfloat"), "Did you mean 'bfloat16'"),
    "device": (("a cat", "--device", "cpuu"), "Did you mean 'cpu'"),
    "absent device": (("a cat", "--device", "cuda:99"), "'cuda:99' is not there"),
    "sampler": (("a cat", "--sampler", "huen"), "Did you mean 'heun'"),
    "option": (("a cat", "--guidence", "3"), "Did you mean '--guidance'"),
    "option of no method": (("a cat", "--huen.state", "stock"), "Did you mean 'heun'"),
    "option of another sampler": (("a cat", "--sampler", "euler", "--heun.state", "stock"), "the sampler is 'euler'"),
    "option without a sampler": (("a cat", "--heun.state", "stock"), "Pass --sampler heun"),
    "unknown field": (("a cat", "--sampler", "heun", "--heun.stat", "stock"), "Did you mean 'state'"),
    "value": (("a cat", "--sampler", "heun", "--heun.state", "stoc"), "one of 'float32', 'stock'"),
    "value type": (("a cat", "--sampler", "heun", "--heun.max_batch", "two"), "Heun.max_batch is 'two'"),
    "value range": (("a cat", "--sampler", "ancestral", "--ancestral.eta", "2"), "Ancestral.eta is 2"),
    "no value": (("a cat", "--sampler", "heun", "--heun.state"), "--heun.state needs a value"),
    "model": (("a cat", "--model", "emoji-fluks"), "Unknown model 'emoji-fluks'"),
    "folder of something else": (("a cat", "--model", "."), "without model_index.json"),
    "output is a file": (("a cat", "--out", "file"), "'file' cannot be written"),
    "output below a file": (("a cat", "--out", "file/deeper"), "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(sample, tmp_path, case):
    argv, message = BAD[case]
    (tmp_path / "file").touch()
    done = sample(*argv, *(() if "--out" in argv else ("--out", "run")), "--json")
    assert done.status == 2 and done.out == ""
    assert message in done.err and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("smaple",), "Did you mean 'sample'"),
        (("--versoin",), "Did you mean '--version'"),
        (("explain", "heum"), "Did you mean 'heun'"),
        (("explain",), "required: NAME"),
        (("list", "euler"), "Unknown option 'euler'"),
    ],
)
def test_bad_commands(run, argv, message):
    done = run(*argv)
    assert done.status == 2 and message in done.err and done.out == ""


def test_no_permission(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    done = sample("a cat", "--out", "run")
    assert done.status == 2 and "no permission" in done.err


def test_a_model_that_the_hub_does_not_give(sample, monkeypatch):
    from diffusers import DiffusionPipeline

    def download(name):
        raise OSError(f"{name} is\nnot there")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    done = sample("a cat", "--model", "nobody/nothing")
    assert done.status == 2 and "the hub did not give it: nobody/nothing is not there" in done.err


@pytest.mark.parametrize("damage", ["cut", "missing", "weight", "text", "config"])
def test_damaged_models(sample, models, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(models / "flux", folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "weight":
        tensors = load_file(weights)
        del tensors["x_embedder.bias"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "text":
        text = folder / "text_encoder" / "model.safetensors"
        save_file({k: v for k, v in load_file(text).items() if "final" not in k}, text, metadata={"format": "pt"})
    else:
        (folder / "vae" / "config.json").write_text("{")
    done = sample("a cat", "--model", folder, "--out", "run")
    assert done.status == 2 and "damaged, incomplete or of another version" in done.err
    assert damage != "weight" or "no file of 'transformer' has its weight x_embedder.bias" in done.err
    assert damage != "text" or "no file of 'text_encoder' has its weights final_layer_norm.bias, " in done.err
    assert done.err.count("\n") == 1 or damage in ("weight", "text")  # the libraries themselves warn of those
    assert done.err.splitlines()[-1].startswith("diffaccel: error: The model") and not (tmp_path / "run").exists()


def test_a_pipeline_without_prompts(sample, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    done = sample("a cat", "--model", tmp_path / "ddpm", "--out", "run")
    assert done.status == 2 and "DDPMPipeline, whose call takes no prompt" in done.err


def network_raises(monkeypatch, error):
    @functools.wraps(FluxTransformer2DModel.forward)
    def forward(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)


@pytest.mark.parametrize("sampler", [(), ("--sampler", "euler")])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory(sample, tmp_path, monkeypatch, sampler, error):
    network_raises(monkeypatch, error)
    done = sample("a cat", "--batch", 4, "--out", "run", *sampler)
    assert done.status == 3 and "Out of memory with 4 images a call" in done.err and "smaller --batch" in done.err
    assert not (tmp_path / "run").exists()


def test_not_a_number(sample, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z, **kwargs: decode(self, z * float("nan"), **kwargs))
    done = sample("a cat", "--out", "run")
    assert done.status == 3 and "not-a-number" in done.err and "another --dtype" in done.err
    assert not (tmp_path / "run").exists()


def test_an_output_folder_whose_name_is_no_utf8(sample, tmp_path):
    name = os.fsdecode(b"run \xff")
    assert sample("a cat", "--out", name).status == 0
    assert json.loads((tmp_path / name / "run.json").read_text())["command"][-1] == name


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished(sample, tmp_path, monkeypatch):
    write, calls = write_png, []

    def full(path, image, values):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, image, values)

    command = ("a cat", "--num", 4, "--batch", 2, "--out", "run", "--json")
    whole = sample(*command).json
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("diffaccel.runs.folder.write_png", full)
    done = sample(*command)
    assert done.status == 3 and "No space left" in done.err and "same command continues" in done.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "running"
    monkeypatch.setattr("diffaccel.runs.folder.write_png", write)
    assert sample(*command).json["images"] == whole["images"]


def test_an_unforeseen_failure_says_what_and_where_to_look(sample, monkeypatch):
    network_raises(monkeypatch, KeyError("surprise"))
    done = sample("a cat", "--out", "run")
    assert done.status == 3 and "KeyError" in done.err and "surprise" in done.err and "Traceback" not in done.err
    assert "DIFFACCEL_DEBUG=1" in done.err


def test_a_record_from_the_future(sample, tmp_path):
    sample("a cat", "--out", "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    assert "record format 99" in sample("a cat", "--out", "run").err
    file.write_text("{")
    assert "is no record" in sample("a cat", "--out", "run").err
