"""Which processes train which SAEs.

The ranks form teams of equal size: as many ranks as can share an SAE's shards (`train.shards`) train it together, and
different teams train different SAEs. With one shard, each rank is a team. The teams decide only who does the work, not
the result.
"""

from collections.abc import Callable, Sequence

import torch

from olmoscope.distributed.launch import World, join_team
from olmoscope.distributed.ranks import Ranks
from olmoscope.distributed.sums import legal_counts, team_size
from olmoscope.errors import UserError
from olmoscope.recipe.schema import CoderConfig, Recipe


def assign(recipe: Recipe, saes: Sequence[CoderConfig], is_done: Callable[[CoderConfig], bool], device: torch.device,
           world: World) -> list[tuple[Ranks, list[CoderConfig]]]:
    """The SAEs that this rank trains, and the ranks with which it trains them. SAEs with the most shards come first.
    All ranks must call this.

    Args:
        saes: the SAEs to train.
        is_done: whether an SAE is finished; the first rank's answers count.

    Raises:
        UserError: some ranks would have nothing to do.
    """
    ranks = world.ranks
    if ranks.count == 1:
        return [(ranks, list(saes))]
    refuse_idle_ranks(recipe, saes, ranks.count)
    done = ranks.gather(torch.tensor([is_done(sae) for sae in saes]))[0].tolist()
    missing = [sae for sae, finished in zip(saes, done, strict=True) if not finished]
    assigned = []
    for shards, group in _by_shards(recipe, missing):
        team = join_team(ranks, shards, device)
        assigned.append((team.ranks, share_out(group, team.teams)[team.number]))
    return assigned


def refuse_idle_ranks(recipe: Recipe, saes: Sequence[CoderConfig], count: int) -> None:
    """Refuse a number of ranks that would leave a rank with nothing to train.

    Raises:
        UserError: there are more ranks than SAEs and shards to train, or their number cannot share the shards.
    """
    groups = _by_shards(recipe, saes)
    if all(_all_busy(count, shards, len(group)) for shards, group in groups):
        return
    shards, group = next((shards, group) for shards, group in groups if not _all_busy(count, shards, len(group)))
    counts = [fewer for fewer in range(1, count) if all(_all_busy(fewer, each, len(saes)) for each, saes in groups)]
    many = f"{len(group)} SAEs" if len(group) > 1 else "1 SAE"
    raise UserError(f"{count} processes cannot share {many} with train.shards: {shards} "
                    f"({_listed(legal_counts(shards))} can share one SAE): start {_listed(counts)}, or change "
                    "train.shards")


def _all_busy(count: int, shards: int, saes: int) -> bool:
    """Whether each team has an SAE to train, with `count` ranks and `saes` SAEs."""
    return count // team_size(count, shards) <= saes


def share_out(saes: Sequence[CoderConfig], teams: int) -> list[list[CoderConfig]]:
    """The SAEs of each team: shares of about equal cost. SAEs of the same sites stay together if that keeps the shares
    equal, because they share a pass."""
    ordered = sorted(saes, key=lambda sae: tuple(sae.sites))  # stable
    total = sum(sae.d_sae for sae in ordered)
    shares: list[list[CoderConfig]] = [[] for _ in range(teams)]
    before = 0
    for sae in ordered:
        shares[(2 * before + sae.d_sae) * teams // (2 * total)].append(sae)
        before += sae.d_sae
    return shares


def _by_shards(recipe: Recipe, saes: Sequence[CoderConfig]) -> list[tuple[int, list[CoderConfig]]]:
    groups: dict[int, list[CoderConfig]] = {}
    for sae in saes:
        groups.setdefault(recipe.train_of(sae).shards, []).append(sae)
    return sorted(groups.items(), reverse=True, key=lambda item: item[0])


def _listed(counts: Sequence[int]) -> str:
    *first, last = map(str, counts)
    return f"{', '.join(first)} or {last}" if first else last
