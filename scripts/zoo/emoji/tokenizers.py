"""Make the two tokenizers of the pipeline from the captions.

>>> build(captions, "work")    # work/tokenizer (CLIP) and work/tokenizer_2 (T5), at most 4096 entries each

CLIP's is a byte-level BPE. ``<|startoftext|>`` and ``<|endoftext|>`` are its last two ids, because CLIP pools where the
id is largest; every byte, alone and at the end of a word, is in the vocabulary, so that every text can be encoded.
T5's is a unigram model with a constructed list: whole words with the logarithm of their frequency, pieces of words,
characters. A trained unigram model would split the most frequent words.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji.casefold import lower_case_map

LENGTH = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_FOLDER, T5_FOLDER = "tokenizer", "tokenizer_2"
_SPACE = "▁"  # how a unigram piece writes the start of a word
_CHARACTERS = string.ascii_lowercase + string.digits + "-'.:;!?&()/\"#+%_*@=[]"
_WORDS, _PIECES = 3500, 500  # maximum number of whole words, and room left for parts of words
_COMMA, _PIECE, _LONG_PIECE, _CHARACTER = -4.0, -13.0, -12.0, -14.0  # log probabilities


def build(captions: Sequence[str], folder: str | Path, *, size: int = 4096) -> tuple:
    """Make and save both tokenizers, and return them as loaded from their folders."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    if size < 600 or not captions:
        raise DiffAccelError(f"Tokenizers need captions (got {len(captions)}) and at least 600 entries (got {size}).")
    folder = Path(folder)
    vocabulary, merges = bpe(captions, size)
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    clip.save_pretrained(folder / CLIP_FOLDER)
    t5 = T5TokenizerFast(
        vocab=unigram(captions, size),
        _spm_precompiled_charsmap=lower_case_map(),
        extra_ids=0,
        model_max_length=LENGTH,
    )
    t5.save_pretrained(folder / T5_FOLDER)
    _drop_map_from_config(folder / T5_FOLDER)
    return CLIPTokenizer.from_pretrained(folder / CLIP_FOLDER), T5TokenizerFast.from_pretrained(folder / T5_FOLDER)


def _drop_map_from_config(folder: Path) -> None:
    """Remove the character map from the config, where it may be as a constructor argument; tokenizer.json has it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.pop("_spm_precompiled_charsmap", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def byte_letters() -> list[str]:
    """Return the 256 printable letters by which a byte-level BPE represents bytes, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def bpe(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train vocabulary (bytes, word-final bytes, merges, BOS, EOS) and merges under CLIP's own normalisation."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    stock = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    letters = byte_letters()
    finals = [f"{letter}</w>" for letter in letters]
    alphabet = [*letters, *finals]
    # The trainer leaves out word-final forms of rare bytes, which would then be encoded as EOS. The others have ids
    # in the order of a hash table, which decides between equal counts. As special tokens all have fixed numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(alphabet),
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=finals,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - len(alphabet) - 2]
    pieces = dict.fromkeys([*alphabet, *(first + second for first, second in merges), BOS, EOS])
    return {piece: index for index, piece in enumerate(pieces)}, merges


def unigram(captions: Iterable[str], size: int) -> list[tuple[str, float]]:
    """Return pieces with log probabilities; <pad>, </s> and <unk> have the ids 0, 1 and 2."""
    words = Counter(word for text in captions for word in re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower()))
    total = sum(words.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, _SPACE: -10.0, ",": _COMMA}
    pieces |= {f"{mark}{c}": _CHARACTER for c in _CHARACTERS for mark in ("", _SPACE)}
    room = min(_WORDS, size - len(pieces) - _PIECES)
    for word, count in words.most_common(room):
        pieces[f"{_SPACE}{word}"] = math.log(count / total)
    parts: Counter[str] = Counter()
    for word in words:
        for start in range(len(word)):
            for end in range(start + 2, min(start + 6, len(word)) + 1):
                part = word[start:end]
                if part.isalnum():
                    # Parts are for words that are not in the list, so each word counts once, whatever its frequency.
                    parts[part if start else f"{_SPACE}{part}"] += end - start - 1
    for part, _ in parts.most_common():
        if len(pieces) >= size:
            break
        if part not in pieces:
            pieces[part] = _LONG_PIECE if len(part) > 4 else _PIECE
    return list(pieces.items())


def report(tokenizer, captions: Sequence[str]) -> dict[str, float]:
    """Return the number of entries, and quantiles of the captions' lengths in tokens."""
    lengths = sorted(len(ids) for ids in tokenizer(list(captions))["input_ids"])
    quantiles = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return {"entries": len(tokenizer)} | {
        name: lengths[min(int(q * len(lengths)), len(lengths) - 1)] for name, q in quantiles.items()
    }


def main() -> None:
    from scripts.zoo.emoji import recipe, scenes, world

    parser = argparse.ArgumentParser(description="Make the tokenizers from the captions of a recipe's scenes.")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder with world.json.xz and icons.zip")
    parser.add_argument("--recipe", default="full", choices=sorted(recipe.RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="the folders tokenizer and tokenizer_2 are made here")
    options = parser.parse_args()
    try:
        chosen = recipe.get(options.recipe)
        table = scenes.build(world.load(options.data), chosen, 0, "cpu")
        texts = [*table.captions[0], *table.captions[1]]
        for tokenizer in build(texts, options.out, size=chosen.vocabulary):
            print(type(tokenizer).__name__, report(tokenizer, texts))
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
