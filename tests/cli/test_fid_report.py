"""``scripts/fid_report.py``: one command from a model's folder to a report, resumable, and nothing dropped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import measures
from diffaccel.eval.networks.extractors import extractor
from diffaccel.eval.report import accelerations, workspace
from diffaccel.eval.report.accelerations import make_report
from diffaccel.eval.report.plan import ReportPlan
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse
from scripts import fid_report

LOADED: list[str] = []  # networks of the report ``sd``
FEW = ["--batch", "3", "--threads", "1", "--turns", "6"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A model that draws from noise alone."""
    folder = tmp_path_factory.mktemp("noise") / "ddpm"
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path, capsys):
    def call(*words, out="report"):
        capsys.readouterr()
        status = fid_report.main([*map(str, words), *FEW, "--out", str(tmp_path / out), "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else None, captured.err

    return call


def text_of(folder):
    return [(folder / f"report.{kind}").read_text() for kind in ("json", "md", "html")]


@pytest.fixture(scope="module")
def sd(tmp_path_factory, models):
    """A report on the tiny SD: a sampler, one that this model cannot run, and fewer steps of the baseline."""
    out = tmp_path_factory.mktemp("sd") / "report"
    prompts = out.parent / "p.txt"
    prompts.write_text("\n".join(f"thing {i}" for i in range(6)))
    words = ["--model", models / "sd", "--prompts", prompts, "--baseline", "plain:steps=4,size=32"]
    words += ["--accel", "dpmpp2m:steps=2,size=32", "--accel", "plain:steps=2,size=36"]
    words += ["--clip", "emoji-clip-judge", "--reward", "emoji-clip-reward", *FEW, "--out", out]

    def loaded(name, **options):
        LOADED.append(name)
        return extractor(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        for room in (measures, workspace):
            patch.setattr(room, "extractor", loaded)
        assert fid_report.main([str(word) for word in words]) == 0
    return out, words


@pytest.mark.slow
def test_every_network_is_loaded_once(sd):
    assert sorted(LOADED) == ["emoji-clip-judge", "emoji-clip-reward", "tiny"]


@pytest.mark.slow
def test_a_report_on_a_folder(sd):
    out, _ = sd
    made = json.loads((out / "report.json").read_text())
    rows = {(row["metric"], row["run"]): row for row in made["metrics"]}
    fast = "dpmpp2m-steps=2-size=32x32"
    assert made["baseline"] == "plain-steps=4-size=32x32" and rows["ssim", fast]["floor"] is not None
    assert rows["speedup", fast]["interval"] is not None and rows["nfe", fast]["value"] == 2
    timing = json.loads((out / "timing.json").read_text())
    assert rows["speedup", fast]["value"] == pytest.approx(timing["variants"][1]["ratio"]["value"])
    answers = made["sections"]["equal_time"]["answers"]
    assert [answer["accelerated"].partition(",")[0] for answer in answers] == [fast, fast]
    assert all(answer["why"] or answer["judge"]["n"] == 6 for answer in answers)


@pytest.mark.slow
def test_what_cannot_run_is_in_all_three_files(sd):
    out, _ = sd
    for text in text_of(out):
        assert "Could not run" in text and "plain:steps=2,size=36x36" in text and "multiples of 8" in text


@pytest.mark.slow
def test_the_same_command_goes_on(sd, capsys):
    """Nothing is drawn or timed again but what is missing: here a run, half of it, and the report itself."""
    out, words = sd
    before = text_of(out)[0]
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/*.png")}
    run = out / "runs" / "dpmpp2m-steps=2-size=32x32"
    made = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**made, "state": "running"}))
    (run / "00004.png").unlink()
    (out / "report.json").unlink()
    assert fid_report.main([str(word) for word in words]) == 0
    again = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/*.png")}
    changed = {path.name for path in kept if again[path] != kept[path]}
    assert changed == {"00003.png", "00004.png", "00005.png"}  # the chunk of the missing picture
    old, new = (json.loads(text) for text in (before, text_of(out)[0]))
    assert [r for r in old["metrics"] if r["family"] != "cost"] == [r for r in new["metrics"] if r["family"] != "cost"]
    assert old["sections"]["equal_time"] == new["sections"]["equal_time"]  # measured once, kept


@pytest.mark.slow
def test_a_gate_fails_what_could_not_run(sd, capsys):
    _, words = sd
    status = fid_report.main([str(word) for word in [*words, "--fail-if", "nfe>100"]])
    said = capsys.readouterr().err
    assert status == 5 and "passed: nfe, less the baseline's, is" in said and "FAILED: it could not run" in said


@pytest.mark.slow
def test_all_methods_on_a_model_without_prompts(make, noise, monkeypatch, tmp_path):
    """Every registered method has its row: a run, or the reason why there is none."""
    import diffaccel.registry as registry

    chosen = {name: where for name, where in registry.names().items() if name in ("euler", "heun", "scheduler")}
    chosen["lost"] = "diffaccel.samplers.lost:Lost"
    monkeypatch.setattr(registry, "names", lambda: chosen)
    status, made, _ = make("--model", noise, "--baseline", "plain:steps=3", "--all", "--num", 4)
    assert status == 0 and all(row["family"] != "alignment" for row in made["metrics"])
    runs = {run["name"].partition("-")[0] for run in made["runs"]}
    failed = made["sections"]["could_not_run"]["failed"]
    assert {name.partition(":")[0] for name in failed} | runs == {"plain", *chosen}
    assert "cannot be imported" in failed["lost"]
    again = make("--model", noise, "--baseline", "plain:steps=3", "--all", "--num", 4, "--fail-if", "nfe>0")
    assert again[0] == 5


def test_all_has_every_preset_and_kind_and_may_leave_out_searches():
    plan = {"request": Request(prompts=("a",)), "baseline": parse("plain:steps=4"), "everything": True}
    names = [variant.name for variant in accelerations.accelerations(ReportPlan(**plan, searches=False))[0]]
    presets = {"speed", "bottleneck", "selflift-zero", "lightx2v"}
    assert {f"bottleneck:steps=4,preset={preset}" for preset in presets} <= set(names)
    assert {"diffusers_cache:steps=4", "diffusers_cache:steps=4,kind=mag", "spectrum:steps=4"} <= set(names)
    assert not any(name.startswith(("bon", "rbf", "smc")) for name in names)
    assert "bon:steps=4" in [variant.name for variant in accelerations.accelerations(ReportPlan(**plan))[0]]


@pytest.mark.slow  # eval compare and eval fid take statistics in the fast run
def test_statistics_as_reference(make, noise, tmp_path, run):
    """A file of mean and covariance: its distance is that of ``eval fid``, and the baseline has one too."""
    images = tmp_path / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    from PIL import Image

    for i in range(100):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / f"{i}.png")
    assert run("eval", "stats", images, "-o", tmp_path / "ref.npz").status == 0
    words = ["--model", noise, "--baseline", "plain:steps=2", "--accel", "plain:steps=1", "--num", 100]
    status, made, err = make(*words, "--reference", tmp_path / "ref.npz", "--no-other-seeds", "--no-equal-time")
    assert status == 0, err
    rows = {row["run"]: row for row in made["metrics"] if row["metric"] == "fd"}
    fd = run("eval", "fid", tmp_path / "report" / "runs" / "plain-steps=1", tmp_path / "ref.npz", "--json").json
    assert rows["plain-steps=1"]["value"] == pytest.approx(fd["metrics"][0]["value"], rel=1e-6)
    delta = rows["plain-steps=1"]["value"] - rows["plain-steps=2"]["value"]
    assert rows["plain-steps=1"]["delta"] == pytest.approx(delta, rel=1e-6)
    assert rows["plain-steps=1"]["m"] == 100


def test_nothing_that_could_run(make, noise):
    status, made, err = make("--model", noise, "--accel", "plain:size=20", "--num", 2, "--baseline", "plain:steps=2")
    assert status == 2 and made is None and "None of the accelerations could run" in err and "one size only" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to compare"),
        (["--accel", "plain"], "there twice"),
        (["--accel", "hern"], "Did you mean 'heun'"),
        (["--accel", "heun", "--prompts", "none.txt"], "no prompt file"),
        (["--accel", "heun", "--fail-if", "x!1"], "gate"),
    ],
)
def test_bad_input(make, noise, words, said):
    status, made, err = make("--model", noise, *words)
    assert status == 2 and said in err and made is None


def test_a_judge_that_chooses_is_refused(tmp_path, models):
    request = Request(prompts=("a",), model=str(models / "sd"))
    plan = ReportPlan(
        request=request, baseline=parse("plain:steps=2"), accelerated=(parse("heun:steps=2"),),
        judges=("emoji-clip-judge",), reward="emoji-clip-judge",
    )  # fmt: skip
    with pytest.raises(DiffAccelError, match="judge its own choice"):
        make_report(plan, tmp_path)
    assert not any(tmp_path.iterdir())
