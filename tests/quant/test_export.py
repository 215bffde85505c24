"""The compressed-tensors export: words by hand, every layer by that package where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.kernels.int4_weight import pack_int4
from diffaccel.quant import W4A8, W4A16, W8A8, QLinear, export_compressed_tensors
from diffaccel.quant.export import packed_words

METHODS = {"w8a8": W8A8(), "w8a8-fp8": W8A8(dtype="fp8"), "w4a16": W4A16(), "w4a8": W4A8()}


def exported(family: str, name: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    pipe = diffaccel.accelerate(tiny.make(family), METHODS[name])
    network = getattr(pipe, "transformer", None) or pipe.unet
    export_compressed_tensors(network, folder)
    return (
        network,
        load_file(folder / "diffusion_pytorch_model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )


def test_words_have_the_first_code_in_the_lowest_bits() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8)
    words = packed_words(pack_int4(codes), 4)
    assert [hex(word & 0xFFFFFFFF) for word in words[0].tolist()] == ["0xfedcba98", "0x76543210"]
    eight = packed_words(torch.tensor([[-128, 0, 127, 1, 5]], dtype=torch.int8), 8)
    assert [hex(word & 0xFFFFFFFF) for word in eight[0].tolist()] == ["0x81ff8000", "0x85"]


@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_is_written_once(name: str, tmp_path: Path) -> None:
    network, tensors, config = exported("sd", name, tmp_path)
    said = config["quantization_config"]
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    linears = {n for n, m in network.named_modules() if isinstance(m, QLinear)}
    assert set(targets) == linears and len(targets) == len(linears) and not linears & set(said["ignore"])
    for layer in linears:
        stored = {key.rpartition(".")[2] for key in tensors if key.startswith(f"{layer}.")}
        assert stored - {"bias"} in ({"weight", "weight_scale"}, {"weight_packed", "weight_scale", "weight_shape"})
    plain = {key for key in network.state_dict() if key.rpartition(".")[0] not in linears}
    assert plain - {key for key in plain if key.endswith("weight_scale")} <= set(tensors)


@pytest.mark.parametrize("name", METHODS)
def test_the_package_reads_every_layer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    network, tensors, config = exported("flux", name, tmp_path)
    schema = QuantizationConfig.model_validate(config["quantization_config"])
    seen = 0
    for scheme in schema.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for target in scheme.targets:
            state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{target}.")}
            weight = compressor.decompress(state, scheme)["weight"]
            expected = network.get_submodule(target).dequantized_matrix(torch.float32)
            torch.testing.assert_close(weight.float(), expected, rtol=3e-7, atol=0)
            seen += 1
    assert seen == sum(isinstance(module, QLinear) for module in network.modules())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(DiffAccelError, match="no quantized linear layer"):
        export_compressed_tensors(tiny.make("flux").transformer, tmp_path)
