"""DataLoader: batches of a pipeline in order, and the state of the run at any step."""
