"""`report`, and the tables of `evaluate` and `inspect`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import parsed, refused, run
from shard_runs import anchor_file, create_plan, image_folder, trained

from tangent_ops.shards import ImageData, Plan, by_hash, settle

WIDE = {"COLUMNS": "140"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run of two shards that were trained by steps, one of which is called [red]."""
    folder = tmp_path_factory.mktemp("run")
    image_folder(folder / "images")
    image_folder(folder / "test", each=5, seed=8)
    anchor_file(folder / "anchor.safetensors")
    ids = ImageData(str(folder / "images")).open().ids
    threads = torch.get_num_threads()
    dealt = dict(zip(("[red]", "b"), by_hash(ids, 2).values(), strict=True))
    plan = trained(create_plan(folder, dealt))
    torch.set_num_threads(threads)
    settle(plan)
    return plan


def test_a_page_is_written_once(made: Plan, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = made.path.parent / "test"
    result = run("report", made.path, "--data", test)
    assert result.exit_code == 0, result.output
    assert re.search(r"wrote report\.html \(\d\.\d MB\)", result.stdout)
    assert "trained by steps" in result.stdout  # why influences are left out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "labelled images in " + str(test) in page and "[red]" in page
    refused(run("report", made.path), "report.html exists: give another name, or --force")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    again = run("report", made.path, "--force")
    assert "No labelled images are known: give a folder of them by --data" in again.stdout
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != page


def test_wrong_arguments_of_report_come_before_work(made: Plan, tmp_path: Path) -> None:
    image_folder(tmp_path / "other", each=1)
    shutil.move(tmp_path / "other" / "class0", tmp_path / "other" / "dog")
    page = tmp_path / "page.html"
    for words, said in (
        (("--out", tmp_path), "is a folder"),
        (("--out", tmp_path / "no" / "page.html"), "a folder that does not exist"),
        (("--data", tmp_path / "nowhere"), "is no folder"),
        (("--data", tmp_path / "other"), "class 'dog' is not among the model's"),
        (("--data-name", "hfds/x"), "give a folder, too"),
    ):
        refused(run("report", made.path, "--out", page, *words), said)
    refused(run("report", tmp_path, "--out", page), "no plan of shards")
    assert not page.exists()


def test_evaluate_shows_models_side_by_side(made: Plan) -> None:
    test = made.path.parent / "test"
    scores = parsed(run("evaluate", made.path, test, "--json"))["models"]
    shown = run("evaluate", made.path, test, **WIDE).stdout
    for name, score in scores.items():
        share, error = score["accuracy"], score["standard_error"]
        assert re.search(rf"{name} +│ +{share:.1%} ± {error:.1%}", shown), shown
    gain = 100 * (scores["mean"]["accuracy"] - scores["anchor"]["accuracy"])
    assert re.search(rf"anchor .*│ +{re.escape(f'{gain:+.1f}')} ± [\d.]+ points", shown)
    assert "class0" not in shown.partition("\n")[2]
    by_class = run("evaluate", made.path, test, "--per-class", **WIDE).stdout
    for name, recall in scores["mean"]["recall"].items():
        assert re.search(rf"{name} +│ 5 +│.*│ {recall:.1%} +│", by_class), by_class


def test_inspect_lists_shards_and_files(made: Plan) -> None:
    told = parsed(run("inspect", made.path, "--json"))
    assert "list" not in told and told["recipe"]["dp_steps"] == 100
    shown = run("inspect", made.path, **WIDE).stdout
    for row in parsed(run("inspect", made.path, "--shards", "--json"))["list"]:
        cells = [row["name"], str(row["samples"]), "yes", f"deltas/{row['delta']}"]
        assert re.search(" +│ +".join(map(re.escape, cells)), shown), shown
    assert re.search(r"^  model: +test_vit$", shown, re.MULTILINE)
    assert re.search(r"^  epochs: +1$", shown, re.MULTILINE)
    assert "dp" not in shown and "{" not in shown


def test_inspect_shows_some_of_many_shards(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    anchor_file(tmp_path / "anchor.safetensors")
    ids = ImageData(str(tmp_path / "images")).open().ids
    plan = create_plan(tmp_path, {f"shard-{k}": [id] for k, id in enumerate(ids)})
    shown = run("inspect", plan.path, **WIDE).stdout
    assert (shown.count("│ shard-"), "and 4 more shards" in shown) == (20, True)
    assert run("inspect", plan.path, "--shards", **WIDE).stdout.count("│ shard-") == 24
