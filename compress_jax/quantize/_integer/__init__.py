"""Integer inference: packed params run on int8 codes with int32 sums."""
