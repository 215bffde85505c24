"""Run the contract matrix on this machine's CPU or GPU and print it: families down, contracts across.

    python -m scripts.contract_matrix --device cuda --kind h100 --out docs/results

A cell is "yes", "no" (the record says why) or "-" where the contract does not apply to the pipeline (the record says
why). The record is written after every family.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from diffaccel import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))


def cell(contract, case, not_here: type[Exception]) -> tuple[str, str]:
    """Run one contract and return its cell in the table, and why where it is not "yes"."""
    try:
        contract(case)
    except not_here as reason:
        return "-", str(reason)
    except Exception as error:
        return "no", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "yes", ""


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record's file name")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args()
    import matrix

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # libraries on tiny models: LoRA without keys for text encoders, and the like
    contracts = matrix.CONTRACTS if options.device == "cpu" else matrix.GPU_CONTRACTS
    command = ["python", "-m", "scripts.contract_matrix", "--device", options.device]
    report = record.Record(kind="contract_matrix", settings={"device": options.device}, command=command)
    report.device = record.describe_device(torch.device(options.device))
    file = options.out and options.out / f"contract_matrix_{options.kind or options.device}.json"
    rows: dict[str, dict[str, dict[str, str]]] = {}
    print(f"{report.device['name']}, {report.started[:10]}, diffusers {report.versions['diffusers']}")
    print(f"| family | method | {' | '.join(contracts)} |\n|{'---|' * (len(contracts) + 2)}")
    failed = 0
    for family in matrix.FAMILIES:
        for name, method in (matrix.METHODS if options.device == "cpu" else matrix.GPU_METHODS).items():
            start = time.perf_counter()
            row = rows[f"{family}, {name}"] = {}
            for contract, function in contracts.items():
                shown, why = cell(function, matrix.Case(family, method, options.device), matrix.NotHere)
                row[contract] = {"cell": shown, "why": why}
                failed += shown == "no"
            print(f"| {family} | {name} | {' | '.join(entry['cell'] for entry in row.values())} |", flush=True)
            print(f"{family}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
            for contract, entry in row.items():
                if entry["cell"] == "no":
                    print(f"  {contract}: {entry['why']}", file=sys.stderr)
            if file:
                report.results = {"rows": rows}
                options.out.mkdir(parents=True, exist_ok=True)
                report.save(file)
    report.finish(rows=rows)
    if file:
        report.save(file)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
