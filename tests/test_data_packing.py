"""Packing: no token lost, separators, beginnings of contexts, long documents, the token mask."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tokenizer
from transformers import AutoTokenizer

from kronsae.data import packing
from kronsae.data.packing import Packer, beginning_token, context_begin, prompt_ids, token_mask
from kronsae.embedded import embedded_model_path
from kronsae.errors import InputError


class Characters:
    """A tokenizer of characters, with chosen special tokens; a text's BOS only if `adds_bos`."""

    def __init__(self, bos=None, eos=None, sep=None, adds_bos=False):
        self.bos_token_id, self.eos_token_id, self.sep_token_id = bos, eos, sep
        self.cls_token_id, self.adds_bos = None, adds_bos
        self.all_special_ids = [i for i in (bos, eos, sep) if i is not None]
        self.calls = []

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.calls.append(text)
        begin = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        return {"input_ids": begin + [100 + ord(c) for c in text]}


def ids_of(text):
    return [100 + ord(c) for c in text]


def ids(contexts):
    return torch.cat([*contexts, torch.empty(0, dtype=torch.int64)]).tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())


DOCUMENTS = ["abcdefg", "h", "", "ijklmnopqrst", "", "uv"]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 100])
def test_no_token_is_lost_or_reordered(length):
    packer = Packer(Characters(eos=0), length)
    contexts = [c for text in DOCUMENTS for c in packer.add(text)]
    assert all(c.shape == (length,) and c.dtype == torch.int64 for c in contexts)
    expected = [i for text in DOCUMENTS if text for i in [*ids_of(text), 0]]
    assert ids(contexts) + packer.waiting == expected
    assert len(packer.waiting) < length


def test_an_empty_document_adds_no_separator():
    packer = Packer(Characters(eos=0), 4)
    assert list(packer.add("")) == [] and packer.waiting == []


def test_the_last_separator_completes_a_context():
    assert ids(Packer(Characters(eos=0), 4).add("abc")) == [*ids_of("abc"), 0]


@pytest.mark.parametrize(
    "special, separator",
    [
        ({"eos": 1, "sep": 2, "bos": 3}, [1]),
        ({"sep": 2, "bos": 3}, [2]),
        ({"bos": 3}, [3]),
        ({}, []),
    ],
    ids=["eos", "sep", "bos", "none"],
)
def test_separator_is_what_the_tokenizer_has(special, separator):
    expected = [*ids_of("ab"), *separator, *ids_of("cd"), *separator]
    packer = Packer(Characters(**special), 3)
    contexts = [c for text in ("ab", "cd") for c in packer.add(text)]
    assert ids(contexts) + packer.waiting == expected


def test_contexts_begin_with_bos_if_the_tokenizer_adds_one():
    contexts = list(Packer(Characters(bos=7, eos=0, adds_bos=True), 3).add("abcdef"))
    assert [c.tolist() for c in contexts] == [
        [7, *ids_of("ab")],
        [7, *ids_of("cd")],
        [7, *ids_of("ef")],
    ]


def test_contexts_do_not_begin_with_a_bos_that_the_tokenizer_does_not_add():
    tokenizer = Characters(bos=7, eos=0, adds_bos=False)
    assert beginning_token(tokenizer) is None
    assert next(Packer(tokenizer, 3).add("abcdef")).tolist() == ids_of("abc")


@pytest.mark.parametrize(
    ("bos", "adds_bos", "expected"),
    [
        ("auto", True, [7]),
        ("auto", False, []),
        ("none", True, []),
        ("x", False, ids_of("x")),
        ("xy", True, ids_of("xy")),
    ],
)
def test_contexts_begin_as_asked(bos, adds_bos, expected):
    tokenizer = Characters(bos=7, eos=0, adds_bos=adds_bos)
    assert context_begin(tokenizer, bos) == expected
    contexts = list(Packer(tokenizer, 5, bos).add("abcdefghij"))
    assert [c[: len(expected)].tolist() for c in contexts] == [expected] * len(contexts)
    room = 5 - len(expected)
    assert ids(c[len(expected) :] for c in contexts[:2]) == ids_of("abcdefghij"[: 2 * room])


def test_a_beginning_without_room_for_text_is_an_input_error():
    with pytest.raises(InputError, match="bos 'abc': its 3 tokens leave no room in contexts of 3"):
        Packer(Characters(eos=0), 3, "abc")


def test_named_tokens_begin_a_context_and_unknown_names_are_refused():
    tokenizer = make_tokenizer("llama")
    assert context_begin(tokenizer, "<s>") == context_begin(tokenizer, "auto") == [1]
    assert context_begin(tokenizer, "<s></s>") == [1, 2]
    assert context_begin(tokenizer, "w3 w4") == [9, 10]
    for unknown in ("<|im_start|>", "[gMASK]<sop>"):
        with pytest.raises(InputError, match="no token of this name; its special tokens are <pad>"):
            context_begin(tokenizer, unknown)
    assert prompt_ids(tokenizer, "w0", "auto") == prompt_ids(tokenizer, "w0", "<s>") == [1, 6]
    assert prompt_ids(tokenizer, "w0", "none") == [6]


def test_a_beginning_is_not_trained_on():
    mask = token_mask(torch.arange(5, 9)[None], SimpleNamespace(all_special_ids=[7]), begin=2)
    assert mask.tolist() == [[False, False, False, True]]


def test_embedded_tokenizer_adds_no_bos(tokenizer):
    assert beginning_token(tokenizer) is None


def test_packed_text_is_the_text(tokenizer):
    texts = ["def f(x):\n    return x\n", "import os\n" * 40]
    packer = Packer(tokenizer, 8)
    found = ids([context for text in texts for context in packer.add(text)])
    whole = "".join(text + tokenizer.eos_token for text in texts)
    assert len(found) % 8 == 0 and len(found) > 40
    assert whole.startswith(tokenizer.decode(found))


def test_a_long_document_is_cut_where_a_token_begins_anyway(tokenizer, monkeypatch):
    text = "".join(f"    number_{i} = {i} * compute(value)\n" for i in range(200))
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 301)
    assert "".join(packing._pieces(text)) == text
    assert len(list(packing._pieces(text))) > 20
    packer = Packer(tokenizer, 16)
    found = ids(packer.add(text)) + packer.waiting
    assert found == [*expected, tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["a" * 1000, " " * 1000, "a" * 99 + " " + "b" * 899])
def test_pieces_without_white_space_in_reach(text, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 100)
    pieces = list(packing._pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 100 for piece in pieces)


def test_a_long_document_is_tokenised_as_far_as_asked_for(monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 100)
    tokenizer = Characters(eos=0)
    contexts = Packer(tokenizer, 10).add("word " * 1000)
    tokenizer.calls.clear()
    next(contexts)
    assert len(tokenizer.calls) == 1 and len(tokenizer.calls[0]) <= 100


@pytest.mark.parametrize("after", range(len(DOCUMENTS)))
def test_state(after):
    tokenizer = Characters(bos=7, eos=0, adds_bos=True)
    packer = Packer(tokenizer, 4)
    for text in DOCUMENTS[:after]:
        list(packer.add(text))
    other = Packer(tokenizer, 4)
    other.load_state_dict(packer.state_dict())
    rest = [ids(p.add(text)) for p in (packer, other) for text in DOCUMENTS[after:]]
    assert rest[: len(rest) // 2] == rest[len(rest) // 2 :]
    assert packer.waiting == other.waiting


def test_no_warning_about_long_texts(tokenizer, caplog, capsys):
    assert tokenizer.model_max_length < 100_000, "the embedded tokenizer has no limit to exceed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Packer(tokenizer, 64).add("word " * 3000))
    assert not caplog.records and not capsys.readouterr().err


def test_mask_leaves_out_special_tokens_and_first_positions():
    tokenizer = SimpleNamespace(all_special_ids=[0, 1, 2])  # BOS, EOS, PAD
    input_ids = torch.tensor([[0, 5, 6, 1, 7], [8, 9, 1, 2, 2]])
    expected = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    assert token_mask(input_ids, tokenizer).equal(expected)


def test_mask_leaves_out_special_tokens_without_a_role():
    reserved = {90: SimpleNamespace(special=True), 91: SimpleNamespace(special=False)}
    tokenizer = SimpleNamespace(all_special_ids=[0], added_tokens_decoder=reserved)
    expected = [False, False, True, True]
    assert token_mask(torch.tensor([[5, 90, 91, 6]]), tokenizer)[0].tolist() == expected


def test_mask_without_any_special_token():
    mask = token_mask(torch.tensor([[5, 6, 7]]), SimpleNamespace(all_special_ids=[]))
    assert mask.tolist() == [[False, True, True]]
