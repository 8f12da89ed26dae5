"""Pictures to learn from: emoji stickers and scenes made of them, and anybody's own folders and shards."""
