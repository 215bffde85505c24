"""What changed between two reports: beyond an interval, without one, gone and added."""

from __future__ import annotations

import copy
import json

import pytest

from diffaccel.cli import main
from diffaccel.errors import DiffAccelError
from diffaccel.eval.report import changes


def row(metric, value, *, low=None, high=None, better="higher", **more):
    interval = None if low is None else {"low": low, "high": high}
    made = {"run": "fast", "metric": metric, "key": metric, "value": value, "interval": interval, "better": better}
    return {**made, "delta": None, "delta_interval": None, **more}


def report(*rows, **versions):
    return {"metrics": list(rows), "versions": versions}


OLD = report(
    row("ssim", 0.9, low=0.88, high=0.92), row("psnr", 30.0, low=29, high=31), row("nfe", 8.0, better="lower"),
    row("clip_score", 80.0, low=70, high=90, delta=-0.1, delta_interval={"low": -0.2, "high": 0.0}), torch="2.11",
)  # fmt: skip


def changed(**values):
    new = copy.deepcopy(OLD)
    for entry in new["metrics"]:
        entry.update(values.get(entry["metric"], {}))
    return changes.changes(OLD, new)


def test_nothing_changed():
    assert not any(changed().values())
    assert not any(changed(nfe={"value": 8.01}).values())  # not at the precision that is printed


def test_only_what_is_outside_of_the_interval_is_told():
    assert not any(changed(ssim={"value": 0.9199}).values())
    found = changed(ssim={"value": 0.95}, psnr={"value": 28.5})
    assert found["beyond"] == [
        "fast: ssim, value 0.9000 -> 0.9500, better, outside of 0.8800 to 0.9200",
        "fast: psnr, value 30.00 -> 28.50, worse, outside of 29.00 to 31.00",
    ]
    assert not found["unsure"]


def test_paired_differences_are_compared_where_there_are_some():
    assert changed(clip_score={"value": 79.6, "delta": -0.5})["beyond"] == [
        "fast: clip_score, difference -0.10 -> -0.50, worse, outside of -0.20 to 0.00"
    ]


def test_without_an_interval():
    assert changed(nfe={"value": 4.0})["unsure"] == ["fast: nfe, value 8.0 -> 4.0, better"]
    assert changed(ssim={"value": None})["unsure"] == ["fast: ssim, value 0.9000 -> none"]


def test_few_prompts_get_no_verdict():
    old = report(row("ssim", 0.9, low=0.88, high=0.92), row("psnr", 30.0, low=29, high=31))
    for entry, prompts in zip(old["metrics"], (6, 10), strict=True):
        entry["interval"]["units"] = prompts
    new = report(row("ssim", 0.5), row("psnr", 20.0))
    sentences = changes.changes(old, new)
    assert sentences["unsure"] == ["fast: ssim, value 0.9000 -> 0.5000, too few prompts (n = 6) for a verdict"]
    assert len(sentences["beyond"]) == 1 and ", worse" in sentences["beyond"][0]


def test_rows_and_versions_of_one_report_alone():
    new = report(*OLD["metrics"][1:], row("lpips", 0.1), torch="2.14")
    found = changes.changes(OLD, new)
    assert found["gone"] == ["fast: ssim"] and found["added"] == ["fast: lpips"]
    assert found["made"] == ['torch: "2.11" -> "2.14"']


def test_the_command(tmp_path, capsys):
    new = copy.deepcopy(OLD)
    new["metrics"][0]["value"] = 0.5
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, made in zip(files, (OLD, new), strict=True):
        file.write_text(json.dumps(made))
    assert main(["eval", "diff", str(files[0]), str(files[1])]) == 0
    assert capsys.readouterr().out.startswith(
        "Beyond the old report's intervals:\n  fast: ssim, value 0.9000 -> 0.5000, worse"
    )
    (tmp_path / "report.json").write_text(json.dumps(OLD))
    assert main(["eval", "diff", str(files[0]), str(tmp_path)]) == 0  # the folder of a report, too
    assert capsys.readouterr().out == "Nothing changed.\n"
    assert main(["eval", "diff", str(files[0]), str(files[1]), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["beyond"]) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "no report")]
)
def test_files_that_are_no_reports(tmp_path, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DiffAccelError, match=message):
        changes.read(file)


@pytest.mark.parametrize("value", ["1", float("nan"), [1]])
def test_a_damaged_report_is_one_sentence_that_names_the_part(tmp_path, value):
    values = report(row("ssim", 0.5), row("psnr", value))
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(DiffAccelError, match=r"report\.json' is damaged: metrics\[1\]\.value is missing or no such"):
        changes.read(tmp_path / "report.json")


def test_a_report_of_a_later_version_is_refused(tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**report(row("ssim", 0.5)), "format": 999}))
    with pytest.raises(DiffAccelError, match=r"report\.json' has format 999, and this diffaccel reads up to \d\."):
        changes.read(file)
