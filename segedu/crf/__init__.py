"""Fully connected CRFs: `exact` is the reference, `lattice` the fast filter, `dense` what one calls, `rnn` the learned one."""

from segedu.crf.dense import PARAMETERS, DenseCRF, WithCRF
from segedu.crf.rnn import CRFasRNN

__all__ = ["PARAMETERS", "CRFasRNN", "DenseCRF", "WithCRF"]
