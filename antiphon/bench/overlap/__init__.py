"""`antiphon bench overlap`: steps with and without overlap, and their parts. Entry: `steps.run_overlap`."""
