"""Tiny local folders in the place of the hub folders that diffusers' pipeline tests ask for, as a hub cache.

Shapes are those of the originals, weights and vocabularies are not: a test that compares with numbers of the original
weights fails on the stock pipeline, and is left out of the comparison for that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

REVISION = "0" * 40
LETTERS = [chr(c) for c in range(33, 127)]


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Return a tokenizer of letters; the end of text is its largest id, by which the encoder finds it."""
    pieces = [*LETTERS, *[letter + "</w>" for letter in LETTERS], "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def t5_tokenizer() -> transformers.T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *[(letter, -3.0) for letter in LETTERS]]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _t5_config(kind: type = transformers.T5Config, **changes: object) -> transformers.PretrainedConfig:
    values = dict(
        vocab_size=32128, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, relative_attention_num_buckets=8,
        decoder_start_token_id=0, dropout_rate=0.1, initializer_factor=0.002, is_encoder_decoder=True,
    )  # fmt: skip
    return kind(**{**values, **changes})


def clip(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)


def t5(folder: Path) -> None:
    t5_tokenizer().save_pretrained(folder)
    transformers.T5ForConditionalGeneration(_t5_config()).save_pretrained(folder)


def umt5(folder: Path) -> None:
    t5_tokenizer().save_pretrained(folder)
    transformers.UMT5EncoderModel(_t5_config(transformers.UMT5Config)).save_pretrained(folder)


def qwen(folder: Path) -> None:
    """Save a tokenizer of bytes with the marks of a chat, and the processor of pictures."""
    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    marks = [f"<|{name}|>" for name in names]
    letters = [*LETTERS, "Ġ", "Ċ"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate([*letters, *marks])}, merges=[], model_max_length=512,
        additional_special_tokens=marks,
    )  # fmt: skip
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=template
    )
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gemma(folder: Path) -> None:
    pieces = [("<pad>", 0.0), ("<eos>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = {piece: i for i, (piece, _) in enumerate([*pieces, *[(letter, -3.0) for letter in LETTERS]])}
    transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=512).save_pretrained(folder)


def bert(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *[f"##{letter}" for letter in LETTERS]]
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=1124, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=37
    )
    transformers.BertModel(config).save_pretrained(folder)


FOLDERS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-clip": clip,
    "hf-internal-testing/tiny-random-t5": t5,
    "hf-internal-testing/tiny-random-T5Model": t5,
    "hf-internal-testing/tiny-random-umt5": umt5,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": qwen,
    "hf-internal-testing/dummy-gemma": gemma,
    "hf-internal-testing/tiny-random-BertModel": bert,
}


def make_cache(cache: Path) -> list[str]:
    """Fill a hub cache with the stand-ins that it lacks; return the names of all."""
    for name, fill in FOLDERS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / REVISION
        if not (repository / "refs" / "main").exists():
            shutil.rmtree(repository, ignore_errors=True)
            folder.mkdir(parents=True)
            torch.manual_seed(0)
            fill(folder)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(REVISION)
    return list(FOLDERS)
