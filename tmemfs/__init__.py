"""tmemfs: compressed swap in user space that gives memory back at the speed of VM pressure."""

__version__ = "0.1.0"
