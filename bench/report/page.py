"""One page of run folders: a single file that loads nothing, and takes no script from data.

What runs and what styles on it are one script and one style sheet, both named by their digests in
its content security policy: a browser refuses any other. All that a run folder says is text, and
escaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError, command
from resblock_bench.bench.machine.environment import versions
from resblock_bench.bench.runs.folder import Run

from .content import content_of, shown
from .inline import Figures
from .profiled import profiles_of

PAGE = "report.html"
_FOLDER = Path(__file__).parent


def write_page(runs: Sequence[Run], output: Path | None, *, predict: bool = True) -> Path:
    """Write the page of some runs, whole or not at all; without `output` into the run's folder.

    predict   with the memory that was to be expected, which takes a third of a second a cell

    Raises UsageError where it cannot be written, and for several runs without an `output`.
    """
    if output is None and len(runs) != 1:
        raise UsageError(
            f"{len(runs)} runs were named, and their page lies in no one's folder: name it with "
            "--output FILE"
        )
    path, advice = output or runs[0].folder / PAGE, "name another file with --output"
    with files.explained(path, advice):
        files.check_writable(path, named=output is not None)
    words = [str(run.folder) for run in runs] + (["--output", str(output)] if output else [])
    page = rendered(runs, command("report", *words), predict=predict)
    files.write(path, page.encode(), advice, named=output is not None)
    return path


def rendered(runs: Sequence[Run], made_by: str, *, predict: bool = True) -> str:
    """The page's HTML; `made_by` is the command that makes it again."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = Figures()
    contents = [content_of(run, figures, predict=predict) for run in runs]
    profiles = [profiles_of(run, figures) for run in runs]
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    css = (_FOLDER / "page.css").read_text(encoding="utf-8") + figures.css()
    page = environment.get_template("page.html").render(
        title=f"resblock-bench: {', '.join(content.title for content in contents)}",
        runs=contents,
        profiles=profiles,
        made_by=made_by,
        version=versions()["resblock-bench"] or "of a checkout",
        policy=(
            f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        css=Markup(css),  # ours, and figures' colours and fonts
        script=Markup(script),
    )
    return page.lstrip() + "\n"


def _finalized(value: Any) -> Any:
    """Whatever the template shows: markup is our own, and a text may be anybody's."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(text: str) -> str:
    """The source of a content security policy that allows just this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
