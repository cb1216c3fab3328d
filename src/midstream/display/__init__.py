"""How pipelines and their samples look, as text and in a notebook."""
