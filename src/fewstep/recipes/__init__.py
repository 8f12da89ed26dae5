"""Recipes: one Python function a run, returning one :class:`fewstep.train.Run` (floor 5)."""
