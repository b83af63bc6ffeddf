"""Wrong uses of the commands: one clear line each, no raw text of other libraries, no hanging."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from cli_runs import MODEL, run

from tangent_ops.cli.messages import INTERRUPTED

RAW = re.compile(r"Errno|Traceback|Value error|Input should|Error while|_io\.|\bTypeError")

# Words with {run}, {images}, {w} (a folder of wrong things) -> what the message says.
WRONG = {
    "finetune {w}/none --out {w}/new": "none is no folder: give one",
    "finetune {w}/file --out {w}/new": "file is no folder: give one",
    "finetune {w}/empty --out {w}/new": "empty holds no images",
    "finetune {images} --out {w}/file": "holds no plan, but other files",
    "finetune {images} --out {w}/file/new": "because {w}/file is a file",
    "finetune {images} --out {w}/new --epochs x": "'--epochs': expected an integer",
    "finetune {images} --out {w}/new --lr x": "'--lr': expected a number",
    "finetune {images} --out {w}/new --executor moon": "'moon' is not one of 'local', 'ray'",
    "finetune {images} --out {w}/new --shards -3": "--shards must be an integer of at least 1",
    "finetune {images} --out {w}/new --img-size 7": "another --img-size",
    "finetune {images} --out {w}/new --img-size 99999999": "--img-size 99999999: expected 1 to",
    "finetune {images} --out {w}/new --data-name x": "--data-name x: expected nothing for",
    "finetune {images} --out {w}/new --by who --table {w}/binary.csv": "no text in UTF-8",
    "finetune {images} --out {w}/new --by who --table {w}/empty": "it is a folder: give a file",
    "finetune {images} --out {w}/new --config {w}/broken.yaml": "broken.yaml cannot be read",
    "finetune {images} --out {w}/new --tensorboard {w}/file --lr 1": "it is a file: give a folder",
    "finetune {w}/names --out {w}/new": "its name has characters that do not print",
    "compose {w}/none": "none does not exist: give a run's folder",
    "compose {w}/empty": "holds no plan of shards, plan.sqlite: give a run's folder",
    "compose {run} --how x": "'x' is not one of 'mean'",
    "compose {run} --how statistics": "--how statistics is not for a run with method 'exact'",
    "evaluate {run}": "has no validation images: give a folder of labelled images",
    "evaluate {run} --data-name torch/x": "--data-name is for the images of DATA",
    "evaluate {run} {images} --delta {w}/x --anchor-only": "--delta and --anchor-only exclude",
    "evaluate {run} {images} --delta {w}/junk": "no safetensors file (invalid JSON in header",
    "evaluate {run} {images} --delta {w}/pipe": "pipe: Not a regular file",
    "forget {run}": "give one of --shard, --sample and --label",
    "forget {run} --sample [red]x --yes": "has no sample '[red]x'",
    "inspect {w}/pipe": "pipe: Not a regular file",
    "inspect {w}/none": "none: there is no such file or folder: check the path",
    "inspect {w}/loop": "links lead in a circle",
    "predict {run} {w}/pipe --csv -": "is no folder: give one that holds images",
    "predict {run} {w}/file --csv -": "is damaged, or cannot be read as an image",
    "influence {run} {w}/none --out {w}/x.png": "is no folder",
    "certify {w}/file": "holds no plan of shards",
    "ledger add {w}/l a {w}/none": "none: there is no such file or folder",
    "ledger add {w}/file a {w}/none": "there is no such file or folder",
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "junk").write_bytes(bytes(100))
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    (folder / "broken.yaml").write_text("a: [")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    for name in ("a\nb", "c"):
        (folder / "names" / name).mkdir(parents=True)
        (folder / "names" / name / "x.png").write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(("words", "said"), WRONG.items(), ids=WRONG)
def test_one_line_with_the_way_out(words: str, said: str, exact_folder: Path, wrong: Path) -> None:
    there = {"run": exact_folder / "run", "images": exact_folder / "images", "w": wrong}
    if "--tensorboard" in words:
        pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    given = [word.format(**there) for word in words.split()]
    given += MODEL if given[0] == "finetune" and "--img-size" not in given else []
    given += MODEL[:3] if given[0] == "finetune" and "--img-size" in words else []
    result = run(*given)
    assert result.exit_code == 2, result.output
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert said.format(**there) in text
    assert not RAW.search(text), text
    assert result.stderr.count("error: ") + result.stderr.count("Invalid value") == 1
    assert not (wrong / "new").exists()


@pytest.mark.parametrize(
    ("words", "patched", "said"),
    [
        ("finetune {images} --out {w}/new", "cli.make_anchor.make_anchor", "no shard was trained"),
        ("compose {run}", "shards.settle", "the same command goes on"),
        ("evaluate {run} {images}", "shards.Plan.open", "nothing was written"),
        ("export {run} {w}/x.pt2", "model.export.export_program", "x.pt2 was not written"),
        ("inspect {run}", "shards.Plan.open", "nothing was written"),
        ("predict {run} {images} --csv {w}/x.csv", "evaluate.predict", "x.csv was not"),
        (
            "influence {run} {images}/class0/0.png --out {w}/x.png",
            "shards.Plan.open",
            "x.png was not written",
        ),
        ("certify {run}", "shards.certifying.certify_run", "nothing was written"),
        ("ledger verify {run}/ledger", "composition.ledger.open_ledger", "nothing was written"),
        ("ledger export {run}/ledger {w}/x.st", "delta.save_delta", "x.st was not written"),
        ("report {run} --out {w}/x.html", "report.collect", "x.html was not written"),
        ("compose {run} --out {w}/x.st", "shards.settle", "in part; the same command goes on; "),
        ("profile", "profiling.profile.compare", "out/profile may hold some of its files"),
    ],
)
def test_ctrl_c_says_what_is_left(
    words: str, patched: str, said: str, exact_folder: Path, wrong: Path, monkeypatch
) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tangent_ops.{patched}", interrupted)
    there = {"run": exact_folder / "run", "images": exact_folder / "images", "w": wrong}
    given = [word.format(**there) for word in words.split()]
    result = run(*given, *(MODEL if given[0] == "finetune" else []))
    assert result.exit_code == INTERRUPTED, result.output
    assert "error: interrupted: " in result.stderr
    assert said in result.stderr
    assert not list(wrong.glob("x.*"))


@pytest.mark.parametrize(
    ("words", "patched", "said"),
    [
        ("compose {run} --out {w}/y.st", "compose.say", "the run is composed, but not all was"),
        ("export {run} --task-vector {w}/z.st", "export.say", "z.st is written"),
        ("predict {run} {images} --csv {w}/y.csv", "predict.tell", "y.csv is written"),
        ("ledger export {run}/ledger {w}/l.st", "ledger.say", "l.st is written"),
    ],
)
def test_ctrl_c_after_the_work_says_that_it_is_done(
    words: str, patched: str, said: str, exact_folder: Path, wrong: Path, monkeypatch
) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tangent_ops.cli.{patched}", interrupted)
    there = {"run": exact_folder / "run", "images": exact_folder / "images", "w": wrong}
    result = run(*(word.format(**there) for word in words.split()))
    assert result.exit_code == INTERRUPTED, result.output
    assert said in result.stderr
    written = Path(words.split()[-1].format(**there))
    assert "is written" not in said or written.stat().st_size
