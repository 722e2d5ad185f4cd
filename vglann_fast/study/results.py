"""Results of a study: preference shares with exact intervals, and how far the raters agree.

Who is counted. A rater whose answers to the attention checks could well be guesses is left out whole: it counts
only who passed so many of the checks answered that guessing would pass as many with a probability of at most 5 %
(7 or 8 of 8; all of 5, 6 or 7; nobody who answered fewer than 5).

Shares. Of two sources, how often the first was taken for the more realistic, with the Clopper-Pearson interval at
95 % (Biometrika 1934). The interval is exact for independent answers; several answers of one rater, or to one pair,
are not quite independent, so with few raters the truth is less certain than it says.

Agreement. Krippendorff's alpha for nominal data (Computing Krippendorff's Alpha-Reliability, 2011), which allows
for pairs that not everybody answered; its two categories are the two sides of a pair as drawn. Those are balanced, so
that chance agrees half the time whatever is preferred: 1 is full agreement on which video of each pair, 0 is chance.
Attention checks do not enter.

results.json: {"format": "vglann-study-results", "version": 1, "study", "raters", "excluded", "answers",
"chosen_left", "alpha", "preferences": [{"first", "second", "answers", "for_first", "share", "low", "high",
"p_value"}, ...]}; shares, alpha and p_value are null where there is nothing to compute them from.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.files import read_json, write_json
from vglann_fast.study.database import Answer, Rating, Study
from vglann_fast.study.page import results_page

ANSWERS_FORMAT = ("vglann-study-answers", 1)
MAX_BYTES = 10_000_000  # of an answers file
GUESSED = 0.05  # a rater whose checks guessing passes with at most this probability has looked
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Preference:
    """Of `answers` to pairs of `first` and `second`, `for_first` took the first for the more realistic.

    share, and its interval low..high; p_value: two-sided, of the hypothesis that both are taken equally often.
    None without answers.
    """

    first: str
    second: str
    answers: int
    for_first: int
    share: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def report_study(folder: str | Path, answer_files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Take in answer files, then write results.json and results.html into `folder`; returns results.json's content.

    Raises `VglannError` when the study or a file is damaged, a file is of another study or has unknown trials,
    nobody has answered yet, or scipy or jinja2 is missing. Files are taken in one by one, each whole or not at all.
    """
    study = Study.open(folder)
    try:
        for file in map(Path, answer_files):
            _take_in(study, file)
        rated = study.rated()
        if not rated:
            raise VglannError(f"{folder}: nobody has answered yet; `vglann study serve {folder}` asks")
        record = results(study, rated)
    finally:
        study.close()
    page = results_page(name=Path(folder).resolve().name, confidence=CONFIDENCE, **record)
    write_json(Path(folder) / "results.json", record)
    with atomic_file(Path(folder) / "results.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return record


def as_text(record: dict[str, Any]) -> str:
    """A line for each comparison, and one for the raters."""
    lines = []
    for p in record["preferences"]:
        said = "no answers"
        if p["share"] is not None:
            share, low, high = (100 * p[key] for key in ("share", "low", "high"))
            said = f"{share:.1f} % [{low:.1f}, {high:.1f}] of {p['answers']} answers"
        lines.append(f"{p['first']} over {p['second']}: {said}")
    agreement = "none to compute" if record["alpha"] is None else f"{record['alpha']:.2f}"
    lines.append(
        f"{record['raters']} raters, {len(record['excluded'])} left out for missed attention checks; agreement "
        f"(Krippendorff's alpha) {agreement}"
    )
    return "\n".join(lines)


def results(study: Study, rated: Sequence[Rating]) -> dict[str, Any]:
    """The content of results.json, from all answers."""
    checks = {number for number, source in study.sources.items() if source.kind == "spoiled"}
    attention: defaultdict[str, list[bool]] = defaultdict(list)
    for one in rated:
        attention[one.rater]  # one who met no check yet has passed none
        if checks & {one.left, one.right}:
            chosen = one.left if one.chose_left else one.right
            attention[one.rater].append(chosen not in checks)
    excluded = {rater: passed for rater, passed in attention.items() if not attentive(passed)}
    counted = [r for r in rated if r.rater not in excluded and not checks & {r.left, r.right}]
    by_trial: defaultdict[str, list[bool]] = defaultdict(list)
    for one in counted:
        by_trial[one.trial].append(one.chose_left)
    compared = [number for number in study.sources if number not in checks]
    return {
        "format": "vglann-study-results",
        "version": 1,
        "study": study.facts["id"],
        "raters": len(attention) - len(excluded),
        "excluded": {rater: {"passed": sum(p), "checks": len(p)} for rater, p in excluded.items()},
        "answers": len(counted),
        "chosen_left": sum(one.side == "left" for one in counted),
        "alpha": krippendorff_alpha(list(by_trial.values())),
        "preferences": [asdict(_preference(study, counted, *two)) for two in combinations(compared, 2)],
    }


def attentive(passed: Sequence[bool]) -> bool:
    """Return True if guessing passes so many of these attention checks with probability at most `GUESSED`."""
    return bool(passed) and bool(_binomial_test(sum(passed), len(passed), "greater").pvalue <= GUESSED)


def _preference(study: Study, counted: Sequence[Rating], first: int, second: int) -> Preference:
    chosen = [r.left if r.chose_left else r.right for r in counted if {r.left, r.right} == {first, second}]
    labels = study.sources[first].label, study.sources[second].label
    for_first = chosen.count(first)
    if not chosen:
        return Preference(*labels, 0, 0)
    test = _binomial_test(for_first, len(chosen), "two-sided")
    interval = test.proportion_ci(CONFIDENCE, method="exact")
    share = for_first / len(chosen)
    return Preference(
        *labels, len(chosen), for_first, share, float(interval.low), float(interval.high), float(test.pvalue)
    )


def _binomial_test(k: int, n: int, alternative: str) -> Any:
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise VglannError("the report of a study needs scipy: pip install 'vglann-fast[study]'") from error
    return binomtest(k, n, 0.5, alternative)


def krippendorff_alpha(units: Sequence[Sequence[Any]]) -> float | None:
    """Krippendorff's alpha of nominal values: one unit is what its raters said of it, at most one value a rater.

    Units with a single value do not enter. None when no unit has two, or only one value occurs: nothing to
    disagree about.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    total = sum((count for count in counts), Counter())
    n = total.total()
    expected = n * n - sum(c * c for c in total.values())  # ordered pairs of different values
    if not expected:
        return None
    observed = sum((u.total() ** 2 - sum(c * c for c in u.values())) / (u.total() - 1) for u in counts)
    return 1 - (n - 1) * observed / expected


def _take_in(study: Study, file: Path) -> None:
    """Store the answers of a file that the page without a server made."""
    if file.is_file() and file.stat().st_size > MAX_BYTES:
        raise VglannError(f"{file}: too large for answers to a study")
    value = read_json(file)
    if not isinstance(value, dict) or (value.get("format"), value.get("version")) != ANSWERS_FORMAT:
        raise VglannError(f"{file}: no answers to a study; give the file that its page downloads")
    if value.get("study") != study.facts["id"]:
        raise VglannError(f"{file}: answers to another study than {study.path}")
    try:
        answers = [Answer(*(_text(a[key]) for key in ("trial", "chosen", "side"))) for a in value["answers"]]
        study.add(_text(value["rater"]), answers)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise VglannError(f"{file}: damaged or changed ({what}); none of its answers was taken") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {json.dumps(value)[:40]}")
    return value
