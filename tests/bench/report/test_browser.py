"""The page in a browser: Chromium without a window, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from support.made_rows import NOTHING

from resblock_bench.bench.report.page import rendered
from resblock_bench.bench.runs.folder import Run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
DRIVER = """
<script>
"use strict";
const table = document.getElementById("r1-table");
const column = (n) => Array.from(table.tBodies[0].rows, (row) => row.cells[n].textContent);
const press = (n) => table.tHead.rows[0].cells[n].querySelector("button").click();
const said = {};
press(4);
said.ascending = column(4);
said.sorted = table.tHead.rows[0].cells[4].getAttribute("aria-sort");
press(4);
said.descending = column(4);
press(0);
said.unsorted = table.tHead.rows[0].cells[4].getAttribute("aria-sort");
const field = document.getElementById("r1-table-filter");
field.value = "FUSED b4";
field.dispatchEvent(new Event("input"));
said.left = Array.from(table.tBodies[0].rows).filter((row) => !row.hidden).length;
said.count = document.querySelector("output").textContent;
document.body.style.width = "390px";
said.narrow = document.body.scrollWidth;
document.body.style.width = "1280px";
said.wide = document.body.scrollWidth;
const answer = document.createElement("pre");
answer.id = "answer";
answer.textContent = JSON.stringify(said);
document.body.append(answer);
</script>
"""


def opened(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--virtual-time-budget=3000", "--window-size=1280,900", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Those that were rendered: none twice."""
    return {}


@pytest.fixture
def html(run: Run, pages: dict[str, str]) -> str:
    if not pages:
        rows = run.attempts
        rows[3] = msgspec.structs.replace(rows[3], status="failed", reason="no such op", **NOTHING)
        pages["html"] = rendered([run], "resblock-bench report")
    return pages["html"]


def test_the_console_says_nothing_of_the_page(html: str, tmp_path: Path) -> None:
    """The script and the styles are those that the policy names: no other would be run."""
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    done = opened(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert '<button type="button">' in done.stdout
    assert "12 of 12 rows" in done.stdout


def test_tables_are_sorted_and_filtered_and_the_page_is_no_wider_than_its_window(
    html: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", html)  # which would refuse the driver
    page.write_text(bare.replace("</body>", f"{DRIVER}</body>"), encoding="utf-8")
    answer = re.search(r'<pre id="answer">(.*?)</pre>', opened(page, "--dump-dom").stdout)
    assert answer is not None
    said = msgspec.json.decode(answer[1].replace("&gt;", ">"))
    up, down = said["ascending"], said["descending"]
    assert up[-1] == down[-1] == "–", "what is missing stands last"
    assert [float(text) for text in up[:-1]] == sorted(map(float, up[:-1]))
    assert down[:-1] == up[:-1][::-1] or sorted(down) == sorted(up)
    assert (said["sorted"], said["unsorted"]) == ("ascending", None)
    assert (said["left"], said["count"]) == (3, "3 of 12 rows")
    assert said["narrow"] <= 390
    assert said["wide"] <= 1280


def test_a_page_is_printed(html: str, tmp_path: Path) -> None:
    page, paper = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(html, encoding="utf-8")
    opened(page, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
