"""Single stand-ins: objects that replace one network, one text encoder or one progress bar, wherever they are put."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PICTURE_ENCODERS = ("vae", "image_encoder")  # attributes of pipelines


def uncompiled(network: Any) -> Any:
    """Return the network below ``torch.compile``."""
    return getattr(network, "_orig_mod", network)


def signature_of(module: Any) -> inspect.Signature:
    """Return the signature of a network's forward, below ``torch.compile``."""
    return inspect.signature(type(uncompiled(module)).forward)


class StandIn:
    """A callable in the place of a network.

    It is no Module, so that hooks and ``compile`` do not see it. ``isinstance`` and attributes are those of the
    network, since pipelines find their device by their modules.
    """

    def __init__(self, module: Any, called: Callable[..., Any]) -> None:
        self._module, self._called = module, called

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)


def network_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a network call's arguments by name; dicts, which pipelines change between calls, are copied."""
    arguments = by_name(signature_of(module).bind(module, *args, **kwargs))
    arguments.pop("self")
    return {k: dict(v) if isinstance(v, dict) else v for k, v in arguments.items()}


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return bound arguments by name; those that a catch-all ``**name`` took are among the others."""
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def random_like(like: Any, shape: tuple[int, ...], seed: int) -> Any:
    """Draw a random network output, fp32 so that the guidance fit is sharp; a list where ``like`` is one."""
    draw = torch.Generator("cpu").manual_seed(seed)
    out = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return out.to(like.device) if isinstance(like, Tensor) else list(out.to(like[0].device).unbind())


class TextMemo:
    """What a call's encoders gave while it was watched: of prompts by ordinal, of pictures by their pixels.

    An encoder in train mode draws from torch's global generators. A cached answer leaves them as the encoder did, so
    that whatever the pipeline draws next is the same.
    """

    def __init__(self) -> None:
        self._answers: list[_Answer] = []
        self._pictures: list[tuple[Any, _Answer]] = []  # name and arguments of the encoder first

    def has_texts(self) -> bool:
        """Return whether prompts were encoded."""
        return bool(self._answers)

    def has_pictures(self) -> bool:
        """Return whether pictures were encoded."""
        return bool(self._pictures)

    def picture_encoders(self, pipe: Any, device: torch.device) -> dict[str, StandIn]:
        """Return substitutes, by attribute, for a pipeline's networks that encode pictures: the same ones once only.

        Args:
            device: on which the networks draw.
        """
        vae, network = vars(pipe).get("vae"), vars(pipe).get("image_encoder")
        stand_ins: dict[str, StandIn] = {}
        if hasattr(vae, "encode"):
            stand_ins["vae"] = _CachedVae(vae, functools.partial(self._encode_picture, "vae", vae.encode, device))
        if isinstance(network, torch.nn.Module):
            encode = functools.partial(self._encode_picture, "image_encoder", network, device)
            stand_ins["image_encoder"] = StandIn(network, encode)
        return stand_ins

    def _encode_picture(
        self, name: str, encode: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.is_grad_enabled():  # never while a call is watched; a graph is not copied
            return encode(*args, **kwargs)
        before = random_states(device)
        for arguments, answer in self._pictures:
            if _equal(arguments, [name, args, kwargs]):
                if all(map(torch.equal, before, answer.before)):
                    set_random_states(device, answer.after)
                return copy.deepcopy(answer.result)  # a pipeline may change it in place
        arguments = copy.deepcopy([name, args, kwargs])
        result = encode(*args, **kwargs)
        self._pictures.append((arguments, _Answer(copy.deepcopy(result), before, random_states(device))))
        return result

    def wrap(self, encode: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Return ``encode``, which draws on ``device``, with the i-th call answered by the i-th cached result."""
        ordinal = 0

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            nonlocal ordinal
            before = random_states(device)
            if ordinal == len(self._answers):
                result = encode(*args, **kwargs)
                self._answers.append(_Answer(result, before, random_states(device)))
            answer = self._answers[ordinal]
            if all(map(torch.equal, before, answer.before)):
                set_random_states(device, answer.after)
            ordinal += 1
            return answer.result

        return encode_prompt


class _CachedVae(StandIn):
    """A VAE whose ``encode`` is another."""

    def __init__(self, vae: Any, encode: Callable[..., Any]) -> None:
        super().__init__(vae, vae)
        self.encode = encode


def _equal(a: Any, b: Any) -> bool:
    """Return whether arguments are equal, tensors to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.device) == (b.dtype, b.device)
        return alike and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[name]) for name, value in a.items())
    return bool(a == b)


@dataclass(frozen=True, eq=False)
class _Answer:
    """An encoding, and the states of torch's global generators before and after it."""

    result: Any
    before: list[Tensor]
    after: list[Tensor]


def random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the global generators that a network on ``device`` may draw from."""
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put the global generators into states of :func:`random_states`."""
    torch.random.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def global_generator(device: torch.device) -> torch.Generator:
    """Return an independent generator that draws what the global one draws next for a network on ``device``."""
    own = device if device.type == "cuda" else torch.device("cpu")
    return torch.Generator(own).set_state(random_states(device)[-1])


def silent_bar(original: Callable[..., Any], iterable: Any = None, total: int | None = None) -> Any:
    """Return a disabled progress bar in the place of ``original(iterable, total)``."""
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, disable=True)


def clone(generator: Any) -> Any:
    """Return an independent generator of the same state, or a list of them for a list."""
    if isinstance(generator, list):
        return [clone(g) for g in generator]
    if generator is None:
        return None
    return torch.Generator(generator.device).set_state(generator.get_state())
