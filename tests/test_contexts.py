"""The strongest contexts of latents: by hand, against brute force, and what is chosen and shown."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from kronsae import SAE, InputError, SAEConfig
from kronsae.metrics.heldout import Heldout, HeldoutText
from kronsae.properties import contexts
from kronsae.properties.contexts import SAME_TOKENS, render, short, title, top_contexts

KRON = SAEConfig(d_model=6, heads=5, m=2, n=3, k=4)
DENSE = SAEConfig(d_model=6, encoder="dense", dict_size=30, k=4)


class ByteTokenizer:
    """Token i is byte i, as in a byte-level tokenizer without merges."""

    def decode(self, ids, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return bytes(ids).decode("utf-8", errors="replace")


def identity(size: int) -> SAE:
    """A dense SAE whose latent i is coordinate i if that is the largest and positive."""
    sae = SAE(SAEConfig(d_model=size, encoder="dense", dict_size=size, k=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(size))
    return sae


def random_heldout(count: int = 12, length: int = 20) -> Heldout:
    """Contexts of a small vocabulary, of which one repeats another; a tenth is masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 9, (count, length), generator=generator)
    mask = torch.rand(count, length, generator=generator) > 0.1
    mask[:, 0] = False
    # Few bits, as the weights of `exact`: projections are exact, and so equal for equal tokens.
    x = torch.randn(count, length, 6, generator=generator).mul(8).round() / 8
    ids[7], mask[7], x[7] = ids[3], mask[3], x[3]
    return Heldout(x[mask], text=HeldoutText(None, ids, mask))


def exact(config: SAEConfig) -> SAE:
    """An SAE whose weights have so few bits that projections do not depend on how they are made."""
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.mul_(256).round_().div_(256)
    return sae


def brute_force(sae: SAE, heldout: Heldout, latent: int, num_contexts: int) -> list[tuple]:
    """(context, position, activation, activations of the whole context) from the [c, L, F]."""
    codes = sae.encode(heldout.activations)
    dense = torch.zeros(len(heldout.activations), sae.dict_size)
    dense.scatter_(1, codes.indices, codes.values)
    values = torch.zeros(*heldout.text.mask.shape)
    values[heldout.text.mask] = dense[:, latent]
    peaks = sorted(
        (-row.max().item(), c, row.argmax().item()) for c, row in enumerate(values) if row.max() > 0
    )
    found, phrases = [], set()
    for negative, c, position in peaks:
        phrase = tuple(heldout.text.contexts[c, : position + 1].tolist()[-SAME_TOKENS:])
        if phrase not in phrases:
            found.append((c, position, -negative, values[c]))
        phrases.add(phrase)
    return found[:num_contexts]


def test_by_hand():
    ids = torch.tensor([[9, 10, 11, 12], [9, 20, 21, 22], [9, 30, 31, 32]])
    mask = ids != 9
    x = torch.zeros(3, 4, 3)
    x[0, 1, 2], x[0, 2, 2], x[0, 3, 1] = 2.0, 3.0, 1.0
    x[1, 1, 2], x[1, 2, 0], x[1, 3, 2] = 5.0, 1.0, 5.0
    x[2, 1, 0], x[2, 2, 0], x[2, 3, 0] = 1.0, 1.0, 4.0
    [two, one] = top_contexts(
        identity(3), Heldout(x[mask], text=HeldoutText(None, ids, mask)), [2, 1]
    )
    assert (two.latent, two.head, two.base, two.extension) == (2, None, None, None)
    assert two.density == 4 / 9
    first, second = two.windows
    assert (first.context, first.position, first.start) == (1, 1, 0)
    assert first.tokens == (9, 20, 21, 22)
    assert first.activations == (0, 5, 0, 5)
    assert (second.context, second.position, second.activation) == (0, 2, 3)
    assert second.activations == (0, 2, 3, 0)
    assert one.density == 1 / 9
    assert [window.context for window in one.windows] == [0]


@pytest.mark.parametrize("batch_tokens", [1, 7, 4096])
@pytest.mark.parametrize("config", [KRON, DENSE], ids=["kron", "dense"])
def test_equals_brute_force(config, batch_tokens, monkeypatch):
    monkeypatch.setattr(contexts, "BATCH_TOKENS", batch_tokens)
    sae = exact(config)
    heldout = random_heldout()
    found = top_contexts(sae, heldout, range(sae.dict_size), num_contexts=3)
    fired = torch.bincount(
        sae.encode(heldout.activations).indices[sae.fired(sae.encode(heldout.activations))],
        minlength=sae.dict_size,
    )
    assert sum(len(latent.windows) for latent in found) > 30
    for latent in found:
        assert latent.density == fired[latent.latent].item() / len(heldout.activations)
        expected = brute_force(sae, heldout, latent.latent, 3)
        assert len(latent.windows) == len(expected)
        for window, (context, position, activation, values) in zip(
            latent.windows, expected, strict=True
        ):
            assert (window.context, window.position) == (context, position)
            assert window.activation == pytest.approx(activation, rel=1e-5)
            stop = window.start + len(window.tokens)
            assert window.start == max(0, position - contexts.LEFT)
            assert stop == min(heldout.text.contexts.shape[1], position + contexts.RIGHT + 1)
            assert window.tokens == tuple(
                heldout.text.contexts[context, window.start : stop].tolist()
            )
            near = values[window.start : stop]
            torch.testing.assert_close(torch.tensor(window.activations), near)


def test_place_in_the_head():
    sae = SAE(KRON, generator=torch.Generator().manual_seed(0))
    found = top_contexts(sae, random_heldout(), [17])[0]  # 17 = (2 * 2 + 1) * 3 + 2
    assert (found.head, found.base, found.extension) == (2, 1, 2)


def test_no_context_twice():
    heldout = random_heldout()
    sae = SAE(KRON, generator=torch.Generator().manual_seed(0))
    for latent in top_contexts(sae, heldout, range(30), num_contexts=12):
        shown = [window.context for window in latent.windows]
        assert len(set(shown)) == len(shown)
        assert not {3, 7} <= set(shown)  # the same text


def test_chooses_consistent_latents():
    """Latent 0 fires on token 5, latent 1 after 6, 2 here and there, 3 everywhere, 4 once."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(10, 200, (20, 60)))
    x = torch.zeros(20, 60, 6)
    x[..., 3] = 9.0
    for row in range(20):
        x[row, 20, 0], ids[row, 20] = 10.0, 5
        x[row, 31, 1], ids[row, 30] = 10.0, 6
        x[row, 40, 2] = 10.0
    x[0, 50, 4] = 100.0
    heldout = Heldout(
        x.flatten(0, 1), text=HeldoutText(None, ids, torch.ones(20, 60, dtype=torch.bool))
    )
    found = top_contexts(identity(6), heldout, num_latents=3)
    assert [latent.latent for latent in found] == [0, 1, 2]
    assert [len(latent.windows) for latent in found] == [4, 4, 4]
    every = top_contexts(identity(6), heldout, num_latents=10)  # 5 never fires
    assert [latent.latent for latent in every] == [0, 1, 2, 4, 3]


def test_chooses_from_different_heads_and_the_same_each_time():
    heldout = random_heldout(40, 50)
    sae = SAE(KRON, generator=torch.Generator().manual_seed(0))
    found = top_contexts(sae, heldout, num_latents=5)
    assert len(found) == 5
    assert top_contexts(sae, heldout, num_latents=5) == found
    assert all(latent.windows for latent in found)


def test_different_heads(monkeypatch):
    monkeypatch.setattr(contexts, "MAX_DENSITY", 1.0)
    heldout = random_heldout(40, 50)
    wide = Heldout(
        heldout.activations, text=HeldoutText(None, heldout.text.contexts * 100, heldout.text.mask)
    )
    sae = SAE(KRON, generator=torch.Generator().manual_seed(0))
    found = top_contexts(sae, wide, num_latents=4)
    assert len({latent.head for latent in found}) == 4


def test_nothing_to_show():
    sae = SAE(KRON)
    assert top_contexts(sae, Heldout(torch.randn(5, 6))) == []
    nothing = Heldout(
        torch.randn(0, 6),
        text=HeldoutText(None, torch.zeros(1, 4).long(), torch.zeros(1, 4).bool()),
    )
    assert top_contexts(sae, nothing) == []
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    assert top_contexts(sae, random_heldout()) == []
    [silent] = top_contexts(sae, random_heldout(), [4])
    assert (silent.density, silent.windows) == (0, ())
    assert [line.plain for line in render([silent], None)] == [title(silent)]
    assert "never fires" in title(silent)
    with pytest.raises(InputError, match="0 to 29, got 30"):
        top_contexts(sae, random_heldout(), [30])


def test_short():
    assert [short(value) for value in (0.01234, 1.2, 45.6, 789.0)] == [
        "0.0123",
        "1.20",
        "45.6",
        "789",
    ]


def text_heldout() -> tuple[SAE, Heldout]:
    """A latent that fires most on the full stop of 'Say [bold]it\\nto me. Now!'."""
    ids = torch.tensor([list(b"Say [bold]it\nto me. Now!"), list(b"Then go away there. Yes!")])
    x = torch.zeros(2, 24, 2)
    x[0, 18, 0], x[0, 13, 0], x[1, 18, 0] = 3.0, 1.0, 2.0
    return identity(2), Heldout(
        x.flatten(0, 1), text=HeldoutText(None, ids, torch.ones(2, 24, dtype=torch.bool))
    )


def test_render_plain():
    sae, heldout = text_heldout()
    lines = render(top_contexts(sae, heldout, [0]), ByteTokenizer())
    assert [line.plain for line in lines] == [
        "latent 0 · fires on 6.2 % of tokens",
        "   3.00  old]it↵to me«.» Now",
        "   2.00  o away there«.» Yes",
    ]


@pytest.mark.parametrize("width", [24, 40, 200])
def test_render_fits_the_console(width):
    sae, heldout = text_heldout()
    found = top_contexts(sae, heldout, [0])
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None)
    for line in render(found, ByteTokenizer(), console):
        console.print(line)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    marked = [line for line in lines if "«.»" in line]
    assert len(marked) == 2
    assert len({line.index("«") for line in marked}) == 1
