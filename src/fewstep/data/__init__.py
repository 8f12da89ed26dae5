"""Training data: image folders, WebDataset shards, and samples of a teacher."""
