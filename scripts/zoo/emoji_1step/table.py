"""One table of emoji-flux's students beside their teacher: scores, distances, seconds of whole calls, with intervals.

    python -m scripts.zoo.emoji_1step.table --work WORK --out OUT [--steps 1,2,4] [--kind nvidia-h200]

A student is what the job packed in WORK or, where it has no run of so many steps, the installed ``emoji-flux-Nstep``.
All rows draw the same prompts, which no training had, from the same seeds; differences and ratios are paired. Seconds
are of calls as users make them, text encoders and decoder included, in turns of all rows. "Equal seconds" is the
teacher with the fewest steps that takes at least as long. Features of every row are kept in WORK: a command that was
stopped goes on, and times what it has not timed yet. OUT gets ``emoji-flux-students_KIND.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import statistics_files
from diffaccel.eval.metrics import frechet_intervals
from diffaccel.eval.sets import prompts as prompt_sets
from diffaccel.eval.uncertainty.influence import LEAST_ROWS
from diffaccel.eval.uncertainty.intervals import Interval, bootstrap_mean, median_ratio, paired_difference
from diffaccel.files import sha256, write_json, write_png
from diffaccel.record import describe_device, now, versions
from diffaccel.training.checkpoint import load_tensors, save_tensors
from scripts.timing import in_turns
from scripts.zoo.emoji import score as pictures
from scripts.zoo.emoji_1step import export
from scripts.zoo.emoji_1step import recipe as recipes
from scripts.zoo.emoji_1step.export import BASE

JUDGE, SEED, SHOWN = "emoji-clip-judge", 1000, 16
HEAD = (
    "| drawn by | rows a picture | judge | Fréchet distance | seconds a call | the first row takes, times |\n"
    + "|---" * 6
    + "|"
)


@dataclass(frozen=True)
class Row:
    """Who draws, in how many steps.

    Attributes:
        packed: folder of a student's packed model; None of the teacher.
    """

    steps: int
    packed: Path | None = None

    @property
    def name(self) -> str:
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{'teacher' if self.packed is None else 'student'}, {steps}"

    @property
    def guidance(self) -> float:
        return zoo.call_defaults(BASE)["true_cfg_scale"] if self.packed is None else 1.0

    @property
    def rows(self) -> int:
        """Network rows of a picture."""
        return self.steps * (2 if self.packed is None else 1)

    @property
    def identity(self) -> str:
        """SHA-256 of what is packed."""
        return sha256((self.packed or export.packed_base()) / "manifest.json")


def student_of(steps: int, work: Path, seed: int) -> Row:
    """Return the student of so many steps: of a run in the work folder, else the installed one."""
    name = f"{BASE}-{steps}step"
    places = (work / f"student-{steps}step-{seed}" / "packed" / name, export.packed_base().with_name(name))
    for place in places:
        if (place / "manifest.json").is_file():
            return Row(steps, place)
    raise DiffAccelError(
        f"There is no student of {steps} steps: neither '{places[0]}', nor an installed {name}. Make one: "
        f"python -m scripts.zoo.emoji_1step.job --steps {steps} --work {work}."
    )


class Table:
    """Rows, what they draw, and what is measured of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.recipe = options, recipes.get(options.recipe)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.texts = self._prompts(options.pictures or self.recipe.scored)
        steps = [int(text) for text in options.steps.split(",")]
        self.students = [student_of(number, options.work, options.seed) for number in sorted(set(steps))]
        self.teachers = [Row(number) for number in sorted({*self.recipe.teacher_steps, *steps}, reverse=True)]
        self.scratch = tempfile.TemporaryDirectory()
        self._open: dict[tuple[str, torch.dtype], Any] = {}

    @staticmethod
    def _prompts(count: int) -> list[str]:
        texts = list(prompt_sets.read("emoji-1000").texts)
        return [texts[row * len(texts) // count] for row in range(count)]

    @cached_property
    def judge(self) -> pictures.Judge:
        """The CLIP that judges, and neither trains nor searches."""
        return pictures.Judge(zoo.path(JUDGE), str(self.device))

    def pipe(self, row: Row, dtype: torch.dtype) -> Any:
        """Return the pipeline of a row, as users load it."""
        import diffaccel

        key = row.identity, dtype
        if key not in self._open:
            folder = zoo.path(BASE) if row.packed is None else Path(self.scratch.name) / row.identity
            if row.packed is not None and not folder.is_dir():
                export.unpacked(row.packed, folder)
            pipe = diffaccel.load(folder, dtype=dtype).to(self.device)
            pipe.set_progress_bar_config(disable=True)
            self._open[key] = pipe
        return self._open[key]

    def measured(self, row: Row) -> dict[str, Tensor]:
        """Return features ``(N, d)``, cosines ``(N,)`` to prompts, and the first pictures; kept from call to call."""
        file = self.options.work / "table" / f"{row.name.replace(', ', '-').replace(' ', '')}.safetensors"
        key = "/".join([row.identity, self.recipe.name, str(self.recipe.size), str(len(self.texts))])
        if file.is_file():
            tensors, facts = load_tensors(file)
            if facts.get("key") == key:
                return tensors
        drawn = pictures.draw(
            self.pipe(row, torch.float32), self.texts, size=self.recipe.size, steps=row.steps, guidance=row.guidance,
            seed=SEED, batch=self.recipe.batch,
        )  # fmt: skip
        features = self.judge.images(drawn)
        found = {
            "features": features,
            "cosines": (F.normalize(features, dim=1) * self.judge.texts(self.texts)).sum(1),
            "pictures": ((drawn[:SHOWN] + 1) * 127.5).round().clamp(0, 255).byte(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(found, file, {"key": key})
        print(f"drawn: {row.name}", flush=True)
        return found

    def seconds(self, batch: int) -> dict[str, list[float]]:
        """Return the seconds of whole calls of every row, in turns, for so many pictures a call."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        texts = [self.texts[number % len(self.texts)] for number in range(batch)]

        def call(row: Row) -> Any:
            pipe = self.pipe(row, dtype)
            guided = {} if row.packed else {"negative_prompt": [""] * batch, "true_cfg_scale": row.guidance}
            return lambda: pipe(
                texts, height=self.recipe.size, width=self.recipe.size, num_inference_steps=row.steps,
                max_sequence_length=32, generator=torch.Generator("cpu").manual_seed(SEED), **guided,
            )  # fmt: skip

        return in_turns(
            {row.name: call(row) for row in [*self.teachers, *self.students]}, self.options.turns, self.device
        )


def ends(interval: Interval | None, digits: int = 4) -> list[float | None]:
    """Return an interval as value, low, high; nothing known is None."""
    if interval is None:
        return [None, None, None]
    return [round(value, digits) for value in (interval.value, interval.low, interval.high)]


def comparison(a: dict[str, Tensor], b: dict[str, Tensor], reference: Any) -> dict[str, Any]:
    """Return the judge's paired difference, in points of 100, and the ratio of distances of two rows."""
    judged = paired_difference(100 * a["cosines"], 100 * b["cosines"])
    found = {"judge": ends(judged.interval, 3), "wins": ends(judged.wins, 3), "fd_ratio": ends(None)}
    if reference is not None and len(a["features"]) >= LEAST_ROWS:
        found["fd_ratio"] = ends(frechet_intervals.ratio(a["features"], b["features"], reference))
    return found


def equal_seconds(student: str, teachers: list[str], seconds: dict[str, list[float]]) -> str:
    """Return the teacher's row with the least median seconds that are not below the student's; the slowest if none."""
    middle = {name: float(torch.tensor(values).median()) for name, values in seconds.items()}
    slower = [name for name in teachers if middle[name] >= middle[student]]
    return min(slower, key=middle.__getitem__) if slower else max(teachers, key=middle.__getitem__)


def report(table: Table) -> dict[str, Any]:
    """Time and measure all rows; return the record."""
    size, options = table.recipe.size, table.options
    file = zoo.path(JUDGE) / f"fd_reference_{size}.npz"
    reference = statistics_files.read(file).moments if file.is_file() else None
    made: dict[str, Any] = {
        "command": f"python -m scripts.zoo.emoji_1step.table --recipe {table.recipe.name} --steps {options.steps}",
        "device": describe_device(table.device), "date": now(), "versions": versions(), "pictures": len(table.texts),
        "size": size, "judge": JUDGE,
        "judge_manifest_sha256": sha256(export.packed_base().with_name(JUDGE) / "manifest.json"),
        "rows": {}, "seconds": {}, "pairs": [],
    }  # fmt: skip
    for batch in (int(text) for text in options.batches.split(",")):
        made["seconds"][str(batch)] = table.seconds(batch)
    measured = {row.name: table.measured(row) for row in [*table.teachers, *table.students]}
    for row in [*table.teachers, *table.students]:
        features, cosines = measured[row.name]["features"], measured[row.name]["cosines"]
        enough = reference is not None and len(features) >= LEAST_ROWS
        made["rows"][row.name] = {
            "rows": row.rows, "packed": row.identity, "judge": ends(bootstrap_mean(100 * cosines), 3),
            "fd": ends(frechet_intervals.distance_interval(features, reference) if enough else None, 3),
            "whole_calls": {batch: times(turns, row.name, table.teachers[0].name)
                            for batch, turns in made["seconds"].items()},
        }  # fmt: skip
    made["pairs"] = pairs(table, made, measured, reference)
    return made


def times(turns: dict[str, list[float]], name: str, slowest: str) -> dict[str, Any]:
    """Return the median seconds of a row's calls, and how many times as long the slowest row takes, with interval."""
    median = float(torch.tensor(turns[name], dtype=torch.float64).median())
    if name == slowest:
        return {"seconds": median, "times": [1.0, None, None]}
    found = median_ratio(turns[slowest], turns[name])
    return {
        "seconds": median,
        "times": ends(found.interval, 2) if found.interval else [round(found.value, 2), None, None],
    }


def pairs(table: Table, made: dict[str, Any], measured: dict[str, Any], reference: Any) -> list[dict[str, Any]]:
    """Return what is compared: each student with the teacher at its steps, its seconds and at most, and with fewer."""
    first, chosen = next(iter(made["seconds"].values())), []
    for number, row in enumerate(table.students):
        names = [other.name for other in table.teachers]
        chosen.append(("equal steps", row.name, Row(row.steps).name))
        chosen.append(("equal seconds", row.name, equal_seconds(row.name, names, first)))
        chosen.append(("most steps", row.name, names[0]))
        if number:
            chosen.append(("fewer steps", row.name, table.students[number - 1].name))
    return [{"at": at, "a": a, "b": b, **comparison(measured[a], measured[b], reference)} for at, a, b in chosen]


def shown(made: dict[str, Any]) -> str:
    """Return the record as tables."""

    def cell(found: list[float | None], sign: str = "") -> str:
        if found[0] is None:
            return ""
        value = f"{found[0]:{sign}g}"
        return value if found[1] is None else f"{value} ({found[1]:{sign}g} to {found[2]:{sign}g})"

    lines = [f"{made['pictures']} pictures of {made['size']} px, {made['device']['name']}", HEAD]
    for name, row in made["rows"].items():
        calls = row["whole_calls"]
        lines.append("| " + " | ".join([
            name, str(row["rows"]), cell(row["judge"]), cell(row["fd"]),
            ", ".join(f"{found['seconds']:.4f} of {batch}" for batch, found in calls.items()),
            ", ".join(cell(found["times"]) for found in calls.values()),
        ]) + " |")  # fmt: skip
    lines += ["", "| at | | less | judge, points of 100 | wins | ratio of Fréchet distances |", "|---" * 6 + "|"]
    for pair in made["pairs"]:
        lines.append("| " + " | ".join([
            pair["at"], pair["a"], pair["b"], cell(pair["judge"], "+"), cell(pair["wins"]), cell(pair["fd_ratio"])
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def sheet(path: Path, rows: list[tuple[str, Tensor]], margin: int = 130) -> None:
    """Save rows of pictures ``(n, 3, s, s)`` uint8, each under its name."""
    from PIL import Image, ImageDraw

    side = rows[0][1].shape[-1]
    image = Image.new("RGB", (margin + side * len(rows[0][1]), side * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    for number, (name, pictures_of_row) in enumerate(rows):
        draw.text((6, side * number + side // 2 - 6), name, fill="black")
        for column, picture in enumerate(pictures_of_row):
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image.paste(cell, (margin + side * column, side * number))
    write_png(path, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", default="full", help="full (a GPU) or tiny (to try the code)")
    add("--work", type=Path, required=True, help="the job's folder; features are kept there")
    add("--out", type=Path, required=True)
    add("--steps", default="1,2,4", help="of the students")
    add("--seed", type=int, default=0, help="of the students' runs")
    add("--pictures", type=int, help="default: those of the recipe's score")
    add(
        "--batches", default="1,100", help="pictures in the calls that are timed; the first says what equal seconds are"
    )
    add("--turns", type=int, default=12)
    add("--kind", default="cpu", help="name of the machine, for the record's name")
    add("--device", help="default: cuda if there is one")
    options = parser.parse_args()
    try:
        table = Table(options)
        made = report(table)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{BASE}-students_{options.kind}.json", made)
    wanted = [table.teachers[0].name]
    for pair in made["pairs"]:
        wanted += [name for name in (pair["b"], pair["a"]) if pair["at"] in ("equal steps", "equal seconds")]
    rows = {row.name: row for row in [*table.teachers, *table.students]}
    sheet(options.out / f"{BASE}-students_{options.kind}.png",
          [(name, table.measured(rows[name])["pictures"]) for name in dict.fromkeys(wanted)])  # fmt: skip
    print(shown(made))


if __name__ == "__main__":
    main()
