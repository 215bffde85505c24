"""Tiny pipelines are made once a process and then copied: a copy takes a tenth of the time of making one."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType, NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

PLAIN = (bool, int, float, str, NoneType)
DICTS = (dict, OrderedDict)
P = ParamSpec("P")
T = TypeVar("T")
SHARED = {*PLAIN, bytes, type, FunctionType, torch.dtype, torch.device, torch.Size}


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """Call ``make`` once for each set of plain arguments; every call has a copy, and its end of torch's random numbers.

    Arguments that are objects (a scheduler) are used as they are, each in a pipeline made for it alone.
    """
    kept: dict[Any, tuple[T, torch.Tensor]] = {}

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        if not all(isinstance(value, PLAIN) for value in (*args, *kwargs.values())):
            return make(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in kept:
            kept[key] = make(*args, **kwargs), torch.get_rng_state()
        first, state = kept[key]
        torch.set_rng_state(state)
        return copied(first)

    return made


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return what ``copy.deepcopy`` returns, but for tokenizers, which are shared, and sooner."""
    kind = type(value)
    if kind in SHARED or (kind is tuple and all(type(item) in SHARED for item in value)):
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if kind is nn.Parameter:
        new: Any = nn.Parameter(value.detach().clone(), value.requires_grad)
    elif kind in DICTS:
        new = kind()
        if value:
            new.update({key: copied(item, memo) for key, item in value.items()})
    elif issubclass(kind, nn.Module | DiffusionPipeline):
        new = object.__new__(kind)
        memo[id(value)] = new
        attributes = vars(new)
        for name, item in vars(value).items():
            its_kind = type(item)
            if its_kind in SHARED:
                attributes[name] = item
            elif its_kind in DICTS and not item:
                attributes[name] = its_kind()  # of hooks: one in five of a module's attributes has something in it
            else:
                attributes[name] = copied(item, memo)
    elif issubclass(kind, PreTrainedTokenizerBase):
        return value
    else:
        return copy.deepcopy(value, memo)
    memo[id(value)] = new
    return new
