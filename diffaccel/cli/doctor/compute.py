"""Checks of the device for ``diffaccel doctor``: attention kernels, matrix products, compilers.

Code of other packages that could end or hang the process runs in a child process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import terminal
from diffaccel.cli.doctor.host import Check, reason, tried
from diffaccel.errors import DiffAccelError, first_line

if TYPE_CHECKING:
    import torch

# name here -> torch.nn.attention.SDPBackend
TORCH_ATTENTION = {
    "torch-flash": "FLASH_ATTENTION", "torch-efficient": "EFFICIENT_ATTENTION", "torch-cudnn": "CUDNN_ATTENTION",
    "torch-math": "MATH",
}  # fmt: skip
# name here -> argument of pipe.transformer.set_attention_backend
DIFFUSERS_ATTENTION = {
    "flash-attn": "flash", "flash-attn-3": "_flash_3", "sageattention": "sage", "xformers": "xformers",
}  # fmt: skip
# warnings before a failure that give no reason: headings, and that the kernels not asked for are disabled
_NO_REASON = re.compile(r"not used because:?$|runtime disabled")
SECONDS = {"attention": 60, "compile": 180, "c++": 30}  # time limits of a child process


def in_child(name: str, attempt: str, device: str = "cpu") -> Check:
    """Run :func:`tried` in a child process: a crash or a hang there is a failed check as well.

    Args:
        name: of the check.
        attempt: "attention BACKEND" or "compile".
        device: to run it on.
    """
    code = f"from diffaccel.cli.doctor.compute import child; child({attempt!r}, {device!r})"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    limit = SECONDS[attempt.partition(" ")[0]]
    with tempfile.TemporaryDirectory(prefix="diffaccel-") as scratch:
        env = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": scratch, "TRITON_CACHE_DIR": scratch}
        env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no workers that would outlive the child
        command = [sys.executable, "-c", code]
        try:
            process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return Check(name, False, f"took longer than {limit} s")
    if process.returncode < 0:
        return Check(name, False, f"ended the process with signal {-process.returncode}")
    try:
        return Check(name, **json.loads(process.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return Check(name, False, (process.stderr.strip().splitlines() or ["said nothing"])[-1][:200])


def child(attempt: str, device: str) -> None:
    """Run the attempt of :func:`in_child` and write its outcome to stdout, one line of JSON."""
    kind, _, backend = attempt.partition(" ")
    attempts: dict[str, Callable[[], str]] = {
        "attention": lambda: _diffusers_attention(backend, device),
        "compile": lambda: _compile(device),
    }
    check = tried(kind, attempts[kind])
    terminal.write_json({"works": check.works, "detail": check.detail})


# -- attention and matrix products ------------------------------------------------------------------------------------


def torch_attention(device: str) -> list[Check]:
    """Check each of torch's attention kernels, forced, against the plain formula."""
    return [
        tried(name, lambda kernel=kernel: _torch_attention(kernel, device))  # type: ignore[misc]
        for name, kernel in TORCH_ATTENTION.items()
    ]


def _torch_attention(kernel: str, device: str) -> str:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return _attend(call, device)
        except RuntimeError as error:
            texts = [str(w.message).partition(" (Triggered")[0] for w in caught]
            why = next((text for text in texts if not _NO_REASON.search(text)), "")
            if not why and "viable backend" in str(error):
                why = f"torch has no such kernel for {device}"
            raise DiffAccelError(why or first_line(error)) from error


def diffusers_attention(device: str) -> list[Check]:
    """Check the packages that diffusers can dispatch attention to; those installed run in a child process."""
    return [_package(name, backend, device) for name, backend in DIFFUSERS_ATTENTION.items()]


def _package(name: str, backend: str, device: str) -> Check:
    try:
        from diffusers.models import attention_dispatch

        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(backend))
    except Exception as error:
        return Check(name, False, reason(error))
    return in_child(name, f"attention {backend}", device)


def _diffusers_attention(backend: str, device: str) -> str:
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    with attention_backend(backend):
        timing = _attend(dispatch_attention_fn, device)
    return f'{timing}; set_attention_backend("{backend}")'


def _attend(call: Callable[..., Any], device: str) -> str:
    """Time attention on ``(B, L, H, D)``, at a size that fits the device, and raise when its result is off."""
    import torch

    length, heads, size = (2048, 24, 128) if device == "cuda" else (256, 4, 64)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, size, generator=draw).to(device) for _ in range(3))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / size**0.5
    expected = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = tuple(t.to(dtype) for t in (q, k, v))
    seconds, out = _best(lambda: call(*rows))
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < 0.1:
        raise DiffAccelError(f"runs, but its result is {100 * error:.0f} % off")
    return f"{1000 * seconds:.2f} ms for {length} tokens, {heads} heads of {size}, {str(dtype)[6:]}"


def dtypes(device: str) -> list[Check]:
    """Check matrix products in the small dtypes against float32, in result and in time."""
    names = ("bfloat16", "float16", "float8_e4m3fn")
    return [tried(name, lambda name=name: _multiply(name, device)) for name in names]  # type: ignore[misc]


def _multiply(name: str, device: str) -> str:
    import torch

    eight_bit = name.startswith("float8")
    size = 4096 if device == "cuda" else 128 if eight_bit else 512  # a CPU may have no fast path for 8 bits
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw).to(device) for _ in range(2))
    float32_seconds, expected = _best(lambda: a @ b.t())
    x, y = a.to(getattr(torch, name)), b.to(getattr(torch, name))
    unit = torch.ones((), device=device)
    if eight_bit:
        seconds, out = _best(lambda: torch._scaled_mm(x, y.t(), scale_a=unit, scale_b=unit, out_dtype=torch.bfloat16))
    else:
        seconds, out = _best(lambda: x @ y.t())
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < 0.1:
        raise DiffAccelError(f"runs, but its result is {100 * error:.0f} % off")
    return f"{float32_seconds / seconds:.2g} times the speed of float32 ({size} x {size}: {1000 * seconds:.2f} ms)"


def _best(call: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    """Return the shortest time of several calls and their result; a slow call is not repeated."""
    import torch

    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    seconds: list[float] = []
    while len(seconds) <= times and (not seconds or seconds[-1] < 0.2):
        wait()
        start = time.perf_counter()
        out = call()
        wait()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:] or seconds), 1e-9), out  # the first of several calls warms up


# -- compilers --------------------------------------------------------------------------------------------------------


def compilers(device: str, full: bool) -> list[Check]:
    """Check a C++ compiler with Python's headers, Triton, and, when ``full``, ``torch.compile`` itself."""
    checks = [tried("c++", _cplusplus), tried("triton", lambda: _triton(device))]
    if full:
        return [*checks, in_child("torch.compile", "compile", device)]
    return [*checks, Check("torch.compile", None, "not tried; diffaccel doctor --compile does")]


def _cplusplus() -> str:
    name = os.environ.get("CXX") or next((n for n in ("g++", "clang++", "c++") if shutil.which(n)), None)
    if name is None:
        raise DiffAccelError("no C++ compiler on PATH (CXX, g++, clang++); torch.compile needs one")
    include = sysconfig.get_paths()["include"]
    command = [name, "-x", "c++", "-fsyntax-only", f"-I{include}", "-"]
    source = "#include <Python.h>\nint main() { return 0; }\n"
    process = subprocess.run(command, input=source, capture_output=True, text=True, timeout=SECONDS["c++"], check=False)
    if process.returncode:
        line = next((line for line in process.stderr.splitlines() if "error" in line), process.stderr)
        raise DiffAccelError(f"{name} cannot compile against Python's headers: {line[:150]}")
    version = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return f"{version.stdout.splitlines()[0]}, with Python's headers"


def _triton(device: str) -> str:
    import triton

    if device != "cuda":
        raise DiffAccelError(f"version {triton.__version__} has nothing to compile for: the device is {device}")
    target = triton.runtime.driver.active.get_current_target()
    return f"{triton.__version__} compiles for {target.backend} {target.arch}"


def _compile(device: str) -> str:
    """Compile a small function and compare it with itself."""
    import torch

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) * 2 + x.square().sum(-1, keepdim=True)

    x = torch.linspace(-3, 3, 64 * 64, device=device).view(64, 64)
    start = time.perf_counter()
    out = torch.compile(function, fullgraph=True)(x)
    seconds = time.perf_counter() - start
    if not torch.allclose(out, function(x), rtol=1e-4, atol=1e-3):
        raise DiffAccelError("the compiled function computes something else")
    return f"a small function compiled in {seconds:.1f} s"
