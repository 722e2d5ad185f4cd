"""`nearest_rows(impl="triton")` in Triton's interpreter; run by test_kernels_interpreted.py."""

import os

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
    """What is allocated without a value is NaN, or an index far outside."""
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
    queries, database = hard_case("unit rows", n=257, m=200, d=4)
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
    maxima = kernel.scan(q, scan.c, parts, scan.options)[:, : len(queries)].double()
    times, c_length, c_lost, c_half = scan.c.numbers.double()[:, :, None]
    q_times, q_length, q_lost, q_always = q.numbers[:, : len(queries)].double()
    bound = c_length * q_length + c_lost * q_lost + c_half * q_times + q_always  # [groups,n]
    x, y = (rows.double() - scan.offset for rows in (queries, database))
    exact = y @ x.T - y.square().sum(dim=1, keepdim=True) / 2  # [M,n]
    exact = torch.stack([part.amax(dim=0) for part in exact.split(kernel.GROUP_ROWS)])
    # Packed queries are divided by 2^e and scores come in units of 2^typical: e from the query's factor.
    unit = q_times / 2.0**scan.typical / 2.0**scan.typical
    error = (maxima * times - exact * unit).abs()
    assert (error <= bound).all()
    if case == "unit rows":
        relative = bound / unit / x.norm(dim=1) / y.norm(dim=1).mean()
        assert relative.median() < (8e-4 if parts == 1 else 4e-5)


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
