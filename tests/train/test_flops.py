"""The FLOPs of a step by its parts, counted by hand; utilization of known and unknown devices."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError
from compress_jax.train import _chips, _speed

ROWS, WIDTH, VOCABULARY = 8, 6, 32


def two_layers(params, x, remat=False):
    """Embed nothing, multiply twice, then a head: ``[rows, width] -> [rows, vocabulary]``."""

    def body(x, kernel):
        return jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, params["layers"])
    return x @ params["head"]


def prepared(terms, remat=False, compression=None, microbatches=1):
    """Return a step with its arguments, and the FLOPs of one forward pass of a model."""

    def init(key, x):
        layers = jax.random.normal(key, (2, WIDTH, WIDTH))
        return {"layers": layers, "head": jnp.ones((WIDTH, VOCABULARY))}

    def apply(params, x):
        return two_layers(params, x, remat)

    compression = compression or cj.identity()
    batch = {
        "image": np.ones((ROWS, WIDTH), np.float32),
        "label": np.arange(ROWS, dtype=np.int32),
    }
    variables = {"params": init(jax.random.key(0), None)}
    teacher = cj.distill.Teacher(lambda v, x: two_layers(v["params"], x), variables)
    loss = cj.train.distillation((init, apply), terms)
    optimizer = optax.adam(1e-2)
    aux = loss.init(jax.random.key(1), variables, batch, teacher)
    state = cj.train.create(variables, compression, optimizer, jax.random.key(2), aux)
    step = cj.train.make_step(loss, optimizer, compression, microbatches=microbatches)
    body = 2 * ROWS * 2 * WIDTH * WIDTH
    head = 2 * ROWS * WIDTH * VOCABULARY
    return step, state, batch, teacher, body, head


KL = cj.distill.on_logits(cj.distill.kl)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_flops_of_a_step_are_those_counted_by_hand(microbatches):
    step, state, batch, teacher, body, head = prepared([KL], microbatches=microbatches)
    found = cj.train.step_flops(jax.jit(step), state, batch, teacher=teacher)
    assert found.parts["teacher"] == found.parts["student forward"] == body + head
    # The first layer's input needs no gradient; a scan computes it all the same.
    assert found.parts["student backward"] == 2 * (body + head)
    assert found.model == 4 * (body + head)
    assert found.total == found.model and found.share("teacher") == 0.25


def test_what_remat_computes_again_is_no_work_of_the_model():
    step, state, batch, teacher, body, head = prepared([KL], remat=True)
    found = cj.train.step_flops(jax.jit(step), state, batch, teacher=teacher)
    assert 0 < found.parts["recomputed"] <= body
    assert found.model == 4 * (body + head) < found.total


def test_products_over_the_vocabulary_are_of_the_loss_and_of_the_models():
    terms = [cj.distill.on_vocabulary(chunk=VOCABULARY // 2)]
    step, state, batch, teacher, body, head = prepared(terms)
    found = cj.train.step_flops(jax.jit(step), state, batch, teacher=teacher)
    assert found.parts["teacher"] == found.parts["student forward"] == body
    # Both heads in the forward pass, both again in the backward pass, and two gradients.
    assert found.parts["loss"] == pytest.approx(6 * head, rel=0.1)
    assert found.model == 4 * (body + head)


def test_a_compression_seen_inside_the_loop_changes_no_flops_of_the_model():
    compression = cj.at("layers", cj.quantize.uniform(4, granularity="channel"))
    step, state, batch, teacher, body, head = prepared([KL], compression=compression)
    found = cj.train.step_flops(jax.jit(step), state, batch, teacher=teacher)
    assert found.model == 4 * (body + head)
    assert "teacher" in str(found) and "25.0%" in str(found)


def test_profiles_show_the_parts_of_a_step_by_name():
    compression = cj.at("head", cj.chain(cj.prune.magnitude(0.5), cj.quantize.lsq(4)))
    step, state, batch, teacher, *_ = prepared([KL], compression=compression)
    program = jax.jit(step).lower(state, batch, teacher=teacher).compile().as_text()
    for name in ("teacher", "student", "view", "loss", "optimizer", "compression_update"):
        assert f"({name})" in program or f"/{name}/" in program, name


def test_a_choice_of_branches_counts_the_largest_and_unused_products_nothing():
    def fn(i, x):
        return jax.lax.switch(i, [lambda x: x @ x, lambda x: x @ x @ x], x)

    made = jax.make_jaxpr(fn)(0, jnp.ones((3, 3)))
    assert sum(cj.trace.products_by_scope(made).macs.values()) == 2 * 27
    unused = jax.make_jaxpr(lambda x: (x @ x, x)[1])(jnp.ones((3, 3)))
    assert cj.trace.products_by_scope(unused).macs == {}


def trained(folder, step, state, batch, teacher, **options):
    cj.train.fit(
        step, state, [batch] * 4, steps=4, directory=folder, log_every=2, teacher=teacher, **options
    )
    lines = (folder / "speed.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_training_is_traced_once_and_tells_its_flops(tmp_path, capsys):
    step, state, batch, teacher, body, head = prepared([KL])
    traces = []

    def counted(state, batch, teacher=None):
        traces.append(1)
        return step(state, batch, teacher=teacher)

    compiled = jax.jit(counted)
    lines = trained(tmp_path, compiled, state, batch, teacher, tokens=lambda batch: 3)
    assert len(traces) == 1
    for line in lines:
        steps = line["speed/steps_per_second"]
        assert line["speed/tokens_per_second"] == pytest.approx(3 * steps)
        assert line["speed/model_flops_per_second"] == pytest.approx(4 * (body + head) * steps)
        # A CPU is in no table: nothing is made up.
        assert "speed/utilization" not in line
    said = capsys.readouterr().err
    assert "tokens a second" in said and "FLOP/s of the models" in said and "peak" not in said


def test_utilization_is_a_share_of_the_peak_of_all_devices(tmp_path, capsys):
    step, state, batch, teacher, *_ = prepared([KL])
    mesh = cj.train.make_mesh()
    compiled = cj.train.jit_step(step, mesh, state)
    with cj.train.peak_flops(1e9):
        lines = trained(tmp_path, compiled, cj.train.place(state, mesh), batch, teacher)
    for line in lines:
        share = line["speed/model_flops_per_second"] / (1e9 * jax.device_count())
        assert line["speed/utilization"] == pytest.approx(share)
    assert "of the devices' peak" in capsys.readouterr().err


def test_the_peak_is_known_of_the_chips_in_the_table_and_of_no_others():
    assert set(_chips.KINDS.values()) == set(_chips.CHIPS)
    assert _chips.peak_of({"w": jnp.ones(2)}) is None  # a CPU
    for wrong in (0, -1.0, float("inf"), "fast"):
        with pytest.raises(ArgumentError), cj.train.peak_flops(wrong):
            pass


def test_a_step_that_cannot_be_counted_trains_and_says_so_once(tmp_path, caplog, monkeypatch):
    def broken(*args, **options):
        raise TypeError("a trace of tomorrow")

    monkeypatch.setattr(_speed, "step_flops", broken)
    step, state, batch, teacher, *_ = prepared([KL])
    with caplog.at_level(logging.WARNING):
        lines = trained(tmp_path, jax.jit(step), state, batch, teacher)
    assert [line["step"] for line in lines] == [2, 4]
    assert "speed/model_flops_per_second" not in lines[0]
    assert sum("FLOPs of a step are unknown" in text for text in caplog.messages) == 1
