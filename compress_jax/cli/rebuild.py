"""A finished run's experiment and artifact again: the config it kept is executed, after it is seen to be the same."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_jax.cli.config import build, load_config
from compress_jax.core.errors import ArtifactError

if TYPE_CHECKING:
    from compress_jax.search import Experiment


def rebuilt(workdir: Path) -> "tuple[Experiment, Any, dict[str, Any]]":
    """Return the experiment of a finished run, its artifact and its results.

    Args:
      workdir: the folder.

    Returns:
      ``(experiment, packed variables, results)``; the artifact fits the student's model.

    Raises:
      ConfigError: if a file of the folder is missing or damaged, or the code of the model has changed.
      ArtifactError: if the artifact is damaged, or is of another model.
    """
    from compress_jax.cli.parse import parse_config
    from compress_jax.cli.workdir import kept_config, read_run
    from compress_jax.export import load
    from compress_jax.report import read_results
    from compress_jax.search.ingredients import ingredients
    from compress_jax.search.stage_record import require_same_model

    flags = read_run(workdir)["flags"]
    results = read_results(workdir, intact=False)  # its numbers are not used, but shown beside what is measured
    file, config = workdir / "artifact.safetensors", kept_config(workdir)
    packed = load(file)[0]
    function = load_config(config)
    experiment = build(function, parse_config(function, flags, f"compress-jax run {config}")[0])
    require_same_model(workdir / "candidates" / results["chosen"], ingredients(model=experiment.student.model))
    _require_fit(file, experiment, packed)
    return experiment, packed, results


def _require_fit(file: Path, experiment: "Experiment", packed: Any) -> None:
    """See that the student's model can be called with an artifact's variables."""
    import jax

    from compress_jax.core import unpack

    image, apply = experiment.data.test["image"], experiment.student.model.apply
    try:
        jax.eval_shape(apply, unpack(packed), jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype))
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ArtifactError(f"{file} does not fit the model of this run ({type(error).__name__}: {why})") from error
