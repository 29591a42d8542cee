"""Measurements only: of exchanges (`comm`), steps (`overlap`), serving load (`serve`) and whole engines (`dbo`)."""
