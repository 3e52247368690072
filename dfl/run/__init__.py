"""The life of a run: build, train, folder, checkpoint, callbacks, processes."""
