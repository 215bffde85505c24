"""The rewards of a search in the order in which they came: a search that was killed is resumed from them.

A policy is a function of its rewards, and its noise of their keys, so rewards are all that has to be stored: replayed,
they lead to the same states. A round, the transitions that were answered together, is one line, so that a resumed
search has rounds of the same rows, on which the last bits depend. Latents of the states from which the search continues
lie beside it; where they do not, the rounds are predicted again, with their own rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.files import COUNT, misfit, remove_leftovers, write_text
from diffaccel.folder_lock import FolderLock
from diffaccel.samplers.search import stored_latents
from diffaccel.samplers.search.chains import RunningChain
from diffaccel.samplers.search.identity import differing
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.stored_latents import StoredLatents

FORMAT = 2
NAME = "rewards.jsonl"

logger = logging.getLogger(__name__)

_NUMBERS = [(float, int, None)]
_ROUND = {"round": [{"row": COUNT, "chain": COUNT, "rewards": _NUMBERS, "log_ratios?": _NUMBERS}]}
_FILES = rf"{re.escape(NAME)}|{re.escape(stored_latents.NAME)}|trace\.json|reward\.png|\d{{3,}}-\d+_.*\.png"


class RewardLog:
    """Rewards by round, in a folder that is this search's alone until :meth:`close`. Without one nothing is stored.

    Args:
        folder: where ``rewards.jsonl`` is: a header that identifies the search, then one line per round.
        header: everything that the search depends on; the file of a search with another header is refused.
        processes: the processes that share the search. The first one reads and writes, and sends what it read to the
            others: had each read the file by itself, one could see a line more or less than another and would then
            wait for a round that the others do not make.
        keep: number of samples beside the best that the search is to end with.

    Attributes:
        rounds: the stored rounds.
        latents: those that belong to the first of these rounds; None where there are none.

    Raises:
        DiffAccelError: for the file of another search, naming what differs, for a damaged line before the last, and
            for a folder that another search is writing.
    """

    def __init__(
        self,
        folder: Path | None = None,
        header: dict[str, Any] | None = None,
        *,
        processes: SearchProcesses | None = None,
        keep: int = 0,
    ) -> None:
        processes = processes or SearchProcesses()
        self.folder, self.file = folder, None if folder is None else folder / NAME
        self.writes = processes.rank == 0 and folder is not None
        self.rounds: list[list[dict[str, Any]]] = []
        self.latents: StoredLatents | None = None
        self._digest = hashlib.sha256()
        self._lock: FolderLock | None = None
        if folder is None or self.file is None:
            return
        try:
            self._open(folder, self.file, header, processes, keep)
        except BaseException:
            self.close()
            raise

    def _open(
        self, folder: Path, file: Path, header: dict[str, Any] | None, processes: SearchProcesses, keep: int
    ) -> None:
        """Take the folder, and read what it holds."""
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder)
            self._lock.acquire()
        header = json.loads(json.dumps({"format": FORMAT, **(header or {})}))
        read = self.writes and file.is_file()
        text = processes.share(file.read_text(encoding="utf-8", errors="replace") if read else "")
        lines = self._whole_lines(text)
        if lines:
            self._read(lines, header)
        lines = lines or [json.dumps(header)]
        complete = "".join(f"{line}\n" for line in lines)
        if self.writes:
            if text not in ("", complete):
                logger.warning("The end of '%s' is damaged; what is missing there is computed again.", self.file)
            self._begin(folder, complete if complete != text else None)
        latents = processes.share(stored_latents.read(folder) if self.writes else None)
        if latents is not None and self._fits(latents, lines, keep):
            self.latents = latents
        self._digest.update(complete.encode())

    def close(self) -> None:
        """Give the folder back; it may be called again."""
        if self._lock is not None:
            self._lock.release()

    def _whole_lines(self, text: str) -> list[str]:
        """Return the lines of the file without an end that a kill or a power failure left unreadable."""
        lines = text.split("\n")[:-1]
        while lines and _parsed(lines[-1], {} if len(lines) == 1 else _ROUND) is None:
            lines.pop()
        return lines

    def _begin(self, folder: Path, text: str | None) -> None:
        """Write the log's ``text`` unless None, and remove what a killed search was just writing."""
        remove_leftovers(folder, _FILES)
        if text is not None and self.file is not None:
            write_text(self.file, text)

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        entries = [_parsed(line, _ROUND if number else {}) for number, line in enumerate(lines)]
        if None in entries:
            raise DiffAccelError(
                f"Line {entries.index(None) + 1} of '{self.file}' is damaged. Remove the file, and the search starts "
                "anew."
            )
        stored, *rounds = (entry for entry in entries if entry is not None)
        if stored != header:
            raise DiffAccelError(
                f"'{self.file}' is of another search: it differs in {differing(stored, header)}. Remove it, or give "
                "another folder."
            )
        self.rounds = [entry["round"] for entry in rounds]

    def _fits(self, latents: StoredLatents, lines: list[str], keep: int) -> bool:
        """Return whether latents belong to the first of the stored rounds, and suffice."""
        if latents.rounds > len(self.rounds) or (latents.keep is not None and latents.keep < keep):
            return False
        before = "".join(f"{line}\n" for line in lines[: latents.rounds + 1])
        return hashlib.sha256(before.encode()).hexdigest() == latents.log

    def replay(self, number: int, chains: Sequence[RunningChain]) -> list[dict[str, Any]] | None:
        """Return the stored answers to the chains' current transitions; None where no such round is stored.

        Raises:
            DiffAccelError: for a round of other chains, or another number of rewards than of transitions.
        """
        if number >= len(self.rounds):
            return None
        answers = self.rounds[number]
        stored = [(answer["row"], answer["chain"], len(answer["rewards"])) for answer in answers]
        asked = [(chain.search.row, chain.number, len(chain.transitions)) for chain in chains]
        if stored != asked:
            rewards, moves = sum(count for *_, count in stored), sum(count for *_, count in asked)
            others = " of other chains" if rewards == moves else ""
            raise DiffAccelError(
                f"'{self.file}' has {rewards} rewards where this search makes {moves} moves{others}. Remove it."
            )
        return answers

    def append(self, particles: dict[RunningChain, list[Particle]], *, guided: bool) -> None:
        """Store the answers of one round: rewards, and where kernels were guided their ratios."""
        if self.file is None or not self.writes:
            return
        answers = []
        for chain, states in particles.items():
            answer = {"row": chain.search.row, "chain": chain.number, "rewards": _json([p.reward for p in states])}
            answers.append(answer | ({"log_ratios": _json([p.log_ratio for p in states])} if guided else {}))
        line = json.dumps({"round": answers}) + "\n"
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)
        self._digest.update(line.encode())

    def store(self, rounds: int, numbers: list[int], tensors: list[Any], keep: int | None = None) -> None:
        """Store latents after so many rounds, which must all be in the log."""
        if self.file is None or self.folder is None or not self.writes:
            return
        with self.file.open("ab") as file:  # latents must never reach the disk before the rewards that led to them
            os.fsync(file.fileno())
        StoredLatents(rounds, self._digest.hexdigest(), numbers, tensors, keep).write(self.folder)


def numbers(values: list[float | None]) -> list[float]:
    """Return stored numbers as they were: JSON has no NaN."""
    return [math.nan if value is None else float(value) for value in values]


def _json(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _parsed(line: str, shape: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON object in a line; None where it holds none of that shape."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not misfit(value, shape) else None
