"""Three old folders (target, mask, masked) -> a dataset that trains, and a report of what was found in them."""
