"""Several groups of layers behind the interface of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pace.kvcache.group import GroupTables
from pace.kvcache.tables import KVTables, ReleasedError, Reuse
from pace.models.plan import I32Array

__all__ = ["GroupedReuse", "GroupedTables", "join_groups"]

CLOSED = -1  # in place of a row's room: nobody owns the row


def join_groups(groups: Sequence[GroupTables]) -> KVTables:
    """The tables of a model: those of its only group, or all of them as one."""
    return groups[0] if len(groups) == 1 else GroupedTables(groups)


@dataclass(frozen=True, slots=True)
class GroupedReuse(Reuse):
    """What a row begins with, one part per group, all of `n_tokens`."""

    parts: tuple[Reuse, ...]


class GroupedTables(KVTables):
    """A row here is the row of the same number in every group: all of them are opened and closed together.

    Counts of blocks are sums over the groups. An operation costs what it costs in each group.

    Args:
        groups: at least one, each with the same number of rows and none of them open.
    """

    def __init__(self, groups: Sequence[GroupTables]) -> None:
        self._groups = tuple(groups)
        self.n_rows = groups[0].n_rows
        self.n_blocks = sum(group.n_blocks for group in groups)
        self.block_size = max(group.block_size for group in groups)
        self.has_reach = any(group.has_reach for group in groups)
        self.max_step = min(group.max_step for group in groups)
        self._room = [CLOSED] * self.n_rows  # tokens that the row may hold without further ado
        self._query = 0  # limit of the last match, until it is counted
        self._n_queries = self._n_query_tokens = self._n_hit_tokens = 0

    @property
    def groups(self) -> tuple[GroupTables, ...]:
        """The tables of each group of layers."""
        return self._groups

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, cached and promised ones included."""
        return sum(group.n_free for group in self._groups)

    @property
    def n_available(self) -> int:
        """Blocks that nobody holds and nobody was promised."""
        return sum(group.n_available for group in self._groups)

    @property
    def n_open(self) -> int:
        """Rows in use."""
        return self._groups[0].n_open

    @property
    def capacity(self) -> int:
        """Tokens of the longest row that fits when there is no other."""
        return min(group.capacity for group in self._groups)

    def open(self, reserve: int, reuse: Reuse | None = None, salt: str | None = None) -> int | None:
        """Take a row; see `KVTables.open`."""
        query, self._query = self._query, 0
        parts = self._parts(reuse)
        pairs = list(zip(self._groups, parts, strict=True))
        if not all(group.fits(reserve, (), part) for group, part in pairs):
            return None
        rows = [group.open(reserve, part, salt) for group, part in pairs]
        row = rows[0]
        if row is None or any(other != row for other in rows):
            raise RuntimeError(f"a row was opened as {rows} in its groups; a group was used by itself")
        self._refresh(row)
        if query:
            self._n_queries += 1
            self._n_query_tokens += query
            self._n_hit_tokens += 0 if reuse is None else reuse.n_tokens
        return row

    def extend(self, row: int, n_tokens: int) -> bool:
        """Let the row hold `n_tokens`; see `KVTables.extend`."""
        grows = n_tokens > self._room[row]
        if grows and not all(group.can_extend(row, n_tokens) for group in self._groups):
            return False
        for (
            group
        ) in self._groups:  # also where there is room: an extent notes what it must copy when it moves
            group.extend(row, n_tokens)
        if grows:
            self._refresh(row)
        return True

    def truncate(self, row: int, n_tokens: int) -> None:
        """Let the row hold only its first `n_tokens`; see `KVTables.truncate`."""
        if not all(group.can_truncate(row, n_tokens) for group in self._groups):
            raise ReleasedError(
                f"truncate of row {row} to {n_tokens} tokens: a query there sees what is released"
            )
        for group in self._groups:
            group.truncate(row, n_tokens)
        self._refresh(row)

    def close(self, row: int, tokens: I32Array | None = None, forget: bool = False) -> None:
        """Free the row; see `KVTables.close`."""
        for group in self._groups:
            group.close(row, tokens, forget)
        self._room[row] = CLOSED

    def commit(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Index the blocks that have become full; see `KVTables.commit`."""
        for group in self._groups:
            group.commit(row, tokens, n_valid)

    def remember_tail(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Index the partly filled last block too; see `KVTables.remember_tail`."""
        for group in self._groups:
            group.remember_tail(row, tokens, n_valid)

    def match(self, tokens: I32Array, salt: str | None, limit: int) -> Reuse | None:
        """Find the longest prefix that every group has cached as far as it is seen; see `KVTables.match`."""
        found = []
        n_tokens = self._query = limit
        for group in self._groups:
            # A block more than can be used: its beginning is known where all of it is, though too short to look for.
            part = group.find(tokens, salt, min(limit, n_tokens + group.block_size)) if n_tokens else None
            if part is None:
                return None
            n_tokens = part.longest(n_tokens)
            found.append(part)
        # Each says how far back from a length it must go; they agree where none must.
        longest = -1
        while n_tokens and n_tokens != longest:
            longest = n_tokens
            for part in found:
                n_tokens = part.longest(n_tokens)
        if not n_tokens:
            return None
        return GroupedReuse(n_tokens, tuple(part.reuse(n_tokens) for part in found))

    def fork(self, row: int, n_tokens: int) -> Reuse | None:
        """The first `n_tokens` of a live row; see `KVTables.fork`."""
        self._query = 0
        parts = [group.fork(row, n_tokens) for group in self._groups]
        found = tuple(part for part in parts if part is not None)
        return GroupedReuse(n_tokens, found) if len(found) == len(parts) else None

    def release_before(self, row: int, position: int) -> None:
        """Free what nobody sees any more; see `KVTables.release_before`."""
        for group in self._groups:
            group.release_before(row, position)

    def fits(
        self, n_tokens: int, growing: Sequence[tuple[int, int]] = (), reuse: Reuse | None = None
    ) -> bool:
        """Whether a row of `n_tokens` could be opened now; see `KVTables.fits`."""
        return all(
            group.fits(n_tokens, growing, part)
            for group, part in zip(self._groups, self._parts(reuse), strict=True)
        )

    def step_end(self, position: int) -> int:
        """Tokens to which a row may be extended in a step; see `KVTables.step_end`."""
        return min(group.step_end(position) for group in self._groups)

    def has_room(self, coming: Iterable[int], leaving: Iterable[int] = ()) -> bool:
        """Whether rows would fit if others were closed; see `KVTables.has_room`."""
        coming, leaving = list(coming), list(leaving)
        return all(group.has_room(coming, leaving) for group in self._groups)

    def stats(self) -> dict[str, int]:
        """Counters since the start; see `KVTables.stats`."""
        total: dict[str, int] = {}
        for group in self._groups:
            for name, value in group.stats().items():
                total[name] = total.get(name, 0) + value
        return total | {
            "queries": self._n_queries,
            "query_tokens": self._n_query_tokens,
            "hit_tokens": self._n_hit_tokens,
        }

    def _parts(self, reuse: Reuse | None) -> tuple[Reuse | None, ...]:
        if reuse is None:
            return (None,) * len(self._groups)
        if not isinstance(reuse, GroupedReuse):
            raise RuntimeError("this prefix was found by one group; match or fork all of them")
        return reuse.parts

    def _refresh(self, row: int) -> None:
        """Recompute what every step looks at."""
        self._room[row] = min(group.room(row) for group in self._groups)
