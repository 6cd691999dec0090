"""The corpus: anonymous memory of real programs, captured page by page, and how it compresses."""
