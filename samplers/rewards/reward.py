"""A reward: a function of pictures and prompts, with what has to be known to call it, and checks of its answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line, unknown
from diffaccel.samplers.rewards import identity

Function = Callable[[Tensor, list[str]], Any]
Input = Literal["pixels", "latents", "video"]
SHAPES = {"pixels": "(b, 3, H, W)", "video": "(b, 3, F, H, W)"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reward:
    """One number per picture, the higher the better.

    Attributes:
        name: name in records and messages.
        function: from float32 pictures in [0, 1] and their prompts to ``b`` numbers.
        input: "pixels" ``(b, 3, H, W)``, "video" ``(b, 3, F, H, W)``, or clean "latents" as they are.
        batch_size: maximum number of pictures in one call of ``function``.
        source: makes the reward again, by its name; a copy or a pickle of it is then made so, without its networks.
        device: device that the pictures are moved to; None leaves them where they are.
        differentiable: whether its numbers can be differentiated with respect to the pictures.
        needs_prompts: whether it cannot score a picture without a text.
        compare: judge of pairs ``(images_a, images_b, prompts) -> p`` or ``-> (p, confidence)``, both ``(b,)`` in
            [0, 1]: how sure the first picture of each pair is the better one; None where it judges single pictures.
        scores: whether ``function`` says anything; a judge of pairs may have none.
        identity: text, or a function without arguments that returns one, which differs where the numbers do; None for
            the code of ``function`` with all that it refers to.
    """

    name: str
    function: Function = field(repr=False)
    input: Input = "pixels"
    batch_size: int = 32
    source: Callable[[], Reward] | None = field(default=None, repr=False)
    device: torch.device | None = None
    differentiable: bool = False
    needs_prompts: bool = False
    compare: Callable[[Tensor, Tensor, list[str]], Any] | None = field(default=None, repr=False)
    scores: bool = True
    identity: str | Callable[[], str] | None = field(default=None, repr=False)
    _returned: set[str] = field(default_factory=set, init=False, repr=False)  # so far, of "number" and "nan"

    def __post_init__(self) -> None:
        if self.input not in get_args(Input):
            raise unknown(f"input of the reward '{self.name}'", str(self.input), get_args(Input))
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise DiffAccelError(
                f"The batch_size of the reward '{self.name}' is {self.batch_size!r}; it must be a whole number above 0."
            )

    def fingerprint(self) -> str:
        """Return a digest of what its numbers depend on, the same in another process."""
        stated = self.identity() if callable(self.identity) else self.identity
        judged_by = (self.function, self.compare) if self.compare is not None else self.function
        return identity.digest(self.name, self.input, judged_by if stated is None else stated)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, ``(b,)`` float64 on the CPU. NaN becomes -inf, the worst; the first one gives a warning.

        Raises:
            DiffAccelError: as :meth:`numbers` does, and for a reward that has returned nothing but NaN so far.
        """
        with torch.no_grad():
            return self._without_nan(self.numbers(images, prompts).cpu().to(torch.float64))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.source is None else (self.source, ())

    def graph(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, ``(b,)`` float, that are differentiable with respect to ``images``.

        Raises:
            DiffAccelError: as ``__call__`` does, and for a reward without gradients.
        """
        if not self.differentiable:
            raise DiffAccelError(
                f"The reward '{self.name}' has no gradients. Search without guidance (guide=0), or take a "
                "differentiable one, such as clip."
            )
        numbers = self.numbers(images, prompts)
        if len(numbers) and torch.is_grad_enabled() and images.requires_grad and not numbers.requires_grad:
            raise DiffAccelError(
                f"The reward '{self.name}' says it is differentiable, but its numbers do not depend on the images for "
                "autograd. Is there a detach, a no_grad or a way through numpy in it?"
            )
        return self._without_nan(numbers)

    def numbers(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the function's numbers, ``(b,)`` float on its device, with their graph under autograd, NaN kept.

        Raises:
            DiffAccelError: for images of another shape or dtype, another number of prompts, missing prompts, and a
                function that fails or returns anything but one number per image; the text names the reward.
        """
        self._check(images, prompts)
        if not len(images):
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        images, size = images if self.device is None else images.to(self.device), self.batch_size
        texts = [list(prompts[i : i + size]) for i in range(0, len(images), size)]
        return torch.cat([self._call(*batch) for batch in zip(images.split(size), texts, strict=True)])

    def _call(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Call the function on one batch and check its answer."""
        try:
            answer: Any = self.function(images, prompts)
            is_tensor = isinstance(answer, Tensor)
            scores = answer if is_tensor else torch.as_tensor(answer, dtype=torch.float64, device="cpu")
        except DiffAccelError:
            raise
        except Exception as error:  # the user's own function may raise anything
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
        """Raise for images or prompts that the function does not take."""
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

    def _without_nan(self, numbers: Tensor) -> Tensor:
        """Replace NaN by -inf: one bad picture must not end a search, but a reward that never works must not run on."""
        nan = numbers.isnan()
        count = int(nan.sum())
        if count < len(numbers):
            self._returned.add("number")
        if not count:
            return numbers
        if "number" not in self._returned:
            raise DiffAccelError(
                f"The reward '{self.name}' returned NaN for every image ({count}). Look at what it computes."
            )
        if "nan" not in self._returned:
            self._returned.add("nan")
            logger.warning("The reward '%s' returned NaN for %d of %d images; NaN counts as the worst reward.",
                           self.name, count, len(numbers))  # fmt: skip
        return numbers.masked_fill(nan, -torch.inf)
