"""One block of a network while it is solved: its statistics, its candidates, the choice."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from compress_jax.core._leafwise import check_finite
from compress_jax.core.compression import CompressionState
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaf, Leaves
from compress_jax.layerwise._candidates import (
    NEAREST,
    Candidate,
    Judged,
    compensated,
    judged,
    relative_error,
)
from compress_jax.layerwise._checkpoint import Solved
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.layerwise._programs import DIFFERENCES, BlockProgram, Numbers, Values, added
from compress_jax.layerwise._restrict import Restricted
from compress_jax.layerwise._result import Measured, Rewritten
from compress_jax.trace import Calibration

Tasks: TypeAlias = Mapping[str, tuple[Problem, ...]]
Judges: TypeAlias = Mapping[str, list[Judged]]
ByName: TypeAlias = dict[str, Calibration]


class Options(NamedTuple):
    """How blocks are solved.

    Attributes:
      candidates: beside rounding to nearest.
      judging: how many batches are held out.
      refit: whether to solve again from all batches.
      compensate: the share of earlier errors that is made up for.
    """

    candidates: Sequence[Candidate]
    judging: int
    refit: bool
    compensate: float


class Statistics(NamedTuple):
    """What is known of a block's inputs, by the name of a weighting.

    Attributes:
      seen: what candidates are made from.
      judges: what they are judged by.
      cross: of the former; see `_programs.DIFFERENCES`. Empty without compensation.
      judging_cross: of the latter.
    """

    seen: dict[str, Calibration]
    judges: dict[str, Calibration]
    cross: dict[str, Calibration]
    judging_cross: dict[str, Calibration]


class Found(NamedTuple):
    """A solution of one leaf.

    Attributes:
      candidate: what it was found by; None for rounding to nearest.
      leaf: the new values.
      error: on held-out batches, see `relative_error`.
      result: what the candidate said of all leaves.
      note: what was out of the ordinary in the choice.
    """

    candidate: Candidate | None
    leaf: Leaf
    error: float
    result: Rewritten | None = None
    note: str = ""


class Block:
    """One block.

    Args:
      restricted: the compression.
      state: of the compression.
      options: how to solve.
      program: the block's.
      own: the paths to be solved.
    """

    def __init__(
        self,
        restricted: Restricted,
        state: CompressionState,
        options: Options,
        program: BlockProgram,
        own: Sequence[str],
    ) -> None:
        """Start."""
        self.restricted = restricted
        self.state = state
        self.options = options
        self.program = program
        self.own = {path: restricted.leaves[path] for path in own}
        self.first = next(iter(program.compiled.reducers))  # what candidates are judged by

    def solve(self, leaves: Leaves, values: Sequence[Values], exact: Sequence[Values]) -> Solved:
        """Choose each leaf's candidate on held-out batches, then solve it from all batches.

        Args:
          leaves: all that the block uses.
          values: what the solved blocks before it give, batch by batch; the last are held out.
          exact: what the original ones give.

        Returns:
          What the block adds to the result.
        """
        if not self.own:
            return Solved({}, {}, {}, {}, {}, {})
        for path, x in self.own.items():
            check_finite(path, x)
        known = self._statistics(leaves, values, exact)
        judges = self._judges(known)
        tried = {path: [found] for path, found in self._nearest(judges).items()}
        for candidate in self.options.candidates:
            for path, found in self._solved(candidate, list(self.own), known, judges).items():
                tried[path].append(found)
        # The first of equal ones: rounding to nearest, where nothing is better.
        best = {path: min(each, key=lambda found: found.error) for path, each in tried.items()}
        if self.options.refit and self.options.judging:
            known = self._together(known)
            best |= self._again(best, known, judges, tried)
        return self._collected(best, tried, known)

    def _statistics(
        self, leaves: Leaves, values: Sequence[Values], exact: Sequence[Values]
    ) -> Statistics:
        program = self.program
        numbers = program.numbers(self.own)
        last = len(values) - self.options.judging
        halves = (slice(None, last), slice(last, None))
        seen, judges = (program.statistics(leaves, values[half], numbers) for half in halves)
        if not self.options.compensate:
            return Statistics(seen, judges, {}, {})
        cross, judging = (
            self._differences(leaves, values[half], exact[half], numbers) for half in halves
        )
        return Statistics(seen, judges, cross, judging)

    def _differences(
        self,
        leaves: Leaves,
        values: Sequence[Values],
        exact: Sequence[Values],
        numbers: Numbers,
    ) -> ByName:
        """Return ``{"alike cross": statistics, ...}`` of some batches."""
        found: ByName = {}
        for rows in self.program.compiled.reducers:
            normalize = rows == "alike"
            own = self.program.differences(leaves, values, exact, numbers, normalize)
            found |= {f"{rows} {kind}": own[kind] for kind in DIFFERENCES}
        return found

    def _together(self, known: Statistics) -> Statistics:
        """Return statistics of all batches: those that were held out are seen now."""
        seen = {name: added(each, known.judges[name]) for name, each in known.seen.items()}
        cross = {name: added(each, known.judging_cross[name]) for name, each in known.cross.items()}
        return known._replace(seen=seen, cross=cross)

    def _tasks(self, calibration: Calibration | None) -> Tasks:
        return {} if calibration is None else problems(calibration, self.own)[0]

    def _judges(self, known: Statistics) -> Judges:
        """Return by what each leaf's solutions are judged."""
        seen = self._tasks(known.seen[self.first])
        held_out = known.judges if self.options.judging else known.seen
        differences = known.judging_cross if self.options.judging else known.cross
        others = self._tasks(held_out[self.first])
        cross, residual = (
            self._tasks(differences.get(f"{self.first} {kind}")) for kind in DIFFERENCES
        )
        return {
            path: judged(own, *(each.get(path, ()) for each in (others, cross, residual)))
            for path, own in seen.items()
        }

    def _nearest(self, judges: Judges) -> dict[str, Found]:
        viewed = self.restricted.to(self.own, self.state).view(self.own, self.state)
        return {path: self._found(path, None, viewed[path], judges) for path in self.own}

    def _found(
        self,
        path: str,
        candidate: Candidate | None,
        leaf: Leaf,
        judges: Judges,
        result: Rewritten | None = None,
    ) -> Found:
        error = relative_error(self.own[path], leaf, judges.get(path, ()))
        return Found(candidate, leaf, error, result)

    def _solved(
        self, candidate: Candidate, paths: Collection[str], known: Statistics, judges: Judges
    ) -> dict[str, Found]:
        """Return a candidate's solutions of some leaves."""
        seen = known.seen[candidate.rows]
        leaves = {path: self.own[path] for path in paths}
        if candidate.compensated:
            own = self._tasks(seen)
            cross = self._tasks(known.cross[f"{candidate.rows} cross"])
            for path, tasks in own.items():
                if path in leaves:
                    others = cross.get(path, ())
                    leaves[path] = compensated(leaves[path], tasks, others, self.options.compensate)
        held_out = known.judges[self.first] if self.options.judging else None
        compression = self.restricted.to(paths, self.state)
        result = candidate.method(leaves, seen, compression, self.state, held_out=held_out)
        new = flatten(result.params)[0]
        return {path: self._found(path, candidate, new[path], judges, result) for path in paths}

    def _again(
        self,
        best: Mapping[str, Found],
        known: Statistics,
        judges: Judges,
        tried: Mapping[str, Sequence[Found]],
    ) -> dict[str, Found]:
        """Solve leaves again by their candidates, as far as they stay better than nearest."""
        found: dict[str, Found] = {}
        for candidate in self.options.candidates:
            paths = [path for path, each in best.items() if each.candidate == candidate]
            if paths:
                found |= self._solved(candidate, paths, known, judges)
        # The held-out rows are among those it is made from now, so this is no more than a check.
        worse = [path for path, new in found.items() if new.error >= tried[path][0].error]
        said = "solved without the held-out batches: with them it was no better than nearest"
        return found | {path: best[path]._replace(note=said) for path in worse}

    def _collected(
        self, best: Mapping[str, Found], tried: Mapping[str, Sequence[Found]], known: Statistics
    ) -> Solved:
        """Return what is kept of the best solutions."""
        solved = Solved({}, {}, {}, {}, {}, {})
        tasks = self._tasks(known.seen[self.first])
        compensable = self._tasks(known.cross.get(f"{self.first} cross"))
        for path, found in best.items():
            solved.leaves[path] = found.leaf
            for i, x in self._changed_state(path, found).items():
                solved.state[i] = x
            # What was out of the ordinary is said by the last that tried, if nothing was better.
            said = found.result or tried[path][-1].result
            if said is None:
                continue
            if path in said.changed:
                solved.changed[path] = said.changed[path]
                if path in tasks:
                    solved.measured[path] = _measured(found, tried[path], tasks[path])
            if path in said.skipped:
                solved.skipped[path] = said.skipped[path]
            if note := self._note(path, found, said, compensable):
                solved.notes[path] = note
        return solved

    def _note(self, path: str, found: Found, said: Rewritten, compensable: Collection[str]) -> str:
        notes = [said.notes[path]] if path in said.notes else []
        if found.candidate is not None:
            # A candidate compares itself with rounding on its own grid; held-out batches decided.
            notes = [f"on its own grid: {note}" for note in notes]
        if path in said.changed and found.candidate is None:
            notes.insert(0, "no candidate is better on held-out batches: rounded to nearest")
        elif path in said.changed and len(self.options.candidates) > 1:
            notes.insert(0, f"method: {_name(found)}")
        if self.options.compensate and path in said.changed and path not in compensable:
            notes.append("it is used inside a loop: not compensated")
        return "; ".join([*notes, *filter(None, [found.note])])

    def _changed_state(self, path: str, found: Found) -> dict[int, jax.Array]:
        """Return the arrays of the state that belong to a leaf, if its candidate changed them."""
        if found.result is None:
            return {}
        old, new = (jax.tree.leaves(each) for each in (self.state, found.result.state))
        owned = [i for i, owner in self.restricted.owners.items() if owner == path]
        return {i: new[i] for i in owned if new[i] is not old[i]}


def _name(found: Found) -> str:
    return NEAREST if found.candidate is None else found.candidate.name


def _measured(found: Found, tried: Sequence[Found], tasks: Sequence[Problem]) -> Measured:
    """Return what is known of a leaf that was solved."""
    rows = np.concatenate([np.asarray(task.rows).ravel() for task in tasks])
    return Measured(
        method=_name(found),
        error=found.error,
        errors={_name(each): each.error for each in tried},
        tokens=(int(rows.min()), int(rows.max())),
        inputs=sum(task.dead.size for task in tasks),
        dead=sum(int(task.dead.sum()) for task in tasks),
        damping=None if found.candidate is None else found.candidate.damping,
    )
