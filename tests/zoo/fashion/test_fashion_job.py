"""The job of fashion-unet on a few made pictures: data, stages, students, numbers, weights that travel."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from fashion_data import make_data
from safetensors.torch import load_file

from diffaccel.distill import SIMFewStepScheduler, TrajectoryScheduler
from diffaccel.errors import DiffAccelError
from diffaccel.training.loop import Deadline
from diffaccel.zoo import packing
from scripts.zoo import turns
from scripts.zoo.fashion import classifier, data, export, fetch, job, recipe, score, students, unet
from scripts.zoo.fashion.students import Student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("fashion") / "data")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["job", *map(str, arguments)])
    job.main()


def test_pictures_are_read_and_padded(pictures: Path) -> None:
    part = data.load(pictures, "train", "cpu")
    assert part.images.shape == (80, 28, 28) and part.labels.tolist()[:12] == [*range(10), 0, 1]
    x = data.padded(part.images)
    assert x.shape == (80, 1, 32, 32) and bool((x[:, :, :2] == -1).all()) and float(x.max()) <= 1
    assert torch.equal(data.to_images(x), part.images)
    assert torch.equal(data.one_of_each(part, 20), part.images[:20])


def test_files_that_are_missing_or_damaged_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match=r"scripts\.zoo\.fashion\.fetch"):
        data.load(tmp_path, "train", "cpu")
    whole = gzip.decompress((pictures / "t10k-labels-idx1-ubyte.gz").read_bytes())
    for content, text in (
        (whole[:-3], "does not hold the"),
        (b"\x00\x00\x0b\x01" + whole[4:], "no idx file"),
        (gzip.compress(whole)[:-9], "is damaged"),
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DiffAccelError, match=text):
            data.read_idx(tmp_path / "x")
    with pytest.raises(DiffAccelError, match="missing or not that of dataset-fashion-mnist"):
        fetch.take(pictures, tmp_path / "taken")


def test_students_are_named() -> None:
    assert Student.parse("sim") == Student("sim", 1, "mixture", 0)
    assert Student.parse("diff-instruct:3") == Student("diff-instruct", 1, "mixture", 3)
    assert Student.parse("simx2:1").name == "sim-2step-1" and Student.parse("simx4-last").name == "sim-4step-last-0"
    with pytest.raises(DiffAccelError, match="Did you mean 'sid'"):
        Student.parse("sied")
    for text in ("simx0", "sim:a", "simx2-first"):
        with pytest.raises(DiffAccelError):
            Student.parse(text)
    with pytest.raises(SystemExit, match="Unknown preset"):
        job.stages.run(lambda options: Student.parse("sied"), _Options(), job.STAGES)  # type: ignore[arg-type]


class _Options:
    stages = "score"


def test_the_networks_have_the_sizes_that_are_promised(tmp_path: Path) -> None:
    full = recipe.get("full")
    export.pack(tmp_path, "model", unet.build(full, 0), unet.own_scheduler(), {})
    facts = json.loads((tmp_path / "model" / "card.json").read_text())
    assert 1.6e6 < facts["parameters"] and facts["bytes"]["packed"] <= export.LARGEST and facts["fits"]
    judge = classifier.build(full, 0)
    packed = export.pack_classifier(tmp_path, judge, 0.9)
    state = load_file(packing.unpack(packed, tmp_path / "plain") / "model.safetensors")
    assert all(torch.equal(state[name], p.half()) for name, p in judge.named_parameters())
    with pytest.raises(DiffAccelError, match="Did you mean 'full'"):
        recipe.get("ful")
    for preset in students.PRESETS:
        assert Student(preset, 1, "mixture", 0).config(full, 100).steps == 100


def test_the_teacher_draws_with_its_stock_scheduler_as_euler_does() -> None:
    network = unet.build(recipe.get("tiny"), 0).eval()
    labels = torch.arange(4)
    drawn = unet.draw(network, unet.own_scheduler(), labels, 3, 7, torch.float32)
    x = torch.randn((4, 1, 32, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for step in range(3):
            x = x - unet.ask(network, x, torch.full((4,), 1 - step / 3), labels) / 3
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


def test_a_student_draws_with_its_scheduler_as_training_draws() -> None:
    from diffaccel.distill.drawing import generate

    network, config = unet.build(recipe.get("tiny"), 0).eval(), Student("sim", 1, "mixture", 0).config(recipe.TINY, 9)
    drawn = unet.draw(network, unet.student_scheduler(config), torch.arange(10), 1, 7, torch.float32)
    z = torch.randn((10, 1, 32, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        own = generate(unet.teacher_of(network, 10), network, z, 0, config)
    torch.testing.assert_close(drawn, own, rtol=1e-4, atol=1e-4)
    few = Student("sim", 2, "last", 0).config(recipe.TINY, 9)
    assert type(unet.student_scheduler(few)) is SIMFewStepScheduler and few.student_match == "last"  # type: ignore
    jumps = Student("tscd", 2, "mixture", 0).config(recipe.TINY, 9)
    assert type(unet.student_scheduler(jumps)) is TrajectoryScheduler and jumps.segments == (8, 4, 2)  # type: ignore
    drawn = unet.draw(network, unet.student_scheduler(jumps), torch.arange(10), 2, 7, torch.float32)
    with torch.no_grad():
        own = generate(unet.teacher_of(network, 10), network, z, 0, jumps)
    torch.testing.assert_close(drawn, own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_student_begins_with_one_of_trajectories_within_its_seconds(tmp_path: Path) -> None:
    one, network = Student.parse("tscd-sim:3"), unet.build(recipe.TINY, 0).eval()
    assert one.first == Student("tscd", 1, "mixture", 3) and Student.parse("sim").first is None
    with pytest.raises(DiffAccelError, match="Leave it out"):
        Student.parse("tscdx2-last")
    count = students.turns_of(one, network, recipe.TINY, tmp_path, 9.0, torch.float32)
    common = {"count": count, "dtype": torch.float32, "look": lambda network: {"seen": 1.0}, "tell": lambda text: None}
    assert not students.distil(one, network, recipe.TINY, tmp_path, deadline=Deadline(0.0), **common)
    assert students.load(one, recipe.TINY, tmp_path, CPU) is None
    assert students.distil(one, network, recipe.TINY, tmp_path, deadline=Deadline(600.0), **common)
    found = students.progress_of(one, tmp_path)
    assert found["turns"] == count and found["first"]["turns"] == count and found["pictures"] == 2 * 10 * count
    log = (one.first_folder(tmp_path) / "log.jsonl").read_text()
    assert '"seen"' in log and "trajectory_error" in log and students.load(one, recipe.TINY, tmp_path, CPU) is not None


class _Counted:
    """A run that makes 30 turns in 20 s while it warms up, and then four a second."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0

    def run(self, deadline: Deadline) -> None:
        self.step, self.seconds = (30, 20.0) if self.step == 0 else (self.step + 40, self.seconds + 10)


def test_the_number_of_turns_is_measured_once(tmp_path: Path) -> None:
    file, left = tmp_path / "new" / "turns.json", 100.0
    seconds = left + turns.WARM_SECONDS + turns.MEASURED_SECONDS
    assert turns.planned(file, seconds, lambda folder: _Counted()) == int(4 * left * turns._SAFETY)  # type: ignore
    assert turns.planned(file, 1.0, lambda folder: pytest.fail("measured again")) == int(4 * left * turns._SAFETY)
    assert turns.planned(tmp_path / "known.json", 1.0, lambda folder: pytest.fail("measured"), 7) == 7
    one = Student("sim", 1, "mixture", 0)
    network = unet.build(recipe.TINY, 0)
    assert students.turns_of(one, network, recipe.TINY, tmp_path, 9.0, torch.float32) == recipe.TINY.student_turns
    assert (one.folder(tmp_path) / "turns.json").is_file()


def test_a_classifier_learns_and_goes_on_where_it_stopped(pictures: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    part = data.load(pictures, "train", "cpu")
    longer = replace(recipe.TINY, classifier=replace(recipe.TINY.classifier, samples=640, lr=2e-2))
    classifier.train(part, longer, tmp_path, deadline=Deadline(0.0))
    run = classifier.train(part, longer, tmp_path, deadline=Deadline(60.0))
    assert run.finished and run.step == 40
    network = classifier.load(tmp_path, longer, CPU)
    assert network is not None
    scorer = score.Scorer(network, part, data.load(pictures, "t10k", "cpu"), 20, 10, torch.float32)
    assert scorer.accuracy > 0.5 and scorer.floor > 0
    assert score.ratio(3.0, 2.0, 1.0) == 2.0 and score.ratio(3.0, 1.0, 1.0) is None


@pytest.mark.slow
def test_the_whole_job_resumes_and_its_models_travel(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    common = ("--recipe", "tiny", "--data", pictures, "--work", work, "--out", out, "--device", "cpu")
    common += ("--minutes", 2, "--score-seconds", 1, "--students", "sim:0,simx2-last:1")
    call(monkeypatch, *common, "--stages", "student,score")
    assert "waits for the teacher" in capsys.readouterr().out
    call(monkeypatch, *common, "--stages", "classifier,teacher")
    call(monkeypatch, *common)
    told = capsys.readouterr().out
    assert "teacher: is finished" in told and "sim-1step-0 is finished" in told
    report = json.loads((out / "report.json").read_text())
    assert set(report["teacher"]) == {"2", "1"} and set(report["students"]) == {"sim-1step-0", "sim-2step-last-1"}
    assert set(report["packed"]) == {"fashion-unet", "fashion-unet-sim-1step-0", "fashion-unet-sim-2step-last-1"}
    assert report["students"]["sim-1step-0"]["turns"] == 3
    curves = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    assert any(line["stage"] == "sim-1step-0" and "fd" in line and "distance@0.5" in line for line in curves)
    assert len(list(out.iterdir())) <= 8
    call(monkeypatch, *common, "--stages", "score")  # nothing is trained again
    again = json.loads((out / "report.json").read_text())
    assert again["students"] == report["students"] and again["teacher"] == report["teacher"]
    monkeypatch.setattr(sys, "argv", ["export", "--receive", str(out), "--zoo", str(tmp_path / "zoo")])
    export.main()
    packed = tmp_path / "zoo" / "fashion-unet-1step"
    assert json.loads((packed / "card.json").read_text())["name"] == "fashion-unet-1step"
    plain = packing.unpack(packed, tmp_path / "plain")
    assert UNet2DModel.from_pretrained(plain / "unet").config.num_class_embeds == 11
    second = tmp_path / "second"
    call(monkeypatch, *common[:4], "--work", second, *common[6:], "--resume", out, "--stages", "teacher")
    assert "teacher: is finished" in capsys.readouterr().out
    for ours, theirs in zip(
        unet.load(second, recipe.TINY, CPU).parameters(), unet.load(work, recipe.TINY, CPU).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
