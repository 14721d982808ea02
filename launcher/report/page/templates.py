"""The pages' templates, with their style and script inside, so that a page is one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape


def render_template(name: str, **values: Any) -> str:
    """Returns a page from the template of this name; whatever comes from a run's folder is escaped.

    The page's security policy allows this script alone and no address at all: nothing that a run's folder contains can
    run, and nothing is fetched.
    """
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"embedded": _embedded, "breakable": _breakable}
    return environment.get_template(name).render(
        style=Markup(_read("style.css")), script=Markup(script), script_digest=digest, **values
    )


def _read(name: str) -> str:
    # Line ends as a browser reads them: the script's digest is that of what the browser sees.
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _embedded(value: Any) -> Markup:
    """The value as JSON that cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _breakable(name: str) -> Markup:
    """The name, which a narrow screen may break behind its underscores."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")))
