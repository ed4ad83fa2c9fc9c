"""``compress-jax eval``: the artifact of a run, measured again in a fresh process."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_jax.cli.config import build, load_config
from compress_jax.core.errors import ArtifactError
from compress_jax.core.types import PyTree, Variables

if TYPE_CHECKING:
    from compress_jax.search import Experiment

import json
from collections.abc import Callable
from typing import Annotated, Literal

import tyro

from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ExportError

# A finished run's experiment and artifact again: the config it kept is executed, after it is seen
# to be the same.


def rebuilt(workdir: Path) -> "tuple[Experiment, Any, dict[str, Any]]":
    """Return the experiment of a finished run, its artifact and its results.

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
    results = read_results(
        workdir, intact=False
    )  # its numbers are not used, but shown beside what is measured
    file, config = workdir / "artifact.safetensors", kept_config(workdir)
    packed = load(file)[0]
    function = load_config(config)
    experiment = build(function, parse_config(function, flags, f"compress-jax run {config}")[0])
    require_same_model(workdir / "candidates" / results["chosen"], experiment.student.model)
    _require_fit(file, experiment, packed)
    return experiment, packed, results


def _require_fit(file: Path, experiment: "Experiment", packed: PyTree) -> None:
    """See that the student's model can be called with an artifact's variables."""
    import jax

    from compress_jax.core import unpack

    image, apply = experiment.data.test["image"], experiment.student.model.apply
    try:
        jax.eval_shape(
            apply, unpack(packed), jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
        )
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ArtifactError(
            f"{file} does not fit the model of this run ({type(error).__name__}: {why})"
        ) from error


def evaluate(
    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")],
) -> int:
    """Measure the artifact of a run again, and compare with what the run wrote down.

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
    pass
    from compress_jax.report import Table, rich_table

    experiment, packed, results = rebuilt(workdir)
    written = next(row for row in results["rows"] if row["name"] == results["chosen"])
    measured = _measure(experiment, packed) | {
        "nbytes": (workdir / "artifact.safetensors").stat().st_size
    }
    names = {
        "test": "test accuracy",
        "validation": "validation accuracy",
        "nbytes": "bytes on disk",
    }
    rows = [(text, _cell(measured[key]), _cell(written[key])) for key, text in names.items()]
    same = all(measured[key] == written[key] for key in names)
    console = stdout()
    console.print(
        rich_table(Table(results["chosen"], ("", "measured now", "results.json"), tuple(rows)))
    )
    console.print(
        "the same"
        if same
        else "[bold red]they differ[/]: the artifact, the data or the versions have changed"
    )
    return 0 if same else 1


def _measure(experiment: Any, packed: PyTree) -> dict[str, Any]:
    """Return the accuracies of an artifact."""
    from compress_jax.core import unpack
    from compress_jax.train import logits

    variables, data = unpack(packed), experiment.data
    splits = {"test": data.test, "validation": data.validation}
    hits = {
        n: logits(experiment.student.model.apply, variables, x).argmax(-1) == x["label"]
        for n, x in splits.items()
    }
    return {name: float(hit.mean()) for name, hit in hits.items()}


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f} %"


# ``compress-jax export``: the artifact of a run as files for other runtimes, each held against JAX
# and its float export.


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
    """Export the artifact of a run to ONNX, LiteRT or StableHLO, and verify each file.

    Each file runs in its own runtime.

    Writes WORKDIR/export/model.onnx, model.tflite or model.stablehlo, beside each the same model in
    float32, and what was measured on the test split to WORKDIR/export/export.json: accuracy there,
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
    pass
    from compress_jax.core import unpack
    from compress_jax.export import verify, write_atomically
    from compress_jax.report import Table, rich_table

    experiment, packed, _ = rebuilt(workdir)
    model, data = experiment.student.model, experiment.data
    example, folder, console = data.train["image"][:batch], workdir / "export", stdout()
    _make(folder)

    def fn(variables: Variables, x: Any) -> Any:
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
            console.print(
                shown(f"  {row.name}: {row.form}{f' ({row.reason})' if row.reason else ''}")
            )
        for note in done.notes:
            console.print(shown(f"  {note}"))
    write_atomically(folder / "export.json", f"{json.dumps(records, indent=1)}\n".encode())
    console.print(
        "every file passes"
        if passed
        else "[bold red]a file fails[/]: see above; no claim should rest on it"
    )
    return 0 if passed else GATE


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


def _options(target: Target, activations: str, images: Any, batch: int) -> dict[str, Any]:
    """Return what a target's export is asked for."""
    if activations == "float" or target == "stablehlo":
        return {}
    from compress_jax.quantize._activations.static import static

    batches = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    return {"how": static(bits=8, symmetric=False), "batches": batches}


# ``compress-jax inspect``: what is in an artifact.


def inspect(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]) -> int:
    """Show what an artifact is and how each of its leaves is stored.

    Prints the metadata (model, data, config, accuracy) and one line a leaf: shape, form, stored
    bits for each entry, share of zeros, bytes, share of the file, and why a leaf was left alone;
    then what the bytes are for: codes, masks, scales. For example

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


# ``compress-jax report``: the pages of a run, written again.


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
