"""Data: prompts and preferences through seqio, tokenizer, templates, converters."""
