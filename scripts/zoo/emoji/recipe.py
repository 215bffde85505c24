"""Sizes, batches and durations of the data and CLIP stages: "full" for one GPU, "cpu" for debugging on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffaccel.errors import unknown


@dataclass(frozen=True, kw_only=True)
class SceneCounts:
    """Number of scenes of each kind; ``variants`` is the number per training icon."""

    variants: int
    exact: int  # of the variants: the icon fills the canvas
    colour: int
    pair: int
    colour_pair: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """One CLIP: open_clip's vision and text configuration, and how it is trained."""

    vision: dict
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    batch: int
    lr: float
    seconds: float
    caption: int  # index of the scene's caption that it reads, 0 or 1
    weight_decay: float = 0.1
    warmup: int = 100
    ema: float = 0.998
    contradicted: float = 1.0  # share of a batch that adds a false caption
    damaged: float = 0.25  # share of a batch that adds its picture shuffled or exchanged, of which its caption is false
    degraded: float = 0.0  # share that adds its picture blurred, sharpened or noisy
    cost: float = 0.6  # cosine that these lose, as a share of damage.severity beyond 0.1
    styled: float = 0.0  # share that adds a close-up, whose style is told from the two others
    style_weight: float = 1.0  # weight of that loss
    hard_weight: float = 0.5  # weight of the losses of each scene against its own false caption and damaged picture
    # Maximum of the random augmentations: rotation in degrees, scale, translation in pixels, share of ink.
    turn: float = 12.0
    zoom: float = 1.15
    shift: float = 6.0
    fade: float = 0.15


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the data and CLIP stages."""

    name: str
    size: int  # of the CLIPs' pictures, in pixels
    scenes: SceneCounts
    # Probability with which training draws from each kind.
    shares: dict[str, float] = field(
        default_factory=lambda: {"single": 0.46, "colour": 0.14, "pair": 0.18, "colour_pair": 0.12, "count": 0.10}
    )
    clip_a: ClipRecipe
    clip_b: ClipRecipe
    context: int = 32
    vocabulary: int = 4096


FULL = Recipe(
    name="full",
    size=128,
    scenes=SceneCounts(variants=8, exact=2, colour=24_000, pair=32_000, colour_pair=20_000, count=20_000),
    clip_a=ClipRecipe(
        vision={"image_size": 128, "layers": 6, "width": 192, "head_width": 64, "patch_size": 16},
        text_width=192,
        text_layers=4,
        text_heads=3,
        embed_dim=192,
        batch=1024,
        lr=1e-3,
        seconds=115,
        caption=0,
    ),
    clip_b=ClipRecipe(
        vision={
            "timm_model_name": "convnext_atto",
            "timm_model_pretrained": False,
            "timm_pool": "abs_attn",
            "timm_proj": "linear",
            "image_size": 128,
        },
        text_width=192,
        text_layers=2,
        text_heads=4,
        embed_dim=192,
        batch=1024,
        lr=1e-3,
        seconds=480,
        caption=1,
        degraded=0.125,
        styled=0.375,
    ),
)

# Half the side and narrow towers: it is for debugging the code.
CPU = Recipe(
    name="cpu",
    size=64,
    scenes=SceneCounts(variants=3, exact=1, colour=6_000, pair=8_000, colour_pair=5_000, count=4_000),
    clip_a=ClipRecipe(
        vision={"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
        text_width=128,
        text_layers=2,
        text_heads=4,
        embed_dim=128,
        batch=128,
        lr=1e-3,
        seconds=700,
        caption=0,
        ema=0.99,
        shift=3.0,
        warmup=50,
        contradicted=0.5,
    ),
    clip_b=ClipRecipe(
        vision={
            "timm_model_name": "test_convnext2",
            "timm_model_pretrained": False,
            "timm_pool": "abs_attn",
            "timm_proj": "linear",
            "image_size": 64,
        },
        text_width=128,
        text_layers=2,
        text_heads=4,
        embed_dim=128,
        batch=128,
        lr=1e-3,
        seconds=700,
        caption=1,
        ema=0.99,
        shift=3.0,
        warmup=50,
        contradicted=0.5,
        degraded=0.125,
        styled=0.25,
    ),
)

RECIPES = {recipe.name: recipe for recipe in (FULL, CPU)}


def get(name: str) -> Recipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
