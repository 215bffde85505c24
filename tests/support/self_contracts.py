"""The contract matrix of methods that change the result: what a result keeps to itself, by the names of ``matrix``.

There is nothing that such a result must equal, so each contract compares the method with itself: in another order of
calls, on another pipeline, with other rows beside it; and what the user changes must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matrix
import mixdq_bed
import torch
from matrix import CLOSE, Case, NotHere, batch, with_lora
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import W4A8, W4A16, W8A8
from diffaccel.samplers import (
    RBF,
    SMC,
    SVDD,
    Ancestral,
    BoN,
    Bottleneck,
    CoDe,
    DiffusersCache,
    DPMpp2M,
    Drafts,
    Euler,
    FirstBlockCache,
    Heun,
    Scheduler,
    SeaCache,
    SoP,
    Spectrum,
    TaylorSeer,
)


def redness(images: Tensor, prompts: Any) -> Tensor:
    """Score pictures ``(b, 3, H, W)`` for a search."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


CHANGING = {
    "euler": Euler(),
    "heun": Heun(),
    "dpmpp2m": DPMpp2M(),
    "ancestral": Ancestral(),
    "stages": Bottleneck(preset="lightx2v", scales=(0.5, 1.0), switches=(0.5,)),
    "guidance-stop": Scheduler(guidance_stop=0.5),
    "spectrum": Spectrum(warmup=2),
    "seacache": SeaCache(threshold=1e6),  # every step between the first and the last is skipped, as of many rows alone
    "firstblock": FirstBlockCache(threshold=1e6),
    "taylorseer": TaylorSeer(interval=2, warmup=1),
    "diffusers-cache": DiffusersCache(options={"threshold": 1e6}),
    "bon": BoN(reward=redness, budget=8),
    "drafts": Drafts(reward=redness, budget=14, drafts=3),
    "rbf": RBF(reward=redness, budget=14),
    "smc": SMC(reward=redness, budget=8),
    "svdd": SVDD(reward=redness, budget=8, particles=1),
    "code": CoDe(reward=redness, budget=8, particles=1),
    "sop": SoP(reward=redness, budget=40, particles=1, walk=2),
}
QUANTIZERS: dict[str, Callable[[str], Any]] = {  # of a family: a plan is for one network
    "w8a8": lambda family: W8A8(),
    "w8a8-fp8": lambda family: W8A8(dtype="fp8"),
    "w4a16": lambda family: W4A16(),
    "w4a8": lambda family: W4A8(),
    "mixdq": mixdq_bed.uniform,
    "mixdq-static": lambda family: mixdq_bed.uniform(family, activation_scale="tensor"),
}
REFUSES = {
    **dict.fromkeys(
        ("euler", "heun", "dpmpp2m", "ancestral", "bon", "drafts", "rbf", "smc", "svdd", "code", "sop"), matrix.CLIPPED
    ),
    "stages": matrix.ONE_SIZE,
    "seacache": dict.fromkeys(matrix.CLIPPED, "the levels of this scheduler cannot be read"),
    "firstblock": matrix.NO_FIRST_BLOCK,
    "diffusers-cache": matrix.NO_CACHE_OF_DIFFUSERS,
}


def stock(case: Case) -> None:
    """Give another result than the stock call, the same one twice, and the stock result after removal."""
    pipe = case.make()
    before = case.call(pipe)
    result = case.call(case.wrap(pipe))
    assert result.shape == before.shape and bool(torch.isfinite(result).all())
    assert torch.equal(case.call(pipe), result)
    assert torch.equal(case.call(diffaccel.remove(pipe)), before)


def lora_before(case: Case) -> None:
    """Load a LoRA before wrapping: it is seen."""
    result = case.call(case.wrap(with_lora(case, case.make(), "one", 1)))
    assert not torch.equal(result, case.call(case.wrap(case.make())))


def lora_after(case: Case) -> None:
    """Load a LoRA into a wrapped pipeline, and unload it again: each is as before wrapping."""
    plain, pipe = with_lora(case, case.make(), "one", 1), case.wrap(case.make())
    without = case.call(pipe)
    assert torch.equal(case.call(with_lora(case, pipe, "one", 1)), case.call(case.wrap(plain)))
    for loaded in (pipe, diffaccel.remove(plain)):
        loaded.unload_lora_weights()
    unloaded = case.call(pipe)
    assert torch.equal(unloaded, case.call(case.wrap(plain)))
    torch.testing.assert_close(unloaded, without, **CLOSE)  # diffusers leaves SDXL's last bits changed


def lora_swapped(case: Case) -> None:
    """Switch between two adapters while wrapped, and wrap with each."""
    pipe = with_lora(case, with_lora(case, case.make(), "one", 1), "two", 2)
    expected = {}
    for name in ("one", "two"):
        pipe.set_adapters([name])
        expected[name] = case.call(case.wrap(pipe))
        diffaccel.remove(pipe)
    case.wrap(pipe)
    for name in ("one", "two"):
        pipe.set_adapters([name])
        assert torch.equal(case.call(pipe), expected[name])
    assert not torch.equal(*expected.values())


def lora_fused(case: Case) -> None:
    """Fuse a LoRA while wrapped, and before."""
    plain, pipe = with_lora(case, case.make(), "one", 1), case.wrap(with_lora(case, case.make(), "one", 1))
    for loaded in (plain, pipe):
        loaded.fuse_lora(adapter_names=["one"])
    assert torch.equal(case.call(pipe), case.call(case.wrap(plain)))


def fusing_refused(case: Case) -> None:
    """Refuse to fuse a LoRA into quantized weights, and draw as before."""
    pipe = case.wrap(with_lora(case, case.make(), "one", 1))
    expected = case.call(pipe)
    try:
        pipe.fuse_lora(adapter_names=["one"])
    except DiffAccelError as refusal:
        assert torch.equal(case.call(pipe), expected)
        raise NotHere(str(refusal)) from refusal
    raise AssertionError("an adapter was fused into codes")


def compiled(case: Case) -> None:
    """Compile the network before and after wrapping: both give the result of the network that is not compiled."""
    torch.compiler.reset()
    pipes = [case.make(), case.wrap(case.make())]
    for pipe in pipes:
        case.network(pipe).compile(backend="eager" if case.device == "cpu" else "aot_eager")
    expected = case.call(case.wrap(pipes[0]))
    assert torch.equal(case.call(pipes[1]), expected)
    if case.device == "cpu":  # where the backend runs the same operators
        assert torch.equal(case.call(case.wrap(case.make())), expected)


def second_size(case: Case) -> None:
    """Call one wrapped pipeline at two sizes, and at the first again: each is that of a new pipeline."""
    case.accepts(case.make(), "height")
    expected = {size: case.call(case.wrap(case.make()), size=size) for size in (32, 64)}
    pipe = case.wrap(case.make())
    for size in (32, 64, 32):
        assert torch.equal(case.call(pipe, size=size), expected[size])


def callback(case: Case) -> None:
    """Watch latents in a step callback, which changes nothing; edit them, which is seen."""
    pipe = case.make()
    case.accepts(pipe, "callback_on_step_end")
    steps: list[int] = []

    def watch(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        steps.append(i)
        return {}

    def halve(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        return {"latents": kwargs["latents"] / 2} if i == 0 else {}

    result = case.call(case.wrap(pipe))
    assert torch.equal(case.call(pipe, extra={"callback_on_step_end": watch}), result)
    assert steps and steps == list(range(len(steps)))
    assert not torch.equal(case.call(pipe, extra={"callback_on_step_end": halve}), result)


def generators(case: Case) -> None:
    """Pass one generator for all rows, and a list with one for each: a row depends on its own alone."""
    pipe = case.wrap(case.make())
    seeds = {seed: case.call(pipe, extra={"generator": _generators(0, seed)}) for seed in (1, 7)}
    torch.testing.assert_close(seeds[1][0], seeds[7][0], **CLOSE)
    assert not torch.allclose(seeds[1][1], seeds[7][1], **CLOSE)
    assert torch.equal(case.call(pipe), seeds[1])
    one = [case.call(pipe, extra={"generator": torch.Generator().manual_seed(5)}) for _ in range(2)]
    assert torch.equal(*one) and not torch.equal(one[0], seeds[1])


def negative(case: Case) -> None:
    """Pass another negative prompt, and leave guidance off: both are seen."""
    pipe = case.make()
    case.accepts(pipe, "negative_prompt")
    guided = case.call(case.wrap(pipe))
    assert not torch.equal(case.call(pipe, guided=False), guided)
    other = "green" if case.family.startswith("pixart") else ["green", "green"]
    assert not torch.equal(case.call(pipe, extra={"negative_prompt": other}), guided)
    assert torch.equal(case.call(pipe), guided)


def bfloat16(case: Case) -> None:
    """Give a result in bf16 that is no less precise than the stock call's, the same one twice."""
    pipe = case.make().to(torch.bfloat16)
    before = case.call(pipe)
    result = case.call(case.wrap(pipe))
    assert torch.promote_types(result.dtype, before.dtype) == result.dtype and bool(torch.isfinite(result).all())
    assert torch.equal(case.call(pipe), result)


SELF_CONTRACTS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        stock, lora_before, lora_after, lora_swapped, lora_fused, compiled, second_size, callback, generators, batch,
        negative, bfloat16,
    )
}  # fmt: skip


def model_offload(case: Case) -> None:
    """Call ``enable_model_cpu_offload``: the result is that of a pipeline on the device, up to rounding."""
    _offloaded(case, lambda pipe: pipe.enable_model_cpu_offload())


def group_offload(case: Case) -> None:
    """Call ``enable_group_offload`` by leaves."""
    _offloaded(case, matrix.enable_group_offload)


GPU_SELF_CONTRACTS: dict[str, Callable[[Case], None]] = {
    **SELF_CONTRACTS,
    **{f.__name__: f for f in (model_offload, group_offload)},
}


def contracts(device: str) -> dict[str, Callable[[Case], None]]:
    """Return the contracts of a device."""
    return SELF_CONTRACTS if device == "cpu" else GPU_SELF_CONTRACTS


def _offloaded(case: Case, enable: Callable[[Any], None]) -> None:
    expected = case.call(case.wrap(case.make()))
    pipe = case.make(place=False)
    matrix.enabled(case, pipe, enable)
    torch.testing.assert_close(case.call(case.wrap(pipe)), expected, **CLOSE)


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
