"""The commands on a finished run or an artifact: eval, export, inspect and report."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from compress_jax.cli._language import (
    DEFAULT_CONTEXT,
    Asked,
    Export,
    evaluate_language,
    export_language,
    is_language_model,
)
from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ArtifactError, ConfigError, ExportError
from compress_jax.core.types import JsonObject, ModelFn, PyTree, Variables

if TYPE_CHECKING:
    import numpy as np

    from compress_jax.export import Exported, Verification
    from compress_jax.search import Experiment
    from compress_jax.tasks import PureModel, Task

Target = Literal["onnx", "litert", "stablehlo"]
Published = Literal["gguf", "hugging-face"]
SUFFIX = {"onnx": ".onnx", "litert": ".tflite", "stablehlo": ".stablehlo"}
FIXED = 64  # examples a call of a program that must know how many
VERIFIED = 1000  # examples of a test split on disk that exports are verified on
ON_DISK = f"the test split stays on disk: {VERIFIED:,} of its examples are used"
GATE = 4  # exit code of an export that fails its checks


def evaluate(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")] = (),
    compressed: Annotated[Path | None, tyro.conf.arg(metavar="ARTIFACT")] = None,
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
    chat: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
    tokens: int = 64,
    context: int = DEFAULT_CONTEXT,
    stride: int | None = None,
) -> int:
    """Measure the artifact of a run again, or a language model.

    Of a run's folder WORKDIR: builds the data and the student from the config and the arguments
    kept there, reads artifact.safetensors and prints its accuracies and bytes beside those of
    results.json.

      compress-jax eval runs/digits

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0
    the same, 1 they differ or an error.

    Of a language model, a GGUF file or a folder of Hugging Face's: prints perplexity on text files;
    with the artifact of a compressed one how far that is from it, and what both write:

      compress-jax eval model.gguf --text book.txt --compressed small.safetensors
        --prompt "Once upon a time"

    Args:
      path: the folder of a finished run, or a language model.
      text: files that a language model is measured on.
      compressed: its params as compress_jax stores them.
      prompt: beginnings that it continues.
      chat: questions that it answers, by its chat template.
      tokens: to write after each.
      context: tokens that it sees at once.
      stride: by how many tokens windows move on; the context by default.

    Returns:
      The exit code.
    """
    if is_language_model(path):
        asked = Asked(text, compressed, prompt, chat, tokens, context, stride)
        return evaluate_language(path, asked)
    if text or prompt or chat or compressed is not None:
        raise ConfigError(
            f"{path} is no language model: give a GGUF file, or a folder with config.json and "
            "safetensors"
        )
    return _evaluate_run(path)


def _evaluate_run(workdir: Path) -> int:
    """Measure the artifact of a run again, and compare it with the run's results."""
    from compress_jax.report import Table, rich_table
    from compress_jax.search._divided import from_file, rules_of

    experiment, model, _, results = rebuilt(workdir)
    written = next(row for row in results["rows"] if row["name"] == results["chosen"])
    metric = experiment.task.metric
    # As the run measured it: over the mesh, if that divides it.
    file = workdir / "artifact.safetensors"
    chosen = next(each for each in experiment.candidates if each.name == results["chosen"])
    variables = from_file(experiment, file, rules_of(experiment, chosen))
    measured = {
        "test": _measured(experiment, model, variables, experiment.data.test),
        "validation": _measured(experiment, model, variables, experiment.data.validation),
        "nbytes": file.stat().st_size,
    }
    names = {
        "test": f"test {metric.name}",
        "validation": f"validation {metric.name}",
        "nbytes": "bytes on disk",
    }

    def cell(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else metric.text(value)

    rows = [(text, cell(measured[key]), cell(written[key])) for key, text in names.items()]
    console = stdout()
    table = Table(results["chosen"], ("", "measured now", "results.json"), tuple(rows))
    console.print(rich_table(table))
    # Exactly: the file, the data and the program are the same, so the numbers must be.
    if all(measured[key] == written[key] for key in names):
        console.print("the same")
        return 0
    console.print("[bold red]they differ[/]: the artifact, the data or the versions have changed")
    return 1


def _measured(
    experiment: "Experiment",
    model: "PureModel",
    variables: Variables,
    split: "Mapping[str, np.ndarray]",
) -> float:
    from compress_jax.search._divided import measured

    found = measured(experiment, model.apply, variables, split)
    return found.values[experiment.task.metric.name]


def rebuilt(workdir: Path) -> "tuple[Experiment, PureModel, PyTree, JsonObject]":
    """Return the experiment of a finished run, its model, its artifact and its results.

    The config that the run stored is executed, once its digest has been checked.

    Args:
      workdir: the folder.

    Returns:
      ``(experiment, model, packed variables, results)``; the artifact is of the model: the
      student's, or that which the candidate's method made of it.

    Raises:
      ConfigError: if a file of the folder is missing or damaged, or the code of the model has
        changed.
      ArtifactError: if the artifact is damaged, or is of another model.
    """
    from compress_jax.cli.parse import parse_config
    from compress_jax.cli.workdir import kept_config, read_run
    from compress_jax.export import load
    from compress_jax.report import read_results
    from compress_jax.search._automatic import read_proposals
    from compress_jax.search._ingredients import require_same_model
    from compress_jax.search._loop import labelled, with_proposals
    from compress_jax.search._method import rebuilt_model

    # The flags are parsed again, as arguments that are no JSON were stored as text.
    flags = read_run(workdir)["flags"]
    # The numbers are only shown beside what is measured, so a wrong digest does no harm.
    results = read_results(workdir, intact=False)
    file = workdir / "artifact.safetensors"
    config = kept_config(workdir)
    packed = load(file)[0]
    function = load_config(config)
    arguments, _ = parse_config(function, flags, f"compress-jax run {config}")
    experiment = with_proposals(build(function, arguments), read_proposals(results))
    model = rebuilt_model(experiment, file, results["chosen"])
    # A model that a rewrite made has no source; the artifact is then compared by shapes alone.
    if model.source is not None:
        require_same_model(workdir / "candidates" / results["chosen"], model.source)
    _require_fit(file, experiment, model, packed)
    return labelled(experiment, workdir), model, packed, results


def _require_fit(file: Path, experiment: "Experiment", model: "PureModel", packed: PyTree) -> None:
    """Check that a model can be called with an artifact's variables."""
    import jax

    from compress_jax.core import unpack

    try:
        jax.eval_shape(model.apply, unpack(packed), *experiment.example)
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ArtifactError(
            f"{file} does not fit the model of this run ({type(error).__name__}: {why})"
        ) from error


def export(
    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")],
    to: tuple[Target | Published, ...] = ("onnx",),
    compressed: Annotated[Path | None, tyro.conf.arg(metavar="ARTIFACT")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
    otherwise: Literal["F32", "F16"] | None = None,
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

    A language model, as eval takes it, is written with its tokenizer as llama.cpp or vLLM read it:

      compress-jax export model.gguf --compressed small.safetensors --to gguf --out small.gguf

    ONNX needs pip install 'compress_jax[onnx]', LiteRT pip install 'compress_jax[litert]'. With
    --activations int8 whole layers run in integers, calibrated on training data; the weights'
    scales must then be per tensor or channel.

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0
    every file passes, 1 an error, 4 a file fails: answers that differ too often from JAX's, or
    accuracy that is lost.

    Args:
      workdir: the folder of a finished run, or a language model.
      to: the runtimes; of a language model "gguf" or "hugging-face".
      compressed: a language model's params as compress_jax stores them.
      out: the file of a language model, or the folder of Hugging Face.
      otherwise: GGUF's type of packed leaves that are on no grid of GGUF; without it they are
        refused.
      activations: "int8" for integer inference (ONNX, LiteRT); "float" to compress the weights
        alone.
      calibrate: training examples that ranges of activations are measured on.
      batch: examples a call; LiteRT files run this size only.
      rounds: timed calls of each file.
      min_agreement: smallest share of test examples that are answered as in JAX.
      max_drop: largest loss of accuracy, or of the task's metric, against JAX; 0.01 is one point.

    Returns:
      The exit code.
    """
    from compress_jax.core import unpack
    from compress_jax.data._disk.stored import some
    from compress_jax.export import verify

    if is_language_model(workdir):
        if activations != "float":
            raise ConfigError(f"{workdir} is a language model: --activations is for runs")
        return export_language(workdir, Export(to, out, compressed, otherwise))
    targets = _targets(workdir, to, (compressed, out, otherwise))
    experiment, model, packed, _ = rebuilt(workdir)
    task = experiment.task
    data = experiment.data
    dense = unpack(packed)
    folder = workdir / "export"
    _make(folder)

    def fn(variables: Variables, *inputs: PyTree) -> PyTree:
        return model.apply(variables, *inputs)

    console = stdout()
    records: JsonObject = {}
    passed = True
    test = some(data.test, VERIFIED)
    if test is not data.test:
        console.print(ON_DISK)
    for target in targets:
        options = _options(target, activations, task, data.train, calibrate, batch)
        files = [folder / f"{name}{SUFFIX[target]}" for name in ("model", "float")]
        exported, sizes = _write_files(
            target, fn, (packed, dense), files, functools.partial(_inputs, task, data.train), batch,
            options,
        )  # fmt: skip
        verification = verify(
            exported.path,
            exported.simulation or functools.partial(fn, dense),
            _inputs(task, test),
            task=task,
            split=test,
            baseline=files[1],
            batch_sizes=sizes,
            rounds=rounds,
            min_agreement=min_agreement,
            max_drop=max_drop,
        )
        passed &= verification.passed
        sites = [row._asdict() for row in exported.rows]
        records[target] = {**verification.record(), "sites": sites}
        _print_export(target, exported, verification)
    return _report_exports(folder, records, passed)


def _targets(
    workdir: Path, to: Sequence[Target | Published], others: Sequence[object]
) -> list[Target]:
    """Return the runtimes that a run is exported to, each once; refuse what is for others."""
    targets: list[Target] = [x for x in dict.fromkeys(to) if x not in ("gguf", "hugging-face")]
    if len(targets) < len(set(to)) or any(x is not None for x in others):
        raise ConfigError(
            f"{workdir} is no language model, and --to gguf, --to hugging-face, --compressed, "
            "--out and --otherwise are for those"
        )
    return targets


def _report_exports(folder: Path, records: JsonObject, passed: bool) -> int:
    """Write the measurements of exports, and return the exit code."""
    from compress_jax.export import write_atomically

    write_atomically(folder / "export.json", f"{json.dumps(records, indent=1)}\n".encode())
    if passed:
        stdout().print("every file passes")
        return 0
    stdout().print("[bold red]a file fails[/]: see above; no claim should rest on it")
    return GATE


def _write_files(
    target: Target,
    fn: ModelFn,
    variables: tuple[PyTree, PyTree],
    files: Sequence[Path],
    inputs: Callable[[int], PyTree],
    batch: int,
    options: Mapping[str, object],
) -> "tuple[Exported, tuple[int, ...]]":
    """Write the artifact and the same model in float32.

    Args:
      target: the runtime.
      fn: ``(variables, *inputs) -> outputs``.
      variables: packed, and in float32.
      files: where each goes.
      inputs: the inputs of so many examples.
      batch: examples a call.
      options: of the first file.

    Returns:
      What was exported, and the examples a call that it can be timed with.
    """
    write = _writer(target)

    def both(example: PyTree, **fixed: str) -> "Exported":
        exported = write(fn, variables[0], example, files[0], **options, **fixed)
        write(fn, variables[1], example, files[1], **fixed)
        return exported

    try:
        return both(inputs(batch)), (1, batch)
    except ExportError as error:
        # The code of some models depends on the number of examples, which is then fixed.
        if "batch='example'" not in str(error):
            raise
    stdout().print(f"{target}: runs {FIXED} examples a call, as its code needs the number")
    return both(inputs(FIXED), batch="example"), (FIXED,)


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


def _writer(target: Target) -> "Callable[..., Exported]":
    from compress_jax.export import to_litert, to_onnx, to_stablehlo

    return {"onnx": to_onnx, "litert": to_litert, "stablehlo": to_stablehlo}[target]


def _inputs(task: "Task", split: "Mapping[str, np.ndarray]", examples: int | None = None) -> PyTree:
    """Return what the model is given of the first examples of a split: an array, or several."""
    inputs = task.inputs_of(task.prepare({name: x[:examples] for name, x in split.items()}))
    return inputs[0] if len(inputs) == 1 else inputs


def _options(
    target: Target,
    activations: str,
    task: "Task",
    split: "Mapping[str, np.ndarray]",
    calibrate: int,
    batch: int,
) -> dict[str, object]:
    """Return the options of a target's export."""
    if activations == "float" or target == "stablehlo":
        return {}
    from compress_jax.quantize._activations.static import static

    number = min(calibrate, len(next(iter(split.values()))))
    # Whole batches only, so that calibration is compiled once.
    batches = [
        _inputs(task, {name: x[i : i + batch] for name, x in split.items()})
        for i in range(0, max(number - batch + 1, 1), batch)
    ]
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


def report(
    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")],
    measure: bool = False,
) -> int:
    """Write report.html and report.md of a run: tables, charts and decisions.

    report.html is one file that needs nothing else; report.md has its pictures in WORKDIR/report/.
    For example

      compress-jax report runs/digits
      compress-jax report runs/digits --measure

    compress-jax run does the first at its end; nothing is trained or measured. The second runs
    teacher and artifact on test data and shows where their answers differ, and their activations;
    it executes WORKDIR/config.py, as Python code: use it on folders that you trust.

    Charts with hover and zoom need pip install 'compress_jax[report]'; without it the page has
    still pictures.

    Args:
      workdir: the folder of a finished run.
      measure: run the networks again, for their answers and activations.

    Returns:
      The exit code.
    """
    from compress_jax.report import write

    console = stdout()
    if measure:
        from compress_jax.cli._measured import measure_run

        measure_run(workdir)
    page = write(workdir, log_fn=lambda note: console.print(f"note: {shown(note)}"))
    console.print(shown(f"{page}\n{page.with_suffix('.md')}"))
    return 0
