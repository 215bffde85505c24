"""The contract matrix: what users do besides calling a pipeline, for every family, under every method.

A contract is a function of a :class:`Case` that raises when it is broken. One that a pipeline cannot have (no LoRA
loader, no size argument, no callback in its stock call) raises :class:`NotHere` with the reason, which the table shows.
The methods here leave a result as it is; ``self_contracts`` has those that change it, and what they keep.
``scripts/contract_matrix.py`` prints and records the table; ``tests/test_matrix.py`` and ``tests/gpu`` run its cells.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import tiny_more
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find
from diffaccel.modules import Capture, FusedBlocks
from diffaccel.quant import TIB
from diffaccel.samplers import (
    NFD,
    Bottleneck,
    DiffusersCache,
    Euler,
    FirstBlockCache,
    RollingContext,
    Scheduler,
    SeaCache,
    Spectrum,
    SuperDiff,
    TaylorSeer,
)

FAMILIES = tiny.FAMILIES + tiny_more.FAMILIES
METHODS = {  # each leaves the result as it is: that of the stock call, or of the method in REFERENCES
    "scheduler": Scheduler(),
    "superdiff": SuperDiff(op="average", eta=0.0, state="stock"),  # of one component, which is Euler's method
    "one-stage": Bottleneck(preset="speed", scales=(1.0,)),
    "spectrum-all-real": Spectrum(warmup=1000),
    "seacache-0": SeaCache(threshold=0.0),
    "firstblock-0": FirstBlockCache(threshold=0.0),
    "taylorseer-1": TaylorSeer(interval=1),
    "diffusers-cache-0": DiffusersCache(options={"threshold": 0.0}),
    "tib": TIB(),
    "fused-blocks": FusedBlocks(),
    "nfd-1": NFD(draft=1),  # on a world model: tests/samplers/nfd
    "rolling-context": RollingContext(),  # on AnyFlowFARPipeline: tests/samplers/caches
}
GPU_METHODS = {**METHODS, "capture": Capture()}
REFERENCES = {"one-stage": Euler(), "superdiff": Euler(state="stock")}
UNETS, ONE_BLOCK = ("sdxl", "sd", "ddpm", "ddim"), ("cogvideox", "cogvideox15")  # these tiny networks have one block
CLIPPED = dict.fromkeys(("ddpm", "ddim"), "has clip_sample=True")
ONE_SIZE = dict.fromkeys(tiny_more.SIZELESS, "draws at one size only")
NO_FIRST_BLOCK = {
    **dict.fromkeys(UNETS, "looks at the first of a transformer's blocks"),
    **dict.fromkeys(ONE_BLOCK, "hooked no block"),
}
NO_CACHE_OF_DIFFUSERS = {
    **dict.fromkeys((*UNETS, "sd3", "pixart", "pixart_alpha", "dit"), "needs a network that diffusers can cache"),
    **dict.fromkeys(ONE_BLOCK, "needs more blocks"),
}
NOT_FUSED = {name: "knows the blocks of" for name in FAMILIES if not name.startswith(("flux", "sd3", "wan"))}
REFUSES = {  # by method and family: a part of the sentence
    "one-stage": ONE_SIZE,
    "firstblock-0": NO_FIRST_BLOCK,
    "diffusers-cache-0": NO_CACHE_OF_DIFFUSERS,
    "superdiff": CLIPPED,
    "fused-blocks": NOT_FUSED,
    "nfd-1": dict.fromkeys(FAMILIES, "drafts the frames of a world model"),
    "rolling-context": dict.fromkeys(FAMILIES, "keeps the context of a video drawn chunk by chunk"),
}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


class NotHere(Exception):
    """The reason why a contract has no meaning for a pipeline."""


@dataclass
class Case:
    """One family under one method."""

    family: str
    method: Any
    device: str = "cpu"
    reference: Any = None  # whose result the method must give; None for the stock call

    @property
    def close(self) -> dict[str, float]:
        """How far a row of a batch may be from the row alone, whose sums have another order."""
        return CLOSE

    def make(self, place: bool = True) -> Any:
        pipe = (tiny if self.family in tiny.FAMILIES else tiny_more).make(self.family)
        return pipe.to(self.device) if place and self.device != "cpu" else pipe

    def call(self, pipe: Any, **changes: Any) -> torch.Tensor:
        extra = changes.pop("extra", {})
        module = tiny if self.family in tiny.FAMILIES else tiny_more
        return tiny_more.result(pipe(**{**module.call_kwargs(self.family, **changes), **extra})).clone()

    def expected(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """Return the result that a method must give that leaves it as it is, on a pipeline without methods."""
        if self.reference is None:
            return self.call(pipe, **changes)
        diffaccel.accelerate(pipe, self.reference)
        try:
            return self.call(pipe, **changes)
        finally:
            diffaccel.remove(pipe)

    def wrap(self, pipe: Any) -> Any:
        return diffaccel.accelerate(pipe, self.method)

    def network(self, pipe: Any) -> Any:
        return getattr(pipe, find(pipe).denoiser)

    def accepts(self, pipe: Any, name: str) -> None:
        if name not in inspect.signature(type(pipe).__call__).parameters:
            raise NotHere(f"{type(pipe).__name__} takes no {name}")


def refusal(case: Case) -> str:
    """Return the sentence by which a method refuses a pipeline, which then computes what it did; "" for none."""
    pipe = case.make()
    before = case.call(pipe)
    try:
        case.call(case.wrap(pipe))
    except DiffAccelError as error:
        assert torch.equal(case.call(diffaccel.remove(pipe)), before)
        return str(error)
    return ""


# -- on any machine ----------------------------------------------------------------------------------------------------


def stock(case: Case) -> None:
    """Equal the stock call (or the reference's) to the bit, and the stock call after removal."""
    pipe = case.make()
    before = case.call(pipe)
    expected = before if case.reference is None else case.expected(pipe)
    assert torch.equal(case.call(case.wrap(pipe)), expected)
    assert torch.equal(case.call(diffaccel.remove(pipe)), before)


def lora_before(case: Case) -> None:
    """Load a LoRA before wrapping."""
    pipe = with_lora(case, case.make(), "one", 1)
    expected = case.expected(pipe)
    assert not torch.equal(expected, case.expected(case.make()))
    assert torch.equal(case.call(case.wrap(pipe)), expected)


def lora_after(case: Case) -> None:
    """Load a LoRA into a wrapped pipeline, and unload it again."""
    expected = case.expected(plain := with_lora(case, case.make(), "one", 1))
    pipe = with_lora(case, case.wrap(case.make()), "one", 1)
    assert torch.equal(case.call(pipe), expected)
    for loaded in (pipe, plain):
        loaded.unload_lora_weights()
    assert torch.equal(case.call(pipe), case.expected(plain))


def lora_swapped(case: Case) -> None:
    """Switch between two adapters while wrapped."""
    pipe = with_lora(case, with_lora(case, case.make(), "one", 1), "two", 2)
    expected = {}
    for name in ("one", "two"):
        pipe.set_adapters([name])
        expected[name] = case.expected(pipe)
    case.wrap(pipe)
    for name in ("one", "two"):
        pipe.set_adapters([name])
        assert torch.equal(case.call(pipe), expected[name])


def lora_fused(case: Case) -> None:
    """Fuse a LoRA while wrapped; the result is that of the fused stock pipeline."""
    plain, pipe = with_lora(case, case.make(), "one", 1), case.wrap(with_lora(case, case.make(), "one", 1))
    for loaded in (plain, pipe):
        loaded.fuse_lora(adapter_names=["one"])
    fused = case.call(pipe)
    assert torch.equal(fused, case.expected(plain)) and not torch.equal(fused, case.expected(case.make()))
    assert torch.equal(case.call(diffaccel.remove(pipe)), case.call(plain))


def compiled(case: Case) -> None:
    """Compile the network before and after wrapping."""
    torch.compiler.reset()
    pipes = [case.make(), case.wrap(case.make())]
    for pipe in pipes:
        case.network(pipe).compile(backend="eager" if case.device == "cpu" else "aot_eager")
    expected = case.expected(pipes[0])
    assert torch.equal(case.call(pipes[1]), expected)
    assert torch.equal(case.call(case.wrap(pipes[0])), expected)


def second_size(case: Case) -> None:
    """Call one wrapped pipeline at two sizes, and at the first again."""
    pipe = case.make()
    case.accepts(pipe, "height")
    expected = {size: case.expected(pipe, size=size) for size in (32, 48)}
    case.wrap(pipe)
    for size in (32, 48, 32):
        assert torch.equal(case.call(pipe, size=size), expected[size])


def callback(case: Case) -> None:
    """Edit latents in a step callback."""
    pipe = case.make()
    case.accepts(pipe, "callback_on_step_end")

    def halve(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        return {"latents": kwargs["latents"] / 2} if i == 1 else {}

    expected = case.expected(pipe, extra={"callback_on_step_end": halve})
    assert not torch.equal(expected, case.expected(pipe))
    assert torch.equal(case.call(case.wrap(pipe), extra={"callback_on_step_end": halve}), expected)


def generators(case: Case) -> None:
    """Pass one generator for all rows, and a list with one for each."""
    pipe = case.make()
    lists = case.expected(pipe)
    one = case.expected(pipe, extra={"generator": torch.Generator().manual_seed(5)})
    case.wrap(pipe)
    assert torch.equal(case.call(pipe), lists)
    assert torch.equal(case.call(pipe, extra={"generator": torch.Generator().manual_seed(5)}), one)


def batch(case: Case) -> None:
    """Compare a row of a batch with the row alone, up to rounding."""
    pipe = case.wrap(case.make())
    both = case.call(pipe)
    torch.testing.assert_close(case.call(pipe, batch=1), both[:1], **case.close)


def negative(case: Case) -> None:
    """Pass a negative prompt, and leave guidance off: both act as in the stock call."""
    pipe = case.make()
    case.accepts(pipe, "negative_prompt")
    for guided in (True, False):
        expected = case.expected(pipe, guided=guided)
        assert torch.equal(case.call(case.wrap(pipe), guided=guided), expected)
        diffaccel.remove(pipe)
    other = "green" if case.family.startswith("pixart") else ["green", "green"]
    assert not torch.equal(case.call(pipe), case.call(pipe, extra={"negative_prompt": other}))
    expected = case.expected(pipe, extra={"negative_prompt": other})
    assert torch.equal(case.call(case.wrap(pipe), extra={"negative_prompt": other}), expected)


def bfloat16(case: Case) -> None:
    """Equal the stock call in bf16 within one unit in the last place."""
    pipe = case.make().to(torch.bfloat16)
    expected = case.expected(pipe).float()
    wrapped = case.call(case.wrap(pipe)).float()
    unit = torch.finfo(torch.bfloat16).eps * expected.abs()
    assert ((wrapped - expected).abs() <= unit).all(), f"off by {float((wrapped - expected).abs().max()):.2g}"


# -- on a CUDA device --------------------------------------------------------------------------------------------------


def model_offload(case: Case) -> None:
    """Call ``enable_model_cpu_offload``: the result is stock, and weights rest where the stock call leaves them."""
    _offloaded(case, lambda pipe: pipe.enable_model_cpu_offload())


def group_offload(case: Case) -> None:
    """Call ``enable_group_offload`` by leaves."""
    _offloaded(case, enable_group_offload)


def enable_group_offload(pipe: Any) -> None:
    devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    pipe.enable_group_offload(**devices, offload_type="leaf_level")


def enabled(case: Case, pipe: Any, enable: Callable[[Any], None]) -> None:
    """Enable offloading; raise :class:`NotHere` for a network that diffusers cannot offload."""
    try:
        enable(pipe)
    except ValueError as error:
        if "does not support group offloading" in str(error):
            raise NotHere(f"diffusers has no group offloading for {type(case.network(pipe)).__name__}") from error
        raise


def _offloaded(case: Case, enable: Callable[[Any], None]) -> None:
    pipe = case.make(place=False)
    enabled(case, pipe, enable)
    if isinstance(case.method, Capture | TIB):
        _refused(case, pipe)
    expected = case.expected(pipe)
    rest = [p.device.type for p in case.network(pipe).parameters()]
    assert torch.equal(case.call(case.wrap(pipe)), expected)
    assert [p.device.type for p in case.network(pipe).parameters()] == rest


def _refused(case: Case, pipe: Any) -> None:
    """Expect that a method is refused whose weights others must not move."""
    try:
        case.wrap(pipe)
    except DiffAccelError as refusal:
        raise NotHere(str(refusal)) from refusal
    raise AssertionError("offloaded weights were taken")


CONTRACTS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        stock, lora_before, lora_after, lora_swapped, lora_fused, compiled, second_size, callback, generators, batch,
        negative, bfloat16,
    )
}  # fmt: skip
GPU_CONTRACTS: dict[str, Callable[[Case], None]] = {
    **CONTRACTS,
    **{f.__name__: f for f in (model_offload, group_offload)},
}


def contracts(device: str) -> dict[str, Callable[[Case], None]]:
    """Return the contracts of a device."""
    return CONTRACTS if device == "cpu" else GPU_CONTRACTS


# -- LoRA --------------------------------------------------------------------------------------------------------------


def with_lora(case: Case, pipe: Any, name: str, seed: int) -> Any:
    """Load a LoRA file of the pipeline's own format, with weights large enough to be seen."""
    if not hasattr(pipe, "load_lora_weights"):
        raise NotHere(f"{type(pipe).__name__} has no LoRA loader in diffusers")
    with tempfile.TemporaryDirectory() as folder:
        type(pipe).save_lora_weights(Path(folder), **_lora_layers(case.family, seed))
        pipe.load_lora_weights(folder, adapter_name=name)
    return pipe


@functools.cache
def _lora_layers(family: str, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """What ``save_lora_weights`` takes for a family."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    case = Case(family, None)
    donor = case.make(place=False)
    network = case.network(donor)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    draw = torch.Generator().manual_seed(seed)
    for key, p in network.named_parameters():
        if "lora" in key:
            p.data = torch.randn(p.shape, generator=draw)
    return {f"{find(donor).denoiser}_lora_layers": get_peft_model_state_dict(network)}
