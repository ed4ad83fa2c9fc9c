import numpy as np
import pytest
import tensorflow_datasets as tfds

from compress_jax.core.errors import DataError
from compress_jax.data import TextData, from_tfds

PARTS = ("train", "validation", "test")


class TinySentences(tfds.core.GeneratorBasedBuilder):
    """A set as SST-2 is: texts, classes, a test split with hidden labels, and one more split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["bad", "good"]),
                "idx": np.int32,
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        parts = {"train": 50, "validation": 12, "test": 12, "unsupervised": 3}
        return {part: self._generate_examples(part, n) for part, n in parts.items()}

    def _generate_examples(self, part, n):
        rng = np.random.default_rng(len(part))
        for i in range(n):
            text = " ".join(f"w{k}" for k in rng.integers(0, 200, 9)) + " é"
            yield i, {"sentence": text, "label": -1 if part == "test" else i % 2, "idx": i}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Two columns of texts, no splits but train."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        texts = {"a": tfds.features.Text(), "b": tfds.features.Text()}
        features = tfds.features.FeaturesDict({**texts, "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            yield i, {"a": f"number {i * i}", "b": f"other {i}", "label": i % 3}


def test_texts_of_tfds_are_tokenized_and_hidden_labels_are_told(tmp_path):
    data = from_tfds("tiny_sentences", data_dir=tmp_path, length=16)
    assert isinstance(data, TextData) and data.tokenizer is not None
    assert (data.name, data.classes, data.names) == ("tiny_sentences", 2, ("bad", "good"))
    assert len(data.test["label"]) == 12  # that of validation
    assert len(data.train["label"]) + len(data.validation["label"]) == 50
    notes = " ".join(data.notes)
    for expected in ("'unsupervised' is left out", "hidden (-1)", "not used:", "validation: cut"):
        assert expected in notes
    again = from_tfds("tiny_sentences", data_dir=tmp_path, length=16)
    assert again.fingerprint == data.fingerprint


def test_one_of_several_columns_of_texts_must_be_named(tmp_path):
    with pytest.raises(DataError, match=r"\['a', 'b'\] are texts; say which is meant: text='a'"):
        from_tfds("tiny_pairs", data_dir=tmp_path)
    data = from_tfds("tiny_pairs", data_dir=tmp_path, text="b", length=8)
    assert sum(len(getattr(data, part)["label"]) for part in PARTS) == 40


def test_damaged_data_are_named(tmp_path):
    from_tfds("tiny_pairs", data_dir=tmp_path, text="b", length=8)
    (shard,) = (tmp_path / "tiny_pairs" / "1.0.0").glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(DataError, match="tiny_pairs/1.0.0 cannot be read"):
        from_tfds("tiny_pairs", data_dir=tmp_path, text="b")


def test_without_network_one_sentence_says_so_at_once(offline, tmp_path):
    with pytest.raises(
        DataError, match="ag_news_subset is not prepared in .*there is no connection"
    ):
        from_tfds("ag_news_subset", data_dir=tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="TFDS cannot build 'no_such_data'"):
        from_tfds("no_such_data", data_dir=tmp_path)
