"""Kill commands at random moments, repeat them, and compare every file with that of an undisturbed run.

    python -m scripts.bench_kills --kills 20 --out docs/results

Each command runs as a process of its own, forked from one that has imported everything, so that the moments are spread
evenly over the command's work: opening the model, drawing, scoring, writing. It is ended by SIGKILL, and the same
command is then repeated once, to its end. Files must be equal byte by byte. In JSON files the fields in ``TIMED`` are
left out: dates and costs, which are seconds, memory, and the predictions of the processes that ended a chunk; of a
report's pages the dates.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffaccel import record
from diffaccel.files import write_json

TIMED = ("started", "finished", "made", "cost")
DATES = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00|Z)?")
SMALL = ["--device", "cpu", "--threads", "1"]
PICTURES = ["a red apple, noto", "two cats, twemoji", "--size", "64", *SMALL, "--out", "run"]
RUN = ["eval", "run", "--prompts", "emoji-1000", "--first", "4", *SMALL, "--out", "run", "--accel"]
PLAIN, OTHER = "plain:steps=4,size=64", "dpmpp2m:steps=2,size=64"
COMMANDS = {
    "sample": ["sample", "--steps", "4", "--num", "2", *PICTURES],
    "eval run": [*RUN, PLAIN],
    "eval compare": ["eval", "compare", "{base}", "{other}", "--device", "cpu", "--report", "run"],
    "sample --sampler rbf": [
        "sample", "--steps", "3", "--sampler", "rbf", "--rbf.budget", "20", "--rbf.initial", "2", "--rbf.keep", "1",
        *PICTURES,
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit status, negative for a signal, and seconds since its start."""

    status: int | None
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, repeat, compare; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of every command (default 20)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="commands (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write kills_cpu.json there")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the server's torch when it is imported
    rows = []
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        bed = Bed(Path(folder))
        for name in args.only:
            rows.append(bed.kill(name, args.kills, random.Random(f"{args.seed} {name}")))
            print_row(rows[-1])
            if args.out is not None:
                write(args.out / "kills_cpu.json", rows, args)


def write(file: Path, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the rows so far, with what they were measured on; rows of other commands stay in the file."""
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    new = {row["name"]: row for row in rows}
    rows = [new.get(row["name"], row) for row in old] + [row for name, row in new.items() if name not in _names(old)]
    rows.sort(key=lambda row: list(COMMANDS).index(row["name"]))
    command = f"python -m scripts.bench_kills --kills {args.kills} --out {args.out}"
    about = {"device": record.describe_device(torch.device("cpu")), "versions": record.versions()}
    write_json(file, {"command": command, "date": record.now(), **about, "left_out": list(TIMED), "rows": rows})


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


class Bed:
    """A folder of runs, and the server that processes are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["scripts.bench_kills_child"])
        self.runs: dict[str, str] = {}

    def kill(self, name: str, kills: int, moments: random.Random) -> dict[str, Any]:
        """Kill a command so many times, and return its row of the table."""
        if "{base}" in COMMANDS[name] and not self.runs:
            self._prepare()
        words = [word.format(**self.runs) for word in COMMANDS[name]]
        whole = self.folder / name.replace(" ", "_")
        self._to_the_end(words, whole)  # the first one also fills caches
        shutil.rmtree(whole)
        seconds = self._to_the_end(words, whole).seconds
        expected = contents(whole)
        different: list[str] = []
        at: list[float] = []
        for number in range(kills):
            folder = self.folder / "killed"
            share = (number + moments.random()) / kills
            at.append(self._killed(words, folder, share * seconds))
            self._to_the_end(words, folder)
            different += [
                f"{name} killed after {at[-1]:.2f} s: {file}" for file in differing(expected, contents(folder))
            ]
            shutil.rmtree(folder)
        equal = kills - len({text.partition(": ")[0] for text in different})
        return {
            "command": f"diffaccel {' '.join(words)}".replace(str(self.folder), "..."), "name": name, "kills": kills,
            "equal": equal, "seconds": round(seconds, 2), "killed_at": [round(moment, 2) for moment in at],
            "files": len(expected), "different": different,
        }  # fmt: skip

    def _prepare(self) -> None:
        """Draw the runs that are compared."""
        for key, variant in (("base", PLAIN), ("other", OTHER)):
            words = [key if word == "run" and number > 1 else word for number, word in enumerate(RUN)]
            self._to_the_end([*words, variant], self.folder / "runs")
            self.runs[key] = str(self.folder / "runs" / key)

    def _killed(self, words: list[str], folder: Path, moment: float) -> float:
        """Start a command in a new folder and kill it at a moment, or a little earlier where it ends before."""
        while True:
            if folder.exists():
                shutil.rmtree(folder)
            ending = self._start(words, folder, moment)
            if ending.status == -signal.SIGKILL:
                return ending.seconds
            moment = 0.95 * ending.seconds

    def _to_the_end(self, words: list[str], folder: Path) -> Ending:
        ending = self._start(words, folder, None)
        if ending.status != 0:
            raise SystemExit(f"{' '.join(words)} ended with {ending.status} in {folder}")
        return ending

    def _start(self, words: list[str], folder: Path, moment: float | None) -> Ending:
        """Run a command in a folder, and kill it ``moment`` seconds after it began."""
        from scripts.bench_kills_child import command

        folder.mkdir(exist_ok=True)
        begun, begins = self.context.Pipe(duplex=False)
        process = self.context.Process(target=command, args=(words, str(folder), begins))
        process.start()
        begun.recv()
        start = time.perf_counter()
        process.join(moment)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        return Ending(process.exitcode, time.perf_counter() - start)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, of JSON and pages without times and dates."""
    return {str(path.relative_to(folder)): _timeless(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix in (".html", ".md"):
        return DATES.sub(b"", data)
    if path.suffix != ".json":
        return data
    return json.dumps(without_times(json.loads(data))).encode()


def without_times(value: Any) -> Any:
    """Leave the fields :data:`TIMED` out, at any depth."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Return the names of files that are not in both, or not equal."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table, and what differed."""
    print(f"| `{row['name']}` | {row['kills']} | {row['equal']} | {row['files']} | {row['seconds']} |", flush=True)
    for text in row["different"]:
        print(f"  {text}", flush=True)


if __name__ == "__main__":
    main()
