"""Somebody's own training script: its process as one peer of a run, whose loop is the script's (dfl/hf/README.md)."""
