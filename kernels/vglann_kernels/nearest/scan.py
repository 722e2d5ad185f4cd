"""A pass of the reference over a database: the rows that may be nearest, by scores of one dtype and their bound."""

import torch
from torch import Tensor

# A block of scores on the CPU: 8 MB in float32, so that it stays in a core's cache.
QUERIES, ROWS = 1024, 2048
# Rows of a block on a GPU, where 256 MB are little and each of many small launches costs.
CUDA_ROWS = 1 << 16
# Groups of rows that a block is first reduced to.
GROUPS = 32
# Candidates of one query above which it waits for the next dtype.
MANY = 64
PAIRS = 1 << 22  # candidates in memory at most, before they are pruned


class Scan:
    """One pass of the `queries` [N,d] over a database, in scores of one dtype."""

    def __init__(self, queries: Tensor, offset: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.offset, self.scale, self.dtype = offset, scale, dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32  # what products are summed in
        n, device = len(queries), queries.device
        _, rounded, length, lost = self._rounded(queries)
        self.q = torch.cat([rounded, rounded.new_ones(n, 3)], dim=1)  # [N,d+3]: the score is one product
        # A sum of d + 3 products in any order is off by at most (d + 3) eps of the sum of their sizes; eps is
        # twice the rounding unit, which covers matrix units that truncate.
        self.summing = (queries.shape[1] + 16) * torch.finfo(self.real).eps
        self.by_length = (lost + self.summing * length).to(self.real)
        self.by_lost = length.to(self.real)
        # Rows whose float64 distances are equal up to rounding must all be compared there: a distance, below
        # 2 (|q|^2 + |c|^2), is rounded by less than d + 8 times 2^-53 of it.
        self.deciding = (queries.shape[1] + 8) * 2.0**-52
        self.always = (self.deciding * length.square()).to(self.real)
        self.lower = torch.full((n,), -torch.inf, dtype=self.real, device=device)  # of the best score
        self.many = torch.zeros(n, dtype=torch.bool, device=device)
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # (query, row, most the score can be)
        self.limit = min(PAIRS, MANY * n)  # candidates in memory, above which they are pruned
        self.rows = ROWS if device.type == "cpu" else CUDA_ROWS
        self.block = torch.empty(min(n, QUERIES) * self.rows, dtype=dtype, device=device)
        self.scratch_bytes = self.q.nbytes + self.block.nbytes

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (x in the frame float64, rounded to the dtype, its length [n], length of what was cut off [n])."""
        exact = (x.double() - self.offset) * self.scale
        rounded = exact.to(self.dtype)
        return exact, rounded, rounded.double().norm(dim=1), (exact - rounded.double()).norm(dim=1)

    def look_at(self, database: Tensor, first: int) -> None:
        """Keep what may be nearest among these rows [m,d], which are number `first` and following."""
        exact, rounded, length, lost = self._rounded(database)
        half = exact.square().sum(dim=1) / 2
        pieces, rest = [], half
        for _ in range(3):
            pieces.append(-rest.to(self.dtype))
            rest = rest + pieces[-1].double()
        c = torch.cat([rounded, torch.stack(pieces, dim=1)], dim=1)  # [m,d+3]
        # |q.c - q'.c'| <= |q - q'||c| + |q'||c - c'| for the rounded q' and c'; then |c|^2/2 and the sum
        by_length, by_lost = (length + lost).amax().to(self.real), lost.amax().to(self.real)
        rest = (rest.abs() + (self.summing + 2 * self.deciding) * half).amax().to(self.real) + c.shape[
            1
        ] * 2.0**-120
        for i in range(0, len(self.q), QUERIES):
            part = slice(i, i + QUERIES)
            bound = self.by_length[part] * by_length + self.by_lost[part] * by_lost
            bound = 1.001 * (bound + self.always[part] + rest)
            self._keep(part, c, bound, first)

    def _keep(self, part: slice, c: Tensor, bound: Tensor, first: int) -> None:
        if bool(self.many[part].all()):
            return
        q, m, eps = self.q[part], len(c), torch.finfo(self.dtype).eps
        scores = torch.mm(q, c.T, out=self.block[: len(q) * m].view(len(q), m))
        apart = max(1, m // GROUPS)  # rows i, i + apart, i + 2 apart, .. are group i
        whole = m // apart * apart
        top = scores[:, :whole].unflatten(1, (-1, apart)).amax(dim=1)  # [n,apart]
        top[:, : m - whole] = torch.maximum(top[:, : m - whole], scores[:, whole:])
        best = top.amax(dim=1).to(self.real)
        torch.maximum(self.lower[part], best - bound - eps * best.abs(), out=self.lower[part])
        reach = self.lower[part] - bound
        reach = (reach - eps * reach.abs()).to(self.dtype)
        query = (best >= reach).nonzero()[:, 0]
        self.many[part][query] |= (top[query] >= reach[query, None]).sum(dim=1) >= MANY
        query = query[~self.many[part][query]]
        hit, group = (top[query] >= reach[query, None]).nonzero(as_tuple=True)
        row = group[:, None] + torch.arange(0, m, apart, device=q.device)  # [hits,members]
        query = query[hit][:, None].expand_as(row)[row < m]
        row = row[row < m]
        value = scores[query, row]
        near = value >= reach[query]
        query, row, value = query[near], row[near], value[near].to(self.real)
        self.kept.append((query + part.start, row + first, value + bound[query] + eps * value.abs()))
        if sum(len(query) for query, _, _ in self.kept) > self.limit:
            self._prune()

    def _prune(self) -> None:
        query, row, most = (torch.cat([kept[i] for kept in self.kept]) for i in range(3))
        self.scratch_bytes = max(self.scratch_bytes, self.q.nbytes + self.block.nbytes + 40 * len(query))
        near = most >= self.lower[query]
        self.many |= query[near].bincount(minlength=len(self.q)) > MANY
        near &= ~self.many[query]
        self.kept = [(query[near], row[near], most[near])]
        self.limit = max(self.limit, 2 * len(self.kept[0][0]))

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Return (query, row) pairs with the nearest row, and all that equal it, of every query except the `many`."""
        self._prune()
        return self.kept[0][0], self.kept[0][1]
