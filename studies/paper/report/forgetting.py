"""The page's part on forgetting: curves, costs, and an attacker's view."""

from __future__ import annotations

from pathlib import Path

from studies.paper.cells import Found
from studies.paper.parts import forgetting
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Attack, Mean, attack, auc, paired
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    "ledger": Look("TAFT, by ledger", "D", "-", pictures.TANGENT),
    "ensemble": Look("NLFT ensemble (SISA)", "o", ":", pictures.ORDINARY_OTHER),
    "tangent_again": Look("TAFT, trained again", "^", "-", pictures.TANGENT_OTHER),
    "ordinary_again": Look("NLFT, trained again", "s", "--", pictures.ORDINARY),
}
FALSE_POSITIVES = 0.05


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = sorted(found.of(forgetting.PART), key=lambda cell: cell["seed"])
    attacks = _attacks(found)
    figures = [
        (_draw_curve(cells, out / "forgetting.png"), "Accuracy as shards are removed"),
        (
            _draw_attack(attacks, out / "membership.png"),
            "Membership inference on the removed shard; 95 % intervals",
        ),
    ]
    text = "\n\n".join([_curve(cells), _costs(cells), _attack_table(found, attacks)])
    return Section("Forgetting", text, figures, _claims(found, cells))


def _series(cells: list[dict], index: int, key: str) -> list[float]:
    return [cell["points"][index][key] for cell in cells]


def _curve(cells: list[dict]) -> str:
    points = cells[0]["points"]
    shards = cells[0]["shards"]
    rows = ["| removed | " + " | ".join(look.title for look in LOOKS.values()) + " |"]
    rows.append("| --- " * (1 + len(LOOKS)) + "|")
    for index, point in enumerate(points):
        shown = [Mean.of(_series(cells, index, key)).percent() for key in LOOKS]
        rows.append(f"| {point['removed']} of {shards} | " + " | ".join(shown) + " |")
    return (
        f"{cells[0]['images']}: {cells[0]['train']} private images in {shards} shards; test "
        "accuracy, %, after shards were removed one after the other. Training again keeps the rate "
        "that was best for all images.\n\n" + "\n".join(rows)
    )


def _costs(cells: list[dict]) -> str:
    first = cells[0]
    shard = first["train"] // first["shards"]
    rest = first["train"] - shard
    epochs = first["epochs"]
    removal = [cell["points"][index]["ledger_seconds"] for cell in cells for index in (1,)]
    again = {
        way: Mean.of(_series(cells, 1, f"{way}_again_seconds")).value
        for way in ("tangent", "ordinary")
    }
    one = {
        way: Mean.of([cell[f"{way}_shard_seconds"] for cell in cells]).value
        for way in ("tangent", "ordinary")
    }
    step = {way: first[f"{way}_step_flops"] * epochs for way in ("tangent", "ordinary")}
    numbers = first["delta_numbers"]

    def row(what: str, how: str, seconds: float, operations: str) -> str:
        return f"| {what} | {how} | {seconds:.2g} | {operations} |"

    rows = ["| request | way | seconds | operations |", "| --- | --- | --- | --- |"]
    rows += [
        row("a shard", "ledger", Mean.of(removal).value, f"{numbers:.1e} additions of integers"),
        row("a shard", "NLFT ensemble", 0.0, "none"),
        row("a shard", "TAFT again", again["tangent"], f"{step['tangent'] * rest:.1e} FLOP"),
        row("a shard", "NLFT again", again["ordinary"], f"{step['ordinary'] * rest:.1e} FLOP"),
        row(
            "one image",
            "ledger: its shard again",
            one["tangent"] + Mean.of(removal).value,
            f"{step['tangent'] * (shard - 1):.1e} FLOP",
        ),
        row(
            "one image",
            "NLFT ensemble: its shard again",
            one["ordinary"],
            f"{step['ordinary'] * (shard - 1):.1e} FLOP",
        ),
        row(
            "one image",
            "NLFT again",
            again["ordinary"] * (first["train"] - 1) / rest,
            f"{step['ordinary'] * (first['train'] - 1):.1e} FLOP",
        ),
    ]
    return (
        "What a request costs. Seconds are measured, those of one image for NLFT again scaled from "
        f"{rest} images; FLOP by torch's counter for a step times its images; frozen blocks run "
        "once, before.\n\n" + "\n".join(rows)
    )


def _attacks(found: Found) -> dict[str, Attack]:
    cells = sorted(found.of(forgetting.ATTACK), key=lambda cell: cell["seed"])
    names = list(cells[0]["scores"])
    return {
        name: attack(
            [(c["scores"][name]["members"], c["scores"][name]["others"]) for c in cells],
            FALSE_POSITIVES,
        )
        for name in names
    }


def _title(name: str) -> str:
    return name.replace("tangent", "TAFT").replace("ordinary", "NLFT")


def _attack_table(found: Found, attacks: dict[str, Attack]) -> str:
    cells = found.of(forgetting.ATTACK)
    rows = [
        "| model | AUC (95 % interval) | caught at 5 % false positives | test accuracy, % |",
        "| --- | --- | --- | --- |",
    ]
    for name, seen in attacks.items():
        right = Mean.of([cell["scores"][name]["test_accuracy"] for cell in cells])
        rows.append(
            f"| {_title(name)} | {seen.auc:.3f} ({seen.low:.3f} to {seen.high:.3f}) | "
            f"{seen.caught:.1%} ({seen.caught_low:.1%} to {seen.caught_high:.1%}) | "
            f"{right.percent()} |"
        )
    members = len(cells[0]["scores"][next(iter(attacks))]["members"])
    return (
        f"Membership inference: {members} images of the first shard against test images, by how "
        "much lower a model's loss is than the anchor's (a loss threshold with difficulty "
        "calibration, Watson et al. 2022). 0.5 is chance; how far these images are from it "
        "by themselves, the models say that never had them.\n\n" + "\n".join(rows)
    )


@pictures.styled()
def _draw_curve(cells: list[dict], path: Path) -> Path:
    figure = pictures.new_figure(height=4.4)
    axes = figure.subplots()
    shards = cells[0]["shards"]
    removed = [100 * point["removed"] / shards for point in cells[0]["points"]]
    ends = []
    for key, look in LOOKS.items():
        means = [Mean.of(_series(cells, index, key)) for index in range(len(removed))]
        ends.append((draw_series(axes, look, removed, means), look.title, look.colour))
    anchor = 100 * Mean.of([cell["anchor"] for cell in cells]).value
    pictures.draw_level(axes, anchor)
    ends.append((anchor, "the anchor", pictures.LEVEL))
    axes.set_xticks(removed)
    axes.set_xlabel(f"removed of {shards} shards, %")
    axes.set_ylabel("test accuracy, %")
    pictures.note(figure, f"{pictures.TERMS} Bars: standard errors over seeds.")
    pictures.label_ends(axes, ends)
    return pictures.save(figure, path)


@pictures.styled()
def _draw_attack(attacks: dict[str, Attack], path: Path) -> Path:
    figure = pictures.new_figure(height=4.0)
    axes = figure.subplots()
    names = list(attacks)[::-1]
    for row, name in enumerate(names):
        seen, tangent = attacks[name], name.startswith("tangent")
        axes.errorbar(
            seen.auc,
            row,
            xerr=[[seen.auc - seen.low], [seen.high - seen.auc]],
            marker="D" if tangent else "s",
            markerfacecolor="white",
            color=pictures.TANGENT if tangent else pictures.ORDINARY,
        )
    axes.axvline(0.5, color=pictures.LEVEL, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(names)), [_title(name) for name in names])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("AUC of membership inference; 0.5 (dotted) is chance")
    pictures.note(figure, f"{pictures.TERMS} Bars: 95 % intervals.")
    return pictures.save(figure, path)


def _claims(found: Found, cells: list[dict]) -> list[Claim]:
    images = cells[0]["images"]
    late = len(cells[0]["points"]) - 2
    removed = f"{cells[0]['points'][late]['removed']} of {cells[0]['shards']} shards removed"
    claims = [
        Claim(
            f"{images}, {removed}: the ledger's model is not less accurate than the ensemble's",
            paired(_series(cells, late, "ledger"), _series(cells, late, "ensemble")),
            "not lower",
            "The ensemble costs a pass for every shard that is left.",
        ),
        Claim(
            f"{images}, {removed}: the ledger's model is not less accurate than TAFT trained again",
            paired(_series(cells, late, "ledger"), _series(cells, late, "tangent_again")),
            "not lower",
            "The mean of shards is not the fit on their union.",
        ),
        Claim(
            f"{images}, no shard removed: the ledger's model is not less accurate than joint TAFT",
            paired(_series(cells, 0, "ledger"), _series(cells, 0, "tangent_again")),
            "not lower",
            "The mean of shards is not the fit on their union, least of all where a shard has a "
            "dozen images of a class: what can be forgotten by subtraction costs accuracy while "
            "it is there. The paper's shards are larger.",
        ),
    ]
    runs = sorted(found.of(forgetting.ATTACK), key=lambda cell: cell["seed"])

    def areas(name: str) -> list[float]:
        return [auc(c["scores"][name]["members"], c["scores"][name]["others"]) for c in runs]

    forgotten, never = "tangent mean, forgotten by the ledger", "tangent mean, never had it"
    claims.append(
        Claim(
            f"{images}: after the ledger forgot a shard, the attacker sees no more of it than of a "
            "model that never had it",
            paired(areas(never), areas(forgotten)),
            "not lower",
        )
    )
    for way in ("ascent", "fine-tuning on the rest"):
        claims.append(
            Claim(
                f"{images}: NLFT after {way} shows no more of members than NLFT trained again",
                paired(areas("ordinary, trained again without it"), areas(f"ordinary, {way}")),
                "not lower",
                "An approximate method leaves what the certificate of an exact one excludes.",
            )
        )
    return claims
