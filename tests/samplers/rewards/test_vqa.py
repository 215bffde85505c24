"""VQAScore on tiny random models that are saved as published ones are: with a chat template, and an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import weights
from diffaccel.samplers.rewards import resolve

WORDS = '<pad> <unk> <s> </s> <image> Yes No yes or no. " ? Does this figure show Please answer a red apple USER: BOT:'
YES = WORDS.split().index("Yes")
CHAT = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}BOT:{% endif %}"
)
PROMPTS = ["a red apple", "apple"]


def tokenizer(words: str = WORDS) -> Any:
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="<unk>"))
    marks = [pre_tokenizers.Split(mark, "isolated") for mark in '"?']
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *marks])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, additional_special_tokens=["<image>"], **special)


VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def save_llava(folder: Path, words: str = WORDS) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    reader = tokenizer(words)
    text = LlamaConfig(
        vocab_size=len(reader), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16), text_config=text, image_token_index=4,
        image_seq_length=4,
    )  # fmt: skip
    side = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        pictures, reader, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip


def save_blip(folder: Path) -> None:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        T5Config,
    )

    reader = tokenizer()
    query = {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")}
    text = T5Config(
        vocab_size=len(reader), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=2,
        pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=30, encoder_hidden_size=16, **query).to_dict(),
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=4,
    )  # fmt: skip
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": 16, "width": 16})
    Blip2Processor(pictures, reader, num_query_tokens=4).save_pretrained(folder)


@pytest.fixture(scope="module", params=[save_llava, save_blip], ids=["llava", "blip-2"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    found = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(0)
    save: Callable[[Path], None] = request.param
    save(found)
    # weights of some size, so that pictures and questions change the answer
    from safetensors.torch import load_file, save_file

    state = load_file(found / "model.safetensors")
    noisy = {key: 3 * value if value.ndim > 1 and value.is_floating_point() else value for key, value in state.items()}
    save_file(noisy, found / "model.safetensors", metadata={"format": "pt"})
    return found


def pictures() -> Tensor:
    return torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def by_hand(folder: Path, picture: Tensor, prompt: str) -> float:
    """The log-probability of "Yes" from one forward pass, for one picture and its question."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    network = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    question = f'Does this figure show "{prompt}"? Please answer yes or no.'
    extra: dict[str, Tensor] = {}
    if network.config.is_encoder_decoder:
        extra["decoder_input_ids"] = torch.tensor([[2]])
    else:
        question = f"USER: <image> {question} BOT:"
    image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    inputs = processor(images=[image], text=[question], return_tensors="pt")
    with torch.no_grad():
        return network(**inputs, **extra).logits[0, -1].log_softmax(0)[YES].item()


def test_it_is_the_probability_of_yes_whatever_is_in_the_batch(folder):
    reward = resolve(f"vqa:{folder}", device="cpu")
    assert reward.name == f"vqa:{folder}" and reward.needs_prompts and not reward.differentiable
    x = pictures()
    expected = [by_hand(folder, picture, prompt) for picture, prompt in zip(x, PROMPTS, strict=True)]
    found = reward(x, PROMPTS)
    assert found.log().tolist() == pytest.approx(expected, abs=1e-4)
    assert 1e-6 < found.min() and found.max() < 1
    assert reward(x[1:], PROMPTS[1:]).log().item() == pytest.approx(expected[1], abs=1e-4)  # padding is not read
    assert (reward(x.flip(0), PROMPTS) / found).log().abs().min() > 1e-2  # it looks at the picture
    assert (reward(x, PROMPTS[::-1]) / found).log().abs().min() > 1e-3  # and reads the question


def test_a_vqa_reward_may_be_a_term(folder):
    total = resolve(f"10*vqa:{folder} + compress", device="cpu")
    alone = resolve(f"vqa:{folder}", device="cpu"), resolve("compress", device="cpu")
    vqa, size = (reward(pictures(), PROMPTS) for reward in alone)
    assert torch.allclose(total(pictures(), PROMPTS), 10 * vqa + size, rtol=1e-6)


@pytest.mark.slow
def test_folders_that_hold_no_such_model_are_refused(tmp_path):
    with pytest.raises(weights.MissingWeights, match=r"config\.json") as caught:
        resolve(f"vqa:{tmp_path}", device="cpu")
    assert caught.value.exit_code == 6
    with pytest.raises(weights.MissingWeights):
        resolve(f"vqa:{tmp_path / 'nothing'}", device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DiffAccelError, match=r"cannot be loaded as an image-text-to-text model of transformers"):
        resolve(f"vqa:{tmp_path}", device="cpu")


def test_a_tokenizer_that_cannot_say_yes_is_refused(tmp_path):
    save_llava(tmp_path, WORDS.replace("Yes", "Ja"))
    with pytest.raises(DiffAccelError, match=r"has no token 'Yes' \(it reads \[1\]\)"):
        resolve(f"vqa:{tmp_path}", device="cpu")


def test_a_folder_without_a_processor_is_refused(tmp_path):
    save_llava(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DiffAccelError, match=r"cannot be loaded .* Give the folder of one with its processor"):
        resolve(f"vqa:{tmp_path}", device="cpu")
