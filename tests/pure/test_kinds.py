"""The table of adapter kinds: no other module knows their names, and a package outside the tree adds one."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import tiny_models
import tiny_runs
import torch
from test_structure import files

from dfl.adapters.cores import expand, make_cores, pull_back, start
from dfl.adapters.kinds import KINDS, check_method, check_residual, check_start, check_wanted, describe, kind_of
from dfl.adapters.layout import empty_rows, make_layout
from dfl.config import LoraConfig
from dfl.methods import METHODS
from dfl.run.build import check

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = ROOT / "tests" / "outside"
# rules and methods have some of these names as well
TABLES_OF_NAMES = ("dfl/methods.py", "dfl/rules/__init__.py")


NAMES = KINDS.keys() - {"lora"}  # which is a section of a recipe as well


def names_in(node: ast.AST) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)} & NAMES


def vera():
    """The row of the package outside, read as a file: on the path its entry points would be those of all tests."""
    spec = importlib.util.spec_from_file_location("outside_kinds", OUTSIDE / "outside.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.vera


def comparisons(tree: ast.AST) -> list[int]:
    """Lines that compare with the name of a kind, compare a field `adapter`, or look one up in a dictionary of their own."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(names_in(side) or isinstance(side, ast.Attribute) and side.attr == "adapter" for side in sides):
                found.append(node.lineno)
        elif isinstance(node, ast.Dict) and any(names_in(key) for key in node.keys if key is not None):
            found.append(node.lineno)
        elif isinstance(node, (ast.MatchValue, ast.Set)) and names_in(node):
            found.append(node.lineno)
    return found


def test_no_other_module_compares_names_of_kinds():
    for path in files("dfl"):
        where = path.relative_to(ROOT).as_posix()
        if where != "dfl/adapters/kinds.py" and where not in TABLES_OF_NAMES:
            assert not comparisons(ast.parse(path.read_text())), where
    for code in ('kind == "dora"', 'a in ("sb", "ravan")', '{"dora": 1}.get(a)', 'lora.adapter != wanted', '"hira" in {a}'):
        assert comparisons(ast.parse(code)), code  # and would be found


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.core] + ["vera"])
def test_the_gradient_of_a_core_is_autograds(name):
    """Through any loss: the factors' gradients, pulled back, are those that autograd finds for the row."""
    kind = KINDS[name] if name in KINDS else vera()
    lora = make_layout([("q", 4, 11, 9, 0.5), ("o", 4, 8, 12, 2.0)], [("head", (3, 2))])
    made = make_cores(lora, [("head", (3, 2))], kind.core(LoraConfig(heads=2)), seed=0)
    made, generator = made._replace(bases=made.bases.double()), torch.Generator().manual_seed(1)
    x = empty_rows(3, made.layout.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=generator))

    def factors(row: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(lora.size, dtype=torch.float64)
        expand(made, row, out)
        return out

    for row in x:
        leaf = row.clone().requires_grad_()
        out = factors(leaf)
        weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        for group in {"A", "B"} - made.core.moves:  # whose gradients are not made
            weight[lora.groups[group]] = 0
        (out.sin() * weight).sum().backward()
        gradient = out.detach().cos() * weight
        pull_back(made, row, gradient, found := torch.zeros_like(row))
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-12)
        assert found.abs().sum() > 0
    zero = factors(start(made).double())
    assert all((zero[pair.b:pair.b + 4 * pair.d_out] == 0).all() for pair in lora.pairs)  # it begins as the base model


@pytest.mark.parametrize("fields, method, said", [
    ({"adapter": "sb"}, "lora", "lora.adapter = 'sb' trains cores between frozen bases, which method.name = 'lora' does not mix"),
    ({"adapter": "lora"}, "fed_sb", "method.name = 'fed_sb' needs lora.adapter = 'sb', got 'lora'"),
    ({"adapter": "hira"}, "flora_na", "W0 ⊙ (B A); allowed with it: rule.name = 'hira'"),
    ({"adapter": "dorra"}, "lora", "lora.adapter = 'dorra' is not known (did you mean 'dora'?); allowed: lora, dora")])
def test_what_a_method_cannot_mix_is_refused(fields, method, said):
    rules = {name: row.rule for name, row in METHODS.items()}
    with pytest.raises(ValueError) as error:
        check_method(LoraConfig(**fields), method, rules[method], f"method.name = {method!r}", rules)
        check_wanted(LoraConfig(**fields), f"method.name = {method!r}", METHODS[method].adapter)
    assert said in str(error.value)


def test_a_residual_without_a_place_is_refused():
    check_residual(LoraConfig(), "method.name = 'fedhl'")
    for adapter in ("dora", "hira"):
        with pytest.raises(ValueError, match=f"lora.adapter = '{adapter}' has no place for; allowed: lora"):
            check_residual(LoraConfig(adapter=adapter), "method.name = 'fedhl'")


@pytest.mark.parametrize("fields, unequal, said", [
    ({"start": "gradient"}, False, "is for lora.adapter = 'sb' or 'ravan', got 'lora'; allowed with it: kaiming, pissa, olora"),
    ({"start": "pissa"}, True, "lora.start = 'pissa' needs one lora.rank"),
    ({"adapter": "ravan"}, True, "lora.adapter = 'ravan' needs one lora.rank"),
    ({"start_step": 1.0}, False, "lora.start_step = 1.0 is the step of")])
def test_a_start_that_does_not_fit_is_refused(fields, unequal, said):
    with pytest.raises(ValueError) as error:
        check_start(LoraConfig(**fields), unequal)
    assert said in str(error.value)


def test_a_rate_of_what_is_not_trained_is_refused_before_anything_is_loaded(tmp_path):
    for fields, said in (({"train__lr_ratio__core": 2}, "lr_ratio.core = 2.0 changes nothing: lora.adapter = 'lora'"),
                         ({"train__lr_ratio__M": 2}, "trains A, B"), ({"train__lr_ratio__head": 2}, "lora.head = 'frozen'"),
                         ({"train__lr_ratio__A": 2, "lora__adapter": "sb", "method": "fed_sb"}, "trains core")):
        with pytest.raises(ValueError) as error:
            check(tiny_runs.make_config(tmp_path / "none", tmp_path / "none.csv", tmp_path / "run", **fields))
        assert said in str(error.value)


def test_rows_say_what_they_train():
    assert {name: kind.trains for name, kind in KINDS.items()} == {
        "lora": ("A", "B"), "dora": ("A", "B", "M"), "hira": ("A", "B"), "sb": ("core",), "ravan": ("core",),
        "orthogonal": ("A", "B")}
    assert kind_of(LoraConfig(adapter="hira")).layers.scaling(16.0, 4, False) == 1.0
    assert kind_of(LoraConfig()).layers.scaling(16.0, 4, True) == 8.0
    assert all(line.endswith(".") for line in describe().values())


class TestOutside:
    """VeRA of `tests/outside`, in a process in which that package is installed."""

    PROGRAM = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from dfl import config as configuration
from dfl.adapters.saving import save_adapter
from dfl.cli import main
from dfl.run import build
from dfl.run.checkpoint import read_state
from dfl.run.runtime import start
from dfl.run.train import restore
from dfl.store.checkpoints import latest
from dfl.training.executors import Sequential, Stacked

base, root, words = Path({base!r}), Path({root!r}), {words!r}
assert main(["train", *words, "--output", str(root / "whole")]) == 0
halves = [*words, "--output", str(root / "half")]
assert main(["train", *halves, "--train.rounds", "2"]) == 0
assert main(["train", *halves, "--resume"]) == 0
checkpoint = latest(root / "half")
rows, others = (torch.stack([read_state(one, range(4))[f"x.{{peer}}"] for peer in range(4)])
                for one in (checkpoint, latest(root / "whole")))
assert torch.equal(rows, others)  # to the bit
config = configuration.load(None, halves)
topology, runtime = build.check(config), start(config)
loaded = build.load(config, runtime.device)
run = build.assemble(config, runtime, loaded, topology)
first = run.peers.x.clone()
restore(run, checkpoint)
assert run.peers.layout.groups["core"] == slice(0, rows.shape[1]) and not torch.equal(rows, first)
assert rows.shape[1] == sum(p.rank + p.d_out for p in run.peers.adapted.lora.pairs)
assert (rows != first).float().mean() > 0.9 and not torch.equal(rows[0], rows[1])
run.peers.x.mul_(20)  # so loud that a factor left out would show in the output of a model with tiny weights
save_adapter(root / "louder", run.peers.adapted, run.rows().row(1), str(base))
one, other = run.evaluator.sums(run.rows(), Sequential()), run.evaluator.sums(run.rows(), Stacked())
torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
batch = loaded.bundle.task.collate([loaded.bundle.valid.features[i] for i in range(4)])
inputs = loaded.bundle.task.inputs(batch)
with torch.no_grad():
    with loaded.adapted.model.disable_adapter():
        unchanged = loaded.adapted.model(**inputs).logits
    with Sequential().bound(run.peers.adapted, run.rows(), None, [1]) as forward:
        ours = forward(inputs, [1]).logits
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = PeftModel.from_pretrained(model, root / "louder").eval()(**inputs).logits
torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
change = (ours - unchanged).abs().max()
assert change > 1e-3 and (theirs - ours).abs().max() < 1e-2 * change
for wrong, said in ((["--method", "decaf"], "allowed: lora, local"), (["--lora.start", "pissa"], "allowed with it: kaiming"),
                    (["--lora.rank", "[1, 2, 3, 4]"], "unequal ranks")):
    try:
        build.check(configuration.load(None, [*halves, *wrong]))
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(wrong)
print("trained, mixed, resumed, loaded")
"""

    def outside(self, code: str, *paths: Path) -> subprocess.CompletedProcess:
        path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
                              timeout=150)

    @pytest.mark.long
    def test_a_kind_of_another_package_is_trained_mixed_resumed_and_loaded(self, tmp_path):
        root = tiny_runs.make_folder(tmp_path)
        tiny_models.save(root / "bert", "bert", 2)
        words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", lora__adapter="vera", lora__rank=24,
                                    method="lora", train__lr=0.05, measure__layers=2, model__dropout=0.0)
        words = [word for word in words if not word.startswith("--output")]
        code = self.PROGRAM.format(base=str(root / "bert"), root=str(tmp_path), words=words)
        done = self.outside(code, OUTSIDE)
        assert done.returncode == 0 and "trained, mixed, resumed, loaded" in done.stdout, done.stdout + done.stderr
        assert "Trained scales of frozen random factors" in self.outside("from dfl.cli import main; main(['list'])", OUTSIDE).stdout
        done = self.outside(f"import sys; from dfl.cli import main; sys.exit(main({['train', *words]!r}))")
        assert done.returncode == 2 and "lora.adapter = 'vera' is not known" in done.stderr

    def test_it_is_the_one_that_the_document_shows(self):
        assert documents.block("python", "scales_of_frozen_factors") in (OUTSIDE / "outside.py").read_text()
