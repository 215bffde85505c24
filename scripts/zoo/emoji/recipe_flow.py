"""Sizes and schedules of the autoencoder and the flow model: ``full`` for a GPU, ``cpu`` for two cores in an hour."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class VAERecipe:
    """The autoencoder: 8x smaller latents of 16 channels, as FLUX has them.

    ``cycle`` is the order of step kinds (see ``vae.STEPS``), ``batch`` the number of images in a step of each kind.
    """

    channels: tuple[int, int, int, int]
    groups: int
    layers: int = 1
    latent_channels: int = 16
    cycle: tuple[str, ...] = ("full", "half", "pooled", "crop", "up")
    batch: dict[str, int] = field(default_factory=dict)
    kl: float = 1e-4
    plan: TrainingPlan


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """The transformer, its T5 and their training.

    One step takes ``tokens`` tokens in all: a batch of ``tokens // (image tokens + text length)`` pictures, rounded
    down to a multiple of 8. Sizes follow ``cycle``; text lengths are drawn with the probabilities of ``lengths``.
    Long ones are rare; they are there so that stock FLUX's default of 512 text tokens works.
    """

    heads: int
    head_dim: int = 64
    rope: tuple[int, int, int] = (16, 24, 24)
    double_blocks: int
    single_blocks: int
    text_dim: int
    text_layers: int
    text_heads: int
    text_ff: int
    cycle: tuple[int, ...]
    lengths: dict[int, float]
    tokens: int
    compiled: tuple[tuple[int, int], ...] = ()  # (size, text length) pairs that run as compiled blocks
    empty: float = 0.1  # share of empty prompts, for classifier-free guidance
    shift: float = 1.5
    t_mean: dict[int, float] = field(default_factory=lambda: {64: 0.0, 128: 0.2})  # t = sigmoid(N(mean, 1))
    shares: dict[str, float] = field(
        default_factory=lambda: {"single": 0.40, "colour": 0.12, "pair": 0.18, "colour_pair": 0.10, "count": 0.20}
    )  # probability of each kind of scene in training; the small icons of counts are learnt last
    plan: TrainingPlan

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the autoencoder and the flow model."""

    name: str
    vae: VAERecipe
    flow: FlowRecipe
    labels: tuple[str, ...] | None = None  # labels that the flow model learns; None: all
    default_size: int
    default_steps: int = 8
    default_guidance: float = 3.0
    # 32 tokens hold every caption; FLUX's 512 would only cost time.
    default_text_length: int = 32


# What two cores can learn in an hour: common things, in all three styles.
FEW_LABELS = tuple(
    "grinning face|smiling face with heart-eyes|face with tears of joy|winking face|smiling face with sunglasses"
    "|crying face|enraged face|sleeping face|skull|ghost|alien|robot|red heart|blue heart|green heart|broken heart"
    "|dog face|cat face|fox|lion|tiger|horse|unicorn|cow face|pig face|mouse face|rabbit face|bear|panda|koala|frog"
    "|elephant|monkey|chicken|baby chick|penguin|bird|duck|owl|turtle|snake|whale|dolphin|fish|tropical fish|octopus"
    "|crab|snail|butterfly|bug|honeybee|lady beetle|spider|rose|sunflower|tulip|cherry blossom|evergreen tree"
    "|palm tree|cactus|four leaf clover|maple leaf|mushroom|grapes|watermelon|lemon|banana|pineapple|red apple|pear"
    "|peach|cherries|strawberry|tomato|avocado|eggplant|carrot|broccoli|bread|croissant|cheese wedge|hamburger"
    "|french fries|pizza|hot dog|taco|egg|soft ice cream|doughnut|cookie|birthday cake|cupcake|candy|lollipop"
    "|hot beverage|wine glass|beer mug|house|castle|tent|volcano|bus|train|taxi|automobile|police car|fire engine"
    "|tractor|bicycle|sailboat|airplane|helicopter|rocket|flying saucer|sun|full moon|crescent moon|star|cloud"
    "|rainbow|umbrella|snowflake|snowman|fire|droplet|high voltage|christmas tree|balloon|wrapped gift|trophy"
    "|soccer ball|basketball|baseball|american football|game die|teddy bear|crown|top hat|glasses|t-shirt|dress"
    "|necktie|gem stone|ring|bell|musical note|guitar|drum|trumpet|mobile phone|telephone|laptop|television|camera"
    "|light bulb|candle|closed book|envelope|pencil|scissors|key|locked|hammer|bomb|magnet|alarm clock|watch|anchor"
    "|chair|bathtub|stop sign|check mark button|cross mark|red circle|blue circle|up arrow|recycling symbol|warning"
    "".split("|")
)

FULL = Recipe(
    name="full",
    default_size=128,
    vae=VAERecipe(
        channels=(32, 64, 128, 128),
        groups=16,
        batch={"full": 64, "pooled": 64, "up": 64, "half": 192, "crop": 192},
        plan=TrainingPlan(lr=8e-4, seconds=250, betas=(0.9, 0.99), weight_decay=0.0, warmup=100, flat=0.3, ema=0.999),
    ),
    flow=FlowRecipe(
        heads=6,
        double_blocks=2,
        single_blocks=4,
        text_dim=192,
        text_layers=4,
        text_heads=4,
        text_ff=512,
        cycle=(128, 128, 64),
        lengths={32: 0.965, 64: 0.01, 128: 0.01, 512: 0.015},
        tokens=1024 * 96,
        compiled=((128, 32), (64, 32)),
        plan=TrainingPlan(lr=1e-3, samples=60e6, seconds=1400, warmup=300, flat=0.45, ema=0.9995),
    ),
)

CPU = Recipe(
    name="cpu",
    labels=FEW_LABELS,
    default_size=64,
    vae=VAERecipe(
        channels=(16, 32, 64, 96),
        groups=8,
        cycle=("half", "crop", "half", "full", "half", "crop", "half", "pooled", "half", "up"),
        batch={"full": 8, "pooled": 8, "up": 8, "half": 32, "crop": 32},
        plan=TrainingPlan(lr=2e-3, seconds=1800, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, flat=0.3, ema=0.995),
    ),
    flow=FlowRecipe(
        heads=4,
        head_dim=48,
        rope=(16, 16, 16),
        double_blocks=2,
        single_blocks=2,
        text_dim=128,
        text_layers=2,
        text_heads=2,
        text_ff=256,
        cycle=(64,) * 7 + (128,),
        lengths={16: 0.55, 32: 0.4, 128: 0.03, 512: 0.02},
        tokens=64 * 40,
        shares={"single": 0.62, "colour": 0.16, "pair": 0.08, "colour_pair": 0.04, "count": 0.10},
        plan=TrainingPlan(lr=2e-3, seconds=2400, warmup=100, flat=0.4, ema=0.998),
    ),
)

RECIPES = {recipe.name: recipe for recipe in (FULL, CPU)}


def get(name: str) -> Recipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
