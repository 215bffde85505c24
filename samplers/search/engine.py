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

from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import RunningChain, Search
from diffaccel.samplers.search.particles import Particle, Pool, Slot, Transition
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog, numbers
from diffaccel.samplers.search.scoring import PictureScorer
from diffaccel.samplers.search.stream_places import StreamPlaces
from diffaccel.samplers.search.watching import best_so_far, note_of
from diffaccel.session import Eval, Progress, Session, bcast

Events = Generator[Any, Any, Any]
Row = tuple[Search, Transition]  # one row of a round: a transition, and the search that asks for it
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
        image: clean latents of every row that first states are noise on; None for pure noise.
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
        image: Tensor | None = None,
        watched: bool = False,
    ) -> None:
        self.session, self.scorer, self.guide, self.overlap = session, scorer, guide, overlap
        self.image, self.watched = image, watched
        self.reward_log, self.processes = reward_log or RewardLog(), processes or SearchProcesses()
        self.rows = rows or max(1, min(4096, MAX_ELEMENTS // session.x[0].numel()))
        self.weighed = temperature is not None and guide > 0
        self.twist = guide / (temperature or 1.0)
        self.pool = Pool(session.x, 2 + self.weighed)
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
        self.initial_std = noise.initial_std(session)

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
        x, log_ratios = self._states(own)
        v = yield from self._velocities(own, x)
        scored = [i for i, (_, transition) in enumerate(own) if transition.score and score]
        if self.guide:  # scored again where the reward is known: its gradient is not
            latents, ready, scored = self._guided(own, x, v)
        else:
            latents, ready = [x, v], self._score(own, scored, x, v)
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
        """Return the clean latents of each row; of one without a prediction, ``x`` itself."""
        return x - bcast(_levels([transition.sigma if transition.predict else 0.0 for _, transition in rows]), x) * v

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
        per_sigma = _levels([1 / transition.sigma if transition.predict else 0.0 for _, transition in rows])
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

    def _states(self, rows: list[Row]) -> tuple[Tensor, list[float]]:
        """Compute ``a x + b v + c z`` of every row, ``(R, C, H, W)``, and its ``log p / q`` under guidance."""
        like = self.session.x
        out, log_ratios = like.new_empty(len(rows), *like.shape[1:]), [0.0] * len(rows)
        starts = [i for i, (_, transition) in enumerate(rows) if transition.parent is None]
        if starts:
            out[starts] = self._starts([rows[i] for i in starts])
        children = [i for i, (_, transition) in enumerate(rows) if transition.parent is not None]
        if not children:
            return out, log_ratios
        transitions = [rows[i][1] for i in children]
        x, v, *gradients = self.pool.get([transition.parent.slot for transition in transitions])  # type: ignore[misc,union-attr]
        columns = zip(*(transition.coefficients for transition in transitions), strict=True)
        a, b, c = (bcast(_levels(column), x) for column in columns)
        state = a * x + b * v
        if any(transition.coefficients.c for transition in transitions):
            keys = [(rows[i][0].seed, rows[i][1].key) for i in children]
            z = noise.normal(keys, like.shape[1:], like)
            state += c * z
            if gradients:
                shift = self._twist(transitions, c, gradients[0])
                state += shift
                for i, log_ratio in zip(children, _log_ratios(shift, c, z), strict=True):
                    log_ratios[i] = log_ratio
        if len(children) == len(rows):
            return state, log_ratios
        out[children] = state
        return out, log_ratios

    def _twist(self, transitions: list[Transition], c: Tensor, gradients: Tensor) -> Tensor:
        """Return by how much guidance moves the mean of each transition; by nothing where it has no noise."""
        path = self.session.path
        alphas = [float(path.alpha(transition.sigma)) for transition in transitions]
        slopes = [a / (a * a + t.sigma**2) for a, t in zip(alphas, transitions, strict=True)]
        return self.twist * bcast(_levels(slopes), gradients) * c * c * gradients

    def _starts(self, rows: list[Row]) -> Tensor:
        """Make first states: the call's own latents for the first attempt of chain 0, fresh noise for the others.

        Those of a call that begins at an image are ``alpha x0 + sigma eps`` of the image.
        """
        like, start, path = self.session.x, rows[0][0].plan.start, self.session.path
        keys = [(search.seed, transition.key) for search, transition in rows]
        state = noise.normal(keys, like.shape[1:], like)
        if self.image is None:
            state = state * self.initial_std
        else:
            begin = self.session.sigmas[0]
            state = path.alpha(begin) * self.image[[search.row for search, _ in rows]] + path.sigma(begin) * state
        own = [i for i, (_, transition) in enumerate(rows) if transition.key.chain == transition.key.attempt == 0]
        state[own] = like[[rows[i][0].row for i in own]]
        return state if start is None or self.image is not None else state * (start / self.initial_std)

    def _velocities(self, rows: list[Row], x: Tensor) -> Events:
        """Predict ``v`` at the states ``x``; it is zero for rows without a prediction."""
        v = torch.zeros_like(x)
        places = [i for i, (_, transition) in enumerate(rows) if transition.predict]
        for begin in range(0, len(places), self.rows):
            batch = places[begin : begin + self.rows]
            levels = [rows[i][1].sigma for i in batch]
            sigma = _levels(levels[0] if len(set(levels)) == 1 else levels)
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
        return x - bcast(_levels([0.0 if p.end else p.sigma for _, p in particles]), x) * v

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


def _log_ratios(shift: Tensor, c: Tensor, z: Tensor) -> list[float]:
    """Return ``log N(x'; m, c^2) / N(x'; m + shift, c^2)`` of every row, for ``x' = m + shift + c z``."""
    ratio = torch.where(c > 0, shift / c, 0.0).double()
    return (-0.5 * ratio * ratio - ratio * z).flatten(1).sum(1).tolist()


def _levels(numbers: float | Sequence[float]) -> Tensor:
    """Return noise levels or coefficients in fp32 on the CPU, whatever torch's defaults are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
