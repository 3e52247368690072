"""Everybody speaks in every round."""

from dfl.slots import Message, Round, State, Trigger


def always() -> Trigger:
    """Speak in every round."""
    def decide(message: Message, state: State, round: Round) -> tuple[bool, State]:
        return True, state

    return Trigger(lambda message: {}, decide, always=True)
