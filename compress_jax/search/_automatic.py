"""The automated search: measure leaves once, propose, measure, train what is promising, tighten."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from compress_jax.core.errors import ConfigError
from compress_jax.core.packed import unpack
from compress_jax.core.types import JsonObject
from compress_jax.export import load
from compress_jax.search._allocate import Allocation
from compress_jax.search._candidate import Method, Subject
from compress_jax.search._cuts import Shares, alike, jointly, name_of, recovered, smallest
from compress_jax.search._experiment import Experiment
from compress_jax.search._judge import Assessment
from compress_jax.search._measuring import Measuring
from compress_jax.search._proposals import Overhead, budgets, corrected, restricted, shared_out
from compress_jax.search._sensitivity import Sensitivities
from compress_jax.search._space import FIRST, WHOLE, Proposal, Search
from compress_jax.train._processes import once

FOUND = 3  # networks that the integer program chooses are begun with, at most
CLOSING = 0.5  # the share of a first training's loss that the full one is hoped to leave


@dataclass
class Automatic:
    """One search: what was measured so far, and what is done next.

    Attributes:
      experiment: with its `Search`.
      measuring: of options and cuts, once.
      subjects: the networks that options are applied to, by the name of their start.
      begin: ``(name, methods) -> subject``: makes another.
      assess: ``(proposal, subject) -> row``: carries out, writes, reads back, measures, judges.
      log_fn: called with one line for each decision.
      tables: scores and bytes by start.
      cuts: what was removed of widths and depth, by start, of those that the search found.
      rows: what was measured, by proposal's name.
      tried: the proposals, in order.
      packed: ``name -> file`` of a proposal.
    """

    experiment: Experiment
    measuring: Measuring
    subjects: dict[str, Subject]
    begin: Callable[[str, tuple[Method, ...]], Subject]
    assess: Callable[[Proposal, Subject], Assessment]
    packed: Callable[[str], Path]
    log_fn: Callable[[str], None]
    tables: dict[str, Sensitivities] = field(default_factory=dict)
    cuts: dict[str, Shares] = field(default_factory=dict)
    rows: dict[str, Assessment] = field(default_factory=dict)
    tried: list[Proposal] = field(default_factory=list)

    @property
    def search(self) -> Search:
        """The space."""
        return self.measuring.search

    def run(self) -> list[Proposal]:
        """Search, and return all that was measured."""
        for start, subject in self.subjects.items():
            self.tables[start] = self.measuring.table(start, subject)
        if self.search.narrows:
            self._narrowed()
        rounded = self._rounded()
        if not self.tried:
            raise ConfigError(
                f"max_bitops={self.experiment.requirement.max_bitops:,} cannot be met by any "
                "start; raise it, or add smaller options or narrower starts"
            )
        full = self.search.steps if self.search.training else 0
        if full:
            self._trained(rounded, full)
        self._tightened(full)
        before = self._smallest(full)
        self._beside(full)
        if self._smallest(full) != before:  # a plain way was smaller: try below it
            self._tightened(full)
        return self.tried

    # Widths and depth, found by the same integer program.

    def _narrowed(self) -> None:
        """Begin with networks whose widths and depth the program chooses beside the options."""
        cuts = self.measuring.cuts(self.subjects[WHOLE])
        for shares in alike(cuts):
            after = self.subjects[self._begun(shares)]
            moved = partial(self.measuring.distance, self.subjects[WHOLE], after)
            cuts = recovered(cuts, shares, once(moved))
        table, limit = self.tables[WHOLE], self.experiment.requirement
        found: list[Shares] = []
        for budget in budgets(smallest(table, cuts), self.search.proposals, limit.max_bytes):
            joint = jointly(table, cuts, budget, limit.max_bitops)
            if joint is not None and joint[0] and joint[0] not in found:
                found.append(joint[0])
        # Of many, evenly from the smallest to the largest.
        count = min(FOUND, len(found))
        for i in range(count):
            self._begun(found[i * (len(found) - 1) // max(count - 1, 1)])

    def _begun(self, shares: Shares) -> str:
        """Make a start of a cut, and return its name."""
        name = name_of(shares)
        if name not in self.subjects:
            what = ", ".join(f"{ratio:.0%} of {unit}" for unit, ratio in shares.items())
            self.log_fn(f"start {name}: without {what}")
            self.cuts[name] = shares
            self.subjects[name] = self.begin(name, self.search.begun(shares))
            self.tables[name] = self.measuring.table(name, self.subjects[name])
        return name

    def _proposal(self, start: str, options: dict[str, str], steps: int) -> Proposal:
        return Proposal(start, options, steps, cut=self.cuts.get(start))

    # Proposals, by calibration alone.

    def _rounded(self) -> list[Proposal]:
        """Propose for each start, measure without training, correct the scores, propose again."""
        limit = self.experiment.requirement.max_bytes
        found: list[Proposal] = []
        for start, table in self.tables.items():
            first = self._proposed(start, table, limit)
            if start not in self.cuts:
                found += self._alike(start)
            found += first
            scores = [(each.options, once(partial(self._score, each))) for each in first]
            better = corrected(table, scores)
            self.tables[start] = better
            found += self._proposed(start, better, limit)
        return list({each.name: each for each in found}.values())

    def _proposed(self, start: str, table: Sensitivities, limit: float) -> list[Proposal]:
        found = []
        for budget in budgets(table, self.search.proposals, self._overhead().leaves(limit)):
            choice = shared_out(table, budget, self.experiment.requirement.max_bitops)
            if choice is not None:
                found.append(self._measure(self._proposal(start, choice.options, 0)))
        return found

    def _alike(self, start: str) -> list[Proposal]:
        """Measure each option for all leaves alike: the plain baselines."""
        table = self.tables[start]
        found = []
        for name in self.search.options:
            if all(name in own for own in table.scores.values()):
                options = dict.fromkeys(table.scores, name)
                found.append(self._measure(self._proposal(start, options, 0)))
        return found

    def _measure(self, proposal: Proposal) -> Proposal:
        """Carry out a proposal, unless its like was, and keep its row."""
        if proposal.name not in self.rows:
            subject = self.subjects[proposal.network]
            self.rows[proposal.name] = self.assess(proposal, subject)
            self.tried.append(proposal)
        return proposal

    def _score(self, proposal: Proposal) -> float:
        """Return how far the outputs move under a whole proposal, as sensitivities measure it."""
        subject = self.subjects[proposal.network]
        variables = unpack(load(self.packed(proposal.name))[0])
        return self.measuring.distance(subject, subject._replace(variables=variables))

    def _overhead(self) -> Overhead:
        pairs = []
        for proposal in self.tried:
            if proposal.beside is not None:
                continue
            leaves = _nbytes(self.tables[proposal.start], proposal.options)
            pairs.append((leaves, self.rows[proposal.name].nbytes))
        return Overhead.of(pairs)

    # Training what is promising.

    def _trained(self, rounded: list[Proposal], full: int) -> None:
        """Train with a part of the steps first; then in full, from the smallest that may pass."""
        chances = self._front([each for each in rounded if self._fits(each)])
        part = max(full // FIRST, 1)
        first = [self._measure(each.trained(part)) for each in chances]
        hopeful = [each for each in first if CLOSING * self._loss(each) <= self._allowed]
        if not hopeful and first:  # nothing is promising: the best there is
            hopeful = [min(first, key=self._loss)]
        hopeful.sort(key=self._bytes)
        for each in hopeful[: self.search.trained]:
            done = self._measure(each.trained(full))
            if self.rows[done.name].accepted:
                break

    def _front(self, proposals: list[Proposal]) -> list[Proposal]:
        """Return the proposals that no other beats in bytes and in metric, ascending in bytes."""
        found: list[Proposal] = []
        for each in sorted(proposals, key=lambda p: (self._bytes(p), self._loss(p))):
            if not found or self._loss(each) < self._loss(found[-1]):
                found.append(each)
        return found

    def _tightened(self, full: int) -> None:
        """Try between the smallest that passed and the largest below it that did not, again.

        Where nothing below it was tried, the least that was measured stands for what did not.
        """
        for _ in range(self.search.refinements):
            proposal = self._between(full)
            if proposal is None or proposal.name in self.rows:
                return
            self._measure(proposal)

    def _between(self, full: int) -> Proposal | None:
        """Return a proposal of middle size; None where nothing passed, or nothing is smaller."""
        best = self._smallest(full)
        if best is None:
            return None
        size = self._bytes(best)
        smaller = [each for each in self.tried if self._bytes(each) < size]
        failed = [
            self._bytes(each)
            for each in smaller
            if bool(each.steps) == bool(full) and not self.rows[each.name].accepted
        ]
        if not smaller:
            return None
        below = max(failed) if failed else min(map(self._bytes, smaller))
        limit = self.experiment.requirement.max_bitops
        room = self._overhead().leaves(math.sqrt(size * below))
        choice = shared_out(self.tables[best.network], room, limit)
        return None if choice is None else self._proposal(best.network, choice.options, full)

    def _smallest(self, full: int) -> Proposal | None:
        """Return the smallest that was trained in full and met the requirement."""
        return min(self._passed(full), key=self._bytes, default=None)

    def _passed(self, full: int) -> list[Proposal]:
        """Return what was trained in full and met the requirement."""
        done = [each for each in self.tried if each.steps == full]
        return [each for each in done if self.rows[each.name].accepted]

    def _beside(self, full: int) -> None:
        """Train the plain baselines at the bytes of the smallest that passed."""
        done = [each for each in self.tried if each.steps == full]
        if not done:
            return
        best = min(self._passed(full) or done, key=self._bytes)
        alike = [
            each
            for each in self.tried
            if not each.steps and _is_alike(each) and self._bytes(each) <= self._bytes(best)
        ]
        if alike:
            self._measure(min(alike, key=self._loss).trained(full))
        for name in self.search.baselines:
            proposal = self._baseline(name, best, full)
            if proposal is None:
                self.log_fn(f"{name}: its options cannot reach {self._bytes(best):,} bytes")
                continue
            made = self._measure(proposal)
            self.log_fn(f"{name}, beside {best.name}: {made.name}")

    def _baseline(self, name: str, best: Proposal, full: int) -> Proposal | None:
        """Return a plain way to what the best one takes; None if its options cannot reach it."""
        baseline = self.search.baselines[name]
        if callable(baseline):
            row = self.rows[best.name]
            taken = {each: row.costs[each] for each in ("macs", "bitops", "parameters")}
            return Proposal(name, {}, full, {"nbytes": row.nbytes, **taken})
        # Options alone are of the student as it is, whatever start was best.
        room = self._overhead().leaves(self._bytes(best))
        if best.start == WHOLE:
            room = _nbytes(self.tables[WHOLE], best.options)  # exactly
        choice = self._restricted(WHOLE, baseline, room)
        return None if choice is None else Proposal(WHOLE, choice.options, full)

    def _restricted(self, start: str, used: tuple[str, ...], room: float) -> Allocation | None:
        try:
            table = restricted(self.tables[start], used)
        except ConfigError:
            return None
        return shared_out(table, room, self.experiment.requirement.max_bitops)

    # What rows say.

    @property
    def _allowed(self) -> float:
        return self.experiment.requirement.max_drop

    def _bytes(self, proposal: Proposal) -> int:
        return self.rows[proposal.name].nbytes

    def _loss(self, proposal: Proposal) -> float:
        """Return by how much the metric is worse than the reference's."""
        drop = self.rows[proposal.name].drop
        return math.inf if drop is None else drop

    def _fits(self, proposal: Proposal) -> bool:
        """Tell whether what training does not change is as required."""
        return bool(self.rows[proposal.name].fits)


def _nbytes(table: Sensitivities, options: dict[str, str]) -> int:
    return table.left_nbytes + sum(table.nbytes[path][o] for path, o in options.items())


def _is_alike(proposal: Proposal) -> bool:
    return len(set(proposal.options.values())) == 1


def read_proposals(results: JsonObject) -> list[Proposal]:
    """Return the proposals that a finished run recorded.

    Args:
      results: of its ``results.json``.

    Returns:
      The proposals; none of a run without a search.

    Example:
      >>> read_proposals({"proposals": [{"start": "whole", "options": {"a": "b"}, "steps": 0}]})
      [Proposal(start='whole', options={'a': 'b'}, steps=0, beside=None, cut=None)]
    """
    return [Proposal(**each) for each in results.get("proposals", ())]
