"""Committed records: each says which judge measured it, and pages say so of numbers by another than the shipped one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diffaccel import zoo
from diffaccel.files import sha256

DOCS = Path(__file__).parents[2] / "docs"
JUDGED = [file for file in sorted((DOCS / "results").glob("*.json")) if json.loads(file.read_text()).get("judge")]
REPORTS = sorted((DOCS / "results").glob("*/report.json"))
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def shipped() -> str:
    return sha256(zoo.path("emoji-clip-judge") / "open_clip_model.safetensors")


@pytest.mark.parametrize("file", JUDGED, ids=lambda file: file.stem)
def test_a_record_has_the_version_of_its_judge_and_its_page_says_where_that_is_another(file: Path) -> None:
    digest = json.loads(file.read_text())["judge_weights_sha256"]
    pages = [page.read_text() for page in PAGES if file.name in page.read_text()]
    assert pages and len(digest) == 64
    assert digest == shipped() or all(f"{digest[:8]}" in page for page in pages)


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.parent.name)
def test_a_report_is_measured_by_the_shipped_judge(file: Path) -> None:
    digests = re.findall(r'"extractor": "emoji-clip-judge",\s*"weights_sha256": "(\w+)"', file.read_text())
    assert set(digests) == {shipped()}
