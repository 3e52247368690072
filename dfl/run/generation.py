"""`dfl generate`: what one model of a run says to prompts of one's own."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dfl import extensions, tasks
from dfl.config import Config
from dfl.metrics.answers import continued, left_padded, positions
from dfl.run.evaluation import label_names, with_adapter
from dfl.run.runtime import choose_device, num_threads, place_from_environment
from dfl.seeds import derive
from dfl.store import targets
from dfl.store.runs import mapping, read_config, read_description
from dfl.tasks import chat
from dfl.tasks.language import end_of, opened
from dfl.tasks.models import quiet


def generate(run: Path, prompts: Sequence[str], overrides: Sequence[str] = (), *, peer: str = "consensus", rounds: int | None = None,
             best: bool = False, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> list[str]:
    """An answer to each prompt by the model of `peer`, or the consensus, in a checkpoint of the run; best: the best of an evaluation.

    A run that was trained on conversations gets a prompt as what the user says; others get the text as it stands. Greedy at
    temperature 0; an answer ends where the model has no positions left. run: or a folder that `dfl export` has written, which is
    read by stock transformers and PEFT alone.
    ValueError for a run that learnt no language, for a model that is not there, and for a prompt that is too long for it.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}, --temperature {temperature} and --top-p {top_p}: allowed: from 1, from "
                         "0, and above 0 up to 1")
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
    if targets.find(run).kind in ("adapter", "model") and not (run / "best.json").is_file():
        if peer != "consensus" or rounds is not None or best:
            raise ValueError(f"--peer, --round and --best choose among the models of a run; {str(run)!r} is one model")
        model, processor, made = stock(run)
        return _answers(model, processor, [made(prompt) for prompt in prompts], max_new_tokens, seed, options)
    config = read_config(run, overrides)
    extensions.load(config.plugins)
    kind = tasks.TASKS.get(config.model.task.name)
    if getattr(kind, "auto_class", None) != "AutoModelForCausalLM":
        raise ValueError(f"{str(run)!r} has model.task = {config.model.task.name!r}, which writes nothing; allowed: causal_lm, "
                         "preference")
    folder = adapter_folder(run, peer, rounds, best)
    torch.set_num_threads(num_threads(config))
    base, processor = tasks.load_model(config.model, config.data, label_names(run), seed=derive(config.seed, "head"))
    model = with_adapter(base, folder).to(choose_device(config, place_from_environment())).eval()
    talks = takes_messages(config, run)
    asked = [prompt_ids(config, processor, prompt, talks) for prompt in prompts]
    return _answers(model, processor, asked, max_new_tokens, seed, options)


def stock(folder: Path) -> tuple[Any, Any, Callable[[str], list[int]]]:
    """A model of an exported folder, its tokenizer, and how a prompt becomes tokens: nothing of this project is asked.

    With a chat template in the folder a prompt is what the user says, unless the export says that it has learnt texts. ValueError
    where they cannot read it.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    auto = AutoPeftModelForCausalLM if (folder / targets.ADAPTER_CONFIG).is_file() else AutoModelForCausalLM
    try:
        with quiet():
            model, processor = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each has its own
        raise ValueError(f"{str(folder)!r} cannot be read by stock transformers: {' '.join(str(error).split())[:200]}") from error
    if processor.pad_token_id is None:
        processor.pad_token = processor.eos_token or processor.unk_token

    said = targets.read_json(folder / targets.ABOUT) if (folder / targets.ABOUT).is_file() else {}
    talks = bool(processor.chat_template) and said.get("conversations", True)

    def ids(prompt: str) -> list[int]:
        if talks:
            return list(processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"])
        return processor(prompt)["input_ids"]

    return model, processor, ids


def _answers(model: Any, processor: Any, prompts: Sequence[list[int]], max_new_tokens: int, seed: int, options: dict) -> list[str]:
    longest, most = max(map(len, prompts)), positions(model)
    if longest >= most:
        raise ValueError(f"a prompt has {longest} tokens, and the model takes {most} with its answer; allowed: up to {most - 1}")
    torch.manual_seed(seed)
    ids, mask = left_padded(prompts, processor.pad_token_id)
    device = next(model.parameters()).device
    with torch.no_grad():
        said = continued(model, processor, ids.to(device), mask.to(device), max_new_tokens, **options)
    return [processor.decode(row, skip_special_tokens=True) for row in said.tolist()]


def adapter_folder(run: Path, peer: str, rounds: int | None, best: bool) -> Path:
    """The folder of one model of a run. ValueError where it is not there."""
    if not best:
        return targets.adapter_of(targets.choose_checkpoint(run, rounds), peer)
    if rounds is not None:
        raise ValueError(f"--round {rounds} and --best: give one of them")
    return targets.best_of(run, peer)


def prompt_ids(config: Config, processor: Any, prompt: str, talks: bool) -> list[int]:
    """As the run read its examples up to the answer; talks: they were conversations."""
    if talks:
        talk = chat.with_system([{"role": "user", "content": prompt}], config.data)
        renderer = chat.Renderer(processor, config.data)
        return renderer.ids(renderer.text(talk, "the prompt", asks=True))
    ids = opened(processor(prompt, return_attention_mask=False)["input_ids"], end_of(processor))
    return ids or [processor.bos_token_id if processor.bos_token_id is not None else processor.pad_token_id]


def takes_messages(config: Config, run: Path) -> bool:
    """Whether a run has learnt conversations, as it says; one of a script, which does not, where its recipe names a column of them."""
    return mapping(read_description(run).get("facts")).get("conversations", config.data.messages is not None)


