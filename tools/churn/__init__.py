"""Churn: how dense the store stays over millions of page operations, and what that costs."""
