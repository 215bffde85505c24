"""The flow model: FLUX's transformer on packed latents, with its T5 trained jointly.

    x_t = (1 - t) x0 + t eps,   v = eps - x0,   loss = mean |model(x_t, t, text) - v|^2,   t = sigmoid(N(m, 1))

Latents of every scene and the pooled vectors of every caption (by the frozen CLIP text encoder) are computed once.
One row in ten has the empty prompt in both encoders, as guidance with an empty negative prompt needs.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import backward, computing
from scripts.zoo.emoji.recipe_flow import FlowRecipe, Recipe, get
from scripts.zoo.emoji.vae import Images, encode

TABLE_LENGTH = 32  # tokens stored per caption; the longest has 27
COMPILE_PROBE_SECONDS = 240


@dataclass
class Table:
    """The flow model's training data, on one device."""

    latents: dict[int, Tensor]  # size -> (N, 64, size/16, size/16) packed channels first, fp16
    prompt: Tensor  # (N, 2) indices of the two captions in the rows of ``pooled`` and ``tokens``
    pooled: Tensor  # (P, W) CLIP vectors, fp16; row 0 is the empty prompt
    tokens: Tensor  # (P, 32) T5 tokens, padded; row 0 is the empty prompt
    pad: int


def build(recipe: FlowRecipe, pooled_dim: int, vocabulary: int) -> dict[str, nn.Module]:
    """Build transformer and T5 with initial weights: modulations and output zero, Xavier inside the blocks."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=recipe.double_blocks,
        num_single_layers=recipe.single_blocks,
        attention_head_dim=recipe.head_dim,
        num_attention_heads=recipe.heads,
        joint_attention_dim=recipe.text_dim,
        pooled_projection_dim=pooled_dim,
        guidance_embeds=False,
        axes_dims_rope=recipe.rope,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if name.startswith(("transformer_blocks", "single_transformer_blocks")):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            # adaLN-zero: every block starts as the identity, and the model's first prediction is zero.
            if (".norm" in name and name.endswith(".linear")) or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=recipe.text_dim,
            d_kv=recipe.text_dim // recipe.text_heads,
            d_ff=recipe.text_ff,
            num_layers=recipe.text_layers,
            num_heads=recipe.text_heads,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
        )
    )
    return {"transformer": transformer, "text_encoder_2": t5}


def noisy(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_t, v) on the linear path from data (t = 0) to noise (t = 1); t: (B,)."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * eps, eps - x0


def predict(modules: nn.ModuleDict, x: Tensor, t: Tensor, pooled: Tensor, tokens: Tensor) -> Tensor:
    """Predict v for packed latents x (B, S, 64) of a square picture, as FluxPipeline calls its transformer."""
    side = round(x.shape[1] ** 0.5)
    text = modules["text_encoder_2"](tokens)[0]
    return modules["transformer"](
        hidden_states=x,
        timestep=t,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(len(x), side, side, x.device, torch.float32),
        return_dict=False,
    )[0]


def batch_size(recipe: FlowRecipe, size: int, length: int) -> int:
    """Return the pictures in one step, by a fixed number of tokens, so that long texts cost no more than short ones."""
    return max(8, recipe.tokens // ((size // 16) ** 2 + length) // 8 * 8)


def draw_length(recipe: FlowRecipe, generator: torch.Generator) -> int:
    """Draw the text length of one step."""
    lengths = list(recipe.lengths)
    weights = torch.tensor([recipe.lengths[n] for n in lengths], device=generator.device)
    return lengths[int(torch.multinomial(weights, 1, generator=generator))]


def draw(table: Table, recipe: FlowRecipe, weights: Tensor, size: int, length: int, generator) -> tuple[Tensor, ...]:
    """Draw one batch: x0 (B, S, 64), eps, t, pooled, tokens."""
    count = batch_size(recipe, size, length)
    device = generator.device
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    caption = torch.randint(0, 2, (count,), generator=generator, device=device)
    row = table.prompt[index, caption]
    row = torch.where(torch.rand(count, generator=generator, device=device) < recipe.empty, 0, row)
    x0 = table.latents[size][index].float().flatten(2).transpose(1, 2)
    eps = torch.randn(x0.shape, generator=generator, device=device)
    t = torch.sigmoid(torch.randn(count, generator=generator, device=device) + recipe.t_mean[size])
    tokens = table.tokens[row]
    tokens = F.pad(tokens, (0, max(0, length - tokens.shape[1])), value=table.pad)[:, :length]
    return x0, eps, t, table.pooled[row].float(), tokens


def train(
    table: Table,
    weights: Tensor,
    work: Path,
    recipe: Recipe,
    *,
    deadline: Deadline,
    device: str,
    seed: int = 0,
) -> TrainingRun:
    """Train, or resume, ``work/flow.safetensors``, drawing scenes with ``weights`` (N,)."""
    torch.manual_seed(seed)
    flow = recipe.flow
    modules = build(flow, table.pooled.shape[1], vocabulary_of(work))
    run = TrainingRun(
        work,
        "flow",
        {name: module.to(device) for name, module in modules.items()},
        flow.plan,
        seed=seed + 1,
        deadline=deadline,
        device=device,
        tell=partial(print, flush=True),
    )
    compiled = run.device.type == "cuda" and bool(flow.compiled) and compile_blocks(run.module, work, recipe.name)
    # Shapes are drawn on the host: reading them from the device would synchronise with it in every step.
    host = torch.Generator()
    for step in run:
        host.manual_seed(seed + step)
        size = flow.cycle[step % len(flow.cycle)]
        length = draw_length(flow, host)
        x0, eps, t, pooled, tokens = draw(table, flow, weights, size, length, run.generator)
        x, v = noisy(x0, eps, t)
        eager = compiled and (size, length) not in flow.compiled
        stance = torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()
        with stance, computing(run.device, torch.bfloat16):
            prediction = predict(run.module, x, t, pooled, tokens)
        loss = F.mse_loss(prediction.float(), v)
        run.update(loss, len(x0), **{f"loss{size}": loss.detach()})
    return run


def load(work: Path, recipe: FlowRecipe) -> dict[str, nn.Module]:
    """Load transformer and T5 with the averaged weights of ``work/flow.safetensors``, on the CPU in fp32."""
    averaged = {
        name.removeprefix("ema."): tensor
        for name, tensor in load_file(work / "flow.safetensors").items()
        if name.startswith("ema.")
    }
    pooled = averaged["transformer.time_text_embed.text_embedder.linear_1.weight"].shape[1]
    modules = nn.ModuleDict(build(recipe, pooled, vocabulary_of(work)))
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            parameter.copy_(averaged[name])
    return {name: module.eval() for name, module in modules.items()}


def vocabulary_of(work: Path) -> int:
    """Return the number of entries of the T5 tokenizer in a work folder."""
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(work / "tokenizer_2"))


@torch.no_grad()
def tabulate(images: Images, captions: Sequence[Sequence[str]], vae: AutoencoderKL, work: Path, device: str) -> Table:
    """Encode all scenes (64 and 128 px) and all captions."""
    from transformers import AutoTokenizer

    latents = _latents(images, len(captions[0]), vae, device)
    rows: dict[str, int] = {"": 0}
    prompt = torch.tensor(
        [[rows.setdefault(text, len(rows)) for text in pair] for pair in zip(captions[0], captions[1], strict=True)]
    )
    texts = list(rows)
    pooled = _pooled(texts, work, device)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer_2")
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TABLE_LENGTH, return_tensors="pt"
    ).input_ids
    return Table(
        latents=latents, prompt=prompt.to(device), pooled=pooled, tokens=tokens.to(device), pad=tokenizer.pad_token_id
    )


def _latents(images: Images, count: int, vae: AutoencoderKL, device: str) -> dict[int, Tensor]:
    """Return the packed latents of all scenes by size, (N, 64, size/16, size/16) fp16."""
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents: dict[int, list[Tensor]] = {64: [], 128: []}
    with computing(torch.device(device), torch.bfloat16):
        for index in torch.arange(count, device=device).split(256):
            for size, batches in latents.items():
                z = (encode(vae, images(index, size))[0] - shift) * scale
                batches.append(F.pixel_unshuffle(z, 2).half())  # channels (c, dy, dx), as FLUX packs tokens
    return {size: torch.cat(batches) for size, batches in latents.items()}


def _pooled(texts: list[str], work: Path, device: str) -> Tensor:
    """Return the pooled vectors of texts by the CLIP text encoder, (P, W) fp16."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).eval()
    pooled = []
    for start in range(0, len(texts), 1024):
        ids = tokenizer(
            texts[start : start + 1024],
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        with computing(torch.device(device), torch.bfloat16):
            pooled.append(encoder(ids.to(device)).pooler_output.half())
    return torch.cat(pooled)


def compile_blocks(modules: nn.ModuleDict, work: Path, name: str) -> bool:
    """Compile the transformer's blocks if a child process can train with them; otherwise stay eager and print why.

    A fault in a compiled kernel makes the whole CUDA context unusable, so a child process tries first; it also fills
    the compiler's cache on disk. Attention through cuDNN is off: with it, compiled backward passes read out of bounds
    (torch 2.11).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    marker = work / "compiled_training_works"  # one probe per machine, on which the work folder stays
    sizes = [str(vocabulary_of(work)), str(modules["transformer"].config.pooled_projection_dim)]
    command = [sys.executable, "-m", "scripts.zoo.emoji.flow", name, *sizes]
    if not marker.exists():
        try:
            child = subprocess.run(command, timeout=COMPILE_PROBE_SECONDS, capture_output=True, text=True, check=False)
            works, reason = child.returncode == 0, child.stderr[-500:]
        except subprocess.TimeoutExpired:
            works, reason = False, f"no answer in {COMPILE_PROBE_SECONDS} s"
        if not works:
            print("flow: compiled training failed in a child process; training eagerly:", reason, flush=True)
            return False
        marker.touch()
    modules["transformer"].compile_repeated_blocks(dynamic=False)
    return True


def probe(recipe: FlowRecipe, vocabulary: int, pooled: int, device: str = "cuda") -> None:
    """Run a few training steps at every compiled shape, on random data; raise, or crash, if they fail."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    modules = nn.ModuleDict(build(recipe, pooled, vocabulary)).to(device)
    modules["transformer"].compile_repeated_blocks(dynamic=False)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4, fused=device == "cuda")
    for _ in range(3):
        for size, length in recipe.compiled:
            count = batch_size(recipe, size, length)
            x = torch.randn(count, (size // 16) ** 2, 64, device=device)
            tokens = torch.randint(0, vocabulary, (count, length), device=device)
            with computing(torch.device(device), torch.bfloat16):
                v = predict(
                    modules, x, torch.rand(count, device=device), torch.randn(count, pooled, device=device), tokens
                )
            loss = v.float().square().mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"loss {loss.item()} at {size} px, {length} tokens")


if __name__ == "__main__":
    probe(get(sys.argv[1]).flow, int(sys.argv[2]), int(sys.argv[3]))
