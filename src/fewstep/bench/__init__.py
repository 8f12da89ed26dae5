"""What generation costs, measured on this machine (floor 4)."""
