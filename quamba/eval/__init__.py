"""Evaluation: what quantization does to a model's predictions."""

from quamba.eval.perplexity import CachedLogits, Comparison, Perplexity, cache_logits, compare, perplexity

__all__ = ["CachedLogits", "Comparison", "Perplexity", "cache_logits", "compare", "perplexity"]
