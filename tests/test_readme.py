import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.slow
def test_the_config_of_own_arrays_and_an_own_model_runs(tmp_path):
    """In at most ten lines, from arrays to an artifact that is measured."""
    code = blocks()[0]
    assert code.split("def config")[1].strip().count("\n") <= 10
    seen = {}
    exec(compile(code, "README.md", "exec"), seen)
    result = cj.search.compress(seen["config"](steps=40), tmp_path, log_fn=lambda line: None)
    assert {"teacher", "student", "trained", "solved"} <= {row.name for row in result.rows}
    assert result.artifact.exists() and result.chosen.test > 0.5


@pytest.mark.slow
def test_the_example_trains_compresses_and_saves_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, first, *rest = blocks()
    seen = {}
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # a reader's process; optax's adam does not pass "strict"
        exec(compile(first, "README.md", "exec"), seen)
    view = cj.unpack(cj.load("model.safetensors")[0])
    exact = seen["compression"].view(seen["params"], seen["state"])
    for layer in ("layers_0", "layers_2"):
        np.testing.assert_array_equal(view[layer]["kernel"], exact[layer]["kernel"])
        assert (view[layer]["kernel"] == 0).sum() >= int(0.8 * view[layer]["kernel"].size)
    accuracy = (seen["model"].apply({"params": view}, seen["x"]).argmax(-1) == seen["y"]).mean()
    assert jnp.asarray(accuracy) > 0.6
    assert "no pattern matches" in capsys.readouterr().out

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in rest:
            exec(compile(code, "README.md", "exec"), seen)
    printed = capsys.readouterr().out
    assert (
        "layers_0/kernel (0,)" in printed and "total" in printed and len(printed.splitlines()) > 8
    )
    solved = seen["target"].view(seen["solved"].params, seen["solved"].state)
    np.testing.assert_array_equal(
        cj.unpack(seen["packed"])["layers_2"]["kernel"], solved["layers_2"]["kernel"]
    )


PAGES = sorted([*README.parent.glob("*.md"), *README.parent.glob("compress_jax/**/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_a_page_names_what_there_is(page):
    """Code parses, every `cj.name` exists under that name, and every link leads to a file."""
    text = page.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(textwrap.dedent(block), page.name, "exec")
    for name in set(re.findall(r"\bcj((?:\.\w+)+)", text)):
        found = cj
        for part in name.split(".")[1:]:
            assert part in dir(found), f"cj{name}: there is no {part}"
            found = getattr(found, part)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
