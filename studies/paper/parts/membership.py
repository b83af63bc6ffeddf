"""Membership: what an attacker with shadow models sees of images, before and after forgetting.

The attack is the likelihood ratio of Carlini et al., "Membership Inference Attacks From First
Principles", IEEE S&P 2022 (arXiv:2112.03570). The candidates are drawn as one: a random half of
them is shard 0, and no model ever saw the others. The attacker knows all else that a model was
trained on, how, and the other shards' deltas. Shadows of a model that forgets approximately forget
in the same way what they had (Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to
Avoid a False Sense of Privacy", 2024, arXiv:2403.01218).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from studies.paper.cells import Cell
from studies.paper.methods import LOSSES, Start
from studies.paper.outcomes import logits_of, outcome_of
from studies.paper.parts.context import Context, score
from studies.paper.parts.dealing import LOSS, batch_of, fit_ordinary
from studies.paper.parts.forgetting import CORE, EXACT, MEANS, ORDINARY, RATES, loaded, validated
from studies.paper.span import Span
from studies.paper.tuning import choose
from tangent_ops import CachedFeatures, Ledger, core_basis, linearize, statistics
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta
from tangent_ops.exact import forget_samples
from tangent_ops.model.features import Tail

PART = "membership"
ASCENT_STEPS, ASCENT_BATCH, ASCENT_RATE = 100, 32, 2e-5
REPAIR_PASSES = 1
CORE_IMAGES = 40  # a core of more takes longer than all shadows of statistics


@dataclass(frozen=True)
class Sizes:
    """Of this part.

    Attributes:
        images: The set.
        public: Images of the anchor's classifier; the first of them make the core.
        members: Images of shard 0, and of as many others that no model saw.
        retained: Private images of the other shards.
        validation: Images that rates are chosen on.
        shards: In all.
        shadows: Models of each kind; even.
        epochs: Passes over the images.
    """

    images: str = "emoji"
    public: int = 100
    members: int = 100
    retained: int = 200
    validation: int = 136
    shards: int = 3
    shadows: int = 16
    epochs: int = 5


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """A cell to each seed and group of models."""
    for seed in seeds:
        for group in GROUPS:
            yield Cell(PART, {**asdict(sizes), "seed": seed, "group": group})


@dataclass(frozen=True)
class Game:
    """What models are trained on, and what is guessed.

    Attributes:
        anchor: Of all models.
        public: Tokens of some of its images, for the core.
        data: Members, as many others, then what is retained.
        members: How many they are.
        shards: Indices of the retained shards.
        halves: Of each shadow, the indices of the candidates that it is trained on.
        validation: For rates.
        tested: For accuracies.
        epochs: Passes.
        seed: Of the attacked models.
    """

    anchor: Tail
    public: CachedFeatures
    data: CachedFeatures
    members: int
    shards: tuple[Tensor, ...]
    halves: list[Tensor]
    validation: CachedFeatures
    tested: CachedFeatures
    epochs: int
    seed: int

    @classmethod
    def of(cls, arguments: dict[str, Any], context: Context) -> Game:
        """The game of a cell."""
        prepared, seed = context.prepared(arguments["images"]), arguments["seed"]
        count, retained = 2 * arguments["members"], arguments["retained"]
        sizes = [arguments["public"], count, retained, arguments["validation"]]
        public, candidates, kept, validation = prepared.drawn(seed, sizes)
        generator = torch.Generator().manual_seed(seed)
        candidates = candidates[torch.randperm(count, generator=generator)]
        shards = torch.arange(count, count + retained).tensor_split(arguments["shards"] - 1)
        return cls(
            context.anchor(arguments["images"], public, LOSS, seed),
            prepared.rows(1, public[:CORE_IMAGES]),
            prepared.rows(1, torch.cat([candidates, kept])),
            arguments["members"],
            shards,
            halves_of(count, arguments["shadows"], generator),
            prepared.rows(1, validation),
            prepared.tested(1),
            arguments["epochs"],
            seed,
        )

    @property
    def retained(self) -> Tensor:
        return torch.cat(self.shards)

    def some(self, indices: Tensor) -> CachedFeatures:
        return CachedFeatures(self.data.features[indices], self.data.targets[indices])

    def confidences(self, logits: Tensor) -> Tensor:
        """Of the candidates' classes, from logits of whose first rows they are."""
        count = 2 * self.members
        return confidences(logits[:count], self.data.targets[:count])

    def seen(self, model: nn.Module) -> Tensor:
        """What a model shows of the candidates: (2 members,)."""
        return self.confidences(logits_of(model, self.some(torch.arange(2 * self.members))))

    def attack(self, model: nn.Module, shadows: list[Tensor]) -> dict[str, Any]:
        """Scores of members and of others by what their shadows showed; and the accuracy."""
        inside = torch.zeros(len(shadows), 2 * self.members, dtype=torch.bool)
        for row, half in zip(inside, self.halves, strict=True):
            row[half] = True
        scores = likelihood_ratios(torch.stack(shadows), inside, self.seen(model))
        members, others = (
            [float(f"{value:.5g}") for value in part.tolist()] for part in scores.tensor_split(2)
        )
        test = outcome_of(model, self.tested)
        return {"members": members, "others": others, "outcome": test}


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Of each model of a group, the scores of members and of others."""
    return GROUPS[arguments["group"]](Game.of(arguments, context))


def halves_of(count: int, shadows: int, generator: torch.Generator) -> list[Tensor]:
    """Random halves of `count` candidates, each followed by the other half.

    So each candidate is in half of them, and all have the same size.
    """
    pairs = (torch.randperm(count, generator=generator) for _ in range(shadows // 2))
    return [half for order in pairs for half in order.tensor_split(2)]


def confidences(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the target's probability p by softmax, (n,) in float64."""
    logits = logits.double()
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(dim=1)


def likelihood_ratios(shadows: Tensor, inside: Tensor, seen: Tensor) -> Tensor:
    """log p(seen | member) - log p(seen | other), of each candidate.

    Both are normal, with a mean to each candidate, and one variance for all: shadows are few.

    Args:
        shadows: (S, n): of each shadow, the candidates' confidences.
        inside: (S, n): whether the shadow was trained on the candidate; of each, two shadows were
            and two were not.
        seen: (n,): confidences of the attacked model.
    """
    found = []
    for chosen in (inside, ~inside):
        counts = chosen.sum(dim=0)
        means = (shadows * chosen).sum(dim=0) / counts
        squares = ((shadows - means).square() * chosen).sum()
        spread = (squares / (counts - 1).sum()).sqrt()
        found.append(Normal(means, spread).log_prob(seen))
    return found[0] - found[1]


def run_tangent(game: Game) -> dict[str, Any]:
    """Means of shards, forgotten by a ledger; and exact fits, forgotten with a certificate.

    Raises:
        AssertionError: The ledger's model is not, bit for bit, that of one that never had shard 0.
    """
    tangent = linearize(game.anchor)
    span, loss = Span(tangent, game.data), LOSSES[LOSS]()
    members, count = torch.arange(game.members), len(game.shards) + 1

    def descend(indices: Tensor, lr: float, seed: int) -> Tensor:
        batch = batch_of(len(indices))
        return span.descend(indices, loss, lr=lr, epochs=game.epochs, batch=batch, seed=seed)

    def judged(weights: Tensor) -> float:
        return validated(tangent, span.delta(weights), game.validation)

    def mean(lr: float) -> tuple[float, list[Tensor]]:
        shards = [descend(part, lr, game.seed) for part in (members, *game.shards)]
        return judged(sum(shards[1:], shards[0]) / count), shards

    def solve(indices: Tensor, l2: float) -> Tensor:
        return span.solve(torch.cat([indices, game.retained]), l2)

    def fitted(l2: float) -> tuple[float, Tensor]:
        weights = solve(members, l2)
        return judged(weights), weights

    means, exact = choose(RATES[MEANS], mean), choose(RATES[EXACT], fitted)
    rest = sum(means.result[2:], means.result[1])
    shadows: dict[str, list[Tensor]] = {MEANS: [], EXACT: []}
    for number, half in enumerate(game.halves):
        weights = (descend(half, means.value, shadow_seed(number)) + rest) / count
        shadows[MEANS].append(game.confidences(span.logits(weights)))
        shadows[EXACT].append(game.confidences(span.logits(solve(half, exact.value))))
    deltas = [span.delta(weights) for weights in means.result]
    with tempfile.TemporaryDirectory() as folder:
        ledger, other = (Ledger(Path(folder) / name, anchor=tangent) for name in ("one", "other"))
        for number, delta in enumerate(deltas):
            ledger.add(f"shard-{number}", delta)
        for number in range(count - 1, 0, -1):
            other.add(f"shard-{number}", deltas[number])
        states = {"before": ledger.composed()}
        ledger.forget("shard-0", progress=False)
        states |= {"forgotten by the ledger": ledger.composed(), "never had it": other.composed()}
    assert same(states["forgotten by the ledger"], states["never had it"])
    attacked = {
        f"{MEANS}, {state}": game.attack(loaded(tangent, delta), shadows[MEANS])
        for state, delta in states.items()
    }
    before = loaded(tangent, span.delta(exact.result))
    attacked[f"{EXACT}, before"] = game.attack(before, shadows[EXACT])
    others = range(game.members, 2 * game.members)
    problem = span.problem.with_l2(exact.value).without(others)
    _, certificate = forget_samples(problem, members.tolist())
    attacked[f"{EXACT}, forgotten with a certificate"] = game.attack(tangent, shadows[EXACT])
    never = span.delta(span.solve(game.retained, exact.value))
    attacked[f"{EXACT}, never had it"] = game.attack(loaded(tangent, never), shadows[EXACT])
    choices = {MEANS: means.told(), EXACT: exact.told()}
    return {"attacked": attacked, "choices": choices, "bound": certificate.distance_bound}


def run_statistics(game: Game) -> dict[str, Any]:
    """Statistics in a core, forgotten by subtraction.

    Raises:
        AssertionError: What is left is not, bit for bit, the sums of the retained images alone.
    """
    tangent = linearize(game.anchor, core=core_basis(game.anchor, game.public, size=CORE))

    def sums(indices: Tensor) -> TangentStatistics:
        return statistics(tangent, game.some(indices), progress=False)

    members, others = torch.arange(2 * game.members).tensor_split(2)
    before, never, shard = (
        sums(torch.cat([members, game.retained])),
        sums(game.retained),
        sums(members),
    )
    forgotten = before - shard
    assert forgotten == never
    states = {"before": before, "forgotten by subtraction": forgotten, "never had it": never}
    deltas = {state: total.choose().delta for state, total in states.items()}
    assert same(deltas["forgotten by subtraction"], deltas["never had it"])
    candidates, shadows = shard + sums(others), []
    for half in game.halves[::2]:
        first = sums(half)
        for part in (first, candidates - first):
            shadow = (part + never).solve(deltas["before"].l2)
            shadows.append(game.seen(loaded(tangent, shadow)))
    attacked = {
        f"statistics, {state}": game.attack(loaded(tangent, delta), shadows)
        for state, delta in deltas.items()
    }
    return {"attacked": attacked, "choices": {}}


def run_ordinary(game: Game) -> dict[str, Any]:
    """Ordinary models of all images: trained again, or made to forget approximately."""
    members, retained = torch.arange(game.members), game.some(game.retained)

    def train(data: CachedFeatures, lr: float, seed: int) -> nn.Module:
        return fit_ordinary(game.anchor, [data], lr, game.epochs, seed)[0]

    def joint(indices: Tensor, lr: float, seed: int) -> nn.Module:
        return train(game.some(torch.cat([indices, game.retained])), lr, seed)

    def tried(lr: float) -> tuple[float, nn.Module]:
        model = joint(members, lr, game.seed)
        return score(model, game.validation), model

    chosen = choose(RATES[ORDINARY], tried)

    def ascended(model: nn.Module, indices: Tensor, seed: int) -> nn.Module:
        return ascend(model, game.some(indices), game.validation, seed)

    def repaired(model: nn.Module, indices: Tensor, seed: int) -> nn.Module:
        assert isinstance(model, Tail)
        repaired = copy.deepcopy(model)
        start = Start(repaired, retained, LOSS, seed, REPAIR_PASSES, batch_of(len(retained)))
        start.fit(repaired, chosen.value)
        return repaired

    ways = {
        "before": lambda model, *_: model,
        "ascent": ascended,
        "fine-tuning on the rest": repaired,
    }
    shadows: dict[str, list[Tensor]] = {way: [] for way in ways}
    for number, half in enumerate(game.halves):
        seed = shadow_seed(number)
        model = joint(half, chosen.value, seed)
        for way, forget in ways.items():
            shadows[way].append(game.seen(forget(model, half, seed)))
    attacked = {
        f"ordinary, {way}": game.attack(forget(chosen.result, members, game.seed), shadows[way])
        for way, forget in ways.items()
    }
    again = train(retained, chosen.value, game.seed)
    attacked["ordinary, trained again without it"] = game.attack(again, shadows["before"])
    return {"attacked": attacked, "choices": {ORDINARY: chosen.told()}}


GROUPS: dict[str, Callable[[Game], dict[str, Any]]] = {
    "tangent": run_tangent,
    "ordinary": run_ordinary,
    "statistics": run_statistics,
}


def ascend(
    model: nn.Module, forgotten: CachedFeatures, unseen: CachedFeatures, seed: int
) -> nn.Module:
    """A copy after gradient ascent on what is to be forgotten.

    It ends when the loss of that is as high as the loss of unseen images was before.
    """
    model, loss = copy.deepcopy(model), LOSSES[LOSS]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ASCENT_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    wanted = loss(logits_of(model, unseen), unseen.targets)
    for _ in range(ASCENT_STEPS):
        if loss(logits_of(model, forgotten), forgotten.targets) >= wanted:
            break
        batch = torch.randperm(len(forgotten), generator=generator)[:ASCENT_BATCH]
        inputs, targets = forgotten.features[batch], forgotten.targets[batch]
        optimizer.zero_grad()
        (-loss(model(inputs.to(device)), targets.to(device))).backward()
        optimizer.step()
    return model


def same(first: Delta, second: Delta) -> bool:
    """Bit for bit."""
    return all(torch.equal(value, second[name]) for name, value in first.items())


def shadow_seed(number: int) -> int:
    """No attacked model's."""
    return 1000 + number
