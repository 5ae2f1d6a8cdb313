"""Streaming filters over long series."""
