"""Deployment engines (floor 3): one file each, and none knows another."""
