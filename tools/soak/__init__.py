"""The soak: for minutes or hours, everything at once on two swaps, with every byte verified. Run by `make soak`."""
