"""Hours of everything at once on two swaps, with every byte verified: `make soak`."""
