"""The local phase: hosted rows, optimiser, data stream, executors, dropout, masks, starts."""
