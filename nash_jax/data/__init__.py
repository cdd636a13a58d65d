"""Data: prompts and preferences through seqio, the tokenizer, templates, converters."""
