"""Compare rules of composition at equal network rows: is each of two concepts in the picture, by a held-out judge?

    python -m scripts.bench_superdiff --split tune --out out/superdiff
    python -m scripts.bench_superdiff --split held-out --out out/superdiff

Pairs of labels of ``emoji-flux`` were drawn at random once and are fixed below; options are chosen on the pairs of the
split "tune" (``choice.json``) and reported on the others. Every picture may send the same number of rows through the
network, whatever its rule does with them. The judge, which neither searches nor tunes, scores a picture for both
concepts; the lower score counts, and a concept is found when it is among the judge's five nearest of all labels.
Intervals are over pairs, seeds of a pair together. What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffaccel
from diffaccel import record, zoo
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import atomic, write_json
from diffaccel.runs import loading
from diffaccel.samplers import SuperDiff
from scripts.earlier import earlier
from scripts.ends import ends, ends_text

JUDGE, STYLE, TOP = "emoji-clip-judge", "noto", 5
SHOWN = 8  # pairs in the grid
FORMAT = 2
TUNE = """
    paperclip + ring buoy; olive + maple leaf; chair + oil drum; credit card + black heart; blowfish + broccoli;
    ferris wheel + pushpin; lacrosse + moose; running shirt + taxi; telephone + deciduous tree;
    pea pod + reminder ribbon; kitchen knife + school; partying face + running shoe; flamingo + bellhop bell;
    jellyfish + popcorn; octopus + ring; tamale + link; water wave + mouse; computer disk + desert;
    ringed planet + ram; skull + giraffe;
"""
HELD_OUT = """
    cucumber + video camera; volcano + pinata; cooked rice + winking face; abacus + salt; baby chick + flashlight;
    saluting face + one-piece swimsuit; shaking face + penguin; melting face + performing arts; star + joystick;
    bug + glowing star; yellow heart + japanese castle; guitar + hot pepper; necktie + canoe;
    long drum + orange heart; pencil + burrito; banjo + smiling face; birthday cake + roller coaster;
    ogre + beverage box; package + confetti ball; drum + unamused face; sunglasses + otter; bento box + bison;
    zebra + rice cracker; fly + lollipop; koala + file folder; kimono + goal net; sailboat + admission tickets;
    screwdriver + honey pot; steaming bowl + memo; mango + billed cap; strawberry + diya lamp;
    cricket game + broom; firecracker + card index; slot machine + bullet train; flying saucer + donkey;
    ambulance + cow face; spiral shell + loudspeaker; bat + control knobs; desktop computer + ship; panda + dango;
    motorcycle + shortcake; oyster + worried face; watermelon + coat; stethoscope + tokyo tower; shamrock + thread;
    fortune cookie + bird; ice hockey + blue heart; snake + thinking face; battery + sports medal; dodo + bed;
    circus tent + hiking boot; grapes + astonished face; custard + dragon face; clamp + cityscape;
    printer + feather; leafy green + badminton; lemon + face exhaling; green salad + bicycle; old key + wing;
    rabbit + e-mail; pouring liquid + eagle; wine glass + red envelope; key + hospital; skis + parrot;
"""

Rule = tuple[dict[str, Any], float]  # options of SuperDiff, and rows a step
# every family's forms, the first of which is reported where nothing was chosen; a step of M + 1 = 3 rows is the norm
FAMILIES: dict[str, dict[str, Rule]] = {
    "joint prompt": {"noise": ({"op": "average"}, 2), "flow": ({"op": "average", "eta": 0.0}, 2)},
    "average": {"noise": ({"op": "average"}, 3), "flow": ({"op": "average", "eta": 0.0}, 3)},
    "and": {"noise": ({}, 3)},
    "and, curvature": {"probe": ({"curvature": True}, 5)},
    "and, flow": {"probe": ({"eta": 0.0}, 5)},
    "and, euler": {"paper": ({"kernel": "euler", "repair": False, "first_sigma": 0.999}, 3)},
    "dombi and": {f"hardness {h:g}": ({"op": "dombi", "hardness": h}, 3) for h in (0.1, 0.01, 1.0, 10.0)},
    "product, smc": {
        "K = 2": ({"op": "product", "particles": 2}, 6), "K = 4": ({"op": "product", "particles": 4}, 12),
        "K = 2, halves": ({"op": "product", "particles": 2, "weights": (0.5, 0.5)}, 6),
        "K = 4, halves": ({"op": "product", "particles": 4, "weights": (0.5, 0.5)}, 12),
    },
    "product, fkc": {
        "K = 2": ({"op": "fkc", "particles": 2, "first_sigma": 0.999}, 6),
        "K = 2, halves": ({"op": "fkc", "particles": 2, "weights": (0.5, 0.5), "first_sigma": 0.999}, 6),
    },
    "product, mcmc": {
        f"snr {s:g}{', halves' if w else ''}": ({"op": "mcmc", "snr": s} | ({"weights": w} if w else {}), 6)
        for s in (0.1, 0.2) for w in ((), (0.5, 0.5))
    },
    "or": {"noise": ({"op": "or"}, 3), "switched": ({"op": "or", "switch": "always"}, 3)},
}  # fmt: skip
REFERENCES = {"AND": "and", "Dombi": "dombi and"}  # families whose leads over the others are told


def pairs_of(split: str, count: int | None = None) -> list[tuple[str, str]]:
    """Return the pairs of labels of a split."""
    text = {"tune": TUNE, "held-out": HELD_OUT}[split]
    names = [part.split("+") for part in text.split(";") if part.strip()]
    return [(" ".join(a.split()), " ".join(b.split())) for a, b in names][:count]


class Bench:
    """One open pipeline, the judge, and the pictures of one split.

    Attributes:
        items: ``(pair, seed)`` of every picture.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, loading.pick_device(args.device)
        self.pipe = diffaccel.load("emoji-flux").to(self.device, loading.pick_dtype(args.dtype, self.device))
        self.pipe.set_progress_bar_config(disable=True)
        if args.compile:
            self.pipe.transformer.compile_repeated_blocks(dynamic=False)
        self.pairs = pairs_of(args.split, args.pairs)
        self.items = [(pair, seed) for pair in range(len(self.pairs)) for seed in range(args.seeds)]
        self.judge = as_clip(extractor(JUDGE, device=self.device))
        vocabulary = zoo.vocabulary_of("emoji-flux")
        if vocabulary is None:
            raise SystemExit("emoji-flux has no list of labels.")
        self.labels = vocabulary.all_labels
        self.texts = _unit(self.judge.texts([f"{label}, {STYLE}" for label in self.labels]))

    def prompt(self, family: str, pair: int) -> str:
        """Return the prompt of a pair: one caption for both concepts, or two components."""
        a, b = self.pairs[pair]
        return f"{a} and {b}, {STYLE}" if family == "joint prompt" else f"{a}, {STYLE} | {b}, {STYLE}"

    def draw(self, family: str, options: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw all pictures, uint8 (n, 3, H, W), and return them with the cost of all calls."""
        cost = {"forwards": 0, "seconds": 0.0}
        parts = []
        for begin in range(0, len(self.items), self.args.batch):
            items = self.items[begin : begin + self.args.batch]
            diffaccel.accelerate(self.pipe, SuperDiff(**options, max_batch=self.args.rows))
            try:
                images = self.pipe(
                    [self.prompt(family, pair) for pair, _ in items], negative_prompt=[""] * len(items),
                    height=self.args.size, width=self.args.size, num_inference_steps=steps, true_cfg_scale=3.0,
                    max_sequence_length=32, output_type="pt",
                    generator=[torch.Generator().manual_seed(1000 * pair + seed) for pair, seed in items],
                ).images  # fmt: skip
                run = diffaccel.summary(self.pipe).last_run or {}
            finally:
                diffaccel.remove(self.pipe)
            cost["forwards"] += run["forwards"]
            cost["seconds"] += run["seconds"]
            parts.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts), cost

    def scores(self, images: Tensor) -> dict[str, list[float]]:
        """Return, of every picture, the judge's score of its worse concept, and whether both or one were found.

        "caption" is its score of the one caption for both, which describes two things side by side: in that form the
        model was trained on pairs, and the other scores do not count it.
        """
        features = _unit(torch.cat([self.judge(part.to(self.device)).cpu() for part in images.split(250)]))
        captions = _unit(self.judge.texts([self.prompt("joint prompt", pair) for pair, _ in self.items]))
        cosines = features.double() @ self.texts.double().T
        places = torch.tensor([[self.labels.index(label) for label in self.pairs[pair]] for pair, _ in self.items])
        ours = cosines.gather(1, places)
        ranks = (cosines[:, None] > ours[:, :, None]).sum(2)
        return {
            "worse": [round(v, 4) for v in (100 * ours.min(1).values.clamp(min=0)).tolist()],
            "both": (ranks < TOP).all(1).double().tolist(),
            "one": (ranks < TOP).any(1).double().tolist(),
            "caption": [round(v, 4) for v in (100 * (features * captions).sum(1).clamp(min=0)).double().tolist()],
        }

    def measure(self, name: str, family: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
        """Return a row: its scores picture by picture, and its cost; keep the pictures of the grid."""
        images, cost = self.draw(family, options, steps)
        file = self.args.out / f"pictures_{self.args.split}" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        _save(images[:: self.args.seeds][:SHOWN], file, SHOWN)
        row = {"name": name, "family": family, "options": options, "steps": steps}
        return {
            **row,
            "rows_a_picture": cost["forwards"] / len(images),
            "seconds": cost["seconds"],
            **self.scores(images),
        }

    def clusters(self) -> list[int]:
        """Return the pair of every picture."""
        return [pair for pair, _ in self.items]


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)


def _save(images: Tensor, file: Path, columns: int) -> None:
    from torchvision.utils import make_grid, save_image

    with atomic(file) as target:
        save_image(make_grid(images.float() / 255, nrow=columns, padding=2, pad_value=1.0), target, format="png")


def steps_for(args: argparse.Namespace, rows: float) -> int:
    """Return the steps that spend the rows of ``args.steps`` steps of three."""
    return max(2, round(3 * args.steps / rows))


def work(args: argparse.Namespace, choice: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Yield what is to be drawn: name, family, options, steps."""
    for family, forms in FAMILIES.items():
        if args.families and family not in args.families:
            continue
        chosen = choice.get(family, next(iter(forms)))
        for form, (options, rows) in forms.items():
            if args.split == "tune" or form == chosen:
                yield f"{family}; {form}", family, options, steps_for(args, rows)


def table(rows: list[dict[str, Any]], clusters: list[int]) -> list[dict[str, Any]]:
    """Return means with intervals, and paired differences of the references to each row."""
    bases = {name: row for name, family in REFERENCES.items() for row in rows if row["family"] == family}
    result = []
    for row in rows:
        entry = {key: row[key] for key in ("name", "family", "options", "steps", "rows_a_picture", "seconds")}
        for key in ("one", "caption"):
            entry[key] = sum(row[key]) / len(row[key])
        for key in ("worse", "both"):
            mean = intervals.bootstrap_mean(row[key], clusters=clusters)
            entry[key] = ends(mean)
            for name, base in bases.items():
                if row is not base:
                    lead = intervals.paired_difference(base[key], row[key], clusters=clusters).interval
                    entry[f"{name} minus this, {key}"] = ends(lead)
        result.append(entry)
    return result


HEAD = (
    "| rule | steps | rows a picture | worse score | both found | one found | side by side | AND minus this, worse "
    "| Dombi minus this, worse |\n" + "|---" * 9 + "|"
)


def shown(entry: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    cells = [
        entry["name"], str(entry["steps"]), f"{entry['rows_a_picture']:.0f}", ends_text(entry["worse"]),
        ends_text(entry["both"], 100) + " %", f"{100 * entry['one']:.1f} %", f"{entry['caption']:.2f}",
        *(ends_text(entry.get(f"{name} minus this, worse"), 1, "+") for name in REFERENCES),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def grid(out: Path, split: str, names: list[str]) -> None:
    """Put the strips of all rules together, one line each."""
    from torchvision.io import read_image

    strips = [read_image(str(out / f"pictures_{split}" / f"{name}.png")) for name in names]
    width = max(strip.shape[2] for strip in strips)
    strips = [torch.nn.functional.pad(strip, (0, width - strip.shape[2]), value=255) for strip in strips]
    _save(torch.cat(strips, 1)[None], out / f"grid_{split}.png", 1)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--split", choices=("tune", "held-out"), default="held-out")
    add("--pairs", type=int, default=None, help="only the first of the split's pairs")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=50, help="steps of a rule of three rows a step; others make as many as rows allow")
    add("--size", type=int, default=128)
    add("--batch", type=int, default=320, help="pictures in one pipeline call")
    add("--rows", type=int, default=2000, help="rows in one network call")
    add("--families", nargs="*", default=[], help="only these rules")
    add("--compile", action="store_true")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("out/superdiff"))
    return parser


NO_PICTURE = ("out", "kind", "families", "split")  # options that change no picture


def main() -> None:
    """Draw, judge, print; on the tuning pairs also choose."""
    args = make_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    settings = {key: value for key, value in vars(args).items() if key not in NO_PICTURE} | {"format": FORMAT}
    file = args.out / f"rows_{args.split}.json"
    rows: list[dict[str, Any]] = earlier(file, {"settings": settings}, ("settings",)).get("rows", [])
    chosen = args.out / "choice.json"
    choice = json.loads(chosen.read_text(encoding="utf-8")) if args.split == "held-out" and chosen.is_file() else {}
    finished = {row["name"]: row for row in rows}
    wanted = list(work(args, choice))
    print(HEAD, flush=True)
    for name, family, options, steps in wanted:
        if name not in finished:
            finished[name] = bench.measure(name, family, options, steps)
            write_json(file, {"settings": settings, "rows": list(finished.values())})
        print(shown(table([finished[name]], bench.clusters())[0]), flush=True)
    rows = [finished[name] for name, *_ in wanted]
    summary = table(rows, bench.clusters())
    print("\n" + HEAD)
    for entry in summary:
        print(shown(entry))
    if args.split == "tune":
        best: dict[str, dict[str, Any]] = {}
        for entry in summary:
            if (
                entry["family"] in FAMILIES
                and entry["worse"][0] > best.get(entry["family"], {"worse": [-1]})["worse"][0]
            ):
                best[entry["family"]] = entry
        write_json(chosen, {family: entry["name"].partition("; ")[2] for family, entry in best.items()})
    write_json(args.out / f"bench_superdiff_{args.split}_{args.kind or bench.device.type}.json", {
        "settings": settings, "choice": choice, "pairs": bench.pairs, "device": record.describe_device(bench.device),
        "versions": record.versions(), "judge": JUDGE, "judge_weights_sha256": bench.judge.weights_sha256,
        "kind": args.kind, "date": time.strftime("%Y-%m-%d"), "rows": summary,
    })  # fmt: skip
    grid(args.out, args.split, [row["name"] for row in rows])


if __name__ == "__main__":
    main()
