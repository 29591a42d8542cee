"""`antiphon bench comm`: exchanges over the link alone and beside computation. Entry: `exchanges.run_comm`."""
