"""`cost` as a user runs it: what it shows, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_workers")]


SMALL = ["-a", "channels=32", "-a", "resolution=4", "-a", "batch=2", "-a", "layout=nchw"]


def test_table_and_json(run_cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    done = run_cli("cost", *SMALL, "--arch", "90,80", "--json", str(path))
    assert done.code == 0, done.err
    assert "cost on sm_90/80" in done.out
    assert "2×32×16 bf16 nchw, scale" in done.out
    assert "backward, tier A" in done.out
    assert "0 kernels spill registers" in done.out
    assert max(map(len, done.out[: done.out.index("passes: over")].splitlines())) <= 100
    assert "predicted times" in done.out and "backward A sm_90" in done.out
    assert "sm_80 nchw batch 2 forward:" in done.out and "no tensor is larger than L2" in done.out
    report = json.loads(path.read_text())
    costs = report["costs"]
    # Two norms, forward, rewritten and backward, on two architectures.
    assert len(costs) == 2 * 3 * 2
    for cost in costs:
        traffic = cost["traffic"]
        assert traffic["requested"] == traffic["dram"] == traffic["floor"]
        predicted = cost["predicted"]
        assert predicted["us"] == pytest.approx(sum(predicted["shares_us"].values()))
        assert 0 < predicted["floor_share"] < 1
        assert predicted["eager_us"] > predicted["us"]
        names = [kernel["kernel"] for kernel in cost["kernels"]]
        expected = {
            "forward": ["forward: resident"],
            "rewrite": ["forward: rewrite"],
            "backward": ["backward: resident"],
        }
        assert names == expected[cost["direction"]]
        assert all(kernel["code"]["registers"] > 0 for kernel in cost["kernels"])
    hashes = {(c["arch"], c["direction"], c["kernels"][0]["code"]["sass_hash"]) for c in costs}
    assert len(hashes) == len(costs), "another architecture or modulation is other code"
    # The host's time, once: both norms are bf16.
    (host,) = report["host"]
    assert "8×256×8×8 bf16, fused" in done.out and "8×256×8×8 bf16, eager" in done.out
    for who in ("ours", "eager"):
        span = host[who]
        assert 0 < max(span["forward_us"], span["backward_us"]) < span["both_us"]
    assert (host["eager"]["forward_kernels"], host["eager"]["backward_kernels"]) == (9, 12)
    assert (host["ours"]["forward_kernels"], host["ours"]["backward_kernels"]) == (1, 1)


def test_a_tier_is_costed_where_it_holds(run_cli: Callable) -> None:
    done = run_cli("cost", *SMALL, "--arch", "90", "--tier", "D")
    assert done.code == 0, done.err
    assert "forward, tier D" in done.out
    assert "3.00–3.00 passes over activations" in done.out  # forward: both reads from memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "70"], "unknown architecture '70': it is one of 80, 90, 100"),
        (["--arch", "hopper"], "write 80,90,100"),
        (["--tier", "E"], "unknown tier 'E': it is one of A, B, C, D"),
        (["--json", "absent/cost.json"], "absent/cost.json cannot be written (No such file"),
        (["--json", "."], ". cannot be written (Is a directory): name another file"),
        (["-a", "resolution=512", "--tier", "A"], "holds none of the 4 norms: tier A holds 16384"),
        (["-a", "impl=compiled"], "impl changes nothing of what the fused kernels"),
        (["--arch", ""], "is no list of architectures"),
        (["--arch", "²"], "is no list of architectures"),
        (
            ["-a", "dims=1", "-a", "layout=nhwc"],
            "no channels-last layout for one spatial dimension",
        ),
    ],
)
def test_bad_requests_are_one_sentence_and_2(
    run_cli: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli("cost", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_no_table_and_nothing_that_was_there(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cost.json"
    path.write_text("before")
    refused = run_cli("cost", "--arch", "70", "--json", str(path))
    assert (refused.code, path.read_text()) == (2, "before")
    done = run_cli("cost", *SMALL, "--arch", "90", "--json", "/dev/full")
    assert done.code == 2
    assert "/dev/full cannot be written (No space left on device): name another" in done.err
    assert "forward" in done.out


def test_without_triton(run_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from resblock_bench.kernels import dispatch

    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    done = run_cli("cost", *SMALL)
    assert done.code == 2
    assert "Triton is not installed" in done.err


def test_a_model_brings_its_own_sites(run_cli: Callable, tmp_path: Path) -> None:
    """No default resolution or channels are asked of it; a site's weight is its count."""
    path = tmp_path / "cost.json"
    asked = ["-a", "model=iddpm-cifar10-uncond", "-a", "resolution=4", "-a", "channels=256"]
    done = run_cli("cost", *asked, "-a", "layout=nchw", "--arch", "90", "--json", str(path))
    assert done.code == 0, done.err
    assert {
        (cost["norm"]["channels"], cost["norm"]["positions"])
        for cost in json.loads(path.read_text())["costs"]
    } == {(256, 16)}
    assert "of the floor by C·HW × count" in done.out


def test_published_models(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of their norms: a summary and the worst, without a section for each."""
    from resblock_bench.bench.cost import published_norms

    everything = published_norms.published_norms

    def few(*how: object) -> dict:
        norms = everything(*how)
        small = [n for n in norms if (n.channels, n.positions) == (256, 64)]
        return {n: norms[n] for n in small[:2]}

    monkeypatch.setattr(published_norms, "published_norms", few)
    path = tmp_path / "cost.json"
    done = run_cli(
        "cost", "--published", "-a", "batch=1,8", "-a", "layout=nhwc", "--json", str(path)
    )
    assert done.code == 0, done.err
    costs = json.loads(path.read_text())["costs"]
    assert len(costs) == 2 * 2 * 2  # norms, batches, directions
    assert {cost["arch"] for cost in costs} == {90}
    assert "what loses most against the floor, predicted" in done.out
    assert "sm_90 nhwc batch 1 backward:" in done.out
    assert "kernels spill registers" in done.out
    done = run_cli("cost", "--published", "-a", "channels=32")
    assert done.code == 2
    assert "leave out channels" in done.err
