"""The plain pipeline beside its samplers: same prompts, same seeds, and what each picture cost.

Writes images, a record, a contact sheet and one self-contained page. The difference shown is that to the baseline's
picture. It is no measure of quality: a better solver differs from the baseline by the baseline's own error, and a
stochastic one draws another picture.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from diffaccel import compose, record, zoo
from diffaccel.files import write_png, write_text
from diffaccel.runs import loading as opening
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request

PROMPTS = (
    "red apple, fluent 3d",
    "cat face, noto",
    "birthday cake, fluent 3d",
    "sailboat, twemoji",
    "sunflower, noto",
    "rocket, fluent 3d",
    "three blue stars, noto",
    "yellow banana left of red car, twemoji",
)
TEMPLATE = Path(__file__).parent / "page.html.jinja"
KIND = "demo"


@dataclass(frozen=True)
class Variant:
    """One way to draw the same pictures: a sampler (None for the pipeline's own loop) and a number of steps."""

    sampler: str | None
    steps: int

    @property
    def name(self) -> str:
        """As a folder is called."""
        return f"{self.sampler or 'plain'}-{self.steps}"

    @property
    def label(self) -> str:
        """As a reader sees it."""
        return f"{self.sampler or 'plain pipeline'}, {self.steps} step{'s' * (self.steps != 1)}"


def variants(steps: int = 28, few: int = 8) -> list[Variant]:
    """The baseline first, then every sampler at equal steps, then what fewer network calls leave of them."""
    equal = [Variant(name, steps) for name in (None, "euler", "heun", "dpmpp2m", "ancestral")]
    return [*equal, Variant(None, few), Variant("dpmpp2m", few), Variant("heun", max(1, few // 2))]


def run_demo(
    out: Path,
    *,
    model: str = zoo.DEFAULT,
    prompts: Sequence[str] = PROMPTS,
    chosen: Sequence[Variant] | None = None,
    batch: int = 2,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    progress: bool = True,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Draw ``prompts`` in every variant and write the comparison to ``out``; returns its record.

    What an earlier call with the same arguments finished is used again.
    """
    chosen = list(chosen or variants())
    request = Request(
        prompts=tuple(prompts), model=model, seed=seed, batch=batch, size=size, guidance=guidance
    ).with_model_defaults()
    device = opening.pick_device(request.device)
    folder, digest = opening.locate(model)
    pipe = opening.open_pipeline(request, folder, device, opening.pick_dtype(request.dtype, device))
    pipe.set_progress_bar_config(disable=True)
    _warm_up(pipe, request)
    # a call of every variant, then the next of each: what else the machine does meanwhile meets all of them alike
    rounds = len(request.chunks())
    with tqdm(total=rounds * len(chosen), disable=not progress, unit="call") as bar:
        for _ in range(rounds):
            runs = []
            for variant in chosen:
                bar.set_description(variant.label)
                runs.append(_run(pipe, request, variant, out, digest))
                bar.update()
    rows = [_row(out, variant, run, runs[0]) for variant, run in zip(chosen, runs, strict=True)]
    first = runs[0]
    made = record.Record(
        kind=KIND,
        settings={**first["settings"], "steps": None, "variants": [variant.name for variant in chosen]},
        command=list(command or ()),
        device=first["device"],
    ).finish(call={k: v for k, v in first["call"].items() if k != "num_inference_steps"}, variants=rows)
    made.save(out / "record.json")
    write_png(out / "contact_sheet.png", contact_sheet(out, request.prompts, rows))
    write_text(out / "index.html", page(out, made.to_dict()))
    return made.to_dict()


def _run(pipe: Any, request: Request, variant: Variant, out: Path, digest: str) -> dict[str, Any]:
    if variant.sampler is not None:
        compose.accelerate(pipe, variant.sampler)
    try:
        changed = replace(request, steps=variant.steps)
        return generate_run(changed, out / variant.name, pipe=pipe, digest=digest, stop_after=1)
    finally:
        compose.remove(pipe)


def _warm_up(pipe: Any, request: Request) -> None:
    """One step, so that what libraries do once is not counted against the baseline."""
    once = replace(request, prompts=request.prompts[: request.batch], steps=1)
    with tempfile.TemporaryDirectory() as folder:
        generate_run(once, Path(folder), pipe=pipe)


# -- comparing --------------------------------------------------------------------------------------------------------


def _row(out: Path, variant: Variant, run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """What a variant cost for one image, and how far its images are from the baseline's (levels of 0 to 255)."""
    count, cost = len(run["images"]), run["cost"]
    seconds, base = ([chunk["cost"]["seconds"] for chunk in chunks["chunks"]] for chunks in (run, baseline))
    ratios = [theirs / ours for theirs, ours in zip(base, seconds, strict=True)]
    pairs = zip(run["images"], baseline["images"], strict=True)
    differences = [difference(Path(run["out"]) / a["file"], Path(baseline["out"]) / b["file"]) for a, b in pairs]
    images = [
        {**image, "file": f"{variant.name}/{image['file']}", "difference": apart}
        for image, apart in zip(run["images"], differences, strict=True)
    ]
    return {
        "name": variant.name,
        "label": variant.label,
        "sampler": variant.sampler,
        "steps": variant.steps,
        "nfe": cost["nfe"] / count,
        "forwards": cost["forwards"] / count,
        "seconds": round(cost["seconds"] / count, 3),
        "speedup": round(median(ratios), 2),  # of neighbours in time, call by call
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "difference": round(sum(differences) / count, 2),
        "identical": [i["pixels_sha256"] for i in images] == [i["pixels_sha256"] for i in baseline["images"]],
        "images": images,
    }


def difference(one: Path, other: Path) -> float:
    """Mean absolute difference of two pictures' pixels, in levels of 0 to 255."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as a, Image.open(other) as b:
        pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (a, b)]
    return round(float(np.abs(pixels[0] - pixels[1]).mean()), 3)


# -- showing ----------------------------------------------------------------------------------------------------------


def contact_sheet(out: Path, prompts: Sequence[str], rows: Sequence[dict[str, Any]], side: int = 128) -> Any:
    """All images on one sheet: a row a prompt, a column a variant."""
    from PIL import Image, ImageDraw, ImageFont

    gap, left, top = 8, 210, 44
    width, height = left + len(rows) * (side + gap) + gap, top + len(prompts) * (side + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, row in enumerate(rows):
        x = left + column * (side + gap)
        text = row["label"].replace(", ", "\n")
        draw.text((x + side / 2, top / 2), text, fill="black", font=font, anchor="mm", align="center")
        for line, image in enumerate(row["images"]):
            with Image.open(out / image["file"]) as picture:
                sheet.paste(picture.convert("RGB").resize((side, side)), (x, top + line * (side + gap)))
    for line, prompt in enumerate(prompts):
        middle = top + line * (side + gap) + side / 2
        draw.text((left - gap, middle), _wrapped(prompt, 26), fill="black", font=font, anchor="rm", align="right")
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])


def page(out: Path, made: dict[str, Any]) -> str:
    """The comparison as one HTML file that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["inline"] = lambda file: _inline(out / file)
    rows = made["variants"]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        made=made,
        rows=rows,
        base=rows[0],
        slowest=max(row["seconds"] for row in rows),
        ratio=_ratio(out / rows[0]["images"][0]["file"]),
        findings=findings(rows),
    )


def _ratio(file: Path) -> str:
    from PIL import Image

    with Image.open(file) as image:
        return f"{image.width} / {image.height}"


def _inline(file: Path) -> str:
    """A picture as a data URL, without the text it carries."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences that only they decide."""
    base, *others = rows
    said = []
    for row in others:
        if row["steps"] == base["steps"] and row["sampler"] == "euler":
            same = "pixel for pixel the plain pipeline's" if row["identical"] else f"{row['difference']:.2f} levels off"
            low, high = row["speedup_range"]
            time = (
                "in the same time, within what this run can tell"
                if low <= 1 <= high
                else f"{row['speedup']:.2f} times as fast"
            )
            said.append(f"Euler through diffaccel is {same}, {time}.")
    few = [row for row in others if row["nfe"] < base["nfe"] / 2]
    if few:
        closest = min(few, key=lambda row: row["difference"])
        said.append(
            f"With {closest['nfe']:g} instead of {base['nfe']:g} predictions, {closest['label']} stays closest to the "
            f"baseline: {closest['difference']:.1f} of 255 levels on average, {closest['speedup']:.1f} times faster."
        )
    return said
