"""How a batch leaves its worker process."""
