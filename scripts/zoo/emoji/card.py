"""Cards of the emoji models: description, attribution of the data, and measured quality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from scripts.zoo.emoji.recipe_flow import Recipe

ATTRIBUTION = """\
Noto Emoji (c) Google LLC, Apache License 2.0, https://github.com/googlefonts/noto-emoji
Twemoji graphics (c) Twitter, Inc. and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji; modified (rendered, recoloured,
composed)
Fluent Emoji (c) Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji; packaged by LobeHub (MIT)
Names and tags: emojibase (c) Miles Johnson, MIT, https://github.com/milesj/emojibase; Unicode CLDR
"""

CAPTION = (
    "Drawn by a model that was trained on Noto Emoji, Twemoji (CC-BY 4.0, modified) and Fluent Emoji: "
    "[credits](#attribution)."
)
NOTICE = f"""\
This model was trained from scratch on pictures and names by other authors:

{ATTRIBUTION}
The model's own files are licensed under the Apache License 2.0 (LICENSE-APACHE). Whether weights derive from their
training data in law is unsettled; the attributions above are given either way. LICENSE-MIT holds the text of the MIT
licence for Fluent Emoji and emojibase.
"""

MIT = """\
MIT License

Copyright (c) Microsoft Corporation.
Copyright (c) LobeHub
Copyright (c) 2017-2019 Miles Johnson

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

APACHE = Path(__file__).parents[3] / "LICENSE"


def legal(folder: Path) -> None:
    """Write NOTICE and licence texts, which must accompany the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NOTICE").write_text(NOTICE)
    (folder / "LICENSE-MIT").write_text(MIT)
    shutil.copyfile(APACHE, folder / "LICENSE-APACHE")


def state(report: dict[str, Any]) -> str:
    """Summarise a report: accepted, or the checks that failed."""
    table = report.get("acceptance", [])
    if not table:
        return "not measured yet"
    failed = [row["check"] for row in table if not row["passed"]]
    return f"below acceptance in: {'; '.join(failed)}" if failed else "accepted"


def _common(name: str, recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "licence": "Apache-2.0",
        "attribution": ATTRIBUTION.strip().splitlines(),
        "state": state(report),
        "recipe": recipe.name,
        "note": report.get("note", ""),
    }


def flux(recipe: Recipe, counts: dict[str, int], training: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Make the card of the pipeline."""
    return _common("emoji-flux", recipe, report) | {
        "title": "A tiny text-to-image FluxPipeline that draws emoji",
        "pipeline": "FluxPipeline",
        "data": {
            "styles": ["noto", "twemoji", "fluent 3d"],
            "labels": list(recipe.labels)
            if recipe.labels
            else "881, listed in vocabulary.json and by `diffaccel explain emoji-flux`: objects, animals, food, "
            "plants, weather, faces and symbols; no people, skin tones or flags",
            "captions": "lower case English: '{label}, {style}', colours (red cat), pairs (a left of b), two to four",
        },
        "defaults": {
            "height": recipe.default_size,
            "width": recipe.default_size,
            "num_inference_steps": recipe.default_steps,
            "true_cfg_scale": recipe.default_guidance,
            "negative_prompt": "",
            "max_sequence_length": recipe.default_text_length,
        },
        "parameters": counts,
        "training": training,
        "quality": report.get("quality", {}),
        "acceptance": report.get("acceptance", []),
    }


def clip(name: str, recipe: Recipe, report: dict[str, Any], quality: dict[str, Any]) -> dict[str, Any]:
    """Make the card of one CLIP."""
    judge = name == "emoji-clip-judge"
    use = (
        "Judges pictures in evaluation. It shares no weights with the pipeline; never search or tune with it."
        if judge
        else "A reward for search and tuning. The pipeline reads its text tower, so it flatters the pipeline's "
        "pictures: never report it as quality."
    )
    return _common(name, recipe, report) | {
        "title": f"A tiny open_clip model of emoji: the {'judge' if judge else 'reward'}",
        "use": use,
        "load": "open_clip.create_model_and_transforms('local-dir:' + str(diffaccel.zoo.path(name)))",
        "quality": quality,
    }


def readme(facts: dict[str, Any]) -> str:
    """Write the model card for readers, from the facts of ``card.json``."""
    lines = [f"# {facts['name']}", "", f"{facts['title']}. State: **{facts['state']}**.", ""]
    if facts.get("grid"):
        lines += [f"![24 fixed prompts, failures included]({facts['grid']})", "", CAPTION, ""]
    if facts["note"]:
        lines += [facts["note"], ""]
    if "use" in facts:
        lines += [facts["use"], "", "```python", "import diffaccel.zoo, open_clip", ""]
        load = facts["load"].replace("'", '"')
        lines += [f'name = "{facts["name"]}"', f"model, _, preprocess = {load}", "```", ""]
    if "defaults" in facts:
        lines += _pipeline_lines(facts)
    if facts.get("acceptance"):
        lines += _acceptance_lines(facts["acceptance"])
    lines += [f"Packed {facts['bytes']['packed'] / 1e6:.1f} MB (int8 rows with scales).", "", "## Attribution", ""]
    return "\n".join([*lines, *(f"{line}  " for line in facts["attribution"]), ""])


def _pipeline_lines(facts: dict[str, Any]) -> list[str]:
    """Write the pipeline's example, its data and its size."""
    call = [f"    {key}={json.dumps(value)}," for key, value in facts["defaults"].items()]
    labels, training = facts["data"]["labels"], facts["training"]
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in facts["parameters"].items())
    return [
        "```python",
        "import diffaccel.zoo",
        "from diffusers import FluxPipeline",
        "",
        f'pipe = FluxPipeline.from_pretrained(diffaccel.zoo.path("{facts["name"]}"))',
        "pipe(",
        '    "red apple, noto",',
        *call,
        ").images[0]",
        "```",
        "",
        "Give `height` and `width`: stock FluxPipeline's own default is 1024 px. Guidance is on only with a "
        "`negative_prompt` and `true_cfg_scale` above 1. Prompts are lower case.",
        "",
        f"Styles: {', '.join(facts['data']['styles'])}. Captions: {facts['data']['captions']}.",
        "",
        f"Labels: {', '.join(labels) if isinstance(labels, list) else _linked(labels)}.",
        "",
        f"Parameters: {parts}. Flow training: {training['samples']:,} samples, {training['seconds']:.0f} s.",
        "",
    ]


def _linked(text: str) -> str:
    return text.replace("vocabulary.json", "[vocabulary.json](vocabulary.json)")


def _acceptance_lines(table: list[dict[str, Any]]) -> list[str]:
    """Write the acceptance table in Markdown."""
    lines = ["| check | value | accepted from | real pictures | |", "|---|---|---|---|---|"]
    for row in table:
        passed = "" if row.get("passed") is None else "yes" if row["passed"] else "no"
        lines += [f"| {row['check']} | {row['value']} | {row['target']} | {row.get('real', '')} | {passed} |"]
    return [*lines, ""]
