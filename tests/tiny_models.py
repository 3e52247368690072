"""Model folders of a few kilobytes with random weights, for tests that need an architecture and not its knowledge."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "the a of and to graph tensor array model node peer round train mix is not good bad film how what who".split()


def tokenizer(*, pad: bool = True, encoder: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Words by their place in WORDS; an encoder's also puts [CLS] before and [SEP] after."""
    special = ["[UNK]", "[CLS]", "[SEP]", "</s>", "[PAD]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {}
    if encoder:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    names |= {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def save(folder: Path, kind: str, layers: int = 3) -> Path:
    """A folder with a random model of the kind bert, gpt2, llama, distilbert, roberta, albert or vit."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 64}
    make = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**size)),
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**size, pad_token_id=4)),
        "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**size, embedding_size=8)),
        "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(
            vocab_size=64, dim=16, n_layers=layers, n_heads=2, hidden_dim=32, max_position_embeddings=64)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=layers, n_head=2, n_positions=64)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=1)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)),
    }
    make[kind]().save_pretrained(folder)
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        decoder = kind in ("gpt2", "llama")
        tokenizer(pad=not decoder, encoder=not decoder).save_pretrained(folder)
    return folder
