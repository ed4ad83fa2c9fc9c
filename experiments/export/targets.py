"""Every model through every target.

What the files answer, how large they are, how fast they run beside float32.

python experiments/export/targets.py --model mlp --data DIR

One model takes one to five minutes on 2 cores. Needs pip install 'compress_jax[onnx,litert]'.
Models that classify images are trained for a few steps on a part of Fashion-MNIST, so that their
answers mean something; the times do not depend on it. DIR holds ``fashion_mnist`` with its four
files.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import compress_jax as cj
from compress_jax.core.errors import ExportError
from compress_jax.export._extras import extra
from compress_jax.export._verify.verify import interleaved, runner
from compress_jax.models import DSCNN, Bert, BertClassifier, LeNet5, LeNet300100, ResNet, ViT
from compress_jax.quantize._activations.static import static

RESULTS = Path(__file__).parent / "results"
MODELS = {  # the model and its training steps
    "mlp": (LeNet300100(hidden=(1024, 1024)), 200),
    "resnet20": (ResNet(depth=20, width=16), 40),
    "lenet5": (LeNet5(), 200),
    "ds_cnn": (DSCNN(classes=10), 40),
    "vit": (ViT(), 0),
    "bert_tiny": (BertClassifier(Bert(vocabulary=30_522, width=128, depth=2, heads=2)), 0),
}


def fashion(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = cj.data.load("fashion_mnist")
    order = np.random.default_rng(seed).permutation(len(data.train["label"]))[:8192]
    return (
        data.train["image"][order],
        data.train["label"][order],
        data.test["image"][:2048],
        data.test["label"][:2048],
    )


def trained(model: Any, images: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Any:
    variables = jax.jit(model.init)(jax.random.key(seed), images[:2])
    optimizer = optax.adam(1e-3)
    params, rest = (
        variables["params"],
        {key: value for key, value in variables.items() if key != "params"},
    )

    @jax.jit
    def step(params: Any, rest: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            out, new = model.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), {**rest, **new}, state

    state = optimizer.init(params)
    for i in range(steps):
        at = (64 * i) % (len(images) - 64)
        params, rest, state = step(params, rest, state, images[at : at + 64], labels[at : at + 64])
    return {"params": params, **rest}


def onnx_runtimes_own(plain: Path, file: Path, batches: list[np.ndarray]) -> None:
    """Quantize the float file with ONNX Runtime's own quantizer.

    Static QDQ, uint8 activations, int8 weights a channel.
    """
    quantization = extra("onnxruntime.quantization", "onnx")
    feeds = iter([{"x": x} for x in batches])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(feeds, None)

    ready = plain.with_suffix(".ready.onnx")
    extra("onnxruntime.quantization.shape_inference", "onnx").quant_pre_process(
        str(plain), str(ready)
    )
    kinds = quantization.QuantType
    quantization.quantize_static(
        str(ready),
        str(file),
        Reader(),
        per_channel=True,
        activation_type=kinds.QUInt8,
        weight_type=kinds.QInt8,
    )


def beside(ours: Path, theirs: Path, x: np.ndarray, rounds: int) -> str:
    """Return the median ratio of their time to ours at batch 64 on one thread, with quartiles."""
    times = interleaved({"ours": runner(ours, 1), "theirs": runner(theirs, 1)}, [x], rounds)
    low, middle, high = statistics.quantiles(
        (b / a for a, b in zip(times["ours"], times["theirs"], strict=True)), n=4
    )
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def study(
    name: str, seed: int, rounds: int, targets: list[str], weights: str
) -> list[dict[str, Any]]:
    model, steps = MODELS[name]
    if name == "bert_tiny":
        tokens = np.random.default_rng(seed).integers(0, 30_522, (576, 64)).astype(np.int32)
        train, test, labels = tokens[:512], tokens[512:], None
        variables = jax.jit(model.init)(jax.random.key(seed), train[:2])
    else:
        train, train_labels, test, labels = fashion(seed)
        variables = trained(model, train, train_labels, steps, seed)
        labels = labels if steps else None
    test = test if steps else test[:256]
    fn = lambda variables, x: model.apply(variables, x)  # noqa: E731
    example, batches = train[:64], [train[i : i + 64] for i in range(0, 512, 64)]
    patterns = "**/kernel"
    int4, int8 = (
        cj.at(patterns, cj.quantize.uniform(b, granularity=g))
        for b, g in ((4, "channel"), (8, "channel"))
    )
    packed4, packed8 = (c.pack(variables, c.init(variables)) for c in (int4, int8))
    uint8 = static(bits=8, symmetric=False)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def measured(
            target: str,
            form: str,
            write: Any,
            params: Any,
            suffix: str,
            baseline: Path | None,
            **options: Any,
        ) -> Path:
            if target not in targets:
                return Path()
            file = folder / f"{target}-{form.replace(' ', '-')}{suffix}"
            start = time.perf_counter()
            try:
                done = write(fn, params, example, file, **options)
            except ExportError as error:
                rows.append({"target": target, "form": form, "failed": str(error)[:300]})
                print(rows[-1], flush=True)
                return file
            reference = done.simulation or (lambda x: fn(cj.unpack(params), x))
            found = cj.export.verify(
                file, jax.jit(reference), test, labels, baseline=baseline, rounds=rounds
            )
            seconds = round(time.perf_counter() - start, 1)
            rows.append({"target": target, "form": form, **found.record(), "seconds": seconds})
            print(f"{name} {target} {form}\n{found}", flush=True)
            return file

        onnx = measured("onnx", "float32", cj.export.to_onnx, variables, ".onnx", None)
        given = {"how": uint8, "batches": batches}
        ours = measured(
            "onnx",
            f"static {weights}",
            cj.export.to_onnx,
            packed8,
            ".onnx",
            onnx,
            weights=weights,
            **given,
        )
        if ours.is_file():
            theirs = folder / "theirs.onnx"
            onnx_runtimes_own(onnx, theirs, batches)
            rows[-1]["onnx_runtimes_own_over_ours"] = beside(ours, theirs, example, rounds)
            own = cj.export.verify(theirs, lambda x: fn(variables, x), test, labels, batch_sizes=())
            rows[-1] |= {
                "onnx_runtimes_own_bytes": own.nbytes,
                "onnx_runtimes_own_accuracy": own.accuracy,
            }
            print(
                "ONNX Runtime's own quantizer: time over ours",
                rows[-1]["onnx_runtimes_own_over_ours"],
                flush=True,
            )
        measured("onnx", "4-bit weights", cj.export.to_onnx, packed4, ".onnx", onnx)
        lite = measured("litert", "float32", cj.export.to_litert, variables, ".tflite", None)
        measured("litert", "static int8", cj.export.to_litert, packed8, ".tflite", lite, **given)
        measured("litert", "dynamic int4", cj.export.to_litert, packed4, ".tflite", lite)
        hlo = measured(
            "stablehlo", "float32", cj.export.to_stablehlo, variables, ".stablehlo", None
        )
        measured("stablehlo", "4-bit weights", cj.export.to_stablehlo, packed4, ".stablehlo", hlo)
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> str:
    head = [
        "target",
        "form",
        "bytes",
        "agreement",
        "accuracy (JAX)",
        "batch, threads: speed-up over float32",
    ]
    lines = [f"## {name}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['target']} | {row['form']} | failed: {row['failed']} | | | |")
            continue
        speeds = ", ".join(
            f"{t['batch']}, {t['threads']}: {t['speedup']:.2f}x"
            for t in row["timings"]
            if t["baseline"] == t["baseline"]
        )
        accuracy = (
            f"{100 * row['accuracy']:.2f} ({100 * row['reference']:.2f})"
            if row["accuracy"] == row["accuracy"]
            else ""
        )
        beside = row.get("onnx_runtimes_own_over_ours")
        extra_ = f"; ONNX Runtime's own quantizer: {beside} of our time at 64, 1" if beside else ""
        cells = [
            row["target"],
            row["form"],
            f"{row['nbytes']:,}",
            f"{100 * row['agreement']:.2f} %",
            accuracy,
            speeds + extra_,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data", help="folder that holds fashion_mnist/")
    parser.add_argument("--seed", type=int, default=0)
    every = ["onnx", "litert", "stablehlo"]
    parser.add_argument("--targets", nargs="+", choices=every, default=every)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--weights",
        choices=["int8", "uint8"],
        default="int8",
        help="of static ONNX; uint8 without VNNI",
    )
    chosen = parser.parse_args()
    if chosen.data:
        os.environ["COMPRESS_JAX_DATA"] = chosen.data
    rows = study(chosen.model, chosen.seed, chosen.rounds, chosen.targets, chosen.weights)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    where = (
        f"{os.cpu_count()} cores, {platform.machine()}, VNNI {'yes' if 'vnni' in flags else 'no'}"
    )
    note = f"{time.strftime('%Y-%m-%d')}, seed {chosen.seed}, {where}"
    note += f", load {os.getloadavg()[1]:.1f}, jax {jax.__version__}"
    text = table(chosen.model, rows) + f"\n{note}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{chosen.model}.md").write_text(text)
    (RESULTS / f"{chosen.model}.json").write_text(
        json.dumps({"note": note, "rows": rows}, indent=1, default=str) + "\n"
    )


if __name__ == "__main__":
    main()
