"""How many tokens there are to train on, before a language model is loaded."""

from kronsae.cache import CacheIndex
from kronsae.config import DataConfig
from kronsae.data.amount import count_tokens
from kronsae.data.loading import find_tokenizer
from kronsae.sources import Cache, source_of


def available_tokens(data: DataConfig, context_length: int, vocab_size: int = 0) -> int | None:
    """About how many tokens a text gives to train on, or how many a cache has, over all epochs.

    None if that is not known: of a hub dataset, of a plugin's source, without a tokenizer.
    vocab_size: number of tokens that the model knows; 0 if it is not known.
    Raises InputError if files cannot be read, or if settings do not fit the documents.
    """
    if data.activations is not None:
        if source_of(data.activations) is not Cache:
            return None
        return data.epochs * CacheIndex.open(data.activations).train_rows
    common = {"revision": data.revision, "trust_remote_code": data.trust_remote_code}
    tokenizer = find_tokenizer(data.model, common)
    return count_tokens(data, tokenizer, context_length, vocab_size=vocab_size)
