"""The former name of `antiphon.accuracy.lm_eval_model`."""

from antiphon.accuracy.lm_eval_model import AntiphonLM as AntiphonLM
