"""What a compressed student must satisfy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compress_jax.core.arguments import one_of, whole
from compress_jax.core.errors import ConfigError
from compress_jax.search._network import fields_of, is_number, require

Runtime = Literal["xla", "onnx", "litert"]


@dataclass(frozen=True)
class Requirement:
    """What the compressed student must satisfy, on validation data, on disk and when it runs.

    Attributes:
      max_drop: by how much the task's metric may be worse than the reference's: a fraction below 1
        for shares such as accuracy (0.01 is one point), else in the metric's own unit.
      min_ratio: smallest ratio of the float32 student's bytes on disk to the artifact's.
      max_bytes: largest artifact, in bytes on disk, header and all.
      reference: ``"teacher"``, or ``"student"`` for the student in float32. Without a teacher it is
        always the student.
      max_drops: the same as ``max_drop`` for further metrics of the task, by name.
      max_macs: multiply-accumulates of one example, those with pruned weights too.
      max_bitops: bit-operations of one example, see `trace.cost`.
      max_parameters: entries of the params that are not zero.
      max_latency_ms: milliseconds of a call of ``batch`` examples in ``runtime``, measured here.
      min_throughput: examples a second, in calls of ``batch`` examples in ``runtime``.
      max_memory: bytes that XLA's program for a call of ``batch`` examples needs at once: params as
        stored, inputs, temporaries, outputs.
      runtime: where it is timed: ``"xla"``, ``"onnx"`` (ONNX Runtime) or ``"litert"``.
      batch: examples a call.

    Example:
      >>> import compress_jax as cj
      >>> wanted = cj.search.Requirement(max_drop=0.005, min_ratio=20, max_bitops=1e9)
      >>> wanted.max_bytes, wanted.timed
      (inf, False)
    """

    max_drop: float = 0.01
    min_ratio: float = 1.0
    max_bytes: float = math.inf
    reference: Literal["teacher", "student"] = "teacher"
    max_drops: Mapping[str, float] = field(default_factory=dict)
    max_macs: float = math.inf
    max_bitops: float = math.inf
    max_parameters: float = math.inf
    max_latency_ms: float = math.inf
    min_throughput: float = 0.0
    max_memory: float = math.inf
    runtime: Runtime = "xla"
    batch: int = 1

    def __post_init__(self) -> None:
        """Check types and ranges."""
        with fields_of("Requirement"):
            fits = is_number(self.max_drop) and 0 <= self.max_drop < math.inf
            require(fits, "max_drop", "a number, at least 0", self.max_drop)
            fits = is_number(self.min_ratio) and 0 < self.min_ratio < math.inf
            require(fits, "min_ratio", "a number above 0, such as 8", self.min_ratio)
            for name, unit in LIMITS.items():
                value = getattr(self, name)
                wanted = f"a number of {unit} above 0, or math.inf for no limit"
                require(is_number(value) and value > 0, name, wanted, value)
            fits = is_number(self.min_throughput) and 0 <= self.min_throughput < math.inf
            require(fits, "min_throughput", "examples a second, 0 or more", self.min_throughput)
            one_of("reference", self.reference, ("teacher", "student"))
            one_of("runtime", self.runtime, ("xla", "onnx", "litert"))
            whole("batch", self.batch, 1)
            self._check_drops()

    def _check_drops(self) -> None:
        fits = isinstance(self.max_drops, Mapping)
        require(fits, "max_drops", "a dict such as {'f1': 0.01}", self.max_drops)
        for name, drop in self.max_drops.items():
            fits = is_number(drop) and 0 <= drop < math.inf
            require(fits, f"max_drops[{name!r}]", "a number, at least 0", drop)

    @property
    def timed(self) -> bool:
        """Whether the artifact must be timed."""
        return self.max_latency_ms < math.inf or self.min_throughput > 0

    @property
    def remembered(self) -> bool:
        """Whether the memory of a call must be known."""
        return self.max_memory < math.inf

    def require_metrics(self, names: tuple[str, ...]) -> None:
        """Raise a ConfigError unless the task has every metric that is asked for."""
        for name in self.max_drops:
            if name not in names:
                raise ConfigError(
                    f"Requirement: max_drops names {name!r}, and the task measures "
                    f"{', '.join(names)}"
                )


LIMITS = {
    "max_bytes": "bytes",
    "max_macs": "multiply-accumulates",
    "max_bitops": "bit-operations",
    "max_parameters": "parameters",
    "max_latency_ms": "milliseconds",
    "max_memory": "bytes",
}
"""The upper limits, and what they count."""
