"""Comparisons of methods and of precisions."""
