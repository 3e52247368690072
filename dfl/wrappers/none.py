"""Every peer follows its own gradient."""

from dfl.slots import Rule


def none(rule: Rule) -> Rule:
    """Correct nothing: the rule as it is."""
    return rule
