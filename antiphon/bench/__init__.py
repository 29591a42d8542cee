"""Measurements and nothing else: steps (`overlap`), exchanges (`comm`), serving load (`serve`), overlap in one engine (`dbo`)."""
