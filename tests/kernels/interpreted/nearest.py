"""`nearest_rows(impl="triton")` in Triton's interpreter."""

import os

import numpy as np
import pytest
import torch
from counted import Traffic
from golden_data import golden
from nearest_data import HARD_CASES, brute_force, hard_case
from vglann_kernels import nearest_rows
from vglann_kernels.nearest import kernel, reference, search

assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what is allocated without a value with NaN, or with an index far outside."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("case", HARD_CASES)
def test_every_row_agrees_with_float64(case):
    queries, database = hard_case(case, n=6, m=300)
    index, squared = nearest_rows(queries, database, impl="triton")
    expected, distance = brute_force(queries, database)
    assert torch.equal(index, expected)
    torch.testing.assert_close(squared, distance.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (2, 129, 13), (257, 130, 3), (3, 500, 128), (3, 140, 160), (2, 130, 512)]
)
def test_sizes_around_the_blocks(n, m, d):
    generator = torch.Generator().manual_seed(n)
    queries, database = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    index, _, stats = nearest_rows(queries, database, impl="triton", return_stats=True)
    assert torch.equal(index, brute_force(queries, database)[0])
    assert stats["certified"] == 1


def test_the_recorded_matches():
    expected = golden("icp_match")
    queries = expected["z"][:15]
    index, squared, stats = nearest_rows(queries, expected["pool"], impl="triton", return_stats=True)
    assert torch.equal(index, expected["index_exact_f64"][:15])
    assert torch.equal(squared, expected["dist2_exact_f64"][:15].float())
    assert stats["impl"] == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_implementations_return_the_same_bits(dtype):
    queries, database = (x.to(dtype) for x in hard_case("near ties", n=10))
    answers = [nearest_rows(queries, database, impl=impl) for impl in ("triton", "reference", "faiss")]
    for index, squared in answers[1:]:
        assert torch.equal(index, answers[0][0])
        assert torch.equal(squared, answers[0][1])


@pytest.mark.parametrize(("narrow", "wide"), [(0, 64), (0, 0)])
def test_the_wider_scan_and_the_reference_take_what_is_left(narrow, wide, monkeypatch):
    monkeypatch.setattr(search, "MAX_GROUPS", (narrow or 1, wide or 1))
    queries, database = hard_case("tight clusters", n=8)
    asked = []
    plain = reference.nearest_rows
    monkeypatch.setattr(reference, "nearest_rows", lambda q, c: asked.append(len(q)) or plain(q, c))
    index, _, stats = nearest_rows(queries, database, impl="triton", return_stats=True)
    assert torch.equal(index, brute_force(queries, database)[0])
    assert stats["certified"] == 0
    assert asked == ([] if wide else [8])


def test_rows_too_long_for_the_kernel():
    rows = torch.zeros(3, 513)
    with pytest.raises(
        ValueError, match="rows of 513 values; the kernel takes up to 512; 'reference' takes it"
    ):
        nearest_rows(rows, rows, impl="triton")
    assert nearest_rows(rows, rows, impl="reference")[0].tolist() == [0, 0, 0]


def test_portions_of_queries_give_the_same_answer(monkeypatch):
    queries, database = hard_case("unit rows", n=130, m=140, d=4)
    whole = nearest_rows(queries, database, impl="triton")
    monkeypatch.setattr(search, "MAXIMA_BYTES", 1)
    assert all(map(torch.equal, nearest_rows(queries, database, impl="triton"), whole))


def test_a_database_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(search, "_free_bytes", lambda x: 100_000)
    with pytest.raises(MemoryError, match=r"700 rows needs \d\d\d,\d\d\d bytes of scratch, 100,000 are free"):
        nearest_rows(*hard_case("unit rows"), impl="triton")
    monkeypatch.setattr(search, "_free_bytes", lambda x: 130_000)  # of a tile's 102,496
    assert (
        nearest_rows(*hard_case("unit rows"), impl="triton", return_stats=True)[2]["scratch_bytes"] < 130_000
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "case",
    ["unit rows", "norms 0.1 to 10", "offset 1000", "tight clusters", "one outlier", "queries far off"],
)
def test_the_bound_holds_and_is_not_loose(case, parts):
    """Every group's score is within its bound of the true one; for unit rows a few times the rounding."""
    queries, database = hard_case(case, n=6, m=300)
    scan = search._Scan(database, database.double().mean(dim=0), parts, 16, len(queries))
    q = scan._packed(queries, scan.tile, queries=True)
    maxima = kernel.scan(q, scan.c, parts, scan.options)
    error, bound, unit = error_and_bound(maxima, scan, q, queries, database)
    assert (error <= bound).all()
    if case == "unit rows":
        x, y = (rows.double() - scan.offset for rows in (queries, database))
        relative = bound / unit / x.norm(dim=1) / y.norm(dim=1).mean()
        assert relative.median() < (8e-4 if parts == 1 else 4e-5)


def error_and_bound(maxima, scan, q, queries, database):
    """(error [groups,n] of the largest scores of the groups, their bound, one score's unit [n]); float64."""
    maxima = maxima[:, : len(queries)].double()
    times, c_length, c_lost, c_half = scan.c.numbers.double()[:, :, None]
    q_times, q_length, q_lost, q_always = q.numbers[:, : len(queries)].double()
    bound = c_length * q_length + c_lost * q_lost + c_half * q_times + q_always
    x, y = (rows.double() - scan.offset for rows in (queries, database))
    exact = y @ x.T - y.square().sum(dim=1, keepdim=True) / 2  # [M,n]
    exact = torch.stack([part.amax(dim=0) for part in exact.split(kernel.GROUP_ROWS)])
    # Packed queries are divided by 2^e and scores come in units of 2^typical: e from the query's factor.
    unit = q_times / 2.0**scan.typical / 2.0**scan.typical
    return (maxima * times - exact * unit).abs(), bound, unit


def on_tensor_cores(q, c, block, extra):
    """Products of float16 rows q [n,K] and c [m,K], summed as tensor cores do (arXiv 2512.07004); float64 [n,m].

    `block` products and the sum so far are aligned to the largest exponent among them, cut to 23 + `extra` bits below
    it, and added; the sum is cut to 24 bits.
    """

    def exponents(x, smallest):
        return np.where(x == 0, -1000, np.maximum(np.frexp(x)[1] - 1, smallest))

    q, c = q.astype(np.float64), c.astype(np.float64)
    q_exponents, c_exponents = exponents(q, -14), exponents(c, -14)
    total = np.zeros((len(q), len(c)))
    for start in range(0, q.shape[1], block):
        at = slice(start, start + block)
        products = q[:, None, at] * c[None, :, at]
        largest = (q_exponents[:, None, at] + c_exponents[None, :, at]).max(axis=2)
        unit = np.ldexp(1.0, np.maximum(np.maximum(largest, exponents(total, -149)), -500) - 23 - extra)
        total = (np.trunc(products / unit[..., None]).sum(axis=2) + np.trunc(total / unit)) * unit
        fraction, exponent = np.frexp(total)
        total = np.ldexp(np.trunc(np.ldexp(fraction, 24)), exponent - 24)
    return total


def scanned_on_tensor_cores(q, c, parts, block, extra):
    """Return the result of `kernel.scan`, [groups,queries], where tensor cores sum."""
    q_high, q_low, c_high, c_low = (x.numpy() for x in (q.high, q.low, c.high, c.low))
    scores = on_tensor_cores(q_high, c_high, block, extra).astype(np.float32)
    if parts == 2:
        # The small sum takes a step of one product, then a step of the other.
        step = kernel.STEP.value
        starts = range(0, q_high.shape[1], step)
        left = np.concatenate([x[:, i : i + step] for i in starts for x in (q_high, q_low)], axis=1)
        right = np.concatenate([x[:, i : i + step] for i in starts for x in (c_low, c_high)], axis=1)
        scores += on_tensor_cores(left, right, block, extra).astype(np.float32)
    groups = torch.from_numpy(scores.T).split(kernel.GROUP_ROWS)
    return torch.stack([group.amax(dim=0) for group in groups])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("case", ["unit rows", "tight clusters"])
def test_sums_of_tensor_cores_stay_inside_the_bound(case, block, extra, parts):
    queries, database = hard_case(case, n=4, m=140)
    scan = search._Scan(database, database.double().mean(dim=0), parts, 16, len(queries))
    scan.tile = len(queries)
    q = scan._packed(queries, kernel.GROUP_ROWS, queries=True)
    q.high, q.low = q.high[: len(queries)], q.low[: len(queries)]
    maxima = scanned_on_tensor_cores(q, scan.c, parts, block, extra)
    error, bound, _ = error_and_bound(maxima, scan, q, queries, database)
    assert (error <= bound).all()


@pytest.mark.parametrize("block", [4, 8, 16])
def test_every_product_that_is_cut_off_is_inside_the_bound(block):
    """Rows made for it: each small product is just under the unit that the large one leaves, and is lost."""
    d = 126
    query, row = torch.full((1, d), 2.0**-11), torch.full((1, d), 2.0**-12 * (1 - 2.0**-10))
    query[0, 0] = row[0, 0] = 1
    database = torch.cat([row, -row])
    scan = search._Scan(database, torch.zeros(d, dtype=torch.float64), 1, 16, 1)
    q = scan._packed(query, kernel.GROUP_ROWS, queries=True)
    q.high, q.low = q.high[:1], q.low[:1]
    maxima = scanned_on_tensor_cores(q, scan.c, 1, block, extra=0)
    error, bound, _ = error_and_bound(maxima, scan, q, query, database)
    assert 0.4 * bound < error <= bound


def test_the_scan_moves_what_the_readme_counts():
    """Queries once, the packed database once a tile of queries, one float32 a query and group: no matrix."""
    queries, database = hard_case("unit rows", n=12, m=1000)
    scan = search._Scan(database, database.double().mean(dim=0), 1, 16, len(queries))
    q = scan._packed(queries, scan.tile, queries=True)
    with Traffic() as traffic:
        kernel.scan(q, scan.c, 1, scan.options)
    assert traffic.bytes == q.high.nbytes + scan.c.high.nbytes + scan.tile * 8 * 4
    assert q.high.nbytes == 256 * 32 * 2
    assert scan.c.high.nbytes == 1024 * 32 * 2
