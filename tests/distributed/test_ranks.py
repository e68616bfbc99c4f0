"""Every exchange between real processes equals its meaning within one process."""

import numpy as np
import pytest
import torch

from olmoscope.cost.ranks import batch_traffic, first_of_ranks
from olmoscope.distributed.nodes import exchanges_on_two_levels, ranks_of_a_node
from olmoscope.distributed.ranks import LOST, Ranks
from olmoscope.distributed.select import keep_largest, nth_largest
from olmoscope.distributed.sums import legal_counts, team_size, tree_sum, tree_sum_of_some
from olmoscope.errors import AnotherRankFailedError, LostRankError, UserError
from rank_pool import RankPool

ROWS = [12, 7, 3, 1]
"""Even, uneven, fewer than ranks."""


OWNERS = np.random.default_rng(0).integers(0, 12, 1000)


def numbered(rows, width=3, dtype=torch.float32):
    return torch.arange(rows * width).view(rows, width).to(dtype)


def part(rank, number, rows):
    """The values that a rank has under a number, for all rows."""
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(10 * rank + number))


def exchanged_parts(ranks, rows, has):
    """Sums at the owners; and what owners give to the ranks, which is the rank that asks, and the row."""
    sums = ranks.sums_to_owners({number: part(ranks.index, number, rows) for number in has[ranks.index]}, has)
    given = {number: 100 * number + numbered(rows)[ranks.own(rows)] for number in range(4)}
    counted = dict(ranks.traffic), dict(ranks.crossing)
    return ranks.own(rows), sums, ranks.copies_from_owners(given, has, rows), counted, dict(ranks.traffic)


def rows_of(taken):
    return taken.stop - taken.start


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has", [[[0]], [[0, 1], [1]], [[2], [0, 1, 2], [3]], [[0, 1], [1], [1, 3], [3]],
                                 [[0], [0], [0], [0]]])
def test_sums_come_to_the_owners_and_copies_from_them(rank_pool, rows, has, nodes):
    if nodes > 1 and len(has) < 4:
        pytest.skip("two nodes have four ranks")
    numbers = sorted({number for own in has for number in own})
    whole = {number: tree_sum_of_some([part(rank, number, rows) if number in own else None
                                       for rank, own in enumerate(has)]) for number in numbers}
    owned = torch.zeros(rows)
    for index, found in enumerate(rank_pool.run(len(has), exchanged_parts, rows, has, nodes=nodes)):
        own, sums, copies, (traffic, crossing), with_copies = found
        owned[own] += 1
        assert sorted(sums) == numbers and all(torch.equal(sums[number], whole[number][own]) for number in numbers)
        assert sorted(copies) == has[index]
        assert all(torch.equal(copy, 100 * number + numbered(rows)) for number, copy in copies.items())
        if nodes == 1 and len(has) > 1:
            mine, all_ = len(has[index]), sum(map(len, has))
            assert with_copies == {"to_owners": 12 * (rows - rows_of(own)) * mine,
                                   "from_owners": 12 * rows_of(own) * (all_ - mine)}
            assert not any(crossing.values())
        if nodes == 2:
            of_node = has[index // 2 * 2 : index // 2 * 2 + 2]
            local = Ranks(index % 2, 2).sizes(rows)[index % 2]
            assert crossing == {"to_owners": 12 * (local - rows_of(own)) * len({*of_node[0], *of_node[1]})}
            assert traffic["to_owners"] - crossing["to_owners"] == 12 * (rows - local) * len(has[index])
    assert owned.eq(1).all(), "each row has one owner"


def exchanged(ranks, rows, dtype):
    """The result of each method, on every rank."""
    all_BX = numbered(rows, dtype=dtype)
    own_rows = ranks.own(rows)
    own_bX = all_BX[own_rows]
    mine_BX = all_BX + 100 * (ranks.index + 1)
    back_PbX = torch.stack([own_bX + 100 * (rank + 1) for rank in range(ranks.count)])
    found = (ranks.gather(all_BX + ranks.index), ranks.gather_rows(own_bX, rows), ranks.to_owners(mine_BX),
             ranks.from_owners(back_PbX, rows), ranks.ask(ranks.index * 5))
    owners_B = OWNERS[:rows] % ranks.count
    read_bX = all_BX[torch.from_numpy(owners_B == ranks.index)]
    counted = dict(ranks.traffic), dict(ranks.crossing)
    assert not rows or torch.equal(ranks.begin_gather_dealt(read_bX, owners_B)(), all_BX)
    return found, *counted, own_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_exchange_gives_what_it_says(rank_pool, count, rows, dtype):
    all_BX = numbered(rows, dtype=dtype)
    for index, (found, traffic, crossing, own) in enumerate(rank_pool.run(count, exchanged, rows, dtype)):
        gathered, rows_BX, to_own, from_owners_BX, asked = found
        assert own == Ranks(index, count).own(rows) and not any(crossing.values())
        assert torch.equal(gathered, torch.stack([all_BX + rank for rank in range(count)]))
        assert torch.equal(rows_BX, all_BX)
        assert torch.equal(to_own, torch.stack([all_BX[own] + 100 * (rank + 1) for rank in range(count)]))
        assert torch.equal(from_owners_BX, all_BX + 100 * (index + 1))
        assert asked == [rank * 5 for rank in range(count)]
        row, own_rows, most = 3 * dtype.itemsize, own.stop - own.start, -(-rows // count)
        assert traffic == {"gather": (count - 1) * (rows * row + most * row + 8), "to_owners": (rows - own_rows) * row,
                           "from_owners": (count - 1) * own_rows * row}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_each_exchange_gives_the_same_on_two_levels(rank_pool, rows, dtype):
    all_BX = numbered(rows, dtype=dtype)
    for index, (found, traffic, crossing, own) in enumerate(rank_pool.run(4, exchanged, rows, dtype, nodes=2)):
        gathered, rows_BX, to_own, from_owners_BX, asked = found
        assert torch.equal(gathered, torch.stack([all_BX + rank for rank in range(4)]))
        assert torch.equal(rows_BX, all_BX)
        assert torch.equal(to_own, torch.stack([all_BX[own] + 100 * (rank + 1) for rank in range(4)]))
        assert torch.equal(from_owners_BX, all_BX + 100 * (index + 1))
        assert asked == [rank * 5 for rank in range(4)]
        row, local = 3 * dtype.itemsize, Ranks(index % 2, 2).sizes(rows)[index % 2]
        own_rows = own.stop - own.start
        assert crossing == {"gather": rows * row + -(-local // 2) * row + 8, "to_owners": (local - own_rows) * 2 * row,
                            "from_owners": own_rows * 2 * row}
        assert traffic["to_owners"] == crossing["to_owners"] + (rows - local) * row
        assert traffic["from_owners"] == crossing["from_owners"] + local * row


def dealt_evenly(ranks, rows):
    """The bytes that a rank sends so that all have a batch."""
    owners_B = np.arange(rows) % ranks.count
    before = ranks.traffic["gather"], ranks.crossing["gather"]
    ranks.begin_gather_dealt(numbered(rows)[torch.from_numpy(owners_B == ranks.index)], owners_B)()
    return ranks.traffic["gather"] - before[0], ranks.crossing["gather"] - before[1]


@pytest.mark.parametrize(("count", "nodes"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_a_batch_takes_the_bytes_of_the_formula(rank_pool, count, nodes):
    wanted = batch_traffic(24, 12, first_of_ranks(count, count // nodes))
    assert wanted.total == 24 // count * 12 * (count - 1)
    assert wanted.crossing == (24 // count * 12 if nodes == 2 else 0)
    assert rank_pool.run(count, dealt_evenly, 24, nodes=nodes) == [(wanted.total, wanted.crossing)] * count


def test_one_process_needs_no_group():
    ranks, rows_BX = Ranks.alone(), numbered(5)
    assert torch.equal(ranks.gather(rows_BX), rows_BX[None])
    assert torch.equal(ranks.to_owners(rows_BX), rows_BX[None])
    assert torch.equal(ranks.from_owners(rows_BX[None], 5), rows_BX)
    assert torch.equal(ranks.gather_rows(rows_BX, 5), rows_BX)
    assert torch.equal(ranks.begin_gather_dealt(rows_BX, None)(), rows_BX)
    assert ranks.ask(7) == [7] and not ranks.traffic and ranks.leads


def gathered_some(ranks, sizes):
    start = sum(sizes[: ranks.index])
    return ranks.gather_some(numbered(sum(sizes))[start : start + sizes[ranks.index]], sizes)


@pytest.mark.parametrize("sizes", [[5], [3, 3], [4, 0], [0, 7, 2]])
def test_rows_are_gathered_however_they_are_shared_out(rank_pool, sizes):
    for found in rank_pool.run(len(sizes), gathered_some, sizes):
        assert torch.equal(found, numbered(sum(sizes)))


def failing(ranks, failing_ranks):
    with ranks.agreed():
        if ranks.index in failing_ranks:
            raise UserError(f"of rank {ranks.index}")
    return "went on"


def test_an_error_of_one_rank_stops_all_and_one_tells_it(rank_pool):
    assert rank_pool.run(3, failing, []) == ["went on"] * 3
    for failed in ([2], [1, 2], [0, 1, 2]):
        found = rank_pool.run(3, failing, failed)
        for index, error in enumerate(found):
            if index == failed[0]:
                assert type(error) is UserError and str(error) == f"of rank {index}"
            else:
                assert type(error) is AnotherRankFailedError


def gathering(ranks, times):
    for _ in range(times):
        ranks.gather(torch.zeros(3))


def test_a_rank_whose_neighbour_dies_says_so(tmp_path):
    pool = RankPool(tmp_path, 2)
    try:
        assert pool.run(2, gathering, 1) == [None, None]
        for pipe in pool._pipes[:1]:
            pipe.send((2, 1, False, gathering, (1,)))
        pool.processes[1].kill()
        assert pool._pipes[0].poll(30)
        error = pool._pipes[0].recv()
        assert isinstance(error, LostRankError) and str(error) == LOST
    finally:
        pool.close()


def kept(ranks, lists, k, width):
    shards = len(lists) // ranks.count
    return keep_largest(lists[ranks.index * shards : (ranks.index + 1) * shards], k, width, ranks)


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few ties"])
@pytest.mark.parametrize(("rows", "shards", "places", "k"), [(9, 4, 5, 5), (6, 4, 2, 5), (3, 8, 4, 4), (1, 2, 3, 3)])
def test_selection_keeps_the_largest_of_all(rank_pool, rows, shards, places, k, levels):
    """Among equals, those of the lower shard come first, then the earlier ones; on any number of ranks."""
    draw = torch.Generator().manual_seed(rows * shards + places)
    lists = [(torch.randint(levels, (rows, places - (shard % 2)), generator=draw) / 7).sort(1, descending=True).values
             for shard in range(shards)]
    wanted = [torch.zeros_like(shard_BK) for shard_BK in lists]
    for row in range(rows):
        places_of_all = [(-float(value), shard, place) for shard, shard_BK in enumerate(lists)
                         for place, value in enumerate(shard_BK[row])]
        for _, shard, place in sorted(places_of_all)[:k]:
            wanted[shard][row, place] = lists[shard][row, place]
    ways = [(count, 1) for count in legal_counts(shards) if count <= 4] + [(4, 2)] * (shards % 4 == 0)
    last = [last_B for one in rank_pool.run(1, kept, lists, k, places) for last_B in one.last]
    for count, nodes in ways:
        found = rank_pool.run(count, kept, lists, k, places, nodes=nodes)
        assert all(torch.equal(got, want) for got, want in zip(
            [part for one in found for part in one.values], wanted, strict=True)), (count, nodes)
        assert all(torch.equal(got, want) for got, want in zip(
            [part for one in found for part in one.last], last, strict=True)), (count, nodes)


def test_a_list_of_nan_is_kept():
    lists = [torch.full((1, 2), torch.nan), torch.ones(1, 2)]
    assert keep_largest(lists, 2, 2, Ranks.alone()).values[0].isnan().all()


def nth(ranks, lists, ns):
    own = lists[ranks.index * len(lists) // ranks.count : (ranks.index + 1) * len(lists) // ranks.count]
    return [nth_largest(own, n, ranks) for n in ns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "few ties"])
def test_the_nth_largest_of_all_is_exact(rank_pool, levels, dtype):
    draw = torch.Generator().manual_seed(levels)
    lists = [(torch.randint(levels, (7, places), generator=draw) / 7).to(dtype) ** 3 for places in (5, 4, 5, 3)]
    lists[2][0, 0], lists[3][6, 2] = torch.inf, 1e-30
    all_N = torch.cat([one.flatten() for one in lists]).sort(descending=True).values
    ns = [1, 2, 50, len(all_N) - 1, len(all_N)]
    for count in (1, 2, 4):
        for found in rank_pool.run(count, nth, lists, ns) if count > 1 else [nth(Ranks.alone(), lists, ns)]:
            assert torch.equal(torch.stack(found), all_N[torch.tensor(ns) - 1])
    lists[0][:] = torch.nan
    assert nth_largest(lists, 35, Ranks.alone()).isnan() and nth_largest(lists, 36, Ranks.alone()).isinf()


def test_tree_sums_do_not_depend_on_who_takes_them():
    draw = torch.Generator().manual_seed(0)
    for shards in (1, 2, 3, 4, 6, 8, 12):
        parts = list(torch.randn(shards, 50, generator=draw))
        whole = tree_sum(parts)
        torch.testing.assert_close(whole, sum(parts))
        for count in legal_counts(shards):
            own = shards // count
            branches = [tree_sum(parts[rank * own : (rank + 1) * own]) for rank in range(count)]
            assert torch.equal(tree_sum(branches), whole), (shards, count)


def test_how_many_ranks_may_share_shards():
    assert legal_counts(8) == [1, 2, 4, 8] and legal_counts(6) == [1, 3, 6] and legal_counts(1) == [1]
    assert [team_size(ranks, 8) for ranks in (1, 2, 3, 4, 6, 16)] == [1, 2, 1, 4, 2, 8]


def test_when_nodes_exchange_on_two_levels():
    assert ranks_of_a_node([0, 1, 2, 0, 1, 2]) == 3 and ranks_of_a_node([0, 1]) == 2
    for cyclic_or_uneven in ([0, 0, 1, 1], [0, 1, 2, 0, 1], [0, 0], [1, 0]):
        assert ranks_of_a_node(cyclic_or_uneven) == 1
    assert exchanges_on_two_levels(16, 8) and exchanges_on_two_levels(12, 4)
    assert not exchanges_on_two_levels(6, 3), "three ranks are no branch of six"
    assert not any(exchanges_on_two_levels(8, node) for node in (1, 3, 8, 16))
