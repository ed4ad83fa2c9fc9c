"""From scores to masks: targets, structures, exact selection, and the builder of methods."""
