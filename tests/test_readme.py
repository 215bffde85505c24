"""Every code block of README.md and docs/ runs, in the order of the page, in an empty folder.

Python blocks of one page share a namespace; shell blocks run under ``set -euo pipefail`` with this environment's
commands first on the path, which on all pages but one are forked from a process that has imported the libraries
(``tests/support/command_server.py``): starting an interpreter for each would take most of the time. A block that
cannot run here says why in the line above it, ``<!-- no-run: needs a GPU -->`` (or ``the hub``, or ``the network``);
it must still compile, and what it imports from diffaccel must exist.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_commands import forked_commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# many processes
LONG_PAGES = (
    "bottleneck", "caches", "distill", "doctor", "drafts", "eval", "families", "features", "fused", "mixdq", "quantize",
    "qvgen", "sample", "samplers", "search", "superdiff", "tib", "tune", "worlds",
)  # fmt: skip
SERVED = {"README.md", *(f"{name}.md" for name in LONG_PAGES if name != "samplers")}  # samplers.md: new interpreters
LONG = {"README.md", *(f"docs/{name}.md" for name in LONG_PAGES)}
LANGUAGES = {"python": "python", "py": "python", "bash": "shell", "sh": "shell", "shell": "shell"}
FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*([\w+-]*)")
NO_RUN = re.compile(r"^\s*<!--\s*no-run:\s*(.*?)\s*-->\s*$")
REASONS = re.compile(r"needs (a GPU|the hub|the network)\b")
SECONDS = 600
DRIVER = """
import json, os, subprocess, sys
namespace, environment = {"__name__": "__main__"}, dict(os.environ)  # a user's shell is not the one of his interpreter
page, blocks = json.loads(sys.stdin.read())
for block in blocks:
    print(f"--- {page}:{block['line']}", flush=True)
    if block["language"] == "python":
        padding = chr(10) * (block["line"] - 1)  # so that a traceback shows the page's own lines
        exec(compile(padding + block["code"], page, "exec"), namespace)
    else:
        command = ["bash", "-euo", "pipefail", "-c", block["code"]]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)
"""


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of the block's first line of code, counted from 1
    no_run: str | None = None  # why it cannot run here


def blocks(text: str) -> list[Block]:
    """Return the python and shell blocks of a Markdown page."""
    page_blocks, lines = [], text.splitlines()
    reason, i = None, 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if fence is None:
            marker = NO_RUN.match(lines[i])
            reason = marker[1] if marker else reason if not lines[i].strip() else None
            i += 1
            continue
        start = i = i + 1
        while i < len(lines) and not lines[i].strip().startswith(fence[1]):
            i += 1
        if language := LANGUAGES.get(fence[2].lower()):
            code = textwrap.dedent("\n".join(lines[start:i])) + "\n"
            page_blocks.append(Block(language, code, start + 1, reason))
        reason = None
        i += 1
    return page_blocks


def compile_only(block: Block) -> None:
    """Check a block that is not run: its syntax, and that its imports from diffaccel exist."""
    if block.language == "shell":
        subprocess.run(["bash", "-n", "-c", block.code], check=True, capture_output=True)
        return
    module = ast.parse(block.code)
    compile(module, "block", "exec")
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "diffaccel":
            source = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(source, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),  # for `python -m scripts.name`
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


@pytest.fixture(scope="session")
def served() -> Iterator[dict[str, str]]:
    """The environment of pages whose commands are forked from a process that has imported the libraries."""
    with forked_commands(ENVIRONMENT) as env:
        yield env


def run_page(
    page: str, page_blocks: list[Block], folder: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a page's blocks one after another in one new process."""
    env = os.environ | ENVIRONMENT if env is None else env
    return subprocess.run(
        [shutil.which("python", path=env["PATH"]), "-c", DRIVER],
        input=json.dumps([page, [asdict(block) for block in page_blocks if block.no_run is None]]),
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def page_params() -> list[Any]:
    names = {str(page.relative_to(ROOT)): page for page in PAGES}
    return [pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name, page in names.items()]


@pytest.mark.parametrize("page", page_params())
def test_page(page, tmp_path, request):
    page_blocks = blocks(page.read_text(encoding="utf-8"))
    for block in page_blocks:
        if block.no_run is not None:
            assert REASONS.match(block.no_run), f"{page.name}:{block.line}: '{block.no_run}' is no reason not to run"
            compile_only(block)
    if all(block.no_run is not None for block in page_blocks):
        return
    env = request.getfixturevalue("served") if page.name in SERVED else None
    done = run_page(str(page), page_blocks, tmp_path, env)
    assert done.returncode == 0, done.stdout[-8000:]


PAGE = """
Text with `inline` code.
```python
x = 1
```
```
not code
```
1. In a list:
   ```bash
   echo "$((1 + 1))" > two.txt
   ```

<!-- no-run: needs the hub -->

```python
from diffaccel.errors import DiffAccelError
```
~~~py
assert x == 1 and open("two.txt").read() == "2\\n"
~~~
"""


def test_blocks_are_found_and_run_in_order(tmp_path):
    page_blocks = blocks(PAGE)
    assert [(b.language, b.line, b.no_run) for b in page_blocks] == [
        ("python", 4, None),
        ("shell", 11, None),
        ("python", 17, "needs the hub"),
        ("python", 20, None),
    ]
    compile_only(page_blocks[2])
    done = run_page("page.md", page_blocks, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", ["python\n1 / 0\n", "sh\nfalse\ntrue\n", "bash\nfalse | true\n", "py\nimport (\n"])
def test_a_failing_block_fails(tmp_path, block):
    done = run_page("page.md", blocks(f"```{block}```"), tmp_path)
    assert done.returncode != 0 and "--- page.md:2" in done.stdout


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("```python\nimport (\n```", SyntaxError),
        ("```python\nfrom diffaccel.errors import Nothing\n```", AssertionError),
        ("```bash\nif true\n```", subprocess.CalledProcessError),
    ],
)
def test_a_block_that_is_not_run_is_still_read(code, error):
    with pytest.raises(error):
        compile_only(blocks(code)[0])


@pytest.mark.parametrize("reason", ["slow", "", "needs time"])
def test_only_missing_means_excuse_a_block(reason):
    assert not REASONS.match(reason)
