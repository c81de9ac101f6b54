"""SAEs in the hooks of TransformerLens and nnsight, against `kronsae.language_model`.

Needs transformer-lens and nnsight; skipped without.
"""

import pytest
import torch
from test_features import TEXTS, folder, lm, sae  # noqa: F401  # fixtures

from kronsae.interventions import edited, steer

EDITS = [steer(7, 50.0), steer(3, -20.0)]


@pytest.fixture(scope="module")
def expected(lm):  # noqa: F811
    """Token ids, and the logits of the steered model."""
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    with lm.edit(EDITS), torch.no_grad():
        return ids, lm.model(ids).logits


def check(sae, x, logits, expected, lm):  # noqa: F811
    features = lm.features(TEXTS[0])
    dense = sae.encode_dense(x.reshape(-1, x.shape[-1]))
    torch.testing.assert_close(dense[features.kept], features.to_dense()[features.kept])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)


def test_nnsight(sae, lm, expected):  # noqa: F811
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.LanguageModel(lm.model, tokenizer=lm.tokenizer)
    with model.trace(expected[0]):
        block = model.model.layers[1]
        x = block.output.clone().save()
        block.output = edited(sae, block.output, EDITS)
        logits = model.lm_head.output.save()
    check(sae, x, logits, expected, lm)


def test_transformer_lens(sae, folder, lm, expected):  # noqa: F811
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = bridge.boot_transformers(folder, device="cpu")
    name = sae.cfg.hook_name
    _, cache = model.run_with_cache(expected[0])
    hook = (name, lambda x, hook: edited(sae, x, EDITS))
    with torch.no_grad():
        logits = model.run_with_hooks(expected[0], fwd_hooks=[hook])
    check(sae, cache[name], logits, expected, lm)
