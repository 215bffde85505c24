"""``diffaccel sample`` on pipelines that make video, or draw from classes or from nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import tiny_more
import torch
from PIL import Image

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.files import Clip, clip_sha256, pixels_sha256, read_mp4, read_result, write_mp4
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.registry import config_class
from diffaccel.runs.call_arguments import check_frames, class_labels
from diffaccel.runs.request import Request
from tests.cli.test_processes import TIMEOUT, files, start, wait_for
from tests.support.replayed_calls import ReplayedCalls

__all__ = ["start"]  # a fixture
LABELS = {"0": "tench", "1": "goldfish, Carassius auratus", "2": "white shark"}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny video, class-conditional and unconditional pipelines."""
    root = tmp_path_factory.mktemp("more")
    for name in ("wan", "hunyuan", "cogvideox", "pixart", "dit", "ddpm", "ddim"):
        tiny_more.make(name).save_pretrained(root / name)
    index = root / "dit" / "model_index.json"  # save_pretrained forgets the names of classes
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    shutil.copytree(root / "wan", root / "flux")  # what the processes of test_processes.py open
    return root


@pytest.fixture
def sample(run, models, tmp_path, monkeypatch):
    """``sample("wan", "a cat")``: the command on a tiny pipeline at two steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(model, *argv, size=32):
        fixed = ["--steps", 2, "--threads", 1, *(["--size", size] if size else [])]
        return run("sample", "--model", models / model, *fixed, *argv)

    return call


def video(sample, *argv, model="wan"):
    return sample(model, "a cat", "--frames", 5, "--json", *argv).json


def pixels(made):
    return [image["pixels_sha256"] for image in made["images"]]


def noise(frames=5, width=48, height=32, seed=0):
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return [Image.fromarray(frame).resize((width, height)) for frame in small]


# -- the file ---------------------------------------------------------------------------------------------------------


def test_an_mp4_shows_the_frames(tmp_path):
    frames = noise()
    write_mp4(tmp_path / "a.mp4", Clip(frames, fps=12.5))
    shown = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert shown.shape == (5, 32, 48, 3)
    assert np.abs(shown.astype(float) - np.stack([np.asarray(f) for f in frames])).mean() < 8
    meta = iio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")
    assert meta["fps"] == 12.5 and meta["codec"] == "h264"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_mp4(tmp_path / f"{name}.mp4", Clip(noise(), 8), {"prompt": "é 漢"})
    write_mp4(tmp_path / "c.mp4", Clip(noise(seed=1), 8), {"prompt": "é 漢"})
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


def test_odd_sides_and_single_frames_are_kept(tmp_path):
    write_mp4(tmp_path / "a.mp4", Clip([Image.new("RGB", (33, 17), "red")], 8))
    shown = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert shown.shape == (1, 17, 33, 3) and shown[..., 0].mean() > 245 and shown[..., 1:].mean() < 10


def test_an_mp4_carries_its_record(tmp_path):
    values = {"prompt": "a 'quoted' = \\ é\n; # cat", "steps": 3, "long": "x" * 5000}
    write_mp4(tmp_path / "a.mp4", Clip(noise(), 8), values)
    write_mp4(tmp_path / "b.mp4", Clip(noise(), 8))
    (tmp_path / "c.mp4").write_bytes(b"\xa9cmt")
    assert read_mp4(tmp_path / "a.mp4") == read_result(tmp_path / "a.mp4") == values
    assert read_mp4(tmp_path / "b.mp4") is read_mp4(tmp_path / "c.mp4") is None


def test_a_video_cut_short_is_no_file(tmp_path, monkeypatch):
    """ffmpeg's own failure, say on a full disk, does not reach its caller."""
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (3, 1.0))
    with pytest.raises(OSError, match="wrote 3 of 5 frames"):
        write_mp4(tmp_path / "a.mp4", Clip(noise(), 8))
    assert not list(tmp_path.iterdir())


# -- video pipelines --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("model", "fps"), [("wan", 16), ("hunyuan", 24), ("cogvideox", 8)])
def test_videos_and_record(sample, tmp_path, model, fps):
    count = 9 if model == "cogvideox" else 5
    command = ("--num", 2, "--seed", 7, "--batch", 2, "--frames", count, "--out", "run")
    made = video(sample, *command, model=model)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "00000.mp4", "00001.mp4"}
    assert made["state"] == "finished" and made["settings"]["frames"] == made["call"]["num_frames"] == count
    for image in made["images"]:
        file = tmp_path / "run" / image["file"]
        assert (image["frames"], image["fps"]) == (count, fps) and image["prompt"] == "a cat"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == image["sha256"]
        assert iio.imread(file, plugin="FFMPEG").shape == (count, 32, 32, 3)
        text = read_mp4(file)
        assert (text["id"], text["seed"]) == (image["id"], image["seed"]) and text["fingerprint"] == made["fingerprint"]
    assert len(set(pixels(made))) == 2
    shown = sample(model, "a cat", *command).out
    assert "2 videos in run: 00000.mp4 ... 00001.mp4" in shown and "s a video" in shown


@pytest.mark.slow
def test_no_sampler_is_the_stock_pipeline_and_the_record_tells_how(sample, models):
    made = video(sample, "--out", "a", "--guidance", 3, "--fps", 4)
    pipe = diffaccel.load(models / "wan")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(made["images"][0]["seed"])
    frames = pipe("a cat", generator=generator, output_type="pil", **made["call"]).frames[0]
    assert clip_sha256(Clip(frames, 4)) == pixels(made)[0]
    assert {k: made["cost"][k] for k in ("nfe", "forwards", "calls")} == {"nfe": 2, "forwards": 4, "calls": 4}
    assert made["images"][0]["fps"] == 4 and made["settings"]["fps"] == 4


@pytest.mark.parametrize(("model", "wrong", "near"), [("wan", 6, 5), ("hunyuan", 8, 9), ("cogvideox", 5, (1, 9))])
def test_the_rule_for_frames_is_the_pipelines_own(models, model, wrong, near):
    """What is refused comes out with another number of frames; what is offered instead comes out as asked."""
    pipe = diffaccel.load(models / model)
    pipe.set_progress_bar_config(disable=True)

    def count(frames):
        call = {"num_frames": frames, "height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pil"}
        return len(pipe("a cat", **call).frames[0])

    assert count(wrong) != wrong
    with pytest.raises(DiffAccelError, match=f"{wrong} frames do not fit") as said:
        check_frames(pipe, wrong)
    offered = int(str(said.value).rstrip(".").rpartition(" ")[2])
    assert offered in (near if isinstance(near, tuple) else (near,)) and count(offered) == offered
    check_frames(pipe, offered)


def test_a_sampler_on_video(sample):
    made = video(sample, "--out", "a", "--sampler", "heun")
    assert made["settings"]["methods"][0]["name"] == "heun" and made["cost"]["nfe"] == 3


@pytest.mark.slow
def test_a_video_depends_on_its_own_seed_alone(sample):
    many = video(sample, "--num", 3, "--seed", 7, "--out", "many")
    assert pixels(video(sample, "--seed", 9, "--out", "one")) == [pixels(many)[2]]


@pytest.mark.slow
def test_finished_and_damaged_videos(sample, tmp_path, monkeypatch):
    command = ("--num", 4, "--batch", 2, "--out", "a")
    first = video(sample, *command)
    folder = tmp_path / "a"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    (folder / "00003.mp4").write_bytes((folder / "00003.mp4").read_bytes()[:-50])
    (folder / ".00002.mp4.0badf00d.tmp").touch()
    again = video(sample, *command)
    assert again["images"] == first["images"] and not list(folder.glob(".*"))
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    assert {name for name in before if after[name] == before[name]} == {"00000.mp4", "00001.mp4"}
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", lambda *a: pytest.fail("the model was opened"))
    assert video(sample, *command)["images"] == first["images"]


@pytest.mark.slow
def test_resuming_does_not_ask_that_an_encoder_repeats_itself(sample, tmp_path, monkeypatch):
    """Other bytes of a new encoder for the missing videos; those that are there stay as they are."""
    command = ("--num", 2, "--out", "a")
    first = video(sample, *command)
    kept = (tmp_path / "a" / "00000.mp4").read_bytes()
    (tmp_path / "a" / "00001.mp4").unlink()
    write = write_mp4

    def other(path, clip, values=None):
        write(path, clip, {**values, "encoder": "another"})

    monkeypatch.setattr("diffaccel.runs.folder.write_mp4", other)
    again = video(sample, *command)
    assert again["state"] == "finished" and pixels(again) == pixels(first)
    assert again["images"][0] == first["images"][0] and again["images"][1]["sha256"] != first["images"][1]["sha256"]
    assert (tmp_path / "a" / "00000.mp4").read_bytes() == kept


@pytest.mark.slow
def test_stopped_and_killed_runs_continue(start, models, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--num", 5, "--frames", 5)  # ten chunks
    shared = ("--model", models / "flux", "--steps", 2, "--size", 32, "--threads", 1, "--json")
    whole = run("sample", "a red apple", "two cats", *shared, *options, "--out", "whole").json
    markers = tmp_path / "run" / ".chunks"
    for number, stop in ((1, signal.SIGINT), (4, signal.SIGKILL)):
        process = start(*options, "--out", "run")
        wait_for(markers / f"{number:05d}.json", process)
        process.send_signal(stop)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert number < len(list(markers.glob("*.json"))) < 10
    again = run("sample", "a red apple", "two cats", *shared, *options, "--out", "run").json
    assert again["images"] == whole["images"]
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished(sample, tmp_path, monkeypatch):
    write, calls = write_mp4, []

    def full(path, clip, values):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, clip, values)

    command = ("wan", "a cat", "--frames", 5, "--num", 3, "--out", "run", "--json")
    monkeypatch.setattr("diffaccel.runs.folder.write_mp4", full)
    done = sample(*command)
    assert done.status == 3 and "No space left" in done.err and "same command continues" in done.err
    monkeypatch.setattr("diffaccel.runs.folder.write_mp4", write)
    assert len(sample(*command).json["images"]) == 3


@pytest.mark.slow
def test_runs_of_videos_are_drawn_timed_and_compared(run, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    model, frames = ("--model", models / "wan"), ("--frames", 5)
    for steps in (1, 2):
        accel = ("--accel", f"plain:steps={steps},size=32", "--prompts", tmp_path / "prompts.txt", "--threads", 1)
        done = run("eval", "run", *model, *frames, "--fps", 4, *accel, "--out", tmp_path / str(steps))
        assert f"2 videos in {tmp_path / str(steps)}" in done.out, done.err
    variants = ("plain:steps=1,size=32", "plain:steps=2,size=32")
    timing = ("--turns", 3, "--warm-up", 1, "--out", tmp_path / "timing.json")
    assert run("eval", "time", *variants, *model, *frames, *timing).status == 0
    more = ("--timing", tmp_path / "timing.json", "--json")
    rows = run("eval", "compare", tmp_path / "2", tmp_path / "1", *more).json["metrics"]
    found = {row["metric"]: row for row in rows if row["run"] == "1"}
    assert found["ssim"]["value"] < 1 and found["flicker"]["delta"] is not None
    assert found["speedup"]["interval"] is None and "too few for an interval" in found["speedup"]["detail"]["from"]


@pytest.mark.slow
def test_what_draws_from_noise_or_classes_takes_turns_too(run, models):
    turns = ("plain:steps=1", "plain:steps=2", "--turns", 2, "--warm-up", 1)
    assert run("eval", "time", *turns, "--model", models / "ddpm", "--json").json["turns"] == 2
    assert run("eval", "time", *turns, "--model", models / "dit", "--prompt", "tench", "--json").json["turns"] == 2
    assert "No class was given" in run("eval", "time", *turns, "--model", models / "dit").err


def test_not_a_number(sample, tmp_path, monkeypatch):
    from diffusers import AutoencoderKLWan

    decode = AutoencoderKLWan.decode
    monkeypatch.setattr(AutoencoderKLWan, "decode", lambda self, z, **kwargs: decode(self, z * float("nan"), **kwargs))
    done = sample("wan", "a cat", "--frames", 5, "--out", "run")
    assert done.status == 3 and "not-a-number" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_videos_of_others_are_left_alone(sample, tmp_path):
    (tmp_path / "a").mkdir()
    write_mp4(tmp_path / "a" / "00003.mp4", Clip(noise(), 8))
    for extra in ((), ("--overwrite",)):
        done = sample("wan", "a cat", "--frames", 5, "--out", "a", *extra)
        assert done.status == 2 and "00003.mp4" in done.err
    (tmp_path / "a" / "00003.mp4").unlink()
    video(sample, "--out", "a")
    video(sample, "--out", "a", "--seed", 1, "--num", 2, "--overwrite")
    assert video(sample, "--out", "a", "--seed", 2, "--overwrite")["images"][0]["seed"] == 2
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"run.json", "00000.mp4"}


BAD_VIDEO = {
    "frames": ("wan", ("a cat", "--frames", 6), "6 frames do not fit WanPipeline", "nearest valid number is 5"),
    "frames above": ("cogvideox", ("a cat", "--frames", 13), "one more than a multiple of 8", "valid number is"),
    "no frame": ("wan", ("a cat", "--frames", 0), "frames is 0", "at least 1"),
    "frames text": ("wan", ("a cat", "--frames", "few"), "--frames", "invalid int"),
    "fps": ("wan", ("a cat", "--frames", 5, "--fps", 0), "fps is 0", "above 0"),
    "size": ("wan", ("a cat", "--frames", 5, "--size", "40x32"), "does not fit WanPipeline", "nearest valid size is"),
    "frames of images": ("pixart", ("a cat", "--frames", 5), "PixArtSigmaPipeline makes images", "takes no frames"),
    "fps of images": ("pixart", ("a cat", "--fps", 5), "PixArtSigmaPipeline makes images", "takes no fps"),
    "no prompt": ("wan", ("--frames", 5), "No prompt was given", "Say what to draw"),
    "class": ("wan", ("--class", "cat"), "WanPipeline, whose call takes no class", "as a prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VIDEO)
def test_bad_video(sample, tmp_path, case):
    model, argv, *said = BAD_VIDEO[case]
    done = sample(model, *argv, "--out", "run")
    assert done.status == 2 and done.out == "" and all(text in done.err for text in said)
    assert not list(tmp_path.iterdir())


# -- from classes, and from nothing -----------------------------------------------------------------------------------


def test_pixart_draws_at_its_own_sizes(sample):
    made = sample("pixart", "a cat", "--out", "a", "--json").json
    assert Image.open("a/00000.png").size == (32, 32) and made["call"]["use_resolution_binning"] is False


@pytest.mark.slow
def test_classes_by_number_and_name(sample, models):
    command = ("--num", 2, "--seed", 3, "--batch", 4, "--json")
    made = sample("dit", "--class", 1, "--class", "White Shark", *command, "--out", "a", size=None).json
    assert [image["prompt"] for image in made["images"]] == ["1", "1", "White Shark", "White Shark"]
    assert made["settings"]["classes"] == ["1", "White Shark"] and made["settings"]["prompts"] == []
    words = sample("dit", "goldfish", "2", *command, "--out", "b", size=None).json
    assert pixels(words) == pixels(made) and len(set(pixels(made))) == 4
    pipe = diffaccel.load(models / "dit")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(4)]
    images = pipe(class_labels=[1, 1, 2, 2], generator=generators, **made["call"]).images
    assert [pixels_sha256(image) for image in images] == pixels(made)
    assert {k: made["cost"][k] for k in ("nfe", "forwards", "calls")} == {"nfe": 8, "forwards": 16, "calls": 2}
    unguided = sample("dit", "--class", 1, "--guidance", 1, "--out", "c", "--json", size=None).json
    assert unguided["cost"]["nfe"] == unguided["cost"]["forwards"] == 2


def test_a_sampler_on_classes(sample):
    made = sample("dit", "tench", "--sampler", "euler", "--out", "a", "--json", size=None).json
    assert made["settings"]["methods"][0]["name"] == "euler" and made["cost"]["nfe"] == 2


@pytest.mark.parametrize("model", ["ddpm", "ddim"])
def test_nothing_to_ask_for(sample, models, model):
    made = sample(model, "--num", 3, "--batch", 2, "--json", size=None).json
    assert made["out"].startswith(f"out/{model}-") and made["settings"]["prompts"] == []
    assert [image["prompt"] for image in made["images"]] == [None] * 3 and len(set(pixels(made))) == 3
    assert made["cost"]["nfe"] == 6 and made["cost"]["calls"] == 4
    one = sample(model, "--seed", 2, "--json", size=None).json
    assert pixels(one) == [pixels(made)[2]]
    pipe = diffaccel.load(models / model)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=[torch.Generator().manual_seed(2)], **one["call"]).images[0]
    assert pixels_sha256(image) == pixels(one)[0]


BAD = {
    "prompt": ("ddpm", ("a cat",), "DDPMPipeline, whose call takes no prompt", "Leave the prompt out"),
    "class of nothing": ("ddim", ("--class", 3), "DDIMPipeline, whose call takes no class", "Leave the class out"),
    "no class": ("dit", (), "No class was given", "--class"),
    "both": ("dit", ("tench", "--class", 3), "Got a prompt and a class", "Give one"),
    "name": ("dit", ("--class", "goldfisch"), "Unknown class 'goldfisch'", "Did you mean 'goldfish'"),
    "number": ("dit", ("--class", 1000), "Unknown class '1000'", "the numbers 0 to 999 and 4 names, such as"),
    "second": ("dit", ("tench", "a red apple"), "Unknown class 'a red apple'", "DiTPipeline"),
    "size": ("dit", ("--class", 1, "--size", 64), "draws at one size only", "Leave the size out"),
    "size of nothing": ("ddpm", ("--size", 64), "draws at one size only", "DDPMPipeline"),
    "guidance": ("ddpm", ("--guidance", 3), "DDPMPipeline takes no guidance", "Leave it out"),
    "negative": ("dit", ("--class", 1, "--negative", "blur"), "takes no negative prompt", "DiTPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_classes(sample, tmp_path, case):
    model, argv, *said = BAD[case]
    done = sample(model, *argv, "--out", "run", size=None)
    assert done.status == 2 and done.out == "" and all(text in done.err for text in said)
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())


VIDEO = pytest.param("cogvideox", ("a cat", "--frames", 9), marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "asked"), [VIDEO, pytest.param("dit", ("1",), marks=pytest.mark.slow), ("ddim", ())])
def test_doctor_knows_what_will_run(sample, run, models, model, asked, monkeypatch):
    from diffaccel.cli import doctor

    monkeypatch.setattr(doctor, "examine", lambda full: {})
    monkeypatch.setitem(BACKENDS, "cpu", ReplayedCalls)  # it fits the model; that there is no GPU is another matter
    says = run("doctor", "--json", "--model", models / model).json["model"]["methods"]
    size = 32 if model == "cogvideox" else None
    for method in (m for m in says if m["fits"] is not None):
        name = method["name"]
        if (model, name) == ("cogvideox", "firstblock"):  # which needs two blocks; the tiny network has one
            continue
        if getattr(config_class(name), "worker", ""):  # what a plan must be made for first
            continue
        # a search needs a reward that knows what it looks at
        searches = getattr(config_class(name), "searches", False)
        more = (f"--{name}.reward", "compress", f"--{name}.budget", 80) if searches else ()
        option = "--sampler" if config_class(name).touches == "loop" else "--method"
        done = sample(model, *asked, option, name, *more, "--out", name, size=size)
        assert done.status == (0 if method["fits"] else 2), (method, done.err)
        assert method["fits"] or method["reason"].partition(", and ")[0] in done.err


def test_missing_prompts_are_told_before_weights_are_loaded(sample, monkeypatch):
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", lambda *a: pytest.fail("the model was opened"))
    assert "No prompt was given" in sample("wan").err and "No class was given" in sample("dit").err


def test_an_open_pipeline_is_asked_the_same(tmp_path):
    from diffaccel.runs.generate import generate_run

    pipe = tiny_more.make("dit")
    made = generate_run(Request(classes=("goldfish",), model="mine", steps=1), tmp_path / "a", pipe=pipe)
    assert made["images"][0]["prompt"] == "goldfish"
    with pytest.raises(DiffAccelError, match="No class was given"):
        generate_run(Request(model="mine"), tmp_path / "b", pipe=pipe)
    with pytest.raises(DiffAccelError, match="must be a tuple"):
        Request(classes="goldfish")
    assert class_labels(pipe, ["0", "Carassius auratus"]) == [0, 1]


def test_settings_of_image_runs_are_what_they_were(models):
    """New options are absent unless given, so that folders of older versions continue."""
    settings = Request(prompts=("a",), model="mine").settings("", torch.device("cpu"), torch.float32)
    assert {"classes", "frames", "fps"}.isdisjoint(settings)
