"""FusedBlocks on the CPU: FLUX's blocks to the bit, whatever is on them, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import matrix
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import Tensor, nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.modules import Capture, FusedBlocks
from diffaccel.modules.fused.forward import Forward
from diffaccel.quant import W4A8, W8A8
from diffaccel.samplers import Spectrum
from tests.support.replayed_calls import ReplayedCalls, replayed_calls

__all__ = ["replayed_calls"]  # a fixture
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny pipeline with several blocks of each kind, so that each gets its tokens from another."""
    pipe = tiny.make("flux")
    torch.manual_seed(0)
    pipe.transformer = tiny._stir(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    return pipe.to(dtype)


def draw(pipe: Any, **changes: Any) -> Tensor:
    return torch.as_tensor(pipe(**{**tiny.call_kwargs("flux"), **changes}).images).clone()


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["fused_blocks"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pictures_equal_and_every_call_is_fused(dtype: torch.dtype) -> None:
    pipe = make(dtype)
    stock = draw(pipe)
    diffaccel.accelerate(pipe, FusedBlocks())
    assert torch.equal(draw(pipe), stock)
    report = told(pipe)
    assert (
        report["blocks"] == 5 and report["fused_calls"] % 5 == 0 and report["fused_calls"] and not report["stock_calls"]
    )
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe), stock)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_blocks_of_other_families(family: str, dtype: torch.dtype) -> None:
    case = matrix.Case(family, None)
    pipe = case.make().to(dtype)

    def picture() -> Tensor:
        return case.call(pipe)

    for quantizer in ((), (W8A8(),)):
        expected = picture() if not quantizer else (diffaccel.accelerate(pipe, *quantizer), picture())[1]
        diffaccel.accelerate(pipe, FusedBlocks())
        assert torch.equal(picture(), expected)
        assert told(pipe)["fused_calls"] and not told(pipe)["stock_calls"]
        diffaccel.remove(pipe)


@pytest.mark.slow
def test_several_pictures_and_projections_in_one() -> None:
    pipe = make(torch.bfloat16)
    stock = [draw(pipe, **tiny.call_kwargs("flux", batch=batch, seed=5)) for batch in (1, 2)]
    diffaccel.accelerate(pipe, FusedBlocks())
    for batch in (1, 2):
        assert torch.equal(draw(pipe, **tiny.call_kwargs("flux", batch=batch, seed=5)), stock[batch - 1])
    pipe.transformer.fuse_qkv_projections()
    fused = draw(pipe)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe), fused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer", [W8A8(), W8A8(dtype="fp8"), W4A8(), W8A8(skip=("transformer_blocks.0",))], ids=str
)
def test_quantized_layers_share_codes_in_either_order(quantizer: Any) -> None:
    pipe = make()
    stock = draw(pipe)
    quantized = draw(diffaccel.accelerate(pipe, quantizer))
    assert torch.equal(draw(diffaccel.accelerate(pipe, FusedBlocks())), quantized)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, FusedBlocks())
    assert torch.equal(draw(diffaccel.accelerate(pipe, quantizer)), quantized)
    assert not told(pipe)["stock_calls"] and not torch.equal(quantized, stock)
    assert torch.equal(draw(diffaccel.remove(pipe)), stock)


def test_one_quantization_feeds_all_layers_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffaccel.modules.fused import steps
    from diffaccel.quant import linear

    counts = {"layers": 0, "norms": 0}
    norms, rows = steps.norm_modulate_codes, linear.quantize_rows

    def count(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(steps, "norm_modulate_codes", count("norms", norms))
    monkeypatch.setattr(linear, "quantize_rows", count("layers", rows))
    pipe = diffaccel.accelerate(make(), W8A8(), FusedBlocks())
    draw(pipe, num_inference_steps=1)
    network_calls = told(pipe)["fused_calls"] // 5
    assert network_calls and counts == {"layers": 0, "norms": (2 * 2 + 3) * network_calls}


def test_adapters_beside_quantized_layers() -> None:
    case = matrix.Case("flux", None)
    pipe = matrix.with_lora(case, case.make(), "one", 1)
    for methods in ((), (W8A8(),)):
        expected = draw(diffaccel.accelerate(pipe, *methods) if methods else pipe)
        assert torch.equal(draw(diffaccel.accelerate(pipe, FusedBlocks())), expected)
        assert not told(pipe)["stock_calls"]
        diffaccel.remove(pipe)


def test_what_is_changed_in_a_block_runs_its_own_forward_and_is_named() -> None:
    pipe = diffaccel.accelerate(make(), FusedBlocks())
    block = pipe.transformer.transformer_blocks[0]
    seen: list[int] = []
    handle = block.norm1.register_forward_hook(lambda module, args, output: seen.append(1))
    expected = draw(pipe)
    assert seen and list(told(pipe)["stock_calls"]) == ["its norms are not the stock ones"]
    handle.remove()

    class Louder(type(block.attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * part for part in super().__call__(*args, **kwargs))

    block.attn.set_processor(Louder())
    louder = draw(pipe)
    assert not torch.equal(louder, expected) and "its attention has a Louder" in told(pipe)["stock_calls"]
    assert torch.equal(draw(diffaccel.remove(pipe)), louder)


def test_gradients_and_autocast_are_left_to_the_blocks() -> None:
    pipe = diffaccel.accelerate(make(), FusedBlocks())
    block = pipe.transformer.transformer_blocks[0]
    inputs = [torch.randn(1, 3, 32, requires_grad=True), torch.randn(1, 2, 32), torch.randn(1, 32)]
    block(*inputs)[0].sum().backward()
    assert inputs[0].grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = block(*inputs)
        assert all(map(torch.equal, ours, type(block).forward(block, *inputs)))
    assert told(pipe)["stock_calls"] == {"gradients are on": 1, "autocast is on": 1}


def test_copies_and_pickles_keep_it_and_are_freed_apart() -> None:
    pipe = make()
    stock = draw(pipe)
    diffaccel.accelerate(pipe, FusedBlocks())
    other = copy.deepcopy(pipe)
    blocks = [vars(module)["forward"] for module in other.transformer.modules() if "forward" in vars(module)]
    assert len(blocks) == 5 and all(any(f.block is m for m in other.transformer.modules()) for f in blocks)
    diffaccel.remove(other)
    assert not any("forward" in vars(module) for module in other.transformer.modules())
    assert torch.equal(draw(other), stock) and told(pipe)["blocks"] == 5
    network = pickle.loads(pickle.dumps(pipe.transformer))
    assert isinstance(vars(network.transformer_blocks[0])["forward"], Forward)


@pytest.mark.slow
def test_compiled_blocks_are_those_without_it_and_compile_once_a_kind() -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    network = diffaccel.accelerate(make(), FusedBlocks()).transformer
    torch.compiler.reset()
    network.compile_repeated_blocks(fullgraph=True, backend=backend)
    tokens, text, temb = torch.randn(1, 3, 32), torch.randn(1, 2, 32), torch.randn(1, 32)
    with torch.no_grad():
        for block in (*network.transformer_blocks, *network.single_transformer_blocks):
            assert all(map(torch.equal, block(tokens, text, temb), type(block).forward(block, tokens, text, temb)))
    assert len(graphs) == 2


@pytest.mark.parametrize("first", [True, False])
def test_below_a_step_cache(first: bool) -> None:
    cache = Spectrum(warmup=2)
    expected = draw(diffaccel.accelerate(make(), cache), num_inference_steps=6)
    pipe = make()
    for method in (FusedBlocks(), cache) if first else (cache, FusedBlocks()):
        diffaccel.accelerate(pipe, method)
    assert torch.equal(draw(pipe, num_inference_steps=6), expected)
    assert told(pipe)["fused_calls"]
    diffaccel.remove(pipe)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


@pytest.mark.slow
def test_below_capture_whatever_comes_first(replayed_calls: type[ReplayedCalls]) -> None:
    pipe = make()
    stock = draw(pipe)
    diffaccel.accelerate(pipe, Capture(), FusedBlocks())
    assert torch.equal(draw(pipe), stock)
    report = diffaccel.summary(pipe).reports["capture"]
    assert report["replays"] and not report["dropped"]
    assert torch.equal(draw(diffaccel.remove(pipe)), stock)


class Doubled:
    """A forward that another tool puts on a block."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def test_another_tool_on_the_blocks() -> None:
    pipe = make()
    stock = draw(pipe)
    block: nn.Module = pipe.transformer.transformer_blocks[1]
    block.forward = Doubled(block.forward)  # type: ignore[method-assign]
    with pytest.raises(DiffAccelError, match="replaced by a Doubled"):
        diffaccel.accelerate(pipe, FusedBlocks())
    assert not any(isinstance(vars(module).get("forward"), Forward) for module in pipe.transformer.modules())
    left_behind = block.forward = type(block).forward.__get__(block)  # type: ignore[method-assign]
    diffaccel.accelerate(pipe, FusedBlocks())
    assert torch.equal(draw(pipe), stock) and told(pipe)["fused_calls"]
    diffaccel.remove(pipe)
    assert vars(block)["forward"] is left_behind
    diffaccel.accelerate(pipe, FusedBlocks())
    block.forward = Doubled(block.forward)  # type: ignore[method-assign]
    assert torch.equal(draw(pipe), stock)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe), stock) and isinstance(vars(block)["forward"], Doubled)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "sequential"])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_below_the_hooks_of_offloading_whatever_comes_and_goes_first(family: str, kind: str) -> None:
    """Hooks of a whole block run around the fused one; those of its layers may leave it to its own forward."""

    def hook(network: nn.Module) -> None:
        if kind == "sequential":  # what enable_sequential_cpu_offload puts on modules, on one device
            add_hook_to_module(blocks(network)[0], ModelHook())
        else:
            size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            apply_group_offloading(network, torch.device("cpu"), torch.device("cpu"), kind, **size)

    def unhook(network: nn.Module) -> None:
        if kind == "sequential":
            remove_hook_from_module(network, recurse=True)
        else:
            HookRegistry.check_if_exists_or_initialize(network).remove_hook("group_offloading", recurse=True)

    def blocks(network: Any) -> list[Any]:
        return list(network.transformer_blocks if family == "flux" else network.blocks)

    case = matrix.Case(family, None)
    pipe = make() if family == "flux" else case.make()
    stock = case.call(pipe)
    on = {"fuse": lambda: diffaccel.accelerate(pipe, FusedBlocks()), "hook": lambda: hook(pipe.transformer)}
    off = {"fuse": lambda: diffaccel.remove(pipe), "hook": lambda: unhook(pipe.transformer)}
    for first, left in (("hook", "fuse"), ("hook", "hook"), ("fuse", "hook"), ("fuse", "fuse")):
        for name in (first, "hook" if first == "fuse" else "fuse"):
            on[name]()
        assert torch.equal(case.call(pipe), stock)
        fused, left_alone = told(pipe)["fused_calls"], told(pipe)["stock_calls"]
        assert fused or left_alone if kind == "leaf_level" else fused and not left_alone
        off[left]()
        assert torch.equal(case.call(pipe), stock)
        off["hook" if left == "fuse" else "fuse"]()
        assert torch.equal(case.call(pipe), stock)
        for block in blocks(pipe.transformer):
            assert vars(block).get("forward") in (None, type(block).forward.__get__(block))


def test_twice_through_pipelines_that_share_a_network_and_other_networks() -> None:
    pipe = diffaccel.accelerate(make(), FusedBlocks())
    other = type(pipe)(**pipe.components)
    with pytest.raises(DiffAccelError, match="through another pipeline"):
        diffaccel.accelerate(other, FusedBlocks())
    with pytest.raises(DiffAccelError, match="knows the blocks of FluxTransformer2DModel"):
        diffaccel.accelerate(tiny.make("sd"), FusedBlocks())


def test_the_paper_s_form_and_options() -> None:
    assert FusedBlocks.paper() == FusedBlocks()
    with pytest.raises(DiffAccelError, match="folded"):
        FusedBlocks(rounding="none")  # type: ignore[arg-type]
    pipe = make()
    stock = draw(pipe)
    assert torch.equal(draw(diffaccel.accelerate(pipe, FusedBlocks(rounding="folded"))), stock)  # a kernel's own
