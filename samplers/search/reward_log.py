"""The rewards of a search in the order in which they came: a search that was killed is resumed from them.

A policy is a function of its rewards, and its noise of their keys, so rewards are all that has to be stored: replayed,
they lead to the same states. Latents are computed again only for the states from which the search continues.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import COUNT, misfit, write_text
from diffaccel.samplers.search.chains import RunningChain
from diffaccel.samplers.search.processes import SearchProcesses

FORMAT = 1
NAME = "rewards.jsonl"


_ROUND = {"row": COUNT, "chain": COUNT, "rewards": [(float, int, None)]}


class RewardLog:
    """Rewards by chain. Without a folder nothing is stored.

    Args:
        folder: where ``rewards.jsonl`` is: a header that identifies the search, then one line per round of a chain.
        header: everything that the search depends on; the file of a search with another header is refused.
        processes: the processes that share the search. The first one reads and writes, and sends what it read to the
            others: had each read the file by itself, one could see a line more or less than another and would then
            wait for a round that the others do not make.

    Raises:
        DiffAccelError: for the file of another search, naming what differs, and for a damaged line before the last.
    """

    def __init__(
        self,
        folder: Path | None = None,
        header: dict[str, Any] | None = None,
        *,
        processes: SearchProcesses | None = None,
    ) -> None:
        processes = processes or SearchProcesses()
        self.file = None if folder is None else folder / NAME
        self.writes = processes.rank == 0
        self.rounds: dict[tuple[int, int], deque[list[float]]] = defaultdict(deque)
        if folder is None:
            return
        header = json.loads(json.dumps({"format": FORMAT, **(header or {})}))
        file = folder / NAME
        read = self.writes and file.is_file()
        text = processes.share(file.read_text(encoding="utf-8", errors="replace") if read else "")
        lines = text.split("\n")[:-1]  # without a last line that a kill cut short
        if lines and _parsed(lines[-1], {} if len(lines) == 1 else _ROUND) is None:
            lines.pop()  # nor one that a crash filled with something else
        if lines:
            self._read(lines, header)
        complete = "".join(f"{line}\n" for line in lines or [json.dumps(header)])
        if self.writes and complete != text:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, complete)

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        entries = [_parsed(line, _ROUND if number else {}) for number, line in enumerate(lines)]
        if None in entries:
            raise DiffAccelError(
                f"Line {entries.index(None) + 1} of '{self.file}' is damaged. Remove the file, and the search starts "
                "anew."
            )
        stored, *rounds = (entry for entry in entries if entry is not None)
        if stored != header:
            differ = ", ".join(key for key in {**stored, **header} if stored.get(key) != header.get(key))
            raise DiffAccelError(
                f"'{self.file}' is of another search: it differs in {differ}. Remove it, or give another folder."
            )
        for entry in rounds:
            rewards = [math.nan if reward is None else float(reward) for reward in entry["rewards"]]
            self.rounds[entry["row"], entry["chain"]].append(rewards)

    def replay(self, chain: RunningChain) -> list[float] | None:
        """Return the stored rewards of a chain's current transitions; None where there are no more of that chain.

        Raises:
            DiffAccelError: for another number of rewards than of transitions.
        """
        rounds = self.rounds.get((chain.search.row, chain.number))
        if not rounds:
            return None
        rewards, count = rounds.popleft(), len(chain.transitions)
        if len(rewards) != count:
            raise DiffAccelError(
                f"'{self.file}' has {len(rewards)} rewards where this search makes {count} moves. Remove it."
            )
        return rewards

    def append(self, chain: RunningChain, rewards: list[float]) -> None:
        """Store the rewards of one round of a chain."""
        if self.file is None or not self.writes:
            return
        values = [None if math.isnan(reward) else reward for reward in rewards]
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": chain.search.row, "chain": chain.number, "rewards": values}) + "\n")


def _parsed(line: str, shape: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON object in a line; None where it holds none of that shape."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not misfit(value, shape) else None
