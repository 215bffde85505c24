"""Run the contract matrix on this machine's CPU or GPU and print it: families and methods down, contracts across.

    python -m scripts.contract_matrix --device cuda --kind h100 --out docs/results
    python -m scripts.contract_matrix --device cpu --methods euler,spectrum --families flux,sd --contracts stock,batch

A cell is "yes", "no", "refused" where the method refuses the pipeline with a sentence, or "-" where the contract does
not apply to the pipeline; the record says why. Then the table of pairs: which methods compose on one pipeline, and
which refuse each other. The record is written after every family, and one that was stopped goes on with the others;
remove it after a change of code.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from diffaccel import record
from scripts.earlier import earlier

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


def quiet() -> None:
    """Silence what libraries say of tiny models: LoRA without keys for text encoders, and the like."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def method_of(name: str, family: str) -> tuple[Any, str]:
    """Return the config of a row, and why there is none for the family; "" where there is one."""
    import matrix
    import self_contracts

    from diffaccel.errors import DiffAccelError

    if name not in self_contracts.QUANTIZERS:
        return {**self_contracts.CHANGING, **matrix.GPU_METHODS}[name], ""
    try:
        return self_contracts.QUANTIZERS[name](family), ""
    except DiffAccelError as error:
        return None, str(error)


def rows_of(family: str, methods: list[str], contracts: list[str], device: str) -> dict[str, dict[str, Any]]:
    """Run all contracts of one family, and print and return its rows as the record keeps them."""
    import matrix
    import self_contracts

    quiet()
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for name in methods:
        start = time.perf_counter()
        keeps_result = name in matrix.GPU_METHODS
        own = matrix if keeps_result else self_contracts
        method, sentence = method_of(name, family)
        case = matrix.Case(family, method, device, matrix.REFERENCES.get(name))
        row = rows[f"{family}, {name}"] = {}
        sentence = sentence or (matrix.refusal(case) if family in own.REFUSES.get(name, {}) else "")
        for contract in contracts:
            function = own.contracts(device)[contract]
            if contract == "lora_fused" and name in self_contracts.QUANTIZERS:
                function = self_contracts.fusing_refused
            shown, why = ("refused", sentence) if sentence else cell(function, case, matrix.NotHere)
            row[contract] = {"cell": shown, "why": why}
        print(f"| {family} | {name} | {' | '.join(entry['cell'] for entry in row.values())} |", flush=True)
        print(f"{family}, {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        for contract, entry in row.items():
            if entry["cell"] == "no":
                print(f"  {contract}: {entry['why']}", file=sys.stderr)
    return {name: short(row) for name, row in rows.items()}


def short(row: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return a row as the record keeps it: its cells in a line, and each reason once with the cells that it is of."""
    reasons: dict[str, list[str]] = {}
    for name, entry in row.items():
        if entry["why"]:
            reasons.setdefault(entry["why"], []).append(name)
    cells = " ".join(entry["cell"] for entry in row.values())
    return {"cells": cells, "why": {why: " ".join(names) for why, names in reasons.items()}}


def pairs_table() -> dict[str, dict[str, str]]:
    """Run every pair of methods on one pipeline, and print and return which compose."""
    import method_pairs

    names = list(method_pairs.METHODS)
    outcomes = {f"{first}, {second}": method_pairs.outcome(first, second) for first, second in method_pairs.PAIRS}
    print(f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for first in names:
        cells = [outcomes.get(f"{first}, {second}", {"cell": ""})["cell"] for second in names]
        print(f"| {first} | {' | '.join(cells)} |")
    return outcomes


def kept(contracts: list[str], rows: dict[str, Any], pairs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return what the record keeps of both tables."""
    outcomes = {name: ": ".join(text for text in pair.values() if text) for name, pair in pairs.items()}
    return {"contracts": " ".join(contracts), "rows": rows, "pairs": outcomes}


def stopped_rows(file: Path, report: record.Record, contracts: list[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of a record that was stopped on this machine before its end, and tell how many there are."""
    now = {"state": "running", "settings": report.settings, "device": report.device, "versions": report.versions,
           "contracts": " ".join(contracts)}  # fmt: skip
    rows: dict[str, dict[str, Any]] = earlier(file, now, now).get("rows", {})
    if rows:
        print(f"going on with {len(rows)} rows of '{file}'", file=sys.stderr)
    return rows


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record's file name")
    parser.add_argument("--methods", default="", help="methods to run, with commas; all by default")
    parser.add_argument("--families", default="", help="families to run, with commas; all by default")
    parser.add_argument("--contracts", default="", help="contracts to run, with commas; all by default")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with some of the families")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args()
    import matrix
    import self_contracts

    quiet()
    keeping = matrix.METHODS if options.device == "cpu" else matrix.GPU_METHODS
    methods = (
        options.methods.split(",")
        if options.methods
        else [*keeping, *self_contracts.CHANGING, *self_contracts.QUANTIZERS]
    )
    families = options.families.split(",") if options.families else list(matrix.FAMILIES)
    command = ["python", "-m", "scripts.contract_matrix", *sys.argv[1:]]
    report = record.Record(kind="contract_matrix", settings={"device": options.device}, command=command)
    report.device = record.describe_device(torch.device(options.device))
    file = options.out and options.out / f"contract_matrix_{options.kind or options.device}.json"
    contracts = options.contracts.split(",") if options.contracts else list(matrix.contracts(options.device))
    rows = stopped_rows(file, report, contracts) if file else {}
    families = [family for family in families if not all(f"{family}, {name}" in rows for name in methods)]
    print(f"{report.device['name']}, {report.started[:10]}, diffusers {report.versions['diffusers']}")
    print(f"| family | method | {' | '.join(contracts)} |\n|{'---|' * (len(contracts) + 2)}")
    pairs: dict[str, dict[str, str]] = {}
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(rows_of, (family, methods, contracts, options.device)) for family in families]
        for job in jobs:
            rows |= job.get()
            if file:
                report.results = kept(contracts, rows, pairs)
                options.out.mkdir(parents=True, exist_ok=True)
                report.save(file)
    pairs = pairs_table()
    report.finish(**kept(contracts, rows, pairs))
    if file:
        report.save(file)
    cells = [*(cell for row in rows.values() for cell in row["cells"].split()), *(p["cell"] for p in pairs.values())]
    return 1 if "no" in cells else 0


if __name__ == "__main__":
    sys.exit(main())
