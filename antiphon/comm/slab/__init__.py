"""Transports that put slabs into peers' mailboxes without a barrier: one protocol, three media, and its proof."""
