"""Where weights come from: `hub` finds a checkpoint, `files` opens it, `weights` loads it, `dummy` replaces it."""
