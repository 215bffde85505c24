"""What a reward is: a function of pictures and prompts, with what has to be known to call it, and checked answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line, unknown

Function = Callable[[Tensor, list[str]], Any]
Input = Literal["pixels", "latents", "video"]
SHAPES = {"pixels": "(b, 3, H, W)", "video": "(b, 3, F, H, W)"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reward:
    """A number a picture, the higher the better.

    Attributes:
        name: as records and messages show it.
        function: from float32 pictures in [0, 1] and their prompts to ``b`` numbers.
        input: what it takes: "pixels" ``(b, 3, H, W)``, "video" ``(b, 3, F, H, W)``, or clean "latents" as they are.
        batch_size: pictures in one call of ``function``.
        device: where it wants the pictures; None for where they are.
        differentiable: whether autograd gets from its numbers to the pictures.
        needs_prompts: whether it means nothing without a text.
    """

    name: str
    function: Function = field(repr=False)
    input: Input = "pixels"
    batch_size: int = 32
    device: torch.device | None = None
    differentiable: bool = False
    needs_prompts: bool = False
    _met: set[str] = field(default_factory=set, init=False, repr=False)  # "number", "nan": what it has returned so far

    def __post_init__(self) -> None:
        if self.input not in get_args(Input):
            raise unknown(f"input of the reward '{self.name}'", str(self.input), get_args(Input))
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise DiffAccelError(
                f"The batch_size of the reward '{self.name}' is {self.batch_size!r}; it must be a whole number above 0."
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards, ``(b,)`` float64 on the CPU. A NaN is the worst there is, -inf, and the first one is warned of.

        Raises:
            DiffAccelError: as :meth:`numbers` says, and for a reward that has returned nothing but NaN so far.
        """
        with torch.no_grad():
            return self._ranked(self.numbers(images, prompts).cpu().to(torch.float64))

    def graph(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards, ``(b,)`` float, from which autograd finds its way to ``images``.

        Raises:
            DiffAccelError: as calling says, and for a reward without gradients.
        """
        if not self.differentiable:
            raise DiffAccelError(
                f"The reward '{self.name}' has no gradients. Search without guidance (guide=0), or take a "
                "differentiable one, such as clip."
            )
        found = self.numbers(images, prompts)
        if len(found) and torch.is_grad_enabled() and images.requires_grad and not found.requires_grad:
            raise DiffAccelError(
                f"The reward '{self.name}' says it is differentiable, but its numbers do not depend on the images for "
                "autograd. Is there a detach, a no_grad or a way through numpy in it?"
            )
        return self._ranked(found)

    def numbers(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the function returned, ``(b,)`` float, on its device, with its graph where gradients are on, NaN as NaN.

        Raises:
            DiffAccelError: for images of another shape or dtype, another number of prompts, prompts that are missing,
                and a function that fails or returns anything but a number an image, by the reward's name.
        """
        self._check(images, prompts)
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        images, size = images if self.device is None else images.to(self.device), self.batch_size
        texts = [list(prompts[i : i + size]) for i in range(0, len(images), size)]
        return torch.cat([self._of(part, some) for part, some in zip(images.split(size), texts, strict=True)])

    def _of(self, images: Tensor, prompts: list[str]) -> Tensor:
        try:
            found: Any = self.function(images, prompts)
            scores = found if isinstance(found, Tensor) else torch.as_tensor(found, dtype=torch.float64)
        except DiffAccelError:
            raise
        except Exception as error:  # a function of the user's may raise anything
            raise DiffAccelError(
                f"The reward '{self.name}' failed ({type(error).__name__}: {first_line(error, 300)})."
            ) from error
        if scores.shape not in ((len(images),), (len(images), 1)) or scores.is_complex():
            raise DiffAccelError(
                f"The reward '{self.name}' returned {scores.dtype} of shape {tuple(scores.shape)} for {len(images)} "
                f"images. It must return one number an image, ({len(images)},)."
            )
        return scores.flatten() if scores.is_floating_point() else scores.flatten().to(torch.float64)

    def _check(self, images: Tensor, prompts: Sequence[str]) -> None:
        shape = SHAPES.get(self.input)
        fits = shape is None or (images.ndim == shape.count(",") + 1 and images.shape[1] == 3)
        if not (fits and images.is_floating_point()):
            raise DiffAccelError(
                f"The reward '{self.name}' takes {self.input} {shape or '(b, ...)'} of floats"
                f"{' in [0, 1]' if shape else ''}; got {images.dtype} of shape {tuple(images.shape)}."
            )
        if isinstance(prompts, str) or len(prompts) != len(images):
            got = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise DiffAccelError(
                f"The reward '{self.name}' got {len(images)} images and {got}. Give a list, one prompt an image."
            )
        if self.needs_prompts and not all(prompts):
            raise DiffAccelError(
                f"The reward '{self.name}' compares images with their prompts, and this call has none. Call the "
                "pipeline with prompt= instead of embeddings, or take a reward without texts, such as compress."
            )

    def _ranked(self, numbers: Tensor) -> Tensor:
        """NaN as -inf. One bad picture must not end a search, but a reward that never works must not run it."""
        bad = numbers.isnan()
        count = int(bad.sum())
        if count < len(numbers):
            self._met.add("number")
        if not count:
            return numbers
        if "number" not in self._met:
            raise DiffAccelError(
                f"The reward '{self.name}' returned NaN for every image ({count}). Look at what it computes."
            )
        if "nan" not in self._met:
            self._met.add("nan")
            logger.warning("The reward '%s' returned NaN for %d of %d images; NaN counts as the worst reward.",
                           self.name, count, len(numbers))  # fmt: skip
        return numbers.masked_fill(bad, -torch.inf)
