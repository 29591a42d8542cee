"""`antiphon bench decode`: decode steps of the real engine, serial, dual and eager. Entry: `cells.run_decode`."""
