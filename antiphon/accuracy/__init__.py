"""Whether the outputs are right: the bundled word problems, and `antiphon` as a model of lm_eval."""
