"""A model whose files lack weights is refused; weights that are tied, computed or named as formerly are not missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

import diffaccel
from diffaccel.errors import DiffAccelError


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny.make("flux").save_pretrained(tmp_path / "flux")
    return tmp_path / "flux"


def rewrite(file: Path, change) -> None:
    """Save a file of weights anew, under the names that ``change`` gives them; those with no name are left out."""
    named = {change(key): tensor for key, tensor in load_file(file).items()}
    save_file({key: tensor for key, tensor in named.items() if key}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("component", "lost", "gap"),
    [
        ("text_encoder", "final_layer_norm", "has its weights final_layer_norm.bias, final_layer_norm.weight."),
        ("text_encoder", "embeddings.token", "has its weight embeddings.token_embedding.weight."),
        ("text_encoder", "encoder", "more"),
        ("text_encoder_2", "shared", "has its weights encoder.embed_tokens.weight, shared.weight."),
        ("transformer", "x_embedder.bias", "has its weight x_embedder.bias."),
    ],
)
def test_missing_weights_are_named(folder, component, lost, gap) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    rewrite(file, lambda key: None if key.startswith(lost) else key)
    with pytest.raises(DiffAccelError, match=f"flux' is incomplete: no file of '{component}' .*{re.escape(gap)}"):
        diffaccel.load(folder)
    intact = getattr(tiny.make("flux"), component)
    assert getattr(diffaccel.load(folder, **{component: intact}), component) is intact  # the user's own part


def test_a_whole_model_is_not(folder) -> None:
    """Also with a tied weight stored once, and under the names of an older transformers."""
    assert "encoder.embed_tokens.weight" not in load_file(folder / "text_encoder_2" / "model.safetensors")
    diffaccel.load(folder)
    rewrite(folder / "text_encoder" / "model.safetensors", lambda key: f"text_model.{key}")
    rewrite(folder / "text_encoder_2" / "model.safetensors", lambda key: key.replace("shared", "encoder.embed_tokens"))
    pipe, whole = diffaccel.load(folder), tiny.make("flux")
    for name in ("text_encoder", "text_encoder_2"):
        theirs = getattr(whole, name).state_dict()
        assert all(tensor.equal(theirs[key]) for key, tensor in getattr(pipe, name).state_dict().items())


def test_a_variant_is_looked_at_alone(folder) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    other = file.with_name("model.fp16.safetensors")
    other.write_bytes(file.read_bytes())
    diffaccel.load(folder, variant="fp16")
    rewrite(other, lambda key: None if "final" in key else key)
    diffaccel.load(folder)
    with pytest.raises(DiffAccelError, match="'text_encoder' has its weights final_layer_norm"):
        diffaccel.load(folder, variant="fp16")
