"""Edits of the residual stream inside a `with`."""
