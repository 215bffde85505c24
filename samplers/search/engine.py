"""The engine: transitions of every chain of every prompt become rows of shared network calls, and rewards come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import RunningChain, Search
from diffaccel.samplers.search.particles import Lineage, Particle, Pool, Transition
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog
from diffaccel.samplers.search.scoring import PictureScorer
from diffaccel.session import Eval, Progress, Session, bcast

Events = Generator[Any, Any, Any]
Row = tuple[Search, Transition]  # one row of a round: a transition, and the search that asks for it
MAX_ELEMENTS = 2**22  # of latents in one network call, where the caller does not limit its rows


class Engine:
    """Answers the transitions of many chains.

    Args:
        session: the prepared call.
        scorer: decodes and scores clean latents.
        reward_log: where rewards are stored as they come, and replayed from when a search is resumed.
        processes: the processes that share the search.
        rows: maximum number of rows in one network call; 0 for one that suits the latents' size.
        overlap: score one half of the chains while the other half is predicted, for a scorer on another device.
        guide: factor of ``x0 + guide grad r(x0)``, for a differentiable reward; 0 for none.
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
    ) -> None:
        self.session, self.scorer, self.guide, self.overlap = session, scorer, guide, overlap
        self.reward_log, self.processes = reward_log or RewardLog(), processes or SearchProcesses()
        self.rows = rows or max(1, min(4096, MAX_ELEMENTS // session.x[0].numel()))
        self.pool = Pool(session.x)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._stream: Any = None
        schedule, begin = session.schedule, float(session.sigmas[0])
        scale = schedule.state_scale(torch.tensor(begin, dtype=torch.float64, device="cpu"))
        self.initial_std = float(scale) * float(getattr(session.scheduler, "init_noise_sigma", 1.0))

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
                running = [chain for chain in running if chain.transitions]
                if not running:
                    continue
                turns.append((running, (yield from self._round(running))))
                if (yield Progress(sum(search.ledger.nfe for search in searches), total)):
                    for _, settle in turns:  # what is predicted already still counts
                        settle()
                    return True
        return False

    def _round(self, chains: list[RunningChain]) -> Events:
        """Answer every chain's transitions, from the log or by the network.

        Returns:
            A function that waits for the rewards and advances the chains.
        """
        particles = {chain: [Particle.from_transition(t) for t in chain.transitions] for chain in chains}
        replayed = {chain: rewards for chain in chains if (rewards := self.reward_log.replay(chain)) is not None}
        fresh = [chain for chain in chains if chain not in replayed]
        rows = [(chain.search, transition) for chain in fresh for transition in chain.transitions]
        wait: Callable[[], list[float]] = list
        if rows:
            wait = yield from self._answer(rows, [particle for chain in fresh for particle in particles[chain]])
        for chain in chains:
            for transition in chain.transitions:
                chain.search.charge(transition)

        def settle() -> None:
            computed = iter(wait())
            for chain, states in particles.items():
                rewards = replayed.get(chain) or [next(computed) for _ in states]
                for particle, reward in zip(states, rewards, strict=True):
                    particle.reward = reward
                    chain.search.observe(particle)
                if chain not in replayed:
                    self.reward_log.append(chain, rewards)
                chain.advance(states)

        return settle

    def _answer(self, rows: list[Row], particles: list[Particle]) -> Events:
        """Compute the latents of each row's particle, and start scoring them.

        Returns:
            A function that waits for the rewards of all rows; NaN for those that are not scored.
        """
        yield from self._restore_parents(rows)
        own = rows[self.processes.part(len(rows), self.rows)]
        x = self._states(own)
        v = yield from self._velocities(own, x)
        scored = [i for i, (_, transition) in enumerate(own) if transition.score]
        ready = self._score(own, scored, x, v)
        slots = self.pool.put(*self.processes.gather(x, v, len(rows), self.rows))
        for particle, slot in zip(particles, slots, strict=True):
            particle.slot = slot

        def wait() -> list[float]:
            rewards = [math.nan] * len(own)
            for i, reward in zip(scored, ready.result(), strict=True):
                rewards[i] = reward
            return self.processes.gather_numbers(rewards, x.device, len(rows), self.rows)

        return wait

    def _score(self, rows: list[Row], scored: list[int], x: Tensor, v: Tensor) -> Future[list[float]]:
        """Score ``x0`` of the rows ``scored``; under guidance, add the reward's gradient to their ``v`` in place."""
        sigma = bcast(_levels([transition.sigma if transition.predict else 0.0 for _, transition in rows]), x)
        x0 = (x - sigma * v)[scored]
        call_rows = [rows[i][0].row for i in scored]
        ready: Future[list[float]] = Future()
        if self.guide and scored:
            rewards, gradient = self.scorer.guided(x0, call_rows)
            ready.set_result(rewards)
            predicted = [k for k, i in enumerate(scored) if rows[i][1].predict]
            places = [scored[k] for k in predicted]
            v[places] -= self.guide * gradient[predicted] / sigma[places]
        elif self.overlap and scored:
            ready = self._worker.submit(self._deferred_scoring(x0, call_rows))
        else:
            ready.set_result(self.scorer(x0, call_rows))
        return ready

    def _deferred_scoring(self, x0: Tensor, rows: list[int]) -> Callable[[], list[float]]:
        """Return the scoring as a function for another thread.

        On a GPU it runs in its own stream; in the default one it would wait for the next predictions.
        """
        if not x0.is_cuda:
            return lambda: self.scorer(x0, rows)
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(x0.device))
        if self._stream is None:
            self._stream = torch.cuda.Stream(x0.device)
        stream = self._stream

        def score() -> list[float]:
            with torch.cuda.stream(stream):
                stream.wait_event(computed)
                x0.record_stream(stream)
                return self.scorer(x0, rows)

        return score

    def _states(self, rows: list[Row]) -> Tensor:
        """Compute ``a x + b v + c z`` of every row, ``(R, C, H, W)``."""
        like = self.session.x
        out = like.new_empty(len(rows), *like.shape[1:])
        starts = [i for i, (_, transition) in enumerate(rows) if transition.parent is None]
        if starts:
            out[starts] = self._starts([rows[i] for i in starts])
        children = [i for i, (_, transition) in enumerate(rows) if transition.parent is not None]
        if not children:
            return out
        transitions = [rows[i][1] for i in children]
        x, v = self.pool.get([transition.parent.slot for transition in transitions])  # type: ignore[misc,union-attr]
        columns = zip(*(transition.coefficients for transition in transitions), strict=True)
        a, b, c = (bcast(_levels(column), x) for column in columns)
        state = a * x + b * v
        if any(transition.coefficients.c for transition in transitions):
            keys = [(rows[i][0].seed, rows[i][1].key) for i in children]
            state += c * noise.normal(keys, like.shape[1:], like)
        if len(children) == len(rows):
            return state
        out[children] = state
        return out

    def _starts(self, rows: list[Row]) -> Tensor:
        """Make first states: the call's own latents for the first attempt of chain 0, noise for the others."""
        like, start = self.session.x, rows[0][0].plan.start
        keys = [(search.seed, transition.key) for search, transition in rows]
        state = noise.normal(keys, like.shape[1:], like) * self.initial_std
        own = [i for i, (_, transition) in enumerate(rows) if transition.key.chain == transition.key.attempt == 0]
        state[own] = like[[rows[i][0].row for i in own]]
        return state if start is None else state * (start / self.initial_std)

    def _velocities(self, rows: list[Row], x: Tensor) -> Events:
        """Predict ``v`` at the states ``x``; it is zero for rows without a prediction."""
        v = torch.zeros_like(x)
        places = [i for i, (_, transition) in enumerate(rows) if transition.predict]
        for begin in range(0, len(places), self.rows):
            batch = places[begin : begin + self.rows]
            levels = [rows[i][1].sigma for i in batch]
            sigma = _levels(levels[0] if len(set(levels)) == 1 else levels)
            whole = len(batch) == len(x)
            pred = yield Eval(x if whole else x[batch], sigma, rows=[rows[i][0].row for i in batch])
            if whole:
                return pred.v.to(x.dtype)
            v[batch] = pred.v.to(x.dtype)
        return v

    # -- a search that is resumed ------------------------------------------------------------------------------------

    def _restore_parents(self, rows: list[Row]) -> Events:
        """Compute again the latents of parents that are known from the log only."""
        parents = [(search, transition.parent) for search, transition in rows if transition.parent is not None]
        yield from self._recompute(parents)

    def latents(self, particles: Sequence[tuple[Search, Particle]]) -> Events:
        """Return ``x0`` of particles, ``(R, C, H, W)``; of samples, the samples themselves."""
        yield from self._recompute(particles)
        x, v = self.pool.get([particle.slot for _, particle in particles])  # type: ignore[misc]
        return x - bcast(_levels([0.0 if p.end else p.sigma for _, p in particles]), x) * v

    def _recompute(self, particles: Sequence[tuple[Search, Particle]]) -> Events:
        """Give latents to the particles that have none, walking the lineage of each from its first state."""
        missing = {particle: search for search, particle in particles if particle.slot is None}
        if not missing:
            return
        restored: dict[Lineage, Particle] = {}
        ways = [(search, particle, _from_start(particle.lineage)) for particle, search in missing.items()]
        for depth in range(max(len(way) for _, _, way in ways)):
            steps = {way[depth]: search for search, _, way in ways if depth < len(way) and way[depth] not in restored}
            rows = [(search, self._transition_of(step, restored)) for step, search in steps.items()]
            states = [Particle.from_transition(transition) for _, transition in rows]
            yield from self._answer(rows, states)
            restored.update(zip(steps, states, strict=True))
            for search, _ in rows:
                search.ledger.nfe_recomputed += 1  # also for ends, which need no prediction: they are few
        for _, particle, way in ways:
            particle.slot = restored[way[-1]].slot

    def _transition_of(self, step: Lineage, restored: dict[Lineage, Particle]) -> Transition:
        """Rebuild the transition of one step of a lineage; it is scored only where the reward's gradient guided it."""
        parent = None if step.parent is None else restored[step.parent]
        score = bool(self.guide) and step.score
        return Transition(parent, step.sigma, step.coefficients, step.key, step.stage, score, step.predict)


def _from_start(lineage: Lineage | None) -> list[Lineage]:
    """Return the steps of a lineage in order, the first state first."""
    steps = []
    while lineage is not None:
        steps.append(lineage)
        lineage = lineage.parent
    return steps[::-1]


def _levels(numbers: float | Sequence[float]) -> Tensor:
    """Return noise levels or coefficients in fp32 on the CPU, whatever torch's defaults are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
