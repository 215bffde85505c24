"""The rewards of a search in the order in which they came: what a killed search goes on from.

A policy is a function of its rewards and its noise of their keys, so the rewards are all that has to be kept: played
again they lead to the same states, whose latents are computed anew only where the search goes on from them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import write_text
from diffaccel.samplers.search.chains import Task
from diffaccel.samplers.search.processes import Processes

FORMAT = 1
NAME = "rewards.jsonl"


class Trace:
    """Rewards by chain. Without a folder nothing is kept.

    Args:
        folder: of ``rewards.jsonl``: a line a round of a chain, after one that says whose they are.
        about: everything that a search depends on; a file of another search is not gone on with.
        processes: that share the search. The first one reads and writes, and the others have what it read: one that
            read for itself could find a line more or less, and would wait for rounds that the others do not make.

    Raises:
        DiffAccelError: for the file of another search, naming what differs.
    """

    def __init__(
        self, folder: Path | None = None, about: dict[str, Any] | None = None, *, processes: Processes | None = None
    ) -> None:
        processes = processes or Processes()
        self.file = None if folder is None else folder / NAME
        self.writes = processes.rank == 0
        self.rounds: dict[tuple[int, int], deque[list[float]]] = defaultdict(deque)
        if folder is None:
            return
        about = json.loads(json.dumps({"format": FORMAT, **(about or {})}))
        file = folder / NAME
        text = processes.share(file.read_text(encoding="utf-8") if self.writes and file.is_file() else "")
        whole = text[: text.rfind("\n") + 1]  # a line that was cut by a kill is not there
        if whole:
            self._read(whole, about)
        else:
            whole = json.dumps(about) + "\n"
        if self.writes and whole != text:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, whole)

    def _read(self, text: str, about: dict[str, Any]) -> None:
        first, *lines = text.splitlines()
        before = json.loads(first)
        if before != about:
            differ = ", ".join(key for key in {**before, **about} if before.get(key) != about.get(key))
            raise DiffAccelError(
                f"'{self.file}' is of another search: it differs in {differ}. Remove it, or give another folder."
            )
        for line in lines:
            entry = json.loads(line)
            rewards = [math.nan if reward is None else float(reward) for reward in entry["rewards"]]
            self.rounds[entry["row"], entry["chain"]].append(rewards)

    def known(self, task: Task) -> list[float] | None:
        """The rewards of a chain's next moves, if it made them before."""
        rounds = self.rounds.get((task.search.row, task.number))
        if not rounds:
            return None
        rewards = rounds.popleft()
        if len(rewards) != len(task.moves):
            raise DiffAccelError(
                f"'{self.file}' has {len(rewards)} rewards where this search makes {len(task.moves)} moves. Remove it."
            )
        return rewards

    def add(self, task: Task, rewards: list[float]) -> None:
        """Keep the rewards of a chain's round."""
        if self.file is None or not self.writes:
            return
        kept = [None if math.isnan(reward) else reward for reward in rewards]
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": task.search.row, "chain": task.number, "rewards": kept}) + "\n")
