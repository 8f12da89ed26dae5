"""Distillation of a few-step student."""
