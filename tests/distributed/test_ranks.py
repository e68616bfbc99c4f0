"""Every exchange between ranks against what it means in one process, over real processes."""

import numpy as np
import pytest
import torch

from olmoscope.distributed.ranks import LOST, Ranks
from olmoscope.distributed.select import keep_largest, nth_largest
from olmoscope.distributed.sums import legal_counts, team_size, tree_sum
from olmoscope.errors import AnotherRankFailedError, UserError
from rank_pool import RankPool

ROWS = [12, 7, 3, 1]
"""Even, uneven, fewer than ranks."""


OWNERS = np.random.default_rng(0).integers(0, 12, 1000)


def numbered(rows, width=3, dtype=torch.float32):
    return torch.arange(rows * width).view(rows, width).to(dtype)


def exchanged_parts(ranks, rows, counts):
    """Parts of each row; ranks have different numbers of parts."""
    parts_BNX = numbered(rows)[:, None] + 100 * (ranks.index + 1) + 10 * torch.arange(counts[ranks.index])[:, None]
    found = ranks.parts_to_owners(parts_BNX, counts)
    return found, ranks.parts_from_owners(found, rows), dict(ranks.traffic)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("counts", [[2], [2, 1], [1, 3, 1], [3, 0, 1, 2]])
def test_parts_come_to_the_owners_and_back(rank_pool, rows, counts):
    sent = [numbered(rows)[:, None] + 100 * (rank + 1) + 10 * torch.arange(number)[:, None]
            for rank, number in enumerate(counts)]
    for index, (found, back_BNX, traffic) in enumerate(rank_pool.run(len(counts), exchanged_parts, rows, counts)):
        own, mine = Ranks(index, len(counts)).own(rows), counts[index]
        assert all(torch.equal(part, parts_BNX[own]) for part, parts_BNX in zip(found, sent, strict=True))
        assert torch.equal(back_BNX, sent[index])
        others = rows - (own_rows := own.stop - own.start)
        assert len(counts) == 1 or traffic == {"to_owners": 12 * others * mine,
                                               "from_owners": 12 * own_rows * (sum(counts) - mine)}


def exchanged(ranks, rows, dtype):
    """What each method gives, on every rank."""
    all_BX = numbered(rows, dtype=dtype)
    own_bX = all_BX[ranks.own(rows)]
    mine_BX = all_BX + 100 * (ranks.index + 1)
    back_PbX = torch.stack([own_bX + 100 * (rank + 1) for rank in range(ranks.count)])
    found = (ranks.gather(all_BX + ranks.index), ranks.gather_rows(own_bX, rows), ranks.to_owners(mine_BX),
             ranks.from_owners(back_PbX, rows), ranks.ask(ranks.index * 5))
    owners_B = OWNERS[:rows] % ranks.count
    read_bX = all_BX[torch.from_numpy(owners_B == ranks.index)]
    counted = dict(ranks.traffic)
    assert not rows or torch.equal(ranks.gather_dealt(read_bX, owners_B), all_BX)
    return found, counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_exchange_gives_what_it_says(rank_pool, count, rows, dtype):
    all_BX = numbered(rows, dtype=dtype)
    for index, (found, traffic) in enumerate(rank_pool.run(count, exchanged, rows, dtype)):
        gathered, rows_BX, to_own, from_owners_BX, asked = found
        own = Ranks(index, count).own(rows)
        assert torch.equal(gathered, torch.stack([all_BX + rank for rank in range(count)]))
        assert torch.equal(rows_BX, all_BX)
        assert torch.equal(to_own, torch.stack([all_BX[own] + 100 * (rank + 1) for rank in range(count)]))
        assert torch.equal(from_owners_BX, all_BX + 100 * (index + 1))
        assert asked == [rank * 5 for rank in range(count)]
        row, own_rows, most = 3 * dtype.itemsize, own.stop - own.start, -(-rows // count)
        assert traffic == {"gather": (count - 1) * (rows * row + most * row + 8), "to_owners": (rows - own_rows) * row,
                           "from_owners": (count - 1) * own_rows * row}


def test_one_process_needs_no_group():
    ranks, rows_BX = Ranks.alone(), numbered(5)
    assert torch.equal(ranks.gather(rows_BX), rows_BX[None])
    assert torch.equal(ranks.to_owners(rows_BX), rows_BX[None])
    assert torch.equal(ranks.from_owners(rows_BX[None], 5), rows_BX)
    assert torch.equal(ranks.gather_rows(rows_BX, 5), rows_BX)
    assert torch.equal(ranks.gather_dealt(rows_BX, None), rows_BX)
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
            pipe.send((2, gathering, (1,)))
        pool.processes[1].kill()
        assert pool._pipes[0].poll(30)
        error = pool._pipes[0].recv()
        assert isinstance(error, UserError) and str(error) == LOST
    finally:
        pool.close()


def kept(ranks, lists, k, width):
    shards = len(lists) // ranks.count
    return keep_largest(lists[ranks.index * shards : (ranks.index + 1) * shards], k, width, ranks).values


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few ties"])
@pytest.mark.parametrize(("rows", "shards", "places", "k"), [(9, 4, 5, 5), (6, 4, 2, 5), (3, 8, 4, 4), (1, 2, 3, 3)])
def test_selection_keeps_the_largest_of_all(rank_pool, rows, shards, places, k, levels):
    """And of equal ones those of the lower shard, then those that come first; on any number of ranks."""
    draw = torch.Generator().manual_seed(rows * shards + places)
    lists = [(torch.randint(levels, (rows, places - (shard % 2)), generator=draw) / 7).sort(1, descending=True).values
             for shard in range(shards)]
    wanted = [torch.zeros_like(shard_BK) for shard_BK in lists]
    for row in range(rows):
        places_of_all = [(-float(value), shard, place) for shard, shard_BK in enumerate(lists)
                         for place, value in enumerate(shard_BK[row])]
        for _, shard, place in sorted(places_of_all)[:k]:
            wanted[shard][row, place] = lists[shard][row, place]
    for count in [count for count in legal_counts(shards) if count <= 4]:
        found = [part for one in rank_pool.run(count, kept, lists, k, places) for part in one]
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True)), count


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
