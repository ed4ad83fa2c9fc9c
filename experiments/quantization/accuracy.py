"""Accuracy after post-training quantization and after quantization-aware training.

Beside Qwix, with equal budgets.

pip install '.[bench]'
python experiments/quantization/accuracy.py digits
python experiments/quantization/accuracy.py fashion_mnist --seeds 1

LeNet-300-100; every layer is quantized, first and last too, weights per output channel. Everybody
starts from the same float network of a seed and sees the same batches in the same order, as often,
with the same optimizer and rate. Nothing is chosen: every method and rule that was run is a row.
Test accuracy is measured once for each row.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import qwix  # pyright: ignore[reportMissingImports]

import compress_jax as cj
from compress_jax.data import Data, batches, load
from compress_jax.models import LeNet300100
from compress_jax.train import accuracy, create, label_optimizer, make_step, supervised

RESULTS = Path(__file__).parent / "results"
FORMATS = {"W4A4": (4, 4), "W2A16": (2, None), "W8A8": (8, 8), "W4A16": (4, None)}


class Study(NamedTuple):
    """A network and the budget everybody has.

    Steps in float and under quantization, examples to calibrate with.
    """

    model: Any
    float_steps: int
    qat_steps: int
    batch_size: int
    calibration: int


STUDIES = {
    "digits": Study(LeNet300100(), 1000, 300, 64, 512),
    "fashion_mnist": Study(LeNet300100(), 1500, 400, 128, 1024),
}


class Method(NamedTuple):
    """A way to quantize: a model to run, a compression its params are seen through.

    And what it does before training.

    Attributes:
      library: ours or Qwix.
      name: of the rule.
      model: with Linen's ``apply``.
      compression: what the params are seen through.
      calibrate: ``(variables, examples) -> variables``, without labels or gradients.
    """

    library: str
    name: str
    model: Any
    compression: cj.Compression
    calibrate: Callable[[Any, Any], Any] = lambda variables, examples: variables


def of_ours(model: Any, bits: int, act_bits: int | None) -> Iterator[Method]:
    """Yield ranges of least squared error, those of weights searched again every 100 steps.

    And learned steps.
    """
    least = cj.at(
        "**/kernel",
        cj.every(100, cj.quantize.uniform(bits=bits, granularity="channel", scale="mse")),
    )
    steps = cj.at("**/kernel", cj.quantize.lsq(bits, "channel", start=cj.quantize.mse))
    if act_bits is None:
        yield Method("ours", "mse", model, least)
        yield Method("ours", "LSQ", model, steps)
        return
    static = cj.train.quantized(model, cj.quantize.static(act_bits, symmetric=False, range="mse"))
    learned = cj.train.quantized(model, cj.quantize.lsq_inputs(act_bits))
    yield Method(
        "ours",
        "mse, static mse",
        static,
        least,
        lambda variables, x: static.calibrate(variables, [x]),
    )
    yield Method(
        "ours", "LSQ", learned, steps, lambda variables, x: learned.calibrate(variables, [x])
    )


def of_qwix(model: Any, bits: int, act_bits: int | None) -> Iterator[Method]:
    """Yield Qwix's provider for training, with two of its rules.

    Activations by their own range, call by call.
    """
    for rule in ("absmax", "rms,2.0" if bits == 2 else "rms,3.0"):
        inputs = (
            {}
            if act_bits is None
            else {"act_qtype": f"int{act_bits}", "act_calibration_method": "absmax"}
        )
        rules = qwix.QtRule(
            module_path=".*", weight_qtype=f"int{bits}", weight_calibration_method=rule, **inputs
        )
        seen = qwix.quantize_model(model, qwix.QtProvider([rules]))
        yield Method(
            "Qwix", rule if act_bits is None else f"{rule}, dynamic absmax", seen, cj.identity()
        )


class Trainer:
    """Adam with a cosine over some steps.

    Compiled once for all seeds. Batches are a function of the seed alone.
    """

    def __init__(
        self, study: Study, model: Any, compression: cj.Compression, steps: int, rate: float
    ) -> None:
        """Build the step."""
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        self.optimizer, self.compression = label_optimizer(optimizer, optimizer), compression
        self.step = jax.jit(
            make_step(supervised(model), self.optimizer, compression), donate_argnums=0
        )
        self.steps, self.batch_size = steps, study.batch_size

    def __call__(self, data: Data, variables: Any, seed: int) -> Any:
        """Return the variables after training, seen through the compression."""
        variables = jax.tree.map(lambda x: x.copy(), variables)  # the step takes what it is given
        state = create(variables, self.compression, self.optimizer, jax.random.key(seed))
        feed = batches(data.train, self.batch_size, seed=seed)
        for index in range(self.steps):
            state, _ = self.step(state, feed[index])
        return state.variables(self.compression)


def after_calibration(method: Method, data: Data, calibrated: Any) -> float:
    """Return the test accuracy before any training."""
    compression = method.compression
    seen = compression.view(calibrated["params"], compression.init(calibrated["params"]))
    return accuracy(method.model.apply, {**calibrated, "params": seen}, data.test)


def starts(study: Study, data: Data, seeds: int) -> list[Any]:
    """Return the float networks, one a seed."""
    train = Trainer(study, study.model, cj.identity(), study.float_steps, 1e-3)
    init = jax.jit(study.model.init)
    return [
        train(data, init(jax.random.key(seed), data.train["image"][:1]), seed)
        for seed in range(seeds)
    ]


def measure(
    study: Study, data: Data, method: Method, networks: list[Any]
) -> list[tuple[float, float]]:
    """Return for each seed the test accuracy after calibration alone.

    And after training from the float network on.
    """
    train = Trainer(study, method.model, method.compression, study.qat_steps, 2e-4)
    found = []
    for seed, variables in enumerate(networks):
        calibrated = method.calibrate(variables, data.train["image"][: study.calibration])
        before = after_calibration(method, data, calibrated)
        trained = train(data, calibrated, seed + 1000)
        found.append((before, accuracy(method.model.apply, trained, data.test)))
    return found


def percent(values: list[float]) -> str:
    """Return mean and, of several, standard deviation in percent."""
    spread = f" +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def write(
    name: str, float_accuracy: list[float], measured: str, rows: list[dict[str, Any]]
) -> None:
    """Write what is measured so far of a format beside what is known of the others."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    known = json.loads(file.read_text()) if file.exists() else {"float": float_accuracy, "rows": []}
    if known["float"] != float_accuracy:
        raise SystemExit(f"{file} holds rows of other float networks: remove it")
    table = [row for row in known["rows"] if row["format"] != measured] + rows
    table.sort(key=lambda row: [*FORMATS].index(row["format"]))
    file.write_text(json.dumps({"float": float_accuracy, "rows": table}, indent=1) + "\n")
    lines = [
        "| format | library | rule | after calibration | after training |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| float | | | {percent(float_accuracy)} | |"]
    for row in table:
        ends = [percent([pair[i] for pair in row["accuracy"]]) for i in (0, 1)]
        lines.append(
            f"| {row['format']} | {row['library']} | {row['rule']} | {ends[0]} | {ends[1]} |"
        )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure every row over the seeds and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=[*FORMATS], help="rows of others are kept"
    )
    args = parser.parse_args()
    study, data = STUDIES[args.data], load(args.data)
    networks = starts(study, data, args.seeds)
    exact = [accuracy(study.model.apply, variables, data.test) for variables in networks]
    print(f"float {percent(exact)}", flush=True)
    for name in args.formats:
        rows = []
        for method in (
            *of_ours(study.model, *FORMATS[name]),
            *of_qwix(study.model, *FORMATS[name]),
        ):
            try:
                found = measure(study, data, method, networks)
            except jax.errors.JaxRuntimeError as error:
                print(name, method.library, method.name, str(error).splitlines()[0], flush=True)
                continue
            rows.append(
                {"format": name, "library": method.library, "rule": method.name, "accuracy": found}
            )
            print(
                name,
                method.library,
                method.name,
                *(percent([pair[i] for pair in found]) for i in (0, 1)),
                flush=True,
            )
            write(args.data, exact, name, rows)


if __name__ == "__main__":
    main()
