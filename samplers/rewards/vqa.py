"""Probability by a vision-language model that a picture shows its prompt (VQAScore)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.networks import weights
from diffaccel.samplers.rewards import identity
from diffaccel.samplers.rewards.reward import Reward

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"


def reward(argument: str, device: torch.device, model: str) -> Reward:
    """Score by VQAScore, ``P(first token of the answer = "Yes" | picture, question)`` (Lin et al., arXiv 2404.01291).

    The question follows the model's chat template where it has one. Pictures are rounded to 8 bits, so the score has no
    gradient.

    Args:
        argument: folder of an image-text-to-text model of transformers with its processor: LLaVA, Qwen-VL, BLIP-2, ...
        device: device of the network, which has its checkpoint's dtype, on a CPU float32.
        model: not used.

    Raises:
        MissingWeights: for a folder without a model.
        DiffAccelError: for one that cannot be loaded, and a tokenizer without a token "Yes".
    """
    if not argument:
        raise DiffAccelError("The reward 'vqa' names no model. Write vqa:/folder, of one that transformers loads.")
    folder = weights.find("config.json", argument, flag="vqa:/folder").parent
    processor, network = _load(folder, device)
    tokenizer: Any = processor.tokenizer
    # A decoder's answer continues its question, so padding comes before it. In an encoder that would move the text away
    # from the picture.
    tokenizer.padding_side = "right" if network.config.is_encoder_decoder else "left"
    yes = tokenizer.encode(ANSWER, add_special_tokens=False)
    if len(yes) != 1 or yes[0] == tokenizer.unk_token_id:
        raise DiffAccelError(
            f"The tokenizer of '{folder}' has no token '{ANSWER}' (it reads {yes}), so the probability of that answer "
            "is not one number. Take another model."
        )

    def question(prompt: str) -> str:
        text = QUESTION.format(prompt)
        if not getattr(processor, "chat_template", None):
            return text
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def probability(images: Tensor, prompts: list[str]) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        pictures = [to_pil_image(image) for image in (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)]
        texts = [question(prompt) for prompt in prompts]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(device, network.dtype)
        with torch.no_grad():  # generate knows with which token an encoder-decoder begins its answer
            answer = network.generate(
                **inputs, max_new_tokens=1, do_sample=False, num_beams=1, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return answer.logits[0].double().softmax(-1)[:, yes[0]]

    return Reward(
        name=f"vqa:{argument}", function=probability, batch_size=8, needs_prompts=True,
        identity=lambda: identity.weights(network),
    )  # fmt: skip


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        network = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except Exception as error:  # transformers raises many kinds
        raise DiffAccelError(
            f"'{folder}' cannot be loaded as an image-text-to-text model of transformers ({first_line(error)}). Give "
            "the folder of one with its processor, as save_pretrained writes both."
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise DiffAccelError(f"'{folder}' has no processor for images and texts; save the model's processor there.")
    return processor, network.eval().requires_grad_(False).to(device)
