"""Pack: tokenized documents into rows of one length."""
