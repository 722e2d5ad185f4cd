"""The pages of a study: the one raters see, served or as a file of its own, and the one with the results.

Each page holds its style and its script, and its content security policy forbids it to load anything from anywhere
but the server it came from. The page as a file also holds its videos. Its rater downloads the answers as

    {"format": "vglann-study-answers", "version": 1, "study": id, "rater": 16 hex digits,
     "answers": [{"trial": id, "chosen": id of a video, "side": "left" | "right"}, ...]}
"""

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

from vglann_fast import __version__
from vglann_fast.errors import VglannError
from vglann_fast.study.database import Study

if TYPE_CHECKING:
    import jinja2


def study_page(study: Study, *, static: bool) -> str:
    """The page with the questions: no labels, no key, trials in the order of their random ids.

    static: with the videos in it, to be opened as a file; otherwise it takes them from its server.
    Raises `VglannError` when jinja2 is missing.
    """
    videos = None
    if static:
        ids = sorted(video for trial in study.trials for video in (trial.left, trial.right))
        videos = {id: base64.b64encode(study.video(id) or b"").decode("ascii") for id in ids}
    trials = [[trial.id, trial.left, trial.right] for trial in study.trials]
    data = {"id": study.facts["id"], "trials": trials, "videos": videos}
    # As in JSON, but no text can end the element.
    return _render("page.html", "page.js", data=json.dumps(data).replace("<", "\\u003c"))


def results_page(**values: Any) -> str:
    """The page with the results; `values` are those its template names."""
    return _render("results.html", None, **values)


def policy(page: str) -> str:
    """The content security policy that a page carries, for the server to send it as a header too."""
    return page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]


def _render(template: str, script: str | None, **values: Any) -> str:
    environment = _environment()
    assert environment.loader is not None
    # The style of the report's pages, then what a study adds to it.
    files = ["report/page.css", "page.css", *([script] if script else [])]
    # A browser reads \r\n as \n before it compares the digest.
    read = [environment.loader.get_source(environment, name)[0].replace("\r\n", "\n") for name in files]
    style, code = "\n".join(read[:2]), read[2] if script else ""
    digest = {"style_sha256": _digest(style), "script_sha256": _digest(code)}
    return environment.get_template(template).render(
        program=__version__, style=style, script=code, **digest, **values
    )


def _environment() -> "jinja2.Environment":
    try:
        import jinja2
    except ImportError as error:
        raise VglannError("a study needs jinja2: pip install 'vglann-fast[study]'") from error
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PrefixLoader({"report": jinja2.PackageLoader("vglann_fast.report")}),
                jinja2.PackageLoader("vglann_fast.study"),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
