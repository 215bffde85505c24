"""The engine: transitions of every chain of every prompt become rows of shared network calls, and rewards come back."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from diffaccel.samplers.search.chains import RunningChain, Search
from diffaccel.samplers.search.particles import Particle, Pool, Slot, Transition
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog, numbers
from diffaccel.samplers.search.scoring import PictureScorer
from diffaccel.samplers.search.states import FirstStates, Row, StateMaker, levels
from diffaccel.samplers.search.stream_places import StreamPlaces
from diffaccel.samplers.search.watching import best_so_far, note_of
from diffaccel.session import Eval, Progress, Session, bcast

Events = Generator[Any, Any, Any]
MAX_ELEMENTS = 2**22  # of latents in one network call, where the caller does not limit its rows
STORING_SHARE = 0.05  # of a search's time, at most, that goes into storing latents for a resumed one


class Engine:
    """Answers the transitions of many chains.

    Args:
        session: the prepared call.
        scorer: decodes and scores clean latents.
        reward_log: where rewards are stored as they come, and replayed from when a search is resumed.
        processes: the processes that share the search.
        rows: maximum number of rows in one network call; 0 for one that suits the latents' size.
        overlap: score one half of the chains while the other half is predicted, for a scorer on another device.
        guide: factor of ``x0 + guide grad r(x0)`` at every prediction, for a differentiable reward; 0 for none.
        temperature: of ``p(x0) exp(r(x0) / temperature)``, which the particles are weighed to follow; None where they
            only climb. Guidance then twists the kernels ``p(x' | x) = N(m, c^2)`` to ``q(x' | x) = N(m + guide c^2
            alpha' / (alpha'^2 + sigma'^2) grad r(x0) / temperature, c^2)``, which is the best to first order for data
            of unit variance and ``guide = 1``, and each particle is told ``log p / q``. Predictions, and transitions
            without noise, stay as they are.
        first: where first states come from, and the region of an image that is kept in all; None for pure noise.
        watched: whether the pipeline's callback sees the best so far after every round.

    Attributes:
        nfe_before: predictions of this process that an earlier one of the same search made, and this one need not.
    """

    def __init__(
        self,
        session: Session,
        scorer: PictureScorer,
        *,
        reward_log: RewardLog | None = None,
        processes: SearchProcesses | None = None,
        rows: int = 0,
        overlap: bool = False,
        guide: float = 0.0,
        temperature: float | None = None,
        first: FirstStates | None = None,
        watched: bool = False,
    ) -> None:
        self.session, self.scorer, self.guide, self.overlap = session, scorer, guide, overlap
        self.watched = watched
        self.reward_log, self.processes = reward_log or RewardLog(), processes or SearchProcesses()
        self.rows = rows or max(1, min(4096, MAX_ELEMENTS // session.x[0].numel()))
        self.weighed = temperature is not None and guide > 0
        first = first or FirstStates(session)
        self.kept = first.kept
        self.pool = Pool(session.x, 2 + self.weighed + (self.kept is not None))
        self.states = StateMaker(first, self.pool, guide / (temperature or 1.0) if self.weighed else None)
        self.nfe_before = 0
        self._numbers = itertools.count()
        self._first_numbers: list[int] = []  # of the particles of every round that has begun
        self._settled = self._stored = 0  # rounds whose rewards are known, and those whose latents are stored
        self._storing_seconds, self._stored_at = 0.0, time.perf_counter()
        self._living: WeakValueDictionary[int, Slot] = WeakValueDictionary()
        self._restored = self._restore()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._stream: Any = None
        self._places = StreamPlaces() if session.beside else None

    def run(self, chains: Sequence[RunningChain]) -> Events:
        """Run until every chain has ended or the user interrupts; yield events, return whether it was interrupted."""
        searches = list(dict.fromkeys(chain.search for chain in chains))
        total = sum(search.budget for search in searches)
        halves = 1 + (self.overlap and len(chains) > 1)
        turns: deque[tuple[list[RunningChain], Callable[[], None]]] = deque()
        for chain in chains:
            chain.advance(None)
        for half in range(halves):
            turns.append((list(chains[half::halves]), lambda: None))
        with self._worker:
            while turns:
                running, settle = turns.popleft()
                settle()
                del settle  # and with it the particles that nothing starts from any more
                self._store()
                running = [chain for chain in running if chain.transitions]
                if not running:
                    continue
                turns.append((running, (yield from self._round(running))))
                done = sum(search.ledger.nfe for search in searches)
                if (yield Progress(done, total, self._shown(searches), note_of(searches))):
                    for _, settle in turns:  # what is predicted already still counts
                        settle()
                    return True
        return False

    def _round(self, chains: list[RunningChain]) -> Events:
        """Answer every chain's transitions, from the log or by the network.

        Returns:
            A function that waits for the rewards and advances the chains.
        """
        number = len(self._first_numbers)
        particles = {chain: [self._particle(transition) for transition in chain.transitions] for chain in chains}
        self._first_numbers.append(next(iter(particles.values()))[0].number)
        answers = self.reward_log.replay(number, chains)
        wait: Callable[[], list[float]] = list
        rows = [(chain.search, transition) for chain in chains for transition in chain.transitions]
        if answers is not None and number < self._stored:  # its latents are known, or not needed any more
            own = rows[self.processes.part(len(rows), self.rows)]
            self.nfe_before += sum(transition.predict for _, transition in own)
        else:
            states = [particle for chain in chains for particle in particles[chain]]
            wait = yield from self._answer(rows, states, score=answers is None)
        for chain in chains:
            for transition in chain.transitions:
                chain.search.charge(transition, guided=self.guide > 0)

        def settle() -> None:
            rewards = wait()
            if answers is None:
                for particle, reward in zip(itertools.chain(*particles.values()), rewards, strict=True):
                    particle.reward = reward
                self.reward_log.append(particles, guided=self.weighed)
            else:
                _replay(particles, answers)
            self._settled += 1
            for chain, states in particles.items():
                for particle in states:
                    chain.search.observe(particle)
                chain.advance(states)

        return settle

    def _shown(self, searches: Sequence[Search]) -> Callable[[], dict[str, Any] | None] | None:
        """Return what makes the best so far for a callback; None of it where a search has none, or not its latents."""
        if not self.watched:
            return None

        return lambda: best_so_far(searches, self.latents, self.scorer)

    def _particle(self, transition: Transition) -> Particle:
        particle = Particle.from_transition(transition, next(self._numbers))
        particle.slot = self._restored.pop(particle.number, None)
        return particle

    def _answer(self, rows: list[Row], particles: list[Particle], *, score: bool = True) -> Events:
        """Compute the latents of each row's particle, and start scoring them unless ``score`` is False.

        Returns:
            A function that waits for the rewards of all rows; NaN for those that are not scored.
        """
        own = rows[self.processes.part(len(rows), self.rows)]
        x, eps, log_ratios = self.states.make(own)
        v = yield from self._velocities(own, x)
        scored = [i for i, (_, transition) in enumerate(own) if transition.score and score]
        if self.guide:  # scored again where the reward is known: its gradient is not
            latents, ready, scored = self._guided(own, x, v)
        else:
            latents, ready = [x, v], self._score(own, scored, x, v)
        latents = latents if eps is None else [*latents, eps]
        slots = self.pool.put(*self.processes.gather(latents, len(rows), self.rows))
        if self.weighed:
            log_ratios = self.processes.gather_numbers(log_ratios, x.device, len(rows), self.rows)
            for particle, log_ratio in zip(particles, log_ratios, strict=True):
                particle.log_ratio = log_ratio
        for particle, slot in zip(particles, slots, strict=True):
            particle.slot = self._living[particle.number] = slot

        def wait() -> list[float]:
            rewards = [math.nan] * len(own)
            for i, reward in zip(scored, ready.result(), strict=True):
                rewards[i] = reward
            return self.processes.gather_numbers(rewards, x.device, len(rows), self.rows)

        return wait

    def _x0(self, rows: list[Row], x: Tensor, v: Tensor) -> Tensor:
        """Return the clean latents of each row, the kept region in them; of one without a prediction, ``x`` itself."""
        sigmas = [transition.sigma if transition.predict else 0.0 for _, transition in rows]
        return self._clean(x, v, sigmas, [search.row for search, _ in rows])

    def _clean(self, x: Tensor, v: Tensor, sigmas: list[float], rows: list[int]) -> Tensor:
        """Return ``x - sigma v`` with the kept region in it; samples, whose sigma is 0, have it already."""
        x0 = x - bcast(levels(sigmas), x) * v
        places = [i for i, sigma in enumerate(sigmas) if sigma > 0]
        if self.kept is not None and places:
            zero = levels(0.0)
            x0[places] = self.kept.put_back(x0[places], zero, None, [rows[i] for i in places])
        return x0

    def _score(self, rows: list[Row], scored: list[int], x: Tensor, v: Tensor) -> Future[list[float]]:
        """Score ``x0`` of the rows ``scored``."""
        x0, call_rows = self._x0(rows, x, v)[scored], [rows[i][0].row for i in scored]
        ends = [rows[i][1].end for i in scored]
        if self.overlap and scored:
            return self._worker.submit(self._deferred_scoring(x0, call_rows, ends))
        return _known(self.scorer(x0, call_rows, ends))

    def _guided(self, rows: list[Row], x: Tensor, v: Tensor) -> tuple[list[Tensor], Future[list[float]], list[int]]:
        """Score ``x0`` of all rows that are predicted or scored, and guide the predictions by the gradients.

        Returns:
            What the pool stores, the rewards, and which rows they are of.
        """
        looked = [i for i, (_, transition) in enumerate(rows) if transition.score or transition.predict]
        gradients = torch.zeros_like(v)
        rewards: list[float] = []
        if looked:
            rewards, gradients[looked] = self.scorer.guided(
                self._x0(rows, x, v)[looked], [rows[i][0].row for i in looked]
            )
        scored = [(i, reward) for i, reward in zip(looked, rewards, strict=True) if rows[i][1].score]
        ready = _known([reward for _, reward in scored]), [i for i, _ in scored]
        if self.weighed:
            return [x, v, gradients], *ready
        per_sigma = levels([1 / transition.sigma if transition.predict else 0.0 for _, transition in rows])
        return [x, v - self.guide * bcast(per_sigma, x) * gradients], *ready

    def _deferred_scoring(self, x0: Tensor, rows: list[int], ends: list[bool]) -> Callable[[], list[float]]:
        """Return the scoring as a function for another thread.

        On a GPU it runs in its own stream; in the default one it would wait for the next predictions.
        """
        if not x0.is_cuda:
            return lambda: self.scorer(x0, rows, ends)
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(x0.device))
        if self._stream is None:
            self._stream = torch.cuda.Stream(x0.device)
        stream = self._stream

        def score() -> list[float]:
            with torch.cuda.stream(stream):
                stream.wait_event(computed)
                x0.record_stream(stream)
                return self.scorer(x0, rows, ends)

        return score

    def _velocities(self, rows: list[Row], x: Tensor) -> Events:
        """Predict ``v`` at the states ``x``; it is zero for rows without a prediction."""
        v = torch.zeros_like(x)
        places = [i for i, (_, transition) in enumerate(rows) if transition.predict]
        for begin in range(0, len(places), self.rows):
            batch = places[begin : begin + self.rows]
            sigmas = [rows[i][1].sigma for i in batch]
            sigma = levels(sigmas[0] if len(set(sigmas)) == 1 else sigmas)
            whole = len(batch) == len(x)
            place = None if self._places is None else self._places.of([rows[i] for i in batch])
            with self.scorer.watch.part("network"):
                pred = yield Eval(x if whole else x[batch], sigma, rows=[rows[i][0].row for i in batch], place=place)
            if whole:
                return pred.v.to(x.dtype)
            v[batch] = pred.v.to(x.dtype)
        return v

    # -- a search that is resumed ------------------------------------------------------------------------------------

    def latents(self, particles: Sequence[tuple[Search, Particle]]) -> Tensor:
        """Return ``x0`` of particles, ``(R, C, H, W)``; of samples, the samples themselves."""
        x, v, *_ = self.pool.get([particle.slot for _, particle in particles])  # type: ignore[misc]
        return self._clean(x, v, [0.0 if p.end else p.sigma for _, p in particles], [s.row for s, _ in particles])

    def _restore(self) -> dict[int, Slot]:
        """Take over the latents that are stored beside the log: a slot by the number of its particle."""
        stored = self.reward_log.latents
        if stored is None or len(stored.tensors) != len(self.pool.tensors):
            return {}
        if any(tensor.shape[1:] != self.session.x.shape[1:] for tensor in stored.tensors):
            return {}
        self._stored = stored.rounds
        slots = self.pool.put(*(tensor.to(self.session.x) for tensor in stored.tensors)) if stored.numbers else []
        restored = dict(zip(stored.numbers, slots, strict=True))
        self._living.update(restored)
        return restored

    def _store(self) -> None:
        """Store the latents of all living particles, as often as that takes a small share of the time."""
        if self._places is not None:  # a cache would go on from latents without its history: samples are drawn again
            return
        if self.reward_log.file is None or self._settled <= self._stored or self._settled < len(self.reward_log.rounds):
            return
        begin = time.perf_counter()
        if self._storing_seconds >= STORING_SHARE * (begin - self._stored_at):
            return
        begun = self._first_numbers[self._settled :]  # rounds that will be made again
        self._store_particles([number for number in self._living if not begun or number < begun[0]])
        self._stored_at = time.perf_counter()
        self._storing_seconds = self._stored_at - begin

    def store_results(self, particles: Sequence[Particle], keep: int) -> None:
        """Store the latents of the samples that a search has ended with, and no others."""
        self._store_particles([particle.number for particle in particles], keep)

    def _store_particles(self, chosen: list[int], keep: int | None = None) -> None:
        if not self.reward_log.writes:
            return
        chosen = sorted(chosen)
        self._stored = self._settled
        tensors = [tensor.cpu() for tensor in self.pool.get([self._living[number] for number in chosen])]
        self.reward_log.store(self._settled, chosen, tensors, keep)


def _replay(particles: dict[RunningChain, list[Particle]], answers: list[dict[str, Any]]) -> None:
    """Give the particles of a round the rewards and ratios that the log has of it."""
    for states, answer in zip(particles.values(), answers, strict=True):
        for particle, reward in zip(states, numbers(answer["rewards"]), strict=True):
            particle.reward = reward
        for particle, log_ratio in zip(states, numbers(answer.get("log_ratios", [])), strict=False):
            particle.log_ratio = log_ratio


def _known(rewards: list[float]) -> Future[list[float]]:
    ready: Future[list[float]] = Future()
    ready.set_result(rewards)
    return ready
