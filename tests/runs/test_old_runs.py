"""Folders and reports of the version before the modules moved: they are continued, compared and diffed.

``data/`` holds what its commands made with ``emoji-flux`` at 64 px and two steps: ``plain`` and ``dpmpp2m`` (finished),
``half`` (``plain``, stopped after the first of two pictures), ``eval-plain`` and ``eval-dpmpp2m`` (four prompts) and
``report.json``, their comparison. Versions of packages are part of a run's fingerprint, so the tests move a copy to
those that are installed; pixels depend on the CPU, so new pictures are compared with new ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffaccel import record
from diffaccel.cli import main

DATA = Path(__file__).parent / "data"
FINISHED = ("plain", "dpmpp2m", "eval-plain", "eval-dpmpp2m")
RESULT = ("sha256", "pixels_sha256")


def read(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def copied(name: str, target: Path) -> Path:
    """A copy of a run that tells the installed versions, in its record and in its markers."""
    folder = Path(shutil.copytree(DATA / name, target / name))
    run = read(folder)
    assert run["fingerprint"] == record.fingerprint(run["settings"])  # settings are still named as they were
    installed = record.versions()
    run["settings"]["versions"] = {package: installed[package] for package in run["settings"]["versions"]}
    run["fingerprint"] = record.fingerprint(run["settings"])
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    for path in (folder / ".chunks").glob("*.json"):
        marker = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": run["fingerprint"]}
        path.write_text(json.dumps(marker), encoding="utf-8")
    return folder


def repeat(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    """Run the command that made a folder once more, into it."""
    argv = read(folder)["command"][1:]
    argv[argv.index("--out") + 1] = str(folder)
    capsys.readouterr()
    status = main([*argv, *options, "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)


def without_results(images: list[dict]) -> list[dict]:
    return [{key: value for key, value in image.items() if key not in RESULT} for image in images]


@pytest.mark.slow
def test_a_run_that_was_stopped_is_completed(tmp_path, capsys):
    """Only the missing picture is made, and it is that of a run from the start."""
    folder, whole = copied("half", tmp_path), read(DATA / "plain")
    (kept,) = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / ".chunks").glob("*.json")]
    written = (folder / "00000.png").stat().st_mtime_ns
    done = repeat(folder, capsys)
    assert done["state"] == "finished" and [image["file"] for image in done["images"]] == ["00000.png", "00001.png"]
    assert done["images"][0] == kept["images"][0] == whole["images"][0]
    assert (folder / "00000.png").stat().st_mtime_ns == written
    assert without_results(done["images"]) == without_results(whole["images"])
    assert done["call"] == whole["call"] and not (folder / ".chunks").exists()
    assert {key: done["cost"][key] for key in ("nfe", "forwards", "calls")} == {"nfe": 4, "forwards": 8, "calls": 8}
    fresh = repeat(folder, capsys, "--overwrite")
    assert fresh["images"][1] == done["images"][1] and fresh["fingerprint"] == done["fingerprint"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_read_and_not_made_again(tmp_path, capsys, monkeypatch, name):
    folder = copied(name, tmp_path)
    monkeypatch.setattr("diffaccel.runs.loading.open_pipeline", lambda *a: pytest.fail("the model was opened"))
    done = repeat(folder, capsys)
    assert done["images"] == read(DATA / name)["images"] and done["cost"] == read(DATA / name)["cost"]


def compare(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    status = main(["eval", "compare", *map(str, options), "--device", "cpu", "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)


def test_runs_compare(capsys):
    """As they are, without the model and whatever versions made them."""
    made = compare(capsys, DATA / "plain", DATA / "dpmpp2m")
    assert [(run["name"], run["images"]) for run in made["runs"]] == [("plain", 2), ("dpmpp2m", 2)]
    numbers = {row["metric"]: (row["n"], row["detail"].get("identical_pairs")) for row in made["metrics"]}
    assert numbers["ssim"][0] == 2 and numbers["psnr"] == (1, 1)  # the first of the two pictures is the same in both


def test_a_comparison_gives_the_report_that_it_gave(capsys, tmp_path):
    before = json.loads((DATA / "report.json").read_text(encoding="utf-8"))
    after = compare(capsys, DATA / "eval-plain", DATA / "eval-dpmpp2m", "--report", tmp_path)
    assert after["runs"] == before["runs"] and after["baseline"] == before["baseline"]
    assert list(after["pairs"]) == list(before["pairs"]) and after["format"] == before["format"]
    rows = [{(row["run"], row["key"]): row for row in report["metrics"]} for report in (before, after)]
    assert [name for name in rows[1] if name in rows[0]] == list(rows[0])
    for name, old in rows[0].items():
        row = rows[1][name]
        assert (row["missing"], row["value"] is None) == (old["missing"], old["value"] is None)
        if row["family"] != "cost" and old["n"] is not None:  # the number of measurements is told there by now
            assert row["n"] + row["detail"].get("identical_pairs", 0) == old["n"]
        assert row["value"] is None or row["value"] == pytest.approx(old["value"], rel=1e-4)
    status = main(["eval", "diff", str(DATA / "report.json"), str(tmp_path / "report.json"), "--json"])
    changed = json.loads(capsys.readouterr().out)
    assert status == 0 and not any(changed[kind] for kind in ("beyond", "unsure", "gone"))


def test_a_report_is_diffed(capsys, tmp_path):
    """A number outside of the old report's interval is told."""
    report = json.loads((DATA / "report.json").read_text(encoding="utf-8"))
    next(row for row in report["metrics"] if row["metric"] == "psnr")["value"] = 20.0
    (tmp_path / "worse.json").write_text(json.dumps(report), encoding="utf-8")
    for other, told in ((DATA / "report.json", 0), (tmp_path / "worse.json", 1)):
        capsys.readouterr()
        assert main(["eval", "diff", str(DATA / "report.json"), str(other), "--json"]) == 0
        beyond = json.loads(capsys.readouterr().out)["beyond"]
        assert len(beyond) == told and all("PSNR" in text for text in beyond)
