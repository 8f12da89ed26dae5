"""What the engines share (floor 3)."""
