"""The journal of a tuning: an Optuna study on disk, and beside its trials everything that was measured.

Nothing is kept elsewhere, so that a tuning that was killed at any moment goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.tuning.journal_shapes import (
    BRACKET,
    SETTINGS,
    misfit_of_points,
    misfit_of_trials,
    misfit_of_values,
)
from diffaccel.eval.tuning.space import Params

FILE, STUDY = "journal.log", "tuning"
_START = 12  # trials before the sampler models them


class Journal:
    """A study that minimises two numbers, cost and loss, under a constraint; and a store of measured values.

    Args:
        folder: that holds the journal; only one process may write it.
        settings: everything that decides the plan.
        metrics: that every result of a plan must have.

    Raises:
        DiffAccelError: for a journal of other settings, naming the first that differs, and one that cannot be read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], metrics: Sequence[str] = ()) -> None:
        optuna = _optuna()
        self._path = path = folder / FILE
        try:
            _mend(path)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
            self.study: Any = optuna.create_study(
                study_name=STUDY, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
            )
            self._values: dict[str, Any] = self.study.user_attrs
            trials = self.study.get_trials(deepcopy=False)
        except Exception as error:  # Optuna reads lines without checking them, and may fail in any way
            missing = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise DiffAccelError(
                f"'{path}' is no journal of a tuning, or a damaged one ({missing}). Move it away, or name another "
                "folder."
            ) from error
        before = self._values.get(SETTINGS)
        known = before if isinstance(before, dict) else settings
        if differing := next((k for k in {**known, **settings} if known.get(k) != settings.get(k)), None):
            raise DiffAccelError(
                f"'{folder}' holds a tuning with {differing} {known.get(differing)}, not {settings.get(differing)}. "
                "Repeat its command to go on, or choose another folder with --out."
            )
        if part := misfit_of_values(self._values, metrics) or misfit_of_trials(trials):
            raise self.damaged(part)
        if before is None and (self._values or trials):
            raise self.damaged(SETTINGS)
        if before is None:
            self.put(SETTINGS, settings)

    def damaged(self, part: str) -> DiffAccelError:
        """Return the error for a journal whose ``part`` is not as a tuning writes it."""
        return DiffAccelError(
            f"'{self._path}' is a damaged journal of a tuning: {part} is not as a tuning writes it. Move it away, and "
            "the same command tunes anew, or name another folder."
        )

    def get(self, key: str) -> Any:
        """Return a value that was put, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Keep a JSON-ready value, on disk when this returns, and return it."""
        self.study.set_user_attr(key, value)
        self._values[key] = value
        return value

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value that was put, or else make it and put it."""
        return self._values[key] if key in self._values else self.put(key, make())

    def spent(self) -> float:
        """Return the seconds that all measurements took."""
        return sum(v["spent"] for v in self._values.values() if isinstance(v, dict) and "spent" in v)

    def ask(
        self, bracket: int, count: int, distributions: dict[str, Any], queue: Sequence[Params], seed: int
    ) -> list[tuple[int, Params]]:
        """Return the trials of a bracket: those that it has, and new ones up to ``count``.

        Args:
            bracket: number of the bracket.
            count: trials in it.
            distributions: of the parameters.
            queue: points to take before the sampler is asked.
            seed: of the tuning.

        Returns:
            The number and the point of every trial. They depend on earlier brackets and the seed alone.
        """
        optuna = _optuna()
        running = [t for t in self.study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]
        for trial in running:
            if len(trial.params) < len(distributions) or BRACKET not in trial.user_attrs:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # it was killed as it was asked
        if part := misfit_of_points(self.study.get_trials(deepcopy=False), distributions):
            raise self.damaged(part)
        trials = self._trials_of(bracket)
        for place in range(len(trials), count):
            sampler_seed = random.Random(f"{seed} {bracket} {place}").randrange(2**31)
            self.study.sampler = optuna.samplers.TPESampler(
                seed=sampler_seed, multivariate=True, n_startup_trials=_START, constant_liar=True
            )
            if place < len(queue):  # in one line of the journal
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=optuna.trial.TrialState.RUNNING,
                        params=queue[place],
                        distributions=distributions,
                        user_attrs={BRACKET: bracket},
                    )
                )
            else:
                self.study.ask(distributions).set_user_attr(BRACKET, bracket)
            trials = self._trials_of(bracket)
        return trials

    def begun(self, bracket: int) -> bool:
        """Return whether a bracket has trials."""
        return bool(self._trials_of(bracket))

    def _trials_of(self, bracket: int) -> list[tuple[int, Params]]:
        trials = self.study.get_trials(deepcopy=False)
        return [(t.number, dict(t.params)) for t in trials if t.user_attrs.get(BRACKET) == bracket]

    def tell(self, number: int, cost: float | None, loss: float = 0.0, excess: float = 0.0) -> None:
        """Finish a trial; one that is finished stays as it is.

        Args:
            number: of the trial.
            cost: relative to the baseline; None for a plan that does not run here.
            loss: what the plan's pictures lose of the gate's tolerance.
            excess: how far it is beyond the promise; it is feasible up to 0.
        """
        optuna = _optuna()
        frozen = self.study.get_trials(deepcopy=False)[number]
        if frozen.state.is_finished():
            return
        if cost is None:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            return
        optuna.trial.Trial(self.study, frozen._trial_id).set_constraint("promise", excess)
        self.study.tell(number, (cost, loss))


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    import optuna.storages.journal

    return optuna


def _mend(path: Path) -> None:
    """Drop what a killed process left: half a line at the end of the journal, and the lock of its file."""
    with contextlib.suppress(FileNotFoundError):
        path.with_name(f"{path.name}.lock").unlink()
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
