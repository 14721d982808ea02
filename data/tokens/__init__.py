"""From documents to batches: tokenizer, token store and sampler."""
