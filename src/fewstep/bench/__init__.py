"""What generation costs, measured on this machine."""
