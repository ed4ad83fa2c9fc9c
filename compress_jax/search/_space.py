"""A space of ways to get smaller, and one point of it: which leaf takes which option."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from compress_jax.core.arguments import whole
from compress_jax.core.compression import Compression
from compress_jax.core.paths import Patterns
from compress_jax.core.types import JsonObject
from compress_jax.search._allocate import Allocation, literal
from compress_jax.search._candidate import ITEMS, Candidate, Method
from compress_jax.search._cuts import DEPTH, Shares
from compress_jax.search._drop_blocks import drop_blocks
from compress_jax.search._network import Training, fields_of, require
from compress_jax.search._rewrites import PARTS as BATCHES
from compress_jax.search._rewrites import shrink
from compress_jax.search._sensitivity import Measure

FIRST = 4  # a first training has this part of the steps of a full one
WHOLE = "whole"
"""The start that does nothing to the student."""

Baseline: TypeAlias = tuple[str, ...] | Callable[[dict[str, float]], Method | tuple[Method, ...]]
"""Names of options, or a function of what the result takes that returns methods."""


@dataclass(frozen=True)
class Search:
    """What the automated loop may do to the student, in place of candidates written by hand.

    Every leaf takes one of ``options``; an integer program shares a budget out among them, with
    what each option costs and how much the outputs move under it, both measured once. Proposals
    are measured, which corrects the sum of single scores; the promising ones are trained with
    growing numbers of steps; the smallest that meets the requirement is the result.

    Attributes:
      options: what a leaf may become, by name: a Compression of one strength, such as
        ``quantize.uniform(4)``, ``chain(prune.magnitude(0.5), quantize.uniform(4))``,
        ``prune.magnitude(1.0, structure=prune.n_m(2, 4))``, ``lowrank.svd(8)``, ``identity()``.
      training: ``steps -> Training`` that recovers a proposal; None for calibration alone.
      steps: of a training in full; first all promising proposals get a quarter of it.
      starts: networks that the options are applied to, by name: methods such as
        ``(search.shrink(ratio=0.5), training)`` for fewer channels. The student as it is, called
        ``"whole"``, is always one.
      baselines: what is shown beside the result, by name: the options that the same search of the
        student may use at the result's number of bytes, or a function that returns other methods,
        trained as long: ``lambda result: search.shrink(ratio=...)`` for width alone, or a smaller
        `Network`; it is given ``nbytes``, ``macs``, ``bitops`` and ``parameters`` of the result.
        Each option for all leaves alike is always one.
      where: a glob, or several, over the leaves that take an option; by default all weights of
        products and lookups.
      proposals: budgets that are tried for each start.
      trained: proposals that are trained in full at first, at most, without the baselines.
      refinements: how often a size between the smallest that passed and the largest below it that
        failed is tried then, each trained in full.
      examples: of the training data, which sensitivities are measured on.
      measure: see `sensitivities`: ``"kl"`` or ``"mse"``; None takes the one that fits the task.
      width_ratios: shares of channels that any width of the student may lose, such as
        ``(0.25, 0.5)``. Each is measured alone, and joins the integer program beside the options;
        what it chooses is shrunk, trained for a quarter of ``steps``, and searched as ``starts``
        are. Each share of all widths alike is always tried.
      depth_ratios: shares of the student's blocks of layers, likewise.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> options = {f"int{bits}": cj.quantize.uniform(bits) for bits in (2, 4, 8)}
      >>> search = cj.search.Search(options, lambda n: cj.search.Training(optax.adam(1e-3), n), 200)
      >>> search.trained
      4
    """

    options: Mapping[str, Compression]
    training: Callable[[int], Training] | None = None
    steps: int = 0
    starts: Mapping[str, tuple[Method, ...]] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    where: Patterns | None = None
    proposals: int = 6
    trained: int = 4
    refinements: int = 2
    examples: int = 512
    measure: Measure | None = None
    width_ratios: tuple[float, ...] = ()
    depth_ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check types, ranges and names."""
        with fields_of("Search"):
            fits = isinstance(self.options, Mapping) and bool(self.options)
            require(fits, "options", "a dict of compressions by name", self.options)
            for name, option in self.options.items():
                fits = isinstance(option, Compression)
                require(fits, f"options[{name!r}]", "a Compression", option)
            fits = self.training is None or callable(self.training)
            require(fits, "training", "a function steps -> Training, or None", self.training)
            whole("steps", self.steps, 1 if self.training else 0)
            for name in ("proposals", "trained", "examples"):
                whole(name, getattr(self, name), 1)
            whole("refinements", self.refinements, 0)
            for name in ("width_ratios", "depth_ratios"):
                own = getattr(self, name)
                fits = isinstance(own, tuple) and all(
                    isinstance(ratio, float) and 0 < ratio < 1 for ratio in own
                )
                require(fits, name, "a tuple of shares above 0 and below 1", own)
            self._check_starts()
            self._check_baselines()

    def _check_baselines(self) -> None:
        for name, baseline in self.baselines.items():
            fits = name not in (WHOLE, *self.starts)
            require(fits, "baselines", f"names other than {WHOLE!r} and those of starts", name)
            if callable(baseline):
                continue
            fits = bool(baseline) and set(baseline) <= set(self.options)
            wanted = f"a function or a tuple of options: {', '.join(self.options)}"
            require(fits, f"baselines[{name!r}]", wanted, baseline)

    def _check_starts(self) -> None:
        for name, method in self.starts.items():
            fits = isinstance(method, tuple) and all(isinstance(each, ITEMS) for each in method)
            require(fits, f"starts[{name!r}]", "a tuple of methods", method)
            fits = not any(isinstance(each, Compression) for each in method)
            require(fits, f"starts[{name!r}]", "no Compression: those are options", method)
            fits = name != WHOLE and not name.startswith("cut-")
            require(fits, "starts", f"names other than {WHOLE!r}, without 'cut-'", name)

    @property
    def narrows(self) -> bool:
        """Whether the integer program chooses widths or depth."""
        return bool(self.width_ratios or self.depth_ratios)

    def cut(self, shares: Shares, examples: int | None = None) -> tuple[Method, ...]:
        """Return the methods that remove shares of widths and of depth, without training.

        Args:
          shares: by unit, see `_cuts`.
          examples: that channels are chosen by; by default as many as sensitivities are measured
            on, 0 for the weights alone.

        Returns:
          What is done to the student.
        """
        examples = self.examples if examples is None else examples
        widths = {literal(unit): x for unit, x in shares.items() if unit != DEPTH}
        found: list[Method] = []
        if widths:
            found.append(shrink(ratio=widths, examples=examples))
        if DEPTH in shares:
            found.append(drop_blocks(ratio=shares[DEPTH], examples=max(examples, BATCHES)))
        return tuple(found)

    def begun(self, shares: Shares) -> tuple[Method, ...]:
        """Return likewise, with the training after which options are measured."""
        training = self.recovery(max(self.steps // FIRST, 1))
        return (*self.cut(shares), *((training,) if training else ()))

    def beside(self, name: str, result: dict[str, float]) -> tuple[Method, ...]:
        """Return the methods of a baseline that is a function.

        Args:
          name: of the baseline.
          result: what the result takes: ``nbytes``, ``macs``, ``bitops``, ``parameters``.

        Returns:
          What is done to the student.

        Raises:
          ConfigError: if the function returns anything else.
        """
        function = self.baselines[name]
        assert callable(function)
        found = function(result)
        methods = (found,) if isinstance(found, ITEMS) else found
        fits = isinstance(methods, tuple) and all(isinstance(each, ITEMS) for each in methods)
        with fields_of("Search"):
            require(fits, f"baselines[{name!r}](...)", "a method, or a tuple of methods", found)
        return methods

    def recovery(self, steps: int) -> Training | None:
        """Return the training of so many steps; None for none."""
        return self.training(steps) if self.training is not None and steps else None


class Proposal(NamedTuple):
    """One point of the space.

    Attributes:
      start: the name of the network it begins with; that of a baseline that is a function.
      options: ``{path: option}``.
      steps: of its training.
      beside: what the baseline's function was given; None of all others.
      cut: what was removed of widths and depth, if the search found the start itself.

    Example:
      >>> Proposal("whole", {"a": "int4", "b": "int4"}, 100).name
      'int4-100'
      >>> Proposal("half", {"a": "int2", "b": "int4"}, 0).name
      'half-mixed-69074e-0'
    """

    start: str
    options: dict[str, str]
    steps: int
    beside: dict[str, float] | None = None
    cut: Shares | None = None

    @property
    def name(self) -> str:
        """A name that tells equal proposals, of any search, by what they are."""
        if self.beside is not None:
            return f"{self.start.replace(' ', '-')}-{self.beside['nbytes']}-bytes-{self.steps}"
        used = set(self.options.values())
        text = json.dumps([self.start, self.options], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:6]
        what = used.pop() if len(used) == 1 else f"mixed-{key}"
        return f"{'' if self.start == WHOLE else self.start + '-'}{what}-{self.steps}"

    def trained(self, steps: int) -> "Proposal":
        """Return it with so many steps of training."""
        return self._replace(steps=steps)

    @property
    def network(self) -> str:
        """The name of the start whose network its methods work on."""
        return self.start if self.beside is None else WHOLE

    def begin(self, search: Search) -> tuple[Method, ...]:
        """Return the methods of its start."""
        if self.cut is not None:
            return search.begun(self.cut)
        return () if self.network == WHOLE else search.starts[self.start]

    def candidate(self, search: Search) -> Candidate:
        """Return what carries it out."""
        if self.beside is not None:
            methods = search.beside(self.start, self.beside)
            return Candidate(self.name, methods, search.recovery(self.steps))
        compression = Allocation(self.options, 0.0, 0, 0, {}).compression(search.options)
        method = (*self.begin(search), compression)
        return Candidate(self.name, method, search.recovery(self.steps))

    def record(self) -> JsonObject:
        """Return it as JSON takes it."""
        return self._asdict()
