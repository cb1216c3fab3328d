"""Shows pipelines and their samples as text and in notebooks."""
