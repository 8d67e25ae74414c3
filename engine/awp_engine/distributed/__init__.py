"""Several ranks: what they tell each other, share, compare, and survive. Imports nothing by itself."""
