"""`dfl generate`: what one model of a run says to prompts of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfl import extensions, tasks
from dfl.config import Config
from dfl.metrics.answers import continued, left_padded
from dfl.run.evaluation import label_names, with_adapter
from dfl.run.runtime import choose_device, num_threads, place_from_environment
from dfl.seeds import derive
from dfl.store import targets
from dfl.store.runs import read_config
from dfl.tasks import chat


def generate(run: Path, prompts: Sequence[str], overrides: Sequence[str] = (), *, peer: str = "consensus", rounds: int | None = None,
             best: bool = False, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> list[str]:
    """An answer to each prompt by the model of `peer`, or the consensus, in a checkpoint of the run; best: the best of an evaluation.

    A run that was trained on conversations gets a prompt as what the user says; others get the text as it stands. Greedy at
    temperature 0. ValueError for a run that learnt no language, and for a model that is not there.
    """
    config = read_config(run, overrides)
    extensions.load(config.plugins)
    kind = tasks.TASKS.get(config.model.task.name)
    if getattr(kind, "auto_class", None) != "AutoModelForCausalLM":
        raise ValueError(f"{str(run)!r} has model.task = {config.model.task.name!r}, which writes nothing; allowed: causal_lm, "
                         "preference")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"--max-new-tokens {max_new_tokens} and --temperature {temperature}: allowed: from 1, and from 0")
    folder = adapter_folder(run, peer, rounds, best)
    torch.set_num_threads(num_threads(config))
    base, processor = tasks.load_model(config.model, config.data, label_names(run), seed=derive(config.seed, "head"))
    model = with_adapter(base, folder).to(choose_device(config, place_from_environment())).eval()
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
    torch.manual_seed(seed)
    ids, mask = left_padded([prompt_ids(config, processor, prompt) for prompt in prompts], processor.pad_token_id)
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


def prompt_ids(config: Config, processor: Any, prompt: str) -> list[int]:
    """As the run read its examples up to the answer."""
    if takes_messages(config, processor):
        talk = chat.with_system([{"role": "user", "content": prompt}], config.data)
        renderer = chat.Renderer(processor, config.data)
        return renderer.ids(renderer.text(talk, "the prompt", asks=True))
    ids = processor(prompt, return_attention_mask=False)["input_ids"]
    ids = ids[:-1] if ids[-1:] == [processor.eos_token_id] else ids  # some tokenizers close every text
    return ids or [processor.bos_token_id if processor.bos_token_id is not None else processor.pad_token_id]


def takes_messages(config: Config, processor: Any) -> bool:
    """Whether a run has learnt conversations: from a column of them, or where its template was chosen for them."""
    return config.data.messages is not None or config.data.template is not None


