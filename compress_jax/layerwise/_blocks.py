"""Solve a network block by block, each on what the solved blocks before it give."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import jax

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.describe import describe
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Batch, Leaf, ModelFn, Params
from compress_jax.layerwise._block import Block, Options
from compress_jax.layerwise._candidates import REDUCERS, Method, candidates
from compress_jax.layerwise._checkpoint import Checkpoint, Solved, digest
from compress_jax.layerwise._held_out import held_out
from compress_jax.layerwise._programs import BlockProgram, Programs, Values
from compress_jax.layerwise._restrict import Restricted
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace import Reducer, Segment, bind, segments

Report: TypeAlias = Callable[[str, int, int], None]
"""``(name of a block, its number from 1, of how many)``."""


def solve(
    fn: ModelFn,
    params: Params,
    batches: Iterable[Batch],
    compression: Compression,
    method: Method | Mapping[str, Method] | None = None,
    *,
    blocks: Sequence[Patterns] | None = None,
    hold_out: float = 0.25,
    refit: bool = True,
    rows: str | Sequence[str] | None = None,
    reducer: Reducer | None = None,
    compensate: float = 0.0,
    state: CompressionState | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    donate: bool = False,
    report: Report | None = None,
) -> Rewritten:
    """Solve a network block by block: calibrate one on what the solved ones give, solve, go on.

    Of several candidates each leaf takes the one with the lowest error of its outputs on batches
    that none has seen, rounding to nearest among them; then it is solved again by that one from all
    batches (Gram matrices add up, so nothing runs twice). What is no better there than rounding to
    nearest is rounded to nearest. ``measured`` has the errors of all candidates, ``table`` prints
    them.

    Only one block's statistics are held at a time: beside params and result, memory is that of what
    crosses a cut for each batch, and of one block. Blocks that are alike are compiled once.

    Args:
      fn: a pure function of params and one batch.
      params: tree of arrays.
      batches: each the argument of ``fn`` after params; a tuple is several arguments; all of one
        shape.
      compression: what is solved for. It is bound to the layouts read from the function.
      method: a solver such as `quantize.gptq` or ``partial(quantize.gptq, act_order=True)``, or
        several by name; it is called with the leaves of one block, ``{path: leaf}``. By default
        GPTQ in activation order, with either weighting of rows, and under clipped scales.
      blocks: a glob, or several, over the leaves of each block; by default `trace.segments` finds
        them by the numbers in paths. Leaves of no block are solved with what runs before the next.
      hold_out: the share of batches that candidates are judged by; 0 judges by the calibration
        itself.
      refit: whether to solve again from all batches once a leaf's candidate is chosen.
      rows: the weighting of calibration rows, or several to choose from: ``"alike"`` divides each
        by its root mean square (``trace.gram(normalize=True)``), ``"plain"`` does not. The first
        is also what candidates are judged by. By default ``"alike"``, and both without a method.
      reducer: what is calibrated, instead of these weightings.
      compensate: how much of the error that solved blocks leave in a block's inputs its weights
        make up for before they are rounded, from 0 to 1. Each candidate is then tried with and
        without, and judged by the distance from the outputs of the original network. It takes a
        second pass, of the original blocks.
      state: of the compression; by default that of ``init``.
      checkpoint: a folder. Each block is written to it, and a run that was stopped goes on after
        the blocks that are there, to the same bits.
      donate: whether each leaf of ``params`` is given up once it is solved, as in
        ``jax.jit(..., donate_argnums=0)``: then there is one model in memory and not two.
      report: called when a block is solved.

    Returns:
      ``Rewritten``, exact under the compression; notes say which method a leaf took.

    Raises:
      DataError: if there are too few batches.
      ConfigError: if a block matches no leaf.
      CheckpointError: if the folder holds blocks of another network, other batches or options.
      CompressError: as the methods do.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {f"layer_{i}": {"w": jax.random.normal(keys[i], (8, 8)) / 3} for i in range(2)}
      >>> fn = lambda p, x: jnp.tanh(x @ p["layer_0"]["w"]) @ p["layer_1"]["w"]
      >>> batches = [jax.random.normal(keys[2], (64, 8)) * jnp.arange(1.0, 9.0)] * 4
      >>> int3 = cj.at("**", cj.quantize.uniform(3, granularity="channel"))
      >>> solved = cj.layerwise.solve(fn, params, batches, int3)
      >>> sorted(solved.changed)
      ['layer_0/w', 'layer_1/w']

    References:
      Frantar et al., "GPTQ", 2023, section 4: blocks are quantized on the outputs of those before.
    """
    chosen = _weightings(method, rows, reducer, compensate)
    found = candidates(method, tuple(chosen), compensate > 0)
    if not found:
        raise ArgumentError("give a method, such as quantize.gptq, or several by name")
    made, judges = held_out(batches, hold_out)
    given = [*made, *judges]
    compression = bind(compression, fn, params, *given[0])
    state = compression.init(params) if state is None else state
    parts = segments(fn, params, *given[0], blocks=blocks)
    options = Options(found, len(judges), refit, compensate)
    folder = None
    if checkpoint is not None:
        made_of = {
            "params": digest(params),
            "batches": digest(given),
            "compression": f"{compression.call} {digest(state)}",
            "blocks": str([part.name for part in parts]),
            "function": _digest_of(fn, params, given[0]),
            "options": describe([options, method, rows, reducer]),
            "version": f"jax {jax.__version__}",
        }
        folder = Checkpoint(checkpoint, made_of)
    restricted = Restricted(compression, params, state)
    if donate and (path := restricted.mixed()):
        raise ArgumentError(
            f"donate=True gives up solved leaves, and {compression.call} needs others to see "
            f"{path!r}; leave it out"
        )
    run = _Run(restricted, state, options, Programs(chosen), donate)
    run.solve(parts, [tuple(jax.tree.leaves(batch)) for batch in given], folder, report)
    return run.result()


def _weightings(
    method: Method | Mapping[str, Method] | None,
    rows: str | Sequence[str] | None,
    reducer: Reducer | None,
    compensate: float,
) -> dict[str, Reducer]:
    """Return what is calibrated, by the name of its weighting of rows."""
    if not 0 <= compensate <= 1:
        raise ArgumentError(f"compensate must be from 0 to 1, got {compensate}")
    if reducer is not None:
        if rows is not None or compensate or method is None:
            raise ArgumentError(
                "a reducer takes the place of rows=, and goes with a method and without "
                "compensate=; leave it out for the weightings 'alike' and 'plain'"
            )
        return {"own": reducer}
    if rows is None:
        rows = ("alike", "plain") if method is None else ("alike",)
    names = (rows,) if isinstance(rows, str) else tuple(rows)
    unknown = [name for name in names if name not in REDUCERS]
    if unknown or not names:
        raise ArgumentError(f"rows must be 'alike', 'plain' or both, got {rows!r}")
    return {name: REDUCERS[name] for name in names}


class _Run:
    """What is solved so far."""

    def __init__(
        self,
        restricted: Restricted,
        state: CompressionState,
        options: Options,
        programs: Programs,
        donate: bool,
    ) -> None:
        self.restricted = restricted
        self.original = restricted.leaves
        self.options = options
        self.programs = programs
        self.donate = donate
        self.state = state
        self.solved = Solved({}, {}, {}, {}, {}, {})

    def solve(
        self,
        parts: Sequence[Segment],
        values: list[Values],
        folder: Checkpoint | None,
        report: Report | None,
    ) -> None:
        """Solve the blocks, or take them from a checkpoint."""
        exact = list(values)  # what the original blocks give
        for number, part in enumerate(parts, 1):
            leaves = {path: self._now(path) for path in part.paths}
            program = self.programs.of(part, leaves, values[0])
            own = [path for path in part.paths if path in self.restricted.paths]
            own = [path for path in own if path not in self.solved.leaves]
            known = None if folder is None else folder.load(number)
            if known is None:
                block = Block(self.restricted, self.state, self.options, program, own)
                known = block.solve(leaves, values, exact)
                if folder is not None:
                    folder.save(number, known)
            self._take(known)
            # Nothing reads the last one's outputs, which may be logits over a large vocabulary.
            if number < len(parts):
                values, exact = self._advanced(program, values, exact)
            if self.donate:
                self._give_up(known, parts[number:])
            if report is not None:
                report(part.name, number, len(parts))

    def _advanced(
        self, program: BlockProgram, values: list[Values], exact: list[Values]
    ) -> tuple[list[Values], list[Values]]:
        """Return what a block gives for each batch, as it is solved and as it was."""
        paths = program.part.paths
        if self.options.compensate:
            originals = {path: self.original[path] for path in paths}
            exact = [program.outputs(originals, each) for each in exact]
        leaves = {path: self._now(path) for path in paths}
        return [program.outputs(leaves, each) for each in values], exact

    def _give_up(self, block: Solved, later: Sequence[Segment]) -> None:
        """Delete the leaves that a block has replaced and that nothing else uses."""
        uses = Counter(id(x) for x in self.original.values())
        needed = {path for part in later for path in part.paths}
        for path, new in block.leaves.items():
            x = self.original[path]
            alone = uses[id(x)] == 1 and path not in needed and x is not new
            if alone and isinstance(x, jax.Array):
                x.delete()

    def _now(self, path: str) -> Leaf:
        return self.solved.leaves.get(path, self.original[path])

    def _take(self, block: Solved) -> None:
        self.solved.add(block)
        values = jax.tree.leaves(self.state)
        for i, x in block.state.items():
            values[i] = x
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), values)

    def result(self) -> Rewritten:
        """Return the whole."""
        solved = self.solved
        skipped = {**self.restricted.skipped, **solved.skipped}
        left = [path for path in self.restricted.paths if path not in solved.leaves]
        nearest = self.restricted.to(left, self.state).view(
            {path: self.original[path] for path in left}, self.state
        )
        skipped |= dict.fromkeys(left, "no block uses it: rounded to nearest")
        whole = self.restricted.rebuild({**self.original, **solved.leaves, **nearest})
        return Rewritten(
            whole,
            self.state,
            solved.changed,
            skipped,
            solved.notes,
            self.restricted.compression,
            solved.measured,
        )


def _digest_of(fn: ModelFn, params: Params, inputs: Sequence[Batch]) -> str:
    """Return the digest of a function's jaxpr, in which addresses of functions differ each time."""
    text = re.sub(" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(params, *inputs)))
    return hashlib.sha256(text.encode()).hexdigest()
