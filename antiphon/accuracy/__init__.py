"""Checks whether the outputs are right: the bundled word problems, and Antiphon as a model of lm_eval."""
