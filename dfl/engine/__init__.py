"""The heart: one round of gossip for the peers that a process hosts."""
