"""The commands on a finished run or an artifact: eval, export, inspect and report."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ArtifactError, ExportError
from compress_jax.core.types import ModelFn, PyTree, Variables

if TYPE_CHECKING:
    import numpy as np

    from compress_jax.export import Exported, Verification
    from compress_jax.search import Experiment

Target = Literal["onnx", "litert", "stablehlo"]
SUFFIX = {"onnx": ".onnx", "litert": ".tflite", "stablehlo": ".stablehlo"}
GATE = 4  # exit code of an export that fails its checks


def evaluate(
    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")],
) -> int:
    """Measure the artifact of a run again, and compare it with the run's results.

    Builds the data and the student from the config and the arguments kept in WORKDIR, reads
    artifact.safetensors and prints its accuracies and bytes beside those of results.json. For
    example

      compress-jax eval runs/digits

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0
    the same, 1 they differ or an error.

    Args:
      workdir: the folder of a finished run.

    Returns:
      The exit code.
    """
    from compress_jax.report import Table, rich_table

    experiment, packed, results = rebuilt(workdir)
    written = next(row for row in results["rows"] if row["name"] == results["chosen"])
    measured = {
        "test": _accuracy(experiment, packed, experiment.data.test),
        "validation": _accuracy(experiment, packed, experiment.data.validation),
        "nbytes": (workdir / "artifact.safetensors").stat().st_size,
    }
    names = {
        "test": "test accuracy",
        "validation": "validation accuracy",
        "nbytes": "bytes on disk",
    }
    rows = [(text, _cell(measured[key]), _cell(written[key])) for key, text in names.items()]
    console = stdout()
    table = Table(results["chosen"], ("", "measured now", "results.json"), tuple(rows))
    console.print(rich_table(table))
    if all(measured[key] == written[key] for key in names):
        console.print("the same")
        return 0
    console.print("[bold red]they differ[/]: the artifact, the data or the versions have changed")
    return 1


def _accuracy(experiment: "Experiment", packed: PyTree, split: "Mapping[str, np.ndarray]") -> float:
    from compress_jax.core import unpack
    from compress_jax.train import logits

    apply: ModelFn = experiment.student.model.apply
    return float((logits(apply, unpack(packed), split).argmax(-1) == split["label"]).mean())


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f} %"


def rebuilt(workdir: Path) -> "tuple[Experiment, Any, dict[str, Any]]":
    """Return the experiment of a finished run, its artifact and its results.

    The config that the run stored is executed, once its digest has been checked.

    Args:
      workdir: the folder.

    Returns:
      ``(experiment, packed variables, results)``; the artifact fits the student's model.

    Raises:
      ConfigError: if a file of the folder is missing or damaged, or the code of the model has
        changed.
      ArtifactError: if the artifact is damaged, or is of another model.
    """
    from compress_jax.cli.parse import parse_config
    from compress_jax.cli.workdir import kept_config, read_run
    from compress_jax.export import load
    from compress_jax.report import read_results
    from compress_jax.search._stage import require_same_model

    flags = read_run(workdir)["flags"]
    # The numbers are only shown beside what is measured, so a wrong digest does no harm.
    results = read_results(workdir, intact=False)
    file = workdir / "artifact.safetensors"
    config = kept_config(workdir)
    packed = load(file)[0]
    function = load_config(config)
    arguments, _ = parse_config(function, flags, f"compress-jax run {config}")
    experiment = build(function, arguments)
    require_same_model(workdir / "candidates" / results["chosen"], experiment.student.model)
    _require_fit(file, experiment, packed)
    return experiment, packed, results


def _require_fit(file: Path, experiment: "Experiment", packed: PyTree) -> None:
    """Check that the student's model can be called with an artifact's variables."""
    import jax

    from compress_jax.core import unpack

    images = experiment.data.test["image"]
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    try:
        jax.eval_shape(experiment.student.model.apply, unpack(packed), example)
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ArtifactError(
            f"{file} does not fit the model of this run ({type(error).__name__}: {why})"
        ) from error


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
    """Export the artifact of a run to ONNX, LiteRT or StableHLO, and verify each file.

    Each file runs in its own runtime.

    Writes WORKDIR/export/model.onnx, model.tflite or model.stablehlo, beside each the same model in
    float32, and the measurements on the test split to WORKDIR/export/export.json: accuracy,
    agreement with JAX, bytes, and times beside the float export, slowdowns too. For example

      compress-jax export runs/digits --to onnx stablehlo
      compress-jax export runs/digits --to onnx litert --activations int8

    ONNX needs pip install 'compress_jax[onnx]', LiteRT pip install 'compress_jax[litert]'. With
    --activations int8 whole layers run in integers, calibrated on training data; the weights'
    scales must then be per tensor or channel.

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0
    every file passes, 1 an error, 4 a file fails: answers that differ too often from JAX's, or
    accuracy that is lost.

    Args:
      workdir: the folder of a finished run.
      to: the runtimes.
      activations: "int8" for integer inference (ONNX, LiteRT); "float" to compress the weights
        alone.
      calibrate: training examples that ranges of activations are measured on.
      batch: examples a call; LiteRT files run this size only.
      rounds: timed calls of each file.
      min_agreement: smallest share of test examples that are answered as in JAX.
      max_drop: largest loss of accuracy against JAX; 0.01 is one point.

    Returns:
      The exit code.
    """
    from compress_jax.core import unpack
    from compress_jax.export import verify, write_atomically

    experiment, packed, _ = rebuilt(workdir)
    model = experiment.student.model
    data = experiment.data
    dense = unpack(packed)
    example = data.train["image"][:batch]
    folder = workdir / "export"
    _make(folder)

    def fn(variables: Variables, x: Any) -> Any:
        return model.apply(variables, x)

    console = stdout()
    records: dict[str, Any] = {}
    passed = True
    for target in dict.fromkeys(to):
        options = _options(target, activations, data.train["image"][:calibrate], batch)
        file = folder / f"model{SUFFIX[target]}"
        baseline = folder / f"float{SUFFIX[target]}"
        write = _writer(target)
        exported = write(fn, packed, example, file, **options)
        write(fn, dense, example, baseline)
        verification = verify(
            file,
            exported.simulation or functools.partial(fn, dense),
            data.test["image"],
            data.test["label"],
            baseline=baseline,
            batch_sizes=(1, batch),
            rounds=rounds,
            min_agreement=min_agreement,
            max_drop=max_drop,
        )
        passed &= verification.passed
        sites = [row._asdict() for row in exported.rows]
        records[target] = {**verification.record(), "sites": sites}
        _print_export(target, exported, verification)
    write_atomically(folder / "export.json", f"{json.dumps(records, indent=1)}\n".encode())
    if passed:
        console.print("every file passes")
        return 0
    console.print("[bold red]a file fails[/]: see above; no claim should rest on it")
    return GATE


def _print_export(target: Target, exported: "Exported", verification: "Verification") -> None:
    """Print the measurements of an export, its sites and its notes."""
    from compress_jax.report import Table, rich_table

    console = stdout()
    rows = tuple(verification.rows())
    console.print(rich_table(Table(f"{target}: {exported.path}", ("", "measured"), rows)))
    for row in exported.rows:
        reason = f" ({row.reason})" if row.reason else ""
        console.print(shown(f"  {row.name}: {row.form}{reason}"))
    for note in exported.notes:
        console.print(shown(f"  {note}"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot write into {folder}: {error.strerror}; remove or rename what is there"
        ) from error


def _writer(target: Target) -> Callable[..., Any]:
    from compress_jax.export import to_litert, to_onnx, to_stablehlo

    return {"onnx": to_onnx, "litert": to_litert, "stablehlo": to_stablehlo}[target]


def _options(target: Target, activations: str, images: "np.ndarray", batch: int) -> dict[str, Any]:
    """Return the options of a target's export."""
    if activations == "float" or target == "stablehlo":
        return {}
    from compress_jax.quantize._activations.static import static

    batches = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    return {"how": static(bits=8, symmetric=False), "batches": batches}


def inspect(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]) -> int:
    """Show what an artifact is and how each of its leaves is stored.

    Prints the metadata (model, data, config, accuracy) and one line a leaf: shape, form, stored
    bits for each entry, share of zeros, bytes, share of the file, and why a leaf was skipped; then
    the bytes by cause: codes, masks, scales. For example

      compress-jax inspect runs/digits/artifact.safetensors

    Args:
      file: an artifact; any file that compress_jax.save wrote.

    Returns:
      The exit code.
    """
    from compress_jax.export import breakdown, load
    from compress_jax.report import causes_table, leaves_table, metadata_table, rich_table

    packed, metadata = load(file)
    console = stdout()
    console.print(rich_table(metadata_table(str(file), metadata)))
    left_alone = metadata.get("left_alone", {})
    parts = breakdown(file)
    console.print(rich_table(leaves_table(packed, left_alone, parts)))
    console.print(rich_table(causes_table(parts)))
    if not metadata:
        console.print(shown("The file holds no metadata."))
    return 0


def report(workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")]) -> int:
    """Write report.html and report.md of a run: tables, pictures and decisions.

    report.html is one file that needs nothing else; report.md has its pictures in WORKDIR/report/.
    For example

      compress-jax report runs/digits

    compress-jax run does this at its end; nothing is trained or measured here.

    Args:
      workdir: the folder of a finished run.

    Returns:
      The exit code.
    """
    from compress_jax.report import write

    console = stdout()
    page = write(workdir, log_fn=lambda note: console.print(f"note: {shown(note)}"))
    console.print(shown(f"{page}\n{page.with_suffix('.md')}"))
    return 0
