"""``diffaccel rollout``: the video is what the sampler draws; actions from every source; errors before any work."""

from __future__ import annotations

import errno
import itertools
import random
import shutil

import imageio_ffmpeg
import pytest
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from PIL import Image

import diffaccel
from diffaccel import files
from diffaccel.cli.rollout import write_video
from diffaccel.cli.world import find_beginning
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_png
from diffaccel.models.next_frame import beginnings
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.samplers import NextFrameSampler
from diffaccel.samplers.nfd.streams import held_actions
from tests.support.worlds import tiny_pipeline, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_world(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def rollout(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: run("rollout", world, "--device", "cpu", "--steps", 2, *words)


def test_the_video_is_what_the_sampler_draws(rollout, world, tmp_path):
    done = rollout("--actions", "1,1,1,2,0", "--draft", 2, "--scale", 1, "--json", "--out", "run.gif")
    assert done.status == 0, done.err
    told = done.json
    assert (told["frames"], told["accepted"], told["rounds"], told["discarded"]) == (5, 5, 4, 2)
    sampler = NextFrameSampler(tiny_world(torch.float32), 2, draft=2)
    sampler.reset()
    expected = ((sampler.rollout([1, 1, 1, 2, 0]).frames.clamp(-1, 1) + 1) * 127.5).round()
    with Image.open(tmp_path / "run.gif") as video:
        assert video.n_frames == 5 and video.size == (8, 8)
        first = torch.frombuffer(bytearray(video.convert("RGB").tobytes()), dtype=torch.uint8).view(8, 8, 3)
    assert (first.movedim(-1, 0).float() - expected[0, 0]).abs().max() < 40  # 256 colours


def test_a_held_stream_into_mp4(rollout, tmp_path):
    done = rollout("--frames", 20, "--draft", "auto", "--hold", 5, "--out", "new/run.mp4")
    assert done.status == 0, done.err
    assert "20 frames in" in done.out and "relative to one frame" in done.out and "run.mp4" in done.out
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "new/run.mp4"))[0] == 20


def test_actions_from_a_file_and_a_first_picture(rollout, tmp_path):
    (tmp_path / "actions.txt").write_text("1 1\n2, 3\n")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "start.png")
    words = ("--actions", "actions.txt", "--start", "start.png", "--draft", 1, "--json")
    assert rollout(*words).json["frames"] == 4
    assert rollout(*words, "--frames", 2, "--oracle").json["is_oracle"]


def test_a_latency_that_is_not_met_is_told(rollout, caplog):
    done = rollout("--frames", 3, "--draft", 1, "--latency", 0.0001)
    assert "ms or less in 99 % of rounds; 0.0001 ms not met" in done.out
    assert sum("latency=0.0001 ms was asked for" in message for message in caplog.messages) == 1
    done = rollout("--frames", 3, "--draft", 1, "--latency", 1e6, "--json")
    assert done.json["latency_asked"] == 1e6 and 0 < done.json["latency_p99"] < 1e6 and not done.err


@pytest.mark.slow
def test_a_model_begins_with_its_own_frames(run, tmp_path, monkeypatch):
    model = tiny_world(torch.float32)
    model.save_pretrained(tmp_path)
    frames, actions = torch.randint(256, (2, 3, 3, 8, 8), dtype=torch.uint8), torch.tensor([[1, 2, 3], [4, 0, 1]])
    beginnings.write(tmp_path, frames, actions)
    words = (tmp_path, "--device", "cpu", "--steps", 2, "--draft", 1, "--scale", 1, "--actions", "1,2", "--no-capture")
    pictures = {}
    for name, more in (("seed", ("--seed", 1)), ("number", ("--seed", 1, "--start", 1)), ("other", ("--start", 0))):
        assert run("rollout", *words, *more, "--out", tmp_path / f"{name}.mp4").status == 0
        pictures[name] = next(itertools.islice(imageio_ffmpeg.read_frames(str(tmp_path / f"{name}.mp4")), 1, None))
    assert pictures["seed"] == pictures["number"] != pictures["other"]
    own = find_beginning(None, 1, NextFramePipeline.from_folder(tmp_path))
    assert torch.equal(own.actions, actions[1]) and torch.equal(((own.frames + 1) * 127.5).round(), frames[1].float())
    assert "0 to 1, or a picture" in run("rollout", *words, "--start", 2).err
    assert "0 to 1, or a picture" in run("rollout", *words, "--start=-1").err
    assert run("quantize", tmp_path, "--method", "w8a8", "--out", tmp_path / "q").status != 0  # a network alone
    NextFramePipeline.from_folder(tmp_path).save_pretrained(tmp_path / "pipe")
    assert run("quantize", tmp_path / "pipe", "--method", "w8a8", "--out", tmp_path / "q").status == 0
    assert (tmp_path / "q" / beginnings.FILE).read_bytes() == (tmp_path / beginnings.FILE).read_bytes()
    assert run("rollout", tmp_path / "q", *words[1:], "--start", 1).status == 0
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "diffaccel")  # as in a process that has not asked for it
    with pytest.raises(DiffAccelError, match=r"saved quantized \('diffaccel'\).* Use diffaccel\.load\('.*q'\)"):
        NextFramePipeline.from_folder(tmp_path / "q")
    assert diffaccel.load(tmp_path / "q").transformer is not None
    scanned = run("quantize", tmp_path / "pipe", "--method", "w8a8", "--scan", "7", "--out", tmp_path / "x")
    assert "draws from a prompt" in scanned.err
    (tmp_path / beginnings.FILE).write_bytes(b"no picture")
    assert "Copy the model again" in run("rollout", *words).err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--draft", "many"), "--draft is 'many'"),
        (("--draft", 0), "draft is 0"),
        (("--draft", 9), "window is 4 with 9 drafts"),
        (("--actions", "1,9", "--draft", 1), "hold 9; they must be integers from 0 to 3"),
        (("--actions", "nowhere.txt"), "neither hold, random, numbers"),
        (("--actions", "1,1", "--frames", 3, "--draft", 1), "Give 1 to 2"),
        (("--frames", 0, "--draft", 1), "frames is 0"),
        (("--hold", 0.5, "--draft", 1), "--hold 0.5"),
        (("--out", "run.avi"), "it must be .mp4 or .gif"),
        (("--start", "nowhere.png", "--draft", 1), "cannot be read as a picture"),
        (("--scale", 0), "from 1 to 32"),
        (("--steps", 0), "steps is 0"),
        (("--steps", 10**20), "10,000 at most"),
        (("--window", 10**11, "--draft", 1), "A window of 100000000000 frames needs"),
        (("--device", "meta"), "Unknown device 'meta'"),
        (("--context-noise", 0.7, "--draft", 1), "context_noise is 0.7"),
    ],
)
def test_bad_input_is_named(rollout, words, sentence):
    done = rollout(*words)
    assert done.status == 2 and sentence in done.err and not done.out


def test_a_folder_without_a_model_is_named(run, tmp_path):
    done = run("rollout", tmp_path, "--draft", 1)
    assert done.status == 2 and "neither model_index.json nor config.json" in done.err


def test_a_first_picture_of_another_size_is_named(rollout, tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "start.png")
    assert "is 9x8; the model's frames are 8x8" in rollout("--start", "start.png", "--draft", 1).err


def test_a_held_stream_repeats_as_often_as_it_says():
    stream = held_actions(20_000, 9, 8.0, seed=1)
    repeats = sum(a == b for a, b in itertools.pairwise(stream)) / (len(stream) - 1)
    assert abs(repeats - 7 / 8) < 4 * (7 / 64 / 20_000) ** 0.5
    assert set(stream) == set(range(9))
    changing = held_actions(500, 9, 1.0)
    assert all(a != b for a, b in itertools.pairwise(changing))
    assert (
        held_actions(500, 9, 3.0) == held_actions(500, 9, 3.0) != held_actions(500, 9, 3.0, seed=random.randint(1, 9))
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--frames", 0), "--frames is 0"), (("--hold", 0.5), "--hold 0.5"), (("--fps", "inf"), "--fps is inf"),
        (("--fps", 1e-9), "--fps is 1e-09; it must be from 0.01 to 1000"), (("--threads", 100_000), "at most 1024"),
        (("--fps", 120, "--out", "run.gif"), "--fps is 120; it must be from 0.01 to 100 frames a second, for a .gif"),
        (("--threads", -1), "--threads is -1"), (("--seed", 2**64), "--seed is 18446744073709551616"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_cannot_be_are_told_before_the_model_is_opened(rollout, monkeypatch, words, said):
    from diffaccel.models.next_frame.pipeline import NextFramePipeline

    monkeypatch.delattr(NextFramePipeline, "from_folder")
    done = rollout(*words)
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("config.json", lambda data: data[:50], "cannot be loaded from"),
        (
            "config.json",
            lambda data: data.replace(b'"num_layers": 2', b'"num_layers": 1'),
            "has no place for the weight",
        ),
        ("config.json", lambda data: data.replace(b'"num_layers": 2', b'"num_layers": 3'), "lacks the weight"),
        ("diffusion_pytorch_model.safetensors", lambda data: data[:-1000], "cannot be loaded from"),
        ("diffusion_pytorch_model.safetensors", lambda data: data[:-4] + b"\xff" * 4, "NaN or infinite values"),
    ],
)
def test_a_damaged_model_is_named_and_draws_nothing(run, world, tmp_path, file, damage, sentence):
    """A layer that the config has no more is left out by diffusers with a warning, and the video is another one."""
    shutil.copytree(world, tmp_path / "world")
    path = tmp_path / "world" / file
    path.write_bytes(damage(path.read_bytes()))
    done = run("rollout", tmp_path / "world", "--draft", 1, "--frames", 1)
    assert done.status == 2 and sentence in done.err and "Copy" in done.err


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (48, 8)])
def test_beginnings_of_another_layout_are_refused(tmp_path, size):
    """A picture with as many pixels in other rows would be frames of scrambled ones."""
    write_png(tmp_path / beginnings.FILE, Image.new("RGB", size), {"actions": [[0, 1, 2], [3, 0, 0]]})
    if size == (24, 16):
        assert len(beginnings.read(tmp_path, (3, 8, 8))) == 2
        write_png(tmp_path / beginnings.FILE, Image.new("RGB", size), {"actions": [[0, 1.7, 2], [3, 0, 0]]})
    with pytest.raises(DiffAccelError, match="is no picture of frames 8x8"):
        beginnings.read(tmp_path, (3, 8, 8))


def test_a_model_without_beginnings_keeps_none_of_the_one_that_was_saved_there(tmp_path):
    pipe = tiny_pipeline()
    pipe.beginnings = [beginnings.Beginning(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
    pipe.save_pretrained(tmp_path)
    assert len(NextFramePipeline.from_folder(tmp_path).beginnings) == 1
    tiny_pipeline().save_pretrained(tmp_path)
    assert not NextFramePipeline.from_folder(tmp_path).beginnings


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_full_disk_is_named_and_the_file_there_stays(rollout, tmp_path, monkeypatch, ending):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / f"run.{ending}").write_bytes(b"before")
    monkeypatch.setattr(files.os, "fsync", full)
    done = rollout("--frames", 2, "--draft", 1, "--out", f"run.{ending}")
    assert done.status == 2 and "cannot be written (No space left on device). Make room" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [f"run.{ending}"]
    assert (tmp_path / f"run.{ending}").read_bytes() == b"before"


@pytest.mark.parametrize("fps", [15, 7.3, 60, 100])
def test_a_gif_is_as_long_as_its_frames_a_second_say(tmp_path, fps):
    pictures = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(50)]
    write_video(tmp_path / "run.gif", pictures, fps)
    with Image.open(tmp_path / "run.gif") as video:
        told = [video.seek(number) or video.info["duration"] for number in range(video.n_frames)]
    assert abs(sum(told) - 50_000 / fps) <= 10 and min(told) >= 10
