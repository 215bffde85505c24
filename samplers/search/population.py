"""What a search hands back: its best finished sample, one that is drawn by weight, or several for one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.particles import Key, Particle
from diffaccel.samplers.search.resampling import draw_weighted
from diffaccel.session import Session

ALL = 2**31  # samples kept by a search that draws among all of them


def images_a_search(config: object, session: Session) -> int:
    """Return how many of the call's images come from one search: with ``population`` all of one prompt.

    Raises:
        DiffAccelError: for a population where the call asks for one image of each prompt.
    """
    if not getattr(config, "population", False):
        return 1
    prompt = session.conds[0].arguments.get("prompt")
    prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
    count = len(session.x) // prompts
    if count < 2:
        raise DiffAccelError(
            f"{type(config).__name__}.population returns several samples of one search, and this call asks for one "
            "image of each prompt. Call the pipeline with num_images_per_prompt=2 or more, or leave population "
            "out; diffaccel sample makes a search of every image."
        )
    return count


def handed_back(search: Search, samples: Sequence[Particle], images: int, temperature: float) -> list[Particle]:
    """Return the samples of a search in the order in which they are handed back, the first ``images`` as images.

    Args:
        search: whose samples they are.
        samples: all that it finished, best first; a sample may be in it more than once.
        images: number of them that become images of the call.
        temperature: of a draw without replacement by ``exp(r / temperature)``, times the weights that the search's
            particles have beside it; 0 for the best.

    Raises:
        DiffAccelError: for fewer different samples than images.
    """
    distinct = list(dict.fromkeys(samples))
    if len(distinct) < images:
        raise DiffAccelError(
            f"The search for '{search.prompt}' ended with {len(distinct)} different samples, and the call asks for "
            f"{images} images of it. Ask for fewer, or take more particles or another method, such as 'bon'."
        )
    if not temperature:
        return distinct
    drawn: list[Particle] = []
    for number in range(images):
        left = [sample for sample in distinct if sample not in drawn]
        logits = [sample.reward / temperature + search.log_weights.get(sample.number, 0.0) for sample in left]
        drawn.append(left[draw_weighted(logits, search.seed, Key(-1, -1, -2 - number))])
    return [*drawn, *(sample for sample in distinct if sample not in drawn)]
