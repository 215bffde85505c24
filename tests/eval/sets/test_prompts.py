"""Prompt files in every format, and what is no prompt file."""

from __future__ import annotations

import io
import json

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets import prompts

TEXTS, KINDS = ("a cat", 'two dogs, "fast"'), ("animals", "count")
FILES = {
    "p.txt": 'a cat\n\ntwo dogs, "fast"\n',
    "p.jsonl": "".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in zip(TEXTS, KINDS, strict=True)),
    "p.json": json.dumps(list(TEXTS)),
    "p.tsv": 'Prompt\tCategory\na cat\tanimals\ntwo dogs, "fast"\tcount\n',
    "p.csv": 'prompt,challenge\na cat,animals\n"two dogs, ""fast""",count\n',
}


@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    found = prompts.read(str(tmp_path / name))
    assert found.texts == TEXTS and found.categories == (("", "") if name in ("p.txt", "p.json") else KINDS)
    assert found.first(1).texts == TEXTS[:1] and len(found.first(None)) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.json", '["a", " "]', "Prompt 2 of .* is empty"),
        ("p.json", '{"a": 1}', "must hold a list"),
        ("p.jsonl", '{"text_": 1}\n', "has no prompt or text"),
        ("p.jsonl", "{", "cannot be read"),
        ("p.jsonl", '{"prompt": "a", "seed": 3}', "'seed' of a single prompt has no effect.*--seed"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": "b"}', "--negative"),
        ("p.csv", "a,b\n1,2\n", "has no prompt"),
        ("p.csv", "prompt,tag,prompt\na,b,c\n", "2 columns have one name: 'prompt', 'prompt'; rename them"),
        ("p.tsv", "prompt\tTag\ttag\na\tb\tc\n", "2 columns have one name: 'Tag', 'tag'"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "2 keys have one name: 'prompt', 'prompt'"),
        ("p.jsonl", '{"prompt": 3}', "the prompt of an entry is 3, which is no text"),
        ("p.json", '["a\\ud800"]', "Prompt 1 of .* holds half a character"),
    ],
)
def test_what_is_none(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DiffAccelError, match=said):
        prompts.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "byte"), [("a cat\n".encode("utf-16"), "byte 0 is 0xff"), ("café".encode("latin-1"), "byte 3 is 0xe9")]
)
def test_a_file_of_another_encoding_is_told_so(tmp_path, content, byte):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(DiffAccelError, match=rf"is not UTF-8: {byte}. Save it as UTF-8."):
        prompts.read(str(tmp_path / "p.txt"))


def test_a_prompt_ends_where_its_line_or_its_quotes_do(tmp_path):
    """Separators that only Python's splitlines takes for ends of a line are part of a prompt."""
    odd = "a cat\u2028and\x85a\x0chat"
    (tmp_path / "p.txt").write_text(f"{odd}\r\nb\n", newline="")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\n")
    (tmp_path / "p.csv").write_text(f'prompt,kind\n"{odd},\nor two",x\n', newline="")
    assert prompts.read(str(tmp_path / "p.txt")).texts == (odd, "b")
    assert prompts.read(str(tmp_path / "p.jsonl")).texts == (odd,)
    assert prompts.read(str(tmp_path / "p.csv")).texts == (f"{odd},\nor two",)


def test_stdin_is_one_prompt_a_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a cat\n\n# ä \r\n".encode("utf-8-sig"))))
    assert prompts.read("-") == prompts.Prompts("stdin", ("a cat", "# ä"), ("", ""))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffAccelError, match="cannot share stdin"):
        prompts.read("-")


def test_a_file_that_is_not_there():
    with pytest.raises(DiffAccelError, match="no prompt file"):
        prompts.read("folder/none.txt")
    with pytest.raises(DiffAccelError, match="Unknown prompt set"):
        prompts.read("none")


def test_the_packaged_set():
    found = prompts.read("emoji-1000")
    assert len(found) == 1000 and len(set(found.texts)) == 1000
    assert set(found.first(5).categories) == {"style", "colour", "count", "pair", "colour_pair"}
