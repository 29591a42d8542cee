"""`antiphon bench serve`: a serving load on an HTTP server. Entry: `load.run_serve`."""
