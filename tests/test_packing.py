from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reflect.scoring.packing import Passage, deal, pack, packs_within, size

# few ids and common beginnings, so that passages share prefixes, are prefixes of each other, and are equal
ids = st.lists(st.integers(0, 2), max_size=6)
beginnings = st.sampled_from([[], [7, 8, 9, 10, 11, 12], [7, 8, 9, 10], [7, 8, 9, 10, 11, 12, 13, 14], [70_000]])
passages = st.builds(
    lambda beginning, context, target: Passage.of([*beginning, 5, *context], [*target, 6]), beginnings, ids, ids
)
many = st.lists(passages, min_size=1, max_size=12)


def seen_by(packed, place):
    """What a token attends to, once by the segments and once by the block mask's rule."""
    (segment,) = [s for s in packed.segments if s.start <= place < s.end]
    ranges = [*segment.before, (segment.start, place + 1)]
    by_segment = [token for start, end in ranges for token in range(start, end)]
    by_mask = [token for token in range(place + 1) if place < packed.visible_to[token]]
    return by_segment, by_mask


@given(many)
@settings(deadline=None)
def test_a_token_sees_the_beginning_of_its_own_passage_and_nothing_else(some):
    packed = pack(some)
    assert packed.passages == sorted(some)
    place = 0
    for passage in packed.passages:
        tokens = passage.tokens.tolist()
        for depth in range(passage.start, len(passage)):
            by_segment, by_mask = seen_by(packed, packed.where[place])
            assert packed.ids[by_segment].tolist() == tokens[:depth]
            assert packed.positions[by_segment].tolist() == list(range(depth))
            assert by_mask == by_segment
            assert packed.targets[place] == tokens[depth]
            place += 1
    assert place == len(packed.targets) == len(packed.where)


@given(many)
@settings(deadline=None)
def test_what_passages_begin_with_is_packed_once(some):
    packed = pack(some)
    assert len(packed.ids) == size(some) == sum(s.end - s.start for s in packed.segments)
    every_beginning = {tuple(p.tokens[: n + 1].tolist()) for p in some for n in range(len(p))}
    assert len(every_beginning) <= len(packed.ids) <= sum(map(len, some))
    assert size([*some, *some]) - size(some) <= 3 * len(some)  # what is too short to be worth it is not shared


@given(many, st.integers(1, 40))
@settings(deadline=None)
def test_packs_keep_within_the_limit_and_lose_nothing(some, limit):
    packs = list(packs_within(some, limit))
    assert sorted(passage for each in packs for passage in each) == sorted(some)
    assert all(size(each) <= limit or len(each) == 1 for each in packs)


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 8))
@settings(deadline=None)
def test_lots_differ_by_no_more_than_the_largest_thing(sizes, shares):
    import numpy as np

    lots = deal(np.array(sizes, dtype=int), shares)
    assert sorted(number for lot in lots for number in lot) == list(range(len(sizes)))
    sums = [sum(sizes[number] for number in lot) for lot in lots]
    assert max(sums) - min(sums) <= max(sizes, default=0)
