"""Jobs: what goes on in the background, and what it is made of. Knows nothing of FUSE, control files and the command."""
