"""Conversations as tokens: the tokenizer's own chat template, and which tokens of it are to be learnt.

Not here: what a task makes of them (`language`, `preference`), or where a column of them comes from (`files`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED
from dfl.tasks.tables import Table, column

# templates for bases that have none; the markers tell which tokens are the assistant's
TEMPLATES = {
    "chatml": "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
              "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' + eos_token }}"
              "{% endgeneration %}"
              "{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
              "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "plain": "{%- for message in messages %}{{ message.role + ': ' }}"
             "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
             "{%- else %}{{ message.content }}{% endif %}{{ '\n' }}{% endfor %}"
             "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# of the form {"from": ..., "value": ...}, as ShareGPT wrote it
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}

Tokens = tuple[list[int], list[int]]  # ids, and targets: the ids that are learnt, IGNORED elsewhere


def read_template(data: DataConfig) -> str | None:
    """What data.template stands for: a name of TEMPLATES, the template itself, or a file; None: the tokenizer's own."""
    given = data.template
    if given is None or given in TEMPLATES:
        return given and TEMPLATES[given]
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"data.template = {given!r} is not a file; allowed: a Jinja file, {', '.join(TEMPLATES)}, or the template")
    return path.read_text(encoding="utf-8")


def use_template(processor: Any, data: DataConfig) -> None:
    """Give the tokenizer the template of the recipe, with which it is also saved."""
    template = read_template(data)
    if template is not None:
        processor.chat_template = template


def conversations(table: Table, key: str, name: str) -> list[list[dict[str, Any]]]:
    """A column of conversations, lists of {role, content}, or such a list as JSON. ValueError names the first line that holds none."""
    return [messages_of(value, f"data.{key} = {name!r}: line {line} of {table.where}")
            for line, value in zip(table.lines, column(table, key, name), strict=True)]


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """One conversation; without keys that hold nothing, which a table fills in. ValueError begins with `where`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{where} holds a text that is no JSON, not a list of messages") from None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where} holds {str(value)[:40]!r}, not a list of messages such as [{{'role': 'user', 'content': 'Hi'}}]")
    return [_message(one, f"{where}, message {k + 1}") for k, one in enumerate(value)]


def _message(one: Any, where: str) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise ValueError(f"{where}, is {str(one)[:40]!r}; allowed: a mapping with role and content")
    if one.get("role") is None and one.get("from") is not None:
        one = {"role": _ROLES.get(one["from"], one["from"]), "content": one.get("value")}
    kept = without_nothing(one)
    if not isinstance(kept.get("role"), str) or not (isinstance(kept.get("content"), str) or kept.get("tool_calls")):
        raise ValueError(f"{where}, is {str(one)[:60]!r}; allowed: a role, and a text as content or tool_calls")
    return {"content": "", **kept}


def said_by(role: str, value: Any, where: str) -> list[dict[str, Any]]:
    """A part of a conversation: a text, which `role` says, or messages."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": value}]
    return messages_of(value, where)


def tools_of(table: Table, data: DataConfig) -> list[list[Any] | None]:
    """The tools of every row, a list or one as JSON; None where there are none. ValueError names the first line that holds neither."""
    if data.tools is None:
        return [None] * len(table)
    return [_tools(value, f"data.tools = {data.tools!r}: line {line} of {table.where}")
            for line, value in zip(table.lines, column(table, "tools", data.tools), strict=True)]


def _tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{where} holds a text that is no JSON, not a list of tools") from None
    if not value:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"{where} holds {str(value)[:40]!r}; allowed: a list of tools, each a mapping, or nothing")
    return without_nothing(value)


def without_nothing(value: Any) -> Any:
    """Without keys that hold None, which a table on disk fills in where another row has them."""
    if isinstance(value, Mapping):
        return {key: without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [without_nothing(one) for one in value] if isinstance(value, (list, tuple)) else value


def holds_messages(table: Table, name: str) -> bool:
    """Whether the first value of a column is a list, as conversations are."""
    values = table.columns.get(name) or [None]
    return isinstance(values[0], (list, tuple))


def check_fields(table: Table, data: DataConfig, talks: bool) -> None:
    """ValueError for tools that are none, and for fields of conversations where the rows are texts, which no template sees."""
    tools_of(table, data)
    given = next(((name, value) for name in ("template", "system", "tools") if (value := getattr(data, name)) is not None), None)
    if given is not None and not talks:
        raise ValueError(f"data.{given[0]} = {given[1][:40]!r} is for conversations, and the rows of {table.where} hold texts, which "
                         "no template sees; allowed: null, or rows of messages (data.messages, or lists of messages as data.prompt)")


def with_system(messages: list[dict], data: DataConfig) -> list[dict]:
    """data.system in front of a conversation that has no such message."""
    if data.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": data.system}, *messages]


class Renderer:
    """Conversations through the chat template of a tokenizer. ValueError where there is none, or no fast tokenizer to count with."""

    def __init__(self, processor: Any, data: DataConfig):
        self.processor, self.data = processor, data
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"the tokenizer of the model has no chat template, which conversations need; give data.template: a Jinja "
                             f"file, or {', '.join(TEMPLATES)}")
        if not processor.is_fast:
            raise ValueError("the tokenizer of the model is a slow one, which does not say where its tokens lie in a conversation; "
                             "allowed with conversations: a model with tokenizer.json")

    def text(self, messages: Sequence[Mapping], where: str, tools: Any = None, *, asks: bool = False) -> str:
        """The conversation as text; asks: with the beginning of an answer. ValueError with what the template says of it."""
        try:
            return self.processor.apply_chat_template(list(messages), tools=tools or None, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # Jinja's own errors, TypeError of a template, its raise_exception
            raise ValueError(f"{where}: the chat template refuses the conversation: {' '.join(str(error).split())[:200]}") from error

    def tokens(self, messages: Sequence[Mapping], where: str, tools: Any = None, first: int = 0) -> Tokens:
        """Tokens and targets. first: the messages before this one are a prompt, and not learnt."""
        learn = self.data.learn
        if learn == "all" and not first:
            ids = self.ids(self.text(messages, where, tools))
            return ids, list(ids)
        if learn == "responses" and not first and self.marks(tools):
            return self._by_markers(messages, where, tools)
        answers = [k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"]
        return self._by_prefixes(messages, where, tools, answers[-1:] if learn == "last" else answers)

    def marks(self, tools: Any = None) -> bool:
        """Whether the template says itself what is the assistant's."""
        return _MARKER.search(self.processor.get_chat_template(tools=tools or None)) is not None

    def ids(self, text: str) -> list[int]:
        return self.processor(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _by_markers(self, messages: Sequence[Mapping], where: str, tools: Any) -> Tokens:
        self.text(messages, where, tools)  # whose refusal is a clear one
        found = self.processor.apply_chat_template(list(messages), tools=tools or None, tokenize=True, return_dict=True,
                                                   return_assistant_tokens_mask=True)
        ids = list(found["input_ids"])
        return ids, [token if mine else IGNORED for token, mine in zip(ids, found["assistant_masks"], strict=True)]

    def _by_prefixes(self, messages: Sequence[Mapping], where: str, tools: Any, answers: Sequence[int]) -> Tokens:
        """An answer is what the conversation has more with it than up to it; a token belongs to it that holds any of that."""
        whole, spans = self.text(messages, where, tools), []
        for k in answers:
            before = self.text(messages[:k], where, tools, asks=True)
            after = whole if k + 1 == len(messages) else self.text(messages[:k + 1], where, tools)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(f"{where}: the chat template writes the beginning of the conversation otherwise once message {k + 1} "
                                 "is there, so it does not tell which tokens are the assistant's; allowed: data.learn: last or all, "
                                 "or data.template with {% generation %} around them")
            spans.append((len(before), len(after)))
        found = self.processor(whole, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True,
                               verbose=False)
        ids, places = found["input_ids"], found["offset_mapping"]
        mine = [any(begin < stop and end > start for start, stop in spans) for begin, end in places]
        return list(ids), [token if learnt else IGNORED for token, learnt in zip(ids, mine, strict=True)]


def split_at_answer(tokens: Tokens) -> tuple[list[int], list[int]]:
    """The prompt and the rest of a conversation, divided at the first token that is learnt."""
    ids, targets = tokens
    cut = next((k for k, target in enumerate(targets) if target != IGNORED), len(ids))
    return ids[:cut], ids[cut:]
