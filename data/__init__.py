"""Domain-labelled text: sources, clean-up, de-duplication, tokenizer, token store and sampler."""
