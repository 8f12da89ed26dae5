"""Nets around the nets: what training adds to a model and generation never sees."""
