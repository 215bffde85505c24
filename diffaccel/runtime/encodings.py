"""Encodings of a watched call, given to the call itself while it prepares its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffaccel.modules.guard import attributes_of
from diffaccel.modules.stand_in import TextMemo
from diffaccel.runtime.meter import device_of


def encodings(pipe: Any, memo: TextMemo | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one puts cached encodings into a pipeline, the other takes them out."""
    device, parts = device_of(pipe), {}
    if memo is not None and memo.has_texts() and "encode_prompt" not in vars(pipe):
        parts["encode_prompt"] = memo.wrap(pipe.encode_prompt, device)
    if memo is not None and memo.has_pictures():
        parts.update(memo.picture_encoders(pipe, device))

    def install() -> None:
        for name, part in parts.items():  # past DiffusionPipeline.__setattr__, which changes pipe.config
            object.__setattr__(pipe, name, part)

    return install, attributes_of(pipe, list(parts))
