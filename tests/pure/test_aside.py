"""What goes on beside the local phase of a GPU: in a thread, on a stream of its own, in an order that events keep. The stream and its
events are told by a notebook here; tests/pure/test_gpu.py has real ones."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from dfl.transport.aside import Aside

CPU = torch.device("cpu")


def test_the_caller_goes_on_and_gets_what_was_made_in_order():
    aside, may_go, found = Aside(CPU), threading.Event(), []

    def first():
        assert may_go.wait(20)
        found.append("first")
        return threading.current_thread().name

    one, other = aside.begin(first), aside.begin(lambda: found.append("second"))
    assert found == []
    may_go.set()
    assert one() == "dfl-aside" and other() is None and found == ["first", "second"]
    aside.end()


def test_an_error_comes_where_it_is_waited_for_and_the_next_call_is_taken():
    aside = Aside(CPU)

    def fails():
        raise ConnectionError("process 1 is gone")

    one, other = aside.begin(fails), aside.begin(lambda: 5)
    with pytest.raises(ConnectionError, match="process 1 is gone"):
        one()
    assert other() == 5
    aside.end()


def test_nobody_waits_for_it_at_the_end():
    before = set(threading.enumerate())  # an earlier test's may still be on its way out
    aside = Aside(CPU)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon and thread.name == "dfl-aside"
    aside.end()
    thread.join(20)
    assert not thread.is_alive()


class Notebook:
    """What a GPU's streams and events are asked for."""

    def __init__(self):
        self.said, self.local = [], threading.local()

    def Stream(self, device):
        return self._stream("aside")

    def _stream(self, name: str):
        return SimpleNamespace(name=name, wait_event=lambda event: self.said.append(f"{name} waits for {event.on}"))

    def Event(self):
        event = SimpleNamespace(on="")

        def record(stream):
            event.on = stream.name
            self.said.append(f"event on {stream.name}")

        event.record = record
        return event

    def current_stream(self, device):
        return getattr(self.local, "stream", self._stream("main"))

    @contextlib.contextmanager
    def stream(self, stream):
        self.local.stream = stream
        yield
        del self.local.stream


def test_it_begins_behind_what_was_there_and_is_used_behind_its_end():
    book = Notebook()

    def used(made):
        return [SimpleNamespace(record_stream=lambda stream: book.said.append(f"{made} is used by {stream.name}"))]

    aside = Aside(torch.device("cuda", 0), used, book)
    arrived = aside.begin(lambda: book.said.append(f"a copy on {book.current_stream(None).name}") or "what came")
    assert arrived() == "what came"
    assert book.said == ["event on main", "aside waits for main", "a copy on aside", "event on aside", "main waits for aside",
                         "what came is used by main"]
    aside.end()
