"""What a model draws: the list beside its card, and words that it does not know."""

from __future__ import annotations

import pytest

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets import prompts
from diffaccel.runs.early_checks import note_of_unknown_words
from diffaccel.runs.request import Request
from diffaccel.zoo import vocabulary
from scripts.zoo.emoji.vocabulary import write

EMOJI = [
    {"label": "mouse", "category": "nature", "tags": ["rodent"]},
    {"label": "red apple", "category": "food", "tags": ["fruit", "healthy"]},
    {"label": "rocket", "category": "place", "tags": ["space"]},
]


@pytest.fixture
def small(tmp_path):
    write(tmp_path, EMOJI)
    return vocabulary.read(tmp_path)


def test_the_file_holds_labels_and_every_word_of_a_caption(small):
    assert small.labels == {"food": ["red apple"], "nature": ["mouse"], "place": ["rocket"]}
    assert small.all_labels == ["red apple", "mouse", "rocket"]
    assert small.unseen_styles == {"rocket": "fluent 3d"}
    assert {"mice", "rockets", "rodent", "emoji", "style", "fluent", "3d", "left", "three", "purple"} <= {*small.words}
    assert small.relations == ["left of", "right of", "above", "below", "and"]


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("Two mice left of a Red Apple, noto", {}),
        ("a fluent 3d emoji of the healthy rocket, 4", {}),
        ("a rokket on the dragonfruit", {"rokket": "rocket", "dragonfruit": ""}),
        ("aple", {"aple": "red apple"}),
    ],
)
def test_unknown_words_come_with_the_nearest_label(small, prompt, unknown):
    assert small.unknown([prompt, prompt]) == unknown


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / vocabulary.FILE).write_text('{"labels": {}}')
    with pytest.raises(DiffAccelError, match=r"vocabulary\.json' cannot be read"):
        vocabulary.read(tmp_path)


@pytest.mark.skipif("emoji-flux" not in zoo.names(), reason="no trained weights are in this checkout")
def test_the_shipped_list_knows_the_packaged_prompts():
    shipped = zoo.vocabulary_of("emoji-flux")
    assert len(shipped.all_labels) == 881 and shipped.unknown(prompts.read("emoji-1000").texts) == {}
    assert zoo.vocabulary_of("emoji-clip-judge") is None and zoo.vocabulary_of("./folder") is None
    note = note_of_unknown_words(Request(prompts=("a lighthouse", "a dragonfruit", "a cat, noto")))
    assert note.startswith("emoji-flux never saw 'lighthouse', 'dragonfruit' (nearest: dragon), so ")
    assert "diffaccel explain emoji-flux lists the 881 things" in note
    many = note_of_unknown_words(Request(prompts=tuple(f"x{letter}qq" for letter in "abcdefg")))
    assert "'xaqq'" in many and "2 more" in many
    assert note_of_unknown_words(Request(prompts=("a cat, noto",))) == ""
