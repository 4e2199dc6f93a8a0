"""Tensors and sums that several ranks share."""
