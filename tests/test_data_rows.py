"""Batches: gathered exactly, in memory that is used again only when nobody has the batch."""

import gc

import pytest
import torch

from kronsae.data import rows
from kronsae.data.rows import BATCHES_IN_MEMORY, BatchMemory, gather


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(5,), (5, 3), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 100])
def test_gathered_is_indexed_joined_and_converted(widths, count, stored, out, monkeypatch):
    """Bit for bit, also where it comes in blocks, the last of which is smaller."""
    monkeypatch.setattr(rows, "GATHER_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(30, width, generator=generator).to(stored) for width in widths]
    numbers = torch.randint(30, (count,), generator=generator)
    into = torch.full((count + 1, sum(widths)), -9.0, dtype=out)
    found = gather(parts, numbers, into[:count])
    assert found.equal(torch.cat([part[numbers] for part in parts], 1).to(out))
    assert (into[count:] == -9).all()


def test_memory_is_used_again():
    memory = BatchMemory(8, 3, torch.bfloat16)
    batch = memory.take(8)
    assert (batch.shape, batch.dtype) == ((8, 3), torch.bfloat16) and batch.is_contiguous()
    place = batch.data_ptr()
    del batch
    small = memory.take(5)
    assert small.shape == (5, 3) and small.data_ptr() == place


HOLDERS = {
    "itself": lambda batch: batch,
    "slice": lambda batch: batch[2:4],
    "part of each row": lambda batch: batch.split([1, 2], 1)[1],
    "another dtype": lambda batch: batch.view(torch.int32),
    "numpy": lambda batch: batch.numpy(),
    "graph": lambda batch: (batch * torch.ones(3, requires_grad=True)).grad_fn,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_memory_that_anything_still_sees_is_not(hold):
    memory = BatchMemory(8, 3, torch.float32)
    batch = memory.take(8)
    place, held = batch.data_ptr(), hold(batch)
    del batch
    gc.collect()
    assert memory.take(8).data_ptr() != place
    del held
    gc.collect()
    assert memory.take(8).data_ptr() == place


def test_any_number_of_batches_can_be_held():
    """Those beyond what is kept are like any other tensor."""
    memory = BatchMemory(4, 2, torch.float32)
    batches = [memory.take(4).fill_(number) for number in range(BATCHES_IN_MEMORY + 4)]
    assert all((batch == number).all() for number, batch in enumerate(batches))
    assert len({batch.data_ptr() for batch in batches}) == BATCHES_IN_MEMORY + 4
    batches.clear()
    places = {memory.take(4).data_ptr() for _ in range(9)}
    assert len(places) == 1
