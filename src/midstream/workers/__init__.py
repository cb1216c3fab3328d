"""The readers of a loader: in this process, in threads, or in worker processes.

A worker that dies ends the pass with a `midstream.WorkerError`; none is started again within it.
"""
