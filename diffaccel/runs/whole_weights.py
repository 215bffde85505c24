"""Whether all weights of a loaded pipeline came from its files.

diffusers leaves a weight that no file has on the device "meta"; transformers draws it at random, with a warning only.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMED = 3  # missing weights in a message
COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq)$")  # buffers that a model makes of its config

logger = logging.getLogger(__name__)


def find_gap(pipe: Any, given: dict[str, Any] | None = None) -> str | None:
    """Return a clause about the first component with weights that no file has; None where there is none.

    Args:
        given: the arguments of ``from_pretrained``; components among them are not looked at.
    """
    from transformers import PreTrainedModel

    given = given or {}
    for name, module in pipe.components.items():
        if name in given or not (hasattr(module, "state_dict") and hasattr(module, "parameters")):
            continue
        missing: list[str] = []
        if isinstance(module, PreTrainedModel):
            missing = _drawn_at_random(module, given.get("variant"))
        elif not hasattr(module, "_hf_hook"):  # offloaded ones rest on "meta"
            missing = [key for key, tensor in module.state_dict().items() if getattr(tensor, "is_meta", False)]
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            noun = "weight" if len(missing) == 1 else "weights"
            return f"no file of '{name}' has its {noun} {', '.join(missing[:NAMED])}{more}"
    return None


def _drawn_at_random(module: PreTrainedModel, variant: str | None) -> list[str]:
    """Return the weights of a network of transformers that are in no file of the folder that it was loaded from."""
    folder = Path(module.name_or_path)
    if not module.name_or_path or not folder.is_dir():
        return []
    files = [file.name for file in folder.iterdir()]
    variant = variant if any(f".{variant}" in name for name in files) else None
    stem = "model" if variant is None else rf"model\.{re.escape(variant)}"
    shards = [folder / name for name in files if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", name)]
    if shards and _has_all(module, shards):
        return []
    try:  # names may be those of an older version: only transformers can tell what it does not find
        with _silent():
            _, report = type(module).from_pretrained(
                folder, device_map="meta", output_loading_info=True, variant=variant
            )
    except Exception as error:
        logger.debug("The weights of '%s' cannot be checked: %s", folder, error)
        return []
    return sorted(key for key in report["missing_keys"] if not COMPUTED.search(key))


def _has_all(module: PreTrainedModel, shards: list[Path]) -> bool:
    """Return whether the files have every weight under its own name, or under that of a weight tied to it."""
    from safetensors import safe_open

    names: set[str] = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names.update(file.keys())
    tied = module.all_tied_weights_keys
    return all(key in names or tied.get(key) in names for key in module.state_dict())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from telling its loading twice."""
    from transformers.utils import logging as transformers_logging

    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()
