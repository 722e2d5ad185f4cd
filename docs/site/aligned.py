"""Extension of griffe: show paragraphs of a docstring with aligned columns as they are written."""

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"^\S.*?\S {2,}\S", re.MULTILINE)


class Aligned(griffe.Extension):
    """Indent such paragraphs, which makes them blocks of code in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object that was just found."""
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(
                re.sub("^", "    ", text, flags=re.MULTILINE) if COLUMNS.search(text) else text
                for text in paragraphs
            )
