"""A signal stops a training run between two steps; what it had learnt is kept, and it goes on to the same bits."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from diffaccel.training.stops import StopBetweenSteps


def test_a_signal_is_held_until_the_block_ends_and_a_second_one_is_not() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), StopBetweenSteps() as stop:
        while not stop.asked:
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("whole")
        steps.append("saved")
    assert steps == ["whole", "saved"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), StopBetweenSteps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was held back")


def test_an_error_goes_before_a_held_signal() -> None:
    with pytest.raises(OSError, match="disk"), StopBetweenSteps():
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError("disk")


def test_launches_threads_and_signals_that_kill_are_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen = []

    def look() -> None:
        with StopBetweenSteps():
            seen.append(signal.getsignal(signal.SIGINT))

    with StopBetweenSteps(holds=False):
        seen.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before[signal.SIGINT]] * 2
    with StopBetweenSteps():
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM] == signal.SIG_DFL
