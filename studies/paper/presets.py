"""How much is run: `quick` in the tests, `cpu` on two cores, `gpu` with every block trained."""

from __future__ import annotations

from dataclasses import dataclass

from studies.paper.methods import METHODS


@dataclass(frozen=True)
class Accuracy:
    """Part 2: every method on every set.

    Attributes:
        sets: In `studies.paper.data.sets.SETS`.
        methods: Of both losses, in `studies.paper.methods.METHODS`.
        slow: Methods that take longer, with the square loss.
        slow_sets: The sets that those run on.
        train: Training images.
        validation: Images that rates are chosen on.
        epochs: Passes over the training images.
        slow_epochs: Those of the slow methods.
    """

    sets: tuple[str, ...]
    methods: tuple[str, ...] = ("nlft-1", "taft-1", "lora-1", "adapter-1", "taft-1-low-rank")
    slow: tuple[str, ...] = ("taft-1-exact", "nlft-3", "taft-3")
    slow_sets: tuple[str, ...] = ("emoji",)
    train: int = 1000
    validation: int = 236
    epochs: int = 6
    slow_epochs: int = 3


@dataclass(frozen=True)
class Composition:
    """Part 3: shards composed.

    Attributes:
        sets: Of images.
        deals: "iid", or "by class": every shard has a stretch of the classes.
        shards: How many the private images are dealt into.
        exact: The numbers of shards of the exact compositions, which lose nothing.
        exact_by_class: Those of them that are dealt by class, too.
        exact_train: Their private images, which are fewer: every product is a pass over them all.
        public: Images of the anchor's classifier, in no shard.
        train: Private images.
        validation: Images that rates and weights are chosen on.
        epochs: Passes of each shard over its images.
    """

    sets: tuple[str, ...]
    deals: tuple[str, ...] = ("iid", "by class")
    shards: tuple[int, ...] = (1, 2, 5, 10, 25, 50)
    exact: tuple[int, ...] = (1, 2, 5, 10, 50)
    exact_by_class: tuple[int, ...] = (10,)
    exact_train: int = 200
    public: int = 100
    train: int = 1000
    validation: int = 136
    epochs: int = 5


@dataclass(frozen=True)
class Forgetting:
    """Part 4: shards removed, and what an attacker still sees of them; sizes are composition's.

    Attributes:
        images: The set, one of composition's.
        shards: In all, one of composition's numbers.
        removed: How many are removed, one number to a point of the curve.
    """

    images: str
    shards: int = 10
    removed: tuple[int, ...] = (0, 1, 2, 5, 8, 9)


@dataclass(frozen=True)
class Privacy:
    """Part 5: accuracy against ε.

    Attributes:
        images: The set.
        epsilons: At `failure`.
        failure: The δ.
        public: Images of the anchor's classifier.
        private: Images that are trained on privately.
        validation: Images that the options are chosen on, for every ε and way; public ones.
        expected: Samples in a step, on average.
        steps: Steps.
    """

    images: str = "fashion"
    epsilons: tuple[float, ...] = (0.5, 1.0, 3.0, 8.0)
    failure: float = 1e-5
    public: int = 100
    private: int = 3900
    validation: int = 500
    expected: int = 200
    steps: int = 12


@dataclass(frozen=True)
class Influence:
    """Part 6: training images removed by what they do to the validation images.

    Attributes:
        images: The set.
        train: Training images.
        wrong: Fraction of them whose class is replaced by another.
        validation: Images whose loss counts.
        removed: How many are removed, one number to a point of the curve.
    """

    images: str = "emoji"
    train: int = 120
    wrong: float = 0.1
    validation: int = 100
    removed: tuple[int, ...] = (5, 10, 20)


@dataclass(frozen=True)
class Preset:
    """All parts, and how they are run.

    Attributes:
        seeds: Of every part.
        depths: Blocks from the end whose inputs are kept, for each set.
        workers: Processes.
        threads: Of torch, in each.
        device: Of the models.
    """

    accuracy: Accuracy
    composition: Composition
    forgetting: Forgetting
    privacy: Privacy
    influence: Influence
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 2
    threads: int = 1
    device: str = "cpu"

    def depths(self, images: str) -> tuple[int, ...]:
        """How many blocks are trained on a set, of all methods."""
        slow = self.accuracy.slow if images in self.accuracy.slow_sets else ()
        return tuple(sorted({1, *(METHODS[name].depth for name in slow)}))


PRESETS = {
    "quick": Preset(
        Accuracy(
            ("mnist",),
            ("nlft-1", "taft-1"),
            slow=(),
            slow_sets=(),
            train=160,
            validation=100,
            epochs=3,
        ),
        Composition(
            ("mnist",),
            deals=("iid",),
            shards=(1, 8),
            exact=(1, 3),
            exact_train=30,
            public=50,
            train=160,
            validation=100,
            epochs=3,
        ),
        Forgetting("mnist", 8, (0, 4)),
        Privacy("mnist", (3.0,), 1e-4, 50, 600, 100, expected=64, steps=8),
        Influence("mnist", train=30, validation=40, removed=(5,)),
        seeds=(0, 1, 2),
    ),
    "cpu": Preset(
        Accuracy(("emoji", "silhouettes", "fashion", "mnist")),
        Composition(("emoji",)),
        Forgetting("emoji"),
        Privacy("fashion"),
        Influence("emoji"),
    ),
    "gpu": Preset(
        Accuracy(
            ("emoji", "silhouettes", "fashion", "mnist"),
            slow=("taft-1-exact", "nlft-3", "taft-3", "nlft-all", "taft-all", "lora-all"),
            slow_sets=("emoji", "silhouettes", "fashion", "mnist"),
            epochs=15,
            slow_epochs=15,
        ),
        Composition(("emoji", "silhouettes", "fashion"), epochs=15),
        Forgetting("emoji"),
        Privacy("fashion", steps=60),
        Influence("emoji", train=400),
        workers=1,
        threads=8,
        device="cuda",
    ),
}
