"""The search on a population that is known: what it finds, what it leaves out, and that a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning import certificate, choice
from diffaccel.eval.tuning.halving import PlanEntry, Sizes
from diffaccel.eval.tuning.journal import FILE, Journal
from diffaccel.eval.tuning.result import preset_values
from diffaccel.eval.tuning.space import TuningSpace
from diffaccel.runs.variant import Variant
from scripts.tuner_bed import METHODS, STEPS, Drift, Echo, ToyBed, search_on, tuning_on

SIZES = Sizes((4, 8, 16), bracket=8, held_out=32, search=120.0, turns=6)
ABOUT = {"measured": {"device": {"name": "toy"}, "baseline": "plain:steps=20"}, "model": {"model": "toy"}}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    bed = ToyBed(1)
    search = search_on(bed, tmp_path_factory.mktemp("tuned"), SIZES)
    return search, *tuning_on(search)


def test_it_finds_a_plan_that_beats_every_method_as_it_comes(tuned):
    search, chosen, certificates = tuned
    bed = search.bed
    assert certificates["fast"]["keeps"]
    fast = chosen["fast"].variant
    assert bed.loss(fast) <= 0.1
    defaults = [Variant((cls(),), {"steps": STEPS}) for cls in METHODS.values() if cls.name != "bent"]
    kept = [plan for plan in defaults if bed.loss(plan) <= 0.1]
    assert kept and bed.seconds(fast) < min(map(bed.seconds, kept))


def test_a_method_that_never_runs_is_left_out(tuned):
    search, chosen, _ = tuned
    refused = [entry for entry in search.entries.values() if entry.refused]
    assert refused and all("straight" in entry.refused for entry in refused)
    assert all(config.name != "bent" for entry in chosen.values() for config in entry.variant.methods)


def test_held_out_prompts_are_drawn_after_the_choice_and_for_chosen_plans_alone(tuned):
    search, chosen, _ = tuned
    drawn = [line for line in search.bed.drawn if "held-out" in line]
    assert {line.partition(" on ")[0] for line in drawn} == {entry.name for entry in chosen.values()}
    assert list(chosen) == ["quality", "balanced", "fast"][-len(chosen) :]
    assert search.journal.get("chosen") == {name: entry.name for name, entry in chosen.items()}


def test_worse_plans_see_fewer_prompts(tuned):
    search, _, _ = tuned
    counts = sorted(entry.count for entry in search.measured())
    assert counts[0] == 4 and counts[-1] == 16
    dropped = [entry for entry in search.measured() if entry.count == 4]
    assert len(dropped) >= len(search.measured()) / 4


def test_the_preset_names_neighbours_and_cliffs(tuned):
    search, chosen, certificates = tuned
    values = json.loads(json.dumps(preset_values(search, chosen, certificates, ABOUT), allow_nan=False))
    assert values["default"] == "fast" and values["points"]["baseline"] == {"methods": [], "call": {"steps": 20}}
    own = chosen["fast"].params
    beside = {search.space.variant(params).name for params in search.space.neighbours(own)}
    assert {row["plan"] for row in values["neighbours"]} == beside
    losses = [row["loss"] for row in values["neighbours"]]
    assert ("No cliff" in values["cliffs"][0]) == (max(losses) <= 2)
    assert "held-out prompts" in values["points"]["fast"]["certificate"]["sentence"]


def test_the_sequence_ends_with_the_first_that_fails(tmp_path):
    """A safer plan that fails leaves the faster ones untested, so that one test's error is that of all."""
    bed = ToyBed(1)
    search = search_on(bed, tmp_path, SIZES)
    search.run()
    chosen = choice.choose(search)
    assert len(chosen) > 1
    safest = next(iter(chosen.values()))
    honest = bed.loss
    bed.loss = lambda plan: 0.3 if plan.name == safest.name else honest(plan)  # worse on held-out prompts
    certificates = certificate.certify(search, chosen)
    assert list(certificates) == [next(iter(chosen))] and not any(c["keeps"] for c in certificates.values())
    values = preset_values(search, chosen, certificates, ABOUT)
    assert values["default"] == "baseline" and list(values["points"]) == ["baseline"]


def test_the_baseline_itself_is_no_plan_and_the_safest_is_tried_where_none_is_sure(tmp_path):
    bed = ToyBed(1, jitter=0.5)
    search = search_on(bed, tmp_path, SIZES, rule="ssim<0.999")  # which no method keeps for sure
    search.entries[bed.baseline().name] = PlanEntry(search.space.plain(), bed.baseline())
    search.measure(search.entries[bed.baseline().name], 16)
    search.run()
    assert bed.baseline().name not in {entry.name for entry in search.faster()}
    chosen = choice.choose(search)
    assert all(entry.name != bed.baseline().name for entry in chosen.values())
    certificates = certificate.certify(search, chosen)
    assert all(bed.loss(chosen[name].variant) <= 0.001 for name in certificates if certificates[name]["keeps"])


def test_the_nearest_plan_within_a_time(tmp_path):
    bed = ToyBed(1)
    search = search_on(bed, tmp_path, SIZES, rule="seconds>0.5", nearness="ssim<0")
    search.run()
    chosen = choice.choose(search, best_within_time=True)
    certificates = certificate.certify(search, chosen)
    assert list(chosen) == ["fast", "quality"] and all(c["keeps"] for c in certificates.values())
    assert set(certificates["quality"]["measures"]) == {"ssim", "seconds"}
    fast, aim = (entry.variant for entry in chosen.values())
    assert bed.seconds(fast) < bed.seconds(aim) and bed.loss(fast) > bed.loss(aim)
    assert preset_values(search, chosen, certificates, ABOUT)["default"] == "quality"
    plan = chosen["quality"].variant
    assert bed.seconds(plan) <= 0.5
    steps_alone = [Variant((), {"steps": n}) for n in search.space.steps]
    assert bed.loss(plan) < min(bed.loss(other) for other in steps_alone if bed.seconds(other) <= 0.5)


def test_a_limit_that_turns_out_too_near_leaves_a_faster_plan(tmp_path):
    """Timed again, the nearest plan is over its limit; the faster one, tested before it, keeps its certificate."""
    bed = ToyBed(1)
    search = search_on(bed, tmp_path, SIZES, rule="seconds>0.5", nearness="ssim<0")
    search.run()
    chosen = choice.choose(search, best_within_time=True)
    aim, honest = chosen["quality"].variant.name, bed.seconds
    bed.seconds = lambda plan: honest(plan) * (1.5 if plan.name == aim else 1.0)
    certificates = certificate.certify(search, chosen)
    assert [name for name in certificates if certificates[name]["keeps"]] == ["fast"]
    values = preset_values(search, chosen, certificates, ABOUT)
    assert values["default"] == "fast" and list(values["failed"]) == ["quality"]


class Stopped(BaseException):
    """A kill."""


@pytest.mark.slow
def test_a_stop_at_any_measurement_changes_nothing(tuned, tmp_path):
    """Stopped in every fifth measurement and gone on with another bed: the same plans, and nothing drawn twice."""
    search, chosen, certificates = tuned
    drawn = []
    for _ in range(100):
        bed, left = ToyBed(1), [5]
        honest = bed.evaluate

        def stopping(plan, part, honest=honest, left=left):
            left[0] -= 1
            if not left[0]:
                raise Stopped
            return honest(plan, part)

        bed.evaluate = stopping
        again = search_on(bed, tmp_path, SIZES)
        try:
            chosen_again, certificates_again = tuning_on(again)
            break
        except Stopped:
            pass
        finally:
            drawn += bed.drawn
    assert certificates_again == certificates
    assert {n: e.name for n, e in chosen_again.items()} == {n: e.name for n, e in chosen.items()}
    assert len(drawn) == len(set(drawn)) and set(drawn) <= set(search.bed.drawn)


def test_a_torn_journal_is_mended_and_another_tuning_is_refused(tmp_path):
    journal = Journal(tmp_path, {"gate": "ssim<0.9"})
    journal.put("a", {"spent": 1.5})
    space = TuningSpace.of({"drift": Drift, "echo": Echo}, 8)
    journal.ask(0, 2, space.distributions(), [], 0)
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'{"op_code": 1, "half')
    (tmp_path / f"{FILE}.lock").symlink_to(tmp_path / FILE)
    again = Journal(tmp_path, {"gate": "ssim<0.9"})
    assert again.get("a") == {"spent": 1.5} and again.spent() == 1.5 and again.begun(0)
    with pytest.raises(DiffAccelError, match=r"holds a tuning with gate ssim<0\.9, not psnr<30"):
        Journal(tmp_path, {"gate": "psnr<30"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_text("no journal\n")
    with pytest.raises(DiffAccelError, match="is no journal of a tuning"):
        Journal(tmp_path / "other", {})


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_plan(tuned, tmp_path):
    _, chosen, certificates = tuned
    code = "import sys; from tests.eval.tuning.test_search import child; child(sys.argv[1])"
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([root, os.path.join(root, "tests", "support")])
    environment = {**os.environ, "PYTHONPATH": path, "SLOWLY": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment)
    journal = tmp_path / FILE
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"spent") > 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env={**environment, "SLOWLY": ""}, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["chosen"] == {name: entry.name for name, entry in chosen.items()}
    assert result["certificates"] == json.loads(json.dumps(certificates))


def child(folder: str) -> None:
    """Run the tuning of the fixture into a folder; slowly, where a kill is to find it at work."""
    bed = ToyBed(1)
    if os.environ.get("SLOWLY"):
        honest = bed.evaluate
        bed.evaluate = lambda plan, part: time.sleep(0.05) or honest(plan, part)  # type: ignore[method-assign]
    chosen, certificates = tuning_on(search_on(bed, Path(folder), SIZES))
    result = {"chosen": {name: entry.name for name, entry in chosen.items()}, "certificates": certificates}
    (Path(folder) / "result.json").write_text(json.dumps(result))
