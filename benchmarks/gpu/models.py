"""Models of an architecture with random weights, made where they are used, and examples of random tokens: nothing is loaded."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from benchmarks.gpu.setting import Setting
from dfl.adapters import ranks
from dfl.adapters.attach import attach
from dfl.config import LoraConfig, TrainConfig
from dfl.tasks.classification import SequenceClassification
from dfl.tasks.language import CausalLM
from dfl.training.executors import EXECUTORS, choose
from dfl.training.hosted import HostedPeers
from dfl.training.phase import ModelTrainer
from dfl.training.stream import DataStream

_EXAMPLES = 256


def small_encoder(setting: Setting) -> torch.nn.Module:
    """Two layers of an encoder of MiniLM's size; of a rehearsal 32 wide."""
    width = setting.pick(384, 32)
    return encoder(setting, layers=2, width=width, heads=setting.pick(12, 2))


def roberta_large(setting: Setting) -> torch.nn.Module:
    return encoder(setting, layers=setting.pick(24, 2), width=setting.pick(1024, 32), heads=setting.pick(16, 2))


def encoder(setting: Setting, layers: int, width: int, heads: int) -> torch.nn.Module:
    config = transformers.RobertaConfig(vocab_size=setting.pick(50265, 100), hidden_size=width, num_hidden_layers=layers,
                                        num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=514,
                                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    return _made(transformers.RobertaForSequenceClassification, config, setting.device, torch.float32)


def llama(setting: Setting, layers: int) -> torch.nn.Module:
    """The architecture of an 8B Llama 3 with `layers` of its 32 layers, bfloat16; of a rehearsal 32 wide."""
    large = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**setting.pick(large, small), num_hidden_layers=layers,
                                      num_key_value_heads=setting.pick(8, 1), max_position_embeddings=2048, use_cache=False)
    return _made(transformers.LlamaForCausalLM, config, setting.device, torch.bfloat16)


def _made(kind: type, config, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """On the device from the start: 8B numbers take minutes on a CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def hosted(model: torch.nn.Module, setting: Setting, num: int, *, batch: int, length: int, executor: str = "auto", rank: int = 8,
           steps: int = 1, targets: str | None = None) -> tuple[HostedPeers, ModelTrainer]:
    """`num` peers on a model, query and value (or `targets`) adapted, each with examples of `length` random tokens."""
    language = hasattr(model, "lm_head")
    task = CausalLM(0) if language else SequenceClassification(1)
    lora = LoraConfig(targets=targets or (("q_proj", "v_proj") if language else ("query", "value")), rank=rank)
    adapted = attach(model, lora, task.name, [], 0, partial(ranks.resolve, lora, num, 0))
    rng = np.random.default_rng(0)
    features = [{"input_ids": ids, "labels": ids if language else k % 2}
                for k, ids in enumerate(rng.integers(2, model.config.vocab_size, (_EXAMPLES, length)).astype(np.int32))]
    streams = [DataStream(np.arange(_EXAMPLES), batch, 0, peer) for peer in range(num)]
    train = TrainConfig(local_steps=steps, batch_size=batch, rounds=100)
    peers = HostedPeers(range(num), adapted, streams, train, seed=0, device=setting.device)
    chosen = choose(executor, setting.device) if executor == "auto" else EXECUTORS[executor]()
    return peers, ModelTrainer(peers, task, SimpleNamespace(features=features), chosen, length)
