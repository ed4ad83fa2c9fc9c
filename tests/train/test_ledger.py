import jax
import jax.numpy as jnp
import optax
import pytest

from compress_jax.distill import Teacher, capture, hint, kl, linear, on_features, on_logits
from compress_jax.models import LeNet300100
from compress_jax.train import ledger


@pytest.mark.slow
def test_flops_are_those_of_the_matrix_products_and_pieces_add_up():
    student, large = LeNet300100(hidden=(64,)), LeNet300100(hidden=(256,))
    batch = {"image": jnp.ones((128, 100)), "label": jnp.zeros(128, jnp.int32)}
    teacher = Teacher(capture(large, ("dense_0",)), large.init(jax.random.key(0), batch["image"]))
    terms = [on_logits(kl), on_features(hint, "dense_0", "dense_0", adapter=linear())]
    variables = student.init(jax.random.key(1), batch["image"])
    book = ledger(student, terms, variables, batch, teacher, optax.sgd(0.1), repeats=1)
    assert abs(book.flops["teacher"] / (2 * 128 * 256 * (100 + 10)) - 1) < 0.1
    products = 2 * 128 * 64 * (2 * 100 + 3 * 10)  # no gradient to the images
    assert abs(book.flops["student"] / products - 1) < 0.2
    assert book.flops["loss"] > 2 * 3 * 128 * 64 * 256  # the regressor, forward and backward
    for pieces in (book.seconds, book.flops):
        assert (
            abs(pieces["teacher"] + pieces["student"] + pieces["loss"] - pieces["whole"])
            <= 1e-6 * pieces["whole"]
        )
    assert book.share("whole") == (1.0, 1.0) and "| teacher |" in str(book)
