"""The OpenAI-compatible HTTP server: one process, one event loop, in front of an `AsyncEngine`.

Nothing here is imported by offline use; `antiphon serve` is `antiphon.server.run.run_server`.
"""
