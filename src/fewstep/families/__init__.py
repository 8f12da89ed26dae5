"""Model families: how a text-to-image model is read, run and written."""
