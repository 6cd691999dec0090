"""Churn: how dense the store stays, and what that costs, over millions of page operations."""
