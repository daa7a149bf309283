"""The heap that lets go of anything: order, length, and that nothing dead is kept."""

from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from pace.engine.heap import MIN_DEAD, LazyHeap


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.integers(0, 20)), max_size=300))
def test_it_is_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    heap: LazyHeap[str] = LazyHeap()
    model: dict[str, int] = {}
    for i, (what, number) in enumerate(steps):
        if what == "push":
            heap.push((number, i), str(i))
            model[str(i)] = number
        elif what == "discard":
            item = str(number)
            heap.discard(item)
            model.pop(item, None)
        elif model:
            item = min(model, key=lambda item: (model[item], int(item)))
            assert heap.peek() == item and heap.peek_key() == (model[item], int(item))
            heap.discard(item)
            del model[item]
        assert len(heap) == len(model)
    assert (heap.peek() is None) == (not model)


def test_an_item_that_comes_back_meets_its_own_dead_entry() -> None:
    heap: LazyHeap[object] = LazyHeap()
    item, first = object(), object()
    heap.push(0, first)
    for _ in range(3):
        heap.push(1, item)
        heap.discard(item)
    heap.push(1, item)
    heap.discard(first)
    assert heap.peek() is item and len(heap) == 1


class Item:
    pass


def test_a_discarded_item_is_released_at_once_and_its_entry_soon() -> None:
    """Behind a head that stays, dead entries were kept: 270 for one alive."""
    heap: LazyHeap[Item] = LazyHeap()
    head = Item()
    heap.push(-1, head)
    for i in range(10_000):
        item = Item()
        heap.push(i, item)
        alive = weakref.ref(item)
        heap.discard(item)
        del item
        assert alive() is None or gc.collect() is not None
        assert len(heap._heap) <= 2 + MIN_DEAD
    assert heap.peek() is head
