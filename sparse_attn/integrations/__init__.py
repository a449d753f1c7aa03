"""Attention over global masks inside the models of other libraries."""
