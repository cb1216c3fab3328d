"""The readers of a loader: in this process, in threads, or in worker processes."""
