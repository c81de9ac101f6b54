"""What tokens look like on one line, in every kind of tokenizer that spells characters by bytes."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kronsae.data.token_text import token_texts
from kronsae.embedded import embedded_model_path


class ByteTokenizer:
    """Token i is byte i; if its tokens have names, those of byte-fallback."""

    def __init__(self, named=True):
        self.named = named

    def decode(self, ids, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return bytes(ids).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids):
        return [f"<0x{i:02X}>" if self.named else f"{i}." for i in ids]


def texts(data, fires=None, named=True):
    """Of text or bytes."""
    data = data.encode() if isinstance(data, str) else data
    return token_texts(list(data), ByteTokenizer(named), fires)


def test_on_one_line():
    assert texts("a\n\tb") == ["a", "↵", "⇥", "b"]
    assert texts(b"\x1b\x07") == ["\ufffd", "\ufffd"]  # no control characters
    assert texts("\u202e") == ["", "", "\ufffd"]  # and none that turns the text around
    assert token_texts([3, 40], None) == ["[3]", "[40]"]
    assert token_texts([], ByteTokenizer()) == []


def test_a_character_is_on_its_last_token():
    assert texts("né!") == ["n", "", "é", "!"]
    assert texts("你😀") == ["", "", "你", "", "", "", "😀"]
    assert texts("你", fires=[0, 1, 0]) == ["", "⟨BD⟩", "你"]
    assert texts("你", fires=[0, 0, 2.5]) == ["", "", "你"]


def test_bytes_that_end_without_a_character():
    assert texts("你".encode()[:2]) == ["⟨E4⟩", "⟨BD⟩"]
    assert texts("a你".encode()[2:] + "好 b".encode()) == ["⟨BD⟩", "⟨A0⟩", "", "", "好", " ", "b"]
    assert texts(b"\xe4a\xbd\xe4") == ["⟨E4⟩", "a", "⟨BD⟩", "⟨E4⟩"]
    assert texts("\ufffda") == ["", "", "\ufffd", "a"]  # a text may hold that character


def test_names_that_are_bytes_or_none():
    tokenizer = ByteTokenizer()
    tokenizer.convert_ids_to_tokens = lambda ids: [bytes([i]) for i in ids]
    assert token_texts(list("你".encode()), tokenizer, [0, 1, 1]) == ["", "⟨BD⟩", "你"]
    tokenizer.convert_ids_to_tokens = lambda ids: [None for _ in ids]
    assert token_texts(list("你".encode()), tokenizer, [0, 1, 1]) == ["", "\ufffd", "你"]


def test_where_nothing_tells_the_bytes():
    assert texts("né!", named=False) == ["n", "", "é", "!"]
    assert texts(b"\xe4\xbd", named=False) == ["", "\ufffd"]


def test_byte_level_bpe():
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    text = "def 你好(self): # 😀 naïve – “x”"
    ids = tokenizer(text)["input_ids"]
    found = token_texts(ids, tokenizer)
    assert "".join(found) == text
    assert {"你", "好", "😀"} <= {each.strip() for each in found}
    firing = token_texts(ids, tokenizer, [1.0] * len(ids))
    for full, each in zip(firing, found, strict=True):
        assert full == each or full.startswith(each) and full[len(each)] == "⟨"
    assert firing[found.index("") :][:2] == ["⟨E4⟩", "⟨BD⟩"]


def test_tokens_that_hold_characters_and_parts_of_some():
    names = ["a", "ĠâĢ", "Ļs", "é", "ä½"]  # of the bytes a, E2 80 after a space, 99 s, E9, E4 BD
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_texts([0, 1, 2, 0], tokenizer) == ["a", " ", "’s", "a"]
    assert token_texts([0, 1, 2, 0], tokenizer, [1] * 4) == ["a", " ⟨E2 80⟩", "’s", "a"]
    assert token_texts([2, 0, 1], tokenizer) == ["⟨99⟩s", "a", " ⟨E2 80⟩"]
    assert token_texts([4, 3, 0, 4], tokenizer) == ["⟨E4 BD⟩", "⟨E9⟩", "a", "⟨E4 BD⟩"]


@pytest.fixture
def fallback():
    """A tokenizer like SentencePiece's, with a token for each byte that no other spells."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a", "好"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_fallback(fallback):
    ids = fallback("a你好▁a", add_special_tokens=False)["input_ids"]
    assert fallback.convert_ids_to_tokens(ids) == ["a", "<0xE4>", "<0xBD>", "<0xA0>", "好", "▁a"]
    assert token_texts(ids, fallback) == ["a", "", "", "你", "好", " a"]
    assert token_texts(ids[2:], fallback) == ["⟨BD⟩", "⟨A0⟩", "好", " a"]
    assert token_texts([*ids[:2], ids[-1]], fallback) == ["a", "⟨E4⟩", " a"]
