"""The scan of errors: a spoiled layer is found and proposed, the pipeline is as it was."""

from __future__ import annotations

import pytest
import tiny
import tiny_more
import torch
from diffusers import FluxPipeline

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import W4A16, W8A8, scan_errors
from diffaccel.quant.plan import plan
from diffaccel.quant.swap import quantized

SPOILED = "transformer_blocks.0.ff.net.2"


def draw(pipe: FluxPipeline) -> torch.Tensor:
    return tiny_more.result(pipe(**tiny.call_kwargs("flux"))).clone()


def spoiled() -> FluxPipeline:
    """A pipeline with a layer whose rows begin with a huge number, for an input that is always zero."""
    pipe = tiny.make("flux")
    first, second = pipe.transformer.transformer_blocks[0].ff.net[0].proj, pipe.transformer.get_submodule(SPOILED)
    first.weight.data[0], first.bias.data[0] = 0, 0
    second.weight.data[:, 0] = 100 * second.weight.abs().max()
    return pipe


def test_a_spoiled_layer_is_found_and_its_skip_helps() -> None:
    pipe, method = spoiled(), W8A8(modulation="keep")
    stock, names = draw(pipe), plan(pipe.transformer, method)
    scan = scan_errors(pipe, method, draw)
    assert {layer.name for layer in scan.layers} == set(names)
    assert sum(layer.share for layer in scan.layers) == pytest.approx(1.0)
    assert scan.layers[0].name == SPOILED and scan.layers[0].error > 0.2
    assert all(0 < layer.error < 0.05 for layer in scan.layers[1:])
    assert torch.equal(draw(pipe), stock) and not any(m._forward_hooks for m in pipe.transformer.modules())
    assert str(scan).splitlines()[1].split()[0] == SPOILED
    skip = scan.skips(budget=0.5)
    assert skip == (SPOILED.replace(".", r"\."),)
    errors = []
    for options in ((), skip):
        close = draw(diffaccel.accelerate(pipe, W8A8(modulation="keep", skip=options)))
        errors.append(float((close - stock).norm()))
        diffaccel.remove(pipe)
    assert errors[1] < errors[0]


def test_errors_are_those_of_the_layer_alone() -> None:
    pipe = tiny.make("flux")
    inputs: list[torch.Tensor] = []
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    hook = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].clone()))
    scan = scan_errors(pipe, W4A16(), draw)
    hook.remove()
    name = "transformer_blocks.0.ff.net.2"
    other = quantized(layer, plan(pipe.transformer, W4A16())[name], W4A16())
    with torch.no_grad():
        error = sum((other(x).double() - layer(x).double()).square().sum() for x in inputs)
        total = sum(layer(x).double().square().sum() for x in inputs)
    measured = next(row for row in scan.layers if row.name == name)
    assert measured.error == pytest.approx(float(error / total) ** 0.5, rel=1e-5)


def test_proposals_keep_to_their_limits() -> None:
    scan = scan_errors(tiny.make("flux"), W4A16(), draw)
    errors = {layer.name: layer.error for layer in scan.layers}
    worst = scan.layers[0]
    assert scan.skips(threshold=worst.error) == () and scan.skips(threshold=0.0, budget=0.0) == ()
    everything = scan.skips(threshold=0.0, budget=1.0 + 1e-9)
    assert len(everything) == len(errors)
    some = scan.skips(threshold=0.0, budget=0.2)
    share = {layer.name.replace(".", r"\."): layer.share for layer in scan.layers}
    assert 0 < sum(share[name] for name in some) <= 0.2
    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, W4A16(skip=some))
    assert not any("form" in vars(pipe.transformer.get_submodule(name.replace("\\", ""))) for name in some)


def test_a_run_that_calls_nothing() -> None:
    with pytest.raises(DiffAccelError, match="called no layer"):
        scan_errors(tiny.make("flux"), W8A8(), lambda pipe: None)
