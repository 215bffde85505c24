"""Compare the plain pipeline with its samplers at the same prompts and seeds, in pictures and in cost.

Writes images, a record, a contact sheet and one self-contained page. The difference shown is that to the baseline's
picture. It does not measure quality: a better solver differs from the baseline by the baseline's own error, and a
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
from diffaccel.runs import loading
from diffaccel.runs.early_checks import note_of_unknown_words
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request

PROMPTS = (
    "red apple, fluent 3d",
    "cat face, noto",
    "birthday cake, fluent 3d",
    "sailboat, twemoji",
    "sunflower, noto",
    "rocket, noto",
    "three blue stars, noto",
    "yellow banana left of red car, twemoji",
)
TEMPLATE = Path(__file__).parent / "page.html.jinja"
KIND = "demo"


@dataclass(frozen=True)
class DemoVariant:
    """One column of the demo: a sampler (None for the pipeline's own loop), a number of steps, and another model.

    Args:
        student: name of a zoo model that draws instead of the demo's own, in a call as its card recommends.
    """

    sampler: str | None
    steps: int
    student: str | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.student or self.sampler or 'plain'}-{self.steps}"

    @property
    def label(self) -> str:
        """Name on the page."""
        return f"{self.student or self.sampler or 'plain pipeline'}, {self.steps} step{'s' * (self.steps != 1)}"


def default_variants(model: str = zoo.DEFAULT, steps: int = 28, few: int = 8) -> list[DemoVariant]:
    """Return the baseline, samplers at as many steps, some with ``few`` network calls, and the model's students."""
    equal = [DemoVariant(name, steps) for name in (None, "euler", "heun", "dpmpp2m", "ancestral")]
    fast = [DemoVariant(None, few), DemoVariant("dpmpp2m", few), DemoVariant("heun", max(1, few // 2))]
    students = [name for name in zoo.names() if zoo.card(name).get("base") == model]
    return [*equal, *fast, *(DemoVariant(None, zoo.call_defaults(s)["num_inference_steps"], s) for s in students)]


def run_demo(
    out: Path,
    *,
    model: str = zoo.DEFAULT,
    prompts: Sequence[str] = PROMPTS,
    variants: Sequence[DemoVariant] | None = None,
    batch: int = 2,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    progress: bool = True,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Draw ``prompts`` in every variant, write the comparison to ``out`` and return its record.

    Images that an earlier call with the same arguments finished are used again.
    """
    variants = list(variants or default_variants(model))
    request = Request(
        prompts=tuple(prompts), model=model, seed=seed, batch=batch, size=size, guidance=guidance
    ).with_model_defaults()
    runs = _draw(request, variants, out, progress)
    baseline = runs[0]
    rows = [_row(out, variant, run, baseline) for variant, run in zip(variants, runs, strict=True)]
    demo = record.Record(
        kind=KIND,
        settings={**baseline["settings"], "steps": None, "variants": [variant.name for variant in variants]},
        command=list(command or ()),
        device=baseline["device"],
    ).finish(
        call={k: v for k, v in baseline["call"].items() if k != "num_inference_steps"},
        note=note_of_unknown_words(request),
        credits=credit_lines(model),
        variants=rows,
    )
    demo.save(out / "record.json")
    write_png(out / "contact_sheet.png", contact_sheet(out, request.prompts, rows, demo.results["credits"]))
    write_text(out / "index.html", page(out, demo.to_dict()))
    return demo.to_dict()


def _draw(request: Request, variants: Sequence[DemoVariant], out: Path, progress: bool) -> list[dict[str, Any]]:
    """Draw the request in every variant, on one open pipeline of each model, and return the records of the runs."""
    models = {variant.student: _Model.open(request, variant.student) for variant in variants}
    for variant in variants:
        models[variant.student].warm_up(variant)
    # one call of every variant, then the next of each: other load on the machine affects all of them alike
    rounds = len(request.chunks())
    with tqdm(total=rounds * len(variants), disable=not progress, unit="call") as bar:
        for _ in range(rounds):
            runs = []
            for variant in variants:
                bar.set_description(variant.label)
                model = models[variant.student]
                runs.append(model.draw(variant, out / variant.name, digest=model.digest, stop_after=1))
                bar.update()
    return runs


@dataclass(frozen=True)
class _Model:
    """An open pipeline, its digest, and what is asked of it."""

    pipe: Any
    digest: str
    request: Request

    @classmethod
    def open(cls, request: Request, student: str | None) -> _Model:
        if student is not None:  # guidance is in a student
            request = replace(request, model=student, guidance=None, negative=None).with_model_defaults()
        device = loading.pick_device(request.device)
        folder, digest = loading.locate(request.model)
        pipe = loading.open_pipeline(request, folder, device, loading.pick_dtype(request.dtype, device))
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, digest, request)

    def draw(self, variant: DemoVariant, out: Path, **options: Any) -> dict[str, Any]:
        request = replace(self.request, steps=variant.steps)
        if variant.sampler is not None:
            compose.accelerate(self.pipe, variant.sampler)
        try:
            return generate_run(request, out, pipe=self.pipe, **options)
        finally:
            compose.remove(self.pipe)

    def warm_up(self, variant: DemoVariant) -> None:
        """Draw two steps, so that one-time work of the libraries is not counted against a variant's first call."""
        few = replace(self.request, prompts=self.request.prompts[: self.request.batch])
        with tempfile.TemporaryDirectory() as folder:
            replace(self, request=few).draw(replace(variant, steps=min(2, variant.steps)), Path(folder))


# -- comparing --------------------------------------------------------------------------------------------------------


def _row(out: Path, variant: DemoVariant, run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's cost per image, and how far its images are from the baseline's (levels of 0 to 255)."""
    count, cost = len(run["images"]), run["cost"]
    chunks = zip(run["chunks"], baseline["chunks"], strict=True)
    ratios = [base["cost"]["seconds"] / chunk["cost"]["seconds"] for chunk, base in chunks]
    pairs = zip(run["images"], baseline["images"], strict=True)
    differences = [difference(Path(run["out"]) / a["file"], Path(baseline["out"]) / b["file"]) for a, b in pairs]
    images = [
        {**image, "file": f"{variant.name}/{image['file']}", "difference": levels}
        for image, levels in zip(run["images"], differences, strict=True)
    ]
    return {
        "name": variant.name,
        "label": variant.label,
        "sampler": variant.sampler,
        "student": variant.student,
        "steps": variant.steps,
        "nfe": cost["nfe"] / count,
        "forwards": cost["forwards"] / count,
        "seconds": round(cost["seconds"] / count, 3),
        "turns": len(ratios),
        "speedup": round(median(ratios), 2),  # of calls that were neighbours in time
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "difference": round(sum(differences) / count, 2),
        "identical": [i["pixels_sha256"] for i in images] == [i["pixels_sha256"] for i in baseline["images"]],
        "images": images,
    }


def difference(first: Path, second: Path) -> float:
    """Return the mean absolute difference of two pictures' pixels, in levels of 0 to 255."""
    import numpy as np
    from PIL import Image

    with Image.open(first) as a, Image.open(second) as b:
        pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (a, b)]
    return round(float(np.abs(pixels[0] - pixels[1]).mean()), 3)


# -- showing ----------------------------------------------------------------------------------------------------------


def credit_lines(model: str) -> list[str]:
    """Return whose art a zoo model was trained on, as its card has it; nothing for other models."""
    return list(zoo.card(model).get("attribution", ())) if model in zoo.names() else []


def contact_sheet(
    out: Path, prompts: Sequence[str], rows: Sequence[dict[str, Any]], attribution: Sequence[str], side: int = 128
) -> Any:
    """Return all images on one sheet: a row per prompt, a column per variant, and the credits below."""
    from PIL import Image, ImageDraw, ImageFont

    gap, left, top = 8, 210, 44
    width, height = left + len(rows) * (side + gap) + gap, top + len(prompts) * (side + gap) + gap
    sheet = Image.new("RGB", (width, height + (24 + 16 * len(attribution) if attribution else 0)), "white")
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
    lines = ["Trained on pictures by others:", *attribution] if attribution else []
    draw.multiline_text((gap, height), "\n".join(lines), fill="black", font=ImageFont.load_default(11))
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])


def page(out: Path, demo: dict[str, Any]) -> str:
    """Return the comparison as one self-contained HTML page."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["inline"] = lambda file: _inline(out / file)
    rows = demo["variants"]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        demo=demo,
        rows=rows,
        base=rows[0],
        slowest=max(1 / row["speedup"] for row in rows),
        aspect_ratio=_aspect_ratio(out / rows[0]["images"][0]["file"]),
        findings=findings(rows),
    )


def _aspect_ratio(file: Path) -> str:
    from PIL import Image

    with Image.open(file) as image:
        return f"{image.width} / {image.height}"


def _inline(file: Path) -> str:
    """Return a picture as a data URL, without its metadata."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences about the numbers, chosen by the numbers alone."""
    base, *others = rows
    sentences = []
    for row in others:
        if row["steps"] == base["steps"] and row["sampler"] == "euler":
            same = "pixel for pixel the plain pipeline's" if row["identical"] else f"{row['difference']:.2f} levels off"
            low, high = row["speedup_range"]
            time = (
                "in the same time, within what this run can tell"
                if low <= 1 <= high
                else f"{row['speedup']:.2f} times as fast"
            )
            sentences.append(f"Euler through diffaccel is {same}, {time}.")
    for row in others:
        if row["student"]:
            sentences.append(
                f"{row['student']} is a model of its own, distilled from this one: {row['nfe']:g} instead of "
                f"{base['nfe']:g} predictions, {row['speedup']:.1f} times as fast."
            )
    few = [row for row in others if row["nfe"] < base["nfe"] / 2 and not row["student"]]
    if few:
        closest = min(few, key=lambda row: row["difference"])
        sentences.append(
            f"With {closest['nfe']:g} instead of {base['nfe']:g} predictions, {closest['label']} stays closest to the "
            f"baseline: {closest['difference']:.1f} of 255 levels on average, {closest['speedup']:.1f} times as fast."
        )
    return sentences
