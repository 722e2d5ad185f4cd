"""`nearest_rows`: every implementation gives the float64 brute-force answer, on data made to break it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_data import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest_data import HARD_CASES, brute_force, hard_case
from vglann_kernels import ImplUnavailable, nearest_rows, using_impl
from vglann_kernels.nearest import exact, faiss, reference
from vglann_kernels.nearest import scan as passes
from vglann_kernels.nearest.exact import frame

IMPLS = ("reference", "faiss")


@pytest.mark.parametrize("impl", IMPLS)
def test_the_recorded_matches(impl):
    expected = golden("icp_match")  # rows 800 and 1023 duplicate rows 7 and 3
    index, squared = nearest_rows(expected["z"], expected["pool"], impl=impl)
    assert torch.equal(index, expected["index"][:, 0])
    assert torch.equal(index, expected["index_exact_f64"])
    assert torch.equal(squared, expected["dist2_exact_f64"].float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", HARD_CASES)
def test_every_row_agrees_with_float64(impl, case):
    queries, database = hard_case(case)
    index, squared, stats = nearest_rows(queries, database, impl=impl, return_stats=True)
    expected, distance = brute_force(queries, database)
    assert torch.equal(index, expected)
    torch.testing.assert_close(squared, distance.float(), rtol=1e-6, atol=0)
    assert (index.dtype, squared.dtype) == (torch.int64, torch.float32)
    assert stats["impl"] == impl


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (3, 2049, 5), (1025, 33, 3), (7, 5000, 1), (5, 90, 512)]
)
def test_sizes_around_the_blocks(impl, n, m, d):
    generator = torch.Generator().manual_seed(n)
    queries, database = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    index, _ = nearest_rows(queries, database, impl=impl)
    assert torch.equal(index, brute_force(queries, database)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_inputs_are_decided_in_float64(impl):
    queries, database = (x.double() for x in hard_case("unit rows"))
    twins = database * (1 + 1e-12 * torch.randn(len(database), 1).double())
    database = torch.cat([twins, database])  # float32 cannot tell them apart
    index, _ = nearest_rows(queries, database, impl=impl)
    expected, _ = brute_force(queries, database)
    assert torch.equal(index, expected)
    assert 0.2 < (index < len(database) // 2).float().mean() < 0.8


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_searched_as_they_lie(impl):
    queries, database = hard_case("unit rows")
    wide = torch.randn(2 * len(database), 40, generator=torch.Generator().manual_seed(1))
    wide[::2, ::2] = database
    before = wide.clone()
    index, _ = nearest_rows(queries.T.contiguous().T, wide[::2, ::2], impl=impl)
    assert torch.equal(index, brute_force(queries, database)[0])
    assert torch.equal(wide, before)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20), m=st.integers(1, 200), d=st.integers(1, 12))
@pytest.mark.parametrize("impl", IMPLS)
def test_a_permuted_database_permutes_the_answer(impl, seed, n, m, d):
    generator = torch.Generator().manual_seed(seed)
    queries, database = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    order = torch.randperm(m, generator=generator)
    index, squared = nearest_rows(queries, database, impl=impl)
    permuted, again = nearest_rows(queries, database[order], impl=impl)
    distances = (queries.double()[:, None] - database.double()).square().sum(dim=2)
    unique = (distances == distances.amin(dim=1, keepdim=True)).sum(dim=1) == 1
    assert torch.equal(order[permuted][unique], index[unique])
    assert torch.equal(squared, again)
    recomputed = (queries.double() - database[index].double()).square().sum(dim=1)
    torch.testing.assert_close(squared, recomputed.float(), rtol=1e-6, atol=0)


def test_faiss_asks_for_more_until_the_bound_certifies(monkeypatch):
    asked = []
    import faiss as library

    search = library.IndexFlatL2.search

    def counted(index, rows, k):
        asked.append(k)
        return search(index, rows, k)

    monkeypatch.setattr(library.IndexFlatL2, "search", counted)
    queries, database = hard_case("tightest clusters", m=2000)
    index, _ = nearest_rows(queries, database, impl="faiss")
    assert torch.equal(index, brute_force(queries, database)[0])
    assert asked[0] == faiss.FIRST
    assert max(asked) > faiss.FIRST
    asked.clear()
    nearest_rows(*hard_case("unit rows", m=2000), impl="faiss")
    assert asked == [faiss.FIRST]


def test_the_reference_decides_few_pairs_in_float64():
    queries, database = hard_case("unit rows", m=5000)
    _, _, stats = nearest_rows(queries, database, impl="reference", return_stats=True)
    assert stats["certified"] == 1
    assert 1 <= stats["candidates_per_query"] < 2.5
    assert stats["scratch_bytes"] < 16e6


def test_bfloat16_products_are_allowed_for():
    queries, database = hard_case("unit rows", m=5000)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        index, _ = nearest_rows(queries, database, impl="reference")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(index, brute_force(queries, database)[0])


def test_scratch_is_bounded():
    """10,000 x 30,000 distances would be 1.2 GB; the search may add 150 MB to the process."""
    code = (
        "import resource, torch; from vglann_kernels import nearest_rows\n"
        "torch.set_num_threads(1)\n"
        "q, c = torch.randn(10000, 4), torch.randn(30000, 4)\n"
        "nearest_rows(q[:10], c[:10])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "nearest_rows(q, c, impl='reference')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def test_the_switch():
    queries, database = hard_case("unit rows")
    with using_impl("reference,nearest=faiss"):
        assert nearest_rows(queries, database, return_stats=True)[2]["impl"] == "faiss"
    with using_impl("reference"):
        assert nearest_rows(queries, database, return_stats=True)[2]["impl"] == "reference"
    with pytest.raises(ValueError, match=r"no implementation 'cuda' .* it has auto, reference, .*faiss"):
        nearest_rows(queries, database, impl="cuda")


def test_what_keeps_an_implementation_from_running(monkeypatch):
    with pytest.raises(ImplUnavailable, match="TRITON_INTERPRET=1"):
        nearest_rows(*hard_case("unit rows"), impl="triton")
    assert "built without GPU support" in faiss.why_not(torch.device("cuda", 7))
    installed = [
        SimpleNamespace(metadata={"Name": name}) for name in ("faiss-cpu", "torch", "faiss-gpu-cu13-cuvs")
    ]
    monkeypatch.setattr(faiss, "distributions", lambda: installed)
    assert "pip uninstall faiss-cpu faiss-gpu-cu13-cuvs" in faiss.why_not(torch.device("cuda", 8))


def test_faiss_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss.why_not.cache_clear()
    try:
        with pytest.raises(ImplUnavailable, match="pip install faiss-cpu"):
            nearest_rows(*hard_case("unit rows"), impl="faiss")
    finally:
        faiss.why_not.cache_clear()


def _with(value, row=3):
    rows = torch.zeros(10, 4)
    rows[row, 1] = value
    return rows


GOOD = torch.zeros(10, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("queries", "database", "error", "message"),
    [
        (GOOD, torch.zeros(5, 3), ValueError, r"database: expected shape \(M, 4\), got \(5, 3\)"),
        (GOOD[0], GOOD, ValueError, r"queries: expected shape \(N, d\), got \(4,\)"),
        (GOOD, GOOD[:1].expand(2**31, 4), ValueError, "at most 2147483647 rows, got 2147483648"),
        (GOOD, torch.zeros(0, 4), ValueError, "at least one row"),
        (torch.zeros(3, 0), torch.zeros(3, 0), ValueError, "at least one row and one column"),
        (GOOD.half(), GOOD.half(), TypeError, "queries: expected float32 or float64, got float16"),
        (GOOD, GOOD.double(), TypeError, "database: expected float32, got float64"),
        ([[0.0]], GOOD, TypeError, "queries: expected a tensor, got list"),
        (_with(float("nan")), GOOD, ValueError, "queries: expected finite values"),
        (GOOD, _with(float("nan")), ValueError, "database: expected finite values"),
        (GOOD, _with(float("-inf")), ValueError, "database: expected finite values"),
        (GOOD, torch.zeros(10, 4, device="meta"), ValueError, "database: expected device cpu"),
    ],
)  # fmt: skip
def test_bad_input(impl, queries, database, error, message):
    with pytest.raises(error, match=message):
        nearest_rows(queries, database, impl=impl)


def _scan(case, dtype, **sizes):
    """A finished scan of a hard case, and in its frame the exact scores [N,M] and the greatest length."""
    queries, database = hard_case(case, **sizes)
    offset, scale = frame(queries, database)
    q, c = ((x.double() - offset) * scale for x in (queries, database))
    scan = passes.Scan(queries, offset, scale, dtype)
    scan.look_at(database, 0)
    return scan, q @ c.T - c.square().sum(dim=1) / 2, torch.cat([q, c]).norm(dim=1).amax()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["unit rows", "norms 0.1 to 10", "offset 1000", "tight clusters"])
def test_the_bound_of_a_scan_is_one(case, dtype):
    """No score reaches above what the scan says it can be at most; and that is not far above it."""
    scan, exact, longest = _scan(case, dtype)
    best = exact.amax(dim=1)
    assert (scan.lower.double() <= best).all()
    query, row, most = (torch.cat([kept[i] for kept in scan.kept]) for i in range(3))
    scores = exact[query, row]
    assert (most.double() >= scores).all()
    loose = (4 * torch.finfo(dtype).eps + 100 * 2.0**-23) * longest**2
    assert (most.double() - scores <= loose).all()


def test_a_pass_that_would_decide_little_is_left_out(monkeypatch):
    """A sample of the queries is looked at first; a pass is made only where it decides half of them."""
    monkeypatch.setattr(reference, "PROBED", 4)
    made = []
    plain = reference.scanned

    def scanned(queries, *rest):
        made.append((len(queries), rest[-1]))
        return plain(queries, *rest)

    monkeypatch.setattr(reference, "scanned", scanned)
    monkeypatch.setattr(reference, "score_dtypes", lambda device: [torch.float32, torch.float64])
    for case, queried in (("unit rows", [4, 260]), ("tightest clusters", [4, 260])):
        made.clear()
        queries, database = hard_case(case, n=260, m=2000)
        index, _, stats = nearest_rows(queries, database, impl="reference", return_stats=True)
        assert torch.equal(index, brute_force(queries, database)[0])
        assert [n for n, _ in made] == queried
        assert made[-1][1] == (torch.float32 if case == "unit rows" else torch.float64)
        assert stats["certified"] == 1


def test_queries_that_need_another_pass_do_not_cost_the_others(monkeypatch):
    """Once a block's queries all wait for the next dtype their products are no longer made."""
    queries, database = hard_case("tight clusters", n=100, m=9000)
    scan = passes.Scan(queries, *frame(queries, database), torch.bfloat16)
    looked_at = []
    monkeypatch.setattr(torch, "mm", lambda *a, mm=torch.mm, **k: looked_at.append(1) or mm(*a, **k))
    for first in range(0, len(database), scan.rows):
        scan.look_at(database[first : first + scan.rows], first)
    assert bool(scan.many.all())
    assert 0 < len(looked_at) < -(-len(database) // scan.rows)


def test_candidates_are_pruned_while_they_are_collected(monkeypatch):
    monkeypatch.setattr(passes, "PAIRS", 100)
    queries, database = hard_case("tight clusters", n=200, m=5000)
    index, _ = nearest_rows(queries, database, impl="reference")
    assert torch.equal(index, brute_force(queries, database)[0])


def test_direct_search_looks_at_equal_rows_once(monkeypatch):
    queries, database = hard_case("integers", n=20, m=5000)  # at most 5^4 distinct rows
    monkeypatch.setattr(exact, "TERMS", 1000)  # many parts
    looked_at = []
    plain = exact.direct_distance
    monkeypatch.setattr(exact, "direct_distance", lambda *a: looked_at.append(len(a[3])) or plain(*a))
    index, distance = exact.direct_search(queries, database)
    expected = brute_force(queries, database)
    assert torch.equal(index, expected[0])
    assert torch.equal(distance, expected[1])
    assert len(looked_at) > 5
    assert sum(looked_at) <= 20 * 5**4


def test_distances_do_not_depend_on_where_a_row_lies():
    queries, database = torch.randn(3, 101), torch.randn(1, 101).expand(5000, 101)
    row = torch.arange(5000).repeat(3)
    query = torch.arange(3).repeat_interleave(5000)
    distance = exact.direct_distance(queries, database, query, row).view(3, 5000)
    assert (distance == distance[:, :1]).all()
