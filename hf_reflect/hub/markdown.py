"""Text that comes from data, put into Markdown so that it shows as it is and does nothing else."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ON_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@cache
def template(name: str) -> Any:
    """A section; whatever is put into it is text, never markup, unless it was made here."""
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    made = Environment(loader=loader, undefined=StrictUndefined, finalize=plain, autoescape=False)
    made.filters["code"] = _code
    return made.get_template(name)


def plain(value: Any) -> Any:
    """Text that shows as it is in Markdown and HTML, on one line."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text))


def _code(value: Any) -> Markup:
    """A name between backticks or in a program: without whatever could end those."""
    return Markup(re.sub(r"[^\w ./:+-]", "-", str(value)))


def dataset_link(value: Any) -> Any:
    """A dataset of the Hub, or an address, as a link; anything else as it is."""
    if isinstance(value, str) and ON_HUB.fullmatch(value):
        return Markup(f"[{plain(value)}](https://huggingface.co/datasets/{value})")
    if isinstance(value, str) and re.fullmatch(r"https?://[^\s<>|\\`]+", value):
        return Markup(f"<{value}>")
    return value


def model_link(name: str) -> Markup:
    """A model of the Hub as a link."""
    return Markup(f"[{plain(name)}](https://huggingface.co/{name})")
