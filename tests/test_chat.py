"""Conversations: the chat template, and which of its tokens are trained on."""

import json
import os
import warnings
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import WORDS, make_tokenizer, save_model
from transformers import AutoTokenizer

from kronsae.cache import CacheActivations
from kronsae.config import DataConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.amount import count_tokens
from kronsae.data.chat import ChatTemplate
from kronsae.data.packing import READ_ONLY, Packer, token_ids, token_mask
from kronsae.data.text import open_text
from kronsae.embedded import embedded_model_path
from kronsae.errors import InputError, Notice
from kronsae.harvest import main as harvest
from kronsae.train import main as train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)
TRIMMED = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.first and s %}<<SYS>>{{ s }}<</SYS>> {% endif %}"
    "{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}"
    "{% endfor %}"
)
WITHOUT_THOUGHTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}<|end|>{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system message here') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% endfor %}"
)
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + TRIMMED


def message(role, content):
    return {"role": role, "content": content}


TALK = [
    message("system", "You are x."),
    message("user", "user\nWhat is assistant?"),
    message("assistant", "A: <b>it</b>"),
    message("user", " is it "),
    message("assistant", "é∑ yes"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())


def trained_text(tokenizer, template, messages, roles="assistant"):
    """The parts of a rendered conversation that are trained on, as text."""
    tokenizer.chat_template = template
    ids, kept = ChatTemplate(tokenizer, roles).tokens(messages)
    parts, before = [], False
    for token, keep in zip(ids, kept, strict=True):
        if keep and not before:
            parts.append([])
        if keep:
            parts[-1].append(token)
        before = keep
    return [tokenizer.decode(part) for part in parts]


ASSISTANT = ["A: <b>it</b>", "é∑ yes"]


@pytest.mark.parametrize("template", [CHATML, TRIMMED, LLAMA2], ids=["chatml", "trimmed", "llama2"])
def test_content_is_told_from_the_templates_own_tokens(tokenizer, template):
    found = [part.strip() for part in trained_text(tokenizer, template, TALK)]
    assert found == ASSISTANT
    users = [part.strip() for part in trained_text(tokenizer, template, TALK, "user, system")]
    assert [part.strip("> ") for part in users] == [
        "You are x.",
        "user\nWhat is assistant?",
        "is it",
    ]
    assert len(trained_text(tokenizer, template, TALK, "")) == 5
    assert trained_text(tokenizer, template, TALK, "tool") == []


def test_what_the_template_cuts_from_a_content(tokenizer):
    messages = [message("user", "a"), message("assistant", "<think>x</think>one")]
    messages += [message("user", "b"), message("assistant", "<think>y</think>two")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained_text(tokenizer, WITHOUT_THOUGHTS, messages)
    assert found == ["one", "<think>y</think>two"]


def test_a_rendered_text_does_not_depend_on_the_day(tokenizer):
    tokenizer.chat_template = DATED
    ids, _ = ChatTemplate(tokenizer).tokens([message("user", "hi")])
    assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_a_conversation_that_the_template_refuses_is_left_out(tokenizer):
    tokenizer.chat_template = STRICT
    packer = Packer(tokenizer, 4, chat_roles="user")
    with pytest.warns(Notice, match="left out.*no system message here"):
        assert not list(packer.add(TALK)) and not packer.waiting
    assert list(packer.add(TALK[1:]))


def test_no_template_no_offsets(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        list(Packer(tokenizer, 8).add(TALK))

    class Slow:
        chat_template, is_fast = CHATML, False

    with pytest.raises(InputError, match="does not say where in a text"):
        ChatTemplate(Slow())


def test_a_long_conversation_is_rendered_as_a_whole(tokenizer):
    tokenizer.chat_template = CHATML
    talk = [message("user", "word " * 60_000), message("assistant", "the end")]
    packer = Packer(tokenizer, 64, chat_roles="assistant")
    contexts = [*packer.add(talk)]
    tokens = [*[t for c in contexts for t in c.tolist()], *packer.waiting]
    trained = [token for token in tokens if token < READ_ONLY]
    assert tokenizer.decode(trained) == "the end"
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    assert [t % READ_ONLY for t in tokens] == tokenizer(rendered)["input_ids"]


SMOL = Path("/tmp/smol/model")


@pytest.mark.skipif(not SMOL.exists(), reason="the real model is not here")
def test_a_real_template():
    real = AutoTokenizer.from_pretrained(SMOL)
    found = trained_text(real, real.chat_template, TALK[1:])
    assert found == ASSISTANT
    ids, _ = ChatTemplate(real).tokens(TALK[1:])
    assert ids == real.apply_chat_template(TALK[1:], tokenize=True)["input_ids"]


# Datasets


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokenizer knows ROLE and END of its template as words."""
    folder = save_model(tmp_path_factory.mktemp("models") / "gpt_neox", "gpt_neox")
    tokenizer = make_tokenizer("gpt_neox")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w80 ' if m['role'] == 'user' else 'w81 ' }}"
        "{{ m['content'] }} w82 {% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


TALKS = [
    [
        message("user", " ".join(WORDS[(i + j) % 40] for j in range(3 + i % 5))),
        message("assistant", " ".join(WORDS[40 + (i * j) % 40] for j in range(4 + i % 9))),
    ]
    * (1 + i % 3)
    for i in range(300)
]


def write(path, talks):
    if path.suffix == ".parquet":
        more = [[m | {"name": None} for m in talk] for talk in talks]
        pyarrow.parquet.write_table(pyarrow.table({"messages": more}), path)
    else:
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def config(path, **settings):
    usual = {"context_length": 16, "heldout_tokens": 256, "contexts_per_batch": 4, "layer": 1}
    usual |= {"text_column": "messages", "chat_roles": "assistant"}
    return DataConfig(dataset=str(path), **usual | settings)


def opened(folder, data, seed=0):
    model = LanguageModel.load(str(folder), layer=1)
    return LanguageModelActivations(model, open_text(data, seed), data, 8, seed)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_only_chosen_roles_are_trained_and_held_out(tmp_path, folder, name, streaming):
    data = config(write(tmp_path / name, TALKS), streaming=streaming)
    source = opened(folder, data)
    vocabulary = source.language_model.tokenizer.get_vocab()
    of_assistant = {vocabulary[word] for word in WORDS[40:80]}
    trained = 0
    for packed in (source.packed_heldout(), source.next_contexts(), source.next_contexts()):
        ids = token_ids(packed)[source.token_mask(packed)].tolist()
        assert set(ids) <= of_assistant
        assert vocabulary["w82"] in token_ids(packed)
        trained += len(ids)
    assert trained > 50
    described = source.describe()
    assert described["chat_roles"] == "assistant" and len(described["chat_template"]) == 16


def test_a_hub_dataset_and_its_amount(tmp_path, folder, monkeypatch):
    whole = datasets.Dataset.from_dict({"messages": TALKS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    data = config("someone/talks", heldout_tokens=64)
    source = opened(folder, data)
    tokenizer, expected = source.language_model.tokenizer, 0
    told = count_tokens(data, tokenizer, 16, source.text)
    while (packed := source.next_contexts()) is not None:
        expected += int(source.token_mask(packed).sum())
    assert told == pytest.approx(expected, rel=0.05)


def test_roles_that_no_message_has(tmp_path, folder):
    data = config(write(tmp_path / "a.jsonl", TALKS), chat_roles="asistant")
    with pytest.raises(InputError, match="no token of its held-out text.*messages of asistant"):
        opened(folder, data)


def test_messages_of_another_form(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [TALKS[0], [{"role": "user", "content": 5}]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    with pytest.raises(InputError, match="line 2.*a role and a content that are text"):
        open_text(config(path), 0)
    path.write_text(json.dumps({"messages": [{"from": "human", "value": "hi"}]}) + "\n")
    with pytest.raises(InputError, match="column 'messages': expected text"):
        open_text(config(path), 0)


FLAGS = [
    *("--layer", "1", "--text-column", "messages", "--chat-roles", "assistant"),
    *("--context-length", "16", "--heldout-tokens", "256", "--contexts-per-batch", "4"),
    *("--model-dtype", "float32"),
]
TRAIN = [
    *("--tokens", "1000", "--batch-size", "64", "--dict-size", "64", "--k", "4", "--eval-every"),
    *("0", "--checkpoint-every", "8", "--buffer-tokens", "256", "--log-every", "1"),
]


def test_a_cache_keeps_the_mask(tmp_path, folder):
    """Also where a damaged shard is written again."""
    path, out = write(tmp_path / "a.jsonl", TALKS), tmp_path / "cache"
    flags = ["--model", str(folder), "--dataset", str(path), *FLAGS]
    assert harvest([*flags, "--shard-tokens", "500", "--out", str(out)]) == 0
    live = opened(folder, config(path))
    cached = CacheActivations(out, batch_size=8)
    assert cached.heldout_contexts().equal(live.heldout_contexts())
    assert cached.heldout_mask().equal(live.heldout_mask())
    assert cached.describe()["chat_roles"] == "assistant"
    before = {file.name: file.read_bytes() for file in out.glob("train-*")}
    for name in ("train-00000.0.safetensors", "train-00001.tokens.safetensors"):
        os.truncate(out / name, 100)
    assert harvest(["--resume", str(out)]) == 0
    assert {file.name: file.read_bytes() for file in out.glob("train-*")} == before
    assert train(["--activations", str(out), *TRAIN, "--out", str(tmp_path / "run")]) == 0


def test_a_run_goes_on_in_the_middle_of_a_conversation(tmp_path, folder):
    data = config(write(tmp_path / "a.jsonl", TALKS), buffer_tokens=64)
    whole, first, second = (opened(folder, data, 1) for _ in range(3))
    whole = list(whole)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(whole) == 5 + len(rest)
    assert all(a.equal(b) for a, b in zip(whole[5:], rest, strict=True))
    mask = token_mask(first.packed_heldout(), None, first.left_out, 0)
    assert (first.packed_heldout() >= READ_ONLY).any() and mask.any()
