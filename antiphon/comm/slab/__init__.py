"""Transports that put slabs into peers' mailboxes without a barrier: one protocol over three media."""
