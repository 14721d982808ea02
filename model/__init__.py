"""The language model, with custom routers inside DeepSpeed MoE layers."""
