"""The language of the house that a machine can check: phrases, first words of docstrings, American spelling.

`ALLOWED` counts the hits that are left in a file; there are none at present. Counts are exact: a hit more fails, and
so does a hit less, which asks for the lower number.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As recorded by others, or the list itself.
LEFT_OUT = (ROOT / "tests" / "golden", ROOT / "tests" / "house" / "test_prose.py")

# A phrase may run over the end of a line, also of a comment.
WORDS = "that of|those of|anew|go(?:es)? on|but for|by heart|all the same|(?:is|are) no(?! longer)|his|speaks against"
PHRASES = re.compile(rf"\b(?:{WORDS})\b".replace(" ", r"\s+(?:# )?"), re.IGNORECASE)
QUESTION = re.compile(r"(what|which|how|where|whether|why|when|whose)\b", re.IGNORECASE)
VERBS = (
    "capital|categor|character|custom|discret|final|general|initial|local|maxim|minim|normal|optim|organ|orthogonal|"
    "orthonormal|parallel|parametr|penal|quant|random|real|recogn|regular|serial|special|stabil|standard|summar|"
    "synchron|util|vector|visual"
)
BRITISH = re.compile(
    rf"\b\w*(?:{VERBS})is(?:e|ed|es|er|ers|ing|ations?)\b"
    r"|\w*(?:colour|behaviour|favour|flavour|neighbour|artefact)\w*"
    r"|\b(?:centre[ds]?|grey\w*|analyse[ds]?|analysing|licence|defence|metres?|learnt|spelt)\b"
    r"|\b(?:label|model|cancel|signal|travel|total|channel)l(?:ed|ing)\b",
    re.IGNORECASE,
)
# A row of the ablation, which folders on disk are called by; a method of `concurrent.futures`; an option of FFmpeg;
# an option and a key of version 0.1.0, which are still read.
NAMES = re.compile(
    r"statistics[ -]anew|\.cancelled\(\)|colour_primaries"
    r"|--normalise|(?<=\")normalise(?=\")|\\nnormalise|psnr_mean_colour"
)

ALLOWED: dict[str, int] = {}


def texts():
    """Every file that is written for readers, with its path from the root."""
    folders = ("vglann_fast", "kernels", "bench", "tests", "docs")
    paths = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".ipynb")
    ]
    for path in sorted([*paths, *ROOT.glob("*.py"), *ROOT.glob("*.md")]):
        if not any(path.is_relative_to(left_out) for left_out in LEFT_OUT):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def hits(name, text):
    """The places in a text that the rules refuse: its line, and what is wrong there."""
    text = NAMES.sub("", text)
    for rule in (PHRASES, BRITISH):
        for match in rule.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())
    if not name.endswith(".py"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and QUESTION.match(docstring):
                yield node.body[0].lineno, docstring.splitlines()[0]


def test_no_file_has_more_or_fewer_hits_than_are_allowed():
    problems = []
    for name, text in texts():
        found = sorted(hits(name, text))
        if len(found) > ALLOWED.get(name, 0):
            problems += [f"{name}:{number}: {what!r}; write it another way" for number, what in found]
        elif len(found) < ALLOWED.get(name, 0):
            problems.append(f"{name}: {len(found)} hits are left; lower the number in ALLOWED")
    assert not problems, "\n".join(problems)


def test_every_allowance_names_a_file_and_none_is_for_documents():
    names = {name for name, _ in texts()}
    for name, count in ALLOWED.items():
        assert name in names, name
        assert count > 0, name
        assert not name.endswith(".md"), name


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.md", "The peak is that\n# of the step, and there is no other.", 2),
        ("a.md", "This is no longer so, and nothing of it can be analyzed.", 0),
        ("a.md", "A neighbouring centre is recognised, but realistic or precise ones are not.", 3),
        ("a.md", "The row `+ statistics anew`; the file statistics-anew.json; counted anew.", 1),
        ("a.py", '"""What it does."""\n\n\ndef f():\n    """Whether it is."""\n', 2),
        ("a.py", 'class A:\n    """Whatever it holds."""\n\n    x = "What a value"\n', 0),
    ],
)
def test_the_rules_find_what_they_are_for(name, text, count):
    assert len(list(hits(name, text))) == count
