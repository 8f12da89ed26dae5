"""Modules that export targets share."""
