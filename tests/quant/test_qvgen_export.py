"""From trained layers to codes: equal outputs, files that load to the bit, kept ranks, published checkpoints."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qvgen_bed
import tiny
import torch
from diffusers import FluxPipeline, WanTransformer3DModel
from torch import Tensor, nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.kernels.low_bit_linear import low_bit_linear
from diffaccel.kernels.quantize_tokens import quantize_tokens
from diffaccel.quant import QVGen, convert, export_compressed_tensors, prepare_qat
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear
from diffaccel.quant.qvgen.decay import RankDecay
from diffaccel.quant.qvgen.importer import import_published
from diffaccel.quant.qvgen.layer import FakeQLinear
from diffaccel.quant.qvgen.prepare import fake_layers
from diffaccel.samplers import Scheduler

SMALL = QVGen(rank=4, steps=6, groups=10, layers="all")


def network(seed: int = 0) -> Any:
    return qvgen_bed.network(seed, heads=2, layers=1)


def ask(net: Any, seed: int = 0, times: tuple[float, ...] = (120.0, 870.0)) -> Tensor:
    x = torch.randn(2, *qvgen_bed.SHAPE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return qvgen_bed.call(net, x, torch.tensor(times) / 1000, None)


def shaken(net: Any, seed: int = 0) -> Any:
    """Move the trained parameters off their start, as training does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in fake_layers(net):
            for p, size in ((layer.weight_scale, 0.05), (layer.act_logit, 0.5)):
                p.mul_(1 + size * torch.randn(p.shape, generator=draw))
            if layer.weight_zero.requires_grad:
                layer.weight_zero.add_(0.3 * torch.randn(layer.weight_zero.shape, generator=draw))
    return net


@pytest.mark.parametrize(
    "options",
    (
        {}, {"weight_bits": 3, "act_bits": 3}, {"weight_bits": 3, "dense": True}, {"weight_bits": 8, "act_bits": 6},
        {"keep_rank": 2}, {"recipe": "dsa", "symmetric": True, "rank": 0}, {"layers": "body"},
    ),
    ids=str,
)  # fmt: skip
def test_codes_compute_what_training_computed_and_load_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL, **options)
    net = shaken(prepare_qat(network(), config))
    if config.layers == "all":
        assert all(isinstance(m, FakeQLinear) for m in net.modules() if isinstance(m, nn.Linear))
    RankDecay(net, config.schedule).step(config.steps)
    trained = ask(net)
    convert(net)
    found = ask(net)
    assert float((found - trained).norm() / trained.norm()) < 1e-5
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LowBitLinear)}
    assert layers and all(m.form.rank == config.keep_rank for m in layers.values())
    assert not [key for key in net.state_dict() if "side_" in key] or config.keep_rank
    net.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(ask(again), found)
    one, other = net.state_dict(), again.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(DiffAccelError, match="quantized already"):
        prepare_qat(again, SMALL)


def test_the_accumulators_are_the_sums_of_codes() -> None:
    """Of the trained layer's own codes: the product without scales is the exact integer sum."""
    net = convert(shaken(prepare_qat(network(), replace(SMALL, rank=0))))
    layer = next(m for m in net.modules() if isinstance(m, LowBitLinear) and m.in_features > 32)
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(1))
    a, _ = quantize_tokens(x, layer.act_clip[:1], 4, False, "int8")
    w, one = layer.centred_codes(), torch.ones(layer.out_features, 1)
    stats = torch.tensor([[1.0, 0.0, 0.0]]).expand(9, 3).contiguous()
    y = low_bit_linear(a, stats, w, one, 0 * one, 0 * one, None, torch.float32)
    assert torch.equal(y.to(torch.int64), a.to(torch.int64) @ w.to(torch.int64).t())


def test_groups_follow_the_time_whatever_the_order_of_calls() -> None:
    net = convert(shaken(prepare_qat(network(), replace(SMALL, rank=0))))
    both = ask(net)
    ask(net, times=(500.0, 500.0))
    assert torch.equal(ask(net), both) and not torch.equal(ask(net, times=(870.0, 120.0)), both)
    x = torch.randn(2, *qvgen_bed.SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = qvgen_bed.call(net, x[1:], torch.tensor([0.87]), None)
    torch.testing.assert_close(alone, both[1:], rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(net)
    ask(net, times=(500.0, 500.0))
    assert torch.equal(ask(copied), both)


def test_threads_that_call_one_network_have_groups_of_their_own() -> None:
    net = convert(shaken(prepare_qat(network(), replace(SMALL, rank=0))))
    both = ask(net)
    layer = next(m for m in net.modules() if isinstance(m, LowBitLinear))

    def other(module: Any, args: Any) -> None:  # another thread's call, between the hook of this one and its layers
        hook.remove()
        thread = threading.Thread(target=ask, args=(net,), kwargs={"times": (870.0, 120.0)})
        thread.start()
        thread.join()

    hook = layer.register_forward_pre_hook(other)
    assert torch.equal(ask(net), both)


@pytest.mark.slow
def test_groups_follow_the_time_of_a_compiled_network() -> None:
    net = convert(shaken(prepare_qat(network(), replace(SMALL, rank=0))))
    expected = [ask(net), ask(net, times=(870.0, 120.0))]
    torch.compiler.reset()
    net.compile(backend="aot_eager")
    for times, before in zip(((120.0, 870.0), (870.0, 120.0)), expected, strict=True):
        torch.testing.assert_close(ask(net, times=times), before, rtol=1e-4, atol=1e-5)


def test_a_branch_that_is_left_is_no_result() -> None:
    net = prepare_qat(network(), SMALL)
    with pytest.raises(DiffAccelError, match=r"side branch of rank 4 is left.*keep_rank=True"):
        convert(net)
    before = ask(net)
    found = ask(convert(net, keep_rank=True))
    assert float((found - before).norm() / before.norm()) < 1e-5


def test_bad_networks_are_refused_before_anything_changes() -> None:
    net = network()
    with pytest.raises(DiffAccelError, match="was not prepared"):
        convert(net)
    net.blocks[0].ffn.net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(DiffAccelError, match=r"ffn.net.2' holds infinities"):
        prepare_qat(net, SMALL)
    assert not list(fake_layers(net))
    ready = prepare_qat(network(), SMALL)
    with pytest.raises(DiffAccelError, match="prepared for training already"):
        prepare_qat(ready, SMALL)
    next(fake_layers(ready))[1].weight_scale.data[0] = float("inf")
    with pytest.raises(DiffAccelError, match=r"infinities|not finite"):
        convert(ready, keep_rank=True)
    with pytest.raises(DiffAccelError, match="no multiple of 2"):
        prepare_qat(nn.Sequential(nn.Linear(33, 8)), SMALL)


def test_adapters_are_refused() -> None:
    from peft import LoraConfig

    net = tiny.make("flux").transformer
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(DiffAccelError, match="LoRA adapters"):
        prepare_qat(net, SMALL)


def test_weights_that_two_layers_share_stay(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    net[1].weight = net[0].weight
    prepare_qat(net, replace(SMALL, rank=12))
    assert [type(m).__name__ for m in net] == ["Linear", "Linear", "FakeQLinear"]
    assert "cut to the size of 1 small layers" in caplog.text


@pytest.mark.slow
def test_without_training_on_a_pipeline_and_off_again(tmp_path: Path) -> None:
    pipe = tiny.make("flux")
    stock = pipe(**tiny.call_kwargs("flux")).images.clone()
    diffaccel.accelerate(pipe, QVGen(keep_rank=4))
    drawn = pipe(**tiny.call_kwargs("flux")).images.clone()
    assert 0 < float((drawn - stock).norm() / stock.norm()) < 0.1
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**tiny.call_kwargs("flux")).images, drawn)
    with pytest.raises(DiffAccelError, match="real zeros"):
        export_compressed_tensors(pipe.transformer, tmp_path / "schema")
    diffaccel.remove(pipe)
    assert torch.equal(pipe(**tiny.call_kwargs("flux")).images, stock)


def test_a_rank_that_is_kept_is_no_larger_than_a_layer() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), QVGen(rank=64, keep_rank=40, steps=100))
    layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, LowBitLinear)}
    assert {m.form.rank for m in layers.values()} == {32}
    for name, m in layers.items():
        expected = {key: shape for key, (shape, _) in m.form.shapes(m.out_features, m.in_features).items()}
        assert {key: tuple(getattr(m, key).shape) for key in m.stored} == expected, name
        assert name in pipe.transformer.config.quantization_config["layers"][str(m.form)]  # what loads it


def test_files_take_a_quarter_of_16_bits() -> None:
    linear = nn.Linear(1024, 64, bias=False, dtype=torch.bfloat16)
    size = LowBitLinear.of(linear, LowBit()).weight_bytes()
    dense = LowBitLinear.of(linear, LowBit(weight_bits=3, dense=True)).weight_bytes()
    assert size < 0.27 * 2**17 and dense < 0.2 * 2**17


@pytest.mark.slow
def test_guidance_may_stop_early_on_few_bits() -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, QVGen(), Scheduler())
    plain = pipe(**tiny.call_kwargs("flux")).images.clone()
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, QVGen(), Scheduler(guidance_stop=1.0))
    assert torch.equal(pipe(**tiny.call_kwargs("flux")).images, plain)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, QVGen(), Scheduler(guidance_stop=0.82))
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipe(**tiny.call_kwargs("flux", steps=50, batch=1))
    hook.remove()
    assert len(calls) == 91


# -- published checkpoints --------------------------------------------------------------------------------------------


def published(seed: int = 0) -> tuple[dict[str, Tensor], WanTransformer3DModel]:
    """Return tensors under the names of the published code, and the network whose weights they are."""
    net, draw, tensors = network(seed), torch.Generator().manual_seed(seed), {}
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    for name, value in net.state_dict().items():
        owner, _, part = name.rpartition(".")
        tensors[f"{owner}.{part[0]}" if owner in layers else name] = value.clone()
    for name, m in layers.items():
        tensors[f"{name}.wquantizer.scale"] = m.weight.detach().abs().amax(1, keepdim=True) / 7
        tensors[f"{name}.wquantizer.zero_point"] = 7 + torch.rand(m.out_features, 1, generator=draw)
        for end in ("upper", "lower"):
            tensors[f"{name}.aquantizer.{end}"] = 2 + torch.rand(50, generator=draw)
    return tensors, net


def test_a_published_checkpoint_is_read_with_its_double_clipping() -> None:
    tensors, net = published()
    found = import_published(network(1), tensors, QVGen.paper())
    name = "blocks.0.attn1.to_q"
    layer = found.get_submodule(name)
    assert sum(isinstance(m, LowBitLinear) for m in found.modules()) == sum(
        isinstance(m, nn.Linear) for m in net.modules()
    )
    scale, zero = tensors[f"{name}.wquantizer.scale"], tensors[f"{name}.wquantizer.zero_point"]
    expected = ((tensors[f"{name}.w"] / scale + zero).round().clamp(0, 15) - zero) * scale
    torch.testing.assert_close(layer.dequantize(), expected, rtol=1e-5, atol=1e-6)
    assert float(layer.act_clip[0, 1]) == pytest.approx(0.95 * float(tensors[f"{name}.aquantizer.upper"][-1].sigmoid()))
    exact = ask(net)
    assert float((ask(found) - exact).norm() / exact.norm()) < 1


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (lambda t: t.pop("blocks.0.attn1.to_q.aquantizer.lower"), "lacks 'blocks.0.attn1.to_q.aquantizer.lower'"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "has 1 more \\(extra\\)"),
        (lambda t: t.pop("patch_embedding.weight"), "lacks 1 tensors \\(patch_embedding.weight\\)"),
        (lambda t: t.update({"other.wquantizer.scale": torch.zeros(1)}), "first 'other'"),
        (lambda t: t.update({"blocks.0.attn1.to_q.w": torch.zeros(2, 2)}), "belongs to another model"),
        (lambda t: [t.pop(key) for key in list(t) if "wquantizer" in key], "none of QVGen's"),
    ),
)
def test_checkpoints_that_do_not_fit(change: Any, words: str) -> None:
    tensors, _ = published()
    change(tensors)
    with pytest.raises(DiffAccelError, match=words):
        import_published(network(1), tensors, QVGen.paper())
