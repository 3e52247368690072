"""Shards are disjoint, deterministic and follow their recipe to within one example; what cannot be filled is refused."""

import numpy as np
import pytest

from dfl import partition
from dfl.partition.recipes import class_counts, feasible_size

NAMES = ["few", "some", "many"]
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 300, 660]))
COLUMNS = {"author": [f"author {i % 23}" for i in range(1000)], "half": ["first", "second"] * 500}
CASES = [("iid", {}), ("dirichlet", {}), ("dirichlet", {"alpha": 0.4, "min_size": 10}), ("shards", {}),
         ("shards", {"shards_per_peer": 1}), ("quantity", {"skew": 1.5}), ("quantity", {"skew": 0}),
         ("column", {"column": "author"}), ("majority", {"leave_out": 1}), ("majority", {"leave_out": ["few"]}),
         ("proportions", {"proportions": [[4, [0.1, 0.1, 0.8]], [6, {"some": 0.3, "many": 0.7}]]})]


def build(name, num_peers=10, *, labels=LABELS, seed=0, **params):
    return partition.build(name, labels, num_peers, seed=seed, columns=COLUMNS, label_names=NAMES, **params)


@pytest.mark.parametrize("name, params", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_shards_are_disjoint_not_empty_and_the_same_again(name, params, seed):
    parts = build(name, seed=seed, **params)
    everything = np.concatenate(parts)
    assert len(parts) == 10 and all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert len(np.unique(everything)) == len(everything)
    assert all(np.array_equal(a, b) for a, b in zip(parts, build(name, seed=seed, **params), strict=True))
    if name not in ("proportions", "majority"):
        assert len(everything) == len(LABELS)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "quantity"])
def test_another_seed_gives_other_shards(name):
    assert not np.array_equal(build(name, seed=0)[0], build(name, seed=1)[0])


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "quantity"])
def test_one_peer_holds_everything(name):
    assert np.array_equal(build(name, 1)[0], np.arange(1000))


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(map(len, build("iid", 7))) == [142, 143, 143, 143, 143, 143, 143]


def test_a_small_alpha_skews_more():
    def skew(alpha):
        shares = [np.bincount(LABELS[part], minlength=3) / len(part) for part in build("dirichlet", 5, alpha=alpha)]
        return np.std(shares, axis=0).mean()
    assert skew(0.2) > 2 * skew(10.0)
    assert min(map(len, build("dirichlet", alpha=0.5, min_size=30))) >= 30


def test_column_keeps_a_value_together_and_balances():
    parts = build("column", column="author")
    owners = [{COLUMNS["author"][i] for i in part} for part in parts]
    assert sum(map(len, owners)) == 23 and set(map(len, owners)) == {2, 3}


def test_quantity_follows_its_power():
    sizes = np.array([len(part) for part in build("quantity", 4, skew=1.0)])
    assert np.abs(sizes - 1000 * np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)).max() <= 1


def test_proportions_are_met_within_one_example_at_the_capped_size():
    rows = [[0.02, 0.28, 0.7]] * 5 + [[0.05, 0.05, 0.9]] * 5
    parts = build("proportions", proportions=rows)
    size = min(int(40 / 0.35), int(300 / 1.65), int(660 / 8))
    for row, part in zip(rows, parts, strict=True):
        assert len(part) == size
        assert np.abs(np.bincount(LABELS[part], minlength=3) - size * np.array(row)).max() < 1
    assert [len(part) for part in build("proportions", proportions=rows, per_client=20)] == [20] * 10


def test_groups_rows_and_names_say_the_same():
    rows = build("proportions", proportions=[[0.1, 0.4, 0.5]] * 3 + [[0, 0.5, 0.5]] * 7)
    groups = build("proportions", proportions=[[3, [0.1, 0.4, 0.5]], [7, [0, 0.5, 0.5]]])
    names = build("proportions", proportions=[[3, {"few": 0.1, "some": 0.4, "many": 0.5}], [7, {"many": 0.5, "some": 0.5}]])
    for other in (groups, names):
        assert all(np.array_equal(a, b) for a, b in zip(rows, other, strict=True))


def test_the_published_label_skew_and_its_cap():
    """Three clients (0.9, 0.1), three (0.1, 0.9), four (0.5, 0.5): five shares of each class."""
    shares = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 3 + [[0.5, 0.5]] * 4)
    assert feasible_size(shares, np.array([29780, 37569])) == 5956  # SST-2
    assert feasible_size(np.array([[0.9, 0.05, 0.05]] * 4 + [[0.05, 0.9, 0.05]] * 3 + [[0.05, 0.05, 0.9]] * 3),
                         np.array([130899, 130900, 130903])) == 33563  # MNLI


@pytest.mark.parametrize("seed", range(20))
def test_rounding_is_within_one_and_within_the_supply(seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(4, 0.5), size=9)
    supply = rng.integers(5, 500, size=4)
    size = feasible_size(shares, supply)
    counts = class_counts(shares, size)
    assert (counts.sum(1) == size).all() and (counts.sum(0) <= supply).all()
    assert np.abs(counts - shares * size).max() < 1 + 1e-9
    assert size >= np.floor((supply / shares.sum(0)).min()) - 2


def test_majority_gives_every_class_the_same_number_of_peers():
    parts = build("majority", 4, leave_out=1, fraction=0.8)
    shares = np.array([np.bincount(LABELS[part], minlength=3) / len(part) for part in parts])
    assert shares.argmax(1).tolist() == [1, 1, 2, 2]
    assert np.abs(shares.max(1) - 0.8).max() < 0.02
    assert (shares[:, 0] > 0).all()  # left to chance, not left out


@pytest.mark.parametrize("name, params, message", [
    ("idd", {}, "partition.name = 'idd' is not known .did you mean 'iid'"),
    ("iid", {"alpha": 1}, "partition.alpha = 1: 'iid' has no such parameter"),
    ("column", {}, "partition.column is missing"),
    ("column", {"column": "writer"}, "partition.column = 'writer' is not allowed; allowed: author, half"),
    ("column", {"column": "half"}, "has 2 different values, too few for 10 peers"),
    ("dirichlet", {"alpha": 0}, "partition.alpha = 0 is not allowed; allowed: a positive number"),
    ("dirichlet", {"alpha": "x"}, "partition.alpha = 'x'"),
    ("dirichlet", {"alpha": float("nan")}, "partition.alpha = nan"),
    ("dirichlet", {"min_size": 101}, "needs 1010 examples, there are 1000; allowed: up to 100"),
    ("dirichlet", {"alpha": 0.001, "min_size": 90}, "raise alpha, lower min_size"),
    ("shards", {"shards_per_peer": 200}, "partition.shards_per_peer = 200 is not allowed; allowed: up to 100"),
    ("shards", {"shards_per_peer": 1.5}, "a positive whole number"),
    ("quantity", {"skew": -1}, "partition.skew = -1"),
    ("quantity", {"skew": 9}, "partition.name = 'quantity' .skew = 9. leaves peer 2 without an example"),
    ("majority", {}, "with 3 majority classes does not make 10 peers"),
    ("majority", {"fraction": 1.2, "leave_out": 1}, "partition.fraction = 1.2"),
    ("majority", {"leave_out": "fw"}, "partition.leave_out = 'fw' is not allowed; allowed: a number below 3, or names"),
    ("majority", {"leave_out": 3}, "partition.leave_out = 3"),
    ("proportions", {"proportions": [[9, [0, 0, 1]]]}, "describes 9 peers, but peers = 10"),
    ("proportions", {"proportions": "iid"}, "a row per peer, or groups"),
    ("proportions", {"proportions": [[10, [0.5, 0.5]]]}, "3 shares that sum to 1, for few, some, many"),
    ("proportions", {"proportions": [[10, [0.5, 0.6, 0]]]}, "3 shares that sum to 1"),
    ("proportions", {"proportions": [[10, [-0.5, 0.5, 1]]]}, "3 shares that sum to 1"),
    ("proportions", {"proportions": [[10, {"lots": 1.0}]]}, "partition.proportions = 'lots' is not allowed; allowed: few"),
    ("proportions", {"proportions": [[10, [0.5, 0.5, 0]]], "per_client": 9},
     "partition.per_client = 9 is infeasible .* allowed: up to 8")])
def test_what_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **params)
    assert "\n" not in str(caught.value)


def test_more_peers_than_examples():
    with pytest.raises(ValueError, match="peers = 10 cannot share 4 training examples; allowed: 1 to 4"):
        build("iid", labels=np.array([0, 1, 1, 2]))
    with pytest.raises(ValueError, match="the partition cannot give one example to each of 10 peers: class 'few' has 1"):
        build("proportions", labels=np.repeat([0, 1, 2], [1, 20, 20]), proportions=[[10, [0.4, 0.3, 0.3]]])


def test_without_labels_everything_is_one_class():
    parts = partition.build("dirichlet", np.zeros(50, dtype=np.int64), 4, alpha=1.0)
    assert sum(map(len, parts)) == 50


def test_the_table_shows_every_peer_and_what_is_left():
    parts = build("majority", 4, leave_out=1, fraction=0.8)
    lines = partition.table(parts, LABELS, NAMES).splitlines()
    assert lines[0].split() == ["peer", "examples", *NAMES]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "3", "all", "unused"]
    assert "79.7%" in lines[1] and len({len(line) for line in lines}) == 1
    wide = partition.table([np.arange(40)], np.arange(40) % 20, [f"c{i}" for i in range(20)])
    assert "12 of 20" in wide and "c12" not in wide
    assert partition.table([np.arange(3), np.arange(3, 5)], np.zeros(5, dtype=int), []).count("\n") == 3


def test_every_partition_has_a_line():
    assert set(partition.describe()) == set(partition.PARTITIONS)
    assert all(line.endswith(".") for line in partition.describe().values())
