"""What lies on disk: run directories, leases, manifests, records, checkpoints; reading them needs no torch."""
