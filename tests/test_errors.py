"""Messages of errors: long values are cut, what is wrong and the fix stay."""

from __future__ import annotations

import pickle

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.runs.folder import RunFailed


def test_a_long_value_is_not_echoed_whole() -> None:
    message = str(DiffAccelError(f"The name '{'a' * 100_000}' is unknown. Choose another."))
    assert len(message) < 1500
    assert message.startswith("The name 'aaa") and message.endswith("' is unknown. Choose another.")
    assert " more characters) ... " in message
    short = "b" * 2000
    assert str(RunFailed(short)) == short


def test_an_unknown_name_leaves_the_known_ones_readable() -> None:
    message = str(unknown("method", "x" * 100_000, ["euler", "heun"]))
    assert len(message) < 300 and message.endswith("Known: euler, heun.")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RunFailed("z" * 5000)))
    assert isinstance(error, RunFailed) and str(error) == str(RunFailed("z" * 5000))
