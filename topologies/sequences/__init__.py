"""Sequences W(t) that change from round to round, one module a family."""

from topologies.sequences import activation, base_graph, epidemic, exponential, groups, matcha, matchings, presence, traces

SEQUENCES = {
    **activation.SEQUENCES,
    **exponential.SEQUENCES,
    **matchings.SEQUENCES,
    **base_graph.SEQUENCES,
    **groups.SEQUENCES,
    **matcha.SEQUENCES,
    **epidemic.SEQUENCES,
    **presence.SEQUENCES,
    **traces.SEQUENCES,
}
