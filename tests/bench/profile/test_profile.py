"""The verb: what it shows, writes and refuses."""

import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace
from rich.table import Table

from resblock_bench.bench.profile import profile, step
from resblock_bench.bench.profile.figures import save_figures
from resblock_bench.bench.profile.profiles import Profile, read_profiles
from resblock_bench.bench.profile.shown import compared, shown, times

ROOT = Path(__file__).parents[3]
HOSTILE = "</svg><script>alert(1)</script>\x1b[31m $x^$"
TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=2", "--threads", "1")


def texts(parts: object) -> list[str | list[list[str]]]:
    """Lines as they are, tables as rows of texts."""
    found: list[str | list[list[str]]] = []
    for part in parts:  # type: ignore[attr-defined]
        if isinstance(part, Table):
            columns = [[str(cell) for cell in column.cells] for column in part.columns]
            found.append([list(row) for row in zip(*columns, strict=True)])
        else:
            found.append(part)
    return found


def test_a_profile_is_shown_by_group_module_and_kernel(profiled: Callable[..., Profile]) -> None:
    found = profiled(workload="model")
    title, attributed, groups, modules, kernels, memory = texts(shown(found))
    assert "so recording it costs" in title
    assert re.fullmatch(
        r"attributed to modules and operators: [\d.]+ % of the forward, [\d.]+ % of the backward, "
        r"[\d.]+ % of the update",
        str(attributed),
    )
    assert {"convolution", "norm-act", "gaps", "optimizer", "all"} <= {row[0] for row in groups}
    assert [row[0] for row in modules][-1] == "all"
    assert modules[-1][-1] == groups[-1][5]
    assert {row[2] for row in kernels} & {"backward"}
    assert "activations" in str(memory)
    crowded = replace(found, left_out=3, notes=["disturbed"])
    no_room = "trace.json.gz has no room for 3 of the shortest events"
    assert texts(shown(crowded))[-2:] == [no_room, "disturbed"]
    assert texts(compared(found, crowded))[-2:] == [f"B: {no_room}", "B: disturbed"]


def test_two_profiles_differ_by_the_sum_of_what_their_groups_differ_by(
    profiled: Callable[..., Profile],
) -> None:
    one, other = profiled(), profiled(impl="fused")
    before, after = times(one), times(other)
    change = sum(after[group] - before[group] for group in {*before, *after})
    assert change == other.step_ns - one.step_ns
    tables = [part for part in texts(compared(one, other)) if isinstance(part, list)]
    assert len(tables) == 3
    for rows in tables:
        assert rows[-1][0] == "all"
        for column in (1, 2, 3):
            *numbers, total = (float(row[column].replace(",", "")) for row in rows)
            assert sum(numbers) == pytest.approx(total, abs=0.005 * (len(numbers) + 1))
    assert float(tables[2][-1][1]) == pytest.approx(one.memory.peak_bytes / 2**20, abs=0.01)  # type: ignore[union-attr]


def test_figures_are_offline_and_names_are_text(
    profiled: Callable[..., Profile], tmp_path: Path
) -> None:
    found = profiled()
    memory = replace(found.memory, peak_module=HOSTILE, held={HOSTILE: 3, "": 2})  # type: ignore[type-var]
    found = replace(found, cell=replace(found.cell, impl=HOSTILE), memory=memory)
    for path in save_figures(found, tmp_path):
        text = path.read_text()
        tree = ElementTree.fromstring(text)
        assert not [tag for tag in tree.iter() if tag.tag.endswith(("script", "image"))]
        links = [value for tag in tree.iter() for name, value in tag.items() if "href" in name]
        assert all(link.startswith("#") for link in links)
        assert "\x1b" not in text
        assert "@import" not in text
    words = "".join(ElementTree.parse(tmp_path / "memory.svg").getroot().itertext())
    assert "activations" in words and "peak" in words
    assert "<script>" in words.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--snapshot"], 2, "--snapshot is of CUDA's allocator"),
        (["--output", "/proc/absent"], 2, "/proc/absent cannot be written"),
        (["--json", "absent/x.json"], 2, "absent/x.json cannot be written"),
        (["--timeout", "soon"], 2, "'soon' is not a duration"),
        (["0123456789abcdef"], 2, "has the id 0123456789abcdef"),
        (["impl=unimportable"], 2, "cannot be run: its package cannot be used"),
        (["--output", ""], 2, "an empty path"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_is_run(
    run_cli: Callable, tmp_path: Path, options: list[str], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile, "survey", lambda *_: pytest.fail("began"))
    words = [] if options[0].startswith(("impl", "0")) else ["impl=fused"]
    done = run_cli("profile", *TINY, "--device", "cpu", *words, *options)
    assert done.code == code
    assert message in done.err


class Speaker:
    """In the place of a process that asks for so many turns."""

    def __init__(self, name: str, turns: int, said: list[str]) -> None:
        self.name, self.left, self.said = name, turns, said

    def send(self, message: bytes) -> None:
        self.said.append(self.name)

    def receive(self, limit_s: float) -> bytes | None:
        self.left -= 1
        return b"ready" if self.left > 0 else None


def test_two_cells_take_turns_until_each_is_done() -> None:
    lab, said = object.__new__(profile._Lab), []
    lab._request = SimpleNamespace(limit_s=1.0)
    lab._take_turns([Speaker("A", 3, said), Speaker("B", 2, said)])
    assert said == ["A", "B", "A", "B", "A"]


@pytest.mark.slow
def test_the_verb_checks_profiles_and_writes(
    run_cli: Callable, tmp_path: Path, one_survey: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "survey", one_survey)
    both = ("impl=reference", "impl=fused")
    done = run_cli(
        "profile", *TINY, "--device", "cpu", *both, "--output", tmp_path, "--json", tmp_path / "j"
    )
    assert (done.code, done.err) == (0, "")
    assert "ms by group" in done.out
    found = read_profiles(tmp_path)
    assert {one.cell.impl for one in found} == {"reference", "fused"}
    stored = json.loads((tmp_path / "j").read_text())["profiles"]
    assert [one["cell"]["impl"] for one in stored] == ["reference", "fused"]
    for one in found:
        names = {path.name for path in (tmp_path / "profiles" / one.id).iterdir()}
        assert names == {"memory.svg", "profile.json", "roofline.svg", "trace.json.gz"}
        assert one.ceilings is not None
        assert one.correctness.errors["out"] is not None
        assert len(one.profiled_ns) == step.STEPS
        assert one.step_ns == sorted(one.profiled_ns)[step.STEPS // 2]
    trace = tmp_path / "profiles" / found[0].id / "trace.json.gz"
    trace.unlink()
    trace.mkdir()
    again = f"impl={found[0].cell.impl}"
    done = run_cli("profile", *TINY, "--device", "cpu", again, "--output", tmp_path)
    assert done.code == 2
    assert f"{trace} cannot be written (Is a directory): name another folder" in done.err
    done = run_cli("profile", *TINY, "--device", "cpu", "impl=wrong", "--output", tmp_path / "w")
    assert done.code == 5
    assert re.search(r"wrong/none: wrong: grad .*: relative error .* is above its limit", done.out)
    assert read_profiles(tmp_path / "w") == []
    done = run_cli("profile", *TINY, "--device", "cpu", "impl=exiting", "--output", tmp_path / "w")
    assert done.code == 3
    assert "crashed: its process ended with code 7, in its phase 'check': leaving" in done.out


def test_the_commands_of_the_documentation_show_and_write(
    run_cli: Callable,
    profiled: Callable[..., Profile],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With tiny cells in the place of those that they name, which take minutes."""
    asked: list[int] = []

    class Lab:
        def __init__(self, request: profile.ProfileRequest, stack: object) -> None:
            self.request = request

        def profiles(self) -> list[Profile]:
            asked.append(len(self.request.cells))
            found = [profiled(), profiled(impl="fused")][: asked[-1]]
            for one in found:
                (self.request.output / "profiles" / one.id).mkdir(parents=True, exist_ok=True)
            return found

    monkeypatch.setattr(profile, "_Lab", Lab)
    shutil.copytree(ROOT / "results" / "runs", tmp_path / "results" / "runs")
    monkeypatch.chdir(tmp_path)
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/profile.md"))
    commands = re.findall(r"(?:^resblock-bench |`)(profile .*?)(?:`|$)", text, re.M)
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command, comments=True)
        done = run_cli(*words)
        assert (done.code, done.err) == (0, ""), command
        compares = asked[-1] == 2
        assert ("ms by group" in done.out) == compares
        assert ("ms by kernel" in done.out) != compares
        assert "results/profiles/" in done.out
    assert set(asked) == {1, 2}
    assert len(json.loads((tmp_path / "both.json").read_text())["profiles"]) == 2
