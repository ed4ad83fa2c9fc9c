"""``compress-jax export``: the artifact of a run as files for other runtimes, each held against JAX and its float export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ExportError

Target = Literal["onnx", "litert", "stablehlo"]
SUFFIX = {"onnx": ".onnx", "litert": ".tflite", "stablehlo": ".stablehlo"}
GATE = 4


def export(
    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")],
    to: tuple[Target, ...] = ("onnx",),
    activations: Literal["float", "int8"] = "float",
    calibrate: int = 512,
    batch: int = 64,
    rounds: int = 30,
    min_agreement: float = 0.98,
    max_drop: float = 0.01,
) -> int:
    """Export the artifact of a run to ONNX, LiteRT or StableHLO, and verify every file in its own runtime.

    Writes WORKDIR/export/model.onnx, model.tflite or model.stablehlo, beside each the same model in float32, and what was
    measured on the test split to WORKDIR/export/export.json: accuracy there, agreement with JAX, bytes, and times
    beside the float export, slowdowns too. For example

      compress-jax export runs/digits --to onnx stablehlo
      compress-jax export runs/digits --to onnx litert --activations int8

    ONNX needs pip install 'compress_jax[onnx]', LiteRT pip install 'compress_jax[litert]'. With --activations int8 whole
    layers run in integers, calibrated on training data; the weights' scales must then be per tensor or channel.

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0 every file passes, 1 an
    error, 4 a file fails: answers that differ too often from JAX's, or accuracy that is lost.

    Args:
      workdir: the folder of a finished run.
      to: the runtimes.
      activations: "int8" for integer inference (ONNX, LiteRT); "float" to compress the weights alone.
      calibrate: training examples that ranges of activations are measured on.
      batch: examples a call; LiteRT files run this size only.
      rounds: timed calls of each file.
      min_agreement: smallest share of test examples that are answered as in JAX.
      max_drop: largest loss of accuracy against JAX; 0.01 is one point.

    Returns:
      The exit code.
    """
    from compress_jax.cli.rebuild import rebuilt
    from compress_jax.core import unpack
    from compress_jax.export import verify, write_atomically
    from compress_jax.report import Table, rich_table

    experiment, packed, _ = rebuilt(workdir)
    model, data = experiment.student.model, experiment.data
    example, folder, console = data.train["image"][:batch], workdir / "export", stdout()
    _make(folder)

    def fn(variables: Any, x: Any) -> Any:
        return model.apply(variables, x)

    records, passed = {}, True
    for target in dict.fromkeys(to):
        options = _options(target, activations, data.train["image"][:calibrate], batch)
        file, plain = folder / f"model{SUFFIX[target]}", folder / f"float{SUFFIX[target]}"
        write = _writer(target)
        done = write(fn, packed, example, file, **options)
        write(fn, unpack(packed), example, plain)
        reference = done.simulation or (lambda x: fn(unpack(packed), x))
        limits = {"rounds": rounds, "min_agreement": min_agreement, "max_drop": max_drop}
        found = verify(
            file,
            reference,
            data.test["image"],
            data.test["label"],
            baseline=plain,
            batch_sizes=(1, batch),
            **limits,  # pyright: ignore[reportArgumentType]
        )
        passed &= found.passed
        records[target] = {**found.record(), "sites": [row._asdict() for row in done.rows]}
        console.print(rich_table(Table(f"{target}: {file}", ("", "measured"), tuple(found.rows()))))
        for row in done.rows:
            console.print(shown(f"  {row.name}: {row.form}{f' ({row.reason})' if row.reason else ''}"))
        for note in done.notes:
            console.print(shown(f"  {note}"))
    write_atomically(folder / "export.json", f"{json.dumps(records, indent=1)}\n".encode())
    console.print("every file passes" if passed else "[bold red]a file fails[/]: see above; no claim should rest on it")
    return 0 if passed else GATE


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write into {folder}: {error.strerror}; remove or rename what is there") from error


def _writer(target: Target) -> Callable[..., Any]:
    from compress_jax.export import to_litert, to_onnx, to_stablehlo

    return {"onnx": to_onnx, "litert": to_litert, "stablehlo": to_stablehlo}[target]


def _options(target: Target, activations: str, images: Any, batch: int) -> dict[str, Any]:
    """Return what a target's export is asked for."""
    if activations == "float" or target == "stablehlo":
        return {}
    from compress_jax.quantize._static import static

    batches = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    return {"how": static(bits=8, symmetric=False), "batches": batches}
