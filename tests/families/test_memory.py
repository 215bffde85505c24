"""What watching a pipeline of no family finds is remembered for its later calls of the same kind, and only for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import diffaccel
from diffaccel.families.generic import identify
from diffaccel.families.generic.memory import kind_of_parts
from diffaccel.runtime import call
from diffaccel.samplers import Euler, Scheduler
from tests.support import small_pipelines
from tests.support.small_pipelines import Small


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pipelines that were watched, one entry a time."""
    names: list[str] = []

    def note(pipe: Any, *args: Any) -> Any:
        names.append(type(pipe).__name__)
        return identify(pipe, *args)

    monkeypatch.setattr(call, "identify", note)
    return names


def path_of(pipe: Any) -> str:
    last = diffaccel.summary(pipe).last_run
    assert last is not None
    return last["path"]


def other_prompts(does: str = "plain", **changes: Any) -> dict[str, Any]:
    arguments = toy.call_kwargs(does, **changes)
    return {**arguments, "prompt_embeds": 0.5 - arguments["prompt_embeds"]}


@pytest.mark.parametrize("config", [Euler(), Scheduler()])
@pytest.mark.parametrize(("does", "path"), [("plain", "native"), ("negative first", "native"), ("inpainting", "stock")])
def test_calls_of_one_kind_are_watched_once(watched, does, path, config) -> None:
    pipe = toy.make()
    stock = [pipe(**arguments)["latents"] for arguments in (toy.call_kwargs(does), other_prompts(does))]
    diffaccel.accelerate(pipe, config)
    for _ in range(2):
        wrapped = [pipe(**arguments)["latents"] for arguments in (toy.call_kwargs(does), other_prompts(does))]
        assert all(torch.equal(a, b) for a, b in zip(stock, wrapped, strict=True))
        assert path_of(pipe).startswith(path)
    assert len(watched) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 4.0},
        {"num_inference_steps": 5},
        {"does": "weighted"},
        {"batch": 3},
        {"guidance_scale": 3},  # which a pipeline may compute with as with another number
    ],
)
def test_another_kind_of_arguments_is_watched(watched, changes) -> None:
    pipe = toy.make()
    stock = pipe(**toy.call_kwargs(**changes))["latents"]
    diffaccel.accelerate(pipe, Euler())
    pipe(**toy.call_kwargs())
    assert torch.equal(pipe(**toy.call_kwargs(**changes))["latents"], stock)
    assert len(watched) == 2


def replace_network(pipe: Any) -> None:
    pipe.transformer = toy.ToyNetwork().eval()


def replace_scheduler(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)


def change_config(pipe: Any) -> None:
    pipe.scheduler.register_to_config(shift=2.0)


def load_adapter(pipe: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["mix"]), pipe.transformer)


def replace_processor(pipe: Any) -> None:
    pipe.transformer.mix.processor = object()


def patch_forward(pipe: Any) -> None:
    pipe.transformer.forward = pipe.transformer.forward


def set_attribute(pipe: Any) -> None:
    pipe.vae_scale_factor = 16


CHANGES = [
    replace_network, replace_scheduler, change_config, load_adapter, replace_processor, patch_forward, set_attribute,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_noticed(watched, change) -> None:
    pipe = toy.make()
    assert kind_of_parts(pipe) == kind_of_parts(pipe)
    diffaccel.accelerate(pipe, Euler())
    pipe(**toy.call_kwargs())
    pipe(**toy.call_kwargs())
    assert len(watched) == 1
    change(pipe)
    pipe(**toy.call_kwargs())
    assert len(watched) == 2


def test_another_dtype_is_noticed() -> None:
    pipe = toy.make()
    before = kind_of_parts(pipe)
    assert kind_of_parts(pipe.to(torch.float64)) != before


def test_a_refused_call_is_tried_again_with_other_parts(watched) -> None:
    """Under the pipeline's own rule, too."""
    pipe = diffaccel.accelerate(toy.make(), Scheduler())
    for count in (1, 1, 2):
        if count == 2:
            replace_network(pipe)
        pipe(**toy.call_kwargs("inpainting"))
        assert len(watched) == count


class Moody(toy.ToyPipeline):
    """A pipeline whose loop depends on what its prompts say."""

    def __call__(self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, generator: Any = None, **kwargs: Any):
        does = "weighted" if prompt_embeds.mean() > 0 else "negative first"
        return super().__call__(prompt_embeds, negative_prompt_embeds, does=does, generator=generator, **kwargs)


@pytest.mark.parametrize("seeded", [True, False])
def test_findings_that_do_not_hold_are_found_anew(watched, seeded) -> None:
    """Before any step, with generators as they were; such calls are all watched from then on."""
    parts = toy.make().components
    pipe = Moody(**parts)
    pipe.set_progress_bar_config(disable=True)

    def run(sign: int) -> list[Tensor]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(0) if seeded else None
        arguments = toy.call_kwargs(generator=generator)
        del arguments["does"]
        arguments["prompt_embeds"] = sign * arguments["prompt_embeds"].abs()
        latents = pipe(**arguments)["latents"]
        return [latents, torch.rand(1), latents if generator is None else torch.rand(1, generator=generator)]

    stock = {sign: run(sign) for sign in (1, -1)}
    diffaccel.accelerate(pipe, Euler())
    for sign in (1, 1, -1, 1, -1):
        assert all(torch.equal(a, b) for a, b in zip(run(sign), stock[sign], strict=True))
    assert len(watched) == 4
    assert pipe.transformer is parts["transformer"]


class Eye(small_pipelines.Net):
    """An image encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.count = [0]

    def forward(self, picture: Tensor) -> Tensor:
        self.count[0] += 1
        return picture.sum()


class Looking(Small):
    """A text pipeline that is shown a picture, and counts its texts."""

    def __init__(self, unet: Any, scheduler: Any, image_encoder: Any) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(image_encoder=image_encoder)
        self._encoded = [0]

    def encode_prompt(self, prompt: str) -> Tensor:
        self._encoded[0] += 1
        return super().encode_prompt(prompt)

    @torch.no_grad()
    def __call__(
        self, prompt: str = "", picture: Any = None, num_inference_steps: int = 3, generator: Any = None,
        output_type: str = "latent", return_dict: bool = True,
    ) -> Any:  # fmt: skip
        longer = prompt + "!" * int(self.image_encoder(picture))
        return super().__call__(longer, num_inference_steps, generator, output_type, return_dict)


class LookingAside(Looking):
    """The same, in its own loop."""

    drift = 0.25


@pytest.mark.parametrize(("cls", "path"), [(Looking, "native"), (LookingAside, "stock loop")])
def test_texts_and_pictures_are_encoded_once(watched, cls, path) -> None:
    eye = Eye()
    pipe = cls(small_pipelines.Net(), EulerDiscreteScheduler(), eye)
    pipe.set_progress_bar_config(disable=True)

    def draw(size: int) -> Tensor:
        return pipe("a cat", torch.ones(1, 1, size, size), generator=small_pipelines.seeded())[0]

    stock = [draw(size) for size in (1, 2, 2)]
    assert (eye.count, pipe._encoded) == ([3], [3])
    diffaccel.accelerate(pipe, Euler())
    assert all(torch.equal(draw(size), latents) for size, latents in zip((1, 2, 2), stock, strict=True))
    assert path_of(pipe) == path and len(watched) == 2  # another size is another kind
    assert (eye.count, pipe._encoded) == ([6], [6])
    assert pipe.image_encoder is eye and "encode_prompt" not in vars(pipe)
