"""The project's documents: which there are, the blocks of code in them, and a folder in which their commands run as written."""

import json
import re
import subprocess
from pathlib import Path

import tiny_models
import yaml

ROOT = Path(__file__).parent.parent
# whose commands have tests of their own, because they need hosts, a cluster, or no shell
ELSEWHERE = {"launch/README.md": ("tests/launch/test_hosts.py", "tests/launch/test_slurm.py", "tests/launch/test_teams_launch.py"),
             "launch/SURVIVORS.md": ("tests/launch/test_survivors_launch.py",),
             "topologies/README.md": ("tests/graphs/test_topologies_readme.py",),
             "topologies/gallery/README.md": ("tests/graphs/test_topologies_readme.py",)}
# models of the hub that documents name, and the kind of random model of a few kilobytes that takes their place
MODELS = {"FacebookAI/roberta-base": "bert", "Qwen/Qwen2.5-0.5B": "llama", "openai-community/gpt2": "gpt2",
          "Qwen/Qwen2.5-0.5B-Instruct": "llama"}
TEMPLATE = ("{% for m in messages %}{{ m.role + ' ' + m.content + eos_token }} {% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}")
SHORT = {"rounds": 2, "local_steps": 2}


def paths() -> list[str]:
    """Every Markdown file of the project, the README first."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True,
                          text=True)
    found = done.stdout.split() if not done.returncode else [
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") or part == "runs" for part in path.relative_to(ROOT).parts)]
    return sorted({path for path in found if (ROOT / path).exists()}, key=lambda path: (path != "README.md", path))


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(path), re.S | re.M)


def block(language: str, containing: str) -> str:
    """The one block with this text, in whichever document."""
    (found,) = [code for path in paths() for code in blocks(path, language) if containing in code]
    return found


def commands(path: str) -> list[str]:
    """The lines of a document's shell blocks, without remarks behind them."""
    lines = [line for language in ("bash", "sh") for block in blocks(path, language) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def with_commands() -> list[str]:
    """The documents whose commands run in a `workplace`."""
    return [path for path in paths() if commands(path) and path not in ELSEWHERE]


def recipes() -> dict[str, str]:
    """The recipes that documents give under a name, `# my.yaml` in the block's first line."""
    found = {}
    for path in paths():
        for code in blocks(path, "yaml"):
            name = re.match(r"# ([\w-]+\.yaml)\b", code)
            if name:
                assert name[1] not in found, f"{path}: {name[1]} is given twice"
                found[name[1]] = code
    return found


def scripts() -> dict[str, str]:
    """The scripts that documents give under a name, `# sft.py` in the block's first line."""
    return {name[1]: code for path in paths() for code in blocks(path, "python") if (name := re.match(r"# ([\w-]+\.py)\n", code))}


def workplace(folder: Path) -> Path:
    """A folder like a checkout in which somebody has written the recipes of the documents: with small models in place of those
    that they name, data of the same columns, and two rounds of two steps of short texts."""
    for entry in ("launch", "benchmarks", "tests", "setup.cfg"):
        (folder / entry).symlink_to(ROOT / entry)
    write_data(folder / "my")
    local = {name: tiny_models.save(folder / "models" / kind, kind, layers=2) for name, kind in MODELS.items()}
    for folder_of in set(local.values()):  # what a model of the hub has beside its weights
        if folder_of.name == "llama":
            (folder_of / "chat_template.jinja").write_text(TEMPLATE)
    for name, code in recipes().items():
        tree = yaml.safe_load(code)
        tree["model"]["name"] = str(local[tree["model"]["name"]])
        tree["train"] |= SHORT
        tree["data"]["max_length"] = 32  # small models have few positions
        (folder / name).write_text(yaml.safe_dump(tree))
    for name, code in scripts().items():
        for model, path in local.items():
            code = code.replace(model, str(path))
        code = re.sub(r"max_steps=\d+", "max_steps=4, max_length=16, use_cpu=True", code)
        (folder / name).write_text(re.sub(r"(every|_steps)=\d\d+", r"\1=2", code))
    return folder


def write_data(folder: Path, copies: int = 40) -> None:
    """train.csv and valid.csv (sentence, label), chat.jsonl (prompt, response), talk.jsonl (messages), pairs.jsonl (prompt, chosen,
    rejected), no two rows alike."""
    folder.mkdir()
    words = tiny_models.WORDS
    pairs = [(f"{words[k % len(words)]} {words[k // len(words)]} {word}", word) for k in range(copies) for word in ("good", "bad")]
    rows = [f"{sentence},{label}" for sentence, label in pairs]
    (folder / "train.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    (folder / "valid.csv").write_text("\n".join(["sentence,label", *(f"how {row}" for row in rows[:12])]) + "\n")
    lines = [f'{{"prompt": "what is {sentence}", "response": "{label} {label}"}}' for sentence, label in pairs]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    talks = [{"messages": [{"role": "user", "content": f"what is {sentence}"}, {"role": "assistant", "content": label}]}
             for sentence, label in pairs]
    preferred = [{"prompt": f"what is {sentence}", "chosen": " good film", "rejected": f" {label} node"} for sentence, label in pairs]
    for name, rows in (("talk", talks), ("pairs", preferred)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
