"""Run diffusers' own pipeline tests on wrapped pipelines, and compare test by test with the stock pipelines.

    git clone --depth 1 --branch v$(python -c "import diffusers; print(diffusers.__version__)") \
        https://github.com/huggingface/diffusers FOLDER
    pip install "diffaccel[diffusers-tests]"
    python -m scripts.diffusers_tests --diffusers-tests FOLDER

Every pipeline that a test constructs is accelerated before the test sees it, once with each of the named methods. A
test counts where the stock pipeline passes it; the outputs of all of its calls are compared to the bit. Nothing is
downloaded: tiny folders stand in for those of the hub, and a test that needs another one fails on the stock pipeline,
too. A killed run goes on where it was, by its outcomes in ``--folder``: name another folder after a change of code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from diffaccel import record
from scripts.diffusers_tests.outcomes import Comparison, markdown, missing_of, outcomes_of, read_rows
from scripts.diffusers_tests.stand_ins import make_cache

ROOT = Path(__file__).resolve().parents[2]
SELECT = "test_callback_inputs or test_callback_cfg or test_dict_tuple_outputs_equivalent"
METHODS = ("scheduler", "euler")


def run_pass(checkout: Path, folder: Path, method: str, paths: list[str], select: str) -> Path:
    """Run the selected tests with every pipeline under ``method`` ("" for none); return the file of their outcomes."""
    outcomes, ini, cwd = folder / f"{method or 'stock'}.jsonl", folder / "empty.ini", folder / "cwd"
    cwd.mkdir(exist_ok=True)
    ini.touch()
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_TEST_DEVICE": "cpu",
        "DIFFACCEL_CONFIG": method,
        "DIFFACCEL_RECORD": str(outcomes),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    words = [
        sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(checkout),
        "-p", "scripts.diffusers_tests.plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb=line",
        "--continue-on-collection-errors",
        "-m", "not slow and not nightly", *(["-k", select] if select else []), *paths,
    ]  # fmt: skip
    done = subprocess.run(words, cwd=cwd, env=environment, check=False)
    if done.returncode not in (0, 1, 5):  # 1: tests failed; 5: all were run before
        raise SystemExit(f"pytest ended with {done.returncode}; run the same command again to go on.")
    return outcomes


def tests_version(checkout: Path) -> str:
    """Return the version of diffusers that the tests belong to."""
    for line in (checkout / "setup.py").read_text().splitlines():
        if line.strip().startswith("version="):
            return line.split('"')[1]
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="diffusers' own pipeline tests on wrapped pipelines")
    parser.add_argument("--diffusers-tests", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--folder", type=Path, default=Path("out/diffusers_tests"), help="outcomes, to go on with")
    parser.add_argument("--tests", nargs="+", default=["tests/pipelines"], help="files or folders of the checkout")
    parser.add_argument("--select", default=SELECT, help="pytest's -k; '' for all tests")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, help="where the record goes, such as docs/results/diffusers_tests_cpu.json")
    options = parser.parse_args()
    checkout, folder = options.diffusers_tests.resolve(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stand_ins = make_cache(folder / "hub")
    paths = [str(checkout / name) for name in options.tests]
    files = {m: run_pass(checkout, folder, m, paths, options.select) for m in ["", *options.methods]}
    rows = {method: read_rows(file) for method, file in files.items()}
    comparisons = [Comparison.of(method, rows[""], rows[method]) for method in options.methods]
    print(markdown(rows[""], comparisons))
    if options.out is not None:
        settings = {"tests_of": tests_version(checkout), "tests": options.tests, "select": options.select}
        command = ["python", "-m", "scripts.diffusers_tests", "--diffusers-tests", "FOLDER"]
        command += ["--methods", *options.methods, "--select", options.select]
        report = record.Record(kind="diffusers_tests", settings=settings, command=command)
        report.device = record.describe_device(torch.device("cpu"))
        stock = {"outcomes": dict(outcomes_of(rows[""])), "missing": missing_of(rows[""]), "stand_ins": stand_ins}
        report.finish(stock=stock, methods={c.method: c.to_dict() for c in comparisons}).save(options.out)


if __name__ == "__main__":
    main()
