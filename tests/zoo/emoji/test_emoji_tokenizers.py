"""Both tokenizers after save and load: special ids, coverage of bytes, whole words, lower case."""

import pytest

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji import tokenizers

TEXTS = [
    f"{prefix}{count}{colour} {thing}{suffix}"
    for prefix in ("", "a noto emoji of ", "fluent 3d ")
    for count in ("", "three ")
    for colour in ("red", "blue")
    for thing in ("apple", "glass of milk", "jack-o-lantern", "cat left of pool 8 ball")
    for suffix in ("", ", twemoji", " in noto style, fruit, round")
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tokenizers.build(TEXTS, tmp_path_factory.mktemp("tokenizers"), size=1024)


def test_bos_and_eos_are_the_last_two_ids(pair):
    clip, _ = pair
    assert (clip.bos_token_id, clip.eos_token_id) == (len(clip) - 2, len(clip) - 1)
    assert clip.pad_token_id == clip.eos_token_id
    ids = clip("red apple, noto")["input_ids"]
    assert ids[0] == clip.bos_token_id
    assert ids[-1] == clip.eos_token_id
    assert max(range(len(ids)), key=ids.__getitem__) == len(ids) - 1  # where CLIP pools


def test_every_byte_is_in_the_clip_vocabulary_alone_and_at_the_end_of_a_word(pair):
    clip, _ = pair
    vocabulary = clip.get_vocab()
    letters = tokenizers.byte_letters()
    assert len(set(letters)) == 256
    assert all(letter in vocabulary and f"{letter}</w>" in vocabulary for letter in letters)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_no_text_is_unknown_to_clip(pair):
    clip, _ = pair
    for text in ("ünïcode", "漢字 🎉", "~`^ \x7f", "qxzj", "ÅØ"):
        ids = clip(text)["input_ids"]
        assert clip.eos_token_id not in ids[1:-1]
        assert clip.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("which", [0, 1])
def test_captions_survive_a_round_trip(pair, which):
    tokenizer = pair[which]
    for text in TEXTS:
        back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert back.replace(" ", "") == text.replace(" ", "")


def test_t5_special_ids_and_whole_words(pair):
    _, t5 = pair
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert len(t5) <= 1024
    assert t5.tokenize("three red apples, fluent 3d")[:2] == ["▁three", "▁red"]
    assert t5.tokenize("fluent 3d") == ["▁fluent", "▁3d"]
    assert t5.tokenize("jack-o-lantern, noto") == ["▁jack-o-lantern", ",", "▁noto"]
    assert t5("red apple")["input_ids"][-1] == t5.eos_token_id


def test_t5_reads_unseen_words_by_pieces(pair):
    _, t5 = pair
    ids = t5("zebra-crossing 42!")["input_ids"]
    assert t5.unk_token_id not in ids
    assert t5.decode(ids, skip_special_tokens=True).replace(" ", "") == "zebra-crossing42!"


@pytest.mark.parametrize("which", [0, 1])
def test_case_does_not_matter_after_loading(pair, which):
    tokenizer = pair[which]
    assert tokenizer("A Red APPLE, Noto")["input_ids"] == tokenizer("a red apple, noto")["input_ids"]


@pytest.mark.parametrize("which", [0, 1])
def test_long_texts_are_cut_and_short_ones_padded(pair, which):
    tokenizer = pair[which]
    assert tokenizer.model_max_length == 32
    for text in ("", "cat", "red apple " * 40):
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=32)["input_ids"]
        assert len(ids) == 32
        assert tokenizer.eos_token_id in ids


def test_the_same_captions_make_the_same_files(pair, tmp_path):
    for folder in ("a", "b"):
        tokenizers.build(TEXTS, tmp_path / folder, size=1024)
    for name in ("tokenizer", "tokenizer_2"):
        one, other = ((tmp_path / f / name / "tokenizer.json").read_bytes() for f in ("a", "b"))
        assert one == other


def test_small_vocabularies_are_refused(tmp_path):
    with pytest.raises(DiffAccelError, match="at least 600"):
        tokenizers.build(TEXTS, tmp_path, size=256)
