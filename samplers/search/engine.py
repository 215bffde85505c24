"""The engine: moves of every chain of every prompt become rows of shared network calls, and rewards come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from diffaccel.samplers.search import noise
from diffaccel.samplers.search.chains import Search, Task
from diffaccel.samplers.search.particles import Lineage, Move, Particle, Pool
from diffaccel.samplers.search.processes import Processes
from diffaccel.samplers.search.reward_log import Trace
from diffaccel.samplers.search.scoring import Judge
from diffaccel.session import Eval, Progress, Session, bcast

Events = Generator[Any, Any, Any]
Asked = tuple[Search, Move]
ELEMENTS = 2**22  # of latents in one network call, where the caller sets no number of rows


class Engine:
    """Answers the moves of many chains.

    Args:
        session: the prepared call.
        judge: decodes and scores.
        trace: where rewards are kept as they come, and where those of a search that goes on are.
        processes: that work on the same search.
        rows: most rows in one network call; 0 for a number that suits the latents' size.
        overlap: score one half of the chains while the other half is predicted: for a judge on another device.
        guide: of ``x0 + guide grad r(x0)``, for a differentiable reward; 0 for none.
    """

    def __init__(
        self,
        session: Session,
        judge: Judge,
        *,
        trace: Trace | None = None,
        processes: Processes | None = None,
        rows: int = 0,
        overlap: bool = False,
        guide: float = 0.0,
    ) -> None:
        self.session, self.judge, self.guide, self.overlap = session, judge, guide, overlap
        self.trace, self.processes = trace or Trace(), processes or Processes()
        self.rows = rows or max(1, min(4096, ELEMENTS // session.x[0].numel()))
        self.pool = Pool(session.x)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._stream: Any = None
        schedule, begin = session.schedule, float(session.sigmas[0])
        scale = schedule.state_scale(torch.tensor(begin, dtype=torch.float64))
        self.own_std = float(scale) * float(getattr(session.scheduler, "init_noise_sigma", 1.0))

    def run(self, tasks: Sequence[Task]) -> Events:
        """Until every chain has ended or the user interrupts; yields events, returns whether it was interrupted."""
        searches = list(dict.fromkeys(task.search for task in tasks))
        total = sum(search.budget for search in searches)
        parts = 1 + (self.overlap and len(tasks) > 1)
        turns: deque[tuple[list[Task], Callable[[], None]]] = deque()
        for task in tasks:
            task.advance(None)
        for part in range(parts):
            turns.append((list(tasks[part::parts]), lambda: None))
        with self._worker:
            while turns:
                half, settle = turns.popleft()
                settle()
                half = [task for task in half if task.moves]
                if not half:
                    continue
                turns.append((half, (yield from self._round(half))))
                if (yield Progress(sum(search.ledger.nfe for search in searches), total)):
                    for _, settle in turns:  # what was predicted counts
                        settle()
                    return True
        return False

    def _round(self, tasks: list[Task]) -> Events:
        """Answer every task's moves, from the trace or by the network; returns what waits for the rewards."""
        answers = {task: [Particle.of(move) for move in task.moves] for task in tasks}
        known = {task: rewards for task in tasks if (rewards := self.trace.known(task)) is not None}
        new = [task for task in tasks if task not in known]
        asked = [(task.search, move) for task in new for move in task.moves]
        made = [particle for task in new for particle in answers[task]]
        coming: Callable[[], list[float]] = list
        if asked:
            coming = yield from self._answer(asked, made)
        for task in tasks:
            for move in task.moves:
                task.search.charge(move)

        def settle() -> None:
            rewards = iter(coming())
            for task, particles in answers.items():
                numbers = known.get(task) or [next(rewards) for _ in particles]
                for particle, reward in zip(particles, numbers, strict=True):
                    particle.reward = reward
                    task.search.see(particle)
                if task not in known:
                    self.trace.add(task, numbers)
                task.advance(particles)

        return settle

    def _answer(self, asked: list[Asked], made: list[Particle]) -> Events:
        """Give the particles their latents, and return what waits for their rewards."""
        yield from self._restore(asked)
        part = self.processes.part(len(asked), self.rows)
        mine = asked[part]
        x = self._states(mine)
        v = yield from self._velocities(mine, x)
        sigma = bcast(torch.tensor([move.sigma if move.predict else 0.0 for _, move in mine]), x)
        scored = [i for i, (_, move) in enumerate(mine) if move.score]
        x0 = (x - sigma * v)[scored]
        rows = [mine[i][0].row for i in scored]
        ready: Future[list[float]] = Future()
        if self.guide and scored:
            rewards, gradient = self.judge.guided(x0, rows)
            ready.set_result(rewards)
            inner = [k for k, i in enumerate(scored) if mine[i][1].predict]
            at = [scored[k] for k in inner]
            v[at] -= self.guide * gradient[inner] / sigma[at]
        elif self.overlap and scored:
            ready = self._worker.submit(self._apart(x0, rows))
        else:
            ready.set_result(self.judge(x0, rows))
        for particle, slot in zip(
            made, self.pool.put(*self.processes.gather(x, v, len(asked), self.rows)), strict=True
        ):
            particle.slot = slot

        def rewards_of_all() -> list[float]:
            found = [math.nan] * len(mine)
            for i, reward in zip(scored, ready.result(), strict=True):
                found[i] = reward
            return self.processes.gather_numbers(found, x.device, len(asked), self.rows)

        return rewards_of_all

    def _apart(self, x0: Tensor, rows: list[int]) -> Callable[[], list[float]]:
        """Scoring for another thread; on a GPU by a stream of its own, or it would wait for the next predictions."""
        if not x0.is_cuda:
            return lambda: self.judge(x0, rows)
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(x0.device))
        if self._stream is None:
            self._stream = torch.cuda.Stream(x0.device)
        stream = self._stream

        def score() -> list[float]:
            with torch.cuda.stream(stream):
                stream.wait_event(made)
                x0.record_stream(stream)
                return self.judge(x0, rows)

        return score

    def _states(self, asked: list[Asked]) -> Tensor:
        """``a x + b v + c z`` of every move, ``(R, C, H, W)``."""
        like = self.session.x
        out = like.new_empty(len(asked), *like.shape[1:])
        begun = [i for i, (_, move) in enumerate(asked) if move.parent is None]
        if begun:
            out[begun] = self._starts([asked[i] for i in begun])
        grown = [i for i, (_, move) in enumerate(asked) if move.parent is not None]
        if not grown:
            return out
        moves = [asked[i][1] for i in grown]
        x, v = self.pool.get([move.parent.slot for move in moves])  # type: ignore[misc,union-attr]
        a, b, c = (bcast(torch.tensor(column), x) for column in zip(*(m.coefficients for m in moves), strict=True))
        state = a * x + b * v
        if any(move.coefficients.c for move in moves):
            keys = [(asked[i][0].seed, asked[i][1].key) for i in grown]
            state += c * noise.normal(keys, like.shape[1:], like)
        if len(grown) == len(asked):
            return state
        out[grown] = state
        return out

    def _starts(self, asked: list[Asked]) -> Tensor:
        """First states: the call's own latents for the first, noise for the others."""
        like, start = self.session.x, asked[0][0].plan.start
        fresh = [(search.seed, move.key) for search, move in asked]
        unit = noise.normal(fresh, like.shape[1:], like) * self.own_std
        own = [i for i, (_, move) in enumerate(asked) if move.key.chain == move.key.attempt == 0]
        unit[own] = like[[asked[i][0].row for i in own]]
        return unit if start is None else unit * (start / self.own_std)

    def _velocities(self, asked: list[Asked], x: Tensor) -> Events:
        """What is predicted at every state; zero where nothing is asked."""
        v = torch.zeros_like(x)
        places = [i for i, (_, move) in enumerate(asked) if move.predict]
        for begin in range(0, len(places), self.rows):
            here = places[begin : begin + self.rows]
            levels = [asked[i][1].sigma for i in here]
            sigma = torch.tensor(levels[0] if len(set(levels)) == 1 else levels)
            whole = len(here) == len(x)
            pred = yield Eval(x if whole else x[here], sigma, rows=[asked[i][0].row for i in here])
            if whole:
                return pred.v.to(x.dtype)
            v[here] = pred.v.to(x.dtype)
        return v

    # -- a search that goes on -------------------------------------------------------------------------------------

    def _restore(self, asked: list[Asked]) -> Events:
        """Compute again the latents of parents that only the trace knows of."""
        yield from self._compute([(search, move.parent) for search, move in asked if move.parent is not None])

    def latents(self, of: Sequence[tuple[Search, Particle]]) -> Events:
        """``x0`` of particles, ``(R, C, H, W)``; of samples, the samples."""
        yield from self._compute(of)
        x, v = self.pool.get([particle.slot for _, particle in of])  # type: ignore[misc]
        return x - bcast(torch.tensor([0.0 if p.end else p.sigma for _, p in of]), x) * v

    def _compute(self, of: Sequence[tuple[Search, Particle]]) -> Events:
        """Give latents to those that have none, from the first state of each on."""
        lost = {particle: search for search, particle in of if particle.slot is None}
        if not lost:
            return
        again: dict[Lineage, Particle] = {}
        ways = [(search, particle, _from_start(particle.lineage)) for particle, search in lost.items()]
        for depth in range(max(len(way) for _, _, way in ways)):
            todo = {way[depth]: search for search, _, way in ways if depth < len(way) and way[depth] not in again}
            moves = [(search, self._again(step, again)) for step, search in todo.items()]
            made = [Particle.of(move) for _, move in moves]
            yield from self._answer(moves, made)
            again.update(zip(todo, made, strict=True))
            for search, _ in moves:
                search.ledger.nfe_recomputed += 1  # of ends too, which cost nothing: they are few
        for _, particle, way in ways:
            particle.slot = again[way[-1]].slot

    def _again(self, step: Lineage, again: dict[Lineage, Particle]) -> Move:
        """The move that a step of a lineage was; it is scored only where its gradient guided it."""
        parent = None if step.parent is None else again[step.parent]
        score = bool(self.guide) and step.score
        return Move(parent, step.sigma, step.coefficients, step.key, step.stage, score, step.predict)


def _from_start(lineage: Lineage | None) -> list[Lineage]:
    steps = []
    while lineage is not None:
        steps.append(lineage)
        lineage = lineage.parent
    return steps[::-1]
