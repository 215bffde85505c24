"""Run as a script by test_kernels_guard: what ``kernels`` means here and in a spawned worker, as one JSON line."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any


def seen() -> dict[str, Any]:
    import diffaccel.kernels
    import kernels

    files = [
        os.path.realpath(module.__file__)
        for name, module in list(sys.modules.items())
        if name.split(".")[-1] == "kernels" and getattr(module, "__file__", None)
    ]
    return {
        "hub": getattr(kernels, "get_kernel", lambda: None)(),
        "name": kernels.__name__,
        "ours": diffaccel.kernels.__name__,
        "same": kernels is diffaccel.kernels,
        "root_on_path": any(os.path.exists(os.path.join(entry, "pyproject.toml")) for entry in sys.path),
        "loaded_twice": len(files) != len(set(files)),
    }


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps({"parent": seen(), "worker": pool.apply(seen)}))


if __name__ == "__main__":
    main()
