"""Answers that models write themselves, what a run does at its evaluations, and `dfl generate`."""

import json
import sys

import numpy as np
import pytest
import tiny_models
import torch
from test_packing import text_config
from tiny_runs import adapter_digests, make_config, make_run, stop_after

from dfl import tasks
from dfl.cli import main
from dfl.metrics.answers import prompt_and_answer
from dfl.metrics.base import IGNORED
from dfl.run import generation
from dfl.run import train as running
from dfl.run.build import check
from dfl.run.evaluation import with_adapter
from dfl.run.generation import generate
from dfl.run.loop import evaluate
from dfl.store.directory import written
from dfl.store.records import read_lines
from dfl.tasks import chat


def pairs_config(tmp_path, output="run", **fields):
    model = tmp_path / "llama" if (tmp_path / "llama").exists() else tiny_models.save(tmp_path / "llama", "llama", layers=2)
    words = tiny_models.WORDS
    rows = [{"ask": f"what is {words[k % 22]} {words[k // 22]}", "say": "good film" if k % 2 else "bad node"} for k in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"data__prompt": "ask", "data__response": "say", "eval__generate__examples": 5, "eval__generate__max_new_tokens": 4,
              "eval__generate__shown": 2, "train__lr": 3e-2, "train__batch_size": 2} | fields
    return make_config(model, tmp_path / "pairs.jsonl", tmp_path / output, model__task="causal_lm", **fields)


def train_on_conversations(tmp_path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"how {w}"}, {"role": "assistant", "content": w}]}
            for w in tiny_models.WORDS * 3]
    config = pairs_config(tmp_path, data__prompt=None, data__response=None, data__messages="messages", data__template="plain",
                          train__rounds=1)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert running.train(config) == 0


def evaluations(folder):
    return [line["eval"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line]


def test_prompts_end_where_the_last_answer_begins():
    ids = np.arange(10)
    labels = np.where(np.isin(ids, [2, 3, 7, 8]), ids, IGNORED)
    assert prompt_and_answer({"input_ids": ids, "labels": labels}) == ([0, 1, 2, 3, 4, 5, 6], [7, 8])
    assert prompt_and_answer({"input_ids": ids, "labels": ids}) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


def test_answers_are_those_of_stock_generation(tmp_path):
    """One prompt after the other, in a batch of different lengths, by the adapter as stock PEFT loads it."""
    config = pairs_config(tmp_path, train__rounds=2, eval__batch_size=3)
    assert running.train(config) == 0
    samples = evaluations(tmp_path / "run")[-1]["samples"]
    assert len(samples) == 2 and list(samples[0]) == ["prompt", "reference", "consensus", "peer 0"]
    base, processor = tasks.load_model(config.model, config.data, [], seed=0)
    for name, folder in (("consensus", "consensus"), ("peer 0", "peer-0")):
        model = with_adapter(base, tmp_path / "run" / "checkpoints" / "round-00002" / folder).eval()
        for sample in samples:
            ids = processor(sample["prompt"], return_tensors="pt")["input_ids"]
            said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=3, eos_token_id=3)[0, ids.shape[1]:]
            assert processor.decode(said, skip_special_tokens=True).strip() == sample[name]
        base = model.unload()


def test_scores_are_metrics_like_others_and_samples_are_in_the_report(tmp_path):
    """A model that has learnt its answers by heart, and a metric of one's own."""
    (tmp_path / "my_measure.py").write_text("def words(answers, references):\n"
                                            "    return {'words': sum(len(a.split()) for a in answers) / len(answers)}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        config = pairs_config(tmp_path, train__rounds=8, train__local_steps=10, eval__every=4,
                              eval__generate__metric="my_measure:words")
        assert running.train(config) == 0
    finally:
        sys.path.remove(str(tmp_path))
    first, *_, last = evaluations(tmp_path / "run")
    assert first["answer_match"]["mean"] == 0.0 and last["consensus"]["answer_match"] >= 0.4
    assert len(last["peers"]["answer_match"]) == 4 and last["answer_words"]["mean"] > 0.5
    assert main(["report", str(tmp_path / "run")]) == 0
    page, tables = ((tmp_path / "run" / name).read_text() for name in ("report.html", "report.md"))
    for text in (page, tables):
        assert "What they say" in text and "Answers after round 8, written greedily" in text
        assert last["samples"][0]["prompt"] in text and "answer_match" in page


def test_answers_leave_training_as_it_is_and_do_not_depend_on_the_executor(tmp_path):
    found = {}
    for output, fields in (("with", {}), ("without", {"eval__generate__examples": 0}), ("stacked", {"train__executor": "stacked"})):
        running.train(pairs_config(tmp_path, output, train__rounds=2, **fields))
        found[output] = evaluations(tmp_path / output)[-1]
    assert adapter_digests(tmp_path / "with") == adapter_digests(tmp_path / "without")
    assert found["with"]["samples"] == found["stacked"]["samples"] and "samples" not in found["without"]


def test_what_answers_nothing_is_refused(tmp_path):
    config = make_config(tmp_path, tmp_path, tmp_path / "run", eval__generate__examples=2)
    with pytest.raises(ValueError, match="eval.generate.examples = 2: model.task = 'sequence_classification' writes no answers"):
        check(config)
    with pytest.raises(ValueError, match="eval.generate.metric = 'absent:no' cannot be imported: ModuleNotFoundError"):
        make_run(pairs_config(tmp_path, eval__generate__metric="absent:no"))


def test_patience_ends_a_run_also_when_it_was_stopped_between(tmp_path, monkeypatch):
    """At a rate of zero nothing gets better: after the start and two evaluations the run ends, also when it was stopped before."""
    fields = {"train__lr": 0.0, "train__rounds": 20, "eval__every": 1, "eval__patience": 2}
    assert running.train(text_config(tmp_path, "whole", **fields)) == 0
    with monkeypatch.context() as patch:
        stop_after(running, 1, patch=patch.setattr)
        assert running.train(text_config(tmp_path, "halves", **fields)) == running.STOPPED
    assert running.train(text_config(tmp_path, "halves", **fields), resume=True) == 0
    for output in ("whole", "halves"):
        assert read_lines(tmp_path / output / "metrics.jsonl")[-1]["round"] == 3, output
        assert "Patience" in json.loads((tmp_path / output / "ended.json").read_text())["callback"]
    running.train(text_config(tmp_path, "learns", **fields | {"train__lr": 1e-2, "train__rounds": 6}))
    assert read_lines(tmp_path / "learns" / "metrics.jsonl")[-1]["round"] > 3
    running.train(text_config(tmp_path, "delta", **fields | {"train__lr": 1e-2, "train__rounds": 6, "eval__min_delta": 100}))
    assert read_lines(tmp_path / "delta" / "metrics.jsonl")[-1]["round"] <= 4


@pytest.mark.parametrize("processes", [1, 2])
def test_the_best_models_are_kept(tmp_path, processes):
    """By each peer and of the consensus: what lies in `best` is the model of the round with the best value, and is its own folder."""
    fields = {"train__rounds": 5, "eval__every": 1, "train__lr": 0.3, "checkpoint__best": True, "checkpoint__every": 1,
              "checkpoint__keep": 9, "processes": processes}
    config = text_config(tmp_path, **fields)
    assert running.train(config) == 0
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    for name in ("peer-0", "peer-3", "consensus"):
        values = {line["round"]: line["eval"]["consensus"]["perplexity"] if name == "consensus" else
                  line["eval"]["peers"]["perplexity"][int(name[-1])] for line in lines}
        about = json.loads((tmp_path / "run" / "best" / name / "best.json").read_text())
        assert about == {"round": min(values, key=values.get), "metric": "perplexity", "value": min(values.values())}
        if about["round"]:
            saved = tmp_path / "run" / "checkpoints" / f"round-{about['round']:05}" / name / "adapter_model.safetensors"
            assert saved.read_bytes() == (tmp_path / "run" / "best" / name / "adapter_model.safetensors").read_bytes()
    best = {path for path in (tmp_path / "run" / "best").rglob("*") if path.is_file()}
    assert len(best) == 15 and best <= set(written(tmp_path / "run"))
    assert main(["eval", str(tmp_path / "run" / "best" / "consensus")]) == 0
    assert main(["export", str(tmp_path / "run"), "--best", "--output", str(tmp_path / "out")]) == 0
    assert "None" not in (tmp_path / "out" / "README.md").read_text().split("## Use")[0]
    assert main(["train", *overrides(config), "--overwrite"]) == 0


def overrides(config):
    import yaml
    path = config.output + ".yaml"
    with open(path, "w") as out:
        yaml.safe_dump(config.to_dict(), out)
    return [path]


def test_generate_says_what_the_model_says(tmp_path, capsys):
    config = pairs_config(tmp_path, train__rounds=2, checkpoint__best=True)
    assert running.train(config) == 0
    (sample, other) = evaluations(tmp_path / "run")[-1]["samples"]
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), sample["prompt"], other["prompt"], "--max-new-tokens", "4"]) == 0
    assert [text.strip() for text in capsys.readouterr().out.split("\n\n")] == [sample["consensus"], other["consensus"]]
    assert [text.strip() for text in generate(tmp_path / "run", [sample["prompt"]], peer="0", max_new_tokens=4)] == [sample["peer 0"]]
    assert generate(tmp_path / "run", ["how"], best=True, max_new_tokens=3)
    drawn = [generate(tmp_path / "run", ["how"], temperature=5.0, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for words, said in ((["--peer", "9"], "--peer '9' is not in"), (["--best", "--round", "2"], "--round 2 and --best: give one"),
                        (["--max-new-tokens", "0"], "allowed: from 1"), (["--top-p", "7"], "--top-p 7.0"),
                        (["--temperature", "nan"], "--temperature nan")):
        assert main(["generate", str(tmp_path / "run"), "how", *words]) == 2
        assert said in capsys.readouterr().err


def test_an_answer_ends_where_the_model_has_no_positions_left(tmp_path, capsys):
    """GPT-2 has learnt 64 of them; the next has no embedding."""
    tiny_models.save(tmp_path / "gpt2", "gpt2", layers=1)
    config = pairs_config(tmp_path, model__name=tmp_path / "gpt2", train__rounds=1, eval__generate__max_new_tokens=200)
    assert running.train(config) == 0
    assert "samples" in evaluations(tmp_path / "run")[-1]
    for length in (1, 63):
        assert isinstance(generate(tmp_path / "run", [" ".join(["how"] * length)])[0], str)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "how", " ".join(["how"] * 64)]) == 2
    assert "a prompt has 64 tokens, and the model takes 64 with its answer; allowed: up to 63" in capsys.readouterr().err


def test_a_run_of_conversations_is_asked_through_its_template(tmp_path):
    train_on_conversations(tmp_path)
    assert evaluations(tmp_path / "run")[-1]["samples"][0]["prompt"].startswith("how")  # roles are no words of this tokenizer
    assert isinstance(generate(tmp_path / "run", ["how good"], max_new_tokens=3)[0], str)


def test_a_model_is_asked_as_it_was_taught_whatever_its_tokenizer_brings(tmp_path, monkeypatch):
    """Texts stay texts for a base with a chat template; prompts of messages go through it without any word in the recipe."""
    config = pairs_config(tmp_path, train__rounds=1)
    processor = tiny_models.tokenizer(encoder=False, pad=False)
    processor.chat_template = chat.TEMPLATES["plain"]
    processor.save_pretrained(tmp_path / "llama")
    asked = []
    monkeypatch.setattr(generation, "_answers", lambda model, processor, prompts, *rest: asked.append(prompts))

    def ask(name):
        assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / name)]) == 0
        for folder in (tmp_path / "run", tmp_path / name):
            generate(folder, ["how good"])
        return [processor.decode(prompts[0]) for prompts in asked[-2:]], (tmp_path / name / "README.md").read_text()

    assert running.train(config) == 0
    said, card = ask("texts")
    assert said == ["how good"] * 2 and "apply_chat_template" not in card
    rows = [{"ask": [{"role": "user", "content": "how"}], "say": word} for word in tiny_models.WORDS * 2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert running.train(config, overwrite=True) == 0
    said, card = ask("talks")
    assert said[0] == said[1] != "how good" and "how good" in said[0] and "apply_chat_template" in card


def test_an_export_is_asked_by_stock_transformers_alone(tmp_path, capsys, monkeypatch):
    """Adapter and merged model with the template and the generation settings; the card's own lines run as they stand."""
    train_on_conversations(tmp_path)
    said = generate(tmp_path / "run", ["how good"], max_new_tokens=5)
    for name, words in (("adapter", []), ("merged", ["--merge", "--shard-size", "10KB"])):
        folder = tmp_path / name
        assert main(["export", str(tmp_path / "run"), *words, "--output", str(folder)]) == 0
        assert f"python -m dfl generate {folder}" in capsys.readouterr().out
        assert "generation" in (folder / "chat_template.jinja").read_text() and (folder / "generation_config.json").is_file()
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "load_model", lambda *given, **more: pytest.fail("not stock"))
            assert generate(folder, ["how good"], max_new_tokens=5) == said
        card = (folder / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(folder)!r}")
        exec(code, {})
        assert capsys.readouterr().out and "`messages`" not in card and "messages" in card
    assert main(["generate", str(tmp_path / "merged"), "how", "--peer", "1"]) == 2
    assert "is one model" in capsys.readouterr().err


def test_a_task_from_outside_has_a_card(tmp_path, monkeypatch):
    class Own(tasks.TASKS["causal_lm"]):
        name = "own_language"

    monkeypatch.setitem(tasks.TASKS, "own_language", Own)
    config = pairs_config(tmp_path, train__rounds=1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"task": type(config.model.task)("own_language")})})
    assert running.train(config) == 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "ask, say" in card


def test_an_evaluation_that_is_given_up_gives_up_its_answers(tmp_path):
    from dfl.metrics.evaluator import GivenUp
    run, _ = make_run(pairs_config(tmp_path))
    asked = []

    def halted():
        asked.append(1)
        return len(asked) > len(run.evaluator.batches) * 5 + 3

    with torch.no_grad(), pytest.raises(GivenUp):
        evaluate(run, halted)
