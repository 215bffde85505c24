"""A trained generator as a pipeline: the teacher's, with one network call, or a few, in the place of its loop."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import record
from diffaccel.distill.learning import LearningRun
from diffaccel.distill.scheduler import SIMFewStepScheduler, SIMOneStepScheduler, TrajectoryScheduler
from diffaccel.distill.stage import StageOptions
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json, write_text
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.whole_folder import whole_folder

PROVENANCE = "student.json"


def scheduler_of(teacher: PipelineTeacher, config: StageOptions) -> SIMOneStepScheduler:
    """Return the scheduler of a student of these options.

    Raises:
        DiffAccelError: where the pipeline cannot give its network the input that the student was trained with.
    """
    if config.start == "scaled" and not teacher.scales_input:
        raise DiffAccelError(
            f"{type(teacher.pipe).__name__} passes its noise to the network as it is, but start is 'scaled'. "
            "Distil with start='unit'."
        )
    if config.noise_ratio > teacher.largest_ratio * (1 + 1e-6):
        raise DiffAccelError(
            f"noise_ratio is {config.noise_ratio:g}, but {type(teacher.pipe).__name__} was trained up to "
            f"{teacher.largest_ratio:.4g}. Take that or less."
        )
    levels = []
    for level in config.student_levels:
        a, s = teacher.coefficients(torch.tensor([level], dtype=torch.float64, device="cpu"))
        levels.append((float(a), float(s), teacher.timestep(level)))
    if len(levels) > 1:
        several = SIMFewStepScheduler if config.fresh_noise else TrajectoryScheduler
        return several(levels, teacher.kind, config.start)
    return SIMOneStepScheduler(*levels[0], teacher.kind, config.start)


def student(run: LearningRun, weights: dict[str, Tensor] | None = None) -> Any:
    """Return the teacher's pipeline with averaged weights of the generator, and the scheduler of its steps.

    Text encoders and autoencoder are shared with the teacher's pipeline, which stays as it is.

    Args:
        weights: those of :meth:`LearningRun.weights`, where they were asked for already.
    """
    teacher = run.source
    if not isinstance(teacher, PipelineTeacher):
        raise DiffAccelError("A bare network was distilled; a pipeline is needed to make one. Take run.generator.")
    network = copy.deepcopy(teacher.network).eval().requires_grad_(False)
    learnt = run.weights() if weights is None else weights
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.data, p.grad = learnt[name].to(p.dtype, copy=True), None  # each in its own: some stay in float32
    pipe = teacher.pipe
    name = next(name for name, part in pipe.components.items() if part is teacher.network)
    parts = {**pipe.components, name: network, "scheduler": scheduler_of(teacher, run.config)}
    known = inspect.signature(type(pipe).__init__).parameters
    switches = {key: value for key, value in pipe.config.items() if key in known and key not in parts}
    return type(pipe)(**parts, **switches)


def save(run: LearningRun, folder: str | Path, teacher_name: str, begins_with: dict[str, Any] | None = None) -> Path:
    """Write the student where ``from_pretrained`` finds it, with what it was made of and how.

    One that is there already stays until the new one is whole. Every process must call where weights are shared out;
    the first writes.

    Args:
        begins_with: provenance of the student that the run began with.
    """
    folder = Path(folder)
    pipe = student(run)
    if run.processes.rank:
        return folder
    provenance = {
        "teacher": teacher_name,
        "teacher_weights": weights_hash(run.source.network),
        "options": run.config.to_dict(),
        "network_calls": run.config.calls,
        "seed": run.seed,
        "generator_steps": run.step,
        "pictures": run.pictures,
        "seconds": round(run.seconds, 1),
        "versions": record.versions(),
        **({"begins_with": begins_with} if begins_with else {}),
    }
    with whole_folder(folder, overwrite=True) as made:
        pipe.save_pretrained(made)
        write_json(made / PROVENANCE, provenance)
        write_text(made / "README.md", _card(provenance, run.config.citation))
    return folder


def _card(provenance: dict[str, Any], citation: str) -> str:
    options = json.dumps({k: v for k, v in provenance["options"].items() if k != "name"}, indent=1)
    steps = provenance["network_calls"]
    begun = provenance.get("begins_with", {}).get("options", {}).get("name", "")
    begun = f", beginning with a student of {begun}," if begun else ""
    name, calls = ("one", "one network call") if steps == 1 else (str(steps), f"{steps} network calls")
    return f"""# A {name}-step student of {provenance["teacher"]}

Distilled without pictures{begun} by "{citation}":
{provenance["generator_steps"]} steps, {provenance["pictures"]} drawings, {provenance["seconds"]} s.
It draws in {calls}, without guidance:

```python
import diffaccel
pipe = diffaccel.load("path/to/this/folder")  # or import diffaccel.distill, and diffusers' from_pretrained
image = pipe("a red apple").images[0]
```

Options of the run:

```json
{options}
```
"""
