"""Write a trained CLIP as an open_clip folder, and its text tower as transformers' CLIPTextModel."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_text

_TOLERANCE = 1e-4  # between the text encoder's outputs and open_clip's, fp32


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")


def _fresh(path: Path) -> Path:
    """Make an empty folder beside ``path``, to replace it when complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _place(partial: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def folder(model: nn.Module, config: dict[str, Any], tokenizer: Path, path: Path, size: int) -> None:
    """Write a folder for ``open_clip.create_model_and_transforms("local-dir:PATH")``, tokenizer beside the weights."""
    partial = _fresh(path)
    half = [0.5, 0.5, 0.5]
    preprocess = {
        "size": [size, size],
        "mode": "RGB",
        "mean": half,
        "std": half,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    write_json(partial / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    state = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, partial / "open_clip_model.safetensors")
    for file in tokenizer.iterdir():
        shutil.copyfile(file, partial / file.name)
    _place(partial, path)


def text_encoder(model: nn.Module, config: dict[str, Any], path: Path) -> None:
    """Write the text tower as a CLIPTextModel folder.

    Raises:
        DiffAccelError: where its hidden states or pooled vector differ from open_clip's.
    """
    text = text_model(model, config)
    tokens = _probe(config)
    with torch.no_grad():
        hidden, pooled = reference(model, tokens)
        output = text(input_ids=tokens.to(hidden.device))
        difference = max(
            (output.last_hidden_state - hidden).abs().max().item(), (output.pooler_output - pooled).abs().max().item()
        )
    if difference > _TOLERANCE:
        raise DiffAccelError(
            f"The converted text encoder differs from open_clip's by {difference:.2g}, allowed {_TOLERANCE:.0e}; "
            "compare clip_export.text_model with the installed transformers."
        )
    partial = _fresh(path)
    text.cpu().save_pretrained(partial)
    _place(partial, path)


def _probe(config: dict[str, Any]) -> torch.Tensor:
    """Make two texts of random tokens, a short one and one that fills the context."""
    length, entries = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    tokens = torch.randint(0, entries - 2, (2, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[0, 7:], tokens[1, -1] = entries - 2, entries - 1, entries - 1
    return tokens


def reference(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return open_clip's hidden states after ln_final (B, length, width), and those at EOS (B, width)."""
    tokens = tokens.to(model.positional_embedding.device)
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[: tokens.shape[1], : tokens.shape[1]]))
    return x, x[torch.arange(len(x), device=x.device), tokens.argmax(1)]


def text_model(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Convert an open_clip text tower to transformers' CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    cfg = config["text_cfg"]
    entries = cfg["vocab_size"]
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=entries,
            hidden_size=cfg["width"],
            intermediate_size=4 * cfg["width"],
            projection_dim=config["embed_dim"],
            num_hidden_layers=cfg["layers"],
            num_attention_heads=cfg["heads"],
            max_position_embeddings=cfg["context_length"],
            hidden_act="gelu",  # open_clip's default; transformers' default is the quick approximation
            bos_token_id=entries - 2,
            eos_token_id=entries - 1,
            pad_token_id=entries - 1,
        )
    )
    own = text.state_dict()
    # Some versions of transformers name these parameters with a leading "text_model.", some without.
    prefix = "text_model." if any(key.startswith("text_model.") for key in own) else ""
    state = {prefix + key: value for key, value in _renamed(model.state_dict(), cfg["layers"]).items()}
    if missing := sorted(set(own) - set(state) - {f"{prefix}embeddings.position_ids"}):
        raise DiffAccelError(
            f"CLIPTextModel has parameters that open_clip lacks ({', '.join(missing[:3])}); "
            "this version of transformers names them differently: extend clip_export._renamed."
        )
    text.load_state_dict(state, strict=False)
    return text.eval().to(model.positional_embedding.device)


def _renamed(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Rename open_clip's weights as transformers has them, with the joint projection split into q, k and v."""
    renamed = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer in range(layers):
        source, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for old, new in names.items():
                renamed[f"{target}.{new}.{kind}"] = state[f"{source}.{old}.{kind}"]
            joint = state[f"{source}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", joint, strict=True):
                renamed[f"{target}.self_attn.{letter}_proj.{kind}"] = part
    return {key: value.detach().float() for key, value in renamed.items()}
