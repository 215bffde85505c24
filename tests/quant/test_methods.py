"""Quantizers on tiny pipelines of every family: near the stock picture, off again to the bit, saved and loaded."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from diffusers import PipelineQuantizationConfig
from torch import nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find, networks
from diffaccel.families.facts import facts_of
from diffaccel.quant import W4A8, W4A16, W8A8, QConv2d, QLinear, scan_errors, swap
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.samplers import Euler, SeaCache, Spectrum
from tests.support.interrupts import interrupt, visits

FAST, SLOW = ("flux", "sd"), ("sd3", "sdxl", "wan22", "hunyuan", "pixart", "dit", "ddim", "wan5b", "cogvideox")
FAMILIES = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
METHODS = (W8A8(), W8A8(dtype="fp8"), W8A8(convs="int8"), W4A16(), W4A8(modulation="int4"))


def ident(method: Any) -> str:
    return "-".join([method.name, getattr(method, "dtype", ""), method.convs])


def make(family: str) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family)


def draw(pipe: Any, family: str, **changes: Any) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**kwargs)).clone()


def quantized_layers(network: Any) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def as_bytes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in state.items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in as_bytes(one).items():
        assert value.dtype == as_bytes(other)[key].dtype and torch.equal(value, as_bytes(other)[key]), key


def families_and_methods() -> list[Any]:
    """Return every method on the fast families; on the others one that quantizes inputs, convolutions, four bits."""
    pairs = [(family, method) for family in FAST for method in METHODS]
    pairs += [(family, method) for family in SLOW for method in (METHODS[0], METHODS[2], METHODS[4])]
    return [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] in SLOW or pair[1] is not METHODS[0]),
                     id=f"{pair[0]}-{ident(pair[1])}")
        for pair in pairs
    ]  # fmt: skip


def test_casts_round_the_original_layers_as_all_others() -> None:
    pipe, stock = make("flux"), make("flux")
    diffaccel.accelerate(pipe, METHODS[0])
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype)
        stock.to(dtype)
    again, _ = copy.deepcopy(pipe), diffaccel.remove(pipe)
    for freed in (pipe, diffaccel.remove(again)):
        assert_same_bits(dict(freed.transformer.state_dict()), dict(stock.transformer.state_dict()))


@pytest.mark.parametrize(("family", "method"), families_and_methods())
def test_near_the_stock_result_and_off_again_to_the_bit(family: str, method: Any) -> None:
    pipe = make(family)
    stock, states = draw(pipe, family), [dict(network.state_dict()) for network in networks(pipe)]
    types = [[type(module) for module in network.modules()] for network in networks(pipe)]
    configs = [dict(network.config) for network in networks(pipe)]
    diffaccel.accelerate(pipe, method)
    close = draw(pipe, family)
    assert not torch.equal(close, stock) and float((close - stock).norm() / stock.norm()) < 0.25
    for network in networks(pipe):
        facts, layers = facts_of(network), quantized_layers(network)
        assert layers and not any(facts.keeps(name) for name, q in layers.items() if q.form.activations)
    assert torch.equal(draw(diffaccel.remove(pipe), family), stock)
    for network, state, kinds, config in zip(networks(pipe), states, types, configs, strict=True):
        assert_same_bits(state, dict(network.state_dict()))
        assert [type(module) for module in network.modules()] == kinds and dict(network.config) == config
        assert "fuse_lora" not in vars(network)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(METHODS[0], torch.bfloat16, id=ident(METHODS[0])),
        pytest.param(METHODS[0], torch.float32, marks=pytest.mark.slow, id=f"{ident(METHODS[0])}-float32"),
        *(pytest.param(m, torch.bfloat16, marks=pytest.mark.slow, id=ident(m)) for m in METHODS[1:]),
    ],
)
@pytest.mark.parametrize("family", ("flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd", "wan22"))))
def test_loaded_quantized_quantized_after_loading_and_saved(
    family: str, method: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """One result to the bit by all roads, bits of the files included."""
    make(family).to(dtype).save_pretrained(tmp_path / "plain")
    cls = type(make(family))
    pipe = cls.from_pretrained(tmp_path / "plain", torch_dtype=dtype)
    names = [name for name in ("transformer", "transformer_2", "unet") if getattr(pipe, name, None) is not None]
    on_the_fly = cls.from_pretrained(
        tmp_path / "plain", torch_dtype=dtype,
        quantization_config=PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, method)),
    )  # fmt: skip
    diffaccel.accelerate(pipe, method)
    expected = draw(pipe, family)
    assert torch.equal(draw(on_the_fly, family), expected)
    for number, saved in enumerate((pipe, on_the_fly)):
        saved.save_pretrained(folder := tmp_path / str(number))
        loaded = cls.from_pretrained(folder, torch_dtype=dtype)
        assert torch.equal(draw(loaded, family), expected)
        for name in names:
            assert_same_bits(getattr(loaded, name).state_dict(), getattr(pipe, name).state_dict())
            layers = (quantized_layers(getattr(of, name)).values() for of in (loaded, pipe))
            assert all(a.weight.stride() == b.weight.stride() for a, b in zip(*layers, strict=True))
            stored = json.loads((folder / name / "config.json").read_text())["quantization_config"]
            assert stored["quant_method"] == "diffaccel" and stored["method"]["name"] == method.name
    again = diffaccel.load(folder, torch_dtype=dtype)
    assert torch.equal(draw(again, family), expected)
    for name in names:
        network = getattr(again, name).dequantize()
        assert not quantized_layers(network) and "quantization_config" not in network.config
    draw(again, family)


def test_modulation_is_quantized_by_weight_and_can_be_left_alone() -> None:
    pipe = make("flux")
    facts = facts_of(pipe.transformer)
    linears = [name for name, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    modulation = {name for name in linears if facts.modulation and re.fullmatch(facts.modulation, name)}
    for option, form in (("int8", "w8a16"), ("int4", "w4a16"), ("keep", None)):
        diffaccel.accelerate(pipe, W8A8(modulation=option))
        layers = quantized_layers(pipe.transformer)
        found = {layers[name].form.name if name in layers else None for name in modulation}
        assert found == {form} and modulation
        diffaccel.remove(pipe)


def test_skips_convolutions_and_backend() -> None:
    pipe = make("sd")
    diffaccel.accelerate(pipe, W8A8(skip=("mid_block", r".*\.to_q"), convs="keep", backend="reference"))
    layers = quantized_layers(pipe.unet)
    assert layers and not [n for n in layers if n.startswith("mid_block") or n.endswith("to_q")]
    assert not [q for q in layers.values() if isinstance(q, QConv2d)]
    assert {q.mode for q in layers.values()} == {"reference"}
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, W8A8(convs="int8"))
    assert {q.form.name for q in quantized_layers(pipe.unet).values() if isinstance(q, QConv2d)} == {"w8a8"}
    diffaccel.remove(pipe)
    for method in (W8A8(backend="fused"), W4A16(backend="fused")):
        with pytest.raises(DiffAccelError, match=r"backend is 'fused' and UNet2DConditionModel is on cpu.*'auto'"):
            diffaccel.accelerate(pipe, method)
    assert not quantized_layers(pipe.unet) and diffaccel.summary(pipe).methods == []


def test_a_pattern_that_matches_no_layer_is_named_with_the_nearest() -> None:
    pipe = make("flux")
    with pytest.raises(
        DiffAccelError, match=r"'transformer_block\\\\.0', which matches no layer.*'transformer_blocks\.0"
    ):
        diffaccel.accelerate(pipe, W8A8(skip=("proj_out", r"transformer_block\.0")))
    assert not quantized_layers(pipe.transformer)
    with pytest.raises(DiffAccelError, match="matches no layer"):
        scan_errors(pipe, W8A8(skip=("nothing",)), lambda pipe: None)


@pytest.mark.parametrize("loop", (Euler(), Spectrum(), SeaCache()), ids=lambda config: config.name)
def test_with_samplers_and_caches(loop: Any) -> None:
    pipe = make("flux")
    diffaccel.accelerate(pipe, W8A8())
    diffaccel.accelerate(pipe, loop)
    both = draw(pipe, "flux")
    other = diffaccel.accelerate(make("flux"), loop, W8A8())
    assert torch.equal(draw(other, "flux"), both)
    methods = [method["name"] for method in diffaccel.summary(pipe).methods]
    assert methods == ["w8a8", loop.name]
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe, "flux"), draw(make("flux"), "flux"))


@pytest.mark.slow
def test_copies_and_pickles_have_layers_of_their_own() -> None:
    pipe = diffaccel.accelerate(make("flux"), W8A8())
    expected, stock = draw(pipe, "flux"), draw(make("flux"), "flux")
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(draw(other, "flux"), expected)
        assert torch.equal(draw(diffaccel.remove(other), "flux"), stock)
    assert torch.equal(draw(pipe, "flux"), expected)


def test_dropped_originals_are_told_of() -> None:
    pipe = diffaccel.accelerate(make("flux"), W8A8(originals="drop"))
    expected = draw(pipe, "flux")
    with pytest.raises(DiffAccelError, match=r"originals='drop'.*Load the pipeline again"):
        diffaccel.remove(pipe)
    assert torch.equal(draw(pipe, "flux"), expected)


def test_a_cast_pipeline_gets_its_layers_back_in_the_new_dtype() -> None:
    pipe = diffaccel.accelerate(make("flux"), W8A8()).to(torch.bfloat16)
    draw(pipe, "flux")
    diffaccel.remove(pipe)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.equal(draw(pipe, "flux"), draw(make("flux").to(torch.bfloat16), "flux"))


def test_shared_weights_stay_as_they_are() -> None:
    pipe = make("flux")
    blocks = pipe.transformer.transformer_blocks
    blocks[0].attn.to_q.weight = blocks[0].attn.to_k.weight
    diffaccel.accelerate(pipe, W8A8())
    layers = quantized_layers(pipe.transformer)
    assert "transformer_blocks.0.attn.to_v" in layers
    assert not {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"} & set(layers)


@pytest.mark.slow
def test_compiled_networks_stay_compiled() -> None:
    torch.compiler.reset()
    pipe = make("flux")
    pipe.transformer.compile(backend="eager", fullgraph=True)
    diffaccel.accelerate(pipe, W8A8())
    expected = draw(diffaccel.accelerate(make("flux"), W8A8()), "flux")
    torch.testing.assert_close(draw(pipe, "flux"), expected)
    diffaccel.remove(pipe)
    torch.testing.assert_close(draw(pipe, "flux"), draw(make("flux"), "flux"))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_quantized_twice() -> None:
    pipe = diffaccel.accelerate(make("flux"), W8A8())
    expected = draw(pipe, "flux")
    for method, words in ((W8A8(dtype="fp8"), "already active"), (W4A16(), "cannot be active together")):
        with pytest.raises(DiffAccelError, match=words):
            diffaccel.accelerate(pipe, method)
    assert torch.equal(draw(pipe, "flux"), expected)
    plain = type(pipe)(**pipe.components)
    with pytest.raises(DiffAccelError, match="quantized already"):
        diffaccel.accelerate(plain, W4A16())


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipe = diffaccel.accelerate(make("flux"), W8A8())
    network, cls = pipe.transformer, type(pipe.transformer)
    network.save_pretrained(tmp_path)
    file, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    state, said = load_file(file), json.loads(config.read_text())
    name = said["quantization_config"]["layers"]["w8a8"][0]

    def refused(words: str, tensors: dict[str, Any] | None = None, **changes: Any) -> None:
        save_file(state if tensors is None else tensors, file)
        config.write_text(json.dumps({**said, "quantization_config": {**said["quantization_config"], **changes}}))
        with pytest.raises(DiffAccelError, match=words):
            cls.from_pretrained(tmp_path)

    scale = f"{name}.weight_scale"
    refused("lacks 1 tensors", {key: value for key, value in state.items() if key != scale})
    refused("not finite", {**state, scale: state[scale] * float("inf")})
    refused("its format asks for torch.float32", {**state, scale: state[scale].half()})
    refused("in the checkpoint and", {**state, scale: state[scale][:-1].clone()})
    refused("format version 2", format_version=2)
    refused("Unknown method 'w9'", method={"name": "w9"})
    refused("lacks its method", method=None)
    refused("is no format", layers={"w2a2": [name]})
    refused("does not have, first 'other'", layers={"w8a8": [name, "other"]})
    save_file(state, file)
    config.write_text(json.dumps(said))
    assert_same_bits(cls.from_pretrained(tmp_path).state_dict(), network.state_dict())


@pytest.mark.slow
def test_offloading_by_layers_comes_after() -> None:
    from accelerate import cpu_offload

    pipe = make("flux")
    stock = draw(pipe, "flux")
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(DiffAccelError, match="Quantize first"):
        diffaccel.accelerate(pipe, W8A8())
    assert torch.equal(draw(pipe, "flux"), stock)
    pipe = make("flux")
    expected = draw(diffaccel.accelerate(pipe, W8A8(dtype="fp8")), "flux")
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert torch.equal(draw(pipe, "flux"), expected)


def test_bad_options_are_named() -> None:
    for make_config, words in (
        (lambda: W8A8(dtype="int4"), "must be one of 'int8', 'fp8'"),
        (lambda: W8A8(skip=("(",)), "no regular expression"),
        (lambda: W4A16(group_size=15), "must be even and 16 or more"),
        (lambda: W4A8(group_size=8), "must be even and 16 or more"),
        (lambda: W8A8(skip="x"), "skip is 'x'"),
    ):
        with pytest.raises(DiffAccelError, match=words):
            make_config()
    with pytest.raises(DiffAccelError, match="leaves every layer"):
        diffaccel.accelerate(make("flux"), W8A8(skip=(".*",)))


def test_a_weight_that_is_no_number_is_named_and_nothing_changes() -> None:
    pipe = make("flux")
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(DiffAccelError, match=r"'single_transformer_blocks.0.proj_mlp' holds infinities"):
        diffaccel.accelerate(pipe, W8A8())
    assert not quantized_layers(pipe.transformer) and "quantization_config" not in pipe.transformer.config
    diffaccel.accelerate(pipe, W8A8(skip=(r".*proj_mlp",)))
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, QLinear)


def test_papers_and_records() -> None:
    for cls in (W8A8, W4A16, W4A8):
        method = cls.paper()
        assert cls.from_dict(json.loads(json.dumps(method.to_dict()))) == method
        assert find(make("flux")) is not None and cls.fits("FluxPipeline", find(make("flux")))[0] is True


def test_an_interrupt_at_any_line_leaves_the_layers() -> None:
    network, modules = nn.Sequential(nn.Linear(32, 32)), [swap]
    (layer,) = network
    handles: list[Any] = []
    lines = visits(modules, lambda: swap.quantize_networks([network], W8A8()).remove())
    assert len(lines) > 30 and network[0] is layer
    kept = []
    for line in lines:
        kept.append(interrupt(modules, line, lambda: handles.append(swap.quantize_networks([network], W8A8()))))
        while handles:
            handles.pop().remove()
        assert network[0] is layer, line
