"""Tools for tests and measurements; not part of the package."""
