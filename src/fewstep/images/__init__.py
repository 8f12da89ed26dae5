"""Image files, their metadata, grids and differences."""
