"""Files that are written beside the weights."""
