"""Settings of the process that decide which kernels a network launches, and those that a graph needs."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator

import torch
from diffusers.models import attention_dispatch
from torch import _C as bindings
from torch.nn.modules import module as module_hooks


def settings() -> Hashable:
    """Return the settings of the process, and of this block of it, that kernels depend on."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    matmul = cuda.matmul
    autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    return (
        torch.is_inference_mode_enabled(),
        autocast,
        tuple(torch.get_autocast_dtype(kind) for kind, on in zip(("cuda", "cpu"), autocast, strict=True) if on),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        tuple(bindings._get_sdp_priority_order()),
        cuda.preferred_blas_library(),
        matmul.fp32_precision, matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        getattr(registry, "_active_backend", None),
    )  # fmt: skip


def watcher() -> str | None:
    """Return what watches every operation or module of this process, which a replay would not pass; None for nothing.

    Gradients, modes such as those that count FLOPs, hooks on all modules, a capture that the caller has begun.
    """
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if bindings._len_torch_dispatch_stack():
        return "a mode watches the operations"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "hooks are on all modules"
    if bindings._get_tracing_state() is not None:
        return "it is traced"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "the caller captures it"
    return None


@contextlib.contextmanager
def without_casts_kept() -> Iterator[None]:
    """Let autocast keep no cast weights: a graph must not read what is freed at the end of autocast's own block."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextlib.contextmanager
def benchmarking(enabled: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape of this block, where ``enabled``; the flag is put back."""
    before = torch.backends.cudnn.benchmark
    if enabled:
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        if enabled:
            torch.backends.cudnn.benchmark = before
