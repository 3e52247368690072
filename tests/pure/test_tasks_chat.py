"""Conversations through a chat template, what of them is learnt, and every form in which language models get their data."""

import json

import numpy as np
import pytest
import tiny_models

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED
from dfl.tasks import chat
from dfl.tasks.language import CausalLM
from dfl.tasks.tables import Table

TALK = [{"role": "system", "content": "not bad"}, {"role": "user", "content": "how good"},
        {"role": "assistant", "content": "the film"}, {"role": "user", "content": "what"},
        {"role": "assistant", "content": "a graph of tensor"}]
PLAIN = ("{% for m in messages %}{{ m.role + ' ' }}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} "
         "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}")
MARKED = PLAIN.replace("{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}",
                       "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
                       "{% else %}{{ m.content }}{% endif %}")


@pytest.fixture
def words():
    return tiny_models.tokenizer(encoder=False)


def encoded(words, rows, **fields):
    data = DataConfig(**{"messages": "messages", "template": PLAIN} | fields)
    table = Table(rows, "talk.jsonl", range(1, len(next(iter(rows.values()))) + 1))
    chat.use_template(words, data)
    CausalLM.check(table, data)
    return CausalLM.encode(table, np.zeros(len(table)), data, words)


def learnt(words, feature):
    return words.decode([i for i in feature["labels"] if i != IGNORED]).split()


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_is_learnt_and_nothing_else(words, template):
    """By the template's markers and by the lengths of what comes before, which agree."""
    (feature,) = encoded(words, {"messages": [TALK]}, template=template).features
    assert learnt(words, feature) == "the film </s> a graph of tensor </s>".split()
    assert len(feature["input_ids"]) == len(feature["labels"]) == 5 + 11 + 2  # a word for every role
    assert (feature["labels"][feature["labels"] != IGNORED] == feature["input_ids"][feature["labels"] != IGNORED]).all()


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_last_answer_alone_or_every_token(words, template):
    (feature,) = encoded(words, {"messages": [TALK]}, template=template, learn="last").features
    assert learnt(words, feature) == "a graph of tensor </s>".split()
    (feature,) = encoded(words, {"messages": [TALK]}, template=template, learn="all").features
    assert (feature["labels"] == feature["input_ids"]).all()


def test_a_template_that_changes_what_was_said_is_refused_by_its_line(words):
    """As those do that cut the reasoning of earlier turns; its last answer can be learnt all the same."""
    rewriting = PLAIN.replace("{{ m.content }}",
                              "{% if loop.last and m.role == 'assistant' %}{{ 'train ' }}{% endif %}{{ m.content }}")
    with pytest.raises(ValueError, match="line 2 of talk.jsonl: the chat template writes the .* once message 3 is there.*last"):
        encoded(words, {"messages": [TALK[1:3], TALK]}, template=rewriting)
    (feature,) = encoded(words, {"messages": [TALK]}, template=rewriting, learn="last").features
    assert learnt(words, feature) == "train a graph of tensor </s>".split()


def test_no_template_is_a_clear_error(words):
    with pytest.raises(ValueError, match="no chat template, which .* need; give data.template: a Jinja file, or chatml, plain"):
        encoded(words, {"messages": [TALK]}, template=None)
    with pytest.raises(ValueError, match="data.template = 'my.jinja' is not a file"):
        encoded(words, {"messages": [TALK]}, template="my.jinja")


def test_the_templates_that_we_bring_mark_the_answers(words, tmp_path):
    for name in chat.TEMPLATES:
        features = encoded(words, {"messages": [TALK]}, template=name).features
        assert [word for word in learnt(words, features[0]) if word != "[UNK]"] == "the film </s> a graph of tensor </s>".split(), name
    (tmp_path / "own.jinja").write_text(PLAIN)
    assert chat.read_template(DataConfig(template=str(tmp_path / "own.jinja"))) == PLAIN


def test_tools_and_a_system_message_reach_the_template(words):
    """Tool turns are not learnt; keys that a table filled with nothing are not there."""
    template = "{% if tools %}{{ tools[0].function.name + ' ' }}{% endif %}" + PLAIN
    talk = [{"role": "user", "content": "how good", "tool_calls": None}, {"role": "tool", "content": "bad node"},
            {"role": "assistant", "content": "the film"}]
    tools = [{"type": "function", "function": {"name": "graph"}}]
    (feature,) = encoded(words, {"messages": [json.dumps(talk)], "tools": [json.dumps(tools)]}, template=template, tools="tools",
                         system="a peer").features
    text = words.decode(feature["input_ids"]).split()
    assert [word for word in text if word != "[UNK]"] == "graph a peer how good bad node the film </s>".split()
    assert learnt(words, feature) == "the film </s>".split()


def test_nothing_that_a_table_on_disk_fills_in_reaches_the_template(words):
    """Arrow gives all tools, and all their calls, the keys of each."""
    template = "{% for tool in tools %}{{ tool.function | tojson }} {% endfor %}" + PLAIN.replace(
        "{{ m.content }}", "{{ m.content }}{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}")
    call = {"function": {"name": "graph", "arguments": {"x": "1", "y": None}}}
    talk = [{"role": "assistant", "content": "film", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "graph", "parameters": {"properties": {"x": {"type": "string"}, "y": None}}}}]
    words.chat_template = template
    renderer = chat.Renderer(words, DataConfig())
    said = renderer.text(chat.messages_of(talk, "here"), "here", chat.tools_of(
        Table({"tools": [tools]}, "talk.jsonl", [1]), DataConfig(tools="tools"))[0])
    assert '"x"' in said and '"y"' not in said and "null" not in said


@pytest.mark.parametrize("value, said", [
    ("{no json", "holds a text that is no JSON, not a list of tools"), ({"name": "graph"}, "allowed: a list of tools, each a mapping"),
    ('["graph"]', "allowed: a list of tools, each a mapping"), (3, "holds '3'; allowed: a list of tools")])
def test_tools_that_are_none_are_named_with_their_line(words, value, said):
    columns = {"messages": [TALK] * 4, "tools": [None, "", [], value]}
    with pytest.raises(ValueError, match=f"data.tools = 'tools': line 4 of talk.jsonl.*{said}"):
        encoded(words, columns, tools="tools")
    with pytest.raises(ValueError, match="data.tools = 'tool': no such column in talk.jsonl .did you mean 'tools'"):
        encoded(words, columns, tools="tool")


@pytest.mark.parametrize("fields", [{"system": "a peer"}, {"tools": "ask"}, {}], ids=str)
def test_a_template_that_no_row_goes_through_is_refused(words, fields):
    """Texts are learnt as they stand, whatever is said of conversations."""
    name = next(iter(fields), "template")
    with pytest.raises(ValueError, match=f"data.{name} = .* is for conversations, and the rows of talk.jsonl hold texts"):
        encoded(words, {"ask": [""], "say": ["good"]}, messages=None, prompt="ask", response="say",
                **{"template": None if fields else PLAIN} | fields)


def test_other_spellings_of_a_conversation(words):
    shared = [{"from": "human", "value": "how good"}, {"from": "gpt", "value": "the film"}]
    (one,) = encoded(words, {"messages": [shared]}).features
    (other,) = encoded(words, {"messages": [TALK[1:3]]}).features
    assert (one["input_ids"] == other["input_ids"]).all()
    columns = {"ask": [TALK[:4], TALK[:2]], "say": [TALK[4:], "the film"]}
    split = encoded(words, columns, messages=None, prompt="ask", response="say").features
    assert [learnt(words, feature) for feature in split] == ["a graph of tensor </s>".split(), "the film </s>".split()]


@pytest.mark.parametrize("value, said", [
    ("hello", "holds a text that is no JSON"), ([], r"holds '\[\]', not a list of messages"), (["hi"], "message 1, is 'hi'"),
    ([{"content": "hi"}], "message 1, is .*allowed: a role, and a text"), ([{"role": "user", "content": 3}], "message 1")])
def test_what_is_no_conversation_is_named_with_its_line(words, value, said):
    with pytest.raises(ValueError, match=f"data.messages = 'messages': line 2 of talk.jsonl.*{said}"):
        encoded(words, {"messages": [TALK, value]})


def test_what_the_template_refuses_is_one_line(words):
    template = "{{ raise_exception('no tools please') }}"
    with pytest.raises(ValueError, match="line 1 of talk.jsonl: the chat template refuses the conversation: no tools please"):
        encoded(words, {"messages": [TALK]}, template=template)


def test_a_long_conversation_loses_its_end_and_is_counted(words):
    found = encoded(words, {"messages": [TALK, TALK[1:3], TALK[3:]]}, max_length=7)
    assert [len(feature["input_ids"]) for feature in found.features] == [7, 7, 7]
    assert found.cut == {"text": 2, "nothing": 1}


def test_two_ways_at_once_are_refused(words):
    with pytest.raises(ValueError, match="data.messages = 'messages' and data.prompt = 'ask': a row is a conversation, or"):
        encoded(words, {"messages": [TALK], "ask": ["how"], "say": ["good"]}, prompt="ask", response="say")
