"""Failures of a run as one sentence: what stopped it, what to try, and what is kept."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.runs.folder import RunFailed, RunFolder, is_full
from diffaccel.runs.request import Request

_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


@contextlib.contextmanager
def failures(request: Request, folder: RunFolder, abandon: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn failures in the block into one sentence; errors of bad input pass through.

    Args:
        request: what is generated.
        folder: of the run.
        abandon: called on a failure, to leave nothing behind of a run without a finished chunk.

    Raises:
        RunFailed: when generation failed.
        KeyboardInterrupt: when it was interrupted.
    """
    kept = f"Finished images stay in '{folder.path}', and the same command continues."
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. {kept if folder.path.is_dir() else ''}".strip()) from None
    except Exception as error:
        if abandon is not None:
            abandon()
        kept = kept if folder.path.is_dir() else ""
        noun, smaller = ("video", "--batch, --frames or --size") if request.frames else ("image", "--batch or --size")
        if _out_of_memory(error):
            raise RunFailed(
                f"Out of memory with {request.batch} {noun}s a call on {folder.new.device['type']} "
                f"({first_line(error, 90)}). Try a smaller {smaller}, or --dtype bfloat16. {kept}"
            ) from error
        if isinstance(error, DiffAccelError):
            raise
        if isinstance(error, RuntimeWarning):
            raise RunFailed(
                f"The model gave not-a-number instead of pixels in {folder.new.settings['dtype']}. "
                f"Try another --dtype, --size or --guidance. {kept}"
            ) from error
        if is_full(error):  # of what a method writes beside the images, such as a search's trace
            raise RunFailed(f"'{folder.path}' cannot be written ({first_line(error)}). Make room. {kept}") from error
        failure = f"{type(error).__name__} while generating: {first_line(error)}"
        raise RunFailed(f"{failure} (DIFFACCEL_DEBUG=1 shows where). {kept}") from error


def _out_of_memory(error: BaseException) -> bool:
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
