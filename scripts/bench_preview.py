"""Do cheap decoders rank pictures as the full decoder does? Reward and judge by either, on latents no training saw.

    python -m scripts.bench_preview --previews FOLDER linear --out docs/results

Of every prompt eight independent samples are drawn. At the samples themselves and at predictions on the way, each is
decoded in full and by every preview, scored by the reward and by the judge, and the scores of one prompt's eight are
compared by rank: a search chooses among those. The mean over prompts has a 95 % bootstrap interval over prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.eval.metrics.clip_score import clip_score
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.uncertainty.intervals import bootstrap_mean, paired_difference, spearman
from diffaccel.files import write_json
from diffaccel.samplers.search.preview import preview_decoder
from scripts.bench_search import JUDGE, REWARD, rows_of
from scripts.zoo.emoji_preview.latents import STEPS, full, predicted

PARTICLES, SIZE = 8, 128
LEVELS = {"the sample": STEPS, "level 5 of 8": 4, "level 3 of 8": 2}
TIMED, TURNS = 16, 5  # pictures decoded together, and how often


def session_of(pipe: Any) -> Any:
    """Open a call of the pipeline, as previews see it."""
    return diffaccel.open_session(
        pipe, prompt="a", height=SIZE, width=SIZE, num_inference_steps=STEPS, max_sequence_length=32
    )


def milliseconds(decode: Callable[[Tensor], Tensor], x0: Tensor) -> float:
    """Return the least time of a picture over some turns, after one that does not count."""
    times = []
    with torch.no_grad():
        for _ in range(TURNS + 1):
            begin = time.perf_counter()
            decode(x0)
            if x0.device.type == "cuda":
                torch.cuda.synchronize(x0.device)
            times.append(time.perf_counter() - begin)
    return round(1000 * min(times[1:]) / len(x0), 3)


class Scores:
    """Reward and judge of pictures."""

    def __init__(self, device: torch.device) -> None:
        self.clips = {
            "reward": as_clip(extractor(REWARD, device=device)), "judge": as_clip(extractor(JUDGE, device=device)),
        }  # fmt: skip

    def __call__(self, pictures: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """Return both of pictures (R, 3, H, W) in [-1, 1], (R,) each."""
        images = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        unique = list(dict.fromkeys(texts))
        places = [unique.index(text) for text in texts]
        return {
            name: clip_score(torch.cat([clip(part) for part in images.split(64)]).cpu(), clip.texts(unique)[places])
            for name, clip in self.clips.items()
        }


def compare(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Draw, decode by all, score, and compare."""
    pipe = diffaccel.load("emoji-flux", dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    texts = [text for text, _ in rows_of("emoji-1000", options.skip, options.prompts, 1)]
    batches = [predicted(pipe, texts[i : i + 8], SIZE, PARTICLES, 40_000 + i) for i in range(0, len(texts), 8)]
    with session_of(pipe) as session:
        decoders = {name: preview_decoder(name, session, device) for name in options.previews}
    cheap = {name: preview.decode for name, preview in decoders.items() if preview is not None}
    scores, rows, started = Scores(device), {}, time.perf_counter()
    for level, place in LEVELS.items():
        x0 = torch.cat([batch.levels[place] for batch in batches]).to(device)
        prompts = [text for batch in batches for text in batch.prompts[place]]
        truth = scores(full(pipe.vae, x0), prompts)
        for name, decode in cheap.items():
            with torch.no_grad():
                pictures = torch.cat([decode(part).float().cpu() for part in x0.split(TIMED)])
            rows[level, name] = (truth, scores(pictures, prompts), prompts)
        print(f"{level}: {time.perf_counter() - started:.0f} s", flush=True)
    vae: Callable[[Tensor], Tensor] = lambda z: full(pipe.vae, z)  # noqa: E731
    x0 = batches[0].levels[-1][:TIMED].to(device)
    times = {name: milliseconds(decode, x0) for name, decode in {"full": vae, **cheap}.items()}
    return {"milliseconds a picture": times, "rows": table(rows, list(cheap))}


def table(rows: dict[tuple[str, str], Any], names: list[str]) -> list[dict[str, Any]]:
    """Return rank correlations by level, preview and score, within prompts and over all."""
    found = []
    for (level, name), (truth, cheap, prompts) in rows.items():
        for score in ("reward", "judge"):
            inside = within(truth[score], cheap[score], prompts)
            row: dict[str, Any] = {
                "level": level, "preview": name, "score": score, "latents": len(prompts),
                "within prompts": interval(bootstrap_mean(inside)),
                "over all": round(spearman(truth[score], cheap[score]), 3),
            }  # fmt: skip
            if name != names[-1]:
                other_truth, other, _ = rows[level, names[-1]]
                against = within(other_truth[score], other[score], prompts)
                row[f"within prompts, against {names[-1]}"] = interval(paired_difference(inside, against).interval)
            found.append(row)
    return found


def within(truth: Tensor, cheap: Tensor, prompts: list[str]) -> list[float]:
    """Return the rank correlation among the samples of each prompt."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    return [spearman(truth[rows], cheap[rows]) for rows in places.values()]


def interval(found: Any) -> list[float]:
    """Return value, low and high, rounded."""
    return [round(float(number), 3) for number in (found.value, found.low, found.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=26)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--previews", nargs="+", required=True, help="the last one is compared with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    about = record.describe_device(device)
    made = {"date": record.now(), "device": about, "versions": record.versions(), "threads": torch.get_num_threads(),
            **compare(options, device)}  # fmt: skip
    print(f"{about.get('name', about)}, {made['threads']} threads, ms a picture: {made['milliseconds a picture']}")
    for row in made["rows"]:
        print(" | ".join(f"{key}: {value}" for key, value in row.items()))
    if options.out:
        write_json(options.out / f"bench_preview_{device.type}.json", made)


if __name__ == "__main__":
    main()
