"""A page from its template: with its style and script in it, escaping everything, and forbidden to load anything."""

import base64
import hashlib
from typing import Any

from vglann_fast import __version__
from vglann_fast.errors import VglannError


def render_page(template: str, **values: Any) -> str:
    """The page as text; `values` are those that the template names. Raises `VglannError` when jinja2 is missing."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise VglannError("the report needs jinja2: pip install 'vglann-fast[video,report]'") from error
    loader = jinja2.PackageLoader("vglann_fast.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (loader.get_source(environment, file)[0] for file in ("page.css", "page.js"))
    script = script.replace("\r\n", "\n")  # as a browser reads it before it compares the digest
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_sha256=digest,
        svg=Markup,
        **values,
    )
