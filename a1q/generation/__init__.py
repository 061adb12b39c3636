"""Letting models write: what computes logits token by token, how tokens are chosen, and conversations."""
