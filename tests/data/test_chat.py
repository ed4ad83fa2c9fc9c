"""Chat templates are programs of others: they render what their models expect, and nothing else."""

import datetime

import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError

# As SmolLM2 and Qwen write conversations.
CHATML = """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_is_written_as_the_model_expects():
    wanted = "<|im_start|>user\nHello<|im_end|>\n\n"
    assert cj.data.chat(CHATML, HELLO, answer=False) == wanted
    assert cj.data.chat(CHATML, HELLO) == f"{wanted}<|im_start|>assistant\n\n"


def test_names_and_dates_are_those_that_are_given():
    template = "{{ bos_token }}{{ strftime_now('%Y') if strftime_now is defined else 'undated' }}"
    assert cj.data.chat(template, HELLO) == "undated"
    day = datetime.date(2026, 12, 1)
    assert cj.data.chat(template, HELLO, today=day, bos_token="<s>") == "<s>2026"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'x' * (2 ** 21) }}",
        "{{ 1 // 0 }}",
        "{% if %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[7].content.nothing }}",
    ],
)
def test_what_a_template_must_not_do_is_one_sentence(template):
    with pytest.raises(DataError, match="chat template"):
        cj.data.chat(template, HELLO)


def test_what_a_template_refuses_is_the_callers():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ArgumentError, match="roles must alternate"):
        cj.data.chat(template, HELLO)
    with pytest.raises(ArgumentError, match="'role'"):
        cj.data.chat(CHATML, [{"content": "Hello"}])


def test_special_tokens_of_a_template_are_those_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs compress_jax[text]")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["Hello user"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = cj.data.load_tokenizer(tmp_path)
    template = cj.data.ChatTemplate("{{ bos_token }}" + CHATML, {"bos_token": "<s>"})
    text = cj.data.chat(template, HELLO)
    # The library itself reads the names of special tokens as those tokens.
    assert ours.encode([text], special=True)[0] == made.encode(text).ids
    assert ours.encode([text], special=True)[0][:2] == [0, 1]
    # A user's text that spells one out stays text.
    assert 1 not in ours.encode(["<|im_start|>"])[0]


def test_word_pieces_read_their_own_names():
    tokenizer = cj.data.train_tokenizer(["to be or not to be"], 30)
    number = tokenizer.pieces.index("[SEP]")
    found = tokenizer.encode(["to[SEP]be"], special=True)[0]
    to, be = tokenizer.encode(["to", "be"])
    assert found == [*to, number, *be]
    assert number not in tokenizer.encode(["to[SEP]be"])[0]
