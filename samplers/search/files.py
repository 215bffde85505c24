"""Files that are whole or not there: written beside their name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole(path: Path, make: Callable[[Path], Any]) -> None:
    """Let ``make`` write a file of another name in the same folder, and give it its own when it is done."""
    part = path.with_name(path.name + ".part")
    make(part)
    os.replace(part, path)
